"""Pictures of a whole pruned network: its layers, its patterns, what it achieves for its size."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, DrawingArea
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
import numpy as np
from numpy.typing import ArrayLike

from fqjax import _figures
from fqjax._figures import PART, WHOLE, percent
from fqjax.sparsity import _tree
from fqjax.sparsity._plan import Plan

# Names longer than this push the bars out of the picture.
_MAX_NAME = 34
# Side of a pattern's grid, in points.
_GRID = 21.0


class Point(NamedTuple):
  """A pruned network in `accuracy_against_rate`.

  Attributes:
    rate: what it costs: bytes, kept share, multiply-accumulates, or how many times smaller it is.
    value: what it achieves, in the unit of the vertical axis.
    spread: standard error of the value, if known.
    series: points of one series share a marker and are joined by a line.
    label: above the point.
  """

  rate: float
  value: float
  spread: float | None = None
  series: str = 'pruned'
  label: str = ''


def _count(value: float, _=None) -> str:
  """A number for an axis: 1500 is '1.5k', 0.05 stays '0.05'."""
  return EngFormatter(sep='')(value) if abs(value) >= 1000 else f'{value:g}'


def _name(path: str) -> str:
  short = path.removesuffix('/kernel')
  return short if len(short) <= _MAX_NAME else f'…{short[1 - _MAX_NAME :]}'


def kept_per_layer(plan: Plan, masks: Any = None, *, title: str = '') -> Figure:
  """Weights that each layer keeps, on a logarithmic axis, with their share.

  Layers without a structure have full bars; vectors (biases, norms) are left out.

  Args:
    plan: from `make_plan` or `allocate`; at least one array of two axes.
    masks: tree like the parameters, bool arrays, None where nothing is pruned; counted in place of
      what the plan says, e.g. halfway through gradual pruning or where layers share one budget.
    title: above the bars; by default what the pruned layers keep together.

  Raises:
    ValueError: for masks of another model, or a plan without a matrix or kernel.

  Example:
    >>> from fqjax.sparsity import Unstructured, make_plan
    >>> params = {'fc1': {'kernel': jnp.ones((64, 10))}, 'fc2': {'kernel': jnp.ones((10, 10))}}
    >>> plan = make_plan(params, [('fc1/.*', Unstructured(keep=0.25))])
    >>> figure = kept_per_layer(plan)
    >>> print(figure.axes[0].get_title())
    pruned layers keep 160 of 640 weights (25 %)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['25 %', '100 %']
  """
  entries = [entry for entry in plan.entries if len(entry.shape) > 1 and entry.size]
  if not entries:
    raise ValueError('the plan has no array of two axes or more: there is no layer to draw.')
  kept = {entry.path: entry.kept for entry in entries}
  if masks is not None:
    pruned = [entry.path for entry in plan.pruned]
    found = _tree.by_path(masks, {e.path: e for e in plan.entries}, 'the tree of masks', pruned)
    kept |= {path: int(np.count_nonzero(mask)) for path, mask in found.items()}
  sizes = np.array([entry.size for entry in entries])
  counts = np.array([kept[entry.path] for entry in entries])

  many = len(entries) > 25
  figure = _figures.figure(7.5, 1.4 + len(entries) * (0.19 if many else 0.3), images=False)
  axes = figure.subplots()
  rows = np.arange(len(entries))
  axes.barh(rows, sizes, color=WHOLE, label='dense')
  axes.barh(rows, counts, color=PART, label='kept', height=0.5)
  axes.set_xscale('log')
  low, high = counts[counts > 0].min(initial=sizes.min()) / 3, sizes.max()
  # A sixth of the width for the percentages.
  axes.set_xlim(low, high * (high / low) ** 0.2)
  font = 7.5 if many else 9
  for row, count, size in zip(rows, counts, sizes, strict=True):
    axes.annotate(
      percent(count, size), (size, row),
      textcoords='offset points', xytext=(4, 0), va='center', fontsize=font,
    )  # fmt: skip
  axes.set_yticks(rows, [_name(entry.path) for entry in entries], fontsize=font)
  axes.set_ylim(len(entries) - 0.4, -0.6)  # the first layer at the top
  axes.tick_params(axis='y', length=0)
  axes.set_xlabel('weights')
  axes.xaxis.set_major_formatter(FuncFormatter(_count))
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.grid(axis='x', alpha=0.3)
  axes.set_axisbelow(True)
  if not title and plan.pruned:
    whole = sum(entry.size for entry in plan.pruned)
    left = sum(kept[entry.path] for entry in plan.pruned)
    title = f'pruned layers keep {left:,} of {whole:,} weights ({percent(left, whole)})'
  axes.set_title(title)
  figure.legend(loc='outside lower center', ncols=2, frameon=False)
  return figure


def pattern_histogram(
  codebook: Sequence[int],
  counts: ArrayLike,
  shape: tuple[int, int] = (3, 3),
  *,
  title: str = '',
) -> Figure:
  """How many kernels use each pattern, most used first, every pattern drawn above its bar.

  Args:
    codebook: bitmasks; bit t set keeps tap t = row*width + column. Readable up to 32.
    counts: [patterns], e.g. the first of `pattern_usage`.
    shape: rows and columns of a kernel.
    title: above the bars.

  Raises:
    ValueError: when counts and codebook differ in length, or a mask does not fit the shape.

  Example:
    >>> from fqjax.sparsity import pattern_set
    >>> figure = pattern_histogram(pattern_set('elog4'), [5, 30, 0, 15])
    >>> [int(bar.get_height()) for bar in figure.axes[0].patches]
    [30, 15, 5, 0]
  """
  counts = np.asarray(counts)
  height, width = shape
  if not len(codebook) or counts.shape != (len(codebook),):
    raise ValueError(
      f'{len(codebook)} patterns and counts of shape {list(counts.shape)}: give one count per '
      'pattern.'
    )
  wrong = [mask for mask in codebook if not 0 <= mask < 1 << height * width]
  if wrong:
    raise ValueError(f'masks {wrong} have more than the {height * width} taps of shape={shape}.')
  order = np.argsort(-counts, kind='stable')
  figure = _figures.figure(max(4.0, 1.1 + 0.42 * len(order)), 3.6, images=False)
  axes = figure.subplots()
  places = np.arange(len(order))
  axes.bar(places, counts[order], color=PART, width=0.7)
  top = max(1.0, float(counts.max()))
  total = max(1.0, float(counts.sum()))
  for place, i in enumerate(order):
    at = (place, float(counts[i]))
    # Two digits: bars stand close. Of many bars none.
    share = f'{100 * counts[i] / total:.2g} %' if len(order) <= 16 else ''
    axes.annotate(share, at, textcoords='offset points', xytext=(0, 2), ha='center', fontsize=7)
    axes.add_artist(_grid(int(codebook[i]), shape, at, above=12.0 if share else 4.0))
  axes.set_ylim(0, 1.45 * top)  # room for a grid above the tallest bar
  axes.set_xlim(-0.7, len(order) - 0.3)
  axes.set_xticks(
    places, [str(codebook[i]) for i in order], rotation=90 if len(order) > 8 else 0, fontsize=8
  )
  axes.set_xlabel('pattern (bitmask)')
  axes.set_ylabel('kernels')
  axes.yaxis.set_major_formatter(FuncFormatter(_count))
  if title:
    axes.set_title(title)
  return figure


def _grid(mask: int, shape: tuple[int, int], at: tuple[float, float], above: float):
  """The taps of a pattern as a small grid, `above` points over a place of the axes."""
  rows, columns = shape
  cell = _GRID / max(shape)
  area = DrawingArea(cell * columns, cell * rows)
  for tap in range(rows * columns):
    row, column = divmod(tap, columns)
    area.add_artist(
      Rectangle(
        (cell * column, cell * (rows - 1 - row)), cell, cell,
        facecolor=PART if mask >> tap & 1 else 'white', edgecolor='#8a97a6', linewidth=0.6,
      )
    )  # fmt: skip
  box = AnnotationBbox(
    area, at, xybox=(0, above), boxcoords='offset points',
    box_alignment=(0.5, 0), frameon=False, pad=0,
  )  # fmt: skip
  box.set_in_layout(False)
  return box


def accuracy_against_rate(
  points: Sequence[Point | Mapping[str, Any]],
  *,
  dense: float | tuple[float, float] | None = None,
  rate: str = 'bytes',
  value: str = 'top-1, %',
  log: bool = True,
  title: str = '',
) -> Figure:
  """What pruned networks achieve over what they cost, with error bars of one standard error.

  Args:
    points: pruned networks, at least one; a mapping has the names of `Point`'s fields.
    dense: value of the dense network, or (value, standard error): a dashed line with a band.
    rate: what the horizontal axis shows.
    value: what the vertical axis shows, e.g. 'perplexity'.
    log: logarithmic horizontal axis.
    title: above the axes.

  Raises:
    ValueError: without points, or for a rate that has no logarithm.

  Example:
    >>> points = [Point(10_000, 90.1, 0.3, 'ADMM'), Point(20_000, 92.0, 0.2, 'ADMM')]
    >>> figure = accuracy_against_rate(points, dense=(92.5, 0.2))
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['dense', 'ADMM']
  """
  points = [Point(**p) if isinstance(p, Mapping) else Point(*p) for p in points]
  if not points:
    raise ValueError('accuracy_against_rate needs at least one point.')
  if log and min(point.rate for point in points) <= 0:
    raise ValueError('a rate of 0 or less has no logarithm; pass log=False.')
  figure = _figures.figure(7.0, 4.6, images=False)
  axes = figure.subplots()
  if dense is not None:
    middle, spread = dense if isinstance(dense, tuple) else (dense, 0.0)
    axes.axhline(middle, color='#475569', linestyle='--', label='dense')
    if spread:
      axes.axhspan(middle - spread, middle + spread, color='#475569', alpha=0.15, linewidth=0)
  series: dict[str, list[_figures.Dot]] = {}
  for p in points:
    series.setdefault(p.series, []).append(_figures.Dot(p.rate, p.value, p.spread, p.label))
  _figures.draw_series(axes, series)
  if log:
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_formatter(NullFormatter())
  axes.xaxis.set_major_formatter(FuncFormatter(_count))
  axes.margins(x=0.08)
  axes.set_xlabel(rate)
  axes.set_ylabel(value)
  axes.legend(frameon=False)
  if title:
    axes.set_title(title)
  return figure
