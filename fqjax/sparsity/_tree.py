"""Leaves of any parameter tree by path, and back: Linen dicts, NNX states, Equinox, Haiku."""

from collections.abc import Callable, Iterable, Mapping
import difflib
import re
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from fqjax.tracing import leaf_name


def is_array(leaf) -> bool:
  """Whether a leaf has a shape and a dtype."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def is_weight(leaf) -> bool:
  """Whether a leaf holds real floating-point numbers."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def has_values(leaf) -> bool:
  """Whether the numbers are there: not a tracer, not a `jax.ShapeDtypeStruct`."""
  return isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer)


def flatten(tree) -> tuple[dict[str, Any], Any]:
  """Leaves by path, in the tree's order, and what puts them together again.

  Args:
    tree: any pytree; `None` is no leaf.

  Raises:
    ValueError: when two leaves have the same path.

  Example:
    >>> leaves, treedef = flatten({'fc': {'kernel': 1, 'bias': 2}})
    >>> leaves
    {'fc/bias': 2, 'fc/kernel': 1}
  """
  found, treedef = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {}
  for path, leaf in found:
    name = leaf_name(path)
    if name in leaves:
      raise ValueError(f'two leaves are called {name!r}; rename one: rules go by the path.')
    leaves[name] = leaf
  return leaves, treedef


def by_path(tree, leaves: Mapping[str, Any], what: str, needed: Iterable[str] = ()):
  """Arrays of a companion tree (masks, saliency, gradients) by the paths of the parameters.

  Args:
    tree: like the parameters; `None` and leaves that are no arrays stand for nothing.
    leaves: the parameters by path.
    what: the companion's name in messages.
    needed: paths that must be there.

  Raises:
    ValueError: for a path the parameters lack, another shape, or a path that is missing.
  """
  found = {path: x for path, x in flatten(tree)[0].items() if is_array(x)}
  for path, x in found.items():
    if path not in leaves:
      raise ValueError(
        f'{what} is of another model: it has {path!r}, the parameters do not '
        f'(closest: {nearest(path, leaves)}).'
      )
    if tuple(x.shape) != tuple(leaves[path].shape):
      raise ValueError(
        f'{what} is of another model: {path!r} is {list(x.shape)} there and '
        f'{list(leaves[path].shape)} in the parameters.'
      )
  missing = [path for path in needed if path not in found]
  if missing:
    raise ValueError(
      f'{what} has nothing for {_some(missing)}; make it from the same parameters and selection.'
    )
  return found


def map_weights(fn: Callable, params, *trees):
  """Applies `fn` to every float leaf and its companions; every other leaf becomes `None`.

  Args:
    fn: called with the leaf and one array per tree.
    params: any pytree.
    *trees: like `params`, by path; each must hold an array for every float leaf.
  """
  leaves, treedef = flatten(params)
  weights = [path for path, leaf in leaves.items() if is_weight(leaf)]
  others = [by_path(t, leaves, f'tree {i + 2}', weights) for i, t in enumerate(trees)]
  return treedef.unflatten(
    [
      fn(leaf, *(o[path] for o in others)) if is_weight(leaf) else None
      for path, leaf in leaves.items()
    ]
  )


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> str:
  """The paths most like a pattern, quoted, for a message."""
  plain = re.sub(r'[^\w/]+', '', re.sub(r'\\.|\[[^]]*\]', '', pattern)).lower()
  paths = list(paths)

  def likeness(path):
    return difflib.SequenceMatcher(None, plain, path.lower()).ratio()

  best = sorted(paths, key=likeness, reverse=True)[:count]
  more = f' and {len(paths) - len(best)} more' if len(paths) > len(best) else ''
  return (', '.join(map(repr, best)) + more) or 'there are none'


def _some(paths: list[str], count: int = 3) -> str:
  more = f' and {len(paths) - count} more' if len(paths) > count else ''
  return ', '.join(map(repr, paths[:count])) + more
