"""Statistics after a cut: the plain average over batches, whatever the momentum."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import rules


class Net(nn.Module):
  momentum: float

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(not train, momentum=self.momentum, name='first')(x)
    x = nn.Dense(3, name='dense')(x)
    return nn.BatchNorm(not train, momentum=0.5, name='second')(x)


@pytest.mark.promotes('Flax')
@pytest.mark.parametrize('momentum', [0.0, 0.9, 0.99])
def test_average_of_batch_statistics(momentum):
  rng = np.random.default_rng(0)
  batches = rng.normal(3.0, 2.0, size=(6, 32, 4)).astype(np.float32)
  net = Net(momentum)
  variables = net.init(jax.random.key(0), batches[0], True)
  params = variables['params']
  state = {
    'batch_stats': jax.tree.map(lambda x: x + 7, variables['batch_stats']),
    'steps': jnp.int32(3),
  }

  def apply(params, state, x):
    variables = {'params': params, 'batch_stats': state['batch_stats']}
    _, new = net.apply(variables, x, True, mutable=['batch_stats'])
    return {**new, 'steps': state['steps'] + 1}

  found = rules.recalibrate(apply, params, state, batches)
  stats = found['batch_stats']
  wide = batches.astype(np.float64)
  np.testing.assert_allclose(stats['first']['mean'], wide.mean((0, 1)), rtol=1e-4)
  np.testing.assert_allclose(stats['first']['var'], wide.var(1).mean(0), rtol=1e-4)

  # The second layer sees what the first makes of each batch.
  scaled = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
  inner = scaled @ np.asarray(params['dense']['kernel'], np.float64)
  np.testing.assert_allclose(stats['second']['mean'], inner.mean((0, 1)), atol=1e-5)
  np.testing.assert_allclose(stats['second']['var'], inner.var(1).mean(0), rtol=1e-4)
  assert int(found['steps']) == 9 and found['steps'].dtype == jnp.int32
  assert jax.tree.structure(found) == jax.tree.structure(state)


def test_what_is_no_running_average_goes_from_batch_to_batch():
  def apply(params, state, x):
    return {
      'max': jnp.maximum(state['max'], jnp.max(x)),
      'key': jax.random.split(state['key'], 1)[0],
    }

  batches = [jnp.array([1.0, 5.0]), jnp.array([2.0, 3.0])]
  state = {'max': jnp.zeros(()), 'key': jax.random.PRNGKey(0)}
  assert rules.recalibrate(apply, {}, state, batches)['max'] == 5


def test_needs_a_batch():
  with pytest.raises(ValueError, match='no batch'):
    rules.recalibrate(lambda params, state, x: state, {}, {'mean': jnp.zeros(2)}, [])
