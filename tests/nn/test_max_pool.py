from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.nn import max_pool
from fqjax.tracing import to_graph


def draw(shape, dtype=np.float32):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize('shape, size', [((2, 6, 4, 3), 2), ((1, 7, 5, 2), 2), ((2, 9, 10, 1), 3)])
def test_values_and_gradient_are_those_of_linen_where_nothing_is_equal(shape, size):
  x = draw(shape)

  def loss(pool):
    return lambda x: jnp.sum(pool(x) ** 2 * 0.5)

  other = lambda x: nn.max_pool(x, (size, size), (size, size))
  np.testing.assert_array_equal(max_pool(x, size), other(x))
  ours, theirs = jax.grad(loss(lambda x: max_pool(x, size)))(x), jax.grad(loss(other))(x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_equal_values_share_the_gradient():
  x = jnp.zeros((1, 4, 4, 2))
  np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x).sum())(x), np.full(x.shape, 0.25))


def test_forward_mode_vmap_and_narrow_types():
  x, t = draw((2, 4, 4, 3)), draw((2, 4, 4, 3)) + 1
  _, tangent = jax.jvp(max_pool, (x,), (t,))
  (back,) = jax.vjp(max_pool, x)[1](jnp.ones((2, 2, 2, 3)))
  np.testing.assert_allclose(jnp.sum(tangent), jnp.sum(back * t), rtol=1e-5)
  narrow = x.astype(jnp.bfloat16)
  assert jax.grad(lambda x: max_pool(x).astype(jnp.float32).sum())(narrow).dtype == jnp.bfloat16
  np.testing.assert_array_equal(jax.vmap(max_pool)(x[None])[0], max_pool(x))


def test_is_one_operation_of_the_graph():
  graph = to_graph(lambda p, x: max_pool(x * p), jnp.ones(()), draw((1, 4, 4, 2))).graph
  assert [node.op for node in graph.nodes].count('pool_max') == 1


@pytest.mark.parametrize('shape, size', [((4, 4, 2), 2), ((1, 1, 4, 2), 2), ((1, 4, 4, 2), 0)])
def test_bad_input(shape, size):
  with pytest.raises(ValueError, match='max_pool takes'):
    max_pool(jnp.zeros(shape), size)
