"""Reads pictures as arrays, one or many at a time."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from gan_jax.output import console, shape_text
from gan_jax.types import InputError

Resizing = Literal["crop", "pad"]
T = TypeVar("T")

GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}  # what turns a picture of this orientation upright
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_PNG_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


@dataclass(frozen=True)
class Reader:
  """How pictures become arrays. `dataclasses.asdict` turns it into JSON, `Reader(**json)` restores it."""

  channels: Literal[1, 3]
  """1 converts all to grey, 3 converts all to colour."""
  size: tuple[int, int] | None
  """Height and width to resize to; None keeps the original size."""
  fit: Resizing = "crop"
  """crop: the largest centred part of the target aspect ratio; pad: all of it, edge pixels repeated."""
  white: int = 65535
  """The value of 16-bit pictures that becomes 255; larger ones are clipped. 8-bit ones are not scaled."""

  def __post_init__(self) -> None:
    if isinstance(self.size, list):
      object.__setattr__(self, "size", tuple(self.size))

  def read(self, path: str | Path) -> UInt8[np.ndarray, "h w c"]:
    """Reads one picture: upright by its EXIF data, transparency on white, the first of several frames.

    Raises:
      InputError: there is no such file, or Pillow cannot decode it within its pixel limit.
    """
    try:
      return self.pixels(open_upright(path))
    except Exception as error:  # decoders may raise anything on a broken file
      raise InputError(f"{path} {reason_of(error)}") from error

  def pixels(self, picture: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    if picture.mode == "F":  # 16-bit values are scaled as floats, to round only once
      picture = Image.fromarray(np.minimum(np.asarray(picture), self.white) * np.float32(255 / self.white))
    else:
      picture = picture.convert("L" if self.channels == 1 else "RGB")
    pixels = np.asarray(picture) if self.size is None else resize(picture, self.size, self.fit)
    if picture.mode == "F":
      pixels = np.round(pixels).astype(np.uint8)
    pixels = np.atleast_3d(pixels)
    return pixels if pixels.shape[-1] == self.channels else pixels.repeat(self.channels, axis=-1)


def resize(picture: Image.Image, size: tuple[int, int], fit: Resizing) -> np.ndarray:
  """A picture as an array of this height and width, keeping the aspect ratio; see `Reader.fit`.

  Bilinear, with antialiasing if the picture shrinks.

  Args:
    picture: a picture in Pillow's mode L, RGB or F.
    size: height and width.
    fit: crop or pad.
  """
  height, width = size
  if fit == "crop":
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR))
  scale = min(height / picture.height, width / picture.width)
  w, h = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
  pixels = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR))
  top, left = (height - h) // 2, (width - w) // 2
  border = [(top, height - h - top), (left, width - w - left), (0, 0)]
  return np.pad(pixels, border[: pixels.ndim], mode="edge")


def resize_all(
  x: UInt8[np.ndarray, "n h w c"], size: tuple[int, int], fit: Resizing
) -> UInt8[np.ndarray, "n i j c"]:
  """Images resized to this height and width, see `resize`."""
  found = np.empty((len(x), *size, x.shape[-1]), np.uint8)
  for i, image in enumerate(x):
    for c in range(x.shape[-1]):  # Pillow takes no arrays with one channel
      found[i, ..., c] = resize(Image.fromarray(image[..., c]), size, fit)
  return found


def open_upright(path: str | Path) -> Image.Image:
  """An upright picture in mode L, RGB, or, for 16-bit values, F."""
  # Opened here: Pillow maps uncompressed TIFF files into memory and then misreads turned ones.
  with open(path, "rb") as opened, Image.open(opened) as file:
    limit = Image.MAX_IMAGE_PIXELS  # of which Pillow itself only warns
    if limit is not None and file.width * file.height > limit:
      raise Image.DecompressionBombError
    if file.mode == "F":
      raise InputError("holds floating-point values: convert it to 8 or 16 bits")
    file.load()
    turn = _UPRIGHT.get(_orientation(file))
    picture = file if turn is None else file.transpose(turn)
    if bits_of(file) == "16":
      values = np.asarray(picture)
      if values.min() < 0 or values.max() > 65535:
        raise InputError("holds 32-bit values: convert it to 8 or 16 bits")
      return Image.fromarray(values.astype(np.float32))
    if picture.has_transparency_data:
      picture = picture.convert("RGBA")
      picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if file.mode in GREY else "RGB")


def _orientation(file: Image.Image) -> int:
  """EXIF orientation; 1, upright, if the EXIF data are damaged or absent."""
  with contextlib.suppress(Exception):  # they may hold anything
    return file.getexif().get(_ORIENTATION, 1)
  return 1


def bits_of(file: Image.Image) -> str:
  """Bits per channel. Pillow reads 16-bit colour as 8 bits, the high byte of each value."""
  if file.mode.startswith("I"):
    return "16"
  if ";16" in str(getattr(file, "tile", "")):
    return "16, read as 8"
  return {"1": "1", "F": "32"}.get(file.mode, "8")


class Pictures:
  """An image source of picture files, all read by the same `Reader`."""

  def __init__(self, paths: Sequence[Path], reader: Reader, size: tuple[int, int]):
    self._paths, self._reader = paths, reader
    self.shape = (len(paths), *size, reader.channels)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Int[np.ndarray, "b"]) -> UInt8[np.ndarray, "b h w c"]:
    found = np.empty((len(rows), *self.shape[1:]), np.uint8)
    for i, row in enumerate(rows):
      try:
        pixels = self._reader.read(self._paths[row])
      except InputError as error:
        raise InputError(f"{error}: repair or replace it") from error
      check_shape(pixels, self.shape[1:], str(self._paths[row]))
      found[i] = pixels
    return found


def check_shape(image: np.ndarray, shape: tuple[int, ...], name: str) -> None:
  """Raises `InputError` if the image of this name is not of the shape of the others."""
  if image.shape != shape:
    found, others = map(shape_text, (image.shape, shape))
    raise InputError(f"{name} is {found}, but the others are {others}: resize them first")


class Header(NamedTuple):
  """The header of a picture, read without decoding it."""

  height: int
  width: int
  mode: str
  bits: str

  @classmethod
  def read(cls, path: Path) -> "Header":
    with Image.open(path) as file:
      bits = bits_of(file)
      # Without EXIF data at the front, Pillow decodes a whole PNG to search for it behind the pixels.
      has_exif = file.format != "PNG" or not _PNG_EXIF.isdisjoint(file.info)
      has_exif &= file.format != "TIFF"  # whose size Pillow gives as turned
      turned = has_exif and _orientation(file) in _TURNED
      height, width = file.size if turned else file.size[::-1]
      return cls(height, width, file.mode, bits)

  @property
  def size(self) -> tuple[int, int]:
    return self.height, self.width


def reason_of(error: Exception) -> str:
  """Why a file cannot be read, as the end of a sentence that starts with its name."""
  if isinstance(error, InputError):
    return str(error)
  if isinstance(error, FileNotFoundError):
    return "does not exist"
  if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
    return f"exceeds the limit of {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller"
  if isinstance(error, UnidentifiedImageError):
    return "is not a picture that Pillow can read"
  return f"cannot be decoded ({str(error) or type(error).__name__})"


def for_all(work: Callable[[Any], T], items: Sequence[Any], what: str) -> list[T | str]:
  """Results of `work`, in order, or why it failed; in threads, with a progress bar if it takes long."""
  from rich.progress import Progress

  def attempt(item: Any) -> T | str:
    try:
      return work(item)
    except Exception as error:  # decoders may raise anything on a broken file
      return reason_of(error)

  # A thread takes many items at a time: handing out millions one by one would take longest.
  size = min(max(len(items) // 100, 1), 100)
  blocks = [items[i : i + size] for i in range(0, len(items), size)]
  started, results, pool = time.monotonic(), [], ThreadPoolExecutor()
  progress = Progress(console=console, transient=True)
  task = progress.add_task(what, total=len(items))
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)
      warnings.simplefilter("error", Image.DecompressionBombWarning)  # for headers
      for done in pool.map(lambda block: [attempt(item) for item in block], blocks):
        results += done
        progress.advance(task, len(done))
        if console.is_terminal and not progress.live.is_started and time.monotonic() - started > 2:
          progress.start()
  finally:
    if progress.live.is_started:
      progress.stop()
    pool.shutdown(cancel_futures=True)
  return results


@cache
def suffixes() -> frozenset[str]:
  """File suffixes of the formats that Pillow decodes without another program or library."""
  foreign = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
  known = Image.registered_extensions().items()
  return frozenset(suffix for suffix, name in known if name in Image.OPEN and name not in foreign)


def listed(names: Iterable[str], num: int = 3) -> str:
  """The first names, and how many more there are."""
  names = list(names)
  rest = f" and {len(names) - num:,} more" if len(names) > num else ""
  return ", ".join(names[:num]) + rest
