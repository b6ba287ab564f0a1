import json
import logging

import numpy as np
import pytest

from fqjax import data
from fqjax.data import _loader
from tests.tiny_tfds import jpeg, photograph

N = 23
AUGMENT = data.chain(data.pad_crop(2), data.random_flip())


class Encoded(data.Source):
  """Encoded images in memory, some of them damaged."""

  name, num_classes, class_names = 'encoded', 5, tuple('abcde')

  def __init__(self, n=N, damaged=()):
    self._n = n
    self._damaged = frozenset(damaged)

  def __len__(self):
    return self._n

  def read(self, index):
    image = jpeg(photograph(index, index % 5, (16, 24)))
    if index in self._damaged:
      image = image[: len(image) // 2]
    return {'image': image, 'label': index % 5, 'name': f'{index}.jpg'}


def arrays(n=N):
  rng = np.random.default_rng(0)
  return data.ArraySource(rng.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8), np.arange(n) % 5)


def loader(source, batch_size=6, **options):
  return data.Loader(source, batch_size, **{'process_index': 0, 'process_count': 1, **options})


def batches(a_loader, steps=None, state=None):
  it = iter(a_loader)
  if state is not None:
    it.set_state(state)
  out = []
  for batch in it:
    out.append(batch)
    if len(out) == steps:
      break
  it.close()
  return out


def assert_equal(got, want):
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for k in a:
      assert a[k].dtype == b[k].dtype
      np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_a_batch():
  source = arrays()
  (batch,) = batches(loader(source), 1)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'image': ((6, 6, 5, 3), 'uint8'),
    'label': ((6,), 'int32'),
    'mask': ((6,), 'float32'),
    'index': ((6,), 'int64'),
  }
  np.testing.assert_array_equal(batch['image'], source.images[batch['index']])
  np.testing.assert_array_equal(batch['label'], source.labels[batch['index']])


@pytest.mark.parametrize('transform', [None, AUGMENT])
@pytest.mark.parametrize('shuffle', [False, True])
def test_one_pass_sees_each_sample_once_and_pads(transform, shuffle):
  one = loader(arrays(), repeat=False, shuffle=shuffle, transform=transform)
  got = batches(one)
  assert len(got) == len(one) == 4
  index = np.concatenate([b['index'] for b in got])
  mask = np.concatenate([b['mask'] for b in got])
  assert sorted(index[mask > 0]) == list(range(N)) and (index[mask == 0] == -1).all()
  assert mask.tolist() == [1.0] * 23 + [0.0]
  last = got[-1]
  assert (last['image'][-1] == 0).all() and last['label'][-1] == 0
  if not shuffle:
    assert index[:N].tolist() == list(range(N))
  # A second pass of the same loader is the same; iterators do not share a position.
  assert_equal(batches(one), got)


def test_epochs_are_permutations_that_differ():
  index = np.concatenate([b['index'] for b in batches(loader(arrays()), 23)])  # 6 epochs
  epochs = index.reshape(6, N)
  for e in epochs:
    assert sorted(e) == list(range(N))
  assert len({tuple(e) for e in epochs}) == 6
  other = np.concatenate([b['index'] for b in batches(loader(arrays(), seed=1), 4)])
  assert (other[:N] != epochs[0]).any()
  unshuffled = np.concatenate([b['index'] for b in batches(loader(arrays(), shuffle=False), 8)])
  assert (unshuffled == np.arange(48) % N).all()


def test_shuffle_is_uniform():
  places = np.zeros((8, 8))
  for epoch in range(2000):
    places[np.arange(8), _loader.epoch_order(0, epoch, 8)] += 1
  # 250 expected per cell; 5 standard deviations of a binomial.
  assert np.abs(places - 250).max() < 5 * np.sqrt(250 * 7 / 8)


def test_shuffle_never_changes():
  """A run resumed under another NumPy must go on with the same samples."""
  assert _loader.epoch_order(3, 2, 10).tolist() == [3, 0, 6, 5, 2, 9, 7, 1, 4, 8]


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_one_sequence(processes):
  for options in ({'repeat': False}, {'transform': AUGMENT}):
    whole = batches(loader(Encoded(damaged=[4]), **options), 7)
    parts = [
      batches(loader(Encoded(damaged=[4]), process_index=p, process_count=processes, **options), 7)
      for p in range(processes)
    ]
    joined = [
      {k: np.concatenate([b[k] for b in step]) for k in step[0]}
      for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_worker_processes_change_nothing():
  """Sequence, randomness, resuming and the list of damaged files: all as without workers."""
  options = {'transform': AUGMENT, 'seed': 3}
  source = Encoded(damaged=[4, 7])
  plain = iter(loader(source, **options))
  want = [next(plain) for _ in range(9)]
  plain.close()
  it = iter(loader(source, workers=2, **options))
  got = [next(it) for _ in range(9)]
  state = it.get_state()
  it.close()
  assert_equal(got, want)
  assert it.corrupt == plain.corrupt and set(it.corrupt.files) == {'4.jpg', '7.jpg'}
  assert state == plain.get_state()


@pytest.mark.parametrize('prefetch', [0, 1, 5])
def test_prefetch_changes_nothing(prefetch):
  want = batches(loader(Encoded(), transform=AUGMENT), 8)
  assert_equal(batches(loader(Encoded(), transform=AUGMENT, prefetch=prefetch), 8), want)


def test_randomness_belongs_to_the_sample_not_to_the_step():
  """The same sample in another epoch is augmented differently; in another batch size it is not."""
  draw = lambda example, rng: {**example, 'image': np.full((1, 1, 3), rng.random(), np.float64)}

  def values(batch_size, steps):
    got = batches(loader(arrays(), batch_size, transform=draw), steps)
    return np.concatenate([b['image'][:, 0, 0, 0] for b in got])

  assert len(set(values(6, 23))) == 6 * N
  np.testing.assert_array_equal(values(6, 10), values(10, 6))
  assert abs(values(6, 100).mean() - 0.5) < 0.05


@pytest.mark.parametrize('repeat', [False, True])
def test_resumes_at_any_step(repeat):
  make = lambda: loader(Encoded(), transform=AUGMENT, repeat=repeat)
  it = iter(make())
  states, seen = [it.get_state()], []
  for _ in range(4):
    seen.append(next(it))
    states.append(it.get_state())
  it.close()
  for step in range(4):
    state = json.loads(json.dumps(states[step]))
    assert_equal(batches(make(), 4 - step, state), seen[step:])
  # Also backwards, in the iterator itself.
  it.set_state(states[1])
  assert_equal([next(it)], seen[1:2])
  it.close()
  if not repeat:
    assert batches(make(), state=states[4]) == []


def test_resuming_far_into_a_run_takes_no_time():
  """Position is a number: the millionth step is found without making those before it."""
  a_loader = loader(arrays())
  it = iter(a_loader)
  it.set_state({**it.get_state(), 'step': 10**6})
  batch = next(it)
  it.close()
  first = 6 * 10**6
  want = [_loader.epoch_order(0, (first + i) // N, N)[(first + i) % N] for i in range(6)]
  assert batch['index'].tolist() == want


def test_position_is_the_same_on_any_number_of_processes():
  state = iter(loader(arrays())).get_state()
  it = iter(loader(arrays(), process_index=1, process_count=2))
  it.set_state(state)
  assert it.get_state() == state


def test_position_of_other_samples_is_refused():
  state = iter(loader(arrays())).get_state()
  for other in (loader(arrays(), 8), loader(arrays(24)), loader(arrays(), seed=1)):
    with pytest.raises(ValueError, match='belongs to other samples'):
      iter(other).set_state(state)
  with pytest.raises(ValueError, match='batch_size 6 -> 8'):
    iter(loader(arrays(), 8)).set_state(state)


def test_damaged_images_keep_their_place(caplog):
  source, good = Encoded(damaged=[4, 7]), Encoded()
  it = iter(loader(source, transform=AUGMENT))
  with caplog.at_level(logging.WARNING):
    got = [next(it) for _ in range(12)]  # three epochs and a bit
  it.close()
  want = batches(loader(good, transform=AUGMENT), 12)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a['index'], b['index'])
    bad = np.isin(a['index'], [4, 7])
    np.testing.assert_array_equal(a['mask'], ~bad)
    np.testing.assert_array_equal(a['image'][~bad], b['image'][~bad])
    assert (a['image'][bad] == 0).all()
  seen = np.concatenate([a['index'] for a in got])
  assert it.corrupt.count == np.isin(seen, [4, 7]).sum() >= 6
  assert set(it.corrupt.files) == {'4.jpg', '7.jpg'}
  # Once per file, with the name and the byte.
  lines = [r.message for r in caplog.records if r.name.startswith('fqjax')]
  assert len(lines) == 2
  assert all(' at byte ' in line and line.endswith('; skipped') for line in lines)


def test_strict_stops_with_name_and_offset():
  it = iter(loader(Encoded(damaged=[2]), strict=True, shuffle=False, batch_size=2))
  next(it)
  with pytest.raises(data.CorruptImageError, match=r'2\.jpg at byte \d+') as e:
    next(it)
  assert e.value.name == '2.jpg' and e.value.offset > 0


def test_a_batch_of_nothing_but_damage_has_a_shape():
  got = batches(loader(Encoded(damaged=range(6)), shuffle=False), 2)
  assert got[0]['image'].shape == got[1]['image'].shape == (6, 16, 24, 3)
  assert got[0]['mask'].sum() == 0 and got[1]['mask'].sum() == 6
  with pytest.raises(ValueError, match='no image of encoded can be decoded'):
    batches(loader(Encoded(damaged=range(N))), 1)


def test_process_whose_last_slice_is_all_padding():
  got = batches(
    loader(Encoded(7), repeat=False, process_index=2, process_count=3, transform=AUGMENT)
  )
  assert [b['mask'].tolist() for b in got] == [[1, 1], [0, 0]]
  assert got[1]['image'].shape == (2, 16, 24, 3)


def test_mistakes_in_transforms_are_not_taken_for_damage():
  def mistake(example, rng):
    raise KeyError('mistake')

  with pytest.raises(KeyError, match='mistake'):
    batches(loader(Encoded(), transform=mistake), 1)


def test_images_of_different_sizes_name_the_way_out():
  class Mixed(Encoded):
    def read(self, index):
      return {**super().read(index), 'image': jpeg(photograph(0, 0, (16 + index, 24)))}

  with pytest.raises(ValueError, match=r'1\.jpg has image \[17, 24, 3\].*resize_crop'):
    batches(loader(Mixed(), shuffle=False), 1)
  fine = loader(Mixed(), shuffle=False, transform=data.resize_crop(16, 16))
  assert batches(fine, 1)[0]['image'].shape == (6, 16, 16, 3)


def test_any_object_with_length_and_items_is_a_source():
  items = [{'image': np.full((2, 2, 3), i, np.uint8), 'label': i} for i in range(4)]
  (batch,) = batches(loader(items, 4, shuffle=False), 1)
  assert batch['image'][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
  with pytest.raises(ValueError, match=r"must have 'image'.*\['picture'\]"):
    batches(loader([{'picture': 0}], 1), 1)


def test_coefficients_are_handed_out_under_their_own_name():
  items = [{'coefficients': np.full((2, 2, 6), i, np.int16), 'label': i} for i in range(4)]
  (batch,) = batches(loader(items, 4, shuffle=False), 1)
  assert batch['coefficients'].shape == (4, 2, 2, 6) and batch['coefficients'].dtype == np.int16
  assert 'image' not in batch


@pytest.mark.parametrize(
  'options,words',
  [
    ({'batch_size': 6, 'process_count': 4}, 'over 4 processes.*next that fits is 8'),
    ({'batch_size': 0}, 'next that fits is 1'),
    ({'process_index': 1}, 'not one of 1 processes'),
    ({'seed': -1}, 'negative'),
    ({'workers': -1}, 'negative'),
  ],
)
def test_settings_that_do_not_fit(options, words):
  with pytest.raises(ValueError, match=words):
    loader(arrays(), **options)


def test_process_defaults_come_from_jax():
  assert next(iter(data.Loader(arrays(), 6, prefetch=0)))['label'].shape == (6,)


def test_lengths():
  assert len(loader(arrays(), repeat=False)) == 4
  assert len(loader(arrays())) == 3
  assert len(loader(arrays(), 100)) == 1
  # A batch larger than the set: several epochs in one.
  (batch,) = batches(loader(arrays(), 50), 1)
  assert sorted(batch['index'][:N]) == list(range(N)) and batch['mask'].all()
