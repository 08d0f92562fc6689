"""The loop around the step."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import gan_jax
from gan_jax import checkpoint, data, report, runs, steps, watch
from gan_jax.types import Generator, InputError, Json, Metrics, Network, Step, TrainState


@dataclass(frozen=True)
class Fit:
  """What `fit` gives back."""

  state: TrainState
  seconds_train: float
  """In updates, compilation not included."""
  seconds_compile: float
  seconds_to_first_update: float | None
  """From the start of the process; None where there was nothing left to do."""
  interrupted: bool
  alarms: tuple[str, ...] = ()
  """What the watch has to say of the end of training, in words."""


def fit(
  run: runs.Run,
  phase: str,
  state: TrainState,
  step: Step,
  draw: Callable,
  device_data: data.DeviceData,
  *,
  num_steps: int,
  dispatch: int = 50,
  checkpoints: checkpoint.Checkpoints | None = None,
  observe: Callable[[TrainState, data.DeviceData], Metrics] | None = None,
) -> Fit:
  """Runs `step` until `state.step` is `num_steps`, or until Ctrl-C, and logs under the name `phase`.

  With `checkpoints` the state is saved as it goes, and a resumed run goes on from the newest.

  `dispatch` updates go to the device at a time. The metrics of one dispatch are read when the next
  has been sent, so the device never waits for the host.

  `observe`, a pure function, is called about twenty times, its metrics are logged beside the others, and
  the alarms that `watch` raises over them are printed when they appear.

  Raises:
    InputError: a metric is not finite; nothing from then on has been saved.
  """
  updates = jax.jit(steps.make_updates(step, draw, max_updates=dispatch), donate_argnums=0)
  begin = time.perf_counter()
  compiled = updates.lower(state, device_data, np.int32(0)).compile()
  seconds_compile = time.perf_counter() - begin

  if run.config.resume and checkpoints is not None and checkpoints.latest_step is not None:
    state = checkpoints.restore(state)
  first = int(state.step)
  every = run.config.checkpoint_every
  observe = jax.jit(observe) if observe else None
  observe_every = max(1, num_steps // 20)
  done, pending, to_first = first, None, None

  with _MetricsLog(run, phase, first, num_steps) as log, _progress(phase, first, num_steps) as show:
    with _stop_on_interrupt() as stop:
      while done < num_steps and not stop.is_set:
        # The very first update goes alone: it tells when the run began to move.
        num = 1 if done == 0 else min(dispatch - done % dispatch, num_steps - done)
        num = min(num, every - done % every)
        if observe:
          num = min(num, observe_every - done % observe_every)
        state, metrics = compiled(state, device_data, np.int32(num))
        done += num
        if observe and done % observe_every == 0:
          metrics |= observe(state, device_data)
        if pending is not None:
          show(log.write(*pending))
        pending = (done, num, metrics)
        if to_first is None:
          jax.block_until_ready(metrics)
          to_first = round(time.time() - gan_jax.PROCESS_START, 2)
        if checkpoints is not None and done % every == 0 and done < num_steps:
          show(log.write(*pending))  # what is not finite must not be saved
          pending = None
          checkpoints.save(state)
    if pending is not None:
      show(log.write(*pending))
    if checkpoints is not None:
      checkpoints.save(state)
    return Fit(state, log.seconds, seconds_compile, to_first, done < num_steps, log.alarms)


def transferred(run: runs.Run, state: TrainState) -> TrainState:
  """A fresh state as --init-from would have it; says what could not be taken.

  A resumed run has left that state behind, and the run that it came from may be gone.
  """
  config = run.config
  if config.init_from is None or (config.resume and (run.path / "checkpoints").is_dir()):
    return state
  parts = {"both": ("g", "d"), "g": ("g",), "d": ("d",)}[config.init_parts]
  state, notes = checkpoint.transfer(state, config.init_from, parts=parts)
  for note in notes:
    runs.say(f"--init-from: {note}")
  return state


def observer(
  g: Generator, d: Network, classify: watch.Classify | None = None
) -> Callable[[TrainState, data.DeviceData], Metrics]:
  """`watch.make_observe` on 500 training and as many held-out images; for `fit`."""
  observe = watch.make_observe(g, d, classify)

  def observe_data(state: TrainState, device_data: data.DeviceData) -> Metrics:
    x_train, x_held_out = (data.to_float(x[:500]) for x in (device_data.x_unl, device_data.x_held_out))
    # No update has this number, so the watch has latents of its own, the same every time.
    return observe(state, jax.random.fold_in(state.key, 2**32 - 1), x_train, x_held_out)

  return observe_data


class _MetricsLog:
  """Appends to `metrics.jsonl`, a line a dispatch: the mean of every metric over its updates.

  Lines of the same phase after `first`, the update that the run goes on from, are dropped.
  """

  def __init__(self, run: runs.Run, phase: str, first: int, num_steps: int):
    rows = report.read_metrics(run.metrics_path)
    rows = [row for row in rows if row["phase"] != phase or row["step"] <= first]
    report.write_bytes(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    self._phase, self._num_steps, self._class_names = phase, num_steps, run.dataset.class_names
    self._rows = [row for row in rows if row["phase"] == phase]
    self.alarms: tuple[str, ...] = ()
    self._said: set[str] = set()
    self._before = max((row["seconds"] for row in rows if row["phase"] == phase), default=0.0)
    self._begin = time.perf_counter()
    self._file = open(run.metrics_path, "a", buffering=1)  # noqa: SIM115
    self._tensorboard = _tensorboard(run.path / "tensorboard" / phase) if run.config.tensorboard else None

  def __enter__(self) -> "_MetricsLog":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()

  @property
  def seconds(self) -> float:
    """Since training began, earlier parts of a resumed run included."""
    return self._before + time.perf_counter() - self._begin

  def write(self, step: int, num: int, metrics: dict[str, Array]) -> Json:
    """Waits for the metrics of the `num` updates up to `step`; `InputError` where one is not finite."""
    means = {}
    for name, history in metrics.items():
      values = np.asarray(history).ravel()[:num]  # what was observed once is a scalar
      if not np.isfinite(values).all():
        where = step - num + 1 + int(np.argmin(np.isfinite(values)))
        raise InputError(f"{name} is not finite at update {where} ({self._phase}): lower the learning rate")
      means[name] = float(values.mean())
    row = {"phase": self._phase, "step": step, "seconds": round(self.seconds, 3), **means}
    self._file.write(json.dumps(row) + "\n")
    self._rows.append(row)
    if any(name.startswith("watch/") for name in row):
      self._watch()
    if self._tensorboard is not None:
      for name, value in means.items():
        self._tensorboard.add_scalar(name, value, step)
    return row

  def _watch(self) -> None:
    """Prints each kind of alarm when it first appears."""
    found = watch.alarms(self._rows, num_steps=self._num_steps, class_names=self._class_names)
    self.alarms = tuple(found.values())
    for kind in set(found) - self._said:
      runs.console.print(f"watch: {found[kind]}", style="yellow", markup=False, soft_wrap=True)
    self._said |= set(found)


def _tensorboard(path: Path) -> Any:
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise InputError('--tensorboard needs tensorboardX: pip install "gan-jax[tensorboard]"') from error
  return SummaryWriter(str(path))


class _Stop:
  is_set = False


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
  """The first Ctrl-C asks the loop to end after the dispatch under way; a second one is immediate."""
  stop = _Stop()

  def handle(signum, frame):
    del signum, frame
    stop.is_set = True
    signal.signal(signal.SIGINT, previous)
    runs.console.print("[yellow]stopping: writing what was reached (Ctrl-C again to leave at once)[/]")

  previous = signal.getsignal(signal.SIGINT)
  try:
    signal.signal(signal.SIGINT, handle)
  except ValueError:  # not in the main thread: nobody presses Ctrl-C there
    yield stop
    return
  try:
    yield stop
  finally:
    signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _progress(phase: str, first: int, total: int) -> Iterator[Callable[[Json], None]]:
  """A live bar on a terminal, about ten plain lines elsewhere; fed with the rows of the log."""
  shown = {"d/loss": "D", "g/loss": "G", "d/error": "error on labels"}
  begin = time.perf_counter()

  def describe(row: Json) -> tuple[float, str]:
    rate = (row["step"] - first) / (time.perf_counter() - begin)
    return rate, "  ".join(f"{label} {row[name]:.3f}" for name, label in shown.items() if name in row)

  if not runs.console.is_terminal:
    tenths = first * 10 // total

    def show_line(row: Json) -> None:
      nonlocal tenths
      if row["step"] * 10 // total > tenths:
        tenths = row["step"] * 10 // total
        rate, text = describe(row)
        left = (total - row["step"]) / rate
        line = f"{phase} {row['step']}/{total}  {rate:.1f} updates/s  {left:.0f} s left  {text}"
        runs.console.print(line, soft_wrap=True)

    yield show_line
    return

  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}  {task.fields[rate]:.1f} updates/s"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[text]}"),
  )
  with Progress(*columns, console=runs.console) as progress:
    task = progress.add_task(phase, total=total, completed=first, rate=0.0, text="")

    def show_bar(row: Json) -> None:
      rate, text = describe(row)
      progress.update(task, completed=row["step"], rate=rate, text=text)

    yield show_bar
