"""Discrete wavelet transforms with the names and conventions of PyWavelets.

Each level along each axis is the banded matrix of `_wavelet_banks.py`, applied without building it.
Rows that do not touch the boundary are sums of strided slices of the data, so nothing is padded or
copied for them. Where few elements follow the axis (the last axis of images stored as
`[n, c, h, w]`), its even and odd samples are separated first, so that every later read is contiguous.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.ops import _wavelet_banks as banks

# With fewer elements than this after an axis, loops along the axis itself are the longer ones.
_SHORT = 16

Details = dict[str, Any]  # arrays by key, one letter per axis


# One level along one axis


def _analyse(
  x: jax.Array, axis: int, wavelet: banks.Wavelet, mode: str
) -> tuple[jax.Array, jax.Array]:
  """Approximation and detail of x along one axis."""
  n, size = x.shape[axis], wavelet.dec_len
  banks.check_length(n)
  start, count = banks.rows(n, size, mode)
  index = banks.extension(n, start, 2 * count - 2 + size, mode)
  # Row k reads x[start + 2k + j] for j < size, so a filter runs backwards over its taps.
  filters = wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]
  if size > 2 and math.prod(x.shape[axis + 1 :]) < _SHORT:
    x = _extend(x, index, -start, axis)
    return _analyse_phases(x, axis, count, filters)
  # Rows first .. first + inside - 1 lie wholly inside the signal: no boundary, no copy.
  first = (1 - start) // 2
  inside = (n - size - (start + 2 * first)) // 2 + 1
  if inside < 1:
    pieces = [_take(x, index, axis)]
  else:
    begin = start + 2 * first
    pieces = [jax.lax.slice_in_dim(x, begin, begin + 2 * inside - 2 + size, axis=axis)]
    if first > 0:
      pieces.insert(0, _take(x, index[: 2 * first - 2 + size], axis))
    if first + inside < count:
      pieces.append(_take(x, index[2 * (first + inside) :], axis))
  approximation, detail = (
    jnp.concatenate([_strided_sum(piece, taps, axis) for piece in pieces], axis) for taps in filters
  )
  return approximation, detail


def _take(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
  """Samples at the given positions of an axis; position x.shape[axis] means zero."""
  return jnp.take(x, index, axis, mode='fill', fill_value=0)


def _extend(x: jax.Array, index: np.ndarray, before: int, axis: int) -> jax.Array:
  """Take(x, index), knowing that index[before:] begins with the whole axis in order."""
  pieces = [x]
  if before:
    pieces.insert(0, _take(x, index[:before], axis))
  if len(index) > before + x.shape[axis]:
    pieces.append(_take(x, index[before + x.shape[axis] :], axis))
  return jnp.concatenate(pieces, axis)


def _strided_sum(x: jax.Array, taps: Sequence[float], axis: int) -> jax.Array:
  """out[k] = sum_j taps[j] * x[2k + j], wherever all taps find a sample."""
  count = (x.shape[axis] - len(taps)) // 2 + 1
  return _weighted_sum(
    taps, [jax.lax.slice_in_dim(x, j, j + 2 * count - 1, 2, axis) for j in range(len(taps))]
  )


def _weighted_sum(weights: Sequence[float], terms: Sequence[jax.Array]) -> jax.Array:
  # Python floats are weakly typed: the sum keeps the terms' precision, be it float32 or float64.
  if len({abs(w) for w in weights}) == 1:  # Haar: one product for the whole sum
    signed = [t if w > 0 else -t for w, t in zip(weights, terms, strict=True)]
    return abs(weights[0]) * functools.reduce(jnp.add, signed)
  return functools.reduce(jnp.add, [w * t for w, t in zip(weights, terms, strict=True) if w])


def _analyse_phases(x, axis, count, filters):
  """`_strided_sum` over both filters for an axis with little after it.

  Even and odd samples are separated first, which makes every read of the sums contiguous.
  """
  lead, inner = x.shape[:axis], math.prod(x.shape[axis + 1 :])
  pairs = x.reshape(*lead, x.shape[axis] // 2, 2 * inner)
  phases = [p.reshape(*lead, -1) for p in (pairs[..., :inner], pairs[..., inner:])]
  size = len(filters[0])
  terms = [phases[j % 2][..., (j // 2) * inner : (j // 2 + count) * inner] for j in range(size)]
  results = [_weighted_sum(taps, terms) for taps in filters]
  shape = (*lead, count, *x.shape[axis + 1 :])
  return results[0].reshape(shape), results[1].reshape(shape)


def _synthesise(approximation, detail, axis: int, wavelet: banks.Wavelet, mode: str) -> jax.Array:
  """Inverse of `_analyse`; a missing part counts as zeros."""
  parts = [
    (part, taps)
    for part, taps in ((approximation, wavelet.rec_lo), (detail, wavelet.rec_hi))
    if part is not None
  ]
  shape, size = parts[0][0].shape, wavelet.rec_len
  if any(part.shape != shape for part, _ in parts):
    raise ValueError(
      f'approximation {approximation.shape} and detail {detail.shape} differ in shape. Both come'
      ' from one dwt call; a longer approximation from a deeper level is cut by waverec.'
    )
  count = shape[axis]
  n = banks.synthesis_length(count, wavelet, mode)
  start, _ = banks.rows(n, size, mode)
  # Output m is sum_k rec[m - start - 2k] * part[k]. With m - start = 2u + p, phase p of the output
  # is sum_i rec[2i + p] * part[u - i]: contiguous reads, for each u from first to last.
  half = size // 2
  first, last = -start // 2, (n - 1 - start) // 2
  before = half - 1 - first  # coefficients read from beyond the left end: none but in periodization
  index = np.arange(-before, last + 1) % count
  terms, weights = [], ([], [])
  for part, taps in parts:
    part = _extend(part, index, before, axis)
    for i in range(half):
      terms.append(jax.lax.slice_in_dim(part, half - 1 - i, last - first + half - i, axis=axis))
      weights[0].append(taps[2 * i])
      weights[1].append(taps[2 * i + 1])
  x = jnp.stack([_weighted_sum(w, terms) for w in weights], axis + 1)
  x = x.reshape(*shape[:axis], 2 * (last - first + 1), *shape[axis + 1 :])
  begin = -start - 2 * first  # periodization may begin with an odd phase
  return jax.lax.slice_in_dim(x, begin, begin + n, axis=axis)


def split(x: jax.Array, axes, wavelets, modes) -> Details:
  """One level along several axes, bands by key."""
  bands = {'': x}
  for axis, wavelet, mode in zip(axes, wavelets, modes, strict=True):
    bands = {
      key + letter: part
      for key, band in bands.items()
      for letter, part in zip('ad', _analyse(band, axis, wavelet, mode), strict=True)
    }
  return bands


def merge(bands: Details, axes, wavelets, modes) -> jax.Array | None:
  """Inverse of `split`; missing bands are zeros, None if all are missing."""
  steps = list(zip(axes, wavelets, modes, strict=True))
  while steps:
    axis, wavelet, mode = steps.pop()
    merged = {}
    for letters in itertools.product('ad', repeat=len(steps)):
      key = ''.join(letters)
      pair = bands.get(key + 'a'), bands.get(key + 'd')
      if any(part is not None for part in pair):
        merged[key] = _synthesise(*pair, axis, wavelet, mode)
    bands = merged
  return bands.get('')


# Any number of levels and axes

# Every public function is a view of these two. They are jitted as wholes, so that a call outside
# `jax.jit` is one program too; inside another jit they dissolve.


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'level'))
def _decompose(x, axes, wavelets, modes, level) -> list:
  """[approximation, details of the deepest level, ..., details of level 1]; details by key."""
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  order = list(range(x.ndim))
  if any(w.dec_len > 2 for w in wavelets):
    order = _long_rows(x.shape, axes)
  axes = [order.index(axis) for axis in axes]
  x = x.transpose(order)
  result = []
  for _ in range(level):
    bands = split(x, axes, wavelets, modes)
    x = bands.pop('a' * len(axes))
    result.append(bands)
  back = [int(i) for i in np.argsort(order)]
  return jax.tree.map(lambda a: a.transpose(back).astype(dtype), [x, *reversed(result)])


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'shape'))
def _recompose(coeffs, axes, wavelets, modes, shape=None) -> jax.Array:
  """Inverse of `_decompose`; missing or None parts are zeros."""
  dtype = floating(jnp.result_type(*jax.tree.leaves(coeffs)))
  coeffs = jax.tree.map(lambda a: a.astype(accumulator(dtype)), coeffs)
  x, *levels = coeffs
  for details in levels:
    bands = {key: band for key, band in details.items() if band is not None}
    if x is not None:
      if bands:
        x = _cut_to(x, next(iter(bands.values())).shape)
      bands['a' * len(axes)] = x
    x = merge(bands, axes, wavelets, modes)
  if x is None:
    raise ValueError('all coefficients are None; at least one band must be an array.')
  if shape is not None:
    x = crop(x, axes, shape)
  return x.astype(dtype)


def floating(dtype) -> Any:
  """The dtype of a result: the data's own, complex too, and float32 for integers."""
  return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32


def accumulator(dtype) -> Any:
  """At least float32, whatever goes in."""
  return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _long_rows(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
  """A permutation that puts a few trailing elements (colours, say) before the transformed axes."""
  first, last = min(axes), max(axes)
  trailing = list(range(last + 1, len(shape)))
  if math.prod(shape[last + 1 :]) >= _SHORT:
    trailing = []
  rest = [axis for axis in range(first, len(shape)) if axis not in trailing]
  return [*range(first), *trailing, *rest]


def _cut_to(approximation: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Drops the extra sample that an odd length gains on its way down and up."""
  excess = [a - b for a, b in zip(approximation.shape, shape, strict=False)]
  if approximation.ndim != len(shape) or not all(e in (0, 1) for e in excess):
    raise ValueError(
      f'approximation {approximation.shape} does not fit the details {shape} of the next level'
      ' (it may be one longer along an axis). Wavelet, mode and axes must be those of the'
      ' decomposition.'
    )
  return approximation[tuple(slice(n) for n in shape)]


def crop(x: jax.Array, axes: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
  if len(shape) != x.ndim:
    raise ValueError(f'shape={shape} has {len(shape)} dimensions, the coefficients have {x.ndim}.')
  for axis in axes:
    if not x.shape[axis] - 1 <= shape[axis] <= x.shape[axis]:
      raise ValueError(
        f'shape={shape} is not what these coefficients come from: they give {x.shape[axis]} samples'
        f' along axis {axis}, or one fewer.'
      )
    x = jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)
  return x


# The public transforms


def _analysis(data, wavelet, mode, level, axes, multilevel=True) -> tuple[list, int]:
  """Checks the arguments, then `_decompose`; also the number of axes."""
  data = jnp.asarray(data)
  axes = banks.as_axes(axes, data.ndim, unique=multilevel)
  settings = banks.settings(wavelet, mode, axes)
  sizes = [data.shape[axis] for axis in axes]
  if multilevel:
    level = banks.as_level(level, sizes, settings['wavelets'], stacklevel=4)
  return _decompose(data, level=level, **settings), len(axes)


def _synthesis(coeffs: list, wavelet, mode, axes, shape, unique=True) -> jax.Array:
  """Checks the arguments, then `_recompose`."""
  arrays = jax.tree.leaves(coeffs)
  if not arrays:
    raise ValueError('all coefficients are None; at least one band must be an array.')
  if len({a.ndim for a in arrays}) > 1:
    shapes = sorted({a.shape for a in arrays}, key=len)
    raise ValueError(f'all coefficients need the same number of dimensions, got shapes {shapes}.')
  axes = banks.as_axes(axes, arrays[0].ndim, unique)
  for details in coeffs[1:]:
    keys = {key for key in details if len(key) != len(axes) or set(key) - set('ad')}
    if keys:
      raise ValueError(
        f'keys {sorted(keys)} do not name bands of {len(axes)} transformed axes {axes}: each key has'
        " one letter per axis, 'a' or 'd'."
      )
    shapes = {band.shape for band in details.values() if band is not None}
    if len(shapes) > 1:
      raise ValueError(f'the bands of one level differ in shape: {sorted(shapes)}.')
  shape = None if shape is None else tuple(int(n) for n in shape)
  return _recompose(coeffs, shape=shape, **banks.settings(wavelet, mode, axes))


def _optional(x):
  return None if x is None else jnp.asarray(x)


def _from_triple(details) -> Details:
  """{'da', 'ad', 'dd'} from PyWavelets' (horizontal, vertical, diagonal)."""
  if not isinstance(details, Sequence) or len(details) != 3:
    raise ValueError(
      'each level of details is a tuple (cH, cV, cD) as dwt2 and wavedec2 return it, got'
      f' {type(details).__name__}. For a dict use the n-D function.'
    )
  return dict(zip(('da', 'ad', 'dd'), map(_optional, details), strict=True))


def _to_triple(details: Details) -> tuple[jax.Array, jax.Array, jax.Array]:
  return details['da'], details['ad'], details['dd']


def dwt(
  data, wavelet: banks.WaveletLike, mode: str = 'symmetric', axis: int = -1
) -> tuple[jax.Array, jax.Array]:
  """One level of the discrete wavelet transform along one axis, as `pywt.dwt`.

  Args:
    data: [..., n, ...], any floating dtype (kept; sums are float32 or wider); integers become
      float32.
    wavelet: name or `Wavelet`.
    mode: 'symmetric', 'periodization', 'zero' or 'reflect'.
    axis: the axis to transform.

  Returns:
    (cA, cD), approximation and detail, both [..., dwt_coeff_len(n, wavelet, mode), ...].

  Raises:
    ValueError: an unknown wavelet, mode or axis, an empty axis, or one sample with 'reflect'.

  Example:
    >>> cA, cD = dwt(jnp.array([1.0, 2.0, 3.0, 4.0]), 'haar')
    >>> print(cA, cD)
    [2.1213202 4.9497476] [-0.70710677 -0.70710677]
  """
  (approximation, details), _ = _analysis(data, wavelet, mode, 1, axis, multilevel=False)
  return approximation, details['d']


def idwt(
  cA, cD, wavelet: banks.WaveletLike, mode: str = 'symmetric', axis: int = -1, *, shape=None
) -> jax.Array:
  """Inverse of `dwt`.

  Args:
    cA: approximation [..., k, ...], or None for zeros.
    cD: detail of the same shape, or None for zeros.
    wavelet: name or `Wavelet` of the decomposition.
    mode: boundary mode of the decomposition.
    axis: the transformed axis.
    shape: shape of the original data. Without it an odd length comes back one sample longer.

  Returns:
    [..., n, ...] with n = 2k for periodization, else 2k - dec_len + 2, or as `shape` says.

  Raises:
    ValueError: shapes differ or do not belong to `shape`, or both parts are None.

  Example:
    >>> x = jnp.array([1.0, 2.0, 3.0])
    >>> bool(jnp.allclose(idwt(*dwt(x, 'db2'), 'db2', shape=x.shape), x))
    True
  """
  bands = {'a': _optional(cA), 'd': _optional(cD)}
  return _synthesis([None, bands], wavelet, mode, axis, shape)


def dwt2(
  data, wavelet: banks.Wavelets, mode: banks.Modes = 'symmetric', axes: Sequence[int] = (-2, -1)
):
  """One level of the 2-D discrete wavelet transform, as `pywt.dwt2`.

  Args:
    data: array with at least two dimensions; dtypes as in `dwt`.
    wavelet: name or `Wavelet`, or one per axis.
    mode: boundary mode, or one per axis.
    axes: the two axes, rows first.

  Returns:
    (cA, (cH, cV, cD)): approximation; detail along axes[0], along axes[1], along both.

  Raises:
    ValueError: as `dwt`, or not two axes.

  Example:
    >>> x = jnp.ones((64, 224, 224, 3))
    >>> cA, (cH, cV, cD) = dwt2(x, 'haar', axes=(1, 2))
    >>> cA.shape, float(cA[0, 0, 0, 0].round(3))
    ((64, 112, 112, 3), 2.0)
  """
  (approximation, details), _ = _analysis(
    data, wavelet, mode, 1, banks.two_axes(axes), multilevel=False
  )
  return approximation, _to_triple(details)


def idwt2(
  coeffs,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  axes: Sequence[int] = (-2, -1),
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `dwt2`.

  Args:
    coeffs: (cA, (cH, cV, cD)); any of them may be None for zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axes: as in the decomposition.
    shape: shape of the original data. Without it odd lengths come back one sample longer.

  Returns:
    The data.

  Raises:
    ValueError: shapes differ or do not belong to `shape`, or there is no array.

  Example:
    >>> x = jnp.arange(15.0).reshape(3, 5)
    >>> bool(jnp.allclose(idwt2(dwt2(x, 'db2'), 'db2', shape=x.shape), x, atol=1e-5))
    True
  """
  approximation, details = coeffs
  bands = {'aa': _optional(approximation), **_from_triple(details)}
  return _synthesis([None, bands], wavelet, mode, banks.two_axes(axes), shape, unique=False)


def dwtn(data, wavelet: banks.Wavelets, mode: banks.Modes = 'symmetric', axes=None) -> Details:
  """One level of the n-D discrete wavelet transform, as `pywt.dwtn`.

  Args:
    data: any array with at least one dimension; dtypes as in `dwt`.
    wavelet: name or `Wavelet`, or one per axis.
    mode: boundary mode, or one per axis.
    axes: axes to transform, in this order; all by default. A repeated axis is transformed again.

  Returns:
    Bands by key, one letter per axis: 'a' approximation, 'd' detail ('aad' for three axes).

  Raises:
    ValueError: as `dwt`.

  Example:
    >>> sorted(dwtn(jnp.ones((4, 6)), 'haar'))
    ['aa', 'ad', 'da', 'dd']
  """
  (approximation, details), count = _analysis(data, wavelet, mode, 1, axes, multilevel=False)
  return {'a' * count: approximation, **details}


def idwtn(
  coeffs: Mapping[str, Any],
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  axes=None,
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `dwtn`.

  Args:
    coeffs: bands by key; missing ones and None are zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axes: as in the decomposition.
    shape: shape of the original data. Without it odd lengths come back one sample longer.

  Returns:
    The data.

  Raises:
    ValueError: a key does not name a band, shapes differ, or there is no array.

  Example:
    >>> x = jnp.arange(24.0).reshape(2, 3, 4)
    >>> bool(jnp.allclose(idwtn(dwtn(x, 'haar'), 'haar', shape=x.shape), x, atol=1e-5))
    True
  """
  bands = {key: _optional(band) for key, band in coeffs.items()}
  return _synthesis([None, bands], wavelet, mode, axes, shape, unique=False)


def wavedec(
  data,
  wavelet: banks.WaveletLike,
  mode: str = 'symmetric',
  level: int | None = None,
  axis: int = -1,
) -> list[jax.Array]:
  """Multilevel discrete wavelet transform along one axis, as `pywt.wavedec`.

  Args:
    data: [..., n, ...]; dtypes as in `dwt`. Levels are computed in float32 or wider throughout.
    wavelet: name or `Wavelet`.
    mode: boundary mode.
    level: number of levels; by default `dwt_max_level`, with a warning beyond it.
    axis: the axis to transform.

  Returns:
    [cA_level, cD_level, ..., cD_1].

  Raises:
    ValueError: as `dwt`, or level < 0.

  Example:
    >>> [c.shape for c in wavedec(jnp.ones(100), 'db2', level=2)]
    [(27,), (27,), (51,)]
  """
  (approximation, *levels), _ = _analysis(data, wavelet, mode, level, axis)
  return [approximation, *(details['d'] for details in levels)]


def waverec(
  coeffs: Sequence,
  wavelet: banks.WaveletLike,
  mode: str = 'symmetric',
  axis: int = -1,
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `wavedec`.

  Args:
    coeffs: [cA_n, cD_n, ..., cD_1]; None counts as zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axis: as in the decomposition.
    shape: shape of the original data. Without it an odd length comes back one sample longer.

  Returns:
    The data.

  Raises:
    ValueError: the shapes do not fit each other or `shape`, or there is no array.

  Example:
    >>> x = jnp.arange(99.0)
    >>> bool(jnp.allclose(waverec(wavedec(x, 'sym4'), 'sym4', shape=x.shape), x, atol=1e-3))
    True
  """
  approximation, *levels = _coefficients(coeffs)
  if any(isinstance(details, Mapping | Sequence) for details in levels):
    raise ValueError(
      'the details of wavedec are arrays; use waverec2 for tuples, waverecn for dicts.'
    )
  levels = [{'d': _optional(details)} for details in levels]
  return _synthesis([approximation, *levels], wavelet, mode, axis, shape)


def wavedec2(
  data,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  level: int | None = None,
  axes: Sequence[int] = (-2, -1),
) -> list:
  """Multilevel 2-D discrete wavelet transform, as `pywt.wavedec2`.

  Args:
    data: array with at least two dimensions; dtypes as in `dwt`.
    wavelet: name or `Wavelet`, or one per axis.
    mode: boundary mode, or one per axis.
    level: number of levels; by default `dwtn_max_level`, with a warning beyond it.
    axes: the two axes, rows first.

  Returns:
    [cA_level, (cH, cV, cD) of the deepest level, ..., (cH, cV, cD) of level 1].

  Raises:
    ValueError: as `dwt`, level < 0, or not two different axes.

  Example:
    >>> cA, *levels = wavedec2(jnp.ones((2, 64, 64, 3)), 'db4', level=2, axes=(1, 2))
    >>> cA.shape, levels[-1][0].shape
    ((2, 21, 21, 3), (2, 35, 35, 3))
  """
  (approximation, *levels), _ = _analysis(data, wavelet, mode, level, banks.two_axes(axes))
  return [approximation, *map(_to_triple, levels)]


def waverec2(
  coeffs: Sequence,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  axes: Sequence[int] = (-2, -1),
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `wavedec2`.

  Args:
    coeffs: [cA, (cH, cV, cD), ...]; any array may be None for zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axes: as in the decomposition.
    shape: shape of the original data. Without it odd lengths come back one sample longer.

  Returns:
    The data.

  Raises:
    ValueError: the shapes do not fit each other or `shape`, or there is no array.

  Example:
    >>> x = jnp.arange(63.0).reshape(7, 9)
    >>> bool(jnp.allclose(waverec2(wavedec2(x, 'haar'), 'haar', shape=x.shape), x, atol=1e-4))
    True
  """
  approximation, *levels = _coefficients(coeffs)
  levels = [_from_triple(details) for details in levels]
  return _synthesis([approximation, *levels], wavelet, mode, banks.two_axes(axes), shape)


def wavedecn(
  data,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  level: int | None = None,
  axes=None,
) -> list:
  """Multilevel n-D discrete wavelet transform, as `pywt.wavedecn`.

  Args:
    data: any array with at least one dimension; dtypes as in `dwt`.
    wavelet: name or `Wavelet`, or one per axis.
    mode: boundary mode, or one per axis.
    level: number of levels; by default `dwtn_max_level`, with a warning beyond it.
    axes: axes to transform, all by default.

  Returns:
    [cA_level, details of the deepest level, ..., details of level 1], details by key as in `dwtn`.

  Raises:
    ValueError: as `dwt`, level < 0, or a repeated axis.

  Example:
    >>> cA, level2, level1 = wavedecn(jnp.ones((8, 8, 8)), 'haar', level=2)
    >>> cA.shape, level1['ddd'].shape
    ((2, 2, 2), (4, 4, 4))
  """
  return _analysis(data, wavelet, mode, level, axes)[0]


def waverecn(
  coeffs: Sequence,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  axes=None,
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `wavedecn`.

  Args:
    coeffs: [cA, details, ...]; missing bands and None are zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axes: as in the decomposition.
    shape: shape of the original data. Without it odd lengths come back one sample longer.

  Returns:
    The data.

  Raises:
    ValueError: the shapes do not fit each other or `shape`, or there is no array.

  Example:
    >>> x = jnp.arange(60.0).reshape(3, 4, 5)
    >>> bool(jnp.allclose(waverecn(wavedecn(x, 'haar'), 'haar', shape=x.shape), x, atol=1e-4))
    True
  """
  approximation, *levels = _coefficients(coeffs)
  if not all(isinstance(details, Mapping) for details in levels):
    raise ValueError(
      'the details of wavedecn are dicts; use waverec for arrays, waverec2 for tuples.'
    )
  levels = [{key: _optional(band) for key, band in details.items()} for details in levels]
  return _synthesis([approximation, *levels], wavelet, mode, axes, shape)


def _coefficients(coeffs: Sequence) -> list:
  if not isinstance(coeffs, Sequence) or len(coeffs) < 1:
    raise ValueError('coeffs is a list [approximation, details, ...] with at least one element.')
  return [_optional(coeffs[0]), *coeffs[1:]]


# One array for all bands


def coeffs_to_array(coeffs: Sequence, padding: float | None = 0, axes=None):
  """Puts the bands of a multilevel transform side by side in one array, as `pywt.coeffs_to_array`.

  Args:
    coeffs: what `wavedec`, `wavedec2` or `wavedecn` returned.
    padding: value of the places no band covers; None refuses to leave any.
    axes: the transformed axes; may be left out when all were.

  Returns:
    (array, slices): the approximation in the first corner, each level's details around it; slices
    as `array_to_coeffs` takes them. The slices are Python values, known while tracing.

  Raises:
    ValueError: a band is missing, axes are needed, or bands leave gaps while padding is None.

  Example:
    >>> coeffs = wavedec2(jnp.ones((8, 8)), 'haar', level=2)
    >>> array, slices = coeffs_to_array(coeffs)
    >>> array.shape, slices[1]['dd']
    ((8, 8), (slice(2, 4, None), slice(2, 4, None)))
  """
  approximation, *levels = _coefficients(coeffs)
  levels = [_by_key(details) for details in levels]
  if approximation is None or any(b is None for details in levels for b in details.values()):
    raise ValueError('coeffs_to_array needs every band; use zeros for those you leave out.')
  ndim = approximation.ndim
  if not levels:
    return approximation, [(slice(None),) * ndim]
  letters = len(next(iter(levels[0])))
  if axes is None and letters < ndim:
    raise ValueError(
      f'the bands come from a transform of {letters} of {ndim} axes: say which, as in axes=(1, 2).'
    )
  axes = banks.as_axes(axes, ndim, unique=True)
  if len(axes) != letters:
    raise ValueError(f'{len(axes)} axes {axes} given, but {letters} were transformed.')
  corner = list(approximation.shape)
  slices: list = [tuple(slice(n) for n in corner)]
  for details in levels:
    size = details['d' * letters].shape
    slices.append({})
    for key, band in details.items():
      place = [slice(None)] * ndim
      for axis, letter in zip(axes, key, strict=True):
        n = band.shape[axis]
        place[axis] = slice(n) if letter == 'a' else slice(corner[axis], corner[axis] + n)
      slices[-1][key] = tuple(place)
    for axis in axes:
      corner[axis] += size[axis]
  bands = [approximation, *(b for details in levels for b in details.values())]
  if padding is None and math.prod(corner) != sum(b.size for b in bands):
    raise ValueError(
      "the bands leave gaps in one array. Allow a padding value, or use mode 'periodization' and"
      ' lengths divisible by 2**level.'
    )
  array = jnp.full(corner, padding or 0, approximation.dtype)
  places = [slices[0], *(p for level in slices[1:] for p in level.values())]
  for band, place in zip(bands, places, strict=True):
    array = array.at[place].set(band)
  return array, slices


def array_to_coeffs(array, coeff_slices: Sequence, output_format: str = 'wavedecn') -> list:
  """Inverse of `coeffs_to_array`.

  Args:
    array: the array of all bands.
    coeff_slices: the slices that came with it.
    output_format: 'wavedec', 'wavedec2' or 'wavedecn', the form of the details.

  Returns:
    Coefficients for `waverec`, `waverec2` or `waverecn`.

  Raises:
    ValueError: an unknown format, or no slices.

  Example:
    >>> x = jnp.arange(64.0).reshape(8, 8)
    >>> array, slices = coeffs_to_array(wavedec2(x, 'haar'))
    >>> bool(
    ...   jnp.allclose(waverec2(array_to_coeffs(array, slices, 'wavedec2'), 'haar'), x, atol=1e-4)
    ... )
    True
  """
  forms = {'wavedec': lambda d: d['d'], 'wavedec2': _to_triple, 'wavedecn': lambda d: d}
  if output_format not in forms:
    raise ValueError(
      f"output_format is 'wavedec', 'wavedec2' or 'wavedecn', got {output_format!r}."
    )
  if not coeff_slices:
    raise ValueError('coeff_slices is empty; pass what coeffs_to_array returned.')
  array = jnp.asarray(array)
  levels = [{key: array[place] for key, place in level.items()} for level in coeff_slices[1:]]
  return [array[coeff_slices[0]], *map(forms[output_format], levels)]


def _by_key(details) -> Details:
  """Details of one level in any of the three forms, as a dict."""
  if isinstance(details, Mapping):
    return {key: _optional(band) for key, band in details.items()}
  if isinstance(details, Sequence):
    return _from_triple(details)
  return {'d': _optional(details)}
