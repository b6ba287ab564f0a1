"""Banks of equal size with as many values as the row deserves: DARB, with the count adapted.

    FQBANK: u32 rows, u32 columns, u16 size; count of every row, ceil(log2(size+1)) bits; places,
    ceil(log2 size) bits each, every row filled up to a byte; values. A bank has `count` values, the
    ragged last one at most as many as it has columns.

Column of a value: bank * size + place; values of row r start after those of the rows before.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live

MAGIC = b'FQBANK'


class Encoded(NamedTuple):
  """Values bank by bank.

  Attributes:
    shape: (rows, columns).
    size: columns per bank.
    counts: int64 [rows], values per bank, 0..size.
    index: uint8 or uint16 [values], place inside the bank, ascending.
    values: [values].
  """

  shape: tuple[int, int]
  size: int
  counts: np.ndarray
  index: np.ndarray
  values: np.ndarray


def row_lengths(columns: int, size: int, counts: np.ndarray) -> np.ndarray:
  """Values every row stores.

  Args:
    columns: of the matrix.
    size: columns per bank.
    counts: [rows], values per bank.

  Returns:
    int64 [rows].

  Example:
    >>> print(row_lengths(10, 4, np.array([0, 1, 3])))  # banks of 4, 4 and 2
    [0 3 8]
  """
  return counts * (columns // size) + np.minimum(counts, columns % size)


def encode(
  matrix: np.ndarray, size: int, counts: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Encoded:
  """Stores the same number of weights of every bank of a row, explicit zeros where fewer live.

  Args:
    matrix: [rows, columns].
    size: columns per bank, 1..65535; the last bank may be shorter.
    counts: [rows] integers, values per bank; by default the fullest bank of each row decides.
    mask: bool like `matrix`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for a size or counts out of range, a bank with more live weights than its count,
      another rank, a dtype that is not stored, or a mask that does not fit.

  Example:
    >>> encoded = encode(np.float32([[3, 0, 0, 4, 0, 5], [0, 0, 0, 0, 0, 1]]), 4)
    >>> print(encoded.counts, encoded.index, encoded.values)
    [2 1] [0 3 0 1 0 1] [3. 4. 0. 5. 0. 1.]
  """
  _container.code_of(matrix)
  live = _live.live(matrix, mask, 2)
  rows, columns = matrix.shape
  if not 1 <= size <= 0xFFFF:
    raise ValueError(f'size={size} of a bank must be 1..65535.')
  banks = _live.pad(live, 1, size).reshape(rows, -1, size)
  if counts is None:
    counts = banks.sum(2).max(1)
  counts = np.asarray(counts, np.int64)
  if counts.shape != (rows,) or (counts < 0).any() or (counts > size).any():
    raise ValueError(f'counts must be {rows} integers in 0..{size}, one per row.')
  per_bank = np.repeat(counts[:, None], banks.shape[1], 1)
  per_bank[:, -1] = np.minimum(counts, columns - (banks.shape[1] - 1) * size)
  chosen = _live.fill(banks, per_bank, 'bank')
  index = np.nonzero(chosen)[2].astype(_bits.uint_for(_bits.width_for(size)))
  values = matrix[chosen.reshape(rows, -1)[:, :columns]]
  return Encoded((rows, columns), size, counts, index, values)


def _places(encoded):
  """Row and bank of every value."""
  (rows, columns), size, counts, _, _ = encoded
  lengths = row_lengths(columns, size, counts)
  row = np.repeat(np.arange(rows), lengths)
  nth = np.arange(row.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  return row, nth // counts[row]


def decode(encoded: Encoded) -> np.ndarray:
  """The matrix, bit for bit."""
  row, bank = _places(encoded)
  out = np.zeros(encoded.shape, encoded.values.dtype)
  out[row, bank * encoded.size + encoded.index] = encoded.values
  return out


def _sections(encoded, value_bits):
  (rows, columns), size, counts, index, values = encoded
  head = _container.header(MAGIC, values, value_bits, 'IIH', rows, columns, size)
  width = _bits.width_for(size)
  lengths = row_lengths(columns, size, counts)
  return head, [
    _container.Part('index', counts, _bits.width_for(size + 1)),
    _container.Part('index', index, np.full(rows, width), lengths),
    _container.Part('values', values, _container.value_width(values, value_bits)),
  ]


def bits(encoded: Encoded, value_bits: int | None = None) -> _container.Bits:
  """Cost of the file; see `fqjax.runtime.codecs`."""
  return _container.measure(*_sections(encoded, value_bits))


def to_bytes(encoded: Encoded, value_bits: int | None = None) -> bytes:
  """The file; see `fqjax.runtime.codecs`."""
  return _container.write(*_sections(encoded, value_bits))


def from_bytes(data, limit: int = _container.LIMIT) -> Encoded:
  """Reads the file; ValueError names what is wrong and where."""
  reader = _container.Reader(data, MAGIC, limit)
  rows, columns, size = reader.numbers('header', 'IIH')
  reader.size('shape', rows, columns)
  reader.require(size >= 1, 'bank size', 'is 0')
  counts = reader.fields('counts', rows, _bits.width_for(size + 1)).astype(np.int64)
  reader.require((counts <= size).all(), 'counts', f'reach {counts.max()} of {size}')
  lengths = row_lengths(columns, size, counts)
  reader.promise(int(lengths.sum()))
  index = reader.rows('places', lengths, np.full(rows, _bits.width_for(size)))
  values = reader.values(index.size)
  encoded = Encoded((rows, columns), size, counts, index, values)
  row, bank = _places(encoded)
  column = bank * size + index
  inside = (index < size) & (column < columns)
  reader.require(inside.all(), 'places', f'leave their bank of {size} or the {columns} columns')
  ascend = (np.diff(row * columns + column) > 0).all()
  reader.require(ascend, 'places', 'do not ascend inside a bank')
  reader.end()
  return encoded
