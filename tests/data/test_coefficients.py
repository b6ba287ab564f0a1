import numpy as np
import pytest
import scipy.fft

from fqjax import ops
from fqjax.data import _coefficients
from tests.tiny_tfds import photograph

IMAGE = photograph(1, 4)


@pytest.mark.parametrize('chroma', ['filtered', 'full'])
@pytest.mark.parametrize('size', [4, 8, 16])
def test_equals_the_device_route(size, chroma):
  here = _coefficients.rgb_to_coefficients(IMAGE, size=size, chroma=chroma)
  there = np.asarray(ops.rgb_to_coefficients(IMAGE, size=size, chroma=chroma))
  assert here.shape == there.shape and here.dtype == there.dtype
  # float32 sums in another order: a value close to a half may round to the other side.
  assert np.abs(here - there).max() <= 1
  assert (here != there).mean() < 0.01
  exact = _coefficients.rgb_to_coefficients(IMAGE, size=size, chroma=chroma, rounding=False)
  np.testing.assert_allclose(
    exact, ops.rgb_to_coefficients(IMAGE, size=size, chroma=chroma, rounding=False), atol=1e-3
  )


def test_equals_scipy():
  got = _coefficients.rgb_to_coefficients(IMAGE, chroma='full', rounding=False)
  r, g, b = np.moveaxis(IMAGE.astype(np.float64), -1, 0)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  for plane, component in ((y - 128, 0), ((b - y) / 1.772, 1), ((r - y) / 1.402, 2)):
    for i, j in ((0, 0), (9, 11), (3, 7)):
      block = scipy.fft.dctn(plane[8 * i : 8 * i + 8, 8 * j : 8 * j + 8], norm='ortho')
      # float32 against float64; values reach 1024.
      np.testing.assert_allclose(
        got[i, j, 64 * component : 64 * component + 64], block.ravel(), atol=1e-3
      )


def test_subset_of_channels_is_the_subset_of_all():
  channels = (0, 9, 63, 64, 130, 191)
  every = _coefficients.rgb_to_coefficients(IMAGE)
  some = _coefficients.rgb_to_coefficients(IMAGE, channels=channels)
  # A narrower matrix product sums in another order, so a half may round to the other side.
  assert np.abs(some - every[..., channels]).max() <= 1
  assert (some != every[..., channels]).mean() < 0.01


def test_errors():
  with pytest.raises(ValueError, match='crop first, for example to 80 x 96'):
    _coefficients.rgb_to_coefficients(np.zeros((81, 99, 3), np.uint8))
  with pytest.raises(ValueError, match='0..191'):
    _coefficients.rgb_to_coefficients(IMAGE, channels=(192,))
