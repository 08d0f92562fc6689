import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import losses

LOGITS = jnp.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1.0, 4.0]])


def explicit_k_plus_one(logits):
  """The softmax over K + 1 logits of which the last, "fake", is zero."""
  return jax.nn.softmax(jnp.concatenate([logits, jnp.zeros((len(logits), 1))], axis=-1))


def test_the_three_readings_are_those_of_a_k_plus_one_softmax():
  p = explicit_k_plus_one(LOGITS)
  real = p[:, :3].sum(axis=-1)
  np.testing.assert_allclose(jax.nn.sigmoid(losses.realness(LOGITS)), real, rtol=1e-6)
  np.testing.assert_allclose(losses.class_probs(LOGITS), p[:, :3] / real[:, None], rtol=1e-6)
  y = jnp.array([2, 0, 1])
  joint = jnp.exp(losses.class_realness(LOGITS, y)) * p[:, 3]
  np.testing.assert_allclose(joint, p[jnp.arange(3), y], rtol=1e-6)


def test_k_plus_one_loss_is_the_gan_loss_on_realness():
  p = explicit_k_plus_one(LOGITS)
  real, fake = losses.non_saturating.d(losses.realness(LOGITS), losses.realness(LOGITS))
  np.testing.assert_allclose(real, -jnp.log(p[:, :3].sum(axis=-1)), rtol=1e-5)
  np.testing.assert_allclose(fake, -jnp.log(p[:, 3]), rtol=1e-5)


def test_one_class_is_the_plain_gan():
  r = jnp.array([-2.0, 0.0, 3.0])
  np.testing.assert_allclose(losses.realness(r[:, None]), r)
  real, fake = losses.non_saturating.d(r, r)
  np.testing.assert_allclose(real, -jnp.log(jax.nn.sigmoid(r)), rtol=1e-6)
  np.testing.assert_allclose(fake, -jnp.log(1 - jax.nn.sigmoid(r)), rtol=1e-6)
  np.testing.assert_allclose(losses.non_saturating.g(r, r), -jnp.log(jax.nn.sigmoid(r)), rtol=1e-6)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_losses_and_gradients_are_finite_far_out(value):
  y = jnp.array([1])

  def everything(logits):
    r = losses.realness(logits)
    real, fake = losses.non_saturating.d(r, r)
    kept = losses.consistency(logits, logits, threshold=0.5)
    return jnp.stack(
      [real, fake, losses.non_saturating.g(r, r), losses.cross_entropy(logits, y), kept]
    ).sum()

  loss, grad = jax.value_and_grad(everything)(jnp.array([[value, 0.0, 0.0]]))
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
  grads = jax.grad(lambda w, s: losses.consistency(w, s, threshold=0.9).sum(), argnums=(0, 1))(weak, strong)
  assert not grads[0].any()
  assert grads[1][0].any()
  assert not grads[1][1].any()
