"""Where numbers of a run go: JSON lines, TensorBoard, the console; and what is counted beside them."""

from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
import threading
import time
from typing import Any, Protocol

import jax

from fqjax import files

_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'
_compiled = threading.local()
_listening = False


class Writer(Protocol):
  """A place for metrics; `fit` calls it on process 0 only.

  Examples:
    >>> class Printer:
    ...   def resume(self, step): ...
    ...   def write(self, step, scalars):
    ...     print(step, scalars)
    ...
    ...   def flush(self): ...
    ...   def close(self): ...
    >>> writer: Writer = Printer()
    >>> writer.write(1, {'loss': 0.5})
    1 {'loss': 0.5}
  """

  def resume(self, step: int) -> None:
    """Called once before the first write; forgets everything after `step`."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Takes the numbers of one report."""

  def flush(self) -> None:
    """Puts everything written so far on the disk."""

  def close(self) -> None:
    """Called once at the end."""


class JsonLines:
  """Writes one JSON object per report: `{"step": 100, "loss": 2.3, ...}`.

  Args:
    path: the file, appended to.

  Examples:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'metrics.jsonl'
    >>> writer = JsonLines(path)
    >>> writer.write(1, {'loss': 0.5})
    >>> writer.close()
    >>> read_json_lines(path)
    [{'step': 1, 'loss': 0.5}]
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = None

  def resume(self, step: int) -> None:
    """Drops the lines past `step` (they will be written again) and an unfinished last line."""
    if not self.path.exists():
      return
    kept = [r for r in read_json_lines(self.path) if r['step'] <= step]
    files.write_text(self.path, ''.join(_line(record) for record in kept))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends one line."""
    if self._file is None:
      self._file = open(self.path, 'a')  # noqa: SIM115 (open for the whole run)
    self._file.write(_line({'step': step, **scalars}))
    self._file.flush()

  def flush(self) -> None:
    """Forces the lines to the disk."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      # Every line was flushed when written; on a full disk that has raised, and would again.
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None


class TensorBoard:
  """Writes TensorBoard events, without TensorFlow.

  Args:
    folder: the log folder; one event file per start.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    self._purge = 0
    self._events: Any = None

  def resume(self, step: int) -> None:
    """Lets TensorBoard hide events past `step` that an interrupted run left."""
    self._purge = step + 1 if step else 0

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds one point to every curve."""
    # Imported on use (half a second). Not `SummaryWriter`: its thread dies on a full disk, and the
    # run then waits for it for ever; these calls write and raise here.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2 as pb
    from tensorboardX.summary import scalar

    if self._events is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      # The name has seconds only: two starts within one must not share a file.
      self._events = EventsWriter(str(self.folder / 'events'), f'.{time.time_ns()}')
      if self._purge:
        start = pb.SessionLog(status=pb.SessionLog.START)  # pyright: ignore
        self._events.write_event(pb.Event(step=self._purge, session_log=start))  # pyright: ignore
    event = pb.Event(step=step, wall_time=time.time())  # pyright: ignore
    for name, value in scalars.items():
      event.summary.MergeFrom(scalar(name, value))
    self._events.write_event(event)
    self._events.flush()

  def flush(self) -> None:
    """Nothing to do: every report is written out at once."""

  def close(self) -> None:
    """Closes the event file."""
    if self._events is not None:
      with contextlib.suppress(OSError):
        self._events.close()
      self._events = None


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads what `JsonLines` wrote; stops at an unfinished line.

  Args:
    path: the file; missing means no lines.

  Returns:
    One dict per line, `null` read back as NaN.
  """
  path = pathlib.Path(path)
  records = []
  for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      break
    records.append({k: math.nan if v is None else v for k, v in record.items()})
  return records


def format_line(step: int, total: int, scalars: Mapping[str, float]) -> str:
  """One aligned console line of a report.

  Examples:
    >>> format_line(50, 1000, {'loss': 2.30259, 'images_per_second': 512.3})
    '    50/1000   5%  loss 2.3026  images_per_second 512.3'
  """
  width = len(str(total))
  parts = [f'{step:>{max(width, 6)}}/{total} {step / max(total, 1):4.0%}']
  return '  '.join(parts + [f'{name} {_short(value)}' for name, value in scalars.items()])


def compile_count() -> int:
  """Number of programs XLA has compiled on this thread since the first call of this function."""
  global _listening
  if not _listening:
    jax.monitoring.register_event_duration_secs_listener(_on_event)
    _listening = True
  return getattr(_compiled, 'count', 0)


def memory_bytes() -> int:
  """Bytes in use now: device memory of the fullest local device, else resident memory (CPU)."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  used = [s['bytes_in_use'] for s in stats if 'bytes_in_use' in s]
  if used:
    return max(used)
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')
  except OSError:  # no /proc: the peak is the nearest there is (kilobytes, bytes on macOS)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def _on_event(event: str, duration_secs: float, **unused: Any) -> None:
  del duration_secs, unused
  # Per thread: a program compiled by a background save is not a recompiled step.
  if event == _COMPILE_EVENT:
    _compiled.count = getattr(_compiled, 'count', 0) + 1


def _line(record: Mapping[str, Any]) -> str:
  # Standard JSON has no NaN.
  clean = {
    k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()
  }
  return json.dumps(clean) + '\n'


def _short(value: float) -> str:
  if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9):
    return f'{value:,.0f}'
  return f'{value:.1f}' if abs(value) >= 100 else f'{value:.4f}'
