"""Provenance of results: device, library versions, commit, operations."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import gan_jax
from gan_jax import kernels
from gan_jax.types import InputError, Json


def environment() -> Json:
  """Device, versions and commit, as recorded with every result and every line of a benchmark."""
  device = jax.devices()[0]
  names = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")
  root, commit = Path(__file__).parent.parent, ""
  if (root / ".git").exists():  # else this is an installed package, perhaps inside some repository
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
      commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
  num = num_cores()
  cores = f"{device.platform}, {num} core{'s' * (num != 1)}"
  return {
    "device": cores if device.platform == "cpu" else device.device_kind,
    "versions": {
      "gan_jax": gan_jax.__version__,
      "python": platform.python_version(),
      **{name: metadata.version(name) for name in names},
    },
    "commit": commit or None,
  }


def flops(fn: Callable[..., Any], *args: Any) -> float:
  """XLA's count of the floating-point operations of a program as it is written.

  Of JAX's own operations, see `kernels.stock`, before optimisation: what is computed, not how, and so the
  same number on every device. A loop's body counts once.

  Args:
    fn: the function.
    args: its arguments; shapes are enough.

  Raises:
    InputError: JAX_PLATFORMS excludes the CPU, or the program names accelerators.
  """
  try:
    cpu = jax.local_devices(backend="cpu")[0]  # JAX counts the operations of no other uncompiled program
  except RuntimeError as error:
    raise InputError("counting operations needs the CPU too: add ,cpu to JAX_PLATFORMS") from error
  shapes = jax.eval_shape(lambda *args: args, *args)  # arrays would ask for the device that they are on
  with jax.default_device(cpu), kernels.stock(True):
    counted: Any = jax.jit(fn).lower(*shapes).cost_analysis()
  if counted is None:
    raise InputError("the operations of a program that names accelerators cannot be counted")
  return counted["flops"]


def num_cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))
