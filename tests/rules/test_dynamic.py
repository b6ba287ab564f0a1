"""Sparse training: counts never change, who goes and who comes is as written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import NM, Unstructured, allocate, make_plan
from tests.rules import trees


def weights(seed=0):
  return {'w': jnp.asarray(np.random.default_rng(seed).normal(size=(8, 16)), jnp.float32)}


def test_rigl_drops_the_smallest_and_grows_the_steepest():
  tx = rules.rigl(optax.sgd(0.0), trees.largest(0.25), every=2, end=8, drop=0.5)
  params, update = weights(), jax.jit(tx.update)
  state = tx.init(params)
  mask = np.asarray(state.masks['w'])
  for count in range(10):
    grads = weights(count + 1)
    updates, state = update(grads, state, params)
    if count in (2, 4, 6):
      w, g = np.abs(np.asarray(params['w'])).ravel(), np.abs(np.asarray(grads['w'])).ravel()
      dropped = round(0.25 * (1 + np.cos(np.pi * count / 8)) * 32)
      order = np.argsort(-np.where(mask.ravel(), w, -1), kind='stable')
      new = np.zeros(128, bool)
      new[order[: 32 - dropped]] = True
      new[np.argsort(-np.where(new, -1, g), kind='stable')[:dropped]] = True
      assert dropped and np.any(new.reshape(8, 16) != mask)
      mask = new.reshape(8, 16)
    np.testing.assert_array_equal(state.masks['w'], mask)
    assert mask.sum() == 32
    params = optax.apply_updates(params, updates)
    # What has grown starts at zero; give it a size so that it can be compared.
    params = {'w': jnp.where(params['w'] == 0, 0.01 * weights(count + 50)['w'], params['w'])}


def test_set_grows_at_random_and_stops():
  tx = rules.set_(optax.sgd(0.1, momentum=0.9), trees.largest(0.25), every=1, end=4, drop=0.25)
  params, update = weights(), jax.jit(tx.update)
  state = tx.init(params)
  params = rules.apply_masks(params, rules.masks_of(state))
  moves = []
  for count in range(7):
    before, w = np.asarray(state.masks['w']), np.abs(np.asarray(params['w']))
    updates, state = update(weights(count), state, params)
    after = np.asarray(state.masks['w'])
    assert after.sum() == 32
    gone = before & ~after
    moves.append(gone.sum())
    if gone.any():  # only from the eighth that is smallest
      assert w[gone].max() <= np.sort(w[before])[7]
    dead = ~after
    assert np.all(np.asarray(state.inner_state[0].trace['w'])[dead] == 0)
    params = optax.apply_updates(params, updates)
    assert np.all(np.asarray(params['w'])[dead] == 0)
  assert all(0 < n <= 8 for n in moves[1:4]) and moves[0] == 0 and moves[4:] == [0, 0, 0]


def test_moments_of_what_grows_are_new():
  tx = rules.rigl(optax.sgd(0.1, momentum=0.9), trees.largest(0.25), every=3, end=9, drop=0.5)
  params, update = weights(), jax.jit(tx.update)
  state = tx.init(params)
  for count in range(4):
    before = np.asarray(state.masks['w'])
    grads = weights(count)
    _, state = update(grads, state, params)
  grown = ~before & np.asarray(state.masks['w'])
  assert grown.any()
  np.testing.assert_array_equal(
    np.asarray(state.inner_state[0].trace['w'])[grown], np.asarray(grads['w'])[grown]
  )


def test_structures_keep_their_form():
  params = weights()
  plan = make_plan(params, [('w', NM(1, 4))])
  tx = rules.rigl(optax.sgd(0.1), plan, every=1, end=9, drop=0.5)
  update = jax.jit(tx.update)
  state = tx.init(params)
  first = np.asarray(state.masks['w'])
  for count in range(4):
    _, state = update(weights(count), state, params)
    groups = np.asarray(state.masks['w']).reshape(2, 4, 16)
    assert np.all(groups.sum(1) == 1)
  assert np.any(first != np.asarray(state.masks['w']))


def test_erk_start():
  """Thin layers keep a larger share, and the whole keeps what was asked for."""
  params = trees.linen()
  params['second']['kernel'] = jnp.ones((16, 64))
  rule = ('.*/kernel', lambda keep: Unstructured(keep=keep))
  plan = allocate(params, [rule], keep=0.25, method='erk')
  state = rules.static_sparse(optax.sgd(0.1), plan).init(params)
  shares = {k: float(jnp.mean(m['kernel'])) for k, m in state.masks.items()}
  raw = {k: sum(params[k]['kernel'].shape) / params[k]['kernel'].size for k in shares}
  np.testing.assert_allclose(
    shares['first'] / shares['second'], raw['first'] / raw['second'], rtol=0.02
  )
  total = sum(int(m['kernel'].sum()) for m in state.masks.values())
  assert abs(total - 0.25 * (128 + 1024)) <= 1


def test_static_masks_never_change_and_depend_on_the_seed():
  params = weights()
  masks = []
  for seed in (0, 1):
    tx = rules.static_sparse(optax.sgd(0.1), trees.largest(0.25), seed=seed)
    state = tx.init(params)
    masks.append(np.asarray(state.masks['w']))
    _, state = jax.jit(tx.update)(params, state, params)
    np.testing.assert_array_equal(state.masks['w'], masks[-1])
  assert np.any(masks[0] != masks[1])
  # At random, not the largest.
  assert np.any(masks[0] != np.asarray(trees.largest(0.25)(params)[1]['w']))


@pytest.mark.parametrize('rule', [rules.rigl, rules.set_])
@pytest.mark.parametrize(
  ('options', 'message'), [({'every': 0}, 'every=0'), ({'drop': 1.0}, 'drop=1.0')]
)
def test_settings_that_make_no_sense(rule, options, message):
  with pytest.raises(ValueError, match=message):
    rule(optax.sgd(0.1), trees.largest(0.5), **{'every': 1, 'end': 4, **options})
