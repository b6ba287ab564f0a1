"""Train, pull, cut, retrain, count bytes: what the experiments on pruning share.

A *phase* is one training run of a task (`experiments.tasks`) with a folder of its own: killed, it
goes on from its last checkpoint; finished, it is read back. `climb` strings phases together: for
every rung of a ladder of plans ADMM, hard projection and retraining of the survivors. Batch-norm
statistics are taken anew, on training images, before anything is scored.
"""

from collections.abc import Callable, Iterator, Sequence, Set
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.harness import alone, load_tree, save_arrays, save_tree, say
from experiments.tasks import Task, Variables
from fqjax import rules, sparsity, train

PyTree = Any

# Of a watched phase without a target; one with a target is looked at with every refresh.
_LOOKS = 20


# ---------------------------------------------------------------------------- recipes


def recipe(**fields) -> ml_collections.ConfigDict:
  """How one phase trains: every field with its default, for configs."""
  config = ml_collections.ConfigDict()
  config.optimizer = 'sgd'  # 'adam', 'sgd' (with momentum)
  config.lr = 0.1
  config.epochs = 10.0
  config.schedule = 'cosine'  # to zero; 'constant'
  config.momentum = 0.9
  config.weight_decay = 0.0  # added to the gradient of kernels (L2)
  config.clip = 0.0  # of the gradient's norm; 0: none
  config.update(fields)
  return config


def admm_recipe(**fields) -> ml_collections.ConfigDict:
  """How the weights are pulled towards the plan; `epochs` are those of all stages together."""
  config = recipe()
  config.rho = (1e-3, 1e-2, 1e-1)  # one for each stage
  config.refreshes = 6  # of targets and duals in a stage
  config.growth = 1.0  # of rho at a refresh
  config.update(fields)
  return config


def gradual_recipe(**fields) -> ml_collections.ConfigDict:
  """How weights leave one after the other while the others learn."""
  config = recipe()
  config.renewals = 12  # of the masks, evenly in the logarithm of what is kept
  config.until = 0.9  # of the phase; the rest is for those that stay
  config.score = 'fisher'  # of `rules.gradual`
  config.update(fields)
  return config


def check_recipe(name: str, config) -> None:
  """Refuses a recipe that cannot be followed.

  Raises:
    ValueError: naming the field.
  """
  for field, allowed in (('optimizer', ('adam', 'sgd')), ('schedule', ('cosine', 'constant'))):
    if config[field] not in allowed:
      raise ValueError(f'config.{name}.{field}={config[field]!r}: choose {allowed}')
  if config.epochs < 0 or config.lr <= 0:
    raise ValueError(f'config.{name} needs epochs >= 0 and lr > 0')
  if 'renewals' in config and not (config.renewals >= 1 and 0 < config.until <= 1):
    raise ValueError(f'config.{name} needs renewals >= 1 and until in (0, 1]')


def optimizer(config, length: int, first=None, *last) -> optax.GradientTransformation:
  """The chain of a phase.

  Args:
    config: a recipe.
    length: steps after which the learning rate starts again; beyond the phase's end it never does.
    first: link before everything, e.g. `rules.admm(...)`.
    *last: links after everything, e.g. `rules.keep_masked(...)`.
  """
  shape = optax.cosine_decay_schedule(config.lr, length)

  def lr(count):
    if config.schedule == 'constant':
      return jnp.asarray(config.lr, jnp.float32)
    return shape(jnp.asarray(count % length, jnp.float32))

  inner = optax.adam(lr) if config.optimizer == 'adam' else optax.sgd(lr, config.momentum)
  links = [
    first,
    optax.clip_by_global_norm(config.clip) if config.clip else None,
    optax.add_decayed_weights(config.weight_decay, mask=train.decay_mask)
    if config.weight_decay
    else None,
    inner,
    *last,
  ]
  return optax.chain(*(link for link in links if link is not None))


# ---------------------------------------------------------------------------- phases


class Run(NamedTuple):
  """One network on its way: what every phase needs besides its recipe.

  Attributes:
    task: the task.
    folder: of this network; phases make theirs in it.
    seed: of the data's order and of dropout.
    mesh: devices.
    log_every: steps per report.
    watch: each makes, from the folder of a phase with a target, a function of the training state
      that returns named numbers for the log.
  """

  task: Task
  folder: pathlib.Path
  seed: int
  mesh: Any
  log_every: int = 100
  watch: tuple[Callable[[pathlib.Path], Callable], ...] = ()


def phase(
  run: Run,
  name: str,
  variables: Variables,
  config,
  *,
  target=None,
  held=None,
  last=None,
  leave=None,
  watch=(),
) -> Variables:
  """Trains once: plainly, towards a target, or inside masks.

  Args:
    run: the network on its way.
    name: of the phase and its folder.
    variables: to start from.
    config: a recipe; with `target` an ADMM recipe. An ADMM recipe without target is a control: the
      same steps and learning rates.
    target: a plan, or a callable tree -> (tree, masks), that `rules.admm` pulls to.
    held: masks; weights that are False stay at zero.
    last: link after the optimizer, before that of `held`.
    leave: plans, one for each renewal of a gradual recipe, that the weights leave by.
    watch: functions of the training state that return named numbers for the log.

  Returns:
    The trained variables. A finished phase is read from its folder; one that another program is
    training is waited for.
  """
  with alone(run.folder / name):
    return _phase(run, name, variables, config, target, held, last, leave, watch)


def _phase(
  run: Run, name: str, variables: Variables, config, target, held, last, leave, watch
) -> Variables:
  folder = run.folder / name
  done = folder / 'variables.npz'
  if done.exists():
    return load_variables(done, variables)
  total = round(config.epochs * run.task.steps_per_epoch)
  if not total:
    return variables
  length, pull, evaluators = -(-total // len(config.get('rho', (0,)))), None, tuple(watch)
  every = max(1, total // _LOOKS) if watch else None
  if target is not None:
    pull, length, every = admm_link(config, target, total)
    evaluators += (gaps, *(make(folder) for make in run.watch))
  pinned = None if held is None else rules.keep_masked(held)
  if leave is not None:
    inner = optimizer(config, length, pull, last)
    tx = optax.chain(*filter(None, (gradual_link(config, inner, leave, total), pinned)))
  else:
    tx = optimizer(config, length, pull, last, pinned)
  # Phases see the data in orders of their own.
  order = zlib.crc32(f'{run.seed} {name}'.encode())
  start = train.create_state(*variables, tx, jax.random.key(order))
  say(f'{folder}: {total} steps')
  state = train.fit(
    start,
    train.make_train_step(run.task.loss_fn, tx, mesh=run.mesh),
    run.task.loader(order),
    workdir=folder,
    total_steps=total,
    mesh=run.mesh,
    evaluators=evaluators,
    log_every=run.log_every,
    eval_every=every,
    keep=1,
  ).state
  result = Variables(*jax.device_get((state.params, state.model_state)))
  if train.is_main():
    save_variables(done, result)
  train.synchronize(f'{folder} written')
  return result


def student(task: Task, distill, dense: Variables) -> Task:
  """The task of a network that the dense one teaches.

  Args:
    task: the task.
    distill: `share` of the loss that comes from the teacher, 0 for none; `temperature`.
    dense: the teacher.
  """
  if not distill.share:
    return task
  assert task.taught is not None
  return task._replace(loss_fn=task.taught(dense, distill.share, distill.temperature))


def check_distill(distill) -> None:
  """Refuses a share or a temperature that means nothing.

  Raises:
    ValueError: saying which are possible.
  """
  if not (0 <= distill.share <= 1 and distill.temperature > 0):
    raise ValueError('config.distill needs a share of 0..1 and a temperature above 0')


def admm_link(config, target, total: int):
  """The pull of an ADMM recipe, the steps of a stage, and those between refreshes."""
  stages = len(config.rho)
  length = -(-total // stages)
  every = max(1, length // (config.refreshes + 1))
  several = {'rho': tuple(config.rho), 'stage_steps': length}
  rho = several if stages > 1 else {'rho': config.rho[0]}
  return rules.admm(target, every=every, growth=config.growth, **rho), length, every


def gradual_link(config, inner, leave, total: int) -> optax.GradientTransformationExtraArgs:
  """The optimizer inside masks that are renewed, for the last time at `until` of the phase."""
  # Adam's moments have to have seen something before they can rank.
  end = max(1, round(config.until * total))
  begin = min(max(1, total // 50), end)
  every = max(1, -(-(end - begin) // max(1, config.renewals - 1)))
  count = len(range(begin, end, every)) + 1
  return rules.gradual(inner, leave(count), begin=begin, end=end, every=every, score=config.score)


def gaps(state: train.TrainState) -> dict[str, float]:
  """How far ADMM is, for the log."""
  found = rules.diagnostics(state.opt_state)
  return {f'admm/{name.removeprefix("admm_")}': float(x) for name, x in found.items()}


def recalibrated(task: Task, variables: Variables) -> Variables:
  """The same weights with batch-norm statistics of training images as they are now."""
  if task.advance is None:
    return variables
  state = rules.recalibrate(
    task.advance, variables.params, variables.model_state, task.calibration()
  )
  return Variables(variables.params, jax.device_get(state))


class Rung(NamedTuple):
  """A network at one rate.

  Attributes:
    plan: what it was pruned to.
    variables: retrained, exact zeros, statistics taken anew.
    masks: of weights that live.
    scores: part -> one number per item, of the retrained network.
    cut: the same right after the cut, statistics taken anew, before retraining.
  """

  plan: Any
  variables: Variables
  masks: PyTree
  scores: dict[str, np.ndarray]
  cut: dict[str, np.ndarray]


def climb(
  run: Run,
  variables: Variables,
  plans: Sequence[Any],
  admm_config,
  retrain_config,
  between: Callable[[int, int], Sequence[Any]] | None = None,
  masks: PyTree | None = None,
) -> Iterator[Rung]:
  """For every plan: ADMM or gradual pruning, hard projection, retraining of the survivors, scores.

  Args:
    run: the network on its way.
    variables: trained, dense or with `masks`.
    plans: each sparser than the one before; what died stays dead.
    admm_config: an ADMM recipe, or with `between` a gradual one; 0 epochs cut at once.
    retrain_config: a recipe, or one for each plan.
    between: (rung, count) -> so many plans from the rung before to this one.
    masks: of weights that live at the start; None: all do.
  """
  task, state = run.task, variables.model_state
  recipes = retrain_config if isinstance(retrain_config, tuple) else (retrain_config,) * len(plans)
  number, cut = 0, {}

  def compress(target, params, masks):
    nonlocal state
    start = Variables(params, state)
    if between is None:
      how = {'target': target}
    else:
      how = {'leave': lambda count, rung=number: between(rung, count)}
    name = f'{number:02d}-{"admm" if between is None else "gradual"}'
    params, state = phase(run, name, start, admm_config, held=masks, **how)
    return params

  def retrain(params, masks):
    nonlocal state, cut
    cut = scores(run, f'{number:02d}-cut', Variables(params, state))
    start = Variables(params, state)
    params, state = phase(run, f'{number:02d}-retrain', start, recipes[number], held=masks)
    return params

  for rung in rules.progressive(variables.params, plans, compress, retrain, masks=masks):
    done = recalibrated(task, Variables(rung.params, state))
    found = scores(run, f'{number:02d}-retrained', done, anew=False)
    yield Rung(plans[number], done, rung.masks, found, cut)
    number += 1


def settled(run: Run, variables: Variables) -> Variables:
  """`recalibrated`, once: kept in the run's folder and read from there the next time."""
  path = run.folder / 'variables.npz'
  with alone(path):
    if path.exists():
      return load_variables(path, variables)
    done = recalibrated(run.task, variables)
    if train.is_main():
      save_variables(path, done)
    train.synchronize(f'{path} written')
    return done


def cut_once(run: Run, variables: Variables, plan, saliency=None) -> Rung:
  """Hard projection and new batch-norm statistics; nothing is trained.

  Args:
    run: the network on its way.
    variables: trained, dense.
    plan: what to prune to.
    saliency: of `rules.finalize`.
  """
  params, masks = rules.finalize(plan, variables.params, saliency=saliency)
  done = settled(run, Variables(params, variables.model_state))
  found = scores(run, '00-cut', done, anew=False)
  return Rung(plan, done, masks, found, found)


def control(run: Run, variables: Variables, plan, admm_config, retrain_config) -> Rung:
  """The dense network after as many steps at the same learning rates, nothing pruned.

  Args:
    run: the network on its way.
    variables: trained, dense.
    plan: one that prunes nothing.
    admm_config: recipe of the phase that pulls others to their plan.
    retrain_config: recipe of their retraining.
  """
  pulled = phase(run, '00-admm', variables, admm_config)
  done = recalibrated(run.task, phase(run, '00-retrain', pulled, retrain_config))
  found = scores(run, '00-retrained', done, anew=False)
  return Rung(plan, done, None, found, found)


def scores(run: Run, name: str, variables: Variables, anew: bool = True) -> dict[str, np.ndarray]:
  """Scores of every part; read from the run's folder if they are there.

  Args:
    run: the network on its way.
    name: of the file.
    variables: to score.
    anew: take batch-norm statistics first; False where they are of these weights already.
  """
  path = run.folder / f'{name}.npz'
  with alone(path):
    if path.exists():
      with np.load(path, allow_pickle=False) as z:
        return {k: z[k] for k in z.files}
    found = run.task.score(recalibrated(run.task, variables) if anew else variables)
    if train.is_main():
      save_arrays(path, **found)
    train.synchronize(f'{path} written')
    return found


# ---------------------------------------------------------------------------- sizes


class Sizes(NamedTuple):
  """How large a network is before and after.

  Attributes:
    weights: of all kernels (rank 2 and more), pruned or not.
    kept: of those that live.
    dense_bytes: of the whole network in float32, statistics included.
    stored_bytes: of the same with pruned kernels encoded: values, indices, tables, padding.
    index_bits: of stored indices and tables.
  """

  weights: int
  kept: int
  dense_bytes: int
  stored_bytes: int
  index_bits: int

  @property
  def compression(self) -> float:
    """Dense weights over kept weights."""
    return self.weights / self.kept

  @property
  def compression_bytes(self) -> float:
    """Float32 bytes over all stored bytes."""
    return self.dense_bytes / self.stored_bytes


def measure(plan: sparsity.Plan, variables: Variables) -> Sizes:
  """Counts a pruned network; `plan` says in which form each kernel is stored."""
  params, state = variables
  kernels = {entry.path for entry in plan.entries if len(entry.shape) > 1}
  return network_sizes(sparsity.sizes(plan, params), kernels, state)


def network_sizes(found: sparsity.Sizes, kernels: Set[str], state: PyTree) -> Sizes:
  """The sizes of a network from those of its arrays.

  Args:
    found: of the parameters.
    kernels: paths that count as weights.
    state: batch-norm statistics and the like, stored as they are.
  """
  rest = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
  return Sizes(
    weights=sum(n for path, n in found.weights.items() if path in kernels),
    kept=sum(n for path, n in found.kept.items() if path in kernels),
    dense_bytes=4 * sum(found.weights.values()) + rest,
    stored_bytes=found.bytes + rest,
    index_bits=sum(cost.index + cost.tables for cost in found.bits.values()),
  )


# ---------------------------------------------------------------------------- small files


def save_variables(path: pathlib.Path, variables: Variables) -> None:
  """Writes variables as one .npz."""
  save_tree(path, {'params': variables.params, 'model_state': variables.model_state})


def load_variables(path: pathlib.Path, like: Variables) -> Variables:
  """Reads variables that fit `like`.

  Raises:
    ValueError: when the file is of another network.
  """
  found = load_tree(path)
  result = Variables(found.get('params', {}), found.get('model_state', {}))
  shapes = [jax.tree.map(np.shape, v) for v in (result, like)]
  if shapes[0] != shapes[1]:
    raise ValueError(f'{path} is of another network; remove it, or use another --workdir.')
  return result
