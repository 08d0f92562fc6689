"""Training images that do not fit in memory: read from disk during training, ahead of the steps.

The images of a step are a function of the run's key and the step, `data.draw_rows`, the same as in memory.
The step is therefore the position in the stream: a run resumes bit for bit from any step, no stream state
is saved, and a streamed run equals the run in memory. Grain reads and decodes ahead in threads.

The images come from a `types.ImageSource`, which several threads read concurrently.
"""

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from gan_jax import data, parallel, steps
from gan_jax.types import BatchSizes, InputError, TrainState

DISPATCH_BYTES = 2**26
"""Most bytes of images per dispatch. Two dispatches at a time are on the device, and two on the host."""
_BLOCK = 1000  # steps whose rows are drawn together


class Dispatches:
  """The data of successive dispatches; if it is streamed, the next is read while one runs.

  A context manager: leaving it ends the threads.
  """

  def __init__(
    self,
    images: data.DeviceData,
    sizes: BatchSizes,
    state: TrainState,
    *,
    num_steps: int,
    max_steps: int,
    devices: Sequence[Any] = (),
  ):
    """Starts reading.

    Args:
      images: the images on the device, and the stream of the others, if there is one.
      sizes: batch sizes.
      state: the state that training starts or resumes from.
      num_steps: the last step of training.
      max_steps: the most steps in one dispatch.
      devices: devices that share each step. Each gets its part of the images, and each process reads those
        of its own devices.
    """
    self.max_steps = max_steps
    """The most steps in one dispatch: fewer if their images would take more than `DISPATCH_BYTES`."""
    self.abstract = images
    """The data to compile a step for, or its shapes."""
    self.seconds_idle = 0.0
    """Time spent waiting for images while the device was idle."""
    self._images, self._batches = images, None
    stream = images.stream
    num = 0 if stream is None else sum(stream.counts(sizes))
    if stream is None or not num:
      return
    import grain  # imported late: it takes most of a second

    shape = (num, *stream.source.shape[1:])
    self.max_steps = max(1, min(max_steps, DISPATCH_BYTES // math.prod(shape)))
    self._sharding = parallel.sharding_of_steps(devices)
    x_steps = jax.ShapeDtypeStruct((self.max_steps, *shape), np.uint8, sharding=self._sharding)
    self.abstract = images.replace(x_steps=x_steps)
    here = parallel.rows_here(self._sharding, x_steps.shape)
    self._shape = (self.max_steps, len(here), *shape[1:])
    draws = _Draws(stream, sizes, state, num_steps, here)
    ahead = self.max_steps + stream.workers if stream.workers else 0
    options = grain.ReadOptions(num_threads=stream.workers, prefetch_buffer_size=ahead)
    self._batches = iter(
      grain.MapDataset.source(draws).map(stream.source.__getitem__).to_iter_dataset(options)
    )
    self._batches.start_prefetch()

  def __enter__(self) -> "Dispatches":
    return self

  def __exit__(self, *_) -> None:
    if self._batches is not None:
      self._batches.close()

  def take(self, num: int, running: Any) -> data.DeviceData:
    """The data of the next `num` steps.

    Args:
      num: at most `max_steps`.
      running: a result of the previous dispatch. Until it is ready, the device is busy.

    Raises:
      InputError: an image cannot be read.
    """
    if self._batches is None:
      return self._images
    ready_at: list[float] = []

    def watch() -> None:
      with contextlib.suppress(RuntimeError):  # the next dispatch may have taken its memory
        jax.block_until_ready(running)
      ready_at.append(time.perf_counter())

    threading.Thread(target=watch, daemon=True).start()
    begin, x = time.perf_counter(), np.zeros(self._shape, np.uint8)
    for i in range(num):
      x[i] = next(self._batches)
    if ready_at:
      self.seconds_idle += time.perf_counter() - max(begin, ready_at[0])
    return self._images.replace(x_steps=jax.make_array_from_process_local_data(self._sharding, x))


class _Draws:
  """Source rows of each step from the state's to the last, at the positions `here` of its batch."""

  def __init__(
    self, stream: data.Stream, sizes: BatchSizes, state: TrainState, num_steps: int, here: np.ndarray
  ):
    self._first, self._num_steps = int(state.step), num_steps
    if stream.labelled is not None and str(jax.random.key_impl(state.key)) != "threefry2x32":
      raise InputError(
        "streamed labels need threefry2x32 keys, which give the same numbers on the host and the device:"
        " unset JAX_DEFAULT_PRNG_IMPL, or pass --stream no"
      )
    key_data: Any
    key_data, impl = np.asarray(jax.random.key_data(state.key)), jax.random.key_impl(state.key)
    labelled = np.zeros(0, int) if stream.labelled is None else stream.labelled
    ends = np.cumsum(stream.counts(sizes))[:1]

    @jax.jit
    @jax.vmap
    def draw(step: Array) -> Array:
      key, _ = steps.step_keys(jax.random.wrap_key_data(key_data, impl=impl), step)
      lab, *others = data.draw_rows(key, sizes, len(labelled), len(stream.rows))
      return jax.numpy.concatenate([lab[: ends[0]], *others])

    device = None
    with contextlib.suppress(RuntimeError):  # JAX may have no CPU backend
      device = jax.local_devices(backend="cpu")[0]

    @lru_cache(maxsize=2)
    def block(i: int) -> np.ndarray:
      with jax.default_device(device):
        drawn = np.asarray(draw(np.arange(i * _BLOCK, (i + 1) * _BLOCK, dtype=np.int32)))
        lab, unl = np.split(drawn, ends, axis=1)
        return np.concatenate([labelled[lab], stream.rows[unl]], axis=1)[:, here]

    self._block = block

  def __len__(self) -> int:
    return self._num_steps - self._first

  def __getitem__(self, index: int) -> Int[np.ndarray, "b"]:
    i, row = divmod(self._first + index, _BLOCK)
    return self._block(i)[row]
