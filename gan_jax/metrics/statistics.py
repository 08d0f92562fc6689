"""Error statistics: one error on n images, a few runs over label splits, paired differences."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np


class Summary(NamedTuple):
  """Errors of one method over several splits, in percent."""

  mean: float
  std: float
  """Sample standard deviation, with n - 1; 0 for a single run."""
  median: float
  best: float
  worst: float
  interval: tuple[float, float] | None
  """95 % interval of the mean, from Student's t; None for a single run."""
  failure_rate: float
  """Share of the runs whose error is more than twice the median, in [0, 1]."""


class Difference(NamedTuple):
  """Errors of a method minus those of a reference on the same splits, in percentage points."""

  mean: float
  interval: tuple[float, float] | None
  """95 % interval of the mean difference, from Student's t; None if the splits do not show how much
  differences vary: there is only one, or all show the same non-zero difference."""
  p: float | None
  """Two-sided p-value of no difference, from the same t; None if `interval` is."""
  verdict: Literal["helps", "hurts", "inconclusive"]
  """`helps` if the whole interval is below 0, `hurts` if it is above. If nothing is different, one verdict
  in twenty is wrong: remember this when reading a table of many."""


def summarise(errors: Sequence[float]) -> Summary:
  """Summary of one or more errors."""
  x = np.asarray(errors, np.float64)
  median = float(np.median(x))
  return Summary(
    mean=float(x.mean()),
    std=float(x.std(ddof=1)) if len(x) > 1 else 0.0,
    median=median,
    best=float(x.min()),
    worst=float(x.max()),
    interval=_t_interval(x),
    failure_rate=float((x > 2 * median).mean()),
  )


def paired(errors: Sequence[float], reference: Sequence[float]) -> Difference:
  """Compares the i-th error with the i-th of the reference, both from the i-th split."""
  x = np.subtract(errors, reference, dtype=np.float64)
  varies = len(x) > 1 and (np.ptp(x) > 1e-9 or not x.any())
  interval, p = (_t_interval(x), _p_value(x)) if varies else (None, None)
  verdict = "inconclusive"
  if interval is not None and interval[1] < 0:
    verdict = "helps"
  elif interval is not None and interval[0] > 0:
    verdict = "hurts"
  return Difference(float(x.mean()), interval, p, verdict)


def holm(p_values: Sequence[float]) -> list[float]:
  """p-values corrected for multiplicity: `max_{j <= i} min(1, (m - j) p_(j))` in ascending order, j from 0.

  If none of the m differences is real, any corrected value is below 0.05 with at most that probability.

  References:
    Holm, 1979, "A simple sequentially rejective multiple test procedure".
  """
  order = np.argsort(p_values)
  corrected = np.minimum(1.0, np.asarray(p_values)[order] * (len(order) - np.arange(len(order))))
  out = np.empty(len(order))
  out[order] = np.maximum.accumulate(corrected)
  return out.tolist()


def binomial_interval(num_errors: int, num: int) -> tuple[float, float]:
  """95 % Clopper-Pearson interval of an error estimated on `num` images, in percent.

  It covers the true error of this one classifier with at least the stated probability. It does not include
  the variation over label splits and seeds.

  References:
    Clopper & Pearson, 1934, "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
  """
  import scipy.special  # late: it takes 0.2 s

  low, high = 0.0, 1.0  # if all images are correct, or all wrong, or there are none
  if num_errors > 0:
    low = float(scipy.special.betaincinv(num_errors, num - num_errors + 1, 0.025))
  if num_errors < num:
    high = float(scipy.special.betaincinv(num_errors + 1, num - num_errors, 0.975))
  return 100 * low, 100 * high


def _p_value(x: np.ndarray) -> float:
  import scipy.special  # late: it takes 0.2 s

  if not x.any():
    return 1.0
  t = abs(x.mean()) * math.sqrt(len(x)) / x.std(ddof=1)
  return float(2 * scipy.special.stdtr(len(x) - 1, -t))


def _t_interval(x: np.ndarray) -> tuple[float, float] | None:
  """`mean +- t_{n-1, 0.975} std / sqrt(n)`."""
  if len(x) < 2:
    return None
  import scipy.special  # late: it takes 0.2 s

  half = float(scipy.special.stdtrit(len(x) - 1, 0.975) * x.std(ddof=1)) / math.sqrt(len(x))
  return float(x.mean()) - half, float(x.mean()) + half
