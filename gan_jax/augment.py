"""Random image transformations, differentiable in the image, one draw an image.

All take `(key, x)` with `x` in [0, 1], `[B, H, W, C]`, consume the key and give the same shape and
range. Pixels from outside the image are zero, the background of the digit data sets.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gan_jax.types import Augment


def affine(*, shift: float = 0.0, rotate: float = 0.0, scale: float = 0.0, shear: float = 0.0) -> Augment:
  """Builds a random affine map with bilinear sampling, each parameter uniform in its range.

  Args:
    shift: largest shift along each axis, as a share of the side.
    rotate: largest rotation either way, in degrees.
    scale: largest change of size: each axis by a factor in `[1 / (1 + scale), 1 + scale]`, log-uniform.
    shear: largest horizontal shear, as the tangent of its angle.
  """

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    batch, height, width, _ = x.shape
    draws = jax.random.uniform(key, (6, batch, 1, 1), minval=-1.0, maxval=1.0)
    dy, dx = shift * height * draws[0], shift * width * draws[1]
    angle = jnp.deg2rad(rotate) * draws[2]
    zoom_y, zoom_x = (1 + scale) ** draws[3], (1 + scale) ** draws[4]
    # Where each output pixel comes from, relative to the centre: unshift, unrotate, unshear, unscale.
    v = jnp.arange(height)[None, :, None] - (height - 1) / 2 - dy
    u = jnp.arange(width)[None, None, :] - (width - 1) / 2 - dx
    u, v = jnp.cos(angle) * u + jnp.sin(angle) * v, jnp.cos(angle) * v - jnp.sin(angle) * u
    u = u + shear * draws[5] * v
    return sample(x, v / zoom_y + (height - 1) / 2, u / zoom_x + (width - 1) / 2)

  return transform


def sample(
  x: Float[Array, "b h w c"], rows: Float[Array, "b i j"], columns: Float[Array, "b i j"]
) -> Float[Array, "b i j c"]:
  """The image at fractional positions, bilinear between pixels; zero outside."""
  batch, height, width, channels = x.shape
  top, left = jnp.floor(rows), jnp.floor(columns)
  down, right = (rows - top)[..., None], (columns - left)[..., None]
  # A border of zeros, to which every position outside is clipped.
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(batch, -1, channels)

  def pixel(row: Array, column: Array) -> Array:
    row = jnp.clip(row, -1, height).astype(jnp.int32) + 1
    column = jnp.clip(column, -1, width).astype(jnp.int32) + 1
    index = (row * (width + 2) + column).reshape(batch, -1, 1)
    return jnp.take_along_axis(padded, index, axis=1).reshape(*rows.shape, channels)

  upper = (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
  lower = (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
  return (1 - down) * upper + down * lower


def cutout(size: float) -> Augment:
  """Builds a square hole of zeros of `size` times the shorter side, its centre anywhere.

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
  """Applies several one after the other."""

  def transform(key: Key[Array, ""], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    for key_one, augment in zip(jax.random.split(key, len(augments)), augments, strict=True):
      x = augment(key_one, x)
    return x

  return transform
