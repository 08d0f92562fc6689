"""Runs a `main` as a command-line program: signals, one-sentence errors, and JAX's compilation cache."""

import contextlib
import errno
import gc
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
from gan_jax.output import cache_dir, console, say
from gan_jax.types import InputError, Json, Stopped

# No permission or a full disk: no check can foresee these, and they are not bugs.
_CLOSED_OR_FULL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def _writing_output() -> Iterator[None]:
  """Exits without a traceback if standard output is closed early, as `| head` does, or its disk is full."""
  if sys.stdout is None:  # `>&-`
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except OSError as error:
    if not isinstance(error, BrokenPipeError) and error.errno not in _CLOSED_OR_FULL:
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
    if isinstance(error, BrokenPipeError):
      sys.exit(141)  # the shell's exit code for a process ended by SIGPIPE
    say(f"error: standard output cannot be written: {error.strerror}")
    sys.exit(2)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """SIGTERM and SIGHUP raise `Stopped`, unless they are ignored (nohup).

  They and Ctrl-C also take effect where Python would lose them: it prints and ignores exceptions in
  callbacks of weak references and of the garbage collector, and JAX has such a callback throughout a
  compilation.
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


@_writing_output()
@_interruptible()
def run(
  main: Callable[[Any], Json],
  config_cls: type,
  *,
  flags: Sequence[str] | None = None,
  name: str | None = None,
  description: str | None = None,
) -> None:
  """Parses the flags and runs `main`; an `InputError` becomes one sentence and exit code 2.

  With --resume, flags that are not given come from the stored configuration, and a flag that contradicts it
  is an error.

  Args:
    main: called with the configuration.
    config_cls: class of the configuration.
    flags: command-line arguments; default: those of the process.
    name: program name in --help; default: `python -m` and the module that was started.
    description: text of --help; default: the docstring of main's module.
  """
  flags = sys.argv[1:] if flags is None else flags
  started = sys.modules["__main__"].__spec__
  name = name or (f"python -m {started.name}" if started else None)
  about = {"description": description or sys.modules[main.__module__].__doc__ or "", "prog": name}
  config: Any = None
  try:
    config = parsing.parse(config_cls, flags, **about)
    _quiet()
    gc.set_threshold(100_000, 50, 50)  # scanning tracing's millions of lasting objects takes a fifth of it
    enable_compilation_cache()
    if hasattr(config, "processes"):
      config.processes.start()
    result = main(config)
  except InputError as error:
    console.quiet = False
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    _leave(2)
  except KeyboardInterrupt:  # outside of training, or the second Ctrl-C
    say("stopped at once")
    _leave(130)
  except Stopped as stopped:
    go_on = f"; to continue: {stopped.resume}" if stopped.resume else ""
    say(f"stopped by {signal.Signals(stopped.signum).name}{go_on}")
    _leave(128 + stopped.signum)
  except OSError as error:
    if error.errno not in _CLOSED_OR_FULL:
      raise
    say(f"error: {error.filename or 'a file'} cannot be used: {error.strerror}")
    _leave(2)
  except Exception as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
      console.quiet = False
      hint = ": choose a smaller --batch-size or --image-size" if hasattr(config, "train") else ""
      hint += ", or --stream yes" if hasattr(config, "stream") else ""
      say(f"error: the device has too little memory{hint}")
      _leave(2)
    if not jax.distributed.is_initialized():
      raise
    console.quiet = False
    say(f"error: {processes.LOST}" if processes.is_lost(error) else traceback.format_exc())
    _leave(1)
  sys.exit(130 if result.get("interrupted") else 0)


def _leave(code: int) -> NoReturn:
  """Ends the process; one of several ends immediately, as a normal exit would wait for the others."""
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


# --- JAX, quick and quiet


def _quiet() -> None:
  import absl.logging

  absl.logging.set_verbosity("fatal")  # Orbax logs errors that it also raises
  logging.getLogger("asyncio").setLevel("CRITICAL")  # and leaves more for asyncio to log


def enable_compilation_cache() -> None:
  """Caches compiled programs on disk, at most 1 GB, so that a second start does not recompile."""
  if jax.config.values["jax_compilation_cache_dir"] is None:  # the attribute is untyped in JAX 0.10
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    replace_damaged(cache_dir() / "xla")


def replace_damaged(cache: Path) -> None:
  """Silently deletes damaged cache entries, so that JAX rewrites them instead of warning at every start."""
  warned = "Error reading persistent compilation cache entry for "
  show = warnings.showwarning

  def showwarning(message: Any, *args: Any, **kwargs: Any) -> None:
    if not str(message).startswith(warned):
      show(message, *args, **kwargs)
      return
    name = str(message).removeprefix(warned).partition("'")[2].partition("'")[0]
    with contextlib.suppress(OSError):  # a cache that may only be read
      for path in cache.glob(f"{name}-*") if name else ():
        path.unlink(missing_ok=True)

  warnings.showwarning = showwarning
  warnings.filterwarnings("always", warned)
