import json

import jax
import numpy as np
import pytest
from conftest import noise, save

import gan_jax
from gan_jax import checkpoint, data, recipes, steps
from gan_jax.pictures import Scaling
from gan_jax.types import InputError


@pytest.fixture
def run(tiny, tmp_path, small_mlp):
  """Saves a state whose averages differ from its parameters as a run; returns its folder and the state."""

  def saved(recipe):
    state = recipe.init_state(jax.random.key(0), tiny.data)
    state = state.replace(ema=jax.tree.map(lambda p: 1.5 * p, state.ema))
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
      checkpoints.save(state)
    config = {"recipes": {"main": recipes.describe(recipe)}, "class_names": ["a", "b", "c"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run", state

  return saved


def recipe(family="ssgan", **changes):
  if family == "gan":
    hparams = recipes.gan.Hparams(network="article", num_steps=2, **changes)
    return recipes.gan.build(hparams, (8, 8, 1), 3)
  hparams = recipes.ssgan.Hparams(network="mlp", num_steps=2, **changes)
  return recipes.ssgan.build(hparams, (8, 8, 1), 3)


def test_a_loaded_model_is_the_one_that_was_trained(run, tiny):
  trained = recipe()
  path, state = run(trained)
  model = gan_jax.load(path)
  assert model.classes == ("a", "b", "c")
  x = tiny.dataset.x_test
  logits, features = steps.make_classifier(trained.d)(state, x / np.float32(255))
  np.testing.assert_allclose(model.predict(x), jax.nn.softmax(logits), atol=1e-5)
  np.testing.assert_allclose(model.features(x), features, atol=1e-5)
  np.testing.assert_allclose(model.real_logit(x), jax.nn.logsumexp(logits, axis=1), atol=1e-4)
  np.testing.assert_allclose(model.features(x, layer="Block_1"), features, atol=1e-5)
  assert model.features(x, layer="Block_0").shape == (30, 12)
  with pytest.raises(InputError, match="no layer Block_9: it has Block_0, Block_1"):
    model.features(x, layer="Block_9")


def test_any_number_of_images_goes_through_one_program(run, tiny):
  model = gan_jax.load(run(recipe())[0])
  x = np.concatenate([tiny.dataset.x_train] * 2)  # more than a batch
  whole = model.predict(x)
  assert whole.shape == (120, 3)
  with jax.no_tracing():
    for num in (0, 1, 7, 100, 101):
      np.testing.assert_allclose(model.predict(x[:num]), whole[:num], atol=1e-6)
    as_floats = model.predict(x[:5, ..., 0] / 255)
  np.testing.assert_allclose(as_floats, whole[:5], atol=1e-6)


@pytest.mark.parametrize(
  ("x", "sentence"),
  [
    (np.zeros((2, 8, 9, 1), np.uint8), r"takes images \[N, 8x8x1\], not \[N, 8x9x1\]"),
    (np.zeros((8, 8), np.uint8), "takes images"),
    (np.full((2, 8, 8, 1), 1.5), r"floats in \[0, 1\]"),
    (np.full((2, 8, 8, 1), np.nan), r"floats in \[0, 1\]"),
    (np.zeros((2, 8, 8, 1), np.int64), r"floats in \[0, 1\], not int64"),
  ],
)
def test_other_images_are_refused(x, sentence, run):
  with pytest.raises(InputError, match=sentence):
    gan_jax.load(run(recipe())[0]).predict(x)


def test_arrays_are_read_as_those_of_the_training_were(run, tmp_path):
  """16 bits are scaled by the white level of the training, other sizes are resized as in training."""
  path, _ = run(recipe())
  stored = json.loads((path / "config.json").read_text())
  stored["reader"] = {"channels": 1, "size": [8, 8], "fit": "crop", "white": 4000}
  (path / "config.json").write_text(json.dumps(stored))
  model = gan_jax.load(path)
  x = np.random.default_rng(0).integers(0, 4000, (3, 8, 8), dtype=np.uint16)
  np.save(tmp_path / "deep.npy", x)
  _, images = model.read([tmp_path / "deep.npy"])
  np.testing.assert_array_equal(images[..., 0], np.round(x * (255 / 4000)))
  np.save(tmp_path / "wide.npy", np.full((2, 16, 20), 7, np.uint8))
  np.testing.assert_array_equal(model.read([tmp_path / "wide.npy"])[1], np.full((2, 8, 8, 1), 7))
  np.save(tmp_path / "ints.npy", x.astype(np.int64))
  with pytest.raises(InputError, match=r"ints.npy must be uint8, uint16, or floats in \[0, 1\], not int64"):
    model.read([tmp_path / "ints.npy"])
  with pytest.raises(InputError, match=r"none\.npy does not exist"):
    model.read([tmp_path / "none.npy"])


def test_one_path_is_as_good_as_several(run, tmp_path):
  model = gan_jax.load(run(recipe())[0])
  np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.uint8))
  for path in (tmp_path / "x.npy", str(tmp_path / "x.npy")):
    assert len(model.read(path)[1]) == 2


def test_vectors_are_predicted_on_their_own_scale(small_mlp):
  hparams = recipes.ssgan.Hparams(network="mlp", num_steps=2)
  of_vectors = recipes.ssgan.build(hparams, (1, 4, 1), 3)
  x = np.random.default_rng(0).normal(size=(30, 4))
  scaling = Scaling.of(x)
  images = data.DeviceData.from_arrays(scaling.apply(x), np.arange(30) % 3, scaling.apply(x))
  model = gan_jax.Model(
    of_vectors, of_vectors.init_state(jax.random.key(0), images), ("a", "b", "c"), scaling=scaling
  )
  np.testing.assert_array_equal(model.predict(x), model.predict(scaling.apply(x)))
  with pytest.raises(InputError, match="vectors must be real numbers, not <U1"):
    model.predict(np.full((2, 4), "a"))
  with pytest.raises(InputError, match=r"vectors must be \[N, 4\]"):
    model.features(x[:, :3])


def test_a_generator_that_was_not_trained_draws_nothing(run):
  with pytest.raises(InputError, match="no generator: its run trained without one"):
    gan_jax.load(run(recipe(adversarial=0.0))[0]).sample(1)


def test_a_named_picture_that_cannot_be_read_is_an_error_and_repeated_ones_are_read_twice(run, tmp_path):
  """Beside others too; within a folder, it would be left out."""
  model, good = gan_jax.load(run(recipe())[0]), save(tmp_path / "good" / "a.png", noise(0, (8, 8)))
  names, images = model.read([good, good, good.parent])
  assert (len(names), len(images)) == (3, 3)
  with pytest.raises(InputError, match=r"absent\.png does not exist"):
    model.read([good, tmp_path / "absent.png"])
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "a.png").write_bytes(b"PNG")
  with pytest.raises(InputError, match=r"a\.png is not a picture"):
    model.read([good.parent, tmp_path / "bad"])


def test_one_sample_at_a_time_is_all_at_once(run):
  model = gan_jax.load(run(recipe())[0])
  x = model.sample(501)
  assert x.shape == (501, 8, 8, 1)
  for num in (0, 1, 3, 500):
    np.testing.assert_array_equal(model.sample(num), x[:num])
  assert not np.array_equal(model.sample(3, seed=1), x[:3])
  assert len({image.tobytes() for image in x}) == 501
  with pytest.raises(InputError, match="cannot draw a chosen class"):
    model.sample(1, classes=["a"])


def test_samples_of_the_classes_asked_for(run):
  model = gan_jax.load(run(recipe("gan", labels="all"))[0])
  names = ["c", "a", "b", "a"]
  x = model.sample(4, classes=names)
  np.testing.assert_allclose(model.sample(2, classes=names[:2]), x[:2], atol=1e-6)
  assert not np.allclose(model.sample(1, classes=["b"]), x[0])
  with pytest.raises(InputError, match="no class z: the classes are a, b, c"):
    model.sample(1, classes=["z"])
  with pytest.raises(InputError, match="there are 4 images but 1 classes: name one"):
    model.sample(4, classes=["a"])


def test_a_gan_without_labels_has_no_classifier(run, tiny):
  model = gan_jax.load(run(recipe("gan"))[0])
  assert model.real_logit(tiny.dataset.x_test).shape == (30,)
  with pytest.raises(InputError, match="no classifier"):
    model.predict(tiny.dataset.x_test)


def test_what_is_no_run_is_a_sentence(run, tmp_path):
  with pytest.raises(InputError, match=r"has no config\.json"):
    gan_jax.load(tmp_path / "nowhere")
  path, _ = run(recipe())
  other = json.loads((path / "config.json").read_text())
  other["recipes"]["main"]["num_classes"] = 4
  (path / "config.json").write_text(json.dumps(other))
  with pytest.raises(InputError, match="of another model"):
    gan_jax.load(path)
  (path / "config.json").write_text("{}")
  with pytest.raises(InputError, match="contains no recipe"):
    gan_jax.load(path)
  (path / "config.json").write_text(
    json.dumps({"recipes": {"main": recipes.describe(recipe())}, "class_names": []})
  )
  (path / "checkpoints").rename(path / "gone")
  with pytest.raises(InputError, match="holds no checkpoint"):
    gan_jax.load(path)
