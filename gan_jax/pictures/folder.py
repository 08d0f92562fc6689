"""Folders of pictures as datasets."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from jaxtyping import UInt8

from gan_jax import memory
from gan_jax.dataset import Dataset
from gan_jax.output import cache_dir, write_cache
from gan_jax.pictures.layout import Found, printable, raise_first, scan
from gan_jax.pictures.reader import (
  GREY,
  Header,
  Pictures,
  Reader,
  Resizing,
  for_all,
  listed,
  open_upright,
)
from gan_jax.types import ImageSource, InputError


def load_folder(
  root: str | Path,
  *,
  image_size: int | None = None,
  fit: Resizing = "crop",
  stream: memory.Streaming = "no",
) -> Dataset:
  """Reads a folder of pictures; decoded pictures are kept in the user's cache.

  The labels come from one of three layouts:
    `train/CLASS/**`, with `train/unlabelled/**` for pictures without labels and `test/CLASS/**` for the
      test set, both optional;
    `CLASS/**` and `unlabelled/**` without a test set;
    a table `labels.csv` or `metadata.csv` with the columns `file_name,label` in place of class folders, in
      the folder itself, or in `train` and in `test`. Pictures that it does not list have no label.

  Args:
    root: the folder; hidden files and files without the suffix of a picture are skipped.
    image_size: resizes to squares of this side and appends `@` and the side to the dataset's name.
    fit: how the aspect ratio is kept, see `Reader`.
    stream: whether the training pictures are read during training, by `reader.Pictures`. A picture that
      cannot be decoded is then found only when it is reached, unlike one whose header cannot be read.

  Raises:
    InputError: no such layout, classes without readable pictures, several sizes without `image_size`, an
      unreadable test picture, more than 1 % unreadable training pictures, or links that leave the folder.
  """
  found = scan(Path(root))
  raise_first(found.problems)
  key = _cache_key(found, image_size, fit)
  read = None if stream == "yes" else _from_cache(key, found)
  if read is None:
    read = _read_folder(found, image_size, fit, stream)
    _to_cache(key, read)
  unreadable = {*read.unreadable}
  train = [example for i, example in enumerate(found.train) if i not in unreadable]
  classes = found.classes
  number: dict[str | None, int] = {name: i for i, name in enumerate(classes)} | {None: -1}
  notes = [*found.notes, *read.notes]
  if found.skipped:
    notes.append(f"skipped, as hidden or not a picture: {len(found.skipped):,} ({listed(found.skipped)})")
  name = f"folder:{printable(found.root.name)}"
  return Dataset(
    name=name if image_size is None else f"{name}@{image_size}",
    x_train=read.x_train,
    y_train=np.array([number[label] for _, label in train], np.int64),
    x_test=read.x_test,
    y_test=np.array([number[label] for _, label in found.test], np.int64),
    class_names=tuple(classes),
    note="; ".join(notes),
    own=True,
    reader=read.reader,
    names_train=[found.name(path) for path, _ in train],
    names_test=[found.name(path) for path, _ in found.test],
  )


class _Read(NamedTuple):
  """The pictures of a folder."""

  x_train: ImageSource
  x_test: UInt8[np.ndarray, "m h w c"]
  reader: Reader
  unreadable: list[int]
  """Positions, among the training pictures found, of those missing from `x_train`."""
  notes: list[str]


def _read_folder(found: Found, image_size: int | None, fit: Resizing, stream: memory.Streaming) -> _Read:
  paths = [path for path, _ in found.train]
  test = [path for path, _ in found.test]
  headers = for_all(Header.read, paths + test, "looking at the pictures")
  reasons = {i: header for i, header in enumerate(headers) if isinstance(header, str)}
  raise_first(unreadable_problems(found, reasons))
  known = {i: header for i, header in enumerate(headers) if isinstance(header, Header)}
  if image_size is None:
    raise_first(size_problems(found, [header.size for header in known.values()]))
  mine = [header for i, header in known.items() if i < len(paths)]
  notes, white = [], 65535
  deep = [paths[i] for i, header in known.items() if i < len(paths) and header.bits == "16"]
  if deep:
    largest = for_all(
      lambda path: int(np.asarray(open_upright(path)).max()), deep, "finding the largest 16-bit value"
    )
    white = max([value for value in largest if isinstance(value, int)], default=65535) or 1
    notes.append(
      f"in 16-bit pictures the value {white}, the largest in the training set, becomes 255, and"
      " larger values in the test set are clipped"
    )
  high_bytes = sum(header.bits == "16, read as 8" for header in known.values())
  if high_bytes:
    notes.append(
      f"pictures with several 16-bit channels, of which only the high byte is read: {high_bytes:,}"
    )
  reader = Reader(
    channels=1 if all(header.mode in GREY for header in mine) else 3,
    size=None if image_size is None else (image_size, image_size),
    fit=fit,
    white=white,
  )
  size = reader.size or mine[0].size
  failed = {i: reason for i, reason in reasons.items() if i < len(paths)}
  there = [path for i, path in enumerate(paths) if i not in failed]
  shape = (*size, reader.channels)
  lazy = memory.is_streamed(stream, (len(there), *shape))
  hint = "choose a smaller --image-size" if reader.size else "resize them with --image-size N"
  memory.check(len(test if lazy else paths + test), shape, hint)
  if lazy:
    if reader.channels == 3 and _is_grey(Pictures(there, reader, size)):
      reader = replace(reader, channels=1)
    x_train: ImageSource = Pictures(there, reader, size)
  else:
    x_train, failed = _read_all(reader, paths, size)
    raise_first(unreadable_problems(found, failed))
    if failed:
      x_train = np.delete(x_train, [*failed], axis=0)
    if reader.channels == 3 and _is_grey(x_train):
      reader, x_train = replace(reader, channels=1), np.ascontiguousarray(x_train[..., :1])
  x_test, failed_test = _read_all(reader, test, size)
  raise_first(unreadable_problems(found, {len(paths) + i: reason for i, reason in failed_test.items()}))
  if failed:
    names = listed(found.name(paths[i]) for i in failed)
    notes.append(
      f"{len(failed):,} of {len(paths):,} training pictures cannot be read and are left out ({names})"
    )
  return _Read(x_train, x_test, reader, [*failed], notes)


def _read_all(
  reader: Reader, paths: Sequence[Path], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "n h w c"], dict[int, str]]:
  """All pictures, and the reasons for those that cannot be read, whose rows are zero."""
  shape = (*size, reader.channels)
  x = np.zeros((len(paths), *shape), np.uint8)

  def read(i: int) -> None:
    pixels = reader.pixels(open_upright(paths[i]))
    if pixels.shape != shape:
      raise InputError("does not have the size that its header declares")
    x[i] = pixels

  results = for_all(read, range(len(paths)), f"reading {len(paths):,} pictures")
  return x, {i: reason for i, reason in enumerate(results) if reason is not None}


def _is_grey(x: Any) -> bool:
  """Whether all three channels are equal everywhere; reads only until the first difference."""
  size = min(256, max(1, _GREY_BYTES // math.prod(x.shape[1:])))
  rows = (x[np.arange(i, min(i + size, len(x)))] for i in range(0, len(x), size))
  return all((a[..., :1] == a).all() for a in rows)


def size_problems(found: Found, sizes: list[tuple[int, int]]) -> list[str]:
  """A problem if there are several sizes."""
  several = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
  if len(several) < 2:
    return []
  smallest, largest = (f"{height}x{width}" for height, width in (several[0], several[-1]))
  return [
    f"{found.root} holds pictures of {len(several):,} sizes, from {smallest} to {largest} (height x width):"
    f" resize them with --image-size N, for instance {suggested_side(sizes)}"
  ]


def suggested_side(sizes: list[tuple[int, int]]) -> int:
  """The largest of the sides tested with the networks, up to 64, that enlarges few pictures."""
  short = np.quantile([min(size) for size in sizes], 0.05)
  return max((side for side in (16, 32, 64) if side <= short), default=16)


def unreadable_problems(found: Found, reasons: dict[int, str]) -> list[str]:
  """Problems if test pictures, over 1 % of the training pictures, or all of a class cannot be read."""
  paths = [path for path, _ in found.train + found.test]
  problems, num = [], len(found.train)
  told = lambda which: "; ".join(f"{found.name(paths[i])} {reasons[i]}" for i in which[:3])
  of_train, of_test = [i for i in reasons if i < num], [i for i in reasons if i >= num]
  if 100 * len(of_train) > num:
    problems.append(
      f"{len(of_train):,} of the {num:,} training pictures of {found.root}, more than 1 %, cannot be read;"
      f" repair or remove them: {told(of_train)}"
    )
  left = {label for i, (_, label) in enumerate(found.train) if i not in reasons}
  gone = [name for name in found.classes if name not in left]
  if gone:
    problems.append(f"{found.root} holds no picture of {listed(gone)} that can be read")
  if of_test:
    problems.append(
      f"{len(of_test):,} of the test pictures of {found.root} cannot be read; repair or remove them:"
      f" {told(of_test)}"
    )
  return problems


# --- Decoded pictures in the user's cache

_FORMAT = f"3, Pillow {PIL.__version__}"
_CACHE_BYTES = 2 * 10**9
_GREY_BYTES = 2**25


def _cache_key(found: Found, image_size: int | None, fit: Resizing) -> str:
  """SHA-256 of the inputs of the decoded pictures, as far as known without reading them."""
  digest = hashlib.sha256(os.fsencode(f"{_FORMAT} {found.root} {image_size} {fit} {len(found.train)}"))
  for path, _ in found.train + found.test:
    try:
      stat = path.stat()
      # The change time distinguishes files that an archive unpacks with their old modification times.
      state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    except OSError:
      state = ()
    digest.update(os.fsencode(f"\0{found.name(path)}\0{state}"))
  return digest.hexdigest()


def _from_cache(key: str, found: Found) -> _Read | None:
  path = cache_dir() / "pictures" / f"{key}.npz"
  try:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
      x_train, x_test = file["x_train"], file["x_test"]
      about = json.loads(str(file["about"]))
    read = _Read(x_train, x_test, Reader(**about["reader"]), [], about["notes"])
    whole = (len(x_train), len(x_test)) == (len(found.train), len(found.test))
    if not whole or x_train.ndim != 4 or x_train.shape[1:] != x_test.shape[1:]:
      return None
    if {x_train.dtype, x_test.dtype} != {np.dtype(np.uint8)}:
      return None
    with contextlib.suppress(OSError):  # a cache that may only be read
      os.utime(path)  # the least recently used are removed first
    return read
  except Exception:  # with any fault, the pictures are read anew
    return None


def _to_cache(key: str, read: _Read) -> None:
  if read.unreadable:  # perhaps not for good
    return
  if not isinstance(read.x_train, np.ndarray) or read.x_train.nbytes + read.x_test.nbytes > _CACHE_BYTES:
    return
  folder = cache_dir() / "pictures"
  about = {"reader": asdict(read.reader), "notes": read.notes}
  arrays = {"x_train": read.x_train, "x_test": read.x_test, "about": np.array(json.dumps(about))}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_cache(folder / f"{key}.npz", arrays)
    files = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in folder.iterdir()]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
      if total <= _CACHE_BYTES:
        break
      path.unlink(missing_ok=True)
      total -= size
  except OSError:
    pass  # a cache that cannot be written is not an error
