"""The directory of a run: opening, locking, resuming."""

import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from gan_jax import (
  checkpoint,
  cli,
  output,
  overwrite,
  parsing,
  processes,
  provenance,
  recipes,
  steps,
)
from gan_jax.dataset import Dataset
from gan_jax.output import console, say
from gan_jax.recipes import Recipe
from gan_jax.types import InputError, Json, LabelSplit, Stopped, TrainState

FILES = ("config.json", "labels.json", "report.html", "result.json")
"""The files of every run."""
TRAINING_FILES = ("metrics.jsonl", "checkpoints", "tensorboard")
"""Additional files of a run that trains one recipe."""


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
  owned = (*FILES, *files)
  labels, described = _describe(run, values, recipes_used, owned)
  with _locked(path):
    if flags.resume:
      described = _check_resumable(path, labels, described)
    else:
      overwrite.settle(path, owned)
      if (path / "config.json").exists():
        _check_replaceable(path, flags, experiment)
        owned = (*owned, *(name for name in _stored_files(path) if name not in owned))
        overwrite.set_aside(path, owned)
    complete = False
    try:
      output.write_json(path / "config.json", described)  # first: it marks the folder as that of a run
      if not flags.resume:
        output.write_json(path / "labels.json", labels)
      processes.wait("open")
      yield run
      complete = True
    except (InputError, OSError):
      # A user error or a full disk, found before any training: the next attempt must find no run here.
      if not flags.resume and not overwrite.has_begun(path, owned):
        overwrite.remove(path, owned)
      raise
    except Stopped as stopped:
      if overwrite.has_begun(path, owned) or not (path / overwrite.REPLACED).exists():
        stopped.resume = shlex.join(["python", "-m", *program.split(), "--resume", "--workdir", str(path)])
      raise
    finally:
      overwrite.settle(path, owned, complete=complete)


def _describe(
  run: Run, flags: Json, recipes_used: Mapping[str, Recipe], files: Sequence[str]
) -> tuple[Json, Json]:
  """The content of `labels.json` and `config.json` as it will be read back: tuples become lists."""
  dataset, split = run.dataset, run.split
  named = {"experiment": run.experiment, "dataset": dataset.name, "note": dataset.note}
  labels = named | (describe_split(split, run.exclude_labelled) if split else {})
  config = {
    **named,
    "command": run.command,
    "config": flags | {"resume": False},
    "recipes": {name: recipes.describe(recipe) for name, recipe in recipes_used.items()},
    "image_shape": list(dataset.image_shape),
    "class_names": list(dataset.class_names),
    "reader": dataset.reader and dataclasses.asdict(dataset.reader),
    "scaling": dataset.scaling and dataclasses.asdict(dataset.scaling),
    "files": list(files),
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


def _check_folder(path: Path) -> None:
  """Raises `InputError` for a directory that must not hold a run."""
  if path.exists() and not path.is_dir():
    raise InputError(f"--workdir {path} is not a folder")
  names = set(os.listdir(path)) if path.exists() else set()
  names = {name for name in names if name != ".lock" and not name.startswith(".config.json.")}  # of a kill
  if names & {overwrite.REPLACED, overwrite.REPLACING}:
    return
  foreign = checkpoint.is_export(path)
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


def _stored_files(path: Path) -> list[str]:
  """The files and folders in the directory that its run lists as its own: it may have other parts."""
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    stored = json.loads((path / "config.json").read_text())["files"]
    return [name for name in stored if name in os.listdir(path)]  # no path leads out of the directory
  return []


def _check_resumable(path: Path, labels: Json, described: Json) -> Json:
  """The stored description with the flags of this invocation; `InputError` if it is of another run."""
  stored = {}
  for name in ("labels.json", "config.json"):
    try:
      stored[name] = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
      raise InputError(f"{path / name} cannot be read, so the run cannot be resumed") from error
  before = {key: stored["labels.json"].get(key) for key in ("experiment", "dataset")}
  if before["experiment"] != labels["experiment"]:
    raise InputError(f"{path} holds a run of {before['experiment']}, not of {labels['experiment']}")
  if before["dataset"] != labels["dataset"]:
    raise InputError(
      f"{path} was started on {before['dataset']}, not {labels['dataset']}: name it with --dataset"
    )
  noted = {"note": None}  # the note also counts files that are not pictures, which may come and go
  if stored["labels.json"] | noted != labels | noted:
    raise InputError(f"{path / 'labels.json'} does not hold the split that this run would use")
  if stored["config.json"].get("recipes") != described["recipes"]:
    why = "perhaps by another version of gan_jax or on another kind of device"
    raise InputError(f"{path} was started with another recipe, {why}")
  data = {
    "class_names": "with other classes",
    "reader": "read in another way",
    "scaling": "scaled otherwise",
  }
  for key, how in data.items():
    before = stored["config.json"].get(key)
    if before is not None and before != described[key]:
      raise InputError(f"{path} was started on other data, {how}")
  return stored["config.json"] | {key: described[key] for key in ("config", "command", "files")}


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


def start_from(
  flags: cli.TransferFlags, recipe: Recipe, class_names: Sequence[str]
) -> Callable[[TrainState], TrainState] | None:
  """The `start` of `train.fit` for --init-from; it prints which heads of D could not be transferred.

  A head for classes of other names, or in another order, is not: its columns would be those of others.
  """
  init_from = flags.init_from
  if init_from is None:
    return None

  def start(state: TrainState) -> TrainState:
    x = jax.ShapeDtypeStruct((1, *recipe.image_shape), np.float32)
    logits, _ = jax.eval_shape(steps.make_classifier(recipe.d), state, x)
    theirs, fresh = list(class_names), []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is wrong, `transfer` says
      theirs = list(json.loads((Path(init_from) / "config.json").read_text())["class_names"])
    others = theirs != list(class_names)
    if others and "g" in flags.parts and steps.is_class_conditional(recipe.g):
      raise InputError(
        "--init-from: the generator there draws other classes, or in another order: add --init-parts d"
      )
    if others and "d" in flags.parts and logits.shape[-1] == len(theirs):
      fresh = ["head"]
    layers = recipe.d.layers(recipe.image_shape)
    state, notes = checkpoint.transfer(state, init_from, layers=layers, parts=flags.parts, fresh=fresh)
    if fresh and not any("D's head" in note for note in notes):
      notes = [*notes, "D's head is new: the classes there are others, or in another order"]
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
  if checkpoint.is_export(Path(flags.init_from)):
    raise InputError(f"--init-from {flags.init_from} is an export: name the folder of its run")
  if run_flags.workdir and Path(flags.init_from).resolve() == Path(run_flags.workdir).resolve():
    raise InputError("--init-from and --workdir are the same folder: name a new one for this run")
