import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from gan_jax import figures, log, metrics, output
from gan_jax.types import InputError


@pytest.fixture
def figure(monkeypatch):
  """Captures what is drawn, instead of writing a file."""
  figure = Figure()
  monkeypatch.setattr(figures, "_figure", lambda path, size, draw: draw(figure))
  return figure


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / "deep" / "a.json"
  output.write_json(path, {"a": 1})
  output.write_json(path, {"b": [2]})
  assert json.loads(path.read_text()) == {"b": [2]}
  assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
  (tmp_path / "a.json").mkdir()
  with pytest.raises(OSError, match="directory"):
    output.write_json(tmp_path / "a.json", {})
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_link_points_to_is_replaced(tmp_path):
  (tmp_path / "data").mkdir()
  (tmp_path / "there.csv").symlink_to(Path("data", "real.csv"))
  for text in ("first", "second"):
    output.write_text(tmp_path / "there.csv", text)
    assert (tmp_path / "data" / "real.csv").read_text() == text
  assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["data", "real.csv", "there.csv"]


def test_a_name_is_said_as_it_is(capsys):
  """`:a:` is not shown as an emoji, nor `[b]` as bold type."""
  output.say("reading folder:a: [b]")
  output.console.print("folder:a:", markup=False)
  assert capsys.readouterr().err == "reading folder:a: [b]\nfolder:a:\n"


def test_metrics_without_a_cut_off_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert output.read_rows(path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert output.read_rows(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b"not json", b"5", b'{"step": 1}', b"\xff\x00"])
def test_a_corrupt_line_of_metrics_is_a_sentence(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "phase": "gan"}\n' + line + b"\n")
  with pytest.raises(InputError, match=r"line 2 of .*metrics\.jsonl is not a complete row: repair"):
    output.read_rows(path, ("step", "phase"))


def test_sample_grid_puts_images_in_rows(tmp_path):
  x = np.zeros((11, 64, 64, 1), np.float32)
  x[1] = 0.5
  figures.sample_grid(tmp_path / "grid.png", x)
  pixels = np.asarray(Image.open(tmp_path / "grid.png"))
  assert pixels.shape == (132, 660)
  assert pixels[30, 30] == 0
  assert pixels[30, 100] == 128
  assert pixels[100, 100] == 255  # no twelfth image


def test_the_names_of_a_thousand_classes_are_not_drawn(figure, tmp_path):
  figures.confusion(tmp_path / "c.png", np.eye(1000, dtype=int), [f"class {k}" for k in range(1000)])
  assert len(figure.axes[0].get_xticks()) < 20


def test_numbers_in_the_confusion_matrix_can_be_read(figure, tmp_path):
  """Their contrast with the cell is at least 4.5, the guideline for text, on light and dark cells."""
  counts = np.arange(16).reshape(4, 4) ** 2
  figures.confusion(tmp_path / "c.png", counts, "abcd")
  (axes,) = figure.axes
  (picture,) = axes.images
  luminance = lambda rgb: np.asarray(rgb)[:3] ** 2.2 @ [0.2126, 0.7152, 0.0722]
  assert len(axes.texts) == 15
  for text in axes.texts:
    j, i = text.get_position()
    cell = luminance(picture.to_rgba(picture.get_array())[i, j])
    low, high = sorted([luminance(to_rgb(text.get_color())), cell])
    assert (high + 0.05) / (low + 0.05) >= 4.5, (i, j)


def test_names_of_classes_are_no_formulas_and_leave_room_for_the_matrix(figure, tmp_path):
  figures.confusion(tmp_path / "c.png", np.eye(3, dtype=int), ("$\\nonsense$", 40 * "x", "\u732b"))
  FigureCanvasAgg(figure).draw()  # an invalid formula raises here
  (axes,) = figure.axes
  assert [label.get_text() for label in axes.get_yticklabels()] == ["$\\nonsense$", 15 * "x" + "…", "2"]


def test_the_reliability_diagram_shows_accuracy_and_number_of_every_bin(figure, tmp_path):
  probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
  found = metrics.reliability(probs, np.array([0, 1, 0]), bins=4)
  figures.reliability_diagram(tmp_path / "r.png", found)
  above, below = figure.axes
  assert [bar.get_height() for bar in above.patches] == [0, 0, 1, 0.5]
  assert [bar.get_height() for bar in below.patches] == [0, 0, 1, 2]


def test_every_kind_of_curve_has_a_panel(figure, tmp_path):
  rows = [{"phase": "p", "step": t, "d/loss": 1.0 / t, "d/error": 5.0} for t in (1, 2)]
  figures.learning_curves(tmp_path / "curves.png", rows)
  assert [axes.get_title() for axes in figure.axes] == ["losses of D", "error on the labelled batch, %"]
  (line,) = figure.axes[0].lines
  assert list(line.get_ydata()) == [1.0, 0.5]


def test_every_split_of_every_method_is_a_point(figure, tmp_path):
  cells = {"a": {20: [3.0, 1.0, 2.0], 50: [0.0]}, "b": {20: [4.0]}}
  figures.errors_of_methods(tmp_path / "errors.png", cells, smallest=0.1, xlabel="error")
  few, more = figure.axes
  assert (few.get_title(), more.get_title()) == ("20 labels", "50 labels")
  drawn = lambda axes: [(line.get_xdata().tolist(), list(line.get_ydata())) for line in axes.lines]
  assert drawn(few) == [([3, 1, 2], [0] * 3), ([2], [0]), ([4], [1]), ([4], [1])]
  assert drawn(more)[:2] == [([0.1], [0]), ([0.1], [0])]
  assert [label.get_text() for label in few.get_yticklabels()] == ["a", "b"]


def test_the_rate_is_that_of_the_last_rows(monkeypatch, capsys):
  """The first ones take as long as the compilation of what the run logs."""
  now = iter([0.0, 60.0, *(60.0 + i for i in range(1, 100))])
  monkeypatch.setattr("gan_jax.log.time.perf_counter", lambda: next(now))
  with log.progress("train", 0, 1000) as show:
    for step in range(20, 1001, 20):
      show({"step": step})
  lines = capsys.readouterr().err.splitlines()
  assert "train 100/1000  1.6 steps/s" in lines[0]
  assert "train 500/1000  20.0 steps/s  25 s left" in lines[4]
