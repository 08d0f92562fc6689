"""Statistics and Markdown of the study, for `label_study` and `benchmarks.tables`. Not an experiment."""

from collections.abc import Callable, Sequence

from gan_jax import metrics
from gan_jax.datasets import Dataset
from gan_jax.types import Json

CLASSIFIER = "classifier"
"""The reading that is the discriminator's own classifier; the others are probes on its layers."""
REFERENCES = ("supervised_augmented", "fixmatch_ema", "fixmatch_ema@matched")
"""What every method is compared with, split by split: labels alone, and all images without a GAN, at an
equal number of images and at equal compute. A method `@bfloat16` is also compared to itself in float32."""


# --- Statistics


def summarise(rows: Sequence[Json], references: Sequence[str] = REFERENCES) -> list[Json]:
  """Each row with its summary and its paired differences to those of the references that were trained.

  Verdicts are corrected by Holm's procedure for the number of classifiers compared with a reference, over
  all budgets; the uncorrected verdicts are kept beside them.

  Args:
    rows: the lines of a `study.jsonl`, each with its errors in percent.
    references: names of methods.
  """
  by_name = {(row["budget"], row["method"], row["reading"]): row for row in rows}
  cells = []
  for (budget, method, reading), row in by_name.items():
    against = {
      name: compare(row["errors"], by_name[budget, name, CLASSIFIER]["errors"])
      for name in _references_of(method, references)
      if (method, reading) != (name, CLASSIFIER) and (budget, name, CLASSIFIER) in by_name
    }
    cells.append({**row, **_json(metrics.summarise(row["errors"])), "against": against})
  for name in _references(cells, references):
    correct([c["against"][name] for c in cells if name in c["against"] and c["reading"] == CLASSIFIER])
  return cells


def compare(errors: Sequence[float], reference: Sequence[float]) -> Json:
  """`metrics.paired` as JSON: errors minus those of the reference, paired by split."""
  return _json(metrics.paired(errors, reference))


def correct(found: Sequence[Json]) -> None:
  """Adds `p_holm` and `verdict_holm` to each of these comparisons, corrected for their number.

  A comparison on a single split has no p-value: it is left unchanged and does not count.
  """
  found = [each for each in found if each["p"] is not None]
  for each, p in zip(found, metrics.holm([each["p"] for each in found]), strict=True):
    each["p_holm"] = p
    each["verdict_holm"] = each["verdict"] if p < 0.05 else "inconclusive"


def _json(found: metrics.Summary | metrics.Difference) -> Json:
  interval = found.interval and list(found.interval)
  return {**found._asdict(), "interval": interval}


# --- Tables


def markdown(cells: Sequence[Json], dataset: Dataset) -> str:
  """Markdown tables: an overview of all methods and budgets, then each budget in full."""
  lines = [f"# Error in percent on {dataset.name}", "", *overviews(cells)]
  names = _references(cells)
  head = ["method", "MFLOP a step", "mean +- std", "95 % interval"]
  head += ["median", "best", "worst", "over twice the median"]
  head += [f"less {name}" for name in names]
  for budget in dict.fromkeys(cell["budget"] for cell in cells):
    rows = [
      [
        _name(cell),
        f"{cell['mflop_per_step']:.1f}" if "mflop_per_step" in cell else "",
        mean(cell),
        interval(cell["interval"]),
        *(f"{cell[key]:.2f}" for key in ("median", "best", "worst")),
        f"{100 * cell['failure_rate']:.0f} %",
        *(difference(cell["against"].get(name)) for name in names),
      ]
      for cell in cells
      if cell["budget"] == budget
    ]
    lines += [f"## {budget} labels", "", *table([head, *rows]), ""]
  splits = ", ".join(str(seed) for seed in cells[0]["splits"])
  lines.append(f"Splits {splits}. Unlabelled images include the labelled ones. {dataset.note}".strip())
  lines.append(VERDICTS)
  return "\n".join(lines) + "\n"


VERDICTS = "Verdicts: corrected by Holm's procedure; before correction in brackets where it differs."
WITHIN_TABLE = (
  "The correction is for the differences of each table, so a pair may have a verdict in one alone."
)


def overviews(
  cells: Sequence[Json], title: str = "mean +- std", references: Sequence[str] | None = None
) -> list[str]:
  """Lines of Markdown: the mean errors, then the differences to these references (default: all trained)."""
  lines = [*table(overview(cells, title, mean)), ""]
  for name in _references(cells) if references is None else references:
    less = overview(cells, f"less {name}", lambda c, name=name: difference(c["against"].get(name)))
    lines += [*table(less), ""]
  return lines


def overview(
  cells: Sequence[Json], title: str, entry: Callable[[Json], str], *, probes: bool = False
) -> list[list[str]]:
  """A header, then one row per method, one column per budget; classifiers or, with `probes`, probes."""
  cells = [cell for cell in cells if (cell["reading"] != CLASSIFIER) == probes]
  found = {(_name(cell), cell["budget"]): entry(cell) for cell in cells}
  names, budgets = dict.fromkeys(map(_name, cells)), dict.fromkeys(cell["budget"] for cell in cells)
  rows = [[name, *(found.get((name, budget), "") for budget in budgets)] for name in names]
  return [[title, *(f"{budget} labels" for budget in budgets)], *(row for row in rows if any(row[1:]))]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of Markdown; the first row is the header."""
  lines = [f"| {' | '.join(row)} |" for row in rows]
  return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def mean(cell: Json) -> str:
  """Mean and standard deviation of a cell; the error alone if there is one split."""
  spread = f" +- {cell['std']:.2f}" if len(cell["errors"]) > 1 else ""
  return f"{cell['mean']:.2f}{spread}"


def interval(found: Sequence[float] | None, sign: str = "") -> str:
  """An interval; empty for a single split."""
  return "" if found is None else f"{found[0]:{sign}.2f} to {found[1]:{sign}.2f}"


def difference(found: Json | None) -> str:
  """A comparison: mean, interval and verdict; empty if there is none."""
  if found is None:
    return ""
  verdict = found.get("verdict_holm", found["verdict"])
  before = f" [{found['verdict']}]" if verdict != found["verdict"] else ""
  within = f" ({interval(found['interval'], '+')})" if found["interval"] else ""
  return f"{found['mean']:+.2f}{within}: {verdict}{before}"


def _references_of(method: str, references: Sequence[str]) -> list[str]:
  name, _, precision = method.partition("@")
  return list(dict.fromkeys((*references, *([name] if precision == "bfloat16" else []))))


def _references(cells: Sequence[Json], references: Sequence[str] = REFERENCES) -> list[str]:
  names = (name for cell in cells for name in _references_of(cell["method"], references))
  return [name for name in dict.fromkeys(names) if any(name in cell["against"] for cell in cells)]


def _name(cell: Json) -> str:
  return cell["method"] if cell["reading"] == CLASSIFIER else f"{cell['method']}, {cell['reading']}"
