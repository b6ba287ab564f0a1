"""A published network cut once, nothing trained: only batch-norm statistics are taken anew.

  python -m experiments.one_shot --config=configs/one_shot.py --workdir=runs/one_shot

The 1x1 convolutions of MobileNetV2 lose a half, two thirds, four fifths of their weights; depthwise
convolutions, stem and classifier stay as they are. For every *structure*

  unstructured           single weights
  blocksRxC              blocks of R filters and C neighbouring inputs

and every *criterion* for what is kept

  weights                the largest
  inputs                 the largest times the norm of the input they are multiplied with

statistics, and the norms, are those of photographs without labels that are not scored. The network
is compared with the float one, as published: photographs it gets right, first guesses they share,
mean difference of the logits. Run again with the same `--workdir`, finished parts are read back. At
the end `report.html` and `results.json` stand in the workdir.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import re
import time
from typing import Any, NamedTuple

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from experiments import cifar, harness, ledger, outcome, tasks
from experiments import compression as cp
from experiments.harness import data_label, record_once, save_arrays, say
from fqjax import data as fd
from fqjax import models, rules, sparsity, train
from fqjax.sparsity import plots

CRITERIA = ('weights', 'inputs')
# Fields that may change between a run and its continuation.
_FREE = re.compile(r'structures|sparsities|criteria|record|data\.workers')


class Setting(NamedTuple):
  """One way to cut.

  Attributes:
    structure: 'unstructured' or 'blocksRxC'.
    sparsity: share of the weights that go.
    criterion: one of `CRITERIA`.
  """

  structure: str
  sparsity: float
  criterion: str

  @property
  def name(self) -> str:
    """As in tables, and in the ledger."""
    return f'{self.series}_{100 * self.sparsity:g}'

  @property
  def series(self) -> str:
    """Without the sparsity."""
    return self.structure + ('_by_inputs' if self.criterion == 'inputs' else '')


class Network(NamedTuple):
  """What is cut and how it is looked at.

  Attributes:
    task: of `compression.classifier`.
    dense: variables as published.
    logits: variables -> float32 [photographs, classes].
    labels: int [photographs].
    input_energy: () -> path of a convolution's kernel -> mean square of each of its inputs.
  """

  task: tasks.Task
  dense: tasks.Variables
  logits: Callable[[tasks.Variables], np.ndarray]
  labels: np.ndarray
  input_energy: Callable[[], dict[str, np.ndarray]]


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Cuts the network in every setting; returns a row for each."""
  check(config)
  started = time.time()
  mesh = harness.begin(config, workdir, _FREE)
  network = make_network(config, mesh)
  dense = logits_of(workdir / 'dense.npz', network, lambda: network.dense)
  anew = logits_of(
    workdir / 'recalibrated.npz', network, lambda: cp.recalibrated(network.task, network.dense)
  )
  nothing = sparsity.make_plan(network.dense.params, [('.*', None)])
  found = {'recalibrated': measured('recalibrated', anew, dense, network, nothing, network.dense)}
  plans = {}
  for setting in settings(config):
    plan = make_plan(config, setting, network)
    saliency = input_saliency(network, plan) if setting.criterion == 'inputs' else None
    params, masks = rules.finalize(plan, network.dense.params, saliency=saliency)
    cut = network.dense._replace(params=params)
    logits = logits_of(
      workdir / f'{setting.name}.npz', network, lambda cut=cut: cp.recalibrated(network.task, cut)
    )
    found[setting.name] = measured(setting.name, logits, dense, network, plan, cut)
    plans[setting.name] = plan, masks
    say(line(found[setting.name]))
  summary = outcome.summarize(list(found.values()))
  for entry, setting in zip(summary[1:], settings(config), strict=True):
    entry |= {'series': setting.series, 'sparsity': 100 * setting.sparsity}
  if train.is_main():
    outcome.save(workdir, summary)
    report(config, workdir, summary, plans)
    if config.record:
      record(config, workdir, summary)
    outcome.show(table(config, summary))
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def check(config) -> None:
  """Refuses what can only fail later.

  Raises:
    ValueError: naming the field.
  """
  for structure in config.structures:
    _structure(structure, 0.5)
  for share in config.sparsities:
    if not 0 < share < 1:
      raise ValueError(f'config.sparsities has {share}; shares of weights that go are in (0, 1)')
  for criterion in config.criteria:
    if criterion not in CRITERIA:
      raise ValueError(f'config.criteria has {criterion!r}: choose {", ".join(CRITERIA)}')
  d = config.data
  if d.calibration_images % d.eval_batch_size:
    raise ValueError(
      f'config.data.calibration_images={d.calibration_images} must be batches of '
      f'config.data.eval_batch_size={d.eval_batch_size}: statistics count every batch the same'
    )


def settings(config) -> list[Setting]:
  """All that are compared, the mild ones of a series first."""
  return [
    Setting(structure, share, criterion)
    for criterion in config.criteria
    for structure in config.structures
    for share in config.sparsities
  ]


# ---------------------------------------------------------------------------- network


def make_network(config, mesh) -> Network:
  """The network and the two sets of photographs: one gives statistics, the other is scored."""
  d = config.data
  scored = fd.load_source(d.name, d.test_split)
  unlabelled = fd.load_source(d.calibration, d.calibration_split)
  spec = fd.InputSpec(
    'rgb', d.size, mean=tuple(255 * m for m in d.mean), std=tuple(255 * s for s in d.std)
  )
  model = models.create_model(
    config.model.name, num_classes=scored.num_classes, **config.model.options
  )
  view = fd.resize_crop(d.resize, d.size)
  weights = config.model.weights
  task = tasks.classifier(
    model,
    unlabelled,
    {},
    spec,
    initial=cifar.initial(weights, model) if weights else None,
    eval_transform=view,
    eval_batch_size=d.eval_batch_size,
    calibration_images=d.calibration_images,
    mesh=mesh,
  )
  dense = task.init(jax.random.key(0))

  def apply(params, model_state, batch):
    x = fd.preprocess(spec, batch['image'])
    return model.apply({'params': params, **model_state}, x)

  predict = train.make_eval_step(
    lambda params, model_state, batch: {
      'logits': apply(params, model_state, batch), 'label': batch['label'],
      'mask': batch['mask'], 'index': batch['index'],
    },
    mesh=mesh,
  )  # fmt: skip

  def photographs():
    return fd.Loader(scored, d.eval_batch_size, shuffle=False, repeat=False, transform=view)

  @jax.jit
  def squares(params, model_state, batch):
    return inputs_squared(lambda: apply(params, model_state, batch))

  @functools.cache
  def input_energy():
    sums = [jax.device_get(squares(*dense, batch)) for batch in task.calibration()]
    return {path: np.mean([part[path] for part in sums], 0) for path in sums[0]}

  return Network(
    task,
    dense,
    lambda variables: tasks.each_item(predict, variables, photographs(), mesh)['logits'],
    np.array([scored.read(i)['label'] for i in range(len(scored))]),
    input_energy,
  )


def inputs_squared(run: Callable[[], Any]) -> dict[str, jax.Array]:
  """Mean square of every input channel of every convolution that `run` passes through."""
  found = {}

  def note(call, args, kwargs, context):
    if isinstance(context.module, nn.Conv) and context.method_name == '__call__':
      path = '/'.join((*context.module.path, 'kernel'))
      found[path] = jnp.mean(jnp.square(args[0]), axis=(0, 1, 2))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    run()
  return found


def logits_of(
  path: pathlib.Path, network: Network, variables: Callable[[], tasks.Variables]
) -> np.ndarray:
  """Logits of the photographs; read from `path` if they are there."""
  with harness.alone(path):
    if not path.exists():
      found = network.logits(variables())
      if train.is_main():
        save_arrays(path, logits=found)
      train.synchronize(f'{path} written')
      return found
    with np.load(path, allow_pickle=False) as file:
      return file['logits']


# ---------------------------------------------------------------------------- cut


def _structure(name: str, share: float) -> sparsity.Structure:
  if name == 'unstructured':
    return sparsity.Unstructured(keep=1 - share)
  match = re.fullmatch(r'blocks(\d+)x(\d+)', name)
  if match is None:
    raise ValueError(f"config.structures has {name!r}: 'unstructured', or e.g. 'blocks1x4'")
  return sparsity.Blocks(int(match[1]), int(match[2]), keep=1 - share)


def make_plan(config, setting: Setting, network: Network) -> sparsity.Plan:
  """The same share of every layer that `config.layers` selects."""
  structure = _structure(setting.structure, setting.sparsity)
  return sparsity.make_plan(
    network.dense.params,
    [(config.layers, structure)],
    layers=network.task.layers,
    dense=('first', 'last', 'depthwise'),
  )


def input_saliency(network: Network, plan: sparsity.Plan):
  """(w * norm of its input)^2 for the layers of a plan, None elsewhere: what structures rank."""
  energy = network.input_energy()
  params = flatten_dict(network.dense.params, sep='/')
  found: dict[str, Any] = dict.fromkeys(params)
  for entry in plan.pruned:
    if entry.layout != 'HWIO':
      raise ValueError(f'{entry.path} is {entry.layout}; inputs are known of convolutions, HWIO')
    scale = jnp.asarray(energy[entry.path])[None, None, :, None]
    found[entry.path] = jnp.square(params[entry.path]) * scale
  return unflatten_dict(found, sep='/')


def measured(
  name: str,
  logits: np.ndarray,
  dense: np.ndarray,
  network: Network,
  plan: sparsity.Plan,
  variables: tasks.Variables,
) -> outcome.Measured:
  """A network's photographs beside those of the float one."""
  right, dense_right = (
    {'test': (x.argmax(-1) == network.labels).astype(np.float64)} for x in (logits, dense)
  )
  same = 100.0 * (logits.argmax(-1) == dense.argmax(-1))
  apart = np.abs(logits - dense).mean(-1)
  numbers = {
    'right': float(right['test'].sum()),
    'dense_right': float(dense_right['test'].sum()),
    'agreement': float(same.mean()),
    'agreement_spread': ledger.standard_error(same) or 0.0,
    'logit_error': float(apart.mean()),
    'logit_error_spread': ledger.standard_error(apart) or 0.0,
  }
  sizes = cp.measure(plan, variables)
  return outcome.Measured(name, 0, 0, right, right, dense_right, sizes, numbers)


# ---------------------------------------------------------------------------- outcome


def line(found: outcome.Measured) -> str:
  """One network on the terminal."""
  n, numbers = len(found.scores['test']), found.extra
  return (
    f'{found.setting}: {numbers["right"]:.0f} of {n} right (float {numbers["dense_right"]:.0f}), '
    f'{numbers["agreement"]:.1f} % agree, logits differ by {numbers["logit_error"]:.3f}'
  )


def table(config, summary: Sequence[dict]) -> train.Table:
  """All settings beside the float network."""
  head = ('setting', 'right', 'change, points', 'agreement, %', 'logit error', 'rate', 'bytes',
          'bits per weight')  # fmt: skip
  rows = [
    (
      e['setting'],
      f'{e["right"]:.0f} of {e["samples"]}',
      (e['change'], e['change_spread']),
      (e['agreement'], e['agreement_spread']),
      (e['logit_error'], e['logit_error_spread']),
      e['compression'],
      round(e['stored_bytes']),
      e['bits_per_weight'],
    )
    for e in summary
  ]
  first = summary[0]
  note = (
    f'The float network as published gets {first["dense_right"]:.0f} of {first["samples"]} right in '
    f'{first["dense_bytes"]:,} bytes; recalibrated: nothing is cut. Statistics are those of '
    f'{config.data.calibration_images} photographs of {data_label(config.data.calibration)}, none of '
    'them scored. ± is one standard error over photographs; rate: dense weights over kept ones, the '
    'whole network.'
  )
  return train.Table('Cut once, nothing trained', head, rows, note)


def report(config, workdir: pathlib.Path, summary: list[dict], plans) -> None:
  """`report.html`."""
  first = summary[0]
  cut = summary[1:]
  pictures = [
    train.Picture(
      title,
      plots.accuracy_against_rate(
        [plots.Point(e['sparsity'], e[key], e[spread], series=e['series']) for e in cut],
        dense=(first['dense'], first['dense_spread']) if key == 'value' else None,
        rate='weights of the 1x1 convolutions that went, %',
        value=axis,
        log=False,
      ),
      'Error bars of one standard error over photographs.',
    )
    for title, key, spread, axis in (
      ('Accuracy against sparsity', 'value', 'spread', 'top-1, %'),
      (
        'First guesses shared with the float network',
        'agreement',
        'agreement_spread',
        'agreement, %',
      ),
    )
  ]
  name, (plan, masks) = next(iter(plans.items()))
  pictures.append(
    train.Picture(f'What every layer kept: {name}', plots.kept_per_layer(plan, masks))
  )
  train.write_report(
    workdir / 'report.html',
    title=f'{config.model.name} cut once, without training',
    command=ledger.command(),
    config=config.to_dict(),
    history={},
    tables=[table(config, summary)],
    figures=pictures,
    summary={},
    hardware=ledger.hardware(),
  )


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends the float network and every setting to the ledger."""
  d = config.data
  where = f'one_shot/{data_label(d.name)}/{config.model.name}'
  scored = (
    f'{data_label(d.name)} {d.test_split}, statistics of {d.calibration_images} photographs of '
    f'{data_label(d.calibration)}, from the published {config.model.weights}'
  )
  rows = [outcome.dense_row(summary[0], f'{where}/dense', scored)]
  for entry in summary:
    rows += outcome.ledger_rows(entry, f'{where}/{entry["setting"]}', scored)
  record_once(workdir / 'recorded.json', summary, rows)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.one_shot`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
