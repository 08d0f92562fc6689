"""Logits to per-example losses. The three readings of the K logits live here.

The discriminator gives K logits `l_1 .. l_K`; the logit of an extra class "fake" is fixed at zero,
which loses nothing because a softmax over K + 1 logits does not change when a constant is taken from
all of them. With `Z = sum_k exp(l_k)`:

    p(real | x)        = Z / (Z + 1)           = sigmoid(logsumexp(l))
    p(y | x, real)     = exp(l_y) / Z          = softmax(l)_y
    p(y and real | x)  = exp(l_y) / (Z + 1)

With K = 1 the first line is the sigmoid of the only logit: the plain GAN.

Every loss is element-wise and returns one value an example; the caller takes the mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def realness(logits: Float[Array, "b k"]) -> Float[Array, "b"]:
  """The logit of "real", `logsumexp_k l_k`: positive where the discriminator takes x for real.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 5: `D(x) = Z(x) / (Z(x) + 1)`.
  """
  return jax.nn.logsumexp(logits, axis=-1)


def class_realness(logits: Float[Array, "b k"], y: Int[Array, "b"]) -> Float[Array, "b"]:
  """The logit of "a real image of class y", `l_y`, for class-conditional GANs."""
  return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def class_probs(logits: Float[Array, "b k"]) -> Float[Array, "b k"]:
  """The classifier, `p(y | x, real) = softmax(l)`."""
  return jax.nn.softmax(logits, axis=-1)


def cross_entropy(logits: Float[Array, "b k"], y: Int[Array, "b"]) -> Float[Array, "b"]:
  """`-log p(y | x, real) = logsumexp(l) - l_y`. Labels outside 0 .. K-1 give NaN."""
  in_range = (y >= 0) & (y < logits.shape[-1])
  return jnp.where(in_range, realness(logits) - class_realness(logits, y), jnp.nan)


class Adversarial(NamedTuple):
  """A pair of losses on realness logits: what D minimises on real and fake images, and what G does."""

  d: Callable[[Float[Array, "n"], Float[Array, "m"]], tuple[Float[Array, "n"], Float[Array, "m"]]]
  """(real, fake) realness -> (loss of each real image, loss of each fake image)."""
  g: Callable[[Float[Array, "n"], Float[Array, "m"]], Float[Array, "m"]]
  """(real, fake) realness -> loss of each fake image."""


def _non_saturating_d(real, fake):
  return jax.nn.softplus(-real), jax.nn.softplus(fake)


def _non_saturating_g(real, fake):
  del real
  return jax.nn.softplus(-fake)


non_saturating = Adversarial(d=_non_saturating_d, g=_non_saturating_g)
"""The GAN loss: D minimises `-log p(real|x) - log(1 - p(real|G(z)))`, G minimises `-log p(real|G(z))`.

In logits `-log sigmoid(r) = softplus(-r)` and `-log(1 - sigmoid(r)) = softplus(r)`, which neither
under- nor overflow. On the realness of K logits, D's half is the unsupervised loss of the (K+1)-class
discriminator: `-log p(real|x) = -logsumexp(l) + softplus(logsumexp(l))`.

References:
  Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661, section 3.
  Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 5 (K + 1 classes).
"""


def feature_matching(
  features_real: Float[Array, "n f"], features_fake: Float[Array, "m f"]
) -> Float[Array, "f"]:
  """Squared difference of the mean features, `(E_x f_j(x) - E_z f_j(G(z)))^2`, one value a feature.

  The only loss here that is per feature, not per example: it compares two batches. The paper's norm
  sums over features; its code, whose learning rate we follow, takes the mean, and so does our caller.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 3.1.
  """
  return jnp.square(features_real.mean(axis=0) - features_fake.mean(axis=0))


def consistency(
  logits_weak: Float[Array, "b k"], logits_strong: Float[Array, "b k"], *, threshold: float
) -> Float[Array, "b"]:
  """Cross-entropy of a strongly augmented image against the class of its weakly augmented self.

  `1[max_k p_k >= threshold] * -log q(argmax_k p_k)` with `p = p(. | weak, real)`,
  `q = p(. | strong, real)`. No gradient flows into `p`. Examples below the threshold count as zeros,
  so the mean weighs the term by the share of confident examples.

  References:
    Sohn et al., 2020, https://arxiv.org/abs/2001.07685 (FixMatch), equation 4.
  """
  probs = jax.lax.stop_gradient(class_probs(logits_weak))
  confident = probs.max(axis=-1) >= threshold
  return confident * cross_entropy(logits_strong, probs.argmax(axis=-1))
