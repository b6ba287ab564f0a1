"""Packing against one big integer, field by field."""

import numpy as np
import pytest

from fqjax.runtime.codecs import _bits


def _oracle(fields, width):
  """One integer whose bits k*w.. are field k, written little endian."""
  whole = sum(int(f) << (k * width) for k, f in enumerate(fields))
  return whole.to_bytes(-(-len(fields) * width // 8), 'little')


def test_published_example():
  assert _oracle([5, 0, 7, 2], 3) == bytes([0xC5, 0x05]) == _bits.pack(np.array([5, 0, 7, 2]), 3)


@pytest.mark.parametrize('width', range(33))
def test_any_width_and_length(width):
  rng = np.random.default_rng(width)
  for n in (0, 1, 2, 7, 8, 9, 63, 200):
    fields = rng.integers(0, 1 << width, n, np.uint64)
    data = _bits.pack(fields, width)
    assert data == _oracle(fields, width)
    back = _bits.unpack(np.frombuffer(data, np.uint8), n, width)
    assert (back == fields).all() and back.dtype == _bits.uint_for(width)


def test_rows_of_their_own_length_and_width():
  rng = np.random.default_rng(0)
  counts, widths = rng.integers(0, 30, 50), rng.integers(0, 8, 50)
  rows = [rng.integers(0, 1 << w, c) for c, w in zip(counts, widths, strict=True)]
  data = _bits.pack_ragged(np.concatenate(rows), counts, widths)
  assert data == b''.join(_oracle(r, int(w)) for r, w in zip(rows, widths, strict=True))
  back = _bits.unpack_ragged(np.frombuffer(data, np.uint8), counts, widths)
  assert (back == np.concatenate(rows)).all()


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match='field 1 of row 0 is 8, too large for 3 bits'):
    _bits.pack(np.array([7, 8]), 3)
  with pytest.raises(ValueError, match='33 bits'):
    _bits.pack(np.array([1]), 33)
  with pytest.raises(ValueError, match='fill up a last byte'):
    _bits.unpack(np.array([0b1000_0000], np.uint8), 2, 3)
