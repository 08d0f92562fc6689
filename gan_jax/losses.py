"""Per-example losses from logits, and the three ways to read the K logits.

The discriminator returns K logits `l_1 .. l_K`; the logit of an extra class "fake" is fixed at zero,
without loss of generality, because a softmax over K + 1 logits does not change when a constant is
subtracted from all of them. With `Z = sum_k exp(l_k)`:

    p(real | x)        = Z / (Z + 1)           = sigmoid(logsumexp(l))
    p(y | x, real)     = exp(l_y) / Z          = softmax(l)_y
    p(y and real | x)  = exp(l_y) / (Z + 1)

With K = 1 the first line is the sigmoid of the only logit: the plain GAN.

Losses return one value per example unless they say otherwise; the caller takes the mean.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def real_logit(logits: Float[Array, "b k"]) -> Float[Array, "b"]:
  """The logit of "real", `logsumexp_k l_k`: positive where the discriminator classifies x as real.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 5: `D(x) = Z(x) / (Z(x) + 1)`.
  """
  return jax.nn.logsumexp(logits, axis=-1)


def class_logit(logits: Float[Array, "b k"], y: Int[Array, "b"]) -> Float[Array, "b"]:
  """The logit of "a real image of class y", `l_y`, for class-conditional GANs."""
  return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def known_real_logit(logits: Float[Array, "b k"], y: Int[Array, "b"]) -> Float[Array, "b"]:
  """Each image's real logit given its class, if known: `l_y`, or `logsumexp(l)` where y is -1."""
  return jnp.where(y < 0, real_logit(logits), class_logit(logits, jnp.maximum(y, 0)))


def class_probs(logits: Float[Array, "b k"]) -> Float[Array, "b k"]:
  """The classifier, `p(y | x, real) = softmax(l)`."""
  return jax.nn.softmax(logits, axis=-1)


def cross_entropy(logits: Float[Array, "b k"], y: Int[Array, "b"]) -> Float[Array, "b"]:
  """`-log p(y | x, real) = logsumexp(l) - l_y`. Labels outside 0 .. K-1 give NaN."""
  in_range = (y >= 0) & (y < logits.shape[-1])
  return jnp.where(in_range, real_logit(logits) - class_logit(logits, y), jnp.nan)


class Adversarial(NamedTuple):
  """A pair of losses on real logits: what D minimises on real and fake images, and what G minimises.

  Below, `r` and `f` are the real logits of real and generated images.
  """

  d: Callable[[Float[Array, "n"], Float[Array, "m"]], tuple[Float[Array, "n"], Float[Array, "m"]]]
  """(real, fake) real logits -> (loss of each real image, loss of each fake image)."""
  g: Callable[[Float[Array, "n"], Float[Array, "m"]], Float[Array, "m"]]
  """(real, fake) real logits -> loss of each fake image."""
  boundary: float | None = 0.0
  """The real logit at which D is undecided; None if the loss does not fix it."""


def _cross_entropy_d(real: Array, fake: Array) -> tuple[Array, Array]:
  return jax.nn.softplus(-real), jax.nn.softplus(fake)


min_max = Adversarial(d=_cross_entropy_d, g=lambda real, fake: -jax.nn.softplus(fake))
"""The minimax GAN loss: D minimises `softplus(-r) + softplus(f)`, G minimises `-softplus(f)`.

G's loss is `log(1 - p(real | G(z)))`: its gradient vanishes where D is confident, which is why
`non_saturating` is used in practice.

References:
  Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661, equation 1.
"""

non_saturating = Adversarial(d=_cross_entropy_d, g=lambda real, fake: jax.nn.softplus(-fake))
"""The GAN loss: D minimises `-log p(real|x) - log(1 - p(real|G(z)))`, G minimises `-log p(real|G(z))`.

In terms of logits, `-log sigmoid(r) = softplus(-r)` and `-log(1 - sigmoid(r)) = softplus(r)`, which
neither underflow nor overflow. On the real logit of K logits, D's half is the unsupervised loss of the
(K+1)-class discriminator: `-log p(real|x) = -logsumexp(l) + softplus(logsumexp(l))`.

References:
  Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661, section 3.
  Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 5 (K + 1 classes).
"""

least_squares = Adversarial(
  d=lambda real, fake: (jnp.square(real - 1) / 2, jnp.square(fake) / 2),
  g=lambda real, fake: jnp.square(fake - 1) / 2,
  boundary=0.5,
)
"""D minimises `(r - 1)^2 / 2 + f^2 / 2`, G minimises `(f - 1)^2 / 2`.

References:
  Mao et al., 2017, https://arxiv.org/abs/1611.04076, equation 9 (a = 0, b = c = 1).
"""

hinge = Adversarial(
  d=lambda real, fake: (jax.nn.relu(1 - real), jax.nn.relu(1 + fake)), g=lambda real, fake: -fake
)
"""D minimises `max(0, 1 - r) + max(0, 1 + f)`, G minimises `-f`.

References:
  Lim & Ye, 2017, https://arxiv.org/abs/1705.02894; Miyato et al., 2018,
  https://arxiv.org/abs/1802.05957, equations 16 and 17.
"""

wasserstein = Adversarial(d=lambda real, fake: (-real, fake), g=lambda real, fake: -fake, boundary=None)
"""D minimises `f - r`, G minimises `-f`: the Wasserstein-1 distance, if D is 1-Lipschitz.

The loss does not enforce this: use `penalties.wgan_gp` or spectral normalisation.

References:
  Arjovsky et al., 2017, https://arxiv.org/abs/1701.07875, equation 2 and algorithm 1.
"""


def _relativistic_d(real: Array, fake: Array) -> tuple[Array, Array]:
  chex.assert_equal_shape([real, fake])
  return jax.nn.softplus(fake - real), jnp.zeros_like(fake)


def _relativistic_g(real: Array, fake: Array) -> Array:
  chex.assert_equal_shape([real, fake])
  return jax.nn.softplus(real - fake)


relativistic = Adversarial(d=_relativistic_d, g=_relativistic_g, boundary=None)
"""Each generated image against one real image: D minimises `softplus(f - r)`, G `softplus(r - f)`.

The i-th real and the i-th generated image form a pair, so both batches must have the same size; the
pair's loss counts once, as the real image's. Without a penalty, training need not converge; with R1 and
R2 it does.

References:
  Jolicoeur-Martineau, 2018, https://arxiv.org/abs/1807.00734; Huang et al., 2024 (R3GAN),
  https://arxiv.org/abs/2501.05441, equation 2.
"""


def smooth(loss: Adversarial, label: float) -> Adversarial:
  """One-sided label smoothing: D's target probability of "real" for real images is `label`, not 1.

  D's loss on a real image becomes `label` times its loss as real plus `1 - label` times its loss as fake.
  The loss on generated images and G's loss are unchanged. For cross-entropy and squared losses; for least
  squares this moves the target from 1 to `label`. D is then undecided, between real and generated images
  of equal density, at a probability of `label / 2`.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 3.4.
  """

  def d(real: Array, fake: Array) -> tuple[Array, Array]:
    as_real, of_fake = loss.d(real, fake)
    _, as_fake = loss.d(real, real)
    return label * as_real + (1 - label) * as_fake, of_fake

  undecided: dict[float | None, float] = {0.0: math.log(label / (2 - label)), 0.5: label / 2}
  return loss._replace(d=d, boundary=undecided.get(loss.boundary))


def feature_matching(
  features_real: Float[Array, "n f"], features_fake: Float[Array, "m f"]
) -> Float[Array, "f"]:
  """Squared difference of the mean features, `(E_x f_j(x) - E_z f_j(G(z)))^2`, one value per feature.

  The only loss here that is per feature, not per example: it compares two batches. The paper's norm
  sums over features; its code, whose learning rate we follow, takes the mean, and so does our caller.

  References:
    Salimans et al., 2016, https://arxiv.org/abs/1606.03498, section 3.1.
  """
  return jnp.square(features_real.mean(axis=0) - features_fake.mean(axis=0))


def consistency(
  logits_weak: Float[Array, "b k"], logits_strong: Float[Array, "b k"], *, threshold: float
) -> Float[Array, "b"]:
  """Cross-entropy of a strongly augmented image against the class predicted for its weakly augmented copy.

  `1[max_k p_k >= threshold] * -log q(argmax_k p_k)` with `p = p(. | weak, real)`,
  `q = p(. | strong, real)`. No gradient flows into `p`. Examples below the threshold count as zeros,
  so the mean weights the term by the fraction of confident examples.

  References:
    Sohn et al., 2020, https://arxiv.org/abs/2001.07685 (FixMatch), equation 4.
  """
  probs = jax.lax.stop_gradient(class_probs(logits_weak))
  confident = probs.max(axis=-1) >= threshold
  return confident * cross_entropy(logits_strong, probs.argmax(axis=-1))


def adamatch(
  logits_lab: Float[Array, "n k"],
  logits_weak: Float[Array, "b k"],
  logits_strong: Float[Array, "b k"],
  *,
  threshold: float,
) -> Float[Array, "b"]:
  """Consistency with a relative threshold and distribution alignment.

  With `p = p(. | lab, real)` the predictions on labelled images and `t = p(. | weak, real)`:
  `t' = t (E p / E t)`, normalised, and `1[max_k t'_k >= c] * -log q(argmax_k t'_k)`,
  `c = threshold * E max_k p_k`, `q = p(. | strong, real)`. This matches the class frequencies of the
  pseudo-labels to those predicted on labelled images, and makes the threshold relative to the confidence on
  labelled images, because a penalty on D's gradient lowers both confidences. No gradient flows into `p` and
  `t`. Both means are those of the batch, so with few images fewer pass the threshold; the authors' code
  averages them over steps.

  Args:
    logits_lab: of the labelled images; if empty, the loss is that of `consistency`.
    logits_weak: of the weakly augmented unlabelled images.
    logits_strong: of the same images, strongly augmented.
    threshold: fraction of the confidence on labelled images, in [0, 1].

  References:
    Berthelot et al., 2021, https://arxiv.org/abs/2106.04732 (AdaMatch).
  """
  if not len(logits_lab):
    return consistency(logits_weak, logits_strong, threshold=threshold)
  labelled, weak = (jax.lax.stop_gradient(class_probs(a)) for a in (logits_lab, logits_weak))
  aligned = weak * (labelled.mean(axis=0) / (weak.mean(axis=0) + 1e-6))[None]
  aligned = aligned / aligned.sum(axis=-1, keepdims=True)
  confident = aligned.max(axis=-1) >= threshold * labelled.max(axis=-1).mean()
  return confident * cross_entropy(logits_strong, aligned.argmax(axis=-1))


def mutual_information(logits_a: Float[Array, "b k"], logits_b: Float[Array, "b k"]) -> Float[Array, ""]:
  """Mutual information of the predicted classes of two views of the same images, in nats, at most log K.

  `sum_kl P_kl log(P_kl / (P_k. P_.l))` with `P = (J + J') / 2`, `J = E p(. | a) p(. | b)'`. High if the
  predictions are confident, the same for both views, and balanced over classes.

  References:
    Ji et al., 2019, https://arxiv.org/abs/1807.06653 (IIC), section 3.1.
  """
  joint = class_probs(logits_a).T @ class_probs(logits_b) / len(logits_a)
  joint = jnp.maximum((joint + joint.T) / 2, 1e-8)
  marginal = joint.sum(axis=0)
  return (joint * (jnp.log(joint) - jnp.log(marginal)[:, None] - jnp.log(marginal)[None])).sum()


def entropy(logits: Float[Array, "b k"]) -> Float[Array, "b"]:
  """`H(p) = -sum_k p_k log p_k` of the classifier `p = p(. | x, real)`: low where it is confident.

  Minimising it on unlabelled images moves decision boundaries to regions without images.

  References:
    Grandvalet & Bengio, 2004, "Semi-supervised learning by entropy minimization", equation 6.
  """
  return jnp.sum(jax.nn.softmax(logits) * -jax.nn.log_softmax(logits), axis=-1)


def class_imbalance(
  logits: Float[Array, "b k"], prior: Float[Array, "k"] | None = None
) -> Float[Array, ""]:
  """Divergence of a batch's mean prediction from the class prior, `sum_k m_k log(m_k / prior_k)`.

  `m_k = E p_k` over the batch; in nats, 0 at the minimum.

  Args:
    logits: `[B, K]`.
    prior: frequencies of the classes, `[K]`, all above 0; None: uniform, `1 / K`.

  References:
    Springenberg, 2016, https://arxiv.org/abs/1511.06390, equation 5 (the entropy of the marginal: the
    uniform prior).
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  log_mean = jax.nn.logsumexp(log_probs, axis=0) - math.log(len(logits))  # finite, as is its gradient
  if prior is None:
    return (jnp.exp(log_mean) * log_mean).sum() + math.log(logits.shape[-1])
  return (jnp.exp(log_mean) * (log_mean - jnp.log(prior))).sum()


def divergence(logits_p: Float[Array, "b k"], logits_q: Float[Array, "b k"]) -> Float[Array, "b"]:
  """`KL(p || q) = sum_k p_k (log p_k - log q_k)` between two predictions of the classifier."""
  log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def high_density(
  features_real: Float[Array, "n f"], features_fake: Float[Array, "m f"], *, quantile: float
) -> Float[Array, "m"]:
  """How far generated images lie inside dense regions of the real ones: `max(log p(f) - tau, 0)`.

  `p` is a kernel density estimate over the features of the batch's real images,
  `log p(f) = log mean_i exp(-|f - f_i|^2 / 2 h^2)`, with the typical nearest-neighbour distance as its
  width: `h^2 = mean_i min_{j != i} |f_i - f_j|^2`. `tau` is a quantile of the real images' own densities,
  each a leave-one-out estimate. Scaling all features changes nothing. No gradient flows into the real ones.

  Args:
    features_real: at least three rows.
    features_fake: of the generated images.
    quantile: of the real densities, below which generated images are not penalised, in [0, 1].

  References:
    Dai et al., 2017, https://arxiv.org/abs/1705.09783, equation 7, where `p` is a PixelCNN++, pretrained on
    pixels and frozen. Ours needs no second model, and measures density in D's own feature space, where D's
    decision boundaries lie.
  """
  real = jax.lax.stop_gradient(features_real)
  others = ~jnp.eye(len(real), dtype=bool)
  distances = _squared_distances(real, real)
  width = jnp.min(distances, axis=-1, where=others, initial=jnp.inf).mean() + 1e-12

  def log_density(squared: Array, where: Array) -> Array:
    terms = jnp.where(where, -squared / (2 * width), -jnp.inf)
    return jax.nn.logsumexp(terms, axis=-1) - jnp.log(where.sum(axis=-1))

  fake = _squared_distances(features_fake, real)
  tau = jnp.quantile(log_density(distances, others), quantile)
  return jax.nn.relu(log_density(fake, jnp.ones_like(fake, bool)) - tau)


def _squared_distances(a: Float[Array, "n f"], b: Float[Array, "m f"]) -> Float[Array, "n m"]:
  return jnp.square(a[:, None] - b[None]).sum(axis=-1)
