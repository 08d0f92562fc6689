"""What is optimised: a view of one update, terms over it, and published methods as sums of terms.

An `Objective` is two mappings, one for D and one for G, from a metric's name to a weight and a term.
The step sums the terms, so a new loss is one function here and one line in an experiment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from gan_jax import augment, losses, penalties
from gan_jax.types import Augment, Batch, DiscriminatorFn


class Part(NamedTuple):
  """What D saw of one kind of image, and what it said."""

  x: Float[Array, "b h w c"]
  """The images that entered D, augmented, in [0, 1]."""
  logits: Float[Array, "b k"]
  features: Float[Array, "b f"]
  y: Int[Array, "b"]
  """The class, where D may know it: the label, or the class that G was asked for; else -1."""


@dataclass(frozen=True)
class View:
  """One update as its terms see it."""

  lab: Part
  """Labelled images. In G's view they are constants."""
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
  teacher_fn: DiscriminatorFn
  """The discriminator with averaged parameters, which are constants."""
  step: Int[Array, ""]
  """Updates done before this one."""


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
  terms: Mapping[str, tuple[Weight, Term]], view: View
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Weighted sum of the terms, and each term by its name before its weight."""
  values, loss = {}, jnp.zeros(())
  for i, (name, (weight, term)) in enumerate(terms.items()):
    values[name] = term(replace(view, key=jax.random.fold_in(view.key, i)))
    loss += (weight(view.step) if callable(weight) else weight) * values[name]
  return loss, values


# --- Terms


def supervised(view: View) -> Float[Array, ""]:
  """Mean cross-entropy of the labelled images."""
  return losses.cross_entropy(view.lab.logits, view.batch.y_lab).mean()


def adversarial_d(loss: losses.Adversarial, *, labelled: bool = False) -> Term:
  """D's half of an adversarial loss: `E loss(real) + E loss(fake)`.

  Args:
    loss: the pair.
    labelled: whether labelled images count as real ones too, as in class-conditional GANs. Else the
      real images are the unlabelled ones.
  """

  def term(view: View) -> Float[Array, ""]:
    real, fake = loss.d(_realness(_real(view, labelled)), _realness(_fake(view)))
    return real.mean() + fake.mean()

  return term


def adversarial_g(loss: losses.Adversarial, *, labelled: bool = False) -> Term:
  """G's half of the same."""

  def term(view: View) -> Float[Array, ""]:
    return loss.g(_realness(_real(view, labelled)), _realness(view.fake)).mean()

  return term


def _realness(part: Part) -> Float[Array, "b"]:
  return losses.known_realness(part.logits, part.y)


def _real(view: View, labelled: bool) -> Part:
  """The real images of an adversarial loss; with their classes only where all of them have one.

  Some images with a class and some without would leave D a way out: a logit that answers for labelled
  images and for generated ones of its class, and beside it any logit at all for an unlabelled image.
  """
  if not labelled:
    return view.unl
  real = Part(*(jnp.concatenate(pair) for pair in zip(view.lab, view.unl, strict=True)))
  return _without_class(real) if len(view.unl.x) else real


def _fake(view: View) -> Part:
  """The generated images as D's own update judges them: by their class only beside real ones that are."""
  return _without_class(view.fake) if len(view.unl.x) else view.fake


def _without_class(part: Part) -> Part:
  return part._replace(y=jnp.full_like(part.y, -1))


def feature_matching(view: View) -> Float[Array, ""]:
  """Mean squared difference of the mean features of unlabelled and generated images."""
  return losses.feature_matching(view.unl.features, view.fake.features).mean()


def consistency(weak: Augment, *, threshold: float) -> Term:
  """Unlabelled images, as augmented as D saw them, keep the class that the averaged D gives under `weak`.

  The second pass is for the target alone, so it is a forward pass.
  """

  def term(view: View) -> Float[Array, ""]:
    key_augment, key_d = jax.random.split(view.key)
    logits_weak = view.teacher_fn(weak(key_augment, view.batch.x_unl), key_d)[0]
    return losses.consistency(logits_weak, view.unl.logits, threshold=threshold).mean()

  return term


def entropy(view: View) -> Float[Array, ""]:
  """Mean entropy of the classifier on the unlabelled images."""
  return losses.entropy(view.unl.logits).mean()


def balance(view: View) -> Float[Array, ""]:
  """Imbalance of the classes given to the unlabelled images, where all are about equally frequent.

  It undoes what pseudo-labels alone make final: a part of one class that is taken for another.
  """
  return losses.imbalance(view.unl.logits)


def virtual_adversarial(*, epsilon: float, xi: float = 1e-3) -> Term:
  """The classifier keeps its mind about unlabelled images where it would change it soonest.

  `E KL(p(. | x) || p(. | x + r))`, with `r = epsilon g / |g|` and `g` the gradient of the same divergence
  in r at `xi d`, d a random direction: one power iteration towards the direction of its greatest growth.
  `p(. | x)` and `r` are constants. All passes share D's noise. Pixels may leave [0, 1].

  Args:
    epsilon: length of r, in the norm of the image as one vector of pixels in [0, 1].
    xi: of the trial step; it need only be small, and large enough for float32.

  References:
    Miyato et al., 2018, https://arxiv.org/abs/1704.03976, equations 5 to 8 and algorithm 1.
  """

  def term(view: View) -> Float[Array, ""]:
    key_direction, key_d = jax.random.split(view.key)
    x = view.unl.x
    logits = jax.lax.stop_gradient(view.d_fn(x, key_d)[0])

    def divergence(r: Array) -> Array:
      return losses.divergence(logits, view.d_fn(x + r, key_d)[0])

    trial = xi * _unit(jax.random.normal(key_direction, x.shape))
    r = epsilon * _unit(jax.grad(lambda r: divergence(r).sum())(trial))
    return divergence(jax.lax.stop_gradient(r)).mean()

  return term


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Each image divided by its norm; near-zero ones by their largest pixel first, against underflow."""
  x = x / (jnp.abs(x).max(axis=(1, 2, 3), keepdims=True) + 1e-30)
  return x / (jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3), keepdims=True)) + 1e-12)


def mean_teacher(weak: Augment) -> Term:
  """Unlabelled images, as augmented as D saw them, keep the class probabilities of the averaged D.

  `E |p(. | x) - p'(. | weak(x))|^2`, with p' the averaged discriminator: a constant, unlike the paper's
  squared error divided by the number of classes here it is the sum over them.

  References:
    Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780, section 2.
  """

  def term(view: View) -> Float[Array, ""]:
    key_augment, key_d = jax.random.split(view.key)
    logits = view.teacher_fn(weak(key_augment, view.batch.x_unl), key_d)[0]
    target = jax.lax.stop_gradient(losses.class_probs(logits))
    return jnp.square(losses.class_probs(view.unl.logits) - target).sum(axis=-1).mean()

  return term


def low_density(*, quantile: float) -> Term:
  """G keeps its images off the dense regions of the unlabelled ones, see `losses.high_density`."""
  return lambda view: losses.high_density(view.unl.features, view.fake.features, quantile=quantile).mean()


def generated(view: View) -> Float[Array, ""]:
  """Mean cross-entropy of the generated images against the classes that they were asked to be of."""
  return losses.cross_entropy(view.fake.logits, view.fake.y).mean()


def r1(*, labelled: bool = False) -> Term:
  """`E |grad_x D(x)|^2 / 2` at real images, so that the weight is the paper's gamma."""
  return lambda view: _penalty(view, _real(view, labelled)).mean() / 2


def r2(view: View) -> Float[Array, ""]:
  """The same at generated images."""
  return _penalty(view, _fake(view)).mean() / 2


def wgan_gp(*, labelled: bool = False) -> Term:
  """`E (|grad_x D(x)| - 1)^2` between real and generated images; the paper's weight is 10.

  A pair of different classes has no class: the realness between them is that of no class in particular.
  """

  def term(view: View) -> Float[Array, ""]:
    key_share, key_d = jax.random.split(view.key)
    real, fake = _real(view, labelled), _fake(view)
    y = jnp.where(real.y == fake.y, real.y, -1)
    return penalties.wgan_gp(key_share, _realness_fn(view, y, key_d), real.x, fake.x).mean()

  return term


def _penalty(view: View, part: Part) -> Float[Array, "b"]:
  return penalties.squared_gradient_norm(_realness_fn(view, part.y, view.key), part.x)


def _realness_fn(view: View, y: Int[Array, "b"], key: Key[Array, ""]) -> penalties.RealnessFn:
  return lambda x: losses.known_realness(view.d_fn(x, key)[0], y)


def lazily(term: Term, every: int) -> Term:
  """The term once in `every` updates, and `every` times as heavy: the same on average, for less.

  References:
    Karras et al., 2020, https://arxiv.org/abs/1912.04958, section 3.1 (lazy regularization).
  """

  def rarely(view: View) -> Float[Array, ""]:
    due = view.step % every == 0
    return jax.lax.cond(due, lambda: every * term(view), lambda: jnp.zeros(()))

  return rarely if every > 1 else term


def rotation(part: Callable[[View], Part]) -> Term:
  """Mean cross-entropy of D's further head, of four logits: by how many quarter turns was it turned?

  For square images and a D with `num_aux=4`. Every image is turned once, by a random number of turns.
  In D's objective `part` gives the real images, in G's the generated ones: G is to make images whose
  upright D can tell.

  References:
    Chen et al., 2019, https://arxiv.org/abs/1811.11212, equations 2 and 3.
  """

  def term(view: View) -> Float[Array, ""]:
    key_turns, key_d = jax.random.split(view.key)
    x = part(view).x
    turns = jax.random.randint(key_turns, (len(x),), 0, 4)
    out = view.d_fn(augment.quarter_turns(x, turns), key_d)
    if len(out) < 3 or out[2].shape[-1] != 4:
      raise ValueError("the rotation task needs a discriminator with a head of its own: num_aux=4")
    return losses.cross_entropy(out[2], turns).mean()

  return term


# --- Methods


def balanced(objective: Objective, weight: Weight) -> Objective:
  """The objective with the balance of classes beside it, for classes that are about equally frequent.

  Args:
    objective: any with unlabelled images.
    weight: a number or a schedule.

  References:
    Springenberg, 2016, https://arxiv.org/abs/1511.06390, equation 5, see `losses.imbalance`.
  """
  return replace(objective, d={**objective.d, "balance": (weight, balance)})


def gan(
  loss: losses.Adversarial = losses.non_saturating,
  *,
  penalty: Literal["none", "r1", "r2", "r1_r2", "wgan_gp"] = "none",
  gamma: float = 1.0,
  penalty_every: int = 1,
  rotation_weight: float = 0.0,
  labelled: bool = False,
) -> Objective:
  """A GAN: any adversarial pair, with or without a gradient penalty and self-supervision.

  `L_D = E loss_d + gamma L_penalty + w L_rotation(x)`, `L_G = E loss_g + 0.2 w L_rotation(G(z))`. With a
  generator that is asked for classes, realness is that of the class asked for.

  Args:
    loss: the pair.
    penalty: on D's gradient at real images (r1), generated ones (r2), both, or between them (wgan_gp).
    gamma: the penalty's weight.
    penalty_every: updates from one application of the penalty to the next.
    rotation_weight: w; the factor 0.2 of G is the paper's.
    labelled: whether labelled images count as real ones too.
  """
  kinds: dict[str, dict[str, Term]] = {
    "none": {},
    "r1": {"r1": r1(labelled=labelled)},
    "r2": {"r2": r2},
    "r1_r2": {"r1": r1(labelled=labelled), "r2": r2},
    "wgan_gp": {"wgan_gp": wgan_gp(labelled=labelled)},
  }
  d: dict[str, tuple[Weight, Term]] = {"realness": (1.0, adversarial_d(loss, labelled=labelled))}
  d |= {name: (gamma, lazily(term, penalty_every)) for name, term in kinds[penalty].items()}
  d["rotation"] = (rotation_weight, rotation(lambda view: _real(view, labelled)))
  return Objective(
    d=d,
    g={
      "realness": (1.0, adversarial_g(loss, labelled=labelled)),
      "rotation": (0.2 * rotation_weight, rotation(lambda view: view.fake)),
    },
  )


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
    "realness": (adversarial, adversarial_d(losses.non_saturating)),
  }
  if weak is not None:
    d["consistency"] = (consistency_weight, consistency(weak, threshold=threshold))
  elif consistency_weight:
    raise ValueError("a consistency weight needs the weak augmentation that gives the targets")
  g: dict[str, tuple[Weight, Term]] = {"feature_matching": (1.0, feature_matching)}
  return Objective(d=d, g=g if adversarial else {})


def conditional_gan(
  loss: losses.Adversarial = losses.non_saturating,
  *,
  supervised_weight: float = 1.0,
  consistency_weight: Weight = 0.0,
  weak: Augment | None = None,
  threshold: float = 0.95,
  **penalty: Any,
) -> Objective:
  """A class-conditional GAN from any number of labels, over the same K logits.

  G is always judged by the logit `l_y` of the class that it was asked for. In a batch of labelled images,
  so is D: a real image by the logit of its class, a generated one by that of the class asked for. With
  unlabelled images in the batch D's question is only "is it real?", by the logsumexp of all logits, and
  cross-entropy and consistency teach it which logit an image raises. Then
  `l_y = logsumexp(l) + log p(y | x, real)` asks of G both to look real and to look like y.

  Args:
    loss: the pair.
    supervised_weight: of the cross-entropy of the labelled images.
    consistency_weight, weak, threshold: as in `semi_supervised_gan`.
    penalty: `penalty`, `gamma`, `penalty_every` and `rotation_weight` as in `gan`.
  """
  adversarial = gan(loss, labelled=True, **penalty)
  classifier = semi_supervised_gan(
    adversarial=0.0, consistency_weight=consistency_weight, weak=weak, threshold=threshold
  )
  d = {**adversarial.d, **classifier.d, "supervised": (supervised_weight, supervised)}
  return Objective(d=d, g=adversarial.g)


def bad_gan(*, entropy_weight: Weight, density_weight: Weight, quantile: float = 0.1) -> Objective:
  """The K + 1 discriminator against a generator that is to miss the data: it marks the borders of it.

  `L_D = CE(x_lab, y) + 1/2 [E softplus(-r(x_unl)) + E softplus(r(G(z)))] + e E H(p(. | x_unl))`,
  `L_G = mean_j (E f_j(x_unl) - E f_j(G(z)))^2 + w E max(log p(f(G(z))) - tau, 0)`.

  Without the paper's terms for the entropy of G, which are for its larger images.

  Args:
    entropy_weight: e.
    density_weight: w.
    quantile: which of the real images' densities is tau, see `losses.high_density`.

  References:
    Dai et al., 2017, https://arxiv.org/abs/1705.09783, section 4.
  """
  published = semi_supervised_gan()
  return Objective(
    d={**published.d, "entropy": (entropy_weight, entropy)},
    g={**published.g, "low_density": (density_weight, low_density(quantile=quantile))},
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
      "supervised": (1.0, supervised),
      "virtual_adversarial": (weight, virtual_adversarial(epsilon=epsilon)),
      "entropy": (entropy_weight, entropy),
    }
  )


def averaged_teacher(*, weight: Weight, weak: Augment) -> Objective:
  """`L_D = CE(x_lab, y) + w E |p(. | x_unl) - p'(. | weak(x_unl))|^2`, p' from averaged parameters.

  References:
    Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780.
  """
  return Objective(d={"supervised": (1.0, supervised), "mean_teacher": (weight, mean_teacher(weak))})


def generator_augmented(*, weight: Weight) -> Objective:
  """A classifier of labelled images and of those that a class-conditional generator makes.

  `L_D = CE(x_lab, y) + w CE(G(z, y'), y')`. G has no terms: it is trained before and stays as it is.
  """
  return Objective(d={"supervised": (1.0, supervised), "generated": (weight, generated)})
