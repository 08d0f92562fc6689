"""One contender of `step_time` in its own process: it builds, warms up, and waits for commands.

The only argument is its task as JSON. Commands on standard input are `run N`, `matmul`, `memory` and
`flops`; every answer is a line of JSON on standard output. While waiting it uses no CPU.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _recipes
from gan_jax import data, datasets, memory, provenance, replicates, steps
from gan_jax.datasets import Dataset
from gan_jax.recipes import Recipe, gan
from gan_jax.types import Json, TrainState

OPTIONS = ("strategy", "batch_size", "data_dir", "manual_dir", "random_side")
"""Optional keys of a task; with `random_side`, it runs on random images of that side."""


class Contender(Protocol):
  """An implementation to time."""

  def run(self, num: int) -> None:
    """Runs `num` steps; the device may still be busy when it returns."""
    ...

  def synchronize(self) -> None:
    """Waits for the device."""
    ...


class Ours:
  """Many steps per dispatch, data on the device; `state` and `images` may be those of replicates."""

  def __init__(
    self, recipe: Recipe, state: TrainState, images: data.DeviceData, *, strategy=None, dispatch: int = 50
  ):
    self.state, self.images, self._dispatch = state, images, dispatch
    self._multi_step = recipe.make_multi_step(dispatch)
    if state.step.ndim:
      self._multi_step = replicates.replicate(self._multi_step, strategy=strategy)
    begin = time.perf_counter()
    lowered = jax.jit(self._multi_step, donate_argnums=0).lower(state, images, np.int32(0))
    self.compiled = lowered.compile()
    self.seconds_compile = time.perf_counter() - begin

  def run(self, num: int) -> None:
    for done in range(0, num, self._dispatch):
      now = np.int32(min(self._dispatch, num - done))
      self.state, _ = self.compiled(self.state, self.images, now)

  def synchronize(self) -> None:
    jax.block_until_ready(self.state)

  def flops(self) -> float:
    """Of one step."""
    return provenance.flops(self._multi_step, self.state, self.images, np.int32(0))


def main() -> None:
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # everything else that is printed
  task = dict.fromkeys(OPTIONS) | json.loads(sys.argv[1])
  say = lambda **answer: print(json.dumps(answer), file=answers)
  if task["random_side"]:
    dataset = _recipes.random_images(task["random_side"])
  else:
    dataset = datasets.load(task["dataset"], data_dir=task["data_dir"], manual_dir=task["manual_dir"])
  recipe = _recipes.make(task["recipe"], dataset, task["batch_size"])
  every = _recipes.penalty_every(recipe)
  environment = provenance.environment()
  make, device_memory = prepare(task, recipe, dataset, environment)
  start, begin = peak_mb(), time.perf_counter()
  contender = make()
  contender.run(every)
  contender.synchronize()
  seconds_first = time.perf_counter() - begin
  begin = time.perf_counter()
  while time.perf_counter() - begin < 0.5:  # until caches are warm and lazy compilation is done
    seconds(contender, 2 * every)
  say(
    seconds_first=seconds_first,
    seconds_per_step=seconds(contender, 4 * every) / (4 * every),
    rows=list(recipe.batch),
    every=every,
    num_devices=jax.device_count(),
    dataset=dataset.name,
    note=dataset.note,
    **environment,
  )
  for line in sys.stdin:
    command, *rest = line.split()
    if command == "run":
      say(seconds=seconds(contender, int(rest[0])))
    elif command == "matmul":
      say(matmul_flops_per_second=matmul_rate())
    elif command == "memory":
      say(peak_memory_mb=peak_mb(), memory_mb=peak_mb() - start, device_memory_mb=device_memory())
    elif command == "flops":
      say(flops_per_step=flops(recipe, dataset))


def prepare(
  task: Json, recipe: Recipe, dataset: Dataset, environment: Json
) -> tuple[Callable[[], Contender], Callable[[], float | None]]:
  """Functions that make the contender and give its device memory in MB; completes `environment`."""
  if task["contender"] == "ours":
    start = _recipes.start(recipe, dataset, range(task["replicates"]))
    return lambda: Ours(recipe, *start, strategy=task["strategy"]), _jax_memory
  state, images = _recipes.start(recipe, dataset, [0])
  if task["contender"] == "plain_jax":
    from benchmarks.peers import plain_jax

    return lambda: plain_jax.Gan(recipe, state, images), _jax_memory
  import torch  # pyright: ignore[reportMissingImports]

  from benchmarks.peers import torch_gan

  environment["versions"]["torch"] = torch.__version__
  environment["threads"] = torch.get_num_threads()
  device, device_memory = "cpu", _jax_memory
  if torch.cuda.is_available():
    device, device_memory = "cuda", lambda: torch.cuda.max_memory_allocated() / 2**20
    environment["device"] = torch.cuda.get_device_name()
  compiled = task["contender"] == "torch_compile"
  return lambda: torch_gan.Gan(recipe, state, images, device=device, compiled=compiled), device_memory


def seconds(contender: Contender, num: int) -> float:
  """Seconds for `num` steps, with the device idle before and after."""
  contender.synchronize()
  begin = time.perf_counter()
  contender.run(num)
  contender.synchronize()
  return time.perf_counter() - begin


def peak_mb() -> float:
  """Peak memory of this process."""
  return memory.peak() / 2**20


def _jax_memory() -> float | None:
  stats = jax.devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] / 2**20 if stats else None


# A chain, so that no product is optimised away; the scale of the matrices keeps the values constant.
_products = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: a @ b, a))


def matmul_rate() -> float:
  """FLOP per second of float32 matrix products, at the steps' precision and the best size."""
  best = 0.0
  for side in [1024] if jax.default_backend() == "cpu" else [1024, 4096, 8192]:
    a = jnp.full((side, side), 1 / side)
    _products(a).block_until_ready()
    begin = time.perf_counter()
    _products(a).block_until_ready()
    best = max(best, 10 * 2 * side**3 / (time.perf_counter() - begin))
  return best


def flops(recipe: Recipe, dataset: Dataset) -> float:
  """XLA's operation count for a single step as it is written.

  It counts two operations per multiply-add of a product or convolution (inside the image, not in its
  padding) and one per elementwise result, but none for exponentials and the like. A penalty that is applied
  every k steps, which XLA counts in every step, is weighted by 1 / k.
  """
  found, every = _counted(recipe, dataset), _recipes.penalty_every(recipe)
  if every > 1:
    hparams: Any = dataclasses.replace(recipe.hparams, penalty="none")  # pyright: ignore[reportCallIssue]
    without = _counted(gan.build(hparams, recipe.image_shape, recipe.num_classes), dataset)
    found = without + (found - without) / every
  return found


def _counted(recipe: Recipe, dataset: Dataset) -> float:
  state, images = _recipes.start(recipe, dataset, [0])
  step, sample_batch = recipe.make_step(), data.make_sample_batch(recipe.batch)

  def one(state: TrainState, images: data.DeviceData):
    key_batch, _ = steps.step_keys(state.key, state.step)
    return step(state, sample_batch(key_batch, images))

  return provenance.flops(one, state, images)


if __name__ == "__main__":
  main()
