"""From the scores of pruned networks to tables, reports and ledger rows."""

from collections.abc import Mapping, Sequence
import html
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import compression as cp
from experiments import ledger
from fqjax import files, train
from fqjax.sparsity import plots
from fqjax.train._tables import column_texts


class Metric(NamedTuple):
  """How the numbers of one item become the number of a network.

  Attributes:
    name: in the ledger.
    change: name of the difference to the dense network in the ledger.
    larger: True if larger is better.
    unit: for tables.
    title: for pictures.
  """

  name: str
  change: str
  larger: bool
  unit: str
  title: str

  def value(self, items: np.ndarray) -> float:
    """The number of a network; `items` of any shape."""
    mean = float(np.mean(items))
    return 100 * mean if self.larger else float(np.exp(mean))

  def spread(self, items: np.ndarray) -> float:
    """Its standard error over seeds and items, [seeds, items]."""
    error = ledger.standard_error(items) or 0.0
    return 100 * error if self.larger else self.value(items) * error

  def difference(self, items: np.ndarray, dense: np.ndarray) -> tuple[float, float]:
    """Change against the dense networks of the same seeds on the same items, and its error."""
    error = ledger.standard_error(items - dense) or 0.0
    scale = 100.0 if self.larger else self.value(dense)
    return self.value(items) - self.value(dense), scale * error

  def lost(self, change: float) -> float:
    """How much worse a change is; negative if better."""
    return -change if self.larger else change


TOP1 = Metric('top1', 'change', True, '%', 'top-1, %')
PERPLEXITY = Metric('perplexity', 'perplexity_change', False, '', 'perplexity')


class Measured(NamedTuple):
  """One pruned network.

  Attributes:
    setting: its name.
    seed: of its dense network.
    rung: index on the ladder.
    scores: part -> numbers of the items.
    cut: the same right after the cut.
    dense: the same of the dense network.
    sizes: what it weighs.
    extra: further numbers by name.
  """

  setting: str
  seed: int
  rung: int
  scores: Mapping[str, np.ndarray]
  cut: Mapping[str, np.ndarray]
  dense: Mapping[str, np.ndarray]
  sizes: cp.Sizes
  extra: Mapping[str, float] = {}


def line(measured: Measured, metric: Metric = TOP1) -> str:
  """One network on the terminal."""
  value, dense, cut = (
    metric.value(x['test']) for x in (measured.scores, measured.dense, measured.cut)
  )
  sizes = measured.sizes
  return (
    f'{measured.setting}, seed {measured.seed}, rung {measured.rung}: {metric.name} {value:.2f}'
    f' (dense {dense:.2f}, not retrained {cut:.2f}), {sizes.kept:,} of {sizes.weights:,} weights'
    f' ({sizes.compression:.1f}x), {sizes.stored_bytes:,.0f} bytes'
    f' ({sizes.compression_bytes:.1f}x)'
  )


def summarize(networks: Sequence[Measured], metric: Metric = TOP1) -> list[dict]:
  """Means over the seeds, one entry for every setting and rung, in order.

  `change` is the paired difference to the dense network; of every part a value and a change.
  """
  groups: dict[tuple[str, int], list[Measured]] = {}
  for network in networks:
    groups.setdefault((network.setting, network.rung), []).append(network)
  out = []
  for (setting, rung), members in groups.items():
    first = members[0].sizes
    entry: dict[str, Any] = {
      'setting': setting,
      'rung': rung,
      'metric': metric.name,
      'seeds': len(members),
      'samples': len(members[0].scores['test']),
      'weights': first.weights,
      'kept': float(np.mean([m.sizes.kept for m in members])),
      'compression': float(np.mean([m.sizes.compression for m in members])),
      'dense_bytes': first.dense_bytes,
      'stored_bytes': float(np.mean([m.sizes.stored_bytes for m in members])),
      'compression_bytes': float(np.mean([m.sizes.compression_bytes for m in members])),
      'bits_per_weight': float(
        np.mean([8 * m.sizes.stored_bytes / m.sizes.weights for m in members])
      ),
      'index_bits': float(np.mean([m.sizes.index_bits for m in members])),
    }
    for part in members[0].scores:
      items, dense, cut = (
        np.stack([getattr(m, name)[part] for m in members]) for name in ('scores', 'dense', 'cut')
      )
      change, error = metric.difference(items, dense)
      prefix = '' if part == 'test' else f'{part}_'
      entry |= {
        f'{prefix}value': metric.value(items),
        f'{prefix}spread': metric.spread(items),
        f'{prefix}dense': metric.value(dense),
        f'{prefix}dense_spread': metric.spread(dense),
        f'{prefix}change': change,
        f'{prefix}change_spread': error,
        f'{prefix}cut': metric.value(cut),
      }
    for name in members[0].extra:
      entry[name] = float(np.mean([m.extra[name] for m in members]))
    out.append(entry)
  return out


def add_gains(
  summary: Sequence[dict], networks: Sequence[Measured], control: str, metric: Metric = TOP1
) -> None:
  """Adds `gain`, the paired difference to a control of the same seeds, to the other settings.

  Args:
    summary: of `summarize`.
    networks: what it was made from; without the control nothing is added.
    control: its setting, e.g. networks retrained as long without being pruned.
    metric: of the scores.
  """
  against = {m.seed: m.scores for m in networks if m.setting == control}
  for entry in summary:
    members = [m for m in networks if (m.setting, m.rung) == (entry['setting'], entry['rung'])]
    if entry['setting'] == control or not all(m.seed in against for m in members):
      continue
    for part in members[0].scores:
      prefix = '' if part == 'test' else f'{part}_'
      change, error = metric.difference(
        np.stack([m.scores[part] for m in members]),
        np.stack([against[m.seed][part] for m in members]),
      )
      entry |= {f'{prefix}gain': change, f'{prefix}gain_spread': error}


def chosen(summary: Sequence[dict], loss: float, metric: Metric = TOP1) -> dict[str, dict]:
  """For every setting the sparsest rung that loses at most `loss`, judged on held-out items.

  Without held-out items, and where every rung loses more, a setting has none.
  """
  found: dict[str, dict] = {}
  for entry in summary:
    if 'held_out_change' in entry and metric.lost(entry['held_out_change']) <= loss:
      best = found.get(entry['setting'])
      if best is None or entry['compression'] > best['compression']:
        found[entry['setting']] = entry
  return found


def last_rungs(summary: Sequence[dict]) -> dict[str, dict]:
  """The end of every setting's ladder."""
  return {entry['setting']: entry for entry in sorted(summary, key=lambda e: e['rung'])}


# ---------------------------------------------------------------------------- terminal and page


def print_table(summary: Sequence[dict], metric: Metric = TOP1) -> None:
  """All rungs on the terminal."""
  print(f'\n{"setting":<28}{metric.name:>16}{"change":>16}{"not retrained":>15}{"rate":>9}'
        f'{"bytes":>12}{"x bytes":>9}')  # fmt: skip
  for e in summary:
    value = f'{e["value"]:.2f} ± {e["spread"]:.2f}'
    change = f'{e["change"]:+.2f} ± {e["change_spread"]:.2f}'
    print(f'{e["setting"]:<28}{value:>16}{change:>16}{e["cut"]:>15.2f}{e["compression"]:>8.1f}x'
          f'{e["stored_bytes"]:>12,.0f}{e["compression_bytes"]:>8.1f}x')  # fmt: skip
  print('change: against the dense network of the same seed on the same items.')
  print('± is one standard error (seeds and items together; paired for the change).\n')


def show(table: train.Table) -> None:
  """A table of the report on the terminal, with its title and its note."""
  columns = [
    [name, *(html.unescape(text).replace('\xa0', ' ') for text in column_texts(cells))]
    for name, cells in zip(table.head, zip(*table.rows, strict=True), strict=True)
  ]
  widths = [max(map(len, column)) for column in columns]
  print(f'\n{table.title}')
  for first, *rest in zip(*columns, strict=True):
    cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
    print('  '.join([first.ljust(widths[0]), *cells]).rstrip())
  print(table.note)


def tables(summary: Sequence[dict], metric: Metric = TOP1) -> list[train.Table]:
  """The comparison for a report."""
  head = ('setting', metric.title, 'change', 'not retrained', 'rate', 'bytes', 'rate in bytes',
          'bits per weight', 'seeds')  # fmt: skip
  rows = [
    (
      e['setting'],
      (e['value'], e['spread']),
      (e['change'], e['change_spread']),
      e['cut'],
      e['compression'],
      e['stored_bytes'],
      e['compression_bytes'],
      e['bits_per_weight'],
      e['seeds'],
    )
    for e in summary
  ]
  note = (
    'Change: against the dense network of the same seed on the same items. ± is one standard error'
    ' (seeds and items together; paired for the change). Bytes: of the whole network with values,'
    ' indices, tables and padding; rate: dense weights over kept weights. Not retrained: cut or'
    ' rounded, and nothing else.'
  )
  return [train.Table('Compressed networks', head, rows, note)]


def pictures(
  summary: Sequence[dict], networks: Mapping[str, cp.Rung], metric: Metric = TOP1
) -> list[train.Picture]:
  """Accuracy against bytes, and what every layer kept."""
  points = [
    plots.Point(e['stored_bytes'], e['value'], e['spread'], series=e.get('series', e['setting']))
    for e in summary
  ]
  first = summary[0]
  against = plots.accuracy_against_rate(
    points, dense=(first['dense'], first['dense_spread']), value=metric.title
  )
  out = [
    train.Picture(
      'Quality against size',
      against,
      'Every rung of every setting; bytes of the whole network, error bars of one standard error.',
    )
  ]
  for name, rung in networks.items():
    out.append(
      train.Picture(
        f'What every layer kept: {name}',
        plots.kept_per_layer(rung.plan, rung.masks),
        'Weights before and after, the end of the ladder, first seed.',
      )
    )
  return out


def write_report(
  config,
  workdir: pathlib.Path,
  title: str,
  summary: Sequence[dict],
  networks: Mapping[str, cp.Rung],
  metric: Metric = TOP1,
  more: Sequence[train.Picture] = (),
  extra_tables: Sequence[train.Table] = (),
) -> None:
  """`report.html` and the pictures' numbers of a comparison."""
  train.write_report(
    workdir / 'report.html',
    title=title,
    command=ledger.command(),
    config=config.to_dict(),
    history=histories(workdir),
    tables=(*tables(summary, metric), *extra_tables),
    figures=(*pictures(summary, networks, metric), *more),
    summary={},
    hardware=ledger.hardware(),
  )


def histories(workdir: pathlib.Path) -> dict[str, list]:
  """The curves of all phases of the first seed, by the name of their folder."""
  seeds = sorted(workdir.glob('seed*'))
  paths = sorted(seeds[0].rglob('metrics.jsonl')) if seeds else []
  return {str(path.parent.relative_to(seeds[0])): train.read_json_lines(path) for path in paths}


# ---------------------------------------------------------------------------- ledger

# Metrics that only some experiments have, and what they compare with.
_EXTRA = {
  'gain': 'the dense network retrained as long',
  'conv_compression': '',
  'conv_compression_bytes': '',
  'conv_compression_8bit': '',
  'compression_values': 'bits of the surviving weights alone',
  'file_bytes': '',
  'file_top1': '',
  'agreement': '',
  'logit_error': '',
  'index_saving': 'compressed sparse rows with 32-bit columns',
  'rate': '',
  'index_bits_per_kept': '',
}


def ledger_rows(
  entry: Mapping[str, Any],
  run: str,
  data: str,
  goals: Mapping[str, float] | None = None,
  reference: str = '',
  metric: Metric = TOP1,
) -> list[ledger.Row]:
  """Rows of one rung.

  Args:
    entry: of `summarize`.
    run: `experiment/data/network/setting`.
    data: data set, split, and how much of it was trained on.
    goals: ledger metric -> the value asked for.
    reference: the paper's figure, or what the goal is from.
    metric: of the scores.
  """
  goals = dict(goals or {})
  common = {
    'run': run,
    'data': data,
    'seeds': entry['seeds'],
    'samples': entry['samples'],
    'bytes': round(entry['stored_bytes']),
  }

  def row(name, value, spread=None, reference=reference):
    return ledger.Row(
      metric=name, value=value, spread=spread, reference=reference, goal=goals.get(name), **common
    )

  extra = [
    row(name, entry[name], entry.get(f'{name}_spread'), '; '.join(filter(None, (own, reference))))
    for name, own in _EXTRA.items()
    if name in entry
  ]
  rows = [
    row(metric.name, entry['value'], entry['spread']),
    row(metric.change, entry['change'], entry['change_spread'], 'own dense network'),
    row('compression', entry['compression']),
    row('compression_bytes', entry['compression_bytes']),
    row('bits_per_weight', entry['bits_per_weight']),
    *extra,
  ]
  if unknown := set(goals) - {r.metric for r in rows}:
    raise ValueError(f'goals {sorted(unknown)} of {run} are not among its metrics')
  return rows


def dense_row(
  entry: Mapping[str, Any], run: str, data: str, goal: float | None = None, metric: Metric = TOP1
) -> ledger.Row:
  """The dense network's row."""
  return ledger.Row(
    run=run,
    metric=metric.name,
    value=entry['dense'],
    spread=entry['dense_spread'],
    seeds=entry['seeds'],
    samples=entry['samples'],
    bytes=round(entry['dense_bytes']),
    goal=goal,
    data=data,
  )


def save(workdir: pathlib.Path, summary: Sequence[dict]) -> None:
  """`results.json`."""
  files.write_text(workdir / 'results.json', json.dumps(summary, indent=2))
