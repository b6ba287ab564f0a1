"""Colour, tables and coefficients against libjpeg (through Pillow, and jpeglib where installed)."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from fqjax import ops


def _random(*shape):
  return np.random.default_rng(0).uniform(0, 255, shape)


@pytest.fixture(scope='module', params=['astronaut', 'coffee'])
def photo(request):
  """A colour photograph, uint8 [h, w, 3], sides multiples of 16."""
  data = pytest.importorskip('skimage.data')
  image = getattr(data, request.param)()[64:320, 128:448]
  assert image.shape == (256, 320, 3)
  return image


def _encode(image, quality=100, subsampling='4:4:4'):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=quality, subsampling=subsampling)
  return file


def _stored(file, tmp_path):
  """The integers in a JPEG file as jpeglib reads them, and the tables: two lists Y, Cb, Cr."""
  jpeglib = pytest.importorskip('jpeglib')
  path = tmp_path / 'image.jpg'
  path.write_bytes(file.getvalue())
  file = jpeglib.read_dct(str(path))
  tables = [file.get_component_qt(i).astype(int) for i in range(3)]
  return [a.astype(int) for a in (file.Y, file.Cb, file.Cr)], tables


def _channels(components):
  """[bh, bw, 8, 8] per component -> [bh, bw, 192]."""
  return np.concatenate([c.reshape(*c.shape[:2], 64) for c in components], axis=-1)


def test_primaries():
  # JFIF's formulas, written out.
  rgb = jnp.array([[255.0, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]])
  expected = [
    [76.245, 84.97235, 255.5],
    [149.685, 43.52765, 21.234665],
    [29.07, 255.5, 107.265335],
    [255, 128, 128],
    [0, 128, 128],
  ]
  np.testing.assert_allclose(ops.rgb_to_ycbcr(rgb), expected, atol=1e-3)


def test_colour_is_pillows(photo):
  theirs = np.asarray(Image.fromarray(photo).convert('YCbCr'), float)
  # Pillow computes in 6-bit fixed point and drops the fraction.
  difference = np.asarray(ops.rgb_to_ycbcr(photo)) - theirs
  assert difference.min() > -0.1 and difference.max() < 1.1


def test_colour_there_and_back(x64):
  rgb = _random(3, 5, 4, 3)
  ycbcr = ops.rgb_to_ycbcr(rgb)
  assert ycbcr.dtype == np.float64
  np.testing.assert_allclose(ops.ycbcr_to_rgb(ycbcr), rgb, rtol=0, atol=1e-12)
  # The inverse as JFIF prints it.
  y, cb, cr = np.moveaxis(np.asarray(ycbcr), -1, 0)
  np.testing.assert_allclose(y + 1.402 * (cr - 128), rgb[..., 0], rtol=0, atol=1e-12)
  np.testing.assert_allclose(y + 1.772 * (cb - 128), rgb[..., 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float32])
def test_floating_dtypes_are_kept(dtype):
  x = jnp.asarray(_random(8, 8, 3), dtype)
  for f in (
    ops.rgb_to_ycbcr,
    ops.ycbcr_to_rgb,
    ops.subsample_chroma,
    ops.upsample_chroma,
    ops.chroma_filter,
  ):
    y = f(x)
    assert y.dtype == dtype
    exact = np.asarray(f(x.astype(np.float32)))
    assert (abs(np.asarray(y, np.float32) - exact) <= 2.0**-8 * abs(exact)).all()
    assert f(jnp.ones((8, 8, 3), jnp.uint8)).dtype == np.float32
  assert ops.rgb_to_coefficients(x).dtype == np.float32
  assert ops.coefficients_to_rgb(jnp.ones((1, 1, 192), dtype)).dtype == np.float32
  assert ops.coefficients_to_rgb(jnp.ones((1, 1, 192), jnp.int16)).dtype == np.float32


def test_quantization_tables_are_libjpegs():
  image = np.zeros((8, 8, 3), np.uint8)
  for quality in range(1, 101):
    # Pillow gives the tables row-major since 8.3.
    theirs = Image.open(_encode(image, quality)).quantization
    for ours, i in zip(ops.quantization_tables(quality), (0, 1), strict=True):
      assert ours.shape == (8, 8)
      assert ours.ravel().tolist() == list(theirs[i]), quality
  luma, chroma = ops.quantization_tables(50)
  assert (luma != luma.T).any() and (chroma == chroma.T).all()
  assert all((t == 1).all() for t in ops.quantization_tables(100))


def test_subsampling_undoes_repeating(x64):
  x = _random(2, 3, 4, 2)
  for factor in (1, 2, 3):
    large = ops.upsample_chroma(x, factor)
    assert (large == np.kron(x, np.ones((1, factor, factor, 1)))).all()
    np.testing.assert_allclose(ops.subsample_chroma(large, factor), x, rtol=1e-15)


def test_subsampling_continues_the_border():
  x = jnp.array([[1.0, 2, 3], [5, 6, 7], [9, 10, 11]])[..., None]
  expected = [[(1 + 2 + 5 + 6) / 4, (3 + 7) / 2], [(9 + 10) / 2, 11]]
  np.testing.assert_array_equal(ops.subsample_chroma(x)[..., 0], expected)


def test_linear_upsampling_is_libjpegs_triangle(x64):
  x = _random(3, 4, 1)
  up = x
  for axis in (0, 1):
    near = np.concatenate([up.take([0], axis), up, up.take([-1], axis)], axis)
    before, after = (near.take(range(i, i + x.shape[axis]), axis) for i in (0, 2))
    pair = np.stack([0.75 * up + 0.25 * before, 0.75 * up + 0.25 * after], axis + 1)
    up = pair.reshape(*up.shape[:axis], -1, *up.shape[axis + 1 :])
  np.testing.assert_allclose(ops.upsample_chroma(x, method='linear'), up, rtol=1e-14)


def test_chroma_filter():
  impulse = jnp.zeros((5, 5, 1)).at[2, 2].set(64.0)
  row = np.array([0, 1, 6, 1, 0])
  np.testing.assert_array_equal(ops.chroma_filter(impulse)[..., 0], np.outer(row, row))
  # Gain at 0, 1/4 and 1/2 cycle per pixel, away from the border.
  for wave, gain in (([1, 1, 1, 1], 1), ([1, 0, -1, 0], 0.75), ([1, -1, 1, -1], 0.5)):
    x = jnp.tile(jnp.asarray(wave, jnp.float32), 4).reshape(1, 16, 1)
    y = ops.chroma_filter(x)
    np.testing.assert_allclose(y[0, 1:-1], gain * x[0, 1:-1], atol=1e-6)


def test_chroma_filter_is_enlarging_then_subsampling(x64):
  for shape in ((6, 7, 2), (2, 1, 5, 1)):
    x = _random(*shape)
    through = ops.subsample_chroma(ops.upsample_chroma(x, method='linear'))
    np.testing.assert_allclose(ops.chroma_filter(x), through, rtol=1e-14)


def test_coefficients_of_pixels_there_and_back(x64):
  rgb = _random(2, 16, 24, 3)
  for size in (8, 4):
    coef = ops.rgb_to_coefficients(rgb, size=size, chroma='full', rounding=False)
    assert coef.shape == (2, 16 // size, 24 // size, 3 * size * size)
    np.testing.assert_allclose(ops.coefficients_to_rgb(coef, size=size), rgb, rtol=0, atol=1e-11)


def test_filtered_chroma_and_rounding():
  rgb = _random(16, 24, 3).astype(np.uint8)
  ycbcr = ops.rgb_to_ycbcr(rgb)
  luma = ops.block_dct(jnp.round(ycbcr[..., :1]) - 128)
  chroma = ops.block_dct(ops.chroma_filter(ycbcr[..., 1:]) - 128)
  coef = ops.rgb_to_coefficients(rgb)
  assert coef.dtype == np.float32
  np.testing.assert_array_equal(coef[..., :64], luma.round())
  np.testing.assert_allclose(coef[..., 64:], chroma, rtol=0, atol=0.501)
  assert (coef == coef.round()).all()
  exact = ops.rgb_to_coefficients(rgb, rounding=False)
  np.testing.assert_allclose(exact[..., 64:], chroma, rtol=0, atol=1e-3)


def test_close_to_libjpegs_own_samples(photo):
  """A quality-100 4:4:4 file, decoded by libjpeg up to YCbCr, then transformed by us."""
  decoded = Image.open(_encode(photo))
  decoded.draft('YCbCr', decoded.size)
  assert decoded.mode == 'YCbCr'
  theirs = ops.block_dct(np.asarray(decoded, np.float32) - 128)
  ours = ops.rgb_to_coefficients(photo, chroma='full')
  # Ours are whole numbers as the file's, and libjpeg rounded the samples: 1/12 and a few flips.
  assert jnp.sqrt(jnp.mean((ours - theirs) ** 2)) < np.sqrt(2 / 12)
  assert (abs(ours - theirs) > 2).mean() < 1e-4
  assert abs(ours - theirs)[..., :64].max() < 2


def test_full_chroma_is_what_a_file_stores(photo, tmp_path):
  stored, tables = _stored(_encode(photo), tmp_path)
  assert all((t == 1).all() for t in tables)
  ours = np.asarray(ops.rgb_to_coefficients(photo, chroma='full')).astype(int)
  difference = abs(ours - _channels(stored))
  # libjpeg's integer DCT and colour conversion round in other places.
  assert (difference == 0).mean() > 0.9
  assert difference[..., :64].max() <= 1
  # Chroma of a flat region near half an integer turns over in all its pixels together.
  assert (difference > 1).mean() < 1e-4


def test_saturated_colours_fit_a_byte(tmp_path):
  image = np.zeros((16, 8, 3), np.uint8)
  image[:8, :, 2] = image[8:, :, 0] = 255  # a blue block over a red one
  ours = np.asarray(ops.rgb_to_coefficients(image, chroma='full'))
  # Chroma 255.5 is stored as 255, of which 8 * 127 is the DC.
  assert ours[0, 0, 64] == ours[1, 0, 128] == 1016
  stored, _ = _stored(_encode(image), tmp_path)
  np.testing.assert_array_equal(ours, _channels(stored))


def test_stored_coefficients_give_libjpegs_samples(photo, tmp_path):
  for quality in (100, 75):
    file = _encode(photo, quality)
    stored, tables = _stored(file, tmp_path)
    coef = _channels([a * t for a, t in zip(stored, tables, strict=True)])
    decoded = Image.open(file)
    decoded.draft('YCbCr', decoded.size)
    samples = ops.block_idct(coef.astype(np.int16)) + 128
    assert abs(np.clip(samples, 0, 255) - np.asarray(decoded, float)).max() <= 1.01
    # The tables, in the right order and for the right component.
    for table, ours in zip(tables, np.take(ops.quantization_tables(quality), [0, 1, 1], 0)):
      np.testing.assert_array_equal(table, ours)


def test_filtered_chroma_is_what_the_enlarged_file_stores(photo, tmp_path):
  """The published pipeline with a real codec: chroma from a 4:2:0 file of the doubled image."""
  doubled = np.asarray(ops.upsample_chroma(photo, method='linear').round()).astype(np.uint8)
  stored, _ = _stored(_encode(doubled, subsampling='4:2:0'), tmp_path)
  theirs = _channels(stored[1:])

  def rms(chroma):
    ours = np.asarray(ops.rgb_to_coefficients(photo, chroma=chroma))[..., 64:]
    return np.sqrt(np.mean((ours - theirs) ** 2))

  # Whole numbers that differ by one now and then; the unfiltered chroma is another image.
  assert rms('filtered') < 0.56
  assert rms('full') > 0.8


def test_flipping_coefficients_is_flipping_the_file(photo, tmp_path):
  stored, tables = _stored(_encode(photo, 90), tmp_path)
  flipped, _ = _stored(_encode(np.ascontiguousarray(photo[:, ::-1]), 90), tmp_path)
  ours = np.asarray(ops.block_flip_left_right(_channels(stored)))
  difference = abs(ours - _channels(flipped))[..., :64]
  assert difference.max() <= 1
  assert (difference == 0).mean() > 0.995
  # Rotation of dequantised values, against the pixels of the rotated image.
  coef = _channels([a * t for a, t in zip(stored, tables, strict=True)])
  rotated = ops.block_idct(ops.block_rot90(coef))
  np.testing.assert_allclose(rotated, np.rot90(ops.block_idct(coef)), atol=1e-3)


def test_horizontal_ramp_in_a_file_is_in_the_first_eight_channels(tmp_path):
  ramp = np.repeat(np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))[..., None], 3, axis=-1)
  stored, _ = _stored(_encode(ramp), tmp_path)
  theirs, ours = _channels(stored), np.asarray(ops.rgb_to_coefficients(ramp))
  for coef in (theirs, ours):
    assert abs(coef[..., 1]).min() > 10
    assert (coef[..., 8:64] == 0).all()


def test_noise_floor_of_the_highest_frequency(photo):
  """A twofold enlarged photograph has little there but the noise of two roundings."""
  enlarged = ops.upsample_chroma(photo, method='linear').round().astype(np.uint8)
  deviation = ops.rgb_to_coefficients(enlarged)[..., 63].std()
  # At most sqrt(1/12 + 1/12); flat black regions of a photograph have none.
  assert 0.3 < deviation < 0.409


def test_jit_vmap_grad_and_sharding():
  rgb = _random(8, 16, 16, 3).astype(np.float32)
  f = jax.jit(lambda x: ops.rgb_to_coefficients(x, rounding=False))
  expected = f(rgb)
  mapped = jax.vmap(f, in_axes=2, out_axes=2)(np.moveaxis(rgb, 0, 2))
  np.testing.assert_allclose(np.moveaxis(mapped, 2, 0), expected, atol=1e-3)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  placed = jax.device_put(rgb, sharding)
  y = f(placed)
  assert y.sharding.is_equivalent_to(sharding, y.ndim)
  np.testing.assert_allclose(y, expected, atol=1e-3)
  assert 'all-gather' not in f.lower(placed).compile().as_text()
  # An affine function: its derivative along a direction is a difference, whatever the step.
  g = _random(*expected.shape).astype(np.float32)
  gradient = jax.grad(lambda x: jnp.vdot(f(x), g))(rgb)
  step = _random(*rgb.shape).astype(np.float32) - 127
  difference = np.vdot(np.asarray(f(rgb + step) - expected, np.float64), g)
  np.testing.assert_allclose(np.vdot(gradient, step), difference, rtol=1e-3)


@pytest.mark.parametrize(
  'text, call',
  [
    ('3 channels last', lambda: ops.rgb_to_ycbcr(np.ones((8, 8)))),
    ('3 channels last', lambda: ops.coefficients_to_rgb(np.ones((1, 1, 64)))),
    ("'filtered' or 'full'", lambda: ops.rgb_to_coefficients(np.ones((8, 8, 3)), chroma='4:2:0')),
    (r'pad_to\(x, 8\)', lambda: ops.rgb_to_coefficients(np.ones((9, 8, 3)))),
    ('1 to 100', lambda: ops.quantization_tables(0)),
    ("'nearest' or 'linear'", lambda: ops.upsample_chroma(np.ones((2, 2, 1)), method='cubic')),
    ('h, w, c', lambda: ops.upsample_chroma(np.ones((2, 2)))),
    ('h, w, c', lambda: ops.subsample_chroma(np.ones((2, 2)))),
    ('h, w, c', lambda: ops.chroma_filter(np.ones((2, 2)))),
  ],
)
def test_errors_say_what_to_do(text, call):
  with pytest.raises(ValueError, match=text):
    call()
