import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.nn import ChannelGate, gate_penalty, gumbel_gate, gumbel_noise
from fqjax.nn._gate import _gumbel_from_uniform


def images(n=4, c=6, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 5, 3, c)), jnp.float32)


def init(gate, x, train=False):
  return jax.jit(gate.init, static_argnums=2)(jax.random.key(0), x, train)


def test_the_papers_numbers():
  logits, noise = jnp.array([[0.1, 2.0]]), jnp.array([[0.5, -1.2]])
  on, vjp = jax.vjp(lambda z: gumbel_gate(z, noise), logits)
  assert on[0] == 1.0
  np.testing.assert_allclose(vjp(jnp.ones(1))[0], [[-0.24752, 0.24752]], atol=1e-5)
  # The soft sample is softmax(l + G) = (0.4502, 0.5498): p (1 - p) is the gradient above.
  np.testing.assert_allclose(0.4502 * 0.5498, 0.24752, atol=1e-4)
  noise = _gumbel_from_uniform(jnp.array([0.3, 0.9]))
  np.testing.assert_allclose(noise, [-0.1856, 2.2504], atol=1e-4)


def test_forward_is_exactly_zero_or_one_and_follows_noise():
  rng = np.random.default_rng(0)
  logits, noise = rng.normal(size=(2, 1000, 2)).astype(np.float32)
  on = np.asarray(gumbel_gate(logits, noise))
  np.testing.assert_array_equal(on, (logits + noise).argmax(-1))
  np.testing.assert_array_equal(gumbel_gate(logits), logits.argmax(-1))
  assert gumbel_gate(jnp.zeros((1, 2)))[0] == 0, 'open only where on > off'


def test_temperature_scales_the_soft_sample_only():
  logits = jnp.array([[0.0, 0.8]])
  on, vjp = jax.vjp(lambda z: gumbel_gate(z, temperature=0.5), logits)
  p = 1 / (1 + np.exp(-1.6))
  assert on[0] == 1
  np.testing.assert_allclose(vjp(jnp.ones(1))[0][0, 1], p * (1 - p) / 0.5, rtol=1e-5)


def test_noise_is_gumbel_and_finite():
  noise = np.asarray(gumbel_noise(jax.random.key(0), (100_000,)))
  # Mean and variance of the Gumbel distribution; the bounds are six standard errors.
  assert abs(noise.mean() - 0.57722) < 6 * np.sqrt(1.645 / 1e5)
  assert abs(noise.var() - np.pi**2 / 6) < 6 * np.sqrt(4.4 * 1.645**2 / 1e5)
  ends = _gumbel_from_uniform(jnp.array([0.0, 1 - 2**-24]))
  assert np.isfinite(ends).all()


@pytest.mark.parametrize('global_logits', [False, True])
def test_initial_probability_of_being_open(global_logits):
  gate, x = ChannelGate(global_logits=global_logits), images(400, 192)
  variables = init(gate, x)

  @jax.jit
  def apply(variables, key):
    return gate.apply(variables, x, True, mutable=['gates', 'batch_stats'], rngs={'gate': key})

  y, state = apply(variables, jax.random.key(1))
  on = np.asarray(state['gates']['on'])
  # 76,800 draws: a standard error of 0.0012 around sigmoid(1.9).
  assert abs(on.mean() - 0.870) < 0.01
  np.testing.assert_array_equal(y, x * on[:, None, None])
  assert len(np.unique(on, axis=0)) > 390, 'every image draws its own noise'


def test_variables_and_initialisation():
  variables = init(ChannelGate(), images(2, 192), True)
  assert set(variables) == {'params', 'batch_stats'}
  params = variables['params']
  assert set(params) == {'squeeze', 'bn', 'logit_scale', 'logit_bias'}
  np.testing.assert_allclose(params['squeeze']['kernel'].std(), np.sqrt(2 / 192), rtol=0.03)
  np.testing.assert_allclose(params['logit_scale'].std(), 0.001, rtol=0.15)
  assert (params['logit_bias'] == jnp.array([[0.1, 2.0]]).repeat(192, 0)).all()
  variables = init(ChannelGate(global_logits=True), images(2, 192))
  assert set(variables) == {'params'} and set(variables['params']) == {'logit_bias'}


def test_evaluation_against_numpy_and_deterministic():
  rng = np.random.default_rng(3)
  gate, x = ChannelGate(), images(8, 6)
  variables = init(gate, x)
  scale, bias = rng.normal(size=(2, 6, 2)).astype(np.float32)
  variables['params'] |= {'logit_scale': jnp.asarray(scale), 'logit_bias': jnp.asarray(bias)}
  y, state = gate.apply(variables, x, mutable=['gates'])
  squeeze = variables['params']['squeeze']
  hidden = np.asarray(x).mean((1, 2)) @ squeeze['kernel'] + squeeze['bias'][None]
  hidden = np.maximum(hidden / np.sqrt(1 + 1e-5), 0)
  off, on = (hidden * scale[:, i] + bias[:, i] for i in (0, 1))
  np.testing.assert_array_equal(state['gates']['on'], on > off)
  assert 0 < state['gates']['on'].mean() < 1
  np.testing.assert_array_equal(y, gate.apply(variables, x))
  np.testing.assert_array_equal(y, x * (on > off)[:, None, None].astype(np.float32))


def test_sampling_at_evaluation_is_an_option():
  gate, x = ChannelGate(sample_at_eval=True), images(64, 24)
  variables = init(gate, x)

  @jax.jit
  def choose(key):
    return gate.apply(variables, x, rngs={'gate': key}, mutable=['gates'])[1]['gates']['on']

  first, again, other = (choose(jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() and 0.8 < first.mean() < 0.94


@pytest.mark.parametrize('global_logits', [False, True])
def test_gradient_reaches_every_parameter(global_logits):
  gate, x = ChannelGate(global_logits=global_logits), images(8, 6)
  variables = init(gate, x)

  @jax.jit
  @jax.grad
  def gradient(params, lam):
    y, state = gate.apply(
      {**variables, 'params': params},
      x,
      True,
      mutable=['gates', 'batch_stats'],
      rngs={'gate': jax.random.key(1)},
    )
    return jnp.sum(y**2) + gate_penalty(state['gates']['on'], lam)

  for path, grad in jax.tree.leaves_with_path(gradient(variables['params'], 0.0)):
    # A constant added before a batch norm has no effect.
    if jax.tree_util.keystr(path) != "['squeeze']['bias']":
      assert jnp.abs(grad).max() > 1e-6, path
  task, priced = (gradient(variables['params'], lam)['logit_bias'] for lam in (0.0, 10.0))
  difference = priced - task
  assert (difference[:, 1] > 0).all() and (difference[:, 0] < 0).all(), 'a price closes channels'


def test_penalty_conventions():
  on = (np.random.default_rng(0).uniform(size=(7, 192)) < 0.3).astype(np.float32)
  ratio = 1.7
  np.testing.assert_allclose(gate_penalty(on, 0.2), 0.2 * on.sum(1).mean(), rtol=1e-6)
  np.testing.assert_allclose(gate_penalty(on, ratio / 192), ratio * on.mean(), rtol=1e-6)


def test_noise_scale_turns_training_into_the_choice_of_evaluation():
  gate = ChannelGate(global_logits=True)
  x = jnp.ones((64, 2, 2, 8))
  params = {'logit_bias': jnp.stack([jnp.zeros(8), jnp.linspace(-1.0, 1.0, 8)], axis=-1)}

  def chosen(scale):
    variables = {'params': params, 'gate_noise': {'scale': jnp.float32(scale)}}
    rngs = {'gate': jax.random.key(0)}
    return gate.apply(variables, x, train=True, mutable=['gates'], rngs=rngs)[1]['gates']['on']

  expected = gate.apply({'params': params}, x, mutable=['gates'])[1]['gates']['on']
  np.testing.assert_array_equal(chosen(0.0), expected)
  assert np.abs(np.asarray(chosen(1.0)) - expected).mean() > 0.2
