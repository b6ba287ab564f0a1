"""Two processes of four simulated devices each, on the loopback address."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.train import (
  Checkpoints,
  enable_compile_cache,
  initialize_distributed,
  make_mesh,
  preflight,
  read_json_lines,
  replicate,
)
from tests.train import toy
from tests.train.test_kill import ROOT, final, finish, losses, start


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start_two(workdir, *args):
  port = free_port()
  return [
    start(
      workdir, *args, '--devices', 4, '--coordinator', f'127.0.0.1:{port}', '--processes', 2,
      '--process', i,
    )
    for i in range(2)
  ]  # fmt: skip


def start_preflight(*args, devices=4):
  environment = {
    'PATH': '/usr/bin:/bin',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, '-m', 'fqjax.train.preflight', *map(str, args)],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def test_two_processes_train_as_one(tmp_path):
  args = ('--steps', 8, '--every', 4, '--log-every', 1)
  processes = start_two(tmp_path / 'two', *args, '--damaged', 3)
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outs
  assert 'process 0 of 2: 4 of 8 cpu devices' in outs[0]
  assert 'process 1 of 2: 4 of 8 cpu devices' in outs[1]
  assert '8/8' in outs[0] and '8/8' not in outs[1]  # one process reports
  finish(start(tmp_path / 'one', *args, '--devices', 8))
  one, two = losses(tmp_path / 'one'), losses(tmp_path / 'two')
  assert [s for s, _ in two] == list(range(1, 9))
  np.testing.assert_allclose([x for _, x in two], [x for _, x in one], rtol=1e-5)

  # What either could not decode is counted and named.
  records = read_json_lines(tmp_path / 'two' / 'metrics.jsonl')
  assert [r['data/corrupt'] for r in records] == [2, 2, 2, 4, 4, 4, 6, 6]
  names = json.loads((tmp_path / 'two' / 'corrupt.json').read_text())
  assert set(names) == {'0/0.jpg', '0/3.jpg', '1/0.jpg', '1/3.jpg'}
  assert '6 samples of 4 files could not be decoded' in outs[0]

  # What two processes wrote comes back on one device.
  state, step = toy.setup(make_mesh(1))
  checkpoints = Checkpoints(tmp_path / 'two' / 'checkpoints')
  restored = checkpoints.restore(replicate(state, make_mesh(1)))
  checkpoints.close()
  assert restored.step == 8 and restored.position == {'next': 8}
  expected = final(tmp_path / 'two')
  for name, x in toy.leaves(restored.state).items():
    np.testing.assert_array_equal(x, expected[name], err_msg=name)
  step(restored.state, toy.make_batch(8))


def test_metrics_one_process_cannot_write_end_both(tmp_path):
  args = ('--file-limit', 400, '--limit-at', 5, '--limit-on', 0, '--log-every', 1, '--every', 4)
  began = time.monotonic()
  processes = start_two(tmp_path, '--steps', 400, '--delay', 0.05, *args)
  outs = [finish(p) for p in processes]
  assert time.monotonic() - began < 60, 'a process waited until the heartbeat of the other'
  assert [p.returncode for p in processes] == [1, 1], outs
  assert 'OSError: [Errno 27] the metrics of step' in outs[0]
  assert 'RuntimeError: process 0: [Errno 27] the metrics of step' in outs[1]


@pytest.mark.full
def test_checkpoint_one_process_cannot_finish_ends_both(tmp_path):
  processes = start_two(tmp_path, '--steps', 400, '--delay', 0.05, '--no-manifest')
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [1, 1], outs
  assert 'CheckpointError: the checkpoint of step 8 could not be written' in outs[0]
  assert 'RuntimeError: process 0: the checkpoint of step 8 could not be written' in outs[1]
  assert 'The one of step 4 is untouched' in outs[1]


@pytest.mark.full
def test_states_that_differ_between_processes_are_refused(tmp_path):
  processes = start_two(tmp_path, '--steps', 4, '--seed-per-process')
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [1, 1], outs
  for out in outs:
    assert 'processes [1] hold other values than process 0' in out


@pytest.mark.full
def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path):
  args = ('--steps', 400, '--every', 200, '--delay', 0.05)
  processes = start_two(tmp_path, *args)
  while not (tmp_path / 'metrics.jsonl').exists() and processes[0].poll() is None:
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [143, 143], outs
  assert 'SIGTERM received at step' in outs[0]
  processes = start_two(tmp_path, '--steps', 40, '--every', 20)
  outs = [finish(p) for p in processes]
  assert 'Continuing from step' in outs[0], outs


@pytest.mark.full
def test_sigterm_in_the_last_step_stops_both(tmp_path):
  processes = start_two(tmp_path, '--steps', 2, '--every', 2, '--delay', 4)
  for line in processes[0].stdout:
    if line.startswith('First step'):
      break
  time.sleep(1)  # into the second and last
  processes[1].send_signal(signal.SIGTERM)
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [143, 143], outs
  assert 'SIGTERM received at step 2' in outs[0]


def test_preflight_of_two_processes(tmp_path):
  coordinator = f'127.0.0.1:{free_port()}'
  processes = [
    start_preflight(
      '--coordinator', coordinator, '--num-processes', 2, '--process-id', i, '--workdir', tmp_path
    )
    for i in range(2)
  ]
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outs
  for words in ('8 x cpu', '2 process(es), 4 devices each', 'all-reduce over 8 devices: 36, as it',
                'writable, shared', 'preflight passed'):  # fmt: skip
    assert words in outs[0], outs[0]
  assert 'process 1 of 2' in outs[1]
  assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_preflight_names_what_is_wrong(tmp_path):
  coordinator = f'127.0.0.1:{free_port()}'
  alone = start_preflight(
    '--coordinator', coordinator, '--num-processes', 2, '--process-id', 1, '--timeout', 5
  )
  out = finish(alone)
  assert alone.returncode == 1, out
  assert 'did not find each other' in out and f'coordinator {coordinator}' in out
  coordinator = f'127.0.0.1:{free_port()}'
  processes = [
    start_preflight(
      '--coordinator', coordinator, '--num-processes', 2, '--process-id', i,
      '--workdir', tmp_path / str(i),
    )
    for i in range(2)
  ]  # fmt: skip
  outs = [finish(p) for p in processes]
  assert [p.returncode for p in processes] == [1, 1], outs
  assert all('is not shared: process 1 does not see' in out for out in outs), outs


def test_all_reduce_is_checked_numerically(monkeypatch):
  assert 'all-reduce over 8 devices: 36' in preflight.check_all_reduce(make_mesh(8))
  monkeypatch.setattr(jnp, 'sum', lambda x: x[0] + 1e-3)
  with pytest.raises(RuntimeError, match='gave 1.00.*, not 36'):
    preflight.check_all_reduce(make_mesh(8))


def test_preflight_of_one_process(tmp_path, capsys):
  assert preflight.main(['--workdir', str(tmp_path)]) == 0
  assert 'preflight passed' in capsys.readouterr().out
  (tmp_path / 'file').write_text('')
  assert preflight.main(['--workdir', str(tmp_path / 'file' / 'x')]) == 1
  assert 'cannot write to the workdir' in capsys.readouterr().err


def test_distributed_start_is_guarded(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **kw: calls.append(kw))
  for name in ('JAX_COORDINATOR_ADDRESS', 'FQJAX_DISTRIBUTED', 'SLURM_STEP_NUM_TASKS'):
    monkeypatch.delenv(name, raising=False)
  assert initialize_distributed() is False and not calls
  assert initialize_distributed('x:1', 2, 0, distributed=False) is False and not calls
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  initialize_distributed()
  assert not calls
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  initialize_distributed(timeout=9)
  assert calls.pop() == {
    'coordinator_address': None, 'num_processes': None, 'process_id': None,
    'initialization_timeout': 39,
  }  # fmt: skip
  monkeypatch.delenv('SLURM_STEP_NUM_TASKS')
  with pytest.raises(ValueError, match=r"\['process_id'\] is not given"):
    initialize_distributed('x:1', 2)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'y:2')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '3')
  monkeypatch.setenv('JAX_PROCESS_ID', '2')
  initialize_distributed()
  assert calls.pop()['process_id'] == 2

  def too_late(**kw):
    raise RuntimeError('must be called before any JAX calls')

  monkeypatch.setattr(jax.distributed, 'initialize', too_late)
  with pytest.raises(RuntimeError, match='did not find each other(.|\n)*before any JAX calls'):
    initialize_distributed()


def test_a_compile_cache_that_is_set_stays(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    enable_compile_cache(tmp_path / 'first')
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'first')
    enable_compile_cache(tmp_path / 'second')
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'first')
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
