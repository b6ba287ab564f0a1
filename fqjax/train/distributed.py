"""Several processes: a guarded start, who is who, and a common end."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import sys
import threading

import jax
import numpy as np

_ASKED = 'FQJAX_DISTRIBUTED'


def initialize_distributed(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  distributed: bool | None = None,
  timeout: int = 300,
) -> bool:
  """Joins the processes of a run; the first call of `main`, before anything touches a device.

  Does nothing unless asked: by `distributed=True` (or `FQJAX_DISTRIBUTED=1`, what TPU pods need), by
  a coordinator (argument or `JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`), or by a launcher it recognises (`srun` with several tasks, Open MPI's `mpirun`).
  A second call does nothing.

  Args:
    coordinator: `host:port` of process 0; found by JAX on TPU pods, SLURM and Open MPI.
    num_processes: number of processes of the run.
    process_id: this process, `0 <= process_id < num_processes`.
    distributed: True asks, False forbids, None looks at the environment.
    timeout: seconds to wait for the others; then the process ends with status 1 and says why.

  Returns:
    Whether the run has several processes under one coordinator.

  Raises:
    RuntimeError: if JAX cannot join them, for example because it has used a device already.
    ValueError: if only some of coordinator, number and id are known.

  Examples:
    >>> initialize_distributed(distributed=False)
    False
  """
  env = os.environ
  coordinator = coordinator or env.get('JAX_COORDINATOR_ADDRESS')
  num_processes = _number(num_processes, env, 'JAX_NUM_PROCESSES')
  process_id = _number(process_id, env, 'JAX_PROCESS_ID')
  if distributed is None:
    distributed = env.get(_ASKED, '0') not in ('', '0') or bool(coordinator) or _launched(env)
  if not distributed:
    return False
  if jax.distributed.is_initialized():
    return True
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < 3 and not _launched(env):
    raise ValueError(
      f'initialize_distributed needs all of {list(given)} or none; {missing} is not given.'
      ' Set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID.'
    )
  advice = (
    f'the processes of this run did not find each other (coordinator {coordinator or "automatic"},'
    f' process {process_id} of {num_processes}, {timeout} s):\n  %s\n'
    'Start every process with the same command and coordinator, make sure its port is open, unset'
    ' proxy variables, and call initialize_distributed before anything uses a device. For a run'
    ' of one process leave FQJAX_DISTRIBUTED and JAX_COORDINATOR_ADDRESS unset.'
  )

  def give_up():
    # Waiting in C++ raises nothing: at its own time-out JAX aborts with a stack dump.
    print(advice % 'nobody answered in time', file=sys.stderr, flush=True)
    os._exit(1)

  watchdog = threading.Timer(timeout, give_up)
  watchdog.daemon = True
  watchdog.start()
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
      initialization_timeout=timeout + 30,
    )
  except (RuntimeError, ValueError) as e:
    raise RuntimeError(advice % e) from e
  finally:
    watchdog.cancel()
  local, total = jax.local_device_count(), jax.device_count()
  print(
    f'process {jax.process_index()} of {jax.process_count()}: {local} of {total}'
    f' {jax.devices()[0].device_kind} devices',
    flush=True,
  )
  return jax.process_count() > 1


def is_main() -> bool:
  """Whether this is process 0, the one that prints and writes metrics."""
  return jax.process_index() == 0


def synchronize(name: str) -> None:
  """Waits until every process is here; no process may leave a run before the others.

  Args:
    name: of the meeting point, the same everywhere; shown when processes meet at different ones.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def gather_text(text: str, limit: int = 1000) -> list[str]:
  """What every process has to say; called by all.

  Args:
    text: of this process; cut off after `limit` bytes.
    limit: the same everywhere.

  Returns:
    One text per process.

  Examples:
    >>> gather_text('all well')
    ['all well']
  """
  if jax.process_count() == 1:
    return [text]
  from jax.experimental import multihost_utils

  raw = text.encode()[:limit]
  padded = np.zeros(limit, np.uint8)
  padded[: len(raw)] = np.frombuffer(raw, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [bytes(row).rstrip(b'\0').decode(errors='replace') for row in rows]


def raise_together(error: Exception | None) -> None:
  """Raises on every process if any of them has an error; called by all.

  A process that leaves alone keeps the others waiting in their next collective for minutes.

  Args:
    error: what went wrong here, or None.

  Raises:
    Exception: this process's error.
    RuntimeError: the errors of other processes, with their numbers.

  Examples:
    >>> raise_together(None)
  """
  if jax.process_count() > 1:
    every = gather_text((str(error) or repr(error)) if error is not None else '')
    elsewhere = [f'process {i}: {message}' for i, message in enumerate(every) if message]
    if elsewhere and error is None:
      raise RuntimeError('\n'.join(elsewhere[:5]))
  if error is not None:
    raise error


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
  """Makes an error inside the block on any process one of all of them; entered by all.

  For work that one process may do alone, such as writing a file. The processes meet once, at the end
  of the block, which itself must not wait for the others; a single process meets nobody.

  Raises:
    Exception: as `raise_together`.

  Examples:
    >>> with fail_together():
    ...   text = 'written'
  """
  problem = None
  try:
    yield
  except Exception as e:
    problem = e
  raise_together(problem)


def enable_compile_cache(folder: str | os.PathLike) -> None:
  """Keeps compiled programs on disk, so that a restart does not compile again.

  Does nothing if there is a cache already: of `JAX_COMPILATION_CACHE_DIR`, of `jax.config` or of an
  earlier call (JAX opens one cache per process and stays with it).

  Args:
    folder: shared by runs of the same machine type.

  Examples:
    >>> import tempfile
    >>> enable_compile_cache(tempfile.mkdtemp())
    >>> jax.config.update('jax_compilation_cache_dir', None)  # off again
  """
  if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))


def _number(value: int | None, env: Mapping[str, str], name: str) -> int | None:
  if value is not None or name not in env:
    return value
  try:
    return int(env[name])
  except ValueError:
    sys.exit(f'{name}={env[name]!r} must be a whole number.')


def _launched(env: Mapping[str, str]) -> bool:
  # Counts of the running step, not of the allocation: `python x.py` inside `salloc` is one process.
  tasks = [env.get('SLURM_STEP_NUM_TASKS', '1'), env.get('OMPI_COMM_WORLD_SIZE', '1')]
  return any(t.isdigit() and int(t) > 1 for t in tasks)
