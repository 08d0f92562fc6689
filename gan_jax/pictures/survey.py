"""Checks user data, and reports its contents, before training."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gan_jax.pictures.arrays import array_problems, is_uint16, load_arrays, open_arrays
from gan_jax.pictures.folder import size_problems, suggested_side, unreadable_problems
from gan_jax.pictures.layout import printable, scan
from gan_jax.pictures.reader import Header, for_all, listed, open_upright
from gan_jax.types import InputError, Json


def check(path: str | Path) -> Json:
  """Checks everything in a folder of pictures or an .npz file, without stopping at a problem.

  Returns:
    `path`; `problems`: one sentence for each that `load_folder` or `load_arrays` would refuse; `notes`;
    `labelled`, `unlabelled`, `test`: numbers of images, None if a problem hides them; `classes`: by name,
    the numbers `train` and `test`; `sizes` (height x width), `modes`, `bits`: numbers of images by value;
    `largest_value` of 16-bit training pictures, or None; `skipped`: files; `unreadable`: reasons by file;
    `duplicates`: groups of training images with the same decoded content; `in_train_and_test`: pairs of a
    test image and the identical training images; `image_size`: a side to resize to, or None.
  """
  text = str(path)
  if text.startswith("arrays:") or text.endswith(".npz"):
    found = _check_arrays(Path(text.removeprefix("arrays:")).expanduser())
  else:
    found = _check_folder(Path(text.removeprefix("folder:")))
  single = [name for name, numbers in found["classes"].items() if numbers["train"] == 1]
  if single and not found["test"]:
    found["notes"].append(
      f"no error can be estimated: there are no test images, and only one label of class {listed(single)}"
    )
  return found


def print_check(found: Json) -> None:
  """Prints the result of `check` in readable form on standard output."""
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  overview = Table("", escape(found["path"]), show_edge=False)
  counts = lambda numbers: listed((f"{num:,} of {name}" for name, num in numbers.items()), 5)
  more = lambda group: [f"{len(group) - 5:,} more"] if len(group) > 5 else []
  groups = [" = ".join([*group[:5], *more(group)]) for group in found["duplicates"]]
  lines = {
    "labelled": found["labelled"],
    "unlabelled": found["unlabelled"],
    "test": found["test"],
    "height x width": counts(found["sizes"]),
    "kinds": counts(found["modes"]),
    "bits": counts(found["bits"]),
    "largest 16-bit value": found["largest_value"],
    "skipped": found["skipped"] and f"{len(found['skipped']):,}: {listed(found['skipped'])}",
    "unreadable": found["unreadable"] and f"{len(found['unreadable']):,}: {listed(found['unreadable'])}",
    "duplicates in training": groups and f"{len(groups):,} groups: {listed(groups)}",
  }
  for name, value in lines.items():
    if value or value == 0:
      overview.add_row(name, f"{value:,}" if isinstance(value, int) else escape(value))
  console = Console(highlight=False, emoji=False)
  console.print(overview)
  if found["classes"]:
    classes = Table("class", "training", "test", show_edge=False)
    for name, numbers in found["classes"].items():
      classes.add_row(escape(name), f"{numbers['train']:,}", f"{numbers['test']:,}")
    console.print(classes)
  for problem in found["problems"]:
    console.print(f"[bold red]problem:[/] {escape(printable(problem))}", soft_wrap=True)
  for note in found["notes"]:
    console.print(f"note: {escape(note)}", soft_wrap=True)
  both = found["in_train_and_test"]
  if both:
    names = listed(f"{test} = {train[0]}" for test, train in both)
    console.print(
      f"[bold]{len(both):,} of the {found['test']:,} test images are in the training set as well, so the"
      f" test error will be too low: {escape(names)}[/]",
      soft_wrap=True,
    )
  if found["image_size"]:
    console.print(f"suggested: --image-size {found['image_size']}")
  if not found["problems"]:
    console.print(
      "this data can be used for training" + (" with --image-size" if len(found["sizes"]) > 1 else "")
    )


def _nothing(path: Path) -> Json:
  """The result of a check that has found nothing yet."""
  counts = dict.fromkeys(("labelled", "unlabelled", "test"))
  lists = {name: [] for name in ("problems", "notes", "skipped", "duplicates", "in_train_and_test")}
  tables = {name: {} for name in ("classes", "sizes", "modes", "bits", "unreadable")}
  return {
    "path": printable(str(path)),
    **counts,
    **lists,
    **tables,
    "largest_value": None,
    "image_size": None,
  }


class _Look(NamedTuple):
  """One decoded picture."""

  header: Header
  digest: str
  """Digest of its pixels, the same for a grey picture stored as colour."""
  largest: int

  @classmethod
  def at(cls, path: Path) -> "_Look":
    pixels = np.asarray(open_upright(path))
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
      pixels = pixels[..., 0]
    return cls(Header.read(path), _digest(pixels), int(pixels.max()))


def _digest(x: np.ndarray) -> str:
  return hashlib.sha256(f"{x.shape} {x.dtype} ".encode() + x.tobytes()).hexdigest()


def _check_folder(root: Path) -> Json:
  found = scan(root)
  examples = found.train + found.test
  looks = for_all(_Look.at, [path for path, _ in examples], f"checking {len(examples):,} pictures")
  reasons = {i: look for i, look in enumerate(looks) if isinstance(look, str)}
  seen = {i: look for i, look in enumerate(looks) if isinstance(look, _Look)}
  headers = [look.header for look in seen.values()]
  sizes = [header.size for header in headers]
  num, name = len(found.train), lambda i: found.name(examples[i][0])
  several = size_problems(found, sizes)
  known = lambda part: Counter(label for _, label in part if label is not None)
  train, test = known(found.train), known(found.test)
  deep = [look.largest for i, look in seen.items() if i < num and look.header.bits == "16"]
  result = _nothing(found.root) | {
    "problems": found.problems + unreadable_problems(found, reasons),
    "notes": found.notes + several,
    "labelled": train.total(),
    "unlabelled": num - train.total(),
    "test": len(found.test),
    "classes": {k: {"train": train[k], "test": test[k]} for k in sorted({*train, *test})},
    "sizes": _counted(f"{height}x{width}" for height, width in sizes),
    "modes": _counted(header.mode for header in headers),
    "bits": _counted(header.bits for header in headers),
    "largest_value": max(deep, default=None),
    "skipped": found.skipped,
    "unreadable": {name(i): reason for i, reason in reasons.items()},
    "image_size": suggested_side(sizes) if several or max(map(max, sizes), default=0) > 64 else None,
  }
  digests = [(name(i), look.digest) for i, look in seen.items() if i < num]
  result |= _same(digests, [(name(i), look.digest) for i, look in seen.items() if i >= num])
  labels = {name(i): label for i, (_, label) in enumerate(examples)}
  twice = [group for group in result["duplicates"] if len({labels[k] for k in group} - {None}) > 1]
  if twice:
    groups = listed(" = ".join(group) for group in twice)
    result["notes"].append(f"{len(twice):,} pictures have several classes: {groups}")
  return result


def _check_arrays(path: Path) -> Json:
  result = _nothing(path)
  try:
    arrays = open_arrays(path)
  except InputError as error:
    return result | {"problems": [str(error)]}
  problems = list(array_problems(arrays))
  if problems:
    return result | {"problems": [f"{path}: {problem}" for problem in problems]}
  dataset = load_arrays(path)
  y, y_test, x = dataset.y_train, dataset.y_test, arrays["x"]
  height, width, channels = dataset.image_shape
  num_train, num_test = (
    np.bincount(part[part >= 0], minlength=dataset.num_classes).tolist() for part in (y, y_test)
  )
  kind = "vectors" if dataset.scaling else f"images of {channels} channel" + "s" * (channels > 1)
  size, total = f"{width:,} features" if dataset.scaling else f"{height}x{width}", len(x) + len(y_test)
  result |= {
    "notes": [dataset.note] if dataset.note else [],
    "labelled": int((y >= 0).sum()),
    "unlabelled": int((y < 0).sum()),
    "test": len(y_test),
    "classes": {
      name: {"train": num_train[k], "test": num_test[k]} for k, name in enumerate(dataset.class_names)
    },
    "sizes": {size: total},
    "modes": {kind: total},
    "bits": {str(8 * x.dtype.itemsize): total},
    "largest_value": int(x.max()) if is_uint16(x) and x.ndim > 2 else None,
    "image_size": None
    if dataset.scaling or max(height, width) <= 64
    else suggested_side([(height, width)]),
  }
  name = lambda key: [(f"{key}[{i}]", _digest(row)) for i, row in enumerate(arrays.get(key, ()))]
  return result | _same(name("x"), name("x_test"))


def _counted(names: Iterable[str]) -> dict[str, int]:
  """The count of each name, the most frequent first."""
  return dict(Counter(names).most_common())


def _same(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Json:
  """Names of images with equal digests."""
  groups = defaultdict(list)
  for name, digest in train:
    groups[digest].append(name)
  return {
    "duplicates": [group for group in groups.values() if len(group) > 1],
    "in_train_and_test": [[name, groups[digest]] for name, digest in test if digest in groups],
  }
