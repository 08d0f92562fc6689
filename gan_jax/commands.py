"""The commands of `gan-jax`, except `train`, which is in `classify`."""

import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional, arg

from gan_jax import cli, figures, losses, memory, output
from gan_jax.output import say
from gan_jax.types import InputError, Json

Model = Positional[Annotated[str, arg(metavar="RUN|EXPORT")]]

# --- predict


@dataclass(frozen=True)
class Predict:
  """The flags of predict."""

  model: Model
  """Folder of a run, or of an export."""
  images: Positional[Annotated[tuple[str, ...], arg(metavar="PICTURES [PICTURES ...]")]]
  """Pictures, folders of pictures, or .npy and .npz files with an array of images."""
  out: str | None = None
  """CSV file of the predictions (None: standard output)."""
  top_k: int = 1
  """Number of most probable classes to write for each image."""
  review: int | None = None
  """Write only this many images, those most worth labelling (uncertain and diverse), as a labels.csv to
  fill in; of a single folder, exclude its test set and the images that its table or class folders already
  label."""

  def check(self) -> None:
    cli.at_least_one(self, "top_k", "review")
    if not self.images:
      raise InputError("name the images to predict: pictures, folders, .npy or .npz files")
    if self.review is not None and self.top_k != 1:
      raise InputError("--review writes no predictions: leave --top-k out")
    if self.out is not None:
      output.check_file(Path(self.out))
      if self.review is not None and Path(self.out).exists():
        raise InputError(f"{self.out} already exists and may hold labels: name another file")


def predict(config: Predict) -> Json:
  """Predicts classes of new images.

  python -m gan_jax predict RUN pictures/ --out predictions.csv --top-k 3
  python -m gan_jax predict RUN pictures/ --review 100 --out to_label.csv

  One line per image: its name, the predicted class and its probability, further classes with --top-k, and
  real_logit. Both are lower for images unlike the training images; after training with a GAN, the
  probability separates such images better.
  """
  from gan_jax import model, pictures

  say(f"opening {config.model}")
  loaded, first = model.load(config.model), Path(config.images[0])
  alone = len(config.images) == 1 and first.is_dir()
  known = pictures.labelled(first, loaded.classes) if config.review and alone else set()
  names, images = loaded.read(config.images)
  say(f"{len(images):,} images, {len(loaded.classes)} classes")
  logits = jnp.asarray(loaded.logits(images))
  probs = np.asarray(losses.class_probs(logits))
  if config.review is None:
    real_logit = np.asarray(losses.real_logit(logits))
    rows = _predictions(loaded.classes, names, probs, real_logit, config.top_k)
  else:
    rest = np.flatnonzero([name not in known for name in names])
    chosen = to_review(probs[rest], lambda some: loaded.features(images[rest[some]]), config.review)
    rows = [["file_name", "label"], *([names[i], ""] for i in rest[chosen])]
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  _write(config.out, text.getvalue())
  return {}


def _predictions(
  classes: Sequence[str], names: Sequence[str], probs: np.ndarray, real_logit: np.ndarray, top_k: int
) -> list[list[str]]:
  top_k = min(top_k, len(classes))
  head = ["file_name", "label", "probability"]
  head += [f"{column}_{k}" for k in range(2, top_k + 1) for column in ("label", "probability")]
  rows: list[list[str]] = [[*head, "real_logit"]]
  for name, p, logit in zip(names, probs, real_logit, strict=True):
    best = np.argsort(-p, kind="stable")[:top_k]
    rows.append([name, *(cell for k in best for cell in (classes[int(k)], str(p[k]))), f"{logit:.3f}"])
  return rows


def to_review(probs: np.ndarray, features: Callable[[np.ndarray], np.ndarray], num: int) -> list[int]:
  """Positions of the `num` images most worth labelling, from all class probabilities `[N, K]`.

  A diverse subset of the `10 num` least certain images, by the margin between the two most probable
  classes: the least certain one, then repeatedly the one farthest in feature space from all chosen so far
  (Sener & Savarese, 2018, https://arxiv.org/abs/1708.00489, algorithm 1). `features` returns the features
  of the images at given positions.
  """
  if not len(probs):
    return []
  best = np.sort(probs, axis=-1)[:, -2:]
  uncertain = np.argsort(best[:, -1] - best[:, 0], kind="stable")[: 10 * num]
  z = features(uncertain)
  chosen, nearest = [0], np.full(len(z), np.inf)
  while len(chosen) < min(num, len(z)):
    nearest = np.minimum(nearest, np.square(z - z[chosen[-1]]).sum(axis=-1))
    nearest[chosen] = -1.0
    chosen.append(int(nearest.argmax()))
  return uncertain[chosen].tolist()


# --- sample


@dataclass(frozen=True)
class Sample:
  """The flags of sample."""

  model: Model
  """Folder of a run, or of an export."""
  num: int = 64
  """Number of images."""
  class_name: str | None = None
  """The class of the images; needs a class-conditional generator."""
  seed: int = 0
  """Seed of the latents; a larger --num starts with the same images."""
  out: str = "samples.png"
  """PNG grid of all images, or a .npy file of floats in [0, 1], [N, H, W, C]."""

  def check(self) -> None:
    cli.at_least_one(self, "num")
    cli.not_negative(self, "seed")
    if Path(self.out).suffix not in (".png", ".npy"):
      raise InputError(f"--out {self.out} must end in .png or .npy")
    output.check_file(Path(self.out))


def sample(config: Sample) -> Json:
  """Draws images from the generator of a run.

  python -m gan_jax sample RUN --num 64 --class-name 7 --out sevens.png
  """
  from gan_jax import model

  say(f"opening {config.model}")
  loaded, out = model.load(config.model), Path(config.out)
  if loaded.scaling is not None and out.suffix == ".png":
    raise InputError("this run was trained on vectors, which cannot be drawn: name a .npy file with --out")
  memory.check(config.num, loaded.recipe.image_shape, "choose a smaller --num", num_bytes=8)
  classes = None if config.class_name is None else [config.class_name] * config.num
  images = loaded.sample(config.num, seed=config.seed, classes=classes)
  if out.suffix == ".npy":
    buffer = io.BytesIO()
    np.save(buffer, images)
    _write(config.out, buffer.getvalue())
  else:
    _write(config.out, figures.grid_png(images, columns=int(np.ceil(np.sqrt(config.num)))))
  return {}


# --- export, report, check


@dataclass(frozen=True)
class Export:
  """The flags of export."""

  run: Model
  """Folder of a run, or of an export."""
  out: str
  """Folder for the files; it must be empty or new."""
  formats: tuple[Literal["safetensors", "onnx", "stablehlo"], ...] = ("safetensors",)
  """safetensors: a folder that `gan_jax.load` opens, with a model card. onnx: the classifier, for any
  number of images. stablehlo: the same for `jax.export`."""


def export(config: Export) -> Json:
  """Writes the networks of a run for use elsewhere.

  python -m gan_jax export RUN --out exported --formats safetensors onnx
  """
  from gan_jax import export as exporting

  say(f"opening {config.run}")
  for path in exporting.export(config.run, Path(config.out), config.formats):
    say(f"written to {path}")
  return {}


@dataclass(frozen=True)
class Report:
  """The flags of report."""

  runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN [RUN ...]")]]
  """Folders of complete runs."""
  out: str = "comparison.html"
  """The page."""


def report_runs(config: Report) -> Json:
  """Puts several runs side by side on one page.

  python -m gan_jax report runs/a runs/b --out page.html
  """
  from gan_jax import report

  there = Path(config.out).is_file()
  report.compare(Path(config.out), [Path(run) for run in config.runs])
  say(_written(config.out, there))
  return {}


@dataclass(frozen=True)
class Check:
  """The flags of check."""

  path: Positional[Annotated[str, arg(metavar="PATH")]]
  """A folder of pictures or an .npz file, as for --dataset folder:PATH and arrays:PATH."""

  def check(self) -> None:
    if not Path(self.path.removeprefix("folder:").removeprefix("arrays:")).expanduser().exists():
      raise InputError(f"{self.path} does not exist")


def check(config: Check) -> Json:
  """Reports the contents and problems of a folder or file of images, before any training.

  python -m gan_jax check PATH

  Counts, sizes, bit depths, classes, unreadable files, duplicates, and images that are in both the training
  and the test set. The exit code is 1 if something must be fixed before training.
  """
  from gan_jax import pictures

  found = pictures.check(config.path)
  pictures.print_check(found)
  if found["problems"]:
    sys.exit(1)
  return {}


def _write(path: str | None, content: str | bytes) -> None:
  """Writes atomically to a file, or to standard output."""
  content = content.encode(errors="replace") if isinstance(content, str) else content
  if path is None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    return
  there = Path(path).is_file()
  output.write_bytes(Path(path), content)
  say(_written(path, there))


def _written(path: str, there: bool) -> str:
  return f"replaced {path}" if there else f"written to {path}"


CONFIGS: dict[str, tuple[Callable[[Any], Json], type]] = {
  "predict": (predict, Predict),
  "sample": (sample, Sample),
  "export": (export, Export),
  "report": (report_runs, Report),
  "check": (check, Check),
}
"""The commands by name, each with its flags."""
