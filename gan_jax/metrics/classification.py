"""Classification metrics."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from gan_jax.data import to_float
from gan_jax.types import ImageSource


def predict(read: Callable[[Array], Any], x: ImageSource, *, batch_size: int = 1000) -> Any:
  """Applies `read` to many images, one batch at a time.

  Args:
    read: float images `[B, H, W, C]` in [0, 1] to any tree of arrays `[B, ...]`.
    x: images as bytes.
    batch_size: B; the last batch is padded, so that one compiled program serves all.
  """
  outputs = []
  for start in range(0, len(x), batch_size):
    rows = np.asarray(x[start : start + batch_size])
    num = len(rows)
    fill = np.zeros((min(batch_size, len(x)) - num, *x.shape[1:]), np.uint8)
    found = read(to_float(np.concatenate([rows, fill])))
    outputs.append(jax.tree.map(lambda a, num=num: np.asarray(a)[:num], found))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def error_percent(logits: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"]) -> float:
  """Share of wrong predictions, in percent."""
  return 100 * float(np.mean(logits.argmax(axis=-1) != y))


def confusion_matrix(logits: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"]) -> Int[np.ndarray, "k k"]:
  """Counts `[true class, predicted class]`."""
  num_classes = logits.shape[-1]
  pairs = np.asarray(y, np.int64) * num_classes + logits.argmax(axis=-1)
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def recall(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
  """Recall of each class from a confusion matrix, in percent; nan for a class without images."""
  num = counts.sum(axis=1)
  return 100 * np.diag(counts) / np.where(num, num, np.nan)
