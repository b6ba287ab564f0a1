"""Integer arithmetic as float operations between DequantizeLinear and QuantizeLinear (QDQ).

Every operation reads its inputs by scales that reproduce its own multipliers, whatever scale the
operation before has written them with: the integers stay the same.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fqjax.exporter.onnx import _scales
from fqjax.exporter.onnx._axes import remaining
from fqjax.exporter.onnx._layers import conv_orders, convolve, pool_windows, turned, windows
from fqjax.exporter.onnx._writer import Order, Writer
from fqjax.runtime.graph import Node

Scales = Mapping[str, float]


def _float(w: Writer, value: str, scale: float, zero: int) -> str:
  """DequantizeLinear, in one number type with its scale."""
  return w.emit(
    'DequantizeLinear', value, w.scalar(scale, 'float32'), w.scalar(zero, 'uint8')
  )  # fmt: skip


def _store(w: Writer, value: str, node: Node, scale: float, order: Order) -> None:
  """Limits, where the ends of uint8 do not set them, and QuantizeLinear."""
  low, high, zero = (node.attributes[key] for key in ('low', 'high', 'zero'))
  if (low, high) == (zero, 255) and low > 0:
    value = w.emit('Relu', value)
  elif (low, high) != (0, 255):
    ends = [
      '' if limit == free else w.scalar((limit - zero) * scale, 'float32')
      for limit, free in ((low, 0), (high, 255))
    ]
    value = w.emit('Clip', value, *ends)
  _quantized(w, value, node, scale, zero, order)


def _quantized(
  w: Writer, value: str, node: Node, scale: float, zero: int, order: Order
) -> None:  # fmt: skip
  stored = w.emit('QuantizeLinear', value, w.scalar(scale, 'float32'), w.scalar(zero, 'uint8'))
  w.bind(node.outputs[0], stored, order)


def _constant(w: Writer, node: Node, place: int, what: str) -> np.ndarray:
  array = w.array(node.inputs[place])
  if array is None:
    raise ValueError(f'the {what} must be a constant: bind the parameters.')
  return array


def quantize(w: Writer, node: Node, scales: Scales) -> None:
  """From floats."""
  [name] = node.inputs
  order = w.order(name)
  attributes = node.attributes
  _quantized(w, w.read(name, order), node, attributes['scale'], attributes['zero'], order)


def dequantize(w: Writer, node: Node, scales: Scales) -> None:
  """To floats."""
  [name] = node.inputs
  order = w.order(name)
  value = _float(w, w.read(name, order), node.attributes['scale'], node.attributes['zero'])
  w.bind(node.outputs[0], value, order)


def _layer(w: Writer, node: Node, scales: Scales) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Weights, their scales [o] and the bias [o] of a layer."""
  weight, bias, multiplier = (
    _constant(w, node, i, what) for i, what in ((1, 'weights'), (2, 'bias'), (3, 'multipliers'))
  )
  if not (np.isfinite(multiplier).all() and (multiplier > 0).all()):
    raise ValueError('ONNX has scales above 0 only: multipliers must be positive and finite.')
  ratio = np.float64(scales[node.outputs[0]]) / np.float64(scales[node.inputs[0]])
  return weight, (multiplier * ratio).astype(np.float32), bias


def _bias(w: Writer, node: Node, bias: np.ndarray, scale: np.ndarray, given: float) -> str:
  """int32 at the scale of the sums; nothing if all are 0."""
  if not bias.any():
    return ''
  steps = w.constant((np.float32(given) * scale).astype(np.float32))
  return w.emit('DequantizeLinear', w.constant(bias, node.inputs[2]), steps, axis=0)


def _weight(w: Writer, label: str, array: np.ndarray, scale: np.ndarray, axis: int) -> str:
  zeros = w.constant(np.zeros(len(scale), np.int8))
  return w.emit('DequantizeLinear', w.constant(array, label), w.constant(scale), zeros, axis=axis)


def qconv(w: Writer, node: Node, scales: Scales) -> None:
  """Conv between QDQ, weights per output channel."""
  weight, scale, bias = _layer(w, node, scales)
  before, order, after = conv_orders(node.attributes['layout'])
  weight, groups = np.transpose(weight, order), node.attributes['groups']

  def kernel(transposed: bool) -> str | None:
    if not transposed:
      return _weight(w, node.inputs[1], weight, scale, 0)
    # Its second axis counts the channels of one group: one scale each only without groups.
    return _weight(w, node.inputs[1], turned(weight, 1), scale, 1) if groups == 1 else None

  [x, given] = node.inputs[0], scales[node.inputs[0]]
  value = _float(w, w.read(x, before), given, node.attributes['input_zero'])
  shape = tuple(w.shape(x)[axis] for axis in before)
  added = _bias(w, node, bias, scale, given)
  y = convolve(w, value, shape, weight.shape[2:], kernel, added, node.attributes, 'float32')
  _store(w, y, node, scales[node.outputs[0]], after)


def qdot(w: Writer, node: Node, scales: Scales) -> None:
  """Gemm for matrices, MatMul and Add otherwise."""
  weight, scale, bias = _layer(w, node, scales)
  x, given = node.inputs[0], scales[node.inputs[0]]
  value = _float(w, w.read(x), given, node.attributes['input_zero'])
  kernel = _weight(w, node.inputs[1], weight, scale, 1)
  added = _bias(w, node, bias, scale, given)
  if len(w.shape(x)) == 2:
    y = w.emit('Gemm', value, kernel, added)
  else:
    y = w.emit('MatMul', value, kernel)
    y = w.emit('Add', y, added) if added else y
  _store(w, y, node, scales[node.outputs[0]], w.identity(node.outputs[0]))


def _joined(w: Writer, node: Node, scales: Scales) -> tuple[list[str], Order]:
  """Inputs as floats, by scales that give the multipliers exactly."""
  values, order = w.aligned(node.inputs)
  stored, parts = scales[node.outputs[0]], []
  zeros, multipliers = node.attributes['input_zeros'], node.attributes['multipliers']
  for value, zero, multiplier in zip(values, zeros, multipliers, strict=True):
    part = _float(w, value, abs(multiplier) * stored, zero)
    parts.append(part if multiplier >= 0 else w.emit('Neg', part))
  return parts, order


def qadd(w: Writer, node: Node, scales: Scales) -> None:
  """Add."""
  parts, order = _joined(w, node, scales)
  _store(w, w.emit('Add', *parts), node, scales[node.outputs[0]], order)


def qconcat(w: Writer, node: Node, scales: Scales) -> None:
  """Concat."""
  parts, order = _joined(w, node, scales)
  value = w.emit('Concat', *parts, axis=order.index(node.attributes['axis']))
  _store(w, value, node, scales[node.outputs[0]], order)


def _averaged(w: Writer, node: Node, scales: Scales, mean: str, order: Order) -> None:
  """What an average must be multiplied with to be the sum that was meant."""
  multiplier = _constant(w, node, 1, 'multiplier')
  given, stored = scales[node.inputs[0]], scales[node.outputs[0]]
  factor = multiplier.astype(np.float64) * _scales.count(w.graph, node) * stored / given
  # An average proper, up to the rounding of its multiplier.
  if np.abs(factor - 1).max(initial=0) > 1e-6:
    array = factor.astype(np.float32)
    mean = w.emit('Mul', mean, w.constant(array.transpose(order) if array.ndim else array))
  _store(w, mean, node, stored, order)


def qsum(w: Writer, node: Node, scales: Scales) -> None:
  """ReduceMean; GlobalAveragePool where it is over the whole image."""
  x, axes = node.inputs[0], node.attributes['axes']
  order = w.order(x)
  value = _float(w, w.read(x, order), scales[x], node.attributes['input_zero'])
  places = sorted(order.index(axis) for axis in axes)
  left = remaining(order, axes)
  if len(order) > 2 and places == list(range(2, len(order))):
    mean = w.emit('Flatten', w.emit('GlobalAveragePool', value))
  else:
    mean = w.reduce('ReduceMean', value, places)
  _averaged(w, node, scales, mean, left)


def qpool_sum(w: Writer, node: Node, scales: Scales) -> None:
  """AveragePool; padding counts, with a value of 0."""
  [x, _] = node.inputs
  axes, order = windows(w, node)
  unfit = set(axes) & set(order[:2]) or not 3 <= len(order) <= 5
  if unfit or max(node.attributes['dilation']) > 1:
    raise ValueError(
      'averages over windows need two axes without a window, at most three with one, and no '
      'dilation: leave the layer in float, or fix the shape.'
    )
  value = _float(w, w.read(x, order), scales[x], node.attributes['input_zero'])
  mean = pool_windows(w, value, node, order, 'sum', 'float32', mean=True)
  _averaged(w, node, scales, mean, order)


def qtable(w: Writer, node: Node, scales: Scales) -> None:
  """Gather: the integers are places in the table."""
  x, table = node.inputs
  order = w.order(x)
  places = w.cast(w.read(x, order), 'uint8', 'int32')
  w.bind(node.outputs[0], w.emit('Gather', w.read(table), places, axis=0), order)


HANDLERS: Mapping[str, Callable[[Writer, Node, Scales], None]] = {
  'quantize': quantize,
  'dequantize': dequantize,
  'qconv': qconv,
  'qdot': qdot,
  'qadd': qadd,
  'qconcat': qconcat,
  'qsum': qsum,
  'qpool_sum': qpool_sum,
  'qtable': qtable,
}
