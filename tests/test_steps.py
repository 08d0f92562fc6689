import dataclasses
import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Tiny, leaves_equal

from gan_jax import (
  augment,
  checkpoint,
  data,
  kernels,
  losses,
  networks,
  objectives,
  parallel,
  steps,
  terms,
  types,
)

GOLDEN = Path(__file__).parent / "golden" / "steps.json"
WEAK = augment.affine(shift=0.05)
FULL = objectives.with_class_balance(
  objectives.semi_supervised_gan(consistency_weight=1.0, weak=WEAK, threshold=0.2), 3.0
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

  grads = jax.jit(jax.grad(loss))(state.d.params)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.d.params, grads)
  np.testing.assert_allclose(metrics["d/loss"], loss(state.d.params), rtol=1e-5)
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


def test_a_second_call_neither_traces_nor_changes_types(make_tiny):
  tiny = make_tiny(objective=FULL)
  step = jax.jit(tiny.step(augment=WEAK))
  state, batch = tiny.state(), tiny.batch()
  after, _ = step(state, batch)
  types = lambda state: jax.tree.map(jax.typeof, state)
  assert types(after) == types(state)
  with jax.no_tracing():
    step(after, batch)


class Consuming:
  """A D that consumes its noise key, which Flax only folds: otherwise reuse would go unnoticed."""

  def __init__(self, net):
    self.net = net

  def apply(self, variables, x, *, rngs, **kwargs):
    return self.net.apply(variables, x + 0 * jax.random.uniform(rngs["noise"]), rngs=rngs, **kwargs)


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


def test_sampler_and_classifier_read_the_averages(tiny):
  state = tiny.state()
  other = state.replace(g=tiny.state().g.replace(params=jax.tree.map(jnp.zeros_like, state.g.params)))
  sample, key = jax.jit(steps.make_sampler(tiny.g), static_argnums=2), jax.random.key(3)
  x, same = (sample(steps.generator_variables(tiny.g, each), key, 5) for each in (state, other))
  np.testing.assert_array_equal(x, same)
  assert x.shape == (5, 8, 8, 1)
  classify = jax.jit(steps.make_classifier(tiny.d))
  logits, features = classify(state, tiny.batch().x_lab)
  assert (logits.shape, features.shape) == ((4, 3), (4, 8))
  other = state.replace(d=state.d.replace(params=jax.tree.map(jnp.zeros_like, state.d.params)))
  np.testing.assert_array_equal(classify(other, tiny.batch().x_lab)[0], logits)


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
  tiny.d = networks.ConvDiscriminator(1, width=4, num_features=8)
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


ADAPTIVE = augment.Adaptive((augment.translate(0.2), augment.brightness_contrast(brightness=0.2)))
# Fast enough that three steps with ten real images show it.
ADAPTIVE = dataclasses.replace(ADAPTIVE, num_images=40, horizon=1)


def method(network, objective, augment=None, d=None, g=None):
  tiny = Tiny(objective=objective, network=network)
  tiny.d, tiny.g = tiny.d.clone(**(d or {})), tiny.g.clone(**(g or {}))
  tiny.augment = augment
  return tiny


METHODS = {
  "conv": lambda: method("conv", FULL, WEAK),
  "mlp": lambda: method("mlp", FULL, WEAK),
  "r1": lambda: method(
    "conv", objectives.gan(penalty="r1", gamma=0.5, penalty_every=2), d={"norm": "none"}
  ),
  "wgan_gp": lambda: method(
    "mlp", objectives.gan(losses.wasserstein, penalty="wgan_gp", gamma=10.0), d={"norm": "layer"}
  ),
  "relativistic": lambda: method(
    "mlp", objectives.gan(losses.relativistic, penalty="r1_r2", gamma=0.5), d={"norm": "none"}
  ),
  "spectral": lambda: method("conv", objectives.gan(losses.hinge), d={"norm": "spectral"}),
  "conditional": lambda: method(
    "mlp",
    objectives.conditional_gan(penalty="r1", gamma=0.5, rotation_weight=1.0),
    ADAPTIVE,
    d={"num_aux": 4, "norm": "none", "noise_in": 0.0, "noise_hidden": 0.0},
    g={"num_classes": 3},
  ),
}


@functools.cache
def three_steps(name):
  """The problem, its compiled step, its first four states and three metrics."""
  tiny = METHODS[name]()
  aux = tiny.augment.init() if isinstance(tiny.augment, augment.Adaptive) else None
  step, state = jax.jit(tiny.step(augment=tiny.augment)), tiny.state(aux=aux)
  states, history = [state], []
  for t in (1, 2, 3):
    state, metrics = step(state, tiny.batch(t))
    states.append(state)
    history.append({name: float(value) for name, value in sorted(metrics.items())})
  return tiny, step, states, history


@pytest.mark.parametrize("name", METHODS)
def test_golden_steps(name, request):
  """The metrics of steps 1 and 3 at a fixed seed. They change only if the mathematics does."""
  history = three_steps(name)[-1]
  assert np.isfinite([list(metrics.values()) for metrics in history]).all()
  found = {"1": history[0], "3": history[2]}
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if request.config.getoption("--regenerate-golden"):
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({**golden, name: found}, indent=1, sort_keys=True) + "\n")
    return
  hint = "if the change is meant: pytest -n 0 tests/test_steps.py -k golden --regenerate-golden"
  for t, metrics in golden[name].items():
    assert metrics.keys() == found[t].keys(), hint
    for metric, value in metrics.items():
      assert found[t][metric] == pytest.approx(value, rel=2e-3, abs=1e-5), (t, metric, hint)


# --- One method with everything: requested classes, a penalty, an auxiliary head, adaptive augmentation


def test_everything_at_once_neither_traces_again_nor_changes_types():
  tiny, step, states, _ = three_steps("conditional")
  types_of = lambda state: jax.tree.map(jax.typeof, state)
  assert types_of(states[3]) == types_of(states[0])
  batch = tiny.batch(4)
  with jax.no_tracing():
    step(states[3], batch)
  for net in ("g", "d"):
    assert not any(leaves_equal(getattr(states[0], net).params, getattr(states[3], net).params))


def test_everything_at_once_uses_no_key_twice():
  """With a noisy D, so that the keys of its passes are used at all."""
  tiny, _, states, _ = three_steps("conditional")
  d = Consuming(tiny.d.clone(noise_in=0.3, noise_hidden=0.5))
  step = steps.make_step(tiny.g, d, **tiny.txs, objective=tiny.objective, augment=tiny.augment)
  with jax.debug_key_reuse(True):
    jax.jit(step).trace(states[0], tiny.batch(1))


def test_generated_images_are_judged_by_the_class_that_g_was_asked_for():
  """D's and G's adversarial terms of the first step, from the latents that the step draws."""
  tiny, _, (before, after, *_), (metrics, *_) = three_steps("conditional")
  batch = tiny.batch(1)
  _, key = steps.step_keys(before.key, before.step)
  key_d, key_g = jax.random.split(key)

  @jax.jit
  def outputs(d_params, aux, key_z, key_augment):
    """D's logits for labelled, unlabelled and generated images, and the requested classes."""
    latents = tiny.g.latents(key_z, 6)
    variables = {"params": before.g.params, **before.g.model_state}
    x_fake = tiny.g.apply(variables, latents, train=True)
    x_fake = ADAPTIVE.at(aux)(key_augment, x_fake)
    x = jnp.concatenate([batch.x_lab, batch.x_unl, x_fake])
    logits = tiny.d.apply({"params": d_params}, x, train=False)[0]
    return *jnp.split(logits, [4, 10]), latents.y

  softplus = lambda r: np.log1p(np.exp(r))
  # At strength zero, in D's update, the augmentation does nothing.
  lab, unl, fake, y = outputs(before.d.params, before.aux, jax.random.split(key_d, 5)[0], key_d)
  assert len(set(np.asarray(y))) > 1
  # With unlabelled images in the batch, D only decides whether an image is real.
  lse = lambda logits: np.log(np.exp(logits).sum(axis=1))
  expected = softplus(-lse(np.concatenate([lab, unl]))).mean() + softplus(lse(fake)).mean()
  np.testing.assert_allclose(metrics["d/adversarial"], expected, rtol=1e-4)
  # G faces the D that was just updated, with the augmentation at the updated strength.
  keys = jax.random.split(key_g, 6)
  *_, fake, y = outputs(after.d.params, after.aux, keys[0], jax.random.split(keys[4])[0])
  np.testing.assert_allclose(metrics["g/adversarial"], softplus(-fake[np.arange(6), y]).mean(), rtol=1e-4)
  expected = metrics["g/adversarial"] + 0.2 * metrics["g/rotation"]
  assert metrics["g/loss"] == pytest.approx(expected, rel=1e-5)


def test_adaptive_strength_lives_in_the_state(tmp_path):
  """It follows D's confidence at its rate, is among the metrics, and is saved with everything else."""
  *_, states, history = three_steps("conditional")
  strength = 0.0
  for state, metrics in zip(states[1:], history, strict=True):
    assert metrics["d/overfitting"] == pytest.approx(metrics["d/real_sign"])
    strength = min(1.0, max(0.0, strength + np.sign(metrics["d/real_sign"] - 0.6) * 10 / 40))
    assert metrics["d/strength"] == pytest.approx(strength)
    assert float(state.aux["strength"]) == metrics["d/strength"]
    assert float(state.aux["overfitting"]) == metrics["d/overfitting"]
  assert history[0]["d/strength"] > 0
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(states[3])
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    assert all(leaves_equal(checkpoints.restore(states[0]), states[3]))


def test_a_sampler_makes_the_classes_that_it_is_asked_for(key):
  tiny, _, states, _ = three_steps("conditional")
  sample = jax.jit(steps.make_sampler(tiny.g), static_argnums=2)
  y = jnp.array([2, 0, 1])
  latents = tiny.g.latents(key, 3)
  variables = {"params": states[3].ema["g"], **states[3].g.model_state}
  expected = tiny.g.apply(variables, types.ClassLatents(latents.z, y), train=False)
  np.testing.assert_allclose(sample(variables, key, 3, y), expected, atol=1e-6)
  with pytest.raises(ValueError, match="not class-conditional"):
    steps.make_sampler(Tiny().g)(variables, key, 3, y)


@pytest.mark.parametrize(
  ("pair", "num_classes"), [("mlp", 0), ("mlp", 3), ("conv", 0), ("conv_fine", 0), ("article", 0)]
)
def test_an_image_depends_on_its_latent_alone(pair, num_classes, key):
  """Also in a generator that is trained with batch statistics: it samples with stored ones."""
  g, _ = networks.make_pair(pair, (8, 8, 1), num_logits=3, num_classes=num_classes)
  initial = jax.jit(lambda: g.init(key, g.latents(key, 2), train=True))()
  assert "statistics" not in initial  # nor in what is trained and saved
  params, state = jax.tree.map(lambda p: 1.5 * p, initial.pop("params")), types.NetState({}, initial, {})
  state = types.TrainState(step=0, key=key, g=state, d=state, ema={"g": params})
  variables = steps.generator_variables(g, state)
  draw = jax.jit(lambda variables, z: g.apply(variables, z, train=False))
  latents = g.latents(key, 20)
  x = draw(variables, latents)
  one = lambda i: jax.tree.map(lambda z: z[i : i + 1], latents)
  one_by_one = jnp.concatenate([draw(variables, one(i)) for i in range(20)])
  np.testing.assert_allclose(one_by_one, x, atol=1e-6)
  assert x.std(axis=0).max() > 1e-3  # they differ from each other
  assert ("statistics" in variables) == (pair in ("mlp", "conv"))
  if "statistics" in variables:
    of_the_batch = {name: value for name, value in variables.items() if name != "statistics"}
    large = g.latents(jax.random.key(1), 4000)
    assert jnp.abs(draw(of_the_batch, large) - draw(variables, large)).mean() < 0.01
    assert jnp.abs(draw(of_the_batch, one(0)) - x[:1]).mean() > 0.05
    given = state.replace(g=state.g.replace(model_state={**initial, "statistics": variables["statistics"]}))
    given = given.replace(ema={"g": jax.tree.map(lambda p: p + 1, params)})
    kept = steps.generator_variables(g, given)
    assert all(leaves_equal(kept["statistics"], variables["statistics"]))


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
  _, expected = tiny.g.apply(variables, z, train=True, mutable=["batch_stats"])
  found = after.g.model_state
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, found, dict(expected))
  assert not any(leaves_equal(found, state.g.model_state))
  split = parallel.over_devices(tiny.recipe(), jax.devices()[:2])
  there = parallel.replicated((state, batch), jax.devices()[:2])
  elsewhere, _ = jax.jit(split.make_step())(*there)
  jax.tree.map(close, elsewhere.g.model_state, found)


# --- Inputs of the terms


class Recorder:
  """A network with a single parameter, which records the keys that it is called with."""

  def __init__(self, name, said, conditional=False):
    self.name, self.said, self.conditional = name, said, conditional

  def init(self, rngs, x, *, train):
    return {"params": {"w": jnp.ones(())}}

  def latents(self, key, num):
    self.said("latents", key)
    z = jnp.ones((num, 1))
    return types.ClassLatents(z, jnp.zeros(num, jnp.int32)) if self.conditional else z

  def apply(self, variables, x, *, train, rngs, mutable=()):
    self.said(f"noise of {self.name}", rngs["noise"])
    w = variables["params"]["w"]
    if self.name == "g":
      return w * jnp.ones((len(jax.tree.leaves(x)[0]), 2, 2, 1)), {}
    flat = w * x.reshape(len(x), 4)
    return (flat[:, :3], flat), {}


def recorded_step(
  objective, augmented=lambda key, x: x, sizes=(2, 3, 4), teacher=2.0, conditional=False, y_lab=None
):
  """Metrics of one step of recorders, and the keys given to each purpose: `[(name, key data)]`."""
  keys = []

  def said(name, key):
    jax.debug.callback(lambda data: keys.append((name, tuple(data.tolist()))), jax.random.key_data(key))

  def augment(key, x):
    said("augmentation", key)
    return augmented(key, x)

  g, d, tx = Recorder("g", said, conditional), Recorder("d", said), optax.sgd(0.1)
  x = jnp.linspace(0, 1, 10 * 4).reshape(10, 2, 2, 1)
  state = steps.init_state(jax.random.key(0), g, d, g_tx=tx, d_tx=tx, x_init=x)
  state = state.replace(ema={"g": state.ema["g"], "d": {"w": jnp.float32(teacher)}})
  n, u, m = sizes
  y_lab = jnp.arange(n) % 3 if y_lab is None else y_lab
  batch = types.Batch(x[:n], y_lab, x[n : n + u], x[-m:], num_generated=m)
  keys.clear()
  step = steps.make_step(g, d, g_tx=tx, d_tx=tx, objective=objective(said), augment=augment)
  _, metrics = jax.jit(step)(state, batch)
  jax.effects_barrier()
  return batch, metrics, keys


def one_term(term):
  """The term in both networks' objectives, beside others that move them."""

  def objective(said):
    own = {"term": (1.0, lambda outputs: term(outputs, said))}
    d, g = {"supervised": (1.0, terms.supervised)}, {"feature_matching": (1.0, terms.feature_matching)}
    return objectives.Objective(d=d | own, g=g | own)

  return objective


def test_every_purpose_has_a_key_of_its_own():
  """Latents, augmentation, noise of each pass, terms: no two get the same key in one step."""

  def term(outputs, said):
    said("term", outputs.key)
    return outputs.fake.logits.sum()

  _, _, keys = recorded_step(one_term(term))
  names = [name for name, _ in keys]
  assert {name: names.count(name) for name in set(names)} == {
    "latents": 2,
    "noise of g": 2,
    "augmentation": 4,  # one pass in D's update, three in G's
    "noise of d": 4,
    "term": 2,
  }
  assert len({key for _, key in keys}) == len(keys)


def test_the_teacher_has_the_averaged_parameters():
  """In D's update and in G's; the other function has the current ones."""
  x = jnp.full((5, 2, 2, 1), 0.5)
  ratio = lambda outputs, said: jax.lax.stop_gradient(
    outputs.teacher_fn(x, outputs.key)[0] / outputs.d_fn(x, outputs.key)[0]
  ).mean()
  _, metrics, _ = recorded_step(one_term(ratio), teacher=3.0)
  assert metrics["d/term"] == pytest.approx(3.0)
  assert metrics["g/term"] != pytest.approx(1.0)
  assert metrics["g/term"] > 2


def test_terms_see_images_before_and_after_augmentation():
  """D's update uses the batch's `x_unl`, G's uses `x_unl_g`."""
  sums = lambda outputs, said: outputs.unl.x_raw.sum() + 1000 * outputs.unl.x.sum()
  batch, metrics, _ = recorded_step(one_term(sums), augmented=lambda key, x: 0.01 * x)
  for net, x in (("d", batch.x_unl), ("g", batch.x_unl_g)):
    np.testing.assert_allclose(metrics[f"{net}/term"], 11 * x.sum(), rtol=1e-5)


def test_generated_images_are_as_many_as_the_batch_says(make_tiny):
  """Also if there is no real image to compare them with."""
  count = lambda outputs, said: jnp.float32(len(outputs.fake.x)) + 0 * outputs.fake.x.sum()
  _, metrics, _ = recorded_step(one_term(count), sizes=(2, 3, 5))
  assert (metrics["d/term"], metrics["g/term"]) == (5, 5)
  tiny = make_tiny(objective=objectives.gan())
  batch = tiny.batch().replace(x_unl_g=tiny.batch().x_unl[:0], num_generated=7)
  _, metrics = jax.eval_shape(tiny.step(), tiny.state(), batch)
  assert "g/adversarial" in metrics
  with pytest.raises(ValueError, match="num_generated above 0"):
    tiny.step()(tiny.state(), batch.replace(num_generated=0))


def test_with_all_labels_adas_signal_is_the_logit_of_the_class():
  """D's overfitting is measured on the logit that it is trained on: `l_y` if every image has a class."""
  y = jnp.array([0, 0, 2, 1])
  for unlabelled, conditional in ((0, True), (3, True), (0, False)):
    sizes = (4, unlabelled, 2)
    batch, metrics, _ = recorded_step(
      one_term(lambda outputs, said: 0.0 * outputs.fake.logits.sum()),
      augmented=lambda key, x: x - 0.1,
      sizes=sizes,
      conditional=conditional,
      y_lab=y,
    )
    logits = (np.concatenate([batch.x_lab, batch.x_unl]) - 0.1).reshape(4 + unlabelled, 4)[:, :3]
    lse = np.log(np.exp(logits).sum(axis=1))
    of_class = logits[np.arange(4), y]
    assert (np.sign(of_class) != np.sign(lse[:4])).any()
    real = of_class if conditional and not unlabelled else lse
    np.testing.assert_allclose(metrics["d/real_sign"], np.sign(real).mean(), atol=1e-6)
    unl_or_lab = real[4:] if unlabelled else real
    np.testing.assert_allclose(metrics["d/real_logit_real"], unl_or_lab.mean(), rtol=1e-4)


# --- Penalties through the whole step


def test_r1_update_by_hand(make_tiny, monkeypatch):
  """A D update of R1 alone, with SGD, against the stock convolution and one gradient per image."""
  tiny = make_tiny(
    tx=optax.sgd(1.0), objective=objectives.Objective(d={"r1": (0.7, terms.r1(labelled=True))})
  )
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


def test_a_ring_of_gaussians_is_covered():
  """K = 1, no labels, R1: eight modes in the plane, as images of two pixels; three seeds.

  Without the penalty the same networks lose half of the modes.
  """
  angles = 2 * jnp.pi * jnp.arange(8) / 8
  centres = 0.5 + 0.35 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)

  class G(nn.Module):
    def latents(self, key, num):
      return jax.random.normal(key, (num, 4))

    @nn.compact
    def __call__(self, z, *, train):
      for _ in range(2):
        z = nn.leaky_relu(nn.Dense(64)(z))
      return nn.sigmoid(nn.Dense(2)(z)).reshape(-1, 1, 2, 1)

  class D(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      h = 4 * (x.reshape(-1, 2) - 0.5)
      for _ in range(2):
        h = nn.leaky_relu(nn.Dense(64)(h))
      return nn.Dense(1)(h), h

  tx = optax.adam(2e-3, b1=0.0, b2=0.99)
  objective = objectives.gan(penalty="r1", gamma=0.05)
  step = steps.make_step(G(), D(), g_tx=tx, d_tx=tx, objective=objective, ema_decay=0.99)

  def sample_batch(key, data, i):
    key_mode, key_noise = jax.random.split(key)
    x = centres[jax.random.randint(key_mode, (128,), 0, 8)] + 0.01 * jax.random.normal(key_noise, (128, 2))
    x = x.reshape(-1, 1, 2, 1)
    y = jnp.zeros(0, jnp.int32)
    return types.Batch(x_lab=x[:0], y_lab=y, x_unl=x[:64], x_unl_g=x[64:], num_generated=64)

  @jax.jit
  @jax.vmap
  def train(key):
    state = steps.init_state(key, G(), D(), g_tx=tx, d_tx=tx, x_init=jnp.zeros((2, 1, 2, 1)))
    state, _ = steps.make_multi_step(step, sample_batch, max_steps=1500)(state, None, 1500)
    x = steps.make_sampler(G())({"params": state.ema["g"]}, jax.random.key(9), 1000).reshape(-1, 2)
    distances = jnp.linalg.norm(x[:, None] - centres[None], axis=-1)
    good = distances.min(axis=-1) < 0.05  # five standard deviations
    return jnp.zeros(8).at[distances.argmin(axis=-1)].add(good)

  counts = train(jax.random.split(jax.random.key(0), 3))
  assert counts.min() >= 25, counts  # of 125
  assert counts.sum(axis=1).min() >= 500, counts  # of 1000; a uniform G has 90


# --- The label audit


def audit(tiny, seen: list) -> objectives.Objective:
  """The supervised term, which also records each (image, label) pair that reaches it."""

  def term(outputs: terms.StepOutputs):
    jax.debug.callback(lambda x, y: seen.extend(zip(x, y, strict=True)), outputs.lab.x, outputs.lab.y)
    return terms.supervised(outputs)

  return dataclasses.replace(tiny.objective, d={**tiny.objective.d, "supervised": (1.0, term)})


def labels_that_reach_the_loss(tiny, device_data, num_steps=20) -> set[tuple[int, int]]:
  """(position in the training set, label), found by the pixels: no two images are the same."""
  seen = []
  step = steps.make_step(tiny.g, tiny.d, **tiny.txs, objective=audit(tiny, seen))
  multi_step = jax.jit(steps.make_multi_step(step, tiny.sample_batch, max_steps=num_steps))
  jax.block_until_ready(multi_step(tiny.state(), device_data, num_steps))
  jax.effects_barrier()
  position = {image.tobytes(): i for i, image in enumerate(tiny.dataset.x_train)}
  assert len(position) == len(tiny.dataset.x_train)
  pixels = lambda x: np.round(255 * np.asarray(x)).astype(np.uint8).tobytes()
  return {(position[pixels(x)], int(y)) for x, y in seen}


def test_label_audit(tiny):
  """Exactly the labels of the split reach the loss, each with its own image."""
  found = labels_that_reach_the_loss(tiny, tiny.data)
  assert found == {(i, int(tiny.dataset.y_train[i])) for i in tiny.split.indices}


def test_label_audit_sees_one_label_more(tiny):
  extra = next(i for i in range(60) if i not in tiny.split.indices)
  more = tiny.data.replace(
    x_lab=jnp.concatenate([tiny.data.x_lab, tiny.dataset.x_train[extra][None]]),
    y_lab=jnp.concatenate([tiny.data.y_lab, tiny.dataset.y_train[extra][None].astype(np.int32)]),
  )
  found = labels_that_reach_the_loss(tiny, more)
  assert len(found) == len(tiny.split.indices) + 1


def test_labels_outside_the_split_change_nothing(tiny):
  """The run is the same bit for bit if every label outside the split is wrong, another if one inside is."""
  multi_step = jax.jit(steps.make_multi_step(tiny.step(), tiny.sample_batch, max_steps=5))

  def train(y):
    return multi_step(
      tiny.state(), data.to_device(dataclasses.replace(tiny.dataset, y_train=y), tiny.split), 5
    )[0]

  y = tiny.dataset.y_train
  poisoned = np.full_like(y, -1)
  poisoned[list(tiny.split.indices)] = y[list(tiny.split.indices)]
  reference = train(y)
  assert all(leaves_equal(reference, train(poisoned)))
  flipped = y.copy()
  flipped[tiny.split.indices[0]] = (y[tiny.split.indices[0]] + 1) % 3
  assert not all(leaves_equal(reference, train(flipped)))
