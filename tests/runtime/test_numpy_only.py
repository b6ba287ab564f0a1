"""NumPy and the wheel are enough: installed as documented, nothing else there, published accuracy."""

import os
import pathlib
import subprocess
import sys
import venv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
_INSTALLED = 'import importlib.metadata as m; print(*(d.name for d in m.distributions()))'
_SCORE = """
import sys
import numpy as np
import fqjax.runtime
assert not [name for name in ('jax', 'flax', 'ml_dtypes', 'scipy') if name in sys.modules]
model, data = fqjax.runtime.load(sys.argv[1]), np.load(sys.argv[2])
right = 0
for start in range(0, len(data['label']), 50):
  scores = model(data['image'][start : start + 50])
  right += int((scores.argmax(1) == data['label'][start : start + 50]).sum())
print(right)
"""


@pytest.fixture(scope='module')
def python(tmp_path_factory):
  """The interpreter of an environment with NumPy and the wheel, as the README says."""
  folder = tmp_path_factory.mktemp('numpy_only')
  wheel = run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', folder, ROOT)
  if wheel.returncode:
    # Building needs setuptools from a package index.
    pytest.skip(f'no wheel can be built here: {wheel.stderr.strip().splitlines()[-1]}')
  [wheel] = folder.glob('*.whl')
  venv.create(folder / 'env', with_pip=True)
  scripts = 'Scripts' if os.name == 'nt' else 'bin'
  python = folder / 'env' / scripts / 'python'
  numpy = run(python, '-m', 'pip', 'install', '-q', f'numpy=={np.__version__}')
  if numpy.returncode:
    pytest.skip(f'NumPy cannot be installed here: {numpy.stderr.strip().splitlines()[-1]}')
  done = run(python, '-m', 'pip', 'install', '-q', '--no-deps', wheel)
  assert not done.returncode, done.stderr
  return python


def run(*command):
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
  # Not from the repository: its folder would be importable.
  return subprocess.run(
    list(map(str, command)),
    capture_output=True,
    text=True,
    env=environment,
    cwd=pathlib.Path.home(),
  )


def score(python, artifact, images, labels, folder):
  path = artifact.save(folder / 'model.fqx')
  np.savez(folder / 'data.npz', image=images, label=labels)
  done = run(python, '-c', _SCORE, path, folder / 'data.npz')
  assert not done.returncode, done.stderr
  return int(done.stdout)


def test_nothing_else_is_there(python):
  names = run(python, '-c', _INSTALLED).stdout.split()
  assert sorted({*names} - {'pip', 'setuptools'}) == ['fqjax', 'numpy']


def test_a_network_runs_there(python, tmp_path):
  model = models.create_model('lenet5')
  x = np.random.default_rng(0).standard_normal((100, 28, 28, 1), np.float32)
  variables = model.init(jax.random.key(0), x[:1])
  artifact = fqjax.export(model.apply, variables, x[:1], labels=list('0123456789'))
  labels = np.asarray(model.apply(variables, x)).argmax(1)
  assert score(python, artifact, x, labels, tmp_path) == 100
  shown = run(python, '-m', 'fqjax.runtime', 'show', tmp_path / 'model.fqx')
  assert 'input input: float32[n, 28, 28, 1] NHWC' in shown.stdout, shown.stderr


def cifar():
  """The published ResNet-20 on pixels, and the test images."""
  from fqjax import data as fd

  folder = pathlib.Path(os.environ['FQJAX_DATA_DIR']) / 'weights'
  model = models.create_model('cifar_resnet20')
  variables = models.load_cifar_resnet_npz(folder / 'cifar10_resnet20.npz', model)
  source = fd.load_source('cifar10', 'test')
  items = [source[i] for i in range(len(source))]
  images = np.stack([item['image'] for item in items])
  return model, variables, images, np.array([item['label'] for item in items])


def pixels_to_input(pixels):
  mean, std = jnp.array([[[[0.485, 0.456, 0.406]]]]), jnp.array([[[[0.229, 0.224, 0.225]]]])
  return (pixels.astype(jnp.float32) / 255 - mean) / std


@pytest.mark.full
@pytest.mark.promotes('means and deviations of channels')
def test_resnet20_keeps_its_accuracy(python, data_dir, tmp_path):
  from fqjax import data as fd

  model, variables, images, labels = cifar()
  example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
  artifact = fqjax.export(model.apply, variables, example, preprocess=pixels_to_input)
  right = score(python, artifact, images, labels, tmp_path)
  assert abs(right / 100 - 91.73) < 0.02  # published: 91.73 %
  train = fd.load_source('cifar10', 'train')
  batches = [np.stack([train[i + j]['image'] for j in range(100)]) for i in range(0, 500, 100)]
  prepared = [np.asarray(pixels_to_input(jnp.asarray(batch))) for batch in batches]
  network = fqjax.export(model.apply, variables, prepared[0][:1], precision='int8', ranges=prepared)
  inputs = np.asarray(pixels_to_input(jnp.asarray(images)))
  integers = score(python, network, inputs, labels, tmp_path)
  assert integers >= right - 30  # 0.3 points


@pytest.mark.full
def test_mobilenet_keeps_its_accuracy(python, data_dir, tmp_path):
  from experiments import activations

  model = models.create_model('mobilenet_v2', convention='tf')
  path = data_dir / 'weights' / 'mobilenet_v2_1.0_224.npz'
  variables = models.load_mobilenet_v2_npz(path, model)
  parts = list(activations.photographs('imagenet_samples', 'test'))
  images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
  assert len(labels) == 250
  example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
  scale = lambda pixels: pixels.astype(jnp.float32) / 127.5 - 1
  artifact = fqjax.export(model.apply, variables, example, preprocess=scale)
  right = score(python, artifact, images, labels, tmp_path)
  assert right == 225
  batches = [
    activations.scaled(pixels) for pixels, _ in activations.photographs('coco_mini', 'all')
  ]
  network = fqjax.export(model.apply, variables, batches[0][:1], precision='int8', ranges=batches)
  assert score(python, network, activations.scaled(images), labels, tmp_path) >= right - 2
