"""Generates the tables of README.md and docs/ from the stored results.

python -m benchmarks.tables            rewrites them
python -m benchmarks.tables --check    exits with 2 if one differs

In a page, a table is between the lines `<!-- table: NAME -->` and `<!-- end -->`. Each is a function of
lines of `benchmarks/results`, listed in `TABLES`. Results made with uncommitted changes have a dagger.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import (
  _gan_map,
  _runs,
  augmentation,
  generators,
  networks,
  novelty,
  scaling,
  splits,
  streaming,
  time_to_accuracy,
)
from experiments import _study_tables
from experiments import transfer as transfer_experiment
from gan_jax.types import InputError, Json

ROOT = Path(__file__).parent.parent
DAGGER = "† Made with local changes: the commit that the line names does not hold all of its code."


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="write nothing; exit 2 where a table differs")
  check = parser.parse_args().check
  pages = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
  rewritten = {path: rewrite(text, path.name, check=check) for path, text in pages.items()}
  for path, text in rewritten.items():
    if text != pages[path]:
      path.write_text(text)
      print(f"written to {path.relative_to(ROOT)}")


def rewrite(text: str, page: str, *, check: bool = False) -> str:
  """The text of a page with its tables regenerated.

  Args:
    text: Markdown.
    page: its name, for messages.
    check: whether a table that differs is an error.

  Raises:
    InputError: a table is unknown, a marker has no partner or, with `check`, a table differs.
  """
  out, old, name = [], "", None
  for line in text.splitlines(keepends=True):
    marker = re.fullmatch(r"<!-- (?:table: (.*)|end) -->\n?", line)
    if marker is None:
      if name is None:
        out.append(line)
      old += line
    elif marker[1] is not None and name is not None:
      break
    elif marker[1] is not None:
      name, old = marker[1], ""
      if name not in TABLES:
        raise InputError(f"{page}: there is no table {name}; the tables are {', '.join(TABLES)}")
      out.append(line)
    elif name is None:
      raise InputError(f"{page}: an <!-- end --> without a table before it")
    else:
      table = TABLES[name]()
      new = f"\n{table}\n\n" + (f"{DAGGER}\n\n" if "†" in table else "")
      if check and new != old:
        raise InputError(f"{page}: table {name} differs from the results; run python -m benchmarks.tables")
      out += [new, line]
      name = None
  if name is not None:
    raise InputError(f"{page}: the table {name} has no <!-- end -->")
  return "".join(out)


# --- Classifiers

FEW_LABELS = {
  "mnist-conv-100": "MNIST, conv",
  "digits-conv-50": "digits, conv",
  "mnist-mlp-100": "MNIST, mlp",
  "mnist-mlp-100-longer": "MNIST, mlp",
}
"""File of splits -> data and network."""


def headline(studies: Sequence[tuple[str, int, _runs.Rows, _runs.Rows]]) -> str:
  """One row per dataset: errors with a GAN, without one at equal compute, and from the labels alone.

  The lower of the first two is bold.

  Args:
    studies: description of a dataset, number of labels, the lines of a study and, if it has no arm for
      labels alone, runs of one split each, whose control stands in.
  """
  lines: list[list[str | int]] = []
  used: list[Json] = []
  for name, num_labels, rows, of_splits in studies:
    rows = [row for row in rows if (row["num_labels"], row["reading"]) == (num_labels, "classifier")]
    found = {row["method"]: row for row in rows}
    arms = [found[method] for method in _gan_map.ARMS]
    errors = [_runs.mean_std(row["errors"]) for row in arms]
    lower = int(np.argmin([np.mean(row["errors"]) for row in arms]))
    errors[lower] = f"**{errors[lower]}**"
    if of_splits:
      arms += of_splits
      errors.append(_runs.mean_std([row["supervised_test_error"] for row in of_splits]))
    else:
      arms.append(found["supervised_augmented"])
      errors.append(_runs.mean_std(arms[-1]["errors"]))
    lines.append([name + _runs.mark(*arms), f"{num_labels:,}", len(arms[0]["splits"]), *errors])
    used += arms
  head = "data", "labels", "n", "semi-supervised GAN", "no GAN, equal compute", "labels alone"
  return _runs.with_environment(_runs.markdown(head, lines), used)


def few_labels(files: Mapping[str, _runs.Rows]) -> str:
  """One row per file of splits, in full."""
  lines = []
  for name, rows in files.items():
    gan, control, probe = (_runs.mean_std([row[key] for row in rows]) for key in splits.ERRORS)
    lines.append([FEW_LABELS[name] + _runs.mark(*rows), rows[0]["num_labels"]])
    lines[-1] += [_runs.listed([row["split_seed"] for row in rows]), f"**{gan}**", control, probe]
    lines[-1] += [
      f"{rows[0]['steps']:,}",
      f"{_runs.spread(rows, 'seconds_train')} s, {_runs.device(rows[0])}",
    ]
    lines[-1] += [_runs.spread(rows, "steps_per_second", 1), f"{_runs.spread(rows, 'seconds_total')} s"]
    lines[-1].append(f"{_runs.spread(rows, 'peak_memory_mb')} MB")
  head = "data, network", "labels", "splits", "semi-supervised", "supervised", "linear probe", "steps"
  head += "training", "steps/s", "whole run", "memory"
  return _runs.with_environment(_runs.markdown(head, lines), _all(files))


def budgets(of_study: _runs.Rows) -> str:
  """The default recipe by number of labels."""
  lines, used = [], [row for row in of_study if row["method"] == _gan_map.ARMS[0]]
  used = [row for row in used if row["reading"] == _study_tables.CLASSIFIER]
  used.sort(key=lambda row: row["num_labels"])
  for row in used:
    errors = row["errors"]
    middle = f"{statistics.median(errors):.2f}", f"{max(errors):.2f}"
    lines.append([f"{row['num_labels']}{_runs.mark(row)}", len(errors), f"**{_runs.mean_std(errors)}**"])
    lines[-1] += middle
    lines[-1].append(_runs.listed([f"{error:.2f}" for error in errors]))
    lines[-1].append(f"{row['seconds_train']:,.0f} s, {_runs.device(row)}")
  head = "labels", "n", "mean +- std", "median", "worst", "each split, from 20 on", "training of all n"
  return _runs.with_environment(_runs.markdown(head, lines), used)


def transfer(rows: _runs.Rows) -> str:
  """One row per direction; the gain is positive if transfer lowers the error."""
  lines = []
  for row in rows:
    tuned, scratch = row["fine_tuned_test_errors"], row["scratch_test_errors"]
    gains = transfer_experiment.gains(tuned, scratch)
    interval = _study_tables.interval(_study_tables.compare(scratch, tuned)["interval"])
    lines.append([f"{row['source']} to {row['dataset'].partition('@')[0]}{_runs.mark(row)}"])
    lines[-1] += [
      *map(_runs.mean_std, (tuned, scratch, gains)),
      interval,
      _runs.listed([f"{x:.2f}" for x in gains]),
    ]
  head = "", "transferred", "from scratch", "gain", "95 % interval of the mean gain"
  head += (f"on splits {_runs.listed(rows[0]['split_seeds'])}",)
  return _runs.with_environment(_runs.markdown(head, lines), rows)


def _all(files: Mapping[str, _runs.Rows]) -> _runs.Rows:
  return [row for rows in files.values() for row in rows]


# --- The study


def study(rows: _runs.Rows, references: Sequence[str] | None = None) -> str:
  """Errors of every method and budget, then their differences to these references (default: all)."""
  rows = sorted(rows, key=lambda row: row["num_labels"])
  title = f"mean +- std{_runs.mark(*rows)}"
  cells = _study_tables.summarise(rows, references or _study_tables.REFERENCES)
  tables = _study_tables.overviews(cells, title, references)
  train, compiling = (sum(row.get(key, 0) for row in rows) for key in ("seconds_train", "seconds_compile"))
  note = [f"Splits {_runs.listed(rows[0]['splits'])}.", _study_tables.VERDICTS, _study_tables.WITHIN_TABLE]
  note.append(f"Training took {train:,.0f} s, compilation {compiling:,.0f} s.")
  return _runs.with_environment("\n".join(tables[:-1]), rows, " ".join(note))


def probes(rows: _runs.Rows) -> str:
  """Errors of the probes on each layer of a discriminator."""
  cells, title = _study_tables.summarise(rows), f"mean +- std{_runs.mark(*rows)}"
  found = _study_tables.overview(cells, title, _study_tables.mean, probes=True)
  return "\n".join(_study_tables.table(found))


def _is_plain(row: Json) -> bool:
  flags = row["flags"]
  return flags.get("augment") == "none" or flags.get("augmentation") is False


def tuning(rows: _runs.Rows) -> str:
  """One row per arm; lines whose splits or hyper-parameters differ from the first line's are left out."""
  free = "augmentation", "augment", "budgets", "methods"
  fixed = lambda row: {key: value for key, value in row["flags"].items() if key not in free}
  rows = [row for row in rows if fixed(row) == fixed(rows[0])]
  found = {(row["method"], not _is_plain(row), row["budget"]): row for row in rows}
  columns = list(dict.fromkeys(key[1:] for key in found))
  lines = []
  for method in dict.fromkeys(row["method"] for row in rows):
    arm = [found.get((method, *column)) for column in columns]
    flops = dict.fromkeys(f"{row['mflop_per_step']:.0f}" for row in arm if row and "mflop_per_step" in row)
    lines.append([f"`{method}`", _runs.listed(list(flops))])
    lines[-1] += [f"{_runs.mean_std(row['errors'])}{_runs.mark(row)}" if row else "" for row in arm]
  head = ["arm", "MFLOP a step"]
  head += [
    f"{'augmented' if augmented else 'no augmentation'}, {budget} labels" for augmented, budget in columns
  ]
  return _runs.with_environment(
    _runs.markdown(head, lines), rows, f"Splits {_runs.listed(rows[0]['splits'])}."
  )


WEIGHTS = {
  "gan_augmented": "gamma",
  "mutual_information": "mutual",
  "gan_mixed": "mixed",
  "gan_undecided": "undecided",
  "gan_confident": "confident",
}
"""Arm -> the weight that was tuned, see `study.Weights`."""


def weights(rows: _runs.Rows) -> str:
  """One row per arm, weight and number of steps, with augmentation."""
  rows = [row for row in rows if row["method"] in WEIGHTS and not _is_plain(row)]
  rows = [row for row in rows if row["splits"] == rows[0]["splits"]]
  value_of = lambda row: row["flags"][WEIGHTS[row["method"]]]
  found = {(row["method"], value_of(row), row["steps"], row["budget"]): row for row in rows}
  budgets, lines = sorted({key[-1] for key in found}), []
  for method, name in WEIGHTS.items():
    for value, num_steps in sorted({key[1:3] for key in found if key[0] == method}):
      cells = [found.get((method, value, num_steps, budget)) for budget in budgets]
      lines.append([f"`{method}`", f"{name} {value:g}", f"{num_steps:,}"])
      lines[-1] += [f"{_runs.mean_std(row['errors'])}{_runs.mark(row)}" if row else "" for row in cells]
  head = "arm", "weight", "steps", *(f"{budget} labels" for budget in budgets)
  note = f"Splits {_runs.listed(rows[0]['splits'])}."
  return _runs.with_environment(_runs.markdown(head, lines), rows, note)


def photographs_tuning(rows: _runs.Rows) -> str:
  """One row per pair of networks, one column per augmentation policy."""
  pairs, policies = (dict.fromkeys(row["flags"][name] for row in rows) for name in ("network", "augment"))
  found = {(row["flags"]["network"], row["flags"]["augment"]): row for row in rows}
  lines = [
    [f"`{pair}`", *(_runs.mean_std(found[pair, policy]["errors"]) for policy in policies)] for pair in pairs
  ]
  head = "labels alone", *(f"augmented as {policy}" for policy in policies)
  note = f"{rows[0]['steps']} steps, splits {_runs.listed(rows[0]['splits'])}."
  return _runs.with_environment(_runs.markdown(head, lines), rows, note)


# --- Generators


def few_images(rows: _runs.Rows, distance: str = "frechet", by: str | None = None) -> str:
  """One row per number of images, one column per kind of augmentation.

  Args:
    rows: results of `experiments.mnist_low_data`.
    distance: the distance to show; with that to the test set come the probe's error and the alarms.
    by: a hyper-parameter in which the results differ; each value has its own rows.
  """
  found: dict[tuple[str, ...], dict[str, str]] = {}
  for row in rows:
    for cell in row["cells"].values():
      text = f"{cell[distance]:.2f}"
      if distance == "frechet":
        text += f", {cell['probe_test_error']:.1f} %"
        for alarm in cell["alarms"]:
          text += ", alarm" + "".join(re.findall(r"unseen images( \d+ %)", alarm))
      if cell.get("augmentation_strength") is not None:
        text += f", p = {cell['augmentation_strength']:.2f}"
      value = () if by is None else (f"{cell['recipe']['hparams'][by]:g}",)
      key = (*value, f"{cell['num_images']:,}{_runs.mark(row)}")
      found.setdefault(key, {})[cell["augment"]] = text
  kinds = list(next(iter(found.values())))
  lines = [[*key, *(cells[kind] for kind in kinds)] for key, cells in found.items()]
  head = (*(() if by is None else (by,)), "images", *kinds)
  return _runs.with_environment(_runs.markdown(head, lines), rows)


# --- Speed

PEERS = {"torch_eager": "PyTorch eager", "torch_compile": "PyTorch compiled", "plain_jax": "plain JAX"}


def peers(rows: _runs.Rows) -> str:
  """One row per recipe: steps per second, and the speedup of ours over each peer that took part."""
  there = {row["contender"] for row in rows}
  names, lines = {peer: name for peer, name in PEERS.items() if peer in there}, []
  for name in dict.fromkeys(row["recipe"] for row in rows):
    found = {row["contender"]: row for row in rows if row["recipe"] == name}
    ours = found["ours"]
    lines.append([f"{name} ({'/'.join(map(str, ours['rows']))}){_runs.mark(*found.values())}"])
    lines[-1].append(f"{ours['steps_per_second']['median']:.4g}")
    for row in (found[peer] for peer in names):
      rate = None if "not_run" in row else row["steps_per_second"]["median"]
      lines[-1].append(_speedup(row) if rate is None else f"{rate:.4g} ({_speedup(row)})")
    lines[-1].append(f"{100 * ours['fraction_of_matmul_rate']:.0f} %")
  head = "step (labelled/unlabelled/generated images)", "ours", *names.values(), "of the matrix rate"
  note = f"Medians of {len(rows[0]['rounds'])} rounds."
  return _runs.with_environment(_runs.markdown(head, lines), rows, note)


def batch_sizes(rows: _runs.Rows) -> str:
  """One row per batch size: the speedup of ours over each peer."""
  found = {(row["batch_size"], row["contender"]): row for row in rows}
  lines = []
  for size in dict.fromkeys(row["batch_size"] for row in rows):
    peers = [found[size, peer] for peer in PEERS]
    lines.append([f"{size:,}{_runs.mark(*peers)}", *map(_speedup, peers)])
  note = f"Medians of {len(rows[0]['rounds'])} rounds."
  return _runs.with_environment(_runs.markdown(("batch size", *PEERS.values()), lines), rows, note)


def _speedup(row: Json) -> str:
  return "not run" if "not_run" in row else f"{row['ours_is_faster_by']['median']:.2f}"


def lengths(rows: _runs.Rows, num_labels: int) -> str:
  """The default recipe by number of steps."""
  wanted = {"num_labels": num_labels, "method": _gan_map.ARMS[0], "reading": _study_tables.CLASSIFIER}
  used = sorted((row for row in rows if row | wanted == row), key=lambda row: row["steps"])
  lines = []
  for row in used:
    errors = row["errors"]
    lines.append([f"{row['steps']:,}{_runs.mark(row)}", len(errors), f"**{_runs.mean_std(errors)}**"])
    lines[-1] += [f"{statistics.median(errors):.2f}", f"{max(errors):.2f}"]
    lines[-1].append(f"{sum(error <= 1 for error in errors)}")
  head = "steps", "n", "mean +- std", "median", "worst", "splits at 1 % or below"
  return _runs.with_environment(_runs.markdown(head, lines), used)


def accelerator(rows: _runs.Rows) -> str:
  """Speed of one run, and of several in one program."""
  done, lines = [row for row in rows if "not_run" not in row], []
  for row in done:
    rate, num = row["steps_per_second"]["median"], row["replicates"]
    lines.append([row["recipe"] + _runs.mark(row), num, f"{rate:,.0f}", f"{num * rate:,.0f}"])
    lines[-1].append(f"{row['seconds_first']:.0f} s")
  head = "recipe", "runs in one program", "steps/s", "steps/s of all runs", "compilation"
  return _runs.with_environment(_runs.markdown(head, lines), done)


def other_figures(accuracy: _runs.Rows, starts: _runs.Rows, replicates: _runs.Rows) -> str:
  """One row per figure."""
  lines = []
  for row in accuracy:
    name = f"training to {row['target']:g} % test error, {row['recipe']}, {row['dataset']},"
    end = "" if row["reached"] else f", not reached: {row['test_error']:.2f} %"
    end += f", after {row['seconds_compile']:.0f} s of compilation" if row["seconds_compile"] else ""
    lines.append([f"{name} {row['num_labels']} labels, split {row['split_seed']}{_runs.mark(row)}"])
    lines[-1].append(f"{row['seconds']:.0f} s, {row['steps']:,} steps{end}")
  for network in dict.fromkeys(row["network"] for row in starts):
    used = [row for row in starts if row["network"] == network]
    times = [
      [row["seconds_to_first_step"] for row in used if row["time"] == t] for t in ("first", "second")
    ]
    first, second = (f"{statistics.median(values):.1f} s" for values in times)
    lines.append(
      [f"start of Python to the first step, {network}, median of {len(times[0])}{_runs.mark(*used)}"]
    )
    lines[-1].append(f"{first}; with the compilation cache {second}")
  for row in replicates:
    if "ours_is_faster_by" in row:
      name = f"{row['replicates']} replicates of {row['recipe']} in one program, {row['strategy']}"
      lines.append(
        [name + _runs.mark(row), f"{row['ours_is_faster_by']['median']:.1f} times as long as one"]
      )
  rows = [*accuracy, *starts, *replicates]
  return _runs.with_environment(_runs.markdown(("", "measured"), lines), rows)


# --- All of them


def _files(names: Sequence[str]) -> dict[str, _runs.Rows]:
  return {name.rpartition("/")[2]: _runs.read(f"{name}.jsonl") for name in names}


def _lines(*names: str) -> list[Json]:
  return [row for name in names for row in _runs.read(name)]


def _map() -> dict[str, _runs.Rows]:
  return _files([f"map/{path.stem}" for path in sorted((_runs.RESULTS / "map").glob("*.jsonl"))])


TABLES: dict[str, Callable[[], str]] = {
  "headline": lambda: headline(
    [
      ("MNIST", 100, _lines("map/mnist-augmentation-10000.jsonl"), _lines("mnist-conv-100.jsonl")),
      ("CIFAR-10, as JPEGs", 250, _lines("map/cifar10_jpeg@32-augmentation-20000.jsonl"), []),
      ("CIFAR-10, as JPEGs", 4000, _lines("map/cifar10_jpeg@32-augmentation-20000.jsonl"), []),
      ("photographs of hands, 64x64", 100, _lines("sign_digits@64.jsonl"), []),
      ("digits of 8x8 pixels", 50, _lines("label_study-digits.jsonl"), []),
    ]
  ),
  "few-labels": lambda: few_labels(_files(list(FEW_LABELS))),
  "budgets": lambda: budgets(_lines("map/mnist-augmentation-10000.jsonl")),
  "lengths": lambda: lengths(
    _lines(
      "map/mnist-augmentation-1500.jsonl", "mnist-lengths.jsonl", "map/mnist-augmentation-10000.jsonl"
    ),
    100,
  ),
  "transfer": lambda: transfer(_lines("transfer-digits-mnist.json", "transfer-mnist-digits.json")),
  "map": lambda: _gan_map.table(_map()),
  "mnist-plain": lambda: study(
    _lines("map/mnist-no-augmentation-1500.jsonl"), ("fixmatch_ema@matched", "vat@matched")
  ),
  "mnist-plain-long": lambda: study(
    _lines("map/mnist-no-augmentation-10000.jsonl"), ("fixmatch_ema@matched", "vat@matched")
  ),
  "tuning": lambda: tuning(_lines("tuning/digits.jsonl")),
  "weights": lambda: weights(_lines("tuning/digits.jsonl", "tuning/digits-weights.jsonl")),
  "foreign": lambda: novelty.table(_lines("novelty.jsonl")),
  "cifar10": lambda: study(_lines("map/cifar10_jpeg@32-augmentation-5000.jsonl")),
  "cifar10-long": lambda: study(_lines("map/cifar10_jpeg@32-augmentation-20000.jsonl")),
  "photographs": lambda: study(_lines("map/sign_digits@32-augmentation-400.jsonl")),
  "photographs-64": lambda: study(_lines("sign_digits@64.jsonl")),
  "photographs-conv": lambda: study(_lines("sign_digits-100.jsonl")),
  "photographs-tuning": lambda: photographs_tuning(_lines("tuning/sign_digits.jsonl")),
  "bfloat16": lambda: study(_lines("bfloat16-digits.jsonl")),
  "digits": lambda: study(
    _lines("label_study-digits.jsonl"), ("supervised_augmented", "fixmatch_ema@matched")
  ),
  "probes": lambda: probes(_lines("label_study-digits.jsonl")),
  "generators": lambda: generators.table(_lines("generators.jsonl"), _lines("article-2-cores.json")),
  "few-images": lambda: few_images(_lines("mnist_low_data.json")),
  "few-images-colour": lambda: few_images(_lines("cifar10-few-images.jsonl")),
  "few-images-gamma": lambda: few_images(_lines("mnist-gamma.jsonl"), "frechet_to_training_set", "gamma"),
  "networks": lambda: networks.table(_lines("networks.jsonl")),
  "streaming": lambda: streaming.table(_lines("streaming.jsonl")),
  "peers": lambda: peers(_lines("step_time.jsonl")),
  "peers-accelerator": lambda: peers(_lines("step_time-h200-peers.jsonl")),
  "batch-sizes": lambda: batch_sizes(_lines("batch_sizes.jsonl")),
  "augmentation": lambda: augmentation.table(_lines("augmentation.jsonl")),
  "race": lambda: time_to_accuracy.table(_lines("time_to_1_percent.jsonl")),
  "other-figures": lambda: other_figures(
    _lines("time_to_accuracy.jsonl"),
    _lines("startup.jsonl"),
    _lines(
      *(f"replicates_{name}.jsonl" for name in ("loop", "vmap", "16", "conv_loop", "conv_vmap")),
    ),
  ),
  "accelerator": lambda: accelerator(_lines("step_time-h200.jsonl")),
  "scaling": lambda: scaling.table(_lines("scaling.jsonl")),
}
"""Name -> its Markdown."""


if __name__ == "__main__":
  _runs.cli(main)
