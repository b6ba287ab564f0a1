"""JPEG's colour space, quantisation tables and chroma handling, and the route to coefficients.

Pixels are numbers on the scale 0..255, channels last; chroma is centred on 128. Floating dtypes
are kept (sums in float32, or float64 for float64); integers become float32.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.ops._block_dct import block_dct, block_idct, pad_to
from fqjax.ops._dct import accumulator, floating

# JFIF: luma weights of ITU-R BT.601; Cb and Cr are B - Y and R - Y scaled to the range of a byte.
_TO_YCBCR = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.5],
    [0.5, -0.587 / 1.402, -0.114 / 1.402],
  ]
)
_TO_RGB = np.linalg.inv(_TO_YCBCR)

# ITU-T T.81, tables K.1 and K.2, row = vertical frequency.
_LUMA_TABLE = np.array(
  [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
  ]
)
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


@functools.partial(jax.jit, inline=True)
def rgb_to_ycbcr(rgb: jax.Array) -> jax.Array:
  """RGB to JFIF YCbCr, unrounded.

  Args:
    rgb: [..., 3] on the scale 0..255; floating dtypes are kept, integers become float32.

  Returns:
    [..., 3]: Y, Cb, Cr on the scale 0..255, grey has Cb = Cr = 128.

  Raises:
    ValueError: the last axis is not 3.

  Example:
    >>> rgb_to_ycbcr(jnp.array([255.0, 0.0, 0.0])).round(2).tolist()
    [76.23999786376953, 84.97000122070312, 255.5]

  References:
    JFIF 1.02, page 3 (ITU-T T.871, section 7).
  """
  return _colour('rgb_to_ycbcr', rgb, _TO_YCBCR, before=0.0, after=128.0)


@functools.partial(jax.jit, inline=True)
def ycbcr_to_rgb(ycbcr: jax.Array) -> jax.Array:
  """JFIF YCbCr to RGB, neither rounded nor clipped: inverse of `rgb_to_ycbcr`.

  Args:
    ycbcr: [..., 3] on the scale 0..255; floating dtypes are kept, integers become float32.

  Returns:
    [..., 3]: R, G, B; colours outside the RGB cube lie outside 0..255.

  Raises:
    ValueError: the last axis is not 3.

  Example:
    >>> ycbcr_to_rgb(jnp.array([100, 128, 128])).tolist()
    [100.0, 100.0, 100.0]
  """
  return _colour('ycbcr_to_rgb', ycbcr, _TO_RGB, before=-128.0, after=0.0)


def quantization_tables(quality: int) -> tuple[np.ndarray, np.ndarray]:
  """The luma and chroma tables libjpeg writes at a quality, row-major.

  Args:
    quality: 1 (coarse) to 100 (every entry 1).

  Returns:
    Two int [8, 8] tables, row = vertical frequency; coefficient = stored integer * entry.

  Raises:
    ValueError: quality outside 1..100.

  Example:
    >>> luma, chroma = quantization_tables(75)
    >>> luma[0].tolist()
    [8, 6, 5, 8, 12, 20, 26, 31]

  References:
    ITU-T T.81, annex K.1; scaling by quality as `jpeg_quality_scaling` of libjpeg.
  """
  if not 1 <= quality <= 100:
    raise ValueError(f'JPEG quality runs from 1 to 100, got {quality}.')
  scale = 5000 // quality if quality < 50 else 200 - 2 * quality
  luma, chroma = ((t * scale + 50) // 100 for t in (_LUMA_TABLE, _CHROMA_TABLE))
  return np.clip(luma, 1, 255), np.clip(chroma, 1, 255)


@functools.partial(jax.jit, static_argnames='factor', inline=True)
def subsample_chroma(x: jax.Array, factor: int = 2) -> jax.Array:
  """Means over factor x factor pixels, as a 4:2:0 encoder reduces chroma.

  Args:
    x: [..., h, w, c]; sizes that do not divide are continued by their last row and column.
    factor: reduction per axis.

  Returns:
    [..., ceil(h/factor), ceil(w/factor), c].

  Raises:
    ValueError: fewer than 3 axes or an empty image.

  Example:
    >>> subsample_chroma(jnp.arange(4.0).reshape(2, 2, 1)).tolist()
    [[[1.5]]]
  """
  dtype = floating(x.dtype)
  x = pad_to(x, factor).astype(accumulator(dtype))
  *lead, h, w, c = x.shape
  x = x.reshape(*lead, h // factor, factor, w // factor, factor, c)
  return x.mean(axis=(-4, -2)).astype(dtype)


@functools.partial(jax.jit, static_argnames=('factor', 'method'), inline=True)
def upsample_chroma(
  x: jax.Array, factor: int = 2, *, method: Literal['nearest', 'linear'] = 'nearest'
) -> jax.Array:
  """Enlarges chroma to the luma grid: a right inverse of `subsample_chroma` by 'nearest'.

  Args:
    x: [..., h, w, c].
    factor: enlargement per axis.
    method: 'nearest' repeats pixels (libjpeg without fancy upsampling), 'linear' interpolates
      between pixel centres and continues the border (libjpeg's fancy upsampling at 2).

  Returns:
    [..., h*factor, w*factor, c]; crop it to an odd luma grid.

  Raises:
    ValueError: fewer than 3 axes or an unknown method.

  Example:
    >>> upsample_chroma(jnp.array([[[0.0], [8.0]]]), method='linear')[0, :, 0].tolist()
    [0.0, 2.0, 6.0, 8.0]
  """
  if x.ndim < 3:
    raise ValueError(f'upsample_chroma needs [..., h, w, c], got x: {list(x.shape)}.')
  if method not in ('nearest', 'linear'):
    raise ValueError(f"method={method!r} does not exist: use 'nearest' or 'linear'.")
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  if method == 'nearest':
    x = jnp.repeat(jnp.repeat(x, factor, axis=-3), factor, axis=-2)
  else:
    *lead, h, w, c = x.shape
    shape = (*lead, h * factor, w * factor, c)
    x = jax.image.resize(x, shape, 'linear')
  return x.astype(dtype)


@functools.partial(jax.jit, inline=True)
def chroma_filter(x: jax.Array) -> jax.Array:
  """The separable filter [1, 6, 1]/8 with the border repeated.

  What enlarging twofold (bilinear) and 4:2:0 subsampling together do to chroma: the codec-free
  form of reading Cb and Cr at luma resolution from a twice enlarged JPEG.

  Args:
    x: [..., h, w, c]; floating dtypes are kept, integers become float32.

  Returns:
    The filtered image, same shape.

  Raises:
    ValueError: fewer than 3 axes or an empty image.

  Example:
    >>> chroma_filter(jnp.zeros((3, 3, 1)).at[1, 1].set(64.0))[..., 0].tolist()
    [[1.0, 6.0, 1.0], [6.0, 36.0, 6.0], [1.0, 6.0, 1.0]]
  """
  if x.ndim < 3 or 0 in x.shape[-3:-1]:
    raise ValueError(f'chroma_filter needs [..., h, w, c] with pixels, got x: {list(x.shape)}.')
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  for axis in (x.ndim - 3, x.ndim - 2):
    size = x.shape[axis]
    padded = jnp.pad(x, [(int(a == axis),) * 2 for a in range(x.ndim)], mode='edge')
    before, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in (0, 2))
    x = (before + after) / 8 + x * 0.75
  return x.astype(dtype)


@functools.partial(jax.jit, static_argnames=('size', 'chroma', 'rounding'), inline=True)
def rgb_to_coefficients(
  rgb: jax.Array,
  *,
  size: int = 8,
  chroma: Literal['filtered', 'full'] = 'filtered',
  rounding: bool = True,
) -> jax.Array:
  """RGB to the block-DCT coefficients a JPEG of quality 100 would hold, without a codec.

  Args:
    rgb: [..., h, w, 3] on the scale 0..255, h and w multiples of `size` (see `pad_to`).
    size: side of a block in pixels.
    chroma: 'filtered' is the published pipeline: Y from the image, Cb and Cr from a 4:2:0 file of
      the twice enlarged image, which comes to `chroma_filter`. 'full' is a 4:4:4 file.
    rounding: to integers, samples before (within 0..255) and coefficients after the transform,
      as a file does.

  Returns:
    float32 (float64 for float64 input) [..., h/size, w/size, 3*size*size]; components Y, Cb, Cr,
    channel size*size*component + size*u + v, within about +-128*size.

  Raises:
    ValueError: h or w not a multiple of `size`, the last axis is not 3, unknown `chroma`.

  Example:
    >>> rgb_to_coefficients(jnp.full((8, 16, 3), 200, jnp.uint8))[..., ::64].tolist()
    [[[576.0, 0.0, 0.0], [576.0, 0.0, 0.0]]]

  References:
    Xu et al., "Learning in the Frequency Domain", CVPR 2020, section 3.
  """
  if chroma not in ('filtered', 'full'):
    raise ValueError(f"chroma={chroma!r} does not exist: use 'filtered' or 'full'.")
  x = rgb_to_ycbcr(rgb.astype(accumulator(rgb.dtype)))
  # Saturated red and blue have chroma 255.5: a byte holds 255.
  samples = jnp.clip(jnp.round(x), 0, 255) if rounding else x
  if chroma == 'filtered':
    # In the published pipeline chroma is rounded at twice the resolution, where it averages out.
    samples = jnp.concatenate([samples[..., :1], chroma_filter(x[..., 1:])], axis=-1)
  coef = block_dct(samples - 128, size)
  return jnp.round(coef) if rounding else coef


@functools.partial(jax.jit, static_argnames='size', inline=True)
def coefficients_to_rgb(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """The RGB image of YCbCr block-DCT coefficients: inverse of `rgb_to_coefficients` ('full').

  Args:
    coef: [..., bh, bw, 3*size*size], any real dtype, integers as a file stores them included
      (dequantised).
    size: side of a block in pixels.

  Returns:
    float32 (float64 for float64 input) [..., bh*size, bw*size, 3]; neither rounded nor clipped:
    `jnp.clip(rgb.round(), 0, 255)` gives pixels.

  Raises:
    ValueError: channels are not 3*size*size.

  Example:
    >>> rgb = jnp.full((8, 8, 3), 10.0)
    >>> bool(jnp.allclose(coefficients_to_rgb(rgb_to_coefficients(rgb)), rgb, atol=1e-3))
    True
  """
  x = block_idct(coef.astype(accumulator(coef.dtype)), size)
  return ycbcr_to_rgb(x + 128)


def _colour(name: str, x: jax.Array, matrix: np.ndarray, *, before, after) -> jax.Array:
  """Adds `before` to chroma, multiplies by the matrix, adds `after` to chroma."""
  if x.ndim < 1 or x.shape[-1] != 3:
    raise ValueError(f'{name} needs 3 channels last, got x: {list(x.shape)}.')
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  row = (1,) * (x.ndim - 1) + (3,)
  chroma = jnp.asarray([0.0, 1.0, 1.0], x.dtype).reshape(row)
  x = x + before * chroma
  # Three scaled copies: a product with a 3 x 3 matrix is six times slower on CPUs.
  columns = jnp.asarray(matrix.T, x.dtype)
  y = sum(x[..., i : i + 1] * columns[i].reshape(row) for i in range(3))
  return (y + after * chroma).astype(dtype)
