import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

import fqjax.nn


@pytest.mark.parametrize('name', ['_batch_norm', '_gate', '_selection'])
def test_examples_in_docstrings(name):
  module = importlib.import_module(f'fqjax.nn.{name}')
  result = doctest.testmod(module, extraglobs={'jax': jax, 'jnp': jnp, **vars(fqjax.nn)})
  assert result.attempted and not result.failed
