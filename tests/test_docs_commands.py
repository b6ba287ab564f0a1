"""Commands in the documents: bash can read them, and the SLURM script does what its text says."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [p.relative_to(ROOT).as_posix() for p in (ROOT / 'README.md', *ROOT.glob('docs/*.md'))]

# What stands in for SLURM: srun runs a task until SIGTERM, which scancel sends to it.
STANDINS = {
  'srun': """echo "$@" >> $LOG
case "$*" in *preflight*) exit 0;; esac
if [ -n "$TASK_ENDS" ]; then exit $TASK_ENDS; fi
trap 'sleep 0.3; echo saved >> $LOG; exit 143' TERM
echo $$ > $LOG.task
while :; do sleep 0.05; done""",
  'scancel': 'echo scancel "$@" >> $LOG; kill -TERM $(cat $LOG.task)',
  'scontrol': 'echo scontrol "$@" >> $LOG',
}


def blocks(page):
  return re.findall(r'^```(?:bash|sh)\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)


def problems(script):
  """What bash says of its syntax, and flags that a lost backslash made commands of their own."""
  found = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True).stderr
  lines = script.replace('\\\n', ' ').splitlines()
  return [*found.splitlines(), *(line for line in lines if re.match(r'\s*--?\w', line))]


@pytest.mark.parametrize('page', sorted(PAGES))
def test_bash_reads_every_block(page):
  for block in blocks(page):
    assert problems(block) == []
    for remote in re.findall(r"--command='(.*?)'", block, re.S):
      assert problems(remote) == []


def test_lost_backslashes_and_quotes_are_seen():
  assert problems('python -m x \\\n  --steps=1') == []
  assert problems('python -m x\n  --steps=1') == ['  --steps=1']
  assert any('unexpected EOF' in line for line in problems("run --command='\n  cd fqjax"))


def start_batch(tmp_path, **environment):
  (script,) = [b for b in blocks('docs/pods.md') if '#SBATCH' in b]
  for name, body in STANDINS.items():
    (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
    (tmp_path / name).chmod(0o755)
  return subprocess.Popen(
    ['bash', '-c', script],
    env={
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'HOME': str(tmp_path),
      'SLURM_JOB_ID': '7',
      'LOG': str(tmp_path / 'log'),
      **environment,
    },
  )


def test_slurm_script_saves_then_requeues(tmp_path):
  batch = start_batch(tmp_path)
  try:
    end = time.monotonic() + 30
    while not (tmp_path / 'log.task').exists() and time.monotonic() < end:
      time.sleep(0.02)
    time.sleep(0.1)  # the file is written just after its trap is set
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(30) == 143
  finally:
    batch.kill()
  lines = (tmp_path / 'log').read_text().splitlines()
  assert 'preflight' in lines[0] and '--config=' in lines[1]
  assert lines[2:] == ['scancel --signal=TERM 7', 'saved', 'scontrol requeue 7']


@pytest.mark.parametrize('status', [0, 1])
def test_slurm_script_ends_with_its_run(tmp_path, status):
  assert start_batch(tmp_path, TASK_ENDS=str(status)).wait(30) == status
  assert len((tmp_path / 'log').read_text().splitlines()) == 2
