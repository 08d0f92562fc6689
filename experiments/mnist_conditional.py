"""A class-conditional GAN from all labels or from few, which generates images of a requested class.

The generator takes (z, y), and the discriminator's score is its logit of y: one real logit per class, the
projection discriminator of Miyato & Koyama, 2018, https://arxiv.org/abs/1802.05637, without its
unconditional part. With few labels, D learns to classify the rest by cross-entropy and consistency.

  python -m experiments.mnist_conditional                            all labels
  python -m experiments.mnist_conditional --labels-per-class 10      100 labels, the rest unlabelled

MNIST, 4,000 steps, split 0: an independent classifier assigns 99.97 % of 10,000 images to the requested
class (100 labels: 99.82 %). Frechet distance to the test set 0.27 (0.55); replayed training images have
0.11. Test error of the discriminator as a classifier: 0.87 % (3.82 %). 489 s (544 s) on one CPU core.
"""

from dataclasses import dataclass

import numpy as np

from experiments import mnist_gan
from gan_jax import cli, data, evaluate, figures, metrics, program, recipes, run_dir
from gan_jax.datasets import Dataset
from gan_jax.recipes import gan
from gan_jax.types import Json

FILES = (*mnist_gan.FILES, "confusion.png")


@dataclass(frozen=True)
class Config:
  """The flags of this experiment."""

  data: cli.DataFlags = cli.DataFlags()
  images: cli.ImageFlags = cli.ImageFlags(hold_out=None)
  labels: cli.LabelFlags = cli.LabelFlags(labels_per_class="all")
  train: cli.TrainFlags = cli.TrainFlags()
  gan_flags: mnist_gan.GanFlags = mnist_gan.GanFlags()
  augment: gan.Augmentation | None = None
  """As in mnist_gan (None: affine with few labels, else none)."""
  transfer: cli.TransferFlags = cli.TransferFlags()
  loop: cli.LoopFlags = cli.LoopFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    hparams = self.hparams()
    gan.check(hparams)
    gan.check_adaptive(hparams)
    run_dir.check_source(self.run, self.transfer)

  def hparams(self, dataset: Dataset | None = None) -> gan.Hparams:
    """The tuned hyper-parameters with the flags applied."""
    few = self.labels.labels_per_class != "all" or (dataset is not None and (dataset.y_train < 0).any())
    # With few labels, layer normalisation gives the better classifier.
    given = {"norm": "layer"} if few and self.gan_flags.network in ("conv_fine", "vgg") else {}
    augmentation = self.augment or ("affine" if few else "none")
    labels = "few" if few else "all"
    return mnist_gan.make_hparams(
      self.gan_flags, self.train, dataset, labels=labels, augmentation=augmentation, **given
    )


def main(config: Config) -> Json:
  """Trains the conditional GAN and has an independent classifier label its images; returns the result."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, config.labels, config.images)
  recipe = gan.build(config.hparams(dataset), dataset.image_shape, dataset.num_classes)
  recipe = recipes.with_frozen(recipe, config.transfer.freeze_d)
  devices = cli.devices(config.loop.devices, recipe)
  with run_dir.open_run(
    "mnist_conditional", config, dataset, split, recipes_used={"gan": recipe}, files=FILES
  ) as run:
    extractor = mnist_gan.load_extractor(config.gan_flags.num_scored, dataset)
    fit = mnist_gan.fit_gan(run, config, recipe, devices, extractor)
    result, table, num_classes, seed = {}, [], dataset.num_classes, run.seed
    if extractor is not None:
      y = np.arange(config.gan_flags.num_scored) % num_classes
      x = evaluate.sample(recipe, fit.state, len(y), seed=seed, purpose="classes", y=y)
      logits, _ = extractor.predict(data.to_bytes(x))
      result["class_agreement"] = 100 - metrics.error_percent(logits, y)
      share = f"{result['class_agreement']:.2f} %"
      table = [("samples classified as the requested class", share)]
      counts = metrics.confusion_matrix(logits, y)
      figures.confusion(run.path / "confusion.png", counts, dataset.class_names)
    y = np.repeat(np.arange(num_classes), 10)
    grid = evaluate.sample(recipe, fit.state, len(y), seed=seed, y=y)
    return mnist_gan.finish(run, config.gan_flags, recipe, fit, extractor, grid, result, table)


if __name__ == "__main__":
  program.run(main, Config)
