"""A scale for every integer tensor.

An integer graph says the scales of what goes in and out (`quantize`, `dequantize`) and, within,
multipliers: m = s_x s_w / s_y for a layer, s_x / s_y for sums. Of a layer's result, then, only
s_w / s_y is known, and any s_y reproduces the same integers as long as s_w follows. So scales are
carried along every operation that ties them, beginning at the ends; what is tied to neither end
gets the scale of its layer's input times a power of two, which costs no rounding, such that the
largest weight of the layer comes to lie between 1/2 and 1.
"""

from collections.abc import Iterator
import math

import numpy as np

from fqjax.runtime import dims, oplist
from fqjax.runtime.graph import Graph, Node

_WEIGHT_STEPS = 127


def find_scales(graph: Graph) -> dict[str, float]:
  """Scale of every uint8 tensor, as float32 numbers.

  Args:
    graph: a valid graph; one without integer operations has none.
  """
  ties: dict[str, list[tuple[str, float]]] = {}
  anchors: dict[str, float] = {}
  for node in graph.nodes:
    if node.op == 'quantize':
      anchors.setdefault(node.outputs[0], node.attributes['scale'])
    if node.op == 'dequantize':
      anchors.setdefault(node.inputs[0], node.attributes['scale'])
    for source, result, ratio in _ties(graph, node):
      if math.isfinite(ratio) and ratio > 0:
        ties.setdefault(source, []).append((result, ratio))
        ties.setdefault(result, []).append((source, 1 / ratio))
  scales: dict[str, float] = {}

  def spread(name: str, scale: float) -> None:
    waiting = [(name, scale)]
    while waiting:
      name, scale = waiting.pop()
      if name not in scales:
        scales[name] = float(np.float32(scale))
        waiting += [(other, scales[name] * ratio) for other, ratio in ties.get(name, [])]

  for name, scale in anchors.items():
    spread(name, scale)
  for name in (*graph.inputs, *graph.constants):
    spread(name, 1.0)
  for node in graph.nodes:
    for name in node.outputs:
      if graph.tensors[name].dtype == 'uint8' and name not in scales:
        spread(name, _free(graph, node, scales))
  return scales


def _ties(graph: Graph, node: Node) -> Iterator[tuple[str, str, float]]:
  """(input, output, scale of the output over that of the input)."""
  [out, *_] = node.outputs
  if node.op in ('qadd', 'qconcat'):
    for name, multiplier in zip(node.inputs, node.attributes['multipliers'], strict=True):
      yield name, out, 1 / abs(multiplier) if multiplier else math.inf
  elif node.op in ('qsum', 'qpool_sum'):
    if (multiplier := graph.constants.get(node.inputs[1])) is not None and multiplier.size:
      # Taken for an average; at the border, where fewer are counted, multipliers are larger.
      least = float(np.abs(multiplier).min())
      yield node.inputs[0], out, 1 / (count(graph, node) * least) if least else math.inf
  elif node.op not in oplist.INTEGER and graph.tensors[out].dtype == 'uint8':
    for name in node.inputs:
      if graph.tensors[name].dtype == 'uint8' and graph.tensors[name].shape:
        yield name, out, 1.0


def count(graph: Graph, node: Node) -> int:
  """How many values a `qsum` or `qpool_sum` adds up."""
  if node.op == 'qpool_sum':
    return math.prod(node.attributes['window'])
  shape = graph.tensors[node.inputs[0]].shape
  return dims.size([shape[axis] for axis in node.attributes['axes']])[0]


def _free(graph: Graph, node: Node, scales: dict[str, float]) -> float:
  given = scales.get(node.inputs[0], 1.0)
  if node.op not in ('qconv', 'qdot') or node.inputs[3] not in graph.constants:
    return given
  largest = _WEIGHT_STEPS * float(graph.constants[node.inputs[3]].max(initial=0))
  return given * 2.0 ** math.floor(-math.log2(largest)) if largest > 0 else given
