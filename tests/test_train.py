import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from conftest import leaves_equal

from gan_jax import checkpoint, data, diagnostics, log, output, recipes, stream, terms, train
from gan_jax.types import InputError, Stopped


def fit(tiny, num_steps, **kwargs):
  """Trains on the tiny problem, with a checkpoint every two steps."""
  kwargs = {"checkpoint_every": 2, "steps_per_dispatch": 4, "phase": "main", **kwargs}
  return train.fit(tiny.recipe(num_steps), tiny.data, jax.random.key(0), **kwargs)


def test_two_and_two_steps_are_four_bit_for_bit(tiny, tmp_path):
  """Save, restore and continue: the state and the log are those of a run that was never stopped."""
  straight = fit(tiny, 4)
  first = fit(tiny, 2, workdir=tmp_path)
  assert not all(leaves_equal(first.state, straight.state))
  refuse = lambda state: pytest.fail("a resumed run is not started")
  second = fit(tiny, 4, workdir=tmp_path, resume=True, start=refuse)
  assert all(leaves_equal(second.state, straight.state))
  assert [row["step"] for row in output.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 4]


def test_a_finished_run_is_resumed_without_compiling(tiny, tmp_path, capsys):
  first = fit(tiny, 2, workdir=tmp_path)
  capsys.readouterr()
  again = fit(tiny, 2, workdir=tmp_path, resume=True)
  assert all(leaves_equal(again.state, first.state))
  assert "compiling" not in capsys.readouterr().err


def test_a_directory_that_holds_training_is_not_overwritten(tiny, tmp_path):
  fit(tiny, 2, workdir=tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()
  with pytest.raises(InputError, match="holds checkpoints: pass resume=True"):
    fit(tiny, 4, workdir=tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_arrays_are_enough(tiny, tmp_path):
  """No flags and no directory: images, labels, a tuned recipe and a key."""
  images = data.DeviceData.from_arrays(
    tiny.dataset.x_train[::10], tiny.dataset.y_train[::10], tiny.dataset.x_train
  )
  hparams = dataclasses.replace(
    recipes.ssgan.tuned("conv", num_images=60), num_steps=2, network="conv_small"
  )
  recipe = recipes.ssgan.build(hparams, image_shape=(8, 8, 1), num_classes=3)
  result = train.fit(recipe, images, jax.random.key(0))
  assert (int(result.state.step), result.interrupted) == (2, False)
  assert not list(tmp_path.iterdir())


def test_a_second_training_of_a_recipe_traces_nothing(tiny):
  """As in every fold of a cross-validation."""
  traced = []

  def term(outputs):
    traced.append(outputs)
    return terms.entropy(outputs)

  recipe = recipes.with_terms(tiny.recipe(2), own=(0.1, term))
  first = train.fit(recipe, tiny.data, jax.random.key(0))
  assert traced
  before = len(traced)
  second = train.fit(recipe, tiny.data, jax.random.key(1))
  assert len(traced) == before
  assert not all(leaves_equal(first.state, second.state))


def test_the_log_has_every_metric_and_means_over_the_dispatch(tiny, tmp_path):
  rows, means = {}, {}
  for size in (3, 1):
    fit(tiny, 7, workdir=tmp_path / str(size), steps_per_dispatch=size, checkpoint_every=None)
    rows[size] = output.read_rows(tmp_path / str(size) / "metrics.jsonl")
  assert [row["step"] for row in rows[3]] == [1, 3, 6, 7]
  assert {"phase", "step", "seconds", "d/loss", "g/loss", "d/error"} <= rows[3][0].keys()
  assert len(rows[1]) == 7
  means = np.mean([row["d/loss"] for row in rows[1][3:6]])
  np.testing.assert_allclose(rows[3][2]["d/loss"], means, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tiny, tmp_path):
  tiny.data = tiny.data.replace(y_lab=tiny.data.y_lab + 100)
  with pytest.raises(InputError, match=r"d/\w+ is not finite at step 1 \(main\)"):
    fit(tiny, 6, workdir=tmp_path)
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step is None


def test_a_diagnostic_that_is_not_finite_is_of_the_step_that_it_was_measured_after():
  metrics = log.MetricsLog(None, "main", 0, 8)
  metrics.push(8, 4, {"diagnostics/x": np.float32("nan")})
  with pytest.raises(InputError, match="diagnostics/x is not finite at step 8"):
    metrics.flush()


def overflowing(size):
  """An optimizer whose update norm, a sum of squares, overflows in step 4, unless the rate is smaller."""

  def update(updates, count, params=None):
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.zeros_like, updates))
    leaves[0] = leaves[0].ravel().at[0].set(jnp.where(count == 3, size, 0.0)).reshape(leaves[0].shape)
    return jax.tree.unflatten(structure, leaves), count + 1

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def test_a_rollback_halves_the_learning_rates(tiny, tmp_path, monkeypatch, capsys):
  """Training continues from the last checkpoint without the rows since; the rollback is kept on resume."""
  tiny.txs["d_tx"], factors = overflowing(3e19), []
  scale = recipes.with_learning_rates
  monkeypatch.setattr(
    recipes, "with_learning_rates", lambda recipe, factor: factors.append(factor) or scale(recipe, factor)
  )
  found = "d/update_norm is not finite at step 4 (main)"
  result = fit(tiny, 4, workdir=tmp_path, on_nonfinite="rollback")
  said = capsys.readouterr().err
  assert f"{found}: back to the last checkpoint, at half the learning rates (rollback 1 of 3)" in said
  assert "resuming from step 2" in said.split("rollback 1")[1]
  assert (int(result.state.step), result.rollbacks, factors) == (4, (found,), [0.5])
  assert [row["step"] for row in output.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 4]
  assert fit(tiny, 6, workdir=tmp_path, resume=True).rollbacks == (found,)
  assert factors == [0.5, 0.5]


def test_there_are_three_rollbacks_at_most():
  given = []

  def attempt(resume, rollbacks):
    given.append((resume, len(rollbacks)))
    raise log.NonFiniteError("d/loss is not finite", rollbacks)

  with pytest.raises(InputError, match="d/loss is not finite after 3 rollbacks: lower the learning rate"):
    train._with_rollbacks(attempt, resume=False, retry=True)
  assert given == [(False, 0), (True, 1), (True, 2), (True, 3)]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handler():
  """Installs a handler for the signals during the test: the runner may have been started ignoring them."""
  before = {signum: signal.getsignal(signum) for signum in SIGNALS}
  yield lambda chosen: [signal.signal(signum, chosen) for signum in SIGNALS]
  for signum, found in before.items():
    signal.signal(signum, found)


def signalled_at_step_2(monkeypatch, signum=signal.SIGINT):
  push = log.MetricsLog.push

  def push_and_signal(self, step, num, metrics):
    if step == 2:
      os.kill(os.getpid(), signum)
    push(self, step, num, metrics)

  monkeypatch.setattr(log.MetricsLog, "push", push_and_signal)


def ended(signum, frame):
  raise SystemExit("at once")


def test_interrupt_ends_after_the_dispatch_and_saves(tiny, tmp_path, monkeypatch, handler):
  signalled_at_step_2(monkeypatch)
  handler(ended)
  result = fit(tiny, 1000, workdir=tmp_path, steps_per_dispatch=1)
  assert result.interrupted
  assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest_step == int(result.state.step) < 10
  assert [signal.getsignal(signum) for signum in SIGNALS] == [ended] * 3


def test_a_scheduler_s_signal_saves_and_ends_the_process(tiny, tmp_path, monkeypatch, handler):
  signalled_at_step_2(monkeypatch, signal.SIGTERM)
  handler(ended)
  with pytest.raises(Stopped) as stopped:
    fit(tiny, 1000, workdir=tmp_path, steps_per_dispatch=1)
  assert stopped.value.code == 143
  assert 2 <= checkpoint.Checkpoints(tmp_path / "checkpoints").latest_step < 10
  assert [signal.getsignal(signum) for signum in SIGNALS] == [ended] * 3


def test_a_signal_while_the_last_dispatch_is_under_way_loses_nothing(tiny, tmp_path, monkeypatch, handler):
  """All steps have been dispatched, and only the last checkpoint remains to be written."""
  save = checkpoint.Checkpoints.save

  def signal_and_save(self, state, extra=None):
    if int(state.step) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    save(self, state, extra)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", signal_and_save)
  handler(ended)
  with pytest.raises(Stopped):
    fit(tiny, 3, workdir=tmp_path)
  assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest_step == 3


def test_ctrl_c_in_the_last_dispatch_is_not_forgotten(tiny, tmp_path, monkeypatch, handler):
  """No step is left, but what follows training must not begin."""
  signalled_at_step_2(monkeypatch)
  handler(ended)
  result = fit(tiny, 2, workdir=tmp_path, steps_per_dispatch=1)
  assert (result.interrupted, int(result.state.step)) == (True, 2)


def test_waiting_for_images_is_counted_over_all_parts_of_a_run(tiny, tmp_path, monkeypatch):
  take = stream.Dispatches.take

  def slow(self, num, running):
    self.seconds_idle += num
    return take(self, num, running)

  monkeypatch.setattr(stream.Dispatches, "take", slow)
  assert fit(tiny, 2, workdir=tmp_path).seconds_idle == 2
  assert fit(tiny, 6, workdir=str(tmp_path), resume=True).seconds_idle == 6


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_is_immediate(handler, second):
  handler(ended)
  with train._stop_on_interrupt(saves=True) as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM
    with pytest.raises(SystemExit, match="at once"):
      signal.raise_signal(second)


def test_an_interrupt_in_the_middle_of_a_line_does_not_print_it_twice(monkeypatch, handler):
  """The handler must not re-enter the console while it writes."""
  written = []

  class Stream:
    def write(self, text):
      written.append(text)
      if len(written) == 1:
        os.kill(os.getpid(), signal.SIGINT)

    def flush(self):
      pass

  console = rich.console.Console(file=Stream())
  monkeypatch.setattr(output, "console", console)
  handler(signal.default_int_handler)
  with train._stop_on_interrupt(saves=True) as stop:
    console.print("step 400")
  assert stop.signum
  assert "".join(written).count("step 400") == 1


def test_a_signal_that_was_ignored_stays_ignored(tiny, tmp_path, monkeypatch, handler):
  """As in a background job of a shell, or under nohup."""
  signalled_at_step_2(monkeypatch, signal.SIGHUP)
  handler(signal.SIG_IGN)
  result = fit(tiny, 4, workdir=tmp_path, steps_per_dispatch=1)
  assert (result.interrupted, int(result.state.step)) == (False, 4)
  assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize(
  ("signum", "failed", "error"),
  [(0, 1, InputError), (signal.SIGTERM, 0, Stopped), (signal.SIGINT, 0, None)],
)
def test_what_ends_another_process_ends_this_one(signum, failed, error):
  """A signal that the other received, or an image that it could not read; Ctrl-C is not an error."""
  others = iter((signum, failed))
  largest = lambda own: max(own, next(others))
  end = lambda: train._raise_what_ended_it(train._Stop(), None, largest, reached=3)
  if error is None:
    return end()
  with pytest.raises(error) as raised:
    end()
  words = "another process could not read an image: check its output; step 3 is saved"
  assert error is Stopped or str(raised.value).startswith(words)


def test_tensorboard(tiny, tmp_path):
  fit(tiny, 1, workdir=tmp_path, tensorboard=True)
  assert list((tmp_path / "tensorboard" / "main").glob("events*"))


def test_diagnostics_are_logged_and_alarms_reach_the_result(tiny, tmp_path, monkeypatch, capsys):
  """For a single class: rows have diagnostics, and the alarm is printed once, returned, kept on resume."""
  found = {"variance_ratio": 1.0, "train_accuracy": 60.0, "fake_accuracy": 60.0}
  found |= {"share_0": 1.0, "share_1": 0.0, "share_2": 0.0}
  diagnose = lambda state, images: {f"diagnostics/{k}": jnp.float32(v) for k, v in found.items()}
  monkeypatch.setattr(diagnostics, "make_diagnostics", lambda *_, **__: diagnose)
  kwargs = {"workdir": tmp_path, "diagnose": True, "class_names": tiny.dataset.class_names}
  result = fit(tiny, 20, **kwargs)
  rows = output.read_rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows if "diagnostics/variance_ratio" in row] == list(range(1, 21))
  (alarm,) = result.alarms
  assert "has lost 2 of 3 classes (b, c)" in alarm
  assert capsys.readouterr().err.count("alarm: the generator has lost") == 1
  assert fit(tiny, 20, **kwargs, resume=True).alarms == result.alarms
  assert fit(tiny, 20, diagnose=True, class_prior=(0.98, 0.01, 0.01)).alarms == ()


def test_diagnostics_see_every_kind_of_image(tiny, tmp_path):
  tiny.data = tiny.data.replace(x_held_out=tiny.data.x_unl[:7], y_held_out=jnp.full(7, -1))
  fit(tiny, 1, workdir=tmp_path, diagnose=True)
  (row,) = output.read_rows(tmp_path / "metrics.jsonl")
  names = {"real_logit_gap", "share_2", "variance_ratio"}
  assert {f"diagnostics/{name}" for name in names} <= row.keys()
