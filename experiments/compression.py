"""Train, pull, cut, retrain, count bytes: what the experiments on pruning share.

A *task* is a network with the data it learns from and is scored on. A *phase* is one training run
with a folder of its own: killed, it goes on from its last checkpoint; finished, it is read back.
`climb` strings phases together: for every rung of a ladder of plans ADMM, hard projection and
retraining of the survivors. Batch-norm statistics are taken anew, on training images, before
anything is scored.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import itertools
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.harness import alone, load_tree, save_arrays, save_tree, say
from fqjax import data as fd
from fqjax import models, rules, sparsity, train

PyTree = Any


class Variables(NamedTuple):
  """What a network is made of.

  Attributes:
    params: trained weights, nested dicts.
    model_state: batch-norm statistics and the like; `{}` where there are none.
  """

  params: PyTree
  model_state: PyTree


class Task(NamedTuple):
  """A network, the data it learns from, and how it is scored.

  Attributes:
    init: key -> `Variables`; random, or published weights.
    loss_fn: of `train.make_train_step`.
    loader: seed -> endless training batches.
    steps_per_epoch: batches in one pass.
    score: `Variables` -> part -> one number for every item of it: 1 and 0 for right and wrong, or the
      loss of a token. Parts are what the task scores on, e.g. 'test', and 'held_out' to choose by.
    calibration: () -> one pass of training batches without augmentation, for `rules.recalibrate`.
    advance: `(params, model_state, batch) -> model_state`, of `rules.recalibrate`; None for a
      network without running statistics.
    layers: `sparsity.trace_layers` of the network.
    sample: what the network takes, to try it on: some training items as they reach it.
    taught: (teacher, share of the loss, temperature) -> a `loss_fn` that also learns from the
      teacher's logits on the same, augmented, training items; None where there is none.
  """

  init: Callable[[jax.Array], Variables]
  loss_fn: Callable
  loader: Callable[[int], Iterable]
  steps_per_epoch: int
  score: Callable[[Variables], dict[str, np.ndarray]]
  calibration: Callable[[], Iterable]
  advance: Callable | None
  layers: dict[str, sparsity.Layer]
  sample: Any = None
  taught: Callable[[Variables, float, float], Callable] | None = None


# ---------------------------------------------------------------------------- tasks


def classifier(
  model,
  learned: fd.Source,
  scored: Mapping[str, fd.Source],
  spec: fd.InputSpec,
  *,
  initial: Callable[[jax.Array], Variables] | None = None,
  transform=None,
  eval_transform=None,
  batch_size: int = 128,
  eval_batch_size: int = 500,
  calibration_images: int = 10_000,
  label_smoothing: float = 0.0,
  grey: bool = False,
  workers: int = 0,
  mesh=None,
) -> Task:
  """The task of classifying images.

  Args:
    model: a Linen network of `models.create_model`.
    learned: images to train on.
    scored: part -> images to score on.
    spec: from uint8 pixels to the network's input.
    initial: variables to start from; random by default.
    transform: of training images on the host, e.g. `data.pad_crop`.
    eval_transform: of the others, e.g. `data.resize_crop`.
    batch_size: of training, over all devices.
    eval_batch_size: of scoring and calibration.
    calibration_images: training images that batch-norm statistics are taken on.
    label_smoothing: of the training loss.
    grey: the network takes one channel.
    workers: processes that decode and augment; 0 does it in this one.
    mesh: devices; all by default.
  """
  channels = 1 if grey else None
  shape = (*spec.output_shape[:2], channels or spec.output_shape[-1])

  def fresh(key):
    return split(jax.jit(model.init)({'params': key}, jnp.zeros((1, *shape))))

  def network_input(batch, key=None):
    x = fd.preprocess(spec, batch['image'], key, train=key is not None)
    return x[..., :channels] if grey else x

  def make_loss(teacher: Variables | None = None, share: float = 0.0, temperature: float = 1.0):
    def loss_fn(params, model_state, batch, key):
      x = network_input(batch, jax.random.fold_in(key, 0))
      logits, new = model.apply(
        {'params': params, **model_state},
        x,
        train=True,
        mutable=list(model_state),
        rngs={'dropout': jax.random.fold_in(key, 1)},
      )
      target = optax.smooth_labels(
        jax.nn.one_hot(batch['label'], logits.shape[-1]), label_smoothing
      )
      losses = optax.softmax_cross_entropy(logits, target)
      if teacher is not None:
        soft = model.apply({'params': teacher.params, **teacher.model_state}, x) / temperature
        # Times T^2, so that the gradient does not shrink with the temperature (Hinton et al., 2015).
        taught = temperature**2 * optax.softmax_cross_entropy(
          logits / temperature, jax.nn.softmax(soft)
        )
        losses = (1 - share) * losses + share * taught
      weight = batch['mask'] / jnp.maximum(batch['mask'].sum(), 1)
      right = jnp.sum(weight, where=logits.argmax(-1) == batch['label'])
      return jnp.sum(weight * losses), (dict(new), {'top1': right})

    return loss_fn

  def loader(seed):
    return fd.Loader(
      learned, batch_size=batch_size, seed=seed, workers=workers, transform=transform
    )

  predict = train.make_eval_step(
    lambda params, model_state, batch: {
      'right': model.apply({'params': params, **model_state}, network_input(batch)).argmax(-1)
      == batch['label'],
      'mask': batch['mask'],
      'index': batch['index'],
    },
    mesh=mesh,
  )

  def correctness(variables, source):
    images = fd.Loader(
      source, batch_size=eval_batch_size, shuffle=False, repeat=False, transform=eval_transform
    )
    return each_item(predict, variables, images, mesh)['right'].astype(np.float64)

  def score(variables):
    return {part: correctness(variables, source) for part, source in scored.items()}

  def calibration():
    count = max(1, min(calibration_images, len(learned)) // eval_batch_size)
    images = fd.Loader(learned, batch_size=eval_batch_size, seed=0, transform=eval_transform)
    return itertools.islice(images, count)

  def advance(params, model_state, batch):
    x = network_input(batch)
    return dict(
      model.apply(
        {'params': params, **model_state},
        x,
        train=True,
        mutable=list(model_state),
        rngs={'dropout': jax.random.key(0)},
      )[1]
    )

  abstract = jax.eval_shape(fresh, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.model_state)
  return Task(
    init=initial or fresh,
    loss_fn=make_loss(),
    taught=make_loss,
    loader=loader,
    steps_per_epoch=max(1, len(learned) // batch_size),
    score=score,
    calibration=calibration,
    advance=advance if abstract.model_state else None,
    layers=sparsity.trace_layers(
      lambda params, x: model.apply({'params': params, **zeros}, x),
      abstract.params,
      jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    ),
    sample=jax.device_get(network_input(next(iter(calibration())))[:32]),
  )


def image_task(config, mesh, initial=None, **options) -> tuple[Task, Any]:
  """The images of a configuration, and its network.

  Args:
    config: `data`, `model` and `label_smoothing` of an experiment.
    mesh: devices.
    initial: (weights, model) -> what `Task.init` is; asked where `config.model.weights` names some.
    **options: of the network, in place of `config.model.options`.
  """
  d = config.data
  where = {'data_dir': d.data_dir} if d.data_dir else {}
  learned = fd.load_source(d.name, d.train_split, **where)
  scored = {'test': fd.load_source(d.name, d.test_split, **where)}
  if d.held_out_split:
    scored['held_out'] = fd.load_source(d.name, d.held_out_split, **where)
  spec = fd.InputSpec(
    'rgb', d.size, mean=tuple(255 * m for m in d.mean), std=tuple(255 * s for s in d.std)
  )
  model = models.create_model(
    config.model.name, num_classes=learned.num_classes, **{**config.model.options, **options}
  )
  transform, plain = augmentation(d.augment, d.size, learned)
  task = classifier(
    model,
    learned,
    scored,
    spec,
    initial=initial(config.model.weights, model) if config.model.weights else None,
    transform=transform,
    eval_transform=plain,
    batch_size=d.batch_size,
    eval_batch_size=d.get('eval_batch_size', 500),
    calibration_images=d.get('calibration_images', 10_000),
    label_smoothing=config.label_smoothing,
    grey=d.grey,
    workers=d.workers,
    mesh=mesh,
  )
  return task, model


def each_item(predict, variables: Variables, images: fd.Loader, mesh=None) -> dict[str, np.ndarray]:
  """What an evaluation step says of every item, in the order of the source.

  Args:
    predict: of `train.make_eval_step`; returns arrays [batch, ...], 'mask' and 'index' among them.
    variables: of the network.
    images: one pass.
    mesh: devices; all by default.
  """
  parts = [jax.device_get(predict(*variables, train.shard_batch(x, mesh))) for x in images]
  found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  real = found.pop('mask') > 0
  order = np.argsort(found.pop('index')[real])
  return {name: values[real][order] for name, values in found.items()}


def split(variables) -> Variables:
  """Linen's collections as `Variables`."""
  return Variables(variables['params'], {k: v for k, v in variables.items() if k != 'params'})


def augmentation(name: str, size: int, source: fd.Source):
  """Transforms of training images and of the others, on the host.

  Args:
    name: 'none'; 'shift' by up to a fourteenth; 'pad_crop' by up to an eighth, and mirrored;
      'random_resized_crop', mirrored.
    size: side of the images in pixels.
    source: of the images; those of another size are resized.

  Raises:
    ValueError: for another name.
  """
  image = source[0]['image']
  same = not isinstance(image, bytes) and image.shape[:2] == (size, size)
  photographs = name == 'random_resized_crop'
  plain = None if same else fd.resize_crop(size * 8 // 7 if photographs else size, size)
  after = [plain] if plain is not None else []
  if photographs:
    return fd.chain(fd.random_resized_crop(size), fd.random_flip()), plain
  if name == 'none':
    return plain, plain
  if name == 'shift':
    return fd.chain(*after, fd.pad_crop(size // 14)), plain
  if name == 'pad_crop':
    return fd.chain(*after, fd.pad_crop(size // 8), fd.random_flip()), plain
  raise ValueError(
    f"data.augment={name!r}: choose 'none', 'shift', 'pad_crop', 'random_resized_crop'"
  )


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


def optimizer(config, length: int, first=None, last=None) -> optax.GradientTransformation:
  """The chain of a phase.

  Args:
    config: a recipe.
    length: steps after which the learning rate starts again; beyond the phase's end it never does.
    first: link before everything, e.g. `rules.admm(...)`.
    last: link after everything, e.g. `rules.keep_masked(...)`.
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
    last,
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
  run: Run, name: str, variables: Variables, config, *, target=None, held=None
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

  Returns:
    The trained variables. A finished phase is read from its folder; one that another program is
    training is waited for.
  """
  with alone(run.folder / name):
    return _phase(run, name, variables, config, target, held)


def _phase(run: Run, name: str, variables: Variables, config, target, held) -> Variables:
  folder = run.folder / name
  done = folder / 'variables.npz'
  if done.exists():
    return load_variables(done, variables)
  total = round(config.epochs * run.task.steps_per_epoch)
  if not total:
    return variables
  length, every, pull, evaluators = -(-total // len(config.get('rho', (0,)))), None, None, ()
  if target is not None:
    pull, length, every = admm_link(config, target, total)
    evaluators = (gaps, *(make(folder) for make in run.watch))
  tx = optimizer(config, length, pull, None if held is None else rules.keep_masked(held))
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


def admm_link(config, target, total: int):
  """The pull of an ADMM recipe, the steps of a stage, and those between refreshes."""
  stages = len(config.rho)
  length = -(-total // stages)
  every = max(1, length // (config.refreshes + 1))
  several = {'rho': tuple(config.rho), 'stage_steps': length}
  rho = several if stages > 1 else {'rho': config.rho[0]}
  return rules.admm(target, every=every, growth=config.growth, **rho), length, every


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
  run: Run, variables: Variables, plans: Sequence[Any], admm_config, retrain_config
) -> Iterator[Rung]:
  """For every plan: ADMM, hard projection, retraining of the survivors, scores.

  Args:
    run: the network on its way.
    variables: trained, dense.
    plans: each sparser than the one before; what died stays dead.
    admm_config: an ADMM recipe; 0 epochs cut at once.
    retrain_config: a recipe, or one for each plan.
  """
  task, state = run.task, variables.model_state
  recipes = retrain_config if isinstance(retrain_config, tuple) else (retrain_config,) * len(plans)
  number, cut = 0, {}

  def compress(target, params, masks):
    nonlocal state
    start = Variables(params, state)
    params, state = phase(run, f'{number:02d}-admm', start, admm_config, target=target, held=masks)
    return params

  def retrain(params, masks):
    nonlocal state, cut
    cut = scores(run, f'{number:02d}-cut', Variables(params, state))
    start = Variables(params, state)
    params, state = phase(run, f'{number:02d}-retrain', start, recipes[number], held=masks)
    return params

  for rung in rules.progressive(variables.params, plans, compress, retrain):
    done = recalibrated(task, Variables(rung.params, state))
    found = scores(run, f'{number:02d}-retrained', done, anew=False)
    yield Rung(plans[number], done, rung.masks, found, cut)
    number += 1


def cut_once(run: Run, variables: Variables, plan, saliency=None) -> Rung:
  """Hard projection and new batch-norm statistics; nothing is trained.

  Args:
    run: the network on its way.
    variables: trained, dense.
    plan: what to prune to.
    saliency: of `rules.finalize`.
  """
  params, masks = rules.finalize(plan, variables.params, saliency=saliency)
  done = Variables(params, variables.model_state)
  path = run.folder / 'variables.npz'
  with alone(path):
    if path.exists():
      done = load_variables(path, done)
    else:
      done = recalibrated(run.task, done)
      if train.is_main():
        save_variables(path, done)
      train.synchronize(f'{path} written')
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
  found = sparsity.sizes(plan, params)
  kernels = {entry.path for entry in plan.entries if len(entry.shape) > 1}
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
