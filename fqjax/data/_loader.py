"""Batches from a source: one order for any number of workers and processes, and a position."""

from collections.abc import Mapping
import dataclasses
import functools
import logging
import os
import threading
from typing import Any, Protocol

import grain
import numpy as np

from fqjax.data import _images
from fqjax.data._transforms import Transform

Batch = dict[str, np.ndarray]

# Steps of an endless run; grain wants a length.
_ENDLESS = 2**48

# Philox streams of one seed.
_SHUFFLE, _TRANSFORM = 1, 2

_logger = logging.getLogger(__name__)


class SourceLike(Protocol):
  """What the loader needs of a source."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of `n` samples in an epoch: a uniform permutation, int64 [n].

  Sorting raw Philox words, which NumPy guarantees never to change, instead of
  `Generator.permutation`, which it may improve: a run resumed under another NumPy goes on the same.
  """
  words = np.random.Philox(key=[seed, _SHUFFLE], counter=[0, 0, epoch, 0]).random_raw(n)
  return np.argsort(words, kind='stable')


class _SampleRng:
  """Random generators per (seed, epoch, position), without the cost of building each."""

  def __init__(self, seed: int):
    self._bits = np.random.Philox(key=[seed, _TRANSFORM])
    self._state: Any = self._bits.state
    self._generator = np.random.Generator(self._bits)

  def __call__(self, epoch: int, position: int) -> np.random.Generator:
    # The lowest word counts the numbers drawn: 2**64 of them per sample.
    self._state['state']['counter'][:] = (0, position, epoch, 0)
    self._bits.state = self._state
    return self._generator


@dataclasses.dataclass(frozen=True)
class _Settings:
  """Everything that decides which samples a step sees."""

  batch_size: int
  local_size: int
  process_index: int
  seed: int
  shuffle: bool
  repeat: bool


class _Assembler:
  """step -> (this process's part of the batch, what could not be decoded)."""

  def __init__(self, source: SourceLike, settings: _Settings, transform: Transform | None):
    self._source, self._settings, self._transform = source, settings, transform
    self._n = len(source)
    self._order = functools.lru_cache(maxsize=2)(self._make_order)
    self._lock = threading.Lock()

  def __getstate__(self):
    return self._source, self._settings, self._transform

  def __setstate__(self, state):
    self.__init__(*state)

  def _make_order(self, epoch: int) -> np.ndarray:
    if not self._settings.shuffle:
      return np.arange(self._n)
    return epoch_order(self._settings.seed, epoch, self._n)

  def samples(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(epoch, position in the epoch, index in the source) per row; index -1 is padding."""
    s = self._settings
    first = step * s.batch_size + s.process_index * s.local_size
    count = first + np.arange(s.local_size)
    epoch, position = np.divmod(count, self._n)
    index = np.full(s.local_size, -1)
    for e in np.unique(epoch).tolist():
      if s.repeat or e == 0:
        with self._lock:
          order = self._order(e)
        rows = epoch == e
        index[rows] = order[position[rows]]
    return epoch, position, index

  def __call__(self, step: int) -> tuple[Batch, list[tuple[str, str, int | None]]]:
    epoch, position, index = self.samples(step)
    if self._transform is None and (take := getattr(self._source, 'take', None)) is not None:
      batch = dict(take(np.maximum(index, 0)))
      mask = (index >= 0).astype(np.float32)
      for key, values in batch.items():
        batch[key] = (
          values
          if mask.all()
          else values * np.expand_dims(index >= 0, tuple(range(1, values.ndim)))
        )
      return _finish(batch, mask, index), []
    rng = _SampleRng(self._settings.seed)
    batch: Batch = {}
    mask = np.zeros(len(index), np.float32)
    damaged = []
    for row, (e, p, i) in enumerate(
      zip(epoch.tolist(), position.tolist(), index.tolist(), strict=True)
    ):
      if i < 0:
        continue
      try:
        example = self._example(i, rng(e, p))
      except _images.CorruptImageError as error:
        damaged.append((error.name, error.reason, error.offset))
        continue
      if not batch:
        batch = _allocate(example, len(index))
      _place(batch, row, example)
      mask[row] = 1
    if not batch:
      batch = _allocate(self._any_example(index, rng), len(index))
    return _finish(batch, mask, index), damaged

  def _example(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    read = getattr(self._source, 'read', self._source.__getitem__)
    example = dict(read(index))
    if self._transform is not None:
      example = self._transform(example, rng)
    if isinstance(example.get('image'), bytes):
      example['image'] = _images.pixels(example)
    return example

  def _any_example(self, index: np.ndarray, rng: _SampleRng) -> dict[str, Any]:
    """Some example that can be decoded, for its shape: this batch has none."""
    tried = 0
    for i in range(min(self._n, 1000)):
      if i not in index:
        tried += 1
        try:
          return self._example(i, rng(0, i))
        except _images.CorruptImageError:
          continue
    if not (index >= 0).any():
      return self._example(0, rng(0, 0))
    name = getattr(self._source, 'name', 'the source')
    raise ValueError(f'no image of {name} can be decoded ({tried + (index >= 0).sum()} tried).')


def _inputs(example: Mapping[str, Any]) -> dict[str, np.ndarray]:
  found = {k: np.asarray(example[k]) for k in ('image', 'coefficients') if k in example}
  if not found or 'label' not in example:
    raise ValueError(
      f"an example must have 'image' (or 'coefficients') and 'label', this one has "
      f'{sorted(example)}.'
    )
  return found


def _allocate(example: Mapping[str, Any], size: int) -> Batch:
  arrays = {k: np.zeros((size, *v.shape), v.dtype) for k, v in _inputs(example).items()}
  return {**arrays, 'label': np.zeros(size, np.int32)}


def _place(batch: Batch, row: int, example: Mapping[str, Any]) -> None:
  for key, value in _inputs(example).items():
    if key not in batch or batch[key].shape[1:] != value.shape:
      others = {k: list(v.shape[1:]) for k, v in batch.items() if k != 'label'}
      raise ValueError(
        f'{example.get("name", "an example")} has {key} {list(value.shape)}, others in its batch '
        f'have {others}: give the loader a transform that makes one size of them, such as '
        'fqjax.data.resize_crop(256, 224).'
      )
    batch[key][row] = value
  batch['label'][row] = example['label']


def _finish(batch: Batch, mask: np.ndarray, index: np.ndarray) -> Batch:
  batch['label'] = batch['label'].astype(np.int32)
  return {**batch, 'mask': mask, 'index': index.astype(np.int64)}


@dataclasses.dataclass
class Corrupt:
  """What a run could not decode.

  Attributes:
    count: samples that were masked out because of it, in all epochs.
    files: name of each damaged file and what is wrong with it.
  """

  count: int = 0
  files: dict[str, str] = dataclasses.field(default_factory=dict)


class Loader:
  """Batches of a source, shuffled anew each epoch, split over processes.

  Sample number `step * batch_size + row` of a run lies in epoch `number // len(source)`: every
  sample is seen equally often, and a batch may hold the end of one epoch and the beginning of the
  next. Order and per-sample randomness follow from (seed, epoch, position) alone, so neither the
  number of workers nor the number of processes changes what a run sees.

  Args:
    source: anything with `__len__` and `__getitem__` -> {'image': ..., 'label': ...}.
    batch_size: examples per step over all processes.
    seed: of shuffling and transforms, 0 or larger.
    shuffle: a new order each epoch; otherwise the order of the source.
    repeat: go on for ever; otherwise one pass, whose last batch is padded (mask 0).
    workers: processes that read and decode; 0 uses threads of this process. With workers, the main
      module must be importable (`if __name__ == '__main__':`).
    transform: (example, rng) -> example, applied to each example where it is read.
    strict: raise at a damaged image; otherwise its row keeps its place with mask 0, and it is
      logged and counted (`LoaderIterator.corrupt`).
    process_index: this process; `jax.process_index()` if None.
    process_count: number of processes; `jax.process_count()` if None.
    prefetch: batches made ahead; 0 makes each when it is asked for.

  Raises:
    ValueError: sizes that do not fit together.

  Example:
    >>> import fqjax.data
    >>> source = fqjax.data.load_source('synthetic', 'test', n=5, size=8)
    >>> loader = Loader(source, 4, repeat=False, process_index=0, process_count=1)
    >>> [batch['mask'].tolist() for batch in loader]
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
  """

  def __init__(
    self,
    source: SourceLike,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    workers: int = 0,
    transform: Transform | None = None,
    strict: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
    prefetch: int = 2,
  ):
    if process_index is None or process_count is None:
      import jax  # asking starts the backend, so only if nobody told us

      process_index = jax.process_index() if process_index is None else process_index
      process_count = jax.process_count() if process_count is None else process_count
    name = getattr(source, 'name', type(source).__name__)
    if not 0 <= process_index < process_count:
      raise ValueError(f'process_index={process_index} is not one of {process_count} processes.')
    if batch_size < 1 or batch_size % process_count:
      raise ValueError(
        f'batch_size={batch_size} cannot be split over {process_count} processes: it is the size '
        f'over all processes; the next that fits is {-(-max(batch_size, 1) // process_count) * process_count}.'
      )
    if not len(source):
      raise ValueError(f'{name} has no examples.')
    if seed < 0 or workers < 0 or prefetch < 0:
      raise ValueError(f'{seed=}, {workers=} and {prefetch=} must not be negative.')
    self.source, self.name, self.batch_size = source, name, batch_size
    self.workers, self.strict, self.prefetch = workers, strict, prefetch
    self.repeat = repeat
    self._settings = _Settings(
      batch_size, batch_size // process_count, process_index, seed, shuffle, repeat
    )
    self._assembler = _Assembler(source, self._settings, transform)

  def __len__(self) -> int:
    """Steps of one pass; of an endless loader, the whole steps an epoch has (at least 1)."""
    n = len(self.source)
    if self.repeat:
      return max(1, n // self.batch_size)
    return (n + self.batch_size - 1) // self.batch_size

  def __iter__(self) -> 'LoaderIterator':
    return LoaderIterator(self)

  def fingerprint(self) -> dict[str, Any]:
    """What must be equal for a saved position to mean the same samples (JSON-able)."""
    s = self._settings
    return {
      'batch_size': s.batch_size,
      'seed': s.seed,
      'shuffle': s.shuffle,
      'repeat': s.repeat,
      'examples': len(self.source),
    }

  def _start(self, step: int) -> grain.DatasetIterator:
    steps = _ENDLESS if self.repeat else len(self)
    data = grain.MapDataset.range(step, steps).map(self._assembler)
    if not self.workers:
      threads = min(self.prefetch, os.cpu_count() or 1)
      return iter(data.to_iter_dataset(grain.ReadOptions(threads, self.prefetch)))
    _parse_flags()
    ahead = max(1, self.prefetch // self.workers)
    return iter(
      data.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
        grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead)
      )
    )


def _parse_flags() -> None:
  """Lets the workers of grain read absl flags, which only a program started by absl has parsed."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


class LoaderIterator:
  """Iterates over a `Loader`; its position can be saved and restored in constant time.

  Attributes:
    corrupt: what could not be decoded so far, by this process.
  """

  def __init__(self, loader: Loader):
    self._loader = loader
    self._step = 0
    self._inner: grain.DatasetIterator | None = None
    self._pass_over = False
    self.corrupt = Corrupt()

  def __iter__(self) -> 'LoaderIterator':
    return self

  def __next__(self) -> Batch:
    """The next batch of this process.

    Returns:
      'image' uint8 [b, height, width, 3] (or 'coefficients' int16 [b, rows, columns, channels]),
      'label' int32 [b], 'mask' float32 [b] (0: padding or damaged), 'index' int64 [b] (place in the
      source, -1: padding).

    Raises:
      CorruptImageError: a damaged image, if the loader is strict.
    """
    if not self._loader.repeat and self._step >= len(self._loader):
      self.close()
      raise StopIteration
    inner = self._inner = self._inner or self._loader._start(self._step)
    batch, damaged = next(inner)
    if self._loader.workers:
      # Out of shared memory, which would have to outlive every use of the batch.
      batch = {k: np.array(v) for k, v in batch.items()}
    for name, reason, offset in damaged:
      error = _images.CorruptImageError(name, reason, offset)
      if self._loader.strict:
        self.close()
        raise error
      self.corrupt.count += 1
      if name not in self.corrupt.files:
        self.corrupt.files[name] = str(error)
        _logger.warning('%s; skipped', error)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch handed out; JSON-able, the same in every process."""
    return {'step': self._step, **self._loader.fingerprint()}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a saved position.

    Raises:
      ValueError: the position was saved by a loader that sees other samples.
    """
    mine = self._loader.fingerprint()
    different = [k for k in mine if state.get(k) != mine[k]]
    if different or not isinstance(state.get('step'), int):
      changes = ', '.join(f'{k} {state.get(k)!r} -> {mine[k]!r}' for k in different)
      raise ValueError(
        f'the saved position of {self._loader.name} belongs to other samples ({changes}): go on '
        'with the settings of the saved run, or start anew in another workdir.'
      )
    self.close()
    self._step = state['step']

  def close(self) -> None:
    """Stops threads and workers; the iterator can still be used and starts them again."""
    if self._inner is not None:
      self._inner.close()
      self._inner = None

  def __del__(self):
    if getattr(self, '_inner', None) is not None:
      self.close()
