"""Seconds from the start of the process to the first step, twice.

python -m benchmarks.startup
python -m benchmarks.startup --networks mlp --repeats 5 --name digits -- --dataset digits

First: with an empty compilation cache. Second: with the cache that the first start filled. Everything after
the bare `--` is passed to `python -m experiments.mnist_ssgan`.
"""

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _runs


def main() -> None:
  parser = _runs.parser(__doc__, "startup")
  parser.add_argument("--networks", nargs="+", choices=("conv", "mlp"), default=["conv", "mlp"])
  parser.add_argument("--repeats", type=_runs.positive, default=3, help="pairs of starts (3)")
  _runs.add_run_flags(parser)
  args = parser.parse_args()
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    parser.error("JAX_COMPILATION_CACHE_DIR names a cache that is not empty: unset it")
  results = []
  for network in args.networks:
    # In a run of a single step, that step would also wait for the diagnostics and the first picture.
    flags = ["--network", network, "--steps", "40", *args.flags]
    for _ in range(args.repeats):
      with tempfile.TemporaryDirectory() as folder:
        for time in ("first", "second"):
          env = {"XDG_CACHE_HOME": f"{folder}/cache"}  # where programs are cached, too
          result = _runs.run("mnist_ssgan", flags, Path(folder) / time, env)
          results.append({"benchmark": "startup", "time": time, **result})
  _runs.finish(args.name, results, table)


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per network and time."""
  rows = []
  for network, time in dict.fromkeys((result["network"], result["time"]) for result in results):
    starts = [result for result in results if (result["network"], result["time"]) == (network, time)]
    rows.append([network, time])
    for key in ("seconds_to_first_step", "seconds_compile"):
      values = [start[key] for start in starts]
      rows[-1].append(f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})")
  header = "network", "time", "to the first step", "of that, compiling"
  note = f"Medians of {len(results) // len(rows)}."
  return _runs.with_environment(_runs.markdown(header, rows), results, note)


if __name__ == "__main__":
  _runs.cli(main)
