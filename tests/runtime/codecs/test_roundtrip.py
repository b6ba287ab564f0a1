"""Every format gives back every bit, costs what it says, and reads what it wrote."""

import numpy as np
import pytest

from fqjax.runtime.codecs import CODECS
from tests.runtime.codecs import cases

KERNELS = ('punched', 'pcnn', 'patterns', 'fkw')


def _same(a, b):
  """Two Encoded with the same content; dtypes of indices may be narrower."""
  assert type(a) is type(b)
  for name, x, y in zip(a._fields, a, b, strict=True):
    if name == 'values':
      assert cases.same_bits(x, y)
    elif isinstance(x, np.ndarray):
      assert x.shape == y.shape and (x == y).all(), name
    elif isinstance(x, tuple):
      assert len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y, strict=True)), name
    else:
      assert x == y, name


@pytest.mark.parametrize('dtype', cases.DTYPES)
@pytest.mark.parametrize('name', CODECS)
def test_every_bit_comes_back_and_costs_what_is_said(name, dtype):
  codec = CODECS[name]
  for seed in range(12):
    array, mask, settings = cases.make(name, seed, dtype)
    for given in {id(m): m for m in (mask, None)}.values():
      masked = {} if name == 'dense' else {'mask': given}
      encoded = codec.encode(array, **settings, **masked)
      assert cases.same_bits(codec.decode(encoded), array)
      data = codec.to_bytes(encoded)
      cost = codec.bits(encoded)
      assert sum(cost) == cost.total == 8 * len(data) and min(cost) >= 0
      assert cost.values == encoded.values.size * array.dtype.itemsize * 8
      back = codec.from_bytes(data)
      _same(encoded, back)
      assert cases.same_bits(codec.decode(back), array)
      assert codec.to_bytes(back) == data


@pytest.mark.parametrize('name', CODECS)
def test_integers_are_packed_into_the_bits_asked_for(name):
  codec = CODECS[name]
  for seed, (dtype, width) in enumerate(
    [('int8', 4), ('uint8', 4), ('int8', 1), ('int32', 12), ('uint16', 5), ('int64', 32)]
  ):
    array, _, settings = cases.make(name, seed, 'int8')
    low, high = (0, 1 << width) if dtype[0] == 'u' else (-(1 << width - 1), 1 << width - 1)
    rng = np.random.default_rng(seed)
    array = np.where(array != 0, rng.integers(low, high, array.shape), 0).astype(dtype)
    encoded = codec.encode(array, **settings)
    data = codec.to_bytes(encoded, width)
    cost = codec.bits(encoded, width)
    assert cost.total == 8 * len(data)
    assert cost.values == width * encoded.values.size
    assert cost.index == codec.bits(encoded).index
    assert cases.same_bits(codec.decode(codec.from_bytes(data)), array)
  many = np.full((8, 8, 1) if name in KERNELS else (8, 8), 4, np.int8)
  plain = {'nm': {'n': 4, 'm': 4}, 'bank': {'size': 4}, 'darb': {'exponents': 0}}
  with pytest.raises(ValueError, match=r'value_bits=3: int8 values 4..4 do not fit; -4..3 do'):
    codec.to_bytes(codec.encode(many, **plain.get(name, {})), 3)


@pytest.mark.parametrize('name', CODECS)
def test_settings_are_found_where_none_are_given(name):
  codec = CODECS[name]
  for seed in range(8):
    array, mask, settings = cases.make(name, seed)
    kept = {k: settings[k] for k in ('n', 'm', 'size', 'rows', 'columns', 'axes') if k in settings}
    found = codec.encode(array, **kept)
    assert cases.same_bits(codec.decode(codec.from_bytes(codec.to_bytes(found))), array)
    given = codec.encode(array, **settings)
    if name in ('bank', 'darb', 'csr', 'relative', 'rice'):
      assert codec.bits(found).total <= codec.bits(given).total


@pytest.mark.parametrize('name', CODECS)
def test_byte_order_and_strides_do_not_matter(name):
  codec = CODECS[name]
  array, _, settings = cases.make(name, 3)
  data = codec.to_bytes(codec.encode(array, **settings))
  big = array.astype(array.dtype.newbyteorder('>'))
  assert codec.to_bytes(codec.encode(big, **settings)) == data
  wide = np.zeros((*array.shape, 2), array.dtype)
  wide[..., 0] = array
  assert codec.to_bytes(codec.encode(wide[..., 0], **settings)) == data
  odd = np.frombuffer(b'x' + data, np.uint8)[1:]  # as a memory map gives it: not aligned
  assert cases.same_bits(codec.decode(codec.from_bytes(odd)), array)
  assert cases.same_bits(codec.decode(codec.from_bytes(memoryview(data))), array)


@pytest.mark.parametrize('name', CODECS)
def test_what_is_read_does_not_live_in_the_file(name):
  array, _, settings = cases.make(name, 5)
  data = bytearray(CODECS[name].to_bytes(CODECS[name].encode(array, **settings)))
  encoded = CODECS[name].from_bytes(data)
  data[:] = bytes(len(data))
  assert cases.same_bits(CODECS[name].decode(encoded), array)
