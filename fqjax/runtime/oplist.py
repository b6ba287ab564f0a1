"""The closed list of operations a graph may hold: attributes, shapes and types of each.

Elementwise operations broadcast as NumPy does between tensors of one rank; a scalar goes with
anything. What frameworks call ReLU, softmax, layer norm, nearest or bilinear resizing are
compositions of these. Padding is (before, after) per axis; of `pad` it may not be negative.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from fqjax.runtime import _rules, dims
from fqjax.runtime._rules import Type as Type
from fqjax.runtime._rules import broadcast_shapes as broadcast_shapes
from fqjax.runtime._rules import window_size as window_size

DTYPES = (
  'bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
  'float16', 'bfloat16', 'float32', 'float64',
)  # fmt: skip


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


def _is_number(value: Any) -> bool:
  return isinstance(value, float) and math.isfinite(value)


def _ints(value: Any) -> bool:
  return isinstance(value, tuple) and all(map(_is_int, value))


def _pair_of_axes(value: Any) -> bool:
  return isinstance(value, tuple) and len(value) == 2 and all(map(_ints, value))


KINDS: Mapping[str, Callable[[Any], bool]] = {
  'a whole number': _is_int,
  'True or False': lambda v: isinstance(v, bool),
  'a number': _is_number,
  'a number > 0': lambda v: _is_number(v) and v > 0,
  'a number or None': lambda v: v is None or _is_number(v),
  'numbers': lambda v: isinstance(v, tuple) and all(map(_is_number, v)),
  'a u8 value': lambda v: _is_int(v) and 0 <= v <= 255,
  'u8 values': lambda v: _ints(v) and all(0 <= x <= 255 for x in v),
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


_INT, _INTS, _SHAPE, _DTYPE = 'a whole number', 'whole numbers', 'a shape', 'a dtype'
_STEPS, _PAIRS, _AXES = 'whole numbers >= 1', 'pairs of whole numbers', 'axes of both inputs'

UNARY = (
  'neg', 'abs', 'sign', 'floor', 'ceil', 'exp', 'exp2', 'expm1', 'log', 'log1p', 'sqrt', 'rsqrt',
  'cbrt', 'square', 'tanh', 'logistic', 'erf', 'erfc', 'sin', 'cos', 'tan', 'asin', 'acos', 'atan',
  'sinh', 'cosh', 'asinh', 'acosh', 'atanh', 'not',
)  # fmt: skip
BINARY = ('add', 'sub', 'mul', 'div', 'max', 'min', 'rem', 'atan2', 'and', 'or', 'xor')
COMPARE = ('eq', 'ne', 'lt', 'le', 'gt', 'ge')
# Results of these are quantized: their arithmetic is docs/format.md.
INTEGER = ('qconv', 'qdot', 'qadd', 'qconcat', 'qsum', 'qpool_sum', 'qtable')
REDUCE = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or')
CUMULATIVE = ('cumsum', 'cumprod', 'cummax', 'cummin')
POOL = ('pool_max', 'pool_min', 'pool_sum')

_U8, _NUMBER = 'a u8 value', 'a number'
_WINDOW = {'window': _STEPS, 'strides': _STEPS, 'padding': _PAIRS, 'dilation': _STEPS}
# How a result is stored: its zero point, and the limits that carry relu and relu6.
_STORED = {'zero': _U8, 'low': _U8, 'high': _U8}
_JOINED = {'input_zeros': 'u8 values', 'multipliers': 'numbers', **_STORED}

OPS: Mapping[str, Op] = {
  **dict.fromkeys(UNARY, Op(1, {}, _rules.of_floats)),
  **dict.fromkeys(('neg', 'abs', 'sign', 'square'), Op(1, {}, _rules.of_numbers)),
  'not': Op(1, {}, _rules.of_bits),
  **dict.fromkeys(BINARY, Op(2, {}, _rules.elementwise)),
  **dict.fromkeys(('sub', 'div', 'rem'), Op(2, {}, _rules.of_numbers)),
  'atan2': Op(2, {}, _rules.of_floats),
  **dict.fromkeys(('and', 'or', 'xor'), Op(2, {}, _rules.of_bits)),
  **dict.fromkeys(COMPARE, Op(2, {}, _rules.compare)),
  'pow': Op(2, {}, _rules.power),
  'integer_pow': Op(1, {'exponent': _INT}, _rules.of_numbers),
  'round': Op(1, {'halves': "'even' or 'away'"}, _rules.of_floats),
  'is_finite': Op(1, {}, _rules.compare),
  # max with low, then min with high; None is no limit
  'clamp': Op(1, {'low': 'a number or None', 'high': 'a number or None'}, _rules.clamp),
  # a sum, clamped
  'add_clamp': Op(2, {'low': 'a number or None', 'high': 'a number or None'}, _rules.add_clamp),
  # inputs: which, where False, where True
  'select': Op(3, {}, _rules.select),
  'cast': Op(1, {'dtype': _DTYPE}, _rules.cast),
  **dict.fromkeys(REDUCE, Op(1, {'axes': _INTS}, _rules.reduce)),
  **dict.fromkeys(('reduce_and', 'reduce_or'), Op(1, {'axes': _INTS}, _rules.of_bits)),
  **dict.fromkeys(('argmax', 'argmin'), Op(1, {'axis': _INT, 'dtype': _DTYPE}, _rules.arg_reduce)),
  **dict.fromkeys(CUMULATIVE, Op(1, {'axis': _INT, 'reverse': 'True or False'}, _rules.same)),
  'sort': Op(None, {'axis': _INT, 'keys': _INT}, _rules.sort),
  'top_k': Op(1, {'axis': _INT, 'k': _INT}, _rules.top_k),
  'iota': Op(0, {'shape': _SHAPE, 'dtype': _DTYPE, 'axis': _INT}, _rules.iota),
  'reshape': Op(1, {'shape': _SHAPE}, _rules.reshape),
  'transpose': Op(1, {'permutation': _INTS}, _rules.transpose),
  # axes: where each axis of the input lies in the result
  'broadcast': Op(1, {'shape': _SHAPE, 'axes': _INTS}, _rules.broadcast),
  'concat': Op(None, {'axis': _INT}, _rules.concat),
  'slice': Op(1, {'start': _INTS, 'stop': _SHAPE, 'strides': _STEPS}, _rules.slice_),
  # inputs: tensor, value; interior: how many values between two elements
  'pad': Op(2, {'padding': _PAIRS, 'interior': _INTS}, _rules.pad),
  'reverse': Op(1, {'axes': _INTS}, _rules.same),
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
    _rules.gather,
  ),
  **dict.fromkeys(POOL, Op(1, _WINDOW, _rules.pool)),
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
    _rules.conv,
  ),
  # axes of the result: batch, what is left of the first input, what is left of the second
  'dot': Op(
    2,
    {'contract': _AXES, 'batch': _AXES, 'dtype': _DTYPE, 'precision': 'a precision'},
    _rules.dot,
  ),
  'quantize': Op(1, {'scale': 'a number > 0', 'zero': _U8}, _rules.quantize),
  'dequantize': Op(1, {'scale': 'a number > 0', 'zero': _U8}, _rules.dequantize),
  # inputs: uint8, weights, bias, multipliers
  'qconv': Op(
    4,
    {
      'strides': _STEPS,
      'padding': _PAIRS,
      'dilation': _STEPS,
      'input_dilation': _STEPS,
      'groups': _INT,
      'layout': 'three layouts',
      'input_zero': _U8,
      **_STORED,
    },
    _rules.qconv,
  ),
  # weights [inputs, outputs] meet the last axis
  'qdot': Op(4, {'input_zero': _U8, **_STORED}, _rules.qdot),
  'qadd': Op(2, _JOINED, _rules.qadd),
  'qconcat': Op(None, {'axis': _INT, **_JOINED}, _rules.qconcat),
  # inputs: uint8, multiplier
  'qsum': Op(2, {'axes': _INTS, 'input_zero': _U8, **_STORED}, _rules.multiplied(_rules.reduce)),
  'qpool_sum': Op(2, {**_WINDOW, 'input_zero': _U8, **_STORED}, _rules.multiplied(_rules.pool)),
  # inputs: uint8, its 256 results
  'qtable': Op(2, {}, _rules.qtable),
}
