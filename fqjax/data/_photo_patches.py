"""The embedded set: patches of the colour photographs inside scikit-image and scikit-learn."""

import numpy as np

from fqjax.data import _images
from fqjax.data._named import TRAIN_TEST, choose_split
from fqjax.data._sources import CachedSource, Source

SIZE = 64

# Two test strips lie across the longer side of each photograph, at a quarter and at three quarters
# of it; what is left and right of them is for training. Strips rather than one end: a photograph
# differs more from end to end (sky, ground) than from strip to strip.
STRIP = 80
GUARD = 8

# Places in the list of edges at which the training regions of a split begin. Settings are chosen by
# training on the outer two and scoring on the inner one: patches of one region overlap, so a random
# part of the training patches would not be held out.
_THIRDS = {'train': (0, 2, 4), 'train_outer': (0, 4), 'train_inner': (2,)}
_PER_CLASS = {'train': 320, 'train_outer': 240, 'train_inner': 80, 'test': 80}

# A patch of clear sky or black border says nothing about which photograph it is from.
_LEAST_DEVIATION = 4.0

NAMES = (
  'astronaut', 'chelsea', 'coffee', 'hubble_deep_field', 'immunohistochemistry', 'retina',
  'rocket', 'stereo_motorcycle', 'china', 'flower',
)  # fmt: skip


def _photographs() -> list[np.ndarray]:
  try:
    import skimage.data
    from sklearn.datasets import load_sample_image
  except ImportError as e:
    raise ImportError(
      "'photo_patches' is cut from photographs inside scikit-image and scikit-learn, and "
      f'{e.name} is not installed: pip install fqjax[demo]'
    ) from e
  images = []
  for name in NAMES:
    if name in ('china', 'flower'):
      image = load_sample_image(f'{name}.jpg')
    else:
      image = getattr(skimage.data, name)()
    # The stereo pair comes as (left, right, disparity); two views of one scene would leak.
    images.append(np.asarray(image[0] if isinstance(image, tuple) else image))
  return images


def regions(length: int, split: str) -> list[tuple[int, int]]:
  """Ranges along the longer side of a photograph that belong to a split.

  Example:
    >>> regions(512, 'test'), regions(512, 'train')
    ([(88, 168), (344, 424)], [(0, 80), (176, 336), (432, 512)])
    >>> regions(512, 'train_outer'), regions(512, 'train_inner')
    ([(0, 80), (432, 512)], [(176, 336)])
  """
  starts = [round(length * f) - STRIP // 2 for f in (0.25, 0.75)]
  test = [(s, s + STRIP) for s in starts]
  if split == 'test':
    return test
  edges = [0, *(e for a, b in test for e in (a - GUARD, b + GUARD)), length]
  pairs = [(edges[i], edges[i + 1]) for i in _THIRDS[split]]
  return [(a, b) for a, b in pairs if b - a >= SIZE]


def corners(height: int, width: int, split: str) -> tuple[np.ndarray, np.ndarray]:
  """All (top, left) at which a patch lies wholly inside one region of the split."""
  along = np.concatenate(
    [np.arange(a, b - SIZE + 1) for a, b in regions(max(height, width), split)]
  )
  across = np.arange(min(height, width) - SIZE + 1)
  long, short = (g.ravel() for g in np.meshgrid(along, across, indexing='ij'))
  return (long, short) if height > width else (short, long)


class _EncodedSource(Source):
  """Encoded images held in memory."""

  def __init__(
    self, name: str, data: list[bytes], labels: np.ndarray, class_names: tuple[str, ...]
  ):
    self.name, self._data, self._labels = name, data, labels
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self._data)

  def read(self, index: int):
    return {
      'image': self._data[index],
      'label': int(self._labels[index]),
      'name': f'{self.name}[{index}]',
    }


def photo_patches(
  split: str = 'train', *, per_class: int | None = None, quality: int = 95, cache: bool = True
) -> Source:
  """64 x 64 patches of ten colour photographs, to be classified by photograph.

  Train and test patches come from disjoint regions of each photograph with a gap of 8 pixels
  between them; the choice is the same on every machine. Stored as JPEG (4:4:4).

  Args:
    split: 'train' or 'test' ('val', 'validation'); 'train_outer' and 'train_inner' are two disjoint
      parts of the training regions on which settings can be chosen without seeing a test patch.
    per_class: patches per photograph; if None 320 for 'train', 240 for 'train_outer', 80 for the
      others.
    quality: JPEG quality.
    cache: keep decoded patches in memory.

  Returns:
    A source of ten classes.

  Raises:
    ImportError: scikit-image or scikit-learn is missing; names `pip install fqjax[demo]`.
  """
  splits = {**TRAIN_TEST, **{k: k for k in _THIRDS}}
  split = choose_split('photo_patches', split, splits)
  per_class = per_class or _PER_CLASS[split]
  data, labels = [], []
  for label, photo in enumerate(_photographs()):
    top, left = corners(photo.shape[0], photo.shape[1], split)
    # A hash in place of a random generator: the same patches with every version of NumPy.
    words = np.random.Philox(key=[label, int(split == 'test')]).random_raw(len(top))
    found = 0
    for i in np.argsort(words):
      patch = photo[top[i] : top[i] + SIZE, left[i] : left[i] + SIZE]
      if patch.mean(-1).std() < _LEAST_DEVIATION:
        continue
      data.append(_images.encode_jpeg(patch, quality))
      labels.append(label)
      found += 1
      if found == per_class:
        break
    else:
      raise ValueError(f'photo_patches: {NAMES[label]} has only {found} patches ({per_class=}).')
  source = _EncodedSource(f'photo_patches {split}', data, np.array(labels), NAMES)
  return CachedSource(source) if cache else source
