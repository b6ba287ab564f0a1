"""The networks once more in NumPy float64, NCHW, from PyTorch's names: an oracle.

Written from the papers and torchvision's layout, sharing nothing with fqjax. The functions
`*_state` write out random state dictionaries under torchvision's names.
"""

import numpy as np


def conv(x, weight, stride=1, padding=None, groups=1):
  padding = weight.shape[2] // 2 if padding is None else padding
  if isinstance(padding, int):
    padding = (padding, padding)
  x = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), padding, padding))
  windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
  windows = windows[:, :, ::stride, ::stride]
  if groups == x.shape[1] == weight.shape[0]:
    return np.einsum('nchwij,cij->nchw', windows, weight[:, 0], optimize=True)
  outputs = [
    np.tensordot(part, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    for part, kernel in zip(np.split(windows, groups, 1), np.split(weight, groups, 0))
  ]
  return np.concatenate(outputs, 1)


def norm(x, state, name, epsilon=1e-5):
  mean, var, scale, bias = (
    np.asarray(state[f'{name}.{leaf}'], np.float64).reshape(1, -1, 1, 1)
    for leaf in ('running_mean', 'running_var', 'weight', 'bias')
  )
  return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def relu(x):
  return np.maximum(x, 0)


def max_pool(x):
  x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
  return windows[:, :, ::2, ::2].max((4, 5))


def dense(x, state, name):
  return x.mean((2, 3)) @ np.asarray(state[f'{name}.weight'], np.float64).T + state[f'{name}.bias']


def residual(x, state, name, stride):
  """A basic or bottleneck block, whichever the names say; shortcut A where none is stored."""
  last = 3 if f'{name}.conv3.weight' in state else 2
  y = x
  for i in range(1, last + 1):
    # The stride sits on the first 3x3.
    here = stride if i == (2 if last == 3 else 1) else 1
    y = norm(conv(y, state[f'{name}.conv{i}.weight'], here), state, f'{name}.bn{i}')
    y = relu(y) if i < last else y
  if f'{name}.downsample.0.weight' in state:
    x = conv(x, state[f'{name}.downsample.0.weight'], stride)
    x = norm(x, state, f'{name}.downsample.1')
  elif stride > 1:
    x = x[:, :, ::2, ::2]
    extra = y.shape[1] - x.shape[1]
    x = np.pad(x, ((0, 0), (extra // 2, extra // 2), (0, 0), (0, 0)))
  return relu(x + y)


def resnet(state, x, blocks, cifar=False):
  x = norm(conv(x, state['conv1.weight'], 1 if cifar else 2), state, 'bn1')
  x = relu(x) if cifar else max_pool(relu(x))
  for stage, count in enumerate(blocks):
    for i in range(count):
      x = residual(x, state, f'layer{stage + 1}.{i}', 2 if stage > 0 and i == 0 else 1)
  return dense(x, state, 'linear' if cifar else 'fc')


MOBILENET = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def mobilenet_v2(state, x, tf=False):
  epsilon = 1e-3 if tf else 1e-5

  def step(x, weight, bn, stride=1, groups=1, act=True):
    kernel, padding = state[f'{weight}.weight'], None
    if tf and kernel.shape[2] == 3 and stride == 2:
      padding = (0, 1) if x.shape[2] % 2 == 0 else (1, 1)
    x = norm(conv(x, kernel, stride, padding, groups), state, bn, epsilon)
    return np.clip(x, 0, 6) if act else x

  x = step(x, 'features.0.0', 'features.0.1', 2)
  index = 1
  for expansion, _, count, stride in MOBILENET:
    for i in range(count):
      y, name, k = x, f'features.{index}.conv', 0
      if expansion > 1:
        y, k = step(y, f'{name}.0.0', f'{name}.0.1'), 1
      y = step(y, f'{name}.{k}.0', f'{name}.{k}.1', stride if i == 0 else 1, y.shape[1])
      y = step(y, f'{name}.{k + 1}', f'{name}.{k + 2}', act=False)
      x = x + y if x.shape == y.shape else y
      index += 1
  x = step(x, f'features.{index}.0', f'features.{index}.1')
  return dense(x, state, 'classifier.1')


class State(dict):
  """Collects random tensors under torchvision's names."""

  def __init__(self, seed=0):
    super().__init__()
    self.rng = np.random.default_rng(seed)

  def add_conv(self, name, out, into, size):
    weight = self.rng.normal(size=(out, into, size, size)) * np.sqrt(2 / (into * size * size))
    self[f'{name}.weight'] = weight.astype(np.float32)

  def add_norm(self, name, features):
    draw = lambda low, high: self.rng.uniform(low, high, features).astype(np.float32)
    self[f'{name}.weight'], self[f'{name}.bias'] = draw(0.5, 1.2), draw(-0.3, 0.3)
    self[f'{name}.running_mean'], self[f'{name}.running_var'] = draw(-0.3, 0.3), draw(0.5, 1.5)
    self[f'{name}.num_batches_tracked'] = np.array(7, np.int64)

  def add_dense(self, name, out, into):
    self[f'{name}.weight'] = (self.rng.normal(size=(out, into)) / np.sqrt(into)).astype(np.float32)
    self[f'{name}.bias'] = self.rng.normal(size=out).astype(np.float32)


def resnet_state(blocks, bottleneck=False, classes=1000, cifar=False, seed=0):
  state = State(seed)
  into = 16 if cifar else 64
  state.add_conv('conv1', into, 3, 3 if cifar else 7)
  state.add_norm('bn1', into)
  for stage, count in enumerate(blocks):
    width = (16 if cifar else 64) * 2**stage
    out = width * 4 if bottleneck else width
    for i in range(count):
      name = f'layer{stage + 1}.{i}'
      sizes = [(width, into, 1), (width, width, 3), (out, width, 1)]
      if not bottleneck:
        sizes = [(width, into, 3), (width, width, 3)]
      for k, size in enumerate(sizes, 1):
        state.add_conv(f'{name}.conv{k}', *size)
        state.add_norm(f'{name}.bn{k}', size[0])
      if not cifar and i == 0 and (stage > 0 or bottleneck):
        state.add_conv(f'{name}.downsample.0', out, into, 1)
        state.add_norm(f'{name}.downsample.1', out)
      into = out
  state.add_dense('linear' if cifar else 'fc', classes, into)
  return state


VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg(state, x, batch_norm):
  place = 0
  for _, count in VGG:
    for _ in range(count):
      x = (
        conv(x, state[f'features.{place}.weight']) + state[f'features.{place}.bias'][:, None, None]
      )
      x = relu(norm(x, state, f'features.{place + 1}') if batch_norm else x)
      place += 3 if batch_norm else 2
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    place += 1
  x = x.reshape(len(x), -1)
  for name in ('classifier.0', 'classifier.3', 'classifier.6'):
    x = x @ np.asarray(state[f'{name}.weight'], np.float64).T + state[f'{name}.bias']
    x = x if name == 'classifier.6' else relu(x)
  return x


def vgg_state(batch_norm, width=1.0, units=4096, side=7, classes=1000, seed=0):
  state = State(seed)
  into, place = 3, 0
  for channels, count in VGG:
    for _ in range(count):
      out = round(channels * width)
      state.add_conv(f'features.{place}', out, into, 3)
      state[f'features.{place}.bias'] = state.rng.normal(size=out).astype(np.float32)
      if batch_norm:
        state.add_norm(f'features.{place + 1}', out)
      into, place = out, place + (3 if batch_norm else 2)
    place += 1
  for i, out in ((0, units), (3, units), (6, classes)):
    state.add_dense(f'classifier.{i}', out, into * side**2 if i == 0 else units)
  return state


def mobilenet_state(classes=1000, seed=0):
  state = State(seed)
  state.add_conv('features.0.0', 32, 3, 3)
  state.add_norm('features.0.1', 32)
  into, index = 32, 1
  for expansion, out, count, _ in MOBILENET:
    for _ in range(count):
      name, hidden, k = f'features.{index}.conv', into * expansion, 0
      if expansion > 1:
        state.add_conv(f'{name}.0.0', hidden, into, 1)
        state.add_norm(f'{name}.0.1', hidden)
        k = 1
      state.add_conv(f'{name}.{k}.0', hidden, 1, 3)
      state.add_norm(f'{name}.{k}.1', hidden)
      state.add_conv(f'{name}.{k + 1}', out, hidden, 1)
      state.add_norm(f'{name}.{k + 2}', out)
      into, index = out, index + 1
  state.add_conv('features.18.0', 1280, into, 1)
  state.add_norm('features.18.1', 1280)
  state.add_dense('classifier.1', classes, 1280)
  return state
