"""One node after the other."""

from collections.abc import Mapping, Sequence

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node
from fqjax.runtime.reference._float import FLOAT
from fqjax.runtime.reference._integer import INTEGER

_RUN = {**FLOAT, **INTEGER}


def run(
  graph: Graph, inputs: Sequence[np.ndarray], parameters: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, ...]:
  """Runs a graph with NumPy.

  Args:
    graph: a valid graph; float and integer operations may stand side by side.
    inputs: arrays in the order of `graph.inputs`; they set the batch.
    parameters: path -> array, for all of `graph.parameters`; none are needed once they are
      constants.

  Returns:
    Arrays in the order of `graph.outputs`.

  Raises:
    ValueError: an array has not the shape or type of the graph's, a parameter is missing, NaN
      meets a `quantize`, or a sum could leave int32; naming the node.

  Example:
    >>> from fqjax.runtime.graph import Graph, Node, Tensor
    >>> x, y = Tensor('x', ('n', 2), 'float32'), Tensor('y', ('n', 2), 'uint8')
    >>> node = Node('quantize', ('x',), ('y',), {'scale': 0.5, 'zero': 128})
    >>> graph = Graph(('x',), (), {}, (node,), ('y',), {'x': x, 'y': y})
    >>> run(graph, [np.float32([[-1, 1]])])
    (array([[126, 130]], dtype=uint8),)
  """
  given = dict(parameters or {})
  if missing := [name for name in graph.parameters if name not in given]:
    raise ValueError(f'no value for the parameter {graph.tensors[missing[0]]}.')
  values = {name: np.asarray(given[name]) for name in graph.parameters}
  values |= {name: np.asarray(x) for name, x in zip(graph.inputs, inputs, strict=True)}
  batch = graph_lib.batch_size(graph, [np.shape(x) for x in inputs])
  for name, value in values.items():
    tensor = graph.tensors[name]
    if value.shape != dims.bind(tensor.shape, batch) or str(value.dtype) != tensor.dtype:
      raise ValueError(f'the graph takes {tensor}, got {value.dtype}{list(value.shape)}.')
  values |= graph.constants
  last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
  for i, node in enumerate(graph.nodes):
    try:
      results = run_node(node, [values[name] for name in node.inputs], batch)
      _check(graph, node, results, batch)
    except (ValueError, TypeError, OverflowError, IndexError, MemoryError) as error:
      where = f' ({node.scope})' if node.scope else ''
      raise ValueError(f'node {i}, {node.op}{where}: {error}') from error
    values |= zip(node.outputs, results, strict=True)
    for name in set(node.inputs) - set(graph.outputs):
      if last[name] == i:
        del values[name]
  return tuple(values[name] for name in graph.outputs)


def _check(graph: Graph, node: Node, results: Sequence[np.ndarray], batch: int | None) -> None:
  """Nothing goes on with another shape or type than the graph says."""
  for name, result in zip(node.outputs, results, strict=True):
    tensor = graph.tensors[name]
    if result.shape != dims.bind(tensor.shape, batch) or str(result.dtype) != tensor.dtype:
      raise ValueError(f'made {result.dtype}{list(result.shape)} where {tensor} should be.')


def run_node(
  node: Node, arrays: Sequence[np.ndarray], batch: int | None = None
) -> list[np.ndarray]:
  """Runs one node with NumPy.

  Args:
    node: any of the list, without bfloat16, which NumPy has not.
    arrays: its inputs.
    batch: what 'n' stands for in its attributes.

  Returns:
    Its outputs.

  Raises:
    ValueError: bfloat16, or what the operation refuses.
  """
  attributes = {
    key: dims.bind(value, batch) if oplist.OPS[node.op].attributes[key] == 'a shape' else value
    for key, value in node.attributes.items()
  }
  if 'bfloat16' in (attributes.get('dtype'), *(str(x.dtype) for x in arrays)):
    raise ValueError('NumPy has no bfloat16; trace the network in float32.')
  # As in XLA: infinities and NaN are values, not warnings.
  with np.errstate(all='ignore'):
    result = _RUN[node.op](*arrays, **attributes)
  return list(result) if isinstance(result, list) else [np.asarray(result)]
