"""Speed of one step, an update of D and of G: ours, plain JAX, and PyTorch, side by side.

python -m benchmarks.step_time
python -m benchmarks.step_time --recipes article_gan --batch-sizes 32 512 4096 --name batch_sizes
python -m benchmarks.step_time --contenders ours --replicates 1 4 16 --strategy vmap --name replicates

Each contender has its own process, which waits without using the CPU while the others run. Their runs are
interleaved: in each of the `--rounds` every contender runs for about `--seconds`, in random order, and
ratios compare two runs of the same round.

  ours            many steps per dispatch, data on the device
  plain_jax       a jitted step, host batches from a NumPy iterator, the loss read after every step
  torch_eager     our own PyTorch version, fused optimizer, data on the device, nothing read back
  torch_compile   the same with one compiled program per step; on a GPU a CUDA graph

`--batch-sizes` are unlabelled images per step (real ones in article_gan and conditional_r1); labelled and
generated ones scale in proportion. Images per second count the rows of D's pass. With replicates, a step is
one step of each GAN, all in one program.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import _recipes, _runs
from gan_jax import provenance

CONTENDERS = ("ours", "plain_jax", "torch_eager", "torch_compile")


class WorkerError(Exception):
  """The reason why a contender did not run."""


class Worker:
  """A contender's process. `ready` is its description of itself."""

  def __init__(self, task: dict, python: str = sys.executable, env: Mapping[str, str] | None = None):
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(env or {})}
    if task["contender"].startswith("torch"):
      environment["JAX_PLATFORMS"] = "cpu"  # JAX only provides the initial parameters
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    self._process = subprocess.Popen(
      [python, "-m", "benchmarks._worker", json.dumps(task)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=environment,
    )
    try:
      self.ready = self._answer()
    except BaseException:
      self.close()
      raise

  def ask(self, command: str) -> dict:
    """The answer to a command; `WorkerError` if there is none."""
    assert self._process.stdin
    with contextlib.suppress(OSError):  # the missing answer reports the reason
      self._process.stdin.write(command + "\n")
      self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    code = self._process.wait()
    self._errors.seek(0)
    said = [line.strip() for line in self._errors if line.strip()]
    if code == -9:
      raise WorkerError("killed, as happens where memory runs out")
    # PyTorch prints hints after its error.
    errors = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]
    raise WorkerError((errors or said or [f"ended with code {code}"])[-1][:300])

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    for stream in (self._process.stdin, self._process.stdout, self._errors):
      if stream:
        with contextlib.suppress(OSError):
          stream.close()


@dataclass
class Entry:
  """A contender's row."""

  contender: str
  replicates: int
  worker: Worker | None = None
  not_run: str | None = None
  rates: list[float] = field(default_factory=list)
  """Steps per second, one value per round."""
  found: dict[str, Any] = field(default_factory=dict)

  @property
  def name(self) -> str:
    return self.contender if self.replicates == 1 else f"{self.contender} x{self.replicates}"

  def close(self) -> None:
    if self.worker is not None:
      self.worker.close()
    self.worker = None

  def fail(self, why: str) -> None:
    self.not_run, self.rates = why, []
    self.close()


def main() -> None:
  args = parse(sys.argv[1:])
  # A line of a contender that failed names this process's device, whose memory the others need.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  order, results = random.Random(args.seed), []
  for name in args.recipes:
    for batch_size in args.batch_sizes or [None]:
      entries = race(name, batch_size, args, order)
      results += [result(entry, entries, name, batch_size, args.strategy) for entry in entries]
      print(table(results[-len(entries) :]) + "\n", flush=True)
  _runs.finish(args.name, results, table)


def parse(flags: Sequence[str]) -> argparse.Namespace:
  parser = _runs.parser(__doc__, "step_time")
  add, names = parser.add_argument, tuple(_recipes.HPARAMS)
  add("--recipes", nargs="+", choices=names, default=names, help="what to time")
  add("--batch-sizes", type=_runs.positive, nargs="+", help="unlabelled images per step (the recipe's)")
  add("--replicates", type=_runs.positive, nargs="+", default=[1], help="GANs in one program, ours only")
  add("--strategy", choices=("sequential", "vmap"), help="one GAN after the other, or all in lockstep")
  add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="who takes part")
  add("--rounds", type=_runs.positive, default=5, help="rounds (5)")
  add("--seconds", type=_runs.seconds, default=3.0, help="of a run in a round (3)")
  _runs.add_data_flags(parser, "auto")
  add("--torch-python", default=sys.executable, help="interpreter of PyTorch's contenders (this one)")
  add("--seed", type=int, default=0, help="of the order within a round (0)")
  args = parser.parse_args(flags)
  if shutil.which(args.torch_python) is None:
    parser.error(f"--torch-python {args.torch_python} is not a program")
  if any(name.startswith("torch") for name in args.contenders):
    needed = subprocess.run(
      [args.torch_python, "-c", "import torch, optax, flax"], capture_output=True, check=False
    )
    if needed.returncode:  # the peer starts from our recipe and parameters
      parser.error(f"{args.torch_python} needs PyTorch and gan_jax: pip install -e '.[bench]' there")
  return args


def race(name: str, batch_size: int | None, args: argparse.Namespace, order: random.Random) -> list[Entry]:
  """Starts the contenders one after the other, then interleaves their runs."""
  entries = [
    Entry(contender, replicates)
    for contender in dict.fromkeys(args.contenders)
    for replicates in (dict.fromkeys(args.replicates) if contender == "ours" else [1])
  ]
  shared = {key: vars(args)[key] for key in ("strategy", "dataset", "data_dir", "manual_dir")}
  shared |= {"recipe": name, "batch_size": batch_size}
  try:
    for entry in entries:
      with _failing(entry):
        python = args.torch_python if entry.contender.startswith("torch") else sys.executable
        task = {**shared, "contender": entry.contender, "replicates": entry.replicates}
        entry.worker = Worker(task, python)
        entry.found |= entry.worker.ready
        print(f"{name}, {entry.name}: ready", file=sys.stderr, flush=True)
    for _ in range(args.rounds):
      for entry in order.sample(entries, len(entries)):
        with _failing(entry):
          run(entry, args.seconds)
    for entry in entries:
      with _failing(entry):
        if entry.worker is not None:
          entry.found |= entry.worker.ask("memory")
          entry.found |= entry.worker.ask("flops") if entry.name == "ours" else {}
  finally:
    for entry in entries:
      entry.close()
  return entries


@contextlib.contextmanager
def _failing(entry: Entry):
  try:
    yield
  except WorkerError as error:
    entry.fail(str(error))
    print(f"{entry.name}: not run: {error}", file=sys.stderr, flush=True)


def run(entry: Entry, seconds: float) -> None:
  """One round of one contender, in whole periods of the penalty that is applied every k steps."""
  if entry.worker is None:
    return
  every = entry.found["every"]
  num = every * max(1, round(seconds / entry.found["seconds_per_step"] / every))
  entry.rates.append(num / entry.worker.ask(f"run {num}")["seconds"])
  if entry.name == "ours":
    rates = entry.found.setdefault("matmul", [])
    rates.append(entry.worker.ask("matmul")["matmul_flops_per_second"])


# --- Results


def result(
  entry: Entry, entries: Sequence[Entry], name: str, batch_size: int | None, strategy: str | None = None
) -> dict:
  """A line of the results."""
  found = entry.found
  line: dict[str, Any] = {"benchmark": "step_time", "recipe": name, "batch_size": batch_size}
  line |= {"contender": entry.contender, "replicates": entry.replicates, "strategy": strategy}
  if entry.not_run is not None:
    return line | {"not_run": entry.not_run, **provenance.environment()}
  line |= {key: found[key] for key in ("rows", "dataset", "note", "seconds_first")}
  line |= {"steps_per_second": quartiles(entry.rates), "rounds": entry.rates}
  rate = line["steps_per_second"]["median"]
  line["images_per_second"] = rate * sum(found["rows"]) * entry.replicates
  line |= {key: found[key] for key in ("peak_memory_mb", "memory_mb", "device_memory_mb")}
  one = next((other for other in entries if other.name == "ours"), None)
  if one is not None and one.rates and entry is not one:
    ratios = [ours / theirs for ours, theirs in zip(one.rates, entry.rates, strict=True)]
    line["ours_is_faster_by"] = {
      "median": statistics.median(ratios),
      "smallest": min(ratios),
      "largest": max(ratios),
    }
  if "flops_per_step" in found:
    matmul = statistics.median(found["matmul"])
    line |= {
      "flops_per_step": found["flops_per_step"],
      "matmul_flops_per_second": matmul,
      "fraction_of_matmul_rate": found["flops_per_step"] * rate / matmul,
    }
  return line | {key: found[key] for key in ("device", "threads", "versions", "commit") if key in found}


def quartiles(values: Sequence[float]) -> dict[str, float]:
  """Median and quartiles."""
  if len(values) == 1:
    return dict.fromkeys(("median", "lower", "upper"), values[0])
  lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
  return {"median": median, "lower": lower, "upper": upper}


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per contender."""
  header = "recipe", "rows", "contender", "steps/s (quartiles)", "images/s", "ours is faster by"
  header += "first steps", "memory", "of the matrix rate"
  rows = []
  for line in results:
    name = line["contender"] + (f" x{line['replicates']}" if line["replicates"] > 1 else "")
    if "not_run" in line:
      size = line["batch_size"] or "recipe"
      rows.append([line["recipe"], size, name, f"not run: {line['not_run']}", *[""] * 5])
      continue
    rate, ratio = line["steps_per_second"], line.get("ours_is_faster_by")
    memory = line["device_memory_mb"] or line["memory_mb"]
    share = line.get("fraction_of_matmul_rate")
    rows.append(
      [
        line["recipe"],
        "/".join(map(str, line["rows"])),
        name,
        f"{rate['median']:.4g} ({rate['lower']:.4g} to {rate['upper']:.4g})",
        f"{line['images_per_second']:,.0f}",
        f"{ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})" if ratio else "",
        f"{line['seconds_first']:.1f} s",
        f"{memory:,.0f} MB",
        "" if share is None else f"{100 * share:.0f} %",
      ]
    )
  done = [line for line in results if "not_run" not in line]
  note = "Rows of a step: labelled/unlabelled/generated. Memory: beyond that of the start."
  text = _runs.markdown(header, rows)
  return _runs.with_environment(text, done, note) if done else text


if __name__ == "__main__":
  _runs.cli(main)
