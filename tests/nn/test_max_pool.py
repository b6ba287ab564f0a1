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
@pytest.mark.parametrize('equal', [False, True])
def test_values_and_gradient_are_those_of_linen(shape, size, equal):
  x = jnp.maximum(draw(shape), 0.5) if equal else draw(shape)

  def loss(pool):
    return lambda x: jnp.sum(pool(x) ** 2 * 0.5)

  other = lambda x: nn.max_pool(x, (size, size), (size, size))
  np.testing.assert_array_equal(max_pool(x, size), other(x))
  ours, theirs = jax.grad(loss(lambda x: max_pool(x, size)))(x), jax.grad(loss(other))(x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_every_window_has_one_gradient_whatever_the_compiler_works_out_twice():
  """As after batch norm: values that are made, compared and pooled in one program."""
  x, scale = draw((2, 8, 8, 3)), jnp.array([[[[1.1, 0.7, 1.3]]]])

  def loss(x):
    y = jnp.maximum((x - jnp.mean(x, (0, 1, 2), keepdims=True)) * scale + 0.1, 0)
    return jnp.sum(max_pool(y * scale + y))

  back = jax.jit(jax.grad(lambda x: loss(x)))(x)
  assert np.isfinite(back).all()
  ones = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x * scale + 0.3 * x))))(x)
  windows = np.asarray(ones).reshape(2, 4, 2, 4, 2, 3)
  np.testing.assert_array_equal((windows != 0).sum((2, 4)), 1)


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
