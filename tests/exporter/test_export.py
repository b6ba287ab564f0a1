"""A network leaves JAX and says the same."""

import functools
import os
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax import quantize, runtime
from fqjax.exporter import Call
from fqjax.models import create_model

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def started(module, *shape):
  x = jnp.zeros(shape)
  variables = module.init(jax.random.key(0), x)
  # Statistics as after training, so that folding them does something.
  for i, leaf in enumerate(leaves := jax.tree.leaves(variables)):
    leaves[i] = np.abs(normal(*leaf.shape)) + 0.5 if leaf.ndim == 1 else leaf
  return jax.tree.unflatten(jax.tree.structure(variables), leaves), x


def error(y, y0):
  return np.abs(np.asarray(y) - np.asarray(y0)).max() / np.abs(y0).max()


def dense(params, x):
  return jax.nn.relu(x @ params['kernel'] + params['bias'][None])


PARAMS = {'kernel': normal(6, 4), 'bias': normal(4)}


def test_the_name_stays_the_function():
  import fqjax.exporter.passes  # noqa: F401

  assert callable(fqjax.export)
  assert fqjax.export is fqjax.exporter.export


@pytest.mark.parametrize('optimize', ['speed', 'size'])
def test_from_the_network_to_the_file_and_back(tmp_path, optimize):
  model = create_model('cifar_resnet20')
  variables, x = started(model, 1, 32, 32, 3)
  artifact = fqjax.export(model.apply, variables, x, optimize=optimize)
  path = artifact.save(tmp_path / 'model.fqx')
  assert path.stat().st_size == len(artifact.data)
  loaded = runtime.load(path)
  for batch in (1, 3):
    x = normal(batch, 32, 32, 3)
    y = loaded(x)
    assert error(y, model.apply(variables, x)) < 1e-5
    assert y.flags.owndata and y.flags.c_contiguous and y.flags.writeable
  assert str(loaded.inputs[0]) == 'input: float32[n, 32, 32, 3] NHWC'
  assert str(loaded.outputs[0]) == 'output: float32[n, 10]'


class Out(NamedTuple):
  scores: jax.Array
  boxes: list


def test_a_layer_is_two_nodes():
  params = {'kernel': normal(3, 2), 'bias': normal(2)}
  artifact = fqjax.export(dense, params, jnp.zeros((1, 3)))
  assert [node.op for node in artifact.graphs[0].nodes] == ['dot', 'add_clamp']


def test_containers_come_back():
  def network(params, x, *, flags):
    y = x @ params
    return {'b': Out(y, [y + 1, (flags['twice'] * y,)]), 'a': None}

  flags = {'twice': jnp.ones((1, 1))}
  artifact = fqjax.export(network, normal(3, 2), Call(jnp.zeros((1, 3)), flags=flags))
  x = normal(2, 3)
  result = artifact(x, flags={'twice': np.full((2, 1), 2, np.float32)})
  assert list(result) == ['a', 'b'] and result['a'] is None
  out = result['b']
  assert type(out).__name__ == 'Out' and out._fields == ('scores', 'boxes')
  np.testing.assert_array_equal(out.boxes[1][0], 2 * out.scores)
  assert [spec.name for spec in artifact.model.outputs] == ['b/scores', 'b/boxes/0', 'b/boxes/1/0']
  with pytest.raises(ValueError, match='flags'):
    artifact(x)
  with pytest.raises(ValueError, match=r"\['twice'\]|twice"):
    artifact(x, flags={'thrice': x})


def test_results_belong_to_the_caller():
  artifact = fqjax.export(lambda p, x: (x, x[:, ::-1], p), normal(2, 2), jnp.zeros((1, 2)))
  x = normal(4, 2)
  same, reverse, constant = artifact(x)
  for y in (same, reverse, constant):
    assert not np.shares_memory(y, x) and y.flags.c_contiguous and y.flags.writeable
  constant[:] = 0
  assert artifact(x)[2].any()


def test_any_strides_and_no_silent_casts():
  artifact = fqjax.export(dense, PARAMS, jnp.zeros((1, 6)))
  x = normal(6, 8)
  np.testing.assert_allclose(artifact(x.T), dense(PARAMS, jnp.asarray(x.T)), rtol=1e-5)
  with pytest.raises(ValueError, match=r'takes input: float32\[n, 6\], got float64'):
    artifact(x.T.astype(np.float64))
  with pytest.raises(ValueError, match=r'float32\[n, 6\] .*got an array \[6, 8\]'):
    artifact(x)


def test_several_sizes_share_their_weights():
  conv = nn.Conv(4, (3, 3))
  variables, _ = started(conv, 1, 8, 8, 3)
  sizes = [jax.ShapeDtypeStruct((1, s, s, 3), jnp.float32) for s in (8, 16)]
  artifact = fqjax.export(conv.apply, variables, sizes)
  assert len(artifact.graphs) == 2 and len(artifact.arrays) == 2
  for size in (8, 16):
    x = normal(2, size, size, 3)
    assert error(artifact(x), conv.apply(variables, x)) < 1e-5
  with pytest.raises(ValueError, match=r'(?s)no signature.*8, 8, 3.*16, 16, 3'):
    artifact(normal(1, 9, 9, 3))


def test_a_batch_that_is_not_the_first_axis():
  network = lambda w, x, y: jnp.tanh(w @ x) + y.T
  x, y = normal(3, 5), normal(5, 2)
  artifact = fqjax.export(
    network, normal(2, 3), (jnp.zeros((3, 1)), jnp.zeros((1, 2))), batch_axes=(1, 0)
  )
  assert artifact(x, y).shape == (2, 5)
  assert [spec.shape for spec in artifact.model.inputs] == [(3, 'n'), ('n', 2)]


def test_preprocessing_labels_and_metadata_travel():
  prepare = lambda pixels: (pixels.astype(jnp.float32) / 255 - 0.5) / 0.25
  artifact = fqjax.export(
    dense, PARAMS, jax.ShapeDtypeStruct((1, 6), jnp.uint8), preprocess=prepare,
    labels=['cat', 'dog'], metadata={'resize': 256, 'note': 'é'},
  )  # fmt: skip
  pixels = RNG.integers(0, 256, (3, 6)).astype(np.uint8)
  np.testing.assert_allclose(artifact(pixels), dense(PARAMS, prepare(jnp.asarray(pixels))), 1e-5)
  assert artifact.model.labels == ('cat', 'dog')
  assert artifact.model.metadata == {'resize': 256, 'note': 'é'}
  with pytest.raises(ValueError, match='metadata'):
    fqjax.export(dense, PARAMS, jnp.zeros((1, 6)), metadata={'x': object()})


def test_four_bits_stay_four_bits_behind_batch_norm():
  model = create_model('cifar_resnet20')
  variables, x = started(model, 1, 32, 32, 3)
  levels = normal(16)
  snap = lambda w: (
    levels[np.abs(np.asarray(w)[..., None] * 20 - levels).argmin(-1)] if w.ndim == 4 else w
  )
  variables = jax.tree.map(snap, variables)
  artifact = fqjax.export(model.apply, variables, x)
  kernels = [a for a in artifact.arrays if len(a.shape) == 4 and a.shape[0] == 3]
  assert len(kernels) == 19
  for stored in kernels:
    # Four bits a weight, the table and a header.
    assert stored.bytes <= np.prod(stored.shape) / 2 + 64 + 40
  x = normal(2, 32, 32, 3)
  assert error(artifact(x), model.apply(variables, x)) < 1e-5
  assert artifact.report().count('levels') == 19


def test_four_bits_stay_few_integers():
  model = create_model('cifar_resnet20')
  variables, x = started(model, 1, 32, 32, 3)
  levels = np.float32([0, -1, -0.55, -0.3, -0.1, 0.1, 0.25, 0.45, 0.9])
  snap = lambda w: (
    levels[np.abs(np.asarray(w)[..., None] * 5 - levels).argmin(-1)] if w.ndim == 4 else w
  )
  variables = jax.tree.map(snap, variables)
  artifact = fqjax.export(
    model.apply, variables, x, precision='int8', ranges=[normal(8, 32, 32, 3)]
  )
  kernels = [a for a in artifact.arrays if a.dtype == 'int8' and len(a.shape) == 4]
  assert len(kernels) == 19
  assert all(stored.levels is not None and stored.levels.size <= 9 for stored in kernels)
  x = normal(8, 32, 32, 3)
  assert error(artifact(x), model.apply(variables, x)) < 0.25


@pytest.mark.parametrize('calibrated', [False, True])
def test_integers(calibrated):
  model = create_model('lenet5')
  variables, x = started(model, 1, 28, 28, 1)
  batches = [normal(8, 28, 28, 1) for _ in range(3)]
  apply = functools.partial(model.apply)
  ranges = batches
  if calibrated:
    from fqjax.exporter import passes
    from fqjax.tracing import to_graph

    graph = passes.freeze(to_graph(apply, variables, x), variables)
    ranges = quantize.calibrate(graph, batches)
  artifact = fqjax.export(apply, variables, x, precision='int8', ranges=ranges)
  ops = {node.op for node in artifact.graphs[0].nodes}
  assert {'quantize', 'qconv', 'qdot', 'dequantize'} <= ops and 'conv' not in ops
  x = normal(16, 28, 28, 1)
  y, y0 = artifact(x), np.asarray(apply(variables, x))
  assert 0 < error(y, y0) < 0.15
  with pytest.raises(ValueError, match='NaN'):
    artifact(np.full_like(x, np.nan))


def test_floats_carry_nan_and_infinity_as_jax_does():
  def network(params, x):
    y = nn.max_pool(jax.nn.relu(x), (2, 2), (2, 2))
    return y.reshape(y.shape[0], -1) @ params

  params = np.abs(normal(4, 3))
  artifact = fqjax.export(network, params, jnp.zeros((1, 4, 4, 1)))
  x = normal(5, 4, 4, 1)
  x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = np.nan, np.inf, -np.inf
  np.testing.assert_allclose(artifact(x), network(params, jnp.asarray(x)), rtol=1e-5)
  assert np.isnan(artifact(x)[0]).any() and np.isinf(artifact(x)[1]).any()


def test_unused_channels_leave_with_size():
  params = {'a': normal(6, 40), 'b': normal(40, 4)}
  params['b'][8:] = 0
  network = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  artifact = fqjax.export(network, params, jnp.zeros((1, 6)), optimize='size')
  assert sorted(a.shape for a in artifact.arrays) == [(6, 8), (8, 4)]
  x = normal(3, 6)
  assert error(artifact(x), network(params, x)) < 1e-5


def normed(kernel_of):
  """A convolution and batch norm; its kernel is made of the params."""

  def network(params, x):
    y = jax.lax.conv_general_dilated(
      x, kernel_of(params), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return y * params['gain'][None, None, None] + params['shift'][None, None, None]

  return network


@pytest.mark.parametrize('case', ['plain', 'masked', 'masked inside', 'transposed inside'])
def test_levels_are_seen_before_batch_norm_hides_them(case):
  levels = np.float32([-1, -0.4, 0.3, 0.9])
  w = levels[RNG.integers(0, 4, (3, 3, 8, 16))]
  mask = (RNG.random(w.shape) < 0.5).astype(np.float32)
  params = {'w': w, 'm': mask, 'gain': np.abs(normal(16)) + 1, 'shift': normal(16)}
  kernel_of = lambda p: p['w']
  if case == 'masked':
    params['w'] = w * mask  # with -0.0
  elif case == 'masked inside':
    kernel_of = lambda p: p['w'] * p['m']
  elif case == 'transposed inside':
    params['w'] = w.transpose(3, 2, 0, 1)
    kernel_of = lambda p: p['w'].transpose(2, 3, 1, 0)
  network = normed(kernel_of)
  artifact = fqjax.export(network, params, jnp.zeros((1, 8, 8, 8)))
  [kernel] = [a for a in artifact.arrays if np.prod(a.shape) == w.size]
  assert kernel.levels is not None and kernel.levels.ndim == 1, kernel.form
  assert kernel.bytes < 450
  x = normal(2, 8, 8, 8)
  assert error(artifact(x), network(params, x)) < 1e-5


def test_channels_with_levels_of_their_own_keep_them_as_integers():
  gains = np.geomspace(0.01, 1, 16).astype(np.float32)
  w = np.float32([-1, -0.4, 0.3, 0.9])[RNG.integers(0, 4, (3, 3, 8, 16))] * gains
  network = normed(lambda p: p['w'])
  params = {'w': w, 'gain': 1 / gains, 'shift': normal(16)}
  x = normal(4, 8, 8, 8)
  artifact = fqjax.export(network, params, x, precision='int8', ranges=[x])
  # Every channel has its own scale: none is lost among the steps of a larger one.
  y, y0 = artifact(x), np.asarray(network(params, x))
  errors = np.abs(y - y0).max((0, 1, 2)) / np.abs(y0).max((0, 1, 2))
  assert errors.max() < 0.1


def test_onnx_holds_one_of_several_sizes():
  pytest.importorskip('onnx', reason="needs onnx: pip install 'fqjax[onnx]'")
  conv = nn.Conv(4, (3, 3))
  variables, _ = started(conv, 1, 8, 8, 3)
  sizes = [jax.ShapeDtypeStruct((1, s, s, 3), jnp.float32) for s in (8, 16)]
  artifact = fqjax.export(conv.apply, variables, sizes)
  for which in (None, 2, -1):
    with pytest.raises(ValueError, match=r'here are 2: .*which=1 for .*16, 16, 3'):
      artifact.to_onnx(which=which)
  [x] = artifact.to_onnx(which=1).graph.input
  assert [d.dim_value for d in x.type.tensor_type.shape.dim][1:] == [16, 16, 3]
  alone = fqjax.export(conv.apply, variables, sizes[0])
  assert alone.to_onnx().graph == alone.to_onnx(which=0).graph


@pytest.mark.parametrize('options', [{'optimize': 'size'}, {'precision': 'int8'}])
def test_several_sizes_go_with_everything(options):
  conv = nn.Conv(4, (3, 3))
  variables, _ = started(conv, 1, 8, 8, 3)
  sizes = [jax.ShapeDtypeStruct((1, s, s, 3), jnp.float32) for s in (8, 16)]
  if 'precision' in options:
    options = {**options, 'ranges': (normal(2, s, s, 3) for s in (8, 16))}
  artifact = fqjax.export(conv.apply, variables, sizes, **options)
  for size in (8, 16):
    x = normal(2, size, size, 3)
    assert error(artifact(x), conv.apply(variables, x)) < 0.3
  with pytest.raises(ValueError, match='no batch of ranges= is of the shape'):
    fqjax.export(conv.apply, variables, sizes, precision='int8', ranges=[normal(2, 8, 8, 3)])


def test_batches_of_ranges_are_like_the_example():
  network = lambda p, x, *, twice: (2 if twice else 1) * x @ p
  call = lambda batch: Call(normal(batch, 3), twice=True)
  artifact = fqjax.export(network, normal(3, 2), call(1), precision='int8', ranges=[call(8)])
  assert artifact(normal(2, 3), twice=True).shape == (2, 2)
  with pytest.raises(ValueError, match='another structure than the example'):
    fqjax.export(network, normal(3, 2), call(1), precision='int8', ranges=[normal(8, 3)])


class _Private(NamedTuple):
  y: jax.Array


def test_private_named_tuples_lose_their_underscore():
  artifact = fqjax.export(lambda p, x: _Private(x @ p), normal(3, 2), jnp.zeros((1, 3)))
  first, second = artifact(normal(1, 3)), artifact(normal(1, 3))
  assert type(first) is type(second) and type(first).__name__ == 'Private'


def test_weights_masked_by_multiplication_are_zeros():
  mask = np.arange(40) % 8 == 0
  params = normal(64, 40) * mask.astype(np.float32)
  assert np.signbit(params[:, ~mask]).any()
  artifact = fqjax.export(lambda p, x: x @ p, params, jnp.zeros((1, 64)))
  [stored] = artifact.arrays
  assert stored.kept == 64 * 5 and stored.bytes < 4 * 64 * 5 + 100
  x = normal(2, 64)
  np.testing.assert_allclose(artifact(x), x @ params, rtol=1e-5)


def test_the_report_counts_the_file():
  artifact = fqjax.export(dense, PARAMS, jnp.zeros((1, 6)))
  lines = artifact.report().splitlines()
  assert lines[-1].startswith(f'{len(artifact.data):,} bytes, all of the file; 112 as raw float32')
  assert any(line.startswith('kernel') for line in lines)


def test_a_layer_stays_in_float():
  model = create_model('lenet5')
  variables, x = started(model, 1, 28, 28, 1)
  artifact = fqjax.export(
    model.apply, variables, x, precision='int8', ranges=[normal(8, 28, 28, 1)], in_float='.*fc2'
  )
  assert [node.op for node in artifact.graphs[0].nodes].count('qdot') == 1
  assert 'in float:' in artifact.report() and 'fc2' in artifact.report()


def test_progress_is_shown_and_goes(capsys):
  fqjax.export(dense, PARAMS, jnp.zeros((1, 6)), progress=True)
  shown = capsys.readouterr().err
  assert '100 %' in shown and shown.endswith('\r') and not shown.split('\r')[-2].strip()
  fqjax.export(dense, PARAMS, jnp.zeros((1, 6)))
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'precision': 'int4'}, "precision='int4': choose of 'float32', 'int8'"),
    ({'optimize': 'both'}, 'optimize='),
    ({'batch': 3}, 'batch=3'),
    ({'precision': 'int8'}, 'needs ranges='),
    ({'ranges': {}}, "needs ranges=.*with 'float32'"),
    ({'precision': 'int8', 'ranges': {}}, 'no range for tensor'),
    ({'precision': 'int8', 'ranges': []}, 'seen no batch'),
  ],
)
def test_wrong_settings(options, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    fqjax.export(dense, PARAMS, jnp.zeros((1, 6)), **options)


def test_what_cannot_leave_is_named():
  with pytest.raises(ValueError, match='bfloat16'):
    fqjax.export(lambda p, x: x @ p, jnp.ones((2, 2), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16))
  with pytest.raises(ValueError, match='key 1'):
    fqjax.export(lambda p, x: {1: x @ p}, jnp.ones((2, 2)), jnp.ones((1, 2)))


def test_a_fixed_batch():
  network = lambda p, x: x @ p + jnp.arange(len(x), dtype=jnp.float32)[:, None]
  artifact = fqjax.export(network, normal(2, 2), jnp.zeros((3, 2)), batch='fixed')
  x = normal(3, 2)
  assert artifact(x).shape == (3, 2)
  with pytest.raises(ValueError, match=r'float32\[3, 2\]'):
    artifact(normal(2, 2))


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may write anywhere')
def test_an_unwritable_folder(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(PermissionError):
    fqjax.export(dense, PARAMS, jnp.zeros((1, 6))).save(tmp_path / 'x.fqx')


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = fqjax.export(dense, PARAMS, jnp.zeros((1, 6))).save(tmp_path / 'x.fqx')
  before = path.read_bytes()

  def full(self, data):
    with open(self, 'wb') as f:
      f.write(data[:100])
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('pathlib.Path.write_bytes', full)
  with pytest.raises(OSError, match='No space'):
    fqjax.export(dense, PARAMS, jnp.zeros((2, 6))).save(path)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]
