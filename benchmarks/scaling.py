"""What grows with what: memory with the batch and the image, steps per second with the devices.

python -m benchmarks.scaling
python -m benchmarks.scaling --recipe feature_matching --batch-sizes 100 1000 --sides 28

Memory is the compiler's own count: the state (parameters, optimizer, averages), and what one step needs
beside it. So is what each of several devices does of a step that they share, and the memory that it needs;
the batch is rounded up to a multiple of the devices. Over the devices of the rates go eight replicates,
each number of devices in a process of its own. On CPU the devices are pretended ones that share the cores:
that they compute the same is tested, and a rate that stays the same is all that there is to see.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _recipes, _runs, _worker, step_time
from gan_jax import parallel, run_dir
from gan_jax.types import BatchSizes

REPLICATES = 8


def main() -> None:
  parser = _runs.parser(__doc__, "scaling")
  add = parser.add_argument
  add("--recipe", choices=_recipes.HPARAMS, default="conv_ssgan")
  add("--batch-sizes", type=_runs.positive, nargs="+", default=[64, 256, 1024])
  add("--sides", type=_runs.positive, nargs="+", default=[28, 56, 112], help="of square images")
  add("--devices", type=_runs.positive, nargs="+", default=[1, 2, 4], help="numbers of devices")
  add("--split", type=_runs.positive, nargs="+", default=[1, 2, 4, 8], help="devices that share a step")
  add("--seconds", type=_runs.seconds, default=5.0, help="of steps a number of devices (5)")
  args = parser.parse_args()
  if any(REPLICATES % num for num in args.devices):
    parser.error(f"--devices must divide the {REPLICATES} replicates")
  if any(max(args.split) % num for num in args.split):
    parser.error("--split must divide its largest number")
  jax.config.update("jax_num_cpu_devices", max(args.split))  # without effect on accelerators
  jobs = [functools.partial(memory, args.recipe, s, b) for s in args.sides for b in args.batch_sizes]
  jobs += [functools.partial(shared_step, args.recipe, num, max(args.split)) for num in args.split]
  jobs += [functools.partial(rate, args.recipe, num, args.seconds) for num in args.devices]
  shared = {"benchmark": "scaling", "recipe": args.recipe, **run_dir.environment()}
  results = []
  for job in jobs:
    results.append({**shared, **job()})
    print(json.dumps(results[-1]), flush=True)
  _runs.finish(args.name, results, table)


def memory(name: str, side: int, batch_size: int) -> dict:
  """Megabytes of the compiled step, by the compiler's count."""
  dataset = _recipes.random_images(side)
  recipe = _recipes.make(name, dataset, batch_size)
  state, images = jax.eval_shape(lambda: _recipes.start(recipe, dataset, [0]))
  found: Any = _worker.Ours(recipe, state, images).compiled.memory_analysis()
  leaves = jax.tree.leaves((state.g, state.d, state.ema))
  return {
    "side": side,
    "rows": list(recipe.batch),
    "state_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20,
    "step_mb": found.temp_size_in_bytes / 2**20,
  }


def shared_step(name: str, num: int, multiple: int) -> dict:
  """What each of `num` devices does of one step and needs for it, by the compiler's count."""
  devices = jax.devices()
  if num > len(devices):
    return {"split_over": num, "note": f"not run: there are {len(devices)} devices"}
  dataset = _recipes.random_images(28)
  recipe = _recipes.make(name, dataset)
  sizes = BatchSizes(*(-(-size // multiple) * multiple for size in recipe.batch))
  recipe = parallel.over_devices(dataclasses.replace(recipe, batch=sizes), devices[:num])
  arguments = parallel.replicated(_recipes.start(recipe, dataset, [0]), devices[:num])
  compiled: Any = jax.jit(recipe.make_multi_step(1)).lower(*arguments, np.int32(0)).compile()
  return {
    "split_over": num,
    "rows": list(sizes),
    "mflop_each": compiled.cost_analysis()["flops"] / 1e6,  # a loop's body counts once: one step
    "step_mb_each": compiled.memory_analysis().temp_size_in_bytes / 2**20,
  }


def rate(name: str, num: int, seconds: float) -> dict:
  """Steps per second of all replicates together, on so many devices."""
  env = {"JAX_NUM_CPU_DEVICES": str(num), "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num)))}
  task = {"contender": "ours", "recipe": name, "replicates": REPLICATES, "random_side": 28}
  worker = step_time.Worker(task, env=env)
  entry = step_time.Entry("ours", REPLICATES, worker, found=worker.ready)
  step_time.run(entry, seconds)
  entry.close()
  return {"devices": num, "steps_per_second": REPLICATES * entry.rates[0]}


def table(results: Sequence[dict]) -> str:
  """Markdown: memory, then rates."""
  sizes = [
    (
      *(f"{line['side']}x{line['side']}", "/".join(map(str, line["rows"]))),
      *(f"{line['state_mb']:.0f} MB", f"{line['step_mb']:.0f} MB"),
    )
    for line in results
    if "side" in line
  ]
  rates = [(line["devices"], f"{line['steps_per_second']:.1f}") for line in results if "devices" in line]
  split = [
    (line["split_over"], f"{line['mflop_each']:.0f}", f"{line['step_mb_each']:.0f} MB")
    for line in results
    if "mflop_each" in line
  ]
  return "\n\n".join(
    [
      _runs.markdown(("image", "rows", "state", "one step"), sizes),
      _runs.markdown(("devices that share a step", "MFLOP of each", "memory of each"), split),
      _runs.markdown(("devices", f"steps/s of {REPLICATES} replicates together"), rates),
      f"{results[0]['recipe']}, {_runs.environment(results[0])}",
    ]
  )


if __name__ == "__main__":
  _runs.cli(main)
