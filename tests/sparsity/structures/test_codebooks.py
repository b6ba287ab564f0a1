"""Pattern sets, distillation and library reduction, against enumeration and published numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import (
  Patterns,
  all_patterns,
  greedy_codebook,
  pattern_set,
  pattern_usage,
  pcnn_codebook,
  shrink_library,
  top_patterns,
)
from fqjax.sparsity.structures import codebooks


def _taps(mask):
  return [t for t in range(9) if mask >> t & 1]


def _kept(w, masks, size=9):
  """Share of the energy of kernels [G, M] kept by a codebook, in NumPy float64."""
  energy = np.asarray(w, np.float64) ** 2
  taps = np.array([[mask >> t & 1 for t in range(size)] for mask in masks])
  return (energy @ taps.T).max(1).sum() / energy.sum()


@pytest.fixture(scope='module')
def iid():
  """20000 kernels of independent weights, [1, G, 9] OIM."""
  return np.random.default_rng(0).standard_normal((1, 20000, 9)).astype(np.float32)


SCALES = np.float32([0.6, 0.8, 0.6, 0.8, 1.2, 0.8, 0.6, 0.8, 0.6])


def test_all_patterns():
  counts = [len(all_patterns(n)) for n in range(1, 10)]
  assert counts == [math.comb(9, n) for n in range(1, 10)] and sum(counts) == 511
  assert [math.ceil(math.log2(c)) for c in counts[:5]] == [4, 6, 7, 7, 7]
  for n in (1, 4):
    masks = all_patterns(n)
    assert list(masks) == [m for m in range(512) if m.bit_count() == n]
  assert len(all_patterns(4, 25)) == 12650


def test_designed_sets():
  up, left, down, right = (_taps(mask) for mask in pattern_set('elog4'))
  assert (up, left, down, right) == ([1, 3, 4, 5], [1, 3, 4, 7], [3, 4, 5, 7], [1, 4, 5, 7])
  assert pattern_set('elog4') == (58, 154, 184, 178)
  assert pattern_set('corner4') == (27, 54, 216, 432)
  assert pattern_set('elog4+corner4') == pattern_set('elog4') + pattern_set('corner4')
  centre = pattern_set('centre56')
  assert len(centre) == 56 and all(m.bit_count() == 4 and m & 16 for m in centre)
  assert len(pattern_set('any4')) == 126
  mean = np.mean([[m >> t & 1 for t in range(9)] for m in pattern_set('elog4')], 0)
  np.testing.assert_array_equal(mean.reshape(3, 3), [[0, 0.75, 0], [0.75, 1, 0.75], [0, 0.75, 0]])
  # What trained VGG-16 kernels choose: four corners and four Ls along an edge, without the centre.
  public = {432, 27, 216, 54, 456, 15, 39, 480}
  assert set(pattern_set('corner4') + pattern_set('edge4')) == public
  for name in ('elog4', 'corner4', 'edge4', 'elog4+corner4'):
    assert all(m.bit_count() == 4 for m in pattern_set(name))


TOY = np.float32(
  [
    [0.30, 0.25, 0.01, 0.02],
    [0.28, 0.27, 0.02, 0.01],
    [0.31, 0.22, 0.03, 0],
    [2, 0.1, 0, 1.8],
    [1.9, 0, 0.1, 2.1],
    [0.1, 0.2, 1.5, 1.4],
    [0, 0.1, 1.6, 1.2],
  ]
)[None]


def test_votes_ignore_energy_and_greedy_does_not():
  # Taps (0 1), (0 2), (0 3), (1 2), (1 3), (2 3) are 3, 5, 9, 6, 10, 12.
  w = jnp.asarray(TOY)
  assert top_patterns(w, 'OIM', 2) == {3: 3, 9: 2, 12: 2}
  votes = pcnn_codebook(w, 'OIM', 2, 2, method='votes')
  greedy = pcnn_codebook(w, 'OIM', 2, 2)
  assert votes == (3, 9) and greedy == (9, 12)
  assert _kept(TOY[0], votes, 4) == pytest.approx(0.7966, abs=5e-5)
  assert _kept(TOY[0], greedy, 4) == pytest.approx(0.9890, abs=5e-5)
  pairs = itertools.combinations(all_patterns(2, 4), 2)
  assert max(_kept(TOY[0], pair, 4) for pair in pairs) == pytest.approx(0.9890, abs=5e-5)


def _greedy(w, masks, v):
  energy = np.asarray(w, np.float64) ** 2
  scores = energy @ np.array([[m >> t & 1 for t in range(9)] for m in masks]).T
  best, chosen = np.zeros(len(w)), []
  for _ in range(v):
    j = int(np.maximum(scores, best[:, None]).sum(0).argmax())
    chosen.append(masks[j])
    best = np.maximum(best, scores[:, j])
  return tuple(sorted(chosen))


@pytest.mark.parametrize(('n', 'v'), [(4, 8), (2, 5), (1, 4)])
def test_greedy_is_the_textbook_rule(n, v, monkeypatch):
  w = np.random.default_rng(0).standard_normal((1, 1000, 9)).astype(np.float32)
  monkeypatch.setattr(codebooks, '_KERNELS', 300)  # several chunks, the last one padded
  assert pcnn_codebook(jnp.asarray(w), 'OIM', n, v) == _greedy(w[0], all_patterns(n), v)


# n: kept energy of all patterns, then of V patterns by (votes, greedy).
DISTILLED = {
  4: (0.8660, {4: (0.689, 0.693), 8: (0.738, 0.753), 16: (0.785, 0.798), 32: (0.817, 0.826)}),
  2: (0.6287, {4: (0.418, 0.464), 8: (0.516, 0.522), 16: (0.567, 0.570), 32: (0.619, 0.621)}),
  1: (0.4039, {4: (0.276, 0.277), 8: (0.384, 0.385)}),
}


@pytest.mark.parametrize('n', DISTILLED)
def test_distillation_keeps_the_energy_it_should(iid, n):
  full, table = DISTILLED[n]
  w = jnp.asarray(iid)
  assert _kept(iid[0], all_patterns(n)) == pytest.approx(full, abs=5e-4)
  for v, expected in table.items():
    for method, energy in zip(('votes', 'greedy'), expected, strict=True):
      masks = pcnn_codebook(w, 'OIM', n, v, method)
      assert len(masks) == v and all(m.bit_count() == n for m in masks)
      assert _kept(iid[0], masks) == pytest.approx(energy, abs=0.015), (v, method)


def test_kernels_with_strong_centres(iid):
  w = iid * SCALES
  assert _kept(w[0], all_patterns(4)) == pytest.approx(0.8834, abs=2e-3)
  for v, energy in ((8, 0.799), (16, 0.831)):
    assert _kept(w[0], pcnn_codebook(jnp.asarray(w), 'OIM', 4, v)) == pytest.approx(
      energy, abs=5e-3
    )


def _energy(w, masks):
  z = jax.jit(lambda w: Patterns(masks).project(w, 'OIM')[0])(jnp.asarray(w))
  return float(jnp.square(z).sum() / np.square(w).sum())


def test_designed_sets_keep_the_energy_they_should(iid):
  both = pattern_set('elog4') + pattern_set('corner4')
  public = pattern_set('corner4') + pattern_set('edge4')
  expected = {'any4': 0.8660, 'centre56': 0.8285, 'elog4': 0.5422, 'corner4': 0.6767}
  for name, energy in expected.items():
    assert _energy(iid, pattern_set(name)) == pytest.approx(energy, abs=5e-3), name
  assert _energy(iid, both) == pytest.approx(0.6966, abs=5e-3)
  assert _energy(iid, public) == pytest.approx(0.7281, abs=5e-3)
  centred = iid * SCALES
  scaled = {'elog4': 0.719, 'corner4': 0.756, 'elog4+corner4': 0.789, 'centre56': 0.865}
  for name, energy in scaled.items():
    assert _energy(centred, pattern_set(name)) == pytest.approx(energy, abs=5e-3), name


def test_libraries_of_centred_patterns(iid):
  w, centre = jnp.asarray(iid), pattern_set('centre56')
  counts, _ = pattern_usage(w, 'OIM', centre)
  table = ((4, 0.678, 0.642), (6, 0.716, 0.697), (8, 0.740, 0.721), (12, 0.766, 0.741))
  for v, greedy, votes in table:
    assert _kept(iid[0], greedy_codebook(w, 'OIM', centre, v)) == pytest.approx(greedy, abs=0.005)
    assert _kept(iid[0], shrink_library(centre, counts, v)) == pytest.approx(votes, abs=0.015)


def test_best_of_n_of_any_size():
  rng = np.random.default_rng(0)
  large = rng.standard_normal((20000, 9))
  for n, energy in enumerate((0.4043, 0.6291, 0.7724, 0.8663, 0.9273), 1):
    assert _kept(large, all_patterns(n)) == pytest.approx(energy, abs=3e-3)
  # Of 5x5 kernels, where every kernel brings its own best pattern.
  wide = rng.standard_normal((1, 2000, 25)).astype(np.float32)
  for n, energy in ((4, 0.554), (11, 0.885)):
    own = top_patterns(jnp.asarray(wide), 'OIM', n)
    assert _kept(wide[0], own, 25) == pytest.approx(energy, abs=5e-3)


def _smooth(rng):
  """Kernels cut from white noise after a 3x3 binomial blur."""
  noise = rng.standard_normal((20000, 5, 5))
  row = np.array([0.25, 0.5, 0.25])
  rows = sum(row[d] * noise[:, d : d + 3] for d in range(3))
  return sum(row[d] * rows[:, :, d : d + 3] for d in range(3)).reshape(1, -1, 9)


# Share held by the 20 least used of 32, then kept energy of 32, 12, 8 and 4 patterns.
REDUCED = {
  'iid': (0.567, 0.804, 0.758, 0.729, 0.670),
  'centred': (0.587, 0.850, 0.814, 0.794, 0.760),
  'smooth': (0.477, 0.786, 0.758, 0.742, 0.714),
}


@pytest.mark.parametrize('kind', REDUCED)
def test_reduction_without_training_stays_spread_out(iid, kind):
  w = {'iid': iid, 'centred': iid * SCALES, 'smooth': _smooth(np.random.default_rng(1))}[kind]
  w = jnp.asarray(w, jnp.float32)
  masks, found = pattern_set('centre56'), []
  for v in (48, 40, 32, 12, 8, 4):
    counts, _ = pattern_usage(w, 'OIM', masks)
    if len(masks) == 32:
      found.insert(0, np.sort(counts)[:20].sum() / counts.sum())
    masks = shrink_library(masks, counts, v)
    if v <= 32:
      found.append(_kept(w[0], masks))
  np.testing.assert_allclose(found, REDUCED[kind], atol=0.015)
  if kind == 'smooth':  # about one draw in ten ends with another pattern in place of a corner
    assert set(masks) == set(pattern_set('corner4'))


def test_usage_counts_kernels_and_energy(iid):
  masks = pattern_set('elog4+corner4')
  counts, energy = pattern_usage(jnp.asarray(iid), 'OIM', masks)
  scores = (iid[0].astype(np.float64) ** 2) @ np.array(
    [[m >> t & 1 for t in range(9)] for m in masks]
  ).T
  np.testing.assert_array_equal(counts, np.bincount(scores.argmax(1), minlength=8))
  assert energy.sum() / (iid.astype(np.float64) ** 2).sum() == pytest.approx(_kept(iid[0], masks))
  assert counts.sum() == 20000


def test_several_leaves_share_a_codebook():
  rng = np.random.default_rng(0)
  leaves = [rng.standard_normal((3, 3, i, o)).astype(np.float32) for i, o in ((4, 5), (6, 7))]
  joint = np.concatenate([x.reshape(9, -1).T for x in leaves])
  found = pcnn_codebook([jnp.asarray(x) for x in leaves], 'HWIO', 3, 4)
  assert found == _greedy(joint, all_patterns(3), 4)
  saliency = [jnp.asarray(np.float32(x) ** 2) for x in leaves]
  ones = [jnp.ones(x.shape) for x in leaves]
  assert pcnn_codebook(ones, 'HWIO', 3, 4, saliency=saliency) == found


def test_large_kernels_take_their_candidates_from_the_weights():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.standard_normal((5, 5, 8, 8)), jnp.float32)
  votes = top_patterns(w, 'HWIO', 11)  # of 4.46 million
  assert sum(votes.values()) == 64 and all(m.bit_count() == 11 for m in votes)
  masks = pcnn_codebook(w, 'HWIO', 11, 8)
  assert len(masks) == 8 and set(masks) <= set(votes)
  wide = top_patterns(jnp.asarray(rng.standard_normal((11, 11, 1, 2)), jnp.float32), 'HWIO', 60)
  assert all(m.bit_count() == 60 and m < 1 << 121 for m in wide)


def test_fewer_patterns_come_back_when_no_more_help():
  w = jnp.zeros((1, 5, 9)).at[:, :, 3].set(1.0)
  assert pcnn_codebook(w, 'OIM', 1, 4) == (8,)
  assert pcnn_codebook(jnp.zeros((1, 5, 9)), 'OIM', 1, 4) == (1,)
  assert pcnn_codebook(w, 'OIM', 1, 100) == (8,)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: pattern_set('plus'), "'plus' is no pattern set; choose one of elog4"),
    (lambda: all_patterns(0), r'n=0 taps of 9: n is 1\.\.9'),
    (lambda: all_patterns(11, 25), '4457400 patterns .*pcnn_codebook'),
    (lambda: pcnn_codebook(jnp.ones((1, 2, 9)), 'OIM', 4, 8, 'best'), "'greedy' or 'votes'"),
    (lambda: pcnn_codebook(jnp.ones((1, 2, 9)), 'OIM', 10, 8), 'n=10 taps of 9'),
    (lambda: pcnn_codebook(jnp.ones((1, 2, 9)), 'OIM', 4, 0), 'v=0'),
    (lambda: greedy_codebook(jnp.ones((1, 2, 9)), 'OIM', (1, 2), 3), 'v=3 of 2 candidate'),
    (
      lambda: top_patterns([jnp.ones((1, 2, 9)), jnp.ones((1, 2, 4))], 'OIM', 2),
      r'\[4, 9\] taps cannot share',
    ),
    (lambda: top_patterns([], 'OIM', 2), '0 leaves'),
    (lambda: shrink_library((1, 2), [1, 2, 3], 1), r'usage of shape \[3\]'),
    (lambda: shrink_library((1, 2), [1, 2], 3), 'cannot keep 3 of 2'),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
