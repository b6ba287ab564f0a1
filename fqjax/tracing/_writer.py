"""What converters of primitives share: a writer of nodes, shapes in the graph's words, refusals."""

from collections.abc import Sequence
import re
from typing import Any, NoReturn, Protocol

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.tracing._jaxpr import Program, Value

# Loops longer than this are not written out.
LONGEST_LOOP = 256
# The way out where an open batch fails.
FIXED = "a fixed batch (batch='fixed', of to_graph batch_axis=None)"


class Unsupported(ValueError):
  """A primitive the graph cannot hold; says what to write instead.

  Attributes:
    primitive: the one to be named, if it is not the one that was read.
  """

  def __init__(self, text: str = '', primitive: str = ''):
    super().__init__(text)
    self.primitive = primitive


class Lost(Unsupported):
  """A value of something unsupported is read; that has been said already."""


class Writer(Protocol):
  """What a converter may do; `fqjax.tracing._nodes` implements it.

  Attributes:
    counts: names of tensors that hold the size of the batch.
  """

  counts: set[str]

  def read(self, value: Value) -> str:
    """Name of the tensor that is this value; raises `Lost`."""
    ...

  def bind(self, value: Value, name: str) -> None:
    """Declares a value to be this tensor."""
    ...

  def write(self, op: str, *inputs: str, **attributes: Any) -> list[str]:
    """Adds a node; returns the names of its outputs."""
    ...

  def constant(self, array: Any) -> str:
    """Name of a constant."""
    ...

  def known(self, name: str) -> np.ndarray | None:
    """Value of a tensor that depends on no input and no parameter, else None."""
    ...

  def shape(self, name: str) -> dims.Shape:
    """Shape of a tensor."""
    ...

  def dtype(self, name: str) -> str:
    """Element type of a tensor."""
    ...

  def run(self, program: Program) -> None:
    """Converts the operations of a program whose inputs are bound."""
    ...


def fail(remedy: str, primitive: str = '') -> NoReturn:
  """Gives up on a primitive."""
  raise Unsupported(remedy, primitive)


def shape_of(shape: Sequence[Any]) -> dims.Shape:
  """A JAX shape, symbolic or not, as the graph writes it.

  Raises:
    Unsupported: a size that is neither a number nor a multiple of the batch.

  Example:
    >>> [n] = jax.export.symbolic_shape('n')
    >>> shape_of((49 * n, 3))
    ('49*n', 3)
  """
  result = []
  for dim in shape:
    if isinstance(dim, (int, np.integer)):
      result.append(int(dim))
    elif re.fullmatch(r'([1-9]\d*\*)?n', str(dim)):
      result.append(str(dim))
    else:
      fail(f'the size {dim} is no multiple of the batch n: trace {FIXED}')
  return tuple(result)


def dtype_of(dtype: Any) -> str:
  """Name of an element type.

  Raises:
    Unsupported: complex numbers, keys, 4-bit types.
  """
  name = str(dtype)
  if name not in oplist.DTYPES:
    kind = 'random keys: pass none' if 'key' in name else 'real numbers only'
    fail(f'type {name} ({kind})')
  return name


def remedy(primitive: str) -> str:
  """What to write instead of a primitive the graph does not have."""
  for pattern, text in _REMEDIES:
    if re.match(pattern, primitive):
      return text
  return 'write it with the operations of fqjax.runtime.oplist.OPS'


_REMEDIES = (
  (
    r'random|threefry|rng|shuffle',
    'randomness: call the network with deterministic=True or train=False',
  ),
  (
    r'dim_as_value',
    'the batch size is used as a number: use_running_average=True (train=False) if these are batch '
    f'statistics, else trace {FIXED}',
  ),
  (r'while', 'a loop of unknown length: fori_loop or scan with a length known when tracing'),
  (r'scan', f'a loop of at most {LONGEST_LOOP} steps'),
  (r'scatter|dynamic_update_slice', 'jnp.where, jnp.pad or jnp.concatenate'),
  (r'select_and', 'this is a gradient: trace the forward function only'),
  (r'fft', 'a product with the matrix of the transform (fqjax.ops has block DCTs)'),
  (r'reduce_window|reduce$', 'max, min or sum over windows or axes'),
  (r'pallas|custom_call|ffi_call|.*callback', 'plain jax.numpy in place of the foreign call'),
  (
    r'cholesky|eig|lu|qr|svd|triangular|householder|schur|tridiagonal|custom_lin|linear_solve',
    'compute it once before tracing and pass the result as a parameter',
  ),
  (r'psum|p?all_|ppermute|axis_index|shard_map|pvary|pmax|pmin', 'trace the one-device function'),
  (r'reduce_precision|bitcast|nextafter', 'a cast (astype)'),
  (r'erf_inv', 'jax.scipy.special.erf, or a table'),
)


def plain(value: Any) -> Any:
  """Python numbers and tuples in place of NumPy's and lists."""
  if isinstance(value, (tuple, list)):
    return tuple(plain(v) for v in value)
  return value.item() if isinstance(value, np.generic) else value


def reshape(writer: Writer, name: str, shape: dims.Shape) -> str:
  """The tensor in another shape; itself if it has that shape."""
  return name if writer.shape(name) == shape else writer.write('reshape', name, shape=shape)[0]


def transpose(writer: Writer, name: str, order: tuple[int, ...]) -> str:
  """The tensor with its axes in another order."""
  if order == tuple(range(len(order))):
    return name
  return writer.write('transpose', name, permutation=order)[0]


def concat(writer: Writer, names: Sequence[str], axis: int) -> str:
  """Tensors one behind the other."""
  return names[0] if len(names) == 1 else writer.write('concat', *names, axis=axis)[0]


def cut(writer: Writer, name: str, axis: int, start: int, stop: int) -> str:
  """Part of a tensor along one axis."""
  shape = writer.shape(name)
  starts, stops = [0] * len(shape), list(shape)
  starts[axis], stops[axis] = start, stop
  return take_slice(writer, name, tuple(starts), tuple(stops), (1,) * len(shape))


def take_slice(
  writer: Writer, name: str, start: tuple, stop: tuple, strides: tuple[int, ...]
) -> str:
  """A slice; the tensor itself if that is all of it."""
  if stop == writer.shape(name) and not any(start) and set(strides) <= {1}:
    return name
  return writer.write('slice', name, start=start, stop=stop, strides=strides)[0]
