"""MobileNetV2: inverted residual blocks with depthwise convolutions."""

from collections.abc import Callable
import math
from typing import Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from fqjax.models._network import DctNetwork, enter, keep_features, layers, leave

# Expansion, channels, blocks, stride of the first block.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


class MobileNetV2(DctNetwork):
  """MobileNetV2, see `create_model`; modules are numbered as in torchvision's `features`.

  Attributes:
    width: Multiplies all channels, rounded to multiples of 8.
    convention: 'torch': symmetric padding, norm epsilon 1e-5; 'tf': 'SAME' padding, 1e-3. Weights
      belong to one of the two.

  Source: arXiv 1801.04381; for DCT input arXiv 2002.12416.
  """

  width: float = 1.0
  convention: Literal['torch', 'tf'] = 'torch'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, c]."""
    tf = self.convention == 'tf'
    conv, norm = layers(self, epsilon=1e-3 if tf else 1e-5, same=tf)
    x = enter(self, x, train, conv, norm)
    stem = round_channels(32 * self.width)
    if self.entry == 'rgb':
      x = _ConvNorm(stem, 3, 2, conv, norm, name='features_0')(x, train)

    index = 1
    for expansion, channels, blocks, first_stride in STAGES:
      for i in range(blocks):
        features = x.shape[-1]
        hidden, groups = features * expansion, features * expansion
        # The published form for all 192 channels: the first convolution brings them down to the
        # width of the stem it replaces (32 groups of 6). Fewer channels go depthwise.
        if index == 1 and self.entry != 'rgb' and features == 192:
          hidden, groups = stem, math.gcd(features, stem)
        x = _InvertedResidual(
          round_channels(channels * self.width),
          first_stride if i == 0 else 1,
          hidden,
          groups,
          expansion > 1,
          # Raw frequencies are never passed on, even where 16 of them meet 16 outputs.
          residual=index > 1 or self.entry == 'rgb',
          show=index == 1,
          conv=conv,
          norm=norm,
          name=f'features_{index}',
        )(x, train)
        index += 1
    last = round_channels(1280 * max(1.0, self.width))
    x = _ConvNorm(last, 1, 1, conv, norm, name=f'features_{index}')(x, train)
    return leave(self, x, 'classifier', nn.initializers.normal(0.01))


def round_channels(value: float) -> int:
  """Rounds to the nearest multiple of 8, at least 8, never down by more than a tenth."""
  rounded = max(8, int(value + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * value else rounded


def _relu6(x: jax.Array) -> jax.Array:
  return jnp.minimum(jnp.maximum(x, 0), 6)


class _ConvNorm(nn.Module):
  """Convolution, batch norm, ReLU6."""

  features: int
  size: int
  stride: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.conv(self.features, self.size, self.stride, name='conv')(x)
    return _relu6(self.norm(name='bn')(x, train))


class _InvertedResidual(nn.Module):
  """1x1 expansion (if any), 3x3 depthwise, linear 1x1 projection."""

  features: int
  stride: int
  hidden: int
  groups: int
  expand: bool
  residual: bool
  show: bool
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = x
    if self.expand:
      y = self.conv(self.hidden, 1, name='expand')(y)
      y = _relu6(self.norm(name='expand_bn')(y, train))
    y = self.conv(self.hidden, 3, self.stride, feature_group_count=self.groups, name='depthwise')(y)
    y = _relu6(self.norm(name='depthwise_bn')(y, train))
    if self.show:
      keep_features(self, y)
    y = self.conv(self.features, 1, name='project')(y)
    y = self.norm(name='project_bn')(y, train)
    return x + y if self.residual and x.shape == y.shape else y
