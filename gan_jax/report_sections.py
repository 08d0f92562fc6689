"""The sections of a page on a K-class discriminator: its labels, notable images, reliability, mistakes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gan_jax import figures, metrics
from gan_jax.evaluate import Evaluation, Shown
from gan_jax.report import PERCENT, TEST_IMAGES, Picture, Section

_PER_CLASS = 10
"""Labelled images shown per class."""
_CLASSES = 50
"""The most classes whose labelled images are shown."""
_ROWS = 20
"""Rows of a table of classes or mistakes; a confusion matrix with more classes is shown as such a table."""


def sections(
  folder: Path,
  found: Evaluation,
  class_names: Sequence[str],
  x_lab: UInt8[Any, "n h w c"],
  y_lab: Int[Any, "n"],
  *,
  measured_on: str = TEST_IMAGES,
  image_names: Sequence[str] = (),
  visible: bool = True,
) -> list[Section]:
  """Labelled images, the least certain and the worst of those measured on, reliability, mistakes.

  Args:
    folder: folder of the run, with `reliability.png` and `confusion.png`.
    found: its evaluation.
    class_names: names of the K classes.
    x_lab: the labelled images that were used, as bytes, an array or `data.Chosen`.
    y_lab: their classes.
    measured_on: the kind of images that `found` was measured on.
    image_names: names of those images, indexed by the positions in `found`; if empty, numbers are shown.
    visible: whether inputs can be shown as images; vectors cannot.
  """
  shown = [_labelled(class_names, x_lab, np.asarray(y_lab))] if visible else []
  tiles = lambda images: _tiles(images, class_names, image_names)
  if visible:
    text = f"Of the {measured_on}; the lowest probability of the predicted class is first."
    shown.append(Section("Least certain images", text=text, tiles=tiles(found.least_certain)))
  if len(found.worst.indices) and visible:
    text = f"Misclassified {measured_on}; the lowest probability of the true class is first."
    shown.append(Section("Worst mistakes", text=text, tiles=tiles(found.worst)))
  ece = 100 * metrics.calibration_error(found.probs, found.y)
  shown.append(
    Section(
      "Reliability",
      text=f"Expected calibration error {ece:.1f} % in 15 bins: how far confidence and accuracy are apart"
      " on average. Bars below the diagonal: the classifier is overconfident.",
      pictures=[Picture(folder / "reliability.png")],
    )
  )
  shown += _abstaining(found, measured_on)
  return [*shown, *_mistakes(folder, found.confusion, class_names)]


def _labelled(class_names: Sequence[str], x: np.ndarray, y: np.ndarray) -> Section:
  strips, counts = [], np.bincount(y, minlength=len(class_names))
  by_class = np.split(np.argsort(y, kind="stable"), np.cumsum(counts)[:-1])
  classes = np.flatnonzero(counts).tolist()
  for k in classes[:_CLASSES]:
    strip = figures.grid_png(x[by_class[k][:_PER_CLASS]] / np.float32(255), columns=_PER_CLASS)
    more = f", {_PER_CLASS} of {counts[k]}" if counts[k] > _PER_CLASS else ""
    strips.append(Picture(strip, f"{class_names[k]}{more}"))
  rest = f" Only the first {_CLASSES} classes are shown." if len(classes) > _CLASSES else ""
  return Section("Labelled images", text=f"All {len(y):,} labels that were used.{rest}", pictures=strips)


def _tiles(shown: Shown, class_names: Sequence[str], image_names: Sequence[str]) -> list[Picture]:
  tiles = []
  for index, x, y, p in zip(*shown, strict=True):
    predicted = int(p.argmax())
    caption = f"true {class_names[y]}"
    if predicted == y:
      caption += f", {_percent(p[y])}\ncorrect"
    else:
      caption += f", {_percent(p[y])}\npredicted {class_names[predicted]}, {_percent(p[predicted])}"
    name = image_names[index] if image_names else f"no. {index}"
    tiles.append(Picture(figures.grid_png(x[None] / np.float32(255), columns=1), f"{caption}\n{name}"))
  return tiles


def _abstaining(found: Evaluation, measured_on: str) -> list[Section]:
  """The remaining error if the classifier may abstain; empty if it makes no errors."""
  rows, error = [], 100 * float((found.probs.argmax(axis=-1) != found.y).mean())
  for limit in (error / 2, error / 4, 0.0) if error else ():
    kept = metrics.abstention_threshold(found.probs, found.y, limit)
    if kept is not None:
      # Full precision: most thresholds are close to 1, where rounding would admit other images.
      rows.append((f"{limit:.2f} %", str(np.float32(kept[0])), f"{100 * kept[1]:.1f} %"))
  section = Section(
    "Abstention",
    text=f"The error if the classifier abstains below a confidence, on these {measured_on}: on other"
    " images, the same threshold may give another error.",
    header=("error of the rest at most", "confidence at least", "images decided"),
    rows=rows,
  )
  return [section] if rows else []


def _mistakes(folder: Path, counts: np.ndarray, class_names: Sequence[str]) -> list[Section]:
  """The confusion matrix, or for many classes its largest entries, and the recall per class."""
  num = counts.sum(axis=1)
  text = "Images by true and predicted class; correct ones are on the diagonal."
  if len(class_names) <= _ROWS:
    picture = Picture(folder / "confusion.png")
    confusion = Section("Confusion matrix", text=text, pictures=[picture], full_size=len(class_names) > 10)
  else:
    off = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    largest = [divmod(int(i), len(off)) for i in np.argsort(-off, axis=None, kind="stable")[:_ROWS]]
    rows = [(class_names[i], class_names[j], str(off[i, j])) for i, j in largest if off[i, j]]
    confusion = Section("Most frequent mistakes", header=("true", "predicted", "images"), rows=rows)
  recall = metrics.recall(counts)
  lowest = np.argsort(recall, kind="stable")[:_ROWS]  # nan comes last
  rows = [(class_names[k], str(num[k]), f"{recall[k]:.1f} %") for k in map(int, lowest) if num[k]]
  by_class = Section(
    "Recall by class",
    text="Images of each class that are found, the lowest recall first.",
    header=("class", "images", "recall"),
    rows=rows,
  )
  return [confusion, by_class]


def _percent(p: float) -> str:
  """A probability in percent; values close to 0 or 1 are not rounded to them."""
  text = f"{100 * p:.0f}" if 0.01 <= p <= 0.99 else "< 1" if p < 0.5 else "> 99"
  return f"{text}{PERCENT}"
