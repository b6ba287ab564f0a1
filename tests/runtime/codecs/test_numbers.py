"""Published and worked-out costs of every format, to the bit."""

import itertools
import struct

import numpy as np
import pytest

from fqjax.runtime.codecs import (
  _bits,
  bitmask,
  blocks,
  csr,
  darb,
  dense,
  fkw,
  nm,
  patterns,
  pcnn,
  relative,
  rice,
)
from tests.runtime.codecs import cases

VGG = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 2, (256, 512)] + [
  (512, 512)
] * 5  # inputs, outputs of the 13 convolutions
KERNELS = [i * o for i, o in VGG]


def _of_size(n, taps=9):
  """All patterns of n taps."""
  return [sum(1 << t for t in c) for c in itertools.combinations(range(taps), n)]


# --- PCNN: effective compression of a 3x3 layer with w-bit weights is 9w / (n*w + b) ---


def _pcnn(n, v):
  mask = cases.on_patterns(np.random.default_rng(0), 32, 16, 9, _of_size(n)[:v])
  return pcnn.encode(mask.astype(np.float32), table=_of_size(n)[:v])


@pytest.mark.parametrize(
  ('n', 'v', 'b', 'rates', 'overhead'),
  [
    (4, 8, 3, (2.198, 2.149, 2.057), 9.4),
    (4, 16, 4, (2.182, 2.118, 2.000), 12.5),
    (4, 126, 7, (2.133, 2.028, 1.846), 21.9),
    (3, 8, 3, (2.909, 2.824, 2.667), 12.5),
    (2, 8, 3, (4.299, 4.114, 3.789), 18.8),
    (2, 32, 5, (4.174, 3.892, 3.429), 31.2),
    (1, 4, 2, (8.471, 8.000, 7.200), 25.0),
    (1, 8, 3, (8.229, 7.579, 6.545), 37.5),
  ],
)
def test_pcnn_storage_table(n, v, b, rates, overhead):
  encoded = _pcnn(n, v)
  kernels = encoded.codes.size
  for w, rate in zip((32, 16, 8), rates, strict=True):
    cost = pcnn.bits(encoded, w)
    assert (cost.values, cost.index) == (kernels * n * w, kernels * b)
    assert 9 * w * kernels / (cost.values + cost.index) == pytest.approx(rate, abs=5e-4)
  assert cost.tables == 8 * (9 + 14) + 16 * v
  assert 100 * cost.index / cost.values == pytest.approx(overhead, abs=0.0501)


def test_pcnn_of_vgg16_with_mixed_n():
  assert (sum(KERNELS), 9 * sum(KERNELS)) == (1_634_496, 14_710_464)
  two, one = _pcnn(2, 8), _pcnn(1, 8)
  for w, rate in ((32, 7.428), (8, 6.029)):
    per_kernel = [sum(pcnn.bits(e, w)[:2]) / e.codes.size for e in (two, one)]
    total = per_kernel[0] * sum(KERNELS[:7]) + per_kernel[1] * sum(KERNELS[7:])
    assert 9 * w * sum(KERNELS) / total == pytest.approx(rate, abs=5e-4)
  weights = two.values.shape[2] * sum(KERNELS[:7]) + one.values.shape[2] * sum(KERNELS[7:])
  assert 9 * sum(KERNELS) / weights == pytest.approx(8.051, abs=5e-4)


def test_codes_of_all_patterns_of_a_size():
  assert [_bits.width_for(len(_of_size(n))) for n in range(1, 6)] == [4, 6, 7, 7, 7]


def test_pcnn_file_byte_by_byte():
  w = np.zeros((2, 2, 9), np.int8)
  table = (3, 5, 9, 17, 33, 65, 129, 257)
  for (o, i), code, values in zip(np.ndindex(2, 2), (5, 0, 7, 2), range(1, 9, 2), strict=False):
    w[o, i, [0, [1, 2, 3, 4, 5, 6, 7, 8][code]]] = values, values + 1
  data = pcnn.to_bytes(pcnn.encode(w, table=table))
  assert data == (
    b'FQPCNN'
    + bytes([1, 3, 8])  # version, int8, 8 bits a value
    + struct.pack('<BBBBHII', 3, 3, 2, 3, 8, 2, 2)
    + struct.pack('<8H', *table)
    + bytes([0xC5, 0x05])  # codes 5, 0, 7, 2 in 3 bits each
    + bytes([1, 2, 3, 4, 5, 6, 7, 8])
  )


# --- DARB ---


def _block_max(w, exponents):
  out = np.zeros_like(w)
  for r, e in enumerate(exponents):
    for start in range(0, w.shape[1], 1 << e):
      at = start + np.abs(w[r, start : start + (1 << e)]).argmax()
      out[r, at] = w[r, at]
  return out


def test_darb_worked_example():
  w = np.float32(
    [
      [0.9, -0.1, 0.4, 0.8, -0.7, 0.2, 0.6, -0.5],
      [0.05, 0.3, -0.02, 0.01, 0, -0.25, 0.04, 0.02],
      [-0.6, 0.5, 0.1, 0, 0.55, -0.45, 0.02, 0.3],
      [0.01, 0.02, -0.03, 0, 0.15, -0.01, 0, 0.02],
    ]
  )
  encoded = darb.encode(_block_max(w, (1, 3, 1, 3)), (1, 3, 1, 3))
  assert encoded.index.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 4]
  expected = np.float32([0.9, 0.8, -0.7, 0.6, 0.3, -0.6, 0.1, 0.55, 0.3, 0.15])
  assert (encoded.values == expected).all() and w.size / encoded.values.size == 3.2
  cost = darb.bits(encoded)
  assert cost.index == 14 + 12 and cost.values == 10 * 32
  row, column = darb.columns_of(encoded)
  assert column[row == 0].tolist() == [0, 3, 4, 6]
  data = darb.to_bytes(encoded)
  codes = 1 | 3 << 3 | 1 << 6 | 3 << 9
  places = bytes([0b0010, 1, 0b1000, 4])
  head = b'FQDARB' + bytes([1, 0, 32]) + struct.pack('<IIB', 4, 8, 1)
  assert data == head + codes.to_bytes(2, 'little') + places + expected.tobytes()


def test_darb_of_one_lstm_layer():
  rows, columns = 6000, 3000
  exponents = np.full(rows, 4)
  n = int(darb.row_lengths(columns, exponents).sum())
  assert n == 1_128_000 and rows * columns * 2 == 36e6
  assert columns / 188 == pytest.approx(15.957, abs=5e-4) and 188 * rows == n
  assert 1500 / darb.row_lengths(1500, np.array([6]))[0] == 62.5
  encoded = darb.Encoded((rows, columns), exponents, np.zeros(n, np.uint8), np.zeros(n, np.float16))
  cost = darb.bits(encoded)
  assert cost.index - 3 * rows == 4_512_000 == 0.564e6 * 8
  assert cost.values == 2.256e6 * 8
  assert len(darb.to_bytes(encoded)) == 18 + 2250 + 564_000 + 2_256_000


@pytest.mark.parametrize(
  ('size', 'overheads'),
  [(4, (12.5, 25, 50)), (8, (18.8, 37.5, 75)), (16, (25, 50, 100)), (32, (31.3, 62.5, 125))],
)
def test_darb_index_overhead(size, overheads):
  encoded = darb.encode(
    np.tile(np.arange(128) % size == 3, (4, 1)).astype(np.int16), size.bit_length() - 1
  )
  for w, percent in zip((16, 8, 4), overheads, strict=True):
    cost = darb.bits(encoded, w)
    assert 100 * (cost.index - 12) / cost.values == pytest.approx(percent, abs=0.0501)


@pytest.mark.parametrize('columns', [7, 8, 1500, 3000])
def test_darb_of_any_block_size(columns):
  w = np.random.default_rng(columns).normal(size=(3, columns)).astype(np.float32)
  for e in range(8):
    z = _block_max(w, [e] * 3)
    encoded = darb.encode(z, e)
    assert encoded.values.size == 3 * -(-columns // 2**e) == np.count_nonzero(z)
    assert cases.same_bits(darb.decode(darb.from_bytes(darb.to_bytes(encoded))), z)
    # A product needs no more than the places: column = block << e | place.
    x = np.linspace(-1, 1, columns).astype(np.float32)
    row, column = darb.columns_of(encoded)
    y = np.zeros(3, np.float32)
    np.add.at(y, row, encoded.values * x[column])
    exact = z.astype(np.float64) @ x
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(z.astype(np.float64)).dot(np.abs(x)).max()
    # What is found without being told is at least as large, up to one block for the whole row.
    assert (2 ** darb.largest_exponents(z != 0) >= min(2**e, columns)).all()


# --- Gap coding ---


def test_gap_coding_example():
  w = np.zeros(40, np.int8)
  w[[2, 3, 25, 39]] = 7
  for b, fillers, total in ((3, 3, 49), (4, 1, 40), (5, 0, 36)):
    encoded = relative.encode(w, gap_bits=b)
    assert encoded.values.size == 4 + fillers
    assert sum(relative.bits(encoded, 4)[:2]) == total
  assert relative.encode(w, value_bits=4).gap_bits == 5
  assert sum(bitmask.bits(bitmask.encode(w), 4)[:2]) == 56
  assert sum(dense.bits(dense.encode(w), 4)[:2]) == 160
  # Before it: no gap, exactly as many zeros as fit, one more.
  for zeros, gaps in ((0, [0]), (7, [7]), (8, [7, 0]), (15, [7, 7]), (16, [7, 7, 0])):
    w = np.zeros(zeros + 1, np.int8)
    w[-1] = 1
    encoded = relative.encode(w, gap_bits=3)
    assert encoded.gaps.tolist() == gaps and encoded.values.tolist() == [0] * (len(gaps) - 1) + [1]


LENET = [(500, 0.2, 3), (25_000, 0.08, 3), (400_000, 0.009, 2), (5_000, 0.07, 2)]


def test_gap_coding_of_lenet5():
  assert sum(n * d * w for n, d, w in LENET) / 8 == pytest.approx(1775)
  total, widths, real, rng = 0.0, [], 0, np.random.default_rng(0)
  for n, d, w in LENET:
    costs = [relative.expected_bits(d, w, b) for b in range(1, 17)]
    total += n * d * min(costs) / 8
    widths.append(1 + int(np.argmin(costs)))
    kept = rng.permutation(n) < n * d
    real += sum(relative.bits(relative.encode(kept.astype(np.int8), value_bits=w), w)[:2]) / 8
  assert widths == [4, 5, 8, 5] and round(total) == 7572
  assert real == pytest.approx(total, rel=0.02)
  ones = [dense.encode(np.ones(n, np.int8)) for n, _, _ in LENET]
  assert sum(dense.bits(e, 1).values for e in ones) / 8 == 53_812.5


@pytest.mark.parametrize(
  ('w', 'rates'),
  [
    (2, (1.4, 2.4, 4.0, 7.8, 13.9, 55)),
    (3, (1.8, 3.0, 5.3, 10.5, 18.9, 76)),
    (4, (2.1, 3.5, 6.3, 12.7, 23.1, 94)),
    (8, (2.6, 4.9, 9.0, 18.7, 34.7, 147)),
  ],
)
def test_structured_rate_of_the_same_size(w, rates):
  for r, rate in zip((4, 8, 16, 36, 71.2, 348), rates, strict=True):
    bits = min(relative.expected_bits(1 / r, w, b) for b in range(1, 17))
    assert r * w / bits == pytest.approx(rate, abs=0.053 if rate < 50 else 0.51)


def test_fillers_of_random_places():
  kept = np.random.default_rng(1).random(400_000) < 0.05
  for b in (3, 4, 5):
    entries = relative.encode(kept.astype(np.int8), gap_bits=b).gaps.size
    assert entries * (8 + b) / kept.sum() == pytest.approx(
      relative.expected_bits(0.05, 8, b), rel=0.01
    )


def test_unary_gaps_example():
  w = np.zeros(40, np.int8)
  w[[2, 3, 25, 39]] = 7  # gaps 2, 0, 21, 13
  for b, unary in ((0, 40), (3, 0 + 0 + 2 + 1 + 4), (4, 1 + 4), (5, 4)):
    found = rice.bits(rice.encode(w, low_bits=b), 4)
    assert (found.index, found.values) == (unary + 4 * b, 16)
  assert rice.encode(w).low_bits == 3
  data = rice.to_bytes(rice.encode(w, low_bits=4))
  # Behind the header: ends of the entries, a zero before the third as 21 is 16 + 5; what is left of the
  # gaps, 2, 0, 5, 13; values.
  assert data[23:] == bytes([0b11011, 0x02, 0xD5, 7, 7, 7, 7])


def test_low_bits_are_the_best_there_are():
  rng = np.random.default_rng(0)
  for shape in (0.1, 0.3, 1.0, 4.0):  # from a few huge gaps among small ones to gaps alike
    gaps = (rng.gamma(shape, 40 / shape, 2000)).astype(np.int64)
    w = np.zeros(int((gaps + 1).sum()) + 5, np.int8)
    w[np.cumsum(gaps + 1) - 1] = 1
    costs = [rice.bits(rice.encode(w, low_bits=b), 1).index for b in range(25)]
    assert rice.bits(rice.encode(w), 1).index == min(costs)


def test_unary_gaps_are_near_the_entropy_of_random_places():
  rng = np.random.default_rng(0)
  for density in (0.2, 0.05, 0.01, 0.002):
    kept = rng.random(400_000) < density
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    found = rice.bits(rice.encode(kept.astype(np.int8)), 3)
    assert 0.95 * entropy < found.index / kept.size < 1.03 * entropy
    # Fixed gaps pay for their fillers, too.
    fixed = relative.bits(relative.encode(kept.astype(np.int8), value_bits=3), 3)
    assert sum(found[:2]) < 0.96 * sum(fixed[:2])


# --- Patterns with connectivity ---


def _kept_kernels(outputs, inputs, keep, size=8, seed=0):
  table = _of_size(4)[:size]
  rng = np.random.default_rng(seed)
  on = cases.on_patterns(rng, outputs, inputs, 9, table)
  on[..., 0] |= ~on.any(2)  # no kernel is empty by chance; every pattern of this table has tap 0
  flat = on.reshape(-1, 9)
  flat[rng.permutation(len(flat))[round(keep * len(flat)) :]] = False
  return on.astype(np.int8), table


@pytest.mark.parametrize(('w', 'rate'), [(32, 7.61), (8, 6.64)])
def test_patterns_at_rest(w, rate):
  kernels, table = _kept_kernels(64, 64, 9 / 32)
  encoded = patterns.encode(kernels, table)
  g, kept = 64 * 64, 64 * 64 * 9 // 32
  cost = patterns.bits(encoded, w)
  assert encoded.codes.size == kept
  assert cost.values + cost.index == g + kept * (3 + 4 * w)
  assert 9 * w * g / (cost.values + cost.index) == pytest.approx(rate, abs=0.005)
  assert cost.index / kept == pytest.approx(3.56 + 3, abs=0.005)


def _fkw_index(n, f, p, index_bits):
  return index_bits * n + 32 * (f + 1) + 16 * f + 16 * f * (p + 1)


def test_fkw_and_csr_cost_what_the_formulas_say():
  kernels, table = _kept_kernels(24, 40, 0.3)
  n = int(kernels.any(2).sum())
  for form, width in (('u16', 16), ('u8', 8)):
    cost = fkw.bits(fkw.encode(kernels, table, form=form), 32)
    assert (cost.values, cost.index) == (4 * 32 * n, _fkw_index(n, 24, 8, width))
  live = kernels.reshape(24, -1)
  cost = csr.bits(csr.encode(live, index_bits=32), 32)
  assert cost.index == 32 * np.count_nonzero(live) + 32 * 25


@pytest.mark.parametrize(
  ('rate', 'extra', 'whole', 'share'),
  [
    (8, (86.2, 92.4), (43.1, 46.2), 13.9),
    (12, (85.5, 91.7), (42.8, 45.9), 14.6),
    (18, (84.5, 90.7), (42.3, 45.5), 15.6),
  ],
)
def test_fkw_of_vgg16_against_csr(rate, extra, whole, share):
  kept = [KERNELS[0], *(round(2.25 / rate * k) for k in KERNELS[1:])]
  weights = sum(4 * 32 * n for n in kept)
  by_csr = sum(32 * 4 * n + 32 * (o + 1) for n, (_, o) in zip(kept, VGG, strict=True))
  for k, width in enumerate((16, 8)):
    ours = sum(_fkw_index(n, o, 8, width) for n, (_, o) in zip(kept, VGG, strict=True))
    assert 100 * (1 - ours / by_csr) == pytest.approx(extra[k], abs=0.051)
    assert 100 * (1 - (ours + weights) / (by_csr + weights)) == pytest.approx(whole[k], abs=0.051)
    if width == 16:
      assert 100 * ours / weights == pytest.approx(share, abs=0.051)


# --- The rest ---


def test_two_of_four_costs_two_bits_a_value():
  encoded = nm.encode(np.tile(np.int8([1, 0, 2, 0]), (4, 8)), 2, 4)
  assert nm.bits(encoded)[:2] == (4 * 16 * 8, 4 * 16 * 2)


def test_blocks_of_four_filters_and_four_inputs():
  w = np.zeros((8, 64), np.int8)
  w[4:, 8:12] = np.arange(16).reshape(4, 4) + 1
  encoded = blocks.encode(w, 4, 4)
  # Four inputs of a filter are one 32-bit word, four filters are sixteen bytes in a row.
  assert encoded.values.tobytes() == bytes(range(1, 17)) and encoded.columns.tolist() == [2]
  assert encoded.pointers.tolist() == [0, 0, 1]
  assert blocks.bits(encoded)[:2] == (128, 3 * 32 + 4)
