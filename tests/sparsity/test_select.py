"""The k largest, against a stable sort in NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from fqjax.sparsity import Unstructured, keep_count, kth_largest, top_k_mask, top_k_masks

# k traced: one program for every shape, shared by the tests.
_mask = jax.jit(top_k_mask, static_argnames=('axis', 'order'))


def _largest(scores, k, order=None):
  """Mask of the k largest by a stable sort; ties to the lowest index in the order of the axes."""
  scores = np.asarray(scores, np.float64)
  order = tuple(range(scores.ndim)) if order is None else order
  moved = scores.transpose(order)
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-moved.ravel(), kind='stable')[:k]] = True
  return mask.reshape(moved.shape).transpose(np.argsort(order))


def _data(kind, shape):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(shape).astype(np.float32)
  if kind == 'ties':
    return np.round(x * 2) / 2
  if kind == 'equal':
    return np.ones(shape, np.float32)
  if kind == 'scales':  # over the whole range of exponents, subnormal ones, both zeros
    x = np.ldexp(x, rng.integers(-148, 100, shape)).astype(np.float32)
    x.flat[:3] = 0.0, -0.0, np.inf
  return x


@pytest.mark.parametrize('kind', ['normal', 'ties', 'equal', 'scales'])
@pytest.mark.parametrize('shape', [(1,), (37,), (4, 9), (3, 4, 7), (2, 3, 5, 6)])
def test_whole_array_as_a_stable_sort(kind, shape):
  x = _data(kind, shape)
  np.testing.assert_array_equal(_mask(x, 0), _largest(x, 0))
  programs = _mask._cache_size()
  for k in sorted({1, x.size // 3, x.size - 1, x.size}):
    np.testing.assert_array_equal(_mask(x, k), _largest(x, k))
  assert _mask._cache_size() == programs


@pytest.mark.parametrize('kind', ['normal', 'ties', 'equal', 'scales'])
@pytest.mark.parametrize('n', [1, 4, 64, 65, 300])  # compared in pairs up to 64, then by bits
def test_lines_as_a_stable_sort(kind, n):
  x = _data(kind, (2, 5, n))
  counts = np.random.default_rng(1).integers(0, n + 1, (2, 5))
  mask = np.asarray(_mask(x, counts, axis=-1))
  for at in np.ndindex(2, 5):
    np.testing.assert_array_equal(mask[at], _largest(x[at], counts[at]))
  same = np.full((2, 5), n // 2)
  np.testing.assert_array_equal(_mask(x, same, axis=-1).sum(-1), same)


def test_ties_are_counted_in_the_order_of_the_axes():
  x = _data('ties', (3, 2, 4, 5))
  for order in [(3, 2, 0, 1), (0, 1, 2, 3), (2, 3, 1, 0)]:
    for k in (7, 50, 90):
      np.testing.assert_array_equal(_mask(x, k, order=order), _largest(x, k, order))


def test_zeros_of_both_signs_tie():
  x = jnp.array([-1.0, -0.0, 0.0, 1e-45])
  np.testing.assert_array_equal(_mask(x, 2), [False, True, False, True])
  np.testing.assert_array_equal(_mask(x, 2, axis=-1), [False, True, False, True])


def test_several_arrays_share_one_threshold():
  a, b, c = _data('ties', (3, 4)), _data('ties', (6,)), _data('ties', (2, 2, 5))
  flat = np.concatenate([a.ravel(), b.ravel(), c.ravel()])
  together = jax.jit(top_k_masks)
  for k in (0, 5, 19, flat.size):
    masks = together([a, b, c], k)
    found = np.concatenate([np.asarray(m).ravel() for m in masks])
    np.testing.assert_array_equal(found, _largest(flat, k))
  first = top_k_masks([jnp.ones((2, 2)), jnp.ones(3)], 3, orders=[(1, 0), (0,)])
  np.testing.assert_array_equal(first[0], [[True, True], [True, False]])
  assert not first[1].any()


def test_vmap_is_a_loop():
  x = jnp.asarray(_data('ties', (5, 6, 7)))
  ks = jnp.array([0, 3, 20, 41, 42])
  found = jax.jit(jax.vmap(top_k_mask))(x, ks)
  for i in range(5):
    np.testing.assert_array_equal(found[i], _mask(x[i], int(ks[i])))


def test_traced_k_is_clipped():
  x = jnp.arange(4.0)
  assert _mask(x, 9).all() and not _mask(x, -1).any()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32', 'float64'])
def test_types(dtype, x64):
  x = jnp.asarray(_data('ties', (6, 7)) * 2).astype(dtype)
  whole, lines = jax.jit(lambda x: (top_k_mask(x, 20), top_k_mask(x, 3, axis=-1)))(x)
  np.testing.assert_array_equal(whole, _largest(x.astype(float), 20))
  np.testing.assert_array_equal(lines.sum(1), np.full(6, 3))


def test_float64_is_compared_in_float64(x64):
  x = jnp.array([1.0, 1.0 + 1e-12, 1.0])
  np.testing.assert_array_equal(top_k_mask(x, 1), [False, True, False])
  assert kth_largest(x, 1) == 1.0 + 1e-12


def test_kth_largest_is_the_sorted_entry():
  run = jax.jit(kth_largest)
  for kind in ('normal', 'ties', 'scales'):
    x = _data(kind, (5, 8))
    for k in (1, 7, 40):
      assert float(run(x, k)) == np.sort(x.ravel())[::-1][k - 1]


def _sharded(x, *spec):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  return jax.device_put(x, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize('spec', [(None, None, None, ('a', 'b')), ('b', None, 'a', None)])
def test_eight_devices_and_one_agree(spec):
  x = np.abs(_data('ties', (4, 2, 16, 24)))
  there = _sharded(x, *spec)
  assert len(there.sharding.device_set) == 8

  @jax.jit
  def run(x):
    return top_k_mask(x, 500, order=(3, 2, 0, 1)), Unstructured(keep=0.3).project(x, 'HWIO')

  program = run.lower(there).compile()
  mask, (z, kept) = program(there)
  np.testing.assert_array_equal(mask, _largest(x, 500, (3, 2, 0, 1)))
  np.testing.assert_array_equal(kept, _largest(x, round(0.3 * x.size), (3, 2, 0, 1)))
  np.testing.assert_array_equal(z, np.where(kept, x, 0))
  # Counts travel, weights do not.
  text = program.as_text()
  assert 'all-reduce' in text
  moved = [line for line in text.splitlines() if re.search('all-gather|all-to-all|permute', line)]
  assert not [line for line in moved if re.search(r'\[[\d,]*\d{3,}', line)], moved


def test_nothing_is_sorted_or_gathered():
  text = str(jax.make_jaxpr(lambda x: top_k_mask(x, 50, order=(1, 0)))(jnp.ones((9, 30))))
  for name in ('sort', 'gather', 'top_k'):
    assert f' {name}[' not in text


def test_counts():
  assert [keep_count(k, 10) for k in (1e-9, 0.25, 0.35, 1)] == [1, 2, 4, 10]
  assert [keep_count(k, 10, 'up') for k in (0.01, 0.21, 0.3, 1)] == [1, 3, 3, 10]
  assert all(keep_count(i / 30, 30, 'up') == i for i in range(1, 31))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: keep_count(0.0, 5), r'keep=0.0 must be in \(0, 1\]; a pruning ratio r'),
    (lambda: keep_count(1.5, 5), 'keep=1.5'),
    (lambda: keep_count(float('nan'), 5), 'keep=nan'),
    (lambda: keep_count(0.5, 0), '0 groups'),
    (lambda: keep_count(0.5, 5, 'down'), "'nearest' or 'up'"),
    (lambda: top_k_mask(jnp.ones(3), 4), 'k=4 of 3'),
    (lambda: top_k_mask(jnp.ones((2, 3)), 4, axis=-1), 'k=4 of 3'),
    (lambda: top_k_mask(jnp.ones((2, 3)), 1, axis=0), 'choose None or -1'),
    (lambda: top_k_masks([], 0), 'at least one array'),
    (lambda: kth_largest(jnp.ones(3), 0), 'counts from 1'),
    (lambda: kth_largest(jnp.ones(3), 4), 'k=4 of 3'),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.full
def test_25_million():
  x = np.random.default_rng(0).standard_normal(25_000_000, dtype=np.float32)
  k = 2_500_000
  mask = np.asarray(jax.jit(functools.partial(top_k_mask, k=k))(np.abs(x)))
  t = np.partition(np.abs(x), -k)[-k]
  assert mask.sum() == k and mask[np.abs(x) > t].all() and not mask[np.abs(x) < t].any()
