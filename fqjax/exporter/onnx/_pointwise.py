"""Functions of single values."""

from collections.abc import Callable, Mapping
import math

from fqjax.exporter.onnx._writer import Writer
from fqjax.runtime import oplist
from fqjax.runtime.graph import Node

# Engines compute with few kinds of integers: these go through a wider one, and back.
WIDER = {'int8': 'int32', 'int16': 'int32', 'uint8': 'int32', 'uint16': 'int32', 'uint32': 'int64'}

_SAME_NAME = {
  op: op.capitalize()
  for op in (
    'neg', 'abs', 'sign', 'floor', 'ceil', 'exp', 'log', 'sqrt', 'tanh', 'erf', 'sin', 'cos', 'tan',
    'asin', 'acos', 'atan', 'sinh', 'cosh', 'asinh', 'acosh', 'atanh', 'add', 'sub', 'mul', 'div',
    'max', 'min', 'pow',
  )
} | {'logistic': 'Sigmoid', 'lt': 'Less', 'le': 'LessOrEqual', 'gt': 'Greater',
     'ge': 'GreaterOrEqual', 'eq': 'Equal'}  # fmt: skip
_LOGIC = {'and': 'And', 'or': 'Or', 'xor': 'Xor', 'not': 'Not', 'max': 'Or', 'min': 'And'}


def bitwise(dtype: str, op: str) -> bool:
  """True for what ONNX has from operator set 18 on."""
  return op in ('and', 'or', 'xor', 'not') and dtype != 'bool'


def _exp2(w: Writer, x: str, dtype: str) -> str:
  return w.emit('Pow', w.scalar(2, dtype), x)


def _expm1(w: Writer, x: str, dtype: str) -> str:
  # tanh(x/2) (exp(x) + 1): exp(x) - 1 would lose all digits next to 0; beyond 1 it is the better.
  half = w.emit('Tanh', w.emit('Mul', x, w.scalar(0.5, dtype)))
  exp, one = w.emit('Exp', x), w.scalar(1, dtype)
  near = w.emit('Mul', half, w.emit('Add', exp, one))
  far = w.emit('Greater', w.emit('Abs', x), one)
  return w.emit('Where', far, w.emit('Sub', exp, one), near)


def _log1p(w: Writer, x: str, dtype: str) -> str:
  # With u = 1 + x as rounded, log(u) x / (u - 1) has the error of the log alone.
  one = w.scalar(1, dtype)
  u = w.emit('Add', one, x)
  gap = w.emit('Sub', u, one)
  exact = w.emit('Or', w.emit('Equal', u, one), w.emit('IsInf', u))
  ratio = w.emit('Div', x, w.emit('Where', exact, one, gap))
  scaled = w.emit('Mul', w.emit('Log', u), ratio)
  return w.emit('Where', w.emit('Equal', u, one), x, w.emit('Where', exact, u, scaled))


def _cbrt(w: Writer, x: str, dtype: str) -> str:
  root = w.emit('Pow', w.emit('Abs', x), w.scalar(1 / 3, dtype))
  return w.emit('Mul', w.emit('Sign', x), root)


def _not(w: Writer, x: str, dtype: str) -> str:
  return w.emit('Not' if dtype == 'bool' else 'BitwiseNot', x)


_UNARY: Mapping[str, Callable[[Writer, str, str], str]] = {
  'exp2': _exp2,
  'expm1': _expm1,
  'log1p': _log1p,
  'cbrt': _cbrt,
  'not': _not,
  'square': lambda w, x, _: w.emit('Mul', x, x),
  'rsqrt': lambda w, x, _: w.emit('Reciprocal', w.emit('Sqrt', x)),
  'erfc': lambda w, x, dtype: w.emit('Sub', w.scalar(1, dtype), w.emit('Erf', x)),
}


def _atan2(w: Writer, y: str, x: str, dtype: str) -> str:
  zero, pi = w.scalar(0, dtype), w.scalar(math.pi, dtype)
  turn = w.emit('Where', w.emit('Less', y, zero), w.emit('Neg', pi), pi)
  angle = w.emit('Atan', w.emit('Div', y, x))
  angle = w.emit('Where', w.emit('Less', x, zero), w.emit('Add', angle, turn), angle)
  nowhere = w.emit('And', w.emit('Equal', x, zero), w.emit('Equal', y, zero))
  return w.emit('Where', nowhere, zero, angle)


def _two(w: Writer, op: str, a: str, b: str, dtype: str) -> str:
  if dtype == 'bool' and op in _LOGIC:
    return w.emit(_LOGIC[op], a, b)
  if op in ('and', 'or', 'xor'):
    return w.emit(f'Bitwise{op.capitalize()}', a, b)
  if op == 'ne':
    return w.emit('Not', w.emit('Equal', a, b))
  if op == 'rem':
    return w.emit('Mod', a, b, fmod=1)
  if op == 'atan2':
    return _atan2(w, a, b, dtype)
  return w.emit(_SAME_NAME[op], a, b)


def unary(w: Writer, node: Node) -> None:
  """Functions of one tensor."""
  ([x], order), dtype = w.aligned(node.inputs), w.dtype(node.inputs[0])
  wide = WIDER.get(dtype, dtype)
  x = w.cast(x, dtype, wide)
  y = _UNARY[node.op](w, x, wide) if node.op in _UNARY else w.emit(_SAME_NAME[node.op], x)
  w.bind(node.outputs[0], w.cast(y, wide, dtype), order)


def binary(w: Writer, node: Node) -> None:
  """Functions of two tensors, comparisons too."""
  (values, order), dtype = w.aligned(node.inputs), w.dtype(node.inputs[0])
  wide = dtype if bitwise(dtype, node.op) or node.op in ('eq', 'ne') else WIDER.get(dtype, dtype)
  a, b = (
    w.cast(value, w.dtype(name), wide) for value, name in zip(values, node.inputs, strict=True)
  )
  y = _two(w, node.op, a, b, wide)
  w.bind(node.outputs[0], y if node.op in oplist.COMPARE else w.cast(y, wide, dtype), order)


def power(w: Writer, node: Node) -> None:
  """`pow`, whose exponent may have another type, and `integer_pow`."""
  values, order = w.aligned(node.inputs)
  dtype = w.dtype(node.inputs[0])
  wide = WIDER.get(dtype, dtype)
  base = w.cast(values[0], dtype, wide)
  if node.op == 'pow':
    exponent = values[1]
  else:
    exponent = w.scalar(node.attributes['exponent'], wide)
  w.bind(node.outputs[0], w.cast(w.emit('Pow', base, exponent), wide, dtype), order)


def round_(w: Writer, node: Node) -> None:
  """Halves to even as ONNX does, or away from zero."""
  ([x], order), dtype = w.aligned(node.inputs), w.dtype(node.inputs[0])
  if node.attributes['halves'] == 'even':
    y = w.emit('Round', x)
  else:
    up = w.emit('Floor', w.emit('Add', w.emit('Abs', x), w.scalar(0.5, dtype)))
    y = w.emit('Mul', w.emit('Sign', x), up)
  w.bind(node.outputs[0], y, order)


def is_finite(w: Writer, node: Node) -> None:
  """Neither NaN nor an infinity."""
  [x], order = w.aligned(node.inputs)
  odd = w.emit('Or', w.emit('IsNaN', x), w.emit('IsInf', x))
  w.bind(node.outputs[0], w.emit('Not', odd), order)


def clamp(w: Writer, node: Node) -> None:
  """Relu where that is what it is, which engines fuse best."""
  [x], order = w.aligned(node.inputs)
  w.bind(node.outputs[0], _limited(w, node, x), order)


def add_clamp(w: Writer, node: Node) -> None:
  """Add, and what `clamp` is."""
  (values, order), dtype = w.aligned(node.inputs), w.dtype(node.inputs[0])
  wide = WIDER.get(dtype, dtype)
  y = w.cast(w.emit('Add', *(w.cast(v, dtype, wide) for v in values)), wide, dtype)
  w.bind(node.outputs[0], _limited(w, node, y), order)


def _limited(w: Writer, node: Node, x: str) -> str:
  low, high = node.attributes['low'], node.attributes['high']
  if (low, high) == (0.0, None):
    return w.emit('Relu', x)
  dtype = w.dtype(node.inputs[0])
  return w.emit('Clip', x, *('' if end is None else w.scalar(end, dtype) for end in (low, high)))


def select(w: Writer, node: Node) -> None:
  """Where."""
  ([which, no, yes], order), dtype = w.aligned(node.inputs), w.dtype(node.inputs[1])
  if dtype == 'bool':
    hit = w.emit('And', which, yes)
    y = w.emit('Or', hit, w.emit('And', w.emit('Not', which), no))
  else:
    wide = WIDER.get(dtype, dtype)
    no, yes = (w.cast(value, dtype, wide) for value in (no, yes))
    y = w.cast(w.emit('Where', which, yes, no), wide, dtype)
  w.bind(node.outputs[0], y, order)


def cast(w: Writer, node: Node) -> None:
  """Cast."""
  [x], order = w.aligned(node.inputs)
  w.bind(node.outputs[0], w.emit('Cast', x, to=node.attributes['dtype']), order)


HANDLERS: Mapping[str, Callable[[Writer, Node], None]] = {
  **dict.fromkeys(oplist.UNARY, unary),
  **dict.fromkeys((*oplist.BINARY, *oplist.COMPARE), binary),
  'pow': power,
  'integer_pow': power,
  'round': round_,
  'is_finite': is_finite,
  'clamp': clamp,
  'add_clamp': add_clamp,
  'select': select,
  'cast': cast,
}
