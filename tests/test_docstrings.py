"""Every example in a docstring runs and shows what it says."""

import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = [
  *sorted((ROOT / 'fqjax').rglob('*.py')),
  ROOT / 'benchmarks' / 'collectives.py',
  ROOT / 'configs' / 'common.py',
  ROOT / 'experiments' / 'ledger.py',
]
MODULES = [
  '.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in FILES if '>>>' in f.read_text()
]


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  module = importlib.import_module(name)
  # What an example may use unsaid: these four, its own module, and the public names beside it.
  common = {'jax': jax, 'jnp': jnp, 'np': np, 'optax': optax}
  room = vars(importlib.import_module(name.rpartition('.')[0]))
  result = doctest.testmod(module, extraglobs={**common, **room, **vars(module)})
  assert result.attempted and not result.failed


def test_the_walk_meets_every_room():
  # Of a file beside the rooms, such as fqjax.files, the name has two parts only.
  rooms = {name.split('.')[1] for name in MODULES if re.match(r'fqjax\.\w+\.', name)}
  assert rooms == {
    'data', 'exporter', 'models', 'nn', 'ops', 'quantize', 'rules', 'runtime', 'sparsity',
    'tracing', 'train',
  }  # fmt: skip
