"""Discrete wavelet transforms with the names and conventions of PyWavelets.

One level along one axis is a pair of banded matrices, and everything here is that pair in disguise.
With `start` and `count` from `_rows`, and samples outside the signal taken from inside it by
`_extension`:

  approximation[k] = sum_j dec_lo[F - 1 - j] * x[start + 2k + j],  0 <= j < F,  0 <= k < count

and the detail likewise with `dec_hi`. `analysis_matrix` and `synthesis_matrix` write it down; the
functions on arrays compute the same without building them. Two things make that fast on a CPU. Rows
that do not touch the boundary are sums of strided slices of the data, so nothing is padded or
copied. And where few elements follow the axis (the last axis of images stored `[n, c, h, w]`), its
even and odd samples are separated first, so that every later read is contiguous.

Source: S. Mallat, *A Theory for Multiresolution Signal Decomposition*, IEEE PAMI 11(7), 1989,
section III; boundary rules: G. Strang, T. Nguyen, *Wavelets and Filter Banks*, 1996, chapter 8.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import functools
import itertools
import math
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.ops import _wavelet_filters

_MODES = {
  'symmetric': 'symmetric',
  'sym': 'symmetric',
  'periodization': 'periodization',
  'per': 'periodization',
  'zero': 'zero',
  'zpd': 'zero',
  'reflect': 'reflect',
}
# With fewer elements than this after an axis, loops along the axis itself are the longer ones.
_SHORT = 16

Details = dict[str, jax.Array]


# Wavelets


@dataclasses.dataclass(frozen=True)
class Wavelet:
  """A filter bank, by name or by its four filters.

  Attributes:
    name: 'haar', 'db1'..'db38', 'sym2'..'sym20', 'coif1'..'coif17', 'bior1.1'..'bior6.8',
      'rbio1.1'..'rbio6.8' (`wavelist()` has them all), or any name next to `filter_bank`.
    filter_bank: (dec_lo, dec_hi, rec_lo, rec_hi), four filters of one even length.

  Raises:
    ValueError: the name is unknown and no filters are given, or the filters differ in length.

  Example:
    >>> Wavelet('db2').dec_len
    4
  """

  name: str
  filter_bank: tuple[tuple[float, ...], ...] = ()

  def __post_init__(self):
    bank = tuple(tuple(float(v) for v in f) for f in self.filter_bank) or _named_bank(self.name)
    lengths = [len(f) for f in bank]
    if len(bank) != 4 or len(set(lengths)) != 1 or lengths[0] % 2 or lengths[0] < 2:
      raise ValueError(
        f'wavelet {self.name!r} needs four filters (dec_lo, dec_hi, rec_lo, rec_hi) of one even'
        f' length, got lengths {lengths}. Pad the shorter ones with zeros.'
      )
    object.__setattr__(self, 'filter_bank', bank)

  @property
  def dec_lo(self) -> tuple[float, ...]:
    """Low-pass analysis filter."""
    return self.filter_bank[0]

  @property
  def dec_hi(self) -> tuple[float, ...]:
    """High-pass analysis filter."""
    return self.filter_bank[1]

  @property
  def rec_lo(self) -> tuple[float, ...]:
    """Low-pass synthesis filter; the scaling filter of an orthogonal wavelet."""
    return self.filter_bank[2]

  @property
  def rec_hi(self) -> tuple[float, ...]:
    """High-pass synthesis filter."""
    return self.filter_bank[3]

  @property
  def dec_len(self) -> int:
    """Length of the analysis filters."""
    return len(self.dec_lo)

  @property
  def rec_len(self) -> int:
    """Length of the synthesis filters."""
    return len(self.rec_lo)


WaveletLike = str | Wavelet
Wavelets = WaveletLike | Sequence[WaveletLike]
Modes = str | Sequence[str]


def wavelist(family: str | None = None) -> list[str]:
  """Names of the wavelets, all of them or those of one family.

  Args:
    family: 'haar', 'db', 'sym', 'coif', 'bior' or 'rbio'.

  Returns:
    Names in the order of their filters' length within each family.

  Raises:
    ValueError: no such family.

  Example:
    >>> wavelist('sym')[:2]
    ['sym2', 'sym3']
  """
  biorthogonal = list(_wavelet_filters.BIORTHOGONAL)
  reverse = [name.replace('bior', 'rbio') for name in biorthogonal]
  names = ['haar', *_wavelet_filters.ORTHOGONAL, *biorthogonal, *reverse]
  if family is None:
    return names
  found = [name for name in names if name.rstrip('0123456789.') == family]
  if not found:
    raise ValueError(f'no wavelet family {family!r}: haar, db, sym, coif, bior or rbio.')
  return found


def _named_bank(name: str) -> tuple[tuple[float, ...], ...]:
  """Looks the low-pass filters up; the high-pass ones are the others with alternating signs."""
  key = 'db1' if name == 'haar' else name.replace('rbio', 'bior')
  if key in _wavelet_filters.ORTHOGONAL:
    rec_lo = _wavelet_filters.ORTHOGONAL[key]
    dec_lo = rec_lo[::-1]
  elif key in _wavelet_filters.BIORTHOGONAL:
    dec_lo, rec_lo = _wavelet_filters.BIORTHOGONAL[key]
    if key != name:
      dec_lo, rec_lo = rec_lo[::-1], dec_lo[::-1]
  else:
    close = ', '.join(map(repr, difflib.get_close_matches(name, wavelist(), 3, 0.5)))
    raise ValueError(
      f'unknown wavelet {name!r}. '
      + (f'Closest: {close}. ' if close else '')
      + "Families: haar, db1..db38, sym2..sym20, coif1..coif17, bior and rbio ('bior2.2');"
      ' fqjax.ops.wavelist() lists them all.'
    )
  signs = [1.0 - 2.0 * (j % 2) for j in range(len(rec_lo))]
  dec_hi = tuple(-s * v for s, v in zip(signs, rec_lo, strict=True))
  rec_hi = tuple(s * v for s, v in zip(signs, dec_lo, strict=True))
  return dec_lo, dec_hi, rec_lo, rec_hi


@functools.lru_cache(maxsize=None)
def _wavelet(wavelet: WaveletLike) -> Wavelet:
  if isinstance(wavelet, str):
    return Wavelet(wavelet.lower())
  # Anything that carries its filters, a pywt.Wavelet for one.
  return Wavelet(wavelet.name, tuple(map(tuple, wavelet.filter_bank)))


def _mode(mode: str) -> str:
  if mode not in _MODES:
    raise ValueError(
      f"unknown boundary mode {mode!r}: 'symmetric' ('sym'), 'periodization' ('per'),"
      " 'zero' ('zpd') or 'reflect'."
    )
  return _MODES[mode]


def _per_axis(setting, axes: Sequence[int], one, what: str) -> tuple:
  """One wavelet or mode per axis, from one for all or a sequence of them."""
  if isinstance(setting, str) or not isinstance(setting, Sequence):
    return (one(setting),) * len(axes)
  if len(setting) == 1:
    return (one(setting[0]),) * len(axes)
  if len(setting) != len(axes):
    raise ValueError(
      f'got {len(setting)} {what} for {len(axes)} axes {tuple(axes)}: give one for all axes, or'
      ' one for each.'
    )
  return tuple(one(s) for s in setting)


# Geometry: lengths, boundaries, and the two matrices


def dwt_max_level(data_len: int, filter_len: int | WaveletLike) -> int:
  """Number of levels after which no coefficient is free of the boundary.

  Args:
    data_len: length of the signal.
    filter_len: length of the filters, or a wavelet.

  Returns:
    floor(log2(data_len / (filter_len - 1))), at least 0.

  Raises:
    ValueError: the filter is shorter than 2.

  Example:
    >>> dwt_max_level(224, 'db4')
    5
  """
  size = filter_len if isinstance(filter_len, int) else _wavelet(filter_len).dec_len
  if size < 2:
    raise ValueError(f'a wavelet filter has at least 2 taps, got filter_len={size}.')
  return max(0, (max(0, data_len) // (size - 1)).bit_length() - 1)


def dwtn_max_level(
  shape: Sequence[int], wavelet: Wavelets, axes: int | Sequence[int] | None = None
) -> int:
  """The smallest `dwt_max_level` over the axes.

  Args:
    shape: shape of the data.
    wavelet: one wavelet, or one per axis.
    axes: axes to transform; all by default.

  Returns:
    The highest useful level of `wavedec2` and `wavedecn`.

  Example:
    >>> dwtn_max_level((64, 224, 224, 3), 'db4', axes=(1, 2))
    5
  """
  axes = _axes(axes, len(shape), unique=True)
  wavelets = _per_axis(wavelet, axes, _wavelet, 'wavelets')
  return min(dwt_max_level(shape[a], w) for a, w in zip(axes, wavelets, strict=True))


def dwt_coeff_len(data_len: int, filter_len: int | WaveletLike, mode: str = 'symmetric') -> int:
  """Length of `dwt`'s outputs.

  Args:
    data_len: length of the signal.
    filter_len: length of the filters, or a wavelet.
    mode: boundary mode.

  Returns:
    ceil(data_len / 2) for periodization, floor((data_len + filter_len - 1) / 2) otherwise.

  Example:
    >>> dwt_coeff_len(224, 'db4'), dwt_coeff_len(224, 'db4', 'periodization')
    (115, 112)
  """
  size = filter_len if isinstance(filter_len, int) else _wavelet(filter_len).dec_len
  return _rows(data_len, size, _mode(mode))[1]


def _rows(n: int, size: int, mode: str) -> tuple[int, int]:
  """First sample that row 0 of the analysis reads, and the number of rows."""
  if mode == 'periodization':
    return 1 - size // 2, (n + 1) // 2
  return 2 - size, (n + size - 1) // 2


def _extension(n: int, start: int, count: int, mode: str) -> np.ndarray:
  """Which sample of a signal of length n stands at start, start + 1, ...; n stands for a zero."""
  i = np.arange(start, start + count)
  if mode == 'zero':
    return np.where((i < 0) | (i >= n), n, i)
  if mode == 'symmetric':
    i = i % (2 * n)
    return np.minimum(i, 2 * n - 1 - i)
  if mode == 'reflect':
    if n < 2:
      raise ValueError(
        "mode 'reflect' needs at least 2 samples along the axis, got 1. Use 'symmetric', or fewer"
        ' levels if this happened at a deeper one.'
      )
    i = i % (2 * n - 2)
    return np.minimum(i, 2 * n - 2 - i)
  # An odd signal is made even by repeating its last sample.
  return np.minimum(i % (n + n % 2), n - 1)


def analysis_matrix(n: int, wavelet: WaveletLike, mode: str = 'symmetric') -> np.ndarray:
  """The matrix of `dwt` on a signal of length n: definition, test oracle, and small layers.

  Args:
    n: length of the signal.
    wavelet: name or `Wavelet`.
    mode: boundary mode.

  Returns:
    float64 [2 * count, n]: rows of the approximation, then rows of the detail.

  Raises:
    ValueError: an unknown name, an empty signal, or one sample with mode 'reflect'.

  Example:
    >>> analysis_matrix(4, 'haar').round(3)
    array([[ 0.707,  0.707,  0.   ,  0.   ],
           [ 0.   ,  0.   ,  0.707,  0.707],
           [ 0.707, -0.707,  0.   ,  0.   ],
           [ 0.   ,  0.   ,  0.707, -0.707]])
  """
  w, mode = _wavelet(wavelet), _mode(mode)
  _check_length(n)
  start, count = _rows(n, w.dec_len, mode)
  index = _extension(n, start, 2 * count - 2 + w.dec_len, mode)
  matrix = np.zeros((2, count, n + 1))  # the last column takes what falls on a zero
  k = np.arange(count)
  for j in range(w.dec_len):
    for part, taps in enumerate((w.dec_lo, w.dec_hi)):
      np.add.at(matrix[part], (k, index[2 * k + j]), taps[-1 - j])
  return matrix.reshape(2 * count, n + 1)[:, :n]


def synthesis_matrix(count: int, wavelet: WaveletLike, mode: str = 'symmetric') -> np.ndarray:
  """The matrix of `idwt` on `count` approximation and `count` detail coefficients.

  Args:
    count: number of coefficients of each kind.
    wavelet: name or `Wavelet`.
    mode: boundary mode.

  Returns:
    float64 [n, 2 * count], n = 2 * count for periodization, else 2 * count - dec_len + 2.

  Raises:
    ValueError: an unknown name, or too few coefficients for the filter.

  Example:
    >>> (synthesis_matrix(5, 'db2') @ analysis_matrix(8, 'db2')).round(3).trace()
    np.float64(8.0)
  """
  w, mode = _wavelet(wavelet), _mode(mode)
  n = _synthesis_length(count, w, mode)
  start, _ = _rows(n, w.rec_len, mode)
  matrix = np.zeros((n, 2, count))
  k = np.arange(count)
  for j in range(w.rec_len):
    m = start + 2 * k + j
    if mode == 'periodization':
      m = m % n
    inside = (m >= 0) & (m < n)
    for part, taps in enumerate((w.rec_lo, w.rec_hi)):
      np.add.at(matrix[:, part], (m[inside], k[inside]), taps[j])
  return matrix.reshape(n, 2 * count)


def _synthesis_length(count: int, wavelet: Wavelet, mode: str) -> int:
  n = 2 * count if mode == 'periodization' else 2 * count - wavelet.rec_len + 2
  if count < 1 or n < 1:
    raise ValueError(
      f'{count} coefficients along an axis are too few for {wavelet.name!r} with its'
      f' {wavelet.rec_len} taps in mode {mode!r}: dwt gives at least {wavelet.rec_len // 2}.'
      ' Wavelet and mode must be those of the decomposition.'
    )
  return n


def _check_length(n: int) -> None:
  if n < 1:
    raise ValueError('a wavelet transform needs at least one sample along each of its axes, got 0.')


def _axes(axes, ndim: int, unique: bool) -> tuple[int, ...]:
  """Non-negative axes; all of them for None."""
  if axes is None:
    axes = range(ndim)
  elif not isinstance(axes, Sequence | np.ndarray | range):
    axes = (axes,)
  result = []
  for axis in axes:
    if not -ndim <= axis < ndim:
      raise ValueError(f'axis {axis} is out of range for data with {ndim} dimensions.')
    result.append(int(axis) % ndim)
  if unique and len(set(result)) < len(result):
    raise ValueError(
      f'axes {tuple(axes)} name one axis twice; a multilevel transform takes each once.'
    )
  if not result:
    raise ValueError('a wavelet transform needs at least one axis.')
  return tuple(result)


def _level(level: int | None, sizes: Sequence[int], wavelets: Sequence[Wavelet]) -> int:
  for n in sizes:
    _check_length(n)
  highest = min(dwt_max_level(n, w) for n, w in zip(sizes, wavelets, strict=True))
  if level is None:
    return highest
  if level < 0:
    raise ValueError(f'level must be at least 0, got {level}.')
  if level > highest:
    warnings.warn(
      f'level {level} is deeper than {highest}, the last one with coefficients that the boundary'
      f' does not reach (axis lengths {tuple(sizes)}, filters of'
      f' {max(w.dec_len for w in wavelets)} taps).',
      stacklevel=3,
    )
  return level


# One level along one axis


def _analyse(x: jax.Array, axis: int, wavelet: Wavelet, mode: str) -> tuple[jax.Array, jax.Array]:
  """Approximation and detail of x along one axis."""
  n, size = x.shape[axis], wavelet.dec_len
  _check_length(n)
  start, count = _rows(n, size, mode)
  index = _extension(n, start, 2 * count - 2 + size, mode)
  # Row k reads x[start + 2k + j] for j < size, so a filter runs backwards over its taps.
  filters = wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]
  if size > 2 and math.prod(x.shape[axis + 1 :]) < _SHORT:
    x = _join([(x, index[:-start]), x, (x, index[n - start :])], axis)
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
  return jax.lax.optimization_barrier((approximation, detail))


def _take(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
  """x at the given positions of an axis; x.shape[axis] means zero."""
  return jnp.take(x, index, axis, mode='fill', fill_value=0)


def _join(pieces, axis: int) -> jax.Array:
  """Concatenates arrays and, where a piece is a pair, the array at those positions."""
  pieces = [p if isinstance(p, jax.Array) else _take(*p, axis) for p in pieces if len(p[-1])]
  return jnp.concatenate(pieces, axis) if len(pieces) > 1 else pieces[0]


def _strided_sum(x: jax.Array, taps: Sequence[float], axis: int) -> jax.Array:
  """out[k] = sum_j taps[j] * x[2k + j], wherever all taps find a sample."""
  count = (x.shape[axis] - len(taps)) // 2 + 1
  return _weighted_sum(
    taps, [jax.lax.slice_in_dim(x, j, j + 2 * count - 1, 2, axis) for j in range(len(taps))]
  )


def _weighted_sum(weights: Sequence[float], terms: Sequence[jax.Array]) -> jax.Array:
  # Python floats are weakly typed: the sum keeps the terms' precision, be it float32 or float64.
  products = [w * t for w, t in zip(weights, terms, strict=True) if w]
  return functools.reduce(jnp.add, products)


def _analyse_phases(x, axis, count, filters):
  """`_strided_sum` over both filters for an axis with little after it.

  The barrier makes XLA write the even and the odd samples out; otherwise it would fuse the strided
  reads into the sum and do them once per tap.
  """
  lead, inner = x.shape[:axis], math.prod(x.shape[axis + 1 :])
  pairs = x.reshape(*lead, x.shape[axis] // 2, 2 * inner)
  phases = jax.lax.optimization_barrier(
    tuple(p.reshape(*lead, -1) for p in (pairs[..., :inner], pairs[..., inner:]))
  )
  size = len(filters[0])
  terms = [phases[j % 2][..., (j // 2) * inner : (j // 2 + count) * inner] for j in range(size)]
  results = jax.lax.optimization_barrier(tuple(_weighted_sum(taps, terms) for taps in filters))
  shape = (*lead, count, *x.shape[axis + 1 :])
  return tuple(r.reshape(shape) for r in results)


def _synthesise(approximation, detail, axis: int, wavelet: Wavelet, mode: str) -> jax.Array:
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
  n = _synthesis_length(count, wavelet, mode)
  start, _ = _rows(n, size, mode)
  # Output m is sum_k rec[m - start - 2k] * part[k]. With m - start = 2u + p, phase p of the output
  # is sum_i rec[2i + p] * part[u - i]: contiguous reads, for each u from first to last.
  half = size // 2
  first, last = -start // 2, (n - 1 - start) // 2
  before = half - 1 - first  # coefficients read from beyond the left end: none but in periodization
  index = np.arange(-before, last + 1) % count
  terms, weights = [], ([], [])
  for part, taps in parts:
    part = _join([(part, index[:before]), part, (part, index[before + count :])], axis)
    for i in range(half):
      terms.append(jax.lax.slice_in_dim(part, half - 1 - i, last - first + half - i, axis=axis))
      weights[0].append(taps[2 * i])
      weights[1].append(taps[2 * i + 1])
  phases = jax.lax.optimization_barrier(tuple(_weighted_sum(w, terms) for w in weights))
  x = jnp.stack(phases, axis + 1)
  x = x.reshape(*shape[:axis], 2 * (last - first + 1), *shape[axis + 1 :])
  begin = -start - 2 * first  # periodization may begin with an odd phase
  return jax.lax.slice_in_dim(x, begin, begin + n, axis=axis)


# Any number of levels and axes

# Every public function is a view of these two. They are jitted as wholes, so that a call outside
# `jax.jit` is one program too; inside another jit they dissolve.


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'level'))
def _decompose(x, axes, wavelets, modes, level) -> list:
  """[approximation, details of the deepest level, ..., details of level 1]; details by key."""
  dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32
  x = x.astype(_accumulator(dtype))
  order = _long_rows(x.shape, axes)
  axes = [order.index(axis) for axis in axes]
  x = x.transpose(order)
  result = []
  for _ in range(level):
    bands = {'': x}
    for axis, wavelet, mode in zip(axes, wavelets, modes, strict=True):
      bands = {
        key + letter: part
        for key, band in bands.items()
        for letter, part in zip('ad', _analyse(band, axis, wavelet, mode), strict=True)
      }
    x = bands.pop('a' * len(axes))
    result.append(bands)
  back = [int(i) for i in np.argsort(order)]
  return jax.tree.map(lambda a: a.transpose(back).astype(dtype), [x, *reversed(result)])


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'shape'))
def _recompose(coeffs, axes, wavelets, modes, shape=None) -> jax.Array:
  """Inverse of `_decompose`; missing or None parts are zeros."""
  dtype = jnp.result_type(*jax.tree.leaves(coeffs))
  coeffs = jax.tree.map(lambda a: a.astype(_accumulator(dtype)), coeffs)
  x, *levels = coeffs
  for details in levels:
    bands = {key: band for key, band in details.items() if band is not None}
    if x is not None:
      if bands:
        x = _cut_to(x, next(iter(bands.values())).shape)
      bands['a' * len(axes)] = x
    for i, (axis, wavelet, mode) in reversed(
      list(enumerate(zip(axes, wavelets, modes, strict=True)))
    ):
      merged = {}
      for letters in itertools.product('ad', repeat=i):
        key = ''.join(letters)
        pair = bands.get(key + 'a'), bands.get(key + 'd')
        if pair != (None, None):
          merged[key] = _synthesise(*pair, axis, wavelet, mode)
      bands = merged
    x = bands.get('')
  if x is None:
    raise ValueError('all coefficients are None; at least one band must be an array.')
  if shape is not None:
    x = _crop(x, axes, shape)
  return x.astype(dtype)


def _accumulator(dtype) -> Any:
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


def _crop(x: jax.Array, axes: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
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


def _array(x, what: str = 'data') -> jax.Array:
  x = jnp.asarray(x)
  if x.ndim < 1:
    raise ValueError(f'{what} needs at least one dimension, got a scalar.')
  return x


def _settings(wavelet: Wavelets, mode: Modes, axes: Sequence[int]) -> dict[str, Any]:
  return dict(
    axes=tuple(axes),
    wavelets=_per_axis(wavelet, axes, _wavelet, 'wavelets'),
    modes=_per_axis(mode, axes, _mode, 'modes'),
  )
