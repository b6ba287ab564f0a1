"""How each JAX primitive is said with the graph's list of operations."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
import numpy as np

from fqjax.runtime import oplist
from fqjax.tracing import _indexing
from fqjax.tracing._jaxpr import Operation, hidden_jaxprs, open_body, scan_counts
from fqjax.tracing._writer import (
  LONGEST_LOOP,
  Writer,
  concat,
  cut,
  dtype_of,
  fail,
  plain,
  remedy,
  reshape,
  shape_of,
  transpose,
)


def convert(writer: Writer, op: Operation) -> None:
  """Writes the nodes of an operation and binds its outputs.

  Raises:
    Unsupported: the graph has no words for it.
  """
  if op.name in _CONVERTERS:
    names = _CONVERTERS[op.name](writer, op)
  else:
    fail(remedy(op.name))
  for value, name in zip(op.outputs, names, strict=True):
    writer.bind(value, name)


def _same_name(writer: Writer, op: Operation) -> list[str]:
  if op.params.get('out_dtype') is not None:
    fail('a product that changes type: cast (astype) before it')
  name = _RENAMED.get(op.name, op.name)
  return writer.write(name, *map(writer.read, op.inputs))


def _alias(writer: Writer, op: Operation) -> list[str]:
  return [writer.read(value) for value in op.inputs]


def _attribute(**names: str) -> Callable:
  """A converter that copies parameters: attribute=parameter."""

  def run(writer: Writer, op: Operation) -> list[str]:
    attributes = {key: plain(op.params[param]) for key, param in names.items()}
    return writer.write(_RENAMED.get(op.name, op.name), *map(writer.read, op.inputs), **attributes)

  return run


def _reshape(writer: Writer, op: Operation) -> list[str]:
  if op.name == 'reshape' and op.params.get('dimensions') is not None:
    fail('a transposition before the reshape')
  return [reshape(writer, writer.read(op.inputs[0]), shape_of(op.outputs[0].shape))]


def _broadcast(writer: Writer, op: Operation) -> list[str]:
  name, shape = writer.read(op.inputs[0]), shape_of(op.outputs[0].shape)
  if len(op.inputs) > 1:
    fail('shapes known when tracing')
  if writer.shape(name) == shape:
    return [name]
  return writer.write('broadcast', name, shape=shape, axes=plain(op.params['broadcast_dimensions']))


def _transpose(writer: Writer, op: Operation) -> list[str]:
  return [transpose(writer, writer.read(op.inputs[0]), plain(op.params['permutation']))]


def _concat(writer: Writer, op: Operation) -> list[str]:
  names = [writer.read(value) for value in op.inputs]
  return [concat(writer, names, int(op.params['dimension']))]


def _iota(writer: Writer, op: Operation) -> list[str]:
  [out] = op.outputs
  axis = int(op.params['dimension'])
  return writer.write('iota', shape=shape_of(out.shape), dtype=dtype_of(out.dtype), axis=axis)


def _cast(writer: Writer, op: Operation) -> list[str]:
  dtype = dtype_of(op.outputs[0].dtype)
  if dtype == str(op.inputs[0].dtype):
    return _alias(writer, op)
  name = writer.read(op.inputs[0])
  if name in writer.counts and 'float' in dtype:
    # A mean over the batch; what only counts places stays whole.
    fail(remedy('dim_as_value'), 'dim_as_value')
  return writer.write('cast', name, dtype=dtype)


def _batch_size(writer: Writer, op: Operation) -> list[str]:
  one = writer.constant(np.ones((), str(op.outputs[0].dtype)))
  [ones] = writer.write('broadcast', one, shape=shape_of((op.params['dim'],)), axes=())
  names = writer.write('reduce_sum', ones, axes=(0,))
  writer.counts.update(names)
  return names


def _total_order(writer: Writer, op: Operation) -> list[str]:
  """Comparison in which NaN is the largest number; zeros of both signs are one here."""
  a, b = map(writer.read, op.inputs)
  [less] = writer.write(op.name.removesuffix('_to'), a, b)
  if 'float' not in str(op.inputs[0].dtype):
    return [less]
  [beyond] = writer.write('ne', b, b)
  if op.name == 'lt_to':
    [beyond] = writer.write('and', beyond, writer.write('eq', a, a)[0])
  return writer.write('or', less, beyond)


def _clamp(writer: Writer, op: Operation) -> list[str]:
  low, x, high = map(writer.read, op.inputs)
  return writer.write('min', writer.write('max', x, low)[0], high)


def _select(writer: Writer, op: Operation) -> list[str]:
  which, *cases = map(writer.read, op.inputs)
  if str(op.inputs[0].dtype) == 'bool':
    known = writer.known(which)
    if known is not None and known.size and known.all() == known.any():
      return [cases[int(known.all())]]
    return writer.write('select', which, *cases)
  return [_choose(writer, which, cases)]


def _choose(writer: Writer, which: str, cases: Sequence[str]) -> str:
  """The case of a whole number, the first below and the last above."""
  result = cases[-1]
  for i in reversed(range(len(cases) - 1)):
    if cases[i] != result:
      number = writer.constant(np.asarray(i, writer.dtype(which)))
      [hit] = writer.write('le', which, number)
      [result] = writer.write('select', hit, result, cases[i])
  return result


def _round(writer: Writer, op: Operation) -> list[str]:
  even = op.params['rounding_method'] == lax.RoundingMethod.TO_NEAREST_EVEN
  return writer.write('round', writer.read(op.inputs[0]), halves='even' if even else 'away')


def _arg_reduce(writer: Writer, op: Operation) -> list[str]:
  [axis], dtype = op.params['axes'], dtype_of(op.params['index_dtype'])
  return writer.write(op.name, writer.read(op.inputs[0]), axis=int(axis), dtype=dtype)


def _pool(writer: Writer, op: Operation) -> list[str]:
  params, name = op.params, op.name
  if name == 'reduce_window':
    name = _monoid(writer, op)
  if set(params['base_dilation']) - {1}:
    fail('windows over a tensor without gaps (base_dilation 1)')
  return writer.write(
    _RENAMED[name],
    writer.read(op.inputs[0]),
    window=plain(params['window_dimensions']),
    strides=plain(params['window_strides']),
    padding=plain(params['padding']),
    dilation=plain(params['window_dilation']),
  )


def _monoid(writer: Writer, op: Operation) -> str:
  """The pooling a general `reduce_window` is: JAX keeps it general for a traced initial value."""
  jaxprs = hidden_jaxprs(op)
  steps = [eqn.primitive.name for eqn in jaxprs[0].eqns] if len(jaxprs) == 1 else []
  initial = writer.known(writer.read(op.inputs[1])) if len(op.inputs) == 2 else None
  if len(steps) == 1 and initial is not None:
    floating = str(op.inputs[0].dtype) in ('float16', 'bfloat16', 'float32', 'float64')
    info = None if floating else np.iinfo(op.inputs[0].dtype)
    start = {
      'add': 0,
      'max': -np.inf if info is None else info.min,
      'min': np.inf if info is None else info.max,
    }.get(steps[0])
    if start is not None and initial == start:
      return {'add': 'reduce_window_sum'}.get(steps[0], f'reduce_window_{steps[0]}')
  fail(remedy('reduce_window'))


def _conv(writer: Writer, op: Operation) -> list[str]:
  params, numbers = op.params, op.params['dimension_numbers']
  if params['batch_group_count'] != 1:
    fail('this is a gradient (batch_group_count): trace the forward function only')
  spatial = 'DHW'[-(len(numbers.lhs_spec) - 2) :] if len(numbers.lhs_spec) > 2 else ''
  if len(spatial) != len(numbers.lhs_spec) - 2:
    fail('at most three spatial axes')

  def layout(spec: Sequence[int], letters: str) -> str:
    return ''.join(letter for _, letter in sorted(zip(spec, letters + spatial, strict=True)))

  return writer.write(
    'conv',
    *map(writer.read, op.inputs),
    strides=plain(params['window_strides']),
    padding=plain(params['padding']),
    dilation=plain(params['rhs_dilation']),
    input_dilation=plain(params['lhs_dilation']),
    groups=int(params['feature_group_count']),
    layout=(
      layout(numbers.lhs_spec, 'NC'),
      layout(numbers.rhs_spec, 'OI'),
      layout(numbers.out_spec, 'NC'),
    ),
    dtype=dtype_of(op.outputs[0].dtype),
    precision=_precision(params['precision']),
  )


def _dot(writer: Writer, op: Operation) -> list[str]:
  contract, batch = op.params['dimension_numbers']
  return writer.write(
    'dot',
    *map(writer.read, op.inputs),
    contract=plain(contract),
    batch=plain(batch),
    dtype=dtype_of(op.outputs[0].dtype),
    precision=_precision(op.params['precision']),
  )


def _precision(precision: Any) -> str:
  if precision is None:
    return 'default'
  parts = precision if isinstance(precision, (tuple, list)) else (precision,)
  names = [part if isinstance(part, str) else part.name.lower() for part in parts]
  return names[0] if len(set(names)) == 1 else ','.join(names)


def _scan(writer: Writer, op: Operation) -> list[str]:
  """Writes out every step."""
  [body], params = op.bodies, op.params
  length = params['length']
  constants, carried = scan_counts(params, op.inputs)
  if not isinstance(length, int):
    fail('a loop over the batch: jax.vmap')
  if length > LONGEST_LOOP:
    fail(remedy('scan'))
  carry = [writer.read(value) for value in body.operands[constants : constants + carried]]
  stacks = [writer.read(value) for value in body.operands[constants + carried :]]
  rows: list[list[str]] = []
  for step in reversed(range(length)) if params['reverse'] else range(length):
    program = open_body(body, op.scope, op.tracebacks)
    parts = []
    for name in stacks:
      shape = writer.shape(name)
      parts.append(reshape(writer, cut(writer, name, 0, step, step + 1), shape[1:]))
    for value, name in zip(program.inputs[constants:], carry + parts, strict=True):
      writer.bind(value, name)
    writer.run(program)
    results = [writer.read(value) for value in program.outputs]
    carry, row = results[:carried], results[carried:]
    rows.append(row)
  if params['reverse']:
    rows.reverse()
  stacked = []
  for column in zip(*rows, strict=True):
    parts = [reshape(writer, name, (1, *writer.shape(name))) for name in column]
    stacked.append(concat(writer, parts, 0))
  if len(carry) + len(stacked) != len(op.outputs):
    fail('a loop of at least one step')
  return carry + stacked


def _cond(writer: Writer, op: Operation) -> list[str]:
  """The branch that is known to be taken, or all of them and a choice."""
  which = writer.read(op.inputs[0])
  known, bodies = writer.known(which), op.bodies
  if known is not None:
    bodies = (bodies[min(max(int(known), 0), len(bodies) - 1)],)
  branches = []
  for body in bodies:
    program = open_body(body, op.scope, op.tracebacks)
    writer.run(program)
    branches.append([writer.read(value) for value in program.outputs])
  return [_choose(writer, which, cases) for cases in zip(*branches, strict=True)]


_RENAMED = {
  'add_any': 'add', 'rev': 'reverse', 'reduce_window_sum': 'pool_sum',
  'reduce_window_max': 'pool_max', 'reduce_window_min': 'pool_min',
}  # fmt: skip

_ALIASES = ('copy', 'copy_p', 'stop_gradient', 'device_put', 'sharding_constraint', 'pvary',
            'optimization_barrier')  # fmt: skip

_CONVERTERS: dict[str, Callable[[Writer, Operation], list[str]]] = {
  **dict.fromkeys((*oplist.UNARY, *oplist.BINARY, *oplist.COMPARE), _same_name),
  'add_any': _same_name,
  'pow': _same_name,
  'is_finite': _same_name,
  **dict.fromkeys(_ALIASES, _alias),
  'integer_pow': _attribute(exponent='y'),
  **dict.fromkeys(oplist.REDUCE, _attribute(axes='axes')),
  **dict.fromkeys(oplist.CUMULATIVE, _attribute(axis='axis', reverse='reverse')),
  'rev': _attribute(axes='dimensions'),
  'sort': _attribute(axis='dimension', keys='num_keys'),
  'top_k': _attribute(axis='axis', k='k'),
  'argmax': _arg_reduce,
  'argmin': _arg_reduce,
  'broadcast_in_dim': _broadcast,
  'clamp': _clamp,
  'concatenate': _concat,
  'cond': _cond,
  'conv_general_dilated': _conv,
  'convert_element_type': _cast,
  'dim_as_value': _batch_size,
  'dot_general': _dot,
  'dynamic_slice': _indexing.dynamic_slice,
  'expand_dims': _reshape,
  'gather': _indexing.gather,
  'iota': _iota,
  'le_to': _total_order,
  'lt_to': _total_order,
  'pad': _indexing.pad,
  'reduce_window': _pool,
  'reduce_window_max': _pool,
  'reduce_window_min': _pool,
  'reduce_window_sum': _pool,
  'reshape': _reshape,
  'round': _round,
  'scan': _scan,
  'select_n': _select,
  'slice': _indexing.slice,
  'split': _indexing.split,
  'squeeze': _reshape,
  'stack': _indexing.stack,
  'tile': _indexing.tile,
  'transpose': _transpose,
  'unstack': _indexing.unstack,
}
