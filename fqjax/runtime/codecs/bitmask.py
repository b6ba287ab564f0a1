"""One bit per entry and the live values: needs no structure, costs the same at any density.

FQBITS: u8 rank, u32 shape; bitmap, 1 bit per entry; live values; both row-major
"""

import math
from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live

MAGIC = b'FQBITS'


class Encoded(NamedTuple):
  """Live values and where they are.

  Attributes:
    mask: bool, shape of the array.
    values: [live], row-major.
  """

  mask: np.ndarray
  values: np.ndarray


def encode(array: np.ndarray, mask: np.ndarray | None = None) -> Encoded:
  """Separates live values from their places.

  Args:
    array: any shape with at least one entry.
    mask: bool like `array`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for an empty array, a dtype that is not stored, a mask of another shape, or an entry
      off the mask that is not +0.

  Example:
    >>> encoded = encode(np.float32([0, 3, 0, 5]))
    >>> print(encoded.values, decode(encoded), bits(encoded).index)
    [3. 5.] [0. 3. 0. 5.] 4
  """
  _container.code_of(array)
  live = _live.live(array, mask)
  return Encoded(live, array[live])


def decode(encoded: Encoded) -> np.ndarray:
  """The array, bit for bit."""
  out = np.zeros(encoded.mask.shape, encoded.values.dtype)
  out[encoded.mask] = encoded.values
  return out


def _sections(encoded, value_bits):
  mask, values = encoded
  head = _container.header(MAGIC, values, value_bits, f'B{mask.ndim}I', mask.ndim, *mask.shape)
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
  shape = reader.shape()
  mask = reader.fields('bitmap', math.prod(shape), 1).astype(bool)
  values = reader.values(int(mask.sum()))
  reader.end()
  return Encoded(mask.reshape(shape), values)
