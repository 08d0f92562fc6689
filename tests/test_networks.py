import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal

from gan_jax import networks, types
from gan_jax.types import InputError

SHAPES = [(8, 8, 1), (28, 13, 2), (64, 48, 3)]
PAIRS = [*(("conv", shape) for shape in SHAPES), ("mlp", SHAPES[1]), ("vgg", (16, 18, 3))]


def pair(kind, shape):
  if kind == "vgg":
    g, d = networks.make_pair("vgg", shape, num_logits=5)
    return g.clone(width=8), d.clone(width=8, num_features=16)
  if kind == "conv":
    return networks.ConvGenerator(shape), networks.ConvDiscriminator(5)
  return networks.MLPGenerator(shape), networks.MLPDiscriminator(5)


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_shapes_ranges_and_gradients(kind, shape, key):
  """From the latents to D's logits: the shapes fit, pixels are in [0, 1], every parameter matters."""
  g, d = pair(kind, shape)
  z = g.latents(key, 4)
  g_variables, x = jax.jit(lambda: (v := g.init(key, z, train=True), g.apply(v, z, train=True)))()
  assert x.shape == (4, *shape)
  assert x.dtype == jnp.float32
  assert 0 <= x.min() < x.max() <= 1
  d_variables = jax.jit(lambda x: d.init({"params": key, "noise": key}, x, train=True))(x)

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
  variables = jax.jit(lambda: d.init({"params": key, "noise": key}, x, train=True))()
  apply = jax.jit(
    lambda train, key: d.apply(variables, x, train=train, rngs={"noise": key})[0], static_argnums=0
  )
  calm, noisy = ([apply(train, jax.random.key(i)) for i in range(2)] for train in (False, True))
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


TINY_D = {
  "conv": networks.ConvDiscriminator(3, width=4, num_features=6),
  "mlp": networks.MLPDiscriminator(3, widths=(6,)),
}


def matrices(tree):
  """Kernels as matrices of inputs by outputs."""
  return [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


@pytest.mark.parametrize("norm", ["none", "weight", "spectral", "layer"])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_every_norm_of_a_discriminator(kind, norm, key):
  """Gradient reaches every parameter, and other variables change only in training."""
  d = TINY_D[kind].clone(norm=norm, num_aux=4)
  x = jax.random.uniform(key, (8, 8, 8, 1))

  @jax.jit
  def learn(params, state):
    def loss(params):
      out, moved = see(params, state, True)
      weights = [jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape) for a in out]
      return sum((w * a).sum() for w, a in zip(weights, out, strict=True)), moved

    return *jax.grad(loss, has_aux=True)(params), see(params, state, False)

  def see(params, state, train):
    variables = {"params": params, **state}
    return d.apply(variables, x, train=train, rngs={"noise": key}, mutable=list(state))

  state = jax.jit(lambda key: d.init({"params": key, "noise": key}, x, train=True))(key)
  params = state.pop("params")
  grads, moved, (out, calm) = learn(params, state)
  dead = [jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(grads) if not v.any()]
  assert dead == []
  assert [a.shape for a in out] == [(8, 3), (8, 6), (8, 4)]
  assert all(leaves_equal(calm, state))
  assert set(state) == {"weight": {"frozen"}, "spectral": {"batch_stats"}}.get(norm, set())
  changed = not all(leaves_equal(moved, state))
  assert changed == (norm == "spectral")
  if norm == "spectral":
    for _ in range(60):
      _, state, (out, _) = learn(params, state)
    sigmas = [np.linalg.svd(matrix, compute_uv=False)[0] for matrix in matrices(params)]
    stored = [v for p, v in jax.tree_util.tree_leaves_with_path(state) if "sigma" in str(p)]
    np.testing.assert_allclose(sorted(stored), sorted(sigmas), rtol=0.03)
    longer = jax.tree.map(lambda p: 7 * p if p.ndim > 1 else p, params)  # all biases are still zero
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), learn(longer, state)[2][0], out
    )


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_a_discriminator_has_no_statistics_of_the_batch(kind, key):
  """D's update passes real and generated images together, G's does not: D would be two functions."""
  x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
  with pytest.raises(InputError, match="use norm='layer'"):
    jax.eval_shape(lambda x: TINY_D[kind].clone(norm="shift").init(key, x, train=True), x)


@pytest.mark.parametrize("kernel", [None, 3])
def test_spectral_norm_makes_the_largest_singular_value_one(kernel, key):
  """Found by applying the layer to a basis of its inputs, after some power iterations."""
  layer = networks.Linear(5, kernel, norm="spectral", use_bias=False)
  # The centre pixel of a 3x3 image sees its whole neighbourhood, and so the whole kernel.
  basis = jnp.eye(7) if kernel is None else jnp.eye(18).reshape(18, 3, 3, 2)
  apply = jax.jit(lambda v: layer.apply(v, basis, train=True, mutable="batch_stats"))
  variables = layer.init(key, basis, train=True)
  for _ in range(60):
    y, moved = apply(variables)
    variables |= moved
  matrix = y if kernel is None else y[:, 1, 1]
  np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False)[0], 1, rtol=0.03)
  (kernel,) = matrices(variables["params"])
  np.testing.assert_allclose(matrix / matrix[0, 0], kernel / kernel[0, 0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_a_further_head_leaves_the_first_two_outputs_as_they_are(kind, key):
  x = jax.ShapeDtypeStruct((5, 8, 8, 1), jnp.float32)
  trees = []
  for num_aux in (0, 4):
    d = TINY_D[kind].clone(num_aux=num_aux)
    init = lambda x, d=d: d.init_with_output({"params": key, "noise": key}, x, train=True)
    trees.append(jax.eval_shape(init, x))
  (without, few), (with_aux, more) = trees
  assert with_aux[:2] == without
  assert with_aux[2].shape == (5, 4)
  more["params"].pop("aux_head")
  assert more["params"] == few["params"]


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_another_class_is_another_image(kind, key):
  """Also if the whole batch is of one class, as when a user asks for ten sevens."""
  g = {
    "conv": networks.ConvGenerator((8, 8, 1), width=4, latent_size=4, num_classes=3),
    "mlp": networks.MLPGenerator((8, 8, 1), widths=(8,), latent_size=4, num_classes=3),
  }[kind]
  latents = g.latents(key, 200)
  assert latents.z.shape == (200, 4)
  assert set(np.asarray(latents.y)) == {0, 1, 2}
  z = types.ClassLatents(latents.z[:5], jnp.zeros(5, jnp.int32))
  variables = jax.jit(lambda: g.init(key, z, train=True))()
  _, statistics = g.apply(variables, latents, train=False, mutable="statistics")
  variables |= statistics  # without these, the mean over a batch of one class would remove the class
  sample = jax.jit(lambda y: g.apply(variables, z._replace(y=y), train=False))
  zeros, ones, mixed = (sample(jnp.array(y)) for y in ([0] * 5, [1] * 5, [0, 1, 0, 1, 0]))
  assert (jnp.abs(zeros - ones).max(axis=(1, 2, 3)) > 1e-3).all()
  which = jnp.array([0, 1, 0, 1, 0]).reshape(5, 1, 1, 1)
  np.testing.assert_allclose(mixed, jnp.where(which, ones, zeros), atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_bfloat16_is_of_products_and_convolutions_alone(kind, key):
  """Forward and backward, except in the head; inputs and outputs are float32, and nearly the same."""
  if kind == "conv":
    g = networks.ConvGenerator((8, 8, 1), width=8)
    d = networks.ConvDiscriminator(5, width=8, num_features=8)
  else:
    g, d = networks.MLPGenerator((8, 8, 1), widths=(8,)), networks.MLPDiscriminator(5, widths=(8, 8))
  z = g.latents(key, 6)

  @jax.jit
  def init():
    g_variables = g.init(key, z, train=True)
    x = g.apply(g_variables, z, train=True)
    return g_variables, d.init({"params": key, "noise": key}, x, train=True)

  def loss(variables, g, d):
    x = g.apply(variables[0], z, train=True)
    logits, _ = d.apply(variables[1], x, train=False)
    return (logits.sum(axis=-1) ** 2).sum()

  variables, found = init(), {}
  for precision in ("float32", "bfloat16"):
    nets = g.clone(precision=precision), d.clone(precision=precision)
    lowered = jax.jit(jax.value_and_grad(lambda v, nets=nets: loss(v, *nets))).lower(variables)
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) -> ", lowered.as_text())
    found[precision] = lowered.compile()(variables), products
  (expected, products), (value, rounded) = found["float32"], found["bfloat16"]
  assert len(rounded) == len(products)
  assert not any("bf16" in types for types in products)
  means = re.compile(r", tensor<\d+x1xf32>$")  # of layer normalisation
  whole = [types for types in rounded if "bf16" not in types and not means.search(types)]
  assert len(whole) == 3  # the head's product and its two derivatives
  assert {a.dtype for a in jax.tree.leaves((variables, value))} == {jnp.dtype("float32")}
  assert not np.array_equal(*map(np.asarray, (value[0], expected[0])))
  a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (value, expected))
  assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_depth_to_space():
  x = jnp.arange(2 * 3 * 4 * 8.0).reshape(2, 3, 4, 8)
  y = networks.depth_to_space(x, 2)
  assert y.shape == (2, 6, 8, 2)
  for i, j, c in np.ndindex(6, 8, 2):
    channel = (i % 2) * 4 + (j % 2) * 2 + c
    np.testing.assert_array_equal(y[:, i, j, c], x[:, i // 2, j // 2, channel])


# --- Colour pictures


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize("shape", [(48, 64, 3), (128, 128, 3)])
def test_pairs_for_colour_at_every_size(name, shape, key):
  """Layers are top-level entries of the parameters; the remaining entries are the heads."""
  g, d = networks.make_pair(name, shape, num_logits=5, num_classes=2, num_aux=3)
  z = jax.eval_shape(lambda: g.latents(key, 2))
  x, _ = jax.eval_shape(lambda z: g.init_with_output(key, z, train=True), z)
  assert x.shape == (2, *shape)
  out, variables = jax.eval_shape(lambda x: d.init_with_output(key, x, train=True), x)
  assert [a.shape for a in out] == [(2, 5), (2, out[1].shape[1]), (2, 3)]
  assert {name for name in variables["params"] if "head" not in name} == set(d.layers(shape))


def test_the_pair_of_a_shape():
  found = [networks.suited(shape) for shape in ((32, 40, 3), (31, 40, 3), (64, 64, 1), (1, 9, 1))]
  assert found == ["vgg", "conv", "conv", "mlp"]


def test_a_residual_pair(key):
  """Images differ from each other, and gradient reaches every parameter."""
  g = networks.ResNetGenerator((8, 8, 3), width=4, latent_size=4, num_classes=2)
  d = networks.ResNetDiscriminator(3, width=4, depth=1)
  z = g.latents(key, 3)
  init = lambda: (g.init(key, z, train=True), d.init(key, jnp.zeros((1, 8, 8, 3)), train=True))
  g_params, d_params = jax.jit(init)()

  def loss(g_params, d_params, z):
    x = g.apply(g_params, z, train=True)
    logits, _ = d.apply(d_params, x, train=True)
    return (logits * jnp.arange(9.0).reshape(3, 3)).sum(), (x, logits)

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  grads, (x, logits) = run(g_params, d_params, z)
  dead = [jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(grads) if not v.any()]
  assert dead == []
  assert x.shape == (3, 8, 8, 3)
  assert 0 <= x.min() < x.max() <= 1
  others = jax.tree.map(lambda a: a.at[1:].set(0), z)
  _, (x_other, logits_other) = run(g_params, d_params, others)
  np.testing.assert_allclose(x_other[0], x[0], atol=1e-5)
  np.testing.assert_allclose(logits_other[0], logits[0], rtol=1e-4, atol=1e-5)
