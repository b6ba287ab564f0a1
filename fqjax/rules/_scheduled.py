"""Pruning while training: gradually along a polynomial, or at one step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fqjax.rules._projection import projection
from fqjax.rules._pruned import pruned
from fqjax.rules._tree import covered, magnitude, wide
from fqjax.sparsity import top_k_mask

PyTree = Any
Score = str | Callable[[PyTree, PyTree, jax.Array], PyTree]


def gradual(
  inner: optax.GradientTransformation,
  target: Any,
  *,
  begin: int,
  end: int,
  every: int,
  power: float = 3.0,
  score: Score = 'magnitude',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Prunes while training: of what the target will remove, ever more is gone.

  Masks are renewed at `begin`, every `every` updates, and at `end`. The removed share is
  `1 - (1 - t)**power` of the final one, t from 0 at `begin` to 1 at `end`, where the masks are those
  of the target. On the way every leaf keeps what the target would keep now, and the best ranked of
  the rest: for unstructured targets classical gradual magnitude pruning. Dead weights stay dead.

  To remove whole groups at a time, give a sequence of targets, one for each renewal, e.g. plans with
  the fractions of `polynomial`.

  Args:
    inner: the optimizer.
    target: a plan, a callable tree -> (tree, masks), or a sequence of one for each renewal.
    begin: updates before the first renewal.
    end: updates before the last one.
    every: updates between renewals.
    power: 3 prunes fast at first; 1 is linear.
    score: what ranks weights: 'magnitude'; 'saliency', |w| times |gradient| of that one step;
      'fisher', w^2 times the second moment of its gradient, which `inner` has to keep (Adam and its
      kin); 'random'; or a function (params, gradients, key) -> tree of scores >= 0 like the params.
      For plain callables as targets the scores are shown as the magnitudes whose squares they are.
    seed: of 'random' and of the keys given to `score`.

  Returns:
    The optimizer inside the masks; see `PrunedState`.

  Raises:
    ValueError: for settings that make no sense.

  Example:
    >>> from fqjax.sparsity import top_k_mask
    >>> def largest(tree):
    ...   masks = {'w': top_k_mask(jnp.abs(tree['w']), 2)}
    ...   return tree, masks
    >>> tx = gradual(optax.sgd(0.0), largest, begin=1, end=3, every=1, power=1)
    >>> params = {'w': jnp.array([1.0, 4.0, 3.0, 2.0])}
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...   updates, state = tx.update(params, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(params['w'])
    [1. 4. 3. 2.]
    [1. 4. 3. 2.]
    [0. 4. 3. 2.]
    [0. 4. 3. 0.]

  Source: Zhu and Gupta, "To prune, or not to prune", 2017.
  """
  if not 0 <= begin <= end or every < 1:
    raise ValueError(f'gradual needs 0 <= begin <= end, every >= 1; got {begin}, {end}, {every}.')
  rank = scorer(score, seed)
  rungs = None
  if isinstance(target, Sequence):
    renewals = len(renewal_steps(begin, end, every))
    if len(target) != renewals:
      raise ValueError(
        f'gradual renews {renewals} times ({begin} to {end} every {every}) but has {len(target)}'
        ' targets; give one for each.'
      )
    rungs = [projection(t) for t in target]
  last = rungs[-1] if rungs else projection(target)

  def init_masks(params):
    shapes = jax.eval_shape(lambda p: last(p)[1], params)
    return covered(lambda p, _: jnp.ones_like(p, dtype=bool), params, shapes)

  def due(count):
    inside = (count >= begin) & (count <= end)
    return inside & (((count - begin) % every == 0) | (count == end))

  def refresh(count, masks, params, grads, inner_state):
    scores = rank(count, params, grads, inner_state)
    dead = covered(lambda _, m: ~m, params, masks)

    def select(project):
      return lambda: project(params, saliency=scores, frozen=dead)[1]

    if rungs:
      number = jnp.where(count == end, len(rungs) - 1, (count - begin) // every)
      return lax.switch(number, [select(p) for p in rungs])
    final = select(last)()
    progress = (count - begin).astype(jnp.float32) / max(end - begin, 1)
    left = jnp.where(count == end, 0.0, (1.0 - progress) ** power)
    by = params if scores is None else scores

    def path(w, alive, final):
      rest = alive & ~final
      spare = jnp.round(left * jnp.sum(~final, dtype=jnp.float32)).astype(jnp.int32)
      return final | (rest & top_k_mask(jnp.where(rest, magnitude(w), -1), spare))

    return covered(path, by, masks, final)

  return pruned(inner, init_masks, due, refresh)


def one_shot(
  inner: optax.GradientTransformation,
  target: Any,
  at: int = 0,
  *,
  score: Score = 'magnitude',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Trains dense for `at` updates, prunes once, and trains the survivors.

  Args:
    inner: the optimizer.
    target: a plan, or a callable tree -> (tree, masks).
    at: updates before the cut.
    score: as in `gradual`.
    seed: as in `gradual`.

  Returns:
    The optimizer inside the masks; see `PrunedState`.

  Example:
    >>> largest = lambda tree: (tree, {'w': tree['w'] > 2})
    >>> tx = one_shot(optax.sgd(0.0), largest)
    >>> params = {'w': jnp.array([1.0, 4.0])}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['w'])
    [0. 4.]
  """
  return gradual(inner, target, begin=at, end=at, every=1, score=score, seed=seed)


def polynomial(
  keep: float, renewals: int, *, start: float = 1.0, power: float = 3.0
) -> list[float]:
  """Kept fractions of a gradual run, one for each renewal.

  Args:
    keep: the last one.
    renewals: how many.
    start: the first one.
    power: 3 prunes fast at first; 1 is linear.

  Returns:
    Falling fractions; a single one is `keep`.

  Raises:
    ValueError: for fractions outside 0 < keep <= start <= 1 or no renewal.

  Example:
    >>> polynomial(0.2, 5, power=1)
    [1.0, 0.8, 0.6, 0.4, 0.2]

  Source: Zhu and Gupta, "To prune, or not to prune", 2017, eq. 1.
  """
  if not 0 < keep <= start <= 1 or renewals < 1:
    raise ValueError(
      f'polynomial needs 0 < keep <= start <= 1 and renewals >= 1; got {keep}, {start}, {renewals}.'
    )
  steps = [(i + 1 if renewals == 1 else i) / max(renewals - 1, 1) for i in range(renewals)]
  return [round(keep + (start - keep) * (1 - t) ** power, 12) for t in steps]


def renewal_steps(begin: int, end: int, every: int) -> list[int]:
  """Counts at which masks are renewed: from `begin` in strides, and `end`."""
  steps = list(range(begin, end + 1, every))
  return steps if steps[-1] == end else [*steps, end]


def scorer(score: Score, seed: int) -> Callable[[jax.Array, PyTree, PyTree, PyTree], PyTree | None]:
  """Scores as `(count, params, gradients, state of the optimizer) -> tree`; None: the magnitudes."""

  def key(count):
    return jax.random.fold_in(jax.random.key(seed), count)

  if score == 'magnitude':
    return lambda count, params, grads, state: None
  if score == 'saliency':
    return lambda count, params, grads, state: jax.tree.map(
      lambda p, g: magnitude(p) * magnitude(g).astype(wide(p)), params, grads
    )
  if score == 'fisher':
    return lambda count, params, grads, state: jax.tree.map(
      lambda p, v: jnp.square(magnitude(p)) * v.astype(wide(p)), params, second_moments(state)
    )
  if score == 'random':
    return lambda count, params, grads, state: uniform(key(count), params)
  if not callable(score):
    raise ValueError(
      f"score={score!r} must be 'magnitude', 'saliency', 'fisher', 'random' or a function"
      ' (params, gradients, key) -> tree.'
    )
  return lambda count, params, grads, state: score(params, grads, key(count))


def second_moments(state: PyTree) -> PyTree:
  """Second moments of the gradients, like the params, from the state of Adam or its kin.

  Args:
    state: of the optimizer, however it is chained or wrapped.

  Raises:
    ValueError: it keeps none, or several.
  """
  found = [moments for _, moments in optax.tree_utils.tree_get_all_with_path(state, 'nu')]
  if len(found) != 1:
    raise ValueError(
      f"score='fisher' needs an optimizer with one tree of second moments ('nu', as in optax.adam); "
      f'this one has {len(found)}.'
    )
  return found[0]


def uniform(key: jax.Array, params: PyTree) -> PyTree:
  """Random scores in (0, 1], float32."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  drawn = [1.0 - jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return structure.unflatten(drawn)
