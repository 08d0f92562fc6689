"""Transfer of a discriminator trained without labels on one dataset to few labels of another.

Mo et al., 2020, https://arxiv.org/abs/2002.10964 (FreezeD: the first layers stay frozen).

  python -m experiments.transfer --source digits --dataset mnist --steps 3000
  python -m experiments.transfer --source mnist --dataset digits

100 labels, five splits, test error with transfer and from scratch: digits to MNIST 6.70 and 7.42 %, MNIST
to digits 4.14 and 5.28 %. 6 to 7 minutes on one CPU core.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments import mnist_gan, mnist_ssgan
from gan_jax import classify, cli, output, program, recipes, results, run_dir
from gan_jax.types import InputError, Json


@dataclass(frozen=True)
class Config:
  """The flags of this experiment. --split-seed is the seed of the first label split."""

  source: str = "digits"
  """The dataset on which D is pre-trained without labels; --dataset is the one with few labels."""
  data: cli.DataFlags = cli.DataFlags(dataset="mnist", image_size=16)
  images: cli.ImageFlags = cli.ImageFlags()
  labels: cli.LabelFlags = cli.LabelFlags()
  train: cli.TrainFlags = cli.TrainFlags()
  pretrain_steps: int = 2000
  """Pre-training steps on the source."""
  freeze_d: int = 0
  """Freeze this many of the discriminator's first layers at their pre-trained values (FreezeD)."""
  splits: int = 5
  """Number of label splits, with consecutive seeds from --split-seed."""
  loop: cli.LoopFlags = cli.LoopFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    cli.at_least_one(self, "splits", "pretrain_steps")
    last = max(self.labels.split_seed, self.train.seed) + self.splits - 1
    if last >= 2**32:
      raise InputError(f"the last of the --splits would have the seed {last:,}: choose a smaller first one")
    cli.not_negative(self, "freeze_d")
    if self.labels.exclude_labelled:
      raise InputError("--exclude-labelled changes nothing here, where D learns from labelled images alone")
    if self.splits > 1000:
      raise InputError(f"--splits must be at most 1,000, not {self.splits:,}: each takes two trainings")


def main(config: Config) -> Json:
  """Pre-trains once, then fine-tunes and trains from scratch on each split; returns `result.json`."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, config.labels, config.images)
  seeds = range(config.labels.split_seed, config.labels.split_seed + config.splits)
  source_data = dataclasses.replace(config.data, dataset=config.source)
  if cli.is_own(config.source):
    source_data = dataclasses.replace(source_data, data_dir=None, manual_dir=None)
  source_shape = cli.load(source_data).image_shape
  if source_shape != dataset.image_shape:
    found = map(output.shape_text, (source_shape, dataset.image_shape))
    raise InputError("--source has images of {} and --dataset of {}: they must match".format(*found))
  recipes.with_frozen(classify.make_recipe(_pair(config), dataset, split), config.freeze_d)  # or it raises
  parts = ("pretrained", *(f"split-{seed}" for seed in seeds))
  with run_dir.open_run("transfer", config, dataset, split, recipes_used={}, files=parts) as run:
    source = mnist_gan.Config(
      data=source_data,
      labels=cli.LabelFlags(labels_per_class=1),  # for a probe that is not reported
      train=dataclasses.replace(config.train, steps=config.pretrain_steps),
      # layer: the norm of the discriminator that is fine-tuned. The generator is not scored.
      gan_flags=mnist_gan.GanFlags(norm="layer", num_scored=0),
      loop=config.loop,
    )
    pretrained = run_dir.run_inside(run, "pretrained", mnist_gan.main, source)
    init_from = str(run.path / "pretrained")
    pairs: list[Json] = []
    interrupted = pretrained["interrupted"]
    for i, seed in enumerate(seeds):
      if not interrupted:
        pair = dataclasses.replace(
          _pair(config),
          train=dataclasses.replace(config.train, seed=config.train.seed + i),
          labels=dataclasses.replace(config.labels, split_seed=seed),
          transfer=cli.TransferFlags(init_from=init_from, init_parts="d", freeze_d=config.freeze_d),
        )
        pairs.append(run_dir.run_inside(run, f"split-{seed}", mnist_ssgan.main, pair))
        interrupted = pairs[-1]["interrupted"]

    complete = [pair for pair in pairs if pair["supervised_test_error"] is not None]
    fine_tuned = [pair["test_error"] for pair in complete]
    scratch = [pair["supervised_test_error"] for pair in complete]
    result = {
      "interrupted": interrupted,
      "source": config.source,
      "steps": max((pair["steps"] for pair in pairs), default=0),
      "seconds_train": sum(part["seconds_train"] for part in [pretrained, *pairs]),
      "test_error": statistics.mean(fine_tuned) if complete else None,
      "supervised_test_error": statistics.mean(scratch) if complete else None,
      "probe_test_error": statistics.mean(p["probe_test_error"] for p in complete) if complete else None,
      "split_seeds": [pair["split_seed"] for pair in complete],
      "fine_tuned_test_errors": fine_tuned,
      "scratch_test_errors": scratch,
    }
    names = {"transferred": fine_tuned, "from scratch": scratch, "gain": gains(fine_tuned, scratch)}
    table = [
      (f"test error, {name}: mean +- std (each split)", _mean_std(values)) for name, values in names.items()
    ]
    pictures = [("Generated images of the source", "pretrained/samples/last.png")]
    return results.finish(run, result, table=table, pictures=pictures)


def _pair(config: Config) -> mnist_ssgan.Config:
  """The configuration of fine-tuning and its control.

  Without GAN, consistency and class balance, one phase fine-tunes D on the labels alone, and the other
  trains it on them from scratch.
  """
  return mnist_ssgan.Config(
    network="conv",  # the pair of the pre-trained discriminator
    data=config.data,
    images=config.images,
    labels=config.labels,
    train=config.train,
    objective=cli.ObjectiveFlags(adversarial=0.0, consistency=0.0, class_balance=(0.0, 0.0)),
    loop=config.loop,
  )


def gains(fine_tuned: Sequence[float], scratch: Sequence[float]) -> list[float]:
  """By how many percentage points transfer lowers the error on each split: positive if it helps."""
  return [before - after for before, after in zip(scratch, fine_tuned, strict=True)]


def _mean_std(values: Sequence[float]) -> str:
  if not values:
    return "not run"
  std = statistics.stdev(values) if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.2f} +- {std:.2f} % ({', '.join(f'{v:.2f}' for v in values)})"


if __name__ == "__main__":
  program.run(main, Config)
