"""Mixed precision: how many bits each layer gets, from what it loses by them, under one budget."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._apply import checked, project
from fqjax.quantize._encode import encode, leaf_cost, sizes
from fqjax.quantize._plan import Entry, Plan, check_fit
from fqjax.quantize._quantizer import Quantizer, is_quantizer
from fqjax.sparsity import _tree, knapsack

PyTree = Any


def projection_errors(
  plan: Plan,
  params: PyTree,
  candidates: Sequence[int | Quantizer],
  masks: PyTree = None,
  *,
  saliency: PyTree = None,
) -> dict[str, np.ndarray]:
  """What each layer loses by each number of bits: `sum of saliency * (w - nearest level)^2`.

  With the diagonal of the Fisher information (`fqjax.sparsity.fisher`) as saliency it estimates twice
  the increase of the loss, without a forward pass. Without saliency all weights of all layers count
  alike, which favours layers of large weights.

  Args:
    plan: from `make_plan`; says which leaves, and with whole numbers as candidates which kind.
    params: the tree the plan was made for.
    candidates: bits, which replace those of the plan's quantizers, or quantizers.
    masks: tree like `params` of bool arrays, True lives; None, also for single leaves, where all do.
    saliency: tree like `params`, >= 0.

  Returns:
    path -> float64 [candidates].

  Raises:
    ValueError: for NaN or infinite weights, trees of another model, or a candidate that does not fit.

  Example:
    >>> from fqjax.quantize import Uniform, make_plan
    >>> params = {'fc': jnp.array([[1.0, 0.4]])}
    >>> plan = make_plan(params, [('fc', Uniform(per='layer'))])
    >>> print(projection_errors(plan, params, [2, 3])['fc'].round(4))
    [0.16   0.0044]

  Source: LeCun, Denker, Solla 1989; Dong et al., "HAWQ", ICCV 2019, with the Fisher information.
  """
  leaves, _ = _tree.flatten(params)
  live = checked(plan, leaves, masks)
  paths = [entry.path for entry in plan.quantized]
  weights = {} if saliency is None else _tree.by_path(saliency, leaves, 'saliency', paths)
  found = {}
  for entry in plan.quantized:
    w, mask = leaves[entry.path], live.get(entry.path)
    args = w, mask, weights.get(entry.path)
    tries = _tries(entry, candidates)
    found[entry.path] = np.array([_error(q, entry.layout, *args) for q in tries], np.float64)
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _error(quantizer, layout, w, mask, weight):
  away = (w - quantizer.project(w, layout, mask)).astype(jnp.float32)
  square = jnp.square(away) if weight is None else jnp.square(away) * weight.astype(jnp.float32)
  return jnp.sum(square, where=mask)


def loss_increases(
  plan: Plan,
  params: PyTree,
  candidates: Sequence[int | Quantizer],
  loss: Callable[[PyTree], Any],
  masks: PyTree = None,
) -> dict[str, np.ndarray]:
  """What each layer loses by each number of bits, measured: the loss with only this layer quantized.

  One evaluation per layer and candidate. Use training images; never those that are scored.

  Args:
    plan: as in `projection_errors`.
    params: as in `projection_errors`.
    candidates: as in `projection_errors`.
    loss: params -> number; jit it yourself.
    masks: as in `projection_errors`.

  Returns:
    path -> float64 [candidates], the increase over `loss(params)`; may be negative.

  Raises:
    ValueError: as `projection_errors`, or for a loss that is not finite.

  Example:
    >>> from fqjax.quantize import Uniform, make_plan
    >>> params = {'fc': jnp.array([[1.0, 0.4]])}
    >>> plan = make_plan(params, [('fc', Uniform(per='layer'))])
    >>> loss = lambda p: jnp.abs(p['fc'] - 0.4).sum()
    >>> print(loss_increases(plan, params, [2, 3], loss)['fc'].round(4))
    [0.4    0.0667]
  """
  base = float(loss(params))
  found = {}
  for entry in plan.quantized:
    rises = []
    for quantizer in _tries(entry, candidates):
      alone = _with(plan, {entry.path: quantizer}, only=True)
      rises.append(float(loss(project(alone, params, masks))) - base)
    if not np.isfinite(rises).all():
      raise ValueError(
        f'the loss is not finite with {entry.path!r} quantized: {rises} above {base}.'
      )
    found[entry.path] = np.array(rises)
  return found


def allocate_bits(
  plan: Plan,
  params: PyTree,
  candidates: Sequence[int | Quantizer],
  budget: float,
  *,
  masks: PyTree = None,
  losses: Mapping[str, Sequence[float]] | None = None,
  cost: Callable[[Entry, Quantizer], float] | None = None,
) -> Plan:
  """Bits per layer: the least loss under a budget of bytes, or of anything else.

  Args:
    plan: from `make_plan`: which leaves, and with whole numbers as candidates which kind.
    params: the tree the plan was made for.
    candidates: bits, which replace those of the plan's quantizers, or quantizers.
    budget: most bytes of the whole model, as `sizes` counts them; with `cost`, most of its sum.
    masks: tree like `params` of bool arrays, True lives; None, also for single leaves, where all do.
    losses: from `loss_increases` or `projection_errors`, with the same candidates; projection errors
      without saliency by default.
    cost: (entry, quantizer) -> a number >= 0, e.g. measured seconds of the layer at these bits.

  Returns:
    The plan with a quantizer chosen for every leaf; its table says of which, its notes what remains.

  Raises:
    ValueError: for a budget that the smallest candidates exceed, or losses of another plan.

  Example:
    >>> from fqjax.quantize import Uniform, make_plan
    >>> params = {'a': jnp.arange(16.0).reshape(4, 4), 'b': jnp.ones((4, 4))}
    >>> plan = make_plan(params, [('.*', Uniform(per='layer'))])
    >>> chosen = allocate_bits(plan, params, [2, 8], budget=70)
    >>> print(*(entry.quantizer.bits for entry in chosen.entries))
    8 2

  Source: Wang et al., "HAQ", CVPR 2019, for the question; solved as a knapsack.
  """
  rises: Mapping = losses or projection_errors(plan, params, candidates, masks)
  tries = {entry.path: _tries(entry, candidates) for entry in plan.quantized}
  if not tries:
    raise ValueError('the plan quantizes nothing; there is nothing to allocate.')
  wrong = [path for path in tries if len(rises.get(path, ())) != len(tries[path])]
  if wrong or set(rises) != set(tries):
    raise ValueError(
      f'losses are of another plan or other candidates: {min(wrong or set(rises) ^ set(tries))!r} '
      f'needs {len(candidates)} numbers. Make them with this plan and these candidates.'
    )
  if cost is None:
    costs = _bytes(plan, params, tries, masks)
    whole = sizes(plan, params, masks)
    fixed = whole.bytes - sum(whole.bits[path].total for path in tries) / 8
    what = 'bytes'
  else:
    costs = {e.path: [float(cost(e, q)) for q in tries[e.path]] for e in plan.quantized}
    fixed, what = 0.0, 'of the cost given'
  least = fixed + sum(min(c) for c in costs.values())
  if budget < least:
    raise ValueError(
      f'budget={budget:,.6g}: with the smallest candidates everywhere it takes {least:,.6g} {what}, '
      f'{fixed:,.6g} of them not quantized. Allow fewer bits, or prune.'
    )
  values = [[-float(x) for x in rises[path]] for path in tries]
  chosen = knapsack([costs[path] for path in tries], values, budget - fixed)
  picks = {path: tries[path][i] for path, i in zip(tries, chosen.choice, strict=True)}
  note = f'{fixed + chosen.cost:,.6g} of {budget:,.6g} {what}; losses add up to {-chosen.value:.3g}'
  made = _with(plan, picks)
  return dataclasses.replace(made, notes=(*plan.notes, note))


def _bytes(plan: Plan, params, tries, masks) -> dict[str, list[float]]:
  count = len(next(iter(tries.values())))
  found: dict[str, list[float]] = {path: [] for path in tries}
  for i in range(count):
    one = _with(plan, {path: options[i] for path, options in tries.items()})
    coded = encode(one, params, masks)
    for entry in one.quantized:
      found[entry.path].append(leaf_cost(coded[entry.path], entry).total / 8)
  return found


def _tries(entry: Entry, candidates: Sequence[int | Quantizer]) -> list[Any]:
  if not len(candidates):
    raise ValueError('no candidates; give bits, e.g. (2, 4, 8), or quantizers.')
  return [_candidate(entry, item) for item in candidates]


def _candidate(entry: Entry, item: int | Quantizer) -> Any:
  if is_quantizer(item):
    made: Any = item
  else:
    names = [field.name for field in dataclasses.fields(entry.quantizer)]  # type: ignore[arg-type]
    known = {'bits': item, 'components': 2 ** int(item)}  # type: ignore[arg-type]
    change = {name: value for name, value in known.items() if name in names}
    if not change:
      raise ValueError(
        f'{entry.path!r}: {entry.quantizer} has no bits to choose; give quantizers as candidates.'
      )
    try:
      made = dataclasses.replace(entry.quantizer, **change)  # type: ignore[type-var]
    except ValueError as e:
      raise ValueError(f'{entry.path!r}: {item} bits: {e}') from e
  check_fit(made, entry.path, entry.shape, entry.layout, 'a candidate')
  return made


def _with(plan: Plan, picks: Mapping[str, Quantizer], only: bool = False) -> Plan:
  """The plan with other quantizers; with `only`, all other leaves float."""
  entries = []
  for entry in plan.entries:
    if entry.path in picks:
      made = picks[entry.path]
      reason = f'{entry.reason}; within the budget'
      entries.append(dataclasses.replace(entry, quantizer=made, reason=reason))
    elif only and entry.quantizer is not None:
      entries.append(dataclasses.replace(entry, quantizer=None, layout=''))
    else:
      entries.append(entry)
  return dataclasses.replace(plan, entries=tuple(entries))
