"""ReLU and its relatives as one node, and that one with the sum before it."""

import dataclasses

import numpy as np

from fqjax.runtime.graph import Graph, Node, consumers, without_dead


def fuse_activations(graph: Graph) -> Graph:
  """Writes `max` and `min` with one number as `clamp`: ReLU has low 0, ReLU6 high 6 besides.

  Args:
    graph: any; the numbers must be constants.

  Returns:
    The graph with the same results, bit for bit.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> traced = to_graph(lambda p, x: jax.nn.relu6(x), {}, jnp.ones((1, 2)))
    >>> print(*fuse_activations(traced.graph).nodes)
    clamp(input) low=0.0 high=6.0
  """
  nodes = [_clamp(graph, node) or node for node in graph.nodes]
  readers = consumers(graph)
  dropped: set[int] = set()
  for i, node in enumerate(nodes):
    if i in dropped or node.op != 'clamp':
      continue
    [out] = node.outputs
    while out not in graph.outputs and len(readers[out]) == 1:
      [j] = readers[out]
      joined = _joined(nodes[i], nodes[j])
      if joined is None:
        break
      # It moves up to the first: nothing between the two reads what the second writes.
      nodes[i] = joined
      dropped.add(j)
      [out] = joined.outputs
  kept = tuple(node for i, node in enumerate(nodes) if i not in dropped)
  return without_dead(dataclasses.replace(graph, nodes=kept))


def _clamp(graph: Graph, node: Node) -> Node | None:
  if node.op not in ('max', 'min') or graph.tensors[node.outputs[0]].dtype != 'float32':
    return None
  for name, other in (node.inputs, node.inputs[::-1]):
    limit = graph.constants.get(other)
    if limit is None or limit.size != 1 or not np.isfinite(limit).all():
      continue
    if graph.tensors[name].shape == graph.tensors[node.outputs[0]].shape:
      low, high = (limit.item(), None) if node.op == 'max' else (None, limit.item())
      return Node('clamp', (name,), node.outputs, {'low': low, 'high': high}, node.scope)
  return None


def _joined(first: Node, second: Node) -> Node | None:
  """Two clamps as one where each brings another limit and they leave something between them."""
  if second.op != 'clamp':
    return None
  a, b = dict(first.attributes), dict(second.attributes)
  if any(a[key] is not None and b[key] is not None for key in a):
    return None
  both = {key: b[key] if a[key] is None else a[key] for key in a}
  if None not in both.values() and both['low'] > both['high']:
    return None
  return second._replace(inputs=first.inputs, attributes=both)


def fuse_sums(graph: Graph) -> Graph:
  """Writes a sum whose only reader is a `clamp` as one node: a bias or a residual, and its ReLU.

  The last pass before a file: others look for sums and clamps.

  Args:
    graph: any.

  Returns:
    The graph with the same results, bit for bit.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda b, x: jax.nn.relu(x + b)
    >>> traced = to_graph(network, jnp.float32(1), jnp.ones((1, 2)))
    >>> [node.op for node in fuse_sums(freeze(traced, jnp.float32(1))).nodes]
    ['add_clamp']
  """
  readers, nodes = consumers(graph), list(graph.nodes)
  dropped: set[int] = set()
  for i, node in enumerate(graph.nodes):
    [out] = node.outputs if node.op == 'add' else [None]
    if out is None or out in graph.outputs or len(readers[out]) != 1:
      continue
    [j] = readers[out]
    if (after := graph.nodes[j]).op != 'clamp':
      continue
    # Where the sum was: nothing between the two reads what the clamp writes.
    nodes[i] = Node('add_clamp', node.inputs, after.outputs, after.attributes, node.scope)
    dropped.add(j)
  kept = tuple(node for i, node in enumerate(nodes) if i not in dropped)
  return without_dead(dataclasses.replace(graph, nodes=kept))
