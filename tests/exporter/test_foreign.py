"""Networks other people wrote leave JAX whole: to a file, and to ONNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax import runtime
from tests.tracing import foreign


def differences(results, wants):
  """Per array the largest difference over the largest value; 0 or 1 for what is not float."""
  pairs = zip(jax.tree.leaves(results), jax.tree.leaves(wants), strict=True)
  for got, want in pairs:
    want = np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.dtype.kind == 'f':
      yield np.abs(got - want).max() / np.abs(want).max()
    else:
      yield float(np.mean(got == want) < 0.99)


@pytest.mark.promotes('other people')
@pytest.mark.parametrize('name', foreign.NETWORKS)
def test_to_a_file_and_to_onnx(name, tmp_path):
  network = foreign.network(name)
  with jax.numpy_rank_promotion('allow'):
    example = jax.ShapeDtypeStruct((2, *network.shape), jnp.float32)
    artifact = fqjax.export(network.apply, network.variables, example)
    x = np.random.default_rng(3).normal(size=(3, *network.shape)).astype(np.float32)
    want = network.apply(network.variables, x)
  model = runtime.load(artifact.save(tmp_path / 'model.fqx'))
  result = model(x)
  # The tolerance against float64 is that of tests/tracing/test_foreign.py, on the same graphs.
  assert max(differences(result, want)) < 1e-3
  assert jax.tree.structure(result) == jax.tree.structure(want)
  # Nothing depends on the place in the batch.
  alone = model(x[1:2])
  assert max(differences(alone, jax.tree.map(lambda y: y[1:2], result))) < 1e-4

  onnxruntime = pytest.importorskip('onnxruntime')
  pytest.importorskip('onnx')
  artifact.to_onnx(tmp_path / 'model.onnx')
  session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
  found = session.run(None, {session.get_inputs()[0].name: x})
  assert max(differences(found, jax.tree.leaves(result))) < 1e-3
