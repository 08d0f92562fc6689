"""Output of a run: sentences, JSON, pictures, a page. Files are written whole or not at all."""

import base64
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from gan_jax.types import InputError, Json

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
  """Prints a plain sentence on standard error."""
  console.print(text, markup=False, soft_wrap=True)


def cache_dir() -> Path:
  """Where what can be made again is kept: `gan_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gan_jax"


def write_bytes(path: Path, content: bytes) -> None:
  """Writes beside and renames: a reader never sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f".{path.name}.{os.getpid()}")
  beside.write_bytes(content)
  beside.replace(path)


def write_json(path: Path, value: Any) -> None:
  """Writes indented JSON."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_metrics(path: Path) -> list[Json]:
  """The rows of a `metrics.jsonl`; a last line that was cut off does not count.

  Raises:
    InputError: a whole line is not JSON.
  """
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  rows = []
  for i, line in enumerate(lines):
    if line.endswith("\n"):
      try:
        rows.append(json.loads(line))
      except ValueError as error:
        raise InputError(f"line {i + 1} of {path} is not JSON: mend or remove it") from error
  return rows


# --- Pictures


def sample_grid(path: Path, x: Float[np.ndarray, "n h w c"], columns: int = 10) -> None:
  """Images in [0, 1] as one PNG, row by row, small ones enlarged pixel by pixel."""
  from PIL import Image

  n, height, width, channels = x.shape
  rows = -(-n // columns)
  grid = np.ones((rows * columns, height + 2, width + 2, channels), np.float32)
  grid[:n, 1:-1, 1:-1] = x
  grid = grid.reshape(rows, columns, height + 2, width + 2, channels).transpose(0, 2, 1, 3, 4)
  grid = grid.reshape(rows * (height + 2), columns * (width + 2), channels)
  pixels = np.round(255 * np.clip(grid, 0, 1)).astype(np.uint8)
  picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
  factor = max(1, 64 // height)
  picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
  buffer = io.BytesIO()
  picture.save(buffer, "png")
  write_bytes(path, buffer.getvalue())


def _figure(path: Path, size: tuple[float, float], draw: Callable) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  draw(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  write_bytes(path, buffer.getvalue())


_CURVES = {
  "losses of D": ("d/loss", "d/supervised", "d/adversarial", "d/consistency", "d/rotation"),
  "penalties": ("d/r1", "d/r2", "d/wgan_gp"),
  "loss of G": ("g/loss",),
  "real logit": ("d/real_logit_real", "d/real_logit_fake", "diagnostics/real_logit_held_out"),
  "error on the labelled batch, %": ("d/error",),
  "images that D classifies correctly, %": ("diagnostics/train_accuracy", "diagnostics/fake_accuracy"),
  "overfitting": ("diagnostics/memorisation", "d/overfitting", "d/strength"),
  "entropy of the generated classes, nats": ("diagnostics/class_entropy",),
}


def learning_curves(path: Path, rows: Sequence[Json]) -> None:
  """Metrics over steps: a line a phase and metric, a panel a kind that the run has."""
  logged = set().union(*rows)
  curves = {title: names for title, names in _CURVES.items() if logged & set(names)}

  def draw(figure):
    panels = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flat
    for axes in panels[len(curves) :]:
      axes.axis("off")
    for axes, (title, names) in zip(panels, curves.items(), strict=False):
      for phase in dict.fromkeys(row["phase"] for row in rows):
        for name in names:
          points = [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]
          if points:
            dashes = "-" if phase == rows[0]["phase"] else "--"
            axes.plot(*zip(*points, strict=True), dashes, label=f"{name}, {phase}", linewidth=1)
      axes.set_title(title)
      axes.set_xlabel("steps")
      if axes.lines:
        axes.legend(fontsize=7)

  _figure(path, (10, 3.5 * max(1, -(-len(curves) // 2))), draw)


def confusion(path: Path, counts: Int[np.ndarray, "k k"], class_names: Sequence[str]) -> None:
  """Confusion matrix; the diagonal is left blank so that the mistakes show."""

  def draw(figure):
    axes = figure.subplots()
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    picture = axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=max(1, mistakes.max()))
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45)
    axes.set_yticks(ticks, class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(counts) <= 20:
      cells = picture.to_rgba(mistakes)[..., :3] ** 2.2 @ [0.2126, 0.7152, 0.0722]  # luminance
      for i in ticks:
        for j in ticks:
          if counts[i, j]:
            colour = "0.4" if i == j else "white" if cells[i, j] < 0.18 else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=colour)

  _figure(path, (6, 6), draw)


def label_curves(
  path: Path, cells: Mapping[str, Mapping[int, Sequence[float]]], *, smallest: float, ylabel: str
) -> None:
  """Errors over the number of labels on logarithmic axes: a colour a method, a point a split.

  Lines go through the medians. The methods stand side by side at each number, so that no point hides
  another.

  Args:
    path: of the PNG.
    cells: method -> number of labels -> errors in percent.
    smallest: errors below are drawn there, because zero has no place on a logarithmic axis.
    ylabel: of the errors' axis.
  """

  def draw(figure):
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for i, (name, budgets) in enumerate(cells.items()):
      colour = colormaps["tab10"](i % 10)
      aside = 1.035 ** (i - (len(cells) - 1) / 2)
      drawn = {n * aside: np.maximum(errors, smallest) for n, errors in sorted(budgets.items())}
      for x, errors in drawn.items():
        axes.plot([x] * len(errors), errors, "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
      medians = [float(np.median(errors)) for errors in drawn.values()]
      axes.plot(list(drawn), medians, "-", color=colour, linewidth=1.2, label=name)
    numbers = sorted({n for budgets in cells.values() for n in budgets})
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    low, high = axes.get_ylim()
    ticks = [m * 10.0**k for k in range(-3, 3) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="both", color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("labels")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)

  _figure(path, (9, 5), draw)


# --- The page

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ result.experiment }} on {{ result.dataset }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; } td, th { padding: .2rem 1rem .2rem 0; text-align: left; }
 td.n { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
 .note { background: #fff3cd; padding: .5rem 1rem; } pre { overflow-x: auto; }
</style>
<h1>{{ result.experiment }} on {{ result.dataset }}</h1>
{% if result.note %}<p class="note">{{ result.note }}</p>{% endif %}
<table>{% for name, value in table %}<tr><td>{{ name }}</td><td class="n">{{ value }}</td></tr>
{% endfor %}</table>
{% for title, data in pictures %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
<h2>Result</h2><pre>{{ json }}</pre>
</html>
"""


def page(
  path: Path, result: Json, table: Sequence[tuple[str, str]], pictures: Sequence[tuple[str, Path]]
) -> None:
  """One HTML file with the table, the pictures inside it, and the result as JSON."""
  import jinja2

  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
  encoded = [(title, base64.b64encode(file.read_bytes()).decode()) for title, file in pictures]
  html = environment.from_string(_PAGE).render(
    result=result, table=table, pictures=encoded, json=json.dumps(result, indent=2)
  )
  write_bytes(path, html.encode())
