"""A wide residual pair for colour images of at least 32x32."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from gan_jax.kernels import Precision
from gan_jax.networks.layers import (
  Linear,
  Norm,
  check_image_shape,
  embed,
  heads,
  latents,
  leaky_relu,
  normalise,
)
from gan_jax.types import Latents


class ResidualBlock(nn.Module):
  """`x + conv(act(norm(conv(act(norm(x))))))`, strided or, with `upsample`, at twice the size.

  References:
    He et al., 2016, https://arxiv.org/abs/1603.05027 (normalisation before each convolution).
  """

  features: int
  strides: int = 1
  upsample: bool = False
  norm: Norm = "group"
  activation: Callable[[Array], Array] = leaky_relu
  precision: Precision = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow f"]:
    norm: Norm = self.norm if self.norm in ("weight", "spectral") else "none"
    linear = partial(Linear, precision=self.precision)
    h = self.activation(normalise(x, self.norm, self.axis_name))
    if self.upsample:
      h, x = (jnp.repeat(jnp.repeat(a, 2, axis=1), 2, axis=2) for a in (h, x))
    h = linear(self.features, 3, self.strides, norm)(h, train=train)
    h = self.activation(normalise(h, self.norm, self.axis_name))
    h = linear(self.features, 3, norm=norm)(h, train=train)
    if x.shape != h.shape:
      x = linear(self.features, 1, self.strides, norm, use_bias=False)(x, train=train)
    return x + h


class Pool(nn.Module):
  """Global average pooling of the normalised and activated input."""

  norm: Norm = "group"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b c"]:
    return leaky_relu(normalise(x, self.norm)).mean(axis=(1, 2))


class ResNetDiscriminator(nn.Module):
  """WRN-28-2 with group normalisation, which does not mix the images of a batch.

  A convolution, then three groups of residual blocks with 32, 64 and 128 channels at full, half and quarter
  size; global average pooling gives the features. Images of 64 pixels or more are first halved, by blocks
  of 16 channels, until their shorter side is below 64.

  References:
    Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146 (WRN-28-2: depth 28, width 2).
  """

  num_classes: int
  width: int = 32
  """Channels of the first group; the second has twice, the third four times as many."""
  depth: int = 4
  """Residual blocks per group."""
  norm: Norm = "group"
  num_aux: int = 0
  """Logits of an auxiliary head, see `heads`."""
  precision: Precision = "float32"
  """Precision of all products and convolutions except those of the heads."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  def blocks(self, image_shape: Sequence[int]) -> list[tuple[int, int]]:
    """Channels and stride of each residual block."""
    halvings = max(0, math.floor(math.log2(min(image_shape[:2]) / 32)))
    out = [(self.width // 2, 2)] * halvings
    for i in range(3):
      out += [(2**i * self.width, 2 if i and not j else 1) for j in range(self.depth)]
    return out

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    blocks = (f"ResidualBlock_{i}" for i in range(len(self.blocks(image_shape))))
    return ("stem", *blocks, *(["Pool_0"] if self.norm in ("layer", "group") else []))

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> tuple[Array, ...]:
    check_image_shape(x.shape[1:])
    norm: Norm = self.norm if self.norm in ("weight", "spectral") else "none"
    stem = Linear(self.width // 2, 3, norm=norm, precision=self.precision, name="stem")
    h = stem(2 * x - 1, train=train)
    for features, stride in self.blocks(x.shape[1:]):
      h = ResidualBlock(features, stride, norm=self.norm, precision=self.precision)(h, train=train)
    features = Pool(self.norm)(h, train=train)
    return heads(self, features, features, train)


class ResNetGenerator(nn.Module):
  """A residual generator: z ~ N(0, I), a dense layer, one residual block per doubling, a last convolution.

  Normalisation is within each image, so an image depends on its latent alone.
  """

  image_shape: tuple[int, int, int]
  width: int = 32
  """Channels at the image's size; up to four times as many at smaller sizes."""
  latent_size: int = 64
  latent = "normal"
  norm: Norm = "group"
  num_classes: int = 0
  """Number of classes if class-conditional; 0: unconditional."""
  precision: Precision = "float32"
  """Precision of all products and convolutions."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  latents = latents

  @nn.compact
  def __call__(self, z: Latents, *, train: bool) -> Float[Array, "n h w c"]:
    check_image_shape(self.image_shape)
    height, width, channels = self.image_shape
    doublings = max(1, round(math.log2(min(height, width) / 4)))
    base = [math.ceil(side / 2**doublings) for side in (height, width)]
    features = [min(4, 2 ** (doublings - i)) * self.width for i in range(doublings + 1)]
    linear = partial(Linear, precision=self.precision)
    block = partial(ResidualBlock, precision=self.precision, axis_name=self.axis_name)
    h = linear(math.prod(base) * features[0])(embed(self, z), train=train)
    h = h.reshape(-1, *base, features[0])
    for num in features[1:]:
      h = block(num, upsample=True, norm=self.norm, activation=nn.relu)(h, train=train)
    x = linear(channels, 3)(nn.relu(normalise(h, self.norm, self.axis_name)), train=train)
    return nn.sigmoid(x[:, :height, :width])
