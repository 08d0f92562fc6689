"""What surrounds a run: its flags, its directory, and what it leaves there."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import filelock
import jax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gan_jax
from gan_jax import data, report
from gan_jax.types import InputError, Json, LabelSplit

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
  """Prints a plain sentence."""
  console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Config:
  """The flags that all experiments share."""

  dataset: str = "auto"
  """auto, digits, mnist, fashion_mnist, kmnist, a prepared tfds dataset, or folder:PATH. auto is MNIST
  where it is prepared or can be had, else the bundled digits; a dataset named outright never falls back."""
  data_dir: str | None = None
  """Where tfds keeps its datasets (default: tfds's own choice, TFDS_DATA_DIR included)."""
  manual_dir: str | None = None
  """A folder with the dataset's original files, used in place of the network."""
  image_size: int | None = None
  """Resize all images to squares of this side."""
  num_images: int | None = None
  """Train on so many images only (default: all that are not held out)."""
  hold_out: int | None = 0
  """Training images that no update sees; D is watched on them (None: a twentieth, at most 1,000)."""
  labels_per_class: int | None = 10
  """The label budget: so many labelled images of each class (None: every label)."""
  split_seed: int = 0
  """Which images are the labelled ones."""
  exclude_labelled: bool = False
  """Leave the labelled images out of the unlabelled ones."""
  steps: int | None = None
  """Updates of D and of G (default: the recipe's)."""
  batch_size: int | None = None
  """Unlabelled images an update (default: the recipe's)."""
  seed: int = 0
  """Seed of everything random but the label split."""
  workdir: str | None = None
  """Where the run goes (default: runs/<experiment>/<time>)."""
  resume: bool = False
  """Continue the run in --workdir from its last checkpoint, bit for bit."""
  overwrite: bool = False
  """Replace the run that --workdir holds."""
  checkpoint_every: int = 1000
  """Updates between checkpoints."""
  init_from: str | None = None
  """Start from the averaged networks of the run in this folder. Another number of classes gives D a new
  head."""
  init_parts: Literal["both", "g", "d"] = "both"
  """Which networks --init-from gives: both, the generator, or the discriminator."""
  freeze_d: int = 0
  """Leave so many layers of the discriminator, from the image on, as --init-from gave them (FreezeD)."""
  tensorboard: bool = False
  """Write the metrics for TensorBoard as well."""

  def check(self) -> None:
    """Raises `InputError` for flags that no data could make right."""
    at_least_one = (
      *("labels_per_class", "steps", "batch_size", "checkpoint_every"),
      *("image_size", "num_images"),
    )
    for name in at_least_one:
      value = getattr(self, name)
      if value is not None and value < 1:
        raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    self.check_not_negative("seed", "split_seed", "hold_out", "freeze_d")
    if self.resume and self.workdir is None:
      raise InputError("--resume needs --workdir, the run to continue")
    if self.resume and self.overwrite:
      raise InputError("--resume continues a run and --overwrite replaces it: choose one")
    if not self.resume:  # else these were checked when the run began, and its source may be gone by now
      self._check_source()

  def check_not_negative(self, *names: str) -> None:
    """Raises `InputError` for the first of these flags that is negative; None is not."""
    for name in names:
      value = getattr(self, name)
      if value is not None and min(value if isinstance(value, tuple) else (value,)) < 0:
        raise InputError(f"--{name.replace('_', '-')} must not be negative, and it is {value}")

  def _check_source(self) -> None:
    if self.init_from is None and self.init_parts != "both":
      raise InputError("--init-parts needs --init-from, the run to start from")
    if self.freeze_d and (self.init_from is None or self.init_parts == "g"):
      raise InputError("--freeze-d needs a discriminator from --init-from: it would freeze random layers")
    if self.init_from is not None and not (Path(self.init_from) / "config.json").is_file():
      raise InputError(f"--init-from {self.init_from} is not the folder of a run: it has no config.json")
    if self.init_from and self.workdir and Path(self.init_from).resolve() == Path(self.workdir).resolve():
      raise InputError("--init-from and --workdir are the same folder: name a new one for this run")


# --- The command line

# These say where a run finds and puts things, not what it computes.
_NOT_RECIPE = {"data_dir", "manual_dir", "workdir", "resume", "overwrite", "tensorboard"}


def cli(main: Callable[[Any], Json], config_class: type[Config]) -> None:
  """Parses the flags and runs `main`; an `InputError` is one sentence and exit code 2.

  With --resume the stored configuration stands in for the flags that are not given, and a flag that
  contradicts it is an error.
  """
  import absl.logging

  absl.logging.set_verbosity("error")
  try:
    config = tyro.cli(config_class, description=sys.modules[main.__module__].__doc__)
    config.check()
    if config.resume:
      config = resumed_config(config_class, Path(config.workdir or ""), sys.argv[1:])
    result = main(config)
  except InputError as error:
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    sys.exit(2)
  except KeyboardInterrupt:  # outside of the updates, or for the second time
    say("stopped at once")
    sys.exit(130)
  sys.exit(130 if result.get("interrupted") else 0)


def resumed_config(config_class: type[Config], path: Path, flags: Sequence[str]) -> Config:
  """The configuration of the run in `path`; `InputError` where a flag contradicts it."""
  try:
    fields = json.loads((path / "config.json").read_text())["config"]
    kwargs: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    stored = config_class(**kwargs | {"overwrite": False})  # that was about the run before
  except FileNotFoundError as error:
    raise InputError(f"{path} holds no run to resume: it has no config.json") from error
  except (ValueError, TypeError, KeyError) as error:
    raise InputError(f"{path / 'config.json'} is not the configuration of this experiment") from error
  config = tyro.cli(config_class, default=stored, args=flags)
  for field in dataclasses.fields(config):
    old, new = getattr(stored, field.name), getattr(config, field.name)
    if field.name not in _NOT_RECIPE and old != new:
      flag = field.name.replace("_", "-")
      raise InputError(f"{path} was begun with --{flag} {old}, not {new}: leave the flag out")
  return config


# --- The run directory


@dataclass(frozen=True)
class Run:
  """An open run: its directory, what it was asked, and its data."""

  path: Path
  experiment: str
  config: Config
  dataset: data.Dataset
  split: LabelSplit
  environment: Json
  """Device, versions and commit, as they were when the run began."""
  start: float

  @property
  def metrics_path(self) -> Path:
    return self.path / "metrics.jsonl"


@contextlib.contextmanager
def open_run(config: Config, experiment: str) -> Iterator[Run]:
  """Loads the data, draws the split, and opens the run's directory, which is locked meanwhile.

  Nothing is written before all that was asked for has been checked.

  Raises:
    InputError: bad data, bad budget, a directory that holds a run or is in use.
  """
  config.check()
  enable_compilation_cache()
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
  path = Path(config.workdir or Path("runs") / experiment / stamp)
  _check_workdir(path, config)
  dataset = data.load(
    config.dataset,
    data_dir=config.data_dir,
    manual_dir=config.manual_dir,
    image_size=config.image_size,
  )
  hold_out = min(1000, len(dataset.x_train) // 20) if config.hold_out is None else config.hold_out
  split = data.split_labels(
    dataset.y_train,
    config.labels_per_class,
    config.split_seed,
    num_images=config.num_images,
    num_held_out=hold_out,
  )
  if dataset.note:
    console.print(dataset.note, style="bold yellow", markup=False)
  found = environment()
  named = {"experiment": experiment, "dataset": dataset.name, "note": dataset.note}
  labels = {
    **named,
    "sha256": split.sha256,
    "seed": split.seed,
    "per_class": split.per_class,
    "indices": list(split.indices),
    "unlabelled_includes_labelled": not config.exclude_labelled,
    "num_images": len(split.images),
    "num_held_out": len(split.held_out),
  }
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"--workdir {path} cannot be made: {error.strerror}") from error
  try:
    with filelock.FileLock(path / ".lock", timeout=0):
      if config.resume:
        try:
          stored = json.loads((path / "labels.json").read_text())
        except (OSError, ValueError) as error:
          raise InputError(f"{path / 'labels.json'} cannot be read: the run cannot be resumed") from error
        if stored != labels:
          raise InputError(f"{path / 'labels.json'} is not the split that this run would use")
      else:
        _remove_run(path)
        report.write_json(path / "labels.json", labels)
        report.write_json(
          path / "config.json",
          {**named, "config": dataclasses.asdict(config), **found},
        )
      try:
        yield Run(path, experiment, config, dataset, split, found, time.time())
      except InputError:
        # A mistake that showed before any training: the next try shall find no run here.
        before_training = {".lock", *_RUN_FILES} - {"metrics.jsonl", "study.jsonl"}
        if not config.resume and set(os.listdir(path)) <= before_training:
          _remove_run(path)
        raise
  except filelock.Timeout as error:
    raise InputError(f"--workdir {path} is in use by another run") from error


def _remove_run(path: Path) -> None:
  for name in _RUN_FILES:
    target = path / name
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


_RUN_FILES = (
  "config.json",
  "labels.json",
  "metrics.jsonl",
  "samples",
  "checkpoints",
  "tensorboard",
  "report.html",
  "result.json",
  "learning_curves.png",
  "confusion.png",
  "splits",
  "study.jsonl",
  "study.md",
  "study.png",
)


def _check_workdir(path: Path, config: Config) -> None:
  if path.exists() and not path.is_dir():
    raise InputError(f"--workdir {path} is not a folder")
  holds_run = (path / "config.json").exists()
  if config.resume:
    return
  if holds_run and not config.overwrite:
    raise InputError(f"{path} already holds a run: pass --resume to go on or --overwrite to replace it")
  if not holds_run and path.exists() and set(os.listdir(path)) - {".lock"}:
    raise InputError(f"--workdir {path} holds other files: name an empty or a new folder")


def run_inside(
  run: Run, name: str, main: Callable[[Any], Json], config_class: type[Config], **changes: Any
) -> Json:
  """Another experiment as a part of this run, in a folder of its own; resumed with this run.

  Args:
    run: the open run. Its flags hold for the part, as far as the part has them.
    name: of the folder.
    main, config_class: the experiment.
    changes: flags of its own.

  Returns:
    The part's result: where it was complete, the one that it had.
  """
  folder = run.path / name
  resume = run.config.resume and (folder / "config.json").exists()
  if resume and (folder / "result.json").exists():
    result = json.loads((folder / "result.json").read_text())
    if not result["interrupted"]:
      return result
  say(f"--- {name}")
  shared = {field.name for field in dataclasses.fields(config_class)} & set(vars(run.config))
  flags = {field: getattr(run.config, field) for field in shared}
  own = {"workdir": str(folder), "resume": resume, "overwrite": not resume}
  return main(config_class(**{**flags, **changes, **own}))


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, at most 1 GB: a second start does not compile again."""
  root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  if jax.config.values["jax_compilation_cache_dir"] is None:  # the attribute is untyped in JAX 0.10
    jax.config.update("jax_compilation_cache_dir", str(Path(root) / "gan_jax" / "xla"))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def num_cores() -> int:
  """Processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def environment() -> Json:
  """Device, versions and commit: what a number means nothing without."""
  device = jax.devices()[0]
  names = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")
  root, commit = Path(__file__).parent.parent, ""
  if (root / ".git").exists():  # else this is an installed package, in whatever repository it may lie
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
      commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
  kind = f"{device.platform}, {num_cores()} cores" if device.platform == "cpu" else device.device_kind
  return {
    "device": kind,
    "versions": {
      "gan_jax": gan_jax.__version__,
      "python": platform.python_version(),
      **{name: metadata.version(name) for name in names},
    },
    "commit": commit or None,
  }


# --- The end of a run


def finish(
  run: Run,
  result: Json,
  *,
  table: Sequence[tuple[str, str]],
  pictures: Sequence[tuple[str, str]],
) -> Json:
  """Completes the result, writes `result.json` and `report.html`, and prints the table.

  Args:
    run: the open run.
    result: the experiment's own keys.
    table: rows of name and value.
    pictures: title and file name, relative to the run's directory, for the page.
  """
  dataset, config = run.dataset, run.config
  result = {
    "experiment": run.experiment,
    "dataset": dataset.name,
    "note": dataset.note,
    "num_labels": len(run.split.indices),
    "label_split_sha256": run.split.sha256,
    "split_seed": run.split.seed,
    "unlabelled_includes_labelled": not config.exclude_labelled,
    "num_images": len(run.split.images),
    "seed": config.seed,
    **result,
    "seconds_total": round(time.time() - run.start, 1),
    "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    **run.environment,
  }
  result = json.loads(json.dumps(result))  # as it will be read: a tuple is a list
  report.write_json(run.path / "result.json", result)
  report.page(
    run.path / "report.html", result, table, [(title, run.path / name) for title, name in pictures]
  )
  title = f"{run.experiment} on {dataset.name}"
  if result["num_labels"] is not None:  # else each row of the table has its own
    title += f", {result['num_labels']} labels"
  rich_table = Table(title=title, title_justify="left", show_header=False)
  for row in table:
    rich_table.add_row(*row)
  console.print(rich_table)
  if dataset.note:
    console.print(dataset.note, style="bold yellow", markup=False)
  say(f"written to {run.path}")
  return result
