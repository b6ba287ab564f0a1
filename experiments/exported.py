"""Published networks as files that NumPy runs: what they keep of their accuracy.

  python -m experiments.exported [--networks resnet20,resnet56,mobilenet_v2] [--onnx] [--record] --workdir=DIR

Every network leaves JAX twice (`fqjax.export`): as it is, with its preprocessing inside, and in 8-bit
integers, whose ranges come from images that are not scored. The files are written to the workdir,
read again, and run by `fqjax.runtime` on the test images; accuracy, agreement with the float network
and bytes go to the ledger. For MobileNetV2 the network that somebody else quantized is run too. With
`--onnx` both are written as ONNX as well (`pip install 'fqjax[onnx]' onnxruntime`), and onnxruntime is
compared with NumPy on the same files.

  resnet20, resnet56   published weights, the 10,000 test images of CIFAR-10; ranges from 500 training
                       images
  mobilenet_v2         published weights, 250 photographs of ImageNet; ranges from the 120 photographs
                       of `coco_mini`

The folder of the data and of the weights is FQJAX_DATA_DIR.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import activations, ledger
from experiments.harness import record_once
import fqjax
from fqjax import data as fd
from fqjax import models, runtime
from fqjax.runtime import reference

NETWORKS = ('resnet20', 'resnet56', 'mobilenet_v2')
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CALIBRATION = 500
_ONNX = '_onnx'


class Subject(NamedTuple):
  """A network and what it is judged by.

  Attributes:
    apply: of its variables and floats.
    variables: published.
    prepare: pixels to floats.
    size: side of the images.
    ranges: batches of floats to calibrate on.
    tests: batches of (pixels, labels).
    where: the data, for the ledger.
    goals: top-1 of the float file in percent, and points that integers may lose.
    peer: what else runs on the pixels, by name: a graph.
  """

  apply: Callable
  variables: Any
  prepare: Callable
  size: int
  ranges: Sequence[np.ndarray]
  tests: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
  where: str
  goals: tuple[float, float]
  peer: dict[str, Any]


class Scores(NamedTuple):
  """What a file says of the test images.

  Attributes:
    right: bool [images].
    guesses: int [images].
    logits: float32 [images, classes].
    seconds: of all of them.
  """

  right: np.ndarray
  guesses: np.ndarray
  logits: np.ndarray
  seconds: float


def cifar(name: str, weights: pathlib.Path) -> Subject:
  """A ResNet for CIFAR-10."""
  model = models.create_model(f'cifar_{name}')
  variables = models.load_cifar_resnet_npz(weights / f'cifar10_{name}.npz', model)

  def prepare(pixels):
    shape = (1, 1, 1, 3)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (_MEAN, _STD))
    return (pixels.astype(jnp.float32) / jnp.float32(255) - mean) / std

  def batches(split: str, count: int | None = None):
    source = fd.load_source('cifar10', split)
    for start in range(0, len(source) if count is None else count, 100):
      items = [source[i] for i in range(start, start + 100)]
      yield np.stack([x['image'] for x in items]), np.array([x['label'] for x in items])

  ranges = [np.asarray(prepare(jnp.asarray(x))) for x, _ in batches('train', _CALIBRATION)]
  goals = ({'resnet20': 91.73, 'resnet56': 93.39}[name], -0.3)
  tests = lambda: batches('test')
  return Subject(model.apply, variables, prepare, 32, ranges, tests, 'cifar10', goals, {})


def mobilenet(weights: pathlib.Path) -> Subject:
  """MobileNetV2, and the integers its authors made of it."""
  model = models.create_model('mobilenet_v2', convention='tf')
  variables = models.load_mobilenet_v2_npz(weights / 'mobilenet_v2_1.0_224.npz', model)
  prepare = lambda pixels: pixels.astype(jnp.float32) / jnp.float32(127.5) - jnp.float32(1)
  return Subject(
    model.apply,
    variables,
    prepare,
    224,
    [activations.scaled(pixels) for pixels, _ in activations.photographs('coco_mini', 'all')],
    lambda: activations.photographs('imagenet_samples', 'test'),
    'imagenet_samples',
    (90.0, -0.8),
    {'published_int8': activations.published_mobilenet(weights)},
  )


def subject_of(name: str, weights: pathlib.Path) -> Subject:
  """One of `NETWORKS`."""
  return mobilenet(weights) if name == 'mobilenet_v2' else cifar(name, weights)


def score(run: Callable[[np.ndarray], np.ndarray], tests) -> Scores:
  """Runs a network over the test images."""
  logits, labels, seconds = [], [], 0.0
  for pixels, label in tests:
    start = time.perf_counter()
    logits.append(run(pixels))
    seconds += time.perf_counter() - start
    labels.append(label)
    print(f'\r{sum(map(len, labels))} images', end='', file=sys.stderr, flush=True)
  print('\r' + 20 * ' ' + '\r', end='', file=sys.stderr)
  logits, labels = np.concatenate(logits), np.concatenate(labels)
  guesses = logits.argmax(1)
  return Scores(guesses == labels, guesses, logits, seconds)


def files_of(subject: Subject, folder: pathlib.Path, onnx: bool) -> dict[str, pathlib.Path]:
  """The network as files: 'float32' on pixels, 'int8' on floats; with `onnx` as 'float32_onnx' too."""
  side = subject.size
  pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  exported = {
    'float32': fqjax.export(subject.apply, subject.variables, pixels, preprocess=subject.prepare),
    'int8': fqjax.export(
      subject.apply,
      subject.variables,
      jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
      precision='int8',
      ranges=subject.ranges,
    ),
  }
  paths = {name: artifact.save(folder / f'{name}.fqx') for name, artifact in exported.items()}
  if onnx:
    for name, artifact in exported.items():
      paths[name + _ONNX] = folder / f'{name}.onnx'
      artifact.to_onnx(paths[name + _ONNX])
  return paths


def by_onnxruntime(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Runs an ONNX file of one input and one output."""
  import onnxruntime

  session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  name = session.get_inputs()[0].name
  return lambda x: session.run(None, {name: x})[0]


def beside(kind: str) -> str:
  """What a kind is compared with: ONNX with our file of it, all else with the float file."""
  return kind.removesuffix(_ONNX) if kind.endswith(_ONNX) else 'float32'


def experiment(name: str, workdir: pathlib.Path, onnx: bool = False) -> list[ledger.Row]:
  """Exports a network, scores its files, and returns rows for the ledger."""
  weights = pathlib.Path(os.environ.get('FQJAX_DATA_DIR', '')) / 'weights'
  if not weights.is_dir():
    raise FileNotFoundError(f'{weights} is no folder: set FQJAX_DATA_DIR to that of data/weights.')
  subject = subject_of(name, weights)
  folder = workdir / name
  folder.mkdir(parents=True, exist_ok=True)
  paths = files_of(subject, folder, onnx)
  runs: dict[str, Callable] = {}
  for kind, path in paths.items():
    run = by_onnxruntime(path) if kind.endswith(_ONNX) else runtime.load(path)
    if kind.startswith('int8'):
      run = lambda pixels, run=run: run(np.asarray(subject.prepare(jnp.asarray(pixels))))
    runs[kind] = run
  runs |= {
    kind: lambda pixels, graph=graph: reference.run(graph, [pixels])[0]
    for kind, graph in subject.peer.items()
  }
  found = {kind: score(run, subject.tests()) for kind, run in runs.items()}
  rows = []
  for kind, scores in found.items():
    own = rows_of(f'exported/{subject.where}/{name}/{kind}', kind, found, subject)
    size = paths[kind].stat().st_size if kind in paths else None
    rows += [dataclasses.replace(row, bytes=size) for row in own]
    if size:
      common = {'run': own[0].run, 'bytes': size, 'data': own[0].data}
      rows.append(ledger.Row(metric='file_bytes', value=float(size), **common))
    print(
      f'{name} {kind}: {int(scores.right.sum())} of {len(scores.right)} right, '
      f'{int((scores.guesses == found[beside(kind)].guesses).sum())} as {beside(kind)}, '
      f'{1e3 * scores.seconds / len(scores.right):.1f} ms an image'
      + (f', {size:,} bytes' if size else ''),
      flush=True,
    )
  return rows


def rows_of(run: str, kind: str, found: dict[str, Scores], subject: Subject) -> list[ledger.Row]:
  """Accuracy, and how it differs from that of the file `beside` it."""
  scores, base = found[kind], found[beside(kind)]
  count = len(scores.right)
  common: dict[str, Any] = {
    'run': run, 'samples': count, 'seeds': 1, 'data': f'{subject.where} test',
    'milliseconds': 1e3 * scores.seconds / count,
  }  # fmt: skip
  spread = ledger.standard_error(100.0 * scores.right)
  goal = subject.goals[0] if kind == 'float32' else None
  rows = [
    ledger.Row(
      metric='top1', value=float(100 * scores.right.mean()), spread=spread, goal=goal, **common
    )
  ]
  if kind == 'float32':
    return rows
  foreign = kind.endswith(_ONNX)
  common['reference'] = f'the {beside(kind)} file' + ' by NumPy' * foreign
  error = ledger.paired_standard_error(100.0 * scores.right, 100.0 * base.right)
  same = 100.0 * (scores.guesses == base.guesses)
  ours = kind == 'int8'
  agreement = 95.0 if ours else 99.0 if foreign else None
  return [
    *rows,
    ledger.Row(
      metric='change', value=float(100 * (scores.right.mean() - base.right.mean())), spread=error,
      goal=subject.goals[1] if ours else None, **common,
    ),
    ledger.Row(
      metric='agreement', value=float(same.mean()), spread=ledger.standard_error(same),
      goal=agreement, **common,
    ),
    ledger.Row(metric='logit_error', value=float(np.abs(scores.logits - base.logits).mean()), **common),
  ]  # fmt: skip


def parse_command(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Parses what follows `python -m experiments.exported`; raises where it would not run."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.exported',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--networks', default=','.join(NETWORKS), help='separated by commas')
  parser.add_argument('--onnx', action='store_true', help='as ONNX too, run by onnxruntime')
  parser.add_argument('--record', action='store_true', help='append to results.csv')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  args = parser.parse_args(argv)
  args.networks = args.networks.split(',')
  if wrong := sorted(set(args.networks) - set(NETWORKS)):
    parser.error(f'unknown networks {", ".join(wrong)}; choose of {", ".join(NETWORKS)}')
  return args


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  args = parse_command(argv)
  for name in args.networks:
    rows = experiment(name, args.workdir, args.onnx)
    if args.record:
      numbers = [[row.run, row.metric, float(row.value)] for row in rows]
      record_once(args.workdir / name / 'recorded.json', numbers, rows)


if __name__ == '__main__':
  main()
