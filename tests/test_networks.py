import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import networks
from gan_jax.types import InputError

SHAPES = [(8, 8, 1), (20, 13, 2), (28, 28, 1), (32, 32, 3), (64, 48, 3)]


def pair(kind, shape):
  if kind == "conv":
    return networks.ConvGenerator(shape), networks.ConvDiscriminator(5, dropout=0.3)
  return networks.MLPGenerator(shape), networks.MLPDiscriminator(5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_shapes_ranges_and_gradients(kind, shape, key):
  """From the latents to D's logits: the shapes fit, pixels are in [0, 1], every parameter matters."""
  g, d = pair(kind, shape)
  z = g.latents(key, 4)
  g_variables = g.init(key, z, train=True)
  x = g.apply(g_variables, z, train=True)
  assert x.shape == (4, *shape)
  assert x.dtype == jnp.float32
  assert 0 <= x.min() < x.max() <= 1
  d_variables = d.init({"params": key, "noise": key}, x, train=True)

  def loss(g_params, d_params):
    x = g.apply(g_variables | {"params": g_params}, z, train=True)
    logits, features = d.apply(d_variables | {"params": d_params}, x, train=True, rngs={"noise": key})
    assert logits.shape == (4, 5)
    assert features.ndim == 2
    weights = jnp.arange(20.0).reshape(4, 5)
    return (weights * logits).sum() + jnp.square(features).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(g_variables["params"], d_variables["params"])
  dead = [jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(grads) if not v.any()]
  assert dead == []


def test_too_small_images_are_refused(key):
  with pytest.raises(InputError, match="7x9 are too small"):
    networks.ConvDiscriminator(3).init(key, jnp.zeros((1, 7, 9, 1)), train=False)


def test_noise_only_in_training(key):
  d = networks.MLPDiscriminator(3, widths=(16,))
  x = jax.random.uniform(key, (8, 4, 4, 1))
  variables = d.init({"params": key, "noise": key}, x, train=True)
  calm = [d.apply(variables, x, train=False)[0] for _ in range(2)]
  noisy = [d.apply(variables, x, train=True, rngs={"noise": jax.random.key(i)})[0] for i in range(2)]
  np.testing.assert_array_equal(*calm)
  assert not np.allclose(*noisy)


def test_weight_norm_starts_normalised_and_follows_its_equation(key):
  x = 3 + 5 * jax.random.normal(key, (200, 7))
  layer = networks.Linear(4, norm="weight")
  variables = layer.init(key, x, train=True)
  y = layer.apply(variables, x, train=True)
  np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-4)
  np.testing.assert_allclose(y.var(axis=0), 1, rtol=1e-4)
  v, b = variables["params"]["kernel"], variables["params"]["bias"]
  s = variables["frozen"]["scale"]
  expected = s[None] * (x @ v) / np.linalg.norm(v, axis=0)[None] + b[None]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  longer = {**variables, "params": {"kernel": 7 * v, "bias": b}}
  np.testing.assert_allclose(layer.apply(longer, x, train=True), y, rtol=1e-4, atol=1e-4)


CONVS = [
  ((9, 7, 2), (3, 3), (2, 2)),
  ((8, 8, 1), (5, 5), (2, 2)),
  ((6, 6, 3), (3, 3), (1, 1)),
  ((7, 8, 2), (4, 2), (3, 1)),
]


@pytest.mark.parametrize(("shape", "kernel", "strides"), CONVS)
def test_conv_in_loops_has_the_gradients_of_the_stock_convolution(shape, kernel, strides, key):
  x = jax.random.normal(key, (3, *shape))
  w = jax.random.normal(key, (*kernel, shape[-1], 4))
  fns = networks._lax_conv, networks._conv
  # The two differ in how they compute: only one has a rule of its own.
  jaxprs = [str(jax.make_jaxpr(lambda x, w, fn=fn: fn(x, w, strides))(x, w)) for fn in fns]
  assert ["custom_vjp" in jaxpr for jaxpr in jaxprs] == [False, True]
  stock, ours = (
    jax.value_and_grad(lambda x, w, fn=fn: jnp.sin(fn(x, w, strides)).sum(), argnums=(0, 1))(x, w)
    for fn in fns
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stock, ours)


def test_conv_in_loops_differentiates_twice(key):
  """Gradient penalties need it."""
  x, w = jax.random.normal(key, (2, 8, 8, 2)), jax.random.normal(key, (3, 3, 2, 4))

  def penalty(w, fn):
    grad = jax.grad(lambda x: jnp.sin(fn(x, w, (2, 2))).sum())(x)
    return jnp.square(grad).sum()

  stock, ours = (jax.grad(penalty)(w, fn) for fn in (networks._lax_conv, networks._conv))
  np.testing.assert_allclose(stock, ours, rtol=1e-3, atol=1e-3)


def test_depth_to_space():
  x = jnp.arange(2 * 3 * 4 * 8.0).reshape(2, 3, 4, 8)
  y = networks.depth_to_space(x, 2)
  assert y.shape == (2, 6, 8, 2)
  for i, j, c in np.ndindex(6, 8, 2):
    channel = (i % 2) * 4 + (j % 2) * 2 + c
    np.testing.assert_array_equal(y[:, i, j, c], x[:, i // 2, j // 2, channel])
