import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from gan_jax import probe, steps


@pytest.mark.parametrize(("n", "l2", "num_classes"), [(100, 1.0, 10), (600, 3.0, 10), (100, 1.0, 2)])
def test_is_the_logistic_regression_of_scikit_learn(n, l2, num_classes):
  x, y = load_digits(n_class=num_classes, return_X_y=True)
  train, test = slice(n), slice(n, None)
  mean, std = x[train].mean(axis=0), x[train].std(axis=0)
  z = (x - mean) / np.where(std > 0, std, np.inf)
  c = 2 / l2 if num_classes == 2 else 1 / l2
  reference = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(z[train], y[train])
  fit = jax.jit(probe.fit_linear, static_argnames=("num_classes", "l2", "tolerance"))
  ours = fit(jnp.float32(x[train]), jnp.array(y[train]), num_classes=num_classes, l2=l2, tolerance=1e-6)
  expected = reference.predict_proba(z[test])
  np.testing.assert_allclose(jax.nn.softmax(ours.logits(jnp.float32(x[test]))), expected, atol=2e-3)
  weights = ours.weights
  if num_classes == 2:  # scikit-learn has the difference of the two columns
    weights = weights[:, 1:] - weights[:, :1]
  np.testing.assert_allclose(weights, reference.coef_.T, atol=2e-3)


def test_scale_and_dead_features_do_not_matter(key):
  x = jax.random.normal(key, (50, 4))
  y = (x[:, 0] > 0).astype(jnp.int32)
  fit = jax.jit(probe.fit_linear, static_argnames="num_classes")
  plain = fit(x, y, num_classes=2)
  other = jnp.concatenate([1000 * x + 5, jnp.full((50, 1), 3.0)], axis=-1)
  scaled = fit(other, y, num_classes=2)
  np.testing.assert_allclose(plain.logits(x), scaled.logits(other), atol=1e-2)


def test_constant_features_of_any_value_count_for_nothing(key):
  """In float32 a constant column's deviation is seldom zero; test images may have another constant."""
  z = jax.random.normal(key, (30, 1))
  y = (z[:, 0] > 0).astype(jnp.int32)
  constant = jnp.broadcast_to(jnp.arange(256) / 255, (30, 256))
  plain = probe.fit_linear(z, y, num_classes=2)
  fitted = probe.fit_linear(jnp.concatenate([z, constant], axis=-1), y, num_classes=2)
  elsewhere = jnp.concatenate([z, constant + 0.2], axis=-1)
  np.testing.assert_allclose(plain.logits(z), fitted.logits(elsewhere), atol=1e-2)


def test_the_nearest_neighbour_is_scikit_learns():
  x, y = load_digits(return_X_y=True)
  train, test = slice(100), slice(100, 400)
  mean, std = x[train].mean(axis=0), x[train].std(axis=0)
  z = (x - mean) / np.where(std > 0, std, np.inf)
  reference = KNeighborsClassifier(1).fit(z[train], y[train]).predict(z[test])
  ours = probe.fit_nearest(jnp.float32(x[train]), jnp.array(y[train]))
  assert np.mean(ours.classes(jnp.float32(x[test])) == reference) > 0.995  # ties in float32


def test_copies_of_the_examples_under_as_many_times_the_penalty_change_nothing(key):
  x = jax.random.normal(key, (30, 4))
  y = (x[:, 0] > 0).astype(jnp.int32)
  fit = jax.jit(probe.fit_linear, static_argnames=("num_classes", "tolerance"))
  plain = fit(x, y, num_classes=2, tolerance=1e-6)
  copies = fit(jnp.tile(x, (3, 1)), jnp.tile(y, 3), num_classes=2, tolerance=1e-6, l2=3.0)
  np.testing.assert_allclose(plain.weights, copies.weights, atol=1e-4)


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_layers_are_those_of_the_averaged_network(network, make_tiny):
  tiny = make_tiny(network=network)
  state, x = tiny.state(), tiny.batch().x_lab
  state = state.replace(d=state.d.replace(params=jax.tree.map(jnp.zeros_like, state.d.params)))
  layers = jax.jit(probe.make_layers(tiny.d, (8, 8, 1)))(state, x)
  sizes = {"conv": [4 * 4 * 4, 4 * 4 * 8, 8], "mlp": [8, 8]}[network]
  assert {name: h.shape for name, h in layers.items()} == {
    f"Block_{i}": (len(x), size) for i, size in enumerate(sizes)
  }
  features = jax.jit(steps.make_classifier(tiny.d))(state, x)[1]
  np.testing.assert_allclose(layers[f"Block_{len(sizes) - 1}"], features, rtol=1e-6)
