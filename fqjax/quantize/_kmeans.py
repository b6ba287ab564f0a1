"""K-means of scalars: sorted once, every later step reads prefix sums. NumPy, float64, no chance."""

from typing import NamedTuple

import numpy as np


class Clusters(NamedTuple):
  """What `kmeans` finds.

  Attributes:
    centers: float64 [K]. With a pinned zero it comes first and the others follow, ascending.
    counts: int64 [K], members.
    sigmas: float64 [K], root of the squared distances to the center over members - 1; 0 where there
      are fewer than two.
    error: mean squared distance to the own center.
  """

  centers: np.ndarray
  counts: np.ndarray
  sigmas: np.ndarray
  error: float


class _Sorted(NamedTuple):
  """Values in order; sums and sums of squares of everything before a place."""

  x: np.ndarray
  sums: np.ndarray
  squares: np.ndarray


def kmeans(
  values: np.ndarray,
  count: int,
  *,
  zero: bool = True,
  repin: bool = True,
  iterations: int = 300,
) -> Clusters:
  """Clusters numbers around `count` centers, one of them pinned at zero.

  Lloyd's iteration from quantiles, the same result for the same numbers. How many centers lie below
  zero cannot change on the way, so neighbouring splits are tried while they lower the error. A center
  without members starts again beside the one with the largest squared error.

  With `count` distinct values or fewer every value has a center; those left over have no members and
  stand in the middle of the widest gaps, where they serve weights that come to move there.

  Args:
    values: float, any shape, finite, at least one.
    count: K, from 1; with `zero` from 2.
    zero: one center is 0 and stays there.
    repin: False clusters freely and then moves the center nearest to zero there, members unchanged:
      the published procedure, with a larger error.
    iterations: at most; fewer when nothing moves any more.

  Returns:
    `Clusters`.

  Raises:
    ValueError: for nothing to cluster, NaN or infinite values, or fewer than one free center.

  Example:
    >>> found = kmeans(np.array([-1.1, -0.9, 0.1, 0.0, 2.0]), 3)
    >>> print(found.centers, found.counts)
    [ 0. -1.  2.] [2 2 1]

  Source: Lloyd, 1982. DGMS (ICML 2022) starts from free k-means.
  """
  x = np.sort(np.asarray(values, np.float64), axis=None)
  if not x.size or not np.isfinite(x[[0, -1]]).all():
    raise ValueError('kmeans needs finite values, at least one.')
  if count < 1 + zero:
    raise ValueError(f'{count} centers, {int(zero)} of them pinned: at least one must be free.')
  data = _Sorted(x, *(np.concatenate([[0.0], np.cumsum(y)]) for y in (x, x * x)))
  distinct = x[np.concatenate([[True], x[1:] != x[:-1]])]
  pinned = zero and repin
  if len(np.union1d(distinct, [0.0]) if pinned else distinct) <= count:
    centers = np.union1d(distinct, [0.0]) if pinned else distinct
  elif pinned:
    centers = _best_split(data, count - 1, iterations)
  else:
    centers = _lloyd(data, _quantiles(x, count), None, iterations)
  return _describe(data, centers, count, zero)


def _best_split(data: _Sorted, free: int, iterations: int) -> np.ndarray:
  """Centers with one at zero, for the number of negative ones that leaves the least error."""
  middle = int(np.searchsorted(data.x, 0.0))
  tried: dict[int, tuple[float, np.ndarray]] = {}

  def attempt(below):
    if below not in tried:
      start = np.concatenate(
        [_quantiles(data.x[:middle], below), [0.0], _quantiles(data.x[middle:], free - below)]
      )
      centers = _lloyd(data, start, below, iterations)
      tried[below] = _error(data, centers), centers
    return tried[below][0]

  least = 0 if middle < len(data.x) else free
  most = free if middle else 0
  below = int(np.clip(round(free * middle / len(data.x)), least, most))
  while True:
    near = [b for b in (below, below - 1, below + 1) if least <= b <= most]
    best = min(near, key=attempt)
    if best == below:
      return tried[below][1]
    below = best


def _quantiles(x: np.ndarray, count: int) -> np.ndarray:
  """Starting centers: quantiles of the density's cube root, how fine levels are best spread."""
  if not count:
    return np.zeros(0)
  if x[0] == x[-1]:
    return np.full(count, x[0])
  # Between every pair of neighbours 1/4096 of the weights apart lies that much mass: density 1/gap.
  knots = x[np.linspace(0, len(x) - 1, min(len(x), 4097)).round().astype(int)]
  mass = np.diff(knots) ** (2 / 3)
  upto = np.concatenate([[0.0], np.cumsum(mass)])
  return np.interp((np.arange(count) + 0.5) / count * upto[-1], upto, knots)


def _edges(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
  """Where the members of each center begin and end; centers ascend."""
  middles = (centers[1:] + centers[:-1]) / 2
  return np.concatenate([[0], np.searchsorted(x, middles), [len(x)]])


def _moments(data: _Sorted, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Members of each center, their sums and their squared distances to it."""
  edges = _edges(data.x, centers)
  n, s, q = np.diff(edges), np.diff(data.sums[edges]), np.diff(data.squares[edges])
  return n, s, np.maximum(q - 2 * centers * s + n * centers**2, 0.0)


def _error(data: _Sorted, centers: np.ndarray) -> float:
  return float(_moments(data, centers)[2].sum() / len(data.x))


def _lloyd(data, centers, pinned: int | None, iterations: int) -> np.ndarray:
  still = 1e-9 * (data.x[-1] - data.x[0])
  for _ in range(iterations):
    n, s, q = _moments(data, centers)
    new = np.where(n > 0, s / np.maximum(n, 1), centers)
    if pinned is not None:
      new[pinned] = 0.0
    empty = [i for i in np.flatnonzero(n == 0) if i != pinned]
    for i in empty:
      new[i] = _beside_worst(data, centers, q)
    if empty:
      centers = np.sort(new)
      pinned = None if pinned is None else int(np.searchsorted(centers, 0.0))
    else:
      moved, centers = np.abs(new - centers).max(), new
      if moved <= still:
        break
  return centers


def _beside_worst(data, centers, errors) -> float:
  """Mean of the members on the worse side of the center with the largest error, which it clears."""
  worst = int(np.argmax(errors))
  errors[worst] = 0.0
  begin, end = _edges(data.x, centers)[worst : worst + 2]
  x = data.x[begin:end]
  if not len(x):
    return centers[worst]
  low, high = x[x < centers[worst]], x[x >= centers[worst]]
  side = max(low, high, key=lambda part: np.square(part - centers[worst]).sum())
  return float(side.mean())


def _describe(data, centers: np.ndarray, count: int, zero: bool) -> Clusters:
  n, s, q = _moments(data, centers)
  if zero:
    nearest = int(np.argmin(np.abs(centers)))
    # The distances of its members to zero, wherever the center was.
    q[nearest] = q[nearest] + 2 * centers[nearest] * s[nearest] - n[nearest] * centers[nearest] ** 2
    centers = centers.copy()
    centers[nearest] = 0.0
  error = float(q.sum() / len(data.x))
  sigmas = np.where(n > 1, np.sqrt(np.maximum(q, 0.0) / np.maximum(n - 1, 1)), 0.0)
  for _ in range(count - len(centers)):
    centers, n, sigmas = _into_widest_gap(centers, n, sigmas)
  if zero:
    first = int(np.flatnonzero((centers == 0) & (n == n[centers == 0].max()))[0])
    order = np.concatenate([[first], np.delete(np.arange(count), first)])
    centers, n, sigmas = centers[order], n[order], sigmas[order]
  return Clusters(centers, n.astype(np.int64), sigmas, error)


def _into_widest_gap(centers, n, sigmas):
  if len(centers) == 1:
    place, value = 1, centers[0]
  else:
    place = int(np.argmax(np.diff(centers))) + 1
    value = (centers[place - 1] + centers[place]) / 2
  return (np.insert(a, place, v) for a, v in ((centers, value), (n, 0), (sigmas, 0.0)))
