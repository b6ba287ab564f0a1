"""Pruning by ADMM to a prescribed rate, and few levels for what survives.

  python -m experiments.admm_nn_s --config=configs/admm_nn_s.py:PRESET[,key=value] --workdir=DIR

| preset | what it prunes | where it is meant to run |
| --- | --- | --- |
| `lenet5` (default) | LeNet-5 on MNIST, unstructured to 71x, 348x and 500x by ADMM and gradually, structured along a ladder; three seeds | 2 cores, an hour and a half |
| `lenet5_quantized` | rungs of those ladders on 3 and 2 bits, equal steps and powers of two | 2 cores, an hour and a half |
| `lenet5_compact` | a narrower LeNet-5 first, then its weights; all training images | 2 cores, an hour |
| `lenet5_binary` | LeNet-5, every weight a sign, first and last layers too | 2 cores, half an hour |
| `resnet20` | published ResNet-20 for CIFAR-10, unstructured and structured, float and 4 bits | 2 cores, a day |
| `resnet50` | ImageNet, unstructured to 8 | TPU v3-8, 8 GPUs or more |
| `alexnet` | ImageNet, unstructured to 36 | the same |
| `vgg16` | ImageNet, unstructured and structured | the same |
| `smoke` | LeNet-5 on embedded photographs, few steps | 2 cores, three minutes |

`,settings=structured` and `,seeds=1` choose what of a comparison is run; the presets of LeNet-5 may share a workdir, where
nothing is trained twice. Figures of the last runs: `results.csv`, rows `admm_nn_s/...`.
"""

import ml_collections

from configs.common import narrow, parse_arg
from experiments import cifar
from experiments.compression import admm_recipe, gradual_recipe, recipe

PRESETS = (
  'lenet5', 'lenet5_quantized', 'lenet5_compact', 'lenet5_binary', 'resnet20', 'resnet50', 'alexnet', 'vgg16', 'smoke',
)  # fmt: skip


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, PRESETS, settings='', seeds=0)
  config = globals()[arg['preset']]()
  narrow(config, arg)
  return config


def base() -> ml_collections.ConfigDict:
  """Every field there is, with its type and its default."""
  config = ml_collections.ConfigDict()
  config.seeds = (0,)
  config.settings = ('unstructured',)  # keys of `rates` and `quantize`

  config.data = data = ml_collections.ConfigDict()
  data.name = 'tfds:imagenet2012'
  data.train_split = 'train[:99%]'
  data.held_out_split = 'train[99%:]'  # what is chosen is chosen on these; '': nothing is chosen
  data.test_split = 'validation'
  data.data_dir = ''
  data.batch_size = 256
  data.workers = 16  # processes per host that decode and augment; 0 does it in this one
  data.augment = 'random_resized_crop'  # 'none', 'shift', 'pad_crop'
  data.size = 224  # side of the images in pixels; 0: as they are
  data.grey = False
  data.mean = (0.485, 0.456, 0.406)  # of pixels in 0..1
  data.std = (0.229, 0.224, 0.225)

  config.model = model = ml_collections.ConfigDict()
  model.name = 'resnet50'
  model.options = ml_collections.ConfigDict()  # of `models.create_model`, dense training
  model.pruned = ml_collections.ConfigDict()  # options that differ from then on
  model.weights = ''  # torchvision-named .safetensors to start from; '': trained here

  config.label_smoothing = 0.0
  config.distill = ml_collections.ConfigDict()  # the dense network teaches the pruned ones
  config.distill.share = 0.0  # of the loss; 0: it does not
  config.distill.temperature = 4.0
  config.dense = recipe(lr=0.1, epochs=90.0, weight_decay=1e-4)
  config.admm = admm_recipe(lr=1e-3, epochs=30.0, schedule='constant', weight_decay=1e-4)
  config.gradual = gradual_recipe(lr=1e-3, epochs=30.0, optimizer='adam')  # 'pooled', 'units'
  config.retrain = recipe(lr=1e-2, epochs=10.0, weight_decay=1e-4)  # rungs on the way
  config.finish = recipe(lr=1e-2, epochs=40.0, weight_decay=1e-4)  # rungs that count

  config.rates = ml_collections.ConfigDict()
  config.quantize = ml_collections.ConfigDict()
  # Towards levels, until all are mapped, and straight-through: as many epochs either way.
  config.pull = admm_recipe(lr=1e-3, epochs=5.0, schedule='constant', rho=(1e-2, 1e-1), refreshes=4)
  config.mapping = recipe(lr=1e-3, epochs=10.0)
  config.straight = recipe(lr=1e-3, epochs=15.0)
  config.loss_goal = 0.3  # points a rung may lose and still be chosen
  config.dense_goal = 0.0  # top-1 of the dense network, %; 0: none
  config.log_every = 100
  config.record = False  # append to results.csv
  return config


def ladder(
  kind: str, layers: tuple, rungs: tuple, named: tuple = (), last: str = '', start: str = ''
) -> ml_collections.ConfigDict:
  """A setting: what each rung keeps of each layer, and the rungs that have a name and goals.

  Args:
    kind: 'unstructured', 'structured' (filters and columns at once), 'pooled' (all layers that a
      regex matches have one budget), or 'units' (filters, which leave as those of 'pooled' do).
    layers: regexes of the layers; the first that matches wins.
    rungs: kept fractions, one for each layer, from mild to sparse.
    named: (index of a rung, name, ((metric, goal), ...), reference); these are retrained at length
      and recorded. A setting without them is retrained at length on every rung, and of it the
      sparsest rung that loses at most `loss_goal` is recorded.
    last: the layer of a structured network whose filters are the classes.
    start: a ladder whose sparsest rung this one begins with; '': the dense network.
  """
  setting = ml_collections.ConfigDict()
  setting.kind = kind
  setting.layers = layers
  setting.rungs = rungs
  setting.named = named
  setting.last = last
  setting.start = start
  setting.filter_share = 0.5  # of a structured layer's rate: the part of its filters, in logarithms
  return setting


def levels(
  start: str, bits: int | tuple, rungs: tuple = (0,), named: tuple = (), **fields
) -> ml_collections.ConfigDict:
  """A setting of `quantize`: which network goes on which levels.

  Args:
    start: the ladder, a key of `rates`, whose pruned networks are quantized; '': the dense network.
    bits: of every kernel, or ((regex, bits), ...), the first that matches wins.
    rungs: of that ladder; 0 is the dense network.
    named: (rung, name, ((metric, goal), ...), reference), as in `ladder`: what is recorded.
    **fields: see below.
  """
  setting = ml_collections.ConfigDict()
  setting.start = start
  setting.bits = (('.*/kernel', bits),) if isinstance(bits, int) else bits
  setting.rungs = rungs
  setting.named = named
  setting.levels = 'interval'  # 'power_of_two', 'ternary', 'binary', 'uniform'
  setting.per = 'layer'  # what shares a scale; 'channel'
  setting.way = 'admm'  # and progressive mapping; 'straight': straight-through
  setting.floats = 'float32'  # of biases in the file; 'bfloat16', 'int8', 'int6'
  setting.update(fields)
  return setting


def even(keeps: tuple, rungs: int) -> tuple:
  """Rungs that fall evenly, in their logarithm, to `keeps`."""
  return tuple(tuple(round(keep ** ((i + 1) / rungs), 6) for keep in keeps) for i in range(rungs))


def lenet5() -> ml_collections.ConfigDict:
  """LeNet-5, 430.5 K weights: 71.2x, 348x, 500x unstructured; filters and columns."""
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
  config.dense = recipe(optimizer='adam', lr=1e-3, epochs=12.0, weight_decay=5e-5)
  # Few weights bear, and need, a high learning rate; what the dense network knows keeps them from
  # learning the training images by heart.
  config.distill.share = 0.9
  config.admm = admm_recipe(optimizer='adam', lr=1e-3, epochs=6.0, schedule='constant')
  config.retrain = recipe(optimizer='adam', lr=5e-3, epochs=4.0)
  config.finish = recipe(optimizer='adam', lr=5e-3, epochs=24.0)
  config.dense_goal = 99.2
  layers = ('conv1/kernel', 'conv2/kernel', 'fc1/kernel', 'fc2/kernel')
  config.rates.unstructured = ladder(
    'unstructured',
    layers,
    (
      (0.7, 0.40, 0.24, 0.40),
      (0.5, 0.18, 0.05, 0.18),
      (0.4, 0.08, 0.0086, 0.08),
      (0.34, 0.038, 0.003, 0.056),
      (0.28, 0.0185, 0.00108, 0.04),
      (0.24, 0.013, 0.00066, 0.03),
    ),
    (
      (2, 'unstructured71', (('top1', 99.2), ('compression', 71.2)),
       'arXiv 1804.03294: 71.2x at 99.2 %'),
      (4, 'unstructured348', (('top1', 99.0), ('change', -0.2), ('compression', 348.0)),
       'arXiv 1907.02124: 348x'),
      (5, 'unstructured500', (('top1', 99.0), ('change', -0.2), ('compression', 500.0)), 'stretch'),
    ),
  )  # fmt: skip
  config.rates.structured = ladder(
    'structured', layers, even((0.25, 0.06, 0.008, 0.2), 7)[1:], last='fc2/kernel'
  )
  # A little below the rates, where rounding cannot spoil them; in small steps, each retrained at length.
  budgets, claim = (
    ((0.014,), (0.0086,), (0.00465,), (0.00287,), (0.001998,)),
    'arXiv 1907.02124: 348x',
  )
  bounds = (('top1', 99.0), ('change', -0.2))
  pooled = (
    (0, 'pooled71', (('top1', 99.2), ('compression', 71.2)), 'arXiv 1804.03294: 71.2x at 99.2 %'),
    (1, 'pooled116', (), ''),
    (2, 'pooled215', (), ''),
    (3, 'pooled348', (*bounds, ('compression', 348.0)), claim),
    (4, 'pooled500', (*bounds, ('compression', 500.0)), 'stretch'),
  )
  config.rates.pooled = ladder('pooled', ('.*/kernel',), budgets[:4], pooled[:4])
  config.rates.pooled_further = ladder('pooled', ('.*/kernel',), budgets, pooled)
  config.rates.pooled_file = ladder('pooled', ('.*/kernel',), (*budgets[:2], (0.0056,)))
  # Fewer units first: what is left is easier to train, and its places take fewer bits.
  config.rates.units = ladder('units', layers[:3], ((0.55, 0.44, 0.14),))
  config.rates.compact = ladder(
    'pooled', ('.*/kernel',), ((0.0067,), (0.00287,)),
    ((0, 'compact149', (), ''), (1, 'compact348', (*bounds, ('compression', 348.0)), claim)),
    start='units',
  )  # fmt: skip
  config.gradual = gradual_recipe(optimizer='adam', lr=2e-3, epochs=10.0)
  config.settings = ('unstructured', 'pooled', 'structured')

  config.pull = admm_recipe(
    optimizer='adam', lr=1e-3, epochs=5.0, schedule='constant', rho=(1e-2, 1e-1), refreshes=4
  )
  config.mapping = recipe(optimizer='adam', lr=3e-3, epochs=15.0)
  config.straight = recipe(optimizer='adam', lr=2e-3, epochs=20.0)
  goals = (
    ('top1', 99.0),
    ('compression_values', 3700.0),
    ('file_bytes', 4000.0),
    ('file_top1', 99.0),
  )
  reference = 'arXiv 1811.01907: 1,910x at about 99 %'
  mixed = (('conv./kernel', 3), ('fc./kernel', 2))
  q = config.quantize
  q.interval3 = levels('pooled', 3, (3,), ((3, 'interval3', goals, reference),))
  q.interval32 = levels('pooled', mixed, (3,), ((3, 'interval32', goals, reference),))
  q.power_of_two3 = levels(
    'pooled', 3, (3,), ((3, 'power_of_two3', goals, reference),), levels='power_of_two'
  )
  q.interval4_sparser = levels(
    'pooled_further', 4, (4,), ((4, 'interval4_sparser', goals, reference),)
  )
  q.interval3_file = levels(
    'pooled', 3, (2,), ((2, 'interval3_file', (goals[0], *goals[2:]), reference),),
    floats='bfloat16',
  )  # fmt: skip
  q.pooled3_file = levels(
    'pooled_file', 3, (2,), ((2, 'pooled3_file', (goals[0], *goals[2:]), reference),),
    floats='int6',
  )  # fmt: skip
  q.compact3_file = levels(
    'compact', 3, (0,), ((0, 'compact3_file', (goals[0], *goals[2:]), reference),),
    floats='bfloat16',
  )  # fmt: skip
  q.compact3 = levels('compact', 3, (1,), ((1, 'compact3', goals, reference),))
  q.interval3_structured = levels('structured', 3, (1, 3), ((3, 'interval3_structured', (), ''),))
  lossless = (('top1', 99.0),), 'arXiv 1907.02124: fully binarized without loss'
  q.binary = levels(
    '', 1, named=((0, 'binary', *lossless),), levels='binary', per='channel', way='straight'
  )
  q.binary_layer = levels(
    '', 1, named=((0, 'binary_layer', *lossless),), levels='binary', way='straight'
  )
  q.binary_admm = levels('', 1, named=((0, 'binary_admm', *lossless),), levels='binary')
  return config


def lenet5_quantized() -> ml_collections.ConfigDict:
  """Survivors of LeNet-5 on few levels: 1,235 weights of 3 bits are 463 bytes, 3,719x."""
  config = lenet5()
  config.settings = (
    'interval3', 'interval3_file', 'pooled3_file', 'interval32', 'power_of_two3', 'interval4_sparser',
    'interval3_structured',
  )  # fmt: skip
  return config


def lenet5_compact() -> ml_collections.ConfigDict:
  """LeNet-5 made narrower, then sparse; no image is held out, for nothing is chosen."""
  config = lenet5()
  config.data.train_split, config.data.held_out_split = 'train', ''
  config.gradual.update(epochs=8.0, renewals=24)
  config.finish.epochs = 14.0
  config.pull.epochs, config.mapping.epochs = 3.0, 10.0
  config.settings = ('compact', 'compact3_file', 'compact3')
  return config


def lenet5_binary() -> ml_collections.ConfigDict:
  """LeNet-5 of signs: a scale per output channel or per layer, straight-through or by ADMM."""
  config = lenet5()
  config.settings = ('binary', 'binary_layer', 'binary_admm')
  return config


def resnet20() -> ml_collections.ConfigDict:
  """Published ResNet-20 for CIFAR-10: what structure is worth once both kinds have 4 bits."""
  config = base()
  config.update(cifar.fields('resnet20'))
  config.distill.share = 0.5
  layers = ('conv1/kernel', 'fc/kernel', '.*kernel')
  config.rates.unstructured = ladder(
    'unstructured', layers, even((0.5, 0.4, 0.06), 3), ((2, 'unstructured', (), ''),)
  )
  config.rates.structured = ladder(
    'structured', layers, even((0.8, 0.8, 0.25), 3), ((2, 'structured', (), ''),), last='fc/kernel'
  )
  config.admm = admm_recipe(lr=1e-2, epochs=3.0, schedule='constant', weight_decay=5e-4)
  config.retrain = recipe(lr=2e-2, epochs=3.0, weight_decay=5e-4)
  config.finish = recipe(lr=2e-2, epochs=6.0, weight_decay=5e-4)
  config.pull.update(lr=1e-2, epochs=2.0, weight_decay=5e-4)
  config.mapping.update(lr=1e-2, epochs=4.0, weight_decay=5e-4)
  config.straight.update(lr=1e-2, epochs=6.0, weight_decay=5e-4)
  rungs = (0, 1, 2)
  config.quantize.interval4 = levels('unstructured', 4, rungs, ((2, 'interval4', (), ''),))
  config.quantize.interval4_structured = levels(
    'structured', 4, rungs, ((2, 'interval4_structured', (), ''),)
  )
  config.settings = ('unstructured', 'structured', 'interval4', 'interval4_structured')
  return config


def resnet50() -> ml_collections.ConfigDict:
  """ImageNet ResNet-50 at the paper's 8x."""
  config = base()
  config.rates.unstructured = ladder(
    'unstructured',
    ('conv1/kernel', '.*downsample.*kernel', 'fc/kernel', '.*kernel'),
    even((0.5, 0.2, 0.2, 0.118), 3),
    ((2, 'unstructured8', (('change', -0.2), ('compression', 8.0)), 'arXiv 1907.02124: 8x'),),
  )
  config.settings = ('unstructured',)
  return config


def alexnet() -> ml_collections.ConfigDict:
  """ImageNet AlexNet (BVLC) at the paper's 36x."""
  config = base()
  config.model.name = 'alexnet'
  config.model.options.dropout = 0.5
  config.data.size = 227
  config.dense = recipe(lr=0.01, epochs=90.0, weight_decay=5e-4)
  config.admm.rho = (1.5e-3,)
  config.rates.unstructured = ladder(
    'unstructured',
    tuple(f'{name}/kernel' for name in (
      'conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8',
    )),
    even((0.81, 0.2, 0.19, 0.2, 0.2, 0.015, 0.03, 0.06), 4),
    ((3, 'unstructured36', (('change', -0.2), ('compression', 36.0)), 'arXiv 1907.02124: 36x'),),
  )  # fmt: skip
  config.settings = ('unstructured',)
  return config


def vgg16() -> ml_collections.ConfigDict:
  """ImageNet VGG-16, unstructured and in filters and columns."""
  config = base()
  config.model.name = 'vgg16'
  config.model.options.dropout = 0.5
  config.dense = recipe(lr=0.01, epochs=90.0, weight_decay=5e-4)
  layers = ('conv1_.*/kernel', 'conv.*/kernel', 'fc8/kernel', 'fc.*/kernel')
  config.rates.unstructured = ladder('unstructured', layers, even((0.4, 0.15, 0.1, 0.03), 4))
  config.rates.structured = ladder(
    'structured', layers, even((0.6, 0.3, 0.3, 0.1), 4), last='fc8/kernel'
  )
  config.settings = ('unstructured', 'structured')
  return config


def smoke() -> ml_collections.ConfigDict:
  """Three minutes on two cores: LeNet-5 on embedded photographs, one seed, few steps."""
  config = lenet5()
  config.seeds = (0,)
  d = config.data
  d.name, d.train_split, d.held_out_split, d.test_split = (
    'photo_patches', 'train_inner', 'train_outer', 'test',
  )  # fmt: skip
  d.batch_size = 32
  config.dense.epochs = 4.0
  config.admm.epochs = config.retrain.epochs = config.finish.epochs = 1.0
  config.admm.refreshes = 2
  config.log_every = 10
  config.dense_goal = 0.0
  config.rates.unstructured.rungs = ((0.5,) * 4, (0.3,) * 4)
  config.rates.unstructured.named = ()
  config.rates.structured.rungs = ((0.5,) * 4,)
  for phase in ('pull', 'mapping', 'straight'):
    config[phase].epochs = 1.0
  config.pull.refreshes = 1
  config.quantize = ml_collections.ConfigDict(
    {
      'interval3': levels('unstructured', 3, (1,)),
      'interval3_structured': levels('structured', 3),
      'binary': levels('', 1, levels='binary', per='channel', way='straight'),
    }
  )
  config.settings = ('unstructured', 'structured', *config.quantize)
  return config
