"""What a weight is worth: its magnitude, its first-order effect, its diagonal Fisher estimate."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from fqjax.sparsity import _tree
from fqjax.sparsity._select import wide


def magnitude(params):
  """|w|.

  Args:
    params: any pytree.

  Returns:
    Tree like `params`: float32 (or wider) arrays, None for leaves that are no float arrays.

  Example:
    >>> magnitude({'w': jnp.array([-2.0, 1.0])})['w'].tolist()
    [2.0, 1.0]
  """
  return _tree.map_weights(lambda w: jnp.abs(_wide(w)), params)


def taylor(params, grads):
  """|w * g|: by how much the loss moves, to first order, when the weight becomes zero.

  Args:
    params: any pytree.
    grads: like `params`; averaged over as many examples as you can afford.

  Returns:
    Tree like `params`: float32 (or wider) arrays, None for leaves that are no float arrays.

  Raises:
    ValueError: when `grads` is of another model.

  Example:
    >>> taylor({'w': jnp.array([-2.0, 1.0])}, {'w': jnp.array([0.5, 3.0])})['w'].tolist()
    [1.0, 3.0]

  Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", ICLR 2017, eq. 8, for single weights.
  """
  return _tree.map_weights(lambda w, g: jnp.abs(_wide(w) * _wide(g, w)), params, grads)


def fisher(grad_fn: Callable, params, batches: Iterable):
  """Diagonal Fisher information, from gradients the caller knows how to compute.

  The mean over batches of the squared gradient. With one example per batch it is the empirical
  Fisher; the gradient of a mean over n independent examples gives about 1/n of it near an optimum,
  the same for every weight: orders and allocations do not change with the batch size.

  Args:
    grad_fn: (params, batch) -> gradients of the loss, like `params`; jit it yourself.
    params: any pytree.
    batches: what `grad_fn` takes, one after the other.

  Returns:
    Tree like `params`: float32 (or wider) arrays >= 0, None for leaves that are no float arrays.

  Raises:
    ValueError: when there are no batches, `grad_fn` returns another tree, or a gradient is NaN or
      infinite.

  Example:
    >>> grad_fn = jax.grad(lambda p, x: jnp.sum(p['w'] * x))
    >>> fisher(grad_fn, {'w': jnp.ones(2)}, [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])])[
    ...   'w'
    ... ].tolist()
    [5.0, 2.0]

  Source: LeCun, Denker, Solla, "Optimal Brain Damage", NeurIPS 1989, with the Fisher information
    in place of the Hessian (Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018).
  """
  leaves, treedef = _tree.flatten(params)
  paths = [path for path, leaf in leaves.items() if _tree.is_weight(leaf)]
  sums = {path: jnp.zeros_like(_wide(leaves[path])) for path in paths}
  count = 0
  for batch in batches:
    grads = _tree.by_path(grad_fn(params, batch), leaves, 'the gradient', paths)
    sums = _add_squares(sums, {path: grads[path] for path in paths})
    count += 1
  if not count:
    raise ValueError('fisher got no batches; an iterator that was read before is empty.')
  for path, total in sums.items():
    if not bool(jnp.isfinite(total).all()):
      raise ValueError(
        f'the gradients of {path!r} were NaN or infinite in one of {count} batches; look at the '
        'loss of each batch, or compute in float32.'
      )
  return treedef.unflatten([sums[p] / count if p in sums else None for p in leaves])


def loss_change(params, fisher_diagonal):
  """F w**2 / 2: by how much the loss grows, to second order, when the weight becomes zero.

  Args:
    params: any pytree.
    fisher_diagonal: like `params`, from `fisher`.

  Returns:
    Tree like `params`: float32 (or wider) arrays, None for leaves that are no float arrays.

  Raises:
    ValueError: when `fisher_diagonal` is of another model.

  Example:
    >>> loss_change({'w': jnp.array([-2.0, 1.0])}, {'w': jnp.array([0.5, 4.0])})['w'].tolist()
    [1.0, 2.0]

  Source: as `fisher`.
  """
  return _tree.map_weights(
    lambda w, f: _wide(f, w) * jnp.square(_wide(w)) / 2, params, fisher_diagonal
  )


@jax.jit
def _add_squares(sums, grads):
  return {path: s + jnp.square(grads[path].astype(s.dtype)) for path, s in sums.items()}


def _wide(x, like=None):
  x = jnp.asarray(x)
  return x.astype(wide((x if like is None else like).dtype))
