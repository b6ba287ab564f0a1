import io
import pickle

import numpy as np
from PIL import Image
import pytest

from fqjax.data import _images
from tests.tiny_tfds import jpeg, photograph

PHOTO = photograph(0, 3)


def encoded(image, format, **options):
  out = io.BytesIO()
  Image.fromarray(image).save(out, format, **options)
  return out.getvalue()


def test_decodes_what_pillow_decodes():
  data = jpeg(PHOTO)
  np.testing.assert_array_equal(
    _images.decode_image(data), np.asarray(Image.open(io.BytesIO(data)))
  )
  np.testing.assert_array_equal(_images.decode_image(encoded(PHOTO, 'PNG')), PHOTO)


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_other_modes_become_rgb(mode):
  out = io.BytesIO()
  Image.fromarray(PHOTO).convert(mode).save(out, 'JPEG')
  image = _images.decode_image(out.getvalue())
  assert image.shape == PHOTO.shape and image.dtype == np.uint8
  if mode == 'L':
    assert (image[..., 0] == image[..., 2]).all()


def test_truncated_image_is_named_with_its_offset():
  data = jpeg(PHOTO)[:1500]
  with pytest.raises(_images.CorruptImageError, match=r'photos/a\.jpg at byte \d+') as e:
    _images.decode_image(data, 'photos/a.jpg')
  assert e.value.name == 'photos/a.jpg' and 0 < e.value.offset <= 1500
  again = pickle.loads(pickle.dumps(e.value))
  assert str(again) == str(e.value) and again.offset == e.value.offset


@pytest.mark.parametrize(
  'data', [b'', b'hello', b'\xff\xd8\xff\xe0', jpeg(PHOTO)[:40], encoded(PHOTO, 'PNG')[:60]]
)
def test_not_an_image(data):
  with pytest.raises(_images.CorruptImageError, match='x.jpg'):
    _images.decode_image(data, 'x.jpg')


def test_random_damage_never_escapes_as_another_error():
  rng = np.random.default_rng(0)
  for good in (jpeg(PHOTO), encoded(PHOTO, 'PNG'), encoded(PHOTO, 'WEBP'), encoded(PHOTO, 'GIF')):
    for _ in range(100):
      data = bytearray(good)
      for at in rng.integers(0, len(data), 8):
        data[at] = rng.integers(256)
      try:
        image = _images.decode_image(bytes(data))
      except _images.CorruptImageError:
        continue
      assert image.ndim == 3 and image.shape[-1] == 3


def test_decompression_bomb_is_refused_before_decoding(monkeypatch):
  monkeypatch.setattr(_images, 'MAX_PIXELS', 80 * 96 - 1)
  with pytest.raises(_images.CorruptImageError, match='96 x 80 pixels is more than the limit'):
    _images.decode_image(jpeg(PHOTO))


def test_pixels_of_coefficients_says_where_to_augment():
  with pytest.raises(ValueError, match='InputSpec'):
    _images.pixels({'coefficients': np.zeros((1, 1, 3), np.int16), 'label': 0})
