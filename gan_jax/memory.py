"""How much memory there is, whether images fit into it, and whether training images are streamed."""

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import psutil

from gan_jax.output import say
from gan_jax.types import InputError

Streaming = Literal["auto", "yes", "no"]
HOST_SHARE, DEVICE_SHARE = 0.25, 0.5
"""Shares of the host's free memory and of the device's memory that `auto` lets training images take."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container to the processes in it (cgroup v2)."""


def free() -> int:
  """Free host memory in bytes: the machine's or, if it is less, what a container's limit leaves."""
  num_bytes = psutil.virtual_memory().available
  with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
    limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    lines = (CGROUP / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in map(str.split, lines)}
    num_bytes = min(num_bytes, limit - used + stat.get("inactive_file", 0))  # cached files make room
  return max(num_bytes, 0)


def peak() -> int:
  """The most host memory that this process has had, in bytes."""
  # `getrusage` starts from the memory of the parent process.
  return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def of_devices(devices: Sequence[Any]) -> int | None:
  """Memory of these devices of this process in bytes; None if they have none of their own, as CPUs."""
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
  known = [limit for limit in limits if limit is not None]
  return sum(known) if len(known) == len(devices) else None


def check(
  num: int, image_shape: tuple[int, int, int], hint: str, *, num_bytes: int = 1, room: int | None = None
) -> None:
  """Raises `InputError` with the hint if images, at `num_bytes` a value, exceed `room` (None: `free`)."""
  needed, room = num_bytes * num * math.prod(image_shape), free() if room is None else room
  if needed > room:
    height, width, _ = image_shape
    raise InputError(
      f"{num:,} images of {height}x{width} take {needed / 2**30:,.1f} GB, but only {room / 2**30:,.1f} GB"
      f" of memory is free: {hint}"
    )


def is_streamed(choice: Streaming, shape: Sequence[int], *, held: int = 0) -> bool:
  """Whether training images of shape `[N, H, W, C]` are streamed; prints a message if `auto` decides so.

  Host memory counts as available if it is free now or `held` by the images themselves, in bytes.
  """
  if choice != "auto":
    return choice == "yes"
  room, where = (
    HOST_SHARE * (free() + held),
    f"{HOST_SHARE:.0%} of the free memory",
  )
  on_device = of_devices(jax.local_devices()[:1])
  if on_device is not None and DEVICE_SHARE * on_device < room:
    room, where = DEVICE_SHARE * on_device, f"{DEVICE_SHARE:.0%} of the device's memory"
  needed = math.prod(shape)
  if needed > room:
    say(
      f"{shape[0]:,} training images take {needed / 1e9:.1f} GB, more than {where} ({room / 1e9:.1f} GB):"
      " they are read during training; pass --stream no to hold them in memory"
    )
  return needed > room
