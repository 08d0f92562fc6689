"""The map of when the GAN helps, over datasets, labels and training lengths. Not a benchmark."""

import re
from collections.abc import Mapping

from benchmarks import _runs
from experiments import _study_tables
from gan_jax.types import InputError, Json

ARMS = "gan_consistency", "fixmatch_ema@matched"
"""What the map compares: consistency with a GAN, and without one at matched compute."""
LENGTHS = "short", "long"


def table(files: Mapping[str, _runs.Rows]) -> str:
  """One row per dataset, augmentation and budget; columns for each training length.

  Args:
    files: name, `DATASET-{augmentation,no-augmentation}-STEPS`, to the lines of a study, which may be
      incomplete; the name of a folder of pictures has no `folder:`.

  Raises:
    InputError: a name has another form or does not match its lines, arms have different splits, or a
      dataset has more training lengths than there are columns.
  """
  lengths, cells = _read(files)
  done = [cell for row in cells.values() for cell in row.values()]
  if not done:
    return "Not run."
  lines = []
  for (dataset, plain, _, budget), row in sorted(cells.items()):
    lines.append([dataset, "no" if plain else "yes", budget])
    for i in range(len(LENGTHS)):
      lines[-1] += _map_cell(*(row.get(steps) for steps in lengths[dataset][i : i + 1]))
  head = ["data", "augmented", "labels"]
  for length in LENGTHS:
    head += [f"{length}: steps", "n", "GAN", "no GAN", "difference"]
  note = f"Errors in percent. {_study_tables.VERDICTS} The correction is for all {len(done)} cells."
  rows = [row for cell in done for row in cell["pair"]]
  return _runs.with_environment(_runs.markdown(head, lines), rows, note)


def _read(files: Mapping[str, _runs.Rows]) -> tuple[dict[str, list[int]], dict[tuple, dict[int, Json]]]:
  """Training lengths by dataset, and the comparisons, corrected for their number."""
  lengths: dict[str, list[int]] = {}
  cells: dict[tuple, dict[int, Json]] = {}
  for name, rows in files.items():
    rows = [row for row in rows if row["method"] in ARMS and row["reading"] == "classifier"]
    match = re.fullmatch(r"(.+?)-(no-)?augmentation-(\d+)", name)
    found = {(row["dataset"].removeprefix("folder:"), str(row["steps"])) for row in rows}
    if match is None or found - {(match[1], match[3])}:
      raise InputError(f"map/{name}.jsonl must be named DATASET-(no-)augmentation-STEPS to match its lines")
    dataset, plain, steps = match[1], bool(match[2]), int(match[3])
    lengths[dataset] = sorted({steps, *lengths.get(dataset, [])})
    if len(lengths[dataset]) > len(LENGTHS):
      raise InputError(f"map/{name}.jsonl: {dataset} already has {len(LENGTHS)} lengths of training")
    for budget in dict.fromkeys(row["budget"] for row in rows):
      pair = {row["method"]: row for row in rows if row["budget"] == budget}
      row = cells.setdefault((dataset, plain, budget == "all", budget), {})
      if len(pair) == len(ARMS):
        gan, without = (pair[arm] for arm in ARMS)
        if gan["sha256"] != without["sha256"]:
          raise InputError(f"map/{name}.jsonl: the arms with {budget} labels have different splits")
        row[steps] = _study_tables.compare(gan["errors"], without["errors"]) | {"pair": (gan, without)}
  _study_tables.correct([cell for row in cells.values() for cell in row.values()])
  return lengths, cells


def _map_cell(cell: Json | None = None) -> list[str]:
  if cell is None:
    return ["not run", "", "", "", ""]
  gan, without = cell["pair"]
  errors = [_runs.mean_std(row["errors"]) for row in cell["pair"]]
  steps = f"{gan['steps']:,}{_runs.mark(gan, without)}"
  return [steps, str(len(gan["splits"])), *errors, _study_tables.difference(cell)]
