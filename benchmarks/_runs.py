"""Shared by the benchmarks: flags, runs in separate processes, results. Not a benchmark."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gan_jax import output
from gan_jax.types import InputError, Json

Rows = Sequence[Json]
"""Lines of results."""
RESULTS = Path(__file__).parent / "results"
NAMES = {
  "update": "recipe",
  "updates": "steps",
  "updates_per_second": "steps_per_second",
  "how": "strategy",
  "seconds_to_first_update": "seconds_to_first_step",
}
"""Keys of older lines -> current keys, as far as the tables use them; README.md lists them all."""


class Parser(argparse.ArgumentParser):
  """Refuses to replace an existing file of results, before anything is measured, without `--overwrite`."""

  def parse_args(self, *args: Any, **kwargs: Any) -> Any:
    found = super().parse_args(*args, **kwargs)
    path = RESULTS / f"{found.name}.jsonl"
    if path.exists() and not found.overwrite:
      self.error(f"{path} exists: choose another --name, or pass --overwrite to replace it")
    return found


def parser(doc: str | None, name: str | None) -> argparse.ArgumentParser:
  """A parser with `--name`, the results file, which is required if there is no default."""
  parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  of = "of the file of results"
  parser.add_argument(
    "--name", default=name, required=name is None, help=of if name is None else f"{of} ({name})"
  )
  parser.add_argument("--overwrite", action="store_true", help="replace an existing file of results")
  return parser


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> None:
  parser.add_argument("--dataset", default=default, help=f"auto, mnist, digits, ... ({default})")
  parser.add_argument("--data-dir", help="where tfds keeps its datasets")
  parser.add_argument("--manual-dir", help="a folder with the dataset's original files")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
  """Adds `flags`: everything after a bare `--`."""
  parser.add_argument("flags", nargs="*", help="after a bare --: flags of every run")


def positive(text: str) -> int:
  """Flag type: a whole number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
  return int(text)


def seconds(text: str) -> float:
  """Flag type: a number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
  return value


def run(experiment: str, flags: Sequence[str], workdir: Path, env: Mapping[str, str] | None = None) -> dict:
  """The `result.json` of `python -m experiments.EXPERIMENT FLAGS`; an existing complete result is reused.

  Raises:
    InputError: the existing run had other flags.
  """
  path, asked = workdir / "result.json", workdir / "benchmark.json"
  if not path.exists() or json.loads(path.read_text())["interrupted"]:
    command = [sys.executable, "-m", f"experiments.{experiment}", *flags]
    command += ["--workdir", str(workdir), "--overwrite"]
    process = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=sys.stderr, check=False)
    if process.returncode:
      sys.exit(process.returncode)
    output.write_json(asked, [experiment, *flags])
  elif not asked.exists() or json.loads(asked.read_text()) != [experiment, *flags]:
    raise InputError(
      f"{workdir} holds a run with other flags: remove it, or name another folder with --runs"
    )
  return json.loads(path.read_text())


def read(name: str) -> list[Json]:
  """The lines of `results/<name>`, `.jsonl` or one object in `.json`, with current keys.

  Raises:
    InputError: there is no such file, or a line of it is not JSON.
  """
  path = RESULTS / name
  if not path.exists():
    raise InputError(f"{path} does not exist")
  rows = [json.loads(path.read_text())] if path.suffix == ".json" else output.read_rows(path)
  return [_today({NAMES.get(key, key): value for key, value in row.items()}) for row in rows]


def _today(row: Json) -> Json:
  if row.get("strategy") == "loop":
    row["strategy"] = "sequential"
  if "method" in row and "reading" not in row:
    row["reading"] = "classifier"
  return row


def finish(name: str, results: Sequence[dict], table: Callable[[Sequence[dict]], str]) -> None:
  """Writes `results/<name>.jsonl`, one line per result, and prints the table."""
  path = RESULTS / f"{name}.jsonl"
  output.write_bytes(path, "".join(json.dumps(result) + "\n" for result in results).encode())
  print(f"written to {path}\n{table(results)}")


def cli(main: Callable[[], None]) -> None:
  """Runs `main`; a user error is reported in one sentence, with exit code 2."""
  try:
    main()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def device(result: dict) -> str:
  """The device; older lines say "1 cores"."""
  return re.sub(r"\b1 cores", "1 core", result["device"])


def software(result: dict) -> str:
  """Versions, those of PyTorch for its own lines."""
  versions = result["versions"]
  if "torch" in versions:
    return f"PyTorch {versions['torch'].partition('+')[0]} under Python {versions['python']}"
  return f"Python {versions['python']}, JAX {versions['jax']}, Flax {versions['flax']}"


def with_environment(table: str, rows: Rows, note: str = "") -> str:
  """The table, then the note and the devices, versions and commits of its lines, without repeats."""
  rows = sorted(rows, key=lambda row: "torch" in row["versions"])
  found = [device(row) for row in rows] + [software(row) for row in rows]
  found += [f"commit `{_commit(row).removesuffix('-dirty')}`{mark(row)}" for row in rows]
  return f"{table}\n\n{f'{note} '.lstrip()}{'; '.join(dict.fromkeys(found))}."


def mark(*rows: Json) -> str:
  """A dagger if any of the lines was made with uncommitted changes, or outside a checkout."""
  return "†" if any(_commit(row).endswith(("-dirty", "unknown")) for row in rows) else ""


def _commit(row: Json) -> str:
  return row["commit"] or "unknown"


def mean_std(values: Sequence[float]) -> str:
  """Mean and standard deviation; for fewer than three values, the values themselves."""
  if len(values) < 3:
    return listed([f"{value:.2f}" for value in values])
  return f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}"


def spread(rows: Rows, key: str, digits: int = 0) -> str:
  """Smallest and largest value."""
  values = [row[key] for row in rows]
  return " to ".join(dict.fromkeys(f"{value:,.{digits}f}" for value in (min(values), max(values))))


def listed(values: Sequence[object]) -> str:
  return ", ".join(map(str, values))
