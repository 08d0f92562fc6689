"""Generators and discriminators as Flax Linen modules, for images of any height, width and channels.

Outside a network images are float32 in [0, 1], NHWC. Every discriminator returns its logits and the
features of its last hidden layer; every generator also draws its own latents. `train=True` needs the
random stream "noise" where a network is noisy.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gan_jax.types import InputError

_DIMS = ("NHWC", "HWIO", "NHWC")


# --- Layers


class WeightNormDense(nn.Module):
  """A dense layer with normalised weights, `y = s <v, x> / |v| + b`.

  With `init_from_data`, `s` and `b` start such that every feature of `y` has mean 0 and variance 1
  over the batch that the parameters are initialised with; else `s = 1`, `b = 0`.

  References:
    Salimans & Kingma, 2016, https://arxiv.org/abs/1602.07868, equations 2, 5 and 6.
  """

  features: int
  train_scale: bool = False
  """Whether the optimizer moves `s`. A frozen `s` lives in the collection "frozen"."""
  init_from_data: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b features"]:
    v = self.param("kernel", nn.initializers.normal(0.1), (x.shape[-1], self.features))
    y = x @ (v / jnp.linalg.norm(v, axis=0, keepdims=True))

    def init_scale(*_) -> Array:
      return jax.lax.rsqrt(y.var(axis=0) + 1e-8) if self.init_from_data else jnp.ones(self.features)

    def init_bias(*_) -> Array:
      return -y.mean(axis=0) * scale if self.init_from_data else jnp.zeros(self.features)

    if self.train_scale:
      scale = self.param("scale", init_scale)
    else:
      scale = self.variable("frozen", "scale", init_scale).value
    bias = self.param("bias", init_bias)
    return y * scale[None] + bias[None]


class BatchNormShift(nn.Module):
  """Batch normalisation that shifts but does not scale, by the statistics of the batch at all times."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"]) -> Float[Array, "b *dims c"]:
    axes = tuple(range(x.ndim - 1))
    shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) + shift.reshape(*mean.shape)


def conv(
  x: Float[Array, "b h w c"],
  w: Float[Array, "kh kw c f"],
  strides: Sequence[int],
  padding: Literal["SAME"],
  **_,
) -> Float[Array, "b oh ow f"]:
  """Convolution with "SAME" padding, fast inside loops on every backend.

  XLA's CPU backend runs the gradients of a convolution in a loop body with a naive kernel, 4 to 60
  times slower than outside (https://github.com/jax-ml/jax/issues/12868). There the gradients are
  written such that the naive kernel is never met; elsewhere this is `lax.conv_general_dilated`.
  """
  fn = _conv_in_loops if jax.default_backend() == "cpu" else _conv
  return fn(x, w, (strides[0], strides[1]))


def _conv(x: Array, w: Array, strides: tuple[int, int]) -> Array:
  return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=_DIMS)


_conv_in_loops = jax.custom_vjp(_conv, nondiff_argnums=(2,))


def _conv_forward(x: Array, w: Array, strides: tuple[int, int]):
  return _conv(x, w, strides), (x, w)


def _conv_backward(strides: tuple[int, int], residuals: tuple[Array, Array], dy: Array):
  """Gradient of the images as a dilated convolution, of the kernel as products with shifted images."""
  x, w = residuals
  (height, width), (kh, kw, c, f), (oh, ow) = x.shape[1:3], w.shape, dy.shape[1:3]
  pads = jax.lax.padtype_to_pads((height, width), (kh, kw), strides, "SAME")
  dx_pads = [
    (k - 1 - low, size + low - 1 - (out - 1) * s)
    for k, (low, _), size, out, s in zip((kh, kw), pads, (height, width), (oh, ow), strides, strict=True)
  ]
  w_flipped = w[::-1, ::-1].swapaxes(2, 3)
  dx = jax.lax.conv_general_dilated(
    dy, w_flipped, (1, 1), dx_pads, lhs_dilation=strides, dimension_numbers=_DIMS
  )
  patches = _patches(x, (kh, kw), strides, pads, (oh, ow))
  if c == 1:  # one matrix product of width kh * kw, where kh * kw products would have width 1
    dw = jnp.concatenate(patches, axis=-1).reshape(-1, kh * kw).T @ dy.reshape(-1, f)
  else:
    dw = jnp.stack([patch.reshape(-1, c).T @ dy.reshape(-1, f) for patch in patches])
  return dx, dw.reshape(w.shape)


def _patches(x: Array, kernel, strides, pads, out) -> list[Array]:
  """The input of each of the kernel's `kh * kw` weights at every output position, `[B, OH, OW, C]`."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  return [
    x[:, i : i + (out[0] - 1) * strides[0] + 1 : strides[0]][
      :, :, j : j + (out[1] - 1) * strides[1] + 1 : strides[1]
    ]
    for i in range(kernel[0])
    for j in range(kernel[1])
  ]


_conv_in_loops.defvjp(_conv_forward, _conv_backward)


def depth_to_space(x: Float[Array, "b h w cc"], factor: int) -> Float[Array, "b hh ww c"]:
  """Moves channels into `factor x factor` blocks of pixels: `[B, H, W, f*f*C]` to `[B, f*H, f*W, C]`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * factor, w * factor, -1)


# --- Networks


class MLPDiscriminator(nn.Module):
  """The discriminator of Improved GAN on MNIST: noise before every layer, weight norm, K logits.

  Dense 1000-500-250-250-250, ReLU. Gaussian noise of standard deviation 0.3 on the pixels and 0.5 on
  every hidden layer, in training only. The scale of the weight norm is trained in the last layer alone.
  The features are the last hidden layer before its noise.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 5.1, and the authors' code.
  """

  num_classes: int
  widths: Sequence[int] = (1000, 500, 250, 250, 250)
  noise_in: float = 0.3
  noise_hidden: float = 0.5

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> tuple[Float[Array, "b k"], Float[Array, "b f"]]:
    def noisy(x: Array, std: float) -> Array:
      return x + std * jax.random.normal(self.make_rng("noise"), x.shape) if train else x

    features = x.reshape(len(x), -1)
    h = noisy(features, self.noise_in)
    for width in self.widths:
      features = nn.relu(WeightNormDense(width)(h))
      h = noisy(features, self.noise_hidden)
    return WeightNormDense(self.num_classes, train_scale=True)(h), features


class MLPGenerator(nn.Module):
  """The generator of Improved GAN on MNIST: z ~ U(0, 1)^100, two softplus layers, sigmoid pixels.

  Batch normalisation shifts without scaling and always uses the statistics of the batch, so an image
  depends a little on the others that are drawn with it.
  """

  image_shape: tuple[int, int, int]
  widths: Sequence[int] = (500, 500)
  latent_size: int = 100

  def latents(self, key: Key[Array, ""], num: int) -> Float[Array, "n z"]:
    return jax.random.uniform(key, (num, self.latent_size))

  @nn.compact
  def __call__(self, z: Float[Array, "n z"], *, train: bool) -> Float[Array, "n h w c"]:
    del train
    h = z
    for width in self.widths:
      h = nn.Dense(width, use_bias=False, kernel_init=nn.initializers.normal(0.05))(h)
      h = nn.softplus(BatchNormShift()(h))
    x = WeightNormDense(math.prod(self.image_shape), train_scale=True, init_from_data=False)(h)
    return nn.sigmoid(x).reshape(-1, *self.image_shape)


class ConvDiscriminator(nn.Module):
  """A small convolutional discriminator for images from 8x8 up.

  Convolutions of stride 2 halve the image until its shorter side is at most 4; a dense layer gives the
  features. Images below 16x16 begin with a convolution of stride 1. Layer normalisation, because it
  does not mix the real and the generated images of a batch, and leaky ReLU.
  """

  num_classes: int
  width: int = 32
  """Channels of the first layer; they double from layer to layer, up to four times as many."""
  num_features: int = 256
  dropout: float = 0.0
  """Share of the last convolution's outputs that the dense layer does without in training."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> tuple[Float[Array, "b k"], Float[Array, "b f"]]:
    check_image_shape(x.shape[1:])

    def block(layer: nn.Module, h: Array) -> Array:
      return nn.leaky_relu(nn.LayerNorm()(layer(h)), 0.1)

    conv_layer = partial(nn.Conv, use_bias=False, conv_general_dilated=conv)
    small, width = min(x.shape[1:3]) < 16, self.width
    stem = conv_layer(width, (3, 3), 1) if small else conv_layer(width, (5, 5), 2)
    h = block(stem, 2 * x - 1)
    while min(h.shape[1:3]) > 4:
      width = min(2 * width, 4 * self.width)
      h = block(conv_layer(width, (3, 3), 2), h)
    h = h.reshape(len(h), -1)
    h = nn.Dropout(self.dropout, rng_collection="noise")(h, deterministic=not train)
    features = block(nn.Dense(self.num_features, use_bias=False), h)
    return nn.Dense(self.num_classes)(features), features


class ConvGenerator(nn.Module):
  """A small convolutional generator: z ~ N(0, I), a dense layer, then convolutions and pixel shuffles.

  The work is done at a quarter of the image's size: it starts there or, for sides over 32, smaller and
  doubles. The last convolution gives each position its 4x4 pixels. What exceeds the image is cropped.
  Batch normalisation as in `MLPGenerator`.
  """

  image_shape: tuple[int, int, int]
  width: int = 64
  """Channels of the hidden layers."""
  latent_size: int = 64

  def latents(self, key: Key[Array, ""], num: int) -> Float[Array, "n z"]:
    return jax.random.normal(key, (num, self.latent_size))

  @nn.compact
  def __call__(self, z: Float[Array, "n z"], *, train: bool) -> Float[Array, "n h w c"]:
    del train
    check_image_shape(self.image_shape)
    height, width, channels = self.image_shape
    doublings = max(0, math.ceil(math.log2(max(height, width) / 32)))
    base = [math.ceil(side / (4 * 2**doublings)) for side in (height, width)]
    conv3 = partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=conv)
    h = nn.Dense(math.prod(base) * self.width, use_bias=False)(z)
    h = nn.relu(BatchNormShift()(h.reshape(-1, *base, self.width)))
    for _ in range(doublings):
      h = depth_to_space(conv3(4 * self.width, use_bias=False)(h), 2)
      h = nn.relu(BatchNormShift()(h))
    h = nn.relu(BatchNormShift()(conv3(self.width, use_bias=False)(h)))
    x = depth_to_space(conv3(16 * channels)(h), 4)
    return nn.sigmoid(x[:, :height, :width])


def check_image_shape(shape: Sequence[int]) -> None:
  """Raises `InputError` where the convolutional networks cannot take images of this shape."""
  if min(shape[:2]) < 8:
    raise InputError(
      f"images of {shape[0]}x{shape[1]} are too small for the conv networks, which need 8x8 or more;"
      " use --network mlp"
    )
