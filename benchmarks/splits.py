"""One experiment over several label splits: a table of mean, spread and every split.

python -m benchmarks.splits --splits 0 1 2 3 4 --name mnist-conv-100 -- --dataset mnist

Everything after the bare `--` goes to `python -m experiments.mnist_ssgan`. Each split is a process of
its own, one after the other; its `result.json` becomes a line of `benchmarks/results/<name>.jsonl`.
A split whose run directory holds a result already is not run again.
"""

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks import _runs

ERRORS = {
  "test_error": "semi-supervised",
  "supervised_test_error": "supervised only",
  "probe_test_error": "linear probe",
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--name", required=True, help="name of the file of results")
  parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="split seeds")
  parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
  ours, flags = _runs.arguments(sys.argv[1:])
  args = parser.parse_args(ours)

  results = []
  for split in args.splits:
    workdir = args.runs / args.name / f"split-{split}"
    results.append(_runs.run("mnist_ssgan", [*flags, "--split-seed", str(split)], workdir))
  _runs.write(args.name, results)
  print(table(results))


def table(results: list[dict]) -> str:
  """Markdown: a row a reading, test error in percent."""
  splits = " | ".join(f"split {result['split_seed']}" for result in results)
  lines = [f"| test error, % | mean | std | {splits} |", "|---" * (len(results) + 3) + "|"]
  for key, name in ERRORS.items():
    values = [result[key] for result in results]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    every = " | ".join(f"{value:.2f}" for value in values)
    lines.append(f"| {name} | {statistics.mean(values):.2f} | {spread:.2f} | {every} |")
  seconds = [result["seconds_train"] for result in results]
  steps = "/".join(str(count) for count in sorted({result["steps"] for result in results}))
  first = results[0]
  lines += [
    "",
    f"n = {len(results)} splits, {first['num_labels']} labels, {steps} updates,"
    f" {min(seconds):.0f} to {max(seconds):.0f} s of training a split"
    f" ({_runs.environment(first)}),"
    f" at most {max(result['peak_memory_mb'] for result in results)} MB",
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  main()
