"""The container: what is written is read, and nothing else is."""

import json
import struct
import zlib

import numpy as np
import pytest

from fqjax.runtime import ArtifactError, _file

HEADER = {'a': [1, 2.5, 'é'], 'b': None}
SECTIONS = [b'one', b'', bytes(range(256)) * 4]


def opened(data):
  return _file.File(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize('deflate', [False, True])
@pytest.mark.parametrize('alignment', [1, 64])
def test_what_is_written_is_read(alignment, deflate):
  data = _file.pack(HEADER, SECTIONS, alignment=alignment, deflate=deflate)
  file = opened(data)
  assert {key: file.header[key] for key in HEADER} == HEADER
  assert [bytes(file.read(i, 'it')) for i in range(3)] == SECTIONS
  assert all(section.offset % alignment == 0 for section in file.sections)


def test_deflated_only_where_it_helps():
  file = opened(_file.pack({}, SECTIONS, deflate=True))
  assert [section.inflated for section in file.sections] == [None, None, 1024]
  assert file.sections[2].size < 400


def test_sections_are_views_of_the_file():
  data = np.frombuffer(_file.pack({}, [bytes(1000)]), np.uint8)
  assert np.shares_memory(_file.File(data).read(0, 'it'), data)


def test_every_bit_of_the_file_counts():
  data = _file.pack({'x': 1}, [b'abc', b'defgh'], alignment=16)
  for at in range(len(data)):
    for bit in range(8):
      broken = bytearray(data)
      broken[at] ^= 1 << bit
      with pytest.raises(ArtifactError):
        file = opened(bytes(broken))
        for i in range(2):
          file.read(i, 'it')


def test_every_cut_is_seen():
  data = _file.pack({'x': 1}, [b'abc', b''])
  for size in range(len(data)):
    with pytest.raises(ArtifactError):
      opened(data[:size])
  with pytest.raises(ArtifactError, match='added to'):
    opened(data + b'\0')


def test_a_newer_version_is_named():
  data = bytearray(_file.pack({}, []))
  data[8] = 9
  with pytest.raises(ArtifactError, match=r'version 9 .* reads 1; update fqjax'):
    opened(bytes(data))


def rewritten(text: bytes, *, sections=b'', raw=None, packed=False):
  """A file around any header, its checksum made good."""
  head = zlib.compress(text) if packed else text
  size = 32 + len(head) + len(sections)
  numbers = (_file.MAGIC, 1, int(packed), 1, len(head), len(text) if raw is None else raw)
  blank = struct.pack('<8sHBBIIIQ', *numbers, 0, size)
  checksum = zlib.crc32(head, zlib.crc32(blank))
  return struct.pack('<8sHBBIIIQ', *numbers, checksum, size) + head + sections


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'[]', 'not a JSON object'),
    (b'{', 'not JSON'),
    (b'\xff', 'not JSON'),
    (b'{"a":1,"a":2}', 'twice'),
    (b'{"a":1e999}', 'not a finite number'),
    (b'{"a":NaN}', 'not a finite number'),
    (b'{"a":' + b'[' * 5000 + b']' * 5000 + b'}', 'nested'),
    (b'{"a":' + b'[' * 70 + b']' * 70 + b'}', 'nested'),
    (b'{"a":' + b'9' * 5000 + b'}', '5000 digits'),
    (b'{}', 'sections must be a list'),
    (b'{"sections":[[1]]}', r'not \[bytes, checksum\]'),
    (b'{"sections":[[-1,0]]}', r'not \[bytes, checksum\]'),
    (b'{"sections":[[9,0]]}', 'beyond the file'),
  ],
)
def test_crafted_headers(text, message):
  with pytest.raises(ArtifactError, match=message):
    opened(rewritten(text))


def test_bombs_are_not_inflated():
  bomb = zlib.compress(bytes(1 << 24), 9)
  with pytest.raises(ArtifactError, match='no text of'):
    opened(rewritten(b'{}', raw=1 << 30, packed=True))
  with pytest.raises(ArtifactError, match='no text of'):
    opened(rewritten(b' ' * (1 << 21) + b'{}', packed=True))
  text = json.dumps({'sections': [[len(bomb), zlib.crc32(bomb), 1 << 30]]}).encode()
  with pytest.raises(ArtifactError, match='nothing does'):
    opened(rewritten(text, sections=bomb)).read(0, 'it')
  text = json.dumps({'sections': [[len(bomb), zlib.crc32(bomb), 1 << 24]]}).encode()
  with pytest.raises(ArtifactError, match='more than the 1000 it can need'):
    opened(rewritten(text, sections=bomb)).read(0, 'it', 1000)
  text = json.dumps({'sections': [[len(bomb), zlib.crc32(bomb), 100]]}).encode()
  with pytest.raises(ArtifactError, match='does not inflate to the 100 bytes'):
    opened(rewritten(text, sections=bomb)).read(0, 'it')


def test_nothing_hides_between_sections():
  data = bytearray(_file.pack({}, [b'abc', b'd']))
  file = opened(bytes(data))
  data[file.sections[0].offset + 10] = 7
  with pytest.raises(ArtifactError, match='not zero'):
    opened(bytes(data))


def test_a_section_holds_one_thing_and_all_are_read():
  file = opened(_file.pack({}, [b'abc', b'd']))
  file.read(0, 'one')
  with pytest.raises(ArtifactError, match=r'section 0 \(two\) holds something else'):
    file.read(0, 'two')
  with pytest.raises(ArtifactError, match='section 1: no array'):
    file.finish()


def test_brackets_in_texts_are_no_nesting_and_errors_stay_short():
  labels = ['[unused'] * 100 + [']' * 100]
  assert opened(_file.pack({'labels': labels}, [])).header['labels'] == labels
  with pytest.raises(ArtifactError) as caught:
    opened(rewritten(json.dumps({'sections': [['x' * 10**6]]}).encode()))
  assert len(str(caught.value)) < 1100


def test_errors_name_the_file(tmp_path):
  path = tmp_path / 'x.fqx'
  path.write_bytes(b'')
  with pytest.raises(ArtifactError, match=r'x\.fqx: prelude at byte 0'):
    _file.open_file(path)
  with pytest.raises(FileNotFoundError):
    _file.open_file(tmp_path / 'none.fqx')
