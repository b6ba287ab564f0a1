"""Sparse from the first step: fixed random masks, or masks that move while training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqjax.rules._projection import projection
from fqjax.rules._pruned import pruned
from fqjax.rules._scheduled import uniform
from fqjax.rules._tree import covered, magnitude
from fqjax.sparsity import top_k_mask

PyTree = Any


def static_sparse(
  inner: optax.GradientTransformation, target: Any, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """Trains with random masks that never change: the baseline of sparse training.

  The params start dense: `params = apply_masks(params, masks_of(tx.init(params)))`.

  Args:
    inner: the optimizer.
    target: a plan, or a callable tree -> (tree, masks); gives form and number of the live weights.
    seed: of the masks.

  Returns:
    The optimizer inside the masks; see `PrunedState`.

  Example:
    >>> from fqjax.sparsity import top_k_mask
    >>> two = lambda tree: (tree, {'w': top_k_mask(jnp.abs(tree['w']), 2)})
    >>> state = static_sparse(optax.sgd(0.1), two).init({'w': jnp.ones(5)})
    >>> int(state.masks['w'].sum())
    2
  """
  return pruned(inner, _random_masks(target, seed))


def rigl(
  inner: optax.GradientTransformation,
  target: Any,
  *,
  every: int,
  end: int,
  drop: float | Callable[[jax.Array], jax.Array] = 0.3,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Sparse training that drops the smallest weights and grows where the gradient is largest.

  Starts from random masks of the target (a plan with the 'erk' budget is the usual one). At a
  renewal every leaf drops a share of its live weights, the smallest, and the target fills the places
  by the largest gradients: the number of live weights never changes. Structures other than single
  weights keep their form, e.g. N of M refills its own group. New weights start at zero, their
  moments as new. The gradient step is taken on renewals too; the paper skips it.

  The params start dense: `params = apply_masks(params, masks_of(tx.init(params)))`.

  Args:
    inner: the optimizer.
    target: a plan, or a callable tree -> (tree, masks).
    every: updates between renewals.
    end: no renewal from this update on; about three quarters of the run.
    drop: share of live weights dropped. A number is the start of a cosine that ends at 0; a function
      is one of the update.
    seed: of the first masks.

  Returns:
    The optimizer inside the masks; see `PrunedState`.

  Raises:
    ValueError: for settings that make no sense.

  Example:
    >>> from fqjax.sparsity import top_k_mask
    >>> two = lambda tree: (tree, {'w': top_k_mask(jnp.abs(tree['w']), 2)})
    >>> tx = rigl(optax.sgd(0.1), two, every=1, end=10, drop=0.5)
    >>> params = {'w': jnp.zeros(5)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...   _, state = tx.update({'w': jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])}, state, params)
    >>> bool(state.masks['w'][1]), int(state.masks['w'].sum())
    (True, 2)

  Source: Evci et al., "Rigging the Lottery", ICML 2020.
  """

  def grow(count, grads):
    del count
    return jax.tree.map(magnitude, grads)

  if not callable(drop):
    _check_drop(drop)
  share = drop if callable(drop) else lambda count: drop / 2 * (1 + jnp.cos(_part(count, end)))
  return _moving(inner, target, every, end, share, grow, seed)


def set_(
  inner: optax.GradientTransformation,
  target: Any,
  *,
  every: int,
  end: int,
  drop: float | Callable[[jax.Array], jax.Array] = 0.3,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Sparse evolutionary training (SET): as `rigl`, but what grows is drawn at random.

  Args:
    inner: the optimizer.
    target: a plan, or a callable tree -> (tree, masks).
    every: updates between renewals.
    end: no renewal from this update on.
    drop: share of live weights dropped, a number or a function of the update.
    seed: of the first masks and of what grows.

  Returns:
    The optimizer inside the masks; see `PrunedState`.

  Raises:
    ValueError: for settings that make no sense.

  Example:
    >>> from fqjax.sparsity import top_k_mask
    >>> two = lambda tree: (tree, {'w': top_k_mask(jnp.abs(tree['w']), 2)})
    >>> tx = set_(optax.sgd(0.1), two, every=1, end=10)
    >>> int(tx.init({'w': jnp.ones(5)}).masks['w'].sum())
    2

  Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
  connectivity", Nature Communications 2018.
  """
  if not callable(drop):
    _check_drop(drop)
  share = drop if callable(drop) else lambda count: jnp.full((), drop, jnp.float32)

  def grow(count, grads):
    return uniform(jax.random.fold_in(jax.random.key(seed), count + 1), grads)

  return _moving(inner, target, every, end, share, grow, seed)


def _moving(inner, target, every, end, drop, grow, seed):
  if every < 1 or end < 0:
    raise ValueError(f'renewals need every >= 1 and end >= 0; got every={every}, end={end}.')
  project = projection(target)

  def due(count):
    return (count > 0) & (count < end) & (count % every == 0)

  def refresh(count, masks, params, grads, _):
    share = jnp.asarray(drop(count), jnp.float32)

    def survivors(p, alive):
      live = jnp.sum(alive, dtype=jnp.int32)
      dropped = jnp.round(share * live.astype(jnp.float32)).astype(jnp.int32)
      return alive & top_k_mask(jnp.where(alive, magnitude(p), -1), live - dropped)

    stay = covered(survivors, params, masks)
    wish = grow(count, grads)
    # Above every wish, over all leaves: a target may compare leaves.
    tops = [jnp.max(x).astype(jnp.float32) for x in jax.tree.leaves(wish)]
    above = 2 * jnp.max(jnp.stack(tops)) + 1
    scores = jax.tree.map(
      lambda x, m: x if m is None else jnp.where(m, above.astype(x.dtype), x), wish, stay
    )
    return project(params, saliency=scores)[1]

  return pruned(inner, _random_masks(target, seed), due, refresh)


def _random_masks(target, seed):
  project = projection(target)
  return lambda params: project(params, saliency=uniform(jax.random.key(seed), params))[1]


def _part(count, end):
  return jnp.pi * jnp.minimum(count.astype(jnp.float32) / max(end, 1), 1.0)


def _check_drop(drop):
  if not 0 <= drop < 1:
    raise ValueError(f'drop={drop}, the share of live weights replaced, must be in [0, 1).')
