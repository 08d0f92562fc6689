import dataclasses
from importlib import metadata

import jax
import numpy as np
import optax
import pytest
from conftest import leaves_equal

from gan_jax import augment, data, losses, networks, objectives, parallel, steps, train
from gan_jax.types import BatchSizes, InputError

# Bit for bit where XLA fuses as it does outside of the tests, see conftest.py.
AS_EVER = {"xla_cpu_use_fusion_emitters": True} if metadata.version("jaxlib") < "0.12" else None


WEAK = augment.affine(shift=0.05)
WHOLE = objectives.with_class_balance(
  objectives.semi_supervised_gan(consistency_weight=1.0, weak=WEAK, threshold=0.2), 3.0
)
"""Losses that compare images of a batch, feature matching and class balance, and those that do not."""
RELATIVISTIC = objectives.gan(losses.relativistic, penalty="r1_r2", gamma=0.1)


def conv(norm_d, norm_g):
  return {
    "g": networks.ConvGenerator((8, 8, 1), width=8, latent_size=4, norm=norm_g),
    "d": networks.ConvDiscriminator(3, width=8, num_features=8, norm=norm_d),
  }


CASES = {
  "whole recipe": {"objective": WHOLE, "augment": WEAK, **conv("layer", "shift")},
  "pairs, R1 and R2, spectral and batch norm": {"objective": RELATIVISTIC, **conv("spectral", "batch")},
  "noise and weight norm": {"objective": objectives.semi_supervised_gan(), "network": "mlp"},
  "ADA": {"objective": objectives.gan(), "augment": augment.Adaptive((WEAK,), num_images=200)},
}


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_compute_what_one_does(case, make_tiny):
  """With SGD, because Adam hides a constant factor in the gradient; to rounding."""
  changes = dict(CASES[case])
  tiny = make_tiny(tx=optax.sgd(0.05), network=changes.pop("network", "conv"))
  sizes = BatchSizes(8, 8 if changes["objective"] is RELATIVISTIC else 16, 8)  # pairs need as many
  recipe = tiny.recipe(batch=sizes, **changes)
  start = recipe.init_state(jax.random.key(0), tiny.data)
  devices = jax.devices()
  split = parallel.over_devices(recipe, devices)
  programs = []
  for each, arguments in (
    (recipe, (start, tiny.data)),
    (split, parallel.replicated((start, tiny.data), devices)),
  ):
    compiled = jax.jit(each.make_multi_step(3)).lower(*arguments, np.int32(0)).compile()
    programs.append((compiled.cost_analysis()["flops"], *compiled(*arguments, np.int32(3))))
  (flops, expected, metrics), (flops_each, found, metrics_found) = programs
  assert len(devices) == 8
  assert flops_each < flops / 4  # each device does a part
  for _before, a, b in zip(*map(jax.tree.leaves, (start, expected, found)), strict=True):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(b, a, atol=1e-6)
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (start.d.params, found.d.params)), strict=True)
  ]
  assert np.mean(moved) > 0.9
  for name in metrics:
    np.testing.assert_allclose(metrics_found[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_fit_over_devices_saves_what_one_device_goes_on_with(tiny, tmp_path):
  """Four steps on two devices, resumed on one, against four steps on one: the same to rounding."""
  recipe = tiny.recipe(num_steps=4)
  fit = lambda num_steps, **kwargs: train.fit(
    dataclasses.replace(recipe, num_steps=num_steps), tiny.data, jax.random.key(0), verbose=False, **kwargs
  )
  expected = fit(4).state
  first = fit(2, workdir=tmp_path, devices=jax.devices()[:2]).state
  assert len(first.step.sharding.device_set) == 2
  found = fit(4, workdir=tmp_path, resume=True).state
  assert int(found.step) == 4
  for a, b in zip(jax.tree.leaves(expected.ema), jax.tree.leaves(found.ema), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)


def test_a_batch_that_cannot_be_split(tiny):
  recipe = tiny.recipe(batch=BatchSizes(50, 64, 32))
  assert [parallel.most_devices(recipe.batch, num) for num in (1, 3, 8)] == [1, 2, 2]
  with pytest.raises(
    InputError, match=r"50 labelled images per step cannot be split over 8 devices.* 2 of"
  ):
    parallel.over_devices(recipe, jax.devices())


def replicates(tiny):
  """Four splits and seeds of the tiny problem: their steps, their states, their data."""
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed) for seed in range(4)]
  x_init = data.to_float(tiny.data.x_unl)
  states = [
    steps.init_state(jax.random.key(i), tiny.g, tiny.d, **tiny.txs, x_init=x_init) for i in range(4)
  ]
  multi_step = steps.make_multi_step(tiny.step(), tiny.sample_batch, max_steps=3)
  singles = [data.to_device(tiny.dataset, split) for split in splits]
  return multi_step, states, singles, data.to_device_splits(tiny.dataset, splits)


def test_each_replicate_is_its_single_run_on_one_device_and_on_four(make_tiny):
  """Sequentially: bit for bit on one device, to rounding on four, where another program is compiled."""
  multi_step, states, singles, together = replicates(make_tiny(network="mlp"))
  single = jax.jit(multi_step, compiler_options=AS_EVER)
  expected = [single(*pair, 3) for pair in zip(states, singles, strict=True)]
  assert not any(leaves_equal(expected[0][0].d.params, expected[1][0].d.params))
  for num in (1, 4):
    devices = jax.devices()[:num]
    replicated = parallel.replicate(multi_step, strategy="sequential", devices=devices)
    run = jax.jit(replicated, compiler_options=AS_EVER if num == 1 else None)
    placed = parallel.place(parallel.stack(states), together, devices=devices)
    found, metrics = run(*placed, 3)
    assert len(found.step.sharding.device_set) == num
    assert metrics["d/loss"].shape == (4, 3)
    for i, (state, history) in enumerate(expected):
      each = parallel.pick(found, i)
      if num == 1:
        assert all(leaves_equal(each, state))
        np.testing.assert_array_equal(metrics["d/loss"][i], history["d/loss"])
      close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
      jax.tree.map(close, (each.d, each.g, each.ema), (state.d, state.g, state.ema))
    with jax.no_tracing():  # the states stay where they were placed
      run(found, placed[1], 3)


def test_in_step_they_are_nearly_the_same(make_tiny):
  """With convolutions, whose kernels are then a replicate's own."""
  multi_step, states, singles, together = replicates(make_tiny(objective=objectives.supervised_only()))
  devices = jax.devices()[:1]
  run, looped = (
    jax.jit(parallel.replicate(multi_step, strategy=strategy, devices=devices))
    for strategy in ("vmap", "sequential")
  )
  stacked = parallel.stack(states)
  assert run.lower(stacked, together, 1).as_text() != looped.lower(stacked, together, 1).as_text()
  found, _ = run(stacked, together, 1)
  single = jax.jit(multi_step)
  for i in (0, 3):
    expected, _ = single(states[i], singles[i], 1)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(close, parallel.pick(found, i).ema, expected.ema)


def test_repeats_are_copies_of_the_labelled_images(tiny):
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed) for seed in range(2)]
  once, thrice = (data.to_device_splits(tiny.dataset, splits, repeats=n) for n in (1, 3))
  assert thrice.x_lab.shape == (2, 18, 8, 8, 1)
  for i in range(2):
    np.testing.assert_array_equal(thrice.x_lab[i], np.tile(once.x_lab[i], (3, 1, 1, 1)))
    np.testing.assert_array_equal(thrice.y_lab[i], np.tile(tiny.dataset.y_train[[*splits[i].indices]], 3))


def test_splits_of_different_images_cannot_share_them(tiny):
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed, num_images=40) for seed in range(2)]
  with pytest.raises(InputError, match="the same images"):
    data.to_device_splits(tiny.dataset, splits)
