import numpy as np
from PIL import Image
import pytest

from fqjax import data
from tests.tiny_tfds import jpeg, photograph

PHOTO = photograph(0, 3)


def example(image=PHOTO):
  return {'image': image, 'label': 1, 'name': 'a.jpg'}


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize('rule', ['log_uniform', 'uniform'])
def test_crop_boxes_follow_their_rule(rule):
  generator = rng()
  boxes = np.array([data.crop_box(generator, 300, 400, rule=rule) for _ in range(4000)])
  left, top, w, h = boxes.T
  assert (left >= 0).all() and (top >= 0).all()
  assert (left + w <= 400).all() and (top + h <= 300).all()
  area, aspect = w * h / 120_000, w / h
  # Rounding to pixels moves the smallest boxes a little.
  assert 0.075 < area.min() < 0.1 and area.max() <= 1.0
  assert 0.74 < aspect.min() < 0.78 and 1.29 < aspect.max() < 1.35
  # Uniform in area up to where boxes stop fitting.
  small = area[(area > 0.08) & (area < 0.5)]
  assert abs(small.mean() - 0.29) < 0.01
  fits = np.log(aspect[area < 0.4])
  if rule == 'log_uniform':
    assert abs(fits.mean()) < 0.02  # symmetric in the logarithm
    assert abs(fits.std() - np.log(16 / 9) / np.sqrt(12)) < 0.01
  else:
    # A uniform aspect has mean 25/24; half of the boxes are its inverse.
    a = np.linspace(3 / 4, 4 / 3, 10_001)
    assert abs(np.exp(fits).mean() - (a.mean() + (1 / a).mean()) / 2) < 0.01


def test_old_and_new_rule_fall_back_differently():
  # Nothing of ratio 3/4..4/3 and full area fits into a narrow strip.
  whole = dict(scale=(1.0, 1.0))
  assert data.crop_box(rng(), 10, 100, **whole, rule='uniform') == (45, 0, 10, 10)
  assert data.crop_box(rng(), 10, 100, **whole) == (43, 0, 13, 10)
  assert data.crop_box(rng(), 100, 10, **whole) == (0, 43, 10, 13)


@pytest.mark.parametrize('encoded', [False, True])
def test_random_resized_crop_is_crop_then_resize(encoded):
  image = jpeg(PHOTO) if encoded else PHOTO
  decoded = data.decode_image(image) if encoded else image
  got = data.random_resized_crop(32)(example(image), rng(5))['image']
  left, top, w, h = data.crop_box(rng(5), 80, 96)
  want = Image.fromarray(decoded[top : top + h, left : left + w])
  np.testing.assert_array_equal(got, want.resize((32, 32), Image.Resampling.BILINEAR))


def test_draft_is_close_and_off_by_default():
  smooth = np.asarray(Image.fromarray(PHOTO).resize((960, 800), Image.Resampling.BICUBIC))
  encoded = jpeg(smooth)
  exact = data.resize(100)(example(encoded), rng())['image']
  np.testing.assert_array_equal(
    exact, Image.fromarray(data.decode_image(encoded)).resize((120, 100), Image.Resampling.BILINEAR)
  )
  fast = data.resize(100, draft=True)(example(encoded), rng())['image']
  assert fast.shape == exact.shape
  assert 0 < np.abs(fast.astype(int) - exact).mean() < 3


def test_resize_crop_takes_the_centre():
  got = data.resize_crop(40, 32)(example(), rng())['image']
  whole = np.asarray(Image.fromarray(PHOTO).resize((48, 40), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(got, whole[4:36, 8:40])
  assert data.resize((20, 50))(example(), rng())['image'].shape == (20, 50, 3)


def test_flip():
  always, never, half = (data.random_flip(p) for p in (1.0, 0.0, 0.5))
  np.testing.assert_array_equal(always(example(), rng())['image'], PHOTO[:, ::-1])
  np.testing.assert_array_equal(never(example(), rng())['image'], PHOTO)
  generator = rng()
  flipped = [half(example(), generator)['image'] is not PHOTO for _ in range(400)]
  assert 160 < sum(flipped) < 240


def test_pad_crop_equals_padding_and_cropping():
  padded = np.pad(PHOTO, ((4, 4), (4, 4), (0, 0)))
  seen = set()
  for seed in range(60):
    got = data.pad_crop(4)(example(), rng(seed))['image']
    places = [
      (i, j)
      for i in range(9)
      for j in range(9)
      if np.array_equal(padded[i : i + 80, j : j + 96], got)
    ]
    assert len(places) == 1
    seen |= set(places)
  assert {i for i, _ in seen} == set(range(9)) == {j for _, j in seen}


def test_transforms_leave_their_input_alone():
  image = PHOTO.copy()
  all_of_them = data.chain(data.pad_crop(4), data.random_flip(1.0), data.random_resized_crop(16))
  assert all_of_them(example(image), rng())['label'] == 1
  np.testing.assert_array_equal(image, PHOTO)


@pytest.mark.parametrize(
  'make,words',
  [
    (lambda: data.random_resized_crop(8, rule='old'), "'log_uniform' or 'uniform'"),
    (lambda: data.resize(8, resample='best'), 'nearest, bilinear'),
    (lambda: data.resize_crop(8, 9), 'larger'),
    (lambda: data.center_crop(81)(example(), rng()), 'a.jpg, which has 80 x 96'),
    (lambda: data.random_flip(1.0)({'coefficients': 0, 'label': 0}, rng()), 'InputSpec'),
  ],
)
def test_errors(make, words):
  with pytest.raises(ValueError, match=words):
    make()
