"""Max pooling over windows that do not overlap, with a gradient that is cheap on every backend."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
  """Largest value of every `size` x `size` window, side by side; what is left over is dropped.

  Values and gradients are those of `flax.linen.max_pool` with equal window and strides: of equal
  largest values the first has the gradient. There it costs a scatter, on a CPU more than the
  convolution before it; here comparisons and a product.

  Args:
    x: [n, h, w, c], any real type.
    size: Side of a window and step between windows.

  Returns:
    [n, h // size, w // size, c] in the type of `x`.

  Raises:
    ValueError: `x` is not of rank 4, or smaller than a window.

  Example:
    >>> x = jnp.array([[1.0, 2.0], [4.0, 4.0]]).reshape(1, 2, 2, 1)
    >>> print(max_pool(x).ravel(), jax.grad(lambda x: max_pool(x).sum())(x).ravel())
    [4.] [0. 0. 1. 0.]
  """
  if x.ndim != 4 or size < 1 or min(x.shape[1:3]) < size:
    raise ValueError(f'max_pool takes [n, h, w, c] with h, w >= size={size} >= 1, got {x.shape}.')
  return nn.max_pool(x, (size, size), (size, size))


def _windows(x: jax.Array, size: int) -> jax.Array:
  """[n, h, w, c] to [n, h // size, size, w // size, size, c]."""
  n, h, w, c = x.shape
  h, w = h // size, w // size
  return x[:, : h * size, : w * size].reshape(n, h, size, w, size, c)


def _first_largest(windows: jax.Array) -> jax.Array:
  """Marks the first of the largest values of every window: bools like `windows`."""
  size = windows.shape[2]
  # Not `windows == maximum`: a compiler may work the values out twice, rounded differently, and a
  # window without its own maximum would have no gradient at all, or NaN.
  largest, where = windows[:, :, 0, :, 0], 0
  for k in range(1, size * size):
    value = windows[:, :, k // size, :, k % size]
    larger = value > largest
    largest, where = jnp.where(larger, value, largest), jnp.where(larger, k, where)
  places = size * lax.broadcasted_iota(jnp.int32, windows.shape, 2)
  places = places + lax.broadcasted_iota(jnp.int32, windows.shape, 4)
  return places == jnp.expand_dims(jnp.asarray(where, jnp.int32), (2, 4))


@max_pool.defjvp
def _max_pool_jvp(size, primals, tangents):
  (x,), (t,) = primals, tangents
  if size == 1:
    return x, t
  chosen = _windows(t, size) * _first_largest(_windows(x, size)).astype(t.dtype)
  return max_pool(x, size), jnp.sum(chosen, (2, 4), dtype=t.dtype)
