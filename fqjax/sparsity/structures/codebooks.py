"""Where the patterns of a codebook come from: named sets, the weights' own energy, reduction."""

from collections.abc import Sequence
import itertools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.sparsity._layout import kernel_shape, to_kernels
from fqjax.sparsity.structures._base import scores_of
from fqjax.sparsity.structures.patterns import best_patterns, pattern_taps

# A float leaf, or several that share a codebook.
Leaves = jax.Array | Sequence[jax.Array]

# Up to here all patterns of n taps are candidates, beyond it those the kernels show.
_UNIVERSE = 4096
# Kernels scored against all candidates at a time.
_KERNELS = 1 << 14
_CENTRE = 1 << 4

_DESIGNED: dict[str, tuple[int, ...]] = {
  'elog4': (58, 154, 184, 178),  # T shapes: up, left, down, right
  'corner4': (27, 54, 216, 432),  # 2x2 blocks: top left, top right, bottom left, bottom right
  'elog4+corner4': (58, 154, 184, 178, 27, 54, 216, 432),
  'edge4': (15, 39, 456, 480),  # three of an edge and a neighbour, without the centre
}


def all_patterns(n: int, size: int = 9) -> tuple[int, ...]:
  """Every pattern of n taps.

  Args:
    n: kept taps, 1..size.
    size: taps of a kernel.

  Returns:
    Bitmasks, ascending.

  Raises:
    ValueError: for an n out of range, or more than 2**17 patterns.

  Example:
    >>> all_patterns(1, size=4)
    (1, 2, 4, 8)
    >>> len(all_patterns(4))
    126
  """
  if not 1 <= n <= size:
    raise ValueError(f'n={n} taps of {size}: n is 1..{size}.')
  if math.comb(size, n) > 1 << 17:
    raise ValueError(
      f'{math.comb(size, n)} patterns keep {n} of {size} taps; take candidates from the weights '
      '(pcnn_codebook).'
    )
  return tuple(sorted(sum(1 << t for t in c) for c in itertools.combinations(range(size), n)))


def pattern_set(name: str) -> tuple[int, ...]:
  """A designed codebook of 4 of 9 taps.

  Args:
    name: 'elog4' (T shapes, whose union is a plus), 'corner4' (2x2 blocks), 'elog4+corner4', 'edge4'
      (an edge and a neighbour; with the corners what trained VGG-16 kernels choose), 'centre56'
      (the centre and three others) or 'any4' (all 126).

  Returns:
    Bitmasks; bit t = 3*row + column.

  Raises:
    ValueError: for another name.

  Example:
    >>> pattern_set('corner4')
    (27, 54, 216, 432)

  Source: Ma et al., "PCONV", AAAI 2020; Niu et al., "PatDNN", ASPLOS 2020.
  """
  if name == 'any4':
    return all_patterns(4)
  if name == 'centre56':
    return tuple(mask for mask in all_patterns(4) if mask & _CENTRE)
  if name not in _DESIGNED:
    known = ', '.join([*_DESIGNED, 'centre56', 'any4'])
    raise ValueError(f'{name!r} is no pattern set; choose one of {known}.')
  return _DESIGNED[name]


def _listed(w: Any) -> list[Any]:
  return list(w) if isinstance(w, list | tuple) else [w]


def _energies(w: Leaves, layout: str, saliency: Leaves | None) -> jax.Array:
  """[kernels, M] of one leaf or several."""
  leaves = _listed(w)
  given = [None] * len(leaves) if saliency is None else _listed(saliency)
  if not leaves or len(given) != len(leaves):
    raise ValueError(f'{len(leaves)} leaves and {len(given)} saliencies: give one for each leaf.')
  sizes = {kernel_shape(jnp.shape(leaf), layout)[2] for leaf in leaves}
  if len(sizes) > 1:
    raise ValueError(f'kernels of {sorted(sizes)} taps cannot share a codebook; make one for each.')
  parts = [
    to_kernels(scores_of(jnp.asarray(a), b, None, 2), layout)
    for a, b in zip(leaves, given, strict=True)
  ]
  return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def top_patterns(w: Leaves, layout: str, n: int, saliency: Leaves | None = None) -> dict[int, int]:
  """The mask of the n largest taps of every kernel, counted: one vote a kernel.

  Args:
    w: float leaf, or several that share a codebook.
    layout: one capital per axis, e.g. 'HWIO'.
    n: taps a mask keeps; of equal magnitudes the lowest tap.
    saliency: like `w`; ranks in place of w**2.

  Returns:
    {mask: votes}, most votes first, of equal votes the smaller mask first.

  Raises:
    ValueError: for an n out of range, or leaves of different kernels.

  Example:
    >>> top_patterns(jnp.array([[[0.1, 0.9, 0.2], [0.3, 0.8, 0.5]]]), 'OIM', n=1)
    {2: 2}

  Source: Tan et al., "PCNN", DAC 2020; Niu et al., "PatDNN", ASPLOS 2020 (natural patterns).
  """
  energies = np.asarray(_energies(w, layout, saliency))
  size = energies.shape[1]
  if not 1 <= n <= size:
    raise ValueError(f'n={n} taps of {size}: n is 1..{size}.')
  taps = np.argsort(-energies, axis=1, kind='stable')[:, :n]
  masks = np.zeros(energies.shape, bool)
  np.put_along_axis(masks, taps, True, 1)
  packed, votes = np.unique(np.packbits(masks, 1, 'little'), axis=0, return_counts=True)
  found = zip((int.from_bytes(p.tobytes(), 'little') for p in packed), votes.tolist(), strict=True)
  return dict(sorted(found, key=lambda item: (-item[1], item[0])))


@jax.jit
def _score_step(energies, table, best, add):
  """Energies kept once `add` is in the codebook, and the total each candidate would bring then."""

  def chunk(total, part):
    kernels, kept = part
    sums = jnp.einsum('km,vm->kv', kernels, table, precision=lax.Precision.HIGHEST)
    kept = jnp.maximum(kept, jnp.take(sums, add, axis=1))
    return total + jnp.maximum(sums - kept[:, None], 0).sum(0), kept

  return lax.scan(chunk, jnp.zeros(len(table), energies.dtype), (energies, best))


def greedy_codebook(
  w: Leaves, layout: str, masks: Sequence[int], v: int, saliency: Leaves | None = None
) -> tuple[int, ...]:
  """Chooses patterns one by one, each the one that adds most kept energy.

  The kept energy is a facility-location objective, so the greedy choice keeps at least 1 - 1/e of
  the best codebook's; in practice nearly all.

  Args:
    w: float leaf, or several that share a codebook.
    layout: one capital per axis, e.g. 'HWIO'.
    masks: candidates.
    v: patterns to choose; fewer come back when no further one adds energy.
    saliency: like `w`; counts in place of w**2.

  Returns:
    Bitmasks, ascending.

  Raises:
    ValueError: when v is not within 1..candidates, or leaves have different kernels.

  Example:
    >>> w = jnp.array([[[3.0, 1.0], [2.0, 0.0]]])
    >>> greedy_codebook(w, 'OIM', masks=(1, 2), v=1)
    (1,)

  Source: Nemhauser et al., "An analysis of approximations for maximizing submodular set functions",
  1978; in place of the votes of Tan et al., "PCNN", DAC 2020.
  """
  masks = sorted(set(masks))
  if not 1 <= v <= len(masks):
    raise ValueError(f'cannot choose v={v} of {len(masks)} candidate patterns.')
  energies = _energies(w, layout, saliency)
  size = energies.shape[1]
  chunk = min(_KERNELS, len(energies))
  energies = jnp.pad(energies, ((0, -len(energies) % chunk), (0, 0))).reshape(-1, chunk, size)
  # The empty pattern in front is the codebook's start.
  table = jnp.asarray(pattern_taps((0, *masks), size), energies.dtype)
  best = jnp.zeros(energies.shape[:2], energies.dtype)
  chosen, last = [], 0
  for _ in range(v):
    gains, best = _score_step(energies, table, best, last)
    gains = np.asarray(gains)
    if not gains.max() > 0:
      break
    last = int(gains.argmax())
    chosen.append(masks[last - 1])
  return tuple(sorted(chosen or masks[:1]))


def pcnn_codebook(
  w: Leaves,
  layout: str,
  n: int,
  v: int,
  method: str = 'greedy',
  saliency: Leaves | None = None,
) -> tuple[int, ...]:
  """At most v patterns of n taps that keep most of a layer's energy.

  Candidates are all patterns of n taps; for large kernels, where those are too many, the masks of
  the n largest taps that the kernels themselves show.

  Args:
    w: float leaf, or several that share a codebook.
    layout: one capital per axis, e.g. 'HWIO'.
    n: kept taps.
    v: patterns; a power of two wastes no index bits.
    method: 'greedy' adds the pattern that brings most energy; 'votes' takes the most frequent masks
      of the n largest taps, as published.
    saliency: like `w`; counts in place of w**2.

  Returns:
    Bitmasks, ascending, for `Patterns(masks, size)`.

  Raises:
    ValueError: for another method, an n or v out of range, or leaves of different kernels.

  Example:
    >>> w = jnp.array([[[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 2.5]]])
    >>> pcnn_codebook(w, 'OIM', n=2, v=2)
    (5, 12)

  Source: Tan et al., "PCNN", DAC 2020 (pattern distillation).
  """
  if method not in ('greedy', 'votes'):
    raise ValueError(f"method={method!r} must be 'greedy' or 'votes'.")
  if v < 1:
    raise ValueError(f'v={v} patterns: at least 1.')
  size = kernel_shape(jnp.shape(_listed(w)[0]), layout)[2]
  if method == 'greedy' and 1 <= n <= size and math.comb(size, n) <= _UNIVERSE:
    masks = all_patterns(n, size)
    return greedy_codebook(w, layout, masks, min(v, len(masks)), saliency)
  votes = list(top_patterns(w, layout, n, saliency))
  if method == 'votes':
    return tuple(sorted(votes[:v]))
  return greedy_codebook(w, layout, votes[:_UNIVERSE], min(v, len(votes)), saliency)


def pattern_usage(
  w: Leaves, layout: str, masks: Sequence[int], saliency: Leaves | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """How many kernels take each pattern, and how much energy they keep with it.

  Args:
    w: float leaf, or several that share a codebook.
    layout: one capital per axis, e.g. 'HWIO'.
    masks: codebook.
    saliency: like `w`; counts in place of w**2.

  Returns:
    counts: int64 [V].
    energy: float64 [V].

  Example:
    >>> counts, energy = pattern_usage(jnp.array([[[3.0, 1.0], [0.0, 2.0]]]), 'OIM', (1, 2))
    >>> print(counts, energy)
    [1 1] [9. 4.]
  """
  energies = _energies(w, layout, saliency)
  table = pattern_taps(tuple(masks), energies.shape[1])
  codes, best = (np.asarray(a) for a in best_patterns(energies, table))
  v = len(table)
  return np.bincount(codes, minlength=v), np.bincount(codes, best.astype(np.float64), v)


def shrink_library(masks: Sequence[int], usage, v: int) -> tuple[int, ...]:
  """The v most used patterns of a library: one step of its reduction.

  Counts of a model that is being trained towards the library concentrate; those of one that is not
  stay spread out, so train between two steps.

  Args:
    masks: library.
    usage: [patterns], counts or energies of `pattern_usage`.
    v: how many stay.

  Returns:
    Bitmasks in the order of `masks`; of equal usage the earlier stay.

  Raises:
    ValueError: when lengths differ or v is out of range.

  Example:
    >>> shrink_library((27, 54, 216), [5, 2, 7], 2)
    (27, 216)

  Source: Ma et al., "An Image Enhancing Pattern-based Sparsity", ECCV 2020 (library extraction).
  """
  usage = np.asarray(usage)
  if usage.shape != (len(masks),) or not 1 <= v <= len(masks):
    raise ValueError(
      f'cannot keep {v} of {len(masks)} patterns by a usage of shape {list(usage.shape)}; give one '
      'number per pattern, and a v within 1..patterns.'
    )
  stay = np.sort(np.argsort(-usage, kind='stable')[:v])
  return tuple(masks[i] for i in stay)
