import json

import numpy as np
import pytest
from PIL import Image

from gan_jax import report
from gan_jax.types import InputError


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / "deep" / "a.json"
  report.write_json(path, {"a": 1})
  report.write_json(path, {"b": [2]})
  assert json.loads(path.read_text()) == {"b": [2]}
  assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_metrics_without_a_cut_off_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert report.read_metrics(path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert report.read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_corrupt_line_of_metrics_is_a_sentence(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\nnot json\n')
  with pytest.raises(InputError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
    report.read_metrics(path)


def test_sample_grid_puts_images_in_rows(tmp_path):
  x = np.zeros((3, 64, 64, 1), np.float32)
  x[1] = 0.5
  report.sample_grid(tmp_path / "grid.png", x, columns=2)
  pixels = np.asarray(Image.open(tmp_path / "grid.png"))
  assert pixels.shape == (132, 132)
  assert pixels[30, 30] == 0
  assert pixels[30, 100] == 128
  assert pixels[100, 100] == 255  # no fourth image


def test_page_escapes_and_holds_its_pictures(tmp_path):
  report.sample_grid(tmp_path / "grid.png", np.zeros((1, 8, 8, 3), np.float32))
  report.confusion(tmp_path / "confusion.png", np.array([[3, 1], [0, 4]]), ("a", "b"))
  rows = [{"phase": "p", "step": t, "d/loss": 1.0 / t, "d/error": 5.0} for t in (1, 2)]
  report.learning_curves(tmp_path / "curves.png", rows)
  result = {"experiment": "<b>", "dataset": "d", "note": ""}
  names = ("grid", "confusion", "curves")
  report.page(tmp_path / "p.html", result, [("error", "1 %")], [(n, tmp_path / f"{n}.png") for n in names])
  html = (tmp_path / "p.html").read_text()
  assert "&lt;b&gt;" in html
  assert html.count("data:image/png;base64,") == 3
