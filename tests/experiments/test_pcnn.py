"""Kernels that keep n taps: plans, rates of the paper's table, the accelerator, whole small runs."""

from collections import Counter
import json
import re

import jax
import ml_collections
import numpy as np
import pytest

from configs import pcnn as configs
from experiments import cifar, harness, ledger, outcome, tasks
from experiments import compression as cp
from experiments import pcnn as experiment
from fqjax import models, rules, sparsity, train
from tests.experiments import tiny_conv


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  experiment.check(config)
  config.to_json_best_effort()


def test_arguments_are_read():
  config = configs.get_config('vgg16_quarter,settings=n1v4+n2v8_half,seeds=2,one_shot')
  assert config.settings == ('n1v4', 'n2v8_half') and config.seeds == (0, 1)
  assert config.model.options.width == 0.25 and config.dense.epochs == 15.0
  assert config.admm.epochs == config.retrain.epochs == 0.0
  assert configs.get_config('').model.weights == 'cifar10_resnet20.npz'
  assert configs.get_config('grid,network=own_resnet20').model.weights == ''
  # Settings are chosen on a network that has not seen what they are judged by.
  chosen = configs.get_config('chosen')
  assert chosen.model.weights == '' and chosen.data.held_out_split == 'train[90%:]'


# ---------------------------------------------------------------------------- rates

TABLE = {  # n, patterns: weights only, with codes at 32 and at 8 bits
  'n4v8': (2.25, 2.198, 2.057),
  'n2v8': (4.50, 4.299, 3.789),
  'n1v8': (9.00, 8.229, 6.545),
  'n1v4': (9.00, 8.471, 7.200),
  # Besides a bit for every kernel, and codes and values of a part of them.
  'n4v8_quarter': (9 / (4 * 0.253), 288 / (1 + 0.253 * 131), 72 / (1 + 0.253 * 35)),
  'n2v8_half': (9 / (2 * 0.494), 288 / (1 + 0.494 * 67), 72 / (1 + 0.494 * 19)),
}


@pytest.mark.parametrize('name', TABLE)
def test_rates_are_those_of_the_papers_table(name):
  config = configs.get_config('')
  rng = np.random.default_rng(0)
  # As many kernels that a codebook and a header per layer do not count.
  kernels = {'conv1/kernel': (3, 3, 3, 4), 'layer1_0/conv1/kernel': (3, 3, 192, 256)}
  params = {
    path.split('/')[0]: rng.normal(size=shape).astype(np.float32) for path, shape in kernels.items()
  }
  params = {
    'conv1': {'kernel': params['conv1']},
    'layer1_0': {'conv1': {'kernel': params['layer1_0']}},
    'fc': {'kernel': np.ones((256, 10), np.float32)},
  }
  layers = {path: sparsity.Layer(macs=100 * int(np.prod(s))) for path, s in kernels.items()}
  layers['fc/kernel'] = sparsity.Layer(macs=2560)
  plan = experiment.make_plan(config, name, params, layers)
  pruned, _ = rules.finalize(plan, params)
  found = experiment.rates(plan, pruned, layers)
  weights, stored, at_8_bits = TABLE[name]
  # Within what the first layer at n = 4, the tables and the headers cost.
  np.testing.assert_allclose(found['conv_compression'], weights, rtol=1e-3)
  np.testing.assert_allclose(found['conv_compression_bytes'], stored, rtol=2e-3)
  np.testing.assert_allclose(found['conv_compression_8bit'], at_8_bits, rtol=5e-3)
  np.testing.assert_allclose(found['speedup'], weights, rtol=1e-3)
  assert found['conv_compression_bytes'] < stored + 1e-3  # nothing is left out
  if name in configs.get_config('vgg16').settings[2:]:
    assert found['conv_compression_bytes'] > 8.4


def network(name):
  """Parameters of a CIFAR network, drawn, and its layers."""
  config = cifar.fields(name)
  model = models.create_model(config.model.name, **config.model.options)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), variables['params'])
  stats = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), variables['batch_stats'])
  layers = sparsity.trace_layers(
    lambda p, x: model.apply({'params': p, 'batch_stats': stats}, x), variables['params'], x
  )
  return params, layers


def test_plan_of_resnet20():
  config = configs.get_config('resnet20')
  params, layers = network('resnet20')
  plan = experiment.make_plan(config, 'n1v8', params, layers)
  entries = {entry.path: entry for entry in plan.pruned}
  assert len(entries) == 19 and 'fc/kernel' not in entries
  for path, entry in entries.items():
    masks = entry.structure.masks
    n = 4 if path == 'conv1/kernel' else 1
    assert {mask.bit_count() for mask in masks} == {n} and len(masks) <= 8
    assert entry.kept == n * entry.shape[2] * entry.shape[3]
  assert len({entry.structure.masks for entry in plan.pruned}) > 1  # each layer its own


@pytest.mark.full
def test_resnet18_leaves_shortcuts_dense():
  config = configs.get_config('resnet18')
  params, layers = network('resnet18')
  for name, rate in (('n2v8', 4.270), ('n1v8', 8.012)):
    plan = experiment.make_plan(config, name, params, layers)
    assert not any('downsample' in entry.path for entry in plan.pruned)
    pruned, _ = rules.finalize(plan, params)
    found = experiment.rates(plan, pruned, layers)
    np.testing.assert_allclose(found['conv_compression'], rate, rtol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize('name', ['n4v8_quarter', 'n2v8_half', 'n1v4'])
@pytest.mark.parametrize('vgg', ['vgg16_quarter', 'vgg16'])
def test_vgg_at_8_point_4(vgg, name):
  config = configs.get_config(vgg)
  assert ('conv_compression_bytes', 8.4) in config.patterns[name].goals
  params, layers = network(vgg)
  plan = experiment.make_plan(config, name, params, layers, 'votes')
  pruned, _ = rules.finalize(plan, params)
  assert 8.4 <= experiment.rates(plan, pruned, layers)['conv_compression_bytes'] < 8.5


# ---------------------------------------------------------------------------- accelerator


def test_accelerator_model_gives_the_published_figures(capsys):
  dense = experiment.accelerator(9, 1)
  np.testing.assert_allclose([dense.tops, dense.tops_per_watt], [0.1536, 3.154], rtol=1e-4)
  best = experiment.accelerator(1, 4)
  assert best.speedup == 9.0 and round(best.tops_per_watt, 2) == 28.39
  assert experiment.accelerator(4, 16).index_share == 3.125
  assert experiment.accelerator(2, 5).index_share == 100 * 3 / 64  # codes are whole bits
  outcome.show(experiment.accelerator_table())
  text = capsys.readouterr().out
  for words in ('computed, nothing measured', '9.00', '28.39 ', '3.1\n', '153.6 GOPS', '3.154 T'):
    assert words in text


# ---------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
  'change, message',
  [
    ({'settings': ('n5',)}, 'unknown setting'),
    ({'patterns.n1v8.codebook': 'best'}, 'greedy, votes'),
    ({'patterns.n1v8.layers': (('.*', 0, 8, 1.0),)}, 'taps and patterns'),
    ({'patterns.n1v8.layers': (('.*', 1, 8, 0.0),)}, 'kept share'),
    ({'patterns.n1v8.layers': (('.*', 1, 8),)}, 'needed are'),
    ({'patterns.n1v8.admm': {'optimizer': 'lamb'}}, 'patterns.n1v8.admm.optimizer'),
    ({'retrain.lr': 0.0}, 'retrain needs'),
    ({'networks': ('resnet19',)}, 'resnet19'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config('resnet20')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=re.escape(message)):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/pcnn.py:resnet20,seeds=1', '--workdir=x', '--config.admm.lr=0.1']
  assert experiment.parse_command(argv).config.admm.lr == 0.1
  with pytest.raises(Exception, match='lrr'):
    experiment.parse_command([*argv, '--config.admm.lrr=0.2'])


# ---------------------------------------------------------------------------- runs


def small(monkeypatch):
  """Settings for the network of three convolutions, a second each."""
  monkeypatch.setattr(cifar, 'make_task', lambda config, mesh: (tiny_conv.task(), None))
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  config = configs.base('own_resnet20')
  config.data.update(name='synthetic', train_split='train', test_split='test')
  config.patterns = ml_collections.ConfigDict()
  first, rest = 'conv1/kernel', 'conv[23]/kernel'
  config.patterns.half = configs.patterns(
    2, 4, layers=((first, 4, 8, 1.0), (rest, 2, 4, 0.5)), distil={'epochs': 1.0}
  )
  config.patterns.half.goals = (('conv_compression_bytes', 5.0), ('change', -99.0))
  config.settings = ('dense_retrained', 'half')
  for phase in ('dense', *experiment.PHASES):
    config[phase].optimizer, config[phase].lr = 'adam', 0.01
  config.dense.epochs, config.admm.epochs, config.retrain.epochs = 2.0, 2.0, 2.0
  config.admm.refreshes = 2
  return config


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_settings_are_pruned_compared_and_recorded(tmp_path, monkeypatch, capsys):
  config = small(monkeypatch)
  config.record = True
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  rows = experiment.experiment(config, tmp_path / 'run')
  assert [row['setting'] for row in rows] == list(config.settings)
  out = capsys.readouterr().out
  assert 'Accelerator model: computed' in out and 'energy kept' in out
  control, half = rows
  assert control['conv_compression'] == 1 and 'gain' not in control and 'gain' in half
  kernels = 3 * 8 + 8 * 16 + 16 * 16
  assert half['conv_compression'] == 9 * kernels / (4 * 24 + 2 * 192)
  assert 5 < half['conv_compression_bytes'] < half['conv_compression']
  assert 20 < half['kept_energy'] < 60
  assert (tmp_path / 'run' / 'seed0' / 'half' / 'distil').is_dir()
  page = (tmp_path / 'run' / 'report.html').read_text()
  for words in (
    'ADMM gap',
    'Patterns: half',
    'What every layer kept',
    'computed, nothing measured',
  ):
    assert words in page
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == rows

  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  found = {(row.run, row.metric): row for row in written}
  run = 'pcnn/synthetic/own_resnet20'
  assert found[f'{run}/half', 'conv_compression_bytes'].reached == 'yes'
  stored = found[f'{run}/half', 'conv_compression_8bit'].value
  assert stored == pytest.approx(half['conv_compression_8bit'], rel=1e-5)
  assert '5 epochs' in found[f'{run}/half', 'top1'].data
  assert found[f'{run}/dense', 'top1'].value == pytest.approx(half['dense'])

  # Again: nothing is trained, nothing recorded twice, the same numbers.
  assert experiment.experiment(config, tmp_path / 'run') == rows
  assert ledger.read(tmp_path / 'results.csv')[0] == written
  assert ' steps' not in capsys.readouterr().out


@pytest.mark.promotes('optax')
def test_no_epochs_cut_at_once_and_once(tmp_path, monkeypatch):
  config = small(monkeypatch)
  configs.cut_only(config)
  config.patterns.half.distil.epochs = 0.0
  config.settings, config.dense.epochs = ('half',), 0.0
  calls = []
  task = tiny_conv.task()
  counted = task._replace(score=lambda variables: calls.append(1) or task.score(variables))
  monkeypatch.setattr(cifar, 'make_task', lambda config, mesh: (counted, None))
  (row,) = experiment.experiment(config, tmp_path)
  assert row['value'] == row['cut'] and len(calls) == 2  # the dense network, and this one
  start = task.init(jax.random.key(0))
  plan = experiment.make_plan(config, 'half', start.params, task.layers)
  want, _ = rules.finalize(plan, start.params)
  stored = harness.load_tree(tmp_path / 'seed0' / 'half' / 'variables.npz')
  jax.tree.map(np.testing.assert_array_equal, stored['params'], want)
  assert experiment.experiment(config, tmp_path) == [row] and len(calls) == 2


def test_kernels_that_went_have_no_pattern():
  w = np.zeros((3, 3, 2, 2), np.float32)
  w[0, 0] = [[3, 2], [1, 0.5]]
  params = {'c': {'kernel': w}}
  plan = sparsity.make_plan(params, [('.*', sparsity.Patterns((1, 2), keep=0.5))])
  pruned, masks = rules.finalize(plan, params)
  rung = cp.Rung(plan, tasks.Variables(pruned, {}), masks, {}, {})
  assert experiment.pattern_counts(rung) == Counter({1: 2})
  assert experiment.kept_energy(plan, params) == pytest.approx(100 * 13 / 14.25)


def test_energy_against_votes():
  """Two kernels that are small outvote one that is large."""
  w = np.zeros((3, 3, 3, 1), np.float32)
  w[0, 0, :2], w[2, 2, 2] = 1.0, 9.0
  params, config = {'c': {'kernel': w}}, configs.get_config()
  config.patterns.n1v8.layers = (('.*', 1, 1, 1.0),)
  layers = {'c/kernel': sparsity.Layer(27)}
  for codebook, mask, energy in (('greedy', 256, 81), ('votes', 1, 2)):
    plan = experiment.make_plan(config, 'n1v8', params, layers, codebook)
    assert plan.pruned[0].structure.masks == (mask,)
    assert experiment.kept_energy(plan, params) == pytest.approx(100 * energy / 83)


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_smoke_run(tmp_path, capsys):
  pytest.importorskip('skimage')
  config = configs.get_config('smoke,settings=n1v4')
  config.dense.epochs = config.admm.epochs = config.retrain.epochs = 0.5
  (row,) = experiment.experiment(config, tmp_path)
  assert 6 < row['conv_compression'] < 9 and np.isfinite(row['held_out_change'])
  assert 'Best on held-out images: n1v4' in capsys.readouterr().out
  assert 'Patterns: n1v4' in (tmp_path / 'report.html').read_text()
