"""Whole networks in integers: beside float, beside fake quantization, and refused where they must be."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import quantize, rules
from fqjax.exporter.passes import freeze
from fqjax.quantize import Range
from fqjax.quantize._steps import sources
from fqjax.runtime import reference
from fqjax.tracing import evaluate, to_graph
from tests.quantize import networks


@pytest.fixture(scope='module', params=networks.NETWORKS)
def case(request):
  graph, x = networks.build(request.param)
  return request.param, graph, x, quantize.calibrate(graph, [x[:3], x[3:]], 'min_max')


def test_integers_are_near_float(case):
  name, graph, x, ranges = case
  integers = quantize.integer_graph(graph, ranges)
  [want], [got] = reference.run(graph, [x]), reference.run(integers, [x])
  error = np.abs(got - want).max() / np.abs(want).max()
  # Some half steps of 1/255 on the way.
  assert 0 < error < 0.06, error
  left = [node.op for node in integers.nodes if not node.op.startswith('q')]
  allowed = {
    'residual': set(),
    'mobile': {'reshape'},
    'joined': {'pool_max', 'reverse', 'pad'},
  }.get(name)
  if allowed is not None:
    assert set(left) - {'dequantize'} == allowed
    assert left.count('dequantize') == 1 and quantize.float_layers(graph) == ()
  else:
    said = ' '.join(quantize.float_layers(graph))
    made = {node.op for node in integers.nodes if node.op.startswith('q')}
    # Nothing of the norm and the softmax is rounded.
    assert made == {'quantize', 'qconv', 'qsum', 'qdot'}
    assert 'LayerNorm' in said and 'exp' in said and 'conv' not in said and 'dot' not in said


def test_fake_quant_is_within_one_step(case):
  """Step by step, each from the same integers: what a step is off by, the next may enlarge."""
  name, graph, x, ranges = case
  steps = quantize.find_steps(graph)
  scales = sources(graph, steps)
  integers = quantize.integer_graph(graph, ranges)
  made = {tensor for node in integers.nodes for tensor in node.outputs}
  stored = [tensor for tensor in scales if f'{tensor}:u8' in made]
  inside = dataclasses.replace(integers, outputs=tuple(f'{tensor}:u8' for tensor in stored))
  exact = dict(zip(stored, reference.run(inside, [x]), strict=True))
  different, count = 0, 0
  for step in steps:
    if not step.integer or not set(step.inputs) <= set(exact):
      continue
    chosen = {tensor: ranges[scales[tensor]] for tensor in (*step.inputs, step.output)}
    alone = dataclasses.replace(graph, inputs=step.inputs, nodes=step.nodes, outputs=(step.output,))
    given = [
      reference.dequantize(exact[tensor], chosen[tensor].scale, chosen[tensor].zero)
      for tensor in step.inputs
    ]
    [fake] = quantize.fake_quant(alone, quantize.init_fake_quant(alone, chosen), given)
    scale, zero = chosen[step.output].scale, chosen[step.output].zero
    off = np.abs(np.asarray(fake) - reference.dequantize(exact[step.output], scale, zero)) / scale
    assert off.max() <= 1.001, step
    different, count = different + (off > 0.5).sum(), count + off.size
  # Only a product on a half, within float32's rounding, may fall to either side.
  assert count > 500 and different <= 0.005 * count, (different, count)


def test_fake_quant_of_whole_networks(case):
  _, graph, x, ranges = case
  params = quantize.init_fake_quant(graph, ranges)
  [fake] = jax.jit(lambda p, x: quantize.fake_quant(graph, p, [x]))(params, x)
  [exact] = reference.run(quantize.integer_graph(graph, ranges), [x])
  assert np.abs(fake - exact).mean() < 0.003 * np.abs(exact).max()


def test_clamps_end_inside_wider_ranges():
  """A ReLU6 whose range reaches from -6 to 12 still ends at 0 and 6."""
  graph, x = networks.build('mobile')
  steps = [step for step in quantize.find_steps(graph) if step.high == 6]
  ranges = quantize.calibrate(graph, [x], 'min_max')
  ranges |= {step.output: Range(-6.0, 12.0) for step in steps}
  integers = quantize.integer_graph(graph, ranges)
  stored = tuple(f'{step.output}:u8' for step in steps)
  assert len(stored) == 2
  for q in reference.run(dataclasses.replace(integers, outputs=stored), [3 * x]):
    # Steps of 18 / 255: 85 is zero, 85 more are 6.
    assert (q.min(), q.max()) == (85, 170)


def test_any_seed_any_batch():
  graph, x = networks.build('mobile', seed=3)
  integers = quantize.integer_graph(graph, quantize.calibrate(graph, [x], 'min_max'))
  [whole] = reference.run(integers, [x])
  for i in range(len(x)):
    np.testing.assert_array_equal(reference.run(integers, [x[i : i + 1]])[0], whole[i : i + 1])


@pytest.mark.parametrize('name, layer', [('residual', '.*/Conv_[01]'), ('mobile', '.*/Dense_0')])
def test_chosen_layers_stay_in_float(name, layer):
  graph, x = networks.build(name)
  chosen = {'in_float': layer}
  ranges = quantize.calibrate(graph, [x], 'min_max', **chosen)
  whole = quantize.calibrate(graph, [x], 'min_max')
  # Nothing else changes, and nobody asks for ranges of what is not rounded.
  assert ranges.items() < whole.items()
  integers = quantize.integer_graph(graph, ranges, **chosen)
  scopes = {node.scope for node in integers.nodes if node.op in ('conv', 'dot')}
  assert scopes == {s for s in {node.scope for node in graph.nodes} if re.fullmatch(layer, s)}
  assert {node.op for node in integers.nodes} & {'qconv'}
  said = quantize.float_layers(graph, **chosen)
  assert len([one for one in said if re.search(layer[2:], one)]) == len(scopes)
  [want], [got] = reference.run(graph, [x]), reference.run(integers, [x])
  [all8] = reference.run(quantize.integer_graph(graph, whole), [x])
  assert 0 < np.abs(got - want).mean() < np.abs(all8 - want).mean()
  params = quantize.init_fake_quant(graph, ranges, **chosen)
  [fake] = quantize.fake_quant(graph, params, [x], **chosen)
  assert np.abs(fake - got).mean() < 0.003 * np.abs(want).max()
  # Biases of float layers have no error to be corrected.
  corrected = quantize.correct_bias(graph, ranges, [x], **chosen)
  kept = [
    step.nodes[1].inputs
    for step in quantize.find_steps(graph)
    if re.fullmatch(layer, step.nodes[0].scope) and step.details.get('bias')
  ]
  assert kept
  for inputs in kept:
    for constant in set(inputs) & set(graph.constants):
      np.testing.assert_array_equal(corrected.constants[constant], graph.constants[constant])


def test_a_name_of_no_layer_is_refused():
  graph, x = networks.build('residual')
  with pytest.raises(ValueError, match=r"in_float='Conv_0' names no layer.*Closest: .*/Conv_0"):
    quantize.calibrate(graph, [x], in_float='Conv_0')


# What is wrong is named.


def test_errors_name_tensor_and_layer():
  graph, x = networks.build('residual')
  ranges = quantize.calibrate(graph, [x], 'min_max')
  names = list(ranges)
  missing = {name: one for name, one in ranges.items() if name != names[2]}
  with pytest.raises(
    ValueError, match=rf'Conv_1: no range for tensor {names[2]!r} \(conv\+add\+clamp'
  ):
    quantize.integer_graph(graph, missing)
  params = quantize.init_fake_quant(graph, missing)
  with pytest.raises(ValueError, match=rf'no range for tensor {names[2]!r}'):
    quantize.fake_quant(graph, params, [x])
  with pytest.raises(ValueError, match='must be finite'):
    quantize.integer_graph(graph, {**ranges, names[1]: Range(0.0, np.inf)})
  with pytest.raises(ValueError, match='seen no batch: the iterator is empty'):
    quantize.calibrate(graph, iter([]))
  with pytest.raises(ValueError, match="method must be one of min_max, percentile.* got 'mean'"):
    quantize.calibrate(graph, [x], 'mean')
  bad = x.copy()
  bad[1, 2, 3, 0] = np.nan
  with pytest.raises(ValueError, match=r"met NaN in tensor 'input' \(an input of the network\)"):
    quantize.calibrate(graph, [x, bad], 'min_max')
  broken = dict(graph.constants)
  kernel = next(name for name in broken if 'Conv_1/kernel' in name)
  broken[kernel] = np.full_like(broken[kernel], 1e38)
  with pytest.raises(
    ValueError, match=r"infinity in tensor '%\d+' \(conv\+add\+clamp in Residual/Conv_1\)"
  ):
    quantize.calibrate(dataclasses.replace(graph, constants=broken), [100 * x], 'min_max')
  broken[kernel] = np.full_like(broken[kernel], np.nan)
  with pytest.raises(ValueError, match=r'Residual/Conv_1: kernel or bias hold NaN'):
    quantize.integer_graph(dataclasses.replace(graph, constants=broken), ranges)


def test_a_layer_that_could_leave_int32_is_refused():
  depth = 2**31 // (127 * 128) + 600
  w = jnp.ones((depth, 1))
  traced = to_graph(lambda p, x: x @ p, w, jax.ShapeDtypeStruct((1, depth), jnp.float32))
  graph = freeze(traced, w)
  with pytest.raises(ValueError, match=r"dot.*sums of channel 0 of 'params' could reach"):
    quantize.integer_graph(graph, {'input': Range(-1.0, 1.0), '%0': Range(-1.0, 1.0)})


def test_dead_channels_and_tensors_of_zeros():
  """Batch norm leaves channels with a bias and next to no weights; ReLU may leave nothing at all."""
  w = np.float32([[1, 1e-30, 0], [-1, 0, 0]])
  b = np.float32([0.5, -3.0, 2.0])
  layer = quantize.integer_layer(w, b, 0.01, 1)
  np.testing.assert_allclose(layer.bias * layer.scale * 0.01, b, rtol=1e-6)
  assert layer.weight.tolist() == [[127, 0, 0], [-127, 0, 0]] and abs(layer.bias).max() <= 2**30
  assert (Range(0.0, 0.0).scale, Range(0.0, 0.0).zero) == (1.0, 0)

  def network(p, x):
    return jax.nn.relu(x @ p - 100) @ p + x

  graph = freeze(
    to_graph(network, np.eye(2, dtype=np.float32), np.ones((1, 2), np.float32)),
    np.eye(2, dtype=np.float32),
  )
  x = np.float32([[0.5, -1.0]])
  ranges = quantize.calibrate(graph, [x], 'min_max')
  [got] = reference.run(quantize.integer_graph(graph, ranges), [x])
  np.testing.assert_allclose(got, x, atol=0.01)


def test_weights_by_hand():
  layer = quantize.integer_layer(np.float32([[1.27, -0.005, 0.015, 0.025]]).T, None, 1.0, 1)
  # Steps of 0.01; halves to even as far as float32 numbers are halves.
  assert layer.weight[:, 0].tolist()[0] == 127 and layer.bias.tolist() == [0]
  exact = quantize.integer_layer(np.float32([[127, 0.5, 1.5, -2.5]]).T, np.float32([7.5]), 0.5, 1)
  assert exact.weight[:, 0].tolist() == [127, 0, 2, -2] and exact.bias.tolist() == [15]


def test_zero_is_always_exact():
  rng = np.random.default_rng(0)
  for low, high in rng.uniform([-5, 0], [0, 7], (200, 2)):
    chosen = Range(low, high)
    assert 0 <= chosen.zero <= 255
    # Both ends are within half a step.
    ends = (np.array([0, 255]) - chosen.zero) * chosen.scale
    np.testing.assert_allclose(ends, [low, high], atol=0.51 * chosen.scale)
  assert Range(0.2, 5.1).zero == 0 and Range(0.2, 5.1).scale == pytest.approx(0.02)
  assert Range(-5.1, -1.0).zero == 255


# Training.


def test_gradients_of_rounding():
  """LSQ by hand: inside (rounded - exact) per step, at the ends the distance from zero."""
  x = jnp.array([0.26, 0.9, -0.4])  # steps of 0.1 from 0 to 25.5
  low, high = jnp.float32(0.0), jnp.float32(25.5)
  f = lambda x, high: jnp.sum(
    quantize.fake_quantize(x, Range(low, high)) * jnp.array([1.0, 2.0, 5.0])
  )
  gx, gh = jax.grad(f, argnums=(0, 1))(x, high)
  assert gx.tolist() == [1.0, 2.0, 0.0]
  by_hand = (1.0 * (3 - 2.6) + 2.0 * (9 - 9.0)) / 255
  assert float(gh) == pytest.approx(by_hand / np.sqrt(3 * 255), rel=1e-3)
  clipped = jax.grad(lambda h: quantize.fake_quantize(jnp.array([30.0]), Range(low, h))[0])(high)
  assert float(clipped) == pytest.approx(1 / np.sqrt(255), rel=1e-5)


@pytest.mark.promotes('Adam of optax')
@pytest.mark.parametrize('start', [3.0, 0.15])
def test_ranges_learn_the_least_error(start):
  """From too wide and from too narrow, against the best of a fine grid."""
  x = jnp.asarray(np.random.default_rng(0).laplace(size=4000), jnp.float32)
  error = lambda r: jnp.mean(jnp.square(quantize.fake_quantize(x, r) - x))
  ends = np.geomspace(0.5, 2, 9, dtype=np.float32) * float(jnp.abs(x).max())
  best = min(float(error(Range(-a, b))) for a in ends for b in ends)
  tx = optax.chain(optax.adam(optax.cosine_decay_schedule(0.5, 150)), rules.keep_ranges())
  wide = start * jnp.abs(x).max()
  chosen = {'x': Range(-wide, wide)}

  @jax.jit
  def step(chosen, state):
    updates, state = tx.update(jax.grad(lambda c: error(c['x']))(chosen), state, chosen)
    return optax.apply_updates(chosen, updates), state

  state, first = tx.init(chosen), float(error(chosen['x']))
  for _ in range(150):
    chosen, state = step(chosen, state)
  assert first > 5 * best and float(error(chosen['x'])) < 1.5 * best


@pytest.mark.promotes('Adam of optax')
def test_what_was_trained_runs_in_integers():
  graph, x = networks.build('residual')
  params = quantize.init_fake_quant(graph, quantize.calibrate(graph, [x], 'min_max'))
  [want] = evaluate(graph, {}, [jnp.asarray(x)])
  want = want + 0.3
  tx = optax.chain(optax.adam(0.003), rules.keep_ranges())

  def loss(params):
    return jnp.mean(jnp.square(quantize.fake_quant(graph, params, [jnp.asarray(x)])[0] - want))

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  state, first = tx.init(params), float(loss(params))
  for _ in range(60):
    params, state, value = step(params, state)
  assert float(value) < 0.3 * first
  learned = {name: Range(*map(float, one)) for name, one in params.ranges.items()}
  assert all(r.low <= 0 <= r.high and r.high - r.low > 1e-6 for r in learned.values())
  integers = quantize.integer_graph(quantize.with_weights(graph, params), learned)
  [got] = reference.run(integers, [x])
  assert np.mean(np.square(got - want)) < 0.35 * first


def test_keep_ranges_by_hand():
  tx = rules.keep_ranges(minimum=0.5)
  params = {'a': Range(jnp.float32(-1), jnp.float32(1)), 'w': jnp.ones(2)}
  updates = {'a': Range(jnp.float32(1.5), jnp.float32(-0.8)), 'w': jnp.ones(2)}
  updates, _ = tx.update(updates, tx.init(params), params)
  after = optax.apply_updates(params, updates)
  assert (after['a'].low.item(), after['a'].high.item()) == (0.0, 0.5)
  assert after['w'].tolist() == [2.0, 2.0]


# Before and after calibration.


def test_equalisation_leaves_the_network_and_evens_the_channels():
  rng = np.random.default_rng(0)
  wild = lambda *shape: (rng.normal(size=shape) * 10 ** rng.uniform(-1, 1, shape[-1])).astype(
    np.float32
  )
  params = {
    'a': wild(3, 3, 3, 6),
    'bias': wild(6),
    'b': wild(3, 3, 3, 4),
    'c': wild(1, 1, 1, 4),
    'd': wild(4, 5),
  }

  def network(p, x):
    conv = lambda x, w, groups: jax.lax.conv_general_dilated(
      x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups
    )
    x = jax.nn.relu(conv(x, p['a'], 1) + p['bias'].reshape(1, 1, 1, 6))
    x = jax.nn.relu(conv(x, p['b'], 2))
    x = conv(x, p['c'], 4)
    return jnp.minimum(jax.nn.relu(x), 6).sum((1, 2)) @ p['d']

  x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
  graph = freeze(to_graph(network, params, x), params)
  even = quantize.equalize(graph)
  [want], [got] = reference.run(graph, [x]), reference.run(even, [x])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
  a, b, c = (even.constants[name] for name in 'abc')
  outputs = np.abs(a).max((0, 1, 2))
  # Input channel 3 g + i of a convolution in two groups meets outputs 2 g and 2 g + 1.
  places = [(i % 3, 2 * (i // 3)) for i in range(6)]
  inputs = np.array([np.abs(b[:, :, i, o : o + 2]).max() for i, o in places])
  np.testing.assert_allclose(outputs, inputs, rtol=0.01)
  np.testing.assert_allclose(np.abs(b).max((0, 1, 2)), np.abs(c).max((0, 1, 2)), rtol=0.01)
  # Behind the ReLU6 nothing may move.
  np.testing.assert_array_equal(even.constants['d'], params['d'])


@pytest.mark.parametrize('bias', [True, False])
def test_corrected_biases_take_the_mean_error_out(bias):
  rng = np.random.default_rng(1)
  params = {
    'w': rng.normal(size=(1, 1, 3, 8)).astype(np.float32),
    'b': rng.normal(size=(1, 1, 1, 8)).astype(np.float32),
  }

  def network(p, x):
    y = jax.lax.conv_general_dilated(
      x, p['w'], (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=2
    )
    return y + p['b'] if bias else y

  x = rng.uniform(0, 1, (4, 6, 6, 6)).astype(np.float32)
  graph = freeze(to_graph(network, params, x), params)
  ranges = quantize.calibrate(graph, [x], 'min_max')
  corrected = quantize.correct_bias(graph, ranges, [x[:1], x[1:]])
  offset = params['b'].reshape(-1) if bias else None
  layer = quantize.integer_layer(params['w'], offset, ranges['input'].scale, 3)
  rounded = {'w': (layer.weight * layer.scale).astype(np.float32)}

  def mean(graph, weights):
    constants = {**graph.constants, **weights}
    [y] = reference.run(dataclasses.replace(graph, constants=constants), [x])
    return y.astype(np.float64).mean((0, 1, 2))

  want = mean(graph, {})
  before = np.abs(mean(graph, rounded) - want).max()
  after = np.abs(mean(corrected, rounded) - want).max()
  assert after < 1e-6 < before
  quantize.integer_graph(corrected, ranges)
