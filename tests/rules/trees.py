"""One small network as four kinds of parameter tree, and targets that need no plan."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fqjax.rules import apply_masks
from fqjax.sparsity import top_k_mask
from fqjax.tracing import leaf_name

SHAPES = {'first': {'kernel': (8, 16), 'bias': (16,)}, 'second': {'kernel': (16, 8), 'bias': (8,)}}


def linen(seed=0, dtype=jnp.float32):
  """A dict of dicts, as `init` of a Linen module returns it."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@functools.cache
def _equinox_layer():
  # Once: trees of two classes of one name are different trees.
  import equinox as eqx

  class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    act: object = jax.nn.relu

  return Layer


def from_linen(kind, tree):
  """The same leaves as another kind of tree."""
  if kind == 'linen':
    return tree
  if kind == 'nnx':

    class Net(nnx.Module):
      def __init__(self):
        for layer in SHAPES:
          setattr(self, layer, nnx.Linear(*SHAPES[layer]['kernel'], rngs=nnx.Rngs(0)))

    def given(path, _):
      layer, name = leaf_name(path).split('/')
      return tree[layer][name]

    # Abstractly: compiling an initialiser takes longer than most tests.
    state = nnx.split(nnx.eval_shape(Net), nnx.Param)[1]
    return jax.tree_util.tree_map_with_path(given, state)
  if kind == 'equinox':
    import equinox as eqx

    layer_type = _equinox_layer()
    net = {layer: layer_type(part['kernel'], part['bias']) for layer, part in tree.items()}
    return eqx.partition(net, eqx.is_array)[0]  # None where the activation was
  if kind == 'haiku':
    import haiku as hk

    def net(x):
      for layer in SHAPES:
        x = hk.Linear(SHAPES[layer]['kernel'][1], name=layer)(x)
      return x

    init = hk.without_apply_rng(hk.transform(net)).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 8)))
    short = {'w': 'kernel', 'b': 'bias'}
    return {m: {n: tree[m][short[n]] for n in part} for m, part in params.items()}
  raise ValueError(kind)


KINDS = ('linen', 'nnx', 'equinox', 'haiku')


def by_shape(tree):
  """Leaves in an order that does not depend on the kind of tree."""
  return sorted((np.asarray(x) for x in jax.tree.leaves(tree)), key=lambda x: x.shape)


def largest(keep):
  """Target: the largest weights of every matrix; vectors are left alone."""

  def target(tree):
    masks = jax.tree.map(
      lambda w: top_k_mask(jnp.abs(w), max(1, round(keep * w.size))) if w.ndim > 1 else None, tree
    )
    return apply_masks(tree, masks), masks

  return target


def grads_at(step, params):
  """Gradients that depend on the weights and the step: every leaf wants to be elsewhere."""

  def one(p):
    wave = jnp.cos(jnp.arange(p.size, dtype=jnp.float32) * (step + 1))
    return p - wave.reshape(p.shape).astype(p.dtype)

  return jax.tree.map(one, params)


def pairs(tree):
  """Target: the larger of every two neighbours. Compiles faster than `largest`."""

  def mask(w):
    if w.ndim < 2:
      return None
    two = jnp.abs(w).reshape(*w.shape[:-1], -1, 2)
    first = two[..., 0] >= two[..., 1]
    return jnp.stack([first, ~first], -1).reshape(w.shape)

  masks = jax.tree.map(mask, tree)
  return apply_masks(tree, masks), masks


def jitted_step(tx, **extra_args):
  """`step(params, state, i) -> (params, state)`, one program."""

  @jax.jit
  def step(params, state, i):
    updates, state = tx.update(grads_at(i.astype(jnp.float32), params), state, params, **extra_args)
    return optax.apply_updates(params, updates), state

  return step


def train(step, params, state, first, last):
  for i in range(first, last):
    params, state = step(params, state, jnp.int32(i))
  return params, state


def assert_same(a, b):
  """Equal trees, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def assert_dead_are_zero(params, masks):
  seen = 0
  for p, m in zip(
    jax.tree.leaves(params), jax.tree.structure(params).flatten_up_to(masks), strict=True
  ):
    if m is not None:
      assert np.all(np.asarray(p)[~np.asarray(m)] == 0)
      seen += int((~np.asarray(m)).sum())
  assert seen
