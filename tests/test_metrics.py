import numpy as np
from sklearn.metrics import accuracy_score
from sklearn.metrics import confusion_matrix as reference

from gan_jax import metrics


def test_error_and_confusion_agree_with_scikit_learn():
  rng = np.random.default_rng(0)
  logits, y = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
  predicted = logits.argmax(axis=-1)
  np.testing.assert_allclose(metrics.error_percent(logits, y), 100 * (1 - accuracy_score(y, predicted)))
  np.testing.assert_array_equal(metrics.confusion_matrix(logits, y), reference(y, predicted))


def test_predict_goes_through_batches_of_one_size():
  x = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
  sizes = []

  def classify(x):
    sizes.append(len(x))
    flat = np.asarray(x).reshape(-1, 1)
    return flat, 2 * flat

  logits, features = metrics.predict(classify, x, batch_size=3)
  np.testing.assert_allclose(logits[:, 0], np.arange(7) / 255, rtol=1e-6)
  np.testing.assert_allclose(features, 2 * logits)
  assert sizes == [3, 3, 3]
