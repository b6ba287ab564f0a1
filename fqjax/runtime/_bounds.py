"""What running a graph can cost, worked out before anything runs: files may come from anybody."""

import math

from fqjax.runtime import dims
from fqjax.runtime.graph import Graph, Node

# Elements of one tensor, for one item of a batch, that any file may ask for; and how many times
# more than the largest array it is given or has.
FREE_ELEMENTS = 1 << 24
GROWTH = 4096
# Steps of one node's windows: every tap of a window is a pass over its results.
_MOST_TAPS = 1 << 16
# Taps times results of one node, as a multiple of the elements it may have.
_MOST_WORK = 256


def check(graph: Graph, limit: int | None = None) -> None:
  """Refuses graphs whose tensors are out of all proportion to what goes in.

  Args:
    graph: valid.
    limit: elements a tensor may have for one item of a batch; by default 16,777,216, or 4,096
      times those of the largest input or constant if that is more.

  Raises:
    ValueError: naming the node.

  Example:
    >>> from fqjax.runtime.graph import Tensor
    >>> x, y = Tensor('x', (1,), 'float32'), Tensor('y', (10**6, 10**6), 'float32')
    >>> wide = {'shape': (10**6, 10**6), 'axes': (1,)}
    >>> node = Node('broadcast', ('x',), ('y',), wide)
    >>> check(Graph(('x',), (), {}, (node,), ('y',), {'x': x, 'y': y}))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: node 0, broadcast: makes 1000000000000 elements of at most 16777216; ...
  """
  given = [_elements(graph.tensors[name].shape) for name in (*graph.inputs, *graph.constants)]
  most = max(FREE_ELEMENTS, GROWTH * max(given, default=0)) if limit is None else limit
  for i, node in enumerate(graph.nodes):
    where = f'node {i}, {node.op}' + (f' ({node.scope})' if node.scope else '')
    sizes = [_elements(graph.tensors[name].shape) for name in node.outputs]
    sizes += _between(graph, node)
    if max(sizes) > most:
      raise ValueError(
        f'{where}: makes {max(sizes)} elements of at most {most}; `limit=` allows more if you trust '
        'the file.'
      )
    taps = _taps(graph, node)
    if taps > max(_MOST_TAPS, most >> 8) or taps * sizes[0] > _MOST_WORK * most:
      raise ValueError(
        f'{where}: windows of {taps} taps for {sizes[0]} elements; `limit=` allows more if you trust '
        'the file.'
      )
  returned = sum(_elements(graph.tensors[name].shape) for name in graph.outputs)
  if returned > most:
    raise ValueError(f'returns {returned} elements of at most {most}; `limit=` allows more.')


def _elements(shape: dims.Shape) -> int:
  return math.prod(dims.split(dim)[0] for dim in shape)


def _between(graph: Graph, node: Node) -> list[int]:
  """Sizes of what a node makes on its way: padded and spread inputs."""
  if 'padding' not in node.attributes or node.op == 'pad':
    return []
  shape = [dims.split(dim)[0] for dim in graph.tensors[node.inputs[0]].shape]
  gaps = [1] * len(shape)
  padding = [(0, 0)] * len(shape)
  if 'layout' in node.attributes:
    layout, kernel, _ = node.attributes['layout']
    spatial = [letter for letter in kernel if letter not in 'OI']
    for letter, pair, gap in zip(
      spatial, node.attributes['padding'], node.attributes['input_dilation'], strict=True
    ):
      axis = layout.index(letter)
      padding[axis], gaps[axis] = pair, gap
  else:
    padding = node.attributes['padding']
  return [
    math.prod(
      max(0, size - 1) * gap + min(size, 1) + max(0, low) + max(0, high)
      for size, gap, (low, high) in zip(shape, gaps, padding, strict=True)
    )
  ]


def _taps(graph: Graph, node: Node) -> int:
  if 'window' in node.attributes:
    return math.prod(node.attributes['window'])
  if node.op in ('conv', 'qconv'):
    kernel = node.attributes['layout'][1]
    shape = graph.tensors[node.inputs[1]].shape
    return math.prod(
      dims.split(dim)[0] for dim, letter in zip(shape, kernel, strict=True) if letter not in 'OI'
    )
  return 1
