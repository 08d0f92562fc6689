import dataclasses
import json
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal

from experiments import label_study
from gan_jax import (
  checkpoint,
  data,
  datasets,
  networks,
  objectives,
  parsing,
  probe,
  recipes,
  steps,
  terms,
  train,
)
from gan_jax.recipes import gan, policies, ssgan, study
from gan_jax.types import InputError

SHAPE = (8, 8, 1)


def described(recipe):
  """Through JSON and back, as a run stores it."""
  return json.loads(json.dumps(recipes.describe(recipe)))


FAMILIES = {
  "ssgan": lambda: ssgan.build(ssgan.tuned("conv", 500), SHAPE, 3),
  "ssgan/control": lambda: recipes.supervised_control(ssgan.build(ssgan.tuned("mlp", 500), SHAPE, 3)),
  "ssgan/frozen": lambda: recipes.with_frozen(ssgan.build(ssgan.tuned("conv", 10**5), SHAPE, 3), 2),
  "gan": lambda: gan.build(gan.tuned("conv_fine", "wgan_gp"), SHAPE, 3),
  "gan/all": lambda: gan.build(
    dataclasses.replace(gan.tuned("article"), labels="all", augmentation="adaptive", rotation=1.0), SHAPE, 3
  ),
  "study": lambda: study.build(study.tuned("conv", 500, 8, "mean_teacher"), SHAPE, 3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_is_built_again_from_its_description(name):
  """Everything else follows from the description; tests/test_experiments.py compares the programs."""
  recipe = FAMILIES[name]()
  again = recipes.rebuild(described(recipe))
  assert described(again) == described(recipe)
  plain = [field.name for field in dataclasses.fields(recipe) if field.name not in ("g_tx", "d_tx")]
  for field in set(plain) - {"objective", "augment"}:
    assert getattr(again, field) == getattr(recipe, field), field
  assert list(again.objective.d) == list(recipe.objective.d)
  assert list(again.objective.g) == list(recipe.objective.g)
  assert again.by_class == recipe.by_class


def test_a_description_of_another_version_is_a_sentence():
  stored = described(FAMILIES["ssgan"]())
  for change in (
    {"family": "gan_of_tomorrow"},
    {"hparams": {**stored["hparams"], "temperature": 1.0}},
    {"derived": [["with_wings", {}]]},
  ):
    with pytest.raises(InputError, match="from another version of gan_jax"):
      recipes.rebuild({**stored, **change})


@pytest.mark.parametrize("tuned", [lambda name: ssgan.tuned(name, 500), gan.tuned])
def test_a_network_that_was_not_tuned_has_no_tuned_recipe(tuned):
  with pytest.raises(InputError, match="no tuned recipe for the network conv_small"):
    tuned("conv_small")


def test_a_control_differs_in_its_other_images_alone():
  recipe = FAMILIES["ssgan"]()
  control = recipes.supervised_control(recipe)
  same = {"g", "d", "g_tx", "d_tx", "num_steps", "ema_decay", "augment", "image_shape", "hparams"}
  assert all(getattr(control, name) is getattr(recipe, name) for name in same)
  assert control.batch == (recipe.batch.labelled, 0, 0)
  assert (list(control.objective.d), control.objective.g) == (["supervised"], {})
  no_gan = recipes.without_generator(recipe)
  assert no_gan.batch == recipe.batch._replace(generated=0)
  assert set(recipe.objective.d) - set(no_gan.objective.d) == {"adversarial"}
  assert recipes.without_augmentation(recipe).augment is None


def of_study(method):
  return study.build(study.tuned("mlp", 500, 8, method), SHAPE, 3)


@pytest.mark.parametrize("method", [name for name in study.METHODS if of_study(name).batch.generated])
def test_without_a_generator_no_term_needs_one(method, small_mlp):
  recipe = of_study(method)
  alone = recipes.without_generator(recipe)
  assert (alone.batch.generated, alone.has_generator) == (0, False)
  assert "supervised" in alone.objective.d
  sample = data.make_sample_batch(alone.batch)
  batch = jax.eval_shape(sample, jax.random.key(0), alone._one_image())
  jax.eval_shape(alone.make_step(), alone.abstract_state(), batch)


def test_further_terms_are_described_by_name_and_only_code_can_train_with_them():
  recipe = FAMILIES["ssgan"]()
  more = recipes.with_terms(recipe, own=(0.1, terms.entropy))
  assert described(more) != described(recipe)
  again = recipes.rebuild(described(more))
  assert described(again) == described(more)
  assert again.d == more.d
  with pytest.raises(ValueError, match="the terms own are code"):
    assert again.flops


@pytest.mark.parametrize("name", objectives.OTHER_METRICS)
def test_a_term_does_not_take_the_place_of_another_metric(name):
  with pytest.raises(ValueError, match=f"a term cannot be called {name}"):
    recipes.with_terms(FAMILIES["ssgan"](), **{name: (0.1, terms.entropy)})


def test_the_count_of_operations_is_the_same_on_accelerators(monkeypatch):
  """JAX counts no operations of their uncompiled programs, so the program is lowered for the CPU."""
  counted = FAMILIES["ssgan"]().flops
  monkeypatch.setattr("jax.default_backend", lambda: "gpu")
  assert FAMILIES["ssgan"]().flops == counted
  monkeypatch.setattr("jax.local_devices", _no_cpu)
  with pytest.raises(InputError, match="add ,cpu to JAX_PLATFORMS"):
    FAMILIES["ssgan"]().flops  # noqa: B018


def _no_cpu(*, backend):
  raise RuntimeError(f"Unknown backend {backend}")


def test_more_layers_than_d_has_cannot_be_frozen():
  recipe = FAMILIES["ssgan"]()
  assert recipes.with_frozen(recipe, 0) is recipe
  recipes.with_frozen(recipe, 3)
  for num, message in (
    (4, "D has only 3 layers before its head: 4 cannot be frozen"),
    (-1, "must not be negative, as -1 is"),
  ):
    with pytest.raises(InputError, match=message):
      recipes.with_frozen(recipe, num)


def test_arithmetic_is_matched_by_the_count_of_operations():
  """More unlabelled images make up for the generator and its images; nothing else changes."""
  hparams = dataclasses.replace(ssgan.tuned("mlp", 500), network="article", consistency=1.0)
  recipe = ssgan.build(hparams, SHAPE, 3)
  alone = recipes.without_generator(recipe)
  matched = recipes.with_flops_of(alone, recipe)
  assert alone.flops < 0.8 * recipe.flops
  assert matched.flops == pytest.approx(recipe.flops, rel=0.01)
  assert matched.batch == alone.batch._replace(unlabelled=matched.batch.unlabelled)
  assert matched.batch.unlabelled > alone.batch.unlabelled
  again = recipes.rebuild(described(matched))
  assert (again.batch, described(again)) == (matched.batch, described(matched))
  control = recipes.supervised_control(recipe)
  for impossible, message in (
    ((control, recipe), "matched by unlabelled images, but this recipe has none"),
    ((recipe, control), "even without unlabelled images, this recipe costs more"),
  ):
    with pytest.raises(InputError, match=message):
      recipes.with_flops_of(*impossible)


def test_the_learning_rate_warms_up_and_falls_to_a_fifth_and_no_lower():
  hparams = ssgan.tuned("conv", 10**5)
  rate, num = recipes.learning_rate(hparams.schedule, hparams.num_steps, 2.0), hparams.num_steps
  found = [float(rate(t)) for t in (0, 49, num // 2, num, 2 * num)]
  fall = np.cos(7 / 16 * np.pi * np.array([49 / num, 0.5, 1, 1]))
  np.testing.assert_allclose(found, [2 / 50, *(2 * fall)], rtol=1e-5)
  assert recipes.learning_rate("constant", 10, 2.0) == 2.0
  rate = recipes.learning_rate("linear", gan.tuned("conv_fine").num_steps, 2.0)
  assert [float(rate(t)) for t in (0, 2000, 3000, 4000)] == [2.0, 2.0, 1.0, 0.0]


def test_without_weights_there_are_no_other_images():
  """So transfer's fine-tuning and its control see the same images."""
  zeros = {"adversarial": 0.0, "consistency": 0.0, "class_balance": (0.0, 0.0)}
  recipe = ssgan.build(dataclasses.replace(ssgan.tuned("conv", 500), **zeros), SHAPE, 3)
  assert recipe.batch == (50, 0, 0)
  assert list(recipe.objective.d) == ["supervised"]


def test_each_method_of_the_study_is_another_objective_over_the_same_batches():
  dataset = datasets.load("digits")
  config = label_study.Config()
  methods = {name: label_study.make_recipe(config, dataset, name) for name in get_args(study.Method)}
  assert len(methods) == 16
  names = {name: frozenset(recipe.objective.d) for name, recipe in methods.items()}
  assert names["supervised"] == names["supervised_augmented"] == {"supervised"}
  assert len(set(names.values())) == len(methods) - 1
  assert [name for name, recipe in methods.items() if recipe.augment is None] == ["supervised"]
  balanced = {name for name, recipe in methods.items() if "class_balance" in recipe.objective.d}
  aligned = {name for name, recipe in methods.items() if "adamatch" in recipe.objective.d}
  assert aligned == {"adamatch", "gan_adamatch"}
  assert balanced | aligned == {name for name, recipe in methods.items() if recipe.batch.unlabelled}
  assert not balanced & aligned
  assert {"fixmatch_ema", "mean_teacher", "vat", "feature_matching"} < balanced
  assert len({(recipe.d, recipe.num_steps, recipe.batch.labelled) for recipe in methods.values()}) == 1
  first = study.generator_of(methods["gan_augmented"])
  assert first is not None
  assert {"consistency", "class_balance"} < set(first.objective.d)
  assert first.g == methods["gan_augmented"].g
  assert all(study.generator_of(methods[name]) is None for name in methods if name != "gan_augmented")
  off = parsing.with_flags(config, consistency=0.0, class_balance=(0.0, 0.0))
  assert list(label_study.make_recipe(off, dataset, "fixmatch_ema").objective.d) == ["supervised"]


def test_vat_of_a_recipe_is_that_of_the_study():
  """The study turns it on by method, so that its weight adds it to no other."""
  dataset = datasets.load("digits")
  theirs = label_study.make_recipe(label_study.Config(augment="none"), dataset, "vat")
  shared = {name: getattr(theirs.hparams, name) for name in ("vat", "vat_epsilon", "class_balance", "ramp")}
  hparams = ssgan.tuned("conv", 500, "none")
  ours = ssgan.build(dataclasses.replace(hparams, adversarial=0.0, consistency=0.0, **shared), SHAPE, 3)
  assert set(ours.objective.d) == set(theirs.objective.d)
  assert {"virtual_adversarial", "entropy"} < set(ours.objective.d)
  assert (ours.batch.unlabelled, ours.batch.generated) == (64, 0)
  assert hparams.vat == 1.0
  x, y = dataset.x_train, dataset.y_train[:9]
  measured = ssgan.for_data(x, y, 10, network="conv", policy="none")
  assert (measured.vat, measured.consistency) == (1.0, 0.0)
  assert measured.vat_epsilon == ssgan.VAT_EPSILON * data.mean_norm(x)
  assert ssgan.for_data(x, y, 10, network="conv", policy="none", vat=0.0).vat_epsilon == 1.0
  assert "consistency" not in ssgan.build(hparams, SHAPE, 3).objective.d
  assert "virtual_adversarial" not in ssgan.build(ssgan.tuned("conv", 500), SHAPE, 3).objective.d
  for with_augmentation in (ssgan.tuned("conv", 500), ssgan.tuned("vgg", 20_000, "photos")):
    assert (with_augmentation.vat, with_augmentation.consistency) == (0.0, 1.0)
  again = recipes.rebuild(described(ours))
  assert described(again) == described(ours)
  default = study.build(study.tuned("conv", 500, 8, "gan_vat"), SHAPE, 3)
  assert (default.hparams.vat, "virtual_adversarial" in default.objective.d) == (1.0, True)


def test_without_augmentation_consistency_compares_the_images_as_they_are(key):
  dataset = datasets.load("digits")
  config = label_study.Config(network="mlp", augment="none")
  x = np.float32(np.random.default_rng(0).uniform(size=(2, 4, 4, 1)))
  hparams = label_study.make_recipe(config, dataset, "fixmatch_ema").hparams
  assert (hparams.strong, hparams.weak) == (None, None)
  np.testing.assert_array_equal(jax.jit(ssgan.weak(hparams))(key, x), x)
  hparams = label_study.make_recipe(label_study.Config(network="mlp"), dataset, "fixmatch_ema").hparams
  assert (jax.jit(ssgan.weak(hparams))(key, x) != x).any()


# --- A user-defined network with its own layer names


class Residual(nn.Module):
  """Two residual layers whose names are not those of the package, and a head."""

  width: int = 8
  num_classes: int = 3

  def layers(self, image_shape):
    return ("stem", "body")

  @nn.compact
  def __call__(self, x, *, train):
    h = Stem(self.width, name="stem")(x.reshape(-1, 64))
    features = Body(self.width, name="body")(h)
    return nn.Dense(self.num_classes, name="judgement")(features), features


class Stem(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Dense(self.width)(x))


class Body(nn.Module):
  width: int

  @nn.compact
  def __call__(self, h):
    return h + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(h)))


@pytest.fixture
def residual(tiny, tmp_path):
  """The tiny problem with the residual D, trained for two steps in `tmp_path / "run"`."""
  tiny.d = Residual()
  fit = train.fit(tiny.recipe(2), tiny.data, jax.random.key(0), workdir=tmp_path / "run")
  return tiny, fit.state, tmp_path / "run"


def test_a_network_of_ones_own_is_frozen_probed_transferred_and_saved(residual):
  tiny, trained, folder = residual
  with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
    assert all(leaves_equal(checkpoints.restore(trained), trained))

  layers = jax.jit(probe.make_layers(tiny.d, SHAPE))(trained, data.to_float(tiny.data.x_lab))
  assert {name: h.shape for name, h in layers.items()} == {"stem": (6, 8), "body": (6, 8)}
  features = jax.jit(steps.make_classifier(tiny.d))(trained, data.to_float(tiny.data.x_lab))[1]
  np.testing.assert_allclose(layers["body"], features, rtol=1e-6)

  other = tiny.recipe(3, d=Residual(num_classes=5))
  notes = []

  def start(state):
    state, found = checkpoint.transfer(state, folder, layers=other.d.layers(SHAPE), parts=("d",))
    notes.extend(found)
    return state

  frozen = recipes.with_frozen(other, 1)
  images = tiny.data.replace(y_lab=tiny.data.y_lab + jnp.int32(2))
  state = train.fit(frozen, images, jax.random.key(1), start=start).state
  assert notes == ["D's judgement is new: 5 outputs here, 3 outputs there"]
  assert all(leaves_equal(state.d.params["stem"], trained.ema["d"]["stem"]))
  fresh = other.init_state(jax.random.key(1), images).d.params
  for name in ("body", "judgement"):
    assert not any(leaves_equal(state.d.params[name], fresh[name]))
  assert not any(leaves_equal(state.d.params["body"], trained.ema["d"]["body"]))


def test_a_gan_of_objects_mirrors(key):
  x = jax.random.uniform(key, (64, 8, 8, 3))
  hparams = recipes.gan.Hparams(augmentation="affine", policy="photos", flip=True)
  policies_without = {"photos": policies.POLICIES["photos"]._replace(strong={})}
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(policies, "POLICIES", policies_without)
    mirrored = recipes.gan.build(hparams, (8, 8, 3), 3).augment(key, x)
  is_mirror = (mirrored == x[:, :, ::-1]).all(axis=(1, 2, 3))
  assert 10 < is_mirror.sum() < 54
  np.testing.assert_array_equal(mirrored[~is_mirror], x[~is_mirror])


def test_the_same_name_is_the_same_pair_everywhere():
  for family in ("conv", "mlp"):
    g, d = networks.make_pair(family, (28, 28, 1), num_logits=10)
    recipe = ssgan.build(ssgan.tuned(family, 10**5), (28, 28, 1), 10)
    other = study.build(study.tuned(family, 10**5, 28, "gan_consistency"), (28, 28, 1), 10)
    assert (recipe.g, recipe.d) == (other.g, other.d) == (g, d)
