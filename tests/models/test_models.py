import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from fqjax.models import create_model, list_models
from fqjax.models._resnet import CifarResNet, ResNet
from fqjax.tracing import summary

FAMILIES = {
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet50': 25_557_032,
  'resnet101': 44_549_160,
  'mobilenet_v2': 3_504_872,
  'cifar_resnet20': 269_722,
  'cifar_resnet32': 464_154,
  'cifar_resnet56': 853_018,
  'cifar_resnet18': 11_173_962,
}
VARIANTS = sorted(name + suffix for name in FAMILIES for suffix in ('', '_dct', '_patchify'))
# In test_classics.py and test_searched.py.
RGB_ONLY = ('alexnet', 'cifar_vgg16', 'lenet5', 'vgg16', 'vgg_small')
RGB_ONLY += ('mnasnet_a1', 'proxylessnas_mobile')


@functools.cache
def initial(model, *shape):
  """Shapes of the variables; tracing `init` is half the time of these tests."""
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def shapes_of(model, *shape):
  """Shapes of the variables and, by module path, of the outputs for an input of `shape`."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = initial(model, *shape)
  apply = lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=['intermediates'])
  logits, state = jax.eval_shape(apply, variables, x)
  outputs = {}
  for path, leaf in jax.tree.leaves_with_path(state['intermediates']):
    keys = [key.key for key in path if hasattr(key, 'key')]
    outputs['/'.join(keys[:-1])] = leaf.shape
  return variables, outputs, logits


def random_variables(model, *shape, seed=0):
  """Plausible values in place of `init`, whose compilation takes longer than most tests."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    fan_in = int(np.prod(leaf.shape[:-1])) if name == 'kernel' else 25
    return jnp.asarray(rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, initial(model, *shape))


def count(variables):
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def test_names():
  assert list_models() == sorted([*VARIANTS, *RGB_ONLY])
  assert list_models('*20_d*') == ['cifar_resnet20_dct']
  assert list_models('nothing') == []


@pytest.mark.parametrize('name', FAMILIES)
def test_parameters_of_the_rgb_networks(name):
  # torchvision's counts, and the CIFAR paper's 0.27 M, 0.46 M and 0.85 M.
  model = create_model(name)
  assert model.num_classes == (10 if 'cifar' in name else 1000)
  variables, _, logits = shapes_of(model, 2, 64, 64, 3)
  assert count(variables) == FAMILIES[name]
  assert logits.shape == (2, model.num_classes) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=pytest.mark.full if re.search('34|101|32|56|cifar_resnet18', name) else ()
    )
    for name in VARIANTS
  ],
)
def test_every_variant(name):
  cifar, dct = 'cifar' in name, name.endswith('_dct')
  options = dict(channels=6 if cifar else 48, gate=True) if dct else {}
  shape = (4, 8, 8, options['channels']) if dct else (4, 64, 64, 3)
  model = create_model(name, num_classes=7, dtype=jnp.float32, norm_groups=2, **options)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = initial(model, *shape)
  assert set(variables) == {'params', 'batch_stats'}
  chex.assert_type(jax.tree.leaves(variables), jnp.float32)
  # Names chosen, none numbered by Flax.
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables)]
  assert not [path for path in paths if re.search(r"'[A-Z]", path)]

  def train(variables, x):
    rngs = {'gate': jax.random.key(1)}
    return model.apply(variables, x, train=True, mutable=['batch_stats', 'gates'], rngs=rngs)

  logits, state = jax.eval_shape(train, variables, x)
  assert (logits.shape, logits.dtype) == ((4, 7), jnp.float32)
  chex.assert_trees_all_equal_shapes_and_dtypes(state['batch_stats'], variables['batch_stats'])
  if dct:
    assert state['gates']['gate']['on'].shape == (4, shape[-1])


# The paper's table: parameters in M, GMACs with stride 2 and 1 in the second stage.
@pytest.mark.parametrize(
  ('channels', 'params', 'macs2', 'macs1'),
  [
    (6, 25.529, 3.913, 13.508),
    (12, 25.531, 3.919, 13.514),
    (24, 25.535, 3.931, 13.526),
    (48, 25.542, 3.955, 13.550),
    (64, 25.547, 3.971, 13.566),
    (192, 25.588, 4.100, 13.695),
  ],
)
def test_resnet50_table(channels, params, macs2, macs1):
  x = jax.ShapeDtypeStruct((1, 56, 56, channels), jnp.float32)
  for stride, macs in ((2, macs2), (1, macs1)):
    model = create_model('resnet50_dct', channels=channels, stage2_stride=stride)
    # The stride changes no shape of a parameter.
    variables = initial(create_model('resnet50_dct', channels=channels), *x.shape)
    assert round(count(variables) / 1e6, 3) == params
    assert round(summary(model.apply, variables, x).macs / 1e9, 3) == macs


def test_resnet50_rgb_row():
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model = create_model('resnet50')
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert round(summary(model.apply, variables, x).macs / 1e9, 3) == 4.089


def test_maps_of_resnet50():
  def stages(model, *shape):
    outputs = shapes_of(model, *shape)[1]
    return [outputs[f'layer{s}_0'][1] for s in (1, 2, 3, 4)]

  assert stages(create_model('resnet50'), 1, 224, 224, 3) == [56, 28, 14, 7]
  assert stages(create_model('resnet50_dct'), 1, 56, 56, 24) == [56, 28, 14, 7]
  public = create_model('resnet50_dct', stage2_stride=1)
  assert stages(public, 1, 56, 56, 24) == [56, 56, 28, 14]
  patchify = create_model('resnet50_patchify', channels=24)
  assert stages(patchify, 1, 448, 448, 3) == [56, 28, 14, 7]


def test_only_the_first_block_of_a_dct_resnet_meets_the_channels():
  rgb, _, _ = shapes_of(create_model('resnet50'), 1, 64, 64, 3)
  dct, _, _ = shapes_of(create_model('resnet50_dct', channels=24), 1, 16, 16, 24)
  rgb, dct = rgb['params'], dct['params']
  assert set(rgb) - set(dct) == {'conv1', 'bn1'} and set(dct) <= set(rgb)
  first = dct['layer1_0']
  assert first['conv1']['kernel'].shape == (1, 1, 24, 64)
  assert first['downsample_conv']['kernel'].shape == (1, 1, 24, 256)
  # The stride sits on the 3x3, as in torchvision.
  outputs = shapes_of(create_model('resnet50'), 1, 64, 64, 3)[1]
  assert outputs['layer2_0/conv1'][1] == 16 and outputs['layer2_0/conv2'][1] == 8


@pytest.mark.parametrize('channels', [24, 64])
def test_resnet18_dct_gets_a_projection_in_its_first_block(channels):
  variables, outputs, _ = shapes_of(
    create_model('resnet18_dct', channels=channels), 1, 8, 8, channels
  )
  shapes = jax.tree.map(jnp.shape, variables['params'])
  assert shapes['layer1_0']['downsample_conv']['kernel'] == (1, 1, channels, 64)
  assert 'downsample_conv' not in shapes['layer1_1']
  # 64 x 64 photographs in 8 x 8 blocks.
  assert [outputs[f'layer{s}_1'][1] for s in (1, 2, 3, 4)] == [8, 4, 2, 1]


def test_mobilenet_dct():
  for channels, kernel in (
    (6, (3, 3, 1, 6)),
    (24, (3, 3, 1, 24)),
    (32, (3, 3, 1, 32)),
    (192, (3, 3, 6, 32)),
  ):
    model = create_model('mobilenet_v2_dct', channels=channels)
    variables, outputs, _ = shapes_of(model, 1, 112, 112, channels)
    first = variables['params']['features_1']
    assert first['depthwise']['kernel'].shape == kernel
    assert first['project']['kernel'].shape == (1, 1, kernel[-1], 16)
    assert outputs['features_1'] == (1, 112, 112, 16)
    assert outputs['features_18'] == (1, 7, 7, 1280)


def test_frequencies_are_never_added_to_features():
  # 16 channels meet 16 outputs; the block without its projection gives zero, not its input.
  x = jnp.ones((1, 8, 8, 16))
  model = create_model('mobilenet_v2_dct', channels=16, num_classes=2)
  variables = random_variables(model, *x.shape)
  for name in ('scale', 'bias'):
    variables['params']['features_1']['project_bn'][name] *= 0
  variables['batch_stats']['features_1']['project_bn']['mean'] *= 0

  @jax.jit
  def first(variables):
    options = dict(capture_intermediates=True, mutable=['intermediates'])
    return model.apply(variables, x, **options)[1]['intermediates']['features_1']['__call__'][0]

  assert not first(variables).any()


@pytest.mark.parametrize(
  ('width', 'macs', 'params'),
  [(0.35, 59, 1.66), (0.75, 209, 2.61), (1.0, 300, 3.47), (1.4, 582, 6.06)],
)
def test_mobilenet_widths_as_published(width, macs, params):
  # The table of TensorFlow-slim, which counts kernels and classifier but no batch norm.
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model = create_model('mobilenet_v2', width=width, convention='tf')
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  norms = sum(leaf.size for leaf in jax.tree.leaves(variables['batch_stats']))
  assert round((count(variables) - norms) / 1e6, 2) == params
  assert abs(summary(model.apply, variables, x).macs / 1e6 - macs) <= 1


def test_cifar_entries():
  def first(model, *shape):
    variables, outputs, _ = shapes_of(model, *shape)
    sizes = [outputs[f'layer{s}_0'][1] for s in (1, 2, 3)]
    return jax.tree.map(jnp.shape, variables['params']), sizes

  params, sizes = first(create_model('cifar_resnet20_dct', channels=6), 1, 8, 8, 6)
  assert sizes == [8, 4, 2] and 'conv1' not in params
  assert params['layer1_0']['conv1']['kernel'] == (3, 3, 6, 16)
  assert params['layer1_0']['downsample_conv']['kernel'] == (1, 1, 6, 16)
  assert 'downsample_conv' not in params['layer2_0'], 'shortcut A has no parameters'
  # The RGB controls meet the first stage at the same size.
  for stride, size, kernel in ((1, 32, 3), (2, 16, 3), (4, 32, 7)):
    params, sizes = first(create_model('cifar_resnet20', stem_stride=stride), 1, size, size, 3)
    assert sizes[0] == size // stride and params['conv1']['kernel'] == (kernel, kernel, 3, 16)
  params, sizes = first(create_model('cifar_resnet20_patchify', channels=6), 1, 32, 32, 3)
  assert sizes == [8, 4, 2] and params['conv1']['kernel'] == (4, 4, 3, 6)
  params, _ = first(create_model('cifar_resnet20', width=1.5), 1, 32, 32, 3)
  assert params['layer3_2']['conv2']['kernel'] == (3, 3, 96, 96)


def test_cifar_resnet18_keeps_the_size_of_its_first_stage():
  for name, shape, sizes in (
    ('cifar_resnet18', (1, 32, 32, 3), [32, 16, 8, 4]),
    ('cifar_resnet18_dct', (1, 8, 8, 24), [8, 4, 2, 1]),
    ('cifar_resnet18_patchify', (1, 32, 32, 3), [8, 4, 2, 1]),
  ):
    _, outputs, _ = shapes_of(create_model(name), *shape)
    assert [outputs[f'layer{s}_0'][1] for s in (1, 2, 3, 4)] == sizes


def test_patchify_with_dct_kernels_is_the_dct_network(x64):
  """The control differs from the DCT network by what its first convolution may learn."""
  rng = np.random.default_rng(0)
  k, i = np.mgrid[:4, :4]
  matrix = np.where(k, np.sqrt(0.5), 0.5) * np.cos(np.pi * (2 * i + 1) * k / 8)
  keep = [0, 1, 4, 5]
  basis = np.einsum('ui,vj->ijuv', matrix, matrix).reshape(4, 4, 16)[..., keep]
  kernel = np.zeros((4, 4, 3, 4))
  kernel[:, :, 0] = basis
  x = rng.normal(size=(2, 16, 16, 3))
  blocks = x[..., 0].reshape(2, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4)
  maps = (matrix @ blocks @ matrix.T).reshape(2, 4, 4, 16)[..., keep]

  options = dict(channels=4, dtype=jnp.float64)
  patchify, dct = (small_net(entry, **options) for entry in ('patchify', 'dct'))
  variables = random_variables(patchify, *x.shape)
  variables['params']['conv1']['kernel'] = kernel
  # A batch norm that changes nothing stands for the normalisation of the DCT maps.
  variables['params']['bn1'] = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
  variables['batch_stats']['bn1'] = {'mean': jnp.zeros(4), 'var': jnp.full(4, 1 - 1e-5)}
  inner = {
    k: {n: m for n, m in v.items() if n not in ('conv1', 'bn1')} for k, v in variables.items()
  }
  got = jax.jit(patchify.apply)(variables, x)
  np.testing.assert_allclose(got, jax.jit(dct.apply)(inner, maps), rtol=1e-6, atol=1e-6)


def test_tensorflow_convention_changes_padding_and_epsilon():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 24)), jnp.float32)
  torch, tf = (
    create_model('mobilenet_v2_dct', num_classes=3, convention=c) for c in ('torch', 'tf')
  )
  text = str(jax.make_jaxpr(tf.apply)(jax.eval_shape(tf.init, jax.random.key(0), x), x))
  assert 'padding=((0, 1), (0, 1))' in text and '0.001' in text
  text = str(jax.make_jaxpr(torch.apply)(jax.eval_shape(torch.init, jax.random.key(0), x), x))
  assert 'padding=((0, 1), (0, 1))' not in text and 'padding=((1, 1), (1, 1))' in text


@pytest.mark.parametrize('name', ['resnet50_dct', 'mobilenet_v2', 'cifar_resnet20_patchify'])
def test_bfloat16_policy(name):
  shape = (2, 8, 8, 24) if name.endswith('dct') else (2, 32, 32, 3)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  model = create_model(name, dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  chex.assert_type(jax.tree.leaves(variables), jnp.float32)
  apply = lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])
  logits, state = jax.eval_shape(apply, variables, x)
  assert logits.dtype == jnp.float32
  chex.assert_type(jax.tree.leaves(state), jnp.float32)
  by_name = {}
  for eqn in jax.make_jaxpr(apply)(variables, x).eqns:
    by_name.setdefault(eqn.primitive.name, []).append(eqn.outvars[0].aval.dtype)
  assert len(by_name['conv_general_dilated']) >= 20
  assert set(by_name['conv_general_dilated']) == {jnp.dtype(jnp.bfloat16)}
  assert set(by_name['rsqrt']) == set(by_name['dot_general']) == {jnp.dtype(jnp.float32)}


def small_net(entry='dct', **options):
  """One block per stage: every kind of layer, a third of the compilation."""
  options = dict(entry=entry, blocks=1, channels=6, block=4, num_classes=3) | options
  return CifarResNet(**options)


def test_training_step_moves_weights_gate_and_statistics():
  model = small_net(gate=True)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 6)), jnp.float32)
  variables = random_variables(model, *x.shape)

  @jax.jit
  def step(variables, key):
    def loss(params):
      logits, state = model.apply(
        variables | {'params': params},
        x,
        train=True,
        mutable=['batch_stats', 'gates'],
        rngs={'gate': key},
      )
      return jnp.mean(jnp.square(logits - 1.0)), state

    return jax.grad(loss, has_aux=True)(variables['params'])

  grads, state = step(variables, jax.random.key(1))
  assert set(np.unique(state['gates']['gate']['on'])) <= {0, 1}
  dead = [p for p, g in jax.tree.leaves_with_path(grads) if not jnp.abs(g).max() > 0]
  assert not dead
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), state['batch_stats'], variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved))


def test_closed_channels_do_not_reach_the_network():
  model = small_net(gate='global')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 6)), jnp.float32)
  variables = random_variables(model, *x.shape)
  variables['params']['gate']['logit_bias'] = jnp.array([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 4)
  apply = jax.jit(lambda v, x: model.apply(v, x, mutable=['gates']))
  logits, state = apply(variables, x)
  np.testing.assert_array_equal(state['gates']['gate']['on'], [[0, 0, 1, 1, 1, 1]] * 2)
  np.testing.assert_array_equal(apply(variables, x.at[..., :2].add(9.0))[0], logits)
  assert (apply(variables, x.at[..., 2].add(9.0))[0] != logits).any()


@pytest.mark.parametrize('bottleneck', [False, True])
def test_zero_init_of_the_last_norm_of_every_block(bottleneck):
  options = dict(entry='dct', stages=(1,), channels=3, num_classes=2, zero_init_residual=True)
  model = ResNet(bottleneck=bottleneck, **options)
  params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4, 4, 3)))['params']
  last = 'bn3' if bottleneck else 'bn2'
  scales = {
    (path[0].key, path[1].key): leaf
    for path, leaf in jax.tree.leaves_with_path(params)
    if path[-1].key == 'scale'
  }
  assert len(scales) == (4 if bottleneck else 3)
  for (_, name), scale in scales.items():
    assert (scale == (0 if name == last else 1)).all(), name


def test_grouped_norm_on_eight_devices_is_eight_separate_batches():
  grouped, single = (small_net(norm_groups=groups, norm_momentum=0.5) for groups in (8, 1))
  x = np.random.default_rng(0).normal(size=(16, 8, 8, 6)).astype(np.float32)
  variables = random_variables(single, *x.shape)

  @functools.partial(jax.jit, static_argnums=0)
  def apply(model, variables, x):
    return model.apply(variables, x, train=True, mutable=['batch_stats'])

  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  logits, state = apply(grouped, variables, jax.device_put(x, NamedSharding(mesh, P('data'))))
  parts = [apply(single, variables, part) for part in np.split(x, 8)]
  # Small batches amplify rounding: a channel of little variance is divided by it.
  np.testing.assert_allclose(logits, np.concatenate([p[0] for p in parts]), rtol=1e-3, atol=1e-3)
  # Running statistics: the mean over the groups.
  mean = jax.tree.map(lambda *v: sum(v) / 8, *[p[1] for p in parts])
  chex.assert_trees_all_close(state, mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('resnet5O', {}, r"no model 'resnet5O'.\n  Closest names: 'resnet50'"),
    ('zzz', {}, r"Closest names: 'alexnet'.*list_models\(\) names all"),
    ('resnet50', {'channels': 24}, r"takes no option 'channels'. 'resnet50_dct', .* would take it"),
    (
      'resnet50_dct',
      {'chanels': 24},
      r"Did you mean 'channels'\?\n  It takes: num_classes, channels",
    ),
    ('mobilenet_v2_dct', {'stage2_stride': 1}, r"no option 'stage2_stride'.*\n  It takes: "),
    ('resnet50_dct', {'channels': 0}, r'needs channels >= 1, a whole number, got 0'),
    ('resnet50_dct', {'channels': 2.5}, r'needs channels >= 1, a whole number, got 2.5'),
    ('resnet50_dct', {'stage2_stride': 3}, r'takes stage2_stride = 1 or 2, got 3'),
    ('resnet50_dct', {'gate': 'local'}, r"takes gate = False or True or 'global', got 'local'"),
    ('mobilenet_v2', {'convention': 'jax'}, r"takes convention = 'torch' or 'tf', got 'jax'"),
    ('mobilenet_v2', {'width': 0}, r'needs width > 0, got 0'),
    ('resnet18', {'num_classes': 0}, r'needs num_classes >= 1'),
    ('lstm_lm', {}, r"reads words, not images: create_language_model\('lstm_lm', vocab_size"),
  ],
)
def test_errors_of_create_model(name, options, message):
  with pytest.raises(ValueError, match=message):
    create_model(name, **options)


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    (
      'resnet18_dct',
      (1, 8, 8, 64),
      r'DCT maps of 24 channels .*got x: \[1, 8, 8, 64\].\n  Make the model with channels=64',
    ),
    ('resnet18', (1, 8, 8, 24), r'RGB images of 3 channels .*\n.*`_dct` model'),
    ('resnet18', (8, 8, 3), r'got x: \[8, 8, 3\].\n  Axes are batch'),
    (
      'resnet18_patchify',
      (1, 60, 64, 3),
      r'block=8 needs height and width divisible by 8, got x: \[1, 60',
    ),
  ],
)
def test_errors_of_the_input(name, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.ones(shape))
