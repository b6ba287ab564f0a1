"""Small networks of everything integer arithmetic knows, frozen, with data."""

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fqjax.exporter.passes import freeze
from fqjax.runtime.graph import Graph
from fqjax.tracing import to_graph


class Residual(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), 2)(x)))
    y = nn.relu(nn.Conv(8, (3, 3))(x))
    x = nn.relu(x + nn.Conv(8, (3, 3))(y))
    x = x - nn.Conv(8, (1, 1))(x)
    return nn.Dense(5)(x.mean((1, 2)))


class Mobile(nn.Module):
  @nn.compact
  def __call__(self, x):
    relu6 = lambda x: jnp.minimum(nn.relu(x), 6)
    x = relu6(3 * nn.Conv(12, (1, 1))(x))
    x = relu6(nn.Conv(12, (3, 3), 2, feature_group_count=12)(x))
    x = nn.Conv(6, (1, 1), use_bias=False)(x)
    y = nn.Conv(6, (3, 3), kernel_dilation=2, feature_group_count=3)(x)
    return nn.Dense(4)((x + y).reshape(x.shape[0], -1))


def _average(x):
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')


class Joined(nn.Module):
  @nn.compact
  def __call__(self, x):
    a = nn.relu(nn.Conv(5, (3, 3))(x))
    b = nn.swish(nn.Conv(4, (1, 1))(x))
    x = jnp.concatenate([a, b], -1)
    a = nn.max_pool(x, (2, 2), (2, 2))
    b = _average(x) / _average(jnp.ones((1, *x.shape[1:3], 1)))  # fewer at the border
    x = jnp.concatenate([a, b[:, ::-1]], -1)
    x = jnp.pad(x, [(0, 0), (1, 0), (0, 1), (0, 0)])
    return nn.hard_swish(nn.ConvTranspose(3, (3, 3), (2, 2))(x))


class Softmax(nn.Module):
  """A softmax and a norm over features, which stay in float, between layers that do not."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3), 2)(x))
    x = nn.LayerNorm()(x)
    x = nn.Conv(6, (1, 1))(x)
    return nn.softmax(nn.Dense(5)(x.mean((1, 2))))


NETWORKS = {'residual': Residual, 'mobile': Mobile, 'joined': Joined, 'softmax': Softmax}


class Case(NamedTuple):
  graph: Graph
  x: np.ndarray


def build(name: str, seed: int = 0) -> Case:
  module, rng = NETWORKS[name](), np.random.default_rng(seed)
  x = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)

  def draw(path, leaf):
    key = jax.tree_util.keystr(path)
    if 'kernel' in key:
      fan = np.prod(leaf.shape[:-1])
      return (rng.normal(size=leaf.shape) * np.sqrt(2 / fan)).astype(np.float32)
    if 'var' in key or 'scale' in key:
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  return Case(freeze(to_graph(module.apply, variables, x), variables), x)
