"""How good is a classifier."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8

from gan_jax.data import to_float


def predict(
  classify: Callable, x: UInt8[np.ndarray, "n h w c"], *, batch_size: int = 1000
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n f"]]:
  """Logits and features of many images, a batch at a time.

  Args:
    classify: float images `[B, H, W, C]` in [0, 1] to `(logits [B, K], features [B, F])`.
    x: images as bytes.
    batch_size: B; the last batch is filled up, so that one compiled program serves all.
  """
  outputs = []
  for start in range(0, len(x), batch_size):
    rows = x[start : start + batch_size]
    fill = np.zeros((min(batch_size, len(x)) - len(rows), *x.shape[1:]), np.uint8)
    logits, features = classify(to_float(np.concatenate([rows, fill])))
    outputs.append((np.asarray(logits)[: len(rows)], np.asarray(features)[: len(rows)]))
  logits, features = zip(*outputs, strict=True)
  return np.concatenate(logits), np.concatenate(features)


def error_percent(logits: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"]) -> float:
  """Share of wrong classes, in percent."""
  return 100 * float(np.mean(logits.argmax(axis=-1) != y))


def confusion_matrix(logits: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"]) -> Int[np.ndarray, "k k"]:
  """Counts `[true class, predicted class]`."""
  num_classes = logits.shape[-1]
  pairs = y * num_classes + logits.argmax(axis=-1)
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
