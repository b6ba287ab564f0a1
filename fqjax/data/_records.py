"""Prepared sets: ArrayRecord shards of encoded images or of int16 coefficients.

A set is a folder per split with `metadata.json` and the shards it lists. The metadata is written
last, so a folder without it is unfinished. One record is a fixed header, the payload and the name
of the image it came from; nothing in it can execute.
"""

import json
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from fqjax.data import _images
from fqjax.data._sources import Source

METADATA = 'metadata.json'
FORMAT = 'fqjax-records'
VERSION = 1

KINDS = ('jpeg', 'coefficients')

# magic, kind, unused, length of the name, label, rows, columns, channels, unused, payload bytes.
# 24 bytes, so that int16 payloads stay aligned.
_HEADER = struct.Struct('<4sBBHiHHHHI')
_MAGIC = b'FQR1'


class Record(NamedTuple):
  """One stored example.

  Attributes:
    label: class number.
    name: where the image came from.
    image: encoded image, or None.
    coefficients: int16 [rows, columns, channels], or None.
  """

  label: int
  name: str
  image: bytes | None = None
  coefficients: np.ndarray | None = None


def pack(record: Record) -> bytes:
  """Encodes a record.

  Raises:
    ValueError: neither or both payloads, or coefficients that are not int16 [rows, columns, c].

  Example:
    >>> unpack(pack(Record(3, 'a.jpg', image=b'...')))
    Record(label=3, name='a.jpg', image=b'...', coefficients=None)
  """
  name = record.name.encode('utf-8', 'surrogateescape')[:65535]
  if (record.image is None) == (record.coefficients is None):
    raise ValueError('a record holds either an image or coefficients.')
  if record.image is not None:
    kind, shape, payload = 0, (0, 0, 0), record.image
  else:
    values = record.coefficients
    assert values is not None
    if values.dtype != np.int16 or values.ndim != 3 or max(values.shape) > 65535:
      raise ValueError(
        f'coefficients must be int16 [rows, columns, channels], got {values.dtype} '
        f'{list(values.shape)}.'
      )
    kind, shape, payload = 1, values.shape, values.astype('<i2').tobytes()
  header = _HEADER.pack(_MAGIC, kind, 0, len(name), record.label, *shape, 0, len(payload))
  return header + payload + name


def unpack(data: bytes, where: str = 'record') -> Record:
  """Decodes a record; coefficients are a read-only view of `data`.

  Raises:
    CorruptImageError: lengths or header do not fit.
  """
  if len(data) < _HEADER.size:
    raise _images.CorruptImageError(where, f'{len(data)} bytes are too few for a record', len(data))
  magic, kind, _, name_length, label, rows, columns, channels, _, length = _HEADER.unpack_from(data)
  if magic != _MAGIC or kind >= len(KINDS):
    raise _images.CorruptImageError(where, 'not a record of a prepared set', 0)
  end = _HEADER.size + length
  if len(data) != end + name_length:
    reason = f'the record promises {end + name_length} bytes and has {len(data)}'
    raise _images.CorruptImageError(where, reason, len(data))
  name = data[end:].decode('utf-8', 'replace')
  if kind == 0:
    return Record(label, name, image=data[_HEADER.size : end])
  if length != 2 * rows * columns * channels:
    reason = f'{length} bytes are not int16 [{rows}, {columns}, {channels}]'
    raise _images.CorruptImageError(where, reason, _HEADER.size)
  values = np.frombuffer(data, '<i2', rows * columns * channels, _HEADER.size)
  return Record(label, name, coefficients=values.reshape(rows, columns, channels))


class RecordSource(Source):
  """Reads back what `python -m fqjax.data.prepare` wrote.

  Args:
    path: the prepared set (the `--out` of prepare).
    split: its split.

  Attributes:
    metadata: dict of everything prepare was told: kind, block, channels, chroma, rounding, ...

  Raises:
    FileNotFoundError: no such set or split, or it is unfinished.
    ValueError: metadata of another version or without what is needed, or shards that are missing,
      of another size or outside of the folder.
  """

  def __init__(self, path: str | pathlib.Path, split: str = 'train'):
    root = pathlib.Path(path).expanduser()
    self.folder = root / split
    self.metadata = read_metadata(self.folder, root)
    self.name = f'records:{self.folder}'
    self.class_names = tuple(self.metadata['class_names'])
    self.num_classes = len(self.class_names)
    self._counts = [s['count'] for s in self.metadata['shards']]
    self._source = self._open()

  def _open(self):
    from array_record.python import array_record_data_source

    class Shard(NamedTuple):
      filename: str
      skip: int
      take: int
      examples_in_shard: int

    # Known counts: no shard has to be opened before it is read from.
    shards = [
      Shard(str(self.folder / s['file']), 0, s['count'], s['count'])
      for s in self.metadata['shards']
      if s['count']
    ]
    return array_record_data_source.ArrayRecordDataSource(shards)  # type: ignore[arg-type]

  def __len__(self) -> int:
    return self.metadata['count']

  def read(self, index: int) -> dict[str, Any]:
    where = f'{self.folder}[{index}]'
    try:
      data = self._source[index]
    except Exception as e:  # the reader's C++ errors have no common type
      raise _images.CorruptImageError(self._where(index), str(e).split('\n')[0]) from e
    record = unpack(data, where)
    if not 0 <= record.label < self.num_classes:
      raise _images.CorruptImageError(where, f'label {record.label} is not a class', 8)
    example: dict[str, Any] = {'label': record.label, 'name': f'{where} {record.name}'}
    if record.image is not None:
      example['image'] = record.image
    else:
      example['coefficients'] = record.coefficients
    return example

  def _where(self, index: int) -> str:
    for shard in self.metadata['shards']:
      if index < shard['count']:
        return f'{self.folder / shard["file"]}[{index}]'
      index -= shard['count']
    return f'{self.folder}[{index}]'

  def __getstate__(self):
    return {**self.__dict__, '_source': None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._source = self._open()


def _need_keys(values: Any, keys: tuple[str, ...], path: pathlib.Path) -> None:
  missing = [k for k in keys if not isinstance(values, dict) or k not in values]
  if missing:
    raise ValueError(
      f'{path} is not whole, it lacks {", ".join(map(repr, missing))}: copy the set again or '
      'prepare it anew.'
    )


def read_metadata(folder: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
  """Reads and checks the metadata of one split; raises as `RecordSource` does."""
  path = folder / METADATA
  if not path.is_file():
    if folder.is_dir():
      raise FileNotFoundError(
        f'{folder} is an unfinished set (no {METADATA}): run the same '
        '`python -m fqjax.data.prepare ...` command again, it continues where it stopped.'
      )
    there = sorted(p.parent.name for p in root.glob(f'*/{METADATA}'))
    raise FileNotFoundError(
      f'no prepared set in {folder.absolute()} (splits in {root}: {", ".join(there) or "none"}). '
      f'Write one: python -m fqjax.data.prepare --from SOURCE --split {folder.name} --out {root}'
    )
  try:
    metadata = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is damaged ({e}): copy the set again or prepare it anew.') from e
  _need_keys(metadata, ('format', 'version'), path)
  if metadata['format'] != FORMAT or metadata['version'] != VERSION:
    raise ValueError(
      f'{path} is {metadata["format"]} version {metadata["version"]}; this fqjax reads '
      f'{FORMAT} version {VERSION}.'
    )
  _need_keys(metadata, ('kind', 'count', 'class_names', 'skipped', 'plan', 'shards'), path)
  for shard in metadata['shards']:
    _need_keys(shard, ('file', 'count', 'bytes'), path)
    # Before the file is looked at: a set from elsewhere says nothing about other folders.
    if shard['file'] in ('', '.', '..') or re.search(r'[/\\:\0]', shard['file']):
      raise ValueError(
        f'{path} names a shard outside of its folder, {shard["file"]!r}: do not use this set.'
      )
    file = folder / shard['file']
    size = file.stat().st_size if file.is_file() else None
    if size != shard['bytes']:
      raise ValueError(
        f'{file} should have {shard["bytes"]} bytes and '
        f'{"is missing" if size is None else f"has {size}"}: copy the set again or prepare it anew.'
      )
  if metadata['count'] != sum(s['count'] for s in metadata['shards']):
    raise ValueError(f'{path}: its shards do not add up to {metadata["count"]} examples.')
  return metadata
