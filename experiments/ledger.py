"""The ledger `results.csv`: one measured row per metric, and the README's tables made from it.

  python -m experiments.ledger            # check every row, print what falls short of its goal
  python -m experiments.ledger --write    # the same, then renew the tables in README.md
  python -m experiments.ledger --check    # the same, and fail if the tables are out of date

Rows are appended by the program that measured them and never edited; a run that misses its goal is
a row too. Several rows may share `run` and `metric` (measured again later, or elsewhere); tables
and goals look at the newest of them.

A program that records rows offers `parse_command(argv)`: it parses the words after
`python -m MODULE` exactly as the program would and raises (or exits) where it would not run, so
that a command in the ledger is known to be still good. With argparse that is
`parser().parse_args(argv)`; for absl flags and config files use `parse_flags`.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import contextlib
import csv
import dataclasses
import datetime
import difflib
import fcntl
import functools
import html
import importlib
import importlib.util
import io
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from typing import Any, NamedTuple
import warnings

import numpy as np

from fqjax import files

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = (
  'run', 'metric', 'unit', 'value', 'spread', 'samples', 'seeds', 'reference', 'goal', 'reached',
  'bytes', 'milliseconds', 'data', 'hardware', 'command', 'revision', 'date',
)  # fmt: skip


class Metric(NamedTuple):
  """What a metric's number means.

  Attributes:
    unit: unit of `value`, `spread` and `goal`.
    larger: True if a larger value is better.
    text: one line for a reader who meets the name in the file.
  """

  unit: str
  larger: bool
  text: str


METRICS = {
  'top1': Metric('%', True, 'share of images whose first guess is right'),
  'top5': Metric('%', True, 'share of images whose first five guesses hold the right one'),
  'loss': Metric('nat', False, 'mean loss on held-out data'),
  'perplexity': Metric('1', False, 'exp of the mean loss per token'),
  'gain': Metric('points', True, 'paired difference in top-1 to the run named in reference'),
  'gain_over_controls': Metric(
    'points', True, 'the smallest paired difference in top-1 to a control, named in reference'
  ),
  'change': Metric('points', True, 'paired difference in top-1 to the own dense network'),
  'perplexity_change': Metric('1', False, 'difference in perplexity to the own dense network'),
  'compression': Metric('x', True, 'dense weights over kept weights'),
  'conv_compression': Metric('x', True, 'dense over kept weights of the convolutions'),
  'conv_compression_bytes': Metric(
    'x', True, 'float32 bytes of the convolutions over their stored bytes'
  ),
  'conv_compression_8bit': Metric('x', True, 'the same with 8 bits a value on both sides'),
  'compression_bytes': Metric('x', True, 'float32 bytes over all stored bytes'),
  'compression_values': Metric(
    'x', True, 'float32 bytes of all weights over those of the values of living ones alone'
  ),
  'file_bytes': Metric('B', False, 'all bytes of the exported file'),
  'file_top1': Metric('%', True, 'top-1 of the exported file, run by NumPy'),
  'bits_per_weight': Metric('bit', False, 'stored bits over dense weights'),
  'rate': Metric('x', True, 'dense weights over kept weights, of the pruned matrices alone'),
  'rate_over_structured': Metric(
    'x', True, 'highest rate within the limit, over that of the best structure'
  ),
  'index_bits_per_kept': Metric('bit', False, 'stored indices and tables for each kept weight'),
  'agreement': Metric('%', True, 'share of images with the first guess of the dense network'),
  'logit_error': Metric('1', False, 'mean absolute difference of logits to the dense network'),
  'index_saving': Metric('%', True, 'index bytes saved against the format named in reference'),
  'parameters': Metric('1', False, 'trained numbers'),
  'macs': Metric('MAC', False, 'multiply-accumulates for one image'),
  'input_bytes': Metric('B', False, 'bytes of one image as sent to the device'),
  'input_values': Metric('1', False, 'numbers of one image as sent to the device'),
  'channels_on': Metric('1', False, 'DCT channels in use, mean over images'),
  'needed_rate': Metric('x', False, 'rate of a matrix from which on its product is faster'),
  'ratio': Metric('x', True, 'ours over the peer named in reference, larger is better'),
  'bandwidth_fraction': Metric('1', True, 'bytes moved per second over a plain copy of them'),
  'images_per_second': Metric('images/s', True, 'throughput'),
  'step_time': Metric('ms', False, 'one training step'),
  'step_overhead': Metric('ms', False, 'host time of a step that computes almost nothing'),
  'compilations': Metric('1', False, 'programs compiled after the first step'),
  'collective_bytes': Metric('B', False, 'result of all collectives of a step, per device'),
  'peak_memory': Metric('B', False, 'most memory held at once'),
  'max_error': Metric('1', False, 'largest absolute difference to the reference'),
  'duration': Metric('s', False, 'wall time of the whole command'),
}

# A whole row ends with this, so a line cut off anywhere can never pass for one.
_DATE = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ')
_RUN = re.compile(r'[^/\s]+(/[^/\s]+){3}')


# -------------------------------------------------------------------- where a number comes from


@functools.cache
def _processor() -> str:
  """Model, cores and the vector units that decide the speed of our kernels."""
  info = ''
  with contextlib.suppress(OSError):
    info = pathlib.Path('/proc/cpuinfo').read_text()
  name = re.search(r'^model name\s*:\s*(.+)$', info, re.MULTILINE)
  found = re.search(r'^(?:flags|Features)\s*:\s*(.+)$', info, re.MULTILINE)
  flags = set(found[1].split()) if found else set()
  wanted = ('avx2', 'avx512f', 'avx_vnni', 'avx512_vnni', 'amx_int8', 'asimddp', 'i8mm')
  cores = core_count()
  model = name[1].strip() if name else platform.processor() or platform.machine()
  units = ' '.join(f for f in wanted if f in flags)
  return f'{model}, {cores} core{"s" * (cores != 1)}' + (f', {units}' if units else '')


def core_count() -> int:
  """Cores this process may use.

  Example:
    >>> core_count() > 0
    True
  """
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # macOS
    return os.cpu_count() or 1


def hardware() -> str:
  """Processor, cores and vector units, and the accelerators JAX is using.

  JAX is asked only if it has started its backend: asking would start it.

  Example:
    >>> hardware() == hardware()
    True
  """
  parts = [_processor()]
  jax = sys.modules.get('jax')
  if jax is not None:
    from jax._src import xla_bridge  # no public name says whether a backend exists

    if xla_bridge.backends_are_initialized() and jax.default_backend() != 'cpu':
      parts.append(f'{jax.device_count()} x {jax.devices()[0].device_kind}')
  return '; '.join(parts)


def revision(root: pathlib.Path = ROOT) -> str:
  """Short commit of the source tree, '-dirty' if it was changed since, 'unknown' outside git.

  Example:
    >>> revision(pathlib.Path('/'))
    'unknown'
  """

  def git(*words):
    return subprocess.run(
      ['git', *words], cwd=root, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()

  try:
    commit = git('rev-parse', '--short', 'HEAD')
    # The ledger itself changes with every row and the README with every table: neither is code.
    changed = git('status', '--porcelain', '--', '.', ':!results.csv', ':!README.md')
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return f'{commit}-dirty' if changed else commit


def date() -> str:
  """Now, in UTC, as ISO 8601 to the second.

  Example:
    >>> len(date())
    20
  """
  return datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ')


def command(argv: Sequence[str] | None = None, module: str | None = None) -> str:
  """The command line of this process as `python -m MODULE ...`, without paths of this machine.

  Absolute paths inside the source tree become relative to it; others become `DIR`, or `FILE` where
  they have a suffix.

  Args:
    argv: words after the module; by default those of this process.
    module: dotted name; by default the module this process was started with.

  Example:
    >>> command(['--workdir=/home/me/r50', '--config=configs/x.py:smoke'], 'experiments.x')
    'python -m experiments.x --workdir=DIR --config=configs/x.py:smoke'
  """
  if module is None:
    module = _main_module()
  words = [_without_paths(word) for word in (sys.argv[1:] if argv is None else argv)]
  return shlex.join(['python', '-m', module, *words])


def _main_module() -> str:
  main = sys.modules['__main__']
  spec = getattr(main, '__spec__', None)
  if spec is not None:
    return spec.name.removesuffix('.__main__')
  path = pathlib.Path(getattr(main, '__file__', None) or 'interactive').resolve()
  if path.is_relative_to(ROOT):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  return path.stem


def _without_paths(word: str) -> str:
  def replace(match):
    path = pathlib.Path(os.path.expanduser(match[0]))
    if path.is_relative_to(ROOT):
      return str(path.relative_to(ROOT))
    return 'FILE' if path.suffix else 'DIR'

  # An absolute path starts the word or follows =, :, a comma or a quote; `gs://bucket` is none.
  word = re.sub(r'file://', '', word)
  return re.sub(r'(?:(?<=^)|(?<=[=:,"\'(\[ ]))(?:~|/(?!/))[^:,"\')\]]*', replace, word)


# -------------------------------------------------------------------- spread


def standard_error(values: Iterable[float] | np.ndarray) -> float | None:
  """Standard error of the mean of independent measurements; None for a single one.

  Each axis of an array, such as [seeds, images], is a source of variation of its own: the standard
  errors of the means along them are added in quadrature. An axis of length 1 adds nothing.

  Raises:
    ValueError: there is no value.

  Example:
    >>> standard_error([1.0, 2.0, 3.0])
    0.5773502691896258
    >>> standard_error(np.array([[0.0, 0.0], [4.0, 4.0]]))
    2.0
  """
  values = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
  if values.size == 0:
    raise ValueError('standard_error needs at least one value.')
  errors = []
  for axis, n in enumerate(values.shape):
    if n > 1:
      means = np.moveaxis(values, axis, 0).reshape(n, -1).mean(1)
      errors.append(means.std(ddof=1) / math.sqrt(n))
  return math.hypot(*errors) if errors else None


def paired_standard_error(a: Iterable[float], b: Iterable[float]) -> float | None:
  """Standard error of the mean of a - b, where a[i] and b[i] saw the same image or seed.

  Raises:
    ValueError: a and b differ in length.

  Example:
    >>> paired_standard_error([3.0, 5.0, 9.0], [1.0, 3.0, 7.0])
    0.0
  """
  a, b = list(a), list(b)
  if len(a) != len(b):
    raise ValueError(f'paired values come in pairs, got {len(a)} and {len(b)}.')
  return standard_error(np.asarray(a, np.float64) - np.asarray(b, np.float64))


# -------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Row:
  """One measured number. `unit` and `reached` follow from the rest.

  Attributes:
    run: `experiment/data/network/setting`.
    metric: a key of `METRICS`.
    value: the number, in the metric's unit.
    spread: its standard error.
    samples: images (or calls) measured.
    seeds: trainings averaged over.
    reference: what it is compared with: a paper, a peer, another run.
    goal: the value asked for.
    bytes: size of the thing measured, where there is one (a model file, a batch).
    milliseconds: time of one call, where the value is not the time itself.
    data: data set and split.
    hardware: see `hardware()`.
    command: what repeats it, see `command()`.
    revision: see `revision()`.
    date: see `date()`.

  Example:
    >>> row = Row('imagenet_freq/cifar10/cifar_resnet20_dct/static6', 'top1', 87.5, goal=86.0)
    >>> row.unit, row.reached
    ('%', 'yes')
  """

  run: str
  metric: str
  value: float
  spread: float | None = None
  samples: int | None = None
  seeds: int | None = None
  reference: str = ''
  goal: float | None = None
  bytes: int | None = None
  milliseconds: float | None = None
  data: str = ''
  hardware: str = dataclasses.field(default_factory=hardware)
  command: str = dataclasses.field(default_factory=command)
  revision: str = dataclasses.field(default_factory=revision)
  date: str = dataclasses.field(default_factory=date)

  def __post_init__(self):
    if not _RUN.fullmatch(self.run):
      raise ValueError(
        f'run {self.run!r} does not read experiment/data/network/setting: '
        'four parts, none empty, no spaces.'
      )
    if self.metric not in METRICS:
      close = difflib.get_close_matches(self.metric, METRICS, n=3)
      raise ValueError(
        f'unknown metric {self.metric!r}'
        + (f', did you mean {" or ".join(close)}?' if close else '.')
        + ' New ones are added to METRICS in experiments/ledger.py.'
      )
    for name in _NUMBERS:
      value = getattr(self, name)
      if value is None and name != 'value':
        continue
      if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f'{self.run} {self.metric}: {name} must be a finite number, got {value!r}')
      if value < 0 and name not in ('value', 'goal'):
        raise ValueError(f'{self.run} {self.metric}: {name} must not be negative, got {value!r}')
      if _NUMBERS[name] is int and value != int(value):
        raise ValueError(f'{self.run} {self.metric}: {name} must be whole, got {value!r}')
      # As it will be read back: what is judged against a goal is what stands in the file.
      object.__setattr__(self, name, _NUMBERS[name](_cell(value)))
    for name in ('reference', 'data', 'hardware', 'command', 'revision'):
      # One row, one line: what makes a cut-off row visible.
      object.__setattr__(self, name, ' '.join(str(getattr(self, name)).split()))
    if not _DATE.fullmatch(self.date):
      raise ValueError(f'date must read 2026-01-31T12:00:00Z, got {self.date!r}')

  @property
  def unit(self) -> str:
    """Unit of the metric."""
    return METRICS[self.metric].unit

  @property
  def reached(self) -> str:
    """'yes', 'no', or '' without a goal; a gain below twice its standard error is none."""
    if self.goal is None:
      return ''
    better = self.value >= self.goal if METRICS[self.metric].larger else self.value <= self.goal
    # A difference counts from twice its standard error on.
    if self.metric.startswith('gain') and self.spread is not None:
      better = better and self.value > 2 * self.spread
    return 'yes' if better else 'no'

  def cells(self) -> list[str]:
    """The row as written to the file, in the order of `COLUMNS`."""
    return [_cell(getattr(self, name)) for name in COLUMNS]

  @classmethod
  def from_cells(cls, cells: Sequence[str]) -> 'Row':
    """Inverse of `cells`.

    Raises:
      ValueError: with what is wrong, if the cells are not what `cells` writes.
    """
    if len(cells) != len(COLUMNS):
      raise ValueError(f'{len(cells)} cells instead of {len(COLUMNS)}')
    fields: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
    unit, reached = fields.pop('unit'), fields.pop('reached')
    for name, kind in _NUMBERS.items():
      text = fields[name]
      try:
        fields[name] = kind(text) if text or name == 'value' else None
      except ValueError:
        raise ValueError(f'{name} is not a number: {text!r}') from None
    row = cls(**fields)
    if unit != row.unit:
      raise ValueError(f'unit is {unit!r}, {row.metric} is in {row.unit!r}')
    if reached != row.reached:
      raise ValueError(f'reached says {reached!r}, value and goal say {row.reached!r}')
    return row


_NUMBERS: dict[str, type] = {
  'value': float,
  'spread': float,
  'samples': int,
  'seeds': int,
  'goal': float,
  'bytes': int,
  'milliseconds': float,
}


def _cell(value) -> str:
  if value is None:
    return ''
  if isinstance(value, str):
    return value
  # Byte and MAC counts keep every digit; measured fractions keep the six that mean something.
  return str(int(value)) if value == int(value) and abs(value) < 2**53 else f'{value:.6g}'


def _line(cells: Sequence[str]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerow(cells)
  return text.getvalue()


# -------------------------------------------------------------------- the file


def append(rows: Iterable[Row], path: str | os.PathLike | None = None) -> None:
  """Appends rows in one write, under a lock that other writers wait for.

  Either all rows are added or none. If an earlier writer was killed in the middle of a line, that
  line is shown in a warning and taken out first.

  Args:
    rows: measured by the calling program.
    path: the ledger; by default `results.csv` of the source tree.

  Raises:
    ValueError: the file has other columns.
    OSError: the file could not be written; it is as it was before.
  """
  rows = list(rows)
  path = ROOT / 'results.csv' if path is None else pathlib.Path(path)
  header = _line(COLUMNS).encode()
  new = ''.join(_line(row.cells()) for row in rows).encode()
  with open(path, 'a+b', buffering=0) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    old = file.read()
    if old and not header.startswith(old[: len(header)]):
      raise ValueError(f'{path} does not start with the columns {",".join(COLUMNS)}')
    whole = old.rfind(b'\n') + 1
    if whole < len(old):
      if whole:
        text = old[whole:].decode(errors='replace')
        warnings.warn(f'{path} ended in a line cut off while it was written, removed: {text!r}')
      file.truncate(whole)
    rest = new if whole else header + new
    try:
      while rest:
        rest = rest[file.write(rest) :]
      os.fsync(file.fileno())
    except OSError:
      file.truncate(whole)
      raise


def read(path: str | os.PathLike | None = None) -> tuple[list[Row], list[str]]:
  """Rows of the ledger, and a sentence for everything in it that is not a row.

  Args:
    path: the ledger; by default `results.csv` of the source tree.

  Returns:
    The good rows in file order, and the problems, each with its line number.
  """
  path = ROOT / 'results.csv' if path is None else pathlib.Path(path)
  with open(path, 'rb') as file:
    fcntl.flock(file, fcntl.LOCK_SH)  # never between the two halves of somebody's write
    text = file.read().decode(errors='replace')
  # Never splitlines(): it also splits at characters that may stand inside a cell.
  lines = text.split('\n')
  cut = lines.pop()
  rows, problems = [], []
  if not lines:
    return [], [f'{path.name}: no header; expected {",".join(COLUMNS)}']
  header = next(csv.reader(lines[:1]), [])
  if tuple(header) != COLUMNS:
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in header]
    what = [f'unknown columns {", ".join(unknown)}'] * bool(unknown)
    what += [f'missing columns {", ".join(missing)}'] * bool(missing)
    return [], [f'{path.name}:1: {" and ".join(what) or "columns in another order"}']
  seen: dict[tuple, int] = {}
  for number, line in enumerate(lines[1:], start=2):
    try:
      row = Row.from_cells(next(csv.reader([line], strict=True), []))
    except (ValueError, csv.Error) as error:
      problems.append(f'{path.name}:{number}: {error}')
      continue
    rows.append(row)
    # One program measures one thing once: the same run and metric at the same second is either
    # appended twice or two settings that were given one name.
    first = seen.setdefault((row.run, row.metric, row.hardware, row.date), number)
    if first != number:
      problems.append(
        f'{path.name}:{number}: repeats line {first} ({row.run} {row.metric}, {row.date})'
      )
  if cut:
    problems.append(f'{path.name}:{len(lines) + 1}: cut off while it was written: {cut!r}')
  return rows, problems


def newest(rows: Iterable[Row]) -> list[Row]:
  """The last row of each run and metric, in the order in which they first appeared."""
  return list({(row.run, row.metric): row for row in rows}.values())


# -------------------------------------------------------------------- commands


def parse_flags(argv: Sequence[str], define: Callable[[Any], object]) -> Any:
  """`parse_command` for a program with absl flags: parses into flags of its own.

  A config file that is gone, a config argument it no longer takes, and an overridden field that no
  longer exists all raise.

  Args:
    argv: words after the module.
    define: defines the program's flags on the `flag_values` it is given, for example
      `lambda f: config_flags.DEFINE_config_file('config', flag_values=f)`.

  Returns:
    The parsed `absl.flags.FlagValues`.
  """
  from absl import flags

  values = flags.FlagValues()
  before, sys.argv = sys.argv, ['program', *argv]  # config_flags looks for overrides there
  try:
    define(values)
    extra = values(sys.argv)[1:]
  finally:
    sys.argv = before
  if extra:
    raise ValueError(f'takes no {" ".join(extra)}')
  for name in values:
    # A missing config file is reported only when the config is used: use it.
    getattr(values[name].value, 'lock', None)
  return values


@functools.cache
def check_command(text: str) -> str | None:
  """What is wrong with a command of the ledger, or None if it would still start.

  Imports the module and calls its `parse_command` with the words that follow. Both can run code,
  so only modules and config files of this source tree are let through: a row somebody else wrote
  is checked like any other.

  Example:
    >>> check_command('python -m experiments.gone --lr=1')
    'no module experiments.gone'
  """
  try:
    words = shlex.split(text)
  except ValueError as error:
    return f'is no command line: {error}'
  if len(words) < 3 or words[:2] != ['python', '-m']:
    return 'is not `python -m MODULE ...`'
  name, argv = words[2], words[3:]
  if not re.fullmatch(r'(experiments|benchmarks)(\.\w+)+', name):
    return f'{name} is not run: only modules of experiments and benchmarks are'
  try:
    spec = importlib.util.find_spec(name)
  except Exception:  # whatever a package above it raises
    spec = None
  if spec is None or spec.origin is None:
    return f'no module {name}'
  if not _in_tree(spec.origin):
    return f'{name} is not run: it lies outside of the source tree'
  outside = _foreign_file(argv)
  if outside:
    return outside
  said = io.StringIO()
  try:
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(said):
      module = importlib.import_module(name)
      parse = getattr(module, 'parse_command', None)
      if parse is not None:
        parse(argv)
      elif argv:
        return f'{name} offers no parse_command(argv), so its flags cannot be checked'
  except (Exception, SystemExit) as error:
    text = said.getvalue() if isinstance(error, SystemExit) else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
      return kind
    # A KeyError says no more than the name it missed.
    return f'{kind}: {lines[-1]}' if isinstance(error, LookupError) else lines[-1].strip()
  return None


def _in_tree(path: str) -> bool:
  root = ROOT.resolve()
  return (root / path).resolve().is_relative_to(root)


def _foreign_file(argv: Sequence[str]) -> str | None:
  """What is wrong with the first word that would have a file from elsewhere read or executed."""
  for i, word in enumerate(argv):
    match = re.fullmatch(r'--?([\w.-]+)(?:=(.*))?', word, re.DOTALL)
    name, value = (match[1], match[2]) if match else ('', word)
    if name == 'flagfile':
      return f'{word}: flags are read from no file here, write them out'
    # `--config=PATH:ARGUMENT`; any other flag may name a Python file too.
    path = (''.join(argv[i + 1 : i + 2]) if value is None else value).split(':')[0]
    if name != 'config' and not path.endswith('.py'):
      continue
    parts = pathlib.PurePath(path).parts
    if pathlib.PurePath(path).is_absolute() or '..' in parts or not _in_tree(path):
      return (
        f'{path} is not read: a config file is named relative to the source tree and lies in it'
      )
  return None


# -------------------------------------------------------------------- tables


class Column(NamedTuple):
  """A column of a table: heading, metric it shows, and how many of its units make one shown."""

  heading: str
  metric: str
  scale: float = 1.0


def run_table(
  experiments: Sequence[str], columns: Sequence[Column]
) -> Callable[[Sequence[Row]], list[str]]:
  """A table with one line for each run of the experiments."""
  several = len(experiments) > 1

  def table(rows):
    runs: dict[str, dict[str, Row]] = {}
    for row in newest(rows):
      if row.run.split('/')[0] in experiments:
        runs.setdefault(row.run, {})[row.metric] = row
    shown = [c for c in columns if any(c.metric in found for found in runs.values())]
    head = ['experiment'] * several + ['data', 'network', 'setting']
    head += [*(c.heading for c in shown), 'seeds']
    body = []
    for run, found in runs.items():
      seeds = sorted({str(row.seeds) for row in found.values() if row.seeds})
      cells = [_with_spread(found.get(c.metric), c.scale) for c in shown]
      body.append([*run.split('/')[0 if several else 1 :], *cells, ', '.join(seeds)])
    used = [row for found in runs.values() for row in found.values()]
    return _markdown(head, body, 'l' * (3 + several) + 'r' * (len(shown) + 1)) + _sources(used)

  return table


def goal_table(prefix: str) -> Callable[[Sequence[Row]], list[str]]:
  """A table with one line for each row whose run starts with `prefix`, beside its goal."""

  def table(rows):
    used = [row for row in newest(rows) if row.run.startswith(prefix)]
    head = ['measured', 'metric', 'value', 'against', 'goal', 'reached']
    body = []
    for row in used:
      goal = '' if row.goal is None else _shown(row.goal, row.unit)
      name = '/'.join(row.run.split('/')[1:])
      body.append(
        [name, row.metric, _with_spread(row, units=True), row.reference, goal, row.reached]
      )
    return _markdown(head, body, 'llrlrl') + _sources(used)

  return table


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
  'pruning': run_table(
    ('admm_nn_s', 'darb', 'pcnn', 'pattern', 'pconv', 'one_shot'),
    (
      Column('top-1 %', 'top1'),
      Column('perplexity', 'perplexity'),
      Column('change to dense', 'change'),
      Column('change of perplexity', 'perplexity_change'),
      Column('fewer weights, x', 'compression'),
      Column('fewer bytes, x', 'compression_bytes'),
      Column('values alone, x', 'compression_values'),
      Column('file, bytes', 'file_bytes'),
    ),
  ),
  'files': run_table(
    ('exported',),
    (
      Column('top-1 %', 'top1'),
      Column('change to float32', 'change'),
      Column('same first guess, %', 'agreement'),
      Column('file, kB', 'file_bytes', 1e3),
    ),
  ),
  'frequency': run_table(
    ('imagenet_freq',),
    (
      Column('top-1 %', 'top1'),
      Column('gain, points', 'gain'),
      Column('over the controls', 'gain_over_controls'),
      Column('input bytes', 'input_bytes'),
      Column('input values', 'input_values'),
      Column('million MACs', 'macs', 1e6),
      Column('parameters, thousand', 'parameters', 1e3),
      Column('channels on', 'channels_on'),
    ),
  ),
  'darb': run_table(
    ('darb',),
    (
      Column('top-1 %', 'top1'),
      Column('perplexity', 'perplexity'),
      Column('change, points', 'change'),
      Column('change of perplexity', 'perplexity_change'),
      Column('rate', 'rate'),
      Column('over the best structure', 'rate_over_structured'),
      Column('index bits', 'index_bits_per_kept'),
      Column('rate in bytes', 'compression_bytes'),
    ),
  ),
  'pcnn': run_table(
    ('pcnn',),
    (
      Column('top-1 %', 'top1'),
      Column('change, points', 'change'),
      Column('convolutions, x', 'conv_compression_bytes'),
      Column('their weights alone', 'conv_compression'),
      Column('at 8 bits', 'conv_compression_8bit'),
      Column('whole network, bytes', 'compression_bytes'),
    ),
  ),
  'one_shot': run_table(
    ('one_shot',),
    (
      Column('top-1 %', 'top1'),
      Column('change, points', 'change'),
      Column('agreement %', 'agreement'),
      Column('logit error', 'logit_error'),
      Column('fewer weights, x', 'compression'),
      Column('fewer bytes, x', 'compression_bytes'),
    ),
  ),
  'quantization': run_table(
    ('dgms',),
    (
      Column('top-1 %', 'top1'),
      Column('change to dense', 'change'),
      Column('bits per weight', 'bits_per_weight'),
      Column('fewer bytes, x', 'compression_bytes'),
    ),
  ),
  'benchmarks': goal_table('benchmarks'),
}


def _shown(value: float, unit: str = '1') -> str:
  # Four digits are more than any measurement here holds; larger whole numbers stay whole.
  text = f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
  return text if unit == '1' else f'{text} {unit}'


def _with_spread(row: Row | None, scale: float = 1.0, units: bool = False) -> str:
  if row is None:
    return ''
  unit = row.unit if units else '1'
  if not row.spread:
    return _shown(row.value / scale, unit)
  # The error with two digits, the value to the same place.
  places = max(0, 1 - math.floor(math.log10(row.spread / scale)))
  text = f'{row.value / scale:.{places}f} ± {row.spread / scale:.{places}f}'
  return text if unit == '1' else f'{text} {unit}'


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], align: str) -> list[str]:
  if not body:
    return ['No rows yet.']
  lines = [head, [':--' if a == 'l' else '--:' for a in align], *body]
  return ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines]


def _sources(rows: Sequence[Row]) -> list[str]:
  """Commands, hardware, revision and day behind a table, folded away below it."""
  sources = dict.fromkeys((r.command, r.hardware, r.revision, r.date[:10]) for r in rows)
  if not sources:
    return []
  items = [
    f'- `{command}`<br>{html.escape(hardware)}; revision {revision}; {day}'
    for command, hardware, revision, day in sources
  ]
  return ['', '<details><summary>Commands and hardware</summary>', '', *items, '', '</details>']


def render(text: str, rows: Sequence[Row]) -> str:
  """Text with everything between `<!-- results:NAME -->` and its end marker made anew.

  Raises:
    ValueError: a marker names no table of `TABLES`, or is not closed.
  """
  pattern = re.compile(r'(<!-- results:(\S+) -->\n)(.*?)(<!-- /results:\2 -->)', re.DOTALL)

  def replace(match):
    if match[2] not in TABLES:
      raise ValueError(f'README.md asks for table {match[2]!r}; there are {", ".join(TABLES)}')
    return match[1] + '\n'.join(TABLES[match[2]](rows)) + '\n' + match[4]

  opened = re.findall(r'<!-- results:(\S+) -->', text)
  closed = [match[2] for match in pattern.finditer(text)]
  if opened != closed:
    missing = [name for name in opened if name not in closed] or opened
    raise ValueError(f'README.md opens results:{missing[0]} and does not close it')
  return pattern.sub(replace, text)


# -------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
  """Flags of `python -m experiments.ledger`."""
  result = argparse.ArgumentParser(prog='python -m experiments.ledger', description='The ledger.')
  group = result.add_mutually_exclusive_group()
  group.add_argument('--write', action='store_true', help='renew the tables in README.md')
  group.add_argument('--check', action='store_true', help='fail if README.md is out of date')
  return result


def main(argv: Sequence[str] | None = None, root: pathlib.Path = ROOT) -> int:
  """Checks `results.csv` of a tree; 0 if all is well. A missed goal is printed, not an error."""
  args = parser().parse_args(argv)
  rows, problems = read(root / 'results.csv')
  for text in dict.fromkeys(row.command for row in rows):
    wrong = check_command(text)
    if wrong:
      problems.append(f'command no longer runs: {wrong}\n    {text}')
  short = [row for row in newest(rows) if row.reached == 'no']
  for row in short:
    against = f' ({row.reference})' if row.reference else ''
    print(
      f'short of its goal: {row.run} {row.metric} {_with_spread(row, units=True)}, '
      f'goal {_shown(row.goal or 0.0, row.unit)}{against}'
    )
  if (args.write or args.check) and not problems:
    readme = root / 'README.md'
    old = readme.read_text()
    try:
      new = render(old, rows)
    except ValueError as error:
      problems.append(str(error))
    else:
      if args.check and new != old:
        problems.append('README.md is out of date: run python -m experiments.ledger --write')
      if args.write and new != old:
        files.write_text(readme, new)
        print('README.md renewed')
  for problem in problems:
    print(problem, file=sys.stderr)
  print(f'{len(rows)} rows, {len(short)} short of their goal, {len(problems)} problems')
  return 1 if problems else 0


if __name__ == '__main__':
  sys.exit(main())
