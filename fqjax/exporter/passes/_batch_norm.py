"""Batch norm at inference is a multiplier and a bias per channel: the layer before has both."""

from collections.abc import Collection
import dataclasses
from typing import NamedTuple

import numpy as np

from fqjax.runtime.graph import Graph, Node, Tensor, consumers, without_dead


class _Affine(NamedTuple):
  """y = scale x + shift, per channel, float64."""

  scale: np.ndarray
  shift: np.ndarray


def fold_batch_norm(graph: Graph, keep: Collection[str] = ()) -> Graph:
  """Folds multiplications and additions per channel into the layer before them.

  A convolution or dense layer followed by any chain of `add`, `sub`, `mul`, `div` and `neg` with
  constants of one number per channel (or one for all) becomes that layer with another kernel and at
  most one `add`. Computed in float64, stored in the kernel's type.

  Args:
    graph: with constants folded, so that the chain's operands are constants.
    keep: names of kernels to leave as they are: folding turns K levels into K times the number of
      channels.

  Returns:
    The graph; results differ by rounding only. A chain behind a value that something else reads
    stays.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> traced = to_graph(lambda p, x: (x @ p - 1) * 3 + 2, jnp.eye(2), jnp.ones((1, 2)))
    >>> graph = dataclasses.replace(
    ...   traced.graph, parameters=(), constants={**traced.graph.constants, 'params': np.eye(2)}
    ... )
    >>> [node.op for node in fold_batch_norm(graph).nodes]
    ['dot', 'add']

  Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
  """
  readers = consumers(graph)
  constants, tensors = dict(graph.constants), dict(graph.tensors)
  dropped: set[int] = set()
  nodes: list[Node] = []
  for i, node in enumerate(graph.nodes):
    if i in dropped:
      continue
    chain, affine = _chain(graph, node, readers) if _kernel_of(graph, node, keep) else ([], None)
    if affine is None or [graph.nodes[j].op for j in chain] == ['add']:
      nodes.append(node)
      continue
    dropped.update(chain)
    kernel = node.inputs[1]
    last = graph.nodes[chain[-1]]
    name = _new(f'{kernel}:folded', constants)
    constants[name] = _scaled(node, graph.constants[kernel], affine.scale)
    tensors[name] = Tensor(name, constants[name].shape, str(constants[name].dtype))
    if not affine.shift.any():
      nodes.append(node._replace(inputs=(node.inputs[0], name), outputs=last.outputs))
      continue
    shape = [1] * len(tensors[node.outputs[0]].shape)
    shape[_channel(node, graph)] = affine.shift.size
    bias = _new(f'{kernel}:bias', constants)
    constants[bias] = affine.shift.reshape(shape).astype(constants[name].dtype)
    tensors[bias] = Tensor(bias, tuple(shape), str(constants[name].dtype))
    nodes.append(node._replace(inputs=(node.inputs[0], name)))
    nodes.append(Node('add', (node.outputs[0], bias), last.outputs, {}, node.scope))
  return without_dead(
    dataclasses.replace(graph, nodes=tuple(nodes), constants=constants, tensors=tensors)
  )


def _kernel_of(graph: Graph, node: Node, keep: Collection[str]) -> bool:
  """True for a layer with a constant kernel of one output axis."""
  if node.op not in ('conv', 'dot') or node.inputs[1] not in graph.constants:
    return False
  if node.inputs[1] in keep or graph.tensors[node.outputs[0]].dtype not in ('float32', 'float64'):
    return False
  if node.op == 'conv':
    return True
  free = graph.constants[node.inputs[1]].ndim - len(node.attributes['contract'][1])
  return free == 1 and not node.attributes['batch'][1]


def _channel(node: Node, graph: Graph) -> int:
  if node.op == 'conv':
    return node.attributes['layout'][2].index('C')
  return len(graph.tensors[node.outputs[0]].shape) - 1


def _scaled(node: Node, kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
  if node.op == 'conv':
    axis = node.attributes['layout'][1].index('O')
  else:
    [axis] = set(range(kernel.ndim)) - set(node.attributes['contract'][1])
  shape = [1] * kernel.ndim
  shape[axis] = scale.size
  return (kernel.astype(np.float64) * scale.reshape(shape)).astype(kernel.dtype)


def _chain(
  graph: Graph, node: Node, readers: dict[str, list[int]]
) -> tuple[list[int], _Affine | None]:
  """Positions of the nodes that can be folded into a layer, and what they amount to."""
  [name] = node.outputs
  axis = _channel(node, graph)
  channels = graph.tensors[name].shape[axis]
  assert isinstance(channels, int)
  affine, chain = _Affine(np.ones(channels), np.zeros(channels)), []
  while name not in graph.outputs and len(readers[name]) == 1:
    [j] = readers[name]
    step = _then(graph, graph.nodes[j], name, axis, affine)
    if step is None:
      break
    affine, [name] = step, graph.nodes[j].outputs
    chain.append(j)
  return chain, affine if chain else None


def _then(graph: Graph, node: Node, name: str, axis: int, before: _Affine) -> _Affine | None:
  """The map with one more node behind it; None if that is none per channel."""
  a, b = before
  if node.op == 'neg':
    return _Affine(-a, -b)
  if node.op not in ('add', 'sub', 'mul', 'div') or node.inputs.count(name) != 1:
    return None
  first = node.inputs[0] == name
  other = graph.constants.get(node.inputs[first])
  if other is None or graph.tensors[node.outputs[0]].shape != graph.tensors[name].shape:
    return None
  c = _per_channel(other, axis, a.size)
  if c is None:
    return None
  if node.op == 'add':
    return _Affine(a, b + c)
  if node.op == 'sub':
    return _Affine(a, b - c) if first else _Affine(-a, c - b)
  if node.op == 'mul':
    return _Affine(a * c, b * c)
  return _Affine(a / c, b / c) if first and c.all() else None


def _per_channel(array: np.ndarray, axis: int, channels: int) -> np.ndarray | None:
  shape = array.shape
  if array.size == 1:
    return np.full(channels, array.item(), np.float64)
  if len(shape) > axis and shape[axis] == array.size:
    return array.reshape(-1).astype(np.float64)
  return None


def _new(name: str, taken: dict[str, np.ndarray]) -> str:
  # A kernel that two layers share is folded twice.
  while name in taken:
    name += "'"
  return name
