"""Regular supports within the rows of a matrix: one weight a block, or a few a bank.

Rows are those of `to_rows`: one per output, columns by tap with the inputs fastest. Of equal
magnitudes the lowest column lives.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import codecs
from fqjax.sparsity._layout import from_rows, kernel_shape, to_rows
from fqjax.sparsity._select import kth_largest, top_k_mask
from fqjax.sparsity.structures._base import Structure, scores_of

# Blocks of up to 128 columns: three bits a row say which.
_EXPONENT = 7


def _tiles(rows: jax.Array, size: int) -> jax.Array:
  """[R, C] to [R, ceil(C/size), size]; what is added to the last tile never wins."""
  r, c = rows.shape
  rows = jnp.pad(rows, ((0, 0), (0, -c % size)), constant_values=-jnp.inf)
  return rows.reshape(r, -1, size)


def _block_max(rows: jax.Array, size: int) -> jax.Array:
  """Mask [R, C] of the largest entry of each block of `size` columns."""
  if size == 1:
    return jnp.ones(rows.shape, bool)
  tiles = _tiles(rows, size)
  place = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 2)
  mask = place == jnp.argmax(tiles, -1).astype(jnp.int32)[..., None]
  return mask.reshape(len(rows), -1)[:, : rows.shape[1]]


@dataclasses.dataclass(frozen=True)
class _Rows(Structure):
  """A structure of the matrix `to_rows`."""

  _power: ClassVar[int] = 1

  def _mask(self, scores, layout):
    return from_rows(self._select_rows(to_rows(scores, layout)), layout, scores.shape)

  def _select(self, scores):
    return self._mask(scores, 'OIM')

  def _select_rows(self, rows: jax.Array) -> jax.Array:
    raise NotImplementedError

  def _check_rows(self, name: str, given: int, shape, layout: str) -> None:
    outputs = kernel_shape(tuple(shape), layout)[0]
    if given != outputs:
      raise ValueError(
        f'{type(self).__name__} has {given} {name} for the {outputs} outputs of a {layout} leaf '
        f'{list(shape)}; make it from this leaf.'
      )


@dataclasses.dataclass(frozen=True)
class BlockMax(_Rows):
  """The largest weight of every block of consecutive columns; all rows alike.

  Attributes:
    size: columns of a block, 1 keeps all. A last block may be shorter.

  Example:
    >>> print(BlockMax(2).project(jnp.array([[0.9, -0.1, 0.4, 0.8]]), 'OI')[0])
    [[0.9 0.  0.  0.8]]

  Source: Ren et al., "DARB", AAAI 2020 (block-max weight masking).
  """

  size: int

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'BlockMax size={self.size} must be at least 1.')

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    o, i, m = kernel_shape(tuple(shape), layout)
    return o * -(-i * m // self.size)

  def _select_rows(self, rows):
    return _block_max(rows, self.size)

  def _store(self, array, mask):
    exponent = self.size.bit_length() - 1
    if self.size == 2**exponent and exponent <= _EXPONENT:
      return codecs.darb.encode(array, np.full(len(array), exponent), mask)
    return codecs.bank.encode(array, self.size, np.ones(len(array), int), mask)


@dataclasses.dataclass(frozen=True)
class Darb(_Rows):
  """The largest weight of every block of 2**e columns, e chosen for each row.

  Attributes:
    exponents: e of each output, 0..7. `darb` makes them from a leaf and a ratio.

  Example:
    >>> w = jnp.array([[0.9, -0.1, 0.4, 0.8], [0.1, 0.0, 0.0, 0.2]])
    >>> print(Darb((1, 2)).project(w, 'OI')[0])
    [[0.9 0.  0.  0.8]
     [0.  0.  0.  0.2]]

  Source: Ren et al., "DARB", AAAI 2020.
  """

  exponents: tuple[int, ...]

  def __post_init__(self):
    if not self.exponents or not 0 <= min(self.exponents) <= max(self.exponents) <= _EXPONENT:
      raise ValueError(f'Darb exponents must be 0..{_EXPONENT}, one per output.')

  def check(self, shape, layout):
    """As `Structure.check`."""
    self._check_rows('exponents', len(self.exponents), shape, layout)

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    self.check(shape, layout)
    _, i, m = kernel_shape(tuple(shape), layout)
    return sum(-(-i * m // 2**e) for e in self.exponents)

  def _select_rows(self, rows):
    # Rows of one size side by side: each is projected once, whatever the menu.
    exponents = np.asarray(self.exponents)
    order = np.argsort(exponents, kind='stable')
    sizes, starts = np.unique(exponents[order], return_index=True)
    rows = rows[order] if len(sizes) > 1 else rows
    parts = jnp.split(rows, starts[1:].tolist())
    masks = jnp.concatenate([_block_max(p, 2 ** int(e)) for p, e in zip(parts, sizes, strict=True)])
    return masks[np.argsort(order)] if len(sizes) > 1 else masks

  def _store(self, array, mask):
    return codecs.darb.encode(array, np.asarray(self.exponents), mask)


@dataclasses.dataclass(frozen=True)
class Bank(_Rows):
  """The largest few weights of every bank of consecutive columns, how many chosen for each row.

  Attributes:
    size: columns of a bank. A last bank may be shorter.
    counts: kept per bank for each output, 0..size. `bank` makes them from a leaf and a ratio.

  Example:
    >>> w = jnp.array([[0.9, -0.1, 0.4, 0.8], [0.1, 0.0, 0.0, 0.2]])
    >>> print(Bank(4, (2, 1)).project(w, 'OI')[0])
    [[0.9 0.  0.  0.8]
     [0.  0.  0.  0.2]]

  Source: the counterpart of `Darb` with a fixed block and an adaptive count; banks as in Cao et
  al., "Bank-Balanced Sparsity", FPGA 2019.
  """

  size: int
  counts: tuple[int, ...]

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'Bank size={self.size} must be at least 1.')
    if not self.counts or min(self.counts) < 0 or not 1 <= max(self.counts) <= self.size:
      raise ValueError(f'Bank counts must be 0..{self.size}, one per output, not all 0.')

  def check(self, shape, layout):
    """As `Structure.check`."""
    self._check_rows('counts', len(self.counts), shape, layout)

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    self.check(shape, layout)
    _, i, m = kernel_shape(tuple(shape), layout)
    return _bank_kept(np.asarray(self.counts), self.size, i * m)

  def _select_rows(self, rows):
    tiles = _tiles(rows, self.size)
    counts = jnp.asarray(self.counts, jnp.int32)[:, None]
    mask = top_k_mask(tiles, jnp.broadcast_to(counts, tiles.shape[:2]), axis=-1)
    return mask.reshape(len(rows), -1)[:, : rows.shape[1]]

  def _store(self, array, mask):
    return codecs.bank.encode(array, self.size, np.asarray(self.counts), mask)


def _bank_kept(counts: np.ndarray, size: int, columns: int) -> int:
  whole, rest = divmod(columns, size)
  return int((counts * whole + np.minimum(counts, rest)).sum())


def row_density(w: jax.Array, layout: str, ratio: float) -> np.ndarray:
  """How dense each row stays when the leaf is pruned without structure.

  Args:
    w: float leaf.
    layout: one capital per axis, e.g. 'HWIO'.
    ratio: weights per kept weight of that pruning, at least 1.

  Returns:
    float64 [O]: share of each row at or above the threshold.

  Raises:
    ValueError: for a ratio below 1.

  Example:
    >>> w = jnp.array([[3.0, 2.0], [1.0, 0.0]])
    >>> print(row_density(w, 'OI', ratio=2))
    [1. 0.]

  Source: Ren et al., "DARB", AAAI 2020.
  """
  if not ratio >= 1:
    raise ValueError(f'ratio={ratio} must be at least 1 (weights per kept weight).')
  rows = to_rows(scores_of(w, None, None, power=1), layout)
  t = kth_largest(rows, max(1, round(rows.size / ratio)))
  return np.asarray(jnp.mean(rows >= t, axis=1, dtype=jnp.float32), np.float64)


def choose_exponents(
  density,
  columns: int,
  ratio: float | None = None,
  menu: tuple[int, ...] = tuple(range(_EXPONENT + 1)),
) -> tuple[int, ...]:
  """Block exponents of rows from their densities.

  A row of density d wants blocks of 1/d columns; one offset on the logarithm, common to all rows,
  brings the layer to the ratio from above. Rows that reach their next exponent together are
  raised in order, no more of them than needed.

  Args:
    density: [O], in 0..1.
    columns: columns of the matrix.
    ratio: weights per kept weight to reach; None rounds the logarithm and leaves it there.
    menu: exponents to choose from, ascending.

  Returns:
    One exponent per row.

  Raises:
    ValueError: for a ratio below 1 or beyond the largest blocks, or an unordered menu.

  Example:
    >>> choose_exponents([0.75, 0.125, 0.625, 0.0], columns=8, menu=(0, 1, 2, 3))
    (0, 3, 1, 3)
    >>> choose_exponents([0.75, 0.125, 0.625, 0.0], columns=8, ratio=4, menu=(0, 1, 2, 3))
    (1, 3, 2, 3)

  Source: Ren et al., "DARB", AAAI 2020; the calibration is ours.
  """
  steps = np.asarray(menu)
  if not len(steps) or steps[0] < 0 or steps[-1] > _EXPONENT or (np.diff(steps) <= 0).any():
    raise ValueError(f'menu={menu} must be exponents of 0..{_EXPONENT}, ascending.')
  wanted = -np.log2(np.maximum(np.asarray(density, np.float64), 1 / (4 * columns)))
  # Offset at which a row passes from one exponent of the menu to the next.
  passes = (steps[1:] + steps[:-1]) / 2 - wanted[:, None]
  raised = passes <= 0
  if ratio is not None:
    kept = -(-columns // 2**steps)
    budget = len(wanted) * columns / ratio if ratio >= 1 else -1
    if budget < len(wanted) * kept[-1]:
      raise ValueError(
        f'ratio={ratio} cannot be met: blocks of at most {2 ** int(steps[-1])} of {columns} '
        f'columns give 1..{columns / kept[-1]:.4g}; change the ratio or extend the menu.'
      )
    gains = np.broadcast_to(kept[:-1] - kept[1:], passes.shape).ravel()
    order = np.argsort(passes, axis=None, kind='stable')
    left = len(wanted) * kept[0] - np.concatenate([[0], np.cumsum(gains[order])])
    raised = np.zeros(passes.size, bool)
    raised[order[: int(np.argmax(left <= budget))]] = True
    raised = raised.reshape(passes.shape)
  return tuple(steps[raised.sum(1)].tolist())


def darb(
  w: jax.Array,
  layout: str,
  ratio: float,
  menu: tuple[int, ...] = tuple(range(_EXPONENT + 1)),
  density=None,
) -> Darb:
  """`Darb` for a leaf: large blocks for rows that unstructured pruning would empty.

  Args:
    w: float leaf.
    layout: one capital per axis, e.g. 'HWIO'.
    ratio: weights per kept weight; met from above.
    menu: exponents to choose from, ascending.
    density: [O] densities to use in place of `row_density(w, layout, ratio)`, e.g. of a model
      pruned by ADMM.

  Raises:
    ValueError: when the ratio cannot be met.

  Example:
    >>> w = jnp.array([[0.9, -0.1, 0.4, 0.8], [0.1, 0.0, 0.0, 0.2]])
    >>> darb(w, 'OI', ratio=2, menu=(0, 1, 2))
    Darb(exponents=(1, 2))

  Source: Ren et al., "DARB", AAAI 2020.
  """
  density = row_density(w, layout, ratio) if density is None else density
  _, i, m = kernel_shape(w.shape, layout)
  return Darb(choose_exponents(density, i * m, ratio, tuple(menu)))


def bank(w: jax.Array, layout: str, ratio: float, size: int = 16, density=None) -> Bank:
  """`Bank` for a leaf: the count per bank in proportion to each row's density.

  Counts are the rounded shares `c * size * density`, with the largest c that meets the ratio.

  Args:
    w: float leaf.
    layout: one capital per axis, e.g. 'HWIO'.
    ratio: weights per kept weight; met from above.
    size: columns of a bank.
    density: [O] densities to use in place of `row_density(w, layout, ratio)`.

  Raises:
    ValueError: when the ratio leaves nothing.

  Example:
    >>> w = jnp.array([[0.9, -0.7, 0.4, 0.8], [0.1, 0.0, 0.0, 0.2]])
    >>> bank(w, 'OI', ratio=2, size=4)
    Bank(size=4, counts=(4, 0))

  Source: Ren et al., "DARB", AAAI 2020, with the roles of block and count exchanged.
  """
  density = row_density(w, layout, ratio) if density is None else np.asarray(density, np.float64)
  o, i, m = kernel_shape(w.shape, layout)
  columns = i * m
  size = min(size, columns)
  budget = o * columns / ratio
  # Factor at which a row's share rounds up to its next weight per bank.
  with np.errstate(divide='ignore'):
    passes = (np.arange(size) + 0.5) / (size * density[:, None])
  passes = np.where(np.isfinite(passes), passes, np.inf)
  whole, rest = divmod(columns, size)
  gains = np.broadcast_to(whole + (np.arange(size) < rest), passes.shape).ravel()
  order = np.argsort(passes, axis=None, kind='stable')
  order = order[np.isfinite(passes.ravel()[order])]
  taken = order[np.cumsum(gains[order]) <= budget]
  if not len(taken):
    raise ValueError(
      f'ratio={ratio} leaves nothing of a {layout} leaf {list(w.shape)} in banks of {size}; one '
      f'weight per bank of one row is {int(gains[0])} weights. Lower the ratio or enlarge the bank.'
    )
  return Bank(size, tuple(np.bincount(taken // size, minlength=o).tolist()))
