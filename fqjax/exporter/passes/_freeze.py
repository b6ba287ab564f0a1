"""All passes in their order."""

from collections.abc import Collection
from typing import Any

from fqjax.exporter.passes._activations import fuse_activations
from fqjax.exporter.passes._batch_norm import fold_batch_norm
from fqjax.exporter.passes._common import share_common
from fqjax.exporter.passes._constants import bind_parameters, fold_constants
from fqjax.exporter.passes._transposes import move_transposes
from fqjax.runtime.graph import Graph, validate
from fqjax.tracing import Traced


def freeze(traced: Traced, variables: Any, keep: Collection[str] = ()) -> Graph:
  """The graph of a network as it is after training: what calibration and export begin with.

  Args:
    traced: of `fqjax.tracing.to_graph`.
    variables: a tree like the traced one.
    keep: kernels into which no batch norm is folded, by path.

  Returns:
    A valid graph without parameters: constants and batch norm folded, activations fused, nothing
    computed twice, transposes taken in where something can.

  Raises:
    ValueError: variables of another structure or other shapes.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> def dense(params, x):
    ...   return jax.nn.relu((x @ params['kernel']) * params['scale'])
    >>> params = {'kernel': jnp.eye(2), 'scale': jnp.float32(2)}
    >>> graph = freeze(to_graph(dense, params, jnp.ones((1, 2))), params)
    >>> [node.op for node in graph.nodes]
    ['dot', 'clamp']
  """
  graph = fold_constants(bind_parameters(traced.graph, traced.parameters(variables)))
  graph = move_transposes(share_common(graph))
  graph = fuse_activations(fold_batch_norm(graph, keep))
  validate(graph)
  return graph
