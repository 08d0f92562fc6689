"""Classifiers on frozen discriminator features."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int


class LinearProbe(struct.PyTreeNode):
  """A linear classifier on standardised features."""

  mean: Float[Array, "f"]
  std: Float[Array, "f"]
  weights: Float[Array, "f k"]
  bias: Float[Array, "k"]

  def logits(self, features: Float[Array, "b f"]) -> Float[Array, "b k"]:
    return (features - self.mean[None]) / self.std[None] @ self.weights + self.bias[None]


def fit_linear(
  features: Float[Array, "n f"],
  y: Int[Array, "n"],
  *,
  num_classes: int,
  l2: float = 1.0,
  tolerance: float = 1e-4,
  max_iterations: int = 1000,
) -> LinearProbe:
  """Multinomial logistic regression, `min_W,b sum_i CE(W z_i + b, y_i) + l2 / 2 |W|^2`, by L-BFGS.

  The features are standardised by their own mean and standard deviation first; constant features
  count for nothing. The bias is not penalised. The problem is strictly convex in W, so there is one
  answer and no seed: it is scikit-learn's `LogisticRegression(C=1 / l2)`.

  Args:
    features: `[N, F]`, on any scale.
    y: classes 0 .. K-1, `[N]`.
    num_classes: K.
    l2: weight of the penalty.
    tolerance: the largest gradient entry, relative to N, at which to stop.
    max_iterations: the most L-BFGS iterations.
  """
  mean, std = features.mean(axis=0), features.std(axis=0)
  std = jnp.where(std > 1e-8, std, jnp.inf)  # a constant feature becomes zero
  z = (features - mean[None]) / std[None]

  def loss_fn(params: Any):
    weights, bias = params
    ce = optax.softmax_cross_entropy_with_integer_labels(z @ weights + bias[None], y)
    return ce.mean() + l2 / (2 * len(z)) * jnp.square(weights).sum()

  tx = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss_fn)

  def unfinished(carry: Any):
    i, _, _, largest = carry
    return (i < max_iterations) & (largest > tolerance)

  def iterate(carry: Any):
    i, params, state, _ = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss_fn)
    largest = optax.tree.max(jax.tree.map(jnp.abs, grad))
    return i + 1, jax.tree.map(jnp.add, params, updates), state, largest

  params = (jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes))
  start = (jnp.zeros((), jnp.int32), params, tx.init(params), jnp.array(jnp.inf))
  _, (weights, bias), _, _ = jax.lax.while_loop(unfinished, iterate, start)
  return LinearProbe(mean, std, weights, bias)
