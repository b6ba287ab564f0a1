"""VGG-16 for ImageNet and for CIFAR, VGG-small."""

from flax import linen as nn
import jax

from fqjax.models._network import Network, enter_image, enter_rgb, hidden, layers, leave
from fqjax.models._resnet import FC_INIT
from fqjax.nn import max_pool

# Channels and 3x3 convolutions of each stage; a 2x2 max pool follows it.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

_NORMAL = nn.initializers.normal(0.01)


class VGG(Network):
  """VGG-16 of torchvision's layout, see `create_model`.

  Attributes:
    batch_norm: Behind every convolution (torchvision's `vgg16_bn`).
    dropout: Share of the units of fc6 and fc7 dropped in training; 0.5 as published.
    units: Outputs of fc6 and of fc7.
    width: Multiplies the channels of the convolutions.
    image_size: Height and width of the images, at least 32.

  Source: arXiv 1409.1556, configuration D.
  """

  batch_norm: bool = False
  dropout: float = 0.0
  units: int = 4096
  width: float = 1.0
  image_size: int = 224

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, image_size, image_size, 3]."""
    x = enter_image(self, x, self.image_size, self.image_size, 3)
    # With its norm a convolution has a bias too, which does nothing, because the weights have one.
    x = _convolutions(self, x, train, self.width, self.batch_norm, bias=True)
    for name in ('fc6', 'fc7'):
      x = hidden(self, x, self.units, self.dropout, train, name, kernel_init=_NORMAL)
    return leave(self, x, 'fc8', _NORMAL)


class CifarVGG(Network):
  """The 13 convolutions of VGG-16, each with a batch norm, and one dense layer.

  Attributes:
    width: Multiplies all channels.

  Source: arXiv 1409.1556, as pruning papers use it for CIFAR (14,710,464 convolution weights).
  """

  num_classes: int = 10
  width: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, h, w, 3], h and w at least 32."""
    x = _convolutions(self, enter_rgb(self, x), train, self.width, batch_norm=True, bias=False)
    return leave(self, x, 'fc', FC_INIT)


class VGGSmall(Network):
  """Six convolutions, each with a batch norm, and one dense layer of the flattened map.

  607,600,640 multiply-accumulates, 4,660,106 parameters with 10 classes.

  Attributes:
    width: Multiplies all channels.

  Source: LQ-Nets (arXiv 1807.10029), `cifar10-vgg-small.py` of github.com/microsoft/LQ-Nets.
  """

  num_classes: int = 10
  width: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, 32, 32, 3]."""
    conv, norm = layers(self)
    x = enter_image(self, x, 32, 32, 3)
    for stage, channels in enumerate((128, 256, 512), 1):
      features = max(1, round(channels * self.width))
      x = conv(features, 3, name=f'conv{stage}_1')(x)
      x = nn.relu(norm(name=f'bn{stage}_1')(x, train))
      # Pooled before the norm, as published: a norm of negative scale would pass on the smallest.
      x = max_pool(conv(features, 3, name=f'conv{stage}_2')(x))
      x = nn.relu(norm(name=f'bn{stage}_2')(x, train))
    return leave(self, x.reshape(x.shape[0], -1), 'fc', _NORMAL)


def _convolutions(
  net: Network, x: jax.Array, train: bool, width: float, batch_norm: bool, bias: bool
) -> jax.Array:
  conv, norm = layers(net)
  for stage, (channels, count) in enumerate(STAGES, 1):
    features = max(1, round(channels * width))
    for i in range(1, count + 1):
      x = conv(features, 3, use_bias=bias, name=f'conv{stage}_{i}')(x)
      if batch_norm:
        x = norm(name=f'bn{stage}_{i}')(x, train)
      x = nn.relu(x)
    x = max_pool(x)
  return x
