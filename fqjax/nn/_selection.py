"""How often each channel was chosen, over as many batches, passes and processes as wanted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SelectionState(NamedTuple):
  """Counts kept by `update_selection`.

  Attributes:
    chosen: int32 [c], images for which each channel was open.
    count: int32 scalar, images seen.
  """

  chosen: jax.Array
  count: jax.Array


def init_selection(channels: int) -> SelectionState:
  """Starts counting for `channels` channels.

  Example:
    >>> print(init_selection(3).chosen)
    [0 0 0]
  """
  return SelectionState(jnp.zeros((channels,), jnp.int32), jnp.zeros((), jnp.int32))


def update_selection(
  state: SelectionState, on: jax.Array, mask: jax.Array | None = None
) -> SelectionState:
  """Adds the gate activations of a batch.

  Whole numbers rather than a float sum: exact up to 2^31 images, in any order.

  Args:
    state: From `init_selection` or an earlier update.
    on: [n, c] gate activations, 0 or 1.
    mask: [n], 0 marks padding; None counts all.

  Example:
    >>> state = update_selection(init_selection(2), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> print(state.chosen, state.count)
    [2 1] 2
  """
  seen = jnp.ones(on.shape[:1], bool) if mask is None else mask > 0
  opened = (on > 0.5) & seen[:, None]
  return SelectionState(
    state.chosen + jnp.sum(opened, axis=0, dtype=jnp.int32),
    state.count + jnp.sum(seen, dtype=jnp.int32),
  )


def merge_selections(a: SelectionState, b: SelectionState) -> SelectionState:
  """Joins the counts of two disjoint sets of images.

  Example:
    >>> a = SelectionState(jnp.array([1, 0]), jnp.array(1))
    >>> print(merge_selections(a, a).chosen)
    [2 0]
  """
  return SelectionState(a.chosen + b.chosen, a.count + b.count)


def selection_frequency(state: SelectionState) -> jax.Array:
  """Turns counts into frequencies, the heat map: float32 [c] in 0..1; 0 before any image.

  Example:
    >>> print(selection_frequency(SelectionState(jnp.array([1, 4]), jnp.array(4))))
    [0.25 1.  ]
  """
  count = jnp.maximum(state.count, 1).astype(jnp.float32)
  return state.chosen.astype(jnp.float32) / count
