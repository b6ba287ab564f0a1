"""Pruning by ADMM: plans of the ladders, unused paths, the command, a whole small run."""

import json

import jax
import numpy as np
import pytest

from configs import admm_nn_s as configs
from experiments import admm_nn_s as experiment
from experiments import cifar, ledger, levels, tasks
from experiments import compression as cp
from fqjax import models, rules, sparsity, train
from tests.experiments import tiny_conv


@pytest.fixture(scope='module')
def lenet():
  model = models.create_model('lenet5')
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
  layers = sparsity.trace_layers(
    lambda p, x: model.apply({'params': p}, x), params, np.zeros((1, 28, 28, 1), np.float32)
  )
  return model, params, layers


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  experiment.check(config)
  config.to_json_best_effort()


def test_lenet_ladder_ends_at_the_published_rates(lenet):
  _, params, layers = lenet
  config = configs.get_config('lenet5')
  for name in ('unstructured', 'pooled', 'pooled_further', 'compact'):
    setting = config.rates[name]
    plans = experiment.ladder(setting, params, layers)
    kept = [int(sum(map(np.count_nonzero, jax.tree.leaves(sparsity.project(plan, params)[1]))))
            for plan in plans]  # fmt: skip
    asked = [(i, dict(goals)['compression']) for i, _, goals, _ in setting.named if goals]
    assert asked
    for i, rate in asked:
      assert 430_500 / kept[i] >= rate, (i, rate)
    assert kept == sorted(kept, reverse=True)
  structured = experiment.ladder(config.rates.structured, params, layers)
  assert all(sum(e.kept for e in p.pruned) < 430_500 / 6 for p in structured[1:])


def test_sliced_network_says_the_same(lenet, tmp_path):
  model, params, layers = lenet
  setting = configs.get_config('lenet5').rates.structured
  plan = experiment.ladder(setting, params, layers)[2]
  pruned, masks = rules.finalize(plan, params)
  rung = cp.Rung(plan, tasks.Variables(pruned, {}), masks, {}, {})

  class Task:
    sample = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)

  found = experiment.without_unused(model, rung, Task, tmp_path / 'removed.txt')
  assert found['sliced_error'] < 1e-5
  assert found['sliced_parameters'] < 0.3 * 431_080
  assert 'conv1' in (tmp_path / 'removed.txt').read_text()


@pytest.mark.parametrize(
  'change, message',
  [
    ({'settings': ('filters',)}, 'unknown setting'),
    ({'rates.unstructured.kind': 'random'}, 'kind'),
    ({'rates.unstructured.rungs': ((0.5,),)}, 'a rung of 1'),
    ({'rates.compact.start': 'unit', 'settings': ('compact',)}, "rates.compact.start='unit'"),
    ({'rates.units.start': 'compact', 'settings': ('compact',)}, "rates.units.start='compact'"),
    ({'rates.unstructured.named': ((9, 'x', (), ''),)}, 'no rung 9'),
    ({'dense.optimizer': 'lamb'}, 'config.dense.optimizer'),
    ({'mapping.lr': 0.0}, 'config.mapping needs'),
    ({'settings': ('interval3',), 'quantize.interval3.way': 'best'}, 'admm, straight'),
    ({'settings': ('interval3',), 'quantize.interval3.start': 'filters'}, "a dense network is ''"),
    ({'settings': ('interval3',), 'quantize.interval3.rungs': (9,)}, 'no rung 9'),
    ({'settings': ('interval3',), 'quantize.interval3.rungs': (0,)}, 'rung 3 is not among'),
    ({'settings': ('interval3',), 'quantize.interval3.levels': 'odd'}, 'power_of_two'),
    ({'settings': ('interval3',), 'quantize.interval3.bits': (('.*', 9),)}, 'bits=9'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config('lenet5')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/admm_nn_s.py:lenet5,seeds=1', '--workdir=x', '--config.admm.lr=0.1']
  assert experiment.parse_command(argv).config.admm.lr == 0.1
  with pytest.raises(Exception, match='lrr'):
    experiment.parse_command([*argv, '--config.admm.lrr=0.2'])


# ---------------------------------------------------------------------------- levels


@pytest.mark.parametrize('name', ['interval3', 'interval32', 'power_of_two3', 'interval4_sparser'])
def test_survivors_on_few_bits_reach_the_rate_of_their_goal(lenet, name):
  _, params, layers = lenet
  config = configs.get_config('lenet5_quantized')
  setting = config.quantize[name]
  ((rung, _, goals, _),) = setting.named
  ladder = experiment.ladder(config.rates[setting.start], params, layers)
  _, masks = rules.finalize(ladder[rung], params)
  plan = experiment.level_plan(setting, params, layers)
  found = levels.weights_only(levels.Quantized(plan, tasks.Variables(params, {}), {}, {}, masks))
  assert found['compression_values'] >= dict(goals)['compression_values'] == 3700
  live = {path: int(np.sum(masks[path]['kernel'])) for path in ('conv1', 'conv2', 'fc1', 'fc2')}
  if name == 'interval3':
    assert found['value_bytes'] == 3 * sum(live.values()) / 8
  if name == 'interval32':
    bits = 3 * (live['conv1'] + live['conv2']) + 2 * (live['fc1'] + live['fc2'])
    assert found['value_bytes'] == bits / 8


def test_a_binary_network_has_a_sign_for_every_weight(lenet):
  _, params, layers = lenet
  config = configs.get_config('lenet5_binary')
  for name in config.settings:
    plan = experiment.level_plan(config.quantize[name], params, layers)
    assert {entry.path for entry in plan.quantized} == {
      f'{layer}/kernel' for layer in ('conv1', 'conv2', 'fc1', 'fc2')
    }
    network = levels.Quantized(plan, tasks.Variables(params, {}), {}, {})
    assert levels.weights_only(network) == {'value_bytes': 430_500 / 8, 'compression_values': 32}


def test_only_what_is_needed_is_climbed():
  config = configs.get_config('lenet5,settings=interval3+binary')
  assert experiment.climbs(config) == {'pooled': 4}
  assert experiment.needed(config) == {('pooled', 3), ('', 0)}
  config.settings = ('interval4_sparser', 'unstructured')
  assert experiment.climbs(config) == {'pooled_further': 5, 'unstructured': 6}
  # In the order of the settings, as the tables have them.
  assert list(experiment.climbs(configs.get_config('smoke'))) == ['unstructured', 'structured']


def small(monkeypatch):
  """Settings for the network of three convolutions, seconds each."""
  monkeypatch.setattr(cifar, 'make_task', lambda config, mesh, **_: (tiny_conv.task(), None))
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  config = configs.base()
  config.data.update(name='synthetic', train_split='train', test_split='test')
  phases = ('dense', 'admm', 'gradual', 'retrain', 'finish', 'pull', 'mapping', 'straight')
  for phase in phases:
    config[phase].update(optimizer='adam', lr=0.01, epochs=1.0)
  config.dense.epochs, config.admm.rho, config.pull.rho = 2.0, (0.1,), (0.1,)
  config.admm.refreshes = config.pull.refreshes = 1
  layers = ('conv1/kernel', 'conv2/kernel', 'conv3/kernel', 'fc/kernel')
  config.rates.unstructured = configs.ladder('unstructured', layers, ((0.5,) * 4, (0.25,) * 4))
  goals = (('compression_values', 40.0),)
  config.quantize.interval2 = configs.levels('unstructured', 2, (1,), ((1, 'two', goals, ''),))
  config.quantize.binary = configs.levels(
    '', 1, named=((0, 'binary', (), ''),), levels='binary', way='straight'
  )
  config.settings = ('unstructured', 'interval2', 'binary')
  return config


@pytest.mark.promotes('optax')
def test_survivors_and_dense_networks_go_on_levels(tmp_path, monkeypatch, capsys):
  config = small(monkeypatch)
  config.record = True
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  rows = experiment.experiment(config, tmp_path / 'run')
  assert [(r['setting'], r['rung']) for r in rows] == [
    ('unstructured', 0), ('unstructured', 1), ('interval2', 1), ('binary', 0),
  ]  # fmt: skip
  seed = tmp_path / 'run' / 'seed0'
  like = tiny_conv.init(jax.random.key(0))
  rung = cp.load_variables(seed / 'unstructured' / '01-retrain' / 'variables.npz', like)
  for name, folder, levels_of in (('interval2', '01', 4), ('binary', '00', 2)):
    done = cp.load_variables(seed / name / folder / 'variables.npz', like)
    for layer, kernel in done.params.items():
      kernel, start = np.asarray(kernel['kernel']), np.asarray(rung.params[layer]['kernel'])
      assert len(np.unique(kernel[kernel != 0])) <= levels_of
      if name == 'interval2':  # what was dead stays dead, what lived lives
        np.testing.assert_array_equal(kernel != 0, start != 0)
        assert np.abs(kernel - start).max() > 0
      else:
        assert np.all(kernel != 0)
  # While it trained, too: nothing had to be cut off again.
  for phase in ('pull', 'mapping'):
    trained = cp.load_variables(seed / 'interval2' / '01' / phase / 'variables.npz', like)
    for layer, kernel in trained.params.items():
      dead = np.asarray(rung.params[layer]['kernel']) == 0
      np.testing.assert_array_equal(np.asarray(kernel['kernel'])[dead], 0)
  by_name = {(r['setting'], r['rung']): r for r in rows}
  kept = by_name['unstructured', 1]['kept']
  assert by_name['interval2', 1]['kept'] == kept
  assert by_name['interval2', 1]['value_bytes'] == 2 * kept / 8
  assert by_name['interval2', 1]['compression_values'] > 60
  assert by_name['binary', 0]['compression_values'] == 32
  # The honest size: values, index, tables, headers.
  assert by_name['interval2', 1]['stored_bytes'] > by_name['interval2', 1]['value_bytes']
  assert by_name['binary', 0]['value'] > 60

  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'Weights of conv3/kernel: interval2' in page and 'What every layer kept' in page
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == rows
  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  found = {(row.run, row.metric): row for row in written}
  assert found['admm_nn_s/synthetic/resnet50/two', 'compression_values'].reached == 'yes'

  capsys.readouterr()
  assert experiment.experiment(config, tmp_path / 'run') == rows
  assert ' steps' not in capsys.readouterr().out


@pytest.mark.promotes('optax')
def test_a_ladder_begins_where_another_ends(tmp_path, monkeypatch, capsys):
  config = small(monkeypatch)
  config.rates.units = configs.ladder('units', ('conv1/kernel', 'conv2/kernel'), ((0.5, 0.25),))
  config.rates.compact = configs.ladder('pooled', ('.*/kernel',), ((0.2,),), start='units')
  config.settings, config.gradual.renewals = ('compact',), 3
  (row,) = experiment.experiment(config, tmp_path)
  assert row['setting'] == 'compact' and abs(row['kept'] / row['weights'] - 0.2) < 0.002
  like = tiny_conv.init(jax.random.key(0))
  read = lambda name: jax.tree.map(
    lambda w: np.asarray(w) != 0,
    cp.load_variables(tmp_path / 'seed0' / name / '00-retrain' / 'variables.npz', like).params,
  )
  units, compact = read('units'), read('compact')
  for layer, alive in (('conv1', 4), ('conv2', 4)):
    filters = units[layer]['kernel'].any((0, 1, 2))
    assert filters.sum() == alive and units[layer]['kernel'][..., filters].all()
  for layer in units:  # what died stays dead
    assert not np.any(compact[layer]['kernel'] & ~units[layer]['kernel'])
  # The units are not trained again by a run that asks for them too.
  capsys.readouterr()
  config.settings = ('units', 'compact')
  found = experiment.experiment(config, tmp_path)
  assert [r['setting'] for r in found] == ['units', 'compact'] and found[1] == row
  assert ' steps' not in capsys.readouterr().out


def test_what_is_alive_of_what_has_masks():
  masks = {'a': np.array([True, False]), 'b': None, 'c': np.zeros((2, 3), bool)}
  assert experiment.alive_share(masks) == 1 / 8
  assert experiment.alive_share(None) == experiment.alive_share({'b': None}) == 1.0


def test_sections_that_came_later_do_not_stop_an_older_run(tmp_path, monkeypatch):
  config = small(monkeypatch)
  old = json.loads(config.to_json_best_effort())
  for section in ('quantize', 'pull', 'mapping', 'straight'):
    del old[section]
  # Within a section that was there: a ladder that came later, and a field that says nothing.
  config.rates.later = configs.ladder('pooled', ('.*/kernel',), ((0.1,),), start='unstructured')
  del old['rates']['unstructured']['start']
  (tmp_path / 'config.json').write_text(json.dumps(old))
  experiment.harness.check_same_experiment(tmp_path, config, experiment._FREE)
  config.rates.unstructured.start = 'later'
  with pytest.raises(ValueError, match='rates.unstructured.start: None there, later now'):
    experiment.harness.check_same_experiment(tmp_path, config, experiment._FREE)
  config.rates.unstructured.start = ''
  config.model.options.width = 0.5  # of options that were empty
  with pytest.raises(ValueError, match='model.options.width: None there'):
    experiment.harness.check_same_experiment(tmp_path, config, experiment._FREE)
  del config.model.options.width
  old['dense']['lr'] = 7.0
  (tmp_path / 'config.json').write_text(json.dumps(old))
  with pytest.raises(ValueError, match='dense.lr: 7.0 there'):
    experiment.harness.check_same_experiment(tmp_path, config, experiment._FREE)


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_smoke_run_reports_and_goes_on(tmp_path, capsys):
  pytest.importorskip('skimage')
  config = configs.get_config('smoke')
  for phase in ('dense', 'admm', 'retrain', 'finish', 'pull', 'mapping', 'straight'):
    config[phase].epochs = 0.5
  rows = experiment.experiment(config, tmp_path)
  assert [(r['setting'], r['rung']) for r in rows] == [
    ('unstructured', 0), ('unstructured', 1), ('structured', 0),
    ('binary', 0), ('interval3', 1), ('interval3_structured', 0),
  ]  # fmt: skip
  assert rows[4]['compression_values'] > 30
  assert 'Unstructured against structured, in bytes' in capsys.readouterr().out
  assert rows[1]['compression'] > 3 and rows[0]['compression_bytes'] > 1.5
  assert rows[2]['sliced_error'] < 1e-4
  page = (tmp_path / 'report.html').read_text()
  assert 'Quality against size' in page and 'What every layer kept' in page
  assert json.loads((tmp_path / 'results.json').read_text()) == rows
  capsys.readouterr()
  assert experiment.experiment(config, tmp_path) == rows
  assert 'eta' not in capsys.readouterr().out
  config.admm.lr = 1.0
  with pytest.raises(ValueError, match='another configuration'):
    experiment.experiment(config, tmp_path)
