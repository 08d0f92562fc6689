"""Recipes as values: families of recipes, and recipes derived from recipes.

    hparams = recipes.ssgan.tuned("conv", num_images=60_000)
    recipe = recipes.ssgan.build(hparams, image_shape=(28, 28, 1), num_classes=10)
    control = recipes.supervised_control(recipe)

A family is a frozen dataclass of hyper-parameters and a pure function
`build(hparams, image_shape, num_classes) -> Recipe`. A run stores the description that `describe` returns,
and `rebuild` makes the same recipe from it.
"""

import dataclasses
from collections.abc import Callable

from gan_jax.recipes import gan, policies, ssgan, study
from gan_jax.recipes.recipe import (
  DERIVATIONS,
  Hparams,
  Recipe,
  learning_rate,
  supervised_control,
  with_flops_of,
  with_frozen,
  with_learning_rates,
  with_terms,
  with_unlabelled,
  without_augmentation,
  without_generator,
)
from gan_jax.types import InputError, Json, as_tuple

FAMILIES: dict[str, tuple[type[Hparams], Callable[..., Recipe]]] = {
  "ssgan": (ssgan.Hparams, ssgan.build),
  "gan": (gan.Hparams, gan.build),
  "study": (study.Hparams, study.build),
}
"""Families by name: hyper-parameters and `build`. A new family adds a line here."""


def describe(recipe: Recipe) -> Json:
  """Family, hyper-parameters, image shape, classes, and derivations applied since: enough for `rebuild`."""
  return {
    "family": recipe.family,
    "hparams": dataclasses.asdict(recipe.hparams),
    "image_shape": list(recipe.image_shape),
    "num_classes": recipe.num_classes,
    "derived": [[name, kwargs] for name, kwargs in recipe.derived],
  }


def rebuild(description: Json) -> Recipe:
  """The recipe that `describe` was given, from the returned JSON.

  Raises:
    InputError: an unknown family or derivation, or hyper-parameters of another version.
  """
  try:
    hparams_cls, build = FAMILIES[description["family"]]
    hparams = hparams_cls(**{name: as_tuple(value) for name, value in description["hparams"].items()})
    recipe = build(hparams, tuple(description["image_shape"]), description["num_classes"])
    for name, kwargs in description["derived"]:
      recipe = DERIVATIONS[name](recipe, **kwargs)
  except (KeyError, TypeError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"this recipe is from another version of gan_jax: {error}") from error
  return recipe


__all__ = [
  "FAMILIES",
  "Recipe",
  "describe",
  "gan",
  "learning_rate",
  "policies",
  "rebuild",
  "ssgan",
  "study",
  "supervised_control",
  "with_flops_of",
  "with_frozen",
  "with_learning_rates",
  "with_terms",
  "with_unlabelled",
  "without_augmentation",
  "without_generator",
]
