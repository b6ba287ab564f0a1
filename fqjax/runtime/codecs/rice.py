"""Gap coding without fillers: the low bits of a gap as they are, the rest in unary (Golomb-Rice).

Where places are random this takes 0 to 3 % more than any code has to; fixed gaps (`relative`), whose
fillers take values too, 5 to 8 % more with values of 3 bits.

    FQRICE: u8 rank, u32 shape, u32 entries, u8 b, u32 unary bits; unary part, for each entry as many
    zeros as the gap has multiples of 2**b, then a one; low parts, b bits each; values

Source: Rice and Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft
television data", 1971; Golomb, "Run-length encodings", 1966.
"""

import math
from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live

MAGIC = b'FQRICE'
_MOST_LOW = 24


class Encoded(NamedTuple):
  """Live values in the order of the flattened array.

  Attributes:
    shape: of the array.
    low_bits: of every gap that are stored as they are.
    gaps: [entries] int64, zeros since the entry before.
    values: [entries].
  """

  shape: tuple[int, ...]
  low_bits: int
  gaps: np.ndarray
  values: np.ndarray


def encode(
  array: np.ndarray, mask: np.ndarray | None = None, low_bits: int | None = None
) -> Encoded:
  """Lists live values with the gaps before them.

  Args:
    array: any shape with at least one entry; flattened row-major.
    mask: bool like `array`, True lives; by default every entry that is not +0.
    low_bits: of a gap that are stored as they are, 0..24; by default what makes the file smallest.

  Raises:
    ValueError: for an empty array, a dtype that is not stored, a mask that does not fit, or another
      number of bits.

  Example:
    >>> w = np.zeros(40, np.int8)
    >>> w[[2, 3, 25, 39]] = 7
    >>> encoded = encode(w, low_bits=3)
    >>> print(encoded.gaps, encoded.values, sum(bits(encoded, value_bits=4)[:2]))
    [ 2  0 21 13] [7 7 7 7] 35
  """
  _container.code_of(array)
  live = _live.live(array, mask).ravel()
  places = np.flatnonzero(live)
  gaps = np.diff(places, prepend=-1) - 1
  if low_bits is None:
    # Where 2**b is above the mean, unary parts take less than two bits: more low bits cost more.
    most = min(_MOST_LOW, int(gaps.mean()).bit_length() if gaps.size else 0)
    low_bits = int(np.argmin([_index_bits(gaps, b) for b in range(most + 1)]))
  if not 0 <= low_bits <= _MOST_LOW:
    raise ValueError(f'low_bits={low_bits} must be 0..{_MOST_LOW}.')
  return Encoded(array.shape, low_bits, gaps, array.ravel()[places])


def _index_bits(gaps: np.ndarray, low_bits: int) -> int:
  return int((gaps >> low_bits).sum()) + gaps.size * (1 + low_bits)


def decode(encoded: Encoded) -> np.ndarray:
  """The array, bit for bit."""
  out = np.zeros(math.prod(encoded.shape), encoded.values.dtype)
  out[np.cumsum(encoded.gaps.astype(np.int64) + 1) - 1] = encoded.values
  return out.reshape(encoded.shape)


def _sections(encoded, value_bits):
  shape, low_bits, gaps, values = encoded
  ends = np.cumsum((gaps >> low_bits) + 1) - 1
  unary = np.zeros(int(ends[-1]) + 1 if gaps.size else 0, np.uint8)
  unary[ends] = 1
  head = _container.header(
    MAGIC, values, value_bits, f'B{len(shape)}IIBI', len(shape), *shape, gaps.size, low_bits,
    unary.size,
  )  # fmt: skip
  return head, [
    _container.Part('index', unary, 1),
    _container.Part('index', gaps & ((1 << low_bits) - 1), low_bits),
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
  entries, low_bits, length = reader.numbers('entries, low bits, unary bits', 'IBI')
  reader.require(low_bits <= _MOST_LOW, 'low bits', f'are {low_bits}')
  size = math.prod(shape)
  reader.require(entries <= size, 'entries', f'are {entries}, the array has {size}')
  reader.promise(entries)
  unary = reader.fields('unary part', length, 1)
  ends = np.flatnonzero(unary)
  reader.require(
    ends.size == entries and (ends[-1] + 1 if entries else 0) == length,
    'unary part',
    f'has {ends.size} ends in {length} bits, for {entries} entries and an end as the last bit',
  )
  high = np.diff(ends, prepend=-1) - 1
  gaps = (high << low_bits) | reader.fields('low parts', entries, low_bits).astype(np.int64)
  # Of numbers this small a sum cannot overflow: 2**32 bits of zeros, shifted by 24.
  reach = int((gaps + 1).sum())
  reader.require(reach <= size, 'gaps', f'reach entry {reach - 1} of {size}')
  values = reader.values(entries)
  reader.end()
  return Encoded(shape, low_bits, gaps, values)
