"""The methods of the few-label study, which differ only in the objective and its requirements.

All start from one semi-supervised GAN, so they share networks, optimizers, batches, augmentation and number
of steps. Those that use unlabelled images also share class balance, so that it favours none of them; in
AdaMatch alone, distribution alignment replaces it. `bad_generator` keeps the published adversarial weight.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import optax

from gan_jax import networks, objectives, terms
from gan_jax.recipes import policies, ssgan
from gan_jax.recipes import recipe as base
from gan_jax.recipes.recipe import Recipe
from gan_jax.types import BatchSizes

Method = Literal[
  "supervised",
  "supervised_augmented",
  "fixmatch_ema",
  "adamatch",
  "mutual_information",
  "mean_teacher",
  "vat",
  "feature_matching",
  "gan_consistency",
  "gan_adamatch",
  "gan_vat",
  "gan_mixed",
  "gan_confident",
  "gan_undecided",
  "bad_generator",
  "gan_augmented",
]
First = Literal["conditional_generator"]
"""Trains the generator that `gan_augmented` starts with."""


@dataclass(frozen=True, kw_only=True)
class Weights:
  """Weights of method-specific terms. The defaults were tuned on the digits, or are initial guesses."""

  teacher: float = 5.0
  """Weight of the averaged teacher in mean_teacher."""
  vat: float = 1.0
  """Weight of the divergence in vat and gan_vat."""
  vat_entropy: float = 1.0
  """Weight of the entropy in vat and gan_vat."""
  bad_entropy: float = 2.0
  """Weight of the entropy in bad_generator."""
  bad_density: float = 0.1
  """Weight of the penalty on generated images in dense regions in bad_generator."""
  gamma: float = 0.0125
  """Weight of R1, for pixels in [0, 1], when gan_augmented trains its generator."""
  generated: float = 1.0
  """Weight of the generated images in gan_augmented."""
  mutual: float = 0.1
  """Weight of the mutual information at the first step; it falls to 0 over 30 % of the steps."""
  mixed: float = 0.25
  """Weight of the partly real images in gan_mixed."""
  confident: float = 0.03
  """Weight of the confident generated images at the last step of gan_confident; it rises from 0."""
  undecided: float = 0.02
  """Weight of the entropy on generated images in gan_undecided."""


@dataclass(frozen=True, kw_only=True)
class Hparams(Weights, ssgan.Hparams):
  """Hyper-parameters. Terms that train D on its own predictions gain their weight over the ramp, except
  for those whose schedule stands at their weight."""

  method: Method | First


def tuned(
  network: ssgan.Tuned,
  num_images: int,
  image_side: int,
  method: Method | First,
  policy: policies.Name | None = None,
) -> Hparams:
  """The hyper-parameters for this network, number of training images, and shorter side of an image.

  Augmentation, consistency and class balance are those of `ssgan.tuned("conv", ...)`, for mlp too. Small
  data has 800 steps, shorter parameter averages, a smaller adversarial weight, and constant class balance,
  as chosen on the digits. conv is conv_small for images below 16x16.
  """
  start = ssgan.tuned(network, ssgan.SMALL_DATA, policy or "digits")
  conv = ssgan.Hparams()
  changes = {name: getattr(conv, name) for name in ("consistency", "class_balance")}
  if network == "conv" and image_side < 16:
    changes["network"] = "conv_small"
  if num_images < ssgan.SMALL_DATA:
    changes |= {"class_balance": (1.0, 1.0), "num_steps": 800, "adversarial": 0.2, "ema_decay": 0.99}
  return Hparams(**{**vars(start), **vars(Weights()), **changes, "method": method})


def build(hparams: Hparams, image_shape: tuple[int, int, int], num_classes: int) -> Recipe:
  """The recipe of a method for images of this shape: height, width, channels."""
  h = hparams
  sizes = BatchSizes(h.num_labelled, h.num_unlabelled, h.num_generated)
  without_vat = dataclasses.replace(h, vat=0.0)  # which is a method of its own
  shared = dataclasses.replace(ssgan.build(without_vat, image_shape, num_classes), batch=sizes)
  recipe = METHODS[h.method](shared, h)
  return dataclasses.replace(recipe, family="study", hparams=h, derived=())


def generator_of(recipe: Recipe) -> Recipe | None:
  """The recipe that pretrains this one's generator, if any, for as many steps and with its own D."""
  hparams = recipe.hparams
  if not isinstance(hparams, Hparams) or hparams.method != "gan_augmented":
    return None
  first = dataclasses.replace(hparams, method="conditional_generator")
  return build(first, recipe.image_shape, recipe.num_classes)


# --- The methods, each a recipe derived from the shared one


def _feature_matching(recipe: Recipe, h: Hparams) -> Recipe:
  objective = objectives.semi_supervised_gan(adversarial=h.adversarial)
  return _with_objective(recipe, h, objective)


def _adamatch(recipe: Recipe, h: Hparams) -> Recipe:
  return _gan_adamatch(base.without_generator(recipe), h)


def _gan_adamatch(recipe: Recipe, h: Hparams) -> Recipe:
  term = ssgan.ramped(h, h.consistency), terms.adamatch(ssgan.weak(h), threshold=h.threshold)
  kept = {k: v for k, v in recipe.objective.d.items() if k not in ("consistency", "class_balance")}
  objective = dataclasses.replace(recipe.objective, d={**kept, "adamatch": term})
  return dataclasses.replace(recipe, objective=objective)


def _mutual_information(recipe: Recipe, h: Hparams) -> Recipe:
  weight = optax.linear_schedule(h.mutual, 0.0, max(1, int(0.3 * h.num_steps)))
  term = weight, terms.mutual_information(ssgan.weak(h))
  return base.with_terms(base.without_generator(recipe), mutual_information=term)


def _gan_vat(recipe: Recipe, h: Hparams) -> Recipe:
  return base.with_terms(_feature_matching(recipe, h), **_vat(recipe, h).objective.d)


def _gan_confident(recipe: Recipe, h: Hparams) -> Recipe:
  weight = base.ramp(h.confident, h.num_steps, 1.0)
  return base.with_terms(
    recipe, confident_generated=(weight, terms.confident_generated(threshold=h.threshold))
  )


def _mean_teacher(recipe: Recipe, h: Hparams) -> Recipe:
  objective = objectives.mean_teacher(weight=ssgan.ramped(h, h.teacher), weak=ssgan.weak(h))
  return _with_objective(base.without_generator(recipe), h, objective)


def _vat(recipe: Recipe, h: Hparams) -> Recipe:
  return _with_objective(base.without_generator(recipe), h, ssgan.vat(h))


def _bad_generator(recipe: Recipe, h: Hparams) -> Recipe:
  objective = objectives.bad_gan(
    entropy_weight=ssgan.ramped(h, h.bad_entropy), density_weight=h.bad_density
  )
  return _with_objective(recipe, h, objective)


def _conditional_generator(recipe: Recipe, h: Hparams) -> Recipe:
  objective = objectives.conditional_gan(
    penalty="r1",
    gamma=h.gamma,
    penalty_every=4,
    consistency_weight=ssgan.ramped(h, h.consistency),
    weak=ssgan.weak(h),
    threshold=h.threshold,
  )
  return _with_objective(_class_conditional(recipe, h), h, objective)


def _gan_augmented(recipe: Recipe, h: Hparams) -> Recipe:
  return dataclasses.replace(
    _class_conditional(recipe, h),
    objective=objectives.generator_augmented(weight=h.generated),
    batch=recipe.batch._replace(unlabelled=0),
  )


def _with_objective(recipe: Recipe, h: Hparams, objective: objectives.Objective) -> Recipe:
  return dataclasses.replace(recipe, objective=objective.plus(class_balance=ssgan.class_balance(h)))


def _class_conditional(recipe: Recipe, h: Hparams) -> Recipe:
  """The same recipe with a class-conditional generator."""
  g, _ = networks.make_pair(
    h.network,
    recipe.image_shape,
    num_logits=recipe.num_classes,
    num_classes=recipe.num_classes,
    precision=h.precision,
  )
  return dataclasses.replace(recipe, g=g)


METHODS: dict[Method | First, Callable[[Recipe, Hparams], Recipe]] = {
  "supervised": lambda recipe, h: base.without_augmentation(base.supervised_control(recipe)),
  "supervised_augmented": lambda recipe, h: base.supervised_control(recipe),
  "fixmatch_ema": lambda recipe, h: base.without_generator(recipe),
  "adamatch": _adamatch,
  "mutual_information": _mutual_information,
  "mean_teacher": _mean_teacher,
  "vat": _vat,
  "feature_matching": _feature_matching,
  "gan_consistency": lambda recipe, h: recipe,
  "gan_adamatch": _gan_adamatch,
  "gan_vat": _gan_vat,
  "gan_mixed": lambda recipe, h: base.with_terms(recipe, mixed=(h.mixed, terms.mixed)),
  "gan_confident": _gan_confident,
  "gan_undecided": lambda recipe, h: base.with_terms(
    recipe, undecided_generated=(h.undecided, terms.undecided_generated)
  ),
  "bad_generator": _bad_generator,
  "gan_augmented": _gan_augmented,
  "conditional_generator": _conditional_generator,
}
"""Methods by name: each makes its recipe from the shared one and the hyper-parameters."""
