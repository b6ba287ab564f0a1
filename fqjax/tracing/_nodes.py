"""Nodes collected one by one: what converters write to, and the obstacles they meet."""

import dataclasses
from typing import Any

import jax
import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node, Tensor
from fqjax.tracing import _convert, _writer
from fqjax.tracing._evaluate import evaluate_node
from fqjax.tracing._jaxpr import Operation, Program, Value, without_dead
from fqjax.tracing._source import Obstacle, source_line

# Tables this large, spread out from something smaller, are made again at every run.
_LARGE = 4096
# What depends on no input and no parameter is computed while tracing, up to this many elements.
_LARGEST = 1 << 24
# Constants up to this size are compared with each other.
_SMALL = 16


class Nodes:
  """Collects nodes; see `_writer.Writer` for what converters see of it."""

  def __init__(self):
    self.nodes: list[Node] = []
    self.tensors: dict[str, Tensor] = {}
    self.values: dict[str, np.ndarray] = {}  # what is known while tracing
    self.counts: set[str] = set()
    self._met: dict[Obstacle, int] = {}
    self.lost: set[Value] = set()
    self._noise: set[Value] = set()  # random keys and numbers
    self._spectra: set[Value] = set()  # complex results
    self._names: dict[Value, str] = {}
    self._constants: dict[Any, str] = {}
    self._scope = ''

  @property
  def obstacles(self) -> tuple[Obstacle, ...]:
    """Everything that has no place in a graph, in order."""
    return tuple(obstacle._replace(times=times) for obstacle, times in self._met.items())

  def _meet(self, obstacle: Obstacle) -> None:
    self._met[obstacle] = self._met.get(obstacle, 0) + 1

  def declare(self, name: str, value: Value) -> None:
    try:
      shape, dtype = _writer.shape_of(value.shape), _writer.dtype_of(value.dtype)
    except _writer.Unsupported as error:
      self._meet(Obstacle('', f'argument {name}', '', str(error)))
      self.lost.add(value)
      if 'key' in str(value.dtype):
        self._noise.add(value)
      return
    self.tensors[name] = Tensor(name, shape, dtype)
    self.bind(value, name)

  def run(self, program: Program) -> None:
    outer = self._scope
    for op in _without_empty(program).operations:
      self._scope = op.scope
      self._step(op)
    self._scope = outer

  def _step(self, op: Operation) -> None:
    if not op.outputs:
      return  # prints and checks
    known = lambda value: value.constant is not None or self._names.get(value) in self.values
    drawn = [value for value in op.inputs if not known(value)]
    # What is made of random or complex numbers alone is one obstacle, not twenty.
    if drawn and self._noise.issuperset(drawn):
      self._noise.update(op.outputs)
      self._stand_in(op)
      return
    if drawn and self._spectra.issuperset(drawn):
      self._spectra.update(filter(_is_complex, op.outputs))
      self._stand_in(op)
      return
    try:
      if self.lost.intersection(op.inputs):
        # What went before has no words; see at least whether this has.
        if op.name not in _convert._CONVERTERS:
          _writer.fail(_writer.remedy(op.name))
        raise _writer.Lost
      _convert.convert(self, op)
    except _writer.Lost:
      self._stand_in(op)
    except _writer.Unsupported as error:
      where = source_line(op.tracebacks)
      self._meet(Obstacle(op.scope, error.primitive or op.name, where, str(error)))
      self._stand_in(op)
      if op.name not in _convert._CONVERTERS:
        self._spectra.update(filter(_is_complex, op.outputs))
      if str(error) == _writer.remedy('random'):
        self._noise.update(op.outputs)

  def _stand_in(self, op: Operation) -> None:
    """Something of the same shape for what cannot be made, so that all that follows is looked at."""
    for value in op.outputs:
      try:
        shape, dtype = _writer.shape_of(value.shape), _writer.dtype_of(value.dtype)
      except _writer.Unsupported:
        self.lost.add(value)
        continue
      name = f'?{len(self.tensors)}'
      self.tensors[name] = Tensor(name, shape, dtype)
      self.bind(value, name)

  def read(self, value: Value) -> str:
    if value in self.lost:
      raise _writer.Lost
    if value.constant is not None and value not in self._names:
      self.bind(value, self.constant(np.asarray(value.constant, value.dtype)))
    return self._names[value]

  def bind(self, value: Value, name: str) -> None:
    self._names[value] = name

  def constant(self, array: np.ndarray) -> str:
    dtype = _writer.dtype_of(array.dtype)
    key = (dtype, array.shape, array.tobytes()) if array.size <= _SMALL else id(array)
    if key not in self._constants:
      name = f'#{len(self._constants)}'
      self._constants[key] = name
      self.tensors[name] = Tensor(name, array.shape, dtype)
      self.values[name] = array
    return self._constants[key]

  def known(self, name: str) -> np.ndarray | None:
    return self.values.get(name)

  def shape(self, name: str) -> dims.Shape:
    return self.tensors[name].shape

  def dtype(self, name: str) -> str:
    return self.tensors[name].dtype

  def write(self, op: str, *inputs: str, **attributes: Any) -> list[str]:
    types = [(self.tensors[name].shape, self.tensors[name].dtype) for name in inputs]
    try:
      results = oplist.infer(op, types, attributes)
    except ValueError as error:
      # JAX allows more: part of the batch, mostly.
      way_out = f', or {_writer.FIXED}' if 'batch' in str(error) else ''
      raise _writer.Unsupported(f'as {op}: {error}{way_out}') from None
    names = [
      f'%{len(self.nodes)}' if i == 0 else f'%{len(self.nodes)}.{i}' for i in range(len(results))
    ]
    for name, (shape, dtype) in zip(names, results, strict=True):
      self.tensors[name] = Tensor(name, shape, dtype)
    node = Node(op, inputs, tuple(names), attributes, self._scope)
    self.nodes.append(node)
    if all(name in self.values for name in inputs) and all(
      power == 0 and count <= _LARGEST for count, power in map(dims.size, (s for s, _ in results))
    ):
      with jax.ensure_compile_time_eval():
        arrays = evaluate_node(node, [self.values[name] for name in inputs])
      self.values |= zip(names, map(np.asarray, arrays), strict=True)
    return names


def _is_complex(value: Value) -> bool:
  return 'complex' in str(value.dtype)


def _without_empty(program: Program) -> Program:
  """Joins without the parts that hold nothing: jnp.pad cuts the batch for them."""
  operations = []
  for op in program.operations:
    if op.name == 'concatenate':
      axis = op.params['dimension']
      parts = tuple(value for value in op.inputs if value.shape[axis] != 0)
      op = op._replace(inputs=parts or op.inputs[:1])
    operations.append(op)
  return without_dead(program._replace(operations=tuple(operations)))


def tidy(graph: Graph) -> Graph:
  """Leaves out what is known and what is not needed, and numbers what is left."""

  def remade(node: Node) -> bool:
    count = sum(dims.size(graph.tensors[name].shape)[0] for name in node.outputs)
    return node.op in ('broadcast', 'iota') and count > _LARGE

  known = graph.constants
  nodes = [node for node in graph.nodes if node.outputs[0] not in known or remade(node)]
  made = {name for node in nodes for name in node.outputs}
  constants = {name: array for name, array in known.items() if name not in made}
  graph = graph_lib.without_dead(
    dataclasses.replace(graph, nodes=tuple(nodes), constants=constants)
  )
  names = {name: name for name in (*graph.inputs, *graph.parameters)}
  kept: dict[Any, str] = {}
  for name, array in graph.constants.items():
    # Equal numbers are one constant; large arrays are not compared.
    key = (str(array.dtype), array.shape, array.tobytes()) if array.size <= _SMALL else name
    names[name] = kept.setdefault(key, f'#{len(kept)}')
  outputs = (name for node in graph.nodes for name in node.outputs)
  names |= {name: f'%{i}' for i, name in enumerate(outputs)}
  return graph_lib.rename(graph, names)
