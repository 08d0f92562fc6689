"""How --overwrite replaces a run: the old one is set aside until the new one has begun."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

REPLACED, REPLACING = ".replaced", ".replacing"
"""Where the files of the old run are, and where they are while being moved there or back."""
_FILES = ".files.json"
"""Beside them, the list of files that the new run writes: another experiment may settle what it left."""


def remove(path: Path, files: Iterable[str]) -> None:
  """Removes these files and folders of a run; of a symbolic link, only the link."""
  for name in files:
    target = path / name
    if target.is_dir() and not target.is_symlink():
      shutil.rmtree(target)
    else:
      target.unlink(missing_ok=True)


def set_aside(path: Path, files: Sequence[str]) -> None:
  """Moves these files of a run out of the way of a new one in the same folder."""
  moving = path / REPLACING
  moving.mkdir()
  (moving / _FILES).write_text(json.dumps(list(files)))
  for name in files:
    if os.path.lexists(path / name):
      (path / name).rename(moving / name)
  moving.rename(path / REPLACED)


def settle(path: Path, files: Sequence[str], *, complete: bool = False) -> None:
  """Finishes what `set_aside` began: removes the old run if the new one has begun, else puts it back.

  It can be called again after being killed at any point.
  """
  aside, moving = path / REPLACED, path / REPLACING
  if aside.exists():
    with contextlib.suppress(OSError, ValueError):
      files = json.loads((aside / _FILES).read_text())
    if complete or has_begun(path, files):
      remove(path, [REPLACED])
    else:
      remove(path, files)
      aside.rename(moving)
  if moving.exists():
    (moving / _FILES).unlink(missing_ok=True)
    for name in os.listdir(moving):
      remove(path, [name])
      (moving / name).rename(path / name)
    moving.rmdir()


def has_begun(path: Path, files: Sequence[str]) -> bool:
  """Whether a run or one of its parts has a first row of metrics or results, or a checkpoint."""
  if "checkpoints" in files and any((path / "checkpoints").rglob("_CHECKPOINT_METADATA")):
    return True
  rows = (row for name in files for row in (path / name, *(path / name).rglob("*.jsonl")))
  return any(row.suffix == ".jsonl" and row.is_file() and row.stat().st_size for row in rows)
