"""Purification against loops over channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import purify, remove_unused


def _by_hand(w, mask, sides, empty=8 / 9, weak=0.05):
  w = np.where(mask, w, 0).astype(np.float64)
  taps = w.shape[0] * w.shape[1]
  out = mask.copy()
  for axis, side in ((2, 'I'), (3, 'O')):
    if side not in sides:
      continue
    parts = np.moveaxis(w, axis, 0)
    norms = [np.sqrt((part**2).sum()) for part in parts]
    median = np.median([norm for norm in norms if norm > 0])
    for c, part in enumerate(parts):
      bare = sum(not part[r, k].any() for r in range(w.shape[0]) for k in range(w.shape[1]))
      if bare / taps >= empty - 1e-9 and norms[c] <= weak * median and c != np.argmax(norms):
        np.moveaxis(out, axis, 0)[c] = False
  return out


@pytest.mark.parametrize('sides', ['I', 'O', 'IO'])
def test_channels_that_are_almost_empty_and_weak_go(sides):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 3, 8, 12)).astype(np.float32)
  mask = rng.random(w.shape) < 0.8
  w[:, :, 1] *= np.eye(9)[4].reshape(3, 3, 1) * 0.01  # one tap, weak: goes
  w[:, :, 2] *= np.eye(9)[4].reshape(3, 3, 1)  # one tap, strong
  w[:, :, 3] *= 0.001  # weak, nine taps
  w[:, :, 4] *= (np.arange(9) < 2).reshape(3, 3, 1) * 0.001  # two taps
  mask[:, :, 5] = False  # empty already
  mask[..., 7] &= (np.arange(9) == 3).reshape(3, 3, 1)
  w[..., 7] *= 0.02
  want = _by_hand(w, mask, sides)
  got = jax.jit(purify, static_argnames='sides')({'w': w}, {'w': mask}, sides=sides)['w']
  np.testing.assert_array_equal(got, want)
  gone = {'I': (2, [1, 5]), 'O': (3, [7])}
  for side in sides:
    axis, channels = gone[side]
    alive = np.asarray(got).any(tuple({0, 1, 2, 3} - {axis}))
    np.testing.assert_array_equal(np.flatnonzero(~alive), channels)


def test_what_is_purified_leaves_the_network():
  """Almost empty channels go from the masks, and with them the filters that made them."""
  rng = np.random.default_rng(0)
  params = {name: rng.normal(size=(3, 3, 6, 6)).astype(np.float32) for name in 'abc'}
  masks = {name: np.ones((3, 3, 6, 6), bool) for name in 'abc'}
  masks['b'][:, :, 2] = masks['c'][..., 4] = (
    False  # all but one tap of channel 2 of b, filter 4 of c
  )
  masks['b'][1, 1, 2] = True
  params['b'][1, 1, 2] *= 0.01
  params = {name: np.where(masks[name], w, 0) for name, w in params.items()}

  def apply(p, x):
    for name in 'abc':
      x = jax.lax.conv_general_dilated(
        x, p[name], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
    return x

  x = jnp.ones((1, 8, 8, 6))
  assert remove_unused(apply, params, x).report.sizes == (3 * 324, 3 * 324)
  cleaner = purify(params, masks)
  small = remove_unused(apply, jax.tree.map(lambda w, m: np.where(m, w, 0), params, cleaner), x)
  assert [w.shape for w in small.variables.values()] == [(3, 3, 6, 5), (3, 3, 5, 6), (3, 3, 6, 6)]
  assert {k: m.shape for k, m in small.report.slice(cleaner).items()} == {
    k: w.shape for k, w in small.variables.items()
  }


def test_thresholds_and_layouts():
  w = jnp.ones((4, 2, 3, 3)).at[:, 1, :2].set(0).at[:, 1, 2, 1:].set(0)  # OIHW, one tap left
  masks = {'conv': w != 0}
  keep = lambda **options: np.asarray(
    purify({'conv': w}, masks, {4: 'OIHW'}, **options)['conv'].any((0, 2, 3))
  )
  np.testing.assert_array_equal(keep(), [True, True])  # a ninth of the energy: norm 1/3
  np.testing.assert_array_equal(keep(weak=0.5), [True, False])
  np.testing.assert_array_equal(keep(weak=0.5, empty=1), [True, True])


def test_what_has_no_mask_or_one_tap_stays():
  params = {'conv': jnp.zeros((3, 3, 2, 2)), 'fc': jnp.ones((4, 4)), 'bias': jnp.ones(4)}
  masks = {'conv': None, 'fc': jnp.eye(4, dtype=bool)}
  got = purify(params, masks)
  assert got['conv'] is None and (got['fc'] == masks['fc']).all()
  depthwise = jnp.zeros((3, 3, 1, 4)).at[0, 0].set(1e-3)
  got = purify({'w': depthwise}, {'w': depthwise != 0})['w']
  assert got.any((0, 1, 2)).all()  # equally strong, all of them
  got = purify({'w': depthwise}, {'w': depthwise != 0}, weak=1)['w']
  assert got.any((0, 1, 2)).tolist() == [True, False, False, False]  # one is left
  empty = purify({'w': depthwise * 0}, {'w': depthwise != 0})['w']
  assert (empty == (depthwise != 0)).all()


def test_errors():
  w = jnp.ones((3, 3, 2, 2))
  with pytest.raises(ValueError, match='0 < empty <= 1'):
    purify({'w': w}, {'w': w != 0}, empty=0)
  with pytest.raises(ValueError, match="sides are 'I', 'O' or 'IO'"):
    purify({'w': w}, {'w': w != 0}, sides='OX')
  with pytest.raises(ValueError, match=r'v: a mask \[3, 3, 2, 2\], but no such weights'):
    purify({'w': w}, {'v': w != 0})
