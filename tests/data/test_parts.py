"""Parts of a split: disjoint, complete, the same everywhere."""

import zipfile

import numpy as np
import pytest

from fqjax import data
from tests import tiny_tfds
from tests.tiny_tfds import jpeg, photograph

N = 40


def numbered(n=N):
  """Image `i` says which one it is; labels lie sorted, as files do."""
  images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, 2, 2))
  return data.ArraySource(images, np.arange(n) * 4 // n, name='numbered')


def members(source):
  return [int(source[i]['image'][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize(
  'parts',
  [
    [':90%', '90%:'],
    [':33%', '33%:66%', '66%:'],
    [':7', '7:-5', '-5:'],
    ['0:25%', '10:'],
    [':50%', '-20:'],  # a count from the end meets a percentage from the start
  ],
)
def test_complementary_parts_are_disjoint_and_cover_the_source(parts):
  found = [members(data.PartSource(numbered(), part)) for part in parts]
  assert sorted(sum(found, [])) == list(range(N)) and all(found)


def test_sizes_follow_from_percentages_and_counts():
  sizes = {':90%': 36, '90%:': 4, '10%:20%': 4, '5:12': 7, ':-5': 35, '-5:': 5, ':': N, ':1000': N}
  assert {part: len(data.PartSource(numbered(), part)) for part in sizes} == sizes


def test_a_part_is_no_end_of_the_files_and_is_always_the_same():
  part = data.PartSource(numbered(), '90%:')
  # Written down: a run that goes on under another NumPy, or elsewhere, holds out the same images.
  assert members(part) == [19, 26, 29, 31]
  assert members(data.PartSource(numbered(), '90%:')) == members(part)
  # Files lie sorted by class; half of them in that order would be two classes of four.
  half = data.PartSource(numbered(400), ':50%')
  counts = np.bincount([half[i]['label'] for i in range(len(half))])
  assert len(counts) == 4 and counts.min() > 35


def test_what_a_part_says_about_itself():
  source = data.ArraySource(np.zeros((4, 2, 2)), np.arange(4), name='x', class_names=list('abcd'))
  part = data.PartSource(source, ':50%')
  assert (part.name, part.num_classes, part.class_names) == ('x[:50%]', 4, tuple('abcd'))
  assert part.metadata is None
  source.metadata = {'kind': 'coefficients', 'block': 8}
  assert data.PartSource(source, ':50%').metadata == {'kind': 'coefficients', 'block': 8}


@pytest.mark.parametrize(
  'split, words',
  [
    ('train[]', r"cannot read the part \[\]; write '\[:90%\]'"),
    ('train[x]', r'cannot read the part \[x\]'),
    ('train[5]', r'cannot read the part \[5\]'),
    ('train[1.5:]', r'cannot read the part'),
    ('train[::2]', r'cannot read the part'),
    ('train[5:5]', r'synthetic train: no example is left in \[5:5\] of 20'),
    ('train[:0%]', r'no example is left in \[:0%\]'),
    ('nowhere[:50%]', r"synthetic has no split 'nowhere'"),
  ],
)
def test_what_is_no_part_is_an_error(split, words):
  with pytest.raises(ValueError, match=words):
    data.load_source('synthetic', split, n=20, size=8)


def check_parts(name, split, whole):
  """Parts of a source, asked for by name, hold its examples once each."""
  parts = [data.load_source(name, f'{split}[{p}]') for p in (':70%', '70%:')]
  assert all(parts)
  names = [sorted(part.read(i)['name'] for i in range(len(part))) for part in parts]
  assert sorted(names[0] + names[1]) == sorted(whole.read(i)['name'] for i in range(len(whole)))
  for part in parts:
    assert part.num_classes == whole.num_classes and part.class_names == whole.class_names
    assert isinstance(part.read(0)['image'], bytes)  # decoding is left to the loader's workers
    assert part[-1]['image'].dtype == np.uint8
    with pytest.raises(IndexError):
      part[len(part)]


def test_folder_and_zip(tmp_path):
  files = {f'{c}/{i}.jpg': jpeg(photograph(i, k)) for k, c in enumerate('ab') for i in range(5)}
  with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
    for name, content in files.items():
      z.writestr(f'train/{name}', content)
      (tmp_path / 'train' / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / 'train' / name).write_bytes(content)
  for name in (f'folder:{tmp_path}', f'zip:{tmp_path}/x.zip'):
    check_parts(name, 'train', data.load_source(name, 'train'))
  # A folder without splits has parts too.
  check_parts(
    f'folder:{tmp_path}/train', 'all', data.load_source(f'folder:{tmp_path}/train', 'all')
  )


def test_the_loader_reads_parts():
  part = data.load_source('synthetic', 'train[:50%]', n=20, size=8)
  loader = data.Loader(part, 4, repeat=False, process_index=0, process_count=1)
  seen = np.concatenate([b['index'] for b in loader])
  assert sorted(seen[seen >= 0]) == list(range(10))


def test_arrays_are_taken_many_at_once(tmp_path):
  part = data.load_source('synthetic', 'train[50%:]', n=20, size=8)
  many = part.take(np.array([7, 0, 7]))
  for row, i in enumerate((7, 0, 7)):
    np.testing.assert_array_equal(many['image'][row], part[i]['image'])
    assert many['label'][row] == part[i]['label']
  (tmp_path / 'a').mkdir()
  for i in range(4):
    (tmp_path / 'a' / f'{i}.jpg').write_bytes(jpeg(photograph(i, 0)))
  assert data.load_source(f'folder:{tmp_path}', 'all[:50%]').take is None


def test_tfds_slices_itself(tmp_path):
  """Its slices are contiguous and documented there; ours must not be laid over them."""
  tiny_tfds.write_tiny_imagenet(tmp_path, 5, 3)
  part = data.load_source('tfds:imagenet2012', 'train[:40%]', data_dir=tmp_path)
  assert isinstance(part, data.TfdsSource) and len(part) == 2
  whole = data.load_source('tfds:imagenet2012', 'train', data_dir=tmp_path)
  file_names = [s.read(i)['name'].rsplit(maxsplit=1)[-1] for s in (part, whole) for i in (0, 1)]
  assert file_names[:2] == file_names[2:]
