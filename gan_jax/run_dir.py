"""The directory of a run: opening, locking, resuming, replacing, results."""

import contextlib
import dataclasses
import datetime
import json
import os
import resource
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import psutil
from rich.markup import escape
from rich.table import Table

from gan_jax import checkpoint, cli, page, parsing, processes, provenance, recipes, report, train
from gan_jax.dataset import Dataset
from gan_jax.recipes import Recipe
from gan_jax.report import console, say
from gan_jax.types import InputError, Json, LabelSplit, Stopped, TrainState

FILES = ("config.json", "labels.json", "report.html", "result.json")
"""The files of every run."""
TRAINING_FILES = ("metrics.jsonl", "checkpoints", "tensorboard")
"""Additional files of a run that trains one recipe."""

_REPLACED, _REPLACING = ".replaced", ".replacing"
# Where --overwrite keeps the files of the old run until the new one has its first row of metrics, and where
# they are while being moved there or back.


@dataclass(frozen=True)
class Run:
  """An open run: its directory, flags, data, and environment."""

  path: Path
  experiment: str
  flags: cli.RunFlags
  dataset: Dataset
  split: LabelSplit | None
  seed: int
  exclude_labelled: bool
  environment: Json
  """Device, versions and commit at the start of the run."""
  begin: float
  command: str
  """The command that repeats the run."""

  @property
  def metrics_path(self) -> Path:
    return self.path / "metrics.jsonl"


@contextlib.contextmanager
def open_run(
  experiment: str,
  config: Any,
  dataset: Dataset,
  split: LabelSplit | None,
  *,
  recipes_used: Mapping[str, Recipe],
  files: Sequence[str],
) -> Iterator[Run]:
  """Opens the directory of a run and keeps it locked meanwhile.

  Check everything that can be checked first: from here on the directory is written to, with several
  processes only by the first. A run that --overwrite replaces is restored if the new one raises before its
  first row of metrics; if the new one is killed before that, the next call restores the old run.

  Args:
    experiment: name of the experiment.
    config: its configuration, with a group `run`.
    dataset: its data.
    split: its label split; None if the experiment writes its own splits.
    recipes_used: the recipes that it trains, by the names of the phases.
    files: files and folders that it writes besides `FILES`.

  Raises:
    InputError: the directory holds a run or other files, or is in use; or the run cannot be resumed.
  """
  flags: cli.RunFlags = config.run
  values = parsing.flags_of(config)
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
  path = Path(flags.workdir or Path("runs") / experiment / stamp)
  program = "gan_jax train" if experiment == "train" else f"experiments.{experiment}"
  run = Run(
    path=path,
    experiment=experiment,
    flags=flags,
    dataset=dataset,
    split=split,
    seed=values.get("seed", 0),
    exclude_labelled=values.get("exclude_labelled", False),
    environment=provenance.environment(),
    begin=time.time(),
    command=parsing.command(f"python -m {program}", config),
  )
  _check_outside(path, values)
  if not processes.writes():
    processes.wait("open")
    if not (path / "config.json").exists():
      raise InputError(
        f"--workdir {path} must be a folder that all processes share, but the run of process 0 is not there"
      )
    yield run
    return
  _check_folder(path)
  if dataset.note:
    console.print(dataset.note, style="bold yellow", markup=False)
  labels, described = _describe(run, values, recipes_used)
  owned = (*FILES, *files)
  with _locked(path):
    if flags.resume:
      _check_resumable(path, labels, described)
    else:
      _settle(path, owned)
      if (path / "config.json").exists():
        _check_replaceable(path, flags, experiment)
        _move_aside(path, owned)
    complete = False
    try:
      if not flags.resume:
        report.write_json(path / "config.json", described)  # first: it marks the folder as that of a run
        report.write_json(path / "labels.json", labels)
      processes.wait("open")
      yield run
      complete = True
    except InputError:
      # A user error found before any training: the next attempt must find no run here.
      if not flags.resume and not _has_begun(path, owned):
        remove(path, owned)
      raise
    except Stopped as stopped:
      if _has_begun(path, owned) or not (path / _REPLACED).exists():
        stopped.resume = shlex.join(["python", "-m", *program.split(), "--resume", "--workdir", str(path)])
      raise
    finally:
      _settle(path, owned, complete=complete)


def _describe(run: Run, flags: Json, recipes_used: Mapping[str, Recipe]) -> tuple[Json, Json]:
  """The content of `labels.json` and `config.json` as it will be read back: tuples become lists."""
  dataset, split = run.dataset, run.split
  named = {"experiment": run.experiment, "dataset": dataset.name, "note": dataset.note}
  labels = named | (describe_split(split, run.exclude_labelled) if split else {})
  config = {
    **named,
    "command": run.command,
    "config": flags,
    "recipes": {name: recipes.describe(recipe) for name, recipe in recipes_used.items()},
    "image_shape": list(dataset.image_shape),
    "class_names": list(dataset.class_names),
    "reader": dataset.reader and dataclasses.asdict(dataset.reader),
    "scaling": dataset.scaling and dataclasses.asdict(dataset.scaling),
    **run.environment,
  }
  return json.loads(json.dumps(labels)), json.loads(json.dumps(config))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Makes the directory and keeps other runs out of it."""
  lock = filelock.FileLock(path / ".lock", timeout=0)
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock.acquire()
  except filelock.Timeout as error:
    raise InputError(f"--workdir {path} is in use by another run") from error
  except OSError as error:
    raise InputError(f"--workdir {path} cannot be used: {error.strerror or error}") from error
  try:
    yield
  finally:
    lock.release()


def describe_split(split: LabelSplit, exclude_labelled: bool = False) -> Json:
  """The description of a split that a run stores."""
  return {
    "sha256": split.sha256,
    "seed": split.seed,
    "per_class": split.per_class,
    "indices": list(split.indices),
    "unlabelled_includes_labelled": not exclude_labelled,
    "num_images": len(split.images),
    "num_held_out": len(split.held_out),
  }


def remove(path: Path, files: Iterable[str]) -> None:
  """Removes these files and folders of a run; of a symbolic link, only the link."""
  for name in files:
    target = path / name
    if target.is_dir() and not target.is_symlink():
      shutil.rmtree(target)
    else:
      target.unlink(missing_ok=True)


def _move_aside(path: Path, files: Sequence[str]) -> None:
  moving = path / _REPLACING
  moving.mkdir()
  for name in files:
    if os.path.lexists(path / name):
      (path / name).rename(moving / name)
  moving.rename(path / _REPLACED)


def _settle(path: Path, files: Sequence[str], *, complete: bool = False) -> None:
  """Finishes what `_move_aside` began: removes the old run if the new one has begun, else puts it back.

  It can be called again after being killed at any point.
  """
  aside, moving = path / _REPLACED, path / _REPLACING
  if aside.exists():
    if complete or _has_begun(path, files):
      remove(path, [_REPLACED])
    else:
      remove(path, files)
      aside.rename(moving)
  if moving.exists():
    for name in os.listdir(moving):
      remove(path, [name])
      (moving / name).rename(path / name)
    moving.rmdir()


def _has_begun(path: Path, files: Sequence[str]) -> bool:
  """Whether a run or one of its parts has a first row of metrics or results, or a checkpoint."""
  if "checkpoints" in files and any((path / "checkpoints").rglob("_CHECKPOINT_METADATA")):
    return True
  rows = (row for name in files for row in (path / name, *(path / name).rglob("*.jsonl")))
  return any(row.suffix == ".jsonl" and row.is_file() and row.stat().st_size for row in rows)


def _check_folder(path: Path) -> None:
  """Raises `InputError` for a directory that must not hold a run."""
  if path.exists() and not path.is_dir():
    raise InputError(f"--workdir {path} is not a folder")
  names = set(os.listdir(path)) if path.exists() else set()
  names = {name for name in names if name != ".lock" and not name.startswith(".config.json.")}  # of a kill
  if names & {_REPLACED, _REPLACING}:
    return
  foreign = checkpoint.SAFETENSORS["d"] in names  # an export
  with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged file is that of a run
    foreign |= "experiment" not in json.loads((path / "config.json").read_text())
  if names and (foreign or "config.json" not in names):
    raise InputError(f"--workdir {path} holds other files: name an empty or a new folder")


def _check_outside(path: Path, values: Json) -> None:
  """Raises `InputError` if a run would lie in the folder of pictures that a flag names."""
  for value in values.values():
    if isinstance(value, str) and value.startswith("folder:"):
      folder = Path(value.removeprefix("folder:")).expanduser()
      if path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
          f"the run would lie in {path}, among the pictures of {value}, and be read as one of their"
          " classes: choose a --workdir elsewhere"
        )


def _check_replaceable(path: Path, flags: cli.RunFlags, experiment: str) -> None:
  """Raises `InputError` if the directory's run must not be replaced by one of this experiment."""
  if not flags.overwrite:
    raise InputError(
      f"{path} already holds a run: pass --resume to continue it or --overwrite to replace it"
    )
  stored = experiment
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    stored = json.loads((path / "config.json").read_text())["experiment"]
  if stored != experiment:
    raise InputError(f"{path} holds a run of {stored}, not of {experiment}: name another folder")


def _check_resumable(path: Path, labels: Json, described: Json) -> None:
  stored = {}
  for name in ("labels.json", "config.json"):
    try:
      stored[name] = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
      raise InputError(f"{path / name} cannot be read, so the run cannot be resumed") from error
  noted = {"note": None}  # the note also counts files that are not pictures, which may come and go
  if stored["labels.json"] | noted != labels | noted:
    raise InputError(f"{path / 'labels.json'} does not hold the split that this run would use")
  if stored["config.json"].get("recipes") != described["recipes"]:
    raise InputError(f"{path} was started with another recipe, perhaps by another version of gan_jax")
  data = {
    "class_names": "with other classes",
    "reader": "read in another way",
    "scaling": "scaled otherwise",
  }
  for key, how in data.items():
    before = stored["config.json"].get(key)
    if before is not None and before != described[key]:
      raise InputError(f"{path} was started on other data, {how}")


def run_inside(run: Run, name: str, main: Callable[[Any], Json], config: Any) -> Json:
  """Runs another experiment as a part of this run, in its own folder; it is resumed with this run.

  Returns:
    The part's result; the stored one if it was already complete.
  """
  folder = run.path / name
  resume = run.flags.resume and (folder / "labels.json").exists()  # written after config.json
  if resume:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # else it is absent or damaged
      result = json.loads((folder / "result.json").read_text())
      if not result["interrupted"]:
        return result
  say(f"--- {name}")
  flags = cli.RunFlags(workdir=str(folder), resume=resume, overwrite=not resume)
  config = dataclasses.replace(config, run=flags)
  parsing.check(config)
  return main(config)


def start_from(flags: cli.TransferFlags, recipe: Recipe) -> Callable[[TrainState], TrainState] | None:
  """The `start` of `train.fit` for --init-from; it prints which heads could not be transferred."""
  init_from = flags.init_from
  if init_from is None:
    return None

  def start(state: TrainState) -> TrainState:
    layers = recipe.d.layers(recipe.image_shape)
    state, notes = checkpoint.transfer(state, init_from, layers=layers, parts=flags.parts)
    for note in notes:
      say(f"--init-from: {note}")
    return state

  return start


def check_source(run_flags: cli.RunFlags, flags: cli.TransferFlags) -> None:
  """Raises `InputError` if --init-from is not a run; a resumed run does not need it."""
  if run_flags.resume or flags.init_from is None:
    return
  if not (Path(flags.init_from) / "config.json").is_file():
    raise InputError(f"--init-from {flags.init_from} is not the folder of a run: it has no config.json")
  if run_flags.workdir and Path(flags.init_from).resolve() == Path(run_flags.workdir).resolve():
    raise InputError("--init-from and --workdir are the same folder: name a new one for this run")


# --- The end of a run


def training(fit: train.Fit) -> Json:
  """The entries of `result.json` about training."""
  first, num_steps = fit.first_step_at, int(fit.state.step)
  return {
    "interrupted": fit.interrupted,
    "steps": num_steps,
    "seconds_train": round(fit.seconds_train, 1),
    "seconds_compile": round(fit.seconds_compile, 1),
    "seconds_to_first_step": first and round(first - psutil.Process().create_time(), 2),
    "steps_per_second": round(num_steps / fit.seconds_train, 2),
    "seconds_idle": round(fit.seconds_idle, 2),
    "alarms": list(fit.alarms),
    "rollbacks": list(fit.rollbacks),
  }


def finish(
  run: Run,
  result: Json,
  *,
  table: Sequence[Sequence[str]],
  pictures: Sequence[tuple[str, str]],
  sections: Sequence[page.Section] = (),
) -> Json:
  """Completes the result, writes `result.json` and `report.html`, and prints the table.

  Args:
    run: the open run.
    result: the experiment's own keys; errors that are missing become None.
    table: rows, each a name and its values.
    pictures: titles and file names, relative to the run's directory, for the page.
    sections: further sections of the page, below the pictures.
  """
  dataset, split = run.dataset, run.split
  result = {
    "experiment": run.experiment,
    "dataset": dataset.name,
    "note": dataset.note,
    "num_labels": split and len(split.indices),
    "label_split_sha256": split and split.sha256,
    "split_seed": split and split.seed,
    "unlabelled_includes_labelled": not run.exclude_labelled,
    "num_images": len(split.images if split else dataset.x_train),
    "seed": run.seed,
    **dict.fromkeys(("test_error", "supervised_test_error", "probe_test_error")),
    **result,
    "seconds_total": round(time.time() - run.begin, 1),
    "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    **run.environment,
  }
  result = json.loads(json.dumps(result))  # as it will be read back: tuples become lists
  report.write_json(run.path / "result.json", result)
  files = [(title, run.path / name) for title, name in pictures]
  page.write(run.path / "report.html", result, table, files, sections=sections, command=run.command)
  title = f"{run.experiment} on {dataset.name}"
  if result["num_labels"] is not None:  # else each row of the table has its own
    title += f", {result['num_labels']} labels"
  rich_table = Table(title=escape(title), title_justify="left", show_header=False)
  for name, *values in table:
    rich_table.add_row(*map(escape, (name, *values)))
  console.print(rich_table)
  for alarm in result.get("alarms", ()):
    console.print(f"alarm: {alarm}", style="yellow", markup=False, soft_wrap=True)
  if dataset.note:
    console.print(dataset.note, style="bold yellow", markup=False)
  say(f"written to {run.path}")
  return result
