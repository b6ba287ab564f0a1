"""Pruned in the forward pass, dense in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.rules._projection import projection

PyTree = Any


def straight_through(target: Any, decay: float = 0.0) -> Callable[[PyTree], PyTree]:
  """A function that prunes params for the forward pass and lets every gradient through.

  Masks are made anew at every call, so weights come and go; the trained params stay dense until
  `finalize`. Use it inside the loss: `apply(prune(params), x)`.

  Args:
    target: a plan, or a callable tree -> (tree, masks); the tree may hold levels too.
    decay: adds `decay * w` to the gradient of the weights that are pruned at the moment, which
      steadies the masks (SR-STE; 2e-4 for N:M).

  Returns:
    params -> pruned params, differentiable.

  Example:
    >>> def largest(tree):
    ...   masks = {'w': tree['w'] > 2}
    ...   return {'w': jnp.where(masks['w'], tree['w'], 0)}, masks
    >>> prune = straight_through(largest, decay=0.1)
    >>> loss = lambda params: jnp.sum(prune(params)['w'] ** 2)
    >>> print(jax.grad(loss)({'w': jnp.array([1.0, 4.0])})['w'])
    [0.1 8. ]

  Source: Bengio et al., 2013; Zhou et al., "Learning N:M fine-grained structured sparse neural
  networks from scratch", ICLR 2021 (the decay).
  """
  project = projection(target)

  @jax.custom_vjp
  def prune(params):
    return project(params)[0]

  def forward(params):
    z, masks = project(params)
    return z, (params, masks)

  def backward(saved, grads):
    params, masks = saved

    def one(g, p, m):
      if m is None or not decay:
        return g
      return g + jnp.where(m, jnp.zeros_like(p), p * jnp.asarray(decay, p.dtype))

    return (jax.tree.map(one, grads, params, masks),)

  prune.defvjp(forward, backward)
  return prune
