"""Random arrays of the structure each format is made for."""

import itertools

import numpy as np

DTYPES = ('float32', 'float16', 'int8', 'uint16', 'float64', 'int32')  # uint16: bfloat16's raw bits
CORNERS = (27, 54, 216, 432)


def raw(array):
  """Bits of the entries, so that NaN equals itself and -0.0 is not 0.0."""
  return np.ascontiguousarray(array).view(f'u{array.dtype.itemsize}')


def same_bits(a, b):
  return a.dtype == b.dtype and a.shape == b.shape and (raw(a) == raw(b)).all()


def on_patterns(rng, o, i, taps, table, keep=1.0):
  """Kernels on randomly chosen patterns, some removed, some not using all their taps."""
  patterns = rng.choice(np.array(table, np.uint64), (o, i))
  on = (patterns[..., None] >> np.arange(taps, dtype=np.uint64) & np.uint64(1)).astype(bool)
  on &= rng.random((o, i, 1)) < keep
  return on & (rng.random(on.shape) < rng.choice([0.7, 1.0]))


def _capped(rng, groups, counts):
  """At most counts[...] places of every group [..., places]."""
  ranks = rng.random(groups).argsort(-1).argsort(-1)
  return (ranks < counts[..., None]) & (rng.random(groups) < 0.9)


def _darb(rng):
  r, c = int(rng.integers(1, 9)), int(rng.choice([1, 7, 8, 130, 1500, 3000]))
  exponents = rng.integers(0, 8, r)
  mask = np.zeros((r, c), bool)
  for row, e in enumerate(exponents):
    for start in range(0, c, 1 << e):
      mask[row, start + rng.integers(min(1 << e, c - start))] = rng.random() < 0.9
  return mask, {'exponents': exponents}


def _bank(rng):
  r, c, size = int(rng.integers(1, 9)), int(rng.integers(1, 90)), int(rng.choice([1, 5, 16, 64]))
  counts = rng.integers(0, size + 1, r)
  banks = -(-c // size)
  per_bank = np.broadcast_to(counts[:, None], (r, banks))
  return _capped(rng, (r, banks, size), per_bank).reshape(r, -1)[:, :c], {
    'size': size,
    'counts': counts,
  }


def _nm(rng):
  n, m = [(1, 1), (1, 4), (2, 4), (4, 8), (3, 5), (16, 300)][rng.integers(6)]
  r, groups = rng.integers(1, 7, 2)
  mask = _capped(rng, (r, groups, m), np.full((r, groups), n))
  return mask.reshape(r, -1), {'n': n, 'm': m}


def _blocks(rng):
  r, c = rng.integers(1, 30, 2)
  rows, columns = [(1, 4), (2, 4), (4, 4), (3, 5), (1, 1), (r, c)][rng.integers(6)]
  rows, columns = int(min(rows, r)), int(min(columns, c))
  kept = rng.random((-(-r // rows), -(-c // columns))) < rng.random()
  mask = np.kron(kept, np.ones((rows, columns), bool))[:r, :c].astype(bool)
  return mask & (rng.random((r, c)) < 0.8), {'rows': rows, 'columns': columns}


def _punched(rng):
  o, i, m = int(rng.integers(1, 20)), int(rng.integers(1, 14)), int(rng.choice([1, 9]))
  rows, columns = [(8, 4), (3, 2), (1, 1)][rng.integers(3)]
  rows, columns = min(rows, o), min(columns, i)
  kept = rng.random((-(-o // rows), -(-i // columns), m)) < 0.4
  return kept.repeat(rows, 0).repeat(columns, 1)[:o, :i], {'rows': rows, 'columns': columns}


def _slices(rng):
  shape = tuple(rng.integers(1, 8, rng.integers(1, 5)))
  axes = tuple(np.flatnonzero(rng.random(len(shape)) < 0.6).tolist())
  mask = np.ones(shape, bool)
  for axis in axes:
    keep = rng.random(shape[axis]) < 0.6
    mask &= np.expand_dims(keep, [a for a in range(len(shape)) if a != axis])
  return mask, {'axes': axes}


def _table(rng):
  taps = int(rng.choice([1, 4, 9, 25, 49, 64]))
  n = int(rng.integers(1, min(taps, 4) + 1))
  if taps <= 9:
    table = [sum(1 << t for t in c) for c in itertools.combinations(range(taps), n)]
  else:
    table = [sum(1 << int(t) for t in rng.choice(taps, n, replace=False)) for _ in range(12)]
  table = list(dict.fromkeys(table))
  return taps, [table[k] for k in rng.permutation(len(table))[: rng.integers(1, 17)]]


def _patterns(keep):
  def make(rng):
    taps, table = _table(rng)
    o, i = rng.integers(1, 13, 2)
    return on_patterns(rng, o, i, taps, table, keep), {'table': table}

  return make


def _fkw(rng):
  mask, settings = _patterns(rng.choice([0.0, 0.3, 0.8]))(rng)
  if rng.random() < 0.3:  # more inputs than a byte counts, runs with wide steps
    mask = mask[:, np.minimum(rng.integers(0, 600, 700), mask.shape[1] - 1)]
    mask &= rng.random((*mask.shape[:2], 1)) < 0.02
  forms = ('u16', 'delta') if mask.shape[1] > 256 else ('u16', 'delta', 'u8')
  return mask, settings | {'form': rng.choice([None, *forms])}


def _any(settings):
  def make(rng):
    shape = tuple(rng.integers(1, 9, rng.integers(1, 5)))
    return rng.random(shape) < rng.choice([0.0, 0.02, 0.3, 1.0]), settings(rng)

  return make


def _csr(rng):
  shape = rng.integers(1, 40, 2)
  return rng.random(shape) < rng.choice([0.0, 0.05, 0.5, 1.0]), {
    'index_bits': rng.choice([None, 8, 16, 32])
  }


MAKERS = {
  'dense': _any(lambda rng: {}),
  'bitmask': _any(lambda rng: {}),
  'csr': _csr,
  'relative': _any(lambda rng: {'gap_bits': rng.choice([None, 0, 1, 3, 5, 16])}),
  'rice': _any(lambda rng: {'low_bits': rng.choice([None, 0, 1, 3, 24])}),
  'nm': _nm,
  'blocks': _blocks,
  'slices': _slices,
  'punched': _punched,
  'bank': _bank,
  'darb': _darb,
  'pcnn': _patterns(1.0),
  'patterns': _patterns(0.4),
  'fkw': _fkw,
}


def make(name, seed, dtype='float32'):
  """An array of random bits (every NaN, -0.0, subnormals) on a random mask of the structure.

  Returns:
    array, mask, settings of encode.
  """
  rng = np.random.default_rng([seed, list(MAKERS).index(name)])
  mask, settings = MAKERS[name](rng)
  dtype = np.dtype(dtype)
  bits = rng.integers(0, 256, (*mask.shape, dtype.itemsize), np.uint8)
  special = rng.random(mask.shape)
  bits[special < 0.1] = 0  # a live zero
  bits[special > 0.9] = 0
  bits[special > 0.9, -1] = 128  # -0.0, or the smallest integer
  array = bits.view(dtype)[..., 0]
  if name == 'dense':
    return array, None, settings
  array = array.copy()
  array[~mask] = 0
  return array, mask, settings
