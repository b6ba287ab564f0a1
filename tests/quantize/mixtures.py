"""Mixtures to test with."""

import functools

import jax.numpy as jnp
import numpy as np
from scipy import stats

from fqjax.quantize import MixtureLeaf, RawMixtureLeaf


def example(sigma=(0.03, 0.04, 0.03, 0.08), tau=0.01, raw=False, dtype=jnp.float32):
  mu, sigma, pi = (
    jnp.asarray(x, dtype) for x in ([-0.1, 0.08, 0.3], sigma, [0.4, 0.25, 0.25, 0.1])
  )
  tau = jnp.asarray(tau, dtype)
  return (
    RawMixtureLeaf(mu, sigma, pi, tau) if raw else MixtureLeaf(mu, jnp.log(sigma), pi, jnp.log(tau))
  )


def drawn(count, zero, raw=False, seed=0, dtype=np.float64):
  """Weights, and a mixture that describes them badly enough to have gradients everywhere."""
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(6, 11)).astype(dtype)
  mu = np.sort(rng.normal(size=count - zero)).astype(dtype)
  sigma, pi = (rng.uniform(a, b, count).astype(dtype) for a, b in ((0.3, 0.9), (-1, 1)))
  leaf = (mu, sigma, pi, dtype(0.1)) if raw else (mu, np.log(sigma), pi, dtype(np.log(0.1)))
  kind = RawMixtureLeaf if raw else MixtureLeaf
  return jnp.asarray(w), kind(*(jnp.asarray(x) for x in leaf))


@functools.cache
def normal_weights():
  x = 0.05 * stats.norm.ppf((np.arange(100_000) + 0.5) / 1e5)
  return jnp.asarray(np.random.default_rng(0).permutation(x), jnp.float32)
