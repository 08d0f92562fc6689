import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import pytest
from conftest import leaves_equal

from experiments import mnist_ssgan
from gan_jax import checkpoint, cli, output, overwrite, parsing, provenance, recipes, run_dir
from gan_jax.types import InputError, Stopped


@pytest.fixture
def open_run(tiny):
  """Opens a run of the tiny problem with these flags."""

  def open_one(split=None, hparams=None, files=("samples", "pretrained"), note="", **flags):
    config = parsing.with_flags(mnist_ssgan.Config(), **flags)
    recipe = tiny.recipe(hparams=hparams or recipes.ssgan.Hparams())
    used, split = {"main": recipe}, split or tiny.split
    dataset = dataclasses.replace(tiny.dataset, note=note)
    return run_dir.open_run("test", config, dataset, split, recipes_used=used, files=files)

  return open_one


def opened(context):
  with context as run:
    return run


def test_a_run_is_never_overwritten_by_accident(open_run, tiny, tmp_path):
  run = opened(open_run(workdir="here"))
  labels = json.loads((run.path / "labels.json").read_text())
  assert (labels["sha256"], len(labels["indices"])) == (tiny.split.sha256, 6)
  with pytest.raises(InputError, match="already holds a run"):
    opened(open_run(workdir="here"))
  for name in ("result.json", "thesis.txt"):
    (run.path / name).write_text("{}")
  (run.path / "samples").mkdir()
  opened(open_run(workdir="here", overwrite=True))
  left = set(os.listdir(run.path))
  assert left == {".lock", "config.json", "labels.json", "thesis.txt"}  # only its own files were removed
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("precious")
  with pytest.raises(InputError, match="holds other files"):
    opened(open_run(workdir="mine", overwrite=True))


def test_parts_that_only_the_old_run_had_are_replaced_too(open_run, tmp_path):
  run = opened(open_run(workdir="here", files=("split-0", "split-1")))
  for name in ("split-0", "split-1", "thesis"):
    (run.path / name).mkdir()
  (tmp_path / "outside").mkdir()
  stored = json.loads((run.path / "config.json").read_text())
  assert stored["files"][-2:] == ["split-0", "split-1"]
  (run.path / "config.json").write_text(json.dumps({**stored, "files": ["split-1", "..", "../outside"]}))
  with pytest.raises(InputError), open_run(workdir="here", overwrite=True, files=("split-0",)):
    raise InputError("it does not begin")
  assert (run.path / "split-1").exists()
  opened(open_run(workdir="here", overwrite=True, files=("split-0",)))
  assert set(os.listdir(run.path)) == {".lock", "config.json", "labels.json", "thesis"}
  assert (tmp_path / "outside").exists()


@pytest.mark.parametrize("files", [{"config.json": '{"model_type": "other"}'}, {"model.safetensors": ""}])
def test_only_runs_are_replaced(files, open_run, tmp_path):
  """Not a folder of another program, nor an export, whose networks would outlive its config."""
  run = opened(open_run(workdir="here"))
  for name, text in files.items():
    (run.path / name).write_text(text)
  for flags in ({"overwrite": True}, {}):
    with pytest.raises(InputError, match="holds other files: name an empty or a new folder"):
      opened(open_run(workdir="here", **flags))


@pytest.mark.parametrize("killed_in", ["config.json", "labels.json"])
def test_a_run_that_was_killed_at_its_first_files_can_be_started_again(killed_in, open_run, monkeypatch):
  write_json = output.write_json

  def killed(path, value):
    if path.name == killed_in:
      path.with_name(f".{path.name}.1").touch()
      raise SystemExit
    write_json(path, value)

  monkeypatch.setattr(output, "write_json", killed)
  with pytest.raises(SystemExit):
    opened(open_run(workdir="here"))
  monkeypatch.setattr(output, "write_json", write_json)
  opened(open_run(workdir="here", overwrite=True))


@pytest.mark.parametrize(
  ("key", "how"),
  [("class_names", "with other classes"), ("reader", "read in another way"), ("scaling", "scaled")],
)
def test_other_data_are_noticed(key, how, open_run):
  run = opened(open_run(workdir="here"))
  stored = json.loads((run.path / "config.json").read_text())
  (run.path / "config.json").write_text(json.dumps({**stored, key: ["b", "a"]}))
  with pytest.raises(InputError, match=f"started on other data, {how}"):
    opened(open_run(workdir="here", resume=True))


def test_a_checkpoint_alone_is_worth_keeping(open_run):
  """A study has no row before its first cell is complete."""

  def fail_after_a_checkpoint(run):
    saved = run.path / "checkpoints" / "20 labels, vat" / "1000"
    saved.mkdir(parents=True)
    (saved / "_CHECKPOINT_METADATA").write_text("{}")
    raise InputError("the disk is full")

  with pytest.raises(InputError, match="disk is full"), open_run(workdir="here") as run:
    fail_after_a_checkpoint(run)
  assert list(run.path.rglob("_CHECKPOINT_METADATA"))


def test_a_run_of_another_experiment_is_not_replaced(open_run):
  """Its checkpoints would remain, under a configuration that is not theirs."""
  run = opened(open_run(workdir="here"))
  stored = json.loads((run.path / "config.json").read_text())
  (run.path / "config.json").write_text(json.dumps({**stored, "experiment": "another"}))
  with pytest.raises(InputError, match="holds a run of another, not of test: name another folder"):
    opened(open_run(workdir="here", overwrite=True))
  (run.path / "config.json").write_text('{"exp')  # truncated: whatever experiment it was, it can go
  opened(open_run(workdir="here", overwrite=True))


def test_a_run_is_resumed_with_its_own_split_and_recipe(open_run, tiny):
  run = opened(open_run(workdir="here"))
  opened(open_run(workdir="here", resume=True, note="skipped, as hidden or not a picture: .DS_Store"))
  opened(open_run(workdir="here", resume=True, folds=3))  # a later --resume need not repeat it
  stored = json.loads((run.path / "config.json").read_text())["config"]
  assert (stored["folds"], stored["resume"]) == (3, False)
  with pytest.raises(InputError, match="does not hold the split"):
    opened(open_run(tiny.split._replace(seed=3), workdir="here", resume=True))
  other = recipes.ssgan.Hparams(threshold=0.9)
  with pytest.raises(InputError, match="started with another recipe"):
    opened(open_run(hparams=other, workdir="here", resume=True))
  labels = json.loads((run.path / "labels.json").read_text())
  for key, message in (
    ("dataset", "was started on other, not .*: name it with --dataset"),
    ("experiment", "holds a run of other, not of test"),
  ):
    (run.path / "labels.json").write_text(json.dumps(labels | {key: "other"}))
    with pytest.raises(InputError, match=message):
      opened(open_run(workdir="here", resume=True))
  (run.path / "labels.json").write_text('{"sha')
  with pytest.raises(InputError, match="cannot be read"):
    opened(open_run(workdir="here", resume=True))


def test_a_run_in_use_is_left_alone(open_run):
  with open_run(workdir="here"), pytest.raises(InputError, match="in use by another run"):
    opened(open_run(workdir="here", overwrite=True))


def test_a_directory_that_cannot_be_made_is_a_sentence(open_run, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be used"):
    opened(open_run(workdir="file/here"))
  with pytest.raises(InputError, match="is not a folder"):
    opened(open_run(workdir="file"))
  (tmp_path / "locked" / ".lock").mkdir(parents=True)
  with pytest.raises(InputError, match=r"locked cannot be used: .* directory"):
    opened(open_run(workdir="locked"))


def test_a_mistake_that_shows_before_training_leaves_no_run_behind(open_run):
  """So the next try needs no --overwrite; a run with rows, its own or those of a part, is kept."""

  def too_small(run, row):
    (run.path / "pretrained").mkdir()
    (run.path / "pretrained" / "metrics.jsonl").write_text("{}\n" if row else "")
    raise InputError("too small")

  def fail(row=False):
    with pytest.raises(InputError, match="too small"), open_run(workdir="here") as run:
      too_small(run, row)

  fail()
  assert os.listdir("here") == [".lock"]
  fail(row=True)
  assert os.path.exists("here/config.json")


def content(path):
  """Every file, folder and link below, with its content."""
  read = lambda p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
  return {str(p): read(p) for p in sorted(Path(path).rglob("*"))}


@pytest.fixture
def finished(open_run):
  """Makes a finished run with its checkpoints stored elsewhere; returns its content."""
  with open_run(workdir="here") as run:
    (run.path / "samples").mkdir()
    (run.path / "samples" / "last.png").write_text("a picture")
    (run.path / "result.json").write_text("{}")
    (run.path / "thesis.txt").write_text("precious")
    os.makedirs("elsewhere/1000")
    (run.path / "checkpoints").symlink_to("../elsewhere", target_is_directory=True)
  return content("here")


def test_a_run_that_a_signal_ends_names_the_command_that_resumes(open_run):
  """The command of the outermost run if one is part of another."""

  def end():
    with open_run(workdir="a run"), open_run(workdir="a run/pretrained"):
      raise Stopped(signal.SIGTERM)

  with pytest.raises(Stopped) as stopped:
    end()
  assert stopped.value.resume == "python -m experiments.test --resume --workdir 'a run'"
  opened(open_run(workdir="a run", resume=True))


FILES = ("samples", *run_dir.TRAINING_FILES)


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, ZeroDivisionError, Stopped])
def test_a_run_is_replaced_once_the_new_one_has_a_row(open_run, finished, error):
  """Until then, whatever ends the new run restores the old one; links are not followed."""

  def fail(run, row):
    (run.path / "checkpoints").mkdir()
    (run.path / "metrics.jsonl").write_text(row)
    raise error(15)

  def end(row):
    with pytest.raises(error), open_run(workdir="here", overwrite=True, files=FILES, steps=7) as run:
      fail(run, row)

  end("")
  assert content("here") == finished
  end("{}\n")
  assert {path.name for path in Path("here").iterdir()} == {
    *(".lock", "config.json", "labels.json", "thesis.txt"),
    *("metrics.jsonl", "checkpoints"),
  }
  assert os.path.isdir("elsewhere/1000")


def test_a_process_killed_while_it_replaces_a_run_loses_none(open_run, finished, monkeypatch):
  """At any point: while the old run is moved aside, after that, or while it is restored."""
  path, rename, left = Path("here"), os.rename, 0
  owned = (*run_dir.FILES, *FILES)

  def killed(*paths):
    nonlocal left
    left -= 1
    if left < 0:
      raise ZeroDivisionError
    rename(*paths)

  for moves in range(20):
    for _ in range(2):  # the second completes what the first left, or is killed there too
      left = moves
      with monkeypatch.context() as patch, contextlib.suppress(ZeroDivisionError):
        patch.setattr(os, "rename", killed)
        if not (path / ".replaced").exists() and not (path / ".replacing").exists():
          overwrite.set_aside(path, owned)
          (path / "config.json").write_text("new")
        overwrite.settle(path, owned)
    with pytest.raises(InputError, match="already holds a run"):
      opened(open_run(workdir="here", files=FILES))
    assert content("here") == finished
  assert left > 0  # the last were not killed


def test_a_killed_replacement_is_not_lost_to_another_experiment(open_run, finished):
  """Which writes other files: what has begun is told by those of the run that was killed."""
  path, owned = Path("here"), (*run_dir.FILES, *FILES, "study.jsonl")
  overwrite.set_aside(path, owned)
  (path / "config.json").write_text(json.dumps({"experiment": "test"}))
  (path / "study.jsonl").write_text("{}\n")
  with pytest.raises(InputError, match="already holds a run"):
    opened(open_run(workdir="here", files=("other.jsonl",)))
  assert (path / "study.jsonl").read_text() == "{}\n"
  assert not (path / ".replaced").exists()


def test_what_a_run_starts_from_is_another_folder(open_run):
  source = opened(open_run(workdir="source"))
  flags = cli.TransferFlags(init_from="source")
  with pytest.raises(InputError, match="are the same folder"):
    run_dir.check_source(cli.RunFlags(workdir="./source", overwrite=True), flags)
  run_dir.check_source(cli.RunFlags(workdir="here"), flags)
  (source.path / "config.json").unlink()
  with pytest.raises(InputError, match="is not the folder of a run"):
    run_dir.check_source(cli.RunFlags(workdir="here"), flags)
  run_dir.check_source(cli.RunFlags(workdir="here", resume=True), flags)  # it does not need its source


def test_a_part_is_done_once(open_run):
  """A complete part keeps its result; an incomplete one is resumed."""
  calls = []

  def main(config):
    calls.append(config.run)
    with open(f"{config.run.workdir}/labels.json", "w") as file:
      file.write("{}")
    return {"interrupted": False}

  with open_run(workdir="here") as run:
    os.mkdir(run.path / "pretrained")
    run_dir.run_inside(run, "pretrained", main, mnist_ssgan.Config())
    run = dataclasses.replace(run, flags=cli.RunFlags(workdir="here", resume=True))
  for unfinished in ('{"interrupted": true}', '{"interr', "5"):
    (run.path / "pretrained" / "result.json").write_text(unfinished)
    run_dir.run_inside(run, "pretrained", main, mnist_ssgan.Config())
  (run.path / "pretrained" / "result.json").write_text('{"interrupted": false}')
  assert run_dir.run_inside(run, "pretrained", main, mnist_ssgan.Config()) == {"interrupted": False}
  assert [(flags.resume, flags.overwrite) for flags in calls] == [(False, True), *[(True, False)] * 3]


def test_a_run_starts_from_the_averages_of_another(tiny):
  """Both the parameters and their averages."""
  with checkpoint.Checkpoints(Path("source/checkpoints").absolute()) as checkpoints:
    state = tiny.state()
    averages = jax.tree.map(lambda p: p + 1, state.ema)
    checkpoints.save(state.replace(ema=averages))
  flags = cli.TransferFlags(init_from="source")
  start = run_dir.start_from(flags, tiny.recipe(), ("a", "b", "c"))
  assert start is not None
  assert all(leaves_equal(start(tiny.state()).ema, averages))


def test_a_head_for_other_classes_is_not_taken_over(tiny, capsys):
  """Of the same number, or the same in another order: each column would be of another class."""
  with checkpoint.Checkpoints(Path("source/checkpoints").absolute()) as checkpoints:
    checkpoints.save(tiny.state().replace(ema=jax.tree.map(lambda p: p + 1, tiny.state().ema)))
  Path("source/config.json").write_text(json.dumps({"class_names": ["b", "a", "c"]}))
  fresh = tiny.state().ema["d"]
  for names, taken in ((("b", "a", "c"), True), (("a", "b", "c"), False)):
    start = run_dir.start_from(cli.TransferFlags(init_from="source"), tiny.recipe(), names)
    assert start is not None
    found = start(tiny.state()).ema["d"]
    for layer in fresh:
      same = all(leaves_equal(found[layer], fresh[layer]))
      assert same == (layer == "head" and not taken), layer
    assert ("D's head is new" in capsys.readouterr().err) != taken
  conditional = dataclasses.replace(tiny.recipe(), g=tiny.g.clone(num_classes=3))
  start = run_dir.start_from(cli.TransferFlags(init_from="source"), conditional, ("a", "b", "c"))
  assert start is not None
  with pytest.raises(InputError, match="draws other classes, or in another order: add --init-parts d"):
    start(tiny.state())


def test_environment_names_device_and_versions():
  found = provenance.environment()
  assert found["device"].startswith("cpu")
  assert found["versions"]["jax"] == jax.__version__
