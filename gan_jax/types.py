"""Types shared between modules: frozen pytrees of arrays, and the contracts of the networks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

Metrics = dict[str, Float[Array, ""]]
Params = PyTree[Array]


class InputError(ValueError):
  """A user error, reported in one sentence: what is wrong and what to do instead.

  The command line prints the sentence and exits with code 2.
  """


class Stopped(SystemExit):
  """SIGTERM or SIGHUP, which schedulers send before they reclaim a machine; exit code 143 or 129.

  Training progress is saved. The command line reports this, with the command that resumes the run.
  """

  def __init__(self, signum: int):
    super().__init__(128 + signum)
    self.signum = signum
    self.resume: str | None = None
    """The command that resumes the run, if there is one."""


class ImageSource(Protocol):
  """Images indexed by position: an array of bytes, or an object that reads files.

  A streamed source is read from several threads concurrently.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    """`(N, height, width, channels)`."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "b h w c"]:
    """The images at these positions."""
    ...


class Batch(struct.PyTreeNode):
  """The input of one step. An empty array disables that input."""

  x_lab: Float[Array, "n h w c"]
  """Labelled images, in [0, 1]."""
  y_lab: Int[Array, "n"]
  """Their classes, 0 .. K-1."""
  x_unl: Float[Array, "u h w c"]
  """Unlabelled images for D's update, in [0, 1]."""
  x_unl_g: Float[Array, "m h w c"]
  """Unlabelled images for G's update, for terms that compare generated images with real ones."""
  num_generated: int = struct.field(pytree_node=False, default=0)
  """Number of generated images in D's update, and in G's; 0 disables the generator."""


class BatchSizes(NamedTuple):
  """Images per step."""

  labelled: int
  unlabelled: int
  generated: int
  """Generated images in D's update and in G's; also the number of unlabelled images for G's terms."""


class NetState(struct.PyTreeNode):
  """One network."""

  params: Params
  """The parameters that the optimizer updates."""
  model_state: PyTree[Array]
  """Other Flax collections, such as frozen weight-norm scales; `{}` if there are none."""
  opt_state: PyTree[Array]
  """The state of the Optax optimizer."""


class TrainState(struct.PyTreeNode):
  """The whole state of a run: arrays only, so it can be checkpointed, compared, vmapped and sharded."""

  step: Int[Array, ""]
  """Steps done so far; one step updates D, then G."""
  key: Key[Array, ""]
  """The base key. It never changes: `fold_in(key, step)` gives each step its own."""
  g: NetState
  """The generator."""
  d: NetState
  """The discriminator."""
  ema: dict[str, Params]
  """Exponential moving averages of the parameters, under `"g"` and `"d"`."""
  aux: PyTree[Array] = struct.field(default_factory=dict)
  """Further state that an algorithm carries from step to step."""

  def averaged(self, name: Literal["g", "d"]) -> PyTree[Array]:
    """The averaged network of this name as Flax variables."""
    net: NetState = getattr(self, name)
    return {"params": self.ema[name], **net.model_state}


class LabelSplit(NamedTuple):
  """Which labels and images a run may see. Images outside `indices` are used without their labels."""

  indices: tuple[int, ...]
  """Positions of the labelled images in the training set, ascending."""
  per_class: int | None
  """Labels per class; None: all labels."""
  seed: int
  """The seed that the split was drawn with."""
  sha256: str
  """SHA-256 of the ascending indices followed by their labels, both as little-endian int64."""
  images: tuple[int, ...]
  """Positions of all images that the run trains on, labelled ones included, ascending."""
  held_out: tuple[int, ...]
  """Positions of training images held out of all updates, for diagnostics."""


class Network(Protocol):
  """The interface of a Linen module that the step needs."""

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...
  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


class ClassLatents(NamedTuple):
  """The input of a class-conditional generator."""

  z: Float[Array, "n z"]
  y: Int[Array, "n"]
  """The requested class of each image, 0 .. K-1."""


Latents = Float[Array, "n z"] | ClassLatents


class Generator(Network, Protocol):
  """A Linen module `g(latents, train=) -> x [N, H, W, C]` in [0, 1] that also samples its own latents."""

  def latents(self, key: Key[Array, ""], num: int) -> Latents:
    """Samples `num` latents; consumes the key. A class-conditional generator also samples the classes."""
    ...


class Discriminator(Network, Protocol):
  """A Linen module `d(x, train=) -> (logits [B, K], features [B, F])`; this is its whole contract.

  - A discriminator with an auxiliary head returns the logits `[B, A]` of that head as a third output.
  - The outputs for an image depend on that image alone, so batch statistics are not allowed: D's update
    passes real and generated images together, G's update passes them separately, and gradient penalties are
    per image.
  - Each layer is a top-level submodule, called once, and its parameters are at the top level of the
    parameters under its name. All other submodules are heads: task-specific layers, which are never frozen
    and are reinitialised when a transfer changes the number of outputs.
  - Noise in training comes from the random stream "noise".
  """

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    """Names of its layers for images of this shape, from input to output, without the heads.

    FreezeD freezes the first ones; probes read the output `[B, ...]` of each.
    """
    ...


class DiscriminatorFn(Protocol):
  """`D(x) -> (logits [B, K], features [B, F], ...)` with its parameters bound; consumes `key`."""

  def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> tuple[Array, ...]: ...


Augment = Callable[[Key[Array, ""], Float[Array, "b h w c"]], Float[Array, "b h w c"]]
"""Samples one random transformation per image and applies it; consumes the key."""

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""One training step as a pure function: an update of D, then one of G."""

Json = dict[str, Any]


def as_tuple(value: Any) -> Any:
  """A value read from JSON, in which tuples are lists."""
  return tuple(value) if isinstance(value, list) else value
