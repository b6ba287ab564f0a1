import sys

import numpy as np
import pytest

pytest.importorskip('skimage')
pytest.importorskip('sklearn')

from fqjax import data
from fqjax.data import _photo_patches


@pytest.fixture(scope='module')
def photographs():
  return _photo_patches._photographs()


@pytest.fixture(scope='module')
def test_set():
  return data.load_source('photo_patches', 'test', per_class=20)


def test_ten_colour_photographs(photographs):
  assert len(photographs) == 10
  for p in photographs:
    assert p.dtype == np.uint8 and p.shape[-1] == 3 and min(p.shape[:2]) >= 300


def test_splits_share_no_pixel(photographs):
  size, guard = _photo_patches.SIZE, _photo_patches.GUARD
  for height, width in {p.shape[:2] for p in photographs}:
    covered = {}
    for split in ('train', 'test', 'train_outer', 'train_inner'):
      top, left = _photo_patches.corners(height, width, split)
      assert top.max() + size <= height and left.max() + size <= width
      # Any patch, not only the chosen ones: mark all pixels a split can reach.
      reach = np.zeros((height + 1, width + 1), int)
      for dt, dl, sign in ((0, 0, 1), (size, 0, -1), (0, size, -1), (size, size, 1)):
        np.add.at(reach, (top + dt, left + dl), sign)
      covered[split] = reach.cumsum(0).cumsum(1)[:height, :width] > 0
    axis = int(height <= width)
    used = {s: np.flatnonzero(c.any(1 - axis)) for s, c in covered.items()}
    for a, b in (('train', 'test'), ('train_outer', 'train_inner')):
      assert not (covered[a] & covered[b]).any()
      assert np.abs(used[a][:, None] - used[b]).min() > guard
    # Settings are chosen on the training regions, all of them.
    assert (covered['train_outer'] | covered['train_inner'] == covered['train']).all()
    share = {s: c.mean() for s, c in covered.items()}
    assert share['test'] > 0.1 and share['train'] > 0.3
    assert share['train_outer'] > 0.2 and share['train_inner'] > 0.1


def distance(photo, patch, split):
  """Mean absolute difference of a patch to the most similar one a region of the photograph has."""
  top, left = _photo_patches.corners(*photo.shape[:2], split)
  # Narrowed down by eight of its pixels, then compared as a whole.
  error = sum(
    np.abs(photo[top + a, left + b] - patch[a, b]).sum(-1)
    for a, b in ((5, 5), (9, 50), (20, 33), (31, 7), (40, 60), (48, 20), (55, 55), (60, 3))
  )
  return min(
    np.abs(photo[top[k] : top[k] + 64, left[k] : left[k] + 64] - patch).mean()
    for k in np.argsort(error)[:50]
  )


@pytest.mark.parametrize('split', ['test', 'train_outer', 'train_inner'])
def test_patches_lie_where_they_should(photographs, split):
  """A chosen patch is found again, up to JPEG's loss, in its photograph's region and no other."""
  source = data.load_source('photo_patches', split, per_class=2)
  others = {'test', 'train_outer', 'train_inner'} - {split}
  for i in range(0, len(source), 4):
    example = source[i]
    photo = photographs[example['label']].astype(np.int32)
    patch = example['image'].astype(np.int32)
    here = distance(photo, patch, split)
    assert here < 6
    assert all(distance(photo, patch, other) > here for other in others)


def test_parts_of_training_have_as_many_patches_as_their_regions_hold():
  sizes = {s: len(data.load_source('photo_patches', s)) for s in ('train_outer', 'train_inner')}
  assert sizes == {'train_outer': 2400, 'train_inner': 800}


def test_source(test_set):
  assert len(test_set) == 200 and test_set.num_classes == 10
  assert test_set.class_names == _photo_patches.NAMES
  assert np.bincount([test_set.read(i)['label'] for i in range(200)]).tolist() == [20] * 10
  assert {test_set[i]['image'].shape for i in range(200)} == {(64, 64, 3)}
  assert test_set.encoded(0)['image'][:2] == b'\xff\xd8'
  # No patch without content.
  assert min(test_set[i]['image'].mean(-1).std() for i in range(200)) > 2


def test_deterministic(test_set):
  again = data.load_source('photo_patches', 'test', per_class=20)
  assert all(again.encoded(i) == test_set.encoded(i) for i in range(200))


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'skimage.data', None)
  with pytest.raises(ImportError, match=r'pip install fqjax\[demo\]'):
    data.load_source('photo_patches', 'train')
