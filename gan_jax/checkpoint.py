"""States on disk: whole ones through Orbax, written atomically, or their averages as safetensors."""

import contextlib
import errno
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gan_jax import output, processes
from gan_jax.types import InputError, Json, NetState, TrainState

Shapes = dict[str, tuple[int, ...]]
"""The shape of every array, by its path in the state."""


class Checkpoints:
  """The checkpoints of one run, named by their step; the last two are kept.

  A context manager: leaving it closes the writer. Reading changes nothing on disk, except that `restore`
  renames damaged checkpoints.
  """

  def __init__(self, directory: Path):
    if directory.exists() and not directory.is_dir():
      raise InputError(f"{directory} is not a folder: remove it or choose another folder for the run")
    self.directory = directory.absolute()
    self._checkpointer: Any = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    if self._checkpointer is not None:
      with self._writing():
        self._checkpointer.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint; None if there is none."""
    return max(self._steps(), default=None)

  def save(self, state: TrainState, extra: Json | None = None) -> None:
    """Saves the state under its step, with one checksum per array, unless that step already exists.

    Args:
      state: the state that `restore` returns.
      extra: JSON that the property `extra` returns.

    Raises:
      InputError: the disk is full.
    """
    step, packed = int(state.step), _pack(state)
    if not processes.largest(step == self.latest_step):  # either all processes save or none
      beside = {"checksums": _checksums(packed), "extra": extra or {}}
      with self._writing():
        self._checkpointer = self._checkpointer or self._open()
        self._checkpointer.save(step, packed, custom_metadata=beside)

  def _open(self) -> Any:
    """The writer; it removes partial checkpoints of killed processes, and cannot open damaged ones."""
    for step in self._steps():
      try:
        self._beside(step)
      except _DamagedError:
        self._lay_aside(step)
    ocp = _orbax()
    return ocp.training.Checkpointer(
      self.directory,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.LatestN(2),
      cleanup_tmp_directories=True,
    )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and its storage have no error type for it
      if "RESOURCE_EXHAUSTED" not in str(error) and getattr(error, "errno", None) != errno.ENOSPC:
        raise
      raise InputError(
        f"{self.directory} cannot be written because the disk is full: free some space, then resume;"
        " earlier checkpoints are intact"
      ) from error

  def restore(self, like: TrainState) -> TrainState:
    """The newest intact state; damaged ones after it are renamed, so that a run resumes from it.

    Args:
      like: a state of the same networks and optimizers, for its structure.

    Raises:
      InputError: the checkpoint is of another model, or all checkpoints are damaged.
    """
    packed = _pack(like)

    def read(step: int) -> TrainState:
      _check_same(self.directory, _shapes(packed), _shapes(self.metadata(step)))
      return self.load(step, jax.tree.map(_abstract, packed))

    restored = self.newest(read)
    for step in self._steps():
      if step > int(restored.step):  # else it would count as the newest
        self._lay_aside(step)
    processes.wait("restored")  # no other process may see a newest step that is being renamed
    impl = jax.random.key_impl(like.key)
    return restored.replace(key=jax.random.wrap_key_data(restored.key, impl=impl))

  @property
  def extra(self) -> Json:
    """The JSON saved with the newest state."""
    return self._beside(max(self._steps()))["extra"]

  def newest(self, read: Callable[[int], Any]) -> Any:
    """Returns `read(step)` for the newest intact step.

    `read` calls `metadata` or `load`, which raise for a damaged step; this step is then skipped.

    Raises:
      InputError: no step is intact, or `read` raises it.
    """
    damaged = None
    for step in sorted(self._steps(), reverse=True):
      try:
        found = read(step)
      except _DamagedError:
        damaged = damaged or self.directory / str(step)
        continue
      if damaged:
        output.say(f"{damaged} is damaged: using the previous checkpoint, {step}, instead")
      return found
    raise InputError(f"{damaged} is damaged and no earlier checkpoint is intact: start a new run")

  def metadata(self, step: int) -> Any:
    """A state as nested dicts whose leaves have a shape."""
    beside = self._beside(step)
    with _reading(self.directory):
      found = _orbax().metadata(self.directory / str(step), checkpointable_name="state").metadata
    if not _leaves(found) or _leaves(found).keys() != beside["checksums"].keys():
      raise _DamagedError
    return found

  def load(self, step: int, abstract: Any) -> Any:
    """A state without the leaves that are `...`; it must match the checksums that were saved with it."""
    beside = self._beside(step)
    with _reading(self.directory):
      loaded = _orbax().load(self.directory / str(step), abstract, checkpointable_name="state")
    found = _checksums({path: leaf for path, leaf in _leaves(loaded).items() if leaf is not ...})
    if not found.items() <= beside["checksums"].items():
      raise _DamagedError
    return loaded

  def _beside(self, step: int) -> Json:
    """The metadata that `save` stored with the state."""
    with _reading(self.directory):
      # Read directly: Orbax would hide that it is damaged.
      file = self.directory / str(step) / "_CHECKPOINT_METADATA"
      beside = json.loads(file.read_text())["custom_metadata"]
      return {"checksums": {**beside["checksums"]}, "extra": {**beside["extra"]}}

  def _steps(self) -> list[int]:
    paths = self.directory.iterdir() if self.directory.exists() else ()
    return [int(path.name) for path in paths if path.name.isdigit()]

  def _lay_aside(self, step: int) -> None:
    """Renames a checkpoint instead of removing it: what fails to read now may be readable later."""
    if not processes.writes():  # only the first process does this
      return
    folder = self.directory / str(step)
    shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
    folder.rename(folder.with_suffix(".damaged"))


class _DamagedError(Exception):
  """A checkpoint whose files cannot be read, or do not hold the values that were saved."""


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
  """Any error of Orbax or its storage means damage, except transient ones."""
  try:
    yield
  except Exception as error:
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
      raise InputError(f"{directory} cannot be read: permission denied") from error
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
      raise
    raise _DamagedError from error


@contextlib.contextmanager
def _newest(run_dir: str | Path) -> Iterator[Checkpoints]:
  """The checkpoints of another run, which are not modified; `InputError` if there are none."""
  directory = Path(run_dir) / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    if checkpoints.latest_step is None:
      raise InputError(f"{run_dir} holds no checkpoint: name a run that has saved one")
    yield checkpoints


def transfer(
  state: TrainState,
  run_dir: str | Path,
  *,
  layers: Sequence[str],
  parts: Sequence[str] = ("g", "d"),
  fresh: Sequence[str] = (),
) -> tuple[TrainState, list[str]]:
  """Initialises networks from the averaged ones in another run's newest checkpoint.

  Both the parameters and their averages are set to the stored averages; `model_state` is copied too.
  Step, key and optimizers stay fresh, and so does a head of D that has another size there.

  Args:
    state: a fresh state.
    run_dir: the directory of the other run, which is not modified.
    layers: `d.layers(image_shape)`; the other modules of D are its heads.
    parts: the networks to initialise, "g", "d", or both.
    fresh: heads of D that stay fresh although they have the same size.

  Returns:
    The state, and one sentence for each head of D that has another size there.

  Raises:
    InputError: no checkpoint, a damaged one, or networks of another kind or image size.
  """

  def read(step: int) -> tuple[dict[str, Any], list[str]]:
    saved = checkpoints.metadata(step)
    here, there = _shapes(_pack(state)), _shapes(saved)
    wanted, notes = set(), []
    for part in parts:
      network = re.compile(rf"(?:ema/{part}|{part}/model_state/[^/]+)/([^/]+)")
      modules = {path: found[1] for path in sorted(here | there) if (found := network.match(path))}
      differing = {path: name for path, name in modules.items() if here.get(path) != there.get(path)}
      new_heads = set(differing.values()) - set(layers) if part == "d" else set()
      for path, name in differing.items():
        if name not in new_heads:
          raise InputError(
            f"{run_dir} holds networks of another kind or for images of another size: {path} is"
            f" {there.get(path, 'absent')} there and {here.get(path, 'absent')} here"
          )
      notes += [_new_head(name, here, there) for name in sorted(new_heads)]
      kept = new_heads.union(fresh if part == "d" else ())
      wanted |= {path for path, name in modules.items() if name not in kept}
    abstract = {path: _abstract(leaf) for path, leaf in _leaves(_pack(state)).items() if path in wanted}
    loaded = _leaves(checkpoints.load(step, _map(lambda path, _: abstract.get(path, ...), saved)))
    return {path: loaded[path] for path in wanted}, notes

  with _newest(run_dir) as checkpoints:
    taken, notes = checkpoints.newest(read)
  for path in list(taken):
    if path.startswith("ema/"):  # copies: a donated state must not hold a buffer twice
      _, part, layer = path.split("/", 2)
      taken[f"{part}/params/{layer}"] = jnp.copy(taken[path])
  return _map(lambda path, leaf: taken.get(path, leaf), state), notes


def restore_averages(run_dir: str | Path, like: TrainState) -> TrainState:
  """A run's networks: averages and `model_state` from its newest checkpoint.

  Args:
    run_dir: the directory of the run, which is not modified.
    like: a state of the same networks, or its shapes.

  Returns:
    A state without current parameters, optimizers and key: their fields are `{}`.

  Raises:
    InputError: no checkpoint, a damaged one, or one of other networks.
  """
  wanted = averages(like)
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    for path, leaf in _leaves(wanted).items()
  }

  def read(step: int) -> dict[str, Any]:
    saved = checkpoints.metadata(step)
    expected, found = _shapes(wanted), _shapes(saved)
    _check_same(checkpoints.directory, expected, {path: found[path] for path in expected & found.keys()})
    return _leaves(checkpoints.load(step, _map(lambda path, _: abstract.get(path, ...), saved)))

  with _newest(run_dir) as checkpoints:
    loaded = checkpoints.newest(read)
  return _map(lambda path, _: loaded[path], wanted)


def averages(state: TrainState) -> TrainState:
  """A state's step, averages and `model_state`, which define its networks; the other fields are `{}`."""
  empty = NetState({}, {}, {})
  return TrainState(
    step=state.step,
    key={},  # pyright: ignore[reportArgumentType]
    g=empty.replace(model_state=state.g.model_state),
    d=empty.replace(model_state=state.d.model_state),
    ema=state.ema,
  )


def _check_same(source: Path, expected: Shapes, found: Shapes) -> None:
  for path, _ in sorted(expected.items() ^ found.items()):
    raise InputError(
      f"{source} is a checkpoint of another model, or damaged: {path} is"
      f" {found.get(path, 'absent')} there and {expected.get(path, 'absent')} here"
    )


# --- Averaged networks as safetensors

SAFETENSORS: dict[Literal["g", "d"], str] = {"d": "model.safetensors", "g": "generator.safetensors"}
"""The files of the two networks. A tensor is named by its path in the network's Flax variables."""


def is_export(folder: Path) -> bool:
  """Whether a folder holds networks as `save_averages` writes them."""
  return (folder / SAFETENSORS["d"]).exists()


def save_averages(folder: Path, state: TrainState) -> None:
  """Writes a state's averages and `model_state`, which define its networks, as safetensors."""
  for name, file in SAFETENSORS.items():
    arrays = {path: np.asarray(leaf) for path, leaf in _leaves(state.averaged(name)).items()}
    output.write_bytes(folder / file, safetensors.numpy.save(arrays, {"step": str(int(state.step))}))


def read_averages(folder: Path, like: TrainState) -> TrainState:
  """Reads the files of `save_averages`; otherwise like `restore_averages`."""
  wanted, loaded = averages(like), {}
  for name, file in SAFETENSORS.items():
    try:
      with safetensors.safe_open(folder / file, "np") as tensors:
        loaded["step"] = np.int32(tensors.metadata()["step"])
        for path in tensors.keys():  # noqa: SIM118 (it is not a dict)
          prefix = f"ema/{name}/" if path.startswith("params/") else f"{name}/model_state/"
          loaded[prefix + path.removeprefix("params/")] = tensors.get_tensor(path)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
      raise InputError(f"{folder / file} is missing or damaged: export the run again") from error
  _check_same(folder, _shapes(wanted), {path: tuple(array.shape) for path, array in loaded.items()})
  return _map(lambda path, _: jnp.asarray(loaded[path]), wanted)


def _new_head(name: str, here: dict, there: dict) -> str:
  def outputs(shapes: dict[str, tuple[int, ...]]) -> str:
    module = {path: shape for path, shape in shapes.items() if path.startswith(f"ema/d/{name}/")}
    widths = {shape[-1] for path, shape in module.items() if path.endswith("/kernel")}
    if not module:
      return "none"
    if len(widths) != 1:
      return "another structure"
    num = widths.pop()
    return f"{num} output" + "s" * (num != 1)

  ours, theirs = outputs(here), outputs(there)
  if ours == "none":
    return f"D's {name} is not transferred: none here, {theirs} there"
  return f"D's {name} is new: {ours} here, {theirs} there"


def _orbax() -> Any:
  """Orbax, imported late because that takes a second; untyped because its own types disagree."""
  from orbax.checkpoint import v1

  return v1


def _pack(state: TrainState) -> TrainState:
  """The state with its typed key as a plain array."""
  return state.replace(key=jax.random.key_data(state.key))


def _abstract(a: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)


_keystr = partial(jax.tree_util.keystr, simple=True, separator="/")


def _map(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """`fn(path, leaf)` for every leaf; a path looks like `d/params/head/kernel`."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_keystr(path), leaf), tree)


def _leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path."""
  return {_keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksums(tree: Any) -> dict[str, int]:
  """CRC-32 of every array's bytes."""
  return {path: zlib.crc32(np.asarray(leaf).tobytes()) for path, leaf in _leaves(tree).items()}


def _shapes(tree: Any) -> Shapes:
  return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}
