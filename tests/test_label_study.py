import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import leaves_equal, use_small_mlp

from experiments import label_study
from gan_jax import datasets, parsing, recipes, replicates, results
from gan_jax.types import InputError

SMALL = {"dataset": "digits", "network": "mlp", "steps": 2, "budgets": (20,), "splits": (0, 1)}


AUGMENTED = {"methods": ("gan_augmented",), "steps": 5, "augment": "none"}


@pytest.fixture
def read(small_mlp, monkeypatch):
  """The evaluated states, cell by cell, in a study of small networks."""
  return spy_on_read(monkeypatch)


def spy_on_read(monkeypatch):
  states, inside = [], label_study.Study._read

  def spy(self, recipe, found, *args, **kwargs):
    states.append(found)
    return inside(self, recipe, found, *args, **kwargs)

  monkeypatch.setattr(label_study.Study, "_read", spy)
  return states


def save_often(monkeypatch):
  monkeypatch.setattr(label_study, "STEPS_PER_DISPATCH", 1)
  monkeypatch.setattr(label_study, "STEPS_PER_CHECKPOINT", 2)


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
  """A study of gan_augmented alone: its evaluated states, and G's parameters in each of its two trainings:
  the last ones, their averages, and the initial ones."""
  train, generators = label_study.Study.train, {}

  def spy(self, method, num_labels, recipe, keys, images):
    fit = train(self, method, num_labels, recipe, keys, images)
    averages, initial = fit.states.ema["g"], recipe.init_state(keys[0], images).g.params
    generators[method] = jax.tree.map(np.array, (fit.states.g.params, averages, initial))
    return fit

  with pytest.MonkeyPatch.context() as patch:
    use_small_mlp(patch)
    save_often(patch)
    patch.setattr(label_study.Study, "train", spy)
    read = spy_on_read(patch)
    study(tmp_path_factory.mktemp("augmented") / "run", **AUGMENTED)
  (states,) = read
  return states, generators


def study(path, **flags):
  config = parsing.with_flags(label_study.Config(), workdir=str(path), **SMALL | flags)
  parsing.check(config)
  return label_study.main(config)


def test_an_interrupted_study_goes_on_with_what_is_there(tmp_path, read):
  flags = {"methods": ("supervised", "label_spreading")}
  result = study(tmp_path / "run", **flags)
  path = tmp_path / "run" / "study.jsonl"
  first, second = path.read_text().splitlines(keepends=True)
  path.write_text(first + second[:40])
  again = study(tmp_path / "run", **flags, resume=True)
  assert len(read) == 1  # the finished cell is not trained again
  assert [cell["errors"] for cell in again["cells"]] == [cell["errors"] for cell in result["cells"]]
  names = [json.loads(line)["method"] for line in path.read_text().splitlines()]
  assert names == ["supervised", "label_spreading"]


def test_an_interrupted_cell_goes_on_where_it_was_saved(augmented, tmp_path, read, monkeypatch):
  """Bit for bit, over several devices; the saved states are gone once its line is written."""
  save_often(monkeypatch)
  compile_steps, calls = replicates.compile_steps, []

  def interrupted(recipe, *args):
    program = compile_steps(recipe, *args)

    def run(*now):
      if len(calls) == 8:
        raise ZeroDivisionError
      calls.append(recipe.hparams.method)
      return program.run(*now)

    return program._replace(run=run)

  with monkeypatch.context() as patch:  # in the fourth step of D, after the five of its generator
    patch.setattr(replicates, "compile_steps", interrupted)
    with pytest.raises(ZeroDivisionError):
      study(tmp_path / "run", **AUGMENTED)
  saved = tmp_path / "run" / "checkpoints"
  assert [path.name for path in sorted(saved.glob("*/*"))] == ["2", "2", "4"]
  # The generator has its two checkpoints, D its first; with that one D goes on and G is not trained again.
  calls.clear()
  with monkeypatch.context() as patch:
    patch.setattr(replicates, "compile_steps", interrupted)
    study(tmp_path / "run", **AUGMENTED, resume=True)
  assert calls == ["gan_augmented"] * 3
  (found,) = read
  assert all(leaves_equal(augmented[0], found))
  assert not saved.exists()


def test_a_cell_whose_newest_state_is_damaged_trains_all_its_steps(tmp_path, read, monkeypatch):
  save_often(monkeypatch)
  flags = {"methods": ("supervised",), "steps": 6}
  study(tmp_path / "whole", **flags)
  with monkeypatch.context() as patch:
    patch.setattr(label_study.Study, "_read", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      study(tmp_path / "run", **flags)
  (newest,) = (tmp_path / "run" / "checkpoints").glob("*/4")
  (newest / "_CHECKPOINT_METADATA").write_text("")
  study(tmp_path / "run", **flags, resume=True)
  assert read[1].step.tolist() == [6, 6]
  assert all(leaves_equal(read[0], read[1]))


def test_a_replicate_does_not_depend_on_its_company(tmp_path, read):
  """Split 1 alone, among others, and beside another budget: the same states up to rounding."""
  for name, changes in (("a", {}), ("b", {"splits": (1,), "budgets": (50, 20)})):
    study(tmp_path / name, methods=("supervised",), **changes)
  among, other, alone = (state.d.params for state in read)
  close = [
    np.allclose(a[1], b[0], atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (among, alone)), strict=True)
  ]
  far = [np.allclose(a, b, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (other, alone)), strict=True)]
  assert all(close)
  assert not any(far)


def test_all_methods_start_from_the_same_parameters_and_the_splits_do_not(tmp_path, read, monkeypatch):
  """Whatever the objective, D starts from the same parameters and key on the same split."""
  started = []

  def no_steps(recipe, states, images, max_steps):
    started.append(states)
    run = lambda states, images, num: (states, {"d/loss": np.zeros((2, 1))})
    return replicates.Program(run, max_steps)

  monkeypatch.setattr(replicates, "compile_steps", no_steps)
  monkeypatch.setattr(label_study.Study, "_read", lambda *_, **__: {"classifier": [0.0, 0.0]})
  methods = ("supervised", "gan_consistency", "vat", "gan_augmented")
  study(tmp_path / "run", methods=methods)
  assert len(started) == len(methods) + 1  # gan_augmented trains its generator first
  kernel = started[0].d.params["Block_0"]["Linear_0"]["kernel"]
  assert not np.array_equal(kernel[0], kernel[1])
  for states in started[1:]:
    assert all(leaves_equal([states.key, states.d.params], [started[0].key, started[0].d.params]))


def test_gan_augmented_starts_with_the_generator_that_was_trained_for_it(augmented):
  """Its generator has left its initial parameters, and is not changed while D is trained."""
  _, generators = augmented
  _, averages, initial = generators["gan_augmented's generator"]
  params, *_ = generators["gan_augmented"]
  assert all(leaves_equal(params, averages))
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(initial), strict=True)
  assert not any(np.array_equal(a[0], b) for a, b in pairs)


BAD = [
  ({"splits": (99, 100)}, "for tuning: add --tune"),
  ({"splits": (99, 100), "tune": True}, "--tune needs --splits of 100 or more"),
  ({"splits": ()}, "--splits must name at least one"),
  ({"splits": (-1,)}, "--splits must not be negative"),
  ({"methods": ("vat", "vat")}, "--methods must name at least one, without repetition"),
  ({"budgets": (25,)}, "--budgets 25 is not a multiple of the 10 classes"),
  ({"budgets": (0,)}, "--budgets 0 is not a multiple"),
  ({"budgets": (20_000,)}, "--budgets 20000 needs 2000 labels per class, but one has"),
  ({"vat_epsilon": -0.1}, "--vat-epsilon must not be negative, but it is -0.1"),
  ({"network": "conv", "image_size": 4}, "4x4 are too small"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_flags_leave_no_run(flags, words, tmp_path):
  with pytest.raises(InputError, match=words):
    study(tmp_path / "run", **flags)
  assert not (tmp_path / "run" / "config.json").exists()


def test_arms_are_matched_in_arithmetic_and_scikit_learn_is_one_of_them(tmp_path, read, monkeypatch):
  """Tests which recipe the matched arm is matched to; see test_recipes.py for how."""

  def with_flops_of(recipe, other):
    assert recipe.hparams == dataclasses.replace(other.hparams, method="fixmatch_ema")
    assert other.hparams.method == "gan_consistency"
    return recipes.with_unlabelled(recipe, 137)

  monkeypatch.setattr(recipes, "with_flops_of", with_flops_of)
  methods = ("fixmatch_ema", "fixmatch_ema@matched", "label_spreading", "self_training")
  result = study(tmp_path / "run", methods=methods, augment="none")
  same, matched, pixels, other = result["cells"]
  assert pixels["errors"] != other["errors"]
  assert [cell["method"] for cell in result["cells"]] == list(methods)
  assert (same["images_per_step"]["unlabelled"], matched["images_per_step"]["unlabelled"]) == (100, 137)
  assert 1.1 * same["mflop_per_step"] < matched["mflop_per_step"] < 1.37 * same["mflop_per_step"]
  assert "mflop_per_step" not in pixels
  assert max(pixels["errors"]) < 40  # two labels per class
  assert set(pixels["against"]) >= {"fixmatch_ema", "fixmatch_ema@matched"}
  assert all(each["p_holm"] >= each["p"] for each in pixels["against"].values())


def test_gan_and_vat_at_the_compute_of_the_gan_have_fewer_unlabelled_images():
  config = label_study.Config(methods=("gan_vat@matched", "gan_vat", "gan_consistency"))
  arms = label_study.make_arms(config, datasets.load("digits"))
  matched, both, gan = (arms[name] for name in config.methods)
  assert list(matched.objective.d) == list(both.objective.d)
  assert matched.batch.generated
  assert 0 < matched.batch.unlabelled < both.batch.unlabelled
  assert abs(matched.flops - gan.flops) < 0.02 * gan.flops


def test_arms_of_another_precision_and_perturbations_in_units_of_the_images():
  dataset = datasets.load("digits")
  config = label_study.Config(methods=("supervised_augmented@bfloat16",), vat_epsilon=0.2)
  (arm,) = label_study.make_arms(config, dataset).values()
  assert arm.hparams.precision == "bfloat16"
  norms = np.linalg.norm(dataset.x_train.reshape(1198, -1) / 255, axis=1)
  found = label_study.make_recipe(config, dataset, "vat").hparams
  assert found.vat_epsilon == pytest.approx(0.2 * norms.mean(), rel=0.02)  # of 500 of the images
  assert found.vat == 1.0


def test_tuning_leaves_its_lines(tmp_path, read, monkeypatch):
  """With the flags that made them, beside the results, and not on test images."""
  monkeypatch.setattr(label_study, "TUNING", tmp_path)
  study(tmp_path / "run", methods=("supervised",), tune=True, splits=(100, 101))
  (row,) = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
  assert (row["flags"]["tune"], row["method"], row["splits"]) == (True, "supervised", [100, 101])
  assert "not on the test set" in row["note"]
  assert str(tmp_path) not in json.dumps(row)


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("mnist", "mnist"),
    ("folder:hands@32", "hands@32"),
    ("imagenette/160px:1.0.0", "imagenette_160px_1.0.0"),
  ],
)
def test_tuning_lines_have_a_file_name_that_any_system_takes(name, file):
  dataset = dataclasses.replace(datasets.load("digits"), name=name)
  assert label_study.tuning_file(dataset) == label_study.TUNING / f"{file}.jsonl"


def test_flags_that_the_study_does_not_honour_it_does_not_take():
  flags = parsing.flags_of(label_study.Config())
  assert not flags.keys() & {"labels_per_class", "split_seed", "num_images", "hold_out", "init_from"}


def test_the_terminal_shows_a_row_a_method_and_a_column_a_budget(tmp_path, read, monkeypatch):
  """The overview of `study.md`."""
  shown = []
  finish = results.finish

  def spy(run, result, *, table, pictures):
    shown.extend(table)
    return finish(run, result, table=table, pictures=pictures)

  monkeypatch.setattr(results, "finish", spy)
  methods = ("supervised", "label_spreading")
  study(tmp_path / "run", methods=methods, budgets=(20, 50))
  header, *rows = shown
  assert header == ["test error, %", "20 labels", "50 labels"]
  assert [row[0] for row in rows] == list(methods)
  text = (tmp_path / "run" / "study.md").read_text()
  assert all(f"| {' | '.join(row)} |" in text for row in rows)
  page = (tmp_path / "run" / "report.html").read_text()
  assert all(f'<td>{name}</td><td class="n">{first}</td>' in page for name, first, _ in rows)
