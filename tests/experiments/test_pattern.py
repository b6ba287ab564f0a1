"""Patterns: rates of the plans, libraries that shrink, the control's steps, a whole small run."""

import json
import re
import threading

import jax
import numpy as np
import pytest

from configs import pattern as configs
from experiments import cifar, harness, kernels, outcome, tasks
from experiments import compression as cp
from experiments import pattern as experiment
from fqjax import models, rules, sparsity, train
from tests.experiments import tiny_conv


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_presets_are_complete_and_valid(preset):
  config = configs.get_config(preset)
  assert set(config.keys()) == set(configs.base().keys())
  experiment.check(config)
  config.to_json_best_effort()


def way(recipe, steps):
  """How far weights come towards fixed targets between two refreshes, at the smallest rho."""
  _, length, every = cp.admm_link(recipe, None, steps)
  assert length > every
  return recipe.lr / (1 - recipe.momentum) * min(recipe.rho) * every


IMAGES = {'cifar10': 27_000, 'photo_patches': 800, 'tfds:imagenet2012': 1_268_355}


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_pulls_come_some_way_between_refreshes(preset):
  config = configs.get_config(preset)
  if not config.pull.epochs:
    return
  epoch = IMAGES[config.data.name] // config.data.batch_size
  chain = config.pull.copy_and_resolve_references()
  chain.update({name: config.library[name] for name in ('rho', 'epochs', 'refreshes')})
  assert way(chain, round(chain.epochs * epoch)) > 0.45
  for name in config.settings:
    setting, used = config.choices.get(name), 0.0
    if setting and setting.library == 'extracted':
      used = (2 + config.library.sizes.index(setting.size)) * config.library.epochs
    if config.pull.epochs > used:
      assert way(config.pull, round((config.pull.epochs - used) * epoch)) > 0.45, name


def test_arguments_are_read():
  config = configs.get_config('resnet20,settings=elog4+joint8,seeds=2,network=own_resnet20')
  assert config.settings == ('elog4', 'joint8') and config.seeds == (0, 1)
  assert (config.model.weights, config.dense.epochs) == ('', 30.0)
  assert config.data.held_out_split == 'train[90%:]'
  assert configs.get_config('').model.weights == 'cifar10_resnet20.npz'


def shapes(network):
  """Parameters of a CIFAR network as shapes, and its layers."""
  config = cifar.fields(network)
  model = models.create_model(config.model.name, **config.model.options)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return variables['params'], traced(model, variables, x)


def traced(model, variables, x):
  """Layers of a network known by its shapes."""
  state = {k: v for k, v in variables.items() if k != 'params'}
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state)
  return sparsity.trace_layers(
    lambda p, x: model.apply({'params': p, **zeros}, x), variables['params'], x
  )


@pytest.fixture(scope='module')
def resnet20():
  return shapes('resnet20')


def test_rates_are_those_of_all_convolutions(resnet20):
  params, layers = resnet20
  masks = sparsity.pattern_set('elog4')
  convs = kernels.convolutions(params, layers)
  assert [c.path for c in convs[:2]] == ['conv1/kernel', 'layer1_0/conv1/kernel']
  whole = sum(c.outputs * c.inputs * 9 for c in convs)
  assert (len(convs), whole) == (19, 267_696)
  first = convs[0].outputs * convs[0].inputs * 9
  alone = kernels.plan(params, layers, 'pattern', masks=masks)
  kept = first + (whole - first) * 4 // 9
  assert kernels.conv_rate(alone) == pytest.approx(whole / kept) and whole / kept < 2.25
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  four, eight = (kernels.plan_at(r, params, layers, 'pattern', masks) for r in (4.0, 8.0))
  assert 4 <= kernels.conv_rate(four) < 4.02 and 8 <= kernels.conv_rate(eight) < 8.05
  pruned, found = rules.finalize(eight, drawn)
  kernel = pruned['layer2_0']['conv1']['kernel']
  live = np.asarray(sparsity.to_kernels(kernel, 'HWIO')) != 0
  # Four taps on a T, or none; no output and no input without a kernel.
  bits = live.reshape(-1, 9) @ (1 << np.arange(9))
  assert set(bits.tolist()) <= {0, *masks}
  assert live.any((1, 2)).all() and live.any((0, 2)).all()
  count = sum(int(np.count_nonzero(pruned_at(pruned, c.path))) for c in convs)
  assert kernels.conv_rate(eight) == pytest.approx(whole / count)
  assert np.count_nonzero(pruned_at(pruned, 'conv1/kernel')) == first
  rung = cp.Rung(eight, tasks.Variables(pruned, {}), found, {}, {})
  assert kernels.conv_compression(rung) == pytest.approx(whole / count)


def pruned_at(tree, path):
  for key in path.split('/'):
    tree = tree[key]
  return tree


def test_vgg_at_8_point_4():
  params, layers = shapes('vgg16_quarter')
  plan = kernels.plan_at(8.4, params, layers, 'pattern', sparsity.pattern_set('elog4'))
  assert 8.4 <= kernels.conv_rate(plan) < 8.45
  with pytest.raises(ValueError, match='no pattern plan'):
    kernels.plan_at(1e5, params, layers, 'pattern', sparsity.pattern_set('elog4'))


def small():
  """The comparison on a network of three convolutions, few steps."""
  config = configs.base()
  config.pull.update(optimizer='adam', lr=0.01, epochs=5.0, rho=(0.1, 0.5), refreshes=2)
  config.retrain.update(optimizer='adam', lr=0.01, epochs=2.0)
  config.library.sizes, config.library.epochs = (12, 8, 4), 1.0
  return config


@pytest.fixture
def run(tmp_path):
  watch = (kernels.watch_switches,)
  return cp.Run(tiny_conv.task(), tmp_path / 'seed0', 0, train.make_mesh(1), watch=watch)


def prune(config, run, name, dense):
  return experiment.prune(config, run._replace(folder=run.folder / name), name, dense)


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_libraries_shrink_and_everybody_trains_as_long(run, monkeypatch):
  """Phases do nothing here but tell how long they would take."""
  ran = {}

  def phase(run, name, variables, recipe, *, target=None, held=None):
    folder = run.folder.relative_to(run.folder.parents[0])
    ran[f'{folder}/{name}'] = round(recipe.epochs * run.task.steps_per_epoch)
    return variables

  monkeypatch.setattr(cp, 'phase', phase)
  config = small()
  dense = run.task.init(jax.random.key(0))
  names = ('extracted12', 'extracted8', 'extracted4', 'elog4', 'random8', 'joint4')
  rungs = {name: prune(config, run, name, dense) for name in (*names, experiment.CONTROL)}

  # Each library holds the next, each is as large as it is named, and the kernels live on it.
  libraries = []
  for size in (12, 8, 4):
    (masks,) = {e.structure.masks for e in kernels.patterned(rungs[f'extracted{size}'].plan)}
    assert len(masks) == size and all(mask & 16 for mask in masks)
    note = json.loads((run.folder / f'library-centre56-counts/{size:02d}.json').read_text())
    assert tuple(note['masks']) == masks and sum(note['counts']) == 8 * 16 + 16 * 16
    stay = sorted(note['counts'], reverse=True)[:size]
    assert sorted((note['counts'][note['from'].index(m)] for m in masks), reverse=True) == stay
    libraries.append(set(masks))
    live = rungs[f'extracted{size}'].masks['conv2']['kernel']
    bits = np.asarray(sparsity.to_kernels(live, 'HWIO')).reshape(-1, 9) @ (1 << np.arange(9))
    assert set(bits.tolist()) <= set(masks)
  assert libraries[0] > libraries[1] > libraries[2]

  # 50 steps before the cut and 20 behind it, whoever took part of them for his library.
  assert [ran[f'library-centre56-counts/{size:02d}'] for size in (56, 12, 8, 4)] == [10] * 4
  spent = {'extracted12': 20, 'extracted8': 30, 'extracted4': 40, 'joint4': 30}
  for name in rungs:
    assert ran[f'{name}/00-admm'] == 50 - spent.get(name, 0), name
    assert ran[f'{name}/00-retrain'] == 20
  assert rungs[experiment.CONTROL].masks is None
  assert kernels.conv_compression(rungs[experiment.CONTROL]) == 1.0
  assert kernels.conv_compression(rungs['joint4']) >= 4.0


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_a_setting_is_trained_watched_and_read_back(run, capsys):
  config = small()
  config.choices.joint4.library = 'elog4'
  dense = run.task.init(jax.random.key(0))
  rung = prune(config, run, 'joint4', dense)
  assert len(re.findall(r': \d+ steps', capsys.readouterr().out)) == 2
  assert np.mean(rung.scores['test']) > 0.8
  rows = train.read_json_lines(run.folder / 'joint4/00-admm/metrics.jsonl')
  found = [r for r in rows if 'admm/switched' in r]
  layers = train.read_json_lines(run.folder / 'joint4/00-admm/switches.jsonl')
  assert set(layers[-1]) == {'step', 'conv2', 'conv3'} and layers[-1]['step'] == found[-1]['step']
  assert experiment.last_switched(run.folder / 'joint4/00-admm') == found[-1]['admm/switched']
  again = prune(config, run, 'joint4', dense)
  assert 'steps' not in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, again.variables, rung.variables)


def test_random_libraries_follow_the_seed(tmp_path):
  config = small()
  setting = config.choices.random8
  drawn = []
  for seed in (0, 0, 1):
    run = cp.Run(None, tmp_path, seed, None)
    drawn.append(experiment.library(config, run, setting, None)[0])
  assert drawn[0] == drawn[1] != drawn[2]
  assert all(len(set(d)) == 8 and set(d) <= set(sparsity.pattern_set('centre56')) for d in drawn)


def test_switches_are_kernels_whose_taps_changed(tmp_path):
  def admm(kernel):
    support = {'conv': {'kernel': kernel, 'bias': None}}
    return (rules.AdmmState(*[None] * 9)._replace(support=support),)

  class State:
    step = 8
    opt_state = admm(np.zeros((3, 3, 2, 2), bool))

  look = kernels.watch_switches(tmp_path)
  assert look(State) == {}
  changed = np.zeros((3, 3, 2, 2), bool)
  changed[0, 1:, 1, 0] = True
  State.opt_state = admm(changed)
  assert look(State) == {'admm/switched': 0.25}
  assert train.read_json_lines(tmp_path / 'switches.jsonl') == [{'step': 8, 'conv': 0.25}]
  assert look(State)['admm/switched'] == 0.0


def test_gain_is_paired_with_the_control_of_the_same_seed():
  sizes = cp.Sizes(10, 5, 40, 20, 0)

  def network(setting, seed, right):
    part = {'test': np.array(right, float)}
    return outcome.Measured(setting, seed, 0, part, part, {'test': np.ones(4)}, sizes)

  networks = [
    network(experiment.CONTROL, 0, [1, 0, 0, 0]), network(experiment.CONTROL, 1, [1, 1, 0, 0]),
    network('elog4', 1, [1, 1, 1, 0]), network('elog4', 0, [1, 0, 1, 0]),
  ]  # fmt: skip
  summary = outcome.summarize(networks)
  outcome.add_gains(summary, networks, experiment.CONTROL)
  assert 'gain' not in summary[0]
  assert summary[1]['gain'] == pytest.approx(25.0)
  # Both seeds gain the same image: the spread is that of the images alone.
  images = np.array([0, 0, 100.0, 0])
  assert summary[1]['gain_spread'] == pytest.approx(images.std(ddof=1) / 2)
  rows = outcome.ledger_rows(summary[1], 'pattern/d/n/elog4', 'd', {'gain': 0.0}, 'a paper')
  (gain,) = (row for row in rows if row.metric == 'gain')
  assert (gain.reached, gain.reference) == (
    'no', 'the dense network retrained as long; a paper',
  )  # fmt: skip
  alone = [n for n in networks if n.setting != experiment.CONTROL]
  bare = outcome.summarize(alone)
  outcome.add_gains(bare, alone, experiment.CONTROL)
  assert 'gain' not in bare[0]


def test_two_programs_in_one_folder_take_turns(tmp_path, capsys):
  order = []

  def second():
    with harness.alone(tmp_path / 'phase'):
      order.append('second')

  with harness.alone(tmp_path / 'phase'):
    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.3)
    order.append('first')
  thread.join(10)
  assert order == ['first', 'second'] and 'waiting' in capsys.readouterr().out


def test_weights_are_looked_for_in_two_places(tmp_path, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  with pytest.raises(FileNotFoundError, match='neither a file nor in weights/'):
    cifar.find_weights('net.npz')
  (tmp_path / 'weights').mkdir()
  (tmp_path / 'weights' / 'net.npz').touch()
  assert cifar.find_weights('net.npz') == tmp_path / 'weights' / 'net.npz'
  with pytest.raises(ValueError, match='unknown network'):
    cifar.fields('resnet2')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'settings': ('elog',)}, 'unknown setting'),
    ({'choices.elog4.library': 'elog'}, r'elog4\.library'),
    ({'choices.extracted8.size': 9}, 'falling sizes'),
    ({'choices.extracted8.by': 'votes'}, "'energy'"),
    ({'library.sizes': (8, 12, 4)}, 'falling sizes'),
    ({'library.epochs': 2.0}, 'its library takes'),
    ({'choices.joint4.rate': 2.0}, 'below that of the patterns'),
    ({'pull.schedule': 'cosine'}, 'constant'),
    ({'networks': ('resnet21',)}, 'unknown network'),
  ],
)
def test_what_can_only_fail_later_is_refused(change, message):
  config = configs.get_config('resnet20')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    experiment.check(config)


def test_command_line():
  argv = ['--config=configs/pattern.py:resnet20,seeds=1', '--workdir=x', '--config.pull.lr=0.1']
  assert experiment.parse_command(argv).config.pull.lr == 0.1
  with pytest.raises(Exception, match='lrr'):
    experiment.parse_command([*argv, '--config.pull.lrr=0.2'])


@pytest.mark.full
@pytest.mark.promotes('optax')
def test_smoke_run_reports_and_goes_on(tmp_path, capsys, monkeypatch):
  pytest.importorskip('skimage')
  make_mesh = train.make_mesh
  monkeypatch.setattr(train, 'make_mesh', lambda: make_mesh(1))
  config = configs.get_config('smoke')
  config.dense.epochs = config.retrain.epochs = 1.0
  config.pull.epochs, config.library.epochs = 1.5, 0.5
  config.settings = ('joint4',)
  experiment.experiment(config, tmp_path)
  config.settings = ('dense_retrained', 'joint4')
  rows = experiment.experiment(config, tmp_path)
  assert [row['setting'] for row in rows] == list(config.settings)
  assert 'gain' in rows[1] and rows[1]['conv_compression'] >= 4.0
  page = (tmp_path / 'report.html').read_text()
  for title in ('Saliency', 'Feature maps', 'Patterns of joint4', 'ADMM gap', 'What is lost'):
    assert title in page, title
  capsys.readouterr()
  assert experiment.experiment(config, tmp_path) == rows
  assert 'steps' not in capsys.readouterr().out
  config.retrain.lr = 1.0
  with pytest.raises(ValueError, match='another configuration'):
    experiment.experiment(config, tmp_path)
