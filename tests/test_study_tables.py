import numpy as np
import pytest

from experiments import _study_tables
from gan_jax import datasets


def row(method, errors, budget=20, reading="classifier"):
  splits = list(range(len(errors)))
  return {
    "budget": budget,
    "method": method,
    "reading": reading,
    "num_labels": budget,
    "splits": splits,
    "errors": errors,
  }


ROWS = [
  row("supervised_augmented", [5.0, 6.0, 7.0]),
  row("vat", [4.0, 5.1, 6.1]),
  row("mean_teacher", [5.1, 5.8, 30.0]),
  row("supervised_augmented", [5.0, 6.0, 7.0], reading="linear probe, Block_0"),
]


def test_verdicts():
  cells = _study_tables.summarise(ROWS)
  against = [cell["against"].get("supervised_augmented", {}) for cell in cells]
  assert [each.get("verdict") for each in against] == [None, "helps", "inconclusive", "inconclusive"]
  assert [round(cell["failure_rate"], 2) for cell in cells] == [0, 0, 0.33, 0]
  assert np.isclose(against[1]["mean"], -2.8 / 3)
  assert "p_holm" not in against[3]  # the correction covers only the two classifiers
  assert np.isclose(against[1]["p_holm"], 2 * against[1]["p"])


def test_a_verdict_that_the_correction_takes_away_stays_in_brackets():
  differences = ([-1.0, -0.6, -0.6, -0.2], [0.1, -0.1, 0.2, -0.2], [0.3])
  found = [_study_tables.compare(each, [0.0] * len(each)) for each in differences]
  _study_tables.correct(found)
  assert found[0]["p"] < 0.05 < found[0]["p_holm"] == pytest.approx(2 * found[0]["p"])
  assert _study_tables.difference(found[0]) == "-0.60 (-1.12 to -0.08): inconclusive [helps]"
  assert _study_tables.difference(found[2]) == "+0.30: inconclusive"  # a single split has no interval


def test_markdown():
  cells = _study_tables.summarise(ROWS)
  table = _study_tables.markdown(cells, datasets.load("digits"))
  head = "| mean +- std | 20 labels |\n|---|---|\n| supervised_augmented | 6.00 +- 1.00 |\n"
  assert head + "| vat | 5.07 +- 1.05 |\n| mean_teacher |" in table  # probes are not in the overview
  assert (
    "| less supervised_augmented | 20 labels |\n|---|---|\n| vat | -0.93 (-1.08 to -0.79): helps |" in table
  )
  assert "| vat |  | 5.07 +- 1.05 | 2.46 to 7.68 | 5.10 | 4.00 | 6.10 | 0 % | -0.93" in table
  assert "| supervised_augmented, linear probe, Block_0 |  | 6.00 +- 1.00 |" in table


def test_a_study_can_be_compared_with_other_references():
  cells = _study_tables.summarise(ROWS, ["vat"])
  assert [list(cell["against"]) for cell in cells] == [["vat"], [], ["vat"], ["vat"]]
  assert np.isclose(cells[0]["against"]["vat"]["mean"], 2.8 / 3)
  assert "| less vat | 20 labels |" in _study_tables.overviews(cells, references=["vat"])


def test_overview_of_other_budgets_and_of_probes():
  cells = _study_tables.summarise([*ROWS, row("vat", [1.0], budget=50)])
  header, *rows = _study_tables.overview(cells, "error", _study_tables.mean)
  assert header == ["error", "20 labels", "50 labels"]
  assert rows[1] == ["vat", "5.07 +- 1.05", "1.00"]  # a single split
  assert rows[2][2] == ""
  _, probe = _study_tables.overview(cells, "error", _study_tables.mean, probes=True)
  assert probe == ["supervised_augmented, linear probe, Block_0", "6.00 +- 1.00"]
