"""How much host memory is free, and whether images fit into it."""

import contextlib
import math
from pathlib import Path

import psutil

from gan_jax.types import InputError

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


def check(num: int, image_shape: tuple[int, int, int], hint: str, *, num_bytes: int = 1) -> None:
  """Raises `InputError` with the hint if the images, at `num_bytes` per value, exceed the free memory."""
  needed, room = num_bytes * num * math.prod(image_shape), free()
  if needed > room:
    height, width, _ = image_shape
    raise InputError(
      f"{num:,} images of {height}x{width} take {needed / 2**30:,.1f} GB, but only {room / 2**30:,.1f} GB"
      f" of memory is free: {hint}"
    )
