"""What every benchmark shares: arguments, interleaved timing, ratios, tables, JSON, the ledger.

A row is a dict with the keys of `KEYS`. `value` is what was measured, in `unit`; `ratio` compares it
with `peer`, larger is better. `goal` is the ratio asked for and `spread` the ratio's standard error;
where there is no ratio, both are the value's. `peer`, `ratio`, `goal` and `spread` may be None.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import ctypes
import importlib
import json
import math
import multiprocessing
import pathlib
import re
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments import ledger

KEYS = ('name', 'value', 'unit', 'peer', 'ratio', 'goal', 'spread')
# The peer of rows whose ratio is the share of the machine's memory bandwidth.
COPY = 'plain copy'

# What the value of a row without a ratio is called in the ledger, by its unit.
METRICS = {
  'images/s per core': 'images_per_second',
  'ms per step': 'step_overhead',
  's': 'duration',
  'programs': 'compilations',
  'bytes per image': 'input_bytes',
  'bytes per step and device': 'collective_bytes',
  'bytes held': 'peak_memory',
}

Row = dict[str, Any]


def parser(doc: str | None, repeats: int = 10) -> argparse.ArgumentParser:
  """Command line with what all benchmarks take; `doc` is the module's docstring."""
  result = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  result.add_argument('--json', type=pathlib.Path, metavar='PATH', help='write the rows there')
  result.add_argument('--record', action='store_true', help='append the rows to results.csv')
  result.add_argument('--repeats', type=int, default=repeats, help='timed calls of each contender')
  return result


def import_peer(name: str) -> Any:
  """The module of a library that is measured against; imported where it is used.

  Raises:
    SystemExit: it is not installed; says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise SystemExit(
      f"{e.name or name} is missing, which is measured against: pip install -e '.[bench]'"
    ) from e


# Timing


def compare(
  contenders: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
  """Seconds of every call, contenders taking turns so that all see the same machine.

  Args:
    contenders: functions without arguments; arrays in their results are waited for.
    repeats: timed calls of each.
    warmup: calls before, which compile and fill caches.

  Returns:
    By name, `repeats` times; the i-th times of all contenders were measured side by side.
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, got {repeats}.')
  for function in contenders.values():
    for _ in range(warmup):
      jax.block_until_ready(function())
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  names = list(contenders)
  for i in range(repeats):
    # Each round starts with another contender: no one always follows the same neighbour.
    for name in names[i % len(names) :] + names[: i % len(names)]:
      begin = time.perf_counter()
      result = jax.block_until_ready(contenders[name]())
      seconds[name].append(time.perf_counter() - begin)
      del result  # freeing it is nobody's time
  return seconds


def fastest(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
  """The one of `names` with the smallest median."""
  return min(names, key=lambda name: float(np.median(seconds[name])))


def speedup(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float | None]:
  """How many times faster we are: median of the paired ratios, and its standard error."""
  ratios = np.asarray(peer) / np.asarray(ours)
  if len(ratios) < 2:
    return float(ratios[0]), None
  # 1.2533 = sqrt(pi / 2): the median of a normal sample scatters that much more than its mean.
  return float(np.median(ratios)), float(1.2533 * ratios.std(ddof=1) / math.sqrt(len(ratios)))


def speedup_row(
  name: str, seconds: Mapping[str, Sequence[float]], ours: str, peer: str, goal: float | None = None
) -> Row:
  """A row that compares two contenders of `compare`; `value` is our median in milliseconds."""
  ratio, spread = speedup(seconds[ours], seconds[peer])
  value = float(np.median(seconds[ours])) * 1e3
  return dict(name=name, value=value, unit='ms', peer=peer, ratio=ratio, goal=goal, spread=spread)


# The machine


def copier(array: np.ndarray) -> Callable[[], None]:
  """A function that copies `array` into memory already mapped, with all cores.

  It reads and writes every byte once: the least any transform of the array has to do.
  """
  target = np.empty_like(array)
  threads = ledger.core_count()
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  pairs = list(
    zip(
      np.array_split(target.reshape(-1), threads),
      np.array_split(np.ascontiguousarray(array).reshape(-1), threads),
      strict=True,
    )
  )

  def copy():
    for future in [pool.submit(np.copyto, *pair) for pair in pairs]:
      future.result()

  return copy


def copy_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
  """Bytes per second that all cores copy, counting what is read and what is written."""
  array = np.ones(megabytes * 1024 * 1024, np.uint8)
  seconds = compare({COPY: copier(array)}, repeats)[COPY]
  return 2 * array.nbytes / float(np.median(seconds))


def peak_memory(function: Callable[..., Any] | None = None, *args) -> int:
  """Most bytes held at once by this process, or by a fresh one that calls `function(*args)`.

  The function is sent to the other process: it is one of a module, and its arguments can be pickled.
  """
  if function is None:
    try:
      # Unlike ru_maxrss, this does not begin with what the parent process once held.
      status = pathlib.Path('/proc/self/status').read_text()
      return int(re.findall(r'^VmHWM:\s*(\d+) kB$', status, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      return peak if sys.platform == 'darwin' else peak * 1024
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(_call_and_measure, function, args).result()


def keep_memory() -> bool:
  """Tells glibc to keep freed memory for the next call instead of giving it back; True if it obeys.

  By default every large result begins as fresh pages that the kernel maps and clears one by one: on
  a virtual machine easily more work than a transform of them. A long-running program that minds
  sets MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2000000000, or loads another allocator.
  """
  mmap_max, trim_threshold = -4, -1  # malloc.h
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2_000_000_000))


def _call_and_measure(function, args) -> int:
  jax.block_until_ready(function(*args))
  return peak_memory()


# Results


def finish(
  args: argparse.Namespace,
  rows: Sequence[Row],
  data: str = '',
  metrics: Mapping[str, str | None] | None = None,
) -> None:
  """Prints the rows as a table and writes them where the command line says.

  Args:
    args: from `parser`.
    rows: see the module's docstring.
    data: what was measured on, for the ledger ('64x224x224x3').
    metrics: for the ledger, by name of a row: record its value, not its ratio, as this metric; None
      leaves the row out. Rows that are not named are recorded by their ratio, or without one by
      the metric that `METRICS` has for their unit.

  Raises:
    ValueError: a row lacks a key or has another one, or no metric is known for its unit.
  """
  rows = [dict(row) for row in rows]
  for row in rows:
    if set(row) != set(KEYS):
      raise ValueError(f'a benchmark row has the keys {KEYS}, got {tuple(row)}.')
  print(f'{ledger.hardware()}; jax {jax.__version__} {jax.default_backend()}')
  print(table(rows))
  if args.json:
    rows = [{key: _plain(row[key]) for key in KEYS} for row in rows]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=1) + '\n')
  if args.record:
    metrics = metrics or {}
    recorded = [row for row in rows if metrics.get(row['name'], '') is not None]
    ledger.append([ledger_row(row, data, metric=metrics.get(row['name'])) for row in recorded])


def table(rows: Sequence[Row]) -> str:
  """The rows as aligned columns of text."""
  lines = [('', 'value', 'unit', 'ratio', '+-', 'goal', '', 'peer')]
  for row in rows:
    ratio, goal = row['ratio'], row['goal']
    reached = {None: '', True: 'ok', False: 'BELOW'}[_reached(row)]
    peer = row['peer'] if isinstance(row['peer'], str) else _short(row['peer'])
    lines.append(
      (row['name'], _short(row['value']), row['unit'], _short(ratio), _short(row['spread']))
      + (_short(goal), reached, peer)
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  right = (1, 3, 4, 5)
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def _reached(row: Row) -> bool | None:
  """Whether a row meets its goal; None without one, or where nobody said which way is better."""
  metric = _metric(row)
  if row['goal'] is None or metric is None:
    return None
  value = row['value'] if row['ratio'] is None else row['ratio']
  return bool(value >= row['goal'] if ledger.METRICS[metric].larger else value <= row['goal'])


def _metric(row: Row) -> str | None:
  """What the ledger calls the number that counts of a row."""
  if row['ratio'] is None:
    return METRICS.get(row['unit'])
  return 'bandwidth_fraction' if row['peer'] == COPY else 'ratio'


def ledger_row(row: Row, data: str = '', module: str | None = None, metric: str | None = None):
  """A row of results.csv: `run` is MODULE/DATA/BACKEND/NAME.

  The value is the ratio, or the row's own value where there is no ratio or a `metric` is given.
  """
  command = ledger.command(module=module)
  parts = command.split()[2], data or 'none', jax.default_backend(), row['name']
  has_ratio, by_ratio = row['ratio'] is not None, row['ratio'] is not None and metric is None
  metric = metric or _metric(row)
  if metric is None:
    raise ValueError(
      f'{row["name"]}: no metric is known for values in {row["unit"]!r}; give one in METRICS of '
      'benchmarks/common.py.'
    )
  # Beside a ratio stands what it was made of.
  milliseconds = {'ms': 1.0, 's': 1e3}.get(row['unit'].split()[0]) if by_ratio else None
  size = row['value'] if by_ratio and row['unit'].split()[0] in ('B', 'bytes') else None
  # Goal, spread and peer belong to the ratio where there is one.
  own = by_ratio or not has_ratio
  reference = row['peer'] if isinstance(row['peer'], str) else _short(row['peer'])
  return ledger.Row(
    run='/'.join(re.sub(r'[^\w.+-]+', '-', part).strip('-') for part in parts),
    metric=metric,
    value=row['ratio' if by_ratio else 'value'],
    spread=row['spread'] if own else None,
    goal=row['goal'] if own else None,
    reference=reference if own else '',
    bytes=size,
    milliseconds=None if milliseconds is None else row['value'] * milliseconds,
    data=data,
    command=command,
  )


def _short(value) -> str:
  if value is None:
    return ''
  return f'{value:,}' if isinstance(value, int) else f'{value:,.4g}'


def _plain(value):
  """NumPy scalars as Python's, which JSON knows."""
  return value.item() if isinstance(value, np.generic) else value
