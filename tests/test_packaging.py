"""The package's promises about itself: floors, light import, table of contents."""

import pathlib
import re
import subprocess
import sys
import tomllib

import fqjax

ROOT = pathlib.Path(__file__).parent.parent


def test_floor_constraints_equal_the_lower_bounds():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  # And what the tests compare with; their runners may be of any version.
  asked = [*project['dependencies'], *extras['demo'], *extras['onnx'], *extras['test']]
  found = [re.fullmatch(r'([\w.-]+)>=([\d.]+)', d) for d in asked]
  runners = ('pytest', 'pytest-xdist', 'ipykernel', 'nbclient', 'nbformat')
  bounds = dict(match.groups() for match in found if match and match[1] not in runners)
  floor = dict(
    line.split('==') for line in (ROOT / 'constraints/floor.txt').read_text().split() if line
  )
  assert {name: floor.get(name) for name in bounds} == bounds


def test_public_names_resolve():
  assert set(fqjax.__all__) == {'__version__', *fqjax._HOME, *fqjax._ROOMS}
  for name in fqjax.__all__:
    assert getattr(fqjax, name) is not None


def test_import_is_light():
  code = 'import fqjax, sys; print([m for m in ("jax", "flax", "numpy") if m in sys.modules])'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'


def test_no_tensorflow_comes_along():
  code = (
    'import sys; sys.modules["tensorflow"] = None\n'
    'import fqjax.data, fqjax.models, fqjax.nn, fqjax.ops, fqjax.sparsity, fqjax.tracing\n'
    'import fqjax.train\n'
    'import experiments.imagenet_freq\n'
    'print("tensorboard" in sys.modules)'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert out.stdout.strip() == 'False'
