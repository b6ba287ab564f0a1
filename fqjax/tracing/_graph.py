"""From any jittable function to the graph that leaves JAX."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from fqjax.runtime import graph as graph_lib
from fqjax.runtime import oplist
from fqjax.runtime.graph import Graph
from fqjax.tracing import _jaxpr
from fqjax.tracing._evaluate import evaluate
from fqjax.tracing._jaxpr import Program, Value
from fqjax.tracing._nodes import Nodes, tidy
from fqjax.tracing._source import Obstacle, Report, error_line
from fqjax.tracing._writer import FIXED


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


class NeedsBatchError(ValueError):
  """The function runs for the example's batch and not for an unknown one.

  Attributes:
    obstacle: where and why.
  """

  def __init__(self, obstacle: Obstacle):
    super().__init__(
      "the network cannot be traced for any batch; batch_axis=None traces the example's "
      f"(batch='fixed' exports it).\n  {obstacle}"
    )
    self.obstacle = obstacle


def to_graph(apply_fn: Callable, variables: Any, *inputs: Any, batch_axis: Any = 0) -> Traced:
  """Traces `apply_fn(variables, *inputs)` to a graph; nothing of the network is computed.

  Args:
    apply_fn: any function JAX can trace. Arrays it captured become constants.
    variables: tree whose arrays are the parameters, named by their paths; only shapes and types
      are looked at.
    *inputs: example inputs: trees of arrays or `jax.ShapeDtypeStruct`s; other leaves are fixed.
      Keyword arguments: bind them first (`functools.partial(apply_fn, train=False)`).
    batch_axis: axis of every input array that stays open ('n'); None fixes all sizes. Or a tuple
      with an entry for each input, or a tree of which each of them is a part, as for `jax.vmap`.

  Returns:
    The graph with the structures of arguments and result; calling it runs it.

  Raises:
    ValueError: every primitive the graph cannot hold, with its scope, what to write instead and
      the line of code; or the network needs to know its batch, or inputs differ in it.

  Example:
    >>> def dense(params, x):
    ...   return jax.nn.relu(x @ params['kernel'])
    >>> traced = to_graph(dense, {'kernel': jnp.ones((3, 4))}, jnp.ones((8, 3)))
    >>> print(traced.graph.nodes[0])
    dot(input, kernel) contract=((1,), (0,)) batch=((), ()) dtype='float32' precision='default'
    >>> traced({'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))).shape
    (2, 4)
  """
  program, static, out_tree = trace_any(apply_fn, variables, inputs, batch_axis)
  program, static = _without_keys(program, static)
  nodes, parameters, data = collect(program)
  if nodes.obstacles:
    raise ValueError(str(Report(nodes.obstacles)))
  graph = Graph(
    inputs=data,
    parameters=parameters,
    constants=nodes.values,
    nodes=tuple(nodes.nodes),
    outputs=tuple(map(nodes.read, program.outputs)),
    tensors=nodes.tensors,
  )
  graph = tidy(graph)
  graph_lib.validate(graph)
  return Traced(graph, jax.tree.structure(variables), jax.tree.structure(inputs), static, out_tree)


def collect(program: Program) -> tuple[Nodes, tuple[str, ...], tuple[str, ...]]:
  """Nodes and obstacles of a program whose first argument are the parameters.

  Returns:
    The nodes, the names of the parameters and those of the inputs.
  """
  nodes = Nodes()
  names = _names([value.name for value in program.inputs])
  for name, value in zip(names, program.inputs, strict=True):
    nodes.declare(name, value)
  nodes.run(program)
  first = [_is_first(value) for value in program.inputs]
  parameters = tuple(name for name, is_first in zip(names, first, strict=True) if is_first)
  return nodes, parameters, tuple(name for name in names if name not in parameters)


def trace_any(
  apply_fn: Callable, variables: Any, inputs: tuple[Any, ...], batch_axis: Any
) -> tuple[Program, tuple[Any, ...], Any]:
  """The flat program, the static leaves and the structure of the result.

  Raises:
    NeedsBatchError: only the fixed batch can be traced.
    ValueError: results that are not arrays, or inputs of different batches.
    Exception: whatever the function raises.
  """
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
    opened = _open(inputs, batch_axis)
    try:
      program = _jaxpr.trace(call, variables, *opened)
    except Exception as error:
      # JAX has no common type for all that can go wrong with an unknown size.
      try:
        _jaxpr.trace(call, variables, *inputs)
      except Exception:
        raise error from None
      said = str(error).splitlines()[0] if str(error) else ''
      raise NeedsBatchError(
        Obstacle('', type(error).__name__, error_line(error.__traceback__), f'{said} - {FIXED}')
      ) from error
  [out_tree] = found
  if out_tree.num_leaves != len(program.outputs):
    raise ValueError('the function returns leaves that are not arrays; return arrays only.')
  return program, static, out_tree


def _open(inputs: tuple[Any, ...], batch_axis: Any) -> Any:
  """The inputs as shapes with an open batch."""
  [n] = jax.export.symbolic_shape('n')
  is_none = lambda leaf: leaf is None
  leaves, tree = jax.tree.flatten(inputs, is_leaf=is_none)
  every = isinstance(batch_axis, int)
  if every:
    axes = [batch_axis] * len(leaves)
  else:
    axes = jax.tree.leaves(jax.tree.broadcast(batch_axis, inputs, is_leaf=is_none), is_leaf=is_none)
  sizes: set[int] = set()
  opened = []
  for leaf, axis in zip(leaves, axes, strict=True):
    if axis is None or not _jaxpr._is_array(leaf) or (every and leaf.ndim <= axis):
      opened.append(leaf)
      continue
    if not 0 <= axis < leaf.ndim:
      raise ValueError(f'batch_axis {axis} is not an axis of an input {list(leaf.shape)}.')
    sizes.add(leaf.shape[axis])
    shape = (*leaf.shape[:axis], n, *leaf.shape[axis + 1 :])
    opened.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
  if len(sizes) > 1:
    raise ValueError(
      f'the batch is {" and ".join(map(str, sorted(sizes)))} in the inputs; give a tuple with the '
      'batch axis of each of them, None where there is none.'
    )
  return jax.tree.unflatten(tree, opened)


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
