"""The main experiment, end to end and small: every setting, resume, recipe of ImageNet, errors."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import imagenet_freq as configs
from experiments import harness, ledger
from experiments import imagenet_freq as experiment
from fqjax import data as fd
from fqjax import nn as fnn
from fqjax import train
from fqjax.data import prepare
from tests.models import reference
from tests.tiny_tfds import jpeg, photograph

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


def random_rgb(config, path):
  """Variables of the RGB network, drawn at random, as a finished run leaves them."""
  spec = experiment.make_spec(config, 'rgb', None, None)
  model = experiment.make_network(config, 'rgb', spec, 10)
  x = jax.ShapeDtypeStruct((1, *spec.output_shape), np.float32)
  rng = np.random.default_rng(0)
  draw = lambda a: rng.normal(size=a.shape).astype(a.dtype)
  variables = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x))
  path.parent.mkdir(parents=True)
  harness.save_tree(path, variables)
  return variables


@pytest.mark.parametrize(
  'checkpoint, method',
  [('rgb', 'cut'), ('rgb', 'reinit'), ('file', 'cut'), ('safetensors', 'cut')],
)
def test_networks_begin_as_the_rgb_checkpoint(tmp_path, checkpoint, method):
  config = small(settings=('rgb', 'dct'))
  config.unlock()
  config.dct.statistics, config.dct.channels, config.init.method = 'none', 12, method
  if checkpoint == 'safetensors':
    config.model.name, config.model.stem_stride = 'resnet18', 0
    config.init.rgb = os.fspath(tmp_path / 'resnet18.safetensors')
    state = reference.resnet_state((2, 2, 2, 2), classes=10)
    save_file(state, config.init.rgb)
    kernel = lambda name: state[f'{name}.weight'].transpose(2, 3, 1, 0)
    deep, first = kernel('layer2.1.conv2'), kernel('layer1.0.conv1')
    mean = state['layer1.0.bn1.running_mean']
  else:
    path = tmp_path / ('rgb/seed0/variables.npz' if checkpoint == 'rgb' else 'other/rgb.npz')
    config.init.rgb = 'rgb' if checkpoint == 'rgb' else os.fspath(path)
    rgb = random_rgb(config, path)
    deep, first = (
      rgb['params'][block][conv]['kernel']
      for block, conv in (('layer2_1', 'conv2'), ('layer1_0', 'conv1'))
    )
    mean = rgb['batch_stats']['layer1_0']['bn1']['mean']
  source = fd.load_source('photo_patches', 'test', per_class=1)
  channels = experiment.chosen_channels(config, 'dct', {})
  program = experiment.build(config, 'dct', channels, source, train.make_mesh(1))
  begin = lambda: experiment.initial_variables(
    config, program, 'dct', jax.random.key(0), source, tmp_path / 'dct' / 'seed0'
  )
  found = begin()
  x = jax.ShapeDtypeStruct((1, *program.spec.output_shape), np.float32)
  wanted = jax.eval_shape(program.model.init, jax.random.key(0), x)
  assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, dict(wanted))
  np.testing.assert_array_equal(found['params']['layer2_1']['conv2']['kernel'], deep)
  np.testing.assert_array_equal(found['batch_stats']['layer1_0']['bn1']['mean'], mean)
  kernel = found['params']['layer1_0']['conv1']['kernel']
  assert kernel.shape[2] == 12
  if method == 'cut':
    np.testing.assert_array_equal(kernel, first[:, :, :12])
  else:
    config.init.rgb = ''
    np.testing.assert_array_equal(kernel, begin()['params']['layer1_0']['conv1']['kernel'])


def test_gate_under_accumulation_and_averages(tmp_path, monkeypatch, one_device):
  """Counts, learning rate and scores are those of the steps and of the averages."""
  evaluate, calls = train.evaluate, []
  monkeypatch.setattr(train, 'evaluate', lambda *a, **k: calls.append(1) or evaluate(*a, **k))
  config = small(settings=('dct_gate',), log_every=1, eval_epochs=0.05)
  config.unlock()
  config.optim.accumulate, config.optim.ema = 2, 0.9
  config.data.val_split = 'test[:25%]'
  (row,) = experiment.experiment(config, tmp_path)
  folder = tmp_path / 'dct_gate/seed0'
  history = train.read_json_lines(folder / 'metrics.jsonl')
  total, per_epoch = 20, 200
  lr = experiment.schedule(config.optim, total, per_epoch)
  steps = {r['step']: r['lr'] for r in history if 'lr' in r}
  assert list(steps) == list(range(1, total + 1))
  np.testing.assert_allclose(list(steps.values()), [lr(i) for i in range(total)], rtol=1e-5)
  result = json.loads((folder / 'result.json').read_text())
  # Each image of each microbatch counted once: shares of 20 * 16.
  counts = np.array(result['selection']) * total * 16
  np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
  assert 0 < counts.min() < counts.max() <= total * 16
  # Scored as validated, by the averages; and not validated once more for it.
  evaluated = [r for r in history if 'val/top1' in r]
  assert len(evaluated) == len(calls) == 2
  assert result['top1'] == pytest.approx(100 * evaluated[-1]['val/top1'])
  assert result['channels_on'] == row['channels_on'] == evaluated[-1]['val/channels_on']
  # A run that was killed after its last step is validated when it is asked for its outcome.
  (folder / 'result.json').unlink()
  assert experiment.experiment(config, tmp_path) == [row | {'seconds': row['seconds']}]
  assert len(calls) == 3


def test_statistics_are_estimated_once_per_folder(tmp_path, monkeypatch):
  estimate, calls = fd.estimate_statistics, []
  monkeypatch.setattr(
    fd, 'estimate_statistics', lambda *a: calls.append(a[0].channels) or estimate(*a)
  )
  config = small()
  source = fd.load_source('photo_patches', 'test', per_class=4)
  subset = experiment.chosen_channels(config, 'dct', {})
  make = lambda name, channels, *folder: experiment.make_spec(
    config, name, channels, source, *folder
  )
  static, gate = make('dct', subset, tmp_path), make('dct_gate', None, tmp_path)
  assert calls == [None]
  assert static.mean == tuple(gate.mean[c] for c in subset) and len(gate.std) == 192
  # What the file gives back is what was estimated, to the last digit.
  assert make('dct', subset) == static and calls == [None, None]
  assert make('dct', subset, tmp_path) == static and len(calls) == 2
  # Oracle: the pooled deviation over the same images in float64.
  bare = dataclasses.replace(static, mean=None, std=None)
  images = np.stack([source[i]['image'] for i in range(len(source))])
  x = np.asarray(fd.preprocess(bare, images), np.float64)
  np.testing.assert_allclose(static.mean, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(static.std, x.std((0, 1, 2)), rtol=1e-4)
  # Anything they depend on makes others.
  for field, value in (('dct.statistics_images', 50), ('dct.chroma', 'filtered'), ('size', 32)):
    with config.unlocked():
      config.update_from_flattened_dict({field: value})
    before = len(calls)
    make('dct', subset, tmp_path)
    assert len(calls) == before + 1, field
  assert len(list(tmp_path.glob('statistics-*.json'))) == 4
  assert len(list(tmp_path.iterdir())) == 4


def test_statistics_of_a_stored_subset(tmp_path):
  config = small()
  with config.unlocked():
    config.data.augment, config.dct.statistics_images = 'device', 30
  subset = experiment.chosen_channels(config, 'dct', {})
  x = np.random.default_rng(0).normal(3, 50, (30, 8, 8, 24)).round().astype(np.int16)

  class Stored(list):
    metadata = {
      'kind': 'coefficients', 'block': 8, 'chroma': 'full', 'channels': list(subset),
    }  # fmt: skip

  source = Stored({'coefficients': image, 'label': 0} for image in x)
  spec = experiment.make_spec(config, 'dct', subset, source, tmp_path)
  assert spec.channels == subset
  np.testing.assert_allclose(spec.mean, x.mean((0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(spec.std, x.std((0, 1, 2)), rtol=1e-4)


def test_undecodable_images_stand_in_results_and_report(tmp_path, one_device):
  """One damaged photograph of each split, in folders."""
  for split, n in (('train', 16), ('validation', 8)):
    for i in range(n):
      path = tmp_path / 'photos' / split / f'class{i % 2}' / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      content = jpeg(photograph(i, i % 2, (64, 64)))
      path.write_bytes(content[:300] if i == 5 else content)
  config = small(settings=('rgb',), log_every=1)
  config.unlock()
  config.data.name = f'folder:{tmp_path / "photos"}'
  config.data.val_split = 'validation'
  config.data.batch_size, config.data.eval_batch_size, config.optim.epochs = 16, 8, 3.0
  (row,) = experiment.experiment(config, tmp_path / 'run')
  assert row['samples'] == 7
  result = json.loads((tmp_path / 'run/rgb/seed0/result.json').read_text())
  assert [result['corrupt'][k]['count'] for k in ('training', 'validation')] == [3, 1]
  history = train.read_json_lines(tmp_path / 'run/rgb/seed0/metrics.jsonl')
  assert [r['data/corrupt'] for r in history if 'data/corrupt' in r] == [1, 2, 3]
  page = (tmp_path / 'run/report.html').read_text()
  assert 'Of the training images 3 samples (1 files) could not be decoded' in page
  assert 'Of the validation images 1 samples (1 files)' in page
  assert 'photos/train/class1/5.jpg' in page and 'photos/validation/class1/5.jpg' in page


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
    '--config.checkpoint_epochs=0.05', '--config.log_every=1',
  ]  # fmt: skip
  env = {**os.environ, 'XLA_FLAGS': ''}
  subprocess.run([*command, f'--workdir={tmp_path}/whole'], check=True, cwd=ROOT, env=env)
  folder = tmp_path / 'cut/dct_gate/seed0'
  rng = np.random.default_rng(0)

  def steps_saved():
    return [int(p.parent.name) for p in folder.glob('checkpoints/*/fqjax.json')]

  last = max(int(p.name) for p in (tmp_path / 'whole/dct_gate/seed0/checkpoints').glob('[0-9]*'))
  for _ in range(3):
    before = max(steps_saved(), default=0)
    process = subprocess.Popen([*command, f'--workdir={tmp_path}/cut'], cwd=ROOT, env=env)
    while process.poll() is None and max(steps_saved(), default=0) <= before:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed: make it longer'
    # In the middle of training: something is saved, the last step is not, there is no outcome.
    assert before < max(steps_saved()) < last and not (folder / 'result.json').exists()
  done = subprocess.run(
    [*command, f'--workdir={tmp_path}/cut'],
    check=True, cwd=ROOT, env=env, capture_output=True, text=True,
  )  # fmt: skip
  assert 'Continuing from step' in done.stdout
  with (
    np.load(tmp_path / 'whole/dct_gate/seed0/variables.npz') as a,
    np.load(folder / 'variables.npz') as b,
  ):
    assert a.files == b.files
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_modules_docstring_names_every_setting():
  names = re.findall(r'^  (\w+) {2,}', experiment.__doc__, re.MULTILINE)
  assert tuple(names) == tuple(experiment.SETTINGS)
