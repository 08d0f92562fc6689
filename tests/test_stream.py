import dataclasses
import os
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest
from conftest import Tiny, leaves_equal, make_builder
from PIL import Image

from gan_jax import checkpoint, cli, data, datasets, memory, output, steps, stream, train
from gan_jax.types import BatchSizes, InputError


def fit(tiny, images, num_steps=9, **kwargs):
  kwargs = {"phase": "main", "steps_per_dispatch": 4, "checkpoint_every": 4, "verbose": False, **kwargs}
  return train.fit(tiny.recipe(num_steps), images, jax.random.key(0), **kwargs)


def streamed(tiny, source, workers):
  dataset = dataclasses.replace(tiny.dataset, x_train=source, workers=workers)
  return data.to_device(dataset, tiny.split, exclude_labelled=True)


class Source:
  """Images of an array; `at(n)` is called before the n-th read, from 0 on."""

  def __init__(self, x, at=lambda n: None):
    self.x, self.shape, self.at, self.reads = x, x.shape, at, 0

  def __len__(self):
    return len(self.x)

  def __getitem__(self, rows):
    if len(rows) in (12, 16):  # a step's batch, without and with its labelled images
      self.reads += 1
      self.at(self.reads - 1)
    return self.x[rows]


def no_threads():
  """Whether all reading threads have ended, or do so within seconds."""
  for _ in range(100):
    if not any(thread.name.startswith("grain") for thread in threading.enumerate()):
      return True
    time.sleep(0.05)
  return False


def test_a_streamed_run_stopped_and_resumed_is_the_run_in_memory(tmp_path, monkeypatch):
  """The same draws give the same losses bit for bit.

  Also in dispatches of other sizes, with other threads, and if labelled images are streamed too; an
  unreadable image is reported in one sentence, and the steps before it are saved.
  """

  def fail(n):
    if n >= 6:
      raise InputError("cat/3.png cannot be decoded (broken): repair or replace it")

  tiny, there = Tiny(network="mlp"), tmp_path / "stream"
  in_memory = data.to_device(tiny.dataset, tiny.split, exclude_labelled=True)
  expected = fit(tiny, in_memory, workdir=tmp_path, checkpoint_every=None, steps_per_dispatch=1)
  begin = tiny.recipe().init_state(jax.random.key(0), in_memory)
  monkeypatch.setattr(stream, "DISPATCH_BYTES", 3 * 16 * 64)  # three steps
  monkeypatch.setattr(data, "NUM_SPACED", 5)  # the others can only come from the source
  images = streamed(tiny, Source(tiny.dataset.x_train, fail), workers=2)
  assert len(images.x_lab) == len(images.x_unl) == 5 < len(in_memory.x_lab) == len(images.y_lab)
  with pytest.raises(
    InputError, match=r"^cat/3.png .*repair or replace it; step \d is saved, and --resume continues"
  ) as error:
    fit(tiny, images, workdir=there, start=lambda _: begin)
  assert no_threads()
  with checkpoint.Checkpoints(there / "checkpoints") as checkpoints:
    step = checkpoints.latest_step
  assert 0 < step < 9
  assert f"step {step} is saved" in str(error.value)
  images = streamed(tiny, Source(tiny.dataset.x_train), workers=0)
  last = fit(tiny, images, workdir=there, resume=True)
  assert all(leaves_equal(last.state, expected.state))
  assert images.stream.source.reads == 9 - step  # what was drawn before is not read again
  losses = {row["step"]: row["d/loss"] for row in output.read_rows(tmp_path / "metrics.jsonl")}
  rows, before = output.read_rows(there / "metrics.jsonl"), 0
  for row in rows:
    mean = np.mean([losses[i] for i in range(before + 1, row["step"] + 1)])
    np.testing.assert_allclose(row["d/loss"], mean, rtol=1e-6)
    before = row["step"]
  assert before == 9


START = types.SimpleNamespace(step=0, key=jax.random.key(0))
"""The part of a state that a stream needs."""


def test_ctrl_c_while_images_are_awaited_ends_the_threads(tiny):
  def slow(n):
    if n == 1:
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.2)

  images = streamed(tiny, Source(tiny.dataset.x_train, slow), workers=2)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with (
      pytest.raises(KeyboardInterrupt),
      stream.Dispatches(images, tiny.sizes, START, num_steps=99, max_steps=50) as dispatches,
    ):
      dispatches.take(50, jax.numpy.zeros(()))
  finally:
    signal.signal(signal.SIGINT, before)
  assert no_threads()
  assert images.stream.source.reads < 99


@pytest.mark.parametrize(
  ("sizes", "first", "read"), [((4, 6, 6), 500, 12), ((4, 0, 0), 5, 4), ((6, 2, 0), 5, 8)]
)
def test_devices_share_streamed_images(sizes, first, read, tiny, monkeypatch):
  """Few labelled images are on the devices, many are streamed, also alone and as a whole set."""
  monkeypatch.setattr(data, "NUM_SPACED", first)
  images, sizes = streamed(tiny, tiny.dataset.x_train, workers=1), BatchSizes(*sizes)
  devices = jax.devices()[:2]
  given = stream.Dispatches(images, sizes, START, num_steps=3, max_steps=3, devices=devices)
  with given:
    drawn = given.take(2, jax.numpy.zeros(()))
  assert drawn.x_steps.sharding == given.abstract.x_steps.sharding
  shards = [(shard.device, shard.data.shape[1]) for shard in drawn.x_steps.addressable_shards]
  assert shards == [(device, read // 2) for device in devices]
  x = data.make_sample_batch(sizes)
  in_memory = data.to_device(tiny.dataset, tiny.split, exclude_labelled=True)
  key, _ = steps.step_keys(START.key, 1)
  drawn = jax.device_put(drawn, jax.devices()[0])
  assert all(leaves_equal(x(key, drawn, 1), x(key, in_memory)))


# --- Where images come from


@pytest.mark.parametrize("image_size", [None, 6])
def test_a_folder_streamed_is_the_folder_in_memory(tmp_path, image_size):
  """Grey pictures stored in colour are read as grey, and a picture without a header is left out."""
  rng, root = np.random.default_rng(0), tmp_path / "pets"
  for i in range(202):
    path = root / "train" / ("cat", "dog")[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = rng.integers(0, 255, (8, 8, 1), np.uint8).repeat(3, axis=-1)
    Image.fromarray(grey).save(path)
  (root / "train" / "cat" / "4.png").write_bytes(b"no picture")
  load = lambda choice: datasets.load(f"folder:{root}", image_size=image_size, stream=choice)
  expected, found = load("no"), load("yes")
  assert (expected.workers, found.workers) == (None, 2)
  assert found.x_train.shape == expected.x_train.shape == (201, *[image_size or 8] * 2, 1)
  rows = np.array([200, 3, 3, 100])
  np.testing.assert_array_equal(found.x_train[rows], expected.x_train[rows])
  same = ("name", "note", "reader", "class_names", "image_shape")
  assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
  splits = [data.split_labels(each.y_train, 5, seed=1) for each in (found, expected)]
  assert splits[0] == splits[1]
  broken = root / "train" / "cat" / "0.png"
  broken.write_bytes(broken.read_bytes()[:60])
  with pytest.raises(InputError, match=r"cat/0.png cannot be decoded .*: repair or replace it"):
    found.x_train[np.array([0])]
  Image.fromarray(np.zeros((9, 8), np.uint8)).save(broken)
  if image_size is None:
    with pytest.raises(InputError, match=r"cat/0.png is 9x8x1, but the others are 8x8x1"):
      found.x_train[np.array([0])]


@pytest.mark.filterwarnings("default")  # tfds's own
def test_records_streamed_are_the_records_in_memory(tmp_path):
  of = lambda n: np.random.default_rng(n).integers(0, 255, (n, 12, 10, 3), np.uint8)
  Birds = make_builder("Birds", {"train": of(12), "test": of(4)})
  Birds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  load = lambda **kwargs: datasets.load("birds", data_dir=str(tmp_path), **kwargs)
  rows = np.array([11, 0, 0, 5])
  for size in (None, 8):
    expected = load(image_size=size)
    for _ in range(2):  # the second time from the stored labels
      found = load(image_size=size, stream="yes", workers=3)
      assert (found.workers, found.x_train.shape) == (3, expected.x_train.shape)
      np.testing.assert_array_equal(found.x_train[rows], expected.x_train[rows])
      for name in ("y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  assert len(found.x_train[rows[:0]]) == 0


class Busy:
  """The result of a dispatch that takes this long from now on."""

  def __init__(self, seconds):
    self._end = time.monotonic() + seconds

  def block_until_ready(self):
    time.sleep(max(0, self._end - time.monotonic()))


def test_the_device_is_idle_from_the_end_of_its_work_until_the_images_are_there():
  """One step a dispatch, so that the wait for its images has begun while the device was busy."""
  tiny = Tiny(network="mlp")
  images = streamed(tiny, Source(tiny.dataset.x_train, lambda n: time.sleep(0.5)), workers=0)
  state = tiny.recipe().init_state(jax.random.key(0), images)
  with stream.Dispatches(images, tiny.recipe().batch, state, num_steps=9, max_steps=1) as dispatches:
    dispatches.take(1, Busy(0))  # draws the rows of all steps
    idle = [dispatches.seconds_idle]
    for seconds in (0, 0.3, 2):
      dispatches.take(1, Busy(seconds))
      idle.append(dispatches.seconds_idle)
  waits = np.diff(idle)
  assert waits[0] > 0.45
  assert 0.1 < waits[1] < waits[0] - 0.15
  assert waits[2] == 0


def test_auto_streams_what_does_not_fit_and_says_so(monkeypatch, capsys):
  free = lambda num: monkeypatch.setattr(
    "psutil.virtual_memory", lambda: types.SimpleNamespace(available=num)
  )
  free(3 * 1198 * 64)  # beside the images, which are there already
  assert datasets.load("digits", stream="auto").workers is None
  free(3 * 1198 * 64 - 4)
  assert datasets.load("digits", stream="auto").workers == 2
  said = "1,198 training images take 0.0 GB, more than 25% of the free memory (0.0 GB): they are read"
  assert capsys.readouterr().err.startswith(said)
  assert datasets.load("digits", stream="no").workers is None


def test_devices_with_memory_of_their_own_limit_a_batch(tiny, monkeypatch):
  """The sum of those that share it; CPUs have the host's."""
  device = lambda num: types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": num}, process_index=0)
  assert memory.of_devices([device(100), device(20)]) == 120
  assert memory.of_devices(jax.devices()[:2]) is None
  monkeypatch.setattr(jax, "devices", lambda: [device(100)])
  with pytest.raises(InputError, match="16 images of 8x8 take"):
    cli.devices(1, tiny.recipe())


def test_a_container_has_less_memory_than_the_machine(monkeypatch, tmp_path):
  monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=1000))
  monkeypatch.setattr(memory, "CGROUP", tmp_path)
  assert memory.free() == 1000
  for name, text in (("current", "700"), ("stat", "anon 500\ninactive_file 150"), ("max", "max")):
    (tmp_path / f"memory.{name}").write_text(f"{text}\n")
  assert memory.free() == 1000  # without a limit
  (tmp_path / "memory.max").write_text("800\n")
  assert memory.free() == 250
