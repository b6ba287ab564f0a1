"""Networks with the data they learn from and are scored on, as the experiments on pruning see them."""

from collections.abc import Callable, Iterable, Mapping
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fqjax import data as fd
from fqjax import models, sparsity, train

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
    calibration: () -> one pass of training batches, augmented as in training, for `rules.recalibrate`.
    advance: `(params, model_state, batch) -> model_state`, of `rules.recalibrate`; None for a
      network without running statistics.
    layers: `sparsity.trace_layers` of the network.
    sample: what the network takes, to try it on: some training items as they reach it.
    taught: (teacher, share of the loss, temperature) -> a `loss_fn` that also learns from the
      teacher's logits on the same, augmented, training items; None where there is none.
    elsewhere: a function of what the network takes, that returns its logits -> the same as `score`:
      for networks that left JAX. None where nothing of the kind is there.
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
  elsewhere: Callable[[Callable[[np.ndarray], np.ndarray]], dict[str, np.ndarray]] | None = None


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
    eval_batch_size: of scoring and calibration; rounded up to a multiple of the devices.
    calibration_images: training images that batch-norm statistics are taken on.
    label_smoothing: of the training loss.
    grey: the network takes one channel.
    workers: processes that decode and augment; 0 does it in this one.
    mesh: devices; all by default.
  """
  devices = jax.device_count() if mesh is None else mesh.size
  eval_batch_size = -(-eval_batch_size // devices) * devices
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

  def elsewhere(run):
    def right(batch):
      logits = run(np.asarray(network_input(batch)))
      return {
        'right': logits.argmax(-1) == batch['label'],
        'mask': batch['mask'],
        'index': batch['index'],
      }

    found = {}
    for part, source in scored.items():
      images = fd.Loader(
        source, batch_size=eval_batch_size, shuffle=False, repeat=False, transform=eval_transform
      )
      found[part] = in_order(map(right, images))['right'].astype(np.float64)
    return found

  def calibration():
    count = max(1, min(calibration_images, len(learned)) // eval_batch_size)
    # As in training: black borders, for one, raise the variance of a first layer by a third, and a
    # network that was trained with them is 2.6 points worse with the statistics of plain images.
    how = eval_transform if transform is None else transform
    images = fd.Loader(learned, batch_size=eval_batch_size, seed=0, transform=how)
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

  plain = fd.Loader(learned, batch_size=eval_batch_size, seed=0, transform=eval_transform)
  abstract = jax.eval_shape(fresh, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.model_state)
  return Task(
    init=initial or fresh,
    loss_fn=make_loss(),
    taught=make_loss,
    loader=loader,
    steps_per_epoch=max(1, len(learned) // batch_size),
    score=score,
    elsewhere=elsewhere,
    calibration=calibration,
    advance=advance if abstract.model_state else None,
    layers=sparsity.trace_layers(
      lambda params, x: model.apply({'params': params, **zeros}, x),
      abstract.params,
      jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    ),
    sample=jax.device_get(network_input(next(iter(plain)))[:32]),
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
  return in_order(jax.device_get(predict(*variables, train.shard_batch(x, mesh))) for x in images)


def in_order(batches: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays of the items of all batches, in the order of the source, padding left out."""
  parts = list(batches)
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
