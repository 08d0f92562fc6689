"""Loads datasets by name.

Sources are tensorflow-datasets, see `prepared`; the digits bundled with scikit-learn; user pictures and
arrays, see `pictures`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gan_jax import memory, pictures, prepared
from gan_jax.dataset import Dataset
from gan_jax.types import ImageSource, InputError

__all__ = ["Dataset", "for_tuning", "load"]


def load(
  name: str,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  image_size: int | None = None,
  fit: pictures.Resizing = "crop",
  stream: memory.Streaming = "no",
  workers: int = 2,
) -> Dataset:
  """Loads a dataset, preparing it first if possible.

  Args:
    name: `digits`, a dataset of tfds such as `mnist`, `folder:PATH` (see `pictures.load_folder`),
      `arrays:FILE.npz` (see `pictures.load_arrays`), or `auto`: MNIST if it is prepared or can be, else
      `digits`.
    data_dir: where tfds keeps its datasets; defaults to tfds's own choice, which includes `TFDS_DATA_DIR`.
    manual_dir: a folder with the original files of the dataset, used instead of downloading them.
    image_size: resizes all images to squares of this side and appends `@` and the side to the name.
    fit: how resizing keeps the aspect ratio: `crop` takes the centred square, `pad` takes the whole image
      and repeats its edges.
    stream: whether training images are read during training, see `memory.is_streamed`.
    workers: threads that read streamed images.

  Raises:
    InputError: unknown name, a dataset that is not prepared and cannot be, or corrupt files.
  """
  if name.startswith("folder:"):
    dataset = pictures.load_folder(
      name.removeprefix("folder:"), image_size=image_size, fit=fit, stream=stream
    )
  else:
    dataset = _load(name, data_dir, manual_dir, stream)
    dataset = dataset if image_size is None else _resized(dataset, image_size, fit)
  x = dataset.x_train
  if not isinstance(x, np.ndarray) or memory.is_streamed(stream, x.shape, held=x.nbytes):
    return replace(dataset, workers=workers)
  return dataset


def _load(name: str, data_dir: str | None, manual_dir: str | None, stream: memory.Streaming) -> Dataset:
  if name == "digits":
    return _load_digits()
  if name.startswith("arrays:"):
    return pictures.load_arrays(name.removeprefix("arrays:"))
  named = "mnist" if name == "auto" else name
  if manual_dir is not None and not Path(manual_dir).is_dir() and not prepared.is_prepared(named, data_dir):
    raise InputError(f"--manual-dir {manual_dir} is not a folder")
  try:
    return prepared.load(named, data_dir, manual_dir, stream)
  except InputError:
    if name != "auto" or manual_dir or prepared.is_prepared("mnist", data_dir):
      raise
    return _load_digits(
      note="MNIST is not prepared here and cannot be obtained, so this run uses the bundled digits;"
      " name a dataset with --dataset to avoid this"
    )


def for_tuning(dataset: Dataset, seed: int) -> Dataset:
  """Replaces the test set by held-out labelled training images: a third of them, at most 10,000.

  The result gives no access to the real test set.
  """
  labelled = np.flatnonzero(dataset.y_train >= 0)
  num = min(10_000, len(labelled) // 3)
  held_out = np.sort(labelled[np.random.default_rng(seed).permutation(len(labelled))[:num]])
  kept = np.setdiff1d(np.arange(len(dataset.x_train)), held_out)
  note = f"tuning: errors are those on {num} held-out training images, not on the test set"
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


def _resized(dataset: Dataset, side: int, fit: pictures.Resizing) -> Dataset:
  """The dataset resized to squares of this side, see `pictures.resize_all`."""
  if dataset.scaling is not None:
    raise InputError("--image-size is for images, but these are vectors: leave it out")
  num = len(dataset.x_test) + (len(dataset.x_train) if isinstance(dataset.x_train, np.ndarray) else 0)
  memory.check(num, (side, side, dataset.x_train.shape[-1]), "choose a smaller --image-size")

  resize = partial(pictures.resize_all, size=(side, side), fit=fit)
  x = dataset.x_train
  return replace(
    dataset,
    name=f"{dataset.name}@{side}",
    x_train=resize(x) if isinstance(x, np.ndarray) else Resized(x, side, resize),
    x_test=resize(dataset.x_test),
    reader=replace(dataset.reader or _reader(x), size=(side, side), fit=fit),
  )


def _reader(x: ImageSource) -> pictures.Reader:
  return pictures.Reader(channels=x.shape[-1], size=None)  # pyright: ignore[reportArgumentType]


class Resized:
  """An image source that is resized on access."""

  def __init__(self, source: ImageSource, side: int, resize: Callable[[np.ndarray], np.ndarray]):
    self._source, self._resize = source, resize
    self.shape = (len(source), side, side, source.shape[-1])

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Int[np.ndarray, "b"]) -> UInt8[np.ndarray, "b h w c"]:
    return self._resize(self._source[rows])


def _load_digits(note: str = "") -> Dataset:
  """The 1,797 digits of scikit-learn, 8x8; the test set is every third image, starting with the third."""
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  x = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  y = digits.target.astype(np.int64)  # pyright: ignore
  test = np.arange(len(x)) % 3 == 2
  names = tuple(str(k) for k in range(10))
  return Dataset("digits", x[~test], y[~test], x[test], y[test], names, note)
