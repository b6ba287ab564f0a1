"""Multiple-choice knapsack: one choice from each group, the most value under one budget. NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Chosen(NamedTuple):
  """A solution.

  Attributes:
    choice: int64 [groups], the index of each group's choice.
    cost: their cost.
    value: their value.
    bound: no choice under the budget has more value than this.
  """

  choice: np.ndarray
  cost: float
  value: float
  bound: float


def knapsack(
  costs: Sequence[Sequence[float]] | np.ndarray,
  values: Sequence[Sequence[float]] | np.ndarray,
  budget: float,
) -> Chosen:
  """Picks one choice per group for the most value, total cost at most `budget`.

  The price of a unit of cost falls from above every group's steepest step (a sweep of the
  Lagrangian over each group's concave envelope) until the budget is spent; what is left over buys
  the best single changes that fit. Steps that no longer fit are passed over.

  Args:
    costs: for each group a cost per choice, finite and >= 0; groups may differ in their number of
      choices.
    values: likewise, any finite numbers.
    budget: most total cost, at least the sum of the cheapest choices.

  Returns:
    The solution; of equal ones the lowest group, then the lowest index. Its value is below `bound`
    by less than one step of one group.

  Raises:
    ValueError: when even the cheapest choices cost more than the budget, or inputs are not numbers
      of one shape.

  Example:
    >>> chosen = knapsack([[1, 2, 4], [1, 3]], [[0.0, 5.0, 6.0], [0.0, 4.0]], budget=5)
    >>> print(chosen.choice, chosen.cost, chosen.value)
    [1 1] 5.0 9.0

  Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11.
  """
  cost, value = _pad(costs, np.inf), _pad(values, -np.inf)
  if cost.shape != value.shape or np.any(np.isfinite(cost) != np.isfinite(value)):
    raise ValueError(
      f'costs {list(cost.shape)} and values {list(value.shape)} must be finite numbers for the '
      'same groups and choices.'
    )
  if np.any(cost < 0):
    raise ValueError(f'costs must be >= 0, got {cost.min():g}.')
  groups = np.arange(len(cost))
  # The cheapest choice, of several the most valuable.
  start = np.lexsort((-value, cost), axis=1)[:, 0]
  spent = float(cost[groups, start].sum())
  slack = 1e-9 * max(1.0, abs(budget))
  if spent > budget + slack:
    raise ValueError(
      f'the budget {budget:g} cannot be met: the cheapest choices cost {spent:g} together.'
    )
  steps = _envelope_steps(cost, value, start)
  choice, spent, bound = _sweep(steps, start, cost, value, budget + slack)
  choice, spent = _fill(choice, spent, cost, value, budget + slack)
  total = float(value[groups, choice].sum())
  return Chosen(choice, float(spent), total, max(float(bound), total))


def _pad(rows, fill: float) -> np.ndarray:
  if isinstance(rows, np.ndarray) and rows.ndim == 2:
    table = rows.astype(np.float64)
    lengths = np.full(len(rows), rows.shape[1])
  else:
    lengths = np.array([len(row) for row in rows])
    table = np.full((len(lengths), max(lengths, default=0)), fill)
    for i, row in enumerate(rows):
      table[i, : len(row)] = row
  if not len(lengths) or not lengths.min():
    raise ValueError('every group needs at least one choice, and there must be a group.')
  real = np.arange(table.shape[1]) < lengths[:, None]
  if not np.isfinite(table[real]).all():
    raise ValueError('costs and values must be finite: look for NaN weights or saliencies.')
  return table


def _envelope_steps(cost, value, start):
  """Steps (slope, group, choice after it) of every group's concave envelope, steepest first."""
  now = start.copy()
  groups = np.arange(len(cost))
  last = np.full(len(cost), np.inf)
  slopes, where, after = [], [], []
  # One step of all groups at a time: the steepest climb from where each group stands.
  while True:
    more = cost - cost[groups, now][:, None]
    gain = value - value[groups, now][:, None]
    with np.errstate(divide='ignore', invalid='ignore'):
      slope = np.where(gain > 0, gain / more, -np.inf)
    steepest = slope.max(1)
    live = np.flatnonzero(np.isfinite(steepest))
    if not len(live):
      break
    # Of points on one line the nearest: small steps spend a budget better.
    close = slope[live] >= steepest[live, None] * (1 - 1e-12)
    best = np.where(close, cost[live], np.inf).argmin(1)
    # Along a line rounding may raise the slope again; a group's steps must not change places.
    last[live] = np.minimum(last[live], steepest[live])
    slopes.append(last[live])
    where.append(live)
    after.append(best)
    now = now.copy()
    now[live] = best
  if not slopes:
    return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
  slope, group, target = (np.concatenate(x) for x in (slopes, where, after))
  order = np.lexsort((group, -slope))  # stable: a group's own steps stay in order
  return slope[order], group[order], target[order]


def _sweep(steps, start, cost, value, budget):
  choice = start.copy()
  groups = np.arange(len(start))
  spent = float(cost[groups, start].sum())
  bound = earned = float(value[groups, start].sum())
  first = True
  for slope, group, target in zip(*(s.tolist() for s in steps), strict=True):
    more = cost[group, target] - cost[group, choice[group]]
    if first:
      # The fractional optimum stops inside the first step that does not fit.
      part = min(1.0, (budget - spent) / more)
      bound = earned + part * slope * more
      earned += slope * more
    if spent + more > budget:
      first = False  # later steps of this group cost more still
      continue
    choice[group] = target
    spent += more
  return choice, spent, bound


def _fill(choice, spent, cost, value, budget):
  """Best single changes until none fits."""
  choice, groups = choice.copy(), np.arange(len(choice))
  while True:
    more = cost - cost[groups, choice][:, None]
    gain = value - value[groups, choice][:, None]
    # Relative to the step's own value, or rounding would be a gain.
    fits = (spent + more <= budget) & (gain > 1e-12 * np.abs(value[groups, choice][:, None]))
    if not fits.any():
      return choice, spent
    best = int(np.where(fits, gain, -np.inf).argmax())
    group, target = divmod(best, cost.shape[1])
    spent += float(more[group, target])
    choice[group] = target
