"""Networks of inverted residuals that a search found: MnasNet-A1 and ProxylessNAS-Mobile."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from flax import linen as nn
import jax

from fqjax.models._inverted_residual import ConvNorm, InvertedResidual, relu6, round_channels
from fqjax.models._network import Network, enter_rgb, layers, leave
from fqjax.models._resnet import FC_INIT


class Stage(NamedTuple):
  """Equal blocks one after the other.

  Attributes:
    size: Side of the depthwise kernels.
    expansion: Channels between expansion and projection, as a multiple of the block's input's.
    channels: Outputs of every block.
    blocks: How many.
    stride: Of the first block.
    squeeze: Squeeze and excite, through a quarter of the channels of the block's input.
  """

  size: int
  expansion: int
  channels: int
  blocks: int
  stride: int
  squeeze: bool = False


MNASNET_A1 = (
  Stage(3, 1, 16, 1, 1),
  Stage(3, 6, 24, 2, 2),
  Stage(5, 3, 40, 3, 2, squeeze=True),
  Stage(3, 6, 80, 4, 2),
  Stage(3, 6, 112, 2, 1, squeeze=True),
  Stage(5, 6, 160, 3, 2, squeeze=True),
  Stage(3, 6, 320, 1, 1),
)

PROXYLESS_MOBILE = (
  Stage(3, 1, 16, 1, 1),
  Stage(5, 3, 32, 1, 2),
  Stage(3, 3, 32, 1, 1),
  Stage(7, 3, 40, 1, 2),
  Stage(3, 3, 40, 1, 1),
  Stage(5, 3, 40, 2, 1),
  Stage(7, 6, 80, 1, 2),
  Stage(5, 3, 80, 3, 1),
  Stage(5, 6, 96, 1, 1),
  Stage(5, 3, 96, 3, 1),
  Stage(7, 6, 192, 2, 2),
  Stage(7, 3, 192, 2, 1),
  Stage(7, 6, 320, 1, 1),
)


class MnasNet(Network):
  """MnasNet-A1, see `create_model`; 3,887,038 parameters with 1,000 classes.

  Not the MnasNet of torchvision, which is B1: other blocks, no squeeze and excite.

  Attributes:
    width: Multiplies all channels but the 1,280 of the head, rounded to multiples of 8.
    convention: 'torch': symmetric padding, norm epsilon 1e-5; 'tf': 'SAME' padding, 1e-3, as
      published. Weights belong to one of the two.
    stages: The blocks.

  Source: arXiv 1807.11626, figure 7; what the figure leaves open (1,280 features, width of the
  gates, no shortcut in the first block, initial values) from the authors' `mnasnet_models.py` and
  `mnasnet_model.py` in github.com/tensorflow/tpu.
  """

  width: float = 1.0
  convention: Literal['torch', 'tf'] = 'torch'
  stages: tuple[Stage, ...] = MNASNET_A1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, 3], h and w at least 32."""
    tf = self.convention == 'tf'
    conv, norm = layers(self, epsilon=1e-3 if tf else 1e-5, same=tf)
    x = _features(self.stages, enter_rgb(self, x), train, conv, norm, nn.relu, self.width)
    # Uniform within 1 / sqrt(classes): over the outputs, as the convolutions.
    init = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')
    return leave(self, x, 'classifier', init)


class ProxylessNas(Network):
  """ProxylessNAS-Mobile, see `create_model`; 4,080,512 parameters with 1,000 classes.

  Symmetric padding, norm epsilon 1e-3. The two blocks the search left empty are not here.

  Attributes:
    stages: The blocks.

  Source: arXiv 1812.00332; kernel sizes and expansions of the released `proxyless_mobile.config`
  (github.com/mit-han-lab/proxylessnas).
  """

  stages: tuple[Stage, ...] = PROXYLESS_MOBILE

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, 3], h and w at least 32."""
    conv, norm = layers(self, epsilon=1e-3)
    x = _features(self.stages, enter_rgb(self, x), train, conv, norm, relu6)
    return leave(self, x, 'classifier', FC_INIT)


def _features(
  stages: tuple[Stage, ...],
  x: jax.Array,
  train: bool,
  conv: Callable,
  norm: Callable,
  act: Callable,
  width: float = 1.0,
) -> jax.Array:
  """Stem, blocks and head: images [n, h, w, 3] to a map [n, h / 32, w / 32, 1280]."""
  x = ConvNorm(round_channels(32 * width), 3, 2, conv, norm, act, name='stem')(x, train)
  index = 0
  for stage in stages:
    for i in range(stage.blocks):
      features = x.shape[-1]
      x = InvertedResidual(
        round_channels(stage.channels * width),
        stage.stride if i == 0 else 1,
        hidden=features * stage.expansion,
        groups=features * stage.expansion,
        expand=stage.expansion > 1,
        # A narrow stem has as many channels as the first block and is no shortcut even so.
        residual=index > 0,
        conv=conv,
        norm=norm,
        size=stage.size,
        act=act,
        squeeze=features // 4 if stage.squeeze else 0,
        name=f'block_{index}',
      )(x, train)
      index += 1
  return ConvNorm(1280, 1, 1, conv, norm, act, name='head')(x, train)
