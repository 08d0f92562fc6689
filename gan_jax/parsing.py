"""Parsing and checking of configurations: dataclasses of flag groups and of an experiment's own flags."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typeguard
import tyro

from gan_jax.cli import LoopFlags, ProcessFlags, RunFlags, StreamFlags, flag
from gan_jax.types import InputError, Json, as_tuple

Config = TypeVar("Config")


def _names(*groups: type) -> set[str]:
  return {field.name for group in groups for field in dataclasses.fields(group)}


PROCESSES = _names(ProcessFlags)
NOT_RECIPE = {"data_dir", "manual_dir", "folds"} | _names(StreamFlags, LoopFlags, ProcessFlags, RunFlags)
"""Flags of a run's input, output and execution, which do not change what it computes."""


def check(config: Any) -> None:
  """Checks that numbers fit in 32 bits, then every group, then the configuration as a whole."""
  for name, value in flags_of(config).items():
    largest = 2**32 - 1 if name.endswith("seed") else 2**31 - 1  # a larger seed would wrap around
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, int) and number > largest:
        raise InputError(f"{flag(name)} must be at most {largest:,}, not {number:,}")
      if isinstance(number, float) and not math.isfinite(number):
        raise InputError(f"{flag(name)} must be a finite number, not {number}")
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value) and hasattr(value, "check"):
      value.check()  # pyright: ignore
  if hasattr(config, "check"):
    config.check()


def flags_of(config: Any) -> Json:
  """All flags by name, from all groups; names are unique."""
  flags = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    flags |= flags_of(value) if dataclasses.is_dataclass(value) else {field.name: value}
  return flags


def flags_of_recipe(config: Any) -> Json:
  """The flags that determine what a run computes, i.e. all except `NOT_RECIPE`."""
  return {name: value for name, value in flags_of(config).items() if name not in NOT_RECIPE}


def command(program: str, config: Any) -> str:
  """The command that repeats a run elsewhere: `program` and the flags that differ from their defaults.

  Flags of the directory and of the processes are left out: it neither resumes nor replaces the run.
  """
  defaults, words = flags_of(type(config)()), []
  for name, value in flags_of(config).items():
    if value == defaults[name] or name in _names(RunFlags, ProcessFlags):
      continue
    if isinstance(value, bool):
      words.append(flag(name) if value else flag(f"no_{name}"))
    else:
      words += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
  return shlex.join([*shlex.split(program), *words])


def with_flags(config: Config, **changes: Any) -> Config:
  """The configuration with some flags changed, whichever groups they are in.

  Raises:
    TypeError: the configuration has no such flag.
  """
  config, unknown = _with_flags(config, changes)
  if unknown:
    raise TypeError(f"no such flag: {', '.join(unknown)}")
  return config


def _with_flags(config: Any, changes: Json) -> tuple[Any, Json]:
  rest, own = dict(changes), {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      own[field.name], rest = _with_flags(value, rest)
    elif field.name in rest:
      own[field.name] = rest.pop(field.name)
  return dataclasses.replace(config, **own), rest


# --- Parsing


def parse(config_cls: type[Config], flags: Sequence[str], **about: Any) -> Config:
  """The checked configuration of these flags; with --resume, that of the stored run, see `resumed`.

  Args:
    config_cls: class of the configuration.
    flags: command-line arguments.
    about: passed to tyro.

  Raises:
    InputError: the flags do not parse, or a check fails.
  """
  config = _parse(config_cls, flags, **about)
  run = getattr(config, "run", None)  # in some commands `run` is a plain flag
  if isinstance(run, RunFlags) and run.resume:
    run.check()
    config = resumed(config_cls, Path(run.workdir or ""), flags)
  check(config)
  return config


def resumed(config_cls: type[Config], path: Path, flags: Sequence[str]) -> Config:
  """The configuration of the run in `path`; `InputError` if a flag contradicts it."""
  try:
    fields = json.loads((path / "config.json").read_text())["config"]
    stored = with_flags(config_cls(), **{name: as_tuple(value) for name, value in fields.items()})
    then = {"overwrite": False} | dict.fromkeys(PROCESSES & fields.keys())
    stored = with_flags(stored, **then)  # they applied to the previous invocation
    _check_types(stored)
  except FileNotFoundError as error:
    raise InputError(f"{path} holds no run to resume: it has no config.json") from error
  except OSError as error:
    raise InputError(f"{path / 'config.json'} cannot be read: {error.strerror}") from error
  except (ValueError, TypeError, KeyError, AttributeError, typeguard.TypeCheckError) as error:
    raise InputError(
      f"{path / 'config.json'} is not the configuration of this experiment in this version of gan_jax"
    ) from error
  config = _parse(config_cls, flags, default=stored)
  old, new = flags_of_recipe(stored), flags_of_recipe(config)
  for name in old:
    if name != "dataset" and old[name] != new[name]:  # the data themselves are compared, wherever they are
      raise InputError(
        f"{path} was started with {flag(name)} {old[name]}, not {new[name]}: leave the flag out"
      )
  return config


def _check_types(config: Any) -> None:
  for name, hint in get_type_hints(type(config)).items():
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
      _check_types(value)
    else:
      every = typeguard.CollectionCheckStrategy.ALL_ITEMS
      typeguard.check_type(value, hint, collection_check_strategy=every)


def _parse(config_cls: type[Config], flags: Sequence[str], **kwargs: Any) -> Config:
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      return tyro.cli(config_cls, args=flags, config=(tyro.conf.OmitArgPrefixes,), **kwargs)
  except SystemExit as stopped:
    if stopped.code:
      raise InputError(_unboxed(said.getvalue())) from stopped
    raise


def _unboxed(box: str) -> str:
  """The message in tyro's box as one sentence: the text up to the first rule, and the suggested flag."""
  parts: list[list[str]] = [[]]
  for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:  # the first line is a title
    line = line.strip(" │")
    if line and set(line) <= {*"─╰╯-"}:
      parts.append([])
    else:
      parts[-1].append(line)
  wrong, meant, *_ = [*filter(any, parts), [], []]
  said = " ".join(wrong).partition("  Got errors:")[0].strip()
  said = re.sub(r"^Missing from .*?:", "missing:", said).removeprefix("Error parsing ")
  said = re.sub(r"no type matching (.*) could be instantiated from", r"must be \1, not", said).rstrip(".")
  if meant[:1] == ["Perhaps you meant:"]:
    said += f"; perhaps you meant {meant[1]}"
  return f"{said} (--help lists the flags)"
