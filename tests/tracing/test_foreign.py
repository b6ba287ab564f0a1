"""Networks other people wrote, at batches nobody traced, run by NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.exporter.passes import freeze
from fqjax.runtime import reference
from fqjax.tracing import to_graph
from tests.tracing import foreign

BATCHES = (1, 2, 3, 17)


def outputs(network, dtype):
  """JAX's own results for 17 inputs; no network here lets one input see another."""
  cast = lambda leaf: leaf.astype(dtype) if getattr(leaf, 'dtype', None) == np.float32 else leaf
  x = np.random.default_rng(3).normal(size=(max(BATCHES), *network.shape)).astype(np.float32)
  return x, jax.tree.map(
    np.asarray, eqx.filter_jit(network.apply)(jax.tree.map(cast, network.variables), cast(x))
  )


@pytest.mark.promotes('other people')
@pytest.mark.parametrize('name', foreign.NETWORKS)
def test_numpy_agrees_with_jax_for_any_batch(name):
  network = foreign.network(name)
  with jax.numpy_rank_promotion('allow'):
    example = jax.ShapeDtypeStruct((2, *network.shape), jnp.float32)
    traced = to_graph(network.apply, network.variables, example)
    x, single = outputs(network, np.float32)
    with jax.enable_x64(True):
      _, double = outputs(network, np.float64)
  parameters = {k: np.asarray(v) for k, v in traced.parameters(network.variables).items()}
  frozen = freeze(traced, network.variables)
  assert jax.tree.structure(single) == traced.outputs
  for batch in BATCHES:
    # Other images than the first ones, too.
    part = slice(17 - batch, 17)
    for graph, given in ((traced.graph, parameters), (frozen, None)):
      results = reference.run(graph, [x[part]], given)
      for got, want, exact in zip(
        results, jax.tree.leaves(single), jax.tree.leaves(double), strict=True
      ):
        assert got.shape == want[part].shape and got.dtype == want.dtype
        if got.dtype.kind != 'f':
          assert np.mean(got == want[part]) >= 0.99  # near ties may fall either way
          continue
        scale = np.abs(want).max()
        tolerance = max(1e-5, 4 * np.abs(want - exact).max() / scale)
        assert np.abs(got - want[part]).max() <= tolerance * scale
