"""Every experiment, two steps on the digits: result, files, recipes, and how often it reads test images."""

import json
import re
import types
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gan_jax
from experiments import (
  feature_network,
  label_study,
  mnist_conditional,
  mnist_gan,
  mnist_low_data,
  mnist_ssgan,
  transfer,
)
from gan_jax import classify, cli, data, evaluate, metrics, parsing, recipes, run_dir, train
from gan_jax.datasets import Dataset
from gan_jax.recipes import study
from gan_jax.types import InputError

CONTRACT = {
  *("experiment", "dataset", "num_labels", "label_split_sha256", "split_seed", "seed", "steps"),
  *("seconds_train", "seconds_total", "device", "versions", "commit"),
  *("test_error", "supervised_test_error", "probe_test_error"),
}
GENERATOR = {
  *("frechet", "frechet_to_training_set", "frechet_replayed_training_set"),
  *("classes_covered", "class_entropy", "alarms"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """The folder of a barely trained feature extractor of the digits, shared by all tests here."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, monkeypatch, reads, cache):
  """Runs an experiment for two steps with a sealed test set, and checks what holds for every experiment."""
  monkeypatch.setattr("gan_jax.metrics.feature_network.default_steps", lambda num_images: 2)
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  open_run, opened = run_dir.open_run, []

  def spy(experiment, config, *args, **kwargs):
    opened.append((Path(config.run.workdir), kwargs))
    return open_run(experiment, config, *args, **kwargs)

  monkeypatch.setattr(run_dir, "open_run", spy)

  def two_steps(module, **flags) -> dict:
    path = tmp_path / "run"
    shared = {"dataset": "digits", "steps": 2, "workdir": str(path)}
    config = parsing.with_flags(module.Config(), **shared | flags)
    parsing.check(config)
    result = module.main(config)
    assert result.keys() >= CONTRACT
    assert result == json.loads((path / "result.json").read_text())
    assert result["experiment"] == module.__name__.rpartition(".")[2]
    assert opened or flags.get("resume")
    for folder, kwargs in opened:
      check_files(folder, kwargs["files"])
      check_recipes(folder, kwargs["recipes_used"])
    opened.clear()
    return result

  return two_steps


def check_files(folder, declared):
  """An experiment writes what it declares, and nothing that --overwrite would leave behind."""
  written = {path.name for path in folder.iterdir()} - {".lock"}
  assert {"config.json", "labels.json", "result.json", "report.html"} <= written
  assert written <= {*run_dir.FILES, *declared}


def check_recipes(folder, used):
  """`rebuild` restores the trained recipe from disk: the same program."""
  stored = json.loads((folder / "config.json").read_text())
  assert stored["class_names"] == [str(k) for k in range(10)]
  assert stored["recipes"].keys() == used.keys()
  for name, recipe in used.items():
    rebuilt = recipes.rebuild(stored["recipes"][name])
    assert recipes.describe(rebuilt) == recipes.describe(recipe)
    assert (rebuilt.num_steps, rebuilt.by_class) == (recipe.num_steps, recipe.by_class)
    if not recipe.derived:  # otherwise by the functions that were applied here, too
      assert program(rebuilt) == program(recipe)


def program(recipe) -> str:
  """Initialisation and step as text, without the addresses of Python's functions."""
  x = jax.ShapeDtypeStruct((20, *recipe.image_shape), jnp.uint8)
  y = jax.ShapeDtypeStruct((20,), jnp.int32)
  images = data.DeviceData(x, y, x, x, y)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(recipe.init_state, key, images)
  sample_batch = data.make_sample_batch(recipe.batch)

  def step(key, images, state):
    return recipe.make_step()(state, sample_batch(key, images))

  text = str(jax.tree.map(lambda a: a, state)) + str(jax.make_jaxpr(step)(key, images, state))
  return re.sub(r"0x[0-9a-f]+", "", text)


def made(counts):
  """Black images of two classes, `counts` of each, without a test set."""
  y = np.repeat([0, 1], counts)
  x = np.zeros((len(y), 8, 8, 1), np.uint8)
  return Dataset("made", x, y, x[:0], y[:0], ("a", "b"))


def test_class_balance_is_to_the_frequencies_of_the_labels():
  dataset = made((3, 1))
  config = parsing.with_flags(classify.Config(network="mlp"), class_balance=(1.0, 1.0))
  recipe = classify.make_recipe(config, dataset, data.split_labels(dataset.y_train, None, 0))
  term = recipe.objective.d["class_balance"][1]
  outputs = types.SimpleNamespace(unl=types.SimpleNamespace(logits=jnp.log(jnp.array([[4 / 6, 2 / 6]]))))
  np.testing.assert_allclose(term(outputs), 0, atol=1e-6)  # these are the smoothed frequencies


@pytest.mark.parametrize(("counts", "num"), [((1, 4), 0), ((2, 9), 2), ((6, 9), 5)])
def test_there_are_at_most_as_many_folds_as_labels_of_a_class(counts, num, capsys):
  dataset = made(counts)
  assert len(classify._folds(dataset, data.split_labels(dataset.y_train, None, 0), 5)) == num
  assert ("class a has a single label" in capsys.readouterr().err) == (num == 0)


@pytest.mark.parametrize("method", get_args(study.Method))
def test_every_method_of_the_study_takes_a_step(method, small_mlp, key):
  digits = cli.load(cli.DataFlags("digits"))
  recipe = label_study.make_recipe(label_study.Config(network="mlp"), digits, method)
  images = data.DeviceData.from_arrays(digits.x_train[:20], digits.y_train[:20], digits.x_train[:50])
  batch = jax.eval_shape(data.make_sample_batch(recipe.batch), key, images)
  _, found = jax.eval_shape(recipe.make_step(), recipe.abstract_state(), batch)
  assert {f"{net}/{name}" for net in "dg" for name in getattr(recipe.objective, net)} <= found.keys()


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_mnist_ssgan(network, run, reads, small_mlp, tmp_path, monkeypatch):
  monkeypatch.setattr(classify, "_NUM_SCORED", 300)
  result = run(mnist_ssgan, network=network, labels_per_class=5, frechet=network == "mlp")
  assert (result["num_labels"], result["steps"], result["interrupted"]) == (50, 2, False)
  for name in ("test_error", "supervised_test_error", "probe_test_error"):
    assert 0 <= result[name] <= 100
  low, high = result["test_error_interval"]
  assert low < result["test_error"] < high
  assert (len(result["test_recall"]), result["num_test_images"]) == (10, 599)
  assert 0 <= result["calibration_error"] <= 1
  # Once for the run, its control, its probe and its page; before that, once for the moments of a distance.
  assert reads == ["digits"] * (1 + (network == "mlp"))
  distances = [key for key in result if key.startswith("frechet_") and key.endswith("_n300")]
  assert len(distances) == (network == "mlp")
  opened = evaluate.with_test_set(cli.load(cli.DataFlags("digits")))
  probs = gan_jax.load(tmp_path / "run").predict(opened.x_test)
  assert 100 * np.mean(probs.argmax(axis=1) != opened.y_test) == pytest.approx(result["test_error"])
  files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
  pictures = {"samples/last.png", "learning_curves.png", "confusion.png", "reliability.png"}
  assert {"metrics.jsonl", *pictures} <= files
  assert any(name.startswith("checkpoints/2/") for name in files)


class ReachedError(Exception):
  """Training would start here."""


GIVEN = {"precision": "bfloat16", "batch_size": 32}
D_FLAGS = {**GIVEN, "learning_rate": 0.1, "vat": 0.5, "consistency": 0.2}
D_HPARAMS = {"precision": "bfloat16", "num_unlabelled": 32, "d_learning_rate": 0.1, "vat": 0.5}
G_FLAGS = {**GIVEN, "gamma": 3.0, "num_scored": 0, "norm": "spectral"}
G_HPARAMS = {**GIVEN, "gamma": 3.0, "norm": "spectral"}


@pytest.mark.parametrize(
  ("module", "flags", "hparams"),
  [
    (mnist_ssgan, D_FLAGS, {**D_HPARAMS, "consistency": 0.2}),
    (mnist_gan, G_FLAGS, G_HPARAMS),
    (mnist_conditional, G_FLAGS, G_HPARAMS),
  ],
)
def test_flags_reach_training(module, flags, hparams, tmp_path, monkeypatch):
  """Those of the objective in the recipe, those of the data in the images."""
  seen = []

  def fit(recipe, images, key, **kwargs):
    seen.append((recipe, images, kwargs))
    raise ReachedError

  monkeypatch.setattr(train, "fit", fit)
  (tmp_path / "config.json").write_text("{}")
  images = {"dataset": "digits", "labels_per_class": 5, "hold_out": 30, "exclude_labelled": True}
  transfer = {"init_from": str(tmp_path), "freeze_d": 1}
  config = parsing.with_flags(module.Config(), workdir=str(tmp_path / "run"), **images | transfer | flags)
  with pytest.raises(ReachedError):
    module.main(config)
  ((recipe, images, kwargs),) = seen
  assert (len(images.x_lab), len(images.x_unl), len(images.x_held_out)) == (50, 1198 - 30 - 50, 30)
  assert kwargs["start"] is not None
  assert recipe.derived == (("with_frozen", {"num_layers": 1}),)
  assert {name: getattr(recipe.hparams, name) for name in hparams} == hparams
  equal = module is not mnist_gan  # five labels of each class, or drawn equally often
  assert (kwargs["class_prior"] is None) == equal
  if module is mnist_ssgan:
    x = evaluate.with_test_set(cli.load(cli.DataFlags("digits"))).x_train
    assert recipe.hparams.vat_epsilon == 0.4 * data.mean_norm(x)


def test_mirror_images_of_objects_keep_their_class():
  """So they are the default for such datasets, and only there."""
  x, y = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 2
  split = data.split_labels(y, 2, 0)
  found = {}
  for name in ("cifar10", "svhn_cropped"):
    dataset = Dataset(name, x, y, x, y, ("a", "b"))
    strong = classify.make_recipe(classify.Config(), dataset, split).hparams.strong
    of_gan = mnist_gan.make_hparams(mnist_gan.GanFlags(), cli.TrainFlags(), dataset)
    found[name] = "flip" in strong, of_gan.flip, of_gan.rotation
  assert found == {"cifar10": (True, True, 1.0), "svhn_cropped": (False, False, 0.0)}


def test_a_small_part_of_the_images_is_small_data(reads):
  """--num-images 500 of a large set uses the recipe for 500 images."""
  dataset = evaluate.with_test_set(cli.load(cli.DataFlags("digits")))
  split = data.split_labels(dataset.y_train, 5, 0)
  recipe = lambda num: classify.make_recipe(classify.Config(), dataset, split._replace(images=(0,) * num))
  assert (recipe(500).num_steps, recipe(60_000).num_steps) == (1000, 10_000)


def test_num_images_choose_the_recipe(run, monkeypatch):
  """Also through `main`."""
  seen = []
  monkeypatch.setattr(recipes.ssgan, "tuned", lambda network, num, policy: seen.append(num) or 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(mnist_ssgan, num_images=150)
  assert seen == [150]


def test_mnist_gan(run, reads, tmp_path):
  result = run(mnist_gan, network="article", penalty="r1", rotation=1.0, num_scored=300)
  assert result.keys() >= GENERATOR
  assert any(name.startswith("frechet_digits-") and name.endswith("_n300") for name in result)
  (row, *_) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  names = {"diagnostics/real_logit_gap", "diagnostics/share_9"}
  assert row.keys() >= {"d/r1", "d/rotation", "g/rotation", *names}
  assert reads == ["digits"] * 2  # the feature extractor and the probe


@pytest.mark.parametrize("labels_per_class", ["all", 5])
def test_mnist_conditional(labels_per_class, run, reads, tmp_path):
  flags = {"network": "article", "labels_per_class": labels_per_class, "num_scored": 300}
  result = run(mnist_conditional, **flags)
  assert result.keys() >= {*GENERATOR, "class_agreement"}
  assert result["num_labels"] == (1139 if labels_per_class == "all" else 50)
  assert (tmp_path / "run" / "confusion.png").exists()
  assert reads == ["digits"] * 2


@pytest.mark.parametrize(
  ("flags", "names", "labels"),
  [
    ({"augments": ("fixed", "adaptive")}, ["50-percent-fixed", "50-percent-adaptive"], "none"),
    (
      {"augments": ("adaptive",), "conditional": True, "labels_per_class": "all"},
      ["50-percent-adaptive"],
      "all",
    ),
  ],
)
def test_mnist_low_data(flags, names, labels, run, reads):
  result = run(mnist_low_data, network="article", percents=(50.0,), num_scored=300, **flags)
  assert list(result["cells"]) == names
  assert {cell["num_images"] for cell in result["cells"].values()} == {570}
  assert {cell["recipe"]["hparams"]["labels"] for cell in result["cells"].values()} == {labels}
  strengths = [cell["augmentation_strength"] for cell in result["cells"].values()]
  assert [strength is not None for strength in strengths] == ["adaptive" in name for name in names]
  assert len(reads) == 2 * len(names)


def test_transfer_and_its_resumption(run, reads, tmp_path, capsys):
  flags = {"source": "digits", "pretrain_steps": 2, "splits": 1, "image_size": 8, "freeze_d": 1}
  result = run(transfer, **flags)
  assert "D's head is new: 10 outputs here, 1 output there" in capsys.readouterr().err
  assert len(result["fine_tuned_test_errors"]) == len(result["scratch_test_errors"]) == 1
  assert len(reads) == 2
  part = tmp_path / "run" / "split-0"
  terms = {key for line in (part / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
  assert "d/supervised" in terms
  assert not terms & {"d/adversarial", "d/consistency", "d/class_balance"}  # labels alone, as its control
  before = (part / "result.json").stat().st_mtime_ns
  again = run(transfer, **flags, resume=True)
  assert again["fine_tuned_test_errors"] == result["fine_tuned_test_errors"]
  assert (part / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  ("module", "flags", "sentence"),
  [
    (transfer, {"source": "digits", "image_size": 8, "freeze_d": 999}, "999 cannot be frozen"),
    (transfer, {"source": "arrays:wide.npz", "image_size": None}, "images of 8x9x1 and --dataset of 8x8x1"),
    (transfer, {"splits": 2**31 - 1}, "--splits must be at most 1,000"),
    (transfer, {"seed": 2**32 - 1, "splits": 2}, "the last of the --splits would have the seed"),
    (transfer, {"exclude_labelled": True}, "--exclude-labelled changes nothing here"),
    (mnist_conditional, {"num_scored": 2**31 - 1}, "is free: choose a smaller --num-scored"),
    (
      mnist_low_data,
      {"percents": (100.0, 0.01)},
      "--percents 0.01 of 1,139 training images rounds to none",
    ),
    (mnist_low_data, {"percents": (100.0, 1.0)}, "--percents 1: .* labels per class"),
  ],
)
def test_what_can_be_known_is_told_before_any_training(module, flags, sentence, run, tmp_path):
  x, y = np.zeros((2, 8, 9), np.uint8), np.arange(2)
  arrays = {"x": x, "y": y, "x_test": x, "y_test": y}
  np.savez("wide.npz", **arrays)
  with pytest.raises(InputError, match=sentence):
    run(module, **flags)
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_transfer_fine_tunes_the_discriminator_that_it_trains(shape):
  """Also in colour, where another pair is the default: the shapes of all layers match."""
  x, y = np.zeros((20, *shape), np.uint8), np.arange(20) % 2
  dataset = Dataset("made", x, y, x, y, ("a", "b"))
  flags = mnist_gan.GanFlags(norm="layer")
  source = recipes.gan.build(mnist_gan.make_hparams(flags, cli.TrainFlags(), dataset), shape, 2)
  pair = classify.make_recipe(transfer._pair(transfer.Config()), dataset, data.split_labels(y, 2, 0))
  of = lambda recipe: {
    name: jax.tree.map(jnp.shape, recipe.abstract_state().d.params[name]) for name in recipe.d.layers(shape)
  }
  assert of(pair) == of(source)


def test_transfer_gains_where_it_lowers_the_error():
  assert transfer.gains([4.0, 6.0], [5.0, 5.5]) == [1.0, -0.5]


def test_label_study(run, reads, small_mlp, tmp_path):
  methods = ("supervised_augmented", "gan_consistency")
  result = run(label_study, network="mlp", budgets=(20,), splits=(0, 1), methods=methods)
  names = [(cell["method"], cell["reading"]) for cell in result["cells"]]
  probes = [
    ("gan_consistency", f"{kind}, Block_{i}")
    for i in range(2)
    for kind in ("linear probe", "nearest neighbour")
  ]
  assert names == [
    ("supervised_augmented", "classifier"),
    *probes,
    ("gan_consistency", "classifier"),
  ]
  assert reads == ["digits"] * 2  # once for each method and budget
  labels = np.asarray(evaluate.with_test_set(cli.load(cli.DataFlags("digits"))).y_train)
  split = json.loads((tmp_path / "run" / "splits" / "20-1.json").read_text())
  expected = data.split_labels(labels, 2, 1)
  assert (split["sha256"], tuple(split["indices"])) == (expected.sha256, expected.indices)
  rows = [json.loads(line) for line in (tmp_path / "run" / "study.jsonl").read_text().splitlines()]
  assert all(row["sha256"][1] == expected.sha256 and row["versions"]["jax"] for row in rows)


def test_the_experiment_of_the_feature_extractor(reads, tmp_path, monkeypatch):
  monkeypatch.setattr("gan_jax.metrics.feature_network.default_steps", lambda num_images: 2)
  config = feature_network.Config(out=tmp_path / "deep" / "digits.npz", data=cli.DataFlags("digits"))
  result = feature_network.main(config)
  assert reads == ["digits"]
  assert result["bytes"] == (tmp_path / "deep" / "digits.npz").stat().st_size < 3e6
  written = metrics.read_feature_extractor(tmp_path / "deep" / "digits.npz", result["sha256"])
  assert result["feature_extractor"] == written.name
  digits = evaluate.with_test_set(cli.load(cli.DataFlags("digits")))
  assert result["fingerprint"] == metrics.feature_extractor.fingerprint(digits)
  assert f"frechet_{written.name}_n1198" in result
  with pytest.raises(InputError, match="is a folder: name a file"):
    feature_network.Config(out=tmp_path).check()


def test_every_experiment_has_a_docstring_with_its_command():
  paths = list(Path(mnist_ssgan.__file__).parent.glob("[!_]*.py"))
  assert len(paths) == 7
  for path in paths:
    assert f"python -m experiments.{path.stem}" in path.read_text().split('"""')[1], path.name
