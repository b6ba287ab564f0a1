"""The ADMM pull: weights are drawn to their own projection until the cut changes nothing."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fqjax.rules._projection import projection
from fqjax.rules._tree import apply_masks, covered, magnitude, need_params, placed_like, wide

PyTree = Any
_TINY = 1e-30


class AdmmState(NamedTuple):
  """State of `admm`. Trees are like the params, None where the target leaves a leaf alone.

  Attributes:
    count: int32 scalar, updates so far.
    z: the targets, of the params' dtypes: the last projection.
    u: the scaled duals, float32 or wider: what every weight has been held back so far.
    rho: float32 scalar, the strength of the pull.
    support: bool, the mask of `z`.
    gap: float32 scalars |w - z| / |w| at the last refresh; the cut costs little below 0.02.
    dual: float32 scalars |u| / |w|; a dual that grows without end is a rho below the bound.
    bound: float32 scalars, largest |gradient| of a dead over smallest |w| of a live weight: the
      support is stable for rho above it. From the gradient of one batch, so an estimate, and a high
      one.
    changed: float32 scalars, share of weights that joined or left the support.
  """

  count: jax.Array
  z: PyTree
  u: PyTree
  rho: jax.Array
  support: PyTree
  gap: PyTree
  dual: PyTree
  bound: PyTree
  changed: PyTree


def admm(
  target: Any,
  rho: float | Sequence[float],
  every: int,
  *,
  growth: float | Callable[[jax.Array, jax.Array], jax.Array] = 1.0,
  rho_max: float = math.inf,
  rescale_dual: bool = True,
  stage_steps: int | None = None,
  levels: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adds `rho (w - z + u)` to the gradients and refreshes z and u every so many updates.

  A refresh is `z = project(w + u)`, `u += w - z`. Start from trained weights and finish with
  `finalize` and `keep_masked`. The FIRST link: what follows sees the gradient of the penalised
  loss. (Between `scale_by_adam` and the learning rate it is the decoupled variant.) Two such links
  with two targets are ADMM with two splits; one target that projects on both constraints at once
  needs less memory, and settles where two may cycle.

  Small rho with many refreshes lets u grow until the support cycles: refresh seldom, let rho grow,
  or restart. See `diagnostics`.

  Args:
    target: a plan, or a callable tree -> (tree, masks) with None masks for leaves it leaves alone.
    rho: strength of the pull. Several: one for each stage, e.g. `(1e-4, 1e-3, 1e-2, 1e-1)`.
    every: updates between refreshes.
    growth: rho is multiplied by it at every refresh. Or a function of the residuals |w - z| and
      |z - z_before| (float32 scalars, over all leaves) that returns the factor.
    rho_max: rho does not grow beyond it. Plain SGD diverges from rho = 2 / learning rate on.
    rescale_dual: when rho changes, u becomes `u rho_before / rho`, so that the forces stay.
    stage_steps: updates per stage. A stage starts with its rho, u = 0 and z projected anew; the
      learning rate is yours to restart, e.g. `lambda count: schedule(count % stage_steps)`.
    levels: `(tree, masks) -> tree`, a projection onto levels of what the target kept; the joint
      projection of both where it rounds monotonically.

  Returns:
    An optax transformation; see `AdmmState`. Two buffers of the params' size.

  Raises:
    ValueError: for settings that make no sense.

  Example:
    >>> largest = lambda tree: (apply_masks(tree, {'w': tree['w'] > 2}), {'w': tree['w'] > 2})
    >>> a = {'w': jnp.array([3.0, 1.0, 0.5])}  # pulled by the loss |w - a|^2 / 2
    >>> tx = optax.chain(admm(largest, rho=1.0, every=1), optax.sgd(0.5))
    >>> params, state = a, tx.init(a)
    >>> for _ in range(3):
    ...   grads = jax.tree.map(jnp.subtract, params, a)
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params['w'])
    [3.     0.125  0.0625]

  Source: Zhang et al., "A Systematic DNN Weight Pruning Framework using ADMM", ECCV 2018; Ma et al.,
  ADMM-NN-S, TNNLS 2021 (restarts).
  """
  rhos = tuple(rho) if isinstance(rho, Sequence) else (rho,)
  _check(rhos, every, growth, rho_max, stage_steps)
  project_target = projection(target)

  def project(tree):
    z, masks = project_target(tree)
    return (z if levels is None else apply_masks(levels(z, masks), masks)), masks

  def init(params):
    z, support = project(params)
    z = covered(lambda p, _, z: z.astype(p.dtype), params, support, z)
    zero = covered(lambda p, _: jnp.zeros((), jnp.float32), params, support)
    # Duals are sums of many small steps: bfloat16 would stop counting.
    u = covered(lambda p, _: jnp.zeros_like(p, dtype=wide(p)), params, support)
    return AdmmState(
      count=jnp.zeros((), jnp.int32),
      z=placed_like(z, params),
      u=placed_like(u, params),
      rho=jnp.asarray(rhos[0], jnp.float32),
      support=placed_like(support, params),
      gap=zero,
      dual=zero,
      bound=zero,
      changed=zero,
    )

  def refresh(state, params, grads, stage, restart):
    duals = covered(lambda p, u: jnp.where(restart, 0, u), params, state.u)
    held = jax.tree.map(lambda p, u: p if u is None else p.astype(u.dtype) + u, params, duals)
    z, support = project(held)
    z = covered(lambda p, _, z: z.astype(p.dtype), params, support, z)
    apart = covered(lambda p, u, z: p.astype(u.dtype) - z.astype(u.dtype), params, duals, z)
    moved = covered(lambda p, u, a, b: (a - b).astype(u.dtype), params, duals, z, state.z)
    factor = growth(_norm(apart), _norm(moved)) if callable(growth) else growth
    grown = jnp.minimum(state.rho * factor, jnp.maximum(rho_max, state.rho))
    rho = jnp.where(restart, jnp.asarray(rhos, jnp.float32)[stage], grown).astype(jnp.float32)
    rescale = state.rho / rho if rescale_dual else jnp.ones((), jnp.float32)
    u = covered(
      lambda p, u, d: jnp.where(restart, 0, (u + d) * rescale.astype(u.dtype)), params, duals, apart
    )
    size = covered(lambda p, _: jnp.maximum(_norm(p), _TINY), params, support)
    return AdmmState(
      count=state.count,
      z=z,
      u=u,
      rho=rho,
      support=support,
      gap=covered(lambda p, s, d: _norm(d) / s, params, size, apart),
      dual=covered(lambda p, s, u: _norm(u) / s, params, size, u),
      bound=covered(lambda p, m, g: _bound(p, m, g), params, support, grads),
      changed=covered(
        lambda p, a, b: jnp.mean(a != b, dtype=jnp.float32), params, support, state.support
      ),
    )

  def update(updates, state, params=None, **extra_args):
    del extra_args
    need_params('admm', params)
    length = stage_steps or jnp.iinfo(jnp.int32).max
    stage = jnp.minimum(state.count // length, len(rhos) - 1)
    offset = state.count - stage * length
    restart = (stage > 0) & (offset == 0)
    due = restart | ((offset > 0) & (offset % every == 0))
    state = lax.cond(
      due,
      lambda state: refresh(state, params, updates, stage, restart),
      lambda state: state,
      state,
    )

    def pull(g, u, p, z):
      if u is None:
        return g
      away = p.astype(u.dtype) - z.astype(u.dtype) + u
      return (g.astype(u.dtype) + state.rho.astype(u.dtype) * away).astype(g.dtype)

    updates = jax.tree.map(pull, updates, state.u, params, state.z)
    return updates, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def reset_duals(target: Any, opt_state: PyTree, params: PyTree, rho: float | None = None) -> PyTree:
  """Restarts ADMM from the weights as they are: u = 0, z projected anew.

  For restarts decided while training; those planned ahead are the stages of `admm`.

  Args:
    target: that of `admm`.
    opt_state: of a chain with one `admm`, or an `AdmmState`.
    params: the weights.
    rho: the new strength; unchanged by default.

  Returns:
    `opt_state` with a fresh `AdmmState`; its count goes on.

  Raises:
    ValueError: when there is not exactly one `AdmmState`.

  Example:
    >>> target = lambda tree: (tree, {'w': tree['w'] != 0})
    >>> params = {'w': jnp.array([3.0, 0.0])}
    >>> state = reset_duals(target, admm(target, 1e-3, 10).init(params), params, rho=1e-2)
    >>> print(state.rho)
    0.01
  """
  found = _states(opt_state)
  if len(found) != 1:
    raise ValueError(
      f'reset_duals needs one AdmmState, found {len(found)}: name the one to restart.'
    )
  fresh: Any = admm(target, float(found[0].rho) if rho is None else rho, 1).init(params)
  fresh = fresh._replace(count=found[0].count)
  return jax.tree.map(
    lambda x: fresh if isinstance(x, AdmmState) else x,
    opt_state,
    is_leaf=lambda x: isinstance(x, AdmmState),
  )


def diagnostics(opt_state: PyTree) -> dict[str, jax.Array]:
  """How far ADMM is, the worst leaf of each: numbers for the log.

  Stop when `admm_gap` is small and `admm_changed` zero. A gap that stays while `admm_dual` grows
  asks for a larger rho: above `admm_bound` supports do not cycle.

  Args:
    opt_state: of a chain with `admm` links, in a jitted function or out of it.

  Returns:
    float32 scalars `admm_gap`, `admm_dual`, `admm_bound`, `admm_changed`, `admm_rho`; of a second
    link `admm2_gap` and so on. Empty without such a link.

  Example:
    >>> target = lambda tree: (tree, {'w': tree['w'] != 0})
    >>> state = admm(target, 1e-3, 10).init({'w': jnp.ones(2)})
    >>> sorted(diagnostics(state))
    ['admm_bound', 'admm_changed', 'admm_dual', 'admm_gap', 'admm_rho']
  """
  result = {}
  for i, state in enumerate(_states(opt_state)):
    prefix = f'admm{i + 1 if i else ""}'
    for name in ('gap', 'dual', 'bound', 'changed'):
      values = jax.tree.leaves(getattr(state, name))
      result[f'{prefix}_{name}'] = jnp.max(jnp.stack(values)) if values else jnp.zeros(())
    result[f'{prefix}_rho'] = state.rho
  return result


def _states(opt_state) -> list[AdmmState]:
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AdmmState))
  return [x for x in leaves if isinstance(x, AdmmState)]


def _check(rhos, every, growth, rho_max, stage_steps) -> None:
  if not rhos or min(rhos) <= 0:
    raise ValueError(f'admm needs rho > 0, got {rhos}.')
  if every < 1:
    raise ValueError(f'admm refreshes every so many updates, from 1; got every={every}.')
  if not callable(growth) and growth < 1:
    raise ValueError(f'growth={growth} multiplies rho at every refresh and must be >= 1.')
  if rho_max < max(rhos):
    raise ValueError(f'rho_max={rho_max} is below rho={max(rhos)}.')
  if (len(rhos) > 1) != (stage_steps is not None):
    raise ValueError(
      f'several rho need stage_steps, the updates per stage, and one rho needs none; got rho={rhos},'
      f' stage_steps={stage_steps}.'
    )
  if stage_steps is not None and stage_steps <= every:
    raise ValueError(
      f'stage_steps={stage_steps} must exceed every={every}, or a stage ends before its first refresh.'
    )


def _norm(tree: PyTree) -> jax.Array:
  squares = [jnp.sum(jnp.square(x.astype(wide(x)))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(x.astype(jnp.float32) for x in squares))


def _bound(p, mask, grad) -> jax.Array:
  pruned = jnp.max(jnp.where(mask, 0, magnitude(grad))).astype(jnp.float32)
  kept = jnp.min(jnp.where(mask, magnitude(p), jnp.inf)).astype(jnp.float32)
  return pruned / jnp.maximum(kept, _TINY)
