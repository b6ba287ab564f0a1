"""What depends on no input is computed once."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from fqjax.runtime import dims, reference
from fqjax.runtime.graph import Graph, Node, rename, without_dead

# Tables larger than this, spread out from something smaller, are made again at every run.
_LARGE = 4096


def bind_parameters(graph: Graph, parameters: Mapping[str, Any]) -> Graph:
  """Makes the parameters constants of the same names.

  Args:
    graph: any.
    parameters: path -> array, for all of `graph.parameters`.

  Returns:
    A graph without parameters; it shares the arrays.

  Raises:
    ValueError: a parameter is missing or has another shape or type.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> traced = to_graph(lambda p, x: x @ p['w'], {'w': jnp.eye(2)}, jnp.ones((1, 2)))
    >>> bind_parameters(traced.graph, {'w': np.eye(2, dtype=np.float32)}).constants['w'].shape
    (2, 2)
  """
  constants = dict(graph.constants)
  for name in graph.parameters:
    tensor = graph.tensors[name]
    if name not in parameters:
      raise ValueError(f'no value for the parameter {tensor}.')
    array = np.asarray(parameters[name])
    if array.shape != tensor.shape or str(array.dtype) != tensor.dtype:
      raise ValueError(f'the graph takes {tensor}, got {array.dtype}{list(array.shape)}.')
    constants[name] = array
  return dataclasses.replace(graph, parameters=(), constants=constants)


def fold_constants(graph: Graph) -> Graph:
  """Computes nodes whose inputs are constants, and drops what is not needed any more.

  Args:
    graph: of bound parameters, else nothing depends on constants alone.

  Returns:
    The graph; what was made of one parameter alone has its name, if that is free. Nodes that spread a small constant over more than 4,096 elements stay, and so do
    those in bfloat16, which NumPy has not.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> traced = to_graph(lambda p, x: x * jnp.exp(p['a']), {'a': jnp.float32(2)}, jnp.ones((1, 2)))
    >>> graph = bind_parameters(traced.graph, {'a': np.float32(2)})
    >>> [node.op for node in fold_constants(graph).nodes]
    ['mul']
  """
  constants = dict(graph.constants)
  # Constant -> the parameters it was made of.
  origin = {name: set() if name.startswith('#') else {name} for name in constants}
  nodes = []
  for node in graph.nodes:
    if _folds(graph, node, constants):
      made_of = set().union(*(origin[name] for name in node.inputs))
      origin |= dict.fromkeys(node.outputs, made_of)
      results = reference.run_node(node, [constants[name] for name in node.inputs])
      constants |= {
        name: np.asarray(array, graph.tensors[name].dtype)
        for name, array in zip(node.outputs, results, strict=True)
      }
    else:
      nodes.append(node)
  graph = without_dead(dataclasses.replace(graph, nodes=tuple(nodes), constants=constants))
  names: dict[str, str] = {}
  for name in graph.constants:
    if len(origin[name]) == 1:
      [parameter] = origin[name]
      if parameter not in graph.tensors and parameter not in names.values():
        names[name] = parameter
  return rename(graph, names)


def _folds(graph: Graph, node: Node, constants: Mapping[str, np.ndarray]) -> bool:
  if not all(name in constants for name in node.inputs):
    return False
  tensors = [graph.tensors[name] for name in (*node.inputs, *node.outputs)]
  if any(tensor.dtype == 'bfloat16' for tensor in tensors):
    return False
  sizes = [dims.size(tensor.shape) for tensor in tensors[len(node.inputs) :]]
  if any(power for _, power in sizes):
    return False
  return node.op not in ('broadcast', 'iota') or sizes[0][0] <= _LARGE
