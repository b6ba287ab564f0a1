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
    batches: one pass, of one shape; some thousand images in all.

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


def _momenta(step, params, state, batch) -> PyTree:
  """A float for every running average, None for what is none."""

  def shifted(x):
    return x + jnp.ones_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

  # The forward pass of training does not look at running statistics: a shift by one comes back
  # times the momentum, the same everywhere.
  a = step(params, jax.tree.map(jnp.zeros_like, state), batch)
  b = step(params, jax.tree.map(lambda x: shifted(jnp.zeros_like(x)), state), batch)

  def momentum(old, a, b):
    if not jnp.issubdtype(old.dtype, jnp.floating) or not old.size:
      return None
    slope = (b - a).astype(jnp.float32)
    m, spread = float(jnp.mean(slope)), float(jnp.max(slope) - jnp.min(slope))
    # The rounding of `a + m - a` grows with a.
    rounding = 8 * float(jnp.finfo(old.dtype).eps) * (1 + float(jnp.max(jnp.abs(a))))
    return round(m, 6) if spread <= rounding and 0 <= m < 1 else None

  return jax.tree.map(momentum, state, a, b)
