"""Runs that are killed, ended or filled up from outside, as processes of their own."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fqjax.train import read_json_lines

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, *args, output=subprocess.PIPE, prefix=()):
  command = [
    *prefix,
    sys.executable,
    '-m',
    'tests.train.kill_target',
    str(workdir),
    *map(str, args),
  ]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=output,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def finish(process, timeout=120):
  try:
    out, _ = process.communicate(timeout=timeout)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # with what a shell in `prefix` has started
    process.wait()
  return out


def final(workdir):
  with np.load(workdir / 'final.npz') as f:
    return dict(f)


def losses(workdir):
  return [(r['step'], r['loss']) for r in read_json_lines(workdir / 'metrics.jsonl')]


def assert_same_run(workdir, reference):
  a, b = final(workdir), final(reference)
  assert a.keys() == b.keys() and len(a) > 10
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)
  assert losses(workdir) == losses(reference)


def wait_for(process, condition, timeout=60):
  """Polls often: some of the moments last a few milliseconds."""
  end = time.monotonic() + timeout
  while process.poll() is None and time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.0005)
  return False


def newest(checkpoints):
  names = [p.name for p in checkpoints.glob('*') if p.name.isdigit()]
  return max(map(int, names), default=0)


def at_random_time(process, checkpoints, rng):
  at_start = newest(checkpoints)
  if wait_for(process, lambda: newest(checkpoints) > at_start):  # it must get somewhere
    time.sleep(rng.uniform(0, 0.4))


def while_writing(process, checkpoints, rng):
  at_start = newest(checkpoints)
  skip = rng.randrange(2)
  wait_for(
    process,
    lambda: (
      newest(checkpoints) > at_start + 4 * skip
      and any('.orbax-checkpoint-tmp' in p.name for p in checkpoints.glob('*'))
    ),
  )
  time.sleep(rng.uniform(0, 0.03))


def before_it_counts(process, checkpoints, rng):
  del rng
  done = {p.name for p in checkpoints.glob('*')}
  new = lambda: [p for p in checkpoints.glob('*') if p.name.isdigit() and p.name not in done]
  wait_for(process, lambda: any(not (p / 'fqjax.json').exists() for p in new()))


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  out = finish(start(workdir, '--steps', 60))
  assert (workdir / 'final.npz').exists(), out
  return workdir


def kill_and_restart(workdir, moments, steps, seed):
  rng = random.Random(seed)
  killed = 0
  for moment in moments:
    process = start(workdir, '--steps', steps, '--delay', 0.005, output=subprocess.DEVNULL)
    moment(process, workdir / 'checkpoints', rng)
    process.kill()
    killed += process.wait() == -signal.SIGKILL
  assert killed == len(moments), 'a run ended before it was killed: make it longer'
  out = finish(start(workdir, '--steps', steps))
  assert 'Continuing from step' in out
  return out


def test_killed_three_times_ends_bit_identical(reference, tmp_path):
  moments = [while_writing, at_random_time, before_it_counts]
  kill_and_restart(tmp_path, moments, 60, seed=0)
  assert_same_run(tmp_path, reference)


@pytest.mark.full
def test_killed_twenty_times_ends_bit_identical(tmp_path):
  reference = tmp_path / 'whole'
  finish(start(reference, '--steps', 600))
  moments = [[while_writing, at_random_time, before_it_counts][i % 3] for i in range(20)]
  kill_and_restart(tmp_path / 'killed', moments, 600, seed=1)
  assert_same_run(tmp_path / 'killed', reference)


def test_sigterm_saves_and_exits_143(tmp_path):
  process = start(tmp_path, '--steps', 500, '--every', 500, '--delay', 0.02)
  wait_for(process, lambda: (tmp_path / 'metrics.jsonl').exists())
  process.send_signal(signal.SIGTERM)
  out = finish(process)
  assert process.returncode == 143, out
  assert 'SIGTERM received at step' in out and 'Traceback' not in out
  assert 0 < newest(tmp_path / 'checkpoints') < 500


def test_writing_that_fails_later_keeps_the_last_checkpoint(tmp_path):
  """Past step 5 no file may grow beyond 20 kB: the system's answer to a quota, or a full disk."""
  args = ('--steps', 12, '--every', 4, '--size', 100_000)
  out = finish(start(tmp_path, *args, '--file-limit', 20_000, '--limit-at', 5))
  assert 'CheckpointError: the checkpoint of step 8 could not be written' in out, out
  assert 'The one of step 4 is untouched. Free some space' in out
  assert newest(tmp_path / 'checkpoints') == 4
  process = start(tmp_path, *args)
  assert 'Continuing from step 4 of 12' in finish(process)
  assert process.returncode == 0
  assert {p.name for p in (tmp_path / 'checkpoints').iterdir()} == {'8', '12'}  # debris is gone


@pytest.mark.full
@pytest.mark.parametrize('log_every', [2, 1000])  # metrics meet the full disk first, or not at all
def test_full_disk(tmp_path, log_every):
  """A file system of 8 MB: too small before training starts, or filled while it runs."""
  script = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
  prefix = ('unshare', '-rm', 'sh', '-c', script, str(tmp_path))
  try:
    subprocess.run((*prefix, 'true'), check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('needs `unshare -rm` and tmpfs')
  args = ('--steps', 4000, '--every', 40, '--delay', 0.01, '--log-every', log_every)
  out = finish(start(tmp_path / 'run', *args, '--size', 300_000, prefix=prefix))
  assert 'MB free, but the checkpoints of this run need' in out, out
  # After the first checkpoint somebody else fills the disk.
  fill = (
    '(until ls "$0"/run/checkpoints/*/fqjax.json; do sleep 0.05; done;'
    ' cat /dev/zero > "$0/other") >"$0/log" 2>&1 & exec "$@"; ls "$0/run/checkpoints"'
  )
  prefix = (*prefix[:4], script.replace('exec "$@"', fill.replace('exec', '')), str(tmp_path))
  out = finish(start(tmp_path / 'run', *args, '--size', 50_000, prefix=prefix))
  assert 'No space left' in out or 'the disk is full' in out, out
  assert 'untouched' in out and out.splitlines()[-1].isdigit(), out
