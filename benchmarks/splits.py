"""One experiment over several label splits: a table of mean, spread and every split.

python -m benchmarks.splits --splits 0 1 2 3 4 --name mnist-conv-100 -- --dataset mnist

Everything after the bare `--` goes to `python -m experiments.mnist_ssgan`. Each split is a process of
its own, one after the other; its `result.json` becomes a line of `benchmarks/results/<name>.jsonl`.
A split whose run directory holds a result already is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

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
  ours, flags = sys.argv[1:], []
  if "--" in ours:
    at = ours.index("--")
    ours, flags = ours[:at], ours[at + 1 :]
  args = parser.parse_args(ours)

  results = []
  for split in args.splits:
    workdir = args.runs / args.name / f"split-{split}"
    if not (workdir / "result.json").exists():
      own = ["--split-seed", str(split), "--workdir", str(workdir), "--overwrite"]
      process = subprocess.run([sys.executable, "-m", "experiments.mnist_ssgan", *flags, *own], check=False)
      if process.returncode:
        sys.exit(process.returncode)
    results.append(json.loads((workdir / "result.json").read_text()))

  path = Path(__file__).parent / "results" / f"{args.name}.jsonl"
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(result) + "\n" for result in results))
  print(table(results))
  print(f"written to {path}")


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
  versions = first["versions"]
  lines += [
    "",
    f"n = {len(results)} splits, {first['num_labels']} labels, {steps} updates,"
    f" {min(seconds):.0f} to {max(seconds):.0f} s of training a split"
    f" ({first['device']}; Python {versions['python']}, JAX {versions['jax']}, Flax {versions['flax']}),"
    f" at most {max(result['peak_memory_mb'] for result in results)} MB",
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  main()
