"""Batches of consecutive words for truncated back-propagation, with a position."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def batched(
  tokens: np.ndarray,
  batch_size: int,
  length: int,
  *,
  repeat: bool = True,
  process_index: int | None = None,
  process_count: int | None = None,
) -> 'TextBatches':
  """Cuts a text into `batch_size` equal streams and reads `length` words of each per batch.

  Row r of a batch goes on where row r of the batch before ended, so a network's carry belongs from
  one batch to the next; 'first' says where it must begin anew.

  Args:
    tokens: integers [n], e.g. `Text.train`.
    batch_size: streams, over all processes.
    length: words per batch of each stream.
    repeat: go on for ever, with whole batches only; otherwise one pass, whose last batch is padded.
    process_index: this process, which gets its share of the streams; `jax.process_index()` if None.
    process_count: number of processes; `jax.process_count()` if None.

  Returns:
    An iterable with a length (batches of a pass), every `iter` of which begins the text. Batches of
    b = batch_size / process_count rows: 'input' and 'target' int32 [b, length], the target being
    the word behind; 'mask' float32 [b, length], 0 where the text has ended; 'first' bool [b], at
    the beginning of a pass. The iterator has `get_state` and `set_state`, as `fqjax.train.fit`
    wants it. Up to `batch_size` words at the end of the text, with `repeat` up to
    `batch_size * length`, find no place.

  Raises:
    ValueError: tokens that are no integers [n], too few of them, sizes that do not fit together.

  Example:
    >>> batches = batched(np.arange(9), 2, 2, repeat=False, process_index=0, process_count=1)
    >>> for batch in batches:
    ...   print(batch['input'].tolist(), batch['target'].tolist(), batch['first'].tolist())
    [[0, 1], [4, 5]] [[1, 2], [5, 6]] [True, True]
    [[2, 3], [6, 7]] [[3, 4], [7, 8]] [False, False]

  Source: the batching of arXiv 1409.2329's public code.
  """
  tokens = np.asarray(tokens)
  if process_index is None or process_count is None:
    import jax  # asking starts the backend, so only if nobody told us

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f'batched takes integers [n], got {tokens.dtype}{list(tokens.shape)}.')
  if batch_size < 1 or length < 1 or batch_size % process_count:
    raise ValueError(
      f'{batch_size=} over {process_count} processes and {length=} must be at least 1, and the '
      'streams divide among the processes.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index={process_index} is not one of {process_count} processes.')
  return TextBatches(tokens, batch_size, length, repeat, process_index, process_count)


class TextBatches:
  """What `batched` returns."""

  def __init__(
    self,
    tokens: np.ndarray,
    batch_size: int,
    length: int,
    repeat: bool,
    process_index: int,
    process_count: int,
  ):
    per_stream = (len(tokens) - 1) // batch_size  # the last word is a target only
    if per_stream < (length if repeat else 1):
      raise ValueError(
        f'{len(tokens)} words are too few for {batch_size} streams of {length if repeat else 1} '
        'words and one behind: take fewer streams, or shorter ones.'
      )
    self._settings = {
      'words': len(tokens), 'batch_size': batch_size, 'length': length, 'repeat': repeat,
    }  # fmt: skip
    self._steps = per_stream // length if repeat else -(-per_stream // length)
    rows = batch_size // process_count
    streams = slice(process_index * rows, (process_index + 1) * rows)
    inputs, targets = (
      tokens[shift : shift + batch_size * per_stream].reshape(batch_size, per_stream)[streams]
      for shift in (0, 1)
    )
    padding = ((0, 0), (0, max(0, self._steps * length - per_stream)))
    mask = np.ones(inputs.shape, np.float32)
    self._arrays = {
      'input': np.pad(inputs.astype(np.int32), padding),
      'target': np.pad(targets.astype(np.int32), padding),
      'mask': np.pad(mask, padding),
    }
    self._length, self._repeat, self._rows = length, repeat, rows

  def __len__(self) -> int:
    """Batches of one pass."""
    return self._steps

  def __iter__(self) -> '_Iterator':
    return _Iterator(self)


class _Iterator:
  """A position in `TextBatches`."""

  def __init__(self, batches: TextBatches):
    self._batches, self._step = batches, 0

  def __iter__(self) -> '_Iterator':
    return self

  def __next__(self) -> Batch:
    b = self._batches
    if self._step >= len(b) and not b._repeat:
      raise StopIteration
    place = self._step % len(b)
    self._step += 1
    here = slice(place * b._length, (place + 1) * b._length)
    batch = {name: array[:, here] for name, array in b._arrays.items()}
    return {**batch, 'first': np.full(b._rows, place == 0)}

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch handed out; JSON-able, the same in every process."""
    return {'step': self._step, **self._batches._settings}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a saved position.

    Raises:
      ValueError: the position was saved with another text or other sizes.
    """
    mine = self._batches._settings
    different = [k for k in mine if state.get(k) != mine[k]]
    if different or not isinstance(state.get('step'), int):
      changes = ', '.join(f'{k} {state.get(k)!r} -> {mine[k]!r}' for k in different)
      raise ValueError(
        f'the saved position belongs to other batches ({changes}): go on with the settings of the '
        'saved run, or start anew in another workdir.'
      )
    self._step = state['step']
