"""Transposes move until they meet what takes them in: their inverse, a layout, a sum."""

import dataclasses
from typing import Any

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime.graph import Graph, Node, Tensor, consumers, without_dead

_Order = tuple[int, ...]

_ELEMENTWISE = {
  *oplist.UNARY, *oplist.BINARY, *oplist.COMPARE, 'pow', 'integer_pow', 'round', 'is_finite',
  'clamp', 'select', 'cast',
}  # fmt: skip
# Attributes with one entry per axis, and those that name axes.
_PER_AXIS = {
  'slice': ('start', 'stop', 'strides'),
  'pad': ('padding', 'interior'),
  **dict.fromkeys(oplist.POOL, ('window', 'strides', 'padding', 'dilation')),
}
_ONE_AXIS = ('concat', 'sort', 'top_k', *oplist.CUMULATIVE)
_REDUCE = (*oplist.REDUCE, 'argmax', 'argmin')


def move_transposes(graph: Graph) -> Graph:
  """Moves transposes behind what does not care for the order of axes, and takes them in.

  Two that undo each other vanish. Convolutions take a transpose into the layout of their input or
  their result, products into the axes they contract, reductions into their axes; one that only
  moves axes of size 1 is a reshape, and reshapes in a row are one. Constants on the way are
  transposed.

  Args:
    graph: any.

  Returns:
    The graph with the same results beyond the order of sums; the same graph if no fewer elements
    would be moved.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> def network(p, x):
    ...   x = jnp.tanh(x.transpose(0, 2, 3, 1))
    ...   return x.transpose(0, 3, 1, 2)
    >>> graph = to_graph(network, {}, jnp.ones((1, 2, 3, 4))).graph
    >>> [node.op for node in move_transposes(graph).nodes]
    ['tanh']
  """
  graph = _join_reshapes(graph)
  if not any(node.op == 'transpose' for node in graph.nodes):
    return graph
  moved = [_into_layouts(_Mover(graph, far).run()) for far in (False, True)]
  return _join_reshapes(min((graph, *moved), key=_cost))


def _cost(graph: Graph) -> tuple[int, int]:
  """Elements that transposes move, then the number of nodes."""
  sizes = [
    dims.size(graph.tensors[node.outputs[0]].shape)[0]
    for node in graph.nodes
    if node.op == 'transpose'
  ]
  return sum(sizes), len(graph.nodes)


class _Mover:
  """Walks once through a graph and writes transposes only where they are needed."""

  def __init__(self, graph: Graph, far: bool):
    self.graph = graph
    self.far = far  # also behind elementwise operations
    self.nodes: list[Node] = []
    self.tensors = dict(graph.tensors)
    self.constants = dict(graph.constants)
    # tensor -> (tensor that exists, order): the first is the second with its axes in that order
    self.pending: dict[str, tuple[str, _Order]] = {}
    self.made: dict[str, str] = {}

  def run(self) -> Graph:
    for node in self.graph.nodes:
      if not self._moves(node):
        self.nodes.append(node._replace(inputs=tuple(map(self._whole, node.inputs))))
    outputs = tuple(map(self._whole, self.graph.outputs))
    graph = dataclasses.replace(
      self.graph,
      nodes=tuple(self.nodes),
      outputs=outputs,
      tensors=self.tensors,
      constants=self.constants,
    )
    return without_dead(graph)

  def _shape(self, name: str) -> dims.Shape:
    return self.tensors[name].shape

  def _whole(self, name: str) -> str:
    """The tensor as it was; written down if it is not there yet."""
    if name not in self.pending or name in self.made:
      return self.made.get(name, name)
    source, order = self.pending[name]
    if order == tuple(range(len(order))):
      return source
    self.made[name] = name
    if _only_ones_move(self._shape(source), order):
      node = Node('reshape', (source,), (name,), {'shape': self._shape(name)})
    else:
      node = Node('transpose', (source,), (name,), {'permutation': order})
    self.nodes.append(node)
    return name

  def _behind(self, name: str) -> tuple[str, _Order]:
    return self.pending.get(name, (name, tuple(range(len(self._shape(name))))))

  def _write(self, node: Node, inputs: list[str], attributes: dict[str, Any], order: _Order):
    """Adds a node on what lies behind its inputs; its results are pending in this order."""
    names = []
    for name in node.outputs:
      new = f'{name}:moved'
      shape = self._shape(name)
      back = [order.index(axis) for axis in range(len(order))]
      self.tensors[new] = Tensor(new, tuple(shape[i] for i in back), self.graph.tensors[name].dtype)
      self.pending[name] = (new, order)
      names.append(new)
    self.nodes.append(
      node._replace(inputs=tuple(inputs), outputs=tuple(names), attributes=attributes)
    )

  def _moves(self, node: Node) -> bool:
    """Takes the transposes in front of a node behind it or into it; False leaves it as it is."""
    if node.op == 'transpose':
      source, order = self._behind(node.inputs[0])
      permutation = node.attributes['permutation']
      self.pending[node.outputs[0]] = source, tuple(order[axis] for axis in permutation)
      return True
    orders = [self._behind(name)[1] for name in node.inputs]
    if all(order == tuple(range(len(order))) for order in orders):
      return False
    if node.op == 'conv':
      return self._conv(node)
    if node.op == 'dot':
      return self._dot(node)
    if node.op == 'reshape':
      source, order = self._behind(node.inputs[0])
      if not _only_ones_move(self._shape(source), order):
        return False
      self.nodes.append(node._replace(inputs=(source,)))
      return True
    if node.op in _REDUCE:
      return self._reduce(node)
    return self.far and self._along(node)

  def _conv(self, node: Node) -> bool:
    source, order = self._behind(node.inputs[0])
    letters = node.attributes['layout']
    layout = ''.join(letters[0][order.index(axis)] for axis in range(len(order)))
    attributes = {**node.attributes, 'layout': (layout, *letters[1:])}
    kernel = self._whole(node.inputs[1])
    self.nodes.append(node._replace(inputs=(source, kernel), attributes=attributes))
    return True

  def _dot(self, node: Node) -> bool:
    inputs, contract, batch = [], [], []
    for i, name in enumerate(node.inputs):
      source, order = self._behind(name)
      summed, both = node.attributes['contract'][i], node.attributes['batch'][i]
      free = [order[axis] for axis in range(len(order)) if axis not in (*summed, *both)]
      # What is left keeps its order in the result.
      takes = free == sorted(free)
      inputs.append(source if takes else self._whole(name))
      contract.append(tuple(order[axis] for axis in summed) if takes else summed)
      batch.append(tuple(order[axis] for axis in both) if takes else both)
    attributes = {**node.attributes, 'contract': tuple(contract), 'batch': tuple(batch)}
    self.nodes.append(node._replace(inputs=tuple(inputs), attributes=attributes))
    return True

  def _reduce(self, node: Node) -> bool:
    source, order = self._behind(node.inputs[0])
    given = node.attributes
    axes = given['axes'] if 'axes' in given else (given['axis'],)
    left = [order[axis] for axis in range(len(order)) if axis not in axes]
    if not self.far and left != sorted(left):
      return False
    new = tuple(sorted(order[axis] for axis in axes))
    attributes = {**given, 'axes': new} if 'axes' in given else {**given, 'axis': new[0]}
    self._write(node, [source], attributes, tuple(sorted(left).index(axis) for axis in left))
    return True

  def _along(self, node: Node) -> bool:
    """Operations that treat axes alike, or name them in their attributes."""
    known = (*_ELEMENTWISE, *_PER_AXIS, *_ONE_AXIS, 'reverse')
    if node.op not in known:
      return False
    ranked = [name for name in node.inputs if self._shape(name)]
    orders = {self._behind(name)[1] for name in ranked if name not in self.graph.constants}
    if len(orders) != 1:
      return False
    [order] = orders
    inputs = [self._arranged(name, order) for name in node.inputs]
    back = [order.index(axis) for axis in range(len(order))]
    attributes = dict(node.attributes)
    for key in _PER_AXIS.get(node.op, ()):
      attributes[key] = tuple(attributes[key][i] for i in back)
    if node.op in _ONE_AXIS:
      attributes['axis'] = order[attributes['axis']]
    if node.op == 'reverse':
      attributes['axes'] = tuple(order[axis] for axis in attributes['axes'])
    self._write(node, inputs, attributes, order)
    return True

  def _arranged(self, name: str, order: _Order) -> str:
    """An input as it lies behind the transpose; constants are laid so."""
    if name in self.pending or not self._shape(name):
      return self._behind(name)[0]
    new = f'{name}:{"".join(map(str, order))}'
    if new not in self.constants:
      array = self.graph.constants[name].transpose(np.argsort(order))
      self.constants[new] = np.ascontiguousarray(array)
      self.tensors[new] = Tensor(new, array.shape, self.graph.tensors[name].dtype)
    return new


def _only_ones_move(shape: dims.Shape, order: _Order) -> bool:
  kept = [axis for axis in order if shape[axis] != 1]
  return kept == sorted(kept)


def _into_layouts(graph: Graph) -> Graph:
  """Transposes of what a convolution makes, in the layout of its result."""
  readers = consumers(graph)
  nodes: list[Node | None] = list(graph.nodes)
  for i, node in enumerate(graph.nodes):
    if node.op != 'conv' or node.outputs[0] in graph.outputs or len(readers[node.outputs[0]]) != 1:
      continue
    [j] = readers[node.outputs[0]]
    after = graph.nodes[j]
    if after.op != 'transpose':
      continue
    letters = node.attributes['layout']
    layout = ''.join(letters[2][axis] for axis in after.attributes['permutation'])
    attributes = {**node.attributes, 'layout': (*letters[:2], layout)}
    nodes[i] = node._replace(outputs=after.outputs, attributes=attributes)
    nodes[j] = None
  return without_dead(dataclasses.replace(graph, nodes=tuple(n for n in nodes if n is not None)))


def _join_reshapes(graph: Graph) -> Graph:
  """Reshapes of reshapes are one; of a tensor to its own shape, none."""
  source: dict[str, str] = {}
  same: dict[str, str] = {}
  nodes = []
  for node in graph.nodes:
    inputs = tuple(same.get(name, name) for name in node.inputs)
    if node.op == 'reshape':
      first, [out] = source.get(inputs[0], inputs[0]), node.outputs
      inputs, source[out] = (first,), first
      if graph.tensors[first].shape == graph.tensors[out].shape:
        same[out] = first
        continue
    nodes.append(node._replace(inputs=inputs))
  outputs = tuple(same.get(name, name) for name in graph.outputs)
  return without_dead(dataclasses.replace(graph, nodes=tuple(nodes), outputs=outputs))
