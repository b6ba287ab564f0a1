"""A frozen graph seen as steps of integer arithmetic: what belongs together between two roundings.

Calibration, `fake_quant` and the integer graph all go through these steps, so that they agree about
which tensors are rounded.
"""

from collections.abc import Mapping, Sequence
import difflib
import re
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import oplist
from fqjax.runtime.graph import Graph, Node, consumers

# Values stay as they are, only their places change (or the largest of some is taken).
_SAME = (
  'reshape',
  'transpose',
  'slice',
  'reverse',
  'pool_max',
  'pool_min',
  'reduce_max',
  'reduce_min',
)
_POINTWISE = frozenset((
  *oplist.UNARY, *oplist.BINARY, *oplist.COMPARE, 'pow', 'integer_pow', 'round', 'is_finite', 'clamp',
  'select',
))  # fmt: skip


class Step(NamedTuple):
  """Nodes that integer arithmetic does in one go.

  Attributes:
    kind: 'conv', 'dot', 'add', 'concat', 'sum', 'pool_sum', 'table'; 'same' keeps the scale of its
      input; 'float' stays in float.
    nodes: in order.
    inputs: activations it reads.
    output: the activation it makes.
    details: what the kind needs: kernel and bias by name; factor; signs.
    low: smallest result of a clamp at its end, or None.
    high: largest.
  """

  kind: str
  nodes: tuple[Node, ...]
  inputs: tuple[str, ...]
  output: str
  details: Mapping[str, Any] = {}
  low: float | None = None
  high: float | None = None

  @property
  def integer(self) -> bool:
    """True for arithmetic that rounds its result."""
    return self.kind not in ('same', 'float')

  @property
  def where(self) -> str:
    """For messages: the operations and the layer they come from."""
    ops = '+'.join(node.op for node in self.nodes)
    return f'{ops} in {self.nodes[0].scope}' if self.nodes[0].scope else ops


def find_steps(graph: Graph, in_float: str = '') -> list[Step]:
  """Groups the nodes of a graph into steps.

  Args:
    graph: frozen; layers whose kernels are not constants stay in float.
    in_float: regex on the whole name of a layer, as nodes have it in `scope`
      ('ResNet/layer1_0/conv1'): layers that stay in float too; '' for none.

  Returns:
    Steps in an order of execution; together they hold every node once, except that the nodes of
    functions of single values may occur in several tables.

  Raises:
    ValueError: when `in_float` names no layer.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda p, x: jax.nn.relu(x @ p)
    >>> graph = freeze(to_graph(network, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> [(step.kind, step.low) for step in find_steps(graph)]
    [('dot', 0.0)]
  """
  return _Finder(graph).run(in_float)


def sources(graph: Graph, steps: Sequence[Step]) -> dict[str, str]:
  """Tensors that are stored as integers -> the tensor whose scale they have.

  Args:
    graph: frozen.
    steps: of `find_steps`.
  """
  found = {name: name for name in graph.inputs if graph.tensors[name].dtype == 'float32'}
  for step in steps:
    if step.integer:
      found[step.output] = step.output
    elif step.kind == 'same' and step.inputs[0] in found:
      found[step.output] = found[step.inputs[0]]
  return found


def activations(graph: Graph, in_float: str = '') -> tuple[str, ...]:
  """Names of the tensors that need a range of their own, in order of execution.

  Args:
    graph: frozen.
    in_float: layers that stay in float, as in `find_steps`.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda p, x: jax.nn.relu(x @ p)
    >>> activations(freeze(to_graph(network, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2)))
    ('input', '%1')
  """
  steps = find_steps(graph, in_float)
  found = sources(graph, steps)
  names: dict[str, None] = {}
  for step in steps:
    if step.kind != 'float':
      names |= {found.get(name, name): None for name in step.inputs}
    if step.integer:
      names[step.output] = None
  return tuple(names)


def layer_of(graph: Graph, name: str) -> str:
  """Where a tensor comes from, for messages."""
  if name in graph.inputs:
    return 'an input of the network'
  step = next((step for step in find_steps(graph) if step.output == name), None)
  return 'a value inside of a step' if step is None else step.where


def _settled(graph: Graph, steps: list[Step]) -> list[Step]:
  """Leaves in float what integers would only make worse: softmax, norms over features.

  That is what reads nothing but floats, and what nothing but floats are made of: the variance of a
  norm has many more values than 256. Layers stay integers wherever they stand.
  """
  integers = sources(graph, steps)
  in_float: dict[str, bool] = {}  # read by float steps only
  for step in steps:
    for name in step.inputs:
      in_float[name] = in_float.get(name, True) and step.kind == 'float'
  result = []
  for step in steps:
    made_of_floats = not any(name in integers for name in step.inputs)
    only_read = in_float.get(step.output, False) and step.output not in graph.outputs
    layer = step.kind in ('conv', 'dot')
    leave = step.kind != 'float' and not layer and (made_of_floats or only_read)
    result.append(_in_float(step) if leave else step)
  return result


def _chosen(steps: list[Step], in_float: str) -> list[Step]:
  """The layers that a user wants in float."""
  name = lambda step: step.nodes[0].scope
  if not any(re.fullmatch(in_float, name(step)) for step in steps if step.integer):
    layers = sorted({name(step) for step in steps if step.kind in ('conv', 'dot')})
    near = difflib.get_close_matches(in_float, layers, n=3, cutoff=0.0)
    raise ValueError(
      f'in_float={in_float!r} names no layer that would be integers. Closest: {", ".join(near)}.'
    )
  return [_in_float(step) if re.fullmatch(in_float, name(step)) else step for step in steps]


def _in_float(step: Step) -> Step:
  return Step('float', step.nodes, step.inputs, step.output)


class _Finder:
  def __init__(self, graph: Graph):
    self.graph = graph
    self.readers = consumers(graph)
    self.used: set[int] = set()
    self.found: list[tuple[int, Step]] = []

  def run(self, in_float: str) -> list[Step]:
    for i, node in enumerate(self.graph.nodes):
      if i not in self.used and self._is_float(node.outputs[0]):
        self._linear(i, node)
    self._tables()
    for i, node in enumerate(self.graph.nodes):
      if i not in self.used:
        self._rest(i, node)
    steps = [step for _, step in sorted(self.found, key=lambda pair: pair[0])]
    if in_float:
      steps = _chosen(steps, in_float)
    while (settled := _settled(self.graph, steps)) != steps:
      steps = settled
    return steps

  def _linear(self, i: int, node: Node) -> None:
    """Layers, sums and means with what follows them."""
    data = self._data(node)
    if node.op in ('conv', 'dot') and self._layer(node):
      # The bias, a factor and a clamp each have their turn.
      layer: dict[str, Any] = {'kernel': node.inputs[1], 'bias': None}
      chain = [i]
      if (after := self._after(i, 'add')) is not None:
        bias = self._other(after, node.outputs[0])
        if bias in self.graph.constants and self._is_bias(node, bias):
          layer['bias'] = bias
          chain.append(after)
      self._add(node.op, chain, data, layer)
    elif node.op in ('reduce_sum', 'pool_sum') and data:
      details: dict[str, Any] = {'factor': np.float64(1)}
      chain = [i]
      for op in ('mul', 'div'):
        if (after := self._after(i, op)) is None:
          continue
        other = self.graph.constants.get(self._other(after, node.outputs[0]))
        forward = op == 'mul' or self.graph.nodes[after].inputs[0] == node.outputs[0]
        if other is not None and forward and self._keeps_shape(after) and (other > 0).all():
          wide = other.astype(np.float64)
          details['factor'] = wide if op == 'mul' else 1 / wide
          chain.append(after)
      self._add('sum' if node.op == 'reduce_sum' else 'pool_sum', chain, data, details)
    elif node.op == 'concat' and len(data) == len(node.inputs):
      self._add('concat', [i], data, {'axis': node.attributes['axis']})

  def _layer(self, node: Node) -> bool:
    x, w = node.inputs
    if w not in self.graph.constants or x in self.graph.constants or not self._is_float(x):
      return False
    if node.op == 'conv':
      return True
    (left, right), batch = node.attributes['contract'], node.attributes['batch']
    last = len(self.graph.tensors[x].shape) - 1
    return (
      batch == ((), ())
      and left == (last,)
      and self.graph.constants[w].ndim == 2
      and len(right) == 1
    )

  def _is_bias(self, node: Node, name: str) -> bool:
    shape = self.graph.tensors[node.outputs[0]].shape
    axis = node.attributes['layout'][2].index('C') if node.op == 'conv' else len(shape) - 1
    array = self.graph.constants[name]
    return array.size == 1 or (array.ndim > axis and array.size == array.shape[axis])

  def _tables(self) -> None:
    """Functions of single values, however many nodes they take; sums of what is left."""
    root: dict[str, str] = {}
    chain: dict[str, list[int]] = {}
    for i, node in enumerate(self.graph.nodes):
      if i in self.used or node.op not in _POINTWISE:
        continue
      data = self._data(node)
      sources = {root.get(name, name) for name in data}
      scalar = all(self.graph.constants[n].size == 1 for n in node.inputs if n not in data)
      if (
        len(sources) == 1
        and scalar
        and self._keeps_shape(i)
        and self._is_float(next(iter(sources)))
      ):
        [out] = node.outputs
        [root[out]] = sources
        chain[out] = sorted({i}.union(*(chain.get(name, []) for name in data)))
    for out, members in chain.items():
      if not self._is_float(out):
        continue
      inside = all(
        j not in self.used and root.get(self.graph.nodes[j].outputs[0]) == root[out]
        for j in self.readers[out]
      )
      if out in self.graph.outputs or not inside:
        nodes = tuple(self.graph.nodes[j] for j in members)
        self.found.append((members[-1], Step('table', nodes, (root[out],), out)))
        self.used.update(members)
    for i, node in enumerate(self.graph.nodes):
      if i in self.used or node.op not in ('add', 'sub'):
        continue
      data = self._data(node)
      if len(set(data)) == 2 and all(map(self._is_float, data)) and self._keeps_shape(i, both=True):
        self._add('add', [i], data, {'signs': (1, -1 if node.op == 'sub' else 1)})

  def _rest(self, i: int, node: Node) -> None:
    data = self._data(node)
    same = node.op in _SAME or (node.op == 'pad' and self._pads_with_zero(node))
    kind = 'same' if same and len(data) == 1 and self._is_float(data[0]) else 'float'
    self.used.add(i)
    self.found.append((i, Step(kind, (node,), tuple(data), node.outputs[0])))

  def _add(self, kind: str, chain: list[int], data: Sequence[str], details: dict) -> None:
    low = high = None
    if (after := self._after(chain[-1], 'clamp')) is not None:
      low, high = (self.graph.nodes[after].attributes[key] for key in ('low', 'high'))
      chain = [*chain, after]
    nodes = tuple(self.graph.nodes[j] for j in chain)
    step = Step(kind, nodes, tuple(data), nodes[-1].outputs[0], details, low, high)
    self.used.update(chain)
    self.found.append((chain[-1], step))

  def _after(self, i: int, op: str) -> int | None:
    """The only reader of a node's result, if it is of this kind."""
    [name] = self.graph.nodes[i].outputs
    if name in self.graph.outputs or len(self.readers[name]) != 1:
      return None
    [j] = self.readers[name]
    return j if self.graph.nodes[j].op == op and j not in self.used else None

  def _data(self, node: Node) -> list[str]:
    return [name for name in node.inputs if name not in self.graph.constants]

  def _other(self, i: int, name: str) -> str:
    first, second = self.graph.nodes[i].inputs
    return second if first == name else first

  def _is_float(self, name: str) -> bool:
    return self.graph.tensors[name].dtype == 'float32'

  def _keeps_shape(self, i: int, both: bool = False) -> bool:
    """The result has the shape of one input that is data, or of both."""
    node = self.graph.nodes[i]
    shapes = [self.graph.tensors[name].shape for name in self._data(node)]
    hits = [shape == self.graph.tensors[node.outputs[0]].shape for shape in shapes]
    return all(hits) if both else any(hits)

  def _pads_with_zero(self, node: Node) -> bool:
    value = self.graph.constants.get(node.inputs[1])
    return value is not None and not value.any()
