"""Convolutions and pools as sums over the taps of their windows, in the type of their input."""

from collections.abc import Callable, Iterator, Sequence
import itertools

import numpy as np

# Elements of a depthwise product at a time: what stays in the cache.
_BLOCK = 1 << 18
_FULL = slice(None)


def conv(
  x: np.ndarray,
  w: np.ndarray,
  strides: Sequence[int],
  padding: Sequence[Sequence[int]],
  dilation: Sequence[int],
  input_dilation: Sequence[int],
  groups: int,
  layout: Sequence[str],
) -> np.ndarray:
  """Convolution as the operation `conv` says; the channels of the result are its last axis.

  Sums run in the type of `x` and `w`, which the caller chooses wide enough.

  Args:
    x: input in the layout named first.
    w: kernel in the layout named second.
    strides: per spatial axis, as all that follow.
    padding: zeros before and after; negative ones crop.
    dilation: between taps.
    input_dilation: between elements of the input.
    groups: of channels.
    layout: letters of the axes of `x`, `w` and the result.

  Returns:
    [n, spatial..., o]; `to_layout` orders the axes.
  """
  spatial = [letter for letter in layout[1] if letter not in 'OI']
  x = x.transpose([layout[0].index(letter) for letter in ('N', *spatial, 'C')])
  w = w.transpose([layout[1].index(letter) for letter in (*spatial, 'I', 'O')])
  x = _spread(x, padding, input_dilation)
  *taps, inputs, outputs = w.shape
  sizes = [
    max(0, (size - (tap - 1) * gap - 1) // stride + 1)
    for size, tap, gap, stride in zip(x.shape[1:-1], taps, dilation, strides, strict=True)
  ]
  out = np.zeros((len(x), *sizes, outputs), x.dtype)
  if inputs == 1 and groups > 1:
    rows = max(1, _BLOCK // max(1, out[:1].size))
    for start in range(0, len(x), rows):
      block = out[start : start + rows]
      for tap, part in _taps(x[start : start + rows], taps, strides, dilation, sizes):
        # Outputs of one group stand side by side.
        block += part.repeat(outputs // groups, -1) * w[tap][0]
    return out
  for tap, part in _taps(x, taps, strides, dilation, sizes):
    rows = part.reshape(-1, groups, inputs).transpose(1, 0, 2)
    kernel = w[tap].reshape(inputs, groups, -1).transpose(1, 0, 2)
    out += (rows @ kernel).transpose(1, 0, 2).reshape(out.shape)
  return out


def to_layout(x: np.ndarray, layout: str) -> np.ndarray:
  """Puts [n, spatial..., c] into an order of axes, 'NCHW' say; the spatial ones are in 'DHW'."""
  spatial = [letter for letter in 'DHW' if letter in layout]
  return x.transpose([('N', *spatial, 'C').index(letter) for letter in layout])


def pool(
  x: np.ndarray,
  join: Callable,
  initial: float,
  window: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[Sequence[int]],
  dilation: Sequence[int],
) -> np.ndarray:
  """Joins the elements of windows over all axes, beginning with `initial`.

  Args:
    x: array of any rank.
    join: a ufunc of two arrays.
    initial: result of an empty window, and what padding holds.
    window: taps per axis, as all that follow.
    strides: between positions.
    padding: before and after.
    dilation: between taps.

  Returns:
    Array of the type of `x`.
  """
  x = np.pad(x, [(max(0, a), max(0, b)) for a, b in padding], constant_values=initial)
  x = x[tuple(_crop(size, pair) for size, pair in zip(x.shape, padding, strict=True))]
  sizes = [
    max(0, (size - (tap - 1) * gap - 1) // stride + 1)
    for size, tap, gap, stride in zip(x.shape, window, dilation, strides, strict=True)
  ]
  out = np.full(sizes, initial, x.dtype)
  for where in itertools.product(*map(range, window)):
    steps = zip(where, dilation, strides, sizes, strict=True)
    part = x[tuple(slice(i * g, i * g + (n - 1) * s + 1 if n else 0, s) for i, g, s, n in steps)]
    out = join(out, part)
  return out


def _taps(
  x: np.ndarray,
  taps: Sequence[int],
  strides: Sequence[int],
  dilation: Sequence[int],
  sizes: Sequence[int],
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Every tap with the elements of [n, spatial..., c] it meets."""
  for tap in itertools.product(*map(range, taps)):
    steps = zip(tap, dilation, strides, sizes, strict=True)
    cut = [slice(i * g, i * g + (n - 1) * s + 1 if n else 0, s) for i, g, s, n in steps]
    yield tap, x[(_FULL, *cut)]


def _spread(x: np.ndarray, padding: Sequence[Sequence[int]], gaps: Sequence[int]) -> np.ndarray:
  """Zeros between and around the elements of [n, spatial..., c]."""
  if set(gaps) - {1}:
    sizes = [
      (size - 1) * gap + 1 if size else 0 for size, gap in zip(x.shape[1:-1], gaps, strict=True)
    ]
    wide = np.zeros((len(x), *sizes, x.shape[-1]), x.dtype)
    wide[(_FULL, *(slice(None, None, gap) for gap in gaps))] = x
    x = wide
  if any(low > 0 or high > 0 for low, high in padding):
    x = np.pad(x, [(0, 0), *((max(0, a), max(0, b)) for a, b in padding), (0, 0)])
  crops = [_crop(size, pair) for size, pair in zip(x.shape[1:-1], padding, strict=True)]
  return x[(_FULL, *crops)]


def _crop(size: int, padding: Sequence[int]) -> slice:
  """What negative padding leaves of an axis."""
  return slice(max(0, -padding[0]), size - max(0, -padding[1]))
