"""Classifiers on frozen discriminator features."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from gan_jax import kernels
from gan_jax.types import Discriminator, TrainState


class LinearProbe(struct.PyTreeNode):
  """A linear classifier on standardised features."""

  mean: Float[Array, "f"]
  std: Float[Array, "f"]
  weights: Float[Array, "f k"]
  bias: Float[Array, "k"]

  @kernels.exact
  def logits(self, features: Float[Array, "b f"]) -> Float[Array, "b k"]:
    return (features - self.mean[None]) / self.std[None] @ self.weights + self.bias[None]


@kernels.exact
def fit_linear(
  features: Float[Array, "n f"],
  y: Int[Array, "n"],
  *,
  num_classes: int,
  l2: float | Float[Array, ""] = 1.0,
  tolerance: float = 1e-4,
  max_iterations: int = 1000,
) -> LinearProbe:
  """Multinomial logistic regression, `min_W,b sum_i CE(W z_i + b, y_i) + l2 / 2 |W|^2`, by L-BFGS.

  The features are first standardised by their own mean and standard deviation; constant features
  are ignored. The bias is not penalised. The problem is strictly convex in W, so the solution is unique
  and needs no seed: it is that of scikit-learn's `LogisticRegression(C=1 / l2)`, or `C=2 / l2` for two
  classes.

  Args:
    features: `[N, F]`, on any scale.
    y: classes 0 .. K-1, `[N]`.
    num_classes: K.
    l2: weight of the penalty.
    tolerance: the largest gradient entry, relative to N, at which to stop.
    max_iterations: the maximum number of L-BFGS iterations.
  """
  mean, std, z = _standardise(features)

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


class NearestNeighbour(struct.PyTreeNode):
  """The class of the nearest labelled image, by Euclidean distance between standardised features."""

  mean: Float[Array, "f"]
  std: Float[Array, "f"]
  z: Float[Array, "n f"]
  """The standardised features of the labelled images."""
  y: Int[Array, "n"]

  @kernels.exact
  def classes(self, features: Float[Array, "b f"]) -> Int[Array, "b"]:
    z = (features - self.mean[None]) / self.std[None]
    # |z - z_i|^2 minus |z|^2, which does not move the minimum.
    distances = jnp.square(self.z).sum(axis=-1)[None] - 2 * z @ self.z.T
    return self.y[distances.argmin(axis=-1)]


def fit_nearest(features: Float[Array, "n f"], y: Int[Array, "n"]) -> NearestNeighbour:
  """One neighbour, because a class may have only two labels. Constant features are ignored."""
  mean, std, z = _standardise(features)
  return NearestNeighbour(mean, std, z, y)


def make_layers(
  d: Discriminator, image_shape: Sequence[int]
) -> Callable[[TrainState, Float[Array, "b h w c"]], dict[str, Array]]:
  """Builds `layers(state, x) -> {name: [B, F]}`: outputs of the averaged D's layers, in order.

  Convolutional outputs are max-pooled to a grid of at most 4x4 first. Deterministic.

  References:
    Radford et al., 2016, https://arxiv.org/abs/1511.06434, section 5.1 (the grid).
  """
  names = d.layers(image_shape)

  def is_layer(module: nn.Module, method: str) -> bool:
    return module.path in {(name,) for name in names} and method == "__call__"

  @kernels.exact
  def layers(state: TrainState, x: Float[Array, "b h w c"]) -> dict[str, Array]:
    _, captured = d.apply(
      state.averaged("d"), x, train=False, capture_intermediates=is_layer, mutable=["intermediates"]
    )
    outputs = captured["intermediates"]
    return {name: _pooled(outputs[name]["__call__"][0]).reshape(x.shape[0], -1) for name in names}

  return layers


def _pooled(h: Array) -> Array:
  if h.ndim == 2:
    return h
  window = (-(-h.shape[1] // 4), -(-h.shape[2] // 4))
  return nn.max_pool(h, window, strides=window, padding="SAME")


def _standardise(features: Array) -> tuple[Array, Array, Array]:
  """Mean, standard deviation, standardised features; a constant feature becomes zero."""
  mean, std = features.mean(axis=0), features.std(axis=0)  # rounding: not exactly 0 for a constant one
  std = jnp.where(features.max(axis=0) > features.min(axis=0), std, jnp.inf)
  return mean, std, (features - mean[None]) / std[None]
