"""What works along axes, or moves values."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fqjax.exporter.onnx._pointwise import WIDER
from fqjax.exporter.onnx._writer import Order, Writer
from fqjax.runtime import dims, oplist
from fqjax.runtime.dims import Shape
from fqjax.runtime.graph import Node

# Constants of a number of elements above this are made by the file's reader.
_LARGE = 4096


def _start(w: Writer, node: Node) -> tuple[str, Order, str]:
  """The first input as it is, its order and type."""
  name = node.inputs[0]
  order = w.order(name)
  return w.read(name, order), order, w.dtype(name)


def _ordered(w: Writer, name: str, order: Order) -> Shape:
  return tuple(w.shape(name)[axis] for axis in order)


def remaining(order: Order, axes: tuple[int, ...]) -> Order:
  """The order of what a reduction leaves."""
  kept = [axis for axis in order if axis not in axes]
  return tuple(sorted(kept).index(axis) for axis in kept)


def reduce(w: Writer, node: Node) -> None:
  """Sums, products, extremes; and / or as the extremes of 0 and 1."""
  x, order, dtype = _start(w, node)
  axes = node.attributes['axes']
  op = node.op.removeprefix('reduce_')
  if op in ('and', 'or') and dtype != 'bool':
    raise ValueError(f'ONNX has no bitwise reduction of {dtype}: compare first, reduce bools.')
  wide = 'int32' if dtype == 'bool' else WIDER.get(dtype, dtype)
  if dtype == 'uint8' and op in ('max', 'min'):
    wide = dtype
  name = {'and': 'Min', 'or': 'Max'}.get(op, op.capitalize())
  places = [order.index(axis) for axis in axes]
  y = w.reduce(f'Reduce{name}', w.cast(x, dtype, wide), places)
  w.bind(node.outputs[0], w.cast(y, wide, dtype), remaining(order, axes))


def arg_reduce(w: Writer, node: Node) -> None:
  """The first of equals, as ONNX does."""
  x, order, dtype = _start(w, node)
  axis = node.attributes['axis']
  x = w.cast(x, dtype, 'int32' if dtype == 'bool' else WIDER.get(dtype, dtype))
  y = w.emit('ArgMax' if node.op == 'argmax' else 'ArgMin', x, axis=order.index(axis), keepdims=0)
  w.bind(node.outputs[0], w.cast(y, 'int64', node.attributes['dtype']), remaining(order, (axis,)))


def cumulative(w: Writer, node: Node) -> None:
  """Sums by CumSum; the others in log2(size) steps, each over twice as many values."""
  x, order, dtype = _start(w, node)
  place, reverse = order.index(node.attributes['axis']), node.attributes['reverse']
  wide = WIDER.get(dtype, dtype)
  x = w.cast(x, dtype, wide)
  if node.op == 'cumsum':
    x = w.emit('CumSum', x, w.scalar(place, 'int64'), reverse=int(reverse))
  else:
    size, symbolic = dims.split(_ordered(w, node.inputs[0], order)[place])
    if symbolic:
      raise ValueError(f'{node.op} over the batch has no place in ONNX; fix the batch.')
    op = {'cumprod': 'Mul', 'cummax': 'Max', 'cummin': 'Min'}[node.op]
    fill = w.scalar(1 if op == 'Mul' else end(wide, -1 if op == 'Max' else 1), wide)
    step = 1
    while step < size:
      kept = (step, size) if reverse else (0, size - step)
      padding = [(0, 0)] * len(order)
      padding[place] = (0, step) if reverse else (step, 0)
      moved = w.pad(w.cut(x, [place], kept[:1], kept[1:]), padding, fill)
      x = w.emit(op, x, moved)
      step *= 2
  w.bind(node.outputs[0], w.cast(x, wide, dtype), order)


def end(dtype: str, sign: int) -> Any:
  """The largest or smallest number of a type."""
  if dtype.startswith('float'):
    return sign * np.inf
  return np.iinfo(dtype).max if sign > 0 else np.iinfo(dtype).min


def sort(w: Writer, node: Node) -> None:
  """By TopK, which keeps the order of equals: once per key, the last first."""
  order = w.common_order(node.inputs)
  values = [w.read(name, order) for name in node.inputs]
  place = order.index(node.attributes['axis'])
  size = _top_size(w, node.inputs[0], order, place)
  for key in reversed(range(node.attributes['keys'])):
    _, where = _top_k(w, values[key], w.dtype(node.inputs[key]), place, size, largest=0)
    values = [w.emit('GatherElements', value, where, axis=place) for value in values]
  for name, value in zip(node.outputs, values, strict=True):
    w.bind(name, value, order)


def top_k(w: Writer, node: Node) -> None:
  """TopK."""
  x, order, dtype = _start(w, node)
  place = order.index(node.attributes['axis'])
  found, where = _top_k(w, x, dtype, place, w.ints([node.attributes['k']]), largest=1)
  w.bind(node.outputs[0], found, order)
  w.bind(node.outputs[1], w.cast(where, 'int64', 'int32'), order)


def _top_size(w: Writer, name: str, order: Order, place: int) -> str:
  return w.sizes((_ordered(w, name, order)[place],))


def _top_k(w: Writer, x: str, dtype: str, place: int, k: str, largest: int) -> tuple[str, str]:
  wide = 'int32' if dtype == 'bool' else WIDER.get(dtype, dtype)
  found, where = w.emit_many(
    'TopK', w.cast(x, dtype, wide), k, count=2, axis=place, largest=largest, sorted=1
  )
  return w.cast(found, wide, dtype), where


def iota(w: Writer, node: Node) -> None:
  """A constant if it is small, a Range of the batch, a row spread out otherwise."""
  shape, axis, dtype = (node.attributes[key] for key in ('shape', 'axis', 'dtype'))
  row: Shape = tuple(dim if i == axis else 1 for i, dim in enumerate(shape))
  if isinstance(shape[axis], int):
    value = w.constant(np.arange(shape[axis], dtype=dtype).reshape([1 if i != axis else -1 for i in range(len(shape))]))  # fmt: skip
  else:
    stop = w.emit('Squeeze', w.sizes((shape[axis],)))
    numbers = w.emit('Range', w.scalar(0, 'int64'), stop, w.scalar(1, 'int64'))
    value = w.cast(w.reshape(numbers, row), 'int64', dtype)
  w.bind(node.outputs[0], w.expand(value, row, shape))


def reshape(w: Writer, node: Node) -> None:
  """Reshape: the axes have to be in their own order."""
  w.bind(node.outputs[0], w.reshape(w.read(node.inputs[0]), node.attributes['shape']))


def transpose(w: Writer, node: Node) -> None:
  """Only another name for the axes; who needs them in order gets them so."""
  x, order, _ = _start(w, node)
  permutation = node.attributes['permutation']
  # Bound by identity of places: a value may be known under two names.
  w.bind(node.outputs[0], x, tuple(permutation.index(axis) for axis in order))


def broadcast(w: Writer, node: Node) -> None:
  """Reshape and Expand."""
  now, shape = w.shape(node.inputs[0]), node.attributes['shape']
  wide: list[dims.Dim] = [1] * len(shape)
  for axis, dim in zip(node.attributes['axes'], now, strict=True):
    wide[axis] = dim
  x = w.read(node.inputs[0])
  x = x if tuple(wide) == now else w.reshape(x, tuple(wide))
  w.bind(node.outputs[0], w.expand(x, tuple(wide), shape))


def concat(w: Writer, node: Node) -> None:
  """Concat."""
  values, order = w.aligned(node.inputs)
  w.bind(
    node.outputs[0], w.emit('Concat', *values, axis=order.index(node.attributes['axis'])), order
  )


def slice_(w: Writer, node: Node) -> None:
  """Slice, along the axes that lose something."""
  x, order, _ = _start(w, node)
  parts = [node.attributes[key] for key in ('start', 'stop', 'strides')]
  cuts = [
    (place, *(part[axis] for part in parts))
    for place, axis in enumerate(order)
    if (parts[0][axis], parts[2][axis]) != (0, 1) or parts[1][axis] != w.shape(node.inputs[0])[axis]
  ]
  if cuts:
    x = w.cut(x, *(list(column) for column in zip(*cuts, strict=True)))
  w.bind(node.outputs[0], x, order)


def pad(w: Writer, node: Node) -> None:
  """Pad; values between elements by way of an axis of their own."""
  x, order, _ = _start(w, node)
  fill, shape = w.read(node.inputs[1]), list(_ordered(w, node.inputs[0], order))
  for place, axis in enumerate(order):
    inner, size = node.attributes['interior'][axis], shape[place]
    if inner and isinstance(size, int):
      x = w.spread(x, tuple(shape), place, inner, fill)
      shape[place] = size + inner * max(0, size - 1)
  x = w.pad(x, [node.attributes['padding'][axis] for axis in order], fill)
  w.bind(node.outputs[0], x, order)


def reverse(w: Writer, node: Node) -> None:
  """Slice with a step of -1."""
  x, order, _ = _start(w, node)
  places = [order.index(axis) for axis in node.attributes['axes']]
  if places:
    ones = [-1] * len(places)
    # Beyond the first element: what a stop of -1 would not mean.
    x = w.cut(x, places, ones, [np.iinfo(np.int64).min + 1] * len(places), ones)
  w.bind(node.outputs[0], x, order)


HANDLERS: Mapping[str, Callable[[Writer, Node], None]] = {
  **dict.fromkeys(oplist.REDUCE, reduce),
  'argmax': arg_reduce,
  'argmin': arg_reduce,
  **dict.fromkeys(oplist.CUMULATIVE, cumulative),
  'sort': sort,
  'top_k': top_k,
  'iota': iota,
  'reshape': reshape,
  'transpose': transpose,
  'broadcast': broadcast,
  'concat': concat,
  'slice': slice_,
  'pad': pad,
  'reverse': reverse,
}
