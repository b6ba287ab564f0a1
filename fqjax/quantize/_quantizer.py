"""What every quantizer shares: a table of levels, the nearest one, zeros where a mask is False."""

import abc
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fqjax.sparsity._layout import axes, from_kernels, kernel_shape, to_kernels
from fqjax.sparsity._select import wide

PER = ('layer', 'channel')


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
  """Which values the weights of a leaf may take.

  Frozen and hashable, so that a quantizer is a static argument of jit. A *codebook* is an array
  [K] for a whole leaf (`per='layer'`) or [O, K], one row for each output (`per='channel'`). Its entry 0
  is always exactly 0: the value of a masked weight, and with `zero` also a level like the others.
  The levels follow, ascending. So `codebook[indices]` are the weights, masked or not.

  A subclass defines `count`, `tabled` and `fit`; it has its own `indices` and `project` where there is
  a faster way than to look for the nearest entry.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Halves(Quantizer):
    ...   count, tabled = 2, 0
    ...
    ...   def fit(self, w, layout, mask=None):
    ...     return jnp.array([0.0, -0.5, 0.5])
    >>> print(Halves().project(jnp.array([[0.1, -3.0]]), 'IO', jnp.array([[True, False]])))
    [[0.5 0. ]]
  """

  @property
  @abc.abstractmethod
  def count(self) -> int:
    """How many levels a live weight may take."""

  @property
  @abc.abstractmethod
  def tabled(self) -> int:
    """How many float32 numbers are stored for one codebook."""

  @property
  def zero(self) -> bool:
    """Whether 0 is one of the levels of a live weight."""
    return False

  @property
  def groups(self) -> str:
    """'layer' where a leaf has one codebook, 'channel' where each output has one."""
    return getattr(self, 'per', 'layer')

  @property
  def index_bits(self) -> int:
    """Bits that tell the levels of a live weight apart."""
    return max(1, math.ceil(math.log2(self.count)))

  def check(self, shape: tuple[int, ...], layout: str) -> None:
    """Raises ValueError, naming value and remedy, when the quantizer does not fit the leaf.

    Args:
      shape: shape of the leaf.
      layout: one capital per axis, e.g. 'HWIO'.
    """
    kernel_shape(tuple(shape), layout)

  def codebook_shape(self, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape of the codebook of a leaf.

    Args:
      shape: shape of the leaf.
      layout: one capital per axis.
    """
    entries = self.count + (not self.zero)
    return (kernel_shape(shape, layout)[0], entries) if self.groups == 'channel' else (entries,)

  def table(self, codebook: Any) -> jax.Array:
    """The codebook as an array: itself, unless a quantizer trains more than its levels.

    Args:
      codebook: what `fit` returned, or the trained state of this quantizer.
    """
    return codebook

  def check_codebook(self, codebook: Any, shape: tuple[int, ...], layout: str) -> None:
    """Raises ValueError when a codebook is not of this quantizer and leaf.

    Args:
      codebook: as `table` takes it.
      shape: shape of the leaf.
      layout: one capital per axis.
    """
    want = self.codebook_shape(shape, layout)
    if tuple(jnp.shape(codebook)) != want:
      raise ValueError(
        f'a codebook {list(jnp.shape(codebook))} is not one of {self}, which is {list(want)}.'
      )

  @abc.abstractmethod
  def fit(self, w: jax.Array, layout: str, mask: jax.Array | None = None) -> jax.Array:
    """The levels that suit a leaf best.

    Args:
      w: float leaf. NaN is not looked for.
      layout: one capital per axis.
      mask: bool like `w`, True lives; None where all do.

    Returns:
      The codebook, float32, [K] or [O, K]; all 0 where nothing lives or all live weights are 0.
    """

  def indices(
    self, w: jax.Array, layout: str, mask: jax.Array | None = None, codebook: Any = None
  ) -> jax.Array:
    """Which entry of the codebook is nearest to each weight.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; the others get index 0.
      codebook: from `fit`; by default that of these weights.

    Returns:
      uint8 like `w`.
    """
    table = self.fit(w, layout, mask) if codebook is None else jnp.asarray(codebook)
    if self.groups == 'channel':
      rows = to_kernels(w, layout)
      found = jax.vmap(self._nearest)(rows, table).reshape(rows.shape)
      found = from_kernels(found, layout, w.shape)
    else:
      found = self._nearest(w, table)
    return found if mask is None else jnp.where(mask, found, jnp.zeros_like(found))

  def _nearest(self, w: jax.Array, table: jax.Array) -> jax.Array:
    first = 0 if self.zero else 1
    dtype = wide(w.dtype)
    levels = table[first:].astype(dtype)
    order = jnp.argsort(levels)
    levels = levels[order]
    between = (levels[1:] + levels[:-1]) / 2
    position = jnp.searchsorted(between, lax.stop_gradient(w).astype(dtype), method='compare_all')
    return (order[position] + first).astype(jnp.uint8)

  def project(
    self, w: jax.Array, layout: str, mask: jax.Array | None = None, codebook: Any = None
  ) -> jax.Array:
    """The nearest weights of this quantizer. Its derivative is 0; see `straight_through`.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; the others become exactly 0.
      codebook: from `fit`; by default that of these weights.

    Returns:
      Like `w`: `codebook[indices]` in its dtype.
    """
    w = lax.stop_gradient(w)
    table = self.fit(w, layout, mask) if codebook is None else jnp.asarray(codebook)
    table = lax.stop_gradient(table)
    return look_up(table, self.indices(w, layout, mask, table), layout, w.dtype)


def look_up(table: jax.Array, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
  """Weights from indices: `table[indices]`, of each output its own row where there are rows."""
  if table.ndim == 1:
    return table[indices].astype(dtype)
  rows = to_kernels(indices, layout)
  found = jnp.take_along_axis(table, rows.reshape(len(rows), -1).astype(jnp.int32), 1)
  return from_kernels(found.reshape(rows.shape), layout, indices.shape).astype(dtype)


def per_output(values: jax.Array, layout: str, shape: tuple[int, ...]) -> jax.Array:
  """One number per output [O], to be broadcast against the leaf."""
  outputs = axes(layout, len(shape))[0]
  return values.reshape([n if axis in outputs else 1 for axis, n in enumerate(shape)])


def is_quantizer(value: Any) -> bool:
  """Whether a value follows the protocol (an instance, not a class)."""
  names = ('check', 'count', 'fit', 'indices', 'project')
  return not isinstance(value, type) and all(hasattr(value, name) for name in names)
