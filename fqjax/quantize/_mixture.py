"""The quantizer whose levels are trained: where the mixture of a leaf begins."""

import dataclasses
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._blend import fit_step, mixture_weights
from fqjax.quantize._blend import indices as most_responsible
from fqjax.quantize._components import (
  MixtureLeaf,
  RawMixtureLeaf,
  check_sizes,
  is_mixture,
)
from fqjax.quantize._components import codebook as levels
from fqjax.quantize._kmeans import kmeans
from fqjax.quantize._quantizer import Quantizer
from fqjax.sparsity._select import wide

EM_PASSES = 8
# Points that levels are fitted to on the device.
_RUNS = 4096


@dataclasses.dataclass(frozen=True)
class Mixture(Quantizer):
  """Levels that are trained: the means of a Gaussian mixture over the weights of a leaf (DGMS).

  `init_dgms` starts the mixtures of a plan and `effective_params` says which weights they make.
  `project`, `encode` and `sizes` take the trained mixtures as their codebooks, and a weight has the
  level of its most responsible component. Without them they round to the nearest starting level.

  A leaf with fewer distinct weights than components keeps them all; components without members stand
  in the widest gaps and win weights that move there. In a leaf of zeros all levels are 0. A cluster
  without a spread of its own starts with the smallest of the others'.

  Attributes:
    components: K, 3..256 with the pinned zero, 2..255 without.
    zero: the first component is pinned at 0 and prunes what it wins.
    sigma: starting deviations: 'cluster' for those of the k-means clusters, or one positive number.
    tau: starting temperature of `soft` weights; .005 to .05 is useful.
    em: passes of expectation-maximisation after k-means, at most 8.
    parity: start and parametrise as the published code: free k-means whose center nearest to zero
      is then moved there, sigma and tau themselves trained (`RawMixtureLeaf`), no floor under sigma.
      Weights agree with that code wherever its densities are above its additive 1e-11; below, where
      it prunes outliers, ours go to their nearest components.

  Raises:
    ValueError: for settings that make no sense.

  Example:
    >>> print(Mixture(3).project(jnp.array([[-1.1, 0.1], [2.0, -0.9]]), 'IO'))
    [[-1.  0.]
     [ 2. -1.]]

  Source: Dong et al., "Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural Networks",
  ICML 2022.
  """

  components: int = 16
  zero: bool = True
  sigma: str | float = 'cluster'
  tau: float = 0.01
  em: int = 0
  parity: bool = False

  def __post_init__(self):
    least, most = (3, 256) if self.zero else (2, 255)
    if not least <= self.components <= most:
      why = (
        'two levels of which one is zero lose more than half of the energy; zero=False has two free.'
        if self.zero and self.components == 2
        else 'indices are 8 bits, and 0 is that of masked weights.'
      )
      raise ValueError(
        f'components={self.components} must be {least}..{most} with zero={self.zero}: {why}'
      )
    if self.sigma != 'cluster' and not (
      isinstance(self.sigma, int | float) and 0 < self.sigma < math.inf
    ):
      raise ValueError(f"sigma={self.sigma!r} must be 'cluster' or a positive number.")
    if not 0 < self.tau < math.inf:
      raise ValueError(f'tau={self.tau} must be positive; 0.01 is the published one.')
    if not 0 <= self.em <= EM_PASSES:
      raise ValueError(f'em={self.em} must be 0..{EM_PASSES} passes.')
    if self.em and self.parity:
      raise ValueError(f'em={self.em} with parity=True: the published start has no passes of EM.')

  @property
  def count(self) -> int:
    """How many levels a live weight may take."""
    return self.components

  @property
  def tabled(self) -> int:
    """How many float32 numbers are stored for one codebook: the free means."""
    return self.components - self.zero

  def fit(self, w, layout, mask=None):
    """Levels from a fixed number of rounds on the device; see `Quantizer.fit`, and `start`."""
    del layout
    return _rounds(lax.stop_gradient(w), mask, self.tabled, self.zero)

  def fit_exact(self, w, layout, mask=None):
    """The levels of `start`: k-means to its end, on the host."""
    del layout
    return levels(self.start(w, mask))

  def table(self, codebook):
    """The levels of a trained mixture, or the codebook itself."""
    return levels(codebook) if is_mixture(codebook) else codebook

  def check_codebook(self, codebook, shape, layout):
    """See `Quantizer.check_codebook`; a mixture must have this many components."""
    if not is_mixture(codebook):
      return super().check_codebook(codebook, shape, layout)
    check_sizes(codebook)
    super().check_codebook(self.table(codebook), shape, layout)

  def indices(self, w, layout, mask=None, codebook=None):
    """See `Quantizer.indices`; of a mixture the most responsible component, not the nearest."""
    if is_mixture(codebook):
      return most_responsible(w, codebook, mask)
    return super().indices(w, layout, mask, codebook)

  def project(self, w, layout, mask=None, codebook=None):
    """See `Quantizer.project`; of a mixture the weights of 'hard' mode."""
    if is_mixture(codebook):
      codebook = lax.stop_gradient(codebook)
      return mixture_weights(lax.stop_gradient(w), codebook, 'hard', mask=mask)
    return super().project(w, layout, mask, codebook)

  def start(self, w, mask=None) -> MixtureLeaf | RawMixtureLeaf:
    """The mixture to begin with: deterministic k-means on the host, then `em` passes.

    Args:
      w: float array of any shape, finite; not a tracer.
      mask: bool like `w`, True lives; the others are not looked at.

    Returns:
      The mixture, float32; `RawMixtureLeaf` with parity.

    Raises:
      ValueError: for NaN or infinite weights.
    """
    mu, sigma, pi = (jnp.asarray(x) for x in self._cluster(w, mask))
    if self.parity:
      return RawMixtureLeaf(mu, sigma, pi, jnp.float32(self.tau))
    leaf = MixtureLeaf(mu, jnp.log(sigma), pi, jnp.float32(math.log(self.tau)))
    for _ in range(self.em):
      leaf = fit_step(w, leaf, mask)[0]
    return leaf

  def _cluster(self, w, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.asarray(w, np.float64)
    values = values.ravel() if mask is None else values[np.asarray(mask, bool)]
    if not np.isfinite(values).all():
      raise ValueError(
        'weights are NaN or infinite, which no mixture describes. Restore a checkpoint from before '
        'they appeared.'
      )
    if not values.size:  # nothing lives
      values = np.zeros(1)
    found = kmeans(values, self.components, zero=self.zero, repin=not self.parity)
    size = math.sqrt(np.mean(values * values))
    # As `least_sigma`.
    floor = max(1e-3 * values.std(), 1e-6 * size, 1e-12)
    if self.sigma == 'cluster':
      # One member has no deviation, and a needle would win no other weight: the narrowest's instead.
      spread = found.sigmas[found.sigmas > floor]
      sigma = np.where(found.sigmas > floor, found.sigmas, spread.min(initial=np.inf))
      sigma = np.where(np.isfinite(sigma), sigma, floor)
    else:
      sigma = np.full(self.components, max(self.sigma, floor))
    parts = (
      found.centers[int(self.zero) :],
      sigma,
      found.counts / len(values),
    )
    return tuple(np.asarray(x, np.float32) for x in parts)  # pyright: ignore[reportReturnType]


def _rounds(w, mask, free: int, zero: bool, rounds: int = 50) -> jax.Array:
  """Codebook by Lloyd's iteration on the means of up to 4,096 runs of the sorted weights."""
  dtype = wide(w.dtype)
  live = jnp.ones(w.shape, bool) if mask is None else mask
  x = jnp.sort(jnp.where(live, w.astype(dtype), jnp.inf).reshape(-1))
  n = jnp.sum(live, dtype=jnp.int32)
  place = jnp.arange(x.size, dtype=jnp.int32)
  runs = min(x.size, _RUNS)
  run = jnp.minimum(place // jnp.maximum(-(-n // runs), 1), runs - 1)
  within = (place < n).astype(dtype)
  size = jax.ops.segment_sum(within, run, runs, indices_are_sorted=True)
  total = jax.ops.segment_sum(jnp.where(place < n, x, 0), run, runs, indices_are_sorted=True)
  # Runs beyond the last repeat it, with nothing in them.
  last = jnp.where(n > 0, x[jnp.maximum(n - 1, 0)], 0)
  point = jnp.where(size > 0, total / jnp.maximum(size, 1), last)
  # As the host's: quantiles of the density's cube root.
  gaps = jnp.maximum(jnp.diff(point), 0)  # means of equal weights may differ in the last bit
  upto = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(gaps ** (2 / 3))])
  centers = jnp.interp((jnp.arange(free, dtype=dtype) + 0.5) / free * upto[-1], upto, point)
  fixed = jnp.zeros(int(zero), dtype)

  def body(_, centers):
    every = jnp.concatenate([fixed, centers])
    away = jnp.square(point[:, None] - every[None])
    member = jnp.argmin(away, 1)
    count = jax.ops.segment_sum(size, member, every.size)[int(zero) :]
    sums = jax.ops.segment_sum(size * point, member, every.size)[int(zero) :]
    # Centers without members go where the error is largest, each to a run of its own.
    worst = point[jnp.argsort(-size * jnp.min(away, 1))]
    empty = count == 0
    rank = jnp.clip(jnp.cumsum(empty) - 1, 0, runs - 1)
    return jnp.where(empty, worst[rank], sums / jnp.maximum(count, 1))

  centers = jnp.sort(lax.fori_loop(0, rounds, body, centers))
  return jnp.concatenate([jnp.zeros(1, dtype), centers]).astype(jnp.float32)
