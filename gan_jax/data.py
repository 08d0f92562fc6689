"""Label splits as values, the training set on the device, and batches sampled there."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from gan_jax.datasets import Dataset
from gan_jax.types import Batch, BatchSizes, InputError, LabelSplit

# --- Label splits


def split_labels(
  labels: Int[np.ndarray, "n"],
  per_class: int | None,
  seed: int,
  *,
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
    num_images: images that the run may train on; None: all that are not held out.
    num_held_out: images that it may not.

  Raises:
    InputError: `per_class` is below 1 or above the labels of the smallest class, or there are not so
      many images.
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
  counts = np.array([(labels[images] == k).sum() for k in classes])
  if per_class is not None and per_class > counts.min():
    raise InputError(
      f"--labels-per-class {per_class} is more than the {counts.min()} labelled training images of class"
      f" {classes[counts.argmin()]}"
    )
  if counts.min() == 0:
    raise InputError(
      f"class {classes[counts.argmin()]} has no label among the {num_images} images to train on"
    )
  chosen = np.concatenate([images[labels[images] == k][:per_class] for k in classes])
  return _split(labels, chosen, per_class, seed, images, held_out)


def folds(
  labels: Int[np.ndarray, "n"], split: LabelSplit, num: int
) -> list[tuple[LabelSplit, Int[np.ndarray, "o"]]]:
  """Cross-validation over the labels: `num` splits, and the labelled images that each leaves out.

  Every labelled image is left out once, and then it is no image of the run at all, as a new image would
  be. Stratified: a class's labels are dealt to the folds in turn, in the order of the split's seed.

  Args:
    labels: classes of the whole training set, -1 where there is no label.
    split: what to take apart.
    num: at least 2, at most the labels of the smallest class.
  """
  order = np.random.default_rng(split.seed).permutation(np.asarray(split.indices))
  order = order[np.argsort(labels[order], kind="stable")]
  dealt = [np.sort(order[i::num]) for i in range(num)]
  return [
    (
      _split(
        labels,
        np.setdiff1d(order, out),
        None,
        split.seed,
        np.setdiff1d(split.images, out),
        np.asarray(split.held_out, int),
      ),
      out,
    )
    for out in dealt
  ]


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


class DeviceData(struct.PyTreeNode):
  """A training set on the device, as bytes. Of the labels only those that a run may use are there."""

  x_lab: UInt8[Array, "n h w c"]
  y_lab: Int[Array, "n"]
  x_unl: UInt8[Array, "u h w c"]
  x_held_out: UInt8[Array, "o h w c"]
  """Images that no update sees, for diagnostics."""
  y_held_out: Int[Array, "o"]
  """Their labels in a run with every label, else -1; no update sees them either."""

  @classmethod
  def from_arrays(
    cls, x_lab: UInt8[Any, "n h w c"], y_lab: Int[Any, "n"], x_unl: UInt8[Any, "u h w c"]
  ) -> "DeviceData":
    """Images as bytes, and the labels of some of them, without held-out ones.

    Args:
      x_lab: labelled images, `[N, H, W, C]`.
      y_lab: their classes, 0 .. K-1.
      x_unl: all images that may be used without a label; the labelled ones may be among them.
    """
    chex.assert_equal_shape([x_lab, x_unl], dims=(1, 2, 3))
    chex.assert_type([x_lab, x_unl], np.uint8)
    held_out = jnp.asarray(x_unl[:0]), jnp.zeros(0, jnp.int32)
    return cls(jnp.asarray(x_lab), jnp.asarray(y_lab, jnp.int32), jnp.asarray(x_unl), *held_out)


def to_device(dataset: Dataset, split: LabelSplit, *, exclude_labelled: bool = False) -> DeviceData:
  """Puts the labelled subset, the unlabelled and the held-out images on the device.

  The unlabelled images are all images of the run, labelled ones included, or without them.
  """
  labelled = np.asarray(split.indices, int)
  unlabelled = np.asarray(split.images, int)
  if exclude_labelled:
    unlabelled = np.setdiff1d(unlabelled, labelled)
  held_out = np.asarray(split.held_out, int)
  y_held_out = dataset.y_train[held_out] if split.per_class is None else np.full(len(held_out), -1)
  return DeviceData(
    x_lab=jnp.asarray(dataset.x_train[labelled]),
    y_lab=jnp.asarray(dataset.y_train[labelled], jnp.int32),
    x_unl=jnp.asarray(dataset.x_train[unlabelled]),
    x_held_out=jnp.asarray(dataset.x_train[held_out]),
    y_held_out=jnp.asarray(y_held_out, jnp.int32),
  )


def to_device_splits(dataset: Dataset, splits: Sequence[LabelSplit], *, repeats: int = 1) -> DeviceData:
  """Several splits of one training set: `x_lab` and `y_lab` with a leading axis, all images once.

  Args:
    dataset: where the images are.
    splits: the unlabelled images are those of all of them, labelled ones included.
    repeats: copies of each labelled image. Sampling with replacement is the same for any number,
      and label budgets that are repeated to one size share one compiled program.

  Raises:
    InputError: the splits differ in their images, or in how many labels they have.
  """
  if len({(split.images, split.held_out, len(split.indices)) for split in splits}) != 1:
    raise InputError("splits that are trained together need the same images and as many labels each")
  labelled = np.array([split.indices * repeats for split in splits])
  return to_device(dataset, splits[0]).replace(
    x_lab=jnp.asarray(dataset.x_train[labelled]), y_lab=jnp.asarray(dataset.y_train[labelled], jnp.int32)
  )


def make_sample_batch(sizes: BatchSizes) -> Callable[[Key[Array, ""], DeviceData], Batch]:
  """Builds `sample_batch(key, data) -> Batch` of these sizes; it consumes the key.

  Uniform with replacement; a labelled set of exactly `sizes.labelled` images is taken whole.
  """

  def sample_batch(key: Key[Array, ""], data: DeviceData) -> Batch:
    key_lab, key_unl, key_unl_g = jax.random.split(key, 3)

    def images(key: Key[Array, ""], num: int) -> Float[Array, "n h w c"]:
      return to_float(data.x_unl[jax.random.randint(key, (num,), 0, len(data.x_unl))])

    x_lab, y_lab = data.x_lab, data.y_lab
    if sizes.labelled != len(y_lab):
      rows = jax.random.randint(key_lab, (sizes.labelled,), 0, len(y_lab))
      x_lab, y_lab = x_lab[rows], y_lab[rows]
    return Batch(
      x_lab=to_float(x_lab),
      y_lab=y_lab,
      x_unl=images(key_unl, sizes.unlabelled),
      x_unl_g=images(key_unl_g, sizes.generated),
      num_generated=sizes.generated,
    )

  return sample_batch


def to_float(x: UInt8[Any, "b h w c"]) -> Float[Array, "b h w c"]:
  """Bytes to float32 in [0, 1]."""
  return jnp.asarray(x, jnp.float32) / 255


def to_bytes(x: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
  """Images in [0, 1] to the nearest bytes, in host memory."""
  return np.round(255 * np.asarray(x)).astype(np.uint8)
