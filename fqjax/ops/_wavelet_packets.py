"""Wavelet packets in two dimensions: every band is split again, not only the approximation.

A band is named by its path, one letter per level as in PyWavelets' `WaveletPacket2D`: 'a'
approximation, 'h' detail along the first axis, 'v' along the second, 'd' along both. 'ah' is the
horizontal detail of the approximation. Packets of one level tile the frequency plane uniformly,
like the channels of a block DCT.

Source: R. Coifman, M. Wickerhauser, *Entropy-Based Algorithms for Best Basis Selection*, IEEE
Transactions on Information Theory 38(2), 1992.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.ops import _wavelet_banks as banks
from fqjax.ops import _wavelet_levels as levels
from fqjax.ops._dct import accumulator, floating

_LETTERS = {'a': 'aa', 'h': 'da', 'v': 'ad', 'd': 'dd'}


def wavelet_packet_dec2(
  data,
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  level: int | None = None,
  axes: Sequence[int] = (-2, -1),
) -> dict[str, jax.Array]:
  """All bands of one level of the 2-D wavelet packet transform.

  Args:
    data: array with at least two dimensions; dtypes as in `dwt`.
    wavelet: name or `Wavelet`, or one per axis.
    mode: boundary mode, or one per axis.
    level: number of levels; by default `dwtn_max_level`, with a warning beyond it.
    axes: the two axes, rows first.

  Returns:
    4**level bands by path; `wavelet_packet_grid` arranges the paths by frequency.

  Raises:
    ValueError: as `wavedec2`.

  Example:
    >>> bands = wavelet_packet_dec2(jnp.ones((2, 8, 8, 3)), 'haar', level=2, axes=(1, 2))
    >>> len(bands), bands['aa'].shape
    (16, (2, 2, 2, 3))
  """
  data = jnp.asarray(data)
  axes = banks.as_axes(banks.two_axes(axes), data.ndim, unique=True)
  settings = banks.settings(wavelet, mode, axes)
  sizes = [data.shape[axis] for axis in axes]
  level = banks.as_level(level, sizes, settings['wavelets'], stacklevel=3)
  return _decompose(data, level=level, **settings)


def wavelet_packet_rec2(
  bands: Mapping[str, Any],
  wavelet: banks.Wavelets,
  mode: banks.Modes = 'symmetric',
  axes: Sequence[int] = (-2, -1),
  *,
  shape=None,
) -> jax.Array:
  """Inverse of `wavelet_packet_dec2`, from the bands of one level or of any basis.

  Args:
    bands: arrays by path; paths may differ in length, but none begins with another. Missing bands
      are zeros.
    wavelet: as in the decomposition.
    mode: as in the decomposition.
    axes: as in the decomposition.
    shape: shape of the original data, needed where a length is odd at some level.

  Returns:
    The data.

  Raises:
    ValueError: a path has other letters or begins with another one, or shapes do not fit.

  Example:
    >>> x = jnp.arange(35.0).reshape(5, 7)
    >>> bands = wavelet_packet_dec2(x, 'haar', level=2)
    >>> bool(jnp.allclose(wavelet_packet_rec2(bands, 'haar', shape=x.shape), x, atol=1e-4))
    True
  """
  arrays = {path: jnp.asarray(band) for path, band in bands.items() if band is not None}
  if not arrays:
    raise ValueError('wavelet_packet_rec2 needs at least one band.')
  for path in arrays:
    if set(path) - set(_LETTERS):
      raise ValueError(f"path {path!r} has letters other than 'a', 'h', 'v' and 'd'.")
    above = [path[:i] for i in range(len(path)) if path[:i] in arrays]
    if above:
      raise ValueError(
        f'band {path!r} is a part of band {above[0]!r}, which is given too. Keep one of them.'
      )
  dims = {band.ndim for band in arrays.values()}
  if len(dims) > 1:
    raise ValueError(f'all bands need the same number of dimensions, got {sorted(dims)}.')
  axes = banks.as_axes(banks.two_axes(axes), dims.pop(), unique=True)
  shape = None if shape is None else tuple(int(n) for n in shape)
  return _recompose(arrays, shape=shape, **banks.settings(wavelet, mode, axes))


def wavelet_packet_grid(level: int) -> list[list[str]]:
  """Paths of one level, arranged by frequency as `get_level(level, 'freq')` of PyWavelets.

  Args:
    level: number of levels, at least 1.

  Returns:
    2**level rows of 2**level paths: rows by frequency along the first axis, columns along the
    second. A detail band runs its own parts backwards, hence the Gray code.

  Raises:
    ValueError: level < 1.

  Example:
    >>> wavelet_packet_grid(1)
    [['a', 'v'], ['h', 'd']]
  """
  if level < 1:
    raise ValueError(f'level must be at least 1, got {level}.')
  order = ['']
  for _ in range(level):
    order = ['a' + path for path in order] + ['d' + path for path in reversed(order)]
  letter = {pair: name for name, pair in _LETTERS.items()}
  return [
    [''.join(letter[r + c] for r, c in zip(row, column, strict=True)) for column in order]
    for row in order
  ]


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'level'))
def _decompose(x, axes, wavelets, modes, level):
  dtype = floating(x.dtype)
  bands = {'': x.astype(accumulator(dtype))}
  for _ in range(level):
    bands = {
      path + letter: parts[key]
      for path, band in bands.items()
      for parts in [levels.split(band, axes, wavelets, modes)]
      for letter, key in _LETTERS.items()
    }
  return {path: band.astype(dtype) for path, band in bands.items()}


@functools.partial(jax.jit, static_argnames=('axes', 'wavelets', 'modes', 'shape'))
def _recompose(bands, axes, wavelets, modes, shape):
  dtype = floating(jnp.result_type(*bands.values()))
  bands = {path: band.astype(accumulator(dtype)) for path, band in bands.items()}
  shapes = [shape]  # of the bands at each depth
  for _ in range(max(map(len, bands))):
    shapes.append(_halved(shapes[-1], axes, wavelets, modes) if shape else None)
  for depth in range(len(shapes) - 1, 0, -1):
    parents = {path[:-1] for path in bands if len(path) == depth}
    for parent in sorted(parents):
      parts = {key: bands.pop(parent + letter, None) for letter, key in _LETTERS.items()}
      whole = levels.merge(parts, axes, wavelets, modes)
      assert whole is not None  # the parent came from one of its parts
      if shape:
        whole = levels.crop(whole, axes, shapes[depth - 1])
      bands[parent] = whole
  return bands[''].astype(dtype)


def _halved(shape, axes, wavelets, modes):
  shape = list(shape)
  for axis, wavelet, mode in zip(axes, wavelets, modes, strict=True):
    shape[axis] = banks.dwt_coeff_len(shape[axis], wavelet, mode)
  return tuple(shape)
