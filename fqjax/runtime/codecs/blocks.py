"""Whole blocks of neighbouring weights: filters x inputs, e.g. 1x4, 2x4, 4x4 for byte dot products.

    FQBLCK: u32 rows, u32 columns, u16 block rows, u16 block columns; one 32-bit pointer per row of
    blocks and one more; block column of every block, ceil(log2 of their number) bits; values, block by
    block, row-major inside, zeros beyond the matrix

The four neighbouring inputs of a filter lie together, as `vpdpbusd` and `sdot` read them.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live, csr

MAGIC = b'FQBLCK'


class Encoded(NamedTuple):
  """Live blocks, row of blocks by row of blocks.

  Attributes:
    shape: (rows, columns) of the matrix.
    pointers: int64 [block rows of the matrix + 1], where each begins.
    columns: uint32 [blocks], which block of its row.
    values: [blocks, rows of a block, columns of a block].
  """

  shape: tuple[int, int]
  pointers: np.ndarray
  columns: np.ndarray
  values: np.ndarray


def encode(
  matrix: np.ndarray, rows: int = 1, columns: int = 4, mask: np.ndarray | None = None
) -> Encoded:
  """Stores every block with a live weight.

  Args:
    matrix: [rows, columns].
    rows: neighbouring rows (filters) per block, up to those of the matrix and 65535.
    columns: neighbouring columns (inputs) per block, likewise.
    mask: bool like `matrix`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for a block size out of range, another rank, an empty matrix, a dtype that is not
      stored, or a mask that does not fit.

  Example:
    >>> w = np.zeros((2, 8), np.int8)
    >>> w[1, 5] = 3
    >>> encoded = encode(w, rows=2, columns=4)
    >>> print(encoded.pointers, encoded.columns, encoded.values[0].tolist())
    [0 1] [1] [[0, 0, 0, 0], [0, 3, 0, 0]]
  """
  _container.code_of(matrix)
  live = _live.live(matrix, mask, 2)
  check_block(rows, columns, matrix.shape)
  kept = np.asarray(_live.tile(live[..., None], rows, columns).any((2, 3, 4)))
  values = _live.tile(matrix[..., None], rows, columns)[:, :, 0][kept]
  pointers = np.concatenate([[0], np.cumsum(kept.sum(1))])
  height, width = matrix.shape
  return Encoded((height, width), pointers, np.nonzero(kept)[1].astype(np.uint32), values)


def _grid(encoded):
  rows, columns = encoded.values.shape[1:]
  return -(-encoded.shape[0] // rows), -(-encoded.shape[1] // columns), rows, columns


def decode(encoded: Encoded) -> np.ndarray:
  """The matrix, bit for bit."""
  high, wide, rows, columns = _grid(encoded)
  tiles = np.zeros((high, wide, 1, rows, columns), encoded.values.dtype)
  tiles[np.repeat(np.arange(high), np.diff(encoded.pointers)), encoded.columns, 0] = encoded.values
  return _live.untile(tiles, *encoded.shape)[..., 0]


def _sections(encoded, value_bits):
  shape, pointers, index, values = encoded
  _, wide, rows, columns = _grid(encoded)
  head = _container.header(MAGIC, values, value_bits, 'IIHH', *shape, rows, columns)
  return head, [
    _container.Part('index', pointers, 32),
    _container.Part('index', index, _bits.width_for(wide)),
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
  height, width, rows, columns = reader.numbers('header', 'IIHH')
  reader.size('shape', height, width)
  fits = 1 <= rows <= height and 1 <= columns <= width
  reader.require(fits, 'block', f'is {rows}x{columns} in {height}x{width}')
  high, wide = -(-height // rows), -(-width // columns)
  pointers = csr.read_pointers(reader, high, wide)
  index = reader.fields('columns', int(pointers[-1]), _bits.width_for(wide)).astype(np.uint32)
  csr.check_columns(reader, pointers, index, wide)
  values = reader.values(index.size, rows, columns)
  row = np.repeat(np.arange(high), np.diff(pointers))
  check_rim(reader, values, row, index, height, width)
  reader.end()
  return Encoded((height, width), pointers, index, values)


def check_block(rows: int, columns: int, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless a block fits into the array.

  Args:
    rows: of a block.
    columns: of a block.
    shape: of the array, rows and columns first.
  """
  if not (1 <= rows <= min(shape[0], 0xFFFF) and 1 <= columns <= min(shape[1], 0xFFFF)):
    raise ValueError(
      f'blocks of {rows}x{columns} in an array {list(shape)}: both sides must be at least 1, no '
      'larger than the array and than 65535.'
    )


def check_rim(reader, values, row, column, height: int, width: int) -> None:
  """Raises ValueError unless blocks hold +0 beyond the edges of the array.

  Args:
    reader: just read them.
    values: [blocks, rows, columns].
    row: [blocks], which row of blocks.
    column: [blocks], which column of blocks.
    height: rows of the array.
    width: columns of the array.
  """
  rows, columns = values.shape[1:]
  set_ = _live.raw(values) != 0
  below = row * rows + rows > height
  right = column.astype(np.int64) * columns + columns > width
  clean = not set_[below, height % rows :].any() and not set_[right][:, :, width % columns :].any()
  reader.require(clean, 'values', 'are not zero beyond the edge of the array')
