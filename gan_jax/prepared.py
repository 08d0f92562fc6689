"""Datasets of tensorflow-datasets, read and, for the MNIST family, prepared without TensorFlow.

Prepared datasets are read through tfds's data sources; the decoded arrays are cached next to them.
"""

import contextlib
import gzip
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gan_jax import memory
from gan_jax.dataset import Dataset
from gan_jax.output import shape_text, write_cache
from gan_jax.pictures.reader import check_shape, reason_of
from gan_jax.types import InputError

MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")


def _tfds() -> Any:
  """tfds, imported late because that takes half a second; untyped because its lazy modules are."""
  import tensorflow_datasets

  return tensorflow_datasets


def load(name: str, data_dir: str | None, manual_dir: str | None, stream: memory.Streaming) -> Dataset:
  builder = _builder(name, data_dir)
  if not builder.is_prepared():
    if name not in MNIST_FAMILY:
      raise InputError(
        f"{name} is not prepared in {builder.data_dir}: prepare it once with"
        f" pip install -e '.[tf]' && tfds build {name} --file_format=array_record"
      )
    builder = _prepare(name, data_dir, manual_dir)
  return _read(builder, name, stream)


def is_prepared(name: str, data_dir: str | None) -> bool:
  return _builder(name, data_dir).is_prepared()


def _builder(name: str, data_dir: str | None) -> Any:
  tfds = _tfds()

  try:
    return tfds.builder(name, data_dir=data_dir)
  except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
    raise InputError(
      f"unknown dataset {name!r}: choose from auto, digits, {', '.join(MNIST_FAMILY)}, folder:PATH,"
      " arrays:FILE.npz and the image-classification datasets of tensorflow-datasets, such as cifar10"
    ) from error
  except Exception as error:  # tfds may raise anything for an unknown version or damaged files
    reason = str(error).rpartition('": ')[2].partition("\n")[0].strip(". ")
    raise InputError(
      f"{name} cannot be opened ({reason}): name a version that exists, or delete the prepared data and"
      " prepare it again"
    ) from error


def _reachable(url: str, seconds: float = 5.0) -> bool:
  """Whether the host answers, even with an HTTP error. tfds itself would try for a minute."""
  answered = threading.Event()

  def ask() -> None:
    try:
      with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
        answered.set()
    except urllib.error.HTTPError:
      answered.set()
    except OSError:
      pass

  thread = threading.Thread(target=ask, daemon=True)  # a DNS look-up may hang for longer
  thread.start()
  thread.join(seconds)
  return answered.is_set()


def _mnist_builder_cls(name: str) -> Any:
  """tfds's own builder of an MNIST-like dataset, without the two calls that need TensorFlow.

  The stock builder unzips with TensorFlow and passes arrays to its PNG encoder. This one unzips with
  Python and passes Pillow images, which tfds encodes itself; name, version, features and checksums are
  inherited, so it writes the standard dataset.
  """
  tfds = _tfds()
  from PIL import Image

  stock: Any = tfds.builder_cls(name)

  def unzip(path: Any, header: int) -> np.ndarray:
    with gzip.open(path) as file:
      return np.frombuffer(file.read(), np.uint8, offset=header)

  with tfds.core.registered.skip_registration():

    class Builder(stock):
      pkg_dir_path = stock._get_pkg_dir_path()
      url_infos = stock.url_infos

      def _split_generators(self, dl_manager):
        parts = {"train": "train", "test": "t10k"}
        files = {
          f"{part}/{kind}": f"{self.URL}{prefix}-{kind}-ubyte.gz"
          for part, prefix in parts.items()
          for kind in ("images-idx3", "labels-idx1")
        }
        paths = dl_manager.download(files)
        return {
          part: self._generate_examples(paths[f"{part}/images-idx3"], paths[f"{part}/labels-idx1"])
          for part in parts
        }

      def _generate_examples(self, images, labels):  # pyright: ignore
        shape = self.info.features["image"].shape[:2]
        pixels, classes = unzip(images, 16).reshape(-1, *shape), unzip(labels, 8)
        for i, (image, label) in enumerate(zip(pixels, classes, strict=True)):
          yield i, {"image": Image.fromarray(image), "label": int(label)}

  Builder.name = stock.name
  return Builder


def _prepare(name: str, data_dir: str | None, manual_dir: str | None) -> Any:
  """Prepares the standard tfds version of a dataset of the MNIST family, without TensorFlow."""
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

  tfds = _tfds()

  builder = _mnist_builder_cls(name)(data_dir=data_dir, file_format="array_record")
  ways_out = "pass --manual-dir FOLDER with its four original .gz files, or use --dataset digits"
  if manual_dir is not None:
    for info in builder.url_infos.values():
      if not (Path(manual_dir) / info.filename).is_file():
        raise InputError(f"{Path(manual_dir) / info.filename} is missing: {name} needs it")
  elif not _reachable(builder.URL):
    raise InputError(f"{name} is not prepared and its host cannot be reached: {ways_out}")
  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(manual_dir=manual_dir)
  try:
    builder.download_and_prepare(download_config=config)
  except NonMatchingChecksumError as error:
    urls = [url for url in builder.url_infos if url in str(error)]
    file = builder.url_infos[urls[0]].filename if urls else "a file"
    where = f"{manual_dir}/{file}" if manual_dir else f"the downloaded {file}"
    raise InputError(f"{where} is not the original file of {name}: its checksum is wrong") from error
  except (tfds.core.download.DownloadError, OSError) as error:
    if isinstance(error, OSError) and error.strerror and error.filename:  # of the disk, not the network
      raise InputError(f"{name} cannot be prepared: {error.filename}: {error.strerror}") from error
    raise InputError(f"{name} could not be prepared ({str(error).splitlines()[0]}): {ways_out}") from error
  return builder


def _read(builder: Any, name: str, stream: memory.Streaming) -> Dataset:
  """Reads a prepared dataset; decoded arrays are cached in its folder, so preparing it again drops them.

  For a streamed dataset, these are the labels and the test images.
  """
  features, splits = builder.info.features, builder.info.splits
  test = next((part for part in ("test", "validation") if part in splits), None)
  if "image" not in features or "label" not in features or test is None or "train" not in splits:
    raise InputError(f"{name} is not an image-classification dataset with training and test images")
  try:
    shape, source = (splits["train"].num_examples, *features["image"].shape), {}
    if None in shape and stream == "auto":
      shape = Records(_source(builder, name, "train"), name).shape
    if memory.is_streamed(stream, shape):
      source = {"x_train": Records(_source(builder, name, "train"), name)}
    folder = Path(os.fspath(builder.data_dir))
    cache = folder / ("gan_jax_labels.npz" if source else "gan_jax_arrays.npz")
    with contextlib.suppress(Exception):  # a cache with any fault is rebuilt
      if cache.is_file():
        with np.load(cache) as file:
          return _checked(builder, name, dict(file) | source)
    arrays: dict[str, Any] = (
      {"y_train": _labels(builder, name)} if source else _decode(builder, name, "train")
    )
    arrays |= _decode(builder, name, test, "test")
  except InputError:
    raise
  except Exception as error:  # a damaged file may raise anything
    reason = (str(error) or type(error).__name__).partition("\n")[0]
    raise InputError(
      f"{name} in {builder.data_dir} cannot be read ({reason}): delete that folder and"
      " prepare the dataset again"
    ) from error
  dataset = _checked(builder, name, arrays | source)
  write_cache(cache, arrays)
  return dataset


def _checked(builder: Any, name: str, arrays: dict[str, Any]) -> Dataset:
  """The dataset of these arrays; `InputError` if they do not match the builder or differ in image size."""
  classes = tuple(builder.info.features["label"].names)
  dataset = Dataset(name=name, class_names=classes, **arrays)
  x, x_test = dataset.x_train, dataset.x_test
  if x.shape[1:] != x_test.shape[1:]:
    raise InputError(
      f"{name} must hold images of one size, but its training images are {list(x.shape[1:])} and its test"
      f" images {list(x_test.shape[1:])}"
    )
  if len(x) != builder.info.splits["train"].num_examples or dataset.y_train.min() < 0:
    raise InputError(f"{name} is not an image-classification dataset with a class for every image")
  return dataset


class Records:
  """Images of a tfds data source."""

  def __init__(self, source: Any, name: str):
    self._source, self._name = source, name
    first = self._read([0])[0]
    self.shape = (len(source), *first.shape)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Int[np.ndarray, "b"]) -> UInt8[np.ndarray, "b h w c"]:
    images = self._read(rows)
    for image in images:
      check_shape(image, self.shape[1:], f"an image of {self._name}")
    return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

  def _read(self, rows: Any) -> list[np.ndarray]:
    try:
      return [example["image"] for example in self._source.__getitems__(np.asarray(rows).tolist())]
    except Exception as error:  # the record reader and Pillow may raise anything
      raise InputError(f"a record of {self._name} {reason_of(error)}") from error


def _source(builder: Any, name: str, split: str, **kwargs: Any) -> Any:
  try:
    return builder.as_data_source(split=split, **kwargs)
  except NotImplementedError as error:
    raise InputError(
      f"{name} is prepared in a format that only TensorFlow reads: prepare it again with"
      f" tfds build {name} --file_format=array_record --overwrite"
    ) from error


def _decode(builder: Any, name: str, split: str, part: str = "train") -> dict[str, np.ndarray]:
  images, labels = [], []
  for example in _examples(_source(builder, name, split)):
    images.append(example["image"])
    labels.append(int(example["label"]))
  shapes = {image.shape for image in images}
  if len(shapes) != 1:
    found = ", ".join(map(shape_text, sorted(shapes)[:3])) or "no images"
    raise InputError(f"{name} must hold images of one size, not {found}: resize them first")
  return {f"x_{part}": np.stack(images), f"y_{part}": np.asarray(labels, np.int64)}


def _labels(builder: Any, name: str) -> Int[np.ndarray, "n"]:
  """Labels of the training images, which are not decoded."""
  skip = {"image": _tfds().decode.SkipDecoding()}
  examples = _examples(_source(builder, name, "train", decoders=skip))
  return np.fromiter((example["label"] for example in examples), np.int64)


def _examples(source: Any) -> Iterable[Any]:
  """All examples, a thousand per read: reading one at a time takes as long as decoding them."""
  for start in range(0, len(source), 1000):
    yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))
