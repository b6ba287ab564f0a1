"""Rate by rate: every rung starts from the network of the one before, its zeros frozen."""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fqjax.rules._projection import finalize, frozen
from fqjax.rules._tree import beside, names

PyTree = Any


class Rung(NamedTuple):
  """One rate of a progressive run.

  Attributes:
    index: 0, 1, ...
    params: trained and pruned, exact zeros.
    masks: bool, True lives, None for leaves left alone.
  """

  index: int
  params: PyTree
  masks: PyTree


def progressive(
  params: PyTree,
  targets: Sequence[Any],
  compress: Callable[[Any, PyTree, PyTree | None], PyTree],
  retrain: Callable[[PyTree, PyTree], PyTree],
  *,
  first: int = 0,
  masks: PyTree | None = None,
) -> Iterator[Rung]:
  """Climbs a ladder of rates: compress, cut, retrain; what died stays dead.

  Args:
    params: trained weights; with `first`, those of the rung before.
    targets: plans, or callables tree -> (tree, masks), each sparser than the one before. With
      `ladder`, rates that double.
    compress: `(target, params, masks) -> params`, training towards the target, e.g. a run with
      `admm(target, ...)`. The target already keeps the zeros of earlier rungs; to hold them at zero
      while training too, use `masked_retraining(tx, masks)`. `masks` is None on the first rung.
    retrain: `(params, masks) -> params`, training of the survivors.
    first: index of the rung to go on with, after an interruption.
    masks: of the rung before `first`.

  Yields:
    A `Rung` after each retraining: save it, measure it, stop when it is not good enough.

  Raises:
    ValueError: when `retrain` returns weights that the masks hold at zero.

  Example:
    >>> from fqjax.sparsity import top_k_mask
    >>> def keep(k):
    ...   def target(tree):
    ...     masks = {'w': top_k_mask(jnp.abs(tree['w']), k)}
    ...     return {'w': jnp.where(masks['w'], tree['w'], 0)}, masks
    ...
    ...   return target
    >>> start = {'w': jnp.array([4.0, 1.0, 3.0, 2.0])}
    >>> idle = lambda target, params, masks: params
    >>> for rung in progressive(start, [keep(3), keep(1)], idle, lambda params, masks: params):
    ...   print(rung.index, rung.params['w'])
    0 [4. 0. 3. 2.]
    1 [4. 0. 0. 0.]

  Source: Ye et al., "Progressive DNN Compression", 2019.
  """
  for index in range(first, len(targets)):
    target = frozen(targets[index], masks)
    params = compress(target, params, masks)
    params, masks = finalize(target, params)
    params = retrain(params, masks)
    for name, p, m in zip(
      names(params), jax.tree.leaves(params), beside(params, masks), strict=True
    ):
      if m is not None and bool(jnp.any(jnp.where(m, False, p != 0))):
        raise ValueError(
          f'retraining brought back dead weights of {name} on rung {index}: end its chain with'
          ' fq.rules.keep_masked(masks), or use fq.rules.masked_retraining(tx, masks).'
        )
    yield Rung(index, params, masks)


def ladder(keep: float, *, start: float = 1.0, factor: float = 2.0) -> list[float]:
  """Kept fractions from one rung to the next: each rate `factor` times the one before.

  Args:
    keep: the last one.
    start: what is kept before the first rung.
    factor: greatest step in rate, > 1.

  Returns:
    Falling fractions, evenly spaced in their logarithm, ending at `keep`.

  Raises:
    ValueError: for fractions outside 0 < keep < start <= 1, or a factor that is no step.

  Example:
    >>> [round(x, 4) for x in ladder(0.1)]
    [0.5623, 0.3162, 0.1778, 0.1]
  """
  if not 0 < keep < start <= 1 or factor <= 1:
    raise ValueError(
      f'ladder needs 0 < keep < start <= 1 and factor > 1; got {keep}, {start}, {factor}.'
    )
  rungs = max(1, math.ceil(math.log(start / keep) / math.log(factor) - 1e-9))
  ratio = (keep / start) ** (1 / rungs)
  return [start * ratio**i for i in range(1, rungs)] + [keep]
