"""MobileNetV2: inverted residual blocks with depthwise convolutions."""

import math
from typing import Literal

from flax import linen as nn
import jax

from fqjax.models._inverted_residual import ConvNorm, InvertedResidual, round_channels
from fqjax.models._network import DctNetwork, enter, layers, leave

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
      x = ConvNorm(stem, 3, 2, conv, norm, name='features_0')(x, train)

    index = 1
    for expansion, channels, blocks, first_stride in STAGES:
      for i in range(blocks):
        features = x.shape[-1]
        hidden, groups = features * expansion, features * expansion
        # The published form for all 192 channels: the first convolution brings them down to the
        # width of the stem it replaces (32 groups of 6). Fewer channels go depthwise.
        if index == 1 and self.entry != 'rgb' and features == 192:
          hidden, groups = stem, math.gcd(features, stem)
        x = InvertedResidual(
          round_channels(channels * self.width),
          first_stride if i == 0 else 1,
          hidden,
          groups,
          expansion > 1,
          # Raw frequencies are never passed on, even where 16 of them meet 16 outputs.
          residual=index > 1 or self.entry == 'rgb',
          conv=conv,
          norm=norm,
          show=index == 1,
          name=f'features_{index}',
        )(x, train)
        index += 1
    last = round_channels(1280 * max(1.0, self.width))
    x = ConvNorm(last, 1, 1, conv, norm, name=f'features_{index}')(x, train)
    return leave(self, x, 'classifier', nn.initializers.normal(0.01))
