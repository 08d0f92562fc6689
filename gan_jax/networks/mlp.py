"""Multilayer perceptrons: the pair of Improved GAN and, with other sizes, that of the source article."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from gan_jax import kernels
from gan_jax.networks.layers import Block, Linear, Norm, embed, heads, latents
from gan_jax.types import Latents


class MLPDiscriminator(nn.Module):
  """The discriminator of Improved GAN on MNIST: noise before every layer, weight norm, K logits.

  Dense 1000-500-250-250-250, ReLU. Gaussian noise of standard deviation 0.3 on the pixels and 0.5 on
  every hidden layer, in training only. The scale of the weight norm is trained in the last layer only.
  The features are the last hidden layer before its noise.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 6.1, and the authors' code.
  """

  num_classes: int
  widths: Sequence[int] = (1000, 500, 250, 250, 250)
  noise_in: float = 0.3
  noise_hidden: float = 0.5
  norm: Norm = "weight"
  activation: Callable[[Array], Array] = nn.relu
  num_aux: int = 0
  """Logits of an auxiliary head, see `heads`."""
  precision: kernels.Precision = "float32"
  """Precision of all products except those of the heads."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    del image_shape
    return tuple(f"Block_{i}" for i in range(len(self.widths)))

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> tuple[Array, ...]:
    def noisy(x: Array, std: float) -> Array:
      if not train or not std:
        return x
      if self.axis_name is None or self.is_initializing():
        return x + std * kernels.normal(self.make_rng("noise"), x.shape)
      # Draw the noise of the whole batch and keep this device's part.
      num = x.shape[0] * jax.lax.axis_size(self.axis_name)
      noise = kernels.normal(self.make_rng("noise"), (num, *x.shape[1:]))
      first = jax.lax.axis_index(self.axis_name) * x.shape[0]
      return x + std * jax.lax.dynamic_slice_in_dim(noise, first, x.shape[0])

    features = x.reshape(x.shape[0], -1)
    h = noisy(features, self.noise_in)
    block = partial(Block, norm=self.norm, activation=self.activation, precision=self.precision)
    for width in self.widths:
      features = block(width)(h, train=train)
      h = noisy(features, self.noise_hidden)
    return heads(self, h, features, train)


class MLPGenerator(nn.Module):
  """The generator of Improved GAN on MNIST: z ~ U(0, 1)^100, two softplus layers, sigmoid pixels.

  Batch normalisation has a learned shift but no learned scale, and uses batch statistics in training; for
  sampling see `steps.with_statistics`.
  """

  image_shape: tuple[int, int, int]
  widths: Sequence[int] = (500, 500)
  latent_size: int = 100
  latent: Literal["uniform", "normal"] = "uniform"
  norm: Norm = "shift"
  activation: Callable[[Array], Array] = nn.softplus
  num_classes: int = 0
  """Number of classes if class-conditional; 0: unconditional."""
  precision: kernels.Precision = "float32"
  """Precision of all products."""
  axis_name: str | None = None
  """Name of the device axis that the batch is split over, see `parallel.over_axis`."""

  latents = latents

  @nn.compact
  def __call__(self, z: Latents, *, train: bool) -> Float[Array, "n h w c"]:
    h, published = embed(self, z), self.norm == "shift"
    shared = {"precision": self.precision, "axis_name": self.axis_name}
    block = partial(Block, norm=self.norm, activation=self.activation, **shared)
    for width in self.widths:
      init = nn.initializers.normal(0.05) if published else nn.linear.default_kernel_init
      h = block(width, kernel_init=init)(h, train=train)
    out_norm: Norm = "weight" if published else "none"
    size, linear = math.prod(self.image_shape), partial(Linear, precision=self.precision)
    out = linear(size, norm=out_norm, train_scale=True, init_from_data=False)
    return nn.sigmoid(out(h, train=train)).reshape(-1, *self.image_shape)
