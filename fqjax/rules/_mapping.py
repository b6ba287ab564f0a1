"""Progressive mapping: weights go to their levels a part at a time, the rest retrains around them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fqjax.rules._tree import covered, magnitude, need_params, placed_like, wide

PyTree = Any


class MappingState(NamedTuple):
  """State of `progressive_mapping`. Trees are like the params, None where a leaf stays float.

  Attributes:
    count: int32 scalar, updates so far.
    masks: bool, True lives.
    mapped: bool, True stays on its level.
    z: of the params' dtypes, the levels of the last mapping.
  """

  count: jax.Array
  masks: PyTree
  mapped: PyTree
  z: PyTree


def progressive_mapping(
  plan: Any,
  at: Sequence[int],
  fractions: Sequence[float] = (0.5, 0.75, 0.9, 1.0),
  *,
  masks: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
  """Maps the weights nearest to their levels, holds them there, and lets the others train on.

  At each of the steps `at` the levels are fitted anew to all live weights, which moves those mapped
  already along; of every leaf the fraction nearest to its levels is mapped, including what was. A
  LAST link: it replaces updates. A weight far from its level may miss it by a rounding with its first
  update and has it exactly with the second, so train at least two steps after the last mapping.

  Args:
    plan: of `fqjax.quantize`.
    at: updates before each mapping, ascending, e.g. an epoch apart.
    fractions: of the live weights of every leaf that are mapped then, ascending to 1.
    masks: tree like the params of bool arrays, True lives; None, also for single leaves, where all do.
      Dead weights stay exactly 0.

  Returns:
    An optax transformation; its state holds one buffer of the params' size and two bytes a weight.

  Raises:
    ValueError: for steps and fractions that do not fit each other; from `init`, for NaN or infinite
      weights, or a plan or masks of another model.

  Example:
    >>> from fqjax.quantize import Binary, make_plan
    >>> params = {'fc': jnp.array([[0.5, -1.5, 2.0, -0.8]])}
    >>> tx = optax.chain(
    ...   optax.sgd(0.1),
    ...   progressive_mapping(make_plan(params, [('fc', Binary())]), at=(0, 2), fractions=(0.5, 1)),
    ... )
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...   updates, state = tx.update({'fc': jnp.ones((1, 4))}, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(np.asarray(params['fc']).round(3))
    [[ 0.4 -1.2  1.9 -1.2]]
    [[ 0.3 -1.2  1.8 -1.2]]
    [[ 1.125 -1.125  1.125 -1.125]]
    [[ 1.125 -1.125  1.125 -1.125]]

  Source: Ye et al. 2018 (arXiv 1811.01907), iterative quantization and retraining.
  """
  at, fractions = tuple(at), tuple(fractions)
  if not at or list(at) != sorted(set(at)) or at[0] < 0 or len(at) != len(fractions):
    raise ValueError(
      f'progressive_mapping needs an ascending step for each of its {len(fractions)} fractions, got '
      f'at={at}.'
    )
  if list(fractions) != sorted(set(fractions)) or fractions[0] <= 0 or fractions[-1] != 1:
    raise ValueError(f'fractions={fractions} must ascend from above 0 to 1.')

  def levels(params, masks):
    from fqjax import quantize

    return quantize.project(plan, params, masks)

  def init(params):
    from fqjax.quantize import target

    live = target(plan, masks)(params)[1]
    # Copies: the state may be donated, the masks belong to the caller.
    live = covered(lambda _, m: jnp.array(m, bool), params, live)
    z = covered(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, live)
    mapped = covered(lambda _, m: ~m, params, live)
    state = (placed_like(x, params) for x in (live, mapped, z))
    return MappingState(jnp.zeros((), jnp.int32), *state)

  def remap(state, params):
    stage = jnp.sum(state.count >= jnp.asarray(at, jnp.int32)) - 1
    share = jnp.asarray(fractions, jnp.float32)[stage]
    near = levels(params, state.masks)

    def nearest(p, live, mapped, z):
      from fqjax.sparsity import top_k_mask

      far = jnp.where(mapped, -1.0, magnitude(p - z))
      score = jnp.where(live, -far, -jnp.inf)
      count = jnp.sum(live, dtype=jnp.float32)
      return top_k_mask(score, jnp.round(share * count).astype(jnp.int32)) | (share >= 1) | ~live

    mapped = covered(
      lambda p, live, m, z: nearest(p, live, m & live, z), params, state.masks, state.mapped, near
    )
    z = covered(lambda p, _, z: z.astype(p.dtype), params, state.masks, near)
    return state._replace(mapped=mapped, z=z)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    need_params('progressive_mapping', params)
    due = jnp.any(state.count == jnp.asarray(at, jnp.int32))
    state = lax.cond(due, lambda s: remap(s, params), lambda s: s, state)

    def hold(u, p, mapped, z):
      if mapped is None:
        return u
      # At least as wide as the weight, or the level would be missed by more than a rounding.
      dtype = u.dtype if u.dtype == p.dtype else wide(max(u, p, key=lambda x: x.dtype.itemsize))
      return jnp.where(mapped, z.astype(dtype) - p.astype(dtype), u.astype(dtype))

    updates = jax.tree.map(hold, updates, params, state.mapped, state.z)
    return updates, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def mapped_share(opt_state: PyTree) -> jax.Array:
  """Which share of the live weights stays on its level by now.

  Args:
    opt_state: of a chain with `progressive_mapping`.

  Returns:
    float32 scalar, 0 to 1.

  Raises:
    ValueError: when there is no such link.

  Example:
    >>> from fqjax.quantize import Binary, make_plan
    >>> params = {'fc': jnp.array([[0.5, -1.5, 2.0, -0.1]])}
    >>> tx = progressive_mapping(
    ...   make_plan(params, [('fc', Binary())]), at=(0, 9), fractions=(0.5, 1)
    ... )
    >>> state = tx.update(params, tx.init(params), params)[1]
    >>> print(mapped_share(state))
    0.5
  """
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, MappingState))
  states = [x for x in leaves if isinstance(x, MappingState)]
  if not states:
    raise ValueError('there is no progressive_mapping in this chain.')
  pairs = [
    (jnp.sum(m & live, dtype=jnp.float32), jnp.sum(live, dtype=jnp.float32))
    for state in states
    for m, live in zip(jax.tree.leaves(state.mapped), jax.tree.leaves(state.masks), strict=True)
  ]
  return sum(a for a, _ in pairs) / jnp.maximum(sum(b for _, b in pairs), 1)
