"""TFRecord files without TensorFlow, and their conversion to ArrayRecord inside a TFDS folder."""

from collections.abc import Callable, Iterator
import functools
import pathlib
import struct
from typing import BinaryIO

import numpy as np

from fqjax import files

_BLOCK = 1024
_MASK = 0xA282EAD8
# Longer than any example; a damaged length must not ask for that much memory.
_MAX_RECORD = 2**31


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
  """CRC32C is linear: what each byte adds by its distance from the end, and by how far it moves."""
  byte = np.arange(256, dtype=np.uint32)
  step = byte.copy()
  for _ in range(8):
    step = np.where(step & 1, (step >> 1) ^ np.uint32(0x82F63B78), step >> 1)

  def push(crc):  # the register after one more zero byte
    return step[crc & 0xFF] ^ (crc >> 8)

  ends = np.empty((_BLOCK, 256), np.uint32)
  ends[-1] = step
  for i in range(_BLOCK - 2, -1, -1):
    ends[i] = push(ends[i + 1])
  # The register after a whole block of zero bytes, by each of its four bytes.
  shift = np.stack([byte << np.uint32(8 * i) for i in range(4)])
  for _ in range(_BLOCK):
    shift = push(shift)
  return ends, shift


def crc32c(data: bytes) -> int:
  """CRC-32C (Castagnoli) of bytes.

  Source: RFC 3720, appendix B.4 (test values there).

  Example:
    >>> hex(crc32c(b'123456789'))
    '0xe3069283'
  """
  ends, shift = _tables()
  if len(data) < 4:  # too short to fold the initial register in
    crc = 0xFFFFFFFF
    for b in data:
      crc = int(ends[-1, (crc ^ b) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
  padding = -len(data) % _BLOCK
  x = np.zeros(padding + len(data), np.uint8)
  x[padding:] = np.frombuffer(data, np.uint8)
  # Leading zeros leave an empty register empty; the initial ones are the same as inverting the
  # first four bytes.
  x[padding : padding + 4] ^= 0xFF
  parts = np.bitwise_xor.reduce(ends[np.arange(_BLOCK), x.reshape(-1, _BLOCK)], axis=1)
  rows = [row.tolist() for row in shift]
  crc = 0
  for part in parts.tolist():
    crc = (
      rows[0][crc & 0xFF]
      ^ rows[1][crc >> 8 & 0xFF]
      ^ rows[2][crc >> 16 & 0xFF]
      ^ rows[3][crc >> 24]
    ) ^ part
  return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
  """The checksum as TFRecord stores it."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def read_tfrecords(path: str | pathlib.Path) -> Iterator[bytes]:
  """The records of an uncompressed TFRecord file, checksums verified.

  Each record is: length uint64, checksum of the length, data, checksum of the data; little-endian.

  Raises:
    ValueError: names file and byte offset of a truncated record or a wrong checksum.
  """
  with open(path, 'rb') as f:
    while True:
      offset = f.tell()
      head = f.read(12)
      if not head:
        return
      if len(head) < 12:
        raise ValueError(f'{path} is truncated at byte {offset}.')
      length, crc = struct.unpack('<QI', head)
      if masked_crc32c(head[:8]) != crc or length > _MAX_RECORD:
        raise ValueError(f'{path} is damaged at byte {offset}: checksum of a length is wrong.')
      body = f.read(length + 4)
      if len(body) < length + 4:
        raise ValueError(f'{path} is truncated at byte {offset}.')
      data = body[:-4]
      if masked_crc32c(data) != struct.unpack('<I', body[-4:])[0]:
        raise ValueError(f'{path} is damaged at byte {offset}: checksum of a record is wrong.')
      yield data


def write_tfrecord(file: BinaryIO, data: bytes) -> None:
  """Appends one record to an open file."""
  length = struct.pack('<Q', len(data))
  file.write(length + struct.pack('<I', masked_crc32c(length)))
  file.write(data + struct.pack('<I', masked_crc32c(data)))


def convert_shard(
  source: pathlib.Path, target: pathlib.Path, count: int, tick: Callable[[], None] = lambda: None
) -> None:
  """Copies the `count` records of a TFRecord file into an ArrayRecord file.

  The target appears under its name only when it is complete. `tick` is called per record.

  Raises:
    ValueError: a damaged file, or another number of records.
  """
  from array_record.python import array_record_module  # type: ignore[attr-defined]

  with files.replacing(target) as unfinished:
    # What TFDS itself writes.
    writer = array_record_module.ArrayRecordWriter(str(unfinished), 'group_size:1')
    found = 0
    try:
      for record in read_tfrecords(source):
        writer.write(record)
        found += 1
        tick()
    finally:
      writer.close()
    if found != count:
      raise ValueError(f'{source} holds {found} examples, its dataset_info.json says {count}.')
