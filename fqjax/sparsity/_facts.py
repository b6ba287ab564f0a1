"""What is known of a network's tensors before any input arrives, for given parameters.

A channel whose filter is empty carries one number whatever the image: zero, or what bias, batch norm
and activation make of zero. Facts carry such numbers through the graph. Along an axis a fact either
has every entry or one that holds all along it, so that a map [n, 224, 224, 64] is known by 64
numbers. `0 * x` counts as 0: activations are taken to be finite.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime.dims import Shape
from fqjax.runtime.graph import Graph, Node, Tensor
from fqjax.tracing import evaluate_node

# Beyond this a tensor that depends on parameters alone is not computed to see whether it is zero.
_LARGEST = 1 << 28


class Fact(NamedTuple):
  """What is known of one tensor.

  Attributes:
    value: numbers, 0 where unknown; size 1 along an axis means the same all along it.
    known: bool, same shape.
  """

  value: np.ndarray
  known: np.ndarray

  @property
  def zero(self) -> np.ndarray:
    """True where the tensor is certainly 0."""
    return self.known & (self.value == 0)


def find(graph: Graph, parameters: Mapping[str, np.ndarray]) -> dict[str, Fact]:
  """Facts of every tensor of a graph.

  Args:
    graph: a valid graph.
    parameters: path -> array.

  Returns:
    Tensor name -> fact.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> w = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32)  # the second output is always 0
    >>> graph = to_graph(lambda p, x: x @ p, w, jnp.ones((1, 2))).graph
    >>> find(graph, {'params': w})[graph.outputs[0]].known
    array([[False,  True]])
  """
  facts = {name: unknown(len(graph.tensors[name].shape)) for name in graph.inputs}
  for name, array in (*parameters.items(), *graph.constants.items()):
    facts[name] = _given(np.asarray(array))
  for node in graph.nodes:
    inputs = [graph.tensors[name] for name in node.inputs]
    outputs = [graph.tensors[name] for name in node.outputs]
    found = _of(node, [facts[name] for name in node.inputs], inputs, outputs)
    facts |= zip(node.outputs, found, strict=True)
  return facts


def unknown(rank: int) -> Fact:
  """Nothing known."""
  return Fact(np.zeros((1,) * rank, np.float32), np.zeros((1,) * rank, bool))


def along(array: np.ndarray, axis: int, size: int) -> np.ndarray:
  """All entries along an axis on which one may stand for all."""
  if array.shape[axis] == size:
    return array
  return np.broadcast_to(array, array.shape[:axis] + (size,) + array.shape[axis + 1 :])


def _given(array: np.ndarray) -> Fact:
  if array.size > 1 and (array == array.flat[0]).all():
    array = array.reshape(-1)[:1].reshape((1,) * array.ndim)
  return Fact(array, np.ones(array.shape, bool))


def _fact(value: np.ndarray, known: np.ndarray) -> Fact:
  value, known = np.broadcast_arrays(value, known)
  return Fact(np.where(known, value, np.zeros((), value.dtype)), known)


def _of(
  node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Fact]:
  nothing = [unknown(len(tensor.shape)) for tensor in outputs]
  if facts and not any(fact.known.any() for fact in facts):
    return nothing
  with np.errstate(all='ignore'):
    if node.op in _RULES:
      return [_RULES[node.op](node, facts, inputs, outputs[0])]
    if node.op in _POINTWISE:
      return [_pointwise(node, facts)]
  # Anything else: if all of it is known, run it.
  sizes = [dims.size(tensor.shape) for tensor in (*inputs, *outputs)]
  if not all(fact.known.all() for fact in facts) or any(
    power or count > _LARGEST for count, power in sizes
  ):
    return nothing
  arrays = [
    np.broadcast_to(fact.value, dims.bind(tensor.shape, None))
    for fact, tensor in zip(facts, inputs, strict=True)
  ]
  return [_given(np.asarray(result)) for result in evaluate_node(node, arrays)]


# Pointwise operations: NumPy's where it has one, for it does not compile for every new shape.

_NUMPY: Mapping[str, Callable] = {
  'add': np.add, 'sub': np.subtract, 'mul': np.multiply, 'max': np.maximum, 'min': np.minimum,
  'neg': np.negative, 'abs': np.abs, 'square': np.square, 'sqrt': np.sqrt, 'floor': np.floor,
  'rsqrt': lambda x: (1 / np.sqrt(x)).astype(x.dtype), 'eq': np.equal, 'ne': np.not_equal,
  'lt': np.less, 'le': np.less_equal, 'gt': np.greater, 'ge': np.greater_equal,
  'and': np.bitwise_and, 'or': np.bitwise_or, 'not': np.bitwise_not, 'is_finite': np.isfinite,
}  # fmt: skip

_POINTWISE = frozenset({
  *oplist.UNARY, *oplist.BINARY, *oplist.COMPARE, 'pow', 'integer_pow', 'round', 'is_finite', 'cast',
})  # fmt: skip


def _pointwise(node: Node, facts: Sequence[Fact]) -> Fact:
  known = facts[0].known
  for fact in facts[1:]:
    known = known & fact.known
  values = [fact.value for fact in facts]
  if node.op == 'cast':
    result = values[0].astype(jnp.dtype(node.attributes['dtype']))
  elif node.op == 'div' and np.issubdtype(values[0].dtype, np.floating):
    result = np.divide(*values)
  elif node.op in _NUMPY:
    result = _NUMPY[node.op](*values)
  else:
    [result] = map(np.asarray, evaluate_node(node, np.broadcast_arrays(*values)))
  if node.op in ('mul', 'and'):
    zero = facts[0].zero | facts[1].zero
    return _fact(np.where(zero, np.zeros((), result.dtype), result), known | zero)
  return _fact(result, known)


def _select(node: Node, facts: Sequence[Fact], *_: Any) -> Fact:
  which, no, yes = facts
  first = which.value.astype(bool)
  chosen = np.where(first, yes.known, no.known) & which.known
  either = no.known & yes.known & (no.value == yes.value)
  return _fact(np.where(first & which.known, yes.value, no.value), chosen | either)


# Shapes.


def _reshape(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  parts = []
  for array in facts[0]:
    old: list[int] = []
    new: list[int] = []
    for wide, narrow in blocks(inputs[0].shape, output.shape):
      if all(array.shape[axis] == 1 for axis in wide):
        new += [1] * len(narrow)
      elif any(dims.split(inputs[0].shape[axis])[1] for axis in wide):
        if len(wide) > 1 or len(narrow) > 1:
          return unknown(len(output.shape))
        new += [array.shape[axis] for axis in wide]
      else:
        for axis in wide:
          array = along(array, axis, int(inputs[0].shape[axis]))
        new += [int(output.shape[axis]) for axis in narrow]
      old += narrow
    shape = [1] * len(output.shape)
    for axis, dim in zip(old, new, strict=True):
      shape[axis] = dim
    parts.append(array.reshape(shape))
  return Fact(*parts)


def blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
  """Smallest sets of axes that a reshape turns into each other; axes of size 1 are left out.

  Args:
    old: shape before.
    new: shape after, of as many elements.

  Example:
    >>> blocks(('n', 7, 7, 8), ('n', 392))
    [([0], [0]), ([1, 2, 3], [1])]
  """
  rest = [[axis for axis, dim in enumerate(shape) if dim != 1] for shape in (old, new)]
  found = []
  while rest[0] or rest[1]:
    taken: list[list[int]] = [[], []]
    while True:
      sizes = [
        dims.size([shape[a] for a in axes]) for shape, axes in zip((old, new), taken, strict=True)
      ]
      if taken[0] and taken[1] and sizes[0] == sizes[1]:
        break
      # By powers of the batch first: 'n' is met on both sides or on neither.
      side = 0 if (sizes[0][1], sizes[0][0]) <= (sizes[1][1], sizes[1][0]) else 1
      side = side if rest[side] else 1 - side
      if not rest[side]:
        break
      taken[side].append(rest[side].pop(0))
    found.append((taken[0], taken[1]))
  return found


def _transpose(node: Node, facts: Sequence[Fact], *_: Any) -> Fact:
  return Fact(*(array.transpose(node.attributes['permutation']) for array in facts[0]))


def _broadcast(node: Node, facts: Sequence[Fact], inputs, output: Tensor) -> Fact:
  shape = [1] * len(output.shape)
  for axis, dim in zip(node.attributes['axes'], facts[0].known.shape, strict=True):
    shape[axis] = dim
  return Fact(*(array.reshape(shape) for array in facts[0]))


def _concat(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  axis = node.attributes['axis']
  if dims.split(output.shape[axis])[1]:
    return unknown(len(output.shape))
  parts = []
  for kind in (0, 1):
    arrays = [
      along(fact[kind], axis, int(tensor.shape[axis]))
      for fact, tensor in zip(facts, inputs, strict=True)
    ]
    wide = np.broadcast_shapes(*(a.shape[:axis] + (1,) + a.shape[axis + 1 :] for a in arrays))
    arrays = [np.broadcast_to(a, wide[:axis] + (a.shape[axis],) + wide[axis + 1 :]) for a in arrays]
    dtype = jnp.dtype(output.dtype)
    parts.append(np.concatenate([a if kind else a.astype(dtype) for a in arrays], axis))
  return _fact(*parts)


def _slice(node: Node, facts: Sequence[Fact], *_: Any) -> Fact:
  parts = zip(*(node.attributes[key] for key in ('start', 'stop', 'strides')), strict=True)
  index = tuple(
    slice(None) if dim == 1 else slice(*part)
    for dim, part in zip(facts[0].known.shape, parts, strict=True)
  )
  return Fact(*(array[index] for array in facts[0]))


def _pad(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  (value, known), fill = facts
  inner = node.attributes['interior']
  for axis, (low, high) in enumerate(node.attributes['padding']):
    if not (low or high or inner[axis]):
      continue
    if fill.known.all() and known.all() and value.size and (value == fill.value).all():
      continue  # more of the same
    size, step = int(inputs[0].shape[axis]), inner[axis] + 1
    shape = (*known.shape[:axis], int(output.shape[axis]), *known.shape[axis + 1 :])
    index = (slice(None),) * axis + (slice(low, low + (size - 1) * step + 1, step),)
    wide = (np.full(shape, fill.value, jnp.dtype(output.dtype)), np.full(shape, fill.known))
    for array, part in zip(wide, (value, known), strict=True):
      array[index] = along(part, axis, size)
    value, known = wide
  return _fact(value, known)


def _reverse(node: Node, facts: Sequence[Fact], *_: Any) -> Fact:
  return Fact(*(np.flip(array, node.attributes['axes']) for array in facts[0]))


# Sums and windows.


def _reduce(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  [(value, known)], axes = facts, node.attributes['axes']
  # One entry that stands for many is summed as often as it stands.
  count, power = dims.size([inputs[0].shape[a] for a in axes if known.shape[a] == 1])
  if node.op == 'reduce_prod':
    known = known if count == 1 and not power else known & ((value == 0) | (value == 1))
    return _fact(np.prod(value, axes, dtype=value.dtype), np.asarray(np.all(known, axes)))
  if node.op != 'reduce_sum':
    reduce = {
      'reduce_max': np.max, 'reduce_min': np.min, 'reduce_and': np.all, 'reduce_or': np.any,
    }[node.op]  # fmt: skip
    return _fact(reduce(value, axes).astype(value.dtype), np.asarray(np.all(known, axes)))
  if power:
    known = known & (value == 0)
  total = np.sum(value, axes, dtype=np.float64 if value.dtype.kind not in 'iub' else None) * count
  return _fact(total.astype(value.dtype), np.asarray(np.all(known, axes)))


def _pool(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  [(value, known)], settings = facts, node.attributes
  windows, padding = settings['window'], settings['padding']
  for axis, (window, pads) in enumerate(zip(windows, padding, strict=True)):
    moves = (window, settings['strides'][axis], *pads) != (1, 1, 0, 0)
    if moves and known.shape[axis] > 1:
      return unknown(len(output.shape))
    reach = (window - 1) * settings['dilation'][axis] + 1
    if max(pads) >= reach:
      return unknown(len(output.shape))  # windows of nothing but padding
  if node.op == 'pool_sum':
    known = known if not any(map(any, padding)) else known & (value == 0)
    value = (value * math.prod(windows)).astype(value.dtype)
  return _fact(value, known)


def fixed_border(node: Node) -> bool:
  """True if a convolution reads no padding and no inserted zeros: a constant stays constant."""
  return not any(map(any, node.attributes['padding'])) and not any(
    step > 1 for step in node.attributes['input_dilation']
  )


def channels(fact: Fact, axis: int, size: int) -> Fact:
  """Known numbers per channel: where a channel is one number everywhere."""
  parts = [np.moveaxis(along(array, axis, size), axis, 0).reshape(size, -1) for array in fact]
  value, known = parts
  return _fact(value[:, 0], np.all(known, 1) & np.all(value == value[:, :1], 1))


def kernel(fact: Fact, tensor: Tensor, layout: str) -> Fact:
  """A convolution's kernel as [taps, inputs, outputs]."""
  order = [i for i, letter in enumerate(layout) if letter not in 'OI']
  order += [layout.index('I'), layout.index('O')]
  shape = dims.bind(tensor.shape, None)
  ends = (-1, shape[order[-2]], shape[order[-1]])
  return Fact(*(np.broadcast_to(a, shape).transpose(order).reshape(ends) for a in fact))


def _conv(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  layout_x, layout_w, layout_y = node.attributes['layout']
  axis, groups = layout_x.index('C'), node.attributes['groups']
  x = channels(facts[0], axis, int(inputs[0].shape[axis]))
  if not fixed_border(node):
    x = _fact(x.value, x.zero)
  w = kernel(facts[1], inputs[1], layout_w)
  shape = (w.known.shape[1], groups, -1)
  value, known, zero = (
    part.reshape(shape)
    for part in (w.value.sum(0, dtype=np.float64), np.all(w.known, 0), np.all(w.zero, 0))
  )
  x_value, x_known, x_zero = (part.reshape(groups, -1) for part in (*x, x.zero))
  y_known = ~_meets('gi,igo->go', (~x_known, ~zero), (~x_zero, ~known))
  y_value = np.einsum('gi,igo->go', x_value.astype(np.float64), value)
  final = [1] * len(layout_y)
  final[layout_y.index('C')] = y_known.size
  dtype = jnp.dtype(output.dtype)
  return _fact(y_value.astype(dtype).reshape(final), y_known.reshape(final))


def _dot(node: Node, facts: Sequence[Fact], inputs: Sequence[Tensor], output: Tensor) -> Fact:
  (contract_a, contract_b), (batch_a, batch_b) = (
    node.attributes['contract'],
    node.attributes['batch'],
  )
  a, b = facts
  for axis_a, axis_b in zip(contract_a, contract_b, strict=True):
    size, symbolic = dims.split(inputs[0].shape[axis_a])
    if symbolic:
      return unknown(len(output.shape))
    a = Fact(*(along(part, axis_a, size) for part in a))
    b = Fact(*(along(part, axis_b, size) for part in b))
  letters = iter('abcdefghijklmnopqrstuvwxyz')
  names_a, names_b = ([''] * len(tensor.shape) for tensor in inputs)
  for pairs in ((batch_a, batch_b), (contract_a, contract_b)):
    for axis_a, axis_b in zip(*pairs, strict=True):
      names_a[axis_a] = names_b[axis_b] = next(letters)
  for axis_a, axis_b in zip(batch_a, batch_b, strict=True):
    size = max(a.known.shape[axis_a], b.known.shape[axis_b])
    a = Fact(*(along(part, axis_a, size) for part in a))
    b = Fact(*(along(part, axis_b, size) for part in b))
  free = []
  for names in (names_a, names_b):
    for axis, name in enumerate(names):
      if not name:
        names[axis] = next(letters)
        free.append(names[axis])
  result = ''.join(names_a[axis] for axis in batch_a) + ''.join(free)
  rule = f'{"".join(names_a)},{"".join(names_b)}->{result}'
  known = ~_meets(rule, (~a.known, ~b.zero), (~a.zero, ~b.known))
  if not known.any():
    return unknown(len(output.shape))
  value = np.einsum(rule, a.value.astype(np.float64), b.value.astype(np.float64), optimize=True)
  return _fact(value.astype(jnp.dtype(output.dtype)), known)


def _meets(rule: str, first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> np.ndarray:
  """Whether any product in a sum of products has both factors, in one pair of arrays or the other."""
  count = np.einsum(rule, *(part.astype(np.float32) for part in first), optimize=True)
  if all(part.any() for part in second):
    count = count + np.einsum(rule, *(part.astype(np.float32) for part in second), optimize=True)
  return count > 0


_RULES: Mapping[str, Callable[..., Fact]] = {
  'select': _select,
  'reshape': _reshape,
  'transpose': _transpose,
  'broadcast': _broadcast,
  'concat': _concat,
  'slice': _slice,
  'pad': _pad,
  'reverse': _reverse,
  **dict.fromkeys(oplist.REDUCE, _reduce),
  **dict.fromkeys(oplist.POOL, _pool),
  'conv': _conv,
  'dot': _dot,
}
