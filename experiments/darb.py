"""Regular blocks that adapt to the density of each row (DARB, 2020), against other structures.

  python -m experiments.darb --config=configs/darb.py:lenet5 --workdir=runs/darb-lenet5

A dense network is trained; every *setting* prunes its matrices along one ladder of rates:

  darb           the largest weight of every block; blocks of 1..128 columns, chosen row by row
  bank           the largest few weights of every bank of columns; how many is chosen row by row
  unstructured   the largest weights of every matrix (of every gate, in an LSTM)
  nm             the n largest of every m neighbouring inputs, the same for all rows
  block          square blocks, 4x4 where they fit
  filter         whole rows; in the layer whose rows are the classes, whole inputs

A rung is ADMM towards its plan, hard projection, retraining of the survivors, inside the zeros of
the rung before. Every rung is scored on the test part and on training data held out. For each
setting the highest rate that loses no more than `loss_goal` is chosen by the latter and reported
with its figures on the former; DARB's over that of the best structure (nm, block, filter)
is the claim of the paper. How fast the stored forms are decoded: `benchmarks/sparsity.py`.

Run again with the same `--workdir`, it goes on where it stopped. Several processes with different
`settings=a+b` may share a workdir; a last one with all settings reads what they trained, writes
`report.html` and `results.json`, and with `--config.record=True` appends to the ledger.

Source: Ren et al., "DARB: A Density-Aware Regular-Block Pruning for Deep Neural Networks", AAAI
2020.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
import re
import time

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from experiments import compression as cp
from experiments import harness, language, ledger, outcome, rows, speech, tasks
from experiments.harness import data_label, record_once, say
from fqjax import data as fd
from fqjax import models, sparsity, train

KINDS = ('darb', 'bank', 'unstructured', 'nm', 'block', 'filter')
# What DARB's highest rate is compared with.
STRUCTURED = ('nm', 'block', 'filter')
TASKS = ('images', 'text', 'speech')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|settings|record|log_every|loss_goal|dense_goal|goal|named|shown|data\.workers'
)


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Trains, prunes and scores every setting with every seed; returns a row per rung."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  started = time.time()
  metric = metric_of(config)
  task = make_task(config, mesh)
  pruned_task = make_task(config, mesh, **config.model.pruned)
  networks, ends, middles = [], {}, {}
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    dense = cp.phase(run, 'dense', task.init(jax.random.key(seed)), config.dense)
    before = cp.scores(run, 'dense', dense)
    for name in config.settings:
      rates, plans = ladder(config, name, dense.params, task.layers)
      climber = run._replace(task=pruned_task, folder=run.folder / name)
      for i, rung in enumerate(cp.climb(climber, dense, plans, config.admm, config.retrain)):
        networks.append(measured(name, seed, i, rates[i], rung, before))
        say(outcome.line(networks[-1], metric))
        if seed == config.seeds[0]:
          ends[name] = rung
          if rates[i] == config.shown:
            middles[name] = rung
  summary = outcome.summarize(networks, metric)
  if train.is_main():
    outcome.save(workdir, summary)
    free = {name for name in middles if config.methods[name].kind == 'unstructured'}
    shown = rows.pictures(middles, pruned_task, f'{config.shown:g}x', free)
    title = f'{label(config)}: {config.model.name} pruned in adaptive regular blocks'
    outcome.write_report(
      config, workdir, title, summary, ends, metric, shown, tables(config, summary, metric)
    )
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary, metric)
    say(claim(config, summary, metric))
    say(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  if config.task not in TASKS:
    raise ValueError(f'config.task={config.task!r}: choose {", ".join(TASKS)}')
  if not config.settings or not config.seeds:
    raise ValueError('config.settings and config.seeds name at least one each')
  for name in config.settings:
    if name not in config.methods:
      raise ValueError(f'unknown setting {name!r}; config.methods has {", ".join(config.methods)}')
    method = config.methods[name]
    if method.kind not in KINDS:
      raise ValueError(f'config.methods.{name}.kind={method.kind!r}: choose {", ".join(KINDS)}')
    if method.size < 1:
      raise ValueError(f'config.methods.{name}.size={method.size} must be at least 1')
    rates = rates_of(config, name)
    if not rates or min(rates) < 1 or list(rates) != sorted(set(rates)):
      raise ValueError(f'the rates of {name} must rise, from 1 on; got {rates}')
  if odd := {*config.named, config.shown} - set(config.rates):
    raise ValueError(f'config.named and config.shown are of config.rates; {sorted(odd)} are not')
  for pattern, power in config.prune:
    if not 0 <= power <= 1:
      raise ValueError(f'config.prune gives {pattern!r} the power {power}; choose 0..1')
  for name in ('dense', 'admm', 'retrain'):
    cp.check_recipe(name, config[name])


def rates_of(config, name: str) -> tuple[float, ...]:
  """The ladder of a setting: its own, or that of all."""
  return tuple(config.methods[name].rates) or tuple(config.rates)


def metric_of(config) -> outcome.Metric:
  """What the scores of the task become."""
  return outcome.PERPLEXITY if config.task == 'text' else outcome.TOP1


def label(config) -> str:
  """The data's name in tables and in the ledger."""
  return data_label(config.data.path if config.task == 'speech' else config.data.name)


def make_task(config, mesh, **options) -> tasks.Task:
  """The data of the configuration and its network; `options` replace those of the model."""
  d = config.data
  if config.task == 'images':
    return tasks.image_task(config, mesh, published, **options)[0]
  given = {**config.model.options, **options}
  if config.task == 'text':
    text = fd.load_text(d.name, vocab_size=d.vocab_size)
    say(f'{text} {text.sha256[:12]}')
    model = models.create_language_model(
      config.model.name, vocab_size=len(text.vocabulary), **given
    )
    return language.language_model(model, text, batch_size=d.batch_size, length=d.length, mesh=mesh)
  parts = speech.load_speech(d.path)
  model = speech.SpeechLstm(int(parts['train'].labels.max()) + 1, **given)
  return speech.frame_classifier(model, parts, batch_size=d.batch_size, length=d.length, mesh=mesh)


def published(weights: str, model):
  """Weights to start from instead of random ones."""
  return lambda key: tasks.split(models.import_torchvision(weights, model))


# ---------------------------------------------------------------------------- plans


def ladder(config, name: str, params, layers) -> tuple[tuple[float, ...], list[sparsity.Plan]]:
  """The plans of a setting, as far as its structure can follow the rates.

  Raises:
    ValueError: when it cannot follow the first.
  """
  plans: list[sparsity.Plan] = []
  rates = rates_of(config, name)
  for rate in rates:
    before = {entry.path: entry.structure for entry in plans[-1].pruned} if plans else {}
    try:
      plans.append(plan_at(config, config.methods[name], rate, params, layers, before))
    except OutOfReach as e:
      if not plans:
        raise
      say(f'{name}: its ladder ends before {rate:g}x, {e}')
      break
  return rates[: len(plans)], plans


class OutOfReach(ValueError):
  """A structure cannot be as sparse as a rate asks for."""


def plan_at(config, method, rate: float, params, layers, before: Mapping) -> sparsity.Plan:
  """The plan of one rung; `before` holds the structures of the rung before by path."""
  leaves = {path: w for path, w in flatten_dict(params, sep='/').items() if w.ndim > 1}
  powers = {}
  for pattern, power in config.prune:
    for path in leaves:
      if re.fullmatch(pattern, path):
        powers.setdefault(path, power)
  if not powers:
    raise ValueError(f'config.prune selects none of {", ".join(leaves)}')
  keeps = shares({path: leaves[path].size for path in powers}, powers, rate)
  rules = []
  for path, keep in keeps.items():
    w, layout = leaves[path], sparsity.LAYOUTS[leaves[path].ndim]
    last = re.fullmatch(config.last, path) is not None
    try:
      found = structure(method, w, layout, keep, config.gates, last, before.get(path))
    except ValueError as e:
      raise OutOfReach(f'{path}: {e}') from e
    rules.append((re.escape(path), found))
  return sparsity.make_plan(params, rules, layers=layers)


def shares(sizes: Mapping[str, int], powers: Mapping[str, float], rate: float) -> dict[str, float]:
  """Kept fraction of each matrix, so that all together reach the rate.

  Args:
    sizes: weights of each.
    powers: of a fraction common to all; 1 everywhere is the same rate for each, 0 leaves it dense.
    rate: weights over kept weights, of all.

  Raises:
    ValueError: when those of power 0 are too many already.
  """
  total = sum(sizes.values())
  if sum(n for path, n in sizes.items() if not powers[path]) > total / rate:
    raise ValueError(f'config.prune leaves more dense than {rate:g}x allows')
  low, high = 1e-12, 1.0
  for _ in range(100):
    middle = math.sqrt(low * high)
    kept = sum(n * middle ** powers[path] for path, n in sizes.items())
    low, high = (middle, high) if kept <= total / rate else (low, middle)
  return {path: low ** powers[path] for path in sizes}


def structure(method, w, layout: str, keep: float, gates: int, last: bool, before=None):
  """The structure of a setting for one matrix.

  Args:
    method: of `config.methods`.
    w: the matrix, dense.
    layout: one capital per axis.
    keep: kept fraction.
    gates: that lie side by side in its outputs; each has its own threshold.
    last: whether its outputs are the classes.
    before: structure of the rung before; no row keeps more than it allows.

  Raises:
    ValueError: when the structure cannot be that sparse.
  """
  outputs, inputs, _ = sparsity.kernel_shape(w.shape, layout)
  if keep == 1:
    return None
  if method.kind in ('darb', 'bank'):
    return adaptive(method, w, layout, 1 / keep, gates, before)
  if method.kind == 'nm':
    m = divisor(inputs, method.size)
    if keep * m < 1 - 1e-9:
      raise ValueError(f'1 of {m} neighbours is {m}x, {1 / keep:.1f}x was asked for')
    return sparsity.NM(round(keep * m), m)
  if method.kind == 'filter':
    alone = sparsity.Channels(keep=keep) if last else sparsity.Filters(keep=keep)
  elif method.kind == 'block':
    rows, columns = divisor(outputs // gates, method.size), divisor(inputs, method.size)
    alone = sparsity.Blocks(rows, columns, keep=keep)
  else:
    alone = sparsity.Unstructured(keep=keep)
  return sparsity.Gates(alone, gates) if gates > 1 and not last else alone


def divisor(n: int, most: int) -> int:
  """The largest divisor of n that is at most `most`."""
  return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def adaptive(method, w, layout: str, ratio: float, gates: int, before):
  """Blocks or banks by the density of each row, nested in those of the rung before."""
  o, i, m = sparsity.kernel_shape(w.shape, layout)
  density = row_densities(w, layout, ratio, gates)

  def choose(ratio):
    if method.kind == 'darb':
      new = sparsity.choose_exponents(density, i * m, ratio)
      return sparsity.Darb(tuple(map(max, new, before.exponents)) if before else new)
    new = sparsity.bank(w, layout, ratio, method.size, density)
    least = tuple(map(min, new.counts, before.counts)) if before else new.counts
    return sparsity.Bank(new.size, least)

  found = choose(ratio)
  if before is None:
    return found
  # What is taken over removes more than was asked for: a milder choice does.
  low, high = 1.0, ratio
  for _ in range(20):
    middle = math.sqrt(low * high)
    milder = choose(middle)
    if milder.kept(w.shape, layout) <= o * i * m / ratio:
      found, high = milder, middle
    else:
      low = middle
  return found


def row_densities(w, layout: str, ratio: float, gates: int) -> np.ndarray:
  """Density of each row after unstructured pruning, gate by gate: [rows]."""
  parts = jnp.split(sparsity.to_rows(jnp.asarray(w), layout), gates)
  return np.concatenate([sparsity.row_density(part, 'OI', ratio) for part in parts])


# ---------------------------------------------------------------------------- outcome


def measured(name, seed, i, rate, rung: cp.Rung, before) -> outcome.Measured:
  """One network with its sizes; `rate` and `index_bits_per_kept` are of the pruned matrices."""
  # The carry of a language model is no part of the network, batch-norm statistics are.
  state = {k: v for k, v in rung.variables.model_state.items() if k != 'carry'}
  sizes = cp.measure(rung.plan, rung.variables._replace(model_state=state))
  found = sparsity.sizes(rung.plan, rung.variables.params)
  paths = [entry.path for entry in rung.plan.pruned]
  kept = sum(found.kept[path] for path in paths)
  index = sum(found.bits[path].index + found.bits[path].tables for path in paths)
  extra = {
    'asked': float(rate),
    'rate': sum(found.weights[path] for path in paths) / kept,
    'index_bits_per_kept': index / kept,
  }
  return outcome.Measured(name, seed, i, rung.scores, rung.cut, before, sizes, extra)


def best(config, summary: Sequence[dict]) -> dict[str, dict]:
  """The sparsest rung of every setting that loses no more than `loss_goal` on held-out items."""
  return outcome.chosen(summary, config.loss_goal, metric_of(config))


def over_structured(config, summary: Sequence[dict]) -> tuple[float, str] | None:
  """DARB's highest rate over that of the best structure, and which that is.

  None where DARB or every other structure lost more on each rung.
  """
  found = best(config, summary)
  ours = [e for name, e in found.items() if config.methods[name].kind == 'darb']
  others = [e for name, e in found.items() if config.methods[name].kind in STRUCTURED]
  if not ours or not others:
    return None
  first = max(ours, key=lambda e: e['rate'])
  other = max(others, key=lambda e: e['rate'])
  return first['rate'] / other['rate'], other['setting']


def claim(config, summary: Sequence[dict], metric: outcome.Metric) -> str:
  """The paper's claim in a sentence."""
  found = over_structured(config, summary)
  limit = f'With at most {config.loss_goal:g} {metric.unit or metric.name} lost on held-out items'
  if found is None:
    return f'{limit} there is no rung of darb, or none of {", ".join(STRUCTURED)}.'
  value, other = found
  return f'{limit} darb reaches {value:.2f} times the rate of {other}, the best structure.'


def tables(config, summary: Sequence[dict], metric: outcome.Metric) -> list[train.Table]:
  """The highest rates within the limit, and the comparison at equal rates with the index."""
  found = best(config, summary)
  ends = outcome.last_rungs(summary)
  highest = train.Table(
    'Highest rate within the limit',
    ('setting', 'rate', f'{metric.name}, held out', f'{metric.name}, test', 'end of the ladder'),
    [
      (
        name,
        found[name]['rate'] if name in found else None,
        (found[name]['held_out_change'], found[name]['held_out_change_spread'])
        if name in found
        else None,
        (found[name]['change'], found[name]['change_spread']) if name in found else None,
        end['rate'],
      )
      for name, end in ends.items()
    ],
    f'{claim(config, summary, metric)} Columns 3 and 4: change against the dense network. A rate '
    'at the end of its ladder is a lower bound.',
  )
  compared = train.Table(
    'Rates and indices of the pruned matrices',
    ('setting', 'asked', 'rate', 'change', 'index bits per kept weight', 'bytes of the network'),
    [
      (
        e['setting'],
        e['asked'],
        e['rate'],
        (e['change'], e['change_spread']),
        e['index_bits_per_kept'],
        e['stored_bytes'],
      )
      for e in summary
    ],
    'Index: indices and tables as stored, over kept weights of 32 bits. Decoding speed of these '
    'formats: benchmarks/sparsity.py.',
  )
  return [highest, compared]


def record(config, workdir: pathlib.Path, summary: Sequence[dict]) -> None:
  """Appends the dense network, the named rates, and the highest rates to the ledger."""
  metric = metric_of(config)
  where = f'darb/{label(config)}/{config.model.name}'
  d = config.data
  scored = f'{label(config)} {d.get("test_split", "test")}'
  if config.task == 'text':
    text = fd.load_text(d.name, vocab_size=d.vocab_size)
    scored += f', sha256 {text.sha256[:12]}, vocabulary {len(text.vocabulary)}'
  limit = {metric.change: -config.loss_goal if metric.larger else config.loss_goal}
  out = [outcome.dense_row(summary[0], f'{where}/dense', scored, config.dense_goal or None, metric)]

  def rows_of(entry, name):
    ours = config.methods[entry['setting']].kind == 'darb'
    goals = limit if ours else {}
    return outcome.ledger_rows(entry, f'{where}/{name}', scored, goals, metric=metric)

  for entry in summary:
    if entry['asked'] in config.named:
      out += rows_of(entry, f'{entry["setting"]}-{entry["asked"]:g}x')
  for name, entry in best(config, summary).items():
    out += rows_of(entry, f'{name}-highest')
  if claimed := over_structured(config, summary):
    value, other = claimed
    out.append(
      ledger.Row(
        run=f'{where}/darb-highest',
        metric='rate_over_structured',
        value=value,
        seeds=summary[0]['seeds'],
        samples=summary[0]['samples'],
        reference=f'{other}, the best of {", ".join(STRUCTURED)}; AAAI 2020: 2.8x to 4.3x',
        goal=config.goal or None,
        data=scored,
      )
    )
  record_once(workdir / 'recorded.json', summary, out)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.darb`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
