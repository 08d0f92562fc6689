"""The peers compute what we compute: else the race is not fair."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import _recipes
from gan_jax import augment, data
from gan_jax.recipes import ssgan
from gan_jax.types import Batch, ClassLatents

torch = pytest.importorskip("torch")

from benchmarks.peers import torch_gan  # noqa: E402

SHAPE = (16, 18, 1)
"""D's convolutions of stride 2 see even and odd sides, and G's images are cropped."""
DATASET = dataclasses.replace(
  _recipes.random_images(18), x_train=_recipes.random_images(18).x_train[:, : SHAPE[0]]
)
NAMES = tuple(_recipes.HPARAMS)


@dataclass(frozen=True, eq=False)
class Fixed:
  """A generator with fixed latents, the same in D's and in G's update."""

  net: Any
  z: Any

  def __getattr__(self, name):
    return getattr(self.net, name)

  def latents(self, key, num):
    return self.z


class Sgd:
  def __init__(self, params):
    self.params = params

  def step(self, grads, rate, correct_1, correct_2):
    torch._foreach_add_(self.params, grads, alpha=-0.1)


class Problem:
  """Deterministic steps of both implementations from the same parameters; the networks are narrow."""

  def __init__(self, name, *, sgd):
    rng = np.random.default_rng(0)
    recipe = without_chance(_recipes.make(name, DATASET, 8))
    sizes = recipe.batch
    z = rng.standard_normal((sizes.generated, recipe.g.latent_size), np.float32)
    y = rng.integers(0, 10, sizes.generated) if recipe.g.num_classes else None
    changes = {"g": Fixed(recipe.g, z if y is None else ClassLatents(z, y))}
    if sgd:
      changes |= {"g_tx": optax.sgd(0.1), "d_tx": optax.sgd(0.1)}
    self.recipe = recipe = dataclasses.replace(recipe, **changes)
    self.latents = torch.tensor(z), None if y is None else torch.tensor(y)
    self.sgd = sgd
    images = lambda num: rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8)
    self.x = [images(num) for num in sizes]
    self.y = rng.integers(0, 10, sizes.labelled)
    self.images = data.DeviceData.from_arrays(self.x[0], self.y, images(50))
    self.state = recipe.init_state(jax.random.key(0), self.images)

  def ours(self, num):
    """Metrics of the last of `num` steps, and the state after it."""
    step, state = jax.jit(self.recipe.make_step()), self.state
    x_lab, x_unl, x_unl_g = map(data.to_float, self.x)
    batch = Batch(x_lab, self.y, x_unl, x_unl_g, num_generated=len(x_unl_g))
    for _ in range(num):
      state, metrics = step(state, batch)
    return metrics, state

  def theirs(self, num, *, traced=False):
    """The same for the peer, and the parameters before."""
    gan = torch_gan.Gan(self.recipe, self.state, self.images, compiled=traced)
    gan.latents = lambda num: self.latents
    if self.sgd:
      gan.d_opt, gan.g_opt = (Sgd(list(net.const.values())) for net in (gan.d, gan.g))
    before = {
      which: {name: leaf.clone() for name, leaf in getattr(gan, which).const.items()}
      for which in ("g", "d")
    }
    x = [gan._images(x).float() / 255 for x in self.x]
    batch = x[0], torch.tensor(self.y), x[1], x[2]
    for i in range(num):
      scalars = gan.table[i].unbind() if traced else gan.rows[i]
      with torch.set_grad_enabled(not traced):
        metrics = gan.one(batch, scalars, due=i % gan.penalty_every == 0)
    return metrics, gan, before


def without_chance(recipe):
  """The recipe without augmentation and noise, and with narrow networks.

  With threshold 0 and full weight, the consistency term is nonzero from the start.
  """
  if isinstance(recipe.hparams, ssgan.Hparams):
    hparams = dataclasses.replace(recipe.hparams, strong=None, weak=None, threshold=0.0)
    recipe = ssgan.build(hparams, SHAPE, 10)
    d = recipe.objective.d
    certain = {name: (1.0, term) for name, (_, term) in d.items() if name == "consistency"}
    recipe = dataclasses.replace(
      recipe, objective=dataclasses.replace(recipe.objective, d={**d, **certain})
    )
  g, d = recipe.g, recipe.d
  if hasattr(d, "widths"):
    d = d.clone(noise_in=0.0, noise_hidden=0.0, widths=tuple(width // 8 for width in d.widths[-3:]))
    g = g.clone(widths=tuple(width // 8 for width in g.widths))
  else:
    g, d = g.clone(width=g.width // 4), d.clone(width=d.width // 4, num_features=d.num_features // 8)
  return dataclasses.replace(recipe, g=g, d=d)


@pytest.mark.parametrize("name", NAMES)
def test_one_sgd_step_is_ours(name):
  """SGD, because Adam hides a factor in the gradient. R1 is due."""
  problem = Problem(name, sgd=True)
  metrics, state = problem.ours(1)
  theirs, gan, before = problem.theirs(1)
  terms = {f"{net}/{k}" for net in ("d", "g") for k in ("loss", *getattr(problem.recipe.objective, net))}
  assert terms <= theirs.keys()
  assert set(metrics) - set(theirs) == {"d/update_norm", "g/update_norm"}
  for key, value in theirs.items():
    np.testing.assert_allclose(float(value), metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)
  assert all(abs(float(theirs[key])) > 1e-6 for key in terms)
  for which in ("g", "d"):
    net = getattr(gan, which)
    for tree, leaves in ((getattr(state, which).params, net.const), (state.ema[which], net.ema)):
      expected = torch_gan.convert(problem.recipe, which, tree)
      assert expected.keys() == leaves.keys()
      for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], atol=2e-6, err_msg=f"{which} {name}")
        assert abs(leaf - before[which][name]).max() > 2e-5, (which, name)  # far above the tolerance


@pytest.fixture
def optimised():
  """Compiles with all optimisations, as in a benchmark.

  A ReLU that rounding moves to the other side of zero changes a whole gradient, and the less optimised
  programs of the other tests round differently.
  """
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("name", ["feature_matching", "conditional_r1"])
def test_two_steps_with_the_recipes_own_adam(name, optimised):
  """Compares the total change of each network, because Adam amplifies the rounding of tiny gradients.

  Traced is what the compiler gets: `torch.func`, Adam leaf by leaf, the table on the device. The second
  step has no R1.
  """
  problem = Problem(name, sgd=False)
  metrics, state = problem.ours(2)
  for traced in (False, True):
    theirs, gan, before = problem.theirs(2, traced=traced)
    np.testing.assert_allclose(float(theirs["d/loss"]), metrics["d/loss"], rtol=1e-3)
    for which in ("g", "d"):
      expected = torch_gan.convert(problem.recipe, which, getattr(state, which).params)
      leaves = (expected, getattr(gan, which).const, before[which])
      ours, theirs_after, first = (
        np.concatenate([np.asarray(each[name]).ravel() for name in sorted(expected)]) for each in leaves
      )
      assert np.linalg.norm(theirs_after - ours) < 0.01 * np.linalg.norm(ours - first) != 0


def test_affine_maps_are_ours():
  """The same draws, on the mirrored image; with the shifts of the unmirrored image, the map differs."""
  ranges = {"shift": 0.1, "rotate": 25.0, "scale": 0.3, "shear": 0.3}
  x = np.random.default_rng(0).random((20, 28, 24, 1), np.float32)
  key = jax.random.key(1)
  ours = np.asarray(augment.affine(**ranges)(key, x))
  draws = torch.tensor(
    np.asarray(jax.random.uniform(key, (6, 20, 1, 1), minval=-1.0, maxval=1.0))[..., 0, 0]
  )

  def theirs(draws):
    mirrored = torch.tensor(x[:, ::-1, ::-1].transpose(0, 3, 1, 2).copy())
    return torch_gan.affine(mirrored, ranges, draws).numpy().transpose(0, 2, 3, 1)[:, ::-1, ::-1]

  signs = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0])[:, None]
  np.testing.assert_allclose(theirs(signs * draws), ours, atol=1e-4)
  assert abs(theirs(draws) - ours).max() > 0.1
