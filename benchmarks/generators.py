"""Every kind of generator, judged: the table of the README.

python -m benchmarks.generators
python -m benchmarks.generators --only article conditional -- --manual-dir FOLDER

Everything after the bare `--` goes to every run. Each row is a process of its own, one after the other; the
rows that are done become lines of `benchmarks/results/generators.jsonl`. A row whose run directory holds a
result already is not run again.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import _runs

ROWS = {
  "article": ("mnist_gan", "the article's GAN", ["--network", "mlp", "--loss", "min_max"]),
  "article-ns": ("mnist_gan", "the same, non-saturating loss", ["--network", "mlp"]),
  "article-r1": ("mnist_gan", "the same, non-saturating + R1", ["--network", "mlp", "--penalty", "r1"]),
  "conv": ("mnist_gan", "conv, non-saturating + R1", []),
  "conv-rotation": ("mnist_gan", "the same + rotation", ["--rotation", "1"]),
  "conditional": ("mnist_conditional", "conv, class-conditional, all labels", []),
  "conditional-100": (
    "mnist_conditional",
    "conv, class-conditional, 100 labels",
    ["--labels-per-class", "10"],
  ),
  "feature-matching": ("mnist_ssgan", "conv, feature matching, 100 labels", ["--judge"]),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run")
  parser.add_argument("--runs", type=Path, default=Path("runs/generators"), help="where the runs go")
  ours, flags = _runs.arguments(sys.argv[1:])
  args = parser.parse_args(ours)

  for row in args.only:
    experiment, _, own = ROWS[row]
    _runs.run(experiment, ["--dataset", "mnist", *own, *flags], args.runs / row)
  done = [row for row in ROWS if (args.runs / row / "result.json").exists()]
  results = [{"row": row, **_runs.run("", [], args.runs / row)} for row in done]
  _runs.write("generators", results)
  print(table(results))


def table(results: list[dict]) -> str:
  """Markdown: a row a generator."""
  lines = [
    "| generator | distance | classes | of the class asked for | probe error | updates | training |",
    "|---|---|---|---|---|---|---|",
  ]
  for result in results:
    distance = next(value for key, value in result.items() if key.startswith("frechet_"))
    asked = f"{result['class_agreement']:.2f} %" if "class_agreement" in result else ""
    lines.append(
      f"| {ROWS[result['row']][1]} | {distance:.2f} | {result['classes_covered']} | {asked}"
      f" | {result['probe_test_error']:.2f} % | {result['steps']:,} | {result['seconds_train']:.0f} s |"
    )
  replayed = [r["frechet_replayed_training_set"] for r in results if "frechet_replayed_training_set" in r]
  lines += [f"| *training images, replayed* | {value:.2f} | 10 | | | | |" for value in replayed[:1]]
  lines.append("| *the test set itself* | 0.00 | 10 | | | | |")
  return "\n".join([*lines, "", _runs.environment(results[0])])


if __name__ == "__main__":
  main()
