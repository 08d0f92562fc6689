"""How long until it is good: seconds of training to a fixed test error with few labels.

python -m benchmarks.time_to_accuracy
python -m benchmarks.time_to_accuracy --target 1 --splits 0 1 2

The semi-supervised GAN of `experiments.mnist_ssgan`, its recipe and schedule unchanged. Every `--every`
updates the averaged discriminator reads the test set; this takes no part in training, and the clock stands
still meanwhile. The target is fixed before: 2 % on CPU, 1 % on an accelerator. Compilation is timed apart,
once, because the splits share the program.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _runs, updates
from gan_jax import data, metrics, runs, steps


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", type=float, help="test error in percent (2 on CPU, else 1)")
  parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="split seeds")
  parser.add_argument("--every", type=int, default=100, help="updates between two readings (100)")
  parser.add_argument("--network", choices=("conv", "mlp"), default="conv")
  parser.add_argument("--dataset", default="mnist")
  parser.add_argument("--data-dir", help="where tfds keeps its datasets")
  parser.add_argument("--manual-dir", help="a folder with the dataset's original files")
  parser.add_argument("--name", default="time_to_accuracy", help="name of the file of results")
  args = parser.parse_args()
  target = args.target
  if target is None:
    target = 2.0 if jax.default_backend() == "cpu" else 1.0
  if args.every < 1 or target < 0:
    parser.error("--every must be at least 1 and --target must not be negative")

  dataset = data.load(args.dataset, data_dir=args.data_dir, manual_dir=args.manual_dir)
  name = {"conv": "conv_ssgan", "mlp": "feature_matching"}[args.network]
  update = updates.make(name, dataset.image_shape, dataset.num_classes)
  race = Race(update, dataset, target, args.every)
  results = []
  for split in args.splits:
    result = {"benchmark": "time_to_accuracy", "update": name, "target": target, **race.run(split)}
    results.append({**result, "dataset": dataset.name, **runs.environment()})
    reached = f"{result['seconds']:.0f} s" if result["reached"] else "not reached"
    print(
      f"split {split}: {reached}, {result['updates']} updates, {result['test_error']:.2f} %", flush=True
    )
  _runs.write(args.name, results)
  print(table(results))


class Race:
  """Trains one split after the other with one compiled program."""

  def __init__(self, update: updates.Update, dataset: data.Dataset, target: float, every: int):
    self._update, self._dataset, self._target, self._every = update, dataset, target, every
    self._updates = jax.jit(
      steps.make_updates(update.step(), update.draw(), max_updates=every), donate_argnums=0
    )
    self._classify = jax.jit(steps.make_classifier(update.d))
    self._compiled = None

  def run(self, seed: int) -> dict:
    """Seconds and updates to the target, or to the end of the schedule."""
    split = self._update.split(self._dataset, seed)
    device_data = data.to_device(self._dataset, split)
    state = self._update.init(jax.random.key(seed), device_data)
    seconds_compile = 0.0
    if self._compiled is None:
      begin = time.perf_counter()
      self._compiled = self._updates.lower(state, device_data, np.int32(0)).compile()
      seconds_compile = time.perf_counter() - begin
    seconds, done, error, curve = 0.0, 0, 100.0, []
    while done < self._update.steps and error > self._target:
      num = min(self._every, self._update.steps - done)
      begin = time.perf_counter()
      state, history = self._compiled(state, device_data, np.int32(num))
      jax.block_until_ready(history)
      seconds, done = seconds + time.perf_counter() - begin, done + num
      error = self._test_error(state)
      curve.append([done, round(seconds, 2), error])
    return {
      "split_seed": seed,
      "label_split_sha256": split.sha256,
      "num_labels": len(split.indices),
      "reached": error <= self._target,
      "seconds": seconds,
      "seconds_compile": seconds_compile,
      "updates": done,
      "test_error": error,
      "curve": curve,
    }

  def _test_error(self, state) -> float:
    logits, _ = metrics.predict(lambda x: self._classify(state, jnp.asarray(x)), self._dataset.x_test)
    return metrics.error_percent(logits, self._dataset.y_test)


def table(results: list[dict]) -> str:
  """Markdown: a row a split, then mean and spread where all reached the target."""
  target, compiling = results[0]["target"], max(result["seconds_compile"] for result in results)
  lines = [f"| split | training to {target:g} % | with compilation | updates |", "|---" * 4 + "|"]
  for result in results:
    seconds = result["seconds"]
    cells = (f"{seconds:.0f} s", f"{seconds + compiling:.0f} s", f"{result['updates']:,}")
    if not result["reached"]:
      cells = (f"not reached: {result['test_error']:.2f} %", "", f"{result['updates']:,}")
    lines.append(f"| {result['split_seed']} | {' | '.join(cells)} |")
  if all(result["reached"] for result in results) and len(results) > 1:
    seconds = [result["seconds"] for result in results]
    mean, spread = statistics.mean(seconds), statistics.stdev(seconds)
    updates_mean = statistics.mean(result["updates"] for result in results)
    cells = (f"{mean:.0f} +- {spread:.0f} s", f"{mean + compiling:.0f} s", f"{updates_mean:,.0f}")
    lines.append(f"| mean +- std | {' | '.join(cells)} |")
  labels = results[0]["num_labels"]
  where = _runs.environment(results[0])
  return "\n".join([*lines, "", f"n = {len(results)}, {labels} labels of {results[0]['dataset']}, {where}"])


if __name__ == "__main__":
  _runs.cli(main)
