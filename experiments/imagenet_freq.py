"""Classifiers on DCT coefficients, with learned channel selection (Xu et al., CVPR 2020).

  python -m experiments.imagenet_freq --config=configs/imagenet_freq.py:demo --workdir=runs/demo

A run trains one or more *settings*, each with one or more seeds, on equal data and schedule:

  rgb                 the small RGB image, the network as published
  rgb_half_idct       RGB of the small size made by a half-scale inverse DCT of the large image
  rgb_large_patchify  the large RGB image through a block-sized stem of equal cost
  dct                 a fixed subset of the large image's DCT coefficients, no stem
  dct_gate            all coefficients, the gate chooses channel by channel
  gate_then_static    the subset that `dct_gate` chose while training, fixed

The three RGB settings are the controls that tell the effect of the coefficients from that of the
larger image. Run again with the same `--workdir`, it goes on where it stopped. At the end
`report.html` and `results.json` stand in the workdir.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness, ledger
from experiments.harness import (
  check_same_experiment,
  data_label,
  load_tree,
  read_result,
  record_once,
  save_arrays,
  save_tree,
  say,
)
import fqjax
from fqjax import data as fd
from fqjax import files, models, ops, tracing, train
from fqjax import nn as fnn
from fqjax.train.distributed import fail_together


class Setting(NamedTuple):
  """What distinguishes one row of the comparison from another."""

  title: str
  kind: str  # of `fd.InputSpec`
  suffix: str  # of the network's name
  large: bool  # sees the large image
  gate: bool = False


AUGMENTATIONS = ('random_resized_crop', 'pad_crop', 'flip', 'none', 'device')
SETTINGS = {
  'rgb': Setting('RGB, small image', 'rgb', '', large=False),
  'rgb_half_idct': Setting('RGB, half-scale inverse DCT', 'rgb_half_idct', '', large=True),
  'rgb_large_patchify': Setting('RGB, large image, block stem', 'rgb', '_patchify', large=True),
  'dct': Setting('DCT, static subset', 'dct', '_dct', large=True),
  'dct_gate': Setting('DCT, gated', 'dct', '_dct', large=True, gate=True),
  'gate_then_static': Setting('DCT, subset the gate chose', 'dct', '_dct', large=True),
}


class Program(NamedTuple):
  """Everything about a setting that its seeds share, compiled once."""

  spec: fd.InputSpec
  model: nn.Module
  tx: optax.GradientTransformation
  step: Any
  eval_step: Any
  predict: Any
  total_steps: int
  steps_per_epoch: int
  costs: dict[str, float]


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Trains every setting with every seed, then compares and reports; returns a row per setting."""
  check(config)

  # ---------------------------------------------------------------- machines
  train.initialize_distributed()
  mesh = train.make_mesh()
  first = train.is_main()
  train.check_workdir(workdir)
  check_batches(config, mesh.size)
  check_same_experiment(workdir, config, _FREE)
  train.synchronize('configuration read')
  if first:
    files.write_text(workdir / 'config.json', config.to_json_best_effort(indent=2))
  # The seeds of a setting, and a restarted run, find their programs compiled.
  train.enable_compile_cache((workdir / 'jax_cache').absolute())

  # ---------------------------------------------------------------- data
  sources = [
    fd.load_source(config.data.name, split, **data_options(config))
    for split in (config.data.train_split, config.data.val_split)
  ]
  say(f'{config.data.name}: {len(sources[0])} training and {len(sources[1])} validation images')

  # ---------------------------------------------------------------- training
  started = time.time()
  runs: dict[str, list[dict]] = {}
  for i, name in enumerate(config.settings):
    channels = chosen_channels(config, name, runs)
    program = None
    for j, seed in enumerate(config.seeds):
      folder = workdir / name / f'seed{seed}'
      check_channels(folder, channels)
      result = read_result(folder)
      if result is None:
        say(f'[{i * len(config.seeds) + j + 1}/{len(config.settings) * len(config.seeds)}] '
            f'{name}, seed {seed} -> {folder}')  # fmt: skip
        if program is None:
          program = build(config, name, channels, sources[0], mesh, workdir)
        result = run(config, name, seed, program, sources, folder, mesh)
      runs.setdefault(name, []).append(result)

  # ---------------------------------------------------------------- outcome
  rows = compare(workdir, runs)
  if first:
    files.write_text(workdir / 'results.json', json.dumps(rows, indent=2))
    write_report(config, workdir, rows, runs, sources[1])
    if config.record:
      record(config, workdir, rows)
    print_table(rows)
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
    print(f'Numbers: {workdir / "results.json"}')
  train.synchronize('end')
  return rows


# ---------------------------------------------------------------------------- one setting


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: an unknown setting, or one whose prerequisite is not part of the run.
  """
  unknown = [name for name in config.settings if name not in SETTINGS]
  if unknown or not config.settings:
    raise ValueError(f'unknown settings {unknown}; known are {", ".join(SETTINGS)}')
  order = list(config.settings)
  for name, before, why in (
    ('gate_then_static', 'dct_gate', 'which chooses its channels'),
    ('dct', 'rgb' if config.init.rgb == 'rgb' else '', 'which init=rgb starts from'),
  ):
    if before and name in order and before not in order[: order.index(name)]:
      raise ValueError(f'{name!r} needs {before!r} before it, {why}: settings={before}+{name}')
  for field, value, allowed in (
    ('data.augment', config.data.augment, AUGMENTATIONS),
    ('data.crop_rule', config.data.crop_rule, ('log_uniform', 'uniform')),
    ('dct.pattern', config.dct.pattern, ('square', 'triangle', 'learned')),
    ('dct.chroma', config.dct.chroma, ('filtered', 'full')),
    ('dct.statistics', config.dct.statistics, ('pooled', 'released', 'none')),
    ('gate.kind', config.gate.kind, ('image', 'global')),
    ('init.method', config.init.method, ('cut', 'reinit', 'least_squares')),
    ('optim.schedule', config.optim.schedule, ('cosine', 'step')),
  ):
    if value not in allowed:
      raise ValueError(f'config.{field}={value!r}: choose {", ".join(map(repr, allowed))}')
  if config.size % config.dct.block:
    raise ValueError(f'size={config.size} is not divisible by dct.block={config.dct.block}')
  if 'rgb_half_idct' in order and config.size != 2 * config.rgb_size:
    raise ValueError(
      f"'rgb_half_idct' makes images of {config.size // 2} pixels, 'rgb' sees {config.rgb_size}: "
      'it is a control only where size is twice rgb_size; leave it out of settings'
    )
  if config.init.rgb not in ('', 'rgb') and not pathlib.Path(config.init.rgb).is_file():
    raise ValueError(f'config.init.rgb: there is no file {config.init.rgb}')
  if 'dct' in order:
    chosen_channels(config, 'dct', {})  # an unknown subset is an error that lists the known ones


def check_batches(config, devices: int) -> None:
  """Refuses batches that the devices cannot share, before anything is compiled.

  Raises:
    ValueError: naming the size and what divides.
  """
  accumulate = config.optim.accumulate
  for field, size, parts in (
    ('batch_size', config.data.batch_size, devices * accumulate),
    ('eval_batch_size', config.data.eval_batch_size, devices),
  ):
    if size % parts:
      raise ValueError(
        f'config.data.{field}={size} must divide by {parts} ({devices} devices'
        f'{f" x {accumulate} microbatches" if parts > devices else ""})'
      )


# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'settings|seeds|record|goal|reference|profile|log_every|keep_checkpoints|data\.(workers|data_dir|eval_batch_size)'
)


def check_channels(folder: pathlib.Path, channels: tuple[int, ...] | None) -> None:
  """Refuses to go on with a run that was started on other channels.

  Raises:
    ValueError: naming both.
  """
  path = folder / 'channels.json'
  now = None if channels is None else list(channels)
  if path.exists():
    before = json.loads(path.read_text())
    if before != now:
      raise ValueError(
        f'{folder} was started on channels {before}, this command chooses {now} (other seeds of'
        ' the gate, for example). Remove that folder to train it anew, or use another --workdir.'
      )
  elif train.is_main():
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(now))
  train.synchronize(f'channels of {folder.name}')


def data_options(config) -> dict:
  """Keyword arguments of `load_source` that this configuration asks for."""
  return {'data_dir': config.data.data_dir} if config.data.data_dir else {}


def chosen_channels(config, name: str, runs) -> tuple[int, ...] | None:
  """The DCT channels a setting sends to the device; `None` means all of them."""
  if name == 'dct':
    return ops.channel_subset(f'{config.dct.pattern}{config.dct.channels}', size=config.dct.block)
  if name == 'gate_then_static':
    # Chosen on training images alone, and the same for every seed.
    heatmap = np.mean([run['selection'] for run in runs['dct_gate']], axis=0)
    return ops.select_channels(heatmap, config.dct.channels)
  return None


def stored(source) -> dict | None:
  """How a source's coefficients were made; `None` for a source of pixels."""
  metadata = getattr(source, 'metadata', None) or {}
  return metadata if metadata.get('kind') == 'coefficients' else None


def pixels(batch):
  """What preprocessing starts from: stored coefficients where there are any."""
  return batch['coefficients'] if 'coefficients' in batch else batch['image']


def check_stored(config, name: str, spec: fd.InputSpec, made: dict) -> None:
  """Refuses coefficients that are not those the setting asks for.

  Raises:
    ValueError: naming what differs.
  """
  if SETTINGS[name].kind != 'dct':
    raise ValueError(f'{config.data.name} holds coefficients; setting {name!r} needs pixels')
  if config.data.augment not in ('device', 'none'):
    raise ValueError(
      f'{config.data.name} holds coefficients, which cannot be augmented in pixels: '
      '--config.data.augment=device'
    )
  every = tuple(range(3 * config.dct.block**2))
  wanted = {'block': config.dct.block, 'chroma': config.dct.chroma}
  differ = [f'{k}={made[k]!r}, not {v!r}' for k, v in wanted.items() if made[k] != v]
  kept = tuple(made['channels'] or every)
  if kept not in (every, spec.channels or every):
    differ.append(f'channels {kept}, not {spec.channels or "all"}')
  if differ:
    raise ValueError(f'{config.data.name} was prepared with {"; ".join(differ)}')


def train_transform(config, source, size: int):
  """Host augmentation in pixels that ends on `size`-pixel images."""
  d = config.data
  if stored(source):
    return None
  if d.augment == 'random_resized_crop':
    crop = fd.random_resized_crop(size, scale=(d.min_area, 1.0), rule=d.crop_rule)
    return fd.chain(crop, fd.random_flip())
  # Small images are augmented alike for every setting, then brought to the setting's size.
  steps = {
    'pad_crop': [fd.pad_crop(config.size // 8), fd.random_flip()],
    'flip': [fd.random_flip()],
  }.get(d.augment, [])
  image = source[0]['image']
  if image.shape[:2] != (config.size, config.size):
    steps = [fd.resize_crop(config.size, config.size), *steps]
  if size != config.size:
    steps = [*steps, fd.resize(size)]
  return fd.chain(*steps)


def eval_transform(config, source, size: int):
  """Resize and centre crop for photographs of any size, resize alone for those of one size."""
  if stored(source):
    return None
  if config.data.augment == 'random_resized_crop':
    return fd.resize_crop(size * 8 // 7, size)
  return fd.resize_crop(size, size)


def sides(config, name: str) -> int:
  """Side in pixels of the images that reach the device."""
  return config.size if SETTINGS[name].large else config.rgb_size


def make_spec(config, name: str, channels, source, workdir=None) -> fd.InputSpec:
  """Input of a setting; coefficients are normalised by statistics of training images alone."""
  setting, size = SETTINGS[name], sides(config, name)
  augmentation: dict[str, Any] = {}
  if config.data.augment == 'device':
    augmentation = {'flip': True, 'crop_blocks': config.dct.crop_blocks or None}
  if setting.kind != 'dct':
    mean = tuple(255 * m for m in config.data.rgb_mean)
    std = tuple(255 * s for s in config.data.rgb_std)
    spec = fd.InputSpec(
      kind=setting.kind, size=size, block=config.dct.block, mean=mean, std=std, **augmentation
    )
    if stored(source):
      check_stored(config, name, spec, stored(source))
    return spec
  spec = fd.InputSpec(
    kind='dct',
    size=size,
    block=config.dct.block,
    channels=channels,
    chroma=config.dct.chroma,
    **augmentation,
  )
  if stored(source):
    check_stored(config, name, spec, stored(source))
  if config.dct.statistics != 'pooled':
    return fd.spec_with_statistics(spec, config.dct.statistics)
  # Taken of all channels the source has: settings that differ in their subset share them.
  kept = (stored(source) or {}).get('channels')
  whole = dataclasses.replace(spec, channels=tuple(kept) if kept else None)
  whole = pooled_statistics(config, whole, source, workdir)
  have = list(kept or range(whole.num_channels))
  at = [have.index(channel) for channel in spec.channels or have]
  mean, std = ([vector[i] for i in at] for vector in (whole.mean, whole.std))
  return dataclasses.replace(spec, mean=tuple(mean), std=tuple(std))


def pooled_statistics(config, spec: fd.InputSpec, source, workdir=None) -> fd.InputSpec:
  """The spec with mean and deviation of training images, estimated once per workdir."""
  d, images = config.data, config.dct.statistics_images

  def estimate():
    loader = fd.Loader(
      source,
      batch_size=min(50, len(source)),
      transform=eval_transform(config, source, spec.size),
      process_index=0,
      process_count=1,
    )
    batches = itertools.islice(loader, -(-images // loader.batch_size))
    return fd.spec_with_statistics(spec, fd.estimate_statistics(spec, batches))

  if workdir is None:
    return estimate()
  depends = {
    'spec': dataclasses.asdict(spec),
    'data': [d.name, d.train_split, d.data_dir, len(source), stored(source)],
    # What comes before the DCT: photographs are cropped, images of one size are not.
    'photographs': d.augment == 'random_resized_crop',
    'images': images,
    'version': fqjax.__version__,
  }
  key = json.dumps(depends, sort_keys=True)
  path = workdir / f'statistics-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json'
  # By every process, so that none waits long; then all take what the first one wrote.
  mine = None if path.exists() else estimate()
  with fail_together():
    if train.is_main() and mine is not None:
      found = {'depends': depends, 'mean': mine.mean, 'std': mine.std}
      files.write_text(path, json.dumps(found))
  found = json.loads(path.read_text())
  return dataclasses.replace(spec, mean=tuple(found['mean']), std=tuple(found['std']))


def make_network(config, name: str, spec: fd.InputSpec, num_classes: int) -> nn.Module:
  """The network of a setting for the input that `spec` describes."""
  m, setting = config.model, SETTINGS[name]
  options: dict[str, Any] = {'dtype': jnp.dtype(m.dtype), 'norm_groups': m.norm_groups}
  if setting.suffix == '_dct':
    gate = setting.gate and ('global' if config.gate.kind == 'global' else True)
    options.update(channels=spec.num_channels, gate=gate)
    options['gate_sample_at_eval'] = config.gate.sample_at_eval
  elif setting.suffix == '_patchify':
    options.update(channels=config.dct.channels, block=config.dct.block)
  elif m.stem_stride:
    options['stem_stride'] = m.stem_stride
  if m.name.startswith('resnet') and setting.suffix:
    options['stage2_stride'] = m.stage2_stride
  if m.width != 1.0:
    options['width'] = m.width
  return models.create_model(m.name + setting.suffix, num_classes=num_classes, **options)


def build(config, name: str, channels, source, mesh, workdir=None) -> Program:
  """Input, network, optimiser and compiled steps of one setting."""
  setting = SETTINGS[name]
  spec = make_spec(config, name, channels, source, workdir)
  model = make_network(config, name, spec, source.num_classes)

  # Schedule and optimiser are the same for every setting.
  o = config.optim
  steps_per_epoch = max(1, len(source) // config.data.batch_size)
  total = max(1, round(o.epochs * steps_per_epoch))
  lr = schedule(o, total, steps_per_epoch)
  tx = optax.chain(
    optax.clip_by_global_norm(o.clip) if o.clip else optax.identity(),
    optax.add_decayed_weights(o.weight_decay, mask=train.decay_mask),
    optax.sgd(lr, momentum=o.momentum, nesterov=o.nesterov),
    optax.masked(optax.scale(config.gate.lr_scale), gate_logits),
  )

  def apply(params, model_state, images, key=None):
    training = key is not None
    variables = {'params': params, 'batch_stats': model_state['batch_stats']}
    if setting.gate and training:
      settled = model_state['calls'] >= round((1 - config.gate.settle) * total * o.accumulate)
      variables['gate_noise'] = {'gate': {'scale': jnp.where(settled, 0.0, 1.0)}}
    # Without 'device' augmentation this is the same in training and evaluation.
    x = fd.preprocess(spec, images, key if training else None, train=training)
    return model.apply(
      variables,
      x,
      train=training,
      mutable=['batch_stats', 'gates'] if training else ['gates'],
      rngs={'gate': key} if training else {},
    )

  def loss_fn(params, model_state, batch, key):
    logits, new = apply(params, model_state, pixels(batch), key)
    target = jax.nn.one_hot(batch['label'], logits.shape[-1])
    target = optax.smooth_labels(target, o.label_smoothing)
    weight = batch['mask'] / jnp.maximum(batch['mask'].sum(), 1)
    loss = jnp.sum(weight * optax.softmax_cross_entropy(logits, target))
    calls = model_state['calls']
    metrics = {
      'top1': jnp.sum(weight, where=logits.argmax(-1) == batch['label']),
      'lr': jnp.asarray(lr(calls // o.accumulate), jnp.float32),
    }
    state = {'batch_stats': new['batch_stats'], 'calls': calls + 1}
    if setting.gate:
      on = new['gates']['gate']['on'] * batch['mask'][:, None]
      ramp = max(1.0, config.gate.penalty_warmup * total * o.accumulate)
      growing = jnp.minimum(1.0, calls.astype(jnp.float32) / ramp)
      loss += growing * fnn.gate_penalty(on, config.gate.penalty)
      state['selection'] = fnn.update_selection(model_state['selection'], on, batch['mask'])
      metrics['channels_on'] = jnp.sum(weight * on.sum(-1))
    return loss, (state, metrics)

  def eval_fn(params, model_state, batch):
    logits, new = apply(params, model_state, pixels(batch))
    mask, label = batch['mask'], batch['label']
    hit = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == label[:, None]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    sums = {
      'count': mask.sum(),
      'loss': (entropy * mask).sum(),
      'top1': mask.sum(where=hit[:, 0]),
      'top5': mask.sum(where=hit.any(-1)),
    }
    if setting.gate:
      sums['channels_on'] = (new['gates']['gate']['on'].sum(-1) * mask).sum()
    return sums

  def predict_fn(params, model_state, batch):
    logits = apply(params, model_state, pixels(batch))[0]
    probability, top = jax.lax.top_k(jax.nn.softmax(logits), min(5, logits.shape[-1]))
    rest = {k: batch[k] for k in ('label', 'mask', 'index')}
    return {'top': top, 'probability': probability, **rest}

  return Program(
    spec=spec,
    model=model,
    tx=tx,
    step=train.make_train_step(
      loss_fn, tx, mesh=mesh, accumulate=o.accumulate, ema_decay=o.ema or None
    ),
    eval_step=train.make_eval_step(eval_fn, mesh=mesh),
    predict=train.make_eval_step(predict_fn, mesh=mesh),
    total_steps=total,
    steps_per_epoch=steps_per_epoch,
    costs={
      'input_bytes': spec.input_bytes,
      'input_values': spec.values,
      **network_costs(model, spec),
    },
  )


def gate_logits(params):
  """Tree of bools: the gate's per-channel logit parameters."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'gate/logit' in jax.tree_util.keystr(path, simple=True, separator='/'), params
  )


def schedule(o, total: int, steps_per_epoch: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then cosine to zero or steps of 0.1."""
  warmup = min(round(o.warmup_epochs * steps_per_epoch), total - 1)
  if o.schedule == 'cosine':
    after = optax.cosine_decay_schedule(o.lr, total - warmup)
  elif o.schedule == 'step':
    after = optax.piecewise_constant_schedule(
      o.lr, {round(m * steps_per_epoch) - warmup: 0.1 for m in o.milestones}
    )
  else:
    raise ValueError(f"optim.schedule is 'cosine' or 'step', got {o.schedule!r}")
  both = optax.join_schedules([optax.linear_schedule(0.0, o.lr, max(warmup, 1)), after], [warmup])
  # A float: dividing an integer count would be an implicit promotion.
  return lambda count: both(jnp.asarray(count, jnp.float32))


def network_costs(model, spec) -> dict[str, float]:
  """Multiply-accumulates and parameters of one image's forward pass."""
  x = jax.ShapeDtypeStruct((1, *spec.output_shape), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  total = tracing.summary(lambda v, y: model.apply(v, y), variables, x)
  return {'macs': float(total.macs), 'params': float(total.params)}


# ---------------------------------------------------------------------------- one run


def initial_variables(config, program: Program, name: str, key, source, folder):
  """Random variables, or those of an RGB network as `config.init` says."""
  x = jnp.zeros((1, *program.spec.output_shape))
  # Runs once: optimising its program for the CPU would take longer than everything it computes.
  cheap = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  init = jax.jit(
    program.model.init, compiler_options=cheap if jax.default_backend() == 'cpu' else None
  )
  variables = init({'params': key, 'gate': key}, x)
  if not config.init.rgb or (config.init.rgb == 'rgb' and name == 'rgb'):
    return variables
  rgb_model = make_network(config, 'rgb', make_spec(config, 'rgb', None, None), source.num_classes)
  own = folder.parents[1] / 'rgb' / folder.name / 'variables.npz'
  path = own if config.init.rgb == 'rgb' else pathlib.Path(config.init.rgb)
  if path.suffix == '.safetensors':
    rgb = models.import_torchvision(path, rgb_model)
  else:
    rgb = load_tree(path)
  if not SETTINGS[name].suffix:
    return rgb
  features = {}
  if config.init.method == 'least_squares':
    features = entry_features(config, program, variables, rgb_model, rgb, source)
  return models.rgb_to_dct_variables(rgb, variables, method=config.init.method, **features)


def entry_features(config, program: Program, variables, rgb_model, rgb, source):
  """What the RGB stem and the DCT make of the same training images, for the least-squares fit."""
  rgb_spec = make_spec(config, 'rgb', None, source)
  loader = fd.Loader(
    source, batch_size=16, seed=1, transform=eval_transform(config, source, config.size)
  )
  shrink = fd.resize(config.rgb_size)
  # A few places of each map tell as much as all of them, in a fraction of the memory.
  rgb_features = jax.jit(lambda x: models.entry_features(rgb_model, rgb, x)[:, ::4, ::4])
  dct_features = jax.jit(lambda x: models.entry_features(program.model, variables, x)[:, ::4, ::4])
  stems, coefficients = [], []
  for batch in itertools.islice(loader, -(-config.init.images // 16)):
    if not batch['mask'].all():
      continue  # a damaged image
    small = np.stack([shrink({'image': image}, None)['image'] for image in batch['image']])
    stems.append(np.asarray(rgb_features(fd.preprocess(rgb_spec, small))))
    coefficients.append(np.asarray(dct_features(fd.preprocess(program.spec, batch['image']))))
  return {'rgb_features': np.concatenate(stems), 'dct_features': np.concatenate(coefficients)}


def run(config, name: str, seed: int, program: Program, sources, folder, mesh) -> dict:
  """Trains and scores one seed of one setting; its outcome is also `folder/result.json`."""
  d, size, use_ema = config.data, sides(config, name), bool(config.optim.ema)
  loader = fd.Loader(
    sources[0],
    batch_size=d.batch_size,
    seed=seed,
    workers=d.workers,
    transform=train_transform(config, sources[0], size),
    strict=d.strict,
  )
  validation = fd.Loader(
    sources[1],
    batch_size=d.eval_batch_size,
    shuffle=False,
    repeat=False,
    workers=d.workers,
    transform=eval_transform(config, sources[1], size),
    strict=d.strict,
  )
  key = jax.random.key(seed)
  variables = initial_variables(
    config, program, name, jax.random.fold_in(key, 0), sources[0], folder
  )
  model_state = {'batch_stats': variables['batch_stats'], 'calls': jnp.zeros((), jnp.int32)}
  if SETTINGS[name].gate:
    model_state['selection'] = fnn.init_selection(program.spec.num_channels)
  state = train.create_state(
    variables['params'], model_state, program.tx, jax.random.fold_in(key, 1), ema=use_ema
  )

  last: dict[str, float] = {}

  def validate(state):
    means = train.evaluate(program.eval_step, state, validation, mesh=mesh, use_ema=use_ema)
    last.update({f'val/{k}': v for k, v in means.items()})
    return last

  fitted = train.fit(
    state,
    program.step,
    loader,
    workdir=folder,
    total_steps=program.total_steps,
    mesh=mesh,
    evaluators=(validate,),
    log_every=config.log_every,
    eval_every=max(1, round(config.eval_epochs * program.steps_per_epoch)),
    checkpoint_every=max(1, round(config.checkpoint_epochs * program.steps_per_epoch)),
    keep=config.keep_checkpoints,
    profile=config.profile,
  )
  final = fitted.state.ema if use_ema else fitted.state
  scored, damaged = predictions(program, final, validation, mesh)
  hit = scored['top'] == scored['label'][:, None]
  result = {
    'setting': name,
    'seed': seed,
    'top1': float(100 * hit[:, 0].mean()),
    'top5': float(100 * hit.any(-1).mean()),
    'samples': len(hit),
    'seconds': next((h['seconds'] for h in reversed(fitted.history) if 'seconds' in h), 0.0),
    'hardware': ledger.hardware(),
    'revision': ledger.revision(),
    'corrupt': {
      'training': dataclasses.asdict(fitted.corrupt),
      # Every image is looked at once; the names are this process's.
      'validation': {'count': len(sources[1]) - len(hit), 'files': damaged},
    },
    **program.costs,
  }
  if program.spec.channels is not None:
    result['channels'] = list(program.spec.channels)
  if SETTINGS[name].gate:
    # Counted over the whole of training, on training images alone.
    frequency = fnn.selection_frequency(fitted.state.model_state['selection'])
    result['selection'] = np.asarray(frequency).tolist()
    # Nothing was evaluated if an earlier start had made the last step already.
    result['channels_on'] = (last or validate(fitted.state))['val/channels_on']
  if train.is_main():
    save_arrays(folder / 'predictions.npz', **scored)
    trained = {'params': final.params, 'batch_stats': final.model_state['batch_stats']}
    save_tree(folder / 'variables.npz', jax.device_get(trained))
    # What the network has to be fed with: size, channels, mean, standard deviation.
    files.write_text(folder / 'input.json', json.dumps(dataclasses.asdict(program.spec)))
    files.write_text(folder / 'result.json', json.dumps(result))  # last: it marks a finished run
  train.synchronize(f'{name} {seed} written')  # before another process reads it
  return result


def predictions(program: Program, state, loader, mesh) -> tuple[dict[str, np.ndarray], dict]:
  """Five most probable classes of every validation image, and what could not be decoded."""
  parts, batches = [], iter(loader)
  for batch in batches:
    out = program.predict(state.params, state.model_state, train.shard_batch(batch, mesh))
    parts.append(jax.device_get(out))
  merged = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  real = merged.pop('mask') > 0
  return {k: v[real] for k, v in merged.items()}, batches.corrupt.files


# ---------------------------------------------------------------------------- comparison


def compare(workdir, runs) -> list[dict]:
  """One row per setting: means over the seeds, and the gain over RGB on the same images.

  The spread is a standard error: the seeds' and the images' (paired for the gain, where both
  networks see the same images), added in quadrature.
  """
  right = {name: correctness(workdir, name, results) for name, results in runs.items()}
  rows = []
  for name, results in runs.items():
    row = {
      'setting': name,
      'title': SETTINGS[name].title,
      'top1': float(np.mean([r['top1'] for r in results])),
      'spread': ledger.standard_error(100 * right[name]) or 0.0,
      'top5': float(np.mean([r['top5'] for r in results])),
      'seeds': len(results),
      'samples': results[0]['samples'],
      'seconds': float(np.mean([r['seconds'] for r in results])),
    }
    same = ('input_bytes', 'input_values', 'macs', 'params', 'hardware', 'revision')
    row.update({k: results[0][k] for k in same})
    if SETTINGS[name].gate:
      row['channels_on'] = float(np.mean([r['channels_on'] for r in results]))
    if name != 'rgb' and 'rgb' in right:
      row['gain'], row['gain_spread'] = paired_gain(right, name, 'rgb')
    controls = [c for c in ('rgb_half_idct', 'rgb_large_patchify') if c in right]
    if SETTINGS[name].kind == 'dct' and controls:
      # The control that leaves the least of the gain.
      gains = {control: paired_gain(right, name, control) for control in controls}
      row['control'] = min(gains, key=lambda c: gains[c][0])
      row['control_gain'], row['control_gain_spread'] = gains[row['control']]
    rows.append(row)
  return rows


def paired_gain(right, name: str, other: str) -> tuple[float, float]:
  """Difference in top-1 points on the same images, and its standard error."""
  difference = 100 * (right[name] - right[other])
  return float(difference.mean()), ledger.standard_error(difference) or 0.0


def correctness(workdir, name: str, results) -> np.ndarray:
  """1 where seed `s` got image `i` right: [seeds, images] float64."""
  per_seed = []
  for result in results:
    with np.load(workdir / name / f'seed{result["seed"]}' / 'predictions.npz') as z:
      order = np.argsort(z['index'])
      per_seed.append((z['top'][:, 0] == z['label'])[order])
  return np.stack(per_seed).astype(np.float64)


def print_table(rows: list[dict]) -> None:
  """The comparison on the terminal."""
  print(f'\n{"setting":<32}{"top-1 %":>16}{"input bytes":>13}{"values":>9}{"MACs":>9}{"gain":>16}')
  for row in rows:
    gain = f'{row["gain"]:+.2f} ± {row["gain_spread"]:.2f}' if 'gain' in row else ''
    top1 = f'{row["top1"]:.2f} ± {row["spread"]:.2f}'
    print(f'{row["title"]:<32}{top1:>16}{row["input_bytes"]:>13,}{row["input_values"]:>9,}'
          f'{row["macs"] / 1e6:>8.2f}M{gain:>16}')  # fmt: skip
  for row in rows:
    if 'control' in row:
      print(f'{row["title"]}: {row["control_gain"]:+.2f} ± {row["control_gain_spread"]:.2f}'
            f' over {SETTINGS[row["control"]].title}')  # fmt: skip
  print('± is one standard error (seeds and images together; paired for the gain).\n')


def left_out(runs) -> dict[str, fd.Corrupt]:
  """What could not be decoded in all runs together; every run sees the same validation images."""
  found = {'training': fd.Corrupt(), 'validation': fd.Corrupt()}
  for result in itertools.chain(*runs.values()):
    for part, corrupt in result.get('corrupt', {}).items():
      total = found[part]
      count = corrupt['count']
      total.count = max(total.count, count) if part == 'validation' else total.count + count
      total.files.update(corrupt['files'])
  return found


def write_report(config, workdir, rows, runs, source) -> None:
  """`report.html` of the comparison; pictures are of the gated setting, else of the last one."""
  shown = 'dct_gate' if 'dct_gate' in runs else list(runs)[-1]
  folders = {name: workdir / name / f'seed{results[0]["seed"]}' for name, results in runs.items()}
  with np.load(folders[shown] / 'predictions.npz') as z:
    scored = {k: z[k] for k in z.files}
  confusion = np.zeros((source.num_classes, source.num_classes), np.int64)
  np.add.at(confusion, (scored['label'], scored['top'][:, 0]), 1)
  heatmap = None
  if 'dct_gate' in runs:
    heatmap = np.mean([r['selection'] for r in runs['dct_gate']], axis=0)
  head = ('setting', 'top-1 %', 'gain over RGB', 'input bytes', 'values', 'million MACs', 'seeds')
  table = train.Table(
    'Settings',
    head,
    [
      (
        row['title'],
        (row['top1'], row['spread']),
        (row['gain'], row['gain_spread']) if 'gain' in row else None,
        row['input_bytes'],
        row['input_values'],
        row['macs'] / 1e6,
        row['seeds'],
      )
      for row in rows
    ],
    '± is one standard error over seeds and images together, paired for the gain.'
    ' Bytes: pixels as uint8, coefficients as int16.',
  )
  # Spread over the validation set, half of them mistakes where there are so many.
  wrong = np.flatnonzero(scored['top'][:, 0] != scored['label'])
  right = np.flatnonzero(scored['top'][:, 0] == scored['label'])
  picks = np.concatenate([evenly(wrong, 12), evenly(right, 12)])
  samples = [
    train.Sample(
      source[int(scored['index'][i])]['image'],
      int(scored['label'][i]),
      int(scored['top'][i, 0]),
      float(scored['probability'][i, 0]),
    )
    for i in picks
    if not stored(source)
  ]
  train.write_report(
    workdir / 'report.html',
    title=f'{config.data.name}: {config.model.name} on DCT coefficients and on pixels',
    command=ledger.command(),
    config=config.to_dict(),
    history={
      name: train.read_json_lines(folder / 'metrics.jsonl') for name, folder in folders.items()
    },
    heatmap=heatmap,
    block=config.dct.block,
    confusion=confusion,
    class_names=source.class_names,
    samples=samples,
    tables=(table,),
    hardware=ledger.hardware(),
    corrupt=left_out(runs),
  )


def evenly(indices: np.ndarray, n: int) -> np.ndarray:
  """At most `n` of `indices`, equally far apart."""
  return (
    indices[np.unique(np.linspace(0, len(indices) - 1, n).astype(int))] if len(indices) else indices
  )


def record(config, workdir: pathlib.Path, rows) -> None:
  """Appends the comparison to the ledger, one row per metric; a second time, nothing."""
  data = data_label(config.data.name)
  out = []
  for row in rows:
    name, setting = row['setting'], SETTINGS[row['setting']]
    label = {
      'dct': f'{config.dct.pattern}{config.dct.channels}',
      'gate_then_static': f'gate_then_static{config.dct.channels}',
    }.get(name, name)
    common = {
      'run': f'imagenet_freq/{data}/{config.model.name}{setting.suffix}/{label}',
      'data': f'{data} {config.data.val_split}',
      'seeds': row['seeds'],
      'samples': row['samples'],
      'bytes': row['input_bytes'],
      'hardware': row['hardware'],
      'revision': row['revision'],
    }

    def add(metric, value, common=common, **rest):
      out.append(ledger.Row(metric=metric, value=value, **common, **rest))

    reference = config.reference if name == 'dct' else ''
    add('top1', row['top1'], spread=row['spread'], reference=reference)
    add('top5', row['top5'])
    if 'gain' in row:
      goal = config.goal if setting.kind == 'dct' and config.goal else None
      add('gain', row['gain'], spread=row['gain_spread'], reference='rgb', goal=goal)
    if 'control' in row:
      value, spread = row['control_gain'], row['control_gain_spread']
      add('gain_over_controls', value, spread=spread, reference=row['control'])
    for metric, key in (
      ('input_bytes', 'input_bytes'),
      ('input_values', 'input_values'),
      ('macs', 'macs'),
      ('parameters', 'params'),
      ('channels_on', 'channels_on'),
    ):
      if key in row:
        add(metric, row[key])
  record_once(workdir / 'recorded.json', rows, out)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.imagenet_freq`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
