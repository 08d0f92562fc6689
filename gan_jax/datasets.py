"""Datasets as uint8 arrays in host memory; training images that do not fit stay on disk.

`load` reads tensorflow-datasets, see `prepared`, the digits bundled with scikit-learn, or the user's own
pictures and arrays, see `pictures`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import psutil
from jaxtyping import Int, UInt8

from gan_jax.report import say
from gan_jax.types import InputError

if TYPE_CHECKING:
  from gan_jax.pictures import Reader, Scaling  # which builds datasets: imported late

Choice = Literal["auto", "yes", "no"]
HOST_SHARE, DEVICE_SHARE = 0.25, 0.5
"""Of the host's free memory and of the device's memory: the most that `auto` lets training images take."""
_OBJECTS = ("fashion_mnist", "cifar10", "cifar100", "cifar10_1", "stl10", "imagenette", "oxford_flowers102")


@dataclass(frozen=True)
class Dataset:
  """Images and labels in host memory. The test part is for the last evaluation of a run alone.

  Raises:
    InputError: images that are not bytes `[N, H, W, C]`, other than one label an image, or labels that are
      no classes.
  """

  name: str
  x_train: UInt8[np.ndarray, "n h w c"]
  """Or a source, see `stream`, which reads those that it is asked for."""
  y_train: Int[np.ndarray, "n"]
  """Classes, 0 .. K-1; -1: an image without a label."""
  x_test: UInt8[np.ndarray, "m h w c"]
  """Empty where there is no test set."""
  y_test: Int[np.ndarray, "m"]
  class_names: tuple[str, ...]
  note: str = ""
  """What the user must know about how the data was chosen; empty where there is nothing."""
  own: bool = False
  """The user's own data, of which all given labels are used unless a budget is named."""
  reader: "Reader | None" = None
  """How its pictures were read, so that new ones are read alike."""
  scaling: "Scaling | None" = None
  """How its vectors became bytes."""
  names_train: Sequence[str] = ()
  """Of the training images, such as their files; empty where they have none."""
  names_test: Sequence[str] = ()
  """Of the test images."""
  workers: int | None = None
  """Threads that read its training images while a run trains, 0: its loop does; None: they are put on the
  device before."""

  def __post_init__(self) -> None:
    for part, x, y, lowest in (
      ("training", self.x_train, self.y_train, -1),
      ("test", self.x_test, self.y_test, 0),
    ):
      if isinstance(x, np.ndarray) and (x.dtype != np.uint8 or x.ndim != 4):
        shape = ", ".join(map(str, x.shape))
        raise InputError(f"{part} images must be bytes (uint8) [N, H, W, C], not {x.dtype} [{shape}]")
      if len(x) != len(y):
        raise InputError(f"there are {len(x):,} {part} images and {len(y):,} labels of them")
      if (
        isinstance(y, np.ndarray)
        and len(y)
        and not lowest <= np.min(y) <= np.max(y) < len(self.class_names)
      ):
        raise InputError(
          f"{part} labels must be {lowest} to {len(self.class_names) - 1}, as there are"
          f" {len(self.class_names)} class names, and they are {np.min(y)} to {np.max(y)}"
        )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.x_train.shape[1:]  # pyright: ignore[reportReturnType]

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def of_vectors(self) -> bool:
    """Whether its images are vectors, `[1, F, 1]`: there is nothing to look at."""
    return self.scaling is not None

  @property
  def of_objects(self) -> bool:
    """Whether its images show things that stand upright: a mirror keeps the class, a turn shows."""
    return self.name.partition("@")[0] in _OBJECTS


def load(
  name: str,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  image_size: int | None = None,
  fit: Literal["crop", "pad"] = "crop",
  stream: Choice = "no",
  workers: int = 2,
) -> Dataset:
  """Loads a dataset, preparing it first where that can be done.

  Args:
    name: `digits`, a dataset of tfds such as `mnist`, `folder:PATH` (see `pictures.load_folder`),
      `arrays:FILE.npz` (see `pictures.load_arrays`), or `auto`: MNIST where it is prepared or can be had,
      else `digits`.
    data_dir: where tfds keeps its datasets; by default tfds's own choice, `TFDS_DATA_DIR` included.
    manual_dir: a folder with the original files of the dataset, in place of the network.
    image_size: resizes all images to squares of this side; the name then ends in `@` and the side.
    fit: how the aspect is kept then: `crop` takes the centred square, `pad` the whole image, and repeats
      its edges.
    stream: whether training images are read while a run trains, see `is_streamed`.
    workers: threads that read them then.

  Raises:
    InputError: unknown name, nothing prepared and no way to get it, corrupt files.
  """
  if name.startswith("folder:"):
    from gan_jax import pictures

    dataset = pictures.load_folder(
      name.removeprefix("folder:"), image_size=image_size, fit=fit, stream=stream
    )
  else:
    dataset = _load(name, data_dir, manual_dir, stream)
    dataset = dataset if image_size is None else _resized(dataset, image_size, fit)
  x = dataset.x_train
  if not isinstance(x, np.ndarray) or is_streamed(stream, x.shape, held=x.nbytes):
    return replace(dataset, workers=workers)
  return dataset


def is_streamed(choice: Choice, shape: Sequence[int], *, held: int = 0) -> bool:
  """Whether training images of this shape `[N, H, W, C]` are streamed; says so where `auto` decides it.

  Of the memory that is free now and the bytes `held` by the images themselves.
  """
  if choice != "auto":
    return choice == "yes"
  room, where = (
    HOST_SHARE * (psutil.virtual_memory().available + held),
    f"{HOST_SHARE:.0%} of the free memory",
  )
  on_device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
  if DEVICE_SHARE * on_device < room:
    room, where = DEVICE_SHARE * on_device, f"{DEVICE_SHARE:.0%} of the device's memory"
  needed = math.prod(shape)
  if needed > room:
    say(
      f"{shape[0]:,} training images take {needed / 1e9:.1f} GB, more than {where}, {room / 1e9:.1f} GB:"
      " they are read while training (--stream no would hold them in memory)"
    )
  return needed > room


def _load(name: str, data_dir: str | None, manual_dir: str | None, stream: Choice) -> Dataset:
  if manual_dir is not None and not Path(manual_dir).is_dir():
    raise InputError(f"--manual-dir {manual_dir} is not a folder")
  if name == "digits":
    return _load_digits()
  if name.startswith("arrays:"):
    from gan_jax import pictures

    return pictures.load_arrays(name.removeprefix("arrays:"))
  from gan_jax import prepared  # which builds datasets, as `pictures` does

  if name != "auto":
    return prepared.load(name, data_dir, manual_dir, stream)
  if manual_dir or prepared.is_prepared("mnist", data_dir):
    return prepared.load("mnist", data_dir, manual_dir, stream)
  try:
    return prepared.load("mnist", data_dir, manual_dir, stream)
  except InputError:
    return _load_digits(
      note="MNIST is not prepared here and cannot be had, so this run uses the bundled digits;"
      " name a dataset with --dataset to rule that out"
    )


def for_tuning(dataset: Dataset, seed: int) -> Dataset:
  """Labelled training images in the place of the test set, which is then out of reach: a third of them, at
  most 10,000."""
  labelled = np.flatnonzero(dataset.y_train >= 0)
  num = min(10_000, len(labelled) // 3)
  held_out = np.sort(labelled[np.random.default_rng(seed).permutation(len(labelled))[:num]])
  kept = np.setdiff1d(np.arange(len(dataset.x_train)), held_out)
  note = f"tuning: errors are those on {num} training images held out, not on the test set"
  return replace(
    dataset,
    x_train=dataset.x_train[kept],
    y_train=dataset.y_train[kept],
    x_test=dataset.x_train[held_out],
    y_test=dataset.y_train[held_out],
    names_train=[dataset.names_train[i] for i in kept] if dataset.names_train else (),
    names_test=[dataset.names_train[i] for i in held_out] if dataset.names_train else (),
    note=f"{dataset.note} {note}".strip(),
  )


def _resized(dataset: Dataset, side: int, fit: Literal["crop", "pad"]) -> Dataset:
  """Squares of this side, see `pictures.resize_all`."""
  from gan_jax import pictures, stream

  if dataset.scaling is not None:
    raise InputError("--image-size is for images, and these are vectors: leave it out")
  num = len(dataset.x_test) + (len(dataset.x_train) if isinstance(dataset.x_train, np.ndarray) else 0)
  pictures.check_memory(num, (side, side, dataset.x_train.shape[-1]), "choose a smaller --image-size")

  resize = partial(pictures.resize_all, size=(side, side), fit=fit)
  held = isinstance(dataset.x_train, np.ndarray)
  return replace(
    dataset,
    name=f"{dataset.name}@{side}",
    x_train=resize(dataset.x_train) if held else stream.Resized(dataset.x_train, side, resize),
    x_test=resize(dataset.x_test),
    reader=dataset.reader and replace(dataset.reader, size=(side, side), fit=fit),
  )


def _load_digits(note: str = "") -> Dataset:
  """The 1,797 digits of scikit-learn, 8x8; every third image, from the third on, is the test set."""
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  x = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  y = digits.target.astype(np.int64)  # pyright: ignore
  test = np.arange(len(x)) % 3 == 2
  names = tuple(str(k) for k in range(10))
  return Dataset("digits", x[~test], y[~test], x[test], y[test], names, note)
