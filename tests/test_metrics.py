import dataclasses
import gzip
import hashlib
import io
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics import accuracy_score
from sklearn.metrics import confusion_matrix as reference

from gan_jax import datasets, metrics, output
from gan_jax.metrics import feature_extractor, feature_network
from gan_jax.types import InputError


def test_error_and_confusion_agree_with_scikit_learn():
  rng = np.random.default_rng(0)
  logits, y = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
  predicted = logits.argmax(axis=-1)
  np.testing.assert_allclose(metrics.error_percent(logits, y), 100 * (1 - accuracy_score(y, predicted)))
  for dtype in (y.dtype, np.uint8):  # in which y K would overflow
    counts = metrics.confusion_matrix(
      np.pad(logits, ((0, 0), (0, 90)), constant_values=-9), y.astype(dtype)
    )
    np.testing.assert_array_equal(counts[: logits.shape[1], : logits.shape[1]], reference(y, predicted))


def test_predict_goes_through_batches_of_one_size():
  x = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
  sizes = []

  def classify(x):
    sizes.append(len(x))
    flat = np.asarray(x).reshape(-1, 1)
    return flat, 2 * flat

  logits, features = metrics.predict(classify, x, batch_size=3)
  np.testing.assert_allclose(logits[:, 0], np.arange(7) / 255, rtol=1e-6)
  np.testing.assert_allclose(features, 2 * logits)
  assert sizes == [3, 3, 3]


# --- The Fréchet distance


def gaussian(mean, cov):
  return metrics.Moments(np.asarray(mean, np.float64), np.asarray(cov, np.float64), 1000)


def random_moments(seed, *, num_features=12, rank=12):
  rng = np.random.default_rng(seed)
  return metrics.moments(rng.normal(size=(200, rank)) @ rng.normal(size=(rank, num_features)) + seed)


def test_frechet_distance_has_its_closed_forms():
  """Commuting covariances: |m_a - m_b|^2 + |sqrt(a) - sqrt(b)|^2 over the eigenvalues a, b."""
  rng = np.random.default_rng(0)
  a, b, shift = rng.uniform(0.1, 4, 5), rng.uniform(0.1, 4, 5), rng.normal(size=5)
  turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  expected = np.square(shift).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
  found = metrics.frechet_distance(
    gaussian(np.zeros(5), turn * a @ turn.T), gaussian(shift, turn * b @ turn.T)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  shifted = metrics.frechet_distance(gaussian(np.zeros(5), np.diag(a)), gaussian(shift, np.diag(a)))
  np.testing.assert_allclose(shifted, np.square(shift).sum(), rtol=1e-12)


def test_frechet_distance_agrees_with_the_root_of_the_product():
  a, b = random_moments(0), random_moments(1)
  assert not np.allclose(a.cov @ b.cov, b.cov @ a.cov)
  root = scipy.linalg.sqrtm(a.cov @ b.cov)
  expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * root.real)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("rank", [12, 5])
def test_frechet_distance_is_a_distance(rank):
  a, b = random_moments(0, rank=rank), random_moments(1, rank=rank)
  assert np.linalg.matrix_rank(a.cov) == rank
  assert 0 <= metrics.frechet_distance(a, a) < 1e-12 * np.trace(a.cov)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), metrics.frechet_distance(b, a), rtol=1e-12)
  assert metrics.frechet_distance(a, b) > 1


def test_frechet_distance_between_lines():
  """Covariances of rank one, u u' and v v': the trace of the root is |u.v|."""
  u, v = np.array([3.0, 0.0, 4.0]), np.array([1.0, 2.0, 2.0])
  found = metrics.frechet_distance(gaussian(np.zeros(3), np.outer(u, u)), gaussian(u, np.outer(v, v)))
  np.testing.assert_allclose(found, 25 + 25 + 9 - 2 * abs(u @ v), rtol=1e-7)


def test_moments_are_those_of_numpy_and_need_enough_images():
  features = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  found = metrics.moments(features)
  assert (found.mean.dtype, found.cov.dtype, found.n) == (np.float64, np.float64, 16)
  centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
  np.testing.assert_allclose(found.cov, centred.T @ centred / 15, rtol=1e-12)
  with pytest.raises(InputError, match="8 features needs at least 16 images, not 15"):
    metrics.moments(features[:15])


# --- Feature extractors


@pytest.fixture(scope="module")
def digits():
  return datasets.load("digits")


@pytest.fixture(scope="module")
def cached(digits, tmp_path_factory):
  """A feature extractor of the digits after a few steps, and the folder of the cache that holds it."""
  cache, said = tmp_path_factory.mktemp("cache"), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(feature_network, "default_steps", lambda num_images: 40)
    patch.setattr(output, "say", said.append)
    trained = metrics.load_feature_extractor(digits)
  first, last = said
  assert "digits" in first
  assert f"{trained.test_accuracy:.1f} % of the test images" in last
  return trained, cache


def test_an_extractor_needs_labels_not_only_images(digits):
  y = np.where(np.arange(len(digits.y_train)) < 100, digits.y_train, -1)
  with pytest.raises(InputError, match="at least 256 labelled images, but digits has 100"):
    metrics.train_feature_extractor(dataclasses.replace(digits, y_train=y))


def must_not_train(patch):
  def refuse(*args, **kwargs):
    raise AssertionError("a feature extractor was to be trained")

  patch.setattr(feature_extractor, "train_feature_extractor", refuse)


def test_an_extractor_is_trained_once(cached, digits, monkeypatch):
  trained, cache = cached
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  must_not_train(monkeypatch)
  again = metrics.load_feature_extractor(digits)
  assert again.name == trained.name
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, trained.params))
  order = np.random.default_rng(0).permutation(len(digits.x_train))
  shuffled = dataclasses.replace(
    digits, name="other", x_train=digits.x_train[order], y_train=digits.y_train[order]
  )
  assert metrics.load_feature_extractor(shuffled).name == trained.name


@pytest.mark.parametrize("what", ["a pixel", "a label", "a damaged file"])
def test_an_extractor_is_trained_anew(what, cached, digits, tmp_path, monkeypatch):
  (file,) = cached[1].rglob("*.npz")
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= what == "a damaged file"
  copy = tmp_path / file.relative_to(cached[1])
  copy.parent.mkdir(parents=True)
  copy.write_bytes(content)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  x, y = digits.x_test.copy(), digits.y_test.copy()
  x[3, 2, 1, 0] ^= what == "a pixel"
  y[3] ^= what == "a label"
  must_not_train(monkeypatch)
  with pytest.raises(AssertionError, match="was to be trained"):
    metrics.load_feature_extractor(dataclasses.replace(digits, x_test=x, y_test=y))


def packed(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def test_a_damaged_extractor_is_refused(tmp_path):
  content = bytearray(feature_extractor.MNIST_PATH.read_bytes())
  content[len(content) // 2] ^= 1
  (tmp_path / "mnist.npz").write_bytes(content)
  with pytest.raises(InputError, match="damaged"):
    metrics.read_feature_extractor(tmp_path / "mnist.npz", feature_extractor.MNIST_SHA256)
  for foreign in (b"no archive", packed(mean=np.ones(3)), packed(dataset=np.array([{}], object))):
    (tmp_path / "mnist.npz").write_bytes(foreign)  # with a matching SHA-256, whoever wrote it
    with pytest.raises(InputError, match="is not a feature extractor"):
      metrics.read_feature_extractor(tmp_path / "mnist.npz", hashlib.sha256(foreign).hexdigest())
  with pytest.raises(InputError, match="cannot be read"):
    metrics.read_feature_extractor(tmp_path / "none.npz", feature_extractor.MNIST_SHA256)


def test_an_extractor_tells_replayed_digits_from_noise(cached, digits):
  trained, _ = cached
  assert trained.test_accuracy > 80
  assert trained.test.n == 599
  training = metrics.training_moments(trained, digits, 500)
  np.testing.assert_array_equal(metrics.training_moments(trained, digits, 500).cov, training.cov)
  noise = np.random.default_rng(0).uniform(size=(500, 8, 8, 1))
  quality, key = metrics.generator_quality(trained, noise, training), f"frechet_{trained.name}_n500"
  assert quality["frechet"] == quality[key] > 10 * quality["frechet_replayed_training_set"] > 0
  assert quality["frechet_to_training_set"] > 10 * quality["frechet_replayed_training_set"]
  assert set(metrics.generator_quality(trained, noise)) == quality.keys() - {
    "frechet_to_training_set",
    "frechet_replayed_training_set",
  }
  with pytest.raises(InputError, match="over 499 and 500 images are not comparable"):
    metrics.generator_quality(trained, noise[1:], training)
  with pytest.raises(InputError, match="1198 training images, fewer than 1199"):
    metrics.training_moments(trained, digits, 1199)


def test_all_training_images_are_at_no_distance_from_themselves(cached, digits):
  """Only the distance to the test set depends on it."""
  trained, _ = cached
  training = metrics.training_moments(trained, digits, 1198)
  quality = metrics.generator_quality(trained, digits.x_train / np.float32(255), training)
  assert quality["frechet_to_training_set"] < 1e-6
  np.testing.assert_allclose(quality["frechet"], quality["frechet_replayed_training_set"], rtol=1e-6)


def test_the_test_images_are_at_no_distance(cached, digits):
  """Through floats and back: the images are the same bytes as those of the reference."""
  trained, _ = cached
  quality = metrics.generator_quality(trained, digits.x_test / np.float32(255))
  assert quality[f"frechet_{trained.name}_n599"] < 1e-6


def test_class_shares_count_the_extractors_classes(cached, digits):
  trained, _ = cached
  predicted = trained.predict(digits.x_train)[0].argmax(axis=-1)
  rows = np.concatenate([np.flatnonzero(predicted == 3)[:90], np.flatnonzero(predicted == 5)[:10]])
  assert len(rows) == 100
  quality = metrics.generator_quality(trained, np.repeat(digits.x_train[rows], 3, axis=0) / 255)
  np.testing.assert_allclose(quality["class_shares"], [0, 0, 0, 0.9, 0, 0.1, 0, 0, 0, 0])
  np.testing.assert_allclose(quality["class_entropy"], -0.9 * np.log(0.9) - 0.1 * np.log(0.1))
  assert quality["classes_covered"] == 2


@pytest.mark.parametrize(
  ("x", "words"),
  [
    (np.zeros((255, 8, 8, 1)), "at least 256 images, not 255"),
    (np.zeros((256, 8, 8, 3)), "8x8x1, not of 8x8x3"),
    (np.full((256, 8, 8, 1), 1.01), r"in \[0, 1\]"),
    (np.full((256, 8, 8, 1), np.nan), "finite"),
  ],
)
def test_images_that_cannot_be_scored(x, words, cached):
  with pytest.raises(InputError, match=words):
    metrics.generator_quality(cached[0], x)


@pytest.mark.parametrize("shape", [(8, 9, 3), (16, 18, 1)])
def test_feature_network_sees_each_image_alone(shape, key):
  network = feature_network.FeatureNetwork(4)
  x = np.random.default_rng(0).uniform(size=(3, *shape)).astype(np.float32)
  variables = jax.jit(network.init)(key, x[:2])
  assert variables.keys() == {"params"}
  apply = jax.jit(network.apply)
  (logits, features), (_, beside_another) = apply(variables, x[:2]), apply(variables, x[::2])
  assert (logits.shape, features.shape) == ((2, 4), (2, feature_network.NUM_FEATURES))
  np.testing.assert_array_equal(features[0], beside_another[0])
  assert (features[1] != beside_another[1]).any()


def test_training_is_deterministic_and_has_a_seed(digits):
  weights = [feature_network.train(digits, seed=seed, num_steps=2) for seed in (0, 0, 1)]
  same = [jax.tree.map(np.array_equal, weights[0], other) for other in weights[1:]]
  assert jax.tree.all(same[0])
  assert not any(same[1][f"Conv_{i}"]["kernel"] for i in range(3))


def read_idx(path, offset):
  with gzip.open(path) as file:
    return np.frombuffer(file.read(), np.uint8, offset=offset)


REAL = os.environ.get("GAN_JAX_MNIST_DIR")
if REAL:

  @pytest.fixture(scope="module")
  def mnist():
    parts = []
    for part in ("train", "t10k"):
      x = read_idx(Path(REAL) / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
      parts += [x, read_idx(Path(REAL) / f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64)]
    return datasets.Dataset("anything", *parts, tuple("0123456789"))

  def test_the_bundled_extractor_of_real_mnist(mnist, monkeypatch):
    """Recognised by its content, in the order of the original files; its stored moments are reproduced."""
    must_not_train(monkeypatch)
    bundled = metrics.load_feature_extractor(mnist)
    assert bundled.name == f"mnist-{feature_extractor.MNIST_SHA256[:8]}"
    assert (bundled.image_shape, bundled.num_classes) == ((28, 28, 1), 10)
    assert bundled.test_accuracy >= 99.4
    logits, features = bundled.predict(mnist.x_test)
    np.testing.assert_allclose(
      100 - metrics.error_percent(logits, mnist.y_test), bundled.test_accuracy, atol=0.011
    )
    found = metrics.moments(features)
    assert found.n == bundled.test.n
    np.testing.assert_allclose(found.mean, bundled.test.mean, atol=1e-4)
    np.testing.assert_allclose(found.cov, bundled.test.cov, atol=1e-4)
    again, _ = bundled.predict(mnist.x_test[:2000])
    np.testing.assert_array_equal(again, logits[:2000])
    changed = mnist.x_test.copy()
    changed[0, 0, 0] ^= 1
    assert (
      feature_extractor.fingerprint(dataclasses.replace(mnist, x_test=changed))
      != feature_extractor.MNIST_FINGERPRINT
    )


def test_a_feature_network_learns_from_labelled_images_alone():
  """Unlabelled rows would be most of a batch, and contribute nothing."""
  digits = datasets.load("digits")
  few = np.where(np.arange(len(digits.y_train)) % 20, -1, digits.y_train)
  known = few >= 0
  of = lambda **changes: feature_network.train(dataclasses.replace(digits, **changes), num_steps=2)
  expected = of(x_train=digits.x_train[known], y_train=few[known])
  jax.tree.map(np.testing.assert_array_equal, of(y_train=few), expected)
