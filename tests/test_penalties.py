import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import penalties

SHAPE = (5, 4, 3, 2)


def linear(w):
  """A critic `D(x) = <w, x>`, whose gradient is w everywhere."""
  return lambda x: (x * w[None]).sum(axis=(1, 2, 3))


def test_linear_critic_has_the_norm_of_its_weights(key):
  w, x = jax.random.normal(key, SHAPE[1:]), jax.random.uniform(key, SHAPE)
  r1 = penalties.squared_gradient_norm(linear(w), x)
  np.testing.assert_allclose(r1, np.full(5, jnp.square(w).sum()), rtol=1e-5)
  gp = penalties.wgan_gp(key, linear(w), x, 1 - x)
  np.testing.assert_allclose(gp, np.full(5, (jnp.linalg.norm(w) - 1) ** 2), rtol=1e-5)


def test_quadratic_critic_has_a_gradient_of_its_own_at_every_image(key):
  """`D(x) = |x|^2 / 2` has the gradient x."""
  x = jax.random.uniform(key, SHAPE)
  critic = lambda x: jnp.square(x).sum(axis=(1, 2, 3)) / 2
  expected = jnp.square(x).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(penalties.squared_gradient_norm(critic, x), expected, rtol=1e-5)


def test_gradient_in_the_parameters(key):
  """d |w|^2 / dw = 2 w, and d (|w| - 1)^2 / dw = 2 (1 - 1 / |w|) w."""
  w, x = jax.random.normal(key, SHAPE[1:]), jax.random.uniform(key, SHAPE)
  r1 = jax.grad(lambda w: penalties.squared_gradient_norm(linear(w), x).mean())(w)
  np.testing.assert_allclose(r1, 2 * w, rtol=1e-5)
  gp = jax.grad(lambda w: penalties.wgan_gp(key, linear(w), x, 1 - x).mean())(w)
  np.testing.assert_allclose(gp, 2 * (1 - 1 / jnp.linalg.norm(w)) * w, rtol=1e-4)


def test_interpolates_between_the_two_images_of_a_pair(key):
  """For `D(x) = sum(x^2) / 2` the gradient is the point itself: it lies on the line."""
  x_real, x_fake = jnp.zeros(SHAPE), jnp.ones(SHAPE)
  critic = lambda x: jnp.square(x).sum(axis=(1, 2, 3)) / 2
  share = 1 + jnp.sqrt(penalties.wgan_gp(key, critic, x_real, 3 * x_fake))
  share = np.asarray(share / (3 * np.sqrt(np.prod(SHAPE[1:]))))
  assert ((share > 0) & (share < 1)).all()
  assert len(set(share.tolist())) == 5
  # Uniform on [0, 1], by its first two moments within six standard errors.
  two = jnp.full((2000, 1, 1, 1), 2.0)
  share = np.asarray(jnp.sqrt(penalties.wgan_gp(key, critic, two, two + 1)) - 1)
  assert abs(share.mean() - 1 / 2) < 6 * np.sqrt(1 / 12 / 2000)
  assert abs((share**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / 2000)


@pytest.mark.parametrize("penalty", ["r1", "wgan_gp"])
def test_a_flat_critic_has_finite_gradients(penalty, key):
  w, x = jnp.zeros(SHAPE[1:]), jax.random.uniform(key, SHAPE)
  fn = {
    "r1": lambda w: penalties.squared_gradient_norm(linear(w), x).mean(),
    "wgan_gp": lambda w: penalties.wgan_gp(key, linear(w), x, 1 - x).mean(),
  }[penalty]
  assert np.isfinite(jax.grad(fn)(w)).all()
