"""Boxes of the [O, I, M] view that live or die together: filters, channels, columns, blocks."""

import abc
import dataclasses
from typing import ClassVar

from jax import lax
import jax.numpy as jnp

from fqjax.runtime import codecs
from fqjax.sparsity._layout import kernel_shape
from fqjax.sparsity._select import keep_count, top_k_mask
from fqjax.sparsity.structures._base import Structure


@dataclasses.dataclass(frozen=True)
class _Boxes(Structure):
  """The boxes of largest energy. Boxes are disjoint, so ranking their energies is exact."""

  @property
  @abc.abstractmethod
  def _share(self) -> tuple[float, str]:
    """Kept fraction of the boxes, and its rounding."""

  @abc.abstractmethod
  def _box(self, o: int, i: int, m: int) -> tuple[int, int, int]:
    """Outputs, inputs and taps of one box."""

  def __post_init__(self):
    keep, rounding = self._share
    keep_count(keep, 1, rounding)

  def check(self, shape, layout):
    """As `Structure.check`."""
    full = kernel_shape(tuple(shape), layout)
    for name, length, size in zip(
      ('outputs', 'inputs', 'taps'), full, self._box(*full), strict=True
    ):
      if size < 1 or length % size:
        raise ValueError(
          f'{self}: {length} {name} of a {layout} leaf {list(shape)} do not divide into blocks of '
          f'{size}; choose a size that divides them, or leave this layer dense.'
        )

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    self.check(shape, layout)
    o, i, m = kernel_shape(tuple(shape), layout)
    bo, bi, bm = self._box(o, i, m)
    size = bo * bi * bm
    keep, rounding = self._share
    return keep_count(keep, o * i * m // size, rounding) * size

  def _energy(self, boxes):
    """Energy per box of [O/bo, bo, I/bi, bi, M/bm, bm]."""
    return boxes.sum((1, 3, 5))

  def _select(self, scores):
    o, i, m = scores.shape
    bo, bi, bm = self._box(o, i, m)
    energy = self._energy(scores.reshape(o // bo, bo, i // bi, bi, m // bm, bm))
    keep, rounding = self._share
    mask = top_k_mask(energy, keep_count(keep, energy.size, rounding))
    mask = mask[:, None, :, None, :, None]
    return jnp.broadcast_to(mask, (o // bo, bo, i // bi, bi, m // bm, bm)).reshape(o, i, m)


@dataclasses.dataclass(frozen=True)
class Filters(_Boxes):
  """Whole outputs.

  Attributes:
    keep: kept fraction of the outputs, in (0, 1].
    rounding: of the number kept, 'nearest' or 'up'.

  Example:
    >>> z, mask = Filters(keep=0.5).project(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 'IO')
    >>> print(z)
    [[3. 0.]
     [2. 0.]]

  Source: Zhang et al., "StructADMM", 2018 (filter pruning).
  """

  keep: float
  rounding: str = 'nearest'

  @property
  def _share(self):
    return self.keep, self.rounding

  def _box(self, o, i, m):
    return 1, i, m

  def _store(self, array, mask):
    return codecs.slices.encode(array, (0,), mask)


@dataclasses.dataclass(frozen=True)
class Channels(_Boxes):
  """Whole inputs.

  Attributes:
    keep: kept fraction of the inputs, in (0, 1].
    rounding: of the number kept, 'nearest' or 'up'.

  Example:
    >>> z, mask = Channels(keep=0.5).project(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 'IO')
    >>> print(z)
    [[3. 1.]
     [0. 0.]]

  Source: Zhang et al., "StructADMM", 2018 (channel pruning).
  """

  keep: float
  rounding: str = 'nearest'
  _view: ClassVar[str] = 'kernels'

  @property
  def _share(self):
    return self.keep, self.rounding

  def _box(self, o, i, m):
    return o, 1, m

  def _store(self, array, mask):
    return codecs.slices.encode(array, (1,), mask)


@dataclasses.dataclass(frozen=True)
class Columns(_Boxes):
  """One input at one tap, in every output: a column of the matrix `to_rows`.

  Attributes:
    keep: kept fraction of the columns, in (0, 1].
    rounding: of the number kept, 'nearest' or 'up'.

  Example:
    >>> z, mask = Columns(keep=0.5).project(jnp.array([[[3.0, 1.0], [2.0, 2.0]]]), 'HIO')
    >>> print(z)
    [[[3. 1.]
      [0. 0.]]]

  Source: Zhang et al., "StructADMM", 2018 (filter-shape pruning).
  """

  keep: float
  rounding: str = 'nearest'

  @property
  def _share(self):
    return self.keep, self.rounding

  def _box(self, o, i, m):
    return o, 1, 1

  def _store(self, array, mask):
    return codecs.slices.encode(array, (1,), mask)


@dataclasses.dataclass(frozen=True)
class Blocks(_Boxes):
  """Blocks of neighbouring outputs and inputs at one tap: 1x4, 2x4, 4x4, ...

  Attributes:
    rows: outputs of a block; must divide the outputs.
    columns: inputs of a block; must divide the inputs.
    keep: kept fraction of the blocks, in (0, 1].
    rounding: of the number kept, 'nearest' or 'up'.

  Example:
    >>> w = jnp.array([[3.0, 1.0], [0.0, 2.0]])  # one output a row
    >>> print(Blocks(1, 2, keep=0.5).project(w, 'OI')[0])
    [[3. 1.]
     [0. 0.]]

  Source: blocks as in Narang et al., "Block-Sparse Recurrent Neural Networks", 2017.
  """

  rows: int
  columns: int
  keep: float
  rounding: str = 'nearest'

  @property
  def _share(self):
    return self.keep, self.rounding

  def _box(self, o, i, m):
    return self.rows, self.columns, 1

  def _store(self, array, mask):
    return codecs.blocks.encode(array, self.rows, self.columns, mask)


@dataclasses.dataclass(frozen=True)
class BlockPunched(_Boxes):
  """One tap of a block of kernels, punched out of all of them at once.

  Attributes:
    rows: outputs of a block; must divide the outputs.
    columns: inputs of a block; must divide the inputs.
    keep: kept fraction of the (block, tap) pairs, in (0, 1].
    score: 'l2' ranks by energy, the exact projection; 'l1l2' by the sum over the inputs of the norm
      over the outputs, as the authors' code does.
    rounding: of the number kept, 'nearest' or 'up'.

  Example:
    >>> w = jnp.ones((3, 3, 4, 8)).at[0].set(0.5).at[2].set(0.5)
    >>> print(BlockPunched(keep=1 / 3).project(w, 'HWIO')[1][..., 0, 0].astype(int))
    [[0 0 0]
     [1 1 1]
     [0 0 0]]

  Source: Cai et al., "YOLObile", AAAI 2021 (block-punched pruning).
  """

  rows: int = 8
  columns: int = 4
  keep: float = 1.0
  score: str = 'l2'
  rounding: str = 'nearest'
  _view: ClassVar[str] = 'kernels'

  def __post_init__(self):
    super().__post_init__()
    if self.score not in ('l2', 'l1l2'):
      raise ValueError(f"BlockPunched score={self.score!r} must be 'l2' or 'l1l2'.")

  @property
  def _share(self):
    return self.keep, self.rounding

  def _box(self, o, i, m):
    return self.rows, self.columns, 1

  def _energy(self, boxes):
    if self.score == 'l2':
      return super()._energy(boxes)
    return jnp.sqrt(boxes.sum((1, 5))).sum(2)

  def _store(self, array, mask):
    return codecs.punched.encode(array, self.rows, self.columns, mask)


@dataclasses.dataclass(frozen=True)
class Both(Structure):
  """Outputs and columns (or inputs) at once, by alternating projections.

  The best filters given the columns, then the best columns given the filters, and so on: the kept
  energy never falls. The exact joint choice is NP-hard.

  Attributes:
    filters: a `Filters`.
    other: a `Columns` or a `Channels`.
    rounds: alternations; they settle after a few.

  Example:
    >>> w = jnp.array([[3.0, 1.0], [2.0, 2.0]])
    >>> print(Both(Filters(keep=0.5), Columns(keep=0.5)).project(w, 'IO')[0])
    [[3. 0.]
     [0. 0.]]

  Source: Zhang et al., "StructADMM", 2018 (combined sparsity types).
  """

  filters: Filters
  other: Columns | Channels
  rounds: int = 8

  def __post_init__(self):
    if not (isinstance(self.filters, Filters) and isinstance(self.other, Columns | Channels)):
      raise ValueError(
        f'Both takes a Filters and a Columns or Channels, got {self.filters} and {self.other}.'
      )
    if self.rounds < 1:
      raise ValueError(f'Both rounds={self.rounds} must be at least 1.')

  def check(self, shape, layout):
    """As `Structure.check`."""
    self.filters.check(shape, layout)
    self.other.check(shape, layout)

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    o, i, m = kernel_shape(tuple(shape), layout)
    return self.filters.kept(shape, layout) // (i * m) * (self.other.kept(shape, layout) // o)

  def _select(self, scores):
    def alternate(_, masks):
      rows = self.filters._select(jnp.where(masks[1], scores, 0))
      return rows, self.other._select(jnp.where(rows, scores, 0))

    everything = jnp.ones(scores.shape, bool)
    rows, columns = lax.fori_loop(0, self.rounds, alternate, (everything, everything))
    return rows & columns

  def _store(self, array, mask):
    return codecs.slices.encode(array, (0, 1), mask)
