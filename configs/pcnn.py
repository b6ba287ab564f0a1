"""Kernels that keep n = 4, 2, 1 of their nine weights on a few patterns.

  python -m experiments.pcnn --config=configs/pcnn.py:PRESET[,key=value] --workdir=DIR

| preset | what it prunes | where it is meant to run |
| --- | --- | --- |
| `resnet20` (default) | published ResNet-20 for CIFAR-10, n = 4, 2, 1 on 8 patterns | 2 cores, two hours |
| `chosen` | ResNet-20 trained here, a tenth of the images held out: how ADMM and retraining are set | 2 cores, three hours |
| `vgg16_quarter` | VGG-16 at a quarter of its width to 8.4x: n = 1, and n = 2 with connectivity | 2 cores, two hours |
| `grid` | published ResNet-20 and ResNet-56 one-shot: cut and new statistics, no training | 2 cores, an hour |
| `resnet56` | the second half of it | 2 cores, 45 minutes |
| `vgg16`, `resnet18` | CIFAR-10 at full width, trained for as long as published recipes are | one GPU or TPU, hours |
| `full` | the grid trained, on ResNet-20, ResNet-56, ResNet-18 and VGG-16 | one GPU or TPU, a day |
| `imagenet_vgg16`, `imagenet_resnet18` | ImageNet, n = 4 and 2 | TPU v3-8, 8 GPUs or more |
| `smoke` | a narrow VGG-16 on embedded photographs, few steps | 2 cores, two minutes |

`resnet20` and `vgg16_quarter` train every setting for 4 epochs towards its patterns and 8 within them, 12 in all; the
VGG itself for 15. An epoch of ResNet-20 is about 140 s of two cores. `,settings=n1v4+n2v8_half` runs a part (several such
commands may share a workdir), `,seeds=3` more seeds, `,network=resnet56` another network of `experiments/cifar.py`,
`,one_shot` only cuts. The setting `n2v8_half` keeps 2 taps on one of 8 patterns, and about half of the kernels.
Figures of the last runs: `results.csv`, rows `pcnn/...`.
"""

import ml_collections

from configs.common import imagenet, narrow, parse_arg
from experiments import cifar
from experiments.compression import admm_recipe, recipe

PRESETS = (
  'resnet20', 'chosen', 'vgg16_quarter', 'grid', 'resnet56', 'vgg16', 'resnet18', 'full',
  'imagenet_vgg16', 'imagenet_resnet18', 'smoke',
)  # fmt: skip
# Taps and numbers of patterns of the grid; n = 1 has no more than nine patterns.
GRID = ((4, (4, 8, 16, 32)), (2, (4, 8, 16, 32)), (1, (4, 8)))

# The first layers of our networks, and their other convolutions but the 1x1 of shortcuts.
_FIRST = r'conv1(_1)?/kernel'
_OTHERS = r'layer.*/conv\d/kernel|conv\d_\d/kernel'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0, network='', one_shot=False)
  config = globals()[arg['preset']]()
  narrow(config, arg)
  if arg['network']:
    cifar.start(config, arg['network'])
    config.networks = ()
  if arg['one_shot']:
    cut_only(config)
  return config


def base(network: str = 'resnet20') -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default."""
  config = cifar.fields(network)
  config.seeds = (0,)
  config.settings = ('n4v8', 'n2v8', 'n1v8')  # 'dense_retrained', and keys of `patterns`
  config.networks = ()  # of `experiments/cifar.py`, one after the other; (): `model`

  config.dense.epochs = min(config.dense.epochs, 15.0)
  # Before the patterns are chosen for good: towards those of the dense weights. 0 epochs: not.
  config.distil = admm_recipe(lr=0.01, epochs=0.0, schedule='constant', rho=(1e-2,))
  config.admm = admm_recipe(
    lr=0.01, epochs=4.0, schedule='constant', weight_decay=5e-4, rho=(1e-2, 1e-1)
  )
  config.retrain = recipe(lr=0.02, epochs=8.0, weight_decay=5e-4)

  config.patterns = settings = ml_collections.ConfigDict()
  for n, sizes in GRID:
    for v in sizes:
      settings[f'n{n}v{v}'] = patterns(n, v)
  for n, v in ((4, 8), (2, 8), (1, 4)):
    settings[f'n{n}v{v}_votes'] = patterns(n, v, codebook='votes')
  # With connectivity at 8.4x: codes, tables and a bit for every kernel counted.
  settings.n4v8_quarter = patterns(4, 8, 0.253)
  settings.n2v8_half = patterns(2, 8, 0.494)

  config.dense_goal = 0.0  # top-1 of the dense network, %; 0: none
  config.log_every = 50
  config.record = False  # append to results.csv
  return config


def patterns(n: int, v: int, keep: float = 1.0, **fields) -> ml_collections.ConfigDict:
  """A setting: n taps on v patterns in every layer but the first, and what else it changes."""
  setting = ml_collections.ConfigDict()
  # (regex, taps, patterns, kept share of the kernels); the first match wins, what matches none
  # stays dense. First layers have few weights and little to spare: never below 4 of 9.
  setting.layers = ((_FIRST, max(n, 4), max(v, 8), 1.0), (_OTHERS, n, v, keep))
  setting.codebook = 'greedy'  # most energy kept; 'votes': the most frequent masks, as published
  for phase in ('distil', 'admm', 'retrain'):
    setting[phase] = ml_collections.ConfigDict()  # fields of that recipe that differ
  setting.goals = ()  # (metric, value) for the ledger
  setting.reference = ''
  setting.update(fields)
  return setting


def cut_only(config) -> None:
  """No training of pruned networks, and no goals."""
  config.distil.epochs = config.admm.epochs = config.retrain.epochs = 0.0
  for setting in config.patterns.values():
    setting.goals, setting.reference = (), ''


def aim(config, points: float) -> None:
  """What is asked of 8.4x."""
  for name in ('n1v4', 'n4v8_quarter', 'n2v8_half'):
    config.patterns[name].goals = (('conv_compression_bytes', 8.4), ('change', -points))
    config.patterns[name].reference = 'arXiv 2002.04997: 8.4x at 0.2 points, full width'


def resnet20() -> ml_collections.ConfigDict:
  """Published ResNet-20 on 30,000 of the 50,000 training images, 12 epochs a setting."""
  config = base()
  config.dense_goal = 91.73
  return config


def chosen() -> ml_collections.ConfigDict:
  """ResNet-20 trained here for 15 epochs; ways to train, 10 epochs each, at one rate."""
  config = base('own_resnet20')
  config.admm.epochs, config.retrain.epochs = 3.0, 7.0
  config.patterns = settings = ml_collections.ConfigDict()
  settings.admm = patterns(1, 8)
  settings.strong = patterns(1, 8, admm={'rho': (3e-2, 3e-1)})
  settings.fast = patterns(1, 8, retrain={'lr': 0.05})
  settings.retrain = patterns(1, 8, admm={'epochs': 0.0}, retrain={'epochs': 10.0})
  settings.votes = patterns(1, 8, codebook='votes')
  settings.distil = patterns(1, 8, distil={'epochs': 1.0}, admm={'epochs': 2.0})
  config.settings = ('admm', 'strong', 'fast', 'retrain', 'votes')
  return config


def vgg16_quarter() -> ml_collections.ConfigDict:
  """VGG-16 at width 0.25 on 27,000 of the 50,000 training images, 12 epochs a setting."""
  config = base('vgg16_quarter')
  aim(config, points=1.0)
  config.settings = ('dense_retrained', 'n1v4', 'n2v8_half')
  return config


def grid() -> ml_collections.ConfigDict:
  """Published networks, every setting, cut at once."""
  config = base()
  config.networks = ('resnet20', 'resnet56')
  config.settings = tuple(name for name in config.patterns)
  cut_only(config)
  return config


def resnet56() -> ml_collections.ConfigDict:
  """Published ResNet-56, every setting, cut at once."""
  config = grid()
  cifar.start(config, 'resnet56')
  config.networks, config.dense_goal = (), 93.39
  return config


def full() -> ml_collections.ConfigDict:
  """The grid trained: 200 epochs for networks without weights, 120 towards patterns, 60 within."""
  config = base('vgg16')
  config.networks = ('resnet20', 'resnet56', 'resnet18', 'vgg16')
  config.settings = tuple(name for name in config.patterns)
  config.data.workers = 8
  config.dense.epochs = 200.0
  config.admm.update(epochs=120.0, rho=(1e-4, 1e-3, 1e-2, 1e-1), refreshes=29)
  config.retrain.update(epochs=60.0, lr=0.01)
  return config


def vgg16() -> ml_collections.ConfigDict:
  """VGG-16 of 14.7 M convolution weights: n = 4 and 2, and 8.4x in three ways."""
  config = full()
  config.networks = ()
  aim(config, points=0.2)
  config.settings = ('n4v8', 'n2v8', 'n1v4', 'n4v8_quarter', 'n2v8_half')
  return config


def resnet18() -> ml_collections.ConfigDict:
  """ResNet-18 for CIFAR-10; its 1x1 shortcuts stay dense, so n = 1 makes no more than 8.0x."""
  config = full()
  cifar.start(config, 'resnet18')
  config.networks = ()
  config.settings = ('n4v8', 'n2v8', 'n1v4')
  return config


def on_imagenet(name: str) -> ml_collections.ConfigDict:
  """ImageNet: 90 epochs, 40 towards the patterns, 30 within them."""
  config = full()
  imagenet(config)
  config.networks, config.settings = (), ('n4v8', 'n2v8')
  config.model.name = config.model.label = name
  config.dense.update(lr=0.1, epochs=90.0, weight_decay=1e-4)
  config.admm.update(lr=1e-3, epochs=40.0, refreshes=9, weight_decay=1e-4)
  config.retrain.update(epochs=30.0, weight_decay=1e-4)
  config.log_every = 500
  return config


def imagenet_vgg16() -> ml_collections.ConfigDict:
  """VGG-16 with batch norm."""
  config = on_imagenet('vgg16')
  config.model.options.batch_norm = True
  config.dense.lr = 0.05
  return config


def imagenet_resnet18() -> ml_collections.ConfigDict:
  """ResNet-18; the 7x7 convolution stays dense."""
  config = on_imagenet('resnet18')
  for setting in config.patterns.values():
    setting.layers = setting.layers[1:]
  return config


def smoke() -> ml_collections.ConfigDict:
  """Two minutes on two cores: VGG-16 at an eighth of its width, few steps."""
  config = base('vgg16_quarter')
  config.model.label, config.model.options.width = 'vgg16_eighth', 0.125
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', 'train_outer', 'test',
  )  # fmt: skip
  d.batch_size, d.eval_batch_size, d.calibration_images, d.augment = 32, 200, 400, 'none'
  config.dense.update(lr=0.05, epochs=4.0)
  config.admm.update(epochs=1.0, refreshes=2)
  config.retrain.epochs = 1.0
  config.settings = ('n4v8', 'n1v4')
  config.log_every = 10
  return config
