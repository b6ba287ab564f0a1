"""Which entries are stored, judged by their bits: -0.0 and every NaN are entries like others."""

import numpy as np


def raw(array: np.ndarray) -> np.ndarray:
  """The bits of the entries as unsigned integers."""
  return np.ascontiguousarray(array).view(f'u{array.dtype.itemsize}').reshape(array.shape)


def live(array: np.ndarray, mask: np.ndarray | None, ndim: int | None = None) -> np.ndarray:
  """Entries to store: where the mask is True, or without one where any bit is set.

  Args:
    array: the weights.
    mask: bool like `array`, or None.
    ndim: the rank the format needs, or None for any.

  Returns:
    bool, like `array`.

  Raises:
    ValueError: for an empty array, another rank, a mask of another shape or dtype, or an entry off
      the mask that is not +0.
  """
  if not array.size or (ndim is not None and array.ndim != ndim):
    need = 'at least one entry' if ndim is None else f'rank {ndim} and at least one entry'
    raise ValueError(f'an array of shape {list(array.shape)} is not stored; it needs {need}.')
  set_ = raw(array) != 0
  if mask is None:
    return set_
  if mask.shape != array.shape or mask.dtype != bool:
    raise ValueError(
      f'mask {mask.dtype} {list(mask.shape)} must be bool {list(array.shape)}, like the weights.'
    )
  if (set_ & ~mask).any():
    where = np.argwhere(set_ & ~mask)[0]
    raise ValueError(
      f'weight {where.tolist()} is {array[tuple(where)]} but off the mask; project first '
      '(np.where(mask, w, 0); w * mask leaves negative zeros).'
    )
  return mask


def fill(live: np.ndarray, counts: np.ndarray | int, what: str) -> np.ndarray:
  """Marks exactly `counts` places per group: the live ones, then the lowest free ones.

  Args:
    live: bool [rows, groups, places].
    counts: integers that broadcast to [rows, groups], at most the number of places.
    what: what a group is, for the error.

  Returns:
    bool [rows, groups, places].

  Raises:
    ValueError: when a group has more live places than `counts`.
  """
  have = live.sum(2, dtype=np.int32)
  if (have > counts).any():
    row, group = np.argwhere(have > counts)[0]
    most = np.broadcast_to(counts, have.shape)[row, group]
    raise ValueError(
      f'{what} {group} of row {row} has {have[row, group]} live weights, at most {most} fit; '
      'project first, or store it in another format.'
    )
  free = ~live
  return live | (free & (np.cumsum(free, 2, dtype=np.int32) <= (counts - have)[..., None]))


def pad(array: np.ndarray, axis: int, multiple: int) -> np.ndarray:
  """The array with zeros appended along an axis, up to a multiple.

  Args:
    array: any array.
    axis: which axis.
    multiple: what the length is to be a multiple of.
  """
  missing = -array.shape[axis] % multiple
  if not missing:
    return array
  return np.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])


def tile(kernels: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """[O, I, M] as blocks of `rows` outputs and `columns` inputs at one tap.

  Args:
    kernels: [O, I, M].
    rows: outputs per block.
    columns: inputs per block.

  Returns:
    [ceil(O/rows), ceil(I/columns), M, rows, columns]; beyond the edges zeros.
  """
  kernels = pad(pad(kernels, 0, rows), 1, columns)
  o, i, m = kernels.shape
  return kernels.reshape(o // rows, rows, i // columns, columns, m).transpose(0, 2, 4, 1, 3)


def untile(tiles: np.ndarray, outputs: int, inputs: int) -> np.ndarray:
  """Inverse of `tile`.

  Args:
    tiles: as `tile` gives.
    outputs: O.
    inputs: I.

  Returns:
    [O, I, M].
  """
  o, i, m, rows, columns = tiles.shape
  kernels = tiles.transpose(0, 3, 1, 4, 2).reshape(o * rows, i * columns, m)
  return np.ascontiguousarray(kernels[:outputs, :inputs])
