"""Wavelets, their boundary rules, and one level of the transform written down as a matrix.

With `rows` giving `start` and `count`, and samples outside the signal taken from inside it as
`extension` says, one level along one axis is

  approximation[k] = sum_j dec_lo[F - 1 - j] * x[start + 2k + j],  0 <= j < F,  0 <= k < count

and the detail likewise with `dec_hi`. `analysis_matrix` and `synthesis_matrix` are this formula and
its inverse; `_wavelets.py` computes the same on arrays without building them.

Sources: S. Mallat, *A Theory for Multiresolution Signal Decomposition*, IEEE PAMI 11(7), 1989,
section III; boundary rules: G. Strang, T. Nguyen, *Wavelets and Filter Banks*, 1996, chapter 8.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import warnings

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


@functools.cache
def as_wavelet(wavelet: WaveletLike) -> Wavelet:
  if isinstance(wavelet, str):
    return Wavelet(wavelet.lower())
  # Anything that carries its filters, a pywt.Wavelet for one.
  return Wavelet(wavelet.name, tuple(map(tuple, wavelet.filter_bank)))


def as_mode(mode: str) -> str:
  if mode not in _MODES:
    raise ValueError(
      f"unknown boundary mode {mode!r}: 'symmetric' ('sym'), 'periodization' ('per'),"
      " 'zero' ('zpd') or 'reflect'."
    )
  return _MODES[mode]


def per_axis(setting, axes: Sequence[int], one, what: str) -> tuple:
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


def as_axes(axes, ndim: int, unique: bool) -> tuple[int, ...]:
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


def two_axes(axes: Sequence[int]) -> tuple[int, ...]:
  """The two axes of a 2-D transform."""
  if len(axes) != 2:
    raise ValueError(f'a 2-D transform needs 2 axes, got {tuple(axes)}.')
  return tuple(axes)


def settings(wavelet: Wavelets, mode: Modes, axes: tuple[int, ...]) -> dict[str, tuple]:
  """Static arguments of a transform: axes, one wavelet and one mode for each."""
  return dict(
    axes=axes,
    wavelets=per_axis(wavelet, axes, as_wavelet, 'wavelets'),
    modes=per_axis(mode, axes, as_mode, 'modes'),
  )


def as_level(
  level: int | None, sizes: Sequence[int], wavelets: Sequence[Wavelet], stacklevel: int
) -> int:
  """The number of levels, the highest useful one for None; warns beyond it."""
  for n in sizes:
    check_length(n)
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
      stacklevel=stacklevel,
    )
  return level


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
  size = filter_len if isinstance(filter_len, int) else as_wavelet(filter_len).dec_len
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
  axes = as_axes(axes, len(shape), unique=True)
  wavelets = per_axis(wavelet, axes, as_wavelet, 'wavelets')
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
  size = filter_len if isinstance(filter_len, int) else as_wavelet(filter_len).dec_len
  return rows(data_len, size, as_mode(mode))[1]


def rows(n: int, size: int, mode: str) -> tuple[int, int]:
  """First sample that row 0 of the analysis reads, and the number of rows."""
  if mode == 'periodization':
    return 1 - size // 2, (n + 1) // 2
  return 2 - size, (n + size - 1) // 2


def extension(n: int, start: int, count: int, mode: str) -> np.ndarray:
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
  w, mode = as_wavelet(wavelet), as_mode(mode)
  check_length(n)
  start, count = rows(n, w.dec_len, mode)
  index = extension(n, start, 2 * count - 2 + w.dec_len, mode)
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
  w, mode = as_wavelet(wavelet), as_mode(mode)
  n = synthesis_length(count, w, mode)
  start, _ = rows(n, w.rec_len, mode)
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


def synthesis_length(count: int, wavelet: Wavelet, mode: str) -> int:
  n = 2 * count if mode == 'periodization' else 2 * count - wavelet.rec_len + 2
  if count < 1 or n < 1:
    raise ValueError(
      f'{count} coefficients along an axis are too few for {wavelet.name!r} with its'
      f' {wavelet.rec_len} taps in mode {mode!r}: dwt gives at least {wavelet.rec_len // 2}.'
      ' Wavelet and mode must be those of the decomposition.'
    )
  return n


def check_length(n: int) -> None:
  if n < 1:
    raise ValueError('a wavelet transform needs at least one sample along each of its axes, got 0.')
