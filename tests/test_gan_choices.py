"""Every loss x penalty x normalisation that the command line accepts, and what it refuses."""

import itertools
from functools import cache
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _gan, mnist_conditional, mnist_gan
from gan_jax import data, losses, networks, objectives, steps
from gan_jax.types import InputError


def choices(flag: str) -> list[str]:
  option = get_type_hints(mnist_gan.Config)[flag]
  found = get_args(option) or (option,)
  values = [value for option in found for value in (get_args(option) or (option,))]
  return [value for value in values if isinstance(value, str)]


LOSSES, PENALTIES, NORMS = choices("loss"), choices("penalty"), choices("norm")


def accepted(loss, penalty, norm) -> bool:
  try:
    mnist_gan.Config(loss=loss, penalty=penalty, norm=norm).check()
  except InputError:
    return False
  return True


def test_the_command_line_knows_every_loss():
  assert list(_gan.LOSSES) == LOSSES
  assert (len(LOSSES), len(PENALTIES), len(NORMS)) == (6, 5, 5)


def test_what_makes_no_sense_is_refused():
  refused = {c for c in itertools.product(LOSSES, PENALTIES, NORMS) if not accepted(*c)}
  without_lipschitz = {
    ("wasserstein", penalty, norm)
    for penalty, norm in itertools.product(PENALTIES, NORMS)
    if penalty != "wgan_gp" and norm != "spectral"
  }
  mixed = {(loss, penalty, "batch") for loss in LOSSES for penalty in PENALTIES if penalty != "none"}
  assert refused == without_lipschitz | mixed


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ({"loss": "wasserstein"}, "needs a Lipschitz D"),
    ({"norm": "batch"}, "--norm batch mixes"),
    ({"penalty": "none", "gamma": 1.0}, "--penalty is none"),
    ({"gamma": -1.0}, "--gamma must not be negative"),
    ({"real_label": 0.4}, "above 0.5"),
    ({"loss": "hinge", "real_label": 0.9}, "is a target, which --loss hinge has not"),
    ({"num_scored": 5}, "at least 256"),
  ],
)
def test_refusals_are_sentences(flags, sentence):
  with pytest.raises(InputError, match=sentence):
    mnist_gan.Config(**flags).check()


def test_a_conditional_gan_has_no_pairs():
  with pytest.raises(InputError, match="pair by pair"):
    mnist_conditional.Config(loss="relativistic").check()


@cache
def two_steps(penalty: str, norm: str):
  """Compiled once for all losses: which one is an argument."""
  g = networks.MLPGenerator((4, 4, 1), widths=(8,), latent_size=4, latent="normal", norm="none")
  d = networks.MLPDiscriminator(1, widths=(8,), noise_in=0.0, noise_hidden=0.0, norm=norm)
  tx = optax.adam(1e-2, b1=0.0)
  pairs = list(_gan.LOSSES.values())

  def take(which, key):
    pair = losses.Adversarial(
      d=lambda real, fake: jax.lax.switch(which, [pair.d for pair in pairs], real, fake),
      g=lambda real, fake: jax.lax.switch(which, [pair.g for pair in pairs], real, fake),
    )
    step = steps.make_step(g, d, g_tx=tx, d_tx=tx, objective=objectives.gan(pair, penalty=penalty))
    x = jax.random.uniform(key, (6, 4, 4, 1))
    state = steps.init_state(key, g, d, g_tx=tx, d_tx=tx, x_init=x)
    batch = data.Batch(x_lab=x[:0], y_lab=jnp.zeros(0, jnp.int32), x_unl=x, x_unl_g=x[::-1])
    updates = steps.make_updates(step, lambda key, batch: batch, max_updates=2)
    return state, *updates(state, batch, jnp.int32(2))

  return jax.jit(take)


@pytest.mark.parametrize(
  ("loss", "penalty", "norm"), [c for c in itertools.product(LOSSES, PENALTIES, NORMS) if accepted(*c)]
)
def test_two_finite_steps(loss, penalty, norm, key):
  before, after, metrics = two_steps(penalty, norm)(LOSSES.index(loss), key)
  assert all(np.isfinite(values).all() for values in metrics.values()), metrics
  wanted = {"r1": {"d/r1"}, "r2": {"d/r2"}, "r1_r2": {"d/r1", "d/r2"}, "wgan_gp": {"d/wgan_gp"}}
  assert wanted.get(penalty, set()) <= set(metrics)
  for net in ("g", "d"):
    params = [jax.tree.leaves(getattr(state, net).params) for state in (before, after)]
    assert all(np.isfinite(leaf).all() for leaf in params[1])
    moved = [not np.array_equal(a, b) for a, b in zip(*params, strict=True)]
    assert any(moved)
