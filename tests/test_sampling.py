"""Sampling and classifying with the averaged networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal

from gan_jax import (
  networks,
  probe,
  steps,
  types,
)


def test_sampler_and_classifier_read_the_averages(tiny):
  state = tiny.state()
  other = state.replace(g=tiny.state().g.replace(params=jax.tree.map(jnp.zeros_like, state.g.params)))
  sample, key = jax.jit(steps.make_sampler(tiny.g), static_argnums=2), jax.random.key(3)
  x, same = (sample(steps.with_statistics(tiny.g, each).averaged("g"), key, 5) for each in (state, other))
  np.testing.assert_array_equal(x, same)
  assert x.shape == (5, 8, 8, 1)
  classify = jax.jit(steps.make_classifier(tiny.d))
  logits, features = classify(state, tiny.batch().x_lab)
  assert (logits.shape, features.shape) == ((4, 3), (4, 8))
  other = state.replace(d=state.d.replace(params=jax.tree.map(jnp.zeros_like, state.d.params)))
  np.testing.assert_array_equal(classify(other, tiny.batch().x_lab)[0], logits)


def test_what_is_evaluated_uses_all_bits_of_float32(make_tiny):
  """By default accelerators use fewer: errors, predictions and exports would depend on the device."""
  tiny = make_tiny(network="conv")
  state, x = tiny.state(), tiny.batch().x_lab
  for fn in (steps.make_classifier(tiny.d), probe.make_layers(tiny.d, (8, 8, 1))):
    text = jax.jit(fn).lower(state, x).as_text()
    products = [
      line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line
    ]
    assert len(products) > 1
    assert all("HIGHEST" in line for line in products)
  text = jax.jit(tiny.recipe().make_step()).lower(state, tiny.batch()).as_text()
  assert "precision = [DEFAULT, DEFAULT]" in text  # training is fast


@pytest.mark.parametrize(
  ("pair", "num_classes"), [("mlp", 0), ("mlp", 3), ("conv", 0), ("conv_fine", 0), ("article", 0)]
)
def test_an_image_depends_on_its_latent_alone(pair, num_classes, key):
  """Also in a generator that is trained with batch statistics: it samples with stored ones."""
  g, _ = networks.make_pair(pair, (8, 8, 1), num_logits=3, num_classes=num_classes)
  g = g.clone(width=8) if pair in ("conv", "conv_fine") else g
  initial = jax.jit(lambda: g.init(key, g.latents(key, 2), train=True))()
  assert "statistics" not in initial  # nor in what is trained and saved
  params, state = jax.tree.map(lambda p: 1.5 * p, initial.pop("params")), types.NetState({}, initial, {})
  state = types.TrainState(step=0, key=key, g=state, d=state, ema={"g": params})
  variables = steps.with_statistics(g, state).averaged("g")
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
    kept = steps.with_statistics(g, given).averaged("g")
    assert all(leaves_equal(kept["statistics"], variables["statistics"]))
