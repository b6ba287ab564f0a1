"""Parameters and multiply-accumulates per layer of any apply function, read from its jaxpr."""

from collections.abc import Callable, Mapping
import dataclasses
import html
import math
from typing import Any, NamedTuple

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


class Row(NamedTuple):
  """One layer.

  Attributes:
    path: where its parameters live ('layer1_0/conv1'), else the name scope, else the operation.
    op: the primitive that does its work; ' x3' when it is applied three times.
    input: shape of the data that enters.
    output: shape that leaves.
    params: number of parameters met here first.
    macs: multiply-accumulates for the given arguments (whole batch).
    bytes: bytes of those parameters in the given dtypes.
  """

  path: str
  op: str
  input: tuple[int, ...]
  output: tuple[int, ...]
  params: int
  macs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """Layers of a function in order of execution; `str(summary)` is a table.

  Attributes:
    rows: one per layer.
    unused: (path, number of parameters) of parameters that reach no output.
    notes: what a reader of the numbers must know (loops of unknown length, branches, ...).
  """

  rows: tuple[Row, ...]
  unused: tuple[tuple[str, int], ...] = ()
  notes: tuple[str, ...] = ()
  unused_bytes: int = 0

  @property
  def macs(self) -> int:
    """Multiply-accumulates of all layers."""
    return sum(row.macs for row in self.rows)

  @property
  def params(self) -> int:
    """Number of parameters, unused ones included."""
    return sum(row.params for row in self.rows) + sum(size for _, size in self.unused)

  @property
  def bytes(self) -> int:
    """Bytes of all parameters, unused ones included."""
    return sum(row.bytes for row in self.rows) + self.unused_bytes

  def __str__(self) -> str:
    table = self._table()
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
      '  '.join(
        cell.ljust(width) if i < 4 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
      ).rstrip()
      for line in table
    ]
    rule = '-' * max(map(len, lines))
    return '\n'.join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._remarks()])

  def _repr_html_(self) -> str:
    def row(cells, tag):
      return '<tr>' + ''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells) + '</tr>'

    head, *body = self._table()
    lines = [row(head, 'th'), *(row(cells, 'td') for cells in body)]
    remarks = ''.join(f'<p>{html.escape(text)}</p>' for text in self._remarks())
    return f'<table>{"".join(lines)}</table>{remarks}'

  def _table(self) -> list[tuple[str, ...]]:
    head = ('layer', 'op', 'input', 'output', 'params', 'MACs', 'bytes')
    body = [
      (
        row.path, row.op, _shape(row.input), _shape(row.output),
        f'{row.params:,}', _human(row.macs), _human(row.bytes),
      )
      for row in self.rows
    ]  # fmt: skip
    total = ('total', '', '', '', f'{self.params:,}', _human(self.macs), _human(self.bytes))
    return [head, *body, total]

  def _remarks(self) -> list[str]:
    remarks = [f'note: {note}' for note in self.notes]
    if self.unused:
      names = ', '.join(f'{path} ({size:,})' for path, size in self.unused)
      remarks.append(f'unused parameters: {names}')
    return remarks


def summary(apply_fn: Callable, *args, **kwargs) -> Summary:
  """Counts parameters and multiply-accumulates (MACs) of each layer of `apply_fn(*args, **kwargs)`.

  The function is traced on abstract values: nothing is computed and no weights are needed. MACs are
  those of convolutions and matrix products (padding taps counted, zeros inserted by transposed
  convolutions not), for the whole batch given; loops count every iteration, a `cond` its costliest
  branch, a `while` one iteration, the last two with a note. Operations that reach no output are
  left out.

  What the parameters are, first rule that applies: leaves under 'params' of a dict argument (Linen
  variables); the arrays of `apply_fn` itself if it is a pytree (an Equinox or NNX module); the
  first container argument (dict, module, `nnx.State`: its `nnx.Param`s); JAX arrays the function
  captured, named 'captured_0', ... A bare array argument is an input.

  Args:
    apply_fn: any function that JAX can trace.
    *args: its arguments; arrays or `jax.ShapeDtypeStruct`s as leaves, anything else is static.
    **kwargs: likewise.

  Returns:
    A `Summary`: `.rows`, `.params`, `.macs`, `.bytes`, and a table as `str()`.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {'fc': {'kernel': jnp.ones((20, 10)), 'bias': jnp.ones(10)}}
    >>> apply = lambda p, x: x @ p['fc']['kernel'] + p['fc']['bias'][None]
    >>> print(summary(apply, params, jnp.ones((1, 20))))
    layer  op           input  output  params  MACs  bytes
    ------------------------------------------------------
    fc     dot_general  1x20   1x10       210   200    840
    ------------------------------------------------------
    total                                 210   200    840
  """
  if _is_container(apply_fn):
    names = _names_in(apply_fn, '0')
    program = _jaxpr.trace(lambda self, *a, **k: self(*a, **k), apply_fn, *args, **kwargs)
  else:
    names = _parameter_names(args, kwargs)
    program = _jaxpr.trace(apply_fn, *args, **kwargs)
  reader = _Reader(capture=not names)
  for value in program.inputs:
    if value.name in names:
      reader.add(value, names[value.name])
  found = reader.read(program)
  for value in program.outputs:
    # A parameter handed back by way of no layer is used all the same.
    if used := reader.origins(value):
      found.append(_Found('output', '', used, (), value.shape, 0, 1))
  return _summarise(reader, found)


# Which leaves are parameters.


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


# Reading the program.


class _Found(NamedTuple):
  """An operation that uses parameters or multiplies matrices."""

  op: str
  scope: str
  used: frozenset[str]
  input: tuple[int, ...]
  output: tuple[int, ...]
  macs: int
  times: int


class _Reader:
  """Follows parameters through a program to the operations that use them."""

  def __init__(self, capture: bool):
    self.capture = capture
    self.sizes: dict[str, tuple[int, int]] = {}  # path -> (parameters, bytes)
    self.notes: dict[str, None] = {}  # an ordered set
    self._origins: dict[Value, frozenset[str]] = {}
    self._neutral: set[Value] = set()  # made of constants alone
    self._captured: dict[int, str] = {}

  def add(self, value: Value, path: str):
    """Declares an input to be the parameter of this path."""
    count = math.prod(value.shape)
    self.sizes[path] = (count, count * np.dtype(value.dtype).itemsize)
    self._origins[value] = frozenset([path])

  def read(self, program: Program, times: int = 1) -> list[_Found]:
    """Finds what the rows are made of, in order of execution."""
    found = []
    for op in program.operations:
      for value in op.inputs:
        self._meet(value)
      if op.bodies:
        found += self._read_bodies(op, times)
      else:
        found += self._read_plain(op, times)
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

  def _read_plain(self, op: Operation, times: int) -> list[_Found]:
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
    return [_Found(op.name, op.scope, used, entering, op.outputs[0].shape, macs * times, times)]

  def _read_bodies(self, op: Operation, times: int) -> list[_Found]:
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
    >>> import jax.numpy as jnp
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


# From operations to layers.


def _summarise(reader: _Reader, found: list[_Found]) -> Summary:
  prefix = _common_scope(found)
  layers: dict[str, list[_Found]] = {}
  first_met: dict[str, str] = {}  # parameter -> layer that counts it
  for item in found:
    fresh = [path for path in item.used if path not in first_met]
    if item.op == 'output' and not fresh:
      continue
    scope = item.scope.removeprefix(prefix) if item.scope + '/' != prefix else ''
    layer = _parent(fresh) or scope or _parent(item.used)
    if not layer:
      # Nothing but the primitive to call it by; two such operations are two layers.
      layer = min(fresh) if fresh else item.op
      number = 0
      while layer in layers:
        number += 1
        layer = f'{item.op}_{number}'
    layers.setdefault(layer, []).append(item)
    first_met.update(dict.fromkeys(fresh, layer))
  unused = {path: size for path, size in reader.sizes.items() if path not in first_met}
  counted: dict[str, list[tuple[int, int]]] = {}
  for path, layer in first_met.items():
    counted.setdefault(layer, []).append(reader.sizes[path])
  return Summary(
    rows=tuple(_row(layer, items, counted.get(layer, [])) for layer, items in layers.items()),
    unused=tuple((path, count) for path, (count, _) in unused.items()),
    notes=reader.all_notes(),
    unused_bytes=sum(size for _, size in unused.values()),
  )


def _row(layer: str, items: list[_Found], sizes: list[tuple[int, int]]) -> Row:
  main = max(items, key=lambda item: (item.macs, math.prod(item.output)))
  applied = sum(item.times for item in items if item.macs)
  return Row(
    path=layer,
    op=f'{main.op} x{applied}' if applied > 1 else main.op,
    input=main.input,
    output=main.output,
    params=sum(count for count, _ in sizes),
    macs=sum(item.macs for item in items),
    bytes=sum(size for _, size in sizes),
  )


def _parent(paths) -> str:
  """Longest common folder of parameter paths."""
  folders = [path.split('/')[:-1] for path in paths]
  common = []
  for level in zip(*folders, strict=False):
    if len(set(level)) > 1:
      break
    common.append(level[0])
  return '/'.join(common)


def _common_scope(found: list[_Found]) -> str:
  """What the name scopes have in front of the parameter paths ('ResNet/'), as most layers show."""
  votes: dict[str, int] = {}
  for item in found:
    folder = _parent(item.used)
    if folder and f'/{item.scope}'.endswith(f'/{folder}'):
      prefix = item.scope[: len(item.scope) - len(folder)]
      votes[prefix] = votes.get(prefix, 0) + 1
  return max(votes, key=lambda prefix: votes[prefix], default='')


def _shape(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))


def _human(number: Any) -> str:
  """Four digits and a unit: 4089284608 -> '4.089 G'."""
  for unit, size in (('T', 10**12), ('G', 10**9), ('M', 10**6), ('k', 10**3)):
    if number >= size:
      digits = f'{number / size:#.4g}'.removesuffix('.')
      return f'{digits} {unit}'
  return str(number)
