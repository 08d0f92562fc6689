"""A small convolutional pair for images of at least 8x8."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from gan_jax.kernels import Precision
from gan_jax.networks.layers import (
  Block,
  Linear,
  Norm,
  check_image_shape,
  depth_to_space,
  embed,
  heads,
  latents,
  leaky_relu,
  normalise,
)
from gan_jax.types import Latents


class ConvDiscriminator(nn.Module):
  """A small convolutional discriminator for images of at least 8x8.

  Convolutions of stride 2 halve the image until its shorter side is at most 4; a dense layer gives the
  features. For images below 16x16 the first convolution has stride 1. With `depth`, further convolutions
  follow at each resolution, as in VGG. Leaky ReLU and, by default, layer normalisation, because it does not
  mix the real and the generated images of a batch.
  """

  num_classes: int
  width: int = 32
  """Channels of the first layer; they double at each resolution, up to four times as many."""
  depth: int = 1
  """Convolutions at each resolution."""
  num_features: int = 256
  norm: Norm = "layer"
  num_aux: int = 0
  """Logits of an auxiliary head, see `heads`."""
  precision: Precision = "float32"
  """Precision of all products and convolutions except those of the heads."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  def strides(self, image_shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of the convolutions."""
    side = min(image_shape[:2])
    strides = [1 if side < 16 else 2]
    side = -(-side // strides[0])
    while side > 4:
      strides.append(2)
      side = -(-side // 2)
    return tuple(strides)

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"Block_{i}" for i in range(self.depth * len(self.strides(image_shape)) + 1))

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> tuple[Array, ...]:
    check_image_shape(x.shape[1:])
    block = partial(Block, norm=self.norm, activation=leaky_relu, precision=self.precision)
    h = 2 * x - 1
    for i, stride in enumerate(self.strides(x.shape[1:])):
      kernel = 5 if i == 0 and stride == 2 else 3
      features = min(2**i, 4) * self.width
      h = block(features, kernel, stride)(h, train=train)
      for _ in range(1, self.depth):
        h = block(features, 3)(h, train=train)
    h = h.reshape(h.shape[0], -1)
    features = block(self.num_features)(h, train=train)
    return heads(self, features, features, train)


class ConvGenerator(nn.Module):
  """A small convolutional generator: z ~ N(0, I), a dense layer, then convolutions and pixel shuffles.

  Hidden layers work at a quarter of the image's size: they start there or, for sides over 32, smaller and
  double. The last convolution gives each position its 4x4 pixels; with `fine`, the size doubles once more
  before it, and it gives 2x2. Excess pixels are cropped. Batch normalisation as in `MLPGenerator`.
  """

  image_shape: tuple[int, int, int]
  width: int = 64
  """Channels of the hidden layers."""
  latent_size: int = 64
  latent: Literal["uniform", "normal"] = "normal"
  norm: Norm = "shift"
  num_classes: int = 0
  """Number of classes if class-conditional; 0: unconditional."""
  fine: bool = False
  precision: Precision = "float32"
  """Precision of all products and convolutions."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  latents = latents

  @nn.compact
  def __call__(self, z: Latents, *, train: bool) -> Float[Array, "n h w c"]:
    check_image_shape(self.image_shape)
    height, width, channels = self.image_shape
    doublings = max(0, math.ceil(math.log2(max(height, width) / 32)))
    base = [math.ceil(side / (4 * 2**doublings)) for side in (height, width)]
    shared = {"precision": self.precision, "axis_name": self.axis_name}
    block = partial(Block, self.width, norm=self.norm, **shared)
    linear = partial(Linear, precision=self.precision)
    h = linear(math.prod(base) * self.width, use_bias=self.norm == "none")(embed(self, z), train=train)
    h = nn.relu(normalise(h.reshape(-1, *base, self.width), self.norm, self.axis_name))
    for _ in range(doublings):
      h = block(3, depth_to_space=2)(h, train=train)
    h = block(3)(h, train=train)
    if self.fine:
      h = block(3, depth_to_space=2)(h, train=train)
    shuffle = 2 if self.fine else 4
    x = depth_to_space(linear(shuffle**2 * channels, 3)(h, train=train), shuffle)
    return nn.sigmoid(x[:, :height, :width])
