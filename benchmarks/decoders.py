"""Jitted decoders: from the arrays of a stored matrix to the dense one, format by format.

The formats of `fqjax.runtime.codecs` decode with NumPy. To compare what their indices cost, each is
decoded here by one compiled program from the very arrays it stores: places are worked out, values
scattered. Where blocks or banks are regular enough to be written without a scatter, that is a second
way; a format stands in the table with its faster one.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fqjax import sparsity as sp
from fqjax.runtime.codecs import bank, bitmask, blocks, csr, darb, nm, relative, rice, slices

Decoder = Callable[[], jax.Array]


def _program(function: Callable, *arrays) -> Decoder:
  """A call of the compiled function on arrays that are already on the device."""
  return functools.partial(jax.jit(function), *map(jnp.asarray, arrays))


def _scatter(shape, flat, values):
  dense = jnp.zeros(shape[0] * shape[1], values.dtype)
  dense = dense.at[flat].set(values, unique_indices=True, mode='promise_in_bounds')
  return dense.reshape(shape)


def _row_of_each(starts, size: int):
  """Row of every entry of `size`, from where rows start: a mark per row, then a running sum."""
  marks = jnp.zeros(size + 1, jnp.int32).at[starts].add(1)
  return jnp.cumsum(marks[:size]) - 1


def of_csr(e: csr.Encoded) -> dict[str, Decoder]:
  def decode(starts, columns, values):
    row = _row_of_each(starts, values.size)
    return _scatter(e.shape, row * e.shape[1] + columns.astype(jnp.int32), values)

  return {'scatter': _program(decode, e.pointers[:-1].astype(np.int32), e.columns, e.values)}


def of_relative(e: relative.Encoded) -> dict[str, Decoder]:
  def decode(gaps, values):
    return _scatter(e.shape, jnp.cumsum(gaps.astype(jnp.int32) + 1) - 1, values)

  return {'scatter': _program(decode, e.gaps, e.values)}


def of_rice(e: rice.Encoded) -> dict[str, Decoder]:
  ends = np.cumsum((e.gaps >> e.low_bits) + 1) - 1
  unary = np.zeros(ends[-1] + 1, bool)
  unary[ends] = True

  def decode(unary, low, values):
    high = jnp.diff(jnp.flatnonzero(unary, size=values.size), prepend=-1) - 1
    gaps = (high << e.low_bits) | low.astype(jnp.int32)
    return _scatter(e.shape, jnp.cumsum(gaps + 1) - 1, values)

  low = (e.gaps & ((1 << e.low_bits) - 1)).astype(np.uint16)
  return {'scatter': _program(decode, unary, low, e.values)}


def of_bitmask(e: bitmask.Encoded) -> dict[str, Decoder]:
  def decode(mask, values):
    place = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32) - 1
    found = jnp.where(mask.reshape(-1), values[jnp.maximum(place, 0)], 0)
    return found.reshape(mask.shape)

  return {'gather': _program(decode, e.mask, e.values)}


def of_blocks(e: blocks.Encoded) -> dict[str, Decoder]:
  rows, columns = e.values.shape[1:]
  high, wide = e.shape[0] // rows, e.shape[1] // columns

  def decode(starts, place, values):
    block = _row_of_each(starts, len(values)) * wide + place.astype(jnp.int32)
    tiles = jnp.zeros((high * wide, rows, columns), values.dtype)
    tiles = tiles.at[block].set(values, unique_indices=True, mode='promise_in_bounds')
    return tiles.reshape(high, wide, rows, columns).transpose(0, 2, 1, 3).reshape(e.shape)

  return {'scatter': _program(decode, e.pointers[:-1].astype(np.int32), e.columns, e.values)}


def of_slices(e: slices.Encoded) -> dict[str, Decoder]:
  [kept] = e.kept  # of the rows

  def decode(rows, values):
    dense = jnp.zeros((kept.size, values.shape[1]), values.dtype)
    return dense.at[rows].set(values, unique_indices=True, mode='promise_in_bounds')

  return {'scatter': _program(decode, np.flatnonzero(kept).astype(np.int32), e.values)}


def _select(index, values, size: int):
  """[..., n] places and values of groups to [..., size], comparing in place of scattering."""
  place = jax.lax.broadcasted_iota(index.dtype, (*index.shape[:-1], size), index.ndim - 1)
  dense = jnp.zeros(place.shape, values.dtype)
  for i in range(index.shape[-1]):
    dense = jnp.where(place == index[..., i : i + 1], values[..., i : i + 1], dense)
  return dense


def of_nm(e: nm.Encoded) -> dict[str, Decoder]:
  groups = e.values.shape[1]

  def scatter(index, values):
    at = jnp.arange(e.shape[0] * groups, dtype=jnp.int32).reshape(e.shape[0], groups, 1)
    flat = at * e.m + index.astype(jnp.int32)
    return _scatter(e.shape, flat.reshape(-1), values.reshape(-1))

  def select(index, values):
    return _select(index, values, e.m).reshape(e.shape)

  return {
    'scatter': _program(scatter, e.index, e.values),
    'select': _program(select, e.index, e.values),
  }


def of_bank(e: bank.Encoded) -> dict[str, Decoder]:
  lengths = bank.row_lengths(e.shape[1], e.size, e.counts).astype(np.int32)

  def decode(lengths, counts, index, values):
    starts = jnp.cumsum(lengths) - lengths
    row = _row_of_each(starts, values.size)
    nth = jnp.arange(values.size, dtype=jnp.int32) - starts[row]
    column = nth // counts[row] * e.size + index.astype(jnp.int32)
    return _scatter(e.shape, row * e.shape[1] + column, values)

  return {'scatter': _program(decode, lengths, e.counts.astype(np.int32), e.index, e.values)}


def of_darb(e: darb.Encoded) -> dict[str, Decoder]:
  lengths = darb.row_lengths(e.shape[1], e.exponents).astype(np.int32)
  starts = np.cumsum(lengths) - lengths

  def scatter(lengths, exponents, index, values):
    starts = jnp.cumsum(lengths) - lengths
    row = _row_of_each(starts, values.size)
    nth = jnp.arange(values.size, dtype=jnp.int32) - starts[row]
    column = (nth << exponents[row]) | index.astype(jnp.int32)
    return _scatter(e.shape, row * e.shape[1] + column, values)

  # Rows of one block size side by side, as a runtime lays them out when it loads the file.
  sizes = np.unique(e.exponents).tolist()
  members = [np.flatnonzero(e.exponents == size) for size in sizes]
  parts = []
  for size, rows in zip(sizes, members, strict=True):
    at = starts[rows, None] + np.arange(-(-e.shape[1] >> size))
    parts += [e.index[at][..., None], e.values[at][..., None]]
  back = np.argsort(np.concatenate(members)).astype(np.int32)

  def select(back, *parts):
    dense = [
      _select(index, values, 1 << size).reshape(len(index), -1)[:, : e.shape[1]]
      for size, index, values in zip(sizes, parts[::2], parts[1::2], strict=True)
    ]
    return jnp.concatenate(dense)[back]

  return {
    'scatter': _program(scatter, lengths, e.exponents.astype(np.int32), e.index, e.values),
    'select': _program(select, back, *parts),
  }


DECODERS = {
  bank.Encoded: of_bank,
  bitmask.Encoded: of_bitmask,
  blocks.Encoded: of_blocks,
  csr.Encoded: of_csr,
  darb.Encoded: of_darb,
  nm.Encoded: of_nm,
  relative.Encoded: of_relative,
  rice.Encoded: of_rice,
  slices.Encoded: of_slices,
}


def stored_matrices(small: bool) -> tuple[dict[str, dict[str, Decoder]], dict[str, np.ndarray]]:
  """One matrix at 13x in every format: its decoders, and what they must return."""
  outputs, inputs = (24, 60) if small else (6000, 1500)
  rng = np.random.default_rng(0)
  scale = np.exp(rng.normal(0, 0.7, (outputs, 1)))  # rows differ, as those of trained gates do
  w = jnp.asarray((rng.standard_normal((outputs, inputs)) * scale).astype(np.float32))
  keep = 1 / 13
  anywhere = sp.Unstructured(keep=keep)
  # With the format where the structure has several.
  made = {
    'CSR': (anywhere, csr),
    'relative': (anywhere, relative),
    'Rice': (anywhere, rice),
    'bitmask': (anywhere, bitmask),
    'blocks of 4x4': (sp.Blocks(4, 4, keep=keep), None),
    'blocks of 1x4': (sp.Blocks(1, 4, keep=keep), None),
    'rows': (sp.Filters(keep=keep), None),
    '1:12': (sp.NM(1, 12), None),
    'banks of 16': (sp.bank(w, 'OI', 13), None),
    'DARB': (sp.darb(w, 'OI', 13), None),
  }
  found, dense = {}, {}
  for name, (structure, codec) in made.items():
    z, mask = (np.asarray(x) for x in jax.jit(lambda w, s=structure: s.project(w, 'OI'))(w))
    encoded = codec.encode(z, mask=mask) if codec else structure.encode(z, 'OI')
    found[name], dense[name] = DECODERS[type(encoded)](encoded), z
  return found, dense
