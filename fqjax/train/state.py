"""What a training run carries from step to step, and which leaves weight decay touches."""

from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from fqjax.rules import check_chain, masks_of

PyTree = Any


class Averages(NamedTuple):
  """Exponential moving averages of a run.

  Attributes:
    params: average of the parameters, same tree and dtypes.
    model_state: average of the model's state. Batch-norm statistics belong to the weights they were
      gathered under; averaging both with one decay keeps them together.
  """

  params: PyTree
  model_state: PyTree


class TrainState(NamedTuple):
  """Everything a checkpoint holds.

  Attributes:
    step: int32 scalar, the number of finished optimizer steps.
    params: trained parameters, any pytree.
    model_state: non-trained variables, e.g. `{'batch_stats': ...}`; `{}` if the model has none.
    opt_state: state of the optax transformation (masks and duals of rules live here).
    ema: `Averages`, or None when the run keeps none.
    key: the run's PRNG key; step `i` uses `fold_in(key, i)`, so it never changes.
  """

  step: jax.Array
  params: PyTree
  model_state: PyTree
  opt_state: PyTree
  ema: Averages | None
  key: jax.Array


def create_state(
  params: PyTree,
  model_state: PyTree,
  tx: optax.GradientTransformation,
  key: jax.Array,
  ema: bool = False,
) -> TrainState:
  """Builds the state of step 0.

  The arrays are copied: the step donates its state, and your `params` survive that. A chain with
  masks is tried first (`fqjax.rules.check_chain`).

  Args:
    params: pytree of float arrays.
    model_state: pytree of arrays, `{}` if there is none.
    tx: any optax transformation.
    key: a PRNG key, typed (`jax.random.key`) or raw (`jax.random.PRNGKey`).
    ema: also keep moving averages of `params` and `model_state`.

  Returns:
    A `TrainState`.

  Raises:
    ValueError: when masked weights would not stay at zero, or are those of another model.

  Examples:
    >>> state = create_state({'w': jnp.ones(3)}, {}, optax.sgd(0.1), jax.random.key(0))
    >>> int(state.step), state.params['w'].shape
    (0, (3,))
  """
  params, model_state = _owned(params), _owned(model_state)
  opt_state = tx.init(params)
  abstract = any(isinstance(x, Tracer) for x in jax.tree.leaves(params))
  if not abstract and masks_of(opt_state) is not None:
    check_chain(tx, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=_owned(opt_state),
    ema=Averages(_owned(params), _owned(model_state)) if ema else None,
    key=jnp.array(key, copy=True),
  )


def decay_mask(params: PyTree) -> PyTree:
  """Tells optax which leaves weight decay touches: kernels, not biases and norms.

  A kernel is a leaf of two or more dimensions whose name holds neither 'bias' nor 'scale'; the
  gate's logits, [c, 2], are such biases and scales.

  Args:
    params: pytree of arrays (or shapes).

  Returns:
    A tree of bools like `params`, for the `mask` argument of `optax.adamw` and
    `optax.add_decayed_weights`.

  Examples:
    >>> decay_mask({'kernel': jnp.ones((3, 3, 8, 8)), 'bias': jnp.ones(8)})
    {'bias': False, 'kernel': True}
  """

  def is_kernel(path, p):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return p.ndim > 1 and 'bias' not in name and 'scale' not in name

  return jax.tree_util.tree_map_with_path(is_kernel, params)


def _owned(tree: PyTree) -> PyTree:
  # A copy of its own for every leaf: a buffer that appears twice cannot be donated. The dtype
  # written out makes weak types strong, which would otherwise compile the step a second time.
  return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)
