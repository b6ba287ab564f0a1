"""The language model against NumPy, word by word, and as the trainer uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax.data import batched
from fqjax.models import LstmCarry, create_language_model
from fqjax.sparsity import Gates, Unstructured, make_plan, project, trace_layers
from fqjax.tracing import summary, to_graph
from fqjax.train import create_state, fit, make_mesh, make_train_step

N, T, VOCAB, HIDDEN = 3, 5, 7, 4
TOKENS = jax.ShapeDtypeStruct((N, T), jnp.int32)


def initial(model, n=N, t=T):
  tokens = jax.ShapeDtypeStruct((n, t), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens, model.initial_carry(n))


def paths(tree):
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}


def numbers(shapes, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, leaf.dtype)
  return jax.tree.map(draw, shapes)


def small(**options):
  """A model, its variables, tokens and a carry that is not zero."""
  model = create_language_model(vocab_size=VOCAB, hidden=HIDDEN, **options)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (N, T)), jnp.int32)
  return model, numbers(initial(model)), tokens, numbers(model.initial_carry(N), seed=2)


def oracle(params, tokens, carry, tied):
  """Float64, one word after the other, one gate after the other."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  state = [(np.asarray(c.cell), np.asarray(c.hidden)) for c in carry]
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  table, logits = params['embed']['embedding'], []
  for word in np.asarray(tokens).T:
    x = table[word]
    for i, (c, h) in enumerate(state):
      p, gate = params[f'lstm{i}'], []
      for k in range(4):
        part = slice(k * HIDDEN, (k + 1) * HIDDEN)
        gate.append(
          x @ p['input']['kernel'][:, part]
          + h @ p['hidden']['kernel'][:, part]
          + p['input']['bias'][part]
        )
      c = sigmoid(gate[1]) * c + sigmoid(gate[0]) * np.tanh(gate[2])
      x = sigmoid(gate[3]) * np.tanh(c)
      state[i] = c, x
    if tied:
      logits.append(x @ table.T + params['output_bias'])
    else:
      logits.append(x @ params['output']['kernel'] + params['output']['bias'])
  return np.stack(logits, 1), state


@pytest.mark.parametrize(('tied', 'num_layers'), [(False, 2), (True, 1)])
def test_forward_equals_the_oracle(tied, num_layers, x64):
  model, variables, tokens, carry = small(tied=tied, num_layers=num_layers, dtype=jnp.float64)
  logits, behind = jax.jit(model.apply)(variables, tokens, carry)
  want, state = oracle(variables['params'], tokens, carry, tied)
  assert logits.dtype == jnp.float64
  np.testing.assert_allclose(logits, want, rtol=1e-12)
  for got, (c, h) in zip(behind, state, strict=True):
    np.testing.assert_allclose(got.cell, c, rtol=1e-12)
    np.testing.assert_allclose(got.hidden, h, rtol=1e-12)


def test_the_carry_joins_what_was_cut(x64):
  model, variables, tokens, carry = small(dtype=jnp.float64)
  apply = jax.jit(model.apply)
  whole, last = apply(variables, tokens, carry)
  first, between = apply(variables, tokens[:, :2], carry)
  second, behind = apply(variables, tokens[:, 2:], between)
  np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), behind, last)
  # What comes later is not seen.
  later, _ = apply(variables, tokens.at[:, 3].add(1) % VOCAB, carry)
  np.testing.assert_array_equal(later[:, :3], whole[:, :3])
  assert (later[:, 3:] != whole[:, 3:]).any((0, 2)).all()


def test_sizes_of_the_published_recipes():
  words = 10_000
  medium = create_language_model('lstm_lm', vocab_size=words, hidden=650, dropout=0.5)
  large = create_language_model('lstm_lm', vocab_size=words, hidden=1500, dropout=0.65)
  tied = create_language_model(vocab_size=words, hidden=1500, tied=True)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(initial(m))) for m in (medium, large, tied)]
  # Large: 18 M per layer for the gates, 15 M for the words, 15 M for the output; and biases.
  assert sizes == [19_775_200, 66_022_000, 51_022_000]
  variables = initial(large)
  macs = summary(large.apply, variables, TOKENS, large.initial_carry(N)).macs
  assert macs == N * T * 51_000_000
  shapes = {path: leaf.shape for path, leaf in paths(variables['params']).items()}
  assert shapes == {
    'embed/embedding': (words, 1500),
    'lstm0/hidden/kernel': (1500, 6000),
    'lstm0/input/bias': (6000,),
    'lstm0/input/kernel': (1500, 6000),
    'lstm1/hidden/kernel': (1500, 6000),
    'lstm1/input/bias': (6000,),
    'lstm1/input/kernel': (1500, 6000),
    'output/bias': (words,),
    'output/kernel': (1500, words),
  }


@pytest.mark.parametrize('tied', [False, True])
def test_pruning_sees_the_gate_matrices(tied):
  model, variables, tokens, carry = small(tied=tied)
  layers = trace_layers(model.apply, variables, tokens, carry)
  layers = {path.removeprefix('params/'): layer for path, layer in layers.items()}
  gates = 4 * HIDDEN * HIDDEN
  last = 'embed/embedding' if tied else 'output/kernel'
  assert [(path, layer.macs, layer.times) for path, layer in layers.items()] == [
    ('lstm0/input/kernel', N * T * gates, 1),
    ('lstm0/hidden/kernel', N * T * gates, T),
    ('lstm1/input/kernel', N * T * gates, 1),
    ('lstm1/hidden/kernel', N * T * gates, T),
    (last, N * T * HIDDEN * VOCAB, 1),
  ]
  assert all(layers[f'lstm{i}/{part}/kernel'].layout == 'IO'
             for i in (0, 1) for part in ('input', 'hidden'))  # fmt: skip
  params = variables['params']
  rules = [('lstm.*/kernel', Gates(Unstructured(keep=0.25), 4)), ('.*', None)]
  plan = make_plan(params, rules, layers=layers, dense=())
  _, masks = project(plan, params)
  kept = np.asarray(masks['lstm0']['hidden']['kernel']).reshape(HIDDEN, 4, HIDDEN)
  np.testing.assert_array_equal(kept.sum((0, 2)), [HIDDEN * HIDDEN // 4] * 4)


def test_the_graph_computes_what_the_network_computes():
  model, variables, tokens, carry = small()
  traced = to_graph(model.apply, initial(model), TOKENS, model.initial_carry(N))
  assert set(traced.graph.parameters) == {f'params/{path}' for path in paths(variables['params'])}
  tokens, carry = tokens[:2], jax.tree.map(lambda c: c[:2], carry)
  run = jax.jit(lambda v, t, c: (traced(v, t, c), model.apply(v, t, c)))
  (got, got_carry), (want, want_carry) = run(variables, tokens, carry)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  for a, b in zip(jax.tree.leaves(got_carry), jax.tree.leaves(want_carry), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_training_step_reaches_every_parameter():
  model, variables, tokens, carry = small(dropout=0.3)

  @jax.jit
  def gradients(params, carry):
    def loss(params, carry):
      rngs = {'dropout': jax.random.key(0)}
      logits, _ = model.apply({'params': params}, tokens, carry, train=True, rngs=rngs)
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return jax.grad(loss)(params, carry)

  for path, gradient in paths(gradients(variables['params'], carry)).items():
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0, path


def test_dropout_acts_in_training_only_and_not_from_word_to_word():
  model, variables, tokens, carry = small(dropout=0.9)
  plain, *_ = small()
  # In evaluation the two are the same program.
  programs = (str(jax.make_jaxpr(m.apply)(variables, tokens, carry)) for m in (model, plain))
  assert len(set(programs)) == 1

  @jax.jit
  def train(key):
    return model.apply(variables, tokens, carry, train=True, rngs={'dropout': key})

  key = jax.random.key(3)
  logits, behind = train(key)
  assert (train(jax.random.key(4))[0] != logits).any()
  # Nothing is dropped from the carry: a share of 0.9 would leave zeros in it.
  assert all((leaf != 0).all() for leaf in jax.tree.leaves(behind))


def test_initial_values_are_uniform():
  model = create_language_model(vocab_size=50, hidden=16, num_layers=1, init_scale=0.04)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(lambda key: model.init(key, tokens, model.initial_carry(1)))(jax.random.key(0))
  for path, leaf in paths(params['params']).items():
    assert leaf.dtype == jnp.float32 and jnp.abs(leaf).max() <= 0.04, path
    # Of 50 uniform numbers or more the largest exceeds 0.8 of the bound but in 1 of 70,000 cases.
    assert jnp.abs(leaf).max() > 0.8 * 0.04, path


def test_bfloat16_policy():
  model, variables, tokens, carry = small(dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves((variables, carry))} == {jnp.dtype(jnp.float32)}
  logits, behind = jax.eval_shape(model.apply, variables, tokens, carry)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(behind)} == {jnp.dtype(jnp.float32)}
  text = str(jax.make_jaxpr(model.apply)(variables, tokens, carry))
  assert f'bf16[{N},{4 * HIDDEN}] = dot_general' in text


# Truncated back-propagation with the trainer: the carry is its model state.

WORDS = np.random.default_rng(5).integers(0, VOCAB, 41).astype(np.int32)


@functools.cache
def setup():
  model = create_language_model(vocab_size=VOCAB, hidden=HIDDEN, num_layers=1)
  tx, mesh = optax.sgd(0.5), make_mesh(1)

  def loss_fn(params, model_state, batch, key):
    del key
    begin = lambda c: jnp.where(batch['first'][:, None], 0, c)
    carry = jax.tree.map(begin, model_state['carry'])
    logits, carry = model.apply({'params': params}, batch['input'], carry, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['target'])
    return jnp.sum(losses * batch['mask']) / jnp.sum(batch['mask']), ({'carry': carry}, {})

  params = numbers(initial(model))['params']
  step = make_train_step(loss_fn, tx, mesh=mesh)
  return model, params, tx, mesh, step


def train(workdir, steps, start=None):
  model, params, tx, mesh, step = setup()
  carry = model.initial_carry(4) if start is None else start
  state = create_state(params, {'carry': carry}, tx, jax.random.key(0))
  loader = batched(WORDS, 4, 3, process_index=0, process_count=1)
  return fit(
    state, step, loader, workdir=workdir, total_steps=steps, mesh=mesh, progress=False, writers=()
  ).state


def test_training_goes_on_bit_for_bit(tmp_path):
  whole = train(tmp_path / 'whole', 5)
  train(tmp_path / 'cut', 2)
  resumed = train(tmp_path / 'cut', 5)
  assert isinstance(resumed.model_state['carry'][0], LstmCarry)
  got, want = paths((resumed.params, resumed.model_state)), paths((whole.params, whole.model_state))
  for path in want:
    np.testing.assert_array_equal(got[path], want[path], err_msg=path)
  # A pass has three batches: the third step ends one, so the carry of the fifth is of two batches.
  model, *_ = setup()
  # A text begins with zeros whatever the state holds.
  dirty = train(tmp_path / 'dirty', 5, start=numbers(model.initial_carry(4)))
  np.testing.assert_array_equal(dirty.params['output']['kernel'], whole.params['output']['kernel'])
  assert (whole.model_state['carry'][0].cell != 0).all()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'name': 'gpt'}, r"no language model 'gpt'; there is 'lstm_lm'"),
    ({'vocab_size': 0}, r'needs vocab_size >= 1, a whole number, got 0'),
    ({'hidden': 1.5}, r'needs hidden >= 1, a whole number, got 1.5'),
    ({'num_layers': True}, r'needs num_layers >= 1, a whole number, got True'),
    ({'dropout': 1}, r'needs 0 <= dropout < 1, the share dropped, got 1'),
    ({'init_scale': 0}, r'needs init_scale > 0, got 0'),
  ],
)
def test_errors_of_create_language_model(options, message):
  with pytest.raises(ValueError, match=message):
    create_language_model(**{'vocab_size': 10, **options})


@pytest.mark.parametrize(
  ('tokens', 'carry', 'message'),
  [
    (np.zeros((N, T), np.float32), N, r'integer tokens \[n, t\], got float32\[3, 5\]'),
    (np.zeros(T, np.int32), N, r'got int32\[5\]'),
    (np.zeros((N, T), np.int32), N + 1, r'state \[3, 4\], got \[\[4, 4\].*\n.*initial_carry\(3\)'),
    (np.zeros((N, T), np.int32), None, r'2 layers of a cell and a hidden state \[3, 4\], got \[\]'),
  ],
)
def test_errors_of_the_input(tokens, carry, message):
  model = create_language_model(vocab_size=VOCAB, hidden=HIDDEN)
  carry = () if carry is None else model.initial_carry(carry)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), tokens, carry)
