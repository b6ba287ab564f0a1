"""K-means against an exact dynamic program, the best codebooks of a normal distribution, and bad data."""

import numpy as np
import pytest
from scipy import stats

from fqjax import quantize


def dynamic_program(values, count, zero):
  """Least mean squared error of `count` centers, one of them at 0: all ways to cut the sorted values."""
  x = np.sort(values)
  n = len(x)
  s, q = (np.concatenate([[0.0], np.cumsum(y)]) for y in (x, x * x))
  i, j = np.triu_indices(n + 1, 1)
  free, zeroed = np.full((n + 1, n + 1), np.inf), np.full((n + 1, n + 1), np.inf)
  zeroed[i, j] = q[j] - q[i]
  free[i, j] = np.maximum(zeroed[i, j] - (s[j] - s[i]) ** 2 / (j - i), 0)
  for cost in (free, zeroed):
    np.fill_diagonal(cost, 0)  # a center may have no members

  def add(best, cost):
    return np.min(best[:, None] + cost, 0)

  start = np.where(np.arange(n + 1) == 0, 0, np.inf)
  without, with_zero = start, np.full(n + 1, np.inf)
  for _ in range(count):
    with_zero = np.minimum(add(with_zero, free), add(without, zeroed))
    without = add(without, free)
  return (with_zero if zero else without)[-1] / n


SAMPLES = {
  'normal': lambda rng: rng.normal(size=240),
  'skewed': lambda rng: rng.gamma(0.7, size=240) - 0.3,
  'heavy tails': lambda rng: rng.standard_t(2.5, size=240),
  'two heaps': lambda rng: np.concatenate([rng.normal(-1, 0.1, 200), rng.normal(3, 0.5, 40)]),
  'far heaps': lambda rng: np.repeat([0, 100], 120) + rng.normal(0, 0.1, 240),
  'positive': lambda rng: rng.uniform(0.2, 1, 240),
  'negative': lambda rng: -rng.exponential(size=240),
  'ties': lambda rng: rng.integers(-9, 10, 240) / 7,
}


@pytest.mark.parametrize('zero', [False, True], ids=['free', 'zero'])
@pytest.mark.parametrize('name', SAMPLES)
def test_near_the_exact_optimum(name, zero):
  """Lloyd's iteration is a local search: never better than the optimum, and a little worse."""
  x = SAMPLES[name](np.random.default_rng(3))
  for count in (3, 4, 8, 16):
    found = quantize.kmeans(x, count, zero=zero)
    best = dynamic_program(x, count, zero)
    assert best * (1 - 1e-9) - 1e-15 <= found.error <= best * 1.45 + 1e-12
    # The error is that of the centers, every value with its nearest.
    near = np.abs(x[:, None] - found.centers).min(1)
    np.testing.assert_allclose(found.error, np.mean(near**2), rtol=1e-6, atol=1e-14)
    assert found.counts.sum() == len(x) and len(found.centers) == count
    assert (found.centers[0] == 0) == zero or not zero
    assert (np.diff(found.centers[int(zero) :]) >= 0).all()


# K, zero -> free centers (those asked for), error, share of zeros.
NORMAL = {
  (4, False): ([-1.5104, -0.4528, 0.4528, 1.5104], 0.11748, None),
  (8, False): (None, 0.034548, None),
  (16, False): (None, 0.009501, None),
  (3, True): ([0, -1.2240, 1.2240], 0.190174, None),
  (4, True): ([0, -1.2240, 0.7646, 1.7241], 0.135058, 0.3786),
  (8, True): (None, 0.035927, 0.198),
  (16, True): (None, 0.009602, 0.103),
}


@pytest.fixture(scope='module')
def normal():
  """A million equally likely values of N(0, 1), in no order."""
  x = stats.norm.ppf((np.arange(1_000_000) + 0.5) / 1e6)
  return np.random.default_rng(0).permutation(x)


@pytest.mark.parametrize(('count', 'zero'), NORMAL)
def test_best_codebooks_of_a_normal_distribution(normal, count, zero):
  centers, error, zeros = NORMAL[count, zero]
  found = quantize.kmeans(normal, count, zero=zero)
  np.testing.assert_allclose(found.error, error, rtol=2e-3)
  if centers is not None:
    # Or their mirror image, which is as good.
    best = min(
      (np.sort(np.multiply(sign, centers)) for sign in (1, -1)),
      key=lambda c: np.abs(c - np.sort(found.centers)).max(),
    )
    np.testing.assert_allclose(np.sort(found.centers), best, atol=2e-3)
  if zeros is not None:
    np.testing.assert_allclose(found.counts[0] / normal.size, zeros, atol=2e-3)


@pytest.mark.parametrize(('count', 'error'), [(4, 0.158), (8, 0.0402), (16, 0.0102)])
def test_pinning_afterwards_costs_error(normal, count, error):
  """The published start, here by nearest center; its members are those of before."""
  found = quantize.kmeans(normal, count, repin=False)
  middles = np.sort(found.centers)
  edges = (middles[1:] + middles[:-1]) / 2
  nearest = middles[np.searchsorted(edges, normal)]
  np.testing.assert_allclose(np.mean((normal - nearest) ** 2), error, rtol=0.02)
  free = quantize.kmeans(normal, count, zero=False)
  np.testing.assert_array_equal(np.sort(found.counts), np.sort(free.counts))
  assert quantize.kmeans(normal, count).error < found.error


@pytest.mark.parametrize('repin', [True, False])
def test_deviations_are_those_of_the_members(repin):
  x = np.random.default_rng(0).normal(size=500)
  found = quantize.kmeans(x, 5, repin=repin)
  # The published start keeps the members of free clusters when it moves a center to zero.
  centers = found.centers if repin else quantize.kmeans(x, 5, zero=False).centers
  order = np.argsort(np.abs(centers))
  centers = np.concatenate([centers[order[:1]], np.sort(centers[order[1:]])])
  member = np.abs(x[:, None] - centers).argmin(1)
  for k, (center, sigma) in enumerate(zip(found.centers, found.sigmas, strict=True)):
    own = x[member == k]
    assert len(own) == found.counts[k]
    expected = np.sqrt(np.sum((own - center) ** 2) / (len(own) - 1))
    np.testing.assert_allclose(sigma, expected, rtol=1e-9)


def test_same_numbers_same_result(normal):
  for count in (3, 17):
    a, b = quantize.kmeans(normal, count), quantize.kmeans(normal[::-1].reshape(10, -1), count)
    np.testing.assert_array_equal(a.centers, b.centers)


@pytest.mark.parametrize('count', [3, 4, 9, 256])
@pytest.mark.parametrize(
  'values', [[0.5], [0.0], [-1.0, -1.0, 2.0], [0.0, 3.0, 3.0], [1.0, 2.0, 4.0]], ids=str
)
def test_more_centers_than_distinct_values(values, count):
  """Every value is a center; those left over have no members and stand between."""
  found = quantize.kmeans(np.array(values), count)
  distinct = set(values) | {0.0}
  if len(distinct) > count:
    return
  assert found.error == 0 and len(found.centers) == count and found.centers[0] == 0
  assert distinct <= set(found.centers)
  np.testing.assert_array_equal(found.sigmas, 0)
  assert found.counts.sum() == len(values)
  for center, members in zip(found.centers, found.counts, strict=True):
    if members:
      assert members == values.count(center)
    else:
      assert min(distinct) <= center <= max(distinct)
  if count == 9 and values == [0.0, 3.0, 3.0]:
    assert np.diff(np.sort(found.centers)).max() <= 3 / 4


def test_empty_clusters_start_again():
  """Nine tenths in one place: most of the starting centers would have no members."""
  rng = np.random.default_rng(0)
  x = np.concatenate([np.full(9000, 0.25), rng.uniform(-1, 1, 1000)])
  for zero in (False, True):
    found = quantize.kmeans(x, 12, zero=zero)
    assert found.counts[int(zero) :].min() > 0
    # As good as 12 levels on the tenth that is spread out, if one stays at the heap.
    assert found.error < 2 * (2 / 10) ** 2 / 12 / 10


def test_a_constant_far_from_zero_is_exact():
  found = quantize.kmeans(np.full(1_000_000, 1234.567), 4)
  assert 1234.567 in found.centers and found.error < 1e-10 * 1234.567**2
  assert quantize.kmeans(np.full(1000, 0.1), 2, zero=False).error < 1e-13


@pytest.mark.parametrize(
  ('values', 'count', 'message'),
  [
    ([], 3, 'at least one'),
    ([1.0, np.nan], 3, 'finite'),
    ([1.0, np.inf], 3, 'finite'),
    ([-np.inf, 1.0], 3, 'finite'),
    ([1.0, 2.0], 1, 'one must be free'),
  ],
)
def test_refuses(values, count, message):
  with pytest.raises(ValueError, match=message):
    quantize.kmeans(np.array(values), count)
