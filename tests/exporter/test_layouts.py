"""Nothing is computed twice, and transposes vanish where something can take them in."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.exporter.passes import freeze, fuse_sums, move_transposes, share_common
from fqjax.models import create_model
from fqjax.runtime import reference
from fqjax.runtime.graph import Graph, Node, Tensor, validate
from fqjax.tracing import to_graph
from tests.exporter.test_passes import numbers, ops

_RNG = np.random.default_rng(0)
_W = np.float32(_RNG.normal(size=(3, 3, 4, 5)))
_K = np.float32(_RNG.normal(size=(6, 7)))
_BIAS = np.float32(_RNG.normal(size=(1, 6, 1, 4)))


def _first(x):
  return x.transpose(0, 3, 1, 2)  # NHWC to NCHW


def _last(x):
  return x.transpose(0, 2, 3, 1)


def _conv(x, layout, w=_W, **options):
  return lax.conv_general_dilated(x, w, (1, 2), 'SAME', dimension_numbers=layout, **options)


_NCHW, _NHWC = ('NCHW', 'HWIO', 'NCHW'), ('NHWC', 'HWIO', 'NHWC')

# x is [n, 6, 8, 4]; name -> function, operations that are left (None: as many as there were).
MOVES = {
  'inverse': (lambda x: _last(jnp.exp(_first(x))), ['exp']),
  'three make one': (lambda x: _first(_first(_first(x))), []),
  'with constants': (lambda x: _last(_first(x) * _first(_BIAS) + 1), ['mul', 'add']),
  'two branches': (lambda x: _last(jnp.where(_first(x) > 0, _first(x), jnp.sin(_first(x)))), ['gt', 'sin', 'select']),
  'two orders': (lambda x: _first(x)[:, :, :, :4] + x.transpose(0, 3, 2, 1)[:, :, :6, :4], None),
  'slices and pads': (
    lambda x: _last(jnp.pad(_first(x)[:, 1:3, ::2], ((0, 0), (1, 0), (0, 2), (3, 0)))), ['slice', 'pad'],
  ),
  'flip and pool': (
    lambda x: _last(lax.reduce_window(_first(x)[:, ::-1], -jnp.inf, lax.max, (1, 1, 2, 3), (1, 1, 1, 2), 'SAME')),
    ['reverse', 'pool_max'],
  ),
  'concat and cumsum': (lambda x: _last(jnp.cumsum(jnp.concatenate([_first(x), 2 * _first(x)], 1), 2)), ['mul', 'concat', 'cumsum']),
  'sorted': (lambda x: [_last(y) for y in lax.top_k(_first(x), 2)], ['top_k']),
  'mean': (lambda x: _first(x).mean((2, 3)), ['reduce_sum', 'div']),
  'mean and back': (lambda x: _first(x).sum(3).transpose(0, 2, 1), ['reduce_sum']),
  'where is the largest': (lambda x: jnp.argmax(_first(x), 1), ['argmax']),
  'into the input': (lambda x: _conv(_first(x), ('NCHW', 'HWIO', 'NHWC')), ['conv']),
  'into the result': (lambda x: _first(_conv(x, _NHWC)), ['conv']),
  'round a network': (lambda x: _last(_conv(jax.nn.relu(_first(x)) + 1, _NCHW)), ['max', 'add', 'conv']),
  'both': (lambda x: _last(jnp.exp(_conv(_first(x), _NCHW))), ['conv', 'exp', 'transpose']),
  'into a product': (lambda x: x.transpose(0, 1, 3, 2) @ _K.repeat(2, 0)[:8], ['dot']),
  'free axes in another order': (lambda x: _first(x) @ _K.repeat(2, 0)[:8], None),
  'into a batched product': (lambda x: jnp.einsum('nhwc,nvch->nhwv', x, x.transpose(0, 2, 3, 1)), ['dot']),
  'axes of one': (lambda x: x[:, :1].transpose(0, 2, 1, 3).reshape(-1, 4), ['slice', 'reshape']),
  'one axis of one': (lambda x: x[:, :1].transpose(0, 2, 1, 3), ['slice', 'reshape']),
  'reshapes': (lambda x: x.reshape(-1, 48, 4).reshape(-1, 6, 32).reshape(-1, 6, 8, 4) + 1, ['add']),
  'result read twice': (lambda x: [(_first(y), jnp.exp(y)) for y in [_conv(x, _NHWC)]], None),
  'result returned': (lambda x: [(_first(y), y) for y in [_conv(x, _NHWC)]], None),
  'nothing to do': (lambda x: jnp.exp(_first(x)), None),
  'read twice': (lambda x: (_first(x), jnp.exp(_first(x)).reshape(-1, 8)), None),
}  # fmt: skip


@pytest.mark.parametrize('name', MOVES)
def test_moved_transposes_change_nothing(name):
  fn, left = MOVES[name]
  x = np.random.default_rng(1).normal(size=(2, 6, 8, 4)).astype(np.float32)
  example = jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)
  with jax.numpy_rank_promotion('allow'):
    graph = to_graph(lambda _, x: fn(x), {}, example).graph
  moved = share_common(move_transposes(graph))
  validate(moved)
  if left is not None:
    assert ops(moved) == left
  assert ops(moved).count('transpose') <= ops(graph).count('transpose')
  for got, want in zip(reference.run(moved, [x]), reference.run(graph, [x]), strict=True):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_an_unfinished_network_is_left_alone():
  graph = to_graph(lambda p, x: x.T @ p, jnp.eye(3), jnp.ones((3, 3)), batch_axis=None).graph
  [node] = move_transposes(graph).nodes
  assert node.op == 'dot' and node.attributes['contract'] == ((0,), (0,))
  same = to_graph(lambda p, x: x @ p, jnp.eye(3), jnp.ones((3, 3))).graph
  assert move_transposes(same).nodes == same.nodes


def test_what_is_computed_twice():
  def network(p, x):
    a = jnp.tanh(x @ p) + jnp.sum(x, 1, keepdims=True)
    b = jnp.sum(x, 1, keepdims=True) + jnp.tanh(x @ p)
    return a, b, jnp.tanh(x @ (2 * p)), x - x[:, ::-1], x[:, ::-1] - x

  x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
  p = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
  graph = to_graph(network, p, x).graph
  shared = share_common(graph)
  validate(shared)
  counts = [ops(shared).count(op) for op in ('dot', 'tanh', 'add', 'reduce_sum', 'reverse', 'sub')]
  assert counts == [2, 2, 1, 1, 1, 2]
  for got, want in zip(
    reference.run(shared, [x], {'params': p}), reference.run(graph, [x], {'params': p}), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_zeros_of_both_signs_are_not_the_same():
  names = ('x', 'a', 'b')
  nodes = tuple(
    Node('clamp', ('x',), (name,), {'low': low, 'high': None})
    for name, low in (('a', 0.0), ('b', -0.0))
  )
  tensors = {name: Tensor(name, (1,), 'float32') for name in names}
  graph = Graph(('x',), (), {}, nodes, ('a', 'b'), tensors)
  assert len(share_common(graph).nodes) == 2


class _ChannelsFirst(nn.Module):
  """A network whose images are NCHW, of layers that are NHWC."""

  @nn.compact
  def __call__(self, x):
    for features in (4, 6):
      y = nn.Conv(features, (3, 3), use_bias=False)(jnp.moveaxis(x, 1, -1))
      y = nn.BatchNorm(use_running_average=True)(y)
      x = nn.relu(jnp.moveaxis(y, -1, 1))
    return nn.Dense(3)(x.mean((2, 3)))


def test_a_network_that_turns_its_images_around():
  module, x = _ChannelsFirst(), np.float32(_RNG.normal(size=(2, 3, 6, 6)))
  variables = numbers(jax.eval_shape(module.init, jax.random.key(0), x))
  traced = to_graph(module.apply, variables, x)
  graph = freeze(traced, variables)
  assert ops(graph) == ['conv', 'add', 'clamp'] * 2 + ['reduce_sum', 'div', 'dot', 'add']
  values = {name: np.asarray(v) for name, v in traced.parameters(variables).items()}
  [got], [want] = reference.run(graph, [x]), reference.run(traced.graph, [x], values)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_left_of_mobilenet():
  model = create_model('mobilenet_v2')
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  graph = freeze(to_graph(functools.partial(model.apply, train=False), shapes, x), numbers(shapes))
  *body, mean, division, classifier, bias = ops(graph)
  # A layer is its convolution, its bias and at most one clamp; ten sums are residual.
  assert [body.count(op) for op in ('conv', 'add', 'clamp')] == [52, 62, 35]
  assert set(body) == {'conv', 'add', 'clamp'}
  assert (mean, division, classifier, bias) == ('reduce_sum', 'div', 'dot', 'add')
  # In a file a clamp is part of the sum before it.
  *body, mean, division, classifier, bias = ops(fuse_sums(graph))
  assert [body.count(op) for op in ('conv', 'add', 'add_clamp')] == [52, 27, 35]
  assert set(body) == {'conv', 'add', 'add_clamp'}
