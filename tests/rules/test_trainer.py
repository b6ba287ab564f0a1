"""Rules in the trainer: chains are tried at the start, averages masked, runs resumed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.train import Checkpoints, create_state, make_mesh, make_train_step
from tests.rules import trees

PARAMS = trees.linen()
MASKS = trees.pairs(PARAMS)[1]


def loss_fn(params, model_state, batch, key):
  del key
  h = jnp.maximum(batch['x'] @ params['first']['kernel'] + params['first']['bias'][None], 0)
  y = h @ params['second']['kernel'] + params['second']['bias'][None]
  return jnp.mean(jnp.square(y - batch['x'])), (model_state, {})


def batch(i):
  return {'x': np.random.default_rng(i).normal(size=(16, 8)).astype(np.float32)}


def test_averages_begun_dense_have_the_zeros_of_the_run():
  tx = rules.one_shot(optax.sgd(0.01), trees.pairs, at=2)
  state = create_state(PARAMS, {}, tx, jax.random.key(0), ema=True)
  step = make_train_step(loss_fn, tx, mesh=make_mesh(1), ema_decay=0.9)
  for i in range(3):
    before = rules.masks_of(state.opt_state)
    assert all(np.all(m) for m in jax.tree.leaves(before))
    state, _ = step(state, batch(i))
  masks = rules.masks_of(state.opt_state)
  trees.assert_dead_are_zero(state.ema.params, masks)
  live = np.asarray(masks['first']['kernel'])
  assert np.all(np.asarray(state.ema.params['first']['kernel'])[live] != 0)


def test_a_chain_that_loses_zeros_is_refused_at_the_start():
  wrong = optax.chain(rules.keep_masked(MASKS), optax.sgd(0.1))
  with pytest.raises(ValueError, match='masked weights of first/kernel'):
    create_state(PARAMS, {}, wrong, jax.random.key(0))
  # Abstractly, for shapes only, nothing can be tried.
  jax.eval_shape(lambda: create_state(PARAMS, {}, wrong, jax.random.key(0)))


def test_resumed_from_a_checkpoint_bit_for_bit(tmp_path):
  inner = rules.gradual(optax.sgd(0.1, momentum=0.9), trees.pairs, begin=1, end=5, every=2)
  tx = optax.chain(rules.admm(trees.pairs, 0.1, 2, growth=1.3), inner)
  mesh = make_mesh(1)
  step = make_train_step(loss_fn, tx, mesh=mesh)

  def fresh():
    return create_state(PARAMS, {}, tx, jax.random.key(0))

  state, checkpoints = fresh(), Checkpoints(tmp_path / 'checkpoints')
  for i in range(6):
    if i == 3:
      checkpoints.save(i, state, None)
      checkpoints.wait()
    state, _ = step(state, batch(i))
  restored = checkpoints.restore(fresh()).state
  for i in range(3, 6):
    restored, _ = step(restored, batch(i))
  checkpoints.close()
  trees.assert_same(
    (restored.params, restored.opt_state, restored.step),
    (state.params, state.opt_state, state.step),
  )
