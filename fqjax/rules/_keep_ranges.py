"""Learned ranges stay ranges."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqjax.quantize import Range
from fqjax.rules._tree import need_params


def keep_ranges(minimum: float = 1e-5) -> optax.GradientTransformationExtraArgs:
  """Keeps zero inside every learned range, and every range at least `minimum` wide.

  The LAST link of the chain that trains `fqjax.quantize.fake_quant`. Gradients of the ends arrive
  scaled as those of LSQ steps. For PACT, only upper ends learn: freeze the lower ones with
  `optax.partition` and decay the others.

  Args:
    minimum: least width, in units of the activation.

  Returns:
    An optax transformation without state; leaves that are no `Range` are left alone.

  Raises:
    ValueError: from `update`, without params.

  Example:
    >>> from fqjax.quantize import Range
    >>> tx = optax.chain(optax.sgd(1.0), keep_ranges())
    >>> params = {'x': Range(jnp.float32(-1), jnp.float32(1))}
    >>> gradient = {'x': Range(jnp.float32(-3), jnp.float32(0.5))}
    >>> updates, _ = tx.update(gradient, tx.init(params), params)
    >>> optax.apply_updates(params, updates)['x'].low.item()
    0.0

  Source: Esser et al. 2020, arXiv 1902.08153; Choi et al. 2018, arXiv 1805.06085.
  """

  def update(updates, state, params=None, **extra_args):
    del extra_args
    need_params('keep_ranges', params)
    is_range = lambda x: isinstance(x, Range)
    return jax.tree.map(_kept, updates, params, is_leaf=is_range), state

  def _kept(step: Any, given: Any) -> Any:
    if not isinstance(step, Range) or isinstance(step.low, optax.MaskedNode):
      return step
    low = jnp.minimum(given.low + step.low, 0)
    high = jnp.maximum(given.high + step.high, jnp.maximum(0, low + minimum))
    return Range(low - given.low, high - given.high)

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
