"""Compressed sparse rows: the yardstick of the papers, with 32-bit row pointers.

FQCSRX: u32 rows, u32 columns, u8 index bits; rows+1 pointers of 32 bits; column of every value;
values, row by row, columns ascending
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live

MAGIC = b'FQCSRX'


class Encoded(NamedTuple):
  """Live values row by row.

  Attributes:
    shape: (rows, columns).
    index_bits: bits a column takes in the file.
    pointers: int64 [rows+1], where each row starts.
    columns: uint32 [live].
    values: [live].
  """

  shape: tuple[int, int]
  index_bits: int
  pointers: np.ndarray
  columns: np.ndarray
  values: np.ndarray


def encode(
  matrix: np.ndarray, mask: np.ndarray | None = None, index_bits: int | None = None
) -> Encoded:
  """Lists the live values of every row.

  Args:
    matrix: [rows, columns].
    mask: bool like `matrix`, True lives; by default every entry that is not +0.
    index_bits: bits per column index, up to 32; by default as few as can tell the columns apart.

  Raises:
    ValueError: for another rank, an empty matrix, a dtype that is not stored, a mask that does not
      fit, or too few index bits.

  Example:
    >>> encoded = encode(np.float32([[0, 3, 0], [1, 0, 2]]))
    >>> print(encoded.pointers, encoded.columns, bits(encoded).index)  # 3*32 + 3*2
    [0 1 3] [1 0 2] 102
  """
  _container.code_of(matrix)
  live = _live.live(matrix, mask, 2)
  rows, columns = matrix.shape
  least = _bits.width_for(columns)
  index_bits = least if index_bits is None else index_bits
  if not least <= index_bits <= _bits.WIDEST:
    raise ValueError(f'index_bits={index_bits} for {columns} columns must be {least}..32.')
  pointers = np.concatenate([[0], np.cumsum(live.sum(1))])
  return Encoded(
    (rows, columns), index_bits, pointers, np.nonzero(live)[1].astype(np.uint32), matrix[live]
  )


def decode(encoded: Encoded) -> np.ndarray:
  """The matrix, bit for bit."""
  out = np.zeros(encoded.shape, encoded.values.dtype)
  row = np.repeat(np.arange(encoded.shape[0]), np.diff(encoded.pointers))
  out[row, encoded.columns] = encoded.values
  return out


def _sections(encoded, value_bits):
  (rows, columns), index_bits, pointers, index, values = encoded
  head = _container.header(MAGIC, values, value_bits, 'IIB', rows, columns, index_bits)
  return head, [
    _container.Part('index', pointers, 32),
    _container.Part('index', index, index_bits),
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
  rows, columns, index_bits = reader.numbers('header', 'IIB')
  reader.size('shape', rows, columns)
  reader.require(
    _bits.width_for(columns) <= index_bits <= _bits.WIDEST, 'index bits', f'are {index_bits}'
  )
  pointers = read_pointers(reader, rows, columns)
  index = reader.fields('columns', int(pointers[-1]), index_bits).astype(np.uint32)
  check_columns(reader, pointers, index, columns)
  values = reader.values(index.size)
  reader.end()
  return Encoded((rows, columns), index_bits, pointers, index, values)


def read_pointers(reader: _container.Reader, rows: int, columns: int) -> np.ndarray:
  """Row pointers that begin at 0 and grow by at most `columns` a row.

  Args:
    reader: stands at the pointers.
    rows: number of rows.
    columns: entries a row has room for.

  Raises:
    ValueError: for others.
  """
  pointers = reader.fields('row pointers', rows + 1, 32).astype(np.int64)
  lengths = np.diff(pointers)
  reader.require(
    pointers[0] == 0 and (lengths >= 0).all() and (lengths <= columns).all(),
    'row pointers',
    f'do not begin at 0 or do not grow by 0..{columns} per row',
  )
  return pointers


def check_columns(
  reader: _container.Reader, pointers: np.ndarray, index: np.ndarray, columns: int
) -> None:
  """Raises ValueError unless indices ascend in every row and stay below `columns`.

  Args:
    reader: just read them.
    pointers: [rows+1].
    index: [pointers[-1]].
    columns: bound.
  """
  reader.require((index < columns).all(), 'columns', f'reach {index.max(initial=0)} of {columns}')
  rises = np.diff(index.astype(np.int64)) > 0
  starts = pointers[1:-1]
  # Where a row begins, any step is fine.
  rises[starts[(starts > 0) & (starts < index.size)] - 1] = True
  reader.require(rises.all(), 'columns', 'do not ascend inside a row')
