"""Every structure's stored form gives the leaf back bit for bit, through the file, whatever the sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import sparsity as sp
from fqjax.runtime import codecs
from fqjax.sparsity.structures._base import _mask_of, codec_of
from tests.runtime.codecs.cases import same_bits
from tests.sparsity.structures import oracle

ELOG = sp.pattern_set('elog4+corner4')
WIDE = tuple(sum(1 << t for t in range(s, s + 4)) for s in (0, 7, 14, 21))  # of 25 taps
HALF = sp.Unstructured(keep=0.5)

# shape, layout: structures.
CASES = {
  'odd': ((3, 3, 5, 7), 'HWIO', [
    sp.Unstructured(keep=0.13), sp.NM(2, 5), sp.NM(3, 7, axis='O'), sp.Blocks(7, 1, keep=0.3),
    sp.Blocks(1, 5, keep=0.3), sp.Filters(keep=0.4), sp.Channels(keep=0.5), sp.Columns(keep=0.3),
    sp.BlockPunched(7, 5, keep=0.4), sp.Both(sp.Filters(keep=0.5), sp.Channels(keep=0.4)),
    sp.BlockMax(7), sp.BlockMax(4), sp.Darb((0, 1, 2, 3, 7, 6, 0)), sp.Bank(16, (0, 1, 2, 3, 16, 5, 0)),
    sp.Patterns(ELOG), sp.Patterns(ELOG, keep=0.3), sp.Patterns((1, 3, 511), keep=0.5),
  ]),
  'odd, OIHW': ((7, 5, 3, 3), 'OIHW', [sp.Patterns(ELOG, keep=0.3), sp.BlockMax(8), HALF]),
  'depthwise': ((3, 3, 1, 6), 'HWIO', [
    HALF, sp.Filters(keep=0.5), sp.Columns(keep=0.3), sp.Patterns(ELOG), sp.BlockMax(3),
    sp.NM(1, 3, axis='O'),
  ]),
  'grouped': ((3, 3, 4, 8), 'HWIO', [
    sp.Patterns(ELOG, keep=0.5, groups=2), sp.NM(2, 4), sp.BlockPunched(keep=0.4),
  ]),
  'dense': ((9, 14), 'IO', [
    HALF, sp.NM(1, 3), sp.NM(3, 7, axis='O'), sp.Blocks(2, 3, keep=0.2), sp.Filters(keep=0.3),
    sp.Channels(keep=0.3), sp.Both(sp.Filters(keep=0.5), sp.Columns(keep=0.5)), sp.BlockMax(2),
    sp.Darb((0, 1, 2, 3, 4, 5, 6) * 2), sp.Bank(4, (0, 1, 2, 3, 4, 0, 1) * 2),
  ]),
  'gates': ((9, 14), 'IO', [
    sp.Gates(sp.NM(1, 3), 2), sp.Gates(sp.Darb((0, 1, 2, 3, 4, 5, 6)), 2),
    sp.Gates((sp.Filters(keep=0.5), sp.Unstructured(count=9)), 2),
  ]),
  'gates, OI': ((12, 5), 'OI', [sp.Gates(sp.BlockMax(2), 3)]),
  'pointwise': ((1, 1, 6, 8), 'HWIO', [
    HALF, sp.NM(2, 3), sp.Blocks(4, 2, keep=0.5), sp.BlockPunched(4, 3, keep=0.5), sp.BlockMax(4),
  ]),
  'large kernels': ((5, 5, 3, 4), 'HWIO', [
    HALF, sp.Columns(keep=0.3), sp.Bank(5, (0, 1, 2, 5)), sp.Patterns(WIDE, size=25),
    sp.Patterns(WIDE, size=25, keep=0.5),
  ]),
  'attention': ((6, 3, 4), 'IOO', [sp.Filters(keep=0.5), sp.NM(1, 2)]),
  'one': ((1, 1), 'IO', [sp.Unstructured(keep=1.0), sp.Filters(keep=1.0), sp.BlockMax(1)]),
}  # fmt: skip
TABLE = [
  pytest.param(structure, shape, layout, id=f'{name}-{type(structure).__name__}{i}')
  for name, (shape, layout, structures) in CASES.items()
  for i, structure in enumerate(structures)
]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('structure', 'shape', 'layout'), TABLE)
def test_round_trip(structure, shape, layout, dtype):
  w = np.random.default_rng(0).standard_normal(shape).astype(jnp.dtype(dtype))
  mask = np.asarray(_mask_of(structure, w.astype(np.float32), layout))
  z = np.where(mask, w, np.zeros_like(w))
  assert 0 < np.count_nonzero(z) <= structure.kept(shape, layout)
  encoded = structure.encode(z, layout)
  decode = lambda e: structure.decode(e, layout, shape, None if dtype == 'float32' else z.dtype)
  assert same_bits(decode(encoded), z)
  gates = isinstance(structure, sp.Gates)
  parts = encoded if gates else (encoded,)
  files = [codec_of(part).to_bytes(part) for part in parts]
  read = tuple(codec_of(part).from_bytes(file) for part, file in zip(parts, files, strict=True))
  assert same_bits(decode(read if gates else read[0]), z)
  cost = structure.bits(z, layout)
  assert cost.total == 8 * sum(map(len, files))
  width = 8 * z.dtype.itemsize
  assert cost.values >= width * np.count_nonzero(z)


def test_each_structure_has_the_format_made_for_it():
  """Regular structures pay for their regular index, not for single places."""
  w = np.random.default_rng(0).standard_normal((3, 3, 16, 32)).astype(np.float32)
  expected = {
    sp.NM(2, 4): codecs.nm,
    sp.Blocks(4, 4, keep=0.3): codecs.blocks,
    sp.BlockPunched(keep=0.3): codecs.punched,
    sp.Columns(keep=0.3): codecs.slices,
    sp.BlockMax(16): codecs.darb,
    sp.BlockMax(12): codecs.bank,
    sp.Patterns(ELOG): codecs.pcnn,
    sp.Patterns(ELOG, keep=0.5): codecs.patterns,
  }
  for structure, codec in expected.items():
    z = np.where(np.asarray(_mask_of(structure, w, 'HWIO')), w, 0)
    assert codec_of(structure.encode(z, 'HWIO')) is codec, structure


def test_gates_cost_what_their_gates_cost_and_say_what_is_wrong():
  gates = sp.Gates((sp.NM(1, 2), sp.NM(2, 2)), 2)
  w = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4)  # IO: two gates of two units
  bits = gates.bits(w, 'IO', value_bits=8)
  assert (bits.values, bits.index) == ((4 + 8) * 8, 4 * 1 + 8 * 1)
  with pytest.raises(ValueError, match=r'4 weights of a IO leaf \[4, 4\] are outside Gates'):
    gates.encode(w, 'IO')
  z, _ = oracle.project(gates, jnp.asarray(w), 'IO')
  with pytest.raises(ValueError, match='1 gates are stored, .* has 2'):
    gates.decode(gates.encode(z, 'IO')[:1], 'IO', (4, 4))
  with pytest.raises(ValueError, match='3 outputs .* not 2 equal gates'):
    gates.encode(w[:, :3], 'IO')


def test_a_pooled_leaf_stores_what_its_plan_left():
  params = {'a': jnp.arange(1.0, 65.0).reshape(8, 8), 'b': jnp.arange(0.1, 6.5, 0.1).reshape(8, 8)}
  plan = sp.make_plan(params, [('.*', sp.Pooled(keep=0.5))])
  pruned, masks = sp.project(plan, params)
  assert int(masks['a'].sum()) != int(masks['b'].sum())
  for path, z in pruned.items():
    structure = plan.pruned[0].structure
    z = np.array(z)
    encoded = structure.encode(z, 'IO')
    assert same_bits(structure.decode(encoded, 'IO', (8, 8)), z)
    assert len(encoded.values) >= int(masks[path].sum())
  z[0, 0] = -0.0
  assert same_bits(structure.decode(structure.encode(z, 'IO'), 'IO', (8, 8)), z)
