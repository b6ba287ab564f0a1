"""Rules in the trainer: chains are tried at the start, averages masked, runs resumed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import quantize, rules
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


def resumed(tmp_path, fresh, step, at=3, total=6):
  """The state of a run, and of one that goes on from a checkpoint in the middle."""
  state, checkpoints = fresh(), Checkpoints(tmp_path / 'checkpoints')
  for i in range(total):
    if i == at:
      checkpoints.save(i, state, None)
      checkpoints.wait()
    state, _ = step(state, batch(i))
  restored = checkpoints.restore(fresh()).state
  for i in range(at, total):
    restored, _ = step(restored, batch(i))
  checkpoints.close()
  return state, restored


def test_mapped_levels_come_back_from_a_checkpoint(tmp_path):
  plan = quantize.make_plan(PARAMS, [('.*/kernel', quantize.Interval(2))])
  tx = optax.chain(
    optax.sgd(0.05, momentum=0.9),
    rules.progressive_mapping(plan, (0, 2, 3, 4), masks=MASKS),
    rules.keep_masked(MASKS),
  )
  step = make_train_step(loss_fn, tx, mesh=make_mesh(1), ema_decay=0.5)

  def fresh():
    return create_state(rules.apply_masks(PARAMS, MASKS), {}, tx, jax.random.key(0), ema=True)

  state, restored = resumed(tmp_path, fresh, step)
  trees.assert_same(
    (restored.params, restored.opt_state, restored.ema), (state.params, state.opt_state, state.ema)
  )
  trees.assert_dead_are_zero(restored.params, MASKS)
  trees.assert_dead_are_zero(restored.ema.params, MASKS)
  levels = np.unique(restored.params['first']['kernel'])
  assert len(levels) <= 5
  # An average of weights that moved is on no level: it is put there by projection, inside the masks.
  average = restored.ema.params
  assert len(np.unique(average['first']['kernel'])) > 5
  exact = quantize.project(plan, average, MASKS)
  assert len(np.unique(exact['first']['kernel'])) <= 5
  trees.assert_dead_are_zero(exact, MASKS)


def test_mixtures_are_averaged_and_come_back_from_a_checkpoint(tmp_path):
  plan = quantize.make_plan(PARAMS, [('.*/kernel', quantize.Mixture(4))])
  start = {'params': PARAMS, 'codebooks': quantize.init_dgms(PARAMS, plan)}
  tx = optax.sgd(0.05)

  def loss(both, model_state, batch, key):
    seen = quantize.effective_params(both['params'], both['codebooks'], 'soft')
    return loss_fn(seen, model_state, batch, key)

  step = make_train_step(loss, tx, mesh=make_mesh(1), ema_decay=0.9)

  def fresh():
    return create_state(start, {}, tx, jax.random.key(0), ema=True)

  state, restored = resumed(tmp_path, fresh, step)
  trees.assert_same((restored.params, restored.ema), (state.params, state.ema))
  for both in (restored.params, restored.ema.params):
    leaf = both['codebooks']['first']['kernel']
    assert isinstance(leaf, quantize.MixtureLeaf)
    assert np.any(leaf.mu != start['codebooks']['first']['kernel'].mu)
    hard = quantize.effective_params(both['params'], both['codebooks'], 'hard')
    assert set(np.unique(hard['first']['kernel'])) <= set(np.asarray(quantize.codebook(leaf)))
  # The averages lag behind what they are averages of.
  ends = [
    both['codebooks']['first']['kernel'].mu for both in (restored.params, restored.ema.params)
  ]
  assert np.any(ends[0] != ends[1])


def test_resumed_from_a_checkpoint_bit_for_bit(tmp_path):
  inner = rules.gradual(optax.sgd(0.1, momentum=0.9), trees.pairs, begin=1, end=5, every=2)
  tx = optax.chain(rules.admm(trees.pairs, 0.1, 2, growth=1.3), inner)
  mesh = make_mesh(1)
  step = make_train_step(loss_fn, tx, mesh=mesh)

  def fresh():
    return create_state(PARAMS, {}, tx, jax.random.key(0))

  state, restored = resumed(tmp_path, fresh, step)
  trees.assert_same(
    (restored.params, restored.opt_state, restored.step),
    (state.params, state.opt_state, state.step),
  )
