"""A task so small that its phases take a second: points in eight dimensions, one hidden layer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import tasks
from fqjax import sparsity


def draw(seed: int, n: int):
  """Points whose class is the sign of the first two coordinates' sum."""
  x = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
  return {'x': x, 'label': (x[:, 0] + x[:, 1] > 0).astype(np.int32)}


def logits(params, x):
  hidden = jnp.maximum(x @ params['fc1']['kernel'] + params['fc1']['bias'][None], 0)
  return hidden @ params['fc2']['kernel']


def init(key):
  a, b = jax.random.split(key)
  fc1 = {'kernel': jax.random.normal(a, (8, 16)) / 3, 'bias': jnp.zeros(16)}
  return tasks.Variables({'fc1': fc1, 'fc2': {'kernel': jax.random.normal(b, (16, 2)) / 4}}, {})


class Loader:
  """Endless batches with a position."""

  def __init__(self, seed, size=16):
    self.data, self.size, self.step = draw(seed % 1000, 256), size, 0

  def __iter__(self):
    return self

  def __next__(self):
    at = (self.step * self.size + np.arange(self.size)) % 256
    self.step += 1
    return {k: v[at] for k, v in self.data.items()}

  def get_state(self):
    return {'step': self.step}

  def set_state(self, state):
    self.step = state['step']


def loss_fn(params, model_state, batch, key):
  entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits(params, batch['x']), batch['label']
  )
  return jnp.mean(entropy), (model_state, {})


def score(variables):
  parts = {'test': draw(5001, 200), 'held_out': draw(5002, 100)}
  return {
    k: (np.argmax(np.asarray(logits(variables.params, p['x'])), -1) == p['label']).astype(
      np.float64
    )
    for k, p in parts.items()
  }


def task() -> tasks.Task:
  """A `tasks.Task` of all the above."""
  abstract = jax.eval_shape(init, jax.random.key(0)).params
  return tasks.Task(
    init=init,
    loss_fn=loss_fn,
    loader=Loader,
    steps_per_epoch=16,
    score=score,
    calibration=lambda: itertools.islice(Loader(0), 2),
    advance=None,
    layers=sparsity.trace_layers(logits, abstract, jax.ShapeDtypeStruct((1, 8), jnp.float32)),
  )
