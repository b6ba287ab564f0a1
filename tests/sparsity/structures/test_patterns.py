"""Patterns and connectivity against every assignment there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import rules
from fqjax.sparsity import (
  Patterns,
  all_patterns,
  make_plan,
  pattern_set,
  pcnn_codebook,
  to_kernels,
)
from fqjax.sparsity.structures.patterns import best_patterns, pattern_taps
from tests.sparsity.structures import oracle

ELOG = pattern_set('elog4')
T_UP, T_LEFT, T_DOWN, T_RIGHT = 58, 154, 184, 178


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _bits(masks):
  """Masks [..., M] as integers."""
  return (np.asarray(masks) * 2 ** np.arange(masks.shape[-1])).sum(-1)


# Four kernels of which connectivity by full norm keeps the wrong two.
A = [0.1, 0.9, 0.2, 0.8, 1, 0.7, 0, 0.1, 0.3]
B = [0.8] * 9
C = [0, 1, 0, 1, 1, 0, 0, 1, 0]
D = [0.3, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.3]
FOUR = np.array([A, B, C, D], np.float32).reshape(2, 2, 9)


def test_patterns_and_connectivity_are_projected_jointly():
  table = pattern_taps(ELOG, 9)
  codes, energy = best_patterns(jnp.asarray(FOUR) ** 2, table)
  np.testing.assert_allclose(energy.ravel(), [2.94, 2.56, 4.00, 0.07], rtol=1e-5)
  assert [ELOG[code] for code in np.asarray(codes).ravel()[[0, 2]]] == [T_UP, T_LEFT]
  full = (FOUR**2).sum(-1).ravel()
  np.testing.assert_allclose(full, [3.09, 5.76, 4.00, 0.34], rtol=1e-5)

  structure = Patterns(ELOG, keep=0.5)
  z, mask = oracle.project(structure, jnp.asarray(FOUR), 'OIM')
  np.testing.assert_array_equal(mask.any(-1).ravel(), [True, False, True, False])
  assert float(jnp.square(z).sum()) == pytest.approx(6.94)
  assert float(jnp.square(z - FOUR).sum()) == pytest.approx(6.25)
  # Norms first, the pattern of what is left second.
  kept = (full >= np.sort(full)[-2]).reshape(2, 2, 1)
  wrong, _ = oracle.project(Patterns(ELOG), jnp.asarray(FOUR * kept), 'OIM')
  assert float(jnp.square(wrong - FOUR).sum()) == pytest.approx(6.63)


CASES = [
  (Patterns(ELOG), 6),
  (Patterns(ELOG, keep=0.5), 3),
  (Patterns(pattern_set('centre56'), keep=1 / 3), 2),
  (Patterns((1, 2, 511), keep=2 / 3), 4),
  (Patterns(ELOG, keep=0.5, min_per_output=1), 3),
  (Patterns(ELOG, keep=0.5, min_per_input=1), 3),
]


@pytest.mark.parametrize(('structure', 'count'), CASES, ids=str)
def test_nearest_of_all_assignments(structure, count):
  for seed in range(20):
    w = _normal(3, 2, 9, seed=seed) * np.exp(_normal(3, 1, 1, seed=seed))
    z, mask = oracle.project(structure, jnp.asarray(w), 'OIM')
    assert mask.any(-1).sum() == count
    assert set(_bits(mask)[mask.any(-1)]) <= set(structure.masks)
    best = oracle.patterns(
      w, structure.masks, count, structure.min_per_output, structure.min_per_input
    )
    assert float(jnp.square(z).sum()) == pytest.approx(best, rel=1e-5)


def test_both_minima_hold_and_cost_little():
  structure = Patterns(ELOG, keep=0.6, min_per_output=1, min_per_input=1)
  reached = []
  for seed in range(20):
    w = _normal(4, 3, 9, seed=seed) * np.exp(2 * _normal(4, 1, 1, seed=seed))
    z, mask = oracle.project(structure, jnp.asarray(w), 'OIM')
    live = np.asarray(mask.any(-1))
    assert live.sum() == 7 and live.sum(1).min() >= 1 and live.sum(0).min() >= 1
    reached.append(float(jnp.square(z).sum()) / oracle.patterns(w, ELOG, 7, 1, 1))
  assert max(reached) <= 1 + 1e-5 and np.mean(reached) > 0.99


def test_groups_keep_the_same_number():
  w = _normal(8, 6, 9) * np.repeat([1, 10], 4)[:, None, None].astype(np.float32)
  mask = oracle.project(Patterns(ELOG, keep=0.25, groups=2), jnp.asarray(w), 'OIM')[1]
  np.testing.assert_array_equal(mask.any(-1).reshape(2, -1).sum(1), [6, 6])
  half = Patterns(ELOG, keep=0.25)
  for g in range(2):
    part = slice(4 * g, 4 * g + 4)
    np.testing.assert_array_equal(mask[part], oracle.project(half, jnp.asarray(w[part]), 'OIM')[1])


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5])
def test_all_patterns_of_n_taps_are_the_n_largest(n):
  w = np.round(_normal(30, 5, 9) * 2) / 2  # many ties
  structure = Patterns(all_patterns(n))
  z, mask = oracle.project(structure, jnp.asarray(w), 'OIM')
  np.testing.assert_array_equal(mask.sum(-1), np.full((30, 5), n))
  largest = np.sort(w**2, axis=-1)[..., -n:].sum(-1)
  np.testing.assert_array_equal(jnp.square(z).sum(-1), largest)
  # Of patterns with the same energy the lowest code.
  energy = (w**2) @ pattern_taps(structure.masks, 9).T.astype(np.float32)
  codes, live = structure.assign(jnp.asarray(w), 'OIM')
  np.testing.assert_array_equal(codes, energy.argmax(-1))
  assert live.all() and structure.kept(w.shape, 'OIM') == 150 * n


@pytest.mark.parametrize('v', [1, 15, 16, 17, 32, 33, 126])
def test_a_large_codebook_in_chunks_is_one_matmul(v):
  w = np.round(_normal(40, 3, 9) * 2)
  table = pattern_taps(all_patterns(4)[:v], 9)
  codes, best = jax.jit(functools.partial(best_patterns, table=table))(jnp.asarray(w) ** 2)
  energy = (w**2) @ table.T.astype(np.float32)
  np.testing.assert_array_equal(codes, energy.argmax(-1))
  np.testing.assert_array_equal(best, energy.max(-1))


def test_after_the_cut_every_kernel_is_on_its_table():
  params = {'a': jnp.asarray(_normal(3, 3, 5, 8)), 'b': jnp.asarray(_normal(3, 3, 8, 6, seed=1))}
  taps = {'a': 4, 'b': 2}
  plan = make_plan(
    params,
    [(k, lambda w, layout, n=n: Patterns(pcnn_codebook(w, layout, n, 8))) for k, n in taps.items()],
  )
  pruned, masks = rules.finalize(plan, params)
  for entry in plan.pruned:
    n, z = taps[entry.path], to_kernels(np.asarray(pruned[entry.path]), 'HWIO')
    mask = to_kernels(np.asarray(masks[entry.path]), 'HWIO')
    assert ((z != 0).sum(-1) <= n).all() and (mask.sum(-1) == n).all()
    assert set(_bits(mask).ravel().tolist()) <= set(entry.structure.masks)
    encoded = entry.structure.encode(np.asarray(pruned[entry.path]), 'HWIO')
    assert encoded.values.size == z.shape[0] * z.shape[1] * n


def test_arithmetic_of_the_published_accelerator():
  # 64 elements of 4 multipliers at 300 MHz and 48.7 mW; one of nine taps is nine times less work.
  operations, watts, shape = 2 * 64 * 4 * 300e6, 48.7e-3, (3, 3, 64, 64)
  speedup = np.prod(shape) / Patterns(all_patterns(1)).kept(shape, 'HWIO')
  assert operations == 153.6e9 and speedup == 9
  assert operations / watts == pytest.approx(3.154e12, rel=1e-4)
  assert speedup * operations / watts == pytest.approx(28.39e12, rel=2e-4)


def test_keeping_every_tap_changes_nothing():
  w = jnp.asarray(_normal(3, 3, 4, 5))
  np.testing.assert_array_equal(oracle.project(Patterns((511,)), w, 'HWIO')[0], w)


def test_an_empty_kernel_takes_the_first_pattern():
  w = jnp.asarray(_normal(2, 2, 9)).at[1, 0].set(0)
  mask = oracle.project(Patterns(ELOG), w, 'OIM')[1]
  assert _bits(mask)[1, 0] == ELOG[0]


def test_other_kernel_sizes():
  w = jnp.asarray(_normal(5, 5, 40, 50))
  structure = Patterns(all_patterns(4, 25), size=25)  # 12650 patterns
  z, mask = oracle.project(structure, w, 'HWIO')
  np.testing.assert_array_equal(mask.sum((0, 1)), np.full((40, 50), 4))
  top = np.sort(to_kernels(np.asarray(w), 'HWIO') ** 2, -1)[..., -4:].sum()
  assert float(jnp.square(z).sum()) == pytest.approx(top, rel=1e-5)
  assert top / np.square(w).sum() == pytest.approx(0.554, abs=0.01)
  depthwise = Patterns(ELOG).project(jnp.asarray(_normal(3, 3, 1, 6)), 'HWIO')[1]
  np.testing.assert_array_equal(depthwise.sum((0, 1)), np.full((1, 6), 4))


def test_kept_counts():
  # 4 of 9 taps and 1 of 3.6 kernels: 8.1 times fewer weights.
  shape = (3, 3, 256, 256)
  assert np.prod(shape) / Patterns(ELOG, keep=1 / 3.6).kept(shape, 'HWIO') == pytest.approx(
    8.1, abs=1e-3
  )
  assert Patterns((1, 511)).kept((3, 3, 2, 2), 'HWIO') == 36  # the most it can be


def test_a_pruned_kernel_convolves_as_its_taps_do():
  kernel = jnp.array([[9.0, 1.0, 9.0], [1.0, 2.0, 1.0], [9.0, 0.0, 9.0]])
  saliency = jnp.asarray(pattern_taps((T_UP,), 9).reshape(3, 3), jnp.float32)
  z, _ = Patterns(ELOG).project(
    kernel[:, :, None, None], 'HWIO', saliency=saliency[:, :, None, None]
  )
  image = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
  out = jax.lax.conv_general_dilated(
    image, z, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  expected = [[4, 8, 12, 11], [17, 26, 31, 27], [33, 46, 51, 43], [49, 66, 71, 59]]
  np.testing.assert_array_equal(out[0, ..., 0], expected)


@pytest.mark.full
def test_25_million_weights_and_a_large_codebook():
  structure = Patterns(pattern_set('any4'), keep=0.25)
  shape = (3, 3, 1664, 1664)
  w = jax.random.normal(jax.random.key(0), shape)
  compiled = oracle.project.lower(structure, w, 'HWIO').compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * w.nbytes
  _, mask = compiled(w)
  assert mask.sum() == structure.kept(shape, 'HWIO')
