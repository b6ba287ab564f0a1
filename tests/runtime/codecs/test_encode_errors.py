"""What cannot be stored is refused with its place and a way out."""

import re

import numpy as np
import pytest

from fqjax.runtime.codecs import (
  CODECS,
  bank,
  bitmask,
  blocks,
  csr,
  darb,
  dense,
  fkw,
  nm,
  patterns,
  pcnn,
  punched,
  relative,
  rice,
  slices,
)

ONES = np.ones((2, 6), np.float32)
KERNELS = np.ones((2, 3, 4), np.float32)
SETTINGS = {
  'nm': {'n': 6, 'm': 6},
  'bank': {'size': 6},
  'punched': {'rows': 2, 'columns': 3},
}


def _any(name, x):
  x = x.reshape(2, 3, -1) if name in ('punched', 'pcnn', 'patterns', 'fkw') and x.size else x
  return CODECS[name].encode, x, SETTINGS.get(name, {})


@pytest.mark.parametrize('name', CODECS)
def test_every_format_refuses_what_none_can_store(name):
  encode, x, settings = _any(name, ONES)
  with pytest.raises(ValueError, match='dtype bool are not stored'):
    encode(x.astype(bool), **settings)
  with pytest.raises(ValueError, match='dtype complex64'):
    encode(x.astype(np.complex64), **settings)
  with pytest.raises(ValueError, match=r'shape \[0, 3, 4\] is not stored|shape \[0\]'):
    encode(
      np.zeros((0, 3, 4) if name in ('punched', 'pcnn', 'patterns', 'fkw') else 0, 'f'), **settings
    )
  if name != 'dense':
    with pytest.raises(ValueError, match=r'mask int64 .* must be bool'):
      encode(x, **settings, mask=np.ones(x.shape, np.int64))
    mask = np.ones(x.shape, bool)
    mask.ravel()[3] = False
    with pytest.raises(ValueError, match=r'weight \[.*\] is 1.0 but off the mask; project first'):
      encode(x, **settings, mask=mask)
    with pytest.raises(ValueError, match='is -0.0 but off the mask'):
      encode(x * np.where(mask, 1, np.float32(-0.0)), **settings, mask=mask)


def test_bfloat16_goes_as_raw_bits():
  ml_dtypes = pytest.importorskip('ml_dtypes')
  w = np.array([1.5, 0, -2], ml_dtypes.bfloat16)
  with pytest.raises(ValueError, match=re.escape('w.view(np.uint16)')):
    dense.encode(w)
  back = bitmask.decode(bitmask.encode(w.view(np.uint16))).view(ml_dtypes.bfloat16)
  assert (back == w).all()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: csr.encode(KERNELS), 'rank 2'),
    (lambda: csr.encode(ONES, index_bits=2), 'index_bits=2 for 6 columns must be 3..32'),
    (lambda: relative.encode(ONES, gap_bits=17), 'gap_bits=17 must be 0..16'),
    (lambda: rice.encode(ONES, low_bits=25), 'low_bits=25 must be 0..24'),
    (lambda: relative.expected_bits(0.0, 8, 4), r'density=0.0 must be in \(0, 1\]'),
    (lambda: nm.encode(ONES, 2, 4), '2:4 of 6 columns'),
    (lambda: nm.encode(ONES, 1, 3), 'group 0 of row 0 has 3 live weights, at most 1 fit'),
    (lambda: nm.encode(ONES, 0, 3), '0:3'),
    (lambda: blocks.encode(ONES, 0, 4), r'blocks of 0x4 in an array \[2, 6\]'),
    (lambda: blocks.encode(ONES, 1, 7), 'no larger than the array'),
    (lambda: punched.encode(KERNELS, 2, 4), r'blocks of 2x4 in an array \[2, 3, 4\]'),
    (lambda: slices.encode(ONES, (0, 0)), r'axes \(0, 0\)'),
    (lambda: slices.encode(ONES, (2,)), r'axes \(2,\) must be different ones of 0..1'),
    (lambda: slices.encode(np.ones((1,) * 9), ()), 'different ones of 0..7'),
    (lambda: bank.encode(ONES, 0), 'size=0'),
    (lambda: bank.encode(ONES, 4, [4, 5]), '2 integers in 0..4'),
    (lambda: bank.encode(ONES, 4, [4, 1]), 'bank 0 of row 1 has 4 live weights, at most 1'),
    (lambda: darb.encode(ONES, 1), 'block 0 of row 0 has more than one live weight among 2'),
    (lambda: darb.encode(ONES * [[1], [0]], [1, 8]), 'exponents 1..8 must be 0..7'),
    (lambda: darb.encode(ONES, [0, 0, 0]), 'one integer, or 2'),
    (lambda: darb.encode(ONES, 0.0), 'one integer, or 2'),
    (lambda: pcnn.encode(KERNELS, [3, 5]), 'output 0, input 0 lives on taps 0b1111 that none of the 2'),
    (lambda: pcnn.encode(KERNELS, [3, 7]), r'patterns \(3, 7\) must be .* same number of bits'),
    (lambda: pcnn.encode(KERNELS, []), r'patterns \(\) must be'),
    (lambda: pcnn.encode(KERNELS, [16]), 'masks of 4 taps'),
    (lambda: pcnn.encode(KERNELS, [15, 15]), 'different masks'),
    (lambda: pcnn.encode(KERNELS, [-1]), r'patterns \(-1\)'),
    (lambda: pcnn.encode(KERNELS, taps=(3, 3)), r'taps=\(3, 3\) .* must multiply to 4'),
    (lambda: patterns.encode(np.ones((1, 1, 65))), '65 taps have no patterns; 64'),
    (lambda: patterns.encode(np.random.default_rng(0).random((90, 90, 49)) * (np.random.default_rng(1).random((90, 90, 49)) < 0.5)), 'supports are more than 4096'),
    (lambda: fkw.encode(KERNELS, form='u32'), "form='u32' for 3 inputs"),
    (lambda: fkw.encode(np.ones((1, 257, 1)), form='u8'), "form='u8' for 257 inputs"),
    (lambda: fkw.encode(np.ones((1, 65536, 1), np.int8)), 'at most 65535 outputs and inputs'),
    (lambda: fkw.encode(KERNELS, similarity='x'), "'runs' or 'inputs'"),
    (lambda: dense.bits(dense.encode(ONES), 65), 'value_bits=65 must be 1..64'),
    (lambda: dense.to_bytes(dense.encode(ONES), 8), 'value_bits=8: float32 values are written in 32'),
    (lambda: dense.to_bytes(dense.encode(ONES.astype(np.int8)), 9), 'value_bits=9: int8'),
    (lambda: pcnn.to_bytes(pcnn.encode(np.ones((1, 1, 1)))._replace(taps=(1, 256))), 'FQPCNN header'),
  ],
)  # fmt: skip
def test_each_format_names_what_does_not_fit(call, message):
  with pytest.raises(ValueError, match=message):
    call()
