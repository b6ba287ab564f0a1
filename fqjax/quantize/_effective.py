"""Trees of mixtures beside trees of params: what the network sees, and what trains at which rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.quantize._blend import MODES, indices, mixture_weights
from fqjax.quantize._components import check_sizes, is_mixture
from fqjax.quantize._mixture import Mixture
from fqjax.quantize._plan import Plan
from fqjax.sparsity import _tree
from fqjax.sparsity._plan import check_model
from fqjax.tracing import leaf_name

PyTree = Any


def init_dgms(params: PyTree, plan: Plan, *, masks: PyTree = None) -> PyTree:
  """Starts the mixtures of a plan from trained weights.

  Train them beside the params: `jax.grad` of the loss of `effective_params(params, codebooks, 'soft')`
  by both. Deterministic, on the host, outside jit; no key.

  Args:
    params: the trained weights, the tree the plan was made for.
    plan: from `make_plan`, with `Mixture` for some leaves; other quantizers are passed by.
    masks: tree like `params` of bool arrays, True lives, None where all do.

  Returns:
    Tree like `params`: a `MixtureLeaf` where the plan has a `Mixture` (`RawMixtureLeaf` with parity),
    None elsewhere. A pytree of small float32 arrays: checkpoints and averages take it as it is.

  Raises:
    ValueError: for NaN or infinite weights, a plan or masks of another model, or a plan without a
      mixture.

  Example:
    >>> params = {'fc': {'kernel': jnp.linspace(-1, 1, 12).reshape(4, 3), 'bias': jnp.ones(3)}}
    >>> plan = make_plan(params, [('.*/kernel', Mixture(4))])
    >>> codebooks = init_dgms(params, plan)
    >>> print(np.asarray(codebooks['fc']['kernel'].mu).round(2), codebooks['fc']['bias'])
    [-0.73  0.36  0.82] None

  Source: Dong et al., ICML 2022, from the released code: k-means, shares and deviations of its
  clusters. Here the zero is pinned before k-means, not after.
  """
  leaves, treedef = _tree.flatten(params)
  check_model(plan, leaves)
  living = masks_by_path(masks, leaves)
  found = dict.fromkeys(leaves)
  for entry in plan.quantized:
    if not isinstance(entry.quantizer, Mixture):
      continue
    try:
      found[entry.path] = entry.quantizer.start(leaves[entry.path], living.get(entry.path))
    except ValueError as e:
      raise ValueError(f'{entry.path!r} {list(entry.shape)}: {e}') from e
  if not any(is_mixture(x) for x in found.values()):
    raise ValueError(
      "no layer of the plan gets a mixture; name one, e.g. make_plan(params, [('.*/kernel', "
      'Mixture(16))]).'
    )
  return treedef.unflatten(found.values())


def effective_params(
  params: PyTree,
  codebooks: PyTree,
  mode: str,
  *,
  masks: PyTree = None,
  temperature: Any = None,
  assignments: PyTree = None,
) -> PyTree:
  """The params as the network sees them: `apply(effective_params(params, codebooks, 'soft'), x)`.

  Evaluate in 'hard' mode only. Works under jit, grad, vmap and any sharding; `mode` is static. The
  gradients of 'soft' and 'anneal' are exact and keep no array of K x N; they are reverse-mode only.

  Args:
    params: the trained weights.
    codebooks: from `init_dgms`, trained or not.
    mode: 'soft', 'ste', 'anneal', 'hard' or 'float'; see `mixture_weights`.
    masks: tree like `params` of bool arrays, True lives, None where all do. Masked weights are
      exactly 0, in every mode, in leaves without a mixture too.
    temperature: of 'soft' (each mixture's own by default) and 'anneal' (a schedule of the step).
    assignments: from `freeze_assignments`, with 'hard': only the means still move.

  Returns:
    A tree like `params`.

  Raises:
    ValueError: for another mode, or codebooks, masks or assignments of another model.

  Example:
    >>> params = {'fc': {'kernel': jnp.linspace(-1, 1, 6).reshape(3, 2), 'bias': jnp.ones(2)}}
    >>> codebooks = init_dgms(params, make_plan(params, [('.*/kernel', Mixture(3))]))
    >>> print(effective_params(params, codebooks, 'hard')['fc']['kernel'])
    [[-0.8 -0.8]
     [ 0.   0. ]
     [ 0.8  0.8]]

  Source: Dong et al., ICML 2022 ('soft' and 'hard').
  """
  if mode not in MODES:
    raise ValueError(f'mode={mode!r} must be one of {MODES}.')
  leaves, treedef = _tree.flatten(params)
  mixtures = mixtures_by_path(codebooks, leaves)
  living = masks_by_path(masks, leaves)
  chosen = (
    {} if assignments is None else _tree.by_path(assignments, leaves, 'assignments', mixtures)
  )
  result = {}
  for path, w in leaves.items():
    if path in mixtures:
      result[path] = mixture_weights(
        w,
        mixtures[path],
        mode,
        mask=living.get(path),
        temperature=temperature,
        assignments=chosen.get(path),
      )
    elif path in living:
      result[path] = jnp.where(living[path], w, jnp.zeros_like(w))
    else:
      result[path] = w
  return treedef.unflatten(result.values())


def freeze_assignments(params: PyTree, codebooks: PyTree, *, masks: PyTree = None) -> PyTree:
  """Which level every weight has, to keep it there: `effective_params(..., assignments=...)`.

  Also the export: `codebook(leaf)[assignments]` are the weights of 'hard' mode, bit for bit.

  Args:
    params: the trained weights.
    codebooks: from `init_dgms`, trained or not.
    masks: tree like `params` of bool arrays, True lives; the others get index 0, which is zero.

  Returns:
    Tree like `params` of uint8 arrays, None where there is no mixture.

  Raises:
    ValueError: for codebooks or masks of another model.

  Example:
    >>> params = {'fc': {'kernel': jnp.linspace(-1, 1, 6).reshape(3, 2), 'bias': jnp.ones(2)}}
    >>> codebooks = init_dgms(params, make_plan(params, [('.*/kernel', Mixture(3))]))
    >>> print(freeze_assignments(params, codebooks)['fc']['kernel'])
    [[1 1]
     [0 0]
     [2 2]]
  """
  leaves, treedef = _tree.flatten(params)
  mixtures = mixtures_by_path(codebooks, leaves)
  living = masks_by_path(masks, leaves)
  return treedef.unflatten(
    [
      indices(w, mixtures[path], living.get(path)) if path in mixtures else None
      for path, w in leaves.items()
    ]
  )


def labels(params: PyTree, codebooks: PyTree) -> dict[str, PyTree]:
  """What each array of `{'params': params, 'codebooks': codebooks}` is, for `optax.partition`.

  Args:
    params: the weights.
    codebooks: from `init_dgms`.

  Returns:
    `{'params': ..., 'codebooks': ...}`, trees of strings: 'weights' (of leaves with a mixture),
    'other', 'mu', 'sigma', 'pi' and 'tau'.

  Raises:
    ValueError: for codebooks of another model.

  Example:
    >>> params = {'fc': {'kernel': jnp.linspace(-1, 1, 6).reshape(3, 2), 'bias': jnp.ones(2)}}
    >>> codebooks = init_dgms(params, make_plan(params, [('.*/kernel', Mixture(3))]))
    >>> rates = {'weights': 1e-2, 'other': 1e-2, 'mu': 1e-3, 'sigma': 1e-3, 'pi': 1e-3}
    >>> tx = optax.partition(
    ...   {name: optax.sgd(rate) for name, rate in rates.items()} | {'tau': optax.set_to_zero()},
    ...   labels(params, codebooks),
    ... )
    >>> labels(params, codebooks)['params']
    {'fc': {'bias': 'other', 'kernel': 'weights'}}
  """
  leaves, treedef = _tree.flatten(params)
  mixtures = mixtures_by_path(codebooks, leaves)
  return {
    'params': treedef.unflatten(['weights' if path in mixtures else 'other' for path in leaves]),
    'codebooks': map_mixtures(lambda leaf: type(leaf)('mu', 'sigma', 'pi', 'tau'), codebooks),
  }


def map_mixtures(fn: Callable, codebooks: PyTree) -> PyTree:
  """Applies `fn` to the mixture of every leaf."""
  return jax.tree.map(fn, codebooks, is_leaf=is_mixture)


def mixtures_by_path(codebooks: PyTree, leaves: dict[str, Any]) -> dict[str, Any]:
  """Mixtures by the path of their weights; raises ValueError where they are not of this model."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(codebooks, is_leaf=is_mixture):
    name = leaf_name(path)
    if not is_mixture(leaf):
      raise ValueError(
        f'codebooks hold {type(leaf).__name__} at {name!r}, not a mixture: restore a checkpoint with '
        'the tree of init_dgms as its template.'
      )
    if name not in leaves:
      raise ValueError(
        f'the codebooks are of another model: they have {name!r}, the parameters do not (closest: '
        f'{_tree.nearest(name, leaves)}). Make them with init_dgms(params, plan).'
      )
    try:
      check_sizes(leaf)
    except ValueError as e:
      raise ValueError(f'{name!r}: {e}') from None
    found[name] = leaf
  if not found:
    raise ValueError('the codebooks hold no mixture; make them with init_dgms(params, plan).')
  return found


def masks_by_path(masks: PyTree, leaves: dict[str, Any]) -> dict[str, Any]:
  """Masks by the path of their weights; raises ValueError where they are not of this model."""
  if masks is None:
    return {}
  return _tree.by_path(masks, leaves, 'the tree of masks')
