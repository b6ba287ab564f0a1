"""Quantized weights as stored: indices and codebooks, their exact inverse, and honest sizes."""

from typing import Any, NamedTuple

import jax
import numpy as np

from fqjax.quantize._apply import checked, fit_leaf, given
from fqjax.quantize._plan import Entry, Plan
from fqjax.runtime import codecs
from fqjax.sparsity import Sizes, _tree, cheapest
from fqjax.sparsity.structures._base import raw_bits

PyTree = Any


class Coded(NamedTuple):
  """A leaf as indices into its codebook.

  Attributes:
    indices: uint8, shape of the leaf; 0 is exactly 0: masked, or on a zero level.
    codebook: float32, [K], or [O, K] with a row for each output; entry 0 is 0.
    layout: one capital per axis of the leaf.
    dtype: of the leaf.
  """

  indices: np.ndarray
  codebook: np.ndarray
  layout: str
  dtype: Any

  def decode(self) -> np.ndarray:
    """The leaf as `project` gives it, bit for bit.

    Example:
      >>> table = np.float32([0.0, -0.5, 0.5])
      >>> print(Coded(np.uint8([[1, 0, 2]]), table, 'IO', np.float32).decode())
      [[-0.5  0.   0.5]]
    """
    if self.codebook.ndim == 1:
      return self.codebook[self.indices].astype(self.dtype)
    outputs = [axis for axis, letter in enumerate(self.layout) if letter == 'O']
    shape = [n if axis in outputs else 1 for axis, n in enumerate(self.indices.shape)]
    rows = np.arange(len(self.codebook)).reshape(shape)
    return self.codebook[rows, self.indices].astype(self.dtype)


def encode(
  plan: Plan, params: PyTree, masks: PyTree = None, *, codebooks: PyTree = None
) -> dict[str, Coded]:
  """Indices and codebooks of every quantized leaf, on the host.

  Args:
    plan: from `make_plan`.
    params: the tree the plan was made for; weights that are not on levels go to the nearest.
    masks: tree like `params` of bool arrays, True lives; None, also for single leaves, where all do.
    codebooks: from `fit`, those the weights were mapped with; by default fitted to the weights.

  Returns:
    path -> `Coded`.

  Raises:
    ValueError: for NaN or infinite weights, or a plan, masks or codebooks of another model.

  Example:
    >>> from fqjax.quantize import Interval, make_plan
    >>> params = {'fc': jnp.array([[-1.0, 0.5], [0.5, 7.0]])}
    >>> masks = {'fc': jnp.array([[True, True], [True, False]])}
    >>> coded = encode(make_plan(params, [('fc', Interval(bits=2))]), params, masks)['fc']
    >>> print(coded.indices, coded.codebook, coded.decode()[0])
    [[1 3]
     [3 0]] [ 0.  -1.  -0.5  0.5  1. ] [-1.   0.5]
  """
  leaves, treedef = _tree.flatten(params)
  live = checked(plan, leaves, masks)
  tables = given(plan, leaves, treedef, codebooks)
  found = {}
  for entry in plan.quantized:
    quantizer, w, mask = entry.quantizer, leaves[entry.path], live.get(entry.path)
    assert quantizer is not None
    book = tables.get(entry.path)
    if book is None:
      book = fit_leaf(quantizer, entry.layout, w, mask)
    indices = _indices(quantizer, entry.layout, w, mask, book)
    table = np.asarray(quantizer.table(book), np.float32)
    found[entry.path] = Coded(np.asarray(indices), table, entry.layout, np.dtype(w.dtype))
  return found


_indices = jax.jit(
  lambda q, layout, w, mask, book: q.indices(w, layout, mask, book), static_argnums=(0, 1)
)


def sizes(
  plan: Plan,
  params: PyTree,
  masks: PyTree = None,
  *,
  codebooks: PyTree = None,
  table_bits: int = 32,
) -> Sizes:
  """What a quantized model takes as stored: values, codebooks, index of the zeros, headers.

  Indices go into the cheapest of the formats of `fqjax.runtime.codecs`. Where it stores no zeros, a
  value takes the bits that tell the levels apart, and one code more where zeros are among the values.
  Codebooks count by what defines them: a scale, or the levels of a mixture.

  Args:
    plan: from `make_plan`.
    params: as in `encode`.
    masks: as in `encode`; float leaves count their masks too.
    codebooks: as in `encode`.
    table_bits: bits per number of a codebook.

  Returns:
    `fqjax.sparsity.Sizes` of all float arrays that hold anything, float ones included. `kept` are the
    weights that are not 0, and `bits[path].values / 8` is the weights-only figure of papers.

  Raises:
    ValueError: as `encode`.

  Example:
    >>> from fqjax.quantize import Binary, make_plan
    >>> params = {'fc': {'kernel': jnp.ones((64, 64)), 'bias': jnp.ones(64)}}
    >>> cost = sizes(make_plan(params, [('.*/kernel', Binary())]), params)
    >>> cost.bits['fc/kernel'].values, cost.bytes
    (4096, 804)
  """
  coded = encode(plan, params, masks, codebooks=codebooks)
  leaves, _ = _tree.flatten(params)
  live = checked(plan, leaves, masks)
  found = Sizes({}, {}, {})
  for entry in plan.entries:
    w = leaves[entry.path]
    if not _tree.is_weight(w) or not w.size:
      continue
    if entry.quantizer is None:
      host = np.asarray(w)
      if entry.path in live:
        host = np.where(np.asarray(live[entry.path]), host, np.zeros_like(host))
        kept, cost = int(np.count_nonzero(host)), cheapest(host.reshape(1, -1), 'OI').bits()
      else:
        kept, cost = host.size, codecs.dense.bits(codecs.dense.encode(raw_bits(host)))
    else:
      one = coded[entry.path]
      kept = int(np.count_nonzero(one.indices))
      cost = leaf_cost(one, entry, table_bits)
    found.weights[entry.path] = w.size
    found.kept[entry.path] = kept
    found.bits[entry.path] = cost
  return found


def leaf_cost(coded: Coded, entry: Entry, table_bits: int = 32) -> codecs.Bits:
  """What a quantized leaf costs as stored."""
  quantizer = entry.quantizer
  assert quantizer is not None
  live = quantizer.count - quantizer.zero
  width, with_zero = (max(1, (n - 1).bit_length()) for n in (live, live + 1))
  stored = cheapest(coded.indices, coded.layout, width, with_zero)
  cost, tables = stored.bits(width, with_zero), entry.tables * quantizer.tabled * table_bits
  return cost._replace(tables=cost.tables + tables, padding=cost.padding + -tables % 8)
