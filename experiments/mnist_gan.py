"""A GAN without labels, with any loss, penalty and normalisation: the source article's and a better one.

Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661.

  python -m experiments.mnist_gan --network article   the article's networks, optimizer and 10,000 steps
  python -m experiments.mnist_gan                     a convolutional pair with R1

MNIST, Frechet distance of 10,000 images to the test set (0.11 for replayed training images): article 39.2
with 6 of 10 classes (113 with one class for --loss min_max, 5.50 with all ten for --penalty r1), 62 s of
training on two CPU cores; conv_fine 0.60, 428 s on one core.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gan_jax import (
  cli,
  data,
  evaluate,
  figures,
  memory,
  metrics,
  output,
  program,
  recipes,
  results,
  run_dir,
  steps,
  train,
)
from gan_jax.datasets import Dataset
from gan_jax.recipes import Recipe, gan, policies
from gan_jax.types import InputError, Json

FILES = (*run_dir.TRAINING_FILES, "samples", "learning_curves.png")


@dataclass(frozen=True)
class GanFlags:
  """The GAN."""

  network: gan.Tuned = "conv_fine"
  """article: the source article's networks and optimizer. conv_fine: a small convolutional pair. vgg and
  resnet: a deeper and a residual pair, for colour pictures."""
  loss: gan.Loss = "non_saturating"
  """Adversarial loss."""
  penalty: gan.Penalty | None = None
  """Gradient penalty on D at real images, generated ones, both, or interpolates (None: the recipe's)."""
  gamma: float | None = None
  """Weight of the penalty (None: the recipe's, 10 for wgan_gp)."""
  norm: gan.Norm | None = None
  """Normalisation in D (None: the recipe's)."""
  real_label: float = 1.0
  """One-sided label smoothing: the target probability of "real" for real images."""
  rotation: float | None = None
  """Weight of rotation prediction (None: 1 for square images of objects, 0 for others)."""
  num_scored: int = 10_000
  """Generated images for the Frechet distance, at most the number of training images, which are scored too;
  0: no distance, so that no feature extractor has to be trained."""

  def check(self) -> None:
    cli.not_negative(self, "gamma", "rotation")
    if self.gamma is not None and make_hparams(self, cli.TrainFlags()).penalty == "none":
      raise InputError("--gamma is the weight of a penalty, but --penalty is none: leave it out")
    if self.num_scored and self.num_scored < 256:
      raise InputError(f"--num-scored must be at least 256, or 0, not {self.num_scored}")


@dataclass(frozen=True)
class Config:
  """The flags of this experiment."""

  data: cli.DataFlags = cli.DataFlags()
  images: cli.ImageFlags = cli.ImageFlags(hold_out=None)
  labels: cli.LabelFlags = cli.LabelFlags()
  """The linear probe uses these labels; alarms of lost classes use the frequencies of all labels."""
  train: cli.TrainFlags = cli.TrainFlags()
  gan_flags: GanFlags = GanFlags()
  augment: gan.Augmentation = "none"
  """Augmentation of D's inputs: none, that of a classifier (affine), or a stronger policy, either always
  (fixed) or with a probability that follows D's overfitting (adaptive: ADA)."""
  transfer: cli.TransferFlags = cli.TransferFlags()
  loop: cli.LoopFlags = cli.LoopFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    hparams = make_hparams(self.gan_flags, self.train, augmentation=self.augment)
    gan.check(hparams)
    gan.check_adaptive(hparams)
    run_dir.check_source(self.run, self.transfer)


def main(config: Config) -> Json:
  """Trains the GAN, scores its generator and probes its discriminator; returns `result.json`."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, config.labels, config.images)
  hparams = make_hparams(config.gan_flags, config.train, dataset, augmentation=config.augment)
  recipe = gan.build(hparams, dataset.image_shape, dataset.num_classes)
  recipe = recipes.with_frozen(recipe, config.transfer.freeze_d)
  devices = cli.devices(config.loop.devices, recipe)
  with run_dir.open_run(
    "mnist_gan", config, dataset, split, recipes_used={"gan": recipe}, files=FILES
  ) as run:
    extractor = load_extractor(num_scored(config.gan_flags, dataset), dataset)
    fit = fit_gan(run, config, recipe, devices, extractor)
    x_fake = evaluate.sample(recipe, fit.state, 100, seed=run.seed)
    return finish(run, config.gan_flags, recipe, fit, extractor, x_fake)


def make_hparams(
  flags: GanFlags, train: cli.TrainFlags, dataset: Dataset | None = None, **given: Any
) -> gan.Hparams:
  """The tuned hyper-parameters, with the given flags applied and defaults that suit the dataset."""
  given |= cli.given(
    num_steps=train.steps,
    batch_size=train.batch_size,
    precision=train.precision,
    gamma=flags.gamma,
    norm=flags.norm,
    rotation=flags.rotation,
  )
  if dataset is not None:
    height, width, _ = dataset.image_shape
    given = {"rotation": float(dataset.of_objects and height == width), **given}
    given |= {"flip": dataset.of_objects, "policy": policies.suited(dataset.image_shape)}
  tuned = gan.tuned(flags.network, flags.penalty)
  return dataclasses.replace(tuned, loss=flags.loss, real_label=flags.real_label, **given)


def num_scored(flags: GanFlags, dataset: Dataset) -> int:
  """Generated images for the Frechet distance, which is comparable only at equal numbers."""
  return min(flags.num_scored, len(dataset.x_train))


def load_extractor(num: int, dataset: Dataset) -> metrics.FeatureExtractor | None:
  """The dataset's feature extractor, if `num` images are to be scored.

  Raises:
    InputError: they do not fit in memory.
  """
  memory.check(num, dataset.image_shape, "choose a smaller --num-scored", num_bytes=8)
  return evaluate.load_feature_extractor(dataset) if num else None


def fit_gan(
  run: run_dir.Run,
  config: Any,
  recipe: Recipe,
  devices: Sequence[Any],
  extractor: metrics.FeatureExtractor | None,
) -> train.Fit:
  """Trains the recipe with diagnostics; the extractor classifies the generated images."""
  assert run.split is not None
  dataset, class_prior = run.dataset, None
  if not steps.is_class_conditional(recipe.g):  # whose classes are drawn equally often
    class_prior = data.class_prior(dataset.y_train[dataset.y_train >= 0], dataset.num_classes)
  return train.fit(
    recipe,
    data.to_device(dataset, run.split, exclude_labelled=run.exclude_labelled),
    jax.random.key(run.seed),
    workdir=run.path,
    resume=config.run.resume,
    phase="gan",
    checkpoint_every=config.loop.steps_between_checkpoints(recipe.num_steps),
    on_nonfinite=config.loop.on_nonfinite,
    start=run_dir.start_from(config.transfer, recipe, dataset.class_names),
    diagnose=True,
    classify=extractor and extractor.classify,
    class_names=dataset.class_names,
    class_prior=class_prior,
    tensorboard=config.loop.tensorboard,
    devices=devices,
  )


def finish(
  run: run_dir.Run,
  flags: GanFlags,
  recipe: Recipe,
  fit: train.Fit,
  extractor: metrics.FeatureExtractor | None,
  grid: Float[np.ndarray, "n h w c"],
  result: Json | None = None,
  table: Sequence[tuple[str, str]] = (),
) -> Json:
  """Scores the generator, probes the discriminator, writes the pictures and completes the result."""
  dataset, table = run.dataset, list(table)
  assert run.split is not None
  labelled = data.labelled(dataset, run.split)
  (found,) = evaluate.make_evaluate(recipe)(dataset, [fit.state], [labelled])
  if found.error is not None:
    table.append(("test error of the discriminator as a classifier", f"{found.error:.2f} %"))
  quality = {}
  if extractor is not None:
    num = num_scored(flags, dataset)
    quality = evaluate.generator_quality(extractor, recipe, fit.state, dataset, num, seed=run.seed)
    table = [
      (f"{extractor.metric(num)}: distance to the test set", f"{quality['frechet']:.2f}"),
      ("distance to the training set", f"{quality['frechet_to_training_set']:.2f}"),
      (
        "distance of the training set to the test set",
        f"{quality['frechet_replayed_training_set']:.2f}",
      ),
      ("classes covered", f"{quality['classes_covered']} of {dataset.num_classes}"),
      *table,
    ]
  figures.sample_grid(run.path / "samples" / "last.png", grid)
  rows = output.read_rows(run.metrics_path)
  figures.learning_curves(run.path / "learning_curves.png", rows)
  result = {
    **results.training(fit),
    "network": recipe.hparams.network,
    "recipe": recipes.describe(recipe),
    "test_error": found.error,
    "probe_test_error": found.linear["features"],
    "augmentation_strength": (rows or [{}])[-1].get("d/strength"),
    **quality,
    **(result or {}),
  }
  table.append(
    ("test error, linear probe on the discriminator's features", f"{found.linear['features']:.2f} %")
  )
  pictures = [("Generated images", "samples/last.png"), ("Learning curves", "learning_curves.png")]
  return results.finish(run, result, table=table, pictures=pictures)


if __name__ == "__main__":
  program.run(main, Config)
