"""Networks of few distinct weights: plans, phases, exact levels, whole small runs."""

import json
import re

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dgms as configs
from experiments import cifar, ledger, levels
from experiments import compression as cp
from experiments import dgms as experiment
from fqjax import quantize, train
from tests.experiments import tiny_conv


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  experiment.check(config)
  config.to_json_best_effort()
  # Every setting trains as long as the others it is compared with.
  assert len({experiment.epochs(config, config.choices[name]) for name in config.settings}) == 1


def test_arguments_are_read():
  config = configs.get_config('resnet20,settings=mixture4+binary,seeds=3')
  assert config.settings == ('mixture4', 'binary') and config.seeds == (0, 1, 2)
  assert configs.get_config('').model.weights == 'cifar10_resnet20.npz'
  # Settings are chosen on a network that has not seen what they are judged by.
  chosen = configs.get_config('chosen')
  assert chosen.model.weights == '' and chosen.data.held_out_split == 'train[90%:]'


@pytest.mark.parametrize(
  ('name', 'first', 'inner'),
  [
    ('mixture4', quantize.Uniform, quantize.Mixture(16)),
    ('interval2', quantize.Uniform, quantize.Interval(2, 'layer')),
    ('ternary', quantize.Uniform, quantize.Ternary('layer')),
    ('binary', quantize.Binary, quantize.Binary('channel')),
  ],
)
def test_plans(name, first, inner):
  config = configs.get_config('')
  params = tiny_conv.init(jax.random.key(0)).params
  plan = experiment.make_plan(config, name, params, None)
  found = {entry.path: entry.quantizer for entry in plan.quantized}
  assert set(found) == {f'{name}/kernel' for name in ('conv1', 'conv2', 'conv3', 'fc')}
  assert isinstance(found['conv1/kernel'], first) and isinstance(found['fc/kernel'], first)
  assert found['conv2/kernel'] == found['conv3/kernel'] == inner
  config.choices[name].edges = 32
  floats = experiment.make_plan(config, name, params, None)
  assert {entry.path for entry in floats.quantized} == {'conv2/kernel', 'conv3/kernel'}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'settings': ('mixture5',)}, 'unknown setting'),
    ({'choices.mixture4.kind': 'best'}, 'mixture, levels'),
    ({'choices.interval4.levels': 'odd'}, 'power_of_two'),
    ({'choices.mixture4.bits': 1}, 'components=2'),
    ({'soft.optimizer': 'lamb'}, 'soft.optimizer'),
    ({'mapping.lr': 0.0}, 'mapping needs'),
    ({'transfer.kept': ('mixture4',)}, 'only from config.transfer.data'),
    ({'transfer.data': 'cifar10', 'transfer.kept': ('binary',)}, 'only mixtures are kept'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config('resnet20')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=re.escape(message)):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/dgms.py:resnet20,seeds=1', '--workdir=x', '--config.soft.lr=0.1']
  assert experiment.parse_command(argv).config.soft.lr == 0.1
  with pytest.raises(Exception, match='lrr'):
    experiment.parse_command([*argv, '--config.soft.lrr=0.2'])


def test_mixtures_in_files():
  params = tiny_conv.init(jax.random.key(0)).params
  plan = quantize.make_plan(params, [('conv2/kernel', quantize.Mixture(4))])
  mixtures = quantize.init_dgms(params, plan)
  stored = experiment.as_dicts(mixtures)
  assert set(flatten_dict(stored, sep='/')) == {
    f'conv2/kernel/{name}' for name in quantize.MixtureLeaf._fields
  }
  back = experiment.as_mixtures(stored)
  assert isinstance(back['conv2']['kernel'], quantize.MixtureLeaf)
  seen = [quantize.effective_params(params, m, 'hard') for m in (mixtures, back)]
  jax.tree.map(np.testing.assert_array_equal, *seen)


def test_means_learn_at_their_own_rate():
  config = configs.get_config('')
  links = experiment.scaled(config.rates)
  leaf = {name: jnp.ones(3) for name in quantize.MixtureLeaf._fields}
  tree = {'params': {'w': jnp.ones(2)}, 'codebooks': {'w': leaf}}
  updates, _ = links.update(tree, links.init(tree), tree)
  assert updates['params']['w'][0] == 1
  found = {name: float(x[0]) for name, x in updates['codebooks']['w'].items()}
  assert found == pytest.approx({'mu': 0.02, 'log_sigma': 0.02, 'pi': 0.02, 'log_tau': 0.0})


# ---------------------------------------------------------------------------- runs


def small(monkeypatch):
  """Settings for the network of three convolutions, a second each."""
  monkeypatch.setattr(cifar, 'make_task', lambda config, mesh: (tiny_conv.task(), None))
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  config = configs.base('own_resnet20')
  config.data.update(name='synthetic', train_split='train', test_split='test')
  config.edges = ('conv1/kernel', 'fc/kernel')
  config.settings = ('mixture2', 'interval2', 'uniform3', 'binary')
  for phase in ('dense', *experiment.PHASES):
    config[phase].optimizer, config[phase].lr, config[phase].epochs = 'adam', 0.01, 1.0
  config.rates.update(mu=1.0, sigma=1.0, pi=1.0)
  config.dense.epochs, config.pull.refreshes = 2.0, 2
  config.choices.mixture2.goals = (('change', -99.0),)
  return config


@pytest.mark.promotes('optax')
def test_settings_are_trained_to_exact_levels_compared_and_recorded(tmp_path, monkeypatch, capsys):
  config = small(monkeypatch)
  config.record = True
  monkeypatch.setattr(cifar, 'described', lambda config: 'synthetic test')
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  rows = experiment.experiment(config, tmp_path / 'run')
  assert [row['setting'] for row in rows] == list(config.settings)
  dense = cp.load_variables(
    tmp_path / 'run/seed0/dense/variables.npz', tiny_conv.init(jax.random.key(0))
  )
  for row in rows:
    name = row['setting']
    folder = tmp_path / 'run' / 'seed0' / name
    done = cp.load_variables(folder / 'variables.npz', dense)
    plan = experiment.make_plan(config, name, dense.params, None)
    for entry in plan.quantized:
      kernel = np.asarray(done.params[entry.path.split('/')[0]]['kernel'])
      groups = [kernel] if entry.quantizer.groups == 'layer' else np.moveaxis(kernel, -1, 0)
      assert max(len(np.unique(group)) for group in groups) <= entry.quantizer.count, entry.path
      # Trained, not only rounded.
      assert np.abs(kernel - np.asarray(dense.params[entry.path.split('/')[0]]['kernel'])).max() > 0
    # What was scored is what the file holds.
    scored = tiny_conv.task().score(done)['test']
    assert row['value'] == pytest.approx(100 * scored.mean())
  bits = {row['setting']: row['bits_per_weight'] for row in rows}
  assert bits['binary'] < bits['mixture2'] < bits['uniform3'] < 8

  page = (tmp_path / 'run' / 'report.html').read_text()
  for words in ('Levels over time: mixture2', 'Weights of conv3/kernel: binary', 'Quality against'):
    assert words in page
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == rows
  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  found = {(row.run, row.metric): row for row in written}
  assert found['dgms/synthetic/own_resnet20/mixture2', 'change'].reached == 'yes'

  # Again: nothing is trained, nothing recorded twice, the same numbers.
  capsys.readouterr()
  assert experiment.experiment(config, tmp_path / 'run') == rows
  assert ledger.read(tmp_path / 'results.csv')[0] == written
  assert ' steps' not in capsys.readouterr().out


def test_a_body_moves_to_another_classifier():
  own, donor = (tiny_conv.init(jax.random.key(i)) for i in (0, 1))
  wider = {**own.params, 'fc': {'kernel': jnp.zeros((32, 5))}}
  state = {'batch_stats': {'bn': {'mean': jnp.zeros(3)}}}
  given = donor._replace(model_state={'batch_stats': {'bn': {'mean': jnp.ones(3)}}})
  found = experiment.with_body(given, own._replace(params=wider, model_state=state))
  np.testing.assert_array_equal(found.params['conv2']['kernel'], donor.params['conv2']['kernel'])
  assert not found.params['fc']['kernel'].any()
  assert found.model_state['batch_stats']['bn']['mean'].tolist() == [1, 1, 1]
  with pytest.raises(ValueError, match='no array of this one'):
    experiment.with_body(given._replace(params={'other': jnp.ones(2)}), own)


def test_the_other_data_have_their_own_weights():
  config = configs.get_config('transfer')
  origin = experiment.source(config)
  assert (config.data.name, origin.data.name) == ('cifar100', 'cifar10')
  assert (config.model.weights, origin.model.weights) == ('', 'cifar10_resnet20.npz')
  assert origin.dense.epochs == 0 < config.dense.epochs
  # Float and quantized networks see the new data for as long.
  assert config.dense.epochs == experiment.epochs(config, config.choices.mixture4_kept)
  assert experiment.source(configs.get_config('')) is None


@pytest.mark.promotes('optax')
def test_mixtures_are_kept_on_other_data(tmp_path, monkeypatch):
  config = small(monkeypatch)
  base = tiny_conv.task()
  there = base._replace(init=lambda key: tiny_conv.init(jax.random.key(7)))
  monkeypatch.setattr(
    cifar, 'make_task', lambda c, mesh: (there if c.data.name == 'elsewhere' else base, None)
  )
  config.transfer.data, config.transfer.kept = 'elsewhere', ('mixture2',)
  config.choices.mixture2.soft = config.choices.mixture3.soft = False
  config.settings = ('mixture2', 'mixture3')
  rows = experiment.experiment(config, tmp_path)
  assert [row['setting'] for row in rows] == ['mixture2', 'mixture3']

  def levels_of(folder):
    like = base.init(jax.random.key(0))
    done = cp.load_variables(tmp_path / 'seed0' / folder / 'variables.npz', like)
    return {
      name: set(np.unique(done.params[name]['kernel'])) - {0.0} for name in ('conv2', 'conv3')
    }

  kept, donor = levels_of('mixture2'), levels_of('source/mixture2')
  for name, found in kept.items():
    assert found and found <= donor[name]
  # Afresh: other levels, from weights that are not those of its own random start.
  fresh = levels_of('mixture3')
  assert not fresh['conv2'] & donor['conv2']
  # Both begin with the other network's body.
  start = cp.load_variables(
    tmp_path / 'seed0' / 'dense' / 'variables.npz', base.init(jax.random.key(0))
  )
  body = tiny_conv.init(jax.random.key(7)).params['conv2']['kernel']
  assert np.abs(np.asarray(start.params['conv2']['kernel']) - body).max() < 0.3


def test_gradients_reach_weights_and_means_through_the_levels():
  params = tiny_conv.init(jax.random.key(0)).params
  plan = quantize.make_plan(params, [('conv2/kernel', quantize.Mixture(4))])
  trained = {
    'params': params,
    'codebooks': experiment.as_dicts(quantize.init_dgms(params, plan)),
  }
  task = tiny_conv.task()

  def view(trained):
    return quantize.effective_params(
      trained['params'], experiment.as_mixtures(trained['codebooks']), 'ste'
    )

  inside = levels.seen_as(task, view)
  batch, key = next(task.loader(0)), jax.random.key(0)
  loss, grads = jax.value_and_grad(lambda t: inside.loss_fn(t, {}, batch, key)[0])(trained)
  plain = task.loss_fn(view(trained), {}, batch, key)[0]
  assert loss == plain and loss != task.loss_fn(params, {}, batch, key)[0]
  assert np.abs(grads['params']['conv2']['kernel']).max() > 0
  assert np.abs(grads['codebooks']['conv2']['kernel']['mu']).max() > 0
