"""Indexing primitives in the graph's words: slices wherever the places are known, else a gather."""

import itertools
import math

from jax import lax
import numpy as np

from fqjax.runtime import dims
from fqjax.tracing._jaxpr import Operation
from fqjax.tracing._writer import (
  Writer,
  concat,
  cut,
  fail,
  plain,
  reshape,
  shape_of,
  take_slice,
  transpose,
)


def stack(writer: Writer, op: Operation) -> list[str]:
  axis, parts = int(op.params['axis']), []
  for name in map(writer.read, op.inputs):
    shape = writer.shape(name)
    parts.append(reshape(writer, name, shape[:axis] + (1,) + shape[axis:]))
  return [concat(writer, parts, axis)]


def split(writer: Writer, op: Operation) -> list[str]:
  name, axis = writer.read(op.inputs[0]), int(op.params['axis'])
  ends = list(itertools.accumulate(map(int, op.params['sizes'])))
  return [cut(writer, name, axis, a, b) for a, b in zip([0, *ends], ends, strict=False)]


def unstack(writer: Writer, op: Operation) -> list[str]:
  name, axis = writer.read(op.inputs[0]), int(op.params['axis'])
  shape = writer.shape(name)
  parts = [cut(writer, name, axis, i, i + 1) for i in range(len(op.outputs))]
  return [reshape(writer, part, shape[:axis] + shape[axis + 1 :]) for part in parts]


def slice(writer: Writer, op: Operation) -> list[str]:
  name, params = writer.read(op.inputs[0]), op.params
  start, stop = shape_of(params['start_indices']), shape_of(params['limit_indices'])
  strides = plain(params['strides']) or (1,) * len(start)
  return [take_slice(writer, name, start, stop, strides)]


def dynamic_slice(writer: Writer, op: Operation) -> list[str]:
  name, *places = map(writer.read, op.inputs)
  shape, sizes = writer.shape(name), shape_of(op.params['slice_sizes'])
  moving = [axis for axis, dim in enumerate(shape) if dim != sizes[axis]]
  if any(writer.known(places[axis]) is None for axis in moving):
    corner = [reshape(writer, places[axis], (1,)) for axis in moving]
    return writer.write(
      'gather',
      name,
      concat(writer, corner, 0),
      offset=tuple(range(len(shape))),
      collapsed=(),
      index_map=tuple(moving),
      operand_batch=(),
      index_batch=(),
      sizes=sizes,
      mode='clip',
    )
  starts, stops = [], []
  for dim, part, place in zip(shape, sizes, places, strict=True):
    known = writer.known(place)
    if dim == part:
      starts.append(0)
    elif known is None or not isinstance(dim, int) or not isinstance(part, int):
      fail('part of the batch: take it before the network')
    else:
      starts.append(min(max(int(known), 0), dim - part))
    stops.append(dim if dim == part else starts[-1] + int(part))
  return [take_slice(writer, name, tuple(starts), tuple(stops), (1,) * len(shape))]


def tile(writer: Writer, op: Operation) -> list[str]:
  name, reps = writer.read(op.inputs[0]), shape_of(op.params['reps'])
  shape = writer.shape(name)
  wide = tuple(d for pair in zip(reps, shape, strict=True) for d in pair)
  axes = tuple(range(1, 2 * len(shape), 2))
  [name] = writer.write('broadcast', name, shape=wide, axes=axes)
  return [reshape(writer, name, shape_of(op.outputs[0].shape))]


def pad(writer: Writer, op: Operation) -> list[str]:
  name, value = map(writer.read, op.inputs)
  config = plain(op.params['padding_config'])
  padding = tuple((max(low, 0), max(high, 0)) for low, high, _ in config)
  interior = tuple(inner for _, _, inner in config)
  if any(map(any, padding)) or any(interior):
    [name] = writer.write('pad', name, value, padding=padding, interior=interior)
  shape = writer.shape(name)
  starts = tuple(max(-low, 0) for low, _, _ in config)
  stops = tuple(
    dim if high >= 0 else int(dim) + high for dim, (_, high, _) in zip(shape, config, strict=True)
  )
  return [take_slice(writer, name, starts, stops, (1,) * len(shape))]


def gather(writer: Writer, op: Operation) -> list[str]:
  numbers, params = op.params['dimension_numbers'], op.params
  name, where = map(writer.read, op.inputs)
  sizes, places = shape_of(params['slice_sizes']), writer.known(where)
  inside = _inside(writer.shape(name), sizes, numbers, places)
  if inside and places is not None and (found := _as_slice(writer, name, sizes, numbers, places)):
    return [found]
  mode = params['mode']
  fills = mode == lax.GatherScatterMode.FILL_OR_DROP and not inside
  if fills and params['fill_value'] is not None and not _is_default_fill(op):
    fail('jnp.take without a fill_value of its own, then jnp.where')
  return writer.write(
    'gather',
    name,
    where,
    offset=plain(numbers.offset_dims),
    collapsed=plain(numbers.collapsed_slice_dims),
    index_map=plain(numbers.start_index_map),
    operand_batch=plain(numbers.operand_batching_dims),
    index_batch=plain(numbers.start_indices_batching_dims),
    sizes=sizes,
    mode='fill' if fills else 'clip',
  )


def _is_default_fill(op: Operation) -> bool:
  value, dtype = op.params['fill_value'], str(op.inputs[0].dtype)
  if 'int' in dtype:
    info = np.iinfo(dtype)
    return value == (info.max if dtype.startswith('uint') else info.min)
  return value is True if dtype == 'bool' else math.isnan(value)


def _inside(shape: dims.Shape, sizes: dims.Shape, numbers, places) -> bool:
  """True if all places are known to lie within the operand."""
  if places is None:
    return False
  for i, axis in enumerate(numbers.start_index_map):
    dim, part = shape[axis], sizes[axis]
    room = 0 if dim == part else (dim - part if isinstance(dim, int) else -1)  # type: ignore
    if places[..., i].size and not 0 <= places[..., i].min() <= places[..., i].max() <= room:
      return False
  return True


def _as_slice(writer: Writer, name: str, sizes: dims.Shape, numbers, places) -> str | None:
  """A gather at evenly spaced, known places is a slice (x[:, ::2] on an open batch, x[..., 0])."""
  collapsed, index_map = numbers.collapsed_slice_dims, numbers.start_index_map
  shape, batch = writer.shape(name), places.shape[:-1]
  if numbers.operand_batching_dims or set(collapsed) - set(index_map) or not places.size:
    return None
  start, stop, strides = [0] * len(shape), list(shape), [1] * len(shape)
  source: list[int | None] = [None] * len(batch)  # batch axis of the places -> operand axis
  for i, axis in enumerate(index_map):
    index, part = places[..., i], sizes[axis]
    if sizes[axis] == shape[axis] != 1:
      continue  # taken whole: the place is 0
    first = int(index.flat[0])
    moving = [b for b, size in enumerate(batch) if size > 1 and (np.diff(index, axis=b) != 0).any()]
    start[axis], stop[axis] = first, first + int(part)
    if not moving:
      continue
    [b] = moving if len(moving) == 1 else [-1]
    steps = set(np.diff(index, axis=b).flat) if b >= 0 else set()
    if len(steps) != 1 or min(steps) < 1 or axis not in collapsed or source[b] is not None:
      return None
    source[b], strides[axis] = axis, int(steps.pop())
    stop[axis] = first + strides[axis] * (batch[b] - 1) + 1
  if any(size > 1 and axis is None for size, axis in zip(batch, source, strict=True)):
    return None
  name = take_slice(writer, name, tuple(start), tuple(stop), tuple(strides))
  # Axes of the result in terms of the operand's; None is a new axis of size 1.
  offset = iter(axis for axis in range(len(shape)) if axis not in collapsed)
  moved, rank = iter(source), len(batch) + len(numbers.offset_dims)
  order = [next(offset) if i in numbers.offset_dims else next(moved) for i in range(rank)]
  kept = [axis for axis in order if axis is not None]
  sliced = writer.shape(name)
  name = reshape(writer, name, tuple(sliced[axis] for axis in sorted(kept)))
  ranks = sorted(kept)
  name = transpose(writer, name, tuple(ranks.index(axis) for axis in kept))
  return reshape(writer, name, tuple(1 if axis is None else sliced[axis] for axis in order))
