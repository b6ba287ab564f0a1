"""An optimizer inside masks: what gradual pruning and sparse training have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fqjax.rules._tree import (
  apply_masks,
  check_masks,
  covered,
  need_params,
  pin,
  placed_like,
  reset_dead,
)

PyTree = Any


class PrunedState(NamedTuple):
  """State of an optimizer inside masks (`gradual`, `one_shot`, `rigl`, `masked_retraining`, ...).

  Attributes:
    count: int32 scalar, updates so far.
    masks: tree like the params of bool arrays, True lives; None leaves are left alone.
    inner_state: of the optimizer; its moments of dead weights are those of its `init`.
  """

  count: jax.Array
  masks: PyTree
  inner_state: PyTree


def pruned(
  inner: optax.GradientTransformation,
  init_masks: Callable[[PyTree], PyTree],
  due: Callable[[jax.Array], jax.Array] | None = None,
  refresh: Callable[[jax.Array, PyTree, PyTree, PyTree, PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs `inner` on masked gradients and lands dead weights on zero.

  Args:
    inner: the optimizer.
    init_masks: params -> masks.
    due: count -> bool scalar; when the masks are made anew.
    refresh: (count, masks, params, dense gradients, state of `inner`) -> masks.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    masks = placed_like(init_masks(params), params)
    return PrunedState(jnp.zeros((), jnp.int32), masks, inner.init(params))

  def update(updates, state, params=None, **extra_args):
    params = need_params('pruning', params)
    count, masks, inner_state = state
    if due is not None:
      assert refresh is not None

      def renew(masks, inner_state, grads=updates, refresh=refresh):
        new = refresh(count, masks, params, grads, inner_state)
        # Who dies and who is born: both start again as in `init`.
        stays = covered(lambda _, a, b: a & b, params, masks, new)
        return new, reset_dead(inner_state, inner.init(params), params, stays)

      masks, inner_state = lax.cond(due(count), renew, lambda *old: old, masks, inner_state)
    updates, inner_state = inner.update(
      apply_masks(updates, masks), inner_state, params, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(count))
    return pin(updates, params, masks), PrunedState(count, masks, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def masked_retraining(
  inner: optax.GradientTransformation, masks: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Trains the survivors only: gradients, moments and weights of the dead are zero.

  Against `chain(inner, keep_masked(masks))`: here the dead have no part in clipping by norm, and
  the moments stay zero too.

  Args:
    inner: any optax optimizer.
    masks: tree like the params of arrays, bool or 0 and 1, True lives; None for leaves to leave
      alone.

  Returns:
    The optimizer inside the masks.

  Raises:
    ValueError: from `init`, when the masks are not those of the params.

  Example:
    >>> tx = masked_retraining(optax.sgd(0.1, momentum=0.9), {'w': jnp.array([True, False])})
    >>> params = {'w': jnp.array([3.0, 0.0])}
    >>> updates, state = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['w'], state.inner_state[0].trace['w'])
    [2.9 0. ] [1. 0.]

  Source: Ren et al., "ADMM-NN", ASPLOS 2019 (masked retraining).
  """

  def init_masks(params):
    check_masks(params, masks)
    return covered(lambda _, m: jnp.asarray(m).astype(bool), params, masks)

  return pruned(inner, init_masks)
