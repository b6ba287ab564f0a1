"""The main experiment, end to end and small: every setting, resume, recipe of ImageNet, errors."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import imagenet_freq as configs
from experiments import imagenet_freq as experiment
from experiments import ledger
from fqjax import data as fd
from fqjax import nn as fnn
from fqjax import train
from fqjax.data import prepare

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def one_device(monkeypatch):
  """Eight simulated devices compile and run several times longer; other tests have them."""
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))


def small(arg='demo,smoke', **changes):
  config = configs.get_config(arg)
  config.data.batch_size = 16
  config.data.eval_batch_size = 64
  config.dct.statistics_images = 100
  config.optim.epochs = 0.1
  config.eval_epochs = 1.0
  config.checkpoint_epochs = 0.05
  for name, value in changes.items():
    setattr(config, name, value)
  config.lock()
  return config


THREE = ('rgb', 'dct_gate', 'gate_then_static')


@pytest.mark.parametrize(
  'settings', [THREE, pytest.param(configs.ALL_SETTINGS, marks=pytest.mark.full)]
)
def test_settings_are_trained_compared_and_reported(tmp_path, capsys, settings, one_device):
  config = small(settings=settings)
  config.init.rgb, config.init.method, config.init.images = 'rgb', 'least_squares', 64
  rows = experiment.experiment(config, tmp_path)
  assert [row['setting'] for row in rows] == list(settings)
  assert 'gain' not in rows[0] and np.isfinite(rows[-1]['gain'])
  page = (tmp_path / 'report.html').read_text()
  assert 'http://' not in page.replace('http://www.w3.org', '') and 'Settings' in page
  assert json.loads((tmp_path / 'results.json').read_text()) == rows
  assert 'one standard error' in capsys.readouterr().out

  # The gate's subset was chosen and used.
  chosen = json.loads((tmp_path / 'gate_then_static/seed0/result.json').read_text())['channels']
  gate = json.loads((tmp_path / 'dct_gate/seed0/result.json').read_text())['selection']
  assert len(chosen) == 24 and min(gate[c] for c in chosen) >= np.sort(gate)[-24]

  # Again: nothing is trained a second time, and the numbers are the same.
  before = (tmp_path / 'rgb/seed0/result.json').stat().st_mtime_ns
  assert experiment.experiment(config, tmp_path) == rows
  assert (tmp_path / 'rgb/seed0/result.json').stat().st_mtime_ns == before

  # Another configuration is not mixed into the same folder.
  with pytest.raises(ValueError, match=r'optim\.lr'):
    other = small(settings=settings)
    other.optim.lr = 0.3
    experiment.experiment(other, tmp_path)

  # Nor runs on other channels.
  path = tmp_path / 'gate_then_static/seed0/channels.json'
  path.write_text(path.read_text().replace('[', '[191, '))
  with pytest.raises(ValueError, match='was started on channels'):
    experiment.experiment(config, tmp_path)


@pytest.mark.parametrize('preset', ['tiny_imagenet10', 'cifar10'])
def test_settings_are_comparable(preset):
  """Equal bytes for the subset and the small image; equal cost for the block stem."""
  config = configs.get_config(preset)
  config.dct.statistics = 'none'
  cost = {}
  for name in ('rgb', 'rgb_half_idct', 'rgb_large_patchify', 'dct', 'dct_gate'):
    channels = experiment.chosen_channels(config, name, {})
    spec = experiment.make_spec(config, name, channels, None)
    model = experiment.make_network(config, name, spec, 10)
    cost[name] = {'bytes': spec.input_bytes, **experiment.network_costs(model, spec)}
  assert cost['rgb']['bytes'] == cost['rgb_half_idct']['bytes'] == cost['dct']['bytes']
  assert cost['rgb_large_patchify']['bytes'] == 4 * cost['rgb']['bytes']
  for name in ('rgb', 'rgb_half_idct', 'rgb_large_patchify'):
    assert cost[name]['macs'] == pytest.approx(cost['dct']['macs'], rel=0.12), name


def test_outcome_goes_into_the_ledger_once(tmp_path, monkeypatch, capsys):
  rows = [
    {
      'setting': name, 'title': name, 'top1': top1, 'spread': 0.5, 'top5': 99.0, 'seeds': 3,
      'samples': 1000, 'seconds': 1.0, 'input_bytes': 768, 'input_values': 384, 'macs': 1e6,
      'params': 3e5, 'hardware': 'a processor', 'revision': 'abc1234',
    }
    for name, top1 in (('rgb', 80.0), ('dct', 81.5))
  ]  # fmt: skip
  rows[1].update(gain=1.5, gain_spread=0.4)
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  config = configs.get_config('cifar10')
  config.goal, config.reference = 1.0, '82'
  config.data.name = 'folder:/somewhere/private/photos'
  experiment.record(config, tmp_path, rows)
  written, problems = ledger.read(tmp_path / 'results.csv')
  assert not problems
  gain = next(row for row in written if row.metric == 'gain')
  assert gain.run == 'imagenet_freq/folder-photos/cifar_resnet20_dct/square6'
  assert (gain.reached, gain.revision, gain.hardware) == ('yes', 'abc1234', 'a processor')
  assert [row.reference for row in written if row.metric == 'top1'] == ['', '82']
  assert 'private' not in (tmp_path / 'results.csv').read_text()
  experiment.record(config, tmp_path, rows)
  assert ledger.read(tmp_path / 'results.csv')[0] == written
  assert 'in the ledger already' in capsys.readouterr().out


def test_error_adds_both_sources_of_variation():
  rng = np.random.default_rng(0)
  values = (rng.random((3, 400)) < np.array([[0.5], [0.6], [0.7]])).astype(float)
  expected = np.hypot(values.mean(0).std(ddof=1) / 20, np.std(values.mean(1), ddof=1) / np.sqrt(3))
  assert experiment.quadrature(values) == pytest.approx(expected)
  assert experiment.quadrature(np.ones((1, 1))) == 0


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'settings': ('rbg',)}, 'rbg'),
    ({'settings': ('gate_then_static',)}, 'dct_gate'),
    ({'size': 60}, 'divisible'),
    ({'rgb_size': 16, 'settings': ('rgb', 'rgb_half_idct')}, 'twice'),
    ({'data.augment': 'flop'}, 'pad_crop'),
    ({'dct.pattern': 'round'}, 'square'),
    ({'dct.channels': 25}, 'square24'),
    ({'optim.schedule': 'linear'}, 'cosine'),
    ({'init.rgb': 'nowhere.npz'}, 'nowhere'),
    ({'init.rgb': 'rgb', 'settings': ('dct', 'rgb')}, 'starts from'),
    ({'data.batch_size': 12}, 'must divide by 8'),
    ({'data.eval_batch_size': 250}, 'must divide by 8'),
  ],
)
def test_impossible_runs_are_refused_before_training(tmp_path, changes, message):
  config = small()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    experiment.experiment(config, tmp_path)
  assert not list(tmp_path.glob('*/seed*'))


@pytest.mark.full
def test_two_processes_train_and_compare_together(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  command = [
    sys.executable, '-m', 'experiments.imagenet_freq',
    '--config=configs/imagenet_freq.py:demo,smoke,settings=rgb+dct', f'--workdir={tmp_path}',
  ]  # fmt: skip
  processes = [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env={
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(i),
      },
    )
    for i in range(2)
  ]
  assert [p.wait(600) for p in processes] == [0, 0]
  assert [row['setting'] for row in json.loads((tmp_path / 'results.json').read_text())] == [
    'rgb',
    'dct',
  ]


def test_gate_settles_and_logits_are_not_decayed():
  """What the loss sees late in training is the choice that evaluation makes."""
  config = small(settings=('dct_gate',))
  config.unlock()
  config.dct.statistics, config.model.norm_groups = 'none', 1
  config.optim.epochs, config.optim.accumulate = 0.2, 2
  config.optim.lr, config.gate.settle = 0.0, 0.5
  source = fd.load_source('photo_patches', 'test')
  mesh = train.make_mesh(1)
  program = experiment.build(config, 'dct_gate', None, source, mesh)
  x = np.zeros((1, *program.spec.output_shape), np.float32)
  variables = jax.jit(program.model.init)({'params': jax.random.key(0)}, x)
  state = train.create_state(
    variables['params'],
    {
      'batch_stats': variables['batch_stats'],
      'calls': np.int32(0),
      'selection': fnn.init_selection(192),
    },
    program.tx,
    jax.random.key(1),
  )
  batch = next(iter(fd.Loader(source, batch_size=16)))
  on = []
  for _ in range(program.total_steps):
    state, metrics = program.step(state, train.shard_batch(batch, mesh))
    on.append(float(metrics['channels_on']))
  half = round(0.5 * program.total_steps)
  assert all(n < 185 for n in on[:half]) and all(n == 192 for n in on[half:])
  decayed = train.decay_mask(variables['params'])
  assert not any(decayed['gate'][name] for name in ('logit_bias', 'logit_scale'))
  assert decayed['gate']['squeeze']['kernel']


def test_command_line_is_parsed_as_the_program_would():
  argv = [
    '--config=configs/imagenet_freq.py:cifar10,seeds=2',
    '--workdir=DIR',
    '--config.optim.lr=0.2',
  ]
  assert experiment.parse_command(argv).config.optim.lr == 0.2
  with pytest.raises(Exception, match='learning_rate'):
    experiment.parse_command([*argv, '--config.optim.learning_rate=0.2'])


@pytest.mark.parametrize(
  'preset, network',
  [
    ('resnet50', 'resnet18'),
    pytest.param('resnet50', 'resnet50', marks=pytest.mark.full),
    pytest.param('mobilenet_v2', 'mobilenet_v2', marks=pytest.mark.full),
  ],
)
def test_imagenet_recipe_on_a_tiny_set_in_its_own_format(tmp_path, preset, network, one_device):
  """The presets, cut in size alone, reading TFDS `imagenet2012`."""
  from tests.tiny_tfds import write_tiny_imagenet

  write_tiny_imagenet(tmp_path / 'tfds', 12, 6)
  config = configs.get_config(preset)
  config.model.name = network
  config.data.data_dir = os.fspath(tmp_path / 'tfds')
  config.data.workers = 0
  config.settings = ('dct',)
  config.data.batch_size = config.data.eval_batch_size = 8
  config.size, config.rgb_size = 64, 32
  config.dct.statistics_images = 8
  config.optim.epochs = 2.0
  config.optim.label_smoothing = 0.1
  config.optim.clip = 1.0
  config.optim.ema = 0.9
  config.log_every = 1
  (row,) = experiment.experiment(config, tmp_path / 'run')
  assert row['samples'] == 6 and row['input_values'] == 24 * 64
  with np.load(tmp_path / 'run/dct/seed0/variables.npz') as z:
    assert all(z[k].dtype == np.float32 and np.isfinite(z[k]).all() for k in z.files)
    assert any(24 in z[k].shape for k in z.files)  # the first kernels meet 24 channels


def test_stored_coefficients_are_trained_on_and_augmented_on_the_device(tmp_path):
  for split in ('train', 'test'):
    prepare.prepare(
      prepare.Plan(
        source='photo_patches', split=split, kind='coefficients', chroma='full', shard_size=4000
      ),
      tmp_path / 'set',
    )
  config = small(settings=('dct',))
  config.unlock()
  config.data.name = f'records:{tmp_path / "set"}'
  with pytest.raises(ValueError, match='augment=device'):
    experiment.experiment(config, tmp_path / 'run')
  config.data.augment = 'device'
  config.dct.crop_blocks = 7
  (row,) = experiment.experiment(config, tmp_path / 'run2')
  assert row['samples'] == 800 and row['input_values'] == 24 * 49
  config.dct.chroma = 'filtered'
  with pytest.raises(ValueError, match="chroma='full', not 'filtered'"):
    experiment.experiment(config, tmp_path / 'run3')


@pytest.mark.full
def test_killed_and_restarted_run_reaches_the_same_parameters(tmp_path):
  command = [
    sys.executable, '-m', 'experiments.imagenet_freq',
    '--config=configs/imagenet_freq.py:demo,smoke,settings=dct_gate',
    '--config.checkpoint_epochs=0.1',
  ]  # fmt: skip
  env = {**os.environ, 'XLA_FLAGS': ''}
  subprocess.run([*command, f'--workdir={tmp_path}/whole'], check=True, cwd=ROOT, env=env)
  rng = np.random.default_rng(0)
  for _ in range(20):
    process = subprocess.Popen([*command, f'--workdir={tmp_path}/cut'], cwd=ROOT, env=env)
    try:
      process.wait(rng.uniform(4, 12))
      break
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
  subprocess.run([*command, f'--workdir={tmp_path}/cut'], check=True, cwd=ROOT, env=env)
  with (
    np.load(tmp_path / 'whole/dct_gate/seed0/variables.npz') as a,
    np.load(tmp_path / 'cut/dct_gate/seed0/variables.npz') as b,
  ):
    assert a.files == b.files
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_modules_docstring_names_every_setting():
  names = re.findall(r'^  (\w+) {2,}', experiment.__doc__, re.MULTILINE)
  assert tuple(names) == tuple(experiment.SETTINGS)
