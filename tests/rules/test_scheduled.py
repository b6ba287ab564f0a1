"""Gradual and one-shot pruning against the same written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import NM, Unstructured, make_plan, top_k_mask
from tests.rules import trees


def weights(n=40, seed=0):
  return {'w': jnp.asarray(np.random.default_rng(seed).normal(size=(n // 8, 8)), jnp.float32)}


def follow(tx, params, steps, grads=None):
  """Masks after each update; the gradients pull towards `grads`."""

  @jax.jit
  def step(params, state):
    towards = params if grads is None else jax.tree.map(jnp.subtract, params, grads)
    updates, state = tx.update(towards, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  seen = []
  for _ in range(steps):
    params, state = step(params, state)
    mask = np.asarray(state.masks['w'])
    assert np.all(np.asarray(params['w'])[~mask] == 0)
    seen.append((np.asarray(params['w']), mask))
  return seen


def test_gradual_is_classical_magnitude_pruning():
  params, goal = weights(), weights(seed=1)
  tx = rules.gradual(optax.sgd(0.3), trees.largest(0.2), begin=2, end=9, every=3)
  found = follow(tx, params, 12, goal)

  w, a = np.asarray(params['w'], np.float64), np.asarray(goal['w'], np.float64)
  alive = np.ones(w.shape, bool)
  for count, (got, mask) in enumerate(found):
    if count in (2, 5, 8, 9):
      left = (1 - (count - 2) / 7) ** 3
      keep = 8 + round(left * 32)
      order = np.argsort(-np.where(alive, np.abs(w), -1).ravel(), kind='stable')
      alive = np.zeros(40, bool)
      alive[order[:keep]] = True
      alive = alive.reshape(w.shape)
    w = np.where(alive, w - 0.3 * (w - a), 0)
    np.testing.assert_array_equal(mask, alive)
    np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6)
  assert [m.sum() for _, m in found][-1] == 8


def test_any_structure_ends_as_its_own_projection():
  params = weights()
  plan = make_plan(params, [('w', NM(2, 4, axis='O'))])
  found = follow(rules.gradual(optax.sgd(0.0), plan, begin=0, end=4, every=1), params, 6)
  counts = [m.sum() for _, m in found]
  assert counts[0] == 40 and counts == sorted(counts, reverse=True) and counts[-1] == 20
  np.testing.assert_array_equal(found[-1][1], rules.finalize(plan, params)[1]['w'])
  for (_, before), (_, after) in zip(found, found[1:], strict=False):
    assert np.all(before | ~after)


def test_rungs_remove_what_each_target_removes():
  params = weights()

  def rows(k):
    def target(tree):
      alive = top_k_mask(jnp.sum(jnp.square(tree['w']), -1), k)[:, None]
      masks = {'w': jnp.broadcast_to(alive, tree['w'].shape)}
      return rules.apply_masks(tree, masks), masks

    return target

  tx = rules.gradual(optax.sgd(0.0), [rows(4), rows(2), rows(1)], begin=1, end=4, every=2)
  counts = [m.sum() for _, m in follow(tx, params, 6)]
  assert counts == [40, 32, 32, 16, 8, 8]
  with pytest.raises(ValueError, match='renews 3 times .* has 2 targets'):
    rules.gradual(optax.sgd(0.0), [rows(4), rows(2)], begin=1, end=4, every=2)


def test_ranked_by_saliency_random_and_own_scores():
  params, grads = weights(), weights(seed=1)
  tx = rules.one_shot(optax.sgd(0.0), trees.largest(0.5), score='saliency')
  _, state = tx.update(grads, tx.init(params), params)
  score = np.abs(np.asarray(params['w'], np.float64) * np.asarray(grads['w'], np.float64))
  np.testing.assert_array_equal(state.masks['w'], score >= np.sort(score.ravel())[20])

  drawn = [
    rules.one_shot(optax.sgd(0.0), trees.largest(0.5), score='random', seed=seed)
    for seed in (0, 0, 1)
  ]
  drawn = [np.asarray(tx.update(grads, tx.init(params), params)[1].masks['w']) for tx in drawn]
  assert [m.sum() for m in drawn] == [20, 20, 20]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert np.any(drawn[0] != drawn[2])

  last = lambda params, grads, key: {'w': jnp.arange(40.0).reshape(5, 8)}
  tx = rules.one_shot(optax.sgd(0.0), trees.largest(0.25), score=last)
  _, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(np.flatnonzero(state.masks['w']), np.arange(30, 40))


@pytest.mark.promotes('Adam of optax')
def test_ranked_by_what_the_loss_would_notice():
  # Large weights of which the loss knows little go before small ones that it needs.
  params = {'idle': jnp.full(4, 2.0), 'busy': jnp.array([0.5, 0.5, 0.1, 0.1])}
  half = lambda tree: (tree, top_half(tree))
  tx = rules.gradual(optax.adam(0.0), half, begin=3, end=3, every=1, score='fisher')
  state = tx.init(params)
  grads = {'idle': jnp.full(4, 1e-3), 'busy': jnp.full(4, 1.0)}
  for _ in range(4):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert params['busy'].tolist() == pytest.approx([0.5, 0.5, 0.1, 0.1])
  assert not params['idle'].any()


def top_half(tree):
  both = jnp.concatenate([tree['idle'], tree['busy']])
  mask = top_k_mask(both, 4)
  return {'idle': mask[:4], 'busy': mask[4:]}


def test_second_moments_are_needed():
  tx = rules.gradual(optax.sgd(0.1), lambda t: (t, t), begin=0, end=0, every=1, score='fisher')
  params = {'w': jnp.ones(3)}
  with pytest.raises(ValueError, match='second moments.*has 0'):
    tx.update(params, tx.init(params), params)


def test_one_shot_trains_dense_before():
  tx = rules.one_shot(optax.sgd(0.1), trees.largest(0.5), at=2)
  assert [m.sum() for _, m in follow(tx, weights(), 5)] == [40, 40, 20, 20, 20]


def test_the_dead_start_over():
  """Moments of what dies are those of a fresh start, whatever the optimizer starts from."""
  params = weights()
  tx = rules.one_shot(optax.adagrad(0.1, initial_accumulator_value=0.5), trees.largest(0.5), at=1)
  with jax.numpy_dtype_promotion('standard'):
    state = tx.init(params)
    for _ in range(2):
      _, state = tx.update(params, state, params)
  total = np.asarray(state.inner_state[0].sum_of_squares['w'])
  dead = ~np.asarray(state.masks['w'])
  assert dead.sum() == 20 and np.all(total[dead] == 0.5) and np.all(total[~dead] > 0.5)


def test_polynomial():
  t = np.linspace(0, 1, 6)
  np.testing.assert_allclose(rules.polynomial(0.1, 6), 0.1 + 0.9 * (1 - t) ** 3)
  assert rules.polynomial(0.1, 1) == [0.1]
  assert rules.polynomial(0.1, 2, start=0.5) == [0.5, 0.1]
  with pytest.raises(ValueError, match='keep <= start'):
    rules.polynomial(0.6, 2, start=0.5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'begin': 5, 'end': 4}, 'begin <= end'),
    ({'every': 0}, 'every >= 1'),
    ({'score': 'magnitudes'}, "score='magnitudes'"),
  ],
)
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    rules.gradual(
      optax.sgd(0.1), trees.largest(0.5), **{'begin': 0, 'end': 4, 'every': 1, **options}
    )


def test_a_plan_and_a_function_agree():
  params = weights()
  plan = make_plan(params, [('w', Unstructured(keep=0.3))])
  grads = weights(seed=2)
  for score in ('magnitude', 'saliency'):
    masks = [
      tx.update(grads, tx.init(params), params)[1].masks['w']
      for tx in (
        rules.one_shot(optax.sgd(0.0), target, score=score) for target in (plan, trees.largest(0.3))
      )
    ]
    np.testing.assert_array_equal(*masks)
