"""Prepares a set once, for fast reading ever after.

  python -m fqjax.data.prepare --from folder:photos --split train --out prepared
  python -m fqjax.data.prepare --from tfds:imagenet2012 --split train --out prepared \
      --format coefficients --channels square24 --resize 512 --crop 512
  python -m fqjax.data.prepare --from tfds:imagenet2012 --convert --data_dir old --out new

The first writes ArrayRecord shards of JPEG bytes (untouched where no resizing is asked for), the
second of int16 block-DCT coefficients, the third copies a TFDS set prepared as TFRecord to ArrayRecord.
Read the first two back as the source 'records:prepared'. Interrupted at any moment, the same
command continues after the last finished shard; a set is whole only when its metadata.json is
there.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import tqdm

from fqjax import files
from fqjax.data import _coefficients, _images, _named, _records, _sources, _tfrecord, _transforms

PLAN = 'plan.json'


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that decides what a prepared set holds.

  Attributes:
    source: name for `fqjax.data.load_source`.
    split: its split.
    options: further arguments of the source, such as {'data_dir': ...}.
    kind: 'jpeg' (encoded images) or 'coefficients' (int16).
    resize: resize the shorter side to this, in pixels; None keeps the size.
    crop: then cut the central square of this side; None keeps everything.
    quality: JPEG quality where pixels have to be encoded anew.
    block: side of a DCT block, at most 256 (int16 holds no larger coefficients).
    channels: coefficient channels to keep; None keeps all.
    chroma: 'filtered' or 'full'.
    rounding: round luma samples and coefficients as a JPEG file does.
    shard_size: images per shard.
    compression: 'none', or 'zstd' for about half the bytes and several times the reading time.
    strict: stop at a damaged image instead of leaving it out.
  """

  source: str
  split: str = 'train'
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  kind: str = 'jpeg'
  resize: int | None = None
  crop: int | None = None
  quality: int = 95
  block: int = 8
  channels: tuple[int, ...] | None = None
  chroma: _coefficients.Chroma = 'filtered'
  rounding: bool = True
  shard_size: int = 1024
  compression: str = 'none'
  strict: bool = False

  def __post_init__(self):
    if self.kind not in _records.KINDS:
      raise ValueError(f'kind={self.kind!r}: choose from {", ".join(_records.KINDS)}.')
    if self.chroma not in ('filtered', 'full'):
      raise ValueError(f"chroma={self.chroma!r}: choose 'filtered' or 'full'.")
    if self.compression not in ('none', 'zstd'):
      raise ValueError(f"compression={self.compression!r}: choose 'none' or 'zstd'.")
    if self.crop is not None and self.resize is not None and self.crop > self.resize:
      raise ValueError(f'crop={self.crop} is larger than the image after resize={self.resize}.')
    if self.kind == 'coefficients' and not 1 <= self.block <= 256:
      # The mean coefficient reaches 128 * block, no other one comes as far: -32768 just fits.
      raise ValueError(
        f'block={self.block}: int16 holds the coefficients of blocks of 1 to 256 pixels only.'
      )
    if self.kind == 'coefficients' and self.crop is not None and self.crop % self.block:
      raise ValueError(f'crop={self.crop} is not a whole number of blocks of {self.block}.')
    if self.shard_size < 1:
      raise ValueError(f'shard_size={self.shard_size} must be at least 1.')


def _as_json(plan: Plan) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(plan)))


def _write_json(path: pathlib.Path, value: Any) -> None:
  files.write_text(path, json.dumps(value, indent=1))


def _convert(plan: Plan, example: dict[str, Any], index: int) -> _records.Record:
  """Turns one example of the source into one record."""
  name = example.get('name', f'{plan.source}[{index}]')
  example = {**example, 'name': name}
  image = example.get('image')
  as_it_is = plan.kind == 'jpeg' and plan.resize is None and plan.crop is None
  if as_it_is and isinstance(image, bytes) and image[:2] == b'\xff\xd8':
    _images.decode_image(image, name)  # damaged files are found now, not in an epoch's middle
    return _records.Record(example['label'], name, image=image)
  rng = np.random.default_rng(0)  # the transforms below draw nothing
  if plan.resize is not None:
    example = _transforms.resize(plan.resize)(example, rng)
  if plan.crop is not None:
    example = _transforms.center_crop(plan.crop)(example, rng)
  pixels = np.ascontiguousarray(_images.pixels(example))
  if plan.kind == 'jpeg':
    return _records.Record(example['label'], name, image=_images.encode_jpeg(pixels, plan.quality))
  # Whole blocks only: what is left at the right and the bottom is not an image of its own.
  rows, columns = (n // plan.block * plan.block for n in pixels.shape[:2])
  if not rows or not columns:
    raise _images.CorruptImageError(name, f'{list(pixels.shape)} is smaller than one block')
  values = _coefficients.rgb_to_coefficients(
    pixels[:rows, :columns],
    size=plan.block,
    channels=plan.channels,
    chroma=plan.chroma,
    rounding=plan.rounding,
  )
  stored = np.rint(values).astype(np.int16)
  return _records.Record(example['label'], name, coefficients=stored)


@functools.lru_cache(maxsize=2)
def _open_source(name: str, split: str, options: str) -> _sources.Source:
  """Opened once per process; each shard of it is a task of its own."""
  return _named.load_source(name, split, **json.loads(options))


_progress: Any = None


def _start_worker(progress: Any) -> None:
  global _progress
  _progress = progress


def _tick() -> None:
  if _progress is not None:
    with _progress.get_lock():
      _progress.value += 1


def _convert_shard(source: pathlib.Path, target: pathlib.Path, count: int) -> None:
  _tfrecord.convert_shard(source, target, count, _tick)


def _write_shard(plan: Plan, path: pathlib.Path, start: int, stop: int) -> None:
  """Writes one shard and, before it, the file that says what is in it."""
  from array_record.python import array_record_module  # type: ignore[attr-defined]

  source = _open_source(plan.source, plan.split, json.dumps(plan.options, sort_keys=True))
  count, skipped = 0, []
  packing = 'uncompressed' if plan.compression == 'none' else 'zstd:3'
  with files.replacing(path) as unfinished:
    writer = array_record_module.ArrayRecordWriter(str(unfinished), f'group_size:1,{packing}')
    try:
      for index in range(start, stop):
        try:
          record = _records.pack(_convert(plan, source.read(index), index))
        except _images.CorruptImageError as e:
          if plan.strict:
            raise
          skipped.append([e.name, str(e)])
        else:
          writer.write(record)
          count += 1
        _tick()
    finally:
      writer.close()
    size = unfinished.stat().st_size
    # The description first: a shard under its final name always has one.
    description = {'file': path.name, 'count': count, 'bytes': size, 'skipped': skipped}
    _write_json(_description(path), description)


def _description(shard: pathlib.Path) -> pathlib.Path:
  return shard.with_name(f'{shard.name}.json')


def prepare(
  plan: Plan, out: str | pathlib.Path, *, workers: int = 0, progress: bool = False
) -> dict[str, Any]:
  """Writes a prepared set to `out/plan.split`; continues one that was interrupted.

  Args:
    plan: what to write.
    out: folder of the prepared set.
    workers: processes; 0 works in this one.
    progress: show a progress bar.

  Returns:
    The metadata, as in `metadata.json`.

  Raises:
    ValueError: the folder holds a set made with another plan, or the source has no image.
    CorruptImageError: a damaged image, if `plan.strict`.
    OSError: the folder cannot be written.
  """
  out = pathlib.Path(out).expanduser()
  folder = out / plan.split
  finished = folder / _records.METADATA
  if finished.exists():
    metadata = _records.read_metadata(folder, out)
    _same_plan(metadata['plan'], plan, folder)
    return metadata
  folder.mkdir(parents=True, exist_ok=True)
  source = _open_source(plan.source, plan.split, json.dumps(plan.options, sort_keys=True))
  n = len(source)
  if not n:
    raise ValueError(f'{plan.source} has no images in split {plan.split!r}.')
  with _only_writer(folder):
    if (folder / PLAN).exists():
      _same_plan(json.loads((folder / PLAN).read_text(encoding='utf-8')), plan, folder)
    else:
      _write_json(folder / PLAN, _as_json(plan))
    for left_over in folder.glob('*.tmp'):
      left_over.unlink(missing_ok=True)
    total = math.ceil(n / plan.shard_size)
    tasks = [
      (folder / f'{plan.split}-{i:05d}-of-{total:05d}.array_record', start)
      for i, start in enumerate(range(0, n, plan.shard_size))
    ]
    shards = [t[0] for t in tasks]
    missing = [
      (plan, path, start, min(n, start + plan.shard_size))
      for path, start in tasks
      if not (path.exists() and _description(path).exists())
    ]
    done = n - sum(stop - start for *_, start, stop in missing)
    _run(_write_shard, missing, workers, progress and {'total': n, 'initial': done, 'unit': 'img'})
    described = [json.loads(_description(p).read_text(encoding='utf-8')) for p in shards]
    skipped = [s for d in described for s in d.pop('skipped')]
    metadata = {
      'format': _records.FORMAT,
      'version': _records.VERSION,
      'kind': plan.kind,
      'name': source.name,
      'count': sum(d['count'] for d in described),
      'class_names': list(source.class_names),
      'skipped': skipped,
      'plan': _as_json(plan),
      'shards': described,
    }
    if plan.kind == 'coefficients':
      channels = plan.channels or tuple(range(3 * plan.block**2))
      metadata |= {
        'block': plan.block,
        'channels': list(channels),
        'chroma': plan.chroma,
        'rounding': plan.rounding,
        'order': 'block * block * component + block * vertical + horizontal; Y, Cb, Cr',
      }
    if not metadata['count']:
      raise ValueError(f'none of the {n} images of {plan.source} can be decoded; {skipped[0][1]}.')
    _write_json(finished, metadata)
    for path in [*(_description(p) for p in shards), folder / PLAN]:
      path.unlink(missing_ok=True)
  return metadata


def _same_plan(stored: dict[str, Any], plan: Plan, folder: pathlib.Path) -> None:
  wanted = _as_json(plan)
  different = [k for k in wanted if stored.get(k) != wanted[k]]
  if different:
    changes = ', '.join(f'{k}: {stored.get(k)!r} there, {wanted[k]!r} now' for k in different)
    raise ValueError(
      f'{folder} holds a set that was made differently ({changes}): choose another --out, or '
      'delete that folder.'
    )


@contextlib.contextmanager
def _only_writer(folder: pathlib.Path) -> Iterator[None]:
  """Refuses a second writer; the lock goes away with the process that holds it."""
  try:
    import fcntl
  except ImportError:  # Windows: shards are still replaced whole
    yield
    return
  path = folder / '.lock'
  with open(path, 'w') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(f'another process is preparing {folder} at this moment.') from e
    yield
    path.unlink(missing_ok=True)


def _run(
  function: Callable[..., Any], tasks: Sequence[tuple], workers: int, bar_options: Any
) -> list[Any]:
  """Runs `function(*task)` for every task, in processes, under a progress bar."""
  bar = tqdm.tqdm(disable=not bar_options, **(bar_options or {}))
  with bar:
    if workers <= 0 or not tasks:
      counter = _LocalCounter(bar)
      _start_worker(counter)
      try:
        return [function(*task) for task in tasks]
      finally:
        _start_worker(None)
    # spawn: a fork of a process that runs threads (JAX has some) may hang.
    context = multiprocessing.get_context('spawn')
    counter = context.Value('q', 0)
    with futures.ProcessPoolExecutor(
      min(workers, len(tasks)), context, initializer=_start_worker, initargs=(counter,)
    ) as pool:
      pending = [pool.submit(function, *task) for task in tasks]
      waiting = set(pending)
      while waiting:
        finished, waiting = futures.wait(waiting, 0.2, futures.FIRST_EXCEPTION)
        bar.update(counter.value - (bar.n - bar.initial))
        if any(f.exception() for f in finished):
          pool.shutdown(wait=False, cancel_futures=True)
          break
      return [f.result() for f in pending if not f.cancelled()]


class _LocalCounter:
  """Stands in for a shared counter where there is one process."""

  def __init__(self, bar: tqdm.tqdm):
    self._bar, self._value = bar, 0

  def get_lock(self):
    return contextlib.nullcontext()

  @property
  def value(self) -> int:
    return self._value

  @value.setter
  def value(self, value: int) -> None:
    self._bar.update(value - self._value)
    self._value = value


def convert_tfds(
  name: str,
  data_dir: str | pathlib.Path | None,
  out: str | pathlib.Path,
  *,
  workers: int = 0,
  progress: bool = False,
) -> pathlib.Path:
  """Copies a TFDS set prepared as TFRecord to ArrayRecord, in TFDS's own layout.

  Examples are copied byte for byte, checksums verified, shard by shard; finished shards are not
  written again, and `dataset_info.json`, without which TFDS sees no set, comes last. No TensorFlow
  is needed.

  Args:
    name: TFDS name.
    data_dir: TFDS data folder; None is TFDS's own default.
    out: another TFDS data folder, for the copy.
    workers: processes; 0 works in this one.
    progress: show a progress bar.

  Returns:
    The folder of the copy; `tfds.data_source(name, data_dir=out)` reads it.

  Raises:
    FileNotFoundError: the set is not prepared there.
    ValueError: it is not TFRecord, or a file is damaged (named, with the offset).
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
  info: Any = builder.info
  source = pathlib.Path(builder.data_path)
  if not info.splits:
    raise FileNotFoundError(f'tfds:{name} is not prepared: looked in {source}.')
  formats = {f.value for f in info.available_file_formats()}
  if 'tfrecord' not in formats:
    raise ValueError(f'{source} holds {"/".join(sorted(formats))}; only tfrecord is converted.')
  target = pathlib.Path(out).expanduser() / info.full_name
  if target.resolve() == source.resolve():
    raise ValueError(f'--out {out} is the folder of the TFRecord set itself: name another one.')
  finished = target / 'dataset_info.json'
  if finished.exists():
    return target
  target.mkdir(parents=True, exist_ok=True)
  with _only_writer(target):
    tasks = []
    for split in info.splits.values():
      old = split.filename_template
      new = old.replace(filetype_suffix='array_record', data_dir=target)
      for i, length in enumerate(split.shard_lengths):
        paths = [
          pathlib.Path(t.sharded_filepath(shard_index=i, num_shards=split.num_shards))
          for t in (old, new)
        ]
        if not paths[1].exists():
          tasks.append((*paths, length))
    total = sum(length for *_, length in tasks)
    _run(_convert_shard, tasks, workers, progress and {'total': total, 'unit': 'example'})
    for path in source.iterdir():
      if path.is_file() and '.tfrecord' not in path.name and path.name != finished.name:
        shutil.copyfile(path, target / path.name)
    description = json.loads((source / finished.name).read_text(encoding='utf-8'))
    description.pop('alternativeFileFormats', None)
    _write_json(finished, {**description, 'fileFormat': 'array_record'})
  return target


def download_tfds(name: str, data_dir: str | pathlib.Path | None = None) -> pathlib.Path:
  """Lets TFDS download and prepare a set as ArrayRecord; returns its folder.

  The command line tool of TFDS wants TensorFlow; this works without, for every set whose builder
  does.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(
    name, data_dir=None if data_dir is None else str(data_dir), file_format='array_record'
  )
  builder.download_and_prepare()
  return pathlib.Path(builder.data_path)


def _channels(text: str, block: int) -> tuple[int, ...] | None:
  """'all', a list such as '0,1,8,64', or the name of a preset."""
  if text == 'all':
    return None
  if text[:1].isdigit():
    return tuple(int(t) for t in text.split(','))
  from fqjax.ops import channel_subset  # imports jax; the other forms do without

  return tuple(channel_subset(text, block))


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; see the module's docstring."""
  parser = argparse.ArgumentParser(
    prog='python -m fqjax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--from', dest='source', required=True, help='folder:PATH, zip:PATH, tfds:NAME, cifar10, ...')
  add('--split', default='train')
  add('--out', help='folder to write; the set goes to OUT/SPLIT')
  add('--data_dir', help='TFDS data folder, for tfds:NAME')
  add('--format', choices=_records.KINDS, default='jpeg')
  add('--resize', type=int, help='resize the shorter side to this many pixels')
  add('--crop', type=int, help='then cut the central square of this side')
  add('--quality', type=int, default=95, help='JPEG quality where pixels are encoded anew')
  add('--block', type=int, default=8)
  add('--channels', default='all', help="'all', a preset such as square24, or 0,1,8,...")
  add('--chroma', choices=('filtered', 'full'), default='filtered')
  add('--no_rounding', action='store_true', help='round only once, to int16')
  add('--compression', choices=('none', 'zstd'), default='none')
  add('--shard_size', type=int, default=1024, help='images per shard')
  add('--workers', type=int, default=os.cpu_count() or 1, help='processes; 0: this one')
  add('--strict', action='store_true', help='stop at a damaged image')
  add('--convert', action='store_true', help='copy a TFDS set from TFRecord to ArrayRecord')
  add('--download', action='store_true', help='let TFDS download and prepare tfds:NAME')
  args = parser.parse_args(argv)
  try:
    if args.convert or args.download:
      name = args.source.removeprefix('tfds:')
      if name == args.source:
        parser.error('--convert and --download work on TFDS sets: --from tfds:NAME')
      if args.download:
        print(f'{args.source} is ready in {download_tfds(name, args.data_dir)}')
        return
    if args.out is None:
      parser.error('--out is needed')
    if args.convert:
      convert_tfds(name, args.data_dir, args.out, workers=args.workers, progress=True)
      print(f'Source: {args.source} with data_dir={args.out}')
      return
    plan = Plan(
      source=args.source,
      split=args.split,
      options={'data_dir': args.data_dir} if args.data_dir else {},
      kind=args.format,
      resize=args.resize,
      crop=args.crop,
      quality=args.quality,
      block=args.block,
      channels=_channels(args.channels, args.block),
      chroma=args.chroma,
      rounding=not args.no_rounding,
      shard_size=args.shard_size,
      compression=args.compression,
      strict=args.strict,
    )
    metadata = prepare(plan, args.out, workers=args.workers, progress=True)
  except (ValueError, OSError, ImportError) as e:
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(1) from e
  for _, reason in metadata['skipped']:
    print(f'left out: {reason}', file=sys.stderr)
  size = sum(s['bytes'] for s in metadata['shards'])
  print(
    f'{metadata["count"]} images, {size:,} bytes in {len(metadata["shards"])} shards, '
    f'{len(metadata["skipped"])} left out. Source: records:{args.out}, split {args.split}'
  )


if __name__ == '__main__':
  main()
