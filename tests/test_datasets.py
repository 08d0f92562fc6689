import dataclasses
import gzip
import hashlib
import http.server
import os
import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import make_builder

from gan_jax import classify, datasets, metrics, prepared
from gan_jax.types import InputError


def test_digits():
  digits = datasets.load("digits")
  assert digits.x_train.shape == (1198, 8, 8, 1)
  assert digits.x_test.shape == (599, 8, 8, 1)
  assert digits.x_train.max() == 255
  assert (digits.num_classes, digits.image_shape) == (10, (8, 8, 1))


def test_tuning_never_has_the_test_set():
  dataset = datasets.load("digits")
  found = datasets.for_tuning(dataset, seed=0)
  images = lambda x: {image.tobytes() for image in x}
  assert len(found.x_test) == len(dataset.x_train) // 3
  assert len(found.x_train) + len(found.x_test) == len(dataset.x_train)
  assert images(found.x_train) | images(found.x_test) == images(dataset.x_train)
  assert "not on the test set" in found.note


def test_tuning_holds_out_labelled_images_alone():
  dataset = datasets.load("digits")
  y = np.where(np.arange(1198) % 4, -1, dataset.y_train)
  found = datasets.for_tuning(dataclasses.replace(dataset, y_train=y), seed=0)
  assert len(found.x_test) == 300 // 3
  assert (found.y_test >= 0).all()
  assert ((found.y_train >= 0).sum(), (found.y_train < 0).sum()) == (200, 898)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_resizing_keeps_the_aspect_of_any_dataset(fit):
  x = np.zeros((2, 10, 20, 2), np.uint8)
  x[:, 3:7, 8:12] = 200  # a square stays a square
  dataset = datasets.Dataset("wide", x, np.arange(2), x[:0], np.arange(0), ("a", "b"))
  found = datasets._resized(dataset, 20, fit)
  assert (found.name, found.x_test.shape) == ("wide@20", (0, 20, 20, 2))
  assert found.reader is not None  # a run's predictions read pictures in the same way
  assert (found.reader.fit, found.reader.size) == (fit, (20, 20))
  rows, columns = (found.x_train[0, ..., 1] > 100).any(axis=1), (found.x_train[0, ..., 1] > 100).any(axis=0)
  assert rows.sum() == columns.sum() == {"crop": 8, "pad": 4}[fit]


# --- tfds


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(prepared, "_reachable", lambda url: False)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"x_train": np.zeros((4, 8, 8, 1), np.float32)},
      r"must be bytes \(uint8\) .*, not float32 \[4, 8, 8, 1\]",
    ),
    ({"x_train": np.zeros((4, 8, 8), np.uint8)}, r"not uint8 \[4, 8, 8\]"),
    ({"y_train": np.zeros(3, int)}, "4 training images but 3 labels"),
    (
      {"y_train": np.array([0, 1, 2, -1])},
      "training labels must range from -1 to 1 for 2 class names, not from -1 to 2",
    ),
    ({"y_test": np.array([0, -1])}, "test labels must range from 0 to 1"),
  ],
)
def test_arrays_that_are_no_dataset(changes, words):
  """Floats in [0, 1] would be divided by 255 again, and trained on as black images."""
  x = np.zeros((4, 8, 8, 1), np.uint8)
  made = datasets.Dataset("mine", x, np.array([0, 1, -1, 0]), x[:2], np.array([0, 1]), ("a", "b"))
  with pytest.raises(InputError, match=words):
    dataclasses.replace(made, **changes)


def test_unknown_dataset_lists_what_there_is():
  with pytest.raises(InputError, match=r"unknown dataset 'mnits'.*digits, mnist, fashion_mnist, kmnist"):
    datasets.load("mnits")


def test_a_named_dataset_never_falls_back(offline):
  with pytest.raises(InputError, match=r"--manual-dir FOLDER.*--dataset digits"):
    datasets.load("mnist")
  with pytest.raises(InputError, match=r"cifar10 is not prepared.*tfds build cifar10"):
    datasets.load("cifar10")


def test_auto_falls_back_to_digits_and_says_so(offline):
  dataset = datasets.load("auto")
  assert dataset.name == "digits"
  assert "bundled digits" in dataset.note


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_is_one(status):
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      self.send_response(status)
      self.end_headers()

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert prepared._reachable(f"http://127.0.0.1:{server.server_port}/")


def test_nobody_answers():
  assert not prepared._reachable("http://127.0.0.1:9/", seconds=2)


def idx(array: np.ndarray) -> bytes:
  """The format of the original MNIST files."""
  header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
  return gzip.compress(header + array.tobytes())


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
  """A manual folder in MNIST's format with 30 + 10 images, whose checksums replace the real ones."""
  import tensorflow_datasets as tfds

  rng = np.random.default_rng(0)
  folder = tmp_path / "manual"
  folder.mkdir()
  arrays = {
    "train-images-idx3-ubyte.gz": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte.gz": (np.arange(30) % 10).astype(np.uint8),
    "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte.gz": np.arange(10, dtype=np.uint8),
  }
  stock = tfds.builder_cls("mnist")
  infos = {}
  for url, info in stock.url_infos.items():
    content = idx(arrays[info.filename])
    (folder / info.filename).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    infos[url] = dataclasses.replace(info, size=len(content), checksum=digest)
  monkeypatch.setattr(stock, "url_infos", infos)
  return folder, arrays


@pytest.mark.filterwarnings("default")  # tfds's own
def test_mnist_is_prepared_from_a_manual_folder_without_tensorflow(small_mnist, offline, tmp_path):
  import sys

  import tensorflow_datasets as tfds

  folder, arrays = small_mnist
  first = datasets.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  # tfds shuffles what it writes, deterministically: compare image by image.
  pairs = lambda x, y: sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))
  images, labels = arrays["train-images-idx3-ubyte.gz"], arrays["train-labels-idx1-ubyte.gz"]
  assert pairs(first.x_train[..., 0], first.y_train) == pairs(images, labels)
  assert sorted(first.y_test.tolist()) == list(range(10))
  assert tfds.builder("mnist", data_dir=tmp_path / "d").is_prepared()
  assert "tensorflow" not in sys.modules
  cache = next((tmp_path / "d").rglob("gan_jax_arrays.npz"))
  cached = datasets.load("auto", data_dir=str(tmp_path / "d"))
  np.testing.assert_array_equal(cached.x_train, first.x_train)
  cache.write_bytes(b"half a file")
  again = datasets.load("mnist", data_dir=str(tmp_path / "d"))
  np.testing.assert_array_equal(again.x_train, first.x_train)


@pytest.mark.filterwarnings("default")
def test_bad_manual_folders(small_mnist, tmp_path):
  folder, _ = small_mnist
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=r"mnist cannot be prepared: .*file.*: Not a directory"):
    datasets.load("mnist", data_dir=str(tmp_path / "file" / "d"), manual_dir=str(folder))
  broken = folder / "train-labels-idx1-ubyte.gz"
  broken.write_bytes(broken.read_bytes()[:-1])
  with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz is not the original file"):
    datasets.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  broken.unlink()
  with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz is missing"):
    datasets.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  with pytest.raises(InputError, match="is not a folder"):
    datasets.load("mnist", manual_dir=str(tmp_path / "nowhere"))
  assert not list((tmp_path / "d").rglob("dataset_info.json"))


@pytest.mark.filterwarnings("default")
def test_any_prepared_image_classification_dataset(tmp_path):
  images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((12, 10, 3), np.uint8)
  Pets = make_builder("Pets", {"train": images, "validation": images[:4]})
  with pytest.raises(InputError, match="pets is not prepared"):
    datasets.load("pets", data_dir=str(tmp_path))
  builder = Pets(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  pets = datasets.load("pets", data_dir=str(tmp_path))
  assert pets.x_train.shape == (8, 12, 10, 3)
  assert pets.x_test[:, 0, 0, 0].tolist() == pets.y_test.tolist()
  assert sorted(pets.y_test.tolist()) == [0, 1, 2, 3]

  with pytest.raises(InputError, match=r"pets:9.9.9 cannot be opened .*only: 1.0.0\): name a version"):
    datasets.load("pets:9.9.9", data_dir=str(tmp_path))
  folder = tmp_path / "pets" / "1.0.0"
  cache = folder / "gan_jax_arrays.npz"
  good = {name: getattr(pets, name) for name in ("x_train", "y_train", "x_test", "y_test")}
  shapes = good | {"x_train": pets.x_train[:1]}, good | {"x_test": pets.x_test[:, 1:]}
  for foreign in ({"a": pets.x_train}, *shapes):
    np.savez(cache, **foreign)
    again = datasets.load("pets", data_dir=str(tmp_path))
    np.testing.assert_array_equal(again.x_train, pets.x_train)
    np.testing.assert_array_equal(again.x_test, pets.x_test)
  shard = next(folder.glob("*train.array_record*"))
  shard.write_bytes(shard.read_bytes()[:70_000])
  cache.unlink()
  with pytest.raises(InputError, match=r"pets in .* cannot be read \(.*\): delete that folder"):
    datasets.load("pets", data_dir=str(tmp_path))
  for text in (b"", b"[]", b"\xff"):
    (folder / "dataset_info.json").write_bytes(text)
    with pytest.raises(InputError, match=r"pets cannot be opened .*prepare it again"):
      datasets.load("pets", data_dir=str(tmp_path))


REAL = os.environ.get("GAN_JAX_MNIST_DIR")
if REAL:

  @pytest.mark.filterwarnings("default")
  def test_real_mnist(tmp_path, offline):
    """Prepared in `GAN_JAX_TFDS_DIR` if it is set: preparation takes a minute, and others may reuse it."""
    data_dir = os.environ.get("GAN_JAX_TFDS_DIR", str(tmp_path))
    mnist = datasets.load("mnist", data_dir=data_dir, manual_dir=REAL)
    assert (mnist.x_train.shape, mnist.x_test.shape) == ((60000, 28, 28, 1), (10000, 28, 28, 1))
    assert np.bincount(mnist.y_train).tolist()[:3] == [5923, 6742, 5958]


class Evil:
  """Makes a folder when it is unpickled."""

  def __reduce__(self):
    return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
  """A pickle can run arbitrary code: every reader of arrays refuses it."""
  evil = np.array([Evil()], object)
  np.savez("evil.npz", x=evil, y=evil, about=evil, logits=evil)
  with pytest.raises(ValueError, match="pickle"):
    dict(np.load("evil.npz"))
  with pytest.raises(InputError, match="holds Python objects: save numbers"):
    datasets.load("arrays:evil.npz")
  content = Path("evil.npz").read_bytes()
  with pytest.raises(InputError, match="is not a feature extractor"):
    metrics.read_feature_extractor(Path("evil.npz"), hashlib.sha256(content).hexdigest())
  assert classify._stored_fold(Path("evil.npz"), None) is None  # pyright: ignore
  assert not os.path.exists("unpickled")
  np.load("evil.npz", allow_pickle=True)["x"]
  assert os.path.exists("unpickled")  # so the file does run code if unpickled
  words = re.compile(r"import (pickle|dill|joblib|marshal|shelve)|allow_pickle=True|torch\.load")
  for path in Path(datasets.__file__).parent.rglob("*.py"):
    assert not words.search(path.read_text()), path
