"""Checkpoints: written in the background, atomic, checked before they are trusted.

This module alone imports Orbax, of which it uses `StandardCheckpointer` (the interface that has kept
its names through every 0.x release). On disk:

    <root>/<step>/                 arrays, written by Orbax, renamed into place when complete
    <root>/<step>/fqjax.json       written last: leaves, loader position, SHA-256 of every file

A checkpoint without a valid `fqjax.json` does not count. The arrays are a nested dict of the state's
paths, so plain Orbax can open them too.
"""

from collections.abc import Mapping
import errno
import hashlib
import json
import os
import pathlib
import shutil
import threading
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
import numpy as np
import orbax.checkpoint as ocp

from fqjax import files
from fqjax.train.distributed import fail_together, is_main
from fqjax.train.mesh import is_key, key_data, like_key

PyTree = Any

_MANIFEST = 'fqjax.json'
_FORMAT = 1


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none of those on disk can be used."""


class Restored(NamedTuple):
  """What a checkpoint gives back.

  Attributes:
    step: number of finished steps.
    state: the tree, in the template's types and shardings.
    position: the loader position saved with it, or None.
  """

  step: int
  state: PyTree
  position: Any


class Checkpoints:
  """The checkpoints of one run.

  With several processes every method is called by all of them; the folder must be shared.

  Args:
    root: folder of the checkpoints; made when first written to.
    keep: how many of the newest to keep.

  Raises:
    ValueError: if `keep < 1`.

  Examples:
    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.save(10, {'w': jax.numpy.arange(3)}, position={'epoch': 1})
    >>> checkpoints.wait()
    >>> step, state, position = checkpoints.restore({'w': jax.numpy.zeros(3, int)})
    >>> print(step, state['w'], position)
    10 [0 1 2] {'epoch': 1}
    >>> checkpoints.close()
  """

  def __init__(self, root: str | os.PathLike, keep: int = 3):
    if keep < 1:
      raise ValueError(f'keep counts the checkpoints to keep and must be >= 1, got {keep}.')
    self.root = pathlib.Path(root).absolute()
    self.keep = keep
    self._orbax = ocp.StandardCheckpointer()
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._saving: int | None = None

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, oldest first (files not checked)."""
    if not self.root.is_dir():
      return []
    names = [p.name for p in self.root.iterdir() if p.name.isdigit()]
    return sorted(int(n) for n in names if (self.root / n / _MANIFEST).is_file())

  def save(self, step: int, state: PyTree, position: Any = None) -> None:
    """Starts writing a checkpoint; returns when the arrays are copied to the host.

    Args:
      step: number of finished steps; names the checkpoint.
      state: pytree of arrays; may be donated as soon as this returns.
      position: the loader position, anything JSON can hold.

    Raises:
      CheckpointError: if the save before this one failed, or this one fails at once. Checkpoints
        already on disk stay as they are.
      TypeError: if JSON cannot hold `position`.
    """
    with fail_together():
      self.wait()
      try:
        json.dumps(position)
      except (TypeError, ValueError) as e:
        raise TypeError(
          f'the loader position {position!r} must be JSON (dicts, lists, numbers, strings): {e}.'
        ) from e
    manifest = {
      'format': _FORMAT,
      'step': step,
      'position': position,
      'leaves': {path: [str(x.dtype), list(x.shape)] for path, x in _leaves(state).items()},
    }
    self._saving = step
    try:
      self.root.mkdir(parents=True, exist_ok=True)
      self._orbax.save(self.root / str(step), _nested(state))
    except Exception as e:
      raise self._failed(e) from e
    self._thread = threading.Thread(target=self._finish, args=(step, manifest), daemon=False)
    self._thread.start()

  def check(self) -> None:
    """Raises the error of a background save, if it has already failed."""
    if self._thread is None or not self._thread.is_alive():
      self.wait()

  def wait(self) -> None:
    """Waits until the running save is complete.

    Raises:
      CheckpointError: if it failed.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise self._failed(error) from error

  def close(self) -> None:
    """Waits and lets go of Orbax's threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def restore(
    self, template: PyTree, step: int | None = None, *, repair: bool = False
  ) -> Restored | None:
    """Reads the newest checkpoint whose files are intact.

    A damaged one is reported and the one before it is used.

    Args:
      template: tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings: the wanted structure,
        dtypes and devices. How many devices wrote the checkpoint does not matter.
      step: this one and no other.
      repair: clear away what a killed run left behind and set damaged checkpoints aside (renamed),
        so that their steps can be written again. Only for the one run that writes here.

    Returns:
      A `Restored`, or None if there is no checkpoint at all.

    Raises:
      CheckpointError: if there are checkpoints but none is intact, or `step` is missing or damaged.
      ValueError: if the checkpoint's structure differs from the template's; lists where.
    """
    with fail_together():
      self.wait()
    chosen, message = -1, ''
    if is_main():
      try:
        chosen = self._choose(step, repair)
      except CheckpointError as e:
        message = str(e)
      except OSError as e:
        message = f'the checkpoints in {self.root} could not be looked through: {e}.'
    chosen, message = _from_main(chosen, message)
    if message:
      raise CheckpointError(message)
    if chosen < 0:
      return None
    with fail_together():
      manifest = _read_manifest(self.root / str(chosen))
      _check_structure(self.root / str(chosen), manifest['leaves'], template)
    data = self._orbax.restore(self.root / str(chosen), _nested(template, _target))
    leaves = _leaves(data)
    likes, treedef = jax.tree.flatten(template)
    state = treedef.unflatten(
      [
        like_key(leaves[path] if path in leaves else _empty(like), like)
        for path, like in zip(_paths(template), likes, strict=True)
      ]
    )
    return Restored(chosen, state, manifest['position'])

  def _choose(self, step: int | None, repair: bool) -> int:
    if repair:
      self._clear_unfinished()
    steps = self.steps()
    if step is not None:
      if step not in steps:
        raise CheckpointError(f'no checkpoint of step {step} in {self.root}; there are {steps}.')
      steps = [step]
    problems = []
    for candidate in reversed(steps):
      path = self.root / str(candidate)
      problem = _damage(path)
      if not problem:
        if problems:
          print(
            '\n'.join(problems) + f'\nUsing the checkpoint of step {candidate} instead.', flush=True
          )
        return candidate
      note = f'Damaged checkpoint {path}: {problem}.'
      if repair:
        aside = _free_name(self.root / f'damaged-{candidate}')
        path.rename(aside)
        note += f' Set aside as {aside.name}; delete it when you have looked at it.'
      problems.append(note)
    if not problems:
      return -1
    raise CheckpointError(
      '\n'.join(problems)
      + f'\nNo intact checkpoint is left in {self.root}. Bring one back from a backup, or start'
      ' anew in an empty workdir.'
    )

  def _clear_unfinished(self) -> None:
    if not self.root.is_dir():
      return
    for path in self.root.iterdir():
      unfinished = path.name.isdigit() and not (path / _MANIFEST).is_file()
      if unfinished or '.orbax-checkpoint-tmp' in path.name:
        print(f'Removing unfinished checkpoint {path.name} (a run ended while writing it).')
        shutil.rmtree(path, ignore_errors=True)

  def _finish(self, step: int, manifest: dict) -> None:
    try:
      self._orbax.wait_until_finished()
      if is_main():
        path = self.root / str(step)
        manifest['files'] = _checksums(path)
        _write_manifest(path, manifest)
        for old in self.steps()[: -self.keep]:
          # First the file that makes it count: a kill in between leaves no half checkpoint.
          (self.root / str(old) / _MANIFEST).unlink()
          shutil.rmtree(self.root / str(old))
    except BaseException as e:
      self._error = e

  def _failed(self, error: BaseException) -> CheckpointError:
    text = str(error)
    if is_main():
      for path in self.root.glob(f'{self._saving}.orbax-checkpoint-tmp*'):
        shutil.rmtree(path, ignore_errors=True)  # give the space back
    full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
      words in text for words in ('No space left', 'quota exceeded', 'File too large')
    )
    steps = self.steps()
    kept = f'The one of step {steps[-1]} is untouched' if steps else 'There is none before it'
    reason = f'{type(error).__name__}: {text[:500]}'
    advice = ''
    if full:
      reason = 'the disk is full, or a quota reached'
      advice = ' Free some space and start the same command again.'
    return CheckpointError(
      f'the checkpoint of step {self._saving} could not be written to {self.root}: {reason}.'
      f' {kept}.{advice}'
    )


def check_workdir(workdir: str | os.PathLike, needed: int = 0) -> pathlib.Path:
  """Makes sure a run can write where it wants to, before it starts.

  Args:
    workdir: the folder; made if missing.
    needed: bytes the run will want for its checkpoints.

  Returns:
    The folder as an absolute path.

  Raises:
    OSError: if it cannot be made or written to, or has fewer than `needed` bytes free.

  Examples:
    >>> import tempfile
    >>> check_workdir(tempfile.mkdtemp(), needed=1000).is_dir()
    True
  """
  path = pathlib.Path(workdir).absolute()
  probe = path / f'.write-probe-{jax.process_index()}-{os.getpid()}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    with open(probe, 'wb') as f:
      f.write(bytes(4096))
      f.flush()
      os.fsync(f.fileno())
    probe.unlink()
  except OSError as e:
    probe.unlink(missing_ok=True) if path.is_dir() else None
    raise OSError(
      e.errno,
      f'cannot write to the workdir {path}: {e.strerror}. Choose another --workdir'
      ' (with several processes: one that all of them can write to)',
    ) from e
  free = shutil.disk_usage(path).free
  if free < needed:
    raise OSError(
      errno.ENOSPC,
      f'the workdir {path} has {free / 1e6:,.1f} MB free, but the checkpoints of this run need'
      f' {needed / 1e6:,.1f} MB. Free some space, keep fewer checkpoints (keep=1) or choose'
      ' another --workdir',
    )
  return path


def state_bytes(state: PyTree) -> int:
  """Bytes of one copy of a tree (an upper bound of its checkpoint, which is compressed).

  Examples:
    >>> state_bytes({'w': jax.numpy.zeros((3, 4))})
    48
  """
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in _leaves(state).values())


def _paths(tree: PyTree) -> list[str]:
  return ['/'.join(_parts(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _parts(path) -> list[str]:
  return [jax.tree_util.keystr((k,), simple=True) for k in path]


def _leaves(tree: PyTree) -> dict[str, Any]:
  leaves = {}
  for path, x in zip(_paths(tree), jax.tree.leaves(tree), strict=True):
    if path in leaves:
      raise ValueError(f"two leaves of the state are both called '{path}'; rename one.")
    leaves[path] = jax.eval_shape(key_data, x) if is_key(x) else x
  return leaves


def _nested(tree: PyTree, leaf_fn=key_data) -> dict:
  """The tree as dicts named by its paths: what is stored does not depend on optax's types."""
  result: dict = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if not x.size:
      continue  # Orbax refuses empty arrays; their shape is in the manifest
    *parents, name = _parts(path)
    node = result
    for part in parents:
      node = node.setdefault(part, {})
    node[name] = leaf_fn(x)
  return result


def _target(x: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(x, 'sharding', None) or SingleDeviceSharding(jax.local_devices()[0])
  data = jax.eval_shape(key_data, x) if is_key(x) else x
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _empty(like: Any) -> jax.Array:
  target = _target(like)
  return jax.device_put(np.zeros(target.shape, target.dtype), target.sharding)


def _check_structure(path: pathlib.Path, saved: Mapping[str, list], template: PyTree) -> None:
  wanted = {p: [str(x.dtype), list(x.shape)] for p, x in _leaves(template).items()}
  if saved == wanted:
    return

  def show(entry):
    return 'absent' if entry is None else f'{entry[0]}{entry[1]}'

  differing = [p for p in {**saved, **wanted} if saved.get(p) != wanted.get(p)]
  lines = [f'  {p}: {show(saved.get(p))} / {show(wanted.get(p))}' for p in differing[:8]]
  more = f'\n  ... and {len(differing) - 8} more' if len(differing) > 8 else ''
  raise ValueError(
    f'the checkpoint {path} does not fit this run (saved / wanted):\n'
    + '\n'.join(lines)
    + more
    + '\nUse the model, optimizer and EMA setting it was written with, or another workdir.'
  )


def _checksums(path: pathlib.Path) -> dict[str, list]:
  result = {}
  for file in sorted(path.rglob('*')):
    if file.is_file() and file.name != _MANIFEST:
      with open(file, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
      result[file.relative_to(path).as_posix()] = [file.stat().st_size, digest]
  return result


def _digest(manifest: Mapping[str, Any]) -> str:
  body = {k: v for k, v in manifest.items() if k != 'sha256'}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: pathlib.Path, manifest: dict) -> None:
  manifest['sha256'] = _digest(manifest)
  files.write_text(path / _MANIFEST, json.dumps(manifest))


def _read_manifest(path: pathlib.Path) -> dict:
  return json.loads((path / _MANIFEST).read_text())


def _damage(path: pathlib.Path) -> str:
  """What is wrong with a checkpoint's files; empty if nothing is."""
  try:
    manifest = _read_manifest(path)
    intact = manifest['sha256'] == _digest(manifest)
  except (OSError, ValueError, KeyError, TypeError):
    intact = False
  if not intact:
    return f'{_MANIFEST} is not readable'
  for name, (size, digest) in manifest['files'].items():
    file = path / name
    if not file.is_file():
      return f'{name} is missing'
    if file.stat().st_size != size:
      return f'{name} has {file.stat().st_size} bytes, {size} were written'
    with open(file, 'rb') as f:
      if hashlib.file_digest(f, 'sha256').hexdigest() != digest:
        return f'{name} has changed since it was written'
  return ''


def _free_name(path: pathlib.Path) -> pathlib.Path:
  candidate, n = path, 1
  while candidate.exists():
    candidate, n = path.with_name(f'{path.name}-{n}'), n + 1
  return candidate


def _from_main(number: int, message: str) -> tuple[int, str]:
  """Process 0's choice, on every process."""
  if jax.process_count() == 1:
    return number, message
  from jax.experimental import multihost_utils

  text = np.zeros(2048, np.uint8)
  raw = np.frombuffer(message.encode()[:2048], np.uint8)
  text[: len(raw)] = raw
  number, text = multihost_utils.broadcast_one_to_all((np.int32(number), text))
  return int(number), bytes(np.asarray(text)).rstrip(b'\0').decode(errors='replace')
