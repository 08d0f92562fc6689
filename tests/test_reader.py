"""One picture at a time: modes, transparency, orientation, bits, sizes."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import noise, save
from PIL import Image

from gan_jax import datasets, pictures
from gan_jax.pictures import Reader, reader
from gan_jax.types import InputError


def test_pictures_of_every_kind_are_read_alike(tmp_path):
  """Lossless formats of the same picture give the same bytes, the others nearly."""
  x = np.kron(noise(3, (3, 4), channels=3), np.ones((8, 8, 1), np.uint8))
  colour = Image.fromarray(x)
  read = lambda name, channels=3: Reader(channels, None).read(tmp_path / name)
  for name in ("a.png", "a.bmp", "a.tiff", "a.tga", "a.ppm"):
    save(tmp_path / name, colour)
    np.testing.assert_array_equal(read(name), x)
  save(tmp_path / "q.gif", colour.quantize(16))
  np.testing.assert_array_equal(read("q.gif"), x)  # twelve colours, so nothing is lost
  for name, picture in {
    "a.webp": colour,
    "a.jpg": colour,
    "cmyk.jpg": colour.convert("CMYK"),
    "cmyk.tif": colour.convert("CMYK"),
  }.items():
    save(tmp_path / name, picture, quality=100)
    assert np.abs(read(name)[4::8, 4::8].astype(int) - x[4::8, 4::8]).mean() < 8, name
  grey = np.asarray(colour.convert("L"))
  np.testing.assert_array_equal(read("a.png", 1)[..., 0], grey)
  save(tmp_path / "g.png", grey)
  np.testing.assert_array_equal(read("g.png", 3), np.repeat(grey[..., None], 3, axis=-1))
  bits = grey > 100
  save(tmp_path / "one.png", Image.fromarray(bits))
  np.testing.assert_array_equal(read("one.png", 1)[..., 0], 255 * bits)


@pytest.mark.parametrize("where", ["a.jpg", "a.png"])
def test_damaged_exif_data_does_not_hide_the_picture(where, tmp_path, monkeypatch):
  path = save(tmp_path / where, noise(3), exif=Image.Exif(), quality=100)
  expected = Reader(1, None).read(path)

  def damaged(self, *_):
    raise SyntaxError("not a TIFF file (header b'Exif' not valid)")

  monkeypatch.setattr(Image.Exif, "load", damaged)
  np.testing.assert_array_equal(Reader(1, None).read(path), expected)
  assert reader.Header.read(path).size == expected.shape[:2]


def test_damaged_tags_do_not_hide_the_orientation(tmp_path, monkeypatch):
  exif = Image.Exif()
  exif[0x0112] = 6
  x = noise(3)
  path = save(tmp_path / "a.png", Image.fromarray(x).transpose(Image.Transpose.ROTATE_90), exif=exif)
  monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: pytest.fail("the tags are packed again"))
  np.testing.assert_array_equal(Reader(1, None).read(path)[..., 0], x)


def test_damaged_pixels_are_no_picture(tmp_path):
  """Pillow would return the part that it decoded if it were asked once more."""
  path = save(tmp_path / "a.png", noise(3, (64, 64)))
  content = bytearray(path.read_bytes())
  content[content.index(b"IDAT") + 2000] ^= 1
  path.write_bytes(content)
  with pytest.raises(InputError, match="cannot be decoded"):
    Reader(1, None).read(path)


def test_transparency_lies_on_white(tmp_path):
  clear = np.zeros((4, 6, 4), np.uint8)
  clear[:, 3:] = [10, 20, 30, 255]
  clear[0, 3:, 3] = 102  # 40 %
  expected = np.full((4, 6, 3), 255, np.uint8)
  expected[:, 3:] = [10, 20, 30]
  expected[0, 3:] = np.round(0.4 * np.array([10, 20, 30]) + 0.6 * 255)
  save(tmp_path / "rgba.png", clear)
  x = Reader(3, None).read(tmp_path / "rgba.png")
  np.testing.assert_allclose(x.astype(int), expected, atol=1)
  grey, alpha = Image.fromarray(clear[..., 0]), Image.fromarray(clear[..., 3])
  save(tmp_path / "la.png", Image.merge("LA", [grey, alpha]))
  np.testing.assert_allclose(Reader(1, None).read(tmp_path / "la.png"), expected[..., :1], atol=1)
  palette = Image.fromarray((clear[..., 3] > 0).astype(np.uint8))
  palette.putpalette([200, 0, 0, 10, 20, 30])
  save(tmp_path / "p.png", palette, transparency=0)
  x = Reader(3, None).read(tmp_path / "p.png")
  assert (x[0, 0].tolist(), x[0, 5].tolist()) == ([255, 255, 255], [10, 20, 30])
  save(tmp_path / "p.gif", palette)
  assert Reader(3, None).read(tmp_path / "p.gif")[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_pictures_stand_upright(tmp_path, orientation, suffix):
  """Orientation 9 does not exist and changes nothing."""
  x = np.zeros((16, 24), np.uint8)
  x[:8, :8] = 255  # the upper left
  undo = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
  }
  stored = Image.fromarray(x)
  if orientation in undo:
    stored = stored.transpose(undo[orientation])
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = save(tmp_path / f"a.{suffix}", stored, exif=exif, quality=100)
  np.testing.assert_allclose(Reader(1, None).read(path)[..., 0], x, atol=3)
  assert reader.Header.read(path).size == (16, 24)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_by_one_number_and_clipped(tmp_path, suffix):
  values = np.array([[0, 1, 2047, 4095], [5000, 4095, 8, 16]], np.uint16)
  path = save(tmp_path / f"a.{suffix}", values)
  x = Reader(1, None, white=4095).read(path)
  np.testing.assert_array_equal(x[..., 0], np.round(np.minimum(values, 4095) * (255 / 4095)))
  np.testing.assert_array_equal(Reader(3, None, white=4095).read(path), x.repeat(3, axis=-1))
  # Scaled before it is resized: half of 8 and 16 levels of 4095 is 0.75 of a byte, not 0.5 of 0 and 1.
  small = Reader(1, (1, 1), white=16).read(
    save(tmp_path / f"b.{suffix}", np.array([[1, 1], [1, 2]], np.uint16))
  )
  assert small.item() == round(255 / 16 * 1.25)


def test_a_reader_is_json():
  for made in (Reader(3, None), Reader(1, (32, 48), "pad", 4095)):
    again = Reader(**json.loads(json.dumps(dataclasses.asdict(made))))
    assert (again, hash(again)) == (made, hash(made))


def test_a_picture_that_cannot_be_read(tmp_path, monkeypatch):
  with pytest.raises(InputError, match=r"no\.png does not exist"):
    Reader(1, None).read(tmp_path / "no.png")
  path = save(tmp_path / "a.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
  with pytest.raises(InputError, match=r"a\.png exceeds the limit of 60 pixels: make it smaller"):
    Reader(1, None).read(path)


def test_resizing_keeps_the_aspect():
  x = np.zeros((20, 40), np.uint8)
  x[:, 10:30] = 100
  x[:, 30:] = 200
  picture = Image.fromarray(x)
  crop = pictures.resize(picture, (10, 10), "crop")
  np.testing.assert_array_equal(crop[:, 1:-1], 100)  # the middle half; the filter reaches over its edges
  assert np.abs(crop.astype(int) - 100).max() < 20
  pad = pictures.resize(picture, (20, 20), "pad")
  assert pad.shape == (20, 20)
  np.testing.assert_array_equal(pad[:5], np.tile(pad[5], (5, 1)))  # the edge rows, repeated
  np.testing.assert_array_equal(pad[15:], np.tile(pad[14], (5, 1)))
  assert (pad[0, 0], pad[0, 10], pad[0, 19]) == (0, 100, 200)
  assert pictures.resize(Image.fromarray(noise(size=(1, 300))), (8, 8), "pad").shape == (8, 8)
  assert pictures.resize(Image.fromarray(noise(size=(300, 1))), (8, 8), "crop").shape == (8, 8)


def test_squares_are_resized_as_ever():
  x = datasets.load("digits").x_train[:20]
  for fit in ("crop", "pad"):
    found = datasets.load("digits", image_size=13, fit=fit).x_train[:20]
    for image, resized in zip(x, found, strict=True):
      expected = Image.fromarray(image[..., 0]).resize((13, 13), Image.Resampling.BILINEAR)
      np.testing.assert_array_equal(resized[..., 0], np.asarray(expected))
