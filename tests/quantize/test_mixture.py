"""Where mixtures begin and how they are fitted anew; bad leaves; the quantizer and its export."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fqjax import quantize
from fqjax.quantize import Mixture, MixtureLeaf, mixture_weights
from fqjax.quantize._blend import fit_step
from tests.quantize.mixtures import drawn, example, normal_weights


def test_the_start_by_clusters():
  """Shares and deviations are those of the clusters; a number instead of them is taken as it is."""
  w = normal_weights()
  leaf = Mixture(4).start(w)
  assert isinstance(leaf, MixtureLeaf)
  found = quantize.kmeans(np.asarray(w), 4)
  np.testing.assert_allclose(quantize.codebook(leaf), found.centers, rtol=1e-6)
  np.testing.assert_allclose(np.exp(leaf.log_sigma), found.sigmas, rtol=1e-5)
  np.testing.assert_allclose(leaf.pi, found.counts / w.size, rtol=1e-6)
  np.testing.assert_allclose(np.exp(leaf.log_tau), 0.01, rtol=1e-6)
  assert {x.dtype for x in leaf} == {jnp.dtype(jnp.float32)}
  np.testing.assert_allclose(np.exp(Mixture(4, sigma=0.01).start(w).log_sigma), 0.01, rtol=1e-6)
  # Masked weights are not looked at.
  mask = jnp.arange(w.size) < 50_000
  masked = Mixture(4).start(w, mask)
  for a, b in zip(masked, Mixture(4).start(w[:50_000]), strict=True):
    np.testing.assert_array_equal(a, b)


def mixture_of_sklearn(x, leaf, passes):
  mixture = pytest.importorskip('sklearn.mixture')
  peer = mixture.GaussianMixture(
    len(leaf.mu),
    covariance_type='spherical',
    tol=0,
    reg_covar=0,
    max_iter=passes,
    weights_init=np.asarray(leaf.pi),
    means_init=np.asarray(leaf.mu)[:, None],
    precisions_init=np.exp(-2 * np.asarray(leaf.log_sigma)),
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it has not converged, as asked
    return peer.fit(x[:, None])


def test_expectation_maximisation_is_that_of_scikit_learn(x64):
  rng = np.random.default_rng(0)
  x = np.concatenate([rng.normal(-1, 0.3, 300), rng.normal(0.2, 0.2, 500), rng.normal(2, 0.7, 200)])
  leaf = Mixture(3, zero=False).start(jnp.asarray(x))
  leaf = MixtureLeaf(*(a.astype(jnp.float64) for a in leaf))
  leaf = leaf._replace(pi=leaf.pi / leaf.pi.sum())
  peer = mixture_of_sklearn(x, leaf, 8)
  step = jax.jit(fit_step)
  for _ in range(8):
    leaf, error = step(jnp.asarray(x), leaf)
  np.testing.assert_allclose(leaf.mu, peer.means_[:, 0], rtol=1e-7)
  np.testing.assert_allclose(np.exp(2 * leaf.log_sigma), peer.covariances_, rtol=1e-7)
  np.testing.assert_allclose(leaf.pi, peer.weights_, rtol=1e-7)
  log_phi = quantize.responsibilities(jnp.asarray(x), leaf)
  np.testing.assert_allclose(np.exp(log_phi).T, peer.predict_proba(x[:, None]), atol=1e-8)
  # Components stand from 1 on where none is pinned.
  np.testing.assert_array_equal(quantize.indices(x, leaf) - 1, peer.predict(x[:, None]))
  phi = np.exp(log_phi)
  spread = np.sum(phi * (x - np.asarray(leaf.mu)[:, None]) ** 2) / len(x)
  np.testing.assert_allclose(step(jnp.asarray(x), leaf)[1], spread, rtol=1e-3)
  assert error > 0


def test_passes_after_the_start_raise_the_likelihood():
  x = jnp.asarray(np.random.default_rng(0).standard_t(3, 2000), jnp.float32)

  def likelihood(leaf):
    # The density of the mixture, by its definition.
    mu, sigma, pi = quantize.codebook(leaf), np.exp(leaf.log_sigma), np.asarray(leaf.pi)
    density = stats.norm.pdf(np.asarray(x)[:, None], np.asarray(mu), sigma) @ (pi / pi.sum())
    return np.log(density).mean()

  found = [likelihood(Mixture(6, em=passes).start(x)) for passes in (0, 1, 8)]
  assert found[0] < found[1] < found[2]
  leaf = Mixture(6, em=8).start(x)
  assert quantize.codebook(leaf)[0] == 0 and leaf.mu.shape == (5,)
  # A step by hard assignment, against its definition.
  before = Mixture(6).start(x)
  after, error = fit_step(x, before, kind='lloyd')
  chosen = np.asarray(quantize.indices(x, before))
  x = np.asarray(x, np.float64)
  for k in range(6):
    own = x[chosen == k]
    mean = own.mean() if k else 0.0
    np.testing.assert_allclose(quantize.codebook(after)[k], mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
      np.exp(after.log_sigma[k]), np.sqrt(np.mean((own - mean) ** 2)), rtol=1e-3
    )
    np.testing.assert_allclose(after.pi[k], len(own) / len(x), rtol=1e-5)
  squares = (x - np.asarray(quantize.codebook(after))[chosen]) ** 2
  np.testing.assert_allclose(error, squares.mean(), rtol=1e-3)


def test_a_component_without_members_starts_again():
  w = jnp.asarray(np.random.default_rng(0).normal(size=400), jnp.float32)
  leaf = Mixture(4).start(w)
  # Far from everything.
  leaf = leaf._replace(mu=leaf.mu.at[2].set(50.0), log_sigma=leaf.log_sigma.at[3].set(-3.0))
  assert 3 not in quantize.indices(w, leaf)
  for kind in ('em', 'lloyd'):
    found, first = leaf, None
    for _ in range(6):
      found, error = fit_step(w, found, kind=kind)
      first = error if first is None else first
    assert set(np.unique(quantize.indices(w, found))) == {0, 1, 2, 3}
    assert np.abs(found.mu).max() < 4 and error < first


LEAVES = {
  'constant': np.full((8, 4), 0.3),
  'zeros': np.zeros((8, 4)),
  'one weight': np.array([[0.7]]),
  'two values': np.where(np.arange(32) % 3, 0.5, -0.25).reshape(8, 4),
  'three values and zero': np.resize([0, 1, -2, 4.0], (8, 4)),
  'one outlier': np.concatenate([np.full(31, 0.01), [1e4]]).reshape(8, 4),
  'tiny': np.random.default_rng(0).normal(size=(8, 4)) * 1e-12,
  'huge': np.random.default_rng(0).normal(size=(8, 4)) * 1e12,
  'far from zero': 100 + np.random.default_rng(0).normal(size=(8, 4)) * 1e-3,
}


@pytest.mark.parametrize('quantizer', [Mixture(16), Mixture(3), Mixture(4, zero=False)], ids=repr)
@pytest.mark.parametrize('name', LEAVES)
def test_difficult_leaves_stay_finite_and_exact_where_they_can(name, quantizer):
  w = jnp.asarray(LEAVES[name], jnp.float32)
  leaf = quantizer.start(w)
  assert all(np.isfinite(np.asarray(x)).all() for x in leaf)
  scale = jnp.maximum(jnp.max(jnp.abs(w)), 1e-20)
  hard, soft, grads = look(w, leaf, scale)
  for x in jax.tree.leaves((soft, grads)):
    assert np.isfinite(np.asarray(x)).all()
  distinct = set(np.unique(LEAVES[name])) | ({0.0} if quantizer.zero else set())
  if len(distinct) <= quantizer.components:
    np.testing.assert_array_equal(hard, w)
  # Moved a little, weights still have finite levels.
  moved = look(w * 1.01 + scale * 1e-3, leaf, scale)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(moved))


@jax.jit
def look(w, leaf, scale):
  loss = lambda w, leaf: jnp.sum(mixture_weights(w, leaf, 'soft') / scale)
  soft, grads = jax.value_and_grad(loss, (0, 1))(w, leaf)
  return mixture_weights(w, leaf, 'hard'), soft, grads


def test_deviations_have_a_floor():
  """A component that training has narrowed to nothing still wins the weights nearest to it."""
  w, leaf = drawn(5, 1, dtype=np.float32)
  needles = leaf._replace(log_sigma=jnp.full(5, -200.0), pi=jnp.ones(5))
  levels = np.asarray(quantize.codebook(leaf))
  nearest = levels[np.abs(np.asarray(w)[..., None] - levels).argmin(-1)]
  np.testing.assert_array_equal(mixture_weights(w, needles, 'hard'), nearest)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(look(w, needles, 1.0)))


def test_a_cluster_of_one_is_no_needle():
  """It starts with the smallest deviation of the others, so that weights near it are its own."""
  leaf = Mixture(3).start(jnp.array([-1.0, -0.9, 0.0, 0.1, 2.0]))
  sigma = np.exp(leaf.log_sigma)
  np.testing.assert_allclose(sigma, [0.1, np.sqrt(0.005), np.sqrt(0.005)], rtol=1e-5)
  np.testing.assert_array_equal(quantize.indices(jnp.array([1.7, 2.3]), leaf), 2)


def test_weights_win_a_level_that_had_no_members():
  w = jnp.array([[0.0, 0.0, 1.0, 1.0, 1.01, -0.01]])
  leaf = Mixture(8).start(w)
  free = np.asarray(leaf.mu)[np.asarray(leaf.pi[1:]) == 0]
  assert len(free) == 4
  moved = w.at[0, 0].set(float(free[1]))
  assert mixture_weights(moved, leaf, 'hard')[0, 0] == free[1]


def test_what_is_not_finite():
  w = np.ones((4, 3), np.float32)
  for bad in (np.nan, np.inf, -np.inf):
    w[1, 2] = bad
    for mask in (None, jnp.ones((4, 3), bool)):
      with pytest.raises(ValueError, match='NaN or infinite(.|\n)*checkpoint'):
        Mixture(4).start(jnp.asarray(w), mask)
    # A run that diverges must not look pruned.
    for leaf in (example(), example(raw=True)):
      for mode in ('soft', 'anneal', 'hard', 'ste'):
        found = mixture_weights(jnp.asarray(w), leaf, mode, temperature=0.1)
        np.testing.assert_array_equal(np.isnan(found), ~np.isfinite(w), err_msg=mode)
  # Where they are masked, nobody looks.
  mask = jnp.asarray(np.isfinite(w))
  assert np.isfinite(np.asarray(Mixture(4).start(jnp.asarray(w), mask).mu)).all()


def test_as_a_quantizer():
  """Untrained, the nearest of the starting levels; with a mixture, its most responsible component."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)
  mask = jnp.asarray(rng.random((30, 20)) < 0.5)
  for quantizer in (Mixture(5), Mixture(4, zero=False)):
    table = np.asarray(quantizer.fit(w, 'IO', mask))
    assert table.shape == quantizer.codebook_shape(w.shape, 'IO') and table[0] == 0
    assert (np.diff(table[1:]) > 0).all()
    live = table if quantizer.zero else table[1:]
    nearest = live[np.abs(np.asarray(w)[..., None] - live).argmin(-1)]
    found = quantizer.project(w, 'IO', mask)
    np.testing.assert_array_equal(found, np.where(mask, nearest, 0))
    np.testing.assert_array_equal(table[quantizer.indices(w, 'IO', mask)], found)
    # About as good as on the host, to the end.
    best = quantizer.fit_exact(w, 'IO', mask)
    errors = [
      np.sum(np.square(w - quantizer.project(w, 'IO', mask, t))[mask]) for t in (table, best)
    ]
    assert errors[1] * 0.98 <= errors[0] <= errors[1] * 1.05
    traced = jax.jit(lambda w, mask, q=quantizer: q.project(w, 'IO', mask))
    np.testing.assert_allclose(traced(w, mask), found, rtol=1e-5)
    assert not np.any(jax.grad(lambda w, q=quantizer: q.project(w, 'IO', mask).sum())(w))
    twice = jax.vmap(lambda w, q=quantizer: q.project(w, 'IO'))(jnp.stack([w, w[::-1]]))
    np.testing.assert_array_equal(twice[0][::-1], twice[1])

    leaf = quantizer.start(w, mask)
    leaf = leaf._replace(log_sigma=leaf.log_sigma + jnp.linspace(-1, 1, leaf.pi.size))
    chosen = quantizer.indices(w, 'IO', mask, leaf)
    np.testing.assert_array_equal(chosen, quantize.indices(w, leaf, mask))
    hard = quantizer.project(w, 'IO', mask, leaf)
    np.testing.assert_array_equal(hard, mixture_weights(w, leaf, 'hard', mask=mask))
    assert not (np.asarray(hard) == np.asarray(found)).all()
    quantizer.check_codebook(leaf, w.shape, 'IO')
    with pytest.raises(ValueError, match='is not one of Mixture'):
      Mixture(9).check_codebook(leaf, w.shape, 'IO')
    with pytest.raises(ValueError, match=r'of K components|components they are'):
      quantizer.check_codebook(leaf._replace(pi=leaf.pi[:2]), w.shape, 'IO')
  assert (Mixture(16).index_bits, Mixture(3).index_bits, Mixture(256).index_bits) == (4, 2, 8)
  assert Mixture(2, zero=False).index_bits == 1


def test_levels_on_the_device_of_difficult_leaves():
  fit = jax.jit(Mixture(6).fit, static_argnums=1)
  for name, values in LEAVES.items():
    if values.shape != (8, 4):
      continue
    w = jnp.asarray(values, jnp.float32)
    table = np.asarray(fit(w, 'IO'))
    assert np.isfinite(table).all() and table[0] == 0 and (np.diff(table[1:]) >= 0).all()
    if len(np.unique(values)) <= 5:
      np.testing.assert_allclose(Mixture(6).project(w, 'IO'), w, rtol=1e-6, err_msg=name)
  nothing = fit(w, 'IO', jnp.zeros(w.shape, bool))
  np.testing.assert_array_equal(nothing, 0)
  # A million weights in runs: the error is that of k-means.
  w = normal_weights()
  for count, error in ((4, 0.135058), (16, 0.009602)):
    z = Mixture(count).project(w.reshape(100, -1), 'IO')
    np.testing.assert_allclose(np.mean(np.square(z.reshape(-1) - w)) / 0.0025, error, rtol=0.03)


def test_a_codebook_in_eight_bits():
  table = [-0.31, -0.22, -0.16, -0.11, -0.07, -0.04, -0.02, 0]
  table += [0.02, 0.04, 0.07, 0.11, 0.16, 0.22, 0.28, 0.35]
  integers, scale = quantize.int8_codebook(table)
  expected = [-112, -80, -58, -40, -25, -15, -7, 0, 7, 15, 25, 40, 58, 80, 102, 127]
  np.testing.assert_array_equal(integers, np.int8(expected), strict=True)
  assert np.abs(integers * np.float64(scale) - table).max() <= scale / 2 * (1 + 1e-6)
  assert quantize.int8_codebook(np.zeros(4))[1] == 1
  with pytest.raises(ValueError, match='diverged'):
    quantize.int8_codebook([0, np.nan])


@pytest.mark.parametrize('zero', [True, False])
def test_export_round_trip(zero):
  """Indices and codebook, compiled apart from the network, are its hard weights bit for bit."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(200, 150)), jnp.float32)
  mask = jnp.asarray(rng.random(w.shape) < 0.8)
  leaf = Mixture(16, zero=zero).start(w, mask)
  chosen = np.asarray(quantize.indices(w, leaf, mask))
  table = np.asarray(quantize.codebook(leaf))
  hard = jax.jit(lambda w, leaf: mixture_weights(w, leaf, 'hard', mask=mask))(w, leaf)
  np.testing.assert_array_equal(table[chosen], hard)
  np.testing.assert_array_equal(np.asarray(hard)[~np.asarray(mask)], 0)
  integers, scale = quantize.int8_codebook(table)
  error = np.abs(integers[chosen] * np.float64(scale) - hard)
  assert integers[0] == 0 and error.max() <= scale / 2 * (1 + 1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(components=2), 'components=2 must be 3..256 with zero=True: two levels of which one is'),
    (dict(components=257), '3..256'),
    (dict(components=1, zero=False), '2..255 with zero=False'),
    (dict(components=256, zero=False), '2..255'),
    (dict(sigma='em'), "sigma='em'"),
    (dict(sigma=0.0), 'positive number'),
    (dict(tau=0.0), 'tau=0.0'),
    (dict(em=9), '0..8 passes'),
    (dict(em=1, parity=True), 'parity=True'),
  ],
)
def test_settings_that_make_no_sense(settings, message):
  with pytest.raises(ValueError, match=message):
    Mixture(**settings)
