"""What mobile networks are made of: convolution with norm, inverted residual, squeeze and excite."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from fqjax.models._network import keep_features
from fqjax.nn._batch_norm import at_least_float32


def round_channels(value: float) -> int:
  """Rounds to the nearest multiple of 8, at least 8, never down by more than a tenth."""
  rounded = max(8, int(value + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * value else rounded


def relu6(x: jax.Array) -> jax.Array:
  """Returns min(max(x, 0), 6)."""
  return jnp.minimum(jnp.maximum(x, 0), 6)


class ConvNorm(nn.Module):
  """Convolution, batch norm, activation."""

  features: int
  size: int
  stride: int
  conv: Callable
  norm: Callable
  act: Callable = relu6

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.conv(self.features, self.size, self.stride, name='conv')(x)
    return self.act(self.norm(name='bn')(x, train))


class InvertedResidual(nn.Module):
  """1x1 expansion (if any), depthwise, squeeze and excite (if any), linear 1x1 projection.

  Attributes:
    features: Channels of the result.
    stride: Of the depthwise convolution.
    hidden: Channels between expansion and projection.
    groups: Of the depthwise convolution; `hidden` as a rule.
    expand: Whether there is an expansion.
    residual: Add the input where its shape is that of the result.
    conv: Makes convolutions, see `layers`.
    norm: Makes batch norms.
    size: Side of the depthwise kernels.
    act: Activation behind expansion and depthwise convolution.
    squeeze: Channels the gate of squeeze and excite is worked out in; 0 for none.
    show: Keep the map in front of the projection, see `keep_features`.
  """

  features: int
  stride: int
  hidden: int
  groups: int
  expand: bool
  residual: bool
  conv: Callable
  norm: Callable
  size: int = 3
  act: Callable = relu6
  squeeze: int = 0
  show: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = x
    if self.expand:
      y = self.conv(self.hidden, 1, name='expand')(y)
      y = self.act(self.norm(name='expand_bn')(y, train))
    options = dict(feature_group_count=self.groups, name='depthwise')
    y = self.conv(self.hidden, self.size, self.stride, **options)(y)
    y = self.act(self.norm(name='depthwise_bn')(y, train))
    if self.squeeze:
      y = y * self._gate(y)
    if self.show:
      keep_features(self, y)
    y = self.conv(self.features, 1, name='project')(y)
    y = self.norm(name='project_bn')(y, train)
    return x + y if self.residual and x.shape == y.shape else y

  def _gate(self, y: jax.Array) -> jax.Array:
    """Returns a factor in 0..1 [n, 1, 1, c] for every channel of `y` (arXiv 1709.01507)."""
    mean = jnp.mean(y.astype(at_least_float32(y.dtype)), (1, 2), keepdims=True)
    reduced = nn.relu(self.conv(self.squeeze, 1, use_bias=True, name='se_reduce')(mean))
    return nn.sigmoid(self.conv(y.shape[-1], 1, use_bias=True, name='se_expand')(reduced))
