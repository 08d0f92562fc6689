"""Speed of differentiable augmentation: ours and public JAX libraries that cover part of it, interleaved.

python -m benchmarks.augmentation
python -m benchmarks.augmentation --sides 64 --batch 64 --name augmentation-64

Random parameters are drawn per image, on random colour pictures, with many batches per dispatch as in
training. The libraries transform one image and are vmapped over the batch. Operations are similar, not
identical: augmax resamples its mirror images, its contrast is a curve about grey, its jitter works in HSV,
and it has no operation for saturation alone. In each round every library runs for about `--seconds`, in
random order, and ratios compare two runs of the same round. A library that is not installed (extra `bench`)
is skipped, and the result says so.
"""

import importlib
import importlib.metadata
import importlib.util
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import _runs
from gan_jax import augment, provenance
from gan_jax.types import Augment, Json

LIBRARIES = "ours", "dm_pix", "augmax"
DISPATCH = 20
"""Batches per dispatch."""


def main() -> None:
  parser = _runs.parser(__doc__, "augmentation")
  parser.add_argument(
    "--sides", type=_runs.positive, nargs="+", default=[32, 64], help="of square pictures"
  )
  parser.add_argument("--batch", type=_runs.positive, default=146, help="images at once (146)")
  parser.add_argument("--rounds", type=_runs.positive, default=7, help="rounds (7)")
  parser.add_argument("--seconds", type=_runs.seconds, default=0.5, help="of a run in a round (0.5)")
  args = parser.parse_args()
  results = []
  for side in args.sides:
    x = jax.random.uniform(jax.random.key(0), (args.batch, side, side, 3))
    for operation in OPERATIONS:
      line = {"benchmark": "augmentation", "operation": operation, "side": side, "batch": args.batch}
      line |= {"rounds": args.rounds, "dispatch": DISPATCH}
      results += [line | row for row in measure(operation, x, args.rounds, args.seconds)]
  found = provenance.environment()
  found["versions"] |= {name: importlib.metadata.version(name) for name in LIBRARIES[1:] if _is_there(name)}
  _runs.finish(args.name, [result | found for result in results], table)


def measure(operation: str, x: Array, rounds: int, seconds: float) -> list[Json]:
  """One row per library: milliseconds per batch, and the speedup of ours over it, over the rounds."""
  found = {name: make(x.shape) for name, make in OPERATIONS[operation].items() if _is_there(name)}
  programs = {name: _many(transform) for name, transform in found.items()}
  num = {}
  for name, program in programs.items():
    _seconds(program, x, 1)  # compiles
    num[name] = max(1, round(seconds / _seconds(program, x, 1)))
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(rounds):
    for name in random.sample(list(programs), len(programs)):
      times[name].append(1e3 * _seconds(programs[name], x, num[name]) / num[name] / DISPATCH)
  rows = []
  for name in LIBRARIES:
    if name not in OPERATIONS[operation]:
      continue
    if name not in times:
      rows.append({"library": name, "not_run": f"{name} is not installed"})
      continue
    ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
    spread = lambda values: {"median": statistics.median(values), "min": min(values), "max": max(values)}
    rows.append({"library": name, "ms": spread(times[name]), "ours_is_faster_by": spread(ratios)})
  return rows


def _is_there(name: str) -> bool:
  return name == "ours" or importlib.util.find_spec(name) is not None


def _many(transform: Augment) -> Callable[[Array, Array], Array]:
  @jax.jit
  def run(key: Array, x: Array) -> Array:
    keys = jax.random.split(key, DISPATCH)
    return jax.lax.fori_loop(0, DISPATCH, lambda i, x: transform(keys[i], x), x)

  return run


def _seconds(program: Callable[[Array, Array], Array], x: Array, num: int) -> float:
  begin = time.perf_counter()
  for i in range(num):
    program(jax.random.key(i), x).block_until_ready()
  return time.perf_counter() - begin


# --- The operations by library, each a function of the batch shape


def _pix(one: Callable[[Any, Array, Array], Array]) -> Callable[[Sequence[int]], Augment]:
  """Makes an `Augment` from a function of dm-pix, a key and an image."""

  def make(shape: Sequence[int]) -> Augment:
    pix = importlib.import_module("dm_pix")
    each = jax.vmap(lambda key, x: one(pix, key, x))
    return lambda key, x: each(jax.random.split(key, shape[0]), x)

  return make


def _augmax(name: str, *args: Any, **kwargs: Any) -> Callable[[Sequence[int]], Augment]:
  def make(shape: Sequence[int]) -> Augment:
    augmax: Any = importlib.import_module("augmax")
    each = jax.vmap(augmax.Chain(getattr(augmax, name)(*args, **kwargs)))
    return lambda key, x: _clip(each(jax.random.split(key, shape[0]), x))

  return make


def _clip(x: Array) -> Array:
  return jnp.clip(x, 0.0, 1.0)


def _turned(pix: Any, key: Array, x: Array) -> Array:
  angle = math.radians(15) * jax.random.uniform(key, minval=-1.0, maxval=1.0)
  return pix.rotate(x, angle, mode="constant")


def _jittered(pix: Any, key: Array, x: Array) -> Array:
  keys = jax.random.split(key, 3)
  x = pix.random_contrast(keys[1], pix.random_brightness(keys[0], x, 0.2), 0.6, 1.4)
  return _clip(pix.random_hue(keys[2], x, 20 / 360))


OPERATIONS: dict[str, dict[str, Callable[[Sequence[int]], Augment]]] = {
  "mirror": {
    "ours": lambda _: augment.flip,
    "dm_pix": _pix(lambda pix, key, x: pix.random_flip_left_right(key, x)),
    "augmax": _augmax("HorizontalFlip", p=0.5),
  },
  "turn by up to 15 degrees, bilinear": {
    "ours": lambda _: augment.affine(rotate=15.0),
    "dm_pix": _pix(_turned),
    "augmax": _augmax("Rotate", (-15, 15)),
  },
  "contrast": {
    "ours": lambda _: augment.brightness_contrast(contrast=0.4),
    "dm_pix": _pix(lambda pix, key, x: _clip(pix.random_contrast(key, x, 0.6, 1.4))),
    "augmax": _augmax("RandomContrast", (-0.8, 0.8), p=1.0),
  },
  "saturation": {
    "ours": lambda _: augment.saturation(0.5),
    "dm_pix": _pix(lambda pix, key, x: _clip(pix.random_saturation(key, x, 0.5, 1.5))),
  },
  "brightness, contrast, hue": {
    "ours": lambda _: augment.chain(
      augment.brightness_contrast(brightness=0.2, contrast=0.4), augment.hue(20.0)
    ),
    "dm_pix": _pix(_jittered),
    "augmax": _augmax("ColorJitter", brightness=0.2, contrast=0.4, saturation=0.0, hue=20 / 360, p=1.0),
  },
}
"""Operation -> library -> transformation."""


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per operation and side."""
  found = {(row["operation"], row["side"], row["library"]): row for row in results}
  rows = []
  for operation, side in dict.fromkeys((row["operation"], row["side"]) for row in results):
    ours = found[operation, side, "ours"]
    rows.append([f"{operation}{_runs.mark(ours)}", f"{side}x{side}", f"{ours['ms']['median']:.2f}"])
    for library in LIBRARIES[1:]:
      row = found.get((operation, side, library), {"not_run": ""})
      if "ms" in row:
        ratio = row["ours_is_faster_by"]["median"]
        rows[-1].append(f"{row['ms']['median']:.2f} ({ratio:.1f})")
      else:
        rows[-1].append(row["not_run"])
  head = "operation", "pictures", "ours, ms", "dm-pix", "augmax"
  first, versions = results[0], results[0]["versions"]
  used = ["", *(f"{name} {versions[name]}" for name in LIBRARIES[1:] if name in versions)]
  note = (
    f"Batches of {first['batch']} colour pictures, medians of {first['rounds']} rounds{', '.join(used)}."
  )
  return _runs.with_environment(_runs.markdown(head, rows), results, note)


if __name__ == "__main__":
  _runs.cli(main)
