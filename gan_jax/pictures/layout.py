"""The pictures of a folder and their classes, found without opening any picture."""

import csv
import io
import os
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gan_jax.pictures.reader import listed, suffixes
from gan_jax.types import InputError

_TRAIN, _TEST, _VALID = ("train", "training"), ("test", "testing"), ("valid", "validation", "val")
_UNLABELLED = ("unlabelled", "unlabeled", "unsup")
_TABLES = ("labels.csv", "metadata.csv")
_NO_DATA = ("thumbs.db", "desktop.ini", "__macosx")

_Example = tuple[Path, str | None]
"""A picture and its class; None for no label."""


class _Level(NamedTuple):
  """The direct contents of a folder, sorted by name."""

  folders: list[Path]
  pictures: list[Path]
  tables: list[Path]


@dataclass
class Found:
  """The contents of a folder before any picture is opened. Problems are collected for `check` to list."""

  root: Path
  train: list[_Example] = field(default_factory=list)
  test: list[_Example] = field(default_factory=list)
  skipped: list[str] = field(default_factory=list)
  notes: list[str] = field(default_factory=list)
  problems: list[str] = field(default_factory=list)
  levels: dict[Path, _Level] = field(default_factory=dict)

  @property
  def classes(self) -> list[str]:
    return sorted({label for _, label in self.train if label is not None})

  def name(self, path: Path) -> str:
    """A path as messages show it, the same on every system."""
    return _below(path, self.root)

  def level(self, folder: Path) -> _Level:
    """Lists a folder, once."""
    if folder in self.levels:
      return self.levels[folder]
    level = self.levels[folder] = _Level([], [], [])
    real = os.path.realpath(self.root)
    try:
      entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
      self.problems.append(f"the folder {folder} cannot be read ({error.strerror})")
      return level
    for entry in entries:
      path, name, is_link = folder / entry.name, entry.name.lower(), entry.is_symlink()
      there = path if is_link else entry  # an entry knows its type without another disk access
      if name.startswith(".") or name in _NO_DATA:
        self.skipped.append(self.name(path))
      elif is_link and not Path(os.path.realpath(path)).is_relative_to(real):
        self.problems.append(
          f"{path} is a link that leads out of the folder {self.root}: replace it with what it points to"
        )
      elif there.is_dir():
        level.folders.append(path)
      elif not there.is_file() and path.exists():
        self.skipped.append(self.name(path))  # a pipe, which would block, or a device
      elif os.path.splitext(name)[1] in suffixes():
        level.pictures.append(path)
      elif name in _TABLES:
        level.tables.append(path)
      else:
        self.skipped.append(self.name(path))
    return level

  def below(self, folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """All pictures in a folder and its subfolders."""
    real, level = os.path.realpath(folder), self.level(folder)
    if real in above:
      self.problems.append(f"{folder} leads back to a folder that contains it: remove the link")
      return []
    return level.pictures + [p for sub in level.folders for p in self.below(sub, (*above, real))]

  def by_name(self, folder: Path) -> dict[str, Path]:
    """All pictures in a folder and its subfolders, by their names in a table of labels."""
    paths: dict[str, Path] = {}
    for path in self.below(folder):
      name = _below(path, folder)
      if name in paths:  # in another encoding, or with an accent as a character of its own
        self.problems.append(f"two pictures of {folder} have names that read {name}: rename one of them")
      paths[name] = path
    return paths


def below(folder: Path) -> tuple[dict[str, Path], list[str]]:
  """All pictures in a folder and its subfolders, by their names in a table of labels; and what is skipped.

  Raises:
    InputError: a link leaves the folder, or two names look the same.
  """
  found = Found(folder)
  paths = found.by_name(folder)
  raise_first(found.problems)
  return paths, sorted(found.skipped)


def labelled(folder: Path, classes: Sequence[str]) -> set[str]:
  """Names of the pictures that already have a label, as in `below`.

  Args:
    folder: any folder of pictures. A picture has a label if the table of the folder gives it one or, in a
      layout of `load_folder` with a folder for one of the classes, if it is in a class folder, for
      training, validation or test.
    classes: class names.

  Raises:
    InputError: a table cannot be read.
  """
  found = Found(folder)
  tables = found.level(folder).tables
  labels = {name: label for table in tables for name, label in _read_table(found, table).items()}
  raise_first(found.problems)
  names = {name for name, label in labels.items() if label}
  laid_out = scan(folder)  # its problems matter only for training
  placed = [(path, label) for path, label in laid_out.train + laid_out.test if label is not None]
  if any(label in classes for _, label in placed):
    names |= {laid_out.name(path) for path, _ in placed}
    unread = [sub for sub in found.level(folder).folders if sub.name.casefold() in _VALID]
    names |= {found.name(path) for sub in unread for path in found.below(sub)}
  return names


def raise_first(problems: Sequence[str]) -> None:
  if problems:
    raise InputError(problems[0])


def _below(path: Path, folder: Path) -> str:
  """A path relative to a folder; `Path.relative_to` is far slower, and there may be millions."""
  return printable(str(path).removeprefix(os.path.join(folder, "")))


def printable(name: str) -> str:
  """A printable name that is the same on every system."""
  return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="replace"))


def scan(root: Path) -> Found:
  """Finds the pictures of a folder and their classes, in the layouts of `load_folder`."""
  root = Path(os.path.abspath(root.expanduser()))
  found = Found(root)
  if not root.is_dir():
    found.problems.append(f"{root} is not a folder")
    return found
  level = found.level(root)
  named = lambda names: [folder for folder in level.folders if folder.name.casefold() in names]
  train, test, valid = named(_TRAIN), named(_TEST), named(_VALID)
  if test and valid:
    found.notes.append(f"the test set is {test[0].name}, and {listed(p.name for p in valid)} is not read")
  parts = train, test or valid
  for folders in parts:
    if len(folders) > 1:
      both = " and ".join(folder.name for folder in folders)
      found.problems.append(f"{root} holds both {both}: keep one of them")
  if train:
    if level.tables:
      found.problems.append(
        f"{level.tables[0]} lies beside {train[0].name}: move it into {train[0]}, or give it another name"
      )
    _no_loose(found, root, level.pictures, train[0])
    found.train = _part(found, train[0])
    found.train += [(p, None) for folder in named(_UNLABELLED) for p in found.below(folder)]
    known = (*_TRAIN, *_TEST, *_VALID, *_UNLABELLED)
    others = [folder.name for folder in level.folders if folder.name.casefold() not in known]
    if others:
      found.notes.append(f"folders beside {train[0].name} are not read: {listed(others)}")
  elif parts[1]:
    found.problems.append(
      f"{root} holds {parts[1][0].name} but no folder train: add one with the training pictures"
    )
  else:
    found.train = _part(found, root)
  if parts[1]:
    found.test = _part(found, parts[1][0], labelled=True)
    if not found.test and not found.problems:
      found.problems.append(f"the test folder {parts[1][0]} holds no pictures: fill it or remove it")
  _check_classes(found)
  used = {table for path in (root, *train, *parts[1]) for table in found.level(path).tables}
  tables = [table for level in found.levels.values() for table in level.tables if table not in used]
  found.problems += [
    f"{table} labels pictures in an unlabelled folder: move them into class folders and remove the table"
    for table in tables
    if table.name.lower() == "labels.csv" and table.parent.name.casefold() in _UNLABELLED
  ]
  found.skipped = sorted({*found.skipped, *map(found.name, tables)})
  found.problems = list(dict.fromkeys(found.problems))
  return found


def _part(found: Found, folder: Path, *, labelled: bool = False) -> list[_Example]:
  """The training or test pictures, from class folders or a table; `labelled`: whether all need labels."""
  level = found.level(folder)
  if level.tables:
    examples = _by_table(found, folder, level.tables)
  else:
    examples = []
    for sub in level.folders:
      num_skipped = len(found.skipped)
      pictures = found.below(sub)
      label = printable(sub.name)
      if sub.name.casefold() in _UNLABELLED:
        label = None
      elif "\ufffd" in label:
        found.problems.append(f"the name of the class folder {folder / label} is not UTF-8: rename it")
      elif not pictures:
        others = found.skipped[num_skipped:]
        mend = ": fill"
        if others:  # such as HEIC or camera raw files
          mend = f" that can be read, only {listed(others)}: convert them to JPEG or PNG,"
        found.problems.append(f"the class folder {sub} holds no pictures{mend} or remove it")
      examples += [(path, label) for path in pictures]
    if level.pictures and not level.folders:
      found.problems.append(
        f"{folder} holds pictures but neither class folders nor a table labels.csv with the columns"
        " file_name,label: add one of them"
      )
    else:
      _no_loose(found, folder, level.pictures, folder)
  if labelled and any(label is None for _, label in examples):
    names = listed(found.name(path) for path, label in examples if label is None)
    found.problems.append(f"test pictures need labels, but these have none: {names}")
    examples = [example for example in examples if example[1] is not None]
  return examples


def _no_loose(found: Found, folder: Path, pictures: list[Path], train: Path) -> None:
  if pictures:
    found.problems.append(
      f"pictures in {folder} lie outside the class folders ({listed(p.name for p in pictures)}):"
      f" move them into one, or into {train / 'unlabelled'}"
    )


def _check_classes(found: Found) -> None:
  if found.problems and not found.train:
    return  # nothing to check yet
  if not found.classes:
    found.problems.append(
      f"{found.root} holds no labelled pictures: make a folder for each class, or a table labels.csv with"
      " the columns file_name,label"
    )
  elif len(found.classes) == 1:
    found.problems.append(
      f"{found.root} holds only one class, {found.classes[0]}, but a classifier needs two: make a folder"
      " for each, or name the folder that contains them"
    )
  unknown = sorted({label for _, label in found.test if label is not None} - {*found.classes})
  if unknown:
    found.problems.append(
      f"the test set of {found.root} has classes without training pictures: {listed(unknown)}"
    )
  tested = {label for _, label in found.test}
  untested = [name for name in found.classes if name not in tested]
  if found.test and untested:
    found.notes.append(f"the test set has no pictures of {listed(untested)}")


def _by_table(found: Found, folder: Path, tables: list[Path]) -> list[_Example]:
  """Pictures with the labels of a table; only the table labels, and folder names may only repeat it."""
  if len(tables) > 1:
    found.problems.append(f"{folder} holds both {tables[0].name} and {tables[1].name}: keep one of them")
  labels = _read_table(found, tables[0])
  pictures = found.by_name(folder)
  missing = [name for name in labels if name not in pictures]
  if missing:
    found.problems.append(f"{tables[0]} lists files that are not pictures in {folder}: {listed(missing)}")
  classes = {label for label in labels.values() if label}
  for name in pictures:
    place, label = name.partition("/")[0], labels.get(name, "")
    if "/" in name and place in classes and place != label:
      found.problems.append(
        f"{name} lies in a folder of class {place}, but {tables[0]} says {label or 'nothing'}: label by"
        " folders or by the table, not both"
      )
      break
  return [(path, labels.get(name) or None) for name, path in pictures.items()]


def _read_table(found: Found, table: Path) -> dict[str, str]:
  """Labels by file name; an empty one means no label."""
  try:
    rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""), strict=True)
    columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    if not {"file_name", "label"} <= {*columns}:
      found.problems.append(
        f"{table} needs the columns file_name and label, separated by commas, but its first line is"
        f" {','.join(columns) or 'empty'}"
      )
      return {}
    lines = [(rows.line_num, row) for row in rows]
  except UnicodeDecodeError:
    found.problems.append(f"{table} is not encoded as UTF-8: save it in that encoding")
    return {}
  except (OSError, csv.Error) as error:
    found.problems.append(f"{table} cannot be read as a table ({error})")
    return {}
  labels = {}
  for number, row in lines:
    clean = lambda column, row=row: printable((row[column] or "").strip())
    name = clean("file_name")
    path = posixpath.normpath(name)
    wrong = None
    if None in row:
      wrong = "has more columns than the first: quote values that contain a comma"
    elif not name:
      wrong = "has no file_name"
    elif path.startswith("/") or path.split("/")[0] == "..":
      wrong = f"names {name}, which is not in the folder of the table"
    elif path in labels:
      wrong = f"lists {name} a second time"
    elif clean("label") == "-1":
      wrong = "has the label -1: leave it empty for no label"
    if wrong:
      found.problems.append(f"line {number} of {table} {wrong}")
    else:
      labels[path] = clean("label")
  return labels
