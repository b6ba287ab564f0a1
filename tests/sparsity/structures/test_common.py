"""What every structure promises, as a table: adding a structure is adding a row."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from fqjax import sparsity as sp

SHAPE = (3, 3, 8, 16)  # HWIO
EXPONENTS = tuple([0, 1, 2, 3] * 4)
ELOG = sp.pattern_set('elog4+corner4')
TABLE = {
  'unstructured': sp.Unstructured(keep=0.2),
  'count': sp.Unstructured(count=100),
  'nm': sp.NM(2, 4),
  'nm_outputs': sp.NM(1, 8, axis='O'),
  'blocks': sp.Blocks(2, 4, keep=0.3),
  'filters': sp.Filters(keep=0.4),
  'channels': sp.Channels(keep=0.5),
  'columns': sp.Columns(keep=0.3),
  'punched': sp.BlockPunched(keep=0.4),
  'punched_l1l2': sp.BlockPunched(8, 4, keep=0.4, score='l1l2'),
  'both': sp.Both(sp.Filters(keep=0.5), sp.Columns(keep=0.3)),
  'block_max': sp.BlockMax(7),
  'darb': sp.Darb(EXPONENTS),
  'bank': sp.Bank(16, tuple(range(16))),
  'pcnn': sp.Patterns(ELOG),
  'pcnn_large': sp.Patterns(sp.pattern_set('any4')),
  'pconv': sp.Patterns(ELOG, keep=0.3, min_per_output=1, min_per_input=2),
  'grouped': sp.Patterns(ELOG, keep=0.3, groups=4),
}
each = pytest.mark.parametrize('structure', TABLE.values(), ids=TABLE)


def _weights(*shape):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _project(structure, w, layout, saliency=None, frozen=None):
  return structure.project(w, layout, saliency=saliency, frozen=frozen)


@each
def test_projection(structure):
  w = _weights(*SHAPE)
  z, mask = _project(structure, w, 'HWIO')
  assert mask.dtype == bool and mask.shape == w.shape and z.dtype == w.dtype
  np.testing.assert_array_equal(z, np.where(mask, w, 0))
  assert mask.sum() == structure.kept(SHAPE, 'HWIO')
  again, _ = _project(structure, z, 'HWIO')
  np.testing.assert_array_equal(again, z)
  # A scale changes nothing; a second call and an equal structure compile nothing.
  programs = _project._cache_size()
  _, scaled = _project(dataclasses.replace(structure), -4 * w, 'HWIO')
  np.testing.assert_array_equal(scaled, mask)
  assert _project._cache_size() == programs
  assert structure == dataclasses.replace(structure) and hash(structure) is not None


@each
def test_saliency_ranks_and_the_weights_stay(structure):
  w, other = _weights(*SHAPE), _weights(16, 8, 3, 3).transpose(2, 3, 1, 0)
  z, mask = _project(structure, w, 'HWIO', jnp.square(other))
  np.testing.assert_array_equal(z, np.where(mask, w, 0))
  np.testing.assert_array_equal(mask, _project(structure, other, 'HWIO')[1])


@each
def test_frozen_weights_do_not_come_back(structure):
  w = _weights(*SHAPE)
  frozen = jnp.asarray(np.random.default_rng(1).random(SHAPE) < 0.5)
  z, mask = _project(structure, w, 'HWIO', None, frozen)
  assert not (mask & frozen).any() and not z[frozen].any()
  # As if they were zero, which they are on a ladder.
  same, _ = _project(structure, jnp.where(frozen, 0, w), 'HWIO', None, frozen)
  np.testing.assert_array_equal(z, same)
  # Nothing left to keep is a mask too.
  assert not _project(structure, w, 'HWIO', None, jnp.ones(SHAPE, bool))[1].any()


@each
def test_equal_weights_have_a_full_mask(structure):
  kept = structure.kept(SHAPE, 'HWIO')
  for value in (0.0, 1.0):
    _, mask = _project(structure, jnp.full(SHAPE, value), 'HWIO')
    assert mask.sum() == kept
  # Of equal scores the lowest index lives: no mask holds a larger one in its place.
  view = sp.to_kernels(mask, 'HWIO')
  assert view[0].any() or isinstance(structure, sp.Bank)  # whose first row keeps none


@each
def test_the_layout_of_storage_does_not_matter(structure):
  w = jnp.round(_weights(*SHAPE) * 4) / 4  # many ties
  _, mask = _project(structure, w, 'HWIO')
  _, there = _project(structure, w.transpose(3, 2, 0, 1), 'OIHW')
  np.testing.assert_array_equal(there, mask.transpose(3, 2, 0, 1))


@each
def test_gradient_is_masked_and_vmap_is_a_loop(structure):
  w = jnp.stack([_weights(*SHAPE), _weights(16, 8, 3, 3).transpose(2, 3, 1, 0)])
  g = _weights(2, *SHAPE)[::-1]

  @jax.jit
  def run(w):
    (_, masks), back = jax.vjp(
      lambda w: jax.vmap(lambda x: structure.project(x, 'HWIO'))(w), w, has_aux=False
    )
    zeros = np.zeros(masks.shape, jax.dtypes.float0)
    return masks, back((g, zeros))[0]

  masks, grad = run(w)
  for i in range(2):
    np.testing.assert_array_equal(masks[i], _project(structure, w[i], 'HWIO')[1])
  np.testing.assert_array_equal(grad, np.where(masks, g, 0))


@each
@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_types(structure, dtype, x64):
  w = _weights(*SHAPE)
  if dtype == 'float64':
    # Differences that float32 does not see decide.
    w = w.astype(dtype) * (1 + 1e-9 * _weights(16, 8, 3, 3).transpose(2, 3, 1, 0).astype(dtype))
  z, mask = _project(structure, w.astype(dtype), 'HWIO')
  assert z.dtype == dtype and mask.sum() == structure.kept(SHAPE, 'HWIO')


@each
@pytest.mark.parametrize('layout', ['HWIO', 'OIHW'])
def test_stored_form_comes_back_bit_for_bit(structure, layout):
  w = _weights(*SHAPE) if layout == 'HWIO' else _weights(16, 8, 3, 3)
  z = np.array(_project(structure, w, layout)[0])
  z.flat[np.flatnonzero(z)[::7]] = 0.0  # kept weights may be zero
  encoded = structure.encode(z, layout)
  found = structure.decode(encoded, layout, z.shape)
  assert found.dtype == z.dtype
  np.testing.assert_array_equal(found, z)
  half = z.astype(jnp.bfloat16)
  found = structure.decode(structure.encode(half, layout), layout, z.shape, half.dtype)
  assert found.dtype == half.dtype and (found == half).all()
  with pytest.raises(
    ValueError, match=r'\d+ weights of a \w+ leaf .* are outside .* project first'
  ):
    structure.encode(w, layout)
  with pytest.raises(ValueError, match='weights are stored, a leaf'):
    structure.decode(encoded, layout, (3, 3, 8, 8))

  bits = structure.bits(w, layout)  # of the projection
  assert bits.total == 8 * len(_format(structure, w, layout))
  fewer = structure.bits(w, layout, value_bits=8)
  assert fewer.index == bits.index and fewer.values < bits.values
  if not isinstance(structure, sp.Unstructured):
    assert bits.values == 32 * structure.kept(w.shape, layout)  # nothing is stored that is not kept
  else:
    assert bits.total < 32 * w.size / 2


def _format(structure, w, layout):
  encoded = structure.encode(_project(structure, w, layout)[0], layout)
  return sys.modules[type(encoded).__module__].to_bytes(encoded)


@each
@pytest.mark.full
def test_eight_devices_and_one_agree(structure):
  w = jnp.round(_weights(*SHAPE) * 4) / 4  # many ties
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  there = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, None, None, 'x')))
  assert len(there.sharding.device_set) == 8
  for a, b in zip(_project(structure, there, 'HWIO'), _project(structure, w, 'HWIO'), strict=True):
    np.testing.assert_array_equal(a, b)


@each
def test_memory_stays_near_the_weights(structure):
  shape = (3, 3, 64, 256)
  if isinstance(structure, sp.Darb | sp.Bank):
    field = dataclasses.fields(structure)[-1].name
    structure = dataclasses.replace(structure, **{field: getattr(structure, field) * 16})
  compiled = _project.lower(structure, jax.ShapeDtypeStruct(shape, jnp.float32), 'HWIO').compile()
  # Scores, their transpose, keys, masks: some copies, never one per pattern or exponent.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * np.prod(shape)


@pytest.mark.parametrize(
  ('structure', 'nearest', 'up'),
  [
    (sp.Unstructured(keep=0.07), 2, 3),  # 2.24 of 32
    (sp.Pooled(keep=0.07), 2, 3),
    (sp.Filters(keep=0.3), 2 * 4, 3 * 4),  # 2.4 of 8
    (sp.Channels(keep=0.3), 1 * 8, 2 * 8),  # 1.2 of 4
    (sp.Columns(keep=0.3), 1 * 8, 2 * 8),
    (sp.Blocks(2, 2, keep=0.3), 2 * 4, 3 * 4),  # 2.4 of 8
    (sp.BlockPunched(2, 2, keep=0.3), 2 * 4, 3 * 4),
    (sp.Patterns((1,), size=1, keep=0.07), 2, 3),
  ],
  ids=lambda x: type(x).__name__,
)
def test_counts_are_rounded_as_said(structure, nearest, up):
  w = _weights(4, 8)
  for rounding, count in (('nearest', nearest), ('up', up)):
    rounded = dataclasses.replace(structure, rounding=rounding)
    assert rounded.kept((4, 8), 'IO') == count == int(_project(rounded, w, 'IO')[1].sum())
  with pytest.raises(ValueError, match="rounding='down' must be 'nearest' or 'up'"):
    dataclasses.replace(structure, rounding='down')


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: sp.Unstructured(), 'keep= or count=, exactly one'),
    (lambda: sp.Unstructured(keep=0.5, count=3), 'exactly one'),
    (lambda: sp.Unstructured(keep=0.0), r'keep=0.0 must be in \(0, 1\]'),
    (lambda: sp.NM(5, 4), 'n must be 1..m'),
    (lambda: sp.NM(1, 4, axis='M'), "'I' or 'O'"),
    (lambda: sp.Filters(keep=2.0), 'keep=2.0'),
    (lambda: sp.Blocks(1, 4, keep=0.5, rounding='off'), "'nearest' or 'up'"),
    (lambda: sp.BlockPunched(score='l1'), "'l2' or 'l1l2'"),
    (lambda: sp.Both(sp.Columns(0.5), sp.Filters(0.5)), 'a Filters and a Columns'),
    (lambda: sp.Both(sp.Filters(0.5), sp.Columns(0.5), rounds=0), 'at least 1'),
    (lambda: sp.BlockMax(0), 'at least 1'),
    (lambda: sp.Darb((1, -1)), r'0\.\.7'),
    (lambda: sp.Darb((1, 8)), r'0\.\.7'),
    (lambda: sp.Bank(4, (5, 1)), r'0\.\.4'),
    (lambda: sp.Bank(4, (0, 0)), 'not all 0'),
    (lambda: sp.Patterns((512,)), r'1\.\.2\*\*9-1.*512'),
    (lambda: sp.Patterns((27, 27)), 'different integers'),
    (lambda: sp.Patterns(()), 'different integers'),
    (lambda: sp.Patterns(ELOG, groups=0), 'groups 1 or more'),
  ],
)
def test_a_structure_that_makes_no_sense_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ('structure', 'shape', 'layout', 'message'),
  [
    (sp.Unstructured(count=100), (3, 3), 'IO', r'count=100 of a leaf \[3, 3\] must be 1..9'),
    (sp.Unstructured(keep=0.5), (3, 3), 'IOI', 'names 3 axes, the leaf has 2'),
    (sp.NM(2, 4), (3, 3, 3, 16), 'HWIO', '3 inputs .* do not divide by 4; choose an m'),
    (sp.NM(2, 4, axis='O'), (8, 6), 'IO', '6 outputs'),
    (sp.Blocks(4, 4, keep=0.5), (8, 6), 'IO', '6 outputs .* blocks of 4; choose a size'),
    (sp.BlockPunched(keep=0.5), (6, 8), 'IO', '6 inputs .* blocks of 4'),
    (sp.Darb((0, 1)), (4, 3), 'IO', '2 exponents for the 3 outputs'),
    (sp.Bank(2, (0, 1)), (4, 3), 'IO', '2 counts for the 3 outputs'),
    (sp.Patterns(ELOG), (8, 4), 'IO', '9 taps do not fit the 1-tap kernels .* leave it dense'),
    (sp.Patterns(ELOG), (5, 5, 3, 4), 'HWIO', '25-tap kernels .* use masks of that size'),
    (sp.Patterns(ELOG, keep=0.5), (3, 3, 1, 8), 'HWIO', 'would delete outputs .* use keep=1'),
    (sp.Patterns(ELOG, groups=3), (3, 3, 2, 8), 'HWIO', '8 outputs .* 3 groups'),
    (
      sp.Patterns(ELOG, keep=0.2, min_per_output=1, min_per_input=1),
      (3, 3, 4, 4),
      'HWIO',
      'leaves 3 of 16 kernels .* too few .* raise keep',
    ),
    (sp.Patterns(ELOG, keep=0.9, min_per_output=5), (3, 3, 4, 4), 'HWIO', 'lower the minima'),
  ],
)
def test_a_leaf_that_does_not_fit_is_refused(structure, shape, layout, message):
  for call in (
    lambda: structure.check(shape, layout),
    lambda: structure.kept(shape, layout),
    lambda: structure.project(jnp.zeros(shape), layout),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_saliency_and_frozen_must_have_the_shape_of_the_weights():
  for name in ('saliency', 'frozen'):
    with pytest.raises(ValueError, match=rf'{name} \[4\] must have the shape .* \[2, 2\]'):
      sp.Filters(0.5).project(jnp.ones((2, 2)), 'IO', **{name: jnp.ones(4, bool)})
