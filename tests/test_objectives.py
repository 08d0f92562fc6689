import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gan_jax import objectives


def test_a_weight_of_zero_removes_its_term():
  gone = lambda view: pytest.fail("a term of weight zero was traced")
  objective = objectives.Objective(d={"kept": (2.0, lambda view: jnp.ones(())), "gone": (0.0, gone)})
  assert list(objective.d) == ["kept"]


def test_total_weighs_by_number_and_by_schedule(key):
  @dataclasses.dataclass(frozen=True)
  class View:
    key: object
    step: object

  schedule = optax.linear_schedule(0.0, 1.0, 10)
  terms = {"a": (2.0, lambda view: jnp.float32(3.0)), "b": (schedule, lambda view: jnp.float32(10.0))}
  for step, expected in ((0, 6.0), (5, 11.0), (10, 16.0)):
    loss, values = objectives.total(terms, View(key, jnp.int32(step)))
    np.testing.assert_allclose(loss, expected)
    assert values == {"a": 3.0, "b": 10.0}


def test_without_an_adversarial_weight_there_is_no_generator():
  assert objectives.semi_supervised_gan(adversarial=0.0).g == {}
  assert set(objectives.semi_supervised_gan(adversarial=0.0).d) == {"supervised"}


def test_consistency_needs_the_weak_augmentation():
  with pytest.raises(ValueError, match="weak augmentation"):
    objectives.semi_supervised_gan(consistency_weight=1.0)
