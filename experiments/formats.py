"""Unstructured against structured networks at equal accuracy and equal bits: bytes, index included.

A pruned weight costs an index wherever its place is its own, and almost none where whole filters and
columns go. The fewer bits a value has, the more the index weighs: so every rate of an unstructured
network has a *break-even rate*, the rate from which on a structured one of as many bits is smaller.
All of it is taken from networks as they were measured; between rungs it is interpolated, in logarithms.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
import numpy as np

from experiments.levels import Quantized
from fqjax import quantize, sparsity, train

BITS = (2, 3, 4, 8)
# Looking for the best format of more weights than this takes minutes a rung.
_MOST = 20_000_000


def stored(plan: sparsity.Plan, params, bits: Sequence[int] = BITS) -> dict[str, float]:
  """Bytes of all kernels in the smallest format that fits their zeros, if values had so many bits.

  Args:
    plan: of the pruned network.
    params: pruned.
    bits: of a value.

  Returns:
    'coded_bytes_3' and so on; nothing for networks so large that it would take minutes.
  """
  leaves = flatten_dict(params, sep='/')
  kernels = [entry for entry in plan.entries if len(entry.shape) > 1]
  if sum(math.prod(entry.shape) for entry in kernels) > _MOST:
    return {}
  found = {}
  for width in bits:
    total = 0
    for entry in kernels:
      w = np.asarray(leaves[entry.path]) + np.float32(0)  # -0 would be stored
      # A zero among the values is one code more than the levels of living weights.
      args = (width, width + 1)
      total += sparsity.cheapest(w, entry.layout or _LAYOUTS[w.ndim], *args).bits(*args).total
    found[f'coded_bytes_{width}'] = total / 8
  return found


_LAYOUTS = {2: 'IO', 3: 'HIO', 4: 'HWIO'}


def stored_levels(network: Quantized) -> dict[str, float]:
  """The same of a network on levels, where all layers have as many bits; tables are counted."""
  kernels = [entry for entry in network.plan.entries if len(entry.shape) > 1]
  widths = {entry.quantizer and entry.quantizer.index_bits for entry in kernels}
  if len(widths) != 1 or None in widths:
    return {}
  found = quantize.sizes(
    network.plan, network.variables.params, network.masks, codebooks=network.codebooks
  )
  return {f'coded_bytes_{widths.pop()}': sum(found.bits[e.path].total for e in kernels) / 8}


class Point(NamedTuple):
  """A measured network.

  Attributes:
    change: in top-1 against the dense network, points.
    rate: dense weights over kept weights.
    bytes: of its kernels, index and tables included.
  """

  change: float
  rate: float
  bytes: float


class Curve(NamedTuple):
  """Networks of one kind by ascending rate, the dense one first."""

  points: tuple[Point, ...]

  def rate_at(self, change: float) -> float | None:
    """The highest rate at which no more is lost than `change`; None where the dense one loses more."""
    best = None
    for a, b in zip(self.points, self.points[1:], strict=False):
      if a.change >= change:
        best = a.rate
      if b.change >= change:
        best = b.rate
      elif a.change >= change:
        part = (a.change - change) / (a.change - b.change)
        best = math.exp(math.log(a.rate) + part * math.log(b.rate / a.rate))
    return best

  def bytes_at(self, rate: float) -> float:
    """Bytes of a network of this rate; beyond the last one in proportion."""
    last = self.points[-1]
    if rate > last.rate:
      return last.bytes * last.rate / rate
    rates, sizes = (np.log([getattr(p, name) for p in self.points]) for name in ('rate', 'bytes'))
    return float(np.exp(np.interp(math.log(rate), rates, sizes)))

  def rate_of(self, size: float) -> float:
    """The rate from which on a network takes no more than `size` bytes."""
    last = self.points[-1]
    if size < last.bytes:
      return last.rate * last.bytes / size
    rates, sizes = (np.log([getattr(p, name) for p in self.points]) for name in ('rate', 'bytes'))
    # np.interp wants ascending places.
    return float(np.exp(np.interp(-math.log(size), -sizes, rates)))


def curve(entries: Sequence[Mapping[str, Any]], bits: int) -> Curve:
  """The curve of some entries of `outcome.summarize` at `bits` bits a value."""
  points = [Point(e['change'], e['compression'], e[f'coded_bytes_{bits}']) for e in entries]
  dense = Point(0.0, 1.0, entries[0]['weights'] * bits / 8)
  rising = sorted(points, key=lambda point: point.rate)
  kept = [dense]
  for point in rising:
    # Of a rung that is larger than a sparser one nothing can be read between them.
    while len(kept) > 1 and kept[-1].bytes <= point.bytes:
      kept.pop()
    kept.append(point)
  return Curve(tuple(kept))


def compare(config, summary: Sequence[Mapping[str, Any]], bits: int) -> list[dict[str, Any]]:
  """Every unstructured network beside the structured one of the same accuracy and bits.

  Where both kinds were trained at so many bits these networks are compared; elsewhere the float ones,
  as if rounding cost both the same.

  Args:
    config: of `experiments.admm_nn_s`.
    summary: of `outcome.summarize`.
    bits: of a value.

  Returns:
    For every unstructured network `change`, `rate`, `bytes`; `break_even`, the structured rate of as
    many bytes; `structured_rate` at equal accuracy, None where none was as good, and
    `structured_bytes`; `trained`, whether the accuracy is that of `bits` bits.
  """

  def of(kind, trained):
    section = config.quantize if trained else config.rates
    return [
      entry
      for entry in summary
      if entry['setting'] in section
      and f'coded_bytes_{bits}' in entry
      and _kind(config, entry['setting']) == kind
    ]

  for trained in (True, False):
    one, two = of('unstructured', trained), of('structured', trained)
    if one and two:
      break
  else:
    return []
  structured, found = curve(two, bits), []
  for entry in sorted(one, key=lambda entry: entry['compression']):
    size, rate = entry[f'coded_bytes_{bits}'], structured.rate_at(entry['change'])
    found.append({
      'change': entry['change'],
      'change_spread': entry['change_spread'],
      'rate': entry['compression'],
      'bytes': size,
      'break_even': structured.rate_of(size),
      'structured_rate': rate,
      'structured_bytes': None if rate is None else structured.bytes_at(rate),
      'trained': trained,
    })  # fmt: skip
  return found


def _kind(config, name: str) -> str:
  start = config.quantize[name].start if name in config.quantize else name
  # One budget for all layers is no structure either.
  return config.rates[start].kind.replace('pooled', 'unstructured') if start else ''


def tables(config, summary: Sequence[Mapping[str, Any]]) -> list[train.Table]:
  """The comparison for a report; none where only one kind was measured."""
  rows = []
  for bits in BITS:
    for e in compare(config, summary, bits):
      rate, size = e['structured_rate'], e['structured_bytes']
      rows.append((
        f'{bits} bits, {"trained" if e["trained"] else "accuracy of float"}',
        (e['change'], e['change_spread']), e['rate'], round(e['bytes']), e['break_even'],
        rate, None if size is None else round(size),
        'structured' if size is not None and size < e['bytes'] else 'unstructured',
      ))  # fmt: skip
  if not rows:
    return []
  head = ('values', 'change, points', 'rate', 'bytes', 'break-even rate', 'structured: rate',
          'bytes', 'smaller')  # fmt: skip
  note = (
    'Unstructured networks, and what structured ones (filters and columns) take at the same accuracy '
    'and bits. Bytes of all kernels in the smallest format that fits their zeros, index and tables '
    'included. Break-even rate: the structured rate of as many bytes. Between rungs interpolated in '
    'logarithms; an empty rate: no structured network measured was as good.'
  )
  return [train.Table('Unstructured against structured, in bytes', head, tuple(rows), note)]
