"""Device preprocessing against pixels and SciPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from fqjax import data, ops
from fqjax.data import InputSpec, estimate_statistics, preprocess, spec_with_statistics


def _images(n=3, height=16, width=16, seed=0):
  """Smooth colour images with a little noise, uint8."""
  rng = np.random.default_rng(seed)
  waves = rng.uniform(0, 255, (n, 5, 5, 3))
  images = scipy.ndimage.zoom(waves, (1, height / 5, width / 5, 1), order=3)
  return np.clip(images + rng.normal(0, 6, images.shape), 0, 255).astype(np.uint8)


def _ycbcr(images):
  """JFIF, float64."""
  r, g, b = np.moveaxis(images.astype(np.float64), -1, 0)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  return np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1)


def _oracle(images, block=8):
  """Unrounded coefficients with full chroma, float64 [n, h/b, w/b, 3*b*b]."""
  n, h, w, _ = images.shape
  x = (_ycbcr(images) - 128).reshape(n, h // block, block, w // block, block, 3)
  x = x.transpose(0, 1, 3, 5, 2, 4)
  x = scipy.fft.dctn(x, axes=(-2, -1), norm='ortho')
  return x.reshape(n, h // block, w // block, -1)


# float32 sums of 64 products of numbers up to 128
EXACT = dict(rtol=1e-5, atol=2e-3)


def test_dct_of_pixels_against_scipy():
  images = _images(height=24, width=16)
  spec = InputSpec('dct', (24, 16), chroma='full', rounding=False)
  got = preprocess(spec, images)
  assert got.shape == (3, *spec.output_shape) == (3, 3, 2, 192) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, _oracle(images), **EXACT)


@pytest.mark.parametrize('block', [4, 8])
def test_subset_order_and_normalisation(block):
  images = _images()
  channels = (3 * block * block - 1, 0, 5)  # order is the spec's, not ascending
  mean, std = (1.0, -20.0, 3.5), (2.0, 300.0, 0.25)
  spec = InputSpec('dct', 16, block, channels, 'full', rounding=False, mean=mean, std=std)
  want = (_oracle(images, block)[..., list(channels)] - mean) / std
  np.testing.assert_allclose(preprocess(spec, images), want, rtol=1e-4, atol=1e-2)


def test_every_channel_in_another_order():
  order = tuple(range(191, -1, -1))
  spec = InputSpec('dct', 16, channels=order)
  plain = preprocess(dataclasses.replace(spec, channels=None), _images())
  np.testing.assert_array_equal(preprocess(spec, _images()), plain[..., ::-1])


def test_stored_coefficients_equal_pixels():
  images = _images()
  spec = InputSpec('dct', 16, channels='square24', mean=(1.0,) * 24, std=(3.0,) * 24)
  stored = np.asarray(ops.rgb_to_coefficients(images)).astype(np.int16)
  want = preprocess(spec, images)
  np.testing.assert_array_equal(preprocess(spec, stored), want)
  only_those_kept = stored[..., list(ops.channel_subset(24))]
  np.testing.assert_array_equal(preprocess(spec, only_those_kept), want)


def _flips_and_crops(spec, images, key):
  """What happened to each sample of an 'rgb' twin: searched among all flips and offsets."""
  got = np.asarray(preprocess(spec, images, key, train=True))
  found = []
  for sample, image in zip(got, images, strict=True):
    side, step = sample.shape[0], 1
    for flip in (0, 1):
      source = image[:, ::-1] if flip else image
      for i in range(0, image.shape[0] - side + 1, step):
        for j in range(0, image.shape[1] - side + 1, step):
          if np.array_equal(source[i : i + side, j : j + side], sample):
            found.append((flip, i, j))
  return found


def test_rgb_flip_and_crop_are_views_of_the_image_and_all_occur():
  images = np.repeat(_images(1, 24, 24), 64, axis=0)
  spec = InputSpec('rgb', 24, flip=True, crop_blocks=2)
  found = _flips_and_crops(spec, images, jax.random.key(0))
  assert len(found) == 64
  flips, rows, columns = map(set, zip(*found, strict=True))
  assert flips == {0, 1}
  assert rows == columns == set(range(9))  # any pixel, both ends included


@pytest.mark.parametrize('chroma', ['full', 'filtered'])
@pytest.mark.parametrize('block', [4, 8])
def test_flip_of_coefficients_is_the_flip_of_pixels(chroma, block):
  images = np.repeat(_images(1, 16, 24), 8, axis=0)
  spec = InputSpec('dct', (16, 24), block, chroma=chroma, rounding=False, flip=True)
  got = np.asarray(preprocess(spec, images, jax.random.key(1), train=True))
  plain, mirrored = (np.asarray(preprocess(spec, x)) for x in (images, images[:, :, ::-1]))
  is_flipped = [np.abs(g - m).max() < np.abs(g - p).max() for g, m, p in zip(got, mirrored, plain, strict=True)]  # fmt: skip
  assert 0 < sum(is_flipped) < 8
  want = np.where(np.array(is_flipped)[:, None, None, None], mirrored, plain)
  np.testing.assert_allclose(got, want, **EXACT)
  # Without the signs of odd frequencies this is far off: the test can fail.
  assert np.abs(mirrored - plain[:, :, ::-1]).max() > 10


def test_flip_knows_the_frequencies_of_a_subset():
  images = np.repeat(_images(1), 8, axis=0)
  spec = InputSpec('dct', 16, channels=(65, 3, 0, 130), chroma='full', rounding=False, flip=True)
  got = np.asarray(preprocess(spec, images, jax.random.key(1), train=True))
  plain, mirrored = (_oracle(x)[0][..., [65, 3, 0, 130]] for x in (images, images[:, :, ::-1]))
  errors = [min(np.abs(g - plain).max(), np.abs(g - mirrored).max()) for g in got]
  assert max(errors) < 2e-3


def test_crop_is_slicing_at_every_block():
  images = _images(1, 40, 48)
  spec = InputSpec('dct', (40, 48), chroma='full', rounding=False, crop_blocks=3)
  assert spec.output_shape == (3, 3, 192)
  stored = _oracle(images)[0].astype(np.float32)
  got = np.asarray(
    preprocess(spec, np.repeat(stored[None], 256, axis=0), jax.random.key(0), train=True)
  )
  offsets = set()
  for sample in got:
    hits = [
      (i, j) for i in range(3) for j in range(4)
      if np.array_equal(stored[i : i + 3, j : j + 3], sample)
    ]  # fmt: skip
    assert len(hits) == 1
    offsets.update(hits)
  assert offsets == {(i, j) for i in range(3) for j in range(4)}
  # Block-aligned: the crop of the pixels has those coefficients.
  np.testing.assert_allclose(_oracle(images[:, 8:32, 16:40])[0], stored[1:4, 2:5], **EXACT)


def test_evaluation_takes_the_centre_and_no_flip():
  images = _images(2, 40, 40)
  rgb = preprocess(InputSpec('rgb', 40, flip=True, crop_blocks=3), images)
  np.testing.assert_array_equal(rgb, images[:, 8:32, 8:32].astype(np.float32))
  dct = preprocess(InputSpec('dct', 40, chroma='full', flip=True, crop_blocks=3), images)
  whole = preprocess(InputSpec('dct', 40, chroma='full'), images)
  np.testing.assert_array_equal(dct, whole[:, 1:4, 1:4])


@pytest.mark.parametrize('block', [4, 8])
def test_half_size_rgb_against_scipy(block):
  images = _images(2, 16, 24)
  spec = InputSpec('rgb_half_idct', (16, 24), block, rounding=False)
  corner = _oracle(images, block).reshape(2, 16 // block, 24 // block, 3, block, block)
  half = block // 2
  x = scipy.fft.idctn(corner[..., :half, :half] / 2, axes=(-2, -1), norm='ortho') + 128
  y, cb, cr = np.moveaxis(x.transpose(0, 1, 4, 2, 5, 3).reshape(2, 8, 12, 3), -1, 0)
  r, b = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
  want = np.stack([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], -1)
  got = preprocess(spec, images)
  assert got.shape == (2, *spec.output_shape) == (2, 8, 12, 3)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
  rounded = np.asarray(preprocess(dataclasses.replace(spec, rounding=True), images))
  np.testing.assert_array_equal(rounded, rounded.round())
  # 8-bit samples and integer coefficients: what a codec loses as well.
  inside = (want > 4) & (want < 251)
  assert np.abs(rounded - want)[inside].max() < 4


def test_half_size_keeps_grey_levels():
  images = np.broadcast_to(np.array([[[[200, 30, 90]]]], np.uint8), (1, 16, 16, 3))
  got = preprocess(InputSpec('rgb_half_idct', 16, rounding=False), images)
  np.testing.assert_allclose(got, np.broadcast_to(images[:, :8, :8], got.shape), atol=1e-3)


@pytest.mark.parametrize('kind', ['rgb', 'dct', 'rgb_half_idct'])
def test_sharding_batch_length_and_keys(kind):
  images = _images(16, 24, 24)
  spec = InputSpec(kind, 24, flip=True, crop_blocks=2)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec('data')))
  key = jax.random.key(3)
  one = np.asarray(preprocess(spec, images, key, train=True))
  many = preprocess(spec, sharded, key, train=True)
  assert len(many.sharding.device_set) == 8
  np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-3)
  # Every device augments its own samples: nothing travels.
  text = preprocess.lower(spec, sharded, key, train=True).compile().as_text()
  assert not any(word in text for word in ('all-gather', 'all-reduce', 'all-to-all', 'permute'))
  # A sample's fate does not depend on how many follow it.
  np.testing.assert_allclose(preprocess(spec, images[:4], key, train=True), one[:4], atol=1e-3)
  before = preprocess._cache_size()
  other = preprocess(spec, images, jax.random.key(4), train=True)
  same = preprocess(dataclasses.replace(spec), images, key, train=True)
  assert preprocess._cache_size() == before
  assert np.abs(np.asarray(other) - one).max() > 1
  np.testing.assert_array_equal(same, one)


def test_pooled_statistics_in_one_pass():
  images = _images(20, 16, 16)
  spec = InputSpec('dct', 16, channels='square6', chroma='full', rounding=False)
  padded = np.concatenate([images[16:], np.full((4, 16, 16, 3), 255, np.uint8)])
  batches = [images[:8], images[8:16], {'image': padded, 'mask': np.arange(8) < 4}]
  found = estimate_statistics(spec, iter(batches))
  want = _oracle(images)[..., list(ops.channel_subset(6))].reshape(-1, 6)
  np.testing.assert_allclose(found.mean, want.mean(0), rtol=1e-4, atol=1e-2)
  np.testing.assert_allclose(found.std, want.std(0), rtol=1e-4)
  ready = spec_with_statistics(spec, found)
  x = np.concatenate([np.asarray(preprocess(ready, b)) for b in (images[:8], images[8:])])
  np.testing.assert_allclose(x.reshape(-1, 6).mean(0), 0, atol=1e-4)
  np.testing.assert_allclose(x.reshape(-1, 6).std(0), 1, atol=1e-4)
  # An existing normalisation is not normalised once more.
  again = estimate_statistics(ready, iter(batches))
  np.testing.assert_array_equal(again.std, found.std)


def test_released_statistics_are_taken_by_channel():
  spec = spec_with_statistics(InputSpec('dct', 16, channels=(128, 0, 8)), 'released')
  assert spec.mean == pytest.approx((32.116, -88.397, 0.444), rel=1e-6)
  assert spec.std == pytest.approx((75.85, 260.0, 3.991), rel=1e-6)
  assert spec_with_statistics(spec, 'none').std is None
  x = preprocess(spec, np.full((1, 16, 16, 3), 128, np.uint8))
  np.testing.assert_allclose(x[0, 0, 0], [-32.116 / 75.85, 88.397 / 260, -0.444 / 3.991], rtol=1e-5)


def test_constant_channels_are_left_alone():
  grey = [np.full((2, 8, 8, 3), 77, np.uint8)]
  spec = InputSpec('dct', 8)
  ready = spec_with_statistics(spec, estimate_statistics(spec, grey))
  assert ready.std == (1.0,) * 192
  np.testing.assert_allclose(preprocess(ready, grey[0]), 0, atol=1e-4)


def test_sizes_of_the_comparisons():
  large, small = InputSpec('dct', 64, channels='square24'), InputSpec('rgb', 32)
  assert large.input_bytes == small.input_bytes == 3072
  assert (large.values, small.values) == (8 * 8 * 24, 3072)
  cifar = InputSpec('dct', 32, 4, 6)
  assert cifar.channels == (0, 1, 4, 5, 16, 32)
  assert cifar.input_bytes == InputSpec('rgb', 16).input_bytes == 768
  imagenet = InputSpec('dct', 448, channels=24)
  assert imagenet.output_shape == (56, 56, 24)
  assert imagenet.input_bytes == InputSpec('rgb', 224).input_bytes == 150528
  assert InputSpec('rgb_half_idct', 448).input_bytes == 150528
  stored = InputSpec('dct', 512, channels=24, crop_blocks=56)
  assert stored.output_shape == (56, 56, 24) and stored.input_bytes == 2 * 64 * 64 * 24


def test_specs_are_keys():
  a, b = InputSpec('dct', 64, channels=[0, 1]), InputSpec('dct', 64, channels=np.array([0, 1]))
  assert a == b and hash(a) == hash(b) and isinstance(a.channels, tuple)
  assert hash(dataclasses.replace(a, mean=np.zeros(2), std=jnp.ones(2))) is not None


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(kind='jpeg', size=64), "got 'jpeg'"),
    (dict(kind='dct', size=227), '227 x 227 pixels .* blocks of 8; resize or crop to 224 x 224'),
    (dict(kind='rgb_half_idct', size=15, block=5), 'a block of 5 has no half'),
    (dict(kind='dct', size=64, channels=(0, 192)), r'0\.\.191 for blocks of 8, got \[192\]'),
    (dict(kind='dct', size=64, channels=(1, 1)), r'distinct .*\(1, 1\)'),
    (dict(kind='rgb', size=64, channels=(0,)), 'no DCT channels'),
    (dict(kind='dct', size=64, channels=(0, 1), mean=(0.0,)), 'mean has 1 numbers, .* 2 channels'),
    (dict(kind='rgb', size=64, std=(1.0, 0.0, 1.0)), 'std must be positive, channel 1'),
    (dict(kind='dct', size=64, crop_blocks=9), 'crop_blocks=9 does not fit into 8 x 8'),
    (dict(kind='dct', size=64, chroma='420'), "got '420'"),
  ],
)
def test_bad_specs(arguments, message):
  with pytest.raises(ValueError, match=message):
    InputSpec(**arguments)


def test_bad_inputs():
  spec = InputSpec('dct', 16, channels=24, flip=True)
  with pytest.raises(TypeError, match=r'uint8 pixels or int16 .* got int32 \[1, 2, 2, 192\]'):
    preprocess(spec, np.zeros((1, 2, 2, 192), np.int32))
  with pytest.raises(TypeError, match='takes uint8 pixels 0..255, got float32'):
    preprocess(InputSpec('rgb', 16), np.zeros((1, 16, 16, 3), np.float32))
  with pytest.raises(ValueError, match=r'pixels \[n, 16, 16, 3\], got \[1, 24, 16, 3\]'):
    preprocess(spec, np.zeros((1, 24, 16, 3), np.uint8))
  with pytest.raises(ValueError, match=r'\[n, 2, 2, 24 or 192\], got \[1, 2, 2, 64\]'):
    preprocess(spec, np.zeros((1, 2, 2, 64), np.int16))
  with pytest.raises(ValueError, match='need a key'):
    preprocess(spec, np.zeros((1, 16, 16, 3), np.uint8), train=True)
  with pytest.raises(ValueError, match='no image'):
    estimate_statistics(spec, [])
  with pytest.raises(ValueError, match="'released'.* got 'pooled'"):
    spec_with_statistics(spec, 'pooled')
  with pytest.raises(ValueError, match="8x8 DCT blocks, not to kind='rgb'"):
    spec_with_statistics(InputSpec('rgb', 16), 'released')


@pytest.mark.full
@pytest.mark.data
def test_pooled_deviations_of_photographs(data_dir):
  """What the luma of natural photographs has at 448 pixels, 250 of them, one per class."""
  source = data.load_source('imagenet_samples', 'test')
  loader = data.Loader(
    source, 25, shuffle=False, repeat=False, transform=data.resize_crop(512, 448)
  )
  spec = InputSpec('dct', 448, channels=(0, 1, 9, 27))  # frequencies (0,0), (0,1), (1,1), (3,3)
  statistics = estimate_statistics(spec, loader)
  std = np.asarray(statistics.std)
  low, high = np.array([400, 70, 37, 10]), np.array([500, 85, 43, 15])
  assert (low < std).all() and (std < high).all(), std
  # The published vectors divide DC by the deviation of image means, about half of it.
  assert 220 < np.sqrt(statistics.between[0]) < 270
