"""The weights that a mixture makes, and their exact gradients, without an array of K x N.

Everything runs over the components one by one and carries arrays of the weights' own shape; the
backward pass computes the forward pass again from the weights and the mixture, which are all it keeps.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fqjax.quantize._components import (
  Components,
  MixtureLeaf,
  RawMixtureLeaf,
  codebook,
  components,
  least_sigma,
  pinned,
  temperature_of,
)
from fqjax.sparsity._select import wide

MODES = ('soft', 'ste', 'anneal', 'hard', 'float')

Leaf = MixtureLeaf | RawMixtureLeaf


def responsibilities(w: jax.Array, leaf: Leaf) -> jax.Array:
  """How much each component claims of each weight, as logarithms. An array of K x N: for small N.

  Args:
    w: float array of any shape.
    leaf: the mixture.

  Returns:
    [K, *w.shape], log of the posterior; its exponentials add up to 1 along the first axis.

  Example:
    >>> leaf = Mixture(3).start(jnp.array([-1.0, -0.9, 0.0, 0.1, 2.0]))
    >>> print(jnp.exp(responsibilities(jnp.array([0.1, 1.9]), leaf)).round(3))
    [[1. 0.]
     [0. 0.]
     [0. 1.]]
  """
  w = w.astype(wide(w.dtype))
  parts = components(w, leaf)
  found = jax.vmap(lambda part: _log_density(w, part))(parts)
  return found - jax.nn.logsumexp(found, 0, keepdims=True)


def indices(w: jax.Array, leaf: Leaf, mask: jax.Array | None = None) -> jax.Array:
  """Entry of `codebook(leaf)` that each weight takes: that of its most responsible component.

  Not the nearest level: deviations and shares shift the boundaries.

  Args:
    w: float array of any shape.
    leaf: the mixture.
    mask: bool like `w`, True lives; the others get index 0.

  Returns:
    uint8 like `w`.

  Example:
    >>> leaf = Mixture(3).start(jnp.array([-1.0, -0.9, 0.0, 0.1, 2.0]))
    >>> print(indices(jnp.array([0.1, 1.9]), leaf))
    [0 2]
  """
  # The mixture too, or differentiating the loop would store what it saw at every component.
  w, leaf = lax.stop_gradient((w, leaf))
  w = w.astype(wide(w.dtype))
  parts = components(w, leaf)
  first = 0 if pinned(leaf) else 1

  def body(carry, part):
    best, found = carry
    number, part = part
    log_density = _log_density(w, part)
    better = log_density > best
    return jnp.where(better, log_density, best), jnp.where(better, number, found)

  numbers = jnp.arange(first, first + parts.mu.size, dtype=jnp.uint8)
  start = jnp.full_like(w, -jnp.inf), jnp.full_like(w, first, dtype=jnp.uint8)
  found = _each(body, start, (numbers, parts))[1]
  return found if mask is None else jnp.where(mask, found, jnp.zeros_like(found))


def mixture_weights(
  w: jax.Array,
  leaf: Leaf,
  mode: str,
  *,
  mask: jax.Array | None = None,
  temperature: Any = None,
  assignments: jax.Array | None = None,
) -> jax.Array:
  """The weights of one leaf as the network sees them; `effective_params` does it for a tree.

  Args:
    w: float leaf of any shape.
    leaf: its mixture.
    mode: static. 'soft': means weighted by a softmax of the responsibilities over the temperature,
      the published training weight. 'anneal': by a softmax of their logarithms over the temperature;
      the posterior mean at 1, the hard weights towards 0. 'hard': the mean of the most
      responsible component; its gradient goes to the means. 'ste': as 'hard', and the gradient goes
      to the weight too, unchanged. 'float': the weight itself.
    mask: bool like `w`, True lives; the others are exactly 0 and without gradient.
    temperature: of 'soft' (the mixture's own by default) and 'anneal'; a number or a traced scalar.
    assignments: uint8 from `indices`, for 'hard' and 'ste' with frozen assignments.

  Returns:
    Like `w`. NaN where `w` is NaN or infinite.

  Raises:
    ValueError: for another mode, or 'anneal' without a temperature.

  Example:
    >>> leaf = Mixture(3).start(jnp.array([-1.0, -0.9, 0.0, 0.1, 2.0]))
    >>> print(mixture_weights(jnp.array([0.1, 1.9]), leaf, 'hard'))
    [0. 2.]
  """
  if mode not in MODES:
    raise ValueError(f'mode={mode!r} must be one of {MODES}.')
  x = w.astype(wide(w.dtype))
  found: Any
  if mode == 'float':
    found = x
  elif mode in ('soft', 'anneal'):
    if assignments is not None:
      raise ValueError(f"assignments are for the modes 'hard' and 'ste', not for {mode!r}.")
    if temperature is None and mode == 'anneal':
      raise ValueError("mode 'anneal' needs a temperature: let it fall from 1 to 0.05, say.")
    given = temperature_of(leaf) if temperature is None else jnp.asarray(temperature)
    found = _blend(mode, x, components(x, leaf), given.astype(x.dtype))
  else:
    chosen = indices(x, leaf) if assignments is None else assignments
    value = _choose(codebook(leaf).astype(x.dtype), chosen)
    fixed = lax.stop_gradient(x)
    # Adds 0, and keeps NaN: a run that has diverged must not look pruned.
    found = value + ((x if mode == 'ste' else fixed) - fixed)
  found = found.astype(w.dtype)
  return found if mask is None else jnp.where(mask, found, jnp.zeros_like(found))


def fit_step(
  w: jax.Array, leaf: Leaf, mask: jax.Array | None = None, kind: str = 'em'
) -> tuple[Leaf, jax.Array]:
  """One pass of expectation-maximisation, or of Lloyd's iteration, on the mixture of a leaf.

  The pinned component stays at zero; the temperature is left alone. One component with less than
  half a member starts again beside the one with the largest squared error, and takes half its share.

  Args:
    w: float leaf.
    leaf: its mixture.
    mask: bool like `w`, True lives; the others are not looked at.
    kind: 'em' shares weights out by responsibility, 'lloyd' gives each to its most responsible
      component.

  Returns:
    leaf: the new mixture, of the same kind and dtypes.
    error: float32 scalar, mean squared distance of the weights to the new means they are shared to.
  """
  w, leaf = lax.stop_gradient((w, leaf))
  w = w.astype(wide(w.dtype))
  parts = components(w, leaf)
  live = jnp.ones_like(w, dtype=bool) if mask is None else mask
  number = jnp.arange(parts.mu.size, dtype=jnp.uint8)
  if kind == 'em':
    _, total = _evidence(w, parts)
    claim: Callable = lambda i, part: jnp.exp(_log_density(w, part) - total)
  else:
    chosen = indices(w, leaf) - jnp.uint8(0 if pinned(leaf) else 1)
    claim = lambda i, part: (chosen == i).astype(w.dtype)

  def body(_, xs):
    i, part = xs
    phi = jnp.where(live, claim(i, part), jnp.zeros_like(w))
    # About the old mean: sums of small numbers.
    away = jnp.where(live, w - part.mu, jnp.zeros_like(w))
    return None, (jnp.sum(phi), jnp.sum(phi * away), jnp.sum(phi * jnp.square(away)))

  n, first, second = lax.scan(body, None, (number, parts))[1]
  safe = jnp.maximum(n, 1e-12)
  shift = first / safe
  if pinned(leaf):
    shift = shift.at[0].set(0)
  variance = jnp.maximum(second / safe - shift * (2 * first / safe - shift), 0)
  whole = jnp.maximum(jnp.sum(n), 1)
  error = jnp.sum(n * variance) / whole
  floor = least_sigma(w)
  sigma = jnp.maximum(jnp.sqrt(variance), floor)
  mu, sigma, pi = _revive(parts.mu + shift, sigma, n / whole, whole, floor, int(pinned(leaf)))
  if isinstance(leaf, MixtureLeaf):
    sigma = jnp.log(sigma)
  new = type(leaf)(mu[int(pinned(leaf)) :], sigma, pi, leaf[3])
  new = type(leaf)(*(a.astype(b.dtype) for a, b in zip(new, leaf, strict=True)))
  return new, error.astype(jnp.float32)


def _revive(mu, sigma, pi, whole, floor, first: int):
  """Gives one component without members half of the one with the largest squared error."""
  spread = pi * jnp.square(sigma)
  worst = jnp.argmax(spread)
  least = jnp.argmin(pi[first:]) + first
  # Where every weight has a level, those left over stay in their gaps.
  due = (pi[least] * whole < 0.5) & (pi[worst] * whole >= 2) & (sigma[worst] > 2 * floor)
  place = mu[worst] + sigma[worst]
  half = pi[worst] / 2
  changed = (
    mu.at[least].set(place),
    sigma.at[least].set(sigma[worst]),
    pi.at[least].set(half).at[worst].set(half),
  )
  return tuple(jnp.where(due, a, b) for a, b in zip(changed, (mu, sigma, pi), strict=True))


def _log_density(w, part: Components):
  return part.bias - jnp.square((w - part.mu) * part.scale) / 2


def _each(body, start, parts):
  """The carry of a loop over components."""
  return lax.scan(lambda c, x: (body(c, x), None), start, parts)[0]


def _evidence(w, parts: Components):
  """Largest log density of each weight, and the logarithm of their sum."""

  def body(carry, part):
    peak, total = carry
    log_density = _log_density(w, part)
    # One exponential a component; it may be of -inf, the start, never of a difference of such.
    ratio = jnp.exp(-jnp.abs(log_density - peak))
    higher = log_density > peak
    total = jnp.where(higher, total * ratio + 1, total + ratio)
    return jnp.maximum(peak, log_density), total

  peak, total = _each(body, (jnp.full_like(w, -jnp.inf), jnp.zeros_like(w)), parts)
  return peak, peak + jnp.log(total)


def _logits(mode, w, parts):
  """What the softmax is of: a function of one component, and its largest value."""
  peak, total = _evidence(w, parts)
  if mode == 'soft':
    return lambda part: jnp.exp(_log_density(w, part) - total), jnp.exp(peak - total)
  return lambda part: _log_density(w, part) - peak, jnp.zeros_like(w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(mode: str, w, parts: Components, temperature):
  """Means weighted by softmax(logits / temperature)."""
  logit, top = _logits(mode, w, parts)

  def body(carry, part):
    mass, sum_ = carry
    e = jnp.exp((logit(part) - top) / temperature)
    return mass + e, sum_ + e * part.mu

  zero = jnp.zeros_like(w)
  mass, sum_ = _each(body, (zero, zero), parts)
  return sum_ / mass


def _blend_forward(mode, w, parts, temperature):
  return _blend(mode, w, parts, temperature), (w, parts, temperature)


def _blend_backward(mode, saved, g):
  # The barrier keeps this from being merged with the forward pass, whose arrays would then be held.
  (w, parts, temperature), g = lax.optimization_barrier((saved, g))
  logit, top = _logits(mode, w, parts)
  soft = mode == 'soft'
  # Products, not quotients: a compiler may compute those anew where they are read, and store nothing.
  cold = 1 / temperature

  def sums(carry, part):
    mass, sum_, claimed, claimed_sum = carry
    u = logit(part)
    e = jnp.exp((u - top) * cold)
    mass, sum_ = mass + e, sum_ + e * part.mu
    if soft:  # else nobody reads them
      claimed, claimed_sum = claimed + e * u, claimed_sum + e * u * part.mu
    return mass, sum_, claimed, claimed_sum

  zero = jnp.zeros_like(w)
  mass, sum_, claimed, claimed_sum = _each(sums, (zero,) * 4, parts)
  value = sum_ / mass
  # Sum over components of phi times the derivative of the value by phi.
  mean = (claimed_sum - value * claimed) / mass * cold
  whole = top * cold + jnp.log(mass)

  def body(dw, part):
    u = logit(part)
    r = jnp.exp(u * cold - whole)
    by_logit = r * (part.mu - value) * cold
    by_log_density = g * (u * (by_logit - mean) if soft else by_logit)
    away = (w - part.mu) * part.scale
    pull = by_log_density * away
    sums = Components(
      jnp.sum(g * r + pull * part.scale),
      -jnp.sum(pull * (w - part.mu)),
      jnp.sum(by_log_density),
    )
    return dw - pull * part.scale, (sums, -jnp.sum(g * by_logit * u) * cold)

  dw, (dparts, dtemperature) = lax.scan(body, zero, parts)
  return dw, dparts, jnp.sum(dtemperature)


_blend.defvjp(_blend_forward, _blend_backward)


@jax.custom_vjp
def _choose(levels, chosen):
  return levels.at[chosen].get(mode='clip')


def _choose_forward(levels, chosen):
  return _choose(levels, chosen), (levels, chosen)


def _choose_backward(saved, g):
  levels, chosen = saved
  # By sums: scattering millions of numbers into a few places is slow and does not shard.
  number = jnp.arange(levels.size, dtype=jnp.uint8)
  count = lambda _, i: (None, jnp.sum(jnp.where(chosen == i, g, jnp.zeros_like(g))))
  return lax.scan(count, None, number)[1], None


_choose.defvjp(_choose_forward, _choose_backward)
