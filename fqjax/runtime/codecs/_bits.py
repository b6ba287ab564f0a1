"""Fields of a few bits each, packed least significant bit first.

Field k of width w occupies bits k*w .. k*w+w-1; bit j is bit j % 8 of byte j // 8. Eight fields fill
w whole bytes, so both directions are a few shifts over columns, whatever w is.
"""

import numpy as np

WIDEST = 32


def width_for(n: int) -> int:
  """Bits that tell n things apart: ceil(log2 n), 0 for a single one.

  Example:
    >>> [width_for(n) for n in (1, 2, 3, 8, 9)]
    [0, 1, 2, 3, 4]
  """
  return (n - 1).bit_length()


def uint_for(width: int) -> np.dtype:
  """Narrowest unsigned dtype that holds `width` bits."""
  return np.dtype('u1' if width <= 8 else 'u2' if width <= 16 else 'u4')


def _check_width(width: int) -> None:
  if not 0 <= width <= WIDEST:
    raise ValueError(f'fields of {width} bits cannot be packed; 0 to {WIDEST} can.')


def pack_rows(fields: np.ndarray, width: int) -> np.ndarray:
  """Packs every row by itself, each padded with zero bits to a whole byte.

  Args:
    fields: [rows, n], unsigned integers below 2**width.
    width: bits per field, 0..32.

  Returns:
    uint8 [rows, ceil(n*width/8)].

  Raises:
    ValueError: for a field that does not fit, or another width.
  """
  _check_width(width)
  if fields.size and int(fields.max()) >> width:
    row, column = np.argwhere(fields.astype(np.uint64) >> np.uint64(width))[0]
    raise ValueError(
      f'field {column} of row {row} is {fields[row, column]}, too large for {width} bits.'
    )
  rows, n = fields.shape
  groups = -(-n // 8)
  padded = np.zeros((rows, groups * 8), fields.dtype)
  padded[:, :n] = fields
  padded = padded.reshape(rows, groups, 8)
  out = np.zeros((rows, groups, width), np.uint8)
  for k in range(8):
    byte, shift = divmod(k * width, 8)
    shifted = padded[:, :, k].astype(np.uint64) << np.uint64(shift)
    for b in range(-(-(shift + width) // 8)):
      out[:, :, byte + b] |= (shifted >> np.uint64(8 * b)).astype(np.uint8)
  return out.reshape(rows, groups * width)[:, : -(-n * width // 8)]


def unpack_rows(data: np.ndarray, n: int, width: int) -> np.ndarray:
  """Inverse of `pack_rows`.

  Args:
    data: uint8 [rows, ceil(n*width/8)].
    n: fields per row.
    width: bits per field, 0..32.

  Returns:
    [rows, n], the narrowest unsigned dtype that holds `width` bits.

  Raises:
    ValueError: when the bits that fill up the last byte are not zero, or for another width.
  """
  _check_width(width)
  rows, have = data.shape
  groups = -(-n // 8)
  padded = np.zeros((rows, groups * width), np.uint8)
  padded[:, :have] = data
  padded = padded.reshape(rows, groups, width)
  out = np.zeros((rows, groups, 8), uint_for(width))
  for k in range(8 if width else 0):
    byte, shift = divmod(k * width, 8)
    joined = np.zeros((rows, groups), np.uint64)
    for b in range(-(-(shift + width) // 8)):
      joined |= padded[:, :, byte + b].astype(np.uint64) << np.uint64(8 * b)
    out[:, :, k] = (joined >> np.uint64(shift)) & np.uint64((1 << width) - 1)
  out = out.reshape(rows, groups * 8)
  if out[:, n:].any():
    raise ValueError('the bits that fill up a last byte are not zero')
  return out[:, :n]


def pack(fields: np.ndarray, width: int) -> bytes:
  """Packs fields one after the other; the last byte is filled up with zero bits.

  Args:
    fields: unsigned integers below 2**width, any shape, row-major.
    width: bits per field, 0..32.

  Raises:
    ValueError: for a field that does not fit, or another width.

  Example:
    >>> pack(np.array([5, 0, 7, 2]), 3).hex()
    'c505'
  """
  return pack_rows(fields.reshape(1, -1), width).tobytes()


def unpack(data: np.ndarray, n: int, width: int) -> np.ndarray:
  """Inverse of `pack`.

  Args:
    data: uint8 [ceil(n*width/8)].
    n: number of fields.
    width: bits per field, 0..32.

  Returns:
    [n], the narrowest unsigned dtype that holds `width` bits.

  Raises:
    ValueError: when the bits that fill up the last byte are not zero, or for another width.

  Example:
    >>> print(unpack(np.frombuffer(bytes.fromhex('c505'), np.uint8), 4, 3))
    [5 0 7 2]
  """
  return unpack_rows(data.reshape(1, -1), n, width)[0]


def pack_ragged(fields: np.ndarray, counts: np.ndarray, widths: np.ndarray) -> bytes:
  """Packs rows of different lengths and widths, each padded to a whole byte.

  Args:
    fields: all rows one after the other, unsigned integers.
    counts: [rows], fields per row; their sum is the number of fields.
    widths: [rows], bits per field of each row.

  Raises:
    ValueError: for a field that does not fit, or another width.
  """
  starts = np.cumsum(counts) - counts
  sizes = -(-counts * widths // 8)
  places = np.cumsum(sizes) - sizes
  out = np.zeros(int(sizes.sum()), np.uint8)
  for (count, width), rows in _classes(counts, widths):
    block = pack_rows(fields[starts[rows, None] + np.arange(count)], width)
    out[places[rows, None] + np.arange(block.shape[1])] = block
  return out.tobytes()


def unpack_ragged(data: np.ndarray, counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
  """Inverse of `pack_ragged`.

  Args:
    data: uint8, as many as `pack_ragged` gives for these counts and widths.
    counts: [rows], fields per row.
    widths: [rows], bits per field of each row.

  Returns:
    All fields, the narrowest unsigned dtype that holds the largest width.

  Raises:
    ValueError: when bits that fill up a byte are not zero, or for another width.
  """
  starts = np.cumsum(counts) - counts
  sizes = -(-counts * widths // 8)
  places = np.cumsum(sizes) - sizes
  out = np.zeros(int(counts.sum()), uint_for(int(widths.max(initial=0))))
  for (count, width), rows in _classes(counts, widths):
    block = data[places[rows, None] + np.arange(-(-count * width // 8))]
    out[starts[rows, None] + np.arange(count)] = unpack_rows(block, count, width)
  return out


def _classes(counts, widths):
  """Pairs of (count, width) and the rows that have them."""
  pairs, which = np.unique(np.stack([counts, widths], 1), axis=0, return_inverse=True)
  order = np.argsort(which.ravel(), kind='stable')
  ends = np.cumsum(np.bincount(which.ravel(), minlength=len(pairs)))
  return zip(pairs.tolist(), np.split(order, ends[:-1]), strict=True)
