"""Structures that look beyond or within one leaf: a shared budget, the gates of a recurrent cell."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.runtime import codecs
from fqjax.sparsity._layout import from_kernels, kernel_shape, to_kernels
from fqjax.sparsity.structures import Structure, Unstructured
from fqjax.sparsity.structures._base import codec_of


@dataclasses.dataclass(frozen=True)
class Pooled(Unstructured):
  """The largest weights of several leaves together: one threshold for all leaves of a scope.

  A plan projects the leaves of a scope at once; alone (`Pooled.project`) it is `Unstructured`. How
  much of a leaf lives only the plan knows: `encode` and `bits` store what is not zero, so project
  with the plan first.

  Attributes:
    keep: kept fraction of all weights in the scope.
    scope: leaves whose `Pooled` names the same scope share the threshold.
    least: weights each leaf keeps whatever the others hold, at least 1: no layer is cut through.

  Example:
    >>> from fqjax.sparsity import make_plan, project
    >>> params = {
    ...   'a': {'kernel': jnp.array([[9.0, 8.0]])},
    ...   'b': {'kernel': jnp.array([[1.0, 7.0]])},
    ... }
    >>> plan = make_plan(params, [('.*/kernel', Pooled(keep=0.75))])
    >>> jax.tree.map(lambda w: w.tolist(), project(plan, params)[0])
    {'a': {'kernel': [[9.0, 8.0]]}, 'b': {'kernel': [[0.0, 7.0]]}}
  """

  scope: str = 'global'
  least: int = 1

  def __post_init__(self):
    super().__post_init__()
    if self.keep is None:
      raise ValueError(f'Pooled takes keep=, not count={self.count}: leaves may join the scope.')
    if self.least < 1:
      raise ValueError(f'Pooled least={self.least} must be at least 1, or a layer may end.')

  def _stored_mask(self, w, layout):
    del layout
    return (w != 0) | np.signbit(w)  # -0.0 is a value like others


@dataclasses.dataclass(frozen=True)
class Gates(Structure):
  """A structure applied to each gate of a recurrent cell by itself, so that none is starved.

  The outputs of the leaf are `count` gates one after the other, as Haiku, Equinox and NNX store
  them (Linen's cells have a leaf for each gate and need none of this). The stored form is a tuple of
  those of the gates, each in the format of its structure.

  Attributes:
    structure: for every gate, or a tuple of one for each.
    count: number of gates: 4 for an LSTM, 3 for a GRU.

  Example:
    >>> from fqjax.sparsity import make_plan, project
    >>> params = {'w': jnp.array([[9.0, 8.0, 0.25, 0.5]])}  # one input, two gates of two units
    >>> plan = make_plan(params, [('w', Gates(Unstructured(keep=0.5), 2))])
    >>> print(project(plan, params)[0]['w'])
    [[9.  0.  0.  0.5]]
  """

  structure: Structure | tuple[Structure, ...]
  count: int = 4

  def __post_init__(self):
    if isinstance(self.structure, tuple) and len(self.structure) != self.count:
      raise ValueError(
        f'Gates: {len(self.structure)} structures for {self.count} gates; give one, or one each.'
      )

  def gates(self) -> tuple[Structure, ...]:
    """The structure of each gate."""
    return self.structure if isinstance(self.structure, tuple) else (self.structure,) * self.count

  def check(self, shape, layout):
    """As `Structure.check`."""
    part = self._part(shape, layout)
    for gate in self.gates():
      gate.check(part, 'OIM')

  def kept(self, shape, layout):
    """As `Structure.kept`."""
    part = self._part(shape, layout)
    return sum(gate.kept(part, 'OIM') for gate in self.gates())

  def project(self, w, layout, *, saliency=None, frozen=None):
    """As `Structure.project`."""
    self.check(w.shape, layout)

    def split(x):
      kernels = to_kernels(x, layout)
      return kernels.reshape(self.count, -1, *kernels.shape[1:])

    parts = [None if x is None else split(x) for x in (w, saliency, frozen)]

    def mask_of(gate, w, saliency, frozen):
      return gate.project(w, 'OIM', saliency=saliency, frozen=frozen)[1]

    if isinstance(self.structure, tuple):
      masks = jnp.stack(
        [
          mask_of(gate, *(None if x is None else x[i] for x in parts))
          for i, gate in enumerate(self.structure)
        ]
      )
    else:
      masks = jax.vmap(functools.partial(mask_of, self.structure))(*parts)
    mask = from_kernels(masks.reshape(kernel_shape(w.shape, layout)), layout, w.shape)
    return jnp.where(mask, w, jnp.zeros_like(w)), mask

  def decode(self, encoded, layout, shape, dtype=None):
    """As `Structure.decode`, from a tuple of gates."""
    part = self._part(shape, layout)
    if len(encoded) != self.count:
      raise ValueError(f'{len(encoded)} gates are stored, {self} has {self.count}.')
    gates = [
      gate.decode(one, 'OIM', part, dtype) for gate, one in zip(self.gates(), encoded, strict=True)
    ]
    return from_kernels(np.concatenate(gates), layout, tuple(shape))

  def bits(self, w, layout, value_bits=None):
    """As `Structure.bits`, the sum over the gates."""
    costs = [codec_of(one).bits(one, value_bits) for one in self._encode(w, layout)[0]]
    return codecs.Bits(*map(sum, zip(*costs, strict=True)))

  def _encode(self, w, layout):
    w = np.asarray(w)
    self.check(w.shape, layout)
    gates = zip(self.gates(), np.split(to_kernels(w, layout), self.count), strict=True)
    stored, outside = zip(*(gate._encode(part, 'OIM') for gate, part in gates), strict=True)
    return stored, sum(outside)

  def _select(self, scores):
    return self.project(scores, 'OIM', saliency=scores)[1]

  def _part(self, shape, layout) -> tuple[int, int, int]:
    o, i, m = kernel_shape(tuple(shape), layout)
    if o % self.count:
      raise ValueError(
        f'Gates: {o} outputs of a {layout} leaf {list(shape)} are not {self.count} equal gates; '
        'set count (LSTM 4, GRU 3), or the layout if outputs stand elsewhere.'
      )
    return o // self.count, i, m
