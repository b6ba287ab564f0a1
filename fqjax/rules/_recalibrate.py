"""Batch-norm statistics of weights as they are now."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def recalibrate(
  apply: Callable[[PyTree, PyTree, PyTree], PyTree],
  params: PyTree,
  model_state: PyTree,
  batches: Iterable[PyTree],
) -> PyTree:
  """Estimates running statistics anew, each batch counting the same.

  After a cut the old statistics are those of another network. Ordinary training steps would replace
  them at the pace of their momentum, the last batches counting most; here the result is the plain
  average over the batches, whatever the momentum, which is found by trying it out.

  Args:
    apply: `(params, model_state, batch) -> model_state`, a forward pass in training mode; jitted here.
      Linen: `lambda p, s, x: model.apply({'params': p, **s}, x, train=True, mutable=[*s])[1]`.
    params: the weights, not changed.
    model_state: tree of arrays. Leaves that move as `m * old + (1 - m) * batch` are averaged; any
      other (counters, keys) is handed from batch to batch as `apply` returns it.
    batches: one pass, of one shape; some thousand images in all, augmented as in training (borders
      and crops change the statistics).

  Returns:
    The new model state, same tree and dtypes.

  Raises:
    ValueError: when there is no batch.

  Example:
    >>> apply = lambda params, state, x: {'mean': 0.9 * state['mean'] + 0.1 * jnp.mean(x)}
    >>> state = recalibrate(apply, {}, {'mean': jnp.array(9.0)}, [jnp.ones(2), 2 * jnp.ones(2)])
    >>> print(f'{state["mean"]:.4f}')
    1.5000
  """
  step = jax.jit(apply)
  momenta = None
  state = model_state
  count = 0
  for count, batch in enumerate(batches, 1):
    if momenta is None:
      momenta = _momenta(step, params, state, batch)
    new = step(params, state, batch)
    state = jax.tree.map(
      lambda m, old, x, count=count: (
        x
        if m is None
        else (old + (x - old) / jnp.asarray((1 - m) * count, old.dtype)).astype(old.dtype)
      ),
      momenta,
      state,
      new,
      is_leaf=lambda x: x is None,
    )
  if not count:
    raise ValueError(
      'recalibrate got no batch: the iterator is empty (or its one pass is used up).'
    )
  return state


def _doubled(x: jax.Array) -> jax.Array:
  return x + x if jnp.issubdtype(x.dtype, jnp.floating) else x


def _momenta(step, params, state, batch) -> PyTree:
  """A float for every running average, None for what is none."""

  # The forward pass of training does not look at running statistics: a shift of them comes back
  # times the momentum, the same everywhere. As large as the statistics, so that rounding is small.
  def shift(x, a):
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
      return x
    return jnp.full_like(x, 1 + jnp.max(jnp.abs(a)))

  a = step(params, jax.tree.map(jnp.zeros_like, state), batch)
  shifts = jax.tree.map(shift, state, a)
  b = step(params, shifts, batch)
  # Twice the shift has to come back twice: a running maximum, for example, does not.
  c = step(params, jax.tree.map(_doubled, shifts), batch)

  def momentum(by, a, b, c):
    if not jnp.issubdtype(by.dtype, jnp.floating) or not by.size:
      return None
    slope = jnp.stack([(b - a) / by, (c - b) / by]).astype(jnp.float32)
    m, spread = float(jnp.mean(slope)), float(jnp.max(slope) - jnp.min(slope))
    return round(m, 6) if spread <= 8 * float(jnp.finfo(by.dtype).eps) and 0 <= m < 1 else None

  return jax.tree.map(momentum, shifts, a, b, c)
