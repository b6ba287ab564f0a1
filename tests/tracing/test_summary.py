"""Counts against numbers worked out by hand, and the published table of ResNet-50 inputs."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.models import create_model
from fqjax.tracing import summary


def _array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _row(result, path):
  [row] = [row for row in result.rows if row.path == path]
  return row


bfloat16_meets_batch_norm = pytest.mark.promotes('BatchNorm of Flax, on bfloat16')


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), strides=2, name='conv1', dtype=jnp.bfloat16)(x)
    x = nn.BatchNorm(use_running_average=not train, name='bn1')(x)
    x = nn.relu(x).mean((1, 2))
    return nn.remat(nn.Dense)(10, name='fc')(x)


def _linen(train=False):
  net = _Net()
  variables = jax.eval_shape(net.init, jax.random.key(0), _array(2, 8, 8, 3))
  return net, variables


@bfloat16_meets_batch_norm
@pytest.mark.parametrize('jit', [False, True])
def test_linen_network(jit):
  net, variables = _linen()
  apply = jax.jit(net.apply) if jit else net.apply
  result = summary(apply, variables, _array(2, 8, 8, 3))
  assert [row.path for row in result.rows] == ['conv1', 'bn1', 'fc']
  conv, bn, fc = result.rows
  assert conv == (
    'conv1', 'conv_general_dilated', (2, 8, 8, 3), (2, 4, 4, 8),
    27 * 8 + 8, 2 * 16 * 27 * 8, 4 * (27 * 8 + 8),
  )  # fmt: skip
  assert (bn.params, bn.macs, bn.output) == (16, 0, (2, 4, 4, 8))
  assert (fc.op, fc.params, fc.macs) == ('dot_general', 90, 2 * 80)
  assert result.params == 224 + 16 + 90
  assert result.macs == 2 * 16 * 27 * 8 + 160
  assert result.bytes == 4 * result.params
  assert result.unused == () and result.notes == ()


@bfloat16_meets_batch_norm
def test_train_mode_static_arguments_and_mutable():
  net, variables = _linen()
  result = summary(net.apply, variables, _array(2, 8, 8, 3), train=True, mutable=['batch_stats'])
  assert result.params == 330
  assert result.macs == 2 * 16 * 27 * 8 + 160


def test_nothing_is_computed():
  def apply(params, x):
    jax.debug.callback(lambda: pytest.fail('the function ran'))
    return x @ params['w']

  assert summary(apply, {'w': _array(3, 4)}, _array(2, 3)).macs == 24
  # 400 GB of weights that nobody allocates.
  big = summary(lambda p, x: x @ p['w'], {'w': _array(10**5, 10**6)}, _array(1, 10**5))
  assert (big.macs, big.params, big.bytes) == (10**11, 10**11, 4 * 10**11)


CONVOLUTIONS = [
  # kernel shape HWIO, keywords, output pixels, MACs per output pixel and image
  ('dense', (3, 3, 6, 10), {}, (9, 9), 9 * 6 * 10),
  ('strided', (3, 3, 6, 10), {'window_strides': (2, 2)}, (5, 5), 9 * 6 * 10),
  ('dilated', (3, 3, 6, 10), {'rhs_dilation': (2, 2)}, (9, 9), 9 * 6 * 10),
  ('grouped', (3, 3, 2, 12), {'feature_group_count': 3}, (9, 9), 9 * 2 * 12),
  ('depthwise', (5, 5, 1, 6), {'feature_group_count': 6}, (9, 9), 25 * 6),
  ('pointwise', (1, 1, 6, 7), {}, (9, 9), 6 * 7),
]


@pytest.mark.parametrize(
  ('kernel', 'options', 'pixels', 'per_pixel'),
  [case[1:] for case in CONVOLUTIONS],
  ids=[case[0] for case in CONVOLUTIONS],
)
def test_convolutions(kernel, options, pixels, per_pixel):
  def apply(params, x):
    options_ = {'window_strides': (1, 1), **options}
    return jax.lax.conv_general_dilated(
      x, params['k'], padding='SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options_
    )

  result = summary(apply, {'k': _array(*kernel)}, _array(2, 9, 9, 6))
  assert result.rows[0].output[1:3] == pixels
  assert result.macs == 2 * pixels[0] * pixels[1] * per_pixel
  assert result.params == np.prod(kernel)


@pytest.mark.parametrize('layout', ['NHWC', 'NCHW'])
def test_convolution_layouts(layout):
  spec = {'NHWC': ('NHWC', 'HWIO', 'NHWC'), 'NCHW': ('NCHW', 'OIHW', 'NCHW')}[layout]
  x = {'NHWC': (2, 8, 6, 3), 'NCHW': (2, 3, 8, 6)}[layout]
  k = {'NHWC': (3, 1, 3, 5), 'NCHW': (5, 3, 3, 1)}[layout]

  def apply(p, x):
    return jax.lax.conv_general_dilated(x, p['k'], (1, 1), 'VALID', dimension_numbers=spec)

  assert summary(apply, {'k': _array(*k)}, _array(*x)).macs == 2 * 6 * 6 * 3 * 3 * 5


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize(('size', 'stride'), [(2, 2), (3, 2), (4, 2), (4, 4)])
def test_transposed_convolution_counts_no_inserted_zeros(size, stride, padding):
  # Every input pixel meets every tap once.
  def apply(p, x):
    return jax.lax.conv_transpose(x, p['k'], (stride, stride), padding)

  result = summary(apply, {'k': _array(size, size, 3, 5)}, _array(1, 7, 7, 3))
  assert result.macs == 7 * 7 * size * size * 3 * 5


def test_stride_over_inserted_zeros_reads_one_tap_in_three():
  # Outputs sit on real pixels, so of the three taps per axis only the middle one meets data.
  def apply(p, x):
    return jax.lax.conv_general_dilated(
      x,
      p['k'],
      window_strides=(2, 2),
      padding=((1, 1), (1, 1)),
      lhs_dilation=(2, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  result = summary(apply, {'k': _array(3, 3, 4, 5)}, _array(1, 7, 7, 4))
  assert result.rows[0].output == (1, 7, 7, 5)
  assert result.macs == 7 * 7 * 4 * 5


def test_gradient_of_a_convolution_costs_what_the_convolution_costs():
  # Backward by input and by kernel each repeat the forward's products (stride 2, no padding).
  def conv(k, x):
    return jax.lax.conv_general_dilated(
      x, k, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  forward = summary(lambda p, x: conv(p['k'], x), {'k': _array(2, 2, 3, 5)}, _array(2, 8, 8, 3))
  loss = lambda k, x: (conv(k, x) ** 2).sum()
  both = summary(
    lambda p, x: jax.grad(loss, (0, 1))(p['k'], x), {'k': _array(2, 2, 3, 5)}, _array(2, 8, 8, 3)
  )
  assert both.macs == 3 * forward.macs


def test_matrix_products():
  result = summary(
    lambda p, x: jnp.einsum('bhqd,bhkd->bhqk', x, x) @ p['w'],
    {'w': _array(7, 5)},
    _array(2, 3, 7, 4),
  )
  assert result.macs == 2 * 3 * 7 * 7 * 4 + 2 * 3 * 7 * 7 * 5


def test_ragged_dot():
  def apply(p, x, sizes):
    return jax.lax.ragged_dot(x, p['experts'], sizes)

  result = summary(apply, {'experts': _array(4, 6, 5)}, _array(9, 6), _array(4, dtype=jnp.int32))
  assert result.macs == 9 * 6 * 5  # each row meets one expert
  assert result.params == 4 * 6 * 5


def test_scan_counts_every_iteration():
  def apply(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p['stack']['w'])[0]

  result = summary(apply, {'stack': {'w': _array(7, 5, 5)}}, _array(2, 5))
  assert result.macs == 7 * 2 * 25
  assert result.params == 7 * 25
  assert _row(result, 'stack').op == 'dot_general x7'


def test_nested_scan_and_fori_loop():
  def apply(p, x):
    def inner(c, _):
      return jax.lax.fori_loop(0, 3, lambda i, c: c @ p['w'], c), None

    return jax.lax.scan(inner, x, length=4)[0]

  # fori_loop with a known length is a scan.
  assert summary(apply, {'w': _array(5, 5)}, _array(2, 5)).macs == 4 * 3 * 2 * 25


def test_cond_counts_the_costliest_branch_and_says_so():
  def apply(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ p['a'] @ p['b'], lambda: x @ p['c'])

  params = {'a': _array(5, 9), 'b': _array(9, 5), 'c': _array(5, 5)}
  result = summary(apply, params, _array(2, 5))
  assert result.macs == 2 * 2 * 45
  assert result.params == 45 + 45 + 25 and result.unused == ()
  assert 'costliest of 2 branches' in result.notes[0]


def test_while_is_counted_once_and_flagged():
  def apply(p, x):
    return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p['w'], x)

  result = summary(apply, {'w': _array(5, 5)}, _array(2, 5))
  assert (result.macs, result.params) == (50, 25)
  assert 'length unknown' in result.notes[0] and 'length unknown' in str(result)


def test_custom_derivatives_and_jit_are_entered():
  @jax.custom_vjp
  def double(w, x):
    return 2.0 * (x @ w)

  double.defvjp(lambda w, x: (double(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

  @jax.custom_jvp
  def triple(w, x):
    return 3.0 * (x @ w)

  triple.defjvp(lambda p, t: (triple(*p), triple(t[0], p[1])))

  def apply(p, x):
    return jax.jit(jax.checkpoint(triple))(p['b'], double(p['a'], x))

  result = summary(apply, {'a': _array(3, 4), 'b': _array(4, 5)}, _array(2, 3))
  assert result.macs == 2 * 12 + 2 * 20
  assert result.params == 12 + 20


def test_shard_map_counts_all_devices():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec

  def apply(p, x):
    step = jax.shard_map(
      lambda w, x: x @ w, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec('data')
    )
    return step(p['w'], x)

  result = summary(apply, {'w': _array(3, 4)}, _array(16, 3))
  assert (result.macs, result.params) == (16 * 12, 12)


def test_parameters_followed_through_casts_views_and_masks():
  mask = np.ones((4, 6), np.float32)

  def apply(p, x):
    w = p['fc']['w'].astype(jnp.bfloat16).T.reshape(2, 2, 6).reshape(4, 6)
    w = w.astype(x.dtype) * mask
    w = (w - w.mean()) / jnp.sqrt(w.var() + 1e-5)  # weight standardisation
    return x @ w + p['fc']['b'][None, :]

  result = summary(apply, {'fc': {'w': _array(6, 4), 'b': _array(6)}}, _array(2, 4))
  assert [(r.path, r.op, r.params) for r in result.rows] == [('fc', 'dot_general', 30)]


def test_low_rank_update_belongs_to_its_layer():
  def apply(p, x):
    return x @ (p['fc']['w'] + p['fc']['a'] @ p['fc']['b'])

  params = {'fc': {'w': _array(6, 8), 'a': _array(6, 2), 'b': _array(2, 8)}}
  result = summary(apply, params, _array(3, 6))
  assert result.rows[0].params == 48 + 12 + 16 and len(result.rows) == 1
  assert result.macs == 6 * 2 * 8 + 3 * 48


def test_shared_parameters_count_once_under_their_scopes():
  def apply(p, x):
    with jax.named_scope('first'):
      x = x @ p['w']
    with jax.named_scope('second'):
      return x @ p['w']

  result = summary(apply, {'w': _array(4, 4)}, _array(2, 4))
  assert [(r.path, r.params, r.macs) for r in result.rows] == [
    ('first', 16, 32),
    ('second', 0, 32),
  ]


def test_unused_parameters_and_dead_code():
  def apply(p, x):
    _ = x @ p['dead']  # reaches no output
    return x @ p['w']

  params = {'w': _array(4, 4), 'dead': _array(4, 100), 'extra': {'b': _array(3)}}
  result = summary(apply, params, _array(2, 4))
  assert result.macs == 32
  assert dict(result.unused) == {'dead': 400, 'extra/b': 3}
  assert result.params == 16 + 400 + 3
  assert 'unused parameters: dead (400), extra/b (3)' in str(result)


def test_embedding_and_position_tables():
  def apply(p, ids):
    return jnp.take(p['table'], ids, axis=0) + p['position'][None]

  params = {'table': _array(100, 8), 'position': _array(5, 8)}
  result = summary(apply, params, _array(2, 5, dtype=jnp.int32))
  assert (result.params, result.macs, result.unused) == (840, 0, ())


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.drop(self.norm(self.conv(x)))


def test_nnx_module_state_and_closure():
  model = _Nnx(nnx.Rngs(0))
  model.eval()
  graph, state = nnx.split(model)
  x = _array(1, 8, 8, 3)
  macs = 64 * 9 * 12
  calls = (
    summary(model, x),
    summary(lambda m, x: m(x), model, x),
    summary(lambda g, s, x: nnx.merge(g, s)(x), graph, state, x),
  )
  for result in calls:
    assert [(r.path, r.params) for r in result.rows] == [('conv', 112), ('norm', 8)]
    assert result.macs == macs
  closure = summary(lambda x: model(x), x)
  assert closure.macs == macs
  assert 'captured arrays' in closure.notes[0]


def test_module_that_is_a_pytree_of_arrays_and_functions():
  # What an Equinox module is.
  @jax.tree_util.register_pytree_with_keys_class
  class Linear:
    def __init__(self, weight, activation):
      self.weight, self.activation = weight, activation

    def tree_flatten_with_keys(self):
      key = jax.tree_util.GetAttrKey
      return [(key('weight'), self.weight), (key('activation'), self.activation)], None

    @classmethod
    def tree_unflatten(cls, aux, children):
      return cls(*children)

    def __call__(self, x):
      return self.activation(self.weight @ x)

  result = summary(Linear(_array(5, 3), jax.nn.relu), _array(3))
  assert [(r.path, r.params, r.macs) for r in result.rows] == [('weight', 15, 15)]


def test_captured_weights_of_a_plain_function():
  w, table = jnp.ones((3, 4)), np.ones((4, 2), np.float32)
  result = summary(lambda x: jax.jit(lambda x: x @ w @ table)(x), _array(2, 3))
  assert result.params == 12  # the NumPy table is no weight
  assert result.macs == 2 * 12 + 2 * 8


def test_bare_arrays_are_inputs():
  result = summary(jnp.matmul, _array(2, 3), _array(3, 4))
  assert (result.params, result.macs) == (0, 24)
  assert [row.path for row in result.rows] == ['dot_general']


def test_work_that_is_no_multiply_accumulate_is_named():
  result = summary(lambda x: jnp.fft.fft(x), _array(8, dtype=jnp.complex64))
  assert result.macs == 0 and 'fft' in result.notes[0]


@bfloat16_meets_batch_norm
def test_table_is_aligned_and_html_is_escaped():
  net, variables = _linen()
  result = summary(net.apply, variables, _array(2, 8, 8, 3))
  lines = str(result).splitlines()
  assert lines[0].split() == ['layer', 'op', 'input', 'output', 'params', 'MACs', 'bytes']
  assert lines[-1].split() == ['total', '330', '7.072', 'k', '1.320', 'k']
  assert len({len(line) for line in lines}) == 1
  page = result._repr_html_()
  assert page.count('<tr>') == 1 + 3 + 1 and page.count('<td>') == 4 * 7
  odd = summary(lambda p, x: x @ p['<b>']['w'], {'<b>': {'w': _array(2, 2)}}, _array(1, 2))
  assert '<b>' not in odd._repr_html_()


# Learning in the Frequency Domain: parameters (M) and GMACs at stage-2 stride 2 and 1.
RESNET50 = [
  (None, 25.557, 4.089, None),
  (6, 25.529, 3.913, 13.508),
  (12, 25.531, 3.919, 13.514),
  (24, 25.535, 3.931, 13.526),
  (48, 25.542, 3.955, 13.550),
  (64, 25.547, 3.971, 13.566),
  (192, 25.588, 4.100, 13.695),
]


@pytest.mark.parametrize(('channels', 'params', 'stride2', 'stride1'), RESNET50)
def test_published_resnet50_table(channels, params, stride2, stride1):
  shape = (1, 224, 224, 3) if channels is None else (1, 56, 56, channels)
  for stride, gmacs in ((2, stride2), (1, stride1)):
    if gmacs is None:
      continue
    if channels is None:
      model = create_model('resnet50')
    else:
      model = create_model('resnet50_dct', channels=channels, stage2_stride=stride)
    variables = jax.eval_shape(model.init, jax.random.key(0), _array(*shape))
    result = summary(model.apply, variables, _array(*shape))
    assert round(result.params / 1e6, 3) == params
    assert round(result.macs / 1e9, 3) == gmacs
    assert result.unused == ()
