"""Datasets as uint8 arrays in host memory; training images that do not fit stay on disk.

`load` reads tensorflow-datasets, the digits bundled with scikit-learn, or the user's own pictures and
arrays, see `pictures`.
TensorFlow itself is never imported: the MNIST family is prepared here without it, and whatever else
is prepared is read through tfds's data sources.
"""

import contextlib
import gzip
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import psutil
from jaxtyping import Int, UInt8

from gan_jax.types import InputError

if TYPE_CHECKING:
  from gan_jax.pictures import Reader, Scaling  # which builds datasets: imported late

MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")
Choice = Literal["auto", "yes", "no"]
HOST_SHARE, DEVICE_SHARE = 0.25, 0.5
"""Of the host's free memory and of the device's memory: the most that `auto` lets training images take."""
_OBJECTS = ("fashion_mnist", "cifar10", "cifar100", "cifar10_1", "stl10", "imagenette", "oxford_flowers102")


@dataclass(frozen=True)
class Dataset:
  """Images and labels in host memory. The test part is for the last evaluation of a run alone."""

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
  workers: int | None = None
  """Threads that read its training images while a run trains, 0: its loop does; None: they are put on the
  device before."""

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
  lazy = not isinstance(dataset.x_train, np.ndarray)
  if lazy or is_streamed(stream, dataset.x_train.shape):
    return replace(dataset, workers=workers)
  return dataset


def is_streamed(choice: Choice, shape: Sequence[int]) -> bool:
  """Whether training images of this shape `[N, H, W, C]` are streamed; says so where `auto` decides it."""
  if choice != "auto":
    return choice == "yes"
  room, where = HOST_SHARE * psutil.virtual_memory().available, f"{HOST_SHARE:.0%} of the free memory"
  on_device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
  if DEVICE_SHARE * on_device < room:
    room, where = DEVICE_SHARE * on_device, f"{DEVICE_SHARE:.0%} of the device's memory"
  needed = math.prod(shape)
  if needed > room:
    from gan_jax.report import say  # late, as it needs data, which needs datasets

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
  if name != "auto":
    return _load_tfds(name, data_dir, manual_dir, stream)
  if manual_dir or _is_prepared("mnist", data_dir):
    return _load_tfds("mnist", data_dir, manual_dir, stream)
  try:
    return _load_tfds("mnist", data_dir, manual_dir, stream)
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
    note=f"{dataset.note} {note}".strip(),
  )


def _resized(dataset: Dataset, side: int, fit: Literal["crop", "pad"]) -> Dataset:
  """Squares of this side, see `pictures.resize`."""
  from PIL import Image

  from gan_jax import pictures, stream

  if dataset.scaling is not None:
    raise InputError("--image-size is for images, and these are vectors: leave it out")
  num = len(dataset.x_test) + (len(dataset.x_train) if isinstance(dataset.x_train, np.ndarray) else 0)
  pictures.check_memory(num, (side, side, dataset.x_train.shape[-1]), "choose a smaller --image-size")

  def resize(x: np.ndarray) -> np.ndarray:
    found = np.empty((len(x), side, side, x.shape[-1]), np.uint8)
    for i, image in enumerate(x):
      for c in range(x.shape[-1]):  # Pillow knows no arrays of one channel
        found[i, ..., c] = pictures.resize(Image.fromarray(image[..., c]), (side, side), fit)
    return found

  held = isinstance(dataset.x_train, np.ndarray)
  return replace(
    dataset,
    name=f"{dataset.name}@{side}",
    x_train=resize(dataset.x_train) if held else stream.Resized(dataset.x_train, side, resize),
    x_test=resize(dataset.x_test),
    reader=dataset.reader and replace(dataset.reader, size=(side, side), fit=fit),
  )


# --- Bundled digits


def _load_digits(note: str = "") -> Dataset:
  """The 1,797 digits of scikit-learn, 8x8; every third image, from the third on, is the test set."""
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  x = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  y = digits.target.astype(np.int64)  # pyright: ignore
  test = np.arange(len(x)) % 3 == 2
  names = tuple(str(k) for k in range(10))
  return Dataset("digits", x[~test], y[~test], x[test], y[test], names, note)


def _stack(examples: Iterable[tuple[np.ndarray, int]], name: str) -> tuple[np.ndarray, np.ndarray]:
  images, labels = [], []
  for image, label in examples:
    images.append(image)
    labels.append(label)
  shapes = {image.shape for image in images}
  if len(shapes) != 1:
    found = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:3]) or "no images"
    raise InputError(f"{name} must hold images of one size, not {found}; resize them first")
  return np.stack(images), np.asarray(labels, np.int64)


# --- tensorflow-datasets


def _tfds() -> Any:
  """Imported late, because it takes half a second; untyped, because its lazy modules are."""
  import tensorflow_datasets

  return tensorflow_datasets


def _load_tfds(name: str, data_dir: str | None, manual_dir: str | None, stream: Choice) -> Dataset:
  builder = _builder(name, data_dir)
  if not builder.is_prepared():
    if name not in MNIST_FAMILY:
      raise InputError(
        f"{name} is not prepared in {builder.data_dir}; prepare it once with"
        f' pip install "gan-jax[tf]" && tfds build {name} --file_format=array_record'
      )
    builder = _prepare(name, data_dir, manual_dir)
  return _read(builder, name, stream)


def _is_prepared(name: str, data_dir: str | None) -> bool:
  return _builder(name, data_dir).is_prepared()


def _builder(name: str, data_dir: str | None) -> Any:
  tfds = _tfds()

  try:
    return tfds.builder(name, data_dir=data_dir)
  except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
    raise InputError(
      f"unknown dataset {name!r}: there are auto, digits, {', '.join(MNIST_FAMILY)}, folder:PATH,"
      " arrays:FILE.npz and the image-classification datasets of tensorflow-datasets, such as cifar10"
    ) from error
  except Exception as error:  # tfds raises whatever it likes for a version or for damaged files
    reason = str(error).rpartition('": ')[2].partition("\n")[0].strip(". ")
    raise InputError(
      f"{name} cannot be opened ({reason}): name a version that there is, or remove what is prepared of it"
      " and prepare it anew"
    ) from error


def _reachable(url: str, seconds: float = 5.0) -> bool:
  """Whether anything answers there; a refusal is an answer. tfds itself would try for a minute."""
  answered = threading.Event()

  def ask() -> None:
    try:
      with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
        answered.set()
    except urllib.error.HTTPError:
      answered.set()
    except OSError:
      pass

  thread = threading.Thread(target=ask, daemon=True)  # a look-up of the name may hang for longer
  thread.start()
  thread.join(seconds)
  return answered.is_set()


def _mnist_builder_cls(name: str) -> Any:
  """tfds's own builder of an MNIST-like dataset, less the two calls that need TensorFlow.

  The stock builder unzips with TensorFlow and hands arrays to its PNG encoder. This one unzips with
  Python and hands over Pillow images, which tfds encodes itself; name, version, features and checksums
  are the parent's, so what it writes is the standard dataset.
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
  """Prepares a dataset of the MNIST family as the standard tfds one, without TensorFlow."""
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
    if isinstance(error, OSError) and error.strerror and error.filename:  # of the disk, not of the network
      raise InputError(f"{name} cannot be prepared: {error.filename}: {error.strerror}") from error
    raise InputError(f"{name} could not be prepared ({str(error).splitlines()[0]}): {ways_out}") from error
  return builder


def _read(builder: Any, name: str, stream: Choice) -> Dataset:
  """Reads a prepared dataset; what was decoded stays beside it and goes when it is prepared anew.

  Of a dataset that is streamed these are the labels and the test images.
  """
  features, splits = builder.info.features, builder.info.splits
  test = next((part for part in ("test", "validation") if part in splits), None)
  if "image" not in features or "label" not in features or test is None or "train" not in splits:
    raise InputError(f"{name} is not an image-classification dataset with training and test images")
  try:
    shape, source = (splits["train"].num_examples, *features["image"].shape), {}
    if None in shape and stream == "auto":
      shape = _records(builder, name).shape
    if is_streamed(stream, shape):
      source = {"x_train": _records(builder, name)}
    folder = Path(os.fspath(builder.data_dir))
    cache = folder / ("gan_jax_labels.npz" if source else "gan_jax_arrays.npz")
    with contextlib.suppress(Exception):  # whatever is wrong with the cache, it is made anew
      if cache.is_file():
        with np.load(cache) as file:
          return _checked(builder, name, dict(file) | source)
    arrays: dict[str, Any] = (
      {"y_train": _labels(builder, name)} if source else _decode(builder, name, "train")
    )
    arrays |= _decode(builder, name, test, "test")
  except InputError:
    raise
  except Exception as error:  # a damaged file may give any
    reason = (str(error) or type(error).__name__).partition("\n")[0]
    raise InputError(
      f"{name} in {builder.data_dir} cannot be read ({reason}): remove that folder and prepare it anew"
    ) from error
  dataset = _checked(builder, name, arrays | source)
  write_quietly(cache, arrays)
  return dataset


def _checked(builder: Any, name: str, arrays: dict[str, Any]) -> Dataset:
  """The dataset of these arrays; `InputError` where they are not what was prepared, or of several sizes."""
  classes = tuple(builder.info.features["label"].names)
  dataset = Dataset(name=name, class_names=classes, **arrays)
  x, x_test = dataset.x_train, dataset.x_test
  if x.shape[1:] != x_test.shape[1:]:
    raise InputError(
      f"{name} must hold images of one size, and those of training are {list(x.shape[1:])}, those of the"
      f" test set {list(x_test.shape[1:])}"
    )
  labels = np.concatenate([dataset.y_train, dataset.y_test])
  whole = len(x.shape) == 4 and len(x) == builder.info.splits["train"].num_examples
  fit = len(labels) == len(x) + len(x_test) and 0 <= labels.min() <= labels.max() < len(classes)
  if not (whole and fit and x.dtype == x_test.dtype == np.uint8):
    raise InputError(f"{name} is not an image-classification dataset of bytes, each with a class")
  return dataset


def _records(builder: Any, name: str) -> Any:
  from gan_jax.stream import Records

  return Records(_source(builder, name, "train"), name)


def _source(builder: Any, name: str, split: str, **kwargs: Any) -> Any:
  try:
    return builder.as_data_source(split=split, **kwargs)
  except NotImplementedError as error:
    raise InputError(
      f"{name} is prepared in a format that only TensorFlow reads; prepare it once more with"
      f" tfds build {name} --file_format=array_record --overwrite"
    ) from error


def _decode(builder: Any, name: str, split: str, part: str = "train") -> dict[str, np.ndarray]:
  examples = _examples(_source(builder, name, split))
  x, y = _stack(((example["image"], int(example["label"])) for example in examples), name)
  return {f"x_{part}": x, f"y_{part}": y}


def _labels(builder: Any, name: str) -> Int[np.ndarray, "n"]:
  """Those of the training images, which are not decoded."""
  skip = {"image": _tfds().decode.SkipDecoding()}
  examples = _examples(_source(builder, name, "train", decoders=skip))
  return np.fromiter((example["label"] for example in examples), np.int64)


def _examples(source: Any) -> Iterable[Any]:
  """All examples, a thousand a read: one at a time takes as long as decoding them."""
  for start in range(0, len(source), 1000):
    yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))


def write_quietly(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes a cache beside and renames it; a folder that cannot be written is no cache, no error."""
  beside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with open(beside, "wb") as file:
      np.savez(file, **arrays)  # pyright: ignore
    beside.replace(path)
  except OSError:
    beside.unlink(missing_ok=True)
