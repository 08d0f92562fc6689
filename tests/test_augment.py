import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import augment

STRONG = augment.chain(augment.affine(shift=0.1, rotate=20, scale=0.2, shear=0.2), augment.cutout(0.3))


def test_no_parameters_no_change(key):
  x = jax.random.uniform(key, (4, 9, 7, 2))
  np.testing.assert_allclose(augment.affine()(key, x), x, atol=1e-6)


def test_sampling_whole_pixels_is_a_shift(key):
  x = jax.random.uniform(key, (2, 6, 6, 1))
  rows, columns = jnp.meshgrid(jnp.arange(6.0), jnp.arange(6.0), indexing="ij")
  rows, columns = (jnp.broadcast_to(a, (2, 6, 6)) for a in (rows + 2, columns - 1))
  y = augment.sample(x, rows, columns)
  expected = np.zeros_like(x)
  expected[:, :4, 1:] = x[:, 2:, :5]
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_sampling_half_way_is_the_mean(key):
  x = jax.random.uniform(key, (1, 2, 2, 1))
  half = jnp.full((1, 1, 1), 0.5)
  np.testing.assert_allclose(augment.sample(x, half, half).squeeze(), x.mean(), rtol=1e-6)


def test_a_quarter_turn(key, monkeypatch):
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))
  x = jax.random.normal(key, (1, 5, 5, 1))
  np.testing.assert_allclose(augment.affine(rotate=90)(key, x)[0], np.rot90(x[0], k=-1), atol=1e-5)


def test_range_shape_and_one_draw_an_image(key):
  x = jnp.broadcast_to(jax.random.uniform(key, (1, 12, 12, 1)), (16, 12, 12, 1))
  y = STRONG(key, x)
  assert y.shape == x.shape
  assert y.min() >= 0
  assert y.max() <= 1
  assert len({image.tobytes() for image in np.asarray(y)}) == 16


def test_cutout_clears_at_most_its_square(key):
  y = augment.cutout(0.5)(key, jnp.ones((200, 10, 10, 1)))
  cleared = (y == 0).sum(axis=(1, 2, 3))
  assert cleared.max() == 25
  assert cleared.min() >= 4


@pytest.mark.parametrize("fn", [augment.affine(shift=0.1, rotate=20, scale=0.2, shear=0.2), STRONG])
def test_linear_in_the_image(fn, key):
  """So the gradient with respect to the image is exact: fn(k, x) - fn(k, 0) = J x."""
  x = jax.random.uniform(key, (3, 8, 8, 1))
  y, tangent = jax.jvp(lambda x: fn(key, x), (x,), (x,))
  np.testing.assert_allclose(y, tangent, atol=1e-5)
