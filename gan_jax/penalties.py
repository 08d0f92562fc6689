"""Gradient penalties, which limit the discriminator's slope. One value per example; the caller averages.

All take `real_logit_fn: images [B, H, W, C] -> real logit [B]`, in which every output must depend on
its own image alone (no batch normalisation): then the gradient of the sum over the batch contains the
gradient of every example.

Units: pixels are in [0, 1] here and in [-1, 1] in most papers, where a gradient is half as large and its
square a quarter. A published R1 or R2 weight gamma is `gamma / 4` here: 0.05 in R3GAN is 0.0125.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

RealLogitFn = Callable[[Float[Array, "b h w c"]], Float[Array, "b"]]


def squared_gradient_norm(real_logit_fn: RealLogitFn, x: Float[Array, "b h w c"]) -> Float[Array, "b"]:
  """`|grad_x D(x)|^2` at every image: R1 at real images, R2 at generated ones.

  Args:
    real_logit_fn: maps images to real logits `[B]`.
    x: images in [0, 1], `[B, H, W, C]`.

  Returns:
    `[B]`. The caller averages and multiplies by `gamma / 2`.

  References:
    Mescheder et al., 2018, https://arxiv.org/abs/1801.04406, equations 9 (R1) and 10 (R2).
  """
  gradient = jax.grad(lambda x: real_logit_fn(x).sum())(x)
  return jnp.square(gradient).sum(axis=tuple(range(1, x.ndim)))


def wgan_gp(
  key: Key[Array, ""],
  real_logit_fn: RealLogitFn,
  x_real: Float[Array, "b h w c"],
  x_fake: Float[Array, "b h w c"],
) -> Float[Array, "b"]:
  """`(|grad_x D(x)| - 1)^2` at a random point x between each real and each generated image.

  Args:
    key: consumed.
    real_logit_fn: maps images to real logits `[B]`.
    x_real: images in [0, 1].
    x_fake: as many generated images.

  Returns:
    `[B]`. The caller averages and multiplies by lambda, 10 in the paper.

  References:
    Gulrajani et al., 2017, https://arxiv.org/abs/1704.00028, equation 3.
  """
  chex.assert_equal_shape([x_real, x_fake])
  share = jax.random.uniform(key, (len(x_real),) + (1,) * (x_real.ndim - 1))
  squared = squared_gradient_norm(real_logit_fn, share * x_real + (1 - share) * x_fake)
  # The root has no gradient at zero: a tiny constant keeps it finite for a flat D.
  return jnp.square(jnp.sqrt(squared + 1e-12) - 1)
