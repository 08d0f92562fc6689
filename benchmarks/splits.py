"""One experiment over several label splits: a table of mean, standard deviation and every split.

python -m benchmarks.splits --name mnist-conv-100 -- --dataset mnist

Everything after the bare `--` is passed to `python -m experiments.mnist_ssgan`. Splits run one after the
other, each in its own process; unless --seed is given, the split's seed is also that of all other
randomness. Each `result.json` becomes a line of `benchmarks/results/<name>.jsonl`. A split whose run
directory already holds a result is not run again.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _runs

ERRORS = {
  "test_error": "semi-supervised",
  "supervised_test_error": "supervised only",
  "probe_test_error": "linear probe",
}


def main() -> None:
  parser = _runs.parser(__doc__, None)
  parser.add_argument("--splits", type=int, nargs="+", default=list(range(20, 30)), help="split seeds")
  parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
  _runs.add_run_flags(parser)
  args = parser.parse_args()
  results = []
  for split in args.splits:
    workdir = args.runs / args.name / f"split-{split}"
    named = any(flag.partition("=")[0] == "--seed" for flag in args.flags)
    seeds = [] if named else ["--seed", str(split)]
    seeds += ["--split-seed", str(split)]
    results.append(_runs.run("mnist_ssgan", [*args.flags, *seeds], workdir))
  _runs.finish(args.name, results, table)


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per reading, test error in percent."""
  rows = []
  for key, name in ERRORS.items():
    values = [result[key] for result in results]
    if None in values:
      rows.append([name, "not measured", "", *([""] * len(values))])
      continue
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    rows.append([name, *(f"{value:.2f}" for value in (statistics.mean(values), std, *values))])
  header = ["test error, %", "mean", "std", *(f"split {result['split_seed']}" for result in results)]
  seconds = [result["seconds_train"] for result in results]
  steps = "/".join(str(count) for count in sorted({result["steps"] for result in results}))
  note = (
    f"n = {len(results)} splits, {results[0]['num_labels']} labels, {steps} steps,"
    f" {min(seconds):.0f} to {max(seconds):.0f} s of training a split,"
    f" at most {max(result['peak_memory_mb'] for result in results)} MB."
  )
  return _runs.with_environment(_runs.markdown(header, rows), results, note)


if __name__ == "__main__":
  _runs.cli(main)
