"""The closed list of operations a graph may hold: attributes, shapes and types of each.

Elementwise operations broadcast as NumPy does between tensors of one rank; a scalar goes with
anything. What frameworks call ReLU, softmax, layer norm, nearest or bilinear resizing are
compositions of these. Padding is (before, after) per axis; of `pad` it may not be negative.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fqjax.runtime import dims
from fqjax.runtime.dims import Dim, Shape

DTYPES = (
  'bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
  'float16', 'bfloat16', 'float32', 'float64',
)  # fmt: skip

Type = tuple[Shape, str]


class Op(NamedTuple):
  """One entry of the list.

  Attributes:
    arity: number of inputs; None for one or more.
    attributes: name -> kind, see `KINDS`.
    infer: (types of the inputs, attributes) -> types of the outputs; raises ValueError.
  """

  arity: int | None
  attributes: Mapping[str, str]
  infer: Callable[[list[Type], Mapping[str, Any]], list[Type]]


def infer(op: str, types: Sequence[Type], attributes: Mapping[str, Any]) -> list[Type]:
  """Shapes and types an operation makes of these.

  Args:
    op: its name.
    types: (shape, dtype) of each input.
    attributes: exactly those it has.

  Raises:
    ValueError: what does not fit.

  Example:
    >>> infer('reduce_sum', [(('n', 7, 7, 3), 'float32')], {'axes': (1, 2)})
    [(('n', 3), 'float32')]
  """
  if op not in OPS:
    raise ValueError(f'{op!r} is not an operation of this version')
  rule = OPS[op]
  if rule.arity is None and not types:
    raise ValueError('needs an input')
  if rule.arity is not None and len(types) != rule.arity:
    raise ValueError(f'takes {rule.arity} inputs, got {len(types)}')
  if set(attributes) != set(rule.attributes):
    raise ValueError(
      f'has attributes {", ".join(sorted(rule.attributes)) or "(none)"}; '
      f'got {", ".join(sorted(attributes)) or "(none)"}'
    )
  for name, kind in rule.attributes.items():
    if not KINDS[kind](attributes[name]):
      raise ValueError(f'{name} must be {kind}, got {attributes[name]!r}')
  return rule.infer(list(types), attributes)


# What attributes may be.


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> bool:
  return isinstance(value, tuple) and all(map(_is_int, value))


def _pair_of_axes(value: Any) -> bool:
  return isinstance(value, tuple) and len(value) == 2 and all(map(_ints, value))


KINDS: Mapping[str, Callable[[Any], bool]] = {
  'a whole number': _is_int,
  'True or False': lambda v: isinstance(v, bool),
  'whole numbers': _ints,
  'whole numbers >= 1': lambda v: _ints(v) and all(x >= 1 for x in v),
  'pairs of whole numbers': lambda v: (
    isinstance(v, tuple) and all(_ints(x) and len(x) == 2 for x in v)
  ),
  'a shape': dims.is_shape,
  'axes of both inputs': _pair_of_axes,
  'a dtype': lambda v: v in DTYPES,
  'three layouts': lambda v: isinstance(v, tuple) and len(v) == 3 and all(map(_is_text, v)),
  'a precision': lambda v: isinstance(v, str),
  "'even' or 'away'": lambda v: v in ('even', 'away'),
  "'clip' or 'fill'": lambda v: v in ('clip', 'fill'),
}


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


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


def _elementwise(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  _same_dtype(types)
  return [(broadcast_shapes([shape for shape, _ in types]), types[0][1])]


def _power(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  return [(broadcast_shapes([shape for shape, _ in types]), types[0][1])]


def _compare(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  _same_dtype(types)
  return [(broadcast_shapes([shape for shape, _ in types]), 'bool')]


def _select(types: list[Type], _: Mapping[str, Any]) -> list[Type]:
  if types[0][1] != 'bool':
    raise ValueError(f'the first input chooses and must be bool, got {types[0][1]}')
  _same_dtype(types[1:])
  return [(broadcast_shapes([shape for shape, _ in types]), types[1][1])]


def _cast(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  return [(types[0][0], attributes['dtype'])]


def _same_dtype(types: Sequence[Type]) -> None:
  if len({dtype for _, dtype in types}) > 1:
    raise ValueError(f'inputs of different types: {", ".join(dtype for _, dtype in types)}')


# Along axes.


def _axis(axis: int, rank: int) -> int:
  if not 0 <= axis < rank:
    raise ValueError(f'axis {axis} is not an axis of a tensor of rank {rank}')
  return axis


def _reduce(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  axes = [_axis(axis, len(shape)) for axis in attributes['axes']]
  if len(set(axes)) < len(axes):
    raise ValueError(f'axes {attributes["axes"]} repeat')
  return [(tuple(dim for i, dim in enumerate(shape) if i not in axes), dtype)]


def _arg_reduce(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  [(shape, _)] = _reduce(types, {'axes': (attributes['axis'],)})
  return [(shape, attributes['dtype'])]


def _same(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  for axis in attributes['axes'] if 'axes' in attributes else (attributes['axis'],):
    _axis(axis, len(types[0][0]))
  return [types[0]]


def _sort(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  if len({shape for shape, _ in types}) > 1:
    raise ValueError(f'sorted together, shapes must be equal: {_show(*(s for s, _ in types))}')
  _axis(attributes['axis'], len(types[0][0]))
  if not 1 <= attributes['keys'] <= len(types):
    raise ValueError(f'keys = {attributes["keys"]} of {len(types)} inputs')
  return list(types)


def _top_k(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  shape, dtype = types[0]
  axis = _axis(attributes['axis'], len(shape))
  times, symbolic = dims.split(shape[axis])
  if symbolic or not 0 <= attributes['k'] <= times:
    raise ValueError(f'k = {attributes["k"]} of an axis of {shape[axis]}')
  out = shape[:axis] + (attributes['k'],) + shape[axis + 1 :]
  return [(out, dtype), (out, 'int32')]


def _iota(_: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  _axis(attributes['axis'], len(attributes['shape']))
  return [(attributes['shape'], attributes['dtype'])]


# Shapes.


def _reshape(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), new = types[0], attributes['shape']
  if dims.size(shape) != dims.size(new):
    raise ValueError(f'cannot reshape {_show(shape)} to {_show(new)}')
  return [(new, dtype)]


def _transpose(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), order = types[0], attributes['permutation']
  if sorted(order) != list(range(len(shape))):
    raise ValueError(f'{order} does not order the axes of {_show(shape)}')
  return [(tuple(shape[i] for i in order), dtype)]


def _broadcast(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
  (shape, dtype), new, axes = types[0], attributes['shape'], attributes['axes']
  if len(axes) != len(shape) or list(axes) != sorted(set(axes)):
    raise ValueError(f'axes {axes} must name an axis of the result for each of {_show(shape)}')
  for dim, axis in zip(shape, axes, strict=True):
    if dim not in (1, new[_axis(axis, len(new))]):
      raise ValueError(f'{_show(shape)} does not broadcast to {_show(new)} along {axes}')
  return [(new, dtype)]


def _concat(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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


def _slice(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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


def _pad(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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


def _gather(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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
  for dim, part in zip(shape, sizes, strict=True):
    if part != dim and (dims.split(part)[1] or dims.split(dim)[1]):
      raise ValueError(f'the batch is taken whole, not {_show(sizes)} of {_show(shape)}')
    if part != dim and dims.split(part) > dims.split(dim):
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


def _pool(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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


def _conv(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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
  if not all(_is_int(v) for v in (channels, inputs, outputs)) or groups < 1:
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


def _dot(types: list[Type], attributes: Mapping[str, Any]) -> list[Type]:
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


def _show(*shapes: Sequence[Any]) -> str:
  return ', '.join('[' + ', '.join(map(str, shape)) + ']' for shape in shapes)


_INT, _INTS, _SHAPE, _DTYPE = 'a whole number', 'whole numbers', 'a shape', 'a dtype'
_STEPS, _PAIRS, _AXES = 'whole numbers >= 1', 'pairs of whole numbers', 'axes of both inputs'

UNARY = (
  'neg', 'abs', 'sign', 'floor', 'ceil', 'exp', 'exp2', 'expm1', 'log', 'log1p', 'sqrt', 'rsqrt',
  'cbrt', 'square', 'tanh', 'logistic', 'erf', 'erfc', 'sin', 'cos', 'tan', 'asin', 'acos', 'atan',
  'sinh', 'cosh', 'asinh', 'acosh', 'atanh', 'not',
)  # fmt: skip
BINARY = ('add', 'sub', 'mul', 'div', 'max', 'min', 'rem', 'atan2', 'and', 'or', 'xor')
COMPARE = ('eq', 'ne', 'lt', 'le', 'gt', 'ge')
REDUCE = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or')
CUMULATIVE = ('cumsum', 'cumprod', 'cummax', 'cummin')
POOL = ('pool_max', 'pool_min', 'pool_sum')

OPS: Mapping[str, Op] = {
  **dict.fromkeys(UNARY, Op(1, {}, _elementwise)),
  **dict.fromkeys(BINARY, Op(2, {}, _elementwise)),
  **dict.fromkeys(COMPARE, Op(2, {}, _compare)),
  'pow': Op(2, {}, _power),
  'integer_pow': Op(1, {'exponent': _INT}, _elementwise),
  'round': Op(1, {'halves': "'even' or 'away'"}, _elementwise),
  'is_finite': Op(1, {}, _compare),
  # inputs: which, where False, where True
  'select': Op(3, {}, _select),
  'cast': Op(1, {'dtype': _DTYPE}, _cast),
  **dict.fromkeys(REDUCE, Op(1, {'axes': _INTS}, _reduce)),
  **dict.fromkeys(('argmax', 'argmin'), Op(1, {'axis': _INT, 'dtype': _DTYPE}, _arg_reduce)),
  **dict.fromkeys(CUMULATIVE, Op(1, {'axis': _INT, 'reverse': 'True or False'}, _same)),
  'sort': Op(None, {'axis': _INT, 'keys': _INT}, _sort),
  'top_k': Op(1, {'axis': _INT, 'k': _INT}, _top_k),
  'iota': Op(0, {'shape': _SHAPE, 'dtype': _DTYPE, 'axis': _INT}, _iota),
  'reshape': Op(1, {'shape': _SHAPE}, _reshape),
  'transpose': Op(1, {'permutation': _INTS}, _transpose),
  # axes: where each axis of the input lies in the result
  'broadcast': Op(1, {'shape': _SHAPE, 'axes': _INTS}, _broadcast),
  'concat': Op(None, {'axis': _INT}, _concat),
  'slice': Op(1, {'start': _INTS, 'stop': _SHAPE, 'strides': _STEPS}, _slice),
  # inputs: tensor, value; interior: how many values between two elements
  'pad': Op(2, {'padding': _PAIRS, 'interior': _INTS}, _pad),
  'reverse': Op(1, {'axes': _INTS}, _same),
  # XLA's gather. Inputs: operand, places [..., k]. Each place names a corner (its k numbers lie
  # along the axes `index_map`) of a part `sizes` of the operand; parts lose their axes `collapsed`
  # and `operand_batch` (which follow `index_batch` of the places) and lie in the result at `offset`.
  'gather': Op(
    2,
    {
      'offset': _INTS,
      'collapsed': _INTS,
      'index_map': _INTS,
      'operand_batch': _INTS,
      'index_batch': _INTS,
      'sizes': _SHAPE,
      'mode': "'clip' or 'fill'",
    },
    _gather,
  ),
  **dict.fromkeys(
    POOL, Op(1, {'window': _STEPS, 'strides': _STEPS, 'padding': _PAIRS, 'dilation': _STEPS}, _pool)
  ),
  # layout: letters of the input's, the kernel's and the output's axes, e.g. NHWC, HWIO, NHWC
  'conv': Op(
    2,
    {
      'strides': _STEPS,
      'padding': _PAIRS,
      'dilation': _STEPS,
      'input_dilation': _STEPS,
      'groups': _INT,
      'layout': 'three layouts',
      'dtype': _DTYPE,
      'precision': 'a precision',
    },
    _conv,
  ),
  # axes of the result: batch, what is left of the first input, what is left of the second
  'dot': Op(
    2,
    {'contract': _AXES, 'batch': _AXES, 'dtype': _DTYPE, 'precision': 'a precision'},
    _dot,
  ),
}
