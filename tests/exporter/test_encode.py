"""Arrays are stored by their values and come back bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from fqjax.exporter import _encode, encode
from fqjax.runtime import _file, _stored

RNG = np.random.default_rng(0)


def back(stored):
  entries, sections = _stored.to_sections([stored])
  data = _file.pack({'arrays': entries}, sections)
  [array] = _stored.read_arrays(_file.File(np.frombuffer(data, np.uint8))).values()
  return array


def same(array, layout=''):
  stored = encode('w', array, layout)
  got = back(stored)
  bits = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
  assert got.dtype == bits.dtype
  assert got.shape == bits.shape
  assert got.tobytes() == bits.tobytes()
  assert got.flags.c_contiguous
  return stored


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def sparse(array, keep):
  return np.where(RNG.random(array.shape) < keep, array, np.zeros_like(array))


@pytest.mark.parametrize(
  'dtype', ['float32', 'float16', 'float64', 'int8', 'uint8', 'int32', 'int64', 'bool']
)
@pytest.mark.parametrize(
  ('shape', 'layout'),
  [((), ''), ((0, 3), ''), ((5,), ''), ((40,), ''), ((16, 24), 'IO'), ((3, 3, 8, 12), 'HWIO'),
   ((12, 8, 3, 3), 'OIHW'), ((2, 3, 4, 5, 6), ''), ((4, 6, 8), 'IOO')],
)  # fmt: skip
def test_any_array_comes_back(dtype, shape, layout):
  array = (100 * RNG.normal(size=shape)).astype(dtype)
  same(array, layout)
  same(sparse(array, 0.2), layout)


@pytest.mark.parametrize(
  ('name', 'make', 'layout', 'form', 'most'),
  [
    ('dense', lambda: normal(64, 64), 'IO', 'raw', 4 * 4096),
    ('upper', lambda: normal(64, 64).astype(ml_dtypes.bfloat16).astype(np.float32), 'IO', 'dense',
     2 * 4096 + 40),
    ('unstructured', lambda: sparse(normal(64, 64), 0.5), 'IO', 'bitmask', 2 * 4096 + 1000),
    ('few', lambda: sparse(normal(200, 200), 0.01), 'IO', 'rice', 2300),
    ('filters', lambda: np.where(np.arange(32) % 4 == 0, normal(3, 3, 8, 32), np.float32(0)), 'HWIO',
     'slices', 2400),
    ('binary', lambda: np.sign(normal(64, 64)) * np.float32(0.3), 'IO', 'dense', 560),
    ('ternary', lambda: np.clip(np.rint(normal(64, 64)), -1, 1) * np.float32(0.3), 'IO', 'dense',
     1070),
  ],
)  # fmt: skip
def test_the_form_follows_the_values(name, make, layout, form, most):
  stored = same(make(), layout)
  assert stored.form in form if isinstance(form, tuple) else stored.form == form
  assert stored.bytes <= most, name


def test_sixteen_levels_take_four_bits():
  levels = normal(16)
  w = levels[RNG.integers(0, 16, (3, 3, 32, 32))]
  stored = same(w, 'HWIO')
  assert stored.levels is not None and stored.levels.shape == (16,)
  assert stored.bytes <= 9 * 1024 // 2 + 64 + 40


def test_pruned_levels_take_the_bits_that_tell_them_apart():
  # Eight levels other than zero: three bits each, zeros are not among them.
  w = sparse(normal(8)[RNG.integers(0, 8, (200, 500))], 0.4)
  stored = same(w, 'IO')
  assert stored.shift
  assert stored.bits.values == 3 * np.count_nonzero(w)


def test_a_thousand_weights_of_four_hundred_thousand():
  w = np.zeros(430_500, np.float32)
  w[RNG.choice(w.size, 1237, replace=False)] = normal(8)[RNG.integers(0, 8, 1237)]
  stored = same(w.reshape(-1, 500), 'IO')
  assert stored.kept == 1237
  # ten bits to say where, three or four what
  assert stored.bytes < 2500


@pytest.mark.parametrize(('bits', 'most'), [(8, 127), (4, 7), (2, 1)])
def test_steps_of_a_scale_per_channel(bits, most):
  scales = np.abs(normal(24)) + np.float32(0.01)
  steps = RNG.integers(-most, most + 1, (3, 3, 16, 24)).astype(np.float32)
  stored = same(steps * scales, 'HWIO')
  assert stored.scales is not None
  assert stored.bytes <= 9 * 16 * 24 * bits // 8 + 4 * 24 + 40


def test_levels_of_their_own_for_every_channel():
  levels = normal(24, 4)
  w = levels[np.arange(24), RNG.integers(0, 4, (3, 3, 32, 24))]
  stored = same(w, 'HWIO')
  assert stored.levels is not None and stored.levels.shape == (24, 4)
  assert stored.bytes <= 9 * 32 * 24 // 4 + 24 * 16 + 40


def test_signs_of_zero_and_payloads_stay():
  w = np.zeros((64, 64), np.float32)
  w[0, 0], w[1, 1], w[2, 2] = -0.0, np.nan, np.inf
  w.view(np.uint32)[3, 3] = 0x7FC12345
  same(w, 'IO')
  steps = np.full((64, 64), np.float32(0.5))
  steps[0, 0] = -0.0
  same(steps, 'IO')


def test_quantized_is_recognized():
  assert _encode.has_levels(normal(8)[RNG.integers(0, 8, (64, 64))], 'IO')
  assert not _encode.has_levels(normal(64, 64), 'IO')
  assert not _encode.has_levels(sparse(normal(64, 64), 0.1), 'IO')
  # One weight is a step of itself, which says nothing.
  assert not _encode.has_levels(normal(1, 64), 'IO')
  assert not _encode.has_levels(normal(1, 1, 1, 64), 'HWIO')


def test_byte_orders_are_ours():
  big = normal(8, 8).astype('>f4')
  stored = encode('w', big)
  assert stored.dtype == 'float32'
  np.testing.assert_array_equal(back(stored), big)


def tamper(stored, **changes):
  entries, sections = _stored.to_sections([stored])
  entries[0] |= changes
  data = _file.pack({'arrays': entries}, sections)
  return lambda: _stored.read_arrays(_file.File(np.frombuffer(data, np.uint8)))


LEVELS = normal(16)[np.arange(4096).reshape(64, 64) % 16]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'shape': [64, 65]}, 'elements'),
    ({'shape': [-1, 64]}, 'not a list of sizes'),
    ({'shape': [1] * 40}, '40 axes'),
    ({'shape': [1 << 20, 1 << 20]}, 'more elements than its size justifies'),
    ({'dtype': 'complex64'}, 'unknown dtype'),
    ({'form': 'pickle'}, 'unknown form'),
    ({'form': 'raw'}, 'takes? no table'),
    ({'at': 99}, 'names section 99'),
    ({'at': True}, 'names section True'),
    ({'order': [0, 0]}, 'does not order'),
    ({'order': [1, True]}, 'does not order'),
    ({'axis': 5}, 'axis 5 is not'),
    ({'axis': 0}, 'rows of'),
    ({'levels': 0}, 'something else already'),
    ({'scales': 1}, 'one of them is possible'),
    ({'shift': 2}, 'one lower'),
    ({'upper': 1}, 'upper halves'),
    ({'other': 1}, 'unknown entry'),
  ],
)  # fmt: skip
def test_crafted_entries(changes, message):
  stored = encode('w', LEVELS, 'IO')
  assert stored.levels is not None
  with pytest.raises(_file.ArtifactError, match=message):
    tamper(stored, **changes)()


def test_indices_beyond_the_levels():
  stored = encode('w', LEVELS, 'IO')
  assert stored.levels is not None
  with pytest.raises(_file.ArtifactError, match='beyond its 8 levels'):
    tamper(stored._replace(levels=stored.levels[:8]))()


def test_a_bias_of_whole_steps_has_one_scale():
  steps = np.random.default_rng(5).integers(-31, 32, 200)
  stored = encode('bias', (steps * np.float32(0.013)).astype(np.float32)[None], '')
  assert stored.scales is not None and stored.scales.shape == (1,) and stored.axis == 0
  assert stored.bytes < 200  # 6 bits each; a table of 63 values alone takes 252 bytes
