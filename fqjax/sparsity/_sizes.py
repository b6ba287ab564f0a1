"""What a pruned model takes as stored: every array, index, tables and padding included."""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import codecs
from fqjax.sparsity import _tree
from fqjax.sparsity._layout import kernel_shape
from fqjax.sparsity._plan import Plan, project
from fqjax.sparsity.structures._base import VIEWS, codec_of, raw_bits


class Sizes(NamedTuple):
  """What every array of a model takes; `str(sizes)` is a table.

  Attributes:
    weights: path -> number of weights.
    kept: path -> number of weights that are not zero; of an array that is not pruned all.
    bits: path -> `Bits(values, index, tables, padding)` as stored.
  """

  weights: dict[str, int]
  kept: dict[str, int]
  bits: dict[str, codecs.Bits]

  @property
  def bytes(self) -> int:
    """Bytes of all arrays as stored."""
    return sum(cost.total for cost in self.bits.values()) // 8

  @property
  def compression(self) -> float:
    """Dense weights over kept weights."""
    return sum(self.weights.values()) / sum(self.kept.values())

  @property
  def compression_bytes(self) -> float:
    """Float32 bytes of the dense weights over all stored bytes."""
    return 4 * sum(self.weights.values()) / self.bytes

  @property
  def bits_per_weight(self) -> float:
    """Stored bits over dense weights."""
    return 8 * self.bytes / sum(self.weights.values())

  def only(self, pattern: str) -> 'Sizes':
    """The arrays whose whole path a regex matches, e.g. '.*/kernel'.

    Args:
      pattern: the regex.

    Raises:
      ValueError: when it matches nothing.
    """
    paths = [path for path in self.weights if re.fullmatch(pattern, path)]
    if not paths:
      raise ValueError(
        f'{pattern!r} selects no array. Closest: {_tree.nearest(pattern, self.weights)}.'
      )
    return Sizes._make({path: part[path] for path in paths} for part in self)

  def __str__(self) -> str:
    rows = [('layer', 'weights', 'kept', 'bytes', 'bits/weight')]
    for path, n in self.weights.items():
      total = self.bits[path].total
      rows.append((path, f'{n:,}', f'{self.kept[path]:,}', f'{total // 8:,}', f'{total / n:.3g}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      '  '.join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in rows
    ]
    lines.append(
      f'{self.compression:.4g}x fewer weights, {self.compression_bytes:.4g}x fewer bytes than'
      f' float32: {self.bytes:,}'
    )
    return '\n'.join(lines)


def sizes(plan: Plan, params, value_bits: int | None = None) -> Sizes:
  """The honest size of a whole pruned model.

  Args:
    plan: from `make_plan` or `allocate`.
    params: the tree the plan was made for; projected first, which leaves pruned weights as they are.
    value_bits: bits per kept weight of pruned arrays; those of the dtype by default.

  Returns:
    `Sizes` of all float arrays that hold anything, dense ones included.

  Raises:
    ValueError: when `params` are not of the plan's model.

  Example:
    >>> from fqjax.sparsity import NM, make_plan
    >>> params = {'fc': {'kernel': jnp.arange(4096.0).reshape(64, 64), 'bias': jnp.ones(64)}}
    >>> print(sizes(make_plan(params, [('.*/kernel', NM(1, 4))]), params))
    layer      weights   kept  bytes  bits/weight
    fc/bias         64     64    270         33.8
    fc/kernel    4,096  1,024  4,373         8.54
    3.824x fewer weights, 3.584x fewer bytes than float32: 4,643
  """
  pruned = _tree.flatten(project(plan, params)[0])[0]
  found = Sizes({}, {}, {})
  for entry in plan.entries:
    w = pruned[entry.path]
    if not _tree.is_weight(w) or not w.size:
      continue
    host = np.asarray(w)
    if entry.structure is None:
      kept, cost = host.size, codecs.dense.bits(codecs.dense.encode(raw_bits(host)))
    else:
      kept = int(np.count_nonzero(host))
      cost = entry.structure.bits(host, entry.layout, value_bits)
    found.weights[entry.path] = host.size
    found.kept[entry.path] = kept
    found.bits[entry.path] = cost
  return found


def bits(plan: Plan, params, value_bits: int | None = None) -> dict[str, codecs.Bits]:
  """What every array of the model costs as stored: the `bits` of `sizes`.

  Args:
    plan: as in `sizes`.
    params: as in `sizes`.
    value_bits: as in `sizes`.

  Returns:
    path -> `Bits(values, index, tables, padding)` for every array of floats, dense ones too.

  Raises:
    ValueError: as `sizes`.

  Example:
    >>> from fqjax.sparsity import NM, make_plan
    >>> params = {'fc': {'kernel': jnp.arange(64.0).reshape(8, 8), 'bias': jnp.ones(8)}}
    >>> plan = make_plan(params, [('.*/kernel', NM(1, 4))])
    >>> cost = bits(plan, params)
    >>> cost['fc/kernel'].values, cost['fc/kernel'].index, cost['fc/bias'].values
    (512, 32, 256)
  """
  return sizes(plan, params, value_bits).bits


class Stored(NamedTuple):
  """An array in one of the formats of `fqjax.runtime.codecs`.

  Attributes:
    format: its name there, a key of `CODECS`.
    view: the view that is stored: 'rows' [O, M*I], 'columns' [M*I, O] or 'kernels' [O, I, M].
    encoded: the format's `Encoded`.
  """

  format: str
  view: str
  encoded: Any

  def bits(self, value_bits: int | None = None, zero_bits: int | None = None) -> codecs.Bits:
    """What the form costs; arguments as in `cheapest`.

    Args:
      value_bits: bits per value.
      zero_bits: bits per value where zeros (fillers, dead weights of a live block) are stored too.
    """
    if zero_bits is not None and not np.all(self.encoded.values):
      value_bits = zero_bits
    return codec_of(self.encoded).bits(self.encoded, value_bits)

  def decode(self, layout: str, shape: tuple[int, ...], dtype=None) -> np.ndarray:
    """The array again, bit for bit.

    Args:
      layout: as it was stored with.
      shape: of the array.
      dtype: of the array where its raw bits are stored (bfloat16).
    """
    array = codec_of(self.encoded).decode(self.encoded)
    return VIEWS[self.view][1](array if dtype is None else array.view(dtype), layout, shape)


def cheapest(w, layout: str, value_bits: int | None = None, zero_bits: int | None = None) -> Stored:
  """The smallest stored form of an array, found by looking at its zeros alone.

  For networks pruned elsewhere, of which no plan is known. Tried are dense, bitmask, relative, Rice
  and CSR indices, whole slices, blocks of 1x4 and 4x4, N:4 along inputs and outputs, banks of 16, blocks of
  DARB, kernel patterns with and without missing kernels, and taps punched out of 8x4 kernels.

  Args:
    w: array of any real dtype, on the host.
    layout: one capital per axis, e.g. 'HWIO'.
    value_bits: bits per value to count; those of the dtype by default.
    zero_bits: bits per value of a form that stores zeros among its values, which then need a code
      of their own; `value_bits` by default.

  Returns:
    The `Stored` form of least bits; of equal ones the plainest.

  Raises:
    ValueError: when the layout does not fit, or the dtype is not stored.

  Example:
    >>> w = np.zeros((64, 64), np.float32)
    >>> w[::4] = 1.0  # one of every four inputs
    >>> stored = cheapest(w, 'IO')
    >>> stored.format, bool((stored.decode('IO', w.shape) == w).all())
    ('slices', True)
  """
  w = raw_bits(np.asarray(w))
  o, i, m = kernel_shape(w.shape, layout)
  arrays = {name: np.ascontiguousarray(view(w, layout)) for name, (view, _) in VIEWS.items()}
  best = Stored('dense', 'rows', codecs.dense.encode(arrays['rows']))
  if np.all(w):
    return best  # nothing to leave away
  least = best.bits(value_bits, zero_bits).total
  for name, view, settings in _tries(arrays, o, i, m):
    codec = codecs.CODECS[name]
    try:
      encoded = codec.encode(arrays[view], **settings)
    except ValueError:
      continue  # not of this form
    stored = Stored(name, view, encoded)
    total = stored.bits(value_bits, zero_bits).total
    if total < least:
      best, least = stored, total
  return best


def _tries(arrays, o: int, i: int, m: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Formats, views and settings to try, the plainest first."""
  yield from ((name, 'rows', {}) for name in ('bitmask', 'csr', 'relative', 'rice'))
  yield from (('slices', view, {'axes': (0, 1)}) for view in ('rows', 'kernels'))
  for rows, columns in ((1, 4), (4, 4)):
    if rows <= o and columns <= m * i:
      yield 'blocks', 'rows', {'rows': rows, 'columns': columns}
  for view in ('rows', 'columns'):
    array = arrays[view]
    if array.shape[1] % 4 == 0:
      most = int((array != 0).reshape(-1, 4).sum(1).max(initial=0))
      yield 'nm', view, {'n': max(1, most), 'm': 4}
  yield 'bank', 'rows', {'size': 16}
  yield 'darb', 'rows', {}
  if 1 < m <= 64:
    yield from ((name, 'kernels', {}) for name in ('pcnn', 'patterns'))
    if o >= 8 and i >= 4:
      yield 'punched', 'kernels', {}
