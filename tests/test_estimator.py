import dataclasses
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import gan_jax
from gan_jax import estimator as module
from gan_jax import recipes, train
from gan_jax.estimator import SemiSupervisedGAN
from gan_jax.pictures import Scaling

CANNOT_HOLD = {
  "check_classifiers_classes": "it has -1 for a class, which is no label here as in SelfTrainingClassifier",
}


@parametrize_with_checks(
  [SemiSupervisedGAN(adversarial=0.0, num_steps=60, random_state=0)],
  expected_failed_checks=lambda _: CANNOT_HOLD,
)
@pytest.mark.filterwarnings("ignore")  # the checks provoke scikit-learn's own warnings
def test_conventions_of_scikit_learn(estimator, check, small_mlp):
  check(estimator)


@pytest.fixture(autouse=True)
def _no_recipe_of_another_test(request):
  """`small_mlp` changes what a name stands for; tests with it share recipes."""
  forget = (lambda: None) if "small_mlp" in request.fixturenames else module._shared.cache_clear
  forget()
  yield
  forget()


@pytest.fixture(scope="module")
def digits():
  """Images, their classes, and the same with two labels per class."""
  images, y = load_digits(return_X_y=True)
  images, y = images.reshape(-1, 8, 8)[:300], y[:300]
  few = np.full_like(y, -1)
  for k in range(10):
    few[np.flatnonzero(y == k)[:2]] = k
  return images, y, few


def test_labels_that_are_hidden_do_not_count(digits, small_mlp):
  """-1 is not a class, with numbers or names as labels."""
  images, _, few = digits
  gan = SemiSupervisedGAN(network="mlp", num_steps=2, random_state=0)
  fitted = gan.fit(images, few)
  assert fitted.classes_.tolist() == list(range(10))
  assert fitted.predict_proba(images).shape == (300, 10)
  names = np.array([*"abcdefghij"], object)[few]
  names[few == -1] = -1
  named = clone(gan).fit(images, names)
  assert np.array_equal(named.predict_proba(images), fitted.predict_proba(images))
  assert named.predict(images).tolist() == ["abcdefghij"[k] for k in fitted.predict(images)]


def test_images_flat_images_and_bytes_are_the_same_images(digits, small_mlp):
  images, _, few = digits
  gan = SemiSupervisedGAN(network="mlp", num_steps=2, random_state=0)
  one = gan.fit(images, few)
  flat = clone(gan).set_params(image_shape=(8, 8)).fit(images.reshape(300, 64), few)
  as_bytes = np.round(images * 255 / 16).astype(np.uint8)
  scaled = clone(gan).fit(as_bytes, few)
  probs = one.predict_proba(images)
  assert np.array_equal(flat.predict_proba(images.reshape(300, 64)), probs)
  assert np.array_equal(scaled.predict_proba(as_bytes), probs)
  assert one.sample(3, random_state=0).shape == (3, 8, 8)
  assert flat.sample(3, random_state=0).shape == (3, 64)
  assert 1 < one.sample(3, random_state=0).max() <= 16
  expected = one.sample(3, random_state=0) * 255 / 16
  np.testing.assert_allclose(scaled.sample(3, random_state=0), expected, rtol=1e-5)


def test_numbers_of_any_type_are_on_the_scale_of_the_training(digits, small_mlp):
  """Digits from 0 to 16, trained on as floats and predicted as bytes, and the reverse."""
  images, _, few = digits
  for types in ((np.float64, np.uint8), (np.uint8, np.float32)):
    fitted = SemiSupervisedGAN(network="mlp", num_steps=2, random_state=0).fit(images.astype(types[0]), few)
    one, other = (fitted.predict_proba(images.astype(each)) for each in types)
    assert np.array_equal(one, other)


def test_vectors_are_scaled_as_those_of_a_file(small_mlp):
  """By the quantiles of `Scaling`: one outlier does not squeeze the others."""
  x = np.random.default_rng(0).normal(size=(3000, 3))
  x[0, 0] = 1e9
  fitted = SemiSupervisedGAN(num_steps=1, random_state=0).fit(x, np.arange(3000) % 2)
  scaling = Scaling.of(x)
  model = dataclasses.replace(fitted.model_, scaling=scaling)
  np.testing.assert_allclose(fitted.predict_proba(x), model.predict(scaling.apply(x)), atol=1e-6)
  assert len(np.unique(fitted.predict_proba(x).round(6))) > 100


def test_it_is_pickled_with_what_it_learned(digits, small_mlp):
  images, _, few = digits
  fitted = SemiSupervisedGAN(network="mlp", num_steps=2, random_state=0).fit(images, few)
  again = pickle.loads(pickle.dumps(fitted))
  assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))
  assert np.array_equal(again.transform(images), fitted.transform(images))
  other = clone(fitted).set_params(random_state=1).fit(images, few)
  assert not np.array_equal(other.predict_proba(images), fitted.predict_proba(images))


def test_a_second_fit_of_an_equal_estimator_compiles_nothing(digits, small_mlp, monkeypatch):
  """As in a cross-validation; what differs is the data and the seed."""
  images, _, few = digits
  gan = SemiSupervisedGAN(network="mlp", num_steps=2, random_state=0).fit(images, few)
  monkeypatch.setattr(recipes.Recipe, "make_step", lambda self: pytest.fail("a step is made anew"))
  other = clone(gan).set_params(random_state=1).fit(images[::-1], few[::-1])
  assert not np.array_equal(other.predict_proba(images), gan.predict_proba(images))


def test_vectors_of_bytes_are_vectors(digits, small_mlp):
  """Binary features, which as images would be nearly black; the model takes them as they are."""
  images, _, few = digits
  x = (images.reshape(300, 64) > 8).astype(np.uint8)
  gan = SemiSupervisedGAN(num_steps=2, random_state=0).fit(x, few)
  probs = gan.predict_proba(x)
  assert np.array_equal(clone(gan).fit(x.astype(np.int64), few).predict_proba(x), probs)
  np.testing.assert_allclose(gan.model_.predict(x.astype(np.float32)), probs, atol=1e-6)


def test_a_single_class_is_refused(small_mlp):
  with pytest.raises(ValueError, match="y has only one class, 1: -1 is no class"):
    SemiSupervisedGAN().fit(np.eye(4), np.array([-1, 1, 1, -1]))


def test_parameters_may_be_numbers_of_numpy(digits, small_mlp):
  images, _, few = digits
  numbers = {"num_steps": np.int64(2), "learning_rate": np.float32(0.01)}
  assert SemiSupervisedGAN(network="mlp", random_state=0, **numbers).fit(images, few).n_iter_ == 2


def test_pipelines_and_cross_validation(digits, small_mlp):
  images, y, _ = digits
  gan = SemiSupervisedGAN(num_steps=40, random_state=0)  # vectors: the mlp
  scores = cross_val_score(make_pipeline(StandardScaler(), gan), images.reshape(300, 64), y, cv=2)
  assert scores.min() > 0.4  # chance is 0.1


def test_rows_without_a_label_have_no_score(digits, small_mlp):
  images, y, few = digits
  gan = SemiSupervisedGAN(network="mlp", num_steps=40, random_state=0).fit(images, few)
  labelled = few >= 0
  weight = np.linspace(1, 2, len(few))
  expected = gan.score(images[labelled], y[labelled], weight[labelled])
  assert gan.score(images, few, weight) == expected > 0
  assert cross_val_score(gan, images, few, cv=2).min() > 0.2  # chance is 0.1
  with pytest.raises(ValueError, match="no accuracy without labels"):
    gan.score(images, np.full(len(images), -1))


def test_images_with_the_channels_first_are_refused():
  with pytest.raises(ValueError, match=r"shape \(3, 8, 8\) have no 1 or 3 channels: put the channels last"):
    SemiSupervisedGAN().fit(np.zeros((6, 3, 8, 8)), np.arange(6))


def test_it_learns_the_digits_from_few_labels():
  """The conv pair, on real digits: 5 labels per class, the rest unlabelled."""
  images, y = load_digits(return_X_y=True)
  images, train = images.reshape(-1, 8, 8), np.arange(len(y)) % 3 < 2
  few = np.full(train.sum(), -1)
  for k in range(10):
    few[np.flatnonzero(y[train] == k)[:5]] = k
  gan = gan_jax.SemiSupervisedGAN(network="article", num_steps=150, random_state=0)
  assert gan.fit(images[train], few).score(images[~train], y[~train]) > 0.7


def test_training_that_was_interrupted_warns(digits, small_mlp, monkeypatch):
  x, y = digits[:2]
  fit = train.fit
  monkeypatch.setattr(train, "fit", lambda *a, **k: dataclasses.replace(fit(*a, **k), interrupted=True))
  with pytest.warns(UserWarning, match="training was interrupted: the classifier is only partly trained"):
    assert SemiSupervisedGAN(network="mlp", num_steps=2).fit(x, y).n_iter_ == 2


def test_vat_is_part_of_the_recipe(digits, small_mlp):
  x, y = digits[:2]
  gan = SemiSupervisedGAN(network="mlp", num_steps=2, adversarial=0.0, vat=0.5).fit(x, y)
  hparams = gan.model_.recipe.hparams
  assert hparams.vat == 0.5
  norms = np.linalg.norm(x.reshape(len(x), -1) / x.max(), axis=1)
  assert hparams.vat_epsilon == pytest.approx(0.4 * norms.mean(), rel=0.02)


def test_after_a_fit_that_failed_no_earlier_one_answers(digits, small_mlp):
  x, y = digits[:2]
  gan = SemiSupervisedGAN(network="mlp", num_steps=2).fit(x, y)
  with pytest.raises(ValueError, match="y has no label"):
    gan.fit(x, np.full(len(x), -1))
  with pytest.raises(NotFittedError):
    gan.predict(x)


BAD = [
  ({}, np.full(6, -1), "y has no label"),
  ({}, np.array(["a", "b", "-1", "-1", "-1", "-1"]), "y holds the text -1"),
  ({}, np.array(["a", "b", "-1", -1, "a", "b"], object), "y holds the text -1"),
  ({}, np.array(["a", "b", None, -1, "a", "b"], object), "y holds None"),
  ({}, np.array(["a", "b", "", -1, "a", "b"], object), "y holds ''"),
  ({"network": "unet"}, np.arange(6), "unknown network unet: choose from auto, "),
  ({"augmentation": "signs"}, np.arange(6), "unknown augmentation signs: choose from digits, "),
  ({"num_steps": 0}, np.arange(6), "num_steps must be a whole number of at least 1"),
  ({"image_shape": (3, 3)}, np.arange(6), r"does not hold images of shape \(3, 3\)"),
  ({"image_shape": 8}, np.arange(6), "does not hold images of shape 8"),
  ({"network": "conv"}, np.arange(6), "too small"),
]


@pytest.mark.parametrize(("params", "y", "words"), BAD)
def test_bad_input(params, y, words):
  with pytest.raises(ValueError, match=words):
    SemiSupervisedGAN(**params).fit(np.eye(6), y)
