"""A run, or several side by side, as one self-contained HTML file without scripts.

Callers pass text, numbers or PNG files, never HTML: the template escapes everything.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gan_jax import checkpoint, cli, output, parsing
from gan_jax.types import InputError, Json

PERCENT = "\N{NO-BREAK SPACE}%"
TEST_IMAGES = "test images"
"""What an error was measured on, unless it is an estimate from folds."""


class Picture(NamedTuple):
  """A PNG file, as bytes or a path, and its caption."""

  png: bytes | Path
  caption: str = ""


class Section(NamedTuple):
  """A section of the page; empty fields are left out."""

  title: str
  text: str = ""
  header: Sequence[str] = ()
  """Column names of `rows`."""
  rows: Sequence[Sequence[str]] = ()
  """Rows of a table."""
  tiles: Sequence[Picture] = ()
  """Single images, many per row, enlarged without interpolation."""
  pictures: Sequence[Picture] = ()
  """Pictures, side by side if there is room."""
  full_size: bool = False
  """Whether pictures scroll sideways on a small screen instead of shrinking."""
  code: str = ""
  """Preformatted text."""
  folded: bool = False
  """Whether the section is collapsed to its title until opened."""


def write(
  path: Path,
  result: Json,
  table: Sequence[Sequence[str]],
  pictures: Sequence[tuple[str, Path]],
  *,
  sections: Sequence[Section] = (),
  command: str = "",
) -> None:
  """Writes the page of a run.

  In order: the result in one sentence, notes and alarms, the table, the pictures, the sections, provenance,
  and the result as JSON.

  Args:
    path: path of the page.
    result: contents of `result.json`.
    table: rows, each a name and its values. A test error in percent gets a bar.
    pictures: title and PNG file, one section each.
    sections: further sections.
    command: the command that repeats the run.
  """
  alarms = [f"Alarm: {alarm}" for alarm in result.get("alarms", ())]
  early = f"Stopped after {result.get('steps')} steps, before the run was complete."
  notes = [result.get("note"), early if result.get("interrupted") else None, *alarms]
  shown = [
    *(Section(title, pictures=[Picture(file)]) for title, file in pictures),
    *sections,
    _provenance(result, command),
    Section("The full result", code=json.dumps(result, indent=2), folded=True),
  ]
  title = f"{result['experiment']} on {result['dataset']}"
  _render(path, title, shown, headline=_headline(result), detail=_detail(result), notes=notes, table=table)


def compare(path: Path, runs: Sequence[Path]) -> None:
  """Writes a page with several runs side by side: numbers, flags that differ, samples, learning curves.

  Args:
    path: path of the page.
    runs: folders of complete runs; only their `result.json`, `config.json` and pictures are read.

  Raises:
    InputError: there are no folders, one has no complete run, or the page cannot be written.
  """
  if not runs:
    raise InputError("name the folder of at least one run")
  output.check_file(path)
  stored = {str(run): _read(Path(run)) for run in runs}
  results = {name: result for name, (result, _) in stored.items()}
  names = ("run", "experiment", "dataset", "test error", "95 % interval", "supervised control")
  names += ("linear probe", "measured on", "labels", "label split", "steps", "seconds")
  numbers = Section(
    "Numbers",
    text="Errors in percent: lower is better. The interval is that of one trained"
    " classifier: another label split or seed may change more. Seconds are those of training.",
    header=names,
    rows=[_compared(name, result) for name, result in results.items()],
  )
  flags = {name: _flags(config) for name, (_, config) in stored.items()}
  every = list(dict.fromkeys(flag for each in flags.values() for flag in each))
  differ = [flag for flag in every if len({repr(each.get(flag)) for each in flags.values()}) > 1]
  sections = [numbers]
  if differ:
    rows = [
      (name, *(_word(each.get(flag)) or "default" for flag in differ)) for name, each in flags.items()
    ]
    sections.append(Section("Flags that differ", header=("run", *map(cli.flag, differ)), rows=rows))
  for title, file in (("Generated images", "samples/last.png"), ("Learning curves", "learning_curves.png")):
    found = [Picture(Path(name) / file, name) for name in stored if (Path(name) / file).is_file()]
    if found:
      sections.append(Section(title, pictures=found))
  for name, (result, config) in stored.items():
    provenance = _provenance(result, config.get("command", ""))
    sections.append(provenance._replace(title=f"Provenance: {name}", folded=True))
  notes = [
    f"{name}: {what}"
    for name, each in results.items()
    for what in (each.get("note"), *each.get("alarms", ()), each.get("interrupted") and "stopped early")
    if what
  ]
  _render(path, f"{len(stored)} runs side by side", sections, notes=notes)


# --- Text


def _headline(result: Json) -> str:
  """The result and its control, in one sentence."""
  error, control = result.get("test_error"), result.get("supervised_test_error")
  probe, labels = result.get("probe_test_error"), result.get("num_labels")
  if error is None:
    return "" if probe is None else f"{probe:.2f}{PERCENT} test error of a linear probe on the features."
  text = f"{error:.2f}{PERCENT} test error"
  if labels is not None:
    text += f" from {labels:,} labels and {result['num_images']:,} images"
  return f"{text}." if control is None else f"{text}; {control:.2f}{PERCENT} for the supervised control."


def _detail(result: Json) -> str:
  """The uncertainty of the error."""
  if not result.get("test_error_interval"):
    return ""
  (low, high), images = result["test_error_interval"], result.get("error_from") or TEST_IMAGES
  whose = "for this one classifier" if images == TEST_IMAGES else "of those trained for the folds"
  return (
    f"On {result['num_test_images']:,} {images}; 95{PERCENT} interval of the error"
    f" {low:.2f} to {high:.2f}{PERCENT}, {whose}. Lower is better."
  )


def _provenance(result: Json, command: str) -> Section:
  names = {
    "label_split_sha256": "label split, SHA-256",
    "split_seed": "seed of the label split",
    "seed": "seed",
    "steps": "steps",
    "seconds_train": "seconds of training",
    "seconds_total": "seconds in all",
    "device": "device",
    "commit": "commit",
  }
  rows = [(name, str(result[key])) for key, name in names.items() if result.get(key) is not None]
  versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
  rows += [("versions", versions)] if versions else []
  text = "The command that repeats the run:" if command else ""
  return Section("Provenance", text=text, rows=rows, code=command)


def _compared(name: str, result: Json) -> Sequence[str]:
  errors = ("test_error", "supervised_test_error", "probe_test_error")
  own, control, probe = (f"{result[key]:.2f}" if result.get(key) is not None else "" for key in errors)
  low, high = result.get("test_error_interval") or (None, None)
  interval = "" if low is None else f"{low:.2f} to {high:.2f}"
  split = (result.get("label_split_sha256") or "")[:8]
  measured_on = result.get("error_from") or ("" if result.get("test_error") is None else TEST_IMAGES)
  rest = (
    measured_on,
    _word(result.get("num_labels")),
    split,
    *(_word(result.get(k)) for k in ("steps", "seconds_train")),
  )
  return (name, result["experiment"], result["dataset"], own, interval, control, probe, *rest)


def _flags(config: Json) -> Json:
  return {name: value for name, value in config.get("config", {}).items() if name not in parsing.NOT_RECIPE}


def _read(run: Path) -> tuple[Json, Json]:
  """`result.json` and `config.json` of a complete run."""
  stored = []
  for name in ("config.json", "result.json"):
    try:
      stored.append(json.loads((run / name).read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
      if checkpoint.is_export(run):
        raise InputError(f"{run} is an export, not a run: name the run that it was made from") from error
      if stored:
        raise InputError(
          f"the run in {run} is not complete: it has no {name}; continue it with --resume"
        ) from error
      raise InputError(f"{run} is not the folder of a run: it has no {name}") from error
    except (OSError, ValueError) as error:
      raise InputError(f"{run / name} cannot be read") from error
  config, result = stored
  if not all(isinstance(each, dict) for each in stored) or not {"experiment", "dataset"} <= result.keys():
    raise InputError(f"{run / 'result.json'} is not the result of a run")
  return result, config


def _word(value: Any) -> str:
  return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- HTML


def _render(
  path: Path,
  title: str,
  sections: Sequence[Section],
  *,
  headline: str = "",
  detail: str = "",
  notes: Sequence[str | None] = (),
  table: Sequence[Sequence[str]] = (),
) -> None:
  import jinja2

  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("gan_jax")
  )
  environment.tests["numeric"] = lambda cell: re.fullmatch(r"[-+\d.,e]+( %)?", cell) is not None
  html = environment.get_template("report.html").render(
    title=title,
    headline=headline,
    detail=detail,
    notes=[note for note in notes if note],
    table=_with_bars(table),
    sections=[_encoded(section) for section in sections],
  )
  output.write_text(path, html)


def _with_bars(table: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str], float | None]]:
  """Rows with the width of their bar in percent of the widest; None if the row is not a test error."""
  errors = [
    float(values[0].removesuffix(" %"))
    if name.startswith("test error") and re.fullmatch(r"[\d.]+ %", values[0])
    else None
    for name, *values in table
  ]
  most = max((error for error in errors if error), default=1.0)
  return [
    (name, values, None if error is None else 100 * error / most)
    for (name, *values), error in zip(table, errors, strict=True)
  ]


def _encoded(section: Section) -> Mapping[str, Any]:
  def encode(pictures: Sequence[Picture]) -> list[Mapping[str, str]]:
    contents = [each.png if isinstance(each.png, bytes) else each.png.read_bytes() for each in pictures]
    return [
      {
        "data": base64.b64encode(content).decode(),
        "caption": each.caption,
        "alt": f"{section.title}: {each.caption}" if each.caption else section.title,
      }
      for each, content in zip(pictures, contents, strict=True)
    ]

  return {
    **section._asdict(),
    "tiles": encode(section.tiles),
    "pictures": encode(section.pictures),
  }
