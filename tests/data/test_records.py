import json
import pickle
import struct

import numpy as np
import pytest

from fqjax import data
from fqjax.data import _records, prepare

VALUES = np.random.default_rng(0).integers(-1024, 1024, (3, 4, 5), dtype=np.int16)


def test_round_trip():
  image = _records.Record(7, 'ordner/bär.jpg', image=b'abc')
  assert _records.unpack(_records.pack(image)) == image
  got = _records.unpack(_records.pack(_records.Record(-1, '', coefficients=VALUES)))
  np.testing.assert_array_equal(got.coefficients, VALUES)
  assert got.label == -1 and got.image is None
  assert got.coefficients.flags.aligned and not got.coefficients.flags.writeable


def test_stored_form_is_as_documented():
  packed = _records.pack(_records.Record(258, 'ab', coefficients=VALUES))
  assert packed[:4] == b'FQR1' and packed[4] == 1
  assert struct.unpack_from('<Hi3H', packed, 6) == (2, 258, 3, 4, 5)
  assert struct.unpack_from('<I', packed, 20) == (120,)
  assert packed[24:-2] == VALUES.astype('<i2').tobytes() and packed[-2:] == b'ab'


@pytest.mark.parametrize(
  'record',
  [
    _records.Record(0, 'x'),
    _records.Record(0, 'x', b'', VALUES),
    _records.Record(0, 'x', coefficients=VALUES.astype(np.int32)),
    _records.Record(0, 'x', coefficients=VALUES[0]),
  ],
)
def test_what_is_not_a_record(record):
  with pytest.raises(ValueError):
    _records.pack(record)


def test_damaged_records_are_named_never_misread():
  good = _records.pack(_records.Record(1, 'name', coefficients=VALUES))
  for n in range(len(good)):
    with pytest.raises(data.CorruptImageError, match='shard 3'):
      _records.unpack(good[:n], 'shard 3')
  with pytest.raises(data.CorruptImageError):
    _records.unpack(good + b'x')
  rng = np.random.default_rng(0)
  for _ in range(300):
    bad = bytearray(good)
    bad[rng.integers(24)] = rng.integers(256)
    try:
      record = _records.unpack(bytes(bad))
    except data.CorruptImageError:
      continue
    if record.coefficients is not None:
      assert record.coefficients.size == VALUES.size


@pytest.fixture
def prepared(tmp_path):
  plan = prepare.Plan('synthetic', 'test', {'n': 10, 'size': 16}, shard_size=4)
  prepare.prepare(plan, tmp_path)
  return tmp_path


def test_source(prepared):
  source = data.load_source(f'records:{prepared}', 'test')
  assert len(source) == 10 and source.num_classes == 10
  assert [source[i]['label'] for i in range(10)] == list(range(10))
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[9]['image'], source[9]['image'])
  assert 'synthetic' in source.read(5)['name'] and str(prepared) in source.read(5)['name']


def test_missing_and_unfinished_sets(prepared):
  with pytest.raises(FileNotFoundError, match=r'splits in .*: test\).*--split train --out'):
    data.load_source(f'records:{prepared}', 'train')
  (prepared / 'train').mkdir()
  with pytest.raises(FileNotFoundError, match='unfinished set .*run the same'):
    data.load_source(f'records:{prepared}', 'train')


def edit(folder, **changes):
  path = folder / 'metadata.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shards_are_checked_before_reading(prepared):
  folder = prepared / 'test'
  shard = max(folder.glob('*.array_record'))
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-10])
  with pytest.raises(ValueError, match=f'{shard.name} should have {len(whole)} bytes and has'):
    data.load_source(f'records:{prepared}', 'test')
  shard.unlink()
  with pytest.raises(ValueError, match='is missing'):
    data.load_source(f'records:{prepared}', 'test')
  shard.write_bytes(whole)
  edit(folder, count=11)
  with pytest.raises(ValueError, match='do not add up to 11'):
    data.load_source(f'records:{prepared}', 'test')
  edit(folder, version=2)
  with pytest.raises(ValueError, match='version 2; this fqjax reads fqjax-records version 1'):
    data.load_source(f'records:{prepared}', 'test')


def test_shards_cannot_point_outside(prepared):
  folder = prepared / 'test'
  metadata = json.loads((folder / 'metadata.json').read_text())
  file = metadata['shards'][0]['file']
  (prepared / file).write_bytes((folder / file).read_bytes())
  metadata['shards'][0]['file'] = '../' + file
  edit(folder, shards=metadata['shards'])
  with pytest.raises(ValueError, match='names a shard outside of its folder'):
    data.load_source(f'records:{prepared}', 'test')


@pytest.mark.parametrize('file', ['/etc/hostname', '../nowhere', 'a/../b', '..', '', 'c:x', 'a\\b'])
def test_paths_of_shards_are_refused_before_they_are_looked_at(prepared, monkeypatch, file):
  folder = prepared / 'test'
  shards = json.loads((folder / 'metadata.json').read_text())['shards']
  shards[0]['file'] = file
  edit(folder, shards=shards)
  looked_at = []
  monkeypatch.setattr(type(folder), 'stat', lambda self, **_: looked_at.append(self))
  monkeypatch.setattr(type(folder), 'is_file', lambda self: self.name == 'metadata.json')
  with pytest.raises(ValueError, match=r'metadata\.json names a shard outside') as caught:
    _records.read_metadata(folder, prepared)
  assert repr(file) in str(caught.value) and looked_at == []


@pytest.mark.parametrize('key', ['format', 'kind', 'count', 'class_names', 'plan', 'shards'])
def test_metadata_without_a_key_names_file_and_key(prepared, key):
  path = prepared / 'test' / 'metadata.json'
  metadata = json.loads(path.read_text())
  del metadata[key]
  path.write_text(json.dumps(metadata))
  with pytest.raises(ValueError, match=rf"{path} is not whole, it lacks '{key}'"):
    data.load_source(f'records:{prepared}', 'test')


def test_damaged_metadata_names_the_file(prepared):
  path = prepared / 'test' / 'metadata.json'
  metadata = json.loads(path.read_text())
  del metadata['shards'][1]['bytes']
  for text, words in (
    (json.dumps(metadata), "lacks 'bytes'"),
    ('[]', "lacks 'format', 'version'"),
    (path.read_text()[:50], 'is damaged'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=f'{path} .*{words}'):
      data.load_source(f'records:{prepared}', 'test')


def test_damage_inside_a_shard_is_a_corrupt_image(prepared):
  shard = min((prepared / 'test').glob('*.array_record'))
  raw = bytearray(shard.read_bytes())
  at = raw.index(b'FQR1')
  raw[at : at + 100] = bytes(100)
  shard.write_bytes(bytes(raw))
  source = data.load_source(f'records:{prepared}', 'test')
  with pytest.raises(data.CorruptImageError, match=r'00000-of-00003\.array_record\[0\]'):
    source[0]
  it = iter(data.Loader(source, 10, shuffle=False, process_index=0, process_count=1))
  batch = next(it)
  it.close()
  # Records of one chunk may fall together; those of other shards do not.
  assert batch['mask'][0] == 0 and batch['mask'][4:].all() and it.corrupt.count >= 1
