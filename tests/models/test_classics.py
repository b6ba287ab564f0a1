"""LeNet-5, AlexNet, VGG-16, VGG-small: sizes as published, values as an oracle's."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.models import create_model, entry_features, import_torchvision
from fqjax.models._alexnet import AlexNet
from fqjax.models._lenet import LeNet5
from fqjax.models._vgg import VGG, CifarVGG, VGGSmall
from fqjax.sparsity import trace_layers
from fqjax.tracing import summary, to_graph
from tests.models import reference


class Size(NamedTuple):
  shape: tuple[int, ...]
  params: int
  weights: int  # without biases and norms
  conv_macs: int
  macs: int


VGG_CONVS = 14_710_464
SIZES = {
  'lenet5': Size((28, 28, 1), 431_080, 430_500, 1_888_000, 2_293_000),
  'alexnet': Size((227, 227, 3), 60_965_224, 60_954_656, 665_784_864, 724_406_816),
  'vgg16': Size((224, 224, 3), 138_357_544, 138_344_128, 15_346_630_656, 15_470_264_320),
  'cifar_vgg16': Size((32, 32, 3), 14_724_042, VGG_CONVS + 5_120, 313_196_544, 313_201_664),
  'vgg_small': Size((32, 32, 3), 4_660_106, 4_656_512, 607_518_720, 607_600_640),
  'cifar_resnet18': Size((32, 32, 3), 11_173_962, 11_164_352, 555_417_600, 555_422_720),
}


@functools.cache
def initial(model, *shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)


def leaves(variables):
  paths = jax.tree.leaves_with_path(variables['params'])
  return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in paths}


def numbers(model, *shape, seed=0):
  """Random variables: compiling `init` would take longer than most tests."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape)
    fan_in = int(np.prod(leaf.shape[:-1])) if path[-1].key == 'kernel' else 25
    return rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)

  drawn = jax.tree_util.tree_map_with_path(draw, initial(model, *shape))
  return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), drawn)


@pytest.mark.parametrize('name', SIZES)
def test_sizes_as_published(name):
  size, model = SIZES[name], create_model(name)
  x = jax.ShapeDtypeStruct((1, *size.shape), jnp.float32)
  variables = initial(model, *x.shape)
  params = leaves(variables)
  assert sum(leaf.size for leaf in params.values()) == size.params
  kernels = {path: leaf for path, leaf in params.items() if path.endswith('kernel')}
  assert sum(leaf.size for leaf in kernels.values()) == size.weights
  rows = summary(model.apply, variables, x).rows
  assert sum(row.macs for row in rows if row.op.startswith('conv')) == size.conv_macs
  assert sum(row.macs for row in rows) == size.macs
  # Every weight enters one product, read as it is stored.
  layers = trace_layers(model.apply, variables, x)
  assert {path.removeprefix('params/') for path in layers} == set(kernels)
  for path, layer in layers.items():
    assert layer.layout == ('HWIO' if kernels[path].ndim == 4 else 'IO') and layer.times == 1


def test_convolutions_of_vgg16():
  for name in ('vgg16', 'cifar_vgg16'):
    params = leaves(initial(create_model(name), 1, *SIZES[name].shape))
    convs = [leaf.shape for leaf in params.values() if len(leaf.shape) == 4]
    assert len(convs) == 13 and {shape[:2] for shape in convs} == {(3, 3)}
    assert sum(int(np.prod(shape)) for shape in convs) == VGG_CONVS
    assert sum(shape[2] * shape[3] for shape in convs) == 1_634_496
  # As torchvision counts vgg16_bn.
  model = create_model('vgg16', batch_norm=True)
  assert sum(leaf.size for leaf in leaves(initial(model, 1, 224, 224, 3)).values()) == 138_365_992


def test_names_and_shapes():
  def kernels(name, **options):
    params = leaves(initial(create_model(name, **options), 1, *SIZES[name].shape))
    # Names chosen, none numbered by Flax.
    assert not [path for path in params if re.search(r'[A-Z]', path)]
    return {path.removesuffix('/kernel'): leaf.shape for path, leaf in params.items()
            if path.endswith('kernel')}  # fmt: skip

  assert kernels('lenet5') == {
    'conv1': (5, 5, 1, 20), 'conv2': (5, 5, 20, 50), 'fc1': (800, 500), 'fc2': (500, 10),
  }  # fmt: skip
  assert kernels('alexnet') == {
    'conv1': (11, 11, 3, 96), 'conv2': (5, 5, 48, 256), 'conv3': (3, 3, 256, 384),
    'conv4': (3, 3, 192, 384), 'conv5': (3, 3, 192, 256), 'fc6': (9216, 4096),
    'fc7': (4096, 4096), 'fc8': (4096, 1000),
  }  # fmt: skip
  vgg = kernels('vgg16')
  assert list(vgg)[:2] == ['conv1_1', 'conv1_2'] and vgg['conv5_3'] == (3, 3, 512, 512)
  assert vgg['fc6'] == (25088, 4096) and vgg['fc8'] == (4096, 1000)
  narrow = kernels('cifar_vgg16', width=0.25, num_classes=7)
  assert narrow['conv1_1'] == (3, 3, 3, 16) and narrow['fc'] == (128, 7)
  assert kernels('vgg_small') == {
    'conv1_1': (3, 3, 3, 128), 'conv1_2': (3, 3, 128, 128), 'conv2_1': (3, 3, 128, 256),
    'conv2_2': (3, 3, 256, 256), 'conv3_1': (3, 3, 256, 512), 'conv3_2': (3, 3, 512, 512),
    'fc': (8192, 10),
  }  # fmt: skip
  narrow = kernels('cifar_resnet18', width=0.25)
  assert narrow['conv1'] == (3, 3, 3, 16) and narrow['layer4_1/conv2'] == (3, 3, 128, 128)


def graph_of(model, *shape):
  return to_graph(model.apply, initial(model, 1, *shape), jax.ShapeDtypeStruct((1, *shape), 'f4'))


@pytest.mark.parametrize('name', SIZES)
def test_graphs(name):
  graph = graph_of(create_model(name), *SIZES[name].shape).graph
  assert graph.tensors[graph.outputs[0]].shape == ('n', create_model(name).num_classes)
  ops = [node.op for node in graph.nodes]
  if name == 'alexnet':
    assert ops.count('pool_sum') == ops.count('pow') == 2
    groups = [node.attributes['groups'] for node in graph.nodes if node.op == 'conv']
    assert groups == [1, 2, 1, 2, 2]
  # ImageNet's networks flatten the map, those for CIFAR average it.
  assert ('reduce_sum' in ops) == name.startswith('cifar')


def test_the_graph_computes_what_lenet5_computes():
  model = LeNet5()
  variables = numbers(model, 1, 28, 28, 1)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 28, 28, 1)), jnp.float32)
  traced = graph_of(model, 28, 28, 1)
  got, want = jax.jit(lambda v, x: (traced(v, x), model.apply(v, x)))(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# Oracles: NumPy, float64, channels first.


def conv(x, params, name, stride=1, padding=0, groups=1):
  kernel = np.asarray(params[name]['kernel'], np.float64).transpose(3, 2, 0, 1)
  bias = np.asarray(params[name]['bias'], np.float64).reshape(1, -1, 1, 1)
  return reference.conv(x, kernel, stride, padding, groups) + bias


def pool(x, size, stride):
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
  return windows[:, :, ::stride, ::stride].max((4, 5))


def dense(x, params, name):
  if x.ndim == 4:
    x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)  # rows, columns, channels
  return x @ np.asarray(params[name]['kernel'], np.float64) + np.asarray(params[name]['bias'])


def response_norm(x):
  energy = np.pad(x**2, ((0, 0), (2, 2), (0, 0), (0, 0)))
  energy = sum(energy[:, i : i + x.shape[1]] for i in range(5))
  return x / (1 + 1e-4 / 5 * energy) ** 0.75


def lenet5(x, params):
  x = pool(conv(x, params, 'conv1'), 2, 2)
  x = pool(conv(x, params, 'conv2'), 2, 2)
  return dense(reference.relu(dense(x, params, 'fc1')), params, 'fc2')


def alexnet(x, params):
  x = pool(response_norm(reference.relu(conv(x, params, 'conv1', 4))), 3, 2)
  x = pool(response_norm(reference.relu(conv(x, params, 'conv2', 1, 2, 2))), 3, 2)
  x = reference.relu(conv(x, params, 'conv3', 1, 1))
  x = reference.relu(conv(x, params, 'conv4', 1, 1, 2))
  x = pool(reference.relu(conv(x, params, 'conv5', 1, 1, 2)), 3, 2)
  x = reference.relu(dense(x, params, 'fc6'))
  return dense(reference.relu(dense(x, params, 'fc7')), params, 'fc8')


def test_vgg_small_equals_the_oracle(x64):
  model = VGGSmall(width=1 / 16, dtype=jnp.float64)
  variables, x = numbers(model, 2, 32, 32, 3), np.random.default_rng(1).normal(size=(2, 32, 32, 3))
  params, stats = variables['params'], variables['batch_stats']
  for name in stats:  # behind a pool a scale below zero is another function than before it
    params[name]['scale'] = params[name]['scale'].at[::2].multiply(-1)

  def norm(x, name):
    state = {f'{name}.weight': params[name]['scale'], f'{name}.bias': params[name]['bias']}
    state |= {f'{name}.running_{leaf}': stats[name][leaf] for leaf in ('mean', 'var')}
    return reference.relu(reference.norm(x, state, name))

  want = x.transpose(0, 3, 1, 2)
  for stage in '123':
    first, second = (
      np.asarray(params[f'conv{stage}_{i}']['kernel'], np.float64).transpose(3, 2, 0, 1)
      for i in '12'
    )
    want = norm(reference.conv(want, first), f'bn{stage}_1')
    want = norm(pool(reference.conv(want, second), 2, 2), f'bn{stage}_2')
  want = dense(want, params, 'fc')
  got = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize(
  ('model', 'oracle', 'shape'),
  [
    (LeNet5(dtype=jnp.float64), lenet5, (2, 28, 28, 1)),
    (AlexNet(num_classes=5, units=8, dtype=jnp.float64), alexnet, (1, 227, 227, 3)),
  ],
)
def test_forward_equals_the_oracle(model, oracle, shape, x64):
  variables = numbers(model, *shape)
  # On the scale of pixels: smaller values hardly move the response norm.
  x = 50 * np.random.default_rng(1).normal(size=shape)
  got = jax.jit(model.apply)(variables, x)
  want = oracle(x.transpose(0, 3, 1, 2), variables['params'])
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


# Training.


def test_dropout_acts_in_training_only():
  model, plain = LeNet5(dropout=0.5), LeNet5()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 28, 28, 1)), jnp.float32)
  variables = numbers(model, 1, 28, 28, 1)

  @jax.jit
  def run(variables, x, key):
    logits, state = model.apply(
      variables, x, train=True, rngs={'dropout': key}, capture_intermediates=True
    )
    seen = state['intermediates']
    return logits, jax.nn.relu(seen['fc1']['__call__'][0]), seen['fc1_dropout']['__call__'][0]

  keys = jax.random.split(jax.random.key(0))
  # In evaluation the two are the same program, which asks for no key.
  program, without = (str(jax.make_jaxpr(m.apply)(variables, x)) for m in (model, plain))
  assert program == without
  logits, before, after = run(variables, x, keys[0])
  alive = np.asarray(before) > 0
  dropped = np.asarray(after)[alive] == 0
  # 0.5 to five standard errors.
  assert abs(dropped.mean() - 0.5) < 2.5 / np.sqrt(dropped.size)
  np.testing.assert_allclose(after[alive][~dropped], 2 * before[alive][~dropped], rtol=1e-6)
  np.testing.assert_array_equal(run(variables, x, keys[0])[0], logits)
  assert (run(variables, x, keys[1])[0] != logits).any()
  with pytest.raises(Exception, match='dropout'):
    model.apply(variables, x[:1], train=True)


@pytest.mark.parametrize(
  ('model', 'shape'),
  [
    (LeNet5(dropout=0.5), (4, 28, 28, 1)),
    (AlexNet(num_classes=5, units=16, dropout=0.5), (2, 227, 227, 3)),
    pytest.param(
      VGG(num_classes=5, units=16, width=1 / 16, image_size=64, dropout=0.5),
      (2, 64, 64, 3),
      marks=pytest.mark.full,
    ),
    (CifarVGG(width=1 / 16), (8, 32, 32, 3)),
    (VGGSmall(width=1 / 16), (8, 32, 32, 3)),
  ],
)
def test_a_training_step_reaches_every_parameter(model, shape):
  variables = numbers(model, *shape)
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

  @jax.jit
  def gradients(variables, x):
    def loss(params):
      logits, state = model.apply(
        variables | {'params': params},
        x,
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(0)},
      )
      return jnp.mean(jnp.square(logits - 1.0)), state

    return jax.grad(loss, has_aux=True)(variables['params'])

  grads, state = gradients(variables, x)
  for path, gradient in leaves({'params': grads}).items():
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0, path
  assert ('batch_stats' in state) == isinstance(model, (CifarVGG, VGGSmall))


@pytest.mark.parametrize('name', ['lenet5', 'alexnet', 'vgg16', 'cifar_vgg16', 'vgg_small'])
def test_bfloat16_policy(name):
  model = create_model(name, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, *SIZES[name].shape), jnp.float32)
  variables = initial(model, *x.shape)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  eqns = jax.make_jaxpr(model.apply)(variables, x).eqns
  types = {
    op: [eqn.outvars[0].aval.dtype for eqn in eqns if eqn.primitive.name == op]
    for op in ('conv_general_dilated', 'dot_general', 'pow')
  }
  assert set(types['conv_general_dilated']) == {jnp.dtype(jnp.bfloat16)}
  *hidden, last = types['dot_general']
  assert set(hidden) <= {jnp.dtype(jnp.bfloat16)} and last == jnp.float32
  assert types['pow'] == ([jnp.float32] * 2 if name == 'alexnet' else [])
  assert eqns[-1].outvars[0].aval.dtype == jnp.float32


def test_alexnet_starts_as_published():
  model = AlexNet(num_classes=2, units=4)
  init = jax.jit(lambda key: {  # the compiler leaves out the kernels nobody asks for
    name: layer['bias'] for name, layer in model.init(key, jnp.ones((1, 227, 227, 3)))['params'].items()
  })  # fmt: skip
  biases = init(jax.random.key(0))
  assert {name: float(bias[0]) for name, bias in biases.items()} == {
    name: np.float32(0.0 if name in ('conv1', 'conv3', 'fc8') else 0.1) for name in biases
  }


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('lenet5', (1, 28, 28, 3), r'images \[n, 28, 28, 1\], got x: \[1, 28, 28, 3\].*\n.*x\[..., :1\]'),
    ('lenet5', (28, 28, 1), r'got x: \[28, 28, 1\]'),
    ('alexnet', (1, 224, 224, 3), r'images \[n, 227, 227, 3\], got .*\n  Its dense layers fix the'),
    ('vgg16', (1, 32, 32, 3), r'images \[n, 224, 224, 3\], got x: \[1, 32, 32, 3\]'),
    ('vgg_small', (1, 28, 28, 3), r'images \[n, 32, 32, 3\], got x: \[1, 28, 28, 3\]'),
    ('cifar_vgg16', (1, 28, 32, 3), r'at least 32 x 32, got x: \[1, 28, 32, 3\]'),
    ('cifar_vgg16', (1, 32, 32, 1), r'RGB images .* got x: \[1, 32, 32, 1\]'),
  ],
)  # fmt: skip
def test_errors_of_the_input(name, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('lenet5', {'dropout': 1.0}, r'needs 0 <= dropout < 1, the share dropped, got 1.0'),
    ('lenet5', {'norm_groups': 2}, r"'lenet5' takes no option 'norm_groups'.*\n.*dropout, dtype"),
    ('vgg16', {'batch_norm': 'yes'}, r"takes batch_norm = False or True, got 'yes'"),
    ('cifar_vgg16', {'width': 0}, r'needs width > 0, got 0'),
    ('cifar_vgg16', {'dropout': 0.5}, r"takes no option 'dropout'"),
  ],
)
def test_errors_of_create_model(name, options, message):
  with pytest.raises(ValueError, match=message):
    create_model(name, **options)


def test_what_is_for_other_networks():
  for name in ('alexnet', 'cifar_vgg16'):
    with pytest.raises(ValueError, match='fills ResNet or MobileNetV2 or VGG for RGB images, got'):
      import_torchvision({}, create_model(name))
  with pytest.raises(ValueError, match='entry_features needs a network with a DCT twin, got VGG'):
    entry_features(create_model('vgg16'), {}, jnp.ones((1, 224, 224, 3)))
