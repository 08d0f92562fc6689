"""Fast implementations of operations where XLA's own are slow; equal to them up to rounding."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

# --- Products and convolutions

Precision = Literal["float32", "bfloat16"]
"""The precision of products and convolutions; everything else is float32. With float32, GPUs and TPUs use
their lower default (TF32, bfloat16) unless `jax_default_matmul_precision` says otherwise."""


exact = jax.default_matmul_precision("highest")
"""Decorator for what is evaluated: products and convolutions of float32 use all its bits everywhere."""


def in_precision(product: Callable[..., Array], precision: Precision) -> Callable[..., Array]:
  """`product(x, w, ...)` of float32 arrays with a float32 result, computed in this precision.

  With bfloat16, inputs are rounded to it, forward and backward, with a relative error of `2^-9`. So is the
  result, except where XLA keeps it in float32 (`xla_allow_excess_precision`, the default): in compiled
  programs on CPU it does. Over `REPLICATES`, convolutions to fewer channels also add terms in bfloat16.
  """
  if precision == "float32":
    return product

  def rounded(x: Array, w: Array, *args: Any, **kwargs: Any) -> Array:
    return product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), *args, **kwargs).astype(jnp.float32)

  return rounded


stock = jax.make_user_context(False)
"""Under `with stock(True):` everything here is JAX's own: to export, to count operations, to compare."""


def _stock() -> bool:
  return stock.value or jax.default_backend() != "cpu"


REPLICATES = "replicates"
"""Name of the axis of `jax.vmap` over networks with parameters of their own."""

_LARGE, _CHUNK = 16 * 2**20, 2 * 2**20
"""Bytes: patches above the first are made for a few images at a time, of about the second together."""


def conv(
  x: Float[Array, "b h w c"],
  w: Float[Array, "kh kw c f"],
  strides: Sequence[int],
  padding: Literal["SAME"] = "SAME",
  **others: Any,
) -> Float[Array, "b oh ow f"]:
  """Convolution with "SAME" padding, fast in loops and over replicates, differentiable any number of times.

  XLA's CPU backend runs convolutions at a third of the rate of matrix products, and their gradients in a
  loop body with a naive kernel, 4 to 60 times slower than outside
  (https://github.com/jax-ml/jax/issues/12868). On CPU a convolution is a matrix product of patches. Where
  they would not stay in cache, they are made for a few images at a time, and again for the derivatives.

  Over an axis of `jax.vmap` named `REPLICATES`, with a kernel each, a convolution would become a grouped
  one, for which accelerators have no fast code either; as a matrix product it becomes a batched one, of
  patches that take up to `kh * kw` times the memory of the input.

  Raises:
    ValueError: another padding, dilation or grouping.
  """
  ones = others.get("lhs_dilation") or (1, 1), others.get("rhs_dilation") or (1, 1)
  if padding != "SAME" or {1} != {*ones[0], *ones[1], others.get("feature_group_count", 1)}:
    raise ValueError("only convolutions with padding SAME, without dilation and groups, are supported")
  fn = _product_conv if _over_replicates() else lax_conv if _stock() else _chunked_conv
  return fn(x, w, (strides[0], strides[1]))


def _over_replicates() -> bool:
  try:
    return jax.lax.axis_size(REPLICATES) > 1
  except NameError:  # there is no such axis
    return False


def lax_conv(x: Array, w: Array, strides: Sequence[int]) -> Array:
  """JAX's own convolution, with the same arguments."""
  return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _chunked_conv(x: Array, w: Array, strides: tuple[int, int]) -> Array:
  out = jax.eval_shape(functools.partial(lax_conv, strides=strides), x, w)
  per_image = math.prod(out.shape[1:3]) * math.prod(w.shape[:3]) * x.dtype.itemsize
  # Of images that devices share, each device computes its part: a loop over them would visit all.
  if per_image * len(x) <= _LARGE or jax.device_count() > 1:
    return _product_conv(x, w, strides)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one(x: Array, w: Array) -> Array:
    return _product_conv(x[None], w, strides)[0]

  return jax.lax.map(lambda x: one(x, w), x, batch_size=max(1, _CHUNK // per_image))


def _product_conv(x: Array, w: Array, strides: tuple[int, int]) -> Array:
  kh, kw, c, f = w.shape
  b, height, width, _ = x.shape
  if strides == (1, 1) and f < c:
    # The contributions of each pixel to its neighbours, shifted there: `kh * kw * f` numbers per pixel,
    # not `kh * kw * c`.
    terms = (x.reshape(-1, c) @ w.transpose(2, 0, 1, 3).reshape(c, -1)).reshape(b, height, width, -1)
    ups, lefts = ([(k - 1) // 2 - i for i in range(k)] for k in (kh, kw))
    shifts = [((0, 0, 0), (up, -up, 0), (left, -left, 0), (0, 0, 0)) for up in ups for left in lefts]
    terms = jax.lax.split(terms, [f] * (kh * kw), axis=3)
    zero = jnp.zeros((), terms[0].dtype)
    shifted = [jax.lax.pad(term, zero, shift) for term, shift in zip(terms, shifts, strict=True)]
    return functools.reduce(jnp.add, shifted)
  patches = _windows(_windows(x, 1, kh, strides[0]), 2, kw, strides[1])
  columns_first = w.transpose(1, 0, 2, 3).reshape(-1, f)
  return (patches.reshape(-1, kh * kw * c) @ columns_first).reshape(*patches.shape[:3], f)


def _windows(x: Array, axis: int, size: int, stride: int) -> Array:
  """What a kernel sees at each position of one axis of `[B, H, W, C]`, in `size * C` channels."""
  (pad,) = jax.lax.padtype_to_pads(x.shape[axis : axis + 1], (size,), (stride,), "SAME")
  last = (-(-x.shape[axis] // stride) - 1) * stride
  x = jnp.pad(x, [pad if i == axis else (0, 0) for i in range(4)])
  views = [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(size)]
  return jnp.concatenate(views, axis=-1)


# --- Layer normalisation


def layer_norm(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
  """`(x - mean) / sqrt(variance + 1e-6)`, both over the last axis.

  XLA's CPU backend sums short rows slowly, and its derivative of this passes over the array many times.
  There, sums are products with a column, and the derivative is written out: with `y` the result and `dy`
  its cotangent, `dx = (dy - mean(dy) - y mean(y dy)) / sqrt(variance + 1e-6)`.

  References:
    Ba et al., 2016, https://arxiv.org/abs/1607.06450, equation 4, without gain and bias.
  """
  return _normalised(x)[0] if _stock() else _layer_norm(x)


def _normalised(x: Array) -> tuple[Array, tuple[Array, Array]]:
  x = x - _mean(x)
  slope = jax.lax.rsqrt(_mean(jnp.square(x)) + 1e-6)
  return x * slope, (x * slope, slope)


def _layer_norm_vjp(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
  y, slope = saved
  return (slope * (dy - _mean(dy) - y * _mean(y * dy)),)


_layer_norm = jax.custom_vjp(lambda x: _normalised(x)[0])
_layer_norm.defvjp(_normalised, _layer_norm_vjp)


def _mean(x: Array) -> Array:
  """Over the last axis, `[..., 1]`."""
  if _stock():
    return x.mean(axis=-1, keepdims=True)
  column = jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)
  return (x.reshape(-1, x.shape[-1]) @ column).reshape(*x.shape[:-1], 1)


# --- Random numbers


def normal(key: Key[Array, ""], shape: Sequence[int]) -> Float[Array, "*shape"]:
  """Standard normal float32 samples; consumes the key.

  They equal `jax.random.normal(key, shape)` to 1e-5 on average, and to 0.05 in the far tails.

  On CPU, JAX rolls the rounds of Threefry into a loop, and every iteration goes through memory. Unrolled,
  sampling is one pass over the array that the samples are added to, 2.6 times as fast on two cores.

  References:
    Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405 (Threefry-2x32, 20 rounds).
  """
  if _stock() or jax.random.key_data(key).shape != (2,):
    return jax.random.normal(key, shape)
  # The upper 23 bits, as in `jax.random.uniform`; zero, which has no finite quantile, becomes 2^-25.
  p = jnp.maximum((_bits(key, shape) >> 9).astype(jnp.float32) * 2.0**-23, 2.0**-25)
  return jnp.where(p < 0.5, -1.0, 1.0) * _upper_quantile(jnp.minimum(p, 1 - p))


def _bits(key: Key[Array, ""], shape: Sequence[int]) -> UInt32[Array, "*shape"]:
  """The bits of `jax.random.bits(key, shape)`: for element i, the xor of both words of Threefry of i."""
  k0, k1 = jax.random.key_data(key)
  keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
  x0, x1 = keys[0], jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + keys[1]
  for i in range(5):
    for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
    x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x0 ^ x1


def _upper_quantile(p: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """z with P(Z > z) = p for `2^-25 <= p <= 1/2`: a ratio of cubics in `t = sqrt(-2 ln p)`.

  A minimax fit with a maximum error of 6e-7. The form is that of Hastings, 1955.
  """
  t = jnp.sqrt(-2 * jnp.log(p))
  upper = -3.014205579274 + t * (-3.919554140564772 + t * (3.4452269266526607 + t * 1.747928692569808))
  lower = 1 + t * (3.7052089651403235 + t * (1.7346974906058388 + t * 0.0004056626002680982))
  return upper / lower
