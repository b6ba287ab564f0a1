"""Wavelet transforms against PyWavelets in float64, and their identities."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from fqjax import ops
from fqjax.ops import _wavelet_levels

MODES = ('symmetric', 'periodization', 'zero', 'reflect')
# Families times parities: filter lengths 2, 4, 6, 8 and 18, orthogonal or not.
SOME = ('haar', 'db2', 'sym3', 'db4', 'coif3', 'bior2.2', 'rbio3.1')


def randn(*shape):
  return np.random.default_rng(0).standard_normal(shape)


@pytest.fixture
def as_numpy(monkeypatch):
  """Runs the array code on NumPy: the same lines for thousands of shapes, nothing to compile."""

  def take(x, index, axis, mode, fill_value):
    assert (mode, fill_value) == ('fill', 0)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, 1)
    return np.take(np.pad(x, pad), index, axis)

  def slice_in_dim(x, start, limit, stride=1, axis=0):
    assert 0 <= start <= limit <= x.shape[axis]
    return x[(slice(None),) * axis + (slice(start, limit, stride),)]

  numpy = types.SimpleNamespace(take=take, concatenate=np.concatenate, stack=np.stack, add=np.add)
  monkeypatch.setattr(_wavelet_levels, 'jnp', numpy)
  lax = types.SimpleNamespace(slice_in_dim=slice_in_dim)
  monkeypatch.setattr(_wavelet_levels, 'jax', types.SimpleNamespace(lax=lax))


def check_lengths(name, mode, lengths, with_code=True):
  """Matrices against PyWavelets, their product, and the array code against the matrices."""
  wavelet = ops.Wavelet(name)
  for n in lengths:
    if mode == 'reflect' and n == 1:
      continue
    identity = np.eye(n)
    analysis = ops.analysis_matrix(n, name, mode)
    expected = np.concatenate(pywt.dwt(identity, name, mode, axis=0))
    np.testing.assert_allclose(analysis, expected, atol=1e-14)
    count = len(analysis) // 2
    assert count == ops.dwt_coeff_len(n, name, mode) == pywt.dwt_coeff_len(n, wavelet.dec_len, mode)
    synthesis = ops.synthesis_matrix(count, name, mode)
    parts = np.split(np.eye(2 * count), 2)
    expected = pywt.idwt(*parts, name, mode, axis=0)
    np.testing.assert_allclose(synthesis, expected, atol=1e-14)
    # The published symlets are orthonormal to 1.4e-11 only.
    np.testing.assert_allclose((synthesis @ analysis)[:n], identity, atol=1e-9)
    if not with_code:
      continue
    # Long rows after the axis, and none: the two ways of computing it.
    for columns in (identity, np.tile(identity, (1, -(-20 // n)))):
      for transposed in (False, True):
        x, axis = (columns.T, 1) if transposed else (columns, 0)
        got = _wavelet_levels.analyse(x, axis, wavelet, mode)
        got = np.concatenate([g.T if transposed else g for g in got])
        np.testing.assert_allclose(got, analysis @ columns, atol=1e-13)
    for transposed in (False, True):
      bands = [p.T if transposed else p for p in parts]
      got = _wavelet_levels.synthesise(*bands, int(transposed), wavelet, mode)
      np.testing.assert_allclose(got.T if transposed else got, synthesis, atol=1e-13)


# Filters


def test_filters_are_those_of_pywavelets():
  names = [name for name in pywt.wavelist(kind='discrete') if name != 'dmey']
  assert sorted(ops.wavelist()) == sorted(names)
  for name in names:
    assert ops.Wavelet(name).filter_bank == tuple(map(tuple, pywt.Wavelet(name).filter_bank)), name
  assert ops.wavelist('coif') == [f'coif{i}' for i in range(1, 18)]


def test_custom_wavelet_and_pywavelets_object():
  x = np.arange(12.0, dtype=np.float32)
  bank = ops.Wavelet('mine', pywt.Wavelet('db3').filter_bank)
  for wavelet in (bank, pywt.Wavelet('db3')):
    np.testing.assert_array_equal(ops.dwt(x, wavelet)[1], ops.dwt(x, 'db3')[1])


# One level: every family, mode and length


@pytest.mark.parametrize('mode', MODES)
def test_matrices_match_pywavelets(mode, as_numpy):
  for name in ops.wavelist():
    check_lengths(name, mode, (1, 2, 3, 8, 19, 40), with_code=False)
  for name in SOME:
    check_lengths(name, mode, (*range(1, 11), 17, 24, 39, 40))


@pytest.mark.full
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ops.wavelist())
def test_every_length_matches_pywavelets(name, mode, as_numpy):
  check_lengths(name, mode, range(1, 41))


# The array functions, compiled


def compare(got, expected, tolerance):
  got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
  assert len(got) == len(expected)
  for g, e in zip(got, expected):
    assert g.shape == e.shape
    np.testing.assert_allclose(np.asarray(g, e.dtype), e, rtol=0, atol=tolerance)


# shape, axis or axes, wavelet, mode
SINGLE = [
  ((37,), -1, 'db2', 'symmetric'),
  ((3, 40, 2), 1, 'sym4', 'periodization'),
  ((2, 33, 20), 1, 'bior2.2', 'reflect'),
  ((2, 3, 30), 2, 'haar', 'zero'),
  ((5, 18), 0, 'rbio3.3', 'periodization'),
  ((2, 24, 3), -2, 'coif1', 'zero'),
]


@pytest.mark.parametrize('shape, axis, wavelet, mode', SINGLE)
def test_dwt_and_idwt(shape, axis, wavelet, mode, x64):
  x = randn(*shape)
  parts = ops.dwt(x, wavelet, mode, axis)
  expected = pywt.dwt(x, wavelet, mode, axis)
  compare(parts, expected, 1e-13)
  compare(ops.idwt(*parts, wavelet, mode, axis), pywt.idwt(*expected, wavelet, mode, axis), 1e-13)
  compare(ops.idwt(*parts, wavelet, mode, axis, shape=shape), x, 1e-10)
  compare(
    ops.idwt(None, parts[1], wavelet, mode, axis),
    pywt.idwt(None, expected[1], wavelet, mode, axis),
    1e-13,
  )


@pytest.mark.full
@pytest.mark.parametrize('name', ops.wavelist())
def test_compiled_code_matches_pywavelets(name, x64):
  for mode in MODES:
    for shape, axis in (((3, 40, 2), 1), ((2, 33, 20), 1)):
      x = randn(*shape)
      parts = ops.dwt(x, name, mode, axis)
      compare(parts, pywt.dwt(x, name, mode, axis), 1e-12)
      compare(ops.idwt(*parts, name, mode, axis, shape=shape), x, 1e-9)


def test_2d_with_a_wavelet_and_a_mode_per_axis(x64):
  x = randn(2, 13, 22, 3)
  setting = dict(wavelet=('db2', 'bior1.3'), mode=('symmetric', 'periodization'), axes=(1, 2))
  got = ops.dwt2(x, **setting)
  expected = pywt.dwt2(x, **setting)
  compare(got, expected, 1e-13)
  compare(ops.idwt2(got, **setting), pywt.idwt2(expected, **setting), 1e-13)
  compare(ops.idwt2(got, **setting, shape=x.shape), x, 1e-10)
  only = (None, (None, got[1][1], None))
  compare(
    ops.idwt2(only, **setting), pywt.idwt2((None, (None, expected[1][1], None)), **setting), 1e-13
  )


def test_nd(x64):
  x = randn(5, 6, 7)
  for axes in (None, (2, 0)):
    got, expected = ops.dwtn(x, 'db2', axes=axes), pywt.dwtn(x, 'db2', axes=axes)
    compare(got, expected, 1e-13)
    assert list(got) == list(expected)
    compare(ops.idwtn(got, 'db2', axes=axes), pywt.idwtn(expected, 'db2', axes=axes), 1e-13)
    del got['ad' if axes else 'ada'], expected['ad' if axes else 'ada']
    compare(ops.idwtn(got, 'db2', axes=axes), pywt.idwtn(expected, 'db2', axes=axes), 1e-13)


@pytest.mark.parametrize('mode', MODES)
def test_multilevel_1d(mode, x64):
  for wavelet, n in (('db2', 45), ('bior2.2', 47)):
    x = randn(2, n, 3)
    got = ops.wavedec(x, wavelet, mode, axis=1)
    expected = pywt.wavedec(x, wavelet, mode, axis=1)
    compare(got, expected, 1e-13)
    compare(ops.waverec(got, wavelet, mode, 1), pywt.waverec(expected, wavelet, mode, 1), 1e-12)
    compare(ops.waverec(got, wavelet, mode, 1, shape=x.shape), x, 1e-10)


def test_multilevel_2d(x64):
  x = randn(2, 45, 50, 3)
  for wavelet, mode in (('db4', 'symmetric'), ('haar', 'periodization')):
    setting = dict(wavelet=wavelet, mode=mode, axes=(1, 2))
    got = ops.wavedec2(x, level=2, **setting)
    expected = pywt.wavedec2(x, level=2, **setting)
    compare(got, expected, 1e-13)
    compare(ops.waverec2(got, **setting), pywt.waverec2(expected, **setting), 1e-12)
    compare(ops.waverec2(got, **setting, shape=x.shape), x, 1e-10)


def test_multilevel_nd(x64):
  x = randn(9, 10, 12)
  got, expected = ops.wavedecn(x, 'sym2'), pywt.wavedecn(x, 'sym2')
  compare(got, expected, 1e-13)
  compare(ops.waverecn(got, 'sym2'), pywt.waverecn(expected, 'sym2'), 1e-12)
  compare(ops.waverecn(got, 'sym2', shape=x.shape), x, 1e-10)


def test_level_zero_and_max_level():
  x = np.arange(6, dtype=np.float32)
  compare(ops.wavedec(x, 'db2', level=0), [x], 0)
  compare(ops.waverec([x], 'db2'), x, 0)
  for n in (0, 1, 5, 6, 7, 96, 224, 1000):
    for name in ('haar', 'db2', 'db38'):
      assert ops.dwt_max_level(n, name) == pywt.dwt_max_level(n, name)
  shape = (64, 100, 30, 3)
  assert ops.dwtn_max_level(shape, 'db2', (1, 2)) == pywt.dwtn_max_level(shape, 'db2', (1, 2))


# Identities


def test_orthogonal_periodization_keeps_energy(x64):
  x = randn(64, 32)
  coeffs = ops.wavedec2(x, 'db5', 'periodization')
  energy = sum(float((c**2).sum()) for c in jax.tree.leaves(coeffs))
  np.testing.assert_allclose(energy, (x**2).sum(), rtol=1e-12)


@pytest.mark.parametrize('mode', MODES)
def test_gradient_is_the_transpose(mode, x64):
  analysis = ops.analysis_matrix(21, 'db2', mode)
  synthesis = ops.synthesis_matrix(12, 'db2', mode)
  pairs = [
    (lambda v: jnp.concatenate(ops.dwt(v, 'db2', mode)), analysis),
    (lambda v: ops.idwt(v[:12], v[12:], 'db2', mode), synthesis),
  ]
  for function, matrix in pairs:
    rows, columns = matrix.shape
    out, pullback = jax.vjp(function, randn(columns))
    np.testing.assert_allclose(out, matrix @ randn(columns), atol=1e-12)
    np.testing.assert_allclose(pullback(randn(rows))[0], matrix.T @ randn(rows), atol=1e-12)


# dtypes, jit, vmap, devices


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16', 'float16', 'uint8', 'int32'))
def test_dtypes(dtype):
  x = np.random.default_rng(0).integers(0, 100, (3, 18, 19))
  data = jnp.asarray(x).astype(dtype)
  kept = dtype if 'float' in dtype else 'float32'
  expected = pywt.wavedec2(np.asarray(data, np.float64), 'db2', level=2)
  got = ops.wavedec2(data, 'db2', level=2)
  assert {c.dtype for c in jax.tree.leaves(got)} == {jnp.dtype(kept)}
  # Only the result is rounded: half a unit in the last place of numbers up to 400, and float32's
  # own error in the sums.
  tolerance = {'bfloat16': 1.0, 'float16': 0.13}.get(dtype, 2e-4)
  compare(got, jax.tree.map(np.asarray, expected), tolerance)
  back = ops.waverec2(got, 'db2', shape=data.shape)
  assert back.dtype == jnp.dtype(kept)
  compare(back, np.asarray(data, np.float64), 4 * tolerance)


def test_complex_data_and_integer_coefficients():
  x = (randn(2, 11) + 1j * randn(2, 11)[::-1]).astype(np.complex64)
  compare(ops.dwt(x, 'db2'), pywt.dwt(x, 'db2'), 1e-5)
  ints = np.arange(8, dtype=np.int32)
  compare(ops.idwt(ints, ints, 'db2'), pywt.idwt(ints, ints, 'db2').astype(np.float32), 1e-5)


def test_jit_vmap_and_batch_axes():
  x = randn(4, 17, 18).astype(np.float32)
  expected = ops.wavedec2(x, 'db2', level=1)
  compare(jax.jit(lambda v: ops.wavedec2(v, 'db2', level=1))(x), expected, 1e-6)
  compare(jax.vmap(lambda v: ops.wavedec2(v, 'db2', level=1))(x), expected, 1e-6)
  last = ops.wavedec2(np.moveaxis(x, 0, -1), 'db2', level=1, axes=(0, 1))
  compare(jax.tree.map(lambda c: jnp.moveaxis(c, -1, 0), last), expected, 1e-6)


def test_second_call_compiles_nothing():
  x = randn(3, 10).astype(np.float32)
  ops.dwt(x, 'db3')
  before = _wavelet_levels.decompose._cache_size()
  ops.dwt(x + 1, pywt.Wavelet('db3').name, 'sym', 1)
  assert _wavelet_levels.decompose._cache_size() == before


@pytest.mark.parametrize('spec', (('data',), (None, 'data'), (None, None, 'data')))
def test_sharded_equals_unsharded(spec):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  x = randn(8, 16, 24, 3).astype(np.float32)
  # Two levels of a filter with boundary rows, along two axes of which one may be split.
  run = lambda v: ops.wavedec2(v, 'db2', level=2, axes=(1, 2))
  expected = run(x)
  got = run(jax.device_put(x, sharding))
  compare(got, expected, 1e-6)
  back = ops.waverec2(got, 'db2', axes=(1, 2), shape=x.shape)
  compare(back, x, 1e-5)


# Packed and list forms


def test_coeffs_to_array_and_back(x64):
  x = randn(2, 16, 12)
  cases = [
    ('wavedec', dict(axis=1), (1,)),
    ('wavedec2', dict(axes=(1, 2)), (1, 2)),
    ('wavedecn', dict(axes=(1, 2)), (1, 2)),
  ]
  for form, where, axes in cases:
    expected = getattr(pywt, form)(x, 'haar', 'periodization', level=2, **where)
    coeffs = getattr(ops, form)(x, 'haar', 'periodization', level=2, **where)
    array, slices = ops.coeffs_to_array(coeffs, None, axes)
    assert array.shape == x.shape
    compare(ops.array_to_coeffs(array, slices, form), expected, 1e-13)
    if form != 'wavedec':  # PyWavelets packs 1-D coefficients of 1-D data only
      packed, places = pywt.coeffs_to_array(expected, axes=axes)
      compare(array, packed, 1e-13)
      assert slices[1:] == places[1:]
  coeffs = ops.wavedec2(x, 'db2', level=1)
  array, slices = ops.coeffs_to_array(coeffs, 7.0, (1, 2))
  packed, _ = pywt.coeffs_to_array(pywt.wavedec2(x, 'db2', level=1), 7.0, (1, 2))
  compare(array, packed, 1e-13)
  with pytest.raises(ValueError, match='leave gaps'):
    odd = ops.wavedec2(x[:, :15], 'db2', level=2)
    ops.coeffs_to_array(odd, None, (1, 2))
  with pytest.raises(ValueError, match='say which'):
    ops.coeffs_to_array(coeffs)
  with pytest.raises(ValueError, match='output_format'):
    ops.array_to_coeffs(array, slices, 'swt')


# Wavelet packets


def test_packets_match_pywavelets(x64):
  x = randn(2, 13, 18)
  for wavelet, mode in (('db2', 'symmetric'), ('haar', 'periodization')):
    tree = pywt.WaveletPacket2D(x, wavelet, mode, maxlevel=2, axes=(1, 2))
    bands = ops.wavelet_packet_dec2(x, wavelet, mode, level=2, axes=(1, 2))
    assert set(bands) == {node.path for node in tree.get_level(2)}
    compare(bands, {path: tree[path].data for path in bands}, 1e-13)
    back = ops.wavelet_packet_rec2(bands, wavelet, mode, (1, 2), shape=x.shape)
    compare(back, x, 1e-11)
    # Another basis: 'd' is not split further, 'vh' and all of 'h' are left out.
    basis = {path: band for path, band in bands.items() if path[0] in 'av' and path != 'vh'}
    basis['d'] = ops.dwt2(x, wavelet, mode, axes=(1, 2))[1][2]
    for path in bands:
      if path[0] == 'h' or path == 'vh':
        tree[path].data = np.zeros_like(tree[path].data)
    expected = tree.reconstruct(update=False)
    got = ops.wavelet_packet_rec2(basis, wavelet, mode, (1, 2), shape=x.shape)
    compare(got, expected, 1e-11)


def test_packet_grid_is_frequency_order():
  for level in (1, 2, 3):
    tree = pywt.WaveletPacket2D(np.zeros((8, 8)), 'haar', 'periodization')
    expected = [[node.path for node in row] for row in tree.get_level(level, 'freq')]
    assert ops.wavelet_packet_grid(level) == expected


# What PyWavelets refuses, we refuse


def refuses(match, function, *args, **kwargs):
  with pytest.raises(ValueError, match=match):
    function(*args, **kwargs)


def test_errors():
  x = np.ones((1, 6), np.float32)
  refuses("unknown wavelet 'db39'.*'db3", ops.dwt, x, 'db39')
  refuses('unknown wavelet', ops.dwt, x, 'nothing like it')
  refuses("unknown boundary mode 'smooth'", ops.dwt, x, 'db2', 'smooth')
  refuses('at least 2 samples', ops.dwt, x, 'db2', 'reflect', 0)
  refuses('at least 2 samples', ops.dwt, x, 'haar', 'reflect', 0)
  refuses('at least one sample', ops.dwt, np.zeros((0,), np.float32), 'db2')
  refuses('axis 2 is out of range', ops.dwt, x, 'db2', axis=2)
  refuses('axis 0 is out of range', ops.wavedec, np.float32(1), 'db2', axis=0)
  refuses('name one axis twice', ops.wavedec2, x, 'haar', axes=(1, 1))
  refuses('needs 2 axes', ops.dwt2, x, 'haar', axes=(0,))
  refuses('3 wavelets for 2 axes', ops.dwt2, x, ('haar',) * 3)
  refuses('level must be at least 0', ops.wavedec, x, 'haar', level=-1)
  refuses('too few', ops.idwt, x[:, :1], x[:, :1], 'db2')
  refuses('too few', ops.idwt, x[:, :2], x[:, :2], 'db4')
  refuses('differ in shape', ops.idwt, x[:, :3], x, 'haar')
  refuses('all coefficients are None', ops.idwt, None, None, 'haar')
  refuses('does not fit', ops.waverec, [x[:, :3], x], 'haar')
  refuses('is not what these coefficients', ops.idwt, x, x, 'haar', shape=(1, 14))
  refuses('use waverec2', ops.waverec, [x, (x, x, x)], 'haar')
  refuses('For a dict', ops.waverec2, [x, {'ad': x}], 'haar')
  refuses('are dicts', ops.waverecn, [x, x], 'haar')
  refuses('do not name bands', ops.idwtn, {'ax': x}, 'haar')
  refuses('one even', ops.Wavelet, 'mine', ((1.0,),) * 4)
  refuses('no wavelet family', ops.wavelist, 'mexh')
  refuses('is a part of band', ops.wavelet_packet_rec2, {'a': x, 'ah': x}, 'haar')
  refuses('letters other', ops.wavelet_packet_rec2, {'ax': x}, 'haar')
  with pytest.warns(UserWarning, match='level 4 is deeper than 1'):
    ops.wavedec(x, 'db2', level=4)
