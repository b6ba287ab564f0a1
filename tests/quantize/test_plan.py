"""Plans of levels on four kinds of tree: what each leaf gets and why, and every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax as fq
from fqjax.quantize import Binary, Interval, Quantizer, Ternary, Uniform, describe, make_plan
from fqjax.sparsity import Layer, Unstructured, trace_layers
from tests.sparsity.trees import IMAGES, KINDS, net


def entries(plan):
  return {entry.path: entry for entry in plan.entries}


@pytest.mark.parametrize('kind', KINDS)
def test_every_array_is_in_the_table_with_a_reason(kind):
  params, _, layout, conv, dense, weights = net(kind)
  plan = make_plan(params, [(weights, Interval(3))], layout=layout)
  assert hash(plan) == hash(make_plan(params, [(weights, Interval(3))], layout=layout))
  assert {entry.path for entry in plan.quantized} == {conv, dense}
  assert all(entry.reason for entry in plan.entries)
  lines = describe(plan).splitlines()
  for path, entry in entries(plan).items():
    [line] = [line for line in lines if line.split()[0] == path]
    assert line.endswith(entry.reason)
  assert '256 of' in lines[-2 - ('no arrays' in lines[-1])]


def test_first_and_last_layers_are_quantized_unless_kept():
  params, apply, layout, conv, dense, weights = net('linen')
  layers = trace_layers(apply, params, jnp.ones(IMAGES))
  plan = make_plan(params, [(weights, Binary())], layout=layout, layers=layers)
  assert [entry.path for entry in plan.quantized] == [conv, dense]
  assert entries(plan)[conv].reason == f'rule 1 {weights!r}; first layer'
  plan = make_plan(params, [(weights, Binary())], layers=layers, keep=('first',))
  assert [entry.path for entry in plan.quantized] == [dense]
  assert entries(plan)[conv].reason == 'first layer: left float'


PARAMS = {
  'conv/kernel': jnp.ones((3, 3, 2, 4)),
  'dw/kernel': jnp.ones((3, 3, 1, 8)),
  'conv/bias': jnp.ones(4),
  'bn/scale': jnp.ones(4),
  'embed/embedding': jnp.ones((10, 4)),
  'fc/kernel': jnp.ones((8, 5)),
  'alpha': jnp.ones(4),
  'step': jnp.zeros((), jnp.int32),
}


def test_reasons_speak_of_quantizing():
  plan = make_plan(PARAMS, [('fc/.*', None), ('.*', Ternary('channel'))])
  assert {path: entry.reason for path, entry in entries(plan).items()} == {
    'conv/kernel': "rule 2 '.*'",
    'dw/kernel': "rule 2 '.*'; depthwise (or one input channel: pass layers=)",
    'conv/bias': 'bias: never quantized',
    'bn/scale': 'normalisation: never quantized',
    'embed/embedding': 'embedding table: never quantized',
    'fc/kernel': "rule 1 'fc/.*': float",
    'alpha': 'vector: never quantized',
    'step': 'int32: no weights',
  }
  text = str(plan)
  assert "Ternary(per='channel')  " in text and '4x3' in text and '8x3' in text
  assert '144 of 237 weights are quantized, at 2 bits; tables 384 bits' in text
  nothing = make_plan(PARAMS, [('fc/kernel', None)])
  assert 'nothing is quantized; the model has 237 weights' in str(nothing)
  assert entries(make_plan(PARAMS, [('embed.*', Binary())], protect=()))[
    'embed/embedding'
  ].quantizer


def test_abstract_params_and_quantizers_of_others():
  abstract = jax.eval_shape(lambda: PARAMS)
  assert make_plan(abstract, [('.*', Uniform())]) == make_plan(PARAMS, [('.*', Uniform())])

  @dataclasses.dataclass(frozen=True)
  class Halves(Quantizer):
    count, tabled = 2, 0

    def fit(self, w, layout, mask=None):
      return jnp.array([0.0, -0.5, 0.5])

  plan = make_plan({'w': jnp.ones((2, 2))}, [('w', Halves())])
  assert 'Halves()' in str(plan)
  found = fq.quantize.project(plan, {'w': jnp.array([[3.0, -1.0], [0.1, -0.1]])})
  np.testing.assert_array_equal(found['w'], [[0.5, -0.5], [0.5, -0.5]])


@dataclasses.dataclass(frozen=True)
class Odd(Interval):
  table: object = None

  def check(self, shape, layout):
    super().check(shape, layout)
    if shape[-1] % 2:
      raise ValueError(f'{shape[-1]} outputs are odd; make them even.')


@pytest.mark.parametrize(
  'rules, settings, message',
  [
    ([], {}, r"no rules; give at least one, e.g. \('.\*/kernel', Interval\(bits=4\)\)"),
    ({'.*': Binary()}, {}, r'ordered list of \(regex, quantizer\) pairs, not a dict'),
    ([('.*', Binary(), 'IO', 1)], {}, r'must be \(regex, quantizer\) or \(regex, quantizer, layout'),
    ([('kernel', Binary())], {}, "rule 1 'kernel' selects no parameter.*part of 'conv/kernel'"),
    ([('.*/bias', Binary())], {}, r"quantizes nothing: 'conv/bias' \(bias: never quantized\).*keep="),
    ([('fc/kernel', Unstructured(keep=0.5))], {}, "'fc/kernel'.*is no quantizer; give one"),
    ([('fc/kernel', Interval)], {}, "'fc/kernel'.*is no quantizer"),
    ([('fc/kernel', 4)], {}, "'fc/kernel'.*4 is no quantizer"),
    ([('fc/kernel', Odd(2))], {}, r"'fc/kernel' \[8, 5\] \(rule 1.*odd; .*\('fc/kernel', None\)"),
    ([('fc/kernel', Odd(2, table=np.ones(2)))], {}, 'cannot be hashed'),
    ([('.*kernel', Binary(), 'IO')], {}, "'conv/kernel' .*layout 'IO' names 2 axes"),
    ([('.*kernel', Binary())], {'layout': {4: 'HWIO'}}, r'\(regex, quantizer, .DHWIO'),
    ([('.*', Binary())], {'keep': 'first'}, "keep='first' must be a tuple"),
    ([('.*', Binary())], {'keep': ('last',)}, r"keep=\('last',\): .*pass layers=trace_layers"),
    ([('.*', Binary())], {'layers': {'fc/kernel': Layer(1, layout='OI')}},
     r"'fc/kernel' .*read as OI .*\(regex, quantizer, 'OI'\)"),
  ],
)  # fmt: skip
def test_make_plan_refuses(rules, settings, message):
  with pytest.raises(ValueError, match=message):
    make_plan(PARAMS, rules, **settings)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
  params = {'a': jnp.ones((2, 2)).at[1, 1].set(bad), 'b': jnp.ones((2, 2))}
  with pytest.raises(ValueError, match="'a' holds NaN or infinite weights; no level is nearest"):
    make_plan(params, [('.*', Binary())])
  make_plan(params, [('a', None), ('b', Binary())])
