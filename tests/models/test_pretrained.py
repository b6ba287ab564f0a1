"""Shipped weights on real data, against the figures published with them."""

import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from fqjax.models import create_model, load_cifar_resnet_npz, load_mobilenet_v2_npz
from tests.models import reference

pytestmark = pytest.mark.data


@pytest.fixture(scope='module')
def cifar10(data_dir):
  with np.load(data_dir / 'cifar10' / 'cifar10_test.npz') as file:
    residual, label = file['residual'], file['label']
  planes = np.cumsum(np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
  image = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], axis=-1)
  mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
  return (image / np.float32(255) - mean) / std, label


def correct(model, variables, image, label, batch=250):
  apply = jax.jit(model.apply)
  parts = [apply(variables, image[i : i + batch]) for i in range(0, len(image), batch)]
  return np.concatenate(parts).argmax(-1) == label


# 91.73 % and 93.39 % of the 10,000 test images are published. A part, the first images of each
# class, may differ by three of its standard errors (2.6 and 3.3 points).
@pytest.mark.parametrize(('depth', 'right', 'each'), [(20, 9173, 100), (56, 9339, 50)])
def test_cifar_resnet_on_a_part_of_the_test_set(depth, right, each, cifar10, data_dir):
  image, label = cifar10
  part = np.concatenate([np.flatnonzero(label == k)[:each] for k in range(10)])
  model = create_model(f'cifar_resnet{depth}')
  path = data_dir / 'weights' / f'cifar10_resnet{depth}.npz'
  variables = load_cifar_resnet_npz(path, model)
  got, p = correct(model, variables, image[part], label[part]).mean(), right / 10_000
  assert abs(got - p) < 3 * np.sqrt(p * (1 - p) / len(part)), got


@pytest.mark.parametrize('depth', [20, pytest.param(56, marks=pytest.mark.full)])
def test_cifar_resnet_logits_equal_the_oracle(depth, cifar10, data_dir, x64):
  image, _ = cifar10
  path = data_dir / 'weights' / f'cifar10_resnet{depth}.npz'
  model = create_model(f'cifar_resnet{depth}', dtype=jnp.float64)
  variables = load_cifar_resnet_npz(path, model)
  with np.load(path) as file:
    want = reference.resnet(file, image[:2].transpose(0, 3, 1, 2), [(depth - 2) // 6] * 3, True)
  np.testing.assert_allclose(jax.jit(model.apply)(variables, image[:2]), want, rtol=1e-8)


@pytest.mark.full
@pytest.mark.parametrize(('depth', 'right'), [(20, 9173), (56, 9339)])
def test_cifar_resnet_on_the_whole_test_set(depth, right, cifar10, data_dir):
  model = create_model(f'cifar_resnet{depth}')
  variables = load_cifar_resnet_npz(data_dir / 'weights' / f'cifar10_resnet{depth}.npz', model)
  # Rounding may turn an image or two that lie on the border of two classes.
  assert abs(correct(model, variables, *cifar10).sum() - right) <= 2


@pytest.fixture(scope='module')
def photographs(data_dir):
  folder = data_dir / 'imagenet_samples'
  classes = [wnid for wnid, _ in json.loads((folder / 'classes.json').read_text())]

  def load(every):
    images, labels = [], []
    with zipfile.ZipFile(folder / 'imagenet_samples.zip') as archive:
      for name in sorted(archive.namelist())[::every]:
        photo = Image.open(io.BytesIO(archive.read(name))).convert('RGB')
        scale = 256 / min(photo.size)
        size = tuple(round(side * scale) for side in photo.size)
        photo = photo.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        images.append(np.asarray(photo.crop((left, top, left + 224, top + 224))))
        labels.append(classes.index(name.split('_')[0]))
    return np.float32(images) / np.float32(127.5) - 1, np.array(labels)

  return load


def mobilenet(data_dir, dtype=jnp.float32):
  model = create_model('mobilenet_v2', convention='tf', dtype=dtype)
  return model, load_mobilenet_v2_npz(data_dir / 'weights' / 'mobilenet_v2_1.0_224.npz', model)


def test_mobilenet_v2_on_every_tenth_photograph(photographs, data_dir):
  # One photograph per class, so every tenth is a stratified part of 25. 0.900 is published for
  # all 250: three binomial standard deviations below leave 18, at random it would be none.
  model, variables = mobilenet(data_dir)
  assert correct(model, variables, *photographs(10), batch=25).sum() >= 18


@pytest.mark.full
def test_mobilenet_v2_on_all_photographs(photographs, data_dir):
  model, variables = mobilenet(data_dir)
  accuracy = correct(model, variables, *photographs(1), batch=25).mean()
  assert abs(accuracy - 0.900) <= 0.004


@pytest.mark.full
def test_mobilenet_v2_logits_equal_the_oracle(photographs, data_dir, x64):
  image = photographs(250)[0]
  model, variables = mobilenet(data_dir, jnp.float64)
  got = jax.jit(model.apply)(variables, image)
  # TensorFlow's names once more, independent of the importer.
  with np.load(data_dir / 'weights' / 'mobilenet_v2_1.0_224.npz') as file:
    slim = dict(file)
  state = {}
  parts = {'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean'}
  parts['moving_variance'] = 'running_var'

  def take(old, conv, bn):
    kernel = slim[f'{old}_weights' if f'{old}_weights' in slim else f'{old}_depthwise_weights']
    order = (2, 3, 0, 1) if 'depthwise' in old else (3, 2, 0, 1)
    state[f'{conv}.weight'] = kernel.transpose(order)
    for part, name in parts.items():
      state[f'{bn}.{name}'] = slim[f'{old}_BatchNorm_{part}']

  take('Conv', 'features.0.0', 'features.0.1')
  take('Conv_1', 'features.18.0', 'features.18.1')
  for i in range(17):
    block, name, k = f'expanded_conv_{i}' if i else 'expanded_conv', f'features.{i + 1}.conv', 0
    if i:
      take(f'{block}_expand', f'{name}.0.0', f'{name}.0.1')
      k = 1
    take(f'{block}_depthwise', f'{name}.{k}.0', f'{name}.{k}.1')
    take(f'{block}_project', f'{name}.{k + 1}', f'{name}.{k + 2}')
  head = 'Logits_Conv2d_1c_1x1'
  matrix = slim[f'{head}_weights_int8'] * slim[f'{head}_weights_scale']
  state['classifier.1.weight'] = matrix.T[1:]
  state['classifier.1.bias'] = slim[f'{head}_biases'][1:]
  want = reference.mobilenet_v2(state, image.transpose(0, 3, 1, 2), tf=True)
  np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
