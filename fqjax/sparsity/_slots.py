"""Which entries of a network's axes can only go together.

A slot is one place along one axis of one tensor. Removing it from an addition removes it from both
operands and the sum; removing it from a map that is flattened removes all its pixels' columns. Ties
say so, node by node; slots tied to each other form a unit, which stays or goes as a whole. Slots
that cannot go at all (pixels, the network's own inputs and outputs, what a softmax runs over) are
pinned, with the reason.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime.dims import Shape
from fqjax.runtime.graph import Graph, Node
from fqjax.sparsity._facts import blocks


class Slots:
  """Units of a graph's slots.

  Attributes:
    graph: the graph.
    unit: slot -> number of its unit (the smallest of its slots).
    pinned: slot -> index into `reasons`, 0 if it may go.
    reasons: why slots are pinned; reasons[0] is ''.
  """

  def __init__(self, graph: Graph):
    self.graph = graph
    self._offsets: dict[str, list[int]] = {}
    count = 0
    for name, tensor in graph.tensors.items():
      self._offsets[name] = []
      for dim in tensor.shape:
        self._offsets[name].append(count)
        count += slot_count(dim)
    self.unit = np.arange(count)
    self.pinned = np.zeros(count, np.int32)
    self.reasons = ['']
    self._reason_numbers: dict[str, int] = {'': 0}
    self._left: list[np.ndarray] = []
    self._right: list[np.ndarray] = []
    self._merges: list[tuple[str, list[int], str, int, str]] = []
    self._build()

  def of(self, name: str, axis: int) -> np.ndarray:
    """Numbers of the slots along an axis; one for the batch."""
    start = self._offsets[name][axis]
    return np.arange(start, start + slot_count(self.graph.tensors[name].shape[axis]))

  def units(self, name: str, axis: int) -> np.ndarray:
    """Units of the slots along an axis."""
    return self.unit[self.of(name, axis)]

  def shape(self, name: str) -> Shape:
    """Shape of a tensor."""
    return self.graph.tensors[name].shape

  def number(self, reason: str) -> int:
    """Index of a reason, new or not."""
    if reason not in self._reason_numbers:
      self._reason_numbers[reason] = len(self.reasons)
      self.reasons.append(reason)
    return self._reason_numbers[reason]

  def pin(self, slots: np.ndarray, reason: str) -> None:
    """Declares that slots stay."""
    free = slots[self.pinned[slots] == 0]
    self.pinned[free] = self.number(reason)

  def pin_axis(self, name: str, axis: int, reason: str) -> None:
    """Declares that an axis stays whole."""
    self.pin(self.of(name, axis), reason)

  def tie(self, left: np.ndarray, right: np.ndarray) -> None:
    """Declares that slots go together, pair by pair."""
    left, right = np.broadcast_arrays(left, right)
    self._left.append(left.ravel())
    self._right.append(right.ravel())

  def tie_axes(self, a: str, axis_a: int, b: str, axis_b: int) -> None:
    """Ties two axes of one size place by place."""
    self.tie(self.of(a, axis_a), self.of(b, axis_b))

  def merge(self, wide: str, axes: list[int], narrow: str, axis: int, reason: str) -> None:
    """Notes axes of one tensor that are one axis of another; resolved when all else is tied."""
    self._merges.append((wide, axes, narrow, axis, reason))

  def _build(self) -> None:
    graph = self.graph
    read = {name for node in graph.nodes for name in node.inputs}
    for name, tensor in graph.tensors.items():
      for axis, dim in enumerate(tensor.shape):
        if slot_count(dim) == 1:
          self.pin_axis(name, axis, 'an axis of one')
        if name in graph.inputs:
          self.pin_axis(name, axis, "the network's input")
        if name in graph.outputs:
          self.pin_axis(name, axis, "the network's output")
        if name in graph.parameters and name not in read:
          self.pin_axis(name, axis, 'not used')
    for node in graph.nodes:
      _TIES[node.op](self, node, f'{node.op} in {node.scope or "no scope"}')
    self._connect()
    self._resolve_merges()
    # A unit with a pinned slot is pinned as a whole.
    best = np.zeros(len(self.unit), np.int32)
    where = np.flatnonzero(self.pinned)[::-1]
    best[self.unit[where]] = self.pinned[where]
    self.pinned = best[self.unit]

  def _connect(self) -> None:
    """Labels every slot with the smallest slot it is tied to."""
    if not self._left:
      return
    left, right = np.concatenate(self._left), np.concatenate(self._right)
    self._left, self._right = [left], [right]
    unit = self.unit
    while True:
      a, b = unit[left], unit[right]
      if (a == b).all():
        break
      np.minimum.at(unit, np.maximum(a, b), np.minimum(a, b))
      while (unit[unit] != unit).any():
        unit = unit[unit]
    self.unit = unit

  def _resolve_merges(self) -> None:
    """Decides for each merged axis which of its parts may shrink: at most one can.

    Where pixels and channels are flattened together the pixels are pinned already, and it is the
    channels; where two are open (heads and head size), the first: whole heads go.
    """
    pending = self._merges
    while pending:
      pinned = np.zeros(len(self.unit), bool)
      pinned[self.unit[self.pinned > 0]] = True
      waiting, progress = [], False
      for item in pending:
        wide, axes, narrow, axis, reason = item
        open_axes = [a for a in axes if not pinned[self.units(wide, a)].all()]
        if pinned[self.units(narrow, axis)].all():
          open_axes = []
        if len(open_axes) > 1:
          waiting.append(item)
          continue
        self._merge(wide, axes, narrow, axis, open_axes, reason)
        progress = True
      if not progress:
        wide, axes, narrow, axis, reason = waiting.pop(0)
        open_axes = [a for a in axes if not pinned[self.units(wide, a)].all()]
        self._merge(wide, axes, narrow, axis, open_axes[:1], reason)
      self._connect()
      pending = waiting

  def _merge(self, wide, axes, narrow, axis, carrier: list[int], reason: str) -> None:
    for a in axes:
      if a not in carrier:
        self.pin_axis(wide, a, reason)
    if not carrier:
      self.pin_axis(narrow, axis, reason)
      return
    sizes = [slot_count(self.shape(wide)[a]) for a in axes]
    places = self.of(narrow, axis).reshape(sizes)
    places = np.moveaxis(places, axes.index(carrier[0]), 0).reshape(
      sizes[axes.index(carrier[0])], -1
    )
    self.tie(self.of(wide, carrier[0])[:, None], places)


def slot_count(dim: dims.Dim) -> int:
  """Slots of an axis; the batch is one."""
  return dim if isinstance(dim, int) else 1


# What each operation ties. (slots, node, 'op in scope')


def _pointwise(slots: Slots, node: Node, _: str) -> None:
  [out] = node.outputs
  for name in node.inputs:
    for axis, dim in enumerate(slots.shape(name)):
      if dim == slots.shape(out)[axis]:
        slots.tie_axes(name, axis, out, axis)


def _reduce(slots: Slots, node: Node, where: str) -> None:
  [name], [out] = node.inputs, node.outputs
  axes = node.attributes['axes'] if 'axes' in node.attributes else (node.attributes['axis'],)
  kept = [axis for axis in range(len(slots.shape(name))) if axis not in axes]
  for place, axis in enumerate(kept):
    slots.tie_axes(name, axis, out, place)
  if node.op != 'reduce_sum':
    for axis in axes:
      slots.pin_axis(name, axis, where)


def _along(slots: Slots, node: Node, where: str) -> None:
  """Operations that run along one axis and do with the others nothing."""
  for name in (*node.inputs, *node.outputs):
    for axis in range(len(slots.shape(name))):
      if axis == node.attributes['axis']:
        slots.pin_axis(name, axis, where)
      else:
        slots.tie_axes(name, axis, node.outputs[0], axis)


def _reshape(slots: Slots, node: Node, where: str) -> None:
  [name], [out] = node.inputs, node.outputs
  for old, new in blocks(slots.shape(name), slots.shape(out)):
    fixed = all(isinstance(slots.shape(name)[a], int) for a in old)
    if len(old) == len(new) == 1:
      slots.tie_axes(name, old[0], out, new[0])
    elif fixed and len(new) == 1:
      slots.merge(name, old, out, new[0], where)
    elif fixed and len(old) == 1:
      slots.merge(out, new, name, old[0], where)
    else:
      for tensor, axes in ((name, old), (out, new)):
        for axis in axes:
          slots.pin_axis(tensor, axis, where)


def _transpose(slots: Slots, node: Node, _: str) -> None:
  for place, axis in enumerate(node.attributes['permutation']):
    slots.tie_axes(node.inputs[0], axis, node.outputs[0], place)


def _broadcast(slots: Slots, node: Node, _: str) -> None:
  [name], [out] = node.inputs, node.outputs
  for axis, place in enumerate(node.attributes['axes']):
    if slots.shape(name)[axis] == slots.shape(out)[place]:
      slots.tie_axes(name, axis, out, place)


def _concat(slots: Slots, node: Node, _: str) -> None:
  [out], joined = node.outputs, node.attributes['axis']
  start = 0
  for name in node.inputs:
    for axis, dim in enumerate(slots.shape(name)):
      places = slots.of(out, axis)
      if axis == joined and isinstance(dim, int):
        places = places[start : start + dim]
        start += dim
      slots.tie(slots.of(name, axis), places)


def _slice(slots: Slots, node: Node, where: str) -> None:
  [name], [out] = node.inputs, node.outputs
  settings = (node.attributes[key] for key in ('start', 'stop', 'strides'))
  for axis, (start, stop, stride) in enumerate(zip(*settings, strict=True)):
    places = slots.of(name, axis)
    slots.tie(places[start:stop:stride] if isinstance(stop, int) else places, slots.of(out, axis))
    if stride > 1:
      slots.pin_axis(name, axis, where)


def _pad(slots: Slots, node: Node, where: str) -> None:
  name, [out] = node.inputs[0], node.outputs
  settings = node.attributes['padding'], node.attributes['interior']
  for axis, ((low, _), inner) in enumerate(zip(*settings, strict=True)):
    places = slots.of(name, axis)
    slots.tie(places, slots.of(out, axis)[low :: inner + 1][: len(places)])
    if inner:
      slots.pin_axis(out, axis, where)


def _reverse(slots: Slots, node: Node, _: str) -> None:
  [name], [out] = node.inputs, node.outputs
  for axis in range(len(slots.shape(name))):
    step = -1 if axis in node.attributes['axes'] else 1
    slots.tie(slots.of(name, axis)[::step], slots.of(out, axis))


def _gather(slots: Slots, node: Node, where: str) -> None:
  (name, places), [out], settings = node.inputs, node.outputs, node.attributes
  dropped = settings['collapsed'] + settings['operand_batch']
  offset = iter(settings['offset'])
  for axis, dim in enumerate(slots.shape(name)):
    place = None if axis in dropped else next(offset)
    whole = place is not None and settings['sizes'][axis] == dim
    if place is not None and whole and axis not in settings['index_map']:
      slots.tie_axes(name, axis, out, place)
      continue
    slots.pin_axis(name, axis, where)
    if place is not None:
      slots.pin_axis(out, place, where)
  for axis in range(len(slots.shape(places))):
    slots.pin_axis(places, axis, where)
  for axis in set(range(len(slots.shape(out)))) - set(settings['offset']):
    slots.pin_axis(out, axis, where)


def _pool(slots: Slots, node: Node, where: str) -> None:
  [name], [out], settings = node.inputs, node.outputs, node.attributes
  for axis, window in enumerate(settings['window']):
    if window == settings['strides'][axis] == 1 and not any(settings['padding'][axis]):
      slots.tie_axes(name, axis, out, axis)
      continue
    slots.pin_axis(name, axis, where)
    slots.pin_axis(out, axis, where)


def _iota(slots: Slots, node: Node, where: str) -> None:
  slots.pin_axis(node.outputs[0], node.attributes['axis'], where)


def _conv(slots: Slots, node: Node, where: str) -> None:
  (x, w), [y], groups = node.inputs, node.outputs, node.attributes['groups']
  layout_x, layout_w, layout_y = node.attributes['layout']
  for name, layout in ((x, layout_x), (w, layout_w), (y, layout_y)):
    for axis, letter in enumerate(layout):
      if letter not in 'NCOI':
        slots.pin_axis(name, axis, where)
  slots.tie_axes(x, layout_x.index('N'), y, layout_y.index('N'))
  entering, filters = slots.of(x, layout_x.index('C')), slots.of(w, layout_w.index('O'))
  slots.tie(filters, slots.of(y, layout_y.index('C')))
  if groups == 1:
    slots.tie(entering, slots.of(w, layout_w.index('I')))
    return
  # Whole groups: fewer filters in one group than in another cannot be said.
  slots.pin_axis(w, layout_w.index('I'), where)
  for part in (entering.reshape(groups, -1), filters.reshape(groups, -1)):
    slots.tie(part, filters.reshape(groups, -1)[:, :1])


def _dot(slots: Slots, node: Node, _: str) -> None:
  (a, b), [out] = node.inputs, node.outputs
  contract, batch = node.attributes['contract'], node.attributes['batch']
  for axis_a, axis_b in zip(*contract, strict=True):
    slots.tie_axes(a, axis_a, b, axis_b)
  for place, (axis_a, axis_b) in enumerate(zip(*batch, strict=True)):
    slots.tie_axes(a, axis_a, out, place)
    slots.tie_axes(b, axis_b, out, place)
  for place, (name, axis) in enumerate(free_axes(node, slots.graph), len(batch[0])):
    slots.tie_axes(name, axis, out, place)


def free_axes(node: Node, graph: Graph) -> list[tuple[str, int]]:
  """(tensor, axis) of what a product keeps, in the order of the result after the batch axes."""
  contract, batch = node.attributes['contract'], node.attributes['batch']
  return [
    (name, axis)
    for side, name in enumerate(node.inputs)
    for axis in range(len(graph.tensors[name].shape))
    if axis not in contract[side] + batch[side]
  ]


_TIES: Mapping[str, Callable[[Slots, Node, str], None]] = {
  **dict.fromkeys((*oplist.UNARY, *oplist.BINARY, *oplist.COMPARE), _pointwise),
  **dict.fromkeys(('pow', 'integer_pow', 'round', 'is_finite', 'select', 'cast'), _pointwise),
  **dict.fromkeys((*oplist.REDUCE, 'argmax', 'argmin'), _reduce),
  **dict.fromkeys((*oplist.CUMULATIVE, 'sort', 'top_k'), _along),
  **dict.fromkeys(oplist.POOL, _pool),
  'broadcast': _broadcast,
  'concat': _concat,
  'conv': _conv,
  'dot': _dot,
  'gather': _gather,
  'iota': _iota,
  'pad': _pad,
  'reshape': _reshape,
  'reverse': _reverse,
  'slice': _slice,
  'transpose': _transpose,
}
