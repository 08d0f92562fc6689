"""Export of a finished run: safetensors with a model card, ONNX, StableHLO."""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gan_jax import checkpoint, kernels, losses, output, recipes, report, steps
from gan_jax.model import Model, load
from gan_jax.types import InputError, Json

Format = Literal["safetensors", "onnx", "stablehlo"]

_JAX2ONNX = "pip install -e '.[export]' && pip install --no-deps jax2onnx==0.17.1"


def export(run: str | Path, out: str | Path, formats: Sequence[Format]) -> list[Path]:
  """Exports a run in these formats to one folder, which is written completely or not at all.

  Args:
    run: the directory of a run, or a folder exported from one.
    out: a new or empty folder. safetensors gives four files, see `to_safetensors`; the others give
      `model.onnx`, and `model.stablehlo` with `model.stablehlo.json`.
    formats: the formats to write.

  Returns:
    The files.

  Raises:
    InputError: a format is unknown, there is no run, the folder is not empty, a format needs a classifier
      and there is none, or a library is not installed.
  """
  unknown = [each for each in formats if each not in get_args(Format)]
  if unknown or not formats:
    raise InputError(
      f"choose formats from {', '.join(get_args(Format))}, not {', '.join(unknown) or 'none'}"
    )
  out, model = Path(out), load(run)
  with _new_folder(out) as folder:
    for each in formats:
      if each == "safetensors":
        _write_safetensors(model, folder, Path(run))
      elif each == "onnx":
        to_onnx(model, folder / "model.onnx")
      else:
        to_stablehlo(model, folder / "model.stablehlo")
  return sorted(out.iterdir())


def to_safetensors(model: Model, folder: str | Path, run: str | Path | None = None) -> None:
  """Writes a folder that `gan_jax.load` opens like a run, with bit-identical outputs.

  `config.json` holds the model's description and provenance, `model.safetensors` the averaged
  discriminator, `generator.safetensors` the averaged generator with the statistics that it samples with,
  and `MODEL_CARD.md` the measurements.

  Args:
    model: the model.
    folder: a new or empty folder, written completely or not at all.
    run: the run that the model was loaded from; without it, the folder says nothing about data and errors.

  Raises:
    InputError: the folder is not empty.
  """
  with _new_folder(Path(folder)) as beside:
    _write_safetensors(model, beside, None if run is None else Path(run))


def to_onnx(model: Model, path: str | Path) -> None:
  """Writes the classifier as ONNX, in float32.

  Its input `images [N, H, W, C]` is in [0, 1], with any N; its outputs are `probabilities [N, K]` and
  `features [N, F]`. The entries of `about` are stored as JSON in model properties of the same names.

  Raises:
    InputError: the model has no classifier, or jax2onnx is not installed.
  """
  classify = _classifier(model)
  try:
    with _silent():  # jax2onnx warns about every framework that is not installed
      import jax2onnx  # pyright: ignore[reportMissingImports]
      import onnx  # pyright: ignore[reportMissingImports]

      with jax.disable_jit():  # it does not support nested jit in JAX 0.12
        proto: Any = jax2onnx.to_onnx(
          classify,
          [("N", *model.recipe.image_shape)],
          model_name="gan_jax",
          input_names=["images"],
          output_names=["probabilities", "features"],
        )
  except ImportError as error:
    raise InputError(f"ONNX needs jax2onnx, which is not installed: {_JAX2ONNX}") from error
  onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in about(model).items()})
  output.write_bytes(Path(path), proto.SerializeToString())


def to_stablehlo(model: Model, path: str | Path) -> None:
  """Writes the classifier for `jax.export.deserialize`, with inputs and outputs as in `to_onnx`.

  It runs on CPU, CUDA and TPU, without gan_jax. A file beside it, with `.json` appended to its name, holds
  the entries of `about`.

  Raises:
    InputError: the model has no classifier, or flatbuffers is not installed.
  """
  classify = _classifier(model)
  x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *model.recipe.image_shape), jnp.float32)
  exported = jax.export.export(jax.jit(classify), platforms=("cpu", "cuda", "tpu"))(x)
  try:
    content = exported.serialize()
  except ImportError as error:
    raise InputError("StableHLO needs flatbuffers: pip install -e '.[export]'") from error
  output.write_bytes(Path(path), bytes(content))
  output.write_json(Path(f"{path}.json"), about(model))


def about(model: Model) -> Json:
  """Metadata for users of the bare classifier.

  `classes`, `image_shape`, and how pictures or vectors become its inputs: `reader` and `scaling`, the
  fields of `pictures.Reader` and `pictures.Scaling`, or None.
  """
  return {
    "classes": list(model.classes),
    "image_shape": list(model.recipe.image_shape),
    "reader": model.reader and dataclasses.asdict(model.reader),
    "scaling": model.scaling and dataclasses.asdict(model.scaling),
  }


def _classifier(model: Model) -> Callable[[Float[Array, "n h w c"]], tuple[Array, Array]]:
  if not model.has_classifier:
    raise InputError("this model has no classifier to export: its run trained a GAN without labels")
  read = steps.make_classifier(model.recipe.d)

  def classify(images: Float[Array, "n h w c"]) -> tuple[Array, Array]:
    with kernels.stock(True):
      logits, features = read(model.state, images)
    return losses.class_probs(logits), features

  return classify


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  before = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    with warnings.catch_warnings(action="ignore"):
      yield
  finally:
    logging.disable(before)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
  """A temporary folder that becomes `path`, or fills the empty folder there, when it is complete."""
  there, name = os.path.lexists(path), f".{path.absolute().name}.{os.getpid()}"
  if there and not (path.is_dir() and not any(path.iterdir())):
    raise InputError(f"{path} already exists and is not an empty folder: name a new one")
  beside = path / name if there else path.absolute().with_name(name)
  try:
    beside.mkdir(parents=True)
  except OSError as error:
    raise InputError(f"{path} cannot be created: {error.strerror}") from error
  try:
    yield beside
    if there:  # not replaced: it may be the working directory or a mount point
      for file in beside.iterdir():
        file.rename(path / file.name)
      beside.rmdir()
    else:
      beside.rename(path)
  except BaseException:
    shutil.rmtree(beside)
    raise


# --- Metadata of a safetensors folder

_PROVENANCE = ("experiment", "dataset", "note", "command", "device", "versions", "commit")
_MEASURED = (
  "num_images",
  "num_labels",
  "label_split_sha256",
  "split_seed",
  "seed",
  "steps",
  "interrupted",
  "seconds_train",
  "test_error",
  "supervised_test_error",
  "probe_test_error",
  "error_from",
)


def _write_safetensors(model: Model, folder: Path, run: Path | None) -> None:
  facts = about(model)
  config: Json = {
    "recipes": {"model": recipes.describe(model.recipe)},
    "class_names": facts.pop("classes"),
    **facts,
    **({} if run is None else _facts(run, int(model.state.step))),
  }
  checkpoint.save_averages(folder, steps.with_statistics(model.recipe.g, model.state))
  output.write_json(folder / "config.json", config)
  output.write_text(folder / "MODEL_CARD.md", _card(model, config))


def _facts(run: Path, step: int) -> Json:
  """Provenance of a run and, if measured at this step, its results; without paths."""
  stored: Json = json.loads((run / "config.json").read_text())
  if "command" in stored:
    stored["command"] = shlex.join(map(_last_part, shlex.split(stored["command"])))
  with contextlib.suppress(FileNotFoundError, ValueError):  # absent or damaged
    stored["result"] = json.loads((run / "result.json").read_text())
  facts: Json = {name: stored[name] for name in _PROVENANCE if stored.get(name)}
  result = stored.get("result", {})
  if result.get("steps") == step:
    facts["result"] = {name: result[name] for name in _MEASURED if result.get(name) is not None}
  return facts


def _last_part(word: str) -> str:
  """A word of a command; an absolute path, also one after `folder:`, is reduced to its last part."""
  kind, colon, path = ("", "", word) if Path(word).is_absolute() else word.partition(":")
  return f"{kind}{colon}{Path(path).name}" if Path(path).is_absolute() else word


def _card(model: Model, config: Json) -> str:
  from jinja2 import Environment, PackageLoader, StrictUndefined

  environment = Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
    loader=PackageLoader("gan_jax"),
  )
  result: Json = dict.fromkeys(_MEASURED) | config.get("result", {})
  environment.filters["cell"] = lambda value: str(value).replace("|", "/").replace("\n", " ")
  return environment.get_template("model_card.md").render(
    model=model,
    network=model.recipe.hparams.network,
    shape=output.shape_text(model.recipe.image_shape),
    step=int(model.state.step),
    config=dict.fromkeys(_PROVENANCE) | config,
    result=result,
    in_folds=result["error_from"] not in (None, report.TEST_IMAGES),
  )
