"""A GAN from 1, 10 and 100 % of the images, with no, fixed and adaptive augmentation.

Zhao et al., 2020, https://arxiv.org/abs/2006.10738 (DiffAugment), and Karras et al., 2020,
https://arxiv.org/abs/2006.06676 (ADA).

  python -m experiments.mnist_low_data --dataset mnist --steps 1200

Frechet distance to MNIST's test set after 1,200 steps, nine runs in 27 minutes on one CPU core:

               none    fixed   adaptive
  590 images   2.38     6.28       2.29
  5,900        1.74     6.31       1.74
  59,000       1.94     5.96       1.94
"""

from dataclasses import dataclass
from typing import Literal

from experiments import mnist_conditional, mnist_gan
from gan_jax import cli, program, results, run_dir
from gan_jax.recipes import gan
from gan_jax.types import InputError, Json


@dataclass(frozen=True)
class Config:
  """The flags of this experiment: those that its runs share, and the axes of the table."""

  data: cli.DataFlags = cli.DataFlags()
  hold_out: int | None = None
  """Training images held out for diagnostics, never trained on (None: a twentieth, at most 1,000)."""
  labels: cli.LabelFlags = cli.LabelFlags()
  train: cli.TrainFlags = cli.TrainFlags()
  gan_flags: mnist_gan.GanFlags = mnist_gan.GanFlags()
  percents: tuple[float, ...] = (1.0, 10.0, 100.0)
  """Percentages of the training images to train on."""
  augments: tuple[Literal["none", "fixed", "adaptive"], ...] = ("none", "fixed", "adaptive")
  """Kinds of augmentation."""
  conditional: bool = False
  """Class-conditional GANs, as in mnist_conditional; --labels-per-class all trains them with all labels."""
  loop: cli.LoopFlags = cli.LoopFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    cli.not_negative(self, "hold_out")
    for kind in self.augments:
      self.part(kind, cli.ImageFlags()).check()
    if not self.percents or not all(0 < share <= 100 for share in self.percents):
      raise InputError("--percents must name at least one value, each above 0 and at most 100")
    if not self.augments:
      raise InputError("--augments must name at least one")
    if not self.gan_flags.num_scored:
      raise InputError("the table scores generated images: keep --num-scored above 0")

  def part(
    self, kind: gan.Augmentation, images: cli.ImageFlags
  ) -> mnist_gan.Config | mnist_conditional.Config:
    """The configuration of the run with this augmentation on these images."""
    part = mnist_conditional.Config if self.conditional else mnist_gan.Config
    return part(
      data=self.data,
      images=images,
      labels=self.labels,
      train=self.train,
      gan_flags=self.gan_flags,
      augment=kind,
      loop=self.loop,
    )


def main(config: Config) -> Json:
  """Trains every GAN of the table, one after the other; returns the contents of `result.json`."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, config.labels, cli.ImageFlags(hold_out=config.hold_out))
  num_train = len(split.images)
  for percent in config.percents:
    num_images = round(percent * num_train / 100)
    if not num_images:
      raise InputError(
        f"--percents {percent:g} of {num_train:,} training images rounds to none: choose more"
      )
    share = cli.ImageFlags(num_images=num_images, hold_out=len(split.held_out))
    try:
      cli.split_labels(dataset, config.labels, share)
    except InputError as error:
      raise InputError(f"--percents {percent:g}: {error}") from error
  parts: dict[str, tuple[int, gan.Augmentation]] = {
    f"{percent:g}-percent-{kind}": (round(percent * num_train / 100), kind)
    for percent in config.percents
    for kind in config.augments
  }
  train = mnist_conditional.main if config.conditional else mnist_gan.main
  with run_dir.open_run(
    "mnist_low_data", config, dataset, split, recipes_used={}, files=tuple(parts)
  ) as run:
    cells, interrupted = {}, False
    for name, (num_images, kind) in parts.items():
      if not interrupted:
        images = cli.ImageFlags(num_images=num_images, hold_out=len(split.held_out))
        cells[name] = run_dir.run_inside(run, name, train, config.part(kind, images))
        interrupted = cells[name]["interrupted"]

    keys = ["num_images", "frechet", "frechet_to_training_set", "classes_covered", "probe_test_error"]
    keys += ["augmentation_strength", "alarms", "recipe"]
    result = {
      "interrupted": interrupted,
      "steps": max(cell["steps"] for cell in cells.values()),
      "seconds_train": sum(cell["seconds_train"] for cell in cells.values()),
      "frechet_replayed_training_set": next(iter(cells.values()))["frechet_replayed_training_set"],
      "cells": {
        name: {"augment": parts[name][1], **{key: cell.get(key) for key in keys}}
        for name, cell in cells.items()
      },
    }
    table = [
      (
        f"{cell['num_images']} images, {cell['augment']} augmentation: distance, classes, probe error",
        f"{cell['frechet']:.2f}, {cell['classes_covered']}, {cell['probe_test_error']:.2f} %",
      )
      for cell in result["cells"].values()
    ]
    pictures = [(name, f"{name}/samples/last.png") for name in cells]
    return results.finish(run, result, table=table, pictures=pictures)


if __name__ == "__main__":
  program.run(main, Config)
