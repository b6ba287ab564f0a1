"""n of every m neighbours: equal work everywhere, addresses without pointers.

    FQNOFM: u32 rows, u32 columns, u16 n, u16 m; places, ceil(log2 m) bits each; values; both group by
    group, places ascending

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live

MAGIC = b'FQNOFM'


class Encoded(NamedTuple):
  """n values of every group.

  Attributes:
    shape: (rows, columns).
    m: columns per group.
    index: uint8 or uint16 [rows, columns/m, n], place inside the group, ascending.
    values: [rows, columns/m, n].
  """

  shape: tuple[int, int]
  m: int
  index: np.ndarray
  values: np.ndarray


def encode(matrix: np.ndarray, n: int, m: int, mask: np.ndarray | None = None) -> Encoded:
  """Stores exactly n weights of every m neighbouring columns, explicit zeros where fewer live.

  Args:
    matrix: [rows, columns]; transpose it where neighbours are rows.
    n: stored per group, 1..m.
    m: columns per group, up to 65535; must divide the columns (`bank` takes a ragged end).
    mask: bool like `matrix`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for an m that does not divide, a group with more than n live weights, another rank,
      a dtype that is not stored, or a mask that does not fit.

  Example:
    >>> encoded = encode(np.float32([[3, 0, 0, -4, 0, 5, 0, 0]]), 2, 4)
    >>> print(encoded.index[0].tolist(), bits(encoded, value_bits=8)[:2])
    [[0, 3], [0, 1]] (32, 8)
  """
  _container.code_of(matrix)
  live = _live.live(matrix, mask, 2)
  rows, columns = matrix.shape
  if not 1 <= n <= m <= 0xFFFF or columns % m:
    raise ValueError(
      f'{n}:{m} of {columns} columns: n must be 1..m, m at most 65535 and a divisor of the columns; '
      'the bank format takes a ragged end.'
    )
  groups = columns // m
  chosen = _live.fill(live.reshape(rows, groups, m), n, 'group')
  index = np.nonzero(chosen)[2].astype(_bits.uint_for(_bits.width_for(m)))
  shape = rows, groups, n
  values = matrix.reshape(rows, groups, m)[chosen]
  return Encoded((rows, columns), m, index.reshape(shape), values.reshape(shape))


def decode(encoded: Encoded) -> np.ndarray:
  """The matrix, bit for bit."""
  rows, columns = encoded.shape
  out = np.zeros((rows, columns // encoded.m, encoded.m), encoded.values.dtype)
  np.put_along_axis(out, encoded.index.astype(np.intp), encoded.values, 2)
  return out.reshape(encoded.shape)


def _sections(encoded, value_bits):
  shape, m, index, values = encoded
  head = _container.header(MAGIC, values, value_bits, 'IIHH', *shape, values.shape[2], m)
  return head, [
    _container.Part('index', index, _bits.width_for(m)),
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
  rows, columns, n, m = reader.numbers('header', 'IIHH')
  reader.size('shape', rows, columns)
  reader.require(1 <= n <= m and columns % m == 0, 'header', f'says {n}:{m} of {columns} columns')
  shape = rows, columns // m, n
  reader.promise(rows * shape[1] * n)
  index = reader.fields('places', rows * shape[1] * n, _bits.width_for(m)).reshape(shape)
  ascend = (np.diff(index.astype(np.int32)) > 0).all()
  reader.require(ascend and (index < m).all(), 'places', f'do not ascend below {m} in a group')
  values = reader.values(*shape)
  reader.end()
  return Encoded((rows, columns), m, index, values)
