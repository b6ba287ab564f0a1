"""Every operation of the list that is not integer arithmetic, with NumPy."""

from collections.abc import Callable, Mapping
import functools
import math

import numpy as np

from fqjax.runtime import oplist
from fqjax.runtime.reference import _windows

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


# Nodes of a table of erf, and where it is 1 in float64.
_ERF_STEPS, _ERF_END = 4096, 6.0


@functools.cache
def _erf_table() -> tuple[np.ndarray, np.ndarray]:
  """Values and slopes times the step; one node more than is ever read from the left."""
  at = np.linspace(0, _ERF_END, _ERF_STEPS + 1)
  slopes = 2 / math.sqrt(math.pi) * np.exp(-at * at) * (_ERF_END / _ERF_STEPS)
  return np.array([math.erf(x) for x in at]), slopes


def _erf(x) -> np.ndarray:
  """By cubic Hermite interpolation; its error is below 1e-13."""
  values, slopes = _erf_table()
  wide = np.asarray(x, np.float64)
  place = np.minimum(np.abs(wide), _ERF_END) * (_ERF_STEPS / _ERF_END)
  left = np.minimum(np.nan_to_num(place).astype(np.int64), _ERF_STEPS - 1)
  t = place - left
  a, b, da, db = values[left], values[left + 1], slopes[left], slopes[left + 1]
  rise = b - a
  result = a + t * (da + t * (3 * rise - 2 * da - db + t * (da + db - 2 * rise)))
  return np.copysign(result, wide)


def _conv(x, w, *, layout, dtype, precision, **window) -> np.ndarray:
  out = _windows.conv(x.astype(dtype), w.astype(dtype), layout=layout, **window)
  return _windows.to_layout(out, layout)


def _dot(a, b, contract, batch, dtype, precision) -> np.ndarray:
  parts = []
  for x, both, summed in ((a, batch[0], contract[0]), (b, batch[1], contract[1])):
    free = [axis for axis in range(x.ndim) if axis not in (*both, *summed)]
    order = (*both, *free, *summed)
    shape = [x.shape[axis] for axis in (*both, *free)]
    rows = x.transpose(order).astype(dtype)
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (both, free, summed)]
    parts.append((rows.reshape(sizes), shape))
  (left, shape), (right, other) = parts
  product = left @ right.transpose(0, 2, 1)
  return product.reshape(*shape, *other[len(batch[1]) :])


def _gather(
  x, where, offset, collapsed, index_map, operand_batch, index_batch, sizes, mode
) -> np.ndarray:
  outer = where.shape[:-1]
  kept = [axis for axis in range(x.ndim) if axis not in (*collapsed, *operand_batch)]
  inside = np.ones(outer, bool)
  index = []
  for axis in range(x.ndim):
    start = np.zeros(outer, np.int64)
    if axis in index_map:
      limit = x.shape[axis] - sizes[axis]
      start = where[..., index_map.index(axis)].astype(np.int64)
      inside &= (start >= 0) & (start <= limit)
      start = np.clip(start, 0, limit)
    elif axis in operand_batch:
      along = index_batch[operand_batch.index(axis)]
      start = start + np.arange(outer[along]).reshape(
        [-1 if i == along else 1 for i in range(len(outer))]
      )
    start = start.reshape(*outer, *[1] * len(kept))
    if axis in kept:
      start = start + np.arange(sizes[axis]).reshape([-1 if k == axis else 1 for k in kept])
    index.append(start)
  out = x[tuple(index)]
  if mode == 'fill':
    hole = np.nan
    if x.dtype.kind in 'iu':
      hole = np.iinfo(x.dtype).min if x.dtype.kind == 'i' else np.iinfo(x.dtype).max
    missing = ~inside.reshape(*outer, *[1] * len(kept))
    out = np.where(missing, np.asarray(hole).astype(x.dtype), out)
  rest = iter(range(len(outer)))
  place = {axis: len(outer) + i for i, axis in enumerate(offset)}
  return out.transpose([place[i] if i in place else next(rest) for i in range(out.ndim)])


def _div(a, b) -> np.ndarray:
  if a.dtype.kind not in 'iu':
    return a / b
  # Towards zero; by zero what XLA gives: -1, all bits on.
  quotient, rest = np.divmod(a, b)
  towards = (quotient + ((rest != 0) & (quotient < 0))).astype(a.dtype)
  return np.where(b == 0, np.asarray(-1).astype(a.dtype), towards)


def _rem(a, b) -> np.ndarray:
  result = np.fmod(a, b)
  return result if a.dtype.kind == 'f' else np.where(b == 0, a, result)


def _sign(x) -> np.ndarray:
  return np.where(x == 0, x, np.sign(x))  # zeros keep their own


def _round(x, halves) -> np.ndarray:
  if halves == 'even':
    return np.rint(x)
  whole = np.trunc(x)
  return np.copysign(whole + np.copysign((np.abs(x - whole) >= 0.5).astype(x.dtype), x), x)


def _clamp(x, low, high) -> np.ndarray:
  x = x if low is None else np.maximum(x, x.dtype.type(low))
  return x if high is None else np.minimum(x, x.dtype.type(high))


def _add_clamp(a, b, low, high) -> np.ndarray:
  y = np.asarray(a + b)
  if low is not None:
    np.maximum(y, y.dtype.type(low), out=y)
  if high is not None:
    np.minimum(y, y.dtype.type(high), out=y)
  return y


def _sum(x, axes) -> np.ndarray:
  # NumPy adds pairwise along the last axis only; a mean over an image would lose two digits.
  wide = np.float64 if x.dtype.kind == 'f' else x.dtype
  return np.add.reduce(x, axis=tuple(axes), dtype=wide).astype(x.dtype)


def _pool_sum(x, **window) -> np.ndarray:
  wide = np.float64 if x.dtype.kind == 'f' and math.prod(window['window']) > 64 else x.dtype
  return _windows.pool(x.astype(wide), np.add, 0, **window).astype(x.dtype)


def _reducer(fn: np.ufunc) -> Callable:
  return lambda x, axes: fn.reduce(x, axis=tuple(axes), dtype=x.dtype)


def _accumulator(fn: np.ufunc) -> Callable:
  def run(x, axis, reverse):
    x = np.flip(x, axis) if reverse else x
    x = fn.accumulate(x, axis, dtype=x.dtype)
    return np.flip(x, axis) if reverse else x

  return run


def _pool(fn: np.ufunc, initial: Callable) -> Callable:
  return lambda x, **window: _windows.pool(x, fn, initial(x.dtype), **window)


def _end(dtype: np.dtype, sign: int) -> float:
  if dtype.kind == 'f':
    return sign * np.inf
  return np.iinfo(dtype).max if sign > 0 else np.iinfo(dtype).min


def _sort(*arrays, axis, keys) -> list[np.ndarray]:
  # The last key of lexsort is the first to be compared.
  order = np.lexsort(arrays[:keys][::-1], axis)
  return [np.take_along_axis(x, order, axis) for x in arrays]


def _top_k(x, axis, k) -> list[np.ndarray]:
  # The largest first and equals by their place: a stable sort of the array reversed, reversed.
  order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind='stable'), axis)
  order = order.take(range(k), axis)
  return [np.take_along_axis(x, order, axis), order.astype(np.int32)]


def _pad(x, value, padding, interior) -> np.ndarray:
  sizes = [
    low + size + inner * max(0, size - 1) + high
    for size, (low, high), inner in zip(x.shape, padding, interior, strict=True)
  ]
  out = np.full(sizes, value, x.dtype)
  out[tuple(
    slice(low, low + size + inner * max(0, size - 1), inner + 1)
    for size, (low, _), inner in zip(x.shape, padding, interior, strict=True)
  )] = x  # fmt: skip
  return out


def _iota(shape, dtype, axis) -> np.ndarray:
  if not math.prod(shape):
    return np.zeros(shape, dtype)
  row = np.arange(shape[axis], dtype=dtype).reshape(
    [-1 if i == axis else 1 for i in range(len(shape))]
  )
  return np.broadcast_to(row, shape)


def _spread(x, shape, axes) -> np.ndarray:
  wide = [1] * len(shape)
  for axis, size in zip(axes, x.shape, strict=True):
    wide[axis] = size
  return np.broadcast_to(x.reshape(wide), shape)


_NAMES = {
  'neg': 'negative', 'acos': 'arccos', 'asin': 'arcsin', 'atan': 'arctan', 'atan2': 'arctan2',
  'acosh': 'arccosh', 'asinh': 'arcsinh', 'atanh': 'arctanh', 'not': 'invert', 'sub': 'subtract',
  'mul': 'multiply', 'max': 'maximum', 'min': 'minimum', 'and': 'bitwise_and',
  'or': 'bitwise_or', 'xor': 'bitwise_xor', 'eq': 'equal', 'ne': 'not_equal', 'lt': 'less',
  'le': 'less_equal', 'gt': 'greater', 'ge': 'greater_equal',
}  # fmt: skip
_OTHERS = ('div', 'rem', 'sign', 'rsqrt', 'logistic', 'erf', 'erfc')

FLOAT: Mapping[str, Callable] = {
  **{
    op: getattr(np, _NAMES.get(op, op))
    for op in (*oplist.UNARY, *oplist.BINARY, *oplist.COMPARE)
    if op not in _OTHERS
  },
  'div': _div,
  'rem': _rem,
  'sign': _sign,
  'rsqrt': lambda x: x.dtype.type(1) / np.sqrt(x),
  'logistic': lambda x: x.dtype.type(1) / (x.dtype.type(1) + np.exp(-x)),
  'erf': lambda x: _erf(x).astype(x.dtype),
  'erfc': lambda x: _erfc(x).astype(x.dtype),
  'pow': lambda x, y: np.power(x, y).astype(x.dtype),
  'integer_pow': lambda x, exponent: np.power(x, x.dtype.type(exponent)),
  'round': _round,
  'is_finite': np.isfinite,
  'clamp': _clamp,
  'add_clamp': _add_clamp,
  'select': lambda which, no, yes: np.where(which, yes, no),
  'cast': lambda x, dtype: x.astype(dtype),
  'reduce_sum': _sum,
  'reduce_max': _reducer(np.maximum),
  'reduce_min': _reducer(np.minimum),
  'reduce_prod': _reducer(np.multiply),
  'reduce_and': _reducer(np.bitwise_and),
  'reduce_or': _reducer(np.bitwise_or),
  'argmax': lambda x, axis, dtype: x.argmax(axis).astype(dtype),
  'argmin': lambda x, axis, dtype: x.argmin(axis).astype(dtype),
  'cumsum': _accumulator(np.add),
  'cumprod': _accumulator(np.multiply),
  'cummax': _accumulator(np.maximum),
  'cummin': _accumulator(np.minimum),
  'sort': _sort,
  'top_k': _top_k,
  'iota': _iota,
  'reshape': lambda x, shape: x.reshape(shape),
  'transpose': lambda x, permutation: x.transpose(permutation),
  'broadcast': _spread,
  'concat': lambda *parts, axis: np.concatenate(parts, axis),
  'slice': lambda x, start, stop, strides: x[
    tuple(slice(*cut) for cut in zip(start, stop, strides, strict=True))
  ],
  'pad': _pad,
  'reverse': lambda x, axes: np.flip(x, axes),
  'gather': _gather,
  'pool_max': _pool(np.maximum, lambda dtype: _end(dtype, -1)),
  'pool_min': _pool(np.minimum, lambda dtype: _end(dtype, 1)),
  'pool_sum': _pool_sum,
  'conv': _conv,
  'dot': _dot,
}
