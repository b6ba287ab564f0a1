"""What is computed twice is computed once."""

import dataclasses
from typing import Any

from fqjax.runtime.graph import Graph, Node, without_dead

# Either order gives the same bits.
_COMMUTATIVE = ('add', 'mul', 'and', 'or', 'xor', 'eq', 'ne')


def share_common(graph: Graph) -> Graph:
  """Keeps one of all nodes that do the same to the same tensors.

  Args:
    graph: any; constants are told apart by name.

  Returns:
    The graph with the same results, bit for bit.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> traced = to_graph(lambda p, x: jnp.exp(x) * x + x * jnp.exp(x), {}, jnp.ones((1, 2)))
    >>> [node.op for node in share_common(traced.graph).nodes]
    ['exp', 'mul', 'add']
  """
  names: dict[str, str] = {}
  first: dict[Any, Node] = {}
  nodes = []
  for node in graph.nodes:
    inputs = tuple(names.get(name, name) for name in node.inputs)
    same = first.setdefault(_key(node, inputs), node)
    if same is node:
      nodes.append(node._replace(inputs=inputs))
    else:
      names |= zip(node.outputs, same.outputs, strict=True)
  outputs = tuple(names.get(name, name) for name in graph.outputs)
  return without_dead(dataclasses.replace(graph, nodes=tuple(nodes), outputs=outputs))


def _key(node: Node, inputs: tuple[str, ...]) -> Any:
  if node.op in _COMMUTATIVE:
    inputs = tuple(sorted(inputs))
  # As text: 0.0 and -0.0 are equal and not the same.
  return node.op, inputs, repr(sorted(node.attributes.items()))
