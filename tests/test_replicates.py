import jax
import numpy as np
import pytest
from conftest import AS_EVER, leaves_equal

from gan_jax import checkpoint, data, kernels, objectives, replicates, steps, train


def four(tiny):
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
  """Sequentially: bit for bit on one device, up to rounding on four, which compile another program."""
  multi_step, states, singles, together = four(make_tiny(network="mlp"))
  single = jax.jit(multi_step, compiler_options=AS_EVER)
  expected = [single(*pair, 3) for pair in zip(states, singles, strict=True)]
  assert not any(leaves_equal(expected[0][0].d.params, expected[1][0].d.params))
  for num in (1, 4):
    devices = jax.devices()[:num]
    replicated = replicates.replicate(multi_step, strategy="sequential", devices=devices)
    run = jax.jit(replicated, compiler_options=AS_EVER if num == 1 else None)
    placed = replicates.place(replicates.stack(states), together, devices=devices)
    found, metrics = run(*placed, 3)
    assert len(found.step.sharding.device_set) == num
    assert metrics["d/loss"].shape == (4, 3)
    for i, (state, history) in enumerate(expected):
      each = replicates.pick(found, i)
      if num == 1:
        assert all(leaves_equal(each, state))
        np.testing.assert_array_equal(metrics["d/loss"][i], history["d/loss"])
      close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
      jax.tree.map(close, (each.d, each.g, each.ema), (state.d, state.g, state.ema))
    with jax.no_tracing():  # the states stay where they were placed
      run(found, placed[1], 3)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_in_step_they_are_nearly_the_same(make_tiny, num_devices):
  """With convolutions, which then have one kernel per replicate."""
  multi_step, states, singles, together = four(
    make_tiny(network="conv", objective=objectives.supervised_only())
  )
  devices = jax.devices()[:num_devices]
  run, looped = (
    jax.jit(replicates.replicate(multi_step, strategy=strategy, devices=devices))
    for strategy in ("vmap", "sequential")
  )
  stacked, together = replicates.place(replicates.stack(states), together, devices=devices)
  # With a kernel each, convolutions would become grouped ones, which are slow everywhere.
  with kernels.stock(True):  # as on an accelerator
    convolutions = [fn.lower(stacked, together, 1).as_text().count("convolution") for fn in (run, looped)]
  assert convolutions[0] == 0 < convolutions[1]
  found, _ = run(stacked, together, 1)
  single = jax.jit(multi_step)
  for i in (0, 3):
    expected, _ = single(states[i], singles[i], 1)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(close, replicates.pick(found, i).ema, expected.ema)


def test_a_fit_of_replicates_is_their_single_fits(make_tiny, tmp_path):
  """Up to rounding: this is another program. An earlier phase comes first, and its seconds count."""
  tiny = make_tiny(network="mlp")
  recipe, splits = tiny.recipe(4), [data.split_labels(tiny.dataset.y_train, 2, seed) for seed in range(2)]
  images, keys = data.to_device_splits(tiny.dataset, splits), [jax.random.key(seed) for seed in range(2)]
  found = replicates.fit(recipe, images, keys, steps_per_dispatch=3)
  assert found.metrics["d/loss"].shape == (2,)
  for i, split in enumerate(splits):
    single = train.fit(recipe, data.to_device(tiny.dataset, split), keys[i], verbose=False)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, replicates.pick(found.states, i).ema, single.state.ema)
  start = lambda states: found._replace(states=states, seconds_train=100.0)
  kwargs = {"start": start, "program": found.program, "workdir": tmp_path, "checkpoint_every": 2}
  again = replicates.fit(recipe, images, keys, **kwargs)
  with checkpoint.Checkpoints(tmp_path) as saved:
    assert saved.latest_step == 2  # which is not a multiple of the steps of a dispatch
  assert again.seconds_train > 100
  assert again.program is found.program
  assert all(leaves_equal(again.states.ema, found.states.ema))
