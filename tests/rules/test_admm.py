"""ADMM: traces computed by hand, cycles and their bound, stages, levels."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import top_k_mask
from tests.rules import trees


def keep_one(tree):
  masks = {'w': top_k_mask(jnp.abs(tree['w']), 1)}
  return rules.apply_masks(tree, masks), masks


def quadratic(a, rho, rounds, **options):
  """States after each round for the loss |w - a|^2 / 2, every W-step solved exactly."""
  tx = rules.admm(keep_one, rho, 1, **options)
  a = {'w': jnp.array(a)}
  update = jax.jit(tx.update)
  state = tx.init(a)
  _, state = update(a, state, a)  # the first update never refreshes
  result = []
  for _ in range(rounds):
    w = {'w': (a['w'] + state.rho * (state.z['w'] - state.u['w'])) / (1 + state.rho)}
    grads = {'w': w['w'] - a['w']}
    _, state = update(grads, state, w)
    result.append((np.asarray(w['w']), state))
  return result


def test_trace():
  rounds = quadratic([3.0, 1.0, 0.5], 1.0, 3)
  np.testing.assert_allclose(
    [w for w, _ in rounds], [[3, 0.5, 0.25], [3, 0.25, 0.125], [3, 0.125, 0.0625]], rtol=1e-6
  )
  np.testing.assert_allclose([s.u['w'][1] for _, s in rounds], [0.5, 0.75, 0.875], rtol=1e-6)
  for _, state in rounds:
    np.testing.assert_array_equal(state.z['w'], [3, 0, 0])
    assert state.u['w'][0] == 0  # zero on the kept support
    np.testing.assert_array_equal(state.support['w'], [True, False, False])
    assert state.changed['w'] == 0
  w, state = rounds[-1]
  np.testing.assert_allclose(
    state.gap['w'], np.linalg.norm([0.125, 0.0625]) / np.linalg.norm(w), rtol=1e-5
  )
  np.testing.assert_allclose(
    state.dual['w'], np.linalg.norm(state.u['w']) / np.linalg.norm(w), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('rescale', 'expected'),
  [(True, [1.06, 0.61, 0.10, 9e-4, 7e-8]), (False, [1.06, 0.66, 0.46, 0.19, 0.038])],
)
def test_growing_rho_needs_the_dual_rescaled(rescale, expected):
  rounds = quadratic([3.0, 1.0, 0.5], 0.05, 21, growth=1.3, rescale_dual=rescale)
  gaps = [np.linalg.norm(w - s.z['w']) for w, s in rounds]
  np.testing.assert_allclose([gaps[i - 1] for i in (1, 6, 11, 16, 21)], expected, rtol=0.06)
  np.testing.assert_allclose(rounds[-1][1].rho, 0.05 * 1.3**21, rtol=1e-5)


def test_rho_max_and_growth_by_residuals():
  assert quadratic([3.0, 1.0], 0.5, 6, growth=2.0, rho_max=3.0)[-1][1].rho == 3.0

  def growth(primal, dual):
    return jnp.where(primal > 0.1, 2.0, 1.0) + 0 * dual

  rounds = quadratic([3.0, 1.0], 0.5, 6, growth=growth)
  rho, expected = 0.5, []
  for w, state in rounds:
    rho *= 2 if np.linalg.norm(w - state.z['w']) > 0.1 else 1
    expected.append(rho)
  assert 2 < len({float(x) for x in expected}) < 6
  np.testing.assert_allclose([s.rho for _, s in rounds], expected)


@pytest.mark.parametrize(
  ('a', 'rho', 'cycles'),
  [
    ([1.0, 0.9], 0.1, True),
    ([1.0, 0.9], 0.5, True),
    ([1.0, 0.9], 1.0, False),
    ([3.0, 1.0], 0.3, True),
    ([3.0, 1.0], 0.4, False),
  ],
)
def test_supports_cycle_below_the_bound(a, rho, cycles):
  rounds = quadratic(a, rho, 60)
  changed = [float(s.changed['w']) for _, s in rounds[30:]]
  assert any(changed) == cycles
  if not cycles:
    # The bound is the largest pruned slope over the smallest kept weight: 0.9 and 1/3.
    found = rules.diagnostics(rounds[-1][1])
    np.testing.assert_allclose(found['admm_bound'], a[1] / a[0], rtol=1e-5)
    assert found['admm_gap'] < 1e-4 and found['admm_rho'] >= found['admm_bound']


# Four 3x3 kernels, the T-shaped patterns, two kernels to keep.
KERNELS = np.array(
  [
    [0.1, 0.9, 0.2, 0.8, 1, 0.7, 0, 0.1, 0.3],
    [0.8] * 9,
    [0, 1, 0, 1, 1, 0, 0, 1, 0],
    [0.3, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.3],
  ],
  np.float32,
)
PATTERNS = np.array([[bits >> t & 1 for t in range(9)] for bits in (58, 154, 184, 178)], bool)


def pattern(w):
  energies = jnp.square(w) @ jnp.asarray(PATTERNS, w.dtype).T
  mask = jnp.asarray(PATTERNS)[jnp.argmax(energies, -1)]
  return jnp.where(mask, w, 0), mask


def connected(w):
  mask = jnp.broadcast_to(top_k_mask(jnp.sum(jnp.square(w), -1), 2)[:, None], w.shape)
  return jnp.where(mask, w, 0), mask


def joint(w):
  z, mask = pattern(w)
  z, alive = connected(z)
  return z, mask & alive


@functools.partial(jax.jit, static_argnums=0)
def settle(targets, rhos):
  """Rounds on |W - W0|^2 / 2, each row of `rhos` [runs, rounds] a run.

  The largest gap of the last 30 rounds, and the error of the cut.
  """
  tx = optax.chain(*(rules.admm(t, 1.0, 1) for t in targets))
  w0 = jnp.asarray(KERNELS)

  def run(rhos):
    def step(carry, rho):
      w, state = carry
      # What `growth` does when rho changes: the forces rho u stay.
      state = tuple(s._replace(rho=rho, u=s.u * (s.rho / rho)) for s in state)
      grads, state = tx.update(w - w0, state, w)
      gap = jnp.max(jnp.stack([s.gap for s in state]))
      return (w - grads / (1 + len(targets) * rho), state), gap

    (w, _), gaps = lax.scan(step, (w0, tx.init(w0)), rhos)
    cut = joint(w)[0] if len(targets) == 1 else pattern(connected(w)[0])[0]
    return jnp.max(gaps[-30:]), jnp.sum(jnp.square(cut - w0))

  return jax.vmap(run)(rhos)


def constant(*rhos):
  """300 rounds at each rho."""
  return np.repeat(np.float32(rhos)[:, None], 300, axis=1)


def test_one_joint_projection_settles_on_the_optimum():
  gaps, errors = settle((joint,), constant(0.1, 0.5, 0.9, 1.0, 3.0))
  assert np.all(gaps[:3] > 0.5)  # cycles
  assert np.all(gaps[3:] < 1e-5)
  np.testing.assert_allclose(errors[3:], 6.25, rtol=1e-5)
  assert np.all((errors >= 6.2499) & (errors < 6.72))


def test_two_splits_cycle_longer_and_settle_on_worse():
  ramp = np.repeat(np.float32([0.1, 1.0, 10.0]), 100)[None]
  rhos = np.concatenate([constant(0.1, 0.5, 1.0, 1.5, 3.0, 10.0), ramp])
  gaps, errors = settle((pattern, connected), rhos)
  assert np.all(gaps[:3] > 0.2)
  assert np.all(gaps[3:] < 1e-5)
  np.testing.assert_allclose(errors[3:6], 6.63, rtol=1e-5)
  assert np.all((errors[:6] > 6.62) & (errors[:6] < 6.75))
  # A rho that grows finds the optimum all the same.
  np.testing.assert_allclose(errors[6], 6.25, rtol=1e-5)


def test_the_pull_is_the_gradient_of_the_squared_distance():
  target = lambda tree: (jax.tree.map(jnp.zeros_like, tree), {'w': tree['w'] > 9, 'b': None})
  params = {'w': jnp.array([3.0, 4.0]), 'b': jnp.ones(2)}
  tx = rules.admm(target, 2.0, 5)
  grads = {'w': jnp.array([0.5, 0.0]), 'b': jnp.ones(2)}
  pulled, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(pulled['w'], [6.5, 8])  # rho d, not rho d / |d|
  np.testing.assert_array_equal(pulled['b'], grads['b'])
  assert state.z['b'] is None and state.u['b'] is None and state.gap['b'] is None


def test_refreshes_and_stages_come_when_they_should():
  params = {'w': jnp.array([3.0, 1.0])}
  tx = rules.admm(keep_one, (0.1, 1.0, 10.0), 2, stage_steps=5, growth=1.5)
  update = jax.jit(tx.update)
  state = tx.init(params)
  rhos, norms, refreshed = [], [], []
  for i in range(17):
    params = {'w': jnp.array([3.0, 1.0 + 0.01 * i])}
    _, new = update(params, state, params)
    rhos.append(float(new.rho))
    norms.append(float(jnp.linalg.norm(new.u['w'])))
    refreshed.append(not np.array_equal(new.gap['w'], state.gap['w']))
    state = new
  # Five updates a stage; the last one goes on. Refreshes at 2 and 4 of each, restarts at 5 and 10.
  due = [2, 4, 5, 7, 9, 10, 12, 14, 16]
  assert [i for i, x in enumerate(refreshed) if x] == due
  expected = [0.1] * 2 + [0.15] * 2 + [0.225] + [1] * 2 + [1.5] * 2 + [2.25] + [10] * 2
  expected += [15] * 2 + [22.5] * 2 + [33.75]
  np.testing.assert_allclose(rhos, expected, rtol=1e-6)
  assert [i for i in range(1, 17) if norms[i] == 0] == [1, 5, 6, 10, 11]


def test_levels_after_the_cut():
  v = {'w': jnp.array([0.3, -1.2, 0.05, 0.8, -0.4, 0.0])}
  q, h = 0.45, 2

  def three(tree):
    masks = {'w': top_k_mask(jnp.abs(tree['w']), 3)}
    return rules.apply_masks(tree, masks), masks

  def levels(tree, masks):
    del masks
    return {'w': jnp.sign(tree['w']) * q * jnp.clip(jnp.round(jnp.abs(tree['w']) / q), 1, h)}

  params, masks = rules.finalize(three, v, levels=levels)
  np.testing.assert_allclose(params['w'], [0, -0.9, 0, 0.9, -0.45, 0], rtol=1e-6)
  np.testing.assert_allclose(np.sum((params['w'] - v['w']) ** 2), 0.195, rtol=1e-5)
  state = rules.admm(three, 1.0, 1, levels=levels).init(v)
  np.testing.assert_array_equal(state.z['w'], params['w'])
  np.testing.assert_array_equal(state.support['w'], masks['w'])


def test_reset_duals():
  rounds = quadratic([3.0, 1.0, 0.5], 1.0, 3)
  w, state = rounds[-1]
  params = {'w': jnp.asarray(w)}
  chain_state = (optax.EmptyState(), state)
  _, fresh = rules.reset_duals(keep_one, chain_state, params, rho=2.0)
  assert fresh.rho == 2.0 and fresh.count == state.count and not np.any(fresh.u['w'])
  np.testing.assert_array_equal(fresh.z['w'], [3, 0, 0])
  assert rules.reset_duals(keep_one, state, params).rho == 1.0
  with pytest.raises(ValueError, match='found 2'):
    rules.reset_duals(keep_one, (state, state), params)


def test_diagnostics_of_two_links_inside_jit():
  params = trees.linen()
  tx = optax.chain(rules.admm(trees.pairs, 0.1, 1), rules.admm(trees.pairs, 0.2, 1))
  found = jax.jit(rules.diagnostics)(tx.init(params))
  assert {
    f'admm{i}_{x}' for i in ('', '2') for x in ('gap', 'dual', 'bound', 'changed', 'rho')
  } == {*found}
  np.testing.assert_allclose([found['admm_rho'], found['admm2_rho']], [0.1, 0.2], rtol=1e-6)
  assert rules.diagnostics(optax.sgd(0.1).init(params)) == {}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rho': 0.0}, 'rho > 0'),
    ({'rho': ()}, 'rho > 0'),
    ({'every': 0}, 'every=0'),
    ({'growth': 0.9}, 'growth=0.9'),
    ({'rho_max': 1e-5}, 'rho_max=1e-05'),
    ({'rho': (1e-3, 1e-2)}, 'stage_steps'),
    ({'stage_steps': 100}, 'stage_steps=100'),
    ({'rho': (1e-3, 1e-2), 'stage_steps': 2}, 'stage_steps=2 must exceed'),
  ],
)
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    rules.admm(keep_one, **{'rho': 1e-3, 'every': 2, **options})


def test_needs_params():
  tx = rules.admm(keep_one, 1e-3, 1)
  params = {'w': jnp.ones(3)}
  with pytest.raises(ValueError, match=r'tx.update\(grads, state, params\)'):
    tx.update(params, tx.init(params))
