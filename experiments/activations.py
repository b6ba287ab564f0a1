"""MobileNetV2 in integers: the float network quantized here, and the int8 network as published.

`quantized_mobilenet` takes the published float weights to int8 weights and activations, with ranges
from photographs that are not scored, `published_mobilenet` reads the network that somebody else
quantized. Both run through the NumPy reference, and are compared with the float network on the 250
photographs of `imagenet_samples`.

  FQJAX_DATA_DIR=... python -m experiments.activations --weights=.../weights
"""

from collections.abc import Callable, Iterator, Sequence
import json
import pathlib
import time
from typing import Any, NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from fqjax import data as fd
from fqjax import models, quantize, tracing
from fqjax.exporter import passes
from fqjax.runtime import graph as graph_lib
from fqjax.runtime import reference
from fqjax.runtime.graph import Graph, Node, Tensor

_FLAGS = flags.FLAGS


class Outcome(NamedTuple):
  """A network in integers beside the float one.

  Attributes:
    float_right: photographs the float network names rightly.
    right: photographs this network does.
    agree: photographs on which both name the same class.
    count: of all.
    seconds: of the integer runs.
  """

  float_right: int
  right: int
  agree: int
  count: int
  seconds: float


def photographs(name: str, split: str, batch: int = 10) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Batches of uint8 [n, 224, 224, 3] pixels and labels; the shorter side to 256, its middle."""
  source = fd.load_source(name, split)
  loader = fd.Loader(
    source, batch, shuffle=False, repeat=False, transform=fd.resize_crop(256, 224), workers=0
  )
  for one in loader:
    live = np.asarray(one['mask']).astype(bool)
    yield one['image'][live], one['label'][live]


def scaled(pixels: np.ndarray) -> np.ndarray:
  """What the float network takes: float32 in [-1, 1]."""
  return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def frozen_mobilenet(folder: pathlib.Path) -> Graph:
  """The published float network, batch norm folded.

  Args:
    folder: of the weights.
  """
  model = models.create_model('mobilenet_v2', convention='tf')
  variables = models.load_mobilenet_v2_npz(folder / 'mobilenet_v2_1.0_224.npz', model)
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return passes.freeze(tracing.to_graph(model.apply, variables, x), variables)


def quantized_mobilenet(frozen: Graph, method: str = 'mse', correct: bool = True) -> Graph:
  """The float network in integers.

  Ranges, and the mean inputs that correct the biases, are those of the 120 photographs of
  `coco_mini`. So was the choice of these settings: on them, without labels, the corrected network
  with ranges of least squared error is nearest to the float one.

  Args:
    frozen: of `frozen_mobilenet`.
    method: of `fqjax.quantize.calibrate`.
    correct: take the mean errors of the weights out of the biases.
  """
  batches = [scaled(pixels) for pixels, _ in photographs('coco_mini', 'all')]
  ranges = quantize.calibrate(frozen, batches, method)
  if correct:
    frozen = quantize.correct_bias(frozen, ranges, batches)
  return quantize.integer_graph(frozen, ranges)


def published_mobilenet(folder: pathlib.Path) -> Graph:
  """The int8 network as its authors quantized it, from the list of its tensors and operators.

  It takes pixels and returns the logits of the 1,000 classes. Its int8 activations become uint8 by
  adding 128, which changes nothing; its fixed-point multipliers become our float32 ones.

  Args:
    folder: of the weights.

  Raises:
    ValueError: an operator it should not have.
  """
  stem = 'mobilenet_v2_1.0_224_ptq_int8'
  listing = json.loads((folder / f'{stem}_graph.json').read_text())
  with np.load(folder / f'{stem}.npz') as file:
    return _Published(listing, dict(file)).read()


class _Published:
  def __init__(self, listing: dict[str, Any], arrays: dict[str, np.ndarray]):
    self.listing, self.arrays = listing, arrays
    self.described = {tensor['id']: tensor for tensor in listing['tensors']}
    self.names: dict[int, str] = {}
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}
    self.tensors: dict[str, Tensor] = {}

  def read(self) -> Graph:
    [first] = self.listing['inputs']
    self.names[first] = self._tensor('pixels', ('n', 224, 224, 3), 'uint8')
    for op in self.listing['ops']:
      self._operator(op)
    out = self._tensor('logits', ('n', 1001), 'float32')
    scale, zero = self._scale(self._last)
    last = self.names[self._last]
    self.nodes.append(Node('dequantize', (last,), (out,), {'scale': scale, 'zero': zero}))
    # Output 0 is the background.
    cut = {'start': (0, 1), 'stop': ('n', 1001), 'strides': (1, 1)}
    classes = self._tensor('classes', ('n', 1000), 'float32')
    self.nodes.append(Node('slice', (out,), (classes,), cut))
    graph = Graph(('pixels',), (), self.constants, tuple(self.nodes), (classes,), self.tensors)
    graph_lib.validate(graph)
    return graph

  def _operator(self, op: dict[str, Any]) -> None:
    kind, (out,) = op['op'], op['outputs']
    if kind in ('CONV_2D', 'DEPTHWISE_CONV_2D'):
      self._conv(op)
    elif kind == 'ADD':
      a, b = op['inputs']
      stored = self._stored(out, op['activation'])
      scale = self._scale(out)[0]
      joined = {
        'input_zeros': (self._scale(a)[1], self._scale(b)[1]),
        'multipliers': tuple(float(np.float32(self._scale(i)[0] / scale)) for i in (a, b)),
      }
      self._node('qadd', [self.names[a], self.names[b]], out, {**joined, **stored})
    elif kind == 'MEAN':
      x = op['inputs'][0]
      (given, input_zero), (scale, _) = self._scale(x), self._scale(out)
      count = self.described[x]['shape'][1] * self.described[x]['shape'][2]
      factor = self._constant(f'{out}/factor', np.float32(given / (scale * count)))
      attributes = {'axes': (1, 2), 'input_zero': input_zero, **self._stored(out, 'NONE')}
      channels = self.described[out]['shape'][-1]
      flat = self._tensor(f'{out}/flat', ('n', channels), 'uint8')
      self.nodes.append(Node('qsum', (self.names[x], factor), (flat,), attributes))
      self._node('reshape', [flat], out, {'shape': ('n', 1, 1, channels)})
    elif kind == 'RESHAPE':
      shape = ('n', *self.described[out]['shape'][1:])
      self._node('reshape', [self.names[op['inputs'][0]]], out, {'shape': shape})
      self._last = out
    elif kind == 'QUANTIZE':
      # From uint8 to int8 and back: the same numbers here.
      self.names[out] = self.names.get(op['inputs'][0], '')
    elif kind != 'SOFTMAX':  # does not change which class is the largest
      raise ValueError(f'operator {kind} has no place in this network.')

  def _conv(self, op: dict[str, Any]) -> None:
    (x, w, b), (out,) = op['inputs'], op['outputs']
    depthwise = op['op'] == 'DEPTHWISE_CONV_2D'
    # O H W I, and 1 H W C of a depthwise one, to H W I O.
    kernel = self.arrays[f't{w}'].transpose((1, 2, 0, 3) if depthwise else (1, 2, 3, 0))
    (given, input_zero), (scale, _) = self._scale(x), self._scale(out)
    multiplier = given * self.arrays[f's{w}'].astype(np.float64) / scale
    padding = tuple(
      _same_padding(size, taps, stride)
      for size, taps, stride in zip(
        self.described[x]['shape'][1:3], kernel.shape, op['stride'], strict=False
      )
    )
    if op['padding'] != 'SAME':
      raise ValueError(f'padding {op["padding"]} has no place in this network.')
    attributes = {
      'strides': tuple(op['stride']), 'padding': padding, 'dilation': (1, 1),
      'input_dilation': (1, 1), 'groups': kernel.shape[3] if depthwise else 1,
      'layout': ('NHWC', 'HWIO', 'NHWC'), 'input_zero': input_zero,
      **self._stored(out, op['activation']),
    }  # fmt: skip
    parts = [
      self._constant(f't{w}', kernel),
      self._constant(f't{b}', self.arrays[f't{b}']),
      self._constant(f't{w}/multiplier', multiplier.astype(np.float32)),
    ]
    self._node('qconv', [self.names[x], *parts], out, attributes)

  def _scale(self, index: int) -> tuple[float, int]:
    tensor = self.described[index]
    [scale], [zero] = tensor['scale'], tensor['zero_point']
    return scale, zero + (128 if tensor['dtype'] == 'int8' else 0)

  def _stored(self, out: int, activation: str) -> dict[str, int]:
    scale, zero = self._scale(out)
    low, high = 0, 255
    if activation == 'RELU6':
      low, high = zero, min(255, zero + round(6 / scale))
    elif activation != 'NONE':
      raise ValueError(f'activation {activation} has no place in this network.')
    return {'zero': zero, 'low': low, 'high': high}

  def _node(self, op: str, inputs: Sequence[str], out: int, attributes: dict) -> None:
    name = self._tensor(f't{out}', ('n', *self.described[out]['shape'][1:]), 'uint8')
    self.names[out] = name
    self.nodes.append(Node(op, tuple(inputs), (name,), attributes, self.described[out]['name']))

  def _tensor(self, name: str, shape: tuple, dtype: str) -> str:
    self.tensors[name] = Tensor(name, shape, dtype)
    return name

  def _constant(self, name: str, array: np.ndarray) -> str:
    array = np.asarray(array)
    self.constants[name] = array
    return self._tensor(name, array.shape, str(array.dtype))


def _same_padding(size: int, taps: int, stride: int) -> tuple[int, int]:
  total = max(0, (-(-size // stride) - 1) * stride + taps - size)
  return total // 2, total - total // 2


def compare(
  frozen: Graph, integers: dict[str, Graph], limit: int | None = None, say: Callable = print
) -> dict[str, Outcome]:
  """Runs networks in integers beside the float one, over photographs that gave no ranges.

  Args:
    frozen: the float network, on scaled pixels.
    integers: name -> graph; on pixels if its input is uint8, else on scaled ones.
    limit: photographs at most.
    say: called with a line now and then.

  Returns:
    Name -> outcome.
  """
  found: dict[str, Outcome] = {name: Outcome(0, 0, 0, 0, 0.0) for name in integers}
  for pixels, labels in photographs('imagenet_samples', 'test'):
    [logits] = reference.run(frozen, [scaled(pixels)])
    want = logits.argmax(-1)
    for name, graph in integers.items():
      takes_pixels = graph.tensors[graph.inputs[0]].dtype == 'uint8'
      start = time.perf_counter()
      [logits] = reference.run(graph, [pixels if takes_pixels else scaled(pixels)])
      seconds = time.perf_counter() - start
      guess = logits.argmax(-1)
      now = ((want == labels).sum(), (guess == labels).sum(), (guess == want).sum(), len(labels))
      old = found[name]
      found[name] = Outcome(
        *(int(a + b) for a, b in zip(old, now, strict=False)), old.seconds + seconds
      )
    say(f'{next(iter(found.values())).count}: {found}')
    if limit is not None and next(iter(found.values())).count >= limit:
      break
  return found


def main(argv: Sequence[str]) -> None:
  """Prints what `compare` finds for our network and the published one."""
  del argv
  folder = pathlib.Path(_FLAGS.weights)
  frozen = frozen_mobilenet(folder)
  graphs = {
    'ours': quantized_mobilenet(frozen, _FLAGS.method, _FLAGS.correct),
    'published': published_mobilenet(folder),
  }
  for name, outcome in compare(frozen, graphs).items():
    print(name, outcome)


if __name__ == '__main__':
  flags.DEFINE_string('weights', None, 'Folder of the published weights.', required=True)
  flags.DEFINE_enum('method', 'mse', list(quantize.METHODS), 'Of choosing ranges.')
  flags.DEFINE_bool('correct', True, 'Take the mean errors of the weights out of the biases.')
  app.run(main)
