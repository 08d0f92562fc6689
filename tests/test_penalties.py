import jax
import jax.numpy as jnp
import numpy as np

from gan_jax import penalties

SHAPE = (5, 4, 3, 2)


def weights_and_images():
  rng = np.random.default_rng(0)
  return rng.standard_normal(SHAPE[1:], np.float32), rng.random(SHAPE, np.float32)


def linear(w):
  """A critic `D(x) = <w, x>`, whose gradient is w everywhere."""
  return lambda x: (x * w[None]).sum(axis=(1, 2, 3))


def both(w, x, key):
  """R1 and the Wasserstein penalty of the linear critic."""
  gp = penalties.wgan_gp(key, linear(w), x, 1 - x)
  return penalties.squared_gradient_norm(linear(w), x), gp


def test_linear_critic_has_the_norm_of_its_weights(key):
  w, x = weights_and_images()
  r1, gp = jax.jit(both)(w, x, key)
  np.testing.assert_allclose(r1, np.full(5, np.square(w).sum()), rtol=1e-5)
  np.testing.assert_allclose(gp, np.full(5, (np.linalg.norm(w) - 1) ** 2), rtol=1e-5)


def test_quadratic_critic_has_a_gradient_of_its_own_at_every_image():
  """`D(x) = |x|^2 / 2` has the gradient x."""
  _, x = weights_and_images()
  critic = lambda x: jnp.square(x).sum(axis=(1, 2, 3)) / 2
  found = jax.jit(lambda x: penalties.squared_gradient_norm(critic, x))(x)
  np.testing.assert_allclose(found, np.square(x).sum(axis=(1, 2, 3)), rtol=1e-5)


def gradients(w, x, key):
  """Of the means of `both` in the weights."""
  return [jax.grad(lambda w, i=i: both(w, x, key)[i].mean())(w) for i in range(2)]


def test_gradient_in_the_parameters(key):
  """d |w|^2 / dw = 2 w, and d (|w| - 1)^2 / dw = 2 (1 - 1 / |w|) w."""
  w, x = weights_and_images()
  r1, gp = jax.jit(gradients)(w, x, key)
  np.testing.assert_allclose(r1, 2 * w, rtol=1e-5)
  np.testing.assert_allclose(gp, 2 * (1 - 1 / np.linalg.norm(w)) * w, rtol=1e-4)


def test_interpolates_between_the_two_images_of_a_pair(key):
  """For `D(x) = sum(x^2) / 2` the gradient is the point itself: it lies on the line."""
  x_real, x_fake = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
  critic = lambda x: jnp.square(x).sum(axis=(1, 2, 3)) / 2
  penalty = jax.jit(lambda x_real, x_fake: penalties.wgan_gp(key, critic, x_real, x_fake))
  share = 1 + np.sqrt(penalty(x_real, 3 * x_fake))
  share = share / (3 * np.sqrt(np.prod(SHAPE[1:])))
  assert ((share > 0) & (share < 1)).all()
  assert len(set(share.tolist())) == 5
  # Uniform on [0, 1], by its first two moments within six standard errors.
  two = np.full((2000, 1, 1, 1), np.float32(2))
  share = np.sqrt(penalty(two, two + 1)) - 1
  assert abs(share.mean() - 1 / 2) < 6 * np.sqrt(1 / 12 / 2000)
  assert abs((share**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / 2000)


def test_a_flat_critic_has_finite_gradients(key):
  w, x = weights_and_images()
  assert np.isfinite(jax.jit(gradients)(0 * w, x, key)).all()
