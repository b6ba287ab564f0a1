"""Bits per layer: what a layer loses, and the best choice under a budget against all choices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.quantize import (
  Binary,
  Interval,
  Uniform,
  allocate_bits,
  loss_increases,
  make_plan,
  project,
  projection_errors,
  sizes,
)

BITS = (2, 3, 4, 8)
RNG = np.random.default_rng(0)
PARAMS = {
  'a': jnp.asarray(RNG.normal(size=(16, 32)), jnp.float32),
  'b': jnp.asarray(0.1 * RNG.normal(size=(32, 8)), jnp.float32),
  'c': jnp.asarray(RNG.normal(size=(8, 32)), jnp.float32),
  'bias': jnp.ones(8),
}
PLAN = make_plan(PARAMS, [('[abc]', Uniform(8, 'layer', clip='max'))])


def test_errors_are_those_of_the_projection():
  errors = projection_errors(PLAN, PARAMS, BITS)
  assert list(errors) == ['a', 'b', 'c']
  for i, bits in enumerate(BITS):
    plan = make_plan(PARAMS, [('[abc]', Uniform(bits, 'layer'))])
    z = project(plan, PARAMS)
    for path, error in errors.items():
      want = np.sum(np.square(np.float64(PARAMS[path]) - np.float64(z[path])))
      assert error[i] == pytest.approx(want, rel=1e-4)
  masks = {'a': jnp.asarray(RNG.random((16, 32)) < 0.5), 'b': None, 'c': None, 'bias': None}
  twice = {path: jnp.full_like(w, 2) for path, w in PARAMS.items()}
  masked = projection_errors(PLAN, PARAMS, BITS, masks, saliency=twice)
  np.testing.assert_allclose(masked['b'], 2 * errors['b'], rtol=1e-5)
  assert np.all(masked['a'] < 2 * errors['a'])


def test_loss_increases_quantize_one_layer_at_a_time():
  def loss(p):
    assert sum(bool(np.any(p[path] != PARAMS[path])) for path in 'abc') <= 1
    return sum(float(jnp.sum(jnp.square(p[path] - PARAMS[path]))) for path in 'abc')

  found = loss_increases(PLAN, PARAMS, (2, 4), loss)
  want = projection_errors(PLAN, PARAMS, (2, 4))
  for path, rises in found.items():
    np.testing.assert_allclose(rises, want[path], rtol=1e-4)


@pytest.mark.parametrize('budget', [420, 700, 900, 1500])
def test_no_other_choice_under_the_budget_is_much_better(budget):
  errors = projection_errors(PLAN, PARAMS, BITS)
  chosen = allocate_bits(PLAN, PARAMS, BITS, budget, losses=errors)
  picked = {entry.path: entry.quantizer.bits for entry in chosen.quantized}
  assert sizes(chosen, PARAMS).bytes <= budget

  def total(choice):
    return sum(errors[path][BITS.index(bits)] for path, bits in choice.items())

  # Fewest bytes each layer can be said to take: what no choice under the budget can beat.
  least = np.inf
  for bits in itertools.product(BITS, repeat=3):
    choice = dict(zip('abc', bits, strict=True))
    plan = make_plan(PARAMS, [(path, Uniform(b, 'layer')) for path, b in choice.items()])
    if budget == 900 and sizes(plan, PARAMS).bytes <= budget:
      least = min(least, total(choice))
  if budget == 900:
    assert least <= total(picked) <= 1.5 * least
  assert f'{budget:,.6g} bytes' in chosen.notes[-1]


def test_sensitive_layers_get_more():
  loud = {'a': [0, 0, 0, 0], 'b': [9, 4, 1, 0], 'c': [0, 0, 0, 0]}
  chosen = allocate_bits(PLAN, PARAMS, BITS, 680, losses=loud)
  picked = {entry.path: entry.quantizer.bits for entry in chosen.quantized}
  assert picked == {'a': 2, 'b': 8, 'c': 2}
  assert chosen.entries[1].reason.endswith('within the budget')


def test_a_latency_budget_and_quantizers_as_candidates():
  candidates = (Binary(), Interval(3), Uniform(8, 'layer'))
  seconds = {Binary(): 1.0, Interval(3): 4.0, Uniform(8, 'layer'): 2.0}
  chosen = allocate_bits(PLAN, PARAMS, candidates, 4.0, cost=lambda entry, q: seconds[q])
  picked = {entry.path: entry.quantizer for entry in chosen.quantized}
  # One second is left over the binary network; the large weights of `a` need it most.
  assert sorted(map(str, picked.values()))[:2] == ["Binary(per='layer')"] * 2
  assert picked['a'] == Uniform(8, 'layer') or picked['c'] == Uniform(8, 'layer')
  assert picked['b'] == Binary()
  assert '4 of 4 of the cost given' in chosen.notes[-1]


def test_a_latency_may_depend_on_the_layer():
  """Measured times need not grow with the bytes: where 3 bits are slower than 4, nobody gets them."""
  bits = (2, 3, 4, 8)
  seconds = {'a': (5.0, 9.0, 6.0, 8.0), 'b': (1.0, 3.0, 1.5, 2.0), 'c': (5.0, 9.0, 6.0, 8.0)}
  cost = lambda entry, q: seconds[entry.path][bits.index(q.bits)]
  errors = projection_errors(PLAN, PARAMS, bits)

  def total(choice):
    return sum(errors[path][i] for path, i in zip('abc', choice, strict=True))

  for budget in (11.0, 13.0, 15.0, 18.0):
    chosen = allocate_bits(PLAN, PARAMS, bits, budget, losses=errors, cost=cost)
    picked = [bits.index(entry.quantizer.bits) for entry in chosen.quantized]
    spent = sum(seconds[path][i] for path, i in zip('abc', picked, strict=True))
    assert spent <= budget and 1 not in picked
    allowed = [
      choice
      for choice in itertools.product(range(4), repeat=3)
      if sum(seconds[path][i] for path, i in zip('abc', choice, strict=True)) <= budget
    ]
    # Errors fall steeply with bits, so that the best choice is far from the second best.
    assert total(picked) <= 1.001 * min(map(total, allowed))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: allocate_bits(PLAN, PARAMS, BITS, 10), r'budget=10: .*it takes .* bytes'),
    (lambda: allocate_bits(PLAN, PARAMS, BITS, 900, losses={'a': [1, 2, 3, 4]}),
     "losses are of another plan or other candidates: 'b' needs 4"),
    (lambda: allocate_bits(PLAN, PARAMS, (), 900), 'no candidates; give bits'),
    (lambda: allocate_bits(PLAN, PARAMS, (9,), 900), "'a': 9 bits: bits=9 must be 2 to 8"),
    (lambda: allocate_bits(make_plan(PARAMS, [('a', Binary())]), PARAMS, (2,), 900),
     "'a': Binary.* has no bits to choose"),
    (lambda: allocate_bits(make_plan(PARAMS, [('a', None)]), PARAMS, (2,), 900),
     'the plan quantizes nothing'),
    (lambda: loss_increases(PLAN, PARAMS, (2,), lambda p: np.nan), "not finite with 'a' quantized"),
    (lambda: projection_errors(PLAN, PARAMS, (2,), saliency={'a': PARAMS['a']}),
     "saliency has nothing for 'b'"),
  ],
)  # fmt: skip
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()
