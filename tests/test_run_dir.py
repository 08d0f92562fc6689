import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from gan_jax import report, runs
from gan_jax.types import InputError

BAD_CONFIGS = [
  ({"steps": 0}, "--steps must be at least 1, not 0"),
  ({"labels_per_class": 0}, "--labels-per-class must be at least 1, not 0"),
  ({"batch_size": -1}, "--batch-size must be at least 1"),
  ({"split_seed": -1}, "must not be negative"),
  ({"resume": True}, "--resume needs --workdir"),
  ({"resume": True, "overwrite": True, "workdir": "x"}, "choose one"),
  ({"freeze_d": -1}, "--freeze-d must not be negative"),
  ({"freeze_d": 1}, "it would freeze random layers"),
  ({"freeze_d": 1, "init_from": "x", "init_parts": "g"}, "it would freeze random layers"),
  ({"init_parts": "g"}, "--init-parts needs --init-from"),
  ({"init_from": "x"}, "--init-from x is not the folder of a run"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_CONFIGS)
def test_bad_flags(flags, words):
  with pytest.raises(InputError, match=words):
    runs.Config(**flags).check()


def open_run(**flags):
  with runs.open_run(runs.Config(dataset="digits", **flags), "test") as run:
    return run


def test_a_run_is_never_overwritten_by_accident(tmp_path):
  run = open_run(workdir="here")
  labels = json.loads((run.path / "labels.json").read_text())
  assert labels["sha256"] == run.split.sha256
  assert len(labels["indices"]) == 100
  with pytest.raises(InputError, match="already holds a run"):
    open_run(workdir="here")
  (run.path / "result.json").write_text("{}")
  open_run(workdir="here", overwrite=True)
  assert not (run.path / "result.json").exists()
  with pytest.raises(InputError, match="not the split"):
    open_run(workdir="here", resume=True, split_seed=3)
  (run.path / "labels.json").write_text('{"sha')
  with pytest.raises(InputError, match="cannot be read"):
    open_run(workdir="here", resume=True)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("precious")
  with pytest.raises(InputError, match="holds other files"):
    open_run(workdir="mine", overwrite=True)


def test_a_run_in_use_is_left_alone():
  with (
    runs.open_run(runs.Config(dataset="digits", workdir="here"), "test"),
    pytest.raises(InputError, match="in use by another run"),
  ):
    open_run(workdir="here", overwrite=True)


def test_nothing_is_written_before_all_is_checked(tmp_path):
  with pytest.raises(InputError, match="more than the"):
    open_run(workdir="here", labels_per_class=500)
  assert not (tmp_path / "here").exists()


def cli(*flags) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "experiments.mnist_ssgan", *flags]
  return subprocess.run(
    command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
  )


def test_command_line_answers_mistakes_with_a_sentence():
  result = cli("--dataset", "nope")
  assert result.returncode == 2
  assert result.stderr.startswith("error: unknown dataset 'nope'")
  assert "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
  assert cli("--steps", "0").stderr == "error: --steps must be at least 1, not 0\n"
  assert cli("--no-such-flag").returncode == 2
  assert 'pip install "gan-jax[tf]"' in cli("--dataset", "cifar10").stderr


def test_resume_takes_the_stored_flags_and_refuses_others(monkeypatch):
  run = open_run(workdir="here", labels_per_class=5)
  config = runs.resumed_config(runs.Config, run.path, ["--workdir", "here", "--resume"])
  assert config.labels_per_class == 5
  with pytest.raises(InputError, match="begun with --labels-per-class 5, not 6"):
    runs.resumed_config(runs.Config, run.path, ["--workdir", "here", "--resume", "--labels-per-class", "6"])
  with pytest.raises(InputError, match="holds no run"):
    runs.resumed_config(runs.Config, run.path / "nowhere", [])


def test_a_run_that_replaced_another_can_be_resumed():
  run = open_run(workdir="here", overwrite=True)
  config = runs.resumed_config(runs.Config, run.path, ["--workdir", "here", "--resume"])
  config.check()
  assert not config.overwrite


def test_what_a_run_starts_from_is_part_of_its_recipe():
  source = open_run(workdir="source")
  with pytest.raises(InputError, match="are the same folder"):
    open_run(workdir="./source", init_from="source", overwrite=True)
  assert (source.path / "labels.json").exists()
  run = open_run(workdir="here", init_from="source", freeze_d=2)
  (source.path / "config.json").unlink()  # a run that has begun does without its source
  config = runs.resumed_config(runs.Config, run.path, ["--workdir", "here", "--resume"])
  config.check()
  assert (config.init_from, config.freeze_d) == ("source", 2)
  for flag, value in (("--init-from", "elsewhere"), ("--init-parts", "d"), ("--freeze-d", "1")):
    with pytest.raises(InputError, match=f"begun with {flag} .*, not {value}"):
      runs.resumed_config(runs.Config, run.path, ["--resume", flag, value])


def test_environment_names_device_and_versions():
  found = runs.environment()
  assert found["device"].startswith("cpu")
  assert found["versions"]["jax"] == jax.__version__


def test_a_resumed_run_knows_its_flags_of_many_values(tmp_path):
  from experiments import mnist_low_data

  config = mnist_low_data.Config(percents=(5.0, 50.0), augments=("fixed",))
  report.write_json(tmp_path / "config.json", {"config": dataclasses.asdict(config)})
  assert runs.resumed_config(mnist_low_data.Config, tmp_path, []) == config


def test_ctrl_c_outside_of_training_is_a_sentence(monkeypatch, capsys):
  def main(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(sys, "argv", ["test"])
  with pytest.raises(SystemExit) as stopped:
    runs.cli(main, runs.Config)
  assert stopped.value.code == 130
  assert capsys.readouterr().err == "stopped at once\n"


def test_a_mistake_that_shows_before_training_leaves_no_run_behind():
  """So the next try needs no --overwrite; once there are metrics, or parts of its own, a run stays."""
  config = runs.Config(dataset="digits", workdir="here")

  def fail_in(path, leave):
    if leave:
      (path / leave).mkdir()
    raise InputError("too small")

  def fail(leave=None):
    with pytest.raises(InputError, match="too small"), runs.open_run(config, "test") as run:
      fail_in(run.path, leave)

  fail()
  assert os.listdir("here") == [".lock"]
  fail(leave="pretrained")
  assert os.path.exists("here/config.json")
