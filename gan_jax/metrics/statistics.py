"""Statistics of errors: one error on n images, a few runs over label splits, paired differences."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np


class Summary(NamedTuple):
  """Errors of one method over several splits, in percent."""

  mean: float
  std: float
  """Of the sample, with n - 1; 0 for a single run."""
  median: float
  best: float
  worst: float
  interval: tuple[float, float] | None
  """95 % interval of the mean, from Student's t; None for a single run."""
  failure_rate: float
  """Share of the runs whose error is over twice the median, in [0, 1]."""


class Difference(NamedTuple):
  """A method against another on the same splits: its errors less theirs, in points of percent."""

  mean: float
  interval: tuple[float, float] | None
  """95 % interval of the mean difference, from Student's t; None where the splits do not tell how much
  differences vary: there is but one, or all differ by the same few images."""
  p: float | None
  """p-value of no difference, two-sided, from the same t; None likewise."""
  verdict: Literal["helps", "hurts", "cannot tell"]
  """`helps` where the whole interval is below 0, `hurts` where it is above. Where nothing is different,
  one verdict in twenty is wrong: read a table of many as such."""


def summarise(errors: Sequence[float]) -> Summary:
  """Summary of at least one error."""
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
  verdict = "cannot tell"
  if interval is not None and interval[1] < 0:
    verdict = "helps"
  elif interval is not None and interval[0] > 0:
    verdict = "hurts"
  return Difference(float(x.mean()), interval, p, verdict)


def holm(p_values: Sequence[float]) -> list[float]:
  """p-values corrected for their number: `max_{j <= i} min(1, (m - j) p_(j))` in ascending order, j from 0.

  Where all of m differences are none, one corrected value is below 0.05 with at most that probability.

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

  It covers the true error of this one classifier at least as often as it says. What another label split or
  another seed would change is not in it.

  References:
    Clopper & Pearson, 1934, "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
  """
  import scipy.special  # late: it takes 0.2 s

  low, high = 0.0, 1.0  # where all images are correct, or all wrong, or there are none
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
