"""One step and many: what moves, what it costs to call again, and updates by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FULL, WEAK, Consuming, leaves_equal

from gan_jax import (
  checkpoint,
  kernels,
  losses,
  objectives,
  parallel,
  steps,
  terms,
)


def test_d_and_g_move_only_themselves(make_tiny):
  """A D update leaves G unchanged bit for bit, and the reverse."""
  only_d = objectives.Objective(d=FULL.d)
  only_g = objectives.Objective(d={}, g=FULL.g)
  for objective, moved, still in ((only_d, "d", "g"), (only_g, "g", "d")):
    tiny = make_tiny(objective=objective)
    before = tiny.state()
    after, metrics = jax.jit(tiny.step())(before, tiny.batch())
    assert all(leaves_equal(getattr(before, still), getattr(after, still)))
    params = [getattr(state, moved).params for state in (before, after)]
    assert not any(leaves_equal(*params))
    assert {name[:2] for name in metrics} == {f"{moved}/"}


def test_metrics_are_named_after_their_terms(make_tiny):
  tiny = make_tiny(objective=FULL)
  _, metrics = jax.jit(tiny.step())(tiny.state(), tiny.batch())
  d = "loss supervised adversarial consistency class_balance error grad_norm update_norm"
  d += " real_logit_real real_logit_fake real_sign"
  g = "loss feature_matching grad_norm update_norm"
  assert set(metrics) == {f"d/{k}" for k in d.split()} | {f"g/{k}" for k in g.split()}
  parts = metrics["d/supervised"] + 0.5 * metrics["d/adversarial"] + metrics["d/consistency"]
  parts += 3.0 * metrics["d/class_balance"]
  np.testing.assert_allclose(metrics["d/loss"], parts, rtol=1e-5)


def test_supervised_control_is_the_same_step_and_ignores_all_else(make_tiny):
  """Without unlabelled rows, only the labelled images reach D: a step by hand agrees."""
  tx = optax.sgd(0.1)
  tiny = make_tiny(objective=objectives.supervised_only(), tx=tx)
  state, batch = tiny.state(), tiny.batch()
  empty = batch.x_unl[:0]
  after, metrics = jax.jit(tiny.step())(state, batch.replace(x_unl=empty, x_unl_g=empty, num_generated=0))

  def loss(params):
    logits, _ = tiny.d.apply({"params": params}, batch.x_lab, train=False)
    return losses.cross_entropy(logits, batch.y_lab).mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(state.d.params)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.d.params, grads)
  np.testing.assert_allclose(metrics["d/loss"], value, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.d.params, expected)


def test_feature_matching_update_by_hand(make_tiny):
  """G's update against the D that was just updated, with SGD, from the latents that the step draws."""
  tiny = make_tiny(tx=optax.sgd(0.1))
  state, batch = tiny.state(), tiny.batch()
  after, _ = jax.jit(tiny.step())(state, batch)
  _, key = steps.step_keys(state.key, state.step)
  key_z = jax.random.split(jax.random.split(key)[1], 6)[0]
  z = tiny.g.latents(key_z, len(batch.x_unl_g))

  def loss(params):
    features = lambda x: tiny.d.apply({"params": after.d.params}, x, train=False)[1].mean(axis=0)
    x_fake = tiny.g.apply({"params": params}, z, train=True)
    return jnp.square(features(x_fake) - features(batch.x_unl_g)).mean()

  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.g.params, jax.jit(jax.grad(loss))(state.g.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.g.params, expected)


def test_no_key_is_used_twice(make_tiny):
  """With the MLP, whose noisy D uses every key."""
  tiny = make_tiny(objective=FULL, network="mlp")
  tiny.d = Consuming(tiny.d)
  multi_step = steps.make_multi_step(tiny.step(augment=WEAK), tiny.sample_batch, max_steps=2)
  state = make_tiny(objective=FULL, network="mlp").state()
  with jax.debug_key_reuse(True):
    jax.jit(multi_step).trace(state, tiny.data, 2)


FINE_TUNES = [("conv", objectives.supervised_only()), ("mlp", objectives.Objective(d=FULL.d))]


@pytest.mark.parametrize(("network", "objective"), FINE_TUNES)
def test_frozen_layers_do_not_move(network, objective, make_tiny, tmp_path):
  """Not even by weight decay; all others move. The optimizer's state survives a checkpoint."""
  tiny = make_tiny(network=network, objective=objective, tx=optax.adamw(1e-2))
  num = 2 if network == "conv" else 1
  frozen = tiny.d.layers((8, 8, 1))[:num]
  tiny.txs["d_tx"] = steps.freeze_layers(tiny.txs["d_tx"], frozen)
  before = tiny.state()
  after, _ = jax.jit(steps.make_multi_step(tiny.step(), tiny.sample_batch, max_steps=3))(
    before, tiny.data, 3
  )
  for name in before.d.params:
    still = leaves_equal(before.d.params[name], after.d.params[name])
    assert all(still) if name in frozen else not any(still), name
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(after)
    assert all(leaves_equal(checkpoints.restore(before), after))


def test_unfrozen_layers_are_trained_as_ever(tiny):
  plain = tiny.txs["d_tx"]
  assert steps.freeze_layers(plain, ()) is plain
  params = tiny.state().d.params
  grads = jax.tree.map(jnp.ones_like, params)
  found, expected = (
    tx.update(grads, tx.init(params), params)[0] for tx in (steps.freeze_layers(plain, ["Block_0"]), plain)
  )
  assert not any(leaves_equal(found.pop("Block_0"), expected.pop("Block_0")))
  assert all(leaves_equal(found, expected))


def test_many_steps_in_one_call_are_single_steps(make_tiny):
  """Three steps in one dispatch are three single steps on the batches that their keys draw."""
  tiny = make_tiny(objective=FULL)
  step = jax.jit(tiny.step(augment=WEAK))
  expected, history = tiny.state(), []
  for _ in range(3):
    key_batch, _ = steps.step_keys(expected.key, expected.step)
    expected, metrics = step(expected, tiny.sample_batch(key_batch, tiny.data))
    history.append(metrics["d/loss"])
  multi_step = jax.jit(steps.make_multi_step(tiny.step(augment=WEAK), tiny.sample_batch, max_steps=5))
  state, metrics = multi_step(tiny.state(), tiny.data, 3)
  assert int(state.step) == 3
  np.testing.assert_allclose(metrics["d/loss"][:3], jnp.stack(history), rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.d.params, expected.d.params)


def test_a_step_is_traced_once_for_all_lengths(tiny):
  """Tracing is a third of a start with a warm cache: the metrics' shapes and the loop share one trace."""
  traces, step = [], tiny.step()

  def counted(state, batch):
    traces.append(state)
    return step(state, batch)

  multi_step = jax.jit(steps.make_multi_step(counted, tiny.sample_batch, max_steps=5))
  for num in (1, 3):
    multi_step(tiny.state(), tiny.data, np.int32(num))
  assert len(traces) == 1


def test_ema_follows_its_equation(make_tiny):
  tiny = make_tiny()
  step = jax.jit(tiny.step(ema_decay=0.3))  # reached at t = 4
  state = tiny.state()
  for t in range(8):
    after, _ = step(state, tiny.batch(t))
    decay = min(0.3, (1 + t) / (10 + t))
    expected = jax.tree.map(lambda e, p, c=decay: c * e + (1 - c) * p, state.ema["d"], after.d.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.ema["d"], expected)
    state = after


def test_wrong_shapes_are_refused(tiny):
  batch = tiny.batch()
  with pytest.raises(AssertionError):
    tiny.step()(tiny.state(), batch.replace(x_unl=batch.x_unl[..., 0]))
  with pytest.raises(AssertionError):
    tiny.step()(tiny.state(), batch.replace(x_unl=jnp.zeros((6, 8, 9, 1))))


def test_plain_gan_is_the_case_of_one_class(make_tiny):
  """K = 1 and no labels: the same step is the plain GAN."""
  tiny = make_tiny(
    objective=objectives.Objective(
      d={"adversarial": (1.0, terms.adversarial_d(losses.non_saturating))},
      g={"adversarial": (1.0, terms.adversarial_g(losses.non_saturating))},
    )
  )
  tiny.d = tiny.d.clone(num_classes=1)
  batch = tiny.batch()
  batch = batch.replace(x_lab=batch.x_lab[:0], y_lab=batch.y_lab[:0])
  state, step = tiny.state(), jax.jit(tiny.step())
  for _ in range(3):
    before = state
    state, metrics = step(state, batch)
  real, fake = metrics["d/real_logit_real"], metrics["d/real_logit_fake"]
  assert np.isfinite([real, fake]).all()
  assert "d/error" not in metrics
  for net in ("g", "d"):
    assert not any(leaves_equal(getattr(before, net).params, getattr(state, net).params))


class Normalised(nn.Module):
  """A generator whose running averages change in training."""

  @staticmethod
  def latents(key, num):
    return jax.random.normal(key, (num, 4))

  @nn.compact
  def __call__(self, z, *, train):
    h = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(64)(z))
    return nn.sigmoid(h).reshape(-1, 8, 8, 1)


def test_other_variables_of_g_change_in_its_own_update_alone(make_tiny):
  """Not when D's update draws images; and on several devices as on one."""
  tiny = make_tiny()
  tiny.g = Normalised()
  state, batch = tiny.state(), tiny.batch()
  after, _ = jax.jit(tiny.step())(state, batch)
  key_g = jax.random.split(steps.step_keys(state.key, state.step)[1])[1]
  z = tiny.g.latents(jax.random.split(key_g, 6)[0], batch.num_generated)
  variables = {"params": state.g.params, **state.g.model_state}
  draw = jax.jit(lambda variables, z: tiny.g.apply(variables, z, train=True, mutable=["batch_stats"]))
  _, expected = draw(variables, z)
  found = after.g.model_state
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, found, dict(expected))
  assert not any(leaves_equal(found, state.g.model_state))
  split = parallel.over_devices(tiny.recipe(), jax.devices()[:2])
  there = parallel.replicated((state, batch), jax.devices()[:2])
  elsewhere, _ = jax.jit(split.make_step())(*there)
  jax.tree.map(close, elsewhere.g.model_state, found)


# --- Penalties through the whole step


def test_r1_update_by_hand(make_tiny, monkeypatch):
  """A D update of R1 alone, with SGD, against the stock convolution and one gradient per image."""
  objective = objectives.Objective(d={"r1": (0.7, terms.r1(labelled=True))})
  tiny = make_tiny(network="conv", tx=optax.sgd(1.0), objective=objective)
  tiny.d = tiny.d.clone(norm="none")
  state, batch = tiny.state(), tiny.batch()
  after, metrics = jax.jit(tiny.step())(state, batch)
  stock = []

  def conv(x, w, strides, *_, **__):
    stock.append(w.shape)
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  monkeypatch.setattr(kernels, "conv", conv)

  def loss(params):
    def real_logit(image):
      return jax.nn.logsumexp(tiny.d.apply({"params": params}, image[None], train=False)[0][0])

    slopes = jax.vmap(jax.grad(real_logit))(jnp.concatenate([batch.x_lab, batch.x_unl]))
    return jnp.square(slopes).sum(axis=(1, 2, 3)).mean() / 2

  value, grads = jax.jit(jax.value_and_grad(loss))(state.d.params)
  assert len(stock) == 2
  np.testing.assert_allclose(metrics["d/r1"], value, rtol=1e-4)
  largest = [jnp.abs(g).max() for g in jax.tree.leaves(grads) if g.ndim > 1]
  assert min(largest) > 1e-4
  expected = jax.tree.map(lambda p, g: p - 0.7 * g, state.d.params, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.d.params, expected
  )
