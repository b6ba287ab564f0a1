"""Weights of other libraries as variables of ours, every name, shape and dtype checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import os
from typing import Any, NamedTuple
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fqjax.models._mobilenet_v2 import MobileNetV2
from fqjax.models._network import Network
from fqjax.models._resnet import CifarResNet, ResNet
from fqjax.models._vgg import STAGES, VGG

Path = str | os.PathLike[str]
Keys = tuple[str, ...]


def import_torchvision(weights: Path | Mapping[str, Any], model: Network) -> dict[str, Any]:
  """Reads torchvision-named weights; PyTorch is not needed.

  Args:
    weights: A .safetensors file, or names to arrays (convolutions OIHW, dense [out, in]).
    model: `resnet18` .. `resnet101`, `mobilenet_v2` or `vgg16` for RGB, of the file's number of
      classes; `vgg16` with `batch_norm=True` where the file has it.

  Returns:
    {'params', 'batch_stats'} of float32 arrays, of a VGG-16 without batch norm {'params'}.

  Raises:
    ValueError: Another kind of model; a file that is no safetensors file; names, shapes or types
      that differ from the model's (the first few are listed); values that are not finite.

  Example:
    >>> model = create_model('resnet18')
    >>> variables = import_torchvision('resnet18.safetensors', model)  # doctest: +SKIP

  Source: parameter names and layouts of torchvision's `models/resnet.py`, `models/mobilenetv2.py`,
  `models/vgg.py`.
  """
  _need_rgb(model, 'import_torchvision', (ResNet, MobileNetV2, VGG), 'resnet50')
  if isinstance(model, MobileNetV2) and model.convention != 'torch':
    raise ValueError(
      'torchvision weights belong to symmetric padding and norm epsilon 1e-5.\n  Use '
      "create_model('mobilenet_v2', convention='torch')."
    )
  source = _read(weights)
  if isinstance(model, VGG):
    source = _channels_last(source, 'classifier.0.weight', model.image_size // 2 ** len(STAGES))
    return _fill(model, source, _torch_vgg_name(model.batch_norm), model.image_size)
  name = _torch_mobilenet_name if isinstance(model, MobileNetV2) else _torch_resnet_name
  return _fill(model, source, name)


def load_cifar_resnet_npz(path: Path, model: Network) -> dict[str, Any]:
  """Reads a ResNet-20, 32 or 56 for CIFAR-10 from an .npz of PyTorch-named arrays.

  Args:
    path: The file, e.g. `cifar10_resnet20.npz`.
    model: `cifar_resnet20`, `cifar_resnet32` or `cifar_resnet56`.

  Returns:
    {'params', 'batch_stats'} of float32 arrays.

  Raises:
    ValueError: As `import_torchvision`.

  Example:
    >>> model = create_model('cifar_resnet20')
    >>> variables = load_cifar_resnet_npz('cifar10_resnet20.npz', model)  # doctest: +SKIP

  Source: github.com/akamaster/pytorch_resnet_cifar10 (input: RGB / 255, minus
  (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)).
  """
  _need_rgb(model, 'load_cifar_resnet_npz', (CifarResNet,), 'cifar_resnet20')
  with _open_npz(path) as file:
    return _fill(model, _from_npz(file, path), _cifar_resnet_name)


def load_mobilenet_v2_npz(path: Path, model: Network) -> dict[str, Any]:
  """Reads MobileNetV2 from an .npz of TensorFlow-slim-named arrays.

  The classifier may be stored as int8 with a scale per class. A model of one class less than the
  file gets the weights without the first, the background.

  Args:
    path: The file, e.g. `mobilenet_v2_1.0_224.npz`.
    model: `mobilenet_v2` with `convention='tf'`.

  Returns:
    {'params', 'batch_stats'} of float32 arrays.

  Raises:
    ValueError: As `import_torchvision`.

  Example:
    >>> model = create_model('mobilenet_v2', convention='tf')
    >>> variables = load_mobilenet_v2_npz('mobilenet_v2_1.0_224.npz', model)  # doctest: +SKIP

  Source: TensorFlow-slim `mobilenet_v2.py` (input: RGB / 127.5 - 1).
  """
  _need_rgb(model, 'load_mobilenet_v2_npz', (MobileNetV2,), 'mobilenet_v2')
  if getattr(model, 'convention', None) != 'tf':
    raise ValueError(
      "these weights belong to 'SAME' padding and norm epsilon 1e-3.\n  Use "
      "create_model('mobilenet_v2', convention='tf')."
    )
  with _open_npz(path) as file:
    source = _slim_classifier(_from_npz(file, path), model.num_classes)
    return _fill(model, source, _slim_mobilenet_name)


# Sources: what is in a file, known before any array is read.


class _Source(NamedTuple):
  label: str
  specs: dict[str, tuple[tuple[int, ...], np.dtype]]
  read: Callable[[str], np.ndarray]


def _read(weights: Path | Mapping[str, Any]) -> _Source:
  return _from_arrays(weights) if isinstance(weights, Mapping) else _from_safetensors(weights)


def _from_arrays(arrays: Mapping[str, Any]) -> _Source:
  arrays = {name: np.asarray(value) for name, value in arrays.items()}
  return _Source(
    'the given arrays', {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.__getitem__
  )


def _from_safetensors(path: Path) -> _Source:
  # The format's own reader checks that header, offsets and file size agree.
  try:
    arrays = safetensors.numpy.load_file(path)
  except FileNotFoundError:
    raise
  except (
    safetensors.SafetensorError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,  # Types NumPy lacks.
  ) as error:
    raise ValueError(f'{os.fspath(path)} cannot be read as a safetensors file: {error}') from error
  return _from_arrays(arrays)._replace(label=os.fspath(path))


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
  # Opened here: NumPy leaves the file open when it is damaged.
  with open(path, 'rb') as stream:
    try:
      file = np.load(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f'{os.fspath(path)} cannot be read as an .npz file: {error}') from error
    if not isinstance(file, np.lib.npyio.NpzFile):
      raise ValueError(f'{os.fspath(path)} holds one array, an .npz of named arrays is needed.')
    with file:
      yield file


def _from_npz(file: np.lib.npyio.NpzFile, path: Path) -> _Source:
  label = os.fspath(path)
  archive: Any = file.zip

  def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def inner(name):
      try:
        return read(name)
      except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'{label}: array {name!r} cannot be read: {error}') from error

    return inner

  def spec(name: str) -> tuple[tuple[int, ...], np.dtype]:
    # Headers first: a small file can claim, and unpack to, an array of any size.
    with archive.open(f'{name}.npy') as member:
      version = np.lib.format.read_magic(member)
      header = np.lib.format.read_array_header_1_0
      if version != (1, 0):
        header = np.lib.format.read_array_header_2_0
      shape, _, dtype = header(member)
    return shape, dtype

  return _Source(
    label, {name: checked(spec)(name) for name in file.files}, checked(file.__getitem__)
  )


# Names: the path of a leaf of ours to the name in the file, and the axes of the file's array in
# the order of ours.

_TORCH_LEAF = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_OIHW_TO_HWIO = (2, 3, 1, 0)
_TORCH_DENSE = (1, 0)
Rename = Callable[[Keys], tuple[str, tuple[int, ...] | None]]


def _torch_resnet_name(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
  *modules, leaf = keys[1:]
  parts = [
    {'downsample_conv': 'downsample.0', 'downsample_bn': 'downsample.1'}.get(m, m.replace('_', '.'))
    for m in modules
  ]
  axes = None
  if leaf == 'kernel':
    axes = _TORCH_DENSE if modules == ['fc'] else _OIHW_TO_HWIO
  return '.'.join([*parts, _TORCH_LEAF[leaf]]), axes


def _cifar_resnet_name(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
  name, axes = _torch_resnet_name(keys)
  return ('linear' + name.removeprefix('fc') if name.startswith('fc.') else name), axes


def _torch_mobilenet_name(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
  *modules, leaf = keys[1:]
  axes = _OIHW_TO_HWIO if leaf == 'kernel' else None
  if modules == ['classifier']:
    return f'classifier.1.{_TORCH_LEAF[leaf]}', _TORCH_DENSE if leaf == 'kernel' else None
  block, layer = modules
  # The first block has no expansion, so what follows is counted from one lower.
  i = 0 if block == 'features_1' else 1
  place = {
    'conv': '0',
    'bn': '1',
    'expand': 'conv.0.0',
    'expand_bn': 'conv.0.1',
    'depthwise': f'conv.{i}.0',
    'depthwise_bn': f'conv.{i}.1',
    'project': f'conv.{i + 1}',
    'project_bn': f'conv.{i + 2}',
  }[layer]
  return f'{block.replace("_", ".")}.{place}.{_TORCH_LEAF[leaf]}', axes


def _torch_vgg_name(batch_norm: bool) -> Rename:
  layers, place = {'fc6': 'classifier.0', 'fc7': 'classifier.3', 'fc8': 'classifier.6'}, 0
  for stage, (_, count) in enumerate(STAGES, 1):
    for i in range(1, count + 1):
      layers[f'conv{stage}_{i}'] = f'features.{place}'
      layers[f'bn{stage}_{i}'] = f'features.{place + 1}'
      place += 3 if batch_norm else 2  # norm and ReLU are numbered too,
    place += 1  # and so is the pool

  def rename(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
    _, layer, leaf = keys
    axes = _TORCH_DENSE if layer.startswith('fc') else _OIHW_TO_HWIO
    return f'{layers[layer]}.{_TORCH_LEAF[leaf]}', axes if leaf == 'kernel' else None

  return rename


def _channels_last(source: _Source, name: str, size: int) -> _Source:
  """Puts the inputs of a dense layer, a map [c, size, size] there, in our order [h, w, c]."""

  def read(key: str) -> np.ndarray:
    array = source.read(key)
    if key != name:
      return array
    return array.reshape(len(array), -1, size, size).transpose(0, 2, 3, 1).reshape(array.shape)

  return source._replace(read=read)


_SLIM_CLASSIFIER = 'Logits_Conv2d_1c_1x1'


def _slim_mobilenet_name(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
  *modules, leaf = keys[1:]
  if modules == ['classifier']:
    return f'{_SLIM_CLASSIFIER}_{"weights" if leaf == "kernel" else "biases"}', None
  block, layer = modules
  index = int(block.removeprefix('features_'))
  if layer in ('conv', 'bn'):
    prefix = 'Conv' if index == 0 else 'Conv_1'
  else:
    prefix = 'expanded_conv' if index == 1 else f'expanded_conv_{index - 1}'
    prefix += '_' + layer.removesuffix('_bn')
  if leaf == 'kernel':
    # Depthwise kernels are stored as height, width, channel, 1.
    depthwise = layer == 'depthwise'
    return f'{prefix}{"_depthwise" * depthwise}_weights', (0, 1, 3, 2) if depthwise else None
  leaf = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}[leaf]
  return f'{prefix}_BatchNorm_{leaf}', None


def _slim_classifier(source: _Source, num_classes: int) -> _Source:
  """Gives the classifier as float32 [1280, num_classes] under its plain name."""
  kernel, bias = f'{_SLIM_CLASSIFIER}_weights', f'{_SLIM_CLASSIFIER}_biases'
  parts = (f'{kernel}_int8', f'{kernel}_scale')
  # Output 0 is background in a file of 1,001 classes.
  first = int(source.specs.get(bias, ((),))[0] == (num_classes + 1,))
  classes = num_classes + first
  arrays = {}
  if first:
    arrays[bias] = source.read(bias)[1:]
  if set(parts) <= set(source.specs):
    (shape, dtype), (scale_shape, scale_dtype) = (source.specs[part] for part in parts)
    if (
      (len(shape), shape[-1:], scale_shape) != (2, (classes,), (classes,))
      or shape[0] > 1 << 16
      or (dtype, scale_dtype) != (np.int8, np.float32)
    ):
      raise ValueError(
        f'{source.label}: {parts[0]} must be int8 [n, {classes}] and {parts[1]} float32 '
        f'[{classes}], got {dtype} {list(shape)} and {scale_dtype} {list(scale_shape)}.\n'
        '  Make the model with the num_classes of the file.'
      )
    matrix = source.read(parts[0]).astype(np.float32) * source.read(parts[1])[None]
    arrays[kernel] = matrix[:, first:]
  specs = {name: spec for name, spec in source.specs.items() if name not in parts}
  specs |= {name: (array.shape, array.dtype) for name, array in arrays.items()}
  return source._replace(
    specs=specs, read=lambda name: arrays[name] if name in arrays else source.read(name)
  )


# Filling a model.


def _need_rgb(model: Network, caller: str, classes: tuple[type, ...], example: str) -> None:
  entry = getattr(model, 'entry', None)
  if not isinstance(model, classes) or entry not in ('rgb', None):
    kind = type(model).__name__
    dct = '; for DCT input, carry the result over with rgb_to_dct_variables'
    raise ValueError(
      f'{caller} fills {" or ".join(c.__name__ for c in classes)} for RGB images, got {kind}'
      f'{f" for {entry} input" if entry else ""}.\n  Use create_model({example!r})'
      f'{dct if isinstance(model, classes) else ""}.'
    )


def _fill(model: Network, source: _Source, rename: Rename, size: int = 32) -> dict[str, Any]:
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  leaves, structure = jax.tree_util.tree_flatten_with_path(template)
  names, axes, shapes = [], [], []
  for path, leaf in leaves:
    name, order = rename(tuple(key.key for key in path))
    order = order or tuple(range(leaf.ndim))
    names.append(name)
    axes.append(order)
    # The file's axis order[i] is our axis i.
    shapes.append(tuple(leaf.shape[order.index(i)] for i in range(leaf.ndim)))

  # Only PyTorch's counters of batches seen may be left over.
  present = {name for name in source.specs if not name.endswith('num_batches_tracked')}
  missing, extra = set(names) - present, present - set(names)
  if missing or extra:
    raise ValueError(
      f'{source.label}: names differ from those of {type(model).__name__}.\n'
      f'  Missing ({len(missing)}): {_first(missing)}\n  Unknown ({len(extra)}): {_first(extra)}'
    )
  wrong = [
    f'{name} {list(source.specs[name][0])} instead of {list(shape)}'
    for name, shape in zip(names, shapes, strict=True)
    if source.specs[name][0] != shape
  ]
  if wrong:
    raise ValueError(
      f'{source.label}: {len(wrong)} shapes differ from the model: {_first(wrong)}\n'
      '  Make the model with the num_classes and width of the file.'
    )
  wrong = [
    f'{name} {source.specs[name][1]}'
    for name in names
    if not jnp.issubdtype(source.specs[name][1], jnp.floating)
  ]
  if wrong:
    raise ValueError(f'{source.label}: weights must be float, got {_first(wrong)}')
  arrays = [np.asarray(source.read(name), np.float32) for name in names]
  wrong = [n for n, a in zip(names, arrays, strict=True) if not np.isfinite(a).all()]
  if wrong:
    raise ValueError(f'{source.label}: values that are not finite in {_first(wrong)}')
  filled = [jnp.asarray(a.transpose(order)) for a, order in zip(arrays, axes, strict=True)]
  return jax.tree.unflatten(structure, filled)


def _first(items: Iterable[str], limit: int = 5) -> str:
  items = sorted(items)
  more = f', and {len(items) - limit} more' if len(items) > limit else ''
  return (', '.join(items[:limit]) or 'none') + more
