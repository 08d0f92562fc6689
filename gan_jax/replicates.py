"""Replicates: independent runs of one recipe, trained together in one compiled program.

Each has its own label split and key. States and labelled sets carry a leading axis `[S]`; the unlabelled
images are stored once. Nothing is averaged over replicates, so spreading them over devices does not change
them. Trained sequentially on one device, a replicate equals its single run bit for bit; otherwise the
compiled program differs, and they agree up to rounding.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from gan_jax import checkpoint, kernels, parallel
from gan_jax.data import DeviceData
from gan_jax.output import say
from gan_jax.recipes import Recipe
from gan_jax.steps import MultiStep
from gan_jax.types import TrainState


class Program(NamedTuple):
  """Compiled steps of replicates."""

  run: Callable[..., Any]
  """`(states, images, num) -> (states, metrics)`, see `steps.make_multi_step`."""
  max_steps: int


class Fit(NamedTuple):
  """The result of `fit`."""

  states: TrainState
  """Final states, with a leading `[S]`."""
  metrics: dict[str, Float[np.ndarray, "n"]]
  """Means over the last dispatch, one per replicate."""
  program: Program
  seconds_train: float
  seconds_compile: float
  """Both include earlier parts of a resumed training."""


def fit(
  recipe: Recipe,
  images: DeviceData,
  keys: Sequence[Key[Array, ""]],
  *,
  name: str = "replicates",
  workdir: Path | None = None,
  start: Callable[[TrainState], Fit] | None = None,
  program: Program | None = None,
  steps_per_dispatch: int = 100,
  checkpoint_every: int = 1000,
) -> Fit:
  """Trains replicates of a recipe, `recipe.num_steps` steps each.

  Only one dispatch is under way at a time, so a process that a signal ends does not wait for more.

  Args:
    recipe: the recipe.
    images: the images of all replicates, from `data.to_device_splits`.
    keys: one per replicate, consumed; each determines an initial state and all randomness of its run.
    name: name of this training in messages.
    workdir: folder for the checkpoints. Training resumes from the newest one, bit for bit, if there is one.
      If None, nothing is saved.
    start: an earlier phase, called with the fresh states unless training resumes. This one begins with its
      states, and its seconds count.
    program: that of an earlier fit of the recipe to arrays of these shapes; None compiles it.
    steps_per_dispatch: the most steps in one dispatch.
    checkpoint_every: steps between two checkpoints; there is none after the last step.
  """
  states = stack([recipe.init_state(key, images) for key in keys])
  before, means = (0.0, 0.0), {}
  with contextlib.nullcontext() if workdir is None else checkpoint.Checkpoints(workdir) as saved:
    if saved is not None and saved.latest_step is not None:
      state = saved.restore(_of_one(states))
      states = state.replace(step=jnp.full(len(keys), state.step))
      before = saved.extra["seconds_train"], saved.extra["seconds_compile"]
      say(f"{name}: resuming from step {int(state.step):,}")
    elif start is not None:
      first = start(states)
      states, before = first.states, (first.seconds_train, first.seconds_compile)
    states, images = place(states, images)
    begin = time.perf_counter()
    program = program or compile_steps(recipe, states, images, min(steps_per_dispatch, recipe.num_steps))
    compiled = time.perf_counter()
    seconds = lambda: {
      "seconds_train": round(before[0] + time.perf_counter() - compiled, 2),
      "seconds_compile": round(before[1] + compiled - begin, 2),
    }
    done = int(states.step[0])
    while done < recipe.num_steps:
      num = min(program.max_steps, recipe.num_steps - done, checkpoint_every - done % checkpoint_every)
      states, history = jax.block_until_ready(program.run(states, images, np.int32(num)))
      done += num
      if done == recipe.num_steps:
        means = {metric: np.asarray(values)[:, :num].mean(axis=1) for metric, values in history.items()}
      elif saved is not None and done % checkpoint_every == 0:
        saved.save(_of_one(states), seconds())
        say(f"{name}: step {done:,} of {recipe.num_steps:,}")
  return Fit(states, means, program, **seconds())


def compile_steps(recipe: Recipe, states: TrainState, images: DeviceData, max_steps: int) -> Program:
  """Compiles the steps of replicates that `place` has put on their devices."""
  multi_step = jax.jit(replicate(recipe.make_multi_step(max_steps)), donate_argnums=0)
  return Program(multi_step.lower(states, images, np.int32(0)).compile(), max_steps)


def _of_one(states: TrainState) -> TrainState:
  """Replicates as one state for `Checkpoints`: they are at the same step."""
  return states.replace(step=states.step[0])


# --- On the devices

Strategy = Literal["sequential", "vmap"]

_EACH, _WHOLE = PartitionSpec("replicate"), PartitionSpec()
_DATA = DeviceData(_EACH, _EACH, _WHOLE, _WHOLE, _WHOLE)  # pyright: ignore[reportArgumentType]


def replicate(
  multi_step: MultiStep, *, strategy: Strategy | None = None, devices: Sequence[Any] | None = None
) -> MultiStep:
  """`multi_step` for S replicates.

  Args:
    multi_step: from `steps.make_multi_step`.
    strategy: `sequential` trains one replicate after the other; `vmap` trains all in lockstep, so they must
      be at the same step. Defaults to `sequential` on CPU, where each replicate then equals its single run
      bit for bit; else to `vmap`, because one small network does not fill the device.
    devices: devices to spread the replicates over evenly (default: all); the most that divide S are used.

  Returns:
    `multi_step(states, data, num) -> (states, metrics)` with a leading `[S]` in every leaf of `states` and
    `metrics`, and in `x_lab` and `y_lab` of `data`. Uncompiled; its inputs come from `place`.
  """
  strategy = strategy or ("sequential" if jax.default_backend() == "cpu" else "vmap")

  def one(state: TrainState, labelled: tuple[Array, Array], data: DeviceData, num: Array):
    x_lab, y_lab = labelled
    return multi_step(state, data.replace(x_lab=x_lab, y_lab=y_lab), num)

  def local(states: TrainState, data: DeviceData, num: Array):
    labelled = data.x_lab, data.y_lab
    if strategy == "vmap":
      # One step count for all: with one per replicate, a term due every k steps would always be computed.
      axes = jax.tree.map(lambda _: 0, states).replace(step=None)
      all_as_one = jax.vmap(
        one, in_axes=(axes, 0, None, None), out_axes=(axes, 0), axis_name=kernels.REPLICATES
      )
      after, metrics = all_as_one(states.replace(step=states.step[0]), labelled, data, num)
      return after.replace(step=jnp.full_like(states.step, after.step)), metrics
    return jax.lax.map(lambda each: one(each[0], each[1], data, num), (states, labelled))

  def replicated(states: TrainState, data: DeviceData, num: Array):
    mesh = _mesh(len(states.step), devices)
    if mesh.size == 1:
      return local(states, data, num)
    # Nothing crosses the mesh, so there is nothing for JAX to check.
    specs = {"in_specs": (_EACH, _DATA, _WHOLE), "out_specs": _EACH}
    return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(states, data, jnp.asarray(num))

  return replicated


def place(
  states: TrainState, data: DeviceData, *, devices: Sequence[Any] | None = None
) -> tuple[TrainState, DeviceData]:
  """Puts replicates and data where `replicate` needs them; on one device they stay where they are."""
  mesh = _mesh(len(states.step), devices)
  if mesh.size == 1:
    return states, data
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _DATA)
  return jax.device_put(states, NamedSharding(mesh, _EACH)), jax.device_put(data, shardings)


@jax.jit  # one program for all leaves
def stack(trees: Sequence[Any]) -> Any:
  """Stacks replicates: each leaf gets a leading `[S]`."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def pick(tree: Any, i: int) -> Any:
  """Replicate `i` alone."""
  return jax.tree.map(lambda leaf: leaf[i], tree)


def _mesh(num_replicates: int, devices: Sequence[Any] | None) -> Mesh:
  devices = jax.devices() if devices is None else devices
  num = max(n for n in range(1, len(devices) + 1) if num_replicates % n == 0)
  return parallel.mesh_of(devices[:num], "replicate")
