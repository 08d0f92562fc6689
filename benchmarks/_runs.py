"""What the benchmarks share: a run as a process of its own, and its result. Not a benchmark."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gan_jax.types import InputError

RESULTS = Path(__file__).parent / "results"


def run(experiment: str, flags: Sequence[str], workdir: Path) -> dict:
  """The `result.json` of `python -m experiments.EXPERIMENT FLAGS`; where it is there, nothing is run."""
  if not (workdir / "result.json").exists():
    command = [sys.executable, "-m", f"experiments.{experiment}", *flags]
    process = subprocess.run([*command, "--workdir", str(workdir), "--overwrite"], check=False)
    if process.returncode:
      sys.exit(process.returncode)
  return json.loads((workdir / "result.json").read_text())


def write(name: str, results: Sequence[dict]) -> None:
  """Writes `results/<name>.jsonl`, a line a run."""
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f"{name}.jsonl"
  path.write_text("".join(json.dumps(result) + "\n" for result in results))
  print(f"written to {path}")


def cli(main: Callable[[], None]) -> None:
  """Runs `main`; a mistake of the user ends with one sentence and exit code 2."""
  try:
    main()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def arguments(ours_and_theirs: Sequence[str]) -> tuple[list[str], list[str]]:
  """The flags before and after a bare `--`."""
  flags = list(ours_and_theirs)
  at = flags.index("--") if "--" in flags else len(flags)
  return flags[:at], flags[at + 1 :]


def environment(result: dict) -> str:
  """Device and versions in a line."""
  versions = result["versions"]
  return f"{result['device']}; Python {versions['python']}, JAX {versions['jax']}, Flax {versions['flax']}"
