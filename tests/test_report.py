import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gan_jax import evaluate, figures, metrics, output, report, report_sections
from gan_jax.types import InputError

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
  """A parsed page; fails unless every element is closed in order."""

  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.text, self.attributes = [], [], [], []
    self.feed(path.read_text())
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    self.open += [] if tag in VOID else [tag]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"]:
      self.text.append(data.strip())

  def values(self, name):
    return [value for key, value in self.attributes if key == name]


@pytest.fixture
def png(tmp_path):
  figures.sample_grid(tmp_path / "grid.png", np.zeros((1, 8, 8, 3), np.float32))
  return tmp_path / "grid.png"


def test_whatever_a_caller_gives_is_text(png, tmp_path):
  result = {"experiment": EVIL, "dataset": EVIL, "note": EVIL, "device": EVIL, "class": EVIL}
  result["alarms"] = [EVIL]
  section = report.Section(
    EVIL,
    EVIL,
    [EVIL],
    [[EVIL]],
    [report.Picture(png, EVIL)],
    [report.Picture(png.read_bytes(), EVIL)],
    code=EVIL,
  )
  report.write(tmp_path / "p.html", result, [(EVIL, EVIL)], [(EVIL, png)], sections=[section], command=EVIL)
  found = Page(tmp_path / "p.html")
  assert "script" not in found.tags
  # All of it must be visible as text: title and heading 4, note and alarm 2, table 2, picture 1, section 7,
  # provenance 2, JSON 6.
  assert sum(text.count(EVIL) for text in found.text) == 24
  assert not [key for key, _ in found.attributes if key.startswith("on")]


def test_nothing_lies_elsewhere(png, tmp_path):
  report.write(tmp_path / "p.html", {"experiment": "e", "dataset": "d"}, [], [("a", png)])
  found = Page(tmp_path / "p.html")
  references = found.values("src") + found.values("href")
  assert len(references) == 2  # the picture, and an empty icon: else a browser asks a server for one
  assert all(value.startswith("data:") for value in references)
  assert found.values("alt") == ["a"]
  html = (tmp_path / "p.html").read_text()
  assert "default-src 'none'" in html
  assert "prefers-color-scheme: dark" in html
  assert "url(" not in html
  assert "@import" not in html


def test_the_page_begins_with_the_result_and_ends_with_all_of_it(png, tmp_path):
  result = {
    "experiment": "e",
    "dataset": "d",
    "num_labels": 50,
    "num_images": 1437,
    "steps": 7,
    "seed": 3,
    "test_error": 1.234,
    "supervised_test_error": 8.0,
    "probe_test_error": 2.0,
    "test_error_interval": [0.5, 3.3],
    "num_test_images": 360,
    "interrupted": True,
    "alarms": ["collapse"],
    "versions": {"jax": "1.2"},
  }
  table = [
    ("test error, own", "1.00 %"),
    ("test error, other", "4.00 %"),
    ("agreement", "99 %"),
  ]
  sections = [report.Section("Extra", "words")]
  report.write(
    tmp_path / "p.html", result, table, [("Samples", png)], sections=sections, command="python x"
  )
  found = Page(tmp_path / "p.html")
  text = " ".join(" ".join(found.text).split())
  expected = (
    "1.23 % test error from 50 labels and 1,437 images; 8.00 % for the supervised control.",
    "On 360 test images; 95 % interval of the error 0.50 to 3.30 %",
    "Stopped after 7 steps",
    "Alarm: collapse",
    "test error, own",
    "Samples",
    "Extra",
    "Provenance",
    "python x",
    "jax 1.2",
    "The full result",
    '"num_labels": 50',
  )
  positions = [text.index(words) for words in expected]
  assert positions == sorted(positions)
  assert text.count("Alarm: collapse") == 1
  assert found.values("style") == ["width:25.0%", "width:100.0%"]  # only test errors have bars
  (whole,) = [data for data in found.text if data.startswith("{")]
  assert json.loads(whole) == result


@pytest.mark.parametrize(
  ("result", "words"),
  [
    ({"test_error": None, "probe_test_error": 12.0}, "12.00 % test error of a linear probe"),
    ({"test_error": 2.0, "num_labels": None}, "2.00 % test error."),
  ],
)
def test_a_result_without_a_control_has_its_own_sentence(result, words, tmp_path):
  report.write(tmp_path / "p.html", {"experiment": "e", "dataset": "d", **result}, [], [])
  assert any(
    text.replace("\N{NO-BREAK SPACE}", " ").startswith(words) for text in Page(tmp_path / "p.html").text
  )


def classified(num_classes, tmp_path, num=300):
  """Random predictions for random images, and the pictures of their run."""
  rng = np.random.default_rng(0)
  y = rng.integers(0, num_classes, num)
  logits = (
    rng.normal(size=(num, num_classes)).astype(np.float32) + 2 * np.eye(num_classes, dtype=np.float32)[y]
  )
  x = rng.integers(0, 255, (num, 8, 8, 1), dtype=np.uint8)
  for name in ("confusion.png", "reliability.png"):
    figures.sample_grid(tmp_path / name, np.zeros((1, 8, 8, 1), np.float32))
  return evaluate.Evaluation(0.0, {}, {}, logits, y, x, np.arange(num))


def sections_of(found, tmp_path, num_classes):
  names = [f"name {k}" for k in range(num_classes)]
  y_lab = np.repeat(np.arange(num_classes), 12)
  x_lab = np.zeros((len(y_lab), 8, 8, 1), np.uint8)
  return {each.title: each for each in report_sections.sections(tmp_path, found, names, x_lab, y_lab)}


def test_sections_of_a_classifier(tmp_path):
  found = classified(3, tmp_path)
  sections = sections_of(found, tmp_path, 3)
  titles = ["Labelled images", "Least certain images", "Worst mistakes", "Reliability"]
  assert list(sections) == [*titles, "Abstention", "Confusion matrix", "Recall by class"]
  for limit, threshold, share in sections["Abstention"].rows:
    kept = found.probs.max(axis=1) >= np.float32(threshold)  # exactly: none may slip in
    wrong = found.probs.argmax(axis=1) != found.y
    assert share == f"{100 * kept.mean():.1f} %"
    assert 100 * wrong[kept].mean() <= float(limit.removesuffix(" %")) + 5e-3
  strips = sections["Labelled images"].pictures
  assert [each.caption for each in strips] == [f"name {k}, 10 of 12" for k in range(3)]
  tile = sections["Least certain images"].tiles[1].caption
  i = found.probs.max(axis=1).argsort()[1]
  p, y = found.probs[i], found.y[i]
  assert tile.startswith(f"true name {y}, {100 * p[y]:.0f}")
  assert tile.endswith(f"no. {i}")
  assert ("correct" in tile) == (p.argmax() == y)
  rows = sections["Recall by class"].rows
  recall = metrics.recall(found.confusion)
  assert [row[2] for row in rows] == [f"{r:.1f} %" for r in sorted(recall)]


def test_pictures_have_the_names_of_their_files(tmp_path):
  found = classified(3, tmp_path)
  names = [f"cat/{i}.jpg" for i in range(len(found.y))]
  x, y = np.zeros((3, 8, 8, 1), np.uint8), np.arange(3)
  of = lambda **kwargs: report_sections.sections(tmp_path, found, ("a", "b", "c"), x, y, **kwargs)
  tiles = {each.title: each.tiles for each in of(image_names=names)}["Least certain images"]
  expected = [f"cat/{i}.jpg" for i in found.least_certain.indices]
  assert [tile.caption.split("\n")[-1] for tile in tiles] == expected
  assert not any(each.tiles for each in of(visible=False))
  assert "Labelled images" not in [each.title for each in of(visible=False)]


@pytest.mark.parametrize(("num_classes", "full_size"), [(10, False), (11, True)])
def test_the_numbers_of_a_large_confusion_matrix_do_not_shrink(num_classes, full_size, tmp_path):
  section = sections_of(classified(num_classes, tmp_path), tmp_path, num_classes)["Confusion matrix"]
  assert section.full_size == full_size
  report.write(tmp_path / "p.html", {"experiment": "e", "dataset": "d"}, [], [], sections=[section])
  assert ("pictures full-size" in Page(tmp_path / "p.html").values("class")) == full_size


def test_many_classes_have_their_largest_mistakes_as_a_table(tmp_path):
  found = classified(21, tmp_path)
  sections = sections_of(found, tmp_path, 21)
  assert "Confusion matrix" not in sections
  mistakes = sections["Most frequent mistakes"].rows
  off = np.where(np.eye(21, dtype=bool), 0, found.confusion)
  assert [int(row[2]) for row in mistakes] == sorted(off.ravel().tolist(), reverse=True)[:20]
  true, predicted = (int(name.split()[1]) for name in mistakes[0][:2])
  assert off[true, predicted] == off.max()
  assert len(sections["Recall by class"].rows) == 20


# --- Several runs


def write_run(path, **config):
  result = {
    "experiment": "e",
    "dataset": EVIL,
    "note": "",
    "num_labels": 50,
    "steps": 4,
    "seconds_train": 1.5,
    "test_error": 1.25,
    "supervised_test_error": None,
    "test_error_interval": [0.5, 3.0],
    "label_split_sha256": "0123456789",
    "alarms": ["collapse"],
  }
  output.write_json(path / "result.json", result)
  output.write_json(path / "config.json", {"config": config, "command": "python x"})
  figures.sample_grid(path / "samples" / "last.png", np.zeros((1, 8, 8, 1), np.float32))


def test_runs_side_by_side(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_run(tmp_path / "a", steps=4, class_balance=[1.0, 0.0], workdir="a")
  write_run(tmp_path / "b", steps=4, class_balance=None, workdir="b")
  for name in "ab":
    result = json.loads((tmp_path / name / "result.json").read_text())
    result["error_from"] = "labelled images, each left out once in 2 folds"
    output.write_json(tmp_path / name / "result.json", result)
  report.compare(tmp_path / "deep" / "p.html", [tmp_path.relative_to(tmp_path) / name for name in "ab"])
  found = Page(tmp_path / "deep" / "p.html")
  assert [found.text.count(words) for words in ("1.25", "0.50 to 3.00", "50", "01234567")] == [2] * 4
  assert found.text.count("labelled images, each left out once in 2 folds") == 2
  assert "test images" not in " ".join(found.text)
  assert "--class-balance" in found.text
  assert {"1.0 0.0", "default"} <= set(found.text)
  assert not {"--steps", "--workdir"} & set(found.text)
  assert found.text.count("a: collapse") == 1
  assert len(found.values("src")) == 2  # learning curves are not there
  assert str(tmp_path) not in (tmp_path / "deep" / "p.html").read_text()
  assert "script" not in found.tags


def test_what_is_no_run_is_a_sentence(tmp_path):
  write_run(tmp_path / "a")
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("")
  out = tmp_path / "p.html"
  for name in ("empty", "nowhere", "file"):
    with pytest.raises(InputError, match="is not the folder of a run: it has no config"):
      report.compare(out, [tmp_path / "a", tmp_path / name])
  (tmp_path / "a" / "result.json").write_text("[]")
  with pytest.raises(InputError, match="is not the result of a run"):
    report.compare(out, [tmp_path / "a"])
  (tmp_path / "a" / "result.json").write_text("{")
  with pytest.raises(InputError, match="cannot be read"):
    report.compare(out, [tmp_path / "a"])
  (tmp_path / "a" / "result.json").unlink()
  with pytest.raises(
    InputError, match=r"is not complete: it has no result\.json; continue it with --resume"
  ):
    report.compare(out, [tmp_path / "a"])
  with pytest.raises(InputError, match="at least one run"):
    report.compare(out, [])
  assert not out.exists()
  write_run(tmp_path / "a")
  with pytest.raises(InputError, match="name a file"):
    report.compare(tmp_path, [tmp_path / "a"])
  with pytest.raises(InputError, match=r"p\.html cannot be written"):
    report.compare(tmp_path / "file" / "p.html", [tmp_path / "a"])


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_has_nothing_to_complain_of(width, tmp_path):
  """Every kind of section, at phone and desktop width: no console message, no wider than the window."""
  sections = list(sections_of(classified(3, tmp_path), tmp_path, 3).values())
  result = {"experiment": "train", "dataset": "x", "test_error": 1.25, "num_labels": 3, "num_images": 9}
  table = [("test error", "1.25 %")]
  report.write(tmp_path / "page.html", result, table, [], sections=sections, command="a " * 99)
  measure = "<script>if (document.documentElement.scrollWidth > innerWidth) console.error('wide')</script>"
  html, policies = re.subn(
    r"<meta http-equiv=.Content-Security.*?>", "", (tmp_path / "page.html").read_text()
  )
  assert policies == 1  # without it, the page would let scripts run
  (tmp_path / "measured.html").write_text(html.replace("</html>", f"{measure}</html>"))
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
  for name in ("page", "measured"):
    window = f"--window-size={width},2000", f"--screenshot={tmp_path / name}.png"
    command = [BROWSER, *flags, *window, f"file://{tmp_path}/{name}.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
  with Image.open(tmp_path / "page.png") as picture:
    assert picture.width == width
    assert len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("num", [50, 51])
def test_the_labels_of_a_thousand_classes_do_not_fill_the_page(num):
  y = np.arange(num)
  found = report_sections._labelled([str(k) for k in y], np.zeros((num, 4, 4, 1), np.uint8), y)
  assert len(found.pictures) == 50
  assert ("Only the first 50 classes are shown" in found.text) == (num > 50)
