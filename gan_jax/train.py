"""The training loop: dispatches of many steps, metrics, checkpoints, diagnostics, signals."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key

from gan_jax import checkpoint, data, diagnostics, log, output, parallel, processes, recipes, stream
from gan_jax.recipes import Recipe
from gan_jax.types import InputError, Json, Metrics, Stopped, TrainState


@dataclass(frozen=True)
class Fit:
  """The result of `fit`."""

  state: TrainState
  seconds_train: float
  """Time from the first step to the last, including logging, diagnostics and checkpoints but not the
  compilation of the steps, nor steps that a rollback undid; for a resumed run, from its beginning."""
  seconds_compile: float
  first_step_at: float | None
  """`time.time()` when the first step was done or, in a resumed run, the first dispatch; None if there was
  nothing left to do."""
  interrupted: bool
  """Whether Ctrl-C was pressed: no further training should start then."""
  alarms: tuple[str, ...] = ()
  """Problems that the diagnostics report at the end of training, one sentence each."""
  rollbacks: tuple[str, ...] = ()
  """One sentence per rollback to the last checkpoint: the metric that was not finite."""
  seconds_idle: float = 0.0
  """Time spent waiting for streamed images while the device was idle."""


def fit(
  recipe: Recipe,
  images: data.DeviceData,
  key: Key[Array, ""],
  *,
  workdir: str | Path | None = None,
  resume: bool = False,
  phase: str = "train",
  checkpoint_every: int | None = 1000,
  start: Callable[[TrainState], TrainState] | None = None,
  diagnose: bool = False,
  classify: diagnostics.Classify | None = None,
  class_names: Sequence[str] = (),
  class_prior: Sequence[float] | None = None,
  tensorboard: bool = False,
  steps_per_dispatch: int = 50,
  snapshot: Callable[[TrainState], None] | None = None,
  verbose: bool = True,
  devices: Sequence[Any] = (),
  on_nonfinite: Literal["stop", "rollback"] = "stop",
) -> Fit:
  """Trains a recipe: `recipe.num_steps` steps, or fewer on Ctrl-C.

  The device gets `steps_per_dispatch` steps at a time. The metrics of one dispatch are read after the next
  has been sent, so the device never waits for them.

  Args:
    recipe: the recipe to train.
    images: the training set on the device, or its stream.
    key: consumed: it determines the initial state, and with it all randomness of the run.
    workdir: where `metrics.jsonl` and `checkpoints/` go; if None, nothing is written.
    resume: resumes from the newest checkpoint in `workdir`, if there is one: bit for bit on a CPU, and on a
      GPU with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.
    phase: the name of this training's rows in `metrics.jsonl`; rows of other phases are kept.
    checkpoint_every: steps between two checkpoints; None saves none.
    start: modifies the fresh state, for pretrained networks; not called for a resumed run.
    diagnose: whether to compute `diagnostics`, about twenty times. Their metrics are logged with the
      others, and alarms are printed when they first appear.
    classify: classifies generated images for the diagnostics, see `make_diagnostics`.
    class_names: class names for the alarms.
    class_prior: class frequencies of the data for the alarms, see `diagnostics.alarms`; None: equal.
    tensorboard: whether to also log for TensorBoard, under `workdir/tensorboard`.
    steps_per_dispatch: the most steps in one dispatch; fewer if images are streamed and large.
    snapshot: called with the state about ten times, for intermediate pictures.
    verbose: whether to show progress.
    devices: devices that share each step, see `parallel.over_devices`; empty for JAX's default device.
      With several processes, the devices of all: each process calls this with the same arguments, all see
      `workdir`, and only the first logs and calls `snapshot`.
    on_nonfinite: whether a non-finite metric is an error (`stop`), or training returns to the last
      checkpoint, or to its beginning, at half the learning rates (`rollback`); after three rollbacks it is
      an error.

  Raises:
    Stopped: on SIGTERM or SIGHUP; the state reached has been saved.
    InputError: a metric is not finite; no later state has been saved. Or `workdir` holds checkpoints and
      `resume` is False, diagnostics have a single image to compare with, the batch cannot be split over the
      devices, or the processes differ in their images or arguments. Or a streamed image cannot be read; the
      state reached has been saved.
  """
  workdir = None if workdir is None else Path(workdir)
  num_steps, save_every = recipe.num_steps, None if workdir is None else checkpoint_every
  together = bool(devices) and jax.process_count() > 1
  largest = processes.largest if together else lambda value: value
  if together:
    flags = [steps_per_dispatch, checkpoint_every, diagnose, snapshot is None, resume, on_nonfinite]
    rows = images.stream and (images.stream.rows, images.stream.labelled)
    processes.check_same([recipes.describe(recipe), num_steps, *flags], (images, rows))
  split = parallel.over_devices(recipe, devices) if devices else recipe
  x = parallel.replicated(images, devices) if devices else images

  hooks: list[tuple[int, Callable[[TrainState], Metrics]]] = []  # steps between two calls, and the function
  if snapshot:
    hooks.append((max(1, num_steps // 10), lambda state: _written(snapshot, state)))
  if diagnose:
    observe = _diagnostics(recipe, images, classify)
    hooks.append((max(1, num_steps // 20), lambda state: observe(*processes.local((state, x)))))

  def attempt(resume: bool, rollbacks: Sequence[str]) -> Fit:
    """Trains from the newest checkpoint or from the start, with learning rates halved for each rollback."""
    with contextlib.ExitStack() as stack:
      saved = None
      if workdir is not None and save_every is not None:
        saved = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints"))
      state = recipe.init_state(key, images)
      state = parallel.replicated(state, devices) if devices else state
      state, before = _restore_or_start(state, saved, phase, resume=resume, start=start)
      rollbacks = max(rollbacks, before.get("rollbacks", ()), key=len)
      if together:
        processes.check_same([*rollbacks], processes.local(state))
      done = int(state.step)
      dispatches = stack.enter_context(
        stream.Dispatches(
          x, recipe.batch, state, num_steps=num_steps, max_steps=steps_per_dispatch, devices=devices
        )
      )
      multi_step, begin = None, time.perf_counter()
      if done < num_steps:
        if verbose:
          output.say(f"{phase}: compiling")
        slowed = recipes.with_learning_rates(split, 0.5 ** len(rollbacks)) if rollbacks else split
        multi_step = _compiled(slowed, state, dispatches)
      seconds_compile = time.perf_counter() - begin

      metrics_log = stack.enter_context(
        log.MetricsLog(
          workdir if processes.writes() else None,
          phase,
          done,
          num_steps,
          class_names=class_names,
          class_prior=class_prior,
          tensorboard=tensorboard,
          rollbacks=rollbacks,
          show=stack.enter_context(log.progress(phase, done, num_steps)) if verbose else None,
        )
      )
      idle = lambda: before.get("seconds_idle", 0.0) + dispatches.seconds_idle

      def save() -> None:
        metrics_log.flush()  # a non-finite state must not be saved
        if saved:
          saved.save(state, {"rollbacks": rollbacks, "seconds_idle": idle()})

      periods = [dispatches.max_steps, *(every for every, _ in hooks), *filter(None, [save_every])]
      first_step_at, unreadable = None, None
      with _stop_on_interrupt(saves=saved is not None) as stop:
        for num in _dispatch_sizes(done, num_steps, periods):
          drawn = None
          if not stop.signum:
            try:
              drawn = dispatches.take(num, state.step)
            except InputError as error:
              unreadable = error
          if largest(drawn is None):  # what ends one process ends all, at the same step
            break
          assert multi_step is not None
          state, metrics = multi_step(state, drawn, np.int32(num))
          done += num
          if first_step_at is None:
            jax.block_until_ready(metrics)
            first_step_at = time.time()
          for every, hook in hooks:
            if done % every == 0:
              metrics |= hook(state)
          metrics_log.push(done, num, metrics)
          if save_every and done % save_every == 0 and done < num_steps:
            save()
        save()  # with signals still deferred: the last dispatch may be running
      _raise_what_ended_it(stop, unreadable, largest, reached=done if saved and done else None)
      if verbose and idle() > 0.05 * metrics_log.seconds:
        share = f"{idle() / metrics_log.seconds:.0%}"
        output.say(f"{phase}: reading images did not keep up: the device waited {share} of the time")
      return Fit(
        state=processes.local(state),
        seconds_train=metrics_log.seconds,
        seconds_compile=seconds_compile,
        first_step_at=first_step_at,
        interrupted=done < num_steps or largest(stop.signum) == signal.SIGINT,
        alarms=metrics_log.alarms,
        rollbacks=tuple(rollbacks),
        seconds_idle=idle(),
      )

  return _with_rollbacks(attempt, resume=resume, retry=on_nonfinite == "rollback")


def _diagnostics(
  recipe: Recipe, images: data.DeviceData, classify: diagnostics.Classify | None
) -> Callable[[TrainState, data.DeviceData], Metrics]:
  diagnostics.check(images, by_class=recipe.by_class)
  boundary = recipe.objective.boundary
  return jax.jit(
    diagnostics.make_diagnostics(
      recipe.g, recipe.d, classify=classify, by_class=recipe.by_class, boundary=boundary
    )
  )


def _compiled(recipe: Recipe, state: TrainState, dispatches: stream.Dispatches) -> Callable[..., Any]:
  """Compiled steps, `(state, data, num) -> (state, metrics)`."""
  multi_step = jax.jit(recipe.make_multi_step(dispatches.max_steps), donate_argnums=0)
  return multi_step.lower(state, dispatches.abstract, np.int32(0)).compile()


MAX_ROLLBACKS = 3


def _with_rollbacks(attempt: Callable[[bool, Sequence[str]], Fit], *, resume: bool, retry: bool) -> Fit:
  """Runs `attempt`; a rollback resumes it at half the learning rates."""
  rollbacks: Sequence[str] = ()
  while True:
    try:
      return attempt(resume, rollbacks)
    except log.NonFiniteError as error:
      if not retry or len(error.rollbacks) > MAX_ROLLBACKS:
        raise
      rollbacks = error.rollbacks
    number = f"rollback {len(rollbacks)} of {MAX_ROLLBACKS}"
    output.say(f"{rollbacks[-1]}: back to the last checkpoint, at half the learning rates ({number})")
    resume = True


def _restore_or_start(
  state: TrainState,
  saved: checkpoint.Checkpoints | None,
  phase: str,
  *,
  resume: bool,
  start: Callable[[TrainState], TrainState] | None,
) -> tuple[TrainState, Json]:
  """The newest checkpoint and the JSON saved with it, or the fresh state as modified by `start`."""
  if saved is not None and saved.latest_step is not None:
    if not resume:
      folder = saved.directory.parent
      raise InputError(f"{folder} holds checkpoints: pass resume=True to continue, or name another folder")
    state = saved.restore(state)
    output.say(f"{phase}: resuming from step {int(state.step):,}")
    return state, saved.extra
  if saved is not None and resume:
    output.say(f"{phase}: there is no checkpoint to resume from, so training starts over")
  return state if start is None else start(state), {}


def _written(snapshot: Callable[[TrainState], None], state: TrainState) -> Metrics:
  """Takes a snapshot in the process that writes; the others end their dispatches at the same steps."""
  if processes.writes():
    snapshot(processes.local(state))
  return {}


def _raise_what_ended_it(
  stop: "_Stop", unreadable: InputError | None, largest: Callable[[int], int], *, reached: int | None
) -> None:
  """Raises if a scheduler's signal or an unreadable image ended training, in this or another process.

  Args:
    stop: the signal that this process received.
    unreadable: its error for an unreadable image.
    largest: the maximum over all processes.
    reached: the step that was saved; None if nothing was.
  """
  signum, failed = largest(stop.signum), largest(unreadable is not None)
  if failed:
    what = unreadable or "another process could not read an image: check its output"
    saved = "" if reached is None else f"; step {reached:,} is saved, and --resume continues from there"
    raise InputError(f"{what}{saved}")
  if signum in (signal.SIGTERM, signal.SIGHUP):
    raise Stopped(signum)


def _dispatch_sizes(done: int, num_steps: int, periods: Sequence[int]) -> Iterator[int]:
  """Steps of each dispatch, which ends at the next multiple of any period or at the last step.

  The very first step is dispatched alone, to measure the time to it.
  """
  while done < num_steps:
    num = 1 if done == 0 else min(num_steps - done, *(every - done % every for every in periods))
    yield num
    done += num


class _Stop:
  signum = 0
  """The signal that arrived; 0: none."""


@contextlib.contextmanager
def _stop_on_interrupt(*, saves: bool) -> Iterator[_Stop]:
  """The first Ctrl-C, SIGTERM or SIGHUP ends the loop after the current dispatch; a second is immediate."""
  stop = _Stop()

  def handle(signum, frame):
    del frame
    stop.signum = signum
    restore()
    # Not through the console: it may be mid-line and would print that line again.
    what = b"saving the progress so far" if saves else b"the last steps are still running"
    os.write(2, b"\nstopping: " + what + b" (Ctrl-C again to quit at once)\n")

  def restore():
    for signum, handler in previous.items():
      signal.signal(signum, handler)

  found = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  # Signals that are ignored, as in a background job or under nohup, stay ignored.
  previous = {signum: handler for signum, handler in found.items() if handler is not signal.SIG_IGN}
  if threading.current_thread() is not threading.main_thread():  # no signal arrives here
    previous = {}
  for signum in previous:
    signal.signal(signum, handle)
  try:
    yield stop
  finally:
    restore()
