import doctest

import pytest

from fqjax.train import checkpoint, distributed, loop, mesh, metrics, state, step


@pytest.mark.parametrize(
  'module', [checkpoint, distributed, loop, mesh, metrics, state, step], ids=lambda m: m.__name__
)
def test_examples_in_docstrings(module):
  result = doctest.testmod(module)
  assert result.failed == 0
  assert result.attempted > 0
