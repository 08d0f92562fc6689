"""What is optimised: a view of one update, terms over it, and published methods as sums of terms.

An `Objective` is two mappings, one for D and one for G, from a metric's name to a weight and a term.
The step sums the terms, so a new loss is one function here and one line in an experiment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from gan_jax import losses
from gan_jax.types import Augment, Batch, DiscriminatorFn


class Part(NamedTuple):
  """What D saw of one kind of image, and what it said."""

  x: Float[Array, "b h w c"]
  """The images that entered D, augmented, in [0, 1]."""
  logits: Float[Array, "b k"]
  features: Float[Array, "b f"]


@dataclass(frozen=True)
class View:
  """One update as its terms see it."""

  lab: Part
  """Labelled images. In G's view a part of zero rows."""
  unl: Part
  """Unlabelled images. In G's view they are constants."""
  fake: Part
  """Generated images. In D's view they are constants."""
  batch: Batch
  """The batch behind it, as it came."""
  key: Key[Array, ""]
  """A key of the term's own; the term consumes it."""
  d_fn: DiscriminatorFn
  """The discriminator, for terms that need another pass."""


Term = Callable[[View], Float[Array, ""]]
Weight = float | optax.Schedule


@dataclass(frozen=True)
class Objective:
  """What D and G minimise: metric name -> (weight, term). Without terms a network is not updated."""

  d: Mapping[str, tuple[Weight, Term]]
  g: Mapping[str, tuple[Weight, Term]] = field(default_factory=dict)

  def __post_init__(self):
    # A weight of zero removes its term before anything is traced.
    for name in ("d", "g"):
      kept = {k: (w, t) for k, (w, t) in getattr(self, name).items() if callable(w) or w != 0}
      object.__setattr__(self, name, kept)


def total(
  terms: Mapping[str, tuple[Weight, Term]], view: View, step: Array
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Weighted sum of the terms, and each term by its name before its weight."""
  values, loss = {}, jnp.zeros(())
  for i, (name, (weight, term)) in enumerate(terms.items()):
    values[name] = term(replace(view, key=jax.random.fold_in(view.key, i)))
    loss += (weight(step) if callable(weight) else weight) * values[name]
  return loss, values


# --- Terms


def supervised(view: View) -> Float[Array, ""]:
  """Mean cross-entropy of the labelled images."""
  return losses.cross_entropy(view.lab.logits, view.batch.y_lab).mean()


def realness_d(loss: losses.Adversarial) -> Term:
  """D's half of an adversarial loss on the realness of unlabelled and generated images."""

  def term(view: View) -> Float[Array, ""]:
    real, fake = loss.d(losses.realness(view.unl.logits), losses.realness(view.fake.logits))
    return real.mean() + fake.mean()

  return term


def realness_g(loss: losses.Adversarial) -> Term:
  """G's half of the same."""

  def term(view: View) -> Float[Array, ""]:
    return loss.g(losses.realness(view.unl.logits), losses.realness(view.fake.logits)).mean()

  return term


def feature_matching(view: View) -> Float[Array, ""]:
  """Mean squared difference of the mean features of unlabelled and generated images."""
  return losses.feature_matching(view.unl.features, view.fake.features).mean()


def consistency(weak: Augment, *, threshold: float) -> Term:
  """Unlabelled images, as augmented as D saw them, keep the class that D gives them under `weak`.

  The second pass is for the target alone, so it is a forward pass.
  """

  def term(view: View) -> Float[Array, ""]:
    key_augment, key_d = jax.random.split(view.key)
    logits_weak, _ = view.d_fn(weak(key_augment, view.batch.x_unl), key_d)
    return losses.consistency(logits_weak, view.unl.logits, threshold=threshold).mean()

  return term


# --- Methods


def supervised_only() -> Objective:
  """The control: labelled images and nothing else."""
  return Objective(d={"supervised": (1.0, supervised)})


def semi_supervised_gan(
  *,
  adversarial: float = 0.5,
  consistency_weight: Weight = 0.0,
  weak: Augment | None = None,
  threshold: float = 0.95,
) -> Objective:
  """The K + 1 discriminator against a feature-matching generator, with or without consistency.

  `L_D = CE(x_lab, y) + a [E softplus(-r(x_unl)) + E softplus(r(G(z)))] + c L_consistency`,
  `L_G = mean_j (E f_j(x_unl) - E f_j(G(z)))^2`, with `r` the realness logit and `f` the features.

  Args:
    adversarial: a. The published recipe has 1/2: "is it real?" is then one question, asked half of
      the time on real and half of the time on generated images, beside the one question "which class?".
      With 0 there is no GAN: D does not look at generated images and G is not trained.
    consistency_weight: c, a number or a schedule; 0 gives the published GAN.
    weak: the augmentation under which an image has its class; needed where c is not 0.
    threshold: confidence from which an image's own class is taught, in [0, 1].

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, sections 3.1 and 5.
    Sohn et al., 2020, https://arxiv.org/abs/2001.07685 (the consistency term).
  """
  d: dict[str, tuple[Weight, Term]] = {
    "supervised": (1.0, supervised),
    "realness": (adversarial, realness_d(losses.non_saturating)),
  }
  if weak is not None:
    d["consistency"] = (consistency_weight, consistency(weak, threshold=threshold))
  elif consistency_weight:
    raise ValueError("a consistency weight needs the weak augmentation that gives the targets")
  g: dict[str, tuple[Weight, Term]] = {"feature_matching": (1.0, feature_matching)}
  return Objective(d=d, g=g if adversarial else {})
