"""The best scale: against every assignment there is, and what a search by halving would miss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fqjax.quantize import exact_scale, search_scale

MAGNITUDES = {
  'binary': (1,),
  'two bits': (1, 2),
  'three bits': (1, 2, 3, 4),
  'with zero': (0, 1, 2),
  'powers of two': (1, 2, 4, 8),
}


def brute(values, magnitudes):
  """Least error over all assignments of values to magnitudes; each has its best scale."""
  v = np.abs(np.asarray(values, np.float64))
  t = np.array(list(itertools.product(magnitudes, repeat=len(v))), np.float64)
  t = t[t.any(1)]
  return np.sum(v * v) - np.max((t @ v) ** 2 / np.sum(t * t, 1))


def error_of(values, scale, magnitudes):
  v, t = np.abs(np.asarray(values, np.float64)), np.asarray(magnitudes, np.float64)
  return np.sum(np.min((v[:, None] - scale * t) ** 2, 1))


@pytest.mark.parametrize('name', MAGNITUDES)
def test_exact_is_the_best_of_all_assignments(name):
  rng = np.random.default_rng(0)
  for n in (1, 2, 3, 4, 5, *[6] * 60):
    v = rng.normal(size=n) * rng.integers(1, 4, size=n)
    found = exact_scale(v, MAGNITUDES[name])
    assert found.error == pytest.approx(brute(v, MAGNITUDES[name]), abs=1e-12)
    assert error_of(v, found.scale, MAGNITUDES[name]) == pytest.approx(found.error, abs=1e-12)


def test_two_bits_by_hand():
  found = exact_scale([-0.9, -0.35, -0.2, 0.1, 0.4, 0.55, 1.3], (1, 2))
  assert found.scale == pytest.approx(6 / 13, abs=1e-12)
  assert found.error == pytest.approx(0.365769, abs=5e-7)


# bits -> (scale, squared error over the sum of squares) of a standard normal.
NORMAL = {1: (0.798, 0.3634), 2: (0.652, 0.158), 3: (0.460, 0.0543), 4: (0.294, 0.0161),
          5: (0.176, 0.0045)}  # fmt: skip


def normal(n=50_000):
  """A sample without chance: the quantiles."""
  return stats.norm.ppf((np.arange(n) + 0.5) / n)


@pytest.mark.parametrize('bits', NORMAL)
def test_normal_weights(bits):
  v = normal()
  found = exact_scale(v, range(1, 2 ** (bits - 1) + 1))
  scale, mse = NORMAL[bits]
  assert found.scale == pytest.approx(scale, abs=1e-3)
  assert found.error / np.sum(v * v) == pytest.approx(mse, abs=6e-4)


def test_normal_weights_ternary():
  v = normal()
  found = exact_scale(v, (0, 1))
  assert found.scale == pytest.approx(1.224, abs=1e-3)
  assert found.error / np.sum(v * v) == pytest.approx(0.1902, abs=2e-4)
  assert np.mean(np.abs(v) > found.scale / 2) == pytest.approx(0.5405, abs=1e-3)


def test_the_error_has_several_valleys():
  """Why neither search halves an interval."""
  rng = np.random.default_rng(0)
  several, missed = 0, 0
  for _ in range(60):
    v = np.abs(rng.normal(size=20))
    q = np.linspace(0.02, 1.2, 3000) * v.max()
    e = np.array([error_of(v, x, (1, 2, 3, 4)) for x in q])
    several += np.sum((e[1:-1] < e[:-2]) & (e[1:-1] < e[2:])) > 1
    low, high = q[0], q[-1]
    while high - low > 1e-6:
      thirds = low + (high - low) / 3, high - (high - low) / 3
      a, b = (error_of(v, x, (1, 2, 3, 4)) for x in thirds)
      low, high = (low, thirds[1]) if a < b else (thirds[0], high)
    missed += error_of(v, low, (1, 2, 3, 4)) > 1.0001 * exact_scale(v, (1, 2, 3, 4)).error
  assert several > 36 and missed > 0


@pytest.mark.parametrize('name', MAGNITUDES)
def test_search_comes_close_at_a_fixed_cost(name):
  rng = np.random.default_rng(1)
  v = np.concatenate([rng.normal(size=(4, 200)), rng.standard_t(2, size=(4, 200))])
  v = (v * np.logspace(-8, 8, 8)[:, None]).astype(np.float32)
  live = np.arange(200) % 4 != 1
  search = jax.jit(jax.vmap(lambda x: search_scale(x, live, MAGNITUDES[name])))
  poisoned = np.where(live, v, np.nan)  # what is masked is not looked at
  for row, scale in zip(v, search(jnp.asarray(poisoned)), strict=True):
    exact = exact_scale(row[live], MAGNITUDES[name])
    assert error_of(row[live], float(scale), MAGNITUDES[name]) <= 1.002 * exact.error


def test_search_of_nothing_is_zero():
  assert search_scale(jnp.zeros(4), None, (1, 2)) == 0
  assert search_scale(jnp.ones(4), jnp.zeros(4, bool), (1, 2)) == 0
  assert exact_scale(np.zeros(4), (1, 2)) == (0, 0)


@pytest.mark.parametrize(
  'values, magnitudes, message',
  [
    ([], (1,), 'needs values, and finite ones'),
    ([1, np.nan], (1,), 'finite'),
    ([1], (2, 1), 'must ascend'),
    ([1], (-1, 1), 'must ascend'),
    ([1], (), 'must ascend'),
    ([1], (0,), 'must ascend'),
  ],
)
def test_refusals(values, magnitudes, message):
  with pytest.raises(ValueError, match=message):
    exact_scale(values, magnitudes)
