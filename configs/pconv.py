"""Sparse convolution patterns and connectivity, beside other structures at equal rates.

  python -m experiments.pconv --config=configs/pconv.py:PRESET[,key=value] --workdir=DIR

| preset | what it prunes | where it is meant to run |
| --- | --- | --- |
| `vgg16_quarter` (default) | VGG-16 for CIFAR-10 at a quarter of its width, trained here, at 8.4x | 2 cores, hours |
| `chosen` | ResNet-20 trained here, a tenth of the images held out: what settings are chosen on | 2 cores, hours |
| `grid` | ResNet-20 and ResNet-56, all kinds at six rates, one-shot: cut and new statistics | 2 cores, an hour |
| `full` | the grid trained, 3 seeds | one GPU or TPU, hours |
| `imagenet_vgg16`, `imagenet_resnet50`, `imagenet_mobilenet_v2` | ImageNet, the paper's rates | TPU v3-8, 8 GPUs or more |
| `smoke` | a narrow VGG-16 on embedded photographs, few steps | 2 cores, two minutes |

`vgg16_quarter` trains the dense network for 30 epochs of the 27,000 images that are not held out, and
every setting for 6 epochs towards its plan and 8 within it, 14 in all. `,settings=scp_8.4x` runs a part
of them (several such commands may share a workdir), `,seeds=1` fewer seeds, `,network=resnet56` another
network of `experiments/cifar.py`. Figures of the last runs: `results.csv`, rows `pconv/...`.
"""

import ml_collections

from configs.common import imagenet, narrow, parse_arg
from experiments import cifar
from experiments.compression import admm_recipe, recipe

PRESETS = (
  'vgg16_quarter', 'chosen', 'grid', 'full', 'imagenet_vgg16', 'imagenet_resnet50',
  'imagenet_mobilenet_v2', 'smoke',
)  # fmt: skip
KINDS = ('scp', 'connectivity', 'unstructured', 'filters', 'channels')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0, network='')
  config = globals()[arg['preset']]()
  narrow(config, arg)
  if arg['network']:
    cifar.start(config, arg['network'])
    config.networks = ()
  return config


def base(network: str = 'vgg16_quarter') -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default."""
  config = cifar.fields(network)
  config.seeds = (0, 1, 2)
  config.settings = ()  # KIND_RATEx, KIND_alone
  config.networks = ()  # of `experiments/cifar.py`, one after the other; (): `model`
  config.library = 'elog4'  # of `sparsity.pattern_set`
  config.pointwise = False  # 1x1 kernels go too
  # Between two refreshes weights have to come some way towards their targets, or duals grow and
  # patterns cycle: lr / (1 - momentum) * rho * steps between refreshes is 0.5 or more everywhere.
  config.pull = admm_recipe(
    lr=0.01, epochs=6.0, schedule='constant', weight_decay=5e-4, rho=(0.1, 0.5), refreshes=3
  )
  config.retrain = recipe(lr=0.02, epochs=8.0, weight_decay=5e-4)
  config.goals = ()  # (setting, metric, value) for the ledger
  config.reference = ''
  config.log_every = 50
  config.record = False  # append to results.csv
  return config


def at(*rates: str, kinds=KINDS) -> tuple[str, ...]:
  """Every kind at every rate."""
  return tuple(f'{kind}_{rate}' for rate in rates for kind in kinds)


def vgg16_quarter() -> ml_collections.ConfigDict:
  """VGG-16 at a quarter of its width, 8.4 times smaller in every way, 14 epochs a setting."""
  config = base()
  config.settings = at('8.4x')
  config.goals = (('scp_8.4x', 'change', -1.0), ('scp_8.4x', 'conv_compression', 8.4))
  return config


def chosen() -> ml_collections.ConfigDict:
  """ResNet-20 trained here for 30 epochs; settings are compared on 3,000 images held out."""
  config = base('own_resnet20')
  config.seeds = (0,)
  config.settings = at('alone', '4x', '8x', kinds=('scp',))
  return config


def grid() -> ml_collections.ConfigDict:
  """Published networks, every kind at every rate, cut at once."""
  config = base('resnet20')
  config.networks = ('resnet20', 'resnet56')
  config.seeds = (0,)
  config.data.calibration_images = 4000
  config.settings = at('alone', '3x', '4x', '8x', '12x', '18x')
  config.pull.epochs = config.retrain.epochs = 0.0
  return config


def full() -> ml_collections.ConfigDict:
  """The grid trained at the length of public re-implementations: 120 epochs and 60 more."""
  config = base('resnet20')
  config.networks = cifar.NETWORKS
  config.settings = at('alone', '4x', '8x', '8.4x', '12x', '18x')
  config.data.workers = 8
  config.dense.epochs = 150.0
  config.pull.epochs, config.retrain.epochs = 120.0, 60.0
  config.pull.rho = (0.01, 0.1, 0.5)
  return config


def on_imagenet(name: str) -> ml_collections.ConfigDict:
  """ImageNet, one seed."""
  config = base('own_resnet20')
  imagenet(config)
  config.seeds = (0,)
  config.model.name = config.model.label = name
  config.dense = recipe(lr=0.1, epochs=90.0, weight_decay=1e-4)
  config.pull.update(lr=1e-3, epochs=24.0, weight_decay=1e-4, rho=(0.01, 0.1))
  config.retrain = recipe(lr=1e-2, epochs=30.0, weight_decay=1e-4)
  config.log_every = 500
  return config


def imagenet_vgg16() -> ml_collections.ConfigDict:
  """VGG-16 with batch norm: the T shapes alone, and 8, 12 and 18 times smaller convolutions."""
  config = on_imagenet('vgg16')
  config.model.options.batch_norm = True
  config.dense.lr = 0.05
  config.settings = (*at('alone', '12x', '18x', kinds=('scp',)), *at('8x'))
  return config


def imagenet_resnet50() -> ml_collections.ConfigDict:
  """ResNet-50 at 4.4x, its 1x1 kernels included, and the T shapes alone."""
  config = on_imagenet('resnet50')
  config.pointwise = True
  config.settings = ('scp_alone', *at('4.4x'))
  return config


def imagenet_mobilenet_v2() -> ml_collections.ConfigDict:
  """MobileNetV2: T shapes in its depthwise kernels, and half of its 1x1 weights besides."""
  config = on_imagenet('mobilenet_v2')
  config.pointwise = True
  config.dense = recipe(lr=0.05, epochs=150.0, weight_decay=4e-5)
  config.pull.weight_decay = config.retrain.weight_decay = 4e-5
  config.settings = ('scp_alone', 'scp_2x', 'unstructured_2x')
  return config


def smoke() -> ml_collections.ConfigDict:
  """Two minutes on two cores: VGG-16 at an eighth of its width, one seed, few steps."""
  config = base()
  config.seeds = (0,)
  config.model.label, config.model.options.width = 'vgg16_eighth', 0.125
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', '', 'test',
  )  # fmt: skip
  d.batch_size, d.eval_batch_size, d.augment = 32, 100, 'none'
  config.dense.update(lr=0.05, epochs=4.0)
  config.pull.update(lr=0.05, epochs=3.0, rho=(0.5,))
  config.retrain.epochs = 2.0
  config.log_every = 10
  config.settings = ('scp_4x', 'filters_4x')
  return config
