import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gan_jax import data
from gan_jax.types import BatchSizes, InputError


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 1000))
def test_split_has_the_same_number_of_every_class(num_classes, per_class, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), 8))
  split = data.split_labels(labels, per_class, seed)
  chosen = labels[list(split.indices)]
  assert np.bincount(chosen).tolist() == [per_class] * num_classes
  assert list(split.indices) == sorted(set(split.indices))
  assert split == data.split_labels(labels, per_class, seed)
  if per_class > 1:
    assert set(data.split_labels(labels, per_class - 1, seed).indices) < set(split.indices)


@given(st.integers(0, 1000), st.sampled_from([None, 1, 2]), st.integers(45, 60))
def test_the_labelled_images_are_the_first_of_every_class(seed, per_class, num_images):
  """Against the definition, class by class, with irregular classes and unlabelled images."""
  labels = np.random.default_rng(seed).permutation([*[-1] * 20, *[0] * 9, *[3] * 12, *[7] * 19])
  images = np.random.default_rng(seed).permutation(60)[:num_images]
  expected = [i for k in (0, 3, 7) for i in images[labels[images] == k][:per_class]]
  if min(np.bincount(labels[images] + 1)[[1, 4, 8]]) < (per_class or 1):
    return
  assert data.split_labels(labels, per_class, seed, num_images=num_images).indices == tuple(
    sorted(expected)
  )


def test_split_is_known_by_its_hash():
  labels = np.arange(40) % 4
  split = data.split_labels(labels, 3, seed=1)
  indices = np.array(split.indices, "<i8")
  expected = hashlib.sha256(indices.tobytes() + labels[indices].astype("<i8").tobytes()).hexdigest()
  assert split.sha256 == expected
  assert data.split_labels(labels, 3, seed=2).sha256 != expected
  assert data.split_labels((labels + 1) % 4, 3, seed=1).sha256 != expected


@pytest.mark.parametrize(
  ("per_class", "words"), [(0, "at least 1"), (-3, "at least 1"), (11, "only|more than")]
)
def test_impossible_budgets(per_class, words):
  with pytest.raises(InputError, match=words):
    data.split_labels(np.arange(40) % 4, per_class, seed=0)


def test_images_and_held_out_ones_come_from_the_same_permutation():
  labels = np.arange(40) % 4
  whole = data.split_labels(labels, 3, seed=1)
  part = data.split_labels(labels, 3, seed=1, num_images=30, num_held_out=5)
  assert whole.images == tuple(range(40))
  assert whole.held_out == ()
  assert part.indices == whole.indices  # the labelled images do not depend on what is held out
  assert (len(part.images), len(part.held_out)) == (30, 5)
  assert set(part.indices) < set(part.images)
  assert not set(part.images) & set(part.held_out)
  every = data.split_labels(labels, None, seed=1, num_held_out=5)
  assert every.indices == every.images
  assert set(every.images) | set(every.held_out) == set(range(40))


@pytest.mark.parametrize(("num_images", "num_held_out"), [(36, 5), (0, 0), (None, 40), (41, 0)])
def test_more_images_than_there_are(num_images, num_held_out):
  with pytest.raises(InputError, match="while holding out"):
    data.split_labels(np.arange(40) % 4, 1, seed=0, num_images=num_images, num_held_out=num_held_out)


def test_held_out_images_are_on_the_device_and_nowhere_else_there(tiny):
  split = data.split_labels(tiny.dataset.y_train, None, seed=0, num_images=40, num_held_out=10)
  on_device = data.to_device(tiny.dataset, split)
  held_out = {x.tobytes() for x in np.asarray(on_device.x_held_out)}
  seen = {x.tobytes() for x in np.concatenate([on_device.x_unl, on_device.x_lab])}
  assert (len(held_out), len(seen)) == (10, 40)
  assert not held_out & seen


def test_a_batch_has_the_sizes_asked_for(tiny):
  batch = jax.jit(data.make_sample_batch(BatchSizes(4, 5, 7)))(jax.random.key(0), tiny.data)
  assert [len(a) for a in (batch.x_lab, batch.y_lab, batch.x_unl, batch.x_unl_g)] == [4, 4, 5, 7]
  assert batch.num_generated == 7
  assert batch.x_unl.dtype == jnp.float32
  assert 0 <= batch.x_unl.min() <= batch.x_unl.max() <= 1
  whole = jax.jit(data.make_sample_batch(BatchSizes(6, 0, 0)))(jax.random.key(0), tiny.data)
  np.testing.assert_array_equal(whole.y_lab, tiny.data.y_lab)


def test_batches_are_uniform(tiny):
  """Within six standard errors of 1 / 60, for every image."""
  n = 60_000
  batch = jax.jit(data.make_sample_batch(BatchSizes(0, n, 0)))(jax.random.key(0), tiny.data)
  images, counts = np.unique(np.asarray(batch.x_unl).reshape(n, -1), axis=0, return_counts=True)
  assert len(images) == 60
  assert np.abs(counts - n / 60).max() < 6 * np.sqrt(n / 60)


def test_unlabelled_images_with_and_without_the_labelled(tiny):
  assert len(tiny.data.x_unl) == 60
  without = data.to_device(tiny.dataset, tiny.split, exclude_labelled=True)
  assert len(without.x_unl) == 54
  kept = {x.tobytes() for x in np.asarray(without.x_unl)}
  assert not kept & {x.tobytes() for x in tiny.dataset.x_train[list(tiny.split.indices)]}


def test_images_that_all_have_labels_are_held_once(tiny):
  split = data.split_labels(tiny.dataset.y_train, None, seed=0)
  images = data.to_device(tiny.dataset, split)
  assert images.x_unl is images.x_lab
  np.testing.assert_array_equal(images.x_unl, tiny.dataset.x_train)


def test_arrays_alone_are_a_training_set():
  x = np.zeros((5, 4, 4, 1), np.uint8)
  images = data.DeviceData.from_arrays(x[:2], np.array([1, 0]), x)
  assert (images.y_lab.dtype, len(images.x_unl), len(images.x_held_out)) == (jnp.int32, 5, 0)
  with pytest.raises(AssertionError):
    data.DeviceData.from_arrays(x[:2], np.array([1, 0]), x.astype(np.float32))
  with pytest.raises(AssertionError):
    data.DeviceData.from_arrays(x[:2, :3], np.array([1, 0]), x)


def test_no_label_is_no_class(tiny):
  with pytest.raises(InputError, match="y_lab must hold classes numbered from 0"):
    data.DeviceData.from_arrays(tiny.dataset.x_train[:2], np.array([0, -1]), tiny.dataset.x_train)


def test_images_without_a_label_are_images():
  labels = np.where(np.arange(40) % 2, -1, np.arange(40) // 2 % 4)
  every = data.split_labels(labels, None, seed=1)
  assert every.indices == tuple(range(0, 40, 2))
  assert every.images == tuple(range(40))
  few = data.split_labels(labels, 3, seed=1, num_held_out=5)
  assert np.bincount(labels[list(few.indices)]).tolist() == [3] * 4
  with pytest.raises(InputError, match="more than the 5 labelled training images of class"):
    data.split_labels(labels, 6, seed=1)
  with pytest.raises(InputError, match="labelled training images of class cat"):
    data.split_labels(labels, 6, seed=1, class_names=("cat",) * 4)
  with pytest.raises(InputError, match="no training image has a label"):
    data.split_labels(np.full(9, -1), None, seed=1)
  with pytest.raises(InputError, match="has no label among the 2 images"):
    data.split_labels(labels, None, seed=1, num_images=2)


@given(st.integers(2, 4), st.lists(st.integers(4, 9), min_size=2, max_size=5), st.integers(0, 100))
def test_every_label_is_left_out_once(num, counts, seed):
  """Stratified to within one label, and left-out images are not used in that fold in any way."""
  labels = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(20, -1)])
  labels = np.random.default_rng(seed).permutation(labels)
  split = data.split_labels(labels, None, seed, num_held_out=0)
  folds = data.folds(labels, split._replace(held_out=(0,)), num)
  assert sorted(np.concatenate([out for _, out in folds])) == list(split.indices)
  for fold, out in folds:
    assert set(fold.indices) == set(split.indices) - set(out)
    assert set(fold.images) == set(split.images) - set(out)
    assert not fold.held_out  # held-out images would bring their labels to the device
    per_class = np.bincount(labels[out], minlength=len(counts))
    assert all(abs(k - n / num) < 1 for k, n in zip(per_class, counts, strict=True))
    assert abs(len(out) - len(split.indices) / num) < 1
  assert len({fold.sha256 for fold, _ in folds}) == num


def test_class_prior_is_the_smoothed_frequency_of_the_labels():
  assert data.class_prior(np.array([0, 1, 2, 2, 1, 0]), 3) is None
  assert data.class_prior(np.array([0, 0, 0, 1]), 3) == (4 / 7, 2 / 7, 1 / 7)


def test_repeats_are_copies_of_the_labelled_images(tiny):
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed) for seed in range(2)]
  once, thrice = (data.to_device_splits(tiny.dataset, splits, repeats=n) for n in (1, 3))
  assert thrice.x_lab.shape == (2, 18, 8, 8, 1)
  for i in range(2):
    np.testing.assert_array_equal(thrice.x_lab[i], np.tile(once.x_lab[i], (3, 1, 1, 1)))
    np.testing.assert_array_equal(thrice.y_lab[i], np.tile(tiny.dataset.y_train[[*splits[i].indices]], 3))


def test_splits_of_different_images_cannot_share_them(tiny):
  splits = [data.split_labels(tiny.dataset.y_train, 2, seed, num_images=40) for seed in range(2)]
  with pytest.raises(InputError, match="the same images"):
    data.to_device_splits(tiny.dataset, splits)
