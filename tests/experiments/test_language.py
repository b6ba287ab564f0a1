"""The next word: losses of a text against NumPy, and the carry of truncated back-propagation."""

import jax
import numpy as np
import pytest

from experiments import language, outcome
from fqjax import data as fd
from fqjax import models, train

VOCAB, HIDDEN, STREAMS, LENGTH = 9, 5, 3, 4


@pytest.fixture(scope='module')
def setting():
  rng = np.random.default_rng(0)
  words = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (41, 32, 30)]
  text = fd.Text('numbers', tuple('abcdefghi'), *words, '0' * 64)
  model = models.create_language_model(vocab_size=VOCAB, hidden=HIDDEN, init_scale=0.8)
  task = language.language_model(
    model, text, batch_size=2, length=LENGTH, eval_batch_size=STREAMS, mesh=train.make_mesh(1)
  )
  return text, task, task.init(jax.random.key(0))


def losses(params, words, state=None):
  """Float64, word by word: the loss of each but the first, and the state behind the last."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  state = state or [(np.zeros(HIDDEN), np.zeros(HIDDEN)) for _ in range(2)]
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  out = []
  for word, following in zip(words[:-1], words[1:]):
    x = params['embed']['embedding'][word]
    for i, (c, h) in enumerate(state):
      p = params[f'lstm{i}']
      sums = x @ p['input']['kernel'] + h @ p['hidden']['kernel'] + p['input']['bias']
      gate = np.split(sums, 4)
      c = sigmoid(gate[1]) * c + sigmoid(gate[0]) * np.tanh(gate[2])
      x = sigmoid(gate[3]) * np.tanh(c)
      state[i] = c, x
    logits = x @ params['output']['kernel'] + params['output']['bias']
    out.append(np.log(np.exp(logits).sum()) - logits[following])
  return np.array(out), state


@pytest.mark.promotes('optax')
def test_perplexity_equals_numpy(setting):
  text, task, variables = setting
  found = task.score(variables)
  assert set(found) == {'test', 'held_out'}
  for part, words in (('test', text.test), ('held_out', text.valid)):
    per_stream = (len(words) - 1) // STREAMS
    want = np.concatenate(
      [
        losses(variables.params, words[i * per_stream : (i + 1) * per_stream + 1])[0]
        for i in range(STREAMS)
      ]
    )
    assert found[part].dtype == np.float64
    np.testing.assert_allclose(found[part], want, rtol=1e-5)
    np.testing.assert_allclose(
      outcome.PERPLEXITY.value(found[part]), np.exp(np.mean(want)), rtol=1e-6
    )


@pytest.mark.promotes('optax')
def test_training_goes_on_with_the_carry_and_begins_anew_with_the_text(setting):
  text, task, (params, state) = setting
  loss_fn = jax.jit(task.loss_fn)
  batches = iter(task.loader(0))
  halves = [text.train[:21], text.train[20:41]]
  assert task.steps_per_epoch == 5
  states = [None, None]
  for step in range(6):
    if step == 5:  # the text begins again
      states = [None, None]
    at = LENGTH * (step % 5)
    found = [losses(params, half[at : at + LENGTH + 1], s) for half, s in zip(halves, states)]
    loss, (state, _) = loss_fn(params, state, next(batches), jax.random.key(step))
    np.testing.assert_allclose(loss, np.mean([f[0] for f in found]), rtol=1e-5)
    states = [f[1] for f in found]
    got = state['carry']['1']['hidden']
    np.testing.assert_allclose(got, [s[1][1] for s in states], rtol=1e-4, atol=1e-6)


def test_layers_are_those_that_are_pruned(setting):
  _, task, _ = setting
  kernels = [f'lstm{i}/{which}/kernel' for i in (0, 1) for which in ('input', 'hidden')]
  assert set(kernels) | {'output/kernel'} == set(task.layers)
  assert {task.layers[k].layout for k in kernels} == {'IO'}
