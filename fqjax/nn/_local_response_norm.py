"""Local response normalisation: a channel divided by the energy of those beside it."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.nn._batch_norm import at_least_float32


def local_response_norm(
  x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
  """Divides every value by (k + alpha / size * sum of squares) ** beta.

  The sum runs over the `size` neighbouring channels of the same place, itself in the middle (of an
  even number the later of the two middle ones); beyond the first and the last channel lie zeros.
  Arithmetic is float32 (float64 for float64 input) whatever the input type.

  Args:
    x: [..., c], any floating type.
    size: Channels per sum.
    alpha: Weight of the mean square. Krizhevsky et al. weigh the sum: their 1e-4 is 5e-4 here.
    beta: Exponent.
    k: Added before the power, > 0 (1 in Caffe and PyTorch, 2 in the paper).

  Returns:
    [..., c] in the type of `x`.

  Raises:
    ValueError: `size` < 1.

  Example:
    >>> x = jnp.array([[1.0, 2.0, 3.0]])
    >>> y = local_response_norm(x, size=3, alpha=3.0, beta=1.0)  # 1 / (1 + 1 + 4), ...
    >>> print(' '.join(f'{v:.3f}' for v in y[0]))
    0.167 0.133 0.214

  Source: Krizhevsky et al. 2012, section 3.3, with the constants of Caffe's AlexNet.
  """
  if size < 1:
    raise ValueError(f'local_response_norm sums over size >= 1 channels, got {size}.')
  work = x.astype(at_least_float32(x.dtype))
  before = size // 2
  energy = lax.reduce_window(
    jnp.square(work),
    np.zeros((), work.dtype),
    lax.add,
    window_dimensions=(1,) * (x.ndim - 1) + (size,),
    window_strides=(1,) * x.ndim,
    padding=((0, 0),) * (x.ndim - 1) + ((before, size - 1 - before),),
  )
  return (work * (k + alpha / size * energy) ** -beta).astype(x.dtype)
