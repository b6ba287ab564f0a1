"""Follows parameters through a program to the operations that use them.

For the rooms that ask what a network does with each of its weights: how much work, in which order,
read how. `summary` makes a table of it, `fqjax.sparsity.trace_layers` a layer per weight.
"""

from collections.abc import Callable, Mapping
import math
from typing import NamedTuple

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np

from fqjax.tracing import _jaxpr
from fqjax.tracing._jaxpr import Operation, Program, Value

# A parameter that passes through these is still the same parameter.
_VIEWS = frozenset({
  'broadcast_in_dim', 'convert_element_type', 'copy', 'copy_p', 'device_put', 'dynamic_slice',
  'expand_dims', 'optimization_barrier', 'reduce_precision', 'reshape', 'rev',
  'sharding_constraint', 'slice', 'squeeze', 'stop_gradient', 'transpose',
})  # fmt: skip

# Real work that is not a count of multiply-accumulates: named in the notes.
_UNCOUNTED = frozenset({
  'cholesky', 'custom_call', 'eig', 'eigh', 'fft', 'ffi_call', 'householder_product', 'lu',
  'pallas_call', 'qr', 'schur', 'svd', 'triangular_solve', 'tridiagonal_solve',
})  # fmt: skip


def trace_parameters(apply_fn: Callable, *args, **kwargs) -> tuple[Program, dict[Value, str]]:
  """Traces `apply_fn(*args, **kwargs)` and tells which of its inputs are parameters.

  Which leaves those are is said in `summary`.

  Args:
    apply_fn: any function that JAX can trace, or a module that is called.
    *args: its arguments; arrays or `jax.ShapeDtypeStruct`s as leaves, anything else is static.
    **kwargs: likewise.

  Returns:
    The program, and the path of every input that is a parameter.

  Example:
    >>> program, parameters = trace_parameters(
    ...   lambda p, x: x @ p['w'], {'w': jnp.eye(2)}, jnp.ones(2)
    ... )
    >>> list(parameters.values())
    ['w']
  """
  if _is_container(apply_fn):
    names = _names_in(apply_fn, '0')
    program = _jaxpr.trace(lambda self, *a, **k: self(*a, **k), apply_fn, *args, **kwargs)
  else:
    names = _parameter_names(args, kwargs)
    program = _jaxpr.trace(apply_fn, *args, **kwargs)
  return program, {value: names[value.name] for value in program.inputs if value.name in names}


def _is_container(tree) -> bool:
  return not jax.tree_util.all_leaves([tree])


def _is_nnx_variable(node) -> bool:
  # By name: this room does not depend on Flax.
  return any(c.__name__ == 'Variable' and 'flax' in c.__module__ for c in type(node).__mro__)


def _names_in(tree, prefix: str) -> dict[str, str]:
  """Input name -> parameter path for the arrays of a container, NNX state left out."""
  names = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_nnx_variable)[0]:
    if _is_nnx_variable(leaf):
      if not any(c.__name__ == 'Param' for c in type(leaf).__mro__):
        continue
    elif not _is_weight(leaf):
      continue
    name = _jaxpr.leaf_name(path)
    names[f'{prefix}/{name}' if prefix else name] = name
  return names


def _is_weight(leaf) -> bool:
  return hasattr(leaf, 'shape') and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _parameter_names(args, kwargs) -> dict[str, str]:
  arguments = [(str(i), arg) for i, arg in enumerate(args)] + list(kwargs.items())
  for name, arg in arguments:
    if isinstance(arg, Mapping) and 'params' in arg:
      return _names_in(arg['params'], f'{name}/params')
  for name, arg in arguments:
    if _is_container(arg) and (names := _names_in(arg, name)):
      return names
  return {}


class Found(NamedTuple):
  """An operation that uses parameters or multiplies matrices.

  Attributes:
    op: the primitive.
    scope: name stack of the whole way in.
    used: paths of the parameters that enter it.
    input: shape of the data that enters.
    output: shape that leaves.
    macs: multiply-accumulates of all iterations.
    times: iterations.
  """

  op: str
  scope: str
  used: frozenset[str]
  input: tuple[int, ...]
  output: tuple[int, ...]
  macs: int
  times: int


class Reader:
  """Walks a program and keeps track of which values are made of which parameters.

  A subclass that wants to see every operation as it is met extends `read_plain`.

  Args:
    parameters: input -> path, of `trace_parameters`.
    capture: arrays the function captured are parameters too.

  Attributes:
    sizes: path -> (number of parameters, bytes).
    notes: what a reader of the counts must know, an ordered set.
  """

  def __init__(self, parameters: Mapping[Value, str], capture: bool = False):
    self.capture = capture
    self.sizes: dict[str, tuple[int, int]] = {}
    self.notes: dict[str, None] = {}
    self._origins: dict[Value, frozenset[str]] = {}
    self._neutral: set[Value] = set()  # made of constants alone
    self._captured: dict[int, str] = {}
    for value, path in parameters.items():
      self.add(value, path)

  def add(self, value: Value, path: str):
    """Declares an input to be the parameter of this path."""
    count = math.prod(value.shape)
    self.sizes[path] = (count, count * np.dtype(value.dtype).itemsize)
    self._origins[value] = frozenset([path])

  def read(self, program: Program, times: int = 1) -> list[Found]:
    """Operations that use parameters or multiply matrices, in order of execution."""
    found = []
    for op in program.operations:
      for value in op.inputs:
        self._meet(value)
      if op.bodies:
        found += self._read_bodies(op, times)
      else:
        found += self.read_plain(op, times)
    return found

  def origins(self, value: Value) -> frozenset[str]:
    """Parameters that alone make up this value; empty for data."""
    return self._origins.get(value, frozenset())

  def all_notes(self) -> tuple[str, ...]:
    """What a reader of the counts must know."""
    if not self._captured:
      return tuple(self.notes)
    count = len(self._captured)
    return (f'no parameters among the arguments: {count} captured arrays counted', *self.notes)

  def _meet(self, value: Value):
    constant = value.constant
    if constant is None or value in self._origins:
      return
    # NumPy arrays are tables (filters, DCT matrices); weights are JAX arrays.
    if self.capture and isinstance(constant, jax.Array) and value.shape and _is_weight(constant):
      path = self._captured.setdefault(id(constant), f'captured_{len(self._captured)}')
      self.add(value, path)
    else:
      self._neutral.add(value)

  def read_plain(self, op: Operation, times: int) -> list[Found]:
    """What one operation without bodies adds."""
    origins = [self.origins(value) for value in op.inputs]
    used = frozenset().union(*origins)
    macs = count_macs(op)
    if op.name in _UNCOUNTED or _multiplies_inside(op):
      self.notes[f'{op.name} (in {op.scope or "no scope"}) is not counted'] = None
    if not used:
      if not op.effects and all(value in self._neutral for value in op.inputs):
        self._neutral.update(op.outputs)
        if not macs:
          return []
    elif op.name in _VIEWS and len(op.inputs) == len(op.outputs):
      self._origins.update((v, o) for v, o in zip(op.outputs, origins, strict=True) if o)
      return []
    elif (op.name in _VIEWS and origins[0]) or all(
      o or value in self._neutral for o, value in zip(origins, op.inputs, strict=True)
    ):
      # Still made of parameters alone: masks, weight standardisation, low-rank products.
      self._origins.update((value, used) for value in op.outputs)
      if not macs:
        return []
    if not (used or macs):
      return []
    data = [value.shape for value, o in zip(op.inputs, origins, strict=True) if not o]
    entering = max(data, key=math.prod, default=()) if not macs else (data or [()])[0]
    return [Found(op.name, op.scope, used, entering, op.outputs[0].shape, macs * times, times)]

  def _read_bodies(self, op: Operation, times: int) -> list[Found]:
    found = []
    for body in op.bodies:
      program = _jaxpr.open_body(body, op.scope)
      for value, operand in zip(program.inputs, body.operands, strict=True):
        if operand in self._origins:
          self._origins[value] = self._origins[operand]
      found.append(self.read(program, times * (1 if body.times is None else body.times)))
      if len(program.outputs) == len(op.outputs):
        for value, inside in zip(op.outputs, program.outputs, strict=True):
          if used := self.origins(inside):
            self._origins[value] = self.origins(value) | used
    macs = [sum(f.macs for f in inside) for inside in found]
    where = f'{op.name} (in {op.scope or "no scope"})'
    if op.name == 'cond' and max(macs) != min(macs):
      self.notes[f'{where}: the costliest of {len(macs)} branches is counted'] = None
    if any(macs) and any(body.times is None for body in op.bodies):
      self.notes[f'{where}: length unknown, one iteration is counted'] = None
    if op.name == 'cond':
      best = macs.index(max(macs))
      found = [
        inside if i == best else [f._replace(macs=0) for f in inside if f.used]
        for i, inside in enumerate(found)
      ]
    return [f for inside in found for f in inside]


def _multiplies_inside(op: Operation) -> bool:
  pending = _jaxpr.hidden_jaxprs(op)
  while pending:
    for eqn in pending.pop().eqns:
      if eqn.primitive.name in _MACS:
        return True
      pending += jaxprs_in_params(eqn.params)
  return False


# Counting.


def count_macs(op: Operation) -> int:
  """Multiply-accumulates of one operation; 0 unless it is a convolution or a matrix product.

  Args:
    op: an operation of a flat program.

  Example:
    >>> from fqjax.tracing import trace
    >>> [op] = trace(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5))).operations
    >>> count_macs(op)
    30
  """
  return _MACS[op.name](op) if op.name in _MACS else 0


def _dot_macs(op: Operation) -> int:
  (contracted, _), _ = op.params['dimension_numbers']
  lhs, out = op.inputs[0].shape, op.outputs[0].shape
  return math.prod(out) * math.prod(lhs[i] for i in contracted)


def _ragged_dot_macs(op: Operation) -> int:
  numbers = op.params['ragged_dot_dimension_numbers']
  (contracted, _), _ = numbers.dot_dimension_numbers
  lhs, out = op.inputs[0].shape, op.outputs[0].shape
  macs = math.prod(out) * math.prod(lhs[i] for i in contracted)
  if set(numbers.lhs_ragged_dimensions) & set(contracted):
    # The groups share the contracted axis: out has one entry per group, each sums over its part.
    macs //= op.inputs[2].shape[-1]
  return macs


def _conv_macs(op: Operation) -> int:
  """Per output: the kernel's inputs per group times its taps, those on inserted zeros left out."""
  numbers, params = op.params['dimension_numbers'], op.params
  lhs, rhs, out = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
  macs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
  for i, (out_axis, rhs_axis) in enumerate(
    zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
  ):
    size, taps, dilation = out[out_axis], rhs[rhs_axis], params['lhs_dilation'][i]
    if dilation == 1:
      macs *= size * taps
      continue
    # Positions in the stretched input that each (output, tap) pair reads; multiples are real data.
    read = np.arange(size)[:, None] * params['window_strides'][i]
    read = read + np.arange(taps) * params['rhs_dilation'][i] - params['padding'][i][0]
    pairs = int(np.count_nonzero(read % dilation == 0))
    # Each input meets each tap once at most; 'VALID' reads its padding besides.
    macs *= min(pairs, lhs[numbers.lhs_spec[2 + i]] * taps)
  return macs


_MACS = {
  'dot_general': _dot_macs,
  'ragged_dot_general': _ragged_dot_macs,
  'ragged_dot': _ragged_dot_macs,
  'conv_general_dilated': _conv_macs,
}
