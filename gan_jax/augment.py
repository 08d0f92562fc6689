"""Random image transformations, differentiable in the image, sampled independently per image.

All take `(key, x)` with `x` in [0, 1], `[B, H, W, C]`, consume the key and preserve shape and range.
Because they are differentiable, a GAN can apply them to all inputs of D, real and generated: G then learns
the images without them, if the augmentation is invertible in distribution.

References:
  Zhao et al., 2020, https://arxiv.org/abs/2006.10738 (DiffAugment).
  Karras et al., 2020, https://arxiv.org/abs/2006.06676 (which transformations leak, and ADA).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gan_jax.types import Augment

Border = Literal["zero", "edge", "mirror"]
"""Padding outside an image: zeros (the background of digits), the repeated edge, or the mirror image."""


def affine(
  *,
  shift: float = 0.0,
  rotate: float = 0.0,
  scale: float = 0.0,
  shear: float = 0.0,
  border: Border = "zero",
) -> Augment:
  """Builds a random affine map with bilinear sampling, each parameter uniform in its range.

  Args:
    shift: largest shift along each axis, as a fraction of the side.
    rotate: largest rotation in either direction, in degrees.
    scale: largest scaling: each axis by a factor in `[1 / (1 + scale), 1 + scale]`, log-uniform.
    shear: largest horizontal shear, as the tangent of its angle.
    border: padding outside the image.
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    batch, height, width, _ = x.shape
    draws = jax.random.uniform(key, (6, batch), minval=-1.0, maxval=1.0)
    dy, dx = shift * height * draws[0], shift * width * draws[1]
    angle = jnp.deg2rad(rotate) * draws[2]
    zoom_y, zoom_x = (1 + scale) ** draws[3], (1 + scale) ** draws[4]
    cos, sin, slope = jnp.cos(angle), jnp.sin(angle), shear * draws[5]
    # Where each output pixel comes from, relative to the centre: unshift, unrotate, unshear, unscale.
    v = cos / zoom_y, -sin / zoom_y
    u = (sin + slope * cos) / zoom_x, (cos - slope * sin) / zoom_x
    middle = (height - 1) / 2, (width - 1) / 2
    maps = jnp.array([[*w, m - w[0] * dy - w[1] * dx] for w, m in zip((v, u), middle, strict=True)])
    sides = jnp.arange(height) - middle[0], jnp.arange(width) - middle[1]
    grid = jnp.array([*jnp.meshgrid(*sides, indexing="ij"), jnp.ones((height, width))])
    # A matrix product: XLA would fuse sums, and the sines with them, into each gather, for every pixel.
    rows, columns = jnp.einsum("akb,khw->abhw", maps, grid, precision="highest")
    return sample(x, rows, columns, border)

  return transform


def sample(
  x: Float[Array, "b h w c"],
  rows: Float[Array, "b i j"],
  columns: Float[Array, "b i j"],
  border: Border = "zero",
) -> Float[Array, "b i j c"]:
  """Samples the image at fractional positions, with bilinear interpolation."""
  batch, height, width, channels = x.shape
  rows, columns = _inside(rows, height, border), _inside(columns, width, border)
  top, left = jnp.floor(rows), jnp.floor(columns)
  down, right = (rows - top)[..., None], (columns - left)[..., None]
  # A border of zeros, to which all positions outside the image are clipped.
  width = width + 4
  padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))).reshape(-1, channels)
  row = jnp.clip(top, -2, height).astype(jnp.int32) + 2
  column = jnp.clip(left, -2, width - 4).astype(jnp.int32) + 2
  first = jnp.arange(batch)[:, None, None] * (height + 4) * width
  index = jax.lax.optimization_barrier(first + row * width + column)

  def pixel(offset: int) -> Array:
    return padded.at[index + offset].get(mode="promise_in_bounds")

  upper = (1 - right) * pixel(0) + right * pixel(1)
  lower = (1 - right) * pixel(width) + right * pixel(width + 1)
  return (1 - down) * upper + down * lower


def _inside(position: Array, size: int, border: Border) -> Array:
  """Positions along a side; those outside are mapped to the pixels that the border repeats there."""
  if border == "edge" or (border == "mirror" and size == 1):
    return jnp.clip(position, 0, size - 1)
  if border == "mirror":
    last = size - 1
    return last - jnp.abs(position % (2 * max(1, last)) - last)  # the edge itself is not repeated
  return position


def cutout(size: float) -> Augment:
  """Builds a black square hole, `size` times the shorter side, with a random centre.

  Not grey: D sees `2 x - 1`, and layer normalisation of a zero has a slope of a thousand, which would make
  up all of R1 and all of a virtual adversarial perturbation.

  References:
    DeVries & Taylor, 2017, https://arxiv.org/abs/1708.04552.
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    batch, height, width, _ = x.shape
    centre = jax.random.uniform(key, (2, batch, 1, 1)) * jnp.array([height, width]).reshape(2, 1, 1, 1)
    half = size * min(height, width) / 2
    v = jnp.arange(height)[None, :, None] + 0.5
    u = jnp.arange(width)[None, None, :] + 0.5
    hole = (jnp.abs(v - centre[0]) < half) & (jnp.abs(u - centre[1]) < half)
    return jnp.where(hole[..., None], 0.0, x)

  return transform


def chain(*augments: Augment) -> Augment:
  """Applies several augmentations in sequence."""

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    for key_one, augment in zip(jax.random.split(key, len(augments)), augments, strict=True):
      x = augment(key_one, x)
    return x

  return transform


def translate(share: float, *, border: Border = "zero") -> Augment:
  """Builds a shift by whole pixels, uniform up to `share` of each side: a padded random crop."""

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    batch, height, width, _ = x.shape
    most = jnp.array([[int(share * side + 1e-6)] for side in (height, width)])
    moved = jax.random.randint(key, (2, batch), -most, most + 1)
    rows = jnp.arange(height)[None, :] - moved[0][:, None]
    columns = jnp.arange(width)[None, :] - moved[1][:, None]
    rows, columns = _inside(rows, height, border), _inside(columns, width, border)
    x = jnp.take_along_axis(x, jnp.clip(rows, 0, height - 1)[:, :, None, None], axis=1)
    x = jnp.take_along_axis(x, jnp.clip(columns, 0, width - 1)[:, None, :, None], axis=2)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return jnp.where(inside[..., None], x, 0.0)

  return transform


def brightness_contrast(*, brightness: float = 0.0, contrast: float = 0.0) -> Augment:
  """Builds `clip((x - mean) c + mean + b)` with `b` in +-`brightness` and `c` in 1 +- `contrast`, uniform.

  The mean is that of each image. Clipped to [0, 1], so that D's input stays an image.
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    draws = jax.random.uniform(key, (2, len(x), 1, 1, 1), minval=-1.0, maxval=1.0)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.clip((x - mean) * (1 + contrast * draws[0]) + mean + brightness * draws[1], 0.0, 1.0)

  return transform


def saturation(most: float) -> Augment:
  """Builds `mean + (x - mean) s` with the mean of each pixel's colours and `s` uniform in 1 +- `most`.

  Preserves hue and mean. Clipped to [0, 1]. Grey images are unchanged.
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if x.shape[3] != 3:
      return x
    draws = jax.random.uniform(key, (len(x), 1, 1, 1), minval=-1.0, maxval=1.0)
    mean = _mean_colour(x)
    return jnp.clip(mean + (x - mean) * (1 + most * draws), 0.0, 1.0)

  return transform


def hue(degrees: float) -> Augment:
  """Builds a rotation of the colours about the grey axis r = g = b, by an angle uniform in +-`degrees`.

  A third of a turn maps red to green, as in every colour model. Linear in the pixels, so that grey, which
  has no hue, has a gradient. Clipped to [0, 1]. Grey images are unchanged.

  References:
    Karras et al., 2020, https://arxiv.org/abs/2006.06676, appendix B (hue and saturation as linear maps).
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if x.shape[3] != 3:
      return x
    angle = jnp.deg2rad(degrees) * jax.random.uniform(key, (len(x), 1, 1, 1), minval=-1.0, maxval=1.0)
    # Rodrigues' rotation: with the axis a = (1, 1, 1) / sqrt 3, a x v = (b - g, r - b, g - r) / sqrt 3.
    mean = _mean_colour(x)
    across = (jnp.roll(x, 1, axis=3) - jnp.roll(x, -1, axis=3)) / jnp.sqrt(3.0)
    return jnp.clip(mean + (x - mean) * jnp.cos(angle) + across * jnp.sin(angle), 0.0, 1.0)

  return transform


def _mean_colour(x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 1"]:
  # As a sum: XLA's CPU backend takes 16 times as long for the mean over an axis of three.
  return (x[..., :1] + x[..., 1:2] + x[..., 2:]) / 3


def flip(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Mirrors each image left to right with probability 1/2. Not for digits, see `Dataset.of_objects`."""
  mirrored = jax.random.bernoulli(key, shape=(len(x), 1, 1, 1))
  return jnp.where(mirrored, x[:, :, ::-1], x)


def quarter_turns(x: Float[Array, "b s s c"], turns: Int[Array, "b"]) -> Float[Array, "b s s c"]:
  """Rotates each image by its own number of quarter turns, 0 .. 3, counter-clockwise."""
  if x.shape[1] != x.shape[2]:
    raise ValueError(f"only square images can be turned by 90 degrees, not {x.shape[1]}x{x.shape[2]}")
  turned = jnp.stack([jnp.rot90(x, k, axes=(1, 2)) for k in range(4)])
  return turned[turns, jnp.arange(len(x))]


def sometimes(augment: Augment, prob: Float[Array, ""] | float) -> Augment:
  """Applies an augmentation to each image with probability `prob`."""

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    key_apply, key_which = jax.random.split(key)
    which = jax.random.bernoulli(key_which, prob, (len(x), 1, 1, 1))
    return jnp.where(which, augment(key_apply, x), x)

  return transform


def some(num: int, *augments: Augment) -> Augment:
  """Applies `num` of these to each image, chosen at random per image, in the given order.

  References:
    Cubuk et al., 2019, https://arxiv.org/abs/1909.13719 (RandAugment; strengths here are drawn as well).
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    key_which, *keys = jax.random.split(key, 1 + len(augments))
    draws = jax.random.uniform(key_which, (len(x), len(augments)))
    drawn = (draws[:, :, None] > draws[:, None, :]).sum(axis=2) < num
    for i, augment in enumerate(augments):
      x = jnp.where(drawn[:, i].reshape(-1, 1, 1, 1), augment(keys[i], x), x)
    return x

  return transform


@dataclass(frozen=True)
class Adaptive:
  """Transformations whose probability grows while D overfits and falls while it does not (ADA).

  D overfits when it is confident on real training images: `r = E sign(real logit - boundary)` over them is
  near 1, with the boundary of the adversarial loss; losses without one are refused. While an average of r
  is above `target`, the probability p of each transformation grows, by 1 over `num_images` real images;
  below it, p falls. p and the average live in `TrainState.aux`, so a resumed run continues with them.

  References:
    Karras et al., 2020, https://arxiv.org/abs/2006.06676, section 3 (r_t and its target of 0.6).
  """

  augments: tuple[Augment, ...]
  target: float = 0.6
  num_images: int = 500_000
  """Real images that D processes while p goes from 0 to 1."""
  horizon: int = 100
  """Steps over which r is averaged."""

  def init(self) -> dict[str, Float[Array, ""]]:
    """The initial state, for `TrainState.aux`: p = 0, r = 0."""
    return {"strength": jnp.zeros(()), "overfitting": jnp.zeros(())}

  def at(self, aux: dict[str, Float[Array, ""]]) -> Augment:
    """The augmentation at the current strength."""
    if "strength" not in aux:
      raise ValueError("adaptive augmentation needs its state: pass aux=augment.init() to steps.init_state")
    return chain(*(sometimes(augment, aux["strength"]) for augment in self.augments))

  def update(
    self, aux: dict[str, Float[Array, ""]], real_sign: Float[Array, ""], num_real: int
  ) -> dict[str, Float[Array, ""]]:
    """The state after an update of D on `num_real` real images with this mean sign."""
    overfitting = aux["overfitting"] + (real_sign - aux["overfitting"]) / self.horizon
    change = jnp.sign(overfitting - self.target) * num_real / self.num_images
    return {"strength": jnp.clip(aux["strength"] + change, 0.0, 1.0), "overfitting": overfitting}
