"""Which leaf gets which rule: first match wins, and every leaf is told why."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fqjax.sparsity import _tree
from fqjax.sparsity._layers import Layer
from fqjax.sparsity._layout import axes, kernel_shape

LAYOUTS = {4: 'HWIO', 3: 'HIO', 2: 'IO'}
"""Rank -> layout of Flax and Haiku. Equinox and PyTorch: {4: 'OIHW', 3: 'OIH', 2: 'OI'}."""

PROTECTED = (
  (r'.*/b|(.*/)?([^/]*bias|offset|beta)', 'bias'),
  (r'(.*/)?(scale|gamma|mean|var)', 'normalisation'),
  (r'(.*/)?([^/]*_)?(((batch|layer|group|instance|rms)_?)?norm|bn)_?\d*/[^/]*', 'normalisation'),
  (r'(.*/)?[^/]*embed[^/]*(/(weight|table))?', 'embedding table'),
  (r'(.*/)?(cls|[^/]*token)', 'learned token'),
)
"""What is never pruned, by name: (regex on the whole path, case ignored; reason)."""

_GATES = re.compile(r'(.*/)?([ih][ifgo]|[ih][rzn])/[^/]*')
_CELLS = re.compile(r'.*(lstm|gru).*', re.IGNORECASE)
_KINDS = ('first', 'last', 'depthwise')


class Words(NamedTuple):
  """How one kind of plan speaks of what it does to a leaf.

  Attributes:
    done: 'never pruned'.
    does: 'rule 1 prunes nothing'.
    stays: what a leaf is that gets nothing.
    thing: what a rule gives.
    example: a rule that would do.
    option: the keyword that names kinds of layers which get nothing.
    harm: why weights that are not finite are refused.
  """

  done: str = 'pruned'
  does: str = 'prunes'
  stays: str = 'dense'
  thing: str = 'structure'
  example: str = "('.*/kernel', Unstructured(keep=0.1))"
  option: str = 'dense'
  harm: str = 'no order of magnitudes exists'


PRUNING = Words()


class Claim(NamedTuple):
  """A leaf and what the rules say of it.

  Attributes:
    path: of the leaf.
    leaf: the array.
    layout: '' where it stays dense.
    value: what its rule gives, None where it stays dense.
    reason: why.
    rule: the rule's name in messages, '' without one.
  """

  path: str
  leaf: Any
  layout: str
  value: Any
  reason: str
  rule: str


def assign(
  params,
  rules: Sequence[tuple],
  layout: Mapping | None,
  protect: Sequence[tuple[str, str]],
  dense: Sequence[str],
  layers: Mapping[str, Layer] | None,
  words: Words = PRUNING,
) -> tuple[list[Claim], tuple[str, ...]]:
  """Gives every array of `params` its rule; also the paths of leaves that are no arrays."""
  rules = _parse_rules(rules, words)
  layouts = _parse_layouts(LAYOUTS if layout is None else layout)
  _check_dense(dense, layers, words)
  leaves, _ = _tree.flatten(params)
  arrays = {path: leaf for path, leaf in leaves.items() if _tree.is_array(leaf)}
  if layers is not None and not set(layers) & set(arrays):
    raise ValueError(
      f'layers are of another model: {next(iter(layers), "nothing")!r} is none of the parameters '
      f'(closest: {_tree.nearest(next(iter(layers), ""), arrays)}); trace with these parameters.'
    )
  ends = [p for p in layers or () if p in arrays]
  claims, taken = [], {name: [] for name, *_ in rules}
  for path, leaf in arrays.items():
    rule = next((r for r in rules if r[1].fullmatch(path)), None)
    claim = _decide(path, leaf, rule, layouts, protect, dense, layers, ends, words)
    claims.append(claim)
    if rule is not None:
      taken[rule[0]].append(claim)
  for name, pattern, value, _ in rules:
    if not taken[name]:
      raise ValueError(_unused(name, pattern, rules, arrays))
    if value is not None and all(claim.value is None for claim in taken[name]):
      raise ValueError(
        f'{name} {words.does} nothing: {_some_reasons(taken[name])}. Allow it by {words.option}=() '
        'or protect=(), or drop the rule.'
      )
  return claims, tuple(path for path in leaves if path not in arrays)


def _decide(path, leaf, rule, layouts, protect, dense, layers, ends, words: Words) -> Claim:
  def stays(reason):
    return Claim(path, leaf, '', None, reason, rule[0] if rule else '')

  if not _tree.is_weight(leaf):
    return stays(f'{leaf.dtype}: no weights')
  for pattern, reason in protect:
    if re.fullmatch(pattern, path, re.IGNORECASE) and not _multiplied_table(reason, path, layers):
      return stays(f'{reason}: never {words.done}')
  if leaf.ndim < 2:
    return stays(f'{"vector" if leaf.ndim else "scalar"}: never {words.done}')
  if rule is None:
    return stays('no rule selects it')
  name, _, value, layout = rule
  if value is None:
    return stays(f'{name}: {words.stays}')
  if 0 in leaf.shape:
    return stays('empty')
  if not layout and leaf.ndim not in layouts:
    raise ValueError(
      f'{path!r} {list(leaf.shape)} ({name}) has rank {leaf.ndim}, for which no layout is named; '
      f"add it to layout= or to the rule: (regex, {words.thing}, 'DHWIO')."
    )
  layout = layout or layouts[leaf.ndim]
  try:
    o, i, m = kernel_shape(leaf.shape, layout)
  except ValueError as e:
    raise ValueError(f'{path!r} ({name}): {e}') from None
  _check_traced(path, leaf, layout, layers, words)
  kinds, notes = _look(path, (o, i, m), bool(axes(layout, leaf.ndim)[2]), layers, ends)
  for kind in _KINDS:
    if kind in kinds and kind in dense:
      return stays(f'{kinds[kind]}: left {words.stays}')
  return Claim(path, leaf, layout, value, '; '.join([name, *kinds.values(), *notes]), name)


def _look(path, sizes, has_taps, layers, ends) -> tuple[dict[str, str], list[str]]:
  """What kind of layer this is, and remarks."""
  o, i, m = sizes
  layer = None if layers is None else layers.get(path)
  kinds, notes = {}, []
  if ends and path == ends[0]:
    kinds['first'] = 'first layer'
  if ends and path == ends[-1]:
    kinds['last'] = 'last layer'
  if i == 1 and m > 1 and o > 1:
    if layer is None:
      kinds['depthwise'] = 'depthwise (or one input channel: pass layers=)'
    elif layer.groups > 1:
      kinds['depthwise'] = 'depthwise'
  elif layer is not None and layer.groups > 1:
    notes.append(f'{layer.groups} groups of {i} inputs')
  if m == 1 and has_taps:
    notes.append('1x1')
  if layer is not None and layer.times > 1:
    notes.append(f'used {layer.times} times')
  if layers is not None and layer is None:
    notes.append('enters no product in the trace')
  if _GATES.fullmatch(path):
    notes.append('one gate of a cell')
  elif _CELLS.fullmatch(path):
    notes.append('recurrent')
  return kinds, notes


def _multiplied_table(reason: str, path: str, layers) -> bool:
  """A leaf named like a lookup table that the trace shows in a product."""
  return reason == 'embedding table' and layers is not None and path in layers


def _check_traced(path, leaf, layout, layers, words: Words):
  traced = layers[path].layout if layers and path in layers else ''
  if traced and len(traced) == leaf.ndim and axes(traced, leaf.ndim) != axes(layout, leaf.ndim):
    raise ValueError(
      f'{path!r} {list(leaf.shape)} is read as {traced} by the traced function, not as {layout}; '
      f'name it: (regex, {words.thing}, {traced!r}), or layout={{{leaf.ndim}: {traced!r}}}.'
    )


def resolve(value, claim: Claim) -> Any:
  """A structure, or what a function of (weights, layout) makes of this leaf."""
  if value is None or is_structure(value):
    return value
  if not callable(value):
    raise ValueError(
      f'{claim.rule} gives {claim.path!r} {value!r}; give a structure, None (dense), or a function '
      '(weights, layout) -> structure.'
    )
  if not _tree.has_values(claim.leaf):
    raise ValueError(
      f'{claim.rule} makes a structure from the weights of {claim.path!r}, which are abstract; '
      'call with the arrays, outside jit.'
    )
  made = call(claim, value, claim.leaf, claim.layout)
  if not is_structure(made):
    raise ValueError(f'{claim.rule} returned {made!r} for {claim.path!r}, not a structure.')
  return made


def call(claim: Claim, make: Callable, *args):
  """What a rule's function makes of a leaf; an error of its own names the layer too."""
  try:
    return make(*args)
  except ValueError as e:
    raise ValueError(f'{claim.path!r} {list(claim.leaf.shape)} ({claim.rule}): {e}') from e


def fit(structure, claim: Claim) -> str:
  """Why a structure does not fit a leaf, '' when it does."""
  try:
    hash(structure)
  except TypeError as e:
    return f'{structure!r} cannot be hashed ({e}); use tuples and numbers in its fields.'
  try:
    structure.check(tuple(claim.leaf.shape), claim.layout)
    kept = structure.kept(tuple(claim.leaf.shape), claim.layout)
  except ValueError as e:
    return str(e)
  return '' if kept > 0 else 'it keeps nothing of the layer; keep at least one weight.'


def is_structure(value) -> bool:
  """Whether a value follows the protocol of structures (an instance, not a class)."""
  names = ('check', 'kept', 'project')
  return not isinstance(value, type) and all(hasattr(value, name) for name in names)


def check_values(claim: Claim, words: Words = PRUNING):
  """Raises ValueError for weights that are not finite; abstract ones pass."""
  w = claim.leaf
  if not _tree.has_values(w):
    return
  # On the host where all of it is here: nothing to compile.
  finite = (np if getattr(w, 'is_fully_addressable', True) else jnp).isfinite(w)
  if not bool(finite.all()):
    raise ValueError(
      f'{claim.path!r} holds NaN or infinite weights; {words.harm}. Restore a '
      'checkpoint from before they appeared.'
    )


def _parse_rules(rules, words: Words) -> list[tuple[str, re.Pattern, Any, str]]:
  if isinstance(rules, Mapping):
    raise ValueError(f'rules are an ordered list of (regex, {words.thing}) pairs, not a dict.')
  parsed = []
  for number, rule in enumerate(rules, 1):
    if not isinstance(rule, tuple | list) or len(rule) not in (2, 3):
      raise ValueError(
        f'rule {number}, {rule!r}, must be (regex, {words.thing}) or (regex, {words.thing}, layout).'
      )
    try:
      pattern = re.compile(rule[0])
    except (re.error, TypeError) as e:
      raise ValueError(f'rule {number}: {rule[0]!r} is no regular expression ({e}).') from None
    layout = rule[2] if len(rule) == 3 else ''
    parsed.append((f'rule {number} {pattern.pattern!r}', pattern, rule[1], layout))
  if not parsed:
    raise ValueError(f'no rules; give at least one, e.g. {words.example}.')
  return parsed


def _parse_layouts(layout: Mapping) -> dict[int, str]:
  layouts = {int(rank): letters for rank, letters in layout.items()}
  for rank, letters in layouts.items():
    try:
      axes(letters, rank)
    except ValueError as e:
      raise ValueError(f'layout={{{rank}: {letters!r}}}: {e}') from None
  return layouts


def _check_dense(dense, layers, words: Words):
  if isinstance(dense, str) or not set(dense) <= set(_KINDS):
    raise ValueError(f'{words.option}={dense!r} must be a tuple of some of {_KINDS}.')
  if layers is None and {'first', 'last'} & set(dense):
    raise ValueError(
      f'{words.option}={dense!r}: a tree does not tell which layer is first or last; pass '
      'layers=trace_layers(apply_fn, params, inputs).'
    )


def _unused(name: str, pattern: re.Pattern, rules, arrays) -> str:
  matched = [path for path in arrays if pattern.fullmatch(path)]
  if matched:
    earlier = {next(r[0] for r in rules if r[1].fullmatch(path)) for path in matched}
    return (
      f'{name} is unused: the first match wins, and what it matches ({matched[0]!r}, ...) belongs '
      f'to {", ".join(sorted(earlier))}. Put it before, or drop it.'
    )
  text = f'{name} selects no parameter. Closest: {_tree.nearest(pattern.pattern, arrays)}.'
  if part := next((path for path in arrays if pattern.search(path)), ''):
    text += f' It is a part of {part!r}, and a rule matches whole paths: put .* around it.'
  return text


def _some_reasons(claims: list[Claim]) -> str:
  more = f', and {len(claims) - 2} more' if len(claims) > 2 else ''
  return ', '.join(f'{s.path!r} ({s.reason})' for s in claims[:2]) + more
