"""The methods of the few-label study, the recipe and the networks that they share. Not an experiment."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from experiments import mnist_ssgan
from gan_jax import data, networks, objectives, runs
from gan_jax.types import Generator, Network

Name = Literal[
  "supervised",
  "supervised_augmented",
  "pseudo_label",
  "mean_teacher",
  "vat",
  "feature_matching",
  "gan_consistency",
  "bad_generator",
  "gan_augmented",
]


@dataclass(frozen=True)
class Config(runs.Config):
  """The flags that say how each method trains."""

  network: Literal["conv", "mlp"] = "conv"
  """The pair of networks of mnist_ssgan; for images below 16x16 a smaller conv pair."""
  augmentation: bool = True
  """Whether D sees augmented images. Else consistency and the averaged teacher ask for the same class under
  D's own noise alone: the mlp has much of it, the conv pair none."""
  learning_rate: float | None = None
  """Peak learning rate of D (default: the recipe's)."""
  adversarial: float | None = None
  """Weight of D's real-or-fake loss in feature_matching and gan_consistency (default: the recipe's)."""
  consistency: float | None = None
  """Weight of consistency in pseudo_label, gan_consistency and gan_augmented (default: the recipe's)."""
  balance: tuple[float, float] | None = None
  """Weight of the balance of classes, at the first and the last update, in all that see unlabelled images
  (default: the recipe's)."""
  teacher: float = 5.0
  """Weight of the averaged teacher in mean_teacher."""
  vat: float = 1.0
  """Weight of the divergence in vat."""
  vat_epsilon: float = 0.4
  """Length of the virtual adversarial perturbation, as a share of the mean norm of the images."""
  vat_entropy: float = 1.0
  """Weight of the entropy in vat."""
  bad_entropy: float = 2.0
  """Weight of the entropy in bad_generator."""
  bad_density: float = 0.1
  """Weight of the penalty on generated images in dense regions in bad_generator."""
  generated: float = 1.0
  """Weight of the generated images in gan_augmented."""

  def check(self) -> None:
    super().check()
    weights = (name for name in Config.__annotations__ if name not in ("network", "augmentation"))
    self.check_not_negative(*weights)


class Method(NamedTuple):
  """A way to train D."""

  objective: objectives.Objective
  uses_unlabelled: bool = True
  uses_generated: bool = False
  augmented: bool = True
  before: "Method | None" = None
  """What trains the generator that this method begins with, for as many updates, with a D of its own."""
  conditional: bool = False
  """Whether G is asked for classes."""


def make_methods(config: Config, recipe: mnist_ssgan.Recipe, norm: float) -> dict[str, Method]:
  """All of them; `norm` is the mean norm of an image.

  What D is taught by its own predictions gains its weight with the recipe's ramp: early ones are wrong.
  All that see unlabelled images share the balance of classes, so that it decides nothing between them.
  """
  ramp, weak = partial(mnist_ssgan.ramp, recipe), mnist_ssgan.weak(recipe)
  consistent = {
    "consistency_weight": ramp(recipe.consistency),
    "weak": weak,
    "threshold": recipe.threshold,
  }
  balanced = partial(objectives.balanced, weight=mnist_ssgan.balance(recipe))
  gan = objectives.semi_supervised_gan
  teacher = objectives.averaged_teacher(weight=ramp(config.teacher), weak=weak)
  vat = objectives.virtual_adversarial_training(
    epsilon=config.vat_epsilon * norm,
    weight=ramp(config.vat),
    entropy_weight=ramp(config.vat_entropy),
  )
  bad = objectives.bad_gan(entropy_weight=ramp(config.bad_entropy), density_weight=config.bad_density)
  generator = Method(
    balanced(objectives.conditional_gan(penalty="r1", penalty_every=4, **consistent)),
    uses_generated=True,
    conditional=True,
  )
  return {
    "supervised": Method(objectives.supervised_only(), uses_unlabelled=False, augmented=False),
    "supervised_augmented": Method(objectives.supervised_only(), uses_unlabelled=False),
    "pseudo_label": Method(balanced(gan(adversarial=0.0, **consistent))),
    "mean_teacher": Method(balanced(teacher)),
    "vat": Method(balanced(vat)),
    "feature_matching": Method(balanced(gan(adversarial=recipe.adversarial)), uses_generated=True),
    "gan_consistency": Method(
      balanced(gan(adversarial=recipe.adversarial, **consistent)), uses_generated=True
    ),
    "bad_generator": Method(balanced(bad), uses_generated=True),
    "gan_augmented": Method(
      objectives.generator_augmented(weight=config.generated),
      uses_unlabelled=False,
      uses_generated=True,
      before=generator,
      conditional=True,
    ),
  }


def make_recipe(config: Config, few: bool) -> mnist_ssgan.Recipe:
  """The recipe of mnist_ssgan; augmentation, consistency and balance are those of its conv pair for both.

  From `few` training images, below 10,000, it is 800 updates, shorter averages, a smaller adversarial
  weight and a constant balance, chosen on the digits.
  """
  conv = mnist_ssgan.RECIPES["conv"]
  shared = {
    "strong": conv.strong if config.augmentation else None,
    "consistency": conv.consistency,
    "balance": conv.balance,
  }
  if few:
    shared |= {"balance": (1.0, 1.0), "steps": 800, "adversarial": 0.2, "ema_decay": 0.99}
  chosen = dataclasses.replace(mnist_ssgan.RECIPES[config.network], **shared)
  names = {"batch_size": "batch_unl"}
  flags = ("steps", "batch_size", "learning_rate", "adversarial", "consistency", "balance")
  given = {names.get(flag, flag): getattr(config, flag) for flag in flags}
  return dataclasses.replace(chosen, **{k: v for k, v in given.items() if v is not None})


def make_networks(network: str, dataset: data.Dataset, small: bool) -> tuple[Network, Generator, Generator]:
  """D, G, and the G that is asked for classes."""
  shape, num_classes = dataset.image_shape, dataset.num_classes
  if network == "mlp":
    g = networks.MLPGenerator(shape)
    return networks.MLPDiscriminator(num_classes), g, g.clone(norm="batch", num_classes=num_classes)
  d = networks.ConvDiscriminator(num_classes)
  g = networks.ConvGenerator(shape)
  if small:
    d, g = d.clone(width=16, num_features=128), g.clone(width=32)
  return d, g, g.clone(norm="layer", num_classes=num_classes)
