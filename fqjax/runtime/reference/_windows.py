"""Convolutions and pools as sums over the taps of their windows, in the type of their input."""

from collections.abc import Callable, Iterator, Sequence
import itertools

import numpy as np

# Elements of a depthwise product at a time: what stays in the cache.
_BLOCK = 1 << 18
# Elements of a matrix of windows.
_TILE = 1 << 19
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
  if not out.size or not w.size:
    return out
  if inputs == 1 and groups > 1:
    _depthwise(x, w, strides, dilation, out)
  else:
    _by_matrices(x, w, strides, dilation, groups, out)
  return out


def _depthwise(x, w, strides, dilation, out) -> None:
  """One input per output: products of elements, tap by tap."""
  *taps, _, outputs = w.shape
  repeats = outputs // x.shape[-1]
  block = max(1, _BLOCK // max(1, out[:1].size))
  product = np.empty((block, *out.shape[1:]), x.dtype)
  for start in range(0, len(x), block):
    rows = out[start : start + block]
    for tap, part in _taps(x[start : start + block], taps, strides, dilation, out.shape[1:-1]):
      # Outputs of one input stand side by side.
      part = part.repeat(repeats, -1) if repeats > 1 else part
      rows += np.multiply(part, w[tap][0], out=product[: len(rows)])


def _by_matrices(x, w, strides, dilation, groups, out) -> None:
  """Part of the result at a time: the windows it needs as a matrix, times the kernel.

  An image falls into the same parts wherever it stands in a batch.
  """
  *taps, inputs, outputs = w.shape
  depth = int(np.prod(taps)) * inputs
  # [groups, taps * inputs, outputs of the group]
  kernel = w.reshape(depth, groups, -1).transpose(1, 0, 2)
  if all(n == 1 for n in (*taps, *strides)) and groups == 1:
    for image, result in zip(x, out, strict=True):
      np.matmul(image.reshape(-1, inputs), kernel[0], out=result.reshape(-1, outputs))
    return
  windows = _windows(x, taps, strides, dilation, out.shape[1:-1])
  # Parts are slices of the longest axis.
  longest = 1 + int(np.argmax(out.shape[1:-1]))
  windows, results = np.moveaxis(windows, longest, 1), np.moveaxis(out, longest, 1)
  length, *rest = results.shape[1:-1]
  across = int(np.prod(rest))
  tile = min(length, max(1, _TILE // (across * depth * groups)))
  matrix = np.empty((groups, tile * across, depth), x.dtype)
  for image, result in zip(windows, results, strict=True):
    for start in range(0, length, tile):
      part = image[start : start + tile]  # [rows, ..., taps..., c]
      rows = len(part) * across
      split = part.reshape(*part.shape[:-1], groups, inputs) if groups > 1 else part[..., None, :]
      ordered = np.moveaxis(split, -2, 0)
      np.copyto(matrix[:, :rows].reshape(ordered.shape), ordered)
      target = result[start : start + tile]
      if groups == 1 and target.flags.c_contiguous:
        np.matmul(matrix[0, :rows], kernel[0], out=target.reshape(rows, -1))
      else:
        product = (matrix[:, :rows] @ kernel).transpose(1, 0, 2)
        target[:] = product.reshape(target.shape)


def _windows(x, taps, strides, dilation, sizes) -> np.ndarray:
  """A view [n, positions..., taps..., c] of every window of [n, spatial..., c]."""
  steps = x.strides[1:-1]
  moves = [step * stride for step, stride in zip(steps, strides, strict=True)]
  gaps = [step * gap for step, gap in zip(steps, dilation, strict=True)]
  return np.lib.stride_tricks.as_strided(
    x,
    (len(x), *sizes, *taps, x.shape[-1]),
    (x.strides[0], *moves, *gaps, x.strides[-1]),
    writeable=False,
  )


def to_layout(x: np.ndarray, layout: Sequence[str]) -> np.ndarray:
  """Puts the result of `conv` into the order of axes of `layout[2]`."""
  order = ('N', *(letter for letter in layout[1] if letter not in 'OI'), 'C')
  return x.transpose([order.index(letter) for letter in layout[2]])


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
    join(out, part, out=out)
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
  return slice(max(0, -padding[0]), max(0, size - max(0, -padding[1])))
