"""The graph that tracing makes, the artifact stores, and every executor runs.

A graph is a list of nodes in order of execution over named tensors. Its operations are a closed,
versioned list (`fqjax.runtime.oplist`) with NumPy's meaning; everything in it is numbers, text and
tuples, so that it can be written as JSON. One axis size may stay open: the batch, written 'n', or a
multiple of it, '49*n'.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime.dims import Shape

VERSION = 1


class Tensor(NamedTuple):
  """What is known of a tensor before anything runs.

  Attributes:
    name: unique in its graph; the path for a parameter.
    shape: whole numbers, or the batch: 'n', '49*n'.
    dtype: NumPy's name for it, and 'bfloat16'.
  """

  name: str
  shape: Shape
  dtype: str

  def __str__(self) -> str:
    return f'{self.name}: {self.dtype}[{", ".join(map(str, self.shape))}]'


class Node(NamedTuple):
  """One operation.

  Attributes:
    op: name from the list.
    inputs: names of the tensors read.
    outputs: names of the tensors written.
    attributes: exactly those the operation has; numbers, text, tuples of them.
    scope: where it comes from, 'ResNet/layer1_0/conv1'; for messages only.
  """

  op: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  attributes: Mapping[str, Any] = {}
  scope: str = ''

  def __str__(self) -> str:
    words = [f'{self.op}({", ".join(self.inputs)})']
    words += [f'{key}={value!r}' for key, value in self.attributes.items()]
    return ' '.join(words)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """A function of named tensors; `str(graph)` is readable, `validate(graph)` checks it.

  Attributes:
    inputs: tensors the caller gives.
    parameters: tensors that come with the network, by path.
    constants: name -> array, for what the function had in it.
    nodes: in order of execution.
    outputs: what it returns, in order; a name may occur twice.
    tensors: name -> description, for all of the above and every node's outputs.
    version: of the list of operations.

  Example:
    >>> x, y = Tensor('x', ('n', 3), 'float32'), Tensor('y', ('n', 3), 'float32')
    >>> graph = Graph(('x',), (), {}, (Node('tanh', ('x',), ('y',)),), ('y',), {'x': x, 'y': y})
    >>> print(graph)
    graph, operations of version 1
    input x: float32[n, 3]
    y: float32[n, 3] = tanh(x)
    return y
  """

  inputs: tuple[str, ...]
  parameters: tuple[str, ...]
  constants: Mapping[str, np.ndarray]
  nodes: tuple[Node, ...]
  outputs: tuple[str, ...]
  tensors: Mapping[str, Tensor]
  version: int = VERSION

  def __str__(self) -> str:
    return '\n'.join(self._lines())

  def _lines(self) -> Iterator[str]:
    yield f'graph, operations of version {self.version}'
    yield from (f'input {self.tensors[name]}' for name in self.inputs)
    yield from (f'parameter {self.tensors[name]}' for name in self.parameters)
    for name, array in self.constants.items():
      value = f' = {array.item()!r}' if array.size == 1 else ''
      yield f'constant {self.tensors[name]}{value}'
    for node in self.nodes:
      outputs = ', '.join(str(self.tensors[name]) for name in node.outputs)
      yield f'{outputs} = {node}' + (f'  # {node.scope}' if node.scope else '')
    yield f'return {", ".join(self.outputs)}'


def batch_size(graph: Graph, shapes: Sequence[Sequence[int]]) -> int | None:
  """The batch that arrays of these shapes bring; None for a graph without an open batch.

  Args:
    graph: whose inputs they are.
    shapes: one per input, in order.

  Raises:
    ValueError: a shape that is not the input's, or two that bring different batches.
  """
  if len(shapes) != len(graph.inputs):
    raise ValueError(f'the graph takes {len(graph.inputs)} inputs, got {len(shapes)}.')
  found: int | None = None
  for name, shape in zip(graph.inputs, shapes, strict=True):
    tensor = graph.tensors[name]
    fits = len(shape) == len(tensor.shape)
    for dim, size in zip(tensor.shape, shape, strict=False):
      times, symbolic = dims.split(dim)
      if not symbolic:
        fits = fits and size == times
      elif found is None and size % times == 0:
        found = size // times
      else:
        fits = fits and size == times * (found or 0)
    if not fits:
      batch = '' if found is None else f' (n = {found})'
      raise ValueError(f'the graph takes {tensor}{batch}, got an array {list(shape)}.')
  return found


def consumers(graph: Graph) -> dict[str, list[int]]:
  """Tensor name -> positions of the nodes that read it, one entry per reading."""
  found: dict[str, list[int]] = {name: [] for name in graph.tensors}
  for i, node in enumerate(graph.nodes):
    for name in node.inputs:
      found[name].append(i)
  return found


def without_dead(graph: Graph) -> Graph:
  """Drops nodes and constants that reach no output; inputs and parameters stay.

  Example:
    >>> x, y = (Tensor(name, (3,), 'float32') for name in 'xy')
    >>> graph = Graph(('x',), (), {}, (Node('exp', ('x',), ('y',)),), ('x',), {'x': x, 'y': y})
    >>> without_dead(graph).nodes
    ()
  """
  live = set(graph.outputs)
  kept = []
  for node in reversed(graph.nodes):
    if live.intersection(node.outputs):
      kept.append(node)
      live.update(node.inputs)
  constants = {name: array for name, array in graph.constants.items() if name in live}
  named = {*graph.inputs, *graph.parameters, *constants}
  named.update(name for node in kept for name in node.outputs)
  return dataclasses.replace(
    graph,
    constants=constants,
    nodes=tuple(reversed(kept)),
    tensors={name: tensor for name, tensor in graph.tensors.items() if name in named},
  )


def rename(graph: Graph, names: Mapping[str, str]) -> Graph:
  """Gives tensors other names; constants that get one name become one.

  Args:
    graph: any.
    names: old -> new; what is missing keeps its name.

  Example:
    >>> x, y = (Tensor(name, (3,), 'float32') for name in 'xy')
    >>> graph = Graph(('x',), (), {}, (Node('exp', ('x',), ('y',)),), ('y',), {'x': x, 'y': y})
    >>> print(rename(graph, {'x': 'image'}).nodes[0])
    exp(image)
  """
  new = lambda old: names.get(old, old)
  many = lambda olds: tuple(map(new, olds))
  return dataclasses.replace(
    graph,
    inputs=many(graph.inputs),
    parameters=many(graph.parameters),
    constants={new(name): array for name, array in graph.constants.items()},
    nodes=tuple(
      node._replace(inputs=many(node.inputs), outputs=many(node.outputs)) for node in graph.nodes
    ),
    outputs=many(graph.outputs),
    tensors={new(name): t._replace(name=new(name)) for name, t in graph.tensors.items()},
  )


def validate(graph: Graph) -> None:
  """Checks a graph from end to end; every shape and type is worked out again.

  Raises:
    ValueError: what is wrong, with the node or the tensor it is wrong in.
  """
  if graph.version != VERSION:
    raise ValueError(
      f'the graph uses version {graph.version} of the operations, this fqjax reads {VERSION}; '
      f'{"update fqjax" if graph.version > VERSION else "trace it again"}.'
    )
  for name, tensor in graph.tensors.items():
    check_tensor(name, tensor)
  known: set[str] = set()
  for name in (*graph.inputs, *graph.parameters, *graph.constants):
    if name not in graph.tensors:
      raise ValueError(f'tensor {name!r} is not described in graph.tensors.')
    if name in known:
      raise ValueError(f'tensor {name!r} is named twice among inputs, parameters and constants.')
    known.add(name)
  for name, array in graph.constants.items():
    tensor = graph.tensors[name]
    if tuple(array.shape) != tensor.shape or str(array.dtype) != tensor.dtype:
      raise ValueError(f'constant {tensor} holds an array {array.dtype}{list(array.shape)}.')
  for i, node in enumerate(graph.nodes):
    _check_node(
      graph, node, f'node {i}, {node.op}' + (f' ({node.scope})' if node.scope else ''), known
    )
    known.update(node.outputs)
  if missing := [name for name in graph.outputs if name not in known]:
    raise ValueError(f'the graph returns {missing[0]!r}, which nothing makes.')
  if unused := set(graph.tensors) - known:
    raise ValueError(f'tensor {min(unused)!r} is described, and nothing makes it.')


def check_tensor(name: str, tensor: Tensor) -> None:
  """Checks the description of a tensor.

  Args:
    name: under which it is found.
    tensor: the description.

  Raises:
    ValueError: another name in it, a type that no operation takes, or no shape.
  """
  if tensor.name != name:
    raise ValueError(f'tensor {name!r} is described under the name {tensor.name!r}.')
  if tensor.dtype not in oplist.DTYPES:
    raise ValueError(f'tensor {tensor}: dtype must be one of {", ".join(oplist.DTYPES)}.')
  if not dims.is_shape(tensor.shape):
    raise ValueError(
      f"tensor {tensor}: every size is a whole number >= 0, 'n', or a multiple such as '49*n'."
    )


def _check_node(graph: Graph, node: Node, where: str, known: set[str]) -> None:
  for name in node.inputs:
    if name not in known:
      raise ValueError(f'{where}: reads {name!r} before anything has made it.')
  for j, name in enumerate(node.outputs):
    if name not in graph.tensors:
      raise ValueError(f'{where}: writes {name!r}, which is not described in graph.tensors.')
    if name in known or name in node.outputs[:j]:
      raise ValueError(f'{where}: writes {name!r}, which exists already.')
  types = [(graph.tensors[name].shape, graph.tensors[name].dtype) for name in node.inputs]
  try:
    inferred = oplist.infer(node.op, types, node.attributes)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  if len(inferred) != len(node.outputs):
    raise ValueError(f'{where}: makes {len(inferred)} outputs, {len(node.outputs)} are named.')
  for name, (shape, dtype) in zip(node.outputs, inferred, strict=True):
    tensor = graph.tensors[name]
    if (tensor.shape, tensor.dtype) != (shape, dtype):
      raise ValueError(f'{where}: makes {Tensor(name, shape, dtype)}, described as {tensor}.')
