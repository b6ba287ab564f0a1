"""A plan on whole trees: masks, codebooks that stay, pruning with levels, straight-through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import rules, sparsity
from fqjax.quantize import (
  Binary,
  Interval,
  Ternary,
  exact_scale,
  fit,
  make_plan,
  project,
  straight_through,
  target,
)
from tests.sparsity.trees import KINDS, net

RNG = np.random.default_rng(0)
PARAMS = {
  'a': jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32),
  'b': jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
  'bias': jnp.ones(3),
}
MASKS = {'a': jnp.asarray(RNG.random((6, 4)) < 0.5), 'b': None, 'bias': None}
PLAN = make_plan(PARAMS, [('a', Interval(2)), ('b', Binary('channel'))])


@pytest.mark.parametrize('kind', KINDS)
def test_any_tree_under_jit(kind):
  params, _, layout, conv, dense, weights = net(kind)
  plan = make_plan(params, [(weights, Binary('channel'))], layout=layout)
  new = project(plan, params)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  books = fit(plan, params)
  again = project(plan, params, codebooks=books)
  jax.tree.map(
    lambda a, b: a is b or np.testing.assert_array_equal(a, b),
    new, again,
  )  # fmt: skip
  values, levels = (sparsity._tree.flatten(tree)[0] for tree in (params, new))
  for path, w in values.items():
    if path in (conv, dense):
      axes = (1, 2, 3)[: w.ndim - 1] if kind == 'equinox' else tuple(range(w.ndim - 1))
      q = np.abs(w).mean(axes, keepdims=True)
      np.testing.assert_allclose(levels[path], np.where(np.asarray(w) < 0, -q, q), rtol=1e-5)
    else:
      assert levels[path] is w


def test_masks_and_codebooks():
  new = project(PLAN, PARAMS, MASKS)
  assert np.all(np.asarray(new['a'])[~np.asarray(MASKS['a'])] == 0)
  assert len(np.unique(np.asarray(new['a']))) == 5
  assert new['bias'] is PARAMS['bias']
  books = fit(PLAN, PARAMS, MASKS)
  assert books['bias'] is None and books['a'].shape == (5,) and books['b'].shape == (3, 3)
  moved = jax.tree.map(lambda w: 0.9 * w, PARAMS)
  held = project(PLAN, moved, MASKS, codebooks=books)
  assert set(np.unique(held['a'])) <= set(np.asarray(books['a']).tolist())
  exact = fit(PLAN, PARAMS, MASKS, exact=True)
  live = np.asarray(PARAMS['a'])[np.asarray(MASKS['a'])]
  assert exact['a'][3] == np.float32(exact_scale(live, (1, 2)).scale)


def test_one_program_for_a_plan():
  step = jax.jit(functools.partial(project, PLAN))
  step(PARAMS, MASKS)
  step(jax.tree.map(lambda x: x + 1, PARAMS), MASKS)
  assert step._cache_size() == 1


def test_levels_of_admm_and_finalize_together_with_pruning():
  pruning = sparsity.make_plan(
    PARAMS,
    [('a', sparsity.Unstructured(keep=0.5)), ('b', sparsity.Unstructured(keep=1.0))],
  )
  levels = functools.partial(project, PLAN)
  new, masks = rules.finalize(pruning, PARAMS, levels=levels)
  assert np.count_nonzero(new['a']) == 12 and np.all((new['a'] != 0) == masks['a'])
  want = project(PLAN, PARAMS, masks)
  np.testing.assert_array_equal(new['a'], want['a'])
  np.testing.assert_array_equal(new['b'], want['b'])
  state = rules.admm(pruning, 0.1, 1, levels=levels).init(PARAMS)
  np.testing.assert_array_equal(state.z['a'], new['a'])
  assert state.z['bias'] is None


def test_target_alone_and_of_a_pruned_network():
  new, masks = target(PLAN)(PARAMS)
  assert masks['bias'] is None and np.all(masks['a']) and np.all(masks['b'])
  np.testing.assert_array_equal(new['a'], project(PLAN, PARAMS)['a'])
  new, masks = rules.finalize(target(PLAN, MASKS), PARAMS)
  np.testing.assert_array_equal(masks['a'], MASKS['a'])
  np.testing.assert_array_equal(new['a'], project(PLAN, PARAMS, MASKS)['a'])


def test_straight_through():
  quantized = straight_through(PLAN)
  new = quantized(PARAMS, MASKS)
  for path, z in project(PLAN, PARAMS, MASKS).items():
    np.testing.assert_array_equal(new[path], z)
  slope = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=w.shape), w.dtype), PARAMS)
  loss = lambda p: sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (quantized(p, MASKS), slope))))  # fmt: skip
  found = jax.jit(jax.grad(loss))(PARAMS)
  np.testing.assert_array_equal(found['a'], np.where(MASKS['a'], slope['a'], 0))
  np.testing.assert_array_equal(found['b'], slope['b'])
  np.testing.assert_array_equal(found['bias'], slope['bias'])
  books = fit(PLAN, PARAMS)
  held = quantized(jax.tree.map(lambda w: 2 * w, PARAMS), None, books)
  assert set(np.unique(held['b'][:, 0])) <= set(np.asarray(books['b'][0]).tolist())


def test_training_straight_through_finds_signs_that_rounding_misses():
  """Inputs that depend on each other: the nearest signs are not the best ones."""
  rng = np.random.default_rng(3)
  mix = rng.normal(size=(8, 8))
  x = jnp.asarray(rng.normal(size=(64, 8)) @ mix, jnp.float32)
  w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
  quantized = straight_through(make_plan({'w': w}, [('w', Binary('channel'))]))
  loss = jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(x @ (quantized(p)['w'] - w)))))
  params, losses = {'w': w}, []
  for _ in range(30):
    value, grads = loss(params)
    losses.append(float(value))
    params = jax.tree.map(lambda a, g: a - 0.01 * g, params, grads)
  assert min(losses) < 0.7 * losses[0]


def test_fully_binarized():
  params, _, layout, conv, dense, weights = net('haiku')
  plan = make_plan(params, [(weights, Binary())], layout=layout)
  assert {entry.path for entry in plan.quantized} == {conv, dense}
  new = sparsity._tree.flatten(project(plan, params))[0]
  assert all(len(np.unique(new[path])) == 2 for path in (conv, dense))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'params': {**PARAMS, 'a': jnp.ones((5, 4))}}, r"'a' is \[6, 4\] in the plan and \[5, 4\]"),
    ({'params': {'a': PARAMS['a']}}, "it has 'b', the parameters do not"),
    ({'params': {**PARAMS, 'c': jnp.ones(1)}}, "the parameters have 'c'"),
    ({'params': {**PARAMS, 'a': PARAMS['a'].at[0, 0].set(jnp.nan)}},
     "'a' holds NaN or infinite weights; no level"),
    ({'masks': {'a': jnp.ones((6, 3), bool)}}, "tree of masks is of another model: 'a' is"),
    ({'masks': {'a': jnp.ones((6, 4))}}, "mask of 'a' is float32; make it bool"),
    ({'codebooks': {'a': jnp.ones(5)}}, 'codebooks are of another model'),
    ({'codebooks': {'a': jnp.ones(5), 'b': None, 'bias': None}}, "have nothing for 'b'"),
    ({'codebooks': {'a': jnp.ones(9), 'b': jnp.ones((3, 3)), 'bias': None}},
     r"another plan or model: 'a': a codebook \[9\] is not one of Interval.*\[5\]"),
    ({'codebooks': {'a': jnp.ones(5), 'b': jnp.ones((4, 3)), 'bias': None}},
     r"'b': a codebook \[4, 3\] .*\[3, 3\]"),
  ],
)  # fmt: skip
def test_refusals(change, message):
  given = {'params': PARAMS, 'masks': MASKS, **change}
  with pytest.raises(ValueError, match=message):
    project(PLAN, given.pop('params'), given.pop('masks'), **given)


def test_a_leaf_of_zeros_stays_zero():
  params = {'a': jnp.zeros((3, 3))}
  plan = make_plan(params, [('a', Ternary())])
  assert not np.any(project(plan, params)['a'])
