"""Trees of masks beside trees of params: None marks a leaf that a rule leaves alone."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from fqjax.tracing import leaf_name

PyTree = Any


def wide(x: Any) -> Any:
  """The dtype of an array, at least float32."""
  return x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def magnitude(x: jax.Array) -> jax.Array:
  """|x| in at least float32."""
  return jnp.abs(x).astype(wide(x))


def need_params(rule: str, params: PyTree) -> PyTree:
  """The params: rules look at the weights, which optax passes only when asked to."""
  if params is None:
    raise ValueError(f'{rule} needs the params: call tx.update(grads, state, params).')
  return params


def names(params: PyTree) -> list[str]:
  """Path of every leaf, in order."""
  return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def beside(params: PyTree, tree: PyTree) -> list:
  """Leaves of `tree` in the order of the params' leaves, None where it holds None."""
  return jax.tree.structure(params).flatten_up_to(tree)


def covered(fn: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
  """`jax.tree.map` that gives None where the first tree of `rest` holds None."""
  return jax.tree.map(lambda x, *more: None if more[0] is None else fn(x, *more), tree, *rest)


def check_masks(params: PyTree, masks: PyTree) -> None:
  """Raises ValueError, naming the leaf, when masks are not those of the params."""
  try:
    found = beside(params, masks)
  except ValueError as e:
    paths = jax.tree_util.tree_leaves_with_path(masks, is_leaf=lambda x: x is None)
    have, want = [leaf_name(path) for path, _ in paths], names(params)
    extra = [name for name in have if name not in want]
    missing = [name for name in want if name not in have]
    raise ValueError(
      'the masks are not a tree like the params (None where nothing is masked).'
      + (f' Not in the params: {", ".join(extra[:3])}.' if extra else '')
      + (f' Without a mask: {", ".join(missing[:3])}.' if missing else '')
      + ' Make them from these params: params, masks = finalize(plan, params).'
    ) from e
  for name, p, m in zip(names(params), jax.tree.leaves(params), found, strict=True):
    if m is not None and getattr(m, 'shape', None) != p.shape:
      raise ValueError(
        f'the mask of {name} has shape {list(jnp.shape(m))}, the weights {list(p.shape)}: the masks'
        ' are those of another model.'
      )


def check_finite(params: PyTree, masks: PyTree) -> None:
  """Raises ValueError, naming the leaf, for masked weights that cannot be ranked; not while tracing."""
  for name, p, m in zip(names(params), jax.tree.leaves(params), beside(params, masks), strict=True):
    if m is None or isinstance(p, Tracer):
      continue
    # On the host where all of it is here: nothing to compile.
    finite = (np if getattr(p, 'is_fully_addressable', True) else jnp).isfinite(p)
    if not bool(finite.all()):
      raise ValueError(
        f'{name} holds NaN or infinite weights, so no order of magnitudes exists. Restore a checkpoint'
        ' from before they appeared, and lower the learning rate or rho.'
      )


def placed_like(tree: PyTree, params: PyTree) -> PyTree:
  """Puts arrays where the params they belong to are; nothing happens while tracing."""

  def place(p, x):
    concrete = isinstance(p, jax.Array) and not isinstance(p, Tracer)
    if concrete and p.committed and x.shape == p.shape and not isinstance(x, Tracer):
      return jax.device_put(x, p.sharding)
    return x

  return covered(place, params, tree)


def pin(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
  """Updates that land masked weights on zero."""

  def one(u, p, m):
    if m is None:
      return u
    # At least as wide as the weight: a rounded -p would leave a rest.
    dtype = u.dtype if u.dtype == p.dtype else wide(max(u, p, key=lambda x: x.dtype.itemsize))
    # -p, not 0: a weight restored from elsewhere also lands on zero.
    return jnp.where(m, u.astype(dtype), -p.astype(dtype))

  return jax.tree.map(one, updates, params, masks)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
  """Zeros what the masks mark as dead.

  Args:
    params: any tree of arrays (weights, gradients, averages).
    masks: tree like `params` of bool arrays, True lives; None leaves are left alone. None altogether
      changes nothing.

  Returns:
    A tree like `params`.

  Example:
    >>> masks = {'w': jnp.array([True, False]), 'b': None}
    >>> print(apply_masks({'w': jnp.array([3.0, 4.0]), 'b': jnp.ones(1)}, masks)['w'])
    [3. 0.]
  """
  if masks is None:
    return params
  return jax.tree.map(
    lambda p, m: p if m is None else jnp.where(m, p, jnp.zeros_like(p)), params, masks
  )


def reset_dead(state: PyTree, fresh: PyTree, params: PyTree, alive: PyTree) -> PyTree:
  """Optimizer state with the entries of dead weights as in `fresh`, the state of `init`.

  Moments are found by their form: any part of the state that is a tree like the params.
  """
  structure = jax.tree.structure(params)

  def like_params(x):
    return jax.tree.structure(x) == structure

  def entry(s, f, m):
    return s if m is None or s.shape != m.shape else jnp.where(m, s, f.astype(s.dtype))

  def part(s, f):
    return jax.tree.map(entry, s, f, alive) if like_params(s) else s

  return jax.tree.map(part, state, fresh, is_leaf=like_params)
