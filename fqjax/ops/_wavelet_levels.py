"""Levels of discrete wavelet transforms: one along one axis, one along several, several of them.

Each level along each axis is the banded matrix of `_wavelet_banks.py`, applied without building it.
Rows that do not touch the boundary are sums of strided slices of the data, so nothing is padded or
copied for them. Where few elements follow the axis (the last axis of images stored as
`[n, c, h, w]`), its even and odd samples are separated first, so that every later read is contiguous.

Arguments are checked by the callers, `_wavelets.py` and `_wavelet_packets.py`.
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.ops import _wavelet_banks as banks
from fqjax.ops._dct import accumulator, floating

# With fewer elements than this after an axis, loops along the axis itself are the longer ones.
_SHORT = 16

Details = dict[str, Any]  # arrays by key, one letter per axis


# One level along one axis


def analyse(
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


def synthesise(approximation, detail, axis: int, wavelet: banks.Wavelet, mode: str) -> jax.Array:
  """Inverse of `analyse`; a missing part counts as zeros."""
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
      for letter, part in zip('ad', analyse(band, axis, wavelet, mode), strict=True)
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
        merged[key] = synthesise(*pair, axis, wavelet, mode)
    bands = merged
  return bands.get('')


# Any number of levels and axes

# Every public transform is a view of these two. They are jitted as wholes, so that a call outside
# `jax.jit` is one program too; inside another jit they dissolve.


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'level'))
def decompose(x, axes, wavelets, modes, level) -> list:
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
def recompose(coeffs, axes, wavelets, modes, shape=None) -> jax.Array:
  """Inverse of `decompose`; missing or None parts are zeros."""
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
