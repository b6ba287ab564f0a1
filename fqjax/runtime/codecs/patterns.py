"""Patterns and connectivity at rest: a bit per kernel, a code and n values per kept one.

    FQPATT: u32 O, u32 I, u8 M, u8 n, u16 V; V patterns of 16 bits (32 or 64 for kernels of more than
    16 or 32 taps); bitmap of the kernels; code of every kept one; its n values, taps ascending.
    Kernels output by output.

The `fkw` format is what a loader expands this into.

Source: Ma et al., "An Image Enhancing Pattern-based Sparsity for Real-time Inference on Mobile
Devices", ECCV 2020. The layout is our own.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _patterns

MAGIC = b'FQPATT'


class Encoded(NamedTuple):
  """Kept kernels.

  Attributes:
    taps: M.
    table: uint64 [V], patterns of n taps, bit t is tap t.
    kept: bool [O, I].
    codes: int64 [kept], entry of the table.
    values: [kept, n].
  """

  taps: int
  table: np.ndarray
  kept: np.ndarray
  codes: np.ndarray
  values: np.ndarray


def encode(kernels: np.ndarray, table=None, mask: np.ndarray | None = None) -> Encoded:
  """Stores n weights of every kernel in which something lives.

  Args:
    kernels: [O, I, M], taps row-major.
    table: patterns, integers of M bits, all with n bits set; by default what the kernels need. Of
      several that cover a kernel the first is taken.
    mask: bool like `kernels`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for a table that is not one, a kernel it does not cover, more than 64 taps, another
      rank, a dtype that is not stored, or a mask that does not fit.

  Example:
    >>> w = np.zeros((2, 2, 9), np.int8)
    >>> w[1, 0, [1, 3, 4, 5]] = 1, 2, 3, 4
    >>> encoded = encode(w, table=(27, 58))
    >>> print(encoded.codes, encoded.values, bits(encoded)[:2])  # a bit per kernel, one code
    [1] [[1 2 3 4]] (32, 5)
  """
  table, codes, kept = _patterns.prepare(kernels, table, mask)
  values = _patterns.gather(kernels[kept], codes[kept], table)
  return Encoded(kernels.shape[2], table, kept, codes[kept], values)


def decode(encoded: Encoded) -> np.ndarray:
  """The kernels [O, I, M], bit for bit."""
  taps, table, kept, codes, values = encoded
  out = np.zeros((*kept.shape, taps), values.dtype)
  out[kept] = _patterns.scatter(values, codes, table, taps)
  return out


def _sections(encoded, value_bits):
  taps, table, kept, codes, values = encoded
  head = _container.header(
    MAGIC, values, value_bits, 'IIBBH', *kept.shape, taps, values.shape[1], table.size
  )
  return head, [
    _patterns.table_part(table, taps),
    _container.Part('index', kept.view(np.uint8), 1),
    _container.Part('index', codes, _bits.width_for(table.size)),
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
  o, i, taps, n, size = reader.numbers('header', 'IIBBH')
  reader.size('shape', o, i, taps)
  reader.require(taps <= _patterns.MOST_TAPS, 'taps', f'are {taps}')
  reader.require(size >= 1, 'number of patterns', 'is 0')
  table = _patterns.read_table(reader, size, taps, n)
  kept = reader.fields('bitmap', o * i, 1).astype(bool).reshape(o, i)
  codes = _patterns.read_codes(reader, int(kept.sum()), table)
  values = reader.values(codes.size, n)
  reader.end()
  return Encoded(taps, table, kept, codes, values)
