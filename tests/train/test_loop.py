import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

from fqjax.data import Corrupt
from fqjax.train import (
  CheckpointError,
  NonFiniteError,
  create_state,
  fit,
  loop,
  make_mesh,
  make_train_step,
  read_json_lines,
)
from tests.train import toy

TIMING = ('images_per_second', 'seconds', 'memory_bytes', 'compiles')


def train(workdir, total=12, *, loader=None, mesh=None, setup=None, **options):
  mesh = mesh or make_mesh(1)
  state, step = setup or toy.setup(mesh)
  options = dict(log_every=3, checkpoint_every=4, progress=False, mesh=mesh) | options
  return fit(state, step, loader or toy.Loader(), workdir=workdir, total_steps=total, **options)


def numbers(history):
  return [{k: v for k, v in r.items() if k not in TIMING} for r in history]


def events(folder):
  """Scalars of all event files: {(tag, step): value}, and the purge marks, without TensorBoard."""
  points, purges = {}, []
  for file in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[12 + size + 4 :]
      if event.HasField('session_log'):
        purges.append(event.step)
      for value in event.summary.value:
        points[value.tag, event.step] = value.simple_value
  return points, purges


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, train(workdir)


def test_run_writes_what_it_says(uninterrupted, capsys):
  workdir, result = uninterrupted
  assert int(result.state.step) == 12
  assert read_json_lines(workdir / 'metrics.jsonl') == result.history
  # Reports every 3 steps and at the checkpoints of steps 4, 8, 12.
  assert [r['step'] for r in result.history] == [3, 4, 6, 8, 9, 12]
  assert [r['images'] for r in result.history] == [16 * s for s in (3, 4, 6, 8, 9, 12)]
  assert all(r['recompiles'] == 0 and r['memory_bytes'] > 1e6 for r in result.history)
  points, purges = events(workdir / 'tb')
  assert not purges
  for record in result.history:
    np.testing.assert_allclose(points['loss', record['step']], record['loss'], rtol=1e-6)
  # Oracle for the means: the losses of the steps themselves.
  state, step = toy.setup(make_mesh(1))
  losses = []
  for i in range(6):
    state, metrics = step(state, toy.make_batch(i))
    losses.append(float(metrics['loss']))
  np.testing.assert_allclose(result.history[0]['loss'], np.mean(losses[:3]), rtol=1e-6)
  np.testing.assert_allclose(result.history[2]['loss'], np.mean(losses[4:6]), rtol=1e-6)


def test_resumed_run_is_bit_identical(uninterrupted, tmp_path, capsys):
  _, whole = uninterrupted
  train(tmp_path, 8)
  with open(tmp_path / 'metrics.jsonl', 'a') as f:  # what a run killed after step 8 leaves
    f.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
  result = train(tmp_path, 12)
  assert 'Continuing from step 8 of 12' in capsys.readouterr().out
  toy.assert_identical(result.state, whole.state)
  assert numbers(result.history) == numbers(whole.history)
  assert numbers(read_json_lines(tmp_path / 'metrics.jsonl')) == numbers(whole.history)
  points, purges = events(tmp_path / 'tb')
  assert purges == [9]
  assert {s for _, s in points} == {3, 4, 6, 8, 9, 12}
  again = train(tmp_path, 12)  # nothing left to do
  toy.assert_identical(again.state, whole.state)
  assert again.history == result.history


def test_resume_on_other_number_of_devices(uninterrupted, tmp_path):
  _, whole = uninterrupted
  train(tmp_path, 8, mesh=make_mesh(8))
  result = train(tmp_path, 12, mesh=make_mesh(2))
  for name, x in toy.leaves(result.state).items():
    np.testing.assert_allclose(x, toy.leaves(whole.state)[name], rtol=1e-3, atol=1e-5)
  assert [r['step'] for r in result.history] == [r['step'] for r in whole.history]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(uninterrupted, tmp_path, capsys, number):
  _, whole = uninterrupted
  mesh = make_mesh(1)
  state, step = toy.setup(mesh)

  def signalled(state, batch):
    if int(state.step) == 4:
      os.kill(os.getpid(), number)
    return step(state, batch)

  before = signal.getsignal(number)
  with pytest.raises((SystemExit, KeyboardInterrupt)) as e:
    train(tmp_path, setup=(state, signalled))
  assert signal.getsignal(number) is before
  if number == signal.SIGTERM:
    assert e.value.code == 143
  else:
    assert e.type is KeyboardInterrupt
  name = signal.Signals(number).name
  assert f'{name} received at step 5: checkpoint saved' in capsys.readouterr().out
  assert (tmp_path / 'checkpoints' / '5' / 'fqjax.json').is_file()
  toy.assert_identical(train(tmp_path).state, whole.state)


@pytest.mark.parametrize('moment', ['last step', 'last evaluation'])
def test_signal_at_the_end_leaves_too(uninterrupted, tmp_path, capsys, moment):
  """Whoever trains several networks in a row must not go on to the next one."""
  _, whole = uninterrupted
  state, step = toy.setup(make_mesh(1))

  def signalled(state, batch):
    if moment == 'last step' and int(state.step) == 11:
      os.kill(os.getpid(), signal.SIGTERM)
    return step(state, batch)

  def evaluator(state):
    if moment == 'last evaluation':
      os.kill(os.getpid(), signal.SIGTERM)
    return {'accuracy': 0.5}

  with pytest.raises(SystemExit) as e:
    train(tmp_path, setup=(state, signalled), evaluators=[evaluator])
  assert e.value.code == 143
  assert 'SIGTERM received at step 12: checkpoint saved' in capsys.readouterr().out
  assert (tmp_path / 'checkpoints' / '12' / 'fqjax.json').is_file()
  toy.assert_identical(train(tmp_path).state, whole.state)


def test_non_finite_loss_stops_and_keeps_the_good_checkpoint(tmp_path):
  with pytest.raises(NonFiniteError) as e:
    train(tmp_path, 20, loader=toy.Loader(bad_step=7))
  assert 'the loss is nan at step 7 (found in the report of steps 7 to 8)' in str(e.value)
  assert 'The last good checkpoint is step 4' in str(e.value)
  assert os.listdir(tmp_path / 'checkpoints') == ['4']
  assert all(np.isfinite(r['loss']) for r in read_json_lines(tmp_path / 'metrics.jsonl'))
  # One report late: the nan of step 7 is in the interval 7..9, looked at while 10..12 run.
  with pytest.raises(NonFiniteError, match=r'step 7 \(found in the report of steps 7 to 9\)'):
    train(tmp_path / 'late', 20, loader=toy.Loader(bad_step=7), checkpoint_every=20)


def test_finite_loss_with_broken_parameters_is_not_saved(tmp_path):
  mesh = make_mesh(1)
  state, step = toy.setup(mesh)

  def breaks(state, batch):
    state, metrics = step(state, batch)
    # Only the last update of an interval: its loss was computed before.
    bad = jnp.where(state.step == 8, jnp.nan, 1.0)
    kernel = state.params['dense2']['kernel'] * bad
    return state._replace(
      params=state.params | {'dense2': {'kernel': kernel, 'bias': kernel[0]}}
    ), metrics

  with pytest.raises(NonFiniteError, match='not finite after step 8') as e:
    train(tmp_path, setup=(state, breaks))
  assert 'last good checkpoint is step 4' in str(e.value)
  assert os.listdir(tmp_path / 'checkpoints') == ['4']
  bad = toy.setup(mesh)[0]
  bad.params['dense2']['bias'] = bad.params['dense2']['bias'] + jnp.nan
  with pytest.raises(NonFiniteError, match='after step 0.*There is no checkpoint yet'):
    train(tmp_path / 'new', setup=(bad, step))


def test_a_second_compilation_is_reported(tmp_path, capsys):
  class Growing(toy.Loader):
    def __iter__(self):
      return iter([toy.make_batch(i, 8 if i < 2 else 16) for i in range(4)])

  mesh = make_mesh(1)
  step = make_train_step(toy.loss_fn, toy.optimizer(), mesh=mesh, ema_decay=0.9)
  result = train(tmp_path, 4, loader=Growing(), setup=(toy.setup(mesh)[0], step))
  out = capsys.readouterr().out
  assert 'Warning: step 3 compiled 1 more programs' in out and out.count('Warning') == 1
  assert result.history[-1]['recompiles'] == 1


def test_evaluators_and_own_writers(tmp_path, capsys):
  class Memory:
    def __init__(self):
      self.calls, self.resumed, self.closed = [], None, False

    def resume(self, step):
      self.resumed = step

    def write(self, step, scalars):
      self.calls.append((step, dict(scalars)))

    def flush(self):
      pass

    def close(self):
      self.closed = True

  memory = Memory()
  seen = []

  def evaluator(state):
    seen.append(int(state.step))
    return {'test/norm': jnp.sum(state.params['dense1']['kernel'] ** 2), 'test/nan': np.nan}

  result = train(tmp_path, 7, evaluators=[evaluator], eval_every=3, writers=[memory])
  assert seen == [3, 6, 7]
  assert memory.resumed == 0 and memory.closed
  assert [s for s, r in memory.calls if 'test/norm' in r] == [3, 6, 7]
  assert [r['step'] for r in result.history if 'test/norm' in r] == [3, 6, 7]
  assert not (tmp_path / 'metrics.jsonl').exists()
  out = capsys.readouterr().out
  assert 'eval' in out and 'test/norm' in out and 'images/s' in out and 'eta' in out


def test_progress_bar_and_profile(tmp_path, capsys):
  train(tmp_path, 4, progress=True, profile=(2, 3))
  captured = capsys.readouterr()
  assert '4/4' in captured.err and 'loss=' in captured.err
  assert captured.out == ''
  assert any((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_settings_that_make_no_sense(tmp_path):
  with pytest.raises(ValueError, match='the loader ended after 2 of 5 steps'):
    train(tmp_path, 5, loader=[toy.make_batch(0), toy.make_batch(1)])
  with pytest.raises(ValueError, match='fit counts log_every in steps'):
    train(tmp_path, 5, log_every=0)
  with pytest.raises(ValueError, match='profile='):
    train(tmp_path, 5, profile=(3, 2))
  state, _ = toy.setup(make_mesh(1))
  with pytest.raises(ValueError, match="need a 'loss'"):
    train(tmp_path / 'a', 5, setup=(state, lambda state, batch: (state, {})))
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot write to the workdir'):
    train(tmp_path / 'file' / 'run')


def test_failed_save_is_reported_by_the_loop(tmp_path, monkeypatch):
  """Something takes the checkpoint folder away while training."""
  mesh = make_mesh(1)
  state, step = toy.setup(mesh)

  def interrupted(state, batch):
    if int(state.step) == 6:
      (tmp_path / 'checkpoints' / '8').mkdir()  # not ours: orbax refuses to overwrite
    return step(state, batch)

  with pytest.raises(
    CheckpointError, match='step 8 could not be written.*one of step 4 is untouched'
  ):
    train(tmp_path, setup=(state, interrupted))
  assert json.loads((tmp_path / 'checkpoints' / '4' / 'fqjax.json').read_text())['step'] == 4
  assert train(tmp_path).state.step == 12


def test_position_of_the_real_loader_is_restored(tmp_path):
  """With prefetch: what counts is what the run has consumed, not what was read ahead."""
  from fqjax import data

  mesh = make_mesh(2)
  source = data.load_source('synthetic', 'train', n=50, size=8)

  class Seen(data.Loader):
    def __iter__(self):
      inner = super().__iter__()
      take = inner.__next__

      class Recorder:
        def __next__(self):
          batch = take()
          rows.append(batch['index'].tolist())
          # The toy network's input from the image; nothing else of the batch is needed.
          x = batch['image'].reshape(16, -1)[:, : toy.FEATURES].astype(np.float32) / 255
          return {'x': x, 'label': batch['label'] % toy.CLASSES}

        get_state, set_state, close = inner.get_state, inner.set_state, inner.close

      return Recorder()

  rows = []
  whole = train(tmp_path / 'whole', 7, mesh=mesh, loader=Seen(source, 16), checkpoint_every=3)
  order, rows[:] = list(rows), []
  train(tmp_path / 'parts', 3, mesh=mesh, loader=Seen(source, 16), checkpoint_every=3)
  parts = train(tmp_path / 'parts', 7, mesh=mesh, loader=Seen(source, 16), checkpoint_every=3)
  assert rows == order
  toy.assert_identical(parts.state, whole.state)


def test_undecodable_samples_are_counted_and_named_over_all_starts(tmp_path, capsys):
  whole = train(tmp_path / 'whole', loader=toy.Loader(damaged=3))
  assert [r['data/corrupt'] for r in whole.history] == [1, 2, 2, 3, 3, 4]  # of steps 3 4 6 8 9 12
  assert whole.corrupt == Corrupt(4, {'0/0.jpg': 'truncated', '0/3.jpg': 'truncated'})
  assert '4 samples of 2 files could not be decoded' in capsys.readouterr().out
  points, _ = events(tmp_path / 'whole' / 'tb')
  assert points['data/corrupt', 12] == 4
  # What was met before the last checkpoint counts once, what came after it is met again.
  state, step = toy.setup(make_mesh(1))

  def dies(state, batch):
    if int(state.step) == 7:
      raise RuntimeError('dies')
    return step(state, batch)

  with pytest.raises(RuntimeError, match='dies'):
    train(tmp_path / 'parts', loader=toy.Loader(damaged=3), setup=(state, dies))
  parts = train(tmp_path / 'parts', loader=toy.Loader(damaged=3))
  assert numbers(parts.history) == numbers(whole.history)
  assert parts.corrupt == whole.corrupt
  # Nothing left to do: the same answer.
  assert train(tmp_path / 'parts', loader=toy.Loader(damaged=3)).corrupt == whole.corrupt


def test_where_nothing_is_counted_nothing_is_said(uninterrupted, tmp_path, capsys):
  workdir, result = uninterrupted
  assert not any('data/corrupt' in r for r in result.history)
  assert result.corrupt == Corrupt() and not (workdir / 'corrupt.json').exists()
  from fqjax import data

  source = data.load_source('synthetic', 'train', n=50, size=8)
  loss_fn = lambda params, model_state, batch, key: (jnp.sum(params['w']), (model_state, {}))
  state = create_state({'w': jnp.zeros(1)}, {}, optax.sgd(0.1), jax.random.key(0))
  step = make_train_step(loss_fn, optax.sgd(0.1), mesh=make_mesh(1))
  result = train(tmp_path, 2, loader=data.Loader(source, 8), setup=(state, step))
  assert [r['data/corrupt'] for r in result.history] == [0] and result.corrupt == Corrupt()
  assert 'corrupt' not in capsys.readouterr().out


def test_speed_counts_steps_that_are_done(tmp_path):
  mesh = make_mesh(1)
  state, _ = toy.setup(mesh)

  @jax.jit
  def step(state, batch):
    x = jnp.full((512, 512), jnp.mean(batch['x']) + state.step.astype(jnp.float32))
    y = jax.lax.fori_loop(0, 30, lambda i, y: jnp.tanh(x @ y), x)
    return state._replace(step=state.step + 1), {'loss': jnp.mean(y)}

  batch = next(iter(toy.Loader()))
  seconds = []
  for _ in range(5):
    began = time.perf_counter()
    jax.block_until_ready(step(state, batch))
    seconds.append(time.perf_counter() - began)
  # Two steps lie between a report and an evaluation: handing them over takes a thousandth of the
  # time they take.
  result = train(
    tmp_path, 16, setup=(state, step), log_every=5, eval_every=7, checkpoint_every=100,
    evaluators=(lambda state: {'a': 1.0},),
  )  # fmt: skip
  rates = [r['images_per_second'] for r in result.history if 'images_per_second' in r]
  assert len(rates) >= 5 and all(0 < rate < 4 * 16 / min(seconds) for rate in rates), rates


def test_batches_are_read_and_copied_while_the_device_computes(tmp_path, monkeypatch):
  """The host asks for the result of a step only when the batches of the next ones are on their way."""
  seen = []

  class Loss:
    """Of a device that is never faster than it must be."""

    def __init__(self, i):
      self.i = i

    def block_until_ready(self):
      seen.append(('wait', self.i))
      return self

    def __float__(self):
      return 1.0

  def step(state, batch):
    i = int(batch['number'][0])
    seen.append(('step', i))
    return state._replace(step=state.step + 1), {'loss': Loss(i)}

  class Numbered(toy.Loader):
    def __iter__(self):
      return iter([{'number': np.full(8, i)} for i in range(1, 13)])

  def put(batch, mesh):
    seen.append(('put', int(batch['number'][0])))
    return batch

  monkeypatch.setattr(loop, 'shard_batch', put)
  state, _ = toy.setup(make_mesh(1))
  train(tmp_path, setup=(state, step), loader=Numbered(), log_every=100, checkpoint_every=100)
  waits = [i for what, i in seen if what == 'wait' and i > 1]  # the first step compiles
  assert waits[:8] == list(range(2, 10))
  for i in waits[:8]:
    assert seen.index(('put', i + 3)) < seen.index(('step', i + 3)) < seen.index(('wait', i))
