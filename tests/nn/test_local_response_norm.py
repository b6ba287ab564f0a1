import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.nn import local_response_norm
from fqjax.tracing import to_graph


def oracle(x, size, alpha, beta, k):
  """Channel by channel, float64."""
  x, y = np.asarray(x, np.float64), np.empty(x.shape)
  channels = x.shape[-1]
  for c in range(channels):
    near = range(max(0, c - size // 2), min(channels, c + (size - 1) // 2 + 1))
    energy = sum(x[..., j] ** 2 for j in near)
    y[..., c] = x[..., c] / (k + alpha / size * energy) ** beta
  return y


@pytest.mark.parametrize(
  ('shape', 'options'),
  [
    ((2, 3, 4, 9), {}),
    ((2, 3, 4, 9), dict(size=3, alpha=2.0, beta=0.5, k=2.0)),
    ((5, 8), dict(size=4, alpha=2.0)),
    ((5, 3), dict(size=7, alpha=2.0)),
    ((6,), dict(size=1, alpha=1.0, beta=1.0)),
  ],
)
def test_values_and_gradients_equal_the_oracle(shape, options, x64):
  rng = np.random.default_rng(0)
  x, direction = 10 * rng.normal(size=shape), rng.normal(size=shape)
  settings = dict(size=5, alpha=1e-4, beta=0.75, k=1.0) | options
  fn = jax.jit(lambda x: local_response_norm(x, **options))
  np.testing.assert_allclose(fn(x), oracle(x, **settings), rtol=1e-13)
  # Central differences of the oracle; their error is of the order of the step squared.
  step = 1e-5
  want = oracle(x + step * direction, **settings) - oracle(x - step * direction, **settings)
  got = jax.jvp(fn, (x,), (direction,))[1]
  np.testing.assert_allclose(got, want / (2 * step), rtol=1e-6, atol=1e-8)
  seen = jax.grad(lambda x: jnp.sum(fn(x) * direction))(x)
  np.testing.assert_allclose(jnp.vdot(seen, direction), jnp.vdot(direction, got), rtol=1e-10)


def test_half_precision_is_rounded_once():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)) * 100, jnp.bfloat16)
  got = local_response_norm(x)
  assert got.dtype == jnp.bfloat16
  want = oracle(np.asarray(x, np.float64), 5, 1e-4, 0.75, 1.0)
  # Half a unit in the last of the eight places bfloat16 has.
  np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8 * 1.001)


def test_graph():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
  traced = to_graph(lambda p, x: local_response_norm(x), {}, x)
  assert {'pool_sum', 'pow'} <= {node.op for node in traced.graph.nodes}
  np.testing.assert_allclose(traced({}, x), local_response_norm(x), rtol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match=r'sums over size >= 1 channels, got 0'):
    local_response_norm(jnp.ones((2, 3)), size=0)
