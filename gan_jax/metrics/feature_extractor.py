"""Feature extractor for the Frechet distance: a frozen network and its moments over the real images."""

import contextlib
import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from gan_jax import kernels, networks, output
from gan_jax.dataset import Dataset
from gan_jax.metrics import classification, feature_network, frechet
from gan_jax.types import InputError, Params

# The bundled extractor, made by experiments/feature_network.py, which prints both hashes.
MNIST_FINGERPRINT = "d91755e07adcedc4f662134604c85fdf9d6e3536fbd5bdf7f0d9bdb0970a5c2f"
MNIST_SHA256 = "5e89338e7b29846c7dc120e2a27434b1ef1e2719e5e7cde7656277f5e1adf1a2"
MNIST_PATH = Path(__file__).with_name("mnist.npz")


@dataclass(frozen=True)
class FeatureExtractor:
  """A trained feature network, and the moments of its features over the real images."""

  name: str
  """Dataset and first eight digits of the file's SHA-256: distances of two names are not comparable."""
  image_shape: tuple[int, int, int]
  """Height, width, channels of its images."""
  num_classes: int
  params: Params
  """The weights of `feature_network.FeatureNetwork`."""
  test: frechet.Moments
  """Moments over the test images: the reference of every distance."""
  test_accuracy: float
  """Accuracy of its own classes on the test images, in percent."""

  def metric(self, num: int) -> str:
    """Name of the Frechet distance of `num` images on its features."""
    return f"frechet_{self.name}_n{num}"

  def classify(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
    """Logits of images in [0, 1]. Pure, for use inside other functions."""
    return _apply(self.num_classes, self.params, x)[0]

  def predict(
    self, x: UInt8[np.ndarray, "n h w c"]
  ) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n f"]]:
    """Logits and features of images as bytes. The same images give the same bits.

    Raises:
      InputError: the images have another shape.
    """
    if x.shape[1:] != self.image_shape:
      wanted, found = map(output.shape_text, (self.image_shape, x.shape[1:]))
      raise InputError(f"the feature extractor {self.name} takes images of {wanted}, not of {found}")
    return _predict(self.num_classes, self.params, x)


def load_feature_extractor(dataset: Dataset) -> FeatureExtractor:
  """The feature extractor of a dataset: the bundled one for MNIST, else one trained once and cached.

  A dataset is identified by its content, so its name and the order of its images do not matter. Training
  takes minutes, longer for larger images, and is announced. A damaged file in the cache, the folder
  `feature_extractors` in `output.cache_dir()`, is rebuilt, and a folder that cannot be written is no error.

  Raises:
    InputError: the images are too small or too few, or the bundled file is damaged.
  """
  known_as = fingerprint(dataset)
  if known_as == MNIST_FINGERPRINT:
    return read_feature_extractor(MNIST_PATH, MNIST_SHA256)
  folder = output.cache_dir() / "feature_extractors"
  for path in sorted(folder.glob(f"{known_as}-*.npz")):
    with contextlib.suppress(InputError):
      return read_feature_extractor(path, path.stem.removeprefix(f"{known_as}-"))
  output.say(f"training a feature extractor for {dataset.name}, once: it is kept in {folder}")
  content = train_feature_extractor(dataset)
  with contextlib.suppress(OSError):
    output.write_bytes(folder / f"{known_as}-{_sha256(content)}.npz", content)
  extractor = _decode(content)
  output.say(f"it classifies {extractor.test_accuracy:.1f} % of the test images correctly")
  return extractor


def read_feature_extractor(path: Path, sha256: str) -> FeatureExtractor:
  """Reads the file of a feature extractor; `InputError` if it cannot be read or has another SHA-256."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): reinstall gan-jax") from error
  if _sha256(content) != sha256:
    raise InputError(f"{path} is damaged (its SHA-256 is not {sha256[:8]}...): reinstall gan-jax")
  try:
    return _decode(content)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f"{path} is not a feature extractor: reinstall gan-jax") from error


def train_feature_extractor(dataset: Dataset) -> bytes:
  """Trains a feature network, computes its moments over the test images, and returns the file.

  Raises:
    InputError: images below 8x8, or fewer than 256 test images or labelled training images.
  """
  networks.check_image_shape(dataset.image_shape)
  num_labelled = int(np.sum(dataset.y_train >= 0))
  if num_labelled < 2 * feature_network.NUM_FEATURES:
    raise InputError(
      f"a Fréchet distance needs a feature network trained on at least {2 * feature_network.NUM_FEATURES}"
      f" labelled images, but {dataset.name} has {num_labelled}"
    )
  frechet.check_num_images(len(dataset.x_test), feature_network.NUM_FEATURES)
  params = feature_network.train(dataset)
  logits, features = _predict(dataset.num_classes, params, dataset.x_test)
  arrays = {
    "dataset": np.array(dataset.name),
    "image_shape": np.array(dataset.image_shape),
    "num_classes": np.array(dataset.num_classes),
    "test_accuracy": np.array(100 - classification.error_percent(logits, dataset.y_test)),
  }
  for name, value in frechet.moments(features)._asdict().items():
    arrays[f"test/{name}"] = np.asarray(value)
  for name, value in traverse_util.flatten_dict({"params": params}, sep="/").items():
    arrays[name] = np.asarray(value)
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)  # pyright: ignore
  return buffer.getvalue()


def fingerprint(dataset: Dataset) -> str:
  """SHA-256 of the inputs of an extractor: images with their classes, in any order, and the recipe."""
  digest = hashlib.sha256(f"{feature_network.RECIPE} {dataset.num_classes}".encode())
  for x, y in ((np.asarray(dataset.x_train), dataset.y_train), (dataset.x_test, dataset.y_test)):
    digest.update(f" {x.shape} ".encode())
    rows = (image.tobytes() + label.tobytes() for image, label in zip(x, y.astype("<i8"), strict=True))
    digest.update(b"".join(sorted(hashlib.sha256(row).digest() for row in rows)))
  return digest.hexdigest()


def _decode(content: bytes) -> FeatureExtractor:
  with np.load(io.BytesIO(content)) as file:
    arrays = {name: file[name] for name in file}
  tree: dict[str, Any] = traverse_util.unflatten_dict(arrays, sep="/")
  test = tree["test"]
  return FeatureExtractor(
    name=f"{tree['dataset']}-{_sha256(content)[:8]}",
    image_shape=tuple(tree["image_shape"].tolist()),
    num_classes=int(tree["num_classes"]),
    params=tree["params"],
    test=frechet.Moments(test["mean"], test["cov"], int(test["n"])),
    test_accuracy=float(tree["test_accuracy"]),
  )


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _predict(num_classes: int, params: Params, x: UInt8[np.ndarray, "n h w c"]):
  return classification.predict(partial(_apply, num_classes, params), x)


@partial(jax.jit, static_argnums=0)
@kernels.exact  # on all devices the features that the moments are of
def _apply(num_classes: int, params: Params, x: Float[Array, "b h w c"]):
  return feature_network.FeatureNetwork(num_classes).apply({"params": params}, x)
