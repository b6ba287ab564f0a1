"""The learned choice of input channels: a Gumbel-softmax gate per channel."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from fqjax.nn._batch_norm import BatchNorm


def gumbel_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws Gumbel noise, float32 of `shape`, finite also where the uniform number is 0 or near 1.

  Example:
    >>> gumbel_noise(jax.random.key(0), (4, 24, 2)).shape
    (4, 24, 2)

  Source: -log(1e-10 - log(u + 1e-10)), the public code of arXiv 2002.12416.
  """
  return _gumbel_from_uniform(jax.random.uniform(key, shape, jnp.float32))


def _gumbel_from_uniform(u: jax.Array) -> jax.Array:
  return -jnp.log(1e-10 - jnp.log(u + 1e-10))


def gumbel_gate(
  logits: jax.Array, noise: jax.Array | None = None, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
  """Opens or closes each channel: hard 0/1 forward, gradient of the soft sample backward.

  Args:
    logits: [..., c, 2]; index 0 is off, 1 is on.
    noise: Gumbel noise of the same shape, or None for the deterministic `on > off`.
    temperature: Of the soft sample; the forward value does not depend on it.

  Returns:
    [..., c] of exactly 0 or 1 in the type of `logits`.

  Example:
    >>> print(gumbel_gate(jnp.array([[0.1, 2.0], [1.0, -1.0]])))
    [1. 0.]

  Source: arXiv 2002.12416; straight-through Gumbel-softmax of arXiv 1611.01144.
  """
  if noise is not None:
    logits = logits + noise
  # A softmax over two entries is the sigmoid of their difference.
  margin = logits[..., 1] - logits[..., 0]
  soft = jax.nn.sigmoid(margin / temperature)
  hard = (margin > 0).astype(soft.dtype)
  # In this order the forward value is exactly 0 or 1: soft - soft is 0 without rounding.
  return hard + (soft - jax.lax.stop_gradient(soft))


def gate_penalty(on: jax.Array, lam: float | jax.Array) -> jax.Array:
  """Cost of open channels: `lam` times their number per image, averaged over the batch.

  This is the paper's sum over channels. The public code averages over channels instead; its
  `ratio` is `lam * c` (192 channels: ratio 1.0 is lam = 1/192).

  Args:
    on: [n, c] gate activations, float.
    lam: Price of one open channel.

  Returns:
    Scalar of the type of `on`.

  Example:
    >>> print(gate_penalty(jnp.array([[1.0, 1.0], [1.0, 0.0]]), 0.5))
    0.75

  Source: arXiv 2002.12416, L = L_task + lambda sum_c gate_c.
  """
  return lam * jnp.mean(jnp.sum(on, axis=-1))


class ChannelGate(nn.Module):
  """Multiplies each channel of `x` [n, h, w, c] by a learned 0 or 1.

  Squeeze (mean over the map), dense c -> c, batch norm, ReLU, then two logits per channel
  (a grouped 1x1 convolution: one factor and one bias per logit). In training the choice is
  sampled (rng stream `gate`); in evaluation it is `on > off`, so that results repeat. At the
  start a channel is open with probability sigmoid(2.0 - 0.1) = 0.87.

  How much noise the sampling adds can change while training: a scalar given as
  `variables['gate_noise'][name]['scale']` multiplies it (0 chooses as evaluation does). Without it
  the noise is that of the paper.

  The choice, float32 [n, c], is kept as `variables['gates'][name]['on']` whenever the
  collection `gates` is mutable.

  Attributes:
    global_logits: Logits are free parameters, not computed from the image: cheaper, and less
      noisy where only one static subset is wanted.
    sample_at_eval: Sample in evaluation too, as the public code of the paper does.
    temperature: Of the soft sample whose gradient is used.
    norm_groups: `groups` of the batch norm.
    norm_momentum: `momentum` of the batch norm.

  Example:
    >>> gate, x = ChannelGate(), jnp.ones((2, 4, 4, 24))
    >>> variables = gate.init(jax.random.key(0), x)
    >>> y, state = gate.apply(variables, x, mutable=['gates'])
    >>> print(y.shape, state['gates']['on'].mean())
    (2, 4, 4, 24) 1.0

  Source: arXiv 2002.12416 and its public code.
  """

  global_logits: bool = False
  sample_at_eval: bool = False
  temperature: float = 1.0
  norm_groups: int = 1
  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns the gated `x`, same shape and type."""
    n, c = x.shape[0], x.shape[-1]
    bias = self.param('logit_bias', _logit_bias, (c, 2))
    if self.global_logits:
      logits = jnp.broadcast_to(bias[None], (n, c, 2))
    else:
      hidden = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
      he_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
      hidden = nn.Dense(c, kernel_init=he_normal, name='squeeze')(hidden)
      norm = BatchNorm(groups=self.norm_groups, momentum=self.norm_momentum, name='bn')
      hidden = nn.relu(norm(hidden, train))
      scale = self.param('logit_scale', nn.initializers.normal(0.001), (c, 2))
      logits = hidden[:, :, None] * scale[None] + bias[None]
    noise = None
    if (train or self.sample_at_eval) and not self.is_initializing():
      noise = gumbel_noise(self.make_rng('gate'), logits.shape)
      if self.has_variable('gate_noise', 'scale'):
        noise *= self.get_variable('gate_noise', 'scale')
    on = gumbel_gate(logits, noise, temperature=self.temperature)
    # `init` makes every collection mutable; the choice is no part of the variables it returns.
    if not self.is_initializing():
      self.sow('gates', 'on', on, init_fn=lambda: on, reduce_fn=lambda _, new: new)
    return x * on[:, None, None, :].astype(x.dtype)


def _logit_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.broadcast_to(jnp.array([[0.1, 2.0]], jnp.float32), shape)
