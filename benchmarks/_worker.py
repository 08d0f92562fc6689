"""One contender of `step_time` in a process of its own: it builds, warms up, waits, and does as it is told.

The only argument is its task as JSON. On standard input come `run N`, `matmul`, `memory` and `cost`; every
answer is a line of JSON on standard output. While it waits it uses no processor.
"""

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import updates
from gan_jax import data, parallel, runs, steps
from gan_jax.types import Json, TrainState


class Contender(Protocol):
  """What is timed."""

  def run(self, num: int) -> None:
    """Does `num` updates; the device may still be at work when it returns."""
    ...

  def synchronize(self) -> None:
    """Waits for the device."""
    ...


class Ours:
  """Many updates a dispatch, the data on the device; with `replicates`, so many GANs in each.

  The replicates have their own seeds and, where labels are few, their own labelled images.
  """

  def __init__(self, update: updates.Update, dataset: data.Dataset, task: Json, dispatch: int = 50):
    fn = steps.make_updates(update.step(), update.draw(), max_updates=dispatch)
    splits = [update.split(dataset, seed) for seed in range(task["replicates"])]
    self.data, self.dispatch = data.to_device(dataset, splits[0]), dispatch
    states = [update.init(jax.random.key(split.seed), self.data) for split in splits]
    self.state = states[0]
    if len(splits) > 1:
      self.data = data.to_device_splits(dataset, splits)
      self.state, self.data = parallel.place(parallel.stack(states), self.data)
      fn = parallel.replicate(fn, how=task["how"])
    self._updates = jax.jit(fn, donate_argnums=0)

  def run(self, num: int) -> None:
    for done in range(0, num, self.dispatch):
      now = np.int32(min(self.dispatch, num - done))
      self.state, self.metrics = self._updates(self.state, self.data, now)

  def synchronize(self) -> None:
    jax.block_until_ready((self.state, self.metrics))


def main() -> None:
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # whatever else is printed
  task = json.loads(sys.argv[1])
  say = lambda **answer: print(json.dumps(answer), file=answers)

  dataset = data.load(task["dataset"], data_dir=task["data_dir"], manual_dir=task["manual_dir"])
  update = updates.make(task["update"], dataset.image_shape, dataset.num_classes, task["batch_size"])
  contender, environment, device_memory, seconds_first, start = build(task, update, dataset)
  warm(contender, update.penalty_every)
  say(
    seconds_first=seconds_first,
    seconds_per_update=seconds(contender, 4 * update.penalty_every) / (4 * update.penalty_every),
    rows=list(vars(update.rows).values()),
    images=update.images,
    every=update.penalty_every,
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
    elif command == "cost":
      say(**cost(update, dataset))


def build(
  task: Json, update: updates.Update, dataset: data.Dataset
) -> tuple[Contender, Json, Callable[[], float | None], float, float]:
  """The contender, its environment and device memory, seconds to its first updates, memory before it."""
  environment, key = runs.environment(), jax.random.key(0)
  device_memory = _jax_memory
  if task["contender"] == "ours":
    make = lambda: Ours(update, dataset, task)
  else:
    device_data = data.to_device(dataset, update.split(dataset))
    state = update.init(key, device_data)
    if task["contender"] == "plain_jax":
      from benchmarks.peers import plain_jax

      make = lambda: plain_jax.Gan(update, state, device_data)
    else:
      import torch  # pyright: ignore[reportMissingImports]

      from benchmarks.peers import torch_gan

      device = "cuda" if torch.cuda.is_available() else "cpu"
      compiled = task["contender"] == "torch_compile"
      make = lambda: torch_gan.Gan(update, state, device_data, device=device, compiled=compiled)
      if device == "cuda":
        environment["device"] = torch.cuda.get_device_name()
        device_memory = lambda: torch.cuda.max_memory_allocated() / 2**20
      environment["versions"]["torch"] = torch.__version__
      environment["threads"] = torch.get_num_threads()
  start, begin = peak_mb(), time.perf_counter()
  contender: Contender = make()
  contender.run(update.penalty_every)
  contender.synchronize()
  return contender, environment, device_memory, time.perf_counter() - begin, start


def seconds(contender: Contender, num: int) -> float:
  """Of `num` updates, the device idle before and after."""
  contender.synchronize()
  begin = time.perf_counter()
  contender.run(num)
  contender.synchronize()
  return time.perf_counter() - begin


def warm(contender: Contender, every: int, least: float = 0.5) -> None:
  """Runs until caches are warm and lazily made programs are made."""
  spent = 0.0
  while spent < least:
    spent += seconds(contender, 2 * every)


def peak_mb() -> float:
  """The most memory that this process has had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _jax_memory() -> float | None:
  stats = jax.devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] / 2**20 if stats else None


@functools.cache
def _products() -> tuple[Any, list[jax.Array]]:
  sides = [1024] if jax.default_backend() == "cpu" else [1024, 4096, 8192]
  # A chain, so that no product can be left out; its factor keeps the numbers as they are.
  chain = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: a @ b, a))
  return chain, [jnp.full((side, side), 1 / side) for side in sides]


def matmul_rate() -> float:
  """Operations a second of float32 matrix products, at the updates' precision and the best size."""
  chain, matrices = _products()
  best = 0.0
  for a in matrices:
    chain(a).block_until_ready()
    begin = time.perf_counter()
    chain(a).block_until_ready()
    best = max(best, 10 * 2 * len(a) ** 3 / (time.perf_counter() - begin))
  return best


def cost(update: updates.Update, dataset: data.Dataset) -> Json:
  """What XLA counts in the program of one update alone, outside of the loop.

  It counts the operations of the optimized program: two for each multiply-add of a product or convolution
  (inside the image, not of its padding) and one for each elementwise result, but none for exponentials and
  the like. Integers count as well: a random normal number is about 90 operations. Of the two branches of a
  term that is seldom due it counts the larger, in every update.
  """
  device_data = data.to_device(dataset, update.split(dataset))
  step, draw = update.step(), update.draw()

  def one(state: TrainState, device_data: data.DeviceData):
    key_batch, _ = steps.update_keys(state)
    return step(state, draw(key_batch, device_data))

  state = update.init(jax.random.key(0), device_data)
  lowered = jax.jit(one).lower(state, device_data)
  found: Any = lowered.compile().cost_analysis()
  return {"flops_per_update": found["flops"], "bytes_per_update": found.get("bytes accessed")}


if __name__ == "__main__":
  main()
