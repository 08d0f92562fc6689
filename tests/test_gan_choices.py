"""Every loss x penalty x normalisation that the command line accepts, and what it refuses."""

import dataclasses
import itertools
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import mnist_conditional, mnist_gan, mnist_low_data
from gan_jax import augment, losses, networks, objectives, parsing, recipes, steps
from gan_jax.recipes import gan
from gan_jax.types import Batch, InputError

LOSSES, PENALTIES, NORMS = (get_args(choices) for choices in (gan.Loss, gan.Penalty, gan.Norm))


def accepted(loss, penalty, norm) -> bool:
  try:
    parsing.check(parsing.with_flags(mnist_gan.Config(), loss=loss, penalty=penalty, norm=norm))
  except InputError:
    return False
  return True


def test_the_recipe_knows_every_loss():
  assert tuple(gan.LOSSES) == LOSSES
  assert (len(LOSSES), len(PENALTIES), len(NORMS)) == (6, 5, 4)


PAIRS = {name: gan.LOSSES[name] for name in LOSSES}
PAIRS |= {
  f"{name}, smoothed": losses.smooth(PAIRS[name], 0.6)
  for name in ("min_max", "non_saturating", "least_squares")
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_at_the_boundary_an_undecided_discriminator_is_at_rest(pair):
  """One that gives all images the same logit; elsewhere adaptive augmentation would see overfitting."""
  whole = lambda r: sum(values.sum() for values in pair.d(r[None], r[None]))
  if pair.boundary is None:  # its loss is the same for any logit
    assert float(jax.grad(whole)(jnp.float32(3.0))) == 0
    with pytest.raises(ValueError, match="needs an adversarial loss with a decision boundary"):
      steps.make_step(
        G, None, g_tx=TX, d_tx=TX, objective=objectives.gan(pair), augment=augment.Adaptive(())
      )
    return
  np.testing.assert_allclose(jax.grad(whole)(jnp.float32(pair.boundary)), 0, atol=1e-6)
  for away in (-2.0, 2.0):
    assert away * jax.grad(whole)(jnp.float32(pair.boundary + away)) > 0


def test_what_makes_no_sense_is_refused():
  refused = {c for c in itertools.product(LOSSES, PENALTIES, NORMS) if not accepted(*c)}
  without_lipschitz = {
    ("wasserstein", penalty, norm)
    for penalty, norm in itertools.product(PENALTIES, NORMS)
    if penalty != "wgan_gp" and norm != "spectral"
  }
  assert refused == without_lipschitz


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ({"loss": "wasserstein"}, "needs a Lipschitz D"),
    ({"penalty": "none", "gamma": 1.0}, "--penalty is none"),
    ({"gamma": -1.0}, "--gamma must not be negative"),
    ({"real_label": 0.4}, "above 0.5"),
    ({"loss": "hinge", "real_label": 0.9}, "sets a target, but --loss hinge has none"),
    ({"rotation": -1.0}, "--rotation must not be negative"),
    ({"num_scored": 5}, "at least 256, or 0"),
    ({"augment": "adaptive", "loss": "relativistic"}, "which --loss relativistic does not have"),
    (
      {"augment": "adaptive", "loss": "wasserstein", "norm": "spectral"},
      "--loss wasserstein does not have",
    ),
  ],
)
def test_refusals_are_sentences(flags, sentence):
  with pytest.raises(InputError, match=sentence):
    parsing.check(parsing.with_flags(mnist_gan.Config(), **flags))


def test_adaptive_augmentation_is_refused_before_the_other_kinds_are_trained():
  config = parsing.with_flags(mnist_low_data.Config(), loss="relativistic")
  with pytest.raises(InputError, match="relativistic"):
    parsing.check(config)
  parsing.check(parsing.with_flags(config, augments=("none", "fixed")))


@pytest.mark.parametrize("loss", ["relativistic", "wasserstein"])
def test_a_run_that_was_trained_with_what_is_refused_now_can_be_opened(loss):
  hparams = dataclasses.replace(gan.tuned("article"), loss=loss, norm="spectral", augmentation="adaptive")
  recipe = gan.build(hparams, (8, 8, 1), 10)
  assert recipes.rebuild(recipes.describe(recipe)).g == recipe.g
  with pytest.raises(ValueError, match="decision boundary"):
    recipe.make_step()


def test_few_labels_need_room_in_the_batch():
  with pytest.raises(InputError, match="at least 4"):
    parsing.check(parsing.with_flags(mnist_conditional.Config(), labels_per_class=5, batch_size=3))
  parsing.check(parsing.with_flags(mnist_conditional.Config(), batch_size=3))


def test_a_conditional_gan_has_no_pairs():
  with pytest.raises(InputError, match="pair by pair"):
    parsing.check(parsing.with_flags(mnist_conditional.Config(), loss="relativistic"))


TX = optax.adam(1e-2, b1=0.0)
G = networks.MLPGenerator((4, 4, 1), widths=(8,), latent_size=4, latent="normal", norm="none")


PENALTY_WEIGHTS = {  # of r1, r2 and wgan_gp
  "none": (0.0, 0.0, 0.0),
  "r1": (1.0, 0.0, 0.0),
  "r2": (0.0, 1.0, 0.0),
  "r1_r2": (1.0, 1.0, 0.0),
  "wgan_gp": (0.0, 0.0, 1.0),
}


def test_a_penalty_is_the_terms_of_its_name():
  """So the table above matches `objectives.gan`."""
  for penalty, weights in PENALTY_WEIGHTS.items():
    expected = {name for name, weight in zip(("r1", "r2", "wgan_gp"), weights, strict=True) if weight}
    found = objectives.gan(penalty=penalty, gamma=3.0).d
    assert set(found) - {"adversarial"} == expected
    assert {found[name][0] for name in expected} <= {3.0}


@cache
def two_steps(norm: str):
  """A state and two steps, compiled once for all losses and penalties, which an argument selects."""
  d = networks.MLPDiscriminator(1, widths=(8,), noise_in=0.0, noise_hidden=0.0, norm=norm)
  pairs = list(gan.LOSSES.values())
  x = jax.random.uniform(jax.random.key(0), (6, 4, 4, 1))
  state = steps.init_state(jax.random.key(1), G, d, g_tx=TX, d_tx=TX, x_init=x)
  batch = Batch(x_lab=x[:0], y_lab=jnp.zeros(0, jnp.int32), x_unl=x, x_unl_g=x[::-1], num_generated=6)

  @jax.jit
  def multi_step(which, weights, state, batch):
    pair = losses.Adversarial(
      d=lambda real, fake: jax.lax.switch(which, [pair.d for pair in pairs], real, fake),
      g=lambda real, fake: jax.lax.switch(which, [pair.g for pair in pairs], real, fake),
    )
    objective = objectives.gan(pair)
    penalties = objectives.gan(penalty="r1_r2").d | objectives.gan(penalty="wgan_gp").d
    for i, name in enumerate(("r1", "r2", "wgan_gp")):
      objective.d[name] = (lambda step, i=i: weights[i], penalties[name][1])
    step = steps.make_step(G, d, g_tx=TX, d_tx=TX, objective=objective)
    return steps.make_multi_step(step, lambda key, batch, i: batch, max_steps=2)(state, batch, jnp.int32(2))

  return lambda which, weights: (state, *multi_step(which, jnp.array(weights), state, batch))


@pytest.mark.parametrize("norm", NORMS)
def test_two_finite_steps(norm):
  for loss, penalty in itertools.product(LOSSES, PENALTIES):
    if accepted(loss, penalty, norm):
      before, after, metrics = two_steps(norm)(LOSSES.index(loss), PENALTY_WEIGHTS[penalty])
      assert all(np.isfinite(values).all() for values in metrics.values()), (loss, penalty, metrics)
      for net in ("g", "d"):
        params = [jax.tree.leaves(getattr(state, net).params) for state in (before, after)]
        assert all(np.isfinite(leaf).all() for leaf in params[1]), (loss, penalty)
        assert any(not np.array_equal(a, b) for a, b in zip(*params, strict=True)), (loss, penalty)
