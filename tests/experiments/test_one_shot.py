"""One-shot: settings, what counts as large by inputs, numbers beside the float network, resume."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import one_shot as configs
from experiments import ledger, tasks
from experiments import one_shot as experiment
from fqjax import rules, sparsity, train


@pytest.mark.parametrize('preset', ['mobilenet_v2', 'smoke'])
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.mobilenet_v2().keys())
  experiment.check(config)


def test_every_structure_meets_every_sparsity_and_criterion():
  config = configs.get_config('mobilenet_v2,structures=unstructured+blocks2x4')
  names = [setting.name for setting in experiment.settings(config)]
  assert len(names) == len(set(names)) == 2 * 3 * 2
  assert names[0] == 'unstructured_50' and 'blocks2x4_by_inputs_65' in names


@pytest.mark.parametrize(
  'change, message',
  [
    ({'structures': ('blocks4',)}, 'blocks1x4'),
    ({'sparsities': (1.0,)}, 'in \\(0, 1\\)'),
    ({'criteria': ('gradients',)}, 'weights, inputs'),
    ({'data.calibration_images': 100}, 'batches of'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/one_shot.py:smoke,criteria=inputs', '--workdir=x']
  assert experiment.parse_command(argv).config.criteria == ('inputs',)
  with pytest.raises(Exception, match='resise'):
    experiment.parse_command([*argv, '--config.data.resise=2'])


class Pointwise(nn.Module):
  """Two 1x1 convolutions, the second behind a batch norm."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (1, 1), use_bias=False, name='expand')(x)
    x = nn.relu(nn.BatchNorm(not train, name='bn')(x))
    x = nn.Conv(4, (1, 1), use_bias=False, name='project')(x)
    return x.mean((1, 2))


X = (np.random.default_rng(0).normal(size=(12, 3, 3, 4)) * [1, 2, 4, 8]).astype(np.float32)
LABELS = np.arange(12) % 4


def make_network(config, mesh):
  model = Pointwise()
  dense = tasks.split(model.init(jax.random.key(0), X[:1]))

  def apply(variables, **kwargs):
    return model.apply({'params': variables.params, **variables.model_state}, X, **kwargs)

  layers = sparsity.trace_layers(
    lambda p: model.apply({'params': p, **dense.model_state}, X), dense.params
  )
  task = tasks.Task(
    *[None] * 3, 1, None, lambda: iter([X]),
    lambda p, s, x: model.apply({'params': p, **s}, x, train=True, mutable=['batch_stats'])[1],
    layers,
  )  # fmt: skip
  energy = lambda: jax.device_get(experiment.inputs_squared(lambda: apply(dense)))
  logits = lambda variables: np.asarray(apply(variables))
  return experiment.Network(task, dense, logits, LABELS, energy)


def small():
  config = configs.get_config('structures=unstructured+blocks1x4')
  config.layers, config.sparsities = 'project/kernel|expand/kernel', (0.5,)
  return config


def test_inputs_of_convolutions_are_measured():
  network = make_network(None, None)
  energy = network.input_energy()
  np.testing.assert_allclose(energy['expand/kernel'], np.mean(X**2, (0, 1, 2)), rtol=1e-5)
  params = jax.device_get(network.dense.params)
  y = X @ params['expand']['kernel'][0, 0]  # the statistics of the norm are 0 and 1
  y = np.maximum(y / np.sqrt(1 + 1e-5), 0)
  np.testing.assert_allclose(energy['project/kernel'], np.mean(y**2, (0, 1, 2)), rtol=1e-4)


def test_first_and_last_layers_stay_dense_and_others_rank_by_inputs():
  params = {name: {'kernel': np.ones((1, 1, 4, 2), np.float32)} for name in 'abc'}
  params['b']['kernel'] *= np.array([8, 4, 2, 1.5], np.float32)[None, None, :, None]
  layers = {f'{name}/kernel': sparsity.Layer(8, layout='HWIO') for name in 'abc'}
  energy = {f'{name}/kernel': np.array([0.01, 1, 9, 16], np.float32) for name in 'abc'}
  task = tasks.Task(*[None] * 7, layers)
  network = experiment.Network(task, tasks.Variables(params, {}), None, None, lambda: energy)
  config = configs.get_config()
  config.layers = '[abc]/kernel'
  plan = experiment.make_plan(config, experiment.Setting('unstructured', 0.5, 'inputs'), network)
  assert [entry.path for entry in plan.pruned] == ['b/kernel']
  saliency = experiment.input_saliency(network, plan)
  np.testing.assert_allclose(saliency['b']['kernel'][0, 0, :, 0], [0.64, 16, 36, 36])
  assert saliency['a']['kernel'] is None
  _, masks = rules.finalize(plan, params, saliency=saliency)
  np.testing.assert_array_equal(masks['b']['kernel'][0, 0, :, 1], [False, False, True, True])
  _, masks = rules.finalize(plan, params)
  np.testing.assert_array_equal(masks['b']['kernel'][0, 0, :, 1], [True, True, False, False])


def test_networks_are_cut_compared_and_read_back(tmp_path, monkeypatch, capsys):
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  monkeypatch.setattr(
    experiment, 'make_plan',
    lambda config, setting, network: sparsity.make_plan(
      network.dense.params, [(config.layers, experiment._structure(setting.structure, 0.5))]
    ),
  )  # fmt: skip
  looked = []

  def counted(config, mesh):
    network = make_network(config, mesh)
    return network._replace(logits=lambda v: looked.append(v) or network.logits(v))

  monkeypatch.setattr(experiment, 'make_network', counted)
  config = small()
  config.record = True
  rows = experiment.experiment(config, tmp_path / 'run')
  assert [row['setting'] for row in rows] == [
    'recalibrated', 'unstructured_50', 'blocks1x4_50',
    'unstructured_by_inputs_50', 'blocks1x4_by_inputs_50',
  ]  # fmt: skip
  assert [row['compression'] for row in rows] == [1, 2, 2, 2, 2]
  # The first network looked at is the float one, then come its statistics, then what was cut.
  dense, cut = (make_network(None, None).logits(looked[i]) for i in (0, 2))
  row = rows[1]
  assert row['right'] == np.sum(cut.argmax(-1) == LABELS) and row['samples'] == 12
  assert row['dense_right'] == np.sum(dense.argmax(-1) == LABELS)
  assert row['change'] == pytest.approx(100 / 12 * (row['right'] - row['dense_right']))
  assert row['agreement'] == pytest.approx(100 * np.mean(cut.argmax(-1) == dense.argmax(-1)))
  assert row['logit_error'] == pytest.approx(np.mean(np.abs(cut - dense)))
  # Statistics are of the weights that are left.
  z = X @ np.asarray(looked[2].params['expand']['kernel'])[0, 0]
  np.testing.assert_allclose(
    looked[2].model_state['batch_stats']['bn']['mean'], z.mean((0, 1, 2)), atol=1e-5
  )
  assert np.count_nonzero(looked[2].params['expand']['kernel']) == 16

  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'Accuracy against sparsity' in page and 'agreement' in page
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == rows
  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  found = {(r.run.rsplit('/', 1)[-1], r.metric): r for r in written}
  assert {m for n, m in found if n == 'blocks1x4_50'} >= {'top1', 'agreement', 'logit_error'}
  assert found['dense', 'top1'].samples == 12
  assert 'published mobilenet_v2_1.0_224.npz' in found['unstructured_50', 'top1'].data

  count = len(looked)
  assert experiment.experiment(config, tmp_path / 'run') == rows and len(looked) == count
  assert 'in the ledger already' in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.data
def test_published_mobilenet_v2_is_as_good_as_its_readme_says(data_dir):
  network = experiment.make_network(configs.get_config(), train.make_mesh(1))
  logits = network.logits(network.dense)
  assert np.sum(logits.argmax(-1) == network.labels) == 225
  energy = network.input_energy()
  plan = experiment.make_plan(
    configs.get_config(), experiment.Setting('blocks4x4', 0.5, 'weights'), network
  )
  # 16 expansions, 17 projections, the last 1x1 convolution.
  assert len(plan.pruned) == 34 and all(jnp.isfinite(energy[e.path]).all() for e in plan.pruned)


@pytest.mark.full
def test_smoke_run(tmp_path):
  pytest.importorskip('skimage')
  rows = experiment.experiment(configs.get_config('smoke,structures=blocks2x4'), tmp_path)
  assert len(rows) == 5 and all(np.isfinite(row['logit_error']) for row in rows)
