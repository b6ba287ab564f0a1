"""DCT-I to IV against SciPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.fft

from fqjax import ops
from fqjax.ops import _dct

TYPES = (1, 2, 3, 4)
NORMS = (None, 'backward', 'ortho', 'forward')
PAIRS = ((ops.dct, scipy.fft.dct), (ops.idct, scipy.fft.idct))
PAIRS_N = ((ops.dctn, scipy.fft.dctn), (ops.idctn, scipy.fft.idctn))


def _normal(*shape):
  return np.random.default_rng(0).standard_normal(shape)


def _close(ours, theirs, tolerance):
  """Largest difference relative to the largest value."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1e-30, abs(theirs).max()))


@pytest.mark.parametrize('type', TYPES)
def test_basis_is_scipys_for_all_sizes(type):
  for n, norm, (inverse, theirs) in itertools.product(
    range(1 + (type == 1), 41), NORMS[1:], enumerate((scipy.fft.dct, scipy.fft.idct))
  ):
    basis = _dct._basis(type, n, norm, bool(inverse))
    # 40 terms of size <= 2 in float64: a few units of 2e-16 each.
    _close(basis, theirs(np.eye(n), type, axis=0, norm=norm), 1e-14)


@pytest.mark.parametrize('type', TYPES)
def test_ortho_basis_is_orthogonal(type):
  for n in range(1 + (type == 1), 41):
    basis = _dct._basis(type, n, 'ortho')
    np.testing.assert_allclose(basis @ basis.T, np.eye(n), rtol=0, atol=1e-14)


def _sweep(sizes):
  """One compiled program over all types, norms and directions for arrays of these sizes."""
  arrays = [_normal(3, n) for n in sizes]
  cases = [
    (i, type, norm, direction)
    for i, type, norm, direction in itertools.product(range(len(sizes)), TYPES, NORMS[1:], (0, 1))
    if sizes[i] > 1 or type != 1
  ]

  @jax.jit
  def ours(arrays):
    return [PAIRS[d][0](arrays[i], type, norm=norm) for i, type, norm, d in cases]

  for (i, type, norm, d), y in zip(cases, ours(arrays), strict=True):
    assert y.dtype == np.float64
    _close(y, PAIRS[d][1](arrays[i], type, norm=norm), 1e-14)


def test_matches_scipy(x64):
  _sweep([1, 2, 3, 8, 40])


@pytest.mark.full
@pytest.mark.parametrize('first', range(1, 41, 8))
def test_matches_scipy_for_all_sizes(x64, first):
  _sweep(list(range(first, first + 8)))


def test_matches_scipy_beyond_the_longest_basis(x64):
  n = _dct._LONGEST_BASIS + 5
  _sweep([n, n + 2])
  x = _normal(2, n, 3)
  for type in TYPES:
    _close(ops.dct(x, type, axis=1), scipy.fft.dct(x, type, axis=1), 1e-14)
    _close(ops.dct(x, type, n=700, axis=1), scipy.fft.dct(x, type, n=700, axis=1), 1e-14)


# Axes in front, in the middle and behind; short and long; crop and padding; -1 keeps a length.
SHAPES = [
  ((9, 4, 6), dict()),
  ((9, 4, 6), dict(axes=0)),
  ((9, 4, 6), dict(axes=[0, -1])),
  ((9, 4, 6), dict(axes=(1,))),
  ((9, 4, 6), dict(axes=())),
  ((2, 8, 3, 8, 3), dict(axes=(1, 3))),
  ((2, 8, 70), dict(axes=(1,))),
  ((2, 8, 70), dict(axes=(1,), s=(5,))),
  ((2, 8, 70), dict(axes=(1,), s=(12,))),
  ((2, 20, 70), dict(axes=(1, 2), s=(30, 7))),
  ((5, 6), dict(s=(9,))),
  ((5, 6), dict(s=4)),
  ((5, 6), dict(s=(-1, 4), axes=(0, 1))),
]


@pytest.mark.parametrize('type', TYPES)
def test_axes_and_lengths_follow_scipy(x64, type):
  arrays = [_normal(*shape) for shape, _ in SHAPES]

  @jax.jit
  def ours(arrays):
    return [
      [f(x, type, norm='ortho', **kw) for f, _ in PAIRS_N]
      for x, (_, kw) in zip(arrays, SHAPES, strict=True)
    ]

  for x, (_, kw), ys in zip(arrays, SHAPES, ours(arrays), strict=True):
    for y, (_, theirs) in zip(ys, PAIRS_N, strict=True):
      _close(y, theirs(x, type, norm='ortho', **kw), 1e-14)


def test_single_axis_arguments_follow_scipy(x64):
  x = _normal(5, 6)
  # Positional: type, n, axis, norm.
  _close(ops.dct(x, 3, 4, 0, 'forward'), scipy.fft.dct(x, 3, 4, 0, 'forward'), 1e-14)
  _close(ops.idct(x, 4, 9, -2, 'ortho'), scipy.fft.idct(x, 4, 9, -2, 'ortho'), 1e-14)
  _close(ops.dct(x), scipy.fft.dct(x), 1e-14)
  _close(ops.dct([1, 2, 3]), scipy.fft.dct([1.0, 2, 3]), 1e-6)


@pytest.mark.parametrize(
  'dtype, tolerance',
  # One rounding of the result: 2^-11, 2^-8; float32 sums of 40 and 1000 terms.
  [(jnp.float16, 5e-4), (jnp.bfloat16, 4e-3), (jnp.float32, 1e-6)],
)
def test_dtype_is_kept_and_sums_are_float32(dtype, tolerance):
  for n in (40, 1000):
    x = jnp.asarray(_normal(4, n), dtype)
    y = ops.dct(x, norm='ortho')
    assert y.dtype == dtype
    _close(y, scipy.fft.dct(np.asarray(x, np.float64), norm='ortho'), tolerance)


def test_bfloat16_is_rounded_once():
  x = jnp.asarray(1 + abs(_normal(2, 3, 40, 40)), jnp.bfloat16)
  exact = scipy.fft.dctn(np.asarray(x, np.float64), axes=(2, 3), norm='ortho')
  y = np.asarray(ops.dctn(x, axes=(2, 3), norm='ortho'), np.float64)
  # Every value, not only the largest, is within half a unit of bfloat16 (and float32 noise).
  assert (abs(y - exact) <= 2.0**-8 * abs(exact) + 1e-4).all()


def test_integers_become_float32():
  for dtype in (np.uint8, np.int16, np.int32, bool):
    y = ops.dct(np.array([0, 1, 1], dtype))
    assert y.dtype == np.float32
    _close(y, scipy.fft.dct([0.0, 1, 1]), 1e-6)


@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('shape, axis', [((6, 5), 0), ((3, 8, 70), 1), ((2, 20), 1), ((2, 600), 1)])
def test_gradient_is_the_transpose(x64, type, shape, axis):
  x, g = _normal(2, *shape)
  _, pull = jax.vjp(lambda x: ops.dct(x, type, axis=axis), x)
  # The basis transposed; SciPy's columns are its basis.
  basis = scipy.fft.dct(np.eye(shape[axis]), type, axis=0)
  expected = np.moveaxis(np.tensordot(g, basis, axes=(axis, 0)), -1, axis)
  _close(pull(jnp.asarray(g))[0], expected, 1e-13)


def test_gradient_against_finite_differences(x64):
  # Crop and padding; a short axis in the middle, whose derivative is written by hand.
  for shape, settings in (((3, 4), dict(s=(5, 3))), ((2, 3, 30), dict(axes=1))):
    f = lambda x, settings=settings: jnp.sum(ops.dctn(x, norm='ortho', **settings) ** 3)
    jax.test_util.check_grads(f, (_normal(*shape),), order=1, atol=1e-5, rtol=1e-5)


def test_vmap_takes_any_batch_axis():
  x = _normal(4, 5, 6).astype(np.float32)
  for axis in range(3):
    y = jax.vmap(lambda a: ops.dctn(a, norm='ortho'), in_axes=axis, out_axes=axis)(x)
    axes = tuple(a for a in range(3) if a != axis)
    _close(y, scipy.fft.dctn(x.astype(np.float64), axes=axes, norm='ortho'), 1e-6)


@pytest.mark.parametrize('n', [8, 20, 600])
def test_sharded_equals_unsharded(n):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  x = _normal(16, n, 8, 3).astype(np.float32)
  f = jax.jit(lambda x: ops.dctn(x, axes=(1, 2), norm='ortho'))
  placed = jax.device_put(x, sharding)
  y = f(placed)
  _close(y, f(x), 1e-6)
  if n > _dct._LONGEST_BASIS:
    return  # XLA gathers the operand of an FFT
  assert y.sharding.is_equivalent_to(sharding, y.ndim)
  text = f.lower(placed).compile().as_text()
  assert not [op for op in ('all-gather', 'all-to-all', 'collective-permute') if op in text]


def test_second_call_compiles_nothing():
  x = np.ones((2, 6), np.float32)
  ops.dctn(x, axes=[1])
  before = _dct._jitted._cache_size()
  ops.dctn(x, axes=(-1,), s=(6,), norm='backward')
  assert _dct._jitted._cache_size() == before


@pytest.mark.parametrize(
  'error, text, call',
  [
    (ValueError, 'use 1, 2, 3 or 4', lambda: ops.dct(np.ones(3), 5)),
    (ValueError, "'ortho' or 'forward'", lambda: ops.dct(np.ones(3), norm='orthonormal')),
    (ValueError, 'DCT-I needs at least 2', lambda: ops.dct(np.ones(1), 1)),
    (ValueError, 'DCT-I needs at least 2', lambda: ops.idctn(np.ones((3, 1)), 1)),
    (ValueError, 'at least 1', lambda: ops.dct(np.ones(3), n=0)),
    (ValueError, 'at least 1', lambda: ops.dct(np.ones((2, 0)))),
    (ValueError, 'do not all exist', lambda: ops.dct(np.ones(3), axis=1)),
    (ValueError, 'once', lambda: ops.dctn(np.ones((3, 3)), axes=(0, -2))),
    (ValueError, 'same length', lambda: ops.dctn(np.ones((3, 3)), s=(2,), axes=(0, 1))),
    (ValueError, 'fewer axes', lambda: ops.dctn(np.ones((3, 3)), s=(2, 2, 2))),
    (TypeError, 'x.real', lambda: ops.dct(np.ones(3, complex))),
  ],
)
def test_errors_say_what_to_do(error, text, call):
  with pytest.raises(error, match=text):
    call()


@pytest.mark.parametrize('type, size', [(1, 1), (2, 0), (5, 3)])
def test_refuses_where_scipy_refuses(type, size):
  with pytest.raises((ValueError, RuntimeError)):
    scipy.fft.dct(np.ones(size), type)
  with pytest.raises(ValueError):
    ops.dct(np.ones(size), type)
