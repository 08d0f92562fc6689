"""Arrays of images or vectors as datasets."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from gan_jax.dataset import Dataset
from gan_jax.pictures.reader import Reader, listed, resize_all
from gan_jax.types import InputError

_KEYS = ("x", "y", "x_test", "y_test", "classes")
_LARGEST = 1e30
_BLOCK = 256  # rows converted to floats at a time


@dataclass(frozen=True)
class Scaling:
  """How vectors are scaled to bytes: each feature from its low, which becomes 0, to its high, 255."""

  low: tuple[float, ...]
  high: tuple[float, ...]

  def __post_init__(self) -> None:
    for name in ("low", "high"):
      object.__setattr__(self, name, tuple(getattr(self, name)))

  @classmethod
  def of(cls, x: Float[np.ndarray, "n f"]) -> "Scaling":
    """From the 0.1 % to the 99.9 % quantile of each feature, so outliers do not compress the rest."""
    columns = np.split(np.asarray(x), range(64, np.shape(x)[1], 64), axis=1)  # few at a time, see `scaled`
    quantiles = [np.quantile(np.asarray(part, np.float64), (0.001, 0.999), axis=0) for part in columns]
    low, high = np.concatenate(quantiles, axis=1)
    return cls(tuple(low.tolist()), tuple(high.tolist()))

  def apply(self, x: Float[Any, "n f"]) -> UInt8[np.ndarray, "n 1 f 1"]:
    """Vectors `[N, F]` as one-row images, clipped; a feature whose low equals its high becomes 0.

    Raises:
      InputError: a different number of features, or values that are not finite real numbers.
    """
    x, low, high = np.asarray(x), np.asarray(self.low), np.asarray(self.high)
    try:
      x = x if x.dtype.kind in "buif" else x.astype(np.float64)
    except (TypeError, ValueError) as error:
      raise InputError(f"vectors must be real numbers, not {x.dtype}") from error
    if x.ndim != 2 or x.shape[1] != len(low):
      raise InputError(f"vectors must be [N, {len(low)}], not {_shape(x)}")
    if not np.isfinite(x).all():
      raise InputError("vectors must be finite, but these hold NaN or infinite values")
    return scaled(x, low, high)[:, None, :, None]


def scaled(x: Any, low: Any, high: Any) -> UInt8[np.ndarray, "..."]:
  """Numbers as bytes: `low` becomes 0, `high` 255, values outside are clipped; 0 if both are equal."""
  width, found = np.where(high > low, high - low, 1), np.empty(x.shape, np.uint8)
  for i in range(0, len(x), _BLOCK):  # all rows as float64 may not fit in memory
    z = (np.clip(x[i : i + _BLOCK].astype(np.float64), low, high) - low) / width
    found[i : i + _BLOCK] = np.round(255 * z)
  return found


def load_arrays(path: str | Path) -> Dataset:
  """Reads an .npz file of arrays: `x`, `y`, and optionally `x_test` with `y_test`, and `classes`.

  `x` holds images `[N, H, W]` or `[N, H, W, C]` with C in {1, 3}, as uint8, floats in [0, 1], or uint16,
  whose largest value in `x` becomes 255; or vectors `[N, F]` of real numbers, see `Scaling`. `y` holds
  classes: integers from 0, or names; -1 or "" means no label. `classes` holds the class names.

  Raises:
    InputError: missing or unknown arrays, wrong shapes, types or ranges, or classes without labels.
  """
  path = Path(path).expanduser()
  arrays = open_arrays(path)
  for problem in array_problems(arrays):
    raise InputError(f"{path}: {problem}")
  names = _class_names(arrays)
  x, notes, reader, scaling, white = arrays["x"], [], None, None, 65535
  x_test = arrays.get("x_test", x[:0])
  if x.ndim == 2:
    scaling = Scaling.of(x)
    x, x_test = scaling.apply(x), scaling.apply(x_test)
    constant = sum(low >= high for low, high in zip(scaling.low, scaling.high, strict=True))
    if constant:
      notes.append(
        f"{constant:,} of {x.shape[2]:,} features are constant between their 0.1 % and 99.9 %"
        " quantiles and become 0"
      )
  else:
    if is_uint16(x):
      white = int(x.max()) or 1
      notes.append(
        f"the value {white}, the largest in x, becomes 255, and larger values in x_test are clipped"
      )
    x, x_test = (_as_bytes(a, white) for a in (x, x_test))
    reader = Reader(channels=x.shape[-1], size=None, white=white)
  y, y_test = (_class_numbers(arrays.get(key, arrays["y"][:0]), names) for key in ("y", "y_test"))
  return Dataset(
    name=f"arrays:{path.stem}",
    x_train=x,
    y_train=y,
    x_test=x_test,
    y_test=y_test,
    class_names=names,
    note="; ".join(notes),
    own=True,
    reader=reader,
    scaling=scaling,
  )


def open_arrays(path: Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise InputError(f"{path} is not a file")
  try:
    with path.open("rb") as opened:
      file = np.load(opened, allow_pickle=False)
      if isinstance(file, np.ndarray):
        raise InputError(f"{path} holds a single array: save x and y together with numpy.savez")
      return {key: file[key] for key in file}
  except InputError:
    raise
  except ValueError as error:
    if "pickle" in str(error) and zipfile.is_zipfile(path):
      raise InputError(
        f"{path} holds Python objects: save numbers as numeric arrays, names as text"
      ) from error
    raise InputError(f"{path} is not an .npz file from numpy.savez") from error
  except Exception as error:  # zip files break in many ways
    raise InputError(f"{path} is not a complete .npz file from numpy.savez ({error})") from error


def array_problems(arrays: dict[str, np.ndarray]) -> Iterator[str]:
  """Problems, one sentence each; later checks run as far as earlier problems allow."""
  unknown = [key for key in arrays if key not in _KEYS]
  if unknown:
    yield f"unexpected {listed(unknown)}: the arrays must be named {', '.join(_KEYS)}"
  missing = [key for key in ("x", "y") if key not in arrays]
  if missing:
    yield f"missing {' and '.join(missing)}: save the images or vectors as x and their classes as y"
  if ("x_test" in arrays) != ("y_test" in arrays):
    yield "x_test and y_test must be saved together, but only one is there"
  for key in ("x", "x_test"):
    if key in arrays:
      yield from _image_problems(key, arrays[key])
  if "x" in arrays and "x_test" in arrays:
    x, x_test = arrays["x"], arrays["x_test"]
    alike = x.dtype.kind == x_test.dtype.kind and is_uint16(x) == is_uint16(x_test)
    if x.shape[1:] != x_test.shape[1:] or not alike:
      yield (
        f"x_test is {_shape(x_test)} of {x_test.dtype}, but must match x, {_shape(x)} of {x.dtype}, except"
        " in its first number"
      )
  whole = True
  for key in ("y", "y_test"):
    for problem in _label_problems(key, arrays):
      whole = False
      yield problem
  if "classes" in arrays:
    classes = arrays["classes"]
    names = {*classes.tolist()} if classes.ndim == 1 and classes.dtype.kind == "U" else {""}
    if not names or "" in names or len(names) != len(classes):
      whole = False
      yield "classes must be a text array of distinct, non-empty names"
  if whole and "y" in arrays:
    yield from _class_problems(arrays)


def _image_problems(key: str, x: np.ndarray) -> Iterator[str]:
  if x.ndim not in (2, 3, 4):
    yield f"{key} must be images [N, H, W] or [N, H, W, C], or vectors [N, F], not {_shape(x)}"
  elif x.ndim == 4 and x.shape[-1] not in (1, 3):
    hint = ": put the channels last" if x.shape[1] in (1, 3) else ""
    yield f"images in {key} must be [N, H, W, C] with 1 or 3 channels, not {_shape(x)}{hint}"
  elif 0 in x.shape[1:] or (len(x) == 0 and key == "x"):
    yield f"{key} is empty: its shape is {_shape(x)}"
  elif x.ndim == 2 and x.dtype.kind not in "buif":
    yield f"vectors in {key} must be real numbers, not {x.dtype}"
  elif x.ndim > 2 and x.dtype != np.uint8 and not is_uint16(x) and x.dtype.kind != "f":
    yield f"images in {key} must be uint8, uint16, or floats in [0, 1], not {x.dtype}"
  elif len(x) and x.dtype.kind == "f":
    low, high = float(x.min()), float(x.max())
    if not np.isfinite([low, high]).all() or max(-low, high) > _LARGEST:
      yield f"{key} holds values that are not finite, or beyond +-{_LARGEST:g}: replace them"
    elif x.ndim > 2 and not 0 <= low <= high <= 1:
      yield f"floats in {key} must be in [0, 1], but they range from {low:g} to {high:g}: scale them"


def _label_problems(key: str, arrays: dict[str, np.ndarray]) -> Iterator[str]:
  if key not in arrays:
    return
  y, x = arrays[key], arrays.get(key.replace("y", "x"))
  if y.ndim != 1:
    yield f"{key} must be [N], one class per image, not {_shape(y)}"
  elif y.dtype.kind not in "iuU":
    yield f"{key} must be integers or names, not {y.dtype}"
  else:
    if x is not None and x.ndim and len(x) != len(y):
      yield f"{key} has {len(y):,} labels for {len(x):,} images: it needs one for each"
    if y.dtype.kind == "U" and (y == "-1").any():  # as NumPy makes of names and the number -1
      yield f'{key} holds the text -1: among names, "" means no label'
    elif y.dtype.kind != "U" and len(y) and y.min() < -1:
      yield f"{key} holds {y.min()}: classes are numbered from 0, and -1 means no label"
    elif key == "y_test" and ((y == "") if y.dtype.kind == "U" else (y == -1)).any():
      yield "y_test must label every image: leave out those without a label"
    if key == "y_test" and "y" in arrays and (arrays["y"].dtype.kind == "U") != (y.dtype.kind == "U"):
      yield "y and y_test must both be integers, or both names"


def _class_problems(arrays: dict[str, np.ndarray]) -> Iterator[str]:
  """Problems with the classes of well-formed labels."""
  y, y_test = arrays["y"], arrays.get("y_test", arrays["y"][:0])
  text = y.dtype.kind == "U"
  given = {*(y[y != ""] if text else y[y >= 0]).tolist()}
  if not given:
    yield "y holds no label at all"
    return
  names = arrays["classes"].tolist() if "classes" in arrays else None
  if names is None:
    known, num = (given, len(given)) if text else (range(max(given) + 1), max(given) + 1)
  else:
    known, num = {*names} if text else range(len(names)), len(names)
  unknown = sorted(label for label in given if label not in known)
  if unknown:
    yield f"y holds {listed(map(str, unknown))}, which the {num} names in classes do not cover"
  if num < 2:
    yield f"there is only one class, {listed(map(str, known))}, but a classifier needs two"
  empty = num - sum(label in known for label in given)
  if empty:
    first = next(label for label in (names if text and names else known) if label not in given)
    name = f"{first} ({names[first]})" if isinstance(first, int) and names else first
    yield f"{empty:,} of {num:,} classes have no label in y, such as {name}"
  unknown = sorted(label for label in {*y_test.tolist()} if label not in known)
  if unknown:
    yield f"y_test holds classes that y does not: {listed(map(str, unknown))}"


def _class_names(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
  y = arrays["y"]
  if "classes" in arrays:
    return tuple(arrays["classes"].tolist())
  if y.dtype.kind == "U":
    return tuple(sorted({*y.tolist()} - {""}))
  return tuple(str(k) for k in range(int(y.max()) + 1))  # which bytes cannot hold


def _class_numbers(y: np.ndarray, names: tuple[str, ...]) -> Int[np.ndarray, "n"]:
  if y.dtype.kind == "U":
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.array([number[name] for name in y.tolist()], np.int64)
  return y.astype(np.int64)


def read_images(x: np.ndarray, reader: Reader, name: str) -> UInt8[np.ndarray, "n h w c"]:
  """Images `[N, H, W]` or `[N, H, W, C]` read like the training images, with equal scaling and resizing.

  Args:
    x: uint8, uint16, or floats in [0, 1].
    reader: the reader of the training images.
    name: name of the array, for messages.

  Raises:
    InputError: a wrong type, shape or range.
  """
  for problem in _image_problems(name, x):
    raise InputError(problem)
  x = _as_bytes(x, reader.white)
  return x if reader.size in (None, x.shape[1:3]) else resize_all(x, reader.size, reader.fit)


def _as_bytes(x: np.ndarray, white: int) -> UInt8[np.ndarray, "n h w c"]:
  """Images as bytes, converted in blocks: all of them as floats may not fit in memory."""
  x = x[..., None] if x.ndim == 3 else x
  if x.dtype == np.uint8:
    return x
  scale, top = (255 / white, white) if x.dtype.kind == "u" else (255, 1)
  found = np.empty(x.shape, np.uint8)
  for i in range(0, len(x), _BLOCK):
    found[i : i + _BLOCK] = np.round(np.minimum(x[i : i + _BLOCK], top) * np.float64(scale))
  return found


def is_uint16(x: np.ndarray) -> bool:
  return x.dtype.kind == "u" and x.dtype.itemsize == 2  # in any byte order


def _shape(x: np.ndarray) -> str:
  return f"[{', '.join(map(str, x.shape))}]"
