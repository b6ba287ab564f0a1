"""What a pruned model takes, against the files the formats write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import sparsity as sp
from fqjax.runtime import codecs
from fqjax.sparsity import Pooled, Unstructured, bits, make_plan, project
from fqjax.sparsity.structures._base import codec_of
from tests.runtime.codecs.cases import same_bits
from tests.sparsity.trees import KINDS, net

ELOG = sp.pattern_set('elog4')


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def test_the_whole_model_is_the_sum_of_its_files():
  params = {
    'conv': {'kernel': _normal(3, 3, 4, 8), 'bias': np.zeros(8, np.float32)},
    'rows': {'kernel': _normal(20, 6)},
    'cell': {'kernel': _normal(5, 12)},
    'pool': {'kernel': _normal(16, 16)},
    'half': {'kernel': _normal(8, 8).astype(jnp.bfloat16), 'scale': np.ones(8, jnp.bfloat16)},
    'steps': np.zeros((), np.int32),
    'nothing': np.zeros((0, 3), np.float32),
  }
  plan = make_plan(params, [
    ('conv/kernel', sp.Patterns(ELOG, keep=0.5)),
    ('rows/kernel', sp.BlockMax(4)),
    ('cell/kernel', sp.Gates(sp.NM(1, 5), 4)),
    ('pool/kernel', Pooled(keep=0.1)),
    ('half/kernel', sp.NM(2, 4)),
  ])  # fmt: skip
  found = sp.sizes(plan, params)
  pruned = _flat(project(plan, params)[0])
  total = 0
  for entry in plan.entries:
    if entry.path in ('steps', 'nothing'):
      assert entry.path not in found.bits
      continue
    z = np.asarray(pruned[entry.path])
    if entry.structure is None:
      files = [codecs.dense.to_bytes(codecs.dense.encode(z.view(f'u{z.itemsize}')))]
      assert found.kept[entry.path] == z.size
    else:
      encoded = entry.structure.encode(z, entry.layout)
      parts = encoded if isinstance(entry.structure, sp.Gates) else [encoded]
      files = [codec_of(part).to_bytes(part) for part in parts]
      assert found.kept[entry.path] == np.count_nonzero(z) == entry.kept
    assert found.bits[entry.path].total == 8 * sum(map(len, files))
    assert found.weights[entry.path] == z.size
    total += sum(map(len, files))
  weights = 288 + 8 + 120 + 60 + 256 + 64 + 8
  kept = 16 * 4 + 8 + 6 * 5 + 12 + 26 + 32 + 8
  assert found.bytes == total
  assert found.compression == weights / kept
  assert found.compression_bytes == 4 * weights / total
  assert found.bits_per_weight == 8 * total / weights
  kernels = found.only('(conv|rows)/kernel')
  assert kernels.compression == 408 / (64 + 30) and set(kernels.bits) == {
    'conv/kernel',
    'rows/kernel',
  }
  assert f'{total:,}' in str(found) and len(str(found).splitlines()) == len(found.bits) + 2
  with pytest.raises(ValueError, match="'convs/kernel' selects no array. Closest: 'conv/kernel'"):
    found.only('convs/kernel')


@pytest.mark.parametrize('kind', KINDS)
def test_sizes_on_every_kind_of_tree(kind):
  params, _, layout, conv, dense, weights = net(kind)
  plan = make_plan(params, [(weights, sp.BlockMax(4))], layout=layout)
  found = sp.sizes(plan, params).only(weights)
  assert found.kept == {conv: 8 * 7, dense: 5 * 2}  # of 27 and 8 columns
  assert found.compression == (216 + 40) / 66 and 2 < found.compression_bytes < 4


def test_a_network_pruned_further_than_its_plan_is_smaller():
  params = {'w': _normal(32, 32)}
  plan = make_plan(params, [('w', Unstructured(keep=0.5))])
  before = sp.sizes(plan, params)
  params['w'][:, 8:] = 0
  after = sp.sizes(plan, params)
  assert (before.kept['w'], after.kept['w']) == (512, 256)


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_bits_are_those_of_the_codecs(scope):
  w = jax.random.normal(jax.random.key(4), (3, 3, 8, 16))
  params = {
    'a': w,
    'b': 3 * w.astype(jnp.bfloat16),
    'bias': jnp.ones(16),
    'step': jnp.zeros((), int),
  }
  structure = Unstructured(keep=0.25) if scope == 'layer' else Pooled(keep=0.25)
  plan = make_plan(params, [('a|b', structure)])
  cost, masks = bits(plan, params), project(plan, params)[1]
  assert set(cost) == {'a', 'b', 'bias'}
  assert cost['bias'].values == 16 * 32 and cost['bias'].index == 0
  for path, width in (('a', 32), ('b', 16)):
    assert cost[path].values >= int(masks[path].sum()) * width  # fillers of relative indices
    assert 0 < cost[path].index <= w.size
    assert cost[path].total < w.size * width
  if scope == 'global':
    assert cost['b'].values > 2 * cost['a'].values  # three times as large: more of it lives


# Without a plan.


def _stripes():
  w = _normal(32, 64)
  return np.where(np.arange(64) % 4 == 1, w, 0).astype(np.float32)


def _projected(structure, *shape, layout='HWIO'):
  return np.asarray(structure.project(jnp.asarray(_normal(*shape)), layout)[0])


MADE = {
  'dense': (lambda: _normal(16, 16), 'IO'),
  'slices': (_stripes, 'OI'),
  'nm': (lambda: _projected(sp.NM(1, 4), 64, 32, layout='IO'), 'IO'),
  'blocks': (lambda: _projected(sp.Blocks(4, 4, keep=0.1), 64, 64, layout='IO'), 'IO'),
  'darb': (lambda: _projected(sp.Darb((2, 4) * 32), 256, 64, layout='IO'), 'IO'),
  'pcnn': (lambda: _projected(sp.Patterns(ELOG), 3, 3, 16, 16), 'HWIO'),
  'patterns': (lambda: _projected(sp.Patterns(ELOG, keep=0.3), 3, 3, 16, 16), 'HWIO'),
  'punched': (lambda: _projected(sp.BlockPunched(keep=0.3), 3, 3, 32, 32), 'HWIO'),
  'rice': (lambda: _projected(Unstructured(keep=0.02), 64, 256, layout='IO'), 'IO'),
  'relative': (
    lambda: np.where(np.arange(4096) % 127 == 126, _normal(4096), 0).reshape(64, 64),
    'OI',
  ),
  'bitmask': (lambda: _projected(Unstructured(keep=0.5), 64, 64, layout='IO'), 'IO'),
}


@pytest.mark.parametrize('name', MADE)
def test_the_cheapest_form_is_the_one_the_zeros_were_made_for(name):
  make, layout = MADE[name]
  w = make()
  stored = sp.cheapest(w, layout)
  assert stored.format == name
  assert same_bits(stored.decode(layout, w.shape), w)
  size = codecs.CODECS[name].bits(stored.encoded).total
  assert size <= codecs.dense.bits(codecs.dense.encode(w)).total


def test_the_cheapest_form_of_odd_values_and_dtypes():
  w = _normal(3, 3, 5, 7)
  w[w < 0.5] = 0
  w.flat[:4] = np.nan, -0.0, np.inf, 1e-45
  stored = sp.cheapest(w, 'HWIO')
  assert stored.format != 'dense' and same_bits(stored.decode('HWIO', w.shape), w)
  half = np.where(np.isfinite(w), w, 0).astype(jnp.bfloat16)
  stored = sp.cheapest(half, 'HWIO')
  assert same_bits(stored.decode('HWIO', w.shape, half.dtype), half)
  nothing = sp.cheapest(np.zeros((8, 8), np.float32), 'IO')
  assert same_bits(nothing.decode('IO', (8, 8)), np.zeros((8, 8), np.float32))
  # Fewer bits a value shift the balance from values to places.
  w = _projected(sp.NM(2, 4), 64, 32, layout='IO')
  assert sp.cheapest(w, 'IO').format == 'bitmask'
  assert sp.cheapest(w, 'IO', value_bits=1).format == 'dense'
  with pytest.raises(ValueError, match='names 4 axes, the leaf has 2'):
    sp.cheapest(w, 'HWIO')
