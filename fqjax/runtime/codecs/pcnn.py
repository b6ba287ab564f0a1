"""Every kernel keeps n taps on one of V patterns: a short code and n values per kernel (PCNN).

    FQPCNN: u8 kh, u8 kw, u8 n, u8 code bits, u16 V, u32 I, u32 O; V patterns of 16 bits (32 or 64 for
    kernels of more than 16 or 32 taps); code of every kernel; n values of every kernel, taps
    ascending. Kernels output by output.

Value q of kernel g is number g*n + q, without pointers. Scales of quantised values belong to the
graph.

Source: Tan et al., "PCNN: Pattern-based Fine-Grained Regular Pruning Towards Optimizing CNN
Accelerators", DAC 2020. The layout is our own.
"""

import math
from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _patterns

MAGIC = b'FQPCNN'


class Encoded(NamedTuple):
  """Codes and values of all kernels.

  Attributes:
    taps: (kh, kw); their product is M.
    table: uint64 [V], patterns of n taps, bit t is tap t.
    codes: int64 [O, I], entry of the table.
    values: [O, I, n].
  """

  taps: tuple[int, int]
  table: np.ndarray
  codes: np.ndarray
  values: np.ndarray


def encode(
  kernels: np.ndarray,
  table=None,
  taps: tuple[int, int] | None = None,
  mask: np.ndarray | None = None,
) -> Encoded:
  """Stores n weights per kernel, explicit zeros where fewer live.

  Args:
    kernels: [O, I, M], taps row-major.
    table: patterns, integers of M bits, all with n bits set; by default what the kernels need. Of
      several that cover a kernel the first is taken.
    taps: (kh, kw) to note in the file; by default square if M is, else (1, M).
    mask: bool like `kernels`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for a table that is not one, a kernel it does not cover, taps that do not multiply to
      M, more than 64 taps, another rank, a dtype that is not stored, or a mask that does not fit.

  Example:
    >>> w = np.float32([[[0, 1, 0, 2, 3, 4, 0, 0, 0], [5, 6, 0, 7, 8, 0, 0, 0, 0]]])
    >>> encoded = encode(w, table=(58, 27))
    >>> print(encoded.codes, encoded.values[0, 1], bits(encoded, value_bits=8)[:2])
    [[0 1]] [5. 6. 7. 8.] (64, 2)
  """
  table, codes, _ = _patterns.prepare(kernels, table, mask)
  o, i, m = kernels.shape
  if taps is None:
    side = math.isqrt(m)
    taps = (side, side) if side * side == m else (1, m)
  if math.prod(taps) != m:
    raise ValueError(f'taps={taps} of kernels {list(kernels.shape)} must multiply to {m}.')
  values = _patterns.gather(kernels.reshape(-1, m), codes.ravel(), table)
  return Encoded(taps, table, codes, values.reshape(o, i, -1))


def decode(encoded: Encoded) -> np.ndarray:
  """The kernels [O, I, M], bit for bit."""
  taps, table, codes, values = encoded
  flat = values.reshape(-1, values.shape[2])
  m = math.prod(taps)
  return _patterns.scatter(flat, codes.ravel(), table, m).reshape(*codes.shape, m)


def _sections(encoded, value_bits):
  taps, table, codes, values = encoded
  o, i, n = values.shape
  width = _bits.width_for(table.size)
  head = _container.header(MAGIC, values, value_bits, 'BBBBHII', *taps, n, width, table.size, i, o)
  return head, [
    _patterns.table_part(table, math.prod(taps)),
    _container.Part('index', codes, width),
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
  kh, kw, n, width, size, i, o = reader.numbers('header', 'BBBBHII')
  reader.size('shape', o, i, kh, kw)
  reader.require(kh * kw <= _patterns.MOST_TAPS, 'taps', f'are {kh}x{kw}')
  reader.require(size >= 1, 'number of patterns', 'is 0')
  reader.require(width == _bits.width_for(size), 'code bits', f'are {width} for {size} patterns')
  table = _patterns.read_table(reader, size, kh * kw, n)
  reader.promise(o * i * n)
  codes = _patterns.read_codes(reader, o * i, table)
  values = reader.values(o, i, n)
  reader.end()
  return Encoded((kh, kw), table, codes.reshape(o, i), values)
