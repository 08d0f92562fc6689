"""How long until it moves: seconds from the start of the process to the first update, twice.

python -m benchmarks.startup
python -m benchmarks.startup --networks mlp --repeats 5 -- --dataset digits

First: with an empty compilation cache. Second: with what the first has left there. Everything after the
bare `--` goes to `python -m experiments.mnist_ssgan`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import _runs


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="+", choices=("conv", "mlp"), default=["conv", "mlp"])
  parser.add_argument("--repeats", type=int, default=3, help="pairs of starts (3)")
  parser.add_argument("--name", default="startup", help="name of the file of results (startup)")
  ours, flags = _runs.arguments(sys.argv[1:])
  args = parser.parse_args(ours)
  if args.repeats < 1:
    parser.error("--repeats must be at least 1")

  results = []
  for network in args.networks:
    for _ in range(args.repeats):
      with tempfile.TemporaryDirectory() as folder:
        for time in ("first", "second"):
          results.append({"benchmark": "startup", "time": time, **start(network, flags, Path(folder))})
  _runs.write(args.name, results)
  print(table(results))


def start(network: str, flags: list[str], folder: Path) -> dict:
  """The result of a run of one update with the compilation cache in `folder`."""
  command = [sys.executable, "-m", "experiments.mnist_ssgan", "--network", network, "--steps", "1"]
  command += [*flags, "--workdir", str(folder / "run"), "--overwrite"]
  environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
  process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
  if process.returncode:
    sys.exit(process.returncode)
  return json.loads((folder / "run" / "result.json").read_text())


def table(results: list[dict]) -> str:
  """Markdown: a row a network and time."""
  lines = ["| network | time | to the first update | of that, compiling |", "|---" * 4 + "|"]
  for network, time in dict.fromkeys((result["network"], result["time"]) for result in results):
    rows = [result for result in results if (result["network"], result["time"]) == (network, time)]
    cells = []
    for key in ("seconds_to_first_update", "seconds_compile"):
      values = [row[key] for row in rows]
      cells.append(f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})")
    lines.append(f"| {network} | {time} | {' | '.join(cells)} |")
  return "\n".join([*lines, "", f"n = {len(results) // (len(lines) - 2)}, {_runs.environment(results[0])}"])


if __name__ == "__main__":
  main()
