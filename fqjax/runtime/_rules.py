"""What each operation of the list makes of its inputs: shapes and types, or what does not fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fqjax.runtime import dims
from fqjax.runtime.dims import Dim, Shape

Type = tuple[Shape, str]


# Elementwise.


def broadcast_shapes(shapes: Sequence[Shape]) -> Shape:
  """Common shape of tensors of one rank, scalars aside.

  Raises:
    ValueError: they do not go together.

  Example:
    >>> broadcast_shapes([('n', 7, 3), (), (1, 1, 3)])
    ('n', 7, 3)
  """
  ranked = [shape for shape in shapes if shape]
  if len({len(shape) for shape in ranked}) > 1:
    raise ValueError(f'shapes {_show(*ranked)} differ in rank')
  result = []
  for sizes in zip(*ranked, strict=True):
    wide = {dim for dim in sizes if dim != 1} or {1}
    if len(wide) > 1:
      raise ValueError(f'shapes {_show(*ranked)} do not broadcast')
    result.append(wide.pop())
  return tuple(result)


def elementwise(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  _same_dtype(types)
  return [(broadcast_shapes([shape for shape, _ in types]), types[0][1])]


def of_floats(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if 'float' not in types[0][1]:
    raise ValueError(f'is a function of floats, got {types[0][1]}')
  return elementwise(types, attributes)


def of_numbers(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if types[0][1] == 'bool':
    raise ValueError('is a function of numbers, got bool')
  return elementwise(types, attributes)


def of_bits(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if 'float' in types[0][1]:
    raise ValueError(f'is a function of integers and bool, got {types[0][1]}')
  return (elementwise if 'axes' not in attributes else reduce)(types, attributes)


def clamp(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  dtype = types[0][1]
  if dtype == 'bool':
    raise ValueError('bool has no limits')
  for limit in (attributes['low'], attributes['high']):
    if 'float' not in dtype and limit is not None:
      info = np.iinfo(dtype)
      if limit != int(limit) or not info.min <= limit <= info.max:
        raise ValueError(f'the limit {limit} is no {dtype}')
  return elementwise(types, attributes)


def add_clamp(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  return clamp(elementwise(types, attributes), attributes)


def power(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  return [(broadcast_shapes([shape for shape, _ in types]), types[0][1])]


def compare(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  _same_dtype(types)
  return [(broadcast_shapes([shape for shape, _ in types]), 'bool')]


def select(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  if types[0][1] != 'bool':
    raise ValueError(f'the first input chooses and must be bool, got {types[0][1]}')
  _same_dtype(types[1:])
  return [(broadcast_shapes([shape for shape, _ in types]), types[1][1])]


def cast(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  return [(types[0][0], attributes['dtype'])]


def _same_dtype(types: Sequence[Type]) -> None:
  if len({dtype for _, dtype in types}) > 1:
    raise ValueError(f'inputs of different types: {", ".join(dtype for _, dtype in types)}')


# Along axes.


def _axis(axis: int, rank: int) -> int:
  if not 0 <= axis < rank:
    raise ValueError(f'axis {axis} is not an axis of a tensor of rank {rank}')
  return axis


def reduce(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  axes = [_axis(axis, len(shape)) for axis in attributes['axes']]
  if len(set(axes)) < len(axes):
    raise ValueError(f'axes {attributes["axes"]} repeat')
  return [(tuple(dim for i, dim in enumerate(shape) if i not in axes), dtype)]


def arg_reduce(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  [(shape, _)] = reduce(types, {'axes': (attributes['axis'],)})
  return [(shape, attributes['dtype'])]


def same(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  for axis in attributes['axes'] if 'axes' in attributes else (attributes['axis'],):
    _axis(axis, len(types[0][0]))
  return [types[0]]


def sort(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if len({shape for shape, _ in types}) > 1:
    raise ValueError(f'sorted together, shapes must be equal: {_show(*(s for s, _ in types))}')
  _axis(attributes['axis'], len(types[0][0]))
  if not 1 <= attributes['keys'] <= len(types):
    raise ValueError(f'keys = {attributes["keys"]} of {len(types)} inputs')
  return list(types)


def top_k(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  axis = _axis(attributes['axis'], len(shape))
  times, symbolic = dims.split(shape[axis])
  if symbolic or not 0 <= attributes['k'] <= times:
    raise ValueError(f'k = {attributes["k"]} of an axis of {shape[axis]}')
  out = shape[:axis] + (attributes['k'],) + shape[axis + 1 :]
  return [(out, dtype), (out, 'int32')]


def iota(_: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if attributes['dtype'] == 'bool':
    raise ValueError('counts in numbers, not bool')
  _axis(attributes['axis'], len(attributes['shape']))
  return [(attributes['shape'], attributes['dtype'])]


# Shapes.


def reshape(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), new = types[0], attributes['shape']
  if dims.size(shape) != dims.size(new):
    raise ValueError(f'cannot reshape {_show(shape)} to {_show(new)}')
  return [(new, dtype)]


def transpose(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), order = types[0], attributes['permutation']
  if sorted(order) != list(range(len(shape))):
    raise ValueError(f'{order} does not order the axes of {_show(shape)}')
  return [(tuple(shape[i] for i in order), dtype)]


def broadcast(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), new, axes = types[0], attributes['shape'], attributes['axes']
  if len(axes) != len(shape) or list(axes) != sorted(set(axes)):
    raise ValueError(f'axes {axes} must name an axis of the result for each of {_show(shape)}')
  for dim, axis in zip(shape, axes, strict=True):
    if dim not in (1, new[_axis(axis, len(new))]):
      raise ValueError(f'{_show(shape)} does not broadcast to {_show(new)} along {axes}')
  return [(new, dtype)]


def concat(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  _same_dtype(types)
  shapes = [shape for shape, _ in types]
  axis = _axis(attributes['axis'], len(shapes[0]))
  if len({shape[:axis] + (0,) + shape[axis + 1 :] for shape in shapes if shape}) > 1:
    raise ValueError(f'shapes {_show(*shapes)} differ in another axis than {axis}')
  parts = [dims.split(shape[axis]) for shape in shapes]
  if len({symbolic for _, symbolic in parts}) > 1:
    raise ValueError(f'a batch and a fixed size cannot be joined along axis {axis}')
  total = dims.make(sum(times for times, _ in parts), parts[0][1])
  return [(shapes[0][:axis] + (total,) + shapes[0][axis + 1 :], types[0][1])]


def slice_(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  _per_axis(attributes, shape, 'start', 'stop', 'strides')
  result = []
  for dim, start, stop, stride in zip(
    shape, attributes['start'], attributes['stop'], attributes['strides'], strict=True
  ):
    times, symbolic = dims.split(dim)
    if symbolic:
      if (start, stop, stride) != (0, dim, 1):
        raise ValueError('the batch is taken whole: start 0, stop its size, stride 1')
      result.append(dim)
      continue
    if dims.split(stop)[1] or not 0 <= start <= stop <= times:
      raise ValueError(f'{start}:{stop} leaves an axis of {dim}')
    result.append(-(-(stop - start) // stride))
  return [(tuple(result), dtype)]


def pad(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), (value, _) = types
  _same_dtype(types)
  if value:
    raise ValueError(f'pads with a scalar, got {_show(value)}')
  _per_axis(attributes, shape, 'padding', 'interior')
  result = []
  for dim, (low, high), inner in zip(
    shape, attributes['padding'], attributes['interior'], strict=True
  ):
    times, symbolic = dims.split(dim)
    if min(low, high, inner) < 0:
      raise ValueError('padding may not be negative; slice instead')
    if symbolic and (low, high, inner) != (0, 0, 0):
      raise ValueError('the batch cannot be padded')
    grown = times + low + high + inner * max(0, times - 1)
    result.append(dim if symbolic else grown)
  return [(tuple(result), dtype)]


def gather(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), (where, _) = types
  sizes, offset = attributes['sizes'], attributes['offset']
  dropped = attributes['collapsed'] + attributes['operand_batch']
  if len(sizes) != len(shape) or not where:
    raise ValueError(f'takes parts {_show(sizes)} of {_show(shape)} at places {_show(where)}')
  if where[-1] != len(attributes['index_map']):
    raise ValueError(f'places {_show(where)} must name {len(attributes["index_map"])} numbers each')
  for axis in (*dropped, *attributes['index_map']):
    _axis(axis, len(shape))
  if any(sizes[axis] != 1 for axis in dropped):
    raise ValueError(f'axes {dropped} are dropped and must have size 1 in {_show(sizes)}')
  if len(set(offset)) < len(offset):
    raise ValueError(f'offset {offset} repeats an axis')
  if len(attributes['operand_batch']) != len(attributes['index_batch']):
    raise ValueError('operand_batch and index_batch name different numbers of axes')
  for axis, along in zip(attributes['operand_batch'], attributes['index_batch'], strict=True):
    if shape[axis] != where[:-1][_axis(along, len(where) - 1)]:
      raise ValueError(f'axis {axis} of {_show(shape)} is not axis {along} of {_show(where)}')
  for dim, part in zip(shape, sizes, strict=True):
    # One element of the batch is a part too: samples pick places of their own.
    if part not in (dim, 1) and (dims.split(part)[1] or dims.split(dim)[1]):
      raise ValueError(f'the batch is taken whole, not {_show(sizes)} of {_show(shape)}')
    if not dims.split(dim)[1] and dims.split(part) > dims.split(dim):
      raise ValueError(f'parts {_show(sizes)} are larger than {_show(shape)}')
  parts = [dim for i, dim in enumerate(sizes) if i not in dropped]
  if len(parts) != len(offset):
    raise ValueError(f'offset {offset} must have a place for each of the {len(parts)} axes taken')
  result: list[Dim | None] = [None] * (len(where) - 1 + len(offset))
  for place, dim in zip(offset, parts, strict=True):
    result[_axis(place, len(result))] = dim
  rest = iter(where[:-1])
  return [(tuple(next(rest) if dim is None else dim for dim in result), dtype)]


def _per_axis(attributes: Mapping[str, Any], shape: Shape, *names: str) -> None:
  for name in names:
    if len(attributes[name]) != len(shape):
      raise ValueError(f'{name} {attributes[name]} must have one entry per axis of {_show(shape)}')


# Windows.


def window_size(
  dim: int, window: int, stride: int, padding: Sequence[int], dilation: int, inner: int = 1
) -> int:
  """Positions of a window along an axis.

  Args:
    dim: size of the axis.
    window: taps.
    stride: between positions.
    padding: before and after.
    dilation: between taps.
    inner: between elements of the axis (transposed convolutions).

  Example:
    >>> window_size(224, 7, 2, (3, 3), 1)
    112
  """
  reach = max(0, dim - 1) * inner + min(dim, 1) + sum(padding)
  return max(0, (reach - (window - 1) * dilation - 1) // stride + 1)


def pool(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  names = ('window', 'strides', 'padding', 'dilation')
  _per_axis(attributes, shape, *names)
  result = []
  for dim, *options in zip(shape, *(attributes[name] for name in names), strict=True):
    times, symbolic = dims.split(dim)
    if symbolic and options != [1, 1, (0, 0), 1]:
      raise ValueError('windows cannot reach across the batch')
    result.append(dim if symbolic else window_size(times, *options))
  return [(tuple(result), dtype)]


def conv(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (x, _), (w, _) = types
  layout_x, layout_w, layout_y = attributes['layout']
  spatial = ''.join(letter for letter in layout_w if letter not in 'OI')
  for layout, extra, shape in ((layout_x, 'NC', x), (layout_w, 'OI', w), (layout_y, 'NC', x)):
    if sorted(layout) != sorted(spatial + extra) or len(layout) != len(shape):
      raise ValueError(f'layout {layout!r} does not name the axes of {_show(shape)}')
  groups = attributes['groups']
  channels, inputs, outputs = (
    shape[layout.index(letter)]
    for shape, layout, letter in ((x, layout_x, 'C'), (w, layout_w, 'I'), (w, layout_w, 'O'))
  )
  if not all(isinstance(v, int) for v in (channels, inputs, outputs)) or groups < 1:
    raise ValueError('channels must be fixed numbers, groups at least 1')
  if channels != inputs * groups or outputs % groups:
    raise ValueError(
      f'{channels} channels in {groups} groups do not fit a kernel {layout_w} {_show(w)}'
    )
  names = ('strides', 'padding', 'dilation', 'input_dilation')
  sizes: dict[str, Dim] = {'N': x[layout_x.index('N')], 'C': outputs}
  for name in names:
    if len(attributes[name]) != len(spatial):
      raise ValueError(f'{name} {attributes[name]} must have one entry for each of {spatial}')
  for letter, stride, padding, dilation, inner in zip(
    spatial, *(attributes[name] for name in names), strict=True
  ):
    taps, symbolic = dims.split(w[layout_w.index(letter)])
    dim, open_dim = dims.split(x[layout_x.index(letter)])
    if symbolic or open_dim:
      raise ValueError(f'axis {letter} must have a fixed size')
    sizes[letter] = window_size(dim, taps, stride, padding, dilation, inner)
  return [(tuple(sizes[letter] for letter in layout_y), attributes['dtype'])]


def dot(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (a, _), (b, _) = types
  batch, contract = attributes['batch'], attributes['contract']
  for left, right in (batch, contract):
    if [a[_axis(i, len(a))] for i in left] != [b[_axis(i, len(b))] for i in right]:
      raise ValueError(f'axes {left} of {_show(a)} and {right} of {_show(b)} differ in size')
  free = [
    tuple(dim for i, dim in enumerate(shape) if i not in batch[side] + contract[side])
    for side, shape in enumerate((a, b))
  ]
  return [(tuple(a[i] for i in batch[0]) + free[0] + free[1], attributes['dtype'])]


# Integer arithmetic: activations uint8, weights int8, biases int32, multipliers float32.


def _u8(*others: str) -> Callable:
  """Checks types: uint8 first (all inputs if `others` is empty), then `others` in order."""

  def check(types: list[Type]) -> list[Shape]:
    wanted = ['uint8', *others] if others else ['uint8'] * len(types)
    for i, ((_, dtype), want) in enumerate(zip(types, wanted, strict=True)):
      if dtype != want:
        raise ValueError(f'input {i} must be {want}, got {dtype}')
    return [shape for shape, _ in types]

  return check


def quantize(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  [(shape, dtype)] = types
  if dtype != 'float32':
    raise ValueError(f'quantizes float32, got {dtype}')
  return [(shape, 'uint8')]


def dequantize(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  [shape] = _u8()(types)
  return [(shape, 'float32')]


def _per_channel(shapes: Sequence[Shape], channels: Dim) -> None:
  for shape in shapes:
    if shape != (channels,):
      raise ValueError(f'bias and multiplier need one number per output channel, [{channels}]')


def qconv(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  x, w, *rest = _u8('int8', 'int32', 'float32')(types)
  _per_channel(rest, w[attributes['layout'][1].index('O')])
  return conv([(x, 'uint8'), (w, 'int8')], {**attributes, 'dtype': 'uint8'})


def qdot(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  x, w, *rest = _u8('int8', 'int32', 'float32')(types)
  if not x or len(w) != 2 or x[-1] != w[0]:
    raise ValueError(f'a kernel {_show(w)} does not fit {_show(x)}: its rows are the last axis')
  _per_channel(rest, w[1])
  return [((*x[:-1], w[1]), 'uint8')]


def _per_input(types: list[Type], attributes: Mapping[str, Any]) -> None:
  _u8()(types)
  for name in ('input_zeros', 'multipliers'):
    if len(attributes[name]) != len(types):
      raise ValueError(f'{name} must have one entry for each of {len(types)} inputs')


def qadd(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  _per_input(types, attributes)
  return elementwise(types, attributes)


def qconcat(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  _per_input(types, attributes)
  return concat(types, attributes)


def multiplied(rule: Callable) -> Callable:
  """A sum of uint8 times a float32 multiplier that broadcasts to it."""

  def check(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
    _, multiplier = _u8('float32')(types)
    [(shape, _)] = rule(types[:1], attributes)
    if broadcast_shapes([shape, multiplier]) != shape:
      raise ValueError(f'a multiplier {_show(multiplier)} does not broadcast to {_show(shape)}')
    return [(shape, 'uint8')]

  return check


def qtable(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  shape, table = _u8()(types)
  if table != (256,):
    raise ValueError(f'a table has 256 entries, got {_show(table)}')
  return [(shape, 'uint8')]


def _show(*shapes: Sequence[Any]) -> str:
  return ', '.join('[' + ', '.join(map(str, shape)) + ']' for shape in shapes)
