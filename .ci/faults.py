"""A run killed at random moments and resumed each time ends with the arrays of an uninterrupted run.

  python .ci/faults.py --kills 20 --seed 0

Each line shows the signal and its time, the exit code, the newest checkpoint's step, and the last output.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from gan_jax import cli, data, program, results, run_dir, train
from gan_jax.recipes import ssgan
from gan_jax.types import Json

CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


@dataclass(frozen=True)
class Config:
  """The flags of the run."""

  data: cli.DataFlags = cli.DataFlags(dataset="digits")
  loop: cli.LoopFlags = cli.LoopFlags(checkpoint_every=5)
  run: cli.RunFlags = cli.RunFlags()


def main(config: Config) -> Json:
  """Trains the smallest networks, which are the quickest to compile."""
  dataset = cli.load(config.data)
  split = cli.split_labels(dataset, cli.LabelFlags(), cli.ImageFlags())
  small = {"network": "conv_small", "num_unlabelled": 8, "consistency": 0.0, "class_balance": (0.0, 0.0)}
  hparams = dataclasses.replace(ssgan.tuned("conv", len(split.images)), num_steps=60, **small)
  recipe, key = ssgan.build(hparams, dataset.image_shape, dataset.num_classes), jax.random.key(0)
  with run_dir.open_run(
    "faults", config, dataset, split, recipes_used={"gan": recipe}, files=run_dir.TRAINING_FILES
  ) as run:
    images = data.to_device(dataset, split)
    every = config.loop.checkpoint_every
    resume = config.run.resume
    fit = train.fit(recipe, images, key, workdir=run.path, resume=resume, checkpoint_every=every)
    return results.finish(run, results.training(fit), table=[], pictures=[])


def start(path: Path) -> subprocess.Popen:
  """Starts the run in its own process; an existing run is resumed."""
  words = [sys.executable, __file__, "run", "--workdir", str(path)]
  words += ["--resume"] if (path / "config.json").exists() else []
  quick = {"XDG_CACHE_HOME": str(path.parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | quick)


def saved(path: Path) -> tuple[int, Json]:
  """Step and checksums, one per array, of the newest checkpoint."""
  steps = [int(each.name) for each in (path / "checkpoints").glob("*") if each.name.isdigit()]
  if not steps:
    return 0, {}
  newest = path / "checkpoints" / str(max(steps)) / "_CHECKPOINT_METADATA"
  return max(steps), json.loads(newest.read_text())["custom_metadata"]["checksums"]


def num_rows(path: Path) -> int:
  """Number of rows of its metrics."""
  metrics = path / "metrics.jsonl"
  return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def complete(path: Path) -> tuple[int, Json]:
  """Lets the run finish; returns what it saved."""
  process = start(path)
  _, said = process.communicate()
  assert process.returncode == 0, said
  return saved(path)


def faults() -> None:
  """Kills and resumes the run, then compares."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=2)
  parser.add_argument("--signals", type=int, default=1, help="SIGTERM, SIGHUP, SIGINT, and again")
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  rng, folder = random.Random(flags.seed), Path(tempfile.mkdtemp())
  try:
    begin = time.monotonic()
    expected = complete(folder / "straight")
    result = json.loads((folder / "straight" / "result.json").read_text())
    seconds = time.monotonic() - begin - result["seconds_compile"]  # later runs use JAX's cache
    step, checksums = expected
    assert step == 60
    asked = itertools.cycle([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    sent = [signal.SIGKILL] * flags.kills + list(itertools.islice(asked, flags.signals))
    for i, signum in enumerate(sent):
      path = folder / "killed"
      if saved(path)[0] == step:  # it finished before the signal
        assert saved(path) == expected
        shutil.rmtree(path)
      # During startup, or at a future row of metrics, plus some time into the next steps.
      begin, rows = time.monotonic(), num_rows(path) + rng.choice([0, 1, 2, 4])
      moment, process = rng.uniform(0, 0.5 if rows > num_rows(path) else seconds), start(path)
      while process.poll() is None and num_rows(path) < rows:
        time.sleep(0.01)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
      process.send_signal(signum)  # no effect if it has ended
      moment = time.monotonic() - begin
      _, said = process.communicate()
      last = said.strip().splitlines()[-1:] or [""]
      ended = f"exit code {process.returncode}, step {saved(path)[0]}  {last[0]}"
      print(f"{i + 1}  {signum.name} after {moment:.1f} s: {ended}", flush=True)
      # A signal before the program has set its handlers ends it like any other process.
      assert process.returncode in (0, CODES[signum], -signum), said
      if process.returncode in (143, 129):
        assert "stopped by SIG" in last[0], said
      assert "Traceback" not in said or process.returncode == -signum, said
    assert complete(folder / "killed") == expected
    print(f"{len(checksums)} arrays are those of the run that nothing stopped, bit for bit")
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  if sys.argv[1:2] == ["run"]:
    program.run(main, Config, flags=sys.argv[2:])
  else:
    faults()
