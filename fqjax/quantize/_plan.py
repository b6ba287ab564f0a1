"""Plans: which quantizer each leaf of a model gets and why."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from fqjax.quantize._quantizer import Quantizer, is_quantizer
from fqjax.sparsity._layers import Layer
from fqjax.sparsity._layout import kernel_shape
from fqjax.sparsity._plan import brief, notes, table
from fqjax.sparsity._rules import PROTECTED, Claim, Words, assign, check_values

QUANTIZING = Words(
  done='quantized',
  does='quantizes',
  stays='float',
  thing='quantizer',
  example="('.*/kernel', Interval(bits=4))",
  option='keep',
  harm='no level is nearest to them',
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of the model.

  Attributes:
    path: keys joined by '/'.
    shape: of the array.
    layout: one capital per axis; '' where the array stays float.
    quantizer: what it gets; None where it stays float.
    reason: why.
  """

  path: str
  shape: tuple[int, ...]
  layout: str
  quantizer: Quantizer | None
  reason: str

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def tables(self) -> int:
    """Number of codebooks: one, or one for each output."""
    if self.quantizer is None:
      return 0
    channels = self.quantizer.groups == 'channel'
    return kernel_shape(self.shape, self.layout)[0] if channels else 1


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
  def quantized(self) -> tuple[Entry, ...]:
    """The entries that have a quantizer."""
    return tuple(entry for entry in self.entries if entry.quantizer is not None)

  def __str__(self) -> str:
    return describe(self)


def make_plan(
  params,
  rules: Sequence[tuple],
  *,
  layout: Mapping | None = None,
  layers: Mapping[str, Layer] | None = None,
  keep: Sequence[str] = (),
  protect: Sequence[tuple[str, str]] = PROTECTED,
) -> Plan:
  r"""Decides which quantizer each array of a model gets.

  Every array of rank 2 and more that a rule names is quantized, first and last layers and depthwise
  convolutions too, unless `keep` says otherwise.

  Args:
    params: any pytree (Linen dict, `nnx.State`, Equinox module, Haiku params); arrays or
      `jax.ShapeDtypeStruct`s.
    rules: ordered (regex, quantizer) or (regex, quantizer, layout); the first whose regex matches
      the whole path wins. None leaves the leaf float.
    layout: rank -> layout for rules that name none; default {4: 'HWIO', 3: 'HIO', 2: 'IO'}, which
      is Flax's and Haiku's. Equinox: {4: 'OIHW', 3: 'OIH', 2: 'OI'}.
    layers: from `fqjax.sparsity.trace_layers`. Tells first and last layers, groups and depthwise
      convolutions, and refuses a layout that the network contradicts.
    keep: kinds of layers kept float whatever the rules say, of 'first', 'last' (both need `layers`)
      and 'depthwise'.
    protect: (regex, reason) of arrays that are never quantized, on whole paths, case ignored;
      biases, normalisation, embedding tables and tokens by default. Arrays of rank below 2 never
      are.

  Returns:
    A `Plan`; `print(plan)` shows every array, what it gets and why.

  Raises:
    ValueError: for a rule that matches nothing or quantizes nothing, weights that are NaN or
      infinite, a quantizer that does not fit, an array without a layout.

  Example:
    >>> params = {
    ...   'conv1': {'kernel': jnp.ones((3, 3, 2, 8)), 'bias': jnp.ones(8)},
    ...   'fc': {'kernel': jnp.ones((72, 10))},
    ... }
    >>> print(make_plan(params, [('conv1/.*', Binary('channel')), ('.*/kernel', Interval(3))]))
    layer         shape    layout  gets                   levels  bits  why
    -----------------------------------------------------------------------------------------
    conv1/bias    8                float                                bias: never quantized
    conv1/kernel  3x3x2x8  HWIO    Binary(per='channel')     8x2     1  rule 1 'conv1/.*'
    fc/kernel     72x10    IO      Interval(bits=3)            8     3  rule 2 '.*/kernel'
    -----------------------------------------------------------------------------------------
    864 of 872 weights are quantized, at 2.67 bits; tables 288 bits
    layout by rank, where the rule names none: 4 HWIO, 3 HIO, 2 IO (Flax's default)
  """
  claims, others = assign(params, rules, layout, protect, keep, layers, QUANTIZING)
  return Plan(tuple(_decide(claim) for claim in claims), notes(layout, others))


def _decide(claim: Claim) -> Entry:
  shape = tuple(claim.leaf.shape)
  if claim.value is None:
    return Entry(claim.path, shape, '', None, claim.reason)
  check_values(claim, QUANTIZING)
  check_fit(claim.value, claim.path, shape, claim.layout, claim.rule)
  return Entry(claim.path, shape, claim.layout, claim.value, claim.reason)


def check_fit(quantizer, path: str, shape: tuple[int, ...], layout: str, who: str) -> None:
  """Raises ValueError, naming the leaf, for what is no quantizer or does not fit it."""
  where = f'{path!r} {list(shape)} ({who})'
  if not is_quantizer(quantizer):
    raise ValueError(
      f'{where}: {quantizer!r} is no quantizer; give one, e.g. {QUANTIZING.example}, or None (float).'
    )
  try:
    hash(quantizer)
    quantizer.check(shape, layout)
  except TypeError as e:
    raise ValueError(
      f'{where}: {quantizer!r} cannot be hashed ({e}); use tuples and numbers in its fields.'
    ) from None
  except ValueError as e:
    raise ValueError(
      f'{where}: {e} To leave such layers float, put a rule before it: ({path!r}, None).'
    ) from e


def describe(plan: Plan) -> str:
  """Table of every array: what it gets, how many levels and bits, and why.

  Args:
    plan: from `make_plan` or `allocate_bits`.

  Returns:
    Text; see `make_plan` for an example. Bits are those of a live weight; what a model takes, index of
    zeros and tables included, says `sizes`.
  """
  head = ('layer', 'shape', 'layout', 'gets', 'levels', 'bits', 'why')
  rows = [_row(entry) for entry in plan.entries]
  return '\n'.join([*table([head, *rows], right=(4, 5)), _totals(plan), *plan.notes])


def _row(entry: Entry) -> tuple[str, ...]:
  shape, quantizer = 'x'.join(map(str, entry.shape)), entry.quantizer
  if quantizer is None:
    return (entry.path, shape, '', 'float', '', '', entry.reason)
  levels = f'{entry.tables}x{quantizer.count}' if entry.tables > 1 else str(quantizer.count)
  bits = str(quantizer.index_bits)
  return (entry.path, shape, entry.layout, brief(quantizer), levels, bits, entry.reason)


def _totals(plan: Plan) -> str:
  whole = sum(entry.size for entry in plan.entries)
  size = bits = tables = 0
  for entry in plan.quantized:
    assert entry.quantizer is not None
    size += entry.size
    bits += entry.size * entry.quantizer.index_bits
    tables += 32 * entry.tables * entry.quantizer.tabled
  if not size:
    return f'nothing is quantized; the model has {whole:,} weights'
  return f'{size:,} of {whole:,} weights are quantized, at {bits / size:.3g} bits; tables {tables:,} bits'
