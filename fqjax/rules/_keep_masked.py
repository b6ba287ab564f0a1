"""The last link of a chain: dead weights stay exactly zero."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from fqjax.rules._tree import check_masks, covered, need_params, pin, placed_like

PyTree = Any


class KeepMaskedState(NamedTuple):
  """State of `keep_masked`.

  Attributes:
    masks: tree like the params of bool arrays, True lives; None leaves are left alone.
  """

  masks: PyTree


def keep_masked(masks: PyTree) -> optax.GradientTransformationExtraArgs:
  """Keeps masked weights at exactly zero, whatever came before in the chain.

  The LAST link: it replaces the update of a dead weight by minus the weight, so neither momentum nor
  decay nor a checkpoint from elsewhere brings it back. `check_chain` finds a link behind it.

  Args:
    masks: tree like the params of arrays, bool or 0 and 1, True lives; None for leaves to leave
      alone. E.g. of `finalize`.

  Returns:
    An optax transformation; its state holds the masks, one byte a weight.

  Raises:
    ValueError: from `init`, when the masks are not those of the params.

  Example:
    >>> tx = optax.chain(optax.sgd(1.0), keep_masked({'w': jnp.array([True, False])}))
    >>> params = {'w': jnp.array([3.0, 4.0])}
    >>> updates, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['w'])
    [2. 0.]
  """

  def init(params):
    check_masks(params, masks)
    own = covered(lambda _, m: jnp.asarray(m).astype(bool), params, masks)
    return KeepMaskedState(placed_like(own, params))

  def update(updates, state, params=None, **extra_args):
    del extra_args
    need_params('keep_masked', params)
    return pin(updates, params, state.masks), state

  return optax.GradientTransformationExtraArgs(init, update)
