"""No label outside the split reaches a loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from conftest import leaves_equal

from gan_jax import (
  data,
  objectives,
  steps,
  terms,
)


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
