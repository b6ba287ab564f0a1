import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.fft

from fqjax import data, ops
from fqjax.data import _coefficients, _records, prepare
from tests import tiny_tfds
from tests.tiny_tfds import jpeg, photograph

SOURCE = {'n': 22, 'size': 24}


def plan(**options):
  return prepare.Plan(**{'source': 'synthetic', 'options': SOURCE, 'shard_size': 5, **options})


def records(path, split='train'):
  source = data.load_source(f'records:{path}', split)
  return [source.read(i) for i in range(len(source))]


def assert_same(a, b):
  assert len(a) == len(b) > 0
  for x, y in zip(a, b, strict=True):
    assert x['label'] == y['label'] and x['name'].split(' ')[1:] == y['name'].split(' ')[1:]
    if 'image' in x:
      assert x['image'] == y['image']
    else:
      np.testing.assert_array_equal(x['coefficients'], y['coefficients'])


@pytest.fixture
def folder(tmp_path):
  for label, name in enumerate(('ant', 'bee')):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(4):
      data_ = jpeg(photograph(i, label, (40 + 8 * i, 60)))
      (tmp_path / 'photos' / name / f'{i}.jpg').write_bytes(data_)
  return tmp_path / 'photos'


def test_jpeg_bytes_are_kept_as_they_are(folder, tmp_path, capsys):
  out = tmp_path / 'out'
  prepare.main(
    ['--from', f'folder:{folder}', '--split', 'all', '--out', str(out), '--workers', '0']
  )
  assert '8 images' in capsys.readouterr().out
  source = data.FolderSource(folder)
  for i, record in enumerate(records(out, 'all')):
    assert record['image'] == source.read(i)['image']
    assert record['label'] == source.read(i)['label']
  assert data.load_source(f'records:{out}', 'all').class_names == ('ant', 'bee')


def test_resized_jpeg(folder, tmp_path):
  prepare.prepare(plan(source=f'folder:{folder}', split='all', options={}, resize=32), tmp_path)
  source = data.load_source(f'records:{tmp_path}', 'all')
  original = data.FolderSource(folder)
  for i in range(8):
    want = data.resize(32)(original[i], np.random.default_rng(0))['image']
    got = source[i]['image']
    assert got.shape == want.shape and min(got.shape[:2]) == 32
    # Quality 95; the pictures are noise.
    assert np.abs(got.astype(int) - want).mean() < 8


@pytest.mark.parametrize('compression', ['none', 'zstd'])
def test_coefficients(folder, tmp_path, compression):
  channels = ops.channel_subset('square24', 8)
  prepare.main(
    f'--from folder:{folder} --split all --out {tmp_path} --format coefficients --resize 36 '
    f'--crop 32 --channels square24 --compression {compression} --workers 0'.split()
  )
  source = data.load_source(f'records:{tmp_path}', 'all')
  assert {k: source.metadata[k] for k in ('kind', 'block', 'channels', 'chroma', 'rounding')} == {
    'kind': 'coefficients',
    'block': 8,
    'channels': list(channels),
    'chroma': 'filtered',
    'rounding': True,
  }
  original = data.FolderSource(folder)
  for i in (0, 7):
    pixels = data.resize_crop(36, 32)(original[i], np.random.default_rng(0))['image']
    want = np.asarray(ops.rgb_to_coefficients(pixels))[..., channels]
    got = source[i]['coefficients']
    assert got.shape == (4, 4, 24) and got.dtype == np.int16
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.01


def test_coefficients_of_other_blocks_and_sizes_keep_whole_blocks(folder, tmp_path):
  prepare.prepare(
    plan(source=f'folder:{folder}', split='all', options={}, kind='coefficients', block=16,
         channels=(0, 256, 512), chroma='full', rounding=False),
    tmp_path,
  )  # fmt: skip
  source = data.load_source(f'records:{tmp_path}', 'all')
  image = data.FolderSource(folder)[3]['image']
  assert image.shape == (64, 60, 3)
  want = _coefficients.rgb_to_coefficients(
    image[:, :48], size=16, channels=(0, 256, 512), chroma='full', rounding=False
  )
  np.testing.assert_array_equal(source[3]['coefficients'], np.rint(want).astype(np.int16))
  assert source.metadata['chroma'] == 'full'


def test_blocks_whose_coefficients_would_wrap_are_refused():
  for block, fits in ((256, True), (257, False)):
    # The most that samples of -128 to 127.5 can add up to, at the worst frequency.
    basis = scipy.fft.dct(np.eye(block), norm='ortho', axis=0)
    worst = np.abs(basis).sum(axis=1).max() ** 2
    assert (round(128 * worst) <= 32768 and 127.5 * worst < 32767) == fits
    if fits:
      assert plan(kind='coefficients', block=block).block == block
    else:
      with pytest.raises(ValueError, match='block=257: int16 holds'):
        plan(kind='coefficients', block=block)
  assert plan(block=512).block == 512  # pixels have no blocks


def test_damaged_images_are_left_out_and_named(folder, tmp_path, capsys):
  bad = folder / 'ant' / '2.jpg'
  bad.write_bytes(bad.read_bytes()[:900])
  command = ['--from', f'folder:{folder}', '--split', 'all', '--workers', '0']
  with pytest.raises(SystemExit):
    prepare.main([*command, '--out', str(tmp_path / 'strict'), '--strict'])
  assert f'error: cannot decode {bad} at byte' in capsys.readouterr().err
  prepare.main([*command, '--out', str(tmp_path / 'out')])
  assert f'left out: cannot decode {bad} at byte' in capsys.readouterr().err
  source = data.load_source(f'records:{tmp_path}/out', 'all')
  assert len(source) == 7
  ((name, reason),) = source.metadata['skipped']
  assert name == str(bad) and 'at byte' in reason
  for p in folder.rglob('*.jpg'):
    p.write_bytes(b'')
  with pytest.raises(ValueError, match='none of the 8 images'):
    prepare.prepare(plan(source=f'folder:{folder}', split='all', options={}), tmp_path / 'none')


def test_interrupted_by_an_error_it_continues(tmp_path, monkeypatch):
  want, out = tmp_path / 'want', tmp_path / 'out'
  prepare.prepare(plan(), want)
  pack, calls = _records.pack, []

  def failing(record):
    calls.append(record)
    if len(calls) == 13:  # in the middle of the third shard
      raise OSError('No space left on device')
    return pack(record)

  monkeypatch.setattr(_records, 'pack', failing)
  with pytest.raises(OSError, match='No space left'):
    prepare.prepare(plan(), out)
  assert len(list(out.rglob('*.array_record'))) == 2 and not list(out.rglob('*.tmp'))
  with pytest.raises(FileNotFoundError, match='unfinished'):
    data.load_source(f'records:{out}', 'train')

  calls.clear()
  monkeypatch.setattr(_records, 'pack', lambda r: calls.append(r) or pack(r))
  prepare.prepare(plan(), out)
  assert len(calls) == 12  # the two finished shards are not made again
  assert_same(records(out), records(want))
  left = {p.name for p in (out / 'train').iterdir()}
  assert left == {'metadata.json', *(f'train-{i:05d}-of-00005.array_record' for i in range(5))}


def test_killed_and_started_again(tmp_path):
  """SIGKILL while two processes write: never taken for whole, and whole after a second run."""
  out = tmp_path / 'out'
  command = [
    sys.executable, '-m', 'fqjax.data.prepare', '--from', f'folder:{tmp_path}/photos',
    '--split', 'all', '--out', str(out), '--shard_size', '8', '--workers', '2',
    '--format', 'coefficients', '--resize', '256',
  ]  # fmt: skip
  (tmp_path / 'photos' / 'a').mkdir(parents=True)
  for i in range(64):
    (tmp_path / 'photos' / 'a' / f'{i:02d}.jpg').write_bytes(jpeg(photograph(i, 0)))
  # A group of its own, so that the kill takes its workers too.
  process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
  deadline = time.time() + 60
  while not list(out.rglob('*.array_record')) and time.time() < deadline:
    time.sleep(0.005)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  finished = list(out.rglob('*.array_record'))
  assert finished
  if not (out / 'all' / 'metadata.json').exists():
    with pytest.raises(FileNotFoundError, match='unfinished'):
      data.load_source(f'records:{out}', 'all')
  times = {p: p.stat().st_mtime_ns for p in finished}
  # With another number of workers: it does not matter who writes a shard.
  done = subprocess.run([*command, '--workers', '0'], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert '100%' in done.stderr  # the bar
  assert {p: p.stat().st_mtime_ns for p in finished} == times
  assert not list(out.rglob('*.tmp')) and not list(out.rglob('*.json.*'))
  want = prepare.Plan(
    f'folder:{tmp_path}/photos', 'all', {}, 'coefficients', resize=256, shard_size=64
  )
  prepare.prepare(want, tmp_path / 'want')
  assert_same(records(out, 'all'), records(tmp_path / 'want', 'all'))


def test_other_settings_are_not_mixed_in(tmp_path, monkeypatch):
  prepare.prepare(plan(), tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.array_record')}
  prepare.prepare(plan(), tmp_path)  # finished: nothing to do
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.array_record')} == before
  with pytest.raises(ValueError, match=r'made differently \(quality: 95 there, 50 now\)'):
    prepare.prepare(plan(quality=50), tmp_path)

  def stop(record):
    raise OSError('stop')

  monkeypatch.setattr(_records, 'pack', stop)
  with pytest.raises(OSError, match='stop'):
    prepare.prepare(plan(), tmp_path / 'half')
  with pytest.raises(ValueError, match=r'made differently \(resize: None there, 16 now\)'):
    prepare.prepare(plan(resize=16), tmp_path / 'half')


def test_two_writers_do_not_meet(tmp_path):
  folder = tmp_path / 'train'
  folder.mkdir()
  with prepare._only_writer(folder), pytest.raises(ValueError, match='another process'):
    prepare.prepare(plan(), tmp_path)
  prepare.prepare(plan(), tmp_path)


def test_tfds_set(tmp_path):
  tiny_tfds.write_tiny_imagenet(tmp_path / 'tfds', 4, 3)
  out = tmp_path / 'out'
  prepare.main(
    f'--from tfds:imagenet2012 --data_dir {tmp_path}/tfds --split validation --out {out} '
    '--format coefficients --resize 32 --crop 32 --workers 0'.split()
  )
  source = data.load_source(f'records:{out}', 'validation')
  assert len(source) == 3 and source.num_classes == 1000
  assert source[2]['coefficients'].shape == (4, 4, 192)
  assert json.loads((out / 'validation' / 'metadata.json').read_text())['plan']['options'] == {
    'data_dir': f'{tmp_path}/tfds'
  }


@pytest.mark.parametrize(
  'options,words',
  [
    ({'kind': 'png'}, 'jpeg, coefficients'),
    ({'chroma': 'half'}, "'filtered' or 'full'"),
    ({'compression': 'gzip'}, "'none' or 'zstd'"),
    ({'resize': 16, 'crop': 17}, 'larger than the image'),
    ({'kind': 'coefficients', 'crop': 20}, 'whole number of blocks of 8'),
    ({'shard_size': 0}, 'at least 1'),
    ({'kind': 'coefficients', 'block': 0, 'crop': 8}, 'blocks of 1 to 256'),
  ],
)
def test_plans_that_do_not_fit(options, words):
  with pytest.raises(ValueError, match=words):
    plan(**options)


def test_command_line_errors_are_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit):
    prepare.main(['--from', 'folder:/nowhere', '--out', str(tmp_path / 'x'), '--workers', '0'])
  assert capsys.readouterr().err.startswith('error: image folder not found')
  for arguments, words in (
    (['--from', 'synthetic'], '--out is needed'),
    (['--from', 'synthetic', '--convert', '--out', 'x'], 'tfds:NAME'),
  ):
    with pytest.raises(SystemExit):
      prepare.main(arguments)
    assert words in capsys.readouterr().err
