import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fqjax import data
from fqjax.data import _text

PTB = {
  'train': ' the cat <unk> N times \n the dog sat \n',
  'valid': ' the fish sat \n',
  'test': ' a dog \n',
}


def write_ptb(folder, **changes):
  for part, text in (PTB | changes).items():
    if text is not None:
      (folder / f'ptb.{part}.txt').write_text(text)
  return f'ptb:{folder}'


def write_library(folder, modules):
  for name, source in modules.items():
    path = folder / f'{name}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
  _text._python_docs.cache_clear()
  return str(folder)


def test_ptb(tmp_path):
  text = data.load_text(write_ptb(tmp_path))
  # By frequency in the training part, then by the alphabet; the two special ones in front.
  assert text.vocabulary == ('<unk>', '<eos>', 'the', 'N', 'cat', 'dog', 'sat', 'times')
  assert text.train.tolist() == [2, 4, 0, 3, 7, 1, 2, 5, 6, 1]
  assert text.valid.tolist() == [2, 0, 6, 1] and text.test.tolist() == [0, 5, 1]
  assert text.train.dtype == np.int32 and not text.train.flags.writeable
  assert text.decode(text.valid) == 'the <unk> sat <eos>'
  for words in (['dog', 'wolf'], 'dog wolf'):
    np.testing.assert_array_equal(text.encode(words), [5, 0])
  facts = json.loads(json.dumps(text.facts()))
  assert facts['words'] == {'train': 10, 'valid': 4, 'test': 3} and facts['vocabulary'] == 8
  assert facts['unknown'] == {'train': 0.1, 'valid': 0.25, 'test': pytest.approx(1 / 3)}
  assert 'train 10, valid 4, test 3 words, vocabulary 8' in repr(text)


def test_the_vocabulary_is_cut_where_asked_and_the_hash_stays(tmp_path):
  name = write_ptb(tmp_path)
  small, whole = data.load_text(name, vocab_size=4), data.load_text(name, vocab_size=None)
  assert small.vocabulary == whole.vocabulary[:4] and len(whole.vocabulary) == 8
  assert small.train.tolist() == [2, 0, 0, 3, 0, 1, 2, 0, 0, 1]
  assert small.sha256 == whole.sha256
  # A word that moves from one part to another is another text.
  write_ptb(tmp_path, valid=' the fish sat \n a \n', test=' dog \n')
  assert data.load_text(name).sha256 != whole.sha256


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'valid': None, 'test': None}, FileNotFoundError, r'has no ptb.valid.txt, ptb.test.txt. PATH'),
    ({'test': ''}, ValueError, r"the part 'test' holds no words"),
    ({'train': '\n\n'}, ValueError, r"the part 'train' holds no words"),
  ],
)
def test_ptb_files_that_do_not_do(changes, error, message, tmp_path):
  with pytest.raises(error, match=message):
    data.load_text(write_ptb(tmp_path, **changes))


def test_other_errors(tmp_path):
  name = write_ptb(tmp_path)
  (tmp_path / 'ptb.valid.txt').write_bytes(b'caf\xe9')
  with pytest.raises(ValueError, match=r'ptb.valid.txt is no UTF-8 text'):
    data.load_text(name)
  for unknown in ('wikitext', 'ptb:', 'python_docs:3'):
    with pytest.raises(ValueError, match=r"unknown text .*: choose 'python_docs' or 'ptb:PATH'"):
      data.load_text(unknown)
  with pytest.raises(ValueError, match='at least one word, got 2'):
    data.load_text('python_docs', vocab_size=2)


def test_docstrings_of_a_small_library(tmp_path):
  folder = write_library(
    tmp_path,
    {
      'alpha': '"""First. It\'s 2 words!\n\nNext: x_y."""\nraise SystemExit("imported")\n'
      'if True:\n  class A:\n    """Of A."""\n    async def f(self):\n      """Of f."""\n'
      'x = "no docstring"\ntry:\n  pass\nexcept OSError:\n  def g():\n    """Of g."""\n',
      'pkg/__init__': '"""Of a package."""\n',
      # Said before; and an old escape.
      'pkg/beta': '"""Of A."""\n"\\d"\ndef f():\n  """Of an escape."""\n',
      'latin': b'# coding: latin-1\n"""Caf\xe9."""\n',
      'broken': 'def (',
      'test/gamma': '"""Not this."""\n',
      'site-packages/delta': '"""Nor this."""\n',
      'not-a-package/epsilon': '"""Nor this."""\n',
    },
  )
  parts = _text._python_docs(folder)
  alpha = "first <eos> it's N words <eos> next x y <eos> of a <eos> of f <eos> of g <eos>"
  want = {part: [] for part in ('train', 'valid', 'test')}
  for module, words in (
    ('alpha', alpha.split()),
    ('latin', ['café', '<eos>']),
    ('pkg.__init__', ['of', 'a', 'package', '<eos>']),
    ('pkg.beta', ['of', 'an', 'escape', '<eos>']),
  ):
    want[_text._part_of(module)] += words
  assert parts == want


def test_modules_keep_their_part_and_share_no_docstring(tmp_path):
  modules = {f'm{i}': f'"""Words of {"a" * i} module."""\n' for i in range(60)}
  parts = _text._python_docs(write_library(tmp_path / 'all', modules))
  sentences = {part: set(' '.join(words).split(' <eos>')) - {''} for part, words in parts.items()}
  assert sum(map(len, sentences.values())) == 60
  assert all(sentences.values()) and len(set.union(*sentences.values())) == 60
  some = {name: modules[name] for name in list(modules)[::2]}
  fewer = _text._python_docs(write_library(tmp_path / 'some', some))
  for part, words in fewer.items():
    assert set(' '.join(words).split(' <eos>')) - {''} <= sentences[part]


def test_a_library_without_sources(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no docstring in the .py files of .*ptb:PATH'):
    _text._python_docs(write_library(tmp_path, {'a': 'x = 1\n'}))


@pytest.fixture(scope='module')
def docs():
  return data.load_text('python_docs')


def test_the_docstrings_of_this_python(docs):
  assert docs.name.startswith('python_docs ')
  facts = docs.facts()
  # Wide bounds: every version of Python has its own text.
  assert facts['words']['train'] > 150_000 and 3_000 < facts['vocabulary'] <= 10_000
  for part in ('valid', 'test'):
    assert 0.02 < facts['words'][part] / facts['words']['train'] < 0.3
    assert 0.01 < facts['unknown'][part] < 0.1
  # Else no model could learn to expect it.
  assert 0.005 < facts['unknown']['train'] < 0.05
  assert {'the', 'a', 'of', 'return', 'file', 'N'} <= set(docs.vocabulary[:200])
  counts = np.bincount(docs.train)
  assert (counts[2:] >= 2).all() and (np.diff(counts[2:]) <= 0).all()


def test_it_is_the_same_in_another_process(tmp_path):
  modules = {f'{c}/{d}': f'"""Words of {c} and {d}."""\n' for c in 'abc' for d in 'defghijk'}
  folder = write_library(tmp_path, modules)
  code = (
    'from fqjax.data import _text\n'
    f'print(_text._text("x", _text._python_docs({folder!r}), None, 1).sha256)'
  )
  # Another seed, another order of every set.
  found = [
    subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True,
      env={**os.environ, 'PYTHONHASHSEED': seed},
    ).stdout
    for seed in ('1', '2')
  ]  # fmt: skip
  assert found[0] == found[1] and len(found[0]) == 65


def batches(*args, steps=None, **options):
  iterator = iter(data.batched(*args, **{'process_index': 0, 'process_count': 1, **options}))
  return [batch for _, batch in zip(range(steps or 100), iterator)]


def test_rows_go_on_where_they_ended():
  words = np.arange(100, 131)
  got = batches(words, 3, 4, steps=5)
  # 31 words are three streams of ten, each with the word behind; two whole batches in each.
  for step, batch in enumerate(got):
    place = step % 2
    begin = 100 + 10 * np.arange(3)[:, None] + 4 * place + np.arange(4)
    np.testing.assert_array_equal(batch['input'], begin, strict=False)
    np.testing.assert_array_equal(batch['target'], begin + 1)
    assert batch['first'].tolist() == [place == 0] * 3 and (batch['mask'] == 1).all()
  assert {k: (v.shape, v.dtype.name) for k, v in got[0].items()} == {
    'input': ((3, 4), 'int32'),
    'target': ((3, 4), 'int32'),
    'mask': ((3, 4), 'float32'),
    'first': ((3,), 'bool'),
  }


@pytest.mark.parametrize(('n', 'batch_size', 'length'), [(31, 3, 4), (20, 1, 7), (33, 4, 8)])
def test_one_pass_sees_every_word_once_and_pads(n, batch_size, length):
  got = batches(np.arange(n), batch_size, length, repeat=False)
  assert len(got) == len(data.batched(np.arange(n), batch_size, length, repeat=False))
  mask = np.concatenate([batch['mask'] for batch in got], 1) > 0
  target = np.concatenate([batch['target'] for batch in got], 1)
  used = (n - 1) // batch_size * batch_size
  np.testing.assert_array_equal(target[mask], np.arange(1, used + 1))
  assert (target[~mask] == 0).all()
  assert [bool(batch['first'].all()) for batch in got] == [True] + [False] * (len(got) - 1)


def test_processes_share_the_streams():
  words = np.arange(50)
  whole = batches(words, 6, 3, steps=3)
  parts = [batches(words, 6, 3, steps=3, process_index=i, process_count=2) for i in (0, 1)]
  for step, batch in enumerate(whole):
    for name, rows in batch.items():
      np.testing.assert_array_equal(np.concatenate([p[step][name] for p in parts]), rows)


def test_a_position_is_saved_and_restored():
  words = np.arange(50)
  iterator = iter(data.batched(words, 2, 5, process_index=0, process_count=1))
  for _ in range(6):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  want = [next(iterator) for _ in range(3)]
  again = iter(data.batched(words, 2, 5, process_index=0, process_count=1))
  again.set_state(state)
  for batch in want:
    for name, rows in next(again).items():
      np.testing.assert_array_equal(rows, batch[name])
  other = iter(data.batched(words, 2, 4, process_index=0, process_count=1))
  with pytest.raises(ValueError, match=r'other batches \(length 5 -> 4\)'):
    other.set_state(state)
  with pytest.raises(ValueError, match=r'other batches'):
    again.set_state({'step': 3})


@pytest.mark.parametrize(
  ('words', 'batch_size', 'length', 'options', 'message'),
  [
    (np.ones(9), 2, 2, {}, r'takes integers \[n\], got float64\[9\]'),
    (np.ones((3, 3), int), 2, 2, {}, r'got int64\[3, 3\]'),
    (np.arange(9), 0, 2, {}, r'batch_size=0'),
    (np.arange(9), 2, 0, {}, r'length=0'),
    (np.arange(9), 3, 1, {'process_count': 2}, r'divide among the processes'),
    (np.arange(9), 2, 1, {'process_index': 1}, r'process_index=1 is not one of 1'),
    (np.arange(9), 2, 5, {}, r'9 words are too few for 2 streams of 5 words and one behind'),
    (np.arange(2), 2, 5, {'repeat': False}, r'2 words are too few for 2 streams of 1 words'),
  ],
)
def test_batches_that_cannot_be(words, batch_size, length, options, message):
  with pytest.raises(ValueError, match=message):
    batches(words, batch_size, length, **options)
