"""The best scale of given multiples: least squares over weights, which has many local minima.

With the magnitudes t of the levels fixed (1, 2, .. h, say), every weight goes to the nearest `q t`. For
fixed assignments the best q is `<v, t> / <t, t>` and the error is `|v|^2 - <v, t>^2 / <t, t>`;
assignments change where `v / q` passes the middle of two neighbours. The error over q is not unimodal,
so a bisection finds any of the minima.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.sparsity._select import wide


class Scale(NamedTuple):
  """A scale and what it costs.

  Attributes:
    scale: the distance between 0 and magnitude 1.
    error: sum of squared distances to the levels.
  """

  scale: float
  error: float


def exact_scale(values, magnitudes: Sequence[float]) -> Scale:
  """The scale of least squared error among all, by a sweep over every change of assignment.

  Args:
    values: weights, any shape; signs do not matter. On the host.
    magnitudes: of the levels in units of the scale, >= 0, ascending, e.g. (1, 2, 3, 4); a leading 0
      lets values go to zero.

  Returns:
    `Scale`, in float64; both 0 where all values are 0. Takes O(n h log(n h)) time and O(n h) memory.

  Raises:
    ValueError: for no values, values that are not finite, or magnitudes out of order.

  Example:
    >>> found = exact_scale([-0.9, -0.35, -0.2, 0.1, 0.4, 0.55, 1.3], (1, 2))
    >>> print(round(found.scale, 6), round(found.error, 6))  # 6 / 13
    0.461538 0.365769

  Source: own; Ye et al. 2018 (arXiv 1811.01907) search the interval by bisection.
  """
  v = np.abs(np.asarray(values, np.float64)).ravel()
  t = _check(magnitudes)
  if not v.size or not np.isfinite(v).all():
    raise ValueError('exact_scale needs values, and finite ones.')
  # From q = infinity downwards: all values begin at the least magnitude and climb.
  at = v[:, None] / ((t[1:] + t[:-1]) / 2)
  order = np.argsort(-at, axis=None, kind='stable')
  climb = (v[:, None] * np.diff(t)).ravel()[order]
  square = np.broadcast_to(np.diff(t * t), at.shape).ravel()[order]
  dot = t[0] * v.sum() + np.concatenate([[0.0], np.cumsum(climb)])
  norm = t[0] ** 2 * v.size + np.concatenate([[0.0], np.cumsum(square)])
  gain = np.where(norm > 0, dot**2 / np.where(norm > 0, norm, 1), 0)
  best = int(np.argmax(gain))
  if not gain[best]:
    return Scale(0.0, 0.0)
  scale = float(dot[best] / norm[best])
  # Anew: of the difference of two large sums little would be left.
  return Scale(scale, float(np.sum((v - scale * nearest(v / scale, t)) ** 2)))


def nearest(values: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
  """The magnitude nearest to each value."""
  between = (magnitudes[1:] + magnitudes[:-1]) / 2
  return magnitudes[np.searchsorted(between, values)]


@functools.partial(jax.jit, static_argnums=2)
def search_scale(values: jax.Array, live: jax.Array | None, magnitudes: tuple[float, ...]):
  """A scale about as good as `exact_scale`, at a fixed cost and under jit and vmap.

  64 scales, spread geometrically over all that can be best, improve 20 times each by assigning and
  refitting; the best one wins. On sorted values with prefix sums a step costs a search per level, not
  a pass over the values. Beyond 16 magnitudes, where minima lie close together, 16 scales and 6 steps.

  Args:
    values: float [n]; signs do not matter.
    live: bool [n], None where all count.
    magnitudes: as in `exact_scale`, a tuple: static.

  Returns:
    float scalar, float32 or wider; 0 where nothing lives or all is 0.

  Raises:
    ValueError: for magnitudes out of order.

  Example:
    >>> q = search_scale(jnp.array([-0.9, -0.35, -0.2, 0.1, 0.4, 0.55, 1.3]), None, (1, 2))
    >>> print(round(float(q), 5))
    0.46154
  """
  t = jnp.asarray(_check(magnitudes), wide(values.dtype))
  points, rounds = (64, 20) if len(magnitudes) <= 16 else (16, 6)
  v = jnp.abs(lax.stop_gradient(values)).astype(t.dtype)
  if live is not None:
    v = jnp.where(live, v, jnp.inf)
  count = jnp.sum(jnp.isfinite(v))
  top = jnp.max(jnp.where(jnp.isfinite(v), v, 0))
  safe = jnp.where(top > 0, top, 1)
  v = jnp.sort(v) / safe
  sums = jnp.concatenate([jnp.zeros(1, v.dtype), jnp.cumsum(jnp.where(jnp.isfinite(v), v, 0))])
  between = (t[1:] + t[:-1]) / 2
  edge = jnp.zeros((points, 1), jnp.int32)

  def products(q):
    """<v, t> and <t, t> for each of the scales q [points]."""
    at = jnp.searchsorted(v, q[:, None] * between[None]).astype(jnp.int32)
    at = jnp.concatenate([edge, at, edge + count.astype(jnp.int32)], 1)
    counts, parts = jnp.diff(at).astype(v.dtype), jnp.diff(sums[at])
    return jnp.sum(parts * t[None], 1), jnp.sum(counts * (t * t)[None], 1)

  def refit(_, q):
    dot, norm = products(q)
    return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1), q)

  # No best scale is above the largest value or below the mean over the largest magnitude and 1.
  least = sums[-1] / jnp.maximum(count, 1).astype(v.dtype) / (t[-1] + 1)
  least = jnp.where(least > 0, least, 1)
  exponents = jnp.linspace(0, 1, points, dtype=v.dtype)
  q = lax.fori_loop(0, rounds, refit, least ** (1 - exponents))
  dot, norm = products(q)
  best = q[jnp.argmax(2 * q * dot - q * q * norm)]
  return jnp.where(top > 0, best * top, 0)


def _check(magnitudes: Sequence[float]) -> np.ndarray:
  t = np.asarray(magnitudes, np.float64)
  if t.ndim != 1 or not t.size or t[0] < 0 or t[-1] <= 0 or np.any(np.diff(t) <= 0):
    raise ValueError(f'magnitudes {magnitudes!r} must ascend from 0 or above.')
  return t
