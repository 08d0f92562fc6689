"""The peers compute what we compute: else the race is not fair."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import step_time, updates
from benchmarks.peers import plain_jax
from gan_jax import augment, data, objectives, steps
from gan_jax.types import ClassLatents

torch = pytest.importorskip("torch")

from benchmarks.peers import torch_gan  # noqa: E402

SHAPE = (28, 28, 1)


@dataclass(frozen=True, eq=False)
class Fixed:
  """A generator whose latents are given, those of the training update of D and of G alike."""

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
  """One update without anything random, on both sides from the same parameters."""

  def __init__(self, name, *, sgd, traced=False):
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
    self.gan = torch_gan.Gan(update, self.state, self.data, compiled=traced)
    self.gan.latents = lambda num: (torch.tensor(z), None if y is None else torch.tensor(y))
    if sgd:
      self.gan.d_opt, self.gan.g_opt = (Sgd(list(net.const.values())) for net in (self.gan.d, self.gan.g))

  def ours(self, num):
    """Metrics of the last of `num` updates, and the state after it."""
    step, state = jax.jit(self.update.step()), self.state
    batch = steps.Batch(*(data.to_float(self.x[0]), self.y), *(data.to_float(x) for x in self.x[1:]))
    for _ in range(num):
      state, metrics = step(state, batch)
    return metrics, state

  def theirs(self, num):
    x = [self.gan._images(x).float() / 255 for x in self.x]
    batch = x[0], torch.tensor(self.y), x[1], x[2]
    for i in range(num):
      scalars = self.gan.table[i].unbind() if self.gan.compiled else self.gan.rows[i]
      with torch.set_grad_enabled(not self.gan.compiled):
        metrics = self.gan.one(batch, scalars, due=i % self.update.penalty_every == 0)
    return metrics


def certain(update):
  """With a threshold of 0 and the whole weight, so that the consistency term is not zero from the start."""
  term = objectives.consistency(lambda key, x: x, threshold=0.0)
  return dataclasses.replace(update.objective, d={**update.objective.d, "consistency": (1.0, term)})


@pytest.mark.parametrize("name", updates.NAMES)
def test_one_sgd_update_is_ours(name):
  """SGD, because Adam hides a factor in the gradient. R1 is due."""
  problem = Problem(name, sgd=True)
  before = snapshot(problem.gan)
  metrics, state = problem.ours(1)
  theirs = problem.theirs(1)
  terms = {f"{net}/{k}" for net in ("d", "g") for k in ("loss", *getattr(problem.update.objective, net))}
  assert terms <= theirs.keys()
  assert set(metrics) - set(theirs) == {"d/update_norm", "g/update_norm"}
  for key, value in theirs.items():
    np.testing.assert_allclose(float(value), metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)
  assert all(abs(float(theirs[key])) > 1e-6 for key in terms)
  for which in ("g", "d"):
    net = getattr(problem.gan, which)
    for tree, leaves in ((getattr(state, which).params, net.const), (state.ema[which], net.ema)):
      expected = torch_gan.convert(problem.update, which, tree)
      assert expected.keys() == leaves.keys()
      for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], atol=2e-6, err_msg=f"{which} {name}")
        assert abs(leaf - before[which][name]).max() > 2e-5, (which, name)  # far above the tolerance


@pytest.fixture
def optimised():
  """As in a race. A ReLU that falls to the other side of zero by rounding moves a whole gradient, and the
  programs of the other tests, which are compiled in haste, round otherwise."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("name", ["feature_matching", "conditional_r1"])
def test_two_updates_with_the_recipes_own_adam(name, optimised):
  """Where a gradient is nearly zero Adam makes much of its rounding: so the whole move of each network.

  Traced is what the compiler is given: `torch.func`, Adam leaf by leaf, the table on the device. The second
  update is one without R1.
  """
  metrics, state = Problem(name, sgd=False).ours(2)
  for traced in (False, True):
    problem = Problem(name, sgd=False, traced=traced)
    before = snapshot(problem.gan)
    theirs = problem.theirs(2)
    np.testing.assert_allclose(float(theirs["d/loss"]), metrics["d/loss"], rtol=1e-3)
    for which in ("g", "d"):
      expected = torch_gan.convert(problem.update, which, getattr(state, which).params)
      leaves = (expected, getattr(problem.gan, which).const, before[which])
      ours, theirs_after, first = (
        np.concatenate([np.asarray(each[name]).ravel() for name in sorted(expected)]) for each in leaves
      )
      assert np.linalg.norm(theirs_after - ours) < 0.01 * np.linalg.norm(ours - first) != 0


def snapshot(gan):
  return {
    which: {name: leaf.clone() for name, leaf in getattr(gan, which).const.items()} for which in ("g", "d")
  }


def test_affine_maps_are_ours():
  """The same draws, on the mirrored image; with the shifts of the unmirrored one it is another map."""
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


def test_the_plain_way_takes_the_step(make_tiny):
  """Its batches are of the sizes asked for, and all of them of the data."""
  tiny = make_tiny()
  update = dataclasses.replace(
    updates.make("conv_ssgan", (8, 8, 1), 3, 8), g=tiny.g, d=tiny.d, objective=tiny.objective, **tiny.txs
  )
  batch = next(plain_jax.batches(update.rows, tiny.data, 0))
  assert [len(x) for x in (batch.x_lab, batch.y_lab, batch.x_unl, batch.x_unl_g)] == [6, 6, 8, 4]
  known = {
    x.tobytes(): y for x, y in zip(np.asarray(tiny.data.x_lab), np.asarray(tiny.data.y_lab), strict=True)
  }
  for x, y in zip(batch.x_lab, batch.y_lab, strict=True):
    assert known[data.to_bytes(x).tobytes()] == y
  gan = plain_jax.Gan(update, tiny.state(), tiny.data)
  gan.run(2)
  gan.synchronize()
  assert int(gan.state.step) == 2
  assert np.isfinite(gan.losses).all()
  assert len(gan.losses) == 2


def test_rows_grow_in_proportion():
  rows = lambda name, batch_size: dataclasses.astuple(updates.make(name, SHAPE, 10, batch_size).rows)
  assert rows("conv_ssgan", 128) == tuple(2 * num for num in rows("conv_ssgan", None))
  assert rows("article_gan", 32) == (0, 32, 32)
  assert rows("conditional_r1", 32) == (32, 0, 32)


def test_ratios_are_of_the_same_round_and_a_failure_is_a_line():
  found = {"rows": [1, 2, 3], "images": 6, "dataset": "digits", "note": "", "seconds_first": 1.0}
  found |= {"peak_memory_mb": 2.0, "memory_mb": 1.0, "device_memory_mb": None}
  found |= {"device": "cpu", "versions": {"python": "3", "jax": "0", "flax": "0"}, "commit": None}
  ours = step_time.Entry("ours", 1, rates=[10.0, 20.0, 60.0], found=found)
  peer = step_time.Entry("torch_eager", 1, rates=[5.0, 5.0, 20.0], found=found)
  broken = step_time.Entry("torch_compile", 1)
  broken.fail("no compiler")
  lines = [
    step_time.result(entry, [ours, peer, broken], "article_gan", None) for entry in (ours, peer, broken)
  ]
  assert lines[1]["ours_is_faster_by"] == {"median": 3.0, "smallest": 2.0, "largest": 4.0}
  assert "ours_is_faster_by" not in lines[0]
  assert lines[2]["not_run"] == "no compiler"
  assert "steps_per_second" not in lines[2]
  assert "| torch_compile | not run: no compiler |" in step_time.table(lines)


@pytest.mark.parametrize("flags", [["--pairs", "0"], ["--seconds", "nan"], ["--updates", "nothing"]])
def test_a_bad_flag_is_one_sentence(flags, capsys):
  with pytest.raises(SystemExit, match="2"):
    step_time.parse(flags)
  assert f"error: argument {flags[0]}: " in capsys.readouterr().err


def test_a_worker_that_fails_says_why():
  task = {"contender": "ours", "replicates": 1, "batch_size": None, "update": "article_gan"}
  with pytest.raises(step_time.WorkerError, match="is not a folder"):
    step_time.Worker(task | {"dataset": "mnist", "data_dir": None, "manual_dir": "nowhere"})
