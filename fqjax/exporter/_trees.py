"""Containers of JAX as the header of an artifact writes them; see `fqjax.runtime._header`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fqjax.tracing._graph import UNUSED


class _Leaf:
  def __init__(self, number: int):
    self.number = number


def to_json(structure: Any, static: Sequence[Any] | None, what: str) -> Any:
  """A structure as JSON.

  Args:
    structure: of `jax.tree.structure`.
    static: per leaf what was fixed when tracing, None for an array; None where all are arrays.
    what: it is, for messages.

  Raises:
    ValueError: a container that NumPy alone cannot rebuild, a key that is no text, or a value that
      JSON cannot say.
  """
  fixed = static or [None] * structure.num_leaves
  number, leaves = 0, []
  for value in fixed:
    leaves.append(_Leaf(number) if value is None else value)
    number += value is None
  return _walk(jax.tree.unflatten(structure, leaves), what)


def _walk(tree: Any, what: str) -> Any:
  if isinstance(tree, _Leaf):
    return tree.number
  if tree is None:
    return None
  if isinstance(tree, Mapping):
    for key in tree:
      if not isinstance(key, str):
        raise ValueError(f'{what}: the key {key!r} of a dict is no text, which a file needs.')
    return {'dict': {key: _walk(x, what) for key, x in tree.items()}}
  if isinstance(tree, tuple) and hasattr(tree, '_fields'):
    named = tree._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    fields = {key: _walk(x, what) for key, x in named.items()}
    # A private type comes back under the name without underscores: nothing private is in a file.
    return {'named': [type(tree).__name__.lstrip('_') or 'Tuple', fields]}
  if isinstance(tree, tuple):
    return {'tuple': [_walk(x, what) for x in tree]}
  if isinstance(tree, list):
    return [_walk(x, what) for x in tree]
  if isinstance(tree, bool | int | float | str):
    return {'value': tree}
  if tree is UNUSED:
    raise ValueError(
      f'{what}: a random key is given that the network does not use; leave it away: '
      'functools.partial(apply_fn, rngs=None).'
    )
  raise ValueError(
    f'{what}: a {type(tree).__name__} cannot be rebuilt where only NumPy is; use dicts, lists, '
    'tuples and named tuples.'
  )
