"""Parameters and multiply-accumulates per layer of any apply function, read from its jaxpr."""

from collections.abc import Callable
import dataclasses
import html
import math
from typing import Any, NamedTuple

from fqjax.tracing.reader import Found, Reader, trace_parameters


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
  program, parameters = trace_parameters(apply_fn, *args, **kwargs)
  reader = Reader(parameters, capture=not parameters)
  found = reader.read(program)
  for value in program.outputs:
    # A parameter handed back by way of no layer is used all the same.
    if used := reader.origins(value):
      found.append(Found('output', '', used, (), value.shape, 0, 1))
  return _summarise(reader, found)


# From operations to layers.


def _summarise(reader: Reader, found: list[Found]) -> Summary:
  prefix = _common_scope(found)
  layers: dict[str, list[Found]] = {}
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


def _row(layer: str, items: list[Found], sizes: list[tuple[int, int]]) -> Row:
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


def _common_scope(found: list[Found]) -> str:
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
