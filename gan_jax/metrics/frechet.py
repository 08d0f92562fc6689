"""The Fréchet distance between two sets of features, in float64 NumPy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gan_jax.types import InputError


class Moments(NamedTuple):
  """The moments of a set of features that the distance depends on."""

  mean: Float[np.ndarray, "f"]
  cov: Float[np.ndarray, "f f"]
  """The unbiased covariance."""
  n: int
  """Number of rows they were computed over."""


def moments(features: Float[np.ndarray, "n f"]) -> Moments:
  """Mean and covariance, in float64.

  Raises:
    InputError: fewer rows than `check_num_images` requires.
  """
  n, num_features = features.shape
  check_num_images(n, num_features)
  features = features.astype(np.float64)
  return Moments(features.mean(axis=0), np.cov(features, rowvar=False).reshape(2 * (num_features,)), n)


def check_num_images(n: int, num_features: int) -> None:
  """Raises `InputError` for fewer than `2 F` images."""
  if n < 2 * num_features:
    raise InputError(
      f"a Fréchet distance over {num_features} features needs at least {2 * num_features} images, not {n}:"
      " the covariance of fewer is mostly noise"
    )


def frechet_distance(a: Moments, b: Moments) -> float:
  """Squared Fréchet distance of two Gaussians, `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`.

  The last trace is that of `(S_a^(1/2) S_b S_a^(1/2))^(1/2)`, a symmetric matrix, so nothing is
  complex. It is computed as the sum of the singular values of `S_a^(1/2) S_b^(1/2)`, whose squares are
  the eigenvalues of the matrix under the root: this avoids taking the root of a rounding error.
  Covariances may be singular.

  Never negative, symmetric, zero for equal moments. It grows as the number of images falls, so compare
  only distances over equal numbers of images.

  References:
    Dowson & Landau, 1982, https://doi.org/10.1016/0047-259X(82)90077-X.
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500, equation 6.
  """
  cross = np.linalg.svd(_sqrt(a.cov) @ _sqrt(b.cov), compute_uv=False).sum()
  distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
  return max(0.0, float(distance))


def _sqrt(cov: Float[np.ndarray, "f f"]) -> Float[np.ndarray, "f f"]:
  """The square root of a symmetric matrix that is positive semi-definite up to rounding."""
  values, vectors = np.linalg.eigh(cov)
  return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
