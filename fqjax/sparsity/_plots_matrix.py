"""Pictures of pruned arrays: survivors, densities and sensitivity of rows, feature maps."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from numpy.typing import ArrayLike

from fqjax import _figures
from fqjax._figures import ACCENT, PART, percent
from fqjax.sparsity._layout import to_rows


def _matrix(mask: ArrayLike, layout: str) -> np.ndarray:
  """Which weights live, bool [rows, columns]; rows are outputs."""
  live = np.asarray(mask) != 0
  if live.ndim != len(layout):
    raise ValueError(
      f'a mask {list(live.shape)} needs a layout of {live.ndim} letters, got {layout!r}; '
      "e.g. 'IO' for a Flax Dense, 'HWIO' for a Flax Conv."
    )
  live = to_rows(live, layout)
  if not live.size:
    raise ValueError(f'a mask {list(live.shape)} has no weights.')
  return live


def _shares(live: np.ndarray, most: tuple[int, int]) -> np.ndarray:
  """Share of survivors in at most `most` boxes: [boxes down, boxes across]."""
  sums, sizes = live.astype(np.float64), np.ones(())
  for axis in (0, 1):
    length = live.shape[axis]
    edges = np.linspace(0, length, min(length, most[axis]) + 1).round().astype(int)
    sums = np.add.reduceat(sums, edges[:-1], axis)
    sizes = np.multiply.outer(sizes, np.diff(edges))
  return sums / sizes


def survivors(
  mask: ArrayLike, layout: str = 'OI', *, pixels: tuple[int, int] = (240, 480), title: str = ''
) -> Figure:
  """Where the weights of a matrix live, and how dense each row is.

  A matrix larger than the picture becomes an image of densities: each pixel shows the share of its
  weights that live.

  Args:
    mask: leaf, bool or weights; what is not 0 lives.
    layout: one capital per axis; rows are outputs, columns by tap, inputs fastest.
    pixels: most rows and columns that are drawn one by one.
    title: above the picture; by default how many live.

  Raises:
    ValueError: when the layout does not fit, or the mask is empty.

  Example:
    >>> figure = survivors(jnp.array([[1, 0, 0, 1], [0, 0, 0, 1]]))
    >>> print(figure.axes[0].get_title())
    3 of 8 weights live (37.5 %)
  """
  live = _matrix(mask, layout)
  rows, columns = live.shape
  shares = _shares(live, pixels)
  coarse = shares.shape != live.shape
  figure = _figures.figure(8.5, 4.2, images=False)
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
  image = left.imshow(
    shares,
    cmap='Blues',
    vmin=0.0,
    vmax=max(float(shares.max()), 1e-9) if coarse else 1.0,
    aspect='auto',
    interpolation='nearest',
    extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
  )
  if coarse:
    figure.colorbar(image, ax=left, label='share that lives', location='left', shrink=0.8)
  left.set_xlabel('column (input)')
  left.set_ylabel('row (output)')
  left.set_title(
    title or f'{live.sum():,} of {live.size:,} weights live ({percent(live.sum(), live.size)})'
  )
  density = 100 * live.mean(1)
  right.stairs(density, np.arange(rows + 1) - 0.5, orientation='horizontal', fill=True, color=PART)
  right.axvline(density.mean(), color=ACCENT, linewidth=1, linestyle='--')
  right.set_xlim(0, 1.05 * max(float(density.max()), 1e-9))
  right.set_xlabel('row density, %')
  right.set_title(f'{density.min():.3g} to {density.max():.3g} %')
  right.grid(axis='x', alpha=0.3)
  return figure


def row_densities(
  series: Mapping[str, ArrayLike], *, bank: int | None = None, title: str = ''
) -> Figure:
  """How unevenly the survivors of matrices are spread over their rows, or over banks of a row.

  Each matrix is a line through its densities from the densest row to the emptiest.

  Args:
    series: name -> densities [rows] in 0..1 (of `row_density`, say), or a matrix [rows, columns] in
      which what is not 0 lives.
    bank: columns of a bank; None takes whole rows. A last bank may be shorter. Matrices only.
    title: above the axes.

  Raises:
    ValueError: without a series, for arrays of another rank, or banks of densities.

  Example:
    >>> figure = row_densities({'fc': np.array([[1, 1, 0, 0], [0, 1, 0, 0]])}, bank=2)
    >>> print(figure.axes[0].lines[0].get_ydata())
    [100.  50.   0.   0.]
  """
  if not series:
    raise ValueError('row_densities needs at least one matrix.')
  figure = _figures.figure(7.0, 4.4, images=False)
  axes = figure.subplots()
  for number, (name, given) in enumerate(series.items()):
    values = np.asarray(given)
    if values.ndim == 2 and values.size:
      live = values != 0
      starts = np.arange(0, live.shape[1], bank or live.shape[1])
      sizes = np.diff([*starts, live.shape[1]])
      values = np.add.reduceat(live, starts, 1, dtype=np.int64) / sizes
    elif values.ndim != 1 or not values.size or bank:
      raise ValueError(
        f'{name!r} {list(values.shape)} must be a matrix [rows, columns]'
        + ('; banks cannot be told from densities.' if bank else ', or densities [rows].')
      )
    ordered = 100 * np.sort(values, axis=None)[::-1]
    spread = f'{ordered[-1]:.3g} to {ordered[0]:.3g} %, mean {ordered.mean():.3g} %'
    places = 100 * (np.arange(len(ordered)) + 0.5) / len(ordered)
    few = len(ordered) <= 40
    axes.plot(
      places, ordered, '.-' if few else '-', color=f'C{number % 10}', label=f'{name}: {spread}'
    )
  axes.set_xlim(0, 100)
  axes.set_ylim(bottom=0)
  what = f'banks of {bank} columns' if bank else 'rows'
  axes.set_xlabel(f'{what}, densest first, %')
  axes.set_ylabel('density, %')
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  if title:
    axes.set_title(title)
  return figure


def row_sensitivity(
  change: ArrayLike,
  density: ArrayLike | None = None,
  *,
  fractions: Sequence[float] | None = None,
  what: str = 'change of loss',
  title: str = '',
) -> Figure:
  """What pruning each row costs: a line for one fraction, a heat strip for several.

  Args:
    change: [rows] or [rows, fractions], the cost of pruning one row (or one group of rows) and
      nothing else.
    density: [rows] in 0..1; rows are then ordered from the emptiest to the densest, and their
      densities drawn above.
    fractions: what was taken from the row in each column of `change`, 0..1.
    what: name of the cost.
    title: above the picture.

  Raises:
    ValueError: for shapes that do not fit together.

  Example:
    >>> figure = row_sensitivity([0.3, 0.1, 0.2], density=[0.9, 0.2, 0.5])
    >>> print(figure.axes[-1].lines[0].get_ydata())
    [0.1 0.2 0.3]
  """
  change = np.asarray(change, np.float64)
  if change.ndim not in (1, 2) or not change.size:
    raise ValueError(f'change is [rows] or [rows, fractions], got {list(change.shape)}.')
  if change.ndim == 2 and (fractions is None or len(fractions) != change.shape[1]):
    raise ValueError(f'fractions must name the {change.shape[1]} columns of change.')
  rows = len(change)
  order = np.arange(rows)
  if density is not None:
    density = np.asarray(density, np.float64)
    if density.shape != (rows,):
      raise ValueError(f'{rows} rows of change, but densities {list(density.shape)}.')
    order = np.argsort(density, kind='stable')
  figure = _figures.figure(7.5, 3.6 if density is None else 4.8, images=False)
  if density is None:
    axes = figure.subplots()
  else:
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    above.stairs(100 * density[order], np.arange(rows + 1) - 0.5, fill=True, color=PART)
    above.set_ylabel('density, %')
    above.set_xlim(-0.5, rows - 0.5)
  if change.ndim == 1:
    axes.plot(np.arange(rows), change[order], '.-' if rows <= 60 else '-', color=ACCENT)
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
  else:
    _strip(figure, axes, change[order].T, fractions or (), what)
  axes.set_xlabel('row' if density is None else 'row, emptiest first')
  if title:
    figure.suptitle(title)
  return figure


def _strip(figure: Figure, axes: Axes, costs: np.ndarray, fractions: Sequence[float], what: str):
  """Costs [fractions, rows] as colours."""
  image = axes.imshow(costs, cmap='YlOrRd', aspect='auto', interpolation='nearest', origin='lower')
  axes.set_yticks(range(len(fractions)), [f'{100 * f:.3g}' for f in fractions])
  axes.set_ylabel('taken from the row, %')
  figure.colorbar(image, ax=axes, label=what, location='bottom', shrink=0.6)


def feature_maps(
  dense: ArrayLike,
  pruned: ArrayLike,
  *,
  images: ArrayLike | None = None,
  names: tuple[str, str] = ('dense', 'pruned'),
  labels: Sequence[str] | None = None,
  title: str = '',
) -> Figure:
  """Maps of two networks, one below the other: features of one image, or saliency of several.

  The two maps of a column share one scale. Below them stands how far apart they are: the norm of
  the difference over that of the first.

  Args:
    dense: [maps, h, w], 1 to 12 maps; of a Linen activation [h, w, c] `x.transpose(2, 0, 1)`.
    pruned: likewise, of the same shape.
    images: [maps, height, width, 3], uint8 or floats in 0..1: what the maps were made from, above.
    names: of the two networks.
    labels: of the maps; their numbers by default.
    title: above the grid.

  Raises:
    ValueError: for shapes that do not fit together, or too many maps.

  Example:
    >>> maps = np.ones((3, 8, 8))
    >>> figure = feature_maps(maps, 0.9 * maps)
    >>> [axes.get_xlabel() for axes in figure.axes[3:]]
    ['10 % apart', '10 % apart', '10 % apart']
  """
  first, second = np.asarray(dense, np.float64), np.asarray(pruned, np.float64)
  if first.ndim != 3 or first.shape != second.shape:
    raise ValueError(
      f'two sets of maps [maps, h, w] of one shape are needed, got {list(first.shape)} and '
      f'{list(second.shape)}.'
    )
  count, height, width = first.shape
  if not 1 <= count <= 12:
    raise ValueError(f'{count} maps: choose 1 to 12, e.g. maps[:8].')
  labels = [f'map {i}' for i in range(count)] if labels is None else labels
  if len(labels) != count or (images is not None and len(np.asarray(images)) != count):
    raise ValueError(f'{count} maps need as many labels and images.')
  rows = [*([] if images is None else [('image', images)]), (names[0], first), (names[1], second)]
  side = min(1.7, 9.0 / count)
  figure = _figures.figure(
    0.7 + count * side, len(rows) * side * height / width + 0.6 + 0.3 * bool(title)
  )
  panels = figure.subplots(len(rows), count, squeeze=False)
  for (name, maps), line in zip(rows, panels, strict=True):
    for i, axes in enumerate(line):
      axes.set_xticks([])
      axes.set_yticks([])
      if name == 'image':
        axes.imshow(np.asarray(maps)[i])
        continue
      pair = first[i], second[i]
      axes.imshow(maps[i], cmap='viridis', vmin=np.min(pair), vmax=np.max(pair))
    line[0].set_ylabel(name)
  for i, label in enumerate(labels):
    panels[0, i].set_title(label, fontsize=9)
    size = float(np.linalg.norm(first[i]))
    apart = float(np.linalg.norm(second[i] - first[i]))
    panels[-1, i].set_xlabel(f'{100 * apart / size:.0f} % apart' if size else '', fontsize=8)
  if title:
    figure.suptitle(title)
  return figure
