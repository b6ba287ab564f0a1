import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax.train import (
  compile_count,
  create_state,
  decay_mask,
  evaluate,
  make_eval_step,
  make_mesh,
  make_train_step,
  replicate,
  shard_batch,
)
from tests.train import toy


def run(mesh, steps=5, size=16, **options):
  state, step = toy.setup(mesh, **options)
  losses = []
  for i in range(steps):
    state, metrics = step(state, shard_batch(toy.make_batch(i, size), mesh))
    losses.append(float(metrics['loss']))
  return state, losses


def test_step_equals_plain_optax_loop():
  """Oracle: the same training written out with nothing of ours."""
  tx = toy.optimizer()
  params, model_state, opt_state = toy.make_params(), toy.model_state(), None
  opt_state = tx.init(params)
  averages = (params, model_state['mean'])
  grad_fn = jax.jit(jax.value_and_grad(toy.loss_fn, has_aux=True))
  update = jax.jit(tx.update)
  for i in range(4):
    key = jax.random.fold_in(jax.random.key(7), i)
    (loss, (model_state, _)), grads = grad_fn(params, model_state, toy.make_batch(i), key)
    updates, opt_state = update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    averages = jax.tree.map(lambda a, x: 0.9 * a + 0.1 * x, averages, (params, model_state['mean']))
  state, losses = run(make_mesh(1), 4)
  close = dict(rtol=2e-5, atol=1e-6)  # float32, other order of sums
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), state.params, params)
  np.testing.assert_allclose(losses[-1], loss, **close)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **close),
    (state.ema.params, state.ema.model_state['mean']),
    averages,
  )
  assert int(state.ema.model_state['steps']) == int(state.model_state['steps']) == 4
  assert int(state.step) == 4


def test_one_device_equals_eight():
  one, losses1 = run(make_mesh(1))
  eight, losses8 = run(make_mesh())
  np.testing.assert_allclose(losses1, losses8, rtol=1e-5)
  for name, x in toy.leaves(one).items():
    np.testing.assert_allclose(x, toy.leaves(eight)[name], rtol=1e-4, atol=1e-6, err_msg=name)
  assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8


def test_second_mesh_axis():
  mesh = make_mesh((4, 2), ('data', 'model'))
  _, losses = run(mesh, 2)
  np.testing.assert_allclose(losses, run(make_mesh(1), 2)[1], rtol=1e-5)


def test_no_compilation_after_first_step():
  mesh = make_mesh(8)
  state, _ = toy.setup(mesh)
  step = make_train_step(toy.loss_fn, toy.optimizer(), mesh=mesh, ema_decay=0.9)
  compile_count()
  state, _ = step(state, toy.make_batch(0))  # fresh state and host arrays
  before = compile_count()
  for i in range(1, 4):
    state, _ = step(state, shard_batch(toy.make_batch(i), mesh))
  assert compile_count() == before
  step(state, shard_batch(toy.make_batch(9, size=24), mesh))  # the counter does count
  assert compile_count() > before


def test_state_is_donated_and_user_arrays_survive():
  mesh = make_mesh(1)  # the device params live on: device_put alone would alias them
  tx = toy.optimizer()
  params, key = toy.make_params(), jax.random.key(7)
  state = replicate(create_state(params, toy.model_state(), tx, key, ema=True), mesh)
  step = make_train_step(toy.loss_fn, tx, mesh=mesh, ema_decay=0.9)
  step(state, shard_batch(toy.make_batch(0), mesh))
  donated = (state.params, state.model_state, state.opt_state, state.ema.params)
  assert all(x.is_deleted() for x in jax.tree.leaves(donated))
  with pytest.raises(RuntimeError, match='deleted'):
    step(state, shard_batch(toy.make_batch(1), mesh))
  jax.tree.map(np.asarray, params)  # not donated
  jax.random.key_data(key)


@pytest.mark.parametrize('accumulate', [2, 4])
def test_accumulation_equals_one_big_batch(accumulate):
  mesh = make_mesh(8)
  big, losses = run(mesh, 3, size=64, loss=toy.plain_loss, tx=optax.sgd(0.1))
  small, losses_small = run(
    mesh, 3, size=64, loss=toy.plain_loss, tx=optax.sgd(0.1), accumulate=accumulate
  )
  np.testing.assert_allclose(losses, losses_small, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), big.params, small.params
  )
  # The model state went through every microbatch, one after the other.
  assert int(small.model_state['steps']) == 3 * accumulate
  mean = np.zeros(toy.FEATURES)
  for i in range(3):
    x = toy.make_batch(i, 64)['x']
    for j in range(accumulate):
      mean = 0.9 * mean + 0.1 * x[j::accumulate].mean(0)
  np.testing.assert_allclose(small.model_state['mean'], mean, rtol=1e-4, atol=1e-6)


def test_accumulation_moves_no_example_between_devices():
  mesh = make_mesh(8)
  state, step = toy.setup(mesh, accumulate=2)
  text = step.lower(state, shard_batch(toy.make_batch(0, 32), mesh)).compile().as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text and 'all-to-all' not in text
  assert 'collective-permute' not in text


def test_ema_decay_as_schedule():
  mesh = make_mesh(1)
  tx = optax.sgd(0.1)
  state = create_state(toy.make_params(), toy.model_state(), tx, jax.random.key(7), ema=True)
  decay = lambda step: jnp.minimum(0.9, step / (step + 1))  # the plain mean at first
  step = make_train_step(toy.loss_fn, tx, mesh=mesh, ema_decay=decay)
  seen = []
  for i in range(3):
    state, _ = step(state, shard_batch(toy.make_batch(i), mesh))
    seen.append(np.array(state.params['dense1']['kernel']))
  np.testing.assert_allclose(state.ema.params['dense1']['kernel'], np.mean(seen, 0), rtol=1e-5)


def test_optimizer_state_that_aliases_params_can_be_donated():
  tx = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
  state = create_state({'w': jnp.ones(3)}, {}, tx, jax.random.PRNGKey(0), ema=True)
  loss = lambda p, s, b, k: (jnp.sum(p['w'] * b['x']), (s, {}))
  step = make_train_step(loss, tx, mesh=make_mesh(1), ema_decay=0.5)
  state, _ = step(state, {'x': np.ones((1,), np.float32)})
  np.testing.assert_array_equal(state.params['w'], [2, 2, 2])


def test_errors_of_the_step():
  mesh = make_mesh(8)
  with pytest.raises(ValueError, match='accumulate counts microbatches'):
    make_train_step(toy.loss_fn, toy.optimizer(), accumulate=0)
  state, step = toy.setup(mesh, accumulate=4)
  with pytest.raises(ValueError, match='batch divisible by 32, got label'):
    step(state, shard_batch(toy.make_batch(0, 16), mesh))
  with pytest.raises(ValueError, match=r'shard_batch cannot split label: \[12\] over 8'):
    shard_batch(toy.make_batch(0, 12), mesh)
  with pytest.raises(ValueError, match='ema=True'):
    make_train_step(toy.loss_fn, toy.optimizer(), mesh=mesh, ema_decay=0.9)(
      toy.setup(mesh, ema=False)[0], toy.make_batch(0)
    )
  with pytest.raises(ValueError, match='ema_decay=0.999'):
    make_train_step(toy.loss_fn, toy.optimizer(), mesh=mesh)(state, toy.make_batch(0))

  def forgets(params, model_state, batch, key):
    loss, (_, metrics) = toy.plain_loss(params, model_state, batch, key)
    return loss, ({'mean': model_state['mean'].astype(jnp.bfloat16)}, metrics)

  state, step = toy.setup(mesh, loss=forgets)
  with pytest.raises(
    ValueError, match=r'mean: float32\[6\] -> bfloat16\[6\](.|\n)*steps: .*absent'
  ):
    step(state, toy.make_batch(0))
  with pytest.raises(ValueError, match='needs 9 devices, but JAX sees 8'):
    make_mesh(9)
  with pytest.raises(ValueError, match=r'make_mesh\(\(8, 1\)'):
    make_mesh(8, ('data', 'model'))


def eval_fn(params, model_state, batch):
  logits = toy.apply(params, batch['x'])
  hit = (jnp.argmax(logits, axis=-1) == batch['label']).astype(jnp.float32) * batch['mask']
  rows = jax.nn.one_hot(batch['label'], toy.CLASSES) * batch['mask'][:, None]
  confusion = rows.T @ jax.nn.one_hot(jnp.argmax(logits, axis=-1), toy.CLASSES)
  return {'top1': jnp.sum(hit), 'confusion': confusion, 'count': jnp.sum(batch['mask'])}


def padded_batches(n, size):
  whole = toy.make_batch(3, n)
  for i in range(0, n, size):
    batch = jax.tree.map(lambda x: x[i : i + size], whole)
    missing = size - len(batch['x'])
    mask = np.arange(size) < size - missing
    # Padding repeats the first example with a label it will hit: unmasked, it would count.
    pad = lambda x: np.concatenate([x, np.repeat(x[:1], missing, axis=0)])
    yield jax.tree.map(pad, batch) | {'mask': mask.astype(np.float32)}


@pytest.mark.parametrize(('n', 'size'), [(37, 8), (37, 40), (16, 16)])
def test_evaluation_is_exact_over_padding(n, size):
  mesh = make_mesh(8)
  state, _ = toy.setup(mesh)
  eval_step = make_eval_step(eval_fn, mesh=mesh)
  means = evaluate(eval_step, state, padded_batches(n, size), mesh)
  whole = toy.make_batch(3, n)
  predicted = np.argmax(toy.apply(state.params, whole['x']), axis=-1)
  assert means['count'] == n
  np.testing.assert_allclose(
    means['top1'], np.mean(np.float64(predicted == whole['label'])), rtol=1e-12
  )
  confusion = np.zeros((toy.CLASSES, toy.CLASSES))
  np.add.at(confusion, (whole['label'], predicted), 1)
  np.testing.assert_allclose(means['confusion'] * n, confusion, atol=1e-9)


def test_evaluation_of_the_averages_and_errors():
  mesh = make_mesh(8)
  state, _ = toy.setup(mesh)
  eval_step = make_eval_step(eval_fn, mesh=mesh)
  zero = jax.tree.map(jnp.zeros_like, state.ema)
  averaged = state._replace(ema=zero)
  means = evaluate(eval_step, averaged, padded_batches(16, 8), mesh, use_ema=True)
  np.testing.assert_allclose(means['top1'], np.mean(toy.make_batch(3, 16)['label'] == 0))
  with pytest.raises(ValueError, match='ema=True'):
    evaluate(eval_step, state._replace(ema=None), padded_batches(16, 8), mesh, use_ema=True)
  with pytest.raises(ValueError, match='no batch'):
    evaluate(eval_step, state, [], mesh)
  with pytest.raises(ValueError, match='over 8 local devices'):
    evaluate(eval_step, state, padded_batches(16, 12), mesh)
  silent = make_eval_step(lambda p, s, b: {'x': jnp.sum(b['mask'])}, mesh=mesh)
  with pytest.raises(ValueError, match="without 'count'"):
    evaluate(silent, state, padded_batches(16, 8), mesh)


def test_decay_mask_takes_kernels_only():
  params = toy.make_params() | {'bn1': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}}
  mask = decay_mask(params)
  assert mask['dense1'] == {'kernel': True, 'bias': False}
  assert mask['bn1'] == {'scale': False, 'bias': False}
  # A price pulls on the gate's logits, decay must not.
  assert decay_mask({'logit_bias': jnp.ones((8, 2)), 'w': jnp.ones((8, 2))}) == {
    'logit_bias': False,
    'w': True,
  }
  assert decay_mask(jnp.ones((2, 2))) is True
