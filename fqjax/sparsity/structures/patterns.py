"""Kernels that keep the taps of one pattern out of a codebook, and whole kernels that go."""

import dataclasses
from typing import ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import codecs
from fqjax.sparsity._layout import kernel_shape, to_kernels
from fqjax.sparsity._select import keep_count, top_k_mask
from fqjax.sparsity.structures._base import Structure, scores_of

# Patterns scored at a time: a large codebook never holds [kernels, codebook] at once.
_CHUNK = 16


def pattern_taps(masks: tuple[int, ...], size: int) -> np.ndarray:
  """Bitmasks as rows of a table.

  Args:
    masks: patterns; bit t set keeps tap t = row*width + column.
    size: taps of a kernel.

  Returns:
    bool [patterns, size].

  Example:
    >>> print(pattern_taps((58,), 9).reshape(3, 3).astype(int))
    [[0 1 0]
     [1 1 1]
     [0 0 0]]
  """
  return np.array([[mask >> t & 1 for t in range(size)] for mask in masks], bool)


def best_patterns(scores: jax.Array, table: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Code and score of the best pattern of each kernel.

  Args:
    scores: [..., M], summed over the taps of a pattern.
    table: bool [V, M].

  Returns:
    codes: int32 [...]; of equal scores the lowest.
    best: [...], its score.
  """

  def rank(part):
    sums = jnp.einsum('...m,vm->...v', scores, part, precision=lax.Precision.HIGHEST)
    return jnp.argmax(sums, -1).astype(jnp.int32), jnp.max(sums, -1)

  if len(table) <= _CHUNK:
    return rank(jnp.asarray(table, scores.dtype))
  # A repeated first pattern fills the last chunk: it never beats itself.
  filled = np.concatenate([table, np.repeat(table[:1], -len(table) % _CHUNK, 0)])
  chunks = jnp.asarray(filled, scores.dtype).reshape(-1, _CHUNK, table.shape[1])

  def better(carry, chunk):
    first, part = chunk
    codes, best = rank(part)
    wins = best > carry[1]
    return (jnp.where(wins, first + codes, carry[0]), jnp.where(wins, best, carry[1])), None

  first = jnp.arange(_CHUNK, len(filled), _CHUNK, dtype=jnp.int32)
  return lax.scan(better, rank(chunks[0]), (first, chunks[1:]))[0]


@dataclasses.dataclass(frozen=True)
class Patterns(Structure):
  """Every kernel keeps the taps of one pattern; with `keep` below 1 only some kernels stay.

  Patterns and connectivity are projected jointly: a kernel ranks by the energy it has left *after*
  its best pattern, which makes the projection exact. Ranking by the full norm is not, and two
  separate constraints cycle. One minimum (per output or per input) keeps it exact; with both the
  choice is greedy (outputs first, then what the inputs lack, then the largest), and `keep` must leave
  room for the sum of the two.

  Attributes:
    masks: codebook of bitmasks; bit t set keeps tap t = row*width + column. A kernel's code is the
      place of its mask; of equal energies the lowest code.
    size: taps of a kernel; the product of the leaf's tap axes.
    keep: kept fraction of the kernels, in (0, 1].
    min_per_output: kernels that every output keeps.
    min_per_input: kernels that every input keeps.
    groups: groups of a grouped convolution; each keeps the same number of kernels.
    rounding: of the number of kernels kept per group, 'nearest' or 'up'.

  Example:
    >>> w = jnp.arange(9.0).reshape(3, 3, 1, 1)
    >>> print(Patterns(pattern_set('elog4')).project(w, 'HWIO')[0][..., 0, 0])
    [[0. 0. 0.]
     [3. 4. 5.]
     [0. 7. 0.]]

  Source: Tan et al., "PCNN", DAC 2020 (keep=1); Ma et al., "PCONV", AAAI 2020, and "An Image
  Enhancing Pattern-based Sparsity", ECCV 2020 (connectivity).
  """

  masks: tuple[int, ...]
  size: int = 9
  keep: float = 1.0
  min_per_output: int = 0
  min_per_input: int = 0
  groups: int = 1
  rounding: str = 'nearest'
  _view: ClassVar[str] = 'kernels'

  def __post_init__(self):
    keep_count(self.keep, 1, self.rounding)
    wrong = [mask for mask in self.masks if not 0 < mask < 1 << self.size]
    if not self.masks or wrong or len(set(self.masks)) < len(self.masks):
      raise ValueError(
        f'Patterns masks must be different integers in 1..2**{self.size}-1, one bit a tap; got '
        f'{wrong or self.masks}.'
      )
    if min(self.min_per_output, self.min_per_input) < 0 or self.groups < 1:
      raise ValueError(f'{self}: minima are 0 or more, groups 1 or more.')

  def check(self, shape, layout):
    """As `Structure.check`."""
    o, i, m = kernel_shape(tuple(shape), layout)
    leaf = f'a {layout} leaf {list(shape)}'
    if m != self.size:
      raise ValueError(
        f'Patterns of {self.size} taps do not fit the {m}-tap kernels of {leaf}; '
        + ('leave it dense or prune blocks or rows.' if m == 1 else 'use masks of that size.')
      )
    if o % self.groups:
      raise ValueError(f'{o} outputs of {leaf} do not divide into {self.groups} groups.')
    if self.keep < 1:
      if i == 1:
        raise ValueError(
          f'Patterns keep={self.keep} would delete outputs of {leaf}, which have one kernel each; '
          'use keep=1.'
        )
      count, rows = self._live(o, i), o // self.groups
      least = max(rows * self.min_per_output, i * self.min_per_input)
      if self.min_per_output and self.min_per_input:
        least = rows * self.min_per_output + i * self.min_per_input
      if self.min_per_output > i or self.min_per_input > rows or least > count:
        raise ValueError(
          f'Patterns keep={self.keep} leaves {count} of {rows * i} kernels a group of {leaf}, too '
          f'few for min_per_output={self.min_per_output} and min_per_input={self.min_per_input}; '
          'raise keep or lower the minima.'
        )

  def kept(self, shape, layout):
    """As `Structure.kept`; with patterns of several sizes the most it can be."""
    self.check(shape, layout)
    o, i, _ = kernel_shape(tuple(shape), layout)
    return self.groups * self._live(o, i) * max(mask.bit_count() for mask in self.masks)

  def assign(
    self,
    w: jax.Array,
    layout: str,
    *,
    saliency: jax.Array | None = None,
    frozen: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Which pattern each kernel takes, and which kernels stay.

    Args:
      w: float leaf.
      layout: one capital per axis, e.g. 'HWIO'.
      saliency: as for `project`.
      frozen: as for `project`.

    Returns:
      codes: int32 [O, I], places in `masks`; a kernel that goes has one too.
      live: bool [O, I].

    Raises:
      ValueError: when the structure does not fit the leaf.

    Example:
      >>> w = jnp.arange(9.0).reshape(3, 3, 1, 1)
      >>> codes, live = Patterns(pattern_set('elog4')).assign(w, 'HWIO')
      >>> print(codes, live)
      [[2]] [[ True]]
    """
    self.check(w.shape, layout)
    return self._assign(to_kernels(scores_of(w, saliency, frozen, self._power), layout))

  def _live(self, o: int, i: int) -> int:
    """Kernels kept per group."""
    return keep_count(self.keep, o // self.groups * i, self.rounding)

  def _assign(self, scores):
    codes, best = best_patterns(scores, pattern_taps(self.masks, self.size))
    o, i = best.shape
    if self.keep == 1:
      return codes, jnp.ones((o, i), bool)
    best = best.reshape(self.groups, o // self.groups, i)
    forced = jnp.zeros(best.shape, bool)
    if self.min_per_output:
      forced = top_k_mask(best, self.min_per_output, axis=-1)
    if self.min_per_input:
      inputs = jnp.where(forced, jnp.inf, best).swapaxes(1, 2)
      forced |= top_k_mask(inputs, self.min_per_input, axis=-1).swapaxes(1, 2)
    best = jnp.where(forced, jnp.inf, best).reshape(self.groups, -1)
    return codes, top_k_mask(best, self._live(o, i), axis=-1).reshape(o, i)

  def _select(self, scores):
    codes, live = self._assign(scores)
    table = jnp.asarray(pattern_taps(self.masks, self.size))
    return jnp.take(table, codes, axis=0) & live[..., None]

  def _store(self, array, mask):
    if len({taps.bit_count() for taps in self.masks}) > 1 or self.size > 64:
      return super()._store(array, mask)
    if self.keep == 1:
      return codecs.pcnn.encode(array, self.masks, mask=mask)
    return codecs.patterns.encode(array, self.masks, mask=mask)
