import json
import os
import shutil
import struct
import types
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, save
from PIL import Image
from rich.console import Console

from gan_jax import datasets, pictures
from gan_jax.output import cache_dir, console
from gan_jax.pictures import Reader, folder, reader
from gan_jax.types import InputError

SIGNS = Path(os.environ.get("GAN_JAX_SIGN_DIGITS", "nowhere"))


def write(path: Path, content: bytes | str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


@pytest.fixture
def pets(tmp_path):
  """Two classes with three training pictures and one test picture each."""
  for name in ("cat", "dog"):
    for i in range(3):
      save(tmp_path / "pets" / "train" / name / f"{i}.png")
    save(tmp_path / "pets" / "test" / name / "9.png")
  return tmp_path / "pets"


def png16(values: np.ndarray) -> bytes:
  """A PNG with three channels of 16 bits, which Pillow cannot write."""
  chunk = lambda kind, data: (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  height, width, _ = values.shape
  header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  signature = b"\x89PNG\r\n\x1a\n"
  return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_folder_with_train_and_test(pets):
  found = datasets.load(f"folder:{pets}")
  assert (found.name, found.class_names, found.own) == ("folder:pets", ("cat", "dog"), True)
  assert (found.y_train.tolist(), found.y_test.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1])
  assert (found.y_train.dtype, found.note) == (np.int64, "")
  paths = [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
  expected = [np.asarray(Image.open(pets / path)) for path in paths]
  np.testing.assert_array_equal(found.x_train[..., 0], expected)
  assert found.reader == Reader(1, None)
  np.testing.assert_array_equal(found.reader.read(pets / "test" / "dog" / "9.png"), found.x_test[1])


@pytest.mark.parametrize(
  ("train", "test", "unlabelled"),
  [("train", "test", "unlabelled"), ("Training", "valid", "unlabeled"), ("train", "val", "UNSUP")],
)
def test_spellings_and_unlabelled_pictures(tmp_path, train, test, unlabelled):
  root = tmp_path / "r"
  for path in ("a/0.png", "b/deep/er/0.PNG", "b/1.png"):
    save(root / train / path)
  save(root / train / unlabelled / "x" / "2.png")
  save(root / test / "b" / "0.png")
  found = pictures.load_folder(root)
  assert (sorted(found.y_train.tolist()), found.y_test.tolist()) == ([-1, 0, 1, 1], [1])
  assert found.class_names == ("a", "b")
  assert found.note == "the test set has no pictures of a"


def test_class_folders_alone(tmp_path):
  for path in ("a/0.png", "b/1.png", "unlabelled/2.png", "unlabelled/3.png"):
    save(tmp_path / "r" / path)
  found = pictures.load_folder(tmp_path / "r")
  assert found.y_train.tolist() == [0, 1, -1, -1]
  assert (found.x_test.shape, found.y_test.shape) == ((0, 9, 10, 1), (0,))
  assert len(pictures.load_folder(tmp_path / "r", image_size=16).x_test) == 0


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_table_labels(tmp_path, name):
  root, combined = tmp_path / "r", unicodedata.normalize("NFC", "ä.png")
  for path in ("0.png", "sub/1.png", "2.png", "3.png", unicodedata.normalize("NFD", "ä.png")):
    save(root / path)
  rows = [
    "\ufefflabel, file_name ,x",
    '"red, dark",0.png,1',
    "blue,./sub/1.png,",
    ",2.png,",
    f"blue,{combined},7",
  ]
  write(root / name, "\r\n".join(rows))
  found = pictures.load_folder(root)
  assert found.class_names == ("blue", "red, dark")
  names = ["0.png", "2.png", "3.png", combined, "sub/1.png"]
  assert dict(zip(names, found.y_train.tolist(), strict=True)) == {
    "0.png": 1, "2.png": -1, "3.png": -1, combined: 0, "sub/1.png": 0
  }  # fmt: skip
  assert found.note == ""


def test_a_table_in_each_part_and_folders_that_agree_with_it(tmp_path):
  for part in ("train", "test"):
    save(tmp_path / "r" / part / "a" / "0.png")
    save(tmp_path / "r" / part / "1.png")
    write(tmp_path / "r" / part / "metadata.csv", "file_name,label\na/0.png,a\n1.png,b\n")
  found = pictures.load_folder(tmp_path / "r")
  assert sorted(found.y_train.tolist()) == sorted(found.y_test.tolist()) == [0, 1]


def test_what_is_skipped_is_counted(pets):
  for name in (".DS_Store", "train/Thumbs.db", "train/cat/desktop.ini", "train/cat/notes.txt", "README"):
    write(pets / name, "x")
  save(pets / "__MACOSX" / "train" / "0.png")
  save(pets / "train" / ".hidden" / "0.png")
  save(pets / "valid" / "cat" / "0.png")
  save(pets / "extra" / "0.png")
  found = pictures.load_folder(pets)
  assert len(found.x_train) == 6
  assert "the test set is test, and valid is not read" in found.note
  assert "folders beside train are not read: extra" in found.note
  assert "skipped, as hidden or not a picture: 7 (.DS_Store, README, __MACOSX and 4 more)" in found.note


def test_few_unreadable_pictures_are_left_out_and_counted(pets):
  for i in range(100):
    save(pets / "train" / "unlabelled" / f"{i}.png", noise(i))
  write(pets / "train" / "cat" / "1.png", b"no picture")
  found = pictures.load_folder(pets)
  assert found.y_train.tolist() == [0, 0, 1, 1, 1] + 100 * [-1]
  np.testing.assert_array_equal(found.x_train[1, ..., 0], np.asarray(Image.open(pets / "train/cat/2.png")))
  assert "1 of 106 training pictures cannot be read and are left out (train/cat/1.png)" in found.note
  write(pets / "train" / "dog" / "1.png", b"no picture")
  with pytest.raises(InputError, match="2 of the 106 training pictures"):
    pictures.load_folder(pets)


def test_colour_where_a_training_picture_has_any(pets):
  assert pictures.load_folder(pets).image_shape == (9, 10, 1)
  save(pets / "train" / "cat" / "1.png", Image.fromarray(noise(1)).convert("RGB"))
  found = pictures.load_folder(pets)
  assert (found.image_shape, found.reader) == ((9, 10, 1), Reader(1, None))  # its colours are all grey
  save(pets / "test" / "cat" / "8.png", noise(1, channels=3))
  found = pictures.load_folder(pets)
  assert found.image_shape == (9, 10, 1)  # the test pictures are read as the training pictures are
  np.testing.assert_array_equal(found.x_test[0], found.reader.read(pets / "test" / "cat" / "8.png"))
  save(pets / "train" / "cat" / "2.png", noise(1, channels=3))
  found = pictures.load_folder(pets)
  assert (found.image_shape, found.reader.channels) == ((9, 10, 3), 3)
  np.testing.assert_array_equal(found.x_train[0], found.x_train[0][..., :1].repeat(3, axis=-1))


def test_with_and_without_alpha(pets):
  save(pets / "train" / "cat" / "1.png", np.dstack([noise(1, channels=3), noise(2)]))
  save(pets / "train" / "cat" / "2.png", noise(1, channels=3))
  assert pictures.load_folder(pets).image_shape == (9, 10, 3)


def test_16_bit_folders_share_one_white(pets):
  for i, path in enumerate(sorted((pets / "train").rglob("*.png"))):
    save(path, np.full((9, 10), 500 * i, np.uint16))  # up to 2500
  save(pets / "test" / "cat" / "9.png", np.full((9, 10), 4000, np.uint16))
  save(pets / "test" / "dog" / "9.png", np.full((9, 10), 1250, np.uint16))
  found = pictures.load_folder(pets)
  assert found.x_train[:, 0, 0, 0].tolist() == [0, 51, 102, 153, 204, 255]
  assert found.x_test[:, 0, 0, 0].tolist() == [255, 128]
  assert found.reader == Reader(1, None, white=2500)
  assert "the value 2500, the largest in the training set, becomes 255" in found.note
  write(pets / "train" / "cat" / "0.png", png16(np.full((9, 10, 3), 0x1234)))
  found = pictures.load_folder(pets)
  assert found.x_train[0, 0, 0].tolist() == [0x12]
  assert "pictures with several 16-bit channels, of which only the high byte is read: 1" in found.note


def test_sizes_are_made_one(pets):
  save(pets / "train" / "cat" / "0.png", noise(size=(40, 20)))
  found = datasets.load(f"folder:{pets}", image_size=8, fit="pad")
  assert (found.name, found.image_shape) == ("folder:pets@8", (8, 8, 1))
  assert found.reader == Reader(1, (8, 8), "pad")
  np.testing.assert_array_equal(found.reader.read(pets / "train" / "cat" / "0.png"), found.x_train[0])
  cropped = datasets.load(f"folder:{pets}", image_size=8)
  assert (cropped.x_train[0] != found.x_train[0]).any()


def test_links_inside_are_followed(pets):
  (pets / "train" / "unlabelled").symlink_to(pets / "test", target_is_directory=True)
  assert pictures.load_folder(pets).y_train.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]


@pytest.fixture
def decoded(monkeypatch):
  """The number of training pictures of each decoded folder."""
  count, read = [], folder._read_folder

  def counted(found, *args):
    count.append(len(found.train))
    return read(found, *args)

  monkeypatch.setattr(folder, "_read_folder", counted)
  return count


def test_pictures_are_decoded_once(pets, decoded):
  first = pictures.load_folder(pets)
  again = pictures.load_folder(pets)
  assert decoded == [6]
  for name in ("x_train", "x_test", "y_train", "y_test"):
    np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
  assert (again.reader, again.note) == (first.reader, first.note)
  pictures.load_folder(pets, image_size=8)
  pictures.load_folder(pets, image_size=8, fit="pad")
  assert len(decoded) == 3
  changed = save(pets / "train" / "cat" / "0.png", noise(77))
  assert np.array_equal(pictures.load_folder(pets).x_train[0, ..., 0], np.asarray(Image.open(changed)))
  shutil.move(pets / "train" / "cat" / "0.png", pets / "train" / "dog" / "z.png")
  assert pictures.load_folder(pets).y_train.tolist() == [0, 0, 1, 1, 1, 1]
  assert len(decoded) == 5


def test_what_could_not_be_read_is_tried_again(pets, decoded, monkeypatch):
  """The fault may have been that of a network or of a full memory."""
  for i in range(100):
    save(pets / "train" / "unlabelled" / f"{i}.png", noise(i))
  pixels = Reader.pixels
  broken = np.asarray(Image.open(pets / "train" / "cat" / "1.png"))

  def fail(self, image):
    if np.array_equal(np.asarray(image), broken):
      raise OSError("Input/output error")
    return pixels(self, image)

  with monkeypatch.context() as patched:
    patched.setattr(Reader, "pixels", fail)
    assert len(pictures.load_folder(pets).x_train) == 105
  whole = pictures.load_folder(pets)
  assert (len(whole.x_train), len(decoded)) == (106, 2)
  assert "cannot be read" not in whole.note


def test_same_size_and_time_and_another_content(pets, decoded):
  """As when unpacking an archive restores the original times."""
  path = pets / "train" / "cat" / "0.bmp"
  save(path, noise(1))
  os.utime(path, (10**9, 10**9))
  first = pictures.load_folder(pets)
  save(path, noise(2))
  os.utime(path, (10**9, 10**9))
  again = pictures.load_folder(pets)
  assert len(decoded) == 2
  assert not np.array_equal(first.x_train[0], again.x_train[0])


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "other", "pickle", "no zip"])
def test_a_damaged_cache_is_made_again(pets, decoded, damage):
  first = pictures.load_folder(pets)
  (path,) = (cache_dir() / "pictures").iterdir()
  content = bytearray(path.read_bytes())
  if damage == "half":
    path.write_bytes(content[: len(content) // 2])
  elif damage == "bit":
    content[400] ^= 1  # in the pixels
    path.write_bytes(content)
  elif damage == "empty":
    path.write_bytes(b"")
  elif damage == "no zip":
    path.write_bytes(b"no zip file")
  else:
    with np.load(path) as file:
      arrays = dict(file)
    if damage == "other":
      arrays["x_train"] = arrays["x_train"][1:]
    else:
      arrays["about"] = np.array({"reader": None}, object)
    np.savez(path, **arrays)
  again = pictures.load_folder(pets)
  assert len(decoded) == 2
  np.testing.assert_array_equal(again.x_train, first.x_train)
  pictures.load_folder(pets)
  assert len(decoded) == 2  # and intact again


def test_the_cache_is_bounded(pets, monkeypatch):
  one = pictures.load_folder(pets)
  (first,) = (cache_dir() / "pictures").iterdir()
  monkeypatch.setattr(folder, "_CACHE_BYTES", 2 * first.stat().st_size + 1000)
  os.utime(first, (10**9, 10**9))
  pictures.load_folder(pets, image_size=9)
  assert first.exists()
  pictures.load_folder(pets)  # most recently used
  pictures.load_folder(pets, image_size=10)
  left = list((cache_dir() / "pictures").iterdir())
  assert first in left
  assert len(left) == 2
  monkeypatch.setattr(folder, "_CACHE_BYTES", one.x_train.nbytes)
  pictures.load_folder(pets, image_size=32)
  assert set(left) == set((cache_dir() / "pictures").iterdir())  # larger than the whole cache may be


def test_a_cache_that_cannot_be_written_is_no_error(pets, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "x")))
  assert len(pictures.load_folder(pets).x_train) == 6


def test_a_cache_that_may_only_be_read_is_used(pets, decoded, monkeypatch):
  first = pictures.load_folder(pets)

  def denied(*_):
    raise PermissionError

  monkeypatch.setattr(folder.os, "utime", denied)
  np.testing.assert_array_equal(pictures.load_folder(pets).x_train, first.x_train)
  assert len(decoded) == 1


def test_long_reads_have_a_bar(monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(reader.time, "monotonic", lambda: next(clock))
  terminal = Console(force_terminal=True, width=200)
  monkeypatch.setattr(reader, "console", terminal)
  with terminal.capture() as captured:
    assert reader.for_all(lambda item: 1 / item, [1, 0, 2, 4, 5], "working") == [
      1, "cannot be decoded (division by zero)", 0.5, 0.25, 0.2
    ]  # fmt: skip
  assert "working" in captured.get()


def test_many_items_are_read_in_order_and_one_failure_is_its_own():
  found = reader.for_all(lambda item: 1 // (item - 700), range(1234), "working")
  expected = [1 // (item - 700) if item != 700 else None for item in range(1234)]
  assert found[700].startswith("cannot be decoded")
  assert [*found[:700], None, *found[701:]] == expected


def test_memory_is_looked_at_first(pets, monkeypatch):
  monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=100))
  with pytest.raises(InputError, match=r"8 images of 9x10 take .* GB.*--image-size N"):
    pictures.load_folder(pets)


# --- Malformed folders: a change to the pets, and the expected sentence


def rename(old, new):
  return lambda root: (root / old).rename(root / new)


def link(path, target):
  def build(root):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(target(root))

  return build


def table(text, *names, name="labels.csv"):
  """Replaces the pets by a flat folder with these pictures and a table."""

  def build(root):
    shutil.rmtree(root)
    for picture in names or ("0.png", "1.png"):
      save(root / picture)
    write(root / name, text)

  return build


def empty(root):
  shutil.rmtree(root)
  root.mkdir()


def flat(root):
  empty(root)
  save(root / "0.png")


def wrapped(root):
  empty(root)
  save(root / "zip" / "cat" / "0.png")
  save(root / "zip" / "dog" / "0.png")


def put(path, make):
  return lambda root: make(root / path)


HEAD = "file_name,label\n"
MALFORMED = {
  "no folder": (shutil.rmtree, "pets is not a folder"),
  "empty": (empty, "holds no labelled pictures: make a folder for each class, or a table"),
  "flat": (flat, "neither class folders nor a table labels.csv with the columns file_name,label: add one"),
  "one class": (put("train/dog", shutil.rmtree), "holds only one class, cat, but a classifier needs two"),
  "one folder more": (wrapped, "holds only one class, zip.*or name the folder that contains them"),
  "test alone": (put("train", shutil.rmtree), "holds test but no folder train"),
  "two trains": (put("training/cat/0.png", save), "holds both train and training: keep one"),
  "two tests": (put("testing/cat/0.png", save), "holds both test and testing: keep one"),
  "empty class": (
    put("train/bird", Path.mkdir),
    r"class folder .*bird holds no pictures: fill or remove it",
  ),
  "empty class in test": (
    put("test/bird", Path.mkdir),
    "class folder .*test/bird holds no pictures: fill or remove it",
  ),
  "empty test beside valid": (
    lambda root: (rename("test", "valid")(root), (root / "test").mkdir()),
    "the test folder .*test holds no pictures: fill it or remove it",
  ),
  "new class in test": (put("test/bird/0.png", save), "classes without training pictures: bird"),
  "loose in train": (put("train/0.png", save), r"outside the class folders \(0.png\).*unlabelled"),
  "loose beside train": (put("0.png", save), r"outside the class folders \(0.png\)"),
  "unlabelled in test": (put("test/unsup/0.png", save), "test pictures need labels.*test/unsup/0.png"),
  "all unlabelled": (
    lambda root: (rename("train/cat", "train/unlabelled")(root), shutil.rmtree(root / "train" / "dog")),
    "holds no labelled pictures",
  ),
  "two sizes": (
    put("train/cat/0.png", lambda path: save(path, noise(size=(70, 90)))),
    r"2 sizes, from 9x10 to 70x90 \(height x width\): resize them with --image-size N, for instance 16",
  ),
  "other size in test": (
    put("test/cat/0.png", lambda path: save(path, noise(size=(7, 9)))),
    "2 sizes, from 7x9 to 9x10",
  ),
  "text as png": (
    put("train/cat/0.png", lambda path: write(path, "hello")),
    r"1 of the 6 training pictures.*1 %.*train/cat/0.png is not a picture that Pillow can read",
  ),
  "empty file": (put("train/cat/0.png", lambda path: write(path, b"")), "0.png is not a picture"),
  "truncated": (
    put("train/cat/0.png", lambda path: write(path, path.read_bytes()[:-60])),
    r"0.png cannot be decoded \(.*\)",
  ),
  "truncated jpeg": (
    put("train/cat/0.jpg", lambda path: write(path, save(path).read_bytes()[:-200])),
    r"0.jpg cannot be decoded \(Truncated",
  ),
  "broken chunk": (
    put("train/cat/0.png", lambda path: write(path, path.read_bytes().replace(b"IDAT", b"IDAX"))),
    "0.png is not a picture that Pillow can read",
  ),
  "unreadable in test": (
    put("test/cat/9.png", lambda path: write(path, "hello")),
    "1 of the test pictures of .* cannot be read; repair or remove them: test/cat/9.png is not a picture",
  ),
  "floats": (
    put("train/cat/0.tif", lambda path: save(path, np.ones((9, 10), np.float32))),
    "0.tif holds floating-point values: convert it to 8 or 16 bits",
  ),
  "32 bits": (
    put("train/cat/0.tif", lambda path: save(path, np.full((9, 10), 70000, np.int32))),
    "0.tif holds 32-bit values: convert it to 8 or 16 bits",
  ),
  "bomb": (
    put("train/cat/0.png", lambda path: save(path, noise(size=(40, 30)))),
    "0.png exceeds the limit of 1,000 pixels: make it smaller",
  ),
  "big bomb": (
    put("train/cat/0.png", lambda path: save(path, noise(size=(60, 60)))),
    "0.png exceeds the limit of 1,000 pixels",
  ),
  "link out": (
    link("train/cat/x.png", lambda root: save(root.parent / "x.png")),
    r"x.png is a link that leads out of the folder .*pets: replace it with what it points to",
  ),
  "folder link out": (
    link("train/bird", lambda root: root.parent),
    "bird is a link that leads out of the folder",
  ),
  "link to itself": (
    link("train/cat/in", lambda root: root / "train"),
    "leads back to a folder that contains it",
  ),
  "dead link": (link("train/cat/x.png", lambda root: root / "gone.png"), "train/cat/x.png does not exist"),
  "table beside train": (put("labels.csv", lambda path: write(path, HEAD)), "labels.csv lies beside train"),
  "two tables": (
    lambda root: (table(HEAD + "0.png,a\n1.png,b\n")(root), write(root / "metadata.csv", HEAD)),
    "holds both labels.csv and metadata.csv: keep one",
  ),
  "other columns": (
    table("name;class\n0.png;a\n"),
    "needs the columns file_name and label, separated by commas, but its first line is name;class",
  ),
  "empty table": (table(""), "but its first line is empty"),
  "table without labels": (table(HEAD + "0.png,\n"), "holds no labelled pictures"),
  "table with latin-1": (table((HEAD + "0.png,ä\n").encode("latin-1")), "not encoded as UTF-8"),
  "table of what is not there": (
    table(HEAD + "0.png,a\n1.png,b\n" + "".join(f"x{i}.png,a\n" for i in range(5))),
    "lists files that are not pictures in .*: x0.png, x1.png, x2.png and 2 more",
  ),
  "listed twice": (
    table(HEAD + "0.png,a\n./0.png,b\n"),
    "line 3 of .*labels.csv lists ./0.png a second time",
  ),
  "listed outside": (table(HEAD + "0.png,a\n../1.png,b\n"), "line 3 .* names ../1.png, which is not in"),
  "listed from the root": (table(HEAD + "/etc/0.png,a\n"), "line 2 .* names /etc/0.png, which is not in"),
  "comma": (table(HEAD + "0,5.png,a\n"), "line 2 .* has more columns than the first: quote"),
  "no name": (table(HEAD + ",a\n"), "line 2 .* has no file_name"),
  "open quote": (table(HEAD + '0.png,"a\n1.png,b\n'), "labels.csv cannot be read as a table"),
  "label -1": (table(HEAD + "0.png,a\n1.png,-1\n"), "line 3 .* has the label -1: leave it empty"),
  "names alike": (
    table(HEAD + "e\u0301.png,a\n0.png,b\n", "e\u0301.png", "\u00e9.png", "0.png"),
    "two pictures of .* have names that read \u00e9.png: rename one of them",
  ),
  "table against folders": (
    table(HEAD + "cat/0.png,dog\ndog/1.png,cat\n", "cat/0.png", "dog/1.png"),
    "cat/0.png lies in a folder of class cat, but .* says dog: label by folders or by the table",
  ),
  "table for some of the folders": (
    table(HEAD + "cat/0.png,cat\ndog/1.png,dog\n", "cat/0.png", "dog/1.png", "dog/2.png"),
    "dog/2.png lies in a folder of class dog, but .* says nothing",
  ),
  "test table without labels": (
    lambda root: (save(root / "test/0.png"), write(root / "test" / "labels.csv", HEAD + "cat/9.png,cat\n")),
    "lies in a folder|test pictures need labels",
  ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_folders(pets, case, monkeypatch):
  build, sentence = MALFORMED[case]
  build(pets)
  if "bomb" in case:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(InputError, match=sentence) as caught:
    datasets.load(f"folder:{pets}")
  assert "\n" not in str(caught.value)
  assert not (cache_dir() / "pictures").exists()
  found = pictures.check(pets)
  assert str(caught.value) in found["problems"] + found["notes"]
  with console.capture():
    pictures.print_check(found)


def test_a_class_that_cannot_be_read(pets):
  for i in range(600):
    (pets / "train" / "unsup").mkdir(exist_ok=True)
    shutil.copy(pets / "train" / "cat" / "0.png", pets / "train" / "unsup" / f"{i}.png")
  for path in (pets / "train" / "dog").iterdir():
    path.write_bytes(b"")
  with pytest.raises(InputError, match="holds no picture of dog that can be read") as caught:
    pictures.load_folder(pets)
  assert str(caught.value) in pictures.check(pets)["problems"]


def test_a_closed_folder(pets, monkeypatch):
  scandir = os.scandir

  def closed(path):
    if path.name == "cat":
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", closed)
  with pytest.raises(InputError, match=r"the folder .*cat cannot be read \(Permission denied\)"):
    pictures.load_folder(pets)


def test_names_that_are_no_text(tmp_path):
  root = os.fsencode(tmp_path / "r")
  for name in (b"a", b"b"):
    os.makedirs(os.path.join(root, name))
    shutil.copy(save(tmp_path / "x.png"), os.fsdecode(os.path.join(root, name, b"\xfe.png")))
  assert pictures.load_folder(tmp_path / "r").class_names == ("a", "b")
  os.rename(os.path.join(root, b"a"), os.path.join(root, b"a\xff"))
  with pytest.raises(InputError, match=r"class folder .*a\ufffd is not UTF-8: rename it"):
    pictures.load_folder(tmp_path / "r")
  pictures.print_check(pictures.check(tmp_path / "r"))


def test_a_folder_whose_own_name_is_no_text(pets, capsys):
  root = Path(os.fsdecode(os.fsencode(pets) + b"\xff"))
  pets.rename(root)
  for _ in range(2):  # the second time from the cache
    assert pictures.load_folder(root).name == f"folder:{pets.name}\ufffd"
  pictures.print_check(pictures.check(root))
  capsys.readouterr().out.encode()


@pytest.mark.parametrize("at", ["cat/pipe.png", "labels.csv"])
def test_a_pipe_is_skipped_and_not_waited_for(at, pets):
  os.mkfifo(pets / "train" / at)
  assert f"not a picture: 1 (train/{at})" in pictures.load_folder(pets).note


def test_a_class_folder_of_pictures_that_pillow_cannot_read(pets):
  (pets / "train" / "fish").mkdir()
  (pets / "train" / "fish" / "IMG_1.HEIC").write_bytes(b"ftypheic")
  with pytest.raises(
    InputError, match=r"only train/fish/IMG_1.HEIC: convert them to JPEG or PNG, or remove"
  ):
    pictures.load_folder(pets)


def test_names_of_pictures_are_those_of_the_images(pets):
  files = sorted(path.relative_to(pets).as_posix() for path in pets.rglob("*.png"))
  dataset = pictures.load_folder(pets)
  assert dataset.names_train == [file for file in files if file.startswith("train")]
  assert dataset.names_test == [file for file in files if file.startswith("test")]
  for name, y in zip(dataset.names_train, dataset.y_train, strict=True):
    assert name.split("/")[1] == dataset.class_names[y]
  assert len(dataset.names_test) == len(dataset.x_test)


def test_whatever_has_a_label_needs_no_review(pets):
  """In a layout for training; folders of no known class are only folders."""
  for path in ("train/new/0.png", "valid/cat/0.png", "unlabelled/0.png"):
    save(pets / path)
  of = lambda classes: {
    name for name in pictures.below(pets)[0] if name not in pictures.labelled(pets, classes)
  }
  assert of(["cat", "dog"]) == {"unlabelled/0.png"}
  assert of(["bird"]) == {*pictures.below(pets)[0]}


# --- The check


def test_check_of_a_good_folder(pets):
  write(pets / "README.md", "x")
  assert pictures.check(pets) == {
    "path": str(pets),
    "problems": [],
    "notes": [],
    "labelled": 6,
    "unlabelled": 0,
    "test": 2,
    "classes": {"cat": {"train": 3, "test": 1}, "dog": {"train": 3, "test": 1}},
    "sizes": {"9x10": 8},
    "modes": {"L": 8},
    "bits": {"8": 8},
    "largest_value": None,
    "skipped": ["README.md"],
    "unreadable": {},
    "duplicates": [],
    "in_train_and_test": [],
    "image_size": None,
  }


def test_check_lists_all_that_is_wrong(pets, capsys):
  save(pets / "train" / "cat" / "same.bmp", np.asarray(Image.open(pets / "train" / "cat" / "0.png")))
  shutil.copy(pets / "train" / "cat" / "0.png", pets / "train" / "dog" / "cat.png")
  colour = Image.open(pets / "train" / "dog" / "1.png").convert("RGB")
  save(pets / "test" / "dog" / "leak.tif", colour)
  save(pets / "train" / "dog" / "large.png", noise(size=(200, 100)))
  save(pets / "train" / "dog" / "16.png", np.full((9, 10), 3000, np.uint16))
  save(pets / "test" / "bird" / "0.png")
  (pets / "train" / "fish").mkdir()
  write(pets / "train" / "cat" / "broken.png", "x")
  write(pets / "test" / "cat" / "broken.png", "x")
  found = pictures.check(f"folder:{pets}")
  for sentence in (
    "fish holds no pictures",
    "without training pictures: bird",
    "of the 11 training",
    "test pict",
  ):
    assert any(sentence in problem for problem in found["problems"]), sentence
  assert len(found["problems"]) == 4
  assert found["duplicates"] == [["train/cat/0.png", "train/cat/same.bmp", "train/dog/cat.png"]]
  assert found["in_train_and_test"] == [["test/dog/leak.tif", ["train/dog/1.png"]]]
  assert set(found["unreadable"]) == {"train/cat/broken.png", "test/cat/broken.png"}
  assert any("several classes: train/cat/0.png = " in note for note in found["notes"])
  assert (found["sizes"], found["image_size"]) == ({"9x10": 13, "200x100": 1}, 16)
  assert (found["bits"], found["largest_value"]) == ({"8": 13, "16": 1}, 3000)
  assert found["classes"]["bird"] == {"train": 0, "test": 1}
  json.dumps(found)
  pictures.print_check(found)
  said = capsys.readouterr()
  assert not said.err
  text = " ".join(said.out.split())
  assert "1 of the 5 test images are in the training set as well, so the test error will be too low" in text
  assert text.count("problem:") == 4


@pytest.mark.skipif(not SIGNS.is_dir(), reason="GAN_JAX_SIGN_DIGITS names no folder")
def test_photographs():
  """2,062 photographs in ten class folders, three of another size, and two text files beside them."""
  with pytest.raises(
    InputError, match=r"2 sizes, from 100x100 to 3024x3024.*--image-size N, for instance 64"
  ):
    pictures.load_folder(SIGNS)
  found = pictures.load_folder(SIGNS, image_size=16)
  assert (found.x_train.shape, found.num_classes) == ((2062, 16, 16, 3), 10)
  assert np.bincount(found.y_train).tolist() == [205, 206, 206, 206, 207, 207, 207, 206, 208, 204]
  assert "skipped, as hidden or not a picture: 2 (LICENSE, README.md)" in found.note
