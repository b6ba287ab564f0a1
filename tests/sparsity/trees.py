"""One small network in four kinds of parameter tree, and what a test has to know of each."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
from flax import linen as nn
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from fqjax.tracing import leaf_name

IMAGES = (2, 6, 6, 3)


class Net(NamedTuple):
  """A network: 3x3 convolution of 3 to 8 channels, norm where the kind has one, dense 8 to 5."""

  params: Any
  apply: Any  # (params, images NHWC) -> [N, 5]
  layout: dict | None  # what make_plan needs
  conv: str
  dense: str
  weights: str  # regex of both


class _Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), name='conv')(x)
    x = nn.LayerNorm(name='norm')(nn.relu(x))
    return nn.Dense(5, name='fc')(x.mean((1, 2)))


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
    self.fc = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    return self.fc(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class _Equinox(eqx.Module):
  conv: eqx.nn.Conv2d
  fc: eqx.nn.Linear
  activation: Any

  def __init__(self, key):
    self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=key)
    self.fc = eqx.nn.Linear(8, 5, key=key)
    self.activation = jax.nn.relu

  def __call__(self, x):
    return self.fc(self.activation(self.conv(x)).mean((1, 2)))


def _haiku(x):
  x = jax.nn.relu(hk.Conv2D(8, 3, name='conv')(x))
  return hk.Linear(5, name='fc')(x.mean((1, 2)))


def _filled(shapes):
  """Numbers for a tree of shapes. Compiling an initialiser takes longer than most tests."""
  rng = np.random.default_rng(0)

  def one(path, leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    name = leaf_name(path).rpartition('/')[2]
    if name in ('kernel', 'weight', 'w'):
      return jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype)
    return jnp.asarray(np.full(leaf.shape, name in ('scale', 'var')), leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def net(kind: str) -> Net:
  key, x = jax.random.key(0), jnp.ones(IMAGES)
  if kind == 'linen':
    model = _Linen()
    apply = lambda p, x: model.apply({'params': p}, x)
    params = _filled(jax.eval_shape(model.init, key, x)['params'])
    return Net(params, apply, None, 'conv/kernel', 'fc/kernel', '.*/kernel')
  if kind == 'nnx':
    graph, state = nnx.split(nnx.eval_shape(lambda: _Nnx(nnx.Rngs(0))))
    apply = lambda s, x: nnx.merge(graph, s)(x)
    return Net(_filled(state), apply, None, 'conv/kernel', 'fc/kernel', '.*/kernel')
  if kind == 'equinox':
    layout = {4: 'OIHW', 2: 'OI'}
    apply = lambda m, x: jax.vmap(m)(x.transpose(0, 3, 1, 2))
    params = _filled(eqx.filter_eval_shape(_Equinox, key))
    return Net(params, apply, layout, 'conv/weight', 'fc/weight', '.*/weight')
  model = hk.without_apply_rng(hk.transform(_haiku))
  params = _filled(jax.eval_shape(model.init, key, x))
  return Net(params, model.apply, None, 'conv/w', 'fc/w', '.*/w')


KINDS = ('linen', 'nnx', 'equinox', 'haiku')
