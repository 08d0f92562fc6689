"""The same updates the way that most JAX code does them.

The step is compiled and its state donated; each batch is made on the host by a NumPy iterator; the loss is
read after every update. Convolutions and random numbers are JAX's own, not those of `gan_jax.kernels`.
"""

from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

from benchmarks import updates
from gan_jax import data, kernels
from gan_jax.types import Batch, Metrics, TrainState


class Gan:
  """One GAN in training.

  Args:
    update: what to compute.
    state: to begin with; it is given away.
    device_data: the images; they stay on the host.
    seed: of the iterator.
  """

  def __init__(
    self, update: updates.Update, state: TrainState, device_data: data.DeviceData, *, seed: int = 0
  ):
    self.state = state
    self.losses: list[float] = []
    self._batches = batches(update.rows, device_data, seed)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
      with mock.patch.multiple(kernels, conv=kernels.lax_conv, normal=jax.random.normal):
        return update.step()(state, batch)

    self._step = jax.jit(step, donate_argnums=0)

  def run(self, num: int) -> None:
    """Does `num` updates."""
    for _ in range(num):
      self.state, metrics = self._step(self.state, next(self._batches))
      self.losses.append(float(metrics["d/loss"]))

  def synchronize(self) -> None:
    """Waits for the device."""
    jax.block_until_ready(self.state)


def batches(rows: updates.Rows, device_data: data.DeviceData, seed: int) -> Iterator[Batch]:
  """Endless batches in host memory, drawn as `data.make_draw` draws them."""
  rng = np.random.default_rng(seed)
  x_lab, y_lab, x_unl = (np.asarray(a) for a in (device_data.x_lab, device_data.y_lab, device_data.x_unl))

  def images(x: np.ndarray, num: int) -> np.ndarray:
    return x[rng.integers(len(x), size=num)].astype(np.float32) / 255

  while True:
    chosen = rng.integers(len(y_lab), size=rows.lab)
    if rows.lab == len(y_lab):
      chosen = np.arange(rows.lab)
    lab = x_lab[chosen].astype(np.float32) / 255
    yield Batch(lab, y_lab[chosen], images(x_unl, rows.unl), images(x_unl, rows.fake))  # pyright: ignore[reportArgumentType]
