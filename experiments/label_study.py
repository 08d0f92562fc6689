"""Does the GAN help, and by how much? Every method on the same splits, over one network and budget.

  python -m experiments.label_study --dataset digits                  four budgets, ten splits, all methods
  python -m experiments.label_study --dataset mnist --budgets 100     10 labels a class of MNIST
  python -m experiments.label_study --dataset digits --tune --splits 100 101 102 --vat 0.5

All methods share the discriminator, the optimizer, the batches and the number of updates, all but
`supervised` the augmentation, and those that see unlabelled images the balance of classes; they differ in
the rest of their objective. `gan_augmented` trains its generator before, for as many updates again, on all
images. All splits of one method and budget are trained together in one compiled program. The unlabelled
images are all training images, labelled ones included. What is read is the last update's averaged
parameters, on the test set, once, in `_test_errors`. Hyper-parameters are tuned with --tune: it reports on
training images held out, on splits that no result is reported on.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from experiments import _methods, mnist_ssgan
from gan_jax import augment, data, metrics, parallel, probe, report, runs, steps
from gan_jax.types import Generator, InputError, Json, LabelSplit, Network, TrainState

REFERENCES = ("supervised_augmented", "pseudo_label")
"""What every method is compared with, split by split: labels alone, and all images without a GAN."""


@dataclass(frozen=True)
class Config(_methods.Config):
  """The flags of this experiment."""

  labels_per_class: int | None = None
  """Leave it alone: --budgets says how many labels each training sees."""
  budgets: tuple[int | Literal["all"], ...] = (20, 50, 100, 200)
  """Labels in total, a multiple of the number of classes, or all."""
  splits: tuple[int, ...] = tuple(range(10))
  """Seeds of the label splits: below 100 to report, from 100 on to tune."""
  methods: tuple[_methods.Name, ...] = get_args(_methods.Name)
  """What to train. gan_consistency brings probes on every layer of its discriminator."""
  tune: bool = False
  """Hold out a third of the training images, at most 10,000, and report on them, not on the test set."""

  def check(self) -> None:
    super().check()
    if self.labels_per_class is not None or self.split_seed != 0:
      raise InputError("the study chooses the labels: use --budgets and --splits")
    for name in ("num_images", "init_from", "tensorboard"):
      if getattr(self, name):
        raise InputError(
          f"--{name.replace('_', '-')} is not for the study: its methods share all but the loss"
        )
    if self.hold_out != 0 or self.exclude_labelled:
      raise InputError(
        "the splits share their images: --hold-out and --exclude-labelled are not for the study"
      )
    for name in ("budgets", "splits", "methods"):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise InputError(f"--{name} must name at least one, and none twice")
    self.check_not_negative("splits")
    if self.tune and min(self.splits) < 100:
      raise InputError("--tune is for split seeds from 100 on: results are reported on those below")
    if not self.tune and max(self.splits) >= 100:
      raise InputError("split seeds from 100 on are for tuning: add --tune, or use --splits below 100")


def main(config: Config) -> Json:
  """Trains every method on every budget and all splits; returns what `result.json` holds."""
  with runs.open_run(config, "label_study") as run:
    if config.tune:
      run = dataclasses.replace(run, dataset=_without_test_set(run.dataset, config.seed))
      runs.say(run.dataset.note)
    splits = {budget: _splits(run, budget) for budget in config.budgets}
    study = Study(run)
    path = run.path / "study.jsonl"
    rows = report.read_metrics(path) if config.resume else []
    if path.exists():
      report.write_bytes(path, _lines(rows))  # without a line that was cut off
    todo = [(b, m) for b in config.budgets for m in config.methods if not _is_in(rows, b, m)]
    for i, (budget, method) in enumerate(todo):
      found = study.cell(method, splits[budget])
      for row in found:
        row["budget"] = budget
      rows += found
      with open(path, "ab") as file:
        file.write(_lines(found))  # the method's own line is the last: with it the cell is complete
      mean, seconds = np.mean(found[-1]["errors"]), found[-1]["seconds_train"]
      runs.say(f"{i + 1}/{len(todo)}  {budget} labels, {method}: {mean:.2f} %, {seconds:.0f} s")

    cells = summarise(rows)
    report.write_bytes(run.path / "study.md", markdown(cells, run).encode())
    curves: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
      if "," not in cell["method"]:  # the probes would hide the rest
        curves.setdefault(cell["method"], {})[cell["num_labels"]] = cell["errors"]
    half_an_image = 50 / len(run.dataset.x_test)
    where = "held-out error" if config.tune else "test error"
    report.label_curves(run.path / "study.png", curves, smallest=half_an_image, ylabel=f"{where}, %")
    result = {
      "interrupted": False,
      **dict.fromkeys(("num_labels", "label_split_sha256", "split_seed")),  # each cell has its own
      "num_images": len(run.dataset.x_train),
      "network": config.network,
      "steps": study.recipe.steps,
      "recipe": dataclasses.asdict(study.recipe),
      "tune": config.tune,
      "splits": list(config.splits),
      "seconds_train": round(sum(row.get("seconds_train", 0.0) for row in rows), 1),
      "test_error": None,
      "supervised_test_error": None,
      "probe_test_error": None,
      "cells": cells,
    }
    table = [(f"{cell['budget']} labels, {cell['method']}", _in_words(cell)) for cell in cells]
    return runs.finish(run, result, table=table, pictures=[("Errors over labels", "study.png")])


def _lines(rows: Sequence[Json]) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _is_in(rows: Sequence[Json], budget: int | str, method: str) -> bool:
  return any((row["budget"], row["method"]) == (budget, method) for row in rows)


def _without_test_set(dataset: data.Dataset, seed: int) -> data.Dataset:
  """Training images in the place of the test set, which is then out of reach."""
  order = np.random.default_rng(seed).permutation(len(dataset.x_train))
  num = min(10_000, len(order) // 3)
  kept, held_out = np.sort(order[num:]), np.sort(order[:num])
  note = f"tuning: errors are those on {num} training images held out, not on the test set"
  return dataclasses.replace(
    dataset,
    x_train=dataset.x_train[kept],
    y_train=dataset.y_train[kept],
    x_test=dataset.x_train[held_out],
    y_test=dataset.y_train[held_out],
    note=f"{dataset.note} {note}".strip(),
  )


def _splits(run: runs.Run, budget: int | str) -> list[LabelSplit]:
  """The splits of a budget, each written to a file of its own."""
  config: Config = run.config  # pyright: ignore[reportAssignmentType]
  per_class, dataset = None, run.dataset
  if isinstance(budget, int):
    per_class, rest = divmod(budget, dataset.num_classes)
    if rest or per_class < 1:
      raise InputError(f"--budgets {budget} is not a multiple of the {dataset.num_classes} classes")
    fewest = int(np.bincount(dataset.y_train, minlength=dataset.num_classes).min())
    if per_class > fewest:
      raise InputError(f"--budgets {budget}: a class has but {fewest} training images; use all")
  splits = [data.split_labels(dataset.y_train, per_class, seed) for seed in config.splits]
  for split in splits:
    content = {
      "dataset": dataset.name,
      "note": dataset.note,
      "sha256": split.sha256,
      "seed": split.seed,
      "per_class": per_class,
      "indices": list(split.indices),
      "unlabelled_includes_labelled": True,
      "num_images": len(split.images),
    }
    report.write_json(run.path / "splits" / f"{budget}-{split.seed}.json", content)
  return splits


# --- Training


class Study:
  """What all cells share: the networks, the recipe, the methods, and the compiled programs."""

  def __init__(self, run: runs.Run):
    config: Config = run.config  # pyright: ignore[reportAssignmentType]
    self.run, dataset = run, run.dataset
    small = min(dataset.image_shape[:2]) < 16
    self.recipe = _methods.make_recipe(config, few=len(dataset.x_train) < 10_000)
    self._d, self._g, self._g_conditional = _methods.make_networks(config.network, dataset, small)
    norm = np.linalg.norm(dataset.x_train.reshape(len(dataset.x_train), -1) / 255, axis=-1).mean()
    self._methods = _methods.make_methods(config, self.recipe, float(norm))
    self._txs = {
      "g_tx": mnist_ssgan.adam(self.recipe, self.recipe.g_learning_rate),
      "d_tx": mnist_ssgan.adam(self.recipe, self.recipe.learning_rate),
    }
    self._fit_probes, self._read = make_readings(self._d, dataset.num_classes)
    self._environment = {"dataset": dataset.name, "network": config.network, **run.environment}
    self._programs: dict[tuple[str, int], Callable] = {}

  def cell(self, name: str, splits: Sequence[LabelSplit]) -> list[Json]:
    """Trains a method on all splits; a line a reading of its discriminator, the classifier's own last."""
    num_labels = len(splits[0].indices)
    repeats = 1000 // num_labels if 1000 % num_labels == 0 else 1  # one program for all of these
    together = data.to_device_splits(self.run.dataset, splits, repeats=repeats)
    key = jax.random.key(self.run.config.seed)
    keys = [jax.random.fold_in(key, split.seed) for split in splits]
    states, seconds, last = self._train(name, self._methods[name], keys, together)
    for split, loss in zip(splits, last["d/loss"], strict=True):
      if not np.isfinite(loss):
        runs.say(f"{name} on split {split.seed} broke down: its loss is not finite")
    probes = self._fit_probes(states, together, float(repeats)) if name == "gan_consistency" else {}
    errors = _test_errors(self.run.dataset, self._read, states, probes)
    shared = {
      "num_labels": num_labels,
      "splits": [split.seed for split in splits],
      "sha256": [split.sha256 for split in splits],
      "steps": self.recipe.steps,
      **self._environment,
    }
    own = {
      "errors": errors.pop(""),
      **seconds,
      "last": {
        metric: [float(v) if np.isfinite(v) else None for v in values] for metric, values in last.items()
      },
    }
    readings = {f"{name}, {reading}": {"errors": found} for reading, found in errors.items()}
    return [{"method": key, **shared, **row} for key, row in {**readings, name: own}.items()]

  def _train(
    self, name: str, method: _methods.Method, keys: Sequence[Array], together: data.DeviceData
  ) -> tuple[TrainState, dict[str, float], dict[str, np.ndarray]]:
    """The replicates' last states, seconds in all, and means of the last metrics, `[S]` each."""
    recipe = self.recipe
    g = self._g_conditional if method.conditional else self._g
    x_init = data.to_float(together.x_unl[:500])
    states = parallel.stack([steps.init_state(key, g, self._d, **self._txs, x_init=x_init) for key in keys])
    before = {"seconds_train": 0.0, "seconds_compile": 0.0}
    if method.before is not None:
      made, before, _ = self._train(f"{name}/generator", method.before, keys, together)
      states = states.replace(g=states.g.replace(params=made.ema["g"], model_state=made.g.model_state))
    states, together = parallel.place(states, together)
    dispatch = min(100, recipe.steps)
    begin = time.perf_counter()
    program = self._program(name, method, g, dispatch, states, together)
    compiled = time.perf_counter()
    history, num = {}, 0
    for done in range(0, recipe.steps, dispatch):
      num = min(dispatch, recipe.steps - done)
      states, history = program(states, together, np.int32(num))
    last = {metric: np.asarray(values)[:, :num].mean(axis=1) for metric, values in history.items()}
    seconds = {
      "seconds_train": round(before["seconds_train"] + time.perf_counter() - compiled, 2),
      "seconds_compile": round(before["seconds_compile"] + compiled - begin, 2),
    }
    return states, seconds, last

  def _program(
    self,
    name: str,
    method: _methods.Method,
    g: Generator,
    dispatch: int,
    states: TrainState,
    together: data.DeviceData,
  ) -> Callable:
    """`(states, data, num) -> (states, metrics)`, compiled once for each size of the labelled set."""
    case = name, together.y_lab.shape[1]
    if case not in self._programs:
      recipe = self.recipe
      step = steps.make_step(
        g,
        self._d,
        **self._txs,
        objective=method.objective,
        augment=augment.affine(**recipe.strong) if method.augmented and recipe.strong else None,
        ema_decay=recipe.ema_decay,
      )
      num_unl = recipe.batch_unl if method.uses_unlabelled else 0
      draw = data.make_draw(recipe.batch_lab, num_unl, recipe.batch_fake if method.uses_generated else 0)
      updates = parallel.replicate(steps.make_updates(step, draw, max_updates=dispatch))
      program = jax.jit(updates, donate_argnums=0).lower(states, together, np.int32(0)).compile()
      self._programs[case] = program
    return self._programs[case]


# --- Reading


def make_readings(d: Network, num_classes: int) -> tuple[Callable, Callable]:
  """Builds what reads trained discriminators, replicate by replicate.

  Returns:
    `fit(states, data, repeats) -> probes`, a linear and a nearest-neighbour classifier on every layer
    from the labelled images, each of which is there `repeats` times, and
    `read(states, probes, x) -> {reading: classes [S, N]}`, where "" is D itself.
  """
  classify, layers = steps.make_classifier(d), probe.make_layers(d)

  def features(state: TrainState, x: Array) -> dict[str, Array]:
    one = lambda x: {name: h[0] for name, h in layers(state, data.to_float(x)[None]).items()}
    return jax.lax.map(one, x, batch_size=min(1000, len(x)))

  def fit_one(state: TrainState, x_lab: Array, y_lab: Array, repeats: float) -> PyTree:
    # So many copies of each image, and a penalty as many times as heavy, are the same problem.
    linear = partial(probe.fit_linear, num_classes=num_classes, l2=repeats)
    found = features(state, x_lab).items()
    return {name: (linear(h, y_lab), probe.fit_nearest(h, y_lab)) for name, h in found}

  def read_one(state: TrainState, probes: PyTree, x: Array) -> dict[str, Int[Array, "n"]]:
    one = lambda x: classify(state, data.to_float(x)[None])[0][0].argmax(axis=-1)
    found = {"": jax.lax.map(one, x, batch_size=min(1000, len(x)))}
    if probes:
      for name, h in features(state, x).items():
        linear, nearest = probes[name]
        found[f"linear probe, {name}"] = linear.logits(h).argmax(axis=-1)
        found[f"nearest neighbour, {name}"] = nearest.classes(h)
    return found

  def fit(states: TrainState, together: data.DeviceData, repeats: float) -> PyTree:
    return jax.lax.map(
      lambda each: fit_one(each[0], each[1], each[2], repeats), (states, together.x_lab, together.y_lab)
    )

  read = lambda states, probes, x: jax.lax.map(lambda each: read_one(each[0], each[1], x), (states, probes))
  return jax.jit(fit), jax.jit(read)


def _test_errors(
  dataset: data.Dataset, read: Callable, states: TrainState, probes: PyTree
) -> dict[str, list[float]]:
  """Error of each replicate under each reading, in percent: the one place that touches the test set."""
  classes = read(states, probes, jnp.asarray(dataset.x_test))
  wrong = {name: np.asarray(found) != dataset.y_test[None] for name, found in classes.items()}
  return {name: (100 * each.mean(axis=1)).tolist() for name, each in wrong.items()}


# --- Statistics


def summarise(rows: Sequence[Json]) -> list[Json]:
  """Each row with its spread and its paired differences to `REFERENCES`, where they were trained."""
  by_name = {(row["budget"], row["method"]): row for row in rows}
  cells = []
  for (budget, method), row in by_name.items():
    against = {
      name: _json(metrics.paired(row["errors"], by_name[budget, name]["errors"]))
      for name in REFERENCES
      if name != method and (budget, name) in by_name
    }
    cells.append({**row, **_json(metrics.spread(row["errors"])), "against": against})
  return cells


def _json(found: metrics.Spread | metrics.Difference) -> Json:
  interval = found.interval and list(found.interval)
  return {**found._asdict(), "interval": interval}


def _in_words(cell: Json) -> str:
  verdicts = "".join(f"; against {name}: {found['verdict']}" for name, found in cell["against"].items())
  return f"{_mean(cell)} %{verdicts}"


def markdown(cells: Sequence[Json], run: runs.Run) -> str:
  """Tables: all methods and budgets in short, then each budget in full."""
  names = [name for name in REFERENCES if any(name in cell["against"] for cell in cells)]
  budgets = list(dict.fromkeys(cell["budget"] for cell in cells))
  lines = [f"# Error in percent on {run.dataset.name}", ""]
  lines += _overview(cells, budgets, "mean +- std", _mean)
  for name in names:
    lines += _overview(
      cells, budgets, f"less {name}", lambda c, name=name: _difference(c["against"].get(name))
    )
  head = ["method", "mean +- std", "95 % interval", "median", "best", "worst", "over twice the median"]
  head += [f"less {name}" for name in names]
  for budget in budgets:
    rows = [
      [
        cell["method"],
        _mean(cell),
        _interval(cell["interval"]),
        *(f"{cell[key]:.2f}" for key in ("median", "best", "worst")),
        f"{100 * cell['failure_rate']:.0f} %",
        *(_difference(cell["against"].get(name)) for name in names),
      ]
      for cell in cells
      if cell["budget"] == budget
    ]
    lines += [f"## {budget} labels", "", *_table(head, rows)]
  splits = ", ".join(str(seed) for seed in cells[0]["splits"])
  lines.append(f"Splits {splits}. Unlabelled images include the labelled ones. {run.dataset.note}".strip())
  return "\n".join(lines) + "\n"


def _overview(
  cells: Sequence[Json], budgets: Sequence[int | str], title: str, entry: Callable[[Json], str]
) -> list[str]:
  """A row a method, a column a budget; without the probes."""
  found = {(cell["method"], cell["budget"]): entry(cell) for cell in cells}
  methods = [name for name in dict.fromkeys(cell["method"] for cell in cells) if "," not in name]
  rows = [[name, *(found.get((name, budget), "") for budget in budgets)] for name in methods]
  return _table([title, *(f"{budget} labels" for budget in budgets)], [row for row in rows if any(row[1:])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
  return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def _mean(cell: Json) -> str:
  return f"{cell['mean']:.2f} +- {cell['std']:.2f}"


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
  return "" if interval is None else f"{interval[0]:{sign}.2f} to {interval[1]:{sign}.2f}"


def _difference(found: Json | None) -> str:
  if found is None:
    return ""
  return f"{found['mean']:+.2f} ({_interval(found['interval'], '+')}): {found['verdict']}"


if __name__ == "__main__":
  # A device a core: on CPU small networks train faster beside each other than on all cores in turn.
  jax.config.update("jax_num_cpu_devices", runs.num_cores())
  runs.cli(main, Config)
