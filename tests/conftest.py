"""Strict test setup: simulated devices, no implicit promotion, fixed seeds, data by marker."""

import gc
import os
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


@pytest.fixture(autouse=True, scope='module')
def _bounded_programs():
  """Compiled programs are let go of before there are too many.

  XLA maps memory for each; Linux allows a process 65,530 mappings (vm.max_map_count), and a compiler
  that gets no more of them crashes.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()
    gc.collect()


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
    if item.get_closest_marker('full'):
      item.add_marker(skip)
