"""Codebooks that follow the weights: when, by what, and what passes unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import quantize, rules
from fqjax.quantize import Mixture
from fqjax.quantize._blend import fit_step
from tests.rules import trees


def start(masked=False, quantizer=None):
  params = trees.linen()
  masks = trees.pairs(params)[1] if masked else None
  params = rules.apply_masks(params, masks)
  plan = quantize.make_plan(params, [('first/kernel', quantizer or Mixture(4))])
  return {'params': params, 'codebooks': quantize.init_dgms(params, plan, masks=masks)}, masks


def jitted(tx):
  @jax.jit
  def step(both, state):
    grads = jax.tree.map(lambda x: 0.1 * jnp.cos(x), both)
    updates, state = tx.update(grads, state, both)
    return optax.apply_updates(both, updates), state, updates

  return step


@pytest.mark.parametrize(('kind', 'masked'), [('em', True), ('lloyd', False)])
def test_every_third_update_fits_the_weights_it_leaves(kind, masked):
  both, masks = start(masked)
  last = rules.refresh_codebooks(3, kind=kind, masks=masks)
  step, plain = jitted(optax.chain(optax.sgd(0.5), last)), jitted(optax.sgd(0.5))
  state = optax.chain(optax.sgd(0.5), last).init(both)
  assert np.isnan(state[-1].error['first']['kernel'])
  for i in range(1, 7):
    before = both
    both, state, updates = step(before, state)
    expected, _, passed = plain(before, optax.sgd(0.5).init(before))
    trees.assert_same(updates['params'], passed['params'])
    leaf = both['codebooks']['first']['kernel']
    if i % 3:
      trees.assert_same(updates, passed)
      continue
    mask = None if masks is None else masks['first']['kernel']
    old = before['codebooks']['first']['kernel']
    fitted, error = fit_step(expected['params']['first']['kernel'], old, mask, kind)
    for a, b in zip(leaf, fitted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state[-1].error['first']['kernel'], error, rtol=1e-4)
    np.testing.assert_array_equal(leaf.log_tau, old.log_tau)
  assert step._cache_size() == 1
  assert state[-1].count == 6 and both['codebooks']['second']['kernel'] is None


def test_masked_weights_are_no_weights_to_fit():
  """What stands where the mask is False changes nothing."""
  both, masks = start(masked=True)
  other = jax.tree.map(lambda x: x, both)
  mask = masks['first']['kernel']
  other['params']['first']['kernel'] = jnp.where(mask, both['params']['first']['kernel'], 7.0)
  tx = rules.refresh_codebooks(1, masks=masks)
  # The floor under the deviations sees all weights, and is far below them here.
  found = [
    tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x)[0]['codebooks'] for x in (both, other)
  ]
  for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert a.ndim == 0 or np.any(a)


def test_between_begin_and_end():
  both, _ = start(quantizer=Mixture(4, parity=True))
  tx = rules.refresh_codebooks(2, begin=2, end=6)
  still = jax.tree.map(jnp.zeros_like, both)
  step = jax.jit(lambda state, both: tx.update(still, state, both))
  state, moved = tx.init(both), []
  for _ in range(9):
    updates, state = step(state, both)
    moved.append(bool(np.any(updates['codebooks']['first']['kernel'].sigma)))
  assert moved == [False, False, False, True, False, True, False, False, False]


def test_any_tree_and_the_last_links():
  """Refresh, then masks: the chain keeps its zeros, whatever the library."""
  for kind in trees.KINDS:
    pytest.importorskip({'haiku': 'haiku', 'equinox': 'equinox'}.get(kind, 'jax'))
    params = trees.from_linen(kind, trees.linen())
    params, masks = trees.pairs(params)
    plan = quantize.make_plan(params, [('.*(kernel|w)', Mixture(3))])
    both = {'params': params, 'codebooks': quantize.init_dgms(params, plan, masks=masks)}
    keep = {'params': masks, 'codebooks': jax.tree.map(lambda _: None, both['codebooks'])}
    tx = optax.chain(
      optax.sgd(0.1), rules.refresh_codebooks(1, masks=masks), rules.keep_masked(keep)
    )
    state = tx.init(both)
    updates, after = tx.update(jax.tree.map(jnp.ones_like, both), state, both)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    both = optax.apply_updates(both, updates)
    trees.assert_dead_are_zero(both['params'], masks)
    assert len(jax.tree.leaves(after[1].error)) == 2


def test_narrow_weights_and_updates():
  both, _ = start()
  both['params'] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), both['params'])
  tx = rules.refresh_codebooks(1)
  updates, state = jax.eval_shape(tx.update, both, tx.init(both), both)
  assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, both)
  assert state.error['first']['kernel'].dtype == jnp.float32


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(every=0), 'every=0'),
    (dict(every=2, kind='kmeans'), "kind='kmeans'"),
    (dict(every=2, begin=5, end=5), 'there are none'),
    (dict(every=2, begin=-1), 'there are none'),
  ],
)
def test_settings_that_make_no_sense(settings, message):
  with pytest.raises(ValueError, match=message):
    rules.refresh_codebooks(**settings)


def test_trees_it_is_not_for():
  both, masks = start(masked=True)
  tx = rules.refresh_codebooks(1)
  with pytest.raises(
    ValueError, match=r"over both weights and mixtures(.|\n)*not with \['first', 'second'\]"
  ):
    tx.init(both['params'])
  with pytest.raises(ValueError, match='codebooks are of another model'):
    tx.init({'params': {'other': jnp.ones((2, 2))}, 'codebooks': both['codebooks']})
  with pytest.raises(ValueError, match='masks is of another model'):
    rules.refresh_codebooks(1, masks={'other': jnp.ones(2, bool)}).init(both)
  with pytest.raises(ValueError, match=r'tx.update\(grads, state, params\)'):
    tx.update(both, tx.init(both))
