"""Max pooling over windows that do not overlap, with a gradient that is cheap on every backend."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
  """Largest value of every `size` x `size` window, side by side; what is left over is dropped.

  The values are those of `flax.linen.max_pool` with equal window and strides. Its gradient goes to
  one of equal largest values and costs a scatter, on a CPU more than the convolution before it;
  here equal largest values share it, as with `jnp.max`, by comparing and multiplying.

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
    [4.] [0.  0.  0.5 0.5]
  """
  if x.ndim != 4 or size < 1 or min(x.shape[1:3]) < size:
    raise ValueError(f'max_pool takes [n, h, w, c] with h, w >= size={size} >= 1, got {x.shape}.')
  return nn.max_pool(x, (size, size), (size, size))


def _windows(x: jax.Array, size: int) -> jax.Array:
  """[n, h, w, c] to [n, h // size, size, w // size, size, c]."""
  n, h, w, c = x.shape
  h, w = h // size, w // size
  return x[:, : h * size, : w * size].reshape(n, h, size, w, size, c)


@max_pool.defjvp
def _max_pool_jvp(size, primals, tangents):
  (x,), (t,) = primals, tangents
  y = max_pool(x, size)
  largest = _windows(x, size) == jnp.expand_dims(y, (2, 4))
  share = largest.astype(t.dtype) / jnp.sum(largest, (2, 4), keepdims=True, dtype=t.dtype)
  return y, jnp.sum(share * _windows(t, size), (2, 4), dtype=t.dtype)
