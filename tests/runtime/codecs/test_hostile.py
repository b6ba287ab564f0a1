"""Damaged and lying files: a ValueError that says where, or a file that is valid. Nothing else."""

import itertools
import re
import struct
import tracemalloc

import numpy as np
import pytest

from fqjax.runtime.codecs import CODECS
from tests.runtime.codecs import cases

WHERE = re.compile(r'^FQ[A-Z]{4} file: .+ at byte \d+ .+\.$')


def _files(name, dtype):
  for seed in range(6):
    array, _, settings = cases.make(name, seed, dtype)
    yield CODECS[name].to_bytes(CODECS[name].encode(array, **settings))


def _read(name, data, **settings):
  """True when the file was taken; then it has to be what the codec itself would write."""
  codec = CODECS[name]
  try:
    encoded = codec.from_bytes(data, **settings)
  except ValueError as e:
    assert WHERE.match(str(e)), e
    return False
  decoded = codec.decode(encoded)
  assert decoded.size <= 1 << 16
  assert codec.to_bytes(encoded, data[8]) == bytes(data)
  assert sum(codec.bits(encoded, data[8])) == 8 * len(data)
  return True


@pytest.mark.parametrize('name', CODECS)
def test_random_damage(name):
  rng = np.random.default_rng(0)
  taken = 0
  for dtype in ('int8', 'float32'):
    for data in _files(name, dtype):
      for _ in range(30):
        damaged = bytearray(data)
        # The header and the index are the small, dangerous part: aim there half of the time.
        end = min(60, len(data)) if rng.random() < 0.5 else len(data)
        for at in rng.integers(0, end, rng.integers(1, 4)):
          damaged[at] = rng.choice([damaged[at] ^ 1 << rng.integers(8), rng.integers(256), 0, 255])
        taken += _read(name, damaged, limit=1 << 16)
  assert taken  # damage to values alone is no damage to the file


@pytest.mark.parametrize('name', CODECS)
def test_every_truncation_and_what_is_left_over(name):
  for data in _files(name, 'int8'):
    for end in {*range(min(len(data), 60)), *range(0, len(data), 97), len(data) - 1}:
      assert not _read(name, data[:end])
    with pytest.raises(ValueError, match=f'end at byte {len(data)} is followed by 1 more bytes'):
      CODECS[name].from_bytes(data + b'\0')


@pytest.mark.parametrize('name', CODECS)
def test_lies_in_the_header_take_no_memory(name):
  for data in itertools.islice(_files(name, 'int8'), 3):
    tracemalloc.start()
    for at in range(6, min(36, len(data) - 4)):
      for lie in (0xFFFFFFFF, 1 << 30, 1 << 16):
        damaged = bytearray(data)
        damaged[at : at + 4] = struct.pack('<I', lie)
        try:
          CODECS[name].from_bytes(damaged)
        except ValueError as e:
          assert WHERE.match(str(e)), e
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A bit of the file can stand for an index of 8 bytes, some of them held at once.
    assert peak < 100_000 + 1000 * len(data)


@pytest.mark.parametrize('name', CODECS)
def test_what_is_wrong_is_named(name):
  codec = CODECS[name]
  data = next(_files(name, 'float32'))
  with pytest.raises(ValueError, match='magic at byte 0 is .* another format'):
    codec.from_bytes(b'PK1234' + data[6:])
  with pytest.raises(ValueError, match='version at byte 6 is 9, this reader knows 1'):
    codec.from_bytes(data[:6] + b'\x09' + data[7:])
  with pytest.raises(ValueError, match='dtype at byte 7 code 99'):
    codec.from_bytes(data[:7] + b'\x63' + data[8:])
  with pytest.raises(ValueError, match='value bits at byte 8 are 31 for float32'):
    codec.from_bytes(data[:8] + b'\x1f' + data[9:])
  with pytest.raises(ValueError, match=r'magic at byte 0 needs 6 bytes, 0 are left'):
    codec.from_bytes(b'')
  array, _, settings = cases.make(name, 4)
  with pytest.raises(ValueError, match=r'has \d+ entries, above limit=\d'):
    codec.from_bytes(codec.to_bytes(codec.encode(array, **settings)), limit=array.size - 1)


def _damage(name, array, change, **settings):
  """from_bytes of an Encoded that no encoder makes."""
  codec = CODECS[name]
  encoded = codec.encode(array, **settings)
  codec.from_bytes(codec.to_bytes(encoded._replace(**change(encoded))))


_EYE = np.eye(6, dtype=np.float32)
_WIDE = np.zeros((2, 3, 9), np.float32)
_WIDE[0, :, [0, 1, 3, 4]] = 1
_WIDE[1, 1:, [1, 2, 4, 5]] = 2


@pytest.mark.parametrize(
  ('name', 'array', 'settings', 'change', 'message'),
  [
    ('csr', _EYE, {}, lambda e: {'columns': e.columns + 2}, 'columns at byte .* reach 7 of 6'),
    ('csr', _EYE, {}, lambda e: {'pointers': e.pointers[::-1]}, 'do not begin at 0'),
    ('csr', _EYE * 0 + 1, {}, lambda e: {'columns': e.columns[::-1]}, 'do not ascend'),
    ('relative', _EYE, {'gap_bits': 4}, lambda e: {'gaps': e.gaps + 1}, 'gaps at byte .* reach'),
    ('rice', _EYE, {'low_bits': 2}, lambda e: {'gaps': e.gaps + 1}, 'gaps at byte .* reach'),
    ('nm', _EYE, {'n': 1, 'm': 3}, lambda e: {'index': e.index + 1}, 'do not ascend below 3'),
    ('nm', _EYE, {'n': 2, 'm': 3}, lambda e: {'index': e.index * 0}, 'do not ascend below 3'),
    ('blocks', _EYE, {'rows': 2, 'columns': 2}, lambda e: {'columns': e.columns + 1}, 'reach 3 of 3'),
    ('blocks', _EYE, {'rows': 4, 'columns': 4}, lambda e: {'values': e.values + 1}, 'beyond the edge'),
    ('blocks', _EYE[:, :4] + 1, {'rows': 4, 'columns': 4}, lambda e: {'values': e.values + 1}, 'beyond the edge'),
    ('blocks', _EYE[:4] + 1, {'rows': 4, 'columns': 4}, lambda e: {'values': e.values + 1}, 'beyond the edge'),
    ('punched', _WIDE, {'rows': 2, 'columns': 2}, lambda e: {'values': e.values + 1}, 'beyond the edge'),
    ('bank', _EYE, {'size': 3}, lambda e: {'index': e.index + 1}, 'leave their bank'),
    ('bank', _EYE[:, :5], {'size': 4}, lambda e: {'index': e.index * 0 + 3}, 'leave their bank'),
    ('bank', _EYE + 1, {'size': 4}, lambda e: {'index': e.index * 0}, 'do not ascend'),
    ('darb', _EYE, {'exponents': 2}, lambda e: {'index': e.index * 0 + 2}, 'reach column 6 of 6'),
    ('pcnn', _WIDE, {'table': (27, 54, 216)}, lambda e: {'codes': e.codes + 2}, 'codes at .* 3 of 3'),
    ('pcnn', _WIDE, {}, lambda e: {'table': e.table * 0 + 27}, 'patterns .* different masks'),
    ('pcnn', _WIDE, {}, lambda e: {'table': e.table << np.uint64(9)}, 'masks of 9 taps'),
    ('pcnn', _WIDE, {}, lambda e: {'table': e.table | np.uint64(64)}, 'have 5 taps, not 4'),
    ('patterns', _WIDE, {'table': (27, 54, 216)}, lambda e: {'codes': e.codes + 2}, 'codes at .* 3 of'),
    ('fkw', _WIDE, {}, lambda e: {'index': e.index + 1}, 'index at .* reaches input 3 of 3'),
    ('fkw', _WIDE, {'form': 'delta'}, lambda e: {'index': e.index + 1}, 'reaches input 3 of 3'),
    ('fkw', _WIDE, {}, lambda e: {'index': e.index[::-1]}, 'does not ascend'),
    ('fkw', _WIDE, {}, lambda e: {'reorder': e.reorder * 0}, 'is no permutation'),
    ('fkw', _WIDE, {}, lambda e: {'offset': e.offset + 1}, 'offset at .* does not begin at 0'),
    ('fkw', _WIDE, {}, lambda e: {'offset': e.offset * 2}, 'offset at .* grow by 0..3'),
    ('fkw', _WIDE, {}, lambda e: {'stride': e.stride[:, ::-1]}, 'stride at .* does not rise'),
    ('fkw', _WIDE, {}, lambda e: {'index': e.index[1:]}, 'index at .* has 4 bytes, not those of 5'),
  ],
)  # fmt: skip
def test_lies_of_each_format(name, array, settings, change, message):
  with pytest.raises(ValueError, match=message) as e:
    _damage(name, array, change, **settings)
  assert WHERE.match(str(e.value))


@pytest.mark.parametrize(
  ('at', 'put', 'message'),
  [
    (22, 25, 'low bits at byte .* are 25'),
    (18, 37, 'entries at byte .* are 37, the array has 36'),
    (18, 5, 'unary part at byte .* has 6 ends in 11 bits, for 5 entries'),
    (23, 10, 'unary part at byte .* ends wrong'),
    (23, 12, 'unary part at byte .* has 6 ends in 12 bits, for 6 entries and an end as the last'),
    (23, 255, 'unary part at byte .* needs 32 bytes'),
    (27, 0, 'unary part at byte .* ends in 11 bits, for 6 entries'),
  ],
)
def test_lies_of_a_unary_part(at, put, message):
  codec = CODECS['rice']
  data = bytearray(codec.to_bytes(codec.encode(_EYE, low_bits=2)))
  data[at] = put
  with pytest.raises(ValueError, match=message) as e:
    codec.from_bytes(bytes(data))
  assert WHERE.match(str(e.value))


def test_delta_index_ends_with_its_last_entry():
  codec = CODECS['fkw']
  data = codec.to_bytes(codec.encode(_WIDE, form='delta'))
  end = len(data) - 5 * 4 * 4  # 5 kernels of 4 float32
  count = slice(22, 26)
  assert data[count] == struct.pack('<I', 5)
  changed = data[: end - 1] + b'\xff' + data[end:]
  longer = data[:22] + struct.pack('<I', 6) + data[26:end] + b'\xff' + data[end:]
  for bad in (changed, longer):
    with pytest.raises(ValueError, match='not those of 5 delta entries'):
      codec.from_bytes(bad)


def test_counts_and_blocks_beyond_their_bounds():
  codec = CODECS['bank']
  data = bytearray(codec.to_bytes(codec.encode(np.ones((1, 5), np.int8), 5)))
  assert data[19] == 5
  data[19] = 7
  with pytest.raises(ValueError, match='counts at byte 19 reach 7 of 5'):
    codec.from_bytes(data)
  # No block lives: nothing but its size says that it would not fit into memory.
  for name, shape, at in (('blocks', (4, 4), 17), ('punched', (4, 4, 1), 19)):
    codec = CODECS[name]
    data = bytearray(codec.to_bytes(codec.encode(np.zeros(shape, np.int8), 4, 4)))
    data[at : at + 4] = b'\xff' * 4
    with pytest.raises(ValueError, match='block at .* is 65535x65535 in 4x4'):
      codec.from_bytes(data)
