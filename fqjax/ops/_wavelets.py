"""Discrete wavelet transforms with the names and conventions of PyWavelets.

The transforms of one and of two axes are those of any number under other names for the bands.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.ops import _wavelet_banks as banks
from fqjax.ops._wavelet_levels import Details, decompose, recompose


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
  bands = dwtn(data, wavelet, mode, axis)
  return bands['a'], bands['d']


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
  return idwtn({'a': cA, 'd': cD}, wavelet, mode, axis, shape=shape)


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
    >>> x = jnp.ones((2, 224, 224, 3))
    >>> cA, (cH, cV, cD) = dwt2(x, 'haar', axes=(1, 2))
    >>> cA.shape, float(cA[0, 0, 0, 0].round(3))
    ((2, 112, 112, 3), 2.0)
  """
  bands = dwtn(data, wavelet, mode, banks.two_axes(axes))
  return bands['aa'], _to_triple(bands)


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
  bands = {'aa': approximation, **_from_triple(details)}
  return idwtn(bands, wavelet, mode, banks.two_axes(axes), shape=shape)


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
  data = jnp.asarray(data)
  axes = banks.as_axes(axes, data.ndim, unique=False)
  approximation, details = decompose(data, level=1, **banks.settings(wavelet, mode, axes))
  return {'a' * len(axes): approximation, **details}


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
  return _synthesis([None, dict(coeffs)], wavelet, mode, axes, shape, unique=False)


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
  approximation, *levels = _analysis(data, wavelet, mode, level, axis)
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
    >>> x = jnp.arange(9.0)
    >>> bool(jnp.allclose(waverec(wavedec(x, 'db2'), 'db2', shape=x.shape), x, atol=1e-4))
    True
  """
  approximation, *levels = _as_list(coeffs)
  if any(isinstance(details, Mapping | Sequence) for details in levels):
    raise ValueError(
      'the details of wavedec are arrays; use waverec2 for tuples, waverecn for dicts.'
    )
  coeffs = [approximation, *({'d': details} for details in levels)]
  return waverecn(coeffs, wavelet, mode, axis, shape=shape)


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
    >>> cA, *levels = wavedec2(jnp.ones((2, 64, 64, 3)), 'haar', level=2, axes=(1, 2))
    >>> cA.shape, levels[-1][0].shape
    ((2, 16, 16, 3), (2, 32, 32, 3))
  """
  approximation, *levels = _analysis(data, wavelet, mode, level, banks.two_axes(axes))
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
    >>> x = jnp.arange(15.0).reshape(3, 5)
    >>> bool(jnp.allclose(waverec2(wavedec2(x, 'haar'), 'haar', shape=x.shape), x, atol=1e-4))
    True
  """
  approximation, *levels = _as_list(coeffs)
  coeffs = [approximation, *map(_from_triple, levels)]
  return waverecn(coeffs, wavelet, mode, banks.two_axes(axes), shape=shape)


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
  return _analysis(data, wavelet, mode, level, axes)


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
  coeffs = _as_list(coeffs)
  if not all(isinstance(details, Mapping) for details in coeffs[1:]):
    raise ValueError(
      'the details of wavedecn are dicts; use waverec for arrays, waverec2 for tuples.'
    )
  return _synthesis(coeffs, wavelet, mode, axes, shape, unique=True)


def _analysis(data, wavelet, mode, level, axes) -> list:
  """Checks the arguments of a public function, then `decompose`."""
  data = jnp.asarray(data)
  axes = banks.as_axes(axes, data.ndim, unique=True)
  settings = banks.settings(wavelet, mode, axes)
  sizes = [data.shape[axis] for axis in axes]
  # A warning points at the caller of the public function.
  level = banks.as_level(level, sizes, settings['wavelets'], stacklevel=4)
  return decompose(data, level=level, **settings)


def _synthesis(coeffs: list, wavelet, mode, axes, shape, unique: bool) -> jax.Array:
  """Checks the arguments, then `recompose`."""
  approximation, *levels = coeffs
  coeffs = [_optional(approximation), *map(_by_key, levels)]
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
  return recompose(coeffs, shape=shape, **banks.settings(wavelet, mode, axes))


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
  approximation, *levels = _as_list(coeffs)
  approximation, levels = _optional(approximation), [_by_key(details) for details in levels]
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
    >>> x = jnp.arange(16.0).reshape(4, 4)
    >>> array, slices = coeffs_to_array(wavedec2(x, 'haar', level=1))
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


# Forms of coefficients


def _as_list(coeffs: Sequence) -> list:
  if not isinstance(coeffs, Sequence) or len(coeffs) < 1:
    raise ValueError('coeffs is a list [approximation, details, ...] with at least one element.')
  return list(coeffs)


def _optional(x):
  return None if x is None else jnp.asarray(x)


def _by_key(details) -> Details:
  """Details of one level in any of the three forms, as a dict of arrays and None."""
  if isinstance(details, Sequence):
    details = _from_triple(details)
  elif not isinstance(details, Mapping):
    details = {'d': details}
  return {key: _optional(band) for key, band in details.items()}


def _from_triple(details) -> Details:
  """{'da', 'ad', 'dd'} from PyWavelets' (horizontal, vertical, diagonal)."""
  if not isinstance(details, Sequence) or len(details) != 3:
    raise ValueError(
      'each level of details is a tuple (cH, cV, cD) as dwt2 and wavedec2 return it, got'
      f' {type(details).__name__}. For a dict use the n-D function.'
    )
  return dict(zip(('da', 'ad', 'dd'), details, strict=True))


def _to_triple(details: Details) -> tuple[jax.Array, jax.Array, jax.Array]:
  return details['da'], details['ad'], details['dd']
