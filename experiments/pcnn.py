"""Kernel patterns: n of nine weights, and a short code that says where they are (PCNN, 2020).

  python -m experiments.pcnn --config=configs/pcnn.py:resnet20 --workdir=runs/pcnn

Every kernel of a layer keeps n weights on one of a few patterns, which the layer chooses from its
own weights; a setting with `keep` below 1 drops whole kernels besides (connectivity). A dense
network is trained or loaded. For every *setting* ADMM pulls it to its patterns, the hard projection
follows, the survivors are retrained, and the network is scored; the dense one it is compared with is
scored as it came. A setting without any epochs is cut at once: only batch-norm statistics are taken
anew, on training images. `dense_retrained` is the control: as many steps at the same learning rates,
nothing pruned; `gain` is the paired difference to it.

Rates of convolutions count values, codes, tables and headers as they are stored. What an
accelerator built for such kernels would do is printed as well, from a model of it: computed, not
measured.

Run again with the same `--workdir`, it goes on where it stopped; programs that run side by side with
different `,settings=a+b` may share one. At the end `report.html` and `results.json` stand in the
workdir, for several networks in a folder of each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import pathlib
import re
import time
from typing import NamedTuple

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from experiments import cifar, harness, outcome, pictures, tasks
from experiments import compression as cp
from experiments.harness import data_label, record_once, say
from fqjax import sparsity, train
from fqjax.sparsity import plots

CONTROL = 'dense_retrained'
CODEBOOKS = ('greedy', 'votes')
PHASES = ('distil', 'admm', 'retrain')
# Fields that may change between a run and its continuation.
_FREE = re.compile(
  r'seeds|networks|settings|record|log_every|dense_goal|data\.workers'
  r'|patterns\..*\.(goals|reference)'
)
# Readable side by side.
_MOST_PATTERNS = 16


def experiment(config, workdir: pathlib.Path) -> list[dict]:
  """Trains, prunes and scores every setting with every seed; returns a row per network and setting."""
  check(config)
  mesh = harness.begin(config, workdir, _FREE)
  if not config.networks:
    return compare(config, workdir, mesh)
  rows = []
  for name in config.networks:
    rows += compare(cifar.with_network(config, name), workdir / name, mesh)
  return rows


def compare(config, workdir: pathlib.Path, mesh) -> list[dict]:
  """Prunes one network in every setting with every seed, and reports."""
  started = time.time()
  task, _ = cifar.make_task(config, mesh)
  networks, shown = [], {}
  for seed in config.seeds:
    run = cp.Run(task, workdir / f'seed{seed}', seed, mesh, config.log_every)
    first = task.init(jax.random.key(seed))
    for name in config.settings:  # what does not fit this network is found before it is trained
      make_plan(config, name, first.params, task.layers, 'votes')
    dense = cp.phase(run, 'dense', first, config.dense)
    before = cp.scores(run, 'dense', dense, anew=False)
    run = run._replace(task=cp.student(task, config.distill, dense))
    for name in config.settings:
      rung, energy = prune(config, name, run._replace(folder=run.folder / name), dense)
      sizes = cp.measure(rung.plan, rung.variables)
      extra = {**rates(rung.plan, rung.variables.params, task.layers), 'kept_energy': energy}
      networks.append(outcome.Measured(name, seed, 0, rung.scores, rung.cut, before, sizes, extra))
      stored = extra['conv_compression_bytes']
      say(f'{config.model.label} {outcome.line(networks[-1])}; convolutions {stored:.3f}x')
      if seed == config.seeds[0]:
        shown[name] = rung
  summary = outcome.summarize(networks)
  for entry in summary:
    entry['series'] = series(config, entry['setting'])
  outcome.add_gains(summary, networks, CONTROL)
  if train.is_main():
    outcome.save(workdir, summary)
    report(config, workdir, summary, shown)
    if config.record:
      record(config, workdir, summary)
    outcome.print_table(summary)
    for table in (rate_table(summary), accelerator_table()):
      outcome.show(table)
    print(*choice(summary), sep='\n')
    print(f'{time.time() - started:.0f} s. Report: {workdir / "report.html"}')
  train.synchronize('end')
  return summary


def check(config) -> None:
  """Refuses what can only fail later, before anything is trained.

  Raises:
    ValueError: naming the field.
  """
  for name in config.settings:
    if name == CONTROL:
      continue
    if name not in config.patterns:
      raise ValueError(
        f'unknown setting {name!r}; config.patterns has {", ".join(config.patterns)}, and {CONTROL}'
      )
    setting = config.patterns[name]
    if setting.codebook not in CODEBOOKS:
      raise ValueError(
        f'config.patterns.{name}.codebook={setting.codebook!r}: choose {", ".join(CODEBOOKS)}'
      )
    for rule in setting.layers:
      if len(rule) != 4 or not (rule[1] >= 1 and rule[2] >= 1 and 0 < rule[3] <= 1):
        raise ValueError(
          f'config.patterns.{name}.layers has {rule}; needed are a regex, taps and patterns from 1 '
          'on, and the kept share of the kernels, in (0, 1]'
        )
    for phase in PHASES:
      cp.check_recipe(f'patterns.{name}.{phase}', recipe(config, name, phase))
  cp.check_distill(config.distill)
  for name in ('dense', *PHASES):
    cp.check_recipe(name, config[name])
  for name in config.networks:
    cifar.with_network(config, name)


# ---------------------------------------------------------------------------- patterns


def recipe(config, name: str, phase: str):
  """A phase's recipe with what the setting changes in it."""
  found = config[phase].copy_and_resolve_references()
  if name != CONTROL:
    found.update(config.patterns[name][phase])
  return found


def make_plan(config, name: str, params, layers, codebook: str = '') -> sparsity.Plan:
  """The plan of a setting, each layer's patterns chosen from its weights.

  Args:
    config: of the experiment.
    name: of the setting.
    params: weights.
    layers: of `sparsity.trace_layers`.
    codebook: in place of the setting's.
  """
  if name == CONTROL:
    return sparsity.make_plan(params, [('.*', None)], layers=layers)
  setting = config.patterns[name]

  def structure(n, patterns, keep):
    def from_weights(w, layout):
      taps = sparsity.kernel_shape(w.shape, layout)[2]
      masks = sparsity.pcnn_codebook(w, layout, n, patterns, codebook or setting.codebook)
      return sparsity.Patterns(masks, taps, keep=keep)

    return from_weights

  chosen = [(regex, structure(*numbers)) for regex, *numbers in setting.layers]
  return sparsity.make_plan(params, chosen, layers=layers)


def prune(config, name: str, run: cp.Run, dense: tasks.Variables) -> tuple[cp.Rung, float]:
  """Prunes the dense network to a setting.

  Returns:
    The network, and how much of the pruned layers' energy the patterns held before any training
    towards them, in percent.
  """
  distil, admm, retrain = (recipe(config, name, phase) for phase in PHASES)
  plan = make_plan(config, name, dense.params, run.task.layers)
  if name == CONTROL:
    return cp.control(run, dense, plan, admm, retrain), 100.0
  energy = kept_energy(plan, dense.params)
  start = dense
  if distil.epochs:
    # Weights that have been drawn to patterns show better which patterns they want.
    start = cp.phase(run, 'distil', dense, distil, target=plan)
    plan = make_plan(config, name, start.params, run.task.layers)
  if admm.epochs or retrain.epochs:
    (rung,) = cp.climb(run, start, [plan], admm, retrain)
    return rung, energy
  return cp.cut_once(run, start, plan), energy


def kept_energy(plan: sparsity.Plan, params) -> float:
  """Share of the pruned layers' squared weights that the plan would keep, in percent."""
  before, after = (
    flatten_dict(jax.device_get(tree), sep='/')
    for tree in (params, sparsity.project(plan, params)[0])
  )
  whole, kept = (
    sum(float(np.sum(np.square(tree[entry.path], dtype=np.float64))) for entry in plan.pruned)
    for tree in (before, after)
  )
  return 100 * kept / whole


# ---------------------------------------------------------------------------- rates


def rates(plan: sparsity.Plan, params, layers: Mapping[str, sparsity.Layer]) -> dict[str, float]:
  """What the convolutions shrink by, those that stay dense included.

  Args:
    plan: of the network.
    params: pruned, float32.
    layers: of `sparsity.trace_layers`.

  Returns:
    conv_compression: dense weights over stored values.
    conv_compression_bytes: 32-bit dense weights over 32-bit values, codes, tables and headers.
    conv_compression_8bit: the same with 8 bits a value.
    speedup: products of the dense convolutions over those of stored values, computed.
  """
  found = sparsity.sizes(plan, params)
  weights = values = index = 0
  products = stored_products = 0.0
  for entry in plan.entries:
    if len(entry.shape) == 4:
      cost = found.bits[entry.path]
      stored = cost.values // 32
      weights, values = weights + entry.size, values + stored
      index += cost.total - cost.values
      products += layers[entry.path].macs
      stored_products += layers[entry.path].macs * stored / entry.size
  return {
    'conv_compression': weights / values,
    'conv_compression_bytes': 32 * weights / (32 * values + index),
    'conv_compression_8bit': 8 * weights / (8 * values + index),
    'speedup': products / stored_products,
  }


# ---------------------------------------------------------------------------- accelerator

# Its processing elements, the multipliers of each, clock in Hz and power in W, in 55 nm.
ELEMENTS, MULTIPLIERS, CLOCK, POWER = 64, 4, 300e6, 48.7e-3
# Taps and patterns of the operating points that are printed.
POINTS = ((4, 16), (2, 8), (1, 4))


class Accelerator(NamedTuple):
  """What the model of the accelerator says of kernels that keep n taps.

  Attributes:
    speedup: over dense kernels; products with pruned weights are skipped, no cycle is lost.
    tops: 10^12 operations a second, two for each product done or skipped.
    tops_per_watt: of the same.
    index_share: memory of the codes over that of the weights, in percent.
  """

  speedup: float
  tops: float
  tops_per_watt: float
  index_share: float


def accelerator(n: int, patterns: int, taps: int = 9, value_bits: int = 32) -> Accelerator:
  """Computes what kernels of n taps on some patterns gain, where n divides `MULTIPLIERS`."""
  speedup = taps / n
  tops = 2 * ELEMENTS * MULTIPLIERS * CLOCK * speedup / 1e12
  index = 100 * (patterns - 1).bit_length() / (n * value_bits)
  return Accelerator(speedup, tops, tops / POWER, index)


def accelerator_table() -> train.Table:
  """What the model says at some operating points."""
  head = ('taps kept', 'patterns', 'speed-up', 'TOPS/W', 'index memory, %')
  rows = []
  for n, patterns in POINTS:
    speedup, _, efficiency, index = accelerator(n, patterns)
    rows.append((f'n = {n}', patterns, speedup, round(efficiency, 2), round(index, 1)))
  dense = accelerator(9, 1)
  note = (
    f'{ELEMENTS} elements of {MULTIPLIERS} multipliers at {CLOCK / 1e6:.0f} MHz and '
    f'{1e3 * POWER:.1f} mW in 55 nm, dense {1e3 * dense.tops:.1f} GOPS and '
    f'{dense.tops_per_watt:.3f} TOPS/W; 32-bit weights. arXiv 2002.04997 reports up to 9.0x, '
    '28.39 TOPS/W, and 3.1 % of index memory.'
  )
  return train.Table('Accelerator model: computed, nothing measured', head, rows, note)


# ---------------------------------------------------------------------------- report


def series(config, name: str) -> str:
  """Which line of the picture a setting belongs to."""
  if name == CONTROL:
    return name
  setting = config.patterns[name]
  _, n, _, keep = setting.layers[-1]
  kernels = '' if keep == 1 else f', {100 * keep:g} % of the kernels'
  return f'n = {n}{kernels}' + (', by votes' if setting.codebook == 'votes' else '')


def report(
  config, workdir: pathlib.Path, summary: list[dict], shown: Mapping[str, cp.Rung]
) -> None:
  """`report.html`: the comparison, patterns, ADMM over time, the accelerator model."""
  # One network of each sparsity is drawn: codebooks of several sizes look alike.
  drawn = {}
  for name, rung in shown.items():
    if name != CONTROL:
      drawn.setdefault(config.patterns[name].layers[-1][1::2], (name, rung))
  drawn = dict(drawn.values())
  seed = workdir / f'seed{config.seeds[0]}'
  outcome.write_report(
    config,
    workdir,
    f'{config.data.name}: {config.model.label} with n weights in every kernel',
    summary,
    drawn,
    more=[
      *pictures.over_time(
        {name: [seed / name / 'distil', seed / name / '00-admm'] for name in shown},
        'admm/gap',
        'ADMM gap',
        'Distance to the target over the norm, worst layer, first seed.',
      ),
      *(pattern_picture(name, rung) for name, rung in drawn.items()),
    ],
    extra_tables=(rate_table(summary), accelerator_table()),
  )


def choice(summary: Sequence[dict]) -> list[str]:
  """What the held-out images say, where there are any."""
  if 'held_out_value' not in summary[0]:
    return []
  best = max(
    (e for e in summary if e['setting'] != CONTROL or len(summary) == 1),
    key=lambda e: e['held_out_value'],
  )
  lines = [
    f'{e["setting"]:<28}{e["held_out_value"]:.2f} ± {e["held_out_spread"]:.2f} % of held-out images,'
    f' {e["held_out_change"]:+.2f} ± {e["held_out_change_spread"]:.2f}'
    for e in summary
  ]
  return [*lines, f'Best on held-out images: {best["setting"]}']


def rate_table(summary: Sequence[dict]) -> train.Table:
  """The rates of all settings."""
  columns = {
    'conv_compression_bytes': 'convolutions', 'conv_compression': 'their weights',
    'conv_compression_8bit': 'at 8 bits', 'compression': 'all weights',
    'compression_bytes': 'all bytes', 'speedup': 'computed speed-up',
    'kept_energy': 'energy kept, %',
  }  # fmt: skip
  head = ['setting', *columns.values()]
  rows = [(e['setting'], *(e[name] for name in columns)) for e in summary]
  gained = [e for e in summary if 'gain' in e]
  if gained:
    head.append('gain over the control')
    rows = [
      (*row, (e['gain'], e['gain_spread']) if 'gain' in e else None)
      for row, e in zip(rows, summary, strict=True)
    ]
  note = (
    'Convolutions: 32-bit dense weights over stored values, codes, tables and headers. Computed '
    'speed-up: products of the dense convolutions over those of stored values. Energy: share of the '
    'squared weights that the patterns hold before any training towards them.'
  )
  return train.Table('Rates', head, rows, note)


def pattern_counts(rung: cp.Rung) -> Counter[int]:
  """How many kernels live on which taps, over all pruned layers; bitmask -> kernels."""
  masks, counts = flatten_dict(rung.masks, sep='/'), Counter()
  for entry in rung.plan.pruned:
    kernels = sparsity.to_kernels(np.asarray(masks[entry.path]), entry.layout)
    bits = 1 << np.arange(kernels.shape[-1])
    counts.update((kernels.reshape(-1, len(bits)) @ bits).tolist())
  counts.pop(0, None)  # kernels that went
  return counts


def pattern_picture(name: str, rung: cp.Rung) -> train.Picture:
  """The patterns of the whole network, the most used ones drawn."""
  counts = pattern_counts(rung)
  most = counts.most_common(_MOST_PATTERNS)
  share = sum(count for _, count in most) / counts.total()
  return train.Picture(
    f'Patterns: {name}',
    plots.pattern_histogram([mask for mask, _ in most], [count for _, count in most]),
    f'Kernels of all layers by the taps they keep: {len(most)} of {len(counts)} patterns, '
    f'{100 * share:.0f} % of the kernels; every layer has a codebook of its own.',
  )


# ---------------------------------------------------------------------------- ledger


def record(config, workdir: pathlib.Path, summary: list[dict]) -> None:
  """Appends the dense network and every setting to the ledger."""
  where = f'pcnn/{data_label(config.data.name)}/{config.model.label}'
  scored = cifar.described(config)
  rows = [outcome.dense_row(summary[0], f'{where}/dense', scored, config.dense_goal or None)]
  for entry in summary:
    name = entry['setting']
    setting = config.patterns.get(name)
    goals, reference = (dict(setting.goals), setting.reference) if setting else ({}, '')
    epochs = sum(recipe(config, name, phase).epochs for phase in PHASES)
    run, trained = (
      (f'{where}/{name}', f'{scored}, {epochs:g} epochs')
      if epochs
      else (f'{where}/{name}_one_shot', scored)
    )
    rows += outcome.ledger_rows(entry, run, trained, goals, reference)
  record_once(workdir / 'recorded.json', summary, rows)


# ---------------------------------------------------------------------------- command line


def parse_command(argv):
  """Parses what follows `python -m experiments.pcnn`; raises where it would not run."""
  return harness.parse_command(argv, check)


if __name__ == '__main__':
  harness.run(experiment)
