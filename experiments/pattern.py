"""Kernels of 4 taps in a few patterns, and whole kernels that go (Ma et al., ECCV 2020).

  python -m experiments.pattern --config=configs/pattern.py:resnet20 --workdir=runs/pattern

One library of patterns serves all 3x3 convolutions but the first. Settings take it from

  extracted   training: ADMM towards 56 candidates, the most used stay, and so on (56, 44, 32, 12, 8,
              4); settings that share candidates share these phases
  elog4, corner4, elog4_corner4   design: T shapes, 2x2 blocks, both
  random      chance: the same candidates, drawn by the seed

Each goes on with ADMM towards its library (with a rate also towards fewer kernels, both in one exact
projection), hard projection, retraining of the survivors. `dense_retrained` is the control: the same
number of steps at the same learning rates, nothing pruned; `gain` is the paired difference to it. The
share of kernels that switch their pattern is logged at every refresh.

Run again with the same `--workdir`, it goes on where it stopped; finished phases are read back.
Programs that run side by side with different `,settings=a+b` may share a workdir; the same command
without it then makes the report of all. At the end `report.html` and `results.json` stand in the
workdir, for several networks in a folder of each.
"""

import pathlib
import re
import time

import jax
import numpy as np

from experiments import cifar, harness, kernels, outcome, pictures, tasks
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from fqjax import sparsity, train

CONTROL = 'dense_retrained'
LIBRARIES = ('extracted', 'random', 'elog4', 'corner4', 'elog4+corner4', 'edge4')
CANDIDATES = ('centre56', 'any4')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|networks|record|log_every|loss_goal|data\.workers'
  r'|choices\..*\.(goals|reference)'
)


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Compares every setting on every network; returns a row per setting."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  if not config.networks:
    return compare(config, workdir, mesh)
  rows = []
  for name in config.networks:
    rows += compare(cifar.with_network(config, name), workdir / name, mesh)
  return rows


def compare(config, workdir: pathlib.Path, mesh) -> list[dict]:
  """Prunes one network in every setting with every seed."""
  started = time.time()
  task, model = cifar.make_task(config, mesh)
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(
      task, workdir / f'seed{seed}', seed, mesh, config.log_every, (kernels.watch_switches,)
    )
    dense = cp.phase(run, 'dense', task.init(jax.random.key(seed)), config.dense)
    before = cp.scores(run, 'dense', dense, anew=False)
    run = run._replace(task=cp.student(task, config.distill, dense))
    for name in config.settings:
      rung = prune(config, run._replace(folder=run.folder / name), name, dense)
      extra = {'conv_compression': kernels.conv_compression(rung)}
      if switched := last_switched(run.folder / name / '00-admm'):
        extra['switched'] = switched
      sizes = cp.measure(rung.plan, rung.variables)
      networks.append(outcome.Measured(name, seed, 0, rung.scores, rung.cut, before, sizes, extra))
      say(f'{config.model.label} {outcome.line(networks[-1])}')
      if seed == config.seeds[0]:
        shown[name], start = rung, dense
  summary = outcome.summarize(networks)
  outcome.add_gains(summary, networks, CONTROL)
  if train.is_main():
    outcome.save(workdir, summary)
    report(config, workdir, summary, shown, task, model, cp.recalibrated(task, start))
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary)
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


# ---------------------------------------------------------------------------- one network


def prune(config, run: cp.Run, name: str, dense: tasks.Variables) -> cp.Rung:
  """One setting: its library, ADMM towards it for the steps that are left, retraining."""
  if name == CONTROL:
    nothing = sparsity.make_plan(dense.params, [('.*', None)])
    return cp.control(run, dense, nothing, config.pull, config.retrain)
  setting = config.choices[name]
  masks, start, spent = library(config, run._replace(folder=run.folder.parent), setting, dense)
  plan = kernels.plan(dense.params, run.task.layers, 'pattern', masks=masks)
  if setting.rate:
    plan = kernels.plan_at(setting.rate, dense.params, run.task.layers, 'pattern', masks)
  if not (config.pull.epochs or config.retrain.epochs):
    return cp.cut_once(run, start, plan)
  pull = for_steps(config.pull, steps(config.pull, run.task) - spent, run.task)
  (rung,) = cp.climb(run, start, [plan], pull, config.retrain)
  return rung


def library(config, run: cp.Run, setting, dense: tasks.Variables):
  """The patterns of a setting, the network to go on with, and the steps it has been trained for."""
  if setting.library == 'extracted':
    return extract(config, run, setting, dense)
  if setting.library == 'random':
    candidates = sparsity.pattern_set(setting.candidates)
    drawn = np.random.default_rng(run.seed).choice(len(candidates), setting.size, replace=False)
    return tuple(candidates[i] for i in sorted(drawn)), dense, 0
  return sparsity.pattern_set(setting.library), dense, 0


def extract(config, run: cp.Run, setting, dense: tasks.Variables):
  """Trains towards ever smaller libraries, each the most used patterns of the one before."""
  run = run._replace(folder=run.folder / f'library-{setting.candidates}-{setting.by}')
  recipe = config.pull.copy_and_resolve_references()
  recipe.update({name: config.library[name] for name in ('rho', 'epochs', 'refreshes')})
  masks, variables, spent = sparsity.pattern_set(setting.candidates), dense, 0
  for size in (*config.library.sizes, 0):
    plan = kernels.plan(dense.params, run.task.layers, 'pattern', masks=masks)
    variables = cp.phase(run, f'{len(masks):02d}', variables, recipe, target=plan)
    spent += steps(recipe, run.task)
    if len(masks) == setting.size:
      break
    path = run.folder / f'{size:02d}.json'
    masks = kernels.shrunk(path, plan, variables.params, size, setting.by)
  return masks, variables, spent


def steps(recipe, task: tasks.Task) -> int:
  """Steps of a recipe."""
  return round(recipe.epochs * task.steps_per_epoch)


def for_steps(recipe, count: int, task: tasks.Task):
  """The recipe for so many steps."""
  recipe = recipe.copy_and_resolve_references()
  recipe.epochs = count / task.steps_per_epoch
  return recipe


def last_switched(folder: pathlib.Path) -> float | None:
  """Share of kernels that switched at the end of a phase, if it was trained."""
  path = folder / 'metrics.jsonl'
  rows = train.read_json_lines(path) if path.exists() else []
  found = [row['admm/switched'] for row in rows if 'admm/switched' in row]
  return found[-1] if found else None


# ---------------------------------------------------------------------------- checks


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  for name in config.settings:
    if name == CONTROL:
      continue
    if name not in config.choices:
      raise ValueError(
        f'unknown setting {name!r}; config.choices has {", ".join(config.choices)}, and {CONTROL}'
      )
    _check_setting(config, f'config.choices.{name}', config.choices[name])
  cp.check_distill(config.distill)
  for name in ('dense', 'pull', 'retrain'):
    cp.check_recipe(name, config[name])
  if config.pull.schedule != 'constant':
    raise ValueError(
      f'config.pull.schedule={config.pull.schedule!r}: settings cut it into phases of their own, so '
      "only 'constant' gives all the same learning rates"
    )
  for name in config.networks:
    cifar.with_network(config, name)


def _check_setting(config, field: str, setting) -> None:
  if setting.library not in LIBRARIES:
    raise ValueError(f'{field}.library={setting.library!r}: choose {", ".join(LIBRARIES)}')
  if setting.candidates not in CANDIDATES or setting.by not in ('counts', 'energy'):
    raise ValueError(
      f'{field}.candidates={setting.candidates!r}, by={setting.by!r}: choose '
      f"{', '.join(CANDIDATES)}; 'counts' or 'energy'"
    )
  if setting.rate and setting.rate < 2.25:
    raise ValueError(f'{field}.rate={setting.rate} is below that of the patterns alone, 2.25')
  if setting.library == 'random' and setting.size < 1:
    raise ValueError(f'{field}.size={setting.size} patterns: at least 1')
  if setting.library != 'extracted':
    return
  sizes = (len(sparsity.pattern_set(setting.candidates)), *config.library.sizes)
  if list(sizes) != sorted(set(sizes), reverse=True) or setting.size not in sizes:
    raise ValueError(
      f'{field}.size={setting.size} must be one of the falling sizes {sizes} (config.library.sizes)'
    )
  spent = (sizes.index(setting.size) + 1) * config.library.epochs
  if spent > config.pull.epochs:
    raise ValueError(
      f'{field}: its library takes {spent:g} epochs, config.pull.epochs has {config.pull.epochs:g}'
    )


# ---------------------------------------------------------------------------- report


def report(config, workdir: pathlib.Path, summary, shown, task, model, dense) -> None:
  """`report.html`: the comparison, patterns, ADMM over time, what the networks look at."""
  seed = workdir / f'seed{config.seeds[0]}'
  pruned = {name: rung for name, rung in shown.items() if name != CONTROL}
  phases = {name: [*_chain(config, seed, name), seed / name / '00-admm'] for name in pruned}
  more = [
    *pictures.lost_against_rate(summary),
    *pictures.over_time(
      phases,
      'admm/gap',
      'ADMM gap',
      'Distance to the target over the norm, worst layer, first seed.',
    ),
    *pictures.over_time(
      phases, 'admm/switched', 'kernels that switch', 'Share between two refreshes, first seed.'
    ),
  ]
  for name, rung in pruned.items():
    more += pictures.patterns(name, rung)
  for name, rung in list(pruned.items())[:1]:
    more += pictures.switches(name, phases[name])
    more += pictures.looks(
      model, dense, rung.variables, task, name, config.data.mean, config.data.std
    )
  outcome.write_report(
    config,
    workdir,
    f'{config.data.name}: {config.model.label} in kernel patterns',
    summary,
    pruned,
    more=more,
    extra_tables=(gains(summary),),
  )


def _chain(config, seed: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Folders of the phases that took a setting's library out of the network, in order."""
  setting = config.choices[name]
  if setting.library != 'extracted':
    return []
  sizes = [len(sparsity.pattern_set(setting.candidates)), *config.library.sizes]
  folder = seed / f'library-{setting.candidates}-{setting.by}'
  return [folder / f'{size:02d}' for size in sizes[: sizes.index(setting.size) + 1]]


def gains(summary) -> train.Table:
  """Against the control, and what the ADMM left undone."""
  head = ('setting', 'gain', 'gain, held out', 'rate of the convolutions', 'switched at the end, %')
  rows = [
    (
      e['setting'],
      (e['gain'], e['gain_spread']) if 'gain' in e else None,
      (e['held_out_gain'], e['held_out_gain_spread']) if 'held_out_gain' in e else None,
      e['conv_compression'],
      100 * e['switched'] if 'switched' in e else None,
    )
    for e in summary
  ]
  note = (
    'Gain: paired difference to the dense network trained as long at the same learning rates. A gain '
    'counts from twice its standard error on.'
  )
  return train.Table('Against retraining without pruning', head, rows, note)


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends every setting to the ledger."""
  epochs = config.pull.epochs + config.retrain.epochs
  where = f'pattern/{data_label(config.data.name)}/{config.model.label}'
  scored = f'{cifar.described(config)}, {epochs:g} epochs' if epochs else cifar.described(config)
  rows = [outcome.dense_row(summary[0], f'{where}/dense', scored)]
  for entry in summary:
    name = entry['setting']
    setting = config.choices.get(name)
    goals, reference = (dict(setting.goals), setting.reference) if setting else ({}, '')
    run = f'{where}/{name}' if epochs else f'{where}/{name}_one_shot'
    rows += outcome.ledger_rows(entry, run, scored, goals, reference)
  record_once(workdir / 'recorded.json', summary, rows)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.pattern`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
