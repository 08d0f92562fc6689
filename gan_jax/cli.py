"""Groups of flags, each checked by itself, and what they choose.

An experiment composes them and takes none that it does not honour; `parsing` has the configurations.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from gan_jax import data, datasets, parallel, pictures, processes, provenance
from gan_jax.networks import Precision
from gan_jax.recipes import Recipe
from gan_jax.report import console, say
from gan_jax.types import InputError, Json, LabelSplit


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
    if self.dataset.startswith(("folder:", "arrays:")):
      for name in ("data_dir", "manual_dir"):
        if getattr(self, name) is not None:
          raise InputError(
            f"{flag(name)} is for datasets of tfds, and {self.dataset} is your own: leave it out"
          )


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

  checkpoint_every: int | None = None
  """Steps between checkpoints (default: a quarter of the steps, at most 1,000)."""
  on_nonfinite: Literal["stop", "rollback"] = "stop"
  """Where a loss is not finite: stop, or go back to the last checkpoint at half the learning rates, three
  times at most (rollback)."""
  tensorboard: bool = False
  """Write the metrics for TensorBoard as well."""
  devices: int | None = None
  """Devices that share each step (default: as many accelerators as divide its images; 1 on CPU)."""

  def check(self) -> None:
    at_least_one(self, "checkpoint_every", "devices")

  def steps_between_checkpoints(self, num_steps: int) -> int:
    """For a run of so many steps."""
    return self.checkpoint_every or max(1, min(1000, num_steps // 4))


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
    workers=provenance.num_cores() if stream.workers is None else stream.workers,
  )
  if needs_test and not len(dataset.x_test):
    what = "arrays x_test and y_test" if dataset.name.startswith("arrays:") else "a folder test"
    raise InputError(f"{dataset.name} has no test images, and this needs them: add {what}")
  return dataset


def split_labels(dataset: datasets.Dataset, labels: LabelFlags, images: ImageFlags) -> LabelSplit:
  """The labels and images of these flags, see `data.split_labels`."""
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
