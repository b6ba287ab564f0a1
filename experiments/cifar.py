"""The CIFAR-10 networks that several experiments prune, and how each of them starts.

  resnet20, resnet56   published weights; they have seen every training image, so nothing is chosen
                       on them
  own_resnet20         trained here, a tenth of the training images held out to choose settings by
  vgg16_quarter        the 13 convolutions of VGG-16 at a quarter of their width, likewise
  vgg16, resnet18      at full width, likewise: for an accelerator

A network that an earlier run trained is taken from its file:
`--config.model.weights=DIR/seed0/dense/variables.npz --config.dense.epochs=0`.
"""

from collections.abc import Callable
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments import compression as cp
from experiments import tasks
from experiments.harness import data_label
from fqjax import data as fd
from fqjax import models

# Training images of the complete set, where ours is a part of it.
_WHOLE = {'cifar10': 50_000}
NETWORKS = ('resnet20', 'resnet56', 'own_resnet20', 'vgg16_quarter', 'vgg16', 'resnet18')


# ---------------------------------------------------------------------------- configuration


def fields(network: str = 'resnet20') -> ml_collections.ConfigDict:
  """The part of a configuration that `make_task` reads: `data`, `model`, `dense`, ..."""
  config = ml_collections.ConfigDict()
  config.data = data = ml_collections.ConfigDict()
  data.name = 'cifar10'
  data.train_split = 'train'
  data.held_out_split = ''  # what is chosen is chosen on these; '': nothing is chosen
  data.test_split = 'test'
  data.data_dir = ''
  data.batch_size = 128
  data.eval_batch_size = 500
  data.calibration_images = 10_000  # that batch-norm statistics are taken on
  data.workers = 0  # processes per host that decode and augment; 0 does it in this one
  data.augment = 'pad_crop'  # 'none', 'shift', 'random_resized_crop'
  data.size = 32  # side of the images in pixels
  data.grey = False
  data.mean = (0.485, 0.456, 0.406)  # of pixels in 0..1
  data.std = (0.229, 0.224, 0.225)

  config.model = model = ml_collections.ConfigDict()
  model.name = 'cifar_resnet20'
  model.label = 'resnet20'  # in tables and in the ledger
  model.options = ml_collections.ConfigDict()  # of `models.create_model`
  model.weights = ''  # file to start from, see `find_weights`; '': trained here

  config.label_smoothing = 0.0
  config.distill = ml_collections.ConfigDict()  # the dense network teaches those made from it
  config.distill.share = 0.0  # of the loss; 0: it does not
  config.distill.temperature = 4.0
  config.dense = cp.recipe(lr=0.1, epochs=30.0, weight_decay=5e-4)
  start(config, network)
  return config


def start(config, network: str) -> None:
  """Sets which of `NETWORKS` it is, and whether it begins with published weights.

  Raises:
    ValueError: for another network.
  """
  if network not in NETWORKS:
    raise ValueError(f'unknown network {network!r}; choose of {", ".join(NETWORKS)}')
  d, model = config.data, config.model
  model.label, model.options = network, ml_collections.ConfigDict()
  if network in ('resnet20', 'resnet56'):
    model.name, model.weights = f'cifar_{network}', f'cifar10_{network}.npz'
    config.dense.epochs = 0.0
    d.train_split, d.held_out_split = 'train', ''
    return
  d.train_split, d.held_out_split = 'train[:90%]', 'train[90%:]'
  config.dense.epochs = config.dense.epochs or 30.0
  architecture = network.removeprefix('own_').removesuffix('_quarter')
  model.name, model.weights = f'cifar_{architecture}', ''
  if network == 'vgg16_quarter':
    model.options.width = 0.25


def with_network(config, network: str):
  """A copy of the configuration for another of `NETWORKS`."""
  copy = config.copy_and_resolve_references()
  with copy.unlocked():
    start(copy, network)
  return copy


def described(config) -> str:
  """Data of a ledger row: what was scored, how much was trained on, where weights came from."""
  d = config.data
  where = {'data_dir': d.data_dir} if d.data_dir else {}
  count = len(fd.load_source(d.name, d.train_split, **where))
  whole = f' of {_WHOLE[d.name]:,}' if d.name in _WHOLE else ''
  published = config.model.weights.endswith('.npz') and '/' not in config.model.weights
  start = f', from the published {config.model.weights}' if published else ''
  return f'{data_label(d.name)} {d.test_split}, trained on {count:,}{whole} images{start}'


# ---------------------------------------------------------------------------- task


def make_task(config, mesh, **options) -> tuple[tasks.Task, Any]:
  """The images of a configuration and its network; `options` replace those of the model.

  Raises:
    FileNotFoundError: there is no such file of weights.
  """
  return tasks.image_task(config, mesh, initial, **options)


def initial(weights: str, model) -> Callable[[jax.Array], tasks.Variables]:
  """Starts from a file: an earlier run's, a published network for CIFAR-10, one of torchvision."""
  path = find_weights(weights)

  def read(key):
    del key
    if path.suffix == '.safetensors':
      return tasks.split(models.import_torchvision(path, model))
    with np.load(path, allow_pickle=False) as file:
      ours = any(name.startswith('params/') for name in file.files)
    if ours:
      size = getattr(model, 'image_size', 32)
      x = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
      return cp.load_variables(path, tasks.split(jax.eval_shape(model.init, jax.random.key(0), x)))
    if model.__class__.__name__ == 'MobileNetV2':
      return tasks.split(models.load_mobilenet_v2_npz(path, model))
    return tasks.split(models.load_cifar_resnet_npz(path, model))

  return read


def find_weights(name: str) -> pathlib.Path:
  """A file of weights: as it is named, or in `weights/` of the folder FQJAX_DATA_DIR.

  Raises:
    FileNotFoundError: it is in neither place.
  """
  path = pathlib.Path(name).expanduser()
  root = os.environ.get('FQJAX_DATA_DIR', '')
  for place in (path, pathlib.Path(root) / 'weights' / name):
    if place.is_file():
      return place
  raise FileNotFoundError(
    f'{name!r} is neither a file nor in weights/ of FQJAX_DATA_DIR ({root or "not set"}). Set the '
    'variable, name a file by --config.model.weights, or train here with --config.model.weights= '
    'and --config.dense.epochs=30.'
  )
