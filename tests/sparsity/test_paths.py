"""Networks without their unused paths compute what they computed before."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.models import create_model
from fqjax.sparsity import Unstructured, make_plan, project, remove_unused
from tests.sparsity.trees import IMAGES, net

_CONV = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def conv(x, w, padding='SAME', groups=1, strides=(1, 1)):
  return _CONV(x, w, strides, padding, feature_group_count=groups)


def normal(*shape, seed=0, empty=()):
  """A kernel of which the filters `empty` are zero."""
  w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  w[..., list(empty)] = 0
  return w


def removed(apply, params, shape, tolerance=1e-5, **options):
  """Removes, and checks the output on a batch of another size."""
  small = remove_unused(apply, params, jax.ShapeDtypeStruct(shape, jnp.float32), **options)
  x = normal(3, *shape[1:], seed=9)
  both = jax.jit(lambda p, s, x: (apply(p, x), small.apply(s, x)))  # one compilation, not many
  want, got = both(params, small.variables, x)
  # Float32 sums in another order, some of which cancel: relative to the largest output.
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))
  return small


def shapes(tree):
  return jax.tree.map(np.shape, tree)


def stuck(small):
  return {layer.path: layer.stuck for layer in small.report.layers if layer.stuck}


def _convs(params, x):
  for w in params[:-1]:
    x = jax.nn.relu(conv(x, w))
  return conv(x, params[-1])


def test_the_numbers_of_the_specification():
  masks = [
    [[1], [1], [0], [1]],
    [[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
    [[1, 1, 0], [0, 1, 0]],
  ]
  # Whole numbers: sums in any order are exact.
  values = [np.arange(1, 1 + np.size(m)).reshape(np.shape(m)) * np.array(m) for m in masks]
  params = [v.T[None, None].astype(np.float32) for v in values]

  small = remove_unused(_convs, params, jnp.ones((1, 4, 4, 1)))
  x = np.random.default_rng(0).integers(-4, 5, (2, 4, 4, 1)).astype(np.float32)
  np.testing.assert_array_equal(small.apply(small.variables, x), _convs(params, x))
  assert sum(np.count_nonzero(w) for w in params) == 10
  assert sum(np.count_nonzero(w) for w in small.variables) == 5
  assert shapes(small.variables) == [(1, 1, 1, 2), (1, 1, 2, 1), (1, 1, 1, 2)]
  # The caller's own function takes them too.
  np.testing.assert_array_equal(_convs(small.variables, x), _convs(params, x))


def _mlp(params, x):
  for w in params[:-1]:
    x = jax.nn.relu(x @ w)
  return x @ params[-1]


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_exactly_the_units_on_no_path_go(kind, seed):
  rng = np.random.default_rng(seed)
  sizes = [5, 9, 8, 7, 3]
  params = [
    (rng.normal(size=s) * (rng.random(s) < 0.16)).astype(np.float32)
    for s in zip(sizes, sizes[1:], strict=False)
  ]
  # A unit is on a path if it is reached from an input and reaches an output.
  forward, backward = [np.ones(5, bool)], [np.ones(3, bool)]
  for w in params:
    forward.append((w[forward[-1]] != 0).any(0))
  for w in reversed(params):
    backward.append((w[:, backward[-1]] != 0).any(1))
  want = [max(1, (f & b).sum()) for f, b in zip(forward, backward[::-1], strict=True)][1:-1]
  if kind == 'conv':
    kernels = [w[None, None] for w in params]
    small = remove_unused(_convs, kernels, jax.ShapeDtypeStruct((1, 2, 2, 5), jnp.float32))
    assert [w.shape[3] for w in small.variables[:-1]] == want
    return
  small = remove_unused(_mlp, params, jax.ShapeDtypeStruct((1, 5), jnp.float32))
  assert [w.shape[1] for w in small.variables[:-1]] == want
  x = rng.normal(size=(4, 5)).astype(np.float32)
  got, value = x, x
  for i, (a, b) in enumerate(zip(small.variables, params, strict=True)):
    got, value = got @ a, value @ b
    if i < 3:
      got, value = np.maximum(got, 0), np.maximum(value, 0)
  np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)


def test_channels_that_keep_only_each_other_alive_go():
  # Channel 1 of the stream feeds hidden unit 1 of the block, which feeds channel 1 alone.
  def apply(p, x):
    x = x @ p['in']
    x = x + jax.nn.relu(x @ p['a']) @ p['b']
    return x @ p['out']

  params = {'in': normal(3, 2), 'a': np.eye(2, dtype=np.float32), 'b': np.eye(2, dtype=np.float32),
            'out': normal(2, 4)}  # fmt: skip
  params['out'][1] = 0
  small = removed(apply, params, (1, 3))
  assert shapes(small.variables) == {'in': (3, 1), 'a': (1, 1), 'b': (1, 1), 'out': (1, 4)}


def test_residual_stages_are_tied():
  def apply(p, x):
    x = conv(x, p['stem'])
    x = x + conv(jax.nn.relu(conv(x, p['a'])), p['b'])
    return jax.nn.relu(x).mean((1, 2)) @ p['fc']

  params = {
    'stem': normal(3, 3, 3, 6, empty=(0, 1, 5)),
    'a': normal(3, 3, 6, 4, seed=1, empty=(2,)),
    'b': normal(3, 3, 4, 6, seed=2, empty=(1, 3, 5)),
    'fc': normal(6, 5, seed=3),
  }
  small = removed(apply, params, (1, 8, 8, 3))
  # Only where both summands are empty: channels 1 and 5.
  assert shapes(small.variables) == {
    'stem': (3, 3, 3, 4), 'a': (3, 3, 4, 3), 'b': (3, 3, 3, 4), 'fc': (4, 5),
  }  # fmt: skip
  assert stuck(small) == {
    'stem': ((1, 'outputs without weights', 'read by fc'),),
    'b': ((1, 'outputs without weights', 'read by fc'),),
  }
  np.testing.assert_array_equal(small.report.keep['stem'][3], [0, 2, 3, 4])


def test_concatenation_shifts_and_a_slice_shifts_back():
  def apply(p, x):
    a, b = conv(x, p['a']), conv(x, p['b'])
    x = jax.nn.relu(jnp.concatenate([a, x, b], -1))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (2, 1)))
    y = conv(x, p['c'])
    return y, conv(x[..., 3:11], p['d'])

  params = {'a': normal(3, 3, 2, 4, empty=(0, 3)), 'b': normal(1, 1, 2, 5, empty=(1,)),
            'c': normal(1, 1, 14, 3, seed=1), 'd': normal(3, 3, 8, 2, seed=2)}  # fmt: skip
  params['c'][:, :, 9:12] = 0
  params['d'][:, :, 6:] = 0
  # Padded: a is 2..5, x 6..7, b 8..12; d reads 3..10.
  want = {'a': (3, 3, 2, 2), 'b': (1, 1, 2, 2), 'c': (1, 1, 6, 3), 'd': (3, 3, 5, 2)}
  small = remove_unused(apply, params, jnp.ones((1, 6, 6, 2)))
  assert shapes(small.variables) == want
  x = normal(2, 6, 6, 2, seed=9)
  for a, b in zip(small.apply(small.variables, x), apply(params, x), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(np.abs(b).max()))


def test_depthwise_and_grouped_convolutions_hand_on():
  def apply(p, x):
    x = jax.nn.relu(conv(x, p['in']))
    x = jax.nn.relu(conv(x, p['depth'], groups=6))  # two outputs each
    x = conv(x, p['group'], groups=4)  # 3 inputs, 2 outputs each
    return conv(x, p['out'])

  params = {
    'in': normal(1, 1, 2, 6, empty=(0, 4)),
    'depth': normal(3, 3, 1, 12, seed=1),
    'group': normal(3, 3, 3, 8, seed=2, empty=(2, 3)),
    'out': normal(1, 1, 8, 3, seed=3),
  }
  # Depthwise outputs 0, 1 and 8, 9 are zero; so is what group 1 makes, of outputs 3, 4, 5. Groups
  # 0 (outputs 0..2) and 2 (6..8) also read live ones and stay whole, so 1 and 2 stay for 3.
  small = removed(apply, params, (1, 6, 6, 2))
  assert shapes(small.variables) == {
    'in': (1, 1, 2, 6), 'depth': (3, 3, 1, 12), 'group': (3, 3, 3, 8), 'out': (1, 1, 8, 3),
  }  # fmt: skip
  assert stuck(small)['in'] == ((2, 'outputs without weights', 'read by out'),)

  # With as many inputs to a group as a pair of channels brings, they go by groups.
  def even(p, x):
    x = jax.nn.relu(conv(jax.nn.relu(conv(x, p['in'])), p['depth'], groups=6))
    return conv(conv(x, p['group'], groups=3), p['out'])

  params |= {'in': normal(1, 1, 2, 6, empty=(0, 1, 4)), 'group': normal(3, 3, 4, 6, seed=2)}
  params['out'] = normal(1, 1, 6, 3, seed=3)
  small = removed(even, params, (1, 6, 6, 2))
  assert shapes(small.variables) == {
    'in': (1, 1, 2, 4), 'depth': (3, 3, 1, 8), 'group': (3, 3, 4, 4), 'out': (1, 1, 4, 3),
  }  # fmt: skip


def _two_layers(p, x, padding, size):
  x = jax.nn.relu(conv(x, p['a']) + p['bias'][None, None, None])
  x = conv(x, p['b'], padding) + p['after'][None, None, None]
  return jax.nn.relu(x)


@pytest.mark.parametrize(
  ('padding', 'size', 'folds'), [('VALID', 3, True), ('SAME', 1, True), ('SAME', 3, False)]
)
def test_a_constant_moves_into_the_next_bias_where_that_is_exact(padding, size, folds):
  params = {
    'a': normal(3, 3, 2, 4, empty=(1, 2, 3)),
    'bias': np.array([0.1, 0.5, -0.5, 0.25], np.float32),
    'b': normal(size, size, 4, 3, seed=1),
    'after': normal(3, seed=2),
  }
  apply = functools.partial(_two_layers, padding=padding, size=size)
  small = removed(apply, params, (1, 7, 7, 2))
  # relu(-0.5) is 0: that filter goes in any case.
  width = 1 if folds else 3
  assert small.variables['a'].shape == (3, 3, 2, width)
  assert small.variables['b'].shape == (size, size, width, 3)
  why = 'holds a constant that b cannot take up: '
  if folds:
    assert small.report.folded == (('after', 2),) and not stuck(small)
    want = params['after'] + np.einsum('hwio,i->o', params['b'], [0, 0.5, 0, 0.25])
    np.testing.assert_allclose(small.variables['after'], want, rtol=1e-6)
  else:
    why += 'its padding makes the border differ'
    assert small.report.folded == ()
    assert stuck(small) == {'a': ((2, 'outputs without weights', why),)}
    assert why in str(small.report)
  kept = removed(apply, params, (1, 7, 7, 2), fold=False)
  assert kept.variables['a'].shape == (3, 3, 2, 3)


def test_a_constant_moves_into_the_next_running_mean():
  def norm(x, p):
    scale = p['scale'] / jnp.sqrt(p['var'] + 1e-3)
    return (x - p['mean'][None, None, None]) * scale[None, None, None] + p['bias'][None, None, None]

  def apply(p, x):
    x = jnp.clip(norm(conv(x, p['a']), p['bn1']), 0, 6)
    return norm(conv(x, p['b']), p['bn2'])

  rng = np.random.default_rng(0)
  bn = lambda c: {
    k: rng.uniform(0.5, 2, c).astype(np.float32) for k in ('scale', 'var', 'mean', 'bias')
  }
  params = {
    'a': normal(3, 3, 2, 6, empty=(0, 2, 5)),
    'bn1': bn(6),
    'b': normal(1, 1, 6, 4),
    'bn2': bn(4),
  }
  params['bn1']['mean'][0], params['bn1']['bias'][0] = 0, 3.0
  params['bn1']['bias'][2] = 40.0  # saturates at 6
  params['bn1']['bias'][5] = -9.0  # stays at 0
  small = removed(apply, params, (1, 5, 5, 2))
  assert small.report.folded == (('bn2/mean', 2),)
  assert small.variables['bn1']['var'].shape == (3,)
  changed = [k for k in params['bn2'] if (small.variables['bn2'][k] != params['bn2'][k]).any()]
  assert changed == ['mean']


@pytest.mark.parametrize('what', ['shared', 'read twice', 'returned'])
def test_a_bias_that_is_not_the_layers_own_takes_up_nothing(what):
  def apply(p, x):
    x = jax.nn.relu(x @ p['a'] + p['bias'][None])
    y = x @ p['b']
    z = y + p['after'][None]
    extra = {'shared': p['after'][None], 'read twice': jnp.tanh(y), 'returned': p['after'][None]}
    return (z * extra[what]) if what != 'returned' else z + 0 * p['after'][None]

  params = {'a': normal(3, 2, empty=(1,)), 'bias': np.float32([0.1, 1]), 'b': normal(2, 3),
            'after': normal(3, seed=1)}  # fmt: skip
  small = removed(apply, params, (1, 3))
  assert small.report.folded == () and small.variables['a'].shape == (3, 2)
  [(_, _, why)] = stuck(small)['a']
  assert why.endswith('b cannot take up: no bias or mean of its own follows')


@pytest.mark.parametrize('order', ['pixels first', 'channels first'])
def test_flattening_pooling_and_pixels(order):
  def apply(p, x):
    x = jax.nn.relu(conv(x, p['a']))
    x = nn.max_pool(x, (2, 2), (2, 2)) + nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    x = x.transpose(0, 3, 1, 2) if order == 'channels first' else x
    x = x.reshape(x.shape[0], -1)
    return jax.nn.relu(x @ p['b']) @ p['c']

  params = {'a': normal(3, 3, 2, 5, empty=(1, 4)), 'b': normal(45, 8, seed=1, empty=(3,)),
            'c': normal(8, 2, seed=2)}  # fmt: skip
  rows = np.arange(45).reshape(5, 9)[2] if order == 'channels first' else np.arange(2, 45, 5)
  params['b'][rows[:-1]] = 0  # channel 2, all pixels but one
  small = removed(apply, params, (1, 6, 6, 2))
  assert shapes(small.variables) == {'a': (3, 3, 2, 3), 'b': (27, 7), 'c': (7, 2)}
  params['b'][rows] = 0
  small = removed(apply, params, (1, 6, 6, 2))
  assert shapes(small.variables) == {'a': (3, 3, 2, 2), 'b': (18, 7), 'c': (7, 2)}


def test_squeeze_and_excite():
  def apply(p, x):
    x = jax.nn.relu(conv(x, p['a']))
    gate = jax.nn.relu(x.mean((1, 2)) @ p['down'])
    gate = jax.nn.sigmoid(gate @ p['up'] + p['bias'][None])
    return conv(x * gate[:, None, None], p['b'])

  params = {'a': normal(3, 3, 2, 6, empty=(0, 3)), 'down': normal(6, 3), 'up': normal(3, 6),
            'bias': normal(6, seed=4), 'b': normal(1, 1, 6, 2, seed=1)}  # fmt: skip
  params['b'][:, :, 1] = 0  # still read by the gate
  params['b'][:, :, 2] = params['down'][2] = 0  # not
  small = removed(apply, params, (1, 6, 6, 2))
  assert shapes(small.variables) == {
    'a': (3, 3, 2, 3), 'down': (3, 3), 'up': (3, 3), 'bias': (3,), 'b': (1, 1, 3, 2),
  }  # fmt: skip


def test_what_runs_over_channels_keeps_them():
  def apply(p, x):
    x = x @ p['a']
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)
    return jax.nn.softmax(x @ p['b']) @ p['c']

  params = {'a': normal(3, 4, empty=(0,)), 'b': normal(4, 5, seed=1, empty=(2,)), 'c': normal(5, 2)}
  small = removed(apply, params, (1, 3))
  assert shapes(small.variables) == shapes(params)
  reasons = {path: why for path, ((_, _, why),) in stuck(small).items()}
  assert reasons == {'a': 'read by b', 'b': 'reduce_max in no scope'}

  # A root mean square sums squares, and zeros add nothing.
  def rms(p, x):
    x = x @ p['a']
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x @ p['b']

  small = removed(rms, params, (1, 3))
  assert small.variables['a'].shape == (3, 3)


def test_whole_heads_and_their_sizes():
  def apply(p, x):
    q, k, v = (jnp.einsum('ntc,chd->nthd', x, p[name]) for name in 'qkv')
    weights = jax.nn.softmax(jnp.einsum('nthd,nshd->nhts', q, k))
    x = jnp.einsum('nhts,nshd->nthd', weights, v)
    return x.reshape(*x.shape[:2], -1) @ p['out']

  params = {name: normal(6, 3, 4, seed=i) for i, name in enumerate('qkv')}
  params['out'] = normal(12, 5)
  params['out'][4:8] = 0  # the second head is not read
  params['q'][:, :, 1] = 0  # one entry of every query
  small = removed(apply, params, (1, 7, 6), tolerance=1e-4)  # softmax of large numbers
  want = {'q': (6, 2, 3), 'k': (6, 2, 3), 'v': (6, 2, 4), 'out': (8, 5)}
  assert shapes(small.variables) == want


def test_the_last_channel_stays():
  params = [normal(3, 4) * 0, normal(4, 5), normal(5, 2)]
  small = remove_unused(_mlp, params, jnp.ones((1, 3)))
  assert shapes(small.variables) == [(3, 1), (1, 1), (1, 2)]
  assert not np.any(small.apply(small.variables, np.ones((2, 3), np.float32)))
  assert 'the last one of its tensor' in str(small.report)


def test_weights_on_the_left_and_their_names():
  def apply(p, x):
    x = jax.nn.relu(jnp.where(p['mask'][None], p['a'], 0).T @ x.T)
    return (p['b'] @ x + p['bias'][:, None]).T

  params = {'a': normal(5, 4), 'b': normal(3, 4, seed=1), 'bias': normal(3),
            'mask': np.array([True, False, True, True])}  # fmt: skip
  small = removed(apply, params, (1, 5))
  assert [(x.path, x.inputs, x.outputs) for x in small.report.layers] == [
    ('a', (5, 5), (4, 3)), ('b', (4, 3), (3, 3)),
  ]  # fmt: skip


def test_weights_that_are_computed_and_captured():
  mask = np.array([1, 0, 1, 1], np.float32)
  captured = normal(4, 3, seed=1)
  captured[3] = 0

  def apply(p, x):
    w = jnp.where(p['mask'][None], p['w'], 0) / jnp.linalg.norm(p['w'])
    return jax.nn.relu(x @ w * mask[None] + jnp.zeros((1, 4))) @ captured

  params = {'w': normal(5, 4), 'mask': np.array([True, True, True, True])}
  small = removed(lambda p, x: apply(p, x), params, (1, 5))
  # The norm is over all of w, which therefore stays.
  assert small.variables['w'].shape == (5, 4)

  def simple(p, x):
    return jax.nn.relu(x @ jnp.where(p['mask'][None], p['w'], 0) * mask[None]) @ captured

  small = removed(simple, params, (1, 5))
  assert shapes(small.variables) == {'w': (5, 2), 'mask': (2,)}


def test_masks_and_moments_are_cut_alike():
  params = {'a': normal(3, 4, empty=(1,)), 'b': normal(4, 2), 'spare': normal(7)}
  apply = lambda p, x: jax.nn.relu(x @ p['a']) @ p['b']
  small = remove_unused(apply, params, jnp.ones((1, 3)))
  assert small.report.unused == ('spare',) and small.variables['spare'].shape == (7,)
  assert small.report.sizes == (27, 22)
  masks = {'a': params['a'] != 0, 'b': None, 'step': jnp.zeros(())}
  cut = jax.jit(small.report.slice)(masks)
  assert cut['a'].shape == (3, 3) and cut['a'].all() and cut['b'] is None
  with pytest.raises(
    ValueError, match=r'a: an array \[3, 3\] cannot be cut, the variable was \[3, 4\]'
  ):
    small.report.slice(cut)


def test_kinds_of_trees_and_types():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Dense(4, use_bias=False, dtype=jnp.bfloat16)(x))
      return nn.Dense(2)(x.astype(jnp.float32))

  net = Net()
  variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
  variables['params']['Dense_0']['kernel'] *= jnp.array([1, 0, 0, 1.0])[None]
  small = remove_unused(net.apply, variables, jnp.ones((1, 3)))
  assert jax.tree.structure(small.variables) == jax.tree.structure(variables)
  assert small.variables['params']['Dense_1']['kernel'].shape == (2, 2)
  assert isinstance(small.variables['params']['Dense_1']['kernel'], jax.Array)
  x = jnp.ones((2, 3))
  want = net.apply(variables, x)
  np.testing.assert_allclose(jax.jit(small.apply)(small.variables, x), want, rtol=1e-5)
  grads = jax.grad(lambda v: small.apply(v, x).sum())(small.variables)
  assert shapes(grads) == shapes(small.variables)


@pytest.mark.parametrize('kind', ['nnx', 'equinox', 'haiku'])
def test_trees_of_other_libraries(kind):
  params, apply, layout, conv, dense, weights = net(kind)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')
  filters, reads = (0, 1) if kind == 'equinox' else (-1, 0)

  def cut(path, leaf):
    if name(path) == conv:  # filters 1 and 5 are empty
      gone = np.array([1, 5])
      return jnp.asarray(leaf).at[gone if filters == 0 else (..., gone)].set(0)
    if name(path) == dense:  # nothing reads channel 6
      return jnp.asarray(leaf).at[6 if reads == 0 else (slice(None), 6)].set(0)
    return leaf

  params = jax.tree_util.tree_map_with_path(cut, params)
  small = remove_unused(apply, params, jax.ShapeDtypeStruct(IMAGES, jnp.float32))
  assert type(small.variables) is type(params)
  assert jax.tree.structure(small.variables) == jax.tree.structure(params)
  before, after = (
    {name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (params, small.variables)
  )
  for path, shape in before.items():
    assert after[path] == tuple(5 if n == 8 else n for n in shape), path
  x = normal(3, *IMAGES[1:], seed=9)
  want, got = jax.jit(lambda x: (apply(params, x), small.apply(small.variables, x)))(x)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
  # Masks are cut to the same channels.
  plan = make_plan(params, [(weights, Unstructured(keep=0.5))], layout=layout)
  masks = small.report.slice(project(plan, params)[1])
  found = {name(path): m.shape for path, m in jax.tree_util.tree_leaves_with_path(masks)}
  assert found == {conv: after[conv], dense: after[dense]}


def test_numbers_are_needed():
  variables = {'w': jax.ShapeDtypeStruct((3, 4), jnp.float32)}
  with pytest.raises(ValueError, match='w: removing needs numbers, got ShapeDtypeStruct'):
    remove_unused(lambda p, x: x @ p['w'], variables, jnp.ones((1, 3)))
  with pytest.raises(ValueError, match='while in no scope: a loop of unknown length'):
    remove_unused(
      lambda p, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c * 2, x @ p['w']),
      {'w': jnp.ones((3, 4))},
      jnp.ones((1, 3)),
    )


def _masked_network(name, shape, keep):
  """A network of ours with random numbers and empty filters."""
  net, rng = create_model(name), np.random.default_rng(0)
  variables = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))

  def fill(path, leaf):
    kind = path[-1].key
    if kind == 'kernel':
      w = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
      return np.float32(w * (rng.random(leaf.shape[-1]) < keep if len(leaf.shape) == 4 else 1))
    if kind in ('bias', 'mean'):
      return np.float32(rng.normal(size=leaf.shape) * 0.3)
    return np.float32(rng.uniform(0.5, 1.5, leaf.shape))

  return net, jax.tree_util.tree_map_with_path(fill, variables)


def _same_network(net, variables, small, x):
  run = jax.jit(lambda v, s, x: (net.apply(v, x), small.apply(s, x)))
  want, got = run(variables, small.variables, x)
  # A whole network's float32 sums in another order.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_resnet20_with_empty_filters():
  shape = (1, 16, 16, 3)
  net, variables = _masked_network('cifar_resnet20', shape, keep=0.5)
  # Channel 3 of the first stage is channel 11 of the second, where the shortcut pads 8 in front, and
  # 27 of the third: zero after every ReLU.
  channel = {1: 3, 2: 11, 3: 27}
  params = variables['params']
  for stage, c in channel.items():
    for i in range(3):
      params[f'layer{stage}_{i}']['bn2']['bias'][c] = -9
      params[f'layer{stage}_{i}']['conv2']['kernel'][..., c] = 0
  params['conv1']['kernel'][..., 3], params['bn1']['bias'][3] = 0, -9
  small = remove_unused(net.apply, variables, jnp.ones(shape))
  layers = {layer.path.removeprefix('params/'): layer for layer in small.report.layers}
  assert small.report.sizes[1] < 0.85 * small.report.sizes[0]
  for stage in (1, 2, 3):
    widths = {layers[f'layer{stage}_{i}/conv2/kernel'].outputs for i in range(3)}
    assert len(widths) == 1  # one stage, one width
  assert layers['conv1/kernel'].outputs[1] == layers['layer1_0/conv2/kernel'].outputs[1] == 15
  for stage, c in channel.items():
    assert c not in small.report.keep[f'params/layer{stage}_2/conv2/kernel'][3]
  _same_network(net, variables, small, normal(2, *shape[1:], seed=5))


@pytest.mark.full
def test_mobilenet_v2_with_empty_filters():
  shape = (1, 32, 32, 3)
  net, variables = _masked_network('mobilenet_v2', shape, keep=0.5)
  small = remove_unused(net.apply, variables, jnp.ones(shape))
  assert small.report.sizes[1] < 0.5 * small.report.sizes[0]
  assert small.report.folded  # linear bottlenecks take up constants of 1x1 convolutions
  for layer in small.report.layers:
    if 'depthwise' in layer.path:
      assert layer.inputs == layer.outputs
      assert (
        small.variables['params'][layer.path.split('/')[1]]['depthwise']['kernel'].shape[2] == 1
      )
  _same_network(net, variables, small, normal(2, *shape[1:], seed=5))
