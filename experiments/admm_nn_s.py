"""Pruning by ADMM, unstructured and structured, to a prescribed rate, and levels (ADMM-NN-S, 2019).

  python -m experiments.admm_nn_s --config=configs/admm_nn_s.py:lenet5 --workdir=runs/lenet5

A dense network is trained (or loaded); every *setting* prunes it along a ladder of rates:

  unstructured   the largest weights of every layer
  pooled         the weights that the loss would miss most, of all layers together; in place of ADMM
                 they leave one after the other
  units          filters alone, in the same way: what is left is a narrower network
  structured     whole filters and whole columns (one input position of all filters) at once;
                 at the end what no path reads leaves the network, and the smaller one is checked

Further settings, `config.quantize`, put networks on few levels: the survivors of some rungs of one of
the ladders, or a dense network as a whole, down to a sign and a scale for every layer; see
`experiments.levels`. `experiments.formats` sets the bytes of unstructured and structured networks
side by side.

A rung is ADMM towards its plan, hard projection, retraining of the survivors. Every rung is scored
on the test images and on training images held out; what is chosen is chosen by the latter. Run
again with the same `--workdir`, it goes on where it stopped. At the end `report.html` and
`results.json` stand in the workdir.
"""

import itertools
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cifar, formats, harness, levels, outcome, tasks
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from fqjax import files, quantize, sparsity, train

KINDS = ('unstructured', 'structured', 'pooled', 'units')
GRADUAL = ('pooled', 'units')
WAYS = ('admm', 'straight')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|record|log_every|loss_goal|dense_goal|data\.workers'
  r'|(rates|quantize)\..*\.named|quantize\..*\.rungs'
)


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Trains, prunes and scores every setting with every seed; returns a row per rung."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  started = time.time()
  task, _ = make_task(config, mesh)
  pruned_task, model = make_task(config, mesh, **config.model.pruned)
  networks, shown, drawn = [], {}, []
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    dense = cp.phase(run, 'dense', task.init(jax.random.key(seed)), config.dense)
    before = cp.scores(run, 'dense', dense)
    run = run._replace(task=cp.student(pruned_task, config.distill, dense))
    starts = {('', 0): (dense, None)}
    wanted = needed(config)
    for name, count in climbs(config).items():
      climber = run._replace(folder=run.folder / name)
      for i, rung in enumerate(climbed(config, name, climber, dense, count)):
        if (name, i) in wanted:
          starts[name, i] = rung.variables, rung.masks
        if name not in config.settings:
          continue
        extra = formats.stored(rung.plan, rung.variables.params)
        if config.rates[name].kind == 'structured':
          extra |= without_unused(model, rung, pruned_task, climber.folder / f'{i:02d}-removed.txt')
        sizes = cp.measure(rung.plan, rung.variables)
        networks.append(
          outcome.Measured(name, seed, i, rung.scores, rung.cut, before, sizes, extra)
        )
        say(outcome.line(networks[-1]))
        if seed == config.seeds[0]:
          shown[name] = rung
    for name in (name for name in config.settings if name in config.quantize):
      setting = config.quantize[name]
      for i in setting.rungs:
        inside = run._replace(folder=run.folder / name / f'{i:02d}')
        begin, masks = starts[setting.start, i]
        network, cut = on_levels(config, setting, inside, begin, masks)
        found = cp.scores(inside, 'quantized', network.variables, anew=False)
        extra = levels.weights_only(network) | formats.stored_levels(network)
        if train.is_main() and model is not None:
          extra |= levels.as_file(
            model, pruned_task, network.variables, inside.folder / 'model.fqx', setting.floats
          )
        sizes = levels.measure(network)
        networks.append(outcome.Measured(name, seed, i, found, cut, before, sizes, extra))
        say(f'{outcome.line(networks[-1])}, weights alone {extra["value_bytes"]:,.0f}'
            f' ({extra["compression_values"]:,.0f}x)')  # fmt: skip
        if seed == config.seeds[0] and i == setting.rungs[-1]:
          drawn.append(levels.histogram(name, network, begin))
  summary = outcome.summarize(networks)
  if train.is_main():
    outcome.save(workdir, summary)
    title = f'{config.data.name}: {config.model.name} pruned by ADMM'
    more = formats.tables(config, summary)
    outcome.write_report(config, workdir, title, summary, shown, more=drawn, extra_tables=more)
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary)
    for table in more:
      outcome.show(table)
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  for name in config.settings:
    if name in config.quantize:
      check_levels(config, name)
    elif name not in config.rates:
      known = ', '.join([*config.rates, *config.quantize])
      raise ValueError(f'unknown setting {name!r}; config.rates and config.quantize have {known}')
  for name in climbs(config):
    setting = config.rates[name]
    if setting.kind not in KINDS:
      raise ValueError(f'config.rates.{name}.kind={setting.kind!r}: choose {", ".join(KINDS)}')
    for keeps in setting.rungs:
      if len(keeps) != len(setting.layers):
        raise ValueError(
          f'config.rates.{name} has {len(setting.layers)} layers and a rung of {len(keeps)}: {keeps}'
        )
    check_start(config, name)
    if wrong := [i for i, *_ in setting.named if not 0 <= i < len(setting.rungs)]:
      raise ValueError(f'config.rates.{name}.named: there is no rung {wrong[0]}')
  cp.check_distill(config.distill)
  for name in ('dense', 'admm', 'gradual', 'retrain', 'finish', 'pull', 'mapping', 'straight'):
    cp.check_recipe(name, config[name])


def check_start(config, name: str) -> None:
  """Refuses a ladder that begins with one there is not, or with itself; see `check`."""
  seen = [name]
  while start := config.rates[seen[-1]].start:
    if start not in config.rates or start in seen:
      raise ValueError(
        f'config.rates.{seen[-1]}.start={start!r}: another of {", ".join(config.rates)}; the dense '
        "network is ''"
      )
    seen.append(start)


def check_levels(config, name: str) -> None:
  """Refuses a setting of `config.quantize` that cannot be followed; see `check`."""
  setting, where = config.quantize[name], f'config.quantize.{name}'
  if name in config.rates:
    raise ValueError(f'{where} has the name of a setting of config.rates')
  if setting.way not in WAYS:
    raise ValueError(f'{where}.way={setting.way!r}: choose {", ".join(WAYS)}')
  if setting.start and setting.start not in config.rates:
    raise ValueError(
      f'{where}.start={setting.start!r}: config.rates has {", ".join(config.rates)}; a dense network '
      "is ''"
    )
  count = len(config.rates[setting.start].rungs) if setting.start else 1
  if wrong := [i for i in setting.rungs if not 0 <= i < count]:
    raise ValueError(f'{where}.rungs: there is no rung {wrong[0]}')
  if wrong := [i for i, *_ in setting.named if i not in setting.rungs]:
    raise ValueError(f'{where}.named: rung {wrong[0]} is not among its rungs {setting.rungs}')
  if setting.floats not in levels.FLOATS:
    raise ValueError(f'{where}.floats={setting.floats!r}: choose {", ".join(levels.FLOATS)}')
  for _, bits in setting.bits:
    levels.quantizer(setting.levels, bits, setting.per)


def make_task(config, mesh, **options) -> tuple[tasks.Task, Any]:
  """The images of the configuration and its network; `options` replace those of the model."""
  return cifar.make_task(config, mesh, **options)


# ---------------------------------------------------------------------------- plans


def ladder(setting, params, layers, rungs=None) -> list[sparsity.Plan]:
  """The plans of a setting's rungs, or of others."""

  def structure(pattern, keep):
    if setting.kind == 'unstructured':
      return sparsity.Unstructured(keep=keep)
    if setting.kind == 'pooled':
      return sparsity.Pooled(keep=float(keep), scope=pattern)
    if setting.kind == 'units':
      return sparsity.Filters(keep=keep)
    if pattern == setting.last:  # its filters are the classes
      return sparsity.Columns(keep=keep)
    filters = keep**setting.filter_share
    return sparsity.Both(sparsity.Filters(keep=filters), sparsity.Columns(keep=keep / filters))

  return [
    sparsity.make_plan(
      params,
      [(p, structure(p, keep)) for p, keep in zip(setting.layers, keeps, strict=True)],
      layers=layers,
    )
    for keeps in (setting.rungs if rungs is None else rungs)
  ]


def needed(config) -> set[tuple[str, int]]:
  """Ladder and rung of every network that is quantized."""
  chosen = (config.quantize[name] for name in config.settings if name in config.quantize)
  return {(setting.start, i) for setting in chosen for i in setting.rungs}


def climbs(config) -> dict[str, int]:
  """How many rungs of each ladder are climbed: all that are asked for, or as far as a start is."""
  found: dict[str, int] = {}
  for name in config.settings:
    if name in config.rates:
      found[name] = len(config.rates[name].rungs)
    elif start := config.quantize[name].start:
      found[start] = max([found.get(start, 0), *(i + 1 for i in config.quantize[name].rungs)])
  return found


def climbed(config, name: str, run: cp.Run, dense: tasks.Variables, count: int | None = None):
  """The first `count` rungs of a setting, one after the other; all by default."""
  setting, between, way, start = config.rates[name], None, config.admm, (dense, None)
  if setting.start:
    *_, last = climbed(config, setting.start, beside(run, setting.start), dense)
    start = last.variables, last.masks
  plans = ladder(setting, dense.params, run.task.layers)
  if setting.kind in GRADUAL:
    way, alive = config.gradual, alive_share(start[1])

    def between(rung, count):
      before = setting.rungs[rung - 1] if rung else (alive,) * len(setting.layers)
      keeps = [
        np.geomspace(max(a, b), b, count + 1)[1:]
        for a, b in zip(before, setting.rungs[rung], strict=True)
      ]
      return ladder(setting, dense.params, run.task.layers, zip(*keeps, strict=True))

  long = {i for i, *_ in config.rates[name].named} or range(len(plans))
  recipes = tuple(config.finish if i in long else config.retrain for i in range(len(plans)))
  rungs = cp.climb(run, start[0], plans, way, recipes, between, masks=start[1])
  return itertools.islice(rungs, count)


def beside(run: cp.Run, name: str) -> cp.Run:
  """The same network on its way in another setting."""
  return run._replace(folder=run.folder.parent / name)


def alive_share(masks) -> float:
  """Of the weights that have masks; 1 without masks."""
  sizes = [(np.size(m), np.count_nonzero(m)) for m in jax.tree.leaves(masks)]
  total = sum(size for size, _ in sizes)
  return sum(alive for _, alive in sizes) / total if total else 1.0


# ---------------------------------------------------------------------------- levels


def level_plan(setting, params, layers) -> quantize.Plan:
  """The levels of every layer of a setting."""
  rules = [
    (regex, levels.quantizer(setting.levels, bits, setting.per)) for regex, bits in setting.bits
  ]
  return quantize.make_plan(params, rules, layers=layers)


def on_levels(config, setting, run: cp.Run, begin: tasks.Variables, masks):
  """A network on the levels of a setting, from a dense one or inside the masks of a pruned one.

  Returns:
    `levels.Quantized`, and the scores at the start, rounded and not trained.
  """
  plan = level_plan(setting, begin.params, run.task.layers)
  if setting.way == 'admm':
    trained = levels.by_admm(run, config.pull, config.mapping, plan, begin, masks)
  else:
    trained = levels.straight_through(run, config.straight, plan, begin, masks)
  return levels.finish(run, plan, begin, trained, masks=masks)


# ---------------------------------------------------------------------------- unused paths


def without_unused(model, rung: cp.Rung, task: tasks.Task, path: pathlib.Path) -> dict[str, float]:
  """Slices what no path reads out of the network, and checks that it still says the same."""
  params, state = rung.variables
  x = jnp.asarray(task.sample)
  removed = sparsity.remove_unused(model.apply, {'params': params, **state}, x)
  whole = jax.jit(model.apply)({'params': params, **state}, x)
  small = jax.jit(removed.apply)(removed.variables, x)
  error = float(jnp.max(jnp.abs(whole - small)) / jnp.max(jnp.abs(whole)))
  if not error < 1e-4:
    raise ValueError(f'{path.parent}: the sliced network differs by {error:.1e} of its output')
  files.write_text(path, str(removed.report))
  return {'sliced_parameters': float(removed.report.sizes[1]), 'sliced_error': error}


# ---------------------------------------------------------------------------- ledger


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends the dense network, the ends of all ladders, and what was chosen to the ledger."""
  data = data_label(config.data.name)
  where = f'admm_nn_s/{data}/{config.model.name}'
  scored = f'{data} {config.data.test_split}, trained on {config.data.train_split}'
  out = [outcome.dense_row(summary[0], f'{where}/dense', scored, config.dense_goal or None)]
  best = outcome.chosen(summary, config.loss_goal)
  for name in {entry['setting']: None for entry in summary}:
    rungs = {entry['rung']: entry for entry in summary if entry['setting'] == name}
    named = (config.quantize if name in config.quantize else config.rates)[name].named
    for i, label, goals, reference in named:
      out += outcome.ledger_rows(rungs[i], f'{where}/{label}', scored, dict(goals), reference)
    if name in config.rates and not named and name in best:
      goals = {'change': -config.loss_goal}
      out += outcome.ledger_rows(best[name], f'{where}/{name}', scored, goals)
  record_once(workdir / 'recorded.json', summary, out)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.admm_nn_s`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
