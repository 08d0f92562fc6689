"""Time to accuracy: seconds of training to a fixed test error with few labels.

python -m benchmarks.time_to_accuracy
python -m benchmarks.time_to_accuracy --target 1 --splits 20 --contenders ours torch_fixmatch --name race

Trains the semi-supervised GAN of `experiments.mnist_ssgan`, with its recipe and schedule unchanged. Every
`--every` steps the averaged discriminator is evaluated on the test set; this does not affect training, and
the clock is stopped meanwhile. The target is fixed beforehand: 2 % on CPU, 1 % on an accelerator.
Compilation is timed separately, once, because the splits share the program. `torch_fixmatch` is the usual
alternative: FixMatch in PyTorch with the published hyper-parameters, see `benchmarks.peers.torch_fixmatch`.
It has the same labels, is evaluated as often, and needs no compilation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import _recipes, _runs, _worker
from gan_jax import datasets, evaluate, metrics, provenance, steps
from gan_jax.datasets import Dataset
from gan_jax.types import LabelSplit


def main() -> None:
  parser = _runs.parser(__doc__, "time_to_accuracy")
  add = parser.add_argument
  add("--target", type=float, help="test error in percent (2 on CPU, else 1)")
  add("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="split seeds")
  add("--every", type=_runs.positive, default=100, help="steps between two evaluations (100)")
  add("--recipe", choices=("conv_ssgan", "feature_matching"), default="conv_ssgan")
  add("--contenders", nargs="+", choices=("ours", "torch_fixmatch"), default=["ours"])
  add("--torch-python", default=sys.executable, help="interpreter with PyTorch and NumPy (this one)")
  add("--torch-batch", type=_runs.positive, default=64, help="labelled images per step of FixMatch (64)")
  add("--limit", type=_runs.seconds, default=1800.0, help="seconds of training of FixMatch at most (1800)")
  _runs.add_data_flags(parser, "mnist")
  args = parser.parse_args()
  if "torch_fixmatch" in args.contenders and not _has_torch(args.torch_python):
    parser.error("--torch-python must be an interpreter with PyTorch and NumPy")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # FixMatch shares the accelerator
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

  ours, results = None, []
  for contender in args.contenders:
    for i, seed in enumerate(args.splits):
      split = _recipes.split(recipe, dataset, seed)
      if contender == "ours":
        started = _recipes.start(recipe, dataset, [seed])
        ours = ours or _worker.Ours(recipe, *started, dispatch=args.every)
        ours.state, ours.images = started
        reached = train(ours, recipe.num_steps, args.every, target, test_error)
        reached |= {"recipe": args.recipe, "seconds_compile": 0.0 if i else ours.seconds_compile}
      else:
        reached = fixmatch(args, dataset, split, target)
      result = {
        "benchmark": "time_to_accuracy",
        "contender": contender,
        "target": target,
        "split_seed": seed,
        "label_split_sha256": split.sha256,
        "num_labels": len(split.indices),
        "dataset": dataset.name,
        **provenance.environment(),
        **reached,
      }
      results.append(result)
      if "not_run" in result:
        print(f"{contender}, split {seed}: not run: {result['not_run']}", flush=True)
        continue
      time = f"{result['seconds']:.0f} s" if result["reached"] else "not reached"
      print(
        f"{contender}, split {seed}: {time}, {result['steps']} steps, {result['test_error']:.2f} %",
        flush=True,
      )
  _runs.finish(args.name, results, table)


def _has_torch(python: str) -> bool:
  try:
    subprocess.run([python, "-c", "import torch, numpy"], capture_output=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return False
  return True


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


def fixmatch(args: argparse.Namespace, dataset: Dataset, split: LabelSplit, target: float) -> dict:
  """Like `train`, in a process of PyTorch's interpreter."""
  num = args.torch_batch
  flags = {"num_labelled": num, "num_unlabelled": 7 * num, "num_steps": 2**20, "every": args.every}
  flags |= {"seed": split.seed, "target": target, "limit": args.limit}
  labelled, images = list(split.indices), list(split.images)
  with tempfile.TemporaryDirectory() as folder:
    np.savez(
      f"{folder}/data.npz",
      x_lab=dataset.x_train[labelled],
      y_lab=dataset.y_train[labelled],
      x_unl=dataset.x_train[images],
      x_test=dataset.x_test,
      y_test=dataset.y_test,
    )
    program = Path(__file__).parent / "peers" / "torch_fixmatch.py"
    command = [args.torch_python, str(program), f"{folder}/data.npz", json.dumps(flags)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
  rows = [json.loads(line) for line in process.stdout.splitlines()]
  recipe = f"fixmatch {num} + {7 * num}"
  if process.returncode or not rows:  # the results of the others are kept
    return {"recipe": recipe, "not_run": f"it ended with code {process.returncode}"}
  return {
    **({"device": rows[-1]["gpu"]} if rows[-1]["gpu"] else {}),
    "recipe": recipe,
    "reached": rows[-1]["error"] <= target,
    "seconds": rows[-1]["seconds"],
    "steps": rows[-1]["step"],
    "test_error": rows[-1]["error"],
    "curve": [[row["step"], round(row["seconds"], 2), row["error"]] for row in rows],
    "seconds_compile": 0.0,
    "versions": {**provenance.environment()["versions"], **rows[-1]["versions"]},
  }


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per contender and split."""
  rows = []
  for result in results:
    if "not_run" in result:
      rows.append((result["recipe"], result["split_seed"], f"not run: {result['not_run']}", "", ""))
      continue
    reached, recipe = result["reached"], result["recipe"]
    seconds = f"{result['seconds']:.0f} s"
    took = seconds if reached else f"not reached in {seconds}: {result['test_error']:.2f} %"
    compiling = max(each.get("seconds_compile", 0) for each in results if each["recipe"] == recipe)
    rows.append((recipe, result["split_seed"], took, f"{compiling:.0f} s", f"{result['steps']:,}"))
  first = results[0]
  header = "recipe", "split", f"training to {first['target']:g} %", "and compilation", "steps"
  note = f"{first['num_labels']} labels of {first['dataset']}."
  return _runs.with_environment(_runs.markdown(header, rows), results, note)


if __name__ == "__main__":
  _runs.cli(main)
