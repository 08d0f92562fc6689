"""The peers compute what we compute: else the race is not fair."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import updates
from benchmarks.peers import plain_jax
from gan_jax import augment, data, steps
from gan_jax.types import ClassLatents

torch = pytest.importorskip("torch")

from benchmarks.peers import torch_gan  # noqa: E402

SHAPE = (28, 28, 1)


@dataclass(frozen=True)
class Fixed:
  """A generator whose latents are given, those of the training update of D and of G alike."""

  net: Any
  z: Any

  def __getattr__(self, name):
    return getattr(self.net, name)

  def __hash__(self):
    return id(self)

  def latents(self, key, num):
    return self.z


class Sgd:
  def __init__(self, params):
    self.params = params

  def step(self, grads, rate, correct_1, correct_2):
    torch._foreach_add_(self.params, grads, alpha=-0.1)


class Problem:
  """One update without anything random, on both sides from the same parameters."""

  def __init__(self, name, *, sgd):
    rng = np.random.default_rng(0)
    update = updates.make(name, SHAPE, 10, 8)
    if name == "conv_ssgan":
      update = dataclasses.replace(update, threshold=0.0, objective=certain(update))
    noise = {"noise_in": 0.0, "noise_hidden": 0.0} if hasattr(update.d, "noise_in") else {}
    rows, num = update.rows, update.rows.fake
    z = rng.standard_normal((num, update.g.latent_size), np.float32)
    y = rng.integers(0, 10, num) if getattr(update.g, "num_classes", 0) else None
    g = Fixed(update.g, z if y is None else ClassLatents(z, y))
    changes = {"augment": None, "strong": None, "weak": None, "d": update.d.clone(**noise), "g": g}
    if sgd:
      changes |= {"g_tx": optax.sgd(0.1), "d_tx": optax.sgd(0.1)}
    self.update = update = dataclasses.replace(update, **changes)
    images = lambda num: rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8)
    self.x = [images(rows.lab), images(rows.unl), images(rows.fake)]
    self.y = rng.integers(0, 10, rows.lab)
    self.data = data.DeviceData(self.x[0], self.y, images(50), images(0))
    self.state = update.init(jax.random.key(0), self.data)
    self.gan = torch_gan.Gan(update, self.state, self.data)
    self.gan.latents = lambda num: (torch.tensor(z), None if y is None else torch.tensor(y))
    if sgd:
      self.gan.d_opt, self.gan.g_opt = (Sgd(list(net.const.values())) for net in (self.gan.d, self.gan.g))

  def ours(self, num):
    """Metrics of the last of `num` updates, and the state after it."""
    step, state = jax.jit(self.update.step()), self.state
    batch = steps.Batch(
      *(data.to_float(self.x[0]), self.y), *(data.to_float(x) for x in self.x[1:])
    )
    for _ in range(num):
      state, metrics = step(state, batch)
    return metrics, state

  def theirs(self, num):
    x = [self.gan._images(x).float() / 255 for x in self.x]
    batch = x[0], torch.tensor(self.y), x[1], x[2]
    for i in range(num):
      metrics = self.gan.one(batch, self.gan.rows[i], due=i % self.update.penalty_every == 0)
    return metrics


def certain(update):
  """With a threshold of 0 and the whole weight, so that the consistency term is not zero from the start."""
  from gan_jax import objectives

  term = objectives.consistency(lambda key, x: x, threshold=0.0)
  return dataclasses.replace(update.objective, d={**update.objective.d, "consistency": (1.0, term)})


def assert_same_networks(problem, state, *, atol):
  for which in ("g", "d"):
    net = getattr(problem.gan, which)
    for tree, leaves in ((getattr(state, which).params, net.const), (state.ema[which], net.ema)):
      expected = torch_gan.convert(problem.update, which, tree)
      assert expected.keys() == leaves.keys()
      for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], atol=atol, err_msg=f"{which} {name}")


@pytest.mark.parametrize("name", updates.NAMES)
def test_one_sgd_update_is_ours(name):
  problem = Problem(name, sgd=True)
  before = {which: getattr(problem.gan, which).const for which in ("g", "d")}
  before = {which: {k: v.clone() for k, v in leaves.items()} for which, leaves in before.items()}
  metrics, state = problem.ours(1)
  theirs = problem.theirs(1)
  terms = {f"{net}/{k}" for net in ("d", "g") for k in ("loss", *getattr(problem.update.objective, net))}
  assert terms <= theirs.keys()
  assert set(metrics) - set(theirs) == {"d/update_norm", "g/update_norm"}
  for key, value in theirs.items():
    np.testing.assert_allclose(float(value), metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)
  assert all(abs(float(theirs[key])) > 1e-6 for key in terms)
  assert_same_networks(problem, state, atol=2e-6)
  for which, leaves in before.items():
    for name, leaf in leaves.items():  # the smallest change of a leaf is far above that tolerance
      assert abs(leaf - getattr(problem.gan, which).const[name]).max() > 2e-5, (which, name)
