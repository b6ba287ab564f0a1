"""From what was seen of an activation to the range its 256 integers cover."""

from collections.abc import Callable, Mapping
import math
from typing import NamedTuple

import numpy as np

STEPS = 255  # between 256 integers
# Candidates per end of a range, for the searches.
_GRID = 64


class Range(NamedTuple):
  """Range of the values of a tensor; zero is always in it, and an integer stands for it exactly.

  Attributes:
    low: at most 0.
    high: at least 0.
  """

  low: float
  high: float

  @property
  def scale(self) -> float:
    """Value of one step, a float32 number; 1 for a tensor of zeros."""
    low, high = np.float32(min(self.low, 0)), np.float32(max(self.high, 0))
    # Below this, a step would not be a normal number.
    scale = (high - low) / np.float32(STEPS)
    return float(scale) if scale >= np.finfo(np.float32).tiny else 1.0

  @property
  def zero(self) -> int:
    """The integer 0..255 that stands for 0."""
    steps = np.rint(-np.float32(self.low) / np.float32(self.scale))
    return int(np.clip(steps, 0, STEPS))


class Seen(NamedTuple):
  """What calibration has seen of a tensor.

  Attributes:
    low: smallest value of all.
    high: largest.
    values: float64 [k] ascending, centres of the bins that are not empty, of a sample.
    counts: float64 [k].
  """

  low: float
  high: float
  values: np.ndarray
  counts: np.ndarray


def min_max(seen: Seen) -> Range:
  """The whole range.

  Args:
    seen: of a tensor.

  Example:
    >>> min_max(Seen(-1.0, 3.0, np.array([0.0]), np.array([1.0])))
    Range(low=-1.0, high=3.0)
  """
  return Range(min(seen.low, 0.0), max(seen.high, 0.0))


def percentile(seen: Seen, percent: float = 99.99) -> Range:
  """The range that leaves out the same share at either end.

  Args:
    seen: of a tensor.
    percent: share that stays, 0..100.

  Raises:
    ValueError: a share outside (0, 100].

  Example:
    >>> percentile(Seen(0.0, 9.0, np.arange(10.0), np.ones(10)), 80)
    Range(low=0.0, high=8.0)
  """
  if not 0 < percent <= 100:
    raise ValueError(f'percent must lie in (0, 100], got {percent}.')
  tail = (1 - percent / 100) / 2
  share = np.cumsum(seen.counts) / np.sum(seen.counts)
  # The smallest value with at least that share at or below it.
  low, high = (seen.values[min(np.searchsorted(share, p - 1e-12), share.size - 1)]
               for p in (tail, 1 - tail))  # fmt: skip
  return Range(*_within(seen, float(low), float(high)))


def mse(seen: Seen) -> Range:
  """The range of the least mean squared error, among the whole range with its ends drawn in.

  Either end is tried at 1/64, 2/64, ... of where it is; all pairs are.

  Args:
    seen: of a tensor.

  Example:
    >>> values = np.append(np.linspace(0, 1, 100), 50.0)
    >>> mse(Seen(0.0, 50.0, values, np.append(np.full(100, 1e6), 1.0))).high
    1.5625

  Source: Nagel et al. 2021, arXiv 2106.08295, section 3.1.
  """
  return _search(seen, _squared_error, joint=False)


def entropy(seen: Seen) -> Range:
  """The range whose 256 integers lose the least information about the distribution.

  Both ends are drawn in together, to 1/64, 2/64, ... of where they are. The divergence is taken
  from the values with their tails heaped on the ends to what the integers can tell of them, over
  2,048 bins. The bin of zero is left out: zero is exact whatever the range, and all that a ReLU
  puts there would count as lost. It wants many values: of a few thousand it takes chance for shape,
  and cuts too much.

  Args:
    seen: of a tensor.

  Example:
    >>> values = np.linspace(0, 1, 2048)
    >>> entropy(Seen(0.0, 1.0, values, np.ones(2048)))
    Range(low=0.0, high=1.0)

  Source: Migacz 2017, "8-bit inference with TensorRT"; here with a zero point.
  """
  edges = np.linspace(seen.values[0], seen.values[-1], 2049)
  place = np.clip(np.searchsorted(edges, seen.values, 'right') - 1, 0, 2047)
  counts = np.bincount(place, seen.counts, minlength=2048)
  counts[place[np.argmin(np.abs(seen.values))]] = 0
  if not counts.any():
    return min_max(seen)
  centres = (edges[:-1] + edges[1:]) / 2
  coarse = Seen(seen.low, seen.high, centres[counts > 0], counts[counts > 0])
  return _search(coarse, _divergence, joint=True)


METHODS: Mapping[str, Callable[[Seen], Range]] = {
  'min_max': min_max,
  'percentile': percentile,
  'mse': mse,
  'entropy': entropy,
}
"""Name -> function that makes a range of what was seen; see `calibrate`."""


def _within(seen: Seen, low: float, high: float) -> tuple[float, float]:
  return min(max(low, seen.low), 0.0), max(min(high, seen.high), 0.0)


def _search(seen: Seen, loss: Callable, joint: bool) -> Range:
  whole = min_max(seen)
  fractions = np.arange(1, _GRID + 1) / _GRID
  lows = fractions * whole.low if whole.low < 0 else np.zeros(1)
  highs = fractions * whole.high if whole.high > 0 else np.zeros(1)
  if joint:
    pairs = list(zip(*np.broadcast_arrays(lows, highs), strict=True))
  else:
    pairs = [(low, high) for low in lows for high in highs]
  best, least = whole, math.inf
  for low, high in pairs:
    candidate = Range(float(low), float(high))
    value = loss(seen, candidate)
    # The widest of equals: nothing is cut for nothing.
    if value <= least:
      best, least = candidate, value
  return best


def _integers(seen: Seen, chosen: Range) -> np.ndarray:
  return np.clip(np.rint(seen.values / chosen.scale) + chosen.zero, 0, STEPS)


def _squared_error(seen: Seen, chosen: Range) -> float:
  back = (_integers(seen, chosen) - chosen.zero) * chosen.scale
  return float(np.sum(seen.counts * np.square(seen.values - back)))


def _divergence(seen: Seen, chosen: Range) -> float:
  low = -chosen.zero * chosen.scale
  high = (STEPS - chosen.zero) * chosen.scale
  inside = (seen.values >= low) & (seen.values <= high)
  if not inside.any():
    return math.inf
  counts = seen.counts[inside]
  p = counts.copy()
  p[0] += seen.counts[seen.values < low].sum()
  p[-1] += seen.counts[seen.values > high].sum()
  # An integer tells nothing of which of its values it was.
  place = _integers(seen, chosen)[inside].astype(int)
  share = np.bincount(place, counts) / np.maximum(np.bincount(place), 1)
  q = share[place]
  p, q = p / p.sum(), q / q.sum()
  return float(np.sum(p * np.log(p / q)))
