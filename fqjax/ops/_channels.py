"""Channels of a block-DCT input: published subsets, choice from a heat map, their statistics.

A channel is one frequency of one colour component, `b*b*component + b*u + v` for b x b blocks:
u vertical, v horizontal, components Y, Cb, Cr.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Row-major indices within an 8x8 block: (Y, Cb and Cr). Square, triangle and learned subsets of Xu
# et al., "Learning in the Frequency Domain" (CVPR 2020), as in the authors' code.
_SUBSETS = {
  'square6': ('0 1 8 9', '0'),
  'square12': ('0 1 2 8 9 10 16 17', '0 8'),
  'square24': ('0 1 2 3 8 9 10 11 16 17 18 19 24 25 26 27', '0 1 8 9'),
  'square32': (
    '0 1 2 3 4 8 9 10 11 12 16 17 18 19 20 24 25 26 27 32 33 34',
    '0 1 2 8 9',
  ),
  'square48': (
    '0 1 2 3 4 5 8 9 10 11 12 13 16 17 18 19 20 21 24 25 26 27 28 29 32 33 34 35 40 41 42 43',
    '0 1 2 8 9 10 16 17',
  ),
  'square64': (
    '0 1 2 3 4 5 6 8 9 10 11 12 13 14 16 17 18 19 20 21 24 25 26 27 28 29 32 33 34 35 36 37 '
    '40 41 42 43 44 45 48 49 50 51 52 53',
    '0 1 2 8 9 10 16 17 24 25',
  ),
  'triangle12': ('0 1 2 8 9 16', '0 1 8'),
  'triangle24': ('0 1 2 3 4 8 9 10 11 16 17 24', '0 1 2 8 9 16'),
  'triangle48': (
    '0 1 2 3 4 5 6 8 9 10 11 12 13 16 17 18 19 20 24 25 26 27 32 33 34 40 41 48',
    '0 1 2 3 8 9 10 16 17 24',
  ),
  'triangle64': (
    '0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 16 17 18 19 20 21 24 25 26 27 28 32 33 34 35 40 41 42 48',
    '0 1 2 3 4 8 9 10 11 16 17 18 24 25 32',
  ),
  'learned24': ('0 1 2 3 4 5 8 9 10 16 17 18 24 32', '0 1 3 8 24'),
}


def _frequencies(name: str) -> list[list[tuple[int, int]]]:
  """(u, v) of a preset for Y, Cb and Cr."""
  luma, chroma = ([divmod(int(i), 8) for i in text.split()] for text in _SUBSETS[name])
  return [luma, chroma, chroma]


def list_channel_subsets(size: int = 8) -> tuple[str, ...]:
  """Names `channel_subset` knows for blocks of this size.

  Example:
    >>> list_channel_subsets(2)
    ('square6', 'all')
  """
  fits = [
    name
    for name in _SUBSETS
    if all(max(uv) < size for component in _frequencies(name) for uv in component)
  ]
  return (*fits, 'all')


def channel_subset(name: str | int, size: int = 8) -> tuple[int, ...]:
  """Channels of a named subset, in ascending order.

  The presets are frequencies (u, v) of 8x8 blocks; other block sizes keep the (u, v).

  Args:
    name: one of `list_channel_subsets(size)`; a number n means 'square<n>', and the number of all
      channels means 'all'.
    size: side of a block.

  Returns:
    Indices `size*size*component + size*u + v`.

  Raises:
    ValueError: for an unknown name, or one with frequencies the block does not have.

  Example:
    >>> channel_subset('square6', size=4)
    (0, 1, 4, 5, 16, 32)
    >>> len(channel_subset(24)), len(channel_subset('all'))
    (24, 192)

  References:
    Xu et al., "Learning in the Frequency Domain", CVPR 2020.
  """
  known = list_channel_subsets(size)
  if name in ('all', 3 * size * size):
    return tuple(range(3 * size * size))
  key = name if isinstance(name, str) else f'square{name}'
  if key not in known:
    if key in _SUBSETS:
      problem = f'{key!r} has frequencies that {size}x{size} blocks do not have'
    else:
      problem = f'{name!r} is no channel subset'
    raise ValueError(f'{problem}; choose one of {", ".join(known)}.')
  return tuple(
    size * size * component + size * u + v
    for component, frequencies in enumerate(_frequencies(key))
    for u, v in frequencies
  )


def select_channels(heatmap, n: int) -> tuple[int, ...]:
  """The n channels a gate chose most often.

  Args:
    heatmap: how often each channel was chosen, [channels] or any shape that flattens to it
      ([3, 8, 8]); row-major frequencies, not zig-zag.
    n: how many channels to keep.

  Returns:
    Their indices in ascending order; of equal values the lowest indices.

  Raises:
    ValueError: when n is not within 1..channels or the heat map holds NaN.

  Example:
    >>> select_channels([0.2, 0.9, 0.5, 0.9], 2)
    (1, 3)
  """
  values = np.asarray(heatmap, np.float64).ravel()
  if not 1 <= n <= values.size:
    raise ValueError(f'cannot select {n} of {values.size} channels; n is 1..{values.size}.')
  if np.isnan(values).any():
    raise ValueError(f'the heat map is NaN at channel {int(np.isnan(values).argmax())}.')
  order = np.argsort(-values, kind='stable')
  return tuple(sorted(order[:n].tolist()))


# Standard deviation, across ImageNet images, of each channel's mean over one image
# (`train_upscaled_static_std` of the authors' code). Rows are u; Y, then Cb, then Cr.
_RELEASED_STD = """
      260   2.778   2.045   1.395   1.193  0.8639  0.6839  0.5757
    3.991  0.5662  0.5938  0.4396   0.387  0.3075  0.2669  0.2205
    2.479  0.5919  0.6434    0.46   0.409  0.3174  0.2751  0.2124
    1.655  0.4462  0.4669  0.3699  0.3395  0.2699  0.2366  0.2021
    1.339  0.3951  0.4214  0.3407  0.3289   0.258  0.2276   0.181
     1.02  0.3158  0.3287  0.2743  0.2629  0.2214  0.1919  0.1815
   0.8418  0.2767  0.2875  0.2424  0.2333  0.1924  0.1779  0.1437
   0.7355  0.2272  0.2222   0.203  0.1835  0.1832  0.1452   0.222
    81.16  0.4909  0.3174  0.2045  0.1188  0.1291 0.05084  0.2686
   0.7873  0.1032 0.09648 0.06272 0.04613 0.03335 0.02395 0.01871
    0.382 0.09717  0.1033 0.06394 0.04945 0.03507 0.02518 0.03215
   0.2305 0.06356 0.06515 0.04393 0.03584 0.02575 0.01956 0.01557
   0.1394 0.04919 0.05235 0.03709 0.03356 0.02397  0.0188 0.02198
   0.0986 0.03545 0.03689 0.02671 0.02365 0.01774 0.01438 0.01215
  0.06454 0.02642 0.02774 0.02102 0.01909 0.01504 0.01256 0.01405
  0.05132 0.01976 0.02047 0.01616 0.01488 0.01216  0.0104  0.0102
    75.85  0.4641  0.2978  0.1949  0.1079  0.1283 0.04583  0.2754
    0.703 0.09483 0.08731 0.05686 0.04074 0.02973 0.02135 0.01691
   0.3597 0.08786 0.09284 0.05697 0.04361 0.03138 0.02238  0.0317
   0.2126 0.05756 0.05831 0.03909 0.03166 0.02292 0.01742  0.0141
   0.1261  0.0439 0.04663 0.03302 0.02974 0.02138 0.01693 0.02095
  0.09013 0.03178 0.03294 0.02383 0.02102 0.01592 0.01298 0.01118
  0.05851 0.02375 0.02466 0.01885 0.01707 0.01365 0.01142 0.01323
  0.04729 0.01794 0.01847 0.01469 0.01345 0.01115 0.00961 0.00969
"""

# Mean over ImageNet images of the standard deviation within one image (`train_{y,cb,cr}_std`).
_WITHIN_STD = """
    416.3   77.59   42.24   28.58   21.81   17.21   13.54    10.5
    83.22   40.23   27.91   20.78   16.61    13.6   10.79   8.443
     45.7   28.65   22.23   17.75   14.73   12.17   9.776   7.663
    30.98   21.69   18.08   15.28    13.1   11.03   8.954   7.117
    23.62   17.49   15.18   13.27   11.63    9.89   8.087   6.527
    18.65   14.31   12.67   11.29   10.03   8.646   7.177   5.874
    14.67   11.48   10.26    9.24   8.248    7.23   6.134   5.068
    11.37   8.923   8.078   7.303   6.641   5.957   5.107   4.276
    79.12   18.37   9.937   6.385   4.381   3.326    2.67   2.396
    20.08   9.858   6.647   4.542   3.296   2.591   2.141   1.897
    11.06   6.918   5.082   3.674   2.828   2.293   1.884   1.728
    7.254   4.895   3.808   3.022   2.432   2.031   1.712   1.587
    5.167   3.709   3.071   2.556   2.119   1.834   1.558   1.496
    3.991   2.981   2.543   2.189   1.865   1.659   1.452   1.395
    3.259   2.522   2.163   1.913   1.643   1.526    1.34   1.316
    2.764    2.17   1.903   1.716   1.523   1.411   1.264   1.241
     74.2   17.49    9.32   5.902   4.011   3.026   2.414   2.179
     18.9   9.214   6.144   4.148   2.987   2.337   1.923   1.705
    10.27    6.38   4.638    3.33   2.544   2.056   1.679   1.548
     6.65   4.456   3.446   2.717   2.173   1.811   1.518   1.413
    4.701   3.358   2.761   2.288   1.885   1.631   1.373   1.331
    3.611   2.683   2.277   1.952   1.654   1.472   1.279   1.239
    2.934   2.264    1.93   1.701   1.448   1.352   1.178   1.168
    2.485   1.943   1.695   1.525   1.346   1.251   1.114   1.102
"""

# The published means beyond 0.44 in magnitude; every other AC mean is smaller.
_RELEASED_MEAN = {
  0: -88.397, 64: -58.709, 128: 32.116,  # DC of Y, Cb, Cr
  8: 0.444, 71: -0.621, 135: -0.591,  # Y(1,0), Cb(0,7), Cr(0,7)
}  # fmt: skip


def released_statistics() -> tuple[np.ndarray, np.ndarray]:
  """The 192 means and "stds" that the weights released with the paper expect.

  The std is the one *between image means*, not of the coefficients: after dividing by it, AC
  channels keep a std of 18 to 70. Use it to run released weights, and pooled statistics
  (`finalize_statistics`) for everything trained anew. AC means below 0.44 in magnitude are set
  to 0: coefficients spread over tens.

  Returns:
    mean float32 [192], std float32 [192]; order Y, Cb, Cr, row-major frequencies.

  Example:
    >>> mean, std = released_statistics()
    >>> print(mean[0], std[0])
    -88.397 260.0

  References:
    Xu et al., "Learning in the Frequency Domain", CVPR 2020; code of the authors.
  """
  mean = np.zeros(192, np.float32)
  for channel, value in _RELEASED_MEAN.items():
    mean[channel] = value
  return mean, np.array(_RELEASED_STD.split(), np.float32)


def within_image_std() -> np.ndarray:
  """Published mean over images of the standard deviation within an image.

  Returns:
    float32 [192]: order Y, Cb, Cr, row-major frequencies. Close to pooled statistics except at DC,
    where the spread between images is missing.

  Example:
    >>> print(within_image_std()[:3])
    [416.3   77.59  42.24]

  References:
    Xu et al., "Learning in the Frequency Domain", CVPR 2020; code of the authors.
  """
  return np.array(_WITHIN_STD.split(), np.float32)


class CoefficientStatistics(NamedTuple):
  """Statistics of the images seen so far; images count alike, whatever their size.

  Attributes:
    count: int32 scalar, images seen.
    mean: [c] mean over images of the image mean.
    within: [c] mean over images of the variance within an image.
    between: [c] variance over images of the image mean.
  """

  count: jax.Array
  mean: jax.Array
  within: jax.Array
  between: jax.Array


class ChannelStatistics(NamedTuple):
  """Result of `finalize_statistics`, each [c].

  Attributes:
    mean: mean.
    within: variance within an image, averaged over images.
    between: variance of the image means.
    std: pooled standard deviation, sqrt(within + between).
  """

  mean: jax.Array
  within: jax.Array
  between: jax.Array
  std: jax.Array


def init_statistics(channels: int, dtype=jnp.float32) -> CoefficientStatistics:
  """Statistics of no images.

  Args:
    channels: number of channels.
    dtype: float32, or float64 where JAX has it enabled.
  """
  zeros = jnp.zeros((channels,), dtype)
  return CoefficientStatistics(jnp.zeros((), jnp.int32), zeros, zeros, zeros)


def update_statistics(
  state: CoefficientStatistics, coefficients: jax.Array, mask: jax.Array | None = None
) -> CoefficientStatistics:
  """Adds a batch of images, in one pass over them.

  Args:
    state: from `init_statistics` or an earlier update.
    coefficients: [n, ..., c] of any real dtype.
    mask: [n], 0 for images to leave out (padding of a last batch).

  Raises:
    ValueError: when the number of channels differs from the state's.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])[..., None]  # two images of two values
    >>> print(finalize_statistics(update_statistics(init_statistics(1), x)))
    ... # doctest: +NORMALIZE_WHITESPACE
    ChannelStatistics(mean=Array([4.], dtype=float32), within=Array([1.], dtype=float32),
    between=Array([4.], dtype=float32), std=Array([2.236068], dtype=float32))
  """
  n, *_, c = coefficients.shape
  if c != state.mean.shape[0]:
    raise ValueError(
      f'the statistics hold {state.mean.shape[0]} channels, got a batch {list(coefficients.shape)}'
      f' with {c}.'
    )
  dtype = state.mean.dtype
  x = coefficients.astype(dtype).reshape(n, -1, c)
  keep = jnp.ones(n, dtype) if mask is None else jnp.asarray(mask).astype(bool).astype(dtype)
  keep = keep[:, None]
  count = keep.sum()
  # Deviations from the mean, never E[x^2] - E[x]^2: that cancels in float32.
  image_mean = x.mean(1)
  image_variance = jnp.square(x - image_mean[:, None]).mean(1)
  total = jnp.maximum(count, 1)
  mean = (keep * image_mean).sum(0) / total
  batch = CoefficientStatistics(
    count.astype(jnp.int32),
    mean,
    (keep * image_variance).sum(0) / total,
    (keep * jnp.square(image_mean - mean[None])).sum(0) / total,
  )
  return merge_statistics(state, batch)


def merge_statistics(a: CoefficientStatistics, b: CoefficientStatistics) -> CoefficientStatistics:
  """Joins the statistics of two disjoint sets of images (Chan, Golub, LeVeque 1983).

  Args:
    a: Of the one set.
    b: Of the other, of as many channels.

  Example:
    >>> one = update_statistics(init_statistics(1), jnp.ones((2, 4, 4, 1)))
    >>> three = update_statistics(init_statistics(1), 3 * jnp.ones((2, 4, 4, 1)))
    >>> print(merge_statistics(one, three).mean)
    [2.]
  """
  count = a.count + b.count
  share = b.count.astype(a.mean.dtype) / jnp.maximum(count, 1).astype(a.mean.dtype)
  delta = b.mean - a.mean
  return CoefficientStatistics(
    count,
    a.mean + delta * share,
    a.within + (b.within - a.within) * share,
    a.between + (b.between - a.between) * share + jnp.square(delta) * (share * (1 - share)),
  )


def finalize_statistics(state: CoefficientStatistics) -> ChannelStatistics:
  """Mean, variance within and between images, and the pooled standard deviation.

  Args:
    state: Of `update_statistics` or `merge_statistics`.

  Example:
    >>> x = jnp.stack([jnp.zeros((4, 4, 1)), 4 * jnp.ones((4, 4, 1))])
    >>> print(finalize_statistics(update_statistics(init_statistics(1), x)).std)
    [2.]
  """
  std = jnp.sqrt(state.within + state.between)
  return ChannelStatistics(state.mean, state.within, state.between, std)
