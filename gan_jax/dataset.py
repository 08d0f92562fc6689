"""The `Dataset` type: images as bytes, labels and names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, UInt8

from gan_jax.types import ImageSource, InputError

if TYPE_CHECKING:
  from gan_jax.pictures import Reader, Scaling  # which imports this module

_OBJECTS = ("fashion_mnist", "cifar10", "cifar100", "cifar10_1", "stl10", "imagenette", "oxford_flowers102")


@dataclass(frozen=True)
class Dataset:
  """Images and labels on the host. The test set is only for the final evaluation of a run.

  Raises:
    InputError: images are not bytes `[N, H, W, C]`, their number differs from that of the labels, or labels
      are out of range.
  """

  name: str
  x_train: ImageSource
  """Bytes `[N, H, W, C]`: an array, or a source that reads them on access."""
  y_train: Int[np.ndarray, "n"]
  """Classes, 0 .. K-1; -1 for an unlabelled image."""
  x_test: UInt8[np.ndarray, "m h w c"]
  """Empty if there is no test set."""
  y_test: Int[np.ndarray, "m"]
  class_names: tuple[str, ...]
  note: str = ""
  """What the user must know about how the data was chosen; may be empty."""
  own: bool = False
  """Whether this is user data, for which all labels are used unless a label budget is given."""
  reader: "Reader | None" = None
  """How its pictures were read, so that new ones are read the same way."""
  scaling: "Scaling | None" = None
  """How its vectors were scaled to bytes."""
  names_train: Sequence[str] = ()
  """Names of the training images, such as file names; empty if they have none."""
  names_test: Sequence[str] = ()
  """Names of the test images."""
  workers: int | None = None
  """Threads that read its training images during training, 0 for the training loop itself; None if the
  images are put on the device beforehand."""

  def __post_init__(self) -> None:
    for part, x, y, lowest in (
      ("training", self.x_train, self.y_train, -1),
      ("test", self.x_test, self.y_test, 0),
    ):
      if isinstance(x, np.ndarray) and (x.dtype != np.uint8 or x.ndim != 4):
        shape = ", ".join(map(str, x.shape))
        raise InputError(f"{part} images must be bytes (uint8) [N, H, W, C], not {x.dtype} [{shape}]")
      if len(x) != len(y):
        raise InputError(
          f"there are {len(x):,} {part} images but {len(y):,} labels: pass one label per image"
        )
      if (
        isinstance(y, np.ndarray)
        and len(y)
        and not lowest <= np.min(y) <= np.max(y) < len(self.class_names)
      ):
        raise InputError(
          f"{part} labels must range from {lowest} to {len(self.class_names) - 1} for"
          f" {len(self.class_names)} class names, not from {np.min(y)} to {np.max(y)}"
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
    """Whether its images are vectors, `[1, F, 1]`, which cannot be shown as images."""
    return self.scaling is not None

  @property
  def of_objects(self) -> bool:
    """Whether its images show upright objects: a flip keeps the class, a rotation is noticeable."""
    return re.split("[:/@]", self.name)[0] in _OBJECTS  # without version and image size
