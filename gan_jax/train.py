"""The loop around the step: many steps a dispatch, metrics, checkpoints, diagnostics, signals."""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec

import jax
import numpy as np
from jaxtyping import Array, Key
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gan_jax import checkpoint, data, diagnostics, parallel, processes, recipes, report, stream
from gan_jax.recipes import Recipe
from gan_jax.report import console
from gan_jax.types import InputError, Json, Stopped, TrainState

Params = ParamSpec("Params")


@dataclass(frozen=True)
class Fit:
  """What `fit` returns."""

  state: TrainState
  seconds_train: float
  """In steps, compilation not included; those of a run that was resumed count from its beginning."""
  seconds_compile: float
  first_step_at: float | None
  """`time.time()` when the first step of this call was done; None where there was nothing left to do."""
  interrupted: bool
  alarms: tuple[str, ...] = ()
  """Problems that the diagnostics report at the end of training, a sentence each."""
  rollbacks: tuple[str, ...] = ()
  """What was not finite, a sentence for each time that training went back to the last checkpoint."""
  seconds_idle: float = 0.0
  """Spent waiting for streamed images while the device had nothing to do."""


MAX_ROLLBACKS = 3


class NonFiniteError(InputError):
  """A metric is not finite."""

  def __init__(self, found: str, before: Sequence[str]):
    after = f" after {len(before)} rollbacks" if before else ""
    super().__init__(f"{found}{after}: lower the learning rate")
    self.rollbacks = (*before, found)


def _with_rollbacks(fit: Callable[Params, Fit]) -> Callable[Params, Fit]:
  """For `on_nonfinite="rollback"`: a rollback is a resumption at half the learning rates."""

  @functools.wraps(fit)
  def attempts(*args: Params.args, **kwargs: Params.kwargs) -> Fit:
    while True:
      try:
        return fit(*args, **kwargs)
      except NonFiniteError as error:
        if kwargs.get("on_nonfinite") != "rollback" or len(error.rollbacks) > MAX_ROLLBACKS:
          raise
        rollbacks = error.rollbacks
      number = f"rollback {len(rollbacks)} of {MAX_ROLLBACKS}"
      report.say(f"{rollbacks[-1]}: back to the last checkpoint, at half the learning rates ({number})")
      kwargs |= {"resume": True, "rollbacks": rollbacks}

  return attempts


@_with_rollbacks
def fit(
  recipe: Recipe,
  images: data.DeviceData,
  key: Key[Array, ""],
  *,
  workdir: Path | None = None,
  resume: bool = False,
  phase: str = "train",
  checkpoint_every: int | None = 1000,
  start: Callable[[TrainState], TrainState] | None = None,
  diagnose: bool = False,
  classify: diagnostics.Classify | None = None,
  class_names: Sequence[str] = (),
  tensorboard: bool = False,
  steps_per_dispatch: int = 50,
  snapshot: Callable[[TrainState], None] | None = None,
  verbose: bool = True,
  devices: Sequence[Any] = (),
  on_nonfinite: Literal["stop", "rollback"] = "stop",
  rollbacks: Sequence[str] = (),
) -> Fit:
  """Trains a recipe: `recipe.num_steps` steps, or fewer on Ctrl-C.

  `steps_per_dispatch` steps go to the device at a time. The metrics of one dispatch are read when the next
  has been sent, so the device never waits for the host.

  Args:
    recipe: what to train.
    images: the training set on the device, or the stream of it.
    key: consumed: it gives the initial state, and with it all randomness of the run.
    workdir: where `metrics.jsonl` and `checkpoints/` go; without it nothing is written.
    resume: go on from the newest checkpoint in `workdir`, bit for bit, where there is one.
    phase: the name of these rows in `metrics.jsonl`; rows of other phases there are kept.
    checkpoint_every: steps between two checkpoints; None saves none.
    start: changes the fresh state, for networks that come from elsewhere; not called on a resumed run.
    diagnose: whether `diagnostics` are computed, about twenty times. Their metrics are logged beside the
      others, and alarms are printed when they first appear.
    classify: names the classes of generated images for the diagnostics, see `make_diagnostics`.
    class_names: for the alarms.
    tensorboard: whether to log for TensorBoard too, under `workdir/tensorboard`.
    steps_per_dispatch: the most steps in one dispatch; fewer where images are streamed and large.
    snapshot: called with the state about ten times, for pictures on the way.
    verbose: whether to show progress.
    devices: those that share each step, see `parallel.over_devices`; without any, JAX's default device.
      With several processes, those of all: each calls this with the same arguments, all see `workdir`, and
      the first alone logs and calls `snapshot`.
    on_nonfinite: whether a metric that is not finite is an error, or training goes back to the last
      checkpoint, or to its beginning, at half the learning rates; three times, then it is an error.
    rollbacks: those there were, so that the learning rates are halved as often; a run that is resumed
      knows its own.

  Raises:
    Stopped: SIGTERM or SIGHUP; what was reached has been saved.
    InputError: a metric is not finite; nothing from then on has been saved. Or `workdir` holds checkpoints
      and is not to be resumed, the batch cannot be split over so many devices, or the processes differ in
      their images or arguments. Or a streamed image cannot be read; what was reached has been saved.
  """
  split = parallel.over_devices(recipe, devices) if devices else recipe
  state = recipe.init_state(key, images)
  together = bool(devices) and jax.process_count() > 1
  if together:
    if images.stream is not None:
      raise InputError("several processes need the training images in memory: pass --stream no")
    lengths = [steps_per_dispatch, checkpoint_every, diagnose, snapshot is None]
    processes.check_same([recipes.describe(recipe), recipe.num_steps, *lengths], images)
  if devices:
    state, images = parallel.replicated((state, images), devices)
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if workdir is not None and checkpoint_every is not None:
      checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints"))
    if checkpoints is not None and checkpoints.latest_step is not None:
      if not resume:
        raise InputError(f"{workdir} holds checkpoints: pass resume=True to go on, or name another folder")
      state = checkpoints.restore(state)
      rollbacks = max(rollbacks, checkpoints.extra.get("rollbacks", ()), key=len)
      report.say(f"{phase}: going on from step {int(state.step):,}")
    else:
      if checkpoints is not None and resume:
        report.say(f"{phase}: there is no checkpoint to go on from, so it begins anew")
      state = state if start is None else start(state)
    if rollbacks:
      split = recipes.with_learning_rates(split, 0.5 ** len(rollbacks))
    dispatches = stream.Dispatches(
      images, recipe.batch, state, num_steps=recipe.num_steps, max_steps=steps_per_dispatch, devices=devices
    )
    stack.enter_context(dispatches)
    steps_per_dispatch = dispatches.max_steps
    multi_step = jax.jit(split.make_multi_step(steps_per_dispatch), donate_argnums=0)
    if verbose:
      report.say(f"{phase}: compiling")
    begin = time.perf_counter()
    compiled = multi_step.lower(state, dispatches.abstract, np.int32(0)).compile()
    seconds_compile = time.perf_counter() - begin
    observe = None
    if diagnose:
      observe = jax.jit(
        diagnostics.make_diagnostics(recipe.g, recipe.d, classify=classify, by_class=recipe.by_class)
      )

    num_steps, every = recipe.num_steps, checkpoint_every or recipe.num_steps
    observe_every, snapshot_every = max(1, num_steps // 20), max(1, num_steps // 10)
    done = first = int(state.step)
    pending, first_step_at, unreadable = None, None, None
    logged = workdir if processes.writes() else None
    log = stack.enter_context(_MetricsLog(logged, phase, first, num_steps, class_names, tensorboard))
    log.rollbacks = rollbacks
    show = stack.enter_context(_progress(phase, first, num_steps)) if verbose else lambda row: None
    with _stop_on_interrupt() as stop:
      # A signal to one process stops all, at the same step.
      while done < num_steps and not (processes.largest(stop.signum) if together else stop.is_set):
        # The very first step goes alone: it tells when the run began to move.
        num = 1 if done == 0 else min(steps_per_dispatch - done % steps_per_dispatch, num_steps - done)
        num = min(num, every - done % every)
        if observe:
          num = min(num, observe_every - done % observe_every)
        if snapshot:
          num = min(num, snapshot_every - done % snapshot_every)
        try:
          drawn = dispatches.take(num, state.step)
        except InputError as error:
          unreadable = error
          break
        state, metrics = compiled(state, drawn, np.int32(num))
        done += num
        if snapshot and done % snapshot_every == 0 and processes.writes():
          snapshot(processes.local(state))
        if observe and done % observe_every == 0:
          metrics |= observe(*processes.local((state, images)))
        if pending is not None:
          show(log.write(*pending))
        pending = (done, num, metrics)
        if first_step_at is None:
          jax.block_until_ready(metrics)
          first_step_at = time.time()
        if checkpoints is not None and done % every == 0 and done < num_steps:
          show(log.write(*pending))  # what is not finite must not be saved
          pending = None
          checkpoints.save(state, {"rollbacks": rollbacks})
    if pending is not None:
      show(log.write(*pending))
    if checkpoints is not None:
      checkpoints.save(state, {"rollbacks": rollbacks})
    if unreadable is not None:
      saved = "" if checkpoints is None else f"; step {done:,} is saved, and --resume goes on from there"
      raise InputError(f"{unreadable}{saved}")
    signum = processes.largest(stop.signum) if together else stop.signum
    if signum in (signal.SIGTERM, signal.SIGHUP):
      raise Stopped(signum)
    idle = dispatches.seconds_idle
    if verbose and idle > 0.05 * log.seconds:
      report.say(
        f"{phase}: reading images did not keep up: the device waited {idle / log.seconds:.0%} of the time"
      )
    return Fit(
      processes.local(state),
      log.seconds,
      seconds_compile,
      first_step_at,
      done < num_steps,
      log.alarms,
      tuple(rollbacks),
      idle,
    )


class _MetricsLog:
  """Appends to `metrics.jsonl`, a line a dispatch: the mean of every metric over its steps.

  Lines of the same phase after `first`, the step that the run goes on from, are dropped.
  """

  def __init__(
    self,
    workdir: Path | None,
    phase: str,
    first: int,
    num_steps: int,
    class_names: Sequence[str],
    tensorboard: bool,
  ):
    rows, self._file, self._tensorboard = [], None, None
    if workdir is not None:
      path = workdir / "metrics.jsonl"
      rows = report.read_metrics(path, ("phase", "step", "seconds"))
      rows = [row for row in rows if row["phase"] != phase or row["step"] <= first]
      report.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
      self._file = open(path, "a", buffering=1)  # noqa: SIM115
      if tensorboard:
        self._tensorboard = _tensorboard(workdir / "tensorboard" / phase)
    self._phase, self._num_steps, self._class_names = phase, num_steps, class_names
    self._rows = [row for row in rows if row["phase"] == phase]
    found = diagnostics.alarms(self._rows, num_steps=num_steps, class_names=class_names)
    self.alarms = tuple(found.values())
    self._said: set[str] = set()
    self.rollbacks: Sequence[str] = ()
    self._before = max((row["seconds"] for row in rows if row["phase"] == phase), default=0.0)
    self._begin = time.perf_counter()

  def __enter__(self) -> "_MetricsLog":
    return self

  def __exit__(self, *_) -> None:
    for file in (self._file, self._tensorboard):
      if file is not None:
        file.close()

  @property
  def seconds(self) -> float:
    """Since training began, earlier parts of a resumed run included."""
    return self._before + time.perf_counter() - self._begin

  def write(self, step: int, num: int, metrics: dict[str, Array]) -> Json:
    """Waits for the metrics of the `num` steps up to `step`; `InputError` where one is not finite."""
    means = {}
    for name, history in metrics.items():
      values = np.asarray(history).ravel()[:num]  # a diagnostic is a scalar
      if not np.isfinite(values).all():
        where = step - num + 1 + int(np.argmin(np.isfinite(values)))
        raise NonFiniteError(f"{name} is not finite at step {where} ({self._phase})", self.rollbacks)
      means[name] = float(values.mean())
    row = {"phase": self._phase, "step": step, "seconds": round(self.seconds, 3), **means}
    if self._file is not None:
      self._file.write(json.dumps(row) + "\n")
    self._rows.append(row)
    if any(name.startswith("diagnostics/") for name in row):
      self._raise_alarms()
    if self._tensorboard is not None:
      for name, value in means.items():
        self._tensorboard.add_scalar(name, value, step)
    return row

  def _raise_alarms(self) -> None:
    """Prints each kind of alarm when it first appears."""
    found = diagnostics.alarms(self._rows, num_steps=self._num_steps, class_names=self._class_names)
    self.alarms = tuple(found.values())
    for kind in set(found) - self._said:
      console.print(f"alarm: {found[kind]}", style="yellow", markup=False, soft_wrap=True)
    self._said |= set(found)


def _tensorboard(path: Path) -> Any:
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise InputError('--tensorboard needs tensorboardX: pip install "gan-jax[tensorboard]"') from error
  return SummaryWriter(str(path))


class _Stop:
  is_set = False
  signum = 0


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
  """The first Ctrl-C, SIGTERM or SIGHUP asks the loop to end after the dispatch under way; a second one is
  immediate."""
  stop = _Stop()

  def handle(signum, frame):
    del frame
    stop.is_set, stop.signum = True, signum
    restore()
    # Not through the console: it may be in the middle of a line, which it would print again.
    os.write(2, b"\nstopping: writing what was reached (Ctrl-C again to leave at once)\n")

  def restore():
    for signum, handler in previous.items():
      signal.signal(signum, handler)

  found = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  # As for a job in the background of a shell, or under nohup: what is ignored stays ignored.
  previous = {signum: handler for signum, handler in found.items() if handler is not signal.SIG_IGN}
  if threading.current_thread() is not threading.main_thread():  # where no signal arrives
    previous = {}
  for signum in previous:
    signal.signal(signum, handle)
  try:
    yield stop
  finally:
    restore()


@contextlib.contextmanager
def _progress(phase: str, first: int, total: int) -> Iterator[Callable[[Json], None]]:
  """A live bar on a terminal, about ten plain lines elsewhere; fed with the rows of the log."""
  shown = {"d/loss": "D", "g/loss": "G", "d/error": "error on labels"}
  begin = time.perf_counter()

  def describe(row: Json) -> tuple[float, str]:
    rate = (row["step"] - first) / (time.perf_counter() - begin)
    return rate, "  ".join(f"{label} {row[name]:.3f}" for name, label in shown.items() if name in row)

  if not console.is_terminal:
    tenths = first * 10 // total

    def show_line(row: Json) -> None:
      nonlocal tenths
      if row["step"] * 10 // total > tenths:
        tenths = row["step"] * 10 // total
        rate, text = describe(row)
        left = (total - row["step"]) / rate
        line = f"{phase} {row['step']}/{total}  {rate:.1f} steps/s  {left:.0f} s left  {text}"
        console.print(line, soft_wrap=True)

    yield show_line
    return

  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}  {task.fields[rate]:.1f} steps/s"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[text]}"),
  )
  with Progress(*columns, console=console) as progress:
    task = progress.add_task(phase, total=total, completed=first, rate=0.0, text="")

    def show_bar(row: Json) -> None:
      rate, text = describe(row)
      progress.update(task, completed=row["step"], rate=rate, text=text)

    yield show_bar
