"""What a run could not decode, over all its processes and starts."""

import json
import pathlib
from typing import Any

import jax

from fqjax import files
from fqjax.data import Corrupt
from fqjax.train.distributed import gather_text

METRIC = 'data/corrupt'
FILE = 'corrupt.json'

# What a process tells the others: so many bytes, with so many names.
_BYTES, _NAMES = 4000, 5


class CorruptLog:
  """Adds up the counters of a loader's iterators.

  The count continues that of `metrics.jsonl`; names are kept in `corrupt.json`, which a run that
  goes on from an earlier checkpoint finds complete.

  Attributes:
    total: as of the last `collect`.
    counted: whether the loader counts.
  """

  def __init__(self, folder: pathlib.Path, batches: Any, history: list[dict[str, Any]]):
    self._path = folder / FILE
    self._loader: Corrupt | None = getattr(batches, 'corrupt', None)
    self.counted = self._loader is not None
    self._before = next((int(r[METRIC]) for r in history[::-1] if METRIC in r), 0)
    self._written: dict[str, str] = {}
    if self._path.exists():
      self._written = json.loads(self._path.read_text(encoding='utf-8'))
    self.total = Corrupt(self._before, dict(self._written))

  def collect(self) -> None:
    """Asks all processes; called by all."""
    if self._loader is None:
      return
    if jax.process_count() == 1:
      found = [self._loader]
    else:
      texts = gather_text(_message(self._loader), _BYTES)
      found = [Corrupt(**json.loads(text)) for text in texts]
    self.total.count = self._before + sum(c.count for c in found)
    for c in found:
      self.total.files.update(c.files)

  def write(self) -> None:
    """Puts the names on the disk."""
    if self.total.files != self._written:
      files.write_text(self._path, json.dumps(self.total.files, indent=1, ensure_ascii=False))
      self._written = dict(self.total.files)


def _message(corrupt: Corrupt) -> str:
  named = list(corrupt.files.items())[:_NAMES]
  while True:
    text = json.dumps({'count': corrupt.count, 'files': dict(named)}, ensure_ascii=False)
    if len(text.encode()) <= _BYTES:
      return text
    named.pop()
