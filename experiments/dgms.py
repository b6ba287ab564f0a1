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

With `config.transfer` the network comes from other data: fine-tuned in float, quantized afresh, or
quantized there and fine-tuned here with its mixtures as they were.

Run again with the same `--workdir`, it goes on where it stopped; programs that run side by side with
different `,settings=a+b` may share one. At the end `report.html` and `results.json` stand in the
workdir.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re
import time
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import optax

from experiments import cifar, harness, levels, outcome, pictures
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from experiments.tasks import Variables
from fqjax import quantize, train
from fqjax.quantize import plots
from fqjax.tracing import leaf_name

KINDS = ('mixture', 'levels', 'uniform', 'binary')
PHASES = ('soft', 'hard', 'pull', 'mapping', 'straight')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|record|log_every|dense_goal|data\.workers|choices\..*\.(goals|reference)'
)


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Quantizes and scores every setting with every seed; returns a row per setting."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  started = time.time()
  task, _ = cifar.make_task(config, mesh)
  origin = source(config)
  other = None if origin is None else cifar.make_task(origin, mesh)[0]
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    first = task.init(jax.random.key(seed))
    for name in config.settings:  # what does not fit this network is found before it is trained
      make_plan(config, name, first.params, task.layers)
    there = run._replace(folder=run.folder / 'source')
    if other is not None:
      assert origin is not None
      there = there._replace(task=other)
      donor = cp.phase(there, 'dense', other.init(jax.random.key(seed)), origin.dense)
      first = with_body(donor, first)
    dense = cp.phase(run, 'dense', first, config.dense)
    before = cp.scores(run, 'dense', dense, anew=other is not None)
    run = run._replace(task=cp.student(task, config.distill, dense))
    for name in config.settings:
      inside, start, kept = run._replace(folder=run.folder / name), dense, None
      if other is not None:
        # Not from the float network of this data: all settings train on it for as long.
        start = first
        if name in config.transfer.kept:
          kept, _ = train_levels(config, name, there._replace(folder=there.folder / name), donor)
      network, cut = train_levels(config, name, inside, start, kept)
      found = cp.scores(inside, 'quantized', network.variables, anew=False)
      sizes = levels.measure(network)
      networks.append(outcome.Measured(name, seed, 0, found, cut, before, sizes))
      say(f'{config.model.label} {outcome.line(networks[-1])}')
      if seed == config.seeds[0]:
        shown[name] = network, start
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
  for name in config.transfer.kept:
    if config.choices[name].kind != 'mixture' or not config.transfer.data:
      raise ValueError(
        f'config.transfer.kept={name!r}: only mixtures are kept, and only from config.transfer.data'
      )
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
  if choice.kind == 'levels':
    return levels.quantizer(choice.levels, choice.bits)
  return levels.quantizer(choice.kind, choice.bits, 'channel')


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


def train_levels(config, name: str, run: cp.Run, dense: Variables, kept=None):
  """One setting.

  Args:
    config: of the experiment.
    name: of the setting.
    run: the network on its way.
    dense: to start from.
    kept: `levels.Quantized` of other data, whose weights and mixtures it starts from instead; the
      mixtures stay as they are.

  Returns:
    `levels.Quantized`, and its scores right at the start, before any training.
  """
  plan, kind = make_plan(config, name, dense.params, run.task.layers), config.choices[name].kind
  if kind == 'mixture':
    return train_mixtures(config, name, run, dense, plan, kept)
  if kind == 'levels':
    trained = levels.by_admm(run, config.pull, config.mapping, plan, dense)
  else:
    trained = levels.straight_through(run, config.straight, plan, dense)
  return levels.finish(run, plan, dense, trained)


def train_mixtures(
  config, name: str, run: cp.Run, dense: Variables, plan: quantize.Plan, kept=None
):
  """Soft weights, then hard ones; arguments and result as of `train_levels`."""
  inner, outer = only(plan, True), quantize.straight_through(only(plan, False))
  choice, rates = config.choices[name], config.rates
  if kept is None:
    mixtures = quantize.init_dgms(dense.params, inner)
  else:
    dense = with_body(kept.variables, dense)
    mixtures = matching(kept.codebooks, inner, dense.params)
    rates = dict.fromkeys(rates, 0.0)
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

    variables = cp.phase(
      run._replace(task=levels.seen_as(run.task, view)),
      phase,
      variables,
      how,
      last=scaled(rates),
      watch=(watch_levels(plan),),
    )
  params = variables.params['params']
  edges = only(plan, False)
  return levels.finish(
    run,
    plan,
    dense,
    Variables(params, variables.model_state),
    start=both(dense.params, mixtures, quantize.fit(edges, dense.params)),
    codebooks=both(params, as_mixtures(variables.params['codebooks']), quantize.fit(edges, params)),
  )


def scaled(rates) -> optax.GradientTransformation:
  """Learning rates of the parts of a mixture, over that of the weights; its temperature stays."""
  by = {'mu': rates['mu'], 'log_sigma': rates['sigma'], 'pi': rates['pi'], 'log_tau': 0.0}

  def scale(updates, params=None):
    del params
    codebooks = jax.tree_util.tree_map_with_path(
      lambda path, u: by[path[-1].key] * u, updates['codebooks']
    )
    return {'params': updates['params'], 'codebooks': codebooks}

  return optax.stateless(scale)


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


def by_path(mixtures) -> dict[str, quantize.MixtureLeaf]:
  """The mixtures of a tree by the paths of their weights."""
  found = jax.tree_util.tree_leaves_with_path(mixtures, is_leaf=_is_mixture)
  return {leaf_name(path): leaf for path, leaf in found if _is_mixture(leaf)}


def both(params, mixtures, fitted):
  """One tree of codebooks like `params`: the mixtures, fitted ones elsewhere."""
  have, other = by_path(mixtures), flatten_dict(fitted, sep='/')
  return unflatten_dict(
    {path: have.get(path, other.get(path)) for path in flatten_dict(params, sep='/')}, sep='/'
  )


def watch_levels(plan: quantize.Plan):
  """Logs the levels of the largest layer that has a mixture."""
  path = levels.largest(plan)

  def look(state: train.TrainState) -> dict[str, float]:
    leaf = flatten_dict(state.params['codebooks'], sep='/')[f'{path}/mu']
    return {f'levels/{i}': float(x) for i, x in enumerate(np.sort(np.asarray(leaf)))}

  return look


# ---------------------------------------------------------------------------- transfer


def source(config):
  """The configuration of the data that a network comes from, `config.transfer`; None without."""
  if not config.transfer.data:
    return None
  other = config.copy_and_resolve_references()
  with other.unlocked():
    other.data.update(
      name=config.transfer.data,
      train_split=config.transfer.train_split,
      held_out_split='',
      test_split=config.transfer.test_split,
    )
    other.model.weights, other.dense.epochs = config.transfer.weights, config.transfer.epochs
  return other


def with_body(donor: Variables, own: Variables) -> Variables:
  """`own` with every array of `donor` that has its path and shape: all but the classifier.

  Raises:
    ValueError: when none has.
  """

  def take(given, mine):
    have: dict[str, Any] = dict(flatten_dict(given, sep='/'))
    own: dict[str, Any] = dict(flatten_dict(mine, sep='/'))
    fits = {k: v for k, v in have.items() if k in own and np.shape(v) == np.shape(own[k])}
    return unflatten_dict({**own, **fits}, sep='/'), len(fits)

  params, count = take(donor.params, own.params)
  if not count:
    raise ValueError('the network of config.transfer has no array of this one.')
  state = take(donor.model_state, own.model_state)[0] if own.model_state else own.model_state
  return Variables(params, state)


def matching(codebooks, plan: quantize.Plan, params):
  """The mixtures of another network for the layers of a plan, as a tree like `params`.

  Raises:
    ValueError: a layer of the plan has none there.
  """
  have = by_path(codebooks)
  paths = {entry.path for entry in plan.quantized}
  if missing := paths - set(have):
    raise ValueError(f'{min(missing)!r} has no mixture in the network of config.transfer.')
  return unflatten_dict(
    {k: have[k] if k in paths else None for k in flatten_dict(params, sep='/')}, sep='/'
  )


# ---------------------------------------------------------------------------- report


def report(config, workdir: pathlib.Path, summary: list[dict], shown: Mapping) -> None:
  """`report.html`: the comparison, weights and levels of a layer before and after, over time."""
  more = []
  for name, (network, dense) in shown.items():
    more.append(levels.histogram(name, network, dense))
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
          f'Means of the mixture of {levels.largest(network.plan)} at every look, soft weights first, then hard ones.',
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
  if config.transfer.data:
    begun = config.transfer.weights or 'a network trained'
    scored += f', from {begun} of {data_label(config.transfer.data)}'
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
