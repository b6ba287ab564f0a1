"""Plans on four kinds of tree: what each leaf gets and why, masks, and every refusal."""

import dataclasses
import re

import equinox as eqx
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from fqjax.sparsity import (
  NM,
  Filters,
  Gates,
  Layer,
  Patterns,
  Plan,
  Pooled,
  Structure,
  Unstructured,
  check_masks,
  describe,
  make_plan,
  pcnn_codebook,
  project,
  trace_layers,
)
from tests.sparsity.trees import IMAGES, KINDS, net


def _flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _top(w, k):
  """NumPy's largest k magnitudes."""
  mask = np.zeros(w.size, bool)
  mask[np.argsort(-np.abs(np.asarray(w, np.float64)).ravel(), kind='stable')[:k]] = True
  return mask.reshape(w.shape)


def _entries(plan):
  return {entry.path: entry for entry in plan.entries}


# Four kinds of tree.


@pytest.mark.parametrize('kind', KINDS)
def test_masks_and_zeros_on_every_kind_of_tree(kind):
  params, _, layout, conv, dense, weights = net(kind)
  plan = make_plan(params, [(weights, Unstructured(keep=0.25))], layout=layout)
  pruned, masks = project(plan, params)
  before, after, found = _flat(params), _flat(pruned), _flat(masks)
  assert set(found) == {conv, dense}
  assert jax.tree.structure(pruned) == jax.tree.structure(params)
  assert type(masks) is type(params)
  for path, leaf in before.items():
    if path in found:
      np.testing.assert_array_equal(found[path], _top(leaf, round(leaf.size / 4)))
      np.testing.assert_array_equal(after[path], np.where(found[path], leaf, 0))
    else:
      assert after[path] is leaf
  # A dense leaf's mask is None: a tree of the same shape, not a shorter one.
  marked = jax.tree.map(lambda _, m: m is not None, params, masks)
  assert {path for path, covered in _flat(marked).items() if covered} == set(found)


@pytest.mark.parametrize('kind', KINDS)
def test_a_plan_is_static_under_jit_and_compiles_once(kind):
  params, _, layout, _, _, weights = net(kind)
  plan = make_plan(params, [(weights, Unstructured(keep=0.25))], layout=layout)
  assert hash(plan) == hash(make_plan(params, [(weights, Unstructured(keep=0.25))], layout=layout))
  arrays, rest = eqx.partition(params, eqx.is_array)
  traced = []

  @jax.jit
  def step(arrays):
    traced.append(1)
    pruned, masks = project(plan, eqx.combine(arrays, rest))
    return eqx.filter(pruned, eqx.is_array), masks

  got = step(arrays)
  step(jax.tree.map(lambda x: x + 1, arrays))
  assert len(traced) == 1
  pruned, masks = project(plan, params)
  jax.tree.map(np.testing.assert_array_equal, got, (eqx.filter(pruned, eqx.is_array), masks))


@pytest.mark.parametrize('kind', KINDS)
def test_every_array_is_in_the_table_with_a_reason(kind):
  params, _, layout, conv, dense, weights = net(kind)
  plan = make_plan(params, [(weights, Unstructured(keep=0.25))], layout=layout)
  entries = _entries(plan)
  assert set(entries) == {path for path, leaf in _flat(params).items() if eqx.is_array(leaf)}
  assert {path for path, entry in entries.items() if entry.structure} == {conv, dense}
  assert all(entry.reason for entry in plan.entries)
  lines = describe(plan).splitlines()
  for path, entry in entries.items():
    [line] = [line for line in lines if line.split()[0] == path]
    assert line.endswith(entry.reason)
  if kind == 'equinox':
    assert any('no arrays: activation' in line for line in lines)


@pytest.mark.parametrize('kind', KINDS)
def test_the_trace_tells_ends_and_agrees_with_the_layout(kind):
  params, apply, layout, conv, dense, weights = net(kind)
  layers = trace_layers(apply, params, jnp.ones(IMAGES))
  assert list(layers) == [conv, dense]
  plan = make_plan(params, [(weights, Unstructured(keep=0.5))], layout=layout, layers=layers)
  assert _entries(plan)[conv].reason == f'rule 1 {weights!r}; first layer'
  assert _entries(plan)[dense].reason == f'rule 1 {weights!r}; last layer'
  plan = make_plan(
    params, [(weights, Unstructured(keep=0.5))], layout=layout, layers=layers, dense=('last',)
  )
  assert _entries(plan)[dense].structure is None
  assert _entries(plan)[dense].reason == 'last layer: left dense'
  wrong = {4: 'HWIO', 2: 'IO'} if kind == 'equinox' else {4: 'OIHW', 2: 'OI'}
  right = 'OIHW' if kind == 'equinox' else 'HWIO'
  with pytest.raises(ValueError, match=f'{conv}.*is read as {right} by the traced function'):
    make_plan(params, [(weights, Unstructured(keep=0.5))], layout=wrong, layers=layers)


# Each leaf and its reason.

_SHAPES = {
  'stem/kernel': (7, 7, 3, 16),
  'dw/kernel': (3, 3, 1, 16),
  'group/kernel': (3, 3, 4, 16),
  'point/kernel': (1, 1, 16, 8),
  'skipped/kernel': (3, 3, 8, 8),
  'LSTMCell_0/hf/kernel': (8, 8),
  'lstm/linear/w': (16, 32),
  'Embed_0/embedding': (100, 16),
  'embed/embeddings': (100, 16),
  'tokens/embedding/weight': (100, 16),
  'pos_embedding': (1, 196, 16),
  'embedding/kernel': (4, 4, 3, 16),
  'cls_token': (1, 1, 16),
  'conv_b/bias': (16, 1, 1),
  'lin/b': (4,),
  'conv/b': (16, 1, 1),
  'bn1/scale': (16,),
  'norm2/weight': (16, 16),
  'batch_norm_1/offset': (1, 1, 1, 16),
  'alpha': (16,),
  'temperature': (),
  'head/kernel': (16, 10),
}  # fmt: skip


def _model():
  params = {path: jnp.ones(shape) for path, shape in _SHAPES.items()}
  return {**params, 'step': jnp.zeros((), jnp.int32), 'key': jax.random.key(0)}


_ANY = "rule 2 '.*'"
_DEFAULT = [('skipped/.*', None), ('.*', Unstructured(keep=0.5))]


@pytest.mark.parametrize(
  'path, pruned, reason',
  [
    ('stem/kernel', True, f'{_ANY}; first layer'),
    ('dw/kernel', False, 'depthwise: left dense'),
    ('group/kernel', True, f'{_ANY}; 4 groups of 4 inputs'),
    ('point/kernel', True, f'{_ANY}; 1x1'),
    ('skipped/kernel', False, "rule 1 'skipped/.*': dense"),
    ('LSTMCell_0/hf/kernel', True, f'{_ANY}; used 5 times; one gate of a cell'),
    ('lstm/linear/w', True, f'{_ANY}; recurrent'),
    ('Embed_0/embedding', False, 'embedding table: never pruned'),
    ('embed/embeddings', False, 'embedding table: never pruned'),
    ('tokens/embedding/weight', False, 'embedding table: never pruned'),
    ('pos_embedding', False, 'embedding table: never pruned'),
    ('embedding/kernel', True, _ANY),
    ('cls_token', False, 'learned token: never pruned'),
    ('conv_b/bias', False, 'bias: never pruned'),
    ('lin/b', False, 'bias: never pruned'),
    ('conv/b', False, 'bias: never pruned'),
    ('bn1/scale', False, 'normalisation: never pruned'),
    ('norm2/weight', False, 'normalisation: never pruned'),
    ('batch_norm_1/offset', False, 'bias: never pruned'),
    ('alpha', False, 'vector: never pruned'),
    ('temperature', False, 'scalar: never pruned'),
    ('head/kernel', True, f'{_ANY}; last layer'),
    ('step', False, 'int32: no weights'),
    ('key', False, 'key<fry>: no weights'),
  ],
)
def test_reasons(path, pruned, reason):
  layers = {
    'stem/kernel': Layer(9),
    'dw/kernel': Layer(9, groups=16),
    'group/kernel': Layer(9, groups=4),
    'point/kernel': Layer(9),
    'skipped/kernel': Layer(9),
    'LSTMCell_0/hf/kernel': Layer(9, times=5),
    'lstm/linear/w': Layer(9),
    'embedding/kernel': Layer(9),
    'head/kernel': Layer(9),
  }
  entry = _entries(make_plan(_model(), _DEFAULT, layers=layers))[path]
  assert (entry.structure is not None, entry.reason) == (pruned, reason)
  assert entry.shape == _model()[path].shape
  assert bool(entry.layout) == pruned


def test_one_input_without_a_trace_may_be_depthwise():
  entries = _entries(make_plan(_model(), _DEFAULT))
  assert entries['dw/kernel'].structure is None
  assert 'depthwise (or one input channel: pass layers=): left dense' in entries['dw/kernel'].reason
  entries = _entries(make_plan(_model(), _DEFAULT, dense=()))
  assert entries['dw/kernel'].structure == Unstructured(keep=0.5)
  # The trace tells a grey image's first layer from a depthwise one.
  params = {'dw/kernel': _model()['dw/kernel']}
  entries = _entries(make_plan(params, _DEFAULT[1:], layers={'dw/kernel': Layer(9)}))
  assert entries['dw/kernel'].reason == "rule 1 '.*'; first layer; last layer"


def test_a_table_that_is_multiplied_is_a_layer():
  params = {'embedding': jnp.ones((10, 4))}
  with pytest.raises(ValueError, match="prunes nothing: 'embedding' .embedding table"):
    make_plan(params, [('.*', Unstructured(keep=0.5))])
  layers = trace_layers(lambda p, x: p['embedding'][x] @ p['embedding'].T, params, jnp.ones(3, int))
  plan = make_plan(params, [('.*', Unstructured(keep=0.5), 'OI')], layers=layers)
  assert plan.entries[0].structure == Unstructured(keep=0.5)
  plan = make_plan(params, [('.*', Unstructured(keep=0.5), 'OI')], protect=())
  assert plan.entries[0].structure == Unstructured(keep=0.5)


def test_leaves_without_a_rule_say_so_and_first_match_wins():
  params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((4, 4)), 'c': jnp.ones((4, 4))}
  plan = make_plan(params, [('a', Unstructured(count=3)), ('[ab]', Unstructured(count=5))])
  assert [entry.kept for entry in plan.entries] == [3, 5, 16]
  assert plan.entries[2].reason == 'no rule selects it'
  assert 'keep 8 of 32 weights (4x), the model 24 of 48 (2x)' in describe(plan)


def test_what_does_not_fit_can_stay_dense_and_says_why():
  params = {'a/kernel': jnp.ones((3, 3, 4, 4)), 'b/kernel': jnp.ones((1, 1, 6, 4))}
  rules = [('.*/kernel', NM(2, 4))]
  with pytest.raises(ValueError, match=r"'b/kernel' \[1, 1, 6, 4\] \(rule 1.*do not divide by 4"):
    make_plan(params, rules)
  entry = _entries(make_plan(params, rules, unfit='dense'))['b/kernel']
  assert entry.structure is None
  assert re.search('1x1: does not fit, dense: .*do not divide by 4', entry.reason)


def test_a_rule_can_make_a_structure_from_each_leaf():
  key = jax.random.key(0)
  params = {
    name: jax.random.normal(k, (3, 3, 4, 8)) for name, k in zip('ab', jax.random.split(key))
  }
  plan = make_plan(params, [('.*', lambda w, layout: Patterns(pcnn_codebook(w, layout, n=4, v=8)))])
  made = [entry.structure for entry in plan.entries]
  assert all(isinstance(s, Patterns) for s in made) and made[0] != made[1]
  assert [entry.kept for entry in plan.entries] == [4 * 32] * 2


def test_abstract_params_give_the_same_plan():
  params = net('linen').params
  shapes = jax.eval_shape(lambda: params)
  rules = [('.*/kernel', Unstructured(keep=0.25))]
  assert make_plan(shapes, rules) == make_plan(params, rules)
  assert jax.eval_shape(lambda p: make_plan(p, rules) and 0, params) is not None  # inside a trace
  with pytest.raises(ValueError, match="weights of 'conv/kernel', which are abstract"):
    make_plan(shapes, [('.*/kernel', lambda w, layout: Unstructured(keep=0.5))])


def test_layouts_by_rank_are_named_and_printed():
  params = {'a': jnp.ones((2, 3, 4, 5, 6)), 'b': jnp.ones((4, 6))}
  plan = make_plan(params, [('.*', Filters(keep=0.5))], layout={'5': 'OIDHW', 2: 'OI'})
  assert [entry.layout for entry in plan.entries] == ['OIDHW', 'OI']
  assert [entry.kept for entry in plan.entries] == [3 * 4 * 5 * 6, 2 * 6]
  assert '5 OIDHW, 2 OI (as given)' in describe(plan)
  plan = make_plan(params, [('b', Filters(keep=0.5)), ('a', Filters(keep=0.5), 'OIDHW')])
  assert [entry.layout for entry in plan.entries] == ['OIDHW', 'IO']
  assert "4 HWIO, 3 HIO, 2 IO (Flax's default)" in describe(plan)


def test_attention_projections_need_their_own_layout():
  model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
  x = jnp.ones((1, 5, 6))
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  layers = trace_layers(lambda p, x: model.apply({'params': p}, x), params, x)
  rules = [('.*/kernel', Filters(keep=0.5))]
  with pytest.raises(ValueError, match=r"'key/kernel' \[6, 2, 4\] is read as IOO .*not as HIO"):
    make_plan(params, rules, layers=layers)
  rules = [('out/kernel', Filters(keep=0.5), 'IIO'), ('.*/kernel', Filters(keep=0.5), 'IOO')]
  plan = make_plan(params, rules, layers=layers)
  assert _entries(plan)['out/kernel'].kept == 8 * 3


# Structures across leaves and within them.


def test_pooled_is_one_threshold_over_the_scope():
  key = jax.random.key(1)
  shapes = {'a': (3, 3, 4, 8), 'b': (20, 10), 'c': (6, 5)}
  params = {
    name: jax.random.normal(k, shapes[name]) * scale
    for name, scale, k in zip('abc', (1.0, 2.0, 1.5), jax.random.split(key, 3))
  }
  plan = make_plan(params, [('.*', Pooled(keep=0.2))])
  masks = project(plan, params)[1]
  everything = np.concatenate([np.abs(np.asarray(w)).ravel() for w in params.values()])
  threshold = np.sort(everything)[-round(0.2 * everything.size)]
  for name, w in params.items():
    np.testing.assert_array_equal(masks[name], np.abs(w) >= threshold)
  assert len({float(m.mean()) for m in masks.values()}) == 3  # not the same share everywhere
  assert f'keep {round(0.2 * everything.size)} of {everything.size} weights' in describe(plan)
  # Two scopes are two thresholds.
  plan = make_plan(params, [('a', Pooled(keep=0.2, scope='convs')), ('.*', Pooled(keep=0.2))])
  masks = project(plan, params)[1]
  np.testing.assert_array_equal(masks['a'], _top(params['a'], round(0.2 * 288)))


def test_pooled_leaves_no_layer_empty_and_keeps_the_total():
  params = {'big': jnp.full((10, 10), 100.0), 'tiny': jnp.full((4, 4), 1e-3)}
  plan = make_plan(params, [('.*', Pooled(keep=0.5, least=3))])
  masks = project(plan, params)[1]
  assert int(masks['tiny'].sum()) == 3 and int(masks['big'].sum()) == 58 - 3
  assert masks['tiny'][:, 0].tolist() == [True, True, True, False]  # the first output's
  check_masks(plan, masks)


def test_pooled_with_saliency_frozen_and_two_dtypes():
  params = {'a': jnp.arange(1.0, 9.0).reshape(2, 4), 'b': jnp.ones((2, 4), jnp.bfloat16)}
  saliency = {'a': jnp.ones((2, 4)), 'b': 2 + jnp.arange(8.0).reshape(2, 4)}
  plan = make_plan(params, [('.*', Pooled(keep=0.5, least=1))])
  pruned, masks = project(plan, params, saliency=saliency)
  assert int(masks['a'].sum()) == 1 and int(masks['b'].sum()) == 7
  assert pruned['b'].dtype == jnp.bfloat16
  frozen = {'a': None, 'b': jnp.ones((2, 4), bool).at[0].set(False)}
  masks = project(plan, params, saliency=saliency, frozen=frozen)[1]
  assert not masks['b'][1].any() and int(masks['b'].sum()) == 4 and int(masks['a'].sum()) == 4
  # Less lives than the budget: what is frozen stays away all the same.
  frozen = {'a': None, 'b': jnp.ones((2, 4), bool)}
  masks = project(plan, params, saliency=saliency, frozen=frozen)[1]
  assert not masks['b'].any()


@pytest.mark.parametrize('layout', ['IO', 'OI'])
def test_gates_are_ranked_apart(layout):
  w = np.random.default_rng(0).normal(size=(12, 6)) * np.repeat([0.01, 1, 10, 100], 3)[:, None]
  w = jnp.asarray(w.T if layout == 'IO' else w, jnp.float32)
  plan = make_plan({'w': w}, [('.*', Gates(Unstructured(keep=1 / 3)), layout)])
  mask = project(plan, {'w': w})[1]['w']
  gates = np.split(np.asarray(w), 4, axis=1 if layout == 'IO' else 0)
  want = np.concatenate([_top(g, 6) for g in gates], axis=1 if layout == 'IO' else 0)
  np.testing.assert_array_equal(mask, want)
  assert plan.entries[0].kept == 24
  # Together the last gate takes all.
  together = jax.jit(lambda w: Unstructured(keep=1 / 3).project(w, layout)[1])(w)
  assert not np.split(np.asarray(together), 4, axis=1 if layout == 'IO' else 0)[0].any()


def test_gates_may_differ_and_take_saliency_and_frozen():
  w = jnp.ones((4, 8))
  gates = Gates(tuple(Unstructured(count=n) for n in (1, 2, 3, 4)))
  assert gates.kept((4, 8), 'IO') == 10
  saliency = jnp.arange(32.0).reshape(4, 8)
  frozen = jnp.zeros((4, 8), bool).at[:, 6:].set(True)
  run = jax.jit(lambda w, s, f: gates.project(w, 'IO', saliency=s, frozen=f))
  z, mask = run(w, saliency, frozen)
  assert mask.reshape(4, 4, 2).sum((0, 2)).tolist() == [1, 2, 3, 0]
  assert bool(mask[3, 1]) and float(z[3, 1]) == 1


# Projection.


def test_saliency_ranks_and_frozen_weights_stay_away():
  params = {'w': jnp.array([[4.0, 3.0], [2.0, 1.0]]), 'b': jnp.ones(2)}
  plan = make_plan(params, [('w', Unstructured(count=2))])
  assert project(plan, params)[1]['w'].tolist() == [[True, True], [False, False]]
  saliency = {'w': jnp.array([[0.0, 1.0], [2.0, 3.0]]), 'b': None}
  pruned, masks = project(plan, params, saliency=saliency)
  assert masks['w'].tolist() == [[False, False], [True, True]]
  assert pruned['w'].tolist() == [[0, 0], [2, 1]]
  frozen = {'w': jnp.array([[True, False], [False, False]]), 'b': None}
  assert project(plan, params, frozen=frozen)[1]['w'].tolist() == [[False, True], [True, False]]


def test_sharded_weights_give_the_same_masks():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  key = jax.random.key(2)
  params = {name: jax.random.normal(k, (16, 32)) for name, k in zip('ab', jax.random.split(key))}
  plan = make_plan(params, [('a', Unstructured(keep=0.3)), ('b', Pooled(keep=0.3))])
  want = project(plan, params)
  sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec(None, 'x')))
  got = jax.jit(lambda p: project(plan, p))(sharded)
  assert not got[0]['a'].sharding.is_fully_replicated
  jax.tree.map(np.testing.assert_array_equal, got, want)


# Refusals.


@dataclasses.dataclass(frozen=True)
class _Nothing(Structure):
  """Keeps nothing."""

  def kept(self, shape, layout):
    del shape, layout
    return 0

  def _select(self, scores):
    return jnp.zeros(scores.shape, bool)


@dataclasses.dataclass(frozen=True)
class _Unhashable(Unstructured):
  """Has a field that is an array."""

  table: object = None

  def __hash__(self):
    return hash(self.table)


_HALF = Unstructured(keep=0.5)
_PARAMS = {
  'Conv_0': {'kernel': np.ones((3, 3, 4, 8), np.float32), 'bias': np.ones(8, np.float32)},
  'Dense_0': {'kernel': np.ones((8, 6), np.float32)},
}


@pytest.mark.parametrize(
  'rules, settings, message',
  [
    ([], {}, 'no rules; give at least one'),
    ({'.*': _HALF}, {}, 'ordered list of .regex, structure. pairs, not a dict'),
    ([('.*',)], {}, r'rule 1, .* must be \(regex, structure\)'),
    ([('(', _HALF)], {}, r"rule 1: '\(' is no regular expression"),
    ([('conv[0-9]+/kernel', _HALF)], {},
     r"rule 1 'conv\[0-9\]\+/kernel' selects no parameter. Closest: 'Conv_0/kernel', "),
    ([('kernel', _HALF)], {}, r"a part of 'Conv_0/kernel', and a rule matches whole paths"),
    ([('.*kernel', _HALF), ('Conv_0/kernel', None)], {},
     r"rule 2 'Conv_0/kernel' is unused: the first match wins.*belongs to rule 1"),
    ([('.*/bias', _HALF)], {}, r"prunes nothing: 'Conv_0/bias' \(bias: never pruned\).*protect="),
    ([('.*kernel', NM(2, 7))], {}, r"'Conv_0/kernel' \[3, 3, 4, 8\] \(rule 1.*divide by 7"),
    ([('.*kernel', _Nothing())], {}, r"'Conv_0/kernel'.*keeps nothing of the layer"),
    ([('.*kernel', _Unhashable(0.5, table=np.ones(2)))], {}, 'cannot be hashed'),
    ([('.*kernel', 0.5)], {}, r"gives 'Conv_0/kernel' 0.5; give a structure"),
    ([('.*kernel', Unstructured)], {}, 'keep=|give a structure|exactly one|returned'),
    ([('.*kernel', lambda w, layout: 3)], {}, r"returned 3 for 'Conv_0/kernel', not a structure"),
    ([('.*kernel', lambda w, layout: Unstructured(keep=20.0))], {},
     r"'Conv_0/kernel' \[3, 3, 4, 8\] \(rule 1 .*keep=20.0 must be in \(0, 1\]; .*keep=1/r"),
    ([('Conv.*', _HALF)], {'layout': {2: 'IO'}},
     r"'Conv_0/kernel' \[3, 3, 4, 8\] .*rank 4, for which no layout is named"),
    ([('.*', _HALF)], {'layout': {4: 'HWI'}}, r"layout=\{4: 'HWI'\}"),
    ([('.*kernel', _HALF, 'IO')], {}, r"'Conv_0/kernel' .*layout 'IO' names 2 axes"),
    ([('.*', _HALF)], {'dense': 'first'}, "dense='first' must be a tuple"),
    ([('.*', _HALF)], {'dense': ('first',)}, 'pass layers=trace_layers'),
    ([('.*', _HALF)], {'layers': {'conv1': Layer(1)}}, "layers are of another model: 'conv1'"),
    ([('.*', _HALF)], {'unfit': 'skip'}, "unfit='skip' must be 'error' or 'dense'"),
    ([('C.*', Pooled(keep=0.5)), ('D.*', Pooled(keep=0.1))], {},
     r"scope 'global' has .*keep=0.5.*Conv_0/kernel.*keep=0.1.*Dense_0/kernel.*two scopes"),
    ([('D.*', Gates(_HALF))], {}, r"'Dense_0/kernel' .*6 outputs .*not 4 equal gates"),
  ],
)  # fmt: skip
def test_make_plan_refuses(rules, settings, message):
  with pytest.raises(ValueError, match=message):
    make_plan(_PARAMS, rules, **settings)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
  params = {'a': jnp.ones((2, 2)).at[1, 1].set(bad), 'b': jnp.ones((2, 2))}
  with pytest.raises(ValueError, match="'a' holds NaN or infinite weights.*checkpoint"):
    make_plan(params, [('.*', _HALF)])
  make_plan(params, [('a', None), ('b', _HALF)])  # what is not ranked is not looked at


def test_pooled_and_gates_refuse_bad_fields():
  with pytest.raises(ValueError, match='not count=3'):
    Pooled(count=3)
  with pytest.raises(ValueError, match='least=0 must be at least 1'):
    Pooled(keep=0.5, least=0)
  with pytest.raises(ValueError, match='2 structures for 4 gates'):
    Gates((_HALF, _HALF))


def test_two_leaves_of_one_path_are_refused():
  with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
    make_plan({'a': {'b': jnp.ones((2, 2))}, 'a/b': jnp.ones((2, 2))}, [('.*', _HALF)])


def test_project_refuses_another_model():
  plan = make_plan(_PARAMS, [('.*kernel', _HALF)])
  other = {**_PARAMS, 'Dense_0': {'kernel': np.ones((9, 6), np.float32)}}
  with pytest.raises(ValueError, match=r"'Dense_0/kernel' is \[8, 6\] in the plan and \[9, 6\]"):
    project(plan, other)
  with pytest.raises(ValueError, match="it has 'Dense_0/kernel', the parameters do not"):
    project(plan, {'Conv_0': _PARAMS['Conv_0']})
  with pytest.raises(ValueError, match="the parameters have 'x', the plan does not"):
    project(plan, {**_PARAMS, 'x': np.ones(2)})
  with pytest.raises(ValueError, match="saliency has nothing for 'Conv_0/kernel'"):
    project(plan, _PARAMS, saliency={'Dense_0': _PARAMS['Dense_0']})
  with pytest.raises(ValueError, match="frozen is of another model: 'Dense_0/kernel' is"):
    project(plan, _PARAMS, frozen=other)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda m: {**m, 'c': m['a']}, "masks is of another model: it has 'c'"),
    (lambda m: {**m, 'a': m['a'][:2]}, r"'a' is \[2, 6\] there and \[4, 6\]"),
    (lambda m: {**m, 'a': None}, "has nothing for 'a'"),
    (lambda m: {**m, 'a': m['a'].astype(np.float32)}, "mask of 'a' is float32; make it bool"),
    (lambda m: {**m, 'a': np.zeros((4, 6), bool)}, "mask of 'a' keeps nothing"),
    (
      lambda m: {**m, 'a': np.ones((4, 6), bool)},
      r'keeps 24 weights, Unstructured\(keep=0.5\) .*12',
    ),
    (lambda m: {**m, 'b': np.ones((4, 6), bool)}, "'b' is of another plan: .*no rule selects it"),
  ],
)
def test_masks_of_others_are_refused(change, message):
  params = {'a': jnp.arange(24.0).reshape(4, 6), 'b': jnp.ones((4, 6))}
  plan = make_plan(params, [('a', _HALF)])
  masks = project(plan, params)[1]
  check_masks(plan, masks)
  check_masks(plan, {**masks, 'a': masks['a'].at[3].set(False)})  # sparser is no contradiction
  with pytest.raises(ValueError, match=message):
    check_masks(plan, change(masks))


def test_masks_inside_a_trace_are_checked_as_far_as_they_go():
  params = {'a': jnp.ones((4, 6))}
  plan = make_plan(params, [('a', _HALF)])

  @jax.jit
  def f(masks):
    check_masks(plan, masks)
    return masks['a'].sum()

  assert f({'a': jnp.ones((4, 6), bool)}) == 24
  with pytest.raises(ValueError, match=r"'a' is \[3, 6\]"):
    f({'a': jnp.ones((3, 6), bool)})


def test_a_plan_without_rules_for_anything_projects_nothing():
  params = {'a': jnp.ones((4, 6))}
  plan = make_plan(params, [('a', None)])
  assert isinstance(plan, Plan) and not plan.pruned
  assert project(plan, params)[1] == {'a': None}
  assert 'nothing is pruned; the model has 24 weights' in describe(plan)
