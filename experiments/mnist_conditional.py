"""A class-conditional GAN from all labels or from few: images of the class that is asked for.

The generator takes (z, y), the discriminator's reading is the logit of y: one realness logit a class, the
projection discriminator of Miyato & Koyama, 2018, https://arxiv.org/abs/1802.05637, without its
unconditional part. With few labels, cross-entropy and consistency teach D the classes of the rest.

  python -m experiments.mnist_conditional                            every label
  python -m experiments.mnist_conditional --labels-per-class 10      100 labels, the rest without

MNIST, 4,000 updates, split 0: an independent classifier finds 99.97 % of 10,000 images to be of the class
asked for (100 labels: 99.82 %). Frechet distance to the test set 0.27 (0.55), where replayed training
images have 0.11. The discriminator as a classifier errs on 0.87 % (3.82 %) of the test images. 489 s
(544 s) on one CPU core.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optax

from experiments import _gan
from gan_jax import augment, data, metrics, objectives, report, runs
from gan_jax.types import InputError, Json


@dataclass(frozen=True)
class Config(_gan.Config):
  """The flags of this experiment."""

  labels_per_class: int | None = None
  """The label budget: so many labelled images of each class (default: every label)."""
  augment: Literal["none", "affine", "fixed", "adaptive"] | None = None
  """As in mnist_gan (default: affine with few labels, else none)."""

  def augmentation(self) -> str:
    return self.augment or ("none" if self.labels_per_class is None else "affine")

  def recipe(self) -> _gan.Recipe:
    recipe = super().recipe()
    if self.labels_per_class is None or self.network == "mlp" or self.norm is not None:
      return recipe
    return dataclasses.replace(recipe, norm="layer")  # the better classifier from few labels

  def check(self) -> None:
    super().check()
    if self.labels_per_class is not None and self.recipe().batch_size < 4:
      raise InputError("--batch-size must be at least 4: a quarter of it are labelled images")
    if self.loss == "relativistic":
      raise InputError(
        "--loss relativistic compares images pair by pair, of whatever classes: choose another"
      )


def main(config: Config) -> Json:
  """Trains the conditional GAN and has an independent judge name its images; returns `result.json`."""
  with runs.open_run(config, "mnist_conditional") as run:
    judge = _gan.load_judge(run)
    num_classes, batch = run.dataset.num_classes, config.recipe().batch_size
    # With every label there is no image without: then there is nothing to be consistent on.
    few = config.labels_per_class is not None
    num_lab = batch // 4 if few else batch
    ramp = optax.linear_schedule(0.0, 1.0, max(1, int(0.4 * config.recipe().steps)))
    objective = _gan.objective(
      config,
      run,
      objectives.conditional_gan,
      consistency_weight=ramp if few else 0.0,  # early targets are wrong
      weak=augment.affine(shift=0.05, rotate=10, scale=0.05, shear=0.1),
    )
    gan = _gan.train_gan(
      run,
      objective,
      judge,
      num_logits=num_classes,
      conditional=True,
      num_lab=num_lab,
      num_unl=batch - num_lab,
    )

    result, table = {}, []
    if judge is not None:
      y = np.arange(config.num_scored) % num_classes
      logits, _ = judge.predict(data.to_bytes(_gan.sample(gan, len(y), config.seed + 2, y)))
      result["class_agreement"] = 100 - metrics.error_percent(logits, y)
      share = f"{result['class_agreement']:.2f} %"
      table = [("images that the judge takes for the class asked for", share)]
      counts = metrics.confusion_matrix(logits, y)
      report.confusion(run.path / "confusion.png", counts, run.dataset.class_names)
    return _gan.finish(
      run,
      gan,
      judge,
      _gan.sample(gan, 10 * num_classes, config.seed, np.repeat(np.arange(num_classes), 10)),
      result,
      table,
    )


if __name__ == "__main__":
  runs.cli(main, Config)
