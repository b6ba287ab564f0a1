"""A traced graph computes what the function computes, for batches it has not seen."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.models import create_model
from fqjax.runtime.graph import validate
from fqjax.tracing import evaluate, to_graph

_TABLE = np.array([5, 0, 3, 3])
_S = jax.ShapeDtypeStruct


def _scan(x):
  weights = jnp.arange(1.0, 4.0)

  def step(carry, w):
    carry = jnp.tanh(carry * w)
    return carry, carry.mean((1, 2))

  last, seen = jax.lax.scan(step, x, weights, reverse=True)
  return last, seen


# One line per way of writing things; x is [n, 8, 8, 6] float32.
FUNCTIONS = {
  'strided index': (lambda x: x[:, ::2, 1::3], ['slice']),
  'one index': (lambda x: x[:, 0, :, -1], ['slice', 'reshape']),
  'shift': (lambda x: x[:, :, 1:] - x[:, :, :-1], ['slice', 'slice', 'sub']),
  'flip': (lambda x: x[:, ::-1], ['reverse']),
  'table': (lambda x: x[..., _TABLE], ['gather']),
  'take': (lambda x: jnp.take(x, _TABLE, axis=1, mode='clip'), ['gather']),
  'squeeze': (lambda x: jnp.squeeze(x[:, :1, 2], 1) + jax.lax.squeeze(x[:, 1:2, 1], (1,)), None),
  'newaxis': (lambda x: x[:, None, ..., 2:4], None),
  'split': (lambda x: jnp.split(x, [1, 4], -1), ['slice'] * 3),
  'stack': (lambda x: jnp.stack([x, -x], 2), None),
  'roll': (lambda x: jnp.roll(x, 2, 1), None),
  'tile': (lambda x: jnp.tile(x, (1, 2, 1, 3)), ['broadcast', 'reshape']),
  'repeat': (lambda x: jnp.repeat(x, 2, axis=2), None),
  'join batches': (lambda x: jnp.concatenate([x, x[:, ::-1]]), None),
  'pad and crop': (
    lambda x: jax.lax.pad(x, 2.0, [(0, 0, 0), (2, -1, 1), (-3, 1, 0), (0, 3, 0)]), ['pad', 'slice'],
  ),
  'reflect': (lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), mode='reflect'), None),
  'flatten': (lambda x: x.reshape(x.shape[0], -1).reshape(-1, 6), None),
  'relu6': (jax.nn.relu6, ['max', 'min']),
  'clip': (lambda x: jnp.clip(x, -0.5, 0.5), ['max', 'min']),
  'clamp': (lambda x: jax.lax.clamp(-0.5, x, 0.5), ['max', 'min']),
  'leaky': (jax.nn.leaky_relu, ['ge', 'mul', 'select']),
  'gelu': (jax.nn.gelu, None),
  'exact gelu': (functools.partial(jax.nn.gelu, approximate=False), None),
  'swish': (jax.nn.swish, ['logistic', 'mul']),
  'hard swish': (jax.nn.hard_swish, None),
  'softmax': (jax.nn.softmax, None),
  'logsumexp': (lambda x: jax.nn.logsumexp(x, (1, 3)), None),
  'standardize': (lambda x: jax.nn.standardize(x, (1, 2)), None),
  'variance': (lambda x: jnp.var(x, -1), None),
  'top-k': (lambda x: jax.lax.top_k(x, 2), ['top_k']),
  'argsort': (lambda x: jnp.argsort(x, -1), ['iota', 'sort']),
  'argmax': (lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 6), None),
  'cumsum': (lambda x: jnp.cumsum(x, -1), ['cumsum']),
  'powers': (lambda x: x**3 + jnp.abs(x) ** 1.7 + jnp.exp2(x), None),
  'rounding': (lambda x: jnp.round(4 * x) + jnp.sign(x) * jnp.floor(x), None),
  'max pool': (lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME'), ['pool_max']),
  'average pool': (
    lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID') / 4,
    ['pool_sum', 'div'],
  ),
  'jitted pool': (
    jax.jit(
      lambda x: jax.lax.reduce_window(x, jnp.float32(-jnp.inf), jax.lax.max, (1, 2, 2, 1),
                                      (1, 2, 2, 1), 'VALID')
    ), ['pool_max'],
  ),
  'nearest': (lambda x: jax.image.resize(x, (x.shape[0], 16, 12, 6), 'nearest'), ['gather'] * 2),
  'bilinear': (
    lambda x: jax.image.resize(x, (x.shape[0], 16, 12, 6), 'bilinear'), ['dot', 'dot', 'transpose'],
  ),
  'einsum': (lambda x: jnp.einsum('nhwc,nhvc->nwv', x, x), None),
  'integers': (lambda x: (x * 9).astype(jnp.int32) // 2 % 3, None),
  'half': (lambda x: x.astype(jnp.bfloat16) * jnp.bfloat16(2), None),
  'switch': (
    lambda x: jax.lax.switch(1, [jnp.tanh, jnp.exp, jnp.sin], x), ['exp'],
  ),
  'choose': (lambda x: jax.lax.select_n((x > 0).astype(jnp.int32) + (x > 1).astype(jnp.int32), x, -x, x * x), None),
  'scan': (_scan, None),
  'branches': (lambda x: jax.lax.cond(x.sum() > 0, jnp.tanh, jnp.exp, x), None),
  'own places': (lambda x: x[jnp.arange(x.shape[0]), jnp.argmax(x[:, :, 0, 0], 1)], None),
  'tree': (lambda x: {'b': (x + 1, [x * 2]), 'a': x}, None),
}  # fmt: skip


@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_graph_computes_what_the_function_computes(name):
  fn, ops = FUNCTIONS[name]
  traced = to_graph(lambda p, x: fn(x), {}, _S((7, 8, 8, 6), jnp.float32))
  validate(traced.graph)
  if ops is not None:
    assert [node.op for node in traced.graph.nodes] == ops
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
  got, want = traced({}, x), fn(x)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    # The same primitives; only XLA's fusion may differ.
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-6
    )


class _Foreign(nn.Module):
  """What other people write: transposed and grouped convolutions, norms, attention."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), 2, feature_group_count=2)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.ConvTranspose(6, (3, 3), (2, 2))(x)
    x = nn.Dropout(0.5, deterministic=not train)(nn.GroupNorm(2)(x))
    tokens = x.reshape(x.shape[0], -1, 6)
    tokens = tokens + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(tokens))
    return nn.Dense(3)(tokens.mean(1)), tokens


def _numbers(tree):
  """Values for shapes: compiling every initialiser would take longer than the test."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.1, 0.3, v.shape), v.dtype), tree)


def test_a_foreign_network_for_any_batch():
  net, x = _Foreign(), _S((1, 4, 4, 6), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  traced = to_graph(net.apply, variables, x)
  assert 'params/Conv_0/kernel' in traced.graph.parameters
  assert traced.graph.tensors[traced.graph.outputs[1]].shape == ('n', 16, 6)
  variables = _numbers(variables)
  x = jax.random.normal(jax.random.key(3), (3, 4, 4, 6))
  outs = jax.jit(lambda v, x: (traced(v, x), net.apply(v, x)))(variables, x)
  for got, want in zip(*outs, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  'name', ['cifar_resnet20', pytest.param('mobilenet_v2', marks=pytest.mark.full)]
)
def test_our_networks(name):
  net, shape = create_model(name), (2, 32, 32, 3)
  variables = jax.eval_shape(net.init, jax.random.key(0), _S(shape, jnp.float32))
  traced = to_graph(net.apply, variables, _S(shape, jnp.float32))
  assert set(traced.graph.parameters) == {
    '/'.join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
  }
  variables = _numbers(variables)
  x = jax.random.normal(jax.random.key(0), shape)
  got, want = jax.jit(traced)(variables, x), jax.jit(net.apply)(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_under_grad_and_vmap():
  params = {'w': jax.random.normal(jax.random.key(0), (6, 4))}

  def apply(p, x):
    return nn.max_pool(jax.nn.swish(x @ p['w']), (2, 2), (2, 2)).mean((1, 2))

  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 6))
  traced = to_graph(apply, params, x)
  loss = lambda fn: lambda p, x: jnp.square(fn(p, x)).sum()
  got = jax.vmap(jax.grad(loss(traced)), (None, 0))(params, jnp.stack([x, 2 * x]))
  want = jax.vmap(jax.grad(loss(apply)), (None, 0))(params, jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(got['w'], want['w'], rtol=1e-5, atol=1e-6)


def test_inputs_trees_and_fixed_arguments():
  def apply(params, data, scale, flag):
    out = data['a'] @ params[0] * scale + data['b']
    return -out if flag else out

  params = [jnp.eye(3), 'a name']
  data = {'a': jnp.ones((2, 3)), 'b': jnp.ones((2, 3))}
  traced = to_graph(apply, params, data, jnp.float32(2), True)
  assert traced.graph.inputs == ('input/0/a', 'input/0/b', 'input/1')
  assert traced.graph.parameters == ('0',)
  longer = {'a': jnp.ones((4, 3)), 'b': jnp.ones((4, 3))}
  np.testing.assert_array_equal(traced(params, longer, jnp.float32(3), True), np.full((4, 3), -4))
  with pytest.raises(ValueError, match='True was fixed when tracing, got False'):
    traced(params, data, jnp.float32(2), False)
  with pytest.raises(ValueError, match='another structure'):
    traced(params, {'a': data['a']}, jnp.float32(2), True)
  with pytest.raises(ValueError, match=r'\(n = 4\), got an array \[2, 3\]'):
    traced(params, {**longer, 'b': data['b']}, jnp.float32(2), True)
  with pytest.raises(ValueError, match=r'takes 0: float32\[3, 3\], got float32\[2, 3\]'):
    traced([jnp.ones((2, 3)), 'a name'], data, jnp.float32(2), True)
  with pytest.raises(ValueError, match='no value for the parameter'):
    evaluate(traced.graph, {}, [])


def test_keys_that_nothing_reads():
  variables = {'w': jnp.ones((3, 2)), 'rng': jax.random.key(0)}
  traced = to_graph(lambda v, x, key: x @ v['w'], variables, jnp.ones((1, 3)), jax.random.key(1))
  assert traced.graph.parameters == ('w',) and traced.graph.inputs == ('input',)
  assert traced(variables, jnp.ones((2, 3)), jax.random.key(2)).shape == (2, 2)
  with pytest.raises(ValueError, match=r'argument rng.*: type key<fry> \(random keys: pass none\)'):
    to_graph(lambda v, x: x @ v['w'] + jax.random.normal(v['rng'], (2,))[None], variables,
             jnp.ones((1, 3)))  # fmt: skip


def test_obstacles_inside_loops_and_behind_random_numbers():
  def apply(key, x):
    noise = jax.random.normal(key, (4,))  # bits, shifts and more: said once

    def step(carry, _):
      with jax.named_scope('step'):
        return jax.lax.cumlogsumexp(carry), None

    x, _ = jax.lax.scan(step, x, None, length=2)
    return jnp.tanh(x + noise[None]).at[0].set(0)

  with pytest.raises(ValueError) as caught:
    to_graph(apply, jnp.zeros(2, jnp.uint32), jnp.ones((2, 4)), batch_axis=None)
  words = [line.split()[0] for line in str(caught.value).splitlines()]
  assert words == ['3', 'random_wrap', 'cumlogsumexp', 'scatter']
  assert 'cumlogsumexp in step (2 times): write it' in str(caught.value)


def test_names_that_could_collide():
  traced = to_graph(lambda p, x: x + p['input'], {'input': jnp.ones((1, 3))}, jnp.ones((2, 3)))
  assert traced.graph.parameters == ('input',) and traced.graph.inputs == ('input_',)
  traced = to_graph(lambda p, x: p * x, jnp.ones((1, 3)), jnp.ones((2, 3)), batch_axis=None)
  assert traced.graph.parameters == ('params',)


def test_constants_are_shared_and_what_is_known_is_computed():
  table = np.linspace(0, 1, 6, dtype=np.float32)

  def apply(_, x):
    grid = jnp.sin(jnp.arange(6.0)) * table
    return jnp.maximum(x * grid[None] + table[None], 0) + jnp.maximum(x, 0)

  graph = to_graph(apply, {}, jnp.ones((2, 6))).graph
  assert {node.op for node in graph.nodes} <= {'reshape', 'broadcast', 'mul', 'add', 'max'}
  assert len(graph.constants) == 3  # two tables and one zero
  # A table that is one number over and over is not written out.
  graph = to_graph(lambda _, x: x + jnp.zeros((1, 100, 100)), {}, jnp.ones((2, 100, 100))).graph
  assert max(array.size for array in graph.constants.values()) == 1


def test_everything_that_has_no_place_is_named_at_once():
  def apply(params, x):
    with jax.named_scope('encoder'):
      with jax.named_scope('drop'):
        keep = jax.random.bernoulli(params['key'], 0.5, x.shape[1:])
      x = jnp.where(keep[None], x, 0) + params['b'][None]
    with jax.named_scope('head'):
      x = x.at[:, 0].set(1.0)
      x = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]
      return x - x.mean(0, keepdims=True), jnp.fft.fft(x).real

  params = {'b': jnp.ones(4), 'key': jnp.zeros(2, jnp.uint32)}
  with pytest.raises(ValueError) as caught:
    to_graph(apply, params, jnp.ones((2, 4)))
  text = str(caught.value)
  for line in (
    r'in encoder/drop: randomness: call the network with deterministic=True',
    'scatter in head: jnp.where, jnp.pad or jnp.concatenate',
    'while in head: a loop of unknown length',
    'dim_as_value in head: the batch size is used as a number: use_running_average=True',
    'fft in head: a product with the matrix',
  ):
    assert line in text, text


def test_a_network_that_needs_its_batch():
  def apply(_, x):
    if x.shape[0] > 3:
      return x
    return x.reshape(x.shape[0] // 2, 2, -1)

  with pytest.raises(ValueError, match='cannot be traced for any batch; batch_axis=None'):
    to_graph(apply, {}, jnp.ones((2, 4)))
  traced = to_graph(apply, {}, jnp.ones((2, 4)), batch_axis=None)
  assert traced({}, jnp.ones((2, 4))).shape == (1, 2, 4)
  with pytest.raises(ValueError, match='takes input'):
    traced({}, jnp.ones((3, 4)))
  with pytest.raises(TypeError, match='the true error'):
    to_graph(_raises, {}, jnp.ones((2, 4)))
  with pytest.raises(ValueError, match='the batch cannot be padded'):
    to_graph(lambda _, x: jnp.pad(x, ((0, 1), (0, 0))), {}, jnp.ones((2, 4)))
  with pytest.raises(ValueError, match=r'min\(n, 2\) is no multiple of the batch'):
    to_graph(lambda _, x: x[:2], {}, jnp.ones((2, 4)))


def _raises(_, x):
  raise TypeError('the true error')


def test_kinds_of_results():
  with pytest.raises(ValueError, match='leaves that are not arrays'):
    to_graph(lambda _, x: (x, 'text'), {}, jnp.ones((2, 4)))
  x, same = to_graph(lambda p, x: (x, p), {'w': jnp.ones(2)}, jnp.ones((2, 4)))(
    {'w': jnp.zeros(2)}, jnp.ones((3, 4))
  )
  assert x.shape == (3, 4) and not same['w'].any()
