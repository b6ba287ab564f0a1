"""Targets: plans and functions, frozen zeros, the final cut, the ladder, the straight-through pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import NM, Unstructured, make_plan
from tests.rules import trees


def plan_for(params, keep):
  return make_plan(params, [('.*/kernel', Unstructured(keep=keep))])


def test_finalize_takes_masks_from_the_same_call():
  """A kept weight that is zero stays in the mask; ties keep exactly the count."""
  params = {'kernel': jnp.array([[0.0, 0.0, 2.0, 0.0]])}
  pruned, masks = rules.finalize(trees.largest(0.5), params)
  np.testing.assert_array_equal(pruned['kernel'], params['kernel'])
  np.testing.assert_array_equal(masks['kernel'], [[True, False, True, False]])


@pytest.mark.parametrize('bad', [np.nan, -np.inf])
def test_finalize_refuses_weights_that_have_no_order(bad):
  params = trees.linen()
  params['second']['kernel'] = params['second']['kernel'].at[3, 2].set(bad)
  with pytest.raises(ValueError, match='second/kernel holds NaN or infinite weights.*Restore'):
    rules.finalize(trees.pairs, params)
  params = trees.linen()
  params['second']['bias'] = params['second']['bias'].at[0].set(bad)
  rules.finalize(trees.pairs, params)  # what is not ranked is not looked at


@pytest.mark.parametrize('kind', trees.KINDS)
def test_a_plan_is_a_target_on_any_tree(kind):
  pytest.importorskip({'haiku': 'haiku', 'equinox': 'equinox'}.get(kind, 'jax'))
  params = trees.from_linen(kind, trees.linen())
  plan = make_plan(params, [('.*(kernel|w)', Unstructured(keep=0.25))])
  prune = rules.straight_through(plan)

  @jax.jit
  def run(params):
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(prune(p)))
    return rules.finalize(plan, params), jax.value_and_grad(loss)(params)

  (pruned, masks), (loss, grads) = run(params)
  expected, expected_masks = trees.largest(0.25)(params)
  trees.assert_same(pruned, expected)
  trees.assert_same(masks, expected_masks)
  trees.assert_same(grads, jax.tree.map(lambda x: 2 * x, expected))
  np.testing.assert_allclose(
    loss, sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected)), rtol=1e-5
  )
  state = rules.keep_masked(masks).init(params)
  trees.assert_same(rules.apply_masks(params, rules.masks_of(state)), expected)


def test_saliency_ranks_and_values_stay():
  params, saliency = trees.linen(), jax.tree.map(jnp.abs, trees.linen(1))
  found = [
    rules.finalize(target, params, saliency=saliency)
    for target in (plan_for(params, 0.25), trees.largest(0.25))
  ]
  trees.assert_same(*found)
  score, mask = np.asarray(saliency['first']['kernel']), np.asarray(found[0][1]['first']['kernel'])
  trees.assert_same(rules.finalize(trees.largest(0.25), found[0][0]), found[0])  # again: the same
  assert mask.sum() == 32 and score[mask].min() > score[~mask].max()
  kernel = np.asarray(params['first']['kernel'])
  np.testing.assert_array_equal(found[0][0]['first']['kernel'], np.where(mask, kernel, 0))


@pytest.mark.parametrize('make', [plan_for, lambda params, keep: trees.largest(keep)])
def test_frozen_zeros_do_not_come_back(make):
  params = trees.linen()
  _, first = rules.finalize(make(params, 0.5), params)
  other = trees.linen(1)
  target = rules.frozen(make(params, 0.25), first)
  pruned, masks = target(other)
  for layer in first:
    a, b = np.asarray(first[layer]['kernel']), np.asarray(masks[layer]['kernel'])
    assert b.sum() == 0.25 * b.size and not np.any(b & ~a) and masks[layer]['bias'] is None
    kernel = np.where(a, np.asarray(other[layer]['kernel']), 0)
    assert np.abs(kernel[b]).min() > np.abs(kernel[~b]).max()
    np.testing.assert_array_equal(pruned[layer]['kernel'], np.where(b, kernel, 0))
  # Frozen twice is frozen by both.
  again = rules.frozen(target, trees.pairs(params)[1])
  _, both = rules.finalize(again, other)
  pairs = trees.pairs(params)[1]
  assert not np.any(np.asarray(both['first']['kernel'] & ~pairs['first']['kernel']))
  assert not np.any(np.asarray(both['first']['kernel'] & ~first['first']['kernel']))
  assert rules.frozen(target, None) is target


def test_progressive_transfers_and_freezes():
  params = trees.linen()
  keeps = rules.ladder(0.125)
  assert keeps == [0.5, 0.25, 0.125]
  targets = [plan_for(params, keep) for keep in keeps]
  seen = []

  def compress(target, params, masks):
    seen.append((params, masks))
    tx = optax.chain(rules.admm(target, 0.5, 1), optax.sgd(0.1))
    return trees.train(trees.jitted_step(tx), params, tx.init(params), 0, 2)[0]

  def retrain(params, masks):
    tx = rules.masked_retraining(optax.sgd(0.1), masks)
    return trees.train(trees.jitted_step(tx), params, tx.init(params), 0, 2)[0]

  rungs = list(rules.progressive(params, targets, compress, retrain))
  assert [r.index for r in rungs] == [0, 1, 2]
  for i, rung in enumerate(rungs):
    trees.assert_dead_are_zero(rung.params, rung.masks)
    assert int(rung.masks['first']['kernel'].sum()) == 128 * keeps[i]
    before = seen[i]
    trees.assert_same(before, (rungs[i - 1].params, rungs[i - 1].masks) if i else (params, None))
    if i:
      for a, b in zip(
        jax.tree.leaves(rung.masks), jax.tree.leaves(rungs[i - 1].masks), strict=True
      ):
        assert not np.any(np.asarray(a & ~b))
  # Interrupted after the second rung.
  last = rules.progressive(
    rungs[1].params, targets, compress, retrain, first=2, masks=rungs[1].masks
  )
  trees.assert_same(list(last)[0]._asdict(), rungs[2]._asdict())

  idle = lambda target, params, masks: params
  with pytest.raises(ValueError, match='first/kernel on rung 0'):
    list(rules.progressive(params, targets, idle, lambda params, masks: trees.linen(2)))


def test_ladder():
  found = rules.ladder(1 / 36)
  assert len(found) == 6 and found[-1] == 1 / 36
  np.testing.assert_allclose(found, 36.0 ** -(np.arange(1, 7) / 6))
  assert rules.ladder(0.25, start=0.5) == [0.25]
  for bad in ({'keep': 1.0}, {'keep': 0.5, 'factor': 1.0}, {'keep': 0.5, 'start': 0.4}):
    with pytest.raises(ValueError, match='ladder needs'):
      rules.ladder(**bad)


def test_straight_through_with_decay_of_the_pruned():
  """SR-STE: the dense gradient, and a pull to zero on what is pruned at the moment."""
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(8, 4)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
  plan = make_plan({'kernel': jnp.asarray(w)}, [('.*', NM(2, 4))])
  prune = rules.straight_through(plan, decay=0.01)
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(x @ prune(p)['kernel'])))({'kernel': jnp.asarray(w)})
  groups = np.abs(w.reshape(2, 4, 4))
  mask = (np.argsort(np.argsort(-groups, 1), 1) < 2).reshape(8, 4)
  dense = x.astype(np.float64).T @ np.cos(x.astype(np.float64) @ np.where(mask, w, 0))
  np.testing.assert_allclose(
    grads['kernel'], dense + 0.01 * np.where(mask, 0, w), rtol=2e-5, atol=1e-5
  )
  assert prune({'kernel': jnp.asarray(w, jnp.bfloat16)})['kernel'].dtype == jnp.bfloat16
