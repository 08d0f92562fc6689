import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from gan_jax import losses

LOGITS = jnp.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1.0, 4.0]])


def grad(fn, **kwargs):
  """The compiled gradient: op by op it would be many small programs."""
  return jax.jit(jax.grad(fn, **kwargs))


def value_and_grad(fn, **kwargs):
  return jax.jit(jax.value_and_grad(fn, **kwargs))


def explicit_k_plus_one(logits):
  """The softmax over K + 1 logits of which the last, "fake", is zero."""
  return jax.nn.softmax(jnp.concatenate([logits, jnp.zeros((len(logits), 1))], axis=-1))


def test_the_three_readings_are_those_of_a_k_plus_one_softmax():
  p = explicit_k_plus_one(LOGITS)
  real = p[:, :3].sum(axis=-1)
  np.testing.assert_allclose(jax.nn.sigmoid(losses.real_logit(LOGITS)), real, rtol=1e-6)
  np.testing.assert_allclose(losses.class_probs(LOGITS), p[:, :3] / real[:, None], rtol=1e-6)
  y = jnp.array([2, 0, 1])
  joint = jnp.exp(losses.class_logit(LOGITS, y)) * p[:, 3]
  np.testing.assert_allclose(joint, p[jnp.arange(3), y], rtol=1e-6)


def test_k_plus_one_loss_is_the_gan_loss_on_realness():
  p = explicit_k_plus_one(LOGITS)
  real, fake = losses.non_saturating.d(losses.real_logit(LOGITS), losses.real_logit(LOGITS))
  np.testing.assert_allclose(real, -jnp.log(p[:, :3].sum(axis=-1)), rtol=1e-5)
  np.testing.assert_allclose(fake, -jnp.log(p[:, 3]), rtol=1e-5)


def test_one_class_is_the_plain_gan():
  r = jnp.array([-2.0, 0.0, 3.0])
  np.testing.assert_allclose(losses.real_logit(r[:, None]), r)
  real, fake = losses.non_saturating.d(r, r)
  np.testing.assert_allclose(real, -jnp.log(jax.nn.sigmoid(r)), rtol=1e-6)
  np.testing.assert_allclose(fake, -jnp.log(1 - jax.nn.sigmoid(r)), rtol=1e-6)
  np.testing.assert_allclose(losses.non_saturating.g(r, r), -jnp.log(jax.nn.sigmoid(r)), rtol=1e-6)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_losses_and_gradients_are_finite_far_out(value):
  y = jnp.array([1])

  def everything(logits):
    r = losses.real_logit(logits)
    real, fake = losses.non_saturating.d(r, r)
    kept = losses.consistency(logits, logits, threshold=0.5)
    return jnp.stack(
      [real, fake, losses.non_saturating.g(r, r), losses.cross_entropy(logits, y), kept]
    ).sum()

  loss, grad = value_and_grad(everything)(jnp.array([[value, 0.0, 0.0]]))
  assert np.isfinite(loss)
  assert np.isfinite(grad).all()


def test_cross_entropy_by_hand_and_outside_its_classes():
  y = jnp.array([2, 0, 1])
  expected = [-np.log(np.exp(row)[k] / np.exp(row).sum()) for row, k in zip(LOGITS, y, strict=True)]
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, y), expected, rtol=1e-5)
  assert np.isnan(losses.cross_entropy(LOGITS, jnp.array([3, 0, -1]))).tolist() == [True, False, True]


def test_feature_matching_compares_means():
  real, fake = jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
  np.testing.assert_allclose(losses.feature_matching(real, fake), [1.0, 1.0])
  np.testing.assert_allclose(losses.feature_matching(real, real[::-1]), [0.0, 0.0])


def test_consistency_counts_the_confident_and_stops_the_gradient_of_the_target():
  weak = jnp.array([[4.0, 0.0], [0.1, 0.0]])
  strong = jnp.array([[0.0, 1.0], [0.0, 1.0]])
  value = losses.consistency(weak, strong, threshold=0.9)
  np.testing.assert_allclose(value, [np.log(1 + np.e), 0.0], rtol=1e-6)
  grads = grad(lambda w, s: losses.consistency(w, s, threshold=0.9).sum(), argnums=(0, 1))(weak, strong)
  assert not grads[0].any()
  assert grads[1][0].any()
  assert not grads[1][1].any()


def test_imbalance_is_the_divergence_of_the_mean_prediction_from_uniform():
  probs = jax.nn.softmax(LOGITS, axis=-1).mean(axis=0)
  np.testing.assert_allclose(losses.class_imbalance(LOGITS), (probs * np.log(3 * probs)).sum(), rtol=1e-5)
  one_each = 200.0 * jnp.eye(4)
  np.testing.assert_allclose(losses.class_imbalance(one_each), 0.0, atol=1e-6)
  np.testing.assert_allclose(losses.class_imbalance(one_each[:1].repeat(3, axis=0)), np.log(4), rtol=1e-6)
  assert np.isfinite(grad(losses.class_imbalance)(one_each[:1])).all()  # though three probabilities are 0


def test_imbalance_is_the_divergence_of_the_mean_prediction_from_a_prior():
  probs = jax.nn.softmax(LOGITS, axis=-1).mean(axis=0)
  prior = jnp.array([0.7, 0.2, 0.1])
  expected = scipy.special.rel_entr(probs, prior).sum()
  np.testing.assert_allclose(losses.class_imbalance(LOGITS, prior), expected, rtol=1e-5)
  as_prior = jnp.log(prior)[None]
  np.testing.assert_allclose(losses.class_imbalance(as_prior, prior), 0.0, atol=1e-6)
  uniform = losses.class_imbalance(LOGITS, jnp.full(3, 1 / 3))
  np.testing.assert_allclose(uniform, losses.class_imbalance(LOGITS), rtol=1e-5)


R = np.array([-2.0, 0.0, 0.3, 1.5, 4.0])
F = np.array([1.0, -3.0, 0.0, 2.5, 0.7])
SIGMOID = lambda r: 1 / (1 + np.exp(-r))
# Each pair as in its paper: D's losses on real and on fake images, G's loss on fake ones.
PAIRS = {
  "min_max": (-np.log(SIGMOID(R)), -np.log(1 - SIGMOID(F)), np.log(1 - SIGMOID(F))),
  "non_saturating": (-np.log(SIGMOID(R)), -np.log(1 - SIGMOID(F)), -np.log(SIGMOID(F))),
  "least_squares": ((R - 1) ** 2 / 2, F**2 / 2, (F - 1) ** 2 / 2),
  "hinge": (np.maximum(0, 1 - R), np.maximum(0, 1 + F), -F),
  "wasserstein": (-R, F, -F),
  "relativistic": (-np.log(SIGMOID(R - F)), 0 * F, -np.log(SIGMOID(F - R))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_adversarial_pairs_by_hand(name):
  pair, (of_real, of_fake, of_g) = getattr(losses, name), PAIRS[name]
  found_real, found_fake = pair.d(jnp.array(R), jnp.array(F))
  np.testing.assert_allclose(found_real, of_real, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found_fake, of_fake, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(pair.g(jnp.array(R), jnp.array(F)), of_g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_adversarial_pairs_pull_apart_and_are_finite_far_out(name):
  """Descent of D raises the logit of real images and lowers that of fakes, G's raises it; all is finite."""
  pair, far = getattr(losses, name), jnp.array([-1e4, 0.0, 1e4])
  real, fake = (a.ravel() for a in jnp.meshgrid(far, far))
  d = lambda r, f: sum(loss.sum() for loss in pair.d(r, f))
  g = lambda r, f: pair.g(r, f).sum()
  for r, f in ((real, fake), (jnp.array(R), jnp.array(F))):
    (d_loss, (d_real, d_fake)) = value_and_grad(d, argnums=(0, 1))(r, f)
    g_loss, g_fake = value_and_grad(g, argnums=1)(r, f)
    assert np.isfinite(jnp.concatenate([d_real, d_fake, g_fake, jnp.stack([d_loss, g_loss])])).all()
  # Least squares pulls to its targets, 1 and 0; between them all losses agree on the signs.
  between = jnp.linspace(0.1, 0.9, 5)
  d_real, d_fake = grad(d, argnums=(0, 1))(between, between)
  assert (d_real < 0).all()
  assert (d_fake > 0).all()
  assert (grad(g, argnums=1)(between, between) < 0).all()
  if name != "least_squares":
    assert (grad(g, argnums=1)(jnp.array(R), jnp.array(F)) < 0).all()


def test_min_max_and_non_saturating_share_the_fixed_point():
  """The same D loss; the same gradient of G only where D is undecided (real logit 0)."""
  r = jnp.array([-3.0, 0.0, 3.0])
  for a, b in zip(losses.min_max.d(r, r), losses.non_saturating.d(r, r), strict=True):
    np.testing.assert_array_equal(a, b)
  saturating, not_so = (
    grad(lambda f, pair=pair: pair.g(f, f).sum())(r) for pair in (losses.min_max, losses.non_saturating)
  )
  np.testing.assert_allclose(saturating, -SIGMOID(np.array([-3.0, 0.0, 3.0])), rtol=1e-5)
  np.testing.assert_allclose(not_so, -SIGMOID(np.array([3.0, 0.0, -3.0])), rtol=1e-5)
  assert saturating[1] == not_so[1] == -0.5


def test_relativistic_depends_on_differences_only():
  r, f = jnp.array(R), jnp.array(F)
  for fn in (losses.relativistic.g, lambda r, f: losses.relativistic.d(r, f)[0]):
    np.testing.assert_allclose(fn(r + 7, f + 7), fn(r, f), rtol=1e-5)
    assert not np.allclose(fn(r + 7, f), fn(r, f))


def test_smoothing_is_a_softer_target():
  """Cross-entropy against 0.9; squares around 0.9, up to a constant. Fakes and G are unchanged."""
  r, f = jnp.array(R), jnp.array(F)
  soft = losses.smooth(losses.non_saturating, 0.9)
  expected = -0.9 * np.log(SIGMOID(R)) - 0.1 * np.log(1 - SIGMOID(R))
  np.testing.assert_allclose(soft.d(r, f)[0], expected, rtol=1e-5)
  np.testing.assert_allclose(soft.d(r, f)[1], losses.non_saturating.d(r, f)[1])
  np.testing.assert_allclose(soft.g(r, f), losses.non_saturating.g(r, f))
  # D's optimum is the target's log-odds.
  optimum = jnp.log(jnp.array([0.9 / 0.1]))
  np.testing.assert_allclose(grad(lambda r: soft.d(r, f)[0].sum())(optimum), 0, atol=1e-6)
  squares = losses.smooth(losses.least_squares, 0.9).d(r, f)[0]
  np.testing.assert_allclose(squares, (R - 0.9) ** 2 / 2 + 0.9 * 0.1 / 2, rtol=1e-5, atol=1e-6)


def test_known_realness_reads_the_class_where_it_is_known():
  y = jnp.array([2, -1, 0])
  expected = [2.0, np.log(3), -3.0]
  np.testing.assert_allclose(losses.known_real_logit(LOGITS, y), expected, rtol=1e-6)
  grads = grad(lambda logits: losses.known_real_logit(logits, y).sum())(LOGITS)
  np.testing.assert_allclose(grads, [[0, 0, 1], [1 / 3] * 3, [1, 0, 0]], rtol=1e-6)


def test_adamatch_by_hand():
  """Predictions biased to one class are realigned; the threshold is relative to confidence on labels."""
  lab = jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8]]))
  weak = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))  # mean 0.7, 0.3; aligned to 0.5, 0.5
  strong = jnp.log(jnp.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]))
  aligned = np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]) * (0.5 / np.array([0.7, 0.3]))
  aligned /= aligned.sum(axis=1, keepdims=True)
  assert aligned[1].argmax() == 1  # the pseudo-label itself has changed
  found = losses.adamatch(lab, weak, strong, threshold=0.9)
  np.testing.assert_allclose(found, [-np.log(0.7), 0.0, 0.0], rtol=1e-4)  # 0.72 is the threshold
  found = losses.adamatch(lab, weak, strong, threshold=0.7)
  np.testing.assert_allclose(found, [-np.log(0.7), -np.log(0.6), -np.log(0.5)], rtol=1e-4)
  loss = lambda lab, weak, strong: losses.adamatch(lab, weak, strong, threshold=0.7).sum()
  to_lab, to_weak, to_strong = grad(loss, argnums=(0, 1, 2))(lab, weak, strong)
  assert not to_lab.any()
  assert not to_weak.any()
  assert to_strong.any()
  none = losses.adamatch(lab[:0], weak, strong, threshold=0.9)
  np.testing.assert_array_equal(none, losses.consistency(weak, strong, threshold=0.9))


def test_mutual_information_is_scikit_learns():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 3, (2, 60))
  sure = lambda y: jnp.asarray(60.0 * np.eye(3)[y], jnp.float32)
  both = np.concatenate([a, b]), np.concatenate([b, a])  # the joint is made symmetric
  expected = sklearn.metrics.mutual_info_score(*both)
  np.testing.assert_allclose(losses.mutual_information(sure(a), sure(b)), expected, atol=1e-4)
  even = sure(np.arange(60) % 3)
  np.testing.assert_allclose(losses.mutual_information(even, even), np.log(3), rtol=1e-4)
  far = grad(lambda x: losses.mutual_information(x, even))(1e4 * even)
  assert np.isfinite(far).all()


def test_entropy_and_divergence_are_scipys():
  rng = np.random.default_rng(0)
  a, b = (3 * rng.normal(size=(20, 5)).astype(np.float32) for _ in range(2))
  p, q = (np.asarray(losses.class_probs(x), np.float64) for x in (a, b))
  np.testing.assert_allclose(losses.entropy(a), scipy.stats.entropy(p, axis=-1), rtol=1e-5)
  np.testing.assert_allclose(losses.divergence(a, b), scipy.stats.entropy(p, q, axis=-1), rtol=1e-5)
  sure = jnp.array([[1e4, 0.0], [-1e4, 1e4]])
  for loss in (losses.entropy(sure), losses.divergence(sure, sure)):
    np.testing.assert_array_equal(loss, [0.0, 0.0])
  finite = grad(lambda x: losses.entropy(x).sum() + losses.divergence(x, sure[:, ::-1]).sum())(sure)
  assert np.isfinite(finite).all()


def test_high_density_is_a_kernel_estimate_with_a_threshold():
  """Against scipy's kernel densities, leave-one-out for the real images."""
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(9, 2)), 2 * rng.normal(size=(50, 2))
  squared = np.square(real[:, None] - real[None]).sum(axis=-1) + np.diag(np.full(9, np.inf))
  width = squared.min(axis=1).mean()

  def log_p(at, data):
    terms = scipy.stats.multivariate_normal.pdf(at[None] - data, mean=[0, 0], cov=width * np.eye(2))
    return np.log(terms.mean())

  taus = [log_p(real[i], np.delete(real, i, axis=0)) for i in range(9)]
  expected = np.maximum([log_p(f, real) - np.quantile(taus, 0.3) for f in fake], 0)
  found = jax.jit(lambda a, b: losses.high_density(a, b, quantile=0.3))
  assert 5 < (expected > 0).sum() < 45
  np.testing.assert_allclose(found(real, fake), expected, atol=1e-4)
  np.testing.assert_allclose(found(100 * real, 100 * fake), expected, atol=1e-4)


def test_high_density_pushes_outwards_and_leaves_the_real_images_alone():
  real, fake = jnp.float32(np.random.default_rng(0).normal(size=(9, 2))), jnp.array([[0.1, 0.2]])
  loss = lambda real, fake: losses.high_density(real, fake, quantile=0.0).sum()
  grad_real, grad_fake = grad(loss, argnums=(0, 1))(real, fake)
  np.testing.assert_array_equal(grad_real, 0.0)
  assert loss(real, fake - 0.1 * grad_fake) < loss(real, fake)
  away = jnp.array([[30.0, 30.0]])
  assert loss(real, away) == 0
  np.testing.assert_array_equal(grad(loss, argnums=1)(real, away), 0.0)
