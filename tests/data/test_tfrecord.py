import io
import shlex

import numpy as np
import pytest

from fqjax import data
from fqjax.data import _tfrecord, prepare
from tests import tiny_tfds


def slow_crc32c(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def test_crc32c_against_rfc_3720():
  assert _tfrecord.crc32c(b'') == 0
  assert _tfrecord.crc32c(b'123456789') == 0xE3069283
  assert _tfrecord.crc32c(bytes(32)) == 0x8A9136AA
  assert _tfrecord.crc32c(b'\xff' * 32) == 0x62A8AB43
  assert _tfrecord.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 100, 1023, 1024, 1025, 4099])
def test_crc32c_of_any_length(n):
  data = np.random.default_rng(n).bytes(n)
  assert _tfrecord.crc32c(data) == slow_crc32c(data)


def written(records):
  out = io.BytesIO()
  for r in records:
    _tfrecord.write_tfrecord(out, r)
  return out.getvalue()


def test_same_framing_as_an_independent_writer(tmp_path):
  from tensorboardX.record_writer import RecordWriter

  records = [b'abc', b'', np.random.default_rng(0).bytes(2000)]
  writer = RecordWriter(str(tmp_path / 'x'))
  for r in records:
    writer.write(r)
  writer.close()
  assert (tmp_path / 'x').read_bytes() == written(records)
  assert list(_tfrecord.read_tfrecords(tmp_path / 'x')) == records


def test_round_trip_and_damage(tmp_path):
  records = [b'', b'a', np.random.default_rng(0).bytes(3000)]
  path = tmp_path / 'x'
  good = written(records)
  path.write_bytes(good)
  assert list(_tfrecord.read_tfrecords(path)) == records
  for at in range(0, len(good), 37):
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(ValueError, match=f'{path} is (damaged|truncated) at byte'):
      list(_tfrecord.read_tfrecords(path))
  for at in (1, 11, 17, len(good) - 1):
    path.write_bytes(good[:at])
    with pytest.raises(ValueError, match='truncated at byte'):
      list(_tfrecord.read_tfrecords(path))


def test_tfrecord_set_gets_the_command_that_converts_it(tmp_path, capsys):
  """The command in the error message, taken from it and run, makes the set readable."""
  old = tmp_path / 'old folder'
  tiny_tfds.write_tiny_imagenet(old, 5, 3, file_format='tfrecord')
  tiny_tfds.write_tiny_imagenet(tmp_path / 'wanted', 5, 3)
  with pytest.raises(ValueError, match='prepared as tfrecord') as e:
    data.load_source('tfds:imagenet2012', 'train', data_dir=old)
  command = next(line for line in str(e.value).split('\n') if '--convert' in line)
  words = shlex.split(command)
  assert words[:3] == ['python', '-m', 'fqjax.data.prepare']
  prepare.main([*words[3:], '--workers', '0'])
  new = words[words.index('--out') + 1]
  assert new in capsys.readouterr().out

  for split in ('train', 'validation'):
    got = data.load_source('tfds:imagenet2012', split, data_dir=new)
    want = data.load_source('tfds:imagenet2012', split, data_dir=tmp_path / 'wanted')
    assert len(got) == len(want) > 0
    for i in range(len(got)):
      assert got.read(i) == want.read(i)

  # TFDS reads it by itself, and the original is as it was.
  import tensorflow_datasets as tfds

  assert len(tfds.data_source('imagenet2012', split='train', data_dir=new)) == 5
  with pytest.raises(ValueError, match='prepared as tfrecord'):
    data.load_source('tfds:imagenet2012', 'train', data_dir=old)


def test_conversion_stops_at_damage_and_continues(tmp_path):
  folder = tiny_tfds.write_tiny_imagenet(tmp_path / 'old', 4, 2, file_format='tfrecord')
  second = sorted(folder.glob('*train*'))[1]
  good = second.read_bytes()
  second.write_bytes(good[:-100])
  new = tmp_path / 'new'
  with pytest.raises(ValueError, match=f'{second.name} is truncated at byte'):
    prepare.convert_tfds('imagenet2012', tmp_path / 'old', new)
  with pytest.raises(FileNotFoundError, match='not prepared'):
    data.load_source('tfds:imagenet2012', 'train', data_dir=new)
  first = next(new.rglob('*train*00000-of-*'))
  before = first.stat().st_mtime_ns
  second.write_bytes(good)
  prepare.convert_tfds('imagenet2012', tmp_path / 'old', new)
  assert first.stat().st_mtime_ns == before
  assert len(data.load_source('tfds:imagenet2012', 'train', data_dir=new)) == 4
  assert not list(new.rglob('*.tmp'))


def test_conversion_checks_the_number_of_examples(tmp_path):
  folder = tiny_tfds.write_tiny_imagenet(tmp_path / 'old', 4, 2, file_format='tfrecord')
  first = min(folder.glob('*train*'))
  first.write_bytes(written(list(_tfrecord.read_tfrecords(first))[:1]))
  for _ in range(2):  # and again: nothing half-right stays behind
    with pytest.raises(ValueError, match='holds 1 examples, its dataset_info.json says 2'):
      prepare.convert_tfds('imagenet2012', tmp_path / 'old', tmp_path / 'new')
