"""Strict test setup: simulated devices, no implicit promotion, fixed seeds, data by marker."""

from importlib.metadata import version
import os


def _add_flags(*flags: str):
  """What the caller has set stays."""
  have = os.environ.get('XLA_FLAGS', '')
  new = [flag for flag in flags if flag.split('=')[0] not in have]
  os.environ['XLA_FLAGS'] = ' '.join([have, *new]).strip()


# Before JAX initialises its backend: eight simulated devices on any machine.
_add_flags('--xla_force_host_platform_device_count=8')
# Four fifths of the time went into compiling small programs that run once. `make test-all` compiles
# them as users do. Unknown flags end the process, so versions not tried yet go without.
_JAX = tuple(int(part) for part in version('jax').split('.')[:2])
if os.environ.get('FQJAX_TEST_OPTIMIZED') != '1' and _JAX < (0, 13):
  _add_flags('--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import pathlib

import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture(autouse=True)
def _fixed_seeds():
  np.random.seed(0)  # noqa: NPY002 (for code under test that draws from it)


@pytest.fixture(autouse=True)
def _promotion(request):
  """Implicit dtype promotion raises, except in tests marked `promotes(reason)`."""
  marker = request.node.get_closest_marker('promotes')
  if marker is None:
    yield
    return
  if len(marker.args) != 1 or not isinstance(marker.args[0], str):
    pytest.fail("say whose code promotes dtypes: @pytest.mark.promotes('Flax in bfloat16')")
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture
def x64():
  """float64 and complex128 are real inside the test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder of real data named by FQJAX_DATA_DIR, or a skip that says so."""
  value = os.environ.get('FQJAX_DATA_DIR')
  if not value:
    pytest.skip('set FQJAX_DATA_DIR to the folder of real data sets to run this test')
  path = pathlib.Path(value)
  if not path.is_dir():
    pytest.fail(f'FQJAX_DATA_DIR={value} is not a folder')
  return path


def pytest_collection_modifyitems(config, items):
  if config.getoption('-m'):
    return
  skip = pytest.mark.skip(reason='long: runs with `make test-all`')
  for item in items:
    if 'full' in item.keywords:
      item.add_marker(skip)
