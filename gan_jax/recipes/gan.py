"""Generators: unconditional GANs, or class-conditional ones trained with all labels or with few.

Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661. A class-conditional D has one logit per class: the
projection discriminator of Miyato & Koyama, 2018, https://arxiv.org/abs/1802.05637, without its
unconditional part. With few labels, cross-entropy and consistency teach D the classes of the other images.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gan_jax import augment, losses, networks, objectives
from gan_jax.recipes import policies
from gan_jax.recipes import recipe as base
from gan_jax.recipes.recipe import Recipe
from gan_jax.types import Augment, BatchSizes, InputError

Loss = Literal["min_max", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"]
Penalty = Literal["none", "r1", "r2", "r1_r2", "wgan_gp"]
Norm = Literal["none", "weight", "spectral", "layer"]
Augmentation = Literal["none", "affine", "fixed", "adaptive"]

LOSSES: dict[Loss, losses.Adversarial] = {
  "min_max": losses.min_max,
  "non_saturating": losses.non_saturating,
  "least_squares": losses.least_squares,
  "hinge": losses.hinge,
  "wasserstein": losses.wasserstein,
  "relativistic": losses.relativistic,
}
"""Adversarial losses by name."""


@dataclass(frozen=True, kw_only=True)
class Hparams(base.Hparams):
  """Hyper-parameters; the defaults are those tuned for the conv_fine pair on MNIST.

  Learning rates, width and the weight of R1 were chosen by the distance to the training images.
  """

  network: networks.Pair = "conv_fine"
  num_steps: int = 4000
  batch_size: int = 64
  """Real images per step; also the number of generated images."""
  labels: Literal["none", "few", "all"] = "none"
  """none: an unconditional GAN. all: class-conditional, every real image has its label. few:
  class-conditional, with labels for a quarter of each batch."""
  d_learning_rate: float = 3e-3
  g_learning_rate: float = 3e-3
  schedule: base.Schedule = "linear"
  b1: float = 0.0
  b2: float = 0.99
  ema_decay: float = 0.999
  loss: Loss = "non_saturating"
  real_label: float = 1.0
  """One-sided label smoothing: the target probability of "real" for real images."""
  penalty: Penalty = "r1"
  gamma: float = 1.0
  """Weight of the penalty, for pixels in [0, 1]. For R1 and R2, a quarter of the equivalent weight for
  pixels in [-1, 1]; wgan_gp keeps the slope at 1 in the given units, and its weight needs no conversion."""
  penalty_every: int = 4
  """Interval between applications of the penalty, in steps; each one is weighted by this number."""
  norm: Norm = "none"
  """Normalisation in D."""
  augmentation: Augmentation = "none"
  """Augmentation of all inputs of D. affine: the policy's strong augmentation, for classifiers; fixed: its
  augmentation for generators; adaptive: the same, with a probability that grows while D overfits (ADA)."""
  policy: policies.Name = "digits"
  """The augmentation policy, see `policies`."""
  flip: bool = False
  """Whether a mirror image has the same class: not for digits. Adds mirror images to the policy."""
  rotation: float = 0.0
  """Weight of rotation prediction."""


Tuned = Literal["conv_fine", "vgg", "resnet", "article"]
"""Pairs that `tuned` supports."""


_SMALLER: Any = {"d_learning_rate": 1e-3, "g_learning_rate": 1e-3, "gamma": 0.25}
TUNED: dict[Tuned, Hparams] = {
  "conv_fine": Hparams(),
  "vgg": Hparams(network="vgg", **_SMALLER),
  "resnet": Hparams(network="resnet", norm="layer", **_SMALLER),
  "article": Hparams(
    network="article",
    num_steps=10_000,
    batch_size=100,
    d_learning_rate=2e-4,
    g_learning_rate=2e-4,
    schedule="constant",
    b1=0.9,
    b2=0.999,
    penalty="none",
    penalty_every=1,
  ),
}
"""Tuned for conv_fine, the source article's for its own pair. Those of vgg and resnet were chosen by
inspecting vgg's samples after training on photographs of hands at 32x32; resnet has layer normalisation, as
its sums would grow."""


def tuned(network: Tuned, penalty: Penalty | None = None) -> Hparams:
  """The hyper-parameters of a pair, see `TUNED`.

  Args:
    network: the pair.
    penalty: replaces the pair's. wgan_gp has its paper's weight of 10 and is applied at every step, because
      it makes the loss a distance; a zero-centred penalty may be applied less often.

  Raises:
    InputError: nothing was tuned for this network.
  """
  if network not in TUNED:
    raise InputError(f"there is no tuned recipe for the network {network}: start from {', '.join(TUNED)}")
  if penalty is None:
    return TUNED[network]
  every_step = {"gamma": 10.0, "penalty_every": 1} if penalty == "wgan_gp" else {}
  return dataclasses.replace(TUNED[network], penalty=penalty, **every_step)


def check(hparams: Hparams) -> None:
  """Raises `InputError` for combinations that make no sense, naming the flag to change."""
  h = hparams
  if h.loss == "wasserstein" and h.penalty != "wgan_gp" and h.norm != "spectral":
    raise InputError("--loss wasserstein needs a Lipschitz D: add --penalty wgan_gp or --norm spectral")
  if not 0.5 < h.real_label <= 1:
    raise InputError(f"--real-label must be above 0.5 and at most 1, not {h.real_label}")
  if h.real_label < 1 and h.loss not in ("min_max", "non_saturating", "least_squares"):
    raise InputError(f"--real-label sets a target, but --loss {h.loss} has none: leave it at 1")
  if h.labels == "few" and h.batch_size < 4:
    raise InputError("--batch-size must be at least 4, as a quarter of each batch is labelled")
  if h.labels != "none" and h.loss == "relativistic":
    raise InputError(
      "--loss relativistic compares images pair by pair, whatever their classes: choose another loss"
    )


def check_adaptive(hparams: Hparams) -> None:
  """Raises `InputError` for adaptive augmentation with a loss that has no decision boundary.

  Not a part of `check`, so that runs of earlier versions can still be opened.
  """
  if hparams.augmentation == "adaptive" and LOSSES[hparams.loss].boundary is None:
    raise InputError(
      "adaptive augmentation needs a boundary between real and generated images, which"
      f" --loss {hparams.loss} does not have: choose another loss, or fixed augmentation"
    )


def build(hparams: Hparams, image_shape: tuple[int, int, int], num_classes: int) -> Recipe:
  """The recipe for images of this shape: height, width, channels.

  Raises:
    InputError: hyper-parameters that make no sense together, or rotation prediction on non-square images.
  """
  h = hparams
  check(h)
  if h.rotation and image_shape[0] != image_shape[1]:
    raise InputError(
      f"--rotation needs square images, but these are {image_shape[0]}x{image_shape[1]}: use --rotation 0"
    )
  conditional = h.labels != "none"
  g, d = networks.make_pair(
    h.network,
    image_shape,
    num_logits=num_classes if conditional else 1,
    num_classes=num_classes if conditional else 0,
    num_aux=4 if h.rotation else 0,
    norm=h.norm,
    precision=h.precision,
  )
  num_labelled = {"none": 0, "few": h.batch_size // 4, "all": h.batch_size}[h.labels]
  return Recipe(
    g=g,
    d=d,
    g_tx=base.adam(h, h.g_learning_rate),
    d_tx=base.adam(h, h.d_learning_rate),
    objective=_objective(h),
    batch=BatchSizes(num_labelled, h.batch_size - num_labelled, h.batch_size),
    num_steps=h.num_steps,
    ema_decay=h.ema_decay,
    augment=_augment(h),
    image_shape=image_shape,
    num_classes=num_classes,
    family="gan",
    hparams=h,
  )


def _objective(h: Hparams) -> objectives.Objective:
  loss = LOSSES[h.loss]
  if h.real_label < 1:
    loss = losses.smooth(loss, h.real_label)
  penalty = {
    "penalty": h.penalty,
    "gamma": h.gamma,
    "penalty_every": h.penalty_every,
    "rotation_weight": h.rotation,
  }
  if h.labels == "none":
    return objectives.gan(loss, **penalty)
  if h.labels == "all":
    return objectives.conditional_gan(loss, **penalty)
  ramp = base.ramp(1.0, h.num_steps, 0.4)  # early pseudo-labels are wrong
  weak = policies.build(policies.POLICIES[h.policy].weak) or augment.chain()
  return objectives.conditional_gan(loss, consistency_weight=ramp, weak=weak, **penalty)


def _augment(h: Hparams) -> Augment | augment.Adaptive | None:
  policy = policies.POLICIES[h.policy]
  if h.augmentation == "none":
    return None
  if h.augmentation == "affine":
    return policies.build({"flip": h.flip, **(policy.strong or {})})
  found = policies.augments(**{"flip": h.flip, **(policy.generator or {})})
  if h.augmentation == "fixed":
    return augment.chain(*found)
  # The probability can cross its whole range in a quarter of the run.
  return augment.Adaptive(found, num_images=max(1, h.num_steps * h.batch_size // 4))
