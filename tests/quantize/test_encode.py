"""Indices and codebooks are the weights to the bit; sizes count every bit, LeNet-5's as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.quantize import Binary, Interval, encode, fit, make_plan, project, sizes
from fqjax.runtime import codecs
from fqjax.sparsity import cheapest
from tests.quantize.test_levels import ALL, LAYOUT, SHAPE, weights


@ALL
def test_decode_is_the_projection_to_the_bit(quantizer):
  mask = np.random.default_rng(1).random(SHAPE) < 0.5
  for dtype in (jnp.float32, jnp.bfloat16):
    params = {'w': jnp.asarray(weights(), dtype)}
    plan = make_plan(params, [('w', quantizer, LAYOUT)])
    masks = {'w': jnp.asarray(mask)}
    coded = encode(plan, params, masks)['w']
    want = np.asarray(project(plan, params, masks)['w'])
    assert coded.indices.dtype == np.uint8 and coded.decode().dtype == want.dtype
    assert coded.decode().tobytes() == want.tobytes()
    assert not np.any(coded.indices[~mask])


def test_several_output_axes():
  params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), jnp.float32)}
  plan = make_plan(params, [('w', Binary('channel'), 'IOO')])
  coded = encode(plan, params)['w']
  assert coded.codebook.shape == (6, 3)
  np.testing.assert_array_equal(coded.decode(), project(plan, params)['w'])
  q = np.abs(params['w']).mean(0)
  np.testing.assert_allclose(np.abs(coded.decode()), np.broadcast_to(q, (4, 2, 3)), rtol=1e-6)


def test_weights_mapped_before_keep_their_codebooks():
  params = {'w': jnp.asarray(weights())}
  plan = make_plan(params, [('w', Interval(3), LAYOUT)])
  books = fit(plan, params, exact=True)
  mapped = project(plan, params, codebooks=books)
  coded = encode(plan, mapped, codebooks=books)['w']
  np.testing.assert_array_equal(coded.decode(), mapped['w'])
  np.testing.assert_array_equal(coded.codebook, books['w'])


def test_dense_and_sparse_forms_count_a_code_for_zero():
  """All alive: 2 bits a weight. One of them dead: five values, so 3 bits, or its place said apart."""
  w = np.resize(np.float32([1, -1, 2, -2]), (64, 64))
  params = {'w': jnp.asarray(w)}
  plan = make_plan(params, [('w', Interval(2))])
  full = sizes(plan, params)
  assert full.bits['w'].values == 2 * 64 * 64 and full.kept['w'] == 64 * 64
  header = codecs.dense.bits(codecs.dense.encode(np.zeros((64, 64), np.uint8)), 2).tables
  assert full.bits['w'].tables == header + 32
  masks = {'w': jnp.ones((64, 64), bool).at[3, 5].set(False)}
  one_dead = sizes(plan, params, masks)
  assert one_dead.kept['w'] == 64 * 64 - 1
  # Cheapest: a bit per weight that says which are alive, and 2 bits for those; or 3 bits for all.
  least = min(3 * 64 * 64, 64 * 64 + 2 * (64 * 64 - 1))
  assert least <= one_dead.bits['w'].total <= least + 400
  assert full.bytes == -(-full.bits['w'].total // 8)
  stored = cheapest(np.asarray(encode(plan, params, masks)['w'].indices), 'IO', 2, 3)
  assert stored.bits(2, 3).total + 32 == one_dead.bits['w'].total


def test_zero_bits_of_cheapest_are_for_forms_that_store_zeros():
  dense = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
  assert cheapest(dense, 'IO', 4, 8).bits(4, 8).values == 16 * 4
  dense[0, 0] = 0
  stored = cheapest(dense, 'IO', 4, 8)
  if stored.format == 'dense':
    assert stored.bits(4, 8).values == 16 * 8
  else:
    assert stored.bits(4, 8).values == 15 * 4


LENET = {'conv1': (25, 20), 'conv2': (500, 50), 'fc1': (800, 500), 'fc2': (500, 10)}
DENSITY = {'conv1': 0.2, 'conv2': 0.08, 'fc1': 0.009, 'fc2': 0.07}


def lenet(quantizers):
  rng = np.random.default_rng(0)
  params, masks = {}, {}
  for name, shape in LENET.items():
    kept = round(DENSITY[name] * np.prod(shape))
    mask = np.zeros(np.prod(shape), bool)
    mask[rng.permutation(mask.size)[:kept]] = True
    params[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    masks[name] = jnp.asarray(mask.reshape(shape))
  return make_plan(params, [(name, q) for name, q in quantizers.items()]), params, masks


@pytest.mark.full
def test_lenet_at_published_densities():
  plan, params, masks = lenet(
    {'conv1': Interval(3), 'conv2': Interval(3), 'fc1': Interval(2), 'fc2': Interval(2)}
  )
  cost = sizes(plan, params, masks)
  data = sum(b.values for b in cost.bits.values()) / 8
  # 3 bits in convolutions, 2 in the others; fillers of gap codes add to it, and their code.
  assert 1775 <= data <= 1775 * 1.6
  # 7,572 bytes without headers and scales, and without a code for the fillers.
  assert 7572 < cost.bytes <= 7572 * 1.12


def test_binarized_lenet_is_a_bit_per_weight():
  plan, params, _ = lenet(dict.fromkeys(LENET, Binary()))
  cost = sizes(plan, params)
  assert sum(b.values for b in cost.bits.values()) / 8 == 53_812.5
  assert cost.bytes <= 53_813 + 4 * 24 + 4
  assert 31.9 < cost.compression_bytes < 32


def test_float_leaves_and_their_masks_are_counted():
  params = {'w': jnp.ones((32, 32)), 'v': jnp.ones((32, 32)), 'bias': jnp.ones(8)}
  plan = make_plan(params, [('w', Binary())])
  plain = sizes(plan, params)
  assert plain.bits['v'].values == 32 * 1024 and plain.bits['bias'].values == 256
  masks = {'w': None, 'v': jnp.zeros((32, 32), bool).at[0].set(True), 'bias': None}
  pruned = sizes(plan, params, masks)
  assert pruned.kept['v'] == 32 and pruned.bits['v'].values == 32 * 32
  assert plain.kept == {'w': 1024, 'v': 1024, 'bias': 8}


def test_what_another_plan_or_model_gives_is_refused():
  params = {'w': jnp.ones((4, 4))}
  plan = make_plan(params, [('w', Interval(2))])
  with pytest.raises(ValueError, match=r"'w': a codebook \[9\]"):
    encode(plan, params, codebooks={'w': jnp.ones(9)})
  with pytest.raises(ValueError, match='the plan is of another model'):
    sizes(plan, {'v': jnp.ones((4, 4))})
  bad = jax.tree.map(lambda w: w.at[0, 0].set(jnp.inf), params)
  with pytest.raises(ValueError, match="'w' holds NaN or infinite weights"):
    encode(plan, bad)
