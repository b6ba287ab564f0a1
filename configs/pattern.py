"""Kernels in a few patterns, with and without connectivity.

  python -m experiments.pattern --config=configs/pattern.py:PRESET[,key=value] --workdir=DIR

| preset | what it prunes | where it is meant to run |
| --- | --- | --- |
| `resnet20` (default) | published ResNet-20 for CIFAR-10: all libraries, then 4x and 8x | 2 cores, hours |
| `chosen` | ResNet-20 trained here, a tenth of the images held out: what settings are chosen on | 2 cores, hours |
| `grid` | ResNet-20 and ResNet-56 one-shot: cut and new statistics, no training | 2 cores, an hour |
| `full` | the grid trained, 3 seeds | one GPU or TPU, hours |
| `imagenet_vgg16`, `imagenet_resnet50` | ImageNet | TPU v3-8, 8 GPUs or more |
| `smoke` | a narrow VGG-16 on embedded photographs, few steps | 2 cores, two minutes |

`resnet20` trains every setting for 5 epochs towards its patterns and 6 within them, 11 in all; an
epoch is 234 steps of 128 images, about 140 s of one core. `,settings=elog4+corner4` runs a part of
them (several such commands may share a workdir), `,seeds=1` fewer seeds, `,network=resnet56` another
network of `experiments/cifar.py`. Figures of the last runs: `results.csv`, rows `pattern/...`.
"""

import ml_collections

from configs.common import imagenet, narrow, parse_arg
from experiments import cifar
from experiments.compression import admm_recipe, recipe

PRESETS = ('resnet20', 'chosen', 'grid', 'full', 'imagenet_vgg16', 'imagenet_resnet50', 'smoke')
# The libraries of the comparison, and what two of them cost with connectivity.
ALONE = (
  'extracted12', 'extracted8', 'extracted4', 'elog4', 'corner4', 'elog4_corner4', 'random8',
)  # fmt: skip
ALL = ('dense_retrained', *ALONE, 'joint4', 'joint8')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0, network='')
  config = globals()[arg['preset']]()
  narrow(config, arg)
  if arg['network']:
    cifar.start(config, arg['network'])
    config.networks = ()
  return config


def base(network: str = 'resnet20') -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default."""
  config = cifar.fields(network)
  config.seeds = (0, 1, 2)
  config.settings = ALL  # 'dense_retrained', and keys of `choices`
  config.networks = ()  # of `experiments/cifar.py`, one after the other; (): `model`

  # Between two refreshes weights have to come some way towards their targets, or duals grow and
  # patterns cycle: lr / (1 - momentum) * rho * steps between refreshes is 0.5 or more everywhere.
  config.pull = admm_recipe(
    lr=0.01, epochs=5.0, schedule='constant', weight_decay=5e-4, rho=(0.1, 0.5), refreshes=3
  )
  config.retrain = recipe(lr=0.02, epochs=6.0, weight_decay=5e-4)
  config.library = ml_collections.ConfigDict()
  config.library.sizes = (44, 32, 12, 8, 4)  # of the libraries below the candidates
  config.library.epochs = 0.5  # towards each of them; part of the epochs of `pull`
  config.library.rho = (0.1,)
  config.library.refreshes = 1

  config.choices = choices = ml_collections.ConfigDict()
  for size in (12, 8, 4):
    choices[f'extracted{size}'] = choice('extracted', size)
    choices[f'extracted{size}_any4'] = choice('extracted', size, candidates='any4')
    choices[f'extracted{size}_energy'] = choice('extracted', size, by='energy')
  for name in ('elog4', 'corner4', 'elog4+corner4', 'edge4'):
    choices[name.replace('+', '_')] = choice(name)
  choices.random8 = choice('random', 8)
  for rate in (4, 8):
    choices[f'joint{rate}'] = choice(
      'extracted', 8, rate=float(rate), goals=(('conv_compression', float(rate)),)
    )
  for name in ALONE[:-1]:  # what chance reaches is asked for nothing
    choices[name].goals = (('gain', 0.0),)
    choices[name].reference = 'ECCV 2020: patterns alone raise accuracy'
  config.log_every = 50
  config.record = False  # append to results.csv
  return config


def choice(library: str, size: int = 0, rate: float = 0.0, **fields) -> ml_collections.ConfigDict:
  """A setting: where its patterns come from, and how many times smaller convolutions get."""
  setting = ml_collections.ConfigDict()
  setting.library = library  # 'extracted', 'random', or a designed set
  setting.size = size  # patterns of an extracted or random library
  setting.candidates = 'centre56'  # these are extracted or drawn from; 'any4': all 126
  setting.by = 'counts'  # of kernels; the 'energy' they keep
  setting.rate = rate  # of all convolutions, by connectivity; 0: patterns alone
  setting.goals = ()  # (metric, value) for the ledger
  setting.reference = ''
  setting.update(fields)
  return setting


def resnet20() -> ml_collections.ConfigDict:
  """Published ResNet-20 on 30,000 of the 50,000 training images, 11 epochs a setting."""
  return base()


def chosen() -> ml_collections.ConfigDict:
  """ResNet-20 trained here for 30 epochs; settings are compared on 3,000 images held out."""
  config = base('own_resnet20')
  config.seeds = (0,)
  return config


def grid() -> ml_collections.ConfigDict:
  """Published networks, every library, cut at once."""
  config = base()
  config.networks = ('resnet20', 'resnet56')
  config.seeds = (0,)
  config.data.calibration_images = 4000
  config.settings = tuple(name for name in config.choices)
  config.pull.epochs = config.retrain.epochs = config.library.epochs = 0.0
  for name in config.choices:
    config.choices[name].goals, config.choices[name].reference = (), ''
  return config


def full() -> ml_collections.ConfigDict:
  """The grid trained at the length of public re-implementations: 60 epochs and 60 more."""
  config = base()
  config.networks = cifar.NETWORKS
  config.settings = ('dense_retrained', *config.choices)
  config.data.workers = 8
  config.dense.epochs = 150.0
  config.pull.epochs, config.library.epochs = 60.0, 6.0
  config.pull.rho, config.library.rho = (0.02, 0.1, 0.5), (0.02,)
  config.retrain.epochs = 60.0
  return config


def on_imagenet(name: str) -> ml_collections.ConfigDict:
  """ImageNet: libraries of 12, 8 and 4, and both rates, one seed."""
  config = base('own_resnet20')
  imagenet(config)
  config.seeds = (0,)
  config.model.name = config.model.label = name
  config.dense = recipe(lr=0.1, epochs=90.0, weight_decay=1e-4)
  config.pull.update(lr=1e-3, epochs=24.0, weight_decay=1e-4, rho=(0.02, 0.1))
  config.library.epochs = 2.0
  config.library.rho = (0.02,)
  config.retrain = recipe(lr=1e-2, epochs=30.0, weight_decay=1e-4)
  config.log_every = 500
  return config


def imagenet_vgg16() -> ml_collections.ConfigDict:
  """VGG-16 with batch norm; PatDNN reports top-5 92.1 / 92.3 / 92.4 of 91.7 with 6 / 8 / 12."""
  config = on_imagenet('vgg16')
  config.model.options.batch_norm = True
  config.dense.lr = 0.05
  return config


def imagenet_resnet50() -> ml_collections.ConfigDict:
  """ResNet-50, patterns alone; PatDNN reports top-5 92.7 / 92.8 / 93.0 of 92.7 with 6 / 8 / 12."""
  config = on_imagenet('resnet50')
  # Half of its weights are 1x1: patterns and connectivity of 3x3 kernels end below 2x.
  config.settings = ('dense_retrained', *ALONE)
  return config


def smoke() -> ml_collections.ConfigDict:
  """Two minutes on two cores: VGG-16 at an eighth of its width, one seed, few steps."""
  config = base('vgg16_quarter')
  config.seeds = (0,)
  config.model.label, config.model.options.width = 'vgg16_eighth', 0.125
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', '', 'test',
  )  # fmt: skip
  d.batch_size, d.eval_batch_size, d.augment = 32, 100, 'none'
  config.dense.update(lr=0.05, epochs=4.0)
  config.library.sizes, config.library.epochs = (4,), 1.0
  config.pull.update(lr=0.05, epochs=3.0, rho=(0.5,))
  config.retrain.epochs = 2.0
  config.log_every = 10
  config.settings = ('dense_retrained', 'joint4')
  config.choices.joint4.size = 4
  for name in config.choices:
    config.choices[name].goals, config.choices[name].reference = (), ''
  return config
