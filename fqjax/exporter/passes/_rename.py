"""Other names for the same tensors."""

from collections.abc import Mapping
import dataclasses

from fqjax.runtime.graph import Graph


def rename(graph: Graph, names: Mapping[str, str]) -> Graph:
  """Gives tensors other names; constants that get one name become one.

  Args:
    graph: any.
    names: old -> new; what is missing keeps its name.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> graph = to_graph(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2))).graph
    >>> rename(graph, {'params': 'kernel'}).parameters
    ('kernel',)
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
