"""Convolutions, matrix products and windows."""

from collections.abc import Callable, Mapping, Sequence
import itertools
import math
from typing import Any

import numpy as np

from fqjax.exporter.onnx._axes import end
from fqjax.exporter.onnx._pointwise import WIDER
from fqjax.exporter.onnx._writer import Order, Writer
from fqjax.runtime import dims
from fqjax.runtime.dims import Shape
from fqjax.runtime.graph import Node

_FLOATS = ('float16', 'float32', 'float64')
# So many slices cost less than two transpositions.
_FEW_TAPS = 9
# More slices than this are a sign that a window is no window.
_MOST_TAPS = 1024


# Convolutions.


def conv_orders(layout: Sequence[str]) -> tuple[Order, Order, Order]:
  """Orders that make of input, kernel and output what ONNX calls NCHW and OIHW."""
  spatial = [letter for letter in layout[1] if letter not in 'OI']
  letters = (('N', 'C'), ('O', 'I'), ('N', 'C'))
  x, kernel, y = (
    tuple(names.index(letter) for letter in (*first, *spatial))
    for names, first in zip(layout, letters, strict=True)
  )
  return x, kernel, y


def convolve(
  w: Writer,
  x: str,
  shape: Shape,
  taps: Sequence[int],
  kernel: Callable[[bool], str | None],
  bias: str,
  attributes: Mapping[str, Any],
  dtype: str,
) -> str:
  """A convolution of any kind.

  Args:
    w: writer.
    x: input in NCHW.
    shape: of `x`.
    taps: of the kernel, per spatial axis.
    kernel: whether it is for a ConvTranspose -> its name; None if it cannot be had so.
    bias: name, or ''.
    attributes: of the graph's node.
    dtype: of `x`.
  """
  strides, dilation = attributes['strides'], attributes['dilation']
  gaps, groups = attributes['input_dilation'], attributes['groups']
  padding = [tuple(pair) for pair in attributes['padding']]
  sizes = [(tap - 1) * gap for tap, gap in zip(taps, dilation, strict=True)]
  shared = {'kernel_shape': list(taps), 'dilations': list(dilation), 'group': groups}
  if max(gaps) > 1:
    pads = [(size - low, size - high) for size, (low, high) in zip(sizes, padding, strict=True)]
    # What lies beyond the end of a transposed convolution, less than a step of it.
    more = [max(0, -high) for _, high in pads]
    fits = set(strides) == {1} and all(
      low >= 0 and extra < gap for (low, _), extra, gap in zip(pads, more, gaps, strict=True)
    )
    if fits and (turned := kernel(True)) is not None:
      ends = [max(0, high) for _, high in pads]
      return w.emit(
        'ConvTranspose', x, turned, bias, strides=list(gaps), output_padding=more,
        pads=[low for low, _ in pads] + ends, **shared,
      )  # fmt: skip
    zero = w.scalar(0, dtype)
    for axis, gap in enumerate(gaps, 2):
      x = w.spread(x, shape, axis, gap - 1, zero)
      size = dims.split(shape[axis])[0]
      shape = (*shape[:axis], size + (gap - 1) * max(0, size - 1), *shape[axis + 1 :])
  x, padding = crop(w, x, shape, range(2, len(shape)), padding)
  plain = kernel(False)
  assert plain is not None
  pads = [low for low, _ in padding] + [high for _, high in padding]
  return w.emit('Conv', x, plain, bias, strides=list(strides), pads=pads, **shared)


def crop(
  w: Writer, x: str, shape: Shape, axes: Sequence[int], padding: Sequence[tuple[int, int]]
) -> tuple[str, list[tuple[int, int]]]:
  """Takes away what negative padding takes away; what is left to pad."""
  cuts = [
    (axis, max(0, -low), dims.split(shape[axis])[0] - max(0, -high))
    for axis, (low, high) in zip(axes, padding, strict=True)
    if low < 0 or high < 0
  ]
  if cuts:
    x = w.cut(x, *(list(column) for column in zip(*cuts, strict=True)))
  return x, [(max(0, low), max(0, high)) for low, high in padding]


def turned(kernel: np.ndarray, groups: int) -> np.ndarray:
  """[o, i, spatial...] as ConvTranspose wants it: [groups i, o / groups, spatial...], mirrored."""
  outputs, inputs, *taps = kernel.shape
  parts = kernel.reshape(groups, outputs // groups, inputs, *taps).swapaxes(1, 2)
  mirrored = np.flip(parts, tuple(range(3, parts.ndim)))
  return mirrored.reshape(groups * inputs, outputs // groups, *taps)


def conv(w: Writer, node: Node) -> None:
  """Conv or ConvTranspose."""
  x, kernel = node.inputs
  dtype, groups = node.attributes['dtype'], node.attributes['groups']
  if dtype not in _FLOATS:
    raise ValueError(f'ONNX convolves floats, not {dtype}: cast input and kernel to float32.')
  before, order, after = conv_orders(node.attributes['layout'])
  array = w.array(kernel)

  def read(transposed: bool) -> str | None:
    if not transposed:
      return w.cast(w.read(kernel, order), w.dtype(kernel), dtype)
    if array is None:
      return None
    label = f'{kernel}:transposed'
    return w.constant(turned(np.transpose(array, order), groups).astype(dtype), label)

  value = w.cast(w.read(x, before), w.dtype(x), dtype)
  shape = tuple(w.shape(x)[axis] for axis in before)
  taps = [dims.split(w.shape(kernel)[axis])[0] for axis in order[2:]]
  y = convolve(w, value, shape, taps, read, '', node.attributes, dtype)
  w.bind(node.outputs[0], y, after)


# Matrix products.


def dot(w: Writer, node: Node) -> None:
  """MatMul where the axes can lie as it wants them, else Einsum."""
  (a, b), dtype = node.inputs, node.attributes['dtype']
  (left, right), both = node.attributes['contract'], node.attributes['batch']
  free = [
    [axis for axis in w.identity(name) if axis not in (*shared, *summed)]
    for name, shared, summed in zip((a, b), both, (left, right), strict=True)
  ]
  simple = len(left) == 1 and len(free[1]) == 1 and len(free[0]) >= 1
  if simple and (not both[0] or len(free[0]) == 1):
    orders = (*both[0], *free[0], *left), (*both[1], *right, *free[1])
    values = [w.read(name, order) for name, order in zip((a, b), orders, strict=True)]
    values = [w.cast(v, w.dtype(name), dtype) for v, name in zip(values, (a, b), strict=True)]
    w.bind(node.outputs[0], w.emit('MatMul', *values))
    return
  letters = iter('abcdefghijklmnopqrstuvwxyz')
  names: list[dict[int, str]] = [{}, {}]
  for one, other in (*zip(*both, strict=True), *zip(left, right, strict=True)):
    names[0][one] = names[1][other] = next(letters)
  for part, axes in zip(names, free, strict=True):
    part.update((axis, next(letters)) for axis in axes)
  terms, values = [], []
  for name, part in zip((a, b), names, strict=True):
    order = w.order(name)
    values.append(w.cast(w.read(name, order), w.dtype(name), dtype))
    terms.append(''.join(part[axis] for axis in order))
  result = [names[0][axis] for axis in (*both[0], *free[0])] + [names[1][axis] for axis in free[1]]
  equation = f'{",".join(terms)}->{"".join(result)}'
  w.bind(node.outputs[0], w.emit('Einsum', *values, equation=equation))


# Windows.


def windows(w: Writer, node: Node) -> tuple[list[int], Order]:
  """Axes along which a window is more than one element, and an order with two others in front."""
  name, keys = node.inputs[0], ('window', 'strides', 'padding', 'dilation')
  options = list(zip(*(node.attributes[key] for key in keys), strict=True))
  axes = [i for i, option in enumerate(options) if option != (1, 1, (0, 0), 1)]
  order = w.order(name)
  if set(axes) & set(order[:2]):
    order = tuple(sorted(w.identity(name), key=lambda axis: (axis in axes, axis)))
  return axes, order


def pool(w: Writer, node: Node) -> None:
  """MaxPool or AveragePool; what they cannot do is put together of slices."""
  [name], kind = node.inputs, node.op.removeprefix('pool_')
  axes, order = windows(w, node)
  few = math.prod(node.attributes['window']) <= _FEW_TAPS
  if few and order != w.order(name):
    # Sums over neighbouring channels, as in local response normalization.
    order = w.order(name)
  dtype, rank = w.dtype(name), len(order)
  x = w.read(name, order)
  native = dtype in ('float32', 'float64') or (dtype == 'uint8' and kind == 'max')
  dilated = max(node.attributes['dilation'], default=1) > 1
  if not axes:
    y = x
  elif (
    native and 3 <= rank <= 5 and not set(axes) & set(order[:2]) and not (dilated and kind == 'sum')
  ):
    y = pool_windows(w, x, node, order, kind, dtype)
  else:
    y = _slices(w, x, node, order, kind, dtype)
  w.bind(node.outputs[0], y, order)


def pool_windows(
  w: Writer, x: str, node: Node, order: Order, kind: str, dtype: str, mean: bool = False
) -> str:
  """A pooling over all axes but the first two of `order`."""
  window, strides, dilation = (
    [node.attributes[key][axis] for axis in order[2:]] for key in ('window', 'strides', 'dilation')
  )
  shape = tuple(w.shape(node.inputs[0])[axis] for axis in order)
  padding = [node.attributes['padding'][axis] for axis in order[2:]]
  x, padding = crop(w, x, shape, range(2, len(order)), padding)
  if any(max(pair) >= size for pair, size in zip(padding, window, strict=True)):
    # Engines refuse windows that lie in the padding altogether.
    fill = w.scalar({'sum': 0, 'max': end(dtype, -1), 'min': end(dtype, 1)}[kind], dtype)
    x, padding = w.pad(x, [(0, 0), (0, 0), *padding], fill), [(0, 0)] * len(window)
  pads = [low for low, _ in padding] + [high for _, high in padding]
  shared = {'kernel_shape': window, 'strides': strides, 'pads': pads}
  if kind == 'sum':
    y = w.emit('AveragePool', x, count_include_pad=1, **shared)
    return y if mean else w.emit('Mul', y, w.scalar(math.prod(window), dtype))
  if set(dilation) != {1}:
    shared['dilations'] = dilation
  if kind == 'max':
    return w.emit('MaxPool', x, **shared)
  return w.emit('Neg', w.emit('MaxPool', w.emit('Neg', x), **shared))


def _slices(w: Writer, x: str, node: Node, order: Order, kind: str, dtype: str) -> str:
  """One slice per tap, joined."""
  window, strides, padding, dilation = (
    [node.attributes[key][axis] for axis in order]
    for key in ('window', 'strides', 'padding', 'dilation')
  )
  if math.prod(window) > _MOST_TAPS:
    raise ValueError(
      f'ONNX has no {kind} of {dtype} over windows of {math.prod(window)} values: cast to float32, '
      'or pool in steps.'
    )
  given, made = (
    [w.shape(name)[axis] for axis in order] for name in (node.inputs[0], node.outputs[0])
  )
  wide = WIDER.get(dtype, dtype)
  x = w.cast(x, dtype, wide)
  places = [i for i in range(len(order)) if (window[i], strides[i], padding[i]) != (1, 1, (0, 0))]
  x, _ = crop(w, x, tuple(given), places, [padding[i] for i in places])
  fill = w.scalar({'sum': 0, 'max': end(wide, -1), 'min': end(wide, 1)}[kind], wide)
  x = w.pad(x, [(max(0, low), max(0, high)) for low, high in padding], fill)
  y = ''
  for tap in itertools.product(*(range(window[i]) for i in places)):
    starts = [t * dilation[i] for t, i in zip(tap, places, strict=True)]
    steps = [strides[i] for i in places]
    stops = [
      start + (dims.split(made[i])[0] - 1) * step + 1
      for start, step, i in zip(starts, steps, places, strict=True)
    ]
    part = w.cut(x, places, starts, stops, steps)
    y = w.emit({'sum': 'Add', 'max': 'Max', 'min': 'Min'}[kind], y, part) if y else part
  return w.cast(y, wide, dtype)


HANDLERS: Mapping[str, Callable[[Writer, Node], None]] = {
  'conv': conv,
  'dot': dot,
  'pool_max': pool,
  'pool_min': pool,
  'pool_sum': pool,
}
