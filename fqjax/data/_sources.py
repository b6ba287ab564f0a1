"""Where examples come from: anything with a length and `source[i] -> {'image', 'label', ...}`."""

from collections.abc import Sequence
import os
import pathlib
import re
import shlex
import stat
from typing import Any
import zipfile

import numpy as np

from fqjax.data import _images

Example = dict[str, Any]


class Source:
  """Random access to labelled images.

  A subclass gives `__len__` and `read`; the loader calls `read`, so that decoding happens in its
  workers, and a person calls `source[i]`. Any object with `__len__` and `__getitem__` can take the
  place of a `Source` in the loader.

  Attributes:
    name: what the source is called in logs and errors.
    num_classes: labels are 0..num_classes - 1.
    class_names: one name per class.
  """

  name: str
  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    raise NotImplementedError

  def read(self, index: int) -> Example:
    """The stored example: 'image' may still be the encoded bytes; 'name' says where it lies."""
    raise NotImplementedError

  def __getitem__(self, index: int) -> Example:
    index = range(len(self))[index]
    example = self.read(index)
    if 'image' in example:
      example = {**example, 'image': _images.pixels(example)}
    return example

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.name}: {len(self)} examples, {self.num_classes} classes)'


class ArraySource(Source):
  """Images and labels held in memory.

  Args:
    images: [n, height, width, 3], [n, height, width, 1] or [n, height, width], usually uint8.
    labels: integers [n].
    name: what errors and logs call it.
    class_names: one per class; numbers if left out.
    rgb: give grey images three equal channels.

  Raises:
    ValueError: shapes or labels that do not belong together.

  Example:
    >>> source = ArraySource(np.zeros((2, 4, 4), np.uint8), np.array([0, 1]))
    >>> source[1]['image'].shape, source[1]['label'], source.num_classes
    ((4, 4, 3), 1, 2)
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = 'arrays',
    class_names: Sequence[str] | None = None,
    rgb: bool = True,
  ):
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
      images = images[..., None]
    if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
      raise ValueError(
        f'{name}: images must be [n, height, width, channels] and labels [n] with the same n > 0, '
        f'got {list(images.shape)} and {list(labels.shape)}.'
      )
    if not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(f'{name}: labels must be integers, got {labels.dtype}.')
    if labels.min() < 0:
      raise ValueError(f'{name}: labels must not be negative, the smallest is {labels.min()}.')
    if class_names is None:
      class_names = [str(i) for i in range(int(labels.max()) + 1)]
    if labels.max() >= len(class_names):
      raise ValueError(
        f'{name}: label {labels.max()} has no name, there are {len(class_names)} class names.'
      )
    self.images, self.labels = _grey_to_rgb(images) if rgb else images, labels.astype(np.int32)
    self.name, self.class_names = name, tuple(class_names)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, index: int) -> Example:
    return {'image': self.images[index], 'label': int(self.labels[index])}

  def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Many examples at once, as arrays."""
    return {'image': self.images[indices], 'label': self.labels[indices]}

  def __getstate__(self):
    # Pickled, a broadcast view would become three times what it shows.
    repeated = self.images.strides[-1] == 0
    return {**self.__dict__, 'images': self.images[..., :1] if repeated else self.images}, repeated

  def __setstate__(self, state):
    attributes, repeated = state
    self.__dict__.update(attributes)
    if repeated:
      self.images = _grey_to_rgb(self.images)


class FolderSource(Source):
  """A folder with one sub-folder of image files per class.

  Classes are the sub-folders in alphabetical order; files are sorted too, so the order is the
  same on every machine. Folders inside a class folder are searched as well.

  Args:
    path: the folder; `path/split` is used if it is there.
    split: name of a sub-folder, or 'all' for `path` itself.

  Raises:
    FileNotFoundError: no such folder, or no image in it.
  """

  def __init__(self, path: str | pathlib.Path, split: str = 'all'):
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
      raise FileNotFoundError(f'image folder not found: {path.absolute()} is not a folder.')
    root = path if split == 'all' else path / split
    if not root.is_dir():
      found = sorted(p.name for p in path.iterdir() if p.is_dir())
      raise FileNotFoundError(_no_split(path, split, found))
    files = sorted(p for p in root.rglob('*') if p.suffix.lower() in _images.EXTENSIONS)
    names = [p.relative_to(root).parts for p in files]
    self.name = f'folder:{root}'
    self.root = root
    self.paths, self.labels, self.class_names = _by_class(self.name, names)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self.paths)

  def read(self, index: int) -> Example:
    path = self.root.joinpath(*self.paths[index])
    try:
      size = path.stat().st_size
      if size > _images.MAX_BYTES:
        raise _images.CorruptImageError(str(path), f'{size} bytes are too many for one image', 0)
      data = path.read_bytes()
    except OSError as e:
      raise _images.CorruptImageError(str(path), e.strerror or str(e), 0) from e
    return {'image': data, 'label': self.labels[index], 'name': str(path)}


class ZipSource(Source):
  """A zip file with one folder of images per class, read in place (nothing is unpacked).

  Args:
    path: the zip file.
    split: a folder inside it (`train/<class>/x.jpg`), or 'all' if the classes are at the top.
    class_names: the classes in label order, if not alphabetical; others are an error.

  Raises:
    FileNotFoundError: no such file, or no image in that split.
    ValueError: not a zip file, or a member whose path leaves the archive.
  """

  def __init__(
    self, path: str | pathlib.Path, split: str = 'all', class_names: Sequence[str] | None = None
  ):
    self.path = pathlib.Path(path).expanduser()
    self.name = f'zip:{self.path}' + ('' if split == 'all' else f'!{split}')
    members = read_members(self.path)
    prefix = () if split == 'all' else tuple(split.strip('/').split('/'))
    chosen = {m[len(prefix) :]: m for m in members if m[: len(prefix)] == prefix}
    if not chosen:
      raise FileNotFoundError(_no_split(self.path, split, sorted({m[0] for m in members})))
    names, self.labels, self.class_names = _by_class(self.name, sorted(chosen), class_names)
    self.members = ['/'.join(chosen[n]) for n in names]
    self.num_classes = len(self.class_names)
    self._archive = _Archive(self.path)

  def __len__(self) -> int:
    return len(self.members)

  def read(self, index: int) -> Example:
    name = f'{self.path}!{self.members[index]}'
    data = self._archive.read(self.members[index], name)
    return {'image': data, 'label': self.labels[index], 'name': name}


def read_members(path: pathlib.Path) -> list[tuple[str, ...]]:
  """Paths of the images in a zip file, each as its parts.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a zip file, or a member with a path such as `../x` or `/x`.
  """
  if not path.is_file():
    raise FileNotFoundError(f'zip file not found: {path.absolute()}.')
  try:
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
  except zipfile.BadZipFile as e:
    raise ValueError(f'{path} is not a zip file: {e}.') from e
  members = []
  for info in infos:
    parts = tuple(info.filename.replace('\\', '/').split('/'))
    # We never unpack, but names end up in reports and in prepared sets.
    if info.filename.startswith('/') or '..' in parts or ':' in parts[0]:
      raise ValueError(f'{path} has a member that points outside of it: {info.filename!r}.')
    if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
      continue
    if pathlib.PurePosixPath(parts[-1]).suffix.lower() in _images.EXTENSIONS:
      members.append(parts)
  return members


class _Archive:
  """A zip file that is opened on first use in each process (handles cannot be pickled)."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._zip: zipfile.ZipFile | None = None

  def read(self, member: str, name: str) -> bytes:
    if self._zip is None:
      self._zip = zipfile.ZipFile(self.path)
    info = self._zip.getinfo(member)
    if info.file_size > _images.MAX_BYTES:
      reason = f'{info.file_size} unpacked bytes are too many for one image'
      raise _images.CorruptImageError(name, reason, info.header_offset)
    try:
      return self._zip.read(info)
    except Exception as e:  # BadZipFile, zlib.error, LZMAError, ...: each packing has its own
      raise _images.CorruptImageError(name, str(e), info.header_offset) from e

  def __getstate__(self):
    return {'path': self.path, '_zip': None}


class TfdsSource(Source):
  """Any TensorFlow Datasets builder, read through `tfds.data_source` without TensorFlow.

  Args:
    name: TFDS name, such as 'imagenet2012' or 'cifar10_corrupted/blur_1:1.0.0'.
    split: TFDS split, such as 'train' or 'train[:10%]'.
    data_dir: TFDS data folder; None is TFDS's own default.

  Raises:
    FileNotFoundError: the set is not there; says where it looked and how to get it.
    ValueError: it was prepared as TFRecord, which has no random access; says how to convert it.
  """

  def __init__(self, name: str, split: str, data_dir: str | pathlib.Path | None = None):
    self._arguments = (name, split, data_dir)
    import tensorflow_datasets as tfds  # heavy, and only this source needs it

    option = '' if data_dir is None else f' --data_dir {shlex.quote(str(data_dir))}'
    where = pathlib.Path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
    copy = shlex.quote(f'{where}_array_record')
    try:
      builder: Any = tfds.builder(name, data_dir=None if data_dir is None else str(where))
    except (tfds.core.DatasetNotFoundError, FileNotFoundError) as e:
      raise FileNotFoundError(
        f'tfds:{name} is neither a TFDS set nor prepared in {where}. The names are on '
        'https://www.tensorflow.org/datasets/catalog; a set of your own is found by data_dir=.'
      ) from e
    info: Any = builder.info
    if not info.splits:
      raise FileNotFoundError(
        f'tfds:{name} is not prepared: looked in {builder.data_path}. Get it with\n'
        f'  python -m fqjax.data.prepare --from tfds:{name} --download{option}\n'
        'or name the folder that holds it: data_dir=... (TFDS: --data_dir or TFDS_DATA_DIR).'
      )
    formats = {f.value for f in info.available_file_formats()}
    if not formats & {'array_record', 'parquet'}:
      raise ValueError(
        f'tfds:{name} in {builder.data_path} is prepared as {"/".join(sorted(formats))}, which '
        'has no random access. Copy it once to ArrayRecord (TensorFlow is not needed):\n'
        f'  python -m fqjax.data.prepare --from tfds:{name} --convert{option} --out {copy}\n'
        f'and read it with data_dir={copy}'
      )
    features = info.features
    keys = info.supervised_keys or ('image', 'label')
    self._image, self._label = keys[0], keys[1]
    for key in (self._image, self._label):
      if not isinstance(key, str) or key not in features:
        raise ValueError(
          f'tfds:{name} has features {sorted(features)}; an image and a label are needed.'
        )
    # Bytes stay encoded: our own decoder names damaged files, and crops can use draft mode.
    encoded = isinstance(features[self._image], tfds.features.Image)
    decoders = {self._image: tfds.decode.SkipDecoding()} if encoded else None
    try:
      self._source = builder.as_data_source(split=split, decoders=decoders)
    except ValueError as e:
      known = ', '.join(sorted(info.splits))
      raise ValueError(f'tfds:{name} has no split {split!r}; it has {known}.') from e
    self._builder_name = f'tfds:{info.full_name}'
    self.name = f'{self._builder_name} {split}'
    label = features[self._label]
    self.num_classes = int(label.num_classes)
    self.class_names = tuple(label.names or (str(i) for i in range(self.num_classes)))

  def __len__(self) -> int:
    return len(self._source)

  def read(self, index: int) -> Example:
    try:
      example = self._source[index]
    except Exception as e:  # of the record reader and of protobuf, which have no common type
      raise _images.CorruptImageError(f'{self.name}[{index}]', str(e).split('\n')[0]) from e
    file_name = example.get('file_name', b'')
    file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
    name = f'{self.name}[{index}]' + (f' {file_name}' if file_name else '')
    image = example[self._image]
    if not isinstance(image, bytes):
      image = np.asarray(image)
    return {'image': image, 'label': int(example[self._label]), 'name': name}

  def __reduce__(self):
    # Builders hold what cannot be pickled; a worker opens the set anew.
    return TfdsSource, self._arguments


class CachedSource(Source):
  """Keeps decoded images in memory after their first use (per process).

  For small sets: 4,500 images of 64 x 64 are 55 MB, and decoding them again each epoch would cost
  more than a small network's step. Damaged images are not kept and fail each time.

  Args:
    source: The source whose images are kept.
  """

  def __init__(self, source: Source):
    self._source = source
    self._kept: dict[int, Example] = {}
    self.name, self.num_classes = source.name, source.num_classes
    self.class_names = source.class_names

  def __len__(self) -> int:
    return len(self._source)

  def read(self, index: int) -> Example:
    example = self._kept.get(index)
    if example is None:
      example = self._source[index]
      self._kept[index] = example
    return example

  def encoded(self, index: int) -> Example:
    """The example as it is stored, not decoded."""
    return self._source.read(index)

  def __getstate__(self):
    return {**self.__dict__, '_kept': {}}


class PartSource(Source):
  """A contiguous share of another source in a fixed pseudo-random order.

  Files usually lie sorted by class; a part taken in that order would miss classes. The order
  depends on the number of examples alone and is the same on every machine, so `[:90%]` and
  `[90%:]` never share an example.

  Args:
    source: the source of which a part is taken.
    part: what stands between the brackets of `'train[:90%]'`: `start:stop`, each a count, a
      percentage or nothing; negative numbers count from the end.

  Raises:
    ValueError: not such a part, or nothing is left.

  Example:
    >>> whole = ArraySource(np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2)
    >>> len(PartSource(whole, ':90%')), len(PartSource(whole, '90%:'))
    (18, 2)
  """

  def __init__(self, source: Source, part: str):
    n = len(source)
    match = re.fullmatch(r'(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?', part)
    if match is None:
      raise ValueError(
        f"{source.name}: cannot read the part [{part}]; write '[:90%]', '[90%:]' or '[100:200]'."
      )
    start, start_percent, stop, stop_percent = match.groups()
    chosen = slice(_position(start, start_percent, n), _position(stop, stop_percent, n))
    # Philox words, not a generator's shuffle: their stream is the same in every NumPy.
    order = np.argsort(np.random.Philox(key=[n, 0]).random_raw(n), kind='stable')
    self._source, self._indices = source, np.sort(order[chosen])
    if not len(self._indices):
      raise ValueError(f'{source.name}: no example is left in [{part}] of {n}.')
    self.name, self.num_classes = f'{source.name}[{part}]', source.num_classes
    self.class_names = source.class_names
    # How stored coefficients were made, for sources that hold them.
    self.metadata = getattr(source, 'metadata', None)

  def __len__(self) -> int:
    return len(self._indices)

  def read(self, index: int) -> Example:
    return self._source.read(int(self._indices[index]))

  @property
  def take(self):
    """Many examples at once, where the whole source can; else None."""
    take = getattr(self._source, 'take', None)
    return None if take is None else lambda indices: take(self._indices[indices])


def _position(number: str | None, percent: str | None, n: int) -> int | None:
  """A bound of a slice as a count."""
  if number is None:
    return None
  return round(int(number) * n / 100) if percent else int(number)


def _grey_to_rgb(images: np.ndarray) -> np.ndarray:
  """Three equal channels, as a view that costs no memory."""
  if images.shape[-1] != 1:
    return images
  return np.broadcast_to(images, (*images.shape[:-1], 3))


def _no_split(path: pathlib.Path, split: str, found: Sequence[str]) -> str:
  shown = ', '.join(found[:8]) + (f' and {len(found) - 8} more' if len(found) > 8 else '')
  return (
    f'{path} has no images under {split!r}; its folders are {shown or "none"}. Classes are folders '
    f"of images, inside a folder per split; split='all' takes the folders of {path} as classes."
  )


def _by_class(
  name: str, paths: Sequence[tuple[str, ...]], class_names: Sequence[str] | None = None
) -> tuple[list[tuple[str, ...]], list[int], tuple[str, ...]]:
  """Keeps what lies in a class folder and numbers the classes."""
  paths = [p for p in paths if len(p) > 1]
  if not paths:
    raise FileNotFoundError(
      f'{name} holds no images: expected <class>/<image> with one of the endings '
      f'{" ".join(_images.EXTENSIONS)}.'
    )
  names = tuple(class_names or sorted({p[0] for p in paths}))
  index = {c: i for i, c in enumerate(names)}
  unknown = sorted({p[0] for p in paths} - set(index))
  if unknown:
    raise ValueError(f'{name} has folders that are not among its classes: {unknown[:5]}.')
  return list(paths), [index[p[0]] for p in paths], names
