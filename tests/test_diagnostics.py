import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gan_jax import data, diagnostics, losses, networks, objectives, steps, terms
from gan_jax.types import Batch, BatchSizes, ClassLatents, InputError, NetState, TrainState


class Images:
  """A generator without parameters: its latents are its images, drawn by a function of the key."""

  def __init__(self, draw):
    self.latents = draw

  def init(self, key, z, *, train):
    return {"params": {}}

  def apply(self, variables, z, *, train, **kwargs):
    return (z, {}) if "mutable" in kwargs else z


class Looks:
  """A discriminator without parameters: one logit per pixel of the first row, and a third output."""

  def apply(self, variables, x, *, train):
    assert not train
    return x[:, 0, :, 0] + variables["params"], x.reshape(len(x), -1), "more"


TX = optax.adam(1e-2, b1=0.5)


class DenseD(nn.Module):
  """A plain MLP."""

  num_classes: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes)(features), features


class DenseG(nn.Module):
  def latents(self, key, num):
    return jax.random.normal(key, (num, 4))

  @nn.compact
  def __call__(self, z, *, train):
    return nn.sigmoid(nn.Dense(64)(z)).reshape(-1, 8, 8, 1)


def sentences(rows, **kwargs) -> list[str]:
  return list(diagnostics.alarms(rows, **kwargs).values())


def noise(key, num):
  return jax.random.uniform(key, (num, 8, 8, 1))


def on_device(x_train, x_held_out, y_train=None, y_held_out=None):
  """Images in [0, 1] as a training set on the device."""
  y_train, y_held_out = (
    jnp.full(len(x), -1) if y is None else jnp.array(y)
    for x, y in ((x_train, y_train), (x_held_out, y_held_out))
  )
  return data.DeviceData(255 * x_train, y_train, 255 * x_train, 255 * x_held_out, y_held_out)


def diagnose_by_hand(train, held_out, fake, *, shift=0.0, **kwargs):
  """The metrics of images of one row, whose pixels (plus a shift) are the logits."""
  images = [jnp.asarray(x, jnp.float32)[:, None, :, None] for x in (train, held_out, fake)]
  d = NetState(jnp.float32(shift), {}, {})
  state = TrainState(
    jnp.int32(0), jax.random.key(0), NetState({}, {}, {}), d, {"g": {}, "d": jnp.float32(9)}
  )
  g = Images(lambda key, num: images[2][:num])
  metrics = jax.jit(diagnostics.make_diagnostics(g, Looks(), **kwargs))(state, on_device(*images[:2]))
  assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())
  return {name.removeprefix("diagnostics/"): float(value) for name, value in metrics.items()}


def test_metrics_by_hand_with_one_logit():
  """One pixel, one logit: the pixel minus 1/2. D is the current network, not the averaged one."""
  m = diagnose_by_hand(
    [[1.0], [0.8], [0.6], [0.4]], [[0.5], [0.7]], [[0.2], [0.6], [0.3], [0.1]], shift=-0.5
  )
  expected = {
    "real_logit_train": 0.2,
    "real_logit_held_out": 0.1,
    "real_logit_fake": -0.2,
    "real_logit_gap": 0.1,
    "memorisation": 0.25,
    "train_accuracy": 75,
    "fake_accuracy": 75,
    "variance_ratio": 0.035 / 0.05,
  }
  assert set(m) == set(expected)  # K = 1: no classes
  np.testing.assert_allclose([m[k] for k in expected], list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(("boundary", "expected"), [(0.5, (75, 75)), (None, ())])
def test_accuracies_are_those_of_the_losss_boundary(boundary, expected):
  logits = ([[1.0], [0.8], [0.6], [0.4]], [[0.5], [0.7]], [[0.2], [0.6], [0.3], [0.1]])
  found = diagnose_by_hand(*logits, boundary=boundary)
  assert tuple(found[name] for name in ("train_accuracy", "fake_accuracy") if name in found) == expected


def test_metrics_by_hand_with_classes():
  """D's own three logits give the class, unless `classify` does."""
  train, fake = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 2, 2, 2]]
  m = diagnose_by_hand(train, np.zeros((1, 3)), fake)
  real_logit = np.log(np.e + 2)
  np.testing.assert_allclose(
    [m["real_logit_train"], m["real_logit_held_out"]], [real_logit, np.log(3)], rtol=1e-6
  )
  np.testing.assert_allclose([m[f"share_{k}"] for k in range(3)], [0.25, 0, 0.75])
  np.testing.assert_allclose(m["class_entropy"], -0.25 * np.log(0.25) - 0.75 * np.log(0.75), rtol=1e-6)
  assert m["memorisation"] == 0  # D scores training and generated images alike: zero denominator
  m = diagnose_by_hand(train, np.zeros((1, 3)), fake, classify=lambda x: 1 - x[:, 0, :2, 0])
  np.testing.assert_allclose([m["share_0"], m["share_1"]], [0.75, 0.25])
  assert "share_2" not in m
  many = lambda x: jnp.repeat(x[:, 0, :, 0], 17, axis=-1)
  m = diagnose_by_hand(
    train, np.zeros((1, 3)), fake, classify=many
  )  # 51 classes: some are missing by chance
  assert "class_entropy" in m
  assert not any(name.startswith("share_") for name in m)


def test_images_in_the_order_of_their_classes_are_all_looked_at():
  """As in a folder: of 600 dark and 600 bright images, some of each are used."""
  ordered = np.repeat([[0.0], [1.0]], 600, axis=0)
  m = diagnose_by_hand(ordered, ordered, np.tile([[0.0], [1.0]], (300, 1)))
  np.testing.assert_allclose([m[name] for name in ("variance_ratio", "real_logit_train")], [1, 0.5])
  assert m["real_logit_held_out"] == 0.5


def test_without_held_out_images_their_metrics_are_absent():
  full = diagnose_by_hand(np.eye(2), np.eye(2), np.eye(2))
  none = diagnose_by_hand(np.eye(2), np.eye(2)[:0], np.eye(2))
  assert set(full) - set(none) == {"real_logit_held_out", "real_logit_gap", "memorisation"}


def test_one_training_image_is_too_few():
  x = np.zeros((1, 8, 8, 1), np.uint8)
  images = data.DeviceData.from_arrays(x, np.zeros(1, int), np.repeat(x, 2, axis=0))
  diagnostics.check(images, by_class=False)
  with pytest.raises(InputError, match="at least 2"):
    diagnostics.check(images, by_class=True)


def test_with_all_labels_d_is_asked_for_the_class():
  """r is the logit of an image's own or requested class; without all labels, the logsumexp."""
  logits = jnp.array([[1.0, -1.0], [-2.0, 2.0]])
  x = logits[:, None, :, None]
  g = Images(lambda key, num: ClassLatents(x[:num], jnp.array([1, 1])))
  g.apply = lambda variables, z, *, train: z.z
  state = TrainState(
    *(jnp.int32(0), jax.random.key(0), NetState({}, {}, {}), NetState(jnp.float32(0), {}, {})),
    ema={"g": {}, "d": jnp.float32(0)},
  )
  diagnose = {
    by_class: diagnostics.make_diagnostics(g, Looks(), by_class=by_class) for by_class in (False, True)
  }
  run = jax.jit(lambda *args: {by_class: fn(*args) for by_class, fn in diagnose.items()})
  found = run(state, on_device(x, x[:1], [0, 1], [1]))
  real = {
    by_class: [float(m[f"diagnostics/real_logit_{name}"]) for name in ("train", "held_out", "fake")]
    for by_class, m in found.items()
  }
  lse = np.log(np.exp(logits).sum(axis=1))
  np.testing.assert_allclose(real[False], [lse.mean(), lse[0], lse.mean()], rtol=1e-5)
  np.testing.assert_allclose(real[True], [1.5, -1.0, 0.5], rtol=1e-5)
  # Held-out images without a class: all are judged by the same logit, or the gap would be a bias.
  assert run(state, on_device(x, x[:1], [0, 1], [-1]))[True] == found[False]


def test_diagnostics_agree_with_the_networks_themselves(key):
  """The averaged generator and the current discriminator."""
  g, d = DenseG(), DenseD(3)
  x = noise(key, 60)
  state = steps.init_state(key, g, d, g_tx=TX, d_tx=TX, x_init=x)
  state = state.replace(ema=jax.tree.map(lambda p: 1.5 * p, state.ema))
  diagnose, images = jax.jit(diagnostics.make_diagnostics(g, d)), on_device(x[:20], x[20:])
  m = diagnose(state, images)
  assert m == diagnose(state.replace(step=state.step + 1), images)  # the same latents every time

  @jax.jit
  def by_hand(state, x):
    latents = g.latents(jax.random.fold_in(state.key, 2**32 - 1), 20)
    x_fake = g.apply({"params": state.ema["g"]}, latents, train=False)
    d_fn = lambda x: d.apply({"params": state.d.params}, x, train=False)[0]
    parts = {"train": x[:20], "held_out": x[20:], "fake": x_fake}
    return x_fake, {name: losses.real_logit(d_fn(part)).mean() for name, part in parts.items()}

  x_fake, expected = by_hand(state, x)
  for name, value in expected.items():
    np.testing.assert_allclose(m[f"diagnostics/real_logit_{name}"], value, rtol=1e-4)
  np.testing.assert_allclose(
    m["diagnostics/variance_ratio"], np.var(x_fake, 0).mean() / np.var(x[:20], 0).mean(), rtol=1e-4
  )


# --- Alarms, each on networks that actually have the fault


@functools.cache
def compiled_d_alone():
  """D alone against generated noise: state, forty steps and diagnostics as compiled functions."""
  g, d = Images(noise), DenseD()
  objective = objectives.Objective(d={"adversarial": (1.0, terms.adversarial_d(losses.non_saturating))})

  def sample_batch(key, pool, _):
    x = pool[jax.random.randint(key, (12,), 0, len(pool))]
    return Batch(x[:0], jnp.zeros(0, jnp.int32), x, x, num_generated=12)

  txs = {"g_tx": TX, "d_tx": TX}
  state = steps.init_state(jax.random.key(0), g, d, **txs, x_init=noise(jax.random.key(1), 12))
  step = steps.make_step(g, d, **txs, objective=objective)
  multi_step = steps.make_multi_step(step, sample_batch, max_steps=40)
  return state, jax.jit(multi_step), jax.jit(diagnostics.make_diagnostics(g, d))


def train(state, multi_step, diagnose, pool, images, *, every):
  """Fifteen rows as the loop writes them, all with diagnostics."""
  rows = []
  for step in range(every, 15 * every + 1, every):
    state, history = multi_step(state, pool, np.int32(every))
    metrics = {name: values.mean() for name, values in history.items()}
    metrics |= diagnose(state, images)
    rows.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
  return rows


def d_alone(pool, x_held_out, change=lambda params: params):
  """Rows and alarms of 600 steps of D alone on the images of `pool`, from `change`d initial parameters."""
  state, *functions = compiled_d_alone()
  state = state.replace(d=state.d.replace(params=change(state.d.params)))
  rows = train(state, *functions, pool, on_device(pool[:12], x_held_out), every=40)
  return rows, sentences(rows, num_steps=600)


def test_d_that_learns_twelve_images_by_heart_is_told_from_one_that_cannot():
  """Real and generated images are the same kind of noise: D can only memorise."""
  pool, held_out = noise(jax.random.key(2), 6000), noise(jax.random.key(3), 12)
  rows, found = d_alone(jnp.tile(pool[:12], (500, 1, 1, 1)), held_out)
  assert rows[-1]["diagnostics/memorisation"] == pytest.approx(1, abs=0.3)
  assert "memorises" in found[0]
  assert "100 % of them" in found[0]
  assert not [text for text in found if "generator has" in text or "same image" in text]
  _, found = d_alone(pool, held_out)
  assert found == []


def test_d_saturates():
  """Bright images against noise: D is always right without memorising."""
  bright = 0.7 + 0.3 * noise(jax.random.key(2), 6012)
  _, found = d_alone(bright[:6000], bright[6000:])
  assert len(found) == 1
  assert "the discriminator has saturated: it recognises 100.0 %" in found[0]


def test_dead_units_hold_a_loss_still():
  """No unit of D ever fires, so its output is always 1/2 and its loss stays at 2 ln 2."""

  def kill(params):
    dead = {"kernel": jnp.zeros_like(params["Dense_0"]["kernel"]), "bias": -jnp.ones(64)}
    return {**params, "Dense_0": dead}

  pool = noise(jax.random.key(2), 6012)
  _, found = d_alone(pool[:6000], pool[6000:], kill)
  assert len(found) == 1
  assert found[0].startswith("d/loss is stuck: between 1.38629 and 1.38629 over the last 8 rows")


def diagnosed_rows(g, x, classify=None, change=lambda state: state):
  """Five rows of diagnostics of a generator, with losses that change."""
  state = change(steps.init_state(jax.random.key(0), g, DenseD(), g_tx=TX, d_tx=TX, x_init=x))
  diagnose, images = (
    jax.jit(diagnostics.make_diagnostics(g, DenseD(), classify=classify)),
    on_device(x, x[:0]),
  )
  rows = []
  for step in range(600, 1001, 100):
    metrics = {"d/loss": 1 + step / 1e4, "g/loss": 1.0} | diagnose(state, images)
    rows.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
  return rows


def test_generator_with_zero_parameters_draws_one_image(key):
  zero = lambda state: state.replace(ema={**state.ema, "g": jax.tree.map(jnp.zeros_like, state.ema["g"])})
  x = noise(key, 30)
  (found,) = sentences(diagnosed_rows(DenseG(), x, change=zero), num_steps=1000)
  assert "nearly the same image every time: the variance of its pixels is 0 of the data's" in found
  assert sentences(diagnosed_rows(DenseG(), x), num_steps=1000) == []


def test_generator_of_one_class_lacks_the_others_by_name(tiny):
  """Only images of class 1, classified by the position of their bright row."""
  x = data.to_float(tiny.dataset.x_train)
  classify = lambda x: x[:, 1:6:2].mean(axis=(2, 3))
  one = Images(lambda key, num: x[jax.random.randint(key, (num,), 20, 40)])
  rows = diagnosed_rows(one, x, classify)
  (found,) = sentences(rows, num_steps=1000, class_names=tiny.dataset.class_names)
  assert "lost 2 of 3 classes (a, c)" in found
  (found,) = sentences(rows, num_steps=1000)
  assert "(0, 2)" in found
  every = Images(lambda key, num: x[jax.random.randint(key, (num,), 0, 60)])
  assert sentences(diagnosed_rows(every, x, classify), num_steps=1000) == []


def test_healthy_gan_raises_no_alarm(make_tiny):
  tiny = make_tiny(network="mlp")
  tiny.g = networks.MLPGenerator((8, 8, 1), widths=(128,), latent_size=8)
  tiny.d = networks.MLPDiscriminator(3, widths=(128,))
  images = tiny.data.replace(x_held_out=tiny.dataset.x_test, y_held_out=jnp.full(30, -1))
  sample_batch = data.make_sample_batch(BatchSizes(6, 32, 32))
  multi_step = jax.jit(steps.make_multi_step(tiny.step(), sample_batch, max_steps=10))
  classify = lambda x: x[:, 1:6:2].mean(axis=(2, 3))
  diagnose = jax.jit(diagnostics.make_diagnostics(tiny.g, tiny.d, classify=classify))
  rows = train(tiny.state(), multi_step, diagnose, tiny.data, images, every=10)
  assert sentences(rows, num_steps=150) == []


GOOD = {f"diagnostics/share_{k}": 0.05 for k in range(20)} | {
  "diagnostics/memorisation": 0.1,
  "diagnostics/train_accuracy": 100.0,
  "diagnostics/fake_accuracy": 100.0,
  "diagnostics/variance_ratio": 0.9,
}


def made_up(*parts):
  """Rows `(how many, what differs)` from a good run in which D is always right and losses change."""
  metrics = [changes for num, changes in parts for _ in range(num)]
  return [
    {"step": i + 1, "d/loss": 1 / (i + 1), "g/loss": 1 + i, **GOOD, **m} for i, m in enumerate(metrics)
  ]


def test_what_was_recovered_from_and_the_first_tenth_do_not_count():
  bad = {
    "diagnostics/memorisation": 0.9,
    "diagnostics/variance_ratio": 0.1,
    "diagnostics/share_7": 0.0,
    "d/loss": 0.5,
  }
  assert len(sentences(made_up((20, {}), (20, bad)), num_steps=40)) == 4
  assert sentences(made_up((20, bad), (20, {})), num_steps=40) == []
  assert sentences(made_up((20, bad)), num_steps=200) == []
  assert sentences(made_up((18, {}), (2, bad)), num_steps=20) == []  # a minority of the latest five
  unseen = [{k: v for k, v in row.items() if "diagnostics" not in k} for row in made_up((18, bad))]
  assert len(sentences(unseen + made_up((2, {})), num_steps=20)) == 1  # the loss; two are too few
  assert sentences([], num_steps=20) == []


def test_a_generator_that_stands_still_against_a_d_that_is_always_right():
  """One alarm that names the cause, not a second one for the constant loss."""
  still = {"d/loss": 0.5, "g/loss": 3.0}
  (found,) = sentences(made_up((20, still)), num_steps=20)
  assert "has saturated" in found
  assert "the generator's loss does not move" in found
  found = sentences(made_up((20, still | {"diagnostics/fake_accuracy": 90.0})), num_steps=20)
  assert [text[:15] for text in found] == ["d/loss is stuck", "g/loss is stuck"]
  assert sentences(made_up((20, {})), num_steps=20) == []


def test_many_missing_classes_are_cut_short():
  (found,) = sentences(made_up((20, {f"diagnostics/share_{k}": 0.0 for k in range(1, 20)})), num_steps=20)
  assert "lost 19 of 20 classes (1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 9 more)" in found


def test_a_rare_class_is_lost_only_relative_to_its_frequency():
  """A class below 2 % is absent from 500 images by chance."""
  shares = (0.958, 0.042, *[0.0] * 18)
  rows = made_up((20, {f"diagnostics/share_{k}": share for k, share in enumerate(shares)}))
  (found,) = sentences(rows, num_steps=20)
  assert "lost 18 of 20 classes (2, 3, " in found
  assert "and an equal share is 5 %" in found  # what the share of the data is, nobody has said
  assert sentences(rows, num_steps=20, class_prior=(0.95, 0.04, 0.01, *[0.0] * 17)) == []
  (found,) = sentences(rows, num_steps=20, class_prior=(0.45, 0.45, 0.1, *[0.0] * 17))
  assert (
    "lost 2 of 20 classes (1, 2): each makes up at most 4.2 % of its images, and at least 10 %" in found
  )


def test_a_generator_that_draws_one_class_after_the_other_has_not_lost_them_all():
  rows = made_up((20, {f"diagnostics/share_{k}": 0.0 for k in range(20)}))
  for i, row in enumerate(rows):
    row[f"diagnostics/share_{i % 20}"] = 1.0
  (found,) = sentences(rows, num_steps=20)
  assert (
    "draws only a few of the 20 classes, and different ones each time: mostly each makes up at most 0 %"
    in found
  )
