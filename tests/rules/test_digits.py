"""ADMM against magnitude pruning on the 8x8 digits: the claim the method lives by."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import rules
from fqjax.sparsity import Unstructured, make_plan

RATE = 100
SIZES = (64, 300, 100, 10)
BATCH, PER_EPOCH = 64, 19


@functools.cache
def digits():
  data = pytest.importorskip('sklearn.datasets').load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))
  x, y = (data.data / 16).astype(np.float32)[order], data.target.astype(np.int32)[order]
  return (x[:1257], y[:1257]), (x[1257:], y[1257:])


def init(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    f'fc{i}': {
      'kernel': jax.random.normal(k, (a, b)) / a**0.5,
      'bias': jnp.zeros(b),
    }
    for i, (k, a, b) in enumerate(zip(keys, SIZES, SIZES[1:], strict=False))
  }


def logits(params, x):
  for i in range(3):
    x = x @ params[f'fc{i}']['kernel'] + params[f'fc{i}']['bias'][None]
    x = jnp.maximum(x, 0) if i < 2 else x
  return x


def accuracy(params):
  x, y = digits()[1]
  return float(jnp.mean(jnp.argmax(logits(params, x), -1) == y))


def train(tx, params, epochs, seed):
  """Epochs of `tx`, the data drawn anew in each; one program."""
  x, y = (jnp.asarray(a) for a in digits()[0])

  def loss(params, i):
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[i]), y[i])
    return jnp.mean(entropy)

  def step(carry, i):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, i), state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params, state, keys):
    draw = jax.vmap(lambda k: jax.random.permutation(k, len(x))[: BATCH * PER_EPOCH])
    return lax.scan(step, (params, state), draw(keys).reshape(-1, BATCH))[0]

  return run(params, tx.init(params), jax.random.split(jax.random.key(seed + 100), epochs))


def cut_and_retrain(plan, params, seed):
  """Accuracy right after the cut, and after 60 epochs of retraining."""
  pruned, masks = rules.finalize(plan, params)
  tx = optax.chain(optax.adam(1e-3), rules.keep_masked(masks))
  retrained, _ = train(tx, pruned, 60, seed)
  return accuracy(pruned), accuracy(retrained)


@pytest.mark.full
@pytest.mark.promotes('Adam of optax')
def test_admm_beats_magnitude_at_a_hundredth():
  results = {'dense': [], 'magnitude': [], 'admm': [], 'multi-rho': []}
  gaps = []
  for seed in (0, 1):
    dense, _ = train(optax.adam(1e-3), init(seed), 60, seed)
    results['dense'].append((accuracy(dense),) * 2)
    plan = make_plan(
      dense,
      [('fc2/kernel', Unstructured(keep=3 / RATE)), ('.*/kernel', Unstructured(keep=1 / RATE))],
    )
    results['magnitude'].append(cut_and_retrain(plan, dense, seed))
    # Eleven refreshes at a small rho, or four at each of three.
    every = 20 * PER_EPOCH
    once = rules.admm(plan, 1e-4, every)
    several = rules.admm(plan, (1e-3, 1e-2, 1e-1), every, stage_steps=5 * every - 1)
    for name, rule, epochs in (('admm', once, 240), ('multi-rho', several, 300)):
      pulled, state = train(optax.chain(rule, optax.adam(1e-3)), dense, epochs, seed)
      results[name].append(cut_and_retrain(plan, pulled, seed))
    gaps.append(float(rules.diagnostics(state)['admm_gap']))
  mean = {name: np.mean(pairs, 0).round(3) for name, pairs in results.items()}
  print(mean, 'gap', np.round(gaps, 3))
  assert mean['dense'][1] > 0.96
  assert mean['admm'][1] > mean['magnitude'][1] + 0.15
  assert mean['multi-rho'][1] > mean['magnitude'][1] + 0.15
  assert mean['multi-rho'][0] >= 0.80 and max(gaps) < 0.06
