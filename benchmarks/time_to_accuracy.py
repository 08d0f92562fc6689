"""How long until it is good: seconds of training to a fixed test error with few labels.

python -m benchmarks.time_to_accuracy
python -m benchmarks.time_to_accuracy --target 1 --splits 0 1 2

The semi-supervised GAN of `experiments.mnist_ssgan`, its recipe and schedule unchanged. Every `--every`
steps the averaged discriminator is evaluated on the test set; this takes no part in training, and the clock
stands still meanwhile. The target is fixed before: 2 % on CPU, 1 % on an accelerator. Compilation is timed
apart, once, because the splits share the program.
"""

import statistics
from collections.abc import Callable, Sequence

import jax

from benchmarks import _recipes, _runs, _worker
from gan_jax import datasets, evaluate, metrics, run_dir, steps


def main() -> None:
  parser = _runs.parser(__doc__, "time_to_accuracy")
  add = parser.add_argument
  add("--target", type=float, help="test error in percent (2 on CPU, else 1)")
  add("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="split seeds")
  add("--every", type=_runs.positive, default=100, help="steps between two evaluations (100)")
  add("--recipe", choices=("conv_ssgan", "feature_matching"), default="conv_ssgan")
  _runs.add_data_flags(parser, "mnist")
  args = parser.parse_args()
  target = args.target
  if target is None:
    target = 2.0 if jax.default_backend() == "cpu" else 1.0
  if target < 0:
    parser.error("--target must not be negative")

  dataset = datasets.load(args.dataset, data_dir=args.data_dir, manual_dir=args.manual_dir)
  test, recipe = evaluate.with_test_set(dataset), _recipes.make(args.recipe, dataset)
  classify = jax.jit(steps.make_classifier(recipe.d))

  def test_error(state) -> float:
    logits, _ = metrics.predict(lambda x: classify(state, x), test.x_test)
    return metrics.error_percent(logits, test.y_test)

  first = _recipes.start(recipe, dataset, args.splits[:1])
  ours, results = _worker.Ours(recipe, *first, dispatch=args.every), []
  for i, seed in enumerate(args.splits):
    ours.state, ours.images = _recipes.start(recipe, dataset, [seed])
    split = _recipes.split(recipe, dataset, seed)
    result = {
      "benchmark": "time_to_accuracy",
      "recipe": args.recipe,
      "target": target,
      "split_seed": seed,
      "label_split_sha256": split.sha256,
      "num_labels": len(split.indices),
      **train(ours, recipe.num_steps, args.every, target, test_error),
      "seconds_compile": 0.0 if i else ours.seconds_compile,
      "dataset": dataset.name,
      **run_dir.environment(),
    }
    results.append(result)
    reached = f"{result['seconds']:.0f} s" if result["reached"] else "not reached"
    print(f"split {seed}: {reached}, {result['steps']} steps, {result['test_error']:.2f} %", flush=True)
  _runs.finish(args.name, results, table)


def train(ours: _worker.Ours, num_steps: int, every: int, target: float, test_error: Callable) -> dict:
  """Seconds and steps to the target, or to the end of the schedule."""
  seconds, done, error, curve = 0.0, 0, 100.0, []
  while done < num_steps and error > target:
    num = min(every, num_steps - done)
    seconds, done = seconds + _worker.seconds(ours, num), done + num
    error = test_error(ours.state)
    curve.append([done, round(seconds, 2), error])
  reached = error <= target
  return {"reached": reached, "seconds": seconds, "steps": done, "test_error": error, "curve": curve}


def table(results: Sequence[dict]) -> str:
  """Markdown: a row a split, then mean and standard deviation where all reached the target."""
  compiling, rows = max(result["seconds_compile"] for result in results), []
  for result in results:
    seconds = result["seconds"]
    cells = f"{seconds:.0f} s", f"{seconds + compiling:.0f} s"
    if not result["reached"]:
      cells = f"not reached: {result['test_error']:.2f} %", ""
    rows.append((result["split_seed"], *cells, f"{result['steps']:,}"))
  if all(result["reached"] for result in results) and len(results) > 1:
    seconds = [result["seconds"] for result in results]
    mean, std = statistics.mean(seconds), statistics.stdev(seconds)
    num_steps = statistics.mean(result["steps"] for result in results)
    cells = f"{mean:.0f} +- {std:.0f} s", f"{mean + compiling:.0f} s", f"{num_steps:,.0f}"
    rows.append(("mean +- std", *cells))
  first = results[0]
  header = "split", f"training to {first['target']:g} %", "with compilation", "steps"
  return (
    f"{_runs.markdown(header, rows)}\n\nn = {len(results)}, {first['num_labels']} labels of"
    f" {first['dataset']}, {_runs.environment(first)}"
  )


if __name__ == "__main__":
  _runs.cli(main)
