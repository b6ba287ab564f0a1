"""The report of a run: one HTML file that needs nothing else, not even a network."""

from collections.abc import Mapping, Sequence
import dataclasses
import html
import importlib.metadata
import json
import numbers
import os
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from fqjax import files
from fqjax.data import Corrupt
from fqjax.train import _page, _svg
from fqjax.train._corrupt import METRIC
from fqjax.train._pictures import Picture, Sample, class_name, pictures_html, samples_html
from fqjax.train._tables import Table, cell_text, table_html

COMPONENTS = ('Y', 'Cb', 'Cr')
# Wider than this, a matrix says less than a list of its largest entries.
MAX_MATRIX = 30
# Names of undecodable files; all of them are in `corrupt.json`.
MAX_FILES = 5

History = Sequence[Mapping[str, Any]]


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  command: str,
  config: Any,
  history: History | Mapping[str, History],
  heatmap: np.ndarray | None = None,
  block: int = 8,
  confusion: np.ndarray | None = None,
  class_names: Sequence[str] | None = None,
  samples: Sequence[Sample] = (),
  tables: Sequence[Table] = (),
  figures: Sequence[Picture] = (),
  summary: Mapping[str, Any] | None = None,
  hardware: str | None = None,
  corrupt: Mapping[str, Corrupt] | None = None,
) -> pathlib.Path:
  """Writes the report of a run as one self-contained HTML file, whole or not at all.

  Args:
    path: where; folders above it are made.
    title: heading of the page.
    command: what to type to repeat the run.
    config: mapping, dataclass, ConfigDict or text.
    history: rows of `metrics.jsonl`, or several runs' rows by name. Values that are not finite are
      gaps in the curves; rows may lack any key but 'step'.
    heatmap: share of images in which each DCT channel was chosen, 0..1, channels in the order
      `block**2 * component + block * u + v`: [components * block**2]. NaN: not offered.
    block: block size of the DCT.
    confusion: counts, [classes, classes]; rows are true classes, columns predictions.
    class_names: names of the classes.
    samples: photographs with predictions; the first 48 are shown.
    tables: the first stands at the top, the others after the curves.
    figures: Matplotlib figures with title and caption, after the first table.
    summary: name to value, shown largest; by default what `history` ends with.
    hardware: what it ran on; by default what JAX and the system say.
    corrupt: what could not be decoded (of a loader's iterator, or of `fit`), by name of the data:
      `{'training': ..., 'validation': ...}`. Nothing is said about data that is not named.

  Returns:
    The path.

  Raises:
    ValueError: shapes that do not fit together, named; a picture that is no figure.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> history = [{'step': 1, 'train/loss': 2.0}, {'step': 2, 'train/loss': 1.5}]
    >>> write_report(
    ...   folder / 'report.html', title='A run', command='python -m x', config={}, history=history
    ... ).name
    'report.html'
  """
  runs = dict(history) if isinstance(history, Mapping) else {'': history}
  tables = [Table(*table) for table in tables]
  if summary is None:
    summary = _last_values(runs)
  sections = [
    (
      'summary',
      'Result',
      _summary(summary) + ''.join(table_html(t) for t in tables[:1]) + _corrupt(corrupt or {}),
    ),
    ('pictures', 'Pictures', pictures_html(figures)),
    ('curves', 'Curves', _curves(runs)),
    ('channels', 'Chosen channels', _heat_maps(heatmap, block)),
    ('tables', 'Comparisons', ''.join(table_html(t) for t in tables[1:])),
    ('confusion', 'Confusion', _confusion(confusion, class_names)),
    ('samples', 'Photographs', samples_html(samples, class_names)),
    ('repeat', 'Repeat it', _repeat(command, config, hardware)),
  ]
  sections = [section for section in sections if section[2]]

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, _page.page(title, sections))
  return path


# -------------------------------------------------------------------- summary


def _last_values(runs: Mapping[str, History]) -> dict[str, Any]:
  """Final accuracy and loss where there is a single run, and its length."""
  if len(runs) != 1:
    return {}
  (rows,) = runs.values()
  found = {}
  for key, name in (('val/top1', 'Accuracy'), ('val/loss', 'Validation loss')):
    values = _column(rows, key)[1]
    values = values[np.isfinite(values)]
    if values.size:
      number = float(values[-1])
      found[name] = f'{100 * number:.2f} %' if key == 'val/top1' else f'{number:.4g}'
  if rows:
    found['Steps'] = int(rows[-1]['step'])
  return found


def _summary(summary: Mapping[str, Any]) -> str:
  items = ''.join(
    f'<div><dt>{html.escape(name)}</dt><dd>{cell_text(value)}</dd></div>'
    for name, value in summary.items()
  )
  return f'<dl class="facts">{items}</dl>' if items else ''


def _corrupt(corrupt: Mapping[str, Corrupt]) -> str:
  """A line per set of data: how much of it was left out, and what."""
  lines = []
  for name, found in corrupt.items():
    if not found.count:
      lines.append(f'Of the {html.escape(name)} images every one could be decoded.')
      continue
    shown = '; '.join(html.escape(file) for file in list(found.files)[:MAX_FILES])
    more = len(found.files) - MAX_FILES
    lines.append(
      f'Of the {html.escape(name)} images {found.count:,} samples ({len(found.files):,} files) could'
      f' not be decoded and did not count: {shown}{f" and {more:,} more" if more > 0 else ""}.'
    )
  return ''.join(f'<p class="note skipped">{line}</p>' for line in lines)


# -------------------------------------------------------------------- curves


def _column(rows: History, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of one metric, sorted by step; a step met twice keeps its last value."""
  found = {}
  for row in rows:
    if isinstance(row.get(key), numbers.Real):
      found[float(row['step'])] = float(row[key])
  steps = np.array(sorted(found))
  return steps, np.array([found[s] for s in steps])


# Title, endings of the metrics it shows (all in one unit).
_CHARTS = (
  ('Loss', ('loss',)),
  ('Accuracy, %', ('top1', 'top5')),
  ('Learning rate', ('lr',)),
  ('Channels in use', ('channels_on',)),
  ('Images per second', ('images_per_second',)),
)
_NAMES = {'top1': 'top-1', 'top5': 'top-5', 'lr': 'learning rate', 'val': 'validation'}
_NOT_DRAWN = ('step', 'time', METRIC)


def _curves(runs: Mapping[str, History]) -> str:
  keys = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
  keys = [key for key in keys if key not in _NOT_DRAWN]
  named = {ending for _, endings in _CHARTS for ending in endings}
  drawn = ''.join(_chart(title, runs, keys, endings) for title, endings in _CHARTS)
  rest = ''.join(_chart(key, runs, [key]) for key in keys if key.split('/')[-1] not in named)
  text = f'<div class="charts">{drawn}</div>' if drawn else ''
  if drawn and len(runs) > 1:
    none = np.zeros(0)
    text = _svg.legend([_svg.Series(run, none, none, i, True) for i, run in enumerate(runs)]) + text
  if drawn and any(key.startswith('train/') for key in keys):
    text += '<p class="note">Thin lines: training. Lines with dots: validation.</p>'
  if rest:
    text += f'<details><summary>More curves</summary><div class="charts">{rest}</div></details>'
  return text


def _chart(
  title: str, runs: Mapping[str, History], keys: Sequence[str], endings: Sequence[str] = ()
) -> str:
  """One chart of the metrics with these endings (any, if none are given), '' if there are none."""
  if len(runs) > 1:
    endings = endings[:1]  # a line per run and kind is as much as an eye can follow
  keys = [key for key in keys if not endings or key.split('/')[-1] in endings]
  series = []
  for number, (run, rows) in enumerate(runs.items()):
    for key in keys:
      x, y = _column(rows, key)
      if not np.isfinite(y).any():
        continue
      if title.endswith('%') and y[np.isfinite(y)].max() <= 1.0:
        y = 100 * y
      parts = key.split('/')
      words = ' '.join(_NAMES.get(part, part.replace('_', ' ')) for part in parts)
      measured = len(parts) > 1 and parts[0] != 'train'
      # Of one run, training is grey and each measured metric has a colour; of several, each run.
      alone = endings.index(parts[-1]) if measured and endings else 0 if measured else 5
      style = number if len(runs) > 1 else alone
      series.append(_svg.Series(f'{run}: {words}' if run else words, x, y, style, measured))
  if not series:
    return ''
  finite = np.concatenate([s.y[np.isfinite(s.y)] for s in series])
  log = title == 'Loss' and finite.min() > 0 and finite.max() > 50 * finite.min()
  chart = _svg.line_chart(series, title=title, log=log)
  heading = html.escape(title + (', logarithmic' if log else ''))
  # Several runs share one legend above the charts.
  own = _svg.legend(series) if len(runs) == 1 and len(series) > 1 else ''
  return f'<figure><figcaption>{heading}</figcaption>{chart}{own}</figure>'


# -------------------------------------------------------------------- channels


def _heat_maps(heatmap: Any, block: int) -> str:
  if heatmap is None:
    return ''
  heatmap = np.asarray(heatmap, np.float64).reshape(-1)
  per = block * block
  if heatmap.size not in (per, 3 * per):
    raise ValueError(
      f'heatmap has {heatmap.size} channels; block={block} makes {per} (Y) or {3 * per} (Y, Cb, Cr).'
    )
  panels, counts = [], []
  for i, component in enumerate(COMPONENTS[: heatmap.size // per]):
    part = heatmap[per * i : per * (i + 1)]
    svg = _svg.heat_map(part, component=component, first=per * i, size=block)
    panels.append(f'<figure><figcaption>{component}</figcaption>{svg}</figure>')
    counts.append(f'{component} {int((part > 0.5).sum())}')
  chosen = int((heatmap > 0.5).sum())
  numbers_say = 'Numbers in the cells count along the zig-zag. ' if block <= 10 else ''
  return (
    f'<p>{chosen} of {heatmap.size} channels are chosen in more than half of the images: '
    f'{", ".join(counts)}.</p>'
    f'<div class="maps">{"".join(panels)}</div>'
    '<p class="scale"><span>never</span><span class="ramp"></span><span>always chosen</span></p>'
    f'<p class="note">Share of images in which the gate chose a frequency. {numbers_say}'
    f'Rows are vertical frequency u, columns horizontal frequency v; the channel index is '
    f'{per}·component + {block}·u + v (shown on hovering).</p>'
  )


# -------------------------------------------------------------------- confusion


def _confusion(confusion: Any, class_names: Sequence[str] | None) -> str:
  if confusion is None:
    return ''
  counts = np.asarray(confusion)
  if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
    raise ValueError(f'confusion must be [classes, classes], got {list(counts.shape)}.')
  if class_names is not None and len(class_names) != len(counts):
    raise ValueError(f'{len(class_names)} class names for {len(counts)} classes.')
  n = len(counts)
  names = [class_name(i, class_names) for i in range(n)]
  per_class = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  if n > MAX_MATRIX:
    wrong = counts * (1 - np.eye(n, dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind='stable')[:20]
    rows = []
    for flat in order:
      i, j = divmod(int(flat), n)
      if wrong[i, j] > 0:
        rows.append((names[i], names[j], int(counts[i, j]), round(100 * per_class[i, j], 1)))
    worst = [i for i in np.argsort(np.diag(per_class), kind='stable') if counts[i].sum()][:10]
    hard = [(names[i], round(100 * per_class[i, i], 1), int(counts[i].sum())) for i in worst]
    return table_html(
      Table('Most confused pairs', ('was', 'taken for', 'images', 'of its class, %'), rows)
    ) + table_html(Table('Hardest classes', ('class', 'right, %', 'images'), hard))

  head = ''.join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
  body = []
  for i in range(n):
    cells = []
    for j in range(n):
      share = float(per_class[i, j])
      strong = f'{" on-light" * (share > 0.74)}{" on-dark" * (share > 0.49)}'
      cells.append(
        f'<td class="{"right" if i == j else ""}{strong}" style="--v:{100 * share:.0f}%" '
        f'title="{html.escape(names[i])} taken for {html.escape(names[j])}: '
        f'{100 * share:.1f} %">{int(counts[i, j]) or "·"}</td>'
      )
    total = (
      f'<td class="total">{100 * per_class[i, i]:.0f} %</td>' if counts[i].sum() else '<td></td>'
    )
    body.append(f'<tr><th scope="row">{html.escape(names[i])}</th>{"".join(cells)}{total}</tr>')
  return (
    '<p>Rows: what the image shows. Columns: what the network said. Number of images; '
    'framed: right.</p>'
    '<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">'
    f'<table class="confusion"><thead><tr><td></td>{head}<th scope="col"><span>right</span></th>'
    f'</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
  )


# -------------------------------------------------------------------- repeating it


def _config_text(config: Any) -> str:
  if isinstance(config, str):
    return config
  if hasattr(config, 'to_dict'):  # ConfigDict
    config = config.to_dict()
  elif dataclasses.is_dataclass(config) and not isinstance(config, type):
    config = dataclasses.asdict(config)
  return json.dumps(config, indent=2, default=str, ensure_ascii=False)


def _versions() -> list[tuple[str, str]]:
  rows = [('Python', platform.python_version())]
  for name in ('fqjax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy'):
    try:
      rows.append((name, importlib.metadata.version(name)))
    except importlib.metadata.PackageNotFoundError:
      rows.append((name, 'not installed as a package'))
  return rows


def _hardware() -> str:
  device = jax.devices()[0]
  text = f'{platform.machine()}, {os.cpu_count()} cores'
  # On a CPU the number of JAX devices is a setting, not hardware.
  return (
    text if device.platform == 'cpu' else f'{text}; {jax.device_count()} x {device.device_kind}'
  )


def _repeat(command: str, config: Any, hardware: str | None) -> str:
  where = [*_versions(), ('hardware', hardware or _hardware())]
  items = ''.join(f'<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>' for k, v in where)
  # Broken between words where there is room for that, never after the dashes of a flag.
  words = ' '.join(f'<span>{html.escape(word)}</span>' for word in command.split(' '))
  return (
    f'<pre class="command"><code>{words}</code></pre>'
    f'<dl class="versions">{items}</dl>'
    '<details><summary>Configuration</summary>'
    '<div class="scroll" tabindex="0" role="region" aria-label="Configuration">'
    f'<pre>{html.escape(_config_text(config))}</pre></div></details>'
  )
