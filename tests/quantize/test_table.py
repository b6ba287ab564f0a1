"""Every quantizer in every rule on every kind of tree: what its author might forget."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from fqjax import quantize, rules
from fqjax.quantize import Binary, Interval, PowerOfTwo, Ternary, Uniform
from tests.rules import trees

STEPS = 5
QUANTIZERS = {
  'interval': Interval(2),
  'interval per channel': Interval(3, per='channel'),
  'power of two': PowerOfTwo(3),
  'binary': Binary(),
  'ternary per channel': Ternary('channel'),
  'int8': Uniform(),
  'int4 clipped': Uniform(4, clip='mse'),
}
# row -> (quantizer, way to it)
ROWS = {
  **{f'admm, {name}': (quantizer, 'admm') for name, quantizer in QUANTIZERS.items()},
  'straight-through, binary': (Binary('channel'), 'straight-through'),
  'straight-through, int8': (Uniform(), 'straight-through'),
  'mapping, interval': (Interval(2), 'mapping'),
  'mapping, ternary': (Ternary(), 'mapping'),
}
FEW = ('admm, interval', 'straight-through, int8', 'mapping, interval')


def masks_of(params):
  """Every second weight of a matrix is alive, so that masks take part everywhere."""
  mask = lambda w: (jnp.arange(w.size).reshape(w.shape) % 2 == 0) if w.ndim > 1 else None
  return jax.tree.map(mask, params)


def start(row, kind='linen', dtype=jnp.float32):
  """Transformation, what the loss sees, params."""
  quantizer, way = ROWS[row]
  params = trees.from_linen(kind, trees.linen(dtype=dtype))
  masks = masks_of(params)
  params = rules.apply_masks(params, masks)
  plan = quantize.make_plan(params, [('.*(kernel|w)', quantizer)])
  sgd = optax.sgd(0.1, momentum=0.9)
  seen = lambda params: params
  if way == 'admm':
    pull = rules.admm(quantize.target(plan, masks), 0.5, 2, growth=1.5)
    tx = optax.chain(pull, optax.sgd(0.1), rules.keep_masked(masks))
  elif way == 'mapping':
    mapping = rules.progressive_mapping(plan, (1, 2, 3), (0.5, 0.75, 1), masks=masks)
    tx = optax.chain(sgd, mapping)
  else:
    tx = optax.chain(sgd, rules.keep_masked(masks))
    seen = lambda params: quantize.straight_through(plan)(params, masks)
  return tx, seen, params


def stepper(tx, seen, times=1):
  """`step(params, state, i) -> (params, state)`, one program."""

  @jax.jit
  def step(params, state, i):
    at, pull_back = jax.vjp(seen, params)
    [grads] = pull_back(trees.grads_at((i // times).astype(jnp.float32), at))
    # optax's accumulation promotes.
    with jax.numpy_dtype_promotion('standard' if times > 1 else 'strict'):
      updates, state = tx.update(grads, state, params, value=jnp.ones(()), nobody_knows=jnp.ones(3))
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def plain(row, kind='linen'):
  """The run that others must repeat: step, first and last (params, state)."""
  tx, seen, params = start(row, kind)
  step = stepper(tx, seen)
  first = params, tx.init(params)
  return step, first, trees.train(step, *first, 0, STEPS)


def assert_masked_are_zero(params):
  trees.assert_dead_are_zero(params, masks_of(params))


def table(quick):
  return pytest.mark.parametrize(
    ('row', 'kind'),
    [
      pytest.param(row, kind, marks=() if quick(row, kind) else pytest.mark.full)
      for row in ROWS
      for kind in trees.KINDS
    ],
  )


def few(row, kind):
  return kind == 'linen' and row in FEW


@table(lambda row, kind: kind == 'linen' or row == 'admm, interval')
def test_any_tree_one_program_resumed(row, kind):
  pytest.importorskip({'haiku': 'haiku', 'equinox': 'equinox'}.get(kind, 'jax'))
  step, first, last = plain(row, kind)
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
  assert_masked_are_zero(last[0])
  for a, b in zip(trees.by_shape(last[0]), trees.by_shape(plain(row)[2][0]), strict=True):
    # Leaves in another order are another program, and scales are float32 sums.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@table(few)
def test_accumulated(row, kind):
  """Two equal halves of a gradient are that gradient."""
  tx, seen, params = start(row, kind)
  several = optax.MultiSteps(tx, 2)
  step = stepper(several, seen, times=2)
  end, _ = trees.train(step, params, several.init(params), 0, 2 * STEPS)
  chex.assert_trees_all_close(end, plain(row, kind)[2][0], rtol=1e-5, atol=1e-6)
  assert_masked_are_zero(end)


@table(few)
def test_bfloat16(row, kind):
  tx, seen, params = start(row, kind, jnp.bfloat16)
  state = tx.init(params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
  dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (state, after)]
  assert dtypes[0] == dtypes[1]
  end, _ = trees.train(stepper(tx, seen), params, state, 0, STEPS)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(end))
  assert_masked_are_zero(end)


@table(few)
def test_sharded_equals_unsharded(row, kind):
  tx, seen, params = start(row, kind)
  mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  shard = NamedSharding(mesh, PartitionSpec('model'))
  params = jax.device_put(params, shard)
  state = tx.init(params)
  for x in jax.tree.leaves(state):
    assert x.ndim == 0 or x.sharding == shard
  last = trees.train(stepper(tx, seen), params, state, 0, STEPS)
  for x in jax.tree.leaves(last[0]):
    assert x.sharding.is_equivalent_to(shard, x.ndim)
  for a, b in zip(jax.tree.leaves(plain(row, kind)[2]), jax.tree.leaves(last), strict=True):
    # Means are float32 sums in another order; which level is nearest is the same.
    close = np.testing.assert_array_equal if a.dtype == bool else np.testing.assert_allclose
    close(a, b, **({} if a.dtype == bool else {'rtol': 1e-5, 'atol': 1e-6}))
