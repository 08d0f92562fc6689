"""The semi-supervised GAN: a K-class discriminator trained on few labels and many images.

Feature matching (Salimans et al., 2016, https://arxiv.org/abs/1606.03498), consistency (Sohn et al., 2020,
https://arxiv.org/abs/2001.07685) with targets from the averaged D, and class balance (Springenberg, 2016,
https://arxiv.org/abs/1511.06390). With the weights of the last two at zero it is the published GAN. Virtual
adversarial training (Miyato et al., 2018, https://arxiv.org/abs/1704.03976) can be added; without
augmentation it takes the place of consistency.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import optax
from jaxtyping import Int

from gan_jax import augment, data, networks, objectives, terms
from gan_jax.recipes import policies
from gan_jax.recipes import recipe as base
from gan_jax.recipes.policies import Ranges
from gan_jax.recipes.recipe import Recipe
from gan_jax.types import Augment, BatchSizes, ImageSource, InputError

Tuned = Literal["conv", "vgg", "resnet", "mlp"]
"""Pairs that `tuned` supports."""
SMALL_DATA = 10_000
"""Number of training images below which `tuned` gives the hyper-parameters for small data."""
VAT_EPSILON = 0.4
"""The tuned norm of virtual adversarial perturbations, relative to the mean norm of the images."""


@dataclass(frozen=True, kw_only=True)
class Hparams(base.Hparams):
  """Hyper-parameters; the defaults are those tuned on MNIST with 100 labels."""

  network: networks.Pair = "conv"
  num_steps: int = 10_000
  num_labelled: int = 50
  num_unlabelled: int = 64
  num_generated: int = 32
  """Images of each kind per step."""
  d_learning_rate: float = 3e-3
  g_learning_rate: float = 1e-3
  schedule: base.Schedule = "cosine"
  b1: float = 0.5
  b2: float = 0.999
  eps: float = 0.0
  eps_root: float = 1e-8
  """Epsilon under the root, as in Improved GAN's code: updates vanish with gradients below 1e-4. Otherwise
  Adam amplifies the tiny gradients of a saturated D, and the MLP generator breaks down."""
  ema_decay: float = 0.999
  adversarial: float = 0.5
  """Weight of D's adversarial loss; 0 trains without a generator."""
  consistency: float = 1.0
  """Weight of consistency at the end of its ramp."""
  class_balance: tuple[float, float] = (3.0, 0.0)
  """Weight of class balance at the first and last step, linear in between. A constant weight follows the
  class counts of single batches, which are random."""
  class_prior: tuple[float, ...] | None = None
  """Class frequencies that class balance pulls the predictions towards; None: uniform."""
  strong: Ranges | None = field(default_factory=lambda: policies.POLICIES["digits"].strong)
  """Augmentation of all inputs of D, see `policies.augments`; None: no augmentation."""
  weak: Ranges | None = field(default_factory=lambda: policies.POLICIES["digits"].weak)
  """Augmentation of the images that give consistency targets."""
  threshold: float = 0.95
  """Minimum confidence of a pseudo-label."""
  vat: float = 0.0
  """Weight of virtual adversarial training at the end of its ramp; 0 for none."""
  vat_entropy: float = 1.0
  """Weight of the entropy of D's predictions beside it."""
  vat_epsilon: float = 1.0
  """Norm of the virtual adversarial perturbation, for pixels in [0, 1]: tuned as `VAT_EPSILON` times
  `data.mean_norm`."""
  ramp: float = 0.4
  """Fraction of the steps over which consistency and VAT ramp up: early predictions are wrong."""


def tuned(network: Tuned, num_images: int, policy: policies.Name | None = None) -> Hparams:
  """The tuned hyper-parameters for this network and number of training images.

  conv: tuned on held-out training images, split seeds 100 to 105, of MNIST (weights, augmentation,
  schedule) and of the digits (number of steps, class balance). vgg, resnet: those of conv. mlp: the
  published recipe of Improved GAN, for 12,000 steps, or 4,000 on small data; the paper has 180,000. The
  convolutional ones without augmentation (policy none) have virtual adversarial training in place of
  consistency, whose `vat_epsilon` depends on the data: `for_data` measures it.

  Args:
    network: the pair.
    num_images: number of training images.
    policy: augmentation policy (default: digits, and none for mlp).

  Raises:
    InputError: nothing was tuned for this network.
  """
  small_data = num_images < SMALL_DATA
  if network in ("conv", "vgg", "resnet"):
    changes: dict[str, Any] = {"network": network}
    if small_data:
      changes |= {"num_steps": 1000, "class_balance": (1.0, 0.0), "ema_decay": 0.99}
    if policy == "none":
      changes |= {"consistency": 0.0, "vat": 1.0}
    return with_policy(Hparams(**changes), policy or "digits")
  if network != "mlp":
    raise InputError(
      f"there is no tuned recipe for the network {network}: start from conv, vgg, resnet or mlp"
    )
  hparams = Hparams(
    network="mlp",
    num_steps=4000 if small_data else 12_000,
    num_labelled=100,
    num_unlabelled=100,
    num_generated=100,
    g_learning_rate=3e-3,
    schedule="constant",
    ema_decay=0.9999,
    consistency=0.0,
    class_balance=(0.0, 0.0),
  )
  return with_policy(hparams, policy or "none")


def for_images(
  image_shape: tuple[int, int, int],
  num_images: int,
  *,
  network: networks.Pair | None = None,
  policy: policies.Name | None = None,
  mirror: bool = False,
  **given: Any,
) -> Hparams:
  """The tuned hyper-parameters for images of this shape, with the given ones in their place.

  Args:
    image_shape: height, width, channels.
    num_images: number of training images.
    network: the pair (default: `networks.suited`). A pair without tuned values uses those of conv.
    policy: augmentation policy (default: `policies.suited`, and none for mlp).
    mirror: for the default policy, whether a mirror image has the same class.
    given: hyper-parameters; None keeps the tuned value.
  """
  network = network or networks.suited(image_shape)
  if policy is None and network != "mlp":
    policy = policies.suited(image_shape, mirror=mirror)
  start: Any = network if network in get_args(Tuned) else "conv"
  given = {name: value for name, value in given.items() if value is not None}
  return dataclasses.replace(tuned(start, num_images, policy), network=network, **given)


def for_data(
  x: ImageSource,
  y_lab: Int[np.ndarray, "n"],
  num_classes: int,
  *,
  num_images: int | None = None,
  **given: Any,
) -> Hparams:
  """The tuned hyper-parameters for these data, with the given ones in their place.

  They are those of `for_images` and, measured here, the class prior and the norm of VAT's perturbation.

  Args:
    x: training images, bytes `[N, H, W, C]`.
    y_lab: the known labels, `[n]`.
    num_classes: K.
    num_images: number of images that the run sees (default: all).
    given: arguments of `for_images`, and hyper-parameters; None keeps the tuned value.
  """
  height, width, channels = x.shape[1:]
  given = {"class_prior": data.class_prior(y_lab, num_classes), **given}
  hparams = for_images((height, width, channels), num_images or len(x), **given)
  if not hparams.vat or given.get("vat_epsilon") is not None:
    return hparams
  return dataclasses.replace(hparams, vat_epsilon=VAT_EPSILON * data.mean_norm(x))


def with_policy(hparams: Hparams, name: policies.Name) -> Hparams:
  """The same hyper-parameters with the augmentation policy of this name."""
  policy = policies.POLICIES[name]
  return dataclasses.replace(hparams, strong=policy.strong, weak=policy.weak)


def build(hparams: Hparams, image_shape: tuple[int, int, int], num_classes: int) -> Recipe:
  """The recipe for images of this shape: height, width, channels."""
  h = hparams
  g, d = networks.make_pair(h.network, image_shape, num_logits=num_classes, precision=h.precision)
  objective = objectives.semi_supervised_gan(
    adversarial=h.adversarial,
    consistency_weight=ramped(h, h.consistency),
    weak=weak(h),
    threshold=h.threshold,
  )
  if h.vat:
    objective = objective.plus(**vat(h).d)
  uses_unlabelled = h.adversarial or h.consistency or h.vat or any(h.class_balance)
  return Recipe(
    g=g,
    d=d,
    g_tx=base.adam(h, h.g_learning_rate),
    d_tx=base.adam(h, h.d_learning_rate),
    objective=objective.plus(class_balance=class_balance(h)),
    batch=BatchSizes(
      h.num_labelled,
      h.num_unlabelled if uses_unlabelled else 0,
      h.num_generated if h.adversarial else 0,
    ),
    num_steps=h.num_steps,
    ema_decay=h.ema_decay,
    augment=policies.build(h.strong),
    image_shape=image_shape,
    num_classes=num_classes,
    family="ssgan",
    hparams=h,
  )


def vat(hparams: Hparams) -> objectives.Objective:
  """Virtual adversarial training with these weights."""
  return objectives.virtual_adversarial_training(
    epsilon=hparams.vat_epsilon,
    weight=ramped(hparams, hparams.vat),
    entropy_weight=ramped(hparams, hparams.vat_entropy),
  )


def weak(hparams: Hparams) -> Augment:
  """The augmentation of the images that give consistency targets."""
  return policies.build(hparams.weak) or augment.chain()


def ramped(hparams: Hparams, weight: float) -> objectives.Weight:
  """From 0 to `weight` over the ramp, see `recipe.ramp`."""
  return base.ramp(weight, hparams.num_steps, hparams.ramp)


def class_balance(hparams: Hparams) -> tuple[objectives.Weight, terms.Term]:
  """Class balance with its weight as a function of the step."""
  first, last = hparams.class_balance
  weight = optax.linear_schedule(first, last, hparams.num_steps) if first or last else 0.0
  return weight, terms.class_balance(hparams.class_prior)
