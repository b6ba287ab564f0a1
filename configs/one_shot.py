"""MobileNetV2 cut once, without training.

  python -m experiments.one_shot --config=configs/one_shot.py:PRESET --workdir=DIR

| preset | what it cuts | where it is meant to run |
| --- | --- | --- |
| `mobilenet_v2` (default) | published weights, four structures, 50, 65 and 80 %, by weights and by inputs | 2 cores |
| `smoke` | a narrow network without training on embedded photographs | 2 cores, a minute |

`,structures=unstructured+blocks1x4` and `,criteria=weights` run a part. Nothing is learned from the 250 photographs
that are scored; the statistics are those of 120 others. Figures of the last run: `results.csv`, rows `one_shot/...`.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The configuration for `arg`; see the module's docstring."""
  arg = parse_arg(arg, ('mobilenet_v2', 'smoke'), structures='', criteria='')
  config = globals()[arg['preset']]()
  for name in ('structures', 'criteria'):
    if arg[name]:
      config[name] = tuple(arg[name].split('+'))
  return config


def mobilenet_v2() -> ml_collections.ConfigDict:
  """Every field there is; MobileNetV2 1.0 at 224 pixels."""
  config = ml_collections.ConfigDict()
  config.structures = ('unstructured', 'blocks1x4', 'blocks2x4', 'blocks4x4')  # filters x inputs
  config.sparsities = (0.5, 0.65, 0.8)  # of the weights of every selected layer
  config.criteria = ('weights', 'inputs')
  # The 1x1 convolutions; the regex is of whole paths.
  config.layers = r'features_\d+/(expand|project)/kernel|features_18/conv/kernel'

  config.data = data = ml_collections.ConfigDict()
  data.name = 'imagenet_samples'  # scored
  data.test_split = 'test'
  data.calibration = 'coco_mini'  # gives statistics
  data.calibration_split = 'all'
  data.calibration_images = 120
  data.eval_batch_size = 40
  data.resize = 256  # shorter side in pixels, before
  data.size = 224  # the central square
  data.mean = (0.5, 0.5, 0.5)  # of pixels in 0..1
  data.std = (0.5, 0.5, 0.5)

  config.model = model = ml_collections.ConfigDict()
  model.name = 'mobilenet_v2'
  model.options = ml_collections.ConfigDict({'convention': 'tf'})  # of `models.create_model`
  model.weights = 'mobilenet_v2_1.0_224.npz'  # a file, or one in weights/ of FQJAX_DATA_DIR
  config.record = False  # append to results.csv
  return config


def smoke() -> ml_collections.ConfigDict:
  """A random network a quarter as wide on patches of photographs."""
  config = mobilenet_v2()
  d = config.data
  d.name, d.calibration, d.calibration_split = 'photo_patches', 'photo_patches', 'train_inner'
  d.calibration_images, d.eval_batch_size, d.resize, d.size = 160, 80, 64, 64
  config.model.options.width = 0.25
  config.model.weights = ''
  config.structures, config.sparsities = ('unstructured', 'blocks2x4'), (0.5, 0.8)
  return config
