"""Passes change the graph and not what it computes."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.exporter.passes import (
  bind_parameters,
  fold_batch_norm,
  fold_constants,
  freeze,
  fuse_activations,
  fuse_sums,
  without_dead,
)
from fqjax.models import create_model
from fqjax.runtime import reference
from fqjax.runtime.graph import validate
from fqjax.tracing import to_graph


def numbers(tree, seed=0):
  """Values for shapes, variances positive and none near what an initialiser gives."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: np.asarray(
    rng.uniform(0.2, 1.2, leaf.shape) * rng.choice([-1, 1], leaf.shape), leaf.dtype
  )
  values = jax.tree.map(draw, tree)
  if 'batch_stats' in values:
    values['batch_stats'] = jax.tree.map(np.abs, values['batch_stats'])
  return values


def frozen(module, shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  variables = numbers(jax.eval_shape(module.init, jax.random.key(0), x), seed)
  traced = to_graph(module.apply, variables, x)
  return traced, variables, x


def ops(graph):
  return [node.op for node in graph.nodes]


class Net(nn.Module):
  """Batch norm behind everything it can stand behind, and where it cannot be folded."""

  @nn.compact
  def __call__(self, x):
    norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
    x = nn.relu(norm('a')(nn.Conv(6, (3, 3), 2, name='stem')(x)))
    y = norm('b')(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name='depth')(x))
    y = jnp.minimum(nn.relu(y), 6)
    z = nn.Conv(6, (1, 1), name='shared')(y)
    x = norm('c')(z) + z  # something else reads it: stays
    x = norm('d')(x)  # behind a sum: stays
    x = jnp.mean(x, (1, 2))
    return norm('e')(nn.Dense(5, name='head')(x)) / 3 - 1


def test_what_is_made_of_a_parameter_has_its_name():
  params = {
    'w': np.ones((2, 2), np.float32),
    'b': np.ones(2, np.float32),
    'c': np.ones((1, 2), np.float32),
  }
  network = lambda p, x: jnp.exp(x @ p['w'].T + 2 * p['b'][None]) * (p['c'] + p['b'][None]) * p['c']
  traced = to_graph(network, params, jnp.ones((1, 2)))
  graph = fold_constants(bind_parameters(traced.graph, params))
  assert sorted(name for name in graph.constants if name[0] not in '%#') == ['b', 'c', 'w']
  assert graph.constants['b'].tolist() == [[2, 2]] and graph.constants['c'].tolist() == [[1, 1]]
  validate(graph)


def test_frozen_networks_compute_the_same():
  traced, variables, x = frozen(Net(), (2, 9, 9, 3))
  graph = freeze(traced, variables)
  assert graph.parameters == ()
  [want] = reference.run(
    traced.graph, [x], {k: np.asarray(v) for k, v in traced.parameters(variables).items()}
  )
  [got] = reference.run(graph, [x])
  # float32 sums in another order
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert ops(graph) == [
    'conv', 'add', 'clamp', 'conv', 'add', 'clamp', 'conv', 'add', 'sub', 'mul', 'add', 'add',
    'sub', 'mul', 'add', 'reduce_sum', 'div', 'dot', 'add',
  ]  # fmt: skip
  [jax_too] = jax.tree.leaves(
    dataclasses.replace(traced, graph=graph, variables=jax.tree.structure(()), static=(None,))(
      (), x
    )
  )
  np.testing.assert_allclose(jax_too, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['mobilenet_v2', 'cifar_resnet20', 'cifar_vgg16'])
def test_no_norm_is_left_in_our_networks(name):
  model = create_model(name)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  graph = freeze(to_graph(model.apply, shapes, x), numbers(shapes))
  assert not {'sub', 'mul', 'rsqrt', 'max', 'min'} & set(ops(graph))
  convs = ops(graph).count('conv')
  assert convs == {'mobilenet_v2': 52, 'cifar_resnet20': 19, 'cifar_vgg16': 13}[name]
  # MobileNetV2 adds ten times, ResNet-20 nine; every layer has its bias.
  sums = {'mobilenet_v2': 10, 'cifar_resnet20': 9, 'cifar_vgg16': 0}[name]
  assert ops(graph).count('add') == convs + 1 + sums


C = np.arange(1, 4, dtype=np.float32)
CHAINS = {
  'batch norm': (lambda y: (y - C) * (2 * C) + 1, 2),
  'only a bias': (lambda y: y + C, 2),
  'no shift': (lambda y: y * C, 1),
  'turned around': (lambda y: 3 - y, 2),
  'negated': (lambda y: -(y / C), 1),
  'not of a divisor': (lambda y: 1 / y, 2),
  'not of a square': (lambda y: y * y, 2),
  'not per position': (lambda y: y * jnp.asarray([[2.0], [3.0]]), 2),
}


@pytest.mark.parametrize('name', CHAINS)
def test_chains_behind_a_layer(name):
  fn, count = CHAINS[name]
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
  wide = lambda p, x: fn(x @ p) if name != 'not per position' else fn((x @ p)[None])[0]
  with jax.numpy_rank_promotion('allow'):
    traced = to_graph(wide, w, x, batch_axis=None)
  before = fold_constants(bind_parameters(traced.graph, {'params': w}))
  graph = fold_batch_norm(before)
  validate(graph)
  [want], [got] = reference.run(before, [x]), reference.run(graph, [x])
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
  if name != 'not per position':
    assert len(graph.nodes) == count


def test_kernels_to_keep_and_kernels_that_are_shared():
  def network(p, x):
    return (x @ p) * C[None], (x @ p) * (2 * C)[None]

  w, x = np.ones((4, 3), np.float32), np.ones((2, 4), np.float32)
  graph = fold_constants(bind_parameters(to_graph(network, w, x).graph, {'params': w}))
  kept = fold_batch_norm(graph, keep=['params'])
  assert ops(kept) == ops(graph) and 'params' in kept.constants
  folded = fold_batch_norm(graph)
  assert ops(folded) == ['dot', 'dot'] and len(folded.constants) == 2
  for a, b in zip(reference.run(folded, [x]), reference.run(graph, [x]), strict=True):
    np.testing.assert_array_equal(a, b)


def test_activations_are_one_node():
  def network(p, x):
    a = jax.nn.relu6(x)
    b = jnp.minimum(jnp.maximum(2.0, x), 1.0)  # ends that cross: stays two
    c = jnp.minimum(x, 4.0)
    d = jnp.maximum(c, -1.0)  # c is read twice
    return a, b, c + d, jnp.maximum(x, x + 1), jax.nn.relu(jax.nn.relu(x))

  graph = to_graph(network, {}, jax.ShapeDtypeStruct((1, 9), jnp.float32)).graph
  fused = fuse_activations(graph)
  validate(fused)
  x = np.linspace(-8, 8, 18, dtype=np.float32).reshape(2, 9)
  for a, b in zip(reference.run(fused, [x]), reference.run(graph, [x]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert ops(fused).count('clamp') == 7 and ops(fused).count('max') == 1
  assert str(fused.nodes[0]) == 'clamp(input) low=0.0 high=6.0'


def test_sums_and_their_activations_are_one_node():
  def network(p, x):
    a = jax.nn.relu(x + p)
    b = a + x
    c = jax.nn.relu6(a + b)  # of two tensors
    d = x + 1  # read twice
    e = x + 2  # a result, too
    return c, jax.nn.relu(d) * d, e, jax.nn.relu(e), jnp.minimum(b, 3.0)

  x = np.linspace(-8, 8, 18, dtype=np.float32).reshape(2, 9)
  graph = freeze(
    to_graph(network, np.float32(0.5), jax.ShapeDtypeStruct((1, 9), np.float32)), np.float32(0.5)
  )
  fused = fuse_sums(graph)
  validate(fused)
  for a, b in zip(reference.run(fused, [x]), reference.run(graph, [x]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [ops(fused).count(op) for op in ('add_clamp', 'add', 'clamp')] == [2, 3, 3]
  assert ops(graph).count('clamp') == 5


def test_dead_code_and_constants():
  def network(p, x):
    jnp.exp(x)  # nothing reads it
    return x * jnp.sum(jnp.sin(p) * 3)

  w = np.ones((2, 2), np.float32)
  graph = bind_parameters(to_graph(network, w, np.ones((1, 2), np.float32)).graph, {'params': w})
  folded = fold_constants(graph)
  validate(folded)
  assert ops(folded) == ['mul'] and len(folded.constants) == 1
  assert ops(without_dead(graph)) == ops(graph)
  [value] = folded.constants.values()
  np.testing.assert_allclose(value, 12 * np.sin(1), rtol=1e-6)


def test_parameters_must_fit():
  graph = to_graph(
    lambda p, x: x @ p['w'], {'w': np.eye(2, dtype=np.float32)}, np.ones((1, 2), np.float32)
  ).graph
  with pytest.raises(ValueError, match=r'no value for the parameter w: float32\[2, 2\]'):
    bind_parameters(graph, {})
  with pytest.raises(ValueError, match=r'takes w: float32\[2, 2\], got float64\[2, 2\]'):
    bind_parameters(graph, {'w': np.eye(2)})
