"""What grows with what: memory with the batch and the image, updates per second with the devices.

python -m benchmarks.scaling
python -m benchmarks.scaling --update feature_matching --batch-sizes 100 1000 --sides 28

Memory is the compiler's own count: the state (parameters, optimizer, averages), and what one update needs
beside it. Over the devices go eight replicates, each number of devices in a process of its own. On CPU the
devices are pretended ones that share the cores: that they compute the same is tested, and a rate that stays
the same is all that there is to see.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _runs, updates
from gan_jax import data, parallel, runs, steps

REPLICATES = 8


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--update", choices=updates.NAMES, default="conv_ssgan")
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024])
  parser.add_argument("--sides", type=int, nargs="+", default=[28, 56, 112], help="of square images")
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of devices")
  parser.add_argument("--seconds", type=float, default=5.0, help="of updates a number of devices (5)")
  parser.add_argument("--name", default="scaling", help="name of the file of results (scaling)")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if min([*args.batch_sizes, *args.devices]) < 1 or min(args.sides) < 8:
    parser.error("batch sizes and devices must be at least 1, and sides at least 8")
  if any(REPLICATES % num for num in args.devices):
    parser.error(f"--devices must divide the {REPLICATES} replicates")
  if args.worker:
    print(json.dumps(rate(args.update, args.seconds)))
    return

  shared = {"benchmark": "scaling", "update": args.update, **runs.environment()}
  results = []
  for side in args.sides:
    for batch_size in args.batch_sizes:
      results.append({**shared, **memory(args.update, side, batch_size)})
      print(json.dumps(results[-1]), flush=True)
  for num in args.devices:
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", "--update", args.update]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(num), "CUDA_VISIBLE_DEVICES": _first(num)}
    command += ["--seconds", str(args.seconds)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if out.returncode:
      sys.exit(out.stderr)
    results.append({**shared, **json.loads(out.stdout)})
    print(json.dumps(results[-1]), flush=True)
  _runs.write(args.name, results)
  print(table(results))


def _first(num: int) -> str:
  return ",".join(map(str, range(num)))


def memory(name: str, side: int, batch_size: int) -> dict:
  """Megabytes of the compiled update, by the compiler's count."""
  update = updates.make(name, (side, side, 1), 10, batch_size)
  images, fn = _images(side), steps.make_updates(update.step(), update.draw(), max_updates=50)
  state = jax.eval_shape(update.init, jax.random.key(0), images)
  compiled = jax.jit(fn, donate_argnums=0).lower(state, images, np.int32(0)).compile()
  found: Any = compiled.memory_analysis()
  leaves = jax.tree.leaves((state.g, state.d, state.ema))
  return {
    "side": side,
    "rows": list(vars(update.rows).values()),
    "state_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20,
    "update_mb": found.temp_size_in_bytes / 2**20,
  }


def rate(name: str, seconds: float) -> dict:
  """Updates per second of all replicates together, on all devices that there are."""
  update, images = updates.make(name, (28, 28, 1), 10), _images(28)
  states = parallel.stack([update.init(jax.random.key(i), images) for i in range(REPLICATES)])
  each = lambda a: jnp.broadcast_to(a, (REPLICATES, *a.shape))
  together = images.replace(x_lab=each(images.x_lab), y_lab=each(images.y_lab))
  states, together = parallel.place(states, together)
  fn = steps.make_updates(update.step(), update.draw(), max_updates=50)
  run = jax.jit(parallel.replicate(fn), donate_argnums=0)
  states, _ = jax.block_until_ready(run(states, together, np.int32(2)))
  done, begin = 0, time.perf_counter()
  while time.perf_counter() - begin < seconds:
    states, _ = jax.block_until_ready(run(states, together, np.int32(2)))
    done += 2 * REPLICATES
  return {"devices": jax.device_count(), "updates_per_second": done / (time.perf_counter() - begin)}


def _images(side: int) -> data.DeviceData:
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, size=(500, side, side, 1), dtype=np.uint8)
  return data.DeviceData(jnp.asarray(x[:100]), jnp.arange(100) % 10, jnp.asarray(x), jnp.asarray(x[:0]))


def table(results: list[dict]) -> str:
  """Markdown: memory, then rates."""
  lines = ["| image | rows | state | one update |", "|---" * 4 + "|"]
  for line in (line for line in results if "side" in line):
    size, rows = f"{line['side']}x{line['side']}", "/".join(map(str, line["rows"]))
    lines.append(f"| {size} | {rows} | {line['state_mb']:.0f} MB | {line['update_mb']:.0f} MB |")
  lines += ["", f"| devices | updates/s of {REPLICATES} replicates together |", "|---" * 2 + "|"]
  for line in (line for line in results if "devices" in line):
    lines.append(f"| {line['devices']} | {line['updates_per_second']:.1f} |")
  return "\n".join([*lines, "", f"{results[0]['update']}, {_runs.environment(results[0])}"])


if __name__ == "__main__":
  main()
