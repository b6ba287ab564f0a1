import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

import fqjax.models


@pytest.mark.parametrize('name', ['_registry', '_importers', '_rgb_to_dct'])
def test_examples_in_docstrings(name):
  module = importlib.import_module(f'fqjax.models.{name}')
  result = doctest.testmod(module, extraglobs={'jax': jax, 'jnp': jnp, **vars(fqjax.models)})
  assert result.attempted and not result.failed
