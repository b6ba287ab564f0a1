"""Pruning by ADMM, unstructured and structured, to a prescribed rate (ADMM-NN-S, 2019).

  python -m experiments.admm_nn_s --config=configs/admm_nn_s.py:lenet5 --workdir=runs/lenet5

A dense network is trained (or loaded); every *setting* prunes it along a ladder of rates:

  unstructured   the largest weights of every layer
  structured     whole filters and whole columns (one input position of all filters) at once;
                 at the end what no path reads leaves the network, and the smaller one is checked

A rung is ADMM towards its plan, hard projection, retraining of the survivors. Every rung is scored
on the test images and on training images held out; what is chosen is chosen by the latter. Run
again with the same `--workdir`, it goes on where it stopped. At the end `report.html` and
`results.json` stand in the workdir.
"""

import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import compression as cp
from experiments import harness, outcome, tasks
from experiments.harness import data_label, record_once, say
from fqjax import files, models, sparsity, train

KINDS = ('unstructured', 'structured')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|record|log_every|loss_goal|dense_goal|data\.workers|rates\..*\.named'
)


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Trains, prunes and scores every setting with every seed; returns a row per rung."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  started = time.time()
  task, _ = make_task(config, mesh)
  pruned_task, model = make_task(config, mesh, **config.model.pruned)
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    dense = cp.phase(run, 'dense', task.init(jax.random.key(seed)), config.dense)
    before = cp.scores(run, 'dense', dense)
    student = cp.student(pruned_task, config.distill, dense)
    for name in config.settings:
      plans = ladder(config.rates[name], dense.params, task.layers)
      climber = run._replace(task=student, folder=run.folder / name)
      long = {i for i, *_ in config.rates[name].named} or range(len(plans))
      recipes = tuple(config.finish if i in long else config.retrain for i in range(len(plans)))
      for i, rung in enumerate(cp.climb(climber, dense, plans, config.admm, recipes)):
        extra = {}
        if config.rates[name].kind == 'structured':
          extra = without_unused(model, rung, pruned_task, climber.folder / f'{i:02d}-removed.txt')
        sizes = cp.measure(rung.plan, rung.variables)
        networks.append(
          outcome.Measured(name, seed, i, rung.scores, rung.cut, before, sizes, extra)
        )
        say(outcome.line(networks[-1]))
        if seed == config.seeds[0]:
          shown[name] = rung
  summary = outcome.summarize(networks)
  if train.is_main():
    outcome.save(workdir, summary)
    title = f'{config.data.name}: {config.model.name} pruned by ADMM'
    outcome.write_report(config, workdir, title, summary, shown)
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
    if name not in config.rates:
      raise ValueError(f'unknown setting {name!r}; config.rates has {", ".join(config.rates)}')
    setting = config.rates[name]
    if setting.kind not in KINDS:
      raise ValueError(f'config.rates.{name}.kind={setting.kind!r}: choose {", ".join(KINDS)}')
    for keeps in setting.rungs:
      if len(keeps) != len(setting.layers):
        raise ValueError(
          f'config.rates.{name} has {len(setting.layers)} layers and a rung of {len(keeps)}: {keeps}'
        )
    if wrong := [i for i, *_ in setting.named if not 0 <= i < len(setting.rungs)]:
      raise ValueError(f'config.rates.{name}.named: there is no rung {wrong[0]}')
  cp.check_distill(config.distill)
  for name in ('dense', 'admm', 'retrain', 'finish'):
    cp.check_recipe(name, config[name])


def make_task(config, mesh, **options) -> tuple[tasks.Task, Any]:
  """The images of the configuration and its network; `options` replace those of the model."""
  return tasks.image_task(config, mesh, published, **options)


def published(weights: str, model):
  """Weights to start from instead of random ones."""
  return lambda key: tasks.split(models.import_torchvision(weights, model))


# ---------------------------------------------------------------------------- plans


def ladder(setting, params, layers) -> list[sparsity.Plan]:
  """The plans of a setting's rungs."""

  def structure(pattern, keep):
    if setting.kind == 'unstructured':
      return sparsity.Unstructured(keep=keep)
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
    for keeps in setting.rungs
  ]


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
    for i, label, goals, reference in config.rates[name].named:
      out += outcome.ledger_rows(rungs[i], f'{where}/{label}', scored, dict(goals), reference)
    if not config.rates[name].named and name in best:
      goals = {'change': -config.loss_goal}
      out += outcome.ledger_rows(best[name], f'{where}/{name}', scored, goals)
  record_once(workdir / 'recorded.json', summary, out)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.admm_nn_s`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
