"""Every kind of generator and its Frechet distance: the table of docs/generators.md.

python -m benchmarks.generators
python -m benchmarks.generators --only article conditional -- --manual-dir FOLDER

Everything after the bare `--` goes to every run. Each row is a process of its own, one after the other; the
rows that are done become lines of `benchmarks/results/generators.jsonl`. A row whose run directory holds a
result already is not run again.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import _runs

ROWS = {
  "article": ("mnist_gan", "the article's GAN", "--network article --loss min_max"),
  "article-ns": ("mnist_gan", "the same, non-saturating loss", "--network article"),
  "article-r1": ("mnist_gan", "the same, non-saturating + R1", "--network article --penalty r1"),
  "conv": ("mnist_gan", "conv_fine, non-saturating + R1", ""),
  "conv-rotation": ("mnist_gan", "the same + rotation", "--rotation 1"),
  "conditional": ("mnist_conditional", "conv_fine, class-conditional, all labels", ""),
  "conditional-100": (
    "mnist_conditional",
    "conv_fine, class-conditional, 100 labels",
    "--labels-per-class 10",
  ),
  "feature-matching": ("mnist_ssgan", "conv, feature matching and consistency, 100 labels", "--frechet"),
}
"""Row -> experiment, name in the table, flags."""


def main() -> None:
  parser = _runs.parser(__doc__, "generators")
  parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run")
  parser.add_argument("--runs", type=Path, default=Path("runs/generators"), help="where the runs go")
  _runs.add_run_flags(parser)
  args = parser.parse_args()
  for row in args.only:
    experiment, _, own = ROWS[row]
    _runs.run(experiment, ["--dataset", "mnist", *own.split(), *args.flags], args.runs / row)
  done = [row for row in ROWS if (args.runs / row / "result.json").exists()]
  results = [{"row": row, **_runs.run("", [], args.runs / row)} for row in done]
  _runs.finish(args.name, results, table)


def table(results: Sequence[dict]) -> str:
  """Markdown: a row a generator."""
  rows = []
  for result in results:
    distance = next(value for key, value in result.items() if key.startswith("frechet_"))
    agreement = f"{result['class_agreement']:.2f} %" if "class_agreement" in result else ""
    rows.append(
      [
        *(ROWS[result["row"]][1], f"{distance:.2f}", result["classes_covered"], agreement),
        *(
          f"{result['probe_test_error']:.2f} %",
          f"{result['steps']:,}",
          f"{result['seconds_train']:.0f} s",
        ),
      ]
    )
  replayed = [r["frechet_replayed_training_set"] for r in results if "frechet_replayed_training_set" in r]
  references = {"training images, replayed": replayed[:1], "the test set itself": [0.0]}
  rows += [[f"*{name}*", f"{v:.2f}", 10, *[""] * 4] for name, values in references.items() for v in values]
  header = "generator", "distance", "classes", "of the class asked for", "probe error", "steps", "training"
  return f"{_runs.markdown(header, rows)}\n\n{_runs.environment(results[0])}"


if __name__ == "__main__":
  main()
