"""How cost grows with the number of images, classes and devices and with image size, one at a time.

python -m benchmarks.scaling
python -m benchmarks.scaling --axes pictures evaluation --pictures 1000 1000000 --name pictures
python -m benchmarks.scaling --axes sides --recipe feature_matching --sides 28 128 --name sides

The images are random bytes, 28x28, in a file in a temporary folder. Every line is measured in its own
process:

  images      training on images in memory: the file is read, the labels are split, all goes to the device
  streamed    the same, with images read from the file during training
  evaluation  a discriminator and its probe on this many test images
  pictures    a folder of PNG files, read for the first time, and again from the cache of decoded ones
  classes     training, and evaluation on 10,000 images, with ten labels per class
  sides       training at other image sizes
  memory      memory of a step over image and batch sizes, by the compiler's count
  devices     the share of each of several devices in a step, by the compiler's count
  rates       eight replicates over several devices

`start` is the time from the start of Python to the first step; `peak` the peak resident set size; `state`
and `step` the arguments and the temporary memory of the compiled program; `bytes read` the bytes that the
process requested from the system, from the first image on. The matrix rate is that of matrix products.
Below each table is its growth, the slope on logarithmic axes from each line to the next: 1 is proportional
to the axis. On CPU the devices are simulated and share the cores, so at best the rate stays constant.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from benchmarks import _recipes, _runs, _worker, step_time
from gan_jax import data, evaluate, parallel, provenance, steps, train
from gan_jax import memory as host_memory
from gan_jax.datasets import Dataset
from gan_jax.types import BatchSizes, Json

REPLICATES = 8
SIDE, CLASSES, IMAGES = 28, 10, 20_000
"""Fixed values; `IMAGES` is for the axes `classes` and `sides`."""
LABELS = 10
"""Labels per class."""


def main() -> None:
  parser = _runs.parser(__doc__, "scaling")
  add, numbers = parser.add_argument, {"type": _runs.positive, "nargs": "+"}
  add("--axes", choices=AXES, nargs="+", default=list(AXES), help="what is to grow (all)")
  add("--recipe", choices=_recipes.HPARAMS, default="conv_ssgan")
  add("--images", **numbers, default=[10_000, 100_000, 1_000_000], help="to train on, or to evaluate on")
  add("--pictures", **numbers, default=[1000, 10_000, 100_000], help="files in a folder")
  add("--classes", **numbers, default=[10, 100, 1000])
  add("--sides", **numbers, default=[28, 56, 112], help="of square images")
  add("--batch-sizes", **numbers, default=[64, 256, 1024], help="of memory")
  add("--devices", **numbers, default=[1, 2, 4, 8], help="that share a step, or replicates")
  add("--steps", type=_runs.positive, default=101, help="of training; fewer on larger images (101)")
  add("--seconds", type=_runs.seconds, default=5.0, help="of steps of the replicates (5)")
  args = parser.parse_args()
  if any(max(args.devices) % num for num in args.devices):
    parser.error("--devices must all divide the largest of them")
  if "rates" in args.axes and any(REPLICATES % num for num in args.devices):
    parser.error(f"--devices must divide the {REPLICATES} replicates")
  if max(args.classes) * LABELS > IMAGES:
    parser.error(
      f"--classes must be at most {IMAGES // LABELS}: each has {LABELS} labels out of {IMAGES:,} images"
    )
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the accelerator
  shared = {"benchmark": "scaling", "recipe": args.recipe, **provenance.environment()}
  results = []
  with tempfile.TemporaryDirectory() as folder:
    for name in args.axes:
      for line in AXES[name](args, Path(folder)):
        results.append({**shared, "axis": name, **line})
        print(json.dumps(results[-1]), flush=True)
  _runs.finish(args.name, results, table)


def apart(job: Callable[..., Json], *args: Any) -> Json:
  """Runs a job in its own process; returns its result, with the peak memory of that process."""
  with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    try:
      return pool.submit(_with_peak, job, *args).result()
    except BrokenProcessPool:
      return {"not_run": "killed, as happens where memory runs out"}


def _with_peak(job: Callable[..., Json], *args: Any) -> Json:
  return {**job(*args), "peak_mb": host_memory.peak() / 2**20}


class Meter:
  """Seconds, busy cores and bytes read since its creation."""

  def __init__(self):
    self._begin = self._now()

  def _now(self) -> tuple[float, float, int]:
    read = int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])
    return time.perf_counter(), time.process_time(), read

  @property
  def seconds(self) -> float:
    return self._now()[0] - self._begin[0]

  @property
  def cores(self) -> float:
    now, busy, _ = self._now()
    return (busy - self._begin[1]) / (now - self._begin[0])

  @property
  def read_mb(self) -> float:
    return (self._now()[2] - self._begin[2]) / 2**20


def timed(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
  """The seconds that `work` takes, and its result."""
  meter = Meter()
  found = work(*args, **kwargs)
  return meter.seconds, found


# --- Data


def image_file(folder: Path, num: int, side: int = SIDE) -> Path:
  """A file of at least `num` random images, created if needed."""
  path = folder / f"{side}.bytes"
  if not path.exists() or path.stat().st_size < num * side**2:
    path.write_bytes(np.random.default_rng(0).bytes(num * side**2))
  return path


class Rows:
  """A source of images, see `gan_jax.stream`: those of a file, each read on access."""

  def __init__(self, path: Path, num: int, side: int):
    self.shape = (num, side, side, 1)
    self._file = os.open(path, os.O_RDONLY)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), *self.shape[1:]), np.uint8)
    for image, row in zip(found, rows, strict=True):
      os.preadv(self._file, [image.data], int(row) * image.size)
    return found


def dataset_of(path: Path, num: int, side: int, num_classes: int, workers: int | None = None) -> Dataset:
  """The first `num` images of a file; with `workers`, they are streamed from it."""
  x: Any = Rows(path, num, side)
  if workers is None:
    x = np.fromfile(path, np.uint8, num * side**2).reshape(x.shape)
  none, classes = np.zeros((0, side, side, 1), np.uint8), tuple(map(str, range(num_classes)))
  return Dataset(
    "random", x, np.arange(num) % num_classes, none, np.zeros(0, int), classes, workers=workers
  )


# --- Measurements, each in its own process


def training(
  name: str, path: Path, num: int, side: int, num_classes: int, num_steps: int, workers: int | None = None
) -> Json:
  """Times a run from its images to its last step, with the compiler's count of its program."""
  if workers is not None:
    importlib.import_module("grain")  # otherwise its files count as bytes read
  meter = Meter()
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update("jax_compilation_cache_dir", folder)  # the program is inspected after it has run
    dataset = dataset_of(path, num, side, num_classes, workers)
    found: Json = {"seconds_read": meter.seconds}
    held_out = min(1000, num // 20)
    found["seconds_split"], split = timed(
      data.split_labels, dataset.y_train, LABELS, 0, num_held_out=held_out
    )
    found["seconds_put"], images = timed(lambda: jax.block_until_ready(data.to_device(dataset, split)))
    recipe = dataclasses.replace(_recipes.make(name, dataset), num_steps=num_steps)
    fit = train.fit(recipe, images, jax.random.key(0), verbose=False)
    assert fit.first_step_at is not None
    found |= {
      "seconds_start": fit.first_step_at - psutil.Process().create_time(),
      "seconds_compile": fit.seconds_compile,
      "seconds_per_step": fit.seconds_train / num_steps,
      "waits": fit.seconds_idle / fit.seconds_train,
      "read_mb": meter.read_mb,
    }
    if workers is None:
      ours = _worker.Ours(recipe, *jax.eval_shape(lambda: (fit.state, images)))
      found |= counts(ours.compiled, ours.flops())
      found["matrix_share"] = found["mflop"] * 1e6 / found["seconds_per_step"] / _worker.matmul_rate()
  return found


def counts(compiled: Any, flops: float) -> Json:
  """Memory of the program of a step, by the compiler's count, and the operations of the step."""
  memory = compiled.memory_analysis()
  return {
    "state_mb": memory.argument_size_in_bytes / 2**20,
    "step_mb": memory.temp_size_in_bytes / 2**20,
    "mflop": flops / 1e6,
  }


def evaluation(name: str, path: Path, num: int, num_classes: int) -> Json:
  """Times the error, probe and confusion matrix of a discriminator on `num` test images."""
  dataset = dataset_of(path, max(IMAGES, num), SIDE, num_classes)
  recipe, x = _recipes.make(name, dataset), dataset.x_train
  split = data.split_labels(dataset.y_train, LABELS, 0)
  state = recipe.init_state(jax.random.key(0), data.DeviceData.from_arrays(x[:500], np.zeros(500), x[:500]))
  labelled, compiling = list(split.indices), []
  listen = lambda event, secs, **_: compiling.append(secs if "backend_compile" in event else 0)
  jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore[reportArgumentType]
  tested = dataclasses.replace(dataset, x_test=x[:num], y_test=dataset.y_train[:num])
  meter = Meter()
  (found,) = evaluate.make_evaluate(recipe)(tested, [state], [(x[labelled], dataset.y_train[labelled])])
  evaluate.describe(found, dataset.class_names)
  seconds, seconds_compile = meter.seconds, sum(compiling)
  one = jax.ShapeDtypeStruct((1, *x.shape[1:]), np.float32)
  flops = provenance.flops(steps.make_classifier(recipe.d), state, one)
  share = num * flops / (seconds - seconds_compile) / _worker.matmul_rate()
  return {"seconds": seconds, "seconds_compile": seconds_compile, "matrix_share": share}


def make_pictures(root: Path, num: int) -> Json:
  """Makes a folder of `num` PNG files in ten classes; their content repeats every thousand files."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for k in range(CLASSES):
    (root / str(k)).mkdir(parents=True)
  for i in range(num):
    path = root / str(i % CLASSES) / f"{i:07}.png"
    if i < 1000:
      Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(path)
    else:
      os.link(root / str(i % CLASSES) / f"{i % 1000:07}.png", path)
  return {}


def pictures(root: Path) -> Json:
  """Times reading a folder: decoded the first time, then from the cache."""
  from gan_jax.pictures import load_folder

  os.environ["XDG_CACHE_HOME"], meter = str(root.parent / "cache"), Meter()
  load_folder(root)
  return {"seconds": meter.seconds, "cores": meter.cores, "read_mb": meter.read_mb}


def memory(name: str, side: int, batch_size: int) -> Json:
  """Memory of the compiled step, by the compiler's count."""
  dataset = _recipes.random_images(side)
  recipe = _recipes.make(name, dataset, batch_size)
  state, images = jax.eval_shape(lambda: _recipes.start(recipe, dataset, [0]))
  ours = _worker.Ours(recipe, state, images)
  return {"rows": list(recipe.batch), **counts(ours.compiled, ours.flops())}


def shared_step(name: str, num: int, multiple: int) -> Json:
  """Operations and memory of each of `num` devices in one shared step, by the compiler's count.

  The batch is rounded up to a multiple of the largest number of devices.
  """
  jax.config.update("jax_num_cpu_devices", multiple)  # no effect on accelerators
  devices = jax.devices()
  if num > len(devices):
    return {"not_run": f"there are {len(devices)} devices"}
  dataset = _recipes.random_images(SIDE)
  recipe = _recipes.make(name, dataset)
  sizes = BatchSizes(*(-(-size // multiple) * multiple for size in recipe.batch))
  recipe = parallel.over_devices(dataclasses.replace(recipe, batch=sizes), devices[:num])
  arguments = parallel.replicated(_recipes.start(recipe, dataset, [0]), devices[:num])
  compiled = jax.jit(recipe.make_multi_step(1)).lower(*arguments, np.int32(0)).compile()
  cost: Any = compiled.cost_analysis()  # on accelerators without what library calls do
  return {"rows": list(sizes), **counts(compiled, cost["flops"])}


def rate(name: str, num: int, seconds: float) -> Json:
  """Steps per second of all replicates together, on `num` devices."""
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num)))).split(",")
  env = {"JAX_NUM_CPU_DEVICES": str(num), "CUDA_VISIBLE_DEVICES": ",".join(visible[:num])}
  task = {"contender": "ours", "recipe": name, "replicates": REPLICATES, "random_side": SIDE}
  entry = step_time.Entry("ours", REPLICATES)
  try:
    entry.worker = step_time.Worker(task, env=env)
    entry.found |= entry.worker.ready
    if entry.found["num_devices"] < num:
      return {"not_run": f"there are {entry.found['num_devices']} devices"}
    step_time.run(entry, seconds)
  except step_time.WorkerError as error:
    return {"not_run": str(error)}
  finally:
    entry.close()
  return {"per_second": REPLICATES * entry.rates[0]}


# --- Axes: lines, each with its position on the axis, `at`


def _images(args: argparse.Namespace, folder: Path, workers: int | None = None) -> Iterator[Json]:
  path = image_file(folder, max(args.images))
  for num in args.images:
    yield {"at": num, **apart(training, args.recipe, path, num, SIDE, CLASSES, args.steps, workers)}


def _streamed(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  yield from _images(args, folder, workers=2)


def _evaluation(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  path = image_file(folder, max(IMAGES, *args.images))
  for num in args.images:
    yield {"at": num, **apart(evaluation, args.recipe, path, num, CLASSES)}


def _pictures(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  roots = {num: folder / f"{num}" for num in args.pictures}
  for num, root in roots.items():
    apart(make_pictures, root, num)
  for time_ in ("first", "second"):
    for num, root in roots.items():
      yield {"part": f"{time_} time", "at": num, **apart(pictures, root)}


def _classes(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  path = image_file(folder, IMAGES)
  for num in args.classes:
    found = apart(training, args.recipe, path, IMAGES, SIDE, num, args.steps)
    yield {"part": "training", "at": num, **found}
  for num in args.classes:
    yield {"part": "evaluation", "at": num, **apart(evaluation, args.recipe, path, IMAGES // 2, num)}


def _sides(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  for side in args.sides:
    path, num_steps = image_file(folder, IMAGES, side), max(2, args.steps * SIDE**2 // max(SIDE, side) ** 2)
    yield {"at": side, **apart(training, args.recipe, path, IMAGES, side, CLASSES, num_steps)}


def _memory(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  del folder
  for side, size in itertools.product(args.sides, args.batch_sizes):
    yield {"part": f"{side}x{side}", "at": size, **apart(memory, args.recipe, side, size)}


def _devices(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  del folder
  for num in args.devices:
    yield {"at": num, **apart(shared_step, args.recipe, num, max(args.devices))}


def _rates(args: argparse.Namespace, folder: Path) -> Iterator[Json]:
  del folder
  for num in args.devices:
    yield {"at": num, **rate(args.recipe, num, args.seconds)}


AXES: dict[str, Callable[[argparse.Namespace, Path], Iterator[Json]]] = {
  "images": _images,
  "streamed": _streamed,
  "evaluation": _evaluation,
  "pictures": _pictures,
  "classes": _classes,
  "sides": _sides,
  "memory": _memory,
  "devices": _devices,
  "rates": _rates,
}


# --- Table

TITLES = {
  "images": ("Training images in memory", "images"),
  "streamed": ("Training images that are streamed", "images"),
  "evaluation": ("Evaluation", "test images"),
  "pictures": ("A folder of pictures", "files"),
  "classes": ("Classes", "classes"),
  "sides": ("Size of the images", "side"),
  "memory": ("Memory of a step", "unlabelled rows"),
  "devices": ("Devices that share a step", "devices"),
  "rates": (f"{REPLICATES} replicates on several devices", "devices"),
}
COLUMNS: dict[str, tuple[str, str]] = {
  "seconds_read": ("reading", "{:.2f} s"),
  "seconds_split": ("splitting", "{:.2f} s"),
  "seconds_put": ("to the device", "{:.2f} s"),
  "seconds_compile": ("compiling", "{:.1f} s"),
  "seconds_start": ("start", "{:.1f} s"),
  "seconds_per_step": ("a step", "{:.3f} s"),
  "seconds": ("time", "{:.2f} s"),
  "per_second": ("steps/s together", "{:.1f}"),
  "peak_mb": ("peak", "{:,.0f} MB"),
  "state_mb": ("state", "{:,.0f} MB"),
  "step_mb": ("step", "{:,.0f} MB"),
  "mflop": ("MFLOP a step", "{:,.0f}"),
  "read_mb": ("bytes read", "{:,.0f} MB"),
}


def table(results: Sequence[Json]) -> str:
  """Markdown: one table per axis and part, with its lines and their growth."""
  tables = []
  for axis, part in dict.fromkeys((line["axis"], line.get("part")) for line in results):
    rows = [line for line in results if (line["axis"], line.get("part")) == (axis, part)]
    (title, at), columns = TITLES[axis], [key for key in COLUMNS if any(key in row for row in rows)]
    if axis in ("memory", "devices"):  # nothing runs: the peak is the compiler's
      columns = [key for key in columns if key != "peak_mb"]
    cell = lambda row, key: COLUMNS[key][1].format(row[key]) if key in row else ""
    lines = [[f"{row['at']:,}", *(cell(row, key) for key in columns), bound(row)] for row in rows]
    if len(rows) > 1:
      lines.append(["*growth*", *(growth(rows, key) for key in columns), ""])
    if not any(line[-1] for line in lines):
      lines = [line[:-1] for line in lines]
    head = [at, *(COLUMNS[key][0] for key in columns), "bound by"][: len(lines[0])]
    tables.append(f"**{title}{f', {part}' if part else ''}**\n\n{_runs.markdown(head, lines)}")
  return _runs.with_environment("\n\n".join(tables), results, f"{results[0]['recipe']}.")


def growth(rows: Sequence[Json], key: str) -> str:
  """Slopes on logarithmic axes between neighbours, unless one is too small to distinguish from zero."""
  slopes, least = [], 0.02 if key.startswith("seconds") else 0.5
  for a, b in itertools.pairwise(rows):
    if min(a.get(key, 0), b.get(key, 0)) >= least:
      slopes.append(f"{round(math.log(b[key] / a[key]) / math.log(b['at'] / a['at']), 1) + 0:.1f}")
  return _runs.listed(slopes)


def bound(row: Json) -> str:
  """The bottleneck that the numbers of a line show."""
  if "not_run" in row:
    return f"not run: {row['not_run']}"
  if row.get("waits", 0) > 0.1:
    return f"reading: the device waits {100 * row['waits']:.0f} % of the time"
  if row.get("seconds_compile", 0) > 0.5 * row.get("seconds", math.inf):
    return f"compiling: {100 * row['seconds_compile'] / row['seconds']:.0f} % of the time"
  if row.get("matrix_share", 0) > 0.1:
    return f"arithmetic, at {100 * row['matrix_share']:.0f} % of the matrix rate"
  if "waits" in row:
    return f"the steps: the device waits for images {100 * row['waits']:.0f} % of the time"
  if row.get("cores", 0) > 0.8:
    return f"processors: {row['cores']:.1f} cores busy"
  return ""


if __name__ == "__main__":
  _runs.cli(main)
