"""What a discriminator learned without labels on one dataset, for few labels of another.

Mo et al., 2020, https://arxiv.org/abs/2002.10964 (FreezeD: the first layers stay as they were).

  python -m experiments.transfer --source digits --dataset mnist
  python -m experiments.transfer --source mnist --dataset digits

100 labels, five splits, test error transferred and from scratch: digits to MNIST 6.70 and 7.42 %, MNIST to
digits 4.14 and 5.28 %. 6 to 7 minutes on one CPU core.
"""

import dataclasses
import statistics
from dataclasses import dataclass

from experiments import mnist_gan, mnist_ssgan
from gan_jax import runs
from gan_jax.types import InputError, Json


@dataclass(frozen=True)
class Config(runs.Config):
  """The flags of this experiment. Those of the label split say with which split it begins."""

  source: str = "digits"
  """The dataset whose images D learns from first, without a label; see --dataset."""
  dataset: str = "mnist"
  """The dataset that has few labels."""
  image_size: int | None = 16
  """Both datasets are resized to squares of this side."""
  pretrain_steps: int = 2000
  """Updates on the source."""
  splits: int = 5
  """Label splits: --split-seed and those after it."""

  def check(self) -> None:
    # What is frozen here are layers that the pre-trained part gives.
    runs.Config.check(dataclasses.replace(self, freeze_d=0))
    if self.init_from is not None:
      raise InputError("--init-from is what this experiment makes itself: use --source")
    if self.freeze_d < 0:
      raise InputError(f"--freeze-d must not be negative, and it is {self.freeze_d}")
    for name in ("splits", "pretrain_steps"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def main(config: Config) -> Json:
  """Pre-trains once, then fine-tunes and trains from scratch on each split; returns `result.json`."""
  with runs.open_run(config, "transfer") as run:
    pretrained = runs.run_inside(
      run,
      "pretrained",
      mnist_gan.main,
      mnist_gan.Config,
      dataset=config.source,
      steps=config.pretrain_steps,
      norm="layer",  # that of the discriminator which is fine-tuned
      hold_out=None,
      freeze_d=0,
      num_scored=0,  # the discriminator is what is wanted
      num_images=None,
    )
    pairs: list[Json] = []
    interrupted = pretrained["interrupted"]
    for split_seed in range(config.split_seed, config.split_seed + config.splits):
      if not interrupted:
        # Without a GAN, consistency and balance the one phase fine-tunes D on the labels alone, and the
        # other, its control, does the same from scratch.
        pairs.append(
          runs.run_inside(
            run,
            f"split-{split_seed}",
            mnist_ssgan.main,
            mnist_ssgan.Config,
            split_seed=split_seed,
            adversarial=0.0,
            consistency=0.0,
            balance=(0.0, 0.0),
            init_from=str(run.path / "pretrained"),
            init_parts="d",
          )
        )
        interrupted = pairs[-1]["interrupted"]

    complete = [pair for pair in pairs if pair["supervised_test_error"] is not None]
    fine_tuned = [pair["test_error"] for pair in complete]
    scratch = [pair["supervised_test_error"] for pair in complete]
    gains = [before - after for before, after in zip(scratch, fine_tuned, strict=True)]
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
    names = {"transferred": fine_tuned, "from scratch": scratch, "gain": gains}
    table = [
      (f"test error, {name}: mean +- std (each split)", _spread(values)) for name, values in names.items()
    ]
    pictures = [("Generated images of the source", "pretrained/samples/last.png")]
    return runs.finish(run, result, table=table, pictures=pictures)


def _spread(values: list[float]) -> str:
  if not values:
    return "not run"
  std = statistics.stdev(values) if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.2f} +- {std:.2f} % ({', '.join(f'{v:.2f}' for v in values)})"


if __name__ == "__main__":
  runs.cli(main, Config)
