"""Any jittable function as a flat list of operations on named values, read from its jaxpr.

Calls (jit, remat, custom derivatives, ...) are inlined and their variables resolved, so a reader
meets every value once, under one identity. Control flow keeps its structure: scan, while, cond and
shard_map stay operations with `bodies`, each of which is flattened the same way on request.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params
import jax.numpy as jnp

# Primitives that only call the jaxpr they carry: name -> parameter that holds it.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'remat': 'jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'custom_vjp_call_jaxpr': 'call_jaxpr',
  'composite': 'jaxpr',
}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Value:
  """An array of a program. Two values are equal only if they are the same object.

  Attributes:
    aval: shape and dtype (`jax.core.ShapedArray`).
    name: path of the argument leaf, '' for everything else.
    constant: the array itself for literals and captured arrays, else None.
  """

  aval: Any
  name: str = ''
  constant: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape; tokens and other opaque values count as scalars."""
    return tuple(getattr(self.aval, 'shape', ()))

  @property
  def dtype(self) -> Any:
    """Element type, None for tokens."""
    return getattr(self.aval, 'dtype', None)


class Body(NamedTuple):
  """A jaxpr that an operation runs; `open_body` flattens it.

  Attributes:
    jaxpr: the closed jaxpr.
    operands: the outer value that feeds each input: itself for the first `constants` of them, then
      the initial value of a carry, or the stack of which one slice arrives per iteration.
    constants: how many operands enter as they are.
    times: how often it runs; None when only the data decide.
  """

  jaxpr: ClosedJaxpr
  operands: tuple[Value, ...]
  constants: int
  times: int | None


class Operation(NamedTuple):
  """One equation with its variables resolved.

  Attributes:
    name: primitive name, e.g. 'conv_general_dilated'.
    inputs: values read.
    outputs: values written.
    params: the primitive's static parameters.
    scope: name stack of the whole way in, e.g. 'ResNet/layer1_0/conv1'.
    bodies: what control flow runs; all of them (loops) or one of them (cond).
    effects: True if it must run even when nobody reads its outputs.
    tracebacks: of the call that made it and of those around it, JAX's own objects.
  """

  name: str
  inputs: tuple[Value, ...]
  outputs: tuple[Value, ...]
  params: dict[str, Any]
  scope: str = ''
  bodies: tuple[Body, ...] = ()
  effects: bool = False
  tracebacks: tuple[Any, ...] = ()


class Program(NamedTuple):
  """A flat function.

  Attributes:
    inputs: What it is called with, in the order of the flattened arguments.
    operations: In order of execution.
    outputs: What it returns.
  """

  inputs: tuple[Value, ...]
  operations: tuple[Operation, ...]
  outputs: tuple[Value, ...]


def _is_array(leaf) -> bool:
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def _abstract(leaf) -> jax.ShapeDtypeStruct:
  dtype = leaf.dtype
  if not jnp.issubdtype(dtype, jax.dtypes.extended):
    dtype = jax.dtypes.canonicalize_dtype(dtype)
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def leaf_name(path: Sequence[Any]) -> str:
  """Path of a pytree leaf: keys joined by '/', without the `/value` of NNX variables.

  Args:
    path: of `jax.tree_util.tree_flatten_with_path`.

  Example:
    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({'conv1': {'kernel': 0}})
    >>> leaf_name(path)
    'conv1/kernel'
  """
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/').removesuffix('/value')


def trace(fn: Callable, *args, **kwargs) -> Program:
  """Traces `fn(*args, **kwargs)` on abstract values; nothing is computed.

  Args:
    fn: any function JAX can trace.
    *args: pytrees. Leaves with a shape and a dtype (arrays, `jax.ShapeDtypeStruct`) are traced,
      all others (bool, str, functions, ...) are passed as they are.
    **kwargs: likewise.

  Returns:
    The program without dead operations. Input names begin with the argument's position or keyword:
    '0/params/conv1/kernel', '1', 'rngs/dropout'.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> program = trace(jax.jit(lambda p, x: x @ p['w'] + 1), {'w': jnp.ones((3, 4))}, jnp.ones(3))
    >>> [op.name for op in program.operations], [v.name for v in program.inputs]
    (['dot_general', 'add'], ['0/w', '1'])
  """
  paths_leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
  leaves = [leaf for _, leaf in paths_leaves]
  where = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

  def call(*arrays):
    filled = list(leaves)
    for i, array in zip(where, arrays, strict=True):
      filled[i] = array
    call_args, call_kwargs = jax.tree.unflatten(treedef, filled)
    out = jax.tree.leaves(fn(*call_args, **call_kwargs))
    return [x for x in out if _is_array(x) or isinstance(x, (bool, int, float, complex))]

  closed = jax.make_jaxpr(call)(*[_abstract(leaves[i]) for i in where])
  # path[0] only tells args from kwargs.
  names = [leaf_name(paths_leaves[i][0][1:]) for i in where]
  inputs = [Value(aval, name) for aval, name in zip(closed.in_avals, names, strict=True)]
  return without_dead(flatten(closed, inputs))


def flatten(
  jaxpr: ClosedJaxpr,
  inputs: Sequence[Value] | None = None,
  scope: str = '',
  tracebacks: tuple[Any, ...] = (),
) -> Program:
  """Inlines all calls of a closed jaxpr and resolves its variables.

  Args:
    jaxpr: what to flatten.
    inputs: values bound to its inputs; fresh ones by default.
    scope: put in front of every operation's scope.
    tracebacks: put behind every operation's own.

  Raises:
    ValueError: when the number of inputs is not the jaxpr's.
  """
  if inputs is None:
    inputs = [Value(aval) for aval in jaxpr.in_avals]
  if len(inputs) != len(jaxpr.in_avals):
    raise ValueError(f'the jaxpr takes {len(jaxpr.in_avals)} inputs, got {len(inputs)}')
  operations: list[Operation] = []
  outputs = _inline(jaxpr, inputs, scope, tracebacks, operations)
  return Program(tuple(inputs), tuple(operations), outputs)


def without_dead(program: Program) -> Program:
  """Drops operations whose results reach no output, as the compiler will."""
  live = set(program.outputs)
  kept = []
  for op in reversed(program.operations):
    if op.effects or live.intersection(op.outputs):
      kept.append(op)
      live.update(op.inputs)
  return program._replace(operations=tuple(reversed(kept)))


def _inline(
  jaxpr: ClosedJaxpr,
  inputs: Sequence[Value],
  scope: str,
  tracebacks: tuple[Any, ...],
  operations: list[Operation],
) -> tuple[Value, ...]:
  """Appends the operations of a jaxpr, calls inlined; returns the values of its outputs."""
  inner = jaxpr.jaxpr
  env = dict(zip(inner.invars, inputs, strict=True))
  for var, constant in zip(inner.constvars, jaxpr.consts, strict=True):
    env[var] = Value(var.aval, constant=constant)

  def read(atom) -> Value:
    return Value(atom.aval, constant=atom.val) if isinstance(atom, Literal) else env[atom]

  for eqn in inner.eqns:
    name = eqn.primitive.name
    values = tuple(read(atom) for atom in eqn.invars)
    here = _join(scope, _scope_of(eqn))
    calls = (eqn.source_info.traceback, *tracebacks)
    if name in _CALLS and _CALLS[name] in eqn.params:
      outputs = _inline(_closed(eqn.params[_CALLS[name]]), values, here, calls, operations)
    else:
      outputs = tuple(Value(var.aval) for var in eqn.outvars)
      bodies = _bodies(name, eqn.params, values)
      operations.append(
        Operation(
          name,
          values,
          outputs,
          eqn.params,
          here,
          bodies,
          bool(eqn.effects),
          calls,
        )
      )
    env.update(zip(eqn.outvars, outputs, strict=True))
  return tuple(read(atom) for atom in inner.outvars)


def _bodies(name: str, params: dict[str, Any], values: tuple[Value, ...]) -> tuple[Body, ...]:
  if name == 'scan':
    constants, _ = scan_counts(params, values)
    return (Body(_closed(params['jaxpr']), values, constants, params['length']),)
  if name == 'while':
    n_cond, n_body = params['cond_nconsts'], params['body_nconsts']
    carry = values[n_cond + n_body :]
    return (
      Body(_closed(params['cond_jaxpr']), values[:n_cond] + carry, n_cond, None),
      Body(_closed(params['body_jaxpr']), values[n_cond : n_cond + n_body] + carry, n_body, None),
    )
  if name == 'cond':
    operands = values[1:]
    return tuple(Body(_closed(j), operands, len(operands), 1) for j in params['branches'])
  if name == 'shard_map':
    # Shapes inside are those of one device; every device runs the body.
    return (Body(_closed(params['jaxpr']), values, 0, math.prod(params['mesh'].axis_sizes)),)
  return ()


def scan_counts(params: dict[str, Any], values: Sequence[Any]) -> tuple[int, int]:
  """How many operands of a scan are constants and how many its carry; the rest is scanned over."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  # Since JAX 0.11 a tree says so: (constants, carry, scanned).
  constants, carry, _ = params['ft_in'].update(values).unpack()
  return len(list(constants)), len(list(carry))


def open_body(body: Body, scope: str = '', tracebacks: tuple[Any, ...] = ()) -> Program:
  """Flattens a body; constants keep the identity of the outer value, other inputs are fresh.

  Args:
    body: Of a loop or a branch, from `Operation.bodies`.
    scope: Name in front of the operations' own scopes.
    tracebacks: Behind the operations' own.
  """
  inputs = [
    operand if i < body.constants else Value(aval)
    for i, (operand, aval) in enumerate(zip(body.operands, body.jaxpr.in_avals, strict=True))
  ]
  return without_dead(flatten(body.jaxpr, inputs, scope, tracebacks))


def hidden_jaxprs(op: Operation) -> list[Jaxpr]:
  """Jaxprs carried by an operation that is neither a call nor known control flow."""
  return [] if op.bodies else list(jaxprs_in_params(op.params))


def _closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
  return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _scope_of(eqn) -> str:
  """Name stack of an equation without the marks of transformations: 'vmap(a)/b' is 'a/b'."""
  text, count = str(eqn.source_info.name_stack), 1
  while count:
    text, count = re.subn(r'\w+\(([^()]*)\)', r'\1', text)
  return '/'.join(part for part in text.split('/') if part)


def _join(scope: str, name: str) -> str:
  return f'{scope}/{name}' if scope and name else scope or name
