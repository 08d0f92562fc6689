"""The recipes whose steps are timed: those of the experiments, under the names of the stored results.

Ours and the peers are built from the same recipe, so neither has its own settings. Not a benchmark.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gan_jax import data, replicates
from gan_jax.datasets import Dataset
from gan_jax.recipes import Recipe, gan, ssgan
from gan_jax.types import LabelSplit, TrainState

HPARAMS: dict[str, Callable[[int], gan.Hparams | ssgan.Hparams]] = {
  "article_gan": lambda num_images: gan.tuned("article"),
  "feature_matching": lambda num_images: ssgan.tuned("mlp", num_images),
  "conv_ssgan": lambda num_images: ssgan.tuned("conv", num_images),
  "conditional_r1": lambda num_images: dataclasses.replace(gan.tuned("conv_fine"), labels="all"),
}
"""Name -> hyper-parameters for a number of training images."""


def make(name: str, dataset: Dataset, batch_size: int | None = None) -> Recipe:
  """The recipe of this name for the dataset.

  Args:
    name: a key of `HPARAMS`.
    dataset: gives the image shape, the classes and the number of training images.
    batch_size: unlabelled images per step (article_gan, conditional_r1: real ones); the other sizes scale
      in proportion. None: the recipe's.
  """
  hparams = HPARAMS[name](len(dataset.x_train))
  if isinstance(hparams, gan.Hparams):
    hparams = dataclasses.replace(hparams, batch_size=batch_size or hparams.batch_size)
    return gan.build(hparams, dataset.image_shape, dataset.num_classes)
  factor = (batch_size or hparams.num_unlabelled) / hparams.num_unlabelled
  sizes = {
    name: max(1, round(factor * getattr(hparams, name)))
    for name in ("num_labelled", "num_unlabelled", "num_generated")
  }
  return ssgan.build(dataclasses.replace(hparams, **sizes), dataset.image_shape, dataset.num_classes)


def split(recipe: Recipe, dataset: Dataset, seed: int = 0) -> LabelSplit:
  """The labels of a run: the default of the experiments, or all for a class-conditional D."""
  per_class = None if recipe.by_class else 10
  return data.split_labels(dataset.y_train, per_class, seed)


def start(recipe: Recipe, dataset: Dataset, seeds: Sequence[int]) -> tuple[TrainState, data.DeviceData]:
  """The initial state and the images of one GAN, or of one replicate per seed.

  Each seed determines the parameters and, with few labels, the labelled images.
  """
  splits = [split(recipe, dataset, seed) for seed in seeds]
  images = data.to_device(dataset, splits[0])
  states = [recipe.init_state(jax.random.key(seed), images) for seed in seeds]
  if len(seeds) == 1:
    return states[0], images
  return replicates.place(replicates.stack(states), data.to_device_splits(dataset, splits))


def penalty_every(recipe: Recipe) -> int:
  """Steps between applications of the gradient penalty; 1 without a penalty."""
  return getattr(recipe.hparams, "penalty_every", 1)


def random_images(side: int, channels: int = 1) -> Dataset:
  """500 random square images of ten classes, for measurements that do not depend on the pixels."""
  x = np.random.default_rng(0).integers(0, 256, (500, side, side, channels), dtype=np.uint8)
  y = np.arange(500) % 10
  return Dataset(f"random images of {side}x{side}", x, y, x[:0], y[:0], tuple("0123456789"))
