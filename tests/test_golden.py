"""Golden steps, three of each method from a fixed key, and one method with everything at once."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL, WEAK, Consuming, Tiny, leaves_equal

from gan_jax import (
  augment,
  checkpoint,
  losses,
  objectives,
  steps,
  types,
)

GOLDEN = Path(__file__).parent / "golden" / "steps.json"


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
  hint = "if the change is meant: pytest -n 0 tests/test_golden.py --regenerate-golden"
  for t, metrics in golden[name].items():
    assert metrics.keys() == found[t].keys(), hint
    for metric, value in metrics.items():
      assert found[t][metric] == pytest.approx(value, rel=2e-3, abs=1e-5), (t, metric, hint)


# --- One method with everything: requested classes, a penalty, an auxiliary head, adaptive augmentation


@pytest.mark.parametrize("name", ["conditional", "conv"])
def test_everything_at_once_neither_traces_again_nor_changes_types(name):
  tiny, step, states, _ = three_steps(name)
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
  variables = states[3].averaged("g")
  expected = tiny.g.apply(variables, types.ClassLatents(latents.z, y), train=False)
  np.testing.assert_allclose(sample(variables, key, 3, y), expected, atol=1e-6)
  with pytest.raises(ValueError, match="not class-conditional"):
    steps.make_sampler(Tiny().g)(variables, key, 3, y)
