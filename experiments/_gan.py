"""What the experiments with generators share: their flags, training, and judging. Not an experiment."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from gan_jax import (
  augment,
  checkpoint,
  data,
  losses,
  metrics,
  networks,
  objectives,
  probe,
  report,
  runs,
  steps,
  train,
)
from gan_jax.types import Generator, InputError, Json, Network

LOSSES = {
  "min_max": losses.min_max,
  "non_saturating": losses.non_saturating,
  "least_squares": losses.least_squares,
  "hinge": losses.hinge,
  "wasserstein": losses.wasserstein,
  "relativistic": losses.relativistic,
}


@dataclass(frozen=True)
class Config(runs.Config):
  """The flags of all experiments with generators."""

  hold_out: int | None = None
  """Training images that no update sees; D is watched on them (default: a twentieth, at most 1,000)."""
  network: Literal["mlp", "conv"] = "conv"
  """mlp: the networks and the optimizer of the source article. conv: a small convolutional pair."""
  loss: Literal["min_max", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"] = (
    "non_saturating"
  )
  """What D and G play for."""
  penalty: Literal["none", "r1", "r2", "r1_r2", "wgan_gp"] | None = None
  """Penalty on D's gradient at real images, generated ones, both, or between (default: the recipe's)."""
  gamma: float | None = None
  """Weight of the penalty (default: the recipe's, 10 for wgan_gp)."""
  norm: Literal["none", "weight", "spectral", "layer", "batch"] | None = None
  """Normalisation in D (default: the recipe's)."""
  real_label: float = 1.0
  """One-sided label smoothing: the probability with which D is to call real images real."""
  augment: Literal["none", "affine", "fixed", "adaptive"] | None = "none"
  """Augmentation of all that D sees: none, a gentle affine map, that and more always (fixed), or as often
  as D overfits (adaptive: ADA)."""
  rotation: float | None = None
  """Weight of the rotation task (default: 1 for images of objects, 0 for signs such as digits)."""
  num_scored: int = 10_000
  """Generated images that are judged at the end; 0: none, and no judge has to be trained."""

  def check(self) -> None:
    super().check()
    recipe = self.recipe()
    if self.loss == "wasserstein" and recipe.penalty != "wgan_gp" and recipe.norm != "spectral":
      raise InputError("--loss wasserstein needs a Lipschitz D: add --penalty wgan_gp or --norm spectral")
    if recipe.norm == "batch" and recipe.penalty != "none":
      raise InputError(
        f"--penalty {recipe.penalty} is a gradient of each image's own, which --norm batch mixes:"
        " choose another norm or --penalty none"
      )
    if recipe.penalty == "none" and self.gamma is not None:
      raise InputError("--gamma is the weight of a penalty and --penalty is none")
    self.check_not_negative("gamma", "rotation")
    if not 0.5 < self.real_label <= 1:
      raise InputError(f"--real-label must be above 0.5 and at most 1, and it is {self.real_label}")
    if self.real_label < 1 and self.loss not in ("min_max", "non_saturating", "least_squares"):
      raise InputError(f"--real-label is a target, which --loss {self.loss} has not: leave it at 1")
    if self.num_scored and self.num_scored < 256:
      raise InputError(f"--num-scored must be at least 256, or 0, and it is {self.num_scored}")

  def augmentation(self) -> str:
    """The kind of augmentation that this run has."""
    return self.augment or "none"

  def recipe(self) -> "Recipe":
    """What the flags that were given make of the network's recipe."""
    recipe = RECIPES[self.network]
    given = {name: getattr(self, name) for name in ("steps", "batch_size", "penalty", "gamma", "norm")}
    if self.penalty == "wgan_gp":
      recipe = dataclasses.replace(recipe, gamma=10.0)
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    # A zero-centred penalty may come seldom; the other is what makes the loss a distance at all.
    return dataclasses.replace(recipe, penalty_every=1) if recipe.penalty == "wgan_gp" else recipe


@dataclass(frozen=True)
class Recipe:
  """What `--network` stands for."""

  steps: int
  batch_size: int
  """Real images and generated images an update."""
  d_learning_rate: float
  g_learning_rate: float
  b1: float
  b2: float
  decay: bool
  """Whether the learning rates fall to zero over the last half of the updates."""
  norm: networks.Norm
  penalty: Literal["none", "r1", "r2", "r1_r2", "wgan_gp"]
  gamma: float
  penalty_every: int
  ema_decay: float


RECIPES = {
  "mlp": Recipe(
    steps=10_000,
    batch_size=100,
    d_learning_rate=2e-4,
    g_learning_rate=2e-4,
    b1=0.9,
    b2=0.999,
    decay=False,
    norm="none",
    penalty="none",
    gamma=1.0,
    penalty_every=1,
    ema_decay=0.999,
  ),
  # Learning rates, width and the weight of R1 were chosen by the distance to the training images.
  "conv": Recipe(
    steps=4000,
    batch_size=64,
    d_learning_rate=3e-3,
    g_learning_rate=3e-3,
    b1=0.0,
    b2=0.99,
    decay=True,
    norm="none",
    penalty="r1",
    gamma=1.0,
    penalty_every=4,
    ema_decay=0.999,
  ),
}


@dataclass(frozen=True)
class Gan:
  """A trained GAN."""

  g: Generator
  d: Network
  data: data.DeviceData
  fit: train.Fit


def objective(
  config: Config, run: runs.Run, make: Callable[..., objectives.Objective] = objectives.gan, **kwargs
) -> objectives.Objective:
  """The flags as an objective of the family `make`; `kwargs` are its own."""
  recipe = config.recipe()
  loss = LOSSES[config.loss]
  if config.real_label < 1:
    loss = losses.smooth(loss, config.real_label)
  return make(
    loss,
    penalty=recipe.penalty,
    gamma=recipe.gamma,
    penalty_every=recipe.penalty_every,
    rotation_weight=rotation_weight(config, run),
    **kwargs,
  )


def rotation_weight(config: Config, run: runs.Run) -> float:
  """The weight that was asked for, or what suits the dataset; `InputError` for images that cannot turn."""
  height, width, _ = run.dataset.image_shape
  if config.rotation is None:
    return float(run.dataset.of_objects and height == width)
  if config.rotation and height != width:
    raise InputError(f"--rotation turns images by 90 degrees, and these are {height}x{width}: use 0")
  return config.rotation


def augmentation(config: Config, run: runs.Run, num_real: int) -> augment.Adaptive | augment.Augment | None:
  """`--augment` for this dataset; mirrors only where they keep the class."""
  affine = augment.affine(shift=0.06, rotate=12.5, scale=0.1, shear=0.15)
  policy = (
    augment.translate(0.125),
    affine,
    augment.brightness_contrast(brightness=0.2, contrast=0.5),
    augment.cutout(0.3),
  )
  if run.dataset.of_objects:
    policy = (augment.flip, *policy)
  kind = config.augmentation()
  if kind in ("none", "affine"):
    return affine if kind == "affine" else None
  if kind == "fixed":
    return augment.chain(*policy)
  # The probability may cross its whole range in a quarter of the run.
  return augment.Adaptive(policy, num_images=max(1, config.recipe().steps * num_real // 4))


def load_judge(run: runs.Run) -> metrics.Judge | None:
  """The judge of the run's dataset, where it is needed."""
  config: Config = run.config  # pyright: ignore[reportAssignmentType]
  return metrics.load_judge(run.dataset, say=runs.say) if config.num_scored else None


def make_networks(
  network: Literal["mlp", "conv"],
  recipe: Recipe,
  image_shape: tuple[int, int, int],
  *,
  num_logits: int = 1,
  num_classes: int = 0,
  num_aux: int = 0,
) -> tuple[Generator, Network]:
  """The generator and the discriminator that `--network` stands for.

  Args:
    network: the flag.
    recipe: gives D's normalisation.
    image_shape: height, width, channels.
    num_logits: K of the discriminator.
    num_classes: that the generator is asked for; 0: it is not asked.
    num_aux: logits of D's further head.
  """
  if network == "mlp":
    g = networks.MLPGenerator(
      image_shape,
      widths=(128, 256),
      latent="normal",
      norm="none",
      activation=networks.leaky_relu,
      num_classes=num_classes,
    )
    d = networks.MLPDiscriminator(
      num_logits,
      widths=(256, 128),
      noise_in=0.0,
      noise_hidden=0.0,
      norm=recipe.norm,
      activation=networks.leaky_relu,
      num_aux=num_aux,
    )
  else:
    g = networks.ConvGenerator(image_shape, width=32, norm="layer", num_classes=num_classes, fine=True)
    d = networks.ConvDiscriminator(num_logits, norm=recipe.norm, num_aux=num_aux)
  return g, d


def learning_rate(recipe: Recipe, peak: float) -> float | optax.Schedule:
  """`peak`, and with the recipe's decay a fall to zero over the last half of the updates."""
  if not recipe.decay:
    return peak
  half = recipe.steps // 2
  return optax.linear_schedule(peak, 0.0, max(1, recipe.steps - half), transition_begin=half)


def adam(recipe: Recipe, peak: float) -> optax.GradientTransformation:
  """The recipe's optimizer."""
  return optax.adam(learning_rate(recipe, peak), b1=recipe.b1, b2=recipe.b2)


def train_gan(
  run: runs.Run,
  objective: objectives.Objective,
  judge: metrics.Judge | None,
  *,
  num_logits: int = 1,
  conditional: bool = False,
  num_lab: int = 0,
  num_unl: int,
) -> Gan:
  """Trains for as many updates as the recipe has, under watch.

  Args:
    run: its config is a `Config`.
    objective: of D and G.
    judge: names the classes of generated images to the watch.
    num_logits: K of the discriminator.
    conditional: whether G is asked for classes.
    num_lab, num_unl: real images an update, with and without labels; so many are generated.
  """
  config: Config = run.config  # pyright: ignore[reportAssignmentType]
  recipe, shape = config.recipe(), run.dataset.image_shape
  g, d = make_networks(
    config.network,
    recipe,
    shape,
    num_logits=num_logits,
    num_classes=run.dataset.num_classes if conditional else 0,
    num_aux=4 if rotation_weight(config, run) else 0,
  )
  g_tx = adam(recipe, recipe.g_learning_rate)
  d_tx = steps.freeze_first(adam(recipe, recipe.d_learning_rate), config.freeze_d)
  seen = augmentation(config, run, num_lab + num_unl)
  train_data = data.to_device(run.dataset, run.split, exclude_labelled=config.exclude_labelled)
  state = steps.init_state(
    jax.random.key(config.seed),
    g,
    d,
    g_tx=g_tx,
    d_tx=d_tx,
    x_init=data.to_float(train_data.x_unl[:500]),
    aux=seen.init() if isinstance(seen, augment.Adaptive) else None,
  )
  state = train.transferred(run, state)
  step = steps.make_step(
    g, d, g_tx=g_tx, d_tx=d_tx, objective=objective, augment=seen, ema_decay=recipe.ema_decay
  )
  with checkpoint.Checkpoints(run.path / "checkpoints") as checkpoints:
    fit = train.fit(
      run,
      "gan",
      state,
      step,
      data.make_draw(num_lab, num_unl, num_lab + num_unl),
      train_data,
      num_steps=recipe.steps,
      checkpoints=checkpoints,
      observe=train.observer(g, d, judge.classify if judge else None),
    )
  return Gan(g, d, train_data, fit)


def sample(gan: Gan, num: int, seed: int, y: np.ndarray | None = None) -> Float[np.ndarray, "n h w c"]:
  """So many images in [0, 1] from the averaged generator, of the classes `y` where it is given."""
  draw = jax.jit(steps.make_sampler(gan.g), static_argnums=2)
  batch, key, rows = min(num, 500), jax.random.key(seed), []
  for i in range(-(-num // batch)):
    classes = () if y is None else (jnp.resize(y[i * batch : (i + 1) * batch], (batch,)),)
    rows.append(np.asarray(draw(gan.fit.state, jax.random.fold_in(key, i), batch, *classes)))
  return np.concatenate(rows)[:num]


def finish(
  run: runs.Run,
  gan: Gan,
  judge: metrics.Judge | None,
  grid: Float[np.ndarray, "n h w c"],
  result: Json,
  table: list[tuple[str, str]],
) -> Json:
  """Judges the generator, probes the discriminator, writes the pictures and completes the result."""
  config: Config = run.config  # pyright: ignore[reportAssignmentType]
  classify = jax.jit(steps.make_classifier(gan.d))
  read = partial(metrics.predict, partial(classify, gan.fit.state))
  _, features_lab = read(np.asarray(gan.data.x_lab))
  logits_test, features_test = read(run.dataset.x_test)
  num_classes = run.dataset.num_classes
  linear = probe.fit_linear(jnp.asarray(features_lab), gan.data.y_lab, num_classes=num_classes)
  probe_logits = np.asarray(linear.logits(jnp.asarray(features_test)))
  probe_error = metrics.error_percent(probe_logits, run.dataset.y_test)
  test_error = None
  if logits_test.shape[-1] == num_classes:  # D was taught the classes
    test_error = metrics.error_percent(logits_test, run.dataset.y_test)
    table = [*table, ("test error of the discriminator as a classifier", f"{test_error:.2f} %")]

  report.sample_grid(run.path / "samples" / "last.png", grid)
  report.learning_curves(run.path / "learning_curves.png", report.read_metrics(run.metrics_path))
  if judge is not None:
    quality = metrics.generator_quality(judge, sample(gan, config.num_scored, config.seed + 1))
    replayed = metrics.replay_quality(judge, run.dataset, min(config.num_scored, len(run.dataset.x_train)))
    (name, distance), (_, replay) = (
      next((key, value) for key, value in found.items() if key.startswith("frechet_"))
      for found in (quality, replayed)
    )
    result = {**quality, "frechet": distance, "frechet_replayed_training_set": replay, **result}
    table = [
      (f"{name}: distance to the test set", f"{distance:.2f}"),
      ("the same of the replayed training set", f"{replay:.2f}"),
      ("classes covered", f"{quality['classes_covered']} of {num_classes}"),
      *table,
    ]
  fit = gan.fit
  result = {
    "interrupted": fit.interrupted,
    "network": config.network,
    "steps": int(fit.state.step),
    "recipe": dataclasses.asdict(config.recipe()),
    "loss": config.loss,
    "real_label": config.real_label,
    "augment": config.augmentation(),
    "rotation": rotation_weight(config, run),
    "seconds_train": round(fit.seconds_train, 1),
    "seconds_compile": round(fit.seconds_compile, 1),
    "updates_per_second": round(int(fit.state.step) / fit.seconds_train, 2),
    "test_error": test_error,
    "supervised_test_error": None,
    "probe_test_error": probe_error,
    "alarms": list(fit.alarms),
    **result,
  }
  table = [
    *table,
    ("test error, linear probe on the discriminator's features", f"{probe_error:.2f} %"),
    *(("watch", alarm) for alarm in fit.alarms),
  ]
  pictures = [("Generated images", "samples/last.png"), ("Learning curves", "learning_curves.png")]
  return runs.finish(run, result, table=table, pictures=pictures)
