"""Single weights against every support there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import NM, Unstructured, to_kernels
from tests.sparsity.structures import oracle


def _normal(*shape):
  return np.random.default_rng(0).standard_normal(shape)


def test_the_worked_vector():
  v = jnp.array([[0.3, -1.2, 0.05, 0.8, -0.4, 0.0]])
  z, mask = oracle.project(Unstructured(count=2), v, 'OI')
  np.testing.assert_array_equal(z, np.float32([[0, -1.2, 0, 0.8, 0, 0]]))
  assert float(jnp.square(v - z).sum()) == pytest.approx(0.2525, abs=1e-6)
  np.testing.assert_array_equal(mask[0], [False, True, False, True, False, False])


def test_unstructured_is_nearest_of_all_supports(x64):
  for n in (1, 3, 7):
    w = _normal(1, n)
    for count in range(1, n + 1):
      z, _ = oracle.project(Unstructured(count=count), jnp.asarray(w), 'OI')
      supports = oracle.of_groups(np.arange(n)[None], count)
      best = (w**2).sum() - oracle.best_energy(w, supports)
      assert float(((w - np.asarray(z)) ** 2).sum()) == pytest.approx(best, abs=1e-12)


def test_tiny_weights_do_not_tie():
  # Their squares are zero in float32.
  w = jnp.array([[1e-30, 3e-30, 2e-30]])
  np.testing.assert_array_equal(
    oracle.project(Unstructured(count=1), w, 'OI')[1], [[False, True, False]]
  )
  np.testing.assert_array_equal(oracle.project(NM(1, 3), w, 'OI')[1], [[False, True, False]])


def test_frozen_zeros_rank_behind_living_ones():
  frozen = jnp.array([[True, False, False]])
  z, mask = Unstructured(count=2).project(jnp.zeros((1, 3)), 'OI', frozen=frozen)
  np.testing.assert_array_equal(mask, [[False, True, True]])
  assert not z.any()


def test_a_negative_saliency_ranks_last():
  saliency = jnp.array([[-3.0, -1.0, 0.0, -2.0]])
  mask = Unstructured(count=2).project(jnp.ones((1, 4)), 'OI', saliency=saliency)[1]
  np.testing.assert_array_equal(mask, [[False, True, True, False]])


def test_ties_are_lowest_in_the_canonical_view():
  w = jnp.ones((2, 2, 3, 4))
  mask = oracle.project(Unstructured(count=17), w, 'HWIO')[1]
  np.testing.assert_array_equal(to_kernels(mask, 'HWIO').ravel(), np.arange(48) < 17)


@pytest.mark.parametrize(('n', 'm', 'axis'), [(1, 2, 'I'), (2, 4, 'I'), (3, 6, 'O'), (2, 3, 'O')])
def test_nm_is_nearest_in_every_group(n, m, axis):
  w = np.round(_normal(3, 2, 12, 6) * 2) / 2  # HWIO
  _, mask = oracle.project(NM(n, m, axis), jnp.asarray(w, jnp.float32), 'HWIO')
  kernels, kept = to_kernels(w, 'HWIO'), to_kernels(np.asarray(mask), 'HWIO')
  lines = np.moveaxis(kernels, 'OI'.index(axis), -1).reshape(-1, m)
  kept = np.moveaxis(kept, 'OI'.index(axis), -1).reshape(-1, m)
  for line, group in zip(lines, kept, strict=True):
    np.testing.assert_array_equal(group, oracle.chosen(line**2, n))
    best = max(sum(line[list(c)] ** 2) for c in itertools.combinations(range(m), n))
    assert (line[group] ** 2).sum() == best


def test_nm_groups_are_neighbours_of_one_tap():
  w = jnp.zeros((2, 1, 4, 1)).at[0].set(jnp.array([[[1.0], [2.0], [3.0], [4.0]]]))
  mask = oracle.project(NM(2, 4), w, 'HWIO')[1]
  np.testing.assert_array_equal(mask[0, 0, :, 0], [False, False, True, True])
  np.testing.assert_array_equal(mask[1, 0, :, 0], [True, True, False, False])  # all zero


def test_counts():
  assert Unstructured(keep=0.1).kept((3, 3, 16, 32), 'HWIO') == 461
  assert Unstructured(keep=0.1, rounding='up').kept((3, 3, 16, 32), 'HWIO') == 461
  assert Unstructured(keep=1e-9).kept((4, 4), 'IO') == 1
  assert NM(2, 4).kept((3, 3, 16, 32), 'HWIO') == 3 * 3 * 16 * 32 // 2
