"""Generators and discriminators as Flax Linen modules, for images of any height, width and channels.

Outside a network images are float32 in [0, 1], NHWC. Every discriminator returns its logits and the
features of its last hidden layer; every generator also draws its own latents. `train=True` needs the
random stream "noise" where a network is noisy.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gan_jax import kernels
from gan_jax.types import ClassLatents, InputError

Norm = Literal["none", "weight", "spectral", "layer", "batch", "shift"]
"""How a layer is normalised: its weights (`weight`, `spectral`) or its outputs. See `Block`."""


# --- Layers


class Linear(nn.Module):
  """A dense layer or, with `kernel`, a convolution, `y = W x + b`, its weights normalised or not.

  - `weight`: `y = s <v, x> / |v| + b` for every output feature. With `init_from_data`, `s` and `b` start
    such that every feature of `y` has mean 0 and variance 1 over the batch that the parameters are
    initialised with; else `s = 1`, `b = 0`. A frozen `s` lives in the collection "frozen".
  - `spectral`: `W / sigma(W)`, the largest singular value by one power iteration an update in training;
    its vectors live in the collection "batch_stats".
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
  """Whether the optimizer moves the scale of the weight norm."""
  init_from_data: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"], *, train: bool) -> Float[Array, "b *odims features"]:
    if self.norm == "weight":
      return self._weight_norm(x)
    if self.kernel is None:
      layer: nn.Module = nn.Dense(self.features, self.use_bias, kernel_init=self.kernel_init)
    else:
      layer = nn.Conv(
        self.features,
        (self.kernel, self.kernel),
        self.strides,
        use_bias=self.use_bias,
        kernel_init=_as_matrix(self.kernel_init),
        conv_general_dilated=kernels.conv,
      )
    return nn.SpectralNorm(layer)(x, update_stats=train) if self.norm == "spectral" else layer(x)

  def _weight_norm(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    if self.kernel is not None:
      shape = (self.kernel, self.kernel, *shape)
    v = self.param("kernel", nn.initializers.normal(0.1), shape)
    # The columns of the product are scaled and not those of v, which in a dense layer is much larger.
    y = x @ v if self.kernel is None else kernels.conv(x, v, (self.strides, self.strides))
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
  # The same numbers, but XLA's CPU backend takes seconds to compile a draw of four dimensions.
  def draw(key: Key[Array, ""], shape: Sequence[int], *args) -> Array:
    return init(key, (math.prod(shape[:-1]), shape[-1]), *args).reshape(shape)

  return draw


class BatchNormShift(nn.Module):
  """Batch normalisation that shifts but does not scale, by the statistics of the batch at all times."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"]) -> Float[Array, "b *dims c"]:
    axes = tuple(range(x.ndim - 1))
    shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) + shift.reshape(*mean.shape)


class Block(nn.Module):
  """A linear layer, normalised, then `activation`: what all networks here are built from.

  Normalisation of the outputs: `layer` over the channels of each position, `batch` with running
  averages for evaluation, `shift` as in `BatchNormShift`. In a discriminator `batch` takes its statistics
  over real and generated images together, because they go through in one pass.
  """

  features: int
  kernel: int | None = None
  strides: int = 1
  norm: Norm = "layer"
  activation: Callable[[Array], Array] = nn.relu
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
  depth_to_space: int = 1
  """A convolution then has `depth_to_space ** 2` times the channels, and the image grows by this factor."""

  @nn.compact
  def __call__(self, x: Float[Array, "b *dims c"], *, train: bool) -> Float[Array, "b *odims features"]:
    bias = self.norm in ("none", "spectral")
    features = self.features * self.depth_to_space**2
    linear = Linear(features, self.kernel, self.strides, self.norm, bias, self.kernel_init)
    y = linear(x, train=train)
    if self.depth_to_space > 1:
      y = depth_to_space(y, self.depth_to_space)
    return self.activation(_normalise(y, self.norm, train))


def _normalise(y: Array, norm: Norm, train: bool) -> Array:
  if norm == "layer":
    return nn.LayerNorm()(y)
  if norm == "batch":
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)
  return BatchNormShift()(y) if norm == "shift" else y


def leaky_relu(x: Array) -> Array:
  """`max(x, 0.1 x)`."""
  return nn.leaky_relu(x, 0.1)


def depth_to_space(x: Float[Array, "b h w cc"], factor: int) -> Float[Array, "b hh ww c"]:
  """Moves channels into `factor x factor` blocks of pixels: `[B, H, W, f*f*C]` to `[B, f*H, f*W, C]`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * factor, w * factor, -1)


# --- Discriminators


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
  norm: Norm = "weight"
  activation: Callable[[Array], Array] = nn.relu
  num_aux: int = 0
  """Logits of a further head, see `_heads`."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> tuple[Array, ...]:
    def noisy(x: Array, std: float) -> Array:
      return x + std * kernels.normal(self.make_rng("noise"), x.shape) if train and std else x

    features = x.reshape(len(x), -1)
    h = noisy(features, self.noise_in)
    for width in self.widths:
      features = Block(width, norm=self.norm, activation=self.activation)(h, train=train)
      h = noisy(features, self.noise_hidden)
    return _heads(self, h, features, train)


class ConvDiscriminator(nn.Module):
  """A small convolutional discriminator for images from 8x8 up.

  Convolutions of stride 2 halve the image until its shorter side is at most 4; a dense layer gives the
  features. Images below 16x16 begin with a convolution of stride 1. Layer normalisation by default,
  because it does not mix the real and the generated images of a batch, and leaky ReLU.
  """

  num_classes: int
  width: int = 32
  """Channels of the first layer; they double from layer to layer, up to four times as many."""
  num_features: int = 256
  dropout: float = 0.0
  """Share of the last convolution's outputs that the dense layer does without in training."""
  norm: Norm = "layer"
  num_aux: int = 0
  """Logits of a further head, see `_heads`."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> tuple[Array, ...]:
    check_image_shape(x.shape[1:])
    block = partial(Block, norm=self.norm, activation=leaky_relu)
    small, width = min(x.shape[1:3]) < 16, self.width
    stem = block(width, 3, 1) if small else block(width, 5, 2)
    h = stem(2 * x - 1, train=train)
    while min(h.shape[1:3]) > 4:
      width = min(2 * width, 4 * self.width)
      h = block(width, 3, 2)(h, train=train)
    h = h.reshape(len(h), -1)
    h = nn.Dropout(self.dropout, rng_collection="noise")(h, deterministic=not train)
    features = block(self.num_features)(h, train=train)
    return _heads(self, features, features, train)


def _heads(
  d: MLPDiscriminator | ConvDiscriminator, h: Array, features: Array, train: bool
) -> tuple[Array, ...]:
  """`(logits [B, K], features [B, F])` and, with `num_aux`, the logits `[B, A]` of a task of its own."""

  def head(num: int, name: str) -> Array:
    return Linear(num, norm=d.norm, train_scale=True, name=name)(h, train=train)

  out = head(d.num_classes, "head"), features
  return (*out, head(d.num_aux, "aux_head")) if d.num_aux else out


# --- Generators


def _latents(
  g: "MLPGenerator | ConvGenerator", key: Key[Array, ""], num: int
) -> Float[Array, "n z"] | ClassLatents:
  """`[num, Z]` from G's distribution and, for a class-conditional G, uniform classes beside it."""
  draw = jax.random.uniform if g.latent == "uniform" else kernels.normal
  if not g.num_classes:
    return draw(key, (num, g.latent_size))
  key_z, key_y = jax.random.split(key)
  z = draw(key_z, (num, g.latent_size))
  return ClassLatents(z, jax.random.randint(key_y, (num,), 0, g.num_classes))


def _enter(
  g: "MLPGenerator | ConvGenerator", z: Float[Array, "n z"] | ClassLatents
) -> Float[Array, "n zy"]:
  """The latents as one vector: the class as a one-hot code, about as long as z."""
  if not isinstance(z, ClassLatents):
    return z
  if g.norm == "shift":
    # In a batch of one class the code is a constant, and the batch's mean takes it away.
    raise InputError("norm='shift' hides the class from a class-conditional generator; use norm='batch'")
  code = jax.nn.one_hot(z.y, g.num_classes) * jnp.sqrt(z.z.shape[-1])
  return jnp.concatenate([z.z, code], axis=-1)


class MLPGenerator(nn.Module):
  """The generator of Improved GAN on MNIST: z ~ U(0, 1)^100, two softplus layers, sigmoid pixels.

  Batch normalisation shifts without scaling and always uses the statistics of the batch, so an image
  depends a little on the others that are drawn with it.
  """

  image_shape: tuple[int, int, int]
  widths: Sequence[int] = (500, 500)
  latent_size: int = 100
  latent: Literal["uniform", "normal"] = "uniform"
  norm: Norm = "shift"
  activation: Callable[[Array], Array] = nn.softplus
  num_classes: int = 0
  """Classes that it makes images of, with any `norm` but "shift"; 0: it is not asked for a class."""

  latents = _latents

  @nn.compact
  def __call__(self, z: Float[Array, "n z"] | ClassLatents, *, train: bool) -> Float[Array, "n h w c"]:
    h, published = _enter(self, z), self.norm == "shift"
    for width in self.widths:
      init = nn.initializers.normal(0.05) if published else nn.linear.default_kernel_init
      h = Block(width, norm=self.norm, activation=self.activation, kernel_init=init)(h, train=train)
    out_norm: Norm = "weight" if published else "none"
    out = Linear(math.prod(self.image_shape), norm=out_norm, train_scale=True, init_from_data=False)
    return nn.sigmoid(out(h, train=train)).reshape(-1, *self.image_shape)


class ConvGenerator(nn.Module):
  """A small convolutional generator: z ~ N(0, I), a dense layer, then convolutions and pixel shuffles.

  The work is done at a quarter of the image's size: it starts there or, for sides over 32, smaller and
  doubles. The last convolution gives each position its 4x4 pixels; with `fine`, it doubles once more
  before and gives 2x2. What exceeds the image is cropped. Batch normalisation as in `MLPGenerator`.
  """

  image_shape: tuple[int, int, int]
  width: int = 64
  """Channels of the hidden layers."""
  latent_size: int = 64
  latent: Literal["uniform", "normal"] = "normal"
  norm: Norm = "shift"
  num_classes: int = 0
  """Classes that it makes images of, with any `norm` but "shift"; 0: it is not asked for a class."""
  fine: bool = False

  latents = _latents

  @nn.compact
  def __call__(self, z: Float[Array, "n z"] | ClassLatents, *, train: bool) -> Float[Array, "n h w c"]:
    check_image_shape(self.image_shape)
    height, width, channels = self.image_shape
    doublings = max(0, math.ceil(math.log2(max(height, width) / 32)))
    base = [math.ceil(side / (4 * 2**doublings)) for side in (height, width)]
    block = partial(Block, self.width, norm=self.norm)
    h = Linear(math.prod(base) * self.width, use_bias=self.norm == "none")(_enter(self, z), train=train)
    h = nn.relu(_normalise(h.reshape(-1, *base, self.width), self.norm, train))
    for _ in range(doublings):
      h = block(3, depth_to_space=2)(h, train=train)
    h = block(3)(h, train=train)
    if self.fine:
      h = block(3, depth_to_space=2)(h, train=train)
    shuffle = 2 if self.fine else 4
    x = depth_to_space(Linear(shuffle**2 * channels, 3)(h, train=train), shuffle)
    return nn.sigmoid(x[:, :height, :width])


def check_image_shape(shape: Sequence[int]) -> None:
  """Raises `InputError` where the convolutional networks cannot take images of this shape."""
  if min(shape[:2]) < 8:
    raise InputError(
      f"images of {shape[0]}x{shape[1]} are too small for the conv networks, which need 8x8 or more;"
      " use --network mlp"
    )
