"""The end of a run: `result.json`, `report.html` and the table in the terminal."""

import json
import time
from collections.abc import Sequence

import psutil
from rich.markup import escape
from rich.table import Table

from gan_jax import memory, output, report, train
from gan_jax.output import console, say
from gan_jax.run_dir import Run
from gan_jax.types import Json


def training(fit: train.Fit) -> Json:
  """The entries of `result.json` about training."""
  first, num_steps = fit.first_step_at, int(fit.state.step)
  return {
    "interrupted": fit.interrupted,
    "steps": num_steps,
    "seconds_train": round(fit.seconds_train, 1),
    "seconds_compile": round(fit.seconds_compile, 1),
    "seconds_to_first_step": first and round(first - psutil.Process().create_time(), 2),
    "steps_per_second": round(num_steps / fit.seconds_train, 2),
    "seconds_idle": round(fit.seconds_idle, 2),
    "alarms": list(fit.alarms),
    "rollbacks": list(fit.rollbacks),
  }


def finish(
  run: Run,
  result: Json,
  *,
  table: Sequence[Sequence[str]],
  pictures: Sequence[tuple[str, str]],
  sections: Sequence[report.Section] = (),
) -> Json:
  """Completes the result, writes `result.json` and `report.html`, and prints the table.

  Args:
    run: the open run.
    result: the experiment's own keys; errors that are missing become None.
    table: rows, each a name and its values.
    pictures: titles and file names, relative to the run's directory, for the page.
    sections: further sections of the page, below the pictures.
  """
  dataset, split = run.dataset, run.split
  result = {
    "experiment": run.experiment,
    "dataset": dataset.name,
    "note": dataset.note,
    "num_labels": split and len(split.indices),
    "label_split_sha256": split and split.sha256,
    "split_seed": split and split.seed,
    "unlabelled_includes_labelled": not run.exclude_labelled,
    "num_images": len(split.images if split else dataset.x_train),
    "seed": run.seed,
    **dict.fromkeys(("test_error", "supervised_test_error", "probe_test_error")),
    **result,
    "seconds_total": None if run.flags.resume else round(time.time() - run.begin, 1),
    "peak_memory_mb": round(memory.peak() / 2**20),
    **run.environment,
  }
  result = json.loads(json.dumps(result))  # as it will be read back: tuples become lists
  output.write_json(run.path / "result.json", result)
  files = [(title, run.path / name) for title, name in pictures]
  report.write(run.path / "report.html", result, table, files, sections=sections, command=run.command)
  title = f"{run.experiment} on {dataset.name}"
  if result["num_labels"] is not None:  # else each row of the table has its own
    title += f", {result['num_labels']} labels"
  rich_table = Table(title=escape(title), title_justify="left", show_header=False)
  for name, *values in table:
    rich_table.add_row(*map(escape, (name, *values)))
  console.print(rich_table)
  for alarm in result.get("alarms", ()):
    console.print(f"alarm: {alarm}", style="yellow", markup=False, soft_wrap=True)
  if dataset.note:
    console.print(dataset.note, style="bold yellow", markup=False)
  say(f"written to {run.path}")
  return result
