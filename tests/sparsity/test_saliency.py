"""What a weight is worth, against float64 NumPy and against the loss itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import Unstructured, fisher, loss_change, magnitude, make_plan, project, taylor
from tests.sparsity.trees import IMAGES, KINDS, net


def _regression(n=64):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(n, 5)), rng.normal(size=(5, 3))
  y = x @ rng.normal(size=(5, 3))
  loss = lambda p, batch: 0.5 * jnp.mean(jnp.sum((batch[0] @ p['w'] - batch[1]) ** 2, -1))
  return w, x, y, loss


def test_fisher_is_the_mean_of_squared_gradients():
  w, x, y, loss = _regression()
  grad = jax.jit(jax.grad(loss))
  params = {'w': jnp.asarray(w, jnp.float32), 'steps': jnp.zeros((), jnp.int32)}
  batches = [
    (jnp.asarray(x[i : i + 4], jnp.float32), jnp.asarray(y[i : i + 4], jnp.float32))
    for i in range(0, 64, 4)
  ]
  got = fisher(lambda p, b: {**grad({'w': p['w']}, b), 'steps': None}, params, iter(batches))
  want = np.mean(
    [(xb.T @ (xb @ w - yb) / 4) ** 2 for xb, yb in zip(np.split(x, 16), np.split(y, 16))], 0
  )
  np.testing.assert_allclose(got['w'], want, rtol=1e-5)
  assert got['steps'] is None


def test_loss_change_predicts_what_pruning_costs():
  # Gaussian observations with unit variance: the Fisher information is the Hessian, E[x x'].
  rng = np.random.default_rng(1)
  x = rng.normal(size=(20_000, 4)) * [1.0, 2.0, 0.5, 3.0]
  w = np.array([0.3, -0.2, 0.9, 0.05])
  y = x @ w + rng.normal(size=20_000)
  grad = jax.vmap(jax.grad(lambda w, x, y: 0.5 * (x @ w - y) ** 2), (None, 0, 0))
  per_example = np.asarray(grad(*(jnp.asarray(a, jnp.float32) for a in (w, x, y))))
  params = {'w': jnp.asarray(w, jnp.float32)}
  f = fisher(lambda p, g: {'w': g}, params, list(jnp.asarray(per_example[:2000])))
  got = np.asarray(loss_change(params, f)['w'])
  # Zeroing w_i alone raises the expected loss by w_i**2 E[x_i**2] / 2, exactly.
  exact = 0.5 * w**2 * np.array([1.0, 4.0, 0.25, 9.0])
  np.testing.assert_allclose(got, exact, rtol=0.25)  # 2000 examples
  assert np.argmin(got) == 3 and np.argmin(np.abs(w)) == 3
  assert np.argsort(got)[1] != np.argsort(np.abs(w))[1]  # not the order of magnitudes


def test_taylor_is_the_first_order_change():
  w, x, y, loss = _regression()
  batch = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
  params = {'w': jnp.asarray(w, jnp.float32)}
  got = taylor(params, jax.grad(loss)(params, batch))['w']
  step = 1e-4
  f = lambda w: 0.5 * np.mean(np.sum((x @ w - y) ** 2, -1))
  for i, j in np.ndindex(w.shape):
    shorter = w.copy()
    shorter[i, j] *= 1 - step
    np.testing.assert_allclose(got[i, j], abs(f(shorter) - f(w)) / step, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_tree(kind):
  params, apply, layout, conv, dense, weights = net(kind)
  arrays, rest = eqx.partition(params, eqx.is_inexact_array)
  loss = lambda a, x: jnp.mean(apply(eqx.combine(a, rest), x) ** 2)
  images = np.random.default_rng(3).standard_normal((2, *IMAGES)).astype(np.float32)
  grad = jax.jit(jax.grad(loss))
  f = fisher(lambda p, x: grad(eqx.filter(p, eqx.is_inexact_array), x), params, images)
  grads = grad(arrays, images[0])
  plan = make_plan(params, [(weights, Unstructured(keep=0.3))], layout=layout)

  @jax.jit  # one program instead of one for every leaf and operation
  def saliencies(arrays, grads, f):
    params = eqx.combine(arrays, rest)
    return magnitude(params), taylor(params, grads), loss_change(params, f)

  for saliency in saliencies(arrays, grads, f):
    masks = project(plan, params, saliency=saliency)[1]
    assert type(masks) is type(params)
    found = {k: v for k, v in _flat(saliency).items() if k in (conv, dense)}
    for path, s in found.items():
      mask = np.asarray(_flat(masks)[path])
      assert np.asarray(s)[mask].min() >= np.asarray(s)[~mask].max()


def _flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def test_bfloat16_is_squared_in_float32():
  params = {'w': jnp.full((2,), 1e-3, jnp.bfloat16)}
  grads = {'w': jnp.full((2,), 3e-3, jnp.bfloat16)}
  f = fisher(lambda p, b: grads, params, [0, 0, 0])
  assert (
    f['w'].dtype == taylor(params, grads)['w'].dtype == magnitude(params)['w'].dtype == jnp.float32
  )
  np.testing.assert_allclose(f['w'], float(grads['w'][0]) ** 2, rtol=1e-6)


@pytest.mark.parametrize(
  'grads, batches, message',
  [
    ({'w': jnp.ones(2)}, [], 'no batches'),
    ({'w': jnp.ones(3)}, [0], r"gradient is of another model: 'w' is \[3\]"),
    ({'v': jnp.ones(2)}, [0], "gradient is of another model: it has 'v'"),
    ({'w': None}, [0], "gradient has nothing for 'w'"),
    (
      {'w': jnp.array([1.0, jnp.nan])},
      [0, 0],
      "gradients of 'w' were NaN or infinite .* 2 batches",
    ),
  ],
)
def test_fisher_refuses(grads, batches, message):
  with pytest.raises(ValueError, match=message):
    fisher(lambda p, b: grads, {'w': jnp.ones(2)}, batches)


def test_trees_of_another_model_are_refused():
  with pytest.raises(ValueError, match=r"'w' is \[3\] there and \[2\]"):
    taylor({'w': jnp.ones(2)}, {'w': jnp.ones(3)})
  with pytest.raises(ValueError, match="has nothing for 'w'"):
    loss_change({'w': jnp.ones(2)}, {'w': None})
