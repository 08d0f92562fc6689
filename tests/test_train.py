import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal

from gan_jax import checkpoint, report, train
from gan_jax.types import InputError


@pytest.fixture
def run(tiny, tmp_path):
  """An open run on the tiny problem."""
  config = train.Config(workdir=str(tmp_path / "run"), checkpoint_every=2)
  (tmp_path / "run").mkdir()
  return train.Run(tmp_path / "run", "tiny", config, tiny.dataset, tiny.split, 0.0)


def fit(run, tiny, num_steps, **kwargs):
  step = tiny.step()
  return train.fit(run, "main", tiny.state(), step, tiny.draw, tiny.data, num_steps=num_steps, **kwargs)


def resumed(run):
  config = train.Config(**{**run.config.__dict__, "resume": True})
  return train.Run(run.path, "tiny", config, run.dataset, run.split, 0.0)


def test_two_and_two_updates_are_four_bit_for_bit(run, tiny, make_tiny):
  """Save, restore and go on: the state and the log are those of a run that was never stopped."""
  straight = fit(run, tiny, 4, dispatch=4)
  with checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints:
    first = fit(run, tiny, 2, dispatch=4, checkpoints=checkpoints)
  assert not all(leaves_equal(first.state, straight.state))
  with checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints:
    second = fit(resumed(run), make_tiny(seed=0), 4, dispatch=4, checkpoints=checkpoints)
  assert all(leaves_equal(second.state, straight.state))
  assert [row["step"] for row in report.read_metrics(run.metrics_path)] == [1, 2, 4]


def test_the_log_has_every_metric_and_means_over_the_dispatch(run, tiny):
  fit(run, tiny, 7, dispatch=3)
  rows = report.read_metrics(run.metrics_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 6, 7]
  assert {"phase", "step", "seconds", "d/loss", "g/loss", "d/error"} <= rows[0].keys()
  singles = fit(run, tiny, 7, dispatch=1)
  one_by_one = report.read_metrics(run.metrics_path)
  assert len(one_by_one) == 7
  expected = np.mean([row["d/loss"] for row in one_by_one[4:6]])
  np.testing.assert_allclose(rows[4]["d/loss"], expected, rtol=1e-4)
  assert not singles.interrupted


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(run, tiny):
  bad = tiny.data.replace(y_lab=tiny.data.y_lab + 100)
  with (
    checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints,
    pytest.raises(InputError, match=r"d/\w+ is not finite at update 1 \(main\)"),
  ):
    train.fit(run, "main", tiny.state(), tiny.step(), tiny.draw, bad, num_steps=6, checkpoints=checkpoints)
  with checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step is None


def test_interrupt_ends_after_the_dispatch_and_saves(run, tiny, monkeypatch):
  write = train._MetricsLog.write

  def write_and_interrupt(self, step, num, metrics):
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return write(self, step, num, metrics)

  monkeypatch.setattr(train._MetricsLog, "write", write_and_interrupt)
  with checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints:
    result = fit(run, tiny, 1000, dispatch=1, checkpoints=checkpoints)
    assert result.interrupted
    assert checkpoints.latest_step == int(result.state.step) < 10
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tensorboard(run, tiny):
  config = train.Config(**{**run.config.__dict__, "tensorboard": True})
  fit(train.Run(run.path, "tiny", config, run.dataset, run.split, 0.0), tiny, 2)
  assert list((run.path / "tensorboard" / "main").glob("events*"))


BAD_CONFIGS = [
  ({"steps": 0}, "--steps must be at least 1, not 0"),
  ({"batch_size": -1}, "--batch-size must be at least 1"),
  ({"split_seed": -1}, "must not be negative"),
  ({"resume": True}, "--resume needs --workdir"),
  ({"resume": True, "overwrite": True, "workdir": "x"}, "choose one"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_CONFIGS)
def test_bad_flags(flags, words):
  with pytest.raises(InputError, match=words):
    train.Config(**flags)


def open_run(**flags):
  with train.open_run(train.Config(dataset="digits", **flags), "test") as run:
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
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("precious")
  with pytest.raises(InputError, match="holds other files"):
    open_run(workdir="mine", overwrite=True)


def test_a_run_in_use_is_left_alone():
  with (
    train.open_run(train.Config(dataset="digits", workdir="here"), "test"),
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
  assert cli("--no-such-flag").returncode == 2
  assert 'pip install "gan-jax[tf]"' in cli("--dataset", "cifar10").stderr


def test_resume_takes_the_stored_flags_and_refuses_others(monkeypatch):
  run = open_run(workdir="here", labels_per_class=5)
  config = train.resumed_config(train.Config, run.path, ["--workdir", "here", "--resume"])
  assert config.labels_per_class == 5
  with pytest.raises(InputError, match="begun with --labels-per-class 5, not 6"):
    train.resumed_config(
      train.Config, run.path, ["--workdir", "here", "--resume", "--labels-per-class", "6"]
    )
  with pytest.raises(InputError, match="holds no run"):
    train.resumed_config(train.Config, run.path / "nowhere", [])


def test_environment_names_device_and_versions():
  found = train.environment()
  assert found["device"].startswith("cpu")
  assert found["versions"]["jax"] == jax.__version__
  assert jnp.zeros(1).sum() == 0
