"""Label splits as values, the training set on the device, and batches sampled there."""

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
  """Chooses labels, images, and images to hold out, from one seeded permutation of the training set.

  The images of the run are its first `num_images`, the held-out ones its last; the labelled ones are the
  first `per_class` of every class. So splits of one seed are nested: 5 labels a class are among the 10.

  Args:
    labels: classes of the whole training set, -1 where there is no label.
    per_class: labels of each class; None: every label of the images of the run.
    seed: of the permutation.
    class_names: of the classes, for messages.
    num_images: images that the run may train on; None: all that are not held out.
    num_held_out: images that it may not.

  Raises:
    InputError: no labels at all, `per_class` is below 1 or above the labels of the smallest class, or there
      are not so many images.
  """
  if per_class is not None and per_class < 1:
    raise InputError(f"--labels-per-class must be at least 1, not {per_class}")
  rest = len(labels) - num_held_out
  num_images = rest if num_images is None else num_images
  if not 0 < num_images <= rest:
    raise InputError(
      f"{num_images} images to train on and {num_held_out} to hold out are not among the"
      f" {len(labels)} training images: change --num-images or --hold-out"
    )
  order = np.random.default_rng(seed).permutation(len(labels))
  images, held_out = order[:num_images], order[rest:]
  classes = np.unique(labels[labels >= 0])
  if not len(classes):
    raise InputError("no training image has a label")
  known = images[labels[images] >= 0]
  known = known[np.argsort(labels[known], kind="stable")]  # class by class, each as in the permutation
  first = np.searchsorted(labels[known], classes)
  counts = np.diff(first, append=len(known))
  rarest = classes[counts.argmin()]
  rarest = class_names[rarest] if class_names else rarest
  if per_class is not None and per_class > counts.min():
    raise InputError(
      f"--labels-per-class {per_class} is more than the {counts.min()} labelled training images of class"
      f" {rarest}"
    )
  if counts.min() == 0:
    raise InputError(f"class {rarest} has no label among the {num_images} images to train on")
  place = np.arange(len(known)) - np.repeat(first, counts)  # of each among those of its class
  chosen = known if per_class is None else known[place < per_class]
  return _split(labels, chosen, per_class, seed, images, held_out)


def folds(
  labels: Int[np.ndarray, "n"], split: LabelSplit, num: int
) -> list[tuple[LabelSplit, Int[np.ndarray, "o"]]]:
  """Cross-validation over the labels: `num` splits, and the labelled images that each leaves out.

  Every labelled image is left out once, and then it is no image of the run at all, as a new image would
  be. None is held out beside them. Stratified: a class's labels are dealt to the folds in turn, in the
  order of the split's seed.

  Args:
    labels: classes of the whole training set, -1 where there is no label.
    split: what to take apart.
    num: at least 2, at most the labels of the smallest class.
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
  """Frequencies of the classes among labels, `(n_k + 1) / (n + K)`; None where all are equal.

  One is added to each count (Laplace), because a class may have but one label.
  """
  counts = np.bincount(np.asarray(y_lab), minlength=num_classes)
  if len(set(counts.tolist())) == 1:
    return None
  return tuple(((counts + 1) / (counts.sum() + num_classes)).tolist())


# --- On the device

NUM_SEEN = 500
"""Images that every run has on the device, for weight normalisation and diagnostics, see `seen`."""


@dataclass(frozen=True, eq=False)
class Stream:
  """Images that are read while a run trains, see `gan_jax.stream`."""

  source: ImageSource
  rows: Int[np.ndarray, "u"]
  """Which of them are the unlabelled images of the run."""
  labelled: Int[np.ndarray, "n"] | None
  """Which are the labelled ones; None: these are on the device, because they are few."""
  workers: int
  """Threads that read; 0: the loop itself does."""

  def counts(self, sizes: BatchSizes) -> tuple[int, int, int]:
    """How many of each kind a step reads."""
    return sizes._replace(labelled=0 if self.labelled is None else sizes.labelled)


def seen(x: Any) -> Any:
  """`NUM_SEEN` rows, spread evenly over all, or all where there are no more: images of a folder are in the
  order of their classes. Of what was chosen so all is chosen again."""
  num = min(len(x), NUM_SEEN)
  return x[np.arange(num) * len(x) // max(num, 1)]


class DeviceData(struct.PyTreeNode):
  """A training set on the device, as bytes. Of the labels only those that a run may use are there."""

  x_lab: UInt8[Array, "n h w c"]
  """Where they are streamed those that are `seen`."""
  y_lab: Int[Array, "n"]
  """All of them, always."""
  x_unl: UInt8[Array, "u h w c"]
  """With a stream those that are `seen`."""
  x_held_out: UInt8[Array, "o h w c"]
  """Images that no update sees, for diagnostics."""
  y_held_out: Int[Array, "o"]
  """Their labels in a run with every label, else -1; no update sees them either."""
  x_steps: UInt8[Array, "m b h w c"] | None = None
  """With a stream: what each step of one dispatch draws, as far as it is streamed: labelled images, then
  unlabelled ones of D's update, then of G's."""
  stream: Stream | None = struct.field(pytree_node=False, default=None)
  """Where the images come from in a run that does not hold all of them."""

  @classmethod
  def from_arrays(
    cls, x_lab: UInt8[Any, "n h w c"], y_lab: Int[Any, "n"], x_unl: UInt8[Any, "u h w c"]
  ) -> "DeviceData":
    """Images as bytes, and the labels of some of them, without held-out ones.

    Args:
      x_lab: labelled images, `[N, H, W, C]`.
      y_lab: their classes, 0 .. K-1.
      x_unl: all images that may be used without a label; the labelled ones may be among them.

    Raises:
      InputError: a label below 0.
    """
    chex.assert_equal_shape([x_lab, x_unl], dims=(1, 2, 3))
    chex.assert_type([x_lab, x_unl], np.uint8)
    if np.min(y_lab, initial=0) < 0:
      raise InputError("y_lab must be classes from 0 on: an image without a label is one of x_unl alone")
    held_out = jnp.asarray(x_unl[:0]), jnp.zeros(0, jnp.int32)
    return cls(jnp.asarray(x_lab), jnp.asarray(y_lab, jnp.int32), jnp.asarray(x_unl), *held_out)


def to_device(dataset: Dataset, split: LabelSplit, *, exclude_labelled: bool = False) -> DeviceData:
  """Puts the labelled subset, the unlabelled and the held-out images on the device.

  The unlabelled images are all images of the run, labelled ones included, or without them. Those of a
  dataset that is streamed stay where they are; so do the labelled ones if they are more than `NUM_SEEN`.
  """
  labelled = np.asarray(split.indices, int)
  unlabelled = np.asarray(split.images, int)
  if exclude_labelled:
    unlabelled = np.setdiff1d(unlabelled, labelled)
  held_out = np.asarray(split.held_out, int)
  y_held_out = dataset.y_train[held_out] if split.per_class is None else np.full(len(held_out), -1)
  y_lab, stream = jnp.asarray(dataset.y_train[labelled], jnp.int32), None
  if dataset.workers is not None:
    many = len(labelled) > NUM_SEEN
    stream = Stream(dataset.x_train, unlabelled, labelled if many else None, dataset.workers)
    unlabelled, labelled = seen(unlabelled), seen(labelled)
  take = lambda rows: jax.device_put(dataset.x_train[rows])  # `jnp.asarray` copies once more on the host
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
  """Some images of a dataset, read when they are asked for; an array as to `len`, `shape` and `[rows]`."""

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
  """The labelled images of a split, wherever they are, and their classes."""
  rows = np.asarray(split.indices, int)
  return Chosen(dataset.x_train, rows), dataset.y_train[rows]


def to_device_splits(dataset: Dataset, splits: Sequence[LabelSplit], *, repeats: int = 1) -> DeviceData:
  """Several splits of one training set: `x_lab` and `y_lab` with a leading axis, all images once.

  Args:
    dataset: where the images are.
    splits: the unlabelled images are those of all of them, labelled ones included.
    repeats: copies of each labelled image, so that label budgets of one size share one compiled program.
      They are drawn as often as without, but for a set of exactly the batch's size, which is then no longer
      taken whole in every step, see `draw_rows`.

  Raises:
    InputError: the splits differ in their images, or in how many labels they have.
  """
  if len({(split.images, split.held_out, len(split.indices)) for split in splits}) != 1:
    raise InputError("splits that are trained together need the same images and as many labels each")
  labelled = np.array([split.indices * repeats for split in splits])
  return to_device(dataset, splits[0]).replace(
    x_lab=jnp.asarray(dataset.x_train[labelled]), y_lab=jnp.asarray(dataset.y_train[labelled], jnp.int32)
  )


def make_sample_batch(sizes: BatchSizes) -> Callable[..., Batch]:
  """Builds `sample_batch(key, data, i=0) -> Batch` of these sizes; it consumes the key.

  It draws as `draw_rows` does. `i` is the place of the step in its dispatch: images that are streamed were
  drawn before it.
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
  """Which images a batch is made of: rows of the labelled ones, and of the unlabelled ones for D and for G.

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
