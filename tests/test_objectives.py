import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gan_jax import kernels, losses, objectives, terms


@dataclasses.dataclass(frozen=True)
class Outputs:
  """The part of `terms.StepOutputs` that a term reads."""

  key: object = None
  step: object = None
  lab: object = None
  unl: object = None
  fake: object = None
  by_class: bool = False
  d_fn: object = None
  teacher_fn: object = None


def images(logits, y, x_raw=None):
  logits = jnp.array(logits)
  x_raw = logits if x_raw is None else x_raw
  return terms.DiscOutputs(x_raw=x_raw, x=logits, logits=logits, features=logits, y=jnp.array(y))


def value(term, outputs):
  """As one program: operations one by one are compiled one by one."""
  return jax.jit(lambda: term(outputs))()


def test_a_weight_of_zero_removes_its_term():
  gone = lambda outputs: pytest.fail("a term of weight zero was traced")
  objective = objectives.Objective(d={"kept": (2.0, lambda outputs: jnp.ones(())), "gone": (0.0, gone)})
  assert list(objective.d) == ["kept"]


def test_a_weighted_sum_weighs_by_number_and_by_schedule(key):
  schedule = optax.linear_schedule(0.0, 1.0, 10)
  weighted = {
    "a": (2.0, lambda outputs: jnp.float32(3.0)),
    "b": (schedule, lambda outputs: jnp.float32(10.0)),
  }
  for step, expected in ((0, 6.0), (5, 11.0), (10, 16.0)):
    loss, values = objectives.weighted_sum(weighted, Outputs(key, jnp.int32(step)))
    np.testing.assert_allclose(loss, expected)
    assert values == {"a": 3.0, "b": 10.0}


def test_a_terms_key_comes_from_its_name(key):
  """Other terms, before or after it, do not change its random numbers."""
  draw = lambda outputs: jax.random.uniform(outputs.key)
  values = lambda *names: objectives.weighted_sum(dict.fromkeys(names, (1.0, draw)), Outputs(key))[1]
  alone, among = values("b"), values("a", "b", "c")
  assert alone["b"] == among["b"] == values("b", "a")["b"]
  assert len({float(value) for value in among.values()}) == 3


def test_without_an_adversarial_weight_there_is_no_generator():
  assert objectives.semi_supervised_gan(adversarial=0.0).g == {}
  assert set(objectives.semi_supervised_gan(adversarial=0.0).d) == {"supervised"}


def test_consistency_needs_the_weak_augmentation():
  with pytest.raises(ValueError, match="weak augmentation"):
    objectives.semi_supervised_gan(consistency_weight=1.0)


def test_a_term_of_every_k_steps_is_heavier_and_rare():
  """Value, metric and gradient: n times the term if n divides the step, else zero."""
  term = lambda outputs: jnp.square(outputs.unl)
  assert terms.every_k(term, 1) is term
  weighted = {"r1": (0.5, terms.every_k(term, 3))}

  @jax.jit
  def run(w, step):
    loss = lambda w: objectives.weighted_sum(weighted, Outputs(key=jax.random.key(0), step=step, unl=w))
    return jax.value_and_grad(loss, has_aux=True)(w)

  for step in range(5):
    (loss, values), grad = run(jnp.float32(2.0), jnp.int32(step))
    found = float(loss), float(values["r1"]), float(grad)
    assert found == ((6.0, 12.0, 6.0) if step % 3 == 0 else (0.0, 0.0, 0.0))


def test_conditional_gan_judges_by_the_class_where_all_are_known():
  """D uses the class logits or, with unlabelled images, the logsumexp; G always uses the class logit."""
  a, b = [2.0, -1.0], [0.5, 0.0]
  outputs = Outputs(
    *(jax.random.key(0), jnp.int32(0)),
    by_class=True,
    lab=images([a], [1]),
    unl=images(jnp.zeros((0, 2)), jnp.zeros(0, int)),
    fake=images([a, b, a], [0, 1, 1]),
  )
  objective = objectives.conditional_gan(losses.wasserstein)
  d, g = objective.d["adversarial"][1], objective.g["adversarial"][1]
  both = lambda outputs: (d(outputs), g(outputs))
  found_d, found_g = value(both, outputs)
  np.testing.assert_allclose(found_d, (2.0 + 0.0 - 1.0) / 3 - (-1.0), rtol=1e-6)
  np.testing.assert_allclose(found_g, -(2.0 + 0.0 - 1.0) / 3, rtol=1e-6)
  lse_a, lse_b = (np.log(np.exp(row).sum()) for row in (a, b))
  some = dataclasses.replace(outputs, unl=images([b], [-1]), by_class=False)
  found_d, found_g = value(both, some)
  np.testing.assert_allclose(found_d, (2 * lse_a + lse_b) / 3 - (lse_a + lse_b) / 2, rtol=1e-6)
  np.testing.assert_allclose(found_g, -(2.0 + 0.0 - 1.0) / 3, rtol=1e-6)


def test_the_rotation_term_asks_for_the_turns_of_each_image(key):
  """A D that finds the bright corner is right up to its uncertainty; it needs its auxiliary head."""
  x = np.zeros((40, 5, 5, 1), np.float32)
  x[:, 0, 0] = 1

  def d_fn(x, key):
    corners = x[:, 0, 0, 0], x[:, -1, 0, 0], x[:, -1, -1, 0], x[:, 0, -1, 0]  # counter-clockwise
    return x[:, 0, :3, 0], x[:, 0, :, 0], 2 * jnp.stack(corners, axis=-1)

  def loss(x, d_fn=d_fn):
    pick = lambda outputs: outputs.fake
    return terms.rotation(pick)(Outputs(key=key, fake=terms.DiscOutputs(x, x, x, x, x), d_fn=d_fn))

  found, grad = jax.jit(jax.value_and_grad(loss))(x)
  np.testing.assert_allclose(found, np.log(np.exp(2) + 3) - 2, rtol=1e-5)
  corner = 2 * (np.exp(2) / (np.exp(2) + 3) - 1) / 40
  np.testing.assert_allclose(np.asarray(grad)[:, 0, 0, 0], np.full(40, corner), rtol=1e-4)
  with pytest.raises(ValueError, match="num_aux=4"):
    jax.eval_shape(lambda x: loss(x, lambda x, key: d_fn(x, key)[:2]), x)


def test_rotation_is_in_both_objectives_with_the_papers_weight_for_g():
  objective = objectives.gan(rotation_weight=0.5)
  assert objective.d["rotation"][0] == 0.5
  assert objective.g["rotation"][0] == 0.1
  assert "rotation" not in objectives.gan().d | objectives.gan().g


def test_virtual_adversarial_finds_the_steepest_direction(key):
  """For two classes and an undecided linear D: along w_0 - w_1, with loss log cosh(e |w_0 - w_1| / 2)."""
  w = jnp.float32(np.random.default_rng(0).normal(size=(12, 2)))
  x = jnp.zeros((5, 2, 3, 2))

  def loss(w):
    outputs = Outputs(key=key, unl=images(x, [-1] * 5), d_fn=lambda x, key: (x.reshape(5, -1) @ w, None))
    return terms.virtual_adversarial(epsilon=0.5)(outputs)

  found, grad = jax.jit(jax.value_and_grad(loss))(w)
  across = np.asarray(w[:, 0] - w[:, 1])
  length = np.linalg.norm(across)
  np.testing.assert_allclose(found, np.log(np.cosh(0.5 * length / 2)), rtol=1e-3)
  expected = 0.5 * np.tanh(0.5 * length / 2) * 0.5 * across / length  # r and p are constants
  np.testing.assert_allclose(grad, np.stack([expected, -expected], axis=1), atol=1e-3)


def test_virtual_adversarial_finds_its_direction_in_bfloat16_too(key):
  """A trial step that is lost in rounding leaves a random direction, and with it a small divergence."""
  rng = np.random.default_rng(0)
  w, x = rng.standard_normal((784, 3), np.float32) / 28, rng.random((20, 28, 28, 1), np.float32)

  def loss(precision):
    product = kernels.in_precision(jnp.matmul, precision)
    d_fn = lambda x, key: (product(2 * x.reshape(20, -1) - 1, w), None)
    outputs = Outputs(key=key, unl=images(x, [-1] * 20), d_fn=d_fn)
    return terms.virtual_adversarial(epsilon=3.0)(outputs)

  # By default XLA drops the roundings within a program on CPU.
  run = jax.jit(loss, static_argnums=0, compiler_options={"xla_allow_excess_precision": False})
  np.testing.assert_allclose(run("bfloat16"), run("float32"), rtol=0.05)


def test_the_teacher_is_the_averaged_network_and_a_constant(key):
  x = np.random.default_rng(0).random((6, 3), np.float32)
  weak = lambda key, x: 2 * x

  def loss(w, teacher):
    teacher_fn = lambda x, key: (x * teacher, None)
    outputs = Outputs(key=key, unl=images(x * w, [-1] * 6, x_raw=x), teacher_fn=teacher_fn)
    return terms.mean_teacher(weak)(outputs)

  p, target = (np.exp(a) / np.exp(a).sum(axis=-1, keepdims=True) for a in (3 * x, 2 * 0.5 * x))
  found, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(3.0, 0.5)
  np.testing.assert_allclose(found, np.square(p - target).sum() / 6, rtol=1e-5)
  assert gradients[0] != 0
  assert gradients[1] == 0


def test_the_targets_of_consistency_are_the_averaged_networks(key):
  x = np.random.default_rng(0).random((6, 3), np.float32)
  teacher_fn = lambda x, key: (-x, None)
  outputs = Outputs(key=key, unl=images(x, [-1] * 6), teacher_fn=teacher_fn)
  found = value(terms.consistency(lambda key, x: 2 * x, threshold=0.0), outputs)
  p = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(found, -np.log(p[np.arange(6), x.argmin(axis=1)]).mean(), rtol=1e-5)


def test_adamatch_takes_its_targets_from_the_averaged_network(key):
  x = np.random.default_rng(0).random((6, 3), np.float32)
  teacher_fn = lambda x, key: (-x, None)
  lab = images(3 * x, [0] * 6)
  outputs = Outputs(key=key, lab=lab, unl=images(x, [-1] * 6), teacher_fn=teacher_fn)
  found = value(terms.adamatch(lambda key, x: 2 * x, threshold=0.9), outputs)
  expected = jax.jit(lambda x: losses.adamatch(3 * x, -2 * x, x, threshold=0.9).mean())(x)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mixed_images_are_as_real_as_their_share(key):
  """A D that counts real pixels: the loss is the entropy of the fraction that it sees."""
  real, fake = np.ones((400, 8, 8, 1), np.float32), np.zeros((500, 8, 8, 1), np.float32)
  seen = []

  def d_fn(x, key):
    share = x.mean(axis=(1, 2, 3))
    seen.append(share)
    return jnp.log(share / (1 - share + 1e-6) + 1e-6)[:, None], None

  def run(real, fake, d_fn, seen):
    unl, fake = (terms.DiscOutputs(x, x, x, x, x) for x in (real, fake))
    return terms.mixed(Outputs(key=key, unl=unl, fake=fake, d_fn=d_fn)), *seen

  found, share = jax.jit(lambda *both: run(*both, d_fn, seen))(real, fake)
  assert len(share) == 400
  assert share.min() < 0.2
  assert share.max() > 0.95
  p = np.clip(np.asarray(share, np.float64), 1e-6, 1 - 1e-6)
  expected = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
  np.testing.assert_allclose(found, expected, atol=1e-3)
  # Rectangles: rows that are cut are cut in the same columns.
  corner = np.broadcast_to(np.arange(64.0, dtype=np.float32).reshape(8, 8, 1), real.shape)
  pixels = []
  record = lambda x, key: (pixels.append(x) or x[:, :2, 0, 0], None)
  _, x = jax.jit(lambda *both: run(*both, record, pixels))(corner, fake)
  cut = np.asarray(x)[1:, ..., 0] == 0
  assert all((image[image.any(axis=1)] == image.any(axis=0)[None]).all() for image in cut[:, :, 1:])


def test_generated_images_teach_where_the_averaged_network_is_sure_and_takes_them_for_real():
  sure_real, sure_fake, unsure = [9.0, 0.0], [-3.0, -12.0], [3.0, 3.0]
  logits = jnp.array([sure_real, sure_fake, unsure])
  own = jnp.array([[1.0, 2.0]] * 3)
  fake = images(own, [-1] * 3)
  outputs = Outputs(fake=fake, teacher_fn=lambda x, key: (logits, None))
  found = value(terms.confident_generated(threshold=0.95), outputs)
  np.testing.assert_allclose(found, (np.log(np.exp(1) + np.exp(2)) - 1) / 3, rtol=1e-5)
  even = Outputs(fake=images(jnp.zeros((5, 4)), [-1] * 5))
  np.testing.assert_allclose(value(terms.undecided_generated, even), -np.log(4), rtol=1e-5)


def test_methods_of_the_study_by_hand():
  """Their terms and weights; the entropy is on unlabelled, the generated classes on generated images."""
  logits = np.array([[1.0, -1.0], [0.0, 2.0]])
  outputs = Outputs(unl=images(logits, [-1, -1]), fake=images(logits, [0, 0]))
  p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  bad = objectives.bad_gan(entropy_weight=0.3, density_weight=0.1)
  assert {name: weight for name, (weight, _) in bad.d.items()} == {
    "supervised": 1.0,
    "adversarial": 0.5,
    "entropy": 0.3,
  }
  assert bad.g["low_density"][0] == 0.1
  np.testing.assert_allclose(value(bad.d["entropy"][1], outputs), -(p * np.log(p)).sum() / 2, rtol=1e-5)
  again = dataclasses.replace(outputs, key=jax.random.key(0), d_fn=lambda x, key: (x, x))
  expected = lambda again: -losses.mutual_information(again.unl.logits, again.unl.logits)
  term = terms.mutual_information(lambda key, x: x)
  mutual, expected = value(lambda again: (term(again), expected(again)), again)
  np.testing.assert_allclose(mutual, expected)
  assert mutual < 0
  augmented = objectives.generator_augmented(weight=0.2)
  assert augmented.g == {}
  generated = value(augmented.d["generated"][1], outputs)
  np.testing.assert_allclose(generated, -np.log(p[:, 0]).mean(), rtol=1e-5)
