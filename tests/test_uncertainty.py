import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, recall_score

from gan_jax import metrics


@pytest.fixture
def predicted():
  """Probabilities of 4 classes for 500 images, overconfident. Class 1 is hard, 3 is never true."""
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 500)
  logits = rng.normal(size=(500, 4)) + 1.5 * np.eye(4)[y] - [0, 1, 0, 0]
  logits[0] = 20 * np.eye(4)[(y[0] + 1) % 3]  # wrong, and as certain as can be
  probs = np.exp(2 * logits)
  return np.round(probs / probs.sum(axis=1, keepdims=True), 2), y


def test_the_reliability_diagram_is_scikit_learns(predicted):
  probs, y = predicted
  found = metrics.reliability(probs, y, bins=10)
  correct, confidence = probs.argmax(axis=1) == y, probs.max(axis=1)
  accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=10)
  np.testing.assert_allclose(found.accuracy[found.count > 0], accuracy)
  np.testing.assert_allclose(found.confidence[found.count > 0], mean_confidence)
  assert (found.count > 0).tolist() == np.isfinite(found.accuracy).tolist()
  assert np.isnan(found.accuracy[0])  # a confidence of four classes is at least 1/4
  assert found.count.sum() == 500


def test_calibration_error_by_hand():
  """Two of four right at 0.75, one of one at 1, with edges at 0.5: 4/5 |0.5 - 0.75| + 1/5 |1 - 1|."""
  probs = np.array([[0.75, 0.25]] * 4 + [[0.0, 1.0]])
  y = np.array([0, 0, 1, 1, 1])
  assert metrics.calibration_error(probs, y, bins=4) == pytest.approx(0.2)
  # In one bin over-confidence and under-confidence cancel: |3/5 - 0.8|.
  assert metrics.calibration_error(probs, y, bins=1) == pytest.approx(0.2)
  y = np.array([0, 0, 0, 0, 0])
  assert metrics.calibration_error(probs, y, bins=4) == pytest.approx(0.8 * 0.25 + 0.2)
  assert metrics.calibration_error(probs, y, bins=1) == pytest.approx(0)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
  """((m - 1) / M, m / M], as in the paper."""
  probs = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
  found = metrics.reliability(probs, np.zeros(3, int), bins=4)
  assert found.count.tolist() == [0, 1, 1, 1]


def test_calibration_error_of_a_bin_each_is_bounded_by_the_brier_score(predicted):
  """Jensen: the squared gap of a bin is at most the mean of its squared errors, so ECE^2 <= Brier."""
  probs, y = predicted
  correct, confidence = probs.argmax(axis=1) == y, probs.max(axis=1)
  brier = brier_score_loss(correct, confidence)
  for bins in (1, 5, 15, 1000):
    assert 0.02 < metrics.calibration_error(probs, y, bins) <= brier**0.5
  assert metrics.calibration_error(np.eye(4)[y], y) == 0
  assert metrics.calibration_error(np.eye(4)[(y + 1) % 4], y) == 1


@pytest.mark.parametrize("max_error", [0.0, 10.0, 25.0, 100.0])
def test_the_abstention_threshold_is_the_smallest_that_does(predicted, max_error):
  probs, y = predicted
  confidence, wrong = probs.max(axis=1), probs.argmax(axis=1) != y
  good = [t for t in np.unique(confidence) if 100 * wrong[confidence >= t].mean() <= max_error]
  found = metrics.abstention_threshold(probs, y, max_error)
  if good:
    assert found == (min(good), (confidence >= min(good)).mean())
  else:
    assert found is None


def test_the_abstention_thresholds_of_the_fixture_are_not_all_of_a_kind(predicted):
  """Otherwise the test above shows little."""
  found = [metrics.abstention_threshold(*predicted, max_error) for max_error in (0.0, 10.0, 25.0, 100.0)]
  assert found[0] is None
  assert 0.1 < found[1][1] < found[2][1] < found[3][1] == 1


def test_recall_is_scikit_learns(predicted):
  probs, y = predicted
  rare = np.concatenate([np.flatnonzero(y != 1), np.flatnonzero(y == 1)[:7]])
  probs, y = probs[rare], y[rare]
  found = metrics.recall(metrics.confusion_matrix(probs, y))
  predictions = probs.argmax(axis=1)
  assert 3 in predictions  # the class without images has predictions
  expected = recall_score(y, predictions, labels=[0, 1, 2], average=None)
  np.testing.assert_allclose(found[:3], 100 * expected)
  assert np.isnan(found[3])
