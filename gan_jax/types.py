"""Types that cross module borders: frozen pytrees of arrays, and the contracts of the networks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

Metrics = dict[str, Float[Array, ""]]
Params = PyTree[Array]


class InputError(ValueError):
  """A mistake of the caller's, told in one sentence: what is wrong and what to do instead.

  The command line prints the sentence and exits with code 2.
  """


class Stopped(SystemExit):
  """SIGTERM or SIGHUP, which schedulers send before they take a machine; exit code 143 or 129.

  What training had reached is saved. The command line says so, with the command that goes on from there.
  """

  def __init__(self, signum: int):
    super().__init__(128 + signum)
    self.signum = signum
    self.resume: str | None = None
    """The command that goes on, where there is a run."""


class ImageSource(Protocol):
  """Images that are read by their positions: an array of bytes is one, and so is what reads files.

  A source that is streamed is read from several threads at once.
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
  """Generated images in D's update, and as many in G's; 0 disables the generator."""


class BatchSizes(NamedTuple):
  """Images per step."""

  labelled: int
  unlabelled: int
  generated: int
  """Generated images in D's update and in G's, beside as many unlabelled images for G's terms."""


class NetState(struct.PyTreeNode):
  """One network."""

  params: Params
  """What the optimizer moves."""
  model_state: PyTree[Array]
  """Flax's other collections: frozen weight-norm scales and the like; `{}` where there are none."""
  opt_state: PyTree[Array]
  """The state of the Optax optimizer."""


class TrainState(struct.PyTreeNode):
  """All that a training run is; arrays only, so it checkpoints, compares, vmaps and shards."""

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
  """What else an algorithm carries from step to step."""


class LabelSplit(NamedTuple):
  """Which labels and images a run may see. An image of the run without a label is just an image."""

  indices: tuple[int, ...]
  """Positions of the labelled images in the training set, ascending."""
  per_class: int | None
  """Labels of each class; None: every label that there is."""
  seed: int
  """The seed that the split was drawn with."""
  sha256: str
  """SHA-256 of the indices as little-endian int64, ascending, followed by their labels likewise."""
  images: tuple[int, ...]
  """Positions of all images that the run trains on, labelled ones included, ascending."""
  held_out: tuple[int, ...]
  """Positions of training images that no update sees, for diagnostics."""


class Network(Protocol):
  """What the step needs of a Linen module."""

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...
  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


class ClassLatents(NamedTuple):
  """What a class-conditional generator starts from."""

  z: Float[Array, "n z"]
  y: Int[Array, "n"]
  """The class that each image is to be of, 0 .. K-1."""


Latents = Float[Array, "n z"] | ClassLatents


class Generator(Network, Protocol):
  """A Linen module `g(latents, train=) -> x [N, H, W, C]` in [0, 1] that also draws its own latents."""

  def latents(self, key: Key[Array, ""], num: int) -> Latents:
    """`num` latents; consumes the key. A class-conditional generator draws the classes too."""
    ...


class Discriminator(Network, Protocol):
  """A Linen module `d(x, train=) -> (logits [B, K], features [B, F])`; this is its whole contract.

  - A discriminator with a head for a task of its own returns the logits `[B, A]` of that head third.
  - The outputs for an image depend on that image alone, so no statistics of the batch: D's update passes
    real and generated images together, G's update passes them apart, and gradient penalties are per image.
  - Each layer is a submodule of the top level, called once, and its parameters are found at the top of the
    parameters under its name. What else is there are the heads: layers that belong to a task, which are
    never frozen and start anew where a transfer finds another number of outputs.
  - Noise in training comes from the random stream "noise".
  """

  def layers(self, image_shape: Sequence[int]) -> tuple[str, ...]:
    """Names of its layers for images of this shape, in order from the image on, without the heads.

    FreezeD freezes the first of them, probes read the output `[B, ...]` of each.
    """
    ...


class DiscriminatorFn(Protocol):
  """`D(x) -> (logits [B, K], features [B, F], ...)` with its parameters bound; consumes `key`."""

  def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> tuple[Array, ...]: ...


Augment = Callable[[Key[Array, ""], Float[Array, "b h w c"]], Float[Array, "b h w c"]]
"""Draws one random transformation an image and applies it; consumes the key."""

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""One step, an update of D and then of G, as a pure function."""

Json = dict[str, Any]
