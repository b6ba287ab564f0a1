"""Pictures of pruned convolutions for reports: patterns, ADMM over time, what a network looks at."""

from collections.abc import Mapping, Sequence
import functools
import pathlib

import jax
import jax.numpy as jnp
from matplotlib.ticker import MaxNLocator
import numpy as np

from experiments import compression as cp
from experiments import kernels, outcome, tasks
from fqjax import _figures, train
from fqjax.sparsity import plots

_READABLE = 32  # patterns in one histogram
_SHOWN = 8  # feature maps, and images of the saliency


def patterns(name: str, rung: cp.Rung) -> list[train.Picture]:
  """The library of a network, every pattern drawn above the number of its kernels."""
  if not kernels.patterned(rung.plan):
    return []
  masks, counts, _ = kernels.usage(rung.plan, rung.variables.params)
  if len(masks) > _READABLE:
    return []
  return [
    train.Picture(
      f'Patterns of {name}',
      plots.pattern_histogram(masks, counts),
      'Kernels of the pruned network that use each pattern of its library, first seed.',
    )
  ]


def lost_against_rate(
  summary: Sequence[dict], metric: outcome.Metric = outcome.TOP1
) -> list[train.Picture]:
  """What pruning costs at which rate of the convolutions."""
  points = [
    plots.Point(
      e['conv_compression'],
      metric.lost(e['change']),
      e['change_spread'],
      series=e.get('series', e['setting']),
    )
    for e in summary
    if e['conv_compression'] > 1
  ]
  if not points:
    return []
  figure = plots.accuracy_against_rate(
    points, rate='rate of the convolutions', value=f'lost, {metric.title}', dense=0.0
  )
  caption = (
    'Against the dense network, paired by seed and item; weights of all convolutions, the first '
    'included, over those kept. Below the dashed line the pruned network is better.'
  )
  return [train.Picture('What is lost at which rate', figure, caption)]


def over_time(
  folders: Mapping[str, Sequence[pathlib.Path]], key: str, title: str, caption: str
) -> list[train.Picture]:
  """One logged number of several networks; the phases of each one after the other.

  Args:
    folders: name -> its phases in order; those without a log are passed over.
    key: of the number in `metrics.jsonl`.
    title: of the picture, and of its vertical axis.
    caption: below it.
  """
  figure = _figures.figure(7.0, 4.2, images=False)
  axes = figure.subplots()
  for name, phases in folders.items():
    steps, values, before = [], [], 0
    for folder in phases:
      rows = log(folder)
      # Before its first refresh a phase knows no gap and says 0.
      seen = [row for row in rows if key in row and row.get('admm/gap', 1) > 0]
      steps += [before + row['step'] for row in seen]
      values += [row[key] for row in seen]
      before += max((row['step'] for row in rows), default=0)
    if steps:
      axes.plot(steps, values, marker='.', label=name)
  if not axes.lines:
    return []
  axes.set_xlabel('step')
  axes.set_ylabel(title)
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  return [train.Picture(title, figure, caption)]


def switches(name: str, phases: Sequence[pathlib.Path]) -> list[train.Picture]:
  """Share of kernels that changed their taps between two refreshes, layer by layer."""
  # A phase that went on from a checkpoint looked at some steps twice.
  looks = [{row['step']: row for row in log(folder, 'switches.jsonl')} for folder in phases]
  rows = [row for phase in looks for row in phase.values()]
  if not rows:
    return []
  layers = [name for name in rows[0] if name != 'step']
  shares = 100 * np.array([[row[layer] for row in rows] for layer in layers])
  figure = _figures.figure(7.5, 1.4 + 0.2 * len(layers), images=False)
  axes = figure.subplots()
  image = axes.imshow(shares, aspect='auto', cmap='YlOrRd', vmin=0.0, interpolation='nearest')
  axes.set_yticks(range(len(layers)), layers, fontsize=7)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel('look')
  figure.colorbar(image, ax=axes, label='kernels that switched, %')
  return [
    train.Picture(
      f'Kernels that switch their pattern: {name}',
      figure,
      'Share of a layer since the look before, one at every refresh; first seed.',
    )
  ]


def looks(
  model, dense: tasks.Variables, pruned: tasks.Variables, task: tasks.Task, name: str, mean, std
) -> list[train.Picture]:
  """Feature maps and saliency of the dense and a pruned network side by side.

  Args:
    model: the network.
    dense: its variables.
    pruned: likewise.
    task: what both learned; `sample` are the images.
    name: of the pruned network.
    mean: of pixels in 0..1 that the network's input was normalised with.
    std: likewise.
  """
  x = jnp.asarray(task.sample[:_SHOWN])
  images = np.clip(np.asarray(x) * np.asarray(std) + np.asarray(mean), 0, 1)
  layer = kernels.convolutions(dense.params, task.layers)[1].path.split('/')[0]
  maps, saliency = _looks(model, layer)
  first, second = (np.asarray(maps(v, x[:1])) for v in (dense, pruned))
  wide = [np.moveaxis(a[0], -1, 0)[:_SHOWN] for a in (first, second)]
  classes = jax.jit(model.apply)({'params': dense.params, **dense.model_state}, x).argmax(-1)
  where = [np.asarray(saliency(v, x, classes)) for v in (dense, pruned)]
  names = ('dense', name)
  return [
    train.Picture(
      f'Feature maps: dense and {name}',
      plots.feature_maps(*wide, names=names),
      f'The first channels behind {layer}, of the first image below.',
    ),
    train.Picture(
      f'Saliency: dense and {name}',
      plots.feature_maps(*where, images=images, names=names, labels=[''] * len(images)),
      'Gradient of the class the dense network sees with respect to each pixel, its largest '
      'channel. Training images.',
    ),
  ]


@functools.lru_cache(maxsize=4)
def _looks(model, layer: str):
  def apply(variables, x, **kwargs):
    return model.apply({'params': variables.params, **variables.model_state}, x, **kwargs)

  @jax.jit
  def maps(variables, x):
    _, state = apply(
      variables,
      x,
      capture_intermediates=lambda module, method: module.name == layer and method == '__call__',
      mutable=['intermediates'],
    )
    return state['intermediates'][layer]['__call__'][0]

  @jax.jit
  def saliency(variables, x, classes):
    def chosen(x):
      return jnp.sum(jnp.take_along_axis(apply(variables, x), classes[:, None], 1))

    return jnp.abs(jax.grad(chosen)(x)).max(-1)

  return maps, saliency


def log(folder: pathlib.Path, name: str = 'metrics.jsonl') -> list[dict]:
  """The lines of a phase's log, none where there is none."""
  path = folder / name
  return train.read_json_lines(path) if path.exists() else []
