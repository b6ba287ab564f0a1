"""Codebooks follow the weights: every so many updates they are fitted anew."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fqjax.quantize._blend import fit_step
from fqjax.quantize._effective import map_mixtures, masks_by_path, mixtures_by_path
from fqjax.rules._tree import need_params
from fqjax.sparsity import _tree

PyTree = Any


class RefreshState(NamedTuple):
  """State of `refresh_codebooks`.

  Attributes:
    count: int32 scalar, updates so far.
    error: tree like the codebooks, a float32 scalar for each mixture: mean squared distance of the
      weights to their levels at the last refresh; NaN before the first.
  """

  count: jax.Array
  error: PyTree


def refresh_codebooks(
  every: int, *, kind: str = 'em', masks: PyTree = None, begin: int = 0, end: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """Fits the mixtures to the weights every so many updates, in place of what the optimizer says.

  For a chain over `{'params': params, 'codebooks': codebooks}`. One pass of expectation-maximisation
  over the weights as this update leaves them; between refreshes updates pass unchanged. In straight-
  through training deviations and shares get no gradient, and this is what keeps them up. A component
  that has lost its members starts again beside the one with the largest error.

  Of the last links: optimizer, refresh, `keep_masked`. The published method has none.

  Args:
    every: updates between refreshes.
    kind: 'em' shares weights out by responsibility, 'lloyd' gives each to its most responsible
      component.
    masks: tree like the params of bool arrays, True lives, None where all do: what `keep_masked` has,
      whose zeros are no weights to fit.
    begin: the first refresh is at update `begin` or later.
    end: no refresh from update `end` on.

  Returns:
    An optax transformation; see `RefreshState`.

  Raises:
    ValueError: for settings that make no sense; from `init`, for another tree than that.

  Example:
    >>> from fqjax import quantize
    >>> params = {'w': jnp.array([[-1.0, -0.8], [0.0, 1.0]])}
    >>> plan = quantize.make_plan(params, [('w', quantize.Mixture(3))])
    >>> both = {'params': params, 'codebooks': quantize.init_dgms(params, plan)}
    >>> tx = optax.chain(optax.sgd(0.1), refresh_codebooks(every=1))
    >>> grads = jax.tree.map(jnp.ones_like, both)
    >>> updates, state = tx.update(grads, tx.init(both), both)
    >>> print(optax.apply_updates(both, updates)['codebooks']['w'].mu.round(2))
    [-1.   0.9]
  """
  if every < 1:
    raise ValueError(f'a refresh comes every so many updates, from 1; got every={every}.')
  if kind not in ('em', 'lloyd'):
    raise ValueError(f"kind={kind!r} must be 'em' or 'lloyd'.")
  if begin < 0 or (end is not None and end <= begin):
    raise ValueError(f'refreshes begin at update {begin} and end before {end}: there are none.')

  def init(params):
    _check_tree(params)
    mixtures_by_path(params['codebooks'], _tree.flatten(params['params'])[0])
    masks_by_path(masks, _tree.flatten(params['params'])[0])
    nan = lambda _: jnp.full((), jnp.nan, jnp.float32)
    return RefreshState(jnp.zeros((), jnp.int32), map_mixtures(nan, params['codebooks']))

  def refresh(updates, params):
    landed = jax.tree.map(
      lambda p, u: p + u.astype(p.dtype), *(t['params'] for t in (params, updates))
    )
    leaves = _tree.flatten(landed)[0]
    living = masks_by_path(masks, leaves)
    found = mixtures_by_path(params['codebooks'], leaves)
    fitted = {
      path: fit_step(leaves[path], leaf, living.get(path), kind) for path, leaf in found.items()
    }
    new, error = (iter([pair[i] for pair in fitted.values()]) for i in (0, 1))
    moves = map_mixtures(
      lambda leaf: jax.tree.map(jnp.subtract, next(new), leaf), params['codebooks']
    )
    # Of the dtypes the other branch has.
    moves = jax.tree.map(lambda m, u: m.astype(u.dtype), moves, updates['codebooks'])
    return moves, map_mixtures(lambda _: next(error), params['codebooks'])

  def update(updates, state, params=None, **extra_args):
    del extra_args
    need_params('refresh_codebooks', params)
    _check_tree(params)
    due = (state.count >= begin) & ((state.count + 1) % every == 0)
    if end is not None:
      due &= state.count < end
    moves, error = lax.cond(
      due,
      refresh,
      lambda updates, _: (updates['codebooks'], state.error),
      updates,
      params,
    )
    state = state._replace(count=optax.safe_increment(state.count), error=error)
    return {**updates, 'codebooks': moves}, state

  return optax.GradientTransformationExtraArgs(init, update)


def _check_tree(params: PyTree) -> None:
  if not isinstance(params, Mapping) or set(params) != {'params', 'codebooks'}:
    have = sorted(params) if isinstance(params, Mapping) else type(params).__name__
    raise ValueError(
      'refresh_codebooks is for a chain over both weights and mixtures; call init and update with '
      f"{{'params': params, 'codebooks': codebooks}}, not with {have}."
    )
