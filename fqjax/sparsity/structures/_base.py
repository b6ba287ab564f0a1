"""What every structure shares: scores from weights, a mask from scores, zeros and bits from a mask."""

import abc
import dataclasses
import functools
import math
import sys
from types import ModuleType
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import codecs
from fqjax.sparsity._layout import from_kernels, from_rows, kernel_shape, to_kernels, to_rows
from fqjax.sparsity._select import wide

# View -> (leaf to view, view to leaf).
VIEWS = {
  'rows': (to_rows, from_rows),  # [O, M*I]
  'columns': (  # [M*I, O]
    lambda w, layout: to_rows(w, layout).T,
    lambda a, layout, shape: from_rows(a.T, layout, shape),
  ),
  'kernels': (  # [O, I, M], or two axes of it merged
    to_kernels,
    lambda a, layout, shape: from_kernels(a.reshape(kernel_shape(shape, layout)), layout, shape),
  ),
}


def codec_of(encoded: Any) -> ModuleType:
  """The format of `fqjax.runtime.codecs` that a stored array is of."""
  return sys.modules[type(encoded).__module__]


def raw_bits(w: np.ndarray) -> np.ndarray:
  """A leaf as the formats take it: bfloat16 as the uint16 of its bits."""
  return w.view(np.uint16) if w.dtype == jnp.bfloat16 else w


def scores_of(
  w: jax.Array, saliency: jax.Array | None, frozen: jax.Array | None, power: int
) -> jax.Array:
  """What a structure ranks: the saliency, or |w|**power, in at least float32.

  Args:
    w: weights.
    saliency: like `w`, or None.
    frozen: bool like `w`, or None; what is frozen counts nothing.
    power: 1 where single weights are ranked (squares of tiny weights would underflow into ties),
      2 where energies are summed.

  Raises:
    ValueError: when shapes differ.
  """
  for name, other in (('saliency', saliency), ('frozen', frozen)):
    if other is not None and other.shape != w.shape:
      raise ValueError(
        f'{name} {list(other.shape)} must have the shape of the weights {list(w.shape)}.'
      )
  scores = lax.stop_gradient(w if saliency is None else saliency)
  scores = scores.astype(wide(scores.dtype))
  if saliency is None:
    scores = jnp.abs(scores) if power == 1 else jnp.square(scores)
  if frozen is not None:
    # A single frozen weight ranks behind every live zero; in a sum it adds nothing.
    scores = jnp.where(frozen, -jnp.inf if power == 1 else 0.0, scores)
  return scores


@dataclasses.dataclass(frozen=True)
class Structure(abc.ABC):
  """How the weights of a leaf may be zero: groups, their admissible supports, a projection.

  Frozen and hashable, so that a structure is a static argument of jit. A subclass defines `kept`
  and `_select`, extends `check`, says in `_power` whether it ranks single weights or energies, and
  has its own `_store` where a format of the runtime knows the structure.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Corner(Structure):
    ...   def kept(self, shape, layout):
    ...     return 1
    ...
    ...   def _select(self, scores):  # [O, I, M]
    ...     return jnp.zeros(scores.shape, bool).at[0, 0, 0].set(True)
    >>> print(Corner().project(jnp.ones((2, 2)), 'IO')[0])
    [[1. 0.]
     [0. 0.]]
  """

  _power: ClassVar[int] = 2
  _view: ClassVar[str] = 'rows'  # in which `_store` sees the leaf, a key of VIEWS

  def check(self, shape: tuple[int, ...], layout: str) -> None:
    """Raises ValueError, naming value and remedy, when the structure does not fit the leaf.

    Args:
      shape: shape of the leaf.
      layout: one capital per axis, e.g. 'HWIO'.
    """
    kernel_shape(tuple(shape), layout)

  @abc.abstractmethod
  def kept(self, shape: tuple[int, ...], layout: str) -> int:
    """Number of weights a mask keeps of a leaf of this shape.

    Args:
      shape: shape of the leaf.
      layout: one capital per axis.
    """

  @abc.abstractmethod
  def _select(self, scores: jax.Array) -> jax.Array:
    """Mask [O, I, M] from scores [O, I, M]."""

  def project(
    self,
    w: jax.Array,
    layout: str,
    *,
    saliency: jax.Array | None = None,
    frozen: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Nearest weights of this structure, and which of them live.

    Args:
      w: float leaf. NaN is not looked for.
      layout: one capital per axis, e.g. 'HWIO'.
      saliency: like `w`; ranks in place of w**2, the values kept are still w's.
      frozen: bool like `w`; True marks weights that stay zero whatever their score.

    Returns:
      z: `where(mask, w, 0)`, like `w`.
      mask: bool like `w`, True lives. Of equal scores the lowest index lives.

    Raises:
      ValueError: when the structure does not fit the leaf.

    Example:
      >>> z, mask = Unstructured(count=2).project(jnp.array([[0.3, -1.2], [0.8, 0.1]]), 'IO')
      >>> print(z)
      [[ 0.  -1.2]
       [ 0.8  0. ]]
    """
    self.check(w.shape, layout)
    mask = self._mask(scores_of(w, saliency, frozen, self._power), layout)
    if frozen is not None:
      mask &= ~frozen
    return jnp.where(mask, w, jnp.zeros_like(w)), mask

  def _mask(self, scores: jax.Array, layout: str) -> jax.Array:
    """Mask like the leaf from scores like the leaf."""
    return from_kernels(self._select(to_kernels(scores, layout)), layout, scores.shape)

  def encode(self, w, layout: str) -> Any:
    """Stored form, on the host.

    Args:
      w: leaf of this structure, as `project` leaves it; array of any real dtype.
      layout: one capital per axis.

    Returns:
      The `Encoded` of a format of `fqjax.runtime.codecs`, for `decode`. bfloat16 is stored as its
      raw bits (uint16).

    Raises:
      ValueError: for weights that are not of this structure.

    Example:
      >>> structure = NM(1, 2)
      >>> z, _ = structure.project(jnp.array([[3.0], [1.0], [0.5], [2.0]]), 'IO')
      >>> print(structure.encode(z, 'IO').values.ravel())
      [3. 2.]
    """
    encoded, outside = self._encode(w, layout)
    if outside:
      raise ValueError(
        f'{outside} weights of a {layout} leaf {list(w.shape)} are outside {self}; project first.'
      )
    return encoded

  def decode(self, encoded: Any, layout: str, shape: tuple[int, ...], dtype=None) -> np.ndarray:
    """Inverse of `encode`, bit for bit.

    Args:
      encoded: from `encode`.
      layout: one capital per axis.
      shape: shape of the leaf.
      dtype: of the leaf where its raw bits are stored (bfloat16).

    Returns:
      The leaf, NumPy.

    Raises:
      ValueError: when `encoded` is not of a leaf of that shape.

    Example:
      >>> structure = NM(1, 2)
      >>> encoded = structure.encode(jnp.array([[3.0], [0.0]]), 'IO')
      >>> print(structure.decode(encoded, 'IO', (2, 1)).ravel())
      [3. 0.]
    """
    array = codec_of(encoded).decode(encoded)
    if array.size != math.prod(shape):
      raise ValueError(f'{array.size} weights are stored, a leaf {list(shape)} has others.')
    back = VIEWS[self._view][1]
    return back(array if dtype is None else array.view(dtype), layout, shape)

  def bits(self, w, layout: str, value_bits: int | None = None) -> codecs.Bits:
    """What the leaf costs once projected and stored.

    Args:
      w: leaf, on the host; what is outside this structure is left away.
      layout: one capital per axis.
      value_bits: bits per value; by default those of the dtype.

    Returns:
      `Bits(values, index, tables, padding)`.

    Raises:
      ValueError: when the structure does not fit the leaf.

    Example:
      >>> NM(1, 2).bits(jnp.array([[3.0], [1.0], [0.5], [2.0]]), 'IO')[:2]
      (64, 2)
    """
    encoded, _ = self._encode(w, layout)
    return codec_of(encoded).bits(encoded, value_bits)

  def _encode(self, w, layout: str) -> tuple[Any, int]:
    """Stored form of the projection, and how many weights that left away."""
    w = np.asarray(w)
    mask = self._stored_mask(w, layout)
    outside = int(np.count_nonzero((w != 0) & ~mask))
    view = VIEWS[self._view][0]
    array = view(raw_bits(np.where(mask, w, np.zeros_like(w))), layout)
    return self._store(array, view(mask, layout)), outside

  def _stored_mask(self, w: np.ndarray, layout: str) -> np.ndarray:
    """Which weights of a projected leaf are stored."""
    # Widened as `project` would: one program for all dtypes.
    return np.asarray(_mask_of(self, w.astype(wide(w.dtype)), layout))

  def _store(self, array: np.ndarray, mask: np.ndarray) -> Any:
    """Stored form of the leaf's view; by default the smallest of those that hold any mask."""
    array, mask = array.reshape(len(array), -1), mask.reshape(len(array), -1)
    formats = (codecs.bitmask, codecs.csr, codecs.relative, codecs.rice)
    stored = [f.encode(array, mask) for f in formats]
    costs = [f.bits(e).total for f, e in zip(formats, stored, strict=True)]
    return stored[int(np.argmin(costs))]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _mask_of(structure: Structure, w: jax.Array, layout: str) -> jax.Array:
  return structure.project(w, layout)[1]
