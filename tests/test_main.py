"""The command line: each command on a run that one of them made."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import use_small_mlp
from PIL import Image
from sklearn.datasets import load_digits

import gan_jax
from gan_jax import __main__, classify, commands, output, train


def gan_jax_command(*words, monkeypatch):
  """The exit code of `gan-jax WORDS`."""
  monkeypatch.setattr(sys, "argv", ["gan-jax", *map(str, words)])
  with pytest.raises(SystemExit) as done:
    __main__.main()
  return done.value.code


@pytest.fixture
def command(monkeypatch):
  return lambda *words: gan_jax_command(*words, monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder with a run of `train` on pictures: twelve digits per class, the first four labelled."""
  root, digits = tmp_path_factory.mktemp("made"), load_digits()
  for k in range(3):
    for i, image in enumerate(digits.images[digits.target == k][:12]):
      folder = root / "pictures" / (f"digit {k}" if i < 4 else "unlabelled")
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{k}-{i}.png")
  flags = "--network", "mlp", "--steps", 30, "--folds", 2, "--workdir", root / "run"
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr("gan_jax.program.enable_compilation_cache", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".cache"))
    use_small_mlp(monkeypatch)
    train_it = "train", "--dataset", f"folder:{root / 'pictures'}", *flags
    assert gan_jax_command(*train_it, monkeypatch=monkeypatch) == 0
  return root


@pytest.fixture
def trained(made, small_mlp, tmp_path):
  """A copy of that run, with a copy of its pictures beside it."""
  for name in ("pictures", "run"):
    shutil.copytree(made / name, tmp_path / name)
  return tmp_path / "run"


def test_from_a_folder_of_pictures_to_predictions(trained, command, tmp_path, capsys):
  """Without test images: folds over the labels, then predict, review, sample, export, report, check."""
  result = json.loads((trained / "result.json").read_text())
  assert (result["num_labels"], result["num_images"], result["num_test_images"]) == (12, 36, 12)
  assert result["error_from"] == "labelled images, each left out once in 2 folds"
  assert 0 <= result["test_error"] <= 100
  assert set(result["test_recall"]) == {"digit 0", "digit 1", "digit 2"}

  assert len(list((trained / "samples").glob("step-*.png"))) == 10
  assert (trained / "report.html").read_text().count("step 30") == 2  # alternative text and caption

  new, out = tmp_path / "pictures" / "unlabelled", tmp_path / "predictions.csv"
  assert command("predict", trained, new, "--top-k", 2, "--out", out) == 0
  rows = list(csv.DictReader(out.read_text().splitlines()))
  assert [row["file_name"] for row in rows] == sorted(path.name for path in new.iterdir())
  model = gan_jax.load(trained)
  names, images = model.read([new])
  best = model.predict(images).argmax(axis=1)
  assert [row["label"] for row in rows] == [model.classes[k] for k in best]
  assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)
  assert [row["real_logit"] for row in rows] == [f"{logit:.3f}" for logit in model.real_logit(images)]

  (new / "labels.csv").write_text(f"file_name,label\n{names[0]},digit 0\n{names[1]},\n")
  capsys.readouterr()
  for text, words in (
    (b"name;class\n", "needs the columns"),
    (b"file_name,label\n\xff,a\n", "not encoded"),
  ):
    table = (new / "labels.csv").read_bytes()
    (new / "labels.csv").write_bytes(text)
    assert command("predict", trained, new, "--review", 5) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    (new / "labels.csv").write_bytes(table)
  assert command("predict", trained, new, "--review", 5) == 0
  chosen = list(csv.DictReader(capsys.readouterr().out.splitlines()))
  assert len({row["file_name"] for row in chosen}) == 5
  assert {row["file_name"] for row in chosen} <= set(names[1:])
  assert {row["label"] for row in chosen} == {""}

  assert command("sample", trained, "--class-name", "digit 0", "--out", tmp_path / "a.npy") == 2
  assert "cannot draw a chosen class" in " ".join(capsys.readouterr().err.split())
  for name in ("a.png", "a.npy", "b.npy"):
    assert command("sample", trained, "--num", 5, "--out", tmp_path / name) == 0
  assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
  assert np.load(tmp_path / "a.npy").shape == (5, 8, 8, 1)

  assert command("export", trained, "--out", tmp_path / "exported") == 0
  again = gan_jax.load(tmp_path / "exported")
  assert again.reader == model.reader is not None
  assert np.array_equal(again.predict(again.read([new])[1]), model.predict(images))
  assert command("report", tmp_path / "exported") == 2
  assert "is an export, not a run" in capsys.readouterr().err
  assert command("sample", trained, "--num", 2**31 - 1, "--out", tmp_path / "a.npy") == 2
  assert "memory is free: choose a smaller --num" in capsys.readouterr().err
  os.mkfifo(tmp_path / "pipe.png")
  assert command("predict", trained, tmp_path / "pipe.png") == 2
  assert "pipe.png is neither a file nor a folder" in capsys.readouterr().err

  assert command("report", trained, "--out", tmp_path / "page.html") == 0
  assert "digit 0" not in (tmp_path / "page.html").read_text()  # the page is about runs, side by side
  assert command("check", tmp_path / "pictures" / "digit 0") == 1
  (new / "labels.csv").unlink()
  assert command("check", tmp_path / "pictures") == 0


def test_a_resumed_run_does_no_fold_twice(trained, command, monkeypatch, capsys):
  """A stored fold keeps its numbers; a damaged one is trained again."""
  before, fit, phases = json.loads((trained / "result.json").read_text()), train.fit, []

  def counted(*args, phase, **kwargs):
    phases.append(phase)
    return fit(*args, phase=phase, **kwargs)

  rows = lambda: output.read_rows(trained / "metrics.jsonl")
  control = lambda: [row for row in rows() if row["phase"] == "supervised"]
  trained_once = control()
  monkeypatch.setattr(train, "fit", counted)
  for again in ((1,), ()):
    if again:
      (trained / "folds" / "1-of-2.npz").write_bytes(b"PK")
    assert command("train", "--resume", "--workdir", trained) == 0
    assert "semi-supervised: resuming from step 30" in capsys.readouterr().err
    assert phases == ["semi-supervised", "supervised", *(f"fold {i} of 2" for i in again for _ in range(2))]
    phases.clear()
    after = json.loads((trained / "result.json").read_text())
    measured = [name for name in before if "test" in name or "calibration" in name]
    assert {name: after[name] for name in measured} == {name: before[name] for name in measured}
    assert control() == trained_once  # including their seconds
  page = (trained / "report.html").read_text()
  assert "test images" not in page


def test_a_run_is_resumed_where_its_pictures_have_been_moved(trained, command, tmp_path, capsys):
  """--folds and --checkpoint-every may change too: they are not part of what it computes."""
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "pictures").rename(tmp_path / "elsewhere" / "pictures")
  flags = "--resume", "--workdir", trained, "--checkpoint-every", 7, "--folds", 0
  assert command("train", *flags, "--dataset", f"folder:{tmp_path / 'elsewhere' / 'pictures'}") == 0
  assert json.loads((trained / "result.json").read_text())["test_error"] is None
  (tmp_path / "elsewhere" / "pictures").rename(tmp_path / "others")
  capsys.readouterr()
  assert command("train", *flags, "--dataset", f"folder:{tmp_path / 'others'}") == 2
  said = " ".join(capsys.readouterr().err.split())
  assert "was started on folder:pictures" in said
  assert "not folder:others" in said


def test_a_run_among_its_own_pictures_is_refused(trained, command, tmp_path, monkeypatch, capsys):
  """The next run would take its samples for a class."""
  monkeypatch.chdir(tmp_path / "pictures")
  assert command("train", "--dataset", "folder:.", "--network", "mlp", "--steps", 1) == 2
  said = " ".join(capsys.readouterr().err.split())
  assert "among the pictures of folder:., and be read as one of their classes" in said
  assert not (tmp_path / "pictures" / "runs").exists()


def test_a_damaged_picture_does_not_end_the_predictions_of_others(trained, command, tmp_path, capsys):
  new = tmp_path / "pictures" / "unlabelled"
  num = len(list(new.iterdir()))
  (new / "broken.png").write_bytes(b"\x89PNG")
  assert command("predict", trained, new) == 0
  said = capsys.readouterr()
  assert len(said.out.splitlines()) == 1 + num
  assert "left out: " in said.err
  assert "broken.png" in said.err
  assert command("predict", trained, new / "broken.png") == 2


def test_what_has_a_label_is_not_proposed_for_one(trained, command, tmp_path, capsys):
  """Neither pictures in class folders nor those of the test set."""
  root = tmp_path / "laid out"
  (tmp_path / "pictures").rename(root)
  (root / "train").mkdir()
  for folder in [*root.iterdir()]:
    if folder.name != "train":
      folder.rename(root / "train" / folder.name)
  shutil.copytree(root / "train" / "digit 1", root / "test" / "digit 1")
  capsys.readouterr()
  assert command("predict", trained, root, "--review", 100) == 0
  chosen = {row["file_name"] for row in csv.DictReader(capsys.readouterr().out.splitlines())}
  assert chosen == {f"train/unlabelled/{path.name}" for path in (root / "train" / "unlabelled").iterdir()}


def test_vectors_train_the_mlp(small_mlp, command, capsys, tmp_path):
  """Vectors of three classes, half of them labelled; new ones go through the same scaling."""
  rng = np.random.default_rng(0)
  y = np.arange(60) % 3
  x = rng.normal(size=(60, 12)) + 4 * np.eye(12)[y] * np.geomspace(1, 1e4, 12)
  np.savez(
    tmp_path / "vectors.npz", x=x, y=np.where(np.arange(60) < 30, y, -1), x_test=x[30:], y_test=y[30:]
  )
  flags = "--steps", 40, "--workdir", tmp_path / "run"
  assert command("train", "--dataset", f"arrays:{tmp_path / 'vectors.npz'}", *flags) == 0
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert (result["network"], result["num_labels"], result["num_test_images"]) == ("mlp", 30, 30)
  assert result["input_probe_test_error"] < 20
  model = gan_jax.load(tmp_path / "run")
  names, images = model.read([tmp_path / "vectors.npz"])
  assert len(names) == 60
  assert command("sample", tmp_path / "run") == 2
  assert "vectors, which cannot be drawn: name a .npy file" in " ".join(capsys.readouterr().err.split())
  assert model.predict(images).shape == (60, 3)
  np.save(tmp_path / "other.npy", x[:, :5])
  with pytest.raises(gan_jax.types.InputError, match=r"vectors must be \[N, 12\]"):
    model.read([tmp_path / "other.npy"])


def test_ctrl_c_in_a_fold_leaves_the_run_unfinished(
  trained, small_mlp, command, monkeypatch, capsys, tmp_path
):
  """An error that was not measured is not reported."""
  fit = classify.train.fit

  def stopped(*args, **kwargs):
    found = fit(*args, **kwargs)
    return dataclasses.replace(found, interrupted=kwargs["phase"].startswith("fold"))

  monkeypatch.setattr(classify.train, "fit", stopped)
  flags = "--network", "mlp", "--steps", 2, "--folds", 2, "--workdir", tmp_path / "second"
  assert command("train", "--dataset", f"folder:{tmp_path / 'pictures'}", *flags) == 130
  result = json.loads((tmp_path / "second" / "result.json").read_text())
  assert (result["interrupted"], result["test_error"], result["error_from"]) == (True, None, None)
  assert "measured on" not in capsys.readouterr().err


def test_without_a_generator_there_are_no_generated_images(trained, small_mlp, command, capsys, tmp_path):
  """And the result is printed whole: names are not markup."""
  (tmp_path / "pictures").rename(tmp_path / "a [b] :a:")
  flags = (
    "--network",
    "mlp",
    "--steps",
    2,
    "--folds",
    0,
    "--adversarial",
    0,
    "--workdir",
    tmp_path / "alone",
  )
  assert command("train", "--dataset", f"folder:{tmp_path / 'a [b] :a:'}", *flags) == 0
  assert "train on folder:a [b] :a:, 12 labels" in capsys.readouterr().err
  assert not (tmp_path / "alone" / "samples").exists()
  assert "Generated images" not in (tmp_path / "alone" / "report.html").read_text()
  assert command("sample", tmp_path / "alone") == 2
  assert "its run trained without one" in " ".join(capsys.readouterr().err.split())


def test_folds_start_afresh(trained, small_mlp, command, monkeypatch, capsys, tmp_path):
  """The --init-from run may know the labels that a fold leaves out, so nothing is frozen either."""
  inside, seen = classify.train.fit, []

  def fit(recipe, *args, **kwargs):
    seen.append((kwargs["phase"], [name for name, _ in recipe.derived], kwargs.get("start")))
    if kwargs["phase"].startswith("fold"):
      images, key = args
      return train.Fit(recipe.init_state(key, images), 1.0, 1.0, None, False)
    return inside(recipe, *args, **kwargs)

  monkeypatch.setattr(classify.train, "fit", fit)
  flags = "--network", "mlp", "--steps", 2, "--folds", 2, "--init-from", trained, "--freeze-d", 1
  data = f"folder:{tmp_path / 'pictures'}"
  assert command("train", "--dataset", data, *flags, "--workdir", tmp_path / "second") == 0
  (_, frozen, start), *rest = seen
  assert (frozen, start is not None) == (["with_frozen"], True)
  folds = [(derived, start) for phase, derived, start in rest if phase.startswith("fold")]
  assert folds == [([], None), (["supervised_control"], None)] * 2
  said = " ".join(capsys.readouterr().err.split())
  assert "folds start from scratch, not from --init-from" in said
  assert "measured on" in said  # the table that wraps its cells


def test_what_the_distance_needs_is_known_before_training(small_mlp, command, capsys, tmp_path):
  """Vectors have no Frechet distance."""
  y = np.arange(60) % 3
  np.savez(tmp_path / "v.npz", x=np.eye(60)[:, :12], y=y, x_test=np.eye(60)[:, :12], y_test=y)
  flags = "--steps", 2, "--frechet", "--workdir", tmp_path / "run"
  assert command("train", "--dataset", f"arrays:{tmp_path / 'v.npz'}", *flags) == 2
  said = capsys.readouterr().err
  assert "compiling" not in said
  assert not (tmp_path / "run" / "config.json").exists()


def test_what_to_review_is_uncertain_and_spread():
  """One from each of two clusters of uncertain images, no certain ones, although those lie farther away."""
  probs = np.array([[0.5, 0.5]] * 30 + [[0.99, 0.01]] * 30)
  features = np.repeat([0.0, 1.0, 9.0], [15, 15, 30])[:, None] * np.ones((60, 3))
  first, second = commands.to_review(probs, features.__getitem__, 2)
  assert (first < 15, 15 <= second < 30) == (True, True)
  assert sorted(commands.to_review(probs[:4], features.__getitem__, 9)) == [0, 1, 2, 3]
  assert commands.to_review(probs[:0], features.__getitem__, 2) == []


def test_what_is_there_is_not_replaced_without_a_word(trained, command, tmp_path, capsys):
  new, table, grid = tmp_path / "pictures" / "unlabelled", tmp_path / "labels.csv", tmp_path / "a.png"
  table.write_text("file_name,label\nx.png,digit 0\n")
  assert command("predict", trained, new, "--review", 3, "--out", table) == 2
  assert "already exists and may hold labels" in " ".join(capsys.readouterr().err.split())
  assert table.read_text() == "file_name,label\nx.png,digit 0\n"
  for said in (f"written to {grid}", f"replaced {grid}"):
    assert command("sample", trained, "--num", 2, "--out", grid) == 0
    assert capsys.readouterr().err.splitlines()[-1] == said
  os.mkfifo(tmp_path / "pipe")
  lines = []
  read = lambda: lines.extend((tmp_path / "pipe").read_text().splitlines())
  reader = threading.Thread(target=read, daemon=True)  # otherwise it would block if nothing is written
  reader.start()
  assert command("predict", trained, new, "--out", tmp_path / "pipe") == 0
  reader.join(10)
  assert len(lines) == 25
  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  assert command("report", trained, "--out", tmp_path / "pipe") == 0
  reader.join(10)
  assert lines[25] == "<!doctype html>"
  assert (tmp_path / "pipe").is_fifo()
  for words in (("predict", trained, new), ("sample", trained), ("report", trained)):
    folder = tmp_path / "folder.png"
    folder.mkdir(exist_ok=True)
    assert command(*words, "--out", folder) == 2
    assert f"{folder.name} is a folder" in "".join(capsys.readouterr().err.split("\n"))
  assert command("report", trained, "--out", table / "page.html") == 2


BAD = [
  ((), 0, "usage"),  # requested help goes to standard output
  (("--version",), 0, f"gan_jax {gan_jax.__version__}"),
  (("paint",), 2, "unknown command paint"),
  (("predict", "nowhere", "x.png"), 2, "nowhere is not the folder of a run"),
  (("sample", "nowhere", "--out", "x.gif"), 2, r"--out x.gif must end in"),
  (("sample", "nowhere", "--num", "0"), 2, "--num must be at least 1"),
  (("predict", "run", "x.png", "--review", "3", "--top-k", "2"), 2, "leave --top-k out"),
  (("check", "nowhere"), 2, "nowhere does not exist"),
  (("check", "arrays:nowhere.npz"), 2, "arrays:nowhere.npz does not exist"),
  (("report", "nowhere"), 2, "nowhere is not the folder of a run"),
  (("export", "nowhere", "--out", "x"), 2, "nowhere is not the folder of a run"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), BAD)
def test_one_sentence(words, code, sentence, command, capsys):
  assert command(*words) == code
  said = capsys.readouterr()
  assert sentence in " ".join((said.err if code else said.out).split())


STARTED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner may have been started without
sys.argv = ["gan-jax", *sys.argv[1:]]
try:
  runpy.run_module("gan_jax", run_name="__main__")
finally:
  assert "jax" not in sys.modules
"""
INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["check", "."], -signal.SIGINT)])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(words, code, tmp_path):
  """In a separate process, interrupted by a fake JAX on import; --help does not import JAX."""
  (tmp_path / "jax.py").write_text(INTERRUPTED)
  env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
  done = subprocess.run([sys.executable, "-c", STARTED, *words], env=env, capture_output=True, check=False)
  assert (done.returncode, done.stderr) == (code, b"")


def test_rollbacks_of_the_control_are_kept(tiny, tmp_path, monkeypatch):
  """A resumed run, which does not train it again, reports them too."""

  def fit(recipe, images, key, *, start, **_):
    state = recipe.init_state(key, images)
    rollbacks = () if start else ("d/loss is not finite",)
    return train.Fit(start(state) if start else state, 1.0, 1.0, None, False, rollbacks=rollbacks)

  monkeypatch.setattr(train, "fit", fit)
  run: Any = SimpleNamespace(path=tmp_path, seed=0)
  control = tiny.recipe()
  for _ in range(2):
    found = classify._fit_control(run, control, tiny.data, {})
    assert found.rollbacks == ("d/loss is not finite",)
