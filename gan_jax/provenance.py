"""Provenance of results: device, library versions, commit, cost."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import gan_jax
from gan_jax.types import Json


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


def cost(lowered: Any, compiled: Any = None) -> dict[str, float]:
  """XLA's count of a program's operations, `flops`, and of its memory traffic, `bytes accessed`.

  It is of the compiled program on CPU, and elsewhere of the program as written, because compiled programs
  hide products and convolutions in library calls there.

  Args:
    lowered: `jax.jit(f).lower(...)`.
    compiled: `lowered.compile()`, if it is there already.
  """
  if jax.default_backend() != "cpu":
    return lowered.cost_analysis()
  return (compiled or lowered.compile()).cost_analysis()


def num_cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))
