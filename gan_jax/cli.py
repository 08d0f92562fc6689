"""The command line: groups of flags that an experiment composes, configurations of them, and parsing."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import jax
import typeguard
import tyro

from gan_jax import data, datasets, parallel, pictures, processes
from gan_jax.networks import Precision
from gan_jax.recipes import Recipe
from gan_jax.report import console, say
from gan_jax.types import InputError, Json, LabelSplit

# --- Groups of flags. Each checks itself; what an experiment does not honour it does not take.


@dataclass(frozen=True)
class DataFlags:
  """The dataset."""

  dataset: str = "auto"
  """auto, digits, mnist, fashion_mnist, kmnist, a prepared tfds dataset, or your own: folder:PATH or
  arrays:FILE.npz. auto is MNIST where it is prepared or can be had, else the bundled digits; a dataset
  named outright never falls back."""
  data_dir: str | None = None
  """Where tfds keeps its datasets (default: tfds's own choice, TFDS_DATA_DIR included)."""
  manual_dir: str | None = None
  """A folder with the dataset's original files, used in place of the network."""
  image_size: int | None = None
  """Resize all images to squares of this side."""
  fit: Literal["crop", "pad"] = "crop"
  """How --image-size keeps the aspect: the centred square, or the whole picture with its edges repeated."""

  def check(self) -> None:
    at_least_one(self, "image_size")
    if self.fit != "crop" and self.image_size is None:
      raise InputError(f"--fit {self.fit} needs --image-size, the side to resize to")


@dataclass(frozen=True)
class StreamFlags:
  """Training images that do not fit."""

  stream: datasets.Choice = "auto"
  """Read training images while training, or hold them on the device. auto reads those that, decoded, take
  more than a quarter of the free memory or half of the device's, and says so."""
  workers: int | None = None
  """Threads that read and decode them; 0: the loop itself does (default: the processor's cores)."""

  def check(self) -> None:
    not_negative(self, "workers")
    if self.workers is not None and self.stream == "no":
      raise InputError("--workers are for training images that are read while training: leave --stream out")


@dataclass(frozen=True)
class ImageFlags:
  """The training images that are used."""

  num_images: int | None = None
  """Train on so many images only (default: all that are not held out)."""
  hold_out: int | None = 0
  """Training images that no update sees, for diagnostics (None: a twentieth, at most 1,000)."""

  def check(self) -> None:
    at_least_one(self, "num_images")
    not_negative(self, "hold_out")


@dataclass(frozen=True)
class LabelFlags:
  """The labels that are used."""

  labels_per_class: int | Literal["all"] | None = None
  """The label budget: so many labelled images of each class, or all (default: 10; all of your own data)."""
  split_seed: int = 0
  """Which images are the labelled ones."""
  exclude_labelled: bool = False
  """Leave the labelled images out of the unlabelled ones."""

  def check(self) -> None:
    if self.labels_per_class != "all":
      at_least_one(self, "labels_per_class")
    not_negative(self, "split_seed")

  def per_class(self, dataset: datasets.Dataset) -> int | None:
    """The budget for this dataset, None for every label."""
    if self.labels_per_class is None:
      return None if dataset.own else 10
    return None if self.labels_per_class == "all" else self.labels_per_class


@dataclass(frozen=True)
class TrainFlags:
  """Training."""

  steps: int | None = None
  """Steps, each of which updates D, then G (default: the recipe's)."""
  batch_size: int | None = None
  """Unlabelled images per step, in experiments with generators all real ones (default: the recipe's)."""
  seed: int = 0
  """Seed of everything random but the label split."""
  precision: Precision | None = None
  """Of the networks' products and convolutions; all else is float32 (default: the recipe's, float32)."""

  def check(self) -> None:
    at_least_one(self, "steps", "batch_size")
    not_negative(self, "seed")


@dataclass(frozen=True)
class LoopFlags:
  """What is written during training."""

  checkpoint_every: int = 1000
  """Steps between checkpoints."""
  on_nonfinite: Literal["stop", "rollback"] = "stop"
  """Where a loss is not finite: stop, or go back to the last checkpoint at half the learning rates, three
  times at most (rollback)."""
  tensorboard: bool = False
  """Write the metrics for TensorBoard as well."""
  devices: int | None = None
  """Devices that share each step (default: as many accelerators as divide its images; 1 on CPU)."""

  def check(self) -> None:
    at_least_one(self, "checkpoint_every", "devices")


@dataclass(frozen=True)
class ProcessFlags:
  """Several processes, on one machine or many, that train together: the same command for each but for
  --process-id."""

  coordinator: str | None = None
  """HOST:PORT at which the first process listens for the others, or auto: as Slurm, Open MPI, Kubernetes or
  a Cloud TPU says."""
  num_processes: int | None = None
  """How many processes there are (default: as the cluster says)."""
  process_id: int | None = None
  """Which of them this is, from 0 on (default: as the cluster says). Process 0 alone writes."""

  def check(self) -> None:
    at_least_one(self, "num_processes")
    not_negative(self, "process_id")
    if self.coordinator is None:
      if self.num_processes is not None or self.process_id is not None:
        raise InputError("--num-processes and --process-id need --coordinator HOST:PORT")
      return
    i, num = self.process_id, self.num_processes
    if i is not None and num is not None and i >= num:
      raise InputError(f"--process-id {i} is not one of {num} processes, which are counted from 0")

  def start(self) -> None:
    """Joins the other processes, where there are any; only the first then prints what it does."""
    if self.coordinator is not None:
      processes.initialize(self.coordinator, self.num_processes, self.process_id)
      say(f"process {jax.process_index()} of {jax.process_count()}, {len(jax.devices())} devices in all")
      console.quiet = not processes.writes()


@dataclass(frozen=True)
class TransferFlags:
  """Networks from another run."""

  init_from: str | None = None
  """Start from the averaged networks of the run in this folder. Another number of classes gives D a new
  head."""
  init_parts: Literal["both", "g", "d"] = "both"
  """Which networks --init-from gives: both, the generator, or the discriminator."""
  freeze_d: int = 0
  """Leave so many layers of the discriminator, from the image on, as --init-from gave them (FreezeD)."""

  def check(self) -> None:
    not_negative(self, "freeze_d")
    if self.init_from is None and self.init_parts != "both":
      raise InputError("--init-parts needs --init-from, the run to start from")
    if self.freeze_d and (self.init_from is None or self.init_parts == "g"):
      raise InputError("--freeze-d needs a discriminator from --init-from: it would freeze random layers")

  @property
  def parts(self) -> tuple[str, ...]:
    """The networks that the other run gives."""
    return {"both": ("g", "d"), "g": ("g",), "d": ("d",)}[self.init_parts]


@dataclass(frozen=True)
class RunFlags:
  """The run's directory."""

  workdir: str | None = None
  """Where the run goes (default: runs/<experiment>/<time>)."""
  resume: bool = False
  """Continue the run in --workdir from its last checkpoint, bit for bit."""
  overwrite: bool = False
  """Replace the run that --workdir holds."""

  def check(self) -> None:
    if self.resume and self.workdir is None:
      raise InputError("--resume needs --workdir, the run to continue")
    if self.resume and self.overwrite:
      raise InputError("--resume continues a run and --overwrite replaces it: choose one")


def at_least_one(flags: Any, *names: str) -> None:
  """Raises `InputError` for the first of these flags that is below 1; None is not."""
  for name in names:
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise InputError(f"{flag(name)} must be at least 1, not {value}")


def not_negative(flags: Any, *names: str) -> None:
  """Raises `InputError` for the first of these flags that is negative; None is not."""
  for name in names:
    value = getattr(flags, name)
    if value is not None and any(v < 0 for v in (value if isinstance(value, tuple) else (value,))):
      raise InputError(f"{flag(name)} must not be negative, and it is {value}")


def flag(name: str) -> str:
  """A field as it is typed on the command line."""
  return f"--{name.replace('_', '-')}"


def given(**values: Any) -> Json:
  """Those that are not None: what replaces the values of a recipe."""
  return {name: value for name, value in values.items() if value is not None}


def load(
  flags: DataFlags, stream: StreamFlags | None = None, *, needs_test: bool = True
) -> datasets.Dataset:
  """The dataset of these flags, see `datasets.load`; `InputError` where it lacks the test images needed.

  Without `stream` its training images are held in memory.
  """
  stream = stream or StreamFlags("no")
  say(f"reading {flags.dataset}")
  dataset = datasets.load(
    flags.dataset,
    data_dir=flags.data_dir,
    manual_dir=flags.manual_dir,
    image_size=flags.image_size,
    fit=flags.fit,
    stream=stream.stream,
    workers=num_cores() if stream.workers is None else stream.workers,
  )
  if needs_test and not len(dataset.x_test):
    raise InputError(f"{dataset.name} has no test images, and this needs them: add a folder test")
  return dataset


def split_labels(dataset: datasets.Dataset, labels: LabelFlags, images: ImageFlags) -> LabelSplit:
  """The labels and images of these flags, see `data.split_labels`."""
  num_train, num_held_out = len(dataset.x_train), images.hold_out
  split = data.split_labels(
    dataset.y_train,
    labels.per_class(dataset),
    labels.split_seed,
    num_images=images.num_images,
    num_held_out=min(1000, num_train // 20) if num_held_out is None else num_held_out,
  )
  if labels.exclude_labelled and len(split.indices) == len(split.images):
    raise InputError(
      f"--exclude-labelled leaves no image: all {len(split.images):,} have labels; leave it out"
    )
  return split


def devices(num: int | None, recipe: Recipe) -> list[Any]:
  """The devices of --devices for `train.fit`: none where one does it.

  Raises:
    InputError: there are not so many, or the batch cannot be split over them, or is beyond all memory.
  """
  # Activations and gradients take more than these 64 bytes a value, but how much depends on the networks.
  hint = "choose a smaller --batch-size"
  pictures.check_memory(sum(recipe.batch), recipe.image_shape, hint, num_bytes=64)
  there, num_processes = jax.devices(), jax.process_count()
  if num is None:
    one = there[0].platform == "cpu" and num_processes == 1
    num = 1 if one else parallel.most_devices(recipe.batch, len(there))
  if num > len(there):
    more = f"; XLA_FLAGS=--xla_force_host_platform_device_count={num} makes them of one processor"
    raise InputError(f"--devices {num}: there {'is' if len(there) == 1 else 'are'} {len(there)}{more}")
  if num % num_processes:
    raise InputError(
      f"{num} devices cannot be shared by {num_processes} processes evenly: choose --devices and"
      " --batch-size as multiples of them"
    )
  taken = [[d for d in there if d.process_index == i][: num // num_processes] for i in range(num_processes)]
  devices = [device for those in taken for device in those]
  if num > 1:
    parallel.over_devices(recipe, devices)  # so that a batch that cannot be split is told at once
    say(f"{num} of {len(there)} devices share each step")
  return devices if num > 1 else []


# --- Configurations: dataclasses of groups and of an experiment's own flags

Config = TypeVar("Config")

# These say where a run finds and puts things, not what it computes.
PROCESSES = {field.name for field in dataclasses.fields(ProcessFlags)}
NOT_RECIPE = {
  "data_dir",
  "manual_dir",
  "stream",
  "workers",
  "workdir",
  "resume",
  "overwrite",
  "tensorboard",
  "devices",
  "on_nonfinite",
  *PROCESSES,
}


def check(config: Any) -> None:
  """Checks that 32 bits hold the numbers, then every group, then what the configuration has to say."""
  for name, value in flags_of(config).items():
    largest = 2**32 - 1 if name.endswith("seed") else 2**31 - 1  # a larger seed is a smaller one again
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, int) and number > largest:
        raise InputError(f"{flag(name)} must be at most {largest:,}, and it is {number:,}")
      if isinstance(number, float) and not math.isfinite(number):
        raise InputError(f"{flag(name)} must be a finite number, and it is {number}")
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value) and hasattr(value, "check"):
      value.check()  # pyright: ignore
  if hasattr(config, "check"):
    config.check()


def flags_of(config: Any) -> Json:
  """All flags by their names; a name is there once, in whatever group it is."""
  flags = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    flags |= flags_of(value) if dataclasses.is_dataclass(value) else {field.name: value}
  return flags


def flags_of_recipe(config: Any) -> Json:
  """Flags that say what a run computes; without those that say where it finds and puts things."""
  return {name: value for name, value in flags_of(config).items() if name not in NOT_RECIPE}


def command(program: str, config: Any) -> str:
  """The command that repeats a run elsewhere: `program` and the flags that are not at their defaults.

  Without those of the directory and of the processes: the command neither resumes nor replaces the run.
  """
  defaults, words = flags_of(type(config)()), []
  for name, value in flags_of(config).items():
    if value == defaults[name] or name in ("workdir", "resume", "overwrite", *PROCESSES):
      continue
    if isinstance(value, bool):
      words.append(flag(name) if value else flag(f"no_{name}"))
    else:
      words += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
  return shlex.join([*shlex.split(program), *words])


def with_flags(config: Config, **changes: Any) -> Config:
  """The configuration with some flags changed, in whatever group they are.

  Raises:
    TypeError: a flag that it does not have.
  """
  config, unknown = _with_flags(config, changes)
  if unknown:
    raise TypeError(f"no such flag: {', '.join(unknown)}")
  return config


def _with_flags(config: Any, changes: Json) -> tuple[Any, Json]:
  rest, own = dict(changes), {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      own[field.name], rest = _with_flags(value, rest)
    elif field.name in rest:
      own[field.name] = rest.pop(field.name)
  return dataclasses.replace(config, **own), rest


# --- Parsing


def parse(config_cls: type[Config], flags: Sequence[str], **about: Any) -> Config:
  """The configuration of these flags, checked; with --resume that of the stored run, see `resumed`.

  Args:
    config_cls: its class.
    flags: as the process gets them.
    about: for tyro.

  Raises:
    InputError: what does not parse, or is refused.
  """
  config = _parse(config_cls, flags, **about)
  run = getattr(config, "run", None)  # some commands have a flag of this name
  if isinstance(run, RunFlags) and run.resume:
    run.check()
    config = resumed(config_cls, Path(run.workdir or ""), flags)
  check(config)
  return config


def resumed(config_cls: type[Config], path: Path, flags: Sequence[str]) -> Config:
  """The configuration of the run in `path`; `InputError` where a flag contradicts it."""
  try:
    fields = json.loads((path / "config.json").read_text())["config"]
    stored = with_flags(config_cls(), **{name: _tuples(value) for name, value in fields.items()})
    then = {"overwrite": False} | dict.fromkeys(PROCESSES & fields.keys())
    stored = with_flags(stored, **then)  # those were about the run before
    _check_types(stored)
  except FileNotFoundError as error:
    raise InputError(f"{path} holds no run to resume: it has no config.json") from error
  except (OSError, ValueError, TypeError, KeyError, AttributeError, typeguard.TypeCheckError) as error:
    raise InputError(f"{path / 'config.json'} is not the configuration of this experiment") from error
  config = _parse(config_cls, flags, default=stored)
  old, new = flags_of_recipe(stored), flags_of_recipe(config)
  for name in old:
    if old[name] != new[name]:
      raise InputError(
        f"{path} was begun with {flag(name)} {old[name]}, not {new[name]}: leave the flag out"
      )
  return config


def _check_types(config: Any) -> None:
  for name, hint in get_type_hints(type(config)).items():
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
      _check_types(value)
    else:
      every = typeguard.CollectionCheckStrategy.ALL_ITEMS
      typeguard.check_type(value, hint, collection_check_strategy=every)


def _parse(config_cls: type[Config], flags: Sequence[str], **kwargs: Any) -> Config:
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      return tyro.cli(config_cls, args=flags, config=(tyro.conf.OmitArgPrefixes,), **kwargs)
  except SystemExit as stopped:
    if stopped.code:
      raise InputError(_unboxed(said.getvalue())) from stopped
    raise


def _unboxed(box: str) -> str:
  """What tyro says in its box as a sentence: up to the first rule, and the flag perhaps meant."""
  parts: list[list[str]] = [[]]
  for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:  # the first has a title
    line = line.strip(" │")
    if line and set(line) <= {*"─╰╯-"}:
      parts.append([])
    else:
      parts[-1].append(line)
  wrong, meant, *_ = [*filter(any, parts), [], []]
  said = " ".join(wrong).partition("  Got errors:")[0].strip()
  said = re.sub(r"^Missing from .*?:", "missing:", said).removeprefix("Error parsing ")
  said = re.sub(r"no type matching (.*) could be instantiated from", r"must be \1, not", said).rstrip(".")
  if meant[:1] == ["Perhaps you meant:"]:
    said += f"; perhaps you meant {meant[1]}"
  return f"{said} (--help lists the flags)"


def _tuples(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def num_cores() -> int:
  """Processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
