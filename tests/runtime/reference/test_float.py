"""The NumPy executor computes what JAX computes."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special

from fqjax.runtime import oplist, reference
from fqjax.runtime.graph import Node
from fqjax.runtime.reference import _windows
from fqjax.runtime.reference._run import _RUN
from fqjax.tracing import evaluate_node, to_graph
from tests.tracing.test_graph import FUNCTIONS


def test_every_operation_of_the_list_is_there():
  assert set(_RUN) == set(oplist.OPS)


@pytest.mark.parametrize('name', sorted(set(FUNCTIONS) - {'half'}))
def test_numpy_runs_what_jax_runs(name):
  fn, _ = FUNCTIONS[name]
  traced = to_graph(lambda p, x: fn(x), {}, jax.ShapeDtypeStruct((7, 8, 8, 6), jnp.float32))
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 6)).astype(np.float32)
  want = traced({}, x)
  got = reference.run(traced.graph, [x])
  for a, b in zip(got, jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    # float32 sums in another order
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_refused():
  fn, _ = FUNCTIONS['half']
  graph = to_graph(lambda p, x: fn(x), {}, jnp.ones((1, 8, 8, 6))).graph
  with pytest.raises(ValueError, match='NumPy has no bfloat16'):
    reference.run(graph, [np.ones((1, 8, 8, 6), np.float32)])


SPECIAL = {
  'erf': scipy.special.erf,
  'erfc': scipy.special.erfc,
  'logistic': scipy.special.expit,
  'rsqrt': lambda x: 1 / np.sqrt(x),
  'cbrt': np.cbrt,
}


@pytest.mark.parametrize('op', SPECIAL)
def test_functions_equal_scipy_in_float64(op):
  x = np.linspace(0.01, 3, 50)
  [got] = reference.run_node(Node(op, ('x',), ('y',)), [x])
  np.testing.assert_allclose(got, SPECIAL[op](x), rtol=1e-12)


def test_convolution_equals_scipy():
  rng = np.random.default_rng(3)
  x, w = rng.normal(size=(1, 2, 9, 8)), rng.normal(size=(3, 2, 3, 4))
  attributes = {
    'strides': (1, 1), 'padding': ((1, 1), (2, 1)), 'dilation': (1, 1), 'input_dilation': (1, 1),
    'groups': 1, 'layout': ('NCHW', 'OIHW', 'NCHW'), 'dtype': 'float64', 'precision': 'default',
  }  # fmt: skip
  [got] = reference.run_node(Node('conv', ('x', 'w'), ('y',), attributes), [x, w])
  wide = np.pad(x[0], [(0, 0), (1, 1), (2, 1)])
  want = [sum(scipy.signal.correlate(wide[i], k[i], 'valid') for i in range(2)) for k in w]
  np.testing.assert_allclose(got[0], want, rtol=1e-12)


CONVS = {
  '1-D, grouped': ((2, 9, 4), (3, 2, 6), dict(groups=2, layout=('NWC', 'WIO', 'NWC'), strides=(2,), padding=((-1, 2),), dilation=(1,), input_dilation=(1,))),
  '3-D': ((1, 4, 5, 3, 2), (2, 2, 2, 2, 3), dict(groups=1, layout=('NDHWC', 'DHWIO', 'NDHWC'), strides=(1, 2, 1), padding=((1, 0), (0, 0), (1, 1)), dilation=(2, 1, 1), input_dilation=(1, 1, 2))),
  'HWCN': ((5, 6, 4, 2), (2, 3, 1, 8), dict(groups=4, layout=('HWCN', 'HWIO', 'CHWN'), strides=(1, 1), padding=((1, 1), (0, 0)), dilation=(1, 1), input_dilation=(2, 1))),
}  # fmt: skip


@pytest.mark.parametrize('name', CONVS)
def test_convolutions_of_any_kind_equal_jax(name):
  shape, kernel, attributes = CONVS[name]
  rng = np.random.default_rng(4)
  x, w = (rng.normal(size=s).astype(np.float32) for s in (shape, kernel))
  node = Node(
    'conv', ('x', 'w'), ('y',), {**attributes, 'dtype': 'float32', 'precision': 'highest'}
  )
  [got], [want] = reference.run_node(node, [x, w]), evaluate_node(node, [x, w])
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_clamps_equal_jax():
  x = np.linspace(-3, 9, 25, dtype=np.float32)
  for low, high in ((0.0, None), (None, 6.0), (0.0, 6.0), (-1.5, 2.5)):
    node = Node('clamp', ('x',), ('y',), {'low': low, 'high': high})
    [got], [want] = reference.run_node(node, [x]), evaluate_node(node, [x])
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got, np.clip(x, low, high))
    for other in (np.float32(0.5), x[::-1]):
      node = Node('add_clamp', ('x', 'b'), ('y',), {'low': low, 'high': high})
      [got], [want] = reference.run_node(node, [x, other]), evaluate_node(node, [x, other])
      np.testing.assert_array_equal(got, want)
      np.testing.assert_array_equal(got, np.clip(x + other, low, high))
  odd = np.float32([np.nan, np.inf, -np.inf])
  for array in (odd, odd.copy()):
    node = Node('add_clamp', ('x', 'b'), ('y',), {'low': 0.0, 'high': 6.0})
    assert str(reference.run_node(node, [array, np.float32([1, 1, 1])])[0]) == '[nan  6.  0.]'


def test_halves_away_from_zero_and_zeros_with_their_sign():
  x = np.float32([0.49999997, -0.49999997, 0.5, -2.5, 8388609, np.inf, -np.inf, -0.0])
  want = jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
  got = reference.run_node(Node('round', ('x',), ('y',), {'halves': 'away'}), [x])[0]
  assert np.asarray(want).tobytes() == got.tobytes()
  sign = reference.run_node(Node('sign', ('x',), ('y',)), [np.float32([-0.0, 0.0, -3, 2])])[0]
  assert np.signbit(sign).tolist() == [True, False, True, False]


@pytest.mark.parametrize('dtype', ['int32', 'int8', 'uint8'])
def test_integers_divide_as_xla_does(dtype):
  info = np.iinfo(dtype)
  values = np.array([info.min, info.min + 1, 0, 1, 5, 7, info.max], dtype)
  a, b = (x.reshape(-1) for x in np.meshgrid(values, values))
  for op, fn in (('div', jax.lax.div), ('rem', jax.lax.rem)):
    got = reference.run_node(Node(op, ('a', 'b'), ('c',)), [a, b])[0]
    np.testing.assert_array_equal(got, fn(a, b), op)


def test_means_of_large_images_lose_nothing():
  x = np.random.default_rng(0).uniform(0.5, 1.5, (1, 1024, 1024, 1)).astype(np.float32)
  got = reference.run_node(Node('reduce_sum', ('x',), ('y',), {'axes': (1, 2)}), [x])[0]
  np.testing.assert_allclose(got[0, 0], x.sum(dtype=np.float64), rtol=1e-7)
  window = {'window': (1, 1024, 1024, 1), 'strides': (1, 1, 1, 1), 'dilation': (1, 1, 1, 1)}
  node = Node('pool_sum', ('x',), ('y',), {**window, 'padding': ((0, 0),) * 4})
  small = {**node.attributes, 'window': (1, 100, 100, 1)}
  got = reference.run_node(node._replace(attributes=small), [x[:, :100, :100]])[0]
  np.testing.assert_allclose(got.item(), x[:, :100, :100].sum(dtype=np.float64), rtol=1e-7)


def test_kernels_name_the_order_of_spatial_axes():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, 5, 7, 3)), rng.normal(size=(2, 3, 3, 4))
  attributes = {
    'strides': (1, 2), 'padding': ((0, 1), (2, 0)), 'dilation': (1, 1), 'input_dilation': (1, 1),
    'groups': 1, 'dtype': 'float64', 'precision': 'default',
  }  # fmt: skip
  plain = Node('conv', ('x', 'w'), ('y',), {**attributes, 'layout': ('NHWC', 'HWIO', 'NHWC')})
  [want] = reference.run_node(plain, [x, w])
  turned = {
    **attributes, 'strides': (2, 1), 'padding': ((2, 0), (0, 1)), 'layout': ('NHWC', 'WHIO', 'NHWC')
  }  # fmt: skip
  [got] = reference.run_node(plain._replace(attributes=turned), [x, w.transpose(1, 0, 2, 3)])
  np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_place_in_the_batch_changes_no_bit_of_a_convolution():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(1, 9, 9, 16)).astype(np.float32)
  batch = np.concatenate([rng.normal(size=(3, 9, 9, 16)).astype(np.float32), image])
  for taps in (1, 3):
    w = rng.normal(size=(taps, taps, 16, 8)).astype(np.float32)
    conv = lambda x, w=w: _windows.conv(
      x, w, (1, 1), ((0, 0),) * 2, (1, 1), (1, 1), 1, ('NHWC', 'HWIO', 'NHWC')
    )
    assert conv(batch)[-1:].tobytes() == conv(image).tobytes()


def test_convolutions_one_row_high_stay_small():
  x, w = np.zeros((1, 1, 1 << 16, 1), np.float32), np.zeros((1, 256, 1, 2), np.float32)
  tracemalloc.start()
  _windows.conv(x, w, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, ('NHWC', 'HWIO', 'NHWC'))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 << 20


def test_nothing_is_left_of_what_is_cropped_away():
  x = np.ones((1, 3, 4, 1), np.float32)
  w = np.ones((1, 1, 1, 1), np.float32)
  out = _windows.conv(x, w, (1, 1), ((0, -5), (0, 0)), (1, 1), (1, 1), 1, ('NHWC', 'HWIO', 'NHWC'))
  assert out.shape == (1, 0, 4, 1)
