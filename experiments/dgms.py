"""Networks of few distinct weights: trained Gaussian mixtures beside other levels (DGMS, 2022).

  python -m experiments.dgms --config=configs/dgms.py:resnet20 --workdir=runs/dgms

A dense network is trained or loaded and quantized in every *setting*, each trained for as many
epochs. What the network computes with, the last steps of every setting, and what is scored and
counted are exact levels; batch-norm statistics are taken anew on training images first.

  mixture   one Gaussian mixture per layer, its means trained with the weights: soft weights first,
            hard ones with straight-through gradients at the end
  levels    equal steps, powers of two or three levels by ADMM, then mapped a part at a time
  uniform   equal steps per output channel, straight-through
  binary    one scale per output channel and a sign, straight-through

Run again with the same `--workdir`, it goes on where it stopped; programs that run side by side with
different `,settings=a+b` may share one. At the end `report.html` and `results.json` stand in the
workdir.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re
import time
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import optax

from experiments import cifar, harness, outcome, pictures
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from experiments.tasks import Task, Variables
from fqjax import quantize, rules, train
from fqjax.quantize import plots
from fqjax.tracing import leaf_name

KINDS = ('mixture', 'levels', 'uniform', 'binary')
PHASES = ('soft', 'hard', 'pull', 'mapping', 'straight')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|record|log_every|dense_goal|data\.workers|choices\..*\.(goals|reference)'
)


class Quantized(NamedTuple):
  """A network on its levels.

  Attributes:
    plan: what every layer gets.
    variables: dense parameters on levels; statistics taken anew.
    codebooks: of `quantize.fit`, or trained mixtures.
    start: codebooks at the beginning.
  """

  plan: quantize.Plan
  variables: Variables
  codebooks: Any
  start: Any


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Quantizes and scores every setting with every seed; returns a row per setting."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  started = time.time()
  task, _ = cifar.make_task(config, mesh)
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    first = task.init(jax.random.key(seed))
    for name in config.settings:  # what does not fit this network is found before it is trained
      make_plan(config, name, first.params, task.layers)
    dense = cp.phase(run, 'dense', first, config.dense)
    before = cp.scores(run, 'dense', dense, anew=False)
    run = run._replace(task=cp.student(task, config.distill, dense))
    for name in config.settings:
      inside = run._replace(folder=run.folder / name)
      network, cut = train_levels(config, name, inside, dense)
      found = cp.scores(inside, 'quantized', network.variables, anew=False)
      sizes = measure(network)
      networks.append(outcome.Measured(name, seed, 0, found, cut, before, sizes))
      say(f'{config.model.label} {outcome.line(networks[-1])}')
      if seed == config.seeds[0]:
        shown[name] = network, dense
  summary = outcome.summarize(networks)
  for entry in summary:
    entry['series'] = config.choices[entry['setting']].kind
  if train.is_main():
    outcome.save(workdir, summary)
    report(config, workdir, summary, shown)
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary)
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  for name in config.settings:
    if name not in config.choices:
      raise ValueError(f'unknown setting {name!r}; config.choices has {", ".join(config.choices)}')
    choice = config.choices[name]
    if choice.kind not in KINDS:
      raise ValueError(f'config.choices.{name}.kind={choice.kind!r}: choose {", ".join(KINDS)}')
    quantizer(choice)
  cp.check_distill(config.distill)
  for name in ('dense', *PHASES):
    cp.check_recipe(name, config[name])


# ---------------------------------------------------------------------------- plans


def quantizer(choice) -> quantize.Quantizer:
  """What a setting makes of an inner layer.

  Raises:
    ValueError: for settings that make no sense.
  """
  if choice.kind == 'mixture':
    return quantize.Mixture(2**choice.bits, tau=choice.tau)
  if choice.kind == 'binary':
    return quantize.Binary('channel')
  if choice.kind == 'uniform':
    return quantize.Uniform(choice.bits, 'channel', 'mse')
  named = {
    'interval': lambda: quantize.Interval(choice.bits, 'layer'),
    'power_of_two': lambda: quantize.PowerOfTwo(choice.bits, 'layer'),
    'ternary': lambda: quantize.Ternary('layer'),
  }
  if choice.levels not in named:
    raise ValueError(f'levels={choice.levels!r}: choose {", ".join(named)}')
  return named[choice.levels]()


def make_plan(config, name: str, params, layers) -> quantize.Plan:
  """The plan of a setting: first and last layers in `edges` bits, the others on its levels."""
  choice = config.choices[name]
  ends = []
  if choice.edges:
    edge = quantize.Uniform(choice.edges, 'channel') if choice.edges < 32 else None
    ends = [(regex, edge) for regex in config.edges]
  return quantize.make_plan(
    params, [*ends, ('.*/kernel', quantizer(choice))], layers=layers, keep=()
  )


def only(plan: quantize.Plan, mixtures: bool) -> quantize.Plan:
  """The plan of the mixtures alone, or of everything else."""
  entries = tuple(
    entry
    if isinstance(entry.quantizer, quantize.Mixture) == mixtures
    else dataclasses.replace(entry, quantizer=None)
    for entry in plan.entries
  )
  return quantize.Plan(entries, plan.notes)


# ---------------------------------------------------------------------------- training


def train_levels(config, name: str, run: cp.Run, dense: Variables):
  """One setting.

  Returns:
    The network, and its scores right at the start, before any training.
  """
  plan = make_plan(config, name, dense.params, run.task.layers)
  if config.choices[name].kind == 'mixture':
    trained = train_mixtures(config, name, run, dense, plan)
  else:
    trained = train_fitted(config, name, run, dense, plan)
  start, params, state, books = trained
  on_levels = quantize.project(plan, dense.params, codebooks=start)
  cut = cp.scores(run, 'start', Variables(on_levels, dense.model_state))
  done = cp.settled(run, Variables(quantize.project(plan, params, codebooks=books), state))
  return Quantized(plan, done, books, start), cut


def train_mixtures(config, name: str, run: cp.Run, dense: Variables, plan: quantize.Plan):
  """Soft weights, then hard ones; the codebooks at the start, and what came out."""
  inner, outer = only(plan, True), quantize.straight_through(only(plan, False))
  choice = config.choices[name]
  mixtures = quantize.init_dgms(dense.params, inner)
  variables = Variables(
    {'params': dense.params, 'codebooks': as_dicts(mixtures)}, dense.model_state
  )
  for phase, mode in (('soft', 'soft'), ('hard', 'ste')):
    if phase == 'soft' and not choice.soft:
      continue
    how = config[phase]
    if not choice.soft:  # as long, and as fast, as the others
      how = config.soft.copy_and_resolve_references()
      how.epochs += config.hard.epochs

    def view(trained, mode=mode):
      seen = outer(trained['params'])
      return quantize.effective_params(seen, as_mixtures(trained['codebooks']), mode)

    inside = run._replace(task=seen_as(run.task, view))
    variables = cp.phase(
      inside,
      phase,
      variables,
      how,
      last=scaled(config.rates),
      watch=(watch_levels(plan),),
    )
  params = variables.params['params']
  trained = as_mixtures(variables.params['codebooks'])
  edges = quantize.fit(only(plan, False), params)
  first = quantize.fit(only(plan, False), dense.params)
  return (
    both(dense.params, mixtures, first),
    params,
    variables.model_state,
    both(params, trained, edges),
  )


def scaled(rates) -> optax.GradientTransformation:
  """Learning rates of the parts of a mixture, over that of the weights; its temperature stays."""
  by = {'mu': rates.mu, 'log_sigma': rates.sigma, 'pi': rates.pi, 'log_tau': 0.0}

  def scale(updates, params=None):
    del params
    codebooks = jax.tree_util.tree_map_with_path(
      lambda path, u: by[path[-1].key] * u, updates['codebooks']
    )
    return {'params': updates['params'], 'codebooks': codebooks}

  return optax.stateless(scale)


def train_fitted(config, name: str, run: cp.Run, dense: Variables, plan: quantize.Plan):
  """Levels that follow the weights: by ADMM and mapping, or straight-through."""
  start = quantize.fit(plan, dense.params)
  if config.choices[name].kind == 'levels':
    pulled = cp.phase(run, 'pull', dense, config.pull, target=quantize.target(plan))
    total = round(config.mapping.epochs * run.task.steps_per_epoch)
    last = None
    if total:
      # The whole is mapped before the last fifth: batch norm and biases settle around it.
      at = tuple(round(total * part) for part in (0.0, 0.3, 0.55, 0.8))
      last = rules.progressive_mapping(plan, at)
    params, state = cp.phase(run, 'mapping', pulled, config.mapping, last=last)
  else:
    seen = quantize.straight_through(plan)
    inside = run._replace(task=seen_as(run.task, seen))
    params, state = cp.phase(inside, 'straight', dense, config.straight)
  return start, params, state, quantize.fit(plan, params)


def seen_as(task: Task, view) -> Task:
  """The task of a network that sees `view(params)` in place of its params."""

  def loss_fn(params, model_state, batch, key):
    return task.loss_fn(view(params), model_state, batch, key)

  return task._replace(loss_fn=loss_fn)


def as_dicts(mixtures) -> dict:
  """Mixtures as nested dicts of arrays, for files; leaves without one are left out."""
  found = jax.tree_util.tree_leaves_with_path(mixtures, is_leaf=_is_mixture)
  return unflatten_dict(
    {tuple(key.key for key in path): leaf._asdict() for path, leaf in found if _is_mixture(leaf)}
  )


def as_mixtures(tree: Mapping) -> dict:
  """Inverse of `as_dicts`."""
  return jax.tree.map(
    lambda leaf: quantize.MixtureLeaf(**leaf), tree, is_leaf=lambda x: 'log_tau' in x
  )


def _is_mixture(x) -> bool:
  return isinstance(x, quantize.MixtureLeaf)


def both(params, mixtures, fitted):
  """One tree of codebooks like `params`: the mixtures, fitted ones elsewhere."""
  have = {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(mixtures, is_leaf=_is_mixture)
    if _is_mixture(leaf)
  }
  other = flatten_dict(fitted, sep='/')
  return unflatten_dict(
    {path: have.get(path, other.get(path)) for path in flatten_dict(params, sep='/')}, sep='/'
  )


def watch_levels(plan: quantize.Plan):
  """Logs the levels of the largest layer that has a mixture."""
  path = largest(plan)

  def look(state: train.TrainState) -> dict[str, float]:
    leaf = flatten_dict(state.params['codebooks'], sep='/')[f'{path}/mu']
    return {f'levels/{i}': float(x) for i, x in enumerate(np.sort(np.asarray(leaf)))}

  return look


def largest(plan: quantize.Plan) -> str:
  """Path of the layer with the most weights among those on the setting's own levels."""
  return max(
    (e for e in plan.quantized if not isinstance(e.quantizer, quantize.Uniform) or e.shape[0] > 1),
    key=lambda e: np.prod(e.shape),
  ).path


def measure(network: Quantized) -> cp.Sizes:
  """Counts the bytes of a network on its levels: indices, codebooks, and what stayed float."""
  found = quantize.sizes(network.plan, network.variables.params, codebooks=network.codebooks)
  kernels = {entry.path for entry in network.plan.entries if len(entry.shape) > 1}
  return cp.network_sizes(found, kernels, network.variables.model_state)


# ---------------------------------------------------------------------------- report


def report(config, workdir: pathlib.Path, summary: list[dict], shown: Mapping) -> None:
  """`report.html`: the comparison, weights and levels of a layer before and after, over time."""
  more = []
  for name, (network, dense) in shown.items():
    path = largest(network.plan)
    before, after = (
      np.asarray(flatten_dict(params, sep='/')[path])
      for params in (dense.params, network.variables.params)
    )
    start, end = (
      flatten_dict(books, sep='/', is_leaf=lambda _, x: not isinstance(x, dict))[path]
      for books in (network.start, network.codebooks)
    )
    more.append(
      train.Picture(
        f'Weights of {path}: {name}',
        plots.level_histogram(before, start, after, end),
        'Above the dense weights with the levels they begin on, below the quantized weights.',
      )
    )
    rows = [
      row
      for phase in ('soft', 'hard')
      for row in pictures.log(workdir / f'seed{config.seeds[0]}' / name / phase)
      if 'levels/0' in row
    ]
    if rows:
      keys = sorted((k for k in rows[0] if k.startswith('levels/')), key=lambda k: int(k[7:]))
      more.append(
        train.Picture(
          f'Levels over time: {name}',
          plots.levels_over_time([[row[k] for k in keys] for row in rows]),
          f'Means of the mixture of {path} at every look, soft weights first, then hard ones.',
        )
      )
  outcome.write_report(
    config, workdir, f'{config.data.name}: {config.model.label} of few distinct weights', summary,
    {}, more=more,
  )  # fmt: skip


# ---------------------------------------------------------------------------- ledger


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends the dense network and every setting to the ledger."""
  where = f'dgms/{data_label(config.data.name)}/{config.model.label}'
  scored = cifar.described(config)
  rows = [outcome.dense_row(summary[0], f'{where}/dense', scored, config.dense_goal or None)]
  for entry in summary:
    choice = config.choices[entry['setting']]
    text = f'{scored}, {epochs(config, choice):g} epochs'
    run = f'{where}/{entry["setting"]}'
    rows += outcome.ledger_rows(entry, run, text, dict(choice.goals), choice.reference)
  record_once(workdir / 'recorded.json', summary, rows)


def epochs(config, choice) -> float:
  """How long a setting trains."""
  phases = {'mixture': ('soft', 'hard'), 'levels': ('pull', 'mapping')}.get(
    choice.kind, ('straight',)
  )
  return sum(config[phase].epochs for phase in phases)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.dgms`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
