"""Published methods side by side, each an `Objective`: a weighted sum of terms for D and one for G."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from gan_jax import losses, terms
from gan_jax.terms import StepOutputs, Term
from gan_jax.types import Augment

Weight = float | optax.Schedule
Weighted = Mapping[str, tuple[Weight, Term]]
"""Metric name -> (weight, term)."""
OTHER_METRICS = (
  *("loss", "error", "grad_norm", "update_norm"),
  *("real_logit_real", "real_logit_fake", "real_sign", "strength", "overfitting"),
)
"""The metrics of a step that are no terms, see `steps.make_step`."""
GAN_TERMS = (
  *("adversarial", "r1", "r2", "wgan_gp", "mixed"),
  *("confident_generated", "undecided_generated", "generated"),
)
"""D's terms that need a generator, or only make sense beside an adversarial loss."""


@dataclass(frozen=True)
class Objective:
  """What D and G minimise. A network without terms is not updated.

  Raises:
    ValueError: a term has the name of another metric.
  """

  d: Weighted
  g: Weighted = field(default_factory=dict)
  boundary: float | None = 0.0
  """Of the adversarial loss, see `losses.Adversarial`."""

  def __post_init__(self):
    # A weight of zero removes its term before anything is traced.
    for network in ("d", "g"):
      kept = {k: (w, t) for k, (w, t) in getattr(self, network).items() if callable(w) or w != 0}
      object.__setattr__(self, network, kept)
      if taken := sorted(set(kept).intersection(OTHER_METRICS)):
        raise ValueError(f"a term cannot be called {taken[0]}: that is another metric of the step")

  def plus(self, **d: tuple[Weight, Term]) -> "Objective":
    """The objective with further terms for D; one of the same name is replaced."""
    return replace(self, d={**self.d, **d})


def weighted_sum(
  weighted: Weighted, outputs: StepOutputs
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """The loss, and the unweighted value of each term by name.

  A term's key derives from its name, so the other terms of an objective do not change its random numbers.
  """
  values, loss = {}, jnp.zeros(())
  for name, (weight, term) in weighted.items():
    values[name] = term(replace(outputs, key=named_key(outputs.key, name)))
    loss += (weight(outputs.step) if callable(weight) else weight) * values[name]
  return loss, values


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
  """The key of this name. Unlike small integers, hashed names are not indices of a `split` of the key."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def gan(
  loss: losses.Adversarial = losses.non_saturating,
  *,
  penalty: Literal["none", "r1", "r2", "r1_r2", "wgan_gp"] = "none",
  gamma: float = 1.0,
  penalty_every: int = 1,
  rotation_weight: float = 0.0,
  labelled: bool = False,
) -> Objective:
  """A GAN: any adversarial loss, with or without a gradient penalty and self-supervision.

  `L_D = E loss_d + gamma L_penalty + w L_rotation(x)`, `L_G = E loss_g + 0.2 w L_rotation(G(z))`. A
  class-conditional generator is trained on the logit of its requested class.

  Args:
    loss: the adversarial loss.
    penalty: on D's gradient at real images (r1), generated ones (r2), both, or between them (wgan_gp).
    gamma: the penalty's weight, for pixels in [0, 1]; for R1 and R2, a quarter of the weight for [-1, 1],
      see `penalties`.
    penalty_every: interval between applications of the penalty, in steps.
    rotation_weight: w; G's factor of 0.2 is the paper's.
    labelled: whether labelled images also count as real.
  """
  kinds: dict[str, dict[str, Term]] = {
    "none": {},
    "r1": {"r1": terms.r1(labelled=labelled)},
    "r2": {"r2": terms.r2},
    "r1_r2": {"r1": terms.r1(labelled=labelled), "r2": terms.r2},
    "wgan_gp": {"wgan_gp": terms.wgan_gp(labelled=labelled)},
  }
  d: dict[str, tuple[Weight, Term]] = {"adversarial": (1.0, terms.adversarial_d(loss, labelled=labelled))}
  d |= {name: (gamma, terms.every_k(term, penalty_every)) for name, term in kinds[penalty].items()}
  d["rotation"] = (rotation_weight, terms.rotation(lambda outputs: terms.real_images(outputs, labelled)))
  return Objective(
    d=d,
    g={
      "adversarial": (1.0, terms.adversarial_g(loss, labelled=labelled)),
      "rotation": (0.2 * rotation_weight, terms.rotation(lambda outputs: outputs.fake)),
    },
    boundary=loss.boundary,
  )


def supervised_only() -> Objective:
  """The supervised control: labelled images only."""
  return Objective(d={"supervised": (1.0, terms.supervised)})


def semi_supervised_gan(
  *,
  adversarial: float = 0.5,
  consistency_weight: Weight = 0.0,
  weak: Augment | None = None,
  threshold: float = 0.95,
) -> Objective:
  """The (K+1)-class discriminator against a feature-matching generator, with or without consistency.

  `L_D = CE(x_lab, y) + a [E softplus(-r(x_unl)) + E softplus(r(G(z)))] + c L_consistency`,
  `L_G = mean_j (E f_j(x_unl) - E f_j(G(z)))^2`, with `r` the real logit and `f` the features.

  Args:
    adversarial: a. The published recipe has 1/2: the real-or-fake loss, half on real and half on generated
      images, then weighs as much as the class loss. With 0 there is no GAN: D does not use generated images
      and G is not trained.
    consistency_weight: c, a number or a schedule; 0 gives the published GAN.
    weak: augmentation of the images that give consistency targets; required if c is not 0.
    threshold: minimum confidence of a pseudo-label, in [0, 1].

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, sections 3.1 and 5.
    Sohn et al., 2020, https://arxiv.org/abs/2001.07685 (the consistency term).
  """
  d: dict[str, tuple[Weight, Term]] = {
    "supervised": (1.0, terms.supervised),
    "adversarial": (adversarial, terms.adversarial_d(losses.non_saturating)),
  }
  if weak is not None:
    d["consistency"] = (consistency_weight, terms.consistency(weak, threshold=threshold))
  elif consistency_weight:
    raise ValueError("a consistency weight needs the weak augmentation that gives the targets")
  g: dict[str, tuple[Weight, Term]] = {"feature_matching": (1.0, terms.feature_matching)}
  return Objective(d=d, g=g if adversarial else {})


def conditional_gan(
  loss: losses.Adversarial = losses.non_saturating,
  *,
  consistency_weight: Weight = 0.0,
  weak: Augment | None = None,
  threshold: float = 0.95,
  **penalty: Any,
) -> Objective:
  """A class-conditional GAN with any number of labels, over the same K logits.

  G's loss always uses the logit `l_y` of the requested class. In a batch of labelled images, so does D's
  loss: the logit of its label for a real image, that of the requested class for a generated one. With
  unlabelled images in the batch, D only decides "is it real?", by the logsumexp of all logits, and
  cross-entropy and consistency teach it which logit an image raises. Then
  `l_y = logsumexp(l) + log p(y | x, real)` trains G to make images that look real and look like y.

  Args:
    loss: the adversarial loss.
    consistency_weight: as in `semi_supervised_gan`, like `weak` and `threshold`.
    weak: augmentation of the images that give consistency targets.
    threshold: minimum confidence of a pseudo-label.
    penalty: `penalty`, `gamma`, `penalty_every` and `rotation_weight` as in `gan`.
  """
  adversarial = gan(loss, labelled=True, **penalty)
  classifier = semi_supervised_gan(
    adversarial=0.0, consistency_weight=consistency_weight, weak=weak, threshold=threshold
  )
  return adversarial.plus(**classifier.d)


def bad_gan(*, entropy_weight: Weight, density_weight: Weight, quantile: float = 0.1) -> Objective:
  """Bad GAN: low-density samples push decision boundaries away from the data.

  `L_D = CE(x_lab, y) + 1/2 [E softplus(-r(x_unl)) + E softplus(r(G(z)))] + e E H(p(. | x_unl))`,
  `L_G = mean_j (E f_j(x_unl) - E f_j(G(z)))^2 + w E max(log p(f(G(z))) - tau, 0)`.

  Omits the paper's terms for the entropy of G, which it uses for larger images.

  Args:
    entropy_weight: e.
    density_weight: w.
    quantile: tau is this quantile of the real images' densities, see `losses.high_density`.

  References:
    Dai et al., 2017, https://arxiv.org/abs/1705.09783, section 4.
  """
  published = semi_supervised_gan()
  low_density = density_weight, terms.low_density(quantile=quantile)
  return Objective(
    d=published.plus(entropy=(entropy_weight, terms.entropy)).d,
    g={**published.g, "low_density": low_density},
  )


def virtual_adversarial_training(
  *, epsilon: float, weight: Weight = 1.0, entropy_weight: Weight = 1.0
) -> Objective:
  """`L_D = CE(x_lab, y) + w E KL(p(. | x_unl) || p(. | x_unl + r)) + e E H(p(. | x_unl))`.

  References:
    Miyato et al., 2018, https://arxiv.org/abs/1704.03976, section 3.3 and, with the entropy, section 4.
  """
  return Objective(
    d={
      "supervised": (1.0, terms.supervised),
      "virtual_adversarial": (weight, terms.virtual_adversarial(epsilon=epsilon)),
      "entropy": (entropy_weight, terms.entropy),
    }
  )


def mean_teacher(*, weight: Weight, weak: Augment) -> Objective:
  """`L_D = CE(x_lab, y) + w E |p(. | x_unl) - p'(. | weak(x_unl))|^2`, p' from averaged parameters.

  References:
    Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780.
  """
  return Objective(
    d={"supervised": (1.0, terms.supervised), "mean_teacher": (weight, terms.mean_teacher(weak))}
  )


def generator_augmented(*, weight: Weight) -> Objective:
  """A classifier trained on labelled images and on images from a class-conditional generator.

  `L_D = CE(x_lab, y) + w CE(G(z, y'), y')`. G has no terms: it is pretrained and stays fixed.
  """
  return Objective(d={"supervised": (1.0, terms.supervised), "generated": (weight, terms.generated)})
