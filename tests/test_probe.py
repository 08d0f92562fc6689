import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gan_jax import probe


@pytest.mark.parametrize(("n", "l2"), [(100, 1.0), (600, 3.0)])
def test_is_the_logistic_regression_of_scikit_learn(n, l2):
  x, y = load_digits(return_X_y=True)
  train, test = slice(n), slice(n, None)
  mean, std = x[train].mean(axis=0), x[train].std(axis=0)
  z = (x - mean) / np.where(std > 0, std, np.inf)
  reference = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(z[train], y[train])
  fit = jax.jit(probe.fit_linear, static_argnames=("num_classes", "l2", "tolerance"))
  ours = fit(jnp.float32(x[train]), jnp.array(y[train]), num_classes=10, l2=l2, tolerance=1e-6)
  expected = reference.predict_proba(z[test])
  np.testing.assert_allclose(jax.nn.softmax(ours.logits(jnp.float32(x[test]))), expected, atol=2e-3)
  np.testing.assert_allclose(ours.weights, reference.coef_.T, atol=2e-3)


def test_scale_and_dead_features_do_not_matter(key):
  x = jax.random.normal(key, (50, 4))
  y = (x[:, 0] > 0).astype(jnp.int32)
  plain = probe.fit_linear(x, y, num_classes=2)
  other = jnp.concatenate([1000 * x + 5, jnp.full((50, 1), 3.0)], axis=-1)
  scaled = probe.fit_linear(other, y, num_classes=2)
  np.testing.assert_allclose(plain.logits(x), scaled.logits(other), atol=1e-2)
