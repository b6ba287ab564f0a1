"""Filter-kernel reorder and the FKW arrays: both published examples, and a plain search."""

import numpy as np
import pytest

from fqjax.runtime.codecs import fkw
from tests.runtime.codecs import cases

PLACES = {'1': (0b0011, 1), '2': (0b1100, 2)}


def _kernels(*filters):
  """Digits are patterns, '.' a removed kernel; values tell filter and input."""
  out = np.zeros((len(filters), len(filters[0]), 4), np.int16)
  for o, text in enumerate(filters):
    for i, pattern in enumerate(text):
      if pattern != '.':
        out[o, i, {'1': [0, 1], '2': [2, 3]}[pattern]] = 100 * o + 10 * i + 1, 100 * o + 10 * i + 2
  return out


def _flat(text):
  return [int(x) for x in text.split()]


@pytest.mark.parametrize(
  ('filters', 'offset', 'reorder', 'index', 'stride'),
  [
    (
      ['.2.1', '2.1.', '.222', '.2.2'],
      '0 2 4 6 9', '0 1 3 2', '3 1 2 0 1 3 1 2 3', '0 1 2 0 1 2 0 0 2 0 0 3',
    ),
    (
      ['.2.1..', '1.2.2.', '.222.1', '.2.1..', '1.2.1.', '121.2.'],
      '0 2 4 7 10 14 18', '0 3 1 4 2 5', '3 1 3 1 0 2 4 0 4 2 5 1 2 3 0 2 1 4',
      '0 1 2 0 1 2 0 1 3 0 2 3 0 1 4 0 2 4',
    ),
  ],
)  # fmt: skip
def test_published_examples(filters, offset, reorder, index, stride):
  kernels = _kernels(*filters)
  encoded = fkw.encode(kernels, table=(0b0011, 0b1100))
  assert encoded.offset.tolist() == _flat(offset)
  assert encoded.reorder.tolist() == _flat(reorder)
  assert encoded.index.tolist() == _flat(index)
  assert encoded.stride.ravel().tolist() == _flat(stride)
  # Values say where they come from, in the order of reorder and index, taps ascending.
  filter_of = np.repeat(encoded.reorder, np.diff(encoded.offset))
  assert (encoded.values == (100 * filter_of + 10 * encoded.index)[:, None] + [1, 2]).all()
  assert (fkw.decode(encoded) == kernels).all()


@pytest.mark.parametrize('seed', range(6))
def test_arrays_keep_what_a_loop_over_them_relies_on(seed):
  kernels, mask, settings = cases.make('fkw', seed)
  e = fkw.encode(kernels, mask=mask, **settings)
  f, p, n = len(e.reorder), len(e.table), len(e.index)
  assert (np.diff(e.offset) >= 0).all() and e.offset[0] == 0 and e.offset[f] == n
  assert (np.diff(np.diff(e.offset)) >= 0).all()  # filters of equal length lie together
  assert sorted(e.reorder) == list(range(f))
  assert (e.stride[:, 0] == 0).all() and (e.stride[:, p] == np.diff(e.offset)).all()
  rebuilt = np.zeros_like(kernels)
  for at in range(f):
    for q in range(p):
      run = range(e.offset[at] + e.stride[at, q], e.offset[at] + e.stride[at, q + 1])
      assert (np.diff(e.index[list(run)]) > 0).all() and (e.index[list(run)] < e.shape[1]).all()
      taps = [t for t in range(e.shape[2]) if int(e.table[q]) >> t & 1]
      for k in run:
        rebuilt[e.reorder[at], e.index[k], taps] = e.values[k]
  assert cases.same_bits(rebuilt, kernels)


def _chain(codes, similarity):
  """The order by a plain loop over filters."""
  rows = [[int(c) for c in row] for row in codes]

  def alike(a, b):
    if similarity == 'runs':
      a, b = (sorted(c for c in x if c >= 0) for x in (a, b))
    return sum(x == y and x >= 0 for x, y in zip(a, b, strict=True))

  length = lambda o: sum(c >= 0 for c in rows[o])
  order = []
  for n in sorted({length(o) for o in range(len(rows))}):
    left = [o for o in range(len(rows)) if length(o) == n]
    order.append(left.pop(0))
    while left:
      best = max(left, key=lambda o: (alike(rows[o], rows[order[-1]]), -o))
      left.remove(best)
      order.append(best)
  return order


@pytest.mark.parametrize('similarity', ['runs', 'inputs'])
def test_filter_order_against_a_plain_loop(similarity):
  rng = np.random.default_rng(0)
  for _ in range(20):
    f, c = rng.integers(1, 30), rng.integers(1, 8)
    codes = np.where(rng.random((f, c)) < 0.5, rng.integers(0, 3, (f, c)), -1)
    assert fkw.filter_order(codes, similarity).tolist() == _chain(codes, similarity)


def test_filters_that_load_alike_come_together():
  codes = np.array([[1, 0, -1], [0, 1, -1], [1, -1, 0]])  # patterns alike: all; inputs alike: 0, 2
  assert fkw.filter_order(codes, 'runs').tolist() == [0, 1, 2]
  assert fkw.filter_order(codes, 'inputs').tolist() == [0, 2, 1]


def test_reorder_balances_the_load():
  rng = np.random.default_rng(0)
  scale = np.exp(rng.normal(0, 0.5, (256, 1)))
  energy = (rng.normal(size=(256, 256, 9)) ** 2).sum(2) * scale**2
  keep = int(65536 / 3.6)
  codes = np.where(energy >= np.sort(energy.ravel())[-keep], 0, -1)
  lengths = (codes >= 0).sum(1)
  ordered = lengths[fkw.filter_order(codes)]
  waste = lambda x, g: (x.reshape(-1, g).max(1) * g).sum() / keep
  for group, before, after in ((4, 2.25, 1.02), (8, 3.01, 1.05), (16, 3.33, 1.10)):
    assert waste(lengths, group) == pytest.approx(before, abs=0.0051)
    assert waste(ordered, group) == pytest.approx(after, abs=0.0051)
  slowest = lambda parts: parts.sum(1).max() * 8 / keep
  assert slowest(lengths.reshape(8, -1)) == pytest.approx(1.33, abs=0.0051)
  assert slowest(ordered.reshape(8, -1)) == pytest.approx(3.38, abs=0.0051)
  assert slowest(ordered.reshape(-1, 8).T) == pytest.approx(1.05, abs=0.0051)


def test_delta_index_crosses_bytes():
  kernels = np.zeros((1, 2000, 1), np.int8)
  inputs = [0, 1, 255, 256, 511, 766, 1022, 1999]  # steps of 0, 0, 253, 0, 254, 254, 255, 976
  kernels[0, inputs] = 1
  encoded = fkw.encode(kernels)
  assert encoded.form == 'delta' and encoded.index.tolist() == inputs
  deltas = bytes([0, 0, 253, 0, 254, 254, 255, 0, 255, 255, 255, 976 - 765])
  data = fkw.to_bytes(encoded)
  assert data.endswith(deltas + bytes([1] * 8))
  assert fkw.from_bytes(data).index.tolist() == inputs
