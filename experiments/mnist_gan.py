"""A GAN without labels, any loss, penalty and normalisation: the source article's, made right, and better.

Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661.

  python -m experiments.mnist_gan --network mlp     the article's networks, optimizer and 10,000 updates
  python -m experiments.mnist_gan                   a convolutional pair with R1

MNIST, Frechet distance of 10,000 images to the test set, where replayed training images have 0.11: mlp 39.2
and 6 of 10 classes (with --loss min_max 113 and one class, with --penalty r1 5.50 and all ten), 62 s of
training on two CPU cores; conv 0.60, 428 s on one core.
"""

from dataclasses import dataclass

from experiments import _gan
from gan_jax import runs
from gan_jax.types import Json


@dataclass(frozen=True)
class Config(_gan.Config):
  """The flags of this experiment."""


def main(config: Config) -> Json:
  """Trains the GAN, judges its generator and probes its discriminator; returns what `result.json` holds."""
  with runs.open_run(config, "mnist_gan") as run:
    judge = _gan.load_judge(run)
    objective = _gan.objective(config, run)
    gan = _gan.train_gan(run, objective, judge, num_unl=config.recipe().batch_size)
    return _gan.finish(run, gan, judge, _gan.sample(gan, 100, config.seed), {}, [])


if __name__ == "__main__":
  runs.cli(main, Config)
