"""Unused paths: channels that nothing reads or that hold nothing leave the network, losslessly."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node
from fqjax.sparsity import _facts, _live
from fqjax.sparsity._slots import Slots
from fqjax.tracing import Traced, leaf_name, to_graph


class Widths(NamedTuple):
  """Channels of a convolution or of a product with a parameter, before and after.

  Attributes:
    path: of its kernel.
    inputs: channels that enter, before and after.
    outputs: channels that leave, before and after.
    stuck: (how many, what, why) for channels without weights or with a constant that had to stay.
  """

  path: str
  inputs: tuple[int, int]
  outputs: tuple[int, int]
  stuck: tuple[tuple[int, str, str], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
  """What was removed; `str(report)` is a table.

  Attributes:
    layers: `Widths` of each layer, in order of execution.
    sizes: number of parameters (all variables), before and after.
    folded: (path, channels) of biases and means that took up constants of removed channels.
    keep: path -> for each axis the indices that stay, None for all.
    shapes: path -> shape before.
    unused: paths of variables the function does not read; they stay as they are.
  """

  layers: tuple[Widths, ...]
  sizes: tuple[int, int]
  folded: tuple[tuple[str, int], ...]
  keep: Mapping[str, tuple[np.ndarray | None, ...]]
  shapes: Mapping[str, tuple[int, ...]]
  unused: tuple[str, ...] = ()

  def __str__(self) -> str:
    rows = [('layer', 'inputs', 'outputs')]
    rows += [(layer.path, _arrow(layer.inputs), _arrow(layer.outputs)) for layer in self.layers]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
      '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
      for row in rows
    ]
    lines.append(f'parameters {self.sizes[0]:,} -> {self.sizes[1]:,}')
    for layer in self.layers:
      lines += [f'{layer.path}: {n} {what} stay: {why}' for n, what, why in layer.stuck]
    lines += [f'{path} takes up the constants of {n} removed channels' for path, n in self.folded]
    if self.unused:
      lines.append(f'not read, left as they are: {", ".join(self.unused)}')
    return '\n'.join(lines)

  def slice(self, tree: Any) -> Any:
    """Cuts any tree with the variables' paths to the same channels: masks, moments, averages.

    Args:
      tree: leaves of the old shapes; leaves under other paths stay. Wrap a part of the variables so
        that its paths agree: `report.slice({'params': masks})`.

    Raises:
      ValueError: a leaf of another shape than the variable of its path.

    Example:
      >>> params = {'a': jnp.ones((4, 3)).at[:, 1].set(0), 'b': jnp.ones((3, 2))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p['a']) @ p['b']
      >>> report = remove_unused(apply_fn, params, jnp.ones((1, 4))).report
      >>> momentum = {'a': np.arange(12).reshape(4, 3), 'b': np.zeros((3, 2))}
      >>> report.slice(momentum)['a'][0]
      array([0, 2])
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: self._cut(leaf_name(path), x), tree)

  def _cut(self, path: str, leaf: Any) -> Any:
    if path not in self.keep:
      return leaf
    if leaf.shape != self.shapes[path]:
      raise ValueError(
        f'{path}: an array {list(leaf.shape)} cannot be cut, the variable was '
        f'{list(self.shapes[path])}.'
      )
    return _take(leaf, self.keep[path])


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
  """A network without its unused paths.

  Attributes:
    variables: tree like the one given, smaller arrays.
    apply: `apply(variables, *inputs)` runs the smaller network, under jit, vmap and grad too; it
      needs no model class. A model class built at the new widths takes the same variables.
    report: what went, what stayed, and why.
  """

  variables: Any
  apply: Traced
  report: Report


def remove_unused(
  apply_fn: Callable,
  variables: Any,
  *inputs: Any,
  batch_axis: int | None = 0,
  fold: bool = True,
) -> Removed:
  """Cuts out of any network the channels that cannot change its output.

  Found on the traced graph, to a fixpoint: a channel goes if everything that reads it has no weight
  for it, or if it is certainly 0, whatever the input (its filter is empty, and bias, norm and
  activation make 0 of 0). Additions tie channels to each other (a residual stage goes together),
  concatenations shift them, depthwise and grouped convolutions hand them on, flattening multiplies
  them. A channel that is certainly another number goes where that number can be moved into the next
  layer's bias or running mean: products and convolutions that read no padding. Otherwise it stays,
  and the report says why.

  Trace the network as it will be used: with running statistics and without dropout. The result is
  the old one up to the order of float sums. 0 times an infinite or undefined activation counts as 0.

  Args:
    apply_fn: `apply_fn(variables, *inputs)`, any function JAX can trace. Bind other arguments first:
      `functools.partial(model.apply, train=False)`.
    variables: tree of concrete arrays; statistics included.
    *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.
    batch_axis: axis of the inputs that stays open; None fixes it.
    fold: move constants into biases and means.

  Returns:
    The smaller variables, a function that runs them, and the report.

  Raises:
    ValueError: the network has operations the graph has not, or `variables` are no numbers.

  Example:
    >>> params = {'a': jnp.ones((4, 3)).at[:, 1].set(0), 'b': jnp.ones((3, 2))}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p['a']) @ p['b']
    >>> small = remove_unused(apply_fn, params, jnp.ones((1, 4)))
    >>> print(small.report)
    layer  inputs  outputs
    a      4       3 -> 2
    b      3 -> 2  2
    parameters 18 -> 12
    >>> small.apply(small.variables, jnp.ones((5, 4))).shape
    (5, 2)

  Source: Ma et al. 2020, "Tiny but Accurate" (arXiv 1905.00136), unused path removal; here on the
  graph instead of the order of layers.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if isinstance(leaf, (jax.ShapeDtypeStruct, Tracer)):
      raise ValueError(f'{leaf_name(path)}: removing needs numbers, got {type(leaf).__name__}.')
  traced = to_graph(apply_fn, variables, *inputs, batch_axis=batch_axis)
  graph, arrays = traced.graph, traced.parameters(variables)
  values = {name: np.asarray(array) for name, array in arrays.items()}
  facts, slots = _facts.find(graph, values), Slots(graph)
  live = _live.find(graph, slots, facts, fold)

  folded, moved = [], dict(arrays)
  for i, target in live.folds.items():
    amount, gone = _live.shift(graph, slots, facts, graph.nodes[i], live.keep)
    if gone:
      old, old_leaf = values[target.parameter], arrays[target.parameter]
      new = (old.astype(np.float64) + target.sign * amount).astype(old.dtype)
      moved[target.parameter] = new if isinstance(old_leaf, np.ndarray) else jnp.asarray(new)
      folded.append((target.parameter, gone))

  keep = {name: _kept(slots, live.keep, name) for name in graph.parameters}
  small = {name: _take(moved[name], keep[name]) for name in graph.parameters}
  leaves, tree = jax.tree.flatten(variables)
  ready = iter(small.values())
  leaves = [
    leaf if static is not None else next(ready)
    for leaf, static in zip(leaves, traced.static, strict=False)
  ]
  smaller = _cut_graph(graph, slots, live.keep)
  graph_lib.validate(smaller)
  read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
  report = Report(
    layers=tuple(_layers(graph, slots, facts, live)),
    sizes=(sum(v.size for v in values.values()), sum(math.prod(v.shape) for v in small.values())),
    folded=tuple(folded),
    keep=keep,
    shapes={name: value.shape for name, value in values.items()},
    unused=tuple(name for name in graph.parameters if name not in read),
  )
  apply = dataclasses.replace(traced, graph=smaller)
  return Removed(jax.tree.unflatten(tree, leaves), apply, report)


def _kept(slots: Slots, keep: np.ndarray, name: str) -> tuple[np.ndarray | None, ...]:
  found = []
  for axis in range(len(slots.shape(name))):
    alive = keep[slots.of(name, axis)]
    found.append(None if alive.all() else np.flatnonzero(alive))
  return tuple(found)


def _take(leaf: Any, keep: tuple[np.ndarray | None, ...]) -> Any:
  if all(places is None for places in keep):
    return leaf
  # By NumPy where there are numbers: JAX would compile a gather for every shape.
  array = leaf if isinstance(leaf, Tracer) else np.asarray(leaf)
  for axis, places in enumerate(keep):
    if places is not None:
      array = array[(slice(None),) * axis + (places,)]
  return jnp.asarray(array) if isinstance(leaf, jax.Array) else array


# The graph at the new widths.


def _cut_graph(graph: Graph, slots: Slots, keep: np.ndarray) -> Graph:
  tensors = {}
  for name, tensor in graph.tensors.items():
    shape = tuple(
      int(keep[slots.of(name, axis)].sum()) if isinstance(dim, int) else dim
      for axis, dim in enumerate(tensor.shape)
    )
    tensors[name] = tensor._replace(shape=shape)
  nodes = []
  for node in graph.nodes:
    if node.op in _CHANGES:
      changes = _CHANGES[node.op](node, graph, tensors, slots, keep)
      node = node._replace(attributes={**node.attributes, **changes})
    nodes.append(node)
  constants = {
    name: np.ascontiguousarray(_take(array, _kept(slots, keep, name)))
    for name, array in graph.constants.items()
  }
  constants = {name: array.reshape(tensors[name].shape) for name, array in constants.items()}
  return dataclasses.replace(graph, constants=constants, nodes=tuple(nodes), tensors=tensors)


def _new_shape(node: Node, graph: Graph, tensors, slots: Slots, keep) -> dict[str, Any]:
  return {'shape': tensors[node.outputs[0]].shape}


def _new_slice(node: Node, graph: Graph, tensors, slots: Slots, keep) -> dict[str, Any]:
  [name] = node.inputs
  settings = (node.attributes[key] for key in ('start', 'stop', 'strides'))
  start, stop = [], []
  for axis, (first, last, stride) in enumerate(zip(*settings, strict=True)):
    alive = keep[slots.of(name, axis)]
    if isinstance(last, int) and stride == 1:
      first, last = int(alive[:first].sum()), int(alive[:last].sum())
    start.append(first)
    stop.append(last)
  return {'start': tuple(start), 'stop': tuple(stop)}


def _new_pad(node: Node, graph: Graph, tensors, slots: Slots, keep) -> dict[str, Any]:
  padding = []
  for axis, (low, high) in enumerate(node.attributes['padding']):
    alive = keep[slots.of(node.outputs[0], axis)]
    new_high = int(alive[len(alive) - high :].sum()) if high else 0
    padding.append((int(alive[:low].sum()) if low else 0, new_high))
  return {'padding': tuple(padding)}


def _new_groups(node: Node, graph: Graph, tensors, slots: Slots, keep) -> dict[str, Any]:
  (x, w), (layout_x, layout_w, _) = node.inputs, node.attributes['layout']
  if node.attributes['groups'] == 1:
    return {}
  inputs = tensors[w].shape[layout_w.index('I')]
  return {'groups': tensors[x].shape[layout_x.index('C')] // inputs}


def _new_sizes(node: Node, graph: Graph, tensors, slots: Slots, keep) -> dict[str, Any]:
  name, sizes = node.inputs[0], node.attributes['sizes']
  old, new = graph.tensors[name].shape, tensors[name].shape
  return {'sizes': tuple(n if s == o else s for s, o, n in zip(sizes, old, new, strict=True))}


_CHANGES: Mapping[str, Callable[..., dict[str, Any]]] = {
  'broadcast': _new_shape,
  'conv': _new_groups,
  'gather': _new_sizes,
  'iota': _new_shape,
  'pad': _new_pad,
  'reshape': _new_shape,
  'slice': _new_slice,
}


# The report.


def _arrow(numbers: tuple[int, int]) -> str:
  return str(numbers[0]) if numbers[0] == numbers[1] else f'{numbers[0]} -> {numbers[1]}'


def _layers(graph: Graph, slots: Slots, facts: Mapping[str, _facts.Fact], live: _live.Live):
  for i, path in _live.layer_names(graph).items():
    if path not in graph.parameters:
      continue
    node = graph.nodes[i]
    entering, leaving, weights = (_conv_slots if node.op == 'conv' else _dot_slots)(
      graph, slots, facts, node
    )
    counts = [
      (math.prod(map(len, axes)), math.prod(int(live.keep[axis].sum()) for axis in axes))
      for axes in (entering, leaving)
    ]
    stuck: dict[tuple[str, str], int] = {}
    if weights is not None:
      [inputs], [outputs] = entering, leaving
      empty_inputs = inputs[~weights[:, live.keep[outputs]].any(1)]
      for what, places in (('inputs', empty_inputs), ('outputs', outputs[~weights.any(0)])):
        for slot in places[live.keep[places]]:
          key = f'{what} without weights', live.reasons[live.cause[slot]]
          stuck[key] = stuck.get(key, 0) + 1
    if node.op == 'conv' and node.attributes['groups'] > 1 and not _facts.fixed_border(node):
      [inputs] = entering
      axis = node.attributes['layout'][0].index('C')
      fact = _facts.channels(facts[node.inputs[0]], axis, len(inputs))
      if count := int((fact.known & ~fact.zero & live.keep[inputs]).sum()):
        stuck['inputs with a constant', 'its padding makes the border differ'] = count
    yield Widths(
      path, counts[0], counts[1], tuple((n, what, why) for (what, why), n in stuck.items())
    )


def _conv_slots(graph: Graph, slots: Slots, facts: Mapping[str, _facts.Fact], node: Node):
  """Slots that enter a layer, slots that leave it, and where it has weights [inputs, outputs]."""
  (x, w), [y], groups = node.inputs, node.outputs, node.attributes['groups']
  layout_x, layout_w, layout_y = node.attributes['layout']
  entering, leaving = slots.of(x, layout_x.index('C')), slots.of(y, layout_y.index('C'))
  part = ~np.all(_facts.kernel(facts[w], graph.tensors[w], layout_w).zero, 0)
  inputs, outputs = len(part), len(leaving) // groups
  weights = np.zeros((len(entering), len(leaving)), bool)
  for g in range(groups):
    columns = slice(g * outputs, (g + 1) * outputs)
    weights[g * inputs : (g + 1) * inputs, columns] = part[:, columns]
  return [entering], [leaving], weights


def _dot_slots(graph: Graph, slots: Slots, facts: Mapping[str, _facts.Fact], node: Node):
  side = 0 if facts[node.inputs[0]].known.all() else 1
  w, contract, batch = (
    node.inputs[side],
    node.attributes['contract'][side],
    node.attributes['batch'],
  )
  free = [
    axis for axis in range(len(slots.shape(w))) if axis not in contract and axis not in batch[side]
  ]
  entering, leaving = ([slots.of(w, axis) for axis in axes] for axes in (contract, free))
  if batch[0] or len(contract) != 1 or len(free) != 1 or not facts[w].known.all():
    return entering, leaving, None
  zero = facts[w].zero
  for axis in (0, 1):
    zero = _facts.along(zero, axis, len(slots.of(w, axis)))
  return entering, leaving, ~zero.transpose(contract[0], free[0])
