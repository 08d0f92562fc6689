"""What the benchmarks share: flags, runs as processes of their own, results. Not a benchmark."""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gan_jax.types import InputError

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, name: str | None) -> argparse.ArgumentParser:
  """A parser with `--name`, the file of results; without a default name it is required."""
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--name", default=name, required=name is None, help=f"of the file of results ({name})"
  )
  return parser


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> None:
  parser.add_argument("--dataset", default=default, help=f"auto, mnist, digits, ... ({default})")
  parser.add_argument("--data-dir", help="where tfds keeps its datasets")
  parser.add_argument("--manual-dir", help="a folder with the dataset's original files")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
  """Whatever follows a bare `--`, as `flags`."""
  parser.add_argument("flags", nargs="*", help="after a bare --: flags of every run")


def positive(text: str) -> int:
  """The type of a flag: a whole number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
  return int(text)


def seconds(text: str) -> float:
  """The type of a flag: a number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
  return value


def run(experiment: str, flags: Sequence[str], workdir: Path, env: Mapping[str, str] | None = None) -> dict:
  """The `result.json` of `python -m experiments.EXPERIMENT FLAGS`; where it is there, nothing is run."""
  path = workdir / "result.json"
  if not path.exists():
    command = [sys.executable, "-m", f"experiments.{experiment}", *flags]
    command += ["--workdir", str(workdir), "--overwrite"]
    process = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=sys.stderr, check=False)
    if process.returncode:
      sys.exit(process.returncode)
  return json.loads(path.read_text())


def finish(name: str, results: Sequence[dict], table: Callable[[Sequence[dict]], str]) -> None:
  """Writes `results/<name>.jsonl`, a line a result, and prints the table."""
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f"{name}.jsonl"
  path.write_text("".join(json.dumps(result) + "\n" for result in results))
  print(f"written to {path}\n{table(results)}")


def cli(main: Callable[[], None]) -> None:
  """Runs `main`; a mistake of the user ends with one sentence and exit code 2."""
  try:
    main()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def environment(result: dict) -> str:
  """Device and versions in a line."""
  versions = result["versions"]
  return f"{result['device']}; Python {versions['python']}, JAX {versions['jax']}, Flax {versions['flax']}"
