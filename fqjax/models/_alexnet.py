"""AlexNet of BVLC: grouped convolutions and local response normalisation."""

import functools

from flax import linen as nn
import jax

from fqjax.models._network import Network, enter_image, hidden, layers, leave
from fqjax.nn import local_response_norm

_NORMAL = nn.initializers.normal
# Biases of 0.1 start the ReLUs behind them in their linear part.
_TENTH = nn.initializers.constant(0.1)


class AlexNet(Network):
  """AlexNet with the two towers of the original as groups, see `create_model`.

  60,954,656 weights, 60,965,224 parameters with 1,000 classes.

  Attributes:
    dropout: Share of the units of fc6 and fc7 dropped in training; 0.5 as published.
    units: Outputs of fc6 and of fc7.

  Source: Krizhevsky et al. 2012; BVLC Caffe, `models/bvlc_alexnet` (normalisation before pooling,
  initial values).
  """

  dropout: float = 0.0
  units: int = 4096

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, 227, 227, 3]."""
    conv, _ = layers(self)
    conv = functools.partial(conv, use_bias=True, kernel_init=_NORMAL(0.01))
    grouped = functools.partial(conv, feature_group_count=2, bias_init=_TENTH)
    pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
    x = enter_image(self, x, 227, 227, 3)
    x = nn.relu(conv(96, 11, 4, padding='VALID', name='conv1')(x))
    x = pool(local_response_norm(x))
    x = nn.relu(grouped(256, 5, name='conv2')(x))
    x = pool(local_response_norm(x))
    x = nn.relu(conv(384, 3, name='conv3')(x))
    x = nn.relu(grouped(384, 3, name='conv4')(x))
    x = pool(nn.relu(grouped(256, 3, name='conv5')(x)))
    for name in ('fc6', 'fc7'):
      init = dict(kernel_init=_NORMAL(0.005), bias_init=_TENTH)
      x = hidden(self, x, self.units, self.dropout, train, name, **init)
    return leave(self, x, 'fc8', _NORMAL(0.01))
