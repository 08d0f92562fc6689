"""Several devices: the images of a step split over them, or replicates of a run spread over them.

**One run**, `over_devices`: on each device the networks see a part of each batch; everything else is as on
one device. The step stays one function of the whole batch, so losses that compare images of a batch, batch
statistics, and ADA's signal are those of the whole batch by construction. The devices may belong to several
`processes`. `over_axis` does the same for code that uses `jax.pmap`.

**Replicates**, `replicate`: a replicate is an independent run with its own label split and seed. States and
labelled sets carry a leading axis `[S]`; the unlabelled images are stored once. Nothing is averaged over
replicates, so spreading them over devices does not change them. Trained sequentially on one device, a
replicate equals its single run bit for bit; otherwise the compiled program differs, and they agree up to
rounding.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int

from gan_jax.data import DeviceData
from gan_jax.steps import MultiStep
from gan_jax.types import BatchSizes, InputError, TrainState

if TYPE_CHECKING:
  from gan_jax.recipes import Recipe


def _mesh_of(devices: Sequence[Any], axis: str = "batch") -> Mesh:
  """These devices in this order: `jax.make_mesh` refuses subsets of a TPU's chips that are no cuboid."""
  return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


# --- One run


@dataclass(frozen=True)
class _Wrapped:
  """A network with another `apply`."""

  net: Any

  def init(self, *args: Any, **kwargs: Any) -> Any:
    return self.net.init(*args, **kwargs)

  def latents(self, key: Any, num: int) -> Any:
    return self.net.latents(key, num)

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    return self.net.layers(image_shape)


@dataclass(frozen=True)
class _Split(_Wrapped):
  """A network whose inputs are split over a mesh, along their first axis."""

  mesh: Mesh

  def apply(self, variables: Any, x: Any, **kwargs: Any) -> Any:
    parts = NamedSharding(self.mesh, PartitionSpec("batch"))
    x = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, parts), x)
    return self.net.apply(variables, x, **kwargs)


def over_devices(recipe: "Recipe", devices: Sequence[Any]) -> "Recipe":
  """The same training with the images of each step split over these devices.

  Its steps need a state and images from `replicated`. The compiler partitions the step, forward and
  backward, and adds the communication; results equal those of one device up to rounding.

  Raises:
    InputError: a size in `recipe.batch` is not a multiple of the number of devices.
  """
  sizes = {name: num for name, num in recipe.batch._asdict().items() if num % len(devices)}
  if sizes:
    (name, num), fitting = next(iter(sizes.items())), most_devices(recipe.batch, len(devices))
    instead = "fewer processes" if fitting % jax.process_count() else f"--devices {fitting}"
    raise InputError(
      f"{num} {name} images per step cannot be split evenly over {len(devices)} devices: choose a multiple"
      f" of {len(devices)}, or {instead}"
    )
  mesh = _mesh_of(devices)
  return dataclasses.replace(recipe, g=_Split(recipe.g, mesh), d=_Split(recipe.d, mesh))


def most_devices(sizes: BatchSizes, num: int, multiple: int = 1) -> int:
  """The largest number of devices over which a batch of these sizes can be split.

  It is at most `num` and a multiple of `multiple`, which is returned if there is none.
  """
  fitting = (n for n in range(multiple, num + 1, multiple) if not any(size % n for size in sizes))
  return max(fitting, default=multiple)


def replicated(tree: Any, devices: Sequence[Any]) -> Any:
  """The same arrays on each of these devices; with several processes, each supplies its own copy."""
  whole = NamedSharding(_mesh_of(devices), PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, whole)

  def put(a: Any) -> Array:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(a)), impl=jax.random.key_impl(a))
    return jax.make_array_from_process_local_data(whole, np.asarray(a))

  return jax.tree.map(put, tree)


def sharding_of_steps(devices: Sequence[Any]) -> Sharding:
  """Sharding of the images of steps, `[M, B, ...]`, over these devices along B; without devices, on JAX's
  default device."""
  if not devices:
    return jnp.zeros(()).sharding
  return NamedSharding(_mesh_of(devices), PartitionSpec(None, "batch"))


def rows_here(sharding: Sharding, shape: Sequence[int]) -> Int[np.ndarray, "n"]:
  """The rows of a step, `[M, B, ...]`, that are on this process's devices, in order."""
  parts = sharding.addressable_devices_indices_map(tuple(shape)).values()
  return np.unique(np.concatenate([np.arange(shape[1])[part[1]] for part in parts if part]))


# --- One run, under jax.pmap

AXIS = "batch"
"""The axis name that `over_axis` uses."""


def over_axis(recipe: "Recipe") -> "Recipe":
  """The same training for code that uses `jax.pmap`: each device applies the networks to its part.

      multi_step = jax.pmap(over_axis(recipe).make_multi_step(50), AXIS, in_axes=(0, 0, None))
      states, metrics = multi_step(stack([state] * 8), stack([images] * 8), 50)

  Every device has the whole state and the whole batch. Its networks see a part of the batch, and their
  outputs are gathered, so losses and statistics are those of the whole batch, results equal those of one
  device up to rounding, and the devices' states stay identical: `pick(states, 0)` is the state.

  Raises:
    InputError: a network cannot normalise over devices, because it has no `axis_name`.
  """
  parts = []
  for net in (recipe.g, recipe.d):
    if not hasattr(net, "axis_name"):
      raise InputError(f"{type(net).__name__} has no axis_name, which pmap needs: use over_devices instead")
    parts.append(_Part(net.clone(axis_name=AXIS)))  # pyright: ignore[reportAttributeAccessIssue]
  return dataclasses.replace(recipe, g=parts[0], d=parts[1])


@dataclass(frozen=True)
class _Part(_Wrapped):
  """A network that computes one part of the batch on each device of `AXIS`."""

  def apply(self, variables: Any, x: Any, **kwargs: Any) -> Any:
    found = self.net.apply(jax.tree.map(_to_parts, variables), jax.tree.map(_part, x), **kwargs)
    if kwargs.get("mutable", False) is False:
      return jax.tree.map(_whole, found)
    out, changed = found  # `changed` uses statistics of the whole batch, or none
    return jax.tree.map(_whole, out), changed


# Two pairs of collectives between replicated values and values that differ per device, one the transpose of
# the other. Under pmap JAX cannot tell these values apart: the transposes of its own all_gather and psum
# would count a replicated cotangent once per device.


def _own(x: Array) -> Array:
  """The device's part of a whole batch."""
  num, rest = divmod(x.shape[0], jax.lax.axis_size(AXIS))
  if rest:
    raise InputError(f"{x.shape[0]} images cannot be split evenly over {jax.lax.axis_size(AXIS)} devices")
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * num, num)


_own_part = jax.custom_vjp(_own)
_whole = jax.custom_vjp(lambda parts: jax.lax.all_gather(parts, AXIS, tiled=True))
_to_parts = jax.custom_vjp(lambda same: same)
_total = jax.custom_vjp(lambda parts: jax.lax.psum(parts, AXIS))


def _are_transposes(f: Any, g: Any) -> None:
  f.defvjp(lambda x: (f(x), None), lambda _, cotangent: (g(cotangent),))
  g.defvjp(lambda x: (g(x), None), lambda _, cotangent: (f(cotangent),))


_are_transposes(_own_part, _whole)
_are_transposes(_to_parts, _total)


def _part(x: Array) -> Array:
  return _own_part(x) if jnp.issubdtype(x.dtype, jnp.floating) else _own(x)  # classes have no gradient


# --- Replicates

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
      be at the same step. Defaults to `sequential` on CPU, where `vmap` turns convolutions with one kernel
      per replicate into grouped ones, which XLA has no fast code for; else to `vmap`, because one small
      network does not fill the device.
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
      all_as_one = jax.vmap(one, in_axes=(axes, 0, None, None), out_axes=(axes, 0))
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
  return _mesh_of(devices[:num], "replicate")
