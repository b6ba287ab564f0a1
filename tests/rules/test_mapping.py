"""Progressive mapping: which weights go when, that they stay, and to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import quantize, rules
from fqjax.quantize import Binary, Interval, make_plan

RNG = np.random.default_rng(0)
PARAMS = {'w': jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32), 'bias': jnp.zeros(5)}
MASKS = {'w': jnp.asarray(RNG.random((8, 5)) < 0.7), 'bias': None}
PLAN = make_plan(PARAMS, [('w', Interval(2))])


def run(tx, params, steps):
  """Params and the link's state after every step, under gradients that pull every weight on."""

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p: jnp.cos(7 * p) + 0.3, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, seen = tx.init(params), []
  for _ in range(steps):
    params, state = step(params, state)
    seen.append((params, state[-1]))
  return seen


def mapping(at=(0, 3, 6, 9), fractions=(0.5, 0.75, 0.9, 1.0), masks=MASKS):
  return optax.chain(
    optax.sgd(0.01, momentum=0.9), rules.progressive_mapping(PLAN, at, fractions, masks=masks)
  )


def test_nearest_first_then_more_then_all():
  params = rules.apply_masks(PARAMS, MASKS)
  seen = run(mapping(), params, 12)
  live = np.asarray(MASKS['w'])
  counts = [int(np.sum(np.asarray(state.mapped['w']) & live)) for _, state in seen]
  want = [round(f * live.sum()) for f in (0.5, 0.75, 0.9, 1)]
  assert counts == [n for n in want for _ in range(3)]
  # The first go where least is lost.
  z = np.asarray(quantize.project(PLAN, params, MASKS)['w'])
  far = np.where(live, np.abs(np.asarray(params['w']) - z), np.inf)
  first = np.asarray(seen[0][1].mapped['w']) & live
  assert far[first].max() <= far[live & ~first].min()
  for (_, a), (_, b) in zip(seen, seen[1:], strict=False):
    assert np.all(np.asarray(b.mapped['w'])[np.asarray(a.mapped['w'])])


def test_mapped_weights_are_levels_to_the_bit_and_the_rest_moves():
  seen = run(mapping(), rules.apply_masks(PARAMS, MASKS), 12)
  for i in (1, 2, 4, 5, 7, 8, 10, 11):  # from the second update on
    (before, _), (params, state) = seen[i - 1], seen[i]
    mapped = np.asarray(state.mapped['w'])
    np.testing.assert_array_equal(np.asarray(params['w'])[mapped], np.asarray(state.z['w'])[mapped])
    assert np.all(np.asarray(params['w'])[~np.asarray(MASKS['w'])] == 0)
    if not mapped.all():
      assert np.all((before['w'] != params['w'])[~mapped])
  last = seen[-1][0]
  assert len(np.unique(np.asarray(last['w']))) == 5  # four levels and the zero of the masked
  levels = np.abs(np.unique(np.asarray(last['w'])))
  np.testing.assert_allclose(levels[[0, 4]], 2 * levels[[1, 3]], rtol=1e-6)
  assert np.any(last['bias'] != 0)
  # Projecting again changes no code.
  coded = quantize.encode(PLAN, last, MASKS)['w']
  np.testing.assert_allclose(coded.decode(), last['w'], rtol=1e-5)


def test_levels_follow_at_every_mapping():
  seen = run(mapping(), rules.apply_masks(PARAMS, MASKS), 12)
  scales = [float(np.abs(np.asarray(state.z['w'])).max()) for _, state in seen]
  assert len(set(scales)) == 4 and scales[0] == scales[2]


def test_before_the_first_mapping_nothing_is_held_but_zeros():
  params = PARAMS  # masked weights not yet 0
  seen = run(mapping(at=(5, 6), fractions=(0.5, 1)), params, 2)
  live = np.asarray(MASKS['w'])
  assert np.all(np.asarray(seen[0][0]['w'])[~live] == 0)
  assert np.all(np.asarray(seen[0][0]['w'] != params['w'])[live])
  assert rules.mapped_share(seen[0][1]) == 0


def test_share_and_other_plans():
  tx = rules.progressive_mapping(make_plan(PARAMS, [('w', Binary())]), (0, 1), (0.25, 1))
  state = tx.init(PARAMS)
  shares = []
  for _ in range(2):
    _, state = tx.update(PARAMS, state, PARAMS)
    shares.append(float(rules.mapped_share((state,))))
  assert shares == [0.25, 1.0]


def test_what_is_mapped_stays_though_others_come_nearer():
  plan = make_plan({'w': jnp.ones((1, 4))}, [('w', Binary())])
  tx = rules.progressive_mapping(plan, (0, 1, 2), (0.5, 0.6, 1))
  params = {'w': jnp.array([[1.9, -1.9, 3.0, -1.2]])}  # mean 2: the first two are nearest
  _, state = tx.update(params, tx.init(params), params)
  assert state.mapped['w'].tolist() == [[True, True, False, False]]
  params = {'w': jnp.array([[2.0, -2.0, 2.6, -2.2]])}  # mean 2.2: the last one is on its level
  updates, state = tx.update(params, state, params)
  assert state.mapped['w'].tolist() == [[True, True, False, False]]
  np.testing.assert_allclose(updates['w'][0, :2], [0.2, -0.2], rtol=1e-5)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: rules.progressive_mapping(PLAN, (0, 1)), 'ascending step for each of its 4 fractions'),
    (lambda: rules.progressive_mapping(PLAN, (3, 1), (0.5, 1)), 'ascending step'),
    (lambda: rules.progressive_mapping(PLAN, (), ()), 'ascending step'),
    (lambda: rules.progressive_mapping(PLAN, (0, 1), (0.5, 0.9)), 'must ascend from above 0 to 1'),
    (lambda: rules.progressive_mapping(PLAN, (0, 1), (0, 1)), 'must ascend from above 0 to 1'),
    (lambda: rules.progressive_mapping(PLAN, (0,), (1,)).init({'v': PARAMS['w']}), 'another model'),
    (
      lambda: rules.progressive_mapping(PLAN, (0,), (1,), masks={'w': MASKS['w'][:2]}).init(PARAMS),
      "masks is of another model: 'w' is",
    ),
    (
      lambda: rules.progressive_mapping(PLAN, (0,), (1,)).init(
        {**PARAMS, 'w': PARAMS['w'].at[0, 0].set(jnp.nan)}
      ),
      "'w' holds NaN or infinite weights",
    ),
    (lambda: rules.mapped_share(()), 'no progressive_mapping'),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()
