"""Discrete cosine transforms I-IV with SciPy's names, arguments and defaults.

Each axis is one product with a basis computed in float64, which leaves a sharded batch where it
is. Axes longer than `_LONGEST_BASIS` go through one complex FFT instead; XLA gathers its operand.
Sums are float32 (float64 for float64 input) whatever comes in.
"""

from collections.abc import Sequence
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Norm = Literal['backward', 'ortho', 'forward'] | None

# Above this the n^2 product is slower than an FFT of length 2n (2-core CPU, float32).
_LONGEST_BASIS = 512


def dct(
  x: jax.typing.ArrayLike,
  type: int = 2,
  n: int | None = None,
  axis: int = -1,
  norm: Norm = None,
) -> jax.Array:
  """Discrete cosine transform along one axis, as `scipy.fft.dct`.

  Args:
    x: real array of any shape; float16, bfloat16, float32 and float64 keep their dtype, integers
      become float32.
    type: 1, 2, 3 or 4.
    n: length of the transformed axis; a longer axis is cropped, a shorter one padded with zeros.
    axis: the axis to transform.
    norm: None or 'backward' scales the inverse by 1/2n, 'forward' this transform, 'ortho' makes
      both orthogonal.

  Returns:
    The coefficients: shape of `x` with `n` at `axis`.

  Raises:
    ValueError: unknown `type` or `norm`, an axis that does not exist, a length below 1 (below 2
      for type 1).
    TypeError: complex `x`.

  Example:
    >>> print(dct(jnp.ones(4), norm='ortho'))
    [2. 0. 0. 0.]

  References:
    Ahmed, Natarajan, Rao, "Discrete Cosine Transform", IEEE Trans. Computers 1974; scaling as in
    the documentation of `scipy.fft.dct`.
  """
  return _transform(x, type, None if n is None else [n], [axis], norm, inverse=False)


def idct(
  x: jax.typing.ArrayLike,
  type: int = 2,
  n: int | None = None,
  axis: int = -1,
  norm: Norm = None,
) -> jax.Array:
  """Inverse of `dct` with the same `type` and `norm`, as `scipy.fft.idct`.

  Args:
    x: real array of any shape; floating dtypes are kept, integers become float32.
    type: 1, 2, 3 or 4: the type of the transform to undo.
    n: length of the transformed axis; a longer axis is cropped, a shorter one padded with zeros.
    axis: the axis to transform.
    norm: as given to `dct`.

  Returns:
    The samples: shape of `x` with `n` at `axis`.

  Raises:
    ValueError: as `dct`.
    TypeError: complex `x`.

  Example:
    >>> print(idct(dct(jnp.arange(3.0), type=1), type=1).round(5))
    [0. 1. 2.]
  """
  return _transform(x, type, None if n is None else [n], [axis], norm, inverse=True)


def dctn(
  x: jax.typing.ArrayLike,
  type: int = 2,
  s: int | Sequence[int] | None = None,
  axes: int | Sequence[int] | None = None,
  norm: Norm = None,
) -> jax.Array:
  """Discrete cosine transform along several axes, as `scipy.fft.dctn`.

  Args:
    x: real array of any shape; floating dtypes are kept, integers become float32.
    type: 1, 2, 3 or 4.
    s: length of each transformed axis (-1 keeps it): crop or pad with zeros as in `dct`. Without
      `axes` it speaks of the last `len(s)` axes.
    axes: the axes to transform; all by default.
    norm: as in `dct`.

  Returns:
    The coefficients: shape of `x` with `s` at `axes`.

  Raises:
    ValueError: as `dct`; repeated axes; `s` and `axes` of different lengths.
    TypeError: complex `x`.

  Example:
    >>> print(abs(dctn(jnp.ones((2, 2)), norm='ortho').round(5)))
    [[2. 0.]
     [0. 0.]]
  """
  return _transform(x, type, s, axes, norm, inverse=False)


def idctn(
  x: jax.typing.ArrayLike,
  type: int = 2,
  s: int | Sequence[int] | None = None,
  axes: int | Sequence[int] | None = None,
  norm: Norm = None,
) -> jax.Array:
  """Inverse of `dctn` with the same `type` and `norm`, as `scipy.fft.idctn`.

  Args:
    x: real array of any shape; floating dtypes are kept, integers become float32.
    type: 1, 2, 3 or 4: the type of the transform to undo.
    s: length of each transformed axis, as in `dctn`.
    axes: the axes to transform; all by default.
    norm: as given to `dctn`.

  Returns:
    The samples: shape of `x` with `s` at `axes`.

  Raises:
    ValueError: as `dctn`.
    TypeError: complex `x`.

  Example:
    >>> print(idctn(dctn(jnp.eye(2))).round(5))
    [[1. 0.]
     [0. 1.]]
  """
  return _transform(x, type, s, axes, norm, inverse=True)


def _transform(x, type, s, axes, norm, *, inverse: bool) -> jax.Array:
  """Checks the arguments, then transforms; the jitted part sees static choices only."""
  x = jnp.asarray(x)
  if jnp.iscomplexobj(x):
    raise TypeError(f'the DCT takes real arrays, got {x.dtype}: transform x.real and x.imag.')
  if type not in (1, 2, 3, 4):
    raise ValueError(f'DCT type {type!r} does not exist: use 1, 2, 3 or 4.')
  if norm not in (None, 'backward', 'ortho', 'forward'):
    raise ValueError(f"norm={norm!r} does not exist: use None, 'backward', 'ortho' or 'forward'.")
  plan = _plan(x.shape, s, axes)
  for axis, n in plan:
    if x.shape[axis] < 1 or n < 1 + (type == 1):
      least = 'DCT-I needs at least 2' if type == 1 else 'the DCT needs at least 1'
      raise ValueError(
        f'axis {axis} of x: {list(x.shape)} would be transformed at length {n}; {least}.'
      )
  return _jitted(x, int(type), plan, norm or 'backward', inverse)


def _plan(shape, s, axes) -> tuple[tuple[int, int], ...]:
  """((axis, length), ...) from SciPy's `s` and `axes`."""
  s = None if s is None else [s] if isinstance(s, (int, np.integer)) else list(s)
  axes = None if axes is None else [axes] if isinstance(axes, (int, np.integer)) else list(axes)
  if axes is None:
    count = len(shape) if s is None else len(s)
    if count > len(shape):
      raise ValueError(f's={s} names {count} lengths, but x: {list(shape)} has fewer axes.')
    axes = list(range(len(shape) - count, len(shape)))
  if any(not -len(shape) <= a < len(shape) for a in axes):
    raise ValueError(f'axes {axes} do not all exist in x: {list(shape)}.')
  axes = [int(a) % len(shape) for a in axes]
  if len(set(axes)) < len(axes):
    raise ValueError(f'each axis can be transformed once, got axes={axes}.')
  if s is None:
    s = [-1] * len(axes)
  if len(s) != len(axes):
    raise ValueError(f's={s} and axes={axes} must have the same length.')
  return tuple((a, shape[a] if n == -1 else int(n)) for a, n in zip(axes, s, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _jitted(x, type, plan, norm, inverse):
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  for axis, n in plan:
    x = jax.lax.slice_in_dim(x, 0, min(n, x.shape[axis]), axis=axis)
    if n > _LONGEST_BASIS:
      x = _by_fft(x, axis, type, n, norm, inverse)
    else:
      # Fewer columns do the same as padding with zeros.
      x = contract(x, _basis(type, n, norm, inverse)[:, : x.shape[axis]], axis)
  return x.astype(dtype)


def floating(dtype) -> jnp.dtype:
  """The dtype of a result: the data's own, float32 for integers."""
  return jnp.dtype(dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32)


def accumulator(dtype) -> jnp.dtype:
  """The dtype sums are taken in: that of the result, but at least float32."""
  dtype = floating(dtype)
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def contract(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  """Multiplies `axis` of x (length n) by a constant [m, n] matrix.

  Three forms of the same product: what matters on a CPU is not to transpose the array, whose
  cost is larger than that of the arithmetic when n is small.
  """
  m, n = matrix.shape
  axis %= x.ndim
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  inner = math.prod(after)
  if n * inner <= 64:
    # The axes behind are few: take them along as a block-diagonal matrix.
    constant = jnp.asarray(np.kron(matrix.T, np.eye(inner)), x.dtype)
    y = jnp.matmul(x.reshape(*before, n * inner), constant, precision='highest')
    return y.reshape(*before, m, *after)
  if matrix.size <= 64:
    return _contract_short(x, matrix, axis)
  y = jnp.tensordot(x, jnp.asarray(matrix.T, x.dtype), axes=(axis, 0), precision='highest')
  return jnp.moveaxis(y, -1, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _contract_short(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  """`contract` of a short axis in the middle: outer products, one fused loop over the axes behind."""
  ones = [1] * x.ndim
  ones[axis] = -1
  products = [
    jax.lax.slice_in_dim(x, i, i + 1, axis=axis) * jnp.asarray(column.reshape(ones), x.dtype)
    for i, column in enumerate(matrix.T)
  ]
  return functools.reduce(jnp.add, products)


@_contract_short.defjvp
def _contract_short_jvp(matrix, axis, primals, tangents):
  # The transpose of a sum of slices is another one; that of an outer product, a slow reduction.
  slices = [
    jax.lax.index_in_dim(tangents[0], i, axis, keepdims=False) for i in range(matrix.shape[1])
  ]
  rows = [sum(s * float(a) for s, a in zip(slices, row, strict=True)) for row in matrix]
  return _contract_short(*primals, matrix, axis), jnp.stack(rows, axis)


@functools.lru_cache(maxsize=256)
def _basis(type: int, n: int, norm: str = 'backward', inverse: bool = False) -> np.ndarray:
  """The float64 [n, n] matrix of a transform, row = output."""
  type, before, after, _ = _parts(type, n, norm, inverse)
  a, b, period = _angles(type, n)
  # Reduced as integers: cos of a large multiple of pi would lose digits.
  steps = np.outer(a, b) % period
  matrix = 2 * np.cos(2 * np.pi / period * steps) * np.outer(after, before)
  matrix.flags.writeable = False
  return matrix


def _angles(type: int, n: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Integers (a_k, b_i, period): the basis is 2 cos(2 pi a_k b_i / period)."""
  whole, half = np.arange(n), 2 * np.arange(n) + 1
  if type == 1:
    return whole, whole, 2 * (n - 1)
  if type == 4:
    return half, half, 8 * n
  return (whole, half, 4 * n) if type == 2 else (half, whole, 4 * n)


def _parts(type: int, n: int, norm: str, inverse: bool) -> tuple[int, np.ndarray, np.ndarray, int]:
  """(type, weights of the inputs, weights of the outputs, length of the even extension)."""
  if inverse:
    type = {1: 1, 2: 3, 3: 2, 4: 4}[type]
    norm = {'backward': 'forward', 'forward': 'backward', 'ortho': 'ortho'}[norm]
  before, after = np.ones(n), np.ones(n)
  length = 2 * (n - 1) if type == 1 else 2 * n
  # Samples on the axis of symmetry occur once in the even extension, all others twice; 'ortho'
  # splits that factor evenly between a transform and its inverse.
  ends = [0, -1] if type == 1 else [0]
  if norm == 'ortho':
    if type in (1, 3):
      before[ends] = math.sqrt(0.5)
    if type in (1, 2):
      after[ends] = math.sqrt(0.5)
    after /= math.sqrt(length)
  else:
    if type in (1, 3):
      before[ends] = 0.5
    if norm == 'forward':
      after /= length
  return type, before, after, length


def _by_fft(x, axis: int, type: int, n: int, norm: str, inverse: bool) -> jax.Array:
  """The product with `_basis` as 2 Re(q_k FFT(p_i x_i)_k) over the even extension's length.

  With k and i shifted by half samples, cos(2 pi (k + d)(i + e) / L) is the real part of
  exp(-2 pi j (k i + k e + d i + d e) / L): one FFT, a factor before it and a factor after it.
  """
  type, before, after, length = _parts(type, n, norm, inverse)
  d, e = (0.5 if type in (3, 4) else 0.0), (0.5 if type in (2, 4) else 0.0)
  index = np.arange(n)
  p = before * np.exp(-2j * np.pi * d * index / length)
  q = 2 * after * np.exp(-2j * np.pi * (index + d) * e / length)
  dtype = jnp.complex128 if x.dtype == jnp.float64 else jnp.complex64
  x = jnp.moveaxis(x, axis, -1)
  ones = (1,) * (x.ndim - 1)
  p = jnp.asarray(p[: x.shape[-1]].reshape(*ones, -1), dtype)
  y = jnp.fft.fft(x.astype(dtype) * p, n=length)[..., :n]
  y = (y * jnp.asarray(q.reshape(*ones, n), dtype)).real
  return jnp.moveaxis(y, -1, axis)
