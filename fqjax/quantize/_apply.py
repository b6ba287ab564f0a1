"""A plan on a whole tree: codebooks, the nearest weights, a target for ADMM, straight-through."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._plan import Plan
from fqjax.sparsity import _tree
from fqjax.sparsity._plan import check_model

PyTree = Any


def fit(plan: Plan, params: PyTree, masks: PyTree = None, *, exact: bool = False) -> PyTree:
  """The codebook of every quantized leaf: for mapping with levels that stay as they are.

  Args:
    plan: from `make_plan`; static under jit.
    params: the tree the plan was made for, with any values.
    masks: tree like `params` of bool arrays, True lives; None, also for single leaves, where all do.
    exact: look for the best of all scales, on the host; the fixed-cost search otherwise.

  Returns:
    Tree like `params`: a codebook [K] or [O, K], None where the leaf stays float.

  Raises:
    ValueError: for NaN or infinite weights, or a plan or masks of another model.

  Example:
    >>> from fqjax.quantize import Interval, make_plan
    >>> params = {'fc': jnp.array([[-0.9, -0.35, -0.2, 0.1, 0.4, 0.55, 1.3]])}
    >>> plan = make_plan(params, [('fc', Interval(bits=2))])
    >>> print(fit(plan, params, exact=True)['fc'].round(3))
    [ 0.    -0.923 -0.462  0.462  0.923]
  """
  leaves, treedef = _tree.flatten(params)
  live = checked(plan, leaves, masks)
  found = dict.fromkeys(leaves)
  for entry in plan.quantized:
    w, mask = leaves[entry.path], live.get(entry.path)
    method = getattr(entry.quantizer, 'fit_exact', None) if exact else None
    if method is not None:
      found[entry.path] = method(np.asarray(w, np.float64), entry.layout, mask)
    else:
      found[entry.path] = fit_leaf(entry.quantizer, entry.layout, w, mask)
  return treedef.unflatten(found.values())


def project(
  plan: Plan, params: PyTree, masks: PyTree = None, *, codebooks: PyTree = None
) -> PyTree:
  """The nearest weights that the plan allows.

  As `functools.partial(project, plan)` it is the `levels=` of `fqjax.rules.admm` and
  `fqjax.rules.finalize`: pruning and levels together.

  Args:
    plan: from `make_plan`; static under jit.
    params: the tree the plan was made for, with any values.
    masks: tree like `params` of bool arrays, True lives; None, also for single leaves, where all do.
    codebooks: from `fit`; by default fitted to these weights.

  Returns:
    Like `params`: levels, exact zeros where the mask is False; leaves without quantizer untouched.
    A leaf whose live weights are all 0 stays 0; with fewer distinct weights than levels some
    levels stay unused.

  Raises:
    ValueError: for NaN or infinite weights, or a plan, masks or codebooks of another model.

  Example:
    >>> from fqjax.quantize import Binary, make_plan
    >>> params = {'fc': jnp.array([[0.5, -1.5], [1.0, -0.1]]), 'bias': jnp.ones(2)}
    >>> masks = {'fc': jnp.array([[True, True], [True, False]]), 'bias': None}
    >>> plan = make_plan(params, [('fc', Binary())])
    >>> print(project(plan, params, masks)['fc'])
    [[ 1. -1.]
     [ 1.  0.]]
  """
  leaves, treedef = _tree.flatten(params)
  live = checked(plan, leaves, masks)
  tables = given(plan, leaves, treedef, codebooks)
  new = dict(leaves)
  for entry in plan.quantized:
    path, how = entry.path, (entry.quantizer, entry.layout)
    w, mask = leaves[path], live.get(path)
    # Fitted by a program of its own, as `encode` does: both get the same codebook to the bit.
    table = tables[path] if path in tables else fit_leaf(*how, w, mask)
    new[path] = _project_leaf(*how, w, mask, table)
  return treedef.unflatten(new.values())


# Compiled once for each quantizer and shape, also where the caller does not.
@functools.partial(jax.jit, static_argnums=(0, 1))
def fit_leaf(quantizer, layout, w, mask):
  """The codebook of a leaf."""
  return quantizer.fit(w, layout, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _project_leaf(quantizer, layout, w, mask, codebook):
  return quantizer.project(w, layout, mask, codebook)


def checked(plan: Plan, leaves: Mapping[str, Any], masks: PyTree) -> dict[str, jax.Array]:
  """Masks by path; raises ValueError for another model or weights that are not finite."""
  check_model(plan, leaves)
  for entry in plan.quantized:
    w = leaves[entry.path]
    if _tree.has_values(w):
      # On the host where all of it is here: nothing to compile.
      finite = (np if getattr(w, 'is_fully_addressable', True) else jnp).isfinite(w)
      if not bool(finite.all()):
        raise ValueError(
          f'{entry.path!r} holds NaN or infinite weights; no level is nearest to them. Restore a '
          'checkpoint from before they appeared, and lower the learning rate or rho.'
        )
  if masks is None:
    return {}
  found = _tree.by_path(masks, leaves, 'the tree of masks')
  for path, mask in found.items():
    if mask.dtype != bool:
      raise ValueError(f'the mask of {path!r} is {mask.dtype}; make it bool: mask != 0.')
  return found


def given(plan: Plan, leaves: Mapping[str, Any], treedef, codebooks: PyTree) -> dict[str, Any]:
  """Codebooks by path, checked against the plan; none where none are given."""
  if codebooks is None:
    return {}
  try:
    listed = treedef.flatten_up_to(codebooks)
  except ValueError as e:
    raise ValueError(
      'the codebooks are of another model: not a tree like the params with None where a leaf stays '
      'float. Make them from these: codebooks = fit(plan, params).'
    ) from e
  found = dict(zip(leaves, listed, strict=True))
  for entry in plan.quantized:
    if found[entry.path] is None:
      raise ValueError(f'the codebooks have nothing for {entry.path!r}: fit(plan, params).')
    assert entry.quantizer is not None
    try:
      entry.quantizer.check_codebook(found[entry.path], entry.shape, entry.layout)
    except ValueError as e:
      raise ValueError(f'the codebooks are of another plan or model: {entry.path!r}: {e}') from e
  return {entry.path: found[entry.path] for entry in plan.quantized}


def target(plan: Plan, masks: PyTree = None) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
  """Levels alone as a target of `fqjax.rules.admm` and `fqjax.rules.finalize`.

  For pruning and levels in one run give `admm` the pruning plan as target and
  `functools.partial(project, plan)` as `levels`. A leaf that is to have levels but not to be pruned
  needs a structure there too: `Unstructured(keep=1.0)`.

  Args:
    plan: from `make_plan`.
    masks: of a network that is pruned already, tree like the params; what is dead stays dead.

  Returns:
    tree -> (nearest tree, masks): True, or the given mask, for quantized leaves, None for others.

  Example:
    >>> from fqjax import rules
    >>> from fqjax.quantize import Binary, make_plan
    >>> params = {'fc': jnp.array([[0.5, -1.5, 2.0, -0.1]])}
    >>> plan = make_plan(params, [('fc', Binary())])
    >>> tx = optax.chain(rules.admm(target(plan), rho=1e-2, every=100), optax.adam(1e-3))
    >>> print(tx.init(params)[0].z['fc'])
    [[ 1.025 -1.025  1.025 -1.025]]
  """

  def to_levels(tree):
    leaves, treedef = _tree.flatten(tree)
    live = checked(plan, leaves, masks)
    found = dict.fromkeys(leaves)
    for entry in plan.quantized:
      mask = live.get(entry.path)
      found[entry.path] = jnp.ones(entry.shape, bool) if mask is None else jnp.asarray(mask)
    return project(plan, tree, masks), treedef.unflatten(found.values())

  return to_levels


def straight_through(plan: Plan) -> Callable[..., PyTree]:
  """A function that quantizes params for the forward pass and lets every live gradient through.

  The trained params stay float; finish with `project`. Use it inside the loss:
  `apply(quantized(params, masks), x)`.

  Args:
    plan: from `make_plan`.

  Returns:
    (params, masks=None, codebooks=None) -> params on levels, differentiable: the derivative is 1, and 0
    for masked weights. Levels are fitted at every call unless codebooks are given; searched ones
    (`Interval`, `PowerOfTwo`, `Uniform(clip='mse')`) are worth keeping for an epoch.

  Example:
    >>> from fqjax.quantize import Uniform, make_plan
    >>> params = {'fc': jnp.array([[1.0, 0.3], [-0.4, 0.0]])}
    >>> quantized = straight_through(make_plan(params, [('fc', Uniform(bits=2))]))
    >>> print(quantized(params)['fc'])
    [[1.  0.3]
     [0.  0. ]]
    >>> print(jax.grad(lambda p: jnp.sum(quantized(p)['fc'] ** 2))(params)['fc'])
    [[2.  0.6]
     [0.  0. ]]

  Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
  """
  paths = {entry.path for entry in plan.quantized}

  def quantized(params, masks=None, codebooks=None):
    nearest = project(plan, lax.stop_gradient(params), masks, codebooks=codebooks)
    leaves, treedef = _tree.flatten(params)
    live = {} if masks is None else _tree.by_path(masks, leaves, 'the tree of masks')

    def one(path, w, z):
      if path not in paths:
        return w
      # w - w is exactly 0: the value is z, the derivative that of w.
      slope = w - lax.stop_gradient(w)
      return z + (jnp.where(live[path], slope, 0) if path in live else slope)

    pairs = zip(leaves.items(), treedef.flatten_up_to(nearest), strict=True)
    return treedef.unflatten([one(path, w, z) for (path, w), z in pairs])

  return quantized
