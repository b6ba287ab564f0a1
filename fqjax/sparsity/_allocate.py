"""How much of each layer lives, under one budget for all of them."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import numpy as np

from fqjax.sparsity import _tree
from fqjax.sparsity._gates import Pooled
from fqjax.sparsity._knapsack import knapsack
from fqjax.sparsity._layers import Layer
from fqjax.sparsity._plan import Entry, Plan, decide, notes, project_leaf
from fqjax.sparsity._rules import (
  PROTECTED,
  Claim,
  assign,
  call,
  check_values,
  fit,
  is_structure,
  resolve,
)
from fqjax.sparsity.structures import Unstructured

GRID = tuple(round(2 ** (-k / 2), 4) for k in range(1, 13))
"""Kept fractions a knapsack tries: half steps of two, down to 1/64."""

_COSTS = ('weights', 'bits', 'bytes', 'macs')


def allocate(
  params,
  rules: Sequence[tuple],
  *,
  keep: float | Mapping[str, float] | None = None,
  budget: float | None = None,
  method: str = 'knapsack',
  cost: str = 'weights',
  saliency=None,
  floors: Sequence[tuple[str, float]] = (),
  macs: Mapping[str, int] | None = None,
  grid: Sequence[float] = GRID,
  layout: Mapping | None = None,
  layers: Mapping[str, Layer] | None = None,
  dense: Sequence[str] = ('depthwise',),
  protect: Sequence[tuple[str, str]] = PROTECTED,
  unfit: str = 'error',
) -> Plan:
  """A plan in which the layers that the rules select share one budget.

  Rules are those of `make_plan`, with structures left open: a function kept fraction -> structure
  (or -> function (weights, layout) -> structure), or for the knapsack a tuple to choose from
  (structures, functions (weights, layout) -> structure, None for dense). A structure is what its
  layers get, and is paid from the budget. Layers left dense are outside it.

  Method 'uniform' gives the same kept fraction to all; 'erk' fractions proportional to (sum of
  dimensions)/(product of dimensions), at most 1 (Erdos-Renyi kernels: small layers stay denser);
  'knapsack' the choices that keep the most saliency in total. With a dict as `keep` each layer gets
  what the dict says, and there is no method.

  Args:
    params: any pytree of arrays.
    rules: as described; first match wins.
    keep: budget as a fraction of the dense cost of the layers that rules give something; or
      {regex: kept fraction}, first match wins.
    budget: the same as a number, in units of `cost`. One of the two.
    method: 'uniform', 'erk' or 'knapsack'.
    cost: what is budgeted: 'weights' (kept), 'bits' or 'bytes' (as stored, index and tables
      included; knapsack only), 'macs' (multiply-accumulates left).
    saliency: tree like `params`: what a weight is worth, and which weights of a layer live. Default
      w**2 / ||W||**2, which knows nothing of the loss and starves large layers; better from a few
      batches: `loss_change(params, fisher(...))`.
    floors: (regex, kept fraction) below which a layer must not fall, first match wins; e.g. the
      first and the last layer.
    macs: path -> multiply-accumulates of the dense layer; default those of `layers`.
    grid: kept fractions that a knapsack tries of a function; dense is always one more choice.
    layout: as in `make_plan`.
    layers: as in `make_plan`.
    dense: as in `make_plan`.
    protect: as in `make_plan`.
    unfit: as in `make_plan`; a choice that does not fit a layer is passed over either way.

  Returns:
    A `Plan` whose notes say what was spent, and for the knapsack how far the best may be.

  Raises:
    ValueError: as `make_plan`; and for a budget that cannot be met, a floor or a regex that matches
      nothing, a method that cannot use the rules.

  Example:
    >>> params = {'a': {'kernel': jnp.ones((4, 4))}, 'b': {'kernel': 9 * jnp.ones((16, 16))}}
    >>> rules = [('.*/kernel', lambda keep: Unstructured(keep=keep))]
    >>> plan = allocate(params, rules, keep=0.25, method='erk')
    >>> [(entry.path, entry.kept) for entry in plan.entries]
    [('a/kernel', 14), ('b/kernel', 54)]

  Source: 'erk' Evci et al., "Rigging the Lottery", ICML 2020; 'knapsack' see `knapsack`.
  """
  if (keep is None) == (budget is None):
    raise ValueError(f'give keep= or budget=, exactly one; got keep={keep}, budget={budget}.')
  if cost not in _COSTS or method not in ('uniform', 'erk', 'knapsack'):
    raise ValueError(
      f"cost={cost!r} must be one of {_COSTS}, method={method!r} 'uniform', 'erk' or 'knapsack'."
    )
  claims, others = assign(params, rules, layout, protect, dense, layers)
  open_claims = [claim for claim in claims if claim.value is not None]
  for claim in open_claims:
    check_values(claim)
  lines = list(notes(layout, others))
  if isinstance(keep, Mapping):
    entries = _given(open_claims, keep, unfit)
  else:
    if keep is not None and not 0 < keep <= 1:
      raise ValueError(f'keep={keep} must be in (0, 1]; for a ratio r it is 1/r.')
    prices = dense_costs(open_claims, cost, _macs(macs, layers))
    whole = sum(prices.values())
    total = keep * whole if keep is not None else float(budget or 0)
    low = check_floors(open_claims, floors)
    if method == 'knapsack':
      entries, chosen = _knapsack(
        params, open_claims, prices, total, low, cost, saliency, grid, unfit
      )
      spent, quality = chosen.cost, f'; {percent(chosen.value, chosen.bound)} of the best possible'
    else:
      if cost in ('bits', 'bytes'):
        raise ValueError(f"cost={cost!r} depends on the structures; it needs method='knapsack'.")
      entries = _proportional(open_claims, prices, total, low, method, cost, unfit)
      spent, quality = sum(_paid(e, prices) for e in entries.values()), ''
    lines.append(
      f'{method}: {number(spent)} of {number(whole)} {cost} for a budget of {number(total)}'
      f'{quality}'
    )
  return Plan(tuple(entries.get(s.path) or decide(s) for s in claims), tuple(lines))


# Kept fractions by rule of thumb.


def _given(claims: list[Claim], keeps: Mapping[str, float], unfit: str) -> dict[str, Entry]:
  used, entries = set(), {}
  for claim in claims:
    if is_structure(claim.value):
      continue
    pattern = next((p for p in keeps if re.fullmatch(p, claim.path)), None)
    if pattern is None:
      raise ValueError(
        f'keep says nothing for {claim.path!r} ({claim.rule}); add it, or a last entry for the rest: '
        "{..., '.*': 0.5}."
      )
    used.add(pattern)
    entries[claim.path] = _make(claim, keeps[pattern], f'keep {pattern!r}', unfit)
  if unused := [p for p in keeps if p not in used]:
    raise ValueError(
      f'keep: {unused[0]!r} selects no open layer. Closest: '
      f'{_tree.nearest(unused[0], [s.path for s in claims])}.'
    )
  return entries


def _proportional(claims, prices, total, low, method, cost, unfit) -> dict[str, Entry]:
  fixed = [claim for claim in claims if is_structure(claim.value)]
  entries = {claim.path: decide(claim, unfit) for claim in fixed}
  free = [claim for claim in claims if not is_structure(claim.value)]
  if not free:
    raise ValueError('every rule has its structure; nothing is left to allocate: use make_plan.')
  left = total - sum(_paid(entry, prices) for entry in entries.values())
  ratio = [1.0 if method == 'uniform' else _erk(claim.leaf.shape) for claim in free]
  keeps = spread([prices[s.path] for s in free], ratio, [low[s.path] for s in free], left, free)
  keeps = _whole_counts(keeps, [s.leaf.size for s in free], left if cost == 'weights' else 0)
  for claim, kept in zip(free, keeps, strict=True):
    entries[claim.path] = _make(claim, kept, method, unfit)
  return entries


def _erk(shape: tuple[int, ...]) -> float:
  return sum(shape) / math.prod(shape)


def spread(prices, ratios, low, total: float, claims: list[Claim]) -> list[float]:
  """Kept fractions proportional to `ratios`, within [low, 1], that cost `total` together."""
  prices, ratios, low = (np.asarray(x, np.float64) for x in (prices, ratios, low))
  least = float(prices @ low)
  if total < least * (1 - 1e-12):
    worst = int(np.argmax(prices * low))
    raise ValueError(
      f'a budget of {number(total)} cannot be met: the least that the layers need is '
      f'{number(least)}, most of it {claims[worst].path!r} ({number(prices[worst] * low[worst])}). '
      'Raise the budget or lower the floors.'
    )

  def cost_at(level):
    return float(prices @ np.clip(level * ratios, low, 1))

  top = float(1 / ratios.min())
  if total >= cost_at(top):
    return [1.0] * len(prices)
  bottom = 0.0
  for _ in range(200):  # bisection to the last bit
    middle = (bottom + top) / 2
    bottom, top = (middle, top) if cost_at(middle) <= total else (bottom, middle)
  return np.clip(bottom * ratios, low, 1).tolist()


def _whole_counts(keeps, sizes, total: float) -> list[float]:
  """The fractions as whole numbers of weights; what `total` has left to the largest remainders."""
  exact = np.asarray(keeps) * np.asarray(sizes)
  counts = np.floor(exact + 1e-6)
  spare = int(min(math.floor(total + 1e-6), round(float(exact.sum()))) - counts.sum())
  order = np.argsort(counts - exact, kind='stable')
  counts[order[: max(0, spare)]] += 1
  counts = np.clip(counts, 1, sizes)
  return (counts / np.asarray(sizes)).tolist()


def _make(claim: Claim, keep: float, why: str, unfit: str) -> Entry:
  if not callable(claim.value):
    raise ValueError(
      f'{claim.rule} gives {claim.path!r} {claim.value!r}; for kept fractions give a function: '
      'lambda keep: Unstructured(keep=keep).'
    )
  if keep == 1:
    reason = f'{claim.reason}; {why}: keep 1'
    return Entry(claim.path, tuple(claim.leaf.shape), '', None, reason)
  made = _no_pool(claim, call(claim, claim.value, keep))
  return decide(claim._replace(value=made, reason=f'{claim.reason}; {why}'), unfit)


def _no_pool(claim: Claim, made):
  if isinstance(made, Pooled):
    raise ValueError(
      f'{claim.rule} gives {claim.path!r} {made}, whose leaves already share one budget; use it in '
      'make_plan, or Unstructured here.'
    )
  return made


# Kept fractions by what is kept.


class _Choice(NamedTuple):
  structure: Any  # None: dense
  cost: float
  value: float


def _knapsack(params, claims, prices, total, low, cost, saliency, grid, unfit):
  leaves = _tree.flatten(params)[0]
  worth = {}
  if saliency is not None:
    worth = _tree.by_path(saliency, leaves, 'saliency', [claim.path for claim in claims])
  menus, entries = {}, {}
  for claim in claims:
    choices, problem = _choices(claim, worth.get(claim.path), prices, cost, grid)
    if not choices:
      if unfit == 'error':
        raise ValueError(
          f'{claim.path!r} {list(claim.leaf.shape)} ({claim.rule}): no choice fits: {problem} To leave '
          "such layers dense: unfit='dense'."
        )
      choices = [_Choice(None, prices[claim.path], 0.0)]
      claim = claim._replace(reason=f'{claim.reason}: does not fit, dense: {problem}')
    above = [c for c in choices if _share(c.structure, claim) >= low[claim.path] - 1e-9]
    if not above:
      raise ValueError(
        f'{claim.path!r} ({claim.rule}): every choice is below its floor {low[claim.path]}; add one '
        'that keeps more, or None (dense).'
      )
    menus[claim.path] = (claim, above)
  least = {path: min(c.cost for c in menu) for path, (_, menu) in menus.items()}
  if sum(least.values()) > total * (1 + 1e-9):
    worst = max(least, key=lambda path: least[path])
    raise ValueError(
      f'a budget of {number(total)} {cost} cannot be met: the smallest choices need '
      f'{number(sum(least.values()))}, most of it {worst!r} ({number(least[worst])}). Raise the '
      'budget, lower the floors, or offer smaller choices.'
    )
  chosen = knapsack(
    [[c.cost for c in menu] for _, menu in menus.values()],
    [[c.value for c in menu] for _, menu in menus.values()],
    total,
  )
  for (path, (claim, menu)), index in zip(menus.items(), chosen.choice, strict=True):
    structure, shape = menu[index].structure, tuple(claim.leaf.shape)
    if len(menu) == 1:
      why = claim.reason
    else:
      why = f'{claim.reason}; knapsack: {index + 1} of {len(menu)} choices'
    if low[path] > 0:
      why += f', floor {low[path]:g}'
    entries[path] = Entry(path, shape, claim.layout if structure else '', structure, why)
  return entries, chosen


def _choices(claim: Claim, worth, prices, cost, grid) -> tuple[list[_Choice], str]:
  """What a layer may get, and why the rest does not fit."""
  if is_structure(claim.value):
    menu = [claim.value]
  elif isinstance(claim.value, tuple | list):
    menu = list(claim.value)
  elif callable(claim.value):
    menu = [None, *(call(claim, claim.value, keep) for keep in grid)]
  else:
    raise ValueError(
      f'{claim.rule} gives {claim.path!r} {claim.value!r}; give a structure, a tuple to choose from, '
      'or a function kept fraction -> structure.'
    )
  choices, problem = [], 'the menu is empty.'
  for item in menu:
    structure = _no_pool(claim, resolve(item, claim))
    if structure is not None and (problem_here := fit(structure, claim)):
      problem = problem_here
      continue
    choices.append(_Choice(structure, _price(structure, claim, worth, prices, cost), 0.0))
  values = _values([c.structure for c in choices], claim, worth)
  return [c._replace(value=v) for c, v in zip(choices, values, strict=True)], problem


def _values(structures, claim: Claim, worth) -> list[float]:
  """Saliency that each structure keeps of a layer, float64 sums on the host."""
  host = host_scores(claim, worth)
  falling = None
  values = []
  for structure in structures:
    if structure is None:
      values.append(float(host.sum()))
    elif type(structure) is Unstructured:
      # The commonest menu by far: one sort in place of a compiled projection per choice.
      if falling is None:
        falling = np.cumsum(np.sort(host, axis=None)[::-1])
      values.append(float(falling[structure.kept(host.shape, claim.layout) - 1]))
    else:
      mask = project_leaf(structure, claim.layout, claim.leaf, worth, None)[1]
      values.append(float(host.sum(where=np.asarray(mask))))
  return values


def host_scores(claim: Claim, worth) -> np.ndarray:
  """What each weight is worth, float64: the saliency, or the share of the layer's energy."""
  if not _tree.has_values(claim.leaf):
    raise ValueError(
      f'{claim.path!r} is abstract, and its weights are to be compared; call with the arrays, '
      'outside jit.'
    )
  if worth is None:
    scores = np.square(np.asarray(claim.leaf, np.float64))
    return scores / max(scores.sum(), np.finfo(np.float64).tiny)
  scores = np.asarray(worth, np.float64)
  if not np.isfinite(scores).all() or scores.min() < 0:
    raise ValueError(
      f'the saliency of {claim.path!r} must be finite and >= 0; look at its gradients.'
    )
  return scores


# Costs.


def _macs(macs, layers) -> Mapping[str, int] | None:
  if macs is not None or layers is None:
    return macs
  return {path: layer.macs for path, layer in layers.items()}


def dense_costs(claims: list[Claim], cost: str, macs) -> dict[str, float]:
  """What each layer costs dense, by path."""
  if not claims:
    raise ValueError('no rule gives a layer anything; there is nothing to allocate.')
  if cost == 'macs':
    if macs is None:
      raise ValueError(
        "cost='macs' needs macs={path: number}, or layers=trace_layers(apply_fn, params, inputs)."
      )
    missing = [claim.path for claim in claims if claim.path not in macs]
    if missing:
      raise ValueError(
        f'macs has nothing for {missing[0]!r} (closest: {_tree.nearest(missing[0], macs)}); add '
        'it, or leave that layer to a rule with None.'
      )
    return {claim.path: float(macs[claim.path]) for claim in claims}
  unit = {'weights': 1, 'bytes': 1, 'bits': 8}[cost]
  if cost == 'weights':
    return {claim.path: float(claim.leaf.size) for claim in claims}
  return {claim.path: float(claim.leaf.size * claim.leaf.dtype.itemsize * unit) for claim in claims}


def _share(structure, claim: Claim) -> float:
  if structure is None:
    return 1.0
  return structure.kept(tuple(claim.leaf.shape), claim.layout) / claim.leaf.size


def _price(structure, claim: Claim, worth, prices, cost: str) -> float:
  if structure is None or cost in ('weights', 'macs'):
    return prices[claim.path] * _share(structure, claim)
  pruned = project_leaf(structure, claim.layout, claim.leaf, worth, None)[0]
  bits = structure.bits(pruned, claim.layout).total
  return bits if cost == 'bits' else bits / 8


def _paid(entry: Entry, prices) -> float:
  return prices[entry.path] * entry.kept / entry.size


def check_floors(claims: list[Claim], floors) -> dict[str, float]:
  """The floor of each layer, by path; 0 without one."""
  low = {}
  for claim in claims:
    low[claim.path] = next((f for p, f in floors if re.fullmatch(p, claim.path)), 0.0)
  for pattern, floor in floors:
    if not any(re.fullmatch(pattern, claim.path) for claim in claims):
      raise ValueError(
        f'floor {pattern!r} selects no layer of the budget. Closest: '
        f'{_tree.nearest(pattern, [s.path for s in claims])}.'
      )
    if not 0 <= floor <= 1:
      raise ValueError(f'floor ({pattern!r}, {floor}) must be a kept fraction, 0..1.')
  return low


def number(x: float) -> str:
  """A cost in a message."""
  return f'{x:,.0f}' if x >= 100 else f'{x:.4g}'


def percent(part: float, whole: float) -> str:
  """A share in a note."""
  return f'{100 * part / whole:.2f}%' if whole else '100%'
