"""A GAN from 1, 10 and 100 % of the images: no augmentation, fixed, and adaptive.

Zhao et al., 2020, https://arxiv.org/abs/2006.10738 (DiffAugment), and Karras et al., 2020,
https://arxiv.org/abs/2006.06676 (ADA).

  python -m experiments.mnist_low_data --dataset mnist --steps 1200

Frechet distance to MNIST's test set after 1,200 updates, nine runs in 27 minutes on one CPU core:

               none    fixed   adaptive
  590 images   2.38     6.28       2.29
  5,900        1.74     6.31       1.74
  59,000       1.94     5.96       1.94
"""

from dataclasses import dataclass
from typing import Literal

from experiments import _gan, mnist_gan
from gan_jax import runs
from gan_jax.types import InputError, Json


@dataclass(frozen=True)
class Config(_gan.Config):
  """The flags of this experiment: those of every run in its table, and what the table goes through."""

  percents: tuple[float, ...] = (1.0, 10.0, 100.0)
  """Shares of the training images."""
  augments: tuple[Literal["none", "fixed", "adaptive"], ...] = ("none", "fixed", "adaptive")
  """Kinds of augmentation."""

  def check(self) -> None:
    super().check()
    if not self.percents or not all(0 < share <= 100 for share in self.percents):
      raise InputError("--percents must be above 0 and at most 100, and at least one")
    if not self.augments:
      raise InputError("--augments must name at least one")
    if not self.num_scored:
      raise InputError("the table is about generated images: leave --num-scored above 0")
    if self.num_images is not None or self.augment != "none":
      raise InputError("the table chooses images and augmentation: use --percents and --augments")


def main(config: Config) -> Json:
  """Trains every GAN of the table, one after the other; returns what `result.json` holds."""
  with runs.open_run(config, "mnist_low_data") as run:
    num_held_out = len(run.split.held_out)
    num_train = len(run.dataset.x_train) - num_held_out
    cells, interrupted = {}, False
    for percent in config.percents:
      for kind in config.augments:
        if not interrupted:
          name = f"{percent:g}-percent-{kind}"
          num_images = round(percent * num_train / 100)
          own = {"num_images": num_images, "augment": kind, "hold_out": num_held_out}
          cells[name] = runs.run_inside(run, name, mnist_gan.main, mnist_gan.Config, **own)
          interrupted = cells[name]["interrupted"]

    keys = ("num_images", "augment", "frechet", "classes_covered", "probe_test_error", "alarms")
    result = {
      "interrupted": interrupted,
      "steps": config.recipe().steps,
      "seconds_train": sum(cell["seconds_train"] for cell in cells.values()),
      "test_error": None,
      "supervised_test_error": None,
      "probe_test_error": None,
      "frechet_replayed_training_set": next(iter(cells.values()))["frechet_replayed_training_set"],
      "cells": {name: {key: cell[key] for key in keys} for name, cell in cells.items()},
    }
    table = [
      (
        f"{cell['num_images']} images, {cell['augment']} augmentation: distance, classes, probe error",
        f"{cell['frechet']:.2f}, {cell['classes_covered']}, {cell['probe_test_error']:.2f} %",
      )
      for cell in cells.values()
    ]
    pictures = [(name, f"{name}/samples/last.png") for name in cells]
    return runs.finish(run, result, table=table, pictures=pictures)


if __name__ == "__main__":
  runs.cli(main, Config)
