"""Reports during training: rows of metrics, alarms, TensorBoard, a progress bar."""

import collections
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gan_jax import diagnostics, output
from gan_jax.output import console
from gan_jax.types import InputError, Json


class NonFiniteError(InputError):
  """A metric is not finite."""

  def __init__(self, found: str, before: Sequence[str]):
    after = f" after {len(before)} rollbacks" if before else ""
    super().__init__(f"{found}{after}: lower the learning rate")
    self.rollbacks = (*before, found)


class MetricsLog:
  """Appends one line per dispatch to `metrics.jsonl`: the mean of every metric over its steps.

  The metrics of one dispatch are read after the next has been sent, so the device never waits for them.
  """

  def __init__(
    self,
    workdir: Path | None,
    phase: str,
    first: int,
    num_steps: int,
    *,
    class_names: Sequence[str] = (),
    class_prior: Sequence[float] | None = None,
    tensorboard: bool = False,
    rollbacks: Sequence[str] = (),
    show: Callable[[Json], None] | None = None,
  ):
    """Opens the log.

    Args:
      workdir: directory of the log; None writes nothing.
      phase: the name of its rows; rows of other phases are kept.
      first: the step that the run starts or resumes from; later rows of this phase are dropped.
      num_steps: the last step of the run, for the alarms.
      class_names: class names, for the alarms, as is `class_prior`: see `diagnostics.alarms`.
      class_prior: class frequencies.
      tensorboard: whether to also log for TensorBoard.
      rollbacks: earlier rollbacks of the run, for the message of a `NonFiniteError`.
      show: called with every row.
    """
    rows, self._file, self._tensorboard = [], None, None
    if workdir is not None:
      path = workdir / "metrics.jsonl"
      rows = output.read_rows(path, ("phase", "step", "seconds"))
      rows = [row for row in rows if row["phase"] != phase or row["step"] <= first]
      output.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
      self._file = open(path, "a", buffering=1)  # noqa: SIM115
      if tensorboard:
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(str(workdir / "tensorboard" / phase), purge_step=first + 1)
    self._phase = phase
    self._find = functools.partial(
      diagnostics.alarms, num_steps=num_steps, class_names=class_names, class_prior=class_prior
    )
    self._rows = [row for row in rows if row["phase"] == phase]
    diagnosed = [i for i, row in enumerate(self._rows) if _is_diagnosed(row)]
    self.alarms = tuple(self._find(self._rows[: diagnosed[-1] + 1]).values()) if diagnosed else ()
    self._said: set[str] = set()
    self._rollbacks, self._show = rollbacks, show
    self._pending: tuple[int, int, dict[str, Array]] | None = None
    self._before = max((row["seconds"] for row in rows if row["phase"] == phase), default=0.0)
    self._begin = time.perf_counter()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_) -> None:
    for file in (self._file, self._tensorboard):
      if file is not None:
        file.close()

  @property
  def seconds(self) -> float:
    """Time since training began, including earlier parts of a resumed run."""
    return self._before + time.perf_counter() - self._begin

  def push(self, step: int, num: int, metrics: dict[str, Array]) -> None:
    """Takes the metrics of the `num` steps up to `step`, and writes the previous ones."""
    self.flush()
    self._pending = step, num, metrics

  def flush(self) -> None:
    """Waits for the latest metrics and writes them.

    Raises:
      NonFiniteError: a metric is not finite.
    """
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._write(*pending)

  def _write(self, step: int, num: int, metrics: dict[str, Array]) -> None:
    means = {}
    for name, history in metrics.items():
      values = np.asarray(history).ravel()[:num]  # a diagnostic is a scalar
      if not np.isfinite(values).all():
        where = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
        raise NonFiniteError(f"{name} is not finite at step {where} ({self._phase})", self._rollbacks)
      means[name] = float(values.mean())
    row = {"phase": self._phase, "step": step, "seconds": round(self.seconds, 3), **means}
    if self._file is not None:
      self._file.write(json.dumps(row) + "\n")
    self._rows.append(row)
    if _is_diagnosed(row):
      self._raise_alarms()
    if self._tensorboard is not None:
      for name, value in means.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._show is not None:
      self._show(row)

  def _raise_alarms(self) -> None:
    """Prints each kind of alarm when it first appears."""
    found = self._find(self._rows)
    self.alarms = tuple(found.values())
    for kind, text in found.items():
      if kind not in self._said:
        console.print(f"alarm: {text}", style="yellow", markup=False, soft_wrap=True)
    self._said |= set(found)


def _is_diagnosed(row: Json) -> bool:
  return any(name.startswith("diagnostics/") for name in row)


@contextlib.contextmanager
def progress(phase: str, first: int, total: int) -> Iterator[Callable[[Json], None]]:
  """A live bar on a terminal, about ten plain lines elsewhere; fed with log rows.

  The rate is between the last ten rows: the first ones wait for the compilation of diagnostics.
  """
  shown = {"d/loss": "D", "g/loss": "G", "d/error": "error on labels"}
  recent = collections.deque([(first, time.perf_counter())], maxlen=10)

  def describe(row: Json) -> tuple[float, str]:
    recent.append((row["step"], time.perf_counter()))
    (step, begin), (now_at, now) = recent[0], recent[-1]
    rate = (now_at - step) / (now - begin)
    return rate, "  ".join(f"{label} {row[name]:.3f}" for name, label in shown.items() if name in row)

  if not console.is_terminal:
    tenths = first * 10 // total

    def show_line(row: Json) -> None:
      nonlocal tenths
      rate, text = describe(row)
      if row["step"] * 10 // total > tenths:
        tenths = row["step"] * 10 // total
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
