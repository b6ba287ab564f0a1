"""The graph's own rules: shapes against JAX's, errors that name the node, NumPy alone."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.runtime import dims, oplist
from fqjax.runtime.graph import Graph, Node, Tensor, batch_size, consumers, validate, without_dead
from fqjax.tracing import evaluate_node

_CONV = {
  'strides': (2, 1), 'padding': ((1, 2), (0, 0)), 'dilation': (1, 2), 'input_dilation': (1, 1),
  'groups': 1, 'layout': ('NHWC', 'HWIO', 'NHWC'), 'dtype': 'float32', 'precision': 'default',
}  # fmt: skip
_DOT = {'contract': ((2,), (0,)), 'batch': ((), ()), 'dtype': 'float32', 'precision': 'default'}
_POOL = {
  'window': (1, 3, 2, 1), 'strides': (1, 2, 2, 1), 'padding': ((0, 0), (1, 1), (0, 1), (0, 0)),
  'dilation': (1, 1, 2, 1),
}  # fmt: skip
_GATHER = {
  'offset': (0, 1, 3), 'collapsed': (2,), 'index_map': (2,), 'operand_batch': (),
  'index_batch': (), 'sizes': ('n', 6, 1, 4), 'mode': 'clip',
}  # fmt: skip
_X = ('n', 6, 8, 4)

# op, shapes of the inputs, attributes
CASES = [
  ('add', [_X, (1, 1, 1, 4)], {}),
  ('mul', [(), _X], {}),
  ('lt', [_X, _X], {}),
  ('tanh', [_X], {}),
  ('is_finite', [_X], {}),
  ('integer_pow', [_X], {'exponent': 3}),
  ('round', [_X], {'halves': 'even'}),
  ('cast', [_X], {'dtype': 'int32'}),
  ('reduce_sum', [_X], {'axes': (1, 2)}),
  ('reduce_max', [_X], {'axes': (0,)}),
  ('argmax', [_X], {'axis': 3, 'dtype': 'int32'}),
  ('cumsum', [_X], {'axis': 1, 'reverse': True}),
  ('sort', [_X, _X], {'axis': 3, 'keys': 1}),
  ('top_k', [_X], {'axis': 2, 'k': 3}),
  ('iota', [], {'shape': _X, 'dtype': 'int32', 'axis': 1}),
  ('reshape', [_X], {'shape': ('48*n', 2, 2)}),
  ('transpose', [_X], {'permutation': (3, 0, 2, 1)}),
  ('broadcast', [(6, 1)], {'shape': ('n', 6, 8), 'axes': (1, 2)}),
  ('concat', [_X, _X], {'axis': 0}),
  ('concat', [_X, ('n', 6, 3, 4)], {'axis': 2}),
  ('slice', [_X], {'start': (0, 1, 0, 2), 'stop': ('n', 6, 8, 3), 'strides': (1, 2, 3, 1)}),
  ('pad', [_X, ()], {'padding': ((0, 0), (1, 2), (0, 0), (3, 0)), 'interior': (0, 2, 0, 0)}),
  ('reverse', [_X], {'axes': (1, 2)}),
  ('pool_max', [_X], _POOL),
  ('pool_sum', [_X], _POOL),
  ('conv', [_X, (3, 2, 4, 10)], _CONV),
  ('conv', [_X, (3, 2, 2, 10)], {**_CONV, 'groups': 2, 'layout': ('NHWC', 'HWIO', 'NCHW')}),
  ('conv', [_X, (3, 2, 4, 10)], {**_CONV, 'strides': (1, 1), 'input_dilation': (2, 3)}),
  ('dot', [('n', 6, 8), (8, 5)], _DOT),
  ('dot', [('n', 6, 8), ('n', 8, 6)], {**_DOT, 'contract': ((2,), (1,)), 'batch': ((0,), (0,))}),
]  # fmt: skip


@pytest.mark.parametrize('case', CASES, ids=lambda case: case[0])
@pytest.mark.parametrize('batch', [1, 3])
def test_shapes_and_types_are_those_jax_makes(case, batch):
  op, shapes, attributes = case
  inferred = oplist.infer(op, [(shape, 'float32') for shape in shapes], attributes)
  arrays = [jax.ShapeDtypeStruct(dims.bind(shape, batch), jnp.float32) for shape in shapes]
  node = Node(op, (), (), attributes)
  made = jax.eval_shape(lambda *xs: evaluate_node(node, xs, batch), *arrays)
  assert [(x.shape, str(x.dtype)) for x in made] == [
    (dims.bind(shape, batch), dtype) for shape, dtype in inferred
  ]


def test_gather_shape_and_select_type():
  [(shape, dtype)] = oplist.infer('gather', [(_X, 'float32'), ((5, 1), 'int32')], _GATHER)
  assert (shape, dtype) == (('n', 6, 5, 4), 'float32')
  made = oplist.infer('select', [(_X, 'bool'), (_X, 'int8'), ((), 'int8')], {})
  assert made == [(_X, 'int8')]


# op, shapes, attributes, part of the message
WRONG = [
  ('relu', [_X], {}, "'relu' is not an operation"),
  ('add', [_X], {}, 'takes 2 inputs, got 1'),
  ('add', [_X, ('n', 4)], {}, 'differ in rank'),
  ('add', [_X, ('n', 6, 8, 3)], {}, 'do not broadcast'),
  ('tanh', [_X], {'axis': 1}, r'has attributes \(none\); got axis'),
  ('reduce_sum', [_X], {'axes': [1]}, 'axes must be whole numbers'),
  ('reduce_sum', [_X], {'axes': (4,)}, 'axis 4 is not an axis'),
  ('reshape', [_X], {'shape': ('n', 7)}, r'cannot reshape \[n, 6, 8, 4\] to \[n, 7\]'),
  ('reshape', [_X], {'shape': (192,)}, 'cannot reshape'),
  ('reshape', [_X], {'shape': ('n+1', 192)}, 'shape must be a shape'),
  ('transpose', [_X], {'permutation': (0, 1, 2)}, 'does not order'),
  ('concat', [_X, ('n', 5, 8, 4)], {'axis': 3}, 'differ in another axis than 3'),
  ('slice', [_X], {'start': (0,) * 4, 'stop': ('n', 6, 8, 5), 'strides': (1,) * 4}, '0:5 leaves'),
  ('slice', [_X], {'start': (0,) * 4, 'stop': (1, 6, 8, 4), 'strides': (1,) * 4}, 'taken whole'),
  ('pad', [_X, ()], {'padding': ((0, 0),) * 3 + ((-1, 0),), 'interior': (0,) * 4}, 'negative'),
  ('conv', [_X, (3, 2, 3, 10)], _CONV, '4 channels in 1 groups do not fit'),
  ('conv', [_X, (3, 2, 4)], _CONV, "layout 'HWIO' does not name the axes"),
  ('conv', [_X, (3, 2, 4, 10)], {**_CONV, 'strides': (0, 1)}, 'strides must be whole numbers >= 1'),
  ('dot', [('n', 6, 7), (8, 5)], _DOT, 'differ in size'),
  ('top_k', [_X], {'axis': 2, 'k': 9}, 'k = 9 of an axis of 8'),
]  # fmt: skip


@pytest.mark.parametrize('case', WRONG, ids=lambda case: case[3][:20])
def test_what_does_not_fit_is_said(case):
  op, shapes, attributes, message = case
  with pytest.raises(ValueError, match=message):
    oplist.infer(op, [(shape, 'float32') for shape in shapes], attributes)


def _graph() -> Graph:
  tensors = [
    Tensor('x', ('n', 3), 'float32'),
    Tensor('w', (3, 2), 'float32'),
    Tensor('#0', (), 'float32'),
    Tensor('%0', ('n', 2), 'float32'),
    Tensor('%1', ('n', 2), 'float32'),
  ]
  contract = {'contract': ((1,), (0,)), 'batch': ((), ()), 'dtype': 'float32'}
  return Graph(
    inputs=('x',),
    parameters=('w',),
    constants={'#0': np.zeros((), np.float32)},
    nodes=(
      Node('dot', ('x', 'w'), ('%0',), {**contract, 'precision': 'default'}, 'net/fc'),
      Node('max', ('%0', '#0'), ('%1',), {}, 'net'),
    ),
    outputs=('%1', '%1'),
    tensors={tensor.name: tensor for tensor in tensors},
  )


def test_a_graph_reads_like_a_program():
  graph = _graph()
  validate(graph)
  assert str(graph).splitlines()[1:] == [
    'input x: float32[n, 3]',
    'parameter w: float32[3, 2]',
    'constant #0: float32[] = 0.0',
    "%0: float32[n, 2] = dot(x, w) contract=((1,), (0,)) batch=((), ()) dtype='float32' "
    "precision='default'  # net/fc",
    '%1: float32[n, 2] = max(%0, #0)  # net',
    'return %1, %1',
  ]
  assert consumers(graph) == {'x': [0], 'w': [0], '#0': [1], '%0': [1], '%1': []}


def _with(**changes) -> Graph:
  graph = _graph()
  tensors = {**graph.tensors, **changes.pop('described', {})}
  return dataclasses.replace(graph, tensors=tensors, **changes)


@pytest.mark.parametrize(
  ('graph', 'message'),
  [
    (_with(version=2), 'version 2 of the operations.*update fqjax'),
    (_with(nodes=_graph().nodes[::-1]), r"node 0, max \(net\): reads '%0' before"),
    (_with(nodes=_graph().nodes[:1] * 2), r"node 1, dot \(net/fc\): writes '%0', which exists"),
    (_with(nodes=_graph().nodes[:1]), "returns '%1', which nothing makes"),
    (
      _with(described={'%0': Tensor('%0', ('n', 4), 'float32')}),
      r'node 0, dot \(net/fc\): makes %0: float32\[n, 2\], described as %0: float32\[n, 4\]',
    ),
    (_with(described={'w': Tensor('w', (3, 2.0), 'float32')}), 'every size is a whole number'),
    (_with(described={'w': Tensor('w', (3, 2), 'float8')}), 'dtype must be one of'),
    (_with(described={'w': Tensor('v', (3, 2), 'float32')}), "under the name 'v'"),
    (_with(described={'y': Tensor('y', (), 'int8')}), "'y' is described, and nothing makes it"),
    (_with(parameters=('w', 'v')), "'v' is not described"),
    (_with(inputs=('x', 'w')), "'w' is named twice"),
    (_with(constants={'#0': np.zeros(())}), r'holds an array float64\[\]'),
  ],
)
def test_validate_names_what_is_wrong(graph, message):
  with pytest.raises(ValueError, match=message):
    validate(graph)


def test_the_batch_is_read_off_the_inputs():
  graph = _with(described={'x': Tensor('x', ('2*n', 3), 'float32')})
  assert batch_size(graph, [(10, 3)]) == 5
  for wrong in ([(9, 3)], [(10, 4)], [(10, 3, 1)]):
    with pytest.raises(ValueError, match=r'the graph takes x: float32\[2\*n, 3\]'):
      batch_size(graph, wrong)
  two = dataclasses.replace(_graph(), inputs=('x', '%0'))
  with pytest.raises(ValueError, match=r'\(n = 4\), got an array \[5, 2\]'):
    batch_size(two, [(4, 3), (5, 2)])


def test_dead_nodes_and_constants_go():
  graph = dataclasses.replace(_graph(), outputs=('%0',))
  small = without_dead(graph)
  validate(small)
  assert [node.op for node in small.nodes] == ['dot']
  assert not small.constants and '%1' not in small.tensors


def test_numpy_is_all_the_graph_needs():
  code = (
    'import sys; sys.modules.update(jax=None, flax=None, scipy=None, ml_dtypes=None)\n'
    'import fqjax.runtime.graph, fqjax.runtime.oplist\n'
    "print([m for m in sys.modules if m.startswith(('jax.', 'jaxlib'))])"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
