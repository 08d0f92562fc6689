"""Several processes that train one run, on one machine or many, joined by `jax.distributed`.

Each runs the same program on the same data, their devices share each step (`parallel.over_devices`), and
only the first writes. In a single process all of this has no effect.
"""

import ctypes
import json
import os
import signal
import socket
import threading
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gan_jax.types import InputError

LOST = (
  "another process of this run has ended or cannot be reached: check its output, then continue from the"
  " last checkpoint with --resume, on any number of processes"
)


def initialize(
  coordinator: str,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 300,
) -> None:
  """Joins this process to the others through `jax.distributed`. Call it before creating any array.

  If another process ends, this one ends with `LOST` and exit code 1, within about 30 seconds.

  Args:
    coordinator: `host:port` at which the first process listens, or `auto` if JAX knows the cluster
      (Slurm, Open MPI, Kubernetes, Cloud TPU).
    num_processes: number of processes; None asks the cluster.
    process_id: index of this process, from 0; None asks the cluster.
    timeout: seconds to wait for the others.

  Raises:
    InputError: the cluster is unknown, the port is in use, or the coordinator does not answer.
  """
  address = None if coordinator == "auto" else coordinator
  if address and process_id is not None:
    _check_reachable(address, listens=process_id == 0, timeout=timeout)
  _end_with_a_sentence()
  try:
    jax.distributed.initialize(
      address,
      num_processes,
      process_id,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=30,
      # The others wait while the first process evaluates; if it dies, its heartbeat stops.
      shutdown_timeout_seconds=7 * 24 * 3600,
    )
  except ValueError as error:
    raise InputError(
      "JAX recognises no cluster here: pass --coordinator HOST:PORT, --num-processes and --process-id"
    ) from error
  except (RuntimeError, OSError) as error:
    raise InputError(f"--coordinator {coordinator} cannot be used: {error}") from error
  if threading.current_thread() is threading.main_thread():  # JAX has installed its own handler
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _check_reachable(address: str, *, listens: bool, timeout: int) -> None:
  """Raises `InputError` where JAX would end the process: a port in use, an unreachable coordinator."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or int(port) > 65535:
    raise InputError(f"--coordinator {address} must be HOST:PORT or auto")
  if listens:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(("", int(port)))
      except OSError as error:
        raise InputError(
          f"the port of --coordinator {address} cannot be used ({error.strerror}): choose another"
        ) from error
    return
  end, reason = time.monotonic() + timeout, ""
  while time.monotonic() < end:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      reason = error.strerror or str(error)
    time.sleep(0.2)
  raise InputError(
    f"--coordinator {address} did not answer within {timeout} s ({reason}): check that process 0 runs there"
  )


def _end_with_a_sentence() -> None:
  """Prints `LOST` when JAX aborts because another process is lost; a Python handler would not be called."""

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def ended(signum: int) -> None:
    del signum
    os.write(2, f"\naborted; if the lines above name no other cause: {LOST}\n".encode())
    os._exit(1)

  _end_with_a_sentence.kept = ended  # pyright: ignore[reportFunctionMemberAccess]
  ctypes.CDLL(None).signal(signal.SIGABRT, ended)


def is_lost(error: BaseException) -> bool:
  """Whether the end of another process caused this error, judging by the wording of each transport."""
  return any(word in str(error) for word in ("Gloo", "NCCL", "oordination service", "UNAVAILABLE"))


def writes() -> bool:
  """Whether this process writes files: only the first does."""
  return jax.process_index() == 0


def wait(what: str) -> None:
  """Waits until every process has reached this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def largest(value: int) -> int:
  """The largest value over all processes; each must call this at the same point."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def check_same(what: Any, arrays: Any) -> None:
  """Raises `InputError` unless all processes have the same arrays and the same JSON value `what`."""
  if jax.process_count() == 1:
    return
  digest = zlib.crc32(json.dumps(what, sort_keys=True).encode())
  for leaf in jax.tree.leaves(arrays):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    digest = zlib.crc32(np.ascontiguousarray(leaf).data, digest)
  found = np.asarray(multihost_utils.process_allgather(np.uint32(digest))).ravel()
  if other := np.flatnonzero(found != found[0]).tolist():
    raise InputError(
      f"process {other[0]} has different flags, images or networks from process 0: give all the same"
    )


def local(tree: Any) -> Any:
  """This process's copy of arrays that are the same on all devices; its own arrays as they are."""
  return jax.tree.map(lambda a: a if len(a.sharding.device_set) == 1 else a.addressable_data(0), tree)
