"""Zeros stay exactly zero; `check_chain` finds the chains in which they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from tests.rules import trees

MASKS = trees.pairs(trees.linen())[1]
ONE = MASKS['first']  # of one layer: compiles faster


def chains():
  last = rules.keep_masked(ONE)
  return {
    'sgd': optax.chain(optax.sgd(0.1, momentum=0.9, nesterov=True), last),
    'adam': optax.chain(optax.adam(0.1), last),
    'adamw': optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1), last),
    'lamb': optax.chain(optax.lamb(0.1, weight_decay=0.1), last),
    'lion': optax.chain(optax.lion(0.1), last),
    'adafactor': optax.chain(optax.adafactor(0.1), last),
    'injected': optax.chain(optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), last),
    'warmed up': optax.chain(optax.sgd(optax.linear_schedule(0.0, 0.1, 4)), last),
    'accumulated': optax.MultiSteps(
      optax.chain(optax.adamw(0.1), last), 3
    ).gradient_transformation(),
    'inside masks': rules.masked_retraining(optax.adamw(0.1, weight_decay=0.1), ONE),
  }


@pytest.mark.promotes('optimizers of optax')
@pytest.mark.parametrize('name', chains())
def test_exact_zeros_under_any_optimizer(name):
  tx = chains()[name]
  params = dense = trees.linen()['first']
  step = trees.jitted_step(tx)
  state = tx.init(params)
  several = 3 if name == 'accumulated' else 1
  params, state = trees.train(step, params, state, 0, several)
  trees.assert_dead_are_zero(params, ONE)
  params, state = trees.train(step, params, state, several, 4 * several)
  trees.assert_dead_are_zero(params, ONE)
  # Dense weights from elsewhere, moments of another run: one step puts it right.
  params, state = trees.train(step, dense, state, 0, several)
  trees.assert_dead_are_zero(params, ONE)
  assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(params))
  if name == 'inside masks':  # moments of the dead stay zero too
    adam = state.inner_state[0]
    for moments in (adam.mu, adam.nu):
      trees.assert_dead_are_zero(moments, ONE)
      assert np.all(np.asarray(moments['kernel'])[np.asarray(ONE['kernel'])] != 0)
  if name in ('adamw', 'accumulated', 'inside masks'):
    rules.check_chain(tx, params, steps=2)


@pytest.mark.promotes('Adam of optax')
def test_stale_moments_and_decay_for_a_hundred_steps():
  params, grads = trees.linen()['first'], trees.linen(1)['first']
  adam = optax.adam(0.01)
  _, stale = adam.update(grads, adam.init(params), params)
  tx = optax.chain(adam, optax.add_decayed_weights(-1e-2), rules.keep_masked(ONE))
  state = (stale, *tx.init(params)[1:])

  def step(carry, i):
    params, state = carry
    updates, state = tx.update(trees.grads_at(i, params), state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(100.0)))
  (params, _), _ = run((rules.apply_masks(params, ONE), state))
  trees.assert_dead_are_zero(params, ONE)


def test_live_weights_and_other_leaves_as_without_it():
  params = trees.linen()
  plain, tx = optax.sgd(0.1), optax.chain(optax.sgd(0.1), rules.keep_masked(MASKS))
  expected, _ = plain.update(params, plain.init(params), params)
  found, _ = tx.update(params, tx.init(params), params)
  for a, b, m in zip(
    jax.tree.leaves(found),
    jax.tree.leaves(expected),
    jax.tree.structure(params).flatten_up_to(MASKS),
    strict=True,
  ):
    np.testing.assert_array_equal(a if m is None else a[m], b if m is None else b[m])


def test_a_narrow_update_still_lands_on_zero():
  """A float32 weight cannot be undone by a bfloat16 update."""
  params = {'w': jnp.array([0.1, 0.2], jnp.float32)}
  tx = rules.keep_masked({'w': jnp.array([False, True])})
  updates, _ = tx.update({'w': jnp.ones(2, jnp.bfloat16)}, tx.init(params), params)
  assert optax.apply_updates(params, updates)['w'][0] == 0


def test_masks_take_one_byte_a_weight_and_any_form_of_one():
  params = trees.linen()
  numbers = jax.tree.map(lambda m: np.asarray(m, np.uint8), MASKS)
  state = rules.keep_masked(numbers).init(params)
  assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * 8 * 16
  trees.assert_same(state.masks, MASKS)


@pytest.mark.parametrize(
  ('masks', 'message'),
  [
    ({'first': MASKS['first']}, r'Without a mask: second/bias, second/kernel'),
    ({**MASKS, 'third': MASKS['first']}, r'Not in the params: third/bias, third/kernel'),
    (
      {**MASKS, 'first': {'kernel': np.ones((8, 15), bool), 'bias': None}},
      r'mask of first/kernel has shape \[8, 15\], the weights \[8, 16\]',
    ),
  ],
)
@pytest.mark.parametrize('rule', ['keep_masked', 'masked_retraining'])
def test_masks_of_another_model(rule, masks, message):
  tx = {
    'keep_masked': lambda: rules.keep_masked(masks),
    'masked_retraining': lambda: rules.masked_retraining(optax.sgd(0.1), masks),
  }[rule]()
  with pytest.raises(ValueError, match=message):
    tx.init(trees.linen())


def test_needs_params():
  params = trees.linen()
  for tx in (rules.keep_masked(MASKS), rules.masked_retraining(optax.sgd(0.1), MASKS)):
    with pytest.raises(ValueError, match=r'tx.update\(grads, state, params\)'):
      tx.update(params, tx.init(params))


@pytest.mark.promotes('optimizers of optax')
@pytest.mark.parametrize(
  'tx',
  [
    optax.chain(rules.keep_masked(ONE), optax.adam(0.1)),
    optax.chain(optax.sgd(0.1), rules.keep_masked(ONE), optax.add_decayed_weights(0.1)),
    optax.chain(optax.sgd(0.1), rules.keep_masked(ONE), optax.clip_by_global_norm(1.0)),
    optax.MultiSteps(optax.chain(rules.keep_masked(ONE), optax.sgd(0.1)), 4),
    optax.chain(rules.masked_retraining(optax.sgd(0.1), ONE), optax.scale(0.5)),
    optax.chain(rules.keep_masked(ONE), optax.sgd(optax.linear_schedule(0.0, 0.1, 4))),
  ],
  ids=['first', 'decay after', 'clip after', 'accumulated', 'scaled after', 'warmed up'],
)
def test_check_chain_names_leaf_and_remedy(tx):
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  with pytest.raises(ValueError, match=r'64 of 64 masked weights of kernel(.|\n)*last link'):
    rules.check_chain(tx, trees.linen()['first'])


def test_check_chain_of_chains_it_cannot_judge():
  params = trees.linen()
  with pytest.raises(ValueError, match='no masks'):
    rules.check_chain(optax.sgd(0.1), params)
  slow = optax.MultiSteps(rules.keep_masked(MASKS), 100).gradient_transformation()
  with (
    jax.numpy_dtype_promotion('standard'),
    pytest.raises(ValueError, match='no update but zero in 3 steps'),
  ):
    rules.check_chain(slow, params, limit=3)


def test_masks_of_several_rules():
  params = {'a': jnp.ones(3), 'b': jnp.ones(2), 'c': jnp.ones(1)}
  one = {'a': jnp.array([True, True, False]), 'b': None, 'c': None}
  two = {'a': jnp.array([False, True, True]), 'b': jnp.array([True, False]), 'c': None}
  tx = rules.masked_retraining(optax.chain(optax.sgd(0.1), rules.keep_masked(one)), two)
  found = rules.masks_of(tx.init(params))
  np.testing.assert_array_equal(found['a'], [False, True, False])
  np.testing.assert_array_equal(found['b'], [True, False])
  assert found['c'] is None
  assert rules.masks_of(optax.sgd(0.1).init(params)) is None
  assert rules.apply_masks(params, None) is params
