"""Magnitude pruning as jaxpruner does it, written anew for current JAX to be measured against.

jaxpruner (last published in 2024) calls functions that JAX no longer has. What is measured here is its
algorithm: an optax wrapper whose state holds masks of one byte a weight; every so many updates, under
one `lax.cond`, each leaf's magnitudes are sorted and those at or above the k-th kept, of equal ones the
first; the optimizer itself sees all gradients; and after the update is applied, the parameters are
multiplied by the masks in a call of their own. The sparsity follows a cubic polynomial.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

PyTree = Any


class MagnitudeState(NamedTuple):
  """State of `magnitude_pruning`.

  Attributes:
    masks: uint8 tree like the params, 1 lives; None leaves are left alone.
    inner_state: of the optimizer.
    count: int32 scalar, updates so far.
  """

  masks: PyTree
  inner_state: PyTree
  count: jax.Array


def by_argsort(scores: jax.Array, kept: jax.Array) -> jax.Array:
  """uint8 mask of exactly `kept` entries by a sort of places, as published."""
  flat = scores.reshape(-1)
  last = jnp.argsort(-flat)[kept - 1]
  # Equal scores behind the last kept place fall out.
  inside = (jnp.arange(flat.size) <= last) | (flat != flat[last])
  return ((flat >= flat[last]) & inside).astype(jnp.uint8).reshape(scores.shape)


def by_sort(scores: jax.Array, kept: jax.Array) -> jax.Array:
  """The same by a sort of values, which is cheaper; equal scores stay together."""
  threshold = jnp.sort(scores.reshape(-1))[scores.size - kept]
  return (scores >= threshold).astype(jnp.uint8)


def magnitude_pruning(
  inner: optax.GradientTransformation,
  keep: PyTree,
  *,
  begin: int,
  end: int,
  every: int,
  top: Callable[[jax.Array, jax.Array], jax.Array] = by_argsort,
) -> tuple[optax.GradientTransformation, Callable[[PyTree, PyTree], PyTree]]:
  """The wrapped optimizer, and the call that must follow every update.

  Args:
    inner: the optimizer.
    keep: tree like the params of kept fractions, None for leaves to leave alone.
    begin: updates before the first renewal of the masks.
    end: updates before the last one.
    every: updates between renewals.
    top: (scores, number) -> mask.

  Returns:
    An optax transformation, and `(params, state) -> params`.
  """

  def over(fn, keep, *trees):
    return jax.tree.map(
      lambda k, *x: None if k is None else fn(k, *x), keep, *trees, is_leaf=lambda x: x is None
    )

  def init(params):
    masks = over(lambda _, p: jnp.ones(p.shape, jnp.uint8), keep, params)
    return MagnitudeState(masks, inner.init(params), jnp.zeros((), jnp.int32))

  def renew(count, params):
    progress = jnp.clip((count - begin) / max(end - begin, 1), 0, 1)

    def one(k, p):
      sparsity = (1 - k) * (1 - (1 - progress) ** 3)
      kept = jnp.maximum(1, jnp.round(p.size * (1 - sparsity)).astype(jnp.int32))
      return top(jnp.abs(p), kept)

    return over(one, keep, params)

  def update(grads, state, params=None):
    count = state.count
    due = (count >= begin) & (count <= end) & ((count - begin) % every == 0)
    masks = lax.cond(due, lambda: renew(count, params), lambda: state.masks)
    updates, inner_state = inner.update(grads, state.inner_state, params)
    return updates, MagnitudeState(masks, inner_state, optax.safe_increment(count))

  def after(params, state):
    return jax.tree.map(lambda p, m: p if m is None else p * m.astype(p.dtype), params, state.masks)

  return optax.GradientTransformation(init, update), after
