"""Patterns and connectivity ready to run: filters of equal length together, kernels by pattern (FKW).

    FQFKWX: u32 O, u32 I, u8 M, u8 n, u16 V, u8 index form, u32 bytes of the index; V patterns of 16
    bits (32 or 64 for kernels of more than 16 or 32 taps); offset u32 [O+1]; reorder u16 [O]; stride
    u16 [O, V+1]; index; n values per kernel, taps ascending

Kernels of pattern p in the filter at position f are `offset[f] + stride[f, p]` up to `offset[f] +
stride[f, p+1]`: no code per kernel. The index is u16, u8, or u8 deltas: inside a run each input minus
the one before minus 1, 255 standing for "255 and more follows".

Source: Niu et al., "PatDNN", ASPLOS 2020, sections 5.2-5.3; orders and widths are our own.
"""

from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _container, _patterns

MAGIC = b'FQFKWX'
FORMS = ('u16', 'u8', 'delta')


class Encoded(NamedTuple):
  """Kept kernels in the order in which they run.

  Attributes:
    shape: (O, I, M).
    table: uint64 [V], patterns of n taps, bit t is tap t.
    form: how the file holds `index`: 'u16', 'u8' or 'delta'.
    offset: int64 [O+1], kept kernels before each filter.
    reorder: int64 [O], output of each filter.
    index: int64 [kernels], input of each kernel.
    stride: int64 [O, V+1], kernels of a filter before each pattern.
    values: [kernels, n].
  """

  shape: tuple[int, int, int]
  table: np.ndarray
  form: str
  offset: np.ndarray
  reorder: np.ndarray
  index: np.ndarray
  stride: np.ndarray
  values: np.ndarray


def filter_order(codes: np.ndarray, similarity: str = 'runs') -> np.ndarray:
  """Order of the filters: by number of kept kernels, and among equals the similar ones together.

  Among filters of one length the first starts; then always the one most similar to the last placed
  follows, of equally similar ones the first.

  Args:
    codes: integers [O, I], pattern of each kernel, -1 where it was removed.
    similarity: 'runs' counts positions of equal pattern once each filter is sorted by pattern (the
      filters branch alike); 'inputs' counts inputs on which both have the same pattern (the filters
      load alike).

  Returns:
    int64 [O], a permutation.

  Raises:
    ValueError: for another similarity.

  Example:
    >>> print(filter_order(np.array([[0, 1, 0], [0, -1, 1], [1, 0, 1], [1, 0, 0]])))
    [1 0 3 2]
  """
  if similarity not in ('runs', 'inputs'):
    raise ValueError(f"similarity={similarity!r} must be 'runs' or 'inputs'.")
  lengths = (codes >= 0).sum(1)
  order = np.argsort(lengths, kind='stable')
  for length in np.unique(lengths).tolist():
    group = order[lengths[order] == length]
    rows = codes[group]
    if similarity == 'runs':
      rows = np.sort(rows, 1)[:, rows.shape[1] - length :]
    left = np.arange(group.size)
    chain = [0]
    while left.size > 1:
      left = left[left != chain[-1]]
      last = rows[chain[-1]]
      chain.append(int(left[((rows[left] == last) & (last >= 0)).sum(1).argmax()]))
    order[lengths[order] == length] = group[chain]
  return order


def encode(
  kernels: np.ndarray,
  table=None,
  mask: np.ndarray | None = None,
  similarity: str = 'runs',
  form: str | None = None,
) -> Encoded:
  """Reorders filters and kernels and stores n weights of every kernel in which something lives.

  Args:
    kernels: [O, I, M], taps row-major; O and I up to 65535.
    table: patterns, integers of M bits, all with n bits set; by default what the kernels need. Of
      several that cover a kernel the first is taken; their order is that of the runs.
    mask: bool like `kernels`, True lives; by default every entry that is not +0.
    similarity: see `filter_order`.
    form: of the index in the file, 'u16', 'u8' (up to 256 inputs) or 'delta'; by default 'u8' where
      it can be, else what is smaller.

  Raises:
    ValueError: for too many filters or inputs, a form that cannot hold them, a table that is not one,
      a kernel it does not cover, more than 64 taps, another rank, a dtype that is not stored, or a
      mask that does not fit.

  Example:
    >>> w = np.zeros((2, 3, 4), np.int8)
    >>> w[0] = [1, 1, 0, 0], [0, 0, 1, 1], [2, 2, 0, 0]
    >>> w[1, 2] = [0, 0, 3, 3]
    >>> encoded = encode(w, table=(0b0011, 0b1100))
    >>> print(encoded.offset, encoded.reorder, encoded.index, encoded.stride.tolist())
    [0 1 4] [1 0] [2 0 2 1] [[0, 0, 1], [0, 2, 3]]
  """
  table, codes, kept = _patterns.prepare(kernels, table, mask)
  o, i, m = kernels.shape
  if max(o, i) > 0xFFFF:
    raise ValueError(f'kernels {list(kernels.shape)}: at most 65535 outputs and inputs fit.')
  codes = np.where(kept, codes, -1)
  reorder = filter_order(codes, similarity)
  codes = codes[reorder]
  filters, index = np.nonzero(codes >= 0)
  code = codes[filters, index]
  order = np.lexsort((index, code, filters))
  filters, index, code = filters[order], index[order], code[order]
  offset = np.concatenate([[0], np.cumsum((codes >= 0).sum(1))])
  counts = np.bincount(filters * table.size + code, minlength=o * table.size)
  stride = np.pad(np.cumsum(counts.reshape(o, -1), 1), ((0, 0), (1, 0)))
  values = _patterns.gather(kernels[reorder[filters], index], code, table)
  if form is None:
    smaller = 'delta' if _to_deltas(index, stride).size < 2 * index.size else 'u16'
    form = 'u8' if i <= 256 else smaller
  if form not in FORMS or (form == 'u8' and i > 256):
    raise ValueError(f"form={form!r} for {i} inputs must be 'u16', 'delta', or up to 256 'u8'.")
  return Encoded((o, i, m), table, form, offset, reorder, index, stride, values)


def codes_of(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
  """Filter position and pattern of every kernel.

  Args:
    encoded: any.

  Returns:
    int64 [kernels] and int64 [kernels].
  """
  counts = np.diff(encoded.stride, axis=1)
  o, size = counts.shape
  run = np.repeat(np.arange(o * size), counts.ravel())
  return run // size, run % size


def decode(encoded: Encoded) -> np.ndarray:
  """The kernels [O, I, M], filters in their own order, bit for bit."""
  filters, codes = codes_of(encoded)
  out = np.zeros(encoded.shape, encoded.values.dtype)
  kernels = _patterns.scatter(encoded.values, codes, encoded.table, encoded.shape[2])
  out[encoded.reorder[filters], encoded.index] = kernels
  return out


def _run_starts(stride):
  """Number of the first kernel of every run that is not empty, and the lengths of these runs."""
  lengths = np.diff(stride, axis=1).ravel()
  lengths = lengths[lengths > 0]
  return np.cumsum(lengths) - lengths, lengths


def _to_deltas(index, stride):
  delta = np.diff(index, prepend=0) - 1
  starts, _ = _run_starts(stride)
  delta[starts] = index[starts]
  out = np.full(index.size + int((delta // 255).sum()), 255, np.uint8)
  out[np.cumsum(delta // 255 + 1) - 1] = delta % 255
  return out


def _from_deltas(data, stride):
  """Inverse of `_to_deltas`, for as many deltas as there are kernels."""
  delta = np.diff(np.cumsum(data, dtype=np.int64)[data != 255], prepend=0)
  reach = np.cumsum(delta + 1)
  starts, lengths = _run_starts(stride)
  before = np.concatenate([[0], reach])[starts]
  return reach - np.repeat(before, lengths) - 1


def _sections(encoded, value_bits):
  (o, i, m), table, form, offset, reorder, index, stride, values = encoded
  packed = _to_deltas(index, stride) if form == 'delta' else index
  width = 16 if form == 'u16' else 8
  head = _container.header(
    MAGIC, values, value_bits, 'IIBBHBI',
    o, i, m, values.shape[1], table.size, FORMS.index(form), packed.size * width // 8,
  )  # fmt: skip
  return head, [
    _patterns.table_part(table, m),
    _container.Part('index', offset, 32),
    _container.Part('index', reorder, 16),
    _container.Part('index', stride, 16),
    _container.Part('index', packed, width),
    _container.Part('values', values, _container.value_width(values, value_bits)),
  ]


def bits(encoded: Encoded, value_bits: int | None = None) -> _container.Bits:
  """Cost of the file; see `fqjax.runtime.codecs`."""
  return _container.measure(*_sections(encoded, value_bits))


def to_bytes(encoded: Encoded, value_bits: int | None = None) -> bytes:
  """The file; see `fqjax.runtime.codecs`."""
  return _container.write(*_sections(encoded, value_bits))


def from_bytes(data, limit: int = _container.LIMIT) -> Encoded:
  """Reads the file; ValueError names what is wrong and where."""
  reader = _container.Reader(data, MAGIC, limit)
  o, i, m, n, size, form, index_bytes = reader.numbers('header', 'IIBBHBI')
  reader.size('shape', o, i, m)
  reader.require(m <= _patterns.MOST_TAPS, 'taps', f'are {m}')
  reader.require(size >= 1, 'number of patterns', 'is 0')
  reader.require(form < len(FORMS), 'index form', f'is {form}')
  table = _patterns.read_table(reader, size, m, n)
  offset = reader.fields('offset', o + 1, 32).astype(np.int64)
  reorder = reader.fields('reorder', o, 16).astype(np.int64)
  stride = reader.fields('stride', o * (size + 1), 16).astype(np.int64).reshape(o, size + 1)
  lengths = np.diff(offset)
  filled = (lengths >= 0).all() and (lengths <= i).all() and offset[0] == 0
  reader.require(filled, 'offset', f'does not begin at 0 or grow by 0..{i} per filter')
  reader.require(
    (np.sort(reorder) == np.arange(o)).all(), 'reorder', f'is no permutation of 0..{o - 1}'
  )
  runs = (stride[:, 0] == 0) & (stride[:, -1] == lengths) & (np.diff(stride, axis=1) >= 0).all(1)
  reader.require(runs.all(), 'stride', 'does not rise from 0 to the length of its filter')
  index = _read_index(reader, FORMS[form], int(offset[-1]), index_bytes, stride)
  reader.require((index < i).all(), 'index', f'reaches input {index.max(initial=0)} of {i}')
  inside = np.ones(index.size, bool)
  inside[_run_starts(stride)[0]] = False
  rises = np.diff(index, prepend=0) > 0
  reader.require(rises[inside].all(), 'index', 'does not ascend inside a run')
  values = reader.values(index.size, n)
  reader.end()
  return Encoded((o, i, m), table, FORMS[form], offset, reorder, index, stride, values)


def _read_index(reader, form, kernels, size, stride):
  width = 16 if form == 'u16' else 8
  data = reader.fields('index', size * 8 // width, width)
  # An odd number of bytes is no u16 index; a last 255 says that more follows.
  whole = (data[-1:] != 255).all() and np.count_nonzero(data != 255) == kernels
  whole = whole if form == 'delta' else data.size * width == 8 * size and data.size == kernels
  reader.require(whole, 'index', f'has {size} bytes, not those of {kernels} {form} entries')
  return _from_deltas(data, stride) if form == 'delta' else data.astype(np.int64)
