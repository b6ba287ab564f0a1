import gzip
import hashlib
import io
import json
import pickle
import struct
import sys
import zipfile

import numpy as np
from PIL import Image
import pytest

from fqjax import data
from fqjax.data import _images, _named
from tests import tiny_tfds
from tests.tiny_tfds import jpeg, photograph


def make_folder(root, classes=('ant', 'bee'), n=3):
  for label, name in enumerate(classes):
    (root / name).mkdir(parents=True)
    for i in range(n):
      (root / name / f'{i}.JPEG').write_bytes(jpeg(photograph(i, label)))
  (root / 'readme.txt').write_text('not an image')
  return root


def make_zip(path, members):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
    for name, content in members.items():
      z.writestr(name, content)
  return path


def check(source, n, num_classes):
  """What every source promises."""
  assert len(source) == n and source.num_classes == num_classes == len(source.class_names)
  for i in (0, n - 1, -1):
    example = source[i]
    assert example['image'].dtype == np.uint8 and example['image'].shape[-1] == 3
    assert isinstance(example['label'], int) and 0 <= example['label'] < num_classes
  with pytest.raises(IndexError):
    source[n]
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[0]['image'], source[0]['image'])
  assert source.name in repr(source)


def test_arrays():
  images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
  source = data.ArraySource(images, np.arange(6) % 3, class_names=['a', 'b', 'c'])
  check(source, 6, 3)
  np.testing.assert_array_equal(source[4]['image'], images[4])
  taken = source.take(np.array([2, 5]))
  np.testing.assert_array_equal(taken['image'], images[[2, 5]])
  assert taken['label'].tolist() == [2, 2]


def test_grey_arrays_get_three_channels_unless_told_otherwise():
  grey = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
  image = data.ArraySource(grey, np.array([0, 1]))[1]['image']
  assert image.shape == (4, 4, 3) and (image == grey[1][..., None]).all()
  assert data.ArraySource(grey, np.array([0, 1]), rgb=False)[1]['image'].shape == (4, 4, 1)


@pytest.mark.parametrize(
  'images,labels,names,words',
  [
    (np.zeros((2, 4)), np.zeros(2, int), None, 'images must be'),
    (np.zeros((2, 4, 4)), np.zeros(3, int), None, 'same n'),
    (np.zeros((0, 4, 4)), np.zeros(0, int), None, 'n > 0'),
    (np.zeros((2, 4, 4)), np.zeros(2), None, 'must be integers'),
    (np.zeros((2, 4, 4)), np.array([0, -1]), None, 'negative'),
    (np.zeros((2, 4, 4)), np.array([0, 2]), ['a', 'b'], 'label 2 has no name'),
  ],
)
def test_arrays_that_do_not_fit(images, labels, names, words):
  with pytest.raises(ValueError, match=words):
    data.ArraySource(images, labels, class_names=names)


def test_folder(tmp_path):
  root = make_folder(tmp_path / 'train')
  for name, split in (('folder:' + str(tmp_path), 'train'), ('folder:' + str(root), 'all')):
    source = data.load_source(name, split)
    check(source, 6, 2)
    assert source.class_names == ('ant', 'bee')
    assert [source.read(i)['label'] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(source[4]['image'], data.decode_image(jpeg(photograph(1, 1))))
    assert source.read(4)['name'] == str(root / 'bee' / '1.JPEG')


def test_folder_errors_say_what_is_there(tmp_path):
  make_folder(tmp_path / 'training')
  with pytest.raises(FileNotFoundError, match=r"under 'train'; its folders are training"):
    data.load_source(f'folder:{tmp_path}', 'train')
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    data.load_source(f'folder:{tmp_path}/nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match=r'expected <class>/<image>.*\.jpeg'):
    data.load_source(f'folder:{tmp_path}/empty', 'all')


def test_unreadable_file_is_corrupt_not_a_crash(tmp_path):
  root = make_folder(tmp_path)
  source = data.FolderSource(root)
  (root / 'ant' / '1.JPEG').unlink()
  with pytest.raises(data.CorruptImageError, match='1.JPEG'):
    source[1]


def test_zip(tmp_path):
  members = {
    f'train/{c}/{i}.jpg': jpeg(photograph(i, label))
    for label, c in enumerate(('cat', 'dog'))
    for i in range(2)
  }
  path = make_zip(tmp_path / 'x.zip', {**members, 'train/readme.txt': b'', 'train/cat/._x': b''})
  source = data.load_source(f'zip:{path}', 'train')
  check(source, 4, 2)
  assert source.read(3) == {
    'image': members['train/dog/1.jpg'],
    'label': 1,
    'name': f'{path}!train/dog/1.jpg',
  }
  with pytest.raises(FileNotFoundError, match='its folders are train'):
    data.load_source(f'zip:{path}', 'test')
  # An order of classes other than the alphabet's.
  assert data.ZipSource(path, 'train', class_names=['dog', 'cat'])[3]['label'] == 0
  with pytest.raises(ValueError, match="not among its classes: \\['dog'\\]"):
    data.ZipSource(path, 'train', class_names=['cat'])


@pytest.mark.parametrize(
  'member', ['../cat/x.jpg', '/cat/x.jpg', 'cat/../../x.jpg', 'c:/cat/x.jpg']
)
def test_zip_members_stay_inside(tmp_path, member):
  path = make_zip(tmp_path / 'x.zip', {'cat/0.jpg': b'', member: b''})
  with pytest.raises(ValueError, match='outside of it'):
    data.ZipSource(path)


def test_damaged_zip(tmp_path, monkeypatch):
  good = jpeg(photograph(0, 0))
  path = make_zip(tmp_path / 'x.zip', {'cat/0.jpg': good, 'cat/1.jpg': good})
  whole = path.read_bytes()
  at = whole.index(b'cat/0.jpg') + 200
  path.write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
  source = data.ZipSource(path)
  with pytest.raises(data.CorruptImageError, match=r'x\.zip!cat/0\.jpg'):
    source[0]
  np.testing.assert_array_equal(source[1]['image'], data.decode_image(good))
  # A member that would unpack to more than any image.
  monkeypatch.setattr(_images, 'MAX_BYTES', len(good) - 1)
  with pytest.raises(data.CorruptImageError, match='too many for one image'):
    source[1]
  path.write_bytes(whole[:100])
  with pytest.raises(ValueError, match='is not a zip file'):
    data.ZipSource(path)


def test_cache_decodes_once_and_not_what_is_damaged():
  calls = []

  class Counting(data.Source):
    name, num_classes, class_names = 'counting', 1, ('a',)

    def __len__(self):
      return 2

    def read(self, index):
      calls.append(index)
      return {'image': jpeg(photograph(0, 0)) if index == 0 else b'damaged', 'label': 0}

  source = data.CachedSource(Counting())
  for _ in range(2):
    assert source.read(0)['image'].shape == (80, 96, 3)
    with pytest.raises(data.CorruptImageError):
      source.read(1)
  assert calls == [0, 1, 1]
  assert isinstance(source.encoded(0)['image'], bytes)


def test_synthetic_is_deterministic_and_differs_between_splits():
  a, b, c = (data.load_source('synthetic', s, n=20, size=16) for s in ('train', 'train', 'test'))
  check(a, 20, 10)
  np.testing.assert_array_equal(a.images, b.images)
  assert (a.images != c.images).any()


def test_tfds_in_imagenets_own_format(tmp_path):
  tiny_tfds.write_tiny_imagenet(tmp_path, 5, 3)
  source = data.load_source('tfds:imagenet2012', 'validation', data_dir=tmp_path)
  check(source, 3, 1000)
  assert source.class_names[0] == 'n01440764'
  assert source.read(2)['name'].endswith('validation_0002.JPEG')
  assert isinstance(source.read(2)['image'], bytes)  # decoding is left to the loader's workers
  np.testing.assert_array_equal(source[2]['image'], data.decode_image(jpeg(photograph(10_002, 2))))
  assert len(data.load_source('tfds:imagenet2012', 'train[:40%]', data_dir=tmp_path)) == 2
  with pytest.raises(ValueError, match=r"no split 'test'; it has train, validation"):
    data.load_source('tfds:imagenet2012', 'test', data_dir=tmp_path)


def test_tfds_set_of_any_builder(tmp_path):
  """Found by its files alone: no builder code, another image key, no file names, PNG."""
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['even', 'odd']),
    }
  )
  examples = [{'image': photograph(i, i % 2), 'label': i % 2} for i in range(4)]
  for e in examples:  # encoding arrays is the one thing for which TFDS wants TensorFlow
    out = io.BytesIO()
    Image.fromarray(e['image']).save(out, 'PNG')
    e['image'] = io.BytesIO(out.getvalue())
  tiny_tfds.write_tfds(
    features, tmp_path / 'parity' / '1.2.0', 'parity', '1.2.0', {'train': examples}
  )
  source = data.load_source('tfds:parity', 'train', data_dir=tmp_path)
  check(source, 4, 2)
  assert source.class_names == ('even', 'odd')
  np.testing.assert_array_equal(source[3]['image'], photograph(3, 1))


def test_missing_tfds_set_says_where_and_how(tmp_path):
  with pytest.raises(FileNotFoundError) as e:
    data.load_source('tfds:imagenet2012', 'train', data_dir=tmp_path)
  assert f'{tmp_path}/imagenet2012/5.1.0' in str(e.value)
  assert f'--from tfds:imagenet2012 --download --data_dir {tmp_path}' in str(e.value)
  with pytest.raises(FileNotFoundError, match='neither a TFDS set nor prepared in'):
    data.load_source('tfds:no_such_set', 'train', data_dir=tmp_path)


def test_tensorflow_is_not_needed():
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(
  'name', ['mnist', 'cifar10', 'cifar100', 'tiny_imagenet10', 'imagenet_samples', 'coco_mini']
)
def test_missing_set_says_where_it_looked_and_how_to_get_it(name, tmp_path, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  with pytest.raises(FileNotFoundError, match=f'looked in: {tmp_path}/{name}/') as e:
    data.load_source(name, 'test')
  assert 'Set FQJAX_DATA_DIR' in str(e.value) and "'synthetic' need no files" in str(e.value)
  monkeypatch.delenv('FQJAX_DATA_DIR')
  with pytest.raises(FileNotFoundError, match='FQJAX_DATA_DIR is not set'):
    data.load_source(name, 'test')


def test_unknown_names_list_the_known():
  with pytest.raises(ValueError, match='cifar10, cifar100, .*folder:..., records:'):
    data.load_source('cifar11')
  with pytest.raises(ValueError, match="'nowhere'; it has test, train, val"):
    data.load_source('synthetic', 'nowhere')


def cifar_file(path, images, labels, **changes):
  """The stored form, made by differences: the inverse of what the reader sums up."""
  r, g, b = np.moveaxis(images.astype(np.int64), -1, 0)
  planes = np.stack([g, r - g, b - g])
  for axis in (2, 3):
    planes = np.diff(planes, axis=axis, prepend=0)
  stored = {'residual': (planes % 256).astype(np.uint8), 'label': labels.astype(np.uint8)}
  np.savez(path, **{**stored, **changes})


def test_cifar_reader_and_its_checks(tmp_path, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  (tmp_path / 'cifar10').mkdir()
  path = tmp_path / 'cifar10' / 'cifar10_train.npz'
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
  cifar_file(path, images, np.arange(5))
  source = data.load_source('cifar10', 'train')
  check(source, 5, 10)
  np.testing.assert_array_equal(source.images, images)
  # Kept: the second time nothing is unpacked.
  assert data.load_source('cifar10', 'train').images is source.images
  for changes, words in (
    ({'label': np.full(5, 10, np.uint8)}, 'label 10 is not one of 10 classes'),
    ({'label': np.zeros(4, np.uint8)}, r'expected uint8 residual \[3, n, 32, 32\]'),
    ({'residual': np.zeros((3, 5, 32, 31), np.uint8)}, 'expected'),
    ({'residual': np.zeros((3, 5, 32, 32))}, 'expected'),
    ({'label': np.array([print] * 5, object)}, 'allow_pickle=False'),
  ):
    _named._decode_cifar.cache_clear()
    cifar_file(path, images, np.arange(5), **changes)
    with pytest.raises(ValueError, match=words):
      data.load_source('cifar10', 'train')
  _named._decode_cifar.cache_clear()


def test_photographs_without_labels(tmp_path, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  (tmp_path / 'coco_mini').mkdir()
  for k, (part, count) in enumerate((('train', 3), ('val', 2))):
    members = {f'{part}/{9 - i}.jpg': jpeg(photograph(i, k)) for i in range(count)}
    make_zip(tmp_path / 'coco_mini' / f'{part}_images.zip', {**members, 'readme.txt': b''})
  for split, n in (('train', 3), ('val', 2), ('test', 2), ('all', 5)):
    source = data.load_source('coco_mini', split)
    check(source, n, 1)
    assert {source.read(i)['label'] for i in range(n)} == {0}
  # Sorted by name in each file, the files one after the other.
  np.testing.assert_array_equal(source[0]['image'], data.decode_image(jpeg(photograph(2, 0))))
  np.testing.assert_array_equal(source[3]['image'], data.decode_image(jpeg(photograph(1, 1))))
  assert source.read(4)['name'].endswith('val_images.zip!val/9.jpg')
  make_zip(tmp_path / 'coco_mini' / 'val_images.zip', {'readme.txt': b''})
  with pytest.raises(ValueError, match=r'coco_mini val: no image in .*val_images\.zip'):
    data.load_source('coco_mini', 'val')


def test_idx_reader_and_its_checks(tmp_path):
  path = tmp_path / 'x.gz'
  values = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
  good = bytes([0, 0, 8, 3]) + struct.pack('>3I', 3, 4, 5) + values.tobytes()
  path.write_bytes(gzip.compress(good))
  np.testing.assert_array_equal(_named.read_idx(path, 3), values)
  for bad, words in (
    (good[:-1], 'holds 59 bytes'),
    (good + b'x', 'holds 61 bytes'),
    (b'\0\0\x09\x03' + good[4:], 'not an idx file'),
    (good[:10], 'not an idx file'),
    (good[:4] + struct.pack('>3I', 2**31, 2**31, 4) + good[16:], 'promises'),
  ):
    path.write_bytes(gzip.compress(bad))
    with pytest.raises(ValueError, match=words):
      _named.read_idx(path, 3)
  path.write_bytes(gzip.compress(good)[:-12])
  with pytest.raises(ValueError, match='damaged'):
    _named.read_idx(path, 3)


def sha256(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# Of the decoded bytes, as published beside the files: image, label.
HASHES = {
  ('cifar10', 'test'): (
    'a8d532025a9a2fc557185348adc9c6ae3e000b272afb2b9c8ce51ca4a338518a',
    'c9ecc7f89b2342a050ac144f5fdb8ddcc93e9f213ba06491c919df9cf53da18f',
  ),
  ('cifar100', 'test'): (
    '54bd41679ec2248d96c69252389df4c066e82c544a246b60f86a9ca1ca72f1bc',
    '64d7d6390587bd76db4f1b4295f3010bdafc831b746530d74ce7c196a5008f7d',
  ),
  ('cifar100', 'train'): (
    'ebbd68b39da2047f35eb28b4b47d717c45ddf890a388778b6edca8392de052dc',
    'e5c56cd0a78842d239f5d025a0926ed24de89bba2a0453f06a8793a1ee473102',
  ),
  ('cifar10', 'train'): (
    '5c542bab73abbcd99e73bb6d780590bcb6d02150e009be301a306e46a82fc0c9',
    '0bcc5feeb179fd470db388dc5bdb7de00a2b7656464b0da91fbbda675cd294f7',
  ),
}


@pytest.mark.data
@pytest.mark.parametrize(
  'name,split,n,classes',
  [
    ('cifar10', 'test', 10_000, 10),
    ('cifar100', 'test', 2_000, 100),
    pytest.param('cifar100', 'train', 8_000, 100, marks=pytest.mark.full),
    pytest.param('cifar10', 'train', 30_000, 10, marks=pytest.mark.full),
  ],
)
def test_real_cifar(data_dir, name, split, n, classes):
  source = data.load_source(name, split)
  check(source, n, classes)
  assert (np.bincount(source.labels) == n // classes).all()
  # The labels were hashed as stored, one byte each.
  assert (sha256(source.images), sha256(source.labels.astype(np.uint8))) == HASHES[name, split]


@pytest.mark.data
def test_real_mnist(data_dir):
  counts = {
    'train': [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    'test': [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
  }
  for split, expected in counts.items():
    source = data.load_source('mnist', split)
    check(source, sum(expected), 10)
    assert np.bincount(source.labels).tolist() == expected
    assert source[0]['image'].shape == (28, 28, 3)


@pytest.mark.data
def test_real_tiny_imagenet10(data_dir):
  for split, per_class in (('train', 450), ('test', 50)):
    source = data.load_source('tiny_imagenet10', split, cache=False)
    check(source, 10 * per_class, 10)
    assert np.bincount([source.read(i)['label'] for i in range(len(source))]).tolist() == (
      [per_class] * 10
    )
  assert 'triumphal arch' in str(source.class_names)
  # All 500, grey ones among them, come out as 64 x 64 RGB.
  assert {source[i]['image'].shape for i in range(500)} == {(64, 64, 3)}


@pytest.mark.data
def test_real_imagenet_samples(data_dir):
  source = data.load_source('imagenet_samples', 'test')
  check(source, 250, 1000)
  rows = json.loads((data_dir / 'imagenet_samples' / 'classes.json').read_text())
  labels = [source.read(i)['label'] for i in range(250)]
  assert len(set(labels)) == 250
  for i in (0, 100, 249):
    assert rows[labels[i]][0] in source.read(i)['name']
  assert source.class_names[0] == 'tench'


@pytest.mark.data
def test_real_coco_mini(data_dir):
  parts = [data.load_source('coco_mini', split) for split in ('train', 'val')]
  whole = data.load_source('coco_mini', 'all')
  assert [len(part) for part in parts] == [60, 60] and len(whole) == 120
  names = [part.read(i)['name'] for part in parts for i in range(60)]
  assert [whole.read(i)['name'] for i in range(120)] == names and len(set(names)) == 120
  for part, split in zip(parts, ('train', 'val'), strict=True):
    listed = json.loads((data_dir / 'coco_mini' / f'instances_{split}.json').read_text())['images']
    sizes = {image['file_name']: (image['height'], image['width'], 3) for image in listed}
    for i in (0, 59):
      file_name = part.read(i)['name'].rsplit('!')[-1].rsplit('/')[-1]
      assert part[i]['image'].shape == sizes[file_name]
