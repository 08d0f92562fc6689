import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gan_jax import kernels, provenance

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


@pytest.fixture(params=["whole", "chunked"])
def fast_conv(request, monkeypatch):
  """The convolution of a CPU: with the patches of all images together, and of one at a time."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  if request.param == "chunked":
    monkeypatch.setattr(kernels, "_LARGE", 0)
    monkeypatch.setattr(kernels, "_CHUNK", 0)  # raised to one image
  return request.param, kernels.conv


@pytest.mark.parametrize(("shape", "kernel", "strides"), CONVS)
def test_the_fast_convolution_has_the_gradients_of_the_stock_one(shape, kernel, strides, fast_conv):
  x, w = normal((3, *shape)), normal((*kernel, shape[-1], 4))
  name, fn = fast_conv
  fns = kernels.lax_conv, fn
  # The two differ in how they compute: ours is a matrix product, chunked in a loop.
  jaxprs = [str(jax.make_jaxpr(lambda x, w, fn=fn: fn(x, w, strides))(x, w)) for fn in fns]
  assert ["conv_general_dilated" in jaxpr for jaxpr in jaxprs] == [True, False]
  assert ("scan" in jaxprs[1]) == (name == "chunked")
  losses = [lambda x, w, fn=fn: jnp.sin(fn(x, w, strides)).sum() for fn in fns]
  both = jax.jit(lambda x, w: [jax.value_and_grad(loss, argnums=(0, 1))(x, w) for loss in losses])
  stock, ours = both(x, w)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stock, ours)


@pytest.mark.parametrize(("kernel", "channels"), [((3, 2), 2), ((2, 3), 1)])
def test_the_fast_convolution_has_the_stock_one_s_third_derivatives(kernel, channels, fast_conv):
  """All mixed ones together, with odd and even kernels, at strides 1 and 2. Penalties need second ones."""
  x, w = normal((2, 5, 6, channels)), normal((*kernel, channels, 2))

  def nest(fn):
    return lambda x, w: sum(jnp.sin(g).sum() for g in jax.grad(fn, argnums=(0, 1))(x, w))

  def third(conv):
    fn = nest(nest(lambda x, w: jnp.sin(conv(x, w, (1, 2))).sum()))
    return jax.jit(jax.grad(fn, argnums=(0, 1)))(x, w)

  for stock, ours in zip(third(kernels.lax_conv), third(fast_conv[1]), strict=True):
    np.testing.assert_allclose(ours, stock, rtol=1e-3, atol=1e-3 * np.abs(stock).max())


def test_operations_are_counted_as_written(fast_conv):
  """However a convolution is computed: a compiled loop counts once, and products include the padding."""
  x, w = jax.ShapeDtypeStruct((5, 8, 8, 3), "float32"), jax.ShapeDtypeStruct((3, 3, 3, 4), "float32")
  count = provenance.flops(lambda x, w: fast_conv[1](x, w, (1, 1)), x, w)
  pixels = 3 * 8 - 2  # that the 8 of a side see: 3 each, except for the outer two
  assert count == 2 * 5 * pixels**2 * 3 * 4


def test_large_patches_do_not_take_their_memory(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  x, w = jax.ShapeDtypeStruct((64, 32, 32, 16), "float32"), jax.ShapeDtypeStruct((3, 3, 16, 16), "float32")
  patches = 9 * 4 * 64 * 32 * 32 * 16
  assert patches > kernels._LARGE

  def memory():
    gradients = jax.jit(jax.grad(lambda x, w: jnp.square(kernels.conv(x, w, (1, 1))).sum(), argnums=(0, 1)))
    return gradients.lower(x, w).compile().memory_analysis().temp_size_in_bytes

  chunked = memory()
  monkeypatch.setattr(kernels, "_LARGE", patches)
  assert chunked < patches < memory()


def test_layer_norm_and_its_derivatives_are_those_of_the_stock_one():
  x, weights = normal((3, 4, 5)) + 3, normal((5, 4, 3)).T

  def nest(fn):
    return lambda x: (weights * jnp.square(jax.grad(fn)(x))).sum()

  def all_of(norm):
    fn = lambda x: (norm(x) * weights).sum()
    return norm(x), jax.grad(fn)(x), jax.grad(nest(fn))(x), jax.grad(nest(nest(fn)))(x)

  ours = all_of(kernels.layer_norm)
  with kernels.stock(True):
    stock = all_of(kernels.layer_norm)
  assert "custom_vjp" in str(jax.make_jaxpr(kernels.layer_norm)(x))
  for a, b in zip(ours, stock, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_layer_norm_of_nearly_constant_rows_is_exact():
  """The mean of the squares less the square of the mean would cancel."""
  x = 1000 + normal((2, 64))
  exact = x.astype(np.float64)
  exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
  np.testing.assert_allclose(kernels.layer_norm(x), exact, atol=2e-4)


def test_stock_operations_are_jax_s_own(key):
  """Also in functions that were traced without; counts, exports and comparisons rest on it."""

  @jax.jit
  def fn(x, w, key):
    x = kernels.layer_norm(kernels.conv(x, w, (1, 1)))
    return x + kernels.normal(key, x.shape)

  args = normal((2, 6, 6, 3)), normal((3, 3, 3, 8)), key
  fast = str(jax.make_jaxpr(fn)(*args))
  with kernels.stock(True):
    stock = str(jax.make_jaxpr(fn)(*args))
  own = "conv_general_dilated", "random_bits"
  assert [name in stock for name in own] == [True, True]
  assert [name in fast for name in own] == [False, False]
  assert ["custom_vjp" in jaxpr for jaxpr in (fast, stock)] == [True, False]


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
