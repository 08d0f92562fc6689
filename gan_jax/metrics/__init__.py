"""How good is a classifier."""

from gan_jax.metrics.classification import confusion_matrix, error_percent, predict

__all__ = ["confusion_matrix", "error_percent", "predict"]
