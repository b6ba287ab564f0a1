"""Bytes of unstructured and structured networks: curves, break-even rates, the comparison."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import admm_nn_s as configs
from experiments import formats, levels, tasks
from fqjax import quantize, rules, sparsity

# A structured network stores its values and nothing else.
POINTS = (
  formats.Point(0.0, 1.0, 4096.0),
  formats.Point(-0.5, 4.0, 1024.0),
  formats.Point(-1.5, 16.0, 256.0),
)
CURVE = formats.Curve(POINTS)


@pytest.mark.parametrize(
  ('change', 'rate'),
  [(0.0, 1.0), (-0.25, 2.0), (-0.5, 4.0), (-1.0, 8.0), (-1.5, 16.0), (-9.0, 16.0), (0.1, None)],
)
def test_rate_at_equal_accuracy(change, rate):
  found = CURVE.rate_at(change)
  assert found == rate if rate is None else found == pytest.approx(rate)


def test_a_dip_on_the_way_does_not_hide_a_better_rung():
  dip = formats.Curve((POINTS[0], formats.Point(-2.0, 4.0, 1024.0), POINTS[2]))
  assert dip.rate_at(-1.5) == pytest.approx(16.0)


@pytest.mark.parametrize(('rate', 'size'), [(1, 4096), (2, 2048), (8, 512), (16, 256), (64, 64)])
def test_bytes_and_rates_are_inverse(rate, size):
  assert CURVE.bytes_at(rate) == pytest.approx(size)
  assert CURVE.rate_of(size) == pytest.approx(rate)


def test_break_even_of_random_zeros_is_near_that_of_the_entropy():
  """A weight takes its value and a little more than the entropy of its place."""
  rng, density = np.random.default_rng(0), 1 / 16
  w = rng.normal(size=(512, 512)) * (rng.random((512, 512)) < density)
  params = {'fc': {'kernel': jnp.asarray(w, jnp.float32)}}
  plan = sparsity.make_plan(params, [('.*/kernel', sparsity.Unstructured(keep=density))])
  found = formats.stored(plan, params)
  for bits in formats.BITS:
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    each = bits + entropy / density
    sizes = {f'coded_bytes_{bits}': w.size * bits / 8 / 16}
    structured = formats.curve(
      [{'change': 0.0, 'compression': 16.0, 'weights': w.size, **sizes}], bits
    )
    rate = structured.rate_of(found[f'coded_bytes_{bits}'])
    assert rate == pytest.approx(bits / (density * each), rel=0.02)


def test_structure_costs_no_index():
  rng = np.random.default_rng(0)
  params = {'fc': {'kernel': jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}}
  plans = {
    'unstructured': sparsity.Unstructured(keep=0.25),
    'structured': sparsity.Both(sparsity.Filters(keep=0.5), sparsity.Columns(keep=0.5)),
  }
  found = {}
  for name, structure in plans.items():
    plan = sparsity.make_plan(params, [('.*/kernel', structure)])
    pruned, _ = rules.finalize(plan, params)
    found[name] = formats.stored(plan, pruned, (2,))['coded_bytes_2']
  values = 64 * 64 * 2 / 8 / 4
  assert values <= found['structured'] < 1.25 * values < 1.5 * values < found['unstructured']


def test_levels_count_their_table_and_mixed_bits_are_left_out():
  rng = np.random.default_rng(0)
  params = {name: {'kernel': jnp.asarray(rng.normal(size=(32, 32)), jnp.float32)} for name in 'ab'}
  masks = {name: {'kernel': jnp.asarray(rng.random((32, 32)) < 0.1)} for name in 'ab'}

  def network(rules):
    plan = quantize.make_plan(params, rules)
    books = quantize.fit(plan, params, masks)
    state = tasks.Variables(quantize.project(plan, params, masks, codebooks=books), {})
    return levels.Quantized(plan, state, books, books, masks)

  same = network([('.*', quantize.Interval(3))])
  ((name, size),) = formats.stored_levels(same).items()
  costs = quantize.sizes(same.plan, same.variables.params, masks, codebooks=same.codebooks)
  assert (name, size) == ('coded_bytes_3', costs.bytes)
  assert size > levels.weights_only(same)['value_bytes']
  mixed = network([('a/.*', quantize.Interval(3)), ('b/.*', quantize.Interval(2))])
  assert formats.stored_levels(mixed) == {}


def entry(setting, rung, change, rate, sizes):
  return {
    'setting': setting, 'rung': rung, 'change': change, 'change_spread': 0.1, 'weights': 8192,
    'compression': rate, **{f'coded_bytes_{bits}': size for bits, size in sizes.items()},
  }  # fmt: skip


def test_comparison_takes_trained_levels_where_both_kinds_have_them():
  config = configs.get_config('lenet5')
  floats = {bits: 8192 * bits / 8 for bits in formats.BITS}
  at = lambda rate, index: {b: size / rate * (b + index) / b for b, size in floats.items()}
  summary = [
    entry('unstructured', 0, -0.1, 16.0, at(16, 4)),
    entry('structured', 0, -0.1, 4.0, at(4, 0)),
    entry('structured', 1, -0.3, 8.0, at(8, 0)),
    entry('interval3', 0, -0.2, 16.0, {3: at(16, 4)[3]}),
    entry('interval3_structured', 1, -0.2, 8.0, {3: at(8, 0)[3]}),
    entry('binary', 0, -0.1, 1.0, {1: 1024}),
  ]
  (four,), (three,) = (formats.compare(config, summary, bits) for bits in (4, 3))
  assert (four['trained'], three['trained']) == (False, True)
  # 16x with four bits of index a value of four: twice the bytes, so 8x breaks even.
  assert four['break_even'] == pytest.approx(8.0)
  assert four['structured_rate'] == pytest.approx(4.0)
  assert four['structured_bytes'] == pytest.approx(1024) and four['bytes'] == pytest.approx(512)
  assert three['structured_rate'] == pytest.approx(8.0)
  assert three['break_even'] == pytest.approx(16 * 3 / 7)
  (table,) = formats.tables(config, summary)
  smaller = {row[0]: row[-1] for row in table.rows}
  assert smaller['4 bits, accuracy of float'] == 'unstructured'
  assert smaller['3 bits, trained'] == 'structured'
  assert formats.tables(config, summary[:1]) == []
