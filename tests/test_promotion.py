"""The setup of the tests itself: what they rely on raises."""

import jax.numpy as jnp
import numpy as np
import pytest

MIXED = jnp.ones(2, jnp.float32), jnp.ones(2, jnp.int32)


@pytest.fixture(scope='module')
def of_the_module():
  """Made before any fixture of a single test."""
  with pytest.raises(ValueError, match='promotion'):
    jnp.add(*MIXED)
  return True


def test_implicit_promotion_raises(of_the_module):
  with pytest.raises(ValueError, match='promotion'):
    jnp.add(*MIXED)
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.promotes('this test')
def test_unless_the_test_says_whose_code_promotes():
  np.testing.assert_array_equal(jnp.add(*MIXED), 2)
