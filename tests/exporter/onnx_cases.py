"""Graphs of one operation each, and arrays for them."""

import numpy as np

from fqjax.runtime import oplist
from fqjax.runtime.graph import Graph, Node, Tensor, validate


def one(op, *inputs, **attributes):
  """A graph of one node; arrays are constants, (shape, dtype) are inputs."""
  tensors, constants, names = {}, {}, []
  for i, given in enumerate(inputs):
    constant = isinstance(given, np.ndarray)
    name = f'{"c" if constant else "x"}{i}'
    shape, dtype = (given.shape, str(given.dtype)) if constant else given
    tensors[name] = Tensor(name, shape, dtype)
    names.append(name)
    if constant:
      constants[name] = given
  results = oplist.infer(op, [tuple(tensors[name][1:]) for name in names], attributes)
  outputs = tuple(f'y{i}' for i in range(len(results)))
  tensors |= {name: Tensor(name, *kind) for name, kind in zip(outputs, results, strict=True)}
  inputs = tuple(name for name in names if name not in constants)
  graph = Graph(
    inputs, (), constants, (Node(op, tuple(names), outputs, attributes, 'net'),), outputs, tensors
  )
  validate(graph)
  return graph


RNG = np.random.default_rng(0)
X, INTS, B, U = (((('n', 4, 6)), dtype) for dtype in ('float32', 'int32', 'bool', 'uint8'))
IMAGE = (('n', 7, 6, 4), 'float32')
ONES = (1, 1, 1, 1)


def draw(op, shape, dtype, batch=3):
  shape = [batch if dim == 'n' else dim for dim in shape]
  if dtype == 'bool':
    return RNG.random(shape) < 0.5
  if np.dtype(dtype).kind in 'iu':
    low = 1 if op in ('div', 'rem', 'integer_pow') or np.dtype(dtype).kind == 'u' else -9
    return RNG.integers(low, 10, shape).astype(dtype)
  if op in ('log', 'log1p', 'sqrt', 'rsqrt', 'pow', 'asin', 'acos', 'atanh'):
    return RNG.uniform(0.05, 0.95, shape).astype(dtype)
  if op == 'acosh':
    return RNG.uniform(1.1, 3, shape).astype(dtype)
  return RNG.normal(size=shape).astype(dtype)


def floats(*shape):
  return np.asarray(np.random.default_rng(1).normal(size=shape), np.float32)


def window(w=(1, 3, 2, 1), s=(1, 2, 1, 1), p=((0, 0), (1, 1), (0, 1), (0, 0)), d=ONES):
  return dict(window=w, strides=s, padding=p, dilation=d)


def conv(**changes):
  return {
    'strides': (1, 1), 'padding': ((1, 1), (1, 1)), 'dilation': (1, 1), 'input_dilation': (1, 1),
    'groups': 1, 'layout': ('NHWC', 'HWIO', 'NHWC'), 'dtype': 'float32', 'precision': 'default',
  } | changes  # fmt: skip


def dot(contract, batch=((), ())):
  return {'contract': contract, 'batch': batch, 'dtype': 'float32', 'precision': 'default'}


_GATHER = dict(
  offset=(1, 2), collapsed=(2,), index_map=(2,), operand_batch=(), index_batch=(), sizes=('n', 4, 1)
)
_PLACES = np.array([[2], [-1], [9], [5], [0]], np.int32)
_FAR = np.array([[0, 1], [3, 3], [-2, 9]], np.int32)

CASES = {
  **{op: (one(op, X),) for op in oplist.UNARY if op != 'not'},
  **{f'{op} of integers': (one(op, INTS),) for op in ('neg', 'abs', 'sign', 'square')},
  'not': (one('not', B),),
  'not of integers': (one('not', INTS),),
  **{op: (one(op, X, X),) for op in oplist.BINARY if op not in ('and', 'or', 'xor')},
  **{f'{op} of integers': (one(op, INTS, INTS),) for op in ('add', 'div', 'max', 'rem')},
  **{op: (one(op, B, B),) for op in ('and', 'or', 'xor')},
  **{f'{op} of bits': (one(op, INTS, INTS),) for op in ('and', 'or', 'xor')},
  'add of uint8': (one('add', U, U),),
  'broadcasting': (one('mul', X, floats(1, 4, 1)),),
  'a scalar': (one('sub', floats(), X),),
  **{op: (one(op, X, X),) for op in oplist.COMPARE},
  'equal integers': (one('eq', INTS, INTS),),
  'pow': (one('pow', X, X),),
  'pow of an integer': (one('pow', X, np.array(3, np.int32)),),
  'integer_pow': (one('integer_pow', X, exponent=-3),),
  'integer_pow of integers': (one('integer_pow', INTS, exponent=2),),
  'round even': (one('round', (('n', 9), 'float32'), halves='even'), [np.float32([np.arange(9) / 2 - 2] * 3)]),
  'round away': (one('round', (('n', 9), 'float32'), halves='away'), [np.float32([np.arange(9) / 2 - 2] * 3)]),
  'is_finite': (one('is_finite', (('n', 3), 'float32')), [np.float32([[1, np.inf, np.nan]] * 3)]),
  'clamp': (one('clamp', X, low=-0.5, high=None),),
  'relu': (one('clamp', X, low=0.0, high=None),),
  'relu6': (one('clamp', X, low=0.0, high=0.5),),
  'add_clamp': (one('add_clamp', X, floats(1, 4, 6), low=-0.5, high=0.5),),
  'relu of a sum': (one('add_clamp', X, X, low=0.0, high=None),),
  'select': (one('select', B, X, floats(1, 4, 6)),),
  'select of bools': (one('select', B, B, B),),
  'cast': (one('cast', X, dtype='int32'),),
  'cast to bool': (one('cast', INTS, dtype='bool'),),
  **{op: (one(op, X, axes=(0, 2)),) for op in oplist.REDUCE[:4]},
  'reduce_max of integers': (one('reduce_max', INTS, axes=(1,)),),
  'reduce_sum over nothing': (one('reduce_sum', X, axes=()),),
  'reduce_and': (one('reduce_and', B, axes=(1,)),),
  'reduce_or': (one('reduce_or', B, axes=(1, 2)),),
  'reduce_max, later': (one('reduce_max', X, axes=(1,)), None, dict(opset=18)),
  'argmax': (one('argmax', X, axis=1, dtype='int32'),),
  'argmin of integers': (one('argmin', INTS, axis=2, dtype='int32'),),
  **{f'{op} {r}': (one(op, X, axis=2, reverse=r),) for op in oplist.CUMULATIVE for r in (False, True)},
  'cummax of integers': (one('cummax', INTS, axis=1, reverse=False),),
  'sort': (one('sort', X, axis=1, keys=1),),
  'sort by two keys': (one('sort', INTS, INTS, X, axis=2, keys=2),),
  'sort along the batch': (one('sort', INTS, X, axis=0, keys=1),),
  'top_k': (one('top_k', X, axis=1, k=2),),
  'top_k of equals': (one('top_k', INTS, axis=2, k=5),),
  'reshape': (one('reshape', X, shape=('4*n', 2, 3)),),
  'transpose': (one('transpose', X, permutation=(2, 0, 1)),),
  'broadcast': (one('broadcast', X, shape=(2, 'n', 4, 3, 6), axes=(1, 2, 4)),),
  'concat': (one('concat', X, X, axis=2),),
  'concat of batches': (one('concat', X, X, axis=0),),
  'slice': (one('slice', X, start=(0, 1, 0), stop=('n', 4, 5), strides=(1, 2, 1)),),
  'pad': (one('pad', X, np.array(2, np.float32), padding=((0, 0), (1, 0), (0, 2)), interior=(0, 2, 0)),),
  'reverse': (one('reverse', X, axes=(0, 2)),),
  'gather, clip': (one('gather', X, _PLACES, **_GATHER, mode='clip'),),
  'gather, fill': (one('gather', X, _PLACES, **_GATHER, mode='fill'),),
  'gather, moved': (one('gather', X, _PLACES, **{**_GATHER, 'offset': (0, 2)}, mode='fill'),),
  'gather, places that move': (
    one('gather', X, (('n', 2), 'int32'), offset=(1,), collapsed=(0, 1), index_map=(1, 0), operand_batch=(), index_batch=(), sizes=(1, 1, 6), mode='fill'),
  ),
  'gather, windows': (
    one('gather', floats(5, 6, 3), (('n', 4, 2), 'int32'), offset=(0, 3, 4), collapsed=(), index_map=(0, 1), operand_batch=(), index_batch=(), sizes=(2, 3, 2), mode='clip'),
  ),
  'gather, each its own': (
    one('gather', X, (('n', 5, 1), 'int32'), offset=(2,), collapsed=(1,), index_map=(1,), operand_batch=(0,), index_batch=(0,), sizes=(1, 1, 6), mode='fill'),
  ),
  'gather, places in another order': (
    one('gather', X, ((5, 'n', 1), 'int32'), offset=(2,), collapsed=(1,), index_map=(1,), operand_batch=(0,), index_batch=(1,), sizes=(1, 1, 6), mode='fill'),
  ),
  'gather, one axis': (
    one('gather', X, _FAR, offset=(1, 2), collapsed=(1,), index_map=(1, 2), operand_batch=(), index_batch=(), sizes=('n', 1, 3), mode='fill'),
  ),
  **{op: (one(op, IMAGE, **window()),) for op in oplist.POOL},
  'pool_max, wide padding': (one('pool_max', IMAGE, **window(p=((0, 0), (3, 0), (2, 2), (0, 0)))),),
  'pool_sum, cropped': (one('pool_sum', IMAGE, **window(p=((0, 0), (-1, 1), (0, -2), (0, 0)))),),
  'pool_max, dilated': (one('pool_max', IMAGE, **window(d=(1, 2, 1, 1))),),
  'pool_sum, dilated': (one('pool_sum', IMAGE, **window(d=(1, 2, 1, 1))),),
  'pool_sum over channels': (
    one('pool_sum', IMAGE, window=(1, 1, 1, 3), strides=ONES, padding=((0, 0), (0, 0), (0, 0), (1, 1)), dilation=ONES),
  ),
  'pool_max of rows': (one('pool_max', (('n', 9), 'float32'), window=(1, 3), strides=(1, 2), padding=((0, 0), (1, 0)), dilation=(1, 1)),),
  'pool_max of integers': (one('pool_max', (IMAGE[0], 'int32'), **window()),),
  'pool_max of uint8': (one('pool_max', (IMAGE[0], 'uint8'), **window()),),
  'pool_min of uint8': (one('pool_min', (IMAGE[0], 'uint8'), **window(p=((0, 0),) * 4)),),
  'pool_sum of integers': (one('pool_sum', (IMAGE[0], 'int32'), **window()),),
  'conv': (one('conv', IMAGE, floats(3, 3, 4, 5), **conv()),),
  'conv, strided': (one('conv', IMAGE, floats(3, 2, 4, 5), **conv(strides=(2, 3), padding=((0, 1), (2, 0)))),),
  'conv, dilated': (one('conv', IMAGE, floats(3, 2, 4, 5), **conv(dilation=(2, 3))),),
  'conv, grouped': (one('conv', IMAGE, floats(3, 3, 2, 6), **conv(groups=2)),),
  'conv, depthwise': (one('conv', IMAGE, floats(3, 3, 1, 8), **conv(groups=4)),),
  'conv, cropped': (one('conv', IMAGE, floats(3, 3, 4, 5), **conv(padding=((-1, 1), (0, -2)))),),
  'conv of a kernel that moves': (one('conv', IMAGE, ((3, 3, 4, 2), 'float32'), **conv()), [floats(3, 7, 6, 4), floats(3, 3, 4, 2)]),
  'conv, 1-D': (
    one('conv', (('n', 9, 4), 'float32'), floats(3, 2, 6), **conv(strides=(2,), padding=((1, 0),), dilation=(1,), input_dilation=(1,), groups=2, layout=('NWC', 'WIO', 'NCW'))),
  ),
  'conv, 3-D': (
    one('conv', (('n', 4, 5, 3, 2), 'float32'), floats(3, 2, 2, 2, 2), **conv(strides=(1, 2, 1), padding=((1, 0), (0, 0), (1, 1)), dilation=(2, 1, 1), input_dilation=(1, 1, 1), layout=('NDHWC', 'OIDHW', 'NDHWC'))),
  ),
  'conv, odd layouts': (
    one('conv', ((5, 6, 4, 'n'), 'float32'), floats(8, 1, 2, 3), **conv(groups=4, layout=('HWCN', 'OIHW', 'CHWN'))), [floats(5, 6, 4, 3)]
  ),
  **{
    f'conv, transposed {i}': (one('conv', IMAGE, floats(*kernel), **conv(**changes)),)
    for i, (kernel, changes) in enumerate([
      ((3, 3, 4, 5), dict(input_dilation=(2, 2), padding=((2, 1), (2, 1)))),
      ((4, 4, 2, 6), dict(input_dilation=(2, 3), padding=((2, 2), (1, 3)), groups=2)),
      ((2, 2, 4, 3), dict(input_dilation=(2, 2), padding=((0, 2), (1, 1)))),  # beyond the end
      ((3, 3, 4, 5), dict(input_dilation=(2, 2), padding=((3, 1), (2, 1)))),  # before the beginning
      ((3, 3, 4, 5), dict(input_dilation=(2, 1), padding=((2, 1), (1, 1)), strides=(1, 2))),
      ((3, 3, 4, 5), dict(input_dilation=(2, 2), padding=((-1, 1), (2, 1)), dilation=(2, 1))),
    ])
  },
  'dot': (one('dot', X, floats(6, 5), **dot(((2,), (0,)))),),
  'dot, the other way': (one('dot', X, floats(5, 6), **dot(((2,), (1,)))),),
  'dot, batched': (one('dot', X, X, **dot(((2,), (2,)), ((0,), (0,)))),),
  'dot of many axes': (one('dot', X, floats(4, 6, 5), **dot(((1, 2), (0, 1)))),),
  'dot over two batches': (one('dot', IMAGE, IMAGE, **dot(((2,), (2,)), ((0, 3), (0, 3)))),),
  'dot of vectors': (one('dot', X, floats(6), **dot(((2,), (0,)))),),
}  # fmt: skip
