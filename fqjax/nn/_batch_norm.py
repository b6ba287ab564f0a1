"""Batch normalisation with statistics of the whole batch or of groups of it."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
  """Normalises the last axis; params `scale`, `bias`, batch_stats `mean`, `var`, all float32.

  Called on `x` [n, ..., c] with `train=False` it uses the running statistics, with `train=True`
  those of the batch, and moves the running ones (make `batch_stats` mutable). Under jit on a
  sharded batch, statistics are those of the whole batch on all devices. `groups=g` normalises
  each of `g` equal, consecutive parts by itself, as published recipes with one part per device
  do; with as many groups as devices, normalising needs no communication. The running average
  then follows the mean over the groups.

  Arithmetic is float32 (float64 for float64 input) whatever the input type. The variance is the
  biased one, in the running average too.

  Attributes:
    momentum: Share of the running average kept at each step (PyTorch's is 1 - this).
    epsilon: Added to the variance.
    groups: Number of parts of the batch with statistics of their own.
    dtype: Type of the result; that of `x` if None.
    scale_init: Initialiser of `scale`; zeros for the last norm of a residual block if wanted.

  Raises:
    ValueError: The batch cannot be split into `groups` equal parts.

  Example:
    >>> norm = BatchNorm()
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, _ = norm.apply(variables, x, train=True, mutable=['batch_stats'])
    >>> print(y.round(3)[:, 0])
    [-1.  1.]

  Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  groups: int = 1
  dtype: Any = None
  scale_init: Callable[..., jax.Array] = nn.initializers.ones_init()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns the normalised `x`, same shape."""
    features = x.shape[-1]
    scale = self.param('scale', self.scale_init, (features,), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros_init(), (features,), jnp.float32)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (features,), jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (features,), jnp.float32)

    out_dtype = self.dtype or x.dtype
    work_dtype = at_least_float32(x.dtype)
    x, shape = x.astype(work_dtype), x.shape
    mean, var = running_mean.value, running_var.value
    scale, bias, mean, var = (v.astype(work_dtype) for v in (scale, bias, mean, var))
    # Initialising must neither need nor change batch statistics.
    if train and not self.is_initializing():
      x = _split(x, self.groups)
      mean, var = _moments(x, shift=mean)
      keep = self.momentum
      running_mean.value = keep * running_mean.value + (1 - keep) * _average(mean)
      running_var.value = keep * running_var.value + (1 - keep) * _average(var)
    else:
      mean, var = _channels_last(mean, x.ndim), _channels_last(var, x.ndim)
    factor = jax.lax.rsqrt(var + self.epsilon) * _channels_last(scale, x.ndim)
    y = (x - mean) * factor + _channels_last(bias, x.ndim)
    return y.reshape(shape).astype(out_dtype)


def at_least_float32(dtype: Any) -> Any:
  """Returns float64 for float64, else float32 (`promote_types` refuses under strict promotion)."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _channels_last(v: jax.Array, ndim: int) -> jax.Array:
  return v.reshape((1,) * (ndim - 1) + v.shape)


def _split(x: jax.Array, groups: int) -> jax.Array:
  if x.shape[0] % groups:
    raise ValueError(
      f'BatchNorm(groups={groups}) needs a batch that divides into {groups} equal parts, '
      f'got x: {list(x.shape)}.\n  Choose a batch size divisible by {groups}, or fewer groups.'
    )
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _moments(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of [groups, n, ..., c] per group, [groups, 1, ..., c] each."""
  axes = tuple(range(1, x.ndim - 1))
  # Both sums in one pass over x (one collective); taking them around the running mean avoids the
  # cancellation that E[x^2] - E[x]^2 suffers where the mean is large beside the deviation.
  shift = jax.lax.stop_gradient(_channels_last(shift, x.ndim))
  centred = x - shift
  mean = jnp.mean(centred, axes, keepdims=True)
  var = jnp.mean(jnp.square(centred), axes, keepdims=True) - jnp.square(mean)
  return mean + shift, jnp.maximum(var, 0)


def _average(v: jax.Array) -> jax.Array:
  return jnp.mean(v, tuple(range(v.ndim - 1))).astype(jnp.float32)
