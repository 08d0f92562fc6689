"""Arrays of your own: images and vectors in .npz files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gan_jax import datasets, pictures
from gan_jax.pictures import Reader, Scaling
from gan_jax.types import InputError


def arrays(**changes):
  rng = np.random.default_rng(0)
  good = {"x": rng.integers(0, 256, (8, 6, 5), dtype=np.uint8), "y": np.array([0, 1, 2, -1, 0, 1, 2, -1])}
  good |= {"x_test": good["x"][:3], "y_test": np.array([2, 1, 0])}
  return {key: value for key, value in (good | changes).items() if value is not None}


def load_arrays(tmp_path, **changes):
  np.savez(tmp_path / "a.npz", **arrays(**changes))
  return datasets.load(f"arrays:{tmp_path / 'a.npz'}")


def test_arrays(tmp_path):
  found = load_arrays(tmp_path)
  assert (found.name, found.class_names, found.own) == ("arrays:a", ("0", "1", "2"), True)
  assert (found.x_train.shape, found.x_test.shape) == ((8, 6, 5, 1), (3, 6, 5, 1))
  assert (found.y_train.tolist(), found.y_test.tolist()) == ([0, 1, 2, -1, 0, 1, 2, -1], [2, 1, 0])
  assert (found.y_train.dtype, found.reader, found.scaling) == (np.int64, Reader(1, None), None)
  np.testing.assert_array_equal(found.x_train[..., 0], arrays()["x"])
  assert load_arrays(tmp_path, classes=np.array(["a", "b", "c"])).class_names == ("a", "b", "c")
  alone = load_arrays(tmp_path, x_test=None, y_test=None)
  assert (alone.x_test.shape, alone.y_test.shape) == ((0, 6, 5, 1), (0,))
  resized = datasets.load(f"arrays:{tmp_path / 'a.npz'}", image_size=12, fit="pad")
  assert (resized.name, resized.x_train.shape, len(resized.x_test)) == ("arrays:a@12", (8, 12, 12, 1), 0)
  assert resized.reader == Reader(1, (12, 12), "pad")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images(tmp_path, dtype):
  x = np.arange(8 * 30).reshape(8, 6, 5, 1).repeat(3, axis=-1) % 256
  found = load_arrays(tmp_path, x=(x / 255).astype(dtype), x_test=None, y_test=None)
  np.testing.assert_array_equal(found.x_train, x)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_images(tmp_path, dtype):
  x = np.arange(8 * 30).reshape(8, 6, 5).astype(dtype) * 17
  found = load_arrays(tmp_path, x=x, x_test=(x[:3] + 4000).astype(dtype))
  assert found.reader == Reader(1, None, white=4063)
  np.testing.assert_array_equal(found.x_train[..., 0], np.round(x * (255 / 4063)))
  assert found.x_test.max() == 255
  assert "4063" in found.note


def test_names_as_labels(tmp_path):
  y = np.array(["dog", "cat", "", "", "dog", "cat", "dog", ""])
  found = load_arrays(tmp_path, y=y, y_test=np.array(["dog", "cat", "cat"]))
  assert found.class_names == ("cat", "dog")
  assert (found.y_train.tolist(), found.y_test.tolist()) == ([1, 0, -1, -1, 1, 0, 1, -1], [1, 0, 0])
  found = load_arrays(
    tmp_path, y=y, y_test=np.array(["dog", "cat", "cat"]), classes=np.array(["dog", "cat"])
  )
  assert (found.class_names, found.y_test.tolist()) == (("dog", "cat"), [0, 1, 1])


def test_labels_may_be_the_largest_of_their_type(tmp_path):
  y = np.arange(256, dtype=np.uint8)
  x = np.zeros((256, 4, 4), np.uint8)
  found = load_arrays(tmp_path, x=x, y=y, x_test=None, y_test=None)
  assert found.class_names[-1] == "255"
  assert found.y_train.tolist() == list(range(256))


def test_vectors(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5000, 4)) * [1, 1e6, 1, 1e-12] + [0, -1e9, 0, 5]
  x[:, 2] = 7
  x[0, 0] = 1e20  # an outlier
  y = rng.integers(-1, 3, 5000)
  found = load_arrays(tmp_path, x=x, y=y, x_test=x[:3], y_test=np.array([0, 1, 2]))
  assert (found.x_train.shape, found.x_train.dtype) == ((5000, 1, 4, 1), np.uint8)
  assert (found.reader, "1 of 4 features are constant" in found.note) == (None, True)
  low, high = np.quantile(x, [0.001, 0.999], axis=0)
  np.testing.assert_allclose(found.scaling.low, low)
  for k in (0, 1, 3):
    expected = 255 * np.clip((x[:, k] - low[k]) / (high[k] - low[k]), 0, 1)
    np.testing.assert_allclose(found.x_train[:, 0, k, 0], expected, atol=0.501)
    assert 100 < np.median(found.x_train[:, 0, k, 0]) < 155
  assert not found.x_train[:, 0, 2].any()
  np.testing.assert_array_equal(found.scaling.apply(x[:3]), found.x_test)
  again = Scaling(**json.loads(json.dumps(dataclasses.asdict(found.scaling))))
  assert (again, hash(again)) == (found.scaling, hash(found.scaling))
  np.testing.assert_array_equal(again.apply(x.astype(np.float64)), found.x_train)
  for bad, sentence in ((x[:, :3], r"must be \[N, 4\], not \[5000, 3\]"), (x * np.nan, "finite")):
    with pytest.raises(InputError, match=sentence):
      again.apply(bad)
  with pytest.raises(InputError, match="--image-size is for images, but these are vectors"):
    datasets.load(f"arrays:{tmp_path / 'a.npz'}", image_size=8)
  ints = load_arrays(tmp_path, x=np.arange(80).reshape(8, 10) % 7 > 3, x_test=None, y_test=None)
  assert set(np.unique(ints.x_train)) == {0, 255}


F = np.full((8, 6, 5), 0.5, np.float32)
BAD_ARRAYS = {
  "no x": ({"x": None, "x_test": None, "y_test": None}, "missing x: save the images"),
  "neither": ({"x": None, "y": None, "x_test": None, "y_test": None, "X": F}, "unexpected X: the arrays"),
  "misspelt": ({"X_test": F}, "unexpected X_test: the arrays"),
  "x_test alone": ({"y_test": None}, "must be saved together, but only one is there"),
  "one dimension": ({"x": np.zeros(8)}, r"x must be images \[N, H, W\] or .*, not \[8\]"),
  "five dimensions": ({"x": np.zeros((8, 2, 2, 2, 2))}, r"not \[8, 2, 2, 2, 2\]"),
  "no dimension": ({"x": np.array(3)}, r"x must be images .*, not \[\]"),
  "two channels": ({"x": np.zeros((8, 6, 5, 2), np.uint8)}, r"1 or 3 channels, not \[8, 6, 5, 2\]"),
  "channels first": ({"x": np.zeros((8, 3, 6, 5), np.uint8)}, r"\[8, 3, 6, 5\]: put the channels last"),
  "no images": ({"x": np.zeros((0, 6, 5), np.uint8)}, r"x is empty: its shape is \[0, 6, 5\]"),
  "no pixels": ({"x": np.zeros((8, 0, 5), np.uint8)}, r"x is empty: its shape is \[8, 0, 5\]"),
  "int64 images": ({"x": np.zeros((8, 6, 5), np.int64)}, r"uint16, or floats in \[0, 1\], not int64"),
  "0 to 255 floats": ({"x": F * 510, "x_test": F}, r"\[0, 1\], but they range from 255 to 255: scale"),
  "-1 to 1 floats": ({"x": F * np.array([-2, 2, 1, 1, 1, 1, 1, 1])[:, None, None]}, "from -1 to 1: scale"),
  "nan": ({"x": np.where(np.arange(5) == 1, np.nan, F)}, "x holds values that are not finite"),
  "infinite vectors": ({"x": np.full((8, 3), np.inf)}, "x holds values that are not finite"),
  "infinite test vectors": ({"x": F[0:8, 0, :3], "x_test": np.full((3, 3), np.inf)}, "x_test holds values"),
  "complex vectors": ({"x": np.ones((8, 3), complex)}, "vectors in x must be real numbers, not complex128"),
  "text as images": ({"x": np.full((8, 3), "a")}, "vectors in x must be real numbers, not <U1"),
  "other test shape": ({"x_test": np.zeros((3, 6, 6), np.uint8)}, r"must match x, \[8, 6, 5\] of uint8"),
  "other test type": ({"x_test": F[:3]}, r"is \[3, 6, 5\] of float32, but must match x"),
  "bytes and 16 bits": ({"x_test": np.zeros((3, 6, 5), np.uint16)}, "is .* of uint16, but must match x"),
  "short y": ({"y": np.array([0, 1, 2])}, "y has 3 labels for 8 images"),
  "short y_test": ({"y_test": np.array([0, 1])}, "y_test has 2 labels for 3 images"),
  "one-hot": ({"y": np.eye(8, 3)}, r"y must be \[N\], one class per image, not \[8, 3\]"),
  "float labels": ({"y": np.arange(8.0)}, "y must be integers or names, not float64"),
  "below -1": ({"y": np.arange(8) - 2}, "y holds -2: classes are numbered from 0, and -1"),
  "no label": ({"y": np.full(8, -1)}, "y holds no label at all"),
  "no name": ({"y": np.full(8, ""), "y_test": np.full(3, "a")}, "y holds no label at all"),
  "one class": ({"y": np.zeros(8, int), "y_test": np.zeros(3, int)}, "there is only one class, 0, but a"),
  "a gap": ({"y": np.array([0, 1, 3, 3, 3, 0, 1, 0])}, "1 of 4 classes have no label in y, such as 2"),
  "unsigned -1": ({"y": np.array([0, 1, 2, 2**64 - 1] * 2, np.uint64)}, "have no label in y, such as 3"),
  "a class too many": ({"classes": np.array(["a", "b"])}, "y holds 2, which the 2 names in classes do"),
  "a name too many": ({"classes": np.array(["a", "b", "c", "d"])}, r"no label in y, such as 3 \(d\)"),
  "an unknown name": (
    {"y": np.array(["a", "b"] * 4), "y_test": np.array(["a"] * 3), "classes": np.array(["a", "c"])},
    "y holds b, which the 2 names in classes do not cover",
  ),
  "the same name twice": ({"classes": np.array(["a", "b", "a"])}, "must be a text array of distinct, non"),
  "no class": ({"classes": np.array([], str)}, "classes must be a text array of distinct, non"),
  "-1 among names": ({"y": np.array(["a", "b", "c", "-1"] * 2)}, 'y holds the text -1: among names, ""'),
  "numbers as names": ({"classes": np.arange(3)}, "classes must be a text array of distinct, non"),
  "test without labels": ({"y_test": np.array([0, -1, 1])}, "y_test must label every image"),
  "new class in test": ({"y_test": np.array([0, 5, 1])}, "y_test holds classes that y does not: 5"),
  "names in test": ({"y_test": np.array(["0", "1", "2"])}, "must both be integers, or both names"),
  "objects": ({"y": np.array([0, None] * 4, object)}, "holds Python objects: save numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_arrays(tmp_path, case):
  changes, sentence = BAD_ARRAYS[case]
  with pytest.raises(InputError, match=sentence) as caught:
    load_arrays(tmp_path, **changes)
  assert "\n" not in str(caught.value)
  assert str(caught.value) in pictures.check(tmp_path / "a.npz")["problems"]


@pytest.mark.parametrize(
  ("make", "sentence"),
  [
    (lambda path: None, "a.npz is not a file"),
    (Path.mkdir, "a.npz is not a file"),
    (lambda path: path.write_bytes(b""), "a.npz is not a complete .npz file"),
    (lambda path: path.write_bytes(b"hello there"), "a.npz is not an .npz file from numpy.savez"),
    (lambda path: np.savez(path, **arrays()) or path.write_bytes(path.read_bytes()[:-40]), "is not a"),
    (lambda path: np.save(open(path, "wb"), np.ones(3)), "holds a single array: save x and y together"),  # noqa: SIM115
  ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_that_hold_no_arrays(tmp_path, make, sentence):
  make(tmp_path / "a.npz")
  with pytest.raises(InputError, match=sentence):
    pictures.load_arrays(tmp_path / "a.npz")


def test_check_of_arrays(tmp_path):
  np.savez(tmp_path / "a.npz", **arrays())
  found = pictures.check(tmp_path / "a.npz")
  assert (found["labelled"], found["unlabelled"], found["test"], found["problems"]) == (6, 2, 3, [])
  assert found["in_train_and_test"] == [[f"x_test[{i}]", [f"x[{i}]"]] for i in range(3)]
  assert (found["sizes"], found["classes"]["2"]) == ({"6x5": 11}, {"train": 2, "test": 1})
  np.savez(tmp_path / "b.npz", **arrays(y=np.full(8, -3), x_test=F, extra=F))
  assert len(pictures.check(f"arrays:{tmp_path / 'b.npz'}")["problems"]) == 4
  for y, single in (([0, 0, 1, 1, 2, 2, -1, -1], False), ([0, 0, 1, 1, 2, -1, -1, -1], True)):
    np.savez(
      tmp_path / "c.npz", **{k: v for k, v in arrays(y=np.array(y)).items() if not k.endswith("test")}
    )
    notes = pictures.check(tmp_path / "c.npz")["notes"]
    assert any("only one label of class 2" in note for note in notes) == single
