"""Plans: which structure each leaf of a model gets and why; masks from a plan, and their checks."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from fqjax.sparsity import _tree
from fqjax.sparsity._gates import Pooled
from fqjax.sparsity._layers import Layer
from fqjax.sparsity._layout import axes
from fqjax.sparsity._rules import LAYOUTS, PROTECTED, Claim, assign, check_values, fit, resolve
from fqjax.sparsity._select import keep_count, top_k_mask, top_k_masks
from fqjax.sparsity.structures import Structure
from fqjax.sparsity.structures._base import scores_of


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of the model.

  Attributes:
    path: keys joined by '/'.
    shape: of the array.
    layout: one capital per axis; '' where the array stays dense.
    structure: what it gets; None where it stays dense.
    reason: why.
  """

  path: str
  shape: tuple[int, ...]
  layout: str
  structure: Structure | None
  reason: str

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def kept(self) -> int:
    """Number of weights that live; of a `Pooled` leaf its even share."""
    return self.size if self.structure is None else self.structure.kept(self.shape, self.layout)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What every array of a model gets; hashable, so a static argument of jit. Print it.

  Attributes:
    entries: one per array, in the tree's order.
    notes: what a reader must know besides (layouts, leaves that are no arrays, budgets).
  """

  entries: tuple[Entry, ...]
  notes: tuple[str, ...] = ()

  @property
  def pruned(self) -> tuple[Entry, ...]:
    """The entries that have a structure."""
    return tuple(entry for entry in self.entries if entry.structure is not None)

  def __str__(self) -> str:
    return describe(self)


def make_plan(
  params,
  rules: Sequence[tuple],
  *,
  layout: Mapping | None = None,
  layers: Mapping[str, Layer] | None = None,
  dense: Sequence[str] = ('depthwise',),
  protect: Sequence[tuple[str, str]] = PROTECTED,
  unfit: str = 'error',
) -> Plan:
  r"""Decides which structure each array of a model gets.

  Args:
    params: any pytree (Linen dict, `nnx.State`, Equinox module, Haiku params); arrays, or
      `jax.ShapeDtypeStruct`s where no structure is made from values.
    rules: ordered (regex, structure) or (regex, structure, layout); the first whose regex matches
      the whole path wins. None leaves the leaf dense; a function (weights, layout) -> structure
      makes one for each leaf (a codebook, say).
    layout: rank -> layout for rules that name none; default {4: 'HWIO', 3: 'HIO', 2: 'IO'}, which
      is Flax's and Haiku's. Equinox: {4: 'OIHW', 3: 'OIH', 2: 'OI'}.
    layers: from `trace_layers`. Tells first and last layers, groups and depthwise convolutions, and
      refuses a layout that the network contradicts.
    dense: kinds of layers left dense whatever the rules say, of 'first', 'last' (both need
      `layers`) and 'depthwise'. Without `layers` a kernel with one input counts as depthwise.
    protect: (regex, reason) of arrays that are never pruned, on whole paths, case ignored; biases,
      normalisation, embedding tables and tokens by default. Arrays of rank below 2 never are.
    unfit: where a structure does not fit a leaf, 'error', or 'dense' to leave that leaf dense.

  Returns:
    A `Plan`; `print(plan)` shows every array, what it gets and why.

  Raises:
    ValueError: for a rule that matches nothing or prunes nothing, weights that are NaN or infinite,
      a structure that does not fit, an array without a layout.

  Example:
    >>> params = {
    ...   'conv1': {'kernel': jnp.ones((3, 3, 1, 8)), 'bias': jnp.ones(8)},
    ...   'fc': {'kernel': jnp.ones((72, 10))},
    ... }
    >>> print(make_plan(params, [('conv1/.*', None), ('.*/kernel', Unstructured(keep=0.1))]))
    layer         shape    layout  gets                        kept  why
    -----------------------------------------------------------------------------------------
    conv1/bias    8                dense                    8  100%  bias: never pruned
    conv1/kernel  3x3x1x8          dense                   72  100%  rule 1 'conv1/.*': dense
    fc/kernel     72x10    IO      Unstructured(keep=0.1)  72   10%  rule 2 '.*/kernel'
    -----------------------------------------------------------------------------------------
    pruned leaves keep 72 of 720 weights (10x), the model 152 of 800 (5.26x)
    layout by rank, where the rule names none: 4 HWIO, 3 HIO, 2 IO (Flax's default)
  """
  claims, others = assign(params, rules, layout, protect, dense, layers)
  plan = Plan(tuple(decide(s, unfit) for s in claims), notes(layout, others))
  _check_pools(plan)
  return plan


def decide(claim: Claim, unfit: str = 'error') -> Entry:
  """The entry of a claim; raises ValueError where a structure does not fit."""
  if unfit not in ('error', 'dense'):
    raise ValueError(f"unfit={unfit!r} must be 'error' or 'dense'.")
  shape = tuple(claim.leaf.shape)
  if claim.value is None:
    return Entry(claim.path, shape, '', None, claim.reason)
  check_values(claim)
  structure = resolve(claim.value, claim)
  if problem := fit(structure, claim):
    if unfit == 'dense':
      return Entry(claim.path, shape, '', None, f'{claim.reason}: does not fit, dense: {problem}')
    raise ValueError(
      f'{claim.path!r} {list(shape)} ({claim.rule}): {problem} To leave such layers dense: '
      f"unfit='dense', or a rule before it: ({claim.path!r}, None)."
    )
  return Entry(claim.path, shape, claim.layout, structure, claim.reason)


def notes(layout: Mapping | None, others: Sequence[str]) -> tuple[str, ...]:
  """What `describe` says below the table."""
  named = ', '.join(f'{rank} {letters}' for rank, letters in (layout or LAYOUTS).items())
  whose = "Flax's default" if layout is None else 'as given'
  lines = [f'layout by rank, where the rule names none: {named} ({whose})']
  if others:
    lines.append(f'no arrays: {", ".join(others)}')
  return tuple(lines)


def _check_pools(plan: Plan):
  first: dict[str, Entry] = {}
  for entry in plan.pruned:
    if isinstance(entry.structure, Pooled):
      other = first.setdefault(entry.structure.scope, entry)
      if other.structure != entry.structure:
        raise ValueError(
          f'scope {entry.structure.scope!r} has {other.structure} ({other.path!r}) and '
          f'{entry.structure} ({entry.path!r}); one scope has one budget: name two scopes.'
        )


def project(plan: Plan, params, *, saliency=None, frozen=None):
  """Nearest weights that the plan allows, and which of them live.

  Args:
    plan: from `make_plan`; static under jit.
    params: the tree the plan was made for, with any values.
    saliency: tree like `params` (leaves the plan leaves dense may be None); ranks in place of the
      squared weights. See `magnitude`, `taylor`, `loss_change`.
    frozen: tree like `params` of bool arrays, or None for a leaf; True marks weights that stay
      zero: `jax.tree.map(jnp.logical_not, masks)` goes on from earlier masks.

  Returns:
    params: same tree; zeros where the mask is False, leaves without structure untouched.
    masks: tree like `params`; bool arrays, True lives, None for leaves without structure.

  Raises:
    ValueError: when `params`, `saliency` or `frozen` are not of the plan's model.

  Example:
    >>> params = {'fc': {'kernel': jnp.array([[3.0, -1.0], [2.0, -4.0]]), 'bias': jnp.ones(2)}}
    >>> plan = make_plan(params, [('.*/kernel', Unstructured(keep=0.5))])
    >>> pruned, masks = project(plan, params)
    >>> print(pruned['fc']['kernel'], masks['fc']['bias'])
    [[ 3.  0.]
     [ 0. -4.]] None
  """
  leaves, treedef = _tree.flatten(params)
  check_model(plan, leaves)
  pruned = {entry.path: entry for entry in plan.pruned}
  scores = {} if saliency is None else _tree.by_path(saliency, leaves, 'saliency', pruned)
  dead = {} if frozen is None else _tree.by_path(frozen, leaves, 'frozen', ())
  new, masks = dict(leaves), dict.fromkeys(leaves)
  pools: dict[str, list[str]] = {}
  for path, entry in pruned.items():
    if isinstance(entry.structure, Pooled):
      pools.setdefault(entry.structure.scope, []).append(path)
      continue
    new[path], masks[path] = project_leaf(
      entry.structure, entry.layout, leaves[path], scores.get(path), dead.get(path)
    )
  for paths in pools.values():
    found = _project_pool(
      tuple(pruned[p] for p in paths),
      *({p: x[p] for p in paths if p in x} for x in (leaves, scores, dead)),
    )
    for path, mask in zip(paths, found, strict=True):
      masks[path] = mask
      new[path] = jnp.where(mask, leaves[path], jnp.zeros_like(leaves[path]))
  return treedef.unflatten(new.values()), treedef.unflatten(masks.values())


# Compiled once for each structure and shape, also where the caller does not.
@functools.partial(jax.jit, static_argnums=(0, 1))
def project_leaf(structure, layout, w, saliency, frozen):
  """As `Structure.project`."""
  return structure.project(w, layout, saliency=saliency, frozen=frozen)


@functools.partial(jax.jit, static_argnums=0)
def _project_pool(entries: tuple[Entry, ...], leaves, scores, dead) -> list[jax.Array]:
  pool = entries[0].structure
  assert isinstance(pool, Pooled)
  ranked, orders = [], []
  for entry in entries:
    order = sum(axes(entry.layout, len(entry.shape)), ())
    score = scores_of(leaves[entry.path], scores.get(entry.path), dead.get(entry.path), 1)
    least = top_k_mask(score, min(pool.least, entry.size), order=order)
    ranked.append(jnp.where(least, jnp.inf, score))
    orders.append(order)
  widest = jnp.float64 if any(s.dtype == jnp.float64 for s in ranked) else jnp.float32
  masks = top_k_masks([s.astype(widest) for s in ranked], pool_count(entries), orders)
  return [
    mask & ~dead[entry.path].astype(bool) if entry.path in dead else mask
    for entry, mask in zip(entries, masks, strict=True)
  ]


def pool_count(entries: Sequence[Entry]) -> int:
  """Weights that the leaves of one scope keep together."""
  pool = entries[0].structure
  assert isinstance(pool, Pooled) and pool.keep is not None
  least = sum(min(pool.least, entry.size) for entry in entries)
  return max(least, keep_count(pool.keep, sum(e.size for e in entries), pool.rounding))


def check_model(plan, leaves):
  """Raises ValueError unless a plan, of this kind or another, is of the model of these leaves."""
  shapes = {path: tuple(x.shape) for path, x in leaves.items() if _tree.is_array(x)}
  for entry in plan.entries:
    if entry.path not in shapes:
      raise ValueError(
        f'the plan is of another model: it has {entry.path!r}, the parameters do not (closest: '
        f'{_tree.nearest(entry.path, shapes)}). Make a plan for these parameters.'
      )
    if shapes[entry.path] != entry.shape:
      raise ValueError(
        f'the plan is of another model: {entry.path!r} is {list(entry.shape)} in the plan and '
        f'{list(shapes[entry.path])} in the parameters. Make a plan for these parameters.'
      )
  extra = set(shapes) - {entry.path for entry in plan.entries}
  if extra:
    raise ValueError(
      f'the plan is of another model: the parameters have {min(extra)!r}, the plan does not. Make '
      'a plan for these parameters.'
    )


def check_masks(plan: Plan, masks) -> None:
  """Refuses masks that are not this plan's: another model, another plan, a layer cut through.

  Args:
    plan: what the masks should follow.
    masks: tree like the parameters, bool arrays, None where nothing is pruned. Abstract masks are
      checked for paths, shapes and dtypes only.

  Raises:
    ValueError: naming the layer, what is wrong, and the remedy.

  Example:
    >>> params = {'fc': {'kernel': jnp.ones((4, 2))}}
    >>> plan = make_plan(params, [('.*', Unstructured(keep=0.5))])
    >>> check_masks(plan, project(plan, params)[1])
    >>> check_masks(plan, {'fc': {'kernel': jnp.zeros((4, 2), bool)}})
    Traceback (most recent call last):
    ValueError: the mask of 'fc/kernel' keeps nothing; keep a weight, or take the layer out of the model.
  """
  entries = {entry.path: entry for entry in plan.entries}
  shapes = {path: jax.ShapeDtypeStruct(entry.shape, bool) for path, entry in entries.items()}
  pruned = [entry.path for entry in plan.pruned]
  for path, mask in _tree.by_path(masks, shapes, 'the tree of masks', pruned).items():
    entry = entries[path]
    if mask.dtype != bool:
      raise ValueError(f'the mask of {path!r} is {mask.dtype}; make it bool: mask != 0.')
    if entry.structure is None:
      raise ValueError(
        f'the mask of {path!r} is of another plan: this one leaves it dense ({entry.reason}).'
      )
    if not _tree.has_values(mask):
      continue
    kept = int(jnp.sum(mask))
    if not kept:
      raise ValueError(
        f'the mask of {path!r} keeps nothing; keep a weight, or take the layer out of the model.'
      )
    if kept > entry.kept and not isinstance(entry.structure, Pooled):
      raise ValueError(
        f'the mask of {path!r} is of another plan: it keeps {kept} weights, {brief(entry.structure)} '
        f'keeps {entry.kept}. Project with this plan.'
      )


def describe(plan: Plan) -> str:
  """Table of every array: what it gets, how much of it lives, and why.

  Args:
    plan: from `make_plan` or `allocate`.

  Returns:
    Text; see `make_plan` for an example.
  """
  head = ('layer', 'shape', 'layout', 'gets', '', 'kept', 'why')
  rows = [_row(entry) for entry in plan.entries]
  return '\n'.join([*table([head, *rows], right=(4, 5)), _totals(plan), *plan.notes])


def table(rows: Sequence[tuple[str, ...]], right: Sequence[int]) -> list[str]:
  """Lines of a table, the head first and between rules; columns in `right` end flush."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  rule = '-' * max(map(len, lines))
  return [lines[0], rule, *lines[1:], rule]


def _row(entry: Entry) -> tuple[str, ...]:
  shape = 'x'.join(map(str, entry.shape))
  if entry.structure is None:
    return (entry.path, shape, '', 'dense', f'{entry.size:,}', '100%', entry.reason)
  gets = brief(entry.structure)
  if isinstance(entry.structure, Pooled):
    return (entry.path, shape, entry.layout, gets, 'shared', '', entry.reason)
  share = f'{100 * entry.kept / entry.size:.3g}%'
  return (entry.path, shape, entry.layout, gets, f'{entry.kept:,}', share, entry.reason)


def _totals(plan: Plan) -> str:
  pools: dict[str, list[Entry]] = {}
  kept = 0
  for entry in plan.pruned:
    if isinstance(entry.structure, Pooled):
      pools.setdefault(entry.structure.scope, []).append(entry)
    else:
      kept += entry.kept
  kept += sum(pool_count(entries) for entries in pools.values())
  size = sum(entry.size for entry in plan.pruned)
  whole = sum(entry.size for entry in plan.entries)
  left = kept + whole - size
  if not size:
    return f'nothing is pruned; the model has {whole:,} weights'
  return (
    f'pruned leaves keep {kept:,} of {size:,} weights ({size / kept:.3g}x), '
    f'the model {left:,} of {whole:,} ({whole / left:.3g}x)'
  )


def brief(structure) -> str:
  """A structure on one line: fields that are not the default, long tuples by their length."""
  if not dataclasses.is_dataclass(structure):
    return str(structure)
  parts = []
  for field in dataclasses.fields(structure):
    value = getattr(structure, field.name)
    if value == field.default:
      continue
    if dataclasses.is_dataclass(value):
      text = brief(value)
    elif isinstance(value, tuple) and len(value) > 4:
      text = f'({value[0]!r}, ... {len(value)} in all)'
    else:
      text = repr(value)
    parts.append(f'{field.name}={text}')
  return f'{type(structure).__name__}({", ".join(parts)})'
