"""A recipe: everything that defines a training run, except its data and key."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Key

from gan_jax import augment, data, objectives, provenance, steps
from gan_jax.networks import Pair, Precision
from gan_jax.objectives import Objective
from gan_jax.terms import StepOutputs, Term
from gan_jax.types import (
  Augment,
  BatchSizes,
  Discriminator,
  Generator,
  InputError,
  Json,
  Step,
  TrainState,
)

Schedule = Literal["constant", "cosine", "linear"]
"""Of the learning rate, see `learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class Hparams:
  """Hyper-parameters common to all families: plain values that can be stored as JSON."""

  network: Pair
  """The pair of networks."""
  num_steps: int
  """Training steps; each updates D, then G."""
  d_learning_rate: float
  g_learning_rate: float
  schedule: Schedule
  """Schedule of both learning rates, see `learning_rate`."""
  b1: float
  b2: float
  eps: float = 1e-8
  eps_root: float = 0.0
  """Adam's updates are `m / (sqrt(v + eps_root) + eps)`."""
  ema_decay: float
  """Decay of the parameter averages, which all evaluation and sampling uses."""
  precision: Precision = "float32"
  """Precision of the networks' products and convolutions."""


@dataclass(frozen=True)
class Recipe:
  """A training run except its data and key. Build one with a family, `ssgan.build(hparams, ...)`."""

  g: Generator
  d: Discriminator
  g_tx: optax.GradientTransformation
  d_tx: optax.GradientTransformation
  objective: Objective
  batch: BatchSizes
  num_steps: int
  ema_decay: float
  augment: Augment | augment.Adaptive | None
  """Augmentation of all inputs of D, real and generated."""
  image_shape: tuple[int, int, int]
  """Height, width, channels."""
  num_classes: int
  """Classes of the data."""
  family: str
  """The family that built it; with `hparams`, shape and classes it can rebuild the recipe."""
  hparams: Hparams
  derived: tuple[tuple[str, Json], ...] = ()
  """Functions of this module applied since then, in order, with their arguments."""

  @property
  def by_class(self) -> bool:
    """Whether D judges every image by its class: no unlabelled images, and a class-conditional G."""
    return steps.judges_by_class(self.g, self.batch.unlabelled, self.batch.generated)

  @property
  def has_generator(self) -> bool:
    """Whether G is trained."""
    return bool(self.objective.g)

  def init_state(self, key: Key[Array, ""], images: data.DeviceData) -> TrainState:
    """A fresh state; consumes the key. Weight-normalised layers are initialised from 500 of the images."""
    x_init = data.to_float(data.evenly_spaced(images.x_unl if len(images.x_unl) else images.x_lab))
    aux = self.augment.init() if isinstance(self.augment, augment.Adaptive) else None
    return steps.init_state(key, self.g, self.d, g_tx=self.g_tx, d_tx=self.d_tx, x_init=x_init, aux=aux)

  def make_step(self) -> Step:
    """The step as a pure function, see `steps.make_step`."""
    return steps.make_step(
      self.g,
      self.d,
      g_tx=self.g_tx,
      d_tx=self.d_tx,
      objective=self.objective,
      augment=self.augment,
      ema_decay=self.ema_decay,
    )

  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the state, without arrays."""
    return jax.eval_shape(self.init_state, jax.random.key(0), self._one_image())

  @functools.cached_property
  def flops(self) -> float:
    """Floating-point operations of one step, see `provenance.flops`; counted once."""
    sample_batch = data.make_sample_batch(self.batch)
    batch = jax.eval_shape(sample_batch, jax.random.key(0), self._one_image())
    return provenance.flops(self.make_step(), self.abstract_state(), batch)

  def _one_image(self) -> data.DeviceData:
    x = np.zeros((1, *self.image_shape), np.uint8)
    return data.DeviceData.from_arrays(x, np.zeros(1, np.int32), x)

  def make_multi_step(self, max_steps: int) -> steps.MultiStep:
    """Many steps in one call, on batches sampled on the device, see `steps.make_multi_step`.

    A recipe returns the same function each time, so JAX traces and compiles it once, for all folds.
    """
    if max_steps not in self._multi_steps:
      sample_batch = data.make_sample_batch(self.batch)
      self._multi_steps[max_steps] = steps.make_multi_step(
        self.make_step(), sample_batch, max_steps=max_steps
      )
    return self._multi_steps[max_steps]

  @functools.cached_property
  def _multi_steps(self) -> dict[int, steps.MultiStep]:
    return {}


# --- Optimizers


def learning_rate(schedule: Schedule, num_steps: int, peak: float) -> float | optax.Schedule:
  """The learning rate at step t of T.

  `constant`: the peak. `cosine`: `peak cos(7 pi t / 16 T)` after a short linear warm-up; a fifth is left
  at the end, so that the averaged parameters keep improving. `linear`: the peak, with a linear decay to
  zero over the second half.

  References:
    Sohn et al., 2020, https://arxiv.org/abs/2001.07685, section 2.4 (cosine).
  """
  if schedule == "constant":
    return peak
  if schedule == "linear":
    half = num_steps // 2
    return optax.linear_schedule(peak, 0.0, max(1, num_steps - half), transition_begin=half)
  warmup = max(1, min(50, num_steps // 10))

  def cosine(t: ArrayLike) -> Array:
    t = jnp.asarray(t)
    done = jnp.minimum(1.0, t / num_steps)
    return peak * jnp.minimum(1.0, (t + 1) / warmup) * jnp.cos(7 / 16 * jnp.pi * done)

  return cosine


def ramp(weight: float, num_steps: int, share: float) -> float | optax.Schedule:
  """From 0 to `weight` over this share of the steps; 0 stays a number, so that it removes its term."""
  return optax.linear_schedule(0.0, weight, max(1, int(share * num_steps))) if weight else 0.0


def adam(hparams: Hparams, peak: float) -> optax.GradientTransformation:
  """Adam with the schedule of `learning_rate`."""
  h = hparams
  return _adam(h.schedule, h.num_steps, peak, h.b1, h.b2, h.eps, h.eps_root)


@functools.cache  # JAX finds a program again only if its optimizer is the same object
def _adam(
  schedule: Schedule, num_steps: int, peak: float, b1: float, b2: float, eps: float, eps_root: float
) -> optax.GradientTransformation:
  rate = learning_rate(schedule, num_steps, peak)
  return optax.adam(rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root)


# --- Recipes from recipes


def _derived(recipe: Recipe, name: str, kwargs: Json | None = None, **changes: Any) -> Recipe:
  """The recipe with these changes, which the derivation of this name makes from it."""
  return dataclasses.replace(recipe, derived=(*recipe.derived, (name, kwargs or {})), **changes)


def supervised_control(recipe: Recipe) -> Recipe:
  """The same networks, labels, augmentation and number of steps, without any other images."""
  batch = BatchSizes(recipe.batch.labelled, 0, 0)
  return _derived(recipe, "supervised_control", objective=objectives.supervised_only(), batch=batch)


def without_generator(recipe: Recipe) -> Recipe:
  """The same recipe without the GAN: no training of G, and of D's terms none that needs a generator."""
  d = {name: term for name, term in recipe.objective.d.items() if name not in objectives.GAN_TERMS}
  batch = recipe.batch._replace(generated=0)
  return _derived(recipe, "without_generator", objective=Objective(d=d), batch=batch)


def with_terms(recipe: Recipe, **d: tuple[objectives.Weight, Term]) -> Recipe:
  """The same recipe with further terms in D's objective: metric name = (weight, term).

  Of these, `describe` holds the names alone. `rebuild` makes a recipe that serves to open a stored run, for
  predictions and samples; its steps raise ValueError.
  """
  return _derived(recipe, "with_terms", {"names": list(d)}, objective=recipe.objective.plus(**d))


def _with_unknown_terms(recipe: Recipe, names: Sequence[str]) -> Recipe:
  def unknown(outputs: StepOutputs) -> Array:
    raise ValueError(f"the terms {', '.join(names)} are code, which a stored description does not hold")

  return with_terms(recipe, **dict.fromkeys(names, (1.0, unknown)))


def without_augmentation(recipe: Recipe) -> Recipe:
  """The same recipe on unaugmented images."""
  return _derived(recipe, "without_augmentation", augment=None)


def with_unlabelled(recipe: Recipe, num: int) -> Recipe:
  """The same recipe with `num` unlabelled images per step."""
  return _derived(recipe, "with_unlabelled", {"num": num}, batch=recipe.batch._replace(unlabelled=num))


def with_flops_of(recipe: Recipe, other: Recipe) -> Recipe:
  """The same recipe with its number of unlabelled images set to match the compute of a step of `other`.

  Compute is `Recipe.flops`, which is linear in the number of images; the match is to within half an image.

  Raises:
    InputError: the recipe has no unlabelled images, or costs more without any than `other`.
  """
  num = recipe.batch.unlabelled
  if not num:
    raise InputError("compute is matched by unlabelled images, but this recipe has none")
  one, two = (with_unlabelled(recipe, k * num).flops for k in (1, 2))
  matched = round(num * (1 + (other.flops - one) / (two - one)))
  if matched < 1:
    raise InputError("even without unlabelled images, this recipe costs more than the one to match")
  return with_unlabelled(recipe, matched)


def with_frozen(recipe: Recipe, num_layers: int) -> Recipe:
  """The same recipe with the first layers of D frozen (FreezeD, see `steps.freeze_layers`).

  Raises:
    InputError: D has fewer layers, or the number is negative.
  """
  if not num_layers:
    return recipe
  layers = recipe.d.layers(recipe.image_shape)
  if num_layers < 0:
    raise InputError(f"the number of frozen layers must not be negative, as {num_layers} is")
  if num_layers > len(layers):
    raise InputError(f"D has only {len(layers)} layers before its head: {num_layers} cannot be frozen")
  d_tx = steps.freeze_layers(recipe.d_tx, layers[:num_layers])
  return _derived(recipe, "with_frozen", {"num_layers": num_layers}, d_tx=d_tx)


def with_learning_rates(recipe: Recipe, factor: float) -> Recipe:
  """The same recipe with every update of G and D scaled by `factor`; the optimizer states are unaffected.

  For use within a training run: `describe` does not record it.
  """

  def scaled(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
      updates, state = tx.update(updates, state, params)
      return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformation(tx.init, update)

  return dataclasses.replace(recipe, g_tx=scaled(recipe.g_tx), d_tx=scaled(recipe.d_tx))


DERIVATIONS = {
  "supervised_control": supervised_control,
  "without_generator": without_generator,
  "without_augmentation": without_augmentation,
  "with_frozen": with_frozen,
  "with_terms": _with_unknown_terms,
  "with_unlabelled": with_unlabelled,
}
"""Derivations by name, so that a stored run can be rebuilt."""
