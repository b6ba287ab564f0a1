"""Levels at fixed multiples of one scale: equal intervals, powers of two, ternary, binary, integers."""

import abc
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._interval import exact_scale, search_scale
from fqjax.quantize._quantizer import PER, Quantizer, per_output
from fqjax.sparsity._layout import to_kernels
from fqjax.sparsity._select import wide

# One program each, also where the caller has no jit around it.
_jit = functools.partial(jax.jit, static_argnames=('self', 'layout'))


@dataclasses.dataclass(frozen=True)
class Scaled(Quantizer):
  """Levels `scale * multiples`, symmetric about 0.

  A subclass gives the magnitudes and, where least squares is not what it wants, its own `_scale` and
  `_rank`. A leaf (or output) whose live weights are all 0 gets scale 0: it stays 0, at index 0.
  """

  @property
  @abc.abstractmethod
  def magnitudes(self) -> tuple[int, ...]:
    """Of the levels above 0, in units of the scale, ascending from 1."""

  @property
  def multiples(self) -> tuple[int, ...]:
    """The codebook in units of the scale: 0, then the levels ascending."""
    return (0, *(-m for m in reversed(self.magnitudes)), *self.magnitudes)

  @property
  def count(self) -> int:
    """How many levels a live weight may take."""
    return 2 * len(self.magnitudes) + self.zero

  @property
  def tabled(self) -> int:
    """How many float32 numbers are stored for one codebook: the scale."""
    return 1

  @property
  def _to_zero(self) -> bool:
    """Whether a live weight may become 0."""
    return self.zero

  def scale(self, codebook: jax.Array) -> jax.Array:
    """The scale of a codebook, or of each output: entry of multiple 1.

    Args:
      codebook: from `fit`, [K] or [O, K].

    Returns:
      float32 [] or [O].
    """
    return codebook[..., len(self.magnitudes) + 1]

  @_jit
  def fit(self, w: jax.Array, layout: str, mask: jax.Array | None = None) -> jax.Array:
    """The levels of least squared error; see `Quantizer.fit`.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; None where all do.
    """
    self.check(w.shape, layout)
    rows = jnp.abs(self._rows(lax.stop_gradient(w), layout)).astype(wide(w.dtype))
    live = None if mask is None else self._rows(mask, layout)
    scale = jax.vmap(self._scale)(rows, live).astype(jnp.float32)
    table = scale[:, None] * jnp.asarray(self.multiples, jnp.float32)[None]
    # -0 would decode to other bits than the weight's.
    table = jnp.where(table == 0, jnp.zeros_like(table), table)
    return table if self.groups == 'channel' else table[0]

  def fit_exact(self, w, layout: str, mask=None) -> np.ndarray:
    """As `fit`, on the host: the best of all scales, where `fit` searches at a fixed cost.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; None where all do.
    """
    rows = np.abs(self._rows(np.asarray(w, np.float64), layout))
    live = np.ones(rows.shape, bool) if mask is None else self._rows(np.asarray(mask), layout)
    found = [
      self._exact(row[alive]) if alive.any() else 0.0 for row, alive in zip(rows, live, strict=True)
    ]
    table = np.asarray(found, np.float32)[:, None] * np.asarray(
      self.multiples, np.float32
    ) + np.float32(0)
    return table if self.groups == 'channel' else table[0]

  def _rows(self, x, layout: str):
    """[groups, weights that share a codebook]."""
    if self.groups == 'channel':
      kernels = to_kernels(x, layout)
      return kernels.reshape(len(kernels), -1)
    return x.reshape(1, -1)

  def _searched(self) -> tuple[int, ...]:
    return (0, *self.magnitudes) if self._to_zero else self.magnitudes

  def _scale(self, row: jax.Array, live: jax.Array | None) -> jax.Array:
    """Scale of magnitudes [n]."""
    return search_scale(row, live, self._searched())

  def _exact(self, row: np.ndarray) -> float:
    return exact_scale(row, self._searched()).scale

  def _rank(self, ratio: jax.Array) -> jax.Array:
    """Which magnitude is nearest to |w| / scale: 1 for the first, 0 for none."""
    return jnp.clip(jnp.round(ratio), 0 if self._to_zero else 1, len(self.magnitudes))

  def _signed_rank(self, w, layout, mask, codebook):
    """Position among the magnitudes with the sign of the weight, and the scale beside it."""
    table = self.fit(w, layout, mask) if codebook is None else jnp.asarray(codebook)
    w = lax.stop_gradient(w).astype(wide(w.dtype))
    scale = self.scale(table).astype(w.dtype)
    if scale.ndim:
      scale = per_output(scale, layout, w.shape)
    scale = scale.reshape((1,) * (w.ndim - scale.ndim) + scale.shape)
    rank = self._rank(jnp.abs(w) / jnp.where(scale > 0, scale, 1)).astype(jnp.int32)
    rank = jnp.where(w < 0, -rank, rank)
    alive = scale > 0 if mask is None else (scale > 0) & mask
    return jnp.where(alive, rank, 0), scale

  @_jit
  def indices(self, w, layout, mask=None, codebook=None):
    """Which entry of the codebook is nearest to each weight; see `Quantizer.indices`.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; the others get index 0.
      codebook: from `fit`; by default that of these weights.
    """
    rank, _ = self._signed_rank(w, layout, mask, codebook)
    half = len(self.magnitudes)
    found = jnp.where(rank < 0, rank + half + 1, rank + half)
    return jnp.where(rank == 0, 0, found).astype(jnp.uint8)

  @_jit
  def project(self, w, layout, mask=None, codebook=None):
    """The nearest weights of this quantizer; see `Quantizer.project`.

    Args:
      w: float leaf.
      layout: one capital per axis.
      mask: bool like `w`, True lives; the others become exactly 0.
      codebook: from `fit`; by default that of these weights.
    """
    rank, scale = self._signed_rank(w, layout, mask, codebook)
    multiple = self._multiple(jnp.abs(rank)).astype(jnp.float32)
    # In float32 as the codebook is made, so that both are the same number.
    value = scale.astype(jnp.float32) * jnp.where(rank < 0, -multiple, multiple)
    return value.astype(w.dtype)

  def _multiple(self, rank: jax.Array) -> jax.Array:
    return rank


def _check_per(per: str) -> None:
  if per not in PER:
    raise ValueError(f"per={per!r} must be 'layer' or 'channel'.")


@dataclasses.dataclass(frozen=True)
class Interval(Scaled):
  """Equal intervals without zero: `{-h q, .. -q, q, .. h q}`, h = 2^(bits - 1).

  Zero belongs to pruning, so that a surviving weight uses all 2^bits codes. The interval q is that of
  least squared error, searched anew at every fit: the levels follow the weights.

  Attributes:
    bits: 1 to 7.
    per: 'layer' or 'channel': one q for the leaf, or one for each output.
    drop: a live weight below q / 2 becomes 0 and index 0, like a masked one. With the k largest
      weights alive this makes the projection on both constraints together exact, for a given q.

  Example:
    >>> w = jnp.array([[-2.0, -1.0, 0.9, 1.1, 2.0]])
    >>> q = Interval(bits=2)
    >>> print(q.fit(w, 'IO').round(3), q.indices(w, 'IO'))
    [ 0. -2. -1.  1.  2.] [[1 2 3 3 4]]

  Source: Ye et al. 2018, "A unified framework of DNN weight pruning and weight clustering" (arXiv
  1811.01907).
  """

  bits: int
  per: str = 'layer'
  drop: bool = False

  def __post_init__(self):
    if self.bits not in range(1, 8):
      raise ValueError(
        f'bits={self.bits} must be 1 to 7 for intervals without zero; Uniform has 8.'
      )
    _check_per(self.per)

  @property
  def magnitudes(self) -> tuple[int, ...]:
    """Of the levels above 0, in units of the scale."""
    return tuple(range(1, 2 ** (self.bits - 1) + 1))

  @property
  def _to_zero(self):
    return self.drop


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Scaled):
  """Powers of two without zero: `{+-a, +-2 a, +-4 a, ...}`, 2^(bits - 1) magnitudes.

  Attributes:
    bits: 1 to 5; 5 span 2^15.
    per: 'layer' or 'channel': one a for the leaf, or one for each output.
    drop: a live weight below a / 2 becomes 0 and index 0, like a masked one.

  Example:
    >>> w = jnp.array([[0.11, -0.2, 0.38, 0.82]])
    >>> print(PowerOfTwo(bits=3).project(w, 'IO').round(3))
    [[ 0.101 -0.202  0.404  0.808]]

  Source: Leng et al. 2018, "Extremely low bit neural network" (ADMM, powers of two).
  """

  bits: int
  per: str = 'layer'
  drop: bool = False

  def __post_init__(self):
    if self.bits not in range(1, 6):
      raise ValueError(f'bits={self.bits} must be 1 to 5 for powers of two.')
    _check_per(self.per)

  @property
  def magnitudes(self) -> tuple[int, ...]:
    """Of the levels above 0, in units of the scale."""
    return tuple(2**j for j in range(2 ** (self.bits - 1)))

  @property
  def _to_zero(self):
    return self.drop

  def _rank(self, ratio):
    # The middle between 2^j and 2^(j+1) is 1.5 * 2^j: the exponent says how many are passed.
    passed = jnp.frexp(ratio / 1.5)[1] + 1
    rank = jnp.clip(passed, 1, len(self.magnitudes))
    return jnp.where(ratio < 0.5, 0, rank) if self.drop else rank

  def _multiple(self, rank):
    return jnp.where(rank > 0, 2 ** (rank - 1).clip(0), 0)


@dataclasses.dataclass(frozen=True)
class Binary(Scaled):
  """Two levels `{-q, q}`, q the mean magnitude of the live weights: XNOR-Net's scale.

  Attributes:
    per: 'layer' or 'channel': one q for the leaf, or one for each output.

  Example:
    >>> print(Binary().project(jnp.array([[0.5, -1.5, 2.0, -0.1]]), 'IO'))
    [[ 1.025 -1.025  1.025 -1.025]]

  Source: Rastegari et al. 2016, "XNOR-Net", equation 6.
  """

  per: str = 'layer'

  def __post_init__(self):
    _check_per(self.per)

  @property
  def magnitudes(self) -> tuple[int, ...]:
    """Of the level above 0, in units of the scale."""
    return (1,)

  def _scale(self, row, live):
    # where=, not a product: what is masked may be anything.
    total = jnp.sum(row, where=live)
    return total / jnp.maximum(row.size if live is None else jnp.sum(live), 1).astype(row.dtype)


@dataclasses.dataclass(frozen=True)
class Ternary(Scaled):
  """Three levels `{-q, 0, q}`; q and which weights are 0 are the exact least-squares solution.

  The k largest magnitudes survive, with k the maximum of (their sum)^2 / k and q their mean.

  Attributes:
    per: 'layer' or 'channel': one q for the leaf, or one for each output.

  Example:
    >>> print(Ternary().project(jnp.array([[0.9, -0.1, 0.4, -1.1, 0.05, 0.3]]), 'IO'))
    [[ 1.  0.  0. -1.  0.  0.]]

  Source: Li et al. 2016, "Ternary weight networks", solved exactly by sorting.
  """

  per: str = 'layer'

  def __post_init__(self):
    _check_per(self.per)

  @property
  def magnitudes(self) -> tuple[int, ...]:
    """Of the level above 0, in units of the scale."""
    return (1,)

  @property
  def zero(self) -> bool:
    """Whether 0 is one of the levels of a live weight: yes."""
    return True

  def _scale(self, row, live):
    v = jnp.sort(row if live is None else jnp.where(live, row, 0), descending=True)
    top = jnp.maximum(v[0], jnp.finfo(v.dtype).tiny)
    sums, count = jnp.cumsum(v / top), jnp.arange(1, v.size + 1, dtype=v.dtype)
    best = jnp.argmax(jnp.square(sums) / count)
    return jnp.where(v[0] > 0, top * sums[best] / count[best], 0)


@dataclasses.dataclass(frozen=True)
class Uniform(Scaled):
  """Signed integers times a scale: `{-h s, .. 0, .. h s}`, h = 2^(bits - 1) - 1.

  What integer runtimes compute with. Train through it with `straight_through`.

  Attributes:
    bits: 2 to 8.
    per: 'channel' or 'layer': one s for each output, or one for the leaf.
    clip: how far the levels reach: 'max' to the largest magnitude, 'mse' as far as least squared
      error asks, which pays at 4 bits and below.

  Example:
    >>> w = jnp.array([[1.27, 0.5], [-0.3, 0.25]])
    >>> q = Uniform(bits=8)
    >>> table, integers = q.fit(w, 'IO'), jnp.array(q.multiples)[q.indices(w, 'IO')]
    >>> print(q.scale(table).round(5), integers)
    [0.01    0.00394] [[127 127]
     [-30  64]]

  Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient
  integer-arithmetic-only inference" (symmetric, without a zero point).
  """

  bits: int = 8
  per: str = 'channel'
  clip: str = 'max'

  def __post_init__(self):
    if self.bits not in range(2, 9):
      raise ValueError(f'bits={self.bits} must be 2 to 8; one bit is Binary.')
    if self.clip not in ('max', 'mse'):
      raise ValueError(f"clip={self.clip!r} must be 'max' or 'mse'.")
    _check_per(self.per)

  @property
  def magnitudes(self) -> tuple[int, ...]:
    """Of the levels above 0, in units of the scale."""
    return tuple(range(1, 2 ** (self.bits - 1)))

  @property
  def zero(self) -> bool:
    """Whether 0 is one of the levels of a live weight: yes."""
    return True

  def _scale(self, row, live):
    if self.clip == 'mse':
      return super()._scale(row, live)
    return jnp.max(row, where=live, initial=0) / len(self.magnitudes)

  def _exact(self, row):
    if self.clip == 'mse':
      return super()._exact(row)
    return float(row.max() if row.size else 0) / len(self.magnitudes)
