import json
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fqjax.models import (
  _importers,
  create_model,
  import_torchvision,
  load_cifar_resnet_npz,
  load_mobilenet_v2_npz,
)
from fqjax.models._resnet import ResNet
from fqjax.models._vgg import VGG
from tests.models import reference

RESNETS = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3)} | {
  'resnet50': (3, 4, 6, 3),
  'resnet101': (3, 4, 23, 3),
}
# Entries of torchvision's state dictionaries, counters included.
ENTRIES = {'resnet18': 122, 'resnet34': 218, 'resnet50': 320, 'resnet101': 626}


@pytest.fixture(scope='module')
def small_state():
  return reference.resnet_state(RESNETS['resnet18'], classes=5)


def photo(n, size, seed=0):
  return np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


def check(model, variables, want, x):
  """Equal in float64; in float32 up to its rounding."""
  got = jax.jit(model.apply)(variables, jnp.asarray(x))
  assert got.dtype == jnp.float64
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def check_resnet(model, blocks, bottleneck, path, entries=None):
  state = reference.resnet_state(blocks, bottleneck, classes=7)
  assert entries in (None, len(state))
  save_file(state, path)
  variables = import_torchvision(path, model)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  # An odd size shows where padding falls.
  x = photo(1, 39)
  check(model, variables, reference.resnet(state, x.transpose(0, 3, 1, 2), blocks), x)


def test_resnet18_forward_equals_the_oracle(x64, tmp_path):
  model = create_model('resnet18', num_classes=7, dtype=jnp.float64)
  check_resnet(model, RESNETS['resnet18'], False, tmp_path / 'weights.safetensors', 122)


def test_bottleneck_forward_equals_the_oracle(x64, tmp_path):
  model = ResNet(num_classes=7, dtype=jnp.float64, stages=(2, 1), bottleneck=True)
  check_resnet(model, (2, 1), True, tmp_path / 'weights.safetensors')


@pytest.mark.full
@pytest.mark.parametrize('name', ['resnet34', 'resnet50', 'resnet101'])
def test_deep_resnet_forward_equals_the_oracle(name, x64, tmp_path):
  model = create_model(name, num_classes=7, dtype=jnp.float64)
  path = tmp_path / 'weights.safetensors'
  check_resnet(model, RESNETS[name], name != 'resnet34', path, ENTRIES[name])


@pytest.mark.parametrize('name', RESNETS)
def test_names_and_shapes_of_every_resnet(name):
  bottleneck = name in ('resnet50', 'resnet101')
  state = reference.resnet_state(RESNETS[name], bottleneck, classes=7)
  assert len(state) == ENTRIES[name]
  import_torchvision(state, create_model(name, num_classes=7))


@pytest.mark.parametrize('convention', ['torch', 'tf'])
def test_mobilenet_forward_equals_the_oracle(convention, x64, tmp_path):
  state = reference.mobilenet_state(classes=7)
  assert len(state) == 314
  variables = import_torchvision(state, create_model('mobilenet_v2', num_classes=7))
  model = create_model('mobilenet_v2', num_classes=7, convention=convention, dtype=jnp.float64)
  x = photo(1, 64)
  want = reference.mobilenet_v2(state, x.transpose(0, 3, 1, 2), tf=convention == 'tf')
  check(model, variables, want, x)


@pytest.mark.parametrize('batch_norm', [False, True])
def test_vgg_forward_equals_the_oracle(batch_norm, x64, tmp_path):
  sizes = dict(width=1 / 16, units=8)
  state = reference.vgg_state(batch_norm, side=2, classes=7, **sizes)
  path = tmp_path / 'weights.safetensors'
  save_file(state, path)
  model = VGG(num_classes=7, dtype=jnp.float64, batch_norm=batch_norm, image_size=64, **sizes)
  variables = import_torchvision(path, model)
  x = photo(2, 64)
  check(model, variables, reference.vgg(state, x.transpose(0, 3, 1, 2), batch_norm), x)


def test_names_and_shapes_of_torchvisions_vgg16():
  for batch_norm, names in (
    (False, {'features.28.weight': (512, 512, 3, 3)}),
    (True, {'features.40.weight': (512, 512, 3, 3), 'features.41.running_var': (512,)}),
  ):
    model = create_model('vgg16', batch_norm=batch_norm)
    rename = _importers._torch_vgg_name(batch_norm)
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(
      jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    ):
      name, axes = rename(tuple(key.key for key in path))
      axes = axes or tuple(range(leaf.ndim))
      shapes[name] = tuple(leaf.shape[axes.index(i)] for i in range(leaf.ndim))
    names |= {'features.0.weight': (64, 3, 3, 3), 'features.0.bias': (64,)}
    names |= {'classifier.0.weight': (4096, 25088), 'classifier.6.bias': (1000,)}
    assert {name: shapes[name] for name in names} == names
    assert len(shapes) == (84 if batch_norm else 32)


def test_cifar_stem_forward_equals_the_oracle(x64):
  # torchvision's names fit; a 3x3 stem of stride 1 without pooling is all that differs.
  state = reference.resnet_state((1, 1), classes=10)
  state.add_conv('conv1', 64, 3, 3)
  model = ResNet(num_classes=10, stages=(1, 1), cifar_stem=True, dtype=jnp.float64)
  variables = import_torchvision(state, model)
  x = photo(1, 9)
  state |= {f'linear.{leaf}': state[f'fc.{leaf}'] for leaf in ('weight', 'bias')}
  check(model, variables, reference.resnet(state, x.transpose(0, 3, 1, 2), [1, 1], True), x)


def test_cifar_forward_equals_the_oracle(x64, tmp_path):
  state = reference.resnet_state((3, 3, 3), classes=10, cifar=True)
  path = tmp_path / 'weights.npz'
  np.savez(path, **{k: v for k, v in state.items() if 'tracked' not in k})
  model = create_model('cifar_resnet20', dtype=jnp.float64)
  variables = load_cifar_resnet_npz(path, model)
  x = photo(2, 16)
  check(model, variables, reference.resnet(state, x.transpose(0, 3, 1, 2), (3, 3, 3), True), x)


def test_names_and_shapes_of_cifar_resnet32(tmp_path):
  state = reference.resnet_state((5, 5, 5), classes=10, cifar=True)
  np.savez(tmp_path / 'weights.npz', **{k: v for k, v in state.items() if 'tracked' not in k})
  variables = load_cifar_resnet_npz(tmp_path / 'weights.npz', create_model('cifar_resnet32'))
  last = variables['params']['layer3_4']['conv2']['kernel']
  np.testing.assert_array_equal(last, state['layer3.4.conv2.weight'].transpose(2, 3, 1, 0))


def test_names_a_torchvision_user_knows(small_state):
  assert {
    'conv1.weight',
    'bn1.running_var',
    'layer1.0.conv1.weight',
    'layer2.0.downsample.0.weight',
    'layer4.1.bn2.num_batches_tracked',
    'fc.bias',
  } <= set(small_state)
  mobile = reference.mobilenet_state()
  shapes = {
    'features.0.0.weight': (32, 3, 3, 3),
    'features.1.conv.0.0.weight': (32, 1, 3, 3),
    'features.1.conv.1.weight': (16, 32, 1, 1),
    'features.2.conv.0.0.weight': (96, 16, 1, 1),
    'features.17.conv.3.running_mean': (320,),
    'classifier.1.weight': (1000, 1280),
  }
  assert {name: mobile[name].shape for name in shapes} == shapes


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.float64])
def test_other_float_types_arrive_as_float32(dtype, small_state, tmp_path):
  model = create_model('resnet18', num_classes=5)
  state = {k: v.astype(dtype) for k, v in small_state.items() if 'tracked' not in k}
  path = tmp_path / 'weights.safetensors'
  write_safetensors(path, state)
  kernel = import_torchvision(path, model)['params']['fc']['kernel']
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, state['fc.weight'].T.astype(np.float32))


def write_safetensors(path, state):
  """The format by hand, so that it can hold what the package would refuse to write."""
  names = {'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32', 'float64': 'F64'}
  header, data = {}, b''
  for name, value in state.items():
    blob = value.tobytes()
    offsets = [len(data), len(data) + len(blob)]
    header[name] = {'dtype': names[str(value.dtype)], 'shape': value.shape, 'data_offsets': offsets}
    data += blob
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def broken(state, **changes):
  state = {**state, **{k: v for k, v in changes.items() if v is not None}}
  return {k: v for k, v in state.items() if k not in changes or changes[k] is not None}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'fc.bias': None}, r'Missing \(1\): fc.bias\n  Unknown \(0\): none'),
    ({'fc.scale': np.ones(5)}, r'Missing \(0\): none\n  Unknown \(1\): fc.scale'),
    ({'fc.bias': np.ones(1000)}, r'1 shapes differ .*fc.bias \[1000\] instead of \[5\]'),
    ({'fc.weight': np.ones((512, 5))}, r'fc.weight \[512, 5\] instead of \[5, 512\]'),
    ({'bn1.bias': np.ones(64, np.int8)}, r'must be float, got bn1.bias int8'),
    ({'bn1.bias': np.full(64, np.nan)}, r'not finite in bn1.bias'),
    ({'bn1.bias': np.ones((64, 1))}, r'bn1.bias \[64, 1\] instead of \[64\]'),
  ],
)
def test_weights_that_do_not_fit(changes, message, small_state):
  with pytest.raises(ValueError, match=message):
    import_torchvision(broken(small_state, **changes), create_model('resnet18', num_classes=5))


def test_many_differences_are_counted_and_the_first_listed():
  with pytest.raises(ValueError, match=r'Missing \(267\): bn1.bias, .* and 262 more') as error:
    import_torchvision({'x': np.ones(1)}, create_model('resnet50', num_classes=5))
  assert len(str(error.value)) < 600


@pytest.mark.parametrize('damage', ['empty', 'cut', 'garbage', 'long_header', 'wrong_offsets'])
def test_damaged_safetensors(damage, small_state, tmp_path):
  path = tmp_path / 'weights.safetensors'
  save_file(small_state, path)
  good = path.read_bytes()
  text = json.dumps({'fc.bias': {'dtype': 'F32', 'shape': [5], 'data_offsets': [0, 4]}}).encode()
  path.write_bytes(
    {
      'empty': b'',
      'cut': good[: len(good) // 2],
      'garbage': b'\x80\x04pickle' * 100,
      'long_header': struct.pack('<Q', 1 << 60) + good[8:],
      'wrong_offsets': struct.pack('<Q', len(text)) + text + bytes(4),
    }[damage]
  )
  with pytest.raises(ValueError, match=r'weights.safetensors cannot be read as a safetensors file'):
    import_torchvision(path, create_model('resnet18', num_classes=5))


class Trap:
  """Unpickling this would run code."""

  def __reduce__(self):
    return (pytest.fail, ('the file ran code',))


@pytest.mark.parametrize('damage', ['cut', 'garbage', 'pickle', 'single', 'bomb', 'text'])
def test_damaged_npz(damage, tmp_path):
  path = tmp_path / 'weights.npz'
  state = reference.resnet_state((3, 3, 3), classes=10, cifar=True)
  state = {k: v for k, v in state.items() if 'tracked' not in k}
  if damage == 'pickle':
    state['linear.bias'] = np.array([Trap()] * 10, object)
  np.savez(path, **state)
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:-200])
  elif damage == 'garbage':
    path.write_bytes(b'PK\x03\x04' + b'\x00' * 500)
  elif damage == 'text':
    path.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
  elif damage == 'single':
    with open(path, 'wb') as file:
      np.save(file, np.ones(3))
  elif damage == 'bomb':
    # A header that claims 4 TB: refused by its shape, before anything is allocated.
    with zipfile.ZipFile(path, 'w') as file:
      for name, value in state.items():
        with file.open(f'{name}.npy', 'w') as member:
          shape = (1 << 40,) if name == 'linear.bias' else value.shape
          header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
          np.lib.format.write_array_header_1_0(member, header)
          member.write(value.tobytes())
  message = {
    'pickle': 'must be float, got linear.bias object',
    'single': 'holds one array',
    'bomb': r'linear.bias \[1099511627776\] instead of \[10\]',
  }.get(damage, 'weights.npz cannot be read as an .npz file')
  with pytest.raises(ValueError, match=message):
    load_cifar_resnet_npz(path, create_model('cifar_resnet20'))


def test_missing_file_stays_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError):
    import_torchvision(tmp_path / 'none.safetensors', create_model('resnet18'))
  with pytest.raises(FileNotFoundError):
    load_cifar_resnet_npz(tmp_path / 'none.npz', create_model('cifar_resnet20'))


@pytest.mark.parametrize(
  ('load', 'model', 'message'),
  [
    (import_torchvision, 'resnet18_dct', r'got ResNet for dct input.*\n.*rgb_to_dct_variables'),
    (import_torchvision, 'cifar_resnet20', r'fills ResNet or MobileNetV2 .*, got CifarResNet'),
    (load_cifar_resnet_npz, 'resnet18', r'fills CifarResNet'),
    (load_mobilenet_v2_npz, 'mobilenet_v2', r"convention='tf'"),
  ],
)
def test_wrong_model(load, model, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load({} if load is import_torchvision else tmp_path / 'unread', create_model(model))


def test_torchvision_weights_do_not_enter_a_tensorflow_model():
  with pytest.raises(ValueError, match=r"convention='torch'"):
    import_torchvision({}, create_model('mobilenet_v2', convention='tf'))


def slim_state(classes=1001, seed=0):
  """The arrays of a TensorFlow-slim MobileNetV2, made from the torchvision ones."""
  state, slim = reference.mobilenet_state(classes, seed), {}
  leaves = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'moving_mean'}
  leaves['running_var'] = 'moving_variance'

  def add(name, conv, norm, depthwise=False):
    kernel = state[f'{conv}.weight'].transpose(2, 3, 1, 0)
    suffix = '_depthwise_weights' if depthwise else '_weights'
    slim[name + suffix] = kernel.transpose(0, 1, 3, 2) if depthwise else kernel
    for leaf, other in leaves.items():
      slim[f'{name}_BatchNorm_{other}'] = state[f'{norm}.{leaf}']

  add('Conv', 'features.0.0', 'features.0.1')
  add('Conv_1', 'features.18.0', 'features.18.1')
  for i in range(17):
    block, name, k = f'expanded_conv_{i}' if i else 'expanded_conv', f'features.{i + 1}.conv', 0
    if i:
      add(f'{block}_expand', f'{name}.0.0', f'{name}.0.1')
      k = 1
    add(f'{block}_depthwise', f'{name}.{k}.0', f'{name}.{k}.1', True)
    add(f'{block}_project', f'{name}.{k + 1}', f'{name}.{k + 2}')
  rng = np.random.default_rng(seed)
  head = 'Logits_Conv2d_1c_1x1'
  slim[f'{head}_weights_int8'] = rng.integers(-127, 128, (1280, classes), np.int8)
  slim[f'{head}_weights_scale'] = rng.uniform(0.001, 0.01, classes).astype(np.float32)
  slim[f'{head}_biases'] = state['classifier.1.bias']
  return state, slim


def test_slim_mobilenet(tmp_path):
  state, slim = slim_state(classes=6)
  path = tmp_path / 'weights.npz'
  np.savez(path, **slim)
  same = create_model('mobilenet_v2', num_classes=6)
  want = import_torchvision(state, same)
  matrix = slim['Logits_Conv2d_1c_1x1_weights_int8'] * slim['Logits_Conv2d_1c_1x1_weights_scale']
  for classes, first in ((6, 0), (5, 1)):
    model = create_model('mobilenet_v2', num_classes=classes, convention='tf')
    got = load_mobilenet_v2_npz(path, model)
    head = got['params'].pop('classifier')
    np.testing.assert_array_equal(head['kernel'], matrix[:, first:])
    np.testing.assert_array_equal(head['bias'], state['classifier.1.bias'][first:])
    want['params'].pop('classifier', None)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  model = create_model('mobilenet_v2', num_classes=9, convention='tf')
  with pytest.raises(ValueError, match=r'must be int8 \[n, 9\].*got int8 \[1280, 6\]'):
    load_mobilenet_v2_npz(path, model)
  del slim['Logits_Conv2d_1c_1x1_weights_scale']
  np.savez(path, **slim)
  model = create_model('mobilenet_v2', num_classes=6, convention='tf')
  with pytest.raises(ValueError, match=r'Missing \(1\): Logits_Conv2d_1c_1x1_weights'):
    load_mobilenet_v2_npz(path, model)
