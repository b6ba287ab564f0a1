"""XLA's gather as Gather or GatherND."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fqjax.exporter.onnx._axes import end
from fqjax.exporter.onnx._writer import Order, Writer
from fqjax.runtime import dims
from fqjax.runtime.graph import Node


class _Places(NamedTuple):
  """Corners of the parts: int64 [..., k], and where they lie inside (None: everywhere)."""

  corners: str
  inside: str | None


def gather(w: Writer, node: Node) -> None:
  """Parts of a tensor at places that are known when it runs.

  The places become indices along the axes they name, with one more axis for each along which a part
  is wider than one element. Then one node takes the elements; its axes are, in this order, those of
  the batch, those of the places, those of the parts, and the rest of the operand.
  """
  name, where = node.inputs
  attributes, shape = node.attributes, w.shape(name)
  sizes, index_map = attributes['sizes'], attributes['index_map']
  shared, along = attributes['operand_batch'], attributes['index_batch']
  x, found = w.read(name), _places(w, node)
  # Axes along which nothing is looked up: the front of them is taken, mostly all.
  fixed = [i for i in range(len(shape)) if i not in (*index_map, *shared)]
  cuts = [(i, 0, dims.split(sizes[i])[0]) for i in fixed if sizes[i] != shape[i]]
  if cuts:
    x = w.cut(x, *(list(column) for column in zip(*cuts, strict=True)))
  outer = len(w.shape(where)) - 1
  wide = [axis for axis in index_map if axis not in attributes['collapsed']]
  indices = _widened(w, found.corners, node, wide, outer)
  # The axes of the result, named: ('place', i) of the places, ('part', axis) of the operand.
  parts = [('part', axis) for axis in wide]
  rest = [('part', axis) for axis in fixed]
  if len(index_map) == 1 and not shared:
    [axis] = index_map
    flat = w.emit('Squeeze', indices, w.ints([outer + len(wide)]))
    y = w.emit('Gather', x, flat, axis=axis)
    front = [one for one in rest if one[1] < axis]
    names = front + [('place', i) for i in range(outer)] + parts + rest[len(front) :]
  else:
    order: Order = (*shared, *index_map, *fixed)
    if order != tuple(range(len(shape))):
      x = w.emit('Transpose', x, perm=list(order))
    others = [i for i in range(outer) if i not in along]
    total = outer + len(wide)
    moved = (*along, *others, *range(outer, total + 1))
    if moved != tuple(range(total + 1)):
      indices = w.emit('Transpose', indices, perm=list(moved))
    y = w.emit('GatherND', x, indices, batch_dims=len(shared))
    names = [('place', i) for i in (*along, *others)] + parts + rest
  if dropped := [i for i, (kind, axis) in enumerate(names)
                 if kind == 'part' and axis in attributes['collapsed']]:  # fmt: skip
    y = w.emit('Squeeze', y, w.ints(dropped))
    names = [one for i, one in enumerate(names) if i not in dropped]
  kept = [i for i in range(len(shape)) if i not in (*attributes['collapsed'], *shared)]
  target = dict(zip((('part', axis) for axis in kept), attributes['offset'], strict=True))
  free = [i for i in range(len(names)) if i not in attributes['offset']]
  target |= zip((('place', i) for i in range(outer)), free, strict=True)
  order = tuple(target[one] for one in names)
  if found.inside is not None:
    y = _filled(w, y, found.inside, order, free, w.dtype(name))
  w.bind(node.outputs[0], y, order)


def _places(w: Writer, node: Node) -> _Places:
  """The corners moved inside, and where that was needed if it matters."""
  name, where = node.inputs
  index_map, sizes = node.attributes['index_map'], node.attributes['sizes']
  # Axes that are taken whole have one place.
  whole = [w.shape(name)[axis] == sizes[axis] for axis in index_map]
  room = tuple(
    1 if one else w.shape(name)[axis] for one, axis in zip(whole, index_map, strict=True)
  )
  parts = [1 if one else sizes[axis] for one, axis in zip(whole, index_map, strict=True)]
  limits = [dims.split(a)[0] - b for a, b in zip(room, parts, strict=True)]
  open_batch = any(isinstance(dim, str) for dim in room)
  fills = node.attributes['mode'] == 'fill'
  known = w.array(where)
  if known is not None and not open_batch:
    numbers = known.astype(np.int64)
    hits = ((numbers >= 0) & (numbers <= limits)).all(-1)
    corners = w.constant(np.clip(numbers, 0, limits))
    return _Places(corners, None if not fills or hits.all() else w.constant(hits))
  numbers = w.cast(w.read(where), w.dtype(where), 'int64')
  low, high = w.scalar(0, 'int64'), w.ints(limits)
  if open_batch:
    high = w.emit('Sub', w.sizes(room), w.ints(parts))
  corners = w.emit('Min', w.emit('Max', numbers, low), high)
  if not fills:
    return _Places(corners, None)
  same = w.cast(w.emit('Equal', corners, numbers), 'bool', 'int32')
  rank = len(w.shape(where))
  return _Places(corners, w.cast(w.reduce('ReduceMin', same, [rank - 1]), 'int32', 'bool'))


def _widened(w: Writer, corners: str, node: Node, wide: list[int], outer: int) -> str:
  """Indices of all elements of a part: one more axis for each along which it may be wider."""
  index_map, sizes = node.attributes['index_map'], node.attributes['sizes']
  if not wide:
    return corners
  k, counts = len(index_map), [dims.split(sizes[axis])[0] for axis in wide]
  if any(dims.split(sizes[axis])[1] for axis in wide):
    raise ValueError('a lookup along the batch; fix the batch, or write it with a comparison.')
  steps = np.zeros((*counts, k), np.int64)
  for i, axis in enumerate(wide):
    along = np.arange(counts[i]).reshape([-1 if j == i else 1 for j in range(len(wide))])
    steps[..., index_map.index(axis)] = along
  corners = w.emit('Unsqueeze', corners, w.ints(range(outer, outer + len(wide))))
  return w.emit('Add', corners, w.constant(steps))


def _filled(w: Writer, y: str, inside: str, order: Order, free: list[int], dtype: str) -> str:
  """NaN, or the end of the integers' range, for parts that leave the operand."""
  # Where the axes of the places are among those of `y`.
  spots = [order.index(place) for place in free]
  if spots != sorted(spots):
    inside = w.emit('Transpose', inside, perm=[int(i) for i in np.argsort(spots)])
  others = [i for i in range(len(order)) if i not in spots]
  if others:
    inside = w.emit('Unsqueeze', inside, w.ints(others))
  hole = np.nan if dtype.startswith('float') else end(dtype, 1 if dtype.startswith('u') else -1)
  return w.emit('Where', inside, y, w.scalar(hole, dtype))


HANDLERS: Mapping[str, Callable[[Writer, Node], None]] = {'gather': gather}
