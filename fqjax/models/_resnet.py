"""Residual networks: ResNet-18/34/50/101 for ImageNet, ResNet-18/20/32/56 for CIFAR."""

from collections.abc import Callable
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from fqjax.models._network import DctNetwork, enter, keep_features, layers, leave

# Uniform within 1 / sqrt(inputs), as the published networks start.
FC_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

Shortcut = Literal['identity', 'projection', 'pad']


class ResNet(DctNetwork):
  """ResNet of torchvision's layout (stride on the 3x3), see `create_model`.

  Attributes:
    stages: Blocks per stage.
    bottleneck: 1x1, 3x3, 1x1 blocks instead of two 3x3.
    stage2_stride: Stride of the second stage: 2, or 1 as in the paper's public code (which takes
      a 56 x 56 map through 56-56-28-14 and costs 3.3 times as much).
    zero_init_residual: Start the last norm of every block at scale 0.
    width: Multiplies the 64, 128, 256, 512 channels of the stages.
    cifar_stem: RGB enters through a 3x3 convolution of stride 1 without pooling, as 32 x 32 images
      need it, instead of 7x7 of stride 2 and a max pool.

  Source: arXiv 1512.03385; for DCT input arXiv 2002.12416.
  """

  stages: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  stage2_stride: int = 2
  zero_init_residual: bool = False
  width: float = 1.0
  cifar_stem: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, c]."""
    conv, norm = layers(self)
    widths = [max(1, round(64 * 2**stage * self.width)) for stage in range(len(self.stages))]
    x = enter(self, x, train, conv, norm)
    if self.entry == 'rgb':
      size, stride = (3, 1) if self.cifar_stem else (7, 2)
      x = conv(widths[0], size, stride, name='conv1')(x)
      x = nn.relu(norm(name='bn1')(x, train))
      if not self.cifar_stem:
        pad: Any = ((1, 1), (1, 1))  # Flax annotates strings only.
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)
    keep_features(self, x)

    block = _Bottleneck if self.bottleneck else _BasicBlock
    expansion = 4 if self.bottleneck else 1
    # DCT maps meet a projection in the first block even where their channels happen to be as
    # many as its outputs: a frequency is no feature to be passed on as it is.
    features = widths[0] if self.entry == 'rgb' else None
    for stage, (blocks, width) in enumerate(zip(self.stages, widths, strict=True)):
      for i in range(blocks):
        stride = (1, self.stage2_stride, 2, 2)[stage] if i == 0 else 1
        same = features == width * expansion and stride == 1
        x = block(
          width,
          stride,
          'identity' if same else 'projection',
          conv,
          norm,
          self.zero_init_residual,
          name=f'layer{stage + 1}_{i}',
        )(x, train)
        features = width * expansion
    return leave(self, x, 'fc', FC_INIT)


class CifarResNet(DctNetwork):
  """ResNet-20/32/56 for 32 x 32 images, see `create_model`.

  Where a stage begins with stride 2 the shortcut takes every second pixel and pads the new
  channels with zeros, half in front and half behind. A DCT map replaces the stem and enters the
  first stage at stride 1.

  Attributes:
    blocks: Blocks in each of the three stages.
    width: Multiplies the 16, 32, 64 channels of the stages.
    stem_stride: Stride of the RGB stem; 2 or 4 lets an image of half or a quarter of the size
      of the DCT model's enter the first stage at the same size. Beyond 2 the stem's kernel grows
      from 3 to 2 * stride - 1 so that it sees every pixel.
    zero_init_residual: Start the last norm of every block at scale 0.

  Source: arXiv 1512.03385, section 4.2, shortcut A.
  """

  blocks: int = 3
  width: float = 1.0
  stem_stride: int = 1
  zero_init_residual: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, c]."""
    conv, norm = layers(self)
    widths = [max(1, round(base * self.width)) for base in (16, 32, 64)]
    x = enter(self, x, train, conv, norm)
    if self.entry == 'rgb':
      size = max(3, 2 * self.stem_stride - 1)
      x = conv(widths[0], size, self.stem_stride, name='conv1')(x)
      x = nn.relu(norm(name='bn1')(x, train))
    keep_features(self, x)

    for stage, width in enumerate(widths):
      for i in range(self.blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        shortcut: Shortcut = 'identity'
        if stage == 0 and i == 0 and self.entry != 'rgb':
          shortcut = 'projection'
        elif stride > 1:
          shortcut = 'pad'
        x = _BasicBlock(
          width,
          stride,
          shortcut,
          conv,
          norm,
          self.zero_init_residual,
          name=f'layer{stage + 1}_{i}',
        )(x, train)
    return leave(self, x, 'fc', FC_INIT)


class _Block(nn.Module):
  """Fields of both kinds of block."""

  width: int
  stride: int
  shortcut: Shortcut
  conv: Callable
  norm: Callable
  zero_init: bool

  def last_norm(self, name: str) -> Callable:
    init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.ones_init()
    return self.norm(scale_init=init, name=name)


class _BasicBlock(_Block):
  """Two 3x3 convolutions and a shortcut."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = self.conv(self.width, 3, self.stride, name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y, train))
    y = self.conv(self.width, 3, name='conv2')(y)
    y = self.last_norm('bn2')(y, train)
    return nn.relu(y + _shortcut(self, x, self.width, train))


class _Bottleneck(_Block):
  """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = self.conv(self.width, 1, name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y, train))
    y = self.conv(self.width, 3, self.stride, name='conv2')(y)
    y = nn.relu(self.norm(name='bn2')(y, train))
    y = self.conv(4 * self.width, 1, name='conv3')(y)
    y = self.last_norm('bn3')(y, train)
    return nn.relu(y + _shortcut(self, x, 4 * self.width, train))


def _shortcut(block: _Block, x: jax.Array, features: int, train: bool) -> jax.Array:
  if block.shortcut == 'projection':
    x = block.conv(features, 1, block.stride, name='downsample_conv')(x)
    return block.norm(name='downsample_bn')(x, train)
  if block.shortcut == 'pad':
    x = x[:, :: block.stride, :: block.stride]
    new = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
  return x
