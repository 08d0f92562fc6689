"""The outputs of one update, and the loss terms computed from them; an objective is a sum of terms.

A term is a pure function of `StepOutputs`, so a new loss is one function here and one line in an objective.
Generated images are constants in D's update, real images in G's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gan_jax import augment, losses, penalties
from gan_jax.types import Augment, DiscriminatorFn


class DiscOutputs(NamedTuple):
  """Images of one kind, and the discriminator's outputs for them."""

  x_raw: Float[Array, "b h w c"]
  """The images before augmentation, in [0, 1]."""
  x: Float[Array, "b h w c"]
  """The images passed to D, after augmentation, in [0, 1]."""
  logits: Float[Array, "b k"]
  features: Float[Array, "b f"]
  y: Int[Array, "b"]
  """Labels, or the classes requested from G; -1 where the class is unknown."""


@dataclass(frozen=True)
class StepOutputs:
  """The input of the terms of one update."""

  lab: DiscOutputs
  """Labelled images."""
  unl: DiscOutputs
  """Unlabelled images: `x_unl` of the batch in D's update, `x_unl_g` in G's."""
  fake: DiscOutputs
  """Generated images."""
  by_class: bool
  """Whether D decides "real, and of class y?": all its real images have labels, and G is conditional."""
  key: Key[Array, ""]
  """The term's own key, which the term consumes."""
  d_fn: DiscriminatorFn
  """The discriminator, for terms that need another pass."""
  teacher_fn: DiscriminatorFn
  """The discriminator with averaged parameters, which are constants."""
  step: Int[Array, ""]
  """Steps completed before this one."""


Term = Callable[[StepOutputs], Float[Array, ""]]


def supervised(outputs: StepOutputs) -> Float[Array, ""]:
  """Mean cross-entropy of the labelled images."""
  return losses.cross_entropy(outputs.lab.logits, outputs.lab.y).mean()


def adversarial_d(loss: losses.Adversarial, *, labelled: bool = False) -> Term:
  """D's half of an adversarial loss: `E loss(real) + E loss(fake)`.

  Args:
    loss: the adversarial loss.
    labelled: whether labelled images also count as real, as in class-conditional GANs. Otherwise only
      unlabelled images do.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    real, fake = loss.d(real_logit(real_images(outputs, labelled)), real_logit(generated_images(outputs)))
    return real.mean() + fake.mean()

  return term


def adversarial_g(loss: losses.Adversarial, *, labelled: bool = False) -> Term:
  """G's half of an adversarial loss, with the arguments of `adversarial_d`."""

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    return loss.g(real_logit(real_images(outputs, labelled)), real_logit(outputs.fake)).mean()

  return term


def real_logit(images: DiscOutputs) -> Float[Array, "b"]:
  """The logit of "real": that of the class if it is known, else of any, see `losses.known_real_logit`."""
  return losses.known_real_logit(images.logits, images.y)


def real_images(outputs: StepOutputs, labelled: bool) -> DiscOutputs:
  """The real images of an adversarial loss, with their classes only if D judges images by class.

  Mixing images with and without a class would let D satisfy the loss by whether an image has a label: by
  `l_y` for one kind, by any other logit for the rest.
  """
  if not labelled:
    return outputs.unl
  real = DiscOutputs(*(jnp.concatenate(pair) for pair in zip(outputs.lab, outputs.unl, strict=True)))
  return real if outputs.by_class else _without_class(real)


def generated_images(outputs: StepOutputs) -> DiscOutputs:
  """The generated images of D's own update, with their classes only if D judges images by class."""
  return outputs.fake if outputs.by_class else _without_class(outputs.fake)


def _without_class(images: DiscOutputs) -> DiscOutputs:
  return images._replace(y=jnp.full_like(images.y, -1))


def feature_matching(outputs: StepOutputs) -> Float[Array, ""]:
  """Mean squared difference of the mean features of unlabelled and generated images."""
  return losses.feature_matching(outputs.unl.features, outputs.fake.features).mean()


def _weak_logits(outputs: StepOutputs, d_fn: DiscriminatorFn, weak: Augment) -> Float[Array, "b k"]:
  """Logits of weakly augmented unlabelled images; consumes the term's key."""
  key_augment, key_d = jax.random.split(outputs.key)
  return d_fn(weak(key_augment, outputs.unl.x_raw), key_d)[0]


def consistency(weak: Augment, *, threshold: float) -> Term:
  """Consistency: the averaged D's pseudo-label of a weakly augmented unlabelled image is the target for the
  same image as augmented in D's update, see `losses.consistency`.

  The second pass only computes the target, so it is a forward pass.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    logits_weak = _weak_logits(outputs, outputs.teacher_fn, weak)
    return losses.consistency(logits_weak, outputs.unl.logits, threshold=threshold).mean()

  return term


def adamatch(weak: Augment, *, threshold: float) -> Term:
  """Consistency with threshold and class frequencies relative to labelled images, see `losses.adamatch`.

  The predictions on labelled images are those of D's update, on its augmentation; the paper's are on weakly
  augmented images, as those on unlabelled images are, here of the averaged D.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    logits_weak = _weak_logits(outputs, outputs.teacher_fn, weak)
    logits = outputs.lab.logits, logits_weak, outputs.unl.logits
    return losses.adamatch(*logits, threshold=threshold).mean()

  return term


def mutual_information(weak: Augment) -> Term:
  """Minus the mutual information of unlabelled images' predicted classes under two augmentations.

  One is that of D's update, the other is `weak`. Gradients flow through both passes.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    logits_weak = _weak_logits(outputs, outputs.d_fn, weak)
    return -losses.mutual_information(outputs.unl.logits, logits_weak)

  return term


def mixed(outputs: StepOutputs) -> Float[Array, ""]:
  """Real-or-fake loss of partly real images: `E s softplus(-r) + (1 - s) softplus(r)`.

  `r` is the real logit of `M x + (1 - M) G(z)`: an unlabelled image with a rectangle of a generated one,
  M uniform over positions and, as in CutMix, over the share s of the image that is real.

  References:
    Liu et al., 2020, https://doi.org/10.1109/CVPR42600.2020.00576 (R3-CGAN), without its class targets.
    Yun et al., 2019, https://arxiv.org/abs/1905.04899 (CutMix), section 3.1 (the rectangle).
  """
  key_share, key_centre, key_d = jax.random.split(outputs.key, 3)
  num = min(len(outputs.unl.x), len(outputs.fake.x))
  real, fake = outputs.unl.x[:num], outputs.fake.x[:num]
  height, width = real.shape[1:3]
  side = jnp.sqrt(1 - jax.random.uniform(key_share, (num, 1, 1)))
  centre = jax.random.uniform(key_centre, (2, num, 1, 1))
  v = (jnp.arange(height)[None, :, None] + 0.5) / height
  u = (jnp.arange(width)[None, None, :] + 0.5) / width
  inside = (jnp.abs(v - centre[0]) < side / 2) & (jnp.abs(u - centre[1]) < side / 2)
  share = 1 - inside.mean(axis=(1, 2))
  logits = outputs.d_fn(jnp.where(inside[..., None], fake, real), key_d)[0]
  r = losses.real_logit(logits)
  return (share * jax.nn.softplus(-r) + (1 - share) * jax.nn.softplus(r)).mean()


def confident_generated(*, threshold: float) -> Term:
  """Cross-entropy of generated images against the averaged D's class, for confident, real-looking ones:
  `E 1[max p' >= threshold, r' > 0] -log p(argmax p')`, where primes denote the averaged D, a constant.

  References:
    Li et al., 2019, https://arxiv.org/abs/1912.09784 (Triple-GAN), whose generator is conditional.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    logits = outputs.teacher_fn(outputs.fake.x, outputs.key)[0]
    real = jax.lax.stop_gradient(losses.real_logit(logits)) > 0
    loss = losses.consistency(logits, outputs.fake.logits, threshold=threshold)
    return jnp.where(real, loss, 0.0).mean()

  return term


def undecided_generated(outputs: StepOutputs) -> Float[Array, ""]:
  """Minus the mean entropy of the classifier on generated images: D is trained to be uncertain there.

  References:
    Springenberg, 2016, https://arxiv.org/abs/1511.06390, section 3.
  """
  return -losses.entropy(outputs.fake.logits).mean()


def entropy(outputs: StepOutputs) -> Float[Array, ""]:
  """Mean entropy of the classifier on the unlabelled images."""
  return losses.entropy(outputs.unl.logits).mean()


def class_balance(prior: Sequence[float] | None = None) -> Term:
  """Divergence of the mean prediction on the unlabelled images from the class prior.

  Counters confirmation bias: early pseudo-label errors reinforce themselves.

  Args:
    prior: frequencies of the K classes, see `data.class_prior`; None: uniform.

  References:
    Springenberg, 2016, https://arxiv.org/abs/1511.06390, equation 5, see `losses.class_imbalance`.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    return losses.class_imbalance(outputs.unl.logits, None if prior is None else jnp.asarray(prior))

  return term


def virtual_adversarial(*, epsilon: float, xi: float = 0.1) -> Term:
  """VAT: predictions stay stable under the worst-case perturbation of norm epsilon.

  `E KL(p(. | x) || p(. | x + r))`, with `r = epsilon g / |g|` and `g` the gradient of the same divergence
  in r at `xi d`, d a random direction: one power iteration towards the direction of its fastest growth.
  `p(. | x)` and `r` are constants. All passes share D's noise. Pixels may leave [0, 1].

  Args:
    epsilon: Euclidean norm of r, over all pixels of an image in [0, 1].
    xi: length of the trial step. Small for the paper's quadratic approximation, but not so small that the
      rounding of the first product removes it: with bfloat16 or TF32, 1e-3 leaves a random direction.

  References:
    Miyato et al., 2018, https://arxiv.org/abs/1704.03976, equations 5 to 8 and algorithm 1.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    key_direction, key_d = jax.random.split(outputs.key)
    x = outputs.unl.x
    logits = jax.lax.stop_gradient(outputs.d_fn(x, key_d)[0])

    def divergence(r: Array) -> Array:
      return losses.divergence(logits, outputs.d_fn(x + r, key_d)[0])

    trial = xi * _unit(jax.random.normal(key_direction, x.shape))
    r = epsilon * _unit(jax.grad(lambda r: divergence(r).sum())(trial))
    return divergence(jax.lax.stop_gradient(r)).mean()

  return term


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Each image divided by its norm; by its largest pixel first, so that squares do not underflow."""
  x = x / (jnp.abs(x).max(axis=(1, 2, 3), keepdims=True) + 1e-30)
  return x / (jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3), keepdims=True)) + 1e-12)


def mean_teacher(weak: Augment) -> Term:
  """Mean teacher: D's class probabilities follow those of the averaged D on unlabelled images.

  `E |p(. | x) - p'(. | weak(x))|^2`, with p' the averaged discriminator, a constant. The squared error is
  summed over classes; the paper divides it by their number.

  References:
    Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780, section 2.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    logits_weak = _weak_logits(outputs, outputs.teacher_fn, weak)
    target = jax.lax.stop_gradient(losses.class_probs(logits_weak))
    return jnp.square(losses.class_probs(outputs.unl.logits) - target).sum(axis=-1).mean()

  return term


def low_density(*, quantile: float) -> Term:
  """Penalty on generated images in dense regions of the unlabelled images, see `losses.high_density`."""

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    return losses.high_density(outputs.unl.features, outputs.fake.features, quantile=quantile).mean()

  return term


def generated(outputs: StepOutputs) -> Float[Array, ""]:
  """Mean cross-entropy of the generated images against their requested classes."""
  return losses.cross_entropy(outputs.fake.logits, outputs.fake.y).mean()


def r1(*, labelled: bool = False) -> Term:
  """`E |grad_x D(x)|^2 / 2` at real images, so that the weight is the paper's gamma."""
  return lambda outputs: _penalty(outputs, real_images(outputs, labelled)).mean() / 2


def r2(outputs: StepOutputs) -> Float[Array, ""]:
  """`E |grad_x D(x)|^2 / 2` at generated images."""
  return _penalty(outputs, generated_images(outputs)).mean() / 2


def wgan_gp(*, labelled: bool = False) -> Term:
  """`E (|grad_x D(x)| - 1)^2` between real and generated images; the paper's weight is 10.

  A point between images of different classes has no class, so its real logit is the logsumexp.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    key_share, key_d = jax.random.split(outputs.key)
    real, fake = real_images(outputs, labelled), generated_images(outputs)
    y = jnp.where(real.y == fake.y, real.y, -1)
    return penalties.wgan_gp(key_share, _real_logit_fn(outputs, y, key_d), real.x, fake.x).mean()

  return term


def _penalty(outputs: StepOutputs, images: DiscOutputs) -> Float[Array, "b"]:
  return penalties.squared_gradient_norm(_real_logit_fn(outputs, images.y, outputs.key), images.x)


def _real_logit_fn(outputs: StepOutputs, y: Int[Array, "b"], key: Key[Array, ""]) -> penalties.RealLogitFn:
  return lambda x: losses.known_real_logit(outputs.d_fn(x, key)[0], y)


def every_k(term: Term, k: int) -> Term:
  """The term every k steps, with k times the weight: the same on average, at a lower cost.

  References:
    Karras et al., 2020, https://arxiv.org/abs/1912.04958, section 3.1 (lazy regularization).
  """

  def rarely(outputs: StepOutputs) -> Float[Array, ""]:
    due = outputs.step % k == 0
    return jax.lax.cond(due, lambda: k * term(outputs), lambda: jnp.zeros(()))

  return rarely if k > 1 else term


def rotation(images_of: Callable[[StepOutputs], DiscOutputs]) -> Term:
  """Rotation prediction: mean cross-entropy of D's auxiliary head over the four quarter turns.

  For square images and a D with `num_aux=4`. Every image is rotated once, by a random number of turns.
  `images_of` gives the real images in D's objective and the generated ones in G's, which trains G to make
  images whose rotation D can predict.

  References:
    Chen et al., 2019, https://arxiv.org/abs/1811.11212, equations 2 and 3.
  """

  def term(outputs: StepOutputs) -> Float[Array, ""]:
    key_turns, key_d = jax.random.split(outputs.key)
    x = images_of(outputs).x
    turns = jax.random.randint(key_turns, (len(x),), 0, 4)
    out = outputs.d_fn(augment.quarter_turns(x, turns), key_d)
    if len(out) < 3 or out[2].shape[-1] != 4:
      raise ValueError("rotation prediction needs a discriminator with an auxiliary head: use num_aux=4")
    return losses.cross_entropy(out[2], turns).mean()

  return term
