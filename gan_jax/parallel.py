"""One run on several devices: the images of each step are split over them.

With `over_devices`, the networks see a part of each batch on each device; everything else is as on one
device. The step stays one function of the whole batch, so losses that compare images of a batch, batch
statistics, and ADA's signal are those of the whole batch by construction. The devices may belong to several
`processes`. `over_axis` does the same for code that uses `jax.pmap`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int

from gan_jax.types import BatchSizes, InputError

if TYPE_CHECKING:
  from gan_jax.recipes import Recipe


def mesh_of(devices: Sequence[Any], axis: str = "batch") -> Mesh:
  """These devices in this order: `jax.make_mesh` refuses subsets of a TPU's chips that are no cuboid."""
  return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


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
  mesh = mesh_of(devices)
  return dataclasses.replace(recipe, g=_Split(recipe.g, mesh), d=_Split(recipe.d, mesh))


def most_devices(sizes: BatchSizes, num: int, multiple: int = 1) -> int:
  """The largest number of devices over which a batch of these sizes can be split.

  It is at most `num` and a multiple of `multiple`, which is returned if there is none.
  """
  fitting = (n for n in range(multiple, num + 1, multiple) if not any(size % n for size in sizes))
  return max(fitting, default=multiple)


def replicated(tree: Any, devices: Sequence[Any]) -> Any:
  """The same arrays on each of these devices; with several processes, each supplies its own copy."""
  whole = NamedSharding(mesh_of(devices), PartitionSpec())
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
  return NamedSharding(mesh_of(devices), PartitionSpec(None, "batch"))


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
      states, metrics = multi_step(replicates.stack([state] * 8), replicates.stack([images] * 8), 50)

  Every device has the whole state and the whole batch. Its networks see a part of the batch, and their
  outputs are gathered, so losses and statistics are those of the whole batch, results equal those of one
  device up to rounding, and the devices' states stay identical: `replicates.pick(states, 0)` is the state.

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
