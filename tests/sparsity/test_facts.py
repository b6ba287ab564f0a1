"""What is said to be known of a tensor is what it holds, whatever the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.runtime import dims
from fqjax.sparsity import _facts
from fqjax.tracing import evaluate_node, to_graph

_NUMBERS = ('NHWC', 'HWIO', 'NHWC')


def conv(x, w, padding='SAME', **options):
  return jax.lax.conv_general_dilated(
    x, w, options.pop('strides', (1, 1)), padding, dimension_numbers=_NUMBERS, **options
  )


def halved(x, w):
  """Of six channels: 0, 3 and 5 are zero, 1 and 4 are ones, 2 is from the image."""
  x = conv(x, w[:, :, :, :6])
  return x + jnp.array([0, 1, 0, 0, 1, 0.0])[None, None, None]


# name -> (function of (w, x), known entries of its first output: channels, or None for all)
CASES = {
  'conv': (lambda w, x: conv(halved(x, w), w[:, :, :, 2:4]), [1]),
  'weights of data': (
    lambda w, x: conv(halved(x, w), w[:1, :1] * jax.nn.sigmoid(x.max())), [0, 1, 3, 4, 5, 7],
  ),
  'valid': (lambda w, x: conv(halved(x, w), w[:, :, :, 6:], 'VALID'), [0, 1]),
  'same': (lambda w, x: conv(halved(x, w), w[:, :, :, 6:]), [1]),
  'strided': (lambda w, x: conv(halved(x, w), w[:, :, :, 6:], 'VALID', strides=(2, 2)), [0, 1]),
  'transposed': (
    lambda w, x: conv(halved(x, w), w[:, :, :, 6:], ((2, 2), (2, 2)), lhs_dilation=(2, 2)), [1],
  ),
  'depthwise': (
    lambda w, x: conv(halved(x, w), w[:, :, :1, :6], feature_group_count=6), [0, 1, 3, 4, 5],
  ),
  'dense': (lambda w, x: halved(x, w).mean((1, 2)) @ w[0, 0, :, 6:], [0, 1]),
  'product': (lambda w, x: jnp.einsum('nhwc,nhwd->ncd', halved(x, w), x), None),
  'relu': (lambda w, x: jax.nn.relu(halved(x, w) - 0.5), [0, 1, 3, 4, 5]),
  'gelu': (lambda w, x: jax.nn.gelu(halved(x, w)), [0, 1, 3, 4, 5]),
  'leaky': (lambda w, x: jax.nn.leaky_relu(halved(x, w) - 2), [0, 1, 3, 4, 5]),
  'times zero': (lambda w, x: halved(x, w) * jax.nn.sigmoid(x[:, :, :, :1]), [0, 3, 5]),
  'max pool': (
    lambda w, x: jax.lax.reduce_window(halved(x, w), -jnp.inf, jax.lax.max, (1, 3, 3, 1),
                                       (1, 2, 2, 1), 'SAME'), [0, 1, 3, 4, 5],
  ),
  'sum pool': (
    lambda w, x: jax.lax.reduce_window(halved(x, w), 0.0, jax.lax.add, (1, 3, 3, 1),
                                       (1, 2, 2, 1), 'SAME'), [0, 3, 5],
  ),
  'sum pool inside': (
    lambda w, x: jax.lax.reduce_window(halved(x, w), 0.0, jax.lax.add, (1, 2, 2, 1),
                                       (1, 1, 1, 1), 'VALID'), [0, 1, 3, 4, 5],
  ),
  'reductions': (
    lambda w, x: halved(x, w).sum((1, 2)) + halved(x, w).max((1, 2)) * halved(x, w).prod((1, 2)),
    [0, 1, 3, 4, 5],
  ),
  'batch sum': (lambda w, x: halved(x, w).sum((0, 1, 2)), [0, 3, 5]),
  'pad': (lambda w, x: jnp.pad(halved(x, w), ((0, 0), (1, 0), (0, 0), (1, 1))), [0, 1, 2, 4, 5, 6, 7]),
  'spread': (
    lambda w, x: jax.lax.pad(halved(x, w), 0.0, [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 1)]),
    [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11],
  ),
  'concat': (lambda w, x: jnp.concatenate([x[..., :2], halved(x, w)], -1), [2, 3, 5, 6, 7]),
  'slice': (lambda w, x: halved(x, w)[..., 1::2], [0, 1, 2]),
  'flip': (lambda w, x: jnp.flip(halved(x, w), -1), [0, 1, 2, 4, 5]),
  'flatten': (lambda w, x: halved(x, w).reshape(x.shape[0], -1), None),
  'groups': (lambda w, x: halved(x, w).reshape(*x.shape[:3], 3, 2).sum(-1), [0, 2]),
  'cut and join': (lambda w, x: halved(x, w).transpose(3, 1, 2, 0).reshape(3, 2, -1), None),
  'select': (lambda w, x: jnp.where(x[..., :1] > 0, halved(x, w), 1.0), [1, 4]),
  'integers': (lambda w, x: jnp.round(halved(x, w) * 2).astype(jnp.int32) // 2, [0, 1, 3, 4, 5]),
  'standardized': (lambda w, x: conv(x, (w - w.mean()) / jnp.std(w)), []),
  'dead weights': (lambda w, x: conv(x, jnp.sort(jnp.abs(w), 3) * 0), list(range(8))),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_what_is_known_is_so(name):
  fn, channels = CASES[name]
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 3, 6, 8)).astype(np.float32)
  w[:, :, 2:, :] = 0  # of two input channels
  w[:, :, :, [0, 1, 3, 4, 5]] = 0
  w[:, :, [0, 3, 1, 4, 5], 6] = 1  # reads constants alone
  w[:, :, :, 7] = 0
  graph = to_graph(fn, w, jax.ShapeDtypeStruct((2, 5, 5, 6), jnp.float32)).graph
  facts = _facts.find(graph, {'params': w})
  x = rng.normal(size=(2, 5, 5, 6)).astype(np.float32)
  values = {'params': w, 'input': x, **graph.constants}
  for node in graph.nodes:
    found = evaluate_node(node, [values[n] for n in node.inputs], 2)
    values |= zip(node.outputs, map(np.asarray, found), strict=True)
  for tensor in graph.tensors.values():
    fact, value = facts[tensor.name], values[tensor.name]
    assert all(
      have in (1, size)
      for have, size in zip(fact.known.shape, dims.bind(tensor.shape, 2), strict=True)
    )
    known = np.broadcast_to(fact.known, value.shape)
    said = np.broadcast_to(fact.value, value.shape)
    np.testing.assert_allclose(said[known], value[known], rtol=1e-5, atol=1e-5, err_msg=str(tensor))
  fact = facts[graph.outputs[0]]
  if channels is not None:
    known = np.flatnonzero(np.all(fact.known, tuple(range(fact.known.ndim - 1))))
    size = graph.tensors[graph.outputs[0]].shape[-1]
    known = list(range(size)) if fact.known.shape[-1] == 1 and fact.known.all() else list(known)
    assert known == channels
