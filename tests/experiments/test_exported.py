"""Published networks as files: what is scored, and what becomes rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exported, ledger
from fqjax.models import create_model


@pytest.fixture
def subject():
  """A small network whose own guesses are the labels, and a peer that is wrong now and then."""
  model = create_model('lenet5')
  rng = np.random.default_rng(0)
  apply = lambda v, x: model.apply(v, x[:, 2:30, 2:30, :1])
  images = rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
  prepare = lambda pixels: pixels.astype(jnp.float32) / jnp.float32(255)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  labels = np.asarray(apply(variables, prepare(jnp.asarray(images)))).argmax(1)
  batches = lambda: ((images[i : i + 20], labels[i : i + 20]) for i in range(0, 60, 20))
  ranges = [np.asarray(prepare(jnp.asarray(images[:20])))]
  return exported.Subject(
    apply, variables, prepare, 32, ranges, batches, 'noise', (100.0, -50.0), {}
  )


def test_files_are_scored(subject, tmp_path, monkeypatch, capsys):
  (tmp_path / 'weights').mkdir()
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  monkeypatch.setattr(exported, 'subject_of', lambda name, weights: subject)
  rows = {(row.run, row.metric): row for row in exported.experiment('net', tmp_path)}
  assert [metric for _, metric in rows] == [
    'top1', 'file_bytes', 'top1', 'change', 'agreement', 'logit_error', 'file_bytes'
  ]  # fmt: skip
  top1 = rows['exported/noise/net/float32', 'top1']
  assert (top1.value, top1.reached, top1.samples) == (100.0, 'yes', 60)
  assert top1.bytes == (tmp_path / 'net/float32.fqx').stat().st_size
  integers = rows['exported/noise/net/int8', 'top1']
  assert 50 < integers.value <= 100
  assert rows['exported/noise/net/int8', 'agreement'].value == pytest.approx(integers.value)
  assert rows['exported/noise/net/int8', 'change'].value == pytest.approx(
    integers.value - 100, abs=1e-3
  )
  assert 0 < rows['exported/noise/net/int8', 'logit_error'].value < 0.1
  assert 'net float32: 60 of 60 right, 60 as float32' in capsys.readouterr().out
  assert ledger.check_command('python -m experiments.exported --workdir=DIR') is None


def test_onnx_is_compared_with_numpy_on_the_same_network(subject, tmp_path, monkeypatch, capsys):
  pytest.importorskip(
    'onnxruntime', reason="needs onnxruntime: pip install 'fqjax[onnx]' onnxruntime"
  )
  (tmp_path / 'weights').mkdir()
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path))
  monkeypatch.setattr(exported, 'subject_of', lambda name, weights: subject)
  rows = {(row.run, row.metric): row for row in exported.experiment('net', tmp_path, onnx=True)}
  for kind in ('float32', 'int8'):
    same = rows[f'exported/noise/net/{kind}_onnx', 'agreement']
    assert (same.value, same.goal, same.reached) == (100.0, 99.0, 'yes')
    assert same.reference == f'the {kind} file by NumPy'
    assert same.bytes == (tmp_path / f'net/{kind}.onnx').stat().st_size
    assert rows[f'exported/noise/net/{kind}_onnx', 'logit_error'].value < 0.01
  assert '60 as int8' in capsys.readouterr().out


def test_without_data_it_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(tmp_path / 'none'))
  with pytest.raises(FileNotFoundError, match='FQJAX_DATA_DIR'):
    exported.experiment('resnet20', tmp_path)


def test_the_command_line(capsys):
  args = exported.parse_command(['--networks=resnet20,resnet56', '--workdir=DIR'])
  assert args.networks == ['resnet20', 'resnet56'] and not args.record and not args.onnx
  with pytest.raises(SystemExit):
    exported.parse_command(['--networks=resnet21', '--workdir=DIR'])
  assert 'resnet21' in capsys.readouterr().err
