"""The one reader of the test set: errors, probes and predictions of trained discriminators.

Whatever needs test images goes through `with_test_set`, once, when training is over. The keys of all that
is random after training are here too, see `sample`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from gan_jax import metrics, objectives, probe, steps
from gan_jax.datasets import Dataset
from gan_jax.recipes import Recipe
from gan_jax.types import TrainState


def with_test_set(dataset: Dataset) -> Dataset:
  """The dataset with its test images: no other function of the package or its experiments reads them."""
  return dataset


# --- Discriminators


@dataclass(frozen=True)
class Evaluation:
  """A trained discriminator on the test set; errors in percent."""

  error: float | None
  """Of its own classes; None for a discriminator without them."""
  linear: dict[str, float]
  """Of a linear probe: layer -> error. `features` are those that the discriminator returns."""
  nearest: dict[str, float]
  """Of the nearest labelled neighbour: layer -> error; empty unless every layer was asked for."""
  logits: Float[np.ndarray, "n k"]
  confusion: Int[np.ndarray, "k k"] | None
  """Counts `[true class, predicted class]`."""


Labelled = tuple[UInt8[Any, "n h w c"], Int[Any, "n"]]
"""Labelled images as bytes, and their classes."""


def make_evaluate(
  recipe: Recipe, *, every_layer: bool = False, l2: float = 1.0
) -> Callable[[Dataset, Sequence[TrainState], Sequence[Labelled]], list[Evaluation]]:
  """Builds `evaluate(dataset, states, labelled)`, which reads the test set once for all states.

  It reads the averaged discriminators, compiled once for all of them. The probes are fitted on the labelled
  images of each state, which are those of its training.

  Args:
    recipe: what the states were trained with, up to the objective.
    every_layer: fits probes on every layer, not on the features alone.
    l2: of the linear probe, see `probe.fit_linear`: the number of copies of each labelled image.
  """
  classify, layers = steps.make_classifier(recipe.d), probe.make_layers(recipe.d, recipe.image_shape)

  @jax.jit
  def read(state: TrainState, x: Float[Array, "b h w c"]) -> tuple[Array, dict[str, Array]]:
    logits, features = classify(state, x)
    return logits, layers(state, x) if every_layer else {"features": features}

  @jax.jit
  def fit_linear(features: dict[str, Array], y: Array) -> dict[str, probe.LinearProbe]:
    fit = lambda h: probe.fit_linear(h, y, num_classes=recipe.num_classes, l2=l2)
    return {name: fit(h) for name, h in features.items()}

  def evaluate(
    dataset: Dataset, states: Sequence[TrainState], labelled: Sequence[Labelled]
  ) -> list[Evaluation]:
    test, found = with_test_set(dataset), []
    y = np.asarray(test.y_test)
    for state, (x_lab, y_lab) in zip(states, labelled, strict=True):
      predict = lambda x, state=state: metrics.predict(lambda x: read(state, x), x)
      (_, features_lab), y_lab = predict(np.asarray(x_lab)), jnp.asarray(y_lab, jnp.int32)
      logits, features = predict(test.x_test)
      linear = {
        name: metrics.error_percent(np.asarray(fitted.logits(features[name])), y)
        for name, fitted in fit_linear(features_lab, y_lab).items()
      }
      nearest = {}
      for name, h in features_lab.items() if every_layer else ():
        classes = probe.fit_nearest(jnp.asarray(h), y_lab).classes(features[name])
        nearest[name] = 100 * float(np.mean(np.asarray(classes) != y))
      taught = logits.shape[-1] == dataset.num_classes
      found.append(
        Evaluation(
          error=metrics.error_percent(logits, y) if taught else None,
          linear=linear,
          nearest=nearest,
          logits=logits,
          confusion=metrics.confusion_matrix(logits, y) if taught else None,
        )
      )
    return found

  return evaluate


def error_of(
  classify: Callable[[UInt8[np.ndarray, "n h w c"]], Int[np.ndarray, "n"]], dataset: Dataset
) -> float:
  """Test error in percent of any other classifier, images as bytes to classes."""
  test = with_test_set(dataset)
  return 100 * float(np.mean(classify(test.x_test) != test.y_test))


# --- Generators


def load_feature_extractor(dataset: Dataset, **kwargs: Any) -> metrics.FeatureExtractor:
  """The feature extractor for Frechet distances to this test set, see `metrics.load_feature_extractor`."""
  return metrics.load_feature_extractor(with_test_set(dataset), **kwargs)


def sample(
  recipe: Recipe,
  state: TrainState,
  num: int,
  *,
  seed: int,
  purpose: str = "grid",
  y: Int[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "n h w c"]:
  """Images in [0, 1] from the averaged generator, `num` of them, of the classes `y` where it is given.

  An image depends on its own latent alone. Each purpose has keys of its own: `jax.random.key(seed)` folded
  with the purpose, see `objectives.named_key`, and with the number of the batch of 500.
  """
  draw = jax.jit(steps.make_sampler(recipe.g), static_argnums=2)
  variables = steps.generator_variables(recipe.g, state)
  batch, key, rows = min(num, 500), objectives.named_key(jax.random.key(seed), purpose), []
  for i in range(-(-num // batch)):
    classes = () if y is None else (jnp.resize(y[i * batch : (i + 1) * batch], (batch,)),)
    rows.append(np.asarray(draw(variables, jax.random.fold_in(key, i), batch, *classes)))
  return np.concatenate(rows)[:num]
