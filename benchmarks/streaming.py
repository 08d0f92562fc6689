"""Streaming training images from disk: memory over ten epochs, device idle time, cost of reading.

python -m benchmarks.streaming
python -m benchmarks.streaming --budget-mb 16 --steps 50 --widths 16 --data-dir build/streaming

The images are random colour JPEGs of 64x64 in an array_record file; decoded, they take ten times the memory
budget. `rate`: images per second when nothing else is computed, by number of reading threads. `wait`: the
fraction of time that the device waits for images, by threads and network width; `in_memory` is the rate of
the same steps on images in memory. `memory`: the peak memory of the process (resident set) in each of ten
epochs, and its memory before the first.
"""

import dataclasses
import functools
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import psutil

from benchmarks import _runs
from gan_jax import data, datasets, networks, objectives, provenance, recipes, stream, train
from gan_jax.datasets import Dataset
from gan_jax.recipes import Recipe
from gan_jax.types import BatchSizes

SIZES = BatchSizes(labelled=32, unlabelled=64, generated=64)
READ = SIZES.unlabelled + SIZES.generated
"""Images read per step."""
SHAPE = (64, 64, 3)
EPOCHS = 10


def main() -> None:
  parser = _runs.parser(__doc__, "streaming")
  add = parser.add_argument
  add("--budget-mb", type=_runs.positive, default=256, help="a tenth of the decoded images (256)")
  add("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of threads that read")
  add("--widths", type=_runs.positive, nargs="+", default=[16, 128, 512], help="of the networks")
  add("--steps", type=_runs.positive, default=200, help="of each run that is timed (200)")
  add("--seconds", type=_runs.seconds, default=20.0, help="of reading alone, a number of threads (20)")
  add("--data-dir", help="keep the images there (default: a temporary folder)")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    data_dir = args.data_dir or folder
    num = EPOCHS * args.budget_mb * 2**20 // int(np.prod(SHAPE))
    make_images(data_dir, num)
    dataset = datasets.load("random_pictures", data_dir=data_dir, stream="yes", workers=max(args.workers))
    shared = {
      "benchmark": "streaming",
      "num_images": len(dataset.x_train),
      "decoded_mb": round(len(dataset.x_train) * np.prod(SHAPE) / 2**20),
      **provenance.environment(),
    }
    jobs: list[Callable[[], list[dict]]] = [functools.partial(memory, dataset, args.widths[-1])]
    jobs += [functools.partial(rate, with_workers(dataset, num), args.seconds) for num in args.workers]
    jobs += [functools.partial(waits, dataset, width, args.workers, args.steps) for width in args.widths]
    results = []
    for job in jobs:
      for found in job():
        results.append({**shared, **found})
        print(json.dumps(results[-1]), flush=True)
  _runs.finish(args.name, results, table)


def make_images(data_dir: str, num: int) -> None:
  """Prepares the dataset `random_pictures` in `data_dir`, unless it exists; without TensorFlow."""
  import tensorflow_datasets as tfds
  from PIL import Image

  class RandomPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      image = tfds.features.Image(shape=SHAPE, encoding_format="jpeg")
      features = tfds.features.FeaturesDict(
        {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      del dl_manager
      return {"train": self._generate_examples(num, 0), "test": self._generate_examples(100, 1)}

    def _generate_examples(self, num, seed):  # pyright: ignore
      rng = np.random.default_rng(seed)
      for i in range(num):
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize(SHAPE[:2])
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=90)
        encoded.seek(0)
        yield i, {"image": encoded, "label": i % 10}

  tfds.disable_progress_bar()
  Path(data_dir).mkdir(parents=True, exist_ok=True)
  RandomPictures(data_dir=data_dir, file_format="array_record").download_and_prepare()


def with_workers(dataset: Dataset, num: int) -> Dataset:
  return dataclasses.replace(dataset, workers=num)


def make_recipe(width: int, num_steps: int) -> Recipe:
  """A small recipe, so that reading dominates; wider networks compute longer."""
  tx = optax.adam(1e-4)
  return recipes.Recipe(
    g=networks.MLPGenerator(SHAPE, widths=(width,), latent_size=16),
    d=networks.MLPDiscriminator(10, widths=(width, 32)),
    g_tx=tx,
    d_tx=tx,
    objective=objectives.semi_supervised_gan(),
    batch=SIZES,
    num_steps=num_steps,
    ema_decay=0.999,
    augment=None,
    image_shape=SHAPE,
    num_classes=10,
    family="ssgan",
    hparams=recipes.ssgan.Hparams(),
  )


def on_device(dataset: Dataset) -> data.DeviceData:
  return data.to_device(dataset, data.split_labels(dataset.y_train, 10, seed=0))


def fit(width: int, images: data.DeviceData, num_steps: int, **kwargs: Any) -> dict:
  """Trains; returns the speed and the fraction of time that the device waited."""
  done = train.fit(make_recipe(width, num_steps), images, jax.random.key(0), verbose=False, **kwargs)
  return {
    "width": width,
    "images_per_second": round(num_steps * READ / done.seconds_train, 1),
    "waits": round(done.seconds_idle / done.seconds_train, 4),
  }


def memory(dataset: Dataset, width: int) -> list[dict]:
  """Memory over ten epochs: reads ten times the number of training images."""
  process, held, most = psutil.Process(), [], [0]
  num_steps = EPOCHS * max(10, len(dataset.x_train) // READ // 10 * 10)
  images, over = on_device(dataset), threading.Event()
  before = process.memory_info().rss

  def watch() -> None:
    while not over.wait(0.1):
      most[0] = max(most[0], process.memory_info().rss)

  def epoch(_: Any) -> None:
    held.append(round(most[0] / 2**20))
    most[0] = 0

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    found = fit(width, images, num_steps, snapshot=epoch)
  finally:
    over.set()
    watcher.join()
  workers = dataset.workers
  return [{"what": "memory", "workers": workers, "before_mb": round(before / 2**20), "mb": held, **found}]


def rate(dataset: Dataset, seconds: float) -> list[dict]:
  """Speed of reading alone."""
  images = on_device(dataset)
  recipe = make_recipe(8, 10**6)
  state = recipe.init_state(jax.random.key(0), images)
  with stream.Dispatches(images, SIZES, state, num_steps=10**6, max_steps=10) as dispatches:
    dispatches.take(10, state.step)
    begin, num = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
      dispatches.take(10, state.step)
      num += 10 * READ
    taken = time.perf_counter() - begin
  return [{"what": "rate", "workers": dataset.workers, "images_per_second": round(num / taken, 1)}]


def waits(dataset: Dataset, width: int, workers: Sequence[int], num_steps: int) -> list[dict]:
  """The same steps on images in memory and on streamed images."""
  few = np.arange(min(2000, len(dataset.x_train)))
  held = dataclasses.replace(
    dataset, x_train=dataset.x_train[few], y_train=dataset.y_train[few], workers=None
  )
  in_memory = fit(width, on_device(held), num_steps)["images_per_second"]
  return [
    {
      "what": "wait",
      "workers": num,
      "in_memory": in_memory,
      **fit(width, on_device(with_workers(dataset, num)), num_steps),
    }
    for num in workers
  ]


def table(results: Sequence[dict]) -> str:
  """Markdown: reading alone, waiting, memory."""
  of = lambda what: [line for line in results if line["what"] == what]
  count, share = "{:,.0f}".format, "{:.1%}".format
  rates = [(line["workers"], count(line["images_per_second"])) for line in of("rate")]
  waits = [
    (line["width"], line["workers"], *map(count, (line["in_memory"], line["images_per_second"])))
    for line in of("wait")
  ]
  waits = [(*cells, share(line["waits"])) for cells, line in zip(waits, of("wait"), strict=True)]
  held = [(line["before_mb"], _runs.listed(line["mb"]), share(line["waits"])) for line in of("memory")]
  first = results[0]
  tables = [
    _runs.markdown(("threads", "images/s, reading alone"), rates),
    _runs.markdown(("width", "threads", "images/s in memory", "streamed", "the device waits"), waits),
    _runs.markdown(("MB before", "most in each of ten epochs", "the device waits"), held),
  ]
  note = f"{first['num_images']:,} images, {first['decoded_mb']:,} MB decoded."
  return _runs.with_environment("\n\n".join(tables), results, note)


if __name__ == "__main__":
  _runs.cli(main)
