"""The main task: a classifier from few labels and many images, its controls, and their evaluation.

Runs as `python -m gan_jax train` on your own data, and as `experiments.mnist_ssgan` on benchmarks.
"""

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gan_jax import (
  checkpoint,
  cli,
  data,
  evaluate,
  figures,
  memory,
  metrics,
  output,
  processes,
  recipes,
  report,
  report_sections,
  results,
  run_dir,
  train,
)
from gan_jax.dataset import Dataset
from gan_jax.evaluate import Evaluation
from gan_jax.output import say
from gan_jax.recipes import Recipe, policies, ssgan
from gan_jax.types import InputError, Json, LabelSplit, TrainState

_NUM_SCORED = 10_000
"""The most generated images for a Frechet distance."""
FILES = (
  *run_dir.TRAINING_FILES,
  "samples",
  "learning_curves.png",
  "confusion.png",
  "reliability.png",
  "supervised",
  "folds",
)


@dataclass(frozen=True)
class Config:
  """The flags of this task."""

  data: cli.DataFlags = cli.DataFlags()
  stream: cli.StreamFlags = cli.StreamFlags()
  images: cli.ImageFlags = cli.ImageFlags()
  labels: cli.LabelFlags = cli.LabelFlags()
  train: cli.TrainFlags = cli.TrainFlags()
  network: ssgan.Tuned | None = None
  """conv: small convolutional pair with augmentation and consistency. vgg: a deeper one. resnet: a wide
  residual pair. mlp: the pair of Improved GAN. (None: vgg for colour pictures of at least 32x32, conv
  for other images, mlp for vectors.)"""
  augment: policies.Name | None = None
  """Augmentation of D's inputs. digits: affine maps with a black border. photos: wider ones that mirror the
  picture beyond its edge, colour changes and cutout. objects: that with mirror images, if they keep their
  class. (None: photos or objects for colour, digits for grey images, none for mlp.)"""
  objective: cli.ObjectiveFlags = cli.ObjectiveFlags()
  vat: float | None = None
  """Weight of virtual adversarial training, 0 for none (None: 1 with --augment none, in place of
  consistency; otherwise, and for mlp, 0)."""
  folds: int = 5
  """Without test images: number of folds of the cross-validation over the labels that estimates the error,
  each as long as the training itself; 0: no estimate."""
  frechet: bool = False
  """Also measure the Frechet distance of generated images to the test set."""
  transfer: cli.TransferFlags = cli.TransferFlags()
  loop: cli.LoopFlags = cli.LoopFlags()
  processes: cli.ProcessFlags = cli.ProcessFlags()
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    cli.not_negative(self, "folds", "vat")
    if self.folds == 1:
      raise InputError(
        "--folds must be at least 2, or 0 for none: a single fold would leave out every label"
      )
    if self.frechet and self.objective.adversarial == 0:
      raise InputError(
        "--frechet needs a generator, but --adversarial 0 trains none: leave one of them out"
      )
    if self.processes.coordinator is not None and self.run.workdir is None:
      raise InputError("several processes need --workdir, a folder that all of them share")
    run_dir.check_source(self.run, self.transfer)


def main(config: Config, *, name: str = "train") -> Json:
  """Trains the semi-supervised GAN and its control; returns the contents of `result.json`."""
  dataset = cli.load(config.data, config.stream, needs_test=config.frechet)
  if config.frechet and dataset.workers is not None:
    raise InputError("--frechet needs all training images in memory: leave it out, or pass --stream no")
  if config.frechet and dataset.of_vectors:
    raise InputError("--frechet needs images, but these are vectors: leave it out")
  num_scored = min(_NUM_SCORED, len(dataset.x_train))  # as in mnist_gan: distances depend on the number
  if config.frechet:
    memory.check(num_scored, dataset.image_shape, "leave --frechet out", num_bytes=8)
  split = cli.split_labels(dataset, config.labels, config.images)
  recipe = make_recipe(config, dataset, split)
  control, afresh = recipes.supervised_control(recipe), recipe
  recipe = recipes.with_frozen(recipe, config.transfer.freeze_d)
  used = {"semi-supervised": recipe, "supervised": control}
  devices = cli.devices(config.loop.devices, recipe)
  with run_dir.open_run(name, config, dataset, split, recipes_used=used, files=FILES) as run:
    folds = _folds(dataset, split, config.folds)
    _announce(run, recipe, split, len(folds))
    if folds and config.transfer.init_from:
      say(
        "the folds start from scratch, not from --init-from: that run may have seen their left-out labels"
      )
    extractor = evaluate.load_feature_extractor(dataset) if config.frechet else None
    images = data.to_device(dataset, split, exclude_labelled=config.labels.exclude_labelled)
    fits = _fit(run, config, recipe, control, images, devices)
    del images  # each fold has its own
    if not processes.writes():  # the first process does the rest
      return {"interrupted": fits[0].interrupted}
    if folds:
      stopped = any(fit.interrupted for fit in fits)
      found = [] if stopped else cross_validate(config, dataset, (afresh, control), folds, run.path)
      measured_on = f"labelled images, each left out once in {len(folds)} folds"
    else:
      found, measured_on = _read_test_set(recipe, dataset, split, fits), report.TEST_IMAGES
    quality = {}
    if extractor is not None:
      quality = evaluate.generator_quality(
        extractor, recipe, fits[0].state, dataset, num_scored, seed=run.seed
      )
    errors = {
      "test_error": found[0].error if found else None,
      "supervised_test_error": found[1].error if found[1:] else None,
      "probe_test_error": found[0].linear["features"] if found else None,
    }
    if found and dataset.of_vectors:
      errors["input_probe_test_error"] = found[0].linear["input"]
    result = {
      **results.training(fits[0]),
      "interrupted": any(fit.interrupted for fit in fits) or bool(folds and not found),
      "rollbacks": [rollback for fit in fits for rollback in fit.rollbacks],
      "network": recipe.hparams.network,
      "recipe": recipes.describe(recipe),
      "supervised_seconds_train": round(fits[1].seconds_train, 1) if fits[1:] else None,
      **errors,
      "error_from": measured_on if found else None,
      **(evaluate.describe(found[0], dataset.class_names) if found else {}),
      **quality,
    }
    table = [(f"test error, {NAMES[key]}", _percent(error)) for key, error in errors.items()]
    table += [("measured on", measured_on)] if folds and found else []
    if extractor is not None:
      name = extractor.metric(num_scored)
      table.append((f"{name}: distance to the test set", f"{quality[name]:.2f}"))
    shown, sections = _pictures(run, recipe, fits[0].state, found, split, measured_on)
    return results.finish(run, result, table=table, pictures=shown, sections=sections)


NAMES = {
  "test_error": "semi-supervised: few labels and all images",
  "supervised_test_error": "supervised: the same labels, no other images",
  "probe_test_error": "linear probe on the discriminator's features",
  "input_probe_test_error": "linear probe on the vectors themselves",
}
"""The classifier behind each error of `result.json`."""


def _percent(error: float | None) -> str:
  return "not measured" if error is None else f"{error:.2f} %"


def make_recipe(config: Config, dataset: Dataset, split: LabelSplit) -> Recipe:
  """The recipe tuned for this number of training images, with the given flags applied."""
  hparams = ssgan.for_data(
    dataset.x_train,
    dataset.y_train[list(split.indices)],
    dataset.num_classes,
    num_images=len(split.images),
    network=config.network,
    policy=config.augment,
    mirror=dataset.of_objects,
    num_steps=config.train.steps,
    num_unlabelled=config.train.batch_size,
    precision=config.train.precision,
    **config.objective.hparams,
    vat=config.vat,
  )
  return ssgan.build(hparams, dataset.image_shape, dataset.num_classes)


def cross_validate(
  config: Config,
  dataset: Dataset,
  trained: Sequence[Recipe],
  folds: Sequence[tuple[LabelSplit, np.ndarray]],
  workdir: Path,
) -> list[Evaluation]:
  """Trains each recipe anew for every fold and evaluates it on the labelled images that it leaves out.

  The results of each fold are stored in `workdir/folds`; a stored fold is not trained again.

  Returns:
    One evaluation per recipe, over all left-out images; empty if Ctrl-C interrupted it.
  """
  evaluate_fold, parts = evaluate.make_evaluate(trained[0], of_input=dataset.of_vectors), []
  for i, (split, out) in enumerate(folds):
    x_out: Any = data.Chosen(dataset.x_train, out)  # a stream reads them on access
    left_out = dataclasses.replace(dataset, x_test=x_out, y_test=dataset.y_train[out])
    path = workdir / "folds" / f"{i + 1}-of-{len(folds)}.npz"
    if stored := _stored_fold(path, left_out):
      parts.append(stored)
      continue
    images, states = None, []  # without the images of the last fold
    images = data.to_device(dataset, split, exclude_labelled=config.labels.exclude_labelled)
    for recipe in trained:
      name, key = f"fold {i + 1} of {len(folds)}", jax.random.key(config.train.seed)
      verbose, on_nonfinite = recipe is trained[0], config.loop.on_nonfinite
      fit = train.fit(recipe, images, key, phase=name, verbose=verbose, on_nonfinite=on_nonfinite)
      if fit.interrupted:
        return []
      states.append(fit.state)
    parts.append(evaluate_fold(left_out, states, [data.labelled(dataset, split)] * len(states)))
    path.parent.mkdir(exist_ok=True)
    linear = {name: np.array([found.linear[name] for found in parts[-1]]) for name in parts[-1][0].linear}
    output.write_cache(path, {"logits": np.stack([found.logits for found in parts[-1]]), **linear})
  every = data.Chosen(dataset.x_train, np.concatenate([out for _, out in folds]))
  return [evaluate.pooled(found, every) for found in zip(*parts, strict=True)]


def _fit(
  run: run_dir.Run,
  config: Config,
  recipe: Recipe,
  control: Recipe,
  images: data.DeviceData,
  devices: Sequence[jax.Device],
) -> list[train.Fit]:
  """Trains the recipe and then, in the first process and unless interrupted, the control."""
  logged = {
    "workdir": run.path,
    "tensorboard": config.loop.tensorboard,
    "on_nonfinite": config.loop.on_nonfinite,
  }
  fit = train.fit(
    recipe,
    images,
    jax.random.key(run.seed),
    phase="semi-supervised",
    resume=config.run.resume,
    checkpoint_every=config.loop.steps_between_checkpoints(recipe.num_steps),
    start=run_dir.start_from(config.transfer, recipe, run.dataset.class_names),
    diagnose=recipe.has_generator,
    class_names=run.dataset.class_names,
    class_prior=data.class_prior(images.y_lab, run.dataset.num_classes),
    snapshot=_snapshot(run, recipe) if _draws_images(recipe, run.dataset) else None,
    devices=devices,
    **logged,
  )
  if fit.interrupted or not processes.writes():
    return [fit]
  return [fit, _fit_control(run, control, images, logged)]


def _draws_images(recipe: Recipe, dataset: Dataset) -> bool:
  """Whether a generator is trained whose samples can be viewed as images."""
  return recipe.has_generator and not dataset.of_vectors


def _read_test_set(
  recipe: Recipe, dataset: Dataset, split: LabelSplit, fits: Sequence[train.Fit]
) -> list[Evaluation]:
  """Evaluations of the recipe and of the control, if it was fully trained; none without test images."""
  if not len(dataset.x_test):
    return []
  states = [fits[0].state, *(control.state for control in fits[1:] if not control.interrupted)]
  labelled = [data.labelled(dataset, split)] * len(states)
  return evaluate.make_evaluate(recipe, of_input=dataset.of_vectors)(dataset, states, labelled)


def _fit_control(run: run_dir.Run, control: Recipe, images: data.DeviceData, logged: Json) -> train.Fit:
  """Trains the control once: a resumed run of one process restores the final state that it saved."""
  with checkpoint.Checkpoints(run.path / "supervised") as kept:
    alone = jax.process_count() == 1  # Orbax saves with all processes, and only the first is here
    done = alone and kept.latest_step is not None
    fit = train.fit(
      control,
      images,
      jax.random.key(run.seed),
      phase="supervised",
      checkpoint_every=None,
      start=kept.restore if done else None,
      **logged,
    )
    if done:
      return dataclasses.replace(fit, rollbacks=tuple(kept.extra.get("rollbacks", ())))
    if alone and not fit.interrupted:
      kept.save(fit.state, {"rollbacks": fit.rollbacks})
  return fit


def _snapshot(run: run_dir.Run, recipe: Recipe) -> Callable[[TrainState], None]:
  """Writes the images generated from ten fixed latents at the current step."""

  def snapshot(state: TrainState) -> None:
    x_fake = evaluate.sample(recipe, state, 10, seed=run.seed)
    figures.sample_grid(run.path / "samples" / f"step-{int(state.step):07}.png", x_fake)

  return snapshot


def _on_the_way(run: run_dir.Run) -> list[report.Section]:
  """The images of `_snapshot` in step order."""
  paths = sorted((run.path / "samples").glob("step-*.png"))
  found = [report.Picture(path, f"step {int(path.stem.removeprefix('step-')):,}") for path in paths]
  text = "The same ten latents at ten points in training."
  return [report.Section("Samples during training", text=text, pictures=found)] if found else []


def _pictures(
  run: run_dir.Run,
  recipe: Recipe,
  state: TrainState,
  found: Sequence[Evaluation],
  split: LabelSplit,
  measured_on: str,
) -> tuple[list[tuple[str, str]], list[report.Section]]:
  """Writes the pictures of a run; returns those at the top of its page, and the page's sections."""
  shown, sections = [], []
  if _draws_images(recipe, run.dataset):
    x_fake = evaluate.sample(recipe, state, 100, seed=run.seed)
    figures.sample_grid(run.path / "samples" / "last.png", x_fake)
    shown.append(("Generated images", "samples/last.png"))
  if found:
    first, names = found[0], run.dataset.class_names
    figures.confusion(run.path / "confusion.png", first.confusion, names)
    figures.reliability_diagram(run.path / "reliability.png", metrics.reliability(first.probs, first.y))
    dataset, in_folds = run.dataset, measured_on != report.TEST_IMAGES
    sections = report_sections.sections(
      run.path,
      first,
      names,
      *data.labelled(dataset, split),
      measured_on=measured_on,
      image_names=dataset.names_train if in_folds else dataset.names_test,
      visible=not dataset.of_vectors,
    )
  sections += _on_the_way(run)
  figures.learning_curves(run.path / "learning_curves.png", output.read_rows(run.metrics_path))
  curves = [report.Picture(run.path / "learning_curves.png")]
  return shown, [*sections, report.Section("Learning curves", pictures=curves)]


def _stored_fold(path: Path, left_out: Dataset) -> list[Evaluation] | None:
  """The stored results of a fold, one evaluation per recipe; None if they are missing or damaged."""
  try:
    with np.load(path) as file:
      linear = dict(file)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return None
  x, y, found = left_out.x_test, left_out.y_test, []
  for i, logits in enumerate(linear.pop("logits")):
    errors = metrics.error_percent(logits, y), {name: float(each[i]) for name, each in linear.items()}
    found.append(Evaluation(*errors, {}, logits, y, x, np.arange(len(y))))
  return found


def _folds(dataset: Dataset, split: LabelSplit, num: int) -> list[tuple[LabelSplit, np.ndarray]]:
  """The folds of the cross-validation; none if there are test images or a class has a single label."""
  if len(dataset.x_test) or not num:
    return []
  counts = np.bincount(dataset.y_train[list(split.indices)], minlength=dataset.num_classes)
  if counts.min() < 2:
    rare = dataset.class_names[counts.argmin()]
    say(f"no error is estimated: there are no test images, and class {rare} has a single label")
    return []
  return data.folds(dataset.y_train, split, min(num, int(counts.min())))


def _announce(run: run_dir.Run, recipe: Recipe, split: LabelSplit, num_folds: int) -> None:
  """Prints what the run will do."""
  dataset = run.dataset
  size = output.shape_text(dataset.image_shape)
  of = f"vectors of {dataset.image_shape[1]:,} numbers" if dataset.of_vectors else f"images of {size}"
  measured = f"{len(dataset.x_test):,} test" if len(dataset.x_test) else "no test"
  say(
    f"{dataset.name}: {len(split.images):,} {of}, {len(split.indices):,} of them labelled"
    f" ({dataset.num_classes} classes), {len(split.held_out):,} held out, {measured} images"
  )
  balance, num = getattr(recipe.hparams, "class_balance", ()), recipe.batch.unlabelled
  if any(balance) and num < dataset.num_classes:
    say(
      f"class balance compares {num} unlabelled images a step with {dataset.num_classes:,} classes, which"
      " blurs predictions: raise --batch-size, or add --class-balance 0 0"
    )
  again = f", and the same for each of {num_folds} folds of cross-validation" if num_folds else ""
  say(
    f"network {recipe.hparams.network}, {recipe.num_steps:,} steps, then {recipe.num_steps:,} for the"
    f" supervised control{again}; writing to {run.path}"
  )
