"""Sources by name: `load_source('cifar10', 'train')`, and the readers of sets kept on disk."""

from collections.abc import Callable, Sequence
import functools
import gzip
import json
import os
import pathlib
from typing import Any
import zipfile

import numpy as np

from fqjax.data import _sources
from fqjax.data._sources import ArraySource, CachedSource, Source

ENVIRONMENT = 'FQJAX_DATA_DIR'

_CIFAR10 = (
  'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
)  # fmt: skip
_CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
  butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
  crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
  lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
  oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
  possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
  spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
  train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""


def load_source(name: str, split: str = 'train', **options: Any) -> Source:
  """Opens a set of labelled images by name.

  Args:
    name: one of
      'photo_patches': 64 x 64 patches of ten photographs, embedded, needs `fqjax[demo]` ('train_outer'
      and 'train_inner' are disjoint regions of 'train');
      'synthetic': gratings in noise, needs nothing (options n, size, num_classes);
      'mnist', 'cifar10', 'cifar100', 'tiny_imagenet10', 'imagenet_samples': from the folder named
      by the environment variable FQJAX_DATA_DIR;
      'coco_mini': from there too, 60 photographs to train, 60 to validate, 'all' of them; without
      labels (every one is 0), for statistics;
      'folder:PATH', 'zip:PATH': one folder of images per class;
      'records:PATH': written by `python -m fqjax.data.prepare`;
      'tfds:NAME': any TensorFlow Datasets builder (option data_dir).
    split: 'train', 'test', ...; 'val' and 'validation' are understood where a set has but one
      held-out split, and 'all' takes a folder or zip without splits. `'train[:90%]'` and
      `'train[90%:]'` take a part of any split, for example to choose settings on images that are
      neither trained on nor scored at the end (see `PartSource`; TFDS takes its own).
    **options: passed on to the source.

  Returns:
    A `Source`: `len(source)`, `source[i] -> {'image': uint8 [height, width, 3], 'label': int}`,
    `name`, `num_classes`, `class_names`.

  Raises:
    ValueError: unknown name or split.
    FileNotFoundError: the set is not there; says where it looked and how to get it.

  Example:
    >>> source = load_source('synthetic', 'test', n=4, size=16)
    >>> source[0]['image'].shape, len(source)
    ((16, 16, 3), 4)
  """
  scheme, _, rest = name.partition(':')
  if split.endswith(']') and scheme != 'tfds':
    split, _, part = split[:-1].partition('[')
    return _sources.PartSource(load_source(name, split, **options), part)
  if rest and scheme in _SCHEMES:
    return _SCHEMES[scheme](rest, split, **options)
  if not rest and name in _NAMES:
    return _NAMES[name](split, **options)
  raise ValueError(
    f'unknown source {name!r}: choose one of {", ".join(sorted(_NAMES))}, or '
    f'{", ".join(f"{s}:..." for s in sorted(_SCHEMES))}.'
  )


def choose_split(name: str, split: str, splits: dict[str, str]) -> str:
  """Looks a split up, with an error that lists the ones there are."""
  if split not in splits:
    raise ValueError(f'{name} has no split {split!r}; it has {", ".join(sorted(splits))}.')
  return splits[split]


TRAIN_TEST = {'train': 'train', 'test': 'test', 'val': 'test', 'validation': 'test'}
TRAIN_VAL = {'train': 'train', 'test': 'val', 'val': 'val', 'validation': 'val'}


def _data_file(name: str, file: str, instead: str) -> pathlib.Path:
  """Finds `FQJAX_DATA_DIR/name/file`, or says where it looked and how to get the set."""
  root = os.environ.get(ENVIRONMENT)
  if root and (path := pathlib.Path(root).expanduser() / name / file).is_file():
    return path
  looked = f'{pathlib.Path(root) / name / file}' if root else f'nowhere, {ENVIRONMENT} is not set'
  raise FileNotFoundError(
    f'{name} not found (looked in: {looked}). Set {ENVIRONMENT} to the folder that contains '
    f'{name}/{file}. {instead}'
  )


def _tfds_instead(name: str) -> str:
  return (
    f'Or let TFDS download it: `python -m fqjax.data.prepare --from tfds:{name} --download`, then '
    f"use the source 'tfds:{name}'. The sources 'photo_patches' and 'synthetic' need no files."
  )


_NEED_NO_FILES = (
  "A folder of your own is 'folder:PATH'; 'photo_patches' and 'synthetic' need no files."
)


def _read_json(path: pathlib.Path, length: int | None = None) -> list[tuple[str, str]]:
  """`[[wordnet id, words], ...]` with its shape checked."""
  rows = json.loads(path.read_text(encoding='utf-8'))
  if (
    not isinstance(rows, list)
    or (length is not None and len(rows) != length)
    or not all(isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) for r in rows)
  ):
    raise ValueError(f'{path} is not a list of [wordnet id, name] pairs.')
  return [(r[0], str(r[1])) for r in rows]


@functools.lru_cache(maxsize=4)
def _decode_cifar(path: pathlib.Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Undoes the second differences of the colour-difference planes.

  Kept per process: unpacking takes seconds, and train and test are asked for again and again.
  """
  with zipfile.ZipFile(path) as archive:
    size = sum(info.file_size for info in archive.infolist())
  if size > 2**29:
    raise ValueError(f'{path} unpacks to {size} bytes, more than any CIFAR file holds.')
  with np.load(path, allow_pickle=False) as stored:
    residual, label = stored['residual'], stored['label']
  n = label.shape[0] if label.ndim == 1 else -1
  if residual.shape != (3, n, 32, 32) or residual.dtype != np.uint8 or label.dtype != np.uint8:
    raise ValueError(
      f'{path}: expected uint8 residual [3, n, 32, 32] and label [n], got {residual.dtype} '
      f'{list(residual.shape)} and {label.dtype} {list(label.shape)}.'
    )
  if n and label.max() >= num_classes:
    raise ValueError(f'{path}: label {label.max()} is not one of {num_classes} classes.')
  green, red, blue = np.cumsum(
    np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8
  )  # the sums and differences wrap modulo 256, which is how they were stored
  images = np.stack([red + green, green, blue + green], axis=-1)
  images.flags.writeable = False
  return images, label


def _cifar(name: str, class_names: tuple[str, ...]) -> Callable[..., Source]:
  def load(split: str) -> Source:
    split = choose_split(name, split, TRAIN_TEST)
    path = _data_file(name, f'{name}_{split}.npz', _tfds_instead(name))
    images, labels = _decode_cifar(path, len(class_names))
    return ArraySource(images, labels, name=f'{name} {split}', class_names=class_names)

  return load


def read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
  """Reads a gzipped idx file of uint8 with a checked header and an exact length.

  Raises:
    ValueError: another type or number of dimensions, missing or surplus bytes.
  """
  limit = 2**28
  try:
    with gzip.open(path) as f:
      data = f.read(limit + 1)
  except (OSError, EOFError) as e:
    raise ValueError(f'{path} is damaged: {e}.') from e
  header = 4 + 4 * dimensions
  if len(data) > limit or len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
    raise ValueError(f'{path} is not an idx file of bytes with {dimensions} dimensions.')
  shape = np.frombuffer(data, '>u4', dimensions, 4).tolist()
  if len(data) - header != int(np.prod(shape)):
    raise ValueError(f'{path} promises {shape} but holds {len(data) - header} bytes.')
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _mnist(split: str) -> Source:
  split = choose_split('mnist', split, TRAIN_TEST)
  prefix = 'train' if split == 'train' else 't10k'
  image_file, label_file = (f'{prefix}-{k}-ubyte.gz' for k in ('images-idx3', 'labels-idx1'))
  images = read_idx(_data_file('mnist', image_file, _tfds_instead('mnist')), 3)
  labels = read_idx(_data_file('mnist', label_file, _tfds_instead('mnist')), 1)
  return ArraySource(images, labels, name=f'mnist {split}', class_names=list('0123456789'))


def _tiny_imagenet10(split: str, cache: bool = True) -> Source:
  split = choose_split('tiny_imagenet10', split, TRAIN_VAL)
  path = _data_file('tiny_imagenet10', 'tiny_imagenet10.zip', _NEED_NO_FILES)
  rows = _read_json(_data_file('tiny_imagenet10', 'classes.json', _NEED_NO_FILES))
  source = _sources.ZipSource(path, split, class_names=[r[0] for r in rows])
  source.name = f'tiny_imagenet10 {split}'
  source.class_names = tuple(r[1] for r in rows)
  return CachedSource(source) if cache else source


class _ImagenetSamples(Source):
  """Photographs named `<wordnet id>_<class name>.JPEG` at the top of a zip file."""

  def __init__(self, path: pathlib.Path, rows: list[tuple[str, str]]):
    self.name = 'imagenet_samples'
    self.class_names = tuple(r[1] for r in rows)
    self.num_classes = len(rows)
    self.path = path
    index = {r[0]: i for i, r in enumerate(rows)}
    self.members = sorted('/'.join(m) for m in _sources.read_members(path))
    ids = [m.rsplit('/', 1)[-1].split('_')[0] for m in self.members]
    unknown = [m for m, i in zip(self.members, ids, strict=True) if i not in index]
    if unknown:
      raise ValueError(f'{path}: {unknown[0]!r} does not begin with a known wordnet id.')
    self.labels = [index[i] for i in ids]
    self._archive = _sources._Archive(path)

  def __len__(self) -> int:
    return len(self.members)

  def read(self, index: int) -> dict[str, Any]:
    name = f'{self.path}!{self.members[index]}'
    data = self._archive.read(self.members[index], name)
    return {'image': data, 'label': self.labels[index], 'name': name}


def _imagenet_samples(split: str = 'test') -> Source:
  only = {'test': '', 'val': '', 'validation': '', 'all': ''}
  choose_split('imagenet_samples', split, only)
  path = _data_file('imagenet_samples', 'imagenet_samples.zip', _NEED_NO_FILES)
  rows = _read_json(_data_file('imagenet_samples', 'classes.json', _NEED_NO_FILES), 1000)
  return _ImagenetSamples(path, rows)


class _Photographs(Source):
  """Images without labels in zip files, one file after the other."""

  def __init__(self, name: str, paths: Sequence[pathlib.Path]):
    self.name, self.num_classes, self.class_names = name, 1, ('photograph',)
    archives = [_sources._Archive(path) for path in paths]
    self._members = [
      (archive, member)
      for archive in archives
      for member in sorted('/'.join(m) for m in _sources.read_members(archive.path))
    ]
    if not self._members:
      raise ValueError(f'{name}: no image in {", ".join(map(str, paths))}.')

  def __len__(self) -> int:
    return len(self._members)

  def read(self, index: int) -> dict[str, Any]:
    archive, member = self._members[index]
    name = f'{archive.path}!{member}'
    return {'image': archive.read(member, name), 'label': 0, 'name': name}


def _coco_mini(split: str) -> Source:
  found = choose_split('coco_mini', split, {**TRAIN_VAL, 'all': 'all'})
  parts = ('train', 'val') if found == 'all' else (found,)
  paths = [_data_file('coco_mini', f'{part}_images.zip', _NEED_NO_FILES) for part in parts]
  return _Photographs(f'coco_mini {found}', paths)


def _synthetic(split: str, n: int = 512, size: int = 32, num_classes: int = 10) -> Source:
  """Gratings, one direction and wavelength per class, in noise: learnable, and no file needed."""
  held_out = choose_split('synthetic', split, TRAIN_TEST) == 'test'
  rng = np.random.default_rng([int(held_out), n, size, num_classes])
  labels = np.arange(n) % num_classes
  angle = np.pi * labels / num_classes
  cycles = 2 + labels % 3
  grid = np.arange(size) / size
  wave = (
    np.cos(angle)[:, None, None] * grid[:, None] + np.sin(angle)[:, None, None] * grid
  ) * cycles[:, None, None]
  image = 128 + 50 * np.cos(2 * np.pi * (wave + rng.random((n, 1, 1))))[..., None]
  image = image + rng.normal(0, 25, (n, size, size, 3))
  images = np.clip(np.rint(image), 0, 255).astype(np.uint8)
  return ArraySource(images, labels, name=f'synthetic {split}')


def _photo_patches(split: str, **options: Any) -> Source:
  from fqjax.data import _photo_patches

  return _photo_patches.photo_patches(split, **options)


def _records(path: str, split: str, **options: Any) -> Source:
  from fqjax.data import _records

  return _records.RecordSource(path, split, **options)


_NAMES: dict[str, Callable[..., Source]] = {
  'cifar10': _cifar('cifar10', _CIFAR10),
  'cifar100': _cifar('cifar100', tuple(_CIFAR100.split())),
  'coco_mini': _coco_mini,
  'imagenet_samples': _imagenet_samples,
  'mnist': _mnist,
  'photo_patches': _photo_patches,
  'synthetic': _synthetic,
  'tiny_imagenet10': _tiny_imagenet10,
}

_SCHEMES: dict[str, Callable[..., Source]] = {
  'folder': _sources.FolderSource,
  'records': _records,
  'tfds': _sources.TfdsSource,
  'zip': _sources.ZipSource,
}
