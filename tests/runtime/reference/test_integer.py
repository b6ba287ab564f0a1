"""The integer arithmetic against loops over int64, and by hand."""

import itertools

import numpy as np
import pytest

from fqjax.runtime import reference
from fqjax.runtime.graph import Graph, Node, Tensor


def node(op, **attributes):
  return Node(op, (), ('y',), attributes, 'net/layer')


def run(op, *arrays, **attributes):
  [out] = reference.run_node(node(op, **attributes), arrays)
  assert out.dtype == np.uint8
  return out


def stored(value, zero, low, high):
  """One float32 product to uint8, with Python's own rounding (half to even)."""
  return min(max(round(float(value)) + zero, low), high)


def slow_requantize(acc, m, zero, low, high):
  flat = [
    stored(np.float32(a) * np.float32(m), zero, low, high)
    for a, m in zip(acc.ravel(), m.ravel(), strict=True)
  ]
  return np.array(flat, np.uint8).reshape(acc.shape)


def slow_conv(x, w, bias, input_zero, strides, padding, dilation, input_dilation, groups):
  """NHWC, HWIO, one multiplication at a time; padding holds the zero point."""
  n, h, wd, c = x.shape
  wide = np.full(
    (n, (h - 1) * input_dilation[0] + 1, (wd - 1) * input_dilation[1] + 1, c), input_zero, np.int64
  )
  wide[:, :: input_dilation[0], :: input_dilation[1]] = x
  wide = np.pad(wide, [(0, 0), *padding, (0, 0)], constant_values=input_zero)
  kh, kw, per, o = w.shape
  oh = (wide.shape[1] - (kh - 1) * dilation[0] - 1) // strides[0] + 1
  ow = (wide.shape[2] - (kw - 1) * dilation[1] - 1) // strides[1] + 1
  out = np.zeros((n, oh, ow, o), np.int64)
  for b, i, j, k in itertools.product(range(n), range(oh), range(ow), range(o)):
    group = k // (o // groups)
    total = int(bias[k])
    for u, v, q in itertools.product(range(kh), range(kw), range(per)):
      value = wide[
        b, i * strides[0] + u * dilation[0], j * strides[1] + v * dilation[1], group * per + q
      ]
      total += int(w[u, v, q, k]) * (int(value) - input_zero)
    out[b, i, j, k] = total
  return out


CONVS = {
  'plain': dict(),
  'strided': dict(strides=(2, 1), padding=((0, 1), (1, 0))),
  'dilated': dict(dilation=(2, 1), padding=((2, 2), (1, 1))),
  'grouped': dict(groups=2, channels=4, outputs=6),
  'depthwise': dict(groups=4, channels=4, outputs=4, padding=((1, 1), (1, 1))),
  'depthwise, two outputs each': dict(groups=3, channels=3, outputs=6, strides=(2, 2)),
  'transposed': dict(input_dilation=(2, 2), padding=((1, 2), (2, 1))),
  'pointwise': dict(size=(1, 1), channels=5),
}


@pytest.mark.parametrize('name', CONVS)
def test_convolution_equals_a_loop(name):
  case = dict(CONVS[name])
  channels, outputs = case.pop('channels', 3), case.pop('outputs', 4)
  taps, groups = case.pop('size', (3, 2)), case.pop('groups', 1)
  window = {'strides': (1, 1), 'padding': ((0, 0), (0, 0)), 'dilation': (1, 1)}
  window |= {'input_dilation': (1, 1), **case}
  rng = np.random.default_rng(len(name))
  x = rng.integers(0, 256, (2, 5, 6, channels)).astype(np.uint8)
  w = rng.integers(-127, 128, (*taps, channels // groups, outputs)).astype(np.int8)
  bias = rng.integers(-5000, 5000, outputs).astype(np.int32)
  m = rng.uniform(1e-3, 3e-3, outputs).astype(np.float32)
  limits = {'input_zero': 77, 'zero': 120, 'low': 100, 'high': 250}
  acc = slow_conv(x, w, bias, 77, *window.values(), groups)
  want = slow_requantize(acc, np.broadcast_to(m, acc.shape), 120, 100, 250)
  got = run(
    'qconv', x, w, bias, m, **window, groups=groups, layout=('NHWC', 'HWIO', 'NHWC'), **limits
  )
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) > 20 and want.min() == 100
  other = run(
    'qconv', x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), bias, m,
    **window, groups=groups, layout=('NCHW', 'OIHW', 'NCHW'), **limits,
  )  # fmt: skip
  np.testing.assert_array_equal(other, want.transpose(0, 3, 1, 2))


@pytest.mark.parametrize('depth', [300, 9000])
def test_sums_are_exact_beyond_float32(depth):
  """Up to 2^24 float32 counts, beyond it skips odd numbers; sums here are odd and reach 2^28."""
  rng = np.random.default_rng(depth)
  x = rng.integers(250, 256, (3, depth)).astype(np.uint8)
  w = rng.integers(100, 128, (depth, 4)).astype(np.int8)
  bias = np.zeros(4, np.int32)
  acc = x.astype(np.int64) @ w.astype(np.int64)
  # A bias that leaves the last bits: only an exact sum survives it.
  bias = (-(acc[0] // 256) * 256).astype(np.int32)
  acc = acc + bias
  got = run('qdot', x, w, bias, np.full(4, 1, np.float32), input_zero=0, zero=0, low=0, high=255)
  np.testing.assert_array_equal(got, np.clip(acc, 0, 255))
  assert (depth < 1000) == (int((x.astype(np.int64) @ w).max()) < 1 << 24)


def test_halves_go_to_even_and_clipping_comes_before_integers():
  acc = np.array([1, 3, 5, 7, -1, -3, 2**31 - 1, -(2**31)], np.int32)
  got = reference.requantize(acc, np.float32(0.5), 10, 0, 255)
  assert got.tolist() == [10, 12, 12, 14, 10, 8, 255, 0]
  # relu at a zero point of 10, relu6 at 14
  assert reference.requantize(acc, np.float32(0.5), 10, 10, 14).tolist() == [
    10,
    12,
    12,
    14,
    10,
    10,
    14,
    10,
  ]
  # 2^24 + 1 is no float32: the sum is rounded to even before it is multiplied.
  assert reference.requantize(np.int32([2**24 + 1]), np.float32(2**-18), 0, 0, 255).tolist() == [64]
  assert reference.quantize(np.float32([0.25, 0.75, 1.25, -0.25, 1e30]), 0.5, 7).tolist() == [
    7,
    9,
    9,
    7,
    255,
  ]


def test_products_are_float32():
  """A multiplier in double precision would round these to the other side."""
  acc = np.arange(1, 60000, 7, dtype=np.int32)
  m = np.float32(1 / 300)
  single = reference.requantize(acc, m, 0, 0, 255)
  halves = np.abs(acc * float(m) % 1 - 0.5) < 1e-6
  want = [stored(np.float32(a) * m, 0, 0, 255) for a in acc]
  np.testing.assert_array_equal(single, want)
  assert halves.any()


def test_add_of_different_scales():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, (2, 4, 50)).astype(np.uint8)
  got = run(
    'qadd', a, b, input_zeros=(3, 200), multipliers=(0.5, -1.25), zero=100, low=90, high=240
  )
  want = [
    stored(np.float32(np.float32(int(p) - 3) * np.float32(0.5)) + np.float32(int(q) - 200) * np.float32(-1.25), 100, 90, 240)
    for p, q in zip(a.ravel(), b.ravel(), strict=True)
  ]  # fmt: skip
  np.testing.assert_array_equal(got.ravel(), want)
  # By hand: (4 - 3) / 2 + 0 is a half, and goes to the even 0.
  hand = run(
    'qadd',
    np.uint8([4, 6]),
    np.uint8([200, 200]),
    input_zeros=(3, 200),
    multipliers=(0.5, 1.0),
    zero=100,
    low=0,
    high=255,
  )
  assert hand.tolist() == [100, 102]


def test_concat_brings_parts_to_one_scale():
  a, b = np.uint8([[5, 6, 7]]), np.uint8([[0, 255]])
  got = run(
    'qconcat', a, b, axis=1, input_zeros=(5, 10), multipliers=(1.0, 0.5), zero=20, low=0, high=140
  )
  assert got.tolist() == [[20, 21, 22, 15, 140]]


def test_means_and_average_pools():
  rng = np.random.default_rng(1)
  x = rng.integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
  m = np.float32(0.9 / 30)
  got = run('qsum', x, m, axes=(1, 2), input_zero=9, zero=4, low=0, high=255)
  acc = (x.astype(np.int64) - 9).sum((1, 2))
  np.testing.assert_array_equal(got, slow_requantize(acc, np.full(acc.shape, m), 4, 0, 255))
  window = {'window': (1, 2, 3, 1), 'strides': (1, 2, 1, 1), 'dilation': (1, 2, 1, 1)}
  padding = ((0, 0), (1, 0), (0, 2), (0, 0))
  factor = rng.uniform(0.1, 0.4, (1, 2, 6, 1)).astype(np.float32)
  got = run(
    'qpool_sum', x, factor, **window, padding=padding, input_zero=9, zero=4, low=0, high=255
  )
  wide = np.pad(x.astype(np.int64), padding, constant_values=9) - 9
  acc = np.zeros((2, 2, 6, 3), np.int64)
  for i, j in itertools.product(range(2), range(6)):
    acc[:, i, j] = wide[:, 2 * i : 2 * i + 3 : 2, j : j + 3].sum((1, 2))
  want = slow_requantize(acc, np.broadcast_to(factor, acc.shape), 4, 0, 255)
  np.testing.assert_array_equal(got, want)


def test_tables_and_the_way_out():
  table = np.arange(255, -1, -1).astype(np.uint8)
  assert run('qtable', np.uint8([[0, 255], [7, 1]]), table).tolist() == [[255, 0], [248, 254]]
  [back] = reference.run_node(node('dequantize', scale=0.25, zero=128), [np.uint8([0, 128, 132])])
  assert back.dtype == np.float32 and back.tolist() == [-32.0, 0.0, 1.0]


def test_bounds_hold_for_the_worst_input():
  rng = np.random.default_rng(2)
  w = rng.integers(-127, 128, (7, 3)).astype(np.int8)
  bias = np.int32([50, -900, 0])
  low, high = reference.accumulator_bounds(w, bias, 100)
  for c in range(3):
    terms = [sorted((int(q) * -100, int(q) * 155)) for q in w[:, c]]
    assert low[c] == sum(t[0] for t in terms) + min(0, bias[c])
    assert high[c] == sum(t[1] for t in terms) + max(0, bias[c])


def test_sums_that_could_leave_int32_are_refused():
  depth = 2**31 // (127 * 255) + 1
  x, w = np.zeros((1, depth), np.uint8), np.full((depth, 1), 127, np.int8)
  limits = {'input_zero': 0, 'zero': 0, 'low': 0, 'high': 255}
  with pytest.raises(ValueError, match=r'channel 0 can leave int32 .*fewer inputs'):
    run('qdot', x, w, np.int32([0]), np.float32([1]), **limits)
  run('qdot', x[:, 1:], w[1:], np.int32([0]), np.float32([1]), **limits)
  with pytest.raises(ValueError, match='leave int32'):
    run('qdot', x[:, 1:], w[1:], np.int32([50000]), np.float32([1]), **limits)
  big = np.zeros((1, 8421505 + 1), np.uint8)
  with pytest.raises(ValueError, match='a sum of 8421506 values'):
    run('qsum', big, np.float32(1), axes=(1,), input_zero=0, zero=0, low=0, high=255)


def test_what_is_wrong_is_said_with_its_place():
  x, y = Tensor('x', ('n', 2), 'float32'), Tensor('y', ('n', 2), 'uint8')
  step = Node('quantize', ('x',), ('y',), {'scale': 0.5, 'zero': 128}, 'net/first')
  graph = Graph(('x',), (), {}, (step,), ('y',), {'x': x, 'y': y})
  with pytest.raises(ValueError, match=r'node 0, quantize \(net/first\): NaN among the 2'):
    reference.run(graph, [np.float32([[np.nan, 1]])])
  with pytest.raises(ValueError, match=r'the graph takes x: float32\[n, 2\], got float64\[1, 2\]'):
    reference.run(graph, [np.zeros((1, 2))])
