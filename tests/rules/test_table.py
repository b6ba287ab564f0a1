"""Every rule on every kind of tree: what its author might forget."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from fqjax import rules
from tests.rules import trees

STEPS = 5


def _sgd():
  return optax.sgd(0.1, momentum=0.9)


def _inside(rule, **options):
  return lambda params: rule(_sgd(), trees.pairs, **options)


# rule -> params -> transformation; every one renews something within five steps.
RULES = {
  'admm': lambda params: optax.chain(
    rules.admm(trees.pairs, 0.1, 2, growth=1.5, levels=lambda z, masks: z), optax.sgd(0.1)
  ),
  'admm in stages': lambda params: optax.chain(
    rules.admm(trees.pairs, (0.1, 1.0), 1, stage_steps=3), optax.sgd(0.1)
  ),
  'keep_masked': lambda params: optax.chain(_sgd(), rules.keep_masked(trees.pairs(params)[1])),
  'masked_retraining': lambda params: rules.masked_retraining(_sgd(), trees.pairs(params)[1]),
  'gradual': _inside(rules.gradual, begin=1, end=4, every=2),
  'gradual by saliency, in rungs': lambda params: rules.gradual(
    _sgd(), [trees.pairs] * 3, begin=1, end=4, every=2, score='saliency'
  ),
  'one_shot at random': _inside(rules.one_shot, at=2, score='random'),
  'static_sparse': _inside(rules.static_sparse),
  'rigl': _inside(rules.rigl, every=2, end=9),
  'set_': _inside(rules.set_, every=2, end=9),
}
DRAWN = ('one_shot at random', 'static_sparse', 'rigl', 'set_')


def masked(rule):
  return not rule.startswith('admm')


def start(rule, kind='linen', dtype=jnp.float32):
  params = trees.from_linen(kind, trees.linen(dtype=dtype))
  return RULES[rule](params), params


@functools.cache
def plain(rule, kind='linen'):
  """The run that others must repeat: step, first and last (params, state)."""
  tx, params = start(rule, kind)
  # Extra arguments meant for other links pass by.
  step = trees.jitted_step(tx, value=jnp.ones(()), nobody_knows_this=jnp.ones(3))
  first = params, tx.init(params)
  return step, first, trees.train(step, *first, 0, STEPS)


def table(quick):
  """Every rule on every kind of tree; what is not quick runs with the long tests."""
  return pytest.mark.parametrize(
    ('rule', 'kind'),
    [
      pytest.param(rule, kind, marks=() if quick(rule, kind) else pytest.mark.full)
      for rule in RULES
      for kind in trees.KINDS
    ],
  )


def few(rule, kind):
  return kind == 'linen' and rule in ('admm', 'keep_masked', 'rigl')


@table(lambda rule, kind: kind == 'linen' or rule in ('admm', 'keep_masked', 'rigl'))
def test_any_tree_one_program_resumed(rule, kind):
  pytest.importorskip({'haiku': 'haiku', 'equinox': 'equinox'}.get(kind, 'jax'))
  step, first, last = plain(rule, kind)
  assert step._cache_size() == 1
  assert jax.tree.structure(last) == jax.tree.structure(first)
  for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
    assert before.dtype == after.dtype and before.shape == after.shape
    assert before.weak_type == after.weak_type

  # Stopped after three steps, through host memory, and on.
  leaves, structure = jax.tree.flatten(trees.train(step, *first, 0, 3))
  restored = structure.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
  trees.assert_same(trees.train(step, *restored, 3, STEPS), last)
  assert step._cache_size() == 1

  if masked(rule):
    trees.assert_dead_are_zero(last[0], rules.masks_of(last[1]))
  if rule not in DRAWN:  # whose numbers belong to the order of the leaves
    for a, b in zip(trees.by_shape(last[0]), trees.by_shape(plain(rule)[2][0]), strict=True):
      np.testing.assert_array_equal(a, b)


@table(few)
def test_accumulated(rule, kind):
  """Two equal halves of a gradient are that gradient."""
  tx, params = start(rule, kind)
  several = optax.MultiSteps(tx, 2)

  @jax.jit
  def step(params, state, i):
    grads = trees.grads_at((i // 2).astype(jnp.float32), params)
    with jax.numpy_dtype_promotion('standard'):  # optax's accumulation promotes
      updates, state = several.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  end, state = trees.train(step, params, several.init(params), 0, 2 * STEPS)
  # Another program than the plain step: JAX 0.12 rounds a mean of two halves its own way.
  chex.assert_trees_all_close(end, plain(rule, kind)[2][0], rtol=1e-5, atol=1e-6)
  if masked(rule):
    trees.assert_dead_are_zero(end, rules.masks_of(state))


@table(few)
def test_bfloat16(rule, kind):
  tx, params = start(rule, kind, jnp.bfloat16)
  state = tx.init(params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
  dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (state, after)]
  assert dtypes[0] == dtypes[1]
  end, state = trees.train(trees.jitted_step(tx), params, state, 0, STEPS)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(end))
  if masked(rule):
    trees.assert_dead_are_zero(end, rules.masks_of(state))


@table(few)
def test_sharded_equals_unsharded(rule, kind):
  tx, params = start(rule, kind)
  mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  shard = NamedSharding(mesh, PartitionSpec('model'))
  params = jax.device_put(params, shard)
  state = tx.init(params)
  for x in jax.tree.leaves(state):
    assert x.ndim == 0 or x.sharding == shard
  last = trees.train(trees.jitted_step(tx), params, state, 0, STEPS)
  for x in jax.tree.leaves(last):
    assert x.ndim == 0 or x.sharding.is_equivalent_to(shard, x.ndim)
  for a, b in zip(jax.tree.leaves(plain(rule, kind)[2]), jax.tree.leaves(last), strict=True):
    # Norms are float32 sums in another order; masks are equal.
    close = np.testing.assert_array_equal if a.dtype == bool else np.testing.assert_allclose
    close(a, b, **({} if a.dtype == bool else {'rtol': 1e-5, 'atol': 1e-6}))
