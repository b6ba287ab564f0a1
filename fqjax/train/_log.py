"""What a run says and keeps: console, writers, clock."""

from collections.abc import Sequence
import sys
import time
from typing import Any

from fqjax.data import Corrupt
from fqjax.train._corrupt import METRIC
from fqjax.train.distributed import is_main
from fqjax.train.metrics import (
  JsonLines,
  TensorBoard,
  Writer,
  format_line,
  memory_bytes,
  read_json_lines,
)


class Log:
  """Console, writers and clock; silent except on process 0."""

  def __init__(self, folder, start: int, total: int, writers, progress: bool | None):
    self.folder = folder
    self.total = total
    self.images = 0
    self.main = is_main()
    self.history: list[dict[str, Any]] = []
    self._writers: Sequence[Writer] = ()
    self._bar = None
    if self.main:
      json_lines = folder / 'metrics.jsonl'
      self._writers = (
        (JsonLines(json_lines), TensorBoard(folder / 'tb')) if writers is None else writers
      )
      for writer in self._writers:
        writer.resume(start)
      self.history = [r for r in read_json_lines(json_lines) if r['step'] <= start]
      if progress or (progress is None and sys.stderr.isatty()):
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=start, unit='step', dynamic_ncols=True)
    self.images = next((int(r['images']) for r in self.history[::-1] if 'images' in r), 0)
    self.finished = self.images  # of these, what the device is done with
    self._seconds = next((r['seconds'] for r in self.history[::-1] if 'seconds' in r), 0.0)
    self._began = time.perf_counter()
    self._rate = 0.0
    self.begin(start)

  def begin(self, i: int) -> None:
    """Starts the clock of speed and remaining time at step `i`, after compiling."""
    self._first = i
    self._running_since = time.perf_counter()
    self.restart_clock()

  def restart_clock(self) -> None:
    self._mark = time.perf_counter()
    self._marked = self.finished
    self._away = 0.0

  def measure(self) -> dict[str, float]:
    """Speed since the last call, evaluation and checkpoints taken out."""
    now = time.perf_counter()
    spent = now - self._mark - self._away
    images = self.finished - self._marked
    if images and spent > 0:
      self._rate = images / spent
      self.restart_clock()
    return {
      'images_per_second': round(self._rate, 2),
      'images': self.images,
      'seconds': round(self._seconds + now - self._began, 3),
      'memory_bytes': memory_bytes(),
    }

  def paused(self) -> '_Pause':
    return _Pause(self)

  def record(self, i: int, scalars, evaluation: bool = False) -> None:
    if not self.main:
      return
    self.history.append({'step': i, **scalars})
    try:
      for writer in self._writers:
        writer.write(i, scalars)
    except OSError as e:
      raise OSError(
        e.errno,
        f'the metrics of step {i} could not be written to {self.folder}: {e.strerror}. Checkpoints'
        ' are untouched; free some space and start the same command again',
      ) from e
    if evaluation:
      self.say('  eval ' + format_line(i, self.total, scalars).strip())
      return
    hidden = {'images', 'seconds', 'memory_bytes', 'recompiles', 'images_per_second'}
    if not scalars.get(METRIC):
      hidden.add(METRIC)
    shown = {k: v for k, v in scalars.items() if k not in hidden}
    if self._bar is not None:
      self._bar.set_postfix(
        loss=f'{scalars["loss"]:.4f}', img_s=f'{scalars["images_per_second"]:.0f}', refresh=False
      )
      self._bar.update(i - self._bar.n)
    else:
      done = max(i - self._first, 1)
      eta = (self.total - i) * (time.perf_counter() - self._running_since) / done
      self.say(
        format_line(i, self.total, shown)
        + f'  {scalars["images_per_second"]:.1f} images/s'
        + f'  {scalars["memory_bytes"] / 1e6:.0f} MB  eta {_clock(eta)}'
      )

  def report_corrupt(self, corrupt: Corrupt) -> None:
    """Names what the loader could not decode and left out."""
    if not corrupt.count:
      return
    shown = '; '.join(f'{name}: {reason}' for name, reason in list(corrupt.files.items())[:5])
    more = f' and {len(corrupt.files) - 5} more' if len(corrupt.files) > 5 else ''
    self.say(
      f'{corrupt.count} samples of {len(corrupt.files)} files could not be decoded and did not'
      f' count: {shown}{more}.'
    )

  def say(self, text: str) -> None:
    if not self.main:
      return
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, flush=True)

  def flush(self) -> None:
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
    if self._bar is not None:
      self._bar.close()


class _Pause:
  def __init__(self, log: Log):
    self._log = log

  def __enter__(self):
    self._since = time.perf_counter()

  def __exit__(self, *unused):
    self._log._away += time.perf_counter() - self._since


def _clock(seconds: float) -> str:
  hours, rest = divmod(round(seconds), 3600)
  return f'{hours}:{rest // 60:02}:{rest % 60:02}'
