import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal

from gan_jax import checkpoint, report, runs, train
from gan_jax.types import InputError


@pytest.fixture
def run(tiny, tmp_path):
  """An open run on the tiny problem."""
  config = runs.Config(workdir=str(tmp_path / "run"), checkpoint_every=2)
  (tmp_path / "run").mkdir()
  return runs.Run(tmp_path / "run", "tiny", config, tiny.dataset, tiny.split, {}, 0.0)


def fit(run, tiny, num_steps, **kwargs):
  step = tiny.step()
  return train.fit(run, "main", tiny.state(), step, tiny.sample_batch, tiny.data, num_steps=num_steps, **kwargs)


def resumed(run):
  config = runs.Config(**{**run.config.__dict__, "resume": True})
  return runs.Run(run.path, "tiny", config, run.dataset, run.split, {}, 0.0)


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
    train.fit(run, "main", tiny.state(), tiny.step(), tiny.sample_batch, bad, num_steps=6, checkpoints=checkpoints)
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
  config = runs.Config(**{**run.config.__dict__, "tensorboard": True})
  fit(runs.Run(run.path, "tiny", config, run.dataset, run.split, {}, 0.0), tiny, 2)
  assert list((run.path / "tensorboard" / "main").glob("events*"))


def test_what_is_observed_is_logged_and_alarms_reach_the_result(run, tiny, make_tiny, monkeypatch, capsys):
  """A watch that always sees one class: the rows have its metrics, the alarm is said once, and returned."""
  observed = {"diagnostics/variance_ratio": 1.0, "diagnostics/train_accuracy": 60.0, "diagnostics/fake_accuracy": 60.0}
  observed |= {"diagnostics/share_0": 1.0, "diagnostics/share_1": 0.0, "diagnostics/share_2": 0.0}
  observe = lambda state, device_data: {k: jnp.float32(v) for k, v in observed.items()}
  result = fit(run, tiny, 20, dispatch=5, observe=observe)
  rows = report.read_metrics(run.metrics_path)
  assert [row["step"] for row in rows if "diagnostics/variance_ratio" in row] == list(range(1, 21))
  (alarm,) = result.alarms
  assert "has lost 2 of 3 classes (b, c)" in alarm
  assert capsys.readouterr().err.count("watch: the generator has lost") == 1


def test_the_observer_sees_every_kind_of_image(tiny):
  held_out = tiny.data.replace(x_held_out=tiny.data.x_unl[:7])
  state = tiny.state()
  metrics = jax.jit(train.observer(tiny.g, tiny.d))(state, held_out)
  again = jax.jit(train.observer(tiny.g, tiny.d))(state, held_out)
  assert {"diagnostics/real_logit_gap", "diagnostics/share_2", "diagnostics/variance_ratio"} <= metrics.keys()
  assert metrics == again  # the same latents every time
