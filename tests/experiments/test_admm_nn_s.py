"""Pruning by ADMM: plans of the ladders, unused paths, the command, a whole small run."""

import json
import re

import jax
import numpy as np
import pytest

from configs import admm_nn_s as configs
from experiments import admm_nn_s as experiment
from experiments import compression as cp
from experiments import tasks
from fqjax import models, rules, sparsity

PRESETS = ('lenet5', 'resnet50', 'alexnet', 'vgg16', 'smoke')


@pytest.fixture(scope='module')
def lenet():
  model = models.create_model('lenet5')
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
  layers = sparsity.trace_layers(
    lambda p, x: model.apply({'params': p}, x), params, np.zeros((1, 28, 28, 1), np.float32)
  )
  return model, params, layers


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  experiment.check(config)
  config.to_json_best_effort()


def test_lenet_ladder_ends_at_the_published_rates(lenet):
  _, params, layers = lenet
  config = configs.get_config('lenet5')
  plans = experiment.ladder(config.rates.unstructured, params, layers)
  kept = [sum(entry.kept for entry in plan.pruned) for plan in plans]
  rates = {label: 430_500 / kept[i] for i, label, *_ in config.rates.unstructured.named}
  for label, rate in rates.items():
    assert rate >= float(re.search(r'\d+', label)[0]), (label, rate)
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
    ({'rates.unstructured.named': ((9, 'x', (), ''),)}, 'no rung 9'),
    ({'dense.optimizer': 'lamb'}, 'config.dense.optimizer'),
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


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_smoke_run_reports_and_goes_on(tmp_path, capsys):
  pytest.importorskip('skimage')
  config = configs.get_config('smoke')
  config.dense.epochs = config.admm.epochs = config.retrain.epochs = config.finish.epochs = 0.5
  rows = experiment.experiment(config, tmp_path)
  assert [(r['setting'], r['rung']) for r in rows] == [
    ('unstructured', 0), ('unstructured', 1), ('structured', 0),
  ]  # fmt: skip
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
