"""Block-punched kernels: a block of filters x inputs loses the same taps everywhere.

    FQPNCH: u32 O, u32 I, u16 M, u16 rows, u16 columns; bitmap, 1 bit per (filter block, input block,
    tap); values of the live ones, [rows, columns] each, zeros beyond the edges

Source: Cai et al., "YOLObile", AAAI 2021 (blocks of 8 filters x 4 inputs).
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live, blocks

MAGIC = b'FQPNCH'


class Encoded(NamedTuple):
  """Live taps of blocks of kernels.

  Attributes:
    shape: (O, I, M).
    mask: bool [ceil(O/rows), ceil(I/columns), M].
    values: [live, rows, columns].
  """

  shape: tuple[int, int, int]
  mask: np.ndarray
  values: np.ndarray


def encode(
  kernels: np.ndarray, rows: int = 8, columns: int = 4, mask: np.ndarray | None = None
) -> Encoded:
  """Stores every tap of a block at which a weight lives.

  Args:
    kernels: [O, I, M], M taps.
    rows: filters per block, up to O and 65535.
    columns: inputs per block, up to I and 65535.
    mask: bool like `kernels`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for a block size out of range, another rank, an empty array, a dtype that is not
      stored, or a mask that does not fit.

  Example:
    >>> w = np.zeros((8, 4, 9), np.int8)
    >>> w[:, :, 4] = 1
    >>> bits(encode(w))[:2]  # one tap of 9 lives, 32 values
    (256, 9)
  """
  _container.code_of(kernels)
  live = _live.live(kernels, mask, 3)
  blocks.check_block(rows, columns, kernels.shape)
  kept = np.asarray(_live.tile(live, rows, columns).any((3, 4)))
  o, i, m = kernels.shape
  return Encoded((o, i, m), kept, _live.tile(kernels, rows, columns)[kept])


def decode(encoded: Encoded) -> np.ndarray:
  """The kernels, bit for bit."""
  rows, columns = encoded.values.shape[1:]
  tiles = np.zeros((*encoded.mask.shape, rows, columns), encoded.values.dtype)
  tiles[encoded.mask] = encoded.values
  return _live.untile(tiles, *encoded.shape[:2])


def _sections(encoded, value_bits):
  shape, mask, values = encoded
  head = _container.header(MAGIC, values, value_bits, 'IIHHH', *shape, *values.shape[1:])
  return head, [
    _container.Part('index', mask.view(np.uint8), 1),
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
  o, i, m, rows, columns = reader.numbers('header', 'IIHHH')
  reader.size('shape', o, i, m)
  fits = 1 <= rows <= o and 1 <= columns <= i
  reader.require(fits, 'block', f'is {rows}x{columns} in {o}x{i}')
  grid = -(-o // rows), -(-i // columns), m
  mask = reader.fields('bitmap', grid[0] * grid[1] * m, 1).astype(bool).reshape(grid)
  row, column, _ = np.nonzero(mask)
  values = reader.values(row.size, rows, columns)
  blocks.check_rim(reader, values, row, column, o, i)
  reader.end()
  return Encoded((o, i, m), mask, values)
