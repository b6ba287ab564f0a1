"""ONNX files, run by another engine, give what the NumPy reference gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import data, ops, quantize
from fqjax.exporter import onnx as ours
from fqjax.exporter.onnx import _scales, onnx_size, to_onnx
from fqjax.exporter.passes import freeze
from fqjax.models import create_model, list_models
from fqjax.runtime import oplist, reference
from fqjax.runtime.graph import Tensor
from fqjax.tracing import to_graph
from tests.exporter.onnx_cases import CASES, IMAGE, INTS, ONES, B, X, conv, draw, floats, one
from tests.models.test_models import random_variables
from tests.quantize import networks
from tests.tracing import foreign
from tests.tracing.test_graph import FUNCTIONS

onnx = pytest.importorskip('onnx', reason="pip install 'fqjax[onnx]' to write ONNX")
ort = pytest.importorskip('onnxruntime', reason='pip install onnxruntime to run ONNX files')


def start(model, optimized=True):
  onnx.checker.check_model(model, full_check=True)
  options = ort.SessionOptions()
  options.intra_op_num_threads = 1
  options.log_severity_level = 3
  if not optimized:
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
  return ort.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )


def run(session, graph, arrays):
  names = [one.name for one in session.get_inputs()]
  return session.run(None, dict(zip(names, arrays, strict=True)))


def error(got, want):
  """The largest difference over the largest value; infinities and NaN must stand in the same places."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  largest = np.abs(want[finite]).max(initial=0)
  return np.abs(got[finite] - want[finite]).max(initial=0) / (largest or 1)


def cut(shape, x, batch):
  """The first samples of an array, whichever axis counts them."""
  axes = [axis for axis, dim in enumerate(shape) if isinstance(dim, str)]
  return x[(slice(None),) * axes[0] + (slice(batch),)] if axes else x


def agree(graph, arrays, tolerance=1e-5, batches=(1, 3), **settings):
  """Runs one model at every batch; returns it."""
  model = to_onnx(graph, **settings)
  session = start(model)
  for batch in batches:
    some = [
      cut(graph.tensors[name].shape, x, batch) for name, x in zip(graph.inputs, arrays, strict=True)
    ]
    want = reference.run(graph, some)
    got = run(session, graph, some)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
      assert a.dtype == b.dtype and a.shape == b.shape
      if b.dtype.kind == 'f':
        assert error(a, b) <= tolerance
      else:
        np.testing.assert_array_equal(a, b)
  return model


def kinds(model):
  return [node.op_type for node in model.graph.node]


# Operations, one at a time.


@pytest.mark.parametrize('name', CASES)
def test_an_operation(name):
  graph, *rest = CASES[name]
  given = rest[0] if rest and rest[0] is not None else None
  settings = rest[1] if len(rest) > 1 else {}
  [node] = graph.nodes
  arrays = given or [
    draw(node.op, *graph.tensors[name][1:]) for name in graph.inputs
  ]  # fmt: skip
  agree(graph, arrays, **settings)


def test_iota():
  for shape, axis in ((('n', 3), 0), ((2, 'n'), 0), ((2, 5), 1)):
    # A graph without inputs has no batch: one is there for it.
    graph = one('iota', shape=shape, axis=axis, dtype='float32')
    tensors = {**graph.tensors, 'x': Tensor('x', ('n', 2), 'float32')}
    graph = dataclasses.replace(graph, inputs=('x',), tensors=tensors)
    agree(graph, [floats(3, 2)])


def test_every_operation_has_a_test():
  tested = {CASES[name][0].nodes[0].op for name in CASES} | {'iota', *oplist.INTEGER}
  assert set(oplist.OPS) - tested == {'quantize', 'dequantize'}


@pytest.mark.parametrize('op', ['log1p', 'expm1'])
def test_precise_next_to_zero_and_right_far_from_it(op):
  x = np.float32([[-1e-7, 1e-20, 1e-4, 0.3, 60, np.inf, 0]] * 3)
  session = start(to_onnx(one(op, (('n', 7), 'float32'))))
  [got] = session.run(None, {'x0': x})
  np.testing.assert_allclose(got, getattr(np, op)(x), rtol=3e-6)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_what_jax_writes(name):
  fn, _ = FUNCTIONS[name]
  traced = to_graph(lambda p, x: fn(x), {}, jax.ShapeDtypeStruct((7, 8, 8, 6), jnp.float32))
  if 'bfloat16' in str(traced.graph):
    with pytest.raises(ValueError, match='bfloat16'):
      to_onnx(traced.graph)
    return
  x = np.random.default_rng(0).normal(size=(3, 8, 8, 6)).astype(np.float32)
  agree(traced.graph, [x])


# Networks.


def in_float64(apply, wider, variables, x):
  """JAX's results in float64, and the tolerance that its own float32 allows."""
  wide = lambda leaf: np.float64(leaf) if getattr(leaf, 'dtype', None) == np.float32 else leaf
  single = jax.tree.leaves(jax.jit(apply)(variables, x))
  with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
    double = jax.tree.leaves(jax.jit(wider)(*jax.tree.map(wide, (variables, x))))
  allowed = [4 * error(a, b) for a, b in zip(single, double, strict=True)]
  return [np.asarray(leaf) for leaf in double], max(1e-5, *allowed)


def agree_network(apply, variables, x, wider=None):
  graph = freeze(to_graph(apply, variables, x), variables)
  try:
    return graph, agree(graph, [x])
  except AssertionError:
    # Sums in another order: float64 decides, which JAX compiles for only where it is needed.
    model = to_onnx(graph)
    exact, tolerance = in_float64(apply, wider or apply, variables, x)
    for batch in (1, 3):
      got = run(start(model), graph, [x[:batch]])
      for a, b in zip(got, exact, strict=True):
        assert error(a, b[:batch]) <= tolerance
    return graph, model


SHAPES = {'lenet5': (28, 28, 1), 'alexnet': (227, 227, 3), 'vgg16': (224, 224, 3)}
DEFAULT = ('lenet5', 'cifar_resnet20', 'mobilenet_v2')


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.full) for n in list_models()],
)
def test_our_networks(name):
  shape = SHAPES.get(name, (32, 32, 3) if 'cifar' in name or name == 'vgg_small' else (64, 64, 3))
  options = {}
  if name.endswith('_dct'):
    options = {'channels': 6 if 'cifar' in name else 24}
    shape = (8, 8, options['channels'])
  model = create_model(name, **options)
  x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
  variables = random_variables(model, *x.shape)
  # Networks of ours compute in the type they are told to.
  wider = create_model(name, dtype=jnp.float64, **options).apply
  graph, made = agree_network(model.apply, variables, x, wider)
  # In and out of NCHW: at the input, and where a map that is no vector yet is flattened.
  assert kinds(made).count('Transpose') <= 2
  convs = sum(node.op == 'conv' for node in graph.nodes)
  assert kinds(made).count('Conv') == convs
  weights = sum(array.nbytes for array in graph.constants.values())
  assert weights < onnx_size(made) < weights + 300 * len(graph.nodes) + 2000


def test_squeeze_and_excite_moves_no_map():
  def block(kernel, x):
    y = jax.lax.conv(x.transpose(0, 3, 1, 2), kernel, (1, 1), 'SAME').transpose(0, 2, 3, 1)
    return y * jax.nn.sigmoid(y.mean((1, 2)).reshape(x.shape[0], 1, 1, -1) * 2)

  kernel, x = floats(5, 4, 3, 3), floats(3, 6, 6, 4)
  # In, and out again.
  _, made = agree_network(block, kernel, x)
  assert kinds(made).count('Transpose') == 2


@pytest.mark.promotes('other people')
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n in ('detector', 'generator') else pytest.mark.full)
    for n in foreign.NETWORKS
  ],
)
def test_networks_of_others(name):
  network = foreign.network(name)
  x = np.random.default_rng(0).normal(size=(3, *network.shape)).astype(np.float32)
  with jax.numpy_rank_promotion('allow'):
    agree_network(network.apply, network.variables, x)


@pytest.mark.parametrize('kind', ['dct', 'rgb_half_idct'])
def test_the_way_in_is_part_of_the_graph(kind):
  channels = {'channels': 'square6'} if kind == 'dct' else {}
  spec = data.InputSpec(kind, 64, **channels)
  name, options = ('resnet18_dct', {'channels': 6}) if kind == 'dct' else ('cifar_resnet20', {})
  model = create_model(name, **options)
  variables = random_variables(model, 1, *spec.output_shape)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
  apply = lambda v, images: model.apply(v, data.preprocess(spec, images))
  _, made = agree_network(apply, variables, images)
  assert made.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_block_dct_alone():
  apply = lambda _, x: ops.rgb_to_coefficients(x)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)
  agree(to_graph(apply, {}, images).graph, [images])


# Integers.


def single(graph, node):
  """One node of a graph as a graph, its activations as inputs."""
  inputs = tuple(dict.fromkeys(name for name in node.inputs if name not in graph.constants))
  names = (*node.inputs, *node.outputs)
  return dataclasses.replace(
    graph, inputs=inputs, nodes=(node,), outputs=node.outputs,
    constants={name: a for name, a in graph.constants.items() if name in names},
    tensors={name: t for name, t in graph.tensors.items() if name in names},
  )  # fmt: skip


@pytest.mark.parametrize('name', networks.NETWORKS)
@pytest.mark.parametrize('optimized', [False, True])
def test_integer_networks(name, optimized, monkeypatch):
  case = networks.build(name)
  graph = quantize.integer_graph(case.graph, quantize.calibrate(case.graph, [case.x]))
  made = [tensor for node in graph.nodes for tensor in node.outputs]
  exact = reference.run(dataclasses.replace(graph, outputs=tuple(made)), [case.x])
  values = dict(zip(made, exact, strict=True)) | {'input': case.x}
  different = count = 0
  # A node alone would not know the scales it has in the network.
  scales = _scales.find_scales(graph)
  monkeypatch.setattr(_scales, 'find_scales', lambda _: scales)
  for node in graph.nodes:
    part = single(graph, node)
    session = start(to_onnx(part), optimized)
    for batch in (1, 3):
      got = run(session, part, [values[tensor][:batch] for tensor in part.inputs])
      for a, name_ in zip(got, node.outputs, strict=True):
        want = values[name_][:batch]
        assert a.dtype == want.dtype and a.shape == want.shape
        if want.dtype == np.uint8:
          gap = np.abs(a.astype(int) - want)
          assert gap.max(initial=0) <= (1 if node.op in oplist.INTEGER else 0), node
          different, count = different + np.count_nonzero(gap), count + gap.size
        else:
          assert error(a, want) <= 1e-5
  print(f'{name}: {different} of {count} values differ by one step')
  assert different <= 0.002 * count
  session = start(to_onnx(graph), optimized)
  for batch in (1, 3, 6):
    [got], [want] = run(session, graph, [case.x[:batch]]), reference.run(graph, [case.x[:batch]])
    assert error(got, want) <= 0.02  # a few steps of 1/255
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize('op', ['qconv', 'qdot', 'qadd', 'qconcat', 'qsum', 'qpool_sum'])
def test_limits_signs_and_zero_points(op):
  """What the networks above have not: limits inside 0..255, and multipliers of their own."""
  rng = np.random.default_rng(5)
  x, stored = (('n', 4, 4, 6), 'uint8'), dict(zero=90, low=80, high=105)
  whole = lambda shape, a: rng.integers(-a, a + 1, shape)
  layer = lambda shape: [
    whole(shape, 127).astype(np.int8), whole(shape[-1], 9000).astype(np.int32),
    rng.uniform(2e-4, 9e-4, shape[-1]).astype(np.float32),
  ]  # fmt: skip
  window_ = dict(
    window=(1, 3, 2, 1), strides=(1, 2, 1, 1), padding=((0, 0), (1, 1), (0, 1), (0, 0))
  )
  joined = dict(input_zeros=(10, 130), multipliers=(-0.75, 0.3))
  convs = {k: v for k, v in conv().items() if k not in ('dtype', 'precision')}
  graph = {
    'qconv': lambda: one('qconv', x, *layer((3, 3, 6, 5)), input_zero=77, **convs, **stored),
    'qdot': lambda: one('qdot', x, *layer((6, 5)), input_zero=77, **stored),
    'qadd': lambda: one('qadd', x, x, **joined, **stored),
    'qconcat': lambda: one('qconcat', x, x, axis=2, **joined, **stored),
    'qsum': lambda: one(
      'qsum',
      x,
      rng.uniform(0.1, 0.3, (1, 6)).astype(np.float32),
      axes=(1, 2),
      input_zero=127,
      **stored,
    ),
    'qpool_sum': lambda: one(
      'qpool_sum', x, np.array(0.31, np.float32), **window_, dilation=ONES, input_zero=77, **stored
    ),
  }[op]()
  arrays = [rng.integers(0, 256, (3, 4, 4, 6)).astype(np.uint8) for _ in graph.inputs]
  for optimized in (False, True):
    [got] = run(start(to_onnx(graph), optimized), graph, arrays)
    [want] = reference.run(graph, arrays)
    assert want.min() == 80 and want.max() == 105 and len(np.unique(want)) >= 5
    gap = np.abs(got.astype(int) - want)
    assert gap.max() <= 1 and np.mean(gap > 0) < 0.01


def test_scales_of_what_is_tied_to_an_end_are_those_of_calibration():
  case = networks.build('residual')
  ranges = quantize.calibrate(case.graph, [case.x])
  graph = quantize.integer_graph(case.graph, ranges)
  found = _scales.find_scales(graph)
  tied = {graph.nodes[0].outputs[0], graph.nodes[-1].inputs[0]}
  for name in tied:
    assert found[name] == ranges[name.removesuffix(':u8')].scale
  # What goes into a sum is tied to the sum, whatever that is tied to.
  [add, *_] = [node for node in graph.nodes if node.op == 'qadd']
  scale = lambda name: ranges[name.removesuffix(':u8')].scale
  for name in add.inputs:
    ratio = found[name] / found[add.outputs[0]]
    assert ratio == pytest.approx(scale(name) / scale(add.outputs[0]), rel=1e-6)
  model = to_onnx(graph)
  arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
  weights = [node for node in model.graph.node if node.op_type == 'DequantizeLinear'
             and arrays.get(node.input[0], np.zeros(0)).dtype == np.int8]  # fmt: skip
  assert len(weights) == 5 and all(arrays[node.input[1]].ndim == 1 for node in weights)


# The call.


def dense(**changes):
  traced = to_graph(
    lambda p, x: (x @ p, x), np.eye(3, dtype=np.float32), np.ones((1, 3), np.float32)
  )
  return freeze(traced, np.eye(3, dtype=np.float32))


def test_names_metadata_and_opset(tmp_path):
  path = tmp_path / 'model.onnx'
  path.write_bytes(b'an older one')
  model = to_onnx(
    dense(), path, input_names=['image'], output_names=['logits', 'same'], opset=19,
    metadata={'author': 'me', 'labels': ['a', 'b']},
  )  # fmt: skip
  assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']
  assert onnx_size(model) == path.stat().st_size
  read = onnx.load(path)
  assert read == model and read.opset_import[0].version == 19
  assert [one.name for one in (*read.graph.input, *read.graph.output)] == [
    'image',
    'logits',
    'same',
  ]
  assert {p.key: p.value for p in read.metadata_props} == {'author': 'me', 'labels': '["a", "b"]'}
  sizes = [dim.dim_param or dim.dim_value for dim in read.graph.input[0].type.tensor_type.shape.dim]
  assert sizes == ['n', 3]
  logits, same = start(read).run(None, {'image': floats(2, 3)})
  np.testing.assert_array_equal(logits, same)
  assert to_onnx(one('and', INTS, INTS)).opset_import[0].version == 18
  assert to_onnx(one('and', B, B)).opset_import[0].version == 17


def test_outputs_may_repeat_and_be_constants():
  graph = dense()
  first, second = graph.outputs
  [kernel] = graph.constants
  graph = dataclasses.replace(graph, outputs=(first, second, first, kernel))
  model = to_onnx(graph)
  a, b, c, d = start(model).run(None, {'input': floats(2, 3)})
  np.testing.assert_array_equal(a, c)
  np.testing.assert_array_equal(d, np.eye(3))


def test_multiples_of_the_batch_keep_their_name():
  model = to_onnx(one('reshape', (('n', 49, 2), 'float32'), shape=('49*n', 2)))
  [out] = model.graph.output
  assert out.type.tensor_type.shape.dim[0].dim_param == '49*n'


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(opset=16), 'opset must be 17 to'),
    (dict(opset=99), 'opset must be 17 to'),
    (dict(input_names=['a', 'b']), '2 input_names for 1 inputs'),
    (dict(output_names=['a', 'a']), 'output_names repeat'),
    (dict(output_names=['input', 'b']), "'input' names an input and an output"),
    (dict(output_names=['', 'b']), "must be texts, got ''"),
  ],
)
def test_what_cannot_be_asked_for(settings, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    to_onnx(dense(), tmp_path / 'x.onnx', **settings)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'graph, message',
  [
    (one('mul', (('n', 2), 'bfloat16'), (('n', 2), 'bfloat16')), r'node 0, mul \(net\): bfloat16'),
    (one('cumprod', X, axis=0, reverse=False), 'cumprod over the batch'),
    (one('reduce_and', INTS, axes=(1,)), 'no bitwise reduction of int32'),
    (one('conv', (IMAGE[0], 'int32'), np.ones((3, 3, 4, 2), np.int32), **conv(dtype='int32')), 'floats, not int32'),
    (one('pool_sum', IMAGE, window=(1, 40, 40, 1), strides=ONES, padding=((0, 0), (20, 20), (20, 20), (0, 0)), dilation=(1, 1, 1, 1)), None),
    (one('pool_sum', (IMAGE[0], 'int32'), window=(1, 40, 40, 1), strides=ONES, padding=((0, 0), (20, 20), (20, 20), (0, 0)), dilation=ONES), 'cast to float32'),
  ],
)  # fmt: skip
def test_what_onnx_cannot_say(graph, message):
  if message is None:
    start(to_onnx(graph))
    return
  with pytest.raises(ValueError, match=message):
    to_onnx(graph)


def test_parameters_must_be_bound():
  graph = to_graph(lambda p, x: x @ p, np.eye(3), np.ones((1, 3), np.float64)).graph
  with pytest.raises(ValueError, match="1 parameters are not bound, 'params' first"):
    to_onnx(graph)


def test_without_onnx(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(ImportError, match=r"pip install 'fqjax\[onnx\]'"):
    ours.to_onnx(dense())
