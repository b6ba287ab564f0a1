"""The task of naming the phoneme of every frame of speech, from features of the user's own.

TIMIT may not be passed on, so nothing is downloaded. `load_speech` reads one .npz with nine arrays,
three for each PART of 'train', 'valid' and 'test':

  PART_features   float [frames, size], e.g. filter banks with their differences, normalised with
                  mean and deviation of the training part
  PART_labels     integers [frames], the phoneme of each frame, from 0
  PART_lengths    integers [utterances], frames of each utterance, one after the other
"""

from collections.abc import Mapping
import pathlib
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks import Task, split
from fqjax import data as fd
from fqjax import sparsity, train

PARTS = ('train', 'valid', 'test')


class Speech(NamedTuple):
  """Utterances of one part, one after the other.

  Attributes:
    features: float32 [frames, size].
    labels: int32 [frames].
    lengths: int64 [utterances], frames of each.
  """

  features: np.ndarray
  labels: np.ndarray
  lengths: np.ndarray


def load_speech(path: str | pathlib.Path) -> dict[str, Speech]:
  """Reads features and phonemes; see the module's docstring for the file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: an array is missing or does not fit the others; says which.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(
      f'{path.absolute()} is not there. Name your features by --config.data.path=FILE.npz; what it '
      'holds is said in experiments/speech.py.'
    )
  with np.load(path, allow_pickle=False) as file:
    wanted = [f'{part}_{name}' for part in PARTS for name in Speech._fields]
    if missing := [name for name in wanted if name not in file.files]:
      raise ValueError(f'{path} has no {", ".join(missing)}; it has {", ".join(file.files)}.')
    parts = {p: Speech(*(file[f'{p}_{name}'] for name in Speech._fields)) for p in PARTS}
  return {name: _checked(f'{path}, {name}', part, parts['train']) for name, part in parts.items()}


def _checked(where: str, part: Speech, train_part: Speech) -> Speech:
  features, labels, lengths = part
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not features.size:
    raise ValueError(f'{where}_features must be floats [frames, size], got {_what(features)}.')
  for name, x in (('labels', labels), ('lengths', lengths)):
    if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
      raise ValueError(f'{where}_{name} must be integers [n], got {_what(x)}.')
  frames, size = features.shape
  if len(labels) != frames or lengths.sum() != frames or lengths.min(initial=1) < 1:
    raise ValueError(
      f'{where}: {frames} frames of features, {len(labels)} labels, and {len(lengths)} utterances '
      f'with {lengths.sum()} frames; the three must agree, and no utterance be empty.'
    )
  if size != train_part.features.shape[1]:
    raise ValueError(
      f'{where}_features have {size} numbers a frame, those of train '
      f'{train_part.features.shape[1]}.'
    )
  if not np.isfinite(features).all():
    raise ValueError(f'{where}_features hold NaN or infinite numbers.')
  known = int(train_part.labels.max(initial=0)) + 1
  if labels.min() < 0 or labels.max() >= known:
    raise ValueError(
      f'{where}_labels are {labels.min()}..{labels.max()}; those of train are 0..{known - 1}.'
    )
  return Speech(features.astype(np.float32), labels.astype(np.int32), lengths.astype(np.int64))


def _what(x: np.ndarray) -> str:
  return f'{x.dtype}{list(x.shape)}'


class Pieces:
  """A part cut into pieces of at most `length` frames, padded: a source for the loader.

  Attributes:
    name: for errors.
    arrays: 'features' float32 [n, length, size], 'label' int32 [n, length], 'weight' float32
      [n, length], 0 where there is no frame.
  """

  def __init__(self, part: Speech, length: int, name: str = 'speech'):
    pieces = []
    for begin, count in zip(np.cumsum(part.lengths) - part.lengths, part.lengths, strict=True):
      pieces += [(b, min(length, begin + count - b)) for b in range(begin, begin + count, length)]
    starts, counts = np.array(pieces).T
    place = np.arange(length)
    inside = place < counts[:, None]
    frame = np.where(inside, starts[:, None] + place, 0)
    self.name = name
    self.arrays = {
      'features': part.features[frame] * inside[..., None].astype(np.float32),
      'label': np.where(inside, part.labels[frame], 0).astype(np.int32),
      'weight': inside.astype(np.float32),
    }

  def __len__(self) -> int:
    return len(self.arrays['label'])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: x[index] for name, x in self.arrays.items()}

  def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Many pieces at once."""
    return {name: x[indices] for name, x in self.arrays.items()}


class SpeechLstm(nn.Module):
  """LSTM layers over frames, a dense layer on each; every gate has a kernel of its own.

  Attributes:
    num_classes: phonemes.
    hidden: units of each layer.
    num_layers: LSTM layers.
    dropout: share of the units dropped in training behind every layer.
  """

  num_classes: int
  hidden: int = 1024
  num_layers: int = 2
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [n, frames, num_classes] of `x` [n, frames, size]."""
    for i in range(self.num_layers):
      x = nn.RNN(nn.OptimizedLSTMCell(self.hidden, name=f'lstm{i}'), name=f'layer{i}')(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name='output')(x)


def frame_classifier(
  model: SpeechLstm,
  parts: Mapping[str, Speech],
  *,
  batch_size: int = 32,
  length: int = 400,
  mesh=None,
) -> Task:
  """The task of naming the phoneme of every frame; the score of a frame is 1 if it is right.

  Args:
    model: the network.
    parts: of `load_speech`; learns from 'train', scores on 'test' and, as 'held_out', on 'valid'.
    batch_size: pieces per batch, over all devices.
    length: frames of a piece; an utterance that is longer begins anew there.
    mesh: devices; all by default.
  """
  pieces = {name: Pieces(part, length, name) for name, part in parts.items()}
  x = pieces['train'].arrays['features'][:1]

  def fresh(key):
    return split(jax.jit(model.init)({'params': key}, x))

  def loss_fn(params, model_state, batch, key):
    logits = model.apply({'params': params}, batch['features'], train=True, rngs={'dropout': key})
    weight = batch['weight'] / jnp.maximum(batch['weight'].sum(), 1)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    right = jnp.sum(weight, where=logits.argmax(-1) == batch['label'])
    return jnp.sum(weight * found), (model_state, {'top1': right})

  def loader(seed):
    return fd.Loader(pieces['train'], batch_size, seed=seed)

  predict = train.make_eval_step(
    lambda params, model_state, batch: {
      'right': model.apply({'params': params, **model_state}, batch['features']).argmax(-1)
      == batch['label'],
      'weight': batch['weight'],
    },
    mesh=mesh,
  )

  def correctness(variables, source):
    batches = fd.Loader(source, batch_size, shuffle=False, repeat=False)
    found = [jax.device_get(predict(*variables, train.shard_batch(b, mesh))) for b in batches]
    right, weight = (np.concatenate([f[k] for f in found]) for k in ('right', 'weight'))
    return right[weight > 0].astype(np.float64)

  scored = {'test': pieces['test'], 'held_out': pieces['valid']}
  return Task(
    init=fresh,
    loss_fn=loss_fn,
    loader=loader,
    steps_per_epoch=len(loader(0)),
    score=lambda variables: {part: correctness(variables, s) for part, s in scored.items()},
    calibration=lambda: (),
    advance=None,
    layers=sparsity.trace_layers(
      lambda params, x: model.apply({'params': params}, x),
      jax.eval_shape(fresh, jax.random.key(0)).params,
      jax.ShapeDtypeStruct(x.shape, x.dtype),
    ),
  )
