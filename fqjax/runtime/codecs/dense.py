"""Every value as it is: what all other formats are compared with.

FQDENS: u8 rank, u32 shape; values, row-major
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live

MAGIC = b'FQDENS'


class Encoded(NamedTuple):
  """A dense array.

  Attributes:
    values: any shape.
  """

  values: np.ndarray


def encode(array: np.ndarray) -> Encoded:
  """Keeps the array as it is.

  Args:
    array: any shape with at least one entry.

  Raises:
    ValueError: for an empty array or a dtype that is not stored.

  Example:
    >>> bits(encode(np.ones((2, 3), np.int8)), value_bits=4).values
    24
  """
  _container.code_of(array)
  _live.live(array, None)
  return Encoded(array)


def decode(encoded: Encoded) -> np.ndarray:
  """The array, bit for bit."""
  return encoded.values


def _sections(encoded, value_bits):
  values = encoded.values
  head = _container.header(
    MAGIC, values, value_bits, f'B{values.ndim}I', values.ndim, *values.shape
  )
  return head, [_container.Part('values', values, _container.value_width(values, value_bits))]


def bits(encoded: Encoded, value_bits: int | None = None) -> _container.Bits:
  """Cost of the file; see `fqjax.runtime.codecs`."""
  return _container.measure(*_sections(encoded, value_bits))


def to_bytes(encoded: Encoded, value_bits: int | None = None) -> bytes:
  """The file; see `fqjax.runtime.codecs`."""
  return _container.write(*_sections(encoded, value_bits))


def from_bytes(data, limit: int = _container.LIMIT) -> Encoded:
  """Reads the file; ValueError names what is wrong and where."""
  reader = _container.Reader(data, MAGIC, limit)
  values = reader.values(*reader.shape())
  reader.end()
  return Encoded(values)
