"""Export: seconds to a file, seconds from a file, and what NumPy makes of it.

  python -m benchmarks.export [--only run,export,load,memory] [--model resnet50]

run      the file of a network, one image, against the same graph with every convolution written by
         hand: patches of the whole image side by side, one matrix product.
export   seconds of `fqjax.export`, tracing and encoding included.
load     seconds of `fqjax.runtime.load` in a fresh process, all checks on, imports not counted, the
         file in the page cache.
memory   most bytes a fresh process holds above what it held before loading, one image, against
         twice the file and three times the largest layer's input and output.

Contenders of `run` take turns in one process; the BLAS has all cores in both.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
import fqjax
from fqjax import models
from fqjax.runtime import dims, reference
from fqjax.runtime.graph import Graph

PARTS = ('run', 'export', 'load', 'memory')
_SMALL = {'lenet5': (28, 28, 1), 'cifar_resnet20': (32, 32, 3)}
_FRESH = """
import sys, time, re, pathlib
import numpy as np
import fqjax.runtime as runtime
held = lambda field: int(re.search(field + r':\\s*(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])
warm = np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)
before = held('VmRSS')
start = time.perf_counter()
model = runtime.load(sys.argv[1])
took = time.perf_counter() - start
if sys.argv[2] == 'memory':
  [spec] = model.inputs
  model(np.zeros((1, *spec.shape[1:]), spec.dtype))
print(took, 1024 * (held('VmHWM') - before))
"""


def by_hand(graph: Graph, x: np.ndarray) -> np.ndarray:
  """The graph, convolutions as somebody would write them with NumPy: patches, then one product."""
  values: dict[str, Any] = {graph.inputs[0]: x, **graph.constants}
  for node in graph.nodes:
    arrays = [values[name] for name in node.inputs]
    if node.op == 'conv' and node.attributes['groups'] == 1:
      values[node.outputs[0]] = patches_times_kernel(*arrays, node.attributes)
    else:
      results = reference.run_node(node, arrays, len(x))
      values |= zip(node.outputs, results, strict=True)
  return values[graph.outputs[0]]


def patches_times_kernel(x: np.ndarray, w: np.ndarray, attributes) -> np.ndarray:
  """NHWC convolution in two lines of algebra."""
  assert attributes['layout'] == ('NHWC', 'HWIO', 'NHWC')
  assert attributes['dilation'] == attributes['input_dilation'] == (1, 1)
  x = np.pad(x, [(0, 0), *attributes['padding'], (0, 0)])
  (down, right), (height, width, inputs, outputs) = attributes['strides'], w.shape
  rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // right + 1
  patches = np.empty((len(x), rows, columns, height, width, inputs), x.dtype)
  for i in range(height):
    for j in range(width):
      patches[:, :, :, i, j] = x[:, i : i + down * rows : down, j : j + right * columns : right]
  product = patches.reshape(-1, height * width * inputs) @ w.reshape(-1, outputs)
  return product.reshape(len(x), rows, columns, outputs)


def exported(name: str) -> tuple[fqjax.exporter.Artifact, tuple[int, ...], float]:
  """A network of random numbers as an artifact, the shape of its input, and seconds of the export."""
  shape = (1, *_SMALL.get(name, (224, 224, 3)))
  net = models.create_model(name)
  variables = jax.device_get(jax.jit(net.init)(jax.random.key(0), jnp.zeros(shape)))
  begin = time.perf_counter()
  artifact = fqjax.export(net.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
  return artifact, shape, time.perf_counter() - begin


def largest_layer(graph: Graph) -> int:
  """Bytes of the input and output of the layer that has most of them, one image."""
  size = lambda name: 4 * int(np.prod(dims.bind(graph.tensors[name].shape, 1)))
  data = lambda node: [name for name in node.inputs if name not in graph.constants]
  return max(sum(map(size, (*data(node), *node.outputs))) for node in graph.nodes)


def in_fresh_process(path: pathlib.Path, what: str) -> tuple[float, int]:
  """Seconds of loading, and bytes held above what was held before."""
  command = [sys.executable, '-c', _FRESH, str(path), what]
  seconds, held = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  return float(seconds), int(held)


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__, repeats=9)
  parser.add_argument('--only', default=','.join(PARTS), help='parts, separated by commas')
  parser.add_argument('--model', default='resnet50', help='of fqjax.list_models() (resnet50)')
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  if wrong := sorted(set(args.only) - set(PARTS)):
    parser.error(f'unknown parts {", ".join(wrong)}; choose of {", ".join(PARTS)}')
  return args


def main(argv=None) -> list[common.Row]:
  """Runs the command line; returns the rows."""
  args = parse_command(argv)
  parts = args.only
  artifact, shape, took = exported(args.model)
  rows: list[common.Row] = []
  plain = {'peer': None, 'ratio': None, 'spread': None}
  if 'run' in parts:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    [graph] = artifact.graphs
    error = np.abs(artifact(x) - by_hand(graph, x)).max() / np.abs(by_hand(graph, x)).max()
    if not error < 1e-4:
      raise SystemExit(f'the contenders differ by {error:.1e} of the result.')
    contenders = {'fqjax.runtime': lambda: artifact(x), 'by hand': lambda: by_hand(graph, x)}
    seconds = common.compare(contenders, args.repeats)
    title = f'run/{args.model}'
    rows.append(common.speedup_row(title, seconds, 'fqjax.runtime', 'by hand', 1 / 1.5))
  if 'export' in parts:
    title = f'export/{args.model}, {len(artifact.data):,} bytes'
    rows.append({'name': title, 'value': took, 'unit': 's', 'goal': 20.0, **plain})
  with tempfile.TemporaryDirectory() as folder:
    path = artifact.save(pathlib.Path(folder) / 'model.fqx')
    if 'load' in parts:
      times = [in_fresh_process(path, 'load')[0] for _ in range(args.repeats)]
      spread = float(np.std(times, ddof=1) / np.sqrt(len(times))) if len(times) > 1 else None
      row = {'name': f'load/{args.model}', 'value': float(np.median(times)), 'unit': 's'}
      rows.append({**row, **plain, 'goal': 0.2, 'spread': spread})
    if 'memory' in parts:
      held = in_fresh_process(path, 'memory')[1]
      most = 2 * len(artifact.data) + 3 * largest_layer(artifact.graphs[0])
      row = {'name': f'memory/{args.model}', 'value': held, 'unit': 'bytes held'}
      rows.append({**row, **plain, 'peer': 'allowance', 'ratio': most / held, 'goal': 1.0})
  common.finish(args, rows, data='x'.join(map(str, shape)))
  return rows


if __name__ == '__main__':
  main()
