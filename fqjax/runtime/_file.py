r"""The container of an artifact: a prelude, a JSON header, sections of bytes; docs/format.md.

    magic            8 bytes, b'\x89FQX\r\n\x1a\n': broken by whatever takes the file for text
    version          u16
    packed           u8, 1 where the header is deflated
    alignment        u8, sections begin at multiples of it
    header           u32 bytes as stored, u32 bytes of the JSON, u32 CRC-32
    size             u64 bytes of the whole file

All numbers are little endian. The checksum of the header covers the prelude too, its own four bytes
taken as zero. `header['sections']` lists, in the order of the file, [stored bytes, CRC-32] of every
section, and the bytes it has when inflated where it is deflated. Between sections there are zeros.
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
import struct
from typing import Any, NamedTuple
import zlib

import numpy as np

MAGIC = b'\x89FQX\r\n\x1a\n'
VERSION = 1
_PRELUDE = struct.Struct('<8sHBBIIIQ')
_CRC_AT = 20
# What deflate can make of a byte, and never more.
_INFLATION = 1032
# A header is text, and no text is worth more than this; small ones may be anything.
_TEXT_INFLATION, _FREE_TEXT = 16, 1 << 20
# JSON deeper, and numbers longer, than anything this version writes.
_DEPTH, _DIGITS = 64, 20
# An error is to be read.
_LONGEST = 1000


class ArtifactError(ValueError):
  """A file that is not a whole and undamaged artifact; says which section, where, and why."""

  def __init__(self, text: str):
    super().__init__(text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...')


class Section(NamedTuple):
  """A stretch of the file.

  Attributes:
    offset: of its first byte.
    size: bytes as stored.
    checksum: CRC-32 of these.
    inflated: bytes when inflated; None where it is stored as it is.
  """

  offset: int
  size: int
  checksum: int
  inflated: int | None


def pack(
  header: Mapping[str, Any],
  sections: Sequence[bytes],
  *,
  alignment: int = 64,
  deflate: bool = False,
) -> bytes:
  """The bytes of a file.

  Args:
    header: what JSON can say; gets the entry 'sections'.
    sections: contents.
    alignment: of every section, 1..255.
    deflate: the header and every section that gets smaller by it.
  """
  stored, listed = [], []
  for data in sections:
    small = zlib.compress(data, 9) if deflate else data
    packed = len(small) < len(data)
    small = small if packed else data
    stored.append(small)
    listed.append([len(small), zlib.crc32(small), *([len(data)] if packed else [])])
  text = json.dumps(
    {**header, 'sections': listed}, separators=(',', ':'), allow_nan=False, ensure_ascii=False
  ).encode()
  head = zlib.compress(text, 9) if deflate else text
  body, end = [], _PRELUDE.size + len(head)
  for data in stored:
    body += [bytes(-end % alignment), data]
    end += len(body[-2]) + len(data)
  numbers = (MAGIC, VERSION, int(deflate), alignment, len(head), len(text))
  checksum = zlib.crc32(head, zlib.crc32(_PRELUDE.pack(*numbers, 0, end)))
  return b''.join((_PRELUDE.pack(*numbers, checksum, end), head, *body))


class File:
  """An artifact's bytes, checked.

  Args:
    data: uint8, the whole file; a memory map will do.

  Attributes:
    header: the JSON.
    sections: in the order of the file.

  Raises:
    ArtifactError: anything that is not as `pack` writes it. Sections are checked when read.
  """

  def __init__(self, data: np.ndarray):
    self._data = data
    if data.size < _PRELUDE.size:
      raise ArtifactError(
        f'prelude at byte 0: needs {_PRELUDE.size} bytes, the file has {data.size}; it is empty or '
        'cut off.'
      )
    start = data[: _PRELUDE.size].tobytes()
    magic, version, packed, alignment, size, raw, checksum, whole = _PRELUDE.unpack(start)
    if magic != MAGIC:
      raise ArtifactError(f'prelude at byte 0: {magic!r} is not the beginning of an artifact.')
    if version != VERSION:
      raise ArtifactError(
        f'prelude at byte 8: the file has version {version} of the format, this fqjax reads '
        f'{VERSION}; update fqjax.'
      )
    if whole != data.size:
      raise ArtifactError(
        f'prelude at byte 24: the file should have {whole} bytes and has {data.size}; it was cut '
        'off or added to.'
      )
    end = _PRELUDE.size + size
    if end > data.size:
      raise ArtifactError(f'header at byte {_PRELUDE.size}: {size} bytes reach beyond the file.')
    head = data[_PRELUDE.size : end]
    blank = start[:_CRC_AT] + bytes(4) + start[_CRC_AT + 4 :]
    if zlib.crc32(head.data, zlib.crc32(blank)) != checksum:
      raise ArtifactError(f'header at byte {_PRELUDE.size}: damaged, its checksum does not fit.')
    if packed > 1 or not alignment:
      raise ArtifactError(f'prelude at byte 10: packed {packed}, alignment {alignment}.')
    if packed and raw > max(_FREE_TEXT, _TEXT_INFLATION * size):
      raise ArtifactError(f'header at byte {_PRELUDE.size}: {size} bytes are no text of {raw}.')
    text = _inflate(head, raw, 'header', _PRELUDE.size) if packed else head.tobytes()
    self.header = _parse(text, raw)
    self.sections = self._locate(end, alignment)
    self._read: set[int] = set()

  def _locate(self, end: int, alignment: int) -> tuple[Section, ...]:
    listed = self.header.get('sections')
    if not isinstance(listed, list):
      raise ArtifactError('header: sections must be a list.')
    found = []
    for i, entry in enumerate(listed):
      numbers = isinstance(entry, list) and all(type(n) is int and n >= 0 for n in entry)
      if not numbers or len(entry) not in (2, 3):
        raise ArtifactError(f'header: section {i} is {entry!r}, not [bytes, checksum].')
      start = end + -end % alignment
      if start > end and self._data[end:start].any():
        raise ArtifactError(f'section {i}: the bytes {end} to {start} before it are not zero.')
      end = start + entry[0]
      if end > self._data.size:
        raise ArtifactError(
          f'section {i} at byte {start}: {entry[0]} bytes reach beyond the file, which ends at '
          f'{self._data.size}.'
        )
      found.append(Section(start, entry[0], entry[1], entry[2] if len(entry) == 3 else None))
    if end != self._data.size:
      raise ArtifactError(f'end: {self._data.size - end} bytes at {end} belong to no section.')
    return tuple(found)

  def read(self, index: int, what: str, most: int | None = None) -> np.ndarray:
    """The bytes of a section, checked, as uint8; a view of the file where it is stored plainly.

    Args:
      index: of the section.
      what: is in it, for messages.
      most: bytes it may be inflated to.

    Raises:
      ArtifactError: a damaged section, one there is not, or one that was read before.
    """
    if type(index) is not int or not 0 <= index < len(self.sections):
      raise ArtifactError(
        f'header: {what} names section {index!r}; there are {len(self.sections)}.'
      )
    if index in self._read:
      raise ArtifactError(f'header: section {index} ({what}) holds something else already.')
    self._read.add(index)
    section = self.sections[index]
    if most is not None and section.inflated is not None and section.inflated > most:
      raise ArtifactError(
        f'section {index} ({what}) at byte {section.offset}: {section.inflated} bytes when inflated '
        f'are more than the {most} it can need.'
      )
    data = self._data[section.offset : section.offset + section.size]
    if zlib.crc32(data.data) != section.checksum:
      raise ArtifactError(
        f'section {index} ({what}) at byte {section.offset}: damaged, its checksum does not fit.'
      )
    if section.inflated is None:
      return data
    text = _inflate(data, section.inflated, f'section {index} ({what})', section.offset)
    return np.frombuffer(text, np.uint8)

  def finish(self) -> None:
    """Refuses sections that nothing has read: nobody knows whether they are damaged."""
    if unread := set(range(len(self.sections))) - self._read:
      raise ArtifactError(f'section {min(unread)}: no array is in it.')


def open_file(path: str | os.PathLike, mmap: bool = True) -> File:
  """Maps a file into memory, or reads it, and checks its header.

  Args:
    path: of the file.
    mmap: map it.

  Raises:
    ArtifactError: naming the file, the section and the byte.
    OSError: it cannot be opened.
  """
  name = os.fspath(path)
  try:
    if mmap and os.path.getsize(name):  # nothing cannot be mapped
      return File(np.asarray(np.memmap(name, np.uint8, 'r')))
    return File(np.fromfile(name, np.uint8))
  except ArtifactError as error:
    raise ArtifactError(f'{name}: {error}') from None


def _inflate(data: np.ndarray, size: int, what: str, offset: int) -> bytes:
  if size > _INFLATION * data.size + 64:
    raise ArtifactError(
      f'{what} at byte {offset}: {data.size} bytes do not inflate to {size}; nothing does.'
    )
  stream = zlib.decompressobj()
  try:
    text = stream.decompress(data.tobytes(), size + 1)
  except zlib.error as error:
    raise ArtifactError(f'{what} at byte {offset}: cannot be inflated: {error}.') from None
  if len(text) != size or not stream.eof or stream.unused_data:
    raise ArtifactError(f'{what} at byte {offset}: does not inflate to the {size} bytes it names.')
  return text


def _parse(text: bytes, size: int) -> dict[str, Any]:
  at = f'header at byte {_PRELUDE.size}'
  if len(text) != size:
    raise ArtifactError(f'{at}: has {len(text)} bytes and should have {size}.')

  def unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
      raise ArtifactError(f'{at}: an object names one of {[key for key, _ in pairs]} twice.')
    return found

  def finite(word):
    number = float(word)
    if not math.isfinite(number):
      raise ArtifactError(f'{at}: {word} is not a finite number.')
    return number

  def whole(word):
    # Python has no largest integer, and everything done with a long one takes long.
    if len(word) > _DIGITS:
      raise ArtifactError(f'{at}: {word[:20]}... is a number of {len(word)} digits.')
    return int(word)

  try:
    header = json.loads(
      text.decode(),
      object_pairs_hook=unique,
      parse_float=finite,
      parse_int=whole,
      parse_constant=finite,
    )
  except ArtifactError:
    raise
  except RecursionError:
    raise ArtifactError(f'{at}: is nested more than {_DEPTH} deep.') from None
  except ValueError as error:
    raise ArtifactError(f'{at}: is not JSON: {error}.') from None
  if not isinstance(header, dict):
    raise ArtifactError(f'{at}: is not a JSON object.')
  level: list[Any] = [header]
  for _ in range(_DEPTH):
    level = [
      inner
      for outer in level
      if isinstance(outer, dict | list)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
  if level:
    raise ArtifactError(f'{at}: is nested more than {_DEPTH} deep.')
  return header
