"""The weights of a mixture: the published formula, exact gradients, limits, no array of K x N."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
from scipy import stats

from fqjax import quantize
from fqjax.quantize import Mixture, MixtureLeaf, RawMixtureLeaf, mixture_weights
from fqjax.quantize._blend import fit_step
from tests.quantize.mixtures import drawn, example, normal_weights


def direct(w, leaf, mode, temperature=None, floor=0.0, xp=jnp):
  """The published formula, densities and all components at once; `anneal` by its definition.

  The published code adds a floor of 1e-11 to the sum of densities.
  """
  if isinstance(leaf, MixtureLeaf):
    sigma, tau = xp.exp(leaf.log_sigma), xp.exp(leaf.log_tau)
  else:
    sigma, tau = leaf.sigma, leaf.tau
  tau = tau if temperature is None else temperature
  mu = xp.asarray(leaf.mu)
  if len(mu) < len(leaf.pi):
    mu = xp.concatenate([xp.zeros_like(mu[:1]), mu])
  share = xp.abs(leaf.pi) / xp.sum(xp.abs(leaf.pi))
  away = w[..., None] - mu.reshape((1,) * w.ndim + (-1,))
  k = lambda x: xp.reshape(x, (1,) * w.ndim + (-1,))
  density = (
    k(share) / xp.sqrt(2 * math.pi * k(sigma) ** 2) * xp.exp(-(away**2) / (2 * k(sigma) ** 2))
  )
  phi = density / (xp.sum(density, -1, keepdims=True) + floor)
  logit = (phi if mode == 'soft' else xp.log(density)) / tau
  e = xp.exp(logit - xp.max(logit, -1, keepdims=True))
  r = e / xp.sum(e, -1, keepdims=True)
  return xp.sum(r * k(mu), -1), phi, r


# w -> responsibilities, soft weight, hard weight; worked out for `example()`.
TABLE = {
  -0.12: ([0.00081, 0.99919, 0, 0], -0.1, -0.1),
  -0.05: ([0.53737, 0.46250, 0.00011, 0.00001], -0.000056, 0),
  0.02: ([0.89896, 0.00585, 0.09496, 0.00023], 0, 0),
  0.04: ([0.61400, 0.00153, 0.38375, 0.00071], 0, 0),
  0.06: ([0.21246, 0.00025, 0.78566, 0.00163], 0.08, 0.08),
  0.20: ([0, 0, 0.00486, 0.99514], 0.3, 0.3),
}


@pytest.mark.parametrize('raw', [False, True])
def test_a_worked_table(raw):
  w = jnp.array(list(TABLE))
  phi, soft, hard = (np.array(x) for x in zip(*TABLE.values(), strict=True))
  for factor in (1.0, -7.5):  # shares count up to a factor
    leaf = example(raw=raw)
    leaf = leaf._replace(pi=factor * leaf.pi)
    np.testing.assert_allclose(jnp.exp(quantize.responsibilities(w, leaf)).T, phi, atol=6e-6)
    np.testing.assert_allclose(mixture_weights(w, leaf, 'soft'), soft, atol=6e-7)
    np.testing.assert_array_equal(mixture_weights(w, leaf, 'hard'), hard.astype(np.float32))
    np.testing.assert_array_equal(quantize.indices(w, leaf), phi.argmax(1))
  warm = mixture_weights(w, leaf, 'soft', temperature=0.1)
  np.testing.assert_allclose(warm[np.array([1, 3, 5])], [-0.03072, 0.007636, 0.299956], atol=6e-7)
  np.testing.assert_allclose(warm, mixture_weights(w, example(tau=0.1, raw=raw), 'soft'), rtol=1e-6)


def test_outliers_are_not_pruned():
  """The published arithmetic in float32 has no density there and chooses component 0."""
  w = np.float32([0.45, 0.6, 2, -1.5])
  leaf = example(sigma=[0.01] * 4)
  published = direct(w, jax.tree.map(np.asarray, leaf), 'soft', floor=np.float32(1e-11), xp=np)
  assert not published[1].any() and (published[1].argmax(-1) == 0).all()
  np.testing.assert_allclose(published[0], 0.07, rtol=1e-6)
  np.testing.assert_array_equal(quantize.indices(jnp.asarray(w), leaf), [3, 3, 3, 1])
  np.testing.assert_allclose(mixture_weights(w, leaf, 'soft'), [0.3, 0.3, 0.3, -0.1], rtol=1e-6)


def test_the_published_code_where_it_is_healthy(x64):
  """Its floor shows where densities are small; elsewhere the weights agree, and so do gradients."""
  w = jnp.linspace(-0.25, 0.6, 401)
  leaf = example(raw=True, dtype=jnp.float64)
  both = {
    name: jax.vjp(function, w, leaf)
    for name, function in {
      'ours': lambda w, leaf: mixture_weights(w, leaf, 'soft'),
      'theirs': lambda w, leaf: direct(w, leaf, 'soft', floor=1e-11)[0],
    }.items()
  }
  log_density = stats.norm.logpdf(
    np.asarray(w)[:, None], *map(np.asarray, (quantize.codebook(leaf), leaf.sigma))
  )
  healthy = (np.exp(log_density) @ np.asarray(leaf.pi)) > 0.1
  assert 0.5 < healthy.mean() < 1
  apart = np.abs(both['ours'][0] - both['theirs'][0])
  assert apart[healthy].max() < 1e-8
  g = jnp.asarray(healthy, jnp.float64)
  for a, b in zip(*(jax.tree.leaves(both[name][1](g)) for name in both), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('mode', ['soft', 'anneal'])
@pytest.mark.parametrize(
  ('count', 'zero', 'raw'),
  [(3, 1, False), (7, 1, True), (16, 1, False), (2, 0, False), (5, 0, True)],
)
def test_weights_and_gradients_are_those_of_the_formula(x64, mode, count, zero, raw):
  """Against autodiff through the formula with all its arrays."""
  w, leaf = drawn(count, zero, raw)
  g = jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)
  temperature = jnp.float64(0.3) if mode == 'anneal' else None

  def ours(w, leaf, temperature):
    return jnp.sum(g * mixture_weights(w, leaf, mode, temperature=temperature))

  def theirs(w, leaf, temperature):
    return jnp.sum(g * direct(w, leaf, mode, temperature)[0])

  np.testing.assert_allclose(
    mixture_weights(w, leaf, mode, temperature=temperature),
    direct(w, leaf, mode, temperature)[0],
    rtol=1e-9,
    atol=1e-10,
  )
  wrt = (0, 1) if temperature is None else (0, 1, 2)
  found = jax.jit(jax.grad(ours, wrt))(w, leaf, temperature)
  expected = jax.jit(jax.grad(theirs, wrt))(w, leaf, temperature)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
  parts = jax.tree.leaves(found)
  assert all(np.any(np.asarray(x) != 0) for x in (parts if mode == 'soft' else parts[:4]))


@pytest.mark.parametrize('mode', ['soft', 'anneal'])
def test_gradients_are_differences(x64, mode):
  w, leaf = drawn(4, 1)
  loss = jax.jit(lambda x: jnp.sum(jnp.sin(3 * mixture_weights(*x, mode, temperature=0.1))))
  grads = jax.grad(loss)((w, leaf))
  rng = np.random.default_rng(1)
  for _ in range(4):
    step = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (w, leaf))
    moved = [
      float(loss(jax.tree.map(lambda x, d, h=h: x + h * d, (w, leaf), step))) for h in (1e-6, -1e-6)
    ]
    slope = sum(
      float(jnp.sum(a * b))
      for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
    )
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-4)


def test_limits():
  w, leaf = drawn(6, 1, dtype=np.float32)
  phi = jnp.exp(quantize.responsibilities(w, leaf))
  np.testing.assert_allclose(phi.sum(0), 1, rtol=1e-5)
  levels = quantize.codebook(leaf)
  # At temperature 1 the logarithms give the posterior mean; cold, everything is the hard weight.
  mean = jnp.tensordot(levels, phi, 1)
  np.testing.assert_allclose(mixture_weights(w, leaf, 'anneal', temperature=1), mean, atol=1e-5)
  hard = mixture_weights(w, leaf, 'hard')
  best = np.sort(np.asarray(phi), 0)
  clear = best[-1] - best[-2] > 0.01
  assert clear.mean() > 0.9
  for mode in ('soft', 'anneal'):
    cold = mixture_weights(w, leaf, mode, temperature=1e-4)
    np.testing.assert_allclose(cold[clear], hard[clear], atol=1e-5)
  for log_tau in (-9.0, 3.0):
    other = leaf._replace(log_tau=jnp.float32(log_tau))
    np.testing.assert_array_equal(quantize.indices(w, other), phi.argmax(0))
  np.testing.assert_array_equal(mixture_weights(w, leaf, 'float'), w)


def test_order_of_components_changes_indices_only():
  w, leaf = drawn(6, 1, dtype=np.float32)
  order = np.array([3, 0, 4, 1, 2])
  whole = np.concatenate([[0], order + 1])
  other = MixtureLeaf(leaf.mu[order], leaf.log_sigma[whole], leaf.pi[whole], leaf.log_tau)
  np.testing.assert_array_equal(whole[quantize.indices(w, other)], quantize.indices(w, leaf))
  for mode in ('hard', 'soft'):
    a, b = (mixture_weights(w, x, mode) for x in (leaf, other))
    np.testing.assert_allclose(a, b, atol=1e-6)
  back = quantize.sort_components(other)
  for a, b in zip(back, leaf, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('zero', [True, False])
def test_straight_through_and_hard_gradients(zero):
  w, leaf = drawn(5, zero, dtype=np.float32)
  mask = jnp.asarray(np.random.default_rng(0).random(w.shape) < 0.7)
  g = jnp.cos(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape)
  chosen = np.asarray(quantize.indices(w, leaf, mask))
  assert (chosen[~np.asarray(mask)] == 0).all()
  per_level = np.zeros(6 - zero, np.float32)
  np.add.at(per_level, chosen, np.where(mask, g, 0))
  frozen = quantize.indices(w, leaf)
  for mode, assignments in (('ste', None), ('hard', None), ('hard', frozen)):

    def loss(w, leaf, mode=mode, assignments=assignments):
      return jnp.sum(g * mixture_weights(w, leaf, mode, mask=mask, assignments=assignments))

    dw, dleaf = jax.grad(loss, (0, 1))(w, leaf)
    np.testing.assert_array_equal(dw, np.where(mask, g, 0) if mode == 'ste' else 0)
    np.testing.assert_allclose(dleaf.mu, per_level[1:], rtol=1e-5, atol=1e-6)
    assert not any(np.any(np.asarray(x)) for x in dleaf[1:])
  # Assignments stay when the weights move.
  moved = mixture_weights(w[::-1], leaf, 'hard', assignments=frozen)
  np.testing.assert_array_equal(moved, quantize.codebook(leaf)[frozen])


@pytest.mark.parametrize('count', [3, 16, 256])
def test_no_array_of_components_times_weights(count):
  """In all programs inside the gradient, the largest array is that of the weights."""
  w = jnp.zeros((40, 50))
  leaf = MixtureLeaf(jnp.zeros(count - 1), jnp.zeros(count), jnp.ones(count), jnp.float32(-4))

  def inner(params):
    for value in params.values():
      for x in value if isinstance(value, tuple | list) else [value]:
        if hasattr(x, 'eqns') or hasattr(x, 'jaxpr'):
          yield getattr(x, 'jaxpr', x)

  def largest(jaxpr):
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, 'size')]
    return max([0, *sizes, *(largest(j) for e in jaxpr.eqns for j in inner(e.params))])

  for mode in ('soft', 'anneal', 'ste', 'hard'):
    loss = lambda w, leaf, mode=mode: jnp.sum(mixture_weights(w, leaf, mode, temperature=0.1) ** 2)
    assert largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(w, leaf).jaxpr) == w.size
  assert largest(jax.make_jaxpr(fit_step)(w, leaf).jaxpr) == w.size


# K -> share of flat weights, |S - P| / |W|, share whose component is not the nearest; published start.
CONCENTRATION = {4: (0.92, 0.036, 0.077), 8: (0.94, 0.016, 0.053), 16: (0.95, 0.008, 0.028)}


@pytest.mark.parametrize('count', CONCENTRATION)
def test_the_gradient_sits_on_the_boundaries(count):
  flat, soft_to_hard, not_nearest = CONCENTRATION[count]
  w = normal_weights()
  leaf = Mixture(count, parity=True).start(w)
  assert isinstance(leaf, RawMixtureLeaf) and leaf.tau == np.float32(0.01)
  soft, backward = jax.vjp(lambda w: mixture_weights(w, leaf, 'soft'), w)
  slope = np.asarray(backward(jnp.ones_like(w))[0])
  np.testing.assert_allclose((np.abs(slope) < 1e-3).mean(), flat, atol=0.02)
  assert 0.8 <= slope.mean() <= 1.0
  chosen = np.asarray(quantize.indices(w, leaf))
  levels = quantize.codebook(leaf)
  hard = np.asarray(levels)[chosen]
  np.testing.assert_allclose(np.std(soft - hard) / 0.05, soft_to_hard, rtol=0.15)
  nearest = np.abs(np.asarray(w)[:, None] - np.asarray(levels)).argmin(1)
  np.testing.assert_allclose((nearest != chosen).mean(), not_nearest, rtol=0.15)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('mode', ['soft', 'anneal', 'ste', 'hard'])
def test_narrow_weights(mode, dtype):
  w, leaf = drawn(4, 1, dtype=np.float32)
  w = w.astype(dtype)
  found, backward = jax.vjp(
    lambda w, leaf: mixture_weights(w, leaf, mode, temperature=0.1), w, leaf
  )
  assert found.dtype == dtype
  wide = mixture_weights(w.astype(jnp.float32), leaf, mode, temperature=0.1)
  np.testing.assert_array_equal(found, wide.astype(dtype))
  dw, dleaf = backward(jnp.ones_like(found))
  assert dw.dtype == dtype and {x.dtype for x in dleaf} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize('mode', ['soft', 'ste'])
def test_batched_and_sharded(mode):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)
  leaf = drawn(5, 1, dtype=np.float32)[1]
  leaves = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), leaf)

  @jax.jit
  def both(w, leaf):
    loss = lambda w, leaf: jnp.sum(jnp.sin(mixture_weights(w, leaf, mode)))
    return (mixture_weights(w, leaf, mode), quantize.indices(w, leaf)), jax.grad(loss, (0, 1))(
      w, leaf
    )

  expected = [both(w[i], jax.tree.map(lambda x, i=i: x[i], leaves)) for i in (0, 1)]
  together = jax.vmap(both)(w, leaves)
  for i in (0, 1):
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected[i]), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=1e-5)

  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  shard = NamedSharding(mesh, PartitionSpec('data'))
  found = both(jax.device_put(w[0], shard), leaf)
  assert found[0][0].sharding.is_equivalent_to(shard, 2)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both(w[0], leaf)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_modes_that_cannot_be():
  w, leaf = drawn(4, 1, dtype=np.float32)
  with pytest.raises(ValueError, match="mode='harden' must be one of"):
    mixture_weights(w, leaf, 'harden')
  with pytest.raises(ValueError, match='needs a temperature'):
    mixture_weights(w, leaf, 'anneal')
  with pytest.raises(ValueError, match="not for 'soft'"):
    mixture_weights(w, leaf, 'soft', assignments=quantize.indices(w, leaf))
