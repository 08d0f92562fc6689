"""Output of a run: messages, JSON, files. Files are written atomically."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gan_jax.types import InputError, Json

console = Console(stderr=True, highlight=False, emoji=False)  # else `folder:a:` shows as a boxed letter


def shape_text(shape: Iterable[int]) -> str:
  """A shape in words: 28x28x1."""
  return "x".join(map(str, shape))


def say(text: str) -> None:
  """Prints a plain message on standard error."""
  console.print(text, markup=False, soft_wrap=True)


def cache_dir() -> Path:
  """The cache directory: `gan_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gan_jax"


def check_file(path: Path) -> None:
  """Raises `InputError` if a file cannot be written. It tries to write, and leaves nothing behind."""
  try:
    if path.is_dir():
      raise InputError(f"{path} is a folder: name a file")
    if not path.exists() or path.is_file():  # nothing is written beside a pipe or a device
      there = next(above for above in path.resolve().parents if above.exists())
      tempfile.TemporaryFile(dir=there).close()
  except OSError as error:
    raise InputError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A path to write to, which replaces `path` at the end: a reader never sees a partial file.

  Of a symbolic link, its target is replaced.
  """
  path = path.resolve()
  beside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield beside
    beside.replace(path)
  except BaseException:
    beside.unlink(missing_ok=True)
    raise


def write_text(path: Path, text: str) -> None:
  """Writes text atomically; file names in it that are not UTF-8 get question marks."""
  write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file atomically. Pipes and devices are written to directly."""
  if path.exists() and not path.is_file():
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as beside:
    beside.write_bytes(content)


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz file to a cache; a folder that cannot be written is not an error."""
  with contextlib.suppress(OSError), replacing(path) as beside, open(beside, "wb") as file:
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def write_json(path: Path, value: Any) -> None:
  """Writes indented JSON."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[Json]:
  """The rows of a file of JSON lines; a truncated last line is ignored.

  Raises:
    InputError: a whole line is not JSON, or not a row with these keys.
  """
  if not path.exists():
    return []
  rows = []
  for i, line in enumerate(path.read_bytes().splitlines(keepends=True)):
    if line.endswith(b"\n"):
      try:
        row = json.loads(line)
        rows.append({**row, **{key: row[key] for key in keys}})
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"line {i + 1} of {path} is not a complete row: repair or remove it") from error
  return rows
