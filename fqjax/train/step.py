"""The training step, the evaluation step, and exact evaluation over a padded pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from fqjax.rules import mask_averages
from fqjax.train.mesh import batch_sharding, replicate, replicated_sharding, shard_batch
from fqjax.train.state import Averages, TrainState

PyTree = Any
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, tuple[PyTree, dict]]]
EvalFn = Callable[[PyTree, PyTree, PyTree], Mapping[str, jax.Array]]


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh | None = None,
  accumulate: int = 1,
  ema_decay: float | Callable[[jax.Array], Any] | None = None,
  state_sharding: Any = None,
) -> 'TrainStep':
  """Makes the one jitted, sharded, donated training step.

  The batch is split over the mesh's first axis, the state replicated; sums over the batch are global, so
  the result does not depend on the number of devices (to float rounding). Batch-norm statistics inside
  `loss_fn` are global too, unless the model groups them.

  With `accumulate=k` the batch is cut into k microbatches that run one after the other; gradients
  and metrics are averaged, the optimizer steps once. For a `loss_fn` that is a mean over examples
  this equals one big batch. Batch norm is the exception: it normalises each microbatch by its own
  statistics, and its running averages move k times per step.

  Args:
    loss_fn: `(params, model_state, batch, key) -> (loss, (model_state, metrics))`, the loss and
      metrics scalar means over the batch.
    tx: any optax transformation; clipping and decay are its business.
    mesh: all devices by default.
    accumulate: number of microbatches; examples per device must be divisible by it.
    ema_decay: decay of the averages in `state.ema`, a number or a function of the step.
    state_sharding: shardings of the state (a prefix of its tree); replicated by default.

  Returns:
    `step(state, batch) -> (state, metrics)`, one compiled program. The state passed in is donated and
    must not be used again. A batch of host arrays is this process's part. Metrics are those of
    `loss_fn` plus `loss` and `grad_norm`.

  Raises:
    ValueError: for `accumulate < 1`; when called, if the batch does not divide, if `state.ema` and
      `ema_decay` do not go together, or if `loss_fn` changes the structure of `model_state`.

  Examples:
    >>> def loss_fn(params, model_state, batch, key):
    ...   loss = jnp.mean((batch['x'] @ params['w'] - batch['y']) ** 2)
    ...   return loss, (model_state, {})
    >>> from fqjax.train import create_state, make_mesh
    >>> tx = optax.sgd(0.1)
    >>> state = create_state({'w': jnp.zeros(2)}, {}, tx, jax.random.key(0))
    >>> step = make_train_step(loss_fn, tx, mesh=make_mesh(1))
    >>> state, metrics = step(state, {'x': jnp.eye(2), 'y': jnp.ones(2)})
    >>> print(state.params['w'], metrics['loss'])
    [0.1 0.1] 1.0
  """
  if accumulate < 1:
    raise ValueError(f'accumulate counts microbatches and must be >= 1, got {accumulate}.')
  batches = batch_sharding(mesh)
  replicated = replicated_sharding(mesh)
  states = replicated if state_sharding is None else state_sharding
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
    _check_ema(state, ema_decay)
    key = jax.random.fold_in(state.key, state.step)
    if accumulate == 1:
      (loss, (model_state, metrics)), grads = grad_fn(state.params, state.model_state, batch, key)
    else:
      loss, model_state, metrics, grads = _accumulated(
        grad_fn, state, batch, key, accumulate, batches
      )
    _check_same(state.model_state, model_state)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
      ema = _average(ema, Averages(params, model_state), decay)
      # Averages begun before the masks hold what has died since.
      ema = ema._replace(params=mask_averages(ema.params, opt_state))
    metrics = {**metrics, 'loss': loss, 'grad_norm': optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, model_state, opt_state, ema, state.key), metrics

  jitted = jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(states, batches),
    out_shardings=(states, replicated),
  )
  return TrainStep(jitted, batches.mesh, state_sharding)


class TrainStep:
  """What `make_train_step` returns: `step(state, batch) -> (state, metrics)`.

  Puts the state and host batches onto the mesh when they are not there yet. Arrays of no mesh are of
  another type to JAX: the jitted function alone would compile once for the fresh state and once more
  for the state it returns.

  Attributes:
    mesh: the devices it runs on.
    lower: `lower(state, batch)`, the `jax.jit` function's, to look at the compiled program.
  """

  def __init__(self, jitted: Any, mesh: Any, state_sharding: Any = None):
    self.mesh = mesh
    self._jitted = jitted
    self._sharding = state_sharding
    self._batches = batch_sharding(mesh)

  def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one step."""
    if state.step.is_deleted():
      raise RuntimeError(
        'this state was donated to an earlier step and is deleted.'
        ' Write state, metrics = step(state, batch) and go on with the state it returns.'
      )
    sharding = state.step.sharding
    if not (isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh):
      placed = replicate(state, self.mesh)
      state = placed if self._sharding is None else jax.device_put(placed, self._sharding)
    if any(getattr(x, 'sharding', None) != self._batches for x in jax.tree.leaves(batch)):
      batch = shard_batch(batch, self.mesh)
    return self._jitted(state, batch)

  def lower(self, state: PyTree, batch: PyTree) -> Any:
    """Lowers for arrays or `jax.ShapeDtypeStruct`s; runs nothing."""
    return self._jitted.lower(state, batch)


def make_eval_step(
  eval_fn: EvalFn, *, mesh: Mesh | None = None, state_sharding: Any = None
) -> Callable[[PyTree, PyTree, PyTree], Mapping[str, jax.Array]]:
  """Makes the jitted, sharded evaluation step.

  Args:
    eval_fn: `(params, model_state, batch) -> dict` of sums over the batch, padding masked out
      (`batch['mask']`), with `count` the number of real examples. Sums may be arrays (a confusion
      matrix).
    mesh: all devices by default.
    state_sharding: pair of shardings of `params` and `model_state`; replicated by default.

  Returns:
    `eval_step(params, model_state, batch) -> dict`, a `jax.jit` function.

  Examples:
    >>> def eval_fn(params, model_state, batch):
    ...   hit = jnp.where(jnp.argmax(batch['x'] @ params, -1) == batch['label'], batch['mask'], 0)
    ...   return {'top1': jnp.sum(hit), 'count': jnp.sum(batch['mask'])}
    >>> from fqjax.train import make_mesh
    >>> eval_step = make_eval_step(eval_fn, mesh=make_mesh(1))
    >>> batch = {'x': jnp.eye(2), 'label': jnp.array([0, 0]), 'mask': jnp.ones(2)}
    >>> print(eval_step(jnp.eye(2), {}, batch)['top1'])
    1.0
  """
  replicated = replicated_sharding(mesh)
  params, model_state = (replicated, replicated) if state_sharding is None else state_sharding
  return jax.jit(
    eval_fn,
    in_shardings=(params, model_state, batch_sharding(mesh)),
    out_shardings=replicated,
  )


def evaluate(
  eval_step: Callable[[PyTree, PyTree, PyTree], Mapping[str, jax.Array]],
  state: TrainState,
  loader: Iterable[PyTree],
  mesh: Mesh | None = None,
  use_ema: bool = False,
) -> dict[str, Any]:
  """Averages masked sums over one pass of a loader, exactly.

  Args:
    eval_step: of `make_eval_step`.
    state: the `TrainState` to evaluate.
    loader: one pass of process-local batches, the last one padded; every process yields the same
      number.
    mesh: the mesh of `eval_step`.
    use_ema: evaluate `state.ema` instead of the raw parameters.

  Returns:
    A dict of means (float, or float64 NumPy arrays for array sums) and `count`, the number of
    examples seen.

  Raises:
    ValueError: if a batch is not divisible by the number of devices, `count` is missing or zero, or
      `use_ema` finds no averages.

  Examples:
    >>> from fqjax.train import create_state, make_mesh
    >>> state = create_state({}, {}, optax.sgd(0.1), jax.random.key(0))
    >>> eval_fn = lambda p, s, b: {'x': jnp.sum(b['x'] * b['mask']), 'count': jnp.sum(b['mask'])}
    >>> eval_step = make_eval_step(eval_fn, mesh=make_mesh(1))
    >>> batches = [{'x': np.float32([1, 3]), 'mask': np.float32([1, 0])}]
    >>> evaluate(eval_step, state, batches, make_mesh(1))
    {'count': 1.0, 'x': 1.0}
  """
  source = state.ema if use_ema else state
  if source is None:
    raise ValueError(
      'evaluate(use_ema=True) needs averages: create_state(..., ema=True) and'
      ' make_train_step(..., ema_decay=0.999).'
    )
  totals: dict[str, Any] = {}
  waiting = None

  def add(sums):
    # float64 on the host: float32 sums stop counting single examples at 2**24.
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)

  for batch in loader:
    sums = eval_step(source.params, source.model_state, shard_batch(batch, mesh))
    if waiting is not None:  # one batch behind, so fetching never idles the device
      add(waiting)
    waiting = sums
  if waiting is None:
    raise ValueError('evaluate got no batch: the loader is empty (or its one pass is used up).')
  add(waiting)
  if 'count' not in totals:
    raise ValueError(
      f"the evaluation function returned {sorted(totals)} without 'count'."
      " Add 'count': jnp.sum(batch['mask']), the number of real examples."
    )
  count = float(totals.pop('count'))
  if count == 0:
    raise ValueError('evaluate saw no real example: every mask is 0.')
  means = {name: value / count for name, value in totals.items()}
  means['count'] = count
  return {k: v if np.ndim(v) else float(v) for k, v in sorted(means.items())}


def _accumulated(grad_fn, state, batch, key, accumulate, sharding: NamedSharding):
  """Loss, model state, metrics and gradients averaged over microbatches."""
  devices = sharding.mesh.shape[sharding.mesh.axis_names[0]]

  def split(path, x):
    if x.shape[0] % (devices * accumulate):
      name = jax.tree_util.keystr(path, simple=True, separator='/') or 'the batch'
      raise ValueError(
        f'accumulate={accumulate} on {devices} devices needs a batch divisible by'
        f' {devices * accumulate}, got {name}: {list(x.shape)}.'
      )
    # Row i goes to microbatch i % accumulate: every device keeps its own rows, nothing moves.
    x = x.reshape((x.shape[0] // accumulate, accumulate) + x.shape[1:]).swapaxes(0, 1)
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))

  micro = jax.tree.map_with_path(split, batch)
  first = jax.tree.map(lambda x: x[0], micro)
  (loss, (_, metrics)), grads = jax.eval_shape(grad_fn, state.params, state.model_state, first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, grads))

  def body(carry, item):
    model_state, total = carry
    index, microbatch = item
    (loss, (new_model_state, metrics)), grads = grad_fn(
      state.params, model_state, microbatch, jax.random.fold_in(key, index)
    )
    _check_same(model_state, new_model_state)
    return (new_model_state, jax.tree.map(jnp.add, total, (loss, metrics, grads))), None

  indices = jnp.arange(accumulate, dtype=jnp.uint32)
  (model_state, total), _ = jax.lax.scan(body, (state.model_state, zeros), (indices, micro))
  loss, metrics, grads = jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)
  return loss, model_state, metrics, grads


def _average(old: Averages, new: Averages, decay: Any) -> Averages:
  def average(a, x):
    if not jnp.issubdtype(a.dtype, jnp.inexact):
      return x  # counters have no average
    return a + (x - a) * (1 - jnp.asarray(decay, a.dtype))

  return jax.tree.map(average, old, new)


def _check_ema(state: TrainState, ema_decay: Any) -> None:
  if state.ema is None and ema_decay is not None:
    raise ValueError(
      f'ema_decay={ema_decay} needs averages in the state: create_state(..., ema=True).'
    )
  if state.ema is not None and ema_decay is None:
    raise ValueError(
      'the state holds averages but the step would never move them:'
      ' make_train_step(..., ema_decay=0.999), or create_state(..., ema=False).'
    )


def _check_same(old: PyTree, new: PyTree) -> None:
  """A model state that changes its form would compile the step again, or not run at all."""

  def describe(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): f'{x.dtype}{list(x.shape)}'
      for path, x in leaves
    }

  before, after = describe(old), describe(new)
  kinds = jax.tree.structure(old), jax.tree.structure(new)
  if kinds[0] == kinds[1] and before == after:
    return
  lines = [
    f'  {name}: {before.get(name, "absent")} -> {after.get(name, "absent")}'
    for name in sorted({**before, **after})
    if before.get(name) != after.get(name)
  ] or [f'  {kinds[0]}', f'  -> {kinds[1]}']
  raise ValueError(
    'loss_fn returned a model_state unlike the one it got:\n'
    + '\n'.join(lines[:5])
    + f'\n  ({len(lines)} lines.) Return every collection of the state, with its dtypes.'
  )
