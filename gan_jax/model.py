"""A finished run as a model: predictions, features, novelty, samples."""

import itertools
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from gan_jax import checkpoint, data, evaluate, losses, memory, output, pictures, probe, recipes, steps
from gan_jax.pictures import Reader, Scaling, below, for_all, listed
from gan_jax.recipes import Recipe
from gan_jax.types import InputError, TrainState

Images = UInt8[Any, "n h w c"] | Float[Any, "n h w c"]
"""Bytes, or floats in [0, 1]; the channel axis may be omitted if there is one channel. A model trained on
vectors also takes vectors `[N, F]`, on the scale of its training data."""

_BATCH = 100


@dataclass(frozen=True)
class Model:
  """The averaged networks of a run. One compiled program serves any number of images."""

  recipe: Recipe
  state: TrainState
  classes: tuple[str, ...]
  """Names of the K classes."""
  reader: Reader | None = None
  """How pictures become input images; None: they are only resized."""
  scaling: Scaling | None = None
  """How vectors become input images."""

  @property
  def num_parameters(self) -> dict[str, int]:
    """Number of parameters of the generator `"g"` and the discriminator `"d"`."""
    return {name: sum(p.size for p in jax.tree.leaves(net)) for name, net in self.state.ema.items()}

  @cached_property
  def has_classifier(self) -> bool:
    """Whether the discriminator has the K classes; without labels, it has none."""
    x = jax.ShapeDtypeStruct((1, *self.recipe.image_shape), jnp.float32)
    logits, _ = jax.eval_shape(_classify(self.recipe.d), self.state, x)
    return logits.shape[-1] == len(self.classes)

  def predict(self, images: Images) -> Float[np.ndarray, "n k"]:
    """Class probabilities `p(y | x, real)`, in the order of `classes`.

    Raises:
      InputError: the images have another shape or range, or the model has no classifier.
    """
    return _batched(losses.class_probs, self.logits(images))

  def logits(self, images: Images) -> Float[np.ndarray, "n k"]:
    """The K logits of the discriminator, `[N, K]`: `predict` is their softmax.

    Raises:
      InputError: as by `predict`.
    """
    if not self.has_classifier:
      raise InputError("this model has no classifier: its run trained a GAN without labels")
    return _batched(lambda x: self._read(x)[0], self._checked(images))

  def features(self, images: Images, layer: str | None = None) -> Float[np.ndarray, "n f"]:
    """Features of the discriminator, `[N, F]`; with `layer`, those of that layer, see `probe.make_layers`.

    Raises:
      InputError: the images have another shape or range, or the discriminator has no such layer.
    """
    if layer is None:
      return _batched(lambda x: self._read(x)[1], self._checked(images))
    names = self.recipe.d.layers(self.recipe.image_shape)
    if layer not in names:
      raise InputError(f"the discriminator has no layer {layer}: it has {', '.join(names)}")
    layers = _layers(self.recipe.d, self.recipe.image_shape)
    return _batched(lambda x: layers(self.state, x)[layer], self._checked(images))

  def real_logit(self, images: Images) -> Float[np.ndarray, "n"]:
    """The logit of "real", `logsumexp(l)`: lower for images unlike the training images.

    If a GAN was trained, the highest class probability detects such images better (`docs/study.md`).
    """
    return _batched(lambda x: losses.real_logit(self._read(x)[0]), self._checked(images))

  def sample(
    self, num: int, *, seed: int = 0, classes: Sequence[str] | None = None
  ) -> Float[np.ndarray, "n h w c"]:
    """Generated images in [0, 1]. Image i depends only on the seed and i.

    Args:
      num: number of images.
      seed: seed of the latents.
      classes: the class of each image, for a class-conditional generator; None: random ones.

    Raises:
      InputError: a class is unknown, there is not one per image, or the generator is not class-conditional
        or was not trained.
    """
    if not self.recipe.has_generator:
      raise InputError("this model has no generator: its run trained without one")
    y = None if classes is None else self._numbers(classes, num)
    padded = max(1, -(-num // evaluate.SAMPLES)) * evaluate.SAMPLES  # one program for any number
    return evaluate.sample(self.recipe, self._sampling, padded, seed=seed, purpose="sample", y=y)[:num]

  @cached_property
  def _sampling(self) -> TrainState:
    """The state with the statistics for sampling, computed once."""
    return steps.with_statistics(self.recipe.g, self.state)

  def read(
    self, paths: str | Path | Sequence[str | Path]
  ) -> tuple[list[str], UInt8[np.ndarray, "n h w c"]]:
    """Reads files as inputs of this model, in the same way as its training images.

    Args:
      paths: one or several: pictures, folders of pictures, or arrays in .npy files or under `x` in .npz
        files: images as `predict` takes them or, if the model was trained on vectors, vectors `[N, F]`.

    Returns:
      One name per image, relative to the folder if `paths` is a single folder; and the images. Pictures in
      a folder that cannot be decoded are left out and reported on the terminal.

    Raises:
      InputError: a path is none of these, a picture given by its own path or every picture of a folder
        cannot be decoded, or an array has another shape.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    parts: list[tuple[list[str], np.ndarray]] = []
    for are_arrays, group in itertools.groupby(paths, lambda path: path.suffix in (".npy", ".npz")):
      if are_arrays:
        parts += map(self._from_array, group)
      else:
        files = [self._pictures_at(path, alone=len(paths) == 1) for path in group]
        parts += [self._from_pictures(files)] if any(files) else []
    if not parts:
      raise InputError(f"there are no pictures in {', '.join(map(str, paths))}")
    names = [name for part, _ in parts for name in part]
    return names, parts[0][1] if len(parts) == 1 else np.concatenate([x for _, x in parts])

  def _pictures_at(self, path: Path, *, alone: bool) -> dict[str, Path]:
    """A picture, or those in a folder, by the names that `read` gives them."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would block
      raise InputError(f"{path} is neither a file nor a folder")
    if self.scaling is not None:
      raise InputError(
        f"{path} is not an array: this model was trained on vectors, so name .npy or .npz files"
      )
    if not path.is_dir():
      return {str(path): path}
    files, skipped = below(path)
    if skipped:
      output.say(f"skipped, as hidden or not a picture: {len(skipped):,} ({listed(skipped)})")
    return files if alone else {str(file): file for file in files.values()}

  def _from_pictures(
    self, given: Sequence[dict[str, Path]]
  ) -> tuple[list[str], UInt8[np.ndarray, "n h w c"]]:
    """The pictures that can be decoded, and their names; reports those that cannot.

    Raises:
      InputError: none of those at one of the given paths can be decoded, or one has another shape.
    """
    names = [name for files in given for name in files]
    paths = [path for files in given for path in files.values()]
    shape = self.recipe.image_shape
    memory.check(len(paths), shape, "predict fewer pictures at a time")
    reader = self.reader or Reader(channels=shape[2], size=shape[:2])  # pyright: ignore[reportArgumentType]
    x = np.empty((len(paths), *shape), np.uint8)

    def read(i: int) -> tuple[int, ...]:
      pixels = reader.read(paths[i])
      if pixels.shape == shape:
        x[i] = pixels
      return pixels.shape

    found = for_all(read, range(len(paths)), f"reading {len(paths):,} pictures")
    failed = [reason for reason in found if isinstance(reason, str)]
    of_path = iter(found)
    for files in given:
      those = list(itertools.islice(of_path, len(files)))
      if those and all(isinstance(each, str) for each in those):
        raise InputError(those[0])
    for name, each in zip(names, found, strict=True):
      if not isinstance(each, str) and each != shape:
        wanted, there = map(output.shape_text, (shape, each))
        raise InputError(f"this model takes images of {wanted}, but {name} is {there}: resize it")
    for reason in failed:
      output.say(f"left out: {reason}")
    kept = [i for i, each in enumerate(found) if not isinstance(each, str)]
    return [names[i] for i in kept], x[kept] if failed else x

  def _from_array(self, path: Path) -> tuple[list[str], UInt8[np.ndarray, "n h w c"]]:
    if not path.exists():
      raise InputError(f"{path} does not exist")
    try:
      x = np.load(path, allow_pickle=False)
      if not isinstance(x, np.ndarray):  # an .npz file
        with x:
          x = x["x"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise InputError(
        f"{path} holds no readable array: save one with numpy.save, or as x with numpy.savez"
      ) from error
    if self.scaling is None and self.reader is not None and x.ndim > 2:
      x = pictures.read_images(x, self.reader, str(path))
    x = self.scaling.apply(x) if self.scaling is not None else self._checked(x)
    x = x if x.dtype == np.uint8 else data.to_bytes(x)
    return [f"{path}[{i}]" for i in range(len(x))], x

  def _read(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
    return _classify(self.recipe.d)(self.state, x)

  def _numbers(self, classes: Sequence[str], num: int) -> np.ndarray:
    if not steps.is_class_conditional(self.recipe.g):
      raise InputError("this generator cannot draw a chosen class: its run was not class-conditional")
    if len(classes) != num:
      raise InputError(f"there are {num} images but {len(classes)} classes: name one class per image")
    unknown = sorted(set(classes) - set(self.classes))
    if unknown:
      raise InputError(f"there is no class {unknown[0]}: the classes are {', '.join(self.classes)}")
    number = {name: i for i, name in enumerate(self.classes)}
    return np.array([number[name] for name in classes], int)

  def _checked(self, images: Images) -> np.ndarray:
    """Images `[N, H, W, C]` as bytes or floats in [0, 1]; unscaled vectors `[N, F]` become such images."""
    x, shape = np.asarray(images), self.recipe.image_shape
    if self.scaling is not None and x.ndim == 2:
      return self.scaling.apply(x)
    if x.ndim == 3 and shape[-1] == 1:
      x = x[..., None]
    if x.shape[1:] != shape:
      wanted, found = map(output.shape_text, (shape, x.shape[1:]))
      raise InputError(f"this model takes images [N, {wanted}], not [N, {found}]")
    if x.dtype == np.uint8:
      return x
    if not (np.issubdtype(x.dtype, np.floating) and np.all((x >= 0) & (x <= 1))):  # refuses NaN
      beyond = " values outside that range" if x.dtype.kind == "f" else ""
      raise InputError(f"images must be bytes or floats in [0, 1], not {x.dtype}{beyond}")
    return x.astype(np.float32, copy=False)


def load(run: str | Path) -> Model:
  """Loads the model of a run from its directory alone: `config.json` and the newest checkpoint.

  Args:
    run: the directory of a run, or a folder written by `export.to_safetensors`.

  Raises:
    InputError: there is no run, it is from another version, or it has no checkpoint.
  """
  path = Path(run)
  try:
    stored = json.loads((path / "config.json").read_text())
    described = next(iter(stored["recipes"].values()))  # only the first is saved
    classes = tuple(stored["class_names"])
    reader, scaling = stored.get("reader"), stored.get("scaling")
    read_alike = reader and Reader(**reader), scaling and Scaling(**scaling)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise InputError(f"{path} is not the folder of a run: it has no config.json") from error
  except OSError as error:
    raise InputError(f"{path / 'config.json'} cannot be read: {error.strerror}") from error
  except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
    raise InputError(f"{path} holds no model: its config.json contains no recipe") from error
  recipe = recipes.rebuild(described)
  like = recipe.abstract_state()
  if checkpoint.is_export(path):
    like = jax.eval_shape(partial(steps.with_statistics, recipe.g), like)
    return Model(recipe, checkpoint.read_averages(path, like), classes, *read_alike)
  return Model(recipe, checkpoint.restore_averages(path, like), classes, *read_alike)


def _batched(read: Any, x: np.ndarray) -> Any:
  """Applies `read` to many rows in full batches; images as bytes become floats."""
  outputs = []
  for start in range(0, max(len(x), 1), _BATCH):
    rows = x[start : start + _BATCH]
    rows = rows.astype(np.float32) / 255 if rows.dtype == np.uint8 else rows
    fill = np.zeros((_BATCH - len(rows), *x.shape[1:]), np.float32)
    outputs.append(np.asarray(read(jnp.asarray(np.concatenate([rows, fill]))))[: len(rows)])
  return np.concatenate(outputs)


# Linen modules compare by value, so one compiled program serves all models with the same network.
_classify = cache(lambda d: jax.jit(steps.make_classifier(d)))
_layers = cache(lambda d, image_shape: jax.jit(probe.make_layers(d, image_shape)))
