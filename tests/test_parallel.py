import jax
import numpy as np
import pytest
from conftest import leaves_equal

from gan_jax import augment, data, objectives, parallel, steps
from gan_jax.types import InputError

FULL = objectives.semi_supervised_gan(
  consistency_weight=1.0, weak=augment.affine(shift=0.05), threshold=0.2
)


@pytest.fixture
def replicates(make_tiny):
  """Four splits and seeds of the tiny problem: how to update them, their states, their data."""
  tiny = make_tiny(objective=FULL)
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed) for seed in range(4)]
  x_init = data.to_float(tiny.data.x_unl)
  states = [
    steps.init_state(jax.random.key(i), tiny.g, tiny.d, **tiny.txs, x_init=x_init) for i in range(4)
  ]
  updates = steps.make_updates(tiny.step(), tiny.draw, max_updates=3)
  singles = [data.to_device(tiny.dataset, split) for split in splits]
  return updates, states, singles, data.to_device_splits(tiny.dataset, splits)


def test_each_replicate_is_its_single_run_on_one_device_and_on_four(replicates):
  """In the loop bit for bit."""
  updates, states, singles, together = replicates
  single = jax.jit(updates)
  expected = [single(*pair, 3) for pair in zip(states, singles, strict=True)]
  assert not any(leaves_equal(expected[0][0].d.params, expected[1][0].d.params))
  for num in (1, 4):
    devices = jax.devices()[:num]
    run = jax.jit(parallel.replicate(updates, how="loop", devices=devices))
    placed = parallel.place(parallel.stack(states), together, devices=devices)
    found, metrics = run(*placed, 3)
    assert len(found.step.sharding.device_set) == num
    assert metrics["d/loss"].shape == (4, 3)
    for i, (state, history) in enumerate(expected):
      assert all(leaves_equal(parallel.pick(found, i), state))
      np.testing.assert_array_equal(metrics["d/loss"][i], history["d/loss"])
    with jax.no_tracing():  # the states stay where they were placed
      run(found, placed[1], 3)


def test_in_step_they_are_nearly_the_same(replicates):
  updates, states, singles, together = replicates
  devices = jax.devices()[:1]
  run = jax.jit(parallel.replicate(updates, how="vmap", devices=devices))
  assert run.lower(parallel.stack(states), together, 1).as_text() != (
    jax.jit(parallel.replicate(updates, how="loop", devices=devices))
    .lower(parallel.stack(states), together, 1)
    .as_text()
  )
  found, _ = run(parallel.stack(states), together, 1)
  for i in (0, 3):
    expected, _ = jax.jit(updates)(states[i], singles[i], 1)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(close, parallel.pick(found, i).ema, expected.ema)


def test_splits_of_different_images_cannot_share_them(tiny):
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed, num_images=40) for seed in range(2)]
  with pytest.raises(InputError, match="the same images"):
    data.to_device_splits(tiny.dataset, splits)
