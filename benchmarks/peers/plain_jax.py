"""The same steps, written as in most JAX code.

The step is compiled and its state donated; each batch is made on the host by a NumPy iterator; the loss is
read after every step. Convolutions, layer normalisation and random numbers are JAX's own, see
`gan_jax.kernels.stock`.
"""

from collections.abc import Iterator

import jax
import numpy as np

from gan_jax import kernels
from gan_jax.data import DeviceData
from gan_jax.recipes import Recipe
from gan_jax.types import Batch, BatchSizes, Metrics, TrainState


class Gan:
  """One GAN in training.

  Args:
    recipe: what to compute.
    state: the initial state; it is donated.
    images: the training set; it stays on the host.
    seed: seed of the iterator.
  """

  def __init__(self, recipe: Recipe, state: TrainState, images: DeviceData, *, seed: int = 0):
    self.state = state
    self.losses: list[float] = []
    self._batches = batches(recipe.batch, images, seed)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
      with kernels.stock(True):
        return recipe.make_step()(state, batch)

    self._step = jax.jit(step, donate_argnums=0)

  def run(self, num: int) -> None:
    """Runs `num` steps."""
    for _ in range(num):
      self.state, metrics = self._step(self.state, next(self._batches))
      self.losses.append(float(metrics["d/loss"]))

  def synchronize(self) -> None:
    """Waits for the device."""
    jax.block_until_ready(self.state)


def batches(sizes: BatchSizes, images: DeviceData, seed: int) -> Iterator[Batch]:
  """Endless batches in host memory, sampled as `data.make_sample_batch` does."""
  rng = np.random.default_rng(seed)
  x_lab, y_lab, x_unl = (np.asarray(a) for a in (images.x_lab, images.y_lab, images.x_unl))

  def sample(x: np.ndarray, num: int) -> np.ndarray:
    return x[rng.integers(len(x), size=num)].astype(np.float32) / 255

  while True:
    chosen = rng.integers(len(y_lab), size=sizes.labelled)
    if sizes.labelled == len(y_lab):
      chosen = np.arange(sizes.labelled)
    yield Batch(
      x_lab=x_lab[chosen].astype(np.float32) / 255,  # pyright: ignore[reportArgumentType]
      y_lab=y_lab[chosen],  # pyright: ignore[reportArgumentType]
      x_unl=sample(x_unl, sizes.unlabelled),  # pyright: ignore[reportArgumentType]
      x_unl_g=sample(x_unl, sizes.generated),  # pyright: ignore[reportArgumentType]
      num_generated=sizes.generated,
    )
