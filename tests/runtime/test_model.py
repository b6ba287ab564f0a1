"""Files from others: every damage is an error that says where, nothing else happens."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax import runtime
from fqjax.models import create_model
from fqjax.runtime import ArtifactError, __main__, _file, dims
import fqjax.runtime.reference
from tests.runtime import hostile


@pytest.fixture(scope='module')
def files():
  """A pruned and quantized network, and one of integers with a tree of results."""
  model = create_model('lenet5')
  x = jnp.zeros((1, 28, 28, 1))
  variables = model.init(jax.random.key(0), x)
  rng = np.random.default_rng(0)
  prune = lambda w: (
    np.where(rng.random(w.shape) < 0.05, np.sign(w) * np.float32(0.5), np.float32(0))
    if w.ndim > 1
    else w
  )
  variables = jax.tree.map(prune, variables)
  small = fqjax.export(model.apply, variables, x, optimize='size', labels=list('0123456789'))
  several = lambda v, x: {'y': model.apply(v, x), 'more': [x.sum(1)]}
  batches = [rng.normal(size=(4, 28, 28, 1)).astype(np.float32)]
  integers = fqjax.export(several, variables, x, precision='int8', ranges=batches)
  return small.data, integers.data


def attack(data, count, seed):
  """Opens and runs mutated files; returns how many of each kind were refused and ran."""
  mutate = hostile.Mutator(data, seed)
  refused = ran = good = 0
  for _ in range(count):
    kind, damaged = mutate()
    good += kind in ('header', 'section')
    start = time.perf_counter()
    try:
      model = runtime.loads(damaged)
    except ArtifactError:
      refused += 1
      continue
    finally:
      assert time.perf_counter() - start < 5
    assert kind in ('header', 'section'), f'a {kind} was not seen'
    try:
      shapes = [dims.bind(spec.shape, 1) for spec in model.inputs]
      if sum(map(np.prod, shapes)) < 1e7:
        model(*(np.zeros(s, spec.dtype) for s, spec in zip(shapes, model.inputs, strict=True)))
    except ValueError:
      pass  # the network that the file describes refuses its input
    ran += 1
    assert time.perf_counter() - start < 5
  assert 2 * good >= count
  assert refused > ran
  return refused, ran


def test_damaged_files(files):
  for seed, data in enumerate(files):
    attack(data, 500, seed)


@pytest.mark.full
@pytest.mark.parametrize('seed', range(10))
def test_many_damaged_files(files, seed):
  for data in files:
    attack(data, 5_000, 100 + seed)


def test_what_a_file_may_ask_for():
  network = lambda p, x: x @ p
  with pytest.warns(UserWarning, match='limit=...'):
    artifact = fqjax.export(network, np.zeros((5000, 5000), np.float32), jnp.zeros((1, 5000)))
  with pytest.raises(ArtifactError, match=r'more elements than its size justifies; `limit='):
    runtime.loads(artifact.data)
  model = runtime.loads(artifact.data, limit=1 << 25)
  assert not model(np.ones((1, 5000), np.float32)).any()
  spread = lambda p, x: jnp.broadcast_to(x[..., None], (*x.shape, 1 << 25)) + p
  with pytest.warns(UserWarning, match='limit=...'):
    big = fqjax.export(spread, np.float32(1), jnp.zeros((1, 1)))
  with pytest.raises(ArtifactError, match=r'node \d.*makes 33554432 elements of at most 16777216'):
    runtime.loads(big.data)


def crafted(change, network=lambda p, x: x @ p, x=None):
  """A small file whose header somebody changed, all checksums good."""
  x = np.zeros((1, 4), np.float32) if x is None else x
  data = fqjax.export(network, np.eye(4, dtype=np.float32), x).data
  file = _file.File(np.frombuffer(data, np.uint8))
  header = {key: value for key, value in file.header.items() if key != 'sections'}
  sections = [bytes(file.read(i, 'it')) for i in range(len(file.sections))]
  change(header)
  return _file.pack(header, sections, deflate=True)


def nodes(*added):
  return lambda header: header['graphs'][0]['nodes'].extend(added)


def setting(*path_and_value):
  *path, key, value = path_and_value

  def change(header):
    inside = header
    for step in path:
      inside = inside[step]
    inside[key] = value

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (setting('arrays', 0, 'shape', [0, 2**33]), 'not a list of sizes'),
    (setting('operations', True), 'version True'),
    (setting('more', 1), 'unknown entry'),
    (setting('graphs', 0, 'more', 1), 'unknown entry'),
    (setting('graphs', 0, 'returns', {'named': ['Out', {'fi': 0}]}), None),
    (setting('graphs', 0, 'returns', {'named': ['Out', {'\ufb01': 0}]}), 'no named tuple'),
    (setting('graphs', 0, 'returns', {'named': ['Out', {'a(b)': 0}]}), 'no named tuple'),
    (setting('graphs', 0, 'takes', {'tuple': [0, 0]}), 'arguments'),
    (nodes(['eq', [0, 0]], ['neg', [3]]), 'numbers, got bool'),
    (nodes(['and', [0, 0]]), 'integers and bool'),
    (nodes(['iota', [], {'shape': [5], 'dtype': 'bool', 'axis': 0}]), 'not bool'),
    (nodes(['cast', [0], {'dtype': 'int8'}], ['exp', [3]]), 'of floats'),
    (nodes(['cast', [0], {'dtype': 'int8'}], ['clamp', [3], {'low': 1e30, 'high': None}]),
     'limit'),
    (nodes(['quantize', [0], {'scale': 0.0, 'zero': 3}]), 'number > 0'),
    (nodes(['reshape', [0], {'shape': [10**19]}]), 'cannot reshape'),
    (nodes(*[['broadcast', [1], {'shape': [1 << 12, 4, 4, 1 << 6], 'axes': [1, 2]}]] * 1), None),
    (nodes(['pool_sum', [1], {'window': [1 << 9] * 2, 'strides': [1, 1], 'dilation': [1, 1],
                              'padding': [[1 << 9, 1 << 9]] * 2}]), 'taps|elements'),
  ],
)  # fmt: skip
def test_crafted_files(change, message):
  data = crafted(change)
  if message is None:
    runtime.loads(data)
    return
  with pytest.raises(ArtifactError, match=message):
    runtime.loads(data)


def test_a_result_is_what_the_graph_says(monkeypatch):
  model = runtime.loads(crafted(lambda header: None))
  wrong = lambda x, y, **_: np.zeros((len(x), 4))
  monkeypatch.setitem(runtime.reference._run._RUN, 'dot', wrong)
  with pytest.raises(ValueError, match=r'node 0, dot: made float64\[2, 4\] where .*float32'):
    model(np.zeros((2, 4), np.float32))


def test_arguments_are_asked_for_by_name_and_number():
  network = lambda p, x, *, scale: scale * (x @ p)
  call = fqjax.exporter.Call(np.zeros((1, 4), np.float32), scale=2.0)
  model = fqjax.export(network, np.eye(4, dtype=np.float32), call).model
  x = np.ones((3, 4), np.float32)
  assert model(x, scale=2.0).tolist() == [[2] * 4] * 3
  with pytest.raises(ValueError, match='takes 1 argument by position, got 2'):
    model(x, x, scale=2.0)
  with pytest.raises(ValueError, match='arguments by name must have scale; got none'):
    model(x)
  with pytest.raises(ValueError, match='was fixed to 2.0'):
    model(x, scale=x)


def test_a_file_may_be_read_and_forgotten(tmp_path):
  path = fqjax.export(
    lambda p, x: x @ p, np.eye(4, dtype=np.float32), np.zeros((1, 4), np.float32)
  ).save(tmp_path / 'x.fqx')
  model = runtime.load(path, mmap=False)
  path.write_bytes(b'gone')
  assert model(np.ones((1, 4), np.float32)).tolist() == [[1] * 4]


def test_errors_say_where(files, tmp_path):
  path = tmp_path / 'model.fqx'
  data = bytearray(files[1])
  data[-3] ^= 1
  path.write_bytes(data)
  with pytest.raises(ArtifactError, match=r'model\.fqx: section \d+ \(array .*\) at byte \d+: dam'):
    runtime.load(path)


def test_the_command_line(files, tmp_path, capsys):
  path = tmp_path / 'model.fqx'
  path.write_bytes(files[0])
  assert __main__.main(['show', str(path)]) == 0
  assert 'input input: float32[n, 28, 28, 1]' in capsys.readouterr().out
  assert __main__.main(['run', str(path), 'none.jpg']) == 1
  assert 'export it with preprocess=' in capsys.readouterr().err
  path.write_bytes(files[0][:50])
  assert __main__.main(['show', str(path)]) == 1
  assert 'error:' in capsys.readouterr().err


def test_a_photograph(tmp_path, capsys):
  from PIL import Image

  prepare = lambda pixels: pixels.astype(jnp.float32) / 255
  colour = lambda p, x: jnp.log(x.mean((1, 2)) + p)  # red, green or blue
  artifact = fqjax.export(
    colour, np.float32(1e-3), jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.uint8),
    preprocess=prepare, labels=['red', 'green', 'blue'],
  )  # fmt: skip
  path = artifact.save(tmp_path / 'colour.fqx')
  pixels = np.zeros((100, 90, 3), np.uint8)
  pixels[..., 1] = 250
  pixels[30:70, :, 2] = 60
  Image.fromarray(pixels).save(tmp_path / 'grass.png')
  assert __main__.main(['run', str(path), str(tmp_path / 'grass.png'), '--top', '2']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'grass.png' in lines[0]
  assert [line.split()[-1] for line in lines[1:]] == ['green', 'blue']
