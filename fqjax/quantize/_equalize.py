"""What is done to a frozen graph before calibration and after it: equal channels, corrected biases."""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._integer import integer_layer
from fqjax.quantize._observe import compiled_pass
from fqjax.quantize._ranges import Range
from fqjax.quantize._steps import Step, find_steps, sources
from fqjax.runtime.graph import Graph, Node, Tensor, consumers


def equalize(graph: Graph, rounds: int = 20) -> Graph:
  """Cross-layer equalisation: channels between two layers get the same share of their ranges.

  A channel divided by s in one layer and multiplied by s in the next leaves the network as it is,
  where between the two there is nothing or a ReLU. With s = sqrt(r1 / r2), r the largest magnitudes
  of the channel's weights on either side, both become sqrt(r1 r2).

  Args:
    graph: frozen.
    rounds: over all pairs of layers, at most; ends when nothing moves by more than 0.1 %.

  Returns:
    The graph with other weights; results differ by rounding only. Pairs with a ReLU6 between them,
    a result that is read twice, or a kernel that two layers share, stay as they are.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> params = {'a': jnp.diag(jnp.array([1.0, 16.0])), 'b': jnp.eye(2)}
    >>> traced = to_graph(lambda p, x: x @ p['a'] @ p['b'], params, jnp.ones((1, 2)))
    >>> graph = equalize(freeze(traced, params))
    >>> np.diag(graph.constants['a']).tolist(), np.diag(graph.constants['b']).tolist()
    ([1.0, 4.0], [1.0, 4.0])

  Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.
  """
  arrays = {name: np.asarray(array) for name, array in graph.constants.items()}
  pairs = _pairs(graph)
  for _ in range(rounds):
    largest = 0.0
    for first, second in pairs:
      largest = max(largest, _equalize_pair(arrays, first, second))
    if largest < 1e-3:
      break
  return dataclasses.replace(graph, constants=arrays)


def correct_bias(
  graph: Graph,
  ranges: Mapping[str, Range],
  batches: Iterable[Any],
  in_float: str = '',
  largest: Mapping[str, np.ndarray] | None = None,
) -> Graph:
  """Takes the mean error that rounded weights make out of the biases.

  The error of a layer's mean result is the error of its weights times its mean input, per channel
  and over all taps alike (padding is not looked at).

  Args:
    graph: frozen.
    ranges: of `calibrate`.
    batches: as `calibrate` takes them.
    in_float: layers that stay in float, as in `integer_graph`: their weights are not rounded.
    largest: as in `integer_graph`.

  Returns:
    The graph with other biases, for the same ranges; layers without one get one.

  Raises:
    ValueError: no batch, or a layer whose input has no range.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> w = jnp.array([[1.0], [0.4921]])
    >>> graph = freeze(to_graph(lambda p, x: x @ p, w, jnp.ones((1, 2))), w)
    >>> other = correct_bias(graph, {'input': Range(0.0, 1.0)}, [jnp.ones((1, 2))])
    >>> round(other.constants['params:bias'].item(), 4)  # 0.4921 * 127 becomes 62
    0.0039

  Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
  """
  steps = find_steps(graph, in_float)
  layers = [step for step in steps if step.kind in ('conv', 'dot')]
  means = _channel_means(graph, layers, batches)
  scale_of = sources(graph, steps)
  constants, tensors = dict(graph.constants), dict(graph.tensors)
  replaced: dict[str, list[Node]] = {}  # output of a node -> what stands in its place
  for step in layers:
    [x] = step.inputs
    source = scale_of.get(x, x)
    if source not in ranges:
      raise ValueError(f'{step.where}: no range for its input {source!r}; calibrate first.')
    reach = (largest or {}).get(step.details['kernel'])
    shift = -_mean_error(graph, step, ranges[source], means[x], reach)
    node, kernel = step.nodes[0], step.details['kernel']
    rank = len(graph.tensors[node.outputs[0]].shape)
    axis = node.attributes['layout'][2].index('C') if step.kind == 'conv' else rank - 1
    shape = [1] * rank
    shape[axis] = shift.size
    old = step.details['bias']
    name = f'{kernel}:bias' if old is None else old
    while name in constants:
      name += "'"
    before = 0 if old is None else np.broadcast_to(graph.constants[old].reshape(-1), shift.shape)
    constants[name] = (before + shift).astype(np.float32).reshape(shape)
    tensors[name] = Tensor(name, tuple(shape), 'float32')
    [out] = node.outputs
    if old is None:
      raw = f'{out}:raw'
      tensors[raw] = tensors[out]._replace(name=raw)
      add = Node('add', (raw, name), (out,), {}, node.scope)
      replaced[out] = [node._replace(outputs=(raw,)), add]
    else:
      add = step.nodes[1]
      inputs = tuple(name if given == old else given for given in add.inputs)
      replaced[add.outputs[0]] = [add._replace(inputs=inputs)]
  nodes = [one for node in graph.nodes for one in replaced.get(node.outputs[0], [node])]
  read = {name for node in nodes for name in node.inputs}
  constants = {name: array for name, array in constants.items() if name in read}
  gone = set(graph.constants) - set(constants)
  return dataclasses.replace(
    graph,
    nodes=tuple(nodes),
    constants=constants,
    tensors={name: tensor for name, tensor in tensors.items() if name not in gone},
  )


def _pairs(graph: Graph) -> list[tuple[Step, Step]]:
  steps = [step for step in find_steps(graph) if step.kind in ('conv', 'dot')]
  readers = consumers(graph)
  shared = lambda step: any(
    name is not None and len(readers[name]) > 1
    for name in (step.details['kernel'], step.details['bias'])
  )
  by_input = {step.inputs[0]: step for step in steps if not shared(step)}
  pairs = []
  for step in steps:
    follower = by_input.get(step.output)
    if follower is None or shared(step) or len(readers[step.output]) > 1:
      continue
    bias = step.details['bias']
    one_for_all = bias is not None and graph.constants[bias].size != _outputs(graph, step)
    passes_through = step.high is None and step.low in (None, 0)
    if passes_through and not one_for_all and step.output not in graph.outputs:
      pairs.append((step, follower))
  return pairs


def _equalize_pair(arrays: dict[str, np.ndarray], first: Step, second: Step) -> float:
  """Moves one pair; returns by how much the largest factor differs from 1."""
  one, two = first.details['kernel'], second.details['kernel']
  out = _output_axis(first)
  left = np.moveaxis(arrays[one], out, -1)
  right, back = _by_input_channel(second, arrays[two])
  r1 = np.abs(left).reshape(-1, left.shape[-1]).max(0).astype(np.float64)
  r2 = np.abs(right).max(1).astype(np.float64)
  s = np.where((r1 > 0) & (r2 > 0), np.sqrt(r1 / np.where(r2 > 0, r2, 1)), 1.0)
  s = np.where(s > 0, s, 1.0)
  arrays[one] = np.moveaxis((left / s).astype(np.float32), -1, out)
  arrays[two] = back((right * s[:, None]).astype(np.float32))
  if (bias := first.details['bias']) is not None:
    old = arrays[bias]
    arrays[bias] = (old.reshape(-1) / s).astype(np.float32).reshape(old.shape)
  return float(np.abs(s - 1).max(initial=0))


def _output_axis(step: Step) -> int:
  node = step.nodes[0]
  if step.kind == 'conv':
    return node.attributes['layout'][1].index('O')
  return 1 - node.attributes['contract'][1][0]


def _outputs(graph: Graph, step: Step) -> int:
  return graph.constants[step.details['kernel']].shape[_output_axis(step)]


def _by_input_channel(step: Step, kernel: np.ndarray):
  """A kernel as [input channels, all that a channel meets], and the way back."""
  node = step.nodes[0]
  if step.kind == 'dot':
    flip = node.attributes['contract'][1][0] == 1
    rows = kernel.T if flip else kernel
    return rows, lambda rows: rows.T if flip else rows
  layout, groups = node.attributes['layout'][1], node.attributes['groups']
  order = [layout.index('I'), layout.index('O')]
  moved = np.moveaxis(kernel, order, (-2, -1))
  *taps, inputs, outputs = moved.shape
  split = moved.reshape(-1, inputs, groups, outputs // groups)
  # Channel g * inputs + i.
  rows = split.transpose(2, 1, 0, 3).reshape(groups * inputs, -1)

  def back(rows: np.ndarray) -> np.ndarray:
    parts = rows.reshape(groups, inputs, -1, outputs // groups).transpose(2, 1, 0, 3)
    return np.moveaxis(parts.reshape(*taps, inputs, outputs), (-2, -1), order)

  return rows, back


def _channel_means(
  graph: Graph, layers: list[Step], batches: Iterable[Any]
) -> dict[str, np.ndarray]:
  """Mean of each layer's input per channel, over everything else."""
  axes = {step.inputs[0]: _channel_axis(graph, step) for step in layers}
  call, arrays = compiled_pass(
    graph,
    tuple(axes),
    lambda values: {
      name: jnp.mean(x, [i for i in range(x.ndim) if i != axes[name]]) for name, x in values.items()
    },
  )
  totals: dict[str, np.ndarray] = {}
  count = 0
  for batch in batches:
    inputs = batch if isinstance(batch, (tuple, list)) else (batch,)
    weight = len(inputs[0])
    found = jax.device_get(call(arrays, tuple(map(jnp.asarray, inputs))))
    count += weight
    for name, mean in found.items():
      totals[name] = totals.get(name, np.float64(0)) + weight * mean.astype(np.float64)
  if not count:
    raise ValueError('bias correction has seen no batch: the iterator is empty (or used up).')
  return {name: total / count for name, total in totals.items()}


def _channel_axis(graph: Graph, step: Step) -> int:
  if step.kind == 'conv':
    return step.nodes[0].attributes['layout'][0].index('C')
  return len(graph.tensors[step.inputs[0]].shape) - 1


def _mean_error(
  graph: Graph, step: Step, given: Range, mean: np.ndarray, largest: np.ndarray | None
) -> np.ndarray:
  kernel = graph.constants[step.details['kernel']]
  bias = step.details['bias']
  channel = _output_axis(step)
  outputs = kernel.shape[channel]
  offset = None if bias is None else np.broadcast_to(graph.constants[bias].reshape(-1), outputs)
  layer = integer_layer(kernel, offset, given.scale, channel, largest)
  shape = [-1 if axis == channel else 1 for axis in range(kernel.ndim)]
  error = layer.weight * layer.scale.reshape(shape) - kernel
  rows, _ = _by_input_channel(step, error)
  groups = step.nodes[0].attributes['groups'] if step.kind == 'conv' else 1
  # [groups, inputs, taps, outputs of a group]
  parts = rows.reshape(groups, len(mean) // groups, -1, outputs // groups)
  return (parts * mean.reshape(groups, -1, 1, 1)).sum((1, 2)).reshape(-1)
