"""Files are whole or not there, after errors and kills."""

import signal
import subprocess
import sys

import pytest

from fqjax import files


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_alone(tmp_path):
  path = tmp_path / 'x.txt'
  with files.replacing(path) as unfinished:
    unfinished.write_text('half')
    assert not path.exists() and unfinished.parent == tmp_path
  assert path.read_text() == 'half' and names(tmp_path) == ['x.txt']
  files.write_text(path, 'größer')
  assert path.read_bytes() == 'größer'.encode() and names(tmp_path) == ['x.txt']


def test_after_an_error_the_old_file_is_there(tmp_path):
  path = tmp_path / 'x.txt'
  files.write_text(path, 'old')
  with pytest.raises(KeyError), files.replacing(path) as unfinished:
    unfinished.write_text('new')
    raise KeyError
  assert path.read_text() == 'old' and names(tmp_path) == ['x.txt']
  # A block that writes nothing is a mistake, and costs nothing.
  with pytest.raises(FileNotFoundError), files.replacing(path):
    pass
  assert path.read_text() == 'old'


def test_after_a_kill_the_old_file_is_there(tmp_path):
  path = tmp_path / 'x.txt'
  files.write_text(path, 'old')
  code = (
    'import os, signal, sys\n'
    'from fqjax import files\n'
    'with files.replacing(sys.argv[1]) as unfinished:\n'
    '  unfinished.write_text("new")\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  done = subprocess.run([sys.executable, '-c', code, path])
  assert done.returncode == -signal.SIGKILL and path.read_text() == 'old'
  # What is left beside it is in nobody's way.
  files.write_text(path, 'newer')
  assert path.read_text() == 'newer' and len(names(tmp_path)) == 2


def test_two_writers_do_not_write_into_one_another(tmp_path):
  code = (
    'import sys\n'
    'from fqjax import files\n'
    'for _ in range(60):\n'
    '  files.write_text(sys.argv[1], sys.argv[2] * 100_000)\n'
  )
  path = tmp_path / 'x.txt'
  writers = [subprocess.Popen([sys.executable, '-c', code, path, letter]) for letter in 'ab']
  try:
    while any(w.poll() is None for w in writers):
      if path.exists():
        assert path.read_text() in ('a' * 100_000, 'b' * 100_000)
  finally:
    codes = [w.wait() for w in writers]
  assert codes == [0, 0] and names(tmp_path) == ['x.txt']
