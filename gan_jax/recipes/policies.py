"""Augmentation policies: the transformations suited to each kind of picture, as data."""

from typing import Any, Literal, NamedTuple

from gan_jax import augment
from gan_jax.types import Augment

Ranges = dict[str, Any]
"""The arguments of `augments`: plain values that can be stored as JSON."""
Name = Literal["digits", "photos", "objects", "none"]


class Policy(NamedTuple):
  """The augmentations suited to one kind of picture; None means no augmentation."""

  strong: Ranges | None
  """For all inputs of D."""
  weak: Ranges | None
  """For the images that give consistency targets."""
  generator: Ranges | None
  """For all inputs of D in a GAN that is trained for its images (DiffAugment, ADA)."""


_DIGITS = {"shift": 0.06, "rotate": 12.5, "scale": 0.1, "shear": 0.15}
_PHOTOS = {"shift": 0.1, "rotate": 15.0, "scale": 0.2, "shear": 0.15, "border": "mirror"}
_PHOTOS |= {"brightness": 0.2, "contrast": 0.4, "saturation": 0.5, "hue": 20.0}
_PHOTOS |= {"num_colours": 2, "cutout": 0.3}
_CROP = {"shift": 0.06, "rotate": 5.0, "scale": 0.05, "border": "mirror"}
_COLOUR = {"brightness": 0.2, "contrast": 0.5, "saturation": 0.5, "cutout": 0.3, "border": "mirror"}
POLICIES: dict[Name, Policy] = {
  "digits": Policy(
    _DIGITS,
    {"shift": 0.05, "rotate": 10.0, "scale": 0.05, "shear": 0.1},
    {"translate": 0.125, **_DIGITS, "brightness": 0.2, "contrast": 0.5, "cutout": 0.3},
  ),
  "photos": Policy(_PHOTOS, _CROP, {"translate": 0.125, **_COLOUR}),
  "objects": Policy(
    {"flip": True, **_PHOTOS}, {"flip": True, **_CROP}, {"flip": True, "translate": 0.125, **_COLOUR}
  ),
  "none": Policy(None, None, None),
}
"""Policies by name. digits: grey symbols on black. photos: pictures whose mirror image may have another
class, such as hands. objects: that of photos with mirror images."""


def suited(image_shape: tuple[int, int, int], *, mirror: bool = False) -> Name:
  """The policy for images of this shape: none for a single row (a vector), digits for grey images, else
  photos or, with `mirror`, objects."""
  if image_shape[0] == 1:
    return "none"
  if image_shape[2] != 3:
    return "digits"
  return "objects" if mirror else "photos"


def augments(
  *,
  flip: bool = False,
  translate: float = 0.0,
  shift: float = 0.0,
  rotate: float = 0.0,
  scale: float = 0.0,
  shear: float = 0.0,
  border: augment.Border = "zero",
  brightness: float = 0.0,
  contrast: float = 0.0,
  saturation: float = 0.0,
  hue: float = 0.0,
  num_colours: int | None = None,
  cutout: float = 0.0,
) -> tuple[Augment, ...]:
  """The transformations with these ranges, see `augment`, in this order; those of range 0 are omitted.

  Args:
    flip: whether half of the images are mirrored.
    translate: range of shifts by whole pixels.
    shift: a range of the affine map, like `rotate`, `scale` and `shear`.
    border: padding outside an image.
    brightness: a range of colour changes, like `contrast`, `saturation` and `hue` (in degrees).
    num_colours: number of these four applied to each image, chosen at random per image; None: all.
    cutout: side of the hole.
  """
  out: list[Augment] = [augment.flip] if flip else []
  if translate:
    out.append(augment.translate(translate, border=border))
  if shift or rotate or scale or shear:
    out.append(augment.affine(shift=shift, rotate=rotate, scale=scale, shear=shear, border=border))
  out += _colours(brightness, contrast, saturation, hue, num_colours)
  if cutout:
    out.append(augment.cutout(cutout))
  return tuple(out)


def _colours(
  brightness: float, contrast: float, saturation: float, hue: float, num: int | None
) -> list[Augment]:
  both = augment.brightness_contrast
  last = [make(most) for make, most in ((augment.saturation, saturation), (augment.hue, hue)) if most]
  if num is None:
    return ([both(brightness=brightness, contrast=contrast)] if brightness or contrast else []) + last
  first = [both(brightness=brightness)] * bool(brightness) + [both(contrast=contrast)] * bool(contrast)
  return [augment.some(num, *first, *last)]


def build(ranges: Ranges | None) -> Augment | None:
  """The transformations with these ranges, in sequence; None stays None."""
  if not ranges:
    return None
  found = augments(**ranges)
  return found[0] if len(found) == 1 else augment.chain(*found)
