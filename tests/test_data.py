import dataclasses
import gzip
import hashlib
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gan_jax import data
from gan_jax.types import InputError


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 1000))
def test_split_has_the_same_number_of_every_class(num_classes, per_class, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), 8))
  split = data.split_labels(labels, per_class, seed)
  chosen = labels[list(split.indices)]
  assert np.bincount(chosen).tolist() == [per_class] * num_classes
  assert list(split.indices) == sorted(set(split.indices))
  assert split == data.split_labels(labels, per_class, seed)
  if per_class > 1:
    assert set(data.split_labels(labels, per_class - 1, seed).indices) < set(split.indices)


def test_split_is_known_by_its_hash():
  labels = np.arange(40) % 4
  split = data.split_labels(labels, 3, seed=1)
  indices = np.array(split.indices, "<i8")
  expected = hashlib.sha256(indices.tobytes() + labels[indices].astype("<i8").tobytes()).hexdigest()
  assert split.sha256 == expected
  assert data.split_labels(labels, 3, seed=2).sha256 != expected
  assert data.split_labels((labels + 1) % 4, 3, seed=1).sha256 != expected


@pytest.mark.parametrize(
  ("per_class", "words"), [(0, "at least 1"), (-3, "at least 1"), (11, "only|more than")]
)
def test_impossible_budgets(per_class, words):
  with pytest.raises(InputError, match=words):
    data.split_labels(np.arange(40) % 4, per_class, seed=0)


def test_images_and_held_out_ones_come_from_the_same_permutation():
  labels = np.arange(40) % 4
  whole = data.split_labels(labels, 3, seed=1)
  part = data.split_labels(labels, 3, seed=1, num_images=30, num_held_out=5)
  assert whole.images == tuple(range(40))
  assert whole.held_out == ()
  assert part.indices == whole.indices  # what comes first does not depend on what is held out
  assert (len(part.images), len(part.held_out)) == (30, 5)
  assert set(part.indices) < set(part.images)
  assert not set(part.images) & set(part.held_out)
  every = data.split_labels(labels, None, seed=1, num_held_out=5)
  assert every.indices == every.images
  assert set(every.images) | set(every.held_out) == set(range(40))


@pytest.mark.parametrize(("num_images", "num_held_out"), [(36, 5), (0, 0), (None, 40), (41, 0)])
def test_more_images_than_there_are(num_images, num_held_out):
  with pytest.raises(InputError, match="change --num-images or --hold-out"):
    data.split_labels(np.arange(40) % 4, 1, seed=0, num_images=num_images, num_held_out=num_held_out)


def test_held_out_images_are_on_the_device_and_nowhere_else_there(tiny):
  split = data.split_labels(tiny.dataset.y_train, None, seed=0, num_images=40, num_held_out=10)
  on_device = data.to_device(tiny.dataset, split)
  held_out = {x.tobytes() for x in np.asarray(on_device.x_held_out)}
  seen = {x.tobytes() for x in np.concatenate([on_device.x_unl, on_device.x_lab])}
  assert (len(held_out), len(seen)) == (10, 40)
  assert not held_out & seen


def test_resized_images_keep_their_mean_and_have_another_name():
  digits = data.load("digits")
  resized = data.load("digits", image_size=16)
  assert resized.image_shape == (16, 16, 1)
  assert resized.name == "digits@16"
  assert resized.x_test.dtype == np.uint8
  np.testing.assert_allclose(resized.x_train.mean(), digits.x_train.mean(), rtol=0.05)


def test_draw_gives_the_batch_asked_for(tiny):
  batch = data.make_sample_batch(4, 5, 7)(jax.random.key(0), tiny.data)
  assert [len(a) for a in (batch.x_lab, batch.y_lab, batch.x_unl, batch.x_unl_g)] == [4, 4, 5, 7]
  assert batch.x_unl.dtype == jnp.float32
  assert 0 <= batch.x_unl.min() <= batch.x_unl.max() <= 1
  whole = data.make_sample_batch(6, 0, 0)(jax.random.key(0), tiny.data)
  np.testing.assert_array_equal(whole.y_lab, tiny.data.y_lab)


def test_draw_is_uniform(tiny):
  """Six standard errors around 1 / 60, image by image."""
  n = 60_000
  batch = data.make_sample_batch(0, n, 0)(jax.random.key(0), tiny.data)
  images, counts = np.unique(np.asarray(batch.x_unl).reshape(n, -1), axis=0, return_counts=True)
  assert len(images) == 60
  assert np.abs(counts - n / 60).max() < 6 * np.sqrt(n / 60)


def test_unlabelled_images_with_and_without_the_labelled(tiny):
  assert len(tiny.data.x_unl) == 60
  without = data.to_device(tiny.dataset, tiny.split, exclude_labelled=True)
  assert len(without.x_unl) == 54
  kept = {x.tobytes() for x in np.asarray(without.x_unl)}
  assert not kept & {x.tobytes() for x in tiny.dataset.x_train[list(tiny.split.indices)]}


def test_digits():
  digits = data.load("digits")
  assert digits.x_train.shape == (1198, 8, 8, 1)
  assert digits.x_test.shape == (599, 8, 8, 1)
  assert digits.x_train.max() == 255
  assert (digits.num_classes, digits.image_shape) == (10, (8, 8, 1))


def write_pictures(root: Path, *, size=(9, 10), mode="L", parts=("train", "test")) -> None:
  rng = np.random.default_rng(0)
  for part in parts:
    for name in ("cat", "dog"):
      (root / part / name).mkdir(parents=True)
      for i in range(3):
        shape = size if mode == "L" else (*size, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / part / name / f"{i}.png")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder(tmp_path, mode, channels):
  write_pictures(tmp_path / "pets", mode=mode)
  pets = data.load(f"folder:{tmp_path / 'pets'}")
  assert pets.x_train.shape == (6, 9, 10, channels)
  assert pets.y_train.tolist() == [0, 0, 0, 1, 1, 1]
  assert pets.class_names == ("cat", "dog")


def test_bad_folders(tmp_path):
  with pytest.raises(InputError, match="needs the folders"):
    data.load(f"folder:{tmp_path}")
  write_pictures(tmp_path)
  (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no picture")
  with pytest.raises(InputError, match=r"0\.png is not a picture"):
    data.load(f"folder:{tmp_path}")
  Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "train" / "cat" / "0.png")
  with pytest.raises(InputError, match="images of one size, not 4x4x1, 9x10x1"):
    data.load(f"folder:{tmp_path}")


# --- tfds


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(data, "_reachable", lambda url: False)


def test_unknown_dataset_lists_what_there_is():
  with pytest.raises(InputError, match=r"unknown dataset 'mnits'.*digits, mnist, fashion_mnist, kmnist"):
    data.load("mnits")


def test_a_named_dataset_never_falls_back(offline):
  with pytest.raises(InputError, match=r"--manual-dir FOLDER.*--dataset digits"):
    data.load("mnist")
  with pytest.raises(InputError, match=r"cifar10 is not prepared.*tfds build cifar10"):
    data.load("cifar10")


def test_auto_falls_back_to_digits_and_says_so(offline):
  dataset = data.load("auto")
  assert dataset.name == "digits"
  assert "bundled digits" in dataset.note


def test_nobody_answers():
  assert not data._reachable("http://127.0.0.1:9/", seconds=2)


def idx(array: np.ndarray) -> bytes:
  """The format of the original MNIST files."""
  header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
  return gzip.compress(header + array.tobytes())


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
  """A manual folder in MNIST's format with 30 + 10 images, and their checksums in place of the real."""
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
  first = data.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  # tfds shuffles what it writes, the same way each time: compare image by image.
  pairs = lambda x, y: sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))
  images, labels = arrays["train-images-idx3-ubyte.gz"], arrays["train-labels-idx1-ubyte.gz"]
  assert pairs(first.x_train[..., 0], first.y_train) == pairs(images, labels)
  assert sorted(first.y_test.tolist()) == list(range(10))
  assert tfds.builder("mnist", data_dir=tmp_path / "d").is_prepared()
  assert "tensorflow" not in sys.modules
  cache = next((tmp_path / "d").rglob("gan_jax_arrays.npz"))
  cached = data.load("auto", data_dir=str(tmp_path / "d"))
  np.testing.assert_array_equal(cached.x_train, first.x_train)
  cache.write_bytes(b"half a file")
  again = data.load("mnist", data_dir=str(tmp_path / "d"))
  np.testing.assert_array_equal(again.x_train, first.x_train)


@pytest.mark.filterwarnings("default")
def test_bad_manual_folders(small_mnist, tmp_path):
  folder, _ = small_mnist
  broken = folder / "train-labels-idx1-ubyte.gz"
  broken.write_bytes(broken.read_bytes()[:-1])
  with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz is not the original file"):
    data.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  broken.unlink()
  with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz is missing"):
    data.load("mnist", data_dir=str(tmp_path / "d"), manual_dir=str(folder))
  with pytest.raises(InputError, match="is not a folder"):
    data.load("mnist", manual_dir=str(tmp_path / "nowhere"))
  assert not list((tmp_path / "d").rglob("dataset_info.json"))


@pytest.mark.filterwarnings("default")
def test_any_prepared_image_classification_dataset(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds

  class Pets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(12, 10, 3)),
        "label": tfds.features.ClassLabel(num_classes=4),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._examples(8), "validation": self._examples(4)}

    def _generate_examples(self):
      raise AssertionError

    def _examples(self, n):
      for i in range(n):
        image = Image.fromarray(np.full((12, 10, 3), i, np.uint8))
        yield i, {"image": image, "label": i % 4}

  with pytest.raises(InputError, match="pets is not prepared"):
    data.load("pets", data_dir=str(tmp_path))
  builder = Pets(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  pets = data.load("pets", data_dir=str(tmp_path))
  assert pets.x_train.shape == (8, 12, 10, 3)
  assert pets.x_test[:, 0, 0, 0].tolist() == pets.y_test.tolist()
  assert sorted(pets.y_test.tolist()) == [0, 1, 2, 3]


REAL = os.environ.get("GAN_JAX_MNIST_DIR")
if REAL:

  @pytest.mark.filterwarnings("default")
  def test_real_mnist(tmp_path, offline):
    mnist = data.load("mnist", data_dir=str(tmp_path), manual_dir=REAL)
    assert (mnist.x_train.shape, mnist.x_test.shape) == ((60000, 28, 28, 1), (10000, 28, 28, 1))
    assert np.bincount(mnist.y_train).tolist()[:3] == [5923, 6742, 5958]
