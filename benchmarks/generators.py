"""Every kind of generator and its Frechet distance: the table of docs/generators.md.

python -m benchmarks.generators
python -m benchmarks.generators --only article conditional --name two -- --manual-dir FOLDER

Everything after the bare `--` is passed to every run. Rows run one after the other, each in its own
process; the rows become lines of `benchmarks/results/<name>.jsonl`. A row whose run directory already holds
a result is not run again.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import _runs
from gan_jax.types import Json

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
FRECHET = "frechet_mnist-5e89338e_n10000"
"""Key of the distance in older lines; today it is `frechet`."""
REPLAYED = "frechet_replayed_training_set"


def main() -> None:
  parser = _runs.parser(__doc__, "generators")
  parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run")
  parser.add_argument("--runs", type=Path, default=Path("runs/generators"), help="where the runs go")
  _runs.add_run_flags(parser)
  args = parser.parse_args()
  results = []
  for row in args.only:
    experiment, _, own = ROWS[row]
    flags = ["--dataset", "mnist", *own.split(), *args.flags]
    results.append({"row": row, **_runs.run(experiment, flags, args.runs / row)})
  _runs.finish(args.name, results, table)


def table(results: Sequence[Json], two_cores: Sequence[Json] = ()) -> str:
  """Markdown: one row per generator; `two_cores` repeats the article's, timed on two cores."""
  lines = []
  for row in (*results, *two_cores):
    name = ROWS[row["row"]][1] if "row" in row else "article's GAN, non-saturating loss, two cores"
    lines.append(
      [f"{name}{_runs.mark(row)}", f"{row.get('frechet', row.get(FRECHET)):.2f}", row["classes_covered"]]
    )
    for key in ("class_agreement", "probe_test_error", "test_error"):
      value = row.get(key)
      lines[-1].append("" if value is None else f"{value:.2f} %")
    lines[-1] += [f"{row['steps']:,}", f"{row['seconds_train']:.0f} s", f"{row['steps_per_second']:.0f}"]
  replayed = [row[REPLAYED] for row in results if REPLAYED in row]
  lines += [["*training images, replayed*", f"{distance:.2f}", 10, *[""] * 6] for distance in replayed[:1]]
  head = "generator", "Frechet distance", "classes", "class agreement", "probe error", "test error", "steps"
  rows = [*results, *two_cores]
  return _runs.with_environment(_runs.markdown((*head, "training", "steps/s"), lines), rows)


if __name__ == "__main__":
  _runs.cli(main)
