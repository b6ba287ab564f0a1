"""Features of speech: the file and its errors, pieces, scores of frames."""

import re

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest

from configs import darb as configs
from experiments import speech
from fqjax import train


def arrays(**changes):
  rng = np.random.default_rng(0)
  found = {}
  for part, lengths in (('train', (7, 3, 12)), ('valid', (5, 4)), ('test', (6,))):
    n = sum(lengths)
    found[f'{part}_features'] = rng.normal(size=(n, 4))
    found[f'{part}_labels'] = np.arange(n) % 3
    found[f'{part}_lengths'] = np.array(lengths)
  return found | changes


def write(folder, **changes):
  found = {k: v for k, v in arrays(**changes).items() if v is not None}
  np.savez(folder / 'speech.npz', **found)
  return folder / 'speech.npz'


def test_parts_are_read_and_cut_into_pieces(tmp_path):
  parts = speech.load_speech(write(tmp_path))
  train_part = parts['train']
  assert train_part.features.dtype == np.float32 and train_part.labels.dtype == np.int32
  pieces = speech.Pieces(train_part, 5)
  got = pieces.take(np.arange(len(pieces)))
  # 7, 3 and 12 frames are 5 + 2, 3, 5 + 5 + 2.
  assert got['weight'].sum(1).tolist() == [5, 2, 3, 5, 5, 2]
  inside = got['weight'] > 0
  np.testing.assert_array_equal(got['features'][inside], train_part.features)
  np.testing.assert_array_equal(got['label'][inside], train_part.labels)
  assert not got['features'][~inside].any()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'valid_labels': None}, r'has no valid_labels; it has'),
    ({'test_features': np.ones((6, 4), int)}, r'test_features must be floats \[frames, size\]'),
    ({'test_features': np.ones((6, 5))}, r'have 5 numbers a frame, those of train 4'),
    ({'test_features': np.full((6, 4), np.nan)}, r'hold NaN'),
    ({'test_labels': np.ones(6)}, r'test_labels must be integers \[n\], got float64\[6\]'),
    ({'test_labels': np.full(6, 3)}, r'are 3..3; those of train are 0..2'),
    ({'test_lengths': np.array([4])}, r'1 utterances with 4 frames; the three must agree'),
    ({'test_lengths': np.array([6, 0])}, r'no utterance be empty'),
    ({'test_lengths': np.array([object()])}, r'allow_pickle=False'),
  ],
)
def test_files_that_do_not_do(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    speech.load_speech(write(tmp_path, **changes))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config.data.path=FILE.npz'):
    speech.load_speech(tmp_path / 'timit.npz')


@pytest.mark.promotes('Flax, optax')
def test_every_frame_is_scored_once_in_order(tmp_path):
  parts = speech.load_speech(write(tmp_path))
  model = speech.SpeechLstm(3, hidden=6, num_layers=1, dropout=0.5)
  task = speech.frame_classifier(model, parts, batch_size=2, length=12, mesh=train.make_mesh(1))
  variables = task.init(jax.random.key(0))
  found = task.score(variables)
  assert {k: len(v) for k, v in found.items()} == {'test': 6, 'held_out': 9}
  # Whole utterances here, so padding behind them must change nothing.
  want, begin = [], 0
  for n in (5, 4):
    x = parts['valid'].features[None, begin : begin + n]
    logits = model.apply({'params': variables.params}, x)[0]
    want += (np.argmax(logits, -1) == parts['valid'].labels[begin : begin + n]).tolist()
    begin += n
  np.testing.assert_array_equal(found['held_out'], want)
  loss, (_, metrics) = task.loss_fn(*variables, next(iter(task.loader(0))), jax.random.key(0))
  assert 0.5 < float(loss) < 3 and 0 <= float(metrics['top1']) <= 1


def test_every_gate_has_a_kernel_that_the_configuration_prunes():
  x = jax.ShapeDtypeStruct((1, 4, 4), np.float32)
  params = jax.eval_shape(speech.SpeechLstm(3, hidden=6).init, jax.random.key(0), x)['params']
  kernels = {path for path in flatten_dict(params, sep='/') if path.endswith('kernel')}
  ((pattern, _),) = configs.get_config('timit').prune
  gates = {f'lstm{i}/{part}{g}/kernel' for i in (0, 1) for part in 'ih' for g in 'ifgo'}
  assert kernels == gates | {'output/kernel'}
  assert {path for path in kernels if re.fullmatch(pattern, path)} == gates
