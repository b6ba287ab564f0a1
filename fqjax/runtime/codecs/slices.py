"""Whole slices of an array: filters, channels, columns, or several of them at once.

    FQSLIC: u8 rank, u32 shape, u8 axes (bit a: axis a is sliced); per sliced axis a bitmap of its
    length; values of what is left, row-major

A filter is a slice along axis 0 of [O, I, M], a channel one along axis 1; a column (one input at one
tap, in all filters) one along axis 1 of [O, M*I].
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _live

MAGIC = b'FQSLIC'


class Encoded(NamedTuple):
  """What is left of an array, and of which slices.

  Attributes:
    axes: the axes that lost slices, ascending.
    kept: for each of them bool [length], True is left.
    values: the remaining array.
  """

  axes: tuple[int, ...]
  kept: tuple[np.ndarray, ...]
  values: np.ndarray


def encode(
  array: np.ndarray, axes: tuple[int, ...] = (0,), mask: np.ndarray | None = None
) -> Encoded:
  """Removes the slices in which nothing lives.

  Args:
    array: up to rank 8, at least one entry.
    axes: along which to look, each of 0..rank-1 at most once.
    mask: bool like `array`, True lives; by default every entry that is not +0.

  Raises:
    ValueError: for other axes, an empty array, a dtype that is not stored, or a mask that does not
      fit.

  Example:
    >>> encoded = encode(np.float32([[1, 0, 2], [0, 0, 0]]), axes=(0, 1))
    >>> print(encoded.values, encoded.kept[1], bits(encoded)[:2])
    [[1. 2.]] [ True False  True] (64, 5)
  """
  _container.code_of(array)
  live = _live.live(array, mask)
  axes = tuple(sorted(axes))
  if array.ndim > 8 or len(set(axes)) < len(axes) or not set(axes) <= set(range(array.ndim)):
    raise ValueError(f'axes {axes} must be different ones of 0..{min(array.ndim, 8) - 1}.')
  kept = tuple(np.asarray(live.any(tuple(b for b in range(array.ndim) if b != a))) for a in axes)
  for axis, keep in zip(axes, kept, strict=True):
    array = np.compress(keep, array, axis)
  return Encoded(axes, kept, array)


def decode(encoded: Encoded) -> np.ndarray:
  """The array, bit for bit."""
  out = encoded.values
  for axis, keep in zip(encoded.axes, encoded.kept, strict=True):
    shape = list(out.shape)
    shape[axis] = keep.size
    wider = np.zeros(shape, out.dtype)
    wider[(slice(None),) * axis + (keep,)] = out
    out = wider
  return out


def _sections(encoded, value_bits):
  axes, kept, values = encoded
  shape = list(values.shape)
  for axis, keep in zip(axes, kept, strict=True):
    shape[axis] = keep.size
  flags = sum(1 << axis for axis in axes)
  head = _container.header(MAGIC, values, value_bits, f'B{len(shape)}IB', len(shape), *shape, flags)
  return head, [
    *(_container.Part('index', keep.view(np.uint8), 1) for keep in kept),
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
  shape = list(reader.shape())
  (flags,) = reader.numbers('axes', 'B')
  reader.require(not flags >> min(len(shape), 8), 'axes', f'{flags:#x} exceed rank {len(shape)}')
  axes = tuple(axis for axis in range(8) if flags >> axis & 1)
  kept = tuple(reader.fields(f'bitmap of axis {a}', shape[a], 1).astype(bool) for a in axes)
  for axis, keep in zip(axes, kept, strict=True):
    shape[axis] = int(keep.sum())
  values = reader.values(*shape)
  reader.end()
  return Encoded(axes, kept, values)
