"""The updates that are timed: each is what an experiment runs, with the experiment's own constants.

Ours and the peers start from the same value, so neither has numbers of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax

from experiments import _gan, mnist_ssgan
from gan_jax import augment, data, objectives, steps
from gan_jax.types import Augment, Batch, Generator, LabelSplit, Network, Step, TrainState


@dataclass(frozen=True)
class Rows:
  """Images of one update; a network is shown as many generated images as its own unlabelled ones."""

  lab: int
  unl: int
  fake: int


@dataclass(frozen=True)
class Update:
  """One update of D and of G: all that `steps` needs, and its constants for who writes it otherwise."""

  g: Generator
  d: Network
  g_tx: optax.GradientTransformation
  d_tx: optax.GradientTransformation
  objective: objectives.Objective
  augment: Augment | None
  image_shape: tuple[int, int, int]
  rows: Rows
  steps: int
  """Updates of the experiment."""
  ema_decay: float
  labels_per_class: int | None
  """The label budget; None: every label."""
  g_rate: float | optax.Schedule
  d_rate: float | optax.Schedule
  adam: Mapping[str, float]
  """`b1`, `b2`, `eps` and `eps_root` of both optimizers."""
  strong: Mapping[str, float] | None = None
  """Ranges of the affine maps behind `augment`."""
  weak: Mapping[str, float] | None = None
  """Ranges of those behind the consistency term."""
  threshold: float = 1.0
  """Confidence from which the consistency term teaches."""
  penalty_every: int = 1

  @property
  def images(self) -> int:
    """Rows of D's pass in its own update."""
    return self.rows.lab + self.rows.unl + self.rows.fake

  def step(self) -> Step:
    return steps.make_step(
      self.g,
      self.d,
      g_tx=self.g_tx,
      d_tx=self.d_tx,
      objective=self.objective,
      augment=self.augment,
      ema_decay=self.ema_decay,
    )

  def draw(self) -> Callable[[Any, data.DeviceData], Batch]:
    return data.make_draw(self.rows.lab, self.rows.unl, self.rows.fake)

  def split(self, dataset: data.Dataset, seed: int = 0) -> LabelSplit:
    return data.split_labels(dataset.y_train, self.labels_per_class, seed)

  def init(self, key: Any, device_data: data.DeviceData) -> TrainState:
    x_init = data.to_float(device_data.x_unl[:500])
    return steps.init_state(key, self.g, self.d, g_tx=self.g_tx, d_tx=self.d_tx, x_init=x_init)


def make(
  name: str, image_shape: tuple[int, int, int], num_classes: int, batch_size: int | None = None
) -> Update:
  """The update `name` of `NAMES`.

  Args:
    name: which.
    image_shape: height, width, channels.
    num_classes: of the dataset.
    batch_size: unlabelled images (article_gan, conditional_r1: real ones); all rows grow in proportion.
      None: the recipe's.
  """
  update = _BUILDERS[name](image_shape, num_classes)
  if batch_size is None:
    return update
  rows = update.rows
  own = rows.unl or rows.lab
  scaled = (max(1, round(num * batch_size / own)) if num else 0 for num in dataclasses.astuple(rows))
  return dataclasses.replace(update, rows=Rows(*scaled))


def _article_gan(image_shape, num_classes) -> Update:
  del num_classes
  return _generator("mlp", image_shape, objectives.gan, num_logits=1, num_lab=0)


def _conditional_r1(image_shape, num_classes) -> Update:
  recipe = _gan.RECIPES["conv"]
  kwargs = {"num_logits": num_classes, "num_classes": num_classes, "num_lab": recipe.batch_size}
  return _generator("conv", image_shape, objectives.conditional_gan, **kwargs)


def _generator(network, image_shape, make_objective, *, num_logits, num_lab, num_classes=0) -> Update:
  recipe = _gan.RECIPES[network]
  g, d = _gan.make_networks(network, recipe, image_shape, num_logits=num_logits, num_classes=num_classes)
  return Update(
    g=g,
    d=d,
    g_tx=_gan.adam(recipe, recipe.g_learning_rate),
    d_tx=_gan.adam(recipe, recipe.d_learning_rate),
    objective=make_objective(
      _gan.LOSSES[_gan.Config.loss],
      penalty=recipe.penalty,
      gamma=recipe.gamma,
      penalty_every=recipe.penalty_every,
    ),
    augment=None,
    image_shape=image_shape,
    rows=Rows(num_lab, recipe.batch_size - num_lab, recipe.batch_size),
    steps=recipe.steps,
    ema_decay=recipe.ema_decay,
    labels_per_class=None if num_lab else 10,
    g_rate=_gan.learning_rate(recipe, recipe.g_learning_rate),
    d_rate=_gan.learning_rate(recipe, recipe.d_learning_rate),
    adam={"b1": recipe.b1, "b2": recipe.b2, "eps": 1e-8, "eps_root": 0.0},  # the last two are Optax's own
    penalty_every=recipe.penalty_every,
  )


def _semi_supervised(network, image_shape, num_classes) -> Update:
  recipe = mnist_ssgan.RECIPES[network]
  g, d = mnist_ssgan.make_networks(network, image_shape, num_classes)
  return Update(
    g=g,
    d=d,
    g_tx=mnist_ssgan.adam(recipe, recipe.g_learning_rate),
    d_tx=mnist_ssgan.adam(recipe, recipe.learning_rate),
    objective=mnist_ssgan.make_objective(recipe),
    augment=augment.affine(**recipe.strong) if recipe.strong else None,
    image_shape=image_shape,
    rows=Rows(recipe.batch_lab, recipe.batch_unl, recipe.batch_fake),
    steps=recipe.steps,
    ema_decay=recipe.ema_decay,
    labels_per_class=mnist_ssgan.Config.labels_per_class,
    g_rate=mnist_ssgan.learning_rate(recipe, recipe.g_learning_rate),
    d_rate=mnist_ssgan.learning_rate(recipe, recipe.learning_rate),
    adam=mnist_ssgan.ADAM,
    strong=recipe.strong,
    weak=mnist_ssgan.WEAK,
    threshold=recipe.threshold,
  )


_BUILDERS: dict[str, Callable[[tuple[int, int, int], int], Update]] = {
  "article_gan": _article_gan,
  "feature_matching": lambda *args: _semi_supervised("mlp", *args),
  "conv_ssgan": lambda *args: _semi_supervised("conv", *args),
  "conditional_r1": _conditional_r1,
}

NAMES = tuple(_BUILDERS)
