"""Every quantizer: nearest levels by brute force, zeros, dtypes, layouts, and its edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.quantize import Binary, Interval, PowerOfTwo, Quantizer, Ternary, Uniform

QUANTIZERS = {
  'interval': Interval(3),
  'interval, dropping, per channel': Interval(2, per='channel', drop=True),
  'power of two': PowerOfTwo(3),
  'power of two, dropping, per channel': PowerOfTwo(2, per='channel', drop=True),
  'binary per channel': Binary('channel'),
  'ternary': Ternary(),
  'int8': Uniform(),
  'int4, clipped': Uniform(4, clip='mse'),
  'int3 of a layer': Uniform(3, per='layer'),
}
ALL = pytest.mark.parametrize('quantizer', QUANTIZERS.values(), ids=QUANTIZERS)
SHAPE, LAYOUT = (2, 3, 4, 5), 'HWIO'


@functools.partial(jax.jit, static_argnums=(0, 2))
def apply(quantizer, w, layout, mask=None):
  table = quantizer.fit(w, layout, mask)
  return (
    table,
    quantizer.project(w, layout, mask),
    quantizer.indices(w, layout, mask, table),
  )


def weights(seed=0):
  return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def by_output(table):
  """Codebook of each output."""
  return np.broadcast_to(table, (SHAPE[-1], np.shape(table)[-1]))


@ALL
def test_projects_to_the_nearest_level(quantizer):
  w = weights()
  table, z, indices = map(np.asarray, apply(quantizer, w, LAYOUT))
  assert table.shape == quantizer.codebook_shape(SHAPE, LAYOUT)
  assert indices.dtype == np.uint8
  may_be_zero = quantizer.zero or getattr(quantizer, 'drop', False)
  for o, levels in enumerate(by_output(table)):
    assert levels[0] == 0 and np.all(np.diff(levels[1:]) > 0)
    assert len(levels) == quantizer.count + (not quantizer.zero)
    allowed = levels if may_be_zero else levels[1:]
    away = np.abs(w[..., o, None] - allowed)
    np.testing.assert_allclose(np.abs(w - z)[..., o], away.min(-1), rtol=1e-6, atol=1e-7)
    # Codebook and indices are these weights, to the bit.
    np.testing.assert_array_equal(levels[indices[..., o]], z[..., o])
  assert 2**quantizer.index_bits >= quantizer.count > 2 ** (quantizer.index_bits - 1)


@ALL
def test_the_general_search_of_the_base_agrees(quantizer):
  w = weights()
  table, _, indices = apply(quantizer, w, LAYOUT)
  if getattr(quantizer, 'drop', False):
    pytest.skip('the base knows nothing of weights that are dropped')
  search = jax.jit(Quantizer.indices, static_argnums=(0, 2))
  np.testing.assert_array_equal(search(quantizer, w, LAYOUT, None, table), indices)


@ALL
def test_masked_is_zero_at_index_zero_and_does_not_count(quantizer):
  w, mask = weights(), np.random.default_rng(1).random(SHAPE) < 0.6
  loud = np.where(mask, w, 100).astype(np.float32)
  table, z, indices = apply(quantizer, loud, LAYOUT, mask)
  assert np.all(np.asarray(z)[~mask] == 0) and np.all(np.asarray(indices)[~mask] == 0)
  quiet = apply(quantizer, np.where(mask, w, 0).astype(np.float32), LAYOUT, mask)
  np.testing.assert_array_equal(table, quiet[0])
  if isinstance(quantizer, Binary | Ternary) or quantizer == Uniform():  # nothing to search
    np.testing.assert_allclose(table, quantizer.fit_exact(loud, LAYOUT, mask), rtol=1e-5)
  if not quantizer.zero and not getattr(quantizer, 'drop', False):
    assert np.all(np.asarray(indices)[mask] > 0)


@ALL
def test_fit_cannot_be_bettered_by_another_scale(quantizer):
  w = weights()
  table = np.asarray(apply(quantizer, w, LAYOUT)[0])
  exact = quantizer.fit_exact(w, LAYOUT)
  assert exact.dtype == np.float32 and exact.shape == table.shape
  if getattr(quantizer, 'clip', '') == 'max':
    np.testing.assert_allclose(exact, table, rtol=1e-6)
    np.testing.assert_allclose(table.max(-1), np.abs(w).max((0, 1, 2) if table.ndim > 1 else None))
    return
  levels = slice(None) if quantizer.zero or getattr(quantizer, 'drop', False) else slice(1, None)

  def error(table):
    found = 0.0
    for o, row in enumerate(by_output(table)):
      found += np.sum(np.min((w[..., o, None] - np.float64(row[levels])) ** 2, -1))
    return found

  least = error(exact)
  assert least <= error(table) * (1 + 1e-6) <= least * 1.01
  for factor in np.linspace(0.5, 1.5, 101):
    assert error(np.float64(exact) * factor) >= least * (1 - 1e-6)


@ALL
def test_layouts_are_views_of_one_thing(quantizer):
  w = weights()
  z = apply(quantizer, w, 'HWIO')[1]
  other = apply(quantizer, w.transpose(3, 2, 0, 1), 'OIHW')[1]
  np.testing.assert_allclose(np.asarray(other).transpose(2, 3, 1, 0), z, rtol=1e-6)


@ALL
def test_bfloat16_keeps_its_dtype_and_decodes_to_the_bit(quantizer):
  w = jnp.asarray(weights(), jnp.bfloat16)
  table, z, indices = apply(quantizer, w, LAYOUT)
  assert z.dtype == jnp.bfloat16 and table.dtype == jnp.float32
  rows = by_output(table)
  for o in range(SHAPE[-1]):
    want = rows[o][np.asarray(indices)[..., o]].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(z)[..., o].view(np.uint16), want.view(np.uint16))


@ALL
def test_leaves_of_zeros_of_constants_and_without_a_live_weight(quantizer):
  zeros = np.zeros(SHAPE, np.float32)
  table, z, indices = apply(quantizer, zeros, LAYOUT)
  assert not np.any(table) and not np.any(z) and not np.any(indices)
  _, z, _ = apply(quantizer, zeros - 0.25, LAYOUT)
  np.testing.assert_allclose(z, zeros - 0.25, rtol=1e-6)
  dead = np.zeros(SHAPE, bool)
  table, z, indices = apply(quantizer, weights(), LAYOUT, dead)
  assert not np.any(table) and not np.any(z) and not np.any(indices)


@ALL
def test_more_levels_than_distinct_weights_leaves_levels_unused(quantizer):
  w = np.where(weights() > 0, 0.5, -1).astype(np.float32)
  table, z, indices = apply(quantizer, w, LAYOUT)
  assert np.isfinite(table).all()
  for o in range(SHAPE[-1]):
    for value in (0.5, -1):
      places = w[..., o] == value
      assert len(set(np.asarray(indices)[..., o][places].tolist())) <= 1
  # A codebook that has both holds both.
  if isinstance(quantizer, Interval | PowerOfTwo):
    np.testing.assert_allclose(z, w, rtol=1e-6)


def test_derivatives_are_zero_and_batches_map():
  quantizer = Interval(2)
  w = jnp.asarray(weights()[0, 0])
  slope = jax.grad(lambda w: jnp.sum(quantizer.project(w, 'IO') * w))(w)
  np.testing.assert_allclose(slope, quantizer.project(w, 'IO'), rtol=1e-6)
  batch = jnp.stack([w, 3 * w])
  mapped = jax.vmap(lambda w: quantizer.project(w, 'IO'))(batch)
  np.testing.assert_allclose(mapped[1], 3 * mapped[0], rtol=1e-5)
  np.testing.assert_allclose(mapped[0], quantizer.project(w, 'IO'), rtol=1e-6)


# Small numbers worked out by hand.


def row(*values):
  return np.array([values], np.float32)


def test_binary_by_hand():
  w = row(0.5, -1.5, 2, -0.1)
  z = np.asarray(apply(Binary(), w, 'IO')[1])
  np.testing.assert_allclose(z, row(1.025, -1.025, 1.025, -1.025), rtol=1e-6)
  assert np.sum(np.square(w - z)) == pytest.approx(2.3075, abs=1e-5)
  np.testing.assert_allclose(apply(Interval(1), w, 'IO')[1], z, rtol=1e-6)


def test_ternary_by_hand_and_over_all_supports():
  w = row(0.9, -0.1, 0.4, -1.1, 0.05, 0.3)
  z = np.asarray(apply(Ternary(), w, 'IO')[1])
  np.testing.assert_allclose(z, row(1, 0, 0, -1, 0, 0), rtol=1e-6)
  assert np.sum(np.square(w - z)) == pytest.approx(0.2825, abs=1e-5)
  rng = np.random.default_rng(0)
  for _ in range(5):
    w = rng.normal(size=(1, 6)).astype(np.float32)
    least = np.sum(w * w)
    for support in itertools.product([0, 1], repeat=6):
      if any(support):
        s = np.array(support, bool)[None]
        least = min(least, np.sum(w * w) - np.abs(w[s]).sum() ** 2 / s.sum())
    error = np.sum(np.square(w - np.asarray(apply(Ternary(), w, 'IO')[1])))
    assert error == pytest.approx(least, abs=1e-5)


def test_joint_with_pruning_by_hand_and_over_all_choices():
  """The k largest, then the nearest level or 0: the nearest point of both sets, for a given scale."""
  v, q, k = np.array([0.3, -1.2, 0.05, 0.8, -0.4, 0], np.float32), 0.45, 3
  quantizer = Interval(2, drop=True)
  table = np.float32(q) * np.array(quantizer.multiples, np.float32)

  def joint(v):
    mask = np.zeros(v.size, bool)
    mask[np.argsort(-np.abs(v), kind='stable')[:k]] = True
    return np.asarray(quantizer.project(jnp.asarray(v[None]), 'IO', mask[None], table))[0]

  z = joint(v)
  np.testing.assert_allclose(z, [0, -0.9, 0, 0.9, -0.45, 0], rtol=1e-6)
  assert np.sum(np.square(v - z)) == pytest.approx(0.195, abs=1e-6)
  rng = np.random.default_rng(0)
  for _ in range(4):
    v = rng.normal(size=5).astype(np.float32) / 2
    least = min(
      np.sum(np.square(v - np.array(levels)))
      for levels in itertools.product(table.tolist(), repeat=5)
      if np.count_nonzero(levels) <= k
    )
    assert np.sum(np.square(v - joint(v))) == pytest.approx(least, abs=1e-6)


def test_a_live_zero_takes_a_level_where_there_is_no_zero():
  z = apply(Interval(2), row(0, 1, 2, -2), 'IO')[1]
  np.testing.assert_allclose(z, row(0.9, 0.9, 1.8, -1.8), rtol=1e-6)


def test_integers_for_a_runtime():
  quantizer = Uniform(8)
  w = weights()
  table, z, indices = apply(quantizer, w, LAYOUT)
  integers = np.array(quantizer.multiples, np.int8)[np.asarray(indices)]
  scale = np.abs(w).max((0, 1, 2)) / 127
  np.testing.assert_allclose(quantizer.scale(table), scale, rtol=1e-6)
  np.testing.assert_array_equal(integers, np.rint(w / np.asarray(quantizer.scale(table))))
  np.testing.assert_array_equal(np.asarray(quantizer.scale(table)) * integers, z)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: Interval(8), 'bits=8 must be 1 to 7.*Uniform has 8'),
    (lambda: Interval(0), 'bits=0'),
    (lambda: PowerOfTwo(6), 'bits=6 must be 1 to 5'),
    (lambda: Uniform(1), 'bits=1 must be 2 to 8; one bit is Binary'),
    (lambda: Uniform(clip='kl'), "clip='kl' must be 'max' or 'mse'"),
    (lambda: Binary('filter'), "per='filter' must be 'layer' or 'channel'"),
    (lambda: Ternary('filter'), "per='filter'"),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ValueError, match=message):
    make()
