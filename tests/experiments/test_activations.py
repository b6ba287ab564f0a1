"""MobileNetV2 in integers on photographs, against what was published and the float network."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import activations
from fqjax.models import create_model, load_mobilenet_v2_npz

pytestmark = pytest.mark.data


@pytest.fixture(scope='module')
def weights(data_dir):
  return data_dir / 'weights'


def first_photographs(count):
  pixels, labels = next(activations.photographs('imagenet_samples', 'test', count))
  return pixels, labels


def test_the_published_network_is_read_whole(weights):
  graph = activations.published_mobilenet(weights)
  ops = [node.op for node in graph.nodes]
  # 36 convolutions and 17 depthwise ones, ten sums, one mean, as its listing says.
  assert (ops.count('qconv'), ops.count('qadd'), ops.count('qsum')) == (53, 10, 1)
  pixels, labels = first_photographs(4)
  [logits] = activations.reference.run(graph, [pixels])
  assert logits.shape == (4, 1000) and (logits.argmax(-1) == labels).sum() >= 3


def test_the_frozen_network_is_the_float_network(weights):
  graph = activations.frozen_mobilenet(weights)
  pixels, _ = first_photographs(2)
  model = create_model('mobilenet_v2', convention='tf')
  variables = load_mobilenet_v2_npz(weights / 'mobilenet_v2_1.0_224.npz', model)
  want = model.apply(variables, jnp.asarray(activations.scaled(pixels)))
  [got] = activations.reference.run(graph, [activations.scaled(pixels)])
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.full
def test_integers_on_all_photographs(weights):
  frozen = activations.frozen_mobilenet(weights)
  graphs = {
    'ours': activations.quantized_mobilenet(frozen),
    'published': activations.published_mobilenet(weights),
  }
  found = activations.compare(frozen, graphs)
  ours, published = found['ours'], found['published']
  assert ours.count == 250
  assert ours.right >= ours.float_right - 2 and ours.agree >= 0.95 * 250, ours
  # 0.900 is published for it, with its weights in float arithmetic.
  assert abs(published.right - 225) <= 3, published
  assert published.agree >= 0.9 * 250, published
