import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from gan_jax import data, probe, steps


@jax.jit
def two_classes(x, y, other, l2, tolerance):
  """Weights, and logits at other features: one program for each shape of `x`."""
  fitted = probe.fit_linear(x, y, num_classes=2, l2=l2, tolerance=tolerance)
  return fitted.weights, fitted.logits(other)


def features_and_classes():
  x = np.random.default_rng(0).standard_normal((50, 4), np.float32)
  return x, (x[:, 0] > 0).astype(np.int32)


@pytest.mark.parametrize(("n", "l2", "num_classes"), [(600, 3.0, 10), (100, 1.0, 2)])
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


def test_scale_and_dead_features_do_not_matter():
  x, y = features_and_classes()
  _, plain = two_classes(x, y, x, 1.0, 1e-4)
  other = np.concatenate([1000 * x + 5, np.full((50, 1), np.float32(3))], axis=-1)
  _, scaled = two_classes(other, y, other, 1.0, 1e-4)
  np.testing.assert_allclose(plain, scaled, atol=1e-2)


def test_constant_features_of_any_value_count_for_nothing():
  """In float32 a constant column's deviation is seldom zero; test images may have another constant."""
  x, y = features_and_classes()
  constant = np.broadcast_to(np.arange(256, dtype=np.float32) / 255, (50, 256))
  _, plain = two_classes(x, y, x, 1.0, 1e-4)
  train, elsewhere = (np.concatenate([x, each], axis=-1) for each in (constant, constant + np.float32(0.2)))
  _, fitted = two_classes(train, y, elsewhere, 1.0, 1e-4)
  np.testing.assert_allclose(plain, fitted, atol=1e-2)


def test_the_nearest_neighbour_is_scikit_learns():
  x, y = load_digits(return_X_y=True)
  train, test = slice(100), slice(100, 400)
  mean, std = x[train].mean(axis=0), x[train].std(axis=0)
  z = (x - mean) / np.where(std > 0, std, np.inf)
  reference = KNeighborsClassifier(1).fit(z[train], y[train]).predict(z[test])
  ours = jax.jit(lambda x, y, other: probe.fit_nearest(x, y).classes(other))
  found = ours(np.float32(x[train]), y[train], np.float32(x[test]))
  assert np.mean(found == reference) > 0.995  # ties in float32


def test_copies_of_the_examples_under_as_many_times_the_penalty_change_nothing():
  x, y = features_and_classes()
  plain, _ = two_classes(x, y, x, 1.0, 1e-6)
  copies, _ = two_classes(np.tile(x, (3, 1)), np.tile(y, 3), x, 3.0, 1e-6)
  np.testing.assert_allclose(plain, copies, atol=1e-4)


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_layers_are_those_of_the_averaged_network(network, make_tiny):
  tiny = make_tiny(network=network)
  state, x = tiny.state(), data.to_float(tiny.data.x_lab)
  state = state.replace(d=state.d.replace(params=jax.tree.map(jnp.zeros_like, state.d.params)))
  layers = jax.jit(probe.make_layers(tiny.d, (8, 8, 1)))(state, x)
  sizes = {"conv": [4 * 4 * 4, 4 * 4 * 8, 8], "mlp": [8, 8]}[network]
  assert {name: h.shape for name, h in layers.items()} == {
    f"Block_{i}": (len(x), size) for i, size in enumerate(sizes)
  }
  features = jax.jit(steps.make_classifier(tiny.d))(state, x)[1]
  np.testing.assert_allclose(layers[f"Block_{len(sizes) - 1}"], features, rtol=1e-6)
