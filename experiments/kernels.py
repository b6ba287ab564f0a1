"""Plans for the kernels of convolutions at a stated rate, and what kernels do with their patterns."""

from collections.abc import Callable, Sequence
import json
import pathlib
import re
from typing import NamedTuple

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from experiments import compression as cp
from fqjax import files, rules, sparsity, train
from fqjax.runtime import codecs

KINDS = ('pattern', 'connectivity', 'unstructured', 'filters', 'channels')
_WHOLE = (511,)  # a 3x3 kernel that keeps all its taps


class Conv(NamedTuple):
  """A convolution.

  Attributes:
    path: of its kernel.
    outputs: channels out.
    inputs: channels in, of its group.
    taps: of a kernel.
    groups: 1 in an ordinary one.
    first: it reads the image.
  """

  path: str
  outputs: int
  inputs: int
  taps: int
  groups: int
  first: bool


def convolutions(params, layers) -> list[Conv]:
  """The convolutions of a network in order of execution.

  Args:
    params: nested dicts, arrays or their shapes.
    layers: `sparsity.trace_layers` of the network.
  """
  leaves = flatten_dict(params, sep='/')
  found = []
  for path, layer in layers.items():
    if len(leaves[path].shape) == 4:
      o, i, m = sparsity.kernel_shape(leaves[path].shape, 'HWIO')
      found.append(Conv(path, o, i, m, layer.groups, not found))
  return found


# ---------------------------------------------------------------------------- plans


def plan(
  params,
  layers,
  kind: str,
  keep: float = 1.0,
  masks: Sequence[int] = (),
  pointwise: bool = False,
) -> sparsity.Plan:
  """What every convolution but the first gets; dense layers stay as they are.

  Args:
    params: as of `convolutions`.
    layers: likewise.
    kind: 'pattern': every 3x3 kernel keeps the taps of one of `masks`, and `keep` of the kernels
      stay; 'connectivity': `keep` of the 3x3 kernels stay, whole; 'unstructured': the largest
      weights; 'filters', 'channels': whole outputs, whole inputs.
    keep: kept fraction of kernels, weights, outputs or inputs, the same in every layer.
    masks: library of the whole network, for 'pattern'.
    pointwise: kernels of one tap go too: of 'pattern' and 'connectivity' single weights.
  """
  chosen = []
  for conv in convolutions(params, layers):
    structure = None if conv.first else _structure(conv, kind, keep, tuple(masks), pointwise)
    if structure is not None:
      chosen.append((re.escape(conv.path), structure))
  return sparsity.make_plan(params, [*chosen, ('.*', None)], layers=layers, dense=())


def _structure(conv: Conv, kind: str, keep: float, masks, pointwise: bool):
  if conv.inputs == 1:  # depthwise: a kernel that goes takes its channel along
    return sparsity.Patterns(masks) if kind == 'pattern' and conv.taps == 9 else None
  if kind in ('pattern', 'connectivity') and conv.taps != 9:
    return sparsity.Unstructured(keep) if pointwise and conv.taps == 1 and keep < 1 else None
  if kind == 'pattern' or (kind == 'connectivity' and keep < 1):
    # Where there is room no output and no input loses its last kernel.
    rows = conv.outputs // conv.groups
    count = sparsity.keep_count(keep, rows * conv.inputs)
    outputs = int(count >= rows)
    return sparsity.Patterns(
      masks if kind == 'pattern' else _WHOLE,
      keep=keep,
      min_per_output=outputs,
      min_per_input=int(outputs and count >= rows + conv.inputs),
      groups=conv.groups,
    )
  if conv.taps == 1 and not pointwise:
    return None
  made = {
    'unstructured': sparsity.Unstructured,
    'filters': sparsity.Filters,
    'channels': sparsity.Channels,
  }
  return made[kind](keep) if keep < 1 else None


def plan_at(
  rate: float, params, layers, kind: str, masks: Sequence[int] = (), pointwise: bool = False
) -> sparsity.Plan:
  """The mildest plan whose convolutions, the first included, are at least `rate` times smaller.

  Raises:
    ValueError: there is none.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

  def at(keep):
    return plan(shapes, layers, kind, keep, masks, pointwise)

  found, why, low, high = None, None, 0.0, 1.0
  if conv_rate(at(1.0)) >= rate:
    return at(1.0)
  for _ in range(24):
    keep = (low + high) / 2
    try:
      tried = at(keep)
    except ValueError as error:  # a layer that cannot be made so sparse
      low, why = keep, error
      continue
    if conv_rate(tried) >= rate:
      found, low = tried, keep
    else:
      high = keep
  if found is None:
    raise ValueError(f'no {kind} plan makes the convolutions {rate:g} times smaller ({why})')
  return found


def conv_rate(found: sparsity.Plan) -> float:
  """Weights of all convolutions over those that the plan keeps."""
  convs = [entry for entry in found.entries if len(entry.shape) == 4]
  return sum(entry.size for entry in convs) / sum(entry.kept for entry in convs)


def conv_compression(rung: cp.Rung) -> float:
  """The same, counted in the masks of a network."""
  masks = flatten_dict(rung.masks or {}, sep='/')
  size = kept = 0
  for entry in rung.plan.entries:
    if len(entry.shape) == 4:
      mask = masks.get(entry.path)
      size += entry.size
      kept += entry.size if mask is None else int(np.sum(mask))
  return size / kept


# ---------------------------------------------------------------------------- patterns in use


def patterned(found: sparsity.Plan) -> list[sparsity.Entry]:
  """The layers whose kernels take patterns."""
  return [
    entry
    for entry in found.pruned
    if isinstance(entry.structure, sparsity.Patterns) and entry.structure.masks != _WHOLE
  ]


def usage(found: sparsity.Plan, params) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
  """How often a network that shares one library would take each pattern.

  Returns:
    masks of the library, kernels per pattern, energy they keep with it. Kernels without a weight
    count for none.

  Raises:
    ValueError: the layers have several libraries, or none.
  """
  entries = patterned(found)
  libraries = {entry.structure.masks for entry in entries}
  if len(libraries) != 1:
    raise ValueError(f'the plan has {len(libraries)} libraries, not one')
  (masks,) = libraries
  leaves = flatten_dict(params, sep='/')
  kernels = [sparsity.to_kernels(np.asarray(leaves[e.path]), e.layout) for e in entries]
  live = np.concatenate([k.reshape(-1, k.shape[-1]) for k in kernels])
  live = live[(live != 0).any(1)]
  counts, energy = sparsity.pattern_usage(live[:, None], 'OIM', masks)
  return masks, counts, energy


def shrunk(path: pathlib.Path, found: sparsity.Plan, params, size: int, by: str) -> tuple[int, ...]:
  """The most used patterns of a library, one step of its extraction; read back where it was taken.

  Args:
    path: of the note: what was used how often.
    found: plan whose layers share the library.
    params: weights that were trained towards it.
    size: patterns that stay.
    by: 'counts' of kernels, or the 'energy' they keep.
  """
  if not path.exists():
    masks, counts, energy = usage(found, params)
    stay = sparsity.shrink_library(masks, counts if by == 'counts' else energy, size)
    if train.is_main():
      note = {'masks': stay, 'from': masks, 'counts': counts.tolist(), 'energy': energy.tolist()}
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_text(path, json.dumps(note))
    train.synchronize(f'{path} written')
  return tuple(json.loads(path.read_text())['masks'])


def watch_switches(folder: pathlib.Path) -> Callable[[train.TrainState], dict[str, float]]:
  """For `Run.watch`: the share of kernels whose taps changed since the last look.

  Of every layer it goes into `switches.jsonl` of the phase.
  """
  before: dict[str, np.ndarray] = {}

  def look(state):
    nonlocal before
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, rules.AdmmState))
    (admm,) = (x for x in leaves if isinstance(x, rules.AdmmState))
    supports = {
      path: np.asarray(mask)
      for path, mask in flatten_dict(admm.support, sep='/').items()
      if mask is not None and mask.ndim == 4
    }
    found = {p: (m != before[p]).any((0, 1)) for p, m in supports.items() if p in before}
    before = supports
    if not found:
      return {}
    if train.is_main():
      layers = {path.removesuffix('/kernel'): float(x.mean()) for path, x in found.items()}
      with open(folder / 'switches.jsonl', 'a') as file:
        file.write(json.dumps({'step': int(state.step), **layers}) + '\n')
    every = np.concatenate([x.ravel() for x in found.values()])
    return {'admm/switched': float(every.mean())}

  return look


# ---------------------------------------------------------------------------- stored form


def fkw(rung: cp.Rung) -> dict[str, float]:
  """Bytes of the pruned kernels in the order in which they run, and what their index saves.

  Returns:
    fkw_bytes: of all layers with patterns, values, indices and tables.
    csr_bytes: of the same as compressed sparse rows with 32-bit columns.
    index_saving: by how much the first needs fewer index bytes, %. Empty without such layers.
  """
  params, masks = (
    flatten_dict(tree, sep='/') for tree in (rung.variables.params, rung.masks or {})
  )
  ours = rows = codecs.Bits(0, 0, 0, 0)
  for entry in patterned(rung.plan):
    w, mask = (np.asarray(tree[entry.path]) for tree in (params, masks))
    kernels, live = (sparsity.to_kernels(x, entry.layout) for x in (w, mask))
    encoded = codecs.fkw.encode(kernels, entry.structure.masks, live)
    ours = _added(ours, codecs.fkw.bits(encoded))
    matrix, live = (np.asarray(sparsity.to_rows(x, entry.layout)) for x in (w, mask))
    rows = _added(rows, codecs.csr.bits(codecs.csr.encode(matrix, live, index_bits=32)))
  if not ours.total:
    return {}
  saved = 1 - (ours.index + ours.tables) / (rows.index + rows.tables)
  return {'fkw_bytes': ours.total / 8, 'csr_bytes': rows.total / 8, 'index_saving': 100 * saved}


def _added(a: codecs.Bits, b: codecs.Bits) -> codecs.Bits:
  return codecs.Bits(*(x + y for x, y in zip(a, b, strict=True)))
