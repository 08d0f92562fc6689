"""Label splits, the training set on the device, and batch sampling there."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from gan_jax.dataset import Dataset
from gan_jax.types import Batch, BatchSizes, ImageSource, InputError, LabelSplit

# --- Label splits


def split_labels(
  labels: Int[np.ndarray, "n"],
  per_class: int | None,
  seed: int,
  *,
  class_names: Sequence[str] = (),
  num_images: int | None = None,
  num_held_out: int = 0,
) -> LabelSplit:
  """Chooses the labelled, training and held-out images from one seeded permutation of the training set.

  The run trains on the first `num_images` of the permutation and holds out the last `num_held_out`; the
  first `per_class` training images of each class are labelled. Splits of one seed are therefore nested:
  5 labels per class are a subset of 10.

  Args:
    labels: classes of the whole training set, -1 for no label.
    per_class: labels per class; None uses every label of the run's images.
    seed: seed of the permutation.
    class_names: names of the classes, for messages.
    num_images: images that the run may train on; None uses all that are not held out.
    num_held_out: images to hold out.

  Raises:
    InputError: there are no labels, a class has none among the chosen images, `per_class` is below 1 or
      above the number of labels of the rarest class, or there are too few images.
  """
  if per_class is not None and per_class < 1:
    raise InputError(f"labels per class must be at least 1, not {per_class}")
  rest = len(labels) - num_held_out
  num_images = rest if num_images is None else num_images
  if not 0 < num_images <= rest:
    raise InputError(
      f"cannot train on {num_images} of {len(labels)} training images while holding out {num_held_out}:"
      " choose fewer"
    )
  order = np.random.default_rng(seed).permutation(len(labels))
  images, held_out = order[:num_images], order[rest:]
  classes = np.unique(labels[labels >= 0])
  if not len(classes):
    raise InputError("no training image has a label")
  known = images[labels[images] >= 0]
  known = known[np.argsort(labels[known], kind="stable")]  # grouped by class, in permutation order
  first = np.searchsorted(labels[known], classes)
  counts = np.diff(first, append=len(known))
  rarest = classes[counts.argmin()]
  rarest = class_names[rarest] if class_names else rarest
  if per_class is not None and per_class > counts.min():
    raise InputError(
      f"{per_class} labels per class are more than the {counts.min()} labelled training images of class"
      f" {rarest}"
    )
  if counts.min() == 0:
    raise InputError(f"class {rarest} has no label among the {num_images} images to train on")
  place = np.arange(len(known)) - np.repeat(first, counts)  # rank of each within its class
  chosen = known if per_class is None else known[place < per_class]
  return _split(labels, chosen, per_class, seed, images, held_out)


def folds(
  labels: Int[np.ndarray, "n"], split: LabelSplit, num: int
) -> list[tuple[LabelSplit, Int[np.ndarray, "o"]]]:
  """Cross-validation over the labels: `num` splits, each with the labelled images that it leaves out.

  Every labelled image is left out by one split, which does not use it as an unlabelled image either: to
  this split it is a new image. No other images are held out. Stratified: the labels of each class are
  dealt to the folds in turn, in an order drawn with the split's seed.

  Args:
    labels: classes of the whole training set, -1 for no label.
    split: the split to divide.
    num: number of folds, at least 2 and at most the number of labels of the rarest class.
  """
  order = np.random.default_rng(split.seed).permutation(np.asarray(split.indices))
  order = order[np.argsort(labels[order], kind="stable")]
  images, found = np.asarray(split.images, int), []
  for i in range(num):
    out, kept = np.sort(order[i::num]), np.ones(len(labels), bool)
    kept[out] = False
    rest = _split(labels, order[kept[order]], None, split.seed, images[kept[images]], order[:0])
    found.append((rest, out))
  return found


def _split(
  labels: np.ndarray,
  chosen: np.ndarray,
  per_class: int | None,
  seed: int,
  images: np.ndarray,
  held_out: np.ndarray,
) -> LabelSplit:
  chosen = np.sort(chosen)
  digest = hashlib.sha256(chosen.astype("<i8").tobytes() + labels[chosen].astype("<i8").tobytes())
  images_, held_out_ = (tuple(np.sort(a).tolist()) for a in (images, held_out))
  return LabelSplit(tuple(chosen.tolist()), per_class, seed, digest.hexdigest(), images_, held_out_)


def class_prior(y_lab: Int[Any, "n"], num_classes: int) -> tuple[float, ...] | None:
  """Class frequencies of the labels, `(n_k + 1) / (n + K)`; None if all are equal.

  Laplace smoothing, because a class may have only one label.
  """
  counts = np.bincount(np.asarray(y_lab), minlength=num_classes)
  if len(set(counts.tolist())) == 1:
    return None
  return tuple(((counts + 1) / (counts.sum() + num_classes)).tolist())


# --- On the device

NUM_SPACED = 500
"""Images that every run keeps on the device for weight normalisation and diagnostics: `evenly_spaced`."""


@dataclass(frozen=True, eq=False)
class Stream:
  """Images that are read during training, see `gan_jax.stream`."""

  source: ImageSource
  rows: Int[np.ndarray, "u"]
  """Positions of the run's unlabelled images in the source."""
  labelled: Int[np.ndarray, "n"] | None
  """Positions of the labelled images; None if they are few and therefore on the device."""
  workers: int
  """Reader threads; 0 reads in the training loop itself."""

  def counts(self, sizes: BatchSizes) -> tuple[int, int, int]:
    """Images of each kind that a step reads from the stream."""
    return sizes._replace(labelled=0 if self.labelled is None else sizes.labelled)


def evenly_spaced(x: Any, num: int | None = None) -> Any:
  """`num` evenly spaced rows (default: `NUM_SPACED`), or all rows if there are no more. Idempotent.

  Evenly spaced, because the images of a folder are sorted by class.
  """
  num = min(len(x), NUM_SPACED if num is None else num)
  return x[np.arange(num) * len(x) // max(num, 1)]


def mean_norm(x: ImageSource) -> float:
  """Mean Euclidean norm of the `evenly_spaced` images in [0, 1]: the unit of adversarial perturbations."""
  some = x[evenly_spaced(np.arange(len(x)))].reshape(min(len(x), NUM_SPACED), -1) / 255
  return float(np.linalg.norm(some, axis=1).mean())


class DeviceData(struct.PyTreeNode):
  """A training set on the device, as bytes, with only the labels that the run may use."""

  x_lab: UInt8[Array, "n h w c"]
  """Labelled images; if these are streamed, only the `evenly_spaced` ones."""
  y_lab: Int[Array, "n"]
  """Classes of all labelled images, streamed or not."""
  x_unl: UInt8[Array, "u h w c"]
  """Unlabelled images; with a stream, only the `evenly_spaced` ones."""
  x_held_out: UInt8[Array, "o h w c"]
  """Images that no update sees, for diagnostics."""
  y_held_out: Int[Array, "o"]
  """Their labels if the run uses every label, else -1; no update sees these either."""
  x_steps: UInt8[Array, "m b h w c"] | None = None
  """With a stream: the streamed images of each step of one dispatch, in the order labelled, unlabelled for
  D's update, unlabelled for G's."""
  stream: Stream | None = struct.field(pytree_node=False, default=None)
  """The stream of the images; None if all of them are on the device."""

  @classmethod
  def from_arrays(
    cls, x_lab: UInt8[Any, "n h w c"], y_lab: Int[Any, "n"], x_unl: UInt8[Any, "u h w c"]
  ) -> "DeviceData":
    """A training set from arrays, without held-out images.

    Args:
      x_lab: labelled images as bytes, `[N, H, W, C]`.
      y_lab: their classes, 0 .. K-1.
      x_unl: images used without labels, as bytes; the labelled ones may be among them.

    Raises:
      InputError: a label is below 0.
    """
    chex.assert_equal_shape([x_lab, x_unl], dims=(1, 2, 3))
    chex.assert_type([x_lab, x_unl], np.uint8)
    if np.min(y_lab, initial=0) < 0:
      raise InputError("y_lab must hold classes numbered from 0: pass images without a label in x_unl only")
    held_out = jnp.asarray(x_unl[:0]), jnp.zeros(0, jnp.int32)
    return cls(jnp.asarray(x_lab), jnp.asarray(y_lab, jnp.int32), jnp.asarray(x_unl), *held_out)


def to_device(dataset: Dataset, split: LabelSplit, *, exclude_labelled: bool = False) -> DeviceData:
  """Puts the labelled, unlabelled and held-out images on the device.

  The unlabelled images are all images of the run, with or without the labelled ones. For a streamed dataset
  only the `evenly_spaced` ones go to the device; the same holds for more than `NUM_SPACED` labelled images.
  """
  labelled = np.asarray(split.indices, int)
  unlabelled = np.asarray(split.images, int)
  if exclude_labelled:
    unlabelled = np.setdiff1d(unlabelled, labelled)
  held_out = np.asarray(split.held_out, int)
  y_held_out = dataset.y_train[held_out] if split.per_class is None else np.full(len(held_out), -1)
  y_lab, stream = jnp.asarray(dataset.y_train[labelled], jnp.int32), None
  if dataset.workers is not None:
    many = len(labelled) > NUM_SPACED
    stream = Stream(dataset.x_train, unlabelled, labelled if many else None, dataset.workers)
    unlabelled, labelled = evenly_spaced(unlabelled), evenly_spaced(labelled)
  take = lambda rows: jax.device_put(dataset.x_train[rows])  # `jnp.asarray` makes one more copy on the host
  x_lab = take(labelled)
  same = np.array_equal(labelled, unlabelled)  # every image has a label: one copy serves both
  return DeviceData(
    x_lab=x_lab,
    y_lab=y_lab,
    x_unl=x_lab if same else take(unlabelled),
    x_held_out=take(held_out),
    y_held_out=jnp.asarray(y_held_out, jnp.int32),
    stream=stream,
  )


@dataclass(frozen=True, eq=False)
class Chosen:
  """Some images of a dataset, read on access; like an array, it has `len`, `shape` and `[rows]`."""

  source: ImageSource
  rows: Int[np.ndarray, "n"]

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.rows), *self.source.shape[1:])

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: Any) -> UInt8[np.ndarray, "b h w c"]:
    return self.source[self.rows[index]]


def labelled(dataset: Dataset, split: LabelSplit) -> tuple[Chosen, Int[np.ndarray, "n"]]:
  """The labelled images of a split, in memory or streamed, and their classes."""
  rows = np.asarray(split.indices, int)
  return Chosen(dataset.x_train, rows), dataset.y_train[rows]


def to_device_splits(dataset: Dataset, splits: Sequence[LabelSplit], *, repeats: int = 1) -> DeviceData:
  """Several splits of one training set: `x_lab` and `y_lab` get a leading axis, `x_unl` is shared.

  Args:
    dataset: source of the images.
    splits: splits of the same images; all of these serve as unlabelled images, labelled ones included.
    repeats: copies of each labelled image, so that different label budgets can share one compiled program.
      Images are drawn as often as without copies, except that a labelled set of exactly the batch size is
      no longer taken whole in every step, see `draw_rows`.

  Raises:
    InputError: the splits differ in their images or in their number of labels.
  """
  if len({(split.images, split.held_out, len(split.indices)) for split in splits}) != 1:
    raise InputError("splits that are trained together need the same images and the same number of labels")
  labelled = np.array([split.indices * repeats for split in splits])
  return to_device(dataset, splits[0]).replace(
    x_lab=jnp.asarray(dataset.x_train[labelled]), y_lab=jnp.asarray(dataset.y_train[labelled], jnp.int32)
  )


def make_sample_batch(sizes: BatchSizes) -> Callable[..., Batch]:
  """Builds `sample_batch(key, data, i=0) -> Batch` for these sizes; it consumes the key.

  The rows come from `draw_rows`. `i` is the index of the step in its dispatch; it selects the step's
  streamed images, which were drawn beforehand.
  """

  def sample_batch(key: Key[Array, ""], data: DeviceData, i: Int[Any, ""] = 0) -> Batch:
    lab, unl, unl_g = draw_rows(key, sizes, len(data.y_lab), len(data.x_unl))
    if data.stream is None:
      x_lab, x_unl, x_unl_g = data.x_lab[lab], data.x_unl[unl], data.x_unl[unl_g]
    else:
      counts = data.stream.counts(sizes)
      drawn = data.x_lab[:0] if data.x_steps is None else data.x_steps[i]
      x_lab, x_unl, x_unl_g = jnp.split(drawn, np.cumsum(counts)[:2])
      x_lab = data.x_lab[lab] if data.stream.labelled is None else x_lab
    return Batch(
      x_lab=to_float(x_lab),
      y_lab=data.y_lab[lab],
      x_unl=to_float(x_unl),
      x_unl_g=to_float(x_unl_g),
      num_generated=sizes.generated,
    )

  return sample_batch


def draw_rows(
  key: Key[Array, ""], sizes: BatchSizes, num_labelled: int, num_unlabelled: int
) -> tuple[Int[Array, "n"], Int[Array, "u"], Int[Array, "g"]]:
  """Draws the rows of a batch: of the labelled images, and of the unlabelled ones for D and for G.

  Uniform with replacement; a labelled set of exactly `sizes.labelled` images is taken whole. Consumes the
  key.
  """
  keys, nums = jax.random.split(key, 3), (num_labelled, num_unlabelled, num_unlabelled)
  draws = zip(keys, sizes, nums, strict=True)
  lab, unl, unl_g = (jax.random.randint(key, (size,), 0, num) for key, size, num in draws)
  return jnp.arange(num_labelled) if sizes.labelled == num_labelled else lab, unl, unl_g


def to_float(x: UInt8[Any, "b h w c"]) -> Float[Array, "b h w c"]:
  """Bytes to float32 in [0, 1]."""
  return jnp.asarray(x, jnp.float32) / 255


def to_bytes(x: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
  """Images in [0, 1] to the nearest bytes, in host memory."""
  return np.round(255 * np.asarray(x)).astype(np.uint8)
