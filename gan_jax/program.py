"""A program of the command line around its `main`: signals, errors as one sentence, and JAX's cache."""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.markup import escape

from gan_jax import parsing, processes
from gan_jax.report import cache_dir, console, say
from gan_jax.types import InputError, Json, Stopped

# A folder that is closed or a disk that is full, which no check can foresee: no bug of ours.
_CLOSED_OR_FULL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
  """Ends without a traceback where the reader of standard output left early, as `| head` does."""
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter will flush again
    sys.exit(141)  # what a shell says of a process that SIGPIPE has ended


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """SIGTERM and SIGHUP raise `Stopped`, unless they are ignored (nohup).

  They and Ctrl-C also count where Python would lose them: an exception in a callback of a weak reference or
  of the garbage collector, which JAX has one of all through a compilation, is printed and ignored.
  """
  hook = sys.unraisablehook

  def stop(signum: int, frame: Any) -> None:
    raise Stopped(signum)

  def again(lost: Any) -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt | Stopped):
      signum = getattr(lost.exc_value, "signum", signal.SIGINT)
      threading.Timer(0.01, signal.raise_signal, (signum,)).start()
    else:
      hook(lost)

  in_main = threading.current_thread() is threading.main_thread()
  found = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP) if in_main}
  previous = {signum: handler for signum, handler in found.items() if handler is not signal.SIG_IGN}
  sys.unraisablehook = again
  try:
    for signum in previous:
      signal.signal(signum, stop)
    yield
  finally:
    sys.unraisablehook = hook
    for signum, handler in previous.items():
      signal.signal(signum, handler)


@_quiet_pipe()
@_interruptible()
def run(
  main: Callable[[Any], Json],
  config_cls: type,
  *,
  flags: Sequence[str] | None = None,
  name: str | None = None,
  description: str | None = None,
) -> None:
  """Parses the flags and runs `main`; an `InputError` is one sentence and exit code 2.

  With --resume the stored configuration stands in for the flags that are not given, and a flag that
  contradicts it is an error.

  Args:
    main: what to run with the configuration.
    config_cls: its class.
    flags: default: those that the process was started with.
    name: what --help calls it; default: the name of the process.
    description: what --help says; default: the docstring of main's module.
  """
  flags = sys.argv[1:] if flags is None else flags
  about = {"description": description or sys.modules[main.__module__].__doc__ or "", "prog": name}
  try:
    config: Any = parsing.parse(config_cls, flags, **about)
    _quiet()
    enable_compilation_cache()
    if hasattr(config, "processes"):
      config.processes.start()
    result = main(config)
  except InputError as error:
    console.quiet = False
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    _leave(2)
  except KeyboardInterrupt:  # outside of training, or for the second time
    say("stopped at once")
    _leave(130)
  except Stopped as stopped:
    go_on = f"; to go on: {stopped.resume}" if stopped.resume else ""
    say(f"stopped by {signal.Signals(stopped.signum).name}{go_on}")
    _leave(128 + stopped.signum)
  except OSError as error:
    if error.errno not in _CLOSED_OR_FULL:
      raise
    say(f"error: {error.filename or 'a file'} cannot be used: {error.strerror}")
    _leave(2)
  except Exception as error:
    if not jax.distributed.is_initialized():
      raise
    console.quiet = False
    say(f"error: {processes.LOST}" if processes.is_lost(error) else traceback.format_exc())
    _leave(1)
  sys.exit(130 if result.get("interrupted") else 0)


def _leave(code: int) -> NoReturn:
  """Ends the process; where it is one of several, at once: they wait for each other when they are done."""
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


# --- JAX, quick and quiet


def _quiet() -> None:
  import absl.logging

  absl.logging.set_verbosity("fatal")  # Orbax logs what it then raises
  logging.getLogger("asyncio").setLevel("CRITICAL")  # and leaves more of it behind


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, at most 1 GB: a second start does not compile again."""
  if jax.config.values["jax_compilation_cache_dir"] is None:  # the attribute is untyped in JAX 0.10
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    replace_damaged(cache_dir() / "xla")


def replace_damaged(cache: Path) -> None:
  """JAX warns of a damaged program and compiles, but does not write over it: now it does, and is silent."""
  warned = "Error reading persistent compilation cache entry for "
  show = warnings.showwarning

  def showwarning(message: Any, *args: Any, **kwargs: Any) -> None:
    if not str(message).startswith(warned):
      show(message, *args, **kwargs)
      return
    name = str(message).removeprefix(warned).partition("'")[2].partition("'")[0]
    for path in cache.glob(f"{name}-*") if name else ():
      path.unlink(missing_ok=True)

  warnings.showwarning = showwarning
  warnings.filterwarnings("always", warned)
