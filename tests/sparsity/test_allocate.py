"""Budgets against exhaustive search, closed forms and the numbers of the specifications."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import (
  NM,
  BlockMax,
  Filters,
  Layer,
  Patterns,
  Pooled,
  Unstructured,
  allocate,
  allocate_blocks,
  bits,
  describe,
  knapsack,
  make_plan,
  pcnn_codebook,
  project,
  tap_counts,
)

_FREE = [('.*', lambda keep: Unstructured(keep=keep))]


def _params(shapes, seed=0, scales=None):
  rng = np.random.default_rng(seed)
  scales = scales or dict.fromkeys(shapes, 1.0)
  return {k: jnp.asarray(rng.normal(size=s) * scales[k], jnp.float32) for k, s in shapes.items()}


def _keeps(plan):
  return {entry.path: entry.kept / entry.size for entry in plan.entries}


# The knapsack itself.


def _best(costs, values, budget):
  """Exhaustive search."""
  best = -np.inf
  for index in itertools.product(*(range(len(c)) for c in costs)):
    if sum(c[i] for c, i in zip(costs, index)) <= budget + 1e-9:
      best = max(best, sum(v[i] for v, i in zip(values, index)))
  return best


def test_knapsack_against_exhaustive_search():
  rng = np.random.default_rng(0)
  exact = 0
  for _ in range(300):
    sizes = rng.integers(1, 6, rng.integers(1, 5))
    costs = [rng.integers(0, 30, n).astype(float) for n in sizes]
    values = [rng.normal(size=n) for n in sizes]
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    budget = rng.uniform(low, high + 1)
    got, best = knapsack(costs, values, budget), _best(costs, values, budget)
    assert got.cost == pytest.approx(sum(c[i] for c, i in zip(costs, got.choice)))
    assert got.value == pytest.approx(sum(v[i] for v, i in zip(values, got.choice)))
    assert got.cost <= budget * (1 + 1e-9) + 1e-9
    assert got.value <= best + 1e-9 and best <= got.bound + 1e-9
    steps = max(v.max() - v.min() for v in values)
    assert got.bound - got.value <= steps + 1e-9
    exact += got.value > best - 1e-9
  assert exact >= 290  # greedy, but nearly always the optimum


def test_knapsack_of_steps_that_fall_is_the_optimum():
  # Concave values of equal steps: greedy is exact, so must this be.
  rng = np.random.default_rng(1)
  values = np.cumsum(-np.sort(-rng.exponential(size=(40, 9)), 1), 1)
  costs = np.tile(np.arange(1.0, 10.0), (40, 1))
  for spare in (0, 1, 57, 200, 320):
    got = knapsack(costs, values, 40 + spare)
    steps = np.diff(values, axis=1).ravel()
    assert got.value == pytest.approx(values[:, 0].sum() + np.sort(steps)[::-1][:spare].sum())
    assert got.cost == 40 + spare


def test_what_is_left_over_is_spent():
  # The envelope skips the middle choice; only it fits.
  got = knapsack([[0, 4, 10]], [[0.0, 1.0, 9.0]], 7)
  assert got.choice.tolist() == [1] and got.bound == pytest.approx(6.3)


def test_steps_along_a_line_keep_their_order():
  # Equal slopes up to rounding, which raises some of them again.
  values = np.arange(1, 60)[None] * np.array([0.1, 0.3, 0.7])[:, None] / 3
  costs = np.tile(np.arange(1.0, 60.0), (3, 1))
  for budget in (3, 40, 61, 100, 150):
    got = knapsack(costs, values, budget)
    third = min(59, budget - 2)
    second = min(59, budget - third - 1)
    assert got.choice.tolist() == [budget - third - second - 1, second - 1, third - 1]


def test_of_choices_that_cost_the_same_the_best_is_the_base():
  got = knapsack([[0, 0, 1], [0, 10]], [[0.0, 5.0, 9.0], [0.0, 3.0]], 10)
  assert got.choice.tolist() == [2, 0] and got.value == 9


@pytest.mark.parametrize(
  'costs, values, budget, message',
  [
    ([[5, 6], [3]], [[1, 2], [1]], 7, 'budget 7 cannot be met: the cheapest choices cost 8'),
    ([[1]], [[1, 2]], 7, 'for the same groups and choices'),
    ([[1], [1]], [[1]], 7, 'for the same groups and choices'),
    ([[]], [[]], 7, 'at least one choice'),
    ([], [], 7, 'at least one choice'),
    ([[-1]], [[1]], 7, 'must be >= 0, got -1'),
    ([[1]], [[math.nan]], 7, 'must be finite'),
  ],
)
def test_knapsack_refuses(costs, values, budget, message):
  with pytest.raises(ValueError, match=message):
    knapsack(costs, values, budget)


# Uniform, ERK, given.

_SHAPES = {'stem': (3, 3, 3, 16), 'mid': (3, 3, 16, 32), 'big': (512, 64), 'head': (64, 10)}


def _erk(shapes, keep):
  """The published procedure: scale, cap what passes 1, scale the rest again."""
  full = set()
  while True:
    rest = {k: s for k, s in shapes.items() if k not in full}
    raw = {k: sum(s) / math.prod(s) for k, s in rest.items()}
    total = keep * sum(math.prod(s) for s in shapes.values())
    left = total - sum(math.prod(shapes[k]) for k in full)
    scale = left / sum(raw[k] * math.prod(s) for k, s in rest.items())
    over = {k for k in rest if scale * raw[k] >= 1}
    if not over:
      return {k: 1.0 if k in full else scale * raw[k] for k in shapes}
    full |= over


@pytest.mark.parametrize('keep', [0.02, 0.1, 0.3])
def test_erk_against_the_published_procedure(keep):
  plan = allocate(_params(_SHAPES), _FREE, keep=keep, method='erk')
  want, sizes = _erk(_SHAPES, keep), {k: math.prod(s) for k, s in _SHAPES.items()}
  for path, got in _keeps(plan).items():
    assert got == pytest.approx(want[path], abs=1 / sizes[path])
  assert sum(entry.kept for entry in plan.entries) == int(keep * sum(sizes.values()))
  assert keep > 0.02 or len({round(k, 3) for k in want.values()}) == 4


def test_uniform_keeps_the_share_everywhere_and_the_sum_exactly():
  plan = allocate(_params(_SHAPES), _FREE, keep=0.1, method='uniform')
  for entry in plan.entries:
    assert abs(entry.kept - 0.1 * entry.size) < 1
  size = sum(entry.size for entry in plan.entries)
  assert sum(entry.kept for entry in plan.entries) == int(0.1 * size)
  assert f'uniform: {int(0.1 * size):,} of {size:,} weights for a budget of' in describe(plan)


def test_floors_lift_some_layers_and_the_rest_pays():
  floors = [('stem|head', 0.5)]
  plan = allocate(_params(_SHAPES), _FREE, keep=0.1, method='uniform', floors=floors)
  keeps = _keeps(plan)
  assert keeps['stem'] == keeps['head'] == 0.5
  assert keeps['mid'] == pytest.approx(keeps['big'], abs=1e-3) and keeps['mid'] < 0.1
  assert sum(e.kept for e in plan.entries) == int(0.1 * sum(e.size for e in plan.entries))


def test_fixed_structures_are_paid_from_the_budget():
  rules = [('stem', None), ('mid', Unstructured(keep=0.5)), *_FREE]
  plan = allocate(_params(_SHAPES), rules, keep=0.2, method='uniform')
  kept = {entry.path: entry.kept for entry in plan.entries}
  assert kept['stem'] == 432 and kept['mid'] == 2304  # the first is outside
  assert sum(kept.values()) - 432 == int(0.2 * (4608 + 32768 + 640))


def test_given_fractions_by_layer():
  params = _params(_SHAPES)
  plan = allocate(params, _FREE, keep={'stem': 1, 'head|mid': 0.5, '.*': 0.125})
  assert _keeps(plan) == {'stem': 1, 'mid': 0.5, 'big': 0.125, 'head': 0.5}
  assert {e.path: e.reason for e in plan.entries}['big'] == "rule 1 '.*'; keep '.*'"
  with pytest.raises(ValueError, match="keep says nothing for 'big'.*a last entry for the rest"):
    allocate(params, _FREE, keep={'stem|mid|head': 0.5})
  with pytest.raises(ValueError, match="'haed' selects no open layer. Closest: 'head'"):
    allocate(params, _FREE, keep={'haed': 0.5, '.*': 0.5})


def test_uniform_by_work():
  macs = {'stem': 10_000, 'mid': 400_000, 'big': 32_768, 'head': 640}
  plan = allocate(
    _params(_SHAPES), _FREE, keep=0.1, method='uniform', cost='macs', macs=macs,
    floors=[('mid', 0.11)],
  )  # fmt: skip
  keeps = _keeps(plan)
  assert keeps['mid'] == pytest.approx(0.11, abs=1e-3) and keeps['big'] < 0.02
  spent = sum(keeps[path] * macs[path] for path in macs)
  assert 0.098 * sum(macs.values()) < spent <= 0.1 * sum(macs.values())


# The knapsack over layers.


def _energy(w, k):
  return np.sort(np.square(np.asarray(w, np.float64)).ravel())[::-1][:k].sum()


def test_knapsack_finds_the_best_choice_of_each_layer():
  params = _params({'a': (8, 16), 'b': (16, 16), 'c': (4, 8)}, scales={'a': 1, 'b': 0.3, 'c': 2})
  menu = tuple(Unstructured(keep=k) for k in (0.125, 0.25, 0.5, 0.75)) + (None,)
  saliency = {k: jnp.square(w) for k, w in params.items()}
  plan = allocate(params, [('.*', menu)], keep=0.4, saliency=saliency)
  counts = {k: [int(w.size * s) for s in (0.125, 0.25, 0.5, 0.75, 1)] for k, w in params.items()}
  values = [[_energy(params[k], n) for n in counts[k]] for k in params]
  budget = 0.4 * sum(w.size for w in params.values())
  best = _best([counts[k] for k in params], values, budget)
  kept = [entry.kept for entry in plan.entries]
  assert sum(kept) <= budget
  assert sum(_energy(w, n) for w, n in zip(params.values(), kept)) == pytest.approx(best, rel=1e-5)
  assert 'of the best possible' in plan.notes[-1]
  assert len(set(_keeps(plan).values())) > 1


def test_many_choices_approach_one_global_threshold():
  # With fine choices of single weights the optimum is global magnitude pruning.
  params = _params({'a': (32, 32), 'b': (32, 32)}, scales={'a': 1.0, 'b': 3.0})
  saliency = {k: jnp.square(w) for k, w in params.items()}
  grid = [k / 128 for k in range(1, 128)]
  plan = allocate(params, _FREE, keep=0.2, saliency=saliency, grid=grid)
  pooled = Pooled(keep=0.2)
  masks = project(make_plan(params, [('.*', pooled)]), params)[1]
  for entry in plan.entries:
    assert entry.kept == pytest.approx(int(masks[entry.path].sum()), abs=16)


def test_budget_of_work_prunes_where_the_work_is():
  params = _params({'early': (3, 3, 8, 8), 'late': (3, 3, 8, 8)})
  layers = {'early': Layer(1_000_000), 'late': Layer(10_000)}
  saliency = {k: jnp.square(w) for k, w in params.items()}
  plan = allocate(params, _FREE, keep=0.3, cost='macs', layers=layers, saliency=saliency)
  keeps = _keeps(plan)
  assert keeps['late'] == 1 and keeps['early'] < 0.3
  assert plan.entries[1].structure is None and 'knapsack' in plan.entries[1].reason
  same = _keeps(allocate(params, _FREE, keep=0.3, saliency=saliency))
  assert abs(same['early'] - same['late']) < 0.1


def test_saliency_decides_who_keeps_more_and_which_weights():
  params = _params({'a': (16, 16), 'b': (16, 16)})
  worth = {'a': jnp.full((16, 16), 1e-3), 'b': jnp.arange(256.0).reshape(16, 16)}
  plan = allocate(params, _FREE, keep=0.25, saliency=worth)
  assert _keeps(plan)['b'] > 2.5 * _keeps(plan)['a']


def test_choices_that_do_not_fit_are_passed_over():
  params = _params({'a': (4, 8), 'b': (6, 8)})
  menu = (NM(1, 4), NM(1, 2), None)
  plan = allocate(params, [('.*', menu)], keep=0.5)
  assert {e.path: e.structure for e in plan.entries} == {'a': NM(1, 2), 'b': NM(1, 2)}
  with pytest.raises(ValueError, match=r"'b' \[6, 8\] .*no choice fits: .*divide by 4"):
    allocate(params, [('.*', (NM(1, 4),))], keep=0.5)
  plan = allocate(params, [('.*', (NM(1, 4),))], keep=0.8, unfit='dense')
  assert plan.entries[1].structure is None and 'does not fit, dense' in plan.entries[1].reason


@pytest.mark.parametrize('cost', ['bits', 'bytes'])
def test_budget_of_stored_bits(cost):
  params = _params({'a': (16, 32), 'b': (32, 32)}, scales={'a': 1.0, 'b': 3.0})
  saliency = {k: jnp.square(w) for k, w in params.items()}
  menu = (NM(1, 4), NM(2, 4), BlockMax(16), None)
  plan = allocate(params, [('.*', menu)], keep=0.4, cost=cost, saliency=saliency)
  spent = sum(b.total for b in bits(plan, params).values())
  assert 0.3 * 1536 * 32 < spent <= 0.4 * 1536 * 32
  unit = 1 if cost == 'bits' else 8
  assert f'knapsack: {spent / unit:,.0f} of {1536 * 32 / unit:,.0f} {cost}' in plan.notes[-1]
  # 40% of the bytes are less than 40% of the weights: the index is paid for.
  assert sum(e.kept for e in plan.entries) < 0.4 * 1536


def test_budget_in_units_equals_budget_in_shares():
  params = _params({'a': (8, 16), 'b': (16, 16)})
  assert allocate(params, _FREE, keep=0.25).entries == allocate(params, _FREE, budget=96).entries


@pytest.mark.parametrize(
  'rules, settings, message',
  [
    (_FREE, {}, 'give keep= or budget=, exactly one; got keep=None, budget=None'),
    (_FREE, {'keep': 0.1, 'budget': 5}, 'exactly one'),
    (_FREE, {'keep': 0}, r'keep=0 must be in \(0, 1\]'),
    (_FREE, {'keep': 0.1, 'method': 'best'}, "method='best'"),
    (_FREE, {'keep': 0.1, 'cost': 'time'}, "cost='time' must be one of"),
    (_FREE, {'keep': 0.1, 'cost': 'macs'}, "cost='macs' needs macs="),
    (_FREE, {'keep': 0.1, 'cost': 'macs', 'macs': {'a': 1}}, "macs has nothing for 'b'"),
    (_FREE, {'keep': 0.1, 'cost': 'bits', 'method': 'erk'}, "cost='bits' depends on the struct"),
    (_FREE, {'keep': 0.001}, r"0.384 weights cannot be met: .*most of it 'b' \(4\)"),
    (_FREE, {'keep': 0.1, 'floors': [('a', 0.9)]}, r"cannot be met: .*most of it 'a' \(128\)"),
    (_FREE, {'keep': 0.1, 'floors': [('a', 0.9)], 'method': 'erk'},
     r"cannot be met: the least .* 115, most of it 'a' \(115\)"),
    (_FREE, {'keep': 0.1, 'floors': [('c', 0.9)]}, "floor 'c' selects no layer.*Closest: 'a', 'b'"),
    (_FREE, {'keep': 0.1, 'floors': [('a', 9)]}, r"floor \('a', 9\) must be a kept fraction"),
    ([('.*', (NM(1, 4),))], {'keep': 0.5, 'floors': [('a', 0.5)]}, "'a' .*every choice is below its"),
    ([('.*', (NM(1, 4),))], {'keep': 0.5, 'method': 'erk'}, "for kept fractions give a function"),
    ([('.*', Unstructured(keep=0.5))], {'keep': 0.5, 'method': 'erk'}, 'use make_plan'),
    ([('.*', None)], {'keep': 0.5}, 'nothing to allocate'),
    ([('.*', 7)], {'keep': 0.5}, "gives 'a' 7; give a structure, a tuple"),
    ([('.*', lambda keep: Pooled(keep=keep))], {'keep': 0.5}, "already share one budget"),
    (_FREE, {'keep': {'a': 1.5, '.*': 0.5}},
     r"'a' \[8, 16\] \(rule 1 '\.\*'\): keep=1.5 must be in \(0, 1\]; a pruning ratio r is keep=1/r"),
    (_FREE, {'keep': 0.5, 'grid': (0.0, 0.5)}, r"'a' \[8, 16\] .*keep=0.0 must be in \(0, 1\]"),
  ],
)  # fmt: skip
def test_allocate_refuses(rules, settings, message):
  params = _params({'a': (8, 16), 'b': (16, 16)})
  with pytest.raises(ValueError, match=message):
    allocate(params, rules, **settings)


def test_saliency_that_is_not_finite_or_missing_is_refused():
  params = _params({'a': (8, 16), 'b': (16, 16)})
  bad = {'a': jnp.full((8, 16), jnp.nan), 'b': jnp.ones((16, 16))}
  with pytest.raises(ValueError, match="saliency of 'a' must be finite and >= 0"):
    allocate(params, _FREE, keep=0.2, saliency=bad)
  with pytest.raises(ValueError, match="saliency has nothing for 'b'"):
    allocate(params, _FREE, keep=0.2, saliency={'a': bad['b'][:8], 'b': None})
  with pytest.raises(ValueError, match="'a' is abstract"):
    allocate(jax.eval_shape(lambda: params), _FREE, keep=0.2)


# PCNN: n of every layer.


def test_counts_of_taps_of_iid_layers():
  # Relative energy without sensitivity starves the largest layer: 9, 5, 1 at 4.5x.
  rng = np.random.default_rng(0)
  shapes = {'a': (3, 3, 12, 16), 'b': (3, 3, 64, 64), 'c': (3, 3, 128, 128)}
  params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  assert tap_counts(params, [('.*', True)], keep=1 / 4.5) == {'a': 9, 'b': 5, 'c': 1}
  value = [sum(-np.sort(-(p.transpose(3, 2, 0, 1).reshape(-1, 9) ** 2), 1)[:, :n].sum() / (p**2).sum()
               for p, n in zip(params.values(), counts)) for counts in ((9, 5, 1), (2, 2, 2))]  # fmt: skip
  np.testing.assert_allclose(value, [2.330, 1.890], atol=5e-3)
  # A floor for the large layer, or a sensitivity, changes it.
  counts = tap_counts(params, [('.*', True)], keep=1 / 4.5, floors=[('c', 2)])
  assert counts['c'] == 2
  alike = {k: np.square(p) for k, p in params.items()}
  counts = tap_counts(params, [('.*', True)], keep=1 / 4.5, saliency=alike)
  assert set(counts.values()) <= {2, 3} and counts['c'] == 2


def test_counts_of_taps_make_a_plan_and_floors_hold():
  params = _params({'conv1': (3, 3, 3, 8), 'conv2': (3, 3, 8, 16), 'fc': (16, 10)})
  rules = [('fc', None), ('.*', True)]
  counts = tap_counts(params, rules, keep=0.3, floors=[('conv1', 4)])
  assert counts['conv1'] >= 4
  spent = counts['conv1'] * 24 + counts['conv2'] * 128
  assert spent <= 0.3 * 9 * 152 and set(counts) == {'conv1', 'conv2'}
  rules = [
    (path, lambda w, layout, n=n: Patterns(pcnn_codebook(w, layout, n=n, v=4)))
    for path, n in counts.items()
  ]
  plan = make_plan(params, rules)
  assert all(isinstance(entry.structure, Patterns) for entry in plan.pruned)
  assert {e.path: e.kept for e in plan.pruned} == {
    'conv1': counts['conv1'] * 24,
    'conv2': counts['conv2'] * 128,
  }
  with pytest.raises(ValueError, match="floor 10 of 'conv1' must be 1..9"):
    tap_counts(params, [('fc', None), ('.*', True)], keep=0.3, floors=[('conv1', 10)])
  with pytest.raises(ValueError, match="floor 'conv3' selects no layer"):
    tap_counts(params, [('fc', None), ('.*', True)], keep=0.3, floors=[('conv3', 2)])
  with pytest.raises(ValueError, match="'conv1' and 1 more layers: the budget .* cannot be met"):
    tap_counts(params, [('fc', None), ('.*', True)], keep=0.05)


def test_counts_of_taps_by_work():
  params = _params({'a': (3, 3, 8, 8), 'b': (3, 3, 8, 8)})
  counts = tap_counts(params, [('.*', True)], keep=0.3, macs={'a': 100_000, 'b': 1000})
  assert counts['b'] == 9 and counts['a'] == 2


# DARB: the block of every row.


def _rows(seed=0):
  rng = np.random.default_rng(seed)
  scale = np.exp(rng.normal(0, 0.7, (512, 1)))
  return (rng.normal(size=(512, 1024)) * scale).astype(np.float32)


@pytest.mark.parametrize('ratio, energy', [(8, 0.6575), (13, 0.5633), (16, 0.5213), (25, 0.4335)])
def test_blocks_of_rows_reach_the_optimum_of_the_specification(ratio, energy):
  w = _rows()
  square = w.astype(np.float64) ** 2
  plan = allocate_blocks(
    {'w': w}, [('w', True, 'OI')], keep=1 / ratio, menu=range(1, 8), saliency={'w': w**2}
  )
  [entry] = plan.entries
  assert entry.kept <= w.size / ratio < entry.kept * 1.001
  exponents = np.array(entry.structure.exponents)
  assert exponents.min() >= 1 and exponents.max() <= 7
  values = np.stack([square.reshape(512, -1, 2**e).max(2).sum(1) for e in range(1, 8)], 1)
  costs = 1024 / 2.0 ** np.arange(1, 8)
  kept = values[np.arange(512), exponents - 1].sum() / square.sum()
  # The table's optimum stops where the price jumps; ours spends the rest of the budget as well.
  assert energy - 1e-4 <= kept <= energy + 2e-3
  # No allocation passes the Lagrangian dual, at any price.
  dual = lambda price: (values - price * costs).max(1).sum() + price * w.size / ratio
  bound = min(dual(price) for price in np.geomspace(0.1, 100, 1000)) / square.sum()
  assert 0.9995 * bound <= kept <= bound


def test_blocks_are_shared_out_between_layers_and_by_bits():
  w = _rows()
  params = {'loud': 4 * w[:64, :256], 'quiet': w[64:192, :256], 'b': np.ones(4, np.float32)}
  worth = {k: np.square(v) for k, v in params.items()}
  plan = allocate_blocks(params, [('.*', True, 'OI')], keep=1 / 8, saliency=worth, dense=())
  loud, quiet = (e.kept / e.size for e in plan.pruned)
  assert loud > 2 * quiet
  assert sum(e.kept for e in plan.pruned) <= 192 * 256 / 8
  by_bits = allocate_blocks(
    params, [('.*', True, 'OI')], keep=1 / 8, cost='bits', value_bits=8, saliency=worth
  )
  bits = sum(
    3 + 256 // 2**e * (8 + e) for entry in by_bits.pruned for e in entry.structure.exponents
  )
  assert 0.99 * 192 * 256 < bits <= 192 * 256
  masks = project(by_bits, params)[1]
  assert int(masks['loud'].sum()) == by_bits.pruned[0].kept
  assert 'knapsack of rows' in by_bits.notes[-1]
  with pytest.raises(ValueError, match='more layers: the budget .* cannot be met'):
    allocate_blocks(params, [('.*', True, 'OI')], keep=1 / 300, saliency=worth)
  with pytest.raises(ValueError, match="cost='macs' must be"):
    allocate_blocks(params, [('.*', True, 'OI')], keep=1 / 8, cost='macs')


def test_filters_share_a_budget_too():
  params = _params({'a': (3, 3, 4, 16), 'b': (3, 3, 16, 16)}, scales={'a': 5.0, 'b': 1.0})
  worth = {k: jnp.square(v) for k, v in params.items()}
  plan = allocate(
    params, [('.*', lambda k: Filters(keep=k))], keep=0.5, saliency=worth, grid=(0.75, 0.5, 0.25)
  )
  kept = {e.path: e.kept for e in plan.entries}
  assert sum(kept.values()) <= 0.5 * (576 + 2304) and kept['a'] == 576
