"""Single weights: anywhere, or n of every m neighbours."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from fqjax.runtime import codecs
from fqjax.sparsity._layout import axes, kernel_shape
from fqjax.sparsity._select import keep_count, top_k_mask
from fqjax.sparsity.structures._base import Structure


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
  """The largest weights of a leaf, wherever they are.

  Attributes:
    keep: kept fraction in (0, 1]; or
    count: kept number. Exactly one of the two.
    rounding: of `keep` times the size, 'nearest' or 'up'.

  Example:
    >>> z, mask = Unstructured(keep=0.5).project(jnp.array([[3.0, -1.0], [2.0, -4.0]]), 'IO')
    >>> print(z)
    [[ 3.  0.]
     [ 0. -4.]]

  Source: Zhang et al., "A Systematic DNN Weight Pruning Framework using ADMM", ECCV 2018.
  """

  keep: float | None = None
  count: int | None = None
  rounding: str = 'nearest'
  _power: ClassVar[int] = 1

  def __post_init__(self):
    if (self.keep is None) == (self.count is None):
      raise ValueError(
        f'Unstructured takes keep= or count=, exactly one; got keep={self.keep}, '
        f'count={self.count}.'
      )
    if self.keep is not None:
      keep_count(self.keep, 1, self.rounding)

  def check(self, shape, layout):
    """As `Structure.check`."""
    super().check(shape, layout)
    n = math.prod(shape)
    if self.count is not None and not 1 <= self.count <= n:
      raise ValueError(f'count={self.count} of a leaf {list(shape)} must be 1..{n}.')

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    self.check(shape, layout)
    if self.keep is None:
      return int(self.count or 0)
    return keep_count(self.keep, math.prod(shape), self.rounding)

  def _mask(self, scores, layout):
    # In the leaf's own layout: nothing moves, and shards stay where they are.
    outputs, inputs, taps = axes(layout, scores.ndim)
    return top_k_mask(scores, self.kept(scores.shape, layout), order=outputs + inputs + taps)

  def _select(self, scores):
    return self._mask(scores, 'OIM')


@dataclasses.dataclass(frozen=True)
class NM(Structure):
  """The n largest of every m neighbours along one axis.

  Attributes:
    n: kept per group, 1..m.
    m: neighbours that form a group; must divide the axis.
    axis: 'I' for neighbouring inputs (at one tap, for one output), 'O' for neighbouring outputs.

  Example:
    >>> z, mask = NM(2, 4).project(jnp.array([[3.0], [-1.0], [2.0], [-4.0]]), 'IO')
    >>> print(z.ravel())
    [ 3.  0.  0. -4.]

  Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
  """

  n: int
  m: int
  axis: str = 'I'
  _power: ClassVar[int] = 1

  def __post_init__(self):
    if not 1 <= self.n <= self.m:
      raise ValueError(f'NM({self.n}, {self.m}): n must be 1..m.')
    if self.axis not in ('I', 'O'):
      raise ValueError(f"NM axis={self.axis!r} must be 'I' or 'O'.")

  def check(self, shape, layout):
    """As `Structure.check`."""
    length = kernel_shape(tuple(shape), layout)['OI'.index(self.axis)]
    if length % self.m:
      raise ValueError(
        f'NM({self.n}, {self.m}): {length} {"inputs" if self.axis == "I" else "outputs"} of a '
        f'{layout} leaf {list(shape)} do not divide by {self.m}; choose an m that does, or leave '
        'this layer dense.'
      )

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    self.check(shape, layout)
    return math.prod(shape) // self.m * self.n

  def _select(self, scores):
    axis = 'OI'.index(self.axis)
    lines = jnp.moveaxis(scores, axis, -1)
    mask = top_k_mask(lines.reshape(*lines.shape[:-1], -1, self.m), self.n, axis=-1)
    return jnp.moveaxis(mask.reshape(lines.shape), -1, axis)

  @property
  def _view(self):
    return 'rows' if self.axis == 'I' else 'columns'

  def _store(self, array, mask):
    return codecs.nm.encode(array, self.n, self.m, mask)
