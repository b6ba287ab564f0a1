"""Block DCT against SciPy; coefficient operators against the same operation on pixels."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.fft

from fqjax import ops
from fqjax.ops import _block_dct

# Float32: 64 terms, values up to about 8 * the pixels'.
F32 = dict(rtol=0, atol=3e-6)


def _reference(x, size=8):
  """[..., h, w, c] -> [..., h/b, w/b, c*b*b] by SciPy, in float64."""
  *lead, h, w, c = x.shape
  k = len(lead)
  x = np.asarray(x, np.float64).reshape(*lead, h // size, size, w // size, size, c)
  x = scipy.fft.dctn(x, axes=(k + 1, k + 3), norm='ortho')
  x = np.moveaxis(x, (k + 4, k + 1, k + 3), (k + 2, k + 3, k + 4))
  return x.reshape(*lead, h // size, w // size, c * size * size)


def _image(*shape):
  return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize('size', [1, 2, 4, 5, 8, 9, 16])
@pytest.mark.parametrize('lead', [(), (2, 3)])
def test_is_scipys_dct_of_each_block(x64, size, lead):
  x = _image(*lead, 3 * size, 2 * size, 3)
  y = ops.block_dct(x, size)
  np.testing.assert_allclose(y, _reference(x, size), rtol=0, atol=1e-13)
  np.testing.assert_allclose(ops.block_idct(y, size), x, rtol=0, atol=1e-13)


def test_in_float32():
  x = _image(2, 224, 224, 3).astype(np.float32)
  y = ops.block_dct(x)
  assert y.dtype == np.float32 and y.shape == (2, 28, 28, 192)
  np.testing.assert_allclose(y, _reference(x), **F32)
  np.testing.assert_allclose(ops.block_idct(y), x, **F32)


def test_dtypes():
  x = _image(16, 8, 1)
  for dtype, tolerance in ((jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)):
    low = jnp.asarray(x, dtype)
    y = ops.block_dct(low)
    assert y.dtype == ops.block_idct(y).dtype == dtype
    # Sums in float32, one rounding at the end.
    exact = _reference(low)
    assert (abs(np.asarray(y, np.float64) - exact) <= tolerance * abs(exact) + 1e-5).all()
  for dtype in (np.uint8, np.int16):
    y = ops.block_dct(np.full((8, 8, 1), 100, dtype))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y[0, 0], [800] + [0] * 63, atol=1e-3)


def test_constant_block():
  y = ops.block_dct(jnp.full((8, 8, 1), 200.0) - 128)[0, 0]
  np.testing.assert_allclose(y, [576] + [0] * 63, atol=1e-4)


def test_ramp_block():
  i, j = np.mgrid[:8, :8]
  c = ops.block_dct(jnp.asarray(2.0 * (8 * i + j))[..., None] - 128).reshape(8, 8)
  np.testing.assert_allclose(c[0, 0], -520, atol=1e-3)
  np.testing.assert_allclose(c[0, 1], -36.4433, atol=1e-3)
  np.testing.assert_allclose(c[1, 0], -291.5463, atol=1e-3)
  np.testing.assert_allclose([c[0, 2], c[1, 1]], 0, atol=1e-3)


def test_horizontal_ramp_is_in_the_first_eight_channels():
  x = np.broadcast_to(np.arange(24.0), (16, 24))[..., None]
  c = np.asarray(ops.block_dct(x))
  assert abs(c[..., 1]).min() > 10
  np.testing.assert_allclose(c[..., 8:], 0, atol=1e-4)


def test_cropping_blocks_is_slicing():
  x = _image(32, 24, 1).astype(np.float32)
  np.testing.assert_allclose(ops.block_dct(x[8:24, 16:]), ops.block_dct(x)[1:3, 2:], **F32)


def test_energy_is_kept(x64):
  x = _image(16, 24, 3)
  np.testing.assert_allclose(jnp.sum(ops.block_dct(x) ** 2), np.sum(x**2), rtol=1e-13)


def test_gradient_is_the_inverse(x64):
  x, coef = _image(16, 8, 2), _image(2, 1, 128)
  for size in (8, 2):
    y, pull = jax.vjp(lambda x: ops.block_dct(x, size), x)
    g = jnp.asarray(coef).reshape(y.shape)
    np.testing.assert_allclose(pull(g)[0], ops.block_idct(g, size), rtol=0, atol=1e-13)
  f = lambda c: jnp.sum(ops.block_resize(c, up=(3, 1), down=(2, 1), size=2) ** 3)
  jax.test_util.check_grads(f, (_image(2, 1, 8),), order=1, atol=1e-5, rtol=1e-5)


def test_vmap_and_sharding():
  x = _image(16, 16, 16, 3).astype(np.float32)
  expected = _reference(x)
  np.testing.assert_allclose(jax.vmap(ops.block_dct)(x), expected, **F32)
  last = np.moveaxis(x, 0, -1)
  np.testing.assert_allclose(jax.vmap(ops.block_dct, in_axes=-1)(last), expected, **F32)

  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  f = jax.jit(lambda x: ops.block_flip_left_right(ops.block_resize(ops.block_dct(x), 1, 2)))
  placed = jax.device_put(x, sharding)
  y = f(placed)
  assert y.sharding.is_equivalent_to(sharding, y.ndim)
  np.testing.assert_allclose(y, f(x), **F32)
  text = f.lower(placed).compile().as_text()
  assert not [op for op in ('all-gather', 'all-to-all', 'collective-permute') if op in text]


def test_zigzag():
  rank = ops.zigzag_rank().reshape(8, 8)
  # ITU-T T.81 figure 5.
  assert rank.tolist() == [
    [0, 1, 5, 6, 14, 15, 27, 28],
    [2, 4, 7, 13, 16, 26, 29, 42],
    [3, 8, 12, 17, 25, 30, 41, 43],
    [9, 11, 18, 24, 31, 40, 44, 53],
    [10, 19, 23, 32, 39, 45, 52, 54],
    [20, 22, 33, 38, 46, 51, 55, 60],
    [21, 34, 37, 47, 50, 56, 59, 61],
    [35, 36, 48, 49, 57, 58, 62, 63],
  ]
  for size in (1, 2, 3, 8, 16):
    order = ops.zigzag(size)
    assert (order[ops.zigzag_rank(size)] == np.arange(size * size)).all()
    # Neighbours in the scan are neighbours in the block.
    u, v = np.divmod(order, size)
    assert (np.maximum(abs(np.diff(u)), abs(np.diff(v))) == 1).all()


def test_reordering_channels():
  coef = jnp.arange(2 * 192, dtype=jnp.int16).reshape(1, 2, 192)
  scanned = ops.to_zigzag(coef)
  assert scanned.dtype == coef.dtype
  expected = np.asarray(coef).reshape(1, 2, 3, 64)[..., ops.zigzag()].reshape(1, 2, 192)
  assert (scanned == expected).all()
  assert (ops.from_zigzag(scanned) == coef).all()
  assert ops.to_zigzag(jnp.arange(18), size=3)[9:].tolist() == [9 + i for i in ops.zigzag(3)]


def test_pad_to():
  x = np.arange(375 * 5 * 2, dtype=np.uint8).reshape(375, 5, 2)
  y = ops.pad_to(x, 8)
  assert y.shape == (376, 8, 2) and y.dtype == np.uint8
  assert (y == np.pad(x, ((0, 1), (0, 3), (0, 0)), mode='edge')).all()
  assert (ops.pad_to(y, 8) == y).all()


FLIPS = [
  (ops.block_flip_left_right, lambda x: x[..., :, ::-1, :]),
  (ops.block_flip_up_down, lambda x: x[..., ::-1, :, :]),
  (ops.block_transpose, lambda x: np.swapaxes(x, -3, -2)),
  *[
    (
      lambda c, k=k, **kw: ops.block_rot90(c, k, **kw),
      lambda x, k=k: np.rot90(x, k, axes=(-3, -2)),
    )
    for k in (-1, 0, 1, 2, 3, 5)
  ],
]


@pytest.mark.parametrize('on_blocks, on_pixels', FLIPS)
@pytest.mark.parametrize('size', [8, 3])
def test_flips_and_turns_are_exact(x64, on_blocks, on_pixels, size):
  x = _image(2, 2 * size, 3 * size, 2)
  coef = _reference(x, size)
  y = on_blocks(coef, size=size)
  np.testing.assert_allclose(y, _reference(on_pixels(x), size), rtol=0, atol=1e-13)
  # Signs and places only: stored integers and their dtype survive.
  whole = np.rint(100 * coef).astype(np.int16)
  again = on_blocks(whole, size=size)
  assert again.dtype == np.int16
  assert sorted(abs(np.asarray(again).ravel())) == sorted(abs(whole.ravel()))
  np.testing.assert_allclose(again, on_blocks(whole.astype(np.float64), size=size))


def test_flip_as_the_specification_says_it():
  coef = _image(2, 3, 192).astype(np.float32)
  sign = np.where(np.arange(192) % 2, -1, 1)  # channel 8u + v: odd v
  assert (ops.block_flip_left_right(coef) == coef[:, ::-1] * sign).all()


@pytest.mark.parametrize('size, factor', [(8, 2), (8, 3), (4, 2), (4, 4), (5, 1)])
def test_merge_and_split(x64, size, factor):
  a = _block_dct._merge_matrix(size, factor)
  np.testing.assert_allclose(a @ a.T, np.eye(size * factor), rtol=0, atol=1e-14)
  large = size * factor
  x = _image(2, 2 * large, large, 2)
  merged = ops.block_merge(ops.block_dct(x, size), factor, size=size)
  np.testing.assert_allclose(merged, _reference(x, large), rtol=0, atol=1e-12)
  split = ops.block_split(merged, factor, size=large)
  np.testing.assert_allclose(split, _reference(x, size), rtol=0, atol=1e-12)


def test_upsampling_a_unit_coefficient():
  y = ops.block_resize(jnp.zeros((1, 1, 64)).at[0, 0, 1].set(1.0), up=2).reshape(2, 2, 8, 8)
  left = [0.901764, 0.422338, -0.082721, 0.034065, -0.017667, 0.009985, -0.005556, 0.002510]
  right = [-0.901764, 0.422338, 0.082721, 0.034065, 0.017667, 0.009985, 0.005556, 0.002510]
  for row in range(2):
    np.testing.assert_allclose(y[row, 0, 0], left, atol=1e-6)
    np.testing.assert_allclose(y[row, 1, 0], right, atol=1e-6)
  np.testing.assert_allclose(y[:, :, 1:], 0, atol=1e-6)


def test_resizing_keeps_grey_levels():
  coef = jnp.zeros((2, 2, 64)).at[..., 0].set(8.0)
  for up, down in ((2, 1), (1, 2), (3, 2), ((1, 3), (2, 1))):
    y = ops.block_resize(coef, up, down)
    np.testing.assert_allclose(y[..., 0], 8, atol=1e-5)
    np.testing.assert_allclose(y[..., 1:], 0, atol=1e-5)


@pytest.mark.parametrize('factors', [2, 3, (1, 2), (3, 2)])
def test_reducing_undoes_enlarging(x64, factors):
  coef = _image(2, 3, 4, 128)
  up = ops.block_resize(coef, up=factors)
  p, q = (factors, factors) if isinstance(factors, int) else factors
  assert up.shape == (2, 3 * p, 4 * q, 128)
  np.testing.assert_allclose(ops.block_resize(up, down=factors), coef, rtol=0, atol=1e-13)
  np.testing.assert_allclose(ops.block_resize(coef, factors, factors), coef, rtol=0, atol=1e-13)
  # The new blocks of one old block share its mean: their DCs sum to p*q times its DC.
  dc = up.reshape(2, 3, p, 4, q, 2, 64)[..., 0].sum(axis=(2, 4))
  np.testing.assert_allclose(dc, p * q * coef.reshape(2, 3, 4, 2, 64)[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize('up, down', [((3, 1), (2, 1)), ((1, 2), (1, 3)), ((2, 4), (1, 3)), (3, 2)])
def test_rational_resize_in_pixels(x64, up, down):
  """Zero-padding and truncating the DCT of blocks, done on pixels by SciPy."""
  up_v, up_h = np.broadcast_to(up, 2)
  down_v, down_h = np.broadcast_to(down, 2)
  x = _image(6 * 8, 6 * 8, 1)

  def axis(x, p, q, k):
    # [blocks, 8] -> pad to 8p: the enlarged pixels; group 8q: keep 8 of their DCT.
    x = np.moveaxis(x, k, -1)
    y = scipy.fft.dct(x.reshape(*x.shape[:-1], -1, 8), norm='ortho')
    y = np.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, 8 * p - 8)])
    y = scipy.fft.idct(y, norm='ortho').reshape(*x.shape[:-1], -1, 8 * q) * np.sqrt(p)
    y = scipy.fft.dct(y, norm='ortho')[..., :8] / np.sqrt(q)
    y = scipy.fft.idct(y, norm='ortho')
    return np.moveaxis(y.reshape(*x.shape[:-1], -1), -1, k)

  expected = axis(axis(x, up_v, down_v, 0), up_h, down_h, 1)
  y = ops.block_idct(ops.block_resize(ops.block_dct(x), up, down))
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


def test_operators_round_once_in_bfloat16():
  coef = jnp.asarray(_image(2, 2, 64), jnp.bfloat16)
  y = ops.block_resize(coef, 3, 2)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(ops.block_resize(coef.astype(jnp.float32), 3, 2))
  assert (abs(np.asarray(y, np.float32) - exact) <= 2.0**-8 * abs(exact)).all()


@pytest.mark.parametrize(
  'text, call',
  [
    (r'pad_to\(x, 8\)', lambda: ops.block_dct(np.ones((64, 227, 227, 3)))),
    ('at least 1 pixel', lambda: ops.block_dct(np.ones((8, 8, 1)), 0)),
    ('image', lambda: ops.block_dct(np.ones((8, 8)))),
    ('multiple of 64', lambda: ops.block_idct(np.ones((1, 1, 24)))),
    ('multiple of 64', lambda: ops.to_zigzag(np.ones(24))),
    ('bh, bw', lambda: ops.block_transpose(np.ones(64))),
    ('does not divide the grid', lambda: ops.block_merge(np.ones((3, 2, 64)))),
    ('cannot be cut', lambda: ops.block_split(np.ones((2, 2, 64)), 3, size=8)),
    ('at least 1', lambda: ops.block_resize(np.ones((2, 2, 64)), (0, 1))),
    ('with pixels', lambda: ops.pad_to(np.ones((0, 3, 1)), 8)),
  ],
)
def test_errors_say_what_to_do(text, call):
  with pytest.raises(ValueError, match=text):
    call()
