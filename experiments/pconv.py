"""Sparse convolution patterns and connectivity (PCONV, AAAI 2020), and what equal rates cost elsewhere.

  python -m experiments.pconv --config=configs/pconv.py:vgg16_quarter --workdir=runs/pconv

Every 3x3 kernel takes one of four T shapes, and whole kernels go until the convolutions, the first
included, are so many times smaller; both by one exact projection. Beside it, at equal rates,

  scp            T shapes and connectivity
  connectivity   whole kernels alone
  unstructured   the largest weights
  filters        whole outputs
  channels       whole inputs

A setting is `KIND_RATEx`, e.g. `scp_8.4x`; `KIND_alone` has the rate of the T shapes without
connectivity. Rates count the weights of the masks: what becomes useless behind a filter that is gone
is not counted, so those of filters and channels are lower bounds. Each setting is ADMM, hard
projection, retraining of the survivors, new batch-norm statistics; without epochs only the
projection and the statistics.

The first convolution stays dense, 1x1 kernels stay unless `config.pointwise`, depthwise kernels take
patterns only. Of patterns the report says besides how large they are in FKW, the format in which they
run, and how much less its index takes than compressed sparse rows. Run again with the same
`--workdir`, it goes on where it stopped; finished phases are read back. At the end `report.html` and
`results.json` stand in the workdir, for several networks in a folder of each.
"""

import pathlib
import re
import time

import jax

from experiments import cifar, harness, kernels, outcome, pictures
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from fqjax import sparsity, train

KINDS = {'scp': 'pattern', **{kind: kind for kind in kernels.KINDS if kind != 'pattern'}}
_SETTING = re.compile(rf'({"|".join(KINDS)})_(alone|(\d+(?:\.\d+)?)x)')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|networks|record|log_every|loss_goal|data\.workers|goals|reference'
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
  task, _ = cifar.make_task(config, mesh)
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(
      task, workdir / f'seed{seed}', seed, mesh, config.log_every, (kernels.watch_switches,)
    )
    dense = cp.phase(run, 'dense', task.init(jax.random.key(seed)), config.dense)
    before = cp.scores(run, 'dense', dense, anew=False)
    run = run._replace(task=cp.student(task, config.distill, dense))
    for name in config.settings:
      plan = make_plan(config, name, dense.params, task.layers)
      climber = run._replace(folder=run.folder / name)
      if config.pull.epochs or config.retrain.epochs:
        (rung,) = cp.climb(climber, dense, [plan], config.pull, config.retrain)
      else:
        rung = cp.cut_once(climber, dense, plan)
      extra = {'conv_compression': kernels.conv_compression(rung), **kernels.fkw(rung)}
      sizes = cp.measure(rung.plan, rung.variables)
      networks.append(outcome.Measured(name, seed, 0, rung.scores, rung.cut, before, sizes, extra))
      say(f'{config.model.label} {outcome.line(networks[-1])}')
      if seed == config.seeds[0]:
        shown[name] = rung
  summary = outcome.summarize(networks)
  for entry in summary:
    entry['series'] = entry['setting'].split('_')[0]
  if train.is_main():
    outcome.save(workdir, summary)
    report(config, workdir, summary, shown)
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary)
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def make_plan(config, name: str, params, layers) -> sparsity.Plan:
  """What a setting prunes to."""
  kind, rate = parse(name)
  masks = sparsity.pattern_set(config.library)
  alone = kernels.plan(params, layers, 'pattern', masks=masks)
  if not rate:
    rate = kernels.conv_rate(alone)
    if kind == 'pattern':
      return alone
  return kernels.plan_at(rate, params, layers, kind, masks, config.pointwise)


def parse(name: str) -> tuple[str, float]:
  """Kind of a setting, as `kernels.plan` knows it, and its rate; 0 is that of the patterns alone.

  Raises:
    ValueError: for what is no setting.
  """
  found = _SETTING.fullmatch(name)
  if not found:
    raise ValueError(
      f'unknown setting {name!r}; it reads KIND_RATEx or KIND_alone, KIND of {", ".join(KINDS)}'
    )
  return KINDS[found[1]], float(found[3] or 0)


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  for name in config.settings:
    _, rate = parse(name)
    if 0 < rate <= 1:
      raise ValueError(f'config.settings: {name!r} makes nothing smaller')
  sparsity.pattern_set(config.library)
  cp.check_distill(config.distill)
  for name in ('dense', 'pull', 'retrain'):
    cp.check_recipe(name, config[name])
  for name, metric, _ in config.goals:
    if name not in config.settings and not config.networks:
      continue  # a part of the settings is run
    if metric not in ('top1', 'change', 'conv_compression', 'index_saving'):
      raise ValueError(f'config.goals: {metric!r} of {name!r} is no metric of these runs')
  for name in config.networks:
    cifar.with_network(config, name)


# ---------------------------------------------------------------------------- report


def report(config, workdir: pathlib.Path, summary, shown) -> None:
  """`report.html`: what equal rates cost, patterns, ADMM over time, stored bytes."""
  seed = workdir / f'seed{config.seeds[0]}'
  phases = {name: [seed / name / '00-admm'] for name in shown}
  more = [
    *pictures.lost_against_rate(summary),
    *pictures.over_time(
      phases,
      'admm/gap',
      'ADMM gap',
      'Distance to the target over the norm, worst layer, first seed.',
    ),
  ]
  ours = {name: rung for name, rung in shown.items() if name.startswith('scp')}
  for name, rung in ours.items():
    more += pictures.patterns(name, rung)
    more += pictures.switches(name, phases[name])
  outcome.write_report(
    config,
    workdir,
    f'{config.data.name}: {config.model.label}, patterns and connectivity',
    summary,
    ours or shown,
    more=more,
    extra_tables=(storage(summary),),
  )


def storage(summary) -> train.Table:
  """How large pruned kernels are in the format in which they run."""
  head = ('setting', 'rate of the convolutions', 'FKW, bytes', 'CSR, bytes', 'less index, %')
  rows = [
    (e['setting'], e['conv_compression'], e['fkw_bytes'], e['csr_bytes'], e['index_saving'])
    for e in summary
    if 'fkw_bytes' in e
  ]
  note = (
    'FKW: filters by length, kernels by pattern, float32 values; CSR: the same weights as compressed '
    'sparse rows with 32-bit columns. Pruned layers only.'
  )
  return train.Table('Ready to run', head, rows, note)


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends every setting to the ledger."""
  epochs = config.pull.epochs + config.retrain.epochs
  where = f'pconv/{data_label(config.data.name)}/{config.model.label}'
  scored = f'{cifar.described(config)}, {epochs:g} epochs' if epochs else cifar.described(config)
  rows = [outcome.dense_row(summary[0], f'{where}/dense', scored)]
  for entry in summary:
    goals = {metric: goal for name, metric, goal in config.goals if name == entry['setting']}
    run = f'{where}/{entry["setting"]}' if epochs else f'{where}/{entry["setting"]}_one_shot'
    rows += outcome.ledger_rows(entry, run, scored, goals, config.reference)
  record_once(workdir / 'recorded.json', summary, rows)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.pconv`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
