"""From any jittable function to the graph that leaves JAX."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node, Tensor
from fqjax.tracing import _convert, _jaxpr, _writer
from fqjax.tracing._evaluate import evaluate, evaluate_node
from fqjax.tracing._jaxpr import Operation, Program, Value

# Tables this large, spread out from something smaller, are made again at every run.
_LARGE = 4096
# What depends on no input and no parameter is computed while tracing, up to this many elements.
_LARGEST = 1 << 24
# Constants up to this size are compared with each other.
_SMALL = 16


class _Unused:
  def __repr__(self):
    return 'UNUSED'


UNUSED = _Unused()


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
  """A graph and the trees around it.

  Attributes:
    graph: of the function.
    variables: structure of the first argument.
    inputs: structure of the other arguments.
    static: leaves of all arguments that are not arrays, None where an array of the graph stands,
      `UNUSED` where an array that nothing reads cannot be in it (random keys); the variables'
      first.
    outputs: structure of the result.
  """

  graph: Graph
  variables: Any
  inputs: Any
  static: tuple[Any, ...]
  outputs: Any

  def parameters(self, variables: Any) -> dict[str, Any]:
    """Path -> array.

    Args:
      variables: a tree like the traced one; shapes may differ.

    Raises:
      ValueError: a tree of another structure.
    """
    leaves, tree = jax.tree.flatten(variables)
    if tree != self.variables:
      raise ValueError(f'the variables have another structure than the traced ones:\n  {tree}')
    arrays = [leaf for leaf, s in zip(leaves, self.static, strict=False) if s is None]
    return dict(zip(self.graph.parameters, arrays, strict=True))

  def __call__(self, variables: Any, *inputs: Any) -> Any:
    """Runs the graph like the function; under jit, vmap and grad too.

    Args:
      variables: tree of arrays, of the graph's shapes.
      *inputs: like those traced, the batch may be another.

    Raises:
      ValueError: trees or arrays the graph is not for.
    """
    leaves, tree = jax.tree.flatten(inputs)
    static = self.static[self.variables.num_leaves :]
    if tree != self.inputs:
      raise ValueError(f'the inputs have another structure than the traced ones:\n  {tree}')
    for leaf, fixed in zip(leaves, static, strict=True):
      if fixed is None or fixed is UNUSED:
        continue
      if _jaxpr._is_array(leaf) or leaf != fixed:
        raise ValueError(f'{fixed!r} was fixed when tracing, got {leaf!r}; trace again.')
    arrays = [leaf for leaf, fixed in zip(leaves, static, strict=True) if fixed is None]
    results = evaluate(self.graph, self.parameters(variables), arrays)
    return jax.tree.unflatten(self.outputs, results)


def to_graph(
  apply_fn: Callable, variables: Any, *inputs: Any, batch_axis: int | None = 0
) -> Traced:
  """Traces `apply_fn(variables, *inputs)` to a graph; nothing of the network is computed.

  Args:
    apply_fn: any function JAX can trace. Arrays it captured become constants.
    variables: tree whose arrays are the parameters, named by their paths; only shapes and types
      are looked at.
    *inputs: example inputs: trees of arrays or `jax.ShapeDtypeStruct`s; other leaves are fixed.
      Keyword arguments: bind them first (`functools.partial(apply_fn, train=False)`).
    batch_axis: axis of every input array that stays open ('n'); None fixes all sizes.

  Returns:
    The graph with the structures of arguments and result; calling it runs it.

  Raises:
    ValueError: every primitive the graph cannot hold, with its scope and what to write instead; or
      the network needs to know its batch.

  Example:
    >>> def dense(params, x):
    ...   return jax.nn.relu(x @ params['kernel'])
    >>> traced = to_graph(dense, {'kernel': jnp.ones((3, 4))}, jnp.ones((8, 3)))
    >>> print(traced.graph.nodes[0])
    dot(input, kernel) contract=((1,), (0,)) batch=((), ()) dtype='float32' precision='default'
    >>> traced({'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))).shape
    (2, 4)
  """
  program, static, out_tree = _trace(apply_fn, variables, inputs, batch_axis)
  writer = _Writer()
  program, static = _without_keys(program, static)
  named = list(zip(_names([v.name for v in program.inputs]), program.inputs, strict=True))
  parameters = [name for name, value in named if _is_first(value)]
  data = [name for name, value in named if not _is_first(value)]
  for name, value in named:
    writer.declare(name, value)
  writer.run(program)
  if writer.obstacles:
    raise ValueError(_refusal(writer.obstacles))
  graph = Graph(
    inputs=tuple(data),
    parameters=tuple(parameters),
    constants=writer.values,
    nodes=tuple(writer.nodes),
    outputs=tuple(map(writer.read, program.outputs)),
    tensors=writer.tensors,
  )
  graph = _tidy(graph)
  graph_lib.validate(graph)
  return Traced(graph, jax.tree.structure(variables), jax.tree.structure(inputs), static, out_tree)


def _trace(apply_fn, variables, inputs, batch_axis) -> tuple[Program, tuple[Any, ...], Any]:
  """The flat program, the static leaves and the structure of the result."""
  leaves = jax.tree.leaves((variables, *inputs))
  static = tuple(None if _jaxpr._is_array(leaf) else leaf for leaf in leaves)
  found: list[Any] = []

  def call(*args):
    out = apply_fn(*args)
    found[:] = [jax.tree.structure(out)]
    return out

  if batch_axis is None:
    program = _jaxpr.trace(call, variables, *inputs)
  else:
    [n] = jax.export.symbolic_shape('n')

    def open_batch(leaf):
      if not _jaxpr._is_array(leaf) or leaf.ndim <= batch_axis:
        return leaf
      shape = leaf.shape[:batch_axis] + (n,) + leaf.shape[batch_axis + 1 :]
      return jax.ShapeDtypeStruct(shape, leaf.dtype)

    try:
      program = _jaxpr.trace(call, variables, *jax.tree.map(open_batch, inputs))
    except Exception as error:
      # JAX has no common type for all that can go wrong with an unknown size.
      try:
        _jaxpr.trace(call, variables, *inputs)
      except Exception:
        raise error from None
      raise ValueError(
        'the network cannot be traced for any batch; batch_axis=None traces the size of the '
        f'example.\n  {str(error).splitlines()[0] if str(error) else type(error).__name__}'
      ) from error
  [out_tree] = found
  if out_tree.num_leaves != len(program.outputs):
    raise ValueError('the function returns leaves that are not arrays; return arrays only.')
  return program, static, out_tree


def _without_keys(program: Program, static: tuple) -> tuple[Program, tuple[Any, ...]]:
  """Leaves out arguments of types the graph has not, such as keys, where nothing reads them."""
  read = {value for op in program.operations for value in op.inputs} | set(program.outputs)
  kept = [v for v in program.inputs if v in read or str(v.dtype) in oplist.DTYPES]
  values = iter(program.inputs)
  marks = [s if s is not None else (None if next(values) in kept else UNUSED) for s in static]
  return program._replace(inputs=tuple(kept)), tuple(marks)


def _is_first(value: Value) -> bool:
  return value.name == '0' or value.name.startswith('0/')


def _names(paths: list[str]) -> list[str]:
  """Names of the arguments: parameters by path, data 'input', 'input/1', ..."""
  single = sum(not (p == '0' or p.startswith('0/')) for p in paths) == 1
  names: list[str] = []
  for path in paths:
    first, _, rest = path.partition('/')
    if first == '0':
      name = rest or 'params'
    else:
      name = 'input' if single else '/'.join(filter(None, ('input', str(int(first) - 1), rest)))
    while name in names or name.startswith(('%', '#')):
      name = f'{name}_'
    names.append(name)
  return names


def _refusal(obstacles: list[tuple[str, str, str]]) -> str:
  counted: dict[tuple[str, str, str], int] = {}
  for obstacle in obstacles:
    counted[obstacle] = counted.get(obstacle, 0) + 1
  lines = [
    f'  {primitive} in {scope or "no scope"}{f" ({times} times)" if times > 1 else ""}: {text}'
    for (scope, primitive, text), times in counted.items()
  ]
  noun = 'operation has' if len(lines) == 1 else 'operations have'
  return '\n'.join([f'{len(lines)} {noun} no place in a graph.', *lines])


class _Writer:
  """Collects nodes; see `_writer.Writer` for what converters see of it."""

  def __init__(self):
    self.nodes: list[Node] = []
    self.tensors: dict[str, Tensor] = {}
    self.values: dict[str, np.ndarray] = {}  # what is known while tracing
    self.obstacles: list[tuple[str, str, str]] = []  # scope, primitive, remedy
    self.lost: set[Value] = set()
    self._noise: set[Value] = set()  # random keys and numbers
    self._names: dict[Value, str] = {}
    self._constants: dict[Any, str] = {}
    self._scope = ''

  def declare(self, name: str, value: Value) -> None:
    try:
      shape, dtype = _writer.shape_of(value.shape), _writer.dtype_of(value.dtype)
    except _writer.Unsupported as error:
      self.obstacles.append(('', f'argument {name}', str(error)))
      self.lost.add(value)
      if 'key' in str(value.dtype):
        self._noise.add(value)
      return
    self.tensors[name] = Tensor(name, shape, dtype)
    self.bind(value, name)

  def run(self, program: Program) -> None:
    outer = self._scope
    for op in program.operations:
      self._scope = op.scope
      self._step(op)
    self._scope = outer

  def _step(self, op: Operation) -> None:
    if not op.outputs:
      return  # prints and checks
    known = lambda value: value.constant is not None or self._names.get(value) in self.values
    drawn = [value for value in op.inputs if not known(value)]
    if drawn and self._noise.issuperset(drawn):
      # What is made of random numbers alone is one obstacle, not twenty.
      self._noise.update(op.outputs)
      self.lost.update(op.outputs)
      return
    try:
      if self.lost.intersection(op.inputs):
        # What went before has no words; see at least whether this has.
        if op.name not in _convert._CONVERTERS:
          _writer.fail(_writer.remedy(op.name))
        raise _writer.Lost
      _convert.convert(self, op)
    except _writer.Lost:
      self.lost.update(op.outputs)
    except _writer.Unsupported as error:
      self.obstacles.append((op.scope, op.name, str(error)))
      self.lost.update(op.outputs)
      if str(error) == _writer.remedy('random'):
        self._noise.update(op.outputs)

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

  def write(self, op: str, *inputs: str, **attributes: Any) -> list[str]:
    types = [(self.tensors[name].shape, self.tensors[name].dtype) for name in inputs]
    try:
      results = oplist.infer(op, types, attributes)
    except ValueError as error:
      # JAX allows more: part of the batch, mostly.
      raise _writer.Unsupported(f'as {op}: {error}') from None
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


def _tidy(graph: Graph) -> Graph:
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
  return dataclasses.replace(
    graph,
    constants={names[name]: array for name, array in graph.constants.items()},
    nodes=tuple(
      node._replace(
        inputs=tuple(names[name] for name in node.inputs),
        outputs=tuple(names[name] for name in node.outputs),
      )
      for node in graph.nodes
    ),
    outputs=tuple(names[name] for name in graph.outputs),
    tensors={
      names[name]: tensor._replace(name=names[name])
      for name, tensor in graph.tensors.items()
      if name in names
    },
  )
