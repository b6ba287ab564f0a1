"""Axis sizes: whole numbers, and multiples of the batch, which stays open."""

from collections.abc import Sequence
import math
import re
from typing import Any

Dim = int | str
Shape = tuple[Dim, ...]

_SYMBOL = re.compile(r'(?:([1-9]\d*)\*)?n')


def split(dim: Dim) -> tuple[int, bool]:
  """Number of a size, and whether it counts batches.

  Raises:
    ValueError: neither a whole number nor a multiple of 'n'.

  Example:
    >>> split('49*n'), split('n'), split(7)
    ((49, True), (1, True), (7, False))
  """
  if isinstance(dim, str) and (match := _SYMBOL.fullmatch(dim)):
    return int(match[1] or 1), True
  if isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0:
    return dim, False
  raise ValueError(f"a size is a whole number >= 0, 'n' or a multiple such as '49*n', not {dim!r}")


def make(times: int, symbolic: bool) -> Dim:
  """Inverse of `split`.

  Example:
    >>> make(49, True), make(1, True), make(7, False)
    ('49*n', 'n', 7)
  """
  if not symbolic:
    return times
  return 'n' if times == 1 else f'{times}*n'


def is_shape(value: Any) -> bool:
  """True for a tuple of sizes."""
  if not isinstance(value, tuple):
    return False
  try:
    return all(split(dim) is not None for dim in value)
  except ValueError:
    return False


def size(shape: Sequence[Dim]) -> tuple[int, int]:
  """Number of elements as (number, power of the batch).

  Example:
    >>> size(('n', 7, 7, 3))
    (147, 1)
  """
  factors = [split(dim) for dim in shape]
  return math.prod(times for times, _ in factors), sum(symbolic for _, symbolic in factors)


def bind(shape: Sequence[Dim], batch: int | None) -> tuple[int, ...]:
  """Puts a number in place of the batch.

  Args:
    shape: whole numbers and multiples of 'n'.
    batch: the number; None if there is nothing to replace.

  Raises:
    ValueError: the shape names a batch and none is given.

  Example:
    >>> bind(('49*n', 3), 2)
    (98, 3)
  """
  factors = [split(dim) for dim in shape]
  if batch is None and any(symbolic for _, symbolic in factors):
    raise ValueError(f'shape [{", ".join(map(str, shape))}] has an open batch; say its size.')
  return tuple(times * (batch or 0) if symbolic else times for times, symbolic in factors)
