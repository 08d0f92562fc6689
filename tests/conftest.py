"""Strict switches for every test, and shared fixtures and helpers."""

import dataclasses
import gc
import os
import tempfile
import zlib
from importlib import metadata
from pathlib import Path

# Tests compile much and compute little. One module per program compiles faster than many in parallel, and
# the fusion emitters take half of XLA's compile time on CPU; JAX 0.12 has no alternative.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib") < "0.12":
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import numpy as np
import optax
import pytest
from PIL import Image

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")
for _name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # from the user's terminal
  os.environ.pop(_name, None)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
# Compile quickly, and each program only once for all workers.
if "GAN_JAX_TEST_CACHE" not in os.environ:
  _cache = tempfile.TemporaryDirectory()
  os.environ["GAN_JAX_TEST_CACHE"] = _cache.name
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", os.environ["GAN_JAX_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
# Tracing allocates millions of small, long-lived objects; scanning them takes a fifth of its time.
gc.set_threshold(100_000, 50, 50)

from gan_jax import augment, data, datasets, evaluate, networks, objectives, recipes, steps, terms  # noqa: E402
from gan_jax.datasets import Dataset  # noqa: E402
from gan_jax.types import BatchSizes  # noqa: E402

gc.freeze()  # no collection scans what the imports have made


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
  """No test reads or writes the user's folders or the compilation cache, or sees a terminal."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
  monkeypatch.setattr("gan_jax.program.enable_compilation_cache", lambda: None)


# One object for all tests: `init_state` is compiled once per optimizer.
ADAM = optax.adam(1e-2, b1=0.5)
# Bit-identical if XLA fuses as it does outside of the tests, see above.
AS_EVER = {"xla_cpu_use_fusion_emitters": True} if metadata.version("jaxlib") < "0.12" else None
WEAK = augment.affine(shift=0.05)
FULL = objectives.semi_supervised_gan(consistency_weight=1.0, weak=WEAK, threshold=0.2).plus(
  class_balance=(3.0, terms.class_balance())
)
"""Losses that couple the images of a batch, feature matching and class balance, and losses that do not."""


class Consuming:
  """A D that consumes its noise key, which Flax only folds: otherwise reuse would go unnoticed."""

  def __init__(self, net):
    self.net = net

  def apply(self, variables, x, *, rngs, **kwargs):
    return self.net.apply(variables, x + 0 * jax.random.uniform(rngs["noise"]), rngs=rngs, **kwargs)


_MLP_G = networks.MLPGenerator((8, 8, 1), widths=(8,), latent_size=4)
TINY_PAIRS = {
  "conv": (
    networks.ConvGenerator((8, 8, 1), width=8, latent_size=4),
    networks.ConvDiscriminator(3, width=4, num_features=8),
  ),
  "mlp": (_MLP_G, networks.MLPDiscriminator(3, widths=(8, 8))),
  "plain": (
    _MLP_G,
    networks.MLPDiscriminator(3, widths=(8, 8), norm="layer", noise_in=0.0, noise_hidden=0.0),
  ),
}
"""Plain compiles fastest; conv has convolutions; mlp has noise, and variables that are no parameters."""


class Tiny:
  """A small but complete problem: 8x8 images, 3 classes, and networks of that name, see `TINY_PAIRS`."""

  def __init__(self, *, tx=None, objective=None, network="plain", seed=0):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 20)
    x = rng.integers(0, 100, (60, 8, 8, 1), dtype=np.uint8)
    x[np.arange(60), 2 * y + 1] += 150  # class k has a bright row at 2 k + 1
    self.dataset = Dataset("tiny", x, y, x[::2], y[::2], ("a", "b", "c"))
    self.split = data.split_labels(y, 2, seed=0)
    self.data = data.to_device(self.dataset, self.split)
    self.g, self.d = TINY_PAIRS[network]
    tx = tx or ADAM
    self.txs = {"g_tx": tx, "d_tx": tx}
    self.objective = objective or objectives.semi_supervised_gan()
    self.sizes = BatchSizes(labelled=4, unlabelled=6, generated=6)
    self.sample_batch = data.make_sample_batch(self.sizes)
    self.seed = seed

  def state(self, aux=None):
    x_init = data.to_float(self.data.x_unl)
    return steps.init_state(jax.random.key(self.seed), self.g, self.d, **self.txs, x_init=x_init, aux=aux)

  def step(self, **kwargs):
    return steps.make_step(self.g, self.d, **self.txs, objective=self.objective, **kwargs)

  def batch(self, seed=0):
    return self.sample_batch(jax.random.key(seed), self.data)

  def recipe(self, num_steps=4, **changes):
    """The problem as a recipe; its `hparams` do not describe it."""
    values = {
      "g": self.g,
      "d": self.d,
      **self.txs,
      "objective": self.objective,
      "batch": self.sizes,
      "num_steps": num_steps,
      "ema_decay": 0.999,
      "augment": None,
      "image_shape": (8, 8, 1),
      "num_classes": 3,
      "family": "ssgan",
      "hparams": recipes.ssgan.Hparams(),
    }
    return recipes.Recipe(**values | changes)


@pytest.fixture
def tiny():
  return Tiny()


@pytest.fixture
def make_tiny():
  return Tiny


@pytest.fixture
def small_mlp(monkeypatch):
  """Makes `--network mlp` a pair that is quick to compile and to probe."""
  use_small_mlp(monkeypatch)


def use_small_mlp(monkeypatch):
  def small_pair(image_shape, num_logits, num_classes):
    g = networks.MLPGenerator(image_shape, widths=(8,), num_classes=num_classes)
    return g, networks.MLPDiscriminator(num_logits, widths=(12, 8))

  monkeypatch.setitem(networks.PAIRS, "mlp", small_pair)


def make_builder(name, splits):
  """A tfds builder class of this name: 12x10 colour images for each split, classes 0 to 3 in turn."""
  import tensorflow_datasets as tfds

  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      image, label = tfds.features.Image(shape=(12, 10, 3)), tfds.features.ClassLabel(num_classes=4)
      features = tfds.features.FeaturesDict({"image": image, "label": label})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(images) for split, images in splits.items()}

    def _generate_examples(self, images):  # pyright: ignore
      for i, image in enumerate(images):
        yield i, {"image": Image.fromarray(image), "label": i % 4}

  return type(name, (Made,), {})


class Sealed:
  """Test data that reveals only its length."""

  def __init__(self, array):
    self.array = array

  def __len__(self):
    return len(self.array)

  def __getattr__(self, name):
    raise AssertionError(f"{name} of the test set was asked for")

  def __array__(self, *_, **__):
    raise AssertionError("the test set was read")

  __getitem__ = __iter__ = __array__


@pytest.fixture
def reads(monkeypatch):
  """Seals the test set of every loaded dataset, except for `evaluate.with_test_set`; one name per read."""
  load, names = datasets.load, []

  def sealed(*args, **kwargs):
    dataset = load(*args, **kwargs)
    seals = {"x_test": Sealed(dataset.x_test), "y_test": Sealed(dataset.y_test)}
    return dataclasses.replace(dataset, **seals)

  def with_test_set(dataset):
    names.append(dataset.name)
    opened = {"x_test": dataset.x_test.array, "y_test": dataset.y_test.array}
    return dataclasses.replace(dataset, **opened)

  monkeypatch.setattr(datasets, "load", sealed)
  monkeypatch.setattr(evaluate, "with_test_set", with_test_set)
  return names


def leaves_equal(a, b) -> list[bool]:
  """Whether the leaves are equal bit for bit, one value per leaf."""
  unpack = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  assert jax.tree.structure(a) == jax.tree.structure(b)
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return [np.array_equal(unpack(x), unpack(y)) for x, y in pairs]


def pytest_addoption(parser):
  parser.addoption("--regenerate-golden", action="store_true", help="write the golden files anew")


def noise(seed=0, size=(9, 10), channels=1):
  x = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
  return x[..., 0] if channels == 1 else x


def save(path: Path, x=None, **kwargs) -> Path:
  """Saves a picture, by default of noise that depends on its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  x = noise(zlib.crc32(str(path).encode())) if x is None else x
  (x if isinstance(x, Image.Image) else Image.fromarray(x)).save(path, **kwargs)
  return path
