import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _runs, augmentation, novelty, scaling, splits, tables, time_to_accuracy
from gan_jax import provenance
from gan_jax.types import InputError

PAGES = [tables.ROOT / "README.md", *sorted((tables.ROOT / "docs").glob("*.md"))]


def run(monkeypatch, *flags):
  """The exit code of `python -m benchmarks.tables FLAGS`."""
  monkeypatch.setattr(sys, "argv", ["tables", *flags])
  try:
    _runs.cli(tables.main)
  except SystemExit as stop:
    return stop.code
  return 0


@pytest.fixture
def copy(tmp_path, monkeypatch):
  """A copy of the pages and the results, to be modified."""
  (tmp_path / "docs").mkdir()
  for path in PAGES:
    shutil.copy(path, tmp_path / path.relative_to(tables.ROOT))
  shutil.copytree(_runs.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  monkeypatch.setattr(_runs, "RESULTS", tmp_path / "results")
  return tmp_path


def test_every_table_of_the_pages_is_that_of_the_results(monkeypatch, capsys):
  assert run(monkeypatch, "--check") == 0, capsys.readouterr().err


def test_every_table_is_on_a_page():
  found = re.findall(r"<!-- table: (.*) -->", "".join(path.read_text() for path in PAGES))
  assert sorted(found) == sorted(tables.TABLES)


def test_a_changed_number_is_found_and_made_right_again(copy, monkeypatch, capsys):
  page = copy / "docs" / "study.md"
  right = page.read_text()
  wrong = re.sub(r"(\| supervised_augmented \| )[\d.]+", r"\g<1>99.99", right, count=1)
  assert wrong != right
  page.write_text(wrong)
  assert run(monkeypatch, "--check") == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert error == (
    "error: study.md: table digits differs from the results; run python -m benchmarks.tables"
  )
  assert run(monkeypatch) == 0
  assert page.read_text() == right
  assert capsys.readouterr().out == "written to docs/study.md\n"


def test_a_changed_result_is_found(copy, monkeypatch, capsys):
  path = copy / "results" / "transfer-mnist-digits.json"
  row = json.loads(path.read_text())
  row["scratch_test_errors"][0] += 1
  path.write_text(json.dumps(row))
  assert run(monkeypatch, "--check") == 2
  assert "results.md: table transfer differs" in capsys.readouterr().err


BAD = [
  (
    "<!-- table: nothing -->\n<!-- end -->\n",
    "page.md: there is no table nothing; the tables are headline, few-",
  ),
  ("text\n<!-- table: peers -->\n| a |\n", "page.md: the table peers has no <!-- end -->"),
  ("<!-- table: peers -->\n<!-- table: map -->\n<!-- end -->\n", "the table peers has no <!-- end -->"),
  ("<!-- end -->\n", "page.md: an <!-- end --> without a table"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_page_with_wrong_markers_is_a_sentence(text, words):
  with pytest.raises(InputError, match=re.escape(words)):
    tables.rewrite(text, "page.md")


def test_nothing_is_written_where_one_page_is_wrong(copy, monkeypatch):
  (copy / "docs" / "speed.md").write_text("<!-- end -->\n")
  page = copy / "README.md"
  wrong = page.read_text().replace("5.67", "5.68")
  assert wrong != page.read_text()
  page.write_text(wrong)
  assert run(monkeypatch) == 2
  assert page.read_text() == wrong


def test_text_around_a_table_is_left_alone(monkeypatch):
  monkeypatch.setattr(tables, "TABLES", {"a": lambda: "| 1† |", "b": lambda: "| 2 |"})
  text = "before\n<!-- table: a -->\nold\n<!-- end -->\nbetween\n<!-- table: b -->\n<!-- end -->"
  new = tables.rewrite(text, "page.md")
  first = f"before\n<!-- table: a -->\n\n| 1† |\n\n{tables.DAGGER}\n\n<!-- end -->\n"
  assert new == first + "between\n<!-- table: b -->\n\n| 2 |\n\n<!-- end -->"
  assert tables.rewrite(new, "page.md", check=True) == new


def test_growth_is_the_slope_between_neighbours():
  seconds = {10: 3.0, 100: 30.0, 1000: 3000.0, 10_000: 2999.0}
  rows = [{"at": at, "seconds": value, "seconds_split": 0.0} for at, value in seconds.items()]
  assert scaling.growth(rows, "seconds") == "1.0, 2.0, 0.0"
  assert scaling.growth(rows, "seconds_split") == ""  # a logarithmic axis has no zero


def test_older_lines_have_todays_names(tmp_path, monkeypatch):
  monkeypatch.setattr(_runs, "RESULTS", tmp_path)
  old = [
    {"update": "conv_ssgan", "updates_per_second": 2.0, "how": "loop"},
    {"method": "vat"},
    {"method": "gan_consistency", "reading": "linear probe, Block_1"},
  ]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
  assert _runs.read("a.jsonl") == [
    {"recipe": "conv_ssgan", "steps_per_second": 2.0, "strategy": "sequential"},
    {"method": "vat", "reading": "classifier"},
    {"method": "gan_consistency", "reading": "linear probe, Block_1"},
  ]
  with pytest.raises(InputError, match=r"b\.jsonl does not exist"):
    _runs.read("b.jsonl")


PUBLISHED = {"0.795", "0.098", "0.91", "0.58", "0.93", "0.065", "4.81", "1.56", "0.90", "18.63", "4.29"}
ALLOWED = {
  "README.md": {"3.11", "2.0"},  # versions of Python and of the licence
  "results.md": PUBLISHED,
  "generators.md": {"99.57", "0.0025"},  # in gan_jax/metrics/mnist.npz, and a published weight
  "export.md": {"0.12", "0.17", "0.11"},  # versions
  "own_images.md": {"0.1", "99.9"},  # quantiles
  "extending.md": {"1.0"},  # a weight
  "speed.md": {"1.5", "1.25", "1.2", "1.3"},  # targets
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_prose_has_no_measurement_that_no_table_has(path):
  text = path.read_text()
  blocks = "".join(re.findall(r"<!-- table.*?<!-- end -->", text, flags=re.DOTALL))
  for pattern in (r"<!-- table.*?<!-- end -->", r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)"):
    text = re.sub(pattern, "", text, flags=re.DOTALL)
  prose, allowed = set(re.findall(r"\d+\.\d+", text)), ALLOWED.get(path.name, set())
  assert prose <= allowed | set(re.findall(r"\d+\.\d+", blocks))
  assert allowed <= prose  # no exception outlives its sentence


def test_augmentations_are_timed_and_a_library_that_is_absent_is_said(monkeypatch):
  monkeypatch.setattr(augmentation, "_is_there", lambda name: name == "ours")
  x, environment = np.full((2, 8, 8, 3), 0.5, np.float32), provenance.environment()
  rows = [
    {"operation": operation, "side": 8, "batch": 2, "rounds": 1, **row, **environment}
    for operation in augmentation.OPERATIONS
    for row in augmentation.measure(operation, x, rounds=1, seconds=1e-3)
  ]
  ours, saturation = rows[0], [row["library"] for row in rows if row["operation"] == "saturation"]
  assert ours["ms"]["median"] > 0
  assert ours["ours_is_faster_by"]["median"] == 1
  assert saturation == ["ours", "dm_pix"]  # augmax has none
  lines = augmentation.table(rows).splitlines()
  assert lines[2].endswith("| dm_pix is not installed | augmax is not installed |")


def test_a_run_that_is_there_is_used_again_with_the_same_flags_alone(tmp_path, monkeypatch):
  """And only if it is complete."""
  ran = []

  def experiment(command, **_):
    ran.append(command[2:4])
    folder = Path(command[command.index("--workdir") + 1])
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"interrupted": len(ran) == 1}))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(_runs.subprocess, "run", experiment)
  assert _runs.run("mnist_ssgan", ["--steps", "60"], tmp_path / "a") == {"interrupted": True}
  for _ in range(2):
    assert _runs.run("mnist_ssgan", ["--steps", "60"], tmp_path / "a") == {"interrupted": False}
  assert ran == [["experiments.mnist_ssgan", "--steps"]] * 2
  with pytest.raises(InputError, match="a run with other flags"):
    _runs.run("mnist_ssgan", ["--steps", "90"], tmp_path / "a")
  (tmp_path / "a" / "benchmark.json").unlink()  # by hand, or killed in between
  with pytest.raises(InputError, match="a run with other flags"):
    _runs.run("mnist_ssgan", ["--steps", "60"], tmp_path / "a")


def test_a_contender_that_failed_is_a_row():
  shared = {
    "target": 1.0,
    "split_seed": 20,
    "num_labels": 100,
    "dataset": "mnist",
    **provenance.environment(),
  }
  done = {"recipe": "conv_ssgan", "reached": True, "seconds": 200.0, "steps": 4000, "seconds_compile": 9.0}
  failed = {"recipe": "fixmatch 64 + 448", "not_run": "it ended with code 1"}
  lines = time_to_accuracy.table([shared | done | {"test_error": 0.9}, shared | failed]).splitlines()
  assert lines[2] == "| conv_ssgan | 20 | 200 s | 9 s | 4,000 |"
  assert lines[3] == "| fixmatch 64 + 448 | 20 | not run: it ended with code 1 |  |  |"


def test_a_tree_that_is_no_checkout_has_no_commit():
  """As in an unpacked archive: the lines are kept, and marked."""
  row = provenance.environment() | {"commit": None}
  assert _runs.with_environment("table", [row]).endswith("commit `unknown`†.")


def test_a_split_has_a_seed_of_its_own(monkeypatch):
  asked = []
  monkeypatch.setattr(_runs, "run", lambda name, flags, workdir: asked.append(flags))
  monkeypatch.setattr(_runs, "finish", lambda *_: None)
  for flags in ([], ["--seed", "0"], ["--seed=0"]):
    monkeypatch.setattr("sys.argv", ["splits", "--name", "x", "--splits", "20", "21", "--", *flags])
    splits.main()
  assert asked[:2] == [["--seed", s, "--split-seed", s] for s in ("20", "21")]
  assert asked[2:4] == [["--seed", "0", "--split-seed", s] for s in ("20", "21")]
  assert asked[4:] == [["--seed=0", "--split-seed", s] for s in ("20", "21")]


def test_a_table_of_weights_has_one_set_of_splits():
  rows = _runs.read("tuning/digits-weights.jsonl")
  other = {**rows[-1], "splits": [200, 201, 202], "errors": [90.0, 91.0, 92.0]}
  assert tables.weights([*rows, other]) == tables.weights(rows)


def test_ood_scores_rank_own_images_above_others():
  """By hand, over four pairs of an own and a foreign image; a tie counts half."""
  own = np.log(np.array([[4.0, 1.0], [2.0, 1.0]]))
  foreign = np.log(np.array([[2.0, 2.0], [2.0, 1.0]]))
  assert novelty.areas(own, foreign) == {"real_logit": 2.5 / 4, "confidence": 3.5 / 4}
