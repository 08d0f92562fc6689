"""How good is a classifier, and how good is a generator."""

from gan_jax.metrics.classification import confusion_matrix, error_percent, predict
from gan_jax.metrics.frechet import Moments, frechet_distance, moments
from gan_jax.metrics.generator import generator_quality, replay_quality
from gan_jax.metrics.judge import Judge, load_judge, read_judge, train_judge
from gan_jax.metrics.spread import Difference, Spread, paired, spread

__all__ = [
  "Difference",
  "Judge",
  "Moments",
  "Spread",
  "confusion_matrix",
  "error_percent",
  "frechet_distance",
  "generator_quality",
  "load_judge",
  "moments",
  "paired",
  "predict",
  "read_judge",
  "replay_quality",
  "spread",
  "train_judge",
]
