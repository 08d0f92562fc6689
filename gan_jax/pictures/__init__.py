"""User data: folders of pictures, tables of labels, and arrays, read and checked.

Nothing is silently dropped or replaced. Whatever is skipped, left out or clipped is counted in
`Dataset.note`, and data that cannot be trained on raises an `InputError` of one sentence.
"""

from gan_jax.pictures.arrays import Scaling, load_arrays, read_images, scaled
from gan_jax.pictures.folder import load_folder
from gan_jax.pictures.layout import below, labelled
from gan_jax.pictures.reader import Reader, Resizing, for_all, listed, resize, resize_all
from gan_jax.pictures.survey import check, print_check

__all__ = [
  "Reader",
  "Resizing",
  "Scaling",
  "below",
  "check",
  "for_all",
  "labelled",
  "listed",
  "load_arrays",
  "load_folder",
  "print_check",
  "read_images",
  "resize",
  "resize_all",
  "scaled",
]
