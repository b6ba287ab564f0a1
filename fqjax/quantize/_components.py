"""The parameters of a Gaussian mixture over the weights of a leaf, and its codebook.

A mixture of K components has K means, one of them pinned at zero unless `zero=False`. Its codebook is
[0, means...]: entry 0 is the zero of masked weights, and with a pinned component a level like the
others. What weights a mixture makes is in `_blend.py`.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Shares below this count as this: a component without members stays finite.
_SHARE = 1e-30


class MixtureLeaf(NamedTuple):
  """The mixture of one leaf, trained beside the weights. K components; float32.

  Attributes:
    mu: [K-1] the free means; [K] in a mixture without a pinned zero.
    log_sigma: [K] logarithms of the standard deviations, the zero component's first.
    pi: [K] shares, up to a factor: |pi| over its sum.
    log_tau: [] logarithm of the temperature.
  """

  mu: Any
  log_sigma: Any
  pi: Any
  log_tau: Any


class RawMixtureLeaf(NamedTuple):
  """`MixtureLeaf` in the parameters of the published code, for runs that repeat its steps.

  Only the square of sigma counts, and nothing keeps it from zero.

  Attributes:
    mu: [K-1] or [K].
    sigma: [K].
    pi: [K].
    tau: [].
  """

  mu: Any
  sigma: Any
  pi: Any
  tau: Any


def is_mixture(x: Any) -> bool:
  """Whether x is the mixture of a leaf, of either kind."""
  return isinstance(x, MixtureLeaf | RawMixtureLeaf)


def pinned(leaf: MixtureLeaf | RawMixtureLeaf) -> bool:
  """Whether the first component is pinned at zero."""
  return leaf.mu.shape[-1] < leaf.pi.shape[-1]


def codebook(leaf: MixtureLeaf | RawMixtureLeaf) -> jax.Array:
  """The levels of a mixture: 0 for masked weights and the pinned component, then the free means.

  Args:
    leaf: of a tree from `init_dgms`, trained or not.

  Returns:
    [K], or [K+1] without a pinned component; in the order of the components, which training may
    disturb: see `sort_components`.

  Example:
    >>> leaf = Mixture(3).start(jnp.array([-1.0, 0.0, 2.0]))
    >>> print(codebook(leaf))
    [ 0. -1.  2.]
  """
  mu = jnp.asarray(leaf.mu)
  return jnp.concatenate([jnp.zeros_like(mu[:1]), mu])


def check_sizes(leaf: MixtureLeaf | RawMixtureLeaf) -> None:
  """Raises ValueError where the parts do not belong together."""
  mu, sigma, pi, tau = ([*getattr(x, 'shape', ())] for x in leaf)
  if len(pi) != 1 or sigma != pi or tau or mu not in (pi, [pi[0] - 1]):
    raise ValueError(
      f'a mixture of means {mu}, deviations {sigma}, shares {pi} and a temperature {tau}; of K '
      'components they are [K-1] (or [K] without a zero), [K], [K] and [].'
    )


class Components(NamedTuple):
  """What a loop over components reads, [K] each: log density is bias - ((w - mu) * scale)^2 / 2."""

  mu: jax.Array
  scale: jax.Array
  bias: jax.Array


def components(w: jax.Array, leaf: MixtureLeaf | RawMixtureLeaf) -> Components:
  """The mixture as its densities need it, in the dtype of `w`."""
  mu, sigma, pi = (jnp.asarray(x).astype(w.dtype) for x in leaf[:3])
  if isinstance(leaf, MixtureLeaf):
    log_sigma = jnp.maximum(sigma, jnp.log(least_sigma(w)))
  else:
    log_sigma = jnp.log(jnp.abs(sigma))
  share = jnp.abs(pi)
  share = share / jnp.maximum(jnp.sum(share), _SHARE)
  if pinned(leaf):
    mu = jnp.concatenate([jnp.zeros_like(mu[:1]), mu])
  return Components(mu, jnp.exp(-log_sigma), jnp.log(jnp.maximum(share, _SHARE)) - log_sigma)


def least_sigma(w: jax.Array) -> jax.Array:
  """Floor of the deviations: a thousandth of the weights', positive also where they are all equal."""
  w = lax.stop_gradient(w)
  w = jnp.where(jnp.isfinite(w), w, jnp.zeros_like(w))  # one bad weight does not spoil the others
  size = jnp.sqrt(jnp.mean(jnp.square(w)))
  return jnp.maximum(jnp.maximum(1e-3 * jnp.std(w), 1e-6 * size), 1e-12)


def temperature_of(leaf: MixtureLeaf | RawMixtureLeaf) -> jax.Array:
  """The temperature, []."""
  if isinstance(leaf, RawMixtureLeaf):
    return jnp.abs(jnp.asarray(leaf.tau))
  return jnp.exp(jnp.asarray(leaf.log_tau))


def sort_components(leaf: MixtureLeaf | RawMixtureLeaf) -> MixtureLeaf | RawMixtureLeaf:
  """The same mixture with ascending means, the pinned zero before them; for export.

  Permuting components changes no weight, only indices.

  Args:
    leaf: of a tree from `init_dgms`.

  Returns:
    A mixture of the same kind.

  Example:
    >>> leaf = Mixture(3).start(jnp.array([-1.0, 0.0, 2.0]))
    >>> print(sort_components(leaf._replace(mu=leaf.mu[::-1])).mu)
    [-1.  2.]
  """
  first = int(pinned(leaf))
  order = jnp.argsort(jnp.asarray(leaf.mu))
  whole = jnp.concatenate([jnp.arange(first), order + first])
  return type(leaf)(leaf[0][order], leaf[1][whole], leaf[2][whole], leaf[3])


def int8_codebook(levels: Any) -> tuple[np.ndarray, np.float32]:
  """A codebook in 8 bits: level = scale * integer, zero exactly.

  Args:
    levels: [K] float, finite.

  Returns:
    integers: int8 [K], -127..127, half to even; `|levels - scale * integers| <= scale / 2`.
    scale: float32, max |levels| / 127; 1 when all are zero.

  Example:
    >>> print(*int8_codebook([0.0, -0.31, 0.07, 0.35]))
    [   0 -112   25  127] 0.0027559055
  """
  table = np.asarray(levels, np.float64)
  if not np.isfinite(table).all():
    raise ValueError(f'int8_codebook needs finite levels, got {table}; the run has diverged.')
  scale = np.abs(table).max(initial=0.0) / 127 or 1.0
  return np.rint(table / scale).astype(np.int8), np.float32(scale)
