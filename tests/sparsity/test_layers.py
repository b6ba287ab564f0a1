"""Work, groups, uses and layouts of weights, against the layers' own arithmetic and `summary`."""

import equinox as eqx
from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from fqjax import summary
from fqjax.sparsity import Layer, Patterns, make_plan, pattern_set, trace_layers
from tests.sparsity.trees import IMAGES, KINDS, net


@pytest.mark.parametrize('kind', KINDS)
def test_work_of_every_kind_of_network(kind):
  params, apply, layout, conv, dense, _ = net(kind)
  layout = layout or {4: 'HWIO', 2: 'IO'}
  layers = trace_layers(apply, params, jnp.ones(IMAGES))
  assert layers == {
    conv: Layer(2 * 6 * 6 * 9 * 3 * 8, layout=layout[4]),
    dense: Layer(2 * 8 * 5, layout=layout[2]),
  }
  assert (
    sum(layer.macs for layer in layers.values()) == summary(apply, params, IMAGES_ABSTRACT).macs
  )


IMAGES_ABSTRACT = jax.ShapeDtypeStruct(IMAGES, jnp.float32)


class _Mobile(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), name='stem')(x)
    x = nn.Conv(8, (3, 3), feature_group_count=8, strides=2, name='depthwise')(x)
    x = nn.Conv(16, (1, 1), name='point')(x)
    x = nn.Conv(16, (5,) * 2, feature_group_count=4, padding='VALID', name='grouped')(x)
    return nn.Dense(3, name='head')(x.mean((1, 2)))


def test_groups_in_order_of_execution():
  model, x = _Mobile(), jnp.ones((1, 12, 12, 1))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  layers = trace_layers(model.apply, variables, x)
  assert {path: (layer.groups, layer.macs) for path, layer in layers.items()} == {
    'stem/kernel': (1, 144 * 9 * 8),
    'depthwise/kernel': (8, 36 * 9 * 8),
    'point/kernel': (1, 36 * 8 * 16),
    'grouped/kernel': (4, 4 * 25 * 4 * 16),
    'head/kernel': (1, 48),
  }
  assert list(layers) == [
    'stem/kernel',
    'depthwise/kernel',
    'point/kernel',
    'grouped/kernel',
    'head/kernel',
  ]


@pytest.mark.parametrize(('size', 'macs'), [(224, 15.347e9), (32, 313.2e6)])
def test_work_of_vgg16_and_of_its_patterns(size, macs):
  widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
  params = {
    f'conv{i:02}': jax.ShapeDtypeStruct((3, 3, a, b), jnp.float32)
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
  }

  def apply(p, x):
    for i, name in enumerate(p):
      x = jax.lax.conv_general_dilated(
        x, p[name], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      x = x[:, ::2, ::2] if i in (1, 3, 6, 9, 12) else x
    return x

  layers = trace_layers(apply, params, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  assert sum(layer.macs for layer in layers.values()) == pytest.approx(macs, rel=2e-4)
  # Four of nine taps, one of 3.6 kernels, in all layers but the first.
  patterns = Patterns(pattern_set('elog4'), keep=1 / 3.6)
  plan = make_plan(params, [('.*', patterns)], layers=layers, dense=('first',))
  assert [entry.path for entry in plan.pruned] == list(params)[1:]
  before = sum(layers[entry.path].macs for entry in plan.pruned)
  after = sum(layers[entry.path].macs * entry.kept / entry.size for entry in plan.pruned)
  assert before / after == pytest.approx(8.1, abs=1e-3)


def test_weights_used_again_and_in_loops_are_counted_each_time():
  params = {'w': jnp.ones((4, 4)), 'u': jnp.ones((4, 4))}

  def apply(p, x):
    x = (x @ p['w']) @ p['w']
    return jax.lax.scan(lambda c, _: (c @ p['u'], None), x, None, length=7)[0]

  layers = trace_layers(apply, params, jnp.ones((2, 4)))
  assert (layers['w'].macs, layers['w'].times) == (2 * 32, 2)
  assert (layers['u'].macs, layers['u'].times) == (7 * 32, 7)


def test_a_branch_not_taken_does_no_work():
  params = {'w': jnp.ones((4, 4)), 'u': jnp.ones((4, 4))}

  def apply(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p['w'] @ p['w'], lambda x: x @ p['u'], x)

  assert set(trace_layers(apply, params, jnp.ones((2, 4)))) == {'w'}


def test_masked_transposed_and_low_rank_weights():
  params = {'w': jnp.ones((4, 6)), 'a': jnp.ones((2, 3)), 'b': jnp.ones((6, 2))}
  mask = jnp.ones((4, 6))
  apply = lambda p, x: x @ (p['w'] * mask) @ (p['b'] @ p['a'])
  layers = trace_layers(apply, params, jnp.ones((5, 4)))
  assert layers['w'] == Layer(5 * 24, layout='')
  assert layers['b'].macs == 6 * 2 * 3 + 5 * 6 * 3 and 'a' not in layers  # the larger one's
  assert layers['b'].layout == 'OI'
  layers = trace_layers(lambda p, x: x @ p['w'].T, params, jnp.ones((5, 6)))
  assert layers['w'].layout == ''


def test_half_precision_weights_keep_their_layout():
  params = {'w': jnp.ones((4, 6))}
  apply = lambda p, x: x @ p['w'].astype(jnp.bfloat16)
  assert trace_layers(apply, params, jnp.ones((5, 4), jnp.bfloat16))['w'].layout == 'IO'


def test_a_module_that_is_called():
  model = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
  layers = trace_layers(model, jnp.ones(3))
  assert layers == {
    'layers/0/weight': Layer(15, layout='OI'),
    'layers/1/weight': Layer(10, layout='OI'),
  }


def test_without_parameters_it_says_what_to_pass():
  w = jnp.ones((3, 3))
  with pytest.raises(ValueError, match='no parameters among the arguments; pass them'):
    trace_layers(lambda x: x @ w, jnp.ones(3))
