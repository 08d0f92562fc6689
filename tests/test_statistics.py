import numpy as np
import pytest
import scipy.stats

from gan_jax import metrics


def test_spread_is_scipys():
  errors = [1.5, 2.0, 1.8, 9.0, 1.2]
  found = metrics.summarise(errors)
  assert (found.median, found.best, found.worst, found.failure_rate) == (1.8, 1.2, 9.0, 0.2)
  np.testing.assert_allclose([found.mean, found.std], [np.mean(errors), np.std(errors, ddof=1)])
  expected = scipy.stats.t.interval(0.95, 4, loc=found.mean, scale=scipy.stats.sem(errors))
  np.testing.assert_allclose(found.interval, expected)


def test_paired_is_scipys_and_says_what_it_means():
  rng = np.random.default_rng(0)
  reference = rng.uniform(1, 9, 10)  # spread wide: only the pairing shows a difference
  for shift, verdict in ((-0.5, "helps"), (0.5, "hurts"), (0.01, "inconclusive")):
    errors = reference + shift + 0.2 * rng.normal(size=10)
    found = metrics.paired(errors, reference)
    expected = scipy.stats.ttest_rel(errors, reference).confidence_interval(0.95)
    np.testing.assert_allclose(found.interval, expected)
    np.testing.assert_allclose(found.p, scipy.stats.ttest_rel(errors, reference).pvalue)
    assert found.verdict == verdict
    assert scipy.stats.ttest_ind(errors, reference).pvalue > 0.05


@pytest.mark.parametrize("errors", [[3.0], [2.0, 2.0]])
def test_one_run_or_no_difference_tells_nothing(errors):
  assert metrics.summarise(errors).std == 0
  found = metrics.paired(errors, errors)
  assert (found.mean, found.verdict) == (0.0, "inconclusive")
  assert found.p == (None if len(errors) == 1 else 1.0)
  assert (metrics.summarise(errors).interval is None) == (len(errors) == 1)


def test_splits_that_all_differ_by_one_image_do_not_tell_how_much_differences_vary():
  found = metrics.paired([1.0, 2.0], [1.5, 2.5])
  assert (found.mean, found.interval, found.p, found.verdict) == (-0.5, None, None, "inconclusive")


def test_holm_by_hand():
  """Ascending 0.01 x 4, 0.02 x 3, 0.03 x 2 (raised to 0.06), 0.9."""
  np.testing.assert_allclose(metrics.holm([0.03, 0.9, 0.01, 0.02]), [0.06, 0.9, 0.04, 0.06])
  assert metrics.holm([0.6, 0.7]) == [1.0, 1.0]
  assert metrics.holm([]) == []


@pytest.mark.parametrize(("num_errors", "num"), [(0, 20), (1, 1), (3, 360), (73, 10_000), (20, 20)])
def test_binomial_interval_is_scipys(num_errors, num):
  expected = scipy.stats.binomtest(num_errors, num).proportion_ci(0.95, method="exact")
  found = metrics.binomial_interval(num_errors, num)
  np.testing.assert_allclose(found, [100 * expected.low, 100 * expected.high], rtol=1e-6)


def test_no_images_say_nothing():
  assert metrics.binomial_interval(0, 0) == (0, 100)
