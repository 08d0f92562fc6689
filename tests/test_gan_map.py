import numpy as np
import pytest

from benchmarks import _gan_map
from gan_jax.types import InputError

ENVIRONMENT = {"device": "cpu", "versions": {"python": "3", "jax": "0", "flax": "0"}, "commit": "abc"}


def arms(gan, without, *, dataset="digits", budget=20, steps=400, **changes):
  """The lines of a cell, including lines that the map ignores."""
  names = "fixmatch_ema", "fixmatch_ema@matched", "gan_consistency", "gan_consistency"
  readings = "classifier", "classifier", "nearest neighbour, Block_0", "classifier"
  errors = [0.0] * len(gan), without, [0.0] * len(gan), gan
  shared = {"dataset": dataset, "budget": budget, "steps": steps, **ENVIRONMENT, **changes}
  shared |= {"splits": list(range(20, 20 + len(gan))), "sha256": [f"{budget}-{i}" for i in range(len(gan))]}
  return [
    {**shared, "method": method, "reading": reading, "errors": values}
    for method, reading, values in zip(names, readings, errors, strict=True)
  ]


def cells_of(text):
  """The rows below the header, cell by cell."""
  lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
  return [[cell.strip("| ") for cell in line] for line in lines]


def test_the_map_of_nothing_says_so():
  assert _gan_map.table({}) == "Not run."
  begun = arms([1.0], [2.0])[:2]  # one arm of two
  assert _gan_map.table({"digits-augmentation-400": begun}) == "Not run."


def test_the_map_has_a_row_a_budget_and_columns_for_each_length():
  rng = np.random.default_rng(0)
  without = rng.uniform(3, 5, 4)
  better, same = without - 1 + 0.1 * rng.normal(size=4), without + np.array([0.2, -0.2, 0.1, -0.1])
  short = [*arms(list(better), list(without)), *arms(list(same), list(without), budget=100)]
  short += arms([1.0], [2.0], budget=50)[:3]  # interrupted
  files = {
    "digits-augmentation-400": short,
    "digits-augmentation-1600": arms([1.0], [1.5], steps=1600),
    "digits-no-augmentation-1600": arms([1.0, 2.0, 4.0], [1.5, 2.5, 2.0], steps=1600, budget="all"),
  }
  first, second, third, fourth = cells_of(_gan_map.table(files))
  assert first[:5] == ["digits", "yes", "20", "400", "4"]
  assert first[6] == f"{without.mean():.2f} +- {without.std(ddof=1):.2f}"
  assert first[7].endswith(": helps")
  assert first[8:] == ["1,600", "1", "1.00", "1.50", "-0.50: inconclusive"]
  assert second == ["digits", "yes", "50", *(["not run", "", "", "", ""] * 2)]
  assert (third[2], third[7][-12:], third[8]) == ("100", "inconclusive", "not run")
  assert (fourth[:4], fourth[8]) == (["digits", "no", "all", "not run"], "1,600")


def test_the_map_corrects_for_all_of_its_cells():
  """p is 0.035: significant at 0.05 alone, but not beside a cell of another file."""
  cell = arms([1.0, 1.4, 1.4, 1.8], [2.0, 2.0, 2.0, 2.0])
  (alone,) = cells_of(_gan_map.table({"digits-augmentation-400": cell}))
  assert alone[7] == "-0.60 (-1.12 to -0.08): helps"
  other = arms([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], dataset="mnist", steps=9, commit="abc-dirty")
  both = _gan_map.table({"digits-augmentation-400": cell, "mnist-no-augmentation-9": other})
  digits, mnist = cells_of(both)
  assert digits[7] == "-0.60 (-1.12 to -0.08): inconclusive [helps]"
  assert mnist[3] == "9†"
  assert "all 2 cells" in both


@pytest.mark.parametrize(
  ("name", "cell", "words"),
  [
    ("digits-400", arms([1.0], [2.0]), "must be named"),
    ("digits-augmentation-800", arms([1.0], [2.0]), "to match its lines"),
    ("mnist-augmentation-400", arms([1.0], [2.0]), "to match its lines"),
    (
      "digits-augmentation-400",
      arms([1.0], [2.0])[:2] + arms([1.0, 2.0], [2.0, 2.0])[2:],
      "different splits",
    ),
    ("digits-augmentation-3", arms([1.0], [2.0], steps=3), "digits already has 2 lengths of training"),
  ],
)
def test_wrong_files_of_the_map_are_a_sentence(name, cell, words):
  files = {}
  if words.startswith("digits already"):
    files = {f"digits-augmentation-{n}": arms([1.0], [2.0], steps=n) for n in (1, 2)}
  with pytest.raises(InputError, match=words):
    _gan_map.table(files | {name: cell})
