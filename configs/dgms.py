"""Networks of few distinct weights.

  python -m experiments.dgms --config=configs/dgms.py:PRESET[,key=value] --workdir=DIR

| preset | what it quantizes | where it is meant to run |
| --- | --- | --- |
| `resnet20` (default) | published ResNet-20 for CIFAR-10: mixtures at 4, 3 and 2 bits, others at 4 and 1 | 2 cores, hours |
| `resnet56` | published ResNet-56: mixtures at 4 bits | 2 cores, hours |
| `chosen` | ResNet-20 trained here, a tenth of the images held out: what settings are chosen on | 2 cores, hours |
| `full` | every setting on both, 3 seeds, 350 epochs | one GPU or TPU, a day |
| `imagenet_resnet18`, `imagenet_resnet50`, `imagenet_mnasnet`, `imagenet_proxylessnas` | ImageNet, mixtures at 4 bits | TPU v3-8, 8 GPUs or more |
| `transfer` | ResNet-20 from CIFAR-10 to CIFAR-100: mixtures kept, afresh, and float | 2 cores, an hour |
| `smoke` | a narrow VGG-16 on embedded photographs, few steps | 2 cores, two minutes |

`resnet20` trains every setting for 6 epochs; an epoch is 234 steps of 128 images, about 140 s of one
core. `,settings=mixture4+uniform4` runs a part (several such commands may share a workdir), `,seeds=3`
more seeds, `,network=resnet56` another network of `experiments/cifar.py`. Figures of the last runs:
`results.csv`, rows `dgms/...`.
"""

import ml_collections

from configs.common import imagenet, narrow, parse_arg
from experiments import cifar
from experiments.compression import admm_recipe, recipe

PRESETS = (
  'resnet20', 'resnet56', 'chosen', 'full', 'imagenet_resnet18', 'imagenet_resnet50',
  'imagenet_mnasnet', 'imagenet_proxylessnas', 'transfer', 'smoke',
)  # fmt: skip


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0, network='')
  config = globals()[arg['preset']]()
  narrow(config, arg)
  if arg['network']:
    cifar.start(config, arg['network'])
  return config


def base(network: str = 'resnet20') -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default."""
  config = cifar.fields(network)
  config.seeds = (0,)
  config.settings = ('mixture4', 'mixture3', 'mixture2', 'uniform4', 'interval4', 'binary')
  config.edges = ('conv1(_1)?/kernel', 'fc/kernel')  # regexes of the first and the last layer

  config.dense.epochs = min(config.dense.epochs, 15.0)
  # A mixture's phases, those of levels by ADMM, and straight-through: as many epochs each.
  config.soft = recipe(lr=0.01, epochs=5.0, weight_decay=5e-4, clip=1.0)
  config.hard = recipe(lr=0.002, epochs=1.0, weight_decay=5e-4, clip=1.0)
  config.pull = admm_recipe(
    lr=0.01, epochs=3.0, schedule='constant', weight_decay=5e-4, rho=(1e-2, 1e-1), refreshes=4
  )
  config.mapping = recipe(lr=0.01, epochs=3.0, weight_decay=5e-4)
  config.straight = recipe(lr=0.01, epochs=6.0, weight_decay=5e-4)
  config.rates = ml_collections.ConfigDict()  # learning rates of a mixture over that of the weights
  config.rates.mu = 0.02  # its gradient is a sum over all weights of a level
  config.rates.sigma = 0.02
  config.rates.pi = 0.02

  config.choices = choices = ml_collections.ConfigDict()
  for bits in (4, 3, 2):
    choices[f'mixture{bits}'] = choice('mixture', bits)
    choices[f'mixture{bits}_hard'] = choice('mixture', bits, soft=False)
    choices[f'uniform{bits}'] = choice('uniform', bits)
    choices[f'interval{bits}'] = choice('levels', bits)
  choices.power_of_two4 = choice('levels', 4, levels='power_of_two')
  choices.ternary = choice('levels', 2, levels='ternary')
  choices.binary = choice('binary', 1, edges=0)
  for bits, points in ((4, 0.2), (3, 0.7), (2, 1.5)):
    choices[f'mixture{bits}'].goals = choices[f'mixture{bits}_hard'].goals = (('change', -points),)

  config.transfer = ml_collections.ConfigDict()  # where the network comes from
  config.transfer.data = ''  # that data set; '': it is trained or loaded for `data` itself
  config.transfer.train_split = 'train'
  config.transfer.test_split = 'test'
  config.transfer.weights = ''  # its file; '': trained there, as `dense` says, for so many epochs:
  config.transfer.epochs = 0.0
  config.transfer.kept = ()  # settings that are quantized there and keep their mixtures here

  config.dense_goal = 0.0  # top-1 of the dense network, %; 0: none
  config.log_every = 50
  config.record = False  # append to results.csv
  return config


def choice(kind: str, bits: int, **fields) -> ml_collections.ConfigDict:
  """A setting: which levels, and how they come about."""
  setting = ml_collections.ConfigDict()
  setting.kind = kind  # of `experiments.dgms.KINDS`
  setting.bits = bits  # a mixture of 2**bits components, the zero among them
  setting.levels = 'interval'  # of kind 'levels': 'interval', 'power_of_two', 'ternary'
  setting.edges = 8  # bits of the first and the last layer; 32: float; 0: as the others
  setting.soft = True  # of kind 'mixture': soft weights before hard ones
  setting.tau = 0.01  # of kind 'mixture'
  setting.goals = ()  # (metric, value) for the ledger
  setting.reference = ''
  setting.update(fields)
  return setting


def resnet20() -> ml_collections.ConfigDict:
  """Published ResNet-20 on 30,000 of the 50,000 training images, 6 epochs a setting."""
  config = base()
  config.dense_goal = 91.73
  return config


def resnet56() -> ml_collections.ConfigDict:
  """Published ResNet-56, 4 bits."""
  config = base('resnet56')
  config.settings, config.dense_goal = ('mixture4',), 93.39
  return config


def chosen() -> ml_collections.ConfigDict:
  """ResNet-20 trained here for 15 epochs; settings are compared on 3,000 images held out."""
  config = base('own_resnet20')
  config.settings = ('mixture2', 'mixture2_hard')
  return config


def full() -> ml_collections.ConfigDict:
  """Every setting for as many epochs as published."""
  config = base()
  config.seeds = (0, 1, 2)
  config.settings = tuple(config.choices)
  config.data.workers = 8
  config.soft.epochs, config.hard.epochs = 333.0, 17.0
  config.pull.epochs, config.mapping.epochs, config.straight.epochs = 175.0, 175.0, 350.0
  return config


def on_imagenet(name: str, **options) -> ml_collections.ConfigDict:
  """ImageNet: mixtures at 4 bits, 60 epochs, first convolution and classifier float, as published."""
  config = base()
  imagenet(config)
  config.model.name = config.model.label = name
  config.model.weights, config.model.options = '', ml_collections.ConfigDict(options)
  config.settings = ('mixture4',)
  config.edges = ('conv1/kernel|stem/.*kernel|features_0/.*kernel', '(fc|classifier)/kernel')
  config.choices.mixture4.edges = 32
  config.choices.mixture4.goals = ()
  # The published 2e-5 reached most weights four times a step.
  for phase in ('soft', 'hard'):
    config[phase].update(lr=1e-4, weight_decay=5e-4)
  config.rates.mu = config.rates.sigma = config.rates.pi = 1.0
  config.soft.epochs, config.hard.epochs = 57.0, 3.0
  return config


def imagenet_resnet18() -> ml_collections.ConfigDict:
  """70.29 % were published."""
  config = on_imagenet('resnet18')
  config.choices.mixture4.goals = (('top1', 70.29),)
  config.choices.mixture4.reference = 'the released ResNet-18 of arXiv 2112.15139'
  return config


def imagenet_resnet50() -> ml_collections.ConfigDict:
  """ResNet-50."""
  config = on_imagenet('resnet50')
  config.choices.mixture4.goals = (('change', -0.2),)
  return config


def imagenet_mnasnet() -> ml_collections.ConfigDict:
  """MnasNet-A1."""
  return on_imagenet('mnasnet_a1')


def imagenet_proxylessnas() -> ml_collections.ConfigDict:
  """ProxylessNAS-Mobile."""
  return on_imagenet('proxylessnas_mobile')


def transfer() -> ml_collections.ConfigDict:
  """CIFAR-100 by the published ResNet-20 of CIFAR-10 with a new classifier, as long in every setting.

  `dense` is fine-tuned in float, `mixture4` quantized afresh from the same float weights,
  `mixture4_kept` was quantized on CIFAR-10 and learns the new classes on the levels it has.
  """
  config = base()
  config.data.name = 'cifar100'
  # The weights have seen none of these images: a part of them can be held out.
  config.data.train_split, config.data.held_out_split = 'train[:90%]', 'train[90%:]'
  config.model.weights = ''
  config.transfer.data, config.transfer.weights = 'cifar10', 'cifar10_resnet20.npz'
  config.choices.mixture4.goals = ()
  config.choices.mixture4_kept = choice('mixture', 4)
  config.transfer.kept = ('mixture4_kept',)
  config.settings = ('mixture4', 'mixture4_kept')
  config.soft.epochs, config.hard.epochs = 18.0, 2.0
  config.soft.lr = 0.05
  config.dense = recipe(lr=0.05, epochs=20.0, weight_decay=5e-4)
  return config


def smoke() -> ml_collections.ConfigDict:
  """Two minutes on two cores: a VGG-16 of an eighth of its width on embedded photographs."""
  config = base('vgg16_quarter')
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', 'train_outer', 'test',
  )  # fmt: skip
  d.batch_size, d.eval_batch_size, d.calibration_images, d.augment = 32, 200, 400, 'none'
  config.model.label, config.model.options.width = 'vgg16_narrow', 0.125
  config.dense.update(epochs=4.0, lr=0.05)
  config.settings = ('mixture3', 'interval3', 'uniform3')
  for name in config.settings:
    config.choices[name].goals = ()
  for phase in ('soft', 'hard', 'pull', 'mapping', 'straight'):
    config[phase].epochs = 1.0
  config.straight.epochs = 2.0
  config.pull.refreshes = 1
  config.log_every = 10
  return config
