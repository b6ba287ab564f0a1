import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from fqjax.nn import BatchNorm


def oracle(x, groups, scale, bias, epsilon):
  """Two passes in float64, group by group; returns y and the averages of mean and variance."""
  outputs, means, variances = [], [], []
  for part in np.split(np.asarray(x, np.float64), groups):
    axes = tuple(range(part.ndim - 1))
    mean, var = part.mean(axes), part.var(axes)
    outputs.append((part - mean) / np.sqrt(var + epsilon) * scale + bias)
    means.append(mean)
    variances.append(var)
  return np.concatenate(outputs), np.mean(means, 0), np.mean(variances, 0)


@functools.partial(jax.jit, static_argnums=0)
def apply(norm, variables, x):
  return norm.apply(variables, x, train=True, mutable=['batch_stats'])


@pytest.mark.parametrize(
  ('shape', 'groups'),
  [
    ((8, 5, 3, 4), 1),
    ((8, 5, 3, 4), 2),
    ((8, 5, 3, 4), 8),
    ((8, 4), 1),
    ((8, 4), 2),
    ((8, 3, 4), 4),
  ],
)
def test_statistics_against_numpy(shape, groups, x64):
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape) * [0.1, 1, 3, 10] + [5, -1, 0, 30]
  scale, bias = rng.normal(size=(2, 4)).astype(np.float32)
  old_mean, old_var = rng.normal(size=4).astype(np.float32), np.full(4, 2.0, np.float32)
  variables = {
    'params': {'scale': scale, 'bias': bias},
    'batch_stats': {'mean': jnp.asarray(old_mean), 'var': jnp.asarray(old_var)},
  }
  norm = BatchNorm(momentum=0.8, epsilon=1e-3, groups=groups)
  y, state = apply(norm, variables, x)
  want, mean, var = oracle(x, groups, scale, bias, 1e-3)
  np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-9)
  new = state['batch_stats']
  # The running statistics are float32 whatever the input.
  np.testing.assert_allclose(new['mean'], 0.8 * old_mean + 0.2 * mean, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(new['var'], 0.8 * old_var + 0.2 * var, rtol=1e-6)

  y = norm.apply(variables, x)
  want = (x - old_mean) / np.sqrt(old_var + 1e-3) * scale + bias
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


def test_large_mean_beside_small_deviation_once_the_running_mean_is_near():
  x = (1000 + 0.1 * np.random.default_rng(0).normal(size=(64, 8, 8, 1))).astype(np.float32)
  norm = BatchNorm()
  variables = norm.init(jax.random.key(0), x)
  variables['batch_stats']['mean'] = jnp.full(1, 999.0)
  y, _ = apply(norm, variables, x)
  # E[x^2] - E[x]^2 in float32 misses this variance of 0.01 by several times its size.
  want, _, _ = oracle(x, 1, 1, 0, 1e-5)
  np.testing.assert_allclose(y, want, atol=2e-3)


@pytest.mark.parametrize('groups', [1, 2])
def test_gradient_against_the_two_pass_formula(groups, x64):
  rng = np.random.default_rng(1)
  x, weight = rng.normal(size=(2, 6, 2, 2, 3))
  scale, bias = rng.normal(size=(2, 3))
  stats = {'mean': jnp.full(3, 0.3, jnp.float32), 'var': jnp.ones(3, jnp.float32)}
  norm = BatchNorm(groups=groups)

  def ours(x, scale, bias):
    variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
    return jnp.sum(weight * norm.apply(variables, x, train=True, mutable=['batch_stats'])[0])

  def plain(x, scale, bias):
    parts = []
    for part in jnp.split(x, groups):
      mean = part.mean((0, 1, 2), keepdims=True)
      var = ((part - mean) ** 2).mean((0, 1, 2), keepdims=True)
      parts.append((part - mean) / jnp.sqrt(var + 1e-5))
    y = jnp.concatenate(parts) * scale.reshape(1, 1, 1, 3) + bias.reshape(1, 1, 1, 3)
    return jnp.sum(weight * y)

  args = jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias)
  for got, want in zip(
    jax.jit(jax.grad(ours, (0, 1, 2)))(*args), jax.jit(jax.grad(plain, (0, 1, 2)))(*args)
  ):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_bfloat16_in_float32_inside():
  x = np.random.default_rng(0).normal(3, 1, (16, 4, 4, 2)).astype(jnp.bfloat16)
  norm = BatchNorm()
  variables = norm.init(jax.random.key(0), x)
  chex.assert_type(jax.tree.leaves(variables), jnp.float32)
  y, state = apply(norm, variables, x)
  assert y.dtype == jnp.bfloat16
  chex.assert_type(jax.tree.leaves(state), jnp.float32)
  want, mean, _ = oracle(x, 1, 1, 0, 1e-5)
  # Only the result is rounded to 8 bits; so is none of the statistics.
  np.testing.assert_allclose(y.astype(np.float32), want, rtol=2**-8, atol=1e-5)
  np.testing.assert_allclose(state['batch_stats']['mean'], 0.1 * mean, rtol=1e-5)


def test_init_in_training_keeps_the_statistics():
  norm = BatchNorm(groups=4, scale_init=jax.nn.initializers.zeros)
  variables = norm.init(jax.random.key(0), jnp.ones((1, 2, 2, 3)), train=True)
  assert not variables['batch_stats']['mean'].any()
  assert (variables['batch_stats']['var'] == 1).all()
  assert not variables['params']['scale'].any()


def test_sharded_batch_is_one_batch_and_groups_need_no_communication():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x = np.random.default_rng(0).normal(2, 3, (32, 4, 4, 2)).astype(np.float32)
  sharded = jax.device_put(x, NamedSharding(mesh, P('data')))
  for groups in (1, 8):
    norm = BatchNorm(groups=groups)
    variables = norm.init(jax.random.key(0), x[:1])

    @jax.jit
    def forward(x):
      return norm.apply(variables, x, train=True, mutable=['batch_stats'])[0]

    compiled = forward.lower(sharded).compile()
    y = compiled(sharded)
    np.testing.assert_allclose(y, oracle(x, groups, 1, 0, 1e-5)[0], atol=1e-5)
    assert ('all-reduce' in compiled.as_text()) == (groups == 1)
    assert 'all-gather' not in compiled.as_text()


def test_batch_that_does_not_divide():
  norm = BatchNorm(groups=3)
  variables = norm.init(jax.random.key(0), jnp.ones((1, 2)))
  with pytest.raises(ValueError, match=r'divides into 3 equal parts, got x: \[8, 2\]'):
    norm.apply(variables, jnp.ones((8, 2)), train=True, mutable=['batch_stats'])
