"""What NumPy computes from a traced graph is what JAX computes, for a batch it has not seen."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.runtime import oplist, reference
from fqjax.runtime.graph import validate
from fqjax.tracing import to_graph


def _w(*shape):
  return np.asarray(np.random.default_rng(0).normal(size=shape) / 3, np.float32)


def _conv(w, strides=(1, 1), padding='SAME', numbers=('NHWC', 'HWIO', 'NHWC'), **options):
  return lambda x: lax.conv_general_dilated(
    x, w, strides, padding, dimension_numbers=numbers, **options
  )


def _module(module):
  """A Linen module with numbers in place of what its initialisers would draw."""
  x = jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(lambda s: np.float32(rng.uniform(0.2, 1, s.shape)), shapes)
  return functools.partial(module.apply, variables)


class _SqueezeExcite(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = jnp.mean(x, axis=(1, 2), keepdims=True)
    y = nn.swish(nn.Conv(2, (1, 1))(y))
    return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1))(y))


class _Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    q, k, v = jnp.split(nn.Dense(3 * c, use_bias=False)(x), 3, axis=-1)
    q, k, v = (t.reshape(n, h * w, 2, c // 2) for t in (q, k, v))
    a = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(c // 2), axis=-1)
    return jnp.einsum('bhqk,bkhd->bqhd', a, v).reshape(n, h * w, c)


def _resize(x, size, **options):
  n, _, _, c = x.shape
  return jax.image.resize(x, (n, *size, c), **options)


def _map_coordinates(x, order, mode):
  y, u = jnp.meshgrid(jnp.linspace(-1.0, 8.0, 5), jnp.linspace(0.0, 7.5, 4), indexing='ij')
  one = lambda image: jax.scipy.ndimage.map_coordinates(image, [y, u], order=order, mode=mode)
  return jax.vmap(jax.vmap(one, -1, -1))(x)


def _grid_sample(x):
  """Bilinear sampling at places the network computes, as spatial transformers do it."""
  n, h, w, c = x.shape
  grid = 4.0 + 4.0 * jnp.tanh(x[..., :2])
  corner = jnp.floor(grid).astype(jnp.int32)
  part = grid - corner
  batch = jnp.arange(n)[:, None, None]

  def take(i, j):
    return x[batch, jnp.clip(corner[..., 0] + i, 0, h - 1), jnp.clip(corner[..., 1] + j, 0, w - 1)]

  a, b = part[..., :1], part[..., 1:]
  top = take(0, 0) * (1 - b) + take(0, 1) * b
  return top * (1 - a) + (take(1, 0) * (1 - b) + take(1, 1) * b) * a


def _flat_gather(x):
  """The same with flattened positions and take_along_axis."""
  n, h, w, c = x.shape
  where = jnp.argsort(x.reshape(n, h * w, c)[..., 0], axis=1)
  return jnp.take_along_axis(x.reshape(n, h * w, c), where[..., None], axis=1)


@jax.custom_jvp
def _jvp(x):
  return jnp.tanh(x)


_jvp.defjvps(lambda t, ans, x: t)


@jax.custom_vjp
def _vjp(x):
  return jnp.sign(x) * x


_vjp.defvjp(lambda x: (_vjp(x), None), lambda _, g: (g,))


def _recurrent(x):
  def step(carry, row):
    carry = jnp.tanh(carry + row)
    return carry, carry

  last, rows = lax.scan(step, x[:, 0], x.transpose(1, 0, 2, 3))
  return last, rows


def _recurrent_index(x):
  def step(i, total):
    return total + lax.dynamic_index_in_dim(x, i, 1, keepdims=False) * i.astype(x.dtype)

  return lax.fori_loop(0, 8, step, jnp.zeros_like(x[:, 0]))


def _traced_cond(x):
  bright = jnp.sum(x) > 0
  a = lax.cond(bright, lambda x: (x * 2, x[:, 0]), lambda x: (jnp.exp(x), -x[:, 1]), x)
  level = jnp.sum(x > 0) % 5 - 1  # beyond both ends too
  b = lax.switch(level, [jnp.sin, jnp.cos, lambda x: x * x], x)
  return a, b, lax.cond(True, jnp.tanh, jnp.exp, x)


def _dynamic_start(x):
  i = jnp.argmax(x[..., 0].sum((0, 1)))
  part = lax.dynamic_slice(x, (0, i, 1, i // 2), (x.shape[0], 3, 8, 2))
  return lax.dynamic_slice_in_dim(x, i, 3, axis=2), lax.dynamic_index_in_dim(x, -i, 1), part


def _decode(x):
  """The boxes of the best anchors."""
  n = x.shape[0]
  boxes, scores = x.reshape(n, 64, 6)[..., :4], jax.nn.sigmoid(x.reshape(n, 64, 6)[..., 4:])
  best, where = lax.top_k(scores.max(-1), 5)
  boxes = jnp.take_along_axis(boxes, where[..., None], axis=1)
  lower, size = boxes[..., :2], jnp.exp(jnp.minimum(boxes[..., 2:], 4.0))
  label = jnp.argmax(jnp.take_along_axis(scores, where[..., None], 1), -1)
  return jnp.concatenate([lower - size / 2, lower + size / 2], -1), best, label


def _windows(x):
  """Shifted windows of a Swin block, there and back."""
  n, h, w, c = x.shape
  x = jnp.roll(x, (-2, -2), (1, 2)).reshape(n, h // 4, 4, w // 4, 4, c)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
  x = x - x.mean(1, keepdims=True)
  x = x.reshape(n, h // 4, w // 4, 4, 4, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
  return jnp.roll(x, (2, 2), (1, 2))


# x is [n, 8, 8, 6] float32.
WAYS = {
  # convolutions
  **{
    f'conv {padding} {stride}': _conv(_w(3, 3, 6, 4), stride, padding)
    for padding in ('SAME', 'VALID', 'SAME_LOWER')
    for stride in ((1, 1), (2, 3))
  },
  'conv padding pairs': _conv(_w(3, 2, 6, 4), (1, 2), [(2, 0), (-1, 3)]),
  'conv dilated': _conv(_w(3, 3, 6, 4), rhs_dilation=(2, 3)),
  'conv groups': _conv(_w(3, 3, 2, 9), feature_group_count=3),
  'conv depthwise': _conv(_w(5, 5, 1, 12), (2, 2), feature_group_count=6),
  'conv NCHW': lambda x: _conv(_w(4, 8, 3, 3), numbers=('NCHW', 'OIHW', 'NCHW'))(x),
  'conv 1d': lambda x: lax.conv_general_dilated(
    x[:, 0], _w(3, 6, 4), (2,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')),
  'conv 3d': lambda x: lax.conv_general_dilated(
    x[..., None], _w(3, 3, 2, 1, 4), (2, 1, 1), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')),
  'conv circular': _module(nn.Conv(4, (3, 3), padding='CIRCULAR')),
  'conv reflect': _module(nn.Conv(4, (3, 3), padding='REFLECT')),
  'conv local': _module(nn.ConvLocal(4, (3, 3))),
  'conv weight norm': _module(nn.WeightNorm(nn.Conv(4, (3, 3)))),
  **{
    f'conv transposed {padding} {stride}': lambda x, s=stride, p=padding: lax.conv_transpose(x, _w(4, 3, 6, 5), s, p)
    for padding in ('SAME', 'VALID')
    for stride in ((2, 2), (3, 1))
  },
  'conv transposed of torch': _module(nn.ConvTranspose(4, (4, 4), (2, 2), transpose_kernel=True)),
  'conv transposed circular': _module(nn.ConvTranspose(4, (3, 3), (2, 2), padding='CIRCULAR')),
  # products
  'dense general': _module(nn.DenseGeneral((2, 3), axis=(-2, -1))),
  'batched matmul': lambda x: x @ x.mT + jnp.matmul(x, x.swapaxes(-1, -2)),
  'einsum': lambda x: (jnp.einsum('nhwc,ncd->nhwd', x, x[:, 0, :6]), jnp.einsum('nhwc,hwc->n', x, _w(8, 8, 6))),
  'einsum of three': lambda x: jnp.einsum('nhwc,cd,nhwe->nde', x, _w(6, 3), x),
  'vmapped': jax.vmap(lambda image: jnp.tensordot(image, _w(8, 6, 2), ([1, 2], [0, 1]))),
  'attention': _module(_Attention()),
  'dot product attention': lambda x: jax.nn.dot_product_attention(x, x * 2, x + 1),
  # windows
  'avg pool SAME': lambda x: nn.avg_pool(x, (3, 3), (2, 2), 'SAME'),
  'avg pool without padding': lambda x: nn.avg_pool(x, (3, 2), (2, 1), 'SAME', count_include_pad=False),
  'max pool SAME': lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME'),
  'min pool': lambda x: nn.pooling.min_pool(x, (2, 2), (2, 2)),
  'patches': lambda x: lax.conv_general_dilated_patches(x, (3, 3), (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')),
  # norms
  'batch norm': _module(nn.BatchNorm(use_running_average=True)),
  'layer norm': _module(nn.LayerNorm()),
  'group norm': _module(nn.GroupNorm(3)),
  'instance norm': _module(nn.InstanceNorm()),
  'rms norm': _module(nn.RMSNorm()),
  'own norm': lambda x: (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5),
  'l2 norm': lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6),
  'local response': lambda x: x / (1 + lax.reduce_window(x * x, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), 'SAME')) ** 0.75,
  # activations
  **{
    name: getattr(jax.nn, name)
    for name in ('relu', 'relu6', 'leaky_relu', 'sigmoid', 'swish', 'hard_swish', 'hard_sigmoid', 'gelu', 'tanh',
                 'softmax', 'log_softmax', 'elu', 'selu', 'celu', 'softplus', 'soft_sign', 'mish', 'silu', 'glu',
                 'hard_tanh', 'squareplus', 'log_sigmoid', 'sparse_plus', 'relu')
  },
  'exact gelu': functools.partial(jax.nn.gelu, approximate=False),
  'prelu': _module(nn.PReLU()),
  'squeeze-excite': _module(_SqueezeExcite()),
  # shapes
  **{
    f'pad {mode}': lambda x, m=mode: jnp.pad(x, ((0, 0), (1, 2), (3, 0), (0, 0)), mode=m)
    for mode in ('constant', 'edge', 'reflect', 'symmetric', 'wrap')
  },
  'split': lambda x: jnp.split(x, 3, -1) + jnp.array_split(x, 3, 1),
  'flip': lambda x: jnp.flip(x, (1, 2)) + x[:, ::-1, ::-1],
  'broadcast': lambda x: jnp.broadcast_to(x[:, None, :, :1], (x.shape[0], 3, 8, 8, 6)) + x[:, None],
  'stack': lambda x: jnp.stack([x, x + 1], 1).reshape(-1, 8, 8, 6),
  'class token': lambda x: jnp.concatenate([jnp.broadcast_to(_w(1, 1, 6), (x.shape[0], 1, 6)), x[:, 0]], 1),
  'tiled token': lambda x: jnp.concatenate([jnp.tile(_w(1, 1, 6), (x.shape[0], 1, 1)), x[:, 0]], 1),
  'pixel shuffle': lambda x: x[..., :4].reshape(-1, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16),
  'windows': _windows,
  'channel shuffle': lambda x: x.reshape(*x.shape[:3], 2, 3).swapaxes(3, 4).reshape(x.shape),
  'reductions': lambda x: [x.sum(1), x.max((1, 2)), x.min(-1), x.prod(3), x.std((1, 2, 3)), (x > 0).any(3), (x > -2).all(3)],
  'select': lambda x: jnp.where((x > 0) & (x < 1) | ~(x >= -1), x, jnp.where(jnp.isnan(x), 0.0, -x)),
  'of the batch': lambda x: jnp.ones((x.shape[0], 1, 1, 1)) * x + jnp.zeros(x.shape),
  'one hot': lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 6),
  'sort': lambda x: (jnp.sort(x, -1), jnp.argsort(x, 1), jnp.median(x, -1)),
  'top-k': lambda x: lax.top_k(x.reshape(x.shape[0], -1), 7),
  'counting': lambda x: jnp.cumsum(x > 0, -1),
  # resizing
  'nearest': lambda x: _resize(x, (16, 5), method='nearest'),
  **{
    f'{method} {size}': lambda x, m=method, s=size: _resize(x, s, method=m)
    for method in ('bilinear', 'bicubic', 'lanczos3')
    for size in ((16, 12), (5, 3))
  },
  'bilinear without antialiasing': lambda x: _resize(x, (3, 5), method='bilinear', antialias=False),
  'scale and translate': lambda x: jax.vmap(lambda v: jax.image.scale_and_translate(
    v, (5, 7, 6), (0, 1), jnp.float32([0.5, 1.2]), jnp.float32([0.3, 0.1]), 'linear'))(x),
  'upsampled by repeat': lambda x: x.repeat(2, 1).repeat(2, 2),
  # sampling
  'map coordinates 1': lambda x: _map_coordinates(x, 1, 'constant'),
  'map coordinates 0': lambda x: _map_coordinates(x, 0, 'nearest'),
  'map coordinates mirror': lambda x: _map_coordinates(x, 1, 'mirror'),
  'grid sample': _grid_sample,
  'flat gather': _flat_gather,
  'embedding': lambda x: jnp.take(_w(9, 4), jnp.clip(4 + 2 * x[..., 0], 0, 8).astype(jnp.int32), axis=0),
  'rows of a table': lambda x: jnp.asarray(_w(9, 4))[jnp.clip(4 + 2 * x[..., 0], 0, 8).astype(jnp.int32)],
  'boxes': _decode,
  'dynamic start': _dynamic_start,
  # control flow and wrappers
  'scan': _recurrent,
  'fori': _recurrent_index,
  'map over rows': lambda x: lax.map(jnp.tanh, x.swapaxes(0, 1)),
  'cond': _traced_cond,
  'nested jit': jax.jit(lambda x: jax.jit(lambda y: jax.jit(jnp.sin)(y) + 1)(x) * 2),
  'custom jvp': _jvp,
  'custom vjp': _vjp,
  'remat': jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
  'linear solve free': lambda x: jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1),
  'interpolated': lambda x: jnp.interp(x, jnp.linspace(-1.0, 1.0, 5), _w(5)),
  'polynomial': lambda x: jnp.polyval(_w(4), x),
  'trigonometry': lambda x: jnp.arctan2(x, 2.0) + jnp.sinc(x) + jnp.hypot(x, x) + jnp.logaddexp(x, 0.0),
  'integers': lambda x: (x * 9).astype(jnp.int32) // 2 % 3 + jnp.mod((x * 5).astype(jnp.int32), 4),
  'floats by floor': lambda x: jnp.floor_divide(x, 0.3) + jnp.mod(x, 0.7) + jnp.trunc(3 * x) + jnp.fmod(x, 0.4),
}  # fmt: skip


@pytest.mark.parametrize('name', WAYS)
def test_numpy_computes_what_jax_computes(name):
  fn = lambda _, x: WAYS[name](x)
  with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
    graph = to_graph(fn, {}, jax.ShapeDtypeStruct((4, 8, 8, 6), jnp.float32)).graph
    validate(graph)
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 6)).astype(np.float32)
    wanted = jax.tree.leaves(jax.jit(fn)({}, x))
  results = reference.run(graph, [x])
  for got, want in zip(results, wanted, strict=True):
    want = np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype.kind == 'f':
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-3))
    else:
      np.testing.assert_array_equal(got, want)


def _places(x, where):
  return jnp.take(x, where, axis=1, mode='fill')


def test_places_outside():
  where = jnp.asarray([0, 9, -9, -1])
  x = np.random.default_rng(0).normal(size=(2, 8, 1, 2)).astype(np.float32)
  for array in (x, (9 * x).astype(np.int32), (9 * x).astype(np.uint8), x > 0):
    traced = to_graph(_places, jnp.asarray(array), where, batch_axis=None)
    [got] = reference.run(traced.graph, [np.asarray(where)], {'params': array})
    np.testing.assert_array_equal(got, _places(jnp.asarray(array), where))


def test_places_that_cannot_be():
  kind = {
    'offset': (),
    'collapsed': (0,),
    'index_map': (0,),
    'operand_batch': (),
    'index_batch': (),
    'mode': 'clip',
  }
  infer = lambda x, where, **other: oplist.infer(
    'gather', [(x, 'float32'), (where, 'int32')], {**kind, **other}
  )
  # One of the batch may be taken, by each sample its own.
  assert infer(('n',), (5, 1), sizes=(1,)) == [((5,), 'float32')]
  own = {'collapsed': (1,), 'index_map': (1,), 'operand_batch': (0,), 'index_batch': (0,)}
  assert infer(('n', 3), ('n', 5, 1), sizes=(1, 1), **own) == [(('n', 5), 'float32')]
  for message, x, where, sizes, other in (
    ('the batch is taken whole', ('n',), (5, 1), (2,), {'collapsed': (), 'offset': (1,)}),
    ('are larger', (0,), (5, 1), (1,), {}),
    ('is not axis 0', (7, 3), ('n', 5, 1), (1, 1), own),
    ('different numbers', ('n', 3), ('n', 5, 1), (1, 1), {**own, 'index_batch': (0, 1)}),
    ('not an axis', ('n', 3), ('n', 5, 1), (1, 1), {**own, 'index_batch': (2,)}),
  ):
    with pytest.raises(ValueError, match=message):
      infer(x, where, sizes=sizes, **other)
