"""Statistics after a cut: the plain average over batches, whatever the momentum."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import Unstructured, make_plan


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


def _network(params, state, x, train):
  """Dense, batch norm, ReLU, dense; the logits and the new running statistics."""
  h = x @ params['a']['kernel']
  mean, var = (h.mean(0), h.var(0)) if train else (state['mean'], state['var'])
  moved = {'mean': 0.9 * state['mean'] + 0.1 * mean, 'var': 0.9 * state['var'] + 0.1 * var}
  h = (h - mean[None]) * jax.lax.rsqrt(var + 1e-5)[None] * params['norm']['scale'][None]
  return jnp.maximum(h + params['norm']['bias'][None], 0) @ params['b']['kernel'], moved


def _train(tx, params, state, x, y, epochs):
  """Epochs of batches of 100, one program; the parameters, statistics and optimizer state."""

  def loss(params, state, i):
    logits, state = _network(params, state, x[i], True)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[i])), state

  def step(carry, i):
    params, state, opt_state = carry
    grads, state = jax.grad(loss, has_aux=True)(params, state, i)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), state, opt_state), None

  order = np.concatenate([np.random.default_rng(e).permutation(len(x)) for e in range(epochs)])
  run = jax.jit(lambda *carry: jax.lax.scan(step, carry, order.reshape(-1, 100))[0])
  return run(params, state, tx.init(params))


def test_right_after_the_cut_the_network_is_as_good_as_in_its_last_epoch():
  """What ADMM is for; a network at chance here was never pulled to its projection."""
  data = pytest.importorskip('sklearn.datasets').load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))
  x, y = (data.data / 16).astype(np.float32)[order], data.target.astype(np.int32)[order]
  test, (x, y) = (x[1200:], y[1200:]), (jnp.asarray(x[:1200]), jnp.asarray(y[:1200]))
  rng = np.random.default_rng(1)
  params = {
    'a': {'kernel': jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32)},
    'norm': {'scale': jnp.ones(64), 'bias': jnp.zeros(64)},
    'b': {'kernel': jnp.asarray(rng.normal(size=(64, 10)) / 8, jnp.float32)},
  }
  state = {'mean': jnp.zeros(64), 'var': jnp.ones(64)}
  evaluate = jax.jit(
    lambda p, s: jnp.mean(jnp.argmax(_network(p, s, test[0], False)[0], -1) == test[1])
  )
  sgd = lambda rate: optax.sgd(rate, momentum=0.9)
  dense, dense_state, _ = _train(sgd(0.1), params, state, x, y, 20)
  plan = make_plan(dense, [('.*/kernel', Unstructured(keep=0.15))])
  apply = lambda p, s, x: _network(p, s, x, True)[1]

  def after_the_cut(params, state):
    pruned, _ = rules.finalize(plan, params)
    return evaluate(pruned, rules.recalibrate(apply, pruned, state, x.reshape(12, 100, 64)))

  pull = rules.admm(plan, (1e-2, 1e-1, 1.0), 60, stage_steps=180)
  tx = optax.chain(pull, sgd(0.03))
  params, state, opt_state = _train(tx, dense, dense_state, x, y, 45)
  last = evaluate(params, state)
  assert last > 0.93 and rules.diagnostics(opt_state)['admm_gap'] < 0.1
  assert abs(after_the_cut(params, state) - last) <= 0.02
  assert after_the_cut(dense, dense_state) < last - 0.05  # nothing pulled this one


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
