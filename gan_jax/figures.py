"""Figures of a run: image grids, curves, matrices."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from gan_jax.metrics.uncertainty import Reliability
from gan_jax.output import write_bytes
from gan_jax.types import Json


def sample_grid(path: Path, x: Float[np.ndarray, "n h w c"]) -> None:
  """Writes images in [0, 1] to one PNG file, ten in a row, see `grid_png`."""
  write_bytes(path, grid_png(x, columns=10))


def grid_png(x: Float[np.ndarray, "n h w c"], columns: int) -> bytes:
  """Images in [0, 1] as one PNG, row by row; small images are enlarged without interpolation."""
  from PIL import Image

  n, height, width, channels = x.shape
  rows = -(-n // columns)
  grid = np.ones((rows * columns, height + 2, width + 2, channels), np.float32)
  grid[:n, 1:-1, 1:-1] = x
  grid = grid.reshape(rows, columns, height + 2, width + 2, channels).transpose(0, 2, 1, 3, 4)
  grid = grid.reshape(rows * (height + 2), columns * (width + 2), channels)
  pixels = np.round(255 * np.clip(grid, 0, 1)).astype(np.uint8)
  picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
  factor = max(1, 64 // max(height, width))
  picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
  buffer = io.BytesIO()
  picture.save(buffer, "png")
  return buffer.getvalue()


def _figure(path: Path, size: tuple[float, float], draw: Callable) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  draw(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  write_bytes(path, buffer.getvalue())


_CURVES = {
  "losses of D": (
    "d/loss",
    "d/supervised",
    "d/adversarial",
    "d/consistency",
    "d/virtual_adversarial",
    "d/rotation",
  ),
  "penalties": ("d/r1", "d/r2", "d/wgan_gp"),
  "loss of G": ("g/loss",),
  "real logit": ("d/real_logit_real", "d/real_logit_fake", "diagnostics/real_logit_held_out"),
  "error on the labelled batch, %": ("d/error",),
  "images that D classifies correctly, %": ("diagnostics/train_accuracy", "diagnostics/fake_accuracy"),
  "overfitting": ("diagnostics/memorisation", "d/overfitting", "d/strength"),
  "entropy of the generated classes, nats": ("diagnostics/class_entropy",),
}


def learning_curves(path: Path, rows: Sequence[Json]) -> None:
  """Plots metrics over steps: one line per phase and metric, stacked panels for the kinds of metrics."""
  logged = set().union(*rows)
  curves = {title: names for title, names in _CURVES.items() if logged & set(names)}

  def draw(figure):
    panels = figure.subplots(max(1, len(curves)), squeeze=False).flat
    for axes, (title, names) in zip(panels, curves.items(), strict=False):
      for phase in dict.fromkeys(row["phase"] for row in rows):
        for name in names:
          points = [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]
          if points:
            dashes = "-" if phase == rows[0]["phase"] else "--"
            axes.plot(*zip(*points, strict=True), dashes, label=f"{name}, {phase}", linewidth=1)
      axes.set_title(title)
      axes.spines[["top", "right"]].set_visible(False)
      if axes.lines:
        axes.legend(fontsize=9, frameon=False)
    panels[-1].set_xlabel("steps")

  _figure(path, (4.8, 2.6 * max(1, len(curves))), draw)


def confusion(path: Path, counts: Int[np.ndarray, "k k"], class_names: Sequence[str]) -> None:
  """Plots the confusion matrix, with the diagonal left uncoloured so that mistakes stand out.

  Numbers are drawn for up to 20 classes, names for up to 100. A name with letters that the font lacks, such
  as Chinese ones, is replaced by the class number.
  """
  from matplotlib import font_manager

  font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
  many = len(counts) > 10
  names = [name if len(name) <= 16 else f"{name[:15]}…" for name in class_names]
  names = [
    name if all(font.get_char_index(ord(letter)) for letter in name) else str(k)
    for k, name in enumerate(names)
  ]

  def draw(figure):
    axes = figure.subplots()
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    picture = axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=max(1, mistakes.max()))
    ticks = range(len(names))
    turned = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 2 else {}
    axes.tick_params(labelsize=10 if many else 12)
    if len(names) <= 100:  # more would overlap, and take longest to draw
      axes.set_xticks(ticks, names, parse_math=False, **turned)
      axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(counts) <= 20:
      cells = picture.to_rgba(mistakes)[..., :3] ** 2.2 @ [0.2126, 0.7152, 0.0722]  # luminance
      for i in ticks:
        for j in ticks:
          if counts[i, j]:
            colour = "0.4" if i == j else "white" if cells[i, j] < 0.18 else "black"
            axes.text(
              j, i, str(counts[i, j]), ha="center", va="center", fontsize=9 if many else 12, color=colour
            )

  _figure(path, (8, 8) if many else (6, 6), draw)


def reliability_diagram(path: Path, found: Reliability) -> None:
  """Plots accuracy over confidence, one bar per bin, above the number of images in each bin."""

  def draw(figure):
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, len(found.count) + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, 0.9 / len(found.count)
    above.bar(middles, np.nan_to_num(found.accuracy), width, color="tab:blue", label="accuracy")
    above.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="confidence = accuracy")
    above.plot(found.confidence, found.accuracy, "o", color="black", markersize=4, label="mean confidence")
    above.set_ylim(0, 1.02)
    above.set_ylabel("accuracy")
    figure.legend(fontsize=9, frameon=False, loc="outside upper center", ncols=3)
    below.bar(middles, found.count, width, color="0.6")
    below.set_yscale("symlog", linthresh=1)
    below.set_ylabel("images")
    below.set_xlabel("confidence")
    below.set_xlim(0, 1)
    for axes in (above, below):
      axes.spines[["top", "right"]].set_visible(False)

  _figure(path, (4.8, 4.8), draw)


def errors_of_methods(
  path: Path, cells: Mapping[str, Mapping[int, Sequence[float]]], *, smallest: float, xlabel: str
) -> None:
  """Plots the errors of methods on a logarithmic axis: one panel per number of labels, one row per method.

  Each point is a split, the bar their median.

  Args:
    path: path of the PNG.
    cells: method -> number of labels -> errors in percent.
    smallest: errors below this value are drawn at it, because a logarithmic axis has no zero.
    xlabel: label of the error axes.
  """
  numbers = sorted({n for budgets in cells.values() for n in budgets})

  def draw(figure):
    from matplotlib.ticker import NullFormatter

    panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for axes, n in zip(panels, numbers, strict=True):
      for row, budgets in enumerate(cells.values()):
        errors = np.maximum(budgets.get(n, ()), smallest)
        axes.plot(errors, [row] * len(errors), "o", color="tab:blue", markersize=4, alpha=0.4, mew=0)
        if len(errors):
          axes.plot(np.median(errors), row, "|", color="black", markersize=10, mew=1.5)
      axes.set_xscale("log")
      low, high = axes.get_xlim()
      ticks = [m * 10.0**k for k in range(-3, 3) for m in (1, 2, 5)]
      ticks = [tick for tick in ticks if low <= tick <= high]
      axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
      axes.xaxis.set_minor_formatter(NullFormatter())
      axes.grid(color="0.92", linewidth=0.5)
      axes.set_axisbelow(True)
      axes.spines[["top", "right"]].set_visible(False)
      axes.set_title(f"{n:,} labels", fontsize=9)
    panels[0].set_yticks(range(len(cells)), list(cells), fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel(xlabel, fontsize=9)

  _figure(path, (2.5 + 2.2 * len(numbers), 1.2 + 0.22 * len(cells)), draw)
