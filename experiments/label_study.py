"""Does the GAN help, and by how much? Every method on the same splits, with the same network and budget.

  python -m experiments.label_study --dataset digits                  four budgets, ten splits, all methods
  python -m experiments.label_study --dataset mnist --budgets 100     10 labels per class of MNIST
  python -m experiments.label_study --dataset digits --methods gan_consistency gan_consistency@bfloat16
  python -m experiments.label_study --dataset digits --tune --splits 100 101 102 --vat 0.5

All methods share the discriminator, the optimizer, the batches, the number of steps and, for each split,
the initial parameters and the batch keys. All except `supervised` share the augmentation, and those that
use unlabelled images share class balance or, in AdaMatch, distribution alignment. The rest of the
objective differs, see `gan_jax.recipes.study`. Arms named `@matched` are methods without a generator at
matched compute: they get more unlabelled images per step (VAT fewer), so that a step costs as much as one
of `gan_consistency` by XLA's operation counts, which are listed beside the errors; `gan_vat@matched`,
which has a generator too, only on request. Arms named `@bfloat16`, also on request, compute products and
convolutions in bfloat16, and are compared with themselves in float32. `gan_augmented` first trains its
generator, for the same number of steps, on all images. `label_spreading` and `self_training` are
scikit-learn's, on pixels.

All splits of one method and budget, a cell, are trained together in one compiled program. The unlabelled
images are all training images, including the labelled ones. The averaged parameters of the last step are
evaluated on the test set, once. Budgets, splits and methods are stored before the first evaluation; a
resumed run keeps them, and goes on within a cell at its last thousand steps. Hyper-parameters are tuned
with --tune: it reports on held-out training images, on splits that no result is reported on, and appends
its lines to benchmarks/results/tuning.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Array

from experiments import _study_tables
from gan_jax import (
  checkpoint,
  cli,
  data,
  datasets,
  evaluate,
  figures,
  networks,
  output,
  overwrite,
  parsing,
  program,
  provenance,
  recipes,
  replicates,
  results,
  run_dir,
)
from gan_jax.datasets import Dataset
from gan_jax.output import say
from gan_jax.recipes import Recipe, policies, ssgan, study
from gan_jax.types import InputError, Json, LabelSplit, TrainState

FILES = ("splits", "checkpoints", "study.jsonl", "study.md", "study.png")
STEPS_PER_DISPATCH, STEPS_PER_CHECKPOINT = 100, 1000
Pixels = Literal["label_spreading", "self_training"]
Matched = Literal["fixmatch_ema@matched", "adamatch@matched", "vat@matched"]
OnRequest = Literal[
  "gan_vat@matched",
  "gan_consistency@bfloat16",
  "fixmatch_ema@bfloat16",
  "supervised_augmented@bfloat16",
]
Arm = study.Method | Matched | Pixels | OnRequest
ARMS: tuple[Arm, ...] = (*get_args(study.Method), *get_args(Matched), *get_args(Pixels))
TUNING = Path(__file__).parent.parent / "benchmarks" / "results" / "tuning"


@dataclass(frozen=True)
class Config:
  """The flags of this experiment."""

  data: cli.DataFlags = cli.DataFlags()
  budgets: tuple[int | Literal["all"], ...] = (20, 50, 100, 200)
  """Total number of labels, a multiple of the number of classes, or all."""
  splits: tuple[int, ...] = tuple(range(20, 30))
  """Seeds of the label splits: below 100 for reporting, from 100 for tuning."""
  methods: tuple[Arm, ...] = ARMS
  """Methods to train. gan_consistency adds probes on every layer of its discriminator."""
  tune: bool = False
  """Hold out a third of the training images, at most 10,000, and report on them instead of the test set."""
  train: cli.TrainFlags = cli.TrainFlags()
  network: ssgan.Tuned | None = None
  """The pair of networks, as in mnist_ssgan; for images below 16x16, conv is a smaller pair, conv_small
  (None: vgg for colour pictures of at least 32x32, else conv)."""
  augment: policies.Name | None = None
  """Augmentation of D's inputs, see mnist_ssgan. With none, consistency and the mean teacher only enforce
  the same class under D's own noise, of which the mlp has much and the others none (None: photos or
  objects for colour, digits for grey images)."""
  objective: cli.ObjectiveFlags = cli.ObjectiveFlags()
  """The terms are those of the methods that have them. --consistency also weighs AdaMatch; --adversarial is
  not for bad_generator and gan_augmented, --class-balance not for AdaMatch."""
  weights: study.Weights = study.Weights()
  vat_epsilon: float = ssgan.VAT_EPSILON
  """Norm of the virtual adversarial perturbation, relative to the mean norm of the images."""
  run: cli.RunFlags = cli.RunFlags()

  def check(self) -> None:
    cli.not_negative(self, "vat_epsilon")
    cli.not_negative(self.weights, *vars(self.weights))
    for name in ("budgets", "splits", "methods"):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise InputError(f"--{name} must name at least one, without repetition")
    cli.not_negative(self, "splits")
    if self.tune and min(self.splits) < 100:
      raise InputError("--tune needs --splits of 100 or more: lower seeds are for reporting")
    if not self.tune and max(self.splits) >= 100:
      raise InputError("split seeds of 100 or more are for tuning: add --tune, or use --splits below 100")


def main(config: Config) -> Json:
  """Trains every method on every budget and all splits; returns the contents of `result.json`."""
  dataset = cli.load(config.data, needs_test=not config.tune)
  if config.tune:
    dataset = datasets.for_tuning(dataset, config.train.seed)
  splits = {budget: split_labels(dataset, budget, config.splits) for budget in config.budgets}
  used = make_arms(config, dataset)
  with run_dir.open_run("label_study", config, dataset, None, recipes_used=used, files=FILES) as run:
    for budget in config.budgets:
      for split in splits[budget]:
        stored = {"dataset": dataset.name, "note": dataset.note, **run_dir.describe_split(split)}
        output.write_json(run.path / "splits" / f"{budget}-{split.seed}.json", stored)
    path = run.path / "study.jsonl"
    rows = output.read_rows(path, ("budget", "method", "reading")) if config.run.resume else []
    if path.exists():
      output.write_bytes(path, _lines(rows))  # drops a truncated line
    done = {(row["budget"], row["method"]) for row in rows if row["reading"] == _study_tables.CLASSIFIER}
    todo = [(b, m) for b in config.budgets for m in config.methods if (b, m) not in done]
    train = Study(dataset, run.path / "checkpoints", seed=config.train.seed)
    for i, (budget, method) in enumerate(todo):
      shared = {"budget": budget, "method": method, "network": network(config, dataset), **run.environment}
      found = [shared | row for row in train.cell(method, used.get(method), splits[budget])]
      rows += found
      if config.tune and TUNING.is_dir():  # first: no tuning stays unrecorded
        with open(tuning_file(dataset), "ab") as file:
          about = {"flags": parsing.flags_of_recipe(config), "note": dataset.note}
          file.write(_lines([about | found[-1]]))
      with open(path, "ab") as file:
        file.write(_lines(found))  # the classifier's line comes last: it completes the cell
      overwrite.remove(run.path, ["checkpoints"])
      mean, seconds = np.mean(found[-1]["errors"]), found[-1]["seconds_train"]
      say(f"{i + 1}/{len(todo)}  {budget} labels, {method}: {mean:.2f} %, {seconds:.0f} s")

    overwrite.remove(run.path, ["checkpoints"])  # those that a kill left behind
    cells = _study_tables.summarise(rows)
    tables = _study_tables.markdown(cells, dataset)
    output.write_text(run.path / "study.md", tables)
    errors: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
      if cell["reading"] == _study_tables.CLASSIFIER:  # the probes would hide the rest
        errors.setdefault(cell["method"], {})[cell["num_labels"]] = cell["errors"]
    half_an_image = 50 / len(dataset.x_test)
    where = "held-out error" if config.tune else "test error"
    figures.errors_of_methods(run.path / "study.png", errors, smallest=half_an_image, xlabel=f"{where}, %")
    result = {
      "interrupted": False,
      "network": network(config, dataset),
      "steps": max((recipe.num_steps for recipe in used.values()), default=0),
      "recipes": {name: recipes.describe(recipe) for name, recipe in used.items()},
      "tune": config.tune,
      "splits": list(config.splits),
      "seconds_train": round(sum(row.get("seconds_train", 0.0) for row in rows), 1),
      "cells": cells,
    }
    table = _study_tables.overview(cells, f"{where}, %", _study_tables.mean)  # study.md has the rest
    return results.finish(run, result, table=table, pictures=[("Errors of each split", "study.png")])


def tuning_file(dataset: Dataset) -> Path:
  """Where --tune appends its lines: named like the dataset, in characters that any system takes."""
  name = dataset.name.removeprefix("folder:").removeprefix("arrays:")
  return TUNING / f"{re.sub('[:/]', '_', name)}.jsonl"


def make_arms(config: Config, dataset: Dataset) -> dict[str, Recipe]:
  """The recipes of the methods that have one.

  `@matched` arms need as much compute as `gan_consistency`; `@bfloat16` arms have that precision.
  """
  arms: dict[str, Recipe] = {}
  gan = None
  for name in config.methods:
    if name not in get_args(Pixels):
      method, _, change = name.partition("@")
      given = {"precision": change} if change in get_args(networks.Precision) else {}
      arms[name] = make_recipe(config, dataset, method, **given)  # pyright: ignore[reportArgumentType]
      if change == "matched":
        gan = gan or make_recipe(config, dataset, "gan_consistency")
        arms[name] = recipes.with_flops_of(arms[name], gan)
  return arms


def make_recipe(config: Config, dataset: Dataset, method: study.Method, **changes: Any) -> Recipe:
  """The recipe of a method, with the given flags and these changes to its hyper-parameters applied."""
  given: dict[str, Any] = cli.given(
    num_steps=config.train.steps,
    num_unlabelled=config.train.batch_size,
    precision=config.train.precision,
    vat_epsilon=config.vat_epsilon * data.mean_norm(dataset.x_train),
    **vars(config.weights),
    **config.objective.hparams,
  )
  given |= changes
  shape = dataset.image_shape
  policy = config.augment or policies.suited(shape, mirror=dataset.of_objects)
  hparams = study.tuned(network(config, dataset), len(dataset.x_train), min(shape[:2]), method, policy)
  return study.build(dataclasses.replace(hparams, **given), dataset.image_shape, dataset.num_classes)


def network(config: Config, dataset: Dataset) -> ssgan.Tuned:
  """The pair of networks that all methods share."""
  suited = networks.suited(dataset.image_shape)
  return config.network or ("vgg" if suited == "vgg" else "conv")


def split_labels(dataset: Dataset, budget: int | str, seeds: Sequence[int]) -> list[LabelSplit]:
  """The splits of a budget, one per seed.

  Raises:
    InputError: the budget is not a multiple of the number of classes, or a class has too few labels.
  """
  per_class = None
  if isinstance(budget, int):
    per_class, rest = divmod(budget, dataset.num_classes)
    if rest or per_class < 1:
      raise InputError(f"--budgets {budget} is not a multiple of the {dataset.num_classes} classes")
    labels = dataset.y_train[dataset.y_train >= 0]
    fewest = int(np.bincount(labels, minlength=dataset.num_classes).min())
    if per_class > fewest:
      raise InputError(
        f"--budgets {budget} needs {per_class} labels per class, but one has {fewest}: use fewer, or all"
      )
  return [data.split_labels(dataset.y_train, per_class, seed) for seed in seeds]


def _lines(rows: Sequence[Json]) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- Training


class Study:
  """Trains cells, each a method and a budget, and caches the compiled programs that they share.

  A cell that takes long is saved in `checkpoints` as it goes on, and continues from there.
  """

  def __init__(self, dataset: Dataset, checkpoints: Path, *, seed: int):
    self._dataset, self._checkpoints, self._seed = dataset, checkpoints, seed
    self._programs: dict[tuple[str, int], replicates.Program] = {}
    self._evaluate: dict[tuple[str, bool], Callable] = {}

  def cell(self, method: str, recipe: Recipe | None, splits: Sequence[LabelSplit]) -> list[Json]:
    """Trains on all splits; returns one row per reading of the discriminator, the classifier's last."""
    num_labels = len(splits[0].indices)
    shared = {
      "dataset": self._dataset.name,
      "num_labels": num_labels,
      "splits": [split.seed for split in splits],
      "sha256": [split.sha256 for split in splits],
    }
    if recipe is None:
      begin = time.perf_counter()
      errors = [pixel_error(method, self._dataset, split) for split in splits]
      seconds = {"seconds_train": round(time.perf_counter() - begin, 2), "seconds_compile": 0.0}
      return [{"reading": _study_tables.CLASSIFIER, **shared, "errors": errors, **seconds}]
    mflop = round(recipe.flops / 1e6, 1)  # before the training, as it can fail
    repeats = 1000 // num_labels if 1000 % num_labels == 0 else 1  # these sizes share one program
    images = data.to_device_splits(self._dataset, splits, repeats=repeats)
    # All methods start from the same parameters and see the same batches: one key per split.
    keys = [jax.random.fold_in(jax.random.key(self._seed), split.seed) for split in splits]
    fit = self.train(method, num_labels, recipe, keys, images)
    for split, loss in zip(splits, fit.metrics["d/loss"], strict=True):
      if not np.isfinite(loss):
        say(f"{method} diverged on split {split.seed}: its loss is not finite")
    readings = self._read(recipe, fit.states, splits, every_layer=method == "gan_consistency")
    shared |= {
      "steps": recipe.num_steps,
      "images_per_step": recipe.batch._asdict(),
      "mflop_per_step": mflop,
    }
    rows = [{"reading": name, **shared, "errors": errors} for name, errors in readings.items()]
    rows[-1] |= {"seconds_train": fit.seconds_train, "seconds_compile": fit.seconds_compile}
    finite = lambda values: [float(v) if np.isfinite(v) else None for v in values]
    rows[-1]["last"] = {metric: finite(values) for metric, values in fit.metrics.items()}
    return rows

  def train(
    self, method: str, num_labels: int, recipe: Recipe, keys: Sequence[Array], images: data.DeviceData
  ) -> replicates.Fit:
    """Trains a method, and before it the generator that it starts from, if any."""
    name, case = f"{num_labels} labels, {method}", (method, images.y_lab.shape[1])
    generator = study.generator_of(recipe)

    def from_generator(states: TrainState) -> replicates.Fit:
      assert generator is not None
      made = self.train(f"{method}'s generator", num_labels, generator, keys, images)
      g = states.g.replace(params=made.states.ema["g"], model_state=made.states.g.model_state)
      return made._replace(states=states.replace(g=g))

    fit = replicates.fit(
      recipe,
      images,
      keys,
      name=name,
      workdir=self._checkpoints / name,
      start=from_generator if generator else None,
      program=self._programs.get(case),
      steps_per_dispatch=STEPS_PER_DISPATCH,
      checkpoint_every=STEPS_PER_CHECKPOINT,
    )
    self._programs[case] = fit.program
    return fit

  def _read(
    self, recipe: Recipe, states: TrainState, splits: Sequence[LabelSplit], *, every_layer: bool
  ) -> dict[str, list[float]]:
    """Errors in percent of each replicate under each reading; the classifier's come last."""
    case = recipe.hparams.precision, every_layer  # otherwise the methods have the same discriminator
    if case not in self._evaluate:
      self._evaluate[case] = evaluate.make_evaluate(recipe, every_layer=every_layer)
    labelled = [data.labelled(self._dataset, split) for split in splits]
    averages = jax.device_get(checkpoint.averages(states))  # if sharded, each device would do all the work
    each = [jax.device_put(replicates.pick(averages, i)) for i in range(len(splits))]
    found = self._evaluate[case](self._dataset, each, labelled)
    readings: dict[str, list[float]] = {}
    if every_layer:
      for layer in found[0].linear:
        readings[f"linear probe, {layer}"] = [each.linear[layer] for each in found]
        readings[f"nearest neighbour, {layer}"] = [each.nearest[layer] for each in found]
    readings[_study_tables.CLASSIFIER] = [each.error for each in found]
    return readings


def pixel_error(name: str, dataset: Dataset, split: LabelSplit) -> float:
  """Test error in percent of scikit-learn's semi-supervised classifiers on pixels."""
  from sklearn.linear_model import LogisticRegression
  from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

  flat = lambda x: x.reshape(len(x), -1) / np.float32(255)
  y, labelled = np.full(len(dataset.y_train), -1), list(split.indices)
  y[labelled] = dataset.y_train[labelled]
  classifier: Any = LabelSpreading(kernel="knn", max_iter=100)
  if name == "self_training":
    classifier = SelfTrainingClassifier(LogisticRegression(max_iter=1000))
  with np.errstate(invalid="ignore"):  # for images that no label reaches through neighbours
    classifier.fit(flat(dataset.x_train), y)
    return evaluate.error_of(lambda x: classifier.predict(flat(x)), dataset)


if __name__ == "__main__":
  # One device per core: on CPU, small networks train faster side by side than each in turn on all cores.
  jax.config.update("jax_num_cpu_devices", provenance.num_cores())
  program.run(main, Config)
