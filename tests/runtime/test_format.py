"""docs/format.md says enough: a reader written from it alone, and nothing left out."""

import json
import pathlib
import re
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax.runtime import codecs, oplist

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs/format.md').read_text()
FILES = ROOT / 'tests/runtime/golden'


def test_every_operation_is_described():
  words = set(re.findall(r'`(\w+)`', PAGE))
  for op, rule in oplist.OPS.items():
    assert op in words, op
    assert set(rule.attributes) <= words, op


def test_every_form_is_described():
  for name, codec in codecs.CODECS.items():
    assert f'| `{name}` | `{codec.MAGIC.decode()}` |' in PAGE


class Stranger:
  """Reads a file with the standard library, by the page."""

  def __init__(self, data):
    magic, self.version, packed, alignment, size, raw, crc, whole = struct.unpack(
      '<8sHBBIIIQ', data[:32]
    )
    assert magic == bytes.fromhex('89465158 0D0A1A0A') and whole == len(data)
    head = data[32 : 32 + size]
    assert zlib.crc32(data[:20] + bytes(4) + data[24:32] + head) == crc
    text = zlib.decompress(head) if packed else head
    assert len(text) == raw
    self.header = json.loads(text)
    self.sections, at = [], 32 + size
    for stored, checksum, *inflated in self.header['sections']:
      at = -(-at // alignment) * alignment
      section = data[at : at + stored]
      at += stored
      assert zlib.crc32(section) == checksum
      self.sections.append(zlib.decompress(section) if inflated else section)
    assert at == len(data)

  def array(self, entry):
    shape, data = entry['shape'], self.sections[entry['at']]
    count = int(np.prod(shape))
    if entry['form'] == 'raw':
      return list(struct.unpack(f'<{count}f', data))
    magic, version, kind, bits = struct.unpack('<6sBBB', data[:9])
    assert (
      magic == {'dense': b'FQDENS', 'bitmask': b'FQBITS', 'rice': b'FQRICE'}[entry['form']]
      and version == 1
    )
    rank = data[9]
    body = data[10 + 4 * rank :]
    live = [True] * count
    if entry['form'] == 'bitmask':
      live = [bool(body[i // 8] >> i % 8 & 1) for i in range(count)]
      body = body[-(-count // 8) :]
    if entry['form'] == 'rice':
      entries, low, length = struct.unpack('<IBI', body[:9])
      unary, lows = body[9:], body[9 + -(-length // 8) :]
      body, live, at, zeros, found = lows[-(-entries * low // 8) :], [False] * count, -1, 0, 0
      for i in range(length):
        if not unary[i // 8] >> i % 8 & 1:
          zeros += 1
          continue
        rest = int.from_bytes(lows, 'little') >> found * low & (1 << low) - 1
        at, zeros, found = at + 1 + (zeros << low) + rest, 0, found + 1
        live[at] = True
      assert found == entries
    if kind == 0:
      values = iter(struct.unpack(f'<{sum(live)}f', body))
      return [next(values) if here else 0.0 for here in live]
    assert kind == 4
    stream = int.from_bytes(body, 'little')
    places = iter(range(sum(live)))
    shift = entry.get('shift', 0)
    indices = [
      (stream >> next(places) * bits & (1 << bits) - 1) + shift if here else 0 for here in live
    ]
    table = self.sections[entry['levels']]
    levels = struct.unpack(f'<{len(table) // 4}f', table)
    return [levels[i] for i in indices]


@pytest.mark.parametrize('optimize', ['speed', 'size'])
def test_a_stranger_reads_the_weights(optimize):
  rng = np.random.default_rng(0)
  normal = rng.normal(size=(16, 40)).astype(np.float32)
  params = {
    'raw': normal,
    'pruned': np.where(rng.random((40, 30)) < 0.5, rng.normal(size=(40, 30)), 0).astype(np.float32),
    'levels': rng.choice(np.float32([-1, -0.3, 0.4, 2]), (30, 24)),
    'both': np.where(
      rng.random((24, 50)) < 0.4, rng.choice(np.float32([-1, -0.3, 0.4, 2]), (24, 50)), 0
    ).astype(np.float32),
    'few': np.where((rng.random((50, 60)) < 0.02) | np.eye(50, 60, dtype=bool), rng.normal(size=(50, 60)), 0).astype(np.float32),
  }  # fmt: skip

  def network(params, x):
    for w in params.values():
      x = jnp.tanh(x @ w)
    return x

  data = fqjax.export(
    lambda p, x: network({k: p[k] for k in ('raw', 'pruned', 'levels', 'both', 'few')}, x),
    params, jnp.zeros((1, 16)), optimize=optimize,
  ).data  # fmt: skip
  reader = Stranger(data)
  forms = {entry['name']: entry['form'] for entry in reader.header['arrays']}
  assert sorted(forms.values()) == ['bitmask', 'bitmask', 'dense', 'raw', 'rice']
  for entry in reader.header['arrays']:
    want = params[entry['name']]
    got = np.float32(reader.array(entry))
    order = entry.get('order', [0, 1])
    stored = [want.shape[axis] for axis in order]
    np.testing.assert_array_equal(got.reshape(stored).transpose(np.argsort(order)), want)
  [graph] = reader.header['graphs']
  assert [node[0] for node in graph['nodes']] == ['dot', 'tanh'] * 5


@pytest.mark.parametrize('kind', ['speed', 'size', 'int8'])
@pytest.mark.parametrize('version', [1])
def test_files_of_every_version_stay_readable(version, kind):
  model = fqjax.runtime.load(FILES / f'v{version}-{kind}.fqx')
  want = np.load(FILES / f'v{version}.npz')
  result = model(want['x'])
  if kind == 'int8':
    np.testing.assert_array_equal(result, want['int8_0'])
    return
  np.testing.assert_array_equal(result['best'], want[f'{kind}_0'])
  np.testing.assert_allclose(result['scores'], want[f'{kind}_1'], rtol=1e-5, atol=1e-6)
  if kind == 'speed':
    assert model.labels == tuple('abcde') and model.metadata == {'note': 'golden'}
