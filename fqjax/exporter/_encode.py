"""How each array is stored, found by looking at its values: which are zero, and how many differ."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fqjax.runtime._stored import Stored
from fqjax.runtime.codecs._container import Bits
from fqjax.sparsity import cheapest
from fqjax.sparsity._layout import axes
from fqjax.sparsity.structures._base import VIEWS, codec_of

# Arrays below this are stored as they are: a header of a format takes more than it saves.
_SMALL = 32
# Levels a table may have.
_MOST_LEVELS = 256
_MOST_LEVELS_OF_CHANNEL = 16
# Elements that are looked at before all are.
_SAMPLE = 4096
# What the header says of a form, in bits: the difference between forms, roughly.
_ENTRY = 8 * 24
_VIEW_ORDER = {'rows': (0, 2, 1), 'columns': (2, 1, 0), 'kernels': (0, 1, 2)}


class Values(NamedTuple):
  """An array as few distinct values.

  Attributes:
    codes: unsigned indices into `levels`, or int8 steps of `scales`; of the array's shape.
    bits: per code.
    levels: [K], or [n, K] along `axis`, of the array's type; the commonest value first.
    scales: float32 [n] along `axis`.
    axis: of the output channels.
  """

  codes: np.ndarray
  bits: int
  levels: np.ndarray | None = None
  scales: np.ndarray | None = None
  axis: int | None = None

  @property
  def table_bits(self) -> int:
    """Of the table."""
    return 8 * sum(t.nbytes for t in (self.levels, self.scales) if t is not None)


def encode(name: str, array: np.ndarray, layout: str = '') -> Stored:
  """The smallest form that gives the array back bit for bit.

  Args:
    name: of the tensor.
    array: any type of `oplist.DTYPES`.
    layout: one capital per axis, e.g. 'HWIO'; '' where nothing is known of the axes.

  Returns:
    What to write; see `fqjax.runtime._stored` for the forms.

  Example:
    >>> signs = np.where(np.arange(4096).reshape(64, 64) % 3, np.float32(0.5), np.float32(-0.5))
    >>> stored = encode('kernel', signs, 'IO')
    >>> stored.form, stored.levels, stored.bytes < 600
    ('dense', array([ 0.5, -0.5], dtype=float32), True)
  """
  array = np.asarray(array, array.dtype.newbyteorder('='))
  bits = array.view(np.uint16) if str(array.dtype) == 'bfloat16' else array
  kept = int(np.count_nonzero(array))
  raw = np.ascontiguousarray(bits)
  little = raw.astype(raw.dtype.newbyteorder('<'), copy=False)
  best = Stored(
    name, array.shape, str(array.dtype), 'raw', little.tobytes(), Bits(8 * raw.nbytes, 0, 0), kept
  )
  if array.size < _SMALL or bits.dtype == bool:
    return best
  least = best.bits.total
  for found in (None, few_levels(bits, layout)):
    stored = _smallest(name, array, bits, layout, found, kept)
    total = 8 * stored.bytes + _ENTRY
    if total < least:
      best, least = stored, total
  return best


def has_levels(array: np.ndarray, layout: str) -> bool:
  """Whether an array is stored by a table of its values: batch norm folded into it would hide that.

  Args:
    array: float32.
    layout: one capital per axis.
  """
  if array.size < _SMALL or array.dtype != np.float32:
    return False
  found = few_levels(array, layout)
  return found is not None and found.bits <= 8


def few_levels(array: np.ndarray, layout: str) -> Values | None:
  """The array as steps of a scale per output channel, or as few levels; None if it is neither.

  Args:
    array: of any real type.
    layout: one capital per axis; '' where nothing is known.

  Example:
    >>> w = np.float32([[-2.0, 0.3], [0.0, 0.1], [1.0, 0.2]])
    >>> few_levels(np.repeat(w, 8, 0), 'IO').bits
    3
  """
  found = _levels(array)
  if found is not None and found.bits <= 4:
    return found
  outputs = axes(layout, array.ndim)[0] if layout else ()
  if not layout and array.ndim > 1 and array.shape[0] == 1:
    outputs = (0,)  # a bias: one scale for all of it
  if len(outputs) == 1 and array.dtype == np.float32:
    [axis] = outputs
    by_channel = _steps(array, axis) or _levels_of_channels(array, axis)
    cost = lambda values: values.bits * array.size + values.table_bits
    if by_channel is not None and (found is None or cost(by_channel) < cost(found)):
      return by_channel
  return found


def _levels(array: np.ndarray) -> Values | None:
  words = _words(array)
  sample = words.reshape(-1)[:: max(1, array.size // _SAMPLE)]
  if np.unique(sample).size > _MOST_LEVELS:
    return None
  values, codes, counts = np.unique(words, return_inverse=True, return_counts=True)
  if values.size > _MOST_LEVELS or 2 * values.size > np.count_nonzero(words):
    return None
  # The commonest first, which is what sparse forms leave out; zeros win over what is as common.
  zero = values == 0
  order = np.lexsort((values, ~zero, -counts))
  if zero.any():
    order = np.concatenate([np.flatnonzero(zero), order[~zero[order]]])
  rank = np.empty(values.size, np.uint8)
  rank[order] = np.arange(values.size)
  levels = values[order].view(array.dtype)
  bits = max(1, (values.size - 1).bit_length())
  return Values(rank[codes].reshape(array.shape), bits, levels=levels)


def _steps(array: np.ndarray, axis: int) -> Values | None:
  """Whole steps of one scale per channel, as uniform quantization leaves them."""
  rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
  if not np.isfinite(rows).all():
    return None
  # Channels that are no such thing show it in a few of their elements.
  first = np.argsort(-np.abs(rows[:8]).max(1))[:1]
  if first.size and _scale(rows[first[0]][:256], np.abs(rows[first[0]]).max()) is None:
    return None
  scales = np.ones(len(rows), np.float32)
  codes = np.zeros(rows.shape, np.int8)
  for i, row in enumerate(rows):
    if not row.any():
      continue
    scale = _scale(row, np.abs(row).max())
    if scale is None:
      return None
    scales[i] = scale
    codes[i] = np.rint(row / scale)
  if np.any(np.signbit(rows) & (rows == 0)):
    return None  # a negative zero is no step
  if np.count_nonzero(codes) < 4 * len(rows):
    return None  # any weight is one step of itself
  highest, lowest = int(codes.max(initial=0)), int(codes.min(initial=0))
  bits = 1 + max(highest, -1 - lowest).bit_length()
  shape = [array.shape[axis], *(n for i, n in enumerate(array.shape) if i != axis)]
  codes = np.ascontiguousarray(np.moveaxis(codes.reshape(shape), 0, axis))
  return Values(codes, bits, scales=scales, axis=axis)


def _scale(row: np.ndarray, largest: np.floating) -> np.float32 | None:
  """The float32 of which all of the row are whole multiples, at most 127 times."""
  whole = np.float32(largest)
  near = row[:64]
  for steps in range(1, 128):
    middle = whole / np.float32(steps)
    for scale in (middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(np.inf))):
      # Most are refused by their first elements.
      if scale > 0 and all(
        np.array_equal(np.rint(part / scale) * scale, part) for part in (near, row)
      ):
        return scale
  return None


def _levels_of_channels(array: np.ndarray, axis: int) -> Values | None:
  rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
  words = _words(np.ascontiguousarray(rows))
  if np.unique(words[0][:_SAMPLE]).size > _MOST_LEVELS_OF_CHANNEL or rows.shape[1] < _SMALL:
    return None
  found = [np.unique(row, return_inverse=True) for row in words]
  most = max(values.size for values, _ in found)
  # Few weights are few values too, which says nothing of levels.
  repeated = 4 * sum(values.size for values, _ in found) <= np.count_nonzero(words)
  if most > _MOST_LEVELS_OF_CHANNEL or not repeated:
    return None
  levels = np.zeros((len(rows), most), words.dtype)
  codes = np.zeros(rows.shape, np.uint8)
  for i, (values, inverse) in enumerate(found):
    order = np.argsort(values != 0, kind='stable')  # a zero first
    rank = np.empty(values.size, np.uint8)
    rank[order] = np.arange(values.size)
    levels[i, : values.size] = values[order]
    codes[i] = rank[inverse.reshape(-1)]
  shape = [array.shape[axis], *(n for i, n in enumerate(array.shape) if i != axis)]
  codes = np.ascontiguousarray(np.moveaxis(codes.reshape(shape), 0, axis))
  bits = max(1, (most - 1).bit_length())
  return Values(codes, bits, levels=levels.view(array.dtype), axis=axis)


def _words(array: np.ndarray) -> np.ndarray:
  """Bits as unsigned integers: -0.0 and every NaN are values of their own."""
  return np.ascontiguousarray(array).view(f'u{array.dtype.itemsize}')


def _smallest(
  name: str, array: np.ndarray, bits: np.ndarray, layout: str, found: Values | None, kept: int
) -> Stored:
  """The smallest form of the places, of values as they are or as codes."""
  upper = found is None and _is_upper(bits, array)
  if found is not None:
    codes, width = found.codes, found.bits
  elif upper:
    codes, width = (_words(bits) >> 16).astype(np.uint16), 16
  else:
    codes, width = bits, None
  shaped, letters, order = _as_kernel(codes, layout)
  signed = found is not None and found.scales is not None
  live = width
  if found is not None and not signed:
    # Without zeros among the stored codes, the codes are one lower.
    live = max(1, (int(codes.max(initial=0)) - 1).bit_length())
  stored = cheapest(shaped, letters, live, width)
  codec, encoded = codec_of(stored.encoded), stored.encoded
  shift = live != width and live is not None and bool(np.all(encoded.values))
  if shift:
    encoded = encoded._replace(values=encoded.values - encoded.values.dtype.type(1))
  taken = live if shift else width
  axes_of = order if order is not None else _order(stored.view, layout, array.ndim)
  return Stored(
    name,
    array.shape,
    str(array.dtype),
    stored.format,
    codec.to_bytes(encoded, taken),
    codec.bits(encoded, taken),
    kept,
    order=() if list(axes_of) == list(range(array.ndim)) else tuple(axes_of),
    shift=shift,
    upper=upper,
    levels=None if found is None else found.levels,
    scales=None if found is None else found.scales,
    axis=None if found is None else found.axis,
  )


def _is_upper(bits: np.ndarray, array: np.ndarray) -> bool:
  """Whether float32 values are bfloat16 ones."""
  return array.dtype == np.float32 and not np.any(_words(bits) & 0xFFFF)


def _as_kernel(codes: np.ndarray, layout: str) -> tuple[np.ndarray, str, Sequence[int] | None]:
  """An array that `cheapest` takes; one of unknown axes is a single row in its own order."""
  if layout:
    return codes, layout, None
  return codes.reshape(1, -1), 'OI', range(codes.ndim)


def _order(view: str, layout: str, rank: int) -> tuple[int, ...]:
  """Axes of a leaf in the order of a view; see `fqjax.sparsity.structures`."""
  assert view in VIEWS
  groups = axes(layout, rank)
  return sum((tuple(groups[i]) for i in _VIEW_ORDER[view]), ())
