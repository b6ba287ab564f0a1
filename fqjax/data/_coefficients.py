"""Block-DCT coefficients on the host, in NumPy: what `prepare` stores.

The same numbers as `fqjax.ops.rgb_to_coefficients`, without a device and for the wanted channels
only.
"""

from collections.abc import Sequence
import functools
from typing import Literal

import numpy as np

Chroma = Literal['filtered', 'full']

# JFIF (ITU-T T.871), without the 128 that the transform would take away again.
_YCBCR = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.5],
    [0.5, -0.587 / 1.402, -0.114 / 1.402],
  ]
)


@functools.lru_cache(maxsize=8)
def _transform(size: int, frequencies: tuple[int, ...]) -> np.ndarray:
  """Rows of the two-dimensional DCT-II matrix, float32 [size * size, len(frequencies)]."""
  k, i = np.arange(size)[:, None], np.arange(size)
  basis = np.sqrt(2 / size) * np.cos(np.pi * (2 * i + 1) * k / (2 * size))
  basis[0] = np.sqrt(1 / size)
  # Rounded to float32 the frequencies 0 and 4 of size 8 get exactly 1/8, so that halves (every
  # eighth DC is one) round the same way everywhere.
  return np.kron(basis, basis)[list(frequencies)].T.astype(np.float32)


def _filter_chroma(plane: np.ndarray) -> np.ndarray:
  """[1, 6, 1] / 8 along both axes with edge replication."""
  for axis in (0, 1):
    pad = [(1, 1) if a == axis else (0, 0) for a in (0, 1)]
    p = np.pad(plane, pad, mode='edge')
    n = plane.shape[axis]
    before, here, after = (np.take(p, np.arange(n) + d, axis) for d in (0, 1, 2))
    plane = (before + 6 * here + after) * np.float32(1 / 8)
  return plane


def rgb_to_coefficients(
  image: np.ndarray,
  *,
  size: int = 8,
  channels: Sequence[int] | None = None,
  chroma: Chroma = 'filtered',
  rounding: bool = True,
) -> np.ndarray:
  """Turns RGB pixels into block-DCT coefficients.

  Args:
    image: uint8 [height, width, 3]; both sides divisible by `size`.
    size: side of a block.
    channels: indices `size * size * component + size * u + v` to keep; None keeps all.
    chroma: 'filtered' (as if stored 4:2:0) or 'full'.
    rounding: round luma samples and all coefficients to integers, as a JPEG file does.

  Returns:
    float32 [height / size, width / size, channels]; integers if `rounding`.

  Raises:
    ValueError: sides not divisible by `size`.

  Source: Xu et al. 2020, section 3.1, without the detour through a JPEG encoder.

  Example:
    >>> grey = np.full((8, 8, 3), 228, np.uint8)
    >>> rgb_to_coefficients(grey, channels=(0, 1, 64)).ravel()
    array([800.,   0.,   0.], dtype=float32)
  """
  height, width, _ = image.shape
  if height % size or width % size:
    raise ValueError(
      f'blocks of {size} need height and width divisible by {size}, got {list(image.shape)}: '
      f'crop first, for example to {height // size * size} x {width // size * size}.'
    )
  area = size * size
  chosen = np.arange(3 * area) if channels is None else np.asarray(channels)
  if len(chosen) and not 0 <= chosen.min() <= chosen.max() < 3 * area:
    raise ValueError(f'channels must lie in 0..{3 * area - 1}, got {chosen.min()}..{chosen.max()}.')
  ycbcr = image.astype(np.float32) @ _YCBCR.T.astype(np.float32)
  out = np.empty((height // size, width // size, len(chosen)), np.float32)
  for component in range(3):
    at = np.flatnonzero(chosen // area == component)
    if not len(at):
      continue
    plane = ycbcr[..., component]
    if component and chroma == 'filtered':
      # The enlarging codec sees chroma after the filter: its samples are not rounded before it.
      plane = _filter_chroma(plane)
    elif rounding:
      plane = np.rint(plane)
    if component == 0:
      plane = plane - 128
    blocks = plane.reshape(height // size, size, width // size, size).swapaxes(1, 2)
    frequencies = tuple((chosen[at] % area).tolist())
    out[..., at] = blocks.reshape(*out.shape[:2], area) @ _transform(size, frequencies)
  return np.rint(out, out) if rounding else out
