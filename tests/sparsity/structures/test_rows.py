"""Block-max, density-adaptive blocks and banks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import (
  Bank,
  BlockMax,
  Darb,
  Unstructured,
  bank,
  choose_exponents,
  darb,
  row_density,
  to_rows,
  top_k_mask,
)
from tests.sparsity.structures import oracle

WORKED = np.array(
  [
    [0.9, -0.1, 0.4, 0.8, -0.7, 0.2, 0.6, -0.5],
    [0.05, 0.3, -0.02, 0.01, 0, -0.25, 0.04, 0.02],
    [-0.6, 0.5, 0.1, 0, 0.55, -0.45, 0.02, 0.3],
    [0.01, 0.02, -0.03, 0, 0.15, -0.01, 0, 0.02],
  ],
  np.float32,
)


def _energy(structure, w, layout='OI'):
  z = jax.jit(lambda w: structure.project(w, layout)[0])(w)
  return float(jnp.square(z).sum() / jnp.square(w).sum())


def test_the_worked_matrix():
  density = row_density(jnp.asarray(WORKED), 'OI', 32 / 12)
  np.testing.assert_array_equal(density, [0.75, 0.125, 0.625, 0])
  assert choose_exponents(density, 8, menu=(0, 1, 2, 3)) == (0, 3, 1, 3)
  exponents = choose_exponents(density, 8, menu=(1, 2, 3))
  assert exponents == (1, 3, 1, 3)
  structure = Darb(exponents)
  z, mask = oracle.project(structure, jnp.asarray(WORKED), 'OI')
  assert structure.kept(WORKED.shape, 'OI') == mask.sum() == 10
  assert [np.flatnonzero(row).tolist() for row in mask] == [[0, 3, 4, 6], [1], [0, 2, 4, 7], [4]]
  assert z[0][mask[0]].tolist() == np.float32([0.9, 0.8, -0.7, 0.6]).tolist()
  assert z[2][mask[2]].tolist() == np.float32([-0.6, 0.1, 0.55, 0.3]).tolist()


@pytest.mark.parametrize('columns', [7, 8, 12])
def test_each_row_is_nearest(columns):
  w = np.round(np.random.default_rng(0).standard_normal((5, columns)) * 3).astype(np.float32)
  ones = np.ones(5, int)
  cases = [(BlockMax(size), size, ones) for size in (1, 2, 3, 8, 16)]
  cases += [(Bank(size, (0, 1, 2, 3, 1)), size, [0, 1, 2, 3, 1]) for size in (3, 4, 16)]
  for structure, size, counts in cases:
    z, mask = oracle.project(structure, jnp.asarray(w), 'OI')
    assert float((np.asarray(z, np.float64) ** 2).sum()) == oracle.within(w, counts, size)
    assert mask.sum() == structure.kept(w.shape, 'OI')
    for row, kept, count in zip(w, np.asarray(mask), counts, strict=True):
      for start in range(0, columns, size):
        part = slice(start, start + size)
        np.testing.assert_array_equal(kept[part], oracle.chosen(row[part] ** 2, count))


@pytest.mark.parametrize('columns', [7, 100])
def test_darb_is_block_max_row_by_row(columns):
  exponents = tuple(np.random.default_rng(1).integers(0, 8, 20).tolist())
  w = np.round(np.random.default_rng(0).standard_normal((20, columns)) * 3).astype(np.float32)
  mask = np.asarray(oracle.project(Darb(exponents), jnp.asarray(w), 'OI')[1])
  for row, kept, e in zip(w, mask, exponents, strict=True):
    for start in range(0, columns, 2**e):
      part = slice(start, start + 2**e)
      np.testing.assert_array_equal(kept[part], oracle.chosen(row[part] ** 2, 1))


def test_blocks_of_powers_of_two_are_nested():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((6, 50)), jnp.float32)
  masks = [oracle.project(BlockMax(2**e), w, 'OI')[1] for e in range(7)]
  for wide, narrow in zip(masks[1:], masks[:-1], strict=True):
    assert not (wide & ~narrow).any()


def test_an_empty_block_keeps_its_first_weight():
  mask = oracle.project(BlockMax(4), jnp.zeros((1, 6)), 'OI')[1]
  np.testing.assert_array_equal(mask, [[True, False, False, False, True, False]])


def test_blocks_run_along_the_inputs_of_a_tap():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 4, 2)), jnp.float32)
  mask = oracle.project(BlockMax(4), w, 'HWIO')[1]
  np.testing.assert_array_equal(mask.sum(2), np.ones((3, 3, 2)))
  assert to_rows(mask, 'HWIO').shape == (2, 36)


def test_ratio_of_ragged_rows():
  assert BlockMax(16).kept((6000, 3000), 'OI') == 1_128_000
  assert 3000 / BlockMax(16).kept((1, 3000), 'OI') == pytest.approx(15.957, abs=1e-3)
  assert 1500 / BlockMax(64).kept((1, 1500), 'OI') == 62.5


def _laplace_energy(b):
  h1, h2 = (sum(i**-p for i in range(1, b + 1)) for p in (1, 2))
  return (h1**2 + h2) / (2 * b)


def test_energy_of_block_max_in_closed_form():
  rng = np.random.default_rng(0)
  assert _laplace_energy(2) == 0.875 and _laplace_energy(4) == pytest.approx(0.720486, abs=1e-6)
  gauss = {2: (1 + 2 / math.pi) / 2, 4: 0.6176, 8: 0.4322, 16: 0.2843, 32: 0.1784}
  normal = jnp.asarray(rng.standard_normal((1024, 1024)), jnp.float32)
  laplace = jnp.asarray(rng.laplace(size=(1024, 1024)), jnp.float32)
  for size, expected in gauss.items():
    # A million weights: the spread of their kept energy is below 0.001.
    assert _energy(BlockMax(size), normal) == pytest.approx(expected, abs=0.002)
    assert _energy(BlockMax(size), laplace) == pytest.approx(_laplace_energy(size), abs=0.003)
  irregular = {
    2: (0.9287, 0.9667), 4: (0.7236, 0.8368), 8: (0.5023, 0.6552), 16: (0.3247, 0.4760),
    32: (0.2002, 0.3272),
  }  # fmt: skip

  @jax.jit
  def kept(w, k):
    live = top_k_mask(jnp.abs(w), k)
    return jnp.sum(jnp.where(live, jnp.square(w), 0)) / jnp.sum(jnp.square(w))

  for size, expected in irregular.items():
    for w, energy in zip((normal, laplace), expected, strict=True):
      assert float(kept(w, w.size // size)) == pytest.approx(energy, abs=0.003)


@pytest.fixture(scope='module')
def uneven():
  """Rows of very different scale."""
  rng = np.random.default_rng(0)
  scale = np.exp(rng.normal(0, 0.7, (512, 1)))
  return jnp.asarray(rng.normal(size=(512, 1024)) * scale, jnp.float32)


# ratio: kept energy without structure, of the menus 1..128 and 2..128; of banks of 16 with an
# adaptive count in the same bits, values of 8 and of 16 bits; index bits per weight of the first menu.
ADAPTIVE = {
  8: (0.7625, 0.6710, 0.6572, 0.694, 0.715, 1.88),
  13: (0.6572, 0.5615, 0.5615, 0.597, 0.612, 2.35),
  16: (0.6120, 0.5207, 0.5207, 0.556, 0.570, 2.57),
  25: (0.5179, 0.4308, 0.4308, 0.474, 0.483, 3.20),
}


@pytest.mark.parametrize('ratio', ADAPTIVE)
def test_adaptive_rows_keep_the_energy_they_should(uneven, ratio):
  irregular, wide, narrow, bank8, bank16, index_bits = ADAPTIVE[ratio]
  assert _energy(Unstructured(keep=1 / ratio), uneven) == pytest.approx(irregular, abs=1e-4)
  structure = darb(uneven, 'OI', ratio)
  assert uneven.size / structure.kept(uneven.shape, 'OI') == pytest.approx(ratio, rel=0.006)
  # Rows that tie at the last step are split, which the reference values do not do.
  assert _energy(structure, uneven) == pytest.approx(wide, abs=5e-4)
  other = darb(uneven, 'OI', ratio, menu=(1, 2, 3, 4, 5, 6, 7))
  assert min(other.exponents) >= 1
  if ratio == 8:
    assert _energy(other, uneven) == pytest.approx(narrow, abs=5e-4)
  else:
    assert other == structure and narrow == wide
  density = row_density(uneven, 'OI', ratio)
  places = sum(-(-1024 // 2**e) * e for e in structure.exponents)
  assert places / structure.kept(uneven.shape, 'OI') == pytest.approx(index_bits, abs=0.01)
  index = places + 3 * 512
  for value_bits, expected in ((8, bank8), (16, bank16)):
    bits = structure.kept(uneven.shape, 'OI') * value_bits + index
    kept = (bits - 5 * 512) / (value_bits + 4)  # a count of 0..16 a row, 4 bits an index
    found = _energy(bank(uneven, 'OI', uneven.size / kept, 16, density), uneven)
    # What is published is the better of two bank sizes, or of two ways to round.
    assert found == pytest.approx(expected, abs=2.5e-3)


def test_banks_at_the_same_number_of_weights(uneven):
  assert _energy(Bank(16, (1,) * 512), uneven) == pytest.approx(0.2845, abs=1e-4)
  assert _energy(Bank(64, (4,) * 512), uneven) == pytest.approx(0.3145, abs=1e-4)
  for size, energy in ((8, 0.4318), (16, 0.2845), (32, 0.1786)):
    assert _energy(BlockMax(size), uneven) == pytest.approx(energy, abs=1e-4)
  structure = bank(uneven, 'OI', 16, size=64)
  assert _energy(structure, uneven) == pytest.approx(0.6054, abs=5e-4)
  assert uneven.size / structure.kept(uneven.shape, 'OI') == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize('ratio', [1, 1.5, 2, 7.3, 60, 100])
def test_ratios_are_met_from_above_and_no_row_is_raised_in_vain(ratio):
  w = jnp.asarray(np.random.default_rng(0).standard_normal((40, 300)), jnp.float32)
  w = w * jnp.linspace(0.1, 2, 40)[:, None]
  budget = w.size / ratio
  structure = darb(w, 'OI', ratio)
  assert structure.kept(w.shape, 'OI') <= budget
  if max(structure.exponents):
    # The last raise was needed: 40 rows, each costs at most half of its weights.
    assert structure.kept(w.shape, 'OI') + 150 > budget
  counts = bank(w, 'OI', ratio, 16)
  assert budget - 19 <= counts.kept(w.shape, 'OI') <= budget


def test_equal_rows_are_raised_one_by_one():
  exponents = choose_exponents(np.full(10, 0.1), 64, ratio=10)
  assert set(exponents) == {3, 4} and sorted(exponents, reverse=True) == list(exponents)


def test_density_may_come_from_elsewhere():
  w = jnp.ones((2, 8))
  assert darb(w, 'OI', 2, density=[1.0, 0.0]).exponents == (1, 5)
  assert bank(w, 'OI', 2, 4, density=[1.0, 0.0]).counts == (4, 0)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: row_density(jnp.ones((2, 2)), 'OI', 0.5), 'ratio=0.5 must be at least 1'),
    (lambda: choose_exponents([0.5], 64, 100), r'ratio=100 cannot be met: .* 1\.\.64;'),
    (lambda: choose_exponents([0.5], 64, 0.5), 'ratio=0.5'),
    (lambda: choose_exponents([0.5], 64, 4, menu=(3, 2)), 'ascending'),
    (lambda: bank(jnp.ones((2, 64)), 'OI', 64, 4), 'ratio=64 leaves nothing .* Lower the ratio'),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
