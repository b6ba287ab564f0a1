import jax
import numpy as np
import pytest

from fqjax.models import create_model, entry_features, fit_linear, rgb_to_dct_variables
from fqjax.models._mobilenet_v2 import MobileNetV2
from fqjax.models._resnet import CifarResNet, ResNet
from tests.models.test_models import random_variables


def pair(cls, channels, **options):
  rgb, dct = cls(**options), cls(entry='dct', channels=channels, **options)
  return random_variables(rgb, 1, 32, 32, 3), random_variables(dct, 1, 8, 8, channels, seed=1)


def changed(result, rgb, dct, first):
  """Checks what lies behind the first block; returns its layers that are not the RGB ones."""
  own = []
  for path, leaf in jax.tree.leaves_with_path(result):
    keys = [key.key for key in path]
    if keys[1] == first:
      source = rgb[keys[0]][first].get(keys[2], {}).get(keys[3])
      if source is None or source.shape != leaf.shape or (source != leaf).any():
        own.append('/'.join(keys[2:]))
      continue
    source = dct if keys[1] in ('gate', 'conv1', 'bn1') else rgb
    for key in keys:
      source = source[key]
    np.testing.assert_array_equal(leaf, source, err_msg='/'.join(keys))
  return own


@pytest.mark.parametrize('channels', [24, 64, 192])
def test_resnet50_as_published(channels):
  rgb, dct = pair(ResNet, channels, stages=(1, 1), bottleneck=True, num_classes=5)
  result = rgb_to_dct_variables(rgb, dct)
  own = changed(result, rgb, dct, 'layer1_0')
  assert own == ([] if channels == 64 else ['conv1/kernel', 'downsample_conv/kernel'])
  for layer in ('conv1', 'downsample_conv'):
    kernel = result['params']['layer1_0'][layer]['kernel']
    if channels == 192:
      want = dct['params']['layer1_0'][layer]['kernel']
    else:
      want = rgb['params']['layer1_0'][layer]['kernel'][:, :, :channels]
    np.testing.assert_array_equal(kernel, want)
  again = rgb_to_dct_variables(rgb, dct, method='reinit')['params']['layer1_0']['conv1']['kernel']
  np.testing.assert_array_equal(again, dct['params']['layer1_0']['conv1']['kernel'])


def test_resnet18_takes_the_identity_for_its_new_projection():
  rgb, dct = pair(ResNet, 24, stages=(1, 1), num_classes=5)
  result = rgb_to_dct_variables(rgb, dct)
  kernel = result['params']['layer1_0']['downsample_conv']['kernel']
  np.testing.assert_array_equal(kernel[0, 0], np.eye(24, 64))
  kernel = result['params']['layer1_0']['conv1']['kernel']
  np.testing.assert_array_equal(kernel, rgb['params']['layer1_0']['conv1']['kernel'][:, :, :24])


@pytest.mark.parametrize('channels', [24, 32, 48, 192])
def test_mobilenet_as_published(channels):
  rgb, dct = pair(MobileNetV2, channels, num_classes=5)
  result = rgb_to_dct_variables(rgb, dct)
  first, old = result['params']['features_1'], rgb['params']['features_1']
  changed(result, rgb, dct, 'features_1')
  if channels <= 32:
    for leaf in ('scale', 'bias'):
      np.testing.assert_array_equal(
        first['depthwise_bn'][leaf], old['depthwise_bn'][leaf][:channels]
      )
    for leaf in ('mean', 'var'):
      stats = (v['batch_stats']['features_1']['depthwise_bn'][leaf] for v in (result, rgb))
      np.testing.assert_array_equal(next(stats), next(stats)[:channels])
    want = old['depthwise']['kernel'][..., :channels], old['project']['kernel'][:, :, :channels]
  elif channels == 192:
    want = np.tile(old['depthwise']['kernel'], (1, 1, 6, 1)), old['project']['kernel']
  else:
    own = dct['params']['features_1']
    want = own['depthwise']['kernel'], own['project']['kernel']
  np.testing.assert_array_equal(first['depthwise']['kernel'], want[0])
  np.testing.assert_array_equal(first['project']['kernel'], want[1])


def test_gate_and_patchify_stem_keep_their_own():
  rgb, _ = pair(CifarResNet, 6, num_classes=10)
  gated = create_model('cifar_resnet20_dct', channels=6, gate=True)
  dct = random_variables(gated, 1, 8, 8, 6)
  changed(rgb_to_dct_variables(rgb, dct), rgb, dct, 'layer1_0')
  patchify = random_variables(create_model('cifar_resnet20_patchify', channels=6), 1, 32, 32, 3)
  changed(rgb_to_dct_variables(rgb, patchify), rgb, patchify, 'layer1_0')


def test_fit_linear_against_lstsq():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 50, 7)) @ rng.normal(size=(7, 7)) + 3
  y = rng.normal(size=(4, 50, 5))
  weights, intercept = fit_linear(x, y, ridge=0)
  design = np.concatenate([x.reshape(-1, 7), np.ones((200, 1))], 1)
  want = np.linalg.lstsq(design, y.reshape(-1, 5), rcond=None)[0]
  np.testing.assert_allclose(weights, want[:-1], atol=1e-9)
  np.testing.assert_allclose(intercept, want[-1], atol=1e-9)
  # Ridge: a channel that never moves gets no weight, and nothing is singular.
  x[..., 2] = 5
  weights, _ = fit_linear(x, y)
  assert np.isfinite(weights).all() and np.abs(weights[2]).max() < 1e-6
  with pytest.raises(ValueError, match=r'same places, got x: \[4, 50, 7\], y: \[3, 50, 5\]'):
    fit_linear(x, y[:3])


def features_of_a_linear_world(channels, out):
  """DCT maps, and RGB features that are an affine map of them: a fit loses nothing."""
  rng = np.random.default_rng(0)
  maps = rng.normal(size=(6, 4, 4, channels)).astype(np.float32)
  matrix = rng.normal(size=(channels, out)) / np.sqrt(channels)
  return maps, (maps @ matrix + rng.normal(size=out)).astype(np.float32)


@pytest.mark.parametrize('bottleneck', [False, True])
def test_least_squares_starts_at_the_rgb_network(bottleneck):
  """In a linear world the two networks agree; with 1x1 first kernels, up to the border too."""
  options = dict(stages=(1,), bottleneck=bottleneck, num_classes=5)
  rgb_model, dct_model = ResNet(**options), ResNet(entry='dct', channels=12, **options)
  maps, stem = features_of_a_linear_world(12, 64)
  rgb = random_variables(rgb_model, 1, 32, 32, 3)
  dct = random_variables(dct_model, 1, 4, 4, 12, seed=1)
  start = rgb_to_dct_variables(
    rgb, dct, method='least_squares', rgb_features=stem, dct_features=maps, ridge=0
  )
  rgb, start = jax.tree.map(np.asarray, (rgb, start))
  # The RGB network behind its stem is a "DCT" network of the 64 stem channels.
  behind = {k: {n: v for n, v in c.items() if n not in ('conv1', 'bn1')} for k, c in rgb.items()}
  outputs = []
  if bottleneck:
    twin = ResNet(entry='dct', channels=64, **options)
    for train in (False, True):
      apply = lambda m, v, x: m.apply(v, x, train=train, mutable=['batch_stats'])[0]
      outputs.append([apply(twin, behind, stem), apply(dct_model, start, maps)])
  else:
    # One conv and norm at a time: the identity shortcut has no counterpart in a DCT network.
    block, new = behind['params']['layer1_0'], start['params']['layer1_0']
    stats = start['batch_stats']['layer1_0']
    x = maps @ new['downsample_conv']['kernel'][0, 0]
    for mean, var in ((x.mean((0, 1, 2)), x.var((0, 1, 2))), stats['downsample_bn'].values()):
      scale, bias = new['downsample_bn']['scale'], new['downsample_bn']['bias']
      outputs.append([stem, (x - mean) / np.sqrt(var + 1e-5) * scale + bias])
    dims = ('NHWC', 'HWIO', 'NHWC')
    conv = lambda x, kernel: np.asarray(
      jax.lax.conv_general_dilated(x, kernel, (1, 1), 'VALID', dimension_numbers=dims)
    )
    shifted = conv(maps, new['conv1']['kernel']) - stats['bn1']['mean']
    mean = behind['batch_stats']['layer1_0']['bn1']['mean']
    outputs.append([conv(stem, block['conv1']['kernel']) - mean, shifted])
  for want, got in outputs:
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_least_squares_for_mobilenet_fits_the_projection():
  rgb, dct = pair(MobileNetV2, 24, num_classes=5)
  maps, stem = features_of_a_linear_world(24, 32)
  start = rgb_to_dct_variables(
    rgb, dct, method='least_squares', rgb_features=stem, dct_features=maps, ridge=0
  )
  rgb, start = jax.tree.map(np.asarray, (rgb, start))
  old, new = rgb['params']['features_1'], start['params']['features_1']
  want = stem @ old['project']['kernel'][0, 0]
  got = maps @ new['project']['kernel'][0, 0]
  means = [v['batch_stats']['features_1']['project_bn']['mean'] for v in (rgb, start)]
  np.testing.assert_allclose(got - means[1], want - means[0], rtol=1e-4, atol=1e-4)
  own = dct['params']['features_1']['depthwise']['kernel']
  np.testing.assert_array_equal(new['depthwise']['kernel'], own)


def test_entry_features_are_the_input_of_the_first_shared_kernels():
  x = np.random.default_rng(0).normal(size=(2, 16, 16, 6)).astype(np.float32)
  model = CifarResNet(entry='dct', blocks=1, channels=6)
  np.testing.assert_array_equal(entry_features(model, random_variables(model, *x.shape), x), x)
  model = CifarResNet(blocks=1, stem_stride=4)
  features = entry_features(model, random_variables(model, 2, 16, 16, 3), x[..., :3])
  assert features.shape == (2, 4, 4, 16) and (features >= 0).all()
  model = MobileNetV2(num_classes=2)
  features = entry_features(model, random_variables(model, 2, 16, 16, 3), x[..., :3])
  assert features.shape == (2, 8, 8, 32) and 0 <= features.min() < features.max() <= 6


def test_errors():
  rgb, dct = pair(CifarResNet, 6, num_classes=10)
  other = random_variables(create_model('cifar_resnet56_dct', channels=6), 1, 8, 8, 6)
  with pytest.raises(ValueError, match=r'differ in \d+ arrays .*layer1_3.*RGB none'):
    rgb_to_dct_variables(rgb, other)
  hundred = random_variables(
    create_model('cifar_resnet20_dct', channels=6, num_classes=100), 1, 8, 8, 6
  )
  with pytest.raises(ValueError, match=r'fc/.*\n.*pass new_head=True'):
    rgb_to_dct_variables(rgb, hundred)
  kept = rgb_to_dct_variables(rgb, hundred, new_head=True)['params']['fc']['kernel']
  np.testing.assert_array_equal(kept, hundred['params']['fc']['kernel'])
  with pytest.raises(ValueError, match=r"method is 'cut', 'reinit' or 'least_squares', got 'fit'"):
    rgb_to_dct_variables(rgb, dct, method='fit')
  with pytest.raises(ValueError, match=r'needs rgb_features and dct_features'):
    rgb_to_dct_variables(rgb, dct, method='least_squares')
  with pytest.raises(ValueError, match=r'rgb_features must have 16 channels, got \[2, 64\]'):
    rgb_to_dct_variables(
      rgb, dct, method='least_squares', rgb_features=np.ones((2, 64)), dct_features=np.ones((2, 6))
    )
