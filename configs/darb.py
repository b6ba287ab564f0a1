"""Blocks and banks that adapt to the density of each row, against other structures.

  python -m experiments.darb --config=configs/darb.py:PRESET[,key=value] --workdir=DIR

| preset | what it prunes | where it is meant to run |
| --- | --- | --- |
| `lenet5` (default) | the dense layers of LeNet-5 on MNIST, 4x to 100x; three seeds | 2 cores, hours |
| `lstm` | the gates of an LSTM language model on embedded text, 4x to 25x | 2 cores, hours |
| `ptb` | the paper's 2x1500 LSTM, from your files ptb.{train,valid,test}.txt (`,path=FOLDER`) | an accelerator, a day |
| `timit` | a 2x1024 LSTM on your features of speech (`,path=FILE.npz`, see experiments/speech.py) | an accelerator, a day |
| `alexnet` | ImageNet, dense layers and grouped convolutions | TPU v3-8, 8 GPUs or more |
| `cifar_vgg16` | the convolutions of VGG-16 on CIFAR-10 | an accelerator, a day |
| `smoke` | the dense layers of LeNet-5 on embedded photographs, few steps | 2 cores, two minutes |

`,settings=darb+block` and `,seeds=1` choose what of a comparison is run. Figures of the last runs: `results.csv`, rows
`darb/...`.
"""

import ml_collections

from configs.common import narrow, parse_arg
from experiments.compression import admm_recipe, recipe

PRESETS = ('lenet5', 'lstm', 'ptb', 'timit', 'alexnet', 'cifar_vgg16', 'smoke')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0, path='')
  config = globals()[arg['preset']]()
  narrow(config, arg)
  if arg['path']:
    if arg['preset'] not in ('ptb', 'timit'):
      raise ValueError(f'preset {arg["preset"]!r} takes no path; ptb and timit do')
    if arg['preset'] == 'ptb':
      config.data.name = f'ptb:{arg["path"]}'
    else:
      config.data.path = arg['path']
  return config


def base() -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default; `data` is that of images."""
  config = ml_collections.ConfigDict()
  config.seeds = (0,)
  config.settings = ('darb', 'bank', 'unstructured', 'nm', 'block', 'filter')  # keys of `methods`
  config.task = 'images'  # 'text', 'speech'

  config.data = data = ml_collections.ConfigDict()
  data.name = 'tfds:imagenet2012'
  data.train_split = 'train[:99%]'
  data.held_out_split = 'train[99%:]'  # what is chosen is chosen on these; '': nothing is chosen
  data.test_split = 'validation'
  data.data_dir = ''
  data.batch_size = 256
  data.workers = 16  # processes per host that decode and augment; 0 does it in this one
  data.augment = 'random_resized_crop'  # 'none', 'shift', 'pad_crop'
  data.size = 224  # side of the images in pixels
  data.grey = False
  data.mean = (0.485, 0.456, 0.406)  # of pixels in 0..1
  data.std = (0.229, 0.224, 0.225)

  config.model = model = ml_collections.ConfigDict()
  model.name = 'resnet50'
  model.options = ml_collections.ConfigDict()  # of the network, dense training
  model.pruned = ml_collections.ConfigDict()  # options that differ from then on
  model.weights = ''  # torchvision-named .safetensors to start from; '': trained here

  config.label_smoothing = 0.0
  config.dense = recipe(lr=0.1, epochs=90.0, weight_decay=1e-4)
  config.admm = admm_recipe(lr=1e-3, epochs=10.0, schedule='constant', weight_decay=1e-4)
  config.retrain = recipe(lr=1e-2, epochs=10.0, weight_decay=1e-4)

  config.prune = (('.*/kernel', 1.0),)  # (regex, power): kept is a common fraction to this power
  config.last = ''  # regex of the layer whose outputs are the classes
  config.gates = 1  # that lie side by side in the outputs of what is pruned
  config.rates = (4.0, 8.0, 13.0, 16.0, 25.0, 40.0, 64.0, 100.0)  # of all pruned matrices together
  config.named = (13.0, 16.0, 25.0)  # those that the ledger shows
  config.shown = 16.0  # that of the report's pictures
  config.methods = ml_collections.ConfigDict()
  config.methods.darb = method('darb')
  config.methods.bank = method('bank', 64)
  config.methods.unstructured = method('unstructured')
  config.methods.nm = method('nm', 64)
  config.methods.block = method('block', 4)
  config.methods.filter = method('filter', rates=(2.0, 4.0, 8.0, 13.0, 16.0, 25.0))

  config.loss_goal = 0.3  # points (text: perplexity) a rung may lose and still be chosen
  config.goal = 2.8  # times the rate of the best structure (the paper: 2.8 to 4.3); 0: none
  config.dense_goal = 0.0  # top-1 (text: perplexity) of the dense network; 0: none
  config.log_every = 100
  config.record = False  # append to results.csv
  return config


def method(kind: str, size: int = 1, rates: tuple[float, ...] = ()):
  """A setting: its structure, columns of a bank or neighbours or side of a block, its own ladder."""
  setting = ml_collections.ConfigDict()
  setting.kind = kind  # 'darb', 'bank', 'unstructured', 'nm', 'block', 'filter'
  setting.size = size  # at most; the largest divisor of the inputs is taken
  setting.rates = rates  # (): that of all
  return setting


def lenet5() -> ml_collections.ConfigDict:
  """LeNet-5 on MNIST: 405,000 weights of fc1 and fc2, the convolutions stay dense."""
  config = base()
  config.seeds = (0, 1, 2)
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'mnist', 'train[:90%]', 'train[90%:]', 'test',
  )  # fmt: skip
  d.batch_size, d.workers, d.augment, d.size, d.grey = 128, 0, 'none', 28, True
  d.mean, d.std = (0.1307,) * 3, (0.3081,) * 3
  config.model.name = 'lenet5'
  config.model.options.dropout = 0.5
  config.model.pruned.dropout = 0.0
  config.dense = recipe(optimizer='adam', lr=1e-3, epochs=20.0, weight_decay=5e-5)
  config.admm = admm_recipe(optimizer='adam', lr=5e-4, epochs=1.5, schedule='constant')
  config.retrain = recipe(optimizer='adam', lr=1e-3, epochs=2.0)
  # The ten rows of the last layer are 1 % of the weights: at the rate of the others none would do.
  config.prune = (('fc1/kernel', 1.0), ('fc2/kernel', 0.5))
  config.last = 'fc2/kernel'
  config.methods.nm.size = 100  # divides the inputs of both; 64 would leave holes in the ladder
  config.dense_goal = 99.2
  return config


def lstm() -> ml_collections.ConfigDict:
  """One LSTM layer of 256 on the docstrings of this Python's standard library."""
  config = base()
  text(config, 'python_docs', 4000)
  m = config.model
  m.options.hidden, m.options.num_layers, m.options.dropout = 256, 1, 0.5
  m.pruned.dropout = 0.4
  config.dense = recipe(optimizer='adam', lr=3e-3, epochs=20.0, clip=1.0)
  config.admm = admm_recipe(optimizer='adam', lr=1e-3, epochs=1.0, schedule='constant', clip=1.0)
  config.retrain = recipe(optimizer='adam', lr=1e-3, epochs=1.0, clip=1.0)
  config.rates = (4.0, 8.0, 13.0, 16.0, 25.0)
  for setting in config.methods.values():
    setting.rates = ()
  config.methods.nm.size = 128  # 10:128 is 12.8x, 5:128 25.6x
  return config


def ptb() -> ml_collections.ConfigDict:
  """The large LSTM of arXiv 1409.2329 on the Penn Treebank; cosine in place of its steps."""
  config = base()
  text(config, 'ptb:PATH', 10_000)
  m = config.model
  m.options.hidden, m.options.num_layers, m.options.dropout = 1500, 2, 0.65
  m.options.init_scale = 0.04
  # Losses here are means over the 35 words, there sums: lr 1 and clip 10 become these.
  sgd = dict(lr=35.0, momentum=0.0, clip=10 / 35)
  config.dense = recipe(epochs=55.0, **sgd)
  config.admm = admm_recipe(
    epochs=9.0, schedule='constant', rho=(1e-5, 1e-4, 1e-3), **{**sgd, 'lr': 3.5}
  )
  config.retrain = recipe(epochs=12.0, **{**sgd, 'lr': 10.0})
  config.dense_goal = 80.0
  config.rates = (4.0, 8.0, 13.0, 16.0, 25.0, 40.0, 64.0)
  config.methods.nm.size = 125  # divides 1500
  return config


def text(config, name: str, vocab_size: int) -> None:
  """Makes it a language model whose gates are pruned."""
  config.task = 'text'
  config.data = data = ml_collections.ConfigDict()
  data.name = name  # of `data.load_text`
  data.vocab_size = vocab_size
  data.batch_size = 20  # streams
  data.length = 35  # words of a stream per batch
  config.model.name = 'lstm_lm'
  config.prune = ((r'lstm\d+/(input|hidden)/kernel', 1.0),)
  config.gates = 4
  config.loss_goal = 1.0


def timit() -> ml_collections.ConfigDict:
  """Phonemes of frames from features of your own; top-1 is over frames."""
  config = base()
  config.task = 'speech'
  config.data = data = ml_collections.ConfigDict()
  data.path = 'PATH/timit.npz'  # what it holds: experiments/speech.py
  data.batch_size = 32
  data.length = 400  # frames of a piece; longer utterances are cut
  config.model.name = 'lstm'
  m = config.model
  m.options.hidden, m.options.num_layers, m.options.dropout = 1024, 2, 0.3
  config.dense = recipe(optimizer='adam', lr=1e-3, epochs=30.0, clip=1.0)
  config.admm = admm_recipe(optimizer='adam', lr=3e-4, epochs=9.0, schedule='constant', clip=1.0)
  config.retrain = recipe(optimizer='adam', lr=5e-4, epochs=9.0, clip=1.0)
  config.prune = ((r'lstm\d+/.*/kernel', 1.0),)  # a kernel for each gate
  config.methods.nm.size = 128
  return config


def alexnet() -> ml_collections.ConfigDict:
  """ImageNet AlexNet (BVLC): the dense layers hardest, the first convolution not at all."""
  config = base()
  config.model.name = 'alexnet'
  config.model.options.dropout = 0.5
  config.model.pruned.dropout = 0.2
  config.data.size = 227
  config.dense = recipe(lr=0.01, epochs=90.0, weight_decay=5e-4)
  config.prune = (('conv[2-5]/kernel', 0.4), ('fc[67]/kernel', 1.0), ('fc8/kernel', 0.7))
  config.last = 'fc8/kernel'
  return config


def cifar_vgg16() -> ml_collections.ConfigDict:
  """CIFAR-10 VGG-16: its 13 convolutions but the first, which has three inputs."""
  config = base()
  config.seeds = (0, 1, 2)
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'cifar10', 'train[:90%]', 'train[90%:]', 'test',
  )  # fmt: skip
  d.batch_size, d.workers, d.augment, d.size = 128, 4, 'pad_crop', 32
  config.model.name = 'cifar_vgg16'
  config.dense = recipe(lr=0.1, epochs=150.0, weight_decay=5e-4)
  config.admm = admm_recipe(lr=1e-3, epochs=15.0, schedule='constant', weight_decay=5e-4)
  config.retrain = recipe(lr=1e-2, epochs=20.0, weight_decay=5e-4)
  config.prune = (('conv1_2/kernel|conv[2-5]_./kernel', 1.0),)
  config.dense_goal = 93.0
  return config


def smoke() -> ml_collections.ConfigDict:
  """Two minutes on two cores: LeNet-5 on embedded photographs, one seed, few steps."""
  config = lenet5()
  config.seeds = (0,)
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', 'train_outer', 'test',
  )  # fmt: skip
  d.batch_size = 32
  config.dense.epochs = 4.0
  config.admm.epochs = config.retrain.epochs = 1.0
  config.admm.refreshes = 2
  config.admm.rho = (1e-2,)
  config.log_every = 10
  config.rates, config.named, config.shown = (4.0, 13.0), (13.0,), 13.0
  config.methods.filter.rates = ()
  config.settings = ('darb', 'unstructured', 'block')
  config.dense_goal = config.goal = 0.0
  config.loss_goal = 20.0
  return config
