"""A network of 200 numbers, its data and its loader: small enough to start a process for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fqjax.data import Corrupt
from fqjax.train import create_state, make_train_step

CLASSES, FEATURES, HIDDEN = 4, 6, 16


@jax.jit
def make_params(seed=0):
  k1, k2 = jax.random.split(jax.random.key(seed))
  return {
    'dense1': {'kernel': jax.random.normal(k1, (FEATURES, HIDDEN)) / 2, 'bias': jnp.zeros(HIDDEN)},
    'dense2': {'kernel': jax.random.normal(k2, (HIDDEN, CLASSES)) / 4, 'bias': jnp.zeros(CLASSES)},
  }


def apply(params, x):
  h = jnp.maximum(x @ params['dense1']['kernel'] + params['dense1']['bias'][None], 0)
  return h @ params['dense2']['kernel'] + params['dense2']['bias'][None]


def loss_fn(params, model_state, batch, key):
  """Cross entropy with dropout-like noise (uses the key) and a running mean (uses the state)."""
  x = batch['x'] + 0.01 * jax.random.normal(key, batch['x'].shape)
  return plain_loss(params, model_state, batch | {'x': x}, key)


def plain_loss(params, model_state, batch, key):
  del key
  logits = apply(params, batch['x'])
  loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']))
  mean = 0.9 * model_state['mean'] + 0.1 * jnp.mean(batch['x'], axis=0)
  top1 = jnp.mean((jnp.argmax(logits, axis=-1) == batch['label']).astype(jnp.float32))
  return loss, ({'mean': mean, 'steps': model_state['steps'] + 1}, {'top1': top1})


def model_state():
  return {'mean': jnp.zeros(FEATURES), 'steps': jnp.zeros((), jnp.int32)}


@functools.cache
def optimizer():
  return optax.chain(
    optax.clip_by_global_norm(1.0), promoting(optax.adamw(optax.cosine_decay_schedule(0.01, 500)))
  )


def promoting(tx):
  """Lets optax's Adam promote dtypes, as it does, while everything around it may not."""

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


# One compiled program for all tests that ask for the same step.
cached_train_step = functools.cache(make_train_step)


def setup(mesh=None, *, loss=loss_fn, tx=None, ema=True, seed=0, params=None, **options):
  """A fresh state and its step."""
  tx = tx or optimizer()
  params = make_params(seed) if params is None else params
  state = create_state(params, model_state(), tx, jax.random.key(7), ema=ema)
  step = cached_train_step(loss, tx, mesh=mesh, ema_decay=0.9 if ema else None, **options)
  return state, step


def make_batch(i, size=16, seed=0):
  """Batch `i` of the endless sequence: a pure function of its number."""
  rng = np.random.default_rng([seed, i])
  x = rng.normal(size=(size, FEATURES)).astype(np.float32)
  label = np.argmax(x[:, :CLASSES] + 0.1 * rng.normal(size=(size, CLASSES)), axis=-1)
  return {'x': x, 'label': label.astype(np.int32)}


class Loader:
  """Endless; `iter` gives a position that can be saved.

  With `damaged`, one sample of every so many batches is said to be undecodable, on each process;
  there are two such files.
  """

  def __init__(self, size=16, process=0, processes=1, bad_step=None, damaged=0):
    self.size, self.process, self.processes = size, process, processes
    self.bad_step, self.damaged = bad_step, damaged

  def __iter__(self):
    return LoaderIterator(self)


class LoaderIterator:
  def __init__(self, loader):
    self.loader, self.next = loader, 0
    if loader.damaged:
      self.corrupt = Corrupt()

  def __next__(self):
    if self.loader.damaged and self.next % self.loader.damaged == 0:
      self.corrupt.count += 1
      name = f'{self.loader.process}/{self.next % (2 * self.loader.damaged)}.jpg'
      self.corrupt.files[name] = 'truncated'
    batch = make_batch(self.next, self.loader.size)
    self.next += 1
    if self.next == self.loader.bad_step:
      batch['x'][0, 0] = np.nan
    part = self.loader.size // self.loader.processes
    rows = slice(self.loader.process * part, (self.loader.process + 1) * part)
    return jax.tree.map(lambda x: x[rows], batch)

  def get_state(self):
    return {'next': self.next}

  def set_state(self, state):
    self.next = state['next']


def leaves(tree):
  """Path -> NumPy array, typed keys as their integers."""
  result = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    result[jax.tree_util.keystr(path, simple=True, separator='/')] = np.asarray(x)
  return result


def assert_identical(a, b):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)
