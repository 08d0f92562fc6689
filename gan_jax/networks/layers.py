"""Layers, heads and latents shared by the networks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gan_jax import kernels
from gan_jax.types import ClassLatents, InputError, Latents

Norm = Literal["none", "weight", "spectral", "layer", "group", "shift"]
"""How a layer is normalised: its weights (`weight`, `spectral`) or its outputs. See `Block`."""


class Linear(nn.Module):
  """A dense layer or, with `kernel`, a convolution, `y = W x + b`, with or without normalised weights.

  - `weight`: `y = s <v, x> / |v| + b` for every output feature. With `init_from_data`, `s` and `b` are
    initialised such that every feature of `y` has mean 0 and variance 1 over the initialisation batch; else
    `s = 1`, `b = 0`. A frozen `s` lives in the collection "frozen".
  - `spectral`: `W / sigma(W)`, with the largest singular value from one power iteration per update in
    training; its vectors live in the collection "batch_stats".
  - any other: plain weights.

  References:
    Salimans & Kingma, 2016, https://arxiv.org/abs/1602.07868, equations 2, 5 and 6.
    Miyato et al., 2018, https://arxiv.org/abs/1802.05957, algorithm 1.
  """

  features: int
  kernel: int | None = None
  strides: int = 1
  norm: Norm = "none"
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
  train_scale: bool = False
  """Whether the optimizer updates the scale of the weight norm."""
  init_from_data: bool = True
  precision: kernels.Precision = "float32"
  """Precision of the product or convolution; parameters, bias and `y` are float32."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"], *, train: bool) -> Float[Array, "b *odims features"]:
    if self.norm == "weight":
      return self._weight_norm(x)
    if self.kernel is None:
      product = kernels.in_precision(jax.lax.dot_general, self.precision)
      layer: nn.Module = nn.Dense(
        self.features, self.use_bias, kernel_init=self.kernel_init, dot_general=product
      )
    else:
      layer = nn.Conv(
        self.features,
        (self.kernel, self.kernel),
        self.strides,
        use_bias=self.use_bias,
        kernel_init=_as_matrix(self.kernel_init),
        conv_general_dilated=kernels.in_precision(kernels.conv, self.precision),
      )
    return nn.SpectralNorm(layer)(x, update_stats=train) if self.norm == "spectral" else layer(x)

  def _weight_norm(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    if self.kernel is not None:
      shape = (self.kernel, self.kernel, *shape)
    v = self.param("kernel", nn.initializers.normal(0.1), shape)
    # Scales the columns of the product and not those of v, which in a dense layer is much larger.
    if self.kernel is None:
      y = kernels.in_precision(jnp.matmul, self.precision)(x, v)
    else:
      y = kernels.in_precision(kernels.conv, self.precision)(x, v, (self.strides, self.strides))
    axes = tuple(range(y.ndim - 1))

    def each(value: Array) -> Array:
      return value.reshape((1,) * len(axes) + (-1,))

    y = y * each(jax.lax.rsqrt(jnp.square(v).sum(axis=tuple(range(v.ndim - 1)))))

    def init_scale(*_) -> Array:
      return jax.lax.rsqrt(y.var(axis=axes) + 1e-8) if self.init_from_data else jnp.ones(self.features)

    def init_bias(*_) -> Array:
      return -y.mean(axis=axes) * scale if self.init_from_data else jnp.zeros(self.features)

    if self.train_scale:
      scale = self.param("scale", init_scale)
    else:
      scale = self.variable("frozen", "scale", init_scale).value
    bias = self.param("bias", init_bias)
    return y * each(scale) + each(bias)


def _as_matrix(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
  # The same numbers, but XLA's CPU backend takes seconds to compile a four-dimensional draw.
  def draw(key: Key[Array, ""], shape: Sequence[int], *args) -> Array:
    return init(key, (math.prod(shape[:-1]), shape[-1]), *args).reshape(shape)

  return draw


class LayerNorm(nn.Module):
  """Layer normalisation over the channels of each position, with a learned scale and shift."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"]) -> Float[Array, "b *dims c"]:
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return kernels.layer_norm(x) * scale.reshape(shape) + bias.reshape(shape)


class BatchNormShift(nn.Module):
  """Batch normalisation with a learned shift but no learned scale, using batch statistics.

  If the collection "statistics" is given, its statistics are used instead, see `steps.with_statistics`; if
  that collection is mutable, those of the batch are stored there.
  """

  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"]) -> Float[Array, "b *dims c"]:
    axes = tuple(range(x.ndim - 1))
    shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
    if self.axis_name is None or self.is_initializing():
      mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    else:
      mean = jax.lax.pmean(x.mean(axis=axes, keepdims=True), self.axis_name)
      var = jax.lax.pmean(jnp.square(x - mean).mean(axis=axes, keepdims=True), self.axis_name)
    if self.has_variable("statistics", "mean"):
      mean, var = (self.get_variable("statistics", name) for name in ("mean", "var"))
    elif self.is_mutable_collection("statistics") and not self.is_initializing():  # init would keep them
      self.put_variable("statistics", "mean", mean)
      self.put_variable("statistics", "var", var)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) + shift.reshape(*mean.shape)


class Block(nn.Module):
  """A linear layer, normalisation, then `activation`: the building block of the networks without residuals.

  Normalisation of the outputs: `layer` over the channels of each position, `group` over all positions of
  each group of 16 channels, `shift` as in `BatchNormShift`, which discriminators reject, see `heads`.
  """

  features: int
  kernel: int | None = None
  strides: int = 1
  norm: Norm = "layer"
  activation: Callable[[Array], Array] = nn.relu
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
  depth_to_space: int = 1
  """Upsampling factor: the convolution has `depth_to_space ** 2` times the channels, moved into pixels."""
  precision: kernels.Precision = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"], *, train: bool) -> Float[Array, "b *odims features"]:
    bias = self.norm in ("none", "spectral")
    features = self.features * self.depth_to_space**2
    linear = Linear(
      features,
      self.kernel,
      self.strides,
      self.norm,
      bias,
      self.kernel_init,
      precision=self.precision,
    )
    y = linear(x, train=train)
    if self.depth_to_space > 1:
      y = depth_to_space(y, self.depth_to_space)
    return self.activation(normalise(y, self.norm, self.axis_name))


def normalise(y: Array, norm: Norm, axis_name: str | None = None) -> Array:
  if norm == "layer":
    return LayerNorm()(y)
  if norm == "group":
    return nn.GroupNorm(None, math.gcd(16, y.shape[-1]))(y)
  return BatchNormShift(axis_name)(y) if norm == "shift" else y


def leaky_relu(x: Array) -> Array:
  """`max(x, 0.1 x)`."""
  return nn.leaky_relu(x, 0.1)


def depth_to_space(x: Float[Array, "b h w cc"], factor: int) -> Float[Array, "b hh ww c"]:
  """Moves channels into `factor x factor` blocks of pixels: `[B, H, W, f*f*C]` to `[B, f*H, f*W, C]`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * factor, w * factor, -1)


def heads(d: Any, h: Float[Array, "b h"], features: Float[Array, "b f"], train: bool) -> tuple[Array, ...]:
  """The outputs of a discriminator: `(logits [B, K], features [B, F])`, with `num_aux` also `[B, A]`.

  Args:
    d: the discriminator, with `num_classes` K, `num_aux` A and `norm`.
    h: input of the heads.
    features: the discriminator's features.
    train: as in the network.

  Raises:
    InputError: `norm="shift"`. D's update passes real and generated images together and G's passes them
      separately, so with batch statistics the two updates would use different discriminators.
  """
  if d.norm == "shift":
    raise InputError("batch normalisation mixes the real and the generated images of D: use norm='layer'")

  def head(num: int, name: str) -> Array:
    return Linear(num, norm=d.norm, train_scale=True, name=name)(h, train=train)

  out = head(d.num_classes, "head"), features
  return (*out, head(d.num_aux, "aux_head")) if d.num_aux else out


def latents(g: Any, key: Key[Array, ""], num: int) -> Latents:
  """`[num, Z]` from G's latent distribution and, for a class-conditional G, uniform random classes.

  `g` has `latent`, `latent_size` Z and `num_classes`; the key is consumed.
  """
  draw = jax.random.uniform if g.latent == "uniform" else kernels.normal
  if not g.num_classes:
    return draw(key, (num, g.latent_size))
  key_z, key_y = jax.random.split(key)
  z = draw(key_z, (num, g.latent_size))
  return ClassLatents(z, jax.random.randint(key_y, (num,), 0, g.num_classes))


def embed(g: Any, z: Latents) -> Float[Array, "n zy"]:
  """The latents as one vector: z and the class as a one-hot code with about the norm of z."""
  if not isinstance(z, ClassLatents):
    return z
  code = jax.nn.one_hot(z.y, g.num_classes) * jnp.sqrt(z.z.shape[-1])
  return jnp.concatenate([z.z, code], axis=-1)


def check_image_shape(shape: Sequence[int]) -> None:
  """Raises `InputError` if the convolutional networks do not support images of this shape."""
  if min(shape[:2]) < 8:
    raise InputError(
      f"images of {shape[0]}x{shape[1]} are too small for the conv networks, which need 8x8 or more:"
      " choose a larger image size, or a network without convolutions"
    )
