"""One weight per block, blocks of 2**e columns, e chosen row by row (DARB and block-max).

    FQDARB: u32 rows, u32 columns, u8 lanes (1); exponent of every row, 3 bits; places, e bits each,
    every row filled up to a byte; values. All row by row, one value per block.

Column of survivor j of a row: (j << e) | place. Scales of quantised values belong to the graph.

Source: Ren et al., "DARB: A Density-Adaptive Regular-Block Pruning for Deep Neural Networks", AAAI
2020. The layout is our own.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live

MAGIC = b'FQDARB'
_CODE_BITS = 3
# Interleaving rows for vector lanes happens at load; the byte keeps room for files that hold it.
_LANES = 1


class Encoded(NamedTuple):
  """One value per block.

  Attributes:
    shape: (rows, columns).
    exponents: int64 [rows], a row has blocks of 2**e columns, e in 0..7.
    index: uint8 [values], place inside the block.
    values: [values].
  """

  shape: tuple[int, int]
  exponents: np.ndarray
  index: np.ndarray
  values: np.ndarray


def row_lengths(columns: int, exponents: np.ndarray) -> np.ndarray:
  """Values every row stores: ceil(columns / 2**e).

  Args:
    columns: of the matrix.
    exponents: [rows].

  Returns:
    int64 [rows].

  Example:
    >>> print(row_lengths(3000, np.array([0, 4])))
    [3000  188]
  """
  return -(-columns >> exponents)


def largest_exponents(live: np.ndarray) -> np.ndarray:
  """Largest blocks that hold at most one live weight each, none larger than the row needs.

  Args:
    live: bool [rows, columns].

  Returns:
    int64 [rows], 0..7.

  Example:
    >>> print(largest_exponents(np.array([[1, 0, 0, 1], [1, 1, 0, 0]], bool)))
    [1 0]
  """
  rows, columns = live.shape
  exponents = np.zeros(rows, np.int64)
  for e in range(1, min(_bits.width_for(columns), 7) + 1):
    # Aligned blocks are nested: what holds at 2**e held at every smaller one.
    counts = np.add.reduceat(live, np.arange(0, columns, 1 << e), 1, dtype=np.int32)
    exponents[(counts <= 1).all(1)] = e
  return exponents


def encode(
  matrix: np.ndarray, exponents: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Encoded:
  """Stores one weight per block, an explicit zero where none lives.

  Args:
    matrix: [rows, columns].
    exponents: [rows] integers in 0..7, or one for all rows; by default the largest that fit. Blocks
      of other sizes go into the bank format with counts of 1.
    mask: bool like `matrix`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for exponents out of range, a block with more than one live weight, another rank, a
      dtype that is not stored, or a mask that does not fit.

  Example:
    >>> encoded = encode(np.float32([[0.9, 0, 0, 0.8, -0.7, 0, 0.6, 0]]), [1])
    >>> print(encoded.index, decode(encoded)[0, :5], bits(encoded).index)  # 4*1 + 3
    [0 1 0 0] [ 0.9  0.   0.   0.8 -0.7] 7
  """
  _container.code_of(matrix)
  live = _live.live(matrix, mask, 2)
  rows, columns = matrix.shape
  given = largest_exponents(live) if exponents is None else np.asarray(exponents)
  if given.shape not in ((), (rows,)) or given.dtype.kind not in 'iu' or given.size == 0:
    raise ValueError(f'exponents must be one integer, or {rows}, one per row; got {exponents!r}.')
  if given.min() < 0 or given.max() > 7:
    raise ValueError(f'exponents {given.min()}..{given.max()} must be 0..7: blocks of 1..128.')
  given = np.broadcast_to(given, (rows,)).astype(np.int64)
  lengths = row_lengths(columns, given)
  starts = np.cumsum(lengths) - lengths
  index = np.zeros(int(lengths.sum()), np.uint8)
  values = np.zeros(index.size, matrix.dtype)
  for e in np.unique(given).tolist():
    members = np.flatnonzero(given == e)
    blocks = _live.pad(live[members], 1, 1 << e).reshape(members.size, -1, 1 << e)
    crowded = blocks.sum(2, dtype=np.int32) > 1
    if crowded.any():
      row, block = np.argwhere(crowded)[0]
      raise ValueError(
        f'block {block} of row {members[row]} has more than one live weight among {1 << e} columns; '
        'project first, or take a smaller exponent.'
      )
    place = blocks.argmax(2)
    at = starts[members, None] + np.arange(place.shape[1])
    index[at] = place
    values[at] = matrix[members[:, None], (np.arange(place.shape[1]) << e) | place]
  return Encoded((rows, columns), given, index, values)


def columns_of(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
  """Row and column of every value.

  Args:
    encoded: any.

  Returns:
    int64 [values] and int64 [values].

  Example:
    >>> encoded = encode(np.float32([[0.9, 0, 0, 0.8, -0.7, 0, 0.6, 0]]), [1])
    >>> print(columns_of(encoded)[1])
    [0 3 4 6]
  """
  lengths = row_lengths(encoded.shape[1], encoded.exponents)
  row = np.repeat(np.arange(encoded.shape[0]), lengths)
  nth = np.arange(row.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  return row, (nth << encoded.exponents[row]) | encoded.index


def decode(encoded: Encoded) -> np.ndarray:
  """The matrix, bit for bit."""
  out = np.zeros(encoded.shape, encoded.values.dtype)
  out[columns_of(encoded)] = encoded.values
  return out


def _sections(encoded, value_bits):
  (rows, columns), exponents, index, values = encoded
  head = _container.header(MAGIC, values, value_bits, 'IIB', rows, columns, _LANES)
  return head, [
    _container.Part('index', exponents, _CODE_BITS),
    _container.Part('index', index, exponents, row_lengths(columns, exponents)),
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
  rows, columns, lanes = reader.numbers('header', 'IIB')
  reader.size('shape', rows, columns)
  reader.require(lanes == _LANES, 'lanes', f'are {lanes}; this version reads {_LANES}')
  exponents = reader.fields('exponents', rows, _CODE_BITS).astype(np.int64)
  lengths = row_lengths(columns, exponents)
  reader.promise(int(lengths.sum()))
  index = reader.rows('places', lengths, exponents)
  values = reader.values(index.size)
  encoded = Encoded((rows, columns), exponents, index, values)
  column = columns_of(encoded)[1]
  reader.require((column < columns).all(), 'places', f'reach column {column.max()} of {columns}')
  reader.end()
  return encoded
