"""LeNet-5 of Caffe."""

from flax import linen as nn
import jax

from fqjax.models._network import Network, enter_image, hidden, layers, leave
from fqjax.nn import max_pool

# Uniform with variance 1 / inputs, Caffe's 'xavier'.
_XAVIER = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')


class LeNet5(Network):
  """LeNet-5 as Caffe has it and pruning papers count it, see `create_model`.

  Two 5x5 convolutions without a nonlinearity but their max pooling, 800-500-10 dense layers; 430,500
  weights, 431,080 parameters.

  Attributes:
    dropout: Share of the 500 hidden units dropped in training.

  Source: BVLC Caffe, `examples/mnist/lenet.prototxt`; arXiv 1804.03294.
  """

  num_classes: int = 10
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, num_classes] float32 of `x` [n, 28, 28, 1]."""
    conv, _ = layers(self)
    options = dict(padding='VALID', use_bias=True, kernel_init=_XAVIER)
    x = enter_image(self, x, 28, 28, 1)
    x = max_pool(conv(20, 5, name='conv1', **options)(x))
    x = max_pool(conv(50, 5, name='conv2', **options)(x))
    x = hidden(self, x, 500, self.dropout, train, 'fc1', kernel_init=_XAVIER)
    return leave(self, x, 'fc2', _XAVIER)
