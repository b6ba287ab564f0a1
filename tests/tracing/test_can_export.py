"""Obstacles are found at once, at the line they are in, with a way out."""

import functools
import linecache
import types

import equinox as eqx
from flax import linen as nn
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax.tracing import can_export, to_graph
from tests.tracing import foreign

_X = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)


def code(obstacle):
  """The line of code an obstacle names."""
  path, line = obstacle.source.rsplit(':', 1)
  return linecache.getline(path, int(line)).strip()


def seen(report):
  return [(obstacle.primitive, code(obstacle)) for obstacle in report.obstacles]


@pytest.mark.promotes('other people')
@pytest.mark.parametrize('name', ['vit', 'equinox', 'detector'])
def test_nothing_in_the_way(name):
  network = foreign.NETWORKS[name]()
  with jax.numpy_rank_promotion('allow'):
    example = jax.ShapeDtypeStruct((2, *network.shape), jnp.float32)
    report = can_export(network.apply, network.variables, example)
  assert report.ok and report and report.obstacles == ()
  assert str(report) == 'Every operation has its place in a graph.'


def test_everything_at_once():
  def network(params, x):
    with jax.named_scope('stem'):
      x = jnp.fft.fft(x @ params['w']).real
    with jax.named_scope('head'):
      for _ in range(3):
        x = x.at[:, 0].set(0)
      return x[:3], jnp.linalg.svd(x, compute_uv=False)

  report = can_export(network, {'w': jnp.ones((4, 4))}, jnp.ones((8, 4)))
  assert not report
  assert [(o.scope, o.primitive, o.times) for o in report.obstacles] == [
    ('stem', 'convert_element_type', 1), ('stem', 'fft', 1), ('head', 'scatter', 3), ('head', 'gather', 1), ('head', 'svd', 1),
  ]  # fmt: skip
  assert [code(o).split('=')[-1].strip() for o in report.obstacles] == [
    *["jnp.fft.fft(x @ params['w']).real"] * 2, 'x.at[:, 0].set(0)',
    'False)', 'False)',
  ]  # fmt: skip
  assert "batch='fixed'" in report.obstacles[3].remedy
  assert 'jnp.concatenate' in report.obstacles[2].remedy
  text = str(report)
  assert text.startswith('5 operations have no place in a graph.\n  convert_element_type in stem: ')
  assert 'scatter in head (3 times): ' in text and 'test_can_export.py:' in text
  fixed = can_export(network, {'w': jnp.ones((4, 4))}, jnp.ones((8, 4)), batch='fixed')
  assert [o.primitive for o in fixed.obstacles[1:]] == ['fft', 'scatter', 'svd']
  # What to_graph says is the same list.
  with pytest.raises(ValueError) as caught:
    to_graph(network, {'w': jnp.ones((4, 4))}, jnp.ones((8, 4)))
  assert str(caught.value) == text
  assert fqjax.can_export is can_export


class _Trained(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3), name='conv')(x)
    x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
    x = nn.Dropout(0.5, deterministic=not train, name='drop')(x)
    return x.mean((1, 2))


def _linen(train, **options):
  model = _Trained()
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), _X)
  return functools.partial(model.apply, train=train, **options), variables


@pytest.mark.promotes('Flax')
def test_training_mode_of_linen():
  apply, variables = _linen(False)
  assert can_export(apply, variables, _X)
  apply, variables = _linen(True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)})
  with jax.numpy_rank_promotion('allow'):
    report = can_export(apply, variables, _X)
  norm, drop = {o.primitive: o for o in report.obstacles}.values()
  assert norm.primitive == 'dim_as_value' and norm.scope == '_Trained/norm'
  assert 'use_running_average=True' in norm.remedy and code(norm).startswith('x = nn.BatchNorm(')
  assert 'random' in drop.primitive and drop.scope == '_Trained/drop'
  assert 'deterministic=True' in drop.remedy and code(drop).startswith('x = nn.Dropout(')
  # Called as it stands, Flax refuses before anything can be traced.
  [obstacle] = can_export(_linen(True)[0], variables, _X).obstacles
  assert 'use_running_average=True' in obstacle.remedy
  assert code(obstacle).startswith('x = nn.BatchNorm(')
  [obstacle] = can_export(_linen(True, mutable=['batch_stats'])[0], variables, _X).obstacles
  assert 'deterministic=True' in obstacle.remedy and code(obstacle).startswith('x = nn.Dropout(')


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = self.norm(x)
    return self.drop(x)


@pytest.mark.promotes('Flax')
def test_training_mode_of_nnx():
  model = _Nnx(nnx.Rngs(0))
  graph, state = nnx.split(model)
  report = can_export(lambda s, x: nnx.merge(graph, s)(x), state, _X)
  assert {code(o) for o in report.obstacles if o.source} == {
    'x = self.norm(x)',
    'return self.drop(x)',
  }
  assert any('use_running_average' in o.remedy for o in report.obstacles)
  assert any('random' in o.remedy for o in report.obstacles)
  # The model itself is not split: its state cannot change under the trace.
  [obstacle] = can_export(lambda _, x: model(x), {}, _X).obstacles
  assert 'use_running_average=True' in obstacle.remedy and code(obstacle) == 'x = self.norm(x)'
  model.eval()
  assert can_export(lambda _, x: model(x), {}, _X)


@pytest.mark.promotes('Equinox and Haiku')
def test_training_mode_of_equinox_and_haiku():
  layer = eqx.nn.Dropout(0.5)

  def equinox(layer, x):
    return jax.vmap(layer)(x)

  [obstacle] = can_export(equinox, layer, _X).obstacles
  assert 'deterministic=True' in obstacle.remedy and code(obstacle) == 'return jax.vmap(layer)(x)'
  assert can_export(equinox, eqx.nn.inference_mode(layer), _X)

  def haiku(x, training):
    x = hk.BatchNorm(True, True, 0.9)(x, training)
    return hk.dropout(hk.next_rng_key(), 0.5, x) if training else x

  net = hk.transform_with_state(haiku)
  key = jax.random.key(0)
  with jax.numpy_rank_promotion('allow'):
    variables = jax.eval_shape(lambda x: net.init(key, x, True), _X)
    apply = lambda train, key: lambda v, x: net.apply(*v, key, x, train)
    report = can_export(apply(True, key), variables, _X)
    assert {code(o)[:12] for o in report.obstacles} == {'x = hk.Batch', 'return hk.dr'}
    [obstacle] = can_export(apply(True, None), variables, _X).obstacles
    assert 'deterministic=True' in obstacle.remedy and 'next_rng_key' in code(obstacle)
    assert can_export(apply(False, None), variables, _X)


def test_a_batch_that_must_be_known():
  def network(_, x):
    x = jnp.fft.fft(x).real
    pairs = x.reshape(x.shape[0] // 2, 2, -1)
    return pairs.sum(1)

  report = can_export(network, {}, jnp.ones((4, 6)))
  assert [code(o).split(' = ')[-1] for o in report.obstacles] == [
    'x.reshape(x.shape[0] // 2, 2, -1)', *['jnp.fft.fft(x).real'] * 2,
  ]  # fmt: skip
  assert "batch='fixed'" in report.obstacles[0].remedy
  fixed = can_export(network, {}, jnp.ones((4, 6)), batch='fixed')
  assert [o.primitive for o in fixed.obstacles[1:]] == ['fft']
  report = can_export(lambda _, x: jax.lax.map(jnp.sin, x), {}, jnp.ones((4, 6)))
  assert 'jax.vmap' in report.obstacles[0].remedy


def _branch(_, x):
  if x.sum() > 0:
    return x
  return np.asarray(x)


def _number(_, x):
  return np.asarray(x)


def _mask(_, x):
  return x[x > 0]


@pytest.mark.parametrize('fn', [_branch, _number, _mask])
def test_values_used_as_python_numbers(fn):
  [obstacle] = can_export(fn, {}, jnp.ones((4, 6))).obstacles
  assert 'jax.numpy in place of numpy' in obstacle.remedy
  assert code(obstacle) in ('if x.sum() > 0:', 'return np.asarray(x)', 'return x[x > 0]')


def test_errors_that_are_no_obstacles():
  with pytest.raises(TypeError, match='contracting dimensions'):
    can_export(lambda p, x: x @ p, jnp.ones((4, 4)), jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="'open' or 'fixed', got 'any'"):
    can_export(_mask, {}, jnp.ones((4, 6)), batch='any')


def test_several_inputs_sizes_and_axes():
  def network(params, x, data):
    return jnp.einsum('nc,cn->nc', x, data['b']) + data['table'] @ params

  params, data = jnp.eye(3), {'b': jnp.ones((3, 4)), 'table': jnp.ones((1, 3))}
  axes = (0, {'b': 1, 'table': None})
  assert can_export(network, params, (jnp.ones((4, 3)), data), batch_axes=axes)
  graph = to_graph(network, params, jnp.ones((4, 3)), data, batch_axis=axes).graph
  assert [graph.tensors[name].shape for name in graph.inputs] == [('n', 3), (3, 'n'), (1, 3)]
  same = {'b': jnp.ones((4, 3)), 'table': jnp.ones((4, 3))}
  add = lambda p, x, data: (x + data['b'] + data['table']) @ p
  graph = to_graph(add, params, jnp.ones((4, 3)), same, batch_axis=(0, 0)).graph
  assert {graph.tensors[name].shape for name in graph.inputs} == {('n', 3)}
  with pytest.raises(ValueError, match='the batch is 1 and 3 and 4 in the inputs; give a tuple'):
    to_graph(network, params, jnp.ones((4, 3)), data)
  with pytest.raises(ValueError, match=r'batch_axis 2 is not an axis of an input \[4, 3\]'):
    to_graph(network, params, jnp.ones((4, 3)), data, batch_axis=(2, None))
  named = types.SimpleNamespace(args=(jnp.ones((4, 3)),), kwargs={'data': data, 'scale': 2.0})
  scaled = lambda p, x, *, data, scale: network(p, x, data) * scale
  assert not can_export(scaled, params, named, batch_axes=None).obstacles
  one = {'b': jnp.ones((3, 4)), 'table': jnp.ones((1, 3))}
  assert can_export(lambda p, d: d['b'].T @ p + d['table'], params, one, batch_axes=axes[1])
  assert can_export(lambda p, d: d['b'].T @ p, params, (one,), batch_axes=axes[1:])
  sizes = [jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32) for size in (8, 16)]
  [obstacle] = can_export(lambda _, x: jax.lax.cumlogsumexp(x), {}, sizes).obstacles
  assert obstacle.primitive == 'cumlogsumexp' and obstacle.times == 1
