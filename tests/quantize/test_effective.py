"""Mixtures of whole trees: any library's params, masks, rates, averages, files, bad codebooks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fqjax import models, quantize, rules
from fqjax.quantize import Mixture, MixtureLeaf
from tests.rules import trees

MODES = ('soft', 'ste', 'anneal', 'hard')
RULES = [('.*first.*', Mixture(5)), ('.*(kernel|w)', Mixture(3, zero=False))]


def started(kind='linen', masked=False):
  """Params, their masks, and mixtures of both layers' kernels."""
  params = trees.from_linen(kind, trees.linen())
  masks = trees.pairs(params)[1] if masked else None
  plan = quantize.make_plan(params, RULES)
  return params, masks, quantize.init_dgms(params, plan, masks=masks)


def kernels(tree):
  return [x for x in trees.by_shape(tree) if x.ndim > 1]


@functools.partial(jax.jit, static_argnums=2)
def effective(params, codebooks, mode, masks=None, temperature=0.1):
  return quantize.effective_params(params, codebooks, mode, masks=masks, temperature=temperature)


@pytest.mark.parametrize('kind', trees.KINDS)
def test_any_tree(kind):
  pytest.importorskip({'haiku': 'haiku', 'equinox': 'equinox'}.get(kind, 'jax'))
  params, _, codebooks = started(kind)
  found = effective(params, codebooks, 'hard')
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert jax.tree.structure(params).flatten_up_to(codebooks)
  expected = effective(*started()[::2], 'hard')
  for a, b in zip(trees.by_shape(found), trees.by_shape(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  for new, old in zip(trees.by_shape(found), trees.by_shape(params), strict=True):
    if new.ndim == 1:
      np.testing.assert_array_equal(new, old)
  assert sorted(len(np.unique(x)) for x in kernels(found)) == [3, 5]
  marks = quantize.labels(params, codebooks)
  assert jax.tree.structure(marks['params']) == jax.tree.structure(params)
  assert sorted(jax.tree.leaves(marks['params'])) == ['other'] * 2 + ['weights'] * 2
  assert jax.tree.structure(marks['codebooks']) == jax.tree.structure(codebooks)


@pytest.mark.parametrize('mode', [*MODES, 'float'])
def test_masked_weights_are_zero_in_every_mode(mode):
  params, masks, codebooks = started(masked=True)
  # A leaf without mixture may be masked too.
  masks['second']['bias'] = jnp.arange(8) > 2
  found = effective(params, codebooks, mode, masks)
  trees.assert_dead_are_zero(found, masks)
  unmasked = effective(params, codebooks, mode)
  for a, b, m in zip(
    jax.tree.leaves(found),
    jax.tree.leaves(unmasked),
    jax.tree.structure(params).flatten_up_to(masks),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b if m is None else np.where(m, b, 0))
  chosen = quantize.freeze_assignments(params, codebooks, masks=masks)
  assert chosen['second']['bias'] is None
  for layer in ('first', 'second'):
    index = np.asarray(chosen[layer]['kernel'])
    assert index.dtype == np.uint8 and (index[~np.asarray(masks[layer]['kernel'])] == 0).all()
    if layer == 'second':  # without a zero component, index 0 is the mask's alone
      assert (index[np.asarray(masks[layer]['kernel'])] > 0).all()
    if mode == 'hard':
      table = np.asarray(quantize.codebook(codebooks[layer]['kernel']))
      np.testing.assert_array_equal(table[index], found[layer]['kernel'])


def loss(both, mode, masks, temperature):
  seen = quantize.effective_params(
    both['params'], both['codebooks'], mode, masks=masks, temperature=temperature
  )
  goal = trees.linen(7)
  return sum(
    jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(goal), strict=True)
  )


def optimizer(codebooks, params, masks):
  # Slopes of soft weights reach a hundred.
  rates = {'weights': 1e-3, 'other': 0.05, 'mu': 1e-3, 'sigma': 1e-4, 'pi': 1e-4}
  by_kind = {name: optax.sgd(rate, momentum=0.5) for name, rate in rates.items()}
  keep = {'params': masks, 'codebooks': jax.tree.map(lambda _: None, codebooks)}
  return optax.chain(
    optax.partition(by_kind | {'tau': optax.set_to_zero()}, quantize.labels(params, codebooks)),
    rules.refresh_codebooks(4, masks=masks),
    rules.keep_masked(keep),
  )


@functools.cache
def trained(mode):
  """Five updates of everything, one program; with the state after two."""
  params, masks, codebooks = started(masked=True)
  both = {'params': rules.apply_masks(params, masks), 'codebooks': codebooks}
  tx = optimizer(codebooks, params, masks)

  @jax.jit
  def step(both, state, temperature):
    temperature = temperature if mode == 'anneal' else None
    value, grads = jax.value_and_grad(loss)(both, mode, masks, temperature)
    updates, state = tx.update(grads, state, both)
    return optax.apply_updates(both, updates), state, value

  def run(both, state, first, last):
    values = []
    for i in range(first, last):
      both, state, value = step(both, state, jnp.float32(1 / (i + 1)))
      values.append(float(value))
    return both, state, values

  first = both, tx.init(both)
  halfway = run(*first, 0, 2)[:2]
  return step, run, first, halfway, run(*first, 0, 5), masks


@pytest.mark.parametrize('mode', ['soft', 'anneal', 'ste'])
def test_trains_under_its_own_rates_in_one_program(mode):
  step, run, first, halfway, (both, state, values), masks = trained(mode)
  assert step._cache_size() == 1
  assert values[-1] < values[0]
  trees.assert_dead_are_zero(both['params'], masks)
  assert jax.tree.structure((both, state)) == jax.tree.structure(first)
  for before, after in zip(jax.tree.leaves(first), jax.tree.leaves((both, state)), strict=True):
    assert before.dtype == after.dtype and before.shape == after.shape
  for layer in ('first', 'second'):
    old, new = (x['codebooks'][layer]['kernel'] for x in (first[0], both))
    assert new.log_tau == old.log_tau
    for name in ('mu', 'log_sigma', 'pi'):  # sigma and pi by the refresh in 'ste'
      assert np.any(getattr(new, name) != getattr(old, name)), (layer, name)
  # Stopped after two steps, through host memory, and on.
  leaves, structure = jax.tree.flatten(halfway)
  restored = structure.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
  trees.assert_same(run(*restored, 2, 5)[:2], (both, state))


def test_averages_are_exported_like_any_weights():
  """An average of weights and mixtures has levels; an average of levels would have none."""
  _, _, first, halfway, (both, _, _), masks = trained('soft')
  average = optax.incremental_update(both, halfway[0], 0.3)
  assert jax.tree.structure(average) == jax.tree.structure(both)
  hard = effective(average['params'], average['codebooks'], 'hard', masks)
  trees.assert_dead_are_zero(hard, masks)
  for layer in ('first', 'second'):
    table = np.asarray(quantize.codebook(average['codebooks'][layer]['kernel']))
    assert set(np.unique(hard[layer]['kernel'])) <= set(table)


def test_frozen_assignments_move_only_the_means():
  params, masks, codebooks = started(masked=True)
  assignments = quantize.freeze_assignments(params, codebooks, masks=masks)

  @jax.jit
  def grads(both):
    def loss(both):
      seen = quantize.effective_params(*both, 'hard', masks=masks, assignments=assignments)
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(seen))

    return jax.grad(loss)(both)

  dparams, dcodebooks = grads((params, codebooks))
  for layer in ('first', 'second'):
    assert not np.any(dparams[layer]['kernel']) and np.any(dparams[layer]['bias'])
    leaf, index = codebooks[layer]['kernel'], np.asarray(assignments[layer]['kernel'])
    table = np.asarray(quantize.codebook(leaf))
    expected = np.zeros_like(table)
    np.add.at(expected, index, np.where(masks[layer]['kernel'], np.cos(table[index]), 0))
    np.testing.assert_allclose(dcodebooks[layer]['kernel'].mu, expected[1:], rtol=1e-5, atol=1e-6)
    assert not any(np.any(x) for x in dcodebooks[layer]['kernel'][1:])


def test_export_through_the_plan():
  """Trained mixtures are codebooks of `project`, `encode` and `sizes`."""
  params, masks, codebooks = started(masked=True)
  plan = quantize.make_plan(params, RULES)
  both = trained('ste')[4][0]
  hard = effective(both['params'], both['codebooks'], 'hard', masks)
  found = quantize.project(plan, both['params'], masks, codebooks=both['codebooks'])
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(hard), strict=True):
    np.testing.assert_array_equal(a, b)
  coded = quantize.encode(plan, both['params'], masks, codebooks=both['codebooks'])
  assert set(coded) == {'first/kernel', 'second/kernel'}
  for path, one in coded.items():
    layer = path.split('/')[0]
    np.testing.assert_array_equal(one.decode(), hard[layer]['kernel'])
    assert (one.indices[~np.asarray(masks[layer]['kernel'])] == 0).all()


def test_bytes_of_resnet18():
  """The honest count: 6.07 times, not 8; ceil(N bits / 8) and a table of the free means."""
  net = models.create_model('resnet18')
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
  paths = {e.shape: e.path for e in quantize.make_plan(shapes, [('.*', Mixture(16))]).entries}
  stays = [(paths[7, 7, 3, 64], None), (paths[512, 1000], None)]
  plan = quantize.make_plan(shapes, [*stays, ('.*kernel', Mixture(16))])
  whole = sum(entry.size for entry in plan.entries)
  mixed = sum(entry.size for entry in plan.quantized)
  assert (whole, mixed) == (11_689_512, 11_157_504)
  assert {entry.quantizer.index_bits for entry in plan.quantized} == {4}
  total = 4 * mixed / 8 + 4 * (whole - mixed)
  np.testing.assert_allclose([total / 1e6, 4 * whole / total], [7.71, 6.07], atol=5e-3)
  w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 33)), jnp.float32)
  cost = quantize.sizes(quantize.make_plan({'w': w}, [('w', Mixture(16))]), {'w': w}).bits['w']
  assert cost.values == 4 * 64 * 33
  assert 0 <= cost.tables - 15 * 32 <= 256  # the format's own header


def test_codebooks_of_another_model():
  params, masks, codebooks = started()
  call = quantize.effective_params
  with pytest.raises(ValueError, match=r"codebooks are of another model: they have 'third/kernel'"):
    call(params, {**codebooks, 'third': codebooks['first']}, 'hard')
  with pytest.raises(ValueError, match='no mixture; make them with init_dgms'):
    call(params, {'first': None}, 'hard')
  # As a checkpoint comes back without its template.
  plain = jax.tree.map(
    lambda x: x._asdict(), codebooks, is_leaf=lambda x: isinstance(x, MixtureLeaf)
  )
  with pytest.raises(
    ValueError, match=r"at 'first/kernel/log_sigma', not a mixture: restore(.|\n)*template"
  ):
    call(params, plain, 'hard')
  broken = {'first': {'kernel': codebooks['first']['kernel']._replace(pi=jnp.ones(4))}}
  with pytest.raises(
    ValueError, match=r"'first/kernel': a mixture of means \[4\](.|\n)*shares \[4\]"
  ):
    call(params, broken, 'hard')
  other = jax.tree.map(lambda p: jnp.ones((*p.shape, 2), bool), params)
  with pytest.raises(ValueError, match='masks is of another model'):
    call(params, codebooks, 'soft', masks=other)
  with pytest.raises(ValueError, match='assignments has nothing for'):
    call(
      params, codebooks, 'hard', assignments={'first': {'kernel': jnp.zeros((8, 16), jnp.uint8)}}
    )
  with pytest.raises(ValueError, match="mode='sof'"):
    call(params, codebooks, 'sof')
  for function in (quantize.labels, quantize.freeze_assignments):
    with pytest.raises(ValueError, match='another model'):
      function(params, {'third': codebooks['first']})


def test_nothing_to_start_from():
  params, masks, _ = started(masked=True)
  with pytest.raises(ValueError, match='no layer of the plan gets a mixture'):
    quantize.init_dgms(params, quantize.make_plan(params, [('.*', quantize.Binary())]))
  plan = quantize.make_plan(params, RULES)
  bad = jax.tree.map(lambda p: p.at[0].set(jnp.nan), params)
  with pytest.raises(ValueError, match=r"'first/kernel' \[8, 16\]: weights are NaN or infinite"):
    quantize.init_dgms(bad, plan)
  with pytest.raises(ValueError, match='plan is of another model'):
    quantize.init_dgms({'first': params['first']}, plan)
  with pytest.raises(ValueError, match='masks is of another model'):
    quantize.init_dgms(params, plan, masks={'third': jnp.ones(3, bool)})
  # All masked: a leaf of zeros.
  dead = {'first': {'kernel': jnp.zeros((8, 16), bool)}}
  found = quantize.init_dgms(params, plan, masks=dead)['first']['kernel']
  np.testing.assert_array_equal(found.mu, 0)
