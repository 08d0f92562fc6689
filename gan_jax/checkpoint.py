"""The whole TrainState on disk, through Orbax. A checkpoint is there entirely or not at all."""

from pathlib import Path
from typing import Any

import jax

from gan_jax.types import InputError, TrainState


class Checkpoints:
  """The checkpoints of one run, named by their step; the last two are kept.

  A context manager: leaving it waits until what was saved is on disk.
  """

  def __init__(self, directory: Path):
    ocp = _orbax()
    self.directory = directory
    self._checkpointer = ocp.training.Checkpointer(
      directory.absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.LatestN(2),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint; None where there is none."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, state: TrainState) -> None:
    """Saves the state under its own step, unless that step is there already."""
    step = int(state.step)
    if step != self.latest_step:
      self._checkpointer.save(step, _pack(state))

  def restore(self, like: TrainState) -> TrainState:
    """The newest state.

    Args:
      like: a state of the same networks and optimizers; it gives the structure.

    Raises:
      InputError: the checkpoint is of another model, or damaged.
    """
    packed = _pack(like)
    damaged = f"{self.directory / str(self.latest_step)} is damaged: remove it or start anew"
    try:
      saved = self._checkpointer.metadata(self.latest_step).metadata
    except Exception as error:  # whatever Orbax and its storage raise
      raise InputError(damaged) from error
    expected, found = (_shapes(tree) for tree in (packed, saved))
    if expected != found:
      name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
      raise InputError(
        f"{self.directory} is a checkpoint of another model, or damaged: {name} is"
        f" {found.get(name, 'absent')} there and {expected.get(name, 'absent')} here"
      )
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), packed)
    try:
      restored: Any = self._checkpointer.load(self.latest_step, abstract)
    except Exception as error:
      raise InputError(damaged) from error
    return restored.replace(key=jax.random.wrap_key_data(restored.key))


def _orbax() -> Any:
  """Imported late, because it takes a second; untyped, because its own types disagree."""
  from orbax.checkpoint import v1

  return v1


def _pack(state: TrainState) -> TrainState:
  """Typed keys become plain arrays."""
  return state.replace(key=jax.random.key_data(state.key))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
  }
