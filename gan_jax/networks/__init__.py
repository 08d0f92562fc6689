"""Generators and discriminators as Flax Linen modules, for images of any height, width and channels.

Outside a network, images are float32 in [0, 1], NHWC. The contracts of generators and discriminators are in
`gan_jax.types`. `train=True` needs the random stream "noise" if a network adds noise.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from gan_jax.kernels import Precision
from gan_jax.networks.conv import ConvDiscriminator, ConvGenerator
from gan_jax.networks.layers import Linear, Norm, check_image_shape, depth_to_space, leaky_relu
from gan_jax.networks.mlp import MLPDiscriminator, MLPGenerator
from gan_jax.networks.resnet import ResNetDiscriminator, ResNetGenerator
from gan_jax.types import Discriminator, Generator

Pair = Literal["conv", "conv_small", "conv_fine", "vgg", "resnet", "mlp", "article"]
"""A pair of networks. A name means the same pair in every recipe and experiment."""

ImageShape = tuple[int, int, int]


def make_pair(
  name: Pair,
  image_shape: ImageShape,
  *,
  num_logits: int,
  num_classes: int = 0,
  num_aux: int = 0,
  norm: Norm | None = None,
  precision: Precision = "float32",
) -> tuple[Generator, Discriminator]:
  """The generator and the discriminator of this name.

  Args:
    name: conv: classifies well with few labels. conv_small: half its width. conv_fine: the same
      discriminator, with a generator of finer images. vgg: deeper, for colour images of at least 32x32.
      resnet: a wide residual pair for the same images, for accelerators. mlp: Improved GAN's pair. article:
      the source article's pair.
    image_shape: height, width, channels.
    num_logits: K of the discriminator.
    num_classes: number of classes of a class-conditional generator; 0: unconditional.
    num_aux: logits of the discriminator's auxiliary head.
    norm: normalisation in the discriminator (default: the pair's).
    precision: of products and convolutions except those of the discriminator's heads.

  Raises:
    InputError: the networks do not support images of this shape.
  """
  g, d = PAIRS[name](image_shape, num_logits, num_classes)
  shared = {} if precision == "float32" else {"precision": precision}  # a network may have only one
  return g.clone(**shared), d.clone(num_aux=num_aux, **({} if norm is None else {"norm": norm}), **shared)


def _conv(image_shape: ImageShape, num_logits: int, num_classes: int, *, scale: int = 1):
  check_image_shape(image_shape)
  norm = "layer" if num_classes else "shift"
  g = ConvGenerator(image_shape, width=64 // scale, norm=norm, num_classes=num_classes)
  return g, ConvDiscriminator(num_logits, width=32 // scale, num_features=256 // scale)


def _fine(image_shape: ImageShape, num_logits: int, num_classes: int, *, width: int = 64, depth: int = 1):
  check_image_shape(image_shape)
  g = ConvGenerator(image_shape, width, norm="layer", num_classes=num_classes, fine=True)
  return g, ConvDiscriminator(num_logits, depth=depth)


def _resnet(image_shape: ImageShape, num_logits: int, num_classes: int):
  check_image_shape(image_shape)
  return ResNetGenerator(image_shape, num_classes=num_classes), ResNetDiscriminator(num_logits)


def _mlp(image_shape: ImageShape, num_logits: int, num_classes: int):
  return MLPGenerator(image_shape, num_classes=num_classes), MLPDiscriminator(num_logits)


def _article(image_shape: ImageShape, num_logits: int, num_classes: int):
  g = MLPGenerator(
    image_shape,
    widths=(128, 256),
    latent="normal",
    norm="none",
    activation=leaky_relu,
    num_classes=num_classes,
  )
  d = MLPDiscriminator(
    num_logits, widths=(256, 128), noise_in=0.0, noise_hidden=0.0, norm="none", activation=leaky_relu
  )
  return g, d


def suited(image_shape: ImageShape) -> Literal["conv", "vgg", "mlp"]:
  """The pair for images of this shape: vgg for colour of at least 32x32, mlp below 8x8, else conv."""
  side = min(image_shape[:2])
  if side < 8:
    return "mlp"
  return "vgg" if side >= 32 and image_shape[2] == 3 else "conv"


PAIRS: dict[str, Callable] = {
  "conv": _conv,
  "conv_small": partial(_conv, scale=2),
  "conv_fine": partial(_fine, width=32),
  "vgg": partial(_fine, depth=2),
  "resnet": _resnet,
  "mlp": _mlp,
  "article": _article,
}
"""Builders of pairs, `(image_shape, num_logits, num_classes) -> (generator, discriminator)`."""

__all__ = [
  "PAIRS",
  "ConvDiscriminator",
  "ConvGenerator",
  "Linear",
  "MLPDiscriminator",
  "MLPGenerator",
  "Norm",
  "Pair",
  "Precision",
  "ResNetDiscriminator",
  "ResNetGenerator",
  "check_image_shape",
  "depth_to_space",
  "leaky_relu",
  "make_pair",
  "suited",
]
