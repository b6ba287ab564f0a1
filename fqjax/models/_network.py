"""What our networks share: common options, the way in and the way out."""

from collections.abc import Callable
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from fqjax.nn import BatchNorm, ChannelGate
from fqjax.nn._batch_norm import at_least_float32

# Normal, not truncated normal, and over the outputs: as the published networks start.
HE_NORMAL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Network(nn.Module):
  """Options common to all networks; made by `create_model`, see there.

  Attributes:
    num_classes: Number of logits.
    dtype: Type of the computation. Parameters, batch norm, pooling and logits are float32.
    norm_groups: Parts of the batch with batch statistics of their own.
    norm_momentum: Share of the running batch statistics kept at each step.
  """

  num_classes: int = 1000
  dtype: Any = jnp.float32
  norm_groups: int = 1
  norm_momentum: float = 0.9


class DctNetwork(Network):
  """A network whose stem DCT maps can replace.

  Attributes:
    entry: What the network receives: 'rgb' images into the usual stem, 'dct' maps that replace
      the stem, or 'patchify': RGB images through one `block` x `block` / `block` convolution.
    channels: Number of DCT channels, or of patchify outputs; of no effect for 'rgb'.
    block: Side of the patchify convolution.
    gate: Learned choice of the DCT channels (`fqjax.nn.ChannelGate`); 'global' for logits that
      do not depend on the image.
    gate_sample_at_eval: Sample the gate in evaluation too, as the public code does.
  """

  entry: Literal['rgb', 'dct', 'patchify'] = 'rgb'
  channels: int = 24
  block: int = 8
  gate: bool | Literal['global'] = False
  gate_sample_at_eval: bool = False


def layers(net: Network, epsilon: float = 1e-5, same: bool = False) -> tuple[Callable, Callable]:
  """Returns `conv(features, size, stride=1, ...)` and `norm(...)` with the options of `net`.

  Args:
    net: The network the layers are for.
    epsilon: Of the batch norm.
    same: TensorFlow's 'SAME' padding; otherwise size // 2 zeros on every side.
  """

  def conv(features: int, size: int, stride: int = 1, **kwargs) -> nn.Conv:
    options: dict[str, Any] = {
      'padding': 'SAME' if same else size // 2,
      'use_bias': False,
      'dtype': net.dtype,
      'kernel_init': HE_NORMAL,
    }
    return nn.Conv(features, (size, size), stride, **(options | kwargs))

  norm = functools.partial(
    BatchNorm,
    momentum=net.norm_momentum,
    epsilon=epsilon,
    groups=net.norm_groups,
    dtype=net.dtype,
  )
  return conv, norm


def enter(net: DctNetwork, x: jax.Array, train: bool, conv: Callable, norm: Callable) -> jax.Array:
  """Checks the input, gates or patchifies it; for 'rgb' only casts it."""
  expected = net.channels if net.entry == 'dct' else 3
  if x.ndim != 4 or x.shape[-1] != expected:
    kind = {'dct': 'DCT maps', 'rgb': 'RGB images', 'patchify': 'full-size RGB images'}[net.entry]
    advice = (
      f'Make the model with channels={x.shape[-1]}, or select {expected} channels first.'
      if net.entry == 'dct' and x.ndim == 4
      else 'Axes are batch, height, width, channels; DCT maps need the `_dct` model.'
    )
    raise ValueError(
      f'this network takes {kind} of {expected} channels [n, h, w, {expected}], '
      f'got x: {list(x.shape)}.\n  {advice}'
    )
  if net.entry == 'dct' and net.gate:
    x = ChannelGate(
      global_logits=net.gate == 'global',
      sample_at_eval=net.gate_sample_at_eval,
      norm_groups=net.norm_groups,
      norm_momentum=net.norm_momentum,
      name='gate',
    )(x, train)
  x = x.astype(net.dtype)
  if net.entry == 'patchify':
    if x.shape[1] % net.block or x.shape[2] % net.block:
      raise ValueError(
        f'patchify with block={net.block} needs height and width divisible by {net.block}, '
        f'got x: {list(x.shape)}.\n  Crop or pad first.'
      )
    # Convolution and norm without a ReLU: the learned counterpart of what the DCT model gets,
    # an orthonormal linear map of each block with every channel normalised. A ReLU would drop
    # the sign of each coefficient here only, and the comparison would no longer be fair.
    x = conv(net.channels, net.block, net.block, padding='VALID', name='conv1')(x)
    x = norm(name='bn1')(x, train)
  return x


def enter_image(net: Network, x: jax.Array, *shape: int) -> jax.Array:
  """Checks images of the one size [height, width, channels] dense layers allow, and casts them."""
  if x.ndim != 4 or x.shape[1:] != shape:
    wanted = ', '.join(map(str, shape))
    grey = f' Grey images stored as RGB: x[..., :{shape[2]}].' if shape[2] == 1 else ''
    raise ValueError(
      f'this network takes images [n, {wanted}], got x: {list(x.shape)}.\n  Its dense layers fix '
      f'the size: crop, pad or resize first.{grey}'
    )
  return x.astype(net.dtype)


def enter_rgb(net: Network, x: jax.Array) -> jax.Array:
  """Checks RGB images for a network that halves them five times, and casts them."""
  if x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < 32:
    raise ValueError(
      f'this network takes RGB images [n, h, w, 3] of at least 32 x 32, got x: {list(x.shape)}.\n'
      '  It halves them five times: resize smaller ones first.'
    )
  return x.astype(net.dtype)


def hidden(
  net: Network, x: jax.Array, features: int, dropout: float, train: bool, name: str, **init: Any
) -> jax.Array:
  """Dense layer of a map or a vector, ReLU, dropout; maps by row, column and channel."""
  x = nn.Dense(features, dtype=net.dtype, name=name, **init)(x.reshape(x.shape[0], -1))
  return nn.Dropout(dropout, deterministic=not train, name=f'{name}_dropout')(nn.relu(x))


def leave(net: Network, x: jax.Array, name: str, kernel_init: Callable) -> jax.Array:
  """Averages a map, if it is one, and classifies, in float32 at least."""
  dtype = at_least_float32(net.dtype)
  x = x.astype(dtype)
  if x.ndim == 4:
    x = jnp.mean(x, axis=(1, 2))
  return nn.Dense(net.num_classes, dtype=dtype, kernel_init=kernel_init, name=name)(x)


def keep_features(module: nn.Module, x: jax.Array) -> None:
  """Shows the map on which an RGB and a DCT network are fitted to each other."""
  if not module.is_initializing():
    module.sow('features', 'entry', x, init_fn=lambda: x, reduce_fn=lambda _, new: new)
