"""What a rule prunes to: a plan, or any function that projects a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.rules._tree import apply_masks, check_finite, covered

PyTree = Any
Project = Callable[..., tuple[PyTree, PyTree]]


def projection(target: Any) -> Project:
  """A target as `project(params, saliency=None, frozen=None) -> (params, masks)`.

  A function of one argument gains both keywords: what is frozen looks like zero to it, and a
  saliency is shown to it as the magnitude whose square it is, as structures rank energies.
  """
  if isinstance(target, _Frozen):
    return target
  if not callable(target):
    from fqjax import sparsity

    return lambda params, saliency=None, frozen=None: sparsity.project(
      target, params, saliency=saliency, frozen=frozen
    )

  function: Any = target

  def project(params, saliency=None, frozen=None):
    shown = params if saliency is None else jax.tree.map(jnp.sqrt, saliency)
    if frozen is not None:
      shown = apply_masks(shown, covered(lambda _, f: ~f, shown, frozen))
    z, masks = function(shown)
    if frozen is not None:
      masks = covered(lambda _, m, f: m if f is None else m & ~f, params, masks, frozen)
    return (z if saliency is None else apply_masks(params, masks)), masks

  return project


class _Frozen:
  """A target whose masks never leave given ones; itself a target."""

  def __init__(self, target, masks):
    self._project = projection(target)
    self._masks = masks

  def __call__(self, params, saliency=None, frozen=None):
    dead = covered(lambda _, m: ~m, params, self._masks)
    if frozen is not None:
      dead = jax.tree.map(
        lambda _, d, f: f if d is None else d if f is None else d | f, params, dead, frozen
      )
    return self._project(params, saliency=saliency, frozen=dead)


def frozen(target: Any, masks: PyTree) -> Any:
  """The same target, but what the masks mark as dead may not come back.

  Args:
    target: a plan, or a callable tree -> (tree, masks).
    masks: tree of bool arrays, True lives, None where nothing is frozen. None freezes nothing.

  Returns:
    A callable tree -> (tree, masks), to use wherever a rule takes a target.

  Example:
    >>> largest = lambda tree: (tree, {'w': jnp.abs(tree['w']) >= jnp.max(jnp.abs(tree['w']))})
    >>> target = frozen(largest, {'w': jnp.array([False, True, True])})
    >>> print(target({'w': jnp.array([9.0, 2.0, 1.0])})[1]['w'])
    [False  True False]
  """
  return target if masks is None else _Frozen(target, masks)


def finalize(
  target: Any,
  params: PyTree,
  *,
  saliency: PyTree | None = None,
  levels: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
  """Prunes for good: the hard projection that ends a run of `admm`, or any other.

  The weights themselves are projected, and weights and masks come from one call, so they agree even
  where a kept weight happens to be zero.

  Args:
    target: a plan, or a callable tree -> (tree, masks).
    params: the trained weights.
    saliency: tree like `params`, >= 0: what is ranked in place of the squared weights, e.g. of
      |w| times the norm of its input.
    levels: `(tree, masks) -> tree`, the projection onto levels that follows, as in `admm`.

  Returns:
    params: with exact zeros.
    masks: bool, True lives, None for leaves the target leaves alone; for `keep_masked`.

  Raises:
    ValueError: for weights that are NaN or infinite where the target prunes, or a plan of another
      model.

  Example:
    >>> def half(tree):
    ...   masks = {'w': jnp.abs(tree['w']) > jnp.median(jnp.abs(tree['w']))}
    ...   return apply_masks(tree, masks), masks
    >>> params, masks = finalize(half, {'w': jnp.array([1.0, -4.0, 3.0, 2.0])})
    >>> print(params['w'], masks['w'])
    [ 0. -4.  3.  0.] [False  True  True False]
  """
  projected, masks = projection(target)(params, saliency=saliency)
  check_finite(params, masks)
  if levels is not None:
    projected = apply_masks(levels(projected, masks), masks)
  return projected, masks
