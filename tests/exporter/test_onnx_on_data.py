"""Trained networks in integers: another engine's ONNX top-1 on images that gave no ranges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import activations
from fqjax import quantize
from fqjax.exporter.onnx import _scales, to_onnx
from fqjax.exporter.passes import freeze
from fqjax.models import create_model, load_cifar_resnet_npz
from fqjax.runtime import reference
from fqjax.tracing import to_graph
from tests.exporter.test_onnx import run, single, start

pytestmark = pytest.mark.data

# Of all images; two classes that are nearly equal may change places.
SAME = 0.99


def images(data_dir, part, count):
  """The first CIFAR-10 images of a part, normalised as for the published weights, and labels."""
  with np.load(data_dir / 'cifar10' / f'cifar10_{part}.npz') as file:
    residual, label = file['residual'][:, :count], file['label'][:count]
  planes = np.cumsum(np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
  image = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], axis=-1)
  mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
  return (image / np.float32(255) - mean) / std, label


@pytest.mark.parametrize(
  ('depth', 'count'),
  [(20, 100), pytest.param(20, 2000, marks=pytest.mark.full),
   pytest.param(56, 500, marks=pytest.mark.full)],
)  # fmt: skip
def test_cifar_resnet(depth, count, data_dir):
  model = create_model(f'cifar_resnet{depth}')
  path = data_dir / 'weights' / f'cifar10_resnet{depth}.npz'
  variables = load_cifar_resnet_npz(path, model)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  graph = freeze(to_graph(model.apply, variables, x), variables)
  calibration, _ = images(data_dir, 'train', 40)
  integers = quantize.integer_graph(graph, quantize.calibrate(graph, [calibration]))
  session = start(to_onnx(integers))
  test, label = images(data_dir, 'test', count)
  same = right = 0
  for i in range(0, count, 100):
    part = test[i : i + 100]
    [got], [want] = run(session, integers, [part]), reference.run(integers, [part])
    same += np.count_nonzero(got.argmax(-1) == want.argmax(-1))
    right += np.count_nonzero(got.argmax(-1) == label[i : i + 100])
  print(f'ResNet-{depth}: top-1 differs on {count - same} of {count} images')
  assert same >= SAME * count and right >= 0.85 * count


@pytest.mark.full
def test_published_mobilenet_on_all_photographs(data_dir):
  graph = activations.published_mobilenet(data_dir / 'weights')
  session, same, count = start(to_onnx(graph)), 0, 0
  for pixels, _ in activations.photographs('imagenet_samples', 'test'):
    [got], [want] = run(session, graph, [pixels]), reference.run(graph, [pixels])
    same += np.count_nonzero(got.argmax(-1) == want.argmax(-1))
    count += len(pixels)
  print(f'MobileNetV2: top-1 differs on {count - same} of {count} photographs')
  assert count == 250 and same >= SAME * count


@pytest.mark.full
def test_published_mobilenet_layer_by_layer(data_dir, monkeypatch):
  graph = activations.published_mobilenet(data_dir / 'weights')
  [pixels, _], *_ = activations.photographs('imagenet_samples', 'test', 2)
  made = tuple(node.outputs[0] for node in graph.nodes)
  exact = reference.run(dataclasses.replace(graph, outputs=made), [pixels])
  values = dict(zip(made, exact, strict=True)) | {graph.inputs[0]: pixels}
  scales = _scales.find_scales(graph)
  monkeypatch.setattr(_scales, 'find_scales', lambda _: scales)
  different = count = 0
  for node in graph.nodes[:-2]:
    part = single(graph, node)
    [got] = run(start(to_onnx(part)), part, [values[name] for name in part.inputs])
    gap = np.abs(got.astype(int) - values[node.outputs[0]])
    assert gap.max() <= 1, node
    different, count = different + np.count_nonzero(gap), count + gap.size
  print(f'MobileNetV2: {different} of {count} values differ by one step')
