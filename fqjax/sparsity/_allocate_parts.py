"""One budget for parts of layers: taps of kernels (PCNN), blocks of rows (DARB)."""

from collections.abc import Mapping, Sequence
import re

import numpy as np

from fqjax.sparsity import _tree
from fqjax.sparsity._allocate import check_floors, dense_costs, host_scores, number, percent
from fqjax.sparsity._knapsack import Chosen, knapsack
from fqjax.sparsity._layers import Layer
from fqjax.sparsity._layout import kernel_shape, to_kernels, to_rows
from fqjax.sparsity._plan import Plan, decide, notes
from fqjax.sparsity._rules import PROTECTED, Claim, assign, check_values
from fqjax.sparsity.structures.rows import Darb


def tap_counts(
  params,
  rules: Sequence[tuple],
  *,
  keep: float,
  saliency=None,
  floors: Sequence[tuple[str, int]] = (),
  macs: Mapping[str, int] | None = None,
  layout: Mapping | None = None,
  layers: Mapping[str, Layer] | None = None,
  dense: Sequence[str] = ('depthwise',),
  protect: Sequence[tuple[str, str]] = PROTECTED,
) -> dict[str, int]:
  """How many taps n each kernel of a layer keeps, layers sharing one budget: PCNN's n.

  The knapsack's choices are n = 1..taps, worth the best n of every kernel.

  Args:
    params: any pytree of arrays.
    rules: (regex, True) for layers that take part, (regex, None) for others; first match wins. A
      third item names the layout.
    keep: kept fraction of all weights (of all `macs`, if given) of those layers.
    saliency: tree like `params`, e.g. `loss_change(params, fisher(...))`; default w**2 / ||W||**2,
      which starves the largest layer: say floors, or pass one.
    floors: (regex, least n), first match wins; 1 elsewhere. PCNN advises 4 for the first layer and
      for depthwise ones.
    macs: path -> multiply-accumulates, to budget those in place of weights.
    layout: as in `make_plan`.
    layers: as in `make_plan`.
    dense: as in `make_plan`.
    protect: as in `make_plan`.

  Returns:
    path -> n for every layer that takes part; n of all taps means dense.

  Raises:
    ValueError: when the budget cannot be met, or a floor or rule matches nothing.

  Example:
    >>> params = {
    ...   'a': {'kernel': jnp.ones((2, 2, 1, 3))},
    ...   'b': {'kernel': jnp.eye(4).reshape(2, 2, 2, 2)},
    ... }
    >>> tap_counts(params, [('.*/kernel', True)], keep=0.5, dense=())
    {'a/kernel': 3, 'b/kernel': 1}

  Source: Tan et al., "PCNN", DAC 2020; the automatic choice is ours.
  """
  claims, _ = assign(params, rules, layout, protect, dense, layers)
  claims = [claim for claim in claims if claim.value is not None]
  low = {s.path: next((n for p, n in floors if re.fullmatch(p, s.path)), 1) for s in claims}
  for pattern, _ in floors:
    check_floors(claims, [(pattern, 0.0)])
  leaves = _tree.flatten(params)[0]
  worth = {}
  if saliency is not None:
    worth = _tree.by_path(saliency, leaves, 'saliency', [claim.path for claim in claims])
  prices = dense_costs(claims, 'weights' if macs is None else 'macs', macs)
  costs, values = [], []
  for claim in claims:
    check_values(claim)
    o, i, m = kernel_shape(claim.leaf.shape, claim.layout)
    if not 1 <= low[claim.path] <= m:
      raise ValueError(f'floor {low[claim.path]} of {claim.path!r} must be 1..{m}, its taps.')
    scores = host_scores(claim, worth.get(claim.path))
    best = -np.sort(-to_kernels(scores, claim.layout).reshape(o * i, m), axis=1)
    n = np.arange(low[claim.path], m + 1)
    values.append(np.cumsum(best.sum(0))[n - 1])
    costs.append(prices[claim.path] * n / m)
  chosen = _solve(costs, values, keep * sum(prices.values()), claims)
  return {s.path: low[s.path] + int(c) for s, c in zip(claims, chosen.choice, strict=True)}


def allocate_blocks(
  params,
  rules: Sequence[tuple],
  *,
  keep: float,
  cost: str = 'weights',
  menu: Sequence[int] = tuple(range(8)),
  value_bits: int = 8,
  saliency=None,
  layout: Mapping | None = None,
  layers: Mapping[str, Layer] | None = None,
  dense: Sequence[str] = ('depthwise',),
  protect: Sequence[tuple[str, str]] = PROTECTED,
) -> Plan:
  """A plan of `Darb`, the block of every row of every matrix chosen under one budget.

  The knapsack's groups are rows of all layers together, its choices the exponents, worth what
  block maxima keep.

  Args:
    params: any pytree of arrays.
    rules: (regex, True) for layers that take part, (regex, None) for others; first match wins. A
      third item names the layout.
    keep: kept fraction, of all weights, or of their bits at `value_bits` each.
    cost: 'weights', or 'bits': a kept weight costs `value_bits` and its index e bits, a row 3 bits.
    menu: exponents e; blocks of 2**e columns.
    value_bits: of a stored weight.
    saliency: tree like `params`, e.g. `loss_change(params, fisher(...))`; default w**2 / ||W||**2.
    layout: as in `make_plan`.
    layers: as in `make_plan`.
    dense: as in `make_plan`.
    protect: as in `make_plan`.

  Raises:
    ValueError: when the budget cannot be met, or a rule matches nothing.

  Example:
    >>> params = {'fc': {'kernel': jnp.array([[9.0, 0.1], [8.0, 0.1], [9.0, 0.1], [7.0, 0.1]])}}
    >>> plan = allocate_blocks(params, [('.*/kernel', True)], keep=5 / 8, menu=(0, 1, 2))
    >>> plan.entries[0].structure
    Darb(exponents=(0, 2))

  Source: Ren et al., "DARB", AAAI 2020; the allocation across layers is ours.
  """
  if cost not in ('weights', 'bits'):
    raise ValueError(f"cost={cost!r} must be 'weights' or 'bits'.")
  claims, others = assign(params, rules, layout, protect, dense, layers)
  open_claims = [claim for claim in claims if claim.value is not None]
  worth = {}
  if saliency is not None:
    leaves = _tree.flatten(params)[0]
    worth = _tree.by_path(saliency, leaves, 'saliency', [claim.path for claim in open_claims])
  exponents = np.asarray(sorted(menu))
  costs, values, whole = [], [], 0.0
  for claim in open_claims:
    check_values(claim)
    rows = to_rows(host_scores(claim, worth.get(claim.path)), claim.layout)
    kept = -(-rows.shape[1] // 2**exponents)
    price = kept if cost == 'weights' else kept * (value_bits + exponents) + 3
    costs.append(np.broadcast_to(price, (len(rows), len(exponents))))
    values.append(np.stack([_block_energy(rows, 2 ** int(e)) for e in exponents], 1))
    whole += rows.size * (1 if cost == 'weights' else value_bits)
  chosen = _solve(np.concatenate(costs), np.concatenate(values), keep * whole, open_claims)
  entries, at = {}, 0
  for claim, rows in zip(open_claims, costs, strict=True):
    picked = exponents[chosen.choice[at : at + len(rows)]]
    at += len(rows)
    made = Darb(tuple(picked.tolist()))
    entries[claim.path] = decide(
      claim._replace(value=made, reason=f'{claim.reason}; knapsack of rows')
    )
  line = (
    f'knapsack of rows: {number(chosen.cost)} of {number(whole)} {cost}; '
    f'{percent(chosen.value, chosen.bound)} of the best possible'
  )
  return Plan(
    tuple(entries.get(claim.path) or decide(claim) for claim in claims),
    (*notes(layout, others), line),
  )


def _block_energy(rows: np.ndarray, size: int) -> np.ndarray:
  padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))  # scores are >= 0
  return padded.reshape(len(rows), -1, size).max(2).sum(1)


def _solve(costs, values, total: float, claims: list[Claim]) -> Chosen:
  try:
    return knapsack(costs, values, total)
  except ValueError as e:
    raise ValueError(
      f'{claims[0].path!r} and {len(claims) - 1} more layers: {e} Raise keep, lower the floors, or '
      'take layers out by (regex, None).'
    ) from None
