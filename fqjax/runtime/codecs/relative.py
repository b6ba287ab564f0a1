"""Gap coding: every stored entry says how many zeros lie before it, in b bits.

A longer gap takes fillers, entries of value 0 that bridge 2**b - 1 zeros and stand on the next.

    FQRELA: u8 rank, u32 shape, u32 entries, u8 b; gaps, b bits each; values, fillers included

Source: Han et al., "Deep Compression", 2016, section 2.
"""

import math
from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live

MAGIC = b'FQRELA'
_WIDEST_GAP = 16


class Encoded(NamedTuple):
  """Entries in the order of the flattened array.

  Attributes:
    shape: of the array.
    gap_bits: bits per gap.
    gaps: [entries], zeros since the entry before.
    values: [entries], 0 for a filler.
  """

  shape: tuple[int, ...]
  gap_bits: int
  gaps: np.ndarray
  values: np.ndarray


def encode(
  array: np.ndarray,
  mask: np.ndarray | None = None,
  gap_bits: int | None = None,
  value_bits: int | None = None,
) -> Encoded:
  """Lists live values with the gaps before them.

  Args:
    array: any shape with at least one entry; flattened row-major.
    mask: bool like `array`, True lives; by default every entry that is not +0.
    gap_bits: bits per gap, 0..16; by default what makes the file smallest.
    value_bits: bits per value when looking for the smallest; by default those of the dtype.

  Raises:
    ValueError: for an empty array, a dtype that is not stored, a mask that does not fit, or another
      number of bits.

  Example:
    >>> w = np.zeros(40, np.int8)
    >>> w[[2, 3, 25, 39]] = 7
    >>> encoded = encode(w, gap_bits=4)
    >>> print(encoded.gaps, encoded.values, sum(bits(encoded, value_bits=4)[:2]))
    [ 2  0 15  5 13] [7 7 0 7 7] 40
  """
  width = _container.value_width(array, value_bits)
  live = _live.live(array, mask).ravel()
  places = np.flatnonzero(live)
  zeros = np.diff(places, prepend=-1) - 1
  if gap_bits is None:
    costs = [
      (zeros.size + int((zeros >> b).sum())) * (width + b) for b in range(1, _WIDEST_GAP + 1)
    ]
    gap_bits = 1 + int(np.argmin(costs))
  if not 0 <= gap_bits <= _WIDEST_GAP:
    raise ValueError(f'gap_bits={gap_bits} must be 0..{_WIDEST_GAP}.')
  fillers = zeros >> gap_bits
  at = np.arange(zeros.size) + np.cumsum(fillers)
  size = zeros.size + int(fillers.sum())
  gaps = np.full(size, (1 << gap_bits) - 1, np.uint16)
  gaps[at] = zeros & ((1 << gap_bits) - 1)
  values = np.zeros(size, array.dtype)
  values[at] = array.ravel()[places]
  return Encoded(array.shape, gap_bits, gaps, values)


def decode(encoded: Encoded) -> np.ndarray:
  """The array, bit for bit."""
  out = np.zeros(math.prod(encoded.shape), encoded.values.dtype)
  out[np.cumsum(encoded.gaps.astype(np.int64) + 1) - 1] = encoded.values
  return out.reshape(encoded.shape)


def expected_bits(density: float, value_bits: int, gap_bits: int) -> float:
  """Bits a live value costs on average, index and fillers included, where places are random.

  Args:
    density: live fraction, 0 < density <= 1.
    value_bits: bits per value.
    gap_bits: bits per gap.

  Raises:
    ValueError: for a density out of range.

  Example:
    >>> round(expected_bits(0.08, value_bits=3, gap_bits=5), 3)
    8.596
  """
  if not 0 < density <= 1:
    raise ValueError(f'density={density} must be in (0, 1].')
  beyond = (1 - density) ** (1 << gap_bits)  # a gap this long needs a filler
  return (value_bits + gap_bits) / (1 - beyond)


def _sections(encoded, value_bits):
  shape, gap_bits, gaps, values = encoded
  head = _container.header(
    MAGIC, values, value_bits, f'B{len(shape)}IIB', len(shape), *shape, gaps.size, gap_bits
  )
  return head, [
    _container.Part('index', gaps, gap_bits),
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
  shape = reader.shape()
  entries, gap_bits = reader.numbers('entries, gap bits', 'IB')
  reader.require(gap_bits <= _WIDEST_GAP, 'gap bits', f'are {gap_bits}')
  size = math.prod(shape)
  reader.require(entries <= size, 'entries', f'are {entries}, the array has {size}')
  reader.promise(entries)
  gaps = reader.fields('gaps', entries, gap_bits).astype(np.uint16)
  reach = int((gaps.astype(np.int64) + 1).sum())
  reader.require(reach <= size, 'gaps', f'reach entry {reach - 1} of {size}')
  values = reader.values(entries)
  reader.end()
  return Encoded(shape, gap_bits, gaps, values)
