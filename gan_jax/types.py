"""Types that cross module borders: frozen pytrees of arrays, and the interfaces of the networks."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from flax import struct
from jaxtyping import Array, Float, Int, Key, PyTree

Metrics = dict[str, Float[Array, ""]]
Params = PyTree[Array]


class InputError(ValueError):
  """A mistake of the caller's, told in one sentence: what is wrong and what to do instead.

  The command line prints the sentence and exits with code 2.
  """


class Batch(struct.PyTreeNode):
  """What one update sees. A part with zero rows is a part that the update does not have."""

  x_lab: Float[Array, "n h w c"]
  """Labelled images, in [0, 1]."""
  y_lab: Int[Array, "n"]
  """Their classes, 0 .. K-1."""
  x_unl: Float[Array, "u h w c"]
  """Unlabelled images for D's update, in [0, 1]."""
  x_unl_g: Float[Array, "m h w c"]
  """Unlabelled images for G's update; each network is shown as many generated images."""


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
  """Updates done so far."""
  key: Key[Array, ""]
  """The base key. It never changes: `fold_in(key, step)` gives each update its own."""
  g: NetState
  """The generator."""
  d: NetState
  """The discriminator."""
  ema: dict[str, Params]
  """Exponential moving averages of the parameters, under `"g"` and `"d"`."""
  aux: PyTree[Array] = struct.field(default_factory=dict)
  """What else an algorithm carries from update to update."""


class LabelSplit(NamedTuple):
  """Which labels and images a run may see. An image of the run without a label is just an image."""

  indices: tuple[int, ...]
  """Positions of the labelled images in the training set, ascending."""
  per_class: int | None
  """Labels of each class; None: every image of the run has its label."""
  seed: int
  """The seed that the split was drawn with."""
  sha256: str
  """SHA-256 of the indices as little-endian int64, ascending, followed by their labels likewise."""
  images: tuple[int, ...]
  """Positions of all images that the run trains on, labelled ones included, ascending."""
  held_out: tuple[int, ...]
  """Positions of training images that no update sees: D is watched on them."""


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
  """A Linen module `g(latents, train=) -> x` in [0, 1] that also draws its own latents."""

  def latents(self, key: Key[Array, ""], num: int) -> Latents:
    """`num` latents; consumes the key. A class-conditional generator draws the classes too."""
    ...


class DiscriminatorFn(Protocol):
  """`D(x) -> (logits [B, K], features [B, F], ...)` with its parameters bound; consumes `key`.

  A discriminator with a head for a task of its own, see `num_aux` in `networks`, gives its logits third.
  """

  def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> tuple[Array, ...]: ...


Augment = Callable[[Key[Array, ""], Float[Array, "b h w c"]], Float[Array, "b h w c"]]
"""Draws one random transformation an image and applies it; consumes the key."""

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""One update as a pure function."""

Json = dict[str, Any]
