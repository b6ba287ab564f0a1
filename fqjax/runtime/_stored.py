"""Arrays as an artifact stores them, and back: a form for the places, a table for the values.

An entry of `header['arrays']` is an object with

    name, shape, dtype   of the array
    form                 'raw': its elements one after the other; or a format of `fqjax.runtime.codecs`
    at                   section that holds this form
    shift                1 where stored codes are one lower than they are: none of them is 0
    upper                1 where the uint16 that are stored are the upper halves of float32
    order                axes in the order in which they are stored; left out where it is 0, 1, 2, ...
    levels               section with a table of floats; what is stored are then indices into it.
                         Its length is that of the section, or `axis` names an axis of the array and
                         the table has a row for each of its entries
    scales               section with one float32 for each entry of `axis`; the array is the stored
                         integer times it
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import codecs, oplist
from fqjax.runtime._file import ArtifactError, File
from fqjax.runtime.codecs._container import Bits

# Elements every file may stand for, and how many more for every byte it has.
FREE_ELEMENTS = 1 << 24
ELEMENTS_PER_BYTE = 1024
# Entries along one axis.
_LONGEST = 1 << 31
_KEYS = {
  'name', 'shape', 'dtype', 'form', 'at', 'shift', 'upper', 'order', 'levels', 'scales', 'axis',
}  # fmt: skip


class Stored(NamedTuple):
  """An array on its way into a file.

  Attributes:
    name: of the tensor.
    shape: of the array.
    dtype: of the array, 'bfloat16' with its bits as uint16.
    form: 'raw', or a format of `fqjax.runtime.codecs`.
    data: bytes of that form.
    bits: what they are made of.
    kept: entries that are not zero.
    order: axes as stored, or () for the usual order.
    shift: stored codes are one lower.
    upper: stored are upper halves of float32.
    levels: float table [K], or [n, K] along `axis`; None where values are stored themselves.
    scales: float32 [n] along `axis`, or None.
    axis: of `scales` or of the rows of `levels`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  form: str
  data: bytes
  bits: Bits
  kept: int
  order: tuple[int, ...] = ()
  shift: bool = False
  upper: bool = False
  levels: np.ndarray | None = None
  scales: np.ndarray | None = None
  axis: int | None = None

  @property
  def bytes(self) -> int:
    """Of all sections."""
    tables = (table for table in (self.levels, self.scales) if table is not None)
    return len(self.data) + sum(table.nbytes for table in tables)


def to_sections(arrays: Sequence[Stored]) -> tuple[list[dict[str, Any]], list[bytes]]:
  """Entries of the header, and the sections they name."""
  entries, sections = [], []
  for array in arrays:
    entry = {
      'name': array.name,
      'shape': list(array.shape),
      'dtype': array.dtype,
      'form': array.form,
      'at': len(sections),
    }
    sections.append(array.data)
    if array.order:
      entry['order'] = list(array.order)
    entry |= {key: 1 for key in ('shift', 'upper') if getattr(array, key)}
    for key, table in (('levels', array.levels), ('scales', array.scales)):
      if table is not None:
        entry[key] = len(sections)
        sections.append(table.astype(table.dtype.newbyteorder('<'), copy=False).tobytes())
    if array.axis is not None:
      entry['axis'] = array.axis
    entries.append(entry)
  return entries, sections


def read_arrays(file: File, limit: int | None = None) -> dict[str, np.ndarray]:
  """All arrays of a file.

  Args:
    file: whose header has been checked.
    limit: elements all arrays may have together; by default 16,777,216 and 1,024 for every byte.

  Returns:
    name -> array, bfloat16 as uint16; what is stored plainly is a view of the file.

  Raises:
    ArtifactError: naming array, section and byte.
  """
  entries = file.header.get('arrays')
  if not isinstance(entries, list):
    raise ArtifactError('header: arrays must be a list.')
  if limit is None:
    limit = FREE_ELEMENTS + ELEMENTS_PER_BYTE * sum(section.size for section in file.sections)
  found: dict[str, np.ndarray] = {}
  for i, entry in enumerate(entries):
    name, shape = _check(entry, i)
    if name in found:
      raise ArtifactError(f'header: two arrays are named {name!r}.')
    limit -= math.prod(shape)
    if limit < 0:
      raise ArtifactError(
        f'array {name!r} {list(shape)}: with it the file stands for more elements than its size '
        'justifies; `limit=` allows more if you trust it.'
      )
    found[name] = _read(file, entry, name, shape)
  file.finish()
  return found


def _check(entry: Any, i: int) -> tuple[str, tuple[int, ...]]:
  if not isinstance(entry, dict) or not {'name', 'shape', 'dtype', 'form', 'at'} <= set(entry):
    raise ArtifactError(f'header: array {i} must have name, shape, dtype, form and at.')
  name, shape = entry['name'], entry['shape']
  if not isinstance(name, str):
    raise ArtifactError(f'header: array {i} has the name {name!r}.')
  if unknown := set(entry) - _KEYS:
    raise ArtifactError(f'array {name!r}: unknown entry {min(unknown)!r}.')
  if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < _LONGEST for n in shape):
    raise ArtifactError(f'array {name!r}: shape {shape!r} is not a list of sizes.')
  if len(shape) > 32:
    raise ArtifactError(f'array {name!r}: has {len(shape)} axes, at most 32 are possible.')
  if entry['dtype'] not in oplist.DTYPES:
    raise ArtifactError(f'array {name!r}: unknown dtype {entry["dtype"]!r}.')
  return name, tuple(shape)


def _read(file: File, entry: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
  dtype = np.dtype('uint16' if entry['dtype'] == 'bfloat16' else entry['dtype'])
  order = entry.get('order', list(range(len(shape))))
  if not isinstance(order, list) or sorted(map(repr, order)) != sorted(
    map(repr, range(len(shape)))
  ):
    raise ArtifactError(f'array {name!r}: order {order!r} does not order {len(shape)} axes.')
  array = _places(file, entry, name, [shape[axis] for axis in order], dtype)
  array = array.transpose(np.argsort(order)) if 'order' in entry else array
  if 'upper' in entry:
    array = _from_upper(entry, name, array)
  if 'levels' in entry and 'scales' in entry:
    raise ArtifactError(f'array {name!r}: has levels and scales; one of them is possible.')
  if 'levels' in entry:
    array = _from_levels(file, entry, name, array, dtype)
  elif 'scales' in entry:
    array = _from_scales(file, entry, name, array, dtype)
  elif 'axis' in entry:
    raise ArtifactError(f'array {name!r}: has an axis and nothing along it.')
  if array.dtype != dtype:
    raise ArtifactError(f'array {name!r}: {array.dtype} is stored, {dtype} is announced.')
  # Executors read rows; an array stored in another order is put into memory once.
  return np.ascontiguousarray(array).reshape(shape)


def _places(
  file: File, entry: Mapping[str, Any], name: str, shape: list[int], dtype: np.dtype
) -> np.ndarray:
  """What is stored, in the order of the file."""
  form, count = entry['form'], math.prod(shape)
  # No form needs more for an element: a value of eight bytes, its place, a pointer.
  data = file.read(entry['at'], f'array {name!r}', 4096 + 64 * count)
  where = f'section {entry["at"]} (array {name!r}) at byte {file.sections[entry["at"]].offset}'
  if form == 'raw':
    if {'levels', 'scales', 'shift', 'upper'} & set(entry):
      raise ArtifactError(f'{where}: raw values take no table.')
    if data.size != count * dtype.itemsize:
      raise ArtifactError(f'{where}: {data.size} bytes are not {count} values of {dtype}.')
    little = data.view(dtype.newbyteorder('<'))
    plain = little.astype(dtype, copy=False)
    if dtype.kind == 'b' and data.size and data.max() > 1:
      raise ArtifactError(f'{where}: holds {data.max()} where True or False should be.')
    return plain.reshape(shape)
  if not isinstance(form, str) or form not in codecs.CODECS:
    raise ArtifactError(f'array {name!r}: unknown form {form!r}.')
  codec = codecs.CODECS[form]
  try:
    encoded = codec.from_bytes(data, limit=max(1, count))
    if 'shift' in entry:
      encoded = _shifted(entry, name, encoded)
    array = codec.decode(encoded)
  except ValueError as error:
    raise ArtifactError(f'{where}: {error}') from None
  if array.size != count:
    raise ArtifactError(f'{where}: holds {array.size} elements, {count} are announced.')
  return array.reshape(shape)


def _shifted(entry: Mapping[str, Any], name: str, encoded: Any) -> Any:
  values = encoded.values
  if entry['shift'] != 1 or 'levels' not in entry or values.dtype.kind != 'u':
    raise ArtifactError(f'array {name!r}: only indices of levels can be one lower than they are.')
  if values.size and values.max() == np.iinfo(values.dtype).max:
    raise ArtifactError(f'array {name!r}: index {values.max()} + 1 is no {values.dtype}.')
  return encoded._replace(values=values + values.dtype.type(1))


def _from_upper(entry: Mapping[str, Any], name: str, array: np.ndarray) -> np.ndarray:
  if entry['upper'] != 1 or array.dtype != np.uint16 or {'levels', 'scales'} & set(entry):
    raise ArtifactError(f'array {name!r}: upper halves of float32 are uint16 without a table.')
  return (array.astype(np.uint32) << 16).view(np.float32)


def _axis(entry: Mapping[str, Any], name: str, rank: int) -> int:
  axis = entry.get('axis')
  if type(axis) is not int or not 0 <= axis < rank:
    raise ArtifactError(f'array {name!r}: axis {axis!r} is not an axis of it.')
  return axis


def _table(file: File, index: Any, what: str, dtype: np.dtype, rows: int) -> np.ndarray:
  if dtype.kind not in 'fiu':
    raise ArtifactError(f'header: {what}: a table of {dtype} is none.')
  data = file.read(index, what, rows * 256 * dtype.itemsize)
  if rows == 0 or data.size % (rows * dtype.itemsize) or not data.size:
    raise ArtifactError(
      f'section {index} ({what}) at byte {file.sections[index].offset}: {data.size} bytes are not '
      f'{rows} rows of {dtype}.'
    )
  # Tables are small, and sections that were inflated or follow odd sizes are not aligned.
  return np.frombuffer(data.tobytes(), dtype.newbyteorder('<')).astype(dtype).reshape(rows, -1)


def _from_levels(file, entry, name, array, dtype) -> np.ndarray:
  if array.dtype.kind != 'u':
    raise ArtifactError(f'array {name!r}: its indices are {array.dtype}, not unsigned integers.')
  axis = _axis(entry, name, array.ndim) if 'axis' in entry else None
  rows = 1 if axis is None else array.shape[axis]
  table = _table(file, entry['levels'], f'levels of {name!r}', dtype, rows)
  highest = int(array.max(initial=0))
  if highest >= table.shape[1]:
    raise ArtifactError(f'array {name!r}: index {highest} is beyond its {table.shape[1]} levels.')
  if axis is None:
    return table[0][array]
  return table[_along(np.arange(rows), axis, array.ndim), array]


def _from_scales(file, entry, name, array, dtype) -> np.ndarray:
  if array.dtype != np.int8 or dtype != np.float32:
    raise ArtifactError(
      f'array {name!r}: scales make float32 of int8, not {dtype} of {array.dtype}.'
    )
  axis = _axis(entry, name, array.ndim)
  table = _table(file, entry['scales'], f'scales of {name!r}', dtype, array.shape[axis])
  if table.shape[1] != 1:
    raise ArtifactError(f'array {name!r}: needs one scale for each entry of axis {axis}.')
  return array.astype(np.float32) * _along(table[:, 0], axis, array.ndim)


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
  return values.reshape([-1 if i == axis else 1 for i in range(rank)])
