"""Metrics of classifiers and generators, and statistics of errors."""

from gan_jax.metrics.classification import confusion_matrix, error_percent, predict, recall
from gan_jax.metrics.feature_extractor import (
  FeatureExtractor,
  load_feature_extractor,
  read_feature_extractor,
  train_feature_extractor,
)
from gan_jax.metrics.frechet import Moments, frechet_distance, moments
from gan_jax.metrics.generator import generator_quality, training_moments
from gan_jax.metrics.statistics import Difference, Summary, binomial_interval, holm, paired, summarise
from gan_jax.metrics.uncertainty import (
  Reliability,
  abstention_threshold,
  calibration_error,
  reliability,
)

__all__ = [
  "Difference",
  "FeatureExtractor",
  "Moments",
  "Reliability",
  "Summary",
  "abstention_threshold",
  "binomial_interval",
  "calibration_error",
  "confusion_matrix",
  "error_percent",
  "frechet_distance",
  "generator_quality",
  "holm",
  "load_feature_extractor",
  "moments",
  "paired",
  "predict",
  "read_feature_extractor",
  "recall",
  "reliability",
  "summarise",
  "train_feature_extractor",
  "training_moments",
]
