"""The integer arithmetic, written for reading and for exactness; docs/format.md says it in prose."""

import numpy as np

from fqjax.runtime.reference import _windows

_INT32 = np.iinfo(np.int32)


def requantize(
  acc: np.ndarray, multiplier: np.ndarray | float, zero: int, low: int, high: int
) -> np.ndarray:
  """Brings sums to the scale of the result: clip(rint(float32(acc) * m) + zero, low, high).

  Args:
    acc: int32.
    multiplier: float32, broadcasts to `acc`: scale of the sums over scale of the result.
    zero: zero point of the result.
    low: smallest value, 0..255; the zero point for relu.
    high: largest.

  Returns:
    uint8; halves are rounded to even, and clipped before they become integers.

  Example:
    >>> requantize(np.array([1, 3, 5, -5, 4000], np.int32), np.float32(0.5), 10, 0, 255)
    array([ 10,  12,  12,   8, 255], dtype=uint8)
  """
  return _store(acc.astype(np.float32) * np.float32(multiplier), zero, low, high)


def quantize(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
  """Floats as uint8: clip(rint(x / scale) + zero, 0, 255).

  Args:
    x: float32.
    scale: float32 value of one step.
    zero: the integer that stands for 0.

  Raises:
    ValueError: a value is NaN or an infinity.

  Example:
    >>> quantize(np.float32([-9, 0, 0.5, 1.5, 300]), 1.0, 3)
    array([  0,   3,   3,   5, 255], dtype=uint8)
  """
  if not np.isfinite(x).all():
    what = 'NaN' if np.isnan(x).any() else 'an infinity'
    raise ValueError(f'{what} among the {x.size} values to quantize.')
  return _store(x.astype(np.float32) / np.float32(scale), zero, 0, 255)


def dequantize(q: np.ndarray, scale: float, zero: int) -> np.ndarray:
  """The floats that uint8 values stand for: float32(q - zero) * scale.

  Example:
    >>> dequantize(np.uint8([0, 3, 5]), 0.5, 3)
    array([-1.5,  0. ,  1. ], dtype=float32)
  """
  return _centred(q, zero, np.float32) * np.float32(scale)


def accumulator_bounds(
  w: np.ndarray, bias: np.ndarray, input_zero: int, channel: int = -1
) -> tuple[np.ndarray, np.ndarray]:
  """What the sums of a layer can reach for any input, after any of their terms.

  Args:
    w: int8 kernel.
    bias: int32 [o].
    input_zero: zero point of the input.
    channel: axis of the output channels in `w`.

  Returns:
    int64 [o] lowest and highest; a layer is refused where they leave int32.

  Example:
    >>> accumulator_bounds(np.int8([[2], [-3]]), np.int32([10]), 5)
    (array([-760]), array([525]))
  """
  rows = np.moveaxis(w, channel, 0).reshape(w.shape[channel], -1).astype(np.int64)
  first, last = rows * -input_zero, rows * (255 - input_zero)
  bias = bias.astype(np.int64)
  low = np.minimum(first, last).sum(1) + np.minimum(bias, 0)
  return low, np.maximum(first, last).sum(1) + np.maximum(bias, 0)


def qconv(x, w, bias, multiplier, *, layout, input_zero, zero, low, high, **window) -> np.ndarray:
  """Convolution of uint8 with int8; padding holds the input's zero point."""
  dtype = _exact_type(w, bias, input_zero, layout[1].index('O'))
  # Without its zero point the padding is zeros.
  acc = _windows.conv(
    _centred(x, input_zero, dtype), w.astype(dtype), layout=layout, **window
  ).astype(np.int32)
  acc += bias
  return _windows.to_layout(requantize(acc, multiplier, zero, low, high), layout)


def qdot(x, w, bias, multiplier, *, input_zero, zero, low, high) -> np.ndarray:
  """Dense layer over the last axis."""
  dtype = _exact_type(w, bias, input_zero, 1)
  acc = (_centred(x, input_zero, dtype) @ w.astype(dtype)).astype(np.int32)
  acc += bias
  return requantize(acc, multiplier, zero, low, high)


def qadd(a, b, *, input_zeros, multipliers, zero, low, high) -> np.ndarray:
  """Sum of two tensors of different scales."""
  left, right = (
    _centred(x, z, np.float32) * np.float32(m)
    for x, z, m in zip((a, b), input_zeros, multipliers, strict=True)
  )
  return _store(left + right, zero, low, high)


def qconcat(*parts, axis, input_zeros, multipliers, zero, low, high) -> np.ndarray:
  """Tensors of different scales, one behind the other."""
  return np.concatenate(
    [
      _store(_centred(x, z, np.float32) * np.float32(m), zero, low, high)
      for x, z, m in zip(parts, input_zeros, multipliers, strict=True)
    ],
    axis,
  )


def qsum(x, multiplier, *, axes, input_zero, zero, low, high) -> np.ndarray:
  """Sum over axes; a mean by its multiplier."""
  _check_count(int(np.prod([x.shape[axis] for axis in axes])))
  acc = _centred(x, input_zero, np.int32).sum(tuple(axes), dtype=np.int32)
  return requantize(acc, multiplier, zero, low, high)


def qpool_sum(x, multiplier, *, input_zero, zero, low, high, **window) -> np.ndarray:
  """Sum over windows; an average by its multiplier. Padding adds nothing."""
  _check_count(int(np.prod(window['window'])))
  acc = _windows.pool(_centred(x, input_zero, np.int32), np.add, 0, **window)
  return requantize(acc, multiplier, zero, low, high)


def qtable(x, table) -> np.ndarray:
  """Any function of single values."""
  return table[x]


def _store(x: np.ndarray, zero: int, low: int, high: int) -> np.ndarray:
  shifted = np.rint(x) + np.float32(zero)
  return np.clip(shifted, np.float32(low), np.float32(high)).astype(np.uint8)


def _centred(x: np.ndarray, zero: int, dtype) -> np.ndarray:
  # Exact in every type used: the result is -255..255.
  return x.astype(dtype) - np.dtype(dtype).type(zero)


def _exact_type(w: np.ndarray, bias: np.ndarray, input_zero: int, channel: int) -> type:
  """The float type in which every partial sum is exact, whatever the order of its terms.

  NumPy multiplies integer matrices without BLAS, a hundred times slower.
  """
  low, high = accumulator_bounds(w, bias, input_zero, channel)
  if w.size and (low.min() < _INT32.min or high.max() > _INT32.max):
    raise ValueError(
      f'sums of channel {int(np.argmax(np.maximum(-low, high)))} can leave int32 '
      f'({low.min()} to {high.max()}): fewer inputs per output, or smaller weights.'
    )
  reach = np.maximum(-low, high).max(initial=0)
  return np.float32 if reach < 1 << 24 else np.float64


def _check_count(count: int) -> None:
  if count * 255 > _INT32.max:
    raise ValueError(f'a sum of {count} values can leave int32: at most {_INT32.max // 255}.')


INTEGER = {
  'quantize': quantize, 'dequantize': dequantize, 'qconv': qconv, 'qdot': qdot, 'qadd': qadd,
  'qconcat': qconcat, 'qsum': qsum, 'qpool_sum': qpool_sum, 'qtable': qtable,
}  # fmt: skip
