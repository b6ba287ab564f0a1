"""The graph of integer arithmetic that a frozen graph becomes."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from fqjax.quantize._ranges import Range
from fqjax.quantize._steps import Step, find_steps, layer_of, sources
from fqjax.runtime import graph as graph_lib
from fqjax.runtime import oplist, reference
from fqjax.runtime.graph import Graph, Node, Tensor

# Weights are -127..127: symmetric, and the same for every kernel.
WEIGHT_STEPS = 127
# A bias takes at most half of the accumulator.
_BIAS_STEPS = 1 << 30


class IntegerLayer(NamedTuple):
  """A layer as integers.

  Attributes:
    weight: int8, in the layout of the kernel.
    bias: int32 [o], in steps of input scale times weight scale.
    scale: float64 [o], of the weights.
  """

  weight: np.ndarray
  bias: np.ndarray
  scale: np.ndarray


def integer_layer(
  kernel: np.ndarray,
  bias: np.ndarray | None,
  input_scale: float,
  channel: int,
  largest: np.ndarray | None = None,
) -> IntegerLayer:
  """Rounds a layer: weights symmetric per output channel, bias at the scale of the sums.

  Args:
    kernel: float.
    bias: [o], or None.
    input_scale: of the activation it is applied to.
    channel: axis of the output channels.
    largest: [o], magnitudes that 127 stands for where they are more than those of the kernel:
      channels that share their levels, and do not all have the largest, keep them apart alike.

  Returns:
    The layer. The scale of a channel is its largest magnitude over 127, and never so small that
    its bias would take more than 2^30 steps (dead channels have a bias and next to no weights).

  Raises:
    ValueError: NaN or an infinity in kernel or bias.

  Example:
    >>> integer_layer(np.float32([[1.0, 0.0], [-0.5, 0.0]]), np.float32([0.1, 3.0]), 0.1, 1).weight
    array([[127,   0],
           [-64,   0]], dtype=int8)
  """
  rows = np.moveaxis(np.asarray(kernel, np.float64), channel, -1)
  offset = np.zeros(rows.shape[-1]) if bias is None else np.asarray(bias, np.float64)
  if not (np.isfinite(rows).all() and np.isfinite(offset).all()):
    raise ValueError('kernel or bias hold NaN or an infinity.')
  scale = channel_scales(rows, offset, input_scale, largest)
  weight = np.clip(np.rint(rows / scale), -WEIGHT_STEPS, WEIGHT_STEPS).astype(np.int8)
  steps = np.rint(offset / (input_scale * scale))
  return IntegerLayer(np.moveaxis(weight, -1, channel), steps.astype(np.int32), scale)


def channel_scales(
  rows: np.ndarray, bias: np.ndarray, input_scale: float, largest: np.ndarray | None = None
) -> np.ndarray:
  """Scale per last axis, see `integer_layer`."""
  own = np.abs(rows).reshape(-1, rows.shape[-1]).max(0, initial=0)
  reach = own if largest is None else np.maximum(own, largest)
  scale = np.maximum(reach / WEIGHT_STEPS, np.abs(bias) / (input_scale * _BIAS_STEPS))
  return np.where(scale > 0, scale, 1.0)


def integer_graph(
  graph: Graph,
  ranges: Mapping[str, Range],
  in_float: str = '',
  largest: Mapping[str, np.ndarray] | None = None,
) -> Graph:
  """Brings a network to integers: uint8 activations, int8 weights, int32 sums.

  Args:
    graph: frozen.
    ranges: tensor -> range, of `calibrate` on the same graph.
    in_float: regex on the whole names of layers, as `print(graph)` has them behind '#'
      ('Net/Dense_0'): they and what they read stay in float, because they lose too much.
    largest: kernel -> [o], as in `integer_layer`.

  Returns:
    A valid graph of integer operations (`fqjax.runtime.oplist.INTEGER`) between a `quantize` of
    each input and a `dequantize` of each output; what integers cannot say stays in float between
    a `dequantize` and a `quantize`, see `float_layers`. Its results are those of
    `fqjax.runtime.reference.run`.

  Raises:
    ValueError: a tensor without a range, naming the layer; a layer whose sums could leave int32;
      weights that are not finite; an `in_float` that names no layer.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda p, x: jax.nn.relu(x @ p)
    >>> graph = freeze(to_graph(network, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> integers = integer_graph(graph, {'input': Range(-1.0, 2.0), '%1': Range(0.0, 2.0)})
    >>> [node.op for node in integers.nodes]
    ['quantize', 'qdot', 'dequantize']

  Source: Jacob et al. 2018, arXiv 1712.05877, section 2.
  """
  return _Lowering(graph, ranges, find_steps(graph, in_float), largest or {}).run()


def float_layers(graph: Graph, in_float: str = '') -> tuple[str, ...]:
  """What stays in float in the integer graph: operation and layer of each step.

  Args:
    graph: frozen.
    in_float: as in `integer_graph`.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda p, x: jax.nn.softmax(x @ p)
    >>> graph = freeze(to_graph(network, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> [any(op in name for name in float_layers(graph)) for op in ('exp', 'dot')]
    [True, False]
  """
  return tuple(step.where for step in find_steps(graph, in_float) if step.kind == 'float')


class _Lowering:
  def __init__(
    self,
    graph: Graph,
    ranges: Mapping[str, Range],
    steps: Sequence[Step],
    largest: Mapping[str, np.ndarray],
  ):
    self.graph, self.ranges, self.steps, self.largest = graph, ranges, steps, largest
    self.sources = sources(graph, self.steps)
    self.nodes: list[Node] = []
    self.constants = dict(graph.constants)
    self.tensors = dict(graph.tensors)
    self.integers: dict[str, str] = {}  # tensor -> its uint8 form
    self.floats: set[str] = {*graph.inputs, *graph.constants}
    self.scope = ''

  def run(self) -> Graph:
    for step in self.steps:
      self.scope = step.nodes[-1].scope
      try:
        self._step(step)
      except ValueError as error:
        raise ValueError(f'{step.where}: {error}') from None
    for name in self.graph.outputs:
      self._float(name)
    graph = dataclasses.replace(
      self.graph, nodes=tuple(self.nodes), constants=self.constants, tensors=self.tensors
    )
    used = {name for node in self.nodes for name in (*node.inputs, *node.outputs)}
    used.update((*graph.inputs, *graph.outputs))
    graph = dataclasses.replace(
      graph, tensors={name: t for name, t in self.tensors.items() if name in used}
    )
    graph = graph_lib.without_dead(graph)
    graph_lib.validate(graph)
    return graph

  def _step(self, step: Step) -> None:
    if step.kind == 'float':
      for name in step.inputs:
        self._float(name)
      for node in step.nodes:
        if not self.floats.issuperset(node.outputs):
          self.nodes.append(node)
          self.floats.update(node.outputs)
    elif step.kind == 'same':
      self._same(step)
    else:
      getattr(self, f'_{step.kind}')(step)

  # Kinds of steps.

  def _conv(self, step: Step) -> None:
    node, kernel = step.nodes[0], self.graph.constants[step.details['kernel']]
    axis = node.attributes['layout'][1].index('O')
    attributes = {
      key: value for key, value in node.attributes.items() if key not in ('dtype', 'precision')
    }
    self._layer(step, 'qconv', kernel, axis, attributes)

  def _dot(self, step: Step) -> None:
    kernel = self.graph.constants[step.details['kernel']]
    [rows] = step.nodes[0].attributes['contract'][1]
    self._layer(step, 'qdot', kernel if rows == 0 else kernel.T, 1, {})

  def _layer(self, step: Step, op: str, kernel: np.ndarray, axis: int, attributes: dict) -> None:
    [x] = step.inputs
    given, stored = self._range(x), self._range(step.output)
    name, bias = step.details['kernel'], step.details['bias']
    if bias is not None:
      bias = np.broadcast_to(self.graph.constants[bias].reshape(-1), kernel.shape[axis])
    layer = integer_layer(kernel, bias, given.scale, axis, self.largest.get(name))
    low, high = reference.accumulator_bounds(layer.weight, layer.bias, given.zero, axis)
    limits = np.iinfo(np.int32)
    if low.min(initial=0) < limits.min or high.max(initial=0) > limits.max:
      worst = int(np.argmax(np.maximum(-low, high)))
      raise ValueError(
        f'sums of channel {worst} of {name!r} could reach {max(-low[worst], high[worst])}, int32 '
        f'ends at {limits.max}: split the layer, or leave it in float.'
      )
    multiplier = (given.scale * layer.scale / stored.scale).astype(np.float32)
    parts = [
      self._constant(f'{name}:{what}', array)
      for what, array in (('int8', layer.weight), ('bias', layer.bias), ('scale', multiplier))
    ]
    attributes = {**attributes, 'input_zero': given.zero, **self._stored(step)}
    self._emit(op, (self._integer(x), *parts), step.output, attributes)

  def _add(self, step: Step) -> None:
    self._join(step, 'qadd', step.details['signs'], {})

  def _concat(self, step: Step) -> None:
    self._join(step, 'qconcat', [1] * len(step.nodes[0].inputs), step.details)

  def _join(self, step: Step, op: str, signs: Sequence[int], attributes: Mapping) -> None:
    given, stored = [self._range(name) for name in step.inputs], self._range(step.output)
    attributes = {
      **attributes,
      'input_zeros': tuple(one.zero for one in given),
      'multipliers': tuple(
        float(np.float32(sign * one.scale / stored.scale))
        for sign, one in zip(signs, given, strict=True)
      ),
      **self._stored(step),
    }
    self._emit(op, [self._integer(name) for name in step.inputs], step.output, attributes)

  def _sum(self, step: Step) -> None:
    self._total(step, 'qsum')

  def _pool_sum(self, step: Step) -> None:
    self._total(step, 'qpool_sum')

  def _total(self, step: Step, op: str) -> None:
    [x] = step.inputs
    given, stored = self._range(x), self._range(step.output)
    factor = np.asarray(step.details['factor'] * (given.scale / stored.scale), np.float32)
    multiplier = self._constant(f'{step.output}:scale', factor)
    attributes = {**step.nodes[0].attributes, 'input_zero': given.zero, **self._stored(step)}
    self._emit(op, (self._integer(x), multiplier), step.output, attributes)

  def _table(self, step: Step) -> None:
    [x] = step.inputs
    given, stored = self._range(x), self._range(step.output)
    entries = reference.dequantize(np.arange(256, dtype=np.uint8), given.scale, given.zero)
    values: dict[str, Any] = {x: entries}
    for node in step.nodes:
      # Constants are single numbers, whatever their rank.
      arrays = [
        values[name] if name in values else self.graph.constants[name].reshape(())
        for name in node.inputs
      ]
      values |= zip(node.outputs, reference.run_node(node, arrays), strict=True)
    table = reference.quantize(values[step.output], stored.scale, stored.zero)
    self._emit(
      'qtable', (self._integer(x), self._constant(f'{step.output}:table', table)), step.output, {}
    )

  def _same(self, step: Step) -> None:
    [node], [x] = step.nodes, step.inputs
    inputs = [self._integer(x)]
    if node.op == 'pad':
      zero = np.asarray(self._range(x).zero, np.uint8)
      inputs.append(self._constant(f'{step.output}:zero', zero))
    self._emit(node.op, inputs, step.output, node.attributes)

  # Forms of tensors.

  def _range(self, name: str) -> Range:
    source = self.sources.get(name, name)
    if source not in self.ranges:
      raise ValueError(
        f'no range for tensor {source!r} ({layer_of(self.graph, source)}): it was not seen in '
        'calibration; run calibrate on this very graph.'
      )
    found = self.ranges[source]
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
      raise ValueError(f'the range of {source!r} is {found}; it must be finite.')
    return found

  def _stored(self, step: Step) -> dict[str, int]:
    """Zero point of a result, and the integers at which a clamp ends."""
    stored = self._range(step.output)
    limit = lambda value, default: (
      default
      if value is None
      else int(np.clip(np.rint(np.float32(value) / np.float32(stored.scale)) + stored.zero, 0, 255))
    )
    return {'zero': stored.zero, 'low': limit(step.low, 0), 'high': limit(step.high, 255)}

  def _integer(self, name: str) -> str:
    """The uint8 form of a tensor, made where it is first needed."""
    if name not in self.integers:
      chosen = self._range(name)
      scale = {'scale': chosen.scale, 'zero': chosen.zero}
      self._node('quantize', (name,), self._new(f'{name}:u8', name, 'uint8'), scale)
      self.integers[name] = f'{name}:u8'
    return self.integers[name]

  def _float(self, name: str) -> None:
    if name not in self.floats:
      chosen = self._range(name)
      scale = {'scale': chosen.scale, 'zero': chosen.zero}
      self._node('dequantize', (self.integers[name],), name, scale)
      self.floats.add(name)

  def _constant(self, name: str, array: np.ndarray) -> str:
    while name in self.constants:
      name += "'"
    self.constants[name] = array
    self.tensors[name] = Tensor(name, array.shape, str(array.dtype))
    return name

  def _new(self, name: str, like: str, dtype: str) -> str:
    self.tensors[name] = Tensor(name, self.graph.tensors[like].shape, dtype)
    return name

  def _emit(self, op: str, inputs: Sequence[str], output: str, attributes: Mapping) -> None:
    name = self._new(f'{output}:u8', output, 'uint8')
    self.integers[output] = name
    self._node(op, inputs, name, attributes)

  def _node(self, op: str, inputs: Sequence[str], output: str, attributes: Mapping) -> None:
    assert op in oplist.OPS
    self.nodes.append(Node(op, tuple(inputs), (output,), dict(attributes), self.scope))
