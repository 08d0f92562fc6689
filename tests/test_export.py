import dataclasses
import json
import os
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import gan_jax
from experiments import mnist_ssgan
from gan_jax import checkpoint, data, export, parsing, recipes, steps
from gan_jax.pictures import Scaling
from gan_jax.types import InputError

FILES = ["MODEL_CARD.md", "config.json", "generator.safetensors", "model.safetensors"]
DOCS = Path(__file__).parent.parent / "docs" / "export.md"


def recipe(family="ssgan", shape=(8, 8, 1), **changes):
  if family == "gan":
    return recipes.gan.build(recipes.gan.Hparams(num_steps=2, **{"network": "mlp"} | changes), shape, 3)
  return recipes.ssgan.build(recipes.ssgan.Hparams(num_steps=2, **{"network": "mlp"} | changes), shape, 3)


def model_of(recipe):
  """An untrained model whose averages differ from its initial parameters."""
  x = np.random.default_rng(0).integers(0, 255, (20, *recipe.image_shape), np.uint8)
  state = recipe.init_state(jax.random.key(0), data.DeviceData.from_arrays(x, np.arange(20) % 3, x))
  state = state.replace(ema=jax.tree.map(lambda p: 1.5 * p, state.ema))
  return gan_jax.Model(recipe, state, ("a", "b", "c"))


@pytest.fixture
def run(tmp_path, small_mlp):
  """Saves a model as a run with a result; returns its folder."""

  def saved(recipe, command="", **result):
    state, path = model_of(recipe).state, tmp_path / "run"
    with checkpoint.Checkpoints(path / "checkpoints") as checkpoints:
      checkpoints.save(state)
    provenance = {"experiment": "mnist_ssgan", "dataset": "folder:mine", "note": "", "device": "cpu"}
    config = {
      "recipes": {"main": recipes.describe(recipe)},
      "class_names": ["a", "b", "c"],
      "config": {"dataset": f"folder:{tmp_path}/mine", "workdir": str(path)},
      "command": command,
      "versions": {"jax": "0.9"},
      "commit": None,
    }
    (path / "config.json").write_text(json.dumps(config | provenance))
    if result:
      (path / "result.json").write_text(json.dumps({"workdir": str(path), "steps": 0, **result}))
    return path

  return saved


@pytest.mark.parametrize("family", ["ssgan", "gan"])
def test_an_exported_run_is_the_run_bit_for_bit(family, run, tiny, tmp_path):
  """With frozen scales and statistics. An export of the export is the same."""
  path = run(recipe(family, **({"labels": "all"} if family == "gan" else {})), test_error=4.0)
  x = tiny.dataset.x_test

  def outputs(model):
    return [model.classes, model.predict(x), model.features(x), model.real_logit(x), model.sample(3)]

  expected = outputs(gan_jax.load(path))
  out = tmp_path / "out"
  assert export.export(path, out, ["safetensors"]) == [out / name for name in FILES]
  path.rename(tmp_path / "gone")
  for a, b in zip(outputs(gan_jax.load(out)), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  export.export(out, tmp_path / "again", ["safetensors"])
  for name in FILES:
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
  named = safetensors.numpy.load_file(out / "generator.safetensors")
  assert any(name.startswith("statistics/Block_0/") for name in named)


def test_the_tensors_are_the_variables_of_the_networks(small_mlp, tiny, tmp_path):
  model = model_of(recipe())
  export.to_safetensors(model, tmp_path / "out")
  d, g = (
    unflatten_dict(safetensors.numpy.load_file(tmp_path / "out" / f"{name}.safetensors"), sep="/")
    for name in ("model", "generator")
  )
  x = tiny.dataset.x_test / np.float32(255)
  logits, _ = model.recipe.d.apply(d, x, train=False)
  np.testing.assert_allclose(jax.nn.softmax(logits), model.predict(x), atol=1e-6)
  assert (set(d), set(g)) == ({"params", "frozen"}, {"params", "statistics"})
  expected = steps.with_statistics(model.recipe.g, model.state).averaged("g")
  jax.tree.map(np.testing.assert_array_equal, g, dict(expected))


def test_the_card_has_what_was_measured_and_no_path(run, tmp_path):
  flags = mnist_ssgan.Config()
  flags = parsing.with_flags(
    flags, dataset="folder:mine", init_from="other", class_balance=(1.0, 0.0), steps=7
  )
  elsewhere = {"dataset": f"folder:{tmp_path}/mine", "init_from": str(tmp_path / "other")}
  command = parsing.command("python -m experiments.mnist_ssgan", parsing.with_flags(flags, **elsewhere))
  found = {"num_labels": 6, "num_images": 1234, "split_seed": 5, "label_split_sha256": "abc", "seed": 1}
  path = run(recipe(), command, test_error=12.345, supervised_test_error=None, **found)
  export.export(path, tmp_path / "out", ["safetensors"])
  card, config = ((tmp_path / "out" / name).read_text() for name in ("MODEL_CARD.md", "config.json"))
  assert str(tmp_path) not in card + config
  for row in (
    "| images | 8x8x1 (",
    "| classes | 3: a, b, c |",
    "| data | folder:mine |",
    "| training images | 1,234 |",
    "| labelled images | 6 |",
    "| label split | seed 5, SHA-256 abc |",
    "| test error | 12.35 % |",
    "| versions | jax 0.9 |",
  ):
    assert row in card, row
  assert "supervised control" not in card
  assert "The errors are those of one run" in card
  (command,) = re.findall(r"python -m experiments\.mnist_ssgan (.*)`", card)
  assert parsing._parse(mnist_ssgan.Config, shlex.split(command)) == flags
  words = f"folder:{tmp_path}/my:set", f"{tmp_path}/my:set", "folder:my:set", "--seed"
  assert [*map(export._last_part, words)] == ["folder:my:set", "my:set", "folder:my:set", "--seed"]


def test_an_error_of_other_parameters_is_not_told(run, tmp_path):
  """The newest checkpoint may be older than the result of the run."""
  export.export(run(recipe(), test_error=4.0, steps=7), tmp_path / "out", ["safetensors"])
  card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
  assert "| test error" not in card
  assert "No error is stored for these parameters." in card


def test_an_error_of_folds_is_told_as_such(run, tmp_path):
  """It is the error of other classifiers."""
  folds = "labelled images, each left out once in 5 folds"
  path = run(recipe(), test_error=12.3, error_from=folds)
  export.export(path, tmp_path / "out", ["safetensors"])
  card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
  assert f"| errors | cross-validated: {folds} |" in card
  assert "nothing was measured for it" in card
  assert "test images of the same dataset" not in card


def test_into_the_empty_folder_where_one_is(run, tmp_path, monkeypatch):
  """It is filled, not replaced."""
  path, here = run(recipe()), tmp_path / "here"
  here.mkdir()
  monkeypatch.chdir(here)
  inode = here.stat().st_ino
  assert [each.name for each in export.export(path, ".", ["safetensors"])] == FILES
  assert here.stat().st_ino == inode
  assert sorted(os.listdir()) == FILES


def test_what_a_bare_classifier_is_fed_with(small_mlp):
  """The fields of the classes that read pictures and vectors."""
  model = dataclasses.replace(model_of(recipe(shape=(1, 2, 1))), scaling=Scaling((0.0, 1.0), (2.0, 3.0)))
  found = json.loads(json.dumps(export.about(model)))
  assert found["classes"] == ["a", "b", "c"]
  assert (found["image_shape"], found["reader"]) == ([1, 2, 1], None)
  assert Scaling(**found["scaling"]) == model.scaling


def test_a_card_of_a_model_alone(small_mlp, tmp_path):
  control = recipes.supervised_control(recipe())
  for each, sentence in (
    (control, "The run did not train the generator."),
    (recipe("gan"), "A discriminator without classes"),
  ):
    folder = tmp_path / each.family
    export.to_safetensors(model_of(each), folder)
    card = (folder / "MODEL_CARD.md").read_text()
    assert sentence in card
    assert "None" not in card
    assert ("predict" in card) == (each is control)


def test_a_folder_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
  path, out = run(recipe()), tmp_path / "out"
  before = sorted(tmp_path.iterdir())
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(InputError, match=r"pip install --no-deps jax2onnx"):
    export.export(path, out, ["safetensors", "onnx"])
  assert sorted(tmp_path.iterdir()) == before
  out.mkdir()
  export.export(path, out, ["safetensors"])
  (tmp_path / "link").symlink_to("nowhere")
  for taken in (out, out / "config.json", tmp_path / "link"):
    with pytest.raises(InputError, match="not an empty folder"):
      export.export(path, taken, ["safetensors"])
  for formats, found in ((["onnxx"], "onnxx"), ([], "none")):
    with pytest.raises(InputError, match=f"safetensors, onnx, stablehlo, not {found}"):
      export.export(path, tmp_path / "other", formats)
  assert [file.name for file in sorted(out.iterdir())] == FILES
  (tmp_path / "link").unlink()
  assert sorted(tmp_path.iterdir()) == sorted([*before, out])


def test_another_or_a_damaged_export_is_refused(small_mlp, tmp_path):
  out = tmp_path / "out"
  export.to_safetensors(model_of(recipe()), out)
  config = json.loads((out / "config.json").read_text())
  config["recipes"]["model"]["num_classes"] = 4
  (out / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match="of another model"):
    gan_jax.load(out)
  config["recipes"]["model"]["num_classes"] = 3
  (out / "config.json").write_text(json.dumps(config))
  whole = (out / "generator.safetensors").read_bytes()
  (out / "generator.safetensors").write_bytes(whole[:-1])
  with pytest.raises(InputError, match=r"generator\.safetensors is missing or damaged"):
    gan_jax.load(out)
  (out / "generator.safetensors").unlink()
  with pytest.raises(InputError, match=r"generator\.safetensors is missing or damaged"):
    gan_jax.load(out)


def test_only_a_classifier_goes_to_onnx_and_stablehlo(small_mlp, tmp_path):
  model = model_of(recipe("gan"))
  for write in (export.to_onnx, export.to_stablehlo):
    with pytest.raises(InputError, match="no classifier"):
      write(model, tmp_path / "file")
  assert not (tmp_path / "file").exists()


def batches(shape):
  return [np.random.default_rng(n).random((n, *shape), np.float32) for n in (1, 3, 100)]


@pytest.mark.parametrize(
  ("network", "shape"),
  [
    ("conv", (20, 17, 3)),
    ("vgg", (9, 12, 3)),
    ("resnet", (9, 12, 3)),
    ("mlp", (8, 8, 1)),
    ("article", (8, 8, 1)),
  ],
)
def test_onnx_gives_the_same_probabilities(network, shape, tmp_path):
  pytest.importorskip("jax2onnx")
  onnxruntime = pytest.importorskip("onnxruntime")
  model = model_of(recipe(network=network, shape=shape))
  with jax.numpy_rank_promotion("allow"):  # jax2onnx adds a convolution's bias without reshaping it
    export.to_onnx(model, tmp_path / "model.onnx")
  session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
  assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["a", "b", "c"]
  for x in batches(shape):
    probabilities, features = session.run(["probabilities", "features"], {"images": x})
    np.testing.assert_allclose(probabilities, model.predict(x), atol=1e-5)
    np.testing.assert_allclose(features, model.features(x), atol=1e-4)


def test_convolutions_are_exported_as_such():
  """Not as the patches, products and loops that they are on a CPU."""
  model = model_of(recipe(network="conv", shape=(20, 17, 3)))
  jaxpr = str(jax.make_jaxpr(export._classifier(model))(np.zeros((2, 20, 17, 3), np.float32)))
  assert "conv_general_dilated" in jaxpr
  assert "custom_vjp" not in jaxpr


def test_stablehlo_gives_the_same_probabilities(small_mlp, tmp_path):
  pytest.importorskip("flatbuffers")
  model = model_of(recipe())
  export.to_stablehlo(model, tmp_path / "model.stablehlo")
  assert json.loads((tmp_path / "model.stablehlo.json").read_text()) == export.about(model)
  classify = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes())
  for x in batches((8, 8, 1)):
    probabilities, features = classify.call(x)
    np.testing.assert_allclose(probabilities, model.predict(x), atol=1e-6)
    np.testing.assert_allclose(features, model.features(x), atol=1e-5)


def test_what_the_page_says_runs(run, tiny):
  """Without the extra, only its first block."""
  blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
  assert len(blocks) == 3
  images = tiny.dataset.x_test
  namespace = {"run": run(recipe()), "images": images}
  exec(blocks[0], namespace)
  expected = namespace["probabilities"]
  assert expected.shape == (30, 3)
  for name in ("jax2onnx", "onnxruntime", "flatbuffers"):
    pytest.importorskip(name)
  export.to_onnx(namespace["model"], "model.onnx")
  export.to_stablehlo(namespace["model"], "model.stablehlo")
  for block in blocks[1:]:
    exec(block, namespace)
    np.testing.assert_allclose(namespace["probabilities"], expected, atol=1e-5)
  assert namespace["classes"] == ["a", "b", "c"]
