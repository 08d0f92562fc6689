import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gan_jax import kernels

CONVS = [
  ((9, 7, 2), (3, 3), (2, 2)),
  ((8, 8, 1), (5, 5), (2, 2)),
  ((6, 6, 3), (3, 3), (1, 1)),
  ((7, 8, 2), (4, 2), (3, 1)),
  ((7, 6, 5), (3, 3), (1, 1)),
  ((6, 8, 6), (4, 2), (1, 1)),
]


def normal(shape):
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("shape", "kernel", "strides"), CONVS)
def test_conv_in_loops_has_the_gradients_of_the_stock_convolution(shape, kernel, strides):
  x, w = normal((3, *shape)), normal((*kernel, shape[-1], 4))
  fns = kernels.lax_conv, kernels._conv
  # The two differ in how they compute: only one has a custom derivative rule.
  jaxprs = [str(jax.make_jaxpr(lambda x, w, fn=fn: fn(x, w, strides))(x, w)) for fn in fns]
  assert ["custom_vjp" in jaxpr for jaxpr in jaxprs] == [False, True]
  losses = [lambda x, w, fn=fn: jnp.sin(fn(x, w, strides)).sum() for fn in fns]
  both = jax.jit(lambda x, w: [jax.value_and_grad(loss, argnums=(0, 1))(x, w) for loss in losses])
  stock, ours = both(x, w)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stock, ours)


def test_conv_in_loops_differentiates_twice():
  """Gradient penalties need it."""
  x, w = normal((2, 8, 8, 2)), normal((3, 3, 2, 4))

  def penalty(w, fn):
    grad = jax.grad(lambda x: jnp.sin(fn(x, w, (2, 2))).sum())(x)
    return jnp.square(grad).sum()

  fns = kernels.lax_conv, kernels._conv
  stock, ours = jax.jit(lambda w: [jax.grad(penalty)(w, fn) for fn in fns])(w)
  np.testing.assert_allclose(stock, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kernel", "channels"), [((3, 2), 2), ((2, 3), 1)])
def test_conv_in_loops_has_the_stock_convolutions_third_derivatives(kernel, channels):
  """All mixed ones together, with odd and even kernels, each at strides 1 and 2."""
  x, w = normal((2, 5, 6, channels)), normal((*kernel, channels, 2))

  def nest(fn):
    return lambda x, w: sum(jnp.sin(g).sum() for g in jax.grad(fn, argnums=(0, 1))(x, w))

  def third(conv):
    fn = nest(nest(lambda x, w: jnp.sin(conv(x, w, (1, 2))).sum()))
    return jax.jit(jax.grad(fn, argnums=(0, 1)))(x, w)

  for stock, ours in zip(third(kernels.lax_conv), third(kernels._conv), strict=True):
    np.testing.assert_allclose(ours, stock, rtol=1e-3, atol=1e-3 * np.abs(stock).max())


@pytest.mark.parametrize(
  "kwargs", [{"kernel_dilation": 2}, {"padding": "VALID"}, {"feature_group_count": 2}]
)
def test_what_the_fast_convolution_does_not_support_is_refused(kwargs, key):
  layer = nn.Conv(8, (3, 3), conv_general_dilated=kernels.conv, **kwargs)
  with pytest.raises(ValueError, match="only convolutions with padding SAME"):
    layer.init(key, jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize("shape", [(7,), (300, 251), (2, 3, 4)])
def test_random_bits_are_those_of_jax(shape, key):
  ours, theirs = jax.jit(lambda key: (kernels._bits(key, shape), jax.random.bits(key, shape)))(key)
  np.testing.assert_array_equal(ours, theirs)


def test_normal_numbers_are_those_of_jax(key):
  # The two differ in how they compute: only JAX's has its own random-number primitives.
  fns = kernels.normal, jax.random.normal
  jaxprs = [str(jax.make_jaxpr(lambda key, fn=fn: fn(key, (1000, 1000)))(key)) for fn in fns]
  assert ["random_bits" in jaxpr for jaxpr in jaxprs] == [False, True]
  ours, theirs = map(np.asarray, jax.jit(lambda key: [fn(key, (1000, 1000)) for fn in fns])(key))
  # Beyond four standard deviations float32 itself has no more than three digits.
  inner = np.abs(theirs) < 4
  np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-3)
  np.testing.assert_allclose(ours, theirs, atol=0.05)
  assert np.abs(ours - theirs).mean() < 1e-5


def test_normal_numbers_of_another_generator_are_jaxs_own():
  key = jax.random.key(0, impl="rbg")
  np.testing.assert_array_equal(kernels.normal(key, (5,)), jax.random.normal(key, (5,)))


def test_the_quantile_is_that_of_the_normal_distribution():
  p = np.exp2(-np.linspace(1, 25, 1000)).astype(np.float32)
  exact = scipy.stats.norm.isf(p.astype(np.float64))
  np.testing.assert_allclose(kernels._upper_quantile(p), exact, atol=5e-6)
