"""A semi-supervised GAN: a K-class discriminator from few labels and many images.

Salimans et al., 2016, https://arxiv.org/abs/1606.03498 (feature matching), with consistency (Sohn et al.,
2020, https://arxiv.org/abs/2001.07685) and class balance (Springenberg, 2016,
https://arxiv.org/abs/1511.06390).

  python -m experiments.mnist_ssgan                 MNIST where it can be had, else the bundled digits
  python -m experiments.mnist_ssgan --network mlp   the published networks and losses

100 labels of MNIST: 0.73 +- 0.10 % test error over splits 0-4 (supervised control 5.53), 446 to 522 s on
two CPU cores. 50 labels of the digits: 1.47 +- 0.74 % (control 8.78), 12 to 14 s.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax

from gan_jax import cli, data, evaluate, metrics, page, recipes, report, run_dir, train
from gan_jax.datasets import Dataset
from gan_jax.recipes import ssgan
from gan_jax.types import Json

FILES = (*run_dir.TRAINING_FILES, "samples", "learning_curves.png", "confusion.png", "reliability.png")


@dataclass(frozen=True)
class Config:
  """The flags of this experiment."""

  data: cli.DataFlags = cli.DataFlags()
  images: cli.ImageFlags = cli.ImageFlags()
  labels: cli.LabelFlags = cli.LabelFlags()
  train: cli.TrainFlags = cli.TrainFlags()
  network: Literal["conv", "mlp"] = "conv"
  """conv: small convolutional pair with augmentation and consistency. mlp: the pair of Improved GAN."""
  adversarial: float | None = None
  """Weight of D's adversarial loss; 0 trains without a generator (default: the recipe's)."""
  consistency: float | None = None
  """Weight of consistency; 0, and --class-balance 0 0, give the pure GAN (default: the recipe's)."""
  class_balance: tuple[float, float] | None = None
  """Weight of class balance at the first and at the last step; use 0 0 where classes are not about equally
  frequent (default: the recipe's)."""
  learning_rate: float | None = None
  """Peak learning rate of D (default: the recipe's)."""
  frechet: bool = False
  """Also measure the Frechet distance of generated images to the test set."""
  transfer: cli.TransferFlags = cli.TransferFlags()
  loop: cli.LoopFlags = cli.LoopFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    cli.not_negative(self, "adversarial", "consistency", "class_balance", "learning_rate")
    run_dir.check_source(self.run, self.transfer)


def main(config: Config) -> Json:
  """Trains the semi-supervised GAN and its two controls; returns what `result.json` holds."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, config.labels, config.images)
  recipe = make_recipe(config, dataset, num_images=len(split.images))
  control = recipes.supervised_control(recipe)
  recipe = recipes.with_frozen(recipe, config.transfer.freeze_d)
  used = {"semi-supervised": recipe, "supervised": control}
  with run_dir.open_run("mnist_ssgan", config, dataset, split, recipes_used=used, files=FILES) as run:
    images = data.to_device(dataset, split, exclude_labelled=config.labels.exclude_labelled)
    logged = {"workdir": run.path, "tensorboard": config.loop.tensorboard}
    fit = train.fit(
      recipe,
      images,
      jax.random.key(config.train.seed),
      phase="semi-supervised",
      resume=config.run.resume,
      checkpoint_every=config.loop.checkpoint_every,
      start=run_dir.start_from(config.transfer, recipe),
      diagnose=recipe.batch.generated > 0,
      class_names=dataset.class_names,
      **logged,
    )
    fits = [fit]
    if not fit.interrupted:
      key = jax.random.key(config.train.seed)
      fits.append(train.fit(control, images, key, phase="supervised", checkpoint_every=None, **logged))
    states = [fit.state, *(control.state for control in fits[1:] if not control.interrupted)]
    labelled = [(images.x_lab, images.y_lab)] * len(states)
    found, *controls = evaluate.make_evaluate(recipe)(dataset, states, labelled)
    errors = {
      "test_error": found.error,
      "supervised_test_error": controls[0].error if controls else None,
      "probe_test_error": found.linear["features"],
    }

    x_fake = evaluate.sample(recipe, fit.state, 100, seed=config.train.seed)
    report.sample_grid(run.path / "samples" / "last.png", x_fake)
    report.learning_curves(run.path / "learning_curves.png", report.read_metrics(run.metrics_path))
    assert found.confusion is not None  # D has the classes
    report.confusion(run.path / "confusion.png", found.confusion, dataset.class_names)
    report.reliability_diagram(run.path / "reliability.png", metrics.reliability(found.probs, found.y))
    quality = {}
    if config.frechet:
      extractor = evaluate.load_feature_extractor(dataset, say=report.say)
      x_fake = evaluate.sample(recipe, fit.state, 10_000, seed=config.train.seed, purpose="frechet")
      quality = metrics.generator_quality(extractor, x_fake)

    result = {
      **run_dir.training(fit),
      "interrupted": any(each.interrupted for each in fits),
      "network": config.network,
      "recipe": recipes.describe(recipe),
      "supervised_seconds_train": round(fits[1].seconds_train, 1) if len(fits) > 1 else None,
      **errors,
      **evaluate.describe(found, dataset.class_names),
      **quality,
    }
    names = {
      "test_error": "semi-supervised: few labels and all images",
      "supervised_test_error": "supervised: the same labels, no other images",
      "probe_test_error": "linear probe on the discriminator's features",
    }
    table = [
      (f"test error, {names[key]}", "not run" if error is None else f"{error:.2f} %")
      for key, error in errors.items()
    ]
    table += [
      (f"{key}: distance to the test set", f"{value:.2f}")
      for key, value in quality.items()
      if "frechet" in key
    ]
    table += [("alarm", alarm) for alarm in fit.alarms]
    pictures = [("Generated images", "samples/last.png")]
    sections = page.of_classifier(run.path, found, dataset.class_names, images.x_lab, images.y_lab)
    sections.append(
      page.Section("Learning curves", pictures=[page.Picture(run.path / "learning_curves.png")])
    )
    return run_dir.finish(run, result, table=table, pictures=pictures, sections=sections)


def make_recipe(config: Config, dataset: Dataset, *, num_images: int) -> recipes.Recipe:
  """The tuned recipe for so many training images, with the flags that were given."""
  given = cli.given(
    num_steps=config.train.steps,
    num_unlabelled=config.train.batch_size,
    d_learning_rate=config.learning_rate,
    adversarial=config.adversarial,
    consistency=config.consistency,
    class_balance=config.class_balance,
  )
  hparams = dataclasses.replace(ssgan.tuned(config.network, num_images), **given)
  return ssgan.build(hparams, dataset.image_shape, dataset.num_classes)


if __name__ == "__main__":
  cli.run(main, Config)
