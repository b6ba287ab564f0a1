"""A graph as a JAX function again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node


def evaluate(
  graph: Graph, parameters: Mapping[str, Any], inputs: Sequence[Any]
) -> tuple[jax.Array, ...]:
  """Runs a graph with JAX; works under jit, vmap and grad.

  Args:
    graph: a valid graph.
    parameters: path -> array, for all of `graph.parameters`.
    inputs: arrays in the order of `graph.inputs`; they set the batch.

  Returns:
    Arrays in the order of `graph.outputs`.

  Raises:
    ValueError: a parameter is missing, or an array has not the shape or type of the graph's.

  Example:
    >>> traced = to_graph(lambda p, x: jnp.tanh(x @ p['w']), {'w': jnp.eye(2)}, jnp.ones((1, 2)))
    >>> [y] = evaluate(traced.graph, {'w': jnp.eye(2)}, [jnp.zeros((3, 2))])
    >>> y.shape
    (3, 2)
  """
  if missing := [name for name in graph.parameters if name not in parameters]:
    raise ValueError(f'no value for the parameter {graph.tensors[missing[0]]}.')
  values: dict[str, Any] = {name: parameters[name] for name in graph.parameters}
  values |= zip(graph.inputs, inputs, strict=True)
  batch = graph_lib.batch_size(graph, [jnp.shape(x) for x in inputs])
  for name, value in values.items():
    shape = dims.bind(graph.tensors[name].shape, batch)
    if tuple(jnp.shape(value)) != shape or str(jnp.result_type(value)) != graph.tensors[name].dtype:
      raise ValueError(
        f'the graph takes {graph.tensors[name]}, got {jnp.result_type(value)}'
        f'{list(jnp.shape(value))}.'
      )
  values |= {name: jnp.asarray(array) for name, array in graph.constants.items()}
  for node in graph.nodes:
    with jax.named_scope(node.scope or node.op):
      results = evaluate_node(node, [values[name] for name in node.inputs], batch)
    values |= zip(node.outputs, results, strict=True)
  return tuple(jnp.asarray(values[name]) for name in graph.outputs)


def evaluate_node(node: Node, arrays: Sequence[Any], batch: int | None = None) -> list[jax.Array]:
  """Runs one node.

  Args:
    node: any of the list.
    arrays: its inputs.
    batch: what 'n' stands for in its attributes.

  Returns:
    Its outputs.

  Raises:
    ValueError: integer arithmetic, which is NumPy's: `fqjax.runtime.reference.run`.
  """
  if node.op not in _RUN:
    raise ValueError(
      f'{node.op} is integer arithmetic; run the graph with fqjax.runtime.reference.run.'
    )
  attributes = {
    key: dims.bind(value, batch) if oplist.OPS[node.op].attributes[key] == 'a shape' else value
    for key, value in node.attributes.items()
  }
  result = _RUN[node.op](*arrays, **attributes)
  return list(result) if isinstance(result, (tuple, list)) else [result]


def _select(which, *cases) -> jax.Array:
  # Every other lax function broadcasts by itself.
  shape = oplist.broadcast_shapes([tuple(jnp.shape(a)) for a in (which, *cases)])
  return lax.select_n(*(jnp.broadcast_to(a, shape) for a in (which, *cases)))


def _pool(fn: Callable, initial: Callable) -> Callable:
  def run(x, window, strides, padding, dilation):
    # A NumPy scalar: JAX must see the value to know which pooling it is, and its derivative.
    start = np.asarray(initial(x.dtype), x.dtype)
    return lax.reduce_window(x, start, fn, window, strides, padding, window_dilation=dilation)

  return run


def _lowest(dtype) -> Any:
  return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype) -> Any:
  return np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


def _precision(text: str) -> Any:
  if text == 'default':
    return None
  return tuple(text.split(',')) if ',' in text else text


def _conv(
  x, w, strides, padding, dilation, input_dilation, groups, layout, dtype, precision
) -> jax.Array:
  return lax.conv_general_dilated(
    x, w, strides, padding, input_dilation, dilation, layout, groups,
    precision=_precision(precision), preferred_element_type=jnp.dtype(dtype),
  )  # fmt: skip


def _dot(a, b, contract, batch, dtype, precision) -> jax.Array:
  return lax.dot_general(
    a, b, (contract, batch), _precision(precision), preferred_element_type=jnp.dtype(dtype)
  )


def _gather(
  x, where, offset, collapsed, index_map, operand_batch, index_batch, sizes, mode
) -> jax.Array:
  numbers = lax.GatherDimensionNumbers(offset, collapsed, index_map, operand_batch, index_batch)
  return lax.gather(x, where, numbers, sizes, mode=mode)


def _clamp(x, low, high) -> jax.Array:
  x = x if low is None else lax.max(x, jnp.asarray(low, x.dtype))
  return x if high is None else lax.min(x, jnp.asarray(high, x.dtype))


def _round(x, halves) -> jax.Array:
  methods = lax.RoundingMethod
  return lax.round(x, methods.TO_NEAREST_EVEN if halves == 'even' else methods.AWAY_FROM_ZERO)


_LAX_NAMES = {
  'not': 'bitwise_not', 'and': 'bitwise_and', 'or': 'bitwise_or', 'xor': 'bitwise_xor',
}  # fmt: skip

_RUN: dict[str, Callable] = {
  **{
    op: getattr(lax, _LAX_NAMES.get(op, op))
    for op in (*oplist.UNARY, *oplist.BINARY, *oplist.COMPARE, 'pow')
  },
  'integer_pow': lambda x, exponent: lax.integer_pow(x, exponent),
  'round': _round,
  'is_finite': lax.is_finite,
  'clamp': _clamp,
  'add_clamp': lambda a, b, low, high: _clamp(lax.add(a, b), low, high),
  'select': _select,
  'cast': lambda x, dtype: lax.convert_element_type(x, jnp.dtype(dtype)),
  **{op: getattr(lax, op) for op in oplist.REDUCE},
  'argmax': lambda x, axis, dtype: lax.argmax(x, axis, jnp.dtype(dtype)),
  'argmin': lambda x, axis, dtype: lax.argmin(x, axis, jnp.dtype(dtype)),
  **{op: getattr(lax, op) for op in oplist.CUMULATIVE},
  'sort': lambda *xs, axis, keys: lax.sort(xs, dimension=axis, num_keys=keys),
  'top_k': lambda x, axis, k: lax.top_k(x, k, axis=axis),
  'iota': lambda shape, dtype, axis: lax.broadcasted_iota(jnp.dtype(dtype), shape, axis),
  'reshape': lambda x, shape: lax.reshape(x, shape),
  'transpose': lambda x, permutation: lax.transpose(x, permutation),
  'broadcast': lambda x, shape, axes: lax.broadcast_in_dim(x, shape, axes),
  'concat': lambda *xs, axis: lax.concatenate(xs, axis),
  'slice': lambda x, start, stop, strides: lax.slice(x, start, stop, strides),
  'pad': lambda x, value, padding, interior: lax.pad(
    x, value, [(low, high, inner) for (low, high), inner in zip(padding, interior, strict=True)]
  ),
  'reverse': lambda x, axes: lax.rev(x, axes),
  'gather': _gather,
  'pool_max': _pool(lax.max, _lowest),
  'pool_min': _pool(lax.min, _highest),
  'pool_sum': _pool(lax.add, lambda _: 0),
  'conv': _conv,
  'dot': _dot,
}
