"""The flat program computes what the function computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.tracing import flatten, open_body, trace


def _evaluate(program, inputs):
  """Runs a flat program with JAX's own primitives: the oracle is the function itself."""
  env = dict(zip(program.inputs, inputs, strict=True))
  primitives = {
    'add': jax.lax.add,
    'mul': jax.lax.mul,
    'max': jax.lax.max,
    'tanh': jax.lax.tanh,
    'dot_general': jax.lax.dot_general,
    'reshape': lambda x, new_sizes, **_: x.reshape(new_sizes),
    'broadcast_in_dim': lambda x, shape, broadcast_dimensions, **_: jax.lax.broadcast_in_dim(
      x, shape, broadcast_dimensions
    ),
  }
  read = lambda value: env[value] if value.constant is None else value.constant
  for op in program.operations:
    values = [jnp.asarray(read(value)) for value in op.inputs]
    if op.name == 'dot_general':
      options = {'dimension_numbers': op.params['dimension_numbers']}
    else:
      options = {k: v for k, v in op.params.items() if op.name in ('reshape', 'broadcast_in_dim')}
    env[op.outputs[0]] = primitives[op.name](*values, **options)
  return [read(value) for value in program.outputs]


def test_flat_program_equals_the_function():
  table = np.linspace(0, 1, 4, dtype=np.float32)

  @jax.custom_vjp
  def halve(x):
    return x * 0.5

  halve.defvjp(lambda x: (halve(x), None), lambda _, g: (g * 0.5,))

  @jax.jit
  def layer(p, x):
    return jax.checkpoint(lambda x: jax.nn.relu(x @ p['w']) + p['b'][None])(x)

  def apply(params, x):
    x = layer(params[0], x)
    return halve(layer(params[1], x)) + table[None], x

  key = jax.random.key(0)
  params = [{'w': jax.random.normal(key, (4, 4)), 'b': jnp.arange(4.0)} for _ in range(2)]
  x = jax.random.normal(key, (3, 4))
  program = trace(apply, params, x)
  assert [v.name for v in program.inputs] == ['0/0/b', '0/0/w', '0/1/b', '0/1/w', '1']
  assert all(not op.bodies and op.name not in ('jit', 'remat2') for op in program.operations)
  # Defined before use, and only once: one identity per value.
  written = [value for op in program.operations for value in op.outputs]
  assert len(set(written)) == len(written)
  got = _evaluate(program, [*jax.tree.leaves(params), x])
  want = apply(params, x)
  # float32 matrix products in another order of fusion
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, list(want))


def test_scopes_join_through_calls_and_lose_transformation_marks():
  @jax.jit
  def inner(x):
    with jax.named_scope('inner'):
      return jnp.tanh(x)

  def apply(x):
    with jax.named_scope('outer'):
      return jax.vmap(inner)(x)

  [op] = trace(apply, jnp.ones((2, 3))).operations
  assert op.scope == 'outer/inner'


def test_dead_operations_go_and_effects_stay():
  def apply(x):
    _ = jnp.tanh(x)
    jax.debug.print('{}', x)
    return x + 1

  names = [op.name for op in trace(apply, jnp.ones(2)).operations]
  assert 'tanh' not in names and 'add' in names
  assert any('debug' in name for name in names)


def test_bodies_bind_constants_by_identity():
  def apply(w, x):
    return jax.lax.scan(lambda c, row: (c @ w + row[None], c.sum()), x, jnp.ones((5, 3)))

  program = trace(apply, jnp.ones((3, 3)), jnp.ones((2, 3)))
  [scan] = [op for op in program.operations if op.name == 'scan']
  [body] = scan.bodies
  assert body.times == 5 and body.constants == 1
  inside = open_body(body, scan.scope)
  assert inside.inputs[0] is program.inputs[0]
  assert inside.inputs[1] is not program.inputs[1]
  assert [v.shape for v in inside.inputs] == [(3, 3), (2, 3), (3,)]


def test_symbolic_batch_passes_through():
  [batch] = jax.export.symbolic_shape('b')
  program = trace(lambda x: jnp.tanh(x) + 1, jax.ShapeDtypeStruct((batch, 3), jnp.float32))
  assert program.outputs[0].shape == (batch, 3)


def test_wrong_number_of_inputs():
  closed = jax.make_jaxpr(jnp.tanh)(1.0)
  with pytest.raises(ValueError, match='takes 1 inputs, got 0'):
    flatten(closed, [])
