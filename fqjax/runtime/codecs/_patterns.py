"""Kernels whose live taps follow a table of patterns: bit t of a pattern is tap t, row-major."""

import numpy as np

from fqjax.runtime.codecs import _bits, _container, _live

MOST_TAPS = 64
_MOST_INFERRED = 4096


def mask_width(taps: int) -> int:
  """Bits a pattern takes in a file: 16, 32 or 64."""
  return 16 if taps <= 16 else 32 if taps <= 32 else 64


def to_patterns(live: np.ndarray) -> np.ndarray:
  """The live taps of every kernel as one integer.

  Args:
    live: bool [..., M], M up to 64.

  Returns:
    uint64 [...].

  Raises:
    ValueError: for more taps.

  Example:
    >>> int(to_patterns(np.array([0, 1, 0, 1, 1, 1, 0, 0, 0], bool)))
    58
  """
  if live.shape[-1] > MOST_TAPS:
    raise ValueError(
      f'kernels of {live.shape[-1]} taps have no patterns; {MOST_TAPS} are the most.'
    )
  eight = np.zeros((*live.shape[:-1], 8), np.uint8)
  packed = np.packbits(live, axis=-1, bitorder='little')
  eight[..., : packed.shape[-1]] = packed
  return eight.view('<u8').astype(np.uint64)[..., 0]


def to_taps(table: np.ndarray) -> np.ndarray:
  """Tap numbers of patterns of equal size.

  Args:
    table: uint64 [V], all with n bits.

  Returns:
    int64 [V, n], ascending.
  """
  on = table[:, None] >> np.arange(MOST_TAPS, dtype=np.uint64) & np.uint64(1)
  return np.nonzero(on)[1].reshape(table.size, -1)


def check_table(table, taps: int) -> np.ndarray:
  """The patterns as uint64 [V].

  Args:
    table: integers.
    taps: M.

  Raises:
    ValueError: unless they are 1 to 65535 different patterns of equal size within M taps.
  """
  numbers = [int(p) for p in table]
  sizes = {p.bit_count() for p in numbers if p > 0}
  good = 1 <= len(numbers) <= 0xFFFF and len(set(numbers)) == len(numbers) and len(sizes) == 1
  if not good or min(numbers) <= 0 or max(numbers) >> taps:
    shown = ', '.join(map(str, numbers[:8])) + (', ...' if len(numbers) > 8 else '')
    raise ValueError(
      f'patterns ({shown}) must be 1 to 65535 different masks of {taps} taps, all with the same '
      'number of bits, at least one.'
    )
  return np.array(numbers, np.uint64)


def infer_table(patterns: np.ndarray, taps: int) -> np.ndarray:
  """Patterns that cover all kernels: the largest ones, and what else is needed.

  Args:
    patterns: uint64, live taps of each kernel.
    taps: M.

  Returns:
    uint64 [V], ascending, all as large as the largest.

  Raises:
    ValueError: when the kernels have more than 4096 different supports.
  """
  found = np.unique(patterns)
  if found.size > _MOST_INFERRED:
    raise ValueError(
      f'{found.size} different supports are more than {_MOST_INFERRED}: these kernels follow no '
      'patterns. Store them as a bitmask, or project them first and name the table.'
    )
  sizes = np.bitwise_count(found)
  n = max(int(sizes.max()), 1)
  table = set(found[sizes == n].tolist())
  # A kernel with fewer taps fits a pattern that is there, or brings its own, lowest free taps added.
  rest = found[sizes < n]
  if rest.size:
    kept = np.array(sorted(table), np.uint64)
    covered = np.zeros(rest.size, bool)
    for pattern in kept:
      covered |= rest & ~pattern == 0
    for pattern in rest[~covered].tolist():
      if any(pattern & ~p == 0 for p in table):
        continue
      tap = 0
      while pattern.bit_count() < n:
        pattern |= 1 << tap
        tap += 1
      table.add(pattern)
  return np.array(sorted(table), np.uint64)


def assign(patterns: np.ndarray, table: np.ndarray) -> np.ndarray:
  """For every kernel the lowest entry of the table that covers its live taps.

  Args:
    patterns: uint64 [O, I].
    table: uint64 [V].

  Returns:
    int64 [O, I].

  Raises:
    ValueError: for a kernel no entry covers.
  """
  found, which = np.unique(patterns, return_inverse=True)
  codes = np.full(found.size, -1)
  for code, pattern in reversed(list(enumerate(table))):
    codes[found & ~pattern == 0] = code
  if (codes < 0).any():
    lost = found[codes < 0][0]
    o, i = np.argwhere(patterns == lost)[0]
    raise ValueError(
      f'kernel of output {o}, input {i} lives on taps {bin(lost)} that none of the {table.size} '
      'patterns covers; project first.'
    )
  return codes[which.reshape(patterns.shape)]


def prepare(kernels: np.ndarray, table, mask: np.ndarray | None):
  """What every pattern format starts from.

  Args:
    kernels: [O, I, M].
    table: patterns, or None to infer them.
    mask: bool like `kernels`, or None.

  Returns:
    table: uint64 [V].
    codes: int64 [O, I].
    some: bool [O, I], kernels in which something lives.

  Raises:
    ValueError: as `live`, `check_table`, `infer_table` and `assign` do.
  """
  _container.code_of(kernels)
  live = _live.live(kernels, mask, 3)
  patterns = to_patterns(live)
  taps = kernels.shape[2]
  table = infer_table(patterns, taps) if table is None else check_table(table, taps)
  return table, assign(patterns, table), patterns != 0


def gather(kernels: np.ndarray, codes: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Values on the taps of each kernel's pattern.

  Args:
    kernels: [K, M].
    codes: integers [K].
    table: uint64 [V], patterns of n taps.

  Returns:
    [K, n], taps ascending.
  """
  return np.take_along_axis(kernels, to_taps(table)[codes], 1)


def scatter(values: np.ndarray, codes: np.ndarray, table: np.ndarray, taps: int) -> np.ndarray:
  """Inverse of `gather`.

  Args:
    values: [K, n].
    codes: integers [K].
    table: uint64 [V].
    taps: M.

  Returns:
    [K, M], 0 off the pattern.
  """
  kernels = np.zeros((codes.size, taps), values.dtype)
  np.put_along_axis(kernels, to_taps(table)[codes], values, 1)
  return kernels


def table_part(table: np.ndarray, taps: int) -> _container.Part:
  """The table as a section.

  Args:
    table: uint64 [V].
    taps: M.
  """
  width = mask_width(taps)
  if width <= 32:
    return _container.Part('tables', table, width)
  halves = np.stack([table & np.uint64(0xFFFFFFFF), table >> np.uint64(32)], 1)
  return _container.Part('tables', halves, 32)


def read_table(reader: _container.Reader, size: int, taps: int, n: int) -> np.ndarray:
  """Reads and checks the table.

  Args:
    reader: stands at it.
    size: V.
    taps: M.
    n: bits per pattern.

  Raises:
    ValueError: unless it is a table of patterns of n taps.
  """
  width = mask_width(taps)
  words = reader.fields('patterns', size * -(-width // 32), min(width, 32)).astype(np.uint64)
  if width == 64:
    words = words[::2] | words[1::2] << np.uint64(32)
  try:
    table = check_table(words, taps)
  except ValueError as e:
    raise reader.error('patterns', f'are wrong: {e}') from e
  sizes = np.bitwise_count(table)
  reader.require((sizes == n).all(), 'patterns', f'have {sizes[0]} taps, not {n}')
  return table


def read_codes(reader: _container.Reader, count: int, table: np.ndarray) -> np.ndarray:
  """Reads one code per kernel.

  Args:
    reader: stands at them.
    count: number of kernels.
    table: [V].

  Raises:
    ValueError: for a code the table does not have.
  """
  codes = reader.fields('codes', count, _bits.width_for(table.size)).astype(np.int64)
  reader.require(
    (codes < table.size).all(), 'codes', f'reach {codes.max(initial=0)} of {table.size}'
  )
  return codes
