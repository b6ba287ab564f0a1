"""Ranges against brute force over the values themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import quantize
from fqjax.quantize import METHODS, Range, Seen
from fqjax.quantize._ranges import percentile


def seen(x):
  values, counts = np.unique(np.asarray(x, np.float64), return_counts=True)
  return Seen(values[0], values[-1], values, counts.astype(np.float64))


DATA = {
  'normal': lambda rng: rng.normal(size=2000),
  'relu': lambda rng: np.maximum(rng.normal(size=2000), 0),
  'outlier': lambda rng: np.append(np.repeat(rng.uniform(-1, 1, 500), 400), [9.0, -5.0]),
  'below zero': lambda rng: -rng.exponential(size=500),
}


@pytest.mark.parametrize('name', DATA)
def test_squared_error_is_the_least_of_the_grid(name):
  x = DATA[name](np.random.default_rng(0))
  one = seen(x)
  chosen = METHODS['mse'](one)
  x, weights = one.values, one.counts
  lows = [k / 64 * min(x.min(), 0) for k in range(1, 65)]
  highs = [k / 64 * max(x.max(), 0) for k in range(1, 65)]

  def error(low, high):
    scale = np.float32(np.float32(np.float32(high) - np.float32(low)) / np.float32(255))
    if scale == 0:
      return np.inf
    zero = min(max(round(float(-np.float32(low) / scale)), 0), 255)
    q = np.clip(np.rint(x / float(scale)) + zero, 0, 255)
    return (weights * np.square(x - (q - zero) * float(scale))).sum()

  least = min(error(a, b) for a, b in itertools.product(sorted(set(lows)), sorted(set(highs))))
  assert error(*chosen) == pytest.approx(least, rel=1e-9)
  if name == 'outlier':
    assert chosen.high < 8.9 and chosen.low > -5


def test_percentiles_leave_the_stated_share():
  x = np.random.default_rng(1).normal(size=20001)
  chosen = percentile(seen(x), 99)
  low, high = np.quantile(x, [0.005, 0.995], method='inverted_cdf')
  np.testing.assert_allclose([chosen.low, chosen.high], [low, high])
  assert percentile(seen(x), 100) == Range(x.min(), x.max())
  # Zero stays inside, whatever the values.
  assert percentile(seen([3.0, 4.0, 5.0]), 50).low == 0.0
  with pytest.raises(ValueError, match=r'\(0, 100\], got 0'):
    percentile(seen(x), 0)


def test_entropy_is_the_least_divergence_and_cuts_far_tails():
  x = np.append(np.random.default_rng(2).normal(size=200_000), [60.0, -60.0])
  one = seen(x)
  chosen = METHODS['entropy'](one)
  assert 3 < chosen.high < 12 and chosen.low == pytest.approx(-chosen.high, rel=1e-3)
  edges = np.linspace(-60, 60, 2049)
  counts, _ = np.histogram(x, edges)
  centres = (edges[:-1] + edges[1:]) / 2
  nearest = x[np.argmin(np.abs(x))]

  def divergence(k):
    low, high = -60 * k / 64, 60 * k / 64
    candidate = Range(low, high)
    p, groups = {}, {}
    for c, n in zip(centres, counts, strict=True):
      if n == 0 or abs(c - nearest) < 60 / 2048:  # the bin of zero
        continue
      level = round(c / candidate.scale) + candidate.zero
      first, last = -candidate.zero * candidate.scale, (255 - candidate.zero) * candidate.scale
      where = 'low' if c < first else 'high' if c > last else c
      p[where] = p.get(where, 0) + n
      if where == c:
        groups.setdefault(level, []).append((c, n))
    inside = sorted(c for group in groups.values() for c, _ in group)
    p[inside[0]] += p.pop('low', 0)
    p[inside[-1]] += p.pop('high', 0)
    q = {c: sum(n for _, n in group) / len(group) for group in groups.values() for c, _ in group}
    total, mass = sum(p.values()), sum(q.values())
    return sum(p[c] / total * np.log(p[c] / total / (q[c] / mass)) for c in q)

  scores = [divergence(k) for k in range(1, 65)]
  best = max(k for k in range(64) if scores[k] == min(scores)) + 1
  assert chosen.high == pytest.approx(60 * best / 64, rel=1e-6)


def test_entropy_knows_the_zeros_of_a_relu():
  x = np.maximum(np.random.default_rng(4).normal(size=400_000), 0)
  for one in (seen(x), quantize.seen(state_of(*x.reshape(100, -1)))):
    chosen = METHODS['entropy'](one)
    assert chosen.low == 0 and 0.6 * x.max() < chosen.high <= x.max()


def test_every_method_knows_a_tensor_of_zeros():
  zeros = Seen(0.0, 0.0, np.array([1e-9]), np.array([5.0]))
  for method in METHODS.values():
    assert method(zeros) == Range(0.0, 0.0)


# Observers.


def state_of(*batches):
  state = quantize.observe_nothing()
  step = jax.jit(quantize.observe)
  for batch in batches:
    state = step(state, jnp.asarray(batch, jnp.float32))
  return state


def test_batches_in_any_order_give_one_state():
  rng = np.random.default_rng(3)
  parts = [rng.normal(size=40) * scale for scale in (0.001, 7, 0.3, 100, 1)]
  first, last = state_of(*parts), state_of(*parts[::-1])
  for a, b in zip(first, last, strict=True):
    np.testing.assert_array_equal(a, b)
  found = quantize.seen(first)
  x = np.concatenate(parts).astype(np.float32)
  assert (found.low, found.high) == (x.min(), x.max()) and found.counts.sum() == len(x)
  # The histogram is that of NumPy, over the smallest power of two.
  counts, edges = np.histogram(x, 8192, (-512, 512))
  full = np.zeros(8192)
  full[np.searchsorted(edges, found.values) - 1] = found.counts
  exponent = int(first.exponent)
  assert 2.0 ** (exponent - 1) <= np.abs(x).max() < 2.0**exponent
  counts, edges = np.histogram(x, 8192, (-(2.0**exponent), 2.0**exponent))
  np.testing.assert_allclose(found.values, ((edges[:-1] + edges[1:]) / 2)[counts > 0])
  np.testing.assert_array_equal(found.counts, counts[counts > 0])


def test_large_tensors_are_sampled_and_their_ends_are_not():
  x = np.zeros((5, 200, 200, 64), np.float32)
  x[..., :] = np.arange(64)
  x[4, 199, 199, 63] = 999
  found = quantize.seen(state_of(x))
  assert found.high == 999 and 30_000 < found.counts.sum() <= 65_536
  # Every channel is met, and as often.
  assert len(found.values[found.values < 64]) == 64
  assert found.counts[found.values < 64].max() < 1.1 * found.counts[found.values < 64].min()


def test_zeros_before_small_values_cost_nothing():
  small = np.float32([1e-6, 3e-6])
  for a, b in zip(state_of(np.zeros(4), small), state_of(small, np.zeros(4)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_intermediates_of_any_function():
  from fqjax.tracing import to_graph

  traced = to_graph(lambda p, x: jnp.tanh(x * p['a']) + 1, {'a': jnp.float32(2)}, jnp.ones(3))
  found = quantize.intermediates(
    traced.graph, ['%0', '%1'], [jnp.arange(3.0)], {'a': jnp.float32(2)}
  )
  np.testing.assert_allclose(found['%0'], [0, 2, 4])
  np.testing.assert_allclose(found['%1'], np.tanh([0, 2, 4]), rtol=1e-6)
  with pytest.raises(ValueError, match="no tensor 'nowhere'"):
    quantize.intermediates(traced.graph, ['nowhere'], [jnp.ones(3)], {'a': jnp.float32(2)})
