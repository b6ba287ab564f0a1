"""Checks a machine, or a pod, in under a minute: processes, mesh, one all-reduce, the workdir.

  python -m fqjax.train.preflight [--workdir DIR] [--timeout 120] [--distributed]
  python -m fqjax.train.preflight --coordinator HOST:PORT --num-processes N --process-id I

Exits with 0 if training can start; otherwise says which stage failed, and exits with 1 (an error) or
2 (nothing happened within the time-out).
"""

import argparse
import contextlib
from importlib import metadata
import os
import pathlib
import platform
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.train.checkpoint import check_workdir
from fqjax.train.distributed import (
  initialize_distributed,
  is_main,
  raise_together,
  synchronize,
)
from fqjax.train.mesh import batch_sharding, make_mesh, replicated_sharding


def main(argv: list[str] | None = None) -> int:
  """Runs all stages; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', help='also check that every process can write and read here')
  parser.add_argument('--timeout', type=int, default=120, help='seconds per stage')
  parser.add_argument('--distributed', action='store_true', help='several processes (TPU pods)')
  parser.add_argument('--coordinator', help='host:port of process 0')
  parser.add_argument('--num-processes', type=int)
  parser.add_argument('--process-id', type=int)
  args = parser.parse_args(argv)

  try:
    with _stage('start', args.timeout + 30):
      initialize_distributed(
        args.coordinator,
        args.num_processes,
        args.process_id,
        distributed=True if args.distributed or args.coordinator else None,
        timeout=args.timeout,
      )
    with _stage('devices', args.timeout):
      devices = jax.devices()
      _say(
        f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), '
        f'{jax.process_count()} process(es), {jax.local_device_count()} devices each'
      )
    with _stage('mesh', args.timeout):
      mesh = make_mesh()
      _say(f'mesh {dict(mesh.shape)}')
    with _stage('all-reduce', args.timeout):
      _say(check_all_reduce(mesh))
    with _stage('versions', args.timeout):
      _say(check_versions())
    if args.workdir:
      with _stage('workdir', args.timeout):
        _say(check_shared(args.workdir))
    with _stage('end', args.timeout):
      synchronize('fqjax.train.preflight: end')
  except (OSError, RuntimeError, ValueError) as e:
    print(f'preflight failed on {platform.node()}: {e}', file=sys.stderr, flush=True)
    return 1
  _say('preflight passed')
  return 0


def check_all_reduce(mesh: jax.sharding.Mesh) -> str:
  """Sums one number per device over the mesh and compares with the sum known beforehand.

  Raises:
    RuntimeError: if the devices add up to something else.
  """
  n = mesh.devices.size
  sharding = batch_sharding(mesh)
  numbers = np.arange(1, n + 1, dtype=np.float32)
  x = jax.make_array_from_callback((n,), sharding, lambda index: numbers[index])
  add = jax.jit(jnp.sum, out_shardings=replicated_sharding(mesh))
  total = float(add(x))
  began = time.perf_counter()
  for _ in range(10):
    add(x).block_until_ready()
  each = (time.perf_counter() - began) / 10
  wanted = n * (n + 1) / 2
  if total != wanted:
    raise RuntimeError(
      f'an all-reduce over {n} devices gave {total}, not {wanted}: a device or a link computes'
      ' wrongly. Restart the machines, or leave the faulty one out.'
    )
  return f'all-reduce over {n} devices: {total:.0f}, as it should be ({each * 1e3:.2f} ms)'


def check_versions() -> str:
  """Compares Python and JAX versions and device counts between processes.

  Raises:
    RuntimeError: naming the processes that differ from process 0.
  """
  mine = f'Python {platform.python_version()}, jax {jax.__version__}, jaxlib {metadata.version("jaxlib")}'
  mine += f', {jax.local_device_count()} local devices'
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    text = np.frombuffer(mine.encode()[:200].ljust(200), np.uint8)
    every = [bytes(row).decode().strip() for row in multihost_utils.process_allgather(text)]
    odd = [f'process {i}: {v}' for i, v in enumerate(every) if v != every[0]]
    if odd:
      raise RuntimeError(
        f'the processes differ; process 0: {every[0]}\n  '
        + '\n  '.join(odd[:5])
        + '\nInstall the same versions everywhere.'
      )
  return mine


def check_shared(workdir: str) -> str:
  """Checks that every process can write to the folder and sees what process 0 writes.

  Raises:
    OSError: if this process cannot, or the folder is not shared.
    RuntimeError: if another one cannot.
  """
  folder, problem = pathlib.Path(workdir).absolute(), None
  try:
    check_workdir(folder)
  except OSError as e:
    problem = e
  raise_together(problem)
  note = folder / '.preflight'
  nonce = np.uint32(os.getpid() ^ (time.time_ns() & 0xFFFFFFFF))
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    nonce = np.uint32(multihost_utils.broadcast_one_to_all(nonce))
  if is_main():
    note.write_text(str(nonce))
  synchronize('fqjax.train.preflight: note written')
  if not _read_within(note, str(nonce), 10):
    problem = OSError(
      f'{folder} is not shared: process {jax.process_index()} does not see what process 0 wrote.'
      ' Use a folder on a network file system (NFS, Filestore, Lustre, a mounted bucket).'
    )
  synchronize('fqjax.train.preflight: note read')
  if is_main():
    note.unlink(missing_ok=True)
  raise_together(problem)
  free = os.statvfs(folder)
  return f'workdir {folder}: writable, shared, {free.f_bavail * free.f_frsize / 1e9:.1f} GB free'


def _read_within(path: pathlib.Path, text: str, seconds: float) -> bool:
  end = time.monotonic() + seconds  # network file systems show new files late
  while time.monotonic() < end:
    with contextlib.suppress(OSError):
      if path.read_text() == text:
        return True
    time.sleep(0.2)
  return False


@contextlib.contextmanager
def _stage(name: str, seconds: float):
  # A hanging collective cannot be interrupted from Python, only ended with the process.
  def end():
    print(
      f"preflight: stage '{name}' did not finish within {seconds:.0f} s on {platform.node()}. "
      f'{_HINTS.get(name, "Another process is missing or stuck; look at its output.")}',
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


_HINTS = {
  'start': 'Is the coordinator port open, and did every process get the same command?',
  'devices': 'Is another program holding the accelerator?',
  'all-reduce': 'Is every process running, and does the network between the hosts work?',
  'workdir': 'Does the file system answer?',
}


def _say(text: str) -> None:
  if is_main():
    print(text, flush=True)


if __name__ == '__main__':
  sys.exit(main())
