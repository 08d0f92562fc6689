"""Reliability of the confidence: calibration and abstention."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Reliability(NamedTuple):
  """A reliability diagram: images in equal-width bins of confidence, `max_k p(k | x)`."""

  confidence: Float[np.ndarray, "b"]
  """Mean confidence of each bin, in [0, 1]; nan for an empty one."""
  accuracy: Float[np.ndarray, "b"]
  """Share of each bin that is classified correctly, in [0, 1]; nan for an empty one."""
  count: Int[np.ndarray, "b"]  # pyright: ignore[reportIncompatibleMethodOverride]
  """Images in each bin."""


def reliability(probs: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"], bins: int = 15) -> Reliability:
  """Accuracy by confidence; bin m of M holds the confidences in ((m - 1) / M, m / M].

  Args:
    probs: class probabilities `[N, K]`.
    y: true classes `[N]`.
    bins: M.

  References:
    Guo et al., 2017, https://arxiv.org/abs/1706.04599, section 2.
  """
  confidence, correct = _confidence(probs), probs.argmax(axis=-1) == y
  which = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
  count = np.bincount(which, minlength=bins)
  some = np.where(count, count, np.nan)
  mean = lambda values: np.bincount(which, weights=values, minlength=bins) / some
  return Reliability(mean(confidence), mean(correct), count)


def calibration_error(probs: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"], bins: int = 15) -> float:
  """Expected calibration error, `sum_m |B_m| / N |accuracy(B_m) - confidence(B_m)|`, in [0, 1].

  It needs at least one image and depends on the number of bins: compare only errors with equal `bins`.

  References:
    Guo et al., 2017, https://arxiv.org/abs/1706.04599, equation 3.
  """
  found = reliability(probs, y, bins)
  gaps = np.abs(found.accuracy - found.confidence)
  return float(np.nansum(found.count * gaps) / found.count.sum())


def abstention_threshold(
  probs: Float[np.ndarray, "n k"], y: Int[np.ndarray, "n"], max_error: float
) -> tuple[float, float] | None:
  """The lowest confidence at or above which predictions have an error of at most `max_error` percent.

  Choose it on images that are used for nothing else. It holds for these images: unlike the bound of the
  paper, it promises nothing about others.

  Returns:
    The threshold, and the share of the images that it keeps, both in [0, 1]; None if there is none.

  References:
    Geifman & El-Yaniv, 2017, https://arxiv.org/abs/1705.08500.
  """
  thresholds, kept, errors = _by_threshold(probs, y)
  good = np.flatnonzero(100 * errors <= max_error * kept)
  if not len(good):
    return None
  return float(thresholds[good[-1]]), float(kept[good[-1]] / len(y))


def _confidence(probs: np.ndarray) -> np.ndarray:
  return np.asarray(probs).max(axis=-1).astype(np.float64)


def _by_threshold(probs: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distinct confidences in descending order; the numbers of images and of errors at or above each."""
  confidence, wrong = _confidence(probs), probs.argmax(axis=-1) != y
  ascending, which = np.unique(confidence, return_inverse=True)
  count, errors = np.bincount(which), np.bincount(which, weights=wrong)
  return ascending[::-1], count[::-1].cumsum(), errors[::-1].cumsum()
