"""A convolutional task so small that its phases take a second: edges in noise, three convolutions."""

import itertools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import tasks
from fqjax import sparsity
from tests.experiments import tiny_task

SHAPES = {'conv1': (3, 3, 3, 8), 'conv2': (3, 3, 8, 16), 'conv3': (3, 3, 16, 16)}


def draw(seed: int, n: int):
  """Images brighter on one side than on the other; the class is which."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 2, n)
  ramp = np.linspace(-1, 1, 8)[None, None, :, None] * (2 * label - 1)[:, None, None, None]
  return {
    'x': (ramp + rng.normal(size=(n, 8, 8, 3))).astype(np.float32),
    'label': label.astype(np.int32),
  }


def logits(params, x):
  for name in SHAPES:
    x = lax.conv_general_dilated(
      x, params[name]['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    x = jnp.maximum(x, 0)
  return x.reshape(len(x), 8, 2, 4, 16).mean((1, 3)).reshape(len(x), -1) @ params['fc']['kernel']


def init(key):
  keys = jax.random.split(key, 4)
  params = {
    name: {'kernel': jax.random.normal(k, shape) / np.sqrt(np.prod(shape[:3])).astype(np.float32)}
    for k, (name, shape) in zip(keys, SHAPES.items(), strict=False)
  }
  return tasks.Variables({**params, 'fc': {'kernel': jax.random.normal(keys[3], (32, 2)) / 4}}, {})


class Loader(tiny_task.Loader):
  """Endless batches with a position."""

  def __init__(self, seed, size=16):
    self.data, self.size, self.step = draw(seed % 1000, 256), size, 0


def loss_fn(params, model_state, batch, key):
  entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits(params, batch['x']), batch['label']
  )
  return jnp.mean(entropy), (model_state, {})


def score(variables):
  part = draw(5001, 200)
  right = np.argmax(np.asarray(logits(variables.params, part['x'])), -1) == part['label']
  return {'test': right.astype(np.float64)}


def task() -> tasks.Task:
  """A `tasks.Task` of all the above."""
  abstract = jax.eval_shape(init, jax.random.key(0)).params
  return tasks.Task(
    init=init,
    loss_fn=loss_fn,
    loader=Loader,
    steps_per_epoch=10,
    score=score,
    calibration=lambda: itertools.islice(Loader(0), 2),
    advance=None,
    layers=sparsity.trace_layers(logits, abstract, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)),
  )
