"""What all stored formats share: a header, sections, and a reader that trusts nothing.

magic      6 bytes of ASCII
version    u8, 1
dtype      u8, position in `DTYPES`
value bits u8; below the dtype's own width, integer values are packed
...        the format's own numbers, little endian
sections   one after the other, each filled up with zero bits to a whole byte
"""

from collections.abc import Sequence
import math
import struct
from typing import NamedTuple

import numpy as np

from fqjax.runtime.codecs import _bits

VERSION = 1
DTYPES = (
  'float32', 'float16', 'float64', 'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64',
  'uint64',
)  # fmt: skip
# Entries of the dense array a stored one may stand for, unless the reader is told otherwise: a few
# bytes can claim any shape.
LIMIT = 1 << 31


class Bits(NamedTuple):
  """What a stored array costs, in bits; the sum is that of the file.

  Attributes:
    values: stored values, explicit zeros and fillers included.
    index: what says where the values belong.
    tables: the header, and whatever is stored once per array.
    padding: zero bits that fill up bytes.
  """

  values: int
  index: int
  tables: int
  padding: int = 0

  @property
  def total(self) -> int:
    """Bits of the file."""
    return sum(self)


class Part(NamedTuple):
  """One section of a file.

  Attributes:
    kind: 'values', 'index' or 'tables'.
    fields: values, or unsigned integers.
    width: bits per field, one number, or [rows] where rows end on bytes.
    counts: [rows], fields per row, where rows end on bytes.
  """

  kind: str
  fields: np.ndarray
  width: int | np.ndarray
  counts: np.ndarray | None = None


def value_width(values: np.ndarray, value_bits: int | None) -> int:
  """Bits a value is to take: `value_bits`, or those of its dtype.

  Args:
    values: any array.
    value_bits: 1..64, or None.

  Raises:
    ValueError: for another dtype, or number of bits.
  """
  code_of(values)
  width = 8 * values.dtype.itemsize if value_bits is None else value_bits
  if not 1 <= width <= 64:
    raise ValueError(f'value_bits={value_bits} must be 1..64.')
  return width


def code_of(values: np.ndarray) -> int:
  """Number under which the dtype is stored.

  Raises:
    ValueError: for a dtype that is not stored.
  """
  name = values.dtype.name
  if name not in DTYPES:
    raise ValueError(
      f'values of dtype {name} are not stored; choose one of {", ".join(DTYPES)}. bfloat16 goes as '
      'its raw bits: w.view(np.uint16).'
    )
  return DTYPES.index(name)


def header(
  magic: bytes, values: np.ndarray, value_bits: int | None, layout: str, *numbers: int
) -> bytes:
  """The bytes before the sections.

  Args:
    magic: six bytes.
    values: gives the dtype.
    value_bits: bits a value takes; None for all of the dtype.
    layout: `struct` codes of the format's own numbers.
    *numbers: those numbers.

  Raises:
    ValueError: for a number that does not fit its field, or values of another dtype.
  """
  start = struct.pack('<BBB', VERSION, code_of(values), value_width(values, value_bits))
  try:
    return magic + start + struct.pack('<' + layout, *numbers)
  except struct.error as e:
    raise ValueError(
      f'{magic.decode()} header: {list(numbers)} do not fit its fields {layout!r}: {e}; '
      'store the array in smaller pieces.'
    ) from e


def _pack_values(values: np.ndarray, width: int) -> bytes:
  own = 8 * values.dtype.itemsize
  if width == own:
    return values.astype(values.dtype.newbyteorder('<'), copy=False).tobytes()
  if values.dtype.kind == 'f' or not width < own or width > _bits.WIDEST:
    raise ValueError(
      f'value_bits={width}: {values.dtype} values are written in {own} bits, integer ones also in '
      f'fewer, up to {_bits.WIDEST}; `bits` counts any.'
    )
  signed = values.dtype.kind == 'i'
  low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
  if values.size and not (low <= values.min() and values.max() <= high):
    raise ValueError(
      f'value_bits={width}: {values.dtype} values {values.min()}..{values.max()} do not fit; '
      f'{low}..{high} do.'
    )
  return _bits.pack(values.astype(np.int64) & ((1 << width) - 1), width)


def write(head: bytes, parts: Sequence[Part]) -> bytes:
  """The whole file.

  Args:
    head: from `header`.
    parts: the sections.

  Raises:
    ValueError: for fields that do not fit their width.
  """
  out = [head]
  for kind, fields, width, counts in parts:
    if counts is not None:
      out.append(_bits.pack_ragged(fields, counts, np.asarray(width)))
    elif kind == 'values':
      out.append(_pack_values(fields, int(width)))
    else:
      out.append(_bits.pack(fields, int(width)))
  return b''.join(out)


def measure(head: bytes, parts: Sequence[Part]) -> Bits:
  """Cost of the file `write` makes, without making it.

  Args:
    head: from `header`.
    parts: the sections.
  """
  cost = {'values': 0, 'index': 0, 'tables': 8 * len(head), 'padding': 0}
  for kind, fields, width, counts in parts:
    sizes = np.asarray(fields.size if counts is None else counts, np.int64) * width
    exact = int(sizes.sum())
    cost[kind] += exact
    cost['padding'] += 8 * int((-(-sizes // 8)).sum()) - exact
  return Bits(**cost)


class Reader:
  """Reads a file section by section and refuses whatever does not fit.

  Args:
    data: the whole file, bytes or anything with their interface.
    magic: six bytes it must start with.
    limit: entries of the largest dense array it may stand for.

  Attributes:
    dtype: of the values.
    value_bits: bits per value.

  Raises:
    ValueError: in every method, naming the format, the section, the byte, and what is wrong.
  """

  def __init__(self, data, magic: bytes, limit: int = LIMIT):
    self._data = np.frombuffer(data, np.uint8)
    self._name = magic.decode()
    self._at = self._start = 0
    self._limit = limit
    found = self._take('magic', len(magic)).tobytes()
    if found != magic:
      raise self.error('magic', f'is {found!r}, not {magic!r}; this is another format', 0)
    version, code, self.value_bits = self.numbers('version, dtype, value bits', 'BBB')
    if version != VERSION:
      raise self.error('version', f'is {version}, this reader knows {VERSION}', 6)
    if code >= len(DTYPES):
      raise self.error('dtype', f'code {code} is unknown; the last is {len(DTYPES) - 1}', 7)
    self.dtype = np.dtype(DTYPES[code])
    own = 8 * self.dtype.itemsize
    packed = self.dtype.kind != 'f' and 1 <= self.value_bits < own
    if self.value_bits != own and not (packed and self.value_bits <= _bits.WIDEST):
      raise self.error('value bits', f'are {self.value_bits} for {self.dtype}', 8)

  def error(self, name: str, problem: str, at: int | None = None) -> ValueError:
    """The error to raise about a section."""
    return ValueError(f'{self._name} file: {name} at byte {self._start if at is None else at} {problem}.')  # fmt: skip

  def require(self, holds, name: str, problem: str) -> None:
    """Raises unless the condition holds."""
    if not holds:
      raise self.error(name, problem)

  def _take(self, name: str, size: int) -> np.ndarray:
    self._start = self._at
    left = self._data.size - self._at
    if size > left:
      raise self.error(
        name, f'needs {size} bytes, {left} are left; the file is cut off or its counts are wrong'
      )
    self._at += size
    return self._data[self._at - size : self._at]

  def numbers(self, name: str, layout: str) -> tuple[int, ...]:
    """Numbers by their `struct` codes."""
    layout = '<' + layout
    return struct.unpack(layout, self._take(name, struct.calcsize(layout)).tobytes())

  def size(self, name: str, *dims: int) -> int:
    """Entries of an array of this shape, refused when 0 or beyond the limit."""
    n = math.prod(dims)
    self.require(n > 0, name, f'has no entries: {list(dims)}')
    self.require(
      n <= self._limit,
      name,
      f'{list(dims)} has {n} entries, above limit={self._limit}; raise it if you trust the file',
    )
    return n

  def shape(self) -> tuple[int, ...]:
    """A shape: u8 rank, then u32 each."""
    (rank,) = self.numbers('rank', 'B')
    self.require(rank <= 32, 'rank', f'is {rank}, above 32')
    dims = self.numbers('shape', f'{rank}I')
    self.size('shape', *dims)
    return dims

  def fields(self, name: str, n: int, width: int) -> np.ndarray:
    """Packed fields, n of them."""
    data = self._take(name, -(-n * width // 8))
    try:
      return _bits.unpack(data, n, width)
    except ValueError as e:
      raise self.error(name, f'ends wrong: {e}') from e

  def rows(self, name: str, counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Packed fields of rows that end on bytes."""
    data = self._take(name, int((-(-counts * widths // 8)).sum()))
    try:
      return _bits.unpack_ragged(data, counts, widths)
    except ValueError as e:
      raise self.error(name, f'ends wrong: {e}') from e

  def promise(self, n: int) -> None:
    """Refuses files too short for n values, before memory is taken for what describes them."""
    least, left = -(-n * self.value_bits // 8), self._data.size - self._at
    if least > left:
      raise self.error('values', f'need {least} bytes, {left} are left', self._at)

  def values(self, *shape: int) -> np.ndarray:
    """Values of this shape, in their own memory."""
    n = math.prod(shape)
    if self.value_bits == 8 * self.dtype.itemsize:
      data = self._take('values', n * self.dtype.itemsize)
      little = data.view(self.dtype.newbyteorder('<'))
      return little.astype(self.dtype).reshape(shape)
    fields = self.fields('values', n, self.value_bits).astype(np.int64)
    if self.dtype.kind == 'i':
      sign = 1 << (self.value_bits - 1)
      fields = (fields ^ sign) - sign
    return fields.astype(self.dtype).reshape(shape)

  def end(self) -> None:
    """Refuses bytes that are left over."""
    left = self._data.size - self._at
    if left:
      raise self.error('end', f'is followed by {left} more bytes', self._at)
