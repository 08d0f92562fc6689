import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import _methods, label_study, mnist_ssgan
from gan_jax import data, networks
from gan_jax.types import InputError

SMALL = {"dataset": "digits", "network": "mlp", "steps": 2, "budgets": (20,), "splits": (0, 1)}


@pytest.fixture
def spied(monkeypatch):
  """What `_test_errors` was given, call by call, in a study of small networks."""

  def small_networks(network, dataset, small):
    g = networks.MLPGenerator(dataset.image_shape, widths=(8,))
    return networks.MLPDiscriminator(10, widths=(12, 8)), g, g.clone(norm="batch", num_classes=10)

  monkeypatch.setattr(_methods, "make_networks", small_networks)
  calls, inside = [], label_study._test_errors

  def spy(dataset, read, states, probes):
    calls.append(states)
    return inside(dataset, read, states, probes)

  monkeypatch.setattr(label_study, "_test_errors", spy)
  return calls


class Sealed:
  """Test data that tells how much of it there is, and nothing else."""

  def __init__(self, array):
    self.array = array

  def __len__(self):
    return len(self.array)

  def __getattr__(self, name):
    raise AssertionError(f"{name} of the test set was asked for")

  def __array__(self, *_, **__):
    raise AssertionError("the test set was read")

  __getitem__ = __iter__ = __array__


def test_two_methods_take_two_steps_and_only_test_errors_sees_the_test_set(tmp_path, spied, monkeypatch):
  load, look = data.load, label_study._test_errors

  def sealed(*args, **kwargs):
    dataset = load(*args, **kwargs)
    seals = {"x_test": Sealed(dataset.x_test), "y_test": Sealed(dataset.y_test)}
    return dataclasses.replace(dataset, **seals)

  def unsealed(dataset, *args):
    real = {"x_test": dataset.x_test.array, "y_test": dataset.y_test.array}
    return look(dataclasses.replace(dataset, **real), *args)

  monkeypatch.setattr("gan_jax.data.load", sealed)
  monkeypatch.setattr(label_study, "_test_errors", unsealed)
  config = label_study.Config(
    **SMALL, methods=("supervised_augmented", "gan_consistency"), workdir=str(tmp_path / "run")
  )
  result = label_study.main(config)
  assert result == json.loads((tmp_path / "run" / "result.json").read_text())
  names = [cell["method"] for cell in result["cells"]]
  assert names[0] == "supervised_augmented"
  assert names[-1] == "gan_consistency"
  assert {f"gan_consistency, {kind}, layer 2" for kind in ("linear probe", "nearest neighbour")} < set(
    names
  )
  assert len(spied) == 2  # once for each method and budget

  files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
  assert {"study.jsonl", "study.md", "study.png", "splits/20-0.json", "splits/20-1.json"} < files
  split = json.loads((tmp_path / "run" / "splits" / "20-1.json").read_text())
  expected = data.split_labels(load("digits").y_train, 2, 1)
  assert (split["sha256"], tuple(split["indices"])) == (expected.sha256, expected.indices)
  rows = [json.loads(line) for line in (tmp_path / "run" / "study.jsonl").read_text().splitlines()]
  assert all(row["sha256"][1] == expected.sha256 and row["versions"]["jax"] for row in rows)


def test_an_interrupted_study_goes_on_with_what_is_there(tmp_path, spied):
  config = label_study.Config(
    **SMALL, methods=("supervised", "fixmatch_ema"), workdir=str(tmp_path / "run")
  )
  result = label_study.main(config)
  path = tmp_path / "run" / "study.jsonl"
  first, second = path.read_text().splitlines(keepends=True)
  path.write_text(first + second[:40])
  again = label_study.main(dataclasses.replace(config, resume=True))
  assert len(spied) == 3
  assert [cell["errors"] for cell in again["cells"]] == [cell["errors"] for cell in result["cells"]]
  assert [json.loads(line)["method"] for line in path.read_text().splitlines()] == [
    "supervised",
    "fixmatch_ema",
  ]


def test_tuning_never_has_the_test_set():
  dataset = data.load("digits")
  found = label_study._without_test_set(dataset, seed=0)
  images = lambda x: {image.tobytes() for image in x}
  assert len(found.x_test) == len(dataset.x_train) // 3
  assert len(found.x_train) + len(found.x_test) == len(dataset.x_train)
  assert images(found.x_train) | images(found.x_test) == images(dataset.x_train)
  assert "not on the test set" in found.note


def test_a_replicate_does_not_depend_on_its_company(tmp_path, spied):
  """Split 1 alone and among others, and beside another budget: the same states, to rounding."""
  for name, changes in (("a", {}), ("b", {"splits": (1,), "budgets": (50, 20)})):
    flags = SMALL | changes | {"methods": ("supervised",), "workdir": str(tmp_path / name)}
    label_study.main(label_study.Config(**flags))
  among, other, alone = (state.d.params for state in spied)
  close = [
    np.allclose(a[1], b[0], atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (among, alone)), strict=True)
  ]
  far = [np.allclose(a, b, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (other, alone)), strict=True)]
  assert all(close)
  assert not any(far)


BAD = [
  ({"splits": (99, 100)}, "for tuning: add --tune"),
  ({"splits": (99, 100), "tune": True}, "seeds from 100 on"),
  ({"splits": ()}, "--splits must name at least one"),
  ({"splits": (-1,)}, "--splits must not be negative"),
  ({"tensorboard": True}, "--tensorboard is not for the study"),
  ({"methods": ("vat", "vat")}, "none twice"),
  ({"budgets": (25,)}, "--budgets 25 is not a multiple of the 10 classes"),
  ({"budgets": (0,)}, "--budgets 0 is not a multiple"),
  ({"budgets": (20_000,)}, "a class has but"),
  ({"labels_per_class": 3}, "use --budgets and --splits"),
  ({"exclude_labelled": True}, "not for the study"),
  ({"vat_epsilon": -0.1}, "--vat-epsilon must not be negative, and it is -0.1"),
  ({"class_balance": (1.0, -1.0)}, "--balance must not be negative"),
  ({"num_images": 100}, "--num-images is not for the study"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_flags(flags, words, tmp_path):
  with pytest.raises(InputError, match=words):
    label_study.main(label_study.Config(dataset="digits", workdir=str(tmp_path / "run"), **flags))
  assert not (tmp_path / "run" / "config.json").exists()


def test_images_too_small_for_the_networks_leave_no_run(tmp_path):
  flags = {"dataset": "digits", "image_size": 4, "steps": 2, "workdir": str(tmp_path / "run")}
  with pytest.raises(InputError, match="8x8"):
    label_study.main(label_study.Config(**flags))
  assert not (tmp_path / "run" / "config.json").exists()


def test_each_method_is_another_objective_over_the_same_batches():
  config = label_study.Config()
  recipe = _methods.make_recipe(config, few=True)
  methods = _methods.make_methods(config, recipe, norm=3.0)
  assert tuple(methods) == config.methods
  terms = {name: frozenset(method.objective.d) for name, method in methods.items()}
  assert terms["supervised"] == terms["supervised_augmented"] == {"supervised"}
  assert len(set(terms.values())) == len(methods) - 1
  assert [name for name, method in methods.items() if not method.augmented] == ["supervised"]
  balanced = [name for name, method in methods.items() if "class_balance" in method.objective.d]
  assert balanced == [name for name, method in methods.items() if method.uses_unlabelled]
  assert {"fixmatch_ema", "mean_teacher", "vat", "feature_matching"} < set(balanced)
  assert {"consistency", "class_balance"} < set(methods["gan_augmented"].before.objective.d)
  off = label_study.Config(consistency=0.0, balance=(0.0, 0.0))
  methods = _methods.make_methods(off, _methods.make_recipe(off, few=True), norm=3.0)
  assert terms["supervised"] == set(methods["fixmatch_ema"].objective.d)  # no weight, no term


def test_the_learning_rate_warms_up_and_falls_to_a_fifth_and_no_lower():
  recipe = mnist_ssgan.RECIPES["conv"]
  rate = mnist_ssgan.learning_rate(recipe, 2.0)
  found = [float(rate(t)) for t in (0, 49, recipe.steps // 2, recipe.steps, 2 * recipe.steps)]
  fall = np.cos(7 / 16 * np.pi * np.array([49 / recipe.steps, 0.5, 1, 1]))
  np.testing.assert_allclose(found, [2 / 50, *(2 * fall)], rtol=1e-5)
  assert mnist_ssgan.learning_rate(mnist_ssgan.RECIPES["mlp"], 2.0) == 2.0


def test_without_augmentation_consistency_compares_the_images_as_they_are(key):
  recipe = _methods.make_recipe(label_study.Config(network="mlp", augmentation=False), few=True)
  assert recipe.strong is None
  x = np.float32(np.random.default_rng(0).uniform(size=(2, 4, 4, 1)))
  np.testing.assert_array_equal(mnist_ssgan.weak(recipe)(key, x), x)
  recipe = _methods.make_recipe(label_study.Config(network="mlp"), few=True)
  assert (mnist_ssgan.weak(recipe)(key, x) != x).any()


def test_markdown_and_verdicts(tmp_path):
  rows = [
    {"budget": 20, "method": method, "num_labels": 20, "splits": [0, 1, 2], "errors": errors}
    for method, errors in (
      ("supervised_augmented", [5.0, 6.0, 7.0]),
      ("vat", [4.0, 5.1, 6.1]),
      ("mean_teacher", [5.1, 5.8, 30.0]),
    )
  ]
  cells = label_study.summarise(rows)
  assert [cell["against"].get("supervised_augmented", {}).get("verdict") for cell in cells] == [
    None,
    "helps",
    "cannot tell",
  ]
  assert [round(cell["failure_rate"], 2) for cell in cells] == [0, 0, 0.33]
  run = type("Run", (), {"dataset": data.load("digits")})
  table = label_study.markdown(cells, run)
  head = "| mean +- std | 20 labels |\n|---|---|\n| supervised_augmented | 6.00 +- 1.00 |\n"
  assert head + "| vat | 5.07 +- 1.05 |\n" in table
  assert (
    "| less supervised_augmented | 20 labels |\n|---|---|\n| vat | -0.93 (-1.08 to -0.79): helps |" in table
  )
  assert "| vat | 5.07 +- 1.05 | 2.46 to 7.68 | 5.10 | 4.00 | 6.10 | 0 % | -0.93" in table
  assert "-0.93 (-1.08 to -0.79): helps" in table
  assert np.isclose(cells[1]["against"]["supervised_augmented"]["mean"], -2.8 / 3)
