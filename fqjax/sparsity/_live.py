"""Which units of a network reach its output, and which can be left out of it.

Liveness runs backwards from what is pinned: a channel is live if something live is computed from it
with a weight and a value that are not certainly zero. It starts from nothing, so that channels which
only keep each other alive are found dead. What is left is exact to remove.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fqjax.runtime import dims
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node
from fqjax.sparsity._facts import Fact, along, channels, fixed_border, kernel
from fqjax.sparsity._slots import Slots, free_axes


class Fold(NamedTuple):
  """A parameter that can take up the constant part of a product.

  Attributes:
    parameter: path of a vector.
    sign: +1 where it is added, -1 where it is subtracted.
  """

  parameter: str
  sign: int


class Live(NamedTuple):
  """Result of `find`.

  Attributes:
    keep: bool per slot.
    cause: per slot, index into `reasons` of what keeps it (0 for those that go).
    reasons: text.
    folds: position of a node -> the parameter that takes up its constant inputs.
  """

  keep: np.ndarray
  cause: np.ndarray
  reasons: list[str]
  folds: dict[int, Fold]


def find(graph: Graph, slots: Slots, facts: Mapping[str, Fact], fold: bool = True) -> Live:
  """Decides for every slot of a graph whether it stays.

  Args:
    graph: a valid graph.
    slots: its units.
    facts: what is known of its tensors for the present parameters.
    fold: let constants that are not zero go into the next bias where that is exact.
  """
  readers, names = graph_lib.consumers(graph), layer_names(graph)
  folds: dict[int, Fold] = {}
  mixers = []
  for i, node in enumerate(graph.nodes):
    if node.op == 'dot' or (node.op == 'conv' and node.attributes['groups'] == 1):
      target = _fold_target(graph, slots, facts, readers, node) if fold else 'folding is off'
      if isinstance(target, Fold):
        folds[i] = target
      mixer = _Conv if node.op == 'conv' else _Dot
      mixers.append(mixer(graph, slots, facts, node, names[i], target))
    elif node.op == 'reduce_sum':
      mixers.append(_Sum(graph, slots, facts, node))
  mixers.reverse()

  # Everything below is per unit, held at the unit's smallest slot.
  cause = np.zeros(len(slots.unit), np.int32)
  live = np.zeros(len(slots.unit), bool)
  cause[slots.unit] = slots.pinned
  live[slots.unit] = slots.pinned > 0
  while True:
    _spread(slots, mixers, live, cause)
    empty = _an_empty_axis(graph, slots, live)
    if empty is None:
      break
    live[empty], cause[empty] = True, slots.number('the last one of its tensor')
  return Live(live[slots.unit], cause[slots.unit], slots.reasons, folds)


def _spread(slots: Slots, mixers: list, live: np.ndarray, cause: np.ndarray) -> None:
  changed = True
  while changed:
    changed = False
    for mixer in mixers:
      for units, needed, reasons in mixer.needs(live):
        fresh = needed & ~live[units]
        if fresh.any():
          changed = True
          live[units[fresh]] = True
          cause[units[fresh]] = np.broadcast_to(reasons, units.shape)[fresh]


def _an_empty_axis(graph: Graph, slots: Slots, live: np.ndarray) -> int | None:
  """First unit of an axis nothing of which is live: JAX and C want one entry at least."""
  for name, tensor in graph.tensors.items():
    for axis in range(len(tensor.shape)):
      units = slots.units(name, axis)
      if len(units) and not live[units].any():
        return int(units[0])
  return None


def layer_names(graph: Graph) -> dict[int, str]:
  """Position of a product -> path of the parameter it multiplies with, else its scope.

  Where several parameters make up the weights (masks, norms), the largest gives the name.
  """
  made_of: dict[str, frozenset[str] | None] = dict.fromkeys(graph.inputs)  # None: of the data
  made_of |= {name: frozenset([name]) for name in graph.parameters}
  made_of |= dict.fromkeys(graph.constants, frozenset())
  names = {}
  for i, node in enumerate(graph.nodes):
    parts = [made_of[name] for name in node.inputs]
    if node.op in ('conv', 'dot'):
      weights = [part for part in reversed(parts) if part]
      largest = max(
        sorted(weights[0]) if weights else [],
        key=lambda name: dims.size(graph.tensors[name].shape),
        default=node.scope or node.op,
      )
      names[i] = largest
    known = [part for part in parts if part is not None]
    whole = frozenset().union(*known) if len(known) == len(parts) else None
    made_of |= dict.fromkeys(node.outputs, whole)
  return names


class _Conv:
  """An ungrouped convolution: outputs need the inputs their kernels are not empty for."""

  def __init__(
    self, graph, slots: Slots, facts: Mapping[str, Fact], node: Node, layer: str, target
  ):
    (x, w), (layout_x, layout_w, _) = node.inputs, node.attributes['layout']
    self.inputs = slots.units(x, layout_x.index('C'))
    self.filters = slots.units(w, layout_w.index('O'))
    fact = channels(facts[x], layout_x.index('C'), len(self.inputs))
    held = fact.known & ~fact.zero
    self.open = ~fact.zero & ~(held & isinstance(target, Fold))
    self.weights = ~np.all(kernel(facts[w], graph.tensors[w], layout_w).zero, 0)
    self.reasons = _reasons(slots, layer, held, target)

  def needs(self, live):
    needed = self.open & self.weights[:, live[self.filters]].any(1)
    yield self.inputs, needed, self.reasons


class _Dot:
  """A product: what it sums over is needed where both factors can be non-zero."""

  def __init__(
    self, graph, slots: Slots, facts: Mapping[str, Fact], node: Node, layer: str, target
  ):
    contract, batch = node.attributes['contract'], node.attributes['batch']
    size, data = len(contract[0]), _data_side(graph, facts, node)
    held = np.zeros(1, bool)
    if size == 1 and data is not None:
      held = _held(graph, facts, node)
    self.sides = []
    for side, name in enumerate(node.inputs):
      zero = facts[name].zero
      for axis in contract[side]:
        zero = along(zero, axis, len(slots.of(name, axis)))
      if isinstance(target, Fold) and side == data:
        zero = zero | np.expand_dims(held, [a for a in range(zero.ndim) if a not in contract[side]])
      order = [*batch[side], *contract[side]]
      order += [axis for axis in range(zero.ndim) if axis not in order]
      units = [slots.units(name, axis) for axis in order]
      self.sides.append((~zero.transpose(order), units, len(batch[side]), size))
    self.reasons = _reasons(slots, layer, held, target)
    self.contracted = [slots.units(node.inputs[0], axis) for axis in contract[0]]

  def needs(self, live):
    met = None
    for values, units, batch, size in self.sides:
      for axis, of_axis in enumerate(units):
        if batch <= axis < batch + size:
          continue
        if values.shape[axis] == len(of_axis) > 1:
          values = np.compress(live[of_axis], values, axis)
        elif not live[of_axis].any():
          values = np.zeros_like(values)
      values = np.any(values, tuple(range(batch + size, values.ndim)))
      met = values if met is None else met & values
    assert met is not None
    batch = self.sides[0][2]
    met = np.any(met, tuple(range(batch)))
    for place, units in enumerate(self.contracted):
      others = tuple(i for i in range(len(self.contracted)) if i != place)
      yield units, np.any(met, others), self.reasons


class _Sum:
  """A sum over channels needs those that are not zero."""

  def __init__(self, graph: Graph, slots: Slots, facts: Mapping[str, Fact], node: Node):
    [name], self.axes = node.inputs, node.attributes['axes']
    self.units = [slots.units(name, axis) for axis in range(len(graph.tensors[name].shape))]
    self.values = ~facts[name].zero
    self.reason = slots.number(f'{node.op} in {node.scope or "no scope"}')

  def needs(self, live):
    for axis in self.axes:
      values = along(self.values, axis, len(self.units[axis]))
      for other, units in enumerate(self.units):
        if other not in self.axes and values.shape[other] == len(units) > 1:
          values = np.compress(live[units], values, other)
      others = tuple(i for i in range(values.ndim) if i != axis)
      yield self.units[axis], np.any(values, others), np.asarray([self.reason])


def _reasons(slots: Slots, layer: str, held: np.ndarray, target: Fold | str) -> np.ndarray:
  """Per input channel why a layer needs it."""
  read = slots.number(f'read by {layer}')
  if isinstance(target, Fold) or not held.any():
    return np.full(held.shape, read)
  constant = slots.number(f'holds a constant that {layer} cannot take up: {target}')
  return np.where(held, constant, read)


# Constants.


def _data_side(graph: Graph, facts: Mapping[str, Fact], node: Node) -> int | None:
  """Which input of a plain matrix product comes from the image; None if not exactly one does."""
  known = [bool(facts[name].known.all()) for name in node.inputs]
  return known.index(False) if sorted(known) == [False, True] else None


def _held(graph: Graph, facts: Mapping[str, Fact], node: Node) -> np.ndarray:
  """Input channels of a layer that hold one number other than zero."""
  if node.op == 'conv':
    side, axis = 0, node.attributes['layout'][0].index('C')
  else:
    side = _data_side(graph, facts, node)
    assert side is not None
    axis = node.attributes['contract'][side][0]
  name = node.inputs[side]
  size = graph.tensors[name].shape[axis]
  fact = channels(facts[name], axis, size if isinstance(size, int) else 1)
  return fact.known & ~fact.zero


def _fold_target(graph: Graph, slots: Slots, facts, readers, node: Node) -> Fold | str:
  """The vector that is added to (or subtracted from) what a layer computes, or why there is none."""
  if node.op == 'conv':
    if not fixed_border(node):
      return 'its padding makes the border differ'
    if not facts[node.inputs[1]].known.all():
      return 'its kernel depends on the image'
    axis = node.attributes['layout'][2].index('C')
  else:
    side = _data_side(graph, facts, node)
    if side is None or node.attributes['batch'][0] or len(node.attributes['contract'][0]) != 1:
      return 'it is no plain matrix product'
    free = free_axes(node, graph)
    weights = [place for place, (name, _) in enumerate(free) if name == node.inputs[1 - side]]
    if len(weights) != 1:
      return 'its outputs lie along several axes'
    [axis] = weights
  [y] = node.outputs
  none = 'no bias or mean of its own follows'
  if len(readers[y]) != 1 or y in graph.outputs:
    return none
  after = graph.nodes[readers[y][0]]
  if after.op not in ('add', 'sub') or (after.op == 'sub' and after.inputs[0] != y):
    return none
  name = after.inputs[1] if after.inputs[0] == y else after.inputs[0]
  if any(size > 1 for i, size in enumerate(facts[name].known.shape) if i != axis):
    return none
  made = {out: other for other in graph.nodes for out in other.outputs}
  while name in made and made[name].op in ('reshape', 'broadcast') and len(readers[name]) == 1:
    [name] = made[name].inputs
  if name not in graph.parameters or len(readers[name]) != 1 or name in graph.outputs:
    return none
  tensor = graph.tensors[name]
  units = slots.units(y, axis)
  if len(tensor.shape) != 1 or tensor.dtype != graph.tensors[y].dtype:
    return none
  if not np.array_equal(slots.units(name, 0), units):
    return none
  return Fold(name, 1 if after.op == 'add' else -1)


def shift(
  graph: Graph, slots: Slots, facts: Mapping[str, Fact], node: Node, keep
) -> tuple[np.ndarray, int]:
  """What the constant inputs that go have added to each output channel of a layer.

  Args:
    graph: the graph.
    slots: its units.
    facts: of its tensors.
    node: a convolution or product with a `Fold`.
    keep: bool per slot.

  Returns:
    float64, one per output channel; and how many inputs with a constant go.
  """
  if node.op == 'conv':
    (x, w), (layout_x, layout_w, _) = node.inputs, node.attributes['layout']
    axis = layout_x.index('C')
    weights = kernel(facts[w], graph.tensors[w], layout_w).value.sum(0, dtype=np.float64)
  else:
    side = _data_side(graph, facts, node)
    assert side is not None
    x, w = node.inputs[side], node.inputs[1 - side]
    axis, other = (node.attributes['contract'][s][0] for s in (side, 1 - side))
    shape = dims.bind(graph.tensors[w].shape, None)
    weights = np.moveaxis(np.broadcast_to(facts[w].value, shape), other, 0).astype(np.float64)
  places = slots.of(x, axis)
  fact = channels(facts[x], axis, len(places))
  gone = np.where(keep[places], 0, fact.value.astype(np.float64))
  return gone @ weights, int((gone != 0).sum())
