"""Files that somebody has damaged, by accident or on purpose, from one that is whole."""

import copy
import random

import numpy as np

from fqjax.runtime import _file

_NUMBERS = (
  0, 1, -1, 2, 3, 7, 255, 256, 1 << 16, 1 << 31, 1 << 63, 1 << 70, -1 << 40, 1.5, 1e30,
)  # fmt: skip
_OTHERS = (
  'n',
  '3*n',
  '',
  None,
  True,
  [],
  {},
  [1, 2],
  [[0, 0]],
  'float32',
  'int8',
  'bitmask',
  'rice',
  'raw',
)


class Mutator:
  """Makes damaged files; in most of them every checksum is good again.

  Args:
    data: of a whole file.
    seed: of what is damaged.
  """

  def __init__(self, data: bytes, seed: int):
    self.data, self.random = data, random.Random(seed)
    file = _file.File(np.frombuffer(data, np.uint8))
    self.header = {key: value for key, value in file.header.items() if key != 'sections'}
    self.sections = [bytes(file.read(i, 'any')) for i in range(len(file.sections))]
    self.paths = [path for path in _paths(self.header) if path]

  def __call__(self) -> tuple[str, bytes]:
    """(what was done, the file); a file that equals the whole one is not given."""
    while True:
      kind = self.random.choices(('flip', 'cut', 'header', 'section'), (2, 1, 4, 3))[0]
      try:
        data = getattr(self, f'_{kind}')()
      except (ValueError, TypeError, OverflowError):
        continue  # cannot be written
      if data != self.data:
        return kind, data

  def _flip(self) -> bytes:
    data = bytearray(self.data)
    for _ in range(self.random.choice((1, 1, 3))):
      data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
    return bytes(data)

  def _cut(self) -> bytes:
    return self.data[: self.random.randrange(len(self.data))]

  def _header(self) -> bytes:
    header = copy.deepcopy(self.header)
    for _ in range(self.random.choice((1, 1, 2, 3))):
      self._change(header, self.random.choice(self.paths))
    return self._pack(header, self.sections)

  def _section(self) -> bytes:
    sections = [bytearray(section) for section in self.sections]
    i = self.random.randrange(len(sections))
    section = sections[i]
    for _ in range(self.random.choice((1, 1, 2, 5))):
      how = self.random.random()
      if how < 0.6 and section:
        reach = min(len(section), self.random.choice((16, 64, len(section))))
        section[self.random.randrange(reach)] = self.random.choice(
          (0, 1, 128, 255, self.random.randrange(256))
        )
      elif how < 0.75 and section:
        del section[self.random.randrange(len(section)) :]
      elif how < 0.9:
        section += bytes(self.random.randrange(50))
      else:
        section = sections[i] = bytearray(self.random.choice(self.sections))
    return self._pack(self.header, [bytes(section) for section in sections])

  def _pack(self, header, sections) -> bytes:
    deflate = self.random.random() < 0.5
    return _file.pack(header, sections, alignment=self.random.choice((1, 64)), deflate=deflate)

  def _change(self, header, path) -> None:
    inside = header
    try:
      for key in path[:-1]:
        inside = inside[key]
      self._set(inside, path[-1])
    except (KeyError, IndexError, TypeError):
      pass  # an earlier change took it away

  def _set(self, inside, key) -> None:
    how, value = self.random.random(), inside[key]
    if how < 0.1:
      del inside[key]
    elif how < 0.2 and isinstance(inside, list):
      inside.insert(key, self._anything())
    elif how < 0.35 and isinstance(inside, list):
      other = self.random.randrange(len(inside))
      inside[key], inside[other] = inside[other], value
    elif how < 0.75 and type(value) is int:
      inside[key] = value + self.random.choice((-1, 1, 2, -2, 10, 10**3, 10**6, 10**9))
    else:
      inside[key] = self._anything()

  def _anything(self):
    return copy.deepcopy(self.random.choice((*_NUMBERS, *_OTHERS, self.random.randrange(1000))))


def _paths(value, path=()):
  yield path
  if isinstance(value, dict | list):
    for key in value if isinstance(value, dict) else range(len(value)):
      yield from _paths(value[key], (*path, key))
