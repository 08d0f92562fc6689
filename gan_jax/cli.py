"""Groups of flags, each with its own checks, and what they select.

An experiment composes only the groups that it honours; `parsing` handles whole configurations.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gan_jax import data, datasets, memory, parallel, pictures, processes, provenance
from gan_jax.networks import Precision
from gan_jax.output import console, say
from gan_jax.recipes import Recipe
from gan_jax.types import InputError, Json, LabelSplit


@dataclass(frozen=True)
class DataFlags:
  """The dataset."""

  dataset: str = "auto"
  """auto, digits, mnist, fashion_mnist, kmnist, a prepared tfds dataset, or your own data: folder:PATH or
  arrays:FILE.npz. auto is MNIST if it is prepared or can be obtained, else the bundled digits; a dataset
  named explicitly never falls back."""
  data_dir: str | None = None
  """Where tfds keeps its datasets (None: where tfds does by default, or TFDS_DATA_DIR)."""
  manual_dir: str | None = None
  """A folder with the dataset's original files, used instead of downloading them."""
  image_size: int | None = None
  """Resize all images to squares of this side."""
  fit: pictures.Resizing = "crop"
  """How --image-size keeps the aspect ratio: crop to the centred square, or pad the picture by repeating
  its edges."""

  def check(self) -> None:
    at_least_one(self, "image_size")
    if self.fit != "crop" and self.image_size is None:
      raise InputError(f"--fit {self.fit} needs --image-size, the side to resize to")
    if is_own(self.dataset):
      for name in ("data_dir", "manual_dir"):
        if getattr(self, name) is not None:
          raise InputError(
            f"{flag(name)} is for tfds datasets, but {self.dataset} is your own data: leave it out"
          )


def is_own(dataset: str) -> bool:
  """Whether the value of --dataset or of another flag names the user's own data."""
  return dataset.startswith(("folder:", "arrays:"))


@dataclass(frozen=True)
class StreamFlags:
  """Streaming of training images that do not fit in memory."""

  stream: memory.Streaming = "auto"
  """Stream training images during training, or hold them on the device. auto streams images that, decoded,
  take more than a quarter of the free memory or half of the device's, and says so."""
  workers: int | None = None
  """Threads that read and decode streamed images; 0: the training loop does (None: number of cores)."""

  def check(self) -> None:
    not_negative(self, "workers")
    if self.workers is not None and self.stream == "no":
      raise InputError(
        "--workers is for streamed images, but --stream no streams none: leave one of them out"
      )


@dataclass(frozen=True)
class ImageFlags:
  """The training images to use."""

  num_images: int | None = None
  """Train on only this many images (None: all that are not held out)."""
  hold_out: int | None = 0
  """Training images held out for diagnostics, never trained on (None: a twentieth, at most 1,000)."""

  def check(self) -> None:
    at_least_one(self, "num_images")
    not_negative(self, "hold_out")


@dataclass(frozen=True)
class LabelFlags:
  """The labels to use."""

  labels_per_class: int | Literal["all"] | None = None
  """The label budget: labelled images per class, or all (None: 10; for your own data, all)."""
  split_seed: int = 0
  """Seed of the label split, which selects the labelled images."""
  exclude_labelled: bool = False
  """Exclude the labelled images from the unlabelled ones."""

  def check(self) -> None:
    if self.labels_per_class != "all":
      at_least_one(self, "labels_per_class")
    not_negative(self, "split_seed")

  def per_class(self, dataset: datasets.Dataset) -> int | None:
    """Labels per class for this dataset; None for all labels."""
    if self.labels_per_class is None:
      return None if dataset.own else 10
    return None if self.labels_per_class == "all" else self.labels_per_class


@dataclass(frozen=True)
class TrainFlags:
  """Training."""

  steps: int | None = None
  """Training steps; each updates D, then G (None: the recipe's)."""
  batch_size: int | None = None
  """Unlabelled images per step; in generator experiments, all real images (None: the recipe's)."""
  seed: int = 0
  """Seed of all randomness except the label split."""
  precision: Precision | None = None
  """Precision of matrix products and convolutions; all else is float32 (None: the recipe's, float32)."""

  def check(self) -> None:
    at_least_one(self, "steps", "batch_size")
    not_negative(self, "seed")


@dataclass(frozen=True)
class ObjectiveFlags:
  """The objective and optimizer of D."""

  adversarial: float | None = None
  """Weight of D's adversarial loss; 0 trains without a generator (None: the recipe's)."""
  consistency: float | None = None
  """Weight of consistency; 0, with --class-balance 0 0, gives the pure GAN (None: the recipe's)."""
  class_balance: tuple[float, float] | None = None
  """Weight of class balance at the first and at the last step. It pulls the mean prediction towards the
  class frequencies of the labels, in label_study towards equal ones (None: the recipe's)."""
  learning_rate: float | None = None
  """Peak learning rate of D (None: the recipe's)."""

  def check(self) -> None:
    not_negative(self, "adversarial", "consistency", "class_balance", "learning_rate")

  @property
  def hparams(self) -> Json:
    """The values under the names of hyper-parameters; None: the recipe's."""
    named = {"learning_rate": "d_learning_rate"}
    return {named.get(name, name): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class LoopFlags:
  """The training loop: checkpoints, logs, devices."""

  checkpoint_every: int | None = None
  """Steps between checkpoints (None: a quarter of the steps, at most 1,000)."""
  on_nonfinite: Literal["stop", "rollback"] = "stop"
  """If a loss is not finite: stop, or return to the last checkpoint with halved learning rates, at most
  three times (rollback)."""
  tensorboard: bool = False
  """Also write the metrics for TensorBoard."""
  devices: int | None = None
  """Devices that share each step (None: 1, or with several processes the most that divide its batch)."""

  def check(self) -> None:
    at_least_one(self, "checkpoint_every", "devices")
    if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
      raise InputError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'")

  def steps_between_checkpoints(self, num_steps: int) -> int:
    """The checkpoint interval for a run of `num_steps` steps."""
    return self.checkpoint_every or max(1, min(1000, num_steps // 4))


@dataclass(frozen=True)
class ProcessFlags:
  """Multi-process training, on one machine or many: the commands differ only in --process-id."""

  coordinator: str | None = None
  """HOST:PORT at which the first process listens for the others, or auto to take it from Slurm, Open MPI,
  Kubernetes or Cloud TPU."""
  num_processes: int | None = None
  """Number of processes (None: as reported by the cluster)."""
  process_id: int | None = None
  """Index of this process, from 0 (None: as reported by the cluster). Only process 0 writes."""

  def check(self) -> None:
    at_least_one(self, "num_processes")
    not_negative(self, "process_id")
    if self.coordinator is None:
      if self.num_processes is not None or self.process_id is not None:
        raise InputError("--num-processes and --process-id need --coordinator HOST:PORT")
      return
    i, num = self.process_id, self.num_processes
    if i is not None and num is not None and i >= num:
      raise InputError(
        f"--process-id {i} must be less than --num-processes {num}: processes are numbered from 0"
      )

  def start(self) -> None:
    """Joins the other processes, if there are any; from then on, only the first prints."""
    if self.coordinator is not None:
      processes.initialize(self.coordinator, self.num_processes, self.process_id)
      say(f"process {jax.process_index()} of {jax.process_count()}, {len(jax.devices())} devices in all")
      console.quiet = not processes.writes()


@dataclass(frozen=True)
class TransferFlags:
  """Initial networks from another run."""

  init_from: str | None = None
  """Initialise with the averaged networks of the run in this folder. With other classes, or in another
  order, D gets a new head."""
  init_parts: Literal["both", "g", "d"] = "both"
  """Which networks to take from --init-from: both, the generator, or the discriminator."""
  freeze_d: int = 0
  """Freeze this many of the discriminator's first layers at their --init-from values (FreezeD)."""

  def check(self) -> None:
    not_negative(self, "freeze_d")
    if self.init_from is None and self.init_parts != "both":
      raise InputError("--init-parts needs --init-from, the run to start from")
    if self.freeze_d and (self.init_from is None or self.init_parts == "g"):
      raise InputError(
        "--freeze-d needs a discriminator from --init-from, or it would freeze random layers"
      )

  @property
  def parts(self) -> tuple[str, ...]:
    """The networks to take from the other run."""
    return {"both": ("g", "d"), "g": ("g",), "d": ("d",)}[self.init_parts]


@dataclass(frozen=True)
class RunFlags:
  """The run's directory."""

  workdir: str | None = None
  """Directory of the run (None: runs/<experiment>/<time>)."""
  resume: bool = False
  """Resume the run in --workdir from its last checkpoint, bit for bit."""
  overwrite: bool = False
  """Replace the run in --workdir."""

  def check(self) -> None:
    if self.resume and self.workdir is None:
      raise InputError("--resume needs --workdir, the run to continue")
    if self.resume and self.overwrite:
      raise InputError("--resume continues a run and --overwrite replaces it: choose one")


def at_least_one(flags: Any, *names: str) -> None:
  """Raises `InputError` for the first of these flags that is below 1; None is allowed."""
  for name in names:
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise InputError(f"{flag(name)} must be at least 1, not {value}")


def not_negative(flags: Any, *names: str) -> None:
  """Raises `InputError` for the first of these flags that is negative; None is allowed."""
  for name in names:
    value = getattr(flags, name)
    if value is not None and any(v < 0 for v in (value if isinstance(value, tuple) else (value,))):
      raise InputError(f"{flag(name)} must not be negative, but it is {value}")


def flag(name: str) -> str:
  """A field's name as typed on the command line."""
  return f"--{name.replace('_', '-')}"


def given(**values: Any) -> Json:
  """The values that are not None, which replace those of a recipe."""
  return {name: value for name, value in values.items() if value is not None}


def load(
  flags: DataFlags, stream: StreamFlags | None = None, *, needs_test: bool = True
) -> datasets.Dataset:
  """Loads the dataset of these flags, see `datasets.load`; `InputError` if it lacks required test images.

  Without `stream`, training images are held in memory.
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
    workers=provenance.num_cores() if stream.workers is None else stream.workers,
  )
  if needs_test and not len(dataset.x_test):
    what = "the arrays x_test and y_test" if dataset.name.startswith("arrays:") else "a folder named test"
    raise InputError(f"{dataset.name} has no test images, which are needed here: add {what}")
  return dataset


def split_labels(dataset: datasets.Dataset, labels: LabelFlags, images: ImageFlags) -> LabelSplit:
  """The label split of these flags, see `data.split_labels`."""
  num_train, num_held_out = len(dataset.x_train), images.hold_out
  split = data.split_labels(
    dataset.y_train,
    labels.per_class(dataset),
    labels.split_seed,
    class_names=dataset.class_names,
    num_images=images.num_images,
    num_held_out=min(1000, num_train // 20) if num_held_out is None else num_held_out,
  )
  if labels.exclude_labelled and len(split.indices) == len(split.images):
    raise InputError(
      f"--exclude-labelled leaves no images, as all {len(split.images):,} have labels: leave it out"
    )
  return split


def devices(num: int | None, recipe: Recipe) -> list[Any]:
  """The devices of --devices for `train.fit`; empty if a single device is used.

  Raises:
    InputError: there are too few devices, or the batch cannot be split over them or exceeds all memory.
  """
  there, num_processes = jax.devices(), jax.process_count()
  if num is None:
    num = 1 if num_processes == 1 else parallel.most_devices(recipe.batch, len(there), num_processes)
  if num > len(there):
    raise InputError(
      f"--devices {num} is more than the {len(there)} available: to split a CPU into {num}, set"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={num}"
    )
  if num % num_processes:
    raise InputError(
      f"{num} devices cannot be shared evenly by {num_processes} processes: choose --devices and"
      f" --batch-size as multiples of {num_processes}"
    )
  taken = [[d for d in there if d.process_index == i][: num // num_processes] for i in range(num_processes)]
  shared = [device for those in taken for device in those]
  if num > 1:
    parallel.over_devices(recipe, shared)  # reports a batch that cannot be split before training
    say(f"{num} of {len(there)} devices share each step")
  # Activations and gradients take more than 64 bytes per value; how much more depends on the networks.
  hint = "choose a smaller --image-size or --batch-size"
  here, room = sum(recipe.batch) // num_processes, memory.of_devices(taken[jax.process_index()])
  memory.check(here, recipe.image_shape, hint, num_bytes=64, room=room)
  return shared if num > 1 else []
