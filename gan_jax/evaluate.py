"""The only reader of the test set: errors, probes and predictions of trained discriminators.

All access to test images goes through `with_test_set`: errors and probes once, after training, and the
moments of a Frechet distance, which no update sees. The keys for all randomness after training are derived
here too, see `sample`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from gan_jax import data, losses, metrics, objectives, probe, steps
from gan_jax.dataset import Dataset
from gan_jax.recipes import Recipe
from gan_jax.types import InputError, Json, TrainState


def with_test_set(dataset: Dataset) -> Dataset:
  """The dataset with its test images: no other function of the package or its experiments reads them."""
  return dataset


# --- Discriminators

NUM_PROBED = 60_000
"""The most labelled images, evenly spaced, that the probes are fitted on: their features are in memory."""
NUM_SHOWN = 16
"""Test images of each kind that are kept for inspection."""


class Shown(NamedTuple):
  """A few test images for inspection."""

  indices: Int[np.ndarray, "m"]
  """Their positions, see `Evaluation.indices`."""
  x: UInt8[np.ndarray, "m h w c"]
  y: Int[np.ndarray, "m"]
  """True classes."""
  probs: Float[np.ndarray, "m k"]
  """Class probabilities."""


@dataclass(frozen=True)
class Evaluation:
  """Results of a trained discriminator on the test set; errors in percent."""

  error: float | None
  """Error of D's own predictions; None for a discriminator without classes."""
  linear: dict[str, float]
  """Errors of linear probes, by layer. `features` are those that the discriminator returns."""
  nearest: dict[str, float]
  """Errors of the nearest labelled neighbour, by layer; empty unless `every_layer` was requested."""
  logits: Float[np.ndarray, "n k"]
  """Of the K classes; what follows from them exists only for a discriminator with classes."""
  y: Int[np.ndarray, "n"]
  """True classes."""
  x: UInt8[Any, "n h w c"]
  """The images, an array or `data.Chosen`."""
  indices: Int[np.ndarray, "n"]
  """Their positions in the test set, or in the training set for cross-validation."""

  @cached_property
  def probs(self) -> Float[np.ndarray, "n k"]:
    """Class probabilities `p(y | x, real)`."""
    return np.asarray(losses.class_probs(jnp.asarray(self.logits)))

  @cached_property
  def confusion(self) -> Int[np.ndarray, "k k"]:
    """Counts `[true class, predicted class]`."""
    return metrics.confusion_matrix(self.logits, self.y)

  @cached_property
  def least_certain(self) -> Shown:
    """The images with the lowest confidence, ascending."""
    return self._shown(np.argsort(self.probs.max(axis=-1), kind="stable"))

  @cached_property
  def worst(self) -> Shown:
    """The errors with the lowest probability of the true class, ascending."""
    wrong = np.flatnonzero(self.probs.argmax(axis=-1) != self.y)
    return self._shown(wrong[np.argsort(self.probs[wrong, self.y[wrong]], kind="stable")])

  def _shown(self, rows: Int[np.ndarray, "n"]) -> Shown:
    rows = rows[:NUM_SHOWN]
    return Shown(self.indices[rows], self.x[rows], self.y[rows], self.probs[rows])


_fit_linear = jax.jit(probe.fit_linear, static_argnames="num_classes")  # traced once for equal shapes
Labelled = tuple[Any, Int[Any, "n"]]
"""Labelled images as bytes, an array `[N, H, W, C]` or `data.Chosen`, and their classes."""


def make_evaluate(
  recipe: Recipe, *, every_layer: bool = False, of_input: bool = False
) -> Callable[[Dataset, Sequence[TrainState], Sequence[Labelled]], list[Evaluation]]:
  """Builds `evaluate(dataset, states, labelled)`, which opens the test set once for all states.

  It evaluates the averaged discriminators, compiled once for all of them. The probes of each state are
  fitted on the labelled images that it was trained on, at most `NUM_PROBED` of them.

  Args:
    recipe: the recipe of the states; only its objective may differ.
    every_layer: fits probes on every layer, not only on the features.
    of_input: also fits a linear probe on the input, pixels or vectors, reported as `input`.

  Raises:
    InputError: by `evaluate`, if there are no test images.
  """
  classify, layers = steps.make_classifier(recipe.d), probe.make_layers(recipe.d, recipe.image_shape)

  @jax.jit
  def read(state: TrainState, x: Float[Array, "b h w c"]) -> tuple[Array, dict[str, Array]]:
    logits, features = classify(state, x)
    probed = layers(state, x) if every_layer else {"features": features}
    return logits, probed | ({"input": x.reshape(x.shape[0], -1)} if of_input else {})

  @jax.jit
  def fit(features: dict[str, Array], y: Array) -> tuple[dict[str, Any], dict[str, Any]]:
    linear = {name: _fit_linear(h, y, num_classes=recipe.num_classes) for name, h in features.items()}
    return linear, {name: probe.fit_nearest(h, y) for name, h in features.items() if every_layer}

  @jax.jit
  def answers(state: TrainState, probes: tuple[dict, dict], x: Float[Array, "b h w c"]):
    """D's logits and the probes' classes; the features of all test images might not fit in memory."""
    (logits, features), (linear, nearest) = read(state, x), probes
    of_linear = {name: fitted.logits(features[name]).argmax(axis=-1) for name, fitted in linear.items()}
    return logits, of_linear, {name: fitted.classes(features[name]) for name, fitted in nearest.items()}

  def evaluate(
    dataset: Dataset, states: Sequence[TrainState], labelled: Sequence[Labelled]
  ) -> list[Evaluation]:
    test, found = with_test_set(dataset), []
    if not len(test.x_test):
      raise InputError(f"{dataset.name} has no test images to evaluate on")
    y = np.asarray(test.y_test)
    for state, (x_lab, y_lab) in zip(states, labelled, strict=True):
      if len(y_lab) > NUM_PROBED:
        rows = data.evenly_spaced(np.arange(len(y_lab)), NUM_PROBED)
        x_lab, y_lab = data.Chosen(x_lab, rows), np.asarray(y_lab)[rows]
      _, features = metrics.predict(partial(read, state), x_lab)
      probes = fit(features, jnp.asarray(y_lab, jnp.int32))
      logits, *classes = metrics.predict(partial(answers, state, probes), test.x_test)
      linear, nearest = (
        {name: 100 * float(np.mean(given != y)) for name, given in each.items()} for each in classes
      )
      error = metrics.error_percent(logits, y) if logits.shape[-1] == dataset.num_classes else None
      found.append(Evaluation(error, linear, nearest, logits, y, test.x_test, np.arange(len(y))))
    return found

  return evaluate


def pooled(found: Sequence[Evaluation], images: data.Chosen) -> Evaluation:
  """Pools several evaluations of one recipe on disjoint images.

  Args:
    found: evaluations of discriminators with the same classes.
    images: the images of all, in this order.
  """
  logits, y = (np.concatenate([getattr(each, name) for each in found]) for name in ("logits", "y"))
  num = [len(each.y) for each in found]
  mean = lambda errors: float(np.average(errors, weights=num))
  return Evaluation(
    error=metrics.error_percent(logits, y),
    linear={name: mean([each.linear[name] for each in found]) for name in found[0].linear},
    nearest={name: mean([each.nearest[name] for each in found]) for name in found[0].nearest},
    logits=logits,
    y=y,
    x=images,
    indices=images.rows,
  )


def describe(found: Evaluation, class_names: Sequence[str]) -> Json:
  """Test metrics of a classifier in `result.json`, besides its error.

  `num_test_images`; `test_error_interval`, 95 % for this one classifier, and `balanced_test_error`, both
  in percent; `test_recall`, percent by class, None for a class without test images; `calibration_error` in
  [0, 1].
  """
  num, counts = len(found.y), found.confusion
  recall = metrics.recall(counts)
  names = zip(class_names, recall.tolist(), strict=True)
  return {
    "num_test_images": num,
    "test_error_interval": metrics.binomial_interval(num - int(np.trace(counts)), num),
    "balanced_test_error": float(np.nanmean(100 - recall)),  # rare classes count like others
    "test_recall": {name: None if np.isnan(value) else value for name, value in names},
    "calibration_error": metrics.calibration_error(found.probs, found.y),
  }


def error_of(
  classify: Callable[[UInt8[np.ndarray, "n h w c"]], Int[np.ndarray, "n"]], dataset: Dataset
) -> float:
  """Test error in percent of any other classifier, a function from images as bytes to classes."""
  test = with_test_set(dataset)
  return 100 * float(np.mean(classify(test.x_test) != test.y_test))


# --- Generators

SAMPLES = 500
"""The most images that are generated at a time."""

# Linen modules compare by value, so one compiled program serves all states of a generator.
_sampler = cache(lambda g: jax.jit(steps.make_sampler(g), static_argnums=2))


def load_feature_extractor(dataset: Dataset) -> metrics.FeatureExtractor:
  """The feature extractor for Frechet distances to this test set, see `metrics.load_feature_extractor`."""
  return metrics.load_feature_extractor(with_test_set(dataset))


def generator_quality(
  extractor: metrics.FeatureExtractor,
  recipe: Recipe,
  state: TrainState,
  dataset: Dataset,
  num: int,
  *,
  seed: int,
) -> Json:
  """`metrics.generator_quality` of `num` images of the averaged generator."""
  x = sample(recipe, state, num, seed=seed, purpose="frechet")
  return metrics.generator_quality(extractor, x, metrics.training_moments(extractor, dataset, num))


def sample(
  recipe: Recipe,
  state: TrainState,
  num: int,
  *,
  seed: int,
  purpose: str = "grid",
  y: Int[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "n h w c"]:
  """`num` images in [0, 1] from the averaged generator, of the classes `y` if given.

  Each image depends only on its own latent. Each purpose has its own keys: `jax.random.key(seed)` folded
  with the purpose, see `objectives.named_key`, and with the index of the batch of `SAMPLES`.
  """
  draw = _sampler(recipe.g)
  variables = steps.with_statistics(recipe.g, state).averaged("g")
  batch, key, rows = min(num, SAMPLES), objectives.named_key(jax.random.key(seed), purpose), []
  for i in range(-(-num // batch)):
    classes = () if y is None else (jnp.resize(y[i * batch : (i + 1) * batch], (batch,)),)
    rows.append(np.asarray(draw(variables, jax.random.fold_in(key, i), batch, *classes)))
  return np.concatenate(rows)[:num]
