"""What every dataset is: images as bytes, labels, names; and whether its images are held or streamed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
import psutil
from jaxtyping import Int, UInt8

from gan_jax.report import say
from gan_jax.types import ImageSource, InputError

if TYPE_CHECKING:
  from gan_jax.pictures import Reader, Scaling  # which make datasets

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
  x_train: ImageSource
  """Bytes `[N, H, W, C]`, an array or, where they are read when they are asked for, another source."""
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
