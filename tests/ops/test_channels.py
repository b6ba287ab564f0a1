"""Published subsets and vectors digit by digit; statistics against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.ops import (
  channel_subset,
  finalize_statistics,
  init_statistics,
  list_channel_subsets,
  merge_statistics,
  released_statistics,
  select_channels,
  update_statistics,
  within_image_std,
)


def _corner(indices):
  """Largest (u, v) box that holds the row-major 8x8 indices."""
  return max(i // 8 for i in indices), max(i % 8 for i in indices)


@pytest.mark.parametrize('name', list_channel_subsets())
def test_subsets_have_their_size_order_and_one_chroma(name):
  channels = channel_subset(name)
  n = 192 if name == 'all' else int(name.lstrip('squaretrianglelearned'))
  assert len(channels) == n == len(set(channels))
  assert list(channels) == sorted(channels)
  cb = [c - 64 for c in channels if 64 <= c < 128]
  assert cb == [c - 128 for c in channels if c >= 128]


def test_squares_are_corners():
  y = lambda name: [c for c in channel_subset(name) if c < 64]
  assert y('square24') == [8 * u + v for u in range(4) for v in range(4)]
  assert _corner(y('square6')) == (1, 1)
  # The pattern's rows, u by u: 48 is 6 6 6 6 4 4; 64 is 7 7 6 6 6 6 6; 32 is 5 5 5 4 3.
  rows = lambda name: np.bincount([c // 8 for c in y(name)]).tolist()
  assert rows('square32') == [5, 5, 5, 4, 3]
  assert rows('square48') == [6, 6, 6, 6, 4, 4]
  assert rows('square64') == [7, 7, 6, 6, 6, 6, 6]


def test_triangles_and_the_learned_subset():
  rows = lambda name: np.bincount([c // 8 for c in channel_subset(name) if c < 64]).tolist()
  assert rows('triangle12') == [3, 2, 1]
  assert rows('triangle24') == [5, 4, 2, 1]
  assert rows('triangle48') == [7, 6, 5, 4, 3, 2, 1]
  assert rows('triangle64') == [8, 7, 6, 5, 4, 3, 1]
  zigzag_rank = {0: 0, 1: 1, 8: 2, 3: 6, 24: 9}  # first column and row of the zig-zag table
  chroma = [c - 64 for c in channel_subset('learned24') if 64 <= c < 128]
  assert sorted(zigzag_rank[c] for c in chroma) == [0, 1, 2, 6, 9]


def test_numbers_mean_squares_and_all():
  assert channel_subset(24) == channel_subset('square24')
  assert channel_subset(192) == channel_subset('all') == tuple(range(192))
  assert channel_subset(48, 4) == tuple(range(48))


@pytest.mark.parametrize('size', [4, 5, 16])
def test_other_block_sizes_keep_the_frequency(size):
  for name in list_channel_subsets(size):
    if name == 'all':
      continue
    got = [(c // size**2, *divmod(c % size**2, size)) for c in channel_subset(name, size)]
    assert got == [(c // 64, *divmod(c % 64, 8)) for c in channel_subset(name)]
  assert channel_subset('square6', 4) == (0, 1, 4, 5, 16, 32)


def test_unknown_subsets_say_what_there_is():
  assert list_channel_subsets(4) == ('square6', 'square12', 'square24', 'triangle12', 'all')  # fmt: skip
  with pytest.raises(ValueError, match=r"'square48' has frequencies that 4x4 .*square24"):
    channel_subset('square48', 4)
  with pytest.raises(ValueError, match=r"'circle' is no channel subset; choose one of square6"):
    channel_subset('circle')
  with pytest.raises(ValueError, match='7 is no channel subset'):
    channel_subset(7)


def test_select_channels():
  heat = np.zeros(192)
  heat[[5, 70, 3, 100]] = [0.9, 0.8, 0.8, 1.0]
  assert select_channels(heat, 3) == (3, 5, 100)  # 3 and 70 tie: the lower wins
  assert select_channels(jnp.asarray(heat).reshape(3, 8, 8), 4) == (3, 5, 70, 100)
  assert select_channels(np.ones(192), 5) == (0, 1, 2, 3, 4)
  with pytest.raises(ValueError, match='cannot select 193 of 192'):
    select_channels(heat, 193)
  with pytest.raises(ValueError, match='NaN at channel 7'):
    select_channels(np.where(np.arange(192) == 7, np.nan, heat), 3)


def test_released_vectors():
  mean, std = released_statistics()
  assert mean.shape == std.shape == (192,) and mean.dtype == std.dtype == np.float32
  np.testing.assert_allclose(mean[[0, 64, 128, 71, 135, 8]], [-88.397, -58.709, 32.116, -0.621, -0.591, 0.444])  # fmt: skip
  assert np.count_nonzero(mean) == 6
  np.testing.assert_allclose(std[[0, 1, 63, 64, 70, 71, 128, 191]], [260.0, 2.778, 0.2220, 81.16, 0.05084, 0.2686, 75.85, 0.00969])  # fmt: skip
  within = within_image_std()
  np.testing.assert_allclose(within[[0, 9, 63, 64, 127, 128, 191]], [416.3, 40.23, 4.276, 79.12, 1.241, 74.20, 1.102])  # fmt: skip
  # What makes the released vector a trap: luma AC is 18 to 71 times too small within 4x4.
  corner = [8 * u + v for u in range(4) for v in range(4)][1:]
  ratio = within[corner] / std[corner]
  assert ratio.min() > 18 and ratio.max() < 80


def _oracle(images):
  """mean, within, between in float64, image by image."""
  flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in images]
  means = np.stack([x.mean(0) for x in flat])
  return means.mean(0), np.mean([x.var(0) for x in flat], 0), means.var(0)


def _images(n, dtype=np.float32, offset=0.0):
  rng = np.random.default_rng(0)
  scale = np.array([400.0, 30.0, 0.3])
  base = rng.normal(size=(n, 1, 1, 3)) * scale + offset
  return (base + rng.normal(size=(n, 6, 5, 3)) * scale).astype(dtype)


@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_statistics_against_numpy(offset):
  images = _images(53, offset=offset)
  update = jax.jit(update_statistics)
  state = init_statistics(3)
  for start in range(0, 50, 10):
    state = update(state, images[start : start + 10])
  # The last batch is padded with what must not count.
  last = np.concatenate([images[50:], np.full((7, 6, 5, 3), 1e6, np.float32)])
  state = update_statistics(state, last, jnp.arange(10) < 3)
  mean, within, between, std = finalize_statistics(state)
  want_mean, want_within, want_between = _oracle(images)
  # float32 means of numbers near 1e4 carry errors of 1e-3: relative to a spread of 0.3.
  rtol = 1e-5 if offset == 0.0 else 1e-2
  assert int(state.count) == 53
  np.testing.assert_allclose(mean, want_mean, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(within, want_within, rtol=rtol)
  np.testing.assert_allclose(between, want_between, rtol=rtol)
  # Equal sizes: the pooled std is the std of all coefficients.
  want_std = np.asarray(images, np.float64).reshape(-1, 3).std(0)
  np.testing.assert_allclose(std, want_std, rtol=rtol)


def test_statistics_in_float64_are_exact(x64):
  images = _images(40, np.float64, offset=1e6)
  state = init_statistics(3, jnp.float64)
  for start in range(0, 40, 8):
    state = update_statistics(state, jnp.asarray(images[start : start + 8]))
  for got, want in zip(state[1:], _oracle(images), strict=True):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_merge_is_update_in_any_order():
  images = _images(30)
  parts = [update_statistics(init_statistics(3), images[a:b]) for a, b in ((0, 4), (4, 5), (5, 30))]
  whole = update_statistics(init_statistics(3), images)
  empty = init_statistics(3)
  for order in ((0, 1, 2), (2, 0, 1)):
    merged = empty
    for i in order:
      merged = merge_statistics(merged, parts[i])
    merged = merge_statistics(merged, empty)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), merged, whole)


def test_statistics_of_integers_and_of_nothing():
  x = np.array([[[1, 3]], [[5, 7]]], np.int16).reshape(2, 2, 1)
  state = update_statistics(init_statistics(1), x)
  assert [float(v[0]) for v in state[1:]] == [4.0, 1.0, 4.0]
  none = update_statistics(state, x, jnp.zeros(2))
  jax.tree.map(np.testing.assert_array_equal, none, state)
  with pytest.raises(ValueError, match=r'hold 1 channels, got a batch \[2, 2, 3\] with 3'):
    update_statistics(state, np.zeros((2, 2, 3), np.int16))
