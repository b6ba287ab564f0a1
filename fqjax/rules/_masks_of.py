"""Masks of a run, and the trial that a chain keeps them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqjax.rules._keep_masked import KeepMaskedState
from fqjax.rules._pruned import PrunedState
from fqjax.rules._tree import apply_masks, beside, names

PyTree = Any

_WITH_MASKS = (KeepMaskedState, PrunedState)


def masks_of(opt_state: PyTree) -> PyTree | None:
  """The masks that the rules in an optimizer state hold at present.

  Args:
    opt_state: of any chain, however nested.

  Returns:
    Tree like the params of bool arrays, True lives, None leaves without a mask; where several rules
    mask a leaf, what all of them keep. None when there is no rule with masks.

  Example:
    >>> from fqjax.rules import keep_masked
    >>> tx = optax.chain(optax.adam(0.1), keep_masked({'w': jnp.array([True, False])}))
    >>> print(masks_of(tx.init({'w': jnp.ones(2)})))
    {'w': Array([ True, False], dtype=bool)}
  """
  found = []

  def look(x):
    if isinstance(x, _WITH_MASKS):
      found.append(x.masks)
      if isinstance(x, PrunedState):
        jax.tree.map(look, x.inner_state, is_leaf=lambda y: isinstance(y, _WITH_MASKS))

  jax.tree.map(look, opt_state, is_leaf=lambda x: isinstance(x, _WITH_MASKS))
  if not found:
    return None
  masks = found[0]
  for other in found[1:]:
    masks = jax.tree.map(
      lambda a, b: b if a is None else a if b is None else a & b,
      masks,
      other,
      is_leaf=lambda x: x is None,
    )
  return masks


def check_chain(
  tx: optax.GradientTransformation,
  params: PyTree,
  *,
  steps: int = 3,
  limit: int = 64,
  **extra_args: Any,
) -> None:
  """Tries a chain on random weights and gradients: masked weights must end at exactly zero.

  A link cannot see its neighbours; this can. Costs a few optimizer steps on a copy of the params.

  Args:
    tx: the chain, with `keep_masked` or another rule that holds masks.
    params: the weights it is for; only shapes and dtypes matter.
    steps: how many times weights must be zero after a step.
    limit: steps after which a chain that moves nothing (gradient accumulation) is given up.
    **extra_args: what the chain's `update` needs besides params.

  Raises:
    ValueError: naming the leaf and the remedy; or when the chain holds no masks, or never steps.

  Example:
    >>> from fqjax.rules import keep_masked
    >>> masks = {'w': jnp.array([True, False])}
    >>> check_chain(optax.chain(optax.sgd(0.1), keep_masked(masks)), {'w': jnp.ones(2)})
    >>> try:
    ...   check_chain(optax.chain(keep_masked(masks), optax.sgd(0.1)), {'w': jnp.ones(2)})
    ... except ValueError as e:
    ...   print(str(e)[:53])
    1 of 1 masked weights of w are not zero after a step:
  """
  state = tx.init(params)
  if masks_of(state) is None:
    raise ValueError(
      'check_chain found no masks in the state of this chain. Add fq.rules.keep_masked(masks) as its'
      ' last link.'
    )

  @jax.jit
  def step(i, params, state):
    params = jax.tree.map(lambda n, p: jnp.where(i == 1, n, p), _noise(params, 0), params)
    updates, state = optax.with_extra_args_support(tx).update(
      _noise(params, i), state, params, **extra_args
    )
    params = optax.apply_updates(params, updates)
    masks = beside(params, masks_of(state))
    dead = [None if m is None else jnp.sum(~m) for m in masks]
    wrong = [
      None if m is None else jnp.sum(jnp.where(m, False, p != 0))
      for p, m in zip(jax.tree.leaves(params), masks, strict=True)
    ]
    moved = jnp.any(jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)]))
    return params, state, dead, wrong, moved

  trial, done = params, 0
  for i in range(1, limit + 1):
    trial, state, dead, wrong, moved = step(jnp.int32(i), trial, state)
    done += bool(moved)
    if not done:  # accumulating: nothing has been applied yet
      continue
    for name, n, w in zip(names(params), dead, wrong, strict=True):
      if w is not None and int(w):
        raise ValueError(
          f'{int(w)} of {int(n)} masked weights of {name} are not zero after a step: a link behind'
          ' the masks changes updates. Make keep_masked the last link:'
          ' optax.chain(..., fq.rules.keep_masked(masks)), and put clipping, decay and learning'
          ' rates before it.'
        )
    if done == steps:
      return
  raise ValueError(
    f'check_chain: no update but zero in {limit} steps. Pass limit= above the number of steps that'
    ' the chain accumulates, or look at its learning rate.'
  )


def _noise(tree: PyTree, i: Any) -> PyTree:
  """Numbers in (-1, 1) without a pattern. Compiles in a fraction of what `jax.random` takes."""

  def one(number, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    n = jnp.arange(x.size, dtype=jnp.float32)
    wave = jnp.sin(n * 12.9898 + jnp.asarray(i, jnp.float32) * 78.233 + number)
    return (2 * ((wave * 43758.547) % 1) - 1).reshape(x.shape).astype(x.dtype)

  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten([one(number, x) for number, x in enumerate(leaves)])


def mask_averages(averages: PyTree, opt_state: PyTree) -> PyTree:
  """Averages of weights with the zeros of the run.

  An average begun before the masks holds what has died since.

  Args:
    averages: tree like the params.
    opt_state: of the run.

  Returns:
    `averages`, masked by `masks_of(opt_state)` if there are any.

  Example:
    >>> from fqjax.rules import keep_masked
    >>> state = keep_masked({'w': jnp.array([True, False])}).init({'w': jnp.ones(2)})
    >>> print(mask_averages({'w': jnp.array([0.9, 0.2])}, state)['w'])
    [0.9 0. ]
  """
  return apply_masks(averages, masks_of(opt_state))
