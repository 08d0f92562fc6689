"""The inputs of the terms: images, keys, the teacher, classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gan_jax import (
  objectives,
  steps,
  terms,
  types,
)


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
