"""Patterns and connectivity beside other structures: equal rates, stored bytes, a whole small run."""

import json

import jax
import numpy as np
import pytest

from configs import pconv as configs
from experiments import compression as cp
from experiments import kernels, ledger, tasks
from experiments import pconv as experiment
from fqjax import models, rules, sparsity, train
from fqjax.runtime import codecs
from tests.experiments import tiny_conv
from tests.experiments.test_pattern import IMAGES, shapes, traced, way


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  assert config.settings
  experiment.check(config)
  config.to_json_best_effort()


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_pulls_come_some_way_between_refreshes(preset):
  config = configs.get_config(preset)
  if config.pull.epochs:
    epoch = IMAGES[config.data.name] // config.data.batch_size
    assert way(config.pull, round(config.pull.epochs * epoch)) > 0.45


@pytest.fixture(scope='module')
def vgg():
  return shapes('vgg16_quarter')


@pytest.mark.parametrize('rate', ['alone', '8.4x'])
def test_kinds_are_compared_at_equal_rates(vgg, rate):
  params, layers = vgg
  config = configs.get_config('vgg16_quarter')
  plans = {
    kind: experiment.make_plan(config, f'{kind}_{rate}', params, layers) for kind in configs.KINDS
  }
  found = {kind: kernels.conv_rate(plan) for kind, plan in plans.items()}
  wanted = 8.4 if rate == '8.4x' else found['scp']
  # Whole filters of narrow layers come in large pieces.
  assert all(wanted <= r < 1.05 * wanted for r in found.values()), found
  kinds = {kind: {type(e.structure).__name__ for e in plan.pruned} for kind, plan in plans.items()}
  assert kinds == {
    'scp': {'Patterns'}, 'connectivity': {'Patterns'}, 'unstructured': {'Unstructured'},
    'filters': {'Filters'}, 'channels': {'Channels'},
  }  # fmt: skip
  for plan in plans.values():
    dense = [e.path for e in plan.entries if len(e.shape) > 1 and e.structure is None]
    assert dense == ['conv1_1/kernel', 'fc/kernel']
  (whole,) = {e.structure.masks for e in plans['connectivity'].pruned}
  assert whole == (511,)


def imagenet(name):
  model = models.create_model(name)
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return variables['params'], traced(model, variables, x)


def test_mobilenet_keeps_its_channels_and_resnet_reaches_the_published_rate():
  params, layers = imagenet('mobilenet_v2')
  config = configs.get_config('imagenet_mobilenet_v2')
  alone = experiment.make_plan(config, 'scp_alone', params, layers)
  assert len(alone.pruned) == 17
  assert all(e.structure.keep == 1 and e.shape[:3] == (3, 3, 1) for e in alone.pruned)
  half = experiment.make_plan(config, 'scp_2x', params, layers)
  assert 2 <= kernels.conv_rate(half) < 2.01
  params, layers = imagenet('resnet50')
  config = configs.get_config('imagenet_resnet50')
  plan = experiment.make_plan(config, 'scp_4.4x', params, layers)
  assert 4.4 <= kernels.conv_rate(plan) < 4.41
  config.pointwise = False
  with pytest.raises(ValueError, match='no pattern plan'):
    experiment.make_plan(config, 'scp_4.4x', params, layers)


def test_fkw_bytes_are_those_of_the_format():
  task = tiny_conv.task()
  params = task.init(jax.random.key(0)).params
  masks = sparsity.pattern_set('elog4')
  plan = kernels.plan_at(4.0, params, task.layers, 'pattern', masks)
  pruned, live = rules.finalize(plan, params)
  found = kernels.fkw(cp.Rung(plan, tasks.Variables(pruned, {}), live, {}, {}))
  index = rows = values = 0
  for name in ('conv2', 'conv3'):
    o = tiny_conv.SHAPES[name][3]
    kept = int(np.count_nonzero(pruned[name]['kernel'])) // 4
    # Offsets, order, strides of four patterns, one byte for each kernel.
    index += 32 * (o + 1) + 16 * o + 16 * o * 5 + 8 * kept
    rows += 32 * (o + 1) + 32 * 4 * kept
    values += 32 * 4 * kept
  heads = {
    name: codecs.CODECS[name].bits(encoded).tables
    for name, encoded in (
      ('fkw', codecs.fkw.encode(np.ones((1, 1, 9), np.float32) * (np.arange(9) < 4), (15,))),
      ('csr', codecs.csr.encode(np.ones((1, 1), np.float32))),
    )
  }
  heads['fkw'] += 16 * (len(masks) - 1)
  assert found['fkw_bytes'] == pytest.approx((index + values) / 8 + 2 * heads['fkw'] / 8, abs=8)
  assert found['csr_bytes'] == pytest.approx((rows + values) / 8 + 2 * heads['csr'] / 8, abs=8)
  want = 1 - (index + 2 * heads['fkw']) / (rows + 2 * heads['csr'])
  assert found['index_saving'] == pytest.approx(100 * want, abs=0.5)
  filters = kernels.plan(params, task.layers, 'filters', 0.5)
  pruned, live = rules.finalize(filters, params)
  assert kernels.fkw(cp.Rung(filters, tasks.Variables(pruned, {}), live, {}, {})) == {}


@pytest.mark.parametrize(
  'change, message',
  [
    ({'settings': ('scp',)}, 'KIND_RATEx'),
    ({'settings': ('blocks_4x',)}, 'KIND_RATEx'),
    ({'settings': ('scp_1x',)}, 'nothing smaller'),
    ({'library': 'elog'}, 'pattern set'),
    ({'goals': (('scp_8.4x', 'gain', 0.0),)}, "'gain'"),
    ({'retrain.lr': 0.0}, 'config.retrain'),
    ({'networks': ('resnet21',)}, 'unknown network'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config('vgg16_quarter')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/pconv.py:grid', '--workdir=x', '--config.pull.lr=0.1']
  assert experiment.parse_command(argv).config.pull.lr == 0.1
  with pytest.raises(Exception, match='lrr'):
    experiment.parse_command([*argv, '--config.pull.lrr=0.2'])


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_smoke_run_reports_records_and_goes_on(tmp_path, capsys, monkeypatch):
  pytest.importorskip('skimage')
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  config = configs.get_config('smoke')
  config.dense.epochs = config.retrain.epochs = 1.0
  config.pull.update(epochs=1.0, rho=(1e-2,))
  config.goals = (('scp_4x', 'conv_compression', 4.0),)
  config.record = True
  rows = experiment.experiment(config, tmp_path / 'run')
  assert [row['setting'] for row in rows] == ['scp_4x', 'filters_4x']
  assert all(row['conv_compression'] >= 4.0 for row in rows)
  assert 'fkw_bytes' in rows[0] and 'fkw_bytes' not in rows[1]
  assert json.loads((tmp_path / 'run/results.json').read_text()) == rows
  page = (tmp_path / 'run/report.html').read_text()
  for title in (
    'Patterns of scp_4x',
    'ADMM gap',
    'What is lost',
    'Ready to run',
    'What every layer',
  ):
    assert title in page, title
  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  (rate,) = (r for r in written if r.metric == 'conv_compression' and r.goal)
  assert rate.run == 'pconv/photo_patches/vgg16_eighth/scp_4x' and rate.reached == 'yes'
  assert 'trained on 800 images, 2 epochs' in rate.data
  capsys.readouterr()
  assert experiment.experiment(config, tmp_path / 'run') == rows
  said = capsys.readouterr().out
  assert 'steps' not in said and 'in the ledger already' in said
